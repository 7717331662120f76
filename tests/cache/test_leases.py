import pytest

from disagg.base.errors import InternalError
from disagg.base.ids import BlockId, Epoch, RequestId
from disagg.cache.leases import Lease, LeaseTable


def lease(name: str, expires_s: float, epoch: int = 1) -> Lease:
    return Lease(RequestId(name), Epoch(epoch), (BlockId(0),), expires_s)


def test_another_epoch_cannot_end_a_lease() -> None:
    table = LeaseTable()
    table.grant(lease("a", 10.0, epoch=2))
    assert table.end(RequestId("a"), Epoch(1)) is None
    assert table.end(RequestId("a"), Epoch(2)) is not None
    assert table.end(RequestId("a"), Epoch(2)) is None


def test_expired_leases_come_out_once() -> None:
    table = LeaseTable()
    table.grant(lease("a", 10.0))
    table.grant(lease("b", 20.0))
    assert [one.request_id for one in table.end_expired(15.0)] == ["a"]
    assert table.end_expired(15.0) == []
    assert table.next_expiry() == 20.0


def test_a_sequence_has_one_lease() -> None:
    table = LeaseTable()
    table.grant(lease("a", 10.0))
    with pytest.raises(InternalError, match="already has a lease"):
        table.grant(lease("a", 10.0))
