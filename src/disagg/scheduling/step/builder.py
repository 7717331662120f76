"""The budgets of one step: a throw-away object that collects chunks until tokens or places run out."""

from collections.abc import Iterable

from disagg.base.ids import RequestId
from disagg.costs.latency import StepShape
from disagg.scheduling.step.actions import Chunk
from disagg.scheduling.step.sequence import Sequence


class StepBuilder:
    """Collects the chunks of one step within ``max_tokens`` new tokens and ``max_sequences`` sequences."""

    def __init__(self, max_tokens: int, max_sequences: int) -> None:
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._num_tokens = 0
        self._planned: dict[RequestId, tuple[Sequence, int]] = {}

    def __len__(self) -> int:
        return len(self._planned)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.request_id in self._planned

    def sequences(self) -> Iterable[Sequence]:
        """Yield those that take part so far."""
        return (sequence for sequence, _ in self._planned.values())

    def shape(self) -> StepShape:
        """Return what of the step counts so far, samples left out."""
        shape = StepShape()
        for sequence, num_tokens in self._planned.values():
            if num_tokens == 1:
                shape.num_decodes += 1
                shape.decode_context += sequence.num_planned + 1
            else:
                shape.add_prefill(sequence.num_planned, num_tokens, samples=False)
        return shape

    @property
    def has_place(self) -> bool:
        """True while one more sequence with at least one token fits."""
        return len(self._planned) < self._max_sequences and self._num_tokens < self._max_tokens

    def has_places(self, count: int) -> bool:
        """Return whether so many more sequences with one token each fit."""
        num_free = min(self._max_sequences - len(self._planned), self._max_tokens - self._num_tokens)
        return count <= num_free

    def chunk_size(self, sequence: Sequence) -> int:
        """Return how many of a sequence's remaining tokens fit, cutting a prompt into chunks."""
        num_free = self._max_tokens - self._num_tokens
        if num_free <= 0 or len(self._planned) >= self._max_sequences:
            return 0
        return min(sequence.num_remaining, num_free)

    def whole_size(self, sequence: Sequence) -> int:
        """Return all remaining tokens or 0. A prompt longer than the budget goes alone, whole."""
        fits = self.has_place and self._num_tokens + sequence.num_remaining <= self._max_tokens
        return sequence.num_remaining if fits or not self._planned else 0

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        """Plan ``num_tokens`` tokens of a sequence, which holds the blocks for them."""
        self._planned[sequence.request_id] = (sequence, num_tokens)
        self._num_tokens += num_tokens

    def add_decodes(self, sequences: Iterable[Sequence]) -> None:
        """Plan one token of each of these sequences, which hold the blocks for them and are not planned yet."""
        for sequence in sequences:
            self._planned[sequence.request_id] = (sequence, 1)
            self._num_tokens += 1

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence that lost its blocks out of the plan, if it was in it."""
        _, num_tokens = self._planned.pop(sequence.request_id, (sequence, 0))
        self._num_tokens -= num_tokens

    def build(self) -> tuple[tuple[Sequence, Chunk], ...]:
        """Return the plan and mark its tokens as in flight."""
        step = []
        for sequence, num_tokens in self._planned.values():
            start = sequence.num_computed + sequence.num_in_flight
            samples = start + num_tokens == sequence.num_tokens + sequence.num_coming
            chunk = Chunk(
                sequence.request_id,
                start,
                num_tokens,
                sequence.block_ids,
                samples,
                sequence.window_ids,
                sequence.first_in_window,
            )
            sequence.num_in_flight += num_tokens
            sequence.num_coming += samples
            step.append((sequence, chunk))
        return tuple(step)
