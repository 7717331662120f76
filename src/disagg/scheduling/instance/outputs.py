"""What an instance's core wants: messages to the router, and effects that its shell carries out, in order."""

import msgspec

from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.messages import (
    Audited,
    CostsLearned,
    Failed,
    KvEvents,
    KvOffer,
    NotHeld,
    Offered,
    PartOffered,
    Pulled,
    StageStamps,
)
from disagg.scheduling.step.actions import BlockCopy, DropSaved, Forget, LoadBlocks, RunStep, SaveBlock, WakeAt


class InstanceOutput(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of the core's own outputs: the tag is the class name."""


class FirstOutput(msgspec.Struct, frozen=True, array_like=True):
    """What goes with the first token of a sequence on this instance."""

    request_id: RequestId
    stamps: StageStamps
    num_cached_tokens: int


class Emitted(InstanceOutput, frozen=True, kw_only=True):
    """Tell the router the tokens that the step just ended sampled for these sequences."""

    request_ids: tuple[RequestId, ...]
    firsts: tuple[FirstOutput, ...] = ()


class StartCopy(InstanceOutput, frozen=True, kw_only=True):
    """Copy these blocks of an offer into this instance's pool, then report CopyEnded."""

    request_id: RequestId
    epoch: Epoch
    source: InstanceId
    offer: KvOffer
    copies: tuple[BlockCopy, ...]
    expires_s: float
    """When the offer ends, by this instance's clock."""


class CacheChanged(InstanceOutput, frozen=True, kw_only=True):
    """Tell the router what became of cached blocks. Its events' ``token_ids`` are left to whoever knows tokens.

    ``owners``, one for each event: a sequence that has the blocks, and which of its blocks is the first.
    """

    message: KvEvents
    owners: tuple[tuple[RequestId, int] | None, ...] = ()


class CancelCopy(InstanceOutput, frozen=True, kw_only=True):
    """Stop a copy as soon as possible; its end is reported like any other."""

    request_id: RequestId
    epoch: Epoch


class ForgetPeer(InstanceOutput, frozen=True, kw_only=True):
    """An instance died: let go of what belongs to this life of it."""

    incarnation: str


AnyInstanceOutput = (
    RunStep
    | Emitted
    | Offered
    | PartOffered
    | NotHeld
    | Pulled
    | Failed
    | CacheChanged
    | Forget
    | StartCopy
    | CancelCopy
    | LoadBlocks
    | SaveBlock
    | DropSaved
    | ForgetPeer
    | CostsLearned
    | Audited
    | WakeAt
)
