"""Paths by prediction: what is forecast of each, which one is taken, and what the log says of it afterwards."""

from dataclasses import replace

import pytest
from msgspec import structs

from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.messages import CostsLearned, StepCosts
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.base.router_messages import ForeignLoad
from disagg.base.step_limits import StepLimits
from disagg.base.window_blocks import WindowBlocks
from disagg.scheduling.dispatch.actions import PathChosen, PathEnded, SendAdopt, SendGenerate
from disagg.scheduling.dispatch.dispatcher import Dispatcher
from disagg.scheduling.dispatch.events import (
    CostsKnown,
    InstanceUp,
    OfferMade,
    Progress,
    PullEnded,
    SequenceArrived,
    TokensEmitted,
)
from disagg.scheduling.dispatch.experience import Experience
from disagg.scheduling.dispatch.fleet_facts import FleetFacts
from disagg.scheduling.dispatch.forecast import Path
from disagg.scheduling.dispatch.forecaster import Forecaster, PromptDemand, prefill_share
from disagg.scheduling.dispatch.paths import forecast_paths
from disagg.scheduling.dispatch.state import Charge, InstanceEntry, InstanceState, SequenceEntry
from disagg.scheduling.step.actions import WakeAt
from disagg.scheduling.step.events import Tick

P, D, C = InstanceId("prefill-0"), InstanceId("decode-0"), InstanceId("colocated-0")
COSTS = StepCosts(step_s=0.004, token_s=0.001, square_s=0.0, prefill_s=0.0, context_s=1e-6, decode_s=0.0)
OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.05)


def lesson(instance: InstanceId, num_prefill_steps: int = 100, num_decode_steps: int = 100) -> CostsLearned:
    return CostsLearned(
        instance=instance,
        incarnation="",
        costs=COSTS,
        num_prefill_steps=num_prefill_steps,
        num_decode_steps=num_decode_steps,
    )


def entry(instance: InstanceId, role: Role, **changes: object) -> InstanceEntry:
    ready = InstanceEntry(instance, role, state=InstanceState.READY, capacity=10_000, lesson=lesson(instance))
    return replace(ready, **changes)  # type: ignore[arg-type]


def sequence(num_tokens: int = 100, num_output: int = 100) -> SequenceEntry:
    return SequenceEntry(
        request_id=RequestId("a"),
        epoch=Epoch(1),
        num_tokens=num_tokens,
        max_total_tokens=num_tokens + num_output,
        priority=0,
        order=0,
        arrived_s=0.0,
        deadline_s=1e9,
    )


def answers(count: int) -> dict[RequestId, SequenceEntry]:
    return {RequestId(f"answer{number}"): sequence() for number in range(count)}


def forecaster(*entries: InstanceEntry, objectives: Objectives = OBJECTIVES, now: float = 0.0) -> Forecaster:
    return Forecaster(FleetFacts.of(entries, now), Experience(), objectives, now)


class TestForecasts:
    def test_a_prompt_waits_for_those_before_it_less_what_is_done_of_the_first(self) -> None:
        one = entry(P, Role.PREFILL, prefill_tokens=400, num_prefills=2, prefilling_since_s=10.0)
        assert forecaster(one, now=10.0).backlog_s(one) == pytest.approx(0.4)
        assert forecaster(one, now=10.1).backlog_s(one) == pytest.approx(0.3)
        assert forecaster(one, now=99.0).backlog_s(one) == pytest.approx(0.2)
        assert forecaster(one, now=10.0).first_token_s(one, sequence(), 100) == pytest.approx(0.5 + COSTS.step_s)

    def test_a_prompt_does_not_wait_for_those_that_are_served_after_it(self) -> None:
        urgent, patient, late = (replace(sequence(300), rank=(priority, 0.0, 0)) for priority in (0, 1, 2))
        one = entry(P, Role.PREFILL, prefill_tokens=600, num_prefills=2, prefilling_since_s=10.0)
        for number, other in enumerate((patient, late)):
            other.charges[P] = Charge(prefill_tokens=300, kv_tokens=300)
            other.started_s = 10.0
            one.prompts[RequestId(str(number))] = other

        def ahead_s(of: SequenceEntry, now: float = 10.0, **limits: int) -> float:
            one.limits = StepLimits(**limits)
            return forecaster(one, now=now).ahead_s(one, of)

        assert ahead_s(replace(late, rank=(3, 0.0, 0))) == pytest.approx(0.6)
        assert ahead_s(late) == pytest.approx(0.6)  # itself is among those that were given
        assert ahead_s(replace(late, rank=(1, 1.0, 0))) == pytest.approx(0.3)
        assert ahead_s(urgent, max_batch_tokens=100) == pytest.approx(0.1)  # the step in flight
        assert ahead_s(urgent, now=10.25, max_batch_tokens=1000) == pytest.approx(0.35)
        assert forecaster(one).first_token_s(one, urgent, 100) < forecaster(one).first_token_s(one, late, 100)

    def test_decodes_beside_it_lengthen_each_of_a_prompts_steps(self) -> None:
        one = entry(D, Role.DECODE, answers=answers(10), kv_tokens=1000)
        alone_s = forecaster(entry(D, Role.DECODE)).first_token_s(entry(D, Role.DECODE), sequence(), 1000)
        # Two steps, each with ten decodes of a millisecond and their context.
        assert forecaster(one).first_token_s(one, sequence(), 1000) == pytest.approx(alone_s + 2 * (0.010 + 0.001))

    def test_answers_of_other_routers_lengthen_the_steps_of_who_joins_and_end_as_those_do_of_which_little_is_known(
        self,
    ) -> None:
        def later_s(number_here: int, number_there: int) -> float:
            others = ForeignLoad(num_sequences=number_there, num_decodes=number_there)
            one = entry(D, Role.DECODE, answers=answers(number_here), foreign=others, kv_tokens=1000)
            return forecaster(one).later_token_s(one, sequence(), ahead_s=0.5, travels_s=0.0)

        assert later_s(0, 0) < later_s(0, 10) == pytest.approx(later_s(10, 0), rel=0.05)
        assert later_s(5, 5) == pytest.approx(later_s(10, 0), rel=0.05)

    def test_steps_sized_by_slack_give_a_prompt_what_the_objective_leaves(self) -> None:
        one = entry(D, Role.DECODE, answers=answers(20), limits=StepLimits(sized_by_slack=True))
        # 4 ms of the step and 20 of the decodes leave 26 of 50.
        assert forecaster(one).first_token_s(one, sequence(), 260) == pytest.approx(0.260 * 50 / 26)

    @pytest.mark.parametrize("token_s", [0.004, 0.006])
    def test_prompts_get_what_answers_leave_whether_the_smallest_chunk_is_a_long_gap_or_not(
        self, token_s: float
    ) -> None:
        costs = structs.replace(COSTS, token_s=token_s)
        assert prefill_share(costs, alone_s=0.02, tpot_s=0.05) == pytest.approx(0.6)
        # Where they leave next to nothing, a chunk of 16 once in ten objectives.
        assert prefill_share(costs, alone_s=0.0499, tpot_s=0.05) == pytest.approx(16 * token_s / 0.5)

    def test_beside_answers_less_is_done_of_a_prompt(self) -> None:
        one = entry(
            D,
            Role.DECODE,
            answers=answers(20),
            limits=StepLimits(sized_by_slack=True),
            prefill_tokens=400,
            num_prefills=1,
            prefilling_since_s=10.0,
        )
        # Of 50 ms its steps leave 26.
        assert forecaster(one, now=10.1).backlog_s(one) == pytest.approx(0.4 - 0.1 * 26 / 50)

    def test_answers_that_end_leave_a_prompt_all_of_the_time(self) -> None:
        one = entry(D, Role.DECODE, answers=answers(20), limits=StepLimits(sized_by_slack=True))
        end_s = 100 * 0.05 * sum(1 / number for number in range(1, 21))
        assert forecaster(one).first_token_s(one, sequence(), 20_000) == pytest.approx(20 + end_s * 24 / 50)

    def test_an_answer_is_slowed_by_those_beside_it_and_by_the_hand_over(self) -> None:
        one = entry(D, Role.DECODE, answers=answers(9))
        alone_s = forecaster(one).later_token_s(one, sequence(), ahead_s=0.0)
        assert alone_s == pytest.approx(0.004 + 0.010 + 149.5e-6, rel=0.01)
        handed_over_s = forecaster(one).later_token_s(one, sequence(), ahead_s=0.0, travels_s=0.99)
        assert handed_over_s == pytest.approx(alone_s + 0.01)

    def test_an_answer_is_slowed_by_the_prompts_that_are_left_when_it_begins(self) -> None:
        one = entry(D, Role.DECODE, num_prefills=1, prefill_tokens=990)
        alone_s, slowed_s = (forecaster(one).later_token_s(one, sequence(), ahead_s=ahead_s) for ahead_s in (1.0, 0.0))
        assert slowed_s == pytest.approx(alone_s + 0.01)

    def test_an_answer_is_slowed_by_prompts_that_wait_and_that_will_come(self) -> None:
        one = entry(D, Role.DECODE, limits=StepLimits(sized_by_slack=True))
        one.prefill_work.add(1.0, 0.0)

        def later_s(demand: PromptDemand) -> float:
            return Forecaster(FleetFacts.of([one], 0.0), Experience(), OBJECTIVES, 0.0, demand).later_token_s(
                one, sequence(), ahead_s=0.0
            )

        alone_s = later_s(PromptDemand())
        assert later_s(PromptDemand(waiting_tokens=990)) == pytest.approx(alone_s + 0.01)
        assert later_s(PromptDemand(tokens_per_s=500)) == pytest.approx(2 * alone_s)
        assert later_s(PromptDemand(waiting_tokens=1e6)) == pytest.approx(5 * alone_s), (
            "that is what is planned at most"
        )

    def test_an_answer_waits_for_those_that_have_not_ended_when_it_begins(self) -> None:
        one = entry(D, Role.DECODE, answers=answers(9))
        soon_s, later_s = (forecaster(one).later_token_s(one, sequence(), ahead_s=ahead_s) for ahead_s in (0.1, 99.0))
        assert soon_s > later_s == pytest.approx(0.005, rel=0.1)

    def test_short_answers_feel_a_hand_over_more(self) -> None:
        experience = Experience()
        for _ in range(64):
            experience.answer_ended(3)
            experience.answer_ended(97)
        assert experience.gaps_inverse == pytest.approx((1 / 2 + 1 / 96) / 2, rel=0.1)

    def test_no_room_for_kv_is_waited_for(self) -> None:
        roomy, full = (entry(D, Role.DECODE, kv_tokens=900, pool_tokens=size) for size in (5000, 1000))
        full_s, roomy_s = (forecaster(one).handed_over_token_s(one, sequence(), P) for one in (full, roomy))
        assert full_s > roomy_s

    def test_what_no_window_sees_any_more_takes_no_room(self) -> None:
        full, sliding = (
            entry(D, Role.DECODE, kv_tokens=900, pool_tokens=1000, window=window)
            for window in (None, WindowBlocks(tokens=100, num_each=5))
        )
        full_s, sliding_s = (forecaster(one).handed_over_token_s(one, sequence(), P) for one in (full, sliding))
        assert full_s > sliding_s

    def test_an_instance_that_never_prefilled_is_taken_to_be_as_quick_as_one_that_did(self) -> None:
        prefill = entry(P, Role.PREFILL)
        decode = entry(D, Role.DECODE, lesson=lesson(D, num_prefill_steps=0))
        both = forecaster(prefill, decode)
        assert both.first_token_s(decode, sequence(), 500) == both.first_token_s(prefill, sequence(), 500)

    def test_what_is_cached_need_not_be_computed(self) -> None:
        prefill, decode = entry(P, Role.PREFILL), entry(D, Role.DECODE)
        found = forecast_paths(
            (prefill, decode),
            sequence(1000),
            forecaster(prefill, decode),
            strict_roles=False,
            cached=lambda one, _: 900 if one is decode else 0,
        )
        ttft_s = {one.path: one.ttft_s for one in found}
        assert ttft_s[Path(D, D)] < 0.2 < ttft_s[Path(P, P)] == ttft_s[Path(P, D)]


class Story:
    """A dispatcher that goes by predictions, over one prefill and one decode instance unless said."""

    def __init__(self, *, strict_roles: bool = False, roles: dict[InstanceId, Role] | None = None, **limits) -> None:
        roles = roles or {P: Role.PREFILL, D: Role.DECODE}
        settings = RouterSettings(strict_roles=strict_roles)
        self.dispatcher = Dispatcher(roles, settings, SchedulerSettings(objectives=OBJECTIVES))
        self.now = 100.0
        for name in roles:
            self.send(
                InstanceUp(instance=name, max_total_tokens=10_000, pool_tokens=50_000, limits=StepLimits(**limits))
            )
            self.send(CostsKnown(lesson=lesson(name)))

    def send(self, event):
        actions = self.dispatcher.handle(event, self.now)
        self.dispatcher.validate()
        return [action for action in actions if not isinstance(action, WakeAt)]

    def arrive(self, name: str, num_tokens: int = 100, num_output: int = 100, **more):
        return self.send(
            SequenceArrived(
                request_id=RequestId(name),
                epoch=Epoch(1),
                num_tokens=num_tokens,
                max_total_tokens=num_tokens + num_output,
                **more,
            )
        )

    def emit(self, instance: InstanceId, name: str, num_tokens: int = 1, finished: bool = False):
        progress = Progress(RequestId(name), Epoch(1), num_tokens, finished)
        return self.send(TokensEmitted(instance=instance, progress=(progress,)))

    def where(self, actions) -> list[tuple[InstanceId, bool]]:
        return [(one.instance, one.hand_over) for one in actions if isinstance(one, SendGenerate)]


class TestChoice:
    def test_while_all_is_well_roles_decide(self) -> None:
        assert Story().where(Story().arrive("a")) == [(P, True)]

    def test_a_decode_instance_takes_a_prompt_that_would_wait_too_long(self) -> None:
        story = Story()
        assert story.where(story.arrive("a", num_tokens=900)) == [(P, True)]
        assert story.where(story.arrive("b", num_tokens=300)) == [(D, False)]

    def test_strict_roles_let_it_wait_in_the_router_until_its_instance_has_room(self) -> None:
        story = Story(strict_roles=True)
        story.dispatcher._turns._paths.predicts = True
        story.arrive("a", num_tokens=900)
        assert story.where(story.arrive("b", num_tokens=300)) == []
        story.now += 0.5
        assert story.where(story.send(Tick())) == []
        story.now += 0.2
        assert story.where(story.send(Tick())) == [(P, True)]

    def test_a_decode_instance_whose_answers_would_suffer_is_left_alone(self) -> None:
        story = Story()
        for number in range(28):
            name = f"busy{number}"
            story.arrive(name, num_tokens=10)
            story.emit(P, name)
            story.send(OfferMade(request_id=RequestId(name), epoch=Epoch(1), instance=P))
        story.arrive("a", num_tokens=900)
        assert story.where(story.arrive("b", num_tokens=2000)) == []

    def test_a_prefill_instance_keeps_an_answer_that_a_full_decode_instance_would_hold_up(self) -> None:
        story = Story(max_batch_size=2)
        for name in ("x", "y", "z"):
            story.arrive(name, num_tokens=10)
            story.emit(P, name)
            story.send(OfferMade(request_id=RequestId(name), epoch=Epoch(1), instance=P))
        assert story.where(story.arrive("short", num_tokens=20, num_output=4)) == [(P, False)]

    def test_without_any_objective_the_quickest_end_counts(self) -> None:
        story = Story()
        story.dispatcher._turns._paths._objectives = Objectives()
        story.arrive("a", num_tokens=2000)
        assert story.where(story.arrive("b", num_tokens=300)) == [(D, False)]

    def test_those_that_wait_are_served_in_order(self) -> None:
        story = Story(roles={C: Role.COLOCATED})
        story.arrive("a", num_tokens=900)
        story.arrive("b", num_tokens=900)
        story.arrive("c", num_tokens=10)
        started = story.emit(C, "a")
        assert [one.request_id for one in started if isinstance(one, SendGenerate)] == ["b"]


def test_the_log_tells_what_was_predicted_what_came_and_the_regret() -> None:
    story = Story()
    (chosen,) = [one for one in story.arrive("a", num_tokens=100, num_output=3) if isinstance(one, PathChosen)]
    assert chosen.chosen.path == Path(P, D)
    assert chosen.other is not None
    story.now += 0.3
    story.emit(P, "a")
    (adopted,) = story.send(OfferMade(request_id=RequestId("a"), epoch=Epoch(1), instance=P))
    assert isinstance(adopted, SendAdopt)
    story.send(PullEnded(request_id=RequestId("a"), epoch=Epoch(1), instance=D, duration_s=0.01))
    story.now += 0.1
    story.emit(D, "a")
    (ended,) = [one for one in story.emit(D, "a", finished=True) if isinstance(one, PathEnded)]
    assert (ended.path, ended.num_prompt_tokens) == (Path(P, D), 100)
    assert ended.ttft_s == pytest.approx(0.3)
    assert ended.predicted_ttft_s == chosen.chosen.ttft_s == pytest.approx(0.104)
    assert ended.tpot_s == pytest.approx(0.05)
    assert ended.ttft_regret_s == pytest.approx(0.3 - chosen.other.ttft_s)


def test_what_an_instance_prefills_for_itself_it_is_expected_to_decode() -> None:
    story = Story(roles={C: Role.COLOCATED})
    story.arrive("a", num_tokens=100)
    (one,) = story.dispatcher.instances
    assert (list(one.expected), one.num_decodes) == (["a"], 0)
    story.emit(C, "a")
    assert (list(one.expected), one.num_decodes) == ([], 1)
