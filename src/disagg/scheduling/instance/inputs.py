"""What an instance's core is told: messages of the router, without token values, and how its effects ended."""

import msgspec

from disagg.base.ids import BlockHash, Epoch, RequestId
from disagg.base.messages import Abort, AuditBlocks, KvOffer, Lend, Migrate, MoreKv, PeerLost, Release, ReportBlocks
from disagg.base.objectives import Objectives
from disagg.base.router_messages import LeaveRouter
from disagg.scheduling.step.events import BlockSaved, StepDone, Tick, TierRead


class SequenceFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What policy knows of a sequence to compute: no token, only how many and which KV blocks they would fill.

    ``fault`` says why whoever sees the tokens cannot compute them; empty where it can.
    """

    request_id: RequestId
    epoch: Epoch
    num_tokens: int
    """Known: prompt, and earlier output."""
    max_total_tokens: int
    priority: int = 0
    arrival_s: float = 0.0
    block_hashes: tuple[BlockHash, ...] = ()
    reuse_prefix: bool = True
    """False when every prompt position must be computed."""
    objectives: Objectives = Objectives()
    """What is missing here is as the instance's settings say."""
    fault: str = ""


class InstanceInput(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of the core's own inputs: the tag is the class name."""


class Start(InstanceInput, frozen=True, kw_only=True):
    """Compute a sequence. With ``hand_over``, stop after the first token and offer the KV blocks.

    Another instance lends the KV blocks of ``prefix``, its first tokens.
    """

    sequence: SequenceFacts
    hand_over: bool = False
    prefix: KvOffer | None = None


class Continue(InstanceInput, frozen=True, kw_only=True):
    """Go on with a sequence whose KV blocks another instance offers."""

    sequence: SequenceFacts
    offer: KvOffer


class Expect(InstanceInput, frozen=True, kw_only=True):
    """Make room for a sequence that another instance still computes, and read the first of its KV blocks."""

    sequence: SequenceFacts
    offer: KvOffer


class CopyEnded(InstanceInput, frozen=True, kw_only=True):
    """The copying of KV blocks ended. ``failure`` is empty when all are there.

    Nothing is written any more, unless it ``may_still_write``: then CopySettled comes when that is over.
    """

    request_id: RequestId
    epoch: Epoch
    num_bytes: int
    started_s: float
    ended_s: float
    failure: str = ""
    link: str = ""
    """What carried the blocks."""
    num_repeated: int = 0
    """Blocks that came with another digest and were copied again."""
    may_still_write: bool = False
    digests: bytes | None = None
    """Of the blocks as they came, where they were read behind a step, before they were offered for good."""


class CopySettled(InstanceInput, frozen=True, kw_only=True):
    """A failed copy that might still write does so no more."""

    request_id: RequestId
    epoch: Epoch


class LoadEnded(InstanceInput, frozen=True, kw_only=True):
    """The reading of blocks from tiers ended: none is written to any more."""

    request_id: RequestId
    epoch: Epoch
    reads: tuple[TierRead, ...]

    @property
    def is_whole(self) -> bool:
        """True when every block was there."""
        return not any(read.unreadable for read in self.reads)


AnyInstanceInput = (
    Start
    | Continue
    | Expect
    | MoreKv
    | Lend
    | Abort
    | Release
    | Migrate
    | PeerLost
    | LeaveRouter
    | ReportBlocks
    | AuditBlocks
    | StepDone
    | CopyEnded
    | CopySettled
    | LoadEnded
    | BlockSaved
    | Tick
)
