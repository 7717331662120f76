"""What happens to a step scheduler. Each event is data, so that a log of them can be saved and replayed."""

import msgspec

from disagg.base.ids import BlockHash, BlockId, Epoch, InstanceId, RequestId
from disagg.base.kv_events import Medium
from disagg.base.messages import FailureKind
from disagg.base.objectives import Objectives
from disagg.base.sampling import FinishReason


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all events: the tag is the class name."""


class LentKv(msgspec.Struct, frozen=True, array_like=True):
    """The first ``num_tokens`` tokens of a sequence are in ``source_blocks`` of ``source``, until ``expires_s``.

    See ``KvOffer`` for their order.
    """

    source: InstanceId
    source_blocks: tuple[BlockId, ...]
    num_tokens: int
    expires_s: float


class Arrived(Event, frozen=True, kw_only=True):
    """A sequence to compute here. With ``hand_over`` its KV blocks are offered after the first sampled token.

    ``num_tokens`` are known (prompt, and earlier output of a resumed sequence); it never grows past
    ``max_total_tokens``. ``reuse_prefix`` is False when every prompt position must be computed (prompt logprobs).
    """

    request_id: RequestId
    epoch: Epoch
    num_tokens: int
    max_total_tokens: int
    priority: int = 0
    arrival_s: float = 0.0
    hand_over: bool = False
    block_hashes: tuple[BlockHash, ...] = ()
    reuse_prefix: bool = True
    prefix: LentKv | None = None
    objectives: Objectives = Objectives()
    """What is missing here is as the settings say."""


class KvOffered(Event, frozen=True, kw_only=True):
    """A sequence to continue here, whose first ``num_kv_tokens`` tokens are in ``source_blocks`` of ``source``.

    Unless it ``is_whole``, that instance is still computing: more comes as ``KvExtended``, and then all of it whole.
    With ``behind_step`` that step of it is still writing them. ``is_sound`` says of a whole offer that what was read
    behind such a step, if anything was, is what is offered now. Of that one the first token came ``answer_age_s`` ago
    at most, and ``num_later_tokens`` after it.
    """

    request_id: RequestId
    epoch: Epoch
    num_tokens: int
    max_total_tokens: int
    source: InstanceId
    source_blocks: tuple[BlockId, ...]
    num_kv_tokens: int
    expires_s: float
    priority: int = 0
    arrival_s: float = 0.0
    block_hashes: tuple[BlockHash, ...] = ()
    objectives: Objectives = Objectives()
    """What is missing here is as the settings say."""
    is_whole: bool = True
    behind_step: int = 0
    is_sound: bool = True
    answer_age_s: float = 0.0
    num_later_tokens: int = 0


class KvExtended(Event, frozen=True, kw_only=True):
    """More blocks of a sequence that is being computed elsewhere can be read, from its ``first_block`` on.

    They end with its first ``num_kv_tokens`` tokens. With ``behind_step`` that step is still writing them.
    """

    request_id: RequestId
    epoch: Epoch
    first_block: int
    source_blocks: tuple[BlockId, ...]
    num_kv_tokens: int
    expires_s: float
    behind_step: int = 0


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """One sampled token of one sequence; ``finished`` when it is the last.

    ``block_hashes`` name the KV blocks that the known tokens fill now and did not before.
    """

    request_id: RequestId
    finished: FinishReason | None = None
    block_hashes: tuple[BlockHash, ...] = ()


class StepFailure(msgspec.Struct, frozen=True, array_like=True):
    """Why one sequence of a step could not be computed: a fault of its own, which is no other sequence's."""

    request_id: RequestId
    kind: FailureKind
    message: str


class StepDone(Event, frozen=True, kw_only=True):
    """A step ended, with a token for each chunk of it that samples.

    ``results`` has those tokens of which there is more to say: that they are the last, or fill a KV block.
    Sequences in ``failed`` could not be computed: they have no result and end here, and their KV is not to be trusted.
    ``duration_s`` is what the step took to compute; 0 where nobody measured it. ``borrowed_s`` is the time of other
    instances' cores that went into it.
    """

    step_id: int
    results: tuple[StepResult, ...]
    failed: tuple[StepFailure, ...] = ()
    duration_s: float = 0.0
    borrowed_s: float = 0.0


class TransferDone(Event, frozen=True, kw_only=True):
    """The pull of a sequence's KV blocks is complete and checked."""

    request_id: RequestId
    epoch: Epoch


class TransferFailed(Event, frozen=True, kw_only=True):
    """The pull failed. Unless ``ended``, bytes may still arrive: the blocks stay quarantined until TransferEnded."""

    request_id: RequestId
    epoch: Epoch
    ended: bool = True


class TransferEnded(Event, frozen=True, kw_only=True):
    """A failed or cancelled pull is known to write no more."""

    request_id: RequestId
    epoch: Epoch


class KvWanted(Event, frozen=True, kw_only=True):
    """Another instance, which computes this sequence, wants to read the cached blocks of these names."""

    request_id: RequestId
    epoch: Epoch
    block_hashes: tuple[BlockHash, ...]


class LeaseReleased(Event, frozen=True, kw_only=True):
    """The other side has read the offered blocks, or never will."""

    request_id: RequestId
    epoch: Epoch


class MigrationAsked(Event, frozen=True, kw_only=True):
    """Another instance is to go on with the sequence: its KV blocks are offered after its next token."""

    request_id: RequestId
    epoch: Epoch


class SourceLost(Event, frozen=True, kw_only=True):
    """An instance died: offers from it that are not being pulled yet can no longer be."""

    instance: InstanceId


class BlockSaved(Event, frozen=True, kw_only=True):
    """A block was written to a tier; it is not there when ``failure`` says why."""

    name: BlockHash
    medium: Medium = Medium.DISK
    failure: str = ""


class TierRead(msgspec.Struct, frozen=True, array_like=True):
    """What a read had of one tier. What is there under the names ``unreadable`` is torn, foreign or gone.

    ``duration_s`` is what it took without waiting for others; 0 where nobody measured it.
    """

    medium: Medium
    num_blocks: int
    duration_s: float = 0.0
    unreadable: tuple[BlockHash, ...] = ()


class BlocksRead(Event, frozen=True, kw_only=True):
    """A sequence's blocks were read from tiers."""

    reads: tuple[TierRead, ...]


class Cancelled(Event, frozen=True, kw_only=True):
    """Nobody wants this sequence any more."""

    request_id: RequestId
    epoch: Epoch


class Tick(Event, frozen=True, kw_only=True):
    """Time passed: a WakeAt came due."""


AnyEvent = (
    Arrived
    | KvOffered
    | KvExtended
    | StepDone
    | TransferDone
    | TransferFailed
    | TransferEnded
    | KvWanted
    | LeaseReleased
    | MigrationAsked
    | SourceLost
    | BlockSaved
    | BlocksRead
    | Cancelled
    | Tick
)
