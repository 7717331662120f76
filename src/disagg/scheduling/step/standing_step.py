"""A decode step that is run again and again: how far its sequences are is counted for all of them together.

While a batch decodes, every sequence of it gets a token a step. So a number of steps says how far each one is, and only
a sequence that takes a block, comes or goes is looked at: a simulation costs by changes, and not by their number times
the sequences of the batch. Nobody else may look at the counts of these sequences before they are ``settle``d.
"""

import bisect
import heapq
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items

from disagg.base.errors import InternalError
from disagg.base.ids import BlockHash, RequestId
from disagg.base.sampling import FinishReason
from disagg.scheduling.step.actions import Chunk
from disagg.scheduling.step.books import Books, order_of
from disagg.scheduling.step.events import StepResult
from disagg.scheduling.step.kv_ledger import KvLedger
from disagg.scheduling.step.sequence import Sequence


class StandingStep:
    """The sequences of such a step, each with one token. It is in flight, or is over and may be started again."""

    def __init__(self, ledger: KvLedger, sequences: Iterable[Sequence]) -> None:
        self._ledger = ledger
        self._size = ledger.block_size
        self._num_ends = 0
        self._members: dict[Sequence, int] = {}
        """After how many ends of the step the counts of each were right last."""
        self._full: list[tuple[int, tuple[int, float, int], Sequence]] = []
        """After how many ends each has no place for one more token; those that have left included."""
        self._named: list[Sequence] = []
        self._fresh: list[Sequence] = []
        """Those that came after its last end."""
        self._is_in_flight = True
        for sequence in sequences:
            self._take(sequence)

    def __len__(self) -> int:
        return len(self._members)

    @property
    def named(self) -> Items[Sequence]:
        """The members whose blocks have names, in order, with their counts right."""
        for sequence in self._named:
            self._settle(sequence)
        return self._named

    def end(self, count: int, *, is_over: bool) -> list[Sequence]:
        """Let it end ``count`` times; when it ``is_over``, it is not started again after the last of them.

        Return, in order, those that have the first token from it.
        """
        self._num_ends += count
        self._is_in_flight = not is_over
        self._grow(self._num_ends - is_over)
        fresh, self._fresh = self._fresh, []
        return fresh

    def finish(
        self, results: Iterable[StepResult], known: Mapping[RequestId, Sequence]
    ) -> tuple[list[Sequence], list[tuple[Sequence, FinishReason]]]:
        """Let it end once, and let those go that are finished.

        Return who is to be named, those that it gave a first or a last token, and who left and why; both in order.
        """
        told = self.end(1, is_over=True)
        for sequence in self.named:
            if sequence.num_computed // self._size > sequence.num_published:
                self._ledger.publish(sequence)
        ended: list[tuple[Sequence, FinishReason]] = []
        for result in results:
            found = known.get(result.request_id)
            if found is None or found not in self._members:
                raise InternalError(f"a step has a result for {result.request_id}, which took no part")
            self.add_names(found, result.block_hashes)
            if result.finished is not None:
                ended.append((found, result.finished))
        ended.sort(key=lambda one: one[0].order)
        for sequence, _ in ended:
            self._leave(sequence)
        return sorted({*told, *(sequence for sequence, _ in ended)}, key=order_of), ended

    def add_names(self, sequence: Sequence, names: tuple[BlockHash, ...]) -> None:
        """Take account of the names of blocks that a member's known tokens fill now."""
        if names and not sequence.block_hashes:
            bisect.insort(self._named, sequence, key=order_of)
        sequence.block_hashes += names

    def begin(self, books: Books) -> list[Sequence] | None:
        """Start it again, with all that run by now; return who is new.

        None, and nothing changed, where such a step cannot be what comes next.
        """
        running, settings = books.running, books.settings
        num_all = len(running)
        if num_all > settings.max_batch_size or num_all > settings.max_batch_tokens:
            return None
        if not self._members or self._ledger.has_windows:
            return None
        is_grown = num_all > len(self._members)
        newcomers = [sequence for sequence in running if sequence not in self._members] if is_grown else []
        if newcomers and not all(one.is_plain_decode for one in newcomers):
            return None
        if not self._has_blocks(newcomers):
            return None
        self._is_in_flight = True
        for sequence in newcomers:
            self._take(sequence)
            sequence.num_in_flight = sequence.num_coming = 1
        self._grow(self._num_ends)
        return newcomers

    def _has_blocks(self, newcomers: Items[Sequence]) -> bool:
        available = self._ledger.pool.num_available
        if available >= len(self._members) + len(newcomers):
            return True
        num_due = sum(1 for ends, _, one in self._full if ends <= self._num_ends and one in self._members)
        return available >= num_due + sum(1 for one in newcomers if one.num_computed >= len(one.block_ids) * self._size)

    def _leave(self, sequence: Sequence) -> None:
        self._settle(sequence)
        del self._members[sequence]
        if sequence.block_hashes:
            self._named.remove(sequence)

    def settle(self) -> tuple[tuple[Sequence, Chunk], ...]:
        """Make the counts of all members right, and return the step, in order."""
        parts = []
        for sequence in sorted(self._members, key=order_of):
            self._settle(sequence)
            parts.append((sequence, decode_chunk(sequence)))
        return tuple(parts)

    def _take(self, sequence: Sequence) -> None:
        self._members[sequence] = self._num_ends
        self._fresh.append(sequence)
        num_left = len(sequence.block_ids) * self._size - sequence.num_computed
        heapq.heappush(self._full, (self._num_ends + num_left, sequence.order, sequence))
        if sequence.block_hashes:
            bisect.insort(self._named, sequence, key=order_of)

    def _grow(self, num_ends: int) -> None:
        """Give blocks to those that have no place for what they compute after so many ends."""
        if self._ledger.has_windows:
            for sequence in self._members:
                self._settle(sequence)
                self._hold(sequence, sequence.num_planned)
            return
        full = self._full
        while full and full[0][0] <= num_ends:
            ends, due = full[0][0], []
            while full and full[0][0] == ends:
                sequence = heapq.heappop(full)[2]
                if sequence in self._members:
                    due.append(sequence)
            for sequence in due if self._named else ():
                self._settle(sequence, ends)
                self._ledger.publish(sequence)  # what is full can be found before it is known what gives way to more
            for sequence in due:
                self._hold(sequence, len(sequence.block_ids) * self._size + 1)
                heapq.heappush(full, (ends + self._size, sequence.order, sequence))

    def _hold(self, sequence: Sequence, num_tokens: int) -> None:
        if not self._ledger.grow(sequence, num_tokens):
            raise InternalError(f"a step was repeated and there is no block for sequence {sequence.request_id}")

    def _settle(self, sequence: Sequence, num_ends: int | None = None) -> None:
        """Make the counts of a member those after so many ends, or after all that there were."""
        ends = self._num_ends if num_ends is None else num_ends
        num_new = ends - self._members[sequence]
        self._members[sequence] = ends
        sequence.num_tokens += num_new
        sequence.num_computed += num_new
        sequence.num_in_flight = sequence.num_coming = int(self._is_in_flight)


def decode_chunk(sequence: Sequence) -> Chunk:
    """Return the part that a sequence, whose counts are right, has in such a step."""
    return Chunk(sequence.request_id, sequence.num_computed, 1, sequence.block_ids, samples=True)
