"""What the dispatcher wants done. The shell (live router or simulator) carries actions out in order.

Every sequence that arrived gets exactly one of ``Finish``, ``Fail`` and ``Refuse``, and nothing after it. What is said
about a sequence carries its epoch, which ``Resume`` raises.
"""

import enum

import msgspec

from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.scheduling.dispatch.forecast import Forecast, Path
from disagg.scheduling.step.actions import WakeAt


class DispatchAction(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all actions: the tag is the class name."""


class SendGenerate(DispatchAction, frozen=True, kw_only=True):
    """Let ``instance`` compute the sequence; with ``hand_over`` up to its first token.

    ``with_prefix``: from the KV blocks on that were offered of its beginning.
    """

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId
    hand_over: bool
    with_prefix: bool = False


class SendLend(DispatchAction, frozen=True, kw_only=True):
    """Let ``instance`` lend what it has cached of the sequence's beginning."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId


class SendAdopt(DispatchAction, frozen=True, kw_only=True):
    """Let ``instance`` continue the sequence whose KV blocks were offered.

    Its first token came ``answer_age_s`` ago, and ``num_later_tokens`` after it.
    """

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId
    answer_age_s: float = 0.0
    num_later_tokens: int = 0


class SendPart(DispatchAction, frozen=True, kw_only=True):
    """Let ``instance`` read KV blocks of a sequence that is still being prefilled, the ``is_first`` or more of them."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId
    is_first: bool


class SendAbort(DispatchAction, frozen=True, kw_only=True):
    """Let ``instance`` forget the sequence that it computes."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId


class SendRelease(DispatchAction, frozen=True, kw_only=True):
    """Let ``instance`` end the lease of the sequence's KV blocks."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId


class SendMigrate(DispatchAction, frozen=True, kw_only=True):
    """Let ``instance`` offer the KV blocks of a running sequence after its next token."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId


class SendPeerLost(DispatchAction, frozen=True, kw_only=True):
    """Tell ``instance`` that ``lost`` died."""

    instance: InstanceId
    lost: InstanceId


class Deliver(DispatchAction, frozen=True, kw_only=True):
    """The outputs of these sequences, in the event just handled, are current: pass them on."""

    request_ids: tuple[RequestId, ...]


class Drop(DispatchAction, frozen=True, kw_only=True):
    """What ``instance`` said about this sequence is out of date (it ended, or is held elsewhere): count it."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId


class Finish(DispatchAction, frozen=True, kw_only=True):
    """The sequence ended well, or was cancelled: drop its record."""

    request_id: RequestId
    epoch: Epoch


class Resume(DispatchAction, frozen=True, kw_only=True):
    """The sequence starts again elsewhere from the delivered tokens on; ``epoch`` is its attempt now."""

    request_id: RequestId
    epoch: Epoch
    why: str


class Drained(DispatchAction, frozen=True, kw_only=True):
    """``instance``, which was draining, holds nothing any more: it can leave, or change its role."""

    instance: InstanceId


class PathChosen(DispatchAction, frozen=True, kw_only=True):
    """Predictions decided where the sequence goes, ``waited_s`` after its arrival. ``other``: the best one left out."""

    request_id: RequestId
    epoch: Epoch
    chosen: Forecast
    other: Forecast | None
    waited_s: float


class PathEnded(DispatchAction, frozen=True, kw_only=True):
    """A sequence that went the way it was given has its last token: predictions beside what came.

    TTFT from the arrival; TPOT None for an answer of one token. The regrets: what came, less what was predicted of the
    best path that was left out; None without one.
    """

    request_id: RequestId
    epoch: Epoch
    path: Path
    follows_roles: bool
    num_prompt_tokens: int
    predicted_ttft_s: float
    ttft_s: float
    predicted_tpot_s: float
    tpot_s: float | None = None
    predicted_hand_over_s: float = 0.0
    hand_over_s: float | None = None
    """None where nothing was handed over, or the blocks did not arrive."""
    ttft_regret_s: float | None = None
    tpot_regret_s: float | None = None


class FailReason(enum.Enum):
    """Why a sequence ended without an answer, or with part of one."""

    INSTANCE_LOST = "instance_lost"
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    TOO_LONG = "too_long"
    INVALID = "invalid"
    INTERNAL = "internal"


class Fail(DispatchAction, frozen=True, kw_only=True):
    """The sequence ended with an error: tell who waits for it and drop its record."""

    request_id: RequestId
    epoch: Epoch
    reason: FailReason
    detail: str


class Degrade(DispatchAction, frozen=True, kw_only=True):
    """The sequence is predicted to miss its objectives, and has none any more: whoever computes it is told so."""

    request_id: RequestId
    epoch: Epoch
    why: str


class RefuseReason(enum.Enum):
    """Why a sequence was not taken."""

    OVERLOADED = "overloaded"
    SHED = "shed"
    """It was predicted to miss its objectives."""
    UNAVAILABLE = "unavailable"


class Refuse(DispatchAction, frozen=True, kw_only=True):
    """The sequence was not taken; nothing of it is kept."""

    request_id: RequestId
    epoch: Epoch
    reason: RefuseReason
    detail: str
    retry_after_s: float = 1.0
    """When to try again."""
    tenant: str = ""
    priority: int = 0


AnyDispatchAction = (
    SendGenerate
    | SendLend
    | SendAdopt
    | SendPart
    | SendAbort
    | SendRelease
    | SendMigrate
    | SendPeerLost
    | Deliver
    | Drop
    | Degrade
    | PathChosen
    | PathEnded
    | Resume
    | Drained
    | Finish
    | Fail
    | Refuse
    | WakeAt
)
