"""Whether every hold on a KV block is somebody's: the blocks of one instance against who says that it has them."""

from collections import Counter
from collections.abc import Iterable

from disagg.base.ids import BlockId
from disagg.cache.block_pool import BlockState
from disagg.scheduling.step.kv_ledger import KvLedger
from disagg.scheduling.step.sequence import Sequence

MAX_FAULTS = 100
"""That are told at once."""


def block_faults(ledger: KvLedger, sequences: Iterable[Sequence]) -> tuple[str, ...]:
    """Return, in words, every block that contradicts itself, or is held by others than ``sequences``, leases and pulls.

    ``sequences`` are all that may hold blocks, those among them that wait for a step in flight to let go.
    """
    pool = ledger.pool
    faults = pool.faults()
    holders, writers = Counter[BlockId](), Counter[BlockId](ledger.quarantined)
    leases = Counter[BlockId](ledger.leased)
    for sequence in sequences:
        writers.update(sequence.filling)
        holders.update(set(sequence.held).difference(sequence.filling))
    claimed = (index for index in {*holders, *leases, *writers} if index >= pool.num_touched)
    for index in (*map(BlockId, range(pool.num_touched)), *sorted(claimed)):
        found, expected = pool.holds_of(index), (holders[index], leases[index])
        if found != expected:
            faults.append(
                f"block {index} ({pool.state_of(index).value}) is held by {found[0]} sequences and {found[1]} leases, "
                f"and {expected[0]} and {expected[1]} say that they hold it"
            )
        is_written = pool.state_of(index) in (BlockState.FILLING, BlockState.QUARANTINED)
        if writers[index] != is_written:
            faults.append(
                f"block {index} is {pool.state_of(index).value}, and {writers[index]} pulls say that they write it"
            )
    return tuple(faults[:MAX_FAULTS])
