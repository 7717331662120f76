"""What the two processes of the benchmark tell each other."""

import msgspec

from disagg.base.messages import KvOffer
from disagg.cache.layout import KvLayout


class PeerTask(msgspec.Struct, frozen=True, kw_only=True):
    """A pool to own. ``raw_bytes`` is what is sent to a plain reader each time it asks."""

    layout: KvLayout
    incarnation: str
    host: str
    raw_bytes: int


class PeerReady(msgspec.Struct, frozen=True, kw_only=True):
    """An offer of all blocks, and the port of plain bytes."""

    offer: KvOffer
    raw_port: int
