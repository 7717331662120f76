"""Which instances belong to the deployment: their lives, their last signs of life, what they said about themselves."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from disagg.base.block_sizes import why_not_made
from disagg.base.config import RouterSettings
from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.base.message_fields import PROTOCOL_VERSION
from disagg.base.messages import InstanceFacts, InstanceLoad, Ready
from disagg.base.request import Role
from disagg.scheduling.capacity import serves_requests
from disagg.scheduling.dispatch.state import ALIVE, InstanceEntry, InstanceState
from disagg.scheduling.router.restart import RestartPolicy, RestartSettings

MAX_MALFORMED_MESSAGES: Final = 3
"""An instance that sent this many in one life is ended: it is broken, or of another version."""


@dataclass(slots=True)
class Member:
    """One instance. ``incarnation`` is that of its current or last life; its state and role are the dispatcher's."""

    entry: InstanceEntry
    last_seen_s: float
    restarts: RestartPolicy
    started_as: Role
    """The role that its process was told; it may be given sequences of another one since."""
    incarnation: str = ""
    facts: InstanceFacts | None = None
    load: InstanceLoad = field(default_factory=InstanceLoad)
    ready_since_s: float | None = None
    """Since when this life takes requests."""
    was_ready: bool = False
    num_restarts: int = 0
    num_malformed: int = 0
    is_leaving: bool = False
    """Its next end is its last: an operator removes it."""
    is_refused: bool = False
    """It does not do what is asked of one: it is not started again."""
    detail: str = ""

    @property
    def instance(self) -> InstanceId:
        """Its name."""
        return self.entry.instance

    @property
    def role(self) -> Role:
        """Which sequences it is given."""
        return self.entry.role

    @property
    def state(self) -> InstanceState:
        """Where it is in its life."""
        return self.entry.state

    @property
    def is_alive(self) -> bool:
        """True while it takes messages."""
        return self.entry.is_alive

    @property
    def tells_layout(self) -> bool:
        """True while it takes messages and has said what its KV blocks look like."""
        return self.facts is not None and bool(self.facts.kv_layout) and self.is_alive

    @property
    def is_readable(self) -> bool:
        """True while it takes messages and has a pool that others could read."""
        return self.facts is not None and bool(self.facts.pool) and self.is_alive

    def set_starting(self, now: float) -> None:
        """A new process of it is about to be started."""
        self.last_seen_s = now
        self.num_malformed = 0
        self.ready_since_s = None
        self.detail = "starting"

    def set_ready(self, message: Ready, now: float) -> None:
        """It takes requests."""
        self.incarnation = message.incarnation
        self.facts = message.facts
        self.load = InstanceLoad()
        self.ready_since_s = now
        self.was_ready = True
        self.detail = ""

    def die(self, now: float) -> float | None:
        """Note the end of its process; return in how many seconds it is started again, None for never."""
        self.num_restarts += 1
        if self.is_refused or not self.was_ready:
            return None
        return self.restarts.delay_s(None if self.ready_since_s is None else now - self.ready_since_s)

    def set_lost(self, detail: str) -> None:
        """It died, or is treated as if it had."""
        self.load = InstanceLoad()
        self.detail = detail

    def why_unfit(self, message: Ready) -> str:
        """Return why this Ready cannot be accepted, or an empty string."""
        if message.version != PROTOCOL_VERSION:
            return f"speaks protocol version {message.version}, this server {PROTOCOL_VERSION}"
        if (message.instance, message.role) != (self.instance, self.started_as):
            return f"says that it is {message.instance} for {message.role.value}, not {self.started_as.value}"
        return ""


class Membership:
    """The members, in the order in which they joined, and who of them has been silent for too long."""

    def __init__(self, settings: RouterSettings, restarts: RestartSettings) -> None:
        self._settings = settings
        self._restarts = restarts
        self._members: dict[InstanceId, Member] = {}
        self._check_interval_s = min(1.0, settings.instance_timeout_s / 4, settings.start_timeout_s / 4)
        self._next_check_s = math.inf

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __getitem__(self, instance: InstanceId) -> Member:
        return self._members[instance]

    def get(self, instance: InstanceId) -> Member | None:
        """Return the member, or None for a name that does not belong to the deployment."""
        return self._members.get(instance)

    @property
    def names(self) -> Mapping[InstanceId, Member]:
        """The members by name."""
        return self._members

    def add(self, entry: InstanceEntry, now: float) -> None:
        """Take a new member; it is starting."""
        self._members[entry.instance] = Member(entry, now, RestartPolicy(self._restarts), entry.role)

    def remove(self, instance: InstanceId) -> None:
        """Let a member go."""
        del self._members[instance]

    def why_unfit(self, member: Member, message: Ready) -> str:
        """Return why this Ready of a member cannot be accepted, or an empty string."""
        if message.facts.kv_layout:
            for other in self:
                if other is member or not other.tells_layout or other.facts is None:
                    continue
                if why := _why_unreadable(message.facts, other.instance, other.facts):
                    return why
        return member.why_unfit(message)

    def roles(self, states: Iterable[InstanceState]) -> set[Role]:
        """Return the roles of the members in one of these states."""
        wanted = set(states)
        return {member.role for member in self if member.state in wanted}

    def serves(self, roles: set[Role]) -> bool:
        """True when instances of these roles can serve a request from prompt to last token."""
        return serves_requests(roles, strict_roles=self._settings.has_walls)

    def check_serves(self, how: str, changed: Member, role: Role | None, *, force: bool) -> None:
        """Raise ConfigurationError unless requests can be served with ``changed`` in this role, or none: now, where it
        takes some now.
        """
        others = [member.entry for member in self if member.entry.will_take and member is not changed]
        is_ready = changed.state is InstanceState.READY
        left = {entry.role for entry in others if not is_ready or entry.state is InstanceState.READY}
        if not force and not self.serves(left if role is None else left | {role}):
            raise ConfigurationError(
                f"{how}, no request could be served: add another {changed.role.value} instance first and wait until "
                "it is ready, or force it"
            )

    def next_check_s(self, now: float) -> float:
        """Plan the next look for silence and return its time."""
        self._next_check_s = now + self._check_interval_s
        return self._next_check_s

    def silent(self, now: float) -> list[tuple[Member, str]]:
        """Return the members without a sign of life for too long, each with the reason in words.

        Where this process itself stood still, and the look comes late, nobody else was silent meanwhile.
        """
        if now < self._next_check_s:
            return []
        pause_s = now - self._next_check_s if math.isfinite(self._next_check_s) else 0.0
        found = []
        for member in self:
            member.last_seen_s += pause_s
            limit_s = self._limit_s(member.state)
            if now - member.last_seen_s > limit_s:
                while_loading = f" while {member.detail}" if member.state is InstanceState.STARTING else ""
                found.append((member, f"no sign of life for {limit_s:g} s{while_loading}"))
        return found

    def _limit_s(self, state: InstanceState) -> float:
        if state in ALIVE:
            return self._settings.instance_timeout_s
        return self._settings.start_timeout_s if state is InstanceState.STARTING else math.inf


def _why_unreadable(ours: InstanceFacts, other: InstanceId, theirs: InstanceFacts) -> str:
    """Return why blocks of one instance cannot be made of those of another; an empty string where they can."""
    if ours.kv_layout != theirs.kv_layout:
        return (
            f"its KV blocks ({ours.kv_layout}) are not those of {other} ({theirs.kv_layout}): start it with its model"
        )
    why = why_not_made(theirs.block_size, ours.block_size, has_windows=ours.window is not None)
    return f"its KV blocks cannot be made of those of {other}, {why}: start it with its --block-size" if why else ""
