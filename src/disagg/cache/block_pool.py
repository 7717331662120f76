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
from dataclasses import dataclass

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


@dataclass(slots=True)
class _Block:
    """One block: how many sequences and leases hold it, and the prefix it holds if that is published."""

    state: BlockState = BlockState.FREE
    num_sequences: int = 0
    num_leases: int = 0
    hash: BlockName | None = None
    was_found: bool = False
    """Another sequence has found it since it was published, or since eviction passed it over."""


class BlockPool:
    """All blocks of one instance. No method blocks or partly succeeds: it does all or returns None.

    ``on_removed`` is told the name of each block that can be found no more, unless a window's part was in it.
    """

    def __init__(self, num_blocks: int, on_removed: Callable[[BlockHash], None] = lambda name: None) -> None:
        self._on_removed = on_removed
        self._num_blocks = num_blocks
        self._blocks: list[_Block] = []
        """Those that were taken once; those behind them are free."""
        self._free: list[BlockId] = []
        """Of those, the ones that came back: taken first, the last first."""
        self._cached: OrderedDict[BlockId, None] = OrderedDict()
        self._by_hash: dict[BlockName, BlockId] = {}
        self._counts = dict.fromkeys(BlockState, 0)
        self._counts[BlockState.FREE] = num_blocks

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self._num_blocks

    @property
    def num_touched(self) -> int:
        """Leading blocks that were taken at least once."""
        return len(self._blocks)

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now: free ones and evictable cached ones."""
        return self._num_blocks - len(self._blocks) + len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks that are neither free nor merely cached."""
        return len(self._blocks) - len(self._free) - len(self._cached)

    def state_of(self, index: BlockId) -> BlockState:
        """Return what a block is used for."""
        return self._block(index).state

    def allocate(self, count: int) -> tuple[BlockId, ...] | None:
        """Take ``count`` blocks for one sequence (ACTIVE), or None when there are not enough."""
        return self._take(count, BlockState.ACTIVE)

    def reserve(self, count: int) -> tuple[BlockId, ...] | None:
        """Take ``count`` blocks for a remote writer (FILLING), or None when there are not enough."""
        return self._take(count, BlockState.FILLING)

    def commit(self, blocks: Iterable[BlockId]) -> None:
        """Make FILLING blocks, now completely written, ACTIVE for the one sequence that reserved them."""
        num_committed = 0
        for index in blocks:
            block = self._block(index)
            if block.state is not BlockState.FILLING:
                self._expect(index, BlockState.FILLING)
            block.num_sequences = 1
            block.state = BlockState.ACTIVE
            num_committed += 1
        self._counts[BlockState.FILLING] -= num_committed
        self._counts[BlockState.ACTIVE] += num_committed

    def quarantine(self, blocks: Iterable[BlockId]) -> None:
        """Put FILLING blocks aside: a remote writer may still write them."""
        for index in blocks:
            self._expect(index, BlockState.FILLING)
            self._move(index, BlockState.QUARANTINED)

    def abandon(self, blocks: Iterable[BlockId]) -> None:
        """Free FILLING or QUARANTINED blocks: their writer is known to have ended."""
        for index in blocks:
            if self.state_of(index) is not BlockState.QUARANTINED:
                self._expect(index, BlockState.FILLING)
            self._move(index, BlockState.FREE)
            self._free.append(index)

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Drop one sequence's hold. The last block is let go first, so that eviction eats prefixes from their end."""
        self._change_holds(reversed(blocks), sequences=-1)

    def lease(self, blocks: Iterable[BlockId]) -> None:
        """Turn one sequence's hold on its blocks into a lease."""
        self._change_holds(blocks, sequences=-1, leases=1)

    def pin(self, index: BlockId) -> None:
        """Put one more lease on a published block, whoever holds it, that ``end_lease`` ends."""
        block = self._block(index)
        if block.hash is None:
            raise InternalError(f"block {index} is {block.state.value}: it holds no published prefix")
        block.num_leases += 1
        if self._cached.pop(index, 0) is None:
            self._move(index, BlockState.LEASED)

    def end_lease(self, blocks: Sequence[BlockId]) -> None:
        """Drop one lease on each block."""
        self._change_holds(reversed(blocks), leases=-1)

    def publish(self, index: BlockId, name: BlockName) -> bool:
        """Make the KV of a full ACTIVE block findable by its prefix; return False when an equal block already is."""
        self._expect(index, BlockState.ACTIVE)
        if self._blocks[index].hash is not None or name in self._by_hash:
            return False
        self._blocks[index].hash = name
        self._by_hash[name] = index
        return True

    @property
    def published(self) -> tuple[BlockHash, ...]:
        """Names of the prefixes whose blocks can be found."""
        return tuple([name for name in self._by_hash if not isinstance(name, tuple)])

    def retract(self, blocks: Iterable[BlockId]) -> None:
        """Make ACTIVE blocks that may have been published findable no more. Who holds them keeps them."""
        for index in blocks:
            self._expect(index, BlockState.ACTIVE)
            self._unpublish(self._blocks[index])

    def match_prefix(self, hashes: Sequence[BlockHash]) -> tuple[BlockId, ...]:
        """Return the blocks of the longest published prefix of ``hashes``. They are not held yet: see ``acquire``."""
        found: list[BlockId] = []
        for block_hash in hashes:
            index = self._by_hash.get(block_hash)
            if index is None:
                break
            found.append(index)
        return tuple(found)

    def find(self, name: BlockName) -> BlockId | None:
        """Return the block that holds what has this name, if one does."""
        return self._by_hash.get(name)

    def num_cached_among(self, blocks: Iterable[BlockId]) -> int:
        """Return how many of these blocks are CACHED, and so would stop being available if acquired."""
        return sum(index in self._cached for index in blocks)

    def acquire(self, blocks: Iterable[BlockId]) -> None:
        """Hold published blocks for one more sequence."""
        for index in blocks:
            block = self._block(index)
            if block.state not in (BlockState.ACTIVE, BlockState.LEASED, BlockState.CACHED):
                raise InternalError(f"block {index} is {block.state.value}: it holds no published prefix")
            self._cached.pop(index, None)
            block.was_found = True
            block.num_sequences += 1
            self._move(index, BlockState.ACTIVE)

    def audit(self) -> BlockAudit:
        """Count the blocks of each state."""
        counts = {state.value: count for state, count in self._counts.items()}
        return BlockAudit(total=self._num_blocks, **counts)

    def holds_of(self, index: BlockId) -> tuple[int, int]:
        """Return how many sequences, and how many leases, hold a block."""
        block = self._block(index)
        return block.num_sequences, block.num_leases

    def validate(self) -> None:
        """Raise InternalError unless counts, containers and holders agree for every block."""
        if faults := self.faults():
            raise InternalError("; ".join(faults))

    def faults(self) -> list[str]:
        """Return, in words, every block that contradicts itself, and counts that are not those of the blocks."""
        found = []
        actual = dict.fromkeys(BlockState, 0)
        actual[BlockState.FREE] = self._num_blocks - len(self._blocks)
        for index, block in enumerate(self._blocks):
            actual[block.state] += 1
            holders = (block.num_sequences > 0, block.num_leases > 0)
            legal = {
                BlockState.ACTIVE: holders[0],
                BlockState.LEASED: holders == (False, True),
            }.get(block.state, holders == (False, False))
            legal = legal and (index in self._cached) == (block.state is BlockState.CACHED)
            legal = legal and (block.hash is None or self._by_hash.get(block.hash) == index)
            if not legal:
                found.append(f"block {index} contradicts itself: {block}")
        free = [index for index, block in enumerate(self._blocks) if block.state is BlockState.FREE]
        if actual != self._counts or sorted(self._free) != free:
            found.append(f"block counts {self._counts} do not match the blocks, {actual}")
        return found

    def _block(self, index: BlockId) -> _Block:
        return self._blocks[index] if index < len(self._blocks) else _Block()

    def _take(self, count: int, state: BlockState) -> tuple[BlockId, ...] | None:
        if count > self.num_available:
            return None
        num_free = min(count, len(self._free))
        taken = self._free[len(self._free) - num_free :]
        del self._free[len(self._free) - num_free :]
        if num_free < count:
            num_new = min(count - num_free, self._num_blocks - len(self._blocks))
            taken += self._touch(num_new)
            num_free += num_new
            taken += [self._evict() for _ in range(count - num_free)]
        num_sequences = 1 if state is BlockState.ACTIVE else 0
        for index in taken:
            block = self._blocks[index]
            block.num_sequences = num_sequences
            block.state = state
        self._counts[BlockState.FREE] -= num_free
        self._counts[BlockState.CACHED] -= count - num_free
        self._counts[state] += count
        taken.sort()  # neighbours stay neighbours: memory is read quickest in runs
        return tuple(taken)

    def _touch(self, count: int) -> list[BlockId]:
        """Take blocks for the first time."""
        first = len(self._blocks)
        self._blocks += [_Block() for _ in range(count)]
        return [BlockId(index) for index in range(first, first + count)]

    def _evict(self) -> BlockId:
        index, _ = self._cached.popitem(last=False)
        block = self._blocks[index]
        while block.was_found:
            block.was_found = False
            self._cached[index] = None
            index, _ = self._cached.popitem(last=False)
            block = self._blocks[index]
        if block.hash is None:
            raise InternalError(f"cached block {index} has no hash")
        self._unpublish(block)
        return index

    def _unpublish(self, block: _Block) -> None:
        if block.hash is not None:
            del self._by_hash[block.hash]
            if not isinstance(block.hash, tuple):
                self._on_removed(block.hash)
            block.hash = None
            block.was_found = False

    def _change_holds(self, indices: Iterable[BlockId], *, sequences: int = 0, leases: int = 0) -> None:
        """Add so many holds of each kind to each block; one that no sequence holds goes where leases and index say."""
        blocks, free, cached = self._blocks, self._free, self._cached
        num_free, num_cached, num_loose, num_touched = len(free), len(cached), 0, len(blocks)
        for index in indices:
            block = blocks[index] if index < num_touched else _Block()
            if sequences:
                if block.state is not BlockState.ACTIVE:
                    self._expect(index, BlockState.ACTIVE)
                block.num_sequences += sequences
            if leases:
                if block.num_leases + leases < 0:
                    raise InternalError(f"block {index} ({block.state.value}) has no lease to end")
                block.num_leases += leases
            if block.num_sequences:
                continue
            num_loose += 1
            if block.num_leases:
                block.state = BlockState.LEASED
            elif block.hash is not None:
                block.state = BlockState.CACHED
                cached[index] = None
            else:
                block.state = BlockState.FREE
                free.append(index)
        num_free, num_cached = len(free) - num_free, len(cached) - num_cached
        counts = self._counts
        counts[BlockState.ACTIVE if sequences else BlockState.LEASED] -= num_loose
        counts[BlockState.FREE] += num_free
        counts[BlockState.CACHED] += num_cached
        counts[BlockState.LEASED] += num_loose - num_free - num_cached

    def _move(self, index: int, state: BlockState) -> None:
        block = self._blocks[index]
        self._counts[block.state] -= 1
        self._counts[state] += 1
        block.state = state

    def _expect(self, index: BlockId, state: BlockState) -> None:
        if self.state_of(index) is not state:
            raise InternalError(f"block {index} is {self.state_of(index).value}, expected {state.value}")
