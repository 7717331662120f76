"""Which instance holds which prefixes: the router's index, fed by the events of the instances.

An instance's blocks are counted against what it can hold, so the index is as bounded as the instances' memory. Events
are numbered: after a gap nothing is believed until the instance has said anew what it holds.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from disagg.base.block_hash import names_for
from disagg.base.errors import InternalError
from disagg.base.ids import BlockHash, InstanceId
from disagg.base.kv_events import AllBlocksCleared, AnyKvEvent, BlockRemoved, BlockStored, Medium


@dataclass(frozen=True, slots=True)
class HeldPrefix:
    """How much of a sequence's beginning an instance holds, in tokens: ``num_tokens`` in its pool or behind it,
    ``num_in_pool`` of them without a gap in the pool, where others can read them.
    """

    num_tokens: int
    num_in_pool: int


@dataclass(slots=True)
class _Holder:
    """One instance. Its bit stands for it in the masks of the index."""

    instance: InstanceId
    bit: int
    block_size: int
    max_blocks: int
    has_host_tier: bool
    num_blocks: int = 0
    next_number: int = 0
    is_current: bool = True
    """False while it is to say anew what it holds."""


class PrefixIndex:
    """Names of blocks, and who holds them where."""

    def __init__(self) -> None:
        self._holders: dict[InstanceId, _Holder] = {}
        self._unused_bits: list[int] = []
        """A heap of those that holders before had; all others below the highest are in use."""
        self._bits_of_size: dict[int, int] = {}
        """The bits of the holders whose blocks hold so many tokens."""
        self._pool: dict[BlockHash, int] = {}
        """A bit for each holder that has the block in its pool; and for each that has it in a tier behind that."""
        self._host: dict[BlockHash, int] = {}
        self._disk: dict[BlockHash, int] = {}

    def __len__(self) -> int:
        return sum(holder.num_blocks for holder in self._holders.values())

    def join(self, instance: InstanceId, block_size: int, max_blocks: int, *, has_host_tier: bool = False) -> None:
        """Take an instance that begins a life, with no block and its events from number 0 on.

        Where it ``has_host_tier``, blocks in the host's memory are behind its pool; elsewhere its pool is there.
        """
        self.leave(instance)
        bit = heapq.heappop(self._unused_bits) if self._unused_bits else 1 << len(self._holders)
        self._holders[instance] = _Holder(instance, bit, block_size, max_blocks, has_host_tier)
        self._bits_of_size[block_size] = self._bits_of_size.get(block_size, 0) | bit

    def leave(self, instance: InstanceId) -> None:
        """Forget an instance and its blocks, if it is known."""
        holder = self._holders.pop(instance, None)
        if holder is not None:
            self._clear(holder)
            heapq.heappush(self._unused_bits, holder.bit)
            self._bits_of_size[holder.block_size] &= ~holder.bit
            if not self._bits_of_size[holder.block_size]:
                del self._bits_of_size[holder.block_size]

    def take(self, instance: InstanceId, number: int, events: Iterable[AnyKvEvent]) -> bool:
        """Take events of a known instance. Return False when some before them were lost: it has to say what it holds.

        Raises InternalError when it claims to hold more than it can.
        """
        holder = self._holders[instance]
        was_lost = number != holder.next_number
        holder.next_number = number + 1
        if was_lost:
            self._clear(holder)
            holder.is_current = False
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self._clear(holder)
                holder.is_current = True
            elif holder.is_current:
                self._change(holder, event)
        return holder.is_current or not was_lost

    def find(self, names: Sequence[BlockHash], hash_block_size: int) -> dict[InstanceId, HeldPrefix]:
        """Return who holds how much of the beginning of a sequence; those that hold nothing are left out.

        ``names`` are of blocks of ``hash_block_size`` tokens. The same name is another block's where blocks are larger.
        """
        found: dict[InstanceId, HeldPrefix] = {}
        for size, bits in self._bits_of_size.items():
            own = names if size == hash_block_size else names_for(names, hash_block_size, size)
            if own:
                found |= self._find(own, size, bits)
        return found

    def _find(self, names: Sequence[BlockHash], size: int, bits: int) -> dict[InstanceId, HeldPrefix]:
        in_pool = self._pool.get(names[0], 0) & bits
        somewhere = in_pool | ((self._host.get(names[0], 0) | self._disk.get(names[0], 0)) & bits)
        if not somewhere:
            return {}  # most prompts, however many instances there are
        lengths: dict[int, int] = {}
        in_pools: dict[int, int] = {}
        for count, name in enumerate(names):
            there = self._pool.get(name, 0)
            if lost := in_pool & ~there:
                _note(in_pools, lost, count)
                in_pool &= there
            there |= self._host.get(name, 0) | self._disk.get(name, 0)
            if lost := somewhere & ~there:
                _note(lengths, lost, count)
                somewhere &= there
                if not somewhere:
                    break
        _note(in_pools, in_pool, len(names))
        _note(lengths, somewhere, len(names))
        return {
            holder.instance: HeldPrefix(lengths[holder.bit] * size, in_pools.get(holder.bit, 0) * size)
            for holder in self._holders.values()
            if lengths.get(holder.bit, 0)
        }

    def _change(self, holder: _Holder, event: BlockStored | BlockRemoved) -> None:
        masks, bit = self._pool, holder.bit
        if event.medium is Medium.DISK:
            masks = self._disk
        elif event.medium is Medium.CPU and holder.has_host_tier:
            masks = self._host
        for name in event.block_hashes:
            before = masks.get(name, 0)
            if isinstance(event, BlockStored):
                if not before & bit:
                    _count(holder)
                masks[name] = before | bit
            elif before & bit:
                holder.num_blocks -= 1
                _drop(masks, name, bit)

    def _clear(self, holder: _Holder) -> None:
        if not holder.num_blocks:
            return
        for masks in (self._pool, self._host, self._disk):
            for name in [name for name, mask in masks.items() if mask & holder.bit]:
                _drop(masks, name, holder.bit)
        holder.num_blocks = 0


def _count(holder: _Holder) -> None:
    """Count one more block of an instance, unless it cannot be."""
    if holder.num_blocks == holder.max_blocks:
        raise InternalError(
            f"{holder.instance} says that it holds more than the {holder.max_blocks} blocks it can hold"
        )
    holder.num_blocks += 1


def _drop(masks: dict[BlockHash, int], name: BlockHash, bit: int) -> None:
    if left := masks[name] & ~bit:
        masks[name] = left
    else:
        del masks[name]


def _note(lengths: dict[int, int], bits: int, count: int) -> None:
    """Note the length at which those in ``bits`` have no further block."""
    while bits:
        bit = bits & -bits
        lengths[bit] = count
        bits ^= bit
