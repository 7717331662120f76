"""How much prefill goes into a step: what fits before the earliest moment at which a running answer's token is due.

An answer's next token is due one TPOT objective after the one before it was due, counted from its first token, wherever
that came from. So an answer that is ahead of its schedule lends time to prompts, up to a gap of ``MOST_GAP``
objectives, and one that is late, as by its hand-over, takes some back. Where ``MIN_CHUNK`` tokens do not fit into such
a gap, prompts get those once all answers are ahead by so much, ``PATIENCE`` objectives after the last ones whoever is
late, and in every step where decodes alone are too slow for theirs: none starves.

Further prompts join the first of a step only while the device needs more tokens to work at full speed: beyond that they
delay its first token, and bring none forward. The first itself is cut by the slack alone: in smaller chunks it would
only read its own KV, and the weights, more often.
"""

import math
from typing import Final

from disagg.costs.latency import StepShape
from disagg.costs.step_times import StepTimes
from disagg.scheduling.step.builder import StepBuilder
from disagg.scheduling.step.sequence import Sequence

MIN_CHUNK: Final = 16
PATIENCE: Final = 10.0
"""TPOT objectives for which prompts get nothing at most."""
MOST_GAP: Final = 2.0
"""Longest gap that is planned, in TPOT objectives."""
_CATCH_UP: Final = 0.75
"""Gap that is left to an answer behind its schedule, in TPOT objectives."""
_SATURATED: Final = 0.95
"""Part of the highest tokens per second at which a step counts as saturated."""
_ERRORS: Final = 2.0
"""Mean errors of predictions that are kept as a margin."""
_MOST_ERROR: Final = 0.5


class Slack:
    """Sizes the prefill of one step after another. ``begin`` comes first, when the step's decodes are planned."""

    def __init__(self, times: StepTimes, max_tokens: int) -> None:
        self._times = times
        self._max_tokens = max_tokens
        self._saturation = (-1, max_tokens)
        """Of which version of the predictions, and the tokens."""
        self._builder = StepBuilder(0, 0)
        self._available_s = math.inf
        self._served_s = -math.inf
        """When the last step with prefill started, and when the next one has to."""
        self._must_serve_s = -math.inf
        self._saved_s = 0.0
        """How long a step may take that makes no answer late, however long that gap."""
        self._start_s = -math.inf

    def begin(self, builder: StepBuilder, start_s: float) -> None:
        """Size what is added to this step, which starts at ``start_s``."""
        self._builder = builder
        self._start_s, self._must_serve_s, self._saved_s = start_s, start_s, 0.0
        answers = [s for s in builder.sequences() if s.is_answering and s.objectives.tpot_s is not None]
        self._available_s = math.inf
        if answers:
            alone_s = self._times.predict_s(builder.shape())
            latest_s = min(latest_end_s(sequence, start_s, alone_s) for sequence in answers)
            margin = 1 + _ERRORS * min(self._times.error, _MOST_ERROR)
            self._available_s = (latest_s - start_s) / margin
            tpot_s = min(sequence.objectives.tpot_s or math.inf for sequence in answers)
            if alone_s < tpot_s:
                self._must_serve_s = self._served_s + PATIENCE * tpot_s
                self._saved_s = (min(due_s(sequence, start_s) for sequence in answers) - start_s) / margin

    def size(self, sequence: Sequence) -> int:
        """Return how many tokens of a prompt go into the step; 0 for none."""
        num_tokens = self._size(sequence)
        if num_tokens:
            self._served_s = self._start_s
        return num_tokens

    def _size(self, sequence: Sequence) -> int:
        shape = self._builder.shape()
        most = self._builder.chunk_size(sequence)
        if shape.num_prefills:
            most = min(most, self._saturated_tokens() - shape.num_prefill_tokens)
        if most <= 0 or self._fits(shape, sequence.num_planned, most, self._available_s):
            return max(0, most)
        least = min(MIN_CHUNK, most)
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(shape, sequence.num_planned, middle, self._available_s):
                low = middle
            else:
                high = middle
        if low >= least:
            return low
        if shape.num_prefills:
            return 0
        is_due = self._start_s >= self._must_serve_s or self._fits(shape, sequence.num_planned, least, self._saved_s)
        return least if is_due else 0

    def _fits(self, shape: StepShape, start: int, num_tokens: int, available_s: float) -> bool:
        if available_s == math.inf:
            return True
        whole = StepShape(
            num_prefills=shape.num_prefills + 1,
            num_prefill_tokens=shape.num_prefill_tokens + num_tokens,
            prefill_squares=shape.prefill_squares + num_tokens * (num_tokens + 2 * start),
            num_decodes=shape.num_decodes,
            decode_context=shape.decode_context,
            num_samples=shape.num_samples,
        )
        return self._times.predict_s(whole) <= available_s

    def _saturated_tokens(self) -> int:
        """Return the fewest tokens, a power of two or the most, at which prefill is as fast as it gets."""
        version, tokens = self._saturation
        if version != self._times.version:
            sizes = [*_powers_below(self._max_tokens), self._max_tokens]
            rates = [size / max(self._times.predict_s(_prompt(size)), 1e-9) for size in sizes]
            enough = _SATURATED * max(rates)
            tokens = next(size for size, rate in zip(sizes, rates, strict=True) if rate >= enough)
            self._saturation = (self._times.version, tokens)
        return tokens


def latest_end_s(sequence: Sequence, start_s: float, alone_s: float) -> float:
    """Return when a step that starts at ``start_s`` has to end for an answer that takes part in it.

    ``alone_s`` is what its decodes alone take. Infinite without a TPOT objective.
    """
    tpot_s = sequence.objectives.tpot_s
    if tpot_s is None:
        return math.inf
    last_s = _last_s(sequence, start_s)
    # Where not even the decodes keep pace, holding prompts back saves nobody.
    pace_s = _CATCH_UP * tpot_s if alone_s < tpot_s else MOST_GAP * tpot_s
    return min(max(due_s(sequence, start_s), last_s + pace_s), last_s + MOST_GAP * tpot_s)


def due_s(sequence: Sequence, start_s: float) -> float:
    """Return when the token of an answer is due that a step brings which starts at ``start_s``."""
    tpot_s = sequence.objectives.tpot_s
    if tpot_s is None:
        return math.inf
    first_s = _last_s(sequence, start_s) if math.isnan(sequence.first_token_s) else sequence.first_token_s
    return first_s + (sequence.num_later_tokens + sequence.num_coming + 1) * tpot_s


def _last_s(sequence: Sequence, start_s: float) -> float:
    # A token that a step in flight brings comes when this step starts.
    return start_s if sequence.num_coming or math.isnan(sequence.last_token_s) else sequence.last_token_s


def _prompt(num_tokens: int) -> StepShape:
    shape = StepShape()
    shape.add_prefill(0, num_tokens)
    return shape


def _powers_below(limit: int) -> list[int]:
    return [1 << power for power in range(MIN_CHUNK.bit_length() - 1, limit.bit_length()) if 1 << power < limit]
