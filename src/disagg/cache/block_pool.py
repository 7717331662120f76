"""Who holds each KV block of one instance, and which blocks can be had.

States of a block and the moves between them (DESIGN contract "Ownership of KV blocks")::

    prefill side   FREE -> ACTIVE -> LEASED -> CACHED or FREE
    decode side    FREE -> FILLING -> ACTIVE -> CACHED or FREE
                           FILLING -> QUARANTINED -> FREE   (the pull failed; bytes may still arrive)

An ACTIVE block is held by one or more sequences (equal prefixes share blocks), a LEASED one by hand-overs alone.
CACHED blocks hold the KV of a known prefix and nobody; they are evicted, least recently used first, when no block is
free. One that was found since it was last passed over is passed over once (second chance): prompts that never come
back do not drive out those that do. ``benchmarks/eviction.py`` compares. At any moment every block is in exactly one
state: ``audit`` counts them, ``validate`` proves it.
"""

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from disagg.base.errors import InternalError
from disagg.base.ids import BlockHash, BlockId

WindowName = tuple[BlockHash, int]
"""Names the block that holds a part of the layers with a sliding window: of which prefix, and which part."""
BlockName = BlockHash | WindowName


class BlockState(enum.Enum):
    """What a block is used for."""

    FREE = "free"
    ACTIVE = "active"
    LEASED = "leased"
    FILLING = "filling"
    CACHED = "cached"
    QUARANTINED = "quarantined"

    __hash__ = object.__hash__  # Enum's own is Python code, and every move of a block looks up two states


class BlockAudit(msgspec.Struct, frozen=True, kw_only=True):
    """Number of blocks in each state. They add up to ``total``."""

    total: int
    free: int
    active: int
    leased: int
    filling: int
    cached: int
    quarantined: int


_FILLING: Final = -1
_QUARANTINED: Final = -2
"""Stand in place of the number of sequences that hold a block where a remote writer has it."""


class BlockPool:
    """All blocks of one instance. No method blocks or partly succeeds: it does all or returns None.

    ``on_removed`` is told the name of each block that can be found no more, unless a window's part was in it.
    """

    def __init__(self, num_blocks: int, on_removed: Callable[[BlockHash], None] = lambda name: None) -> None:
        self._on_removed = on_removed
        self._num_blocks = num_blocks
        self._sequences: list[int] = []
        self._leases: list[int] = []
        """How many of each hold a block, of the blocks that were taken once; those behind them are free."""
        self._free: list[BlockId] = []
        """Of those, the ones that came back: taken first, the last first."""
        self._cached: OrderedDict[BlockId, None] = OrderedDict()
        self._names: dict[BlockId, BlockName] = {}
        """Of those blocks whose prefix is published, and the blocks that have these names."""
        self._by_name: dict[BlockName, BlockId] = {}
        self._found: set[BlockId] = set()
        """Those that another sequence has found since they were published, or since eviction passed them over."""
        self._num_active = self._num_leased = self._num_filling = self._num_quarantined = 0

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self._num_blocks

    @property
    def num_touched(self) -> int:
        """Leading blocks that were taken at least once."""
        return len(self._sequences)

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: free ones and evictable cached ones."""
        return self._num_blocks - len(self._sequences) + len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks that are neither free nor merely cached."""
        return len(self._sequences) - len(self._free) - len(self._cached)

    def state_of(self, index: BlockId) -> BlockState:
        """Return what a block is used for."""
        num_sequences, num_leases = self._holds_on(index)
        if num_sequences > 0:
            return BlockState.ACTIVE
        if num_sequences < 0:
            return BlockState.FILLING if num_sequences == _FILLING else BlockState.QUARANTINED
        if num_leases:
            return BlockState.LEASED
        return BlockState.CACHED if index in self._cached else BlockState.FREE

    def allocate(self, count: int) -> tuple[BlockId, ...] | None:
        """Take ``count`` blocks for one sequence (ACTIVE), or None when there are not enough."""
        taken = self._take(count, 1)
        if taken is not None:
            self._num_active += count
        return taken

    def reserve(self, count: int) -> tuple[BlockId, ...] | None:
        """Take ``count`` blocks for a remote writer (FILLING), or None when there are not enough."""
        taken = self._take(count, _FILLING)
        if taken is not None:
            self._num_filling += count
        return taken

    def commit(self, blocks: Sequence[BlockId]) -> None:
        """Make FILLING blocks, now completely written, ACTIVE for the one sequence that reserved them."""
        self._end_filling(blocks, 1)
        self._num_active += len(blocks)

    def quarantine(self, blocks: Sequence[BlockId]) -> None:
        """Put FILLING blocks aside: a remote writer may still write them."""
        self._end_filling(blocks, _QUARANTINED)
        self._num_quarantined += len(blocks)

    def abandon(self, blocks: Iterable[BlockId]) -> None:
        """Free FILLING or QUARANTINED blocks: their writer is known to have ended."""
        for index in blocks:
            if self.state_of(index) is BlockState.QUARANTINED:
                self._num_quarantined -= 1
            else:
                self._expect(index, BlockState.FILLING)
                self._num_filling -= 1
            self._sequences[index] = 0
            self._free.append(index)

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Drop one sequence's hold. The last block is let go first, so that eviction eats prefixes from their end."""
        sequences, names, num_loose, num_leased = self._sequences, self._names, 0, 0
        for index in reversed(blocks):
            if index >= len(sequences) or sequences[index] <= 0:
                self._expect(index, BlockState.ACTIVE)
            sequences[index] -= 1
            if sequences[index]:
                continue
            num_loose += 1
            if self._leases[index]:
                num_leased += 1
            elif index in names:
                self._cached[index] = None
            else:
                self._free.append(index)
        self._num_active -= num_loose
        self._num_leased += num_leased

    def lease(self, blocks: Iterable[BlockId]) -> None:
        """Turn one sequence's hold on its blocks into a lease."""
        sequences, leases, num_loose = self._sequences, self._leases, 0
        for index in blocks:
            if index >= len(sequences) or sequences[index] <= 0:
                self._expect(index, BlockState.ACTIVE)
            leases[index] += 1
            sequences[index] -= 1
            if not sequences[index]:
                num_loose += 1
        self._num_active -= num_loose
        self._num_leased += num_loose

    def pin(self, index: BlockId) -> None:
        """Put one more lease on a published block, whoever holds it, that ``end_lease`` ends."""
        if index not in self._names:
            raise InternalError(f"block {index} is {self.state_of(index).value}: it holds no published prefix")
        if index in self._cached:
            del self._cached[index]
            self._num_leased += 1
        self._leases[index] += 1

    def end_lease(self, blocks: Sequence[BlockId]) -> None:
        """Drop one lease on each block."""
        leases, names, num_loose = self._leases, self._names, 0
        for index in reversed(blocks):
            if index >= len(leases) or not leases[index]:
                raise InternalError(f"block {index} ({self.state_of(index).value}) has no lease to end")
            leases[index] -= 1
            if leases[index] or self._sequences[index]:
                continue
            num_loose += 1
            if index in names:
                self._cached[index] = None
            else:
                self._free.append(index)
        self._num_leased -= num_loose

    def publish(self, index: BlockId, name: BlockName) -> bool:
        """Make the KV of a full ACTIVE block findable by its prefix; return False when an equal block already is."""
        self._expect(index, BlockState.ACTIVE)
        if index in self._names or name in self._by_name:
            return False
        self._names[index] = name
        self._by_name[name] = index
        return True

    @property
    def published(self) -> tuple[BlockHash, ...]:
        """Names of the prefixes whose blocks can be found."""
        return tuple([name for name in self._by_name if not isinstance(name, tuple)])

    def retract(self, blocks: Iterable[BlockId]) -> None:
        """Make ACTIVE blocks that may have been published findable no more. Who holds them keeps them."""
        for index in blocks:
            self._expect(index, BlockState.ACTIVE)
            if index in self._names:
                self._unpublish(index)

    def match_prefix(self, hashes: Sequence[BlockHash]) -> tuple[BlockId, ...]:
        """Return the blocks of the longest published prefix of ``hashes``. They are not held yet: see ``acquire``."""
        found: list[BlockId] = []
        for block_hash in hashes:
            index = self._by_name.get(block_hash)
            if index is None:
                break
            found.append(index)
        return tuple(found)

    def find(self, name: BlockName) -> BlockId | None:
        """Return the block that holds what has this name, if one does."""
        return self._by_name.get(name)

    def num_cached_among(self, blocks: Iterable[BlockId]) -> int:
        """Return how many of these blocks are CACHED, and so would stop being available if acquired."""
        return sum(index in self._cached for index in blocks)

    def acquire(self, blocks: Iterable[BlockId]) -> None:
        """Hold published blocks for one more sequence."""
        for index in blocks:
            state = self.state_of(index)
            if state not in (BlockState.ACTIVE, BlockState.LEASED, BlockState.CACHED):
                raise InternalError(f"block {index} is {state.value}: it holds no published prefix")
            if state is not BlockState.ACTIVE:
                self._num_active += 1
                self._num_leased -= state is BlockState.LEASED
                self._cached.pop(index, None)
            self._sequences[index] += 1
            self._found.add(index)

    def audit(self) -> BlockAudit:
        """Count the blocks of each state."""
        return BlockAudit(
            total=self._num_blocks,
            free=self._num_blocks - len(self._sequences) + len(self._free),
            active=self._num_active,
            leased=self._num_leased,
            filling=self._num_filling,
            cached=len(self._cached),
            quarantined=self._num_quarantined,
        )

    def holds_of(self, index: BlockId) -> tuple[int, int]:
        """Return how many sequences, and how many leases, hold a block."""
        num_sequences, num_leases = self._holds_on(index)
        return max(0, num_sequences), num_leases

    def validate(self) -> None:
        """Raise InternalError unless counts, containers and holders agree for every block."""
        if faults := self.faults():
            raise InternalError("; ".join(faults))

    def faults(self) -> list[str]:
        """Return, in words, every block that contradicts itself, and counts that are not those of the blocks."""
        found = []
        counts = dict.fromkeys(BlockState, 0)
        counts[BlockState.FREE] = self._num_blocks - len(self._sequences)
        free = []
        for index in map(BlockId, range(len(self._sequences))):
            state, name = self.state_of(index), self._names.get(index)
            counts[state] += 1
            if state is BlockState.FREE:
                free.append(index)
            is_of_sequences = state in (BlockState.ACTIVE, BlockState.LEASED, BlockState.CACHED)
            legal = (index in self._cached) == (state is BlockState.CACHED)
            legal = legal and (is_of_sequences or not self._leases[index])
            legal = legal and (state is not BlockState.CACHED or name is not None)
            legal = legal and (name is None or (is_of_sequences and self._by_name.get(name) == index))
            if not legal:
                found.append(f"block {index} contradicts itself: {state.value}, {self.holds_of(index)}, {name!r}")
        actual = BlockAudit(total=self._num_blocks, **{state.value: count for state, count in counts.items()})
        if actual != self.audit() or sorted(self._free) != free:
            found.append(f"block counts {self.audit()} do not match the blocks, {actual}")
        return found

    def _holds_on(self, index: BlockId) -> tuple[int, int]:
        return (self._sequences[index], self._leases[index]) if index < len(self._sequences) else (0, 0)

    def _take(self, count: int, num_sequences: int) -> tuple[BlockId, ...] | None:
        if count > self.num_available:
            return None
        free = self._free
        num_free = min(count, len(free))
        taken = free[len(free) - num_free :]
        del free[len(free) - num_free :]
        if num_free < count:
            num_new = min(count - num_free, self._num_blocks - len(self._sequences))
            taken += self._touch(num_new)
            taken += [self._evict() for _ in range(count - num_free - num_new)]
        sequences = self._sequences
        for index in taken:
            sequences[index] = num_sequences
        taken.sort()  # neighbours stay neighbours: memory is read quickest in runs
        return tuple(taken)

    def _touch(self, count: int) -> list[BlockId]:
        """Take blocks for the first time."""
        first = len(self._sequences)
        self._sequences += [0] * count
        self._leases += [0] * count
        return [BlockId(index) for index in range(first, first + count)]

    def _evict(self) -> BlockId:
        index, _ = self._cached.popitem(last=False)
        while index in self._found:
            self._found.remove(index)
            self._cached[index] = None
            index, _ = self._cached.popitem(last=False)
        self._unpublish(index)
        return index

    def _unpublish(self, index: BlockId) -> None:
        name = self._names.pop(index)
        del self._by_name[name]
        self._found.discard(index)
        if not isinstance(name, tuple):
            self._on_removed(name)

    def _end_filling(self, blocks: Sequence[BlockId], num_sequences: int) -> None:
        """Give FILLING blocks to so many sequences."""
        sequences = self._sequences
        for index in blocks:
            if index >= len(sequences) or sequences[index] != _FILLING:
                self._expect(index, BlockState.FILLING)
            sequences[index] = num_sequences
        self._num_filling -= len(blocks)

    def _expect(self, index: BlockId, state: BlockState) -> None:
        if self.state_of(index) is not state:
            raise InternalError(f"block {index} is {self.state_of(index).value}, expected {state.value}")
