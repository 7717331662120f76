"""What the router's core is told: by clients, by instances, by whoever runs their processes, by an operator."""

import msgspec

from disagg.base.ids import InstanceId
from disagg.base.messages import Failed, Loading, LoadReport, Offered, Pulled, Ready
from disagg.base.request import Role
from disagg.scheduling.dispatch.events import SequenceArrived, SequenceCancelled, TokensEmitted
from disagg.scheduling.step.events import Tick


class RouterInput(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of the core's own inputs: the tag is the class name."""


class InstanceSaid(RouterInput, frozen=True, kw_only=True):
    """A message of an instance, but for tokens: those are ``TokensEmitted``."""

    instance: InstanceId
    message: Loading | Ready | Offered | Pulled | Failed | LoadReport


class MalformedMessage(RouterInput, frozen=True, kw_only=True):
    """What an instance sent is no message of this protocol, or one that cannot be."""

    instance: InstanceId
    error: str


class Unreachable(RouterInput, frozen=True, kw_only=True):
    """A message to the instance could not be sent."""

    instance: InstanceId
    why: str


class ProcessStarting(RouterInput, frozen=True, kw_only=True):
    """A process of the instance is about to start; it is given time to load."""

    instance: InstanceId


class ProcessExited(RouterInput, frozen=True, kw_only=True):
    """The instance's process is gone."""

    instance: InstanceId
    detail: str


class Join(RouterInput, frozen=True, kw_only=True):
    """An instance is to belong to the deployment."""

    instance: InstanceId
    role: Role


class Drain(RouterInput, frozen=True, kw_only=True):
    """An instance is to get nothing new and to finish what it holds."""

    instance: InstanceId


class Leave(RouterInput, frozen=True, kw_only=True):
    """An instance does not belong to the deployment any more."""

    instance: InstanceId


class ChangeRole(RouterInput, frozen=True, kw_only=True):
    """An instance is to be given sequences of another role."""

    instance: InstanceId
    role: Role


AnyRouterInput = (
    SequenceArrived
    | SequenceCancelled
    | TokensEmitted
    | InstanceSaid
    | MalformedMessage
    | Unreachable
    | ProcessStarting
    | ProcessExited
    | Join
    | Drain
    | Leave
    | ChangeRole
    | Tick
)
