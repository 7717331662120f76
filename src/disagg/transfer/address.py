"""Where a KV pool can be read from. An address travels inside a ``KvOffer``; only this room looks into it."""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from disagg.base.errors import ConfigurationError, ProtocolError
from disagg.cache.layout import KvLayout

ADDRESS_VERSION: Final = 2
MAX_ADDRESS_BYTES: Final = 8192


class ShmWay(msgspec.Struct, frozen=True, kw_only=True, tag="shm", forbid_unknown_fields=True):
    """An anonymous memory file of another process on this host.

    The reader opens ``/proc/<pid>/fd/<fd>``: the file has no name in any directory, so nothing is left behind when
    its owner is killed.
    """

    pid: Annotated[int, Meta(ge=1)]
    fd: Annotated[int, Meta(ge=0)]


class TcpWay(msgspec.Struct, frozen=True, kw_only=True, tag="tcp", forbid_unknown_fields=True):
    """A ``KvServer`` that listens there."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Annotated[int, Meta(ge=1, le=65535)]


class NixlWay(msgspec.Struct, frozen=True, kw_only=True, tag="nixl", forbid_unknown_fields=True):
    """A pool that a NIXL agent has registered. Whoever has its ``metadata`` can read all of it."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    metadata: Annotated[bytes, Meta(min_length=1, max_length=6144)]
    start: Annotated[int, Meta(ge=0, lt=2**62)]
    """Where the pool's file begins in the memory of its owner."""


AnyWay = ShmWay | TcpWay | NixlWay


class PoolAddress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pool, and every way in which it can be reached; ``incarnation`` is new at every start of its instance."""

    version: int
    incarnation: Annotated[str, Meta(min_length=1, max_length=32, pattern="^[0-9a-f]+$")]
    layout: KvLayout
    ways: Annotated[tuple[AnyWay, ...], Meta(max_length=8)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(PoolAddress)


def encode_address(address: PoolAddress) -> bytes:
    """Return the bytes of an address."""
    return _encoder.encode(address)


def decode_address(data: bytes) -> PoolAddress:
    """Return the address in ``data``; raise ProtocolError on anything else, or on another version."""
    if len(data) > MAX_ADDRESS_BYTES:
        raise ProtocolError(f"pool address of {len(data)} bytes is over the limit of {MAX_ADDRESS_BYTES}")
    try:
        address = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, ConfigurationError) as error:
        raise ProtocolError(f"malformed pool address: {error}") from error
    if address.version != ADDRESS_VERSION:
        raise ProtocolError(f"pool address has version {address.version}, this instance reads {ADDRESS_VERSION}")
    return address
