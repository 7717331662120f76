"""What the router's core is told: by clients, by instances, by whoever runs their processes, by an operator."""

import msgspec

from disagg.base.ids import InstanceId, RouterId
from disagg.base.messages import (
    CostsLearned,
    Failed,
    KvEvents,
    LinkMeasured,
    Loading,
    LoadReport,
    NotHeld,
    Offered,
    PartOffered,
    Pulled,
    Ready,
)
from disagg.scheduling.dispatch.events import (
    ChangeRole,
    Drain,
    Join,
    Leave,
    ProcessStarting,
    SequenceArrived,
    SequenceCancelled,
    TokensEmitted,
    Undrain,
)
from disagg.scheduling.dispatch.tenant_shares import TenantShare
from disagg.scheduling.dispatch.workload_report import WorkloadReport
from disagg.scheduling.replan.question import PlanAnswer
from disagg.scheduling.step.events import Tick


class RouterInput(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of the core's own inputs: the tag is the class name."""


class InstanceSaid(RouterInput, frozen=True, kw_only=True):
    """A message of an instance, but for tokens: those are ``TokensEmitted``."""

    instance: InstanceId
    message: (
        Loading
        | Ready
        | Offered
        | PartOffered
        | NotHeld
        | Pulled
        | Failed
        | LoadReport
        | CostsLearned
        | LinkMeasured
        | KvEvents
    )


class MalformedMessage(RouterInput, frozen=True, kw_only=True):
    """What an instance sent is no message of this protocol, or one that cannot be."""

    instance: InstanceId
    error: str


class Unreachable(RouterInput, frozen=True, kw_only=True):
    """A message to the instance could not be sent."""

    instance: InstanceId
    why: str


class ProcessExited(RouterInput, frozen=True, kw_only=True):
    """The instance's process is gone.

    ``returns`` says whether it is started again, where that is decided elsewhere; None lets this core decide.
    """

    instance: InstanceId
    detail: str
    returns: bool | None = None


class MeasureLinks(RouterInput, frozen=True, kw_only=True):
    """An operator wants all links measured anew."""


class WorkloadReported(RouterInput, frozen=True, kw_only=True):
    """One of several routers says what has come to it."""

    router: RouterId
    report: WorkloadReport


class TenantsReported(RouterInput, frozen=True, kw_only=True):
    """Another router says what it has of each tenant; nothing of one that is gone."""

    router: RouterId
    shares: tuple[TenantShare, ...]


class Planned(RouterInput, frozen=True, kw_only=True):
    """The planner has answered the question that it was asked last."""

    answer: PlanAnswer


class PlanningFailed(RouterInput, frozen=True, kw_only=True):
    """The planner cannot answer the question that it was asked last."""

    why: str


AnyCommand = Join | Drain | Undrain | Leave | ChangeRole
"""What an operator, or whoever plans in her place, may want of the deployment."""
AnyRouterInput = (
    SequenceArrived
    | SequenceCancelled
    | TokensEmitted
    | InstanceSaid
    | MalformedMessage
    | Unreachable
    | ProcessStarting
    | ProcessExited
    | WorkloadReported
    | TenantsReported
    | Planned
    | PlanningFailed
    | AnyCommand
    | MeasureLinks
    | Tick
)
