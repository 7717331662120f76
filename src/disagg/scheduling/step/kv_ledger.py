"""Which blocks each sequence holds: allocation, prefix reuse, leases, pulls and quarantine, over one block pool."""

from disagg.base.errors import InternalError
from disagg.base.ids import BlockId, Epoch, RequestId
from disagg.cache.block_pool import BlockPool
from disagg.cache.leases import Lease, LeaseTable
from disagg.scheduling.step.actions import BlockCopy
from disagg.scheduling.step.sequence import RemoteKv, Sequence


class KvLedger:
    """Books blocks in and out for sequences. It decides nothing: a refusal is a False, never a preemption."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.leases = LeaseTable()
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self._block_size = block_size
        self._prefix_caching = prefix_caching
        self._quarantine: dict[tuple[RequestId, Epoch], tuple[BlockId, ...]] = {}
        # One block in a hundred stays free at admission, so that running sequences can grow before one is preempted.
        self._headroom = max(1, num_blocks // 100)

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self._block_size)

    def fits_at_all(self, num_tokens: int) -> bool:
        """True when an otherwise empty pool could hold the tokens."""
        return self.num_blocks_for(num_tokens) <= self.pool.num_blocks

    def admit(self, sequence: Sequence, keep_headroom: bool) -> bool:
        """Give a waiting sequence blocks for all its known tokens, reusing published prefixes.

        Taking them all at once means that a prompt, once begun, is never stopped half-way for want of blocks.
        """
        reusable = self._reusable(sequence, sequence.num_tokens - 1)
        taken = self._hold(reusable, self.num_blocks_for(sequence.num_tokens), keep_headroom, for_pull=False)
        if taken is None:
            return False
        if sequence.reuse_prefix and sequence.block_hashes and self._prefix_caching:
            self.num_prefix_queries += sequence.num_tokens
            self.num_prefix_hits += len(reusable) * self._block_size
        sequence.block_ids = reusable + taken
        sequence.num_computed = len(reusable) * self._block_size
        sequence.num_published = len(reusable)
        return True

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make a running sequence's blocks hold ``num_tokens`` tokens."""
        num_held = len(sequence.block_ids)
        if num_tokens <= num_held * self._block_size:
            return True
        taken = self.pool.allocate(self.num_blocks_for(num_tokens) - num_held)
        if taken is None:
            return False
        sequence.block_ids += taken
        return True

    def publish(self, sequence: Sequence) -> None:
        """Make the prompt blocks that are completely computed findable for other sequences."""
        if not self._prefix_caching or not sequence.block_hashes:
            return
        num_full = min(sequence.num_computed // self._block_size, len(sequence.block_hashes))
        for index in range(sequence.num_published, num_full):
            self.pool.publish(sequence.block_ids[index], sequence.block_hashes[index])
        sequence.num_published = max(sequence.num_published, num_full)

    def retract(self, sequence: Sequence) -> None:
        """Let no other sequence find the blocks of one that failed: what they hold may be why."""
        self.pool.retract(sequence.block_ids)

    def free(self, sequence: Sequence) -> None:
        """Take back a running sequence's blocks."""
        self.pool.release(sequence.block_ids)
        self._forget(sequence)

    def lease(self, sequence: Sequence, expires_s: float) -> None:
        """Keep a running sequence's blocks for another instance to read."""
        self.pool.lease(sequence.block_ids)
        self.leases.grant(Lease(sequence.request_id, sequence.epoch, sequence.block_ids, expires_s))

    def end_lease(self, request_id: RequestId, epoch: Epoch) -> bool:
        """End one lease; False when it had ended before or is another epoch's."""
        lease = self.leases.end(request_id, epoch)
        if lease is not None:
            self.pool.end_lease(lease.blocks)
        return lease is not None

    def end_expired_leases(self, now: float) -> list[Lease]:
        """End the leases whose time is over and return them."""
        expired = self.leases.end_expired(now)
        for lease in expired:
            self.pool.end_lease(lease.blocks)
        return expired

    def begin_pull(self, sequence: Sequence, remote: RemoteKv, keep_headroom: bool) -> bool:
        """Reserve blocks for a remote sequence; what is already here by its prefix is not copied again."""
        reusable = self._reusable(sequence, remote.num_tokens)
        taken = self._hold(reusable, len(remote.blocks), keep_headroom, for_pull=True)
        if taken is None:
            return False
        sequence.block_ids = reusable + taken
        sequence.num_published = len(reusable)
        missing = remote.blocks[len(reusable) :]
        if len(missing) != len(taken):
            raise InternalError(f"{len(taken)} blocks were taken for a copy of {len(missing)}")
        sequence.copies = tuple(map(BlockCopy, missing, taken))
        return True

    def commit_pull(self, sequence: Sequence) -> None:
        """The copies are complete: the sequence holds its blocks like any other."""
        self.pool.commit([copy.target for copy in sequence.copies])
        sequence.copies = ()

    def abandon_pull(self, sequence: Sequence, ended: bool) -> None:
        """Give up a pull. Until it has ``ended``, its target blocks are quarantined."""
        targets = tuple(copy.target for copy in sequence.copies)
        if ended:
            self.pool.abandon(targets)
        else:
            self.pool.quarantine(targets)
            self._quarantine[sequence.request_id, sequence.epoch] = targets
        self.pool.release(sequence.block_ids[: len(sequence.block_ids) - len(targets)])
        self._forget(sequence)

    def end_quarantine(self, request_id: RequestId, epoch: Epoch) -> bool:
        """Free the quarantined blocks of a pull that has now ended; False when there are none."""
        targets = self._quarantine.pop((request_id, epoch), None)
        if targets is not None:
            self.pool.abandon(targets)
        return targets is not None

    def _reusable(self, sequence: Sequence, num_tokens: int) -> tuple[BlockId, ...]:
        """Return published blocks that hold a prefix of the sequence's first ``num_tokens`` tokens."""
        if not (self._prefix_caching and sequence.reuse_prefix):
            return ()
        return self.pool.match_prefix(sequence.block_hashes[: num_tokens // self._block_size])

    def _hold(
        self, reusable: tuple[BlockId, ...], num_blocks: int, keep_headroom: bool, *, for_pull: bool
    ) -> tuple[BlockId, ...] | None:
        """Hold the reusable blocks and take the rest of ``num_blocks``; None, and nothing held, when they lack."""
        missing = num_blocks - len(reusable)
        available = self.pool.num_available - (self.pool.num_cached_among(reusable) if reusable else 0)
        if missing + (self._headroom if keep_headroom else 0) > available:
            return None
        self.pool.acquire(reusable)
        return self.pool.reserve(missing) if for_pull else self.pool.allocate(missing)

    @staticmethod
    def _forget(sequence: Sequence) -> None:
        sequence.block_ids = ()
        sequence.copies = ()
        sequence.num_computed = 0
        sequence.num_published = 0
