"""How KV blocks get from one instance to another, as far as whoever starts a server chooses it."""

import enum
from typing import Annotated

import msgspec
from msgspec import Meta


class KvLinkChoice(enum.Enum):
    """Over what KV blocks are handed over."""

    AUTO = "auto"
    """Shared memory where it can be opened, else TCP."""
    SHM = "shm"
    TCP = "tcp"
    NIXL = "nixl"
    """What NIXL finds: RDMA, NVLink, sockets. It asks for no capability: for a network of trusted hosts."""


class KvTransferDtype(enum.Enum):
    """In which form KV blocks travel over links that carry bytes."""

    RAW = "raw"
    """As they are in the pool."""
    INT8 = "int8"
    """A byte for each element, with scales: less to carry, and not quite the same answer."""
    AUTO = "auto"
    """Whichever is predicted to be there first, by what transfers over the link took."""


class TransferSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How KV blocks get from one instance to another."""

    kv_link: Annotated[
        KvLinkChoice,
        Meta(description="what carries KV blocks: auto takes shared memory where it works, else TCP"),
    ] = KvLinkChoice.AUTO
    kv_digests: Annotated[
        bool, Meta(description="check every handed-over KV block against a digest made where it was computed")
    ] = True
    kv_transfer_dtype: Annotated[
        KvTransferDtype,
        Meta(description="form of KV blocks over TCP: raw, int8 (lossy), or auto, the quicker one on each link"),
    ] = KvTransferDtype.RAW
    kv_streams: Annotated[int, Meta(ge=1, le=64, description="TCP connections that share out a large hand-over")] = 2
