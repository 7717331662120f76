"""What the process that keeps a fleet and its routers' processes say to each other, over a socket.

Messages are msgspec tagged structs in MessagePack, each after its length (4 bytes, big endian). Both ends may be of
different versions for a while, as routers are started anew with new code: ``RouterUp`` says which one it is.
"""

import msgspec

from disagg.base.errors import ProtocolError
from disagg.base.ids import InstanceId, RouterId
from disagg.base.message_fields import Count, Message, Name, Seconds, Words
from disagg.base.messages import decode_message
from disagg.base.request import Role
from disagg.scheduling.dispatch.events import ChangeRole, Drain, ProcessStarting, Undrain
from disagg.scheduling.dispatch.tenant_shares import TenantShare
from disagg.scheduling.dispatch.workload_report import WorkloadReport
from disagg.scheduling.router.elastic_view import ElasticView
from disagg.scheduling.router.inputs import AnyCommand, MeasureLinks, ProcessExited
from disagg.scheduling.router.outputs import AddInstance
from disagg.serve.launch.deployment import Deployment

FLEET_VERSION = 4


class RouterTask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a router's process is told on stdin. ``listener`` and ``pipe`` are descriptors that it inherits."""

    deployment: Deployment
    name: RouterId
    endpoint: str
    """Where it is to listen for instances of this host."""
    outside_endpoint: str = ""
    """Where for those of other hosts; empty where none joins."""
    control_key: str
    listener: int
    pipe: int
    parent_pid: int
    log_level: int


# From the fleet's keeper --------------------------------------------------------------------------------------------


class RosterEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One instance as it is now."""

    instance: InstanceId
    started_as: Role
    role: Role
    is_cordoned: bool
    is_ready: bool
    is_outside: bool
    """It is on another host."""


class Roster(Message, frozen=True, kw_only=True):
    """The instances that there are: the first message to a router."""

    instances: tuple[RosterEntry, ...]


class FleetChanged(Message, frozen=True, kw_only=True):
    """What became of an instance, or is to become of it. Whether it can be was decided already."""

    change: ProcessStarting | ProcessExited | AnyCommand
    is_outside: bool = False
    """The instance is on another host."""


class CommandAnswered(Message, frozen=True, kw_only=True):
    """What came of a command; ``error`` says why it cannot be carried out."""

    number: Count
    instance: InstanceId = InstanceId("")
    words: Words = ""
    error: Words = ""


class GiveMetrics(Message, frozen=True, kw_only=True):
    """Say what you have counted."""

    number: Count


class AllMetrics(Message, frozen=True, kw_only=True):
    """What all routers have counted, in Prometheus' text format."""

    number: Count
    text: bytes


class FleetChanges(Message, frozen=True, kw_only=True):
    """How the fleet changes by itself: what was seen and decided last."""

    view: ElasticView


class TenantsElsewhere(Message, frozen=True, kw_only=True):
    """What another router has of each tenant, as it told; nothing when it is gone."""

    router: RouterId
    shares: tuple[TenantShare, ...]


class Retire(Message, frozen=True, kw_only=True):
    """Take no more connections, finish what is under way within ``timeout_s``, and end.

    ``is_restart``: another router of the server takes the place; else the server ends.
    """

    timeout_s: Seconds
    is_restart: bool


class RestartRouters(Message, frozen=True, kw_only=True):
    """An operator wants the routers to be started anew."""


AnyOrder = Drain | Undrain | ChangeRole | AddInstance | MeasureLinks | RestartRouters

# From a router ------------------------------------------------------------------------------------------------------


class RouterUp(Message, frozen=True, kw_only=True):
    """The process runs; ``protocol`` is what it speaks with instances, ``fleet`` what it speaks here."""

    protocol: Count
    fleet: Count


class RouterListening(Message, frozen=True, kw_only=True):
    """Instances can connect, those of other hosts at ``outside_port`` where that is not 0."""

    outside_port: Count = 0


class RouterServing(Message, frozen=True, kw_only=True):
    """Clients are answered."""


class CommandGiven(Message, frozen=True, kw_only=True):
    """An operator wants something of the fleet."""

    number: Count
    command: AnyOrder


class InstanceFaulty(Message, frozen=True, kw_only=True):
    """That life of an instance talks nonsense, or cannot be reached: end it."""

    instance: InstanceId
    incarnation: Name
    why: Words


class InstanceDrained(Message, frozen=True, kw_only=True):
    """A draining instance holds nothing of this router's any more."""

    instance: InstanceId


class MetricsWanted(Message, frozen=True, kw_only=True):
    """Somebody scrapes: say what all routers have counted."""

    number: Count


class MetricsGiven(Message, frozen=True, kw_only=True):
    """What this router has counted, and what the instances have told it of themselves."""

    number: Count
    text: bytes
    of_instances: bytes


class WorkloadTold(Message, frozen=True, kw_only=True):
    """What has come to this router since it told last."""

    report: WorkloadReport


class TenantsTold(Message, frozen=True, kw_only=True):
    """What this router has of each tenant, for the others."""

    shares: tuple[TenantShare, ...]


class SignOfLife(Message, frozen=True, kw_only=True):
    """The process is not stuck."""


ToRouterProcess = (
    Roster | FleetChanged | CommandAnswered | GiveMetrics | AllMetrics | FleetChanges | TenantsElsewhere | Retire
)
ToFleet = (
    RouterUp
    | RouterListening
    | RouterServing
    | CommandGiven
    | InstanceFaulty
    | InstanceDrained
    | MetricsWanted
    | MetricsGiven
    | WorkloadTold
    | TenantsTold
    | SignOfLife
)

_to_router: msgspec.msgpack.Decoder[ToRouterProcess] = msgspec.msgpack.Decoder(ToRouterProcess)
_to_fleet: msgspec.msgpack.Decoder[ToFleet] = msgspec.msgpack.Decoder(ToFleet)


def decode_for_router_process(data: bytes) -> ToRouterProcess:
    """Decode what the fleet's keeper sent; raise ProtocolError on anything else."""
    return decode_message(data, _to_router, "message to a router's process")


def decode_for_fleet(data: bytes) -> ToFleet:
    """Decode what a router's process sent; raise ProtocolError on anything else."""
    return decode_message(data, _to_fleet, "message to the fleet's keeper")


def check_version(up: RouterUp, protocol: int) -> None:
    """Raise ProtocolError for a router of code that cannot speak with this fleet."""
    if (up.protocol, up.fleet) != (protocol, FLEET_VERSION):
        raise ProtocolError(
            f"the new router speaks protocol {up.protocol}.{up.fleet}, the fleet that runs {protocol}.{FLEET_VERSION}: "
            "stop the server and start it whole"
        )
