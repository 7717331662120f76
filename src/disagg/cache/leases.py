"""Leases: blocks that are kept for another instance to read, each with an owner, an epoch and an expiry."""

from collections.abc import Iterator

import msgspec

from disagg.base.errors import InternalError
from disagg.base.ids import BlockId, Epoch, RequestId


class Lease(msgspec.Struct, frozen=True):
    """The blocks of one handed-over sequence, kept until ``expires_s``."""

    request_id: RequestId
    epoch: Epoch
    blocks: tuple[BlockId, ...]
    expires_s: float


class LeaseTable:
    """The leases of one instance. One sequence has at most one; another epoch than its own cannot end it."""

    def __init__(self) -> None:
        self._leases: dict[RequestId, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def find(self, request_id: RequestId) -> Lease | None:
        """Return the lease of a sequence, of whatever epoch."""
        return self._leases.get(request_id)

    def grant(self, lease: Lease) -> None:
        """Record a new lease."""
        if lease.request_id in self._leases:
            raise InternalError(f"sequence {lease.request_id} already has a lease")
        self._leases[lease.request_id] = lease

    def end(self, request_id: RequestId, epoch: Epoch) -> Lease | None:
        """Remove and return a lease; None when it is not there (ended, expired) or belongs to another epoch."""
        lease = self._leases.get(request_id)
        if lease is None or lease.epoch != epoch:
            return None
        return self._leases.pop(request_id)

    def end_expired(self, now: float) -> list[Lease]:
        """Remove and return the leases whose time is over."""
        expired = [lease for lease in self._leases.values() if lease.expires_s <= now]
        for lease in expired:
            del self._leases[lease.request_id]
        return expired

    def next_expiry(self) -> float | None:
        """Return the earliest expiry, or None without leases."""
        return min((lease.expires_s for lease in self._leases.values()), default=None)
