"""What prefill and decode of a sequence are predicted to take on an instance, given what it has to do already. Pure.

The costs of an instance's steps are those that it learned and told. Of what it has not done yet (a decode instance
prefill, a prefill instance decodes) it is taken to be as quick as the instance that knows best. They are those on its
own cores; where neighbours that have no work now lend theirs, it is quicker.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from disagg.base.ids import InstanceId
from disagg.base.messages import StepCosts
from disagg.base.objectives import Objectives
from disagg.costs.step_costs import at_speed, decode_work_s, prefill_work_s
from disagg.scheduling.dispatch.experience import Experience
from disagg.scheduling.dispatch.fleet_facts import FleetFacts
from disagg.scheduling.dispatch.state import InstanceEntry, SequenceEntry
from disagg.scheduling.step.slack import MIN_CHUNK, MOST_GAP, PATIENCE
from disagg.scheduling.step.threads import StepThreads

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


@dataclass(frozen=True, slots=True)
class PromptDemand:
    """Prompts that no instance was given yet, in tokens: what waits in the router, and what comes in a second."""

    waiting_tokens: float = 0.0
    tokens_per_s: float = 0.0


NO_DEMAND: Final = PromptDemand()


@dataclass(frozen=True, slots=True)
class _Prompts:
    """Tokens to prefill, their squares, and of how many sequences."""

    tokens: int
    squares: int
    number: int

    @classmethod
    def all_on(cls, entry: InstanceEntry) -> "_Prompts":
        return cls(entry.prefill_tokens, entry.prefill_squares, entry.num_prefills)

    @classmethod
    def of(cls, entry: InstanceEntry, sequences: Sequence[SequenceEntry]) -> "_Prompts":
        tokens = [one.charges[entry.instance].prefill_tokens for one in sequences]
        return cls(sum(tokens), sum(count**2 for count in tokens), len(tokens))

    def without(self, others: "_Prompts") -> "_Prompts":
        return _Prompts(self.tokens - others.tokens, self.squares - others.squares, self.number - others.number)


def _before_and_behind(entry: InstanceEntry, sequence: SequenceEntry) -> tuple[_Prompts, _Prompts]:
    """Return the prompts on an instance that are served before a sequence, were it there, and those after it."""
    behind = _Prompts.of(entry, [one for one in entry.prompts.values() if one.rank > sequence.rank])
    return _Prompts.all_on(entry).without(behind), behind


def _rank(sequence: SequenceEntry) -> tuple[int, float, int]:
    return sequence.rank


class Forecaster:
    """Predicts for the instances as they are at ``now``: make one for each decision.

    ``facts`` are those of all instances, ``objectives`` are those of sequences that bring none.
    """

    def __init__(
        self,
        facts: FleetFacts,
        experience: Experience,
        objectives: Objectives,
        now: float,
        demand: PromptDemand = NO_DEMAND,
    ) -> None:
        self._facts = facts
        self._experience = experience
        self._objectives = objectives
        self._demand = demand
        self.now = now
        self._sped_up: dict[tuple[InstanceId, bool], StepCosts] = {}

    def objectives_of(self, sequence: SequenceEntry) -> Objectives:
        """Return what a sequence's latencies ought to be."""
        return sequence.objectives.or_else(self._objectives)

    def num_answer_tokens(self, sequence: SequenceEntry) -> float:
        """Return how many tokens the answer is expected to have after the first; at least 1."""
        most = sequence.max_total_tokens - sequence.num_tokens
        return max(1.0, min(self._experience.answer_tokens, most) - 1)

    def backlog_s(self, entry: InstanceEntry) -> float:
        """Return the seconds of prefill that an instance was given and has not done yet."""
        return self._left_s(entry, _Prompts.all_on(entry), entry.prefilling_since_s)

    def ahead_s(self, entry: InstanceEntry, sequence: SequenceEntry) -> float:
        """Return the seconds of prefill that an instance has to do before it computes the sequence's.

        Prompts that are served after it wait from the next step on, those that have begun, too.
        """
        return self._ahead_s(entry, sequence, *_before_and_behind(entry, sequence))

    def _ahead_s(self, entry: InstanceEntry, sequence: SequenceEntry, before: _Prompts, behind: _Prompts) -> float:
        if not behind.number:
            return self.backlog_s(entry)
        if before.number:
            first = min((one for one in entry.prompts.values() if one.rank <= sequence.rank), key=_rank, default=None)
            came_s = -math.inf if first is None else first.started_s
            return self._left_s(entry, before, max(entry.prefilling_since_s, came_s))
        step_s = entry.limits.max_batch_tokens * self._prefill_costs(entry).token_s
        return min(step_s, self._left_s(entry, behind, entry.prefilling_since_s))

    def _left_s(self, entry: InstanceEntry, prompts: _Prompts, since_s: float) -> float:
        """Return what is left of so much work. The first of it is under way; how far is not told.

        Beside answers it had their share of the time.
        """
        if not prompts.number:
            return 0.0
        costs, tpot_s = self._prefill_costs(entry), self._objectives.tpot_s
        given_s = prefill_work_s(costs, prompts.tokens, prompts.squares, prompts.number)
        done_s = self.now - since_s
        if entry.num_decodes and entry.limits.sized_by_slack and tpot_s is not None:
            done_s *= prefill_share(costs, self._decode_step_s(entry, 0, 0), tpot_s)
        return given_s - min(done_s, given_s / prompts.number)

    def prompt_s(self, num_tokens: int) -> float:
        """Return the seconds of a prompt on the instance that knows best, alone."""
        costs = self._prefill_costs(None)
        return costs.step_s + prefill_work_s(costs, num_tokens, num_tokens**2, 1)

    def prompts_part(self, entry: InstanceEntry, num_tokens: int) -> float:
        """Return the part of its time that an instance has for prompts of so many tokens where it decodes the answers.

        The rest goes to steps of as many answers as their objective allows.
        """
        costs, answer_tokens = self._decode_costs(entry), self._experience.answer_tokens
        token_s = decode_work_s(costs, 1, num_tokens + answer_tokens / 2)
        most: float = entry.limits.max_batch_size
        if self._objectives.tpot_s is not None:
            most = min(most, (self._objectives.tpot_s - costs.step_s) / max(token_s, 1e-9))
        prompt_s = self.prompt_s(num_tokens)
        return prompt_s / (prompt_s + answer_tokens * (costs.step_s / max(1.0, most) + token_s))

    def first_token_s(self, entry: InstanceEntry, sequence: SequenceEntry, num_tokens: int) -> float:
        """Return the seconds to the first token of a sequence of which ``num_tokens`` have to be computed."""
        costs = self._prefill_costs(entry)
        before, behind = _before_and_behind(entry, sequence)
        work_s = self._ahead_s(entry, sequence, before, behind) + prefill_work_s(costs, num_tokens, num_tokens**2, 1)
        decodes_s = self._decodes_s(entry)
        tpot_s = self._objectives.tpot_s
        if (entry.num_decodes or entry.expected) and entry.limits.sized_by_slack and tpot_s is not None:
            return self._beside_answers_s(entry, work_s, tpot_s)
        most = max(1, entry.limits.max_batch_tokens - entry.num_decodes)
        num_steps = -(-(before.tokens + num_tokens) // most)
        return work_s + num_steps * (costs.step_s + decodes_s)

    def _beside_answers_s(self, entry: InstanceEntry, work_s: float, tpot_s: float) -> float:
        """Return in how many seconds so much prefill is done where answers leave it a share of the time.

        Before the first and after the last of them it has all of it. One of many is expected to be a long one.
        """
        alone_s = self._decode_step_s(entry, 0, 0)
        share = prefill_share(self._prefill_costs(entry), alone_s, tpot_s)
        gap_s = alone_s / (1 - share)
        answers = [(waits_s, self._num_left(answer) * gap_s) for answer, _, waits_s in self._answers(entry)]
        first_s = min((waits_s for waits_s, _ in answers), default=work_s)
        if work_s <= first_s:
            return work_s
        longer = sum(1 / number for number in range(1, len(answers) + 1))
        between_s = max(waits_s + left_s * longer for waits_s, left_s in answers) - first_s
        left_s = work_s - first_s
        return first_s + (left_s / share if left_s < share * between_s else between_s + left_s - share * between_s)

    def later_token_s(
        self, entry: InstanceEntry, sequence: SequenceEntry, *, ahead_s: float, travels_s: float = 0.0
    ) -> float:
        """Return the expected mean gap of an answer that joins those of an instance in ``ahead_s``.

        ``travels_s``: so long its KV blocks travel there, in its first gap; 0 where it was prefilled there.
        """
        num_gaps = self.num_answer_tokens(sequence)
        step_s = self._decode_step_s(entry, 1, sequence.num_tokens + int(num_gaps / 2), self._part_left(entry, ahead_s))
        # No more prompts like its own than places in the batch, each of which somebody leaves while it goes on.
        most_s = entry.limits.max_batch_size * sequence.num_tokens * self._prefill_costs(entry).token_s
        left_s = min(max(0.0, self.backlog_s(entry) + self._waiting_s(entry) - ahead_s), most_s)
        gap_s = self._between_prompts_s(entry, step_s, left_s / num_gaps)
        if not travels_s:
            return gap_s  # it has its place and its blocks since its first token
        most = max(1, sequence.max_total_tokens - sequence.num_tokens - 1)
        first_s = travels_s + self._step_in_flight_s(entry, ahead_s)
        # Of short answers, the first gap is a larger part: the mean of their means is not that of the mean answer.
        gap_s += first_s * max(self._experience.gaps_inverse, 1 / most)
        return gap_s + self._no_room_s(entry, sequence, step_s)

    def handed_over_token_s(
        self, entry: InstanceEntry, sequence: SequenceEntry, source: InstanceId | None, ahead_s: float = 0.0
    ) -> float:
        """Return the mean gap of an answer that an instance goes on with, the hand-over from ``source`` in it."""
        travels_s = self.hand_over_s(sequence, source, entry)
        return self.later_token_s(entry, sequence, ahead_s=ahead_s, travels_s=travels_s)

    def _between_prompts_s(self, entry: InstanceEntry, step_s: float, known_s: float) -> float:
        """Return the mean gap of an answer with the prompts that are computed between its tokens.

        ``known_s`` in each for those that are known of, and the instance's part of those that come meanwhile.
        """
        part, costs = self._part_of_prompts(entry), self._prefill_costs(entry)
        share = min(_MOST_SHARE, part * self._demand.tokens_per_s * costs.token_s)
        gap_s = (step_s + known_s) / (1 - share)
        tpot_s = self._objectives.tpot_s
        if entry.limits.sized_by_slack and tpot_s is not None:
            if step_s >= tpot_s:
                return step_s  # so many answers leave prompts no place, either
            return min(gap_s, step_s / (1 - min(_MOST_SHARE, prefill_share(costs, step_s, tpot_s))))
        return min(gap_s, step_s + entry.limits.max_batch_tokens * costs.token_s)

    def _waiting_s(self, entry: InstanceEntry) -> float:
        """Return the seconds of an instance's part of the prompts that wait in the router.

        Where they would keep answers off for whole chunks, they go where there are none.
        """
        part = self._part_of_prompts(entry)
        if part < 1.0 and not entry.limits.sized_by_slack:
            return 0.0
        return part * self._demand.waiting_tokens * self._prefill_costs(entry).token_s

    def _step_in_flight_s(self, entry: InstanceEntry, ahead_s: float) -> float:
        """Return how long who joins an instance in ``ahead_s`` is expected to wait for the prompts in its steps."""
        token_s = self._prefill_costs(entry).token_s
        is_busy = 1.0
        if self.backlog_s(entry) + self._waiting_s(entry) <= ahead_s:
            is_busy = min(1.0, self._part_of_prompts(entry) * self._demand.tokens_per_s * token_s)
        longest_s = entry.limits.max_batch_tokens * token_s
        tpot_s = self._objectives.tpot_s
        if entry.limits.sized_by_slack and tpot_s is not None and entry.answers:
            longest_s = min(longest_s, tpot_s)
        return is_busy * longest_s

    def _part_of_prompts(self, entry: InstanceEntry) -> float:
        """Return which part of all prompts an instance is given, as lately."""
        total = self._facts.prefill_share
        return min(1.0, entry.prefill_work.share(self.now) / total) if total else 0.0

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

    def _part_left(self, entry: InstanceEntry, ahead_s: float) -> float:
        """Return which part of an instance's answers, and of those it expects, is to go on still in ``ahead_s``.

        Of other routers' answers nothing is known but their number: they are taken to be as long as all, from now on.
        """
        if not ahead_s:
            return 1.0
        gap_s, num_others = self._decode_step_s(entry, 0, 0), entry.foreign.num_decodes
        left = [
            math.exp(min(0.0, waits_s - ahead_s) / (self._num_left(answer) * gap_s + 1e-9))
            for answer, _, waits_s in self._answers(entry)
        ]
        if not left and not num_others:
            return 1.0
        others_left = math.exp(-ahead_s / (self._experience.answer_tokens * gap_s + 1e-9)) if num_others else 0.0
        return (math.fsum(left) + num_others * others_left) / (len(left) + num_others)

    def _decode_step_s(self, entry: InstanceEntry, num_more: int, more_context: int, part_left: float = 1.0) -> float:
        """Return what a step of an instance's decodes takes, with more answers, and without prompts.

        Of those that it has and expects, ``part_left`` take part, as many as a step takes.
        """
        costs = self._decode_costs(entry)
        num_decodes = part_left * (entry.num_decodes + len(entry.expected)) + num_more
        context = part_left * (entry.kv_tokens + entry.expected_tokens) + more_context
        fitting = min(1.0, entry.limits.max_batch_size / max(1.0, num_decodes))
        return costs.step_s + decode_work_s(costs, fitting * num_decodes, fitting * context)

    def hand_over_s(self, sequence: SequenceEntry, source: InstanceId | None, target: InstanceEntry) -> float:
        """Return the seconds that the KV blocks of a sequence travel."""
        link = None if source is None else target.reads.get(source)
        link_s = None if link is None else link.transfer_time_s(sequence.num_tokens)
        return self._experience.hand_over_s(sequence.num_tokens, link_s)

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
            lacking = max(lacking, entry.held_tokens(num_tokens, num_places) / entry.pool_tokens - 1)
        answer_s = self._experience.answer_tokens * step_s
        return lacking * answer_s / self.num_answer_tokens(sequence)

    def _decodes_s(self, entry: InstanceEntry) -> float:
        """Return what an instance's answers add to a step."""
        if not entry.num_decodes:
            return 0.0
        return decode_work_s(self._decode_costs(entry), entry.num_decodes, entry.kv_tokens)

    def _prefill_costs(self, entry: InstanceEntry | None) -> StepCosts:
        lesson = None if entry is None else entry.lesson
        costs = self._facts.prefill_costs
        if lesson is not None and lesson.num_prefill_steps >= _ENOUGH_STEPS:
            costs = lesson.costs
        return costs if entry is None or not entry.lends_cores else self._on_more(entry, costs, has_prefill=True)

    def _decode_costs(self, entry: InstanceEntry) -> StepCosts:
        lesson = entry.lesson
        costs = self._facts.decode_costs
        if lesson is not None and lesson.num_decode_steps >= _ENOUGH_STEPS:
            costs = lesson.costs
        return costs if not entry.lends_cores else self._on_more(entry, costs, has_prefill=False)

    def _on_more(self, entry: InstanceEntry, costs: StepCosts, *, has_prefill: bool) -> StepCosts:
        """Return the costs of steps on the cores that neighbours without work lend, too."""
        key = (entry.instance, has_prefill)
        if key not in self._sped_up:
            threads = StepThreads(entry.limits.num_threads, entry.limits.num_borrowable)
            speed = threads.speed(self._facts.num_borrowed(entry), has_prefill=has_prefill)
            self._sped_up[key] = at_speed(costs, speed)
        return self._sped_up[key]


def prefill_share(costs: StepCosts, alone_s: float, tpot_s: float) -> float:
    """Return the part of its time that an instance has for prompts beside answers, where slack sizes its steps.

    ``alone_s`` is what a step of their decodes takes. What the objective leaves, in chunks as answers save it up; where
    that is next to nothing, a smallest chunk now and then.
    """
    least_s = MIN_CHUNK * costs.token_s
    if alone_s >= tpot_s:
        longest_s = max(least_s, MOST_GAP * tpot_s - alone_s)
        return longest_s / (longest_s + alone_s)
    return max((tpot_s - alone_s) / tpot_s, least_s / (PATIENCE * tpot_s))
