"""What the router knows about each instance: its state, its last sign of life, and what it said about itself."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from disagg.base.ids import InstanceId
from disagg.base.messages import PROTOCOL_VERSION, InstanceFacts, InstanceLoad, Ready
from disagg.base.request import Role
from disagg.serve.router.interface import InstanceState, InstanceStatus


class InstanceWatcher(Protocol):
    """Who starts and shows instances. No method may block or raise."""

    def instance_loading(self, instance: InstanceId, stage: str, fraction: float) -> None:
        """A starting instance got this far; ``fraction`` from 0 to 1."""

    def instance_ready(self, instance: InstanceId, facts: InstanceFacts) -> None:
        """The instance takes requests."""

    def instance_faulty(self, instance: InstanceId, why: str) -> None:
        """The instance is silent or talks nonsense: end it, and start it again."""


class NullWatcher:
    """An InstanceWatcher for a router whose instances nobody manages."""

    def instance_loading(self, instance: InstanceId, stage: str, fraction: float) -> None:
        """See InstanceWatcher."""

    def instance_ready(self, instance: InstanceId, facts: InstanceFacts) -> None:
        """See InstanceWatcher."""

    def instance_faulty(self, instance: InstanceId, why: str) -> None:
        """See InstanceWatcher."""


@dataclass(slots=True)
class KnownInstance:
    """One configured instance. ``incarnation`` is that of its current or last life."""

    instance: InstanceId
    role: Role
    last_seen_s: float
    state: InstanceState = InstanceState.STARTING
    incarnation: str = ""
    facts: InstanceFacts | None = None
    load: InstanceLoad = field(default_factory=InstanceLoad)
    num_restarts: int = 0
    num_malformed: int = 0
    detail: str = ""

    @property
    def is_ready(self) -> bool:
        """True when it takes requests."""
        return self.state is InstanceState.READY

    def set_starting(self, now: float) -> None:
        """A new process of it is about to be started."""
        self.state = InstanceState.STARTING
        self.last_seen_s = now
        self.num_malformed = 0
        self.detail = "starting"

    def set_ready(self, message: Ready) -> None:
        """It takes requests."""
        self.state = InstanceState.READY
        self.incarnation = message.incarnation
        self.facts = message.facts
        self.load = InstanceLoad()
        self.detail = ""

    def set_lost(self, detail: str) -> None:
        """It died, or is treated as if it had."""
        self.state = InstanceState.LOST
        self.load = InstanceLoad()
        self.detail = detail

    def why_unfit(self, message: Ready) -> str:
        """Return why this Ready cannot be accepted, or an empty string."""
        if message.version != PROTOCOL_VERSION:
            return f"speaks protocol version {message.version}, this server {PROTOCOL_VERSION}"
        if (message.instance, message.role) != (self.instance, self.role):
            return f"says that it is {message.instance} for {message.role.value}, not {self.role.value}"
        return ""

    def status(self) -> InstanceStatus:
        """Return what others may see."""
        return InstanceStatus(
            instance=self.instance,
            role=self.role,
            state=self.state,
            facts=self.facts,
            load=self.load,
            num_restarts=self.num_restarts,
            detail=self.detail,
        )


class InstanceTable:
    """All configured instances, in the order of configuration."""

    def __init__(self, instances: Mapping[InstanceId, Role], now: float) -> None:
        self._instances = {name: KnownInstance(name, role, now) for name, role in instances.items()}

    def __iter__(self) -> Iterator[KnownInstance]:
        return iter(self._instances.values())

    def __getitem__(self, instance: InstanceId) -> KnownInstance:
        return self._instances[instance]

    def get(self, instance: InstanceId) -> KnownInstance | None:
        """Return the instance, or None for a name that is not configured."""
        return self._instances.get(instance)

    def has_path(self) -> bool:
        """True when a prefill and a decode instance are ready, or a colocated one."""
        ready = {known.role for known in self if known.is_ready}
        return Role.COLOCATED in ready or {Role.PREFILL, Role.DECODE} <= ready

    def silent(self, now: float, timeout_s: float, start_timeout_s: float) -> list[tuple[KnownInstance, str]]:
        """Return the instances without a sign of life for too long, each with the reason in words."""
        limits = {InstanceState.READY: timeout_s, InstanceState.STARTING: start_timeout_s}
        found = []
        for known in self:
            limit = limits.get(known.state)
            if limit is not None and now - known.last_seen_s > limit:
                while_loading = f" while {known.detail}" if known.state is InstanceState.STARTING else ""
                found.append((known, f"no sign of life for {limit:g} s{while_loading}"))
        return found
