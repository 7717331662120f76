"""Links: what a transfer takes, and who waits for whom where a network is shared."""

import pytest

from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.costs import links as links_module
from disagg.costs.links import Direction, LinkModel, Passage, Ports, Route, SerialLinks

A, B, C, D = (InstanceId(name) for name in "abcd")
LINK = LinkModel(bytes_per_s=1000, latency_s=0.5, overhead_s=0.25)


def test_a_transfer_pays_latency_overhead_and_bytes() -> None:
    assert LINK.transfer_time_s(2000) == 2.75
    assert LinkModel().transfer_time_s(10**12) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bytes_per_s": 0}, "a link of 0 bytes/s moves nothing"),
        ({"bytes_per_s": -1.0}, "a link of -1.0 bytes/s"),
        ({"latency_s": -1}, "latency of -1 s cannot be"),
        ({"overhead_s": float("nan")}, "overhead of nan s cannot be"),
    ],
)
def test_what_is_no_link_is_refused(changes: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        LinkModel(**changes)


def test_parts_travel_side_by_side() -> None:
    assert Route.over(LINK, 2).transfer_time_s(2001) == 0.75 + 1.001


def test_the_slowest_passage_decides() -> None:
    """Three of four parts through one port, the fourth over a link of its own."""
    route = Route((Passage(LINK, 3, 1), Passage(LINK, 1, 1)), num_parts=4)
    assert route.transfer_time_s(4000) == 0.75 + 3


def test_transfers_of_a_pair_wait_for_each_other_and_others_do_not() -> None:
    links = SerialLinks(lambda source, target: Route.over(LINK))
    assert links.start(A, B, 1000, now=1.0) == 2.75
    assert links.start(A, B, 1000, now=1.5) == 4.5
    assert links.start(A, C, 1000, now=1.5) == 3.25
    assert links.start(A, B, 1000, now=9.0) == 10.75


@pytest.mark.parametrize(("count", "ends"), [(1, [1.75, 3.5, 5.25]), (2, [1.75, 1.75, 3.5])])
def test_transfers_through_the_same_ports_wait_for_a_free_one(count: int, ends: list[float]) -> None:
    out, into = (Ports("near", Direction.OUT, LINK, count), Ports("far", Direction.IN, LINK, count))
    links = SerialLinks(lambda source, target: Route((Passage(LINK, ports=out), Passage(LINK, ports=into))))
    assert [links.start(source, target, 1000, now=0.0) for source, target in ((A, C), (B, C), (B, D))] == ends


def test_a_transfer_over_several_ports_waits_for_as_many() -> None:
    ports = Ports("near", Direction.OUT, LINK, 2)

    def route(source: InstanceId, target: InstanceId) -> Route:
        lanes = 2 if source == B else 1
        return Route((Passage(LINK, lanes, lanes, ports),), lanes)

    links = SerialLinks(route)
    assert links.start(A, C, 1000, now=0.0) == 1.75
    assert links.start(B, C, 1000, now=0.0) == 1.75 + 1.25
    assert links.start(A, D, 1000, now=0.0) == 3.0 + 1.75


def test_pairs_that_are_free_again_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "_MOST_PAIRS", 4)
    links = SerialLinks(lambda source, target: Route.over(LINK))
    busy_until_s = links.start(A, B, 10**6, now=0.0)
    for number in range(20):
        links.start(InstanceId(f"source-{number}"), B, 0, now=10.0 * number)
    assert links.num_pairs <= 4
    assert links.start(A, B, 0, now=300.0) == busy_until_s + 0.75
