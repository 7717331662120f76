"""What the two processes of the benchmark tell each other."""

import msgspec

from disagg.base.messages import KvOffer
from disagg.cache.layout import KvLayout


class PeerTask(msgspec.Struct, frozen=True, kw_only=True):
    """A pool to own, for NIXL too where that is installed.

    ``raw_bytes`` is what is sent to a plain reader each time it asks.
    """

    layout: KvLayout
    incarnation: str
    host: str
    raw_bytes: int
    has_nixl: bool


class PeerReady(msgspec.Struct, frozen=True, kw_only=True):
    """An offer of all blocks, where NIXL reads them (empty without it), and the port of plain bytes."""

    offer: KvOffer
    nixl_pool: bytes
    raw_port: int
