"""How a running answer goes to another instance when its own one is drained: by its KV blocks, or computed again."""

import pytest
from test_dispatch import Story

from disagg.base.config import RouterSettings
from disagg.base.ids import InstanceId
from disagg.base.messages import CostsLearned, StepCosts
from disagg.base.request import Role
from disagg.scheduling.dispatch.actions import Resume, SendMigrate
from disagg.scheduling.dispatch.events import CostsKnown, Drain, LinkKnown

A, B = InstanceId("colocated-0"), InstanceId("colocated-1")
NUM_TOKENS = 500


def drained(*, token_s: float | None, link_token_s: float) -> list[type]:
    """What becomes of an answer on A, with so many seconds for each token of a prefill on B, and of a pull by B."""
    story = Story({A: Role.COLOCATED, B: Role.COLOCATED}, settings=RouterSettings())
    story.arrive("x", num_tokens=NUM_TOKENS, max_total_tokens=NUM_TOKENS + 100)
    story.emit(A, "x")
    story.send(LinkKnown(source=A, target=B, latency_s=0.0, token_s=link_token_s))
    if token_s is not None:
        costs = StepCosts(step_s=0.0, token_s=token_s, square_s=0.0, prefill_s=0.0, context_s=0.0, decode_s=0.0)
        lesson = CostsLearned(instance=B, incarnation="b", costs=costs, num_prefill_steps=99, num_decode_steps=99)
        story.send(CostsKnown(lesson=lesson))
    return [type(action) for action in story.send(Drain(instance=A))]


@pytest.mark.parametrize(
    ("token_s", "link_token_s", "how"),
    [
        (1e-3, 1e-5, SendMigrate),
        (1e-5, 1e-3, Resume),
        (None, 1e-3, SendMigrate),
    ],
    ids=["a quick link pulls", "a slow link computes again", "without known costs pulls"],
)
def test_the_quicker_way_is_taken(token_s: float | None, link_token_s: float, how: type) -> None:
    assert how in drained(token_s=token_s, link_token_s=link_token_s)
