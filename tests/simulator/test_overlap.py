"""What reading KV blocks during the prefill brings, on a link that is as slow as the prefill itself."""

from simulated import cluster_spec, instance, serve

from disagg.base.ids import RequestId
from disagg.base.request import Role
from disagg.costs.links import LinkModel
from disagg.measure.timeline import Stage
from disagg.simulator.request import SimulatedRequest

LINK = LinkModel(bytes_per_s=2e8, latency_s=0.0005)
"""5 us for each token of 1,000 bytes; computing one takes 10."""
NUM_TOKENS = 4096


def hand_over_s(*, kv_overlap: bool, shows_progress: bool = False) -> float:
    request = SimulatedRequest(RequestId("a"), 0.0, NUM_TOKENS, 8)
    spec = cluster_spec(
        instance(Role.PREFILL, kv_overlap=kv_overlap, shows_progress=shows_progress),
        instance(Role.DECODE, kv_overlap=kv_overlap),
        link=LINK,
    )
    serve(spec, [request])
    assert request.num_output_tokens == 8
    return request.timeline.stages()[Stage.HAND_OVER]


def test_only_the_last_chunk_is_left_to_be_handed_over() -> None:
    whole_s, rest_s = hand_over_s(kv_overlap=False), hand_over_s(kv_overlap=True)
    assert whole_s >= LINK.transfer_time_s(NUM_TOKENS * 1000)
    assert rest_s <= 1.1 * LINK.transfer_time_s(256 * 1000)


def test_a_layer_of_the_last_chunk_is_left_behind_a_step() -> None:
    rest_s = hand_over_s(kv_overlap=True, shows_progress=True)
    assert 0 < rest_s <= LINK.transfer_time_s(256 * 1000) / 16
