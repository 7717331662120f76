"""What the router's core wants: messages to instances, ends of sequences, and effects on instances, in order."""

import enum

import msgspec
from msgspec import structs

from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.messages import KvOffer, LinkFigure, Pulled
from disagg.base.request import Role
from disagg.scheduling.dispatch.actions import (
    Degrade,
    Deliver,
    Drained,
    Fail,
    Finish,
    PathChosen,
    PathEnded,
    Refuse,
    Resume,
    SendAbort,
    SendAdopt,
    SendGenerate,
    SendLend,
    SendMigrate,
    SendPart,
    SendRelease,
)
from disagg.scheduling.dispatch.events import ChangeRole, Drain
from disagg.scheduling.dispatch.tenant_shares import TenantShare
from disagg.scheduling.dispatch.workload_report import WorkloadReport
from disagg.scheduling.replan.placements import RoleCounts
from disagg.scheduling.replan.question import PlanQuestion
from disagg.scheduling.step.actions import WakeAt


class RouterOutput(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of the core's own outputs: the tag is the class name."""


class SendOffer(RouterOutput, frozen=True, kw_only=True):
    """Let ``instance`` continue the sequence whose KV blocks are offered."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId
    offer: KvOffer

    @classmethod
    def of(cls, adopt: SendAdopt, offer: KvOffer) -> "SendOffer":
        """Return what passes on the offer that dispatch's action is about."""
        told = structs.replace(offer, answer_age_s=adopt.answer_age_s, num_later_tokens=adopt.num_later_tokens)
        return cls(request_id=adopt.request_id, epoch=adopt.epoch, instance=adopt.instance, offer=told)


class SendPartOffer(RouterOutput, frozen=True, kw_only=True):
    """Let ``instance`` read these KV blocks of a sequence that another one is still prefilling."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId
    offer: KvOffer
    is_first: bool

    @classmethod
    def of(cls, part: SendPart, offer: KvOffer) -> "SendPartOffer":
        """Return what passes on the part of dispatch's action."""
        return cls(
            request_id=part.request_id,
            epoch=part.epoch,
            instance=part.instance,
            offer=offer,
            is_first=part.is_first,
        )


class SendWithPrefix(RouterOutput, frozen=True, kw_only=True):
    """Let ``instance`` compute the sequence from the KV blocks on that another instance lends of its beginning."""

    request_id: RequestId
    epoch: Epoch
    instance: InstanceId
    hand_over: bool
    prefix: KvOffer

    @classmethod
    def of(cls, start: SendGenerate, prefix: KvOffer) -> "SendWithPrefix":
        """Return what lends the start of dispatch's action its prefix."""
        return cls(
            request_id=start.request_id,
            epoch=start.epoch,
            instance=start.instance,
            hand_over=start.hand_over,
            prefix=prefix,
        )


class TellPeerLost(RouterOutput, frozen=True, kw_only=True):
    """Tell ``instance`` that this life of ``lost`` has ended."""

    instance: InstanceId
    lost: InstanceId
    incarnation: str


class AskForBlocks(RouterOutput, frozen=True, kw_only=True):
    """Let ``instance`` say anew which KV blocks it holds."""

    instance: InstanceId


class AskToMeasure(RouterOutput, frozen=True, kw_only=True):
    """Let ``instance`` measure how fast it reads the pool of this life of ``source``, at this address."""

    instance: InstanceId
    source: InstanceId
    incarnation: str
    pool: bytes
    access: bytes


class LinkFound(RouterOutput, frozen=True, kw_only=True):
    """A link was measured; ``warning`` says what is wrong with it, ``refusal`` why that cannot be accepted."""

    source: InstanceId
    target: InstanceId
    figure: LinkFigure
    warning: str = ""
    refusal: str = ""


class DropReason(enum.Enum):
    """Why a message of an instance was not used."""

    STALE = "stale"
    """About a sequence that ended, is held elsewhere, or is in a later attempt; or from an instance declared lost."""
    MALFORMED = "malformed"
    """Not a message of this protocol, or one that cannot be."""


class MessageDropped(RouterOutput, frozen=True, kw_only=True):
    """Count a message of an instance that was not used."""

    instance: InstanceId
    reason: DropReason


class HandOverEnded(RouterOutput, frozen=True, kw_only=True):
    """Count a hand-over: ``target`` pulled KV blocks from ``source``, or did not; then ``failure`` says why."""

    source: InstanceId
    target: InstanceId
    num_bytes: int
    duration_s: float
    failure: str
    link: str = ""
    num_repeated: int = 0

    @classmethod
    def of(cls, message: Pulled, target: InstanceId) -> "HandOverEnded":
        """Return what the message of the instance that pulled says."""
        return cls(
            source=message.source,
            target=target,
            num_bytes=message.num_bytes,
            duration_s=message.duration_s,
            failure=message.failure,
            link=message.link,
            num_repeated=message.num_repeated,
        )


class InstanceWelcomed(RouterOutput, frozen=True, kw_only=True):
    """The instance takes requests from now on."""

    instance: InstanceId


class InstanceLost(RouterOutput, frozen=True, kw_only=True):
    """An instance that took requests died, or is treated as if it had."""

    instance: InstanceId


class EndInstance(RouterOutput, frozen=True, kw_only=True):
    """The instance is silent, unreachable or talks nonsense: end its process."""

    instance: InstanceId
    why: str


class RestartInstance(RouterOutput, frozen=True, kw_only=True):
    """Start a new process of the instance after ``delay_s``."""

    instance: InstanceId
    delay_s: float


class GiveUpInstance(RouterOutput, frozen=True, kw_only=True):
    """Do not start the instance again. ``nothing_left`` when no request can be served without it."""

    instance: InstanceId
    nothing_left: bool = False


class StopInstance(RouterOutput, frozen=True, kw_only=True):
    """The instance is to leave and holds nothing any more: let its process end, and say when it has."""

    instance: InstanceId


class InstanceLeft(RouterOutput, frozen=True, kw_only=True):
    """The instance does not belong to the deployment any more."""

    instance: InstanceId


class AddInstance(RouterOutput, frozen=True, kw_only=True):
    """Start one more instance of a role, and let it join."""

    role: Role


class ScalingDecided(RouterOutput, frozen=True, kw_only=True):
    """Instead of ``count`` instances of a role there are to be ``wanted``. Attainments are predicted; None: unknown."""

    role: Role
    count: int
    wanted: int
    attainment: float | None = None
    attainment_then: float | None = None

    @property
    def words(self) -> str:
        """What was decided and why, for people."""
        change = f"{self.count} -> {self.wanted} {self.role.value} instances"
        if self.attainment is None or self.attainment_then is None:
            return f"{change}, to be within the range"
        return f"{change}: predicted attainment {self.attainment:.0%} -> {self.attainment_then:.0%}"


class ReportWorkload(RouterOutput, frozen=True, kw_only=True):
    """Tell the keeper of the fleet what has come here since the last time."""

    report: WorkloadReport


class ReportTenants(RouterOutput, frozen=True, kw_only=True):
    """Tell the other routers what is here of each tenant."""

    shares: tuple[TenantShare, ...]


class ChangeWanted(RouterOutput, frozen=True, kw_only=True):
    """Let this be done here and in the routers that follow; what cannot be done now is decided anew another time."""

    command: Drain | ChangeRole


class AskForPlan(RouterOutput, frozen=True, kw_only=True):
    """The workload has moved, or nothing was known of it: let a planner answer this question."""

    why: str
    question: PlanQuestion


class PlanDecided(RouterOutput, frozen=True, kw_only=True):
    """What was made of a planner's answer.

    Of ``num_placements`` that can be reached, ``best`` is predicted to keep ``best_attainment`` of the next
    ``num_requests``, its change included, and the present one ``attainment``. ``pays``: that is gain enough; ``acts``:
    the placement is changed.
    """

    why: str
    present: RoleCounts
    best: RoleCounts
    attainment: float
    best_attainment: float
    num_requests: int
    num_placements: int
    pays: bool
    acts: bool

    @property
    def words(self) -> str:
        """What was decided and why, for people."""
        predicted = f"attainment {self.attainment:.1%} with {self.present}"
        if self.pays:
            verb = "changing" if self.acts else "it would pay to change"
            what = f"{verb} to {self.best}: {predicted}, {self.best_attainment:.1%} with the other, the change included"
        else:
            what = f"staying: {predicted}, at best {self.best_attainment:.1%} with {self.best}"
        tried = f"{self.num_placements} placements, {self.num_requests} requests each"
        return f"{what} ({tried}); what moved: {self.why}"


PassedOn = Deliver | Refuse | Degrade | PathChosen | PathEnded | SendLend | SendAbort | SendRelease | SendMigrate
"""What dispatch wants and is passed on as it is."""

AnySend = (
    SendGenerate
    | SendWithPrefix
    | SendOffer
    | SendPartOffer
    | SendLend
    | SendAbort
    | SendRelease
    | SendMigrate
    | TellPeerLost
    | AskForBlocks
    | AskToMeasure
)
"""What becomes a message to an instance."""

AnyRouterOutput = (
    Deliver
    | Finish
    | Fail
    | Refuse
    | Degrade
    | PathChosen
    | PathEnded
    | Resume
    | AnySend
    | MessageDropped
    | HandOverEnded
    | LinkFound
    | InstanceWelcomed
    | InstanceLost
    | EndInstance
    | RestartInstance
    | GiveUpInstance
    | StopInstance
    | InstanceLeft
    | AddInstance
    | ReportWorkload
    | ReportTenants
    | ChangeWanted
    | ScalingDecided
    | AskForPlan
    | PlanDecided
    | Drained
    | WakeAt
)
