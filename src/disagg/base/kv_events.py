"""What becomes of an instance's cached KV blocks, in the words and the order of fields of vLLM's KV events.

vLLM (``vllm/distributed/kv_events.py``) publishes them so that routers can send a request to where its prefix is. Here
the instances tell the router, which keeps an index, and publishes them to others where ``--kv-events`` asks for it.
"""

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from disagg.base.ids import BlockHash

Digest = Annotated[BlockHash, Meta(min_length=1, max_length=64)]
EventNumber = Annotated[int, Meta(ge=0, lt=2**62)]


class Medium(enum.Enum):
    """Where blocks are."""

    GPU = "GPU"
    CPU = "CPU"
    DISK = "DISK"


class KvEvent(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of the events: the tag, which comes first, is vLLM's name."""


class BlockStored(KvEvent, frozen=True):
    """Full blocks of one sequence, in order, can be found from now on.

    ``token_ids`` are theirs, where somebody asked for them. ``lora_id`` is there for those who read vLLM's events.
    """

    block_hashes: tuple[Digest, ...]
    parent_block_hash: Digest | None
    """The block before the first of them; None where they begin the sequence."""
    token_ids: tuple[int, ...]
    block_size: int
    lora_id: int | None = None
    medium: Medium = Medium.GPU


class BlockRemoved(KvEvent, frozen=True):
    """These blocks can be found no more."""

    block_hashes: tuple[Digest, ...]
    medium: Medium = Medium.GPU


class AllBlocksCleared(KvEvent, frozen=True):
    """No block can be found any more, in no medium; what follows says which are there."""


AnyKvEvent = BlockStored | BlockRemoved | AllBlocksCleared
