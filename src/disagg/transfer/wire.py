"""What a reader and a ``KvServer`` say to each other over TCP.

The reader greets (``HELLO``: magic, version, the incarnation that it looks for) and gets a ``Reply``. Then, any number
of times: a ``ReadRequest``, a ``Reply``, and the bytes of the blocks, group by group and inside a group layer by layer,
each block in the order in which it was asked for. Behind a step that is running all blocks are one group, whose layers
follow as they are there. Frames are MessagePack after their length; a peer's bytes are never
evaluated, and no length in them is believed before it was compared with the layout.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from disagg.base.errors import TransferError
from disagg.base.ids import BlockId
from disagg.base.messages import UNREADABLE
from disagg.cache.layout import KvLayout
from disagg.costs.links import KvCodec

WIRE_VERSION: Final = 3
MAX_REQUEST_BYTES: Final = 1 << 20
MAX_REPLY_BYTES: Final = 1 << 16
MAX_PROBE_BYTES: Final = 1 << 28
GROUP_BYTES: Final = 2 << 20
"""Blocks that travel together: large enough for few system calls, small enough to be hashed out of the cache."""

HELLO: Final = struct.Struct("<8sH32s")
MAGIC: Final = b"DISAGGRD"

_encoder = msgspec.msgpack.Encoder()


class ReadRequest(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Send these layers of these blocks. ``digests``, where the codec changes the bytes, are those of the originals.

    With ``behind_step`` that step is still writing them. ``probe_bytes`` asks for so many bytes without meaning
    instead: see ``link_probe``.
    """

    access: Annotated[bytes, Meta(max_length=MAX_REQUEST_BYTES)]
    blocks: tuple[Annotated[BlockId, Meta(ge=0, lt=2**31)], ...]
    first_layer: Annotated[int, Meta(ge=0, lt=2**31)]
    num_layers: Annotated[int, Meta(ge=0, lt=2**31)]
    block_bytes: Annotated[int, Meta(ge=1, lt=2**62)]
    """Of one layer of a block, as the reader understands the layout."""
    codec: KvCodec = KvCodec.RAW
    digests: bytes = b""
    probe_bytes: Annotated[int, Meta(ge=0, le=MAX_PROBE_BYTES)] = 0
    behind_step: Annotated[int, Meta(ge=0, lt=2**47)] = 0


class Reply(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """``num_bytes`` follow, or none and ``failure`` says why."""

    num_bytes: Annotated[int, Meta(ge=0, lt=2**62)] = 0
    failure: Annotated[str, Meta(max_length=4096)] = ""


_requests = msgspec.msgpack.Decoder(ReadRequest)
_replies = msgspec.msgpack.Decoder(Reply)


def hello(incarnation: str) -> bytes:
    """Return a reader's first bytes."""
    return HELLO.pack(MAGIC, WIRE_VERSION, incarnation.encode())


def why_not_welcome(data: bytes, incarnation: str) -> str:
    """Return why a greeting is not accepted by this incarnation; an empty string where it is."""
    magic, version, wanted = HELLO.unpack(data)
    if magic != MAGIC:
        return "this is a KV pool of disagg, and what was sent is no greeting of one"
    if version != WIRE_VERSION:
        return f"the reader speaks version {version} of the KV protocol, this instance {WIRE_VERSION}"
    if wanted.rstrip(b"\0") != incarnation.encode():
        return f"the KV pool (incarnation {wanted.rstrip(bytes(1)).decode(errors='replace')}) has ended"
    return ""


def encode_frame(frame: ReadRequest | Reply) -> bytes:
    """Return the bytes of a frame."""
    return _encoder.encode(frame)


def decode_request(data: bytes) -> ReadRequest:
    """Return a request; raise TransferError on anything else."""
    try:
        return _requests.decode(data)
    except UNREADABLE as error:
        raise TransferError(f"malformed KV request: {error}") from error


def decode_reply(data: bytes) -> Reply:
    """Return a reply; raise TransferError on anything else."""
    try:
        return _replies.decode(data)
    except UNREADABLE as error:
        raise TransferError(f"malformed answer to a KV request: {error}") from error


def groups(num_blocks: int, layer_block_bytes: int, num_layers: int) -> Iterator[slice]:
    """Cut so many blocks into groups of about ``GROUP_BYTES``. Both ends do, so that they agree on the order."""
    size = max(1, GROUP_BYTES // max(1, layer_block_bytes * num_layers))
    for start in range(0, num_blocks, size):
        yield slice(start, min(start + size, num_blocks))


def pieces(data: memoryview, layout: KvLayout, layers: range, blocks: Sequence[BlockId]) -> list[memoryview]:
    """Return the bytes of blocks in a pool, layer by layer, where neighbours in memory are one piece."""
    size = layout.layer_block_bytes
    joined: list[tuple[int, int]] = []
    for block in blocks:
        if joined and joined[-1][0] + joined[-1][1] == block:
            joined[-1] = (joined[-1][0], joined[-1][1] + 1)
        else:
            joined.append((block, 1))
    found = []
    for layer in layers:
        for first, count in joined:
            start = layout.offset(layer, first)
            found.append(data[start : start + count * size])
    return found
