"""A prompt's KV blocks go to a decode instance that is near, unless that one has much more to do."""

from test_dispatch import Story

from disagg.base.config import RouterSettings
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.request import Role
from disagg.scheduling.dispatch.actions import SendAdopt, SendPart
from disagg.scheduling.dispatch.events import LinkKnown, PartMade

PREFILL = InstanceId("prefill-0")
FAR, NEAR = InstanceId("decode-0"), InstanceId("decode-1")
NUM_TOKENS = 500
ROLES = {PREFILL: Role.PREFILL, FAR: Role.DECODE, NEAR: Role.DECODE}


def deployment(far_token_s: float | None, near_token_s: float = 1e-6) -> Story:
    """Two decode instances, the far one first: it gets what nothing else decides."""
    story = Story(ROLES, settings=RouterSettings())
    story.send(LinkKnown(source=PREFILL, target=NEAR, latency_s=0.0, token_s=near_token_s))
    if far_token_s is not None:
        story.send(LinkKnown(source=PREFILL, target=FAR, latency_s=0.0, token_s=far_token_s))
    return story


def adopter(story: Story, name: str = "x") -> InstanceId:
    """Who goes on with one more prompt."""
    actions = story.until_offered(name, PREFILL, num_tokens=NUM_TOKENS, max_total_tokens=NUM_TOKENS + 10)
    (adopt,) = (action for action in actions if isinstance(action, SendAdopt))
    return adopt.instance


def test_the_near_one_goes_on() -> None:
    assert adopter(deployment(far_token_s=1e-3)) == NEAR


def test_nearness_does_not_outweigh_load() -> None:
    story = deployment(far_token_s=1e-3)
    chosen = [adopter(story, f"x{number}") for number in range(6)]
    assert chosen == [NEAR, NEAR, FAR, NEAR, NEAR, FAR]  # twice as many tokens at most


def test_links_that_are_all_quick_decide_nothing() -> None:
    assert adopter(deployment(far_token_s=1.9e-5)) == FAR


def test_a_link_that_was_not_measured_decides_nothing() -> None:
    assert adopter(deployment(far_token_s=None)) == FAR


def test_who_reads_a_prompt_early_is_near_too() -> None:
    story = deployment(far_token_s=1e-3)
    story.arrive("x", num_tokens=NUM_TOKENS, max_total_tokens=NUM_TOKENS + 10)
    actions = story.send(PartMade(request_id=RequestId("x"), epoch=Epoch(0), instance=PREFILL, is_first=True))
    assert [action.instance for action in actions if isinstance(action, SendPart)] == [NEAR]
