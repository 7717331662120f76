"""Whole deployments in virtual time: same in, same out, and nothing lost."""

import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import LinearLatency, cluster_spec, instance, pair, poisson, serve, stamps

from disagg.base.block_hash import hash_blocks
from disagg.base.config import SchedulingMode
from disagg.base.errors import ConfigurationError
from disagg.base.ids import BlockHash, RequestId
from disagg.base.request import Role
from disagg.costs.latency import ConstantLatency, StepShape
from disagg.costs.links import LinkModel
from disagg.measure.statistics import LogHistogram, Percentiles
from disagg.measure.timeline import Stage
from disagg.simulator.cluster import ClusterSpec, SimulatedCluster
from disagg.simulator.recording import Recording
from disagg.simulator.request import Outcome, SimulatedRequest

DEPLOYMENTS = {
    "pair": pair(),
    "slow link": pair(link=LinkModel(bytes_per_s=2e6, latency_s=0.003), accept_s=0.001, message_s=0.0004),
    "two pairs": cluster_spec(*(instance(role, number) for role in (Role.PREFILL, Role.DECODE) for number in (0, 1))),
    "colocated": cluster_spec(instance(Role.COLOCATED), instance(Role.COLOCATED, 1)),
    "pair and colocated": cluster_spec(instance(Role.PREFILL), instance(Role.DECODE), instance(Role.COLOCATED)),
    "tight decode": cluster_spec(instance(Role.PREFILL, num_blocks=60), instance(Role.DECODE, num_blocks=48)),
    "tight decode that swaps": cluster_spec(
        instance(Role.PREFILL, num_blocks=60), instance(Role.DECODE, num_blocks=48, swap=LinkModel(1e7))
    ),
    "tight colocated": cluster_spec(instance(Role.COLOCATED, num_blocks=48)),
    "prefill first": cluster_spec(instance(Role.COLOCATED, scheduling=SchedulingMode.PREFILL_FIRST)),
    "decode first": cluster_spec(instance(Role.COLOCATED, scheduling=SchedulingMode.DECODE_FIRST)),
    "pulls before steps": cluster_spec(
        instance(Role.PREFILL), instance(Role.DECODE, pull_before_step=True), link=LinkModel(bytes_per_s=5e7)
    ),
    "short leases": cluster_spec(
        instance(Role.PREFILL, lease_s=0.02), instance(Role.DECODE, num_blocks=60), link=LinkModel(bytes_per_s=5e6)
    ),
}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_request_is_answered_in_full_and_every_block_comes_back(name: str) -> None:
    # The cluster itself raises unless all blocks are free or cached at the end.
    requests = poisson(rate=60, count=150, seed=3)
    ended = serve(DEPLOYMENTS[name], requests)
    assert {request.outcome for request in ended} == {Outcome.FINISHED}
    assert [request.num_output_tokens for request in requests] == [request.output_len for request in requests]
    for request in requests:
        assert sum(request.timeline.stages().values()) == pytest.approx(request.timeline.finished_s - request.arrival_s)
        assert min(request.timeline.stages().values()) >= 0


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_two_runs_are_equal_to_the_last_bit(name: str) -> None:
    first, second = (serve(DEPLOYMENTS[name], poisson(rate=60, count=80, seed=5)) for _ in range(2))
    assert [request.request_id for request in first] == [request.request_id for request in second]
    assert stamps(first) == stamps(second)


@pytest.mark.parametrize("name", DEPLOYMENTS)
@pytest.mark.parametrize("rate", [2, 60])
def test_timing_runs_of_equal_steps_ahead_changes_nothing(name: str, rate: float) -> None:
    ahead = serve(DEPLOYMENTS[name], poisson(rate, count=100, seed=7))
    single = serve(DEPLOYMENTS[name], poisson(rate, count=100, seed=7), step_by_step=True)
    assert [request.request_id for request in ahead] == [request.request_id for request in single]
    assert stamps(ahead) == stamps(single)
    assert gaps(name, rate, step_by_step=False) == gaps(name, rate, step_by_step=True)


def gaps(name: str, rate: float, *, step_by_step: bool) -> Percentiles:
    found = LogHistogram()
    cluster = SimulatedCluster(
        DEPLOYMENTS[name], lambda request: None, Recording(step_by_step=step_by_step, gaps=found)
    )
    cluster.run(poisson(rate, count=100, seed=7))
    return found.percentiles()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rate=st.sampled_from([1, 10, 100]),
    num_blocks=st.integers(30, 120),
    max_batch_size=st.integers(1, 12),
    mode=st.sampled_from(SchedulingMode),
)
def test_timing_ahead_changes_nothing_on_any_colocated_instance(
    seed: int, rate: float, num_blocks: int, max_batch_size: int, mode: SchedulingMode
) -> None:
    spec = cluster_spec(instance(Role.COLOCATED, num_blocks=num_blocks, max_batch_size=max_batch_size, scheduling=mode))
    ahead = serve(spec, poisson(rate, count=30, seed=seed, prompt=(1, 200), output=(1, 150)))
    single = serve(spec, poisson(rate, count=30, seed=seed, prompt=(1, 200), output=(1, 150)), step_by_step=True)
    assert stamps(ahead) == stamps(single)


def test_shared_prefixes_are_computed_once() -> None:
    def requests(shared: bool) -> list[SimulatedRequest]:
        hashes = {
            number: tuple(BlockHash(b"%d-%d" % (0 if shared else number, index)) for index in range(12))
            for number in range(20)
        }
        return [
            SimulatedRequest(
                RequestId(f"r{number}"), float(number), 200, 2, block_hashes=hashes[number], hash_block_size=16
            )
            for number in range(20)
        ]

    spec = cluster_spec(instance(Role.COLOCATED))
    alone, shared = requests(shared=False), requests(shared=True)
    serve(spec, alone)
    serve(spec, shared)
    assert shared[0].ttft_s == pytest.approx(alone[0].ttft_s)
    assert all(request.ttft_s < 0.6 * other.ttft_s for request, other in zip(shared[1:], alone[1:], strict=True))


def test_a_pipeline_runs_one_batch_in_each_stage() -> None:
    """Two batches of decodes, each step 10 ms in each of two stages: both advance every 20 ms, not every 40."""
    spec = cluster_spec(instance(Role.COLOCATED, latency=ConstantLatency(0.02, num_stages=2), max_steps_in_flight=2))
    # The second comes while the first is in its second stage, and stays in a batch of its own.
    requests = [SimulatedRequest(RequestId(name), at_s, 10, 101) for name, at_s in (("a", 0.0), ("b", 0.01))]
    serve(spec, requests)
    for request in requests:
        assert request.tpot_s == pytest.approx(0.02)
    alone = [SimulatedRequest(RequestId("a"), 0.0, 10, 101)]
    serve(spec, alone)
    assert alone[0].tpot_s == pytest.approx(0.02)


def test_a_pipeline_splits_sequences_that_wait_at_the_same_moment() -> None:
    """One batch of all would leave a stage idle; two of half the size each take half as long, side by side."""

    def tpot_s(**pipeline: int) -> float:
        latency = PerSequence(num_stages=pipeline.get("max_steps_in_flight", 1))
        spec = cluster_spec(instance(Role.COLOCATED, latency=latency, **pipeline))
        requests = [SimulatedRequest(RequestId(f"r{number}"), 0.0, 8, 200) for number in range(16)]
        serve(spec, requests)
        return max(request.tpot_s for request in requests)

    assert tpot_s(max_steps_in_flight=2) == pytest.approx(tpot_s() / 2, rel=0.05)


class PerSequence(LinearLatency):
    """1 ms for each sequence of a step."""

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        return (1e-3 * (shape.num_decodes + shape.num_prefills) / self.num_stages,) * self.num_stages


def test_a_full_decode_instance_holds_prefill_back_and_loses_nothing() -> None:
    """Back-pressure: the blocks stay with the prefill instance until there is room, and TTFT grows."""
    roomy = pair()
    tight = cluster_spec(instance(Role.PREFILL, num_blocks=40), instance(Role.DECODE, num_blocks=20))
    burst = [[SimulatedRequest(RequestId(f"r{number}"), 0.0, 200, 100) for number in range(8)] for _ in range(2)]
    for spec, requests in zip((roomy, tight), burst, strict=True):
        serve(spec, requests)
    waited = [request.timeline.stages()[Stage.HAND_OVER_WAIT] for request in burst[1]]
    assert max(waited) > 10 * max(request.timeline.stages()[Stage.HAND_OVER_WAIT] for request in burst[0])
    assert max(r.ttft_s for r in burst[1]) > 2 * max(r.ttft_s for r in burst[0])


def test_a_request_that_fits_no_instance_fails_with_the_reason() -> None:
    request = SimulatedRequest(RequestId("long"), 0.0, 10_000, 10)
    serve(pair(), [request])
    assert request.outcome is Outcome.FAILED
    assert "10010 tokens" in request.detail


def test_arrivals_out_of_order_are_refused() -> None:
    requests = [SimulatedRequest(RequestId(name), at_s, 10, 10) for name, at_s in (("a", 1.0), ("b", 0.5))]
    with pytest.raises(ConfigurationError, match="sort the workload"):
        serve(pair(), requests)


def test_load_spreads_over_equal_instances() -> None:
    spec = DEPLOYMENTS["two pairs"]
    one_each = cluster_spec(*(i for i in spec.instances if i.name.endswith("-0")))
    spread, single = (serve(s, poisson(rate=80, count=200, seed=11)) for s in (spec, one_each))
    assert sum(r.timeline.finished_s - r.arrival_s for r in spread) < 0.8 * sum(
        r.timeline.finished_s - r.arrival_s for r in single
    )


def test_steps_wait_for_pulls_only_when_told_to() -> None:
    """A long answer is decoded while a long prompt's blocks are pulled for 50 ms, or stops for as long."""

    def decode_s(*, pull_before_step: bool) -> float:
        spec = cluster_spec(
            instance(Role.PREFILL),
            instance(Role.DECODE, pull_before_step=pull_before_step),
            link=LinkModel(bytes_per_s=4e6),
        )
        requests = [SimulatedRequest(RequestId("long"), 0.0, 16, 200), SimulatedRequest(RequestId("b"), 0.1, 200, 2)]
        serve(spec, requests)
        return requests[0].tpot_s * 199

    assert decode_s(pull_before_step=True) - decode_s(pull_before_step=False) == pytest.approx(0.05, rel=0.1)


def test_message_and_accept_delays_are_waited_for() -> None:
    def run(spec: ClusterSpec) -> SimulatedRequest:
        (request,) = serve(spec, [SimulatedRequest(RequestId("a"), 0.0, 100, 5)])
        return request

    at_once, late = run(pair()), run(replace(pair(), accept_s=0.5, message_s=0.25))
    # To the prefill instance one message; offer and adoption are two more; the end is a message to the router.
    assert late.ttft_s - at_once.ttft_s == pytest.approx(0.75)
    gained = late.timeline.finished_s - at_once.timeline.finished_s
    assert gained == pytest.approx(0.5 + 4 * 0.25)


def test_random_deployments_keep_their_books() -> None:
    rng = random.Random(0)
    for prefills, decodes in product((1, 2), (1, 2)):
        spec = cluster_spec(
            *(instance(Role.PREFILL, n, num_blocks=rng.randint(40, 80)) for n in range(prefills)),
            *(instance(Role.DECODE, n, num_blocks=rng.randint(40, 80)) for n in range(decodes)),
        )
        ended = serve(spec, poisson(rate=100, count=60, seed=rng.randint(0, 99)))
        assert len(ended) == 60


def conversations(count: int, seed: int) -> list[SimulatedRequest]:
    """Return requests, some of less than a KV block, whose answers somebody asks for again."""
    rng = random.Random(seed)
    requests = poisson(rate=50, count=count, seed=seed)
    for number, request in enumerate(requests):
        topic = rng.randint(0, 40)
        tokens = [topic] * request.prompt_len + [1000 + topic] * request.output_len
        request.hash_block_size = 16
        request.block_hashes = hash_blocks(tokens, 16) if number % 3 else ()
    return requests


@pytest.mark.parametrize("name", ["pair", "colocated", "tight colocated"])
@pytest.mark.parametrize("seed", [1, 2])
def test_timing_ahead_changes_nothing_where_blocks_have_names(name: str, seed: int) -> None:
    ahead = serve(DEPLOYMENTS[name], conversations(300, seed))
    single = serve(DEPLOYMENTS[name], conversations(300, seed), step_by_step=True)
    assert stamps(ahead) == stamps(single)


@pytest.mark.parametrize("name", ["pair", "two pairs", "pair and colocated"])
def test_timing_ahead_changes_nothing_when_clients_go_away(name: str) -> None:
    def requests() -> list[SimulatedRequest]:
        found = poisson(rate=60, count=300, seed=5)
        for number, request in enumerate(found[::4]):
            request.cancel_s = request.arrival_s + 0.001 * (4 * number % 197)
        return found

    ahead, single = serve(DEPLOYMENTS[name], requests()), serve(DEPLOYMENTS[name], requests(), step_by_step=True)
    assert any(request.outcome is Outcome.CANCELLED for request in ahead)
    assert stamps(ahead) == stamps(single)
