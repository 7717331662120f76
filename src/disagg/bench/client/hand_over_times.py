"""What the hand-overs of a server cost beside the bytes: the control path, and what a client sees of both.

All by the server's own timelines, of requests that are sent one after the other, so that no queue is in the figures.
"""

import secrets
from collections.abc import Sequence
from typing import Final

import httpx
import msgspec

from disagg.base.errors import DisaggError, UnavailableError
from disagg.bench.client.answer_stream import read_error
from disagg.bench.client.inquiries import RecentRequest, recent_requests, served_model
from disagg.bench.client.load_plan import Server
from disagg.measure.statistics import Percentiles
from disagg.measure.timeline import Stage

OUTPUT_LEN: Final = 12
"""A first token, a second one after the hand-over, and gaps to compare that with."""
_GAP: Final = (Stage.HAND_OVER_CONTROL, Stage.HAND_OVER_WAIT, Stage.HAND_OVER, Stage.QUEUE_DECODE, Stage.FIRST_DECODE)
"""The stages between the first and the second token."""
_TOKEN_IDS: Final = range(1000, 40_000)
_TIMEOUT_S: Final = 600.0


class HandOverTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Of the hand-overs of some requests, in seconds.

    ``control_s`` is from the first token until the decode instance knows of the whole offer: digests, the choice of the
    instance, two messages. ``bytes_s`` is what is pulled from then on. ``gap_ratio`` is the gap between the first and
    the second token, over the mean of the gaps after it.
    """

    num_hand_overs: int
    num_tokens: int
    control_s: Percentiles
    bytes_s: Percentiles
    gap_ratio: Percentiles

    @property
    def control_share(self) -> float:
        """Of control path and bytes together."""
        return self.control_s.mean / (self.control_s.mean + self.bytes_s.mean)


def measure_hand_overs(
    server: Server, num_requests: int, num_tokens: int, token_ids: Sequence[int] = _TOKEN_IDS
) -> HandOverTimes:
    """Send prompts of ``num_tokens`` that nobody has cached, drawn from ``token_ids``, after one that does not count.

    Answers are streamed, as whoever sees the gap before the second token wants them.
    Raises UnavailableError when no server answers, DisaggError when it refuses a request or hands none over.
    """
    model = server.model or served_model(server)
    run = secrets.token_hex(4)
    headers = {"authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    with httpx.Client(base_url=server.base_url, headers=headers, timeout=_TIMEOUT_S) as client:
        for number in range(-1, num_requests):
            _send(client, model, [secrets.choice(token_ids) for _ in range(num_tokens)], f"{run}{number}")
    sent = {f"{run}{number}" for number in range(num_requests)}
    return hand_over_times([one for one in recent_requests(server) if one.request_id in sent], num_tokens)


def hand_over_times(requests: Sequence[RecentRequest], num_tokens: int) -> HandOverTimes:
    """Return the figures of those requests that were handed over; raise DisaggError when none was."""
    moved = [
        one for one in requests if one.decode_instance and one.decode_instance != one.prefill_instance and one.stages
    ]
    if not moved:
        raise DisaggError(
            "the server handed no request over: it needs a prefill and a decode instance, and has to remember requests"
        )
    return HandOverTimes(
        num_hand_overs=len(moved),
        num_tokens=num_tokens,
        control_s=Percentiles.of([one.stages[Stage.HAND_OVER_CONTROL.value] for one in moved]),
        bytes_s=Percentiles.of([one.stages[Stage.HAND_OVER.value] for one in moved]),
        gap_ratio=Percentiles.of([_gap_ratio(one) for one in moved]),
    )


def _gap_ratio(request: RecentRequest) -> float:
    later_s = request.stages[Stage.DECODE.value] / max(1, request.num_output_tokens - 2)
    return sum(request.stages[stage.value] for stage in _GAP) / later_s if later_s > 0 else float("nan")


def _send(client: httpx.Client, model: str, prompt: list[int], request_id: str) -> None:
    body = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_LEN, "ignore_eos": True, "temperature": 0}
    headers = {"X-Request-Id": request_id}
    try:
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}, headers=headers) as response:
            content = b"".join(response.iter_raw())
    except httpx.HTTPError as error:
        raise UnavailableError(
            f"no answer from {client.base_url} ({error}); start a server with: disagg serve"
        ) from error
    if response.is_error:
        raise DisaggError(f"the server answered {response.status_code}: {read_error(content)}")
