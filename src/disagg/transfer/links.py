"""The links of one instance, opened at first use and chosen by the kind of the peer's address."""

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from disagg.base.clock import Clock
from disagg.transfer.address import PoolAddress, ShmAddress, decode_address
from disagg.transfer.link import Link
from disagg.transfer.pool import KvPool
from disagg.transfer.shm_link import ShmLink

OPENERS: Final[dict[type[PoolAddress], Callable[[PoolAddress, KvPool, Executor, Clock, bool], Link]]] = {
    ShmAddress: ShmLink,
}
"""How each kind of address is opened."""


class Links:
    """Owns the links to all peers. Copies into ``pool`` run on ``threads``, as many at once as it has.

    With ``maps_ahead`` all of a peer's pool is mapped in the background once its link is open: right where the peer
    takes all of that memory anyway.
    """

    def __init__(self, pool: KvPool, threads: Executor, clock: Clock, *, maps_ahead: bool = False) -> None:
        self._pool = pool
        self._threads = threads
        self._clock = clock
        self._maps_ahead = maps_ahead
        self._links: dict[PoolAddress, Link] = {}

    def open(self, address: bytes) -> Link:
        """Return the link to the pool at ``address``.

        Raises ProtocolError for bytes that are no address, TransferError when the peer is gone or its pool is of
        another layout.
        """
        decoded = decode_address(address)
        link = self._links.get(decoded)
        if link is None:
            link = OPENERS[type(decoded)](decoded, self._pool, self._threads, self._clock, self._maps_ahead)
            self._links[decoded] = link
        return link

    def close_peer(self, incarnation: str) -> None:
        """Let go of a peer that died, or do nothing if it was never read from."""
        for address in [known for known in self._links if known.incarnation == incarnation]:
            self._links.pop(address).close()

    def close(self) -> None:
        """Let go of all peers; copies under way still end."""
        for link in self._links.values():
            link.close()
        self._links.clear()
