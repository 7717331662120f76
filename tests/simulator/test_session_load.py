"""Closed loops: a session's calls wait for one another, and share the prefix that grows."""

from itertools import pairwise

from simulated import cluster_spec, instance

from disagg.base.config import RouterSettings
from disagg.base.request import Role
from disagg.measure.slo import Slo
from disagg.measure.workload import PrefixBlocks, Session, SessionCall
from disagg.simulator.cluster import ClusterSpec, SimulatedCluster
from disagg.simulator.request import SimulatedRequest
from disagg.simulator.session_load import SimulatedSessions
from disagg.simulator.simulation import simulate


def session(name: str, start_s: float, num_calls: int, think_s: float = 2.0) -> Session:
    calls = tuple(
        SessionCall(64 * (turn + 1), 5, think_s, PrefixBlocks(tuple(range(turn + 1)), 64)) for turn in range(num_calls)
    )
    return Session(name, calls, start_s)


def serve(spec: ClusterSpec, sessions: list[Session]) -> list[SimulatedRequest]:
    load = SimulatedSessions(sessions, block_size=16)
    ended: list[SimulatedRequest] = []

    def end(request: SimulatedRequest) -> None:
        ended.append(request)
        following = load.next_call(request)
        if following is not None:
            cluster.submit_later(following)

    cluster = SimulatedCluster(spec, end)
    cluster.run(load.first_calls())
    return ended


def test_a_call_comes_after_the_answer_and_the_thought() -> None:
    ended = serve(cluster_spec(instance(Role.COLOCATED)), [session("a", 1.0, 3)])
    assert [request.request_id for request in ended] == ["a:0", "a:1", "a:2"]
    assert ended[0].arrival_s == 1.0
    for before, after in pairwise(ended):
        assert after.arrival_s == before.timeline.finished_s + 2.0


def test_what_a_session_said_before_is_not_computed_again() -> None:
    spec = cluster_spec(instance(Role.COLOCATED))
    first, second = serve(spec, [session("a", 0.0, 2)])
    # 128 tokens take 2.28 ms in one step, 64 of them 1.64 ms: the others are cached, but for the last block.
    assert second.ttft_s < first.ttft_s * 1.2


def test_an_answer_is_not_computed_again_with_the_next_prompt() -> None:
    """Prompts of 64 and 256 tokens and an answer of 160: of the second prompt, 32 tokens and the last are new."""
    calls = (
        SessionCall(64, 160, 0.0, PrefixBlocks((1,), 64)),
        SessionCall(256, 2, 0.0, PrefixBlocks((1, 2, 3, 4), 64)),
    )
    spec = cluster_spec(instance(Role.COLOCATED))
    serve(spec, [Session("a", calls, 0.0)])
    load = SimulatedSessions([Session("a", calls, 0.0)], block_size=16)
    (first,) = load.first_calls()
    assert len(first.block_hashes) == (64 + 160) // 16
    _, second = serve(spec, [Session("a", calls, 0.0)])
    # 1 ms a step, 0.01 for each token: 256 computed ones take 3.56 ms, 32 to 48 at most 1.48.
    assert second.ttft_s < 0.0016


def test_a_call_whose_prompt_is_another_does_not_name_the_answer() -> None:
    calls = (
        SessionCall(64, 160, 0.0, PrefixBlocks((1,), 64)),
        SessionCall(256, 2, 0.0, PrefixBlocks((7, 2, 3, 4), 64)),
    )
    (first,) = SimulatedSessions([Session("a", calls, 0.0)], block_size=16).first_calls()
    assert len(first.block_hashes) == 64 // 16


def test_a_report_counts_every_call() -> None:
    load = SimulatedSessions([session("a", 0.0, 3), session("b", 0.5, 2)], block_size=16)
    spec = cluster_spec(instance(Role.PREFILL), instance(Role.DECODE))
    report = simulate(spec, load.first_calls(), Slo(), next_call=load.next_call)
    assert report.num_requests == report.num_finished == 5


def test_a_session_ends_with_the_call_that_is_refused() -> None:
    tight = cluster_spec(instance(Role.COLOCATED), router=RouterSettings(max_queued_requests=1))
    ended = serve(tight, [session("a", 0.0, 3), session("b", 0.0, 3)])
    assert len(ended) == 4
