"""``GET /requests``: what ended last, in order, page by page, and bounded."""

import asyncio
import math

import pytest
from api_site import Serve, Site, ids_of
from msgspec import structs
from scripted_router import NUM_CACHED

from disagg.base.errors import OverloadedError, UnavailableError
from disagg.base.ids import InstanceId
from disagg.measure.timeline import RequestTimeline, Stage
from disagg.serve.api.recent_requests import RecentRequests, with_stages
from disagg.serve.api.views import RequestPage, RequestView
from disagg.serve.router.interface import ServedBy
from disagg.serve.router.record import LiveStream

BODY = {"prompt": "x", "max_tokens": 3}


class StoppedClock:
    def now(self) -> float:
        return 0.0


def view(request_id: str = "r") -> RequestView:
    return RequestView(
        request_id=request_id, arrival_unix_s=1.0, num_prompt_tokens=1, num_output_tokens=1, finish_reason="stop"
    )


def ring(num_added: int, max_kept: int = 4) -> RecentRequests:
    recent = RecentRequests(max_kept)
    for number in range(1, num_added + 1):
        recent.add(view(f"r{number}"))
    return recent


def ids(page: RequestPage) -> list[str]:
    assert [one.request_id for one in page.requests] == [f"r{one.sequence}" for one in page.requests]
    return [one.request_id for one in page.requests]


async def ended(site: Site, num_requests: int) -> list[dict]:
    """Return what ``/requests`` tells once so many have ended; an aborted one ends a moment after its client left."""
    async with asyncio.timeout(20):
        while len(found := (await site.http.get("/requests")).json()["requests"]) < num_requests:
            await asyncio.sleep(0)
    return found


# The ring -------------------------------------------------------------------------------------------------------


def test_pages_follow_each_other_without_gap_or_repetition():
    recent = ring(3)
    first = recent.page(after=0, limit=2)
    assert (ids(first), first.next, first.dropped) == (["r1", "r2"], 2, 0)
    second = recent.page(first.next, limit=2)
    assert (ids(second), second.next) == (["r3"], 3)
    assert (ids(recent.page(3, 2)), recent.page(3, 2).next) == ([], 3)
    recent.add(view("r4"))
    assert ids(recent.page(3, 2)) == ["r4"]


def test_what_a_slow_reader_missed_is_counted():
    recent = ring(10)
    page = recent.page(after=3, limit=100)
    assert (ids(page), page.next, page.dropped) == (["r7", "r8", "r9", "r10"], 10, 3)
    assert recent.page(after=6, limit=1).dropped == 0


def test_a_negative_number_asks_for_the_newest():
    recent = ring(10)
    assert ids(recent.page(-2, 100)) == ["r9", "r10"]
    assert ids(recent.page(-100, 100)) == ["r7", "r8", "r9", "r10"]
    assert recent.page(-100, 100).dropped == 0
    assert recent.page(-1, 100).next == 10
    assert RecentRequests().page(-5, 100) == RequestPage(next=0, dropped=0, requests=[])


def test_a_number_of_an_earlier_life_of_the_server_starts_anew():
    page = ring(2).page(after=4000, limit=10)
    assert (ids(page), page.next, page.dropped) == (["r1", "r2"], 2, 0)


def test_arrivals_are_told_in_the_wall_clocks_time():
    recent = RecentRequests(unix_time=lambda: 1_000_000.0)
    assert recent.unix_time_of(moment_s=40.0, now=42.5) == 999_997.5


def test_stamps_count_from_the_arrival_and_stages_add_up_to_the_end():
    timeline = RequestTimeline(arrival_s=10.0, prefill_started_s=11.0, first_token_s=13.0, last_token_s=17.0)
    stream = LiveStream(timeline, StoppedClock())
    stream.served_by = ServedBy(prefill=InstanceId("prefill-0"))
    filled = with_stages(structs.replace(view(), e2e_s=7.5), stream, now=18.0)
    assert (filled.prefill_instance, filled.decode_instance) == ("prefill-0", None)
    assert filled.stamps == {"prefill_started": 1.0, "first_token": 3.0, "last_token": 7.0, "finished": 8.0}
    assert filled.stages.keys() == {stage.value for stage in Stage}
    assert math.isclose(sum(filled.stages.values()), 8.0)


def test_what_an_unfinished_request_waited_for_at_last_is_not_called_delivery():
    timeline = RequestTimeline(arrival_s=10.0, prefill_started_s=11.0, first_token_s=13.0, last_token_s=13.0)
    filled = with_stages(view(), LiveStream(timeline, StoppedClock()), now=18.0)
    assert filled.stages["delivery"] == 0.0
    assert (filled.stamps["last_token"], filled.stamps["finished"]) == (3.0, 8.0)


# The endpoint ---------------------------------------------------------------------------------------------------


async def test_a_finished_request_is_told_with_its_latencies(serve: Serve) -> None:
    site = await serve()
    await site.http.post("/v1/completions", json=BODY, headers={"X-Request-Id": "mine"})
    (one,) = await ended(site, 1)
    assert (one["request_id"], one["sequence"], one["choice"]) == ("mine", 1, 0)
    assert (one["num_prompt_tokens"], one["num_output_tokens"], one["num_cached_tokens"]) == (2, 3, NUM_CACHED)
    assert (one["prefill_instance"], one["decode_instance"]) == ("prefill-0", "decode-0")
    assert (one["finish_reason"], one["error"]) == ("length", "")
    assert 0 < one["ttft_s"] <= one["e2e_s"]
    assert one["tpot_s"] == pytest.approx((one["e2e_s"] - one["ttft_s"]) / 2)


async def test_each_choice_is_an_entry_under_the_id_of_its_request(serve: Serve) -> None:
    site = await serve()
    await site.http.post("/v1/completions", json={**BODY, "n": 2, "max_tokens": 1}, headers={"X-Request-Id": "mine"})
    found = await ended(site, 2)
    assert sorted((one["request_id"], one["choice"], one["tpot_s"]) for one in found) == [
        ("mine", 0, None),
        ("mine", 1, None),
    ]


async def test_a_failed_request_says_why_and_has_no_end(serve: Serve) -> None:
    site = await serve(lambda _: ids_of("a"), error=UnavailableError("decode-0 died"))
    await site.http.post("/v1/completions", json=BODY)
    (one,) = await ended(site, 1)
    assert (one["finish_reason"], one["error"], one["num_output_tokens"]) == ("error", "decode-0 died", 1)
    assert one["ttft_s"] is not None
    assert (one["tpot_s"], one["e2e_s"]) == (None, None)


async def test_a_fault_of_ours_is_told_without_its_words(serve: Serve) -> None:
    site = await serve(lambda _: ids_of("a"), error=ValueError("secret"))
    await site.http.post("/v1/completions", json=BODY)
    (one,) = await ended(site, 1)
    assert one["error"] == "internal error"


async def test_a_refused_request_has_no_stages(serve: Serve) -> None:
    site = await serve(refusal=OverloadedError("too many"))
    await site.http.post("/v1/completions", json=BODY)
    (one,) = await ended(site, 1)
    assert (one["finish_reason"], one["error"]) == ("error", "too many")
    assert (one["ttft_s"], one["prefill_instance"], one["stages"], one["stamps"]) == (None, None, {}, {})


async def test_a_client_that_leaves_ends_its_request_and_is_no_longer_counted_as_under_way(serve: Serve) -> None:
    gate = asyncio.Semaphore(1)
    site = await serve(gate=gate)
    async with site.http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
        parts = response.aiter_raw()  # an iterator that nobody holds is closed, and its response with it
        await anext(parts)
        assert (await site.http.get("/status")).json()["num_under_way"] == 1
        assert (await site.http.get("/requests")).json()["requests"] == []
    (one,) = await ended(site, 1)
    assert (one["finish_reason"], one["error"]) == ("abort", "")
    assert (await site.http.get("/status")).json()["num_under_way"] == 0


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("after=x", "'after' is 'x', but must be an integer"),
        ("limit=", "'limit' is '', but must be an integer"),
        ("limit=0", "'limit' is 0, but must be from 1 to 1000"),
        ("limit=1001", "'limit' is 1001, but must be from 1 to 1000"),
    ],
)
async def test_bad_parameters_are_refused_by_name(serve: Serve, query: str, words: str) -> None:
    site = await serve()
    response = await site.http.get(f"/requests?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["message"] == words
