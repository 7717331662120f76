"""What an instance lets others read of its pool: the address, and what goes with each offer."""

import math
from contextlib import ExitStack

from msgspec import structs

from disagg.base.clock import Clock
from disagg.base.ids import BlockId, Epoch, RequestId
from disagg.base.messages import KvOffer
from disagg.base.transfer_settings import KvLinkChoice, TransferSettings
from disagg.transfer.address import AnyWay, encode_address
from disagg.transfer.digests import block_digest
from disagg.transfer.grants import Grants
from disagg.transfer.kv_server import KvServer
from disagg.transfer.nixl_agent import NixlAgent
from disagg.transfer.pool import KvPool

_LOOPBACK = "127.0.0.1"


class SharedBlocks:
    """Opens the ways to a pool, and seals offers of its blocks. ``stack`` takes what must be closed.

    ``host`` is an address of this host on which other hosts read; without one, only this host does.
    """

    def __init__(
        self, pool: KvPool, settings: TransferSettings, host: str | None, clock: Clock, stack: ExitStack
    ) -> None:
        self._pool = pool
        self.has_digests = settings.kv_digests
        """Whether blocks are checked."""
        self._grants = Grants(clock)
        self._is_open = False
        self._of_parts: dict[tuple[RequestId, Epoch], dict[BlockId, bytes]] = {}
        """Digests of the blocks of sequences that are offered in parts."""
        self.nixl: NixlAgent | None = None
        """This instance's end of NIXL, where that carries blocks."""
        ways: list[AnyWay] = []
        if settings.kv_link is KvLinkChoice.NIXL:
            self.nixl = NixlAgent(pool, host or _LOOPBACK)
            stack.callback(self.nixl.close)
            ways.append(self.nixl.way)
        elif settings.kv_link is not KvLinkChoice.TCP:
            ways.append(pool.shm_way)
        if settings.kv_link is KvLinkChoice.TCP or (settings.kv_link is KvLinkChoice.AUTO and host is not None):
            server = KvServer(pool, self._grants, host or _LOOPBACK, clock)
            stack.callback(server.close)
            ways.append(server.way)
            self._is_open = True
        self.address = encode_address(pool.address(*ways))
        """Where the pool is, for peers' ``Links``."""

    def forget(self, request_id: RequestId, epoch: Epoch) -> None:
        """Nothing more of an attempt will be offered."""
        self._of_parts.pop((request_id, epoch), None)

    @property
    def probe(self) -> bytes:
        """The capability to measure the link to this pool, for as long as the instance lives: it opens no block."""
        if not self._is_open:
            return b""
        return self._grants.issue(RequestId("link probe"), Epoch(0), (), math.inf)

    def seal(self, offer: KvOffer, *, is_part: bool = False) -> KvOffer:
        """Return an offer with the digests of its blocks, and the capability to read them while it lasts.

        A whole offer has the digests of the parts before it: those blocks are final since, and are not read again. What
        a step is still writing has none.
        """
        blocks, key = offer.block_ids, (offer.request_id, offer.epoch)
        known = self._of_parts.setdefault(key, {}) if is_part else self._of_parts.get(key, {})
        digests = b""
        if self.has_digests and not offer.behind_step:
            new = [block for block in blocks if block not in known]
            found = known | {block: block_digest(self._pool.blocks, block) for block in new}
            digests = b"".join([found[block] for block in blocks])
            if is_part:
                known.update(found)
        return structs.replace(
            offer,
            digests=digests,
            access=self._grants.issue(offer.request_id, offer.epoch, blocks, offer.lease_s) if self._is_open else b"",
        )
