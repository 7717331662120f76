"""When the placement is planned anew, and what is made of the answer. Pure.

The requests after the last decision are the reference; the latest are tested against it. When they differ, as many
fresh ones are waited for, so that the plan is made for the new workload alone and not for a mixture. The first sample
of all is planned for as well: nothing says that the placement was chosen for it.

A plan cannot wait for the longest answers, least of all where a deployment is too slow: their lengths are supposed.
When they have come and differ from what was supposed, the same sample is planned for again. When far fewer requests
keep their objectives than a plan said, the latest ones are planned for: once, until something moves.
"""

import enum
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from msgspec import structs

from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.base.elastic_settings import Replan
from disagg.base.errors import ConfigurationError
from disagg.scheduling.dispatch.experience import Experience
from disagg.scheduling.dispatch.fleet_facts import known_decode_costs, known_prefill_costs
from disagg.scheduling.dispatch.sequence_sample import SequenceSample
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.dispatch.workload import WorkloadWindow
from disagg.scheduling.replan.placements import RoleCounts, reachable
from disagg.scheduling.replan.question import ForecastPlacement, PlanAnswer, PlanQuestion
from disagg.scheduling.replan.workload_shift import answer_shift, arrival_shift
from disagg.scheduling.router.elastic_view import PlanCounts
from disagg.scheduling.router.membership import Membership
from disagg.scheduling.router.outputs import AskForPlan, PlanDecided

SAMPLE: Final = 100
"""Requests that are tested, and planned for."""
_LOOK_EVERY: Final = 25
"""Arrivals and ends in sum."""
_ENOUGH: Final = 0.5
_NEARLY_ALL: Final = 0.95
"""Parts of a sample that have to have ended: to be planned for, and for its answers to be tested."""
HORIZON_S: Final = 60.0
"""Within which a change has to pay."""
MIN_GAIN: Final = 0.03
"""Of attainment, the change included: less is not worth it."""
_MISSING: Final = 0.1
"""Of attainment: so far, and by more than chance, under what was predicted is a plan that failed."""
_FAILING_SCORE: Final = 3.0
_SCORE: Final = 2.326
"""McNemar's: a gain by chance is less likely than 1%."""


class _Stage(enum.Enum):
    FRESH = "fresh"
    """Waits for a sample of the new workload."""
    PLANNING = "planning"
    WATCHING = "watching"


class Replanner:
    """Decides for one deployment; ``experience`` and ``window`` are the dispatcher's."""

    def __init__(
        self, settings: RouterSettings, scheduler: SchedulerSettings, window: WorkloadWindow, experience: Experience
    ) -> None:
        self._settings = settings
        self._scheduler = scheduler
        objectives = scheduler.objectives
        self.is_on = settings.replan is not Replan.OFF
        if self.is_on and objectives.ttft_s is None and objectives.tpot_s is None:
            raise ConfigurationError(
                f"--replan {settings.replan.value} looks for the placement that keeps the objectives best, and there "
                "are none: give them with --slo, such as --slo ttft=500ms,tpot=50ms"
            )
        self._window = window
        self._experience = experience
        self._stage = _Stage.FRESH
        self._why = "the first requests"
        self._since = self._looked_at = self._reference = 0
        self._has_failed = False
        self._supposed: tuple[SequenceSample, ...] = ()
        """What was planned for, until its answers have come."""
        self.last: PlanDecided | None = None
        """The last decision."""
        self.counts = PlanCounts()
        """All decisions."""

    def look(self, members: Membership) -> AskForPlan | None:
        """Return a question for the planner, when one is due."""
        window = self._window
        if not self.is_on or self._stage is _Stage.PLANNING:
            return None
        news = window.num_taken + window.num_ended
        if news < self._looked_at + _LOOK_EVERY:
            return None
        self._looked_at = news
        if window.num_taken < self._since + SAMPLE:
            return None
        if self._stage is _Stage.WATCHING and (why := self._what_was_not_so()):
            self._stage, self._why, self._since = _Stage.FRESH, why, self._reference
        if self._stage is _Stage.FRESH:
            return self._ask(members)
        if why := self._what_moved():
            self._stage, self._why, self._since, self._has_failed = _Stage.FRESH, why, window.num_taken, False
        elif not self._has_failed and (why := self._what_failed()):
            self._stage, self._why, self._has_failed = _Stage.FRESH, why, True
            self._since = self._latest(_ENOUGH)
        return None

    def _what_was_not_so(self) -> str:
        """Test the answers that the sample of the last plan was supposed to get against those that it got."""
        reference = self._window.taken(self._reference, SAMPLE)
        if not self._supposed or not _has_ended(reference, _NEARLY_ALL):
            return ""
        supposed, self._supposed = self._supposed, ()
        shift = answer_shift(supposed, reference)
        return shift and f"what was supposed of the {shift}"

    def _what_moved(self) -> str:
        """Test the latest arrivals, and the latest answers, against those that were planned for."""
        window = self._window
        reference = window.taken(self._reference, SAMPLE)
        if len(reference) < SAMPLE:
            return ""  # long forgotten: nothing has moved for thousands of requests
        first = window.num_taken - SAMPLE
        if why := arrival_shift(reference, window.taken(first, SAMPLE)):
            return why
        latest = self._latest(_NEARLY_ALL)
        return answer_shift(reference, window.taken(latest, SAMPLE)) if latest >= self._since else ""

    def _latest(self, part: float) -> int:
        """Return where the latest sample begins of which so much has ended; one before the last decision is none."""
        first = self._window.num_taken - SAMPLE
        while first >= self._since and not _has_ended(self._window.taken(first, SAMPLE), part):
            first -= _LOOK_EVERY
        return first

    def _what_failed(self) -> str:
        """Test what part of those who came since the last plan keep their objectives against what was predicted."""
        if self.last is None:
            return ""
        window = self._window
        ended = [one for one in window.taken(self._since, window.num_taken - self._since) if one.has_ended]
        if len(ended) < SAMPLE:
            return ""
        predicted = self.last.best_attainment if self.last.acts else self.last.attainment
        kept = sum(one.has_kept for one in ended) / len(ended)
        deviation = math.sqrt(max(kept * (1 - kept), 0.01) / len(ended))
        if predicted - kept < max(_MISSING, _FAILING_SCORE * deviation):
            return ""
        return f"attainment: {kept:.1%} of {len(ended)} requests, {predicted:.1%} predicted"

    def _sample(self) -> tuple[SequenceSample, ...] | None:
        """Return the fresh sample; None while too few of it have ended. The others are supposed to be longer yet."""
        taken = self._window.taken(self._since, SAMPLE)
        ended = [one for one in taken if one.has_ended]
        if not _has_ended(taken, _ENOUGH):
            return None
        lengths = sorted(one.num_answer_tokens for one in ended)
        return tuple(one if one.has_ended else _supposed(one, lengths, number) for number, one in enumerate(taken))

    def _ask(self, members: Membership) -> AskForPlan | None:
        """Return the question; None where instances are on their way, or nothing is known of their costs yet."""
        entries = [member.entry for member in members]
        prefill, decode = known_prefill_costs(entries), known_decode_costs(entries)
        ready = [member for member in members if member.state is InstanceState.READY]
        sample = self._sample()
        if sample is None or prefill is None or decode is None or len(ready) < len(entries):
            return None
        present = RoleCounts.of(member.role for member in ready)
        settings = self._settings
        placements = reachable(present, settings.ranges, strict_roles=settings.has_walls)
        mean_tokens = sum(one.num_prompt_tokens for one in sample) / len(sample)
        pools = [entry.pool_tokens_of(mean_tokens) for entry in entries if entry.pool_tokens]
        if not pools:
            return None
        mean_s = self._experience.hand_over_s(round(mean_tokens))
        loads = [member.facts.load_s for member in ready if member.facts is not None]
        self._stage, self._reference = _Stage.PLANNING, self._since
        self._supposed = () if all(one.has_ended for one in sample) else sample
        return AskForPlan(
            why=self._why,
            question=PlanQuestion(
                placements=placements,
                requests=sample,
                router=settings,
                scheduler=self._scheduler,
                prefill_costs=prefill,
                decode_costs=decode,
                pool_tokens=round(min(pools)),
                hand_over_s=mean_s / 2,
                hand_over_token_s=mean_s / 2 / max(1.0, mean_tokens),
                join_s=max(loads, default=0.0) + 1.0,
                horizon_s=HORIZON_S,
            ),
        )

    def decide(self, answer: PlanAnswer) -> PlanDecided:
        """Return what is made of an answer, and watch from now on for the next move."""
        self._watch()
        present = answer.placements[0]
        best = max(answer.placements, key=lambda one: (one.attainment, -_distance(one, present)))
        pays = best is not present and _pays(best, present)
        self.last = PlanDecided(
            why=self._why,
            present=present.counts,
            best=best.counts,
            attainment=present.attainment,
            best_attainment=best.attainment,
            num_requests=answer.num_requests,
            num_placements=len(answer.placements),
            pays=pays,
            acts=pays and self._settings.replan is Replan.ACT,
        )
        self.counts = self.counts.plus(self.last)
        return self.last

    def gave_up(self) -> None:
        """The planner could not answer."""
        self._watch()

    def _watch(self) -> None:
        self._stage = _Stage.WATCHING
        self._since = self._window.num_taken


def _has_ended(sample: Sequence[SequenceSample], part: float) -> bool:
    return sum(one.has_ended for one in sample) >= part * SAMPLE


def _supposed(one: SequenceSample, lengths: Sequence[int], number: int) -> SequenceSample:
    """Return a sequence under way with the length of one that ended and was longer than it is now.

    Where none was, as many tokens are to come as the others had: an answer that may end at each token alike.
    """
    longer = lengths[bisect_right(lengths, one.num_answer_tokens) :]
    mean = sum(lengths) // len(lengths)
    expected = longer[number % len(longer)] if longer else one.num_answer_tokens + mean
    return structs.replace(one, num_answer_tokens=expected)


def _pays(best: ForecastPlacement, present: ForecastPlacement) -> bool:
    """Return whether the gain is large enough, and no play of chance (McNemar's test of paired outcomes)."""
    num_changed = best.num_gained + best.num_lost
    score = (best.num_gained - best.num_lost) / math.sqrt(num_changed) if num_changed else 0.0
    return best.attainment - present.attainment >= MIN_GAIN and score >= _SCORE


def _distance(one: ForecastPlacement, other: ForecastPlacement) -> int:
    theirs = other.counts.by_role()
    return sum(abs(count - theirs[role]) for role, count in one.counts.by_role().items())
