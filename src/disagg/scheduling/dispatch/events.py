"""What happens to the dispatcher. Each event is data, so that a log of them can be saved and replayed.

No event carries token values: dispatch decides on lengths, order and who is alive.
"""

import msgspec

from disagg.base.ids import BlockHash, Epoch, InstanceId, RequestId
from disagg.base.messages import CostsLearned, Failed, FailureKind, KvOffer, NotHeld, Pulled
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.base.router_messages import ForeignLoad
from disagg.base.step_limits import StepLimits
from disagg.base.window_blocks import WindowBlocks
from disagg.scheduling.step.events import Tick


class DispatchEvent(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all events: the tag is the class name."""


class SequenceArrived(DispatchEvent, frozen=True, kw_only=True):
    """A sequence to serve: ``num_tokens`` are known, and it never grows past ``max_total_tokens``."""

    request_id: RequestId
    epoch: Epoch
    num_tokens: int
    max_total_tokens: int
    priority: int = 0
    """Lower is served earlier among those that wait."""
    tenant: str = ""
    """Who shares fairly with others of other names."""
    service_class: str = ""
    """Says what becomes of it when it is predicted to come too late; "": of none."""
    objectives: Objectives = Objectives()
    """What is missing here is as the server says."""
    block_hashes: tuple[BlockHash, ...] = ()
    """Names of the full KV blocks of its known tokens."""
    hash_block_size: int = 0
    """Tokens of each of those blocks."""
    prepared_s: float = 0.0
    """Seconds since it came, for reading and tokenising it: they count as waiting."""


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one sequence."""

    request_id: RequestId
    epoch: Epoch
    num_tokens: int
    finished: bool


class TokensEmitted(DispatchEvent, frozen=True, kw_only=True):
    """A step of ``instance`` brought new tokens.

    Of the answers that go on there ``num_untold`` tokens are told of in sum alone, until each is told of. A live
    instance tells of every one.
    """

    instance: InstanceId
    progress: tuple[Progress, ...]
    num_untold: int = 0


class OfferMade(DispatchEvent, frozen=True, kw_only=True):
    """``instance`` has prefilled a sequence and leases its KV blocks to whoever continues it."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId

    @classmethod
    def of(cls, offer: KvOffer) -> "OfferMade":
        """Return what the offer of an instance's own blocks means."""
        return cls(request_id=offer.request_id, epoch=offer.epoch, instance=offer.source)


class PartMade(DispatchEvent, frozen=True, kw_only=True):
    """``instance``, which is prefilling a sequence, has KV blocks of it that can be read; ``is_first``: none before."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId
    is_first: bool

    @classmethod
    def of(cls, offer: KvOffer) -> "PartMade":
        """Return what the offer of a part means, of an instance's own blocks."""
        is_first = offer.first_block == 0
        return cls(request_id=offer.request_id, epoch=offer.epoch, instance=offer.source, is_first=is_first)


class NothingLent(DispatchEvent, frozen=True, kw_only=True):
    """``instance`` has nothing cached any more of what it was to lend."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId

    @classmethod
    def of(cls, message: NotHeld, instance: InstanceId) -> "NothingLent":
        """Return what an instance's message means."""
        return cls(request_id=message.request_id, epoch=message.epoch, instance=instance)


class PullEnded(DispatchEvent, frozen=True, kw_only=True):
    """``instance`` has pulled the KV blocks of a sequence, or will never read them: the lease can end."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId
    duration_s: float | None = None
    """Of the copying; None where the blocks did not arrive."""

    @classmethod
    def of(cls, message: Pulled, instance: InstanceId) -> "PullEnded":
        """Return what an instance's message means."""
        duration_s = None if message.failure else max(0.0, message.duration_s - message.overlapped_s)
        return cls(request_id=message.request_id, epoch=message.epoch, instance=instance, duration_s=duration_s)


class SequenceFailed(DispatchEvent, frozen=True, kw_only=True):
    """``instance`` gave a sequence back."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId
    kind: FailureKind
    detail: str

    @classmethod
    def of(cls, message: Failed, instance: InstanceId) -> "SequenceFailed":
        """Return what an instance's message means."""
        return cls(
            request_id=message.request_id,
            epoch=message.epoch,
            instance=instance,
            kind=message.kind,
            detail=message.message,
        )


class SequenceCancelled(DispatchEvent, frozen=True, kw_only=True):
    """Nobody wants this sequence any more, in this attempt or in a later one."""

    request_id: RequestId
    epoch: Epoch


class Join(DispatchEvent, frozen=True, kw_only=True):
    """``instance`` is to belong to the deployment from now on; it is starting."""

    instance: InstanceId
    role: Role


class Drain(DispatchEvent, frozen=True, kw_only=True):
    """``instance`` is to get no new sequences and to give running answers to others; what nobody takes it finishes.

    With ``leave``, it does not belong to the deployment any more once it holds nothing. With ``force`` also where no
    new request could be served after it.
    """

    instance: InstanceId
    leave: bool = False
    force: bool = False


class Undrain(DispatchEvent, frozen=True, kw_only=True):
    """``instance``, which was draining, is to get sequences again."""

    instance: InstanceId


class Leave(DispatchEvent, frozen=True, kw_only=True):
    """``instance`` is not to belong to the deployment any more; what it still holds is lost."""

    instance: InstanceId


class ChangeRole(DispatchEvent, frozen=True, kw_only=True):
    """``instance`` is to be given sequences of another role. A prefill instance gives running answers to others; what
    nobody takes, and all else, goes on as it began.

    With ``force`` also where no request could be served after it.
    """

    instance: InstanceId
    role: Role
    force: bool = False


class ProcessStarting(DispatchEvent, frozen=True, kw_only=True):
    """A process of ``instance`` is about to start; it is given time to load."""

    instance: InstanceId


class InstanceUp(DispatchEvent, frozen=True, kw_only=True):
    """``instance`` takes sequences of up to ``max_total_tokens`` tokens."""

    instance: InstanceId
    max_total_tokens: int
    pool_tokens: int | None = None
    """Tokens of its KV pool, all layers of each; of layers with a ``window`` it does not hold them all."""
    window: WindowBlocks | None = None
    limits: StepLimits = StepLimits()


class InstanceDown(DispatchEvent, frozen=True, kw_only=True):
    """``instance`` died and forgot everything. ``returning`` when it is being restarted."""

    instance: InstanceId
    returning: bool
    detail: str


class CostsKnown(DispatchEvent, frozen=True, kw_only=True):
    """``lesson.instance`` has learned what its steps cost."""

    lesson: CostsLearned


class LinkKnown(DispatchEvent, frozen=True, kw_only=True):
    """How fast ``target`` reads KV blocks of ``source`` was measured: seconds of a read, and of each token in it."""

    source: InstanceId
    target: InstanceId
    latency_s: float
    token_s: float


class ForeignLoadKnown(DispatchEvent, frozen=True, kw_only=True):
    """An instance says what other routers have given to it."""

    instance: InstanceId
    load: ForeignLoad


AnyLesson = CostsKnown | LinkKnown | ForeignLoadKnown
AnyMemberEvent = Join | Drain | Undrain | Leave | ChangeRole | ProcessStarting | InstanceUp | InstanceDown | AnyLesson
AnyDispatchEvent = (
    SequenceArrived
    | TokensEmitted
    | OfferMade
    | PartMade
    | NothingLent
    | PullEnded
    | SequenceFailed
    | SequenceCancelled
    | AnyMemberEvent
    | Tick
)
