"""Who may read which blocks of this instance's pool, for how long: a capability that only its owner can make.

It travels inside the offer. Whoever shows it may read those blocks until it ends, and nothing else: another request's
blocks, or the same ones later, need another. KV travels in the clear, so somebody who can listen on the network can
read what passes, and repeat a capability while it lasts.
"""

import hashlib
import hmac
import secrets
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from disagg.base.clock import Clock
from disagg.base.errors import ProtocolError
from disagg.base.ids import BlockId, Epoch, RequestId

MAX_ACCESS_BYTES: Final = 1 << 20
_MAC_BYTES: Final = hashlib.sha256().digest_size


class Grant(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The right to read ``blocks`` until ``expires_s`` of the owner's clock, which nobody else looks at."""

    request_id: RequestId
    epoch: Epoch
    blocks: tuple[Annotated[BlockId, Meta(ge=0)], ...]
    expires_s: float


class Grants:
    """Issues and checks the capabilities of one instance's life. Safe from any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._secret = secrets.token_bytes(_MAC_BYTES)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Grant)

    def issue(self, request_id: RequestId, epoch: Epoch, blocks: tuple[BlockId, ...], duration_s: float) -> bytes:
        """Return the capability to read these blocks for so long from now."""
        expires_s = self._clock.now() + duration_s
        grant = Grant(request_id=request_id, epoch=epoch, blocks=blocks, expires_s=expires_s)
        data = self._encoder.encode(grant)
        return self._mac(data) + data

    def check(self, access: bytes) -> Grant:
        """Return what a capability allows now; raise ProtocolError for one that is forged or over."""
        mac, data = access[:_MAC_BYTES], access[_MAC_BYTES:]
        if len(access) > MAX_ACCESS_BYTES or not hmac.compare_digest(mac, self._mac(data)):
            raise ProtocolError("the capability to read these KV blocks is not one of this instance")
        grant = self._decoder.decode(data)
        if self._clock.now() >= grant.expires_s:
            raise ProtocolError(f"the capability to read the KV blocks of {grant.request_id} has ended")
        return grant

    def _mac(self, data: bytes) -> bytes:
        return hmac.digest(self._secret, data, "sha256")
