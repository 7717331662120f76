"""What prefill and decode of a sequence are predicted to take on an instance, given what it has to do already. Pure.

The costs of an instance's steps are those that it learned and told. Of what it has not done yet (a decode instance
prefill, a prefill instance decodes) it is taken to be as quick as the instance that knows best.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from disagg.base.ids import InstanceId
from disagg.base.messages import StepCosts
from disagg.base.objectives import Objectives
from disagg.costs.step_costs import PRIOR_COSTS, decode_work_s, prefill_work_s
from disagg.scheduling.dispatch.experience import Experience
from disagg.scheduling.dispatch.state import InstanceEntry, SequenceEntry
from disagg.scheduling.step.slack import MIN_CHUNK, PATIENCE

_LEFT: Final = 0.5
"""Part of a mean answer that is still to come, of one that is longer already."""
_MOST_SHARE: Final = 0.8
"""Of an instance's time that prompts are taken to need."""
_ENOUGH_STEPS: Final = 16
"""Steps of a kind after which an instance's own costs are believed."""


@dataclass(frozen=True, slots=True)
class Harm:
    """What a decision does to answers that keep their TPOT objective now: the worst TPOT, and how many get too slow."""

    tpot_s: float = 0.0
    num_late: int = 0

    def and_also(self, other: "Harm") -> "Harm":
        """Return both together."""
        return Harm(max(self.tpot_s, other.tpot_s), self.num_late + other.num_late)


NO_HARM: Final = Harm()


class Forecaster:
    """Predicts for the instances as they are at ``now``: make one for each decision.

    ``objectives`` are those of sequences that bring none.
    """

    def __init__(
        self, instances: Sequence[InstanceEntry], experience: Experience, objectives: Objectives, now: float
    ) -> None:
        self._instances = instances
        self._experience = experience
        self._objectives = objectives
        self.now = now

    def objectives_of(self, sequence: SequenceEntry) -> Objectives:
        """Return what a sequence's latencies ought to be."""
        return sequence.objectives.or_else(self._objectives)

    def num_answer_tokens(self, sequence: SequenceEntry) -> float:
        """Return how many tokens the answer is expected to have after the first; at least 1."""
        most = sequence.max_total_tokens - sequence.num_tokens
        return max(1.0, min(self._experience.answer_tokens, most) - 1)

    def backlog_s(self, entry: InstanceEntry) -> float:
        """Return the seconds of prefill that an instance was given and has not done yet."""
        if not entry.num_prefills:
            return 0.0
        costs = self._prefill_costs(entry)
        given_s = prefill_work_s(costs, entry.prefill_tokens, entry.prefill_squares, entry.num_prefills)
        # The first of them is under way; how far is not told.
        return given_s - min(self.now - entry.prefilling_since_s, given_s / entry.num_prefills)

    def prompt_s(self, num_tokens: int) -> float:
        """Return the seconds of a prompt on the instance that knows best, alone."""
        costs = self._prefill_costs(None)
        return costs.step_s + prefill_work_s(costs, num_tokens, num_tokens**2, 1)

    def first_token_s(self, entry: InstanceEntry, num_tokens: int) -> float:
        """Return the seconds to the first token of a prompt of which ``num_tokens`` have to be computed."""
        costs = self._prefill_costs(entry)
        work_s = self.backlog_s(entry) + prefill_work_s(costs, num_tokens, num_tokens**2, 1)
        decodes_s = self._decodes_s(entry)
        tpot_s = self._objectives.tpot_s
        if entry.num_decodes and entry.limits.sized_by_slack and tpot_s is not None:
            least_s, alone_s = MIN_CHUNK * costs.token_s, costs.step_s + decodes_s
            # What the objective leaves of each step, or now and then a smallest chunk.
            share = (tpot_s - alone_s) / tpot_s
            return work_s / max(share, least_s / (least_s + (PATIENCE * tpot_s if share > 0 else alone_s)))
        most = max(1, entry.limits.max_batch_tokens - entry.num_decodes)
        num_steps = -(-(entry.prefill_tokens + num_tokens) // most)
        return work_s + num_steps * (costs.step_s + decodes_s)

    def later_token_s(self, entry: InstanceEntry, sequence: SequenceEntry, work_s: float) -> float:
        """Return the mean gap of an answer that joins those of an instance, on top of ``work_s`` of other work.

        That work comes before or between its tokens: a hand-over, prompts that wait there.
        """
        num_tokens = self.num_answer_tokens(sequence)
        step_s = self._decode_step_s(entry, 1, sequence.num_tokens + int(num_tokens / 2))
        return step_s + self._kept_off_s(entry, work_s, step_s, num_tokens) + self._no_room_s(entry, sequence, step_s)

    def handed_over_token_s(self, entry: InstanceEntry, sequence: SequenceEntry, source: InstanceId | None) -> float:
        """Return the mean gap of an answer that an instance goes on with, the hand-over from ``source`` in it."""
        return self.later_token_s(entry, sequence, self.hand_over_s(sequence, source, entry))

    def harm(self, entry: InstanceEntry, prefill_tokens: int, answer_tokens: int) -> Harm:
        """Return what it does to the answers of an instance to compute so many tokens of a prompt there.

        And to decode one more sequence of ``answer_tokens``, 0 for none. Answers that are still to be handed over to it
        count as well: they would wait.
        """
        if not entry.answers and not entry.expected:
            return NO_HARM
        before_s = self._decode_step_s(entry, 0, 0)
        after_s = self._decode_step_s(entry, bool(answer_tokens), answer_tokens)
        backlog_s = work_s = self.backlog_s(entry)
        if prefill_tokens:
            work_s += prefill_work_s(self._prefill_costs(entry), prefill_tokens, prefill_tokens**2, 1)
        longest_s = self._longest_wait_s(entry)
        worst_s, num_late = 0.0, 0
        for answer, passed_s, waits_s in self._answers(entry):
            tpot_s = self.objectives_of(answer).tpot_s
            num_left = self._num_left(answer)
            num_gaps = answer.num_answer_tokens + num_left - 1
            if tpot_s is None or num_gaps <= 0:
                continue
            if passed_s + num_left * before_s + min(max(0.0, backlog_s - waits_s), longest_s) <= num_gaps * tpot_s:
                kept_off_s = min(max(0.0, work_s - waits_s), longest_s)
                its_tpot_s = (passed_s + num_left * after_s + kept_off_s) / num_gaps
                worst_s = max(worst_s, its_tpot_s)
                num_late += its_tpot_s > tpot_s
        return Harm(worst_s, num_late)

    def _longest_wait_s(self, entry: InstanceEntry) -> float:
        """Return the seconds for which an answer has to wait for prompts at most.

        Steps sized by slack take no time that answers cannot spare; where none runs yet, who comes waits for one step.
        """
        if not entry.limits.sized_by_slack:
            return math.inf
        return 0.0 if entry.answers else entry.limits.max_batch_tokens * self._prefill_costs(entry).token_s

    def _answers(self, entry: InstanceEntry) -> Iterator[tuple[SequenceEntry, float, float]]:
        """Yield who decodes on an instance or will: since when, and in how many seconds."""
        for answer in entry.answers.values():
            yield answer, self.now - answer.first_token_s, 0.0
        for answer in entry.expected.values():
            if answer.chosen is not None:
                yield answer, 0.0, max(0.0, answer.started_s + answer.chosen.ttft_s - self.now)

    def _num_left(self, answer: SequenceEntry) -> float:
        """Return how many more tokens an answer is expected to have: what it has tells little of it."""
        mean = self._experience.answer_tokens
        most = answer.max_total_tokens - answer.num_tokens
        return min(most, max(mean - answer.num_answer_tokens, _LEFT * mean))

    def _decode_step_s(self, entry: InstanceEntry, num_more: int, more_context: int) -> float:
        """Return the time from token to token on an instance, with more answers, between prompts as lately."""
        costs = self._decode_costs(entry)
        num_decodes = entry.num_decodes + len(entry.expected) + num_more
        context = entry.kv_tokens + entry.expected_tokens + more_context
        step_s = costs.step_s + decode_work_s(costs, num_decodes, context)
        busy_s = step_s / (1 - min(entry.prefill_work.share(self.now), _MOST_SHARE))
        tpot_s = self._objectives.tpot_s
        if entry.limits.sized_by_slack and tpot_s is not None:
            return max(step_s, min(busy_s, tpot_s))
        return busy_s

    def hand_over_s(self, sequence: SequenceEntry, source: InstanceId | None, target: InstanceEntry) -> float:
        """Return the seconds that the KV blocks of a sequence travel."""
        link = None if source is None else target.reads.get(source)
        link_s = None if link is None else link.transfer_time_s(sequence.num_tokens)
        return self._experience.hand_over_s(sequence.num_tokens, link_s)

    def _kept_off_s(self, entry: InstanceEntry, work_s: float, step_s: float, num_tokens: float) -> float:
        """Return how much ``work_s`` of other work lengthens each of an answer's gaps."""
        added_s = work_s / num_tokens
        tpot_s = self._objectives.tpot_s
        if entry.limits.sized_by_slack and tpot_s is not None:
            return min(added_s, max(0.0, tpot_s - step_s))
        return added_s

    def _no_room_s(self, entry: InstanceEntry, sequence: SequenceEntry, step_s: float) -> float:
        """Return what waiting for a place in the batch and for KV blocks adds to each gap.

        Places and blocks come back as answers end, evenly.
        """
        lacking = 0.0
        num_places = entry.num_decodes + len(entry.expected) + 1
        if num_places > entry.limits.max_batch_size:
            lacking = num_places / entry.limits.max_batch_size - 1
        if entry.pool_tokens is not None:
            num_tokens = entry.kv_tokens + entry.expected_tokens + sequence.max_total_tokens
            lacking = max(lacking, num_tokens / entry.pool_tokens - 1)
        answer_s = self._experience.answer_tokens * step_s
        return lacking * answer_s / self.num_answer_tokens(sequence)

    def _decodes_s(self, entry: InstanceEntry) -> float:
        """Return what an instance's answers add to a step."""
        if not entry.num_decodes:
            return 0.0
        return decode_work_s(self._decode_costs(entry), entry.num_decodes, entry.kv_tokens)

    def _prefill_costs(self, entry: InstanceEntry | None) -> StepCosts:
        lesson = None if entry is None else entry.lesson
        if lesson is not None and lesson.num_prefill_steps >= _ENOUGH_STEPS:
            return lesson.costs
        return known_prefill_costs(self._instances) or PRIOR_COSTS

    def _decode_costs(self, entry: InstanceEntry) -> StepCosts:
        lesson = entry.lesson
        if lesson is not None and lesson.num_decode_steps >= _ENOUGH_STEPS:
            return lesson.costs
        return known_decode_costs(self._instances) or PRIOR_COSTS


def known_prefill_costs(instances: Iterable[InstanceEntry]) -> StepCosts | None:
    """Return what prefill costs on the instance that knows best; None where none does."""
    known = [one.lesson for one in instances if one.lesson is not None and one.lesson.num_prefill_steps]
    return max(known, key=lambda one: one.num_prefill_steps).costs if known else None


def known_decode_costs(instances: Iterable[InstanceEntry]) -> StepCosts | None:
    """Return what steps of decodes cost on the instance that knows best; None where none does."""
    known = [one.lesson for one in instances if one.lesson is not None and one.lesson.num_decode_steps]
    return max(known, key=lambda one: one.num_decode_steps).costs if known else None
