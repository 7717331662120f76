"""The links of one instance: opened at first use, each over the best way to the peer's pool that works."""

import logging
from concurrent.futures import Executor
from typing import Final

from disagg.base.clock import Clock
from disagg.base.errors import TransferError
from disagg.base.transfer_settings import KvLinkChoice, TransferSettings
from disagg.transfer.address import AnyWay, NixlWay, PoolAddress, ShmWay, TcpWay, decode_address
from disagg.transfer.block_forms import BlockForms
from disagg.transfer.link import Link
from disagg.transfer.nixl_agent import NixlAgent
from disagg.transfer.nixl_link import NixlLink
from disagg.transfer.pool import KvPool
from disagg.transfer.shm_link import ShmLink
from disagg.transfer.tcp_link import TcpLink

logger = logging.getLogger(__name__)

_USABLE: Final = {
    KvLinkChoice.AUTO: (ShmWay, TcpWay),
    KvLinkChoice.SHM: (ShmWay,),
    KvLinkChoice.TCP: (TcpWay,),
    KvLinkChoice.NIXL: (NixlWay,),
}
"""The kinds of ways that may be taken, best first: one copy before two and a network between them."""


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
