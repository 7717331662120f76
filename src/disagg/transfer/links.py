"""The ways between pools: which of them an instance opens to its own, and which it takes to those of its peers.

``--kv-link`` decides both. What goes with an offer, so that its blocks can be read, is added here too.
"""

import logging
import math
from concurrent.futures import Executor
from contextlib import ExitStack
from typing import Final

from msgspec import structs

from disagg.base.clock import Clock
from disagg.base.errors import TransferError
from disagg.base.ids import BlockId, Epoch, RequestId
from disagg.base.messages import KvOffer
from disagg.base.transfer_settings import KvLinkChoice, TransferSettings
from disagg.transfer.address import AnyWay, NixlWay, PoolAddress, ShmWay, TcpWay, decode_address, encode_address
from disagg.transfer.block_forms import BlockForms
from disagg.transfer.digests import block_digest
from disagg.transfer.grants import Grants
from disagg.transfer.kv_server import KvServer
from disagg.transfer.link import Link
from disagg.transfer.nixl_agent import NixlAgent
from disagg.transfer.nixl_link import NixlLink
from disagg.transfer.pool import KvPool
from disagg.transfer.shm_link import ShmLink
from disagg.transfer.tcp_link import TcpLink

logger = logging.getLogger(__name__)

_LOOPBACK: Final = "127.0.0.1"
_USABLE: Final = {
    KvLinkChoice.AUTO: (ShmWay, TcpWay),
    KvLinkChoice.SHM: (ShmWay,),
    KvLinkChoice.TCP: (TcpWay,),
    KvLinkChoice.NIXL: (NixlWay,),
}
"""The kinds of ways that may be taken, best first: one copy before two and a network between them."""


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


class Links:
    """Owns the links to all peers. Copies into ``pool`` run on ``threads``, as many at once as it has.

    With ``maps_ahead`` all of a peer's pool is mapped in the background once its link is open: right where the peer
    takes all of that memory anyway. ``nixl`` is this instance's end of NIXL, where that may be taken.
    """

    def __init__(
        self,
        pool: KvPool,
        threads: Executor,
        clock: Clock,
        settings: TransferSettings | None = None,
        *,
        maps_ahead: bool = False,
        nixl: NixlAgent | None = None,
    ) -> None:
        self._pool = pool
        self._threads = threads
        self._clock = clock
        self._settings = settings or TransferSettings()
        self._maps_ahead = maps_ahead
        self._nixl = nixl
        self._links: dict[PoolAddress, Link] = {}
        self._why: dict[PoolAddress, str] = {}

    def open(self, address: bytes, peer: str = "a peer") -> Link:
        """Return the link to the pool at ``address``; ``peer`` is whom a log names.

        Raises ProtocolError for bytes that are no address, TransferError when the peer is gone, its pool is of
        another layout, or no way to it may be taken.
        """
        decoded = decode_address(address)
        link = self._links.get(decoded)
        if link is None:
            link = self._links[decoded] = self._open(decoded, peer)
        return link

    def why(self, address: bytes) -> str:
        """Return in words why an open link is over what it is over."""
        return self._why.get(decode_address(address), "")

    def _open(self, address: PoolAddress, peer: str) -> Link:
        failures = []
        for kind in _USABLE[self._settings.kv_link]:
            for way in address.ways:
                if isinstance(way, kind):
                    try:
                        link = self._over(address, way)
                    except TransferError as error:
                        failures.append(str(error))
                    else:
                        self._why[address] = self._words(address, failures)
                        logger.info("KV blocks of %s are read over %s: %s", peer, link.kind.value, self._why[address])
                        return link
        offered = ", ".join(sorted({str(way.__struct_config__.tag) for way in address.ways})) or "no way"
        raise TransferError(
            "; ".join(failures)
            or f"the KV pool of {peer} can be read over {offered}, this instance takes {self._settings.kv_link.value}"
        )

    def _words(self, address: PoolAddress, failures: list[str]) -> str:
        forms = BlockForms(address.layout, self._pool.layout)
        converted = "" if forms.is_same else f", converted from {forms.describe()}"
        return self._why_this(address, failures) + converted

    def _why_this(self, address: PoolAddress, failures: list[str]) -> str:
        if failures:
            return "; ".join(failures)
        if self._settings.kv_link is not KvLinkChoice.AUTO:
            return f"--kv-link {self._settings.kv_link.value}"
        return "the best of the ways there are" if len(address.ways) > 1 else "the only way there is"

    def _over(self, address: PoolAddress, way: AnyWay) -> Link:
        if isinstance(way, ShmWay):
            return ShmLink(address, way, self._pool, self._threads, self._clock, maps_ahead=self._maps_ahead)
        if isinstance(way, NixlWay):
            if self._nixl is None:
                raise TransferError("this instance does not use NIXL: start it with --kv-link nixl")
            return NixlLink(address, way, self._pool, self._nixl, self._threads, self._clock)
        return TcpLink(address, way, self._pool, self._threads, self._clock, self._settings)

    def close_peer(self, incarnation: str) -> None:
        """Let go of a peer that died, or do nothing if it was never read from."""
        for address in [known for known in self._links if known.incarnation == incarnation]:
            self._why.pop(address, None)
            self._links.pop(address).close()

    def close(self) -> None:
        """Let go of all peers; copies under way still end."""
        for link in self._links.values():
            link.close()
        self._links.clear()
