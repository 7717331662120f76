"""What digests of offered KV blocks cost a simulated hand-over, and the loop that makes them."""

from typing import Any

import pytest
from simulated import cluster_spec, instance, serve

from disagg.base.ids import RequestId
from disagg.base.request import Role
from disagg.measure.timeline import Stage
from disagg.simulator.request import SimulatedRequest

MESSAGE_S = 0.001
BYTES_PER_S = 1e8
"""10 us for each token of 1,000 bytes: as long as computing it takes."""
NUM_TOKENS = 512
"""Two chunks."""


def served(count: int = 1, **changes: Any) -> list[SimulatedRequest]:
    requests = [SimulatedRequest(RequestId(f"r{number}"), 0.0, NUM_TOKENS, 8) for number in range(count)]
    prefill = instance(Role.PREFILL, digest_bytes_per_s=BYTES_PER_S, **changes)
    decode = instance(Role.DECODE, kv_overlap=changes.get("kv_overlap", True))
    serve(cluster_spec(prefill, decode, message_s=MESSAGE_S), requests)
    return requests


def control_s(request: SimulatedRequest) -> float:
    return request.timeline.stages()[Stage.HAND_OVER_CONTROL]


@pytest.mark.parametrize(
    ("settings", "num_hashed"),
    [
        ({"kv_overlap": False}, NUM_TOKENS),
        ({"kv_overlap": True}, 256),  # the first part's are made while the prompt is computed
        ({"kv_overlap": True, "shows_progress": True}, 256),  # none is of what a step still writes
    ],
)
def test_an_offer_waits_for_the_digests_of_what_no_part_had(settings: dict[str, bool], num_hashed: int) -> None:
    (request,) = served(**settings)
    assert control_s(request) == pytest.approx(2 * MESSAGE_S + num_hashed * 1000 / BYTES_PER_S)


def test_no_step_begins_while_digests_are_made() -> None:
    first, second = served(2, kv_overlap=False)
    between_s = second.timeline.first_token_s - first.timeline.first_token_s
    made_s = NUM_TOKENS * 1000 / BYTES_PER_S
    computed_s = 2 * (0.001 + 0.01e-3 * 256)  # two steps of a chunk each: see LinearLatency
    assert between_s == pytest.approx(made_s + computed_s)


def test_a_request_that_comes_while_digests_are_made_waits_for_them() -> None:
    alone = served(1, kv_overlap=False)[0].timeline
    late = SimulatedRequest(RequestId("late"), alone.first_token_s + 0.0005, 16, 2)
    requests = [SimulatedRequest(RequestId("r"), 0.0, NUM_TOKENS, 8), late]
    prefill = instance(Role.PREFILL, digest_bytes_per_s=BYTES_PER_S, kv_overlap=False)
    serve(cluster_spec(prefill, instance(Role.DECODE, kv_overlap=False)), requests)
    free_s = requests[0].timeline.first_token_s + NUM_TOKENS * 1000 / BYTES_PER_S
    assert late.timeline.prefill_started_s == pytest.approx(free_s)
