"""What prefill and decode of a sequence are predicted to take on an instance, given what it has to do already. Pure.

The costs of an instance's steps are those that it learned and told. Of what it has not done yet (a decode instance
prefill, a prefill instance decodes) it is taken to be as quick as the instance that knows best.
"""

from collections.abc import Sequence
from typing import Final

from disagg.base.messages import StepCosts
from disagg.base.objectives import Objectives
from disagg.costs.step_costs import PRIOR_COSTS, decode_work_s, prefill_work_s
from disagg.scheduling.dispatch.experience import Experience
from disagg.scheduling.dispatch.state import InstanceEntry, SequenceEntry
from disagg.scheduling.step.slack import MIN_CHUNK

_ENOUGH_STEPS: Final = 16
"""Steps of a kind after which an instance's own costs are believed."""


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
        self._now = now

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
        return given_s - min(self._now - entry.prefilling_since_s, given_s / entry.num_prefills)

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
            # A step is as long as the objective lets it be, or as a smallest chunk makes it.
            step_s = max(tpot_s, costs.step_s + decodes_s + MIN_CHUNK * costs.token_s)
            return work_s * step_s / (step_s - costs.step_s - decodes_s)
        most = max(1, entry.limits.max_batch_tokens - entry.num_decodes)
        num_steps = -(-(entry.prefill_tokens + num_tokens) // most)
        return work_s + num_steps * (costs.step_s + decodes_s)

    def later_token_s(self, entry: InstanceEntry, sequence: SequenceEntry, work_s: float) -> float:
        """Return the mean gap of an answer that joins those of an instance, on top of ``work_s`` of other work.

        That work comes before or between its tokens: a hand-over, prompts that wait there.
        """
        num_tokens = self.num_answer_tokens(sequence)
        costs = self._decode_costs(entry)
        context = entry.kv_tokens + entry.expected_tokens + sequence.num_tokens + int(num_tokens / 2)
        step_s = costs.step_s + decode_work_s(costs, entry.num_decodes + entry.num_expected + 1, context)
        return step_s + (self._kept_off_s(entry, work_s, step_s, num_tokens) + self._no_room_s(entry, sequence, step_s))

    def harm(self, entry: InstanceEntry, sequence: SequenceEntry, prefill_tokens: int) -> tuple[float, int]:
        """Return the mean gap left to the answers of an instance that takes in this sequence, and whom that makes late.

        ``prefill_tokens`` are those that it has to compute for it; 0 where it is handed over. Zeros where nobody
        decodes there.
        """
        if not entry.num_decodes:
            return 0.0, 0
        costs = self._decode_costs(entry)
        num_decodes, context = entry.num_decodes + entry.num_expected, entry.kv_tokens + entry.expected_tokens
        num_left = max(1.0, self._experience.answer_tokens / 2)
        before_s = costs.step_s + decode_work_s(costs, num_decodes, context)
        after_s = costs.step_s + decode_work_s(costs, num_decodes + 1, context + sequence.num_tokens)
        backlog_s, work_s = self.backlog_s(entry), 0.0
        if prefill_tokens:
            work_s = prefill_work_s(self._prefill_costs(entry), prefill_tokens, prefill_tokens**2, 1)
        before_s += self._kept_off_s(entry, backlog_s, before_s, num_left)
        after_s += self._kept_off_s(entry, backlog_s + work_s, after_s, num_left)
        tpot_s = self._objectives.tpot_s
        is_harm = tpot_s is not None and before_s <= tpot_s < after_s
        return after_s, entry.num_decodes if is_harm else 0

    def hand_over_s(self, sequence: SequenceEntry) -> float:
        """Return the seconds that the KV blocks of a sequence travel."""
        return self._experience.hand_over_s(sequence.num_tokens)

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
        num_places = entry.num_decodes + entry.num_expected + 1
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
        known = [one.lesson for one in self._instances if one.lesson is not None and one.lesson.num_prefill_steps]
        return max(known, key=lambda one: one.num_prefill_steps).costs if known else PRIOR_COSTS

    def _decode_costs(self, entry: InstanceEntry) -> StepCosts:
        lesson = entry.lesson
        if lesson is not None and lesson.num_decode_steps >= _ENOUGH_STEPS:
            return lesson.costs
        known = [one.lesson for one in self._instances if one.lesson is not None and one.lesson.num_decode_steps]
        return max(known, key=lambda one: one.num_decode_steps).costs if known else PRIOR_COSTS
