"""What the dispatcher remembers of sequences and instances, and the moves a sequence may make."""

import enum
import math
from dataclasses import dataclass, field
from typing import Final, NoReturn

from disagg.base.errors import InternalError
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.request import Role


class SequenceState(enum.Enum):
    """Where a sequence is. ``holder`` computes it, ``lease`` names who keeps KV blocks for somebody else.

    ========== ================= ======== ===================================================
    state      holder            lease    meaning
    ========== ================= ======== ===================================================
    QUEUED     none              none     no live instance can start it
    PREFILLING prefill           none     on its way to the first token
    OFFERING   prefill           none     the first token is out, the offer has not come yet
    OFFERED    none              prefill  no live decode instance can adopt it
    PULLING    decode            prefill  the decode instance copies the KV blocks, or waits for room;
                                          no lease any more when the prefill instance died meanwhile
    DECODING   decode            none     the decode instance owns all of it
    RUNNING    colocated         none     one instance does everything
    ENDED      none              none     finished, failed or cancelled; not remembered
    ========== ================= ======== ===================================================
    """

    QUEUED = "queued"
    PREFILLING = "prefilling"
    OFFERING = "offering"
    OFFERED = "offered"
    PULLING = "pulling"
    DECODING = "decoding"
    RUNNING = "running"
    ENDED = "ended"


TRANSITIONS: Final[dict[SequenceState, frozenset[SequenceState]]] = {
    SequenceState.QUEUED: frozenset({SequenceState.PREFILLING, SequenceState.RUNNING, SequenceState.ENDED}),
    SequenceState.PREFILLING: frozenset({SequenceState.OFFERING, SequenceState.ENDED}),
    SequenceState.OFFERING: frozenset({SequenceState.OFFERED, SequenceState.ENDED}),
    SequenceState.OFFERED: frozenset({SequenceState.PULLING, SequenceState.ENDED}),
    SequenceState.PULLING: frozenset({SequenceState.DECODING, SequenceState.ENDED}),
    SequenceState.DECODING: frozenset({SequenceState.ENDED}),
    SequenceState.RUNNING: frozenset({SequenceState.ENDED}),
    SequenceState.ENDED: frozenset(),
}
"""Every legal move; anything else is a fault of ours or of an instance, and raises with the sequence's story."""


class Availability(enum.Enum):
    """Whether an instance can be given work."""

    COMING = "coming"
    """Starting or restarting."""
    LIVE = "live"
    GONE = "gone"
    """Given up: it will not come back."""


@dataclass(slots=True)
class InstanceEntry:
    """One instance and the load that dispatch has put on it, in tokens."""

    instance: InstanceId
    role: Role
    availability: Availability = Availability.COMING
    capacity: int | None = None
    """Longest sequence it can hold; unknown until it was up once."""
    prefill_tokens: int = 0
    """Tokens given to it that wait to be prefilled or are being so."""
    kv_tokens: int = 0
    """Tokens of the sequences whose KV blocks it holds or is about to."""

    def can_hold(self, num_tokens: int) -> bool:
        """True unless it is known to be too small for a sequence of ``num_tokens``."""
        return self.capacity is None or num_tokens <= self.capacity

    def describe(self) -> str:
        """Return name, availability, capacity and load in words."""
        capacity = "" if self.capacity is None else f", holds {self.capacity} tokens"
        return f"{self.instance}: {self.availability.value}{capacity}"


@dataclass(slots=True)
class Charge:
    """One sequence's part of an instance's load."""

    prefill_tokens: int = 0
    kv_tokens: int = 0


@dataclass(slots=True)
class SequenceEntry:
    """One sequence that is under way."""

    request_id: RequestId
    epoch: Epoch
    num_tokens: int
    """Known so far: prompt and output."""
    max_total_tokens: int
    priority: int
    order: int
    """Position in the order of arrival."""
    deadline_s: float
    state: SequenceState = SequenceState.QUEUED
    holder: InstanceId | None = None
    lease: InstanceId | None = None
    wait_until_s: float = math.inf
    """When waiting for an instance ends with an error."""
    charges: dict[InstanceId, Charge] = field(default_factory=dict)
    story: list[tuple[float, str]] = field(default_factory=list)
    """What happened to it and when; as long as its path, which has no cycle."""

    @property
    def ends_at_first_token(self) -> bool:
        """True when nothing is left to decode after the prefill."""
        return self.max_total_tokens <= self.num_tokens + 1

    def move(self, state: SequenceState, now: float, why: str) -> None:
        """Change the state; raise InternalError with the story when ``TRANSITIONS`` does not allow it."""
        if state not in TRANSITIONS[self.state]:
            self.refuse_event(f"{why}: {self.state.value} -> {state.value}")
        self.state = state
        self.story.append((now, f"{why} -> {state.value}"))

    def validate(self) -> None:
        """Raise InternalError unless holder, lease and charges are what the state says."""
        held = self.state not in (SequenceState.QUEUED, SequenceState.OFFERED)
        leased = self.lease is not None
        may_be_leased = self.state in (SequenceState.OFFERED, SequenceState.PULLING)
        must_be_leased = self.state is SequenceState.OFFERED
        present = {name for name in (self.holder, self.lease) if name is not None}
        if (self.holder is not None) != held or not must_be_leased <= leased <= may_be_leased:
            self.refuse_event(f"holder {self.holder} and lease {self.lease} in state {self.state.value}")
        if set(self.charges) != present:
            self.refuse_event(f"charges on {sorted(self.charges)}")

    def refuse_event(self, what: str) -> NoReturn:
        """Raise InternalError: ``what`` cannot happen to this sequence in its state."""
        story = "; ".join(f"{time_s:.3f} {line}" for time_s, line in self.story)
        raise InternalError(f"sequence {self.request_id} epoch {self.epoch} cannot take {what}; its story: {story}")
