"""What the dispatcher remembers of sequences and instances, and the moves a sequence may make."""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NoReturn

from disagg.base.config import MAX_OVERTAKE_S
from disagg.base.errors import InternalError
from disagg.base.ids import BlockHash, Epoch, InstanceId, RequestId
from disagg.base.messages import CostsLearned
from disagg.base.objectives import BEST_EFFORT, NO_OBJECTIVES, Objectives
from disagg.base.request import Role
from disagg.base.router_messages import ForeignLoad
from disagg.base.step_limits import StepLimits
from disagg.base.window_blocks import WindowBlocks
from disagg.cache.prefix_index import HeldPrefix
from disagg.scheduling.dispatch.events import SequenceArrived
from disagg.scheduling.dispatch.forecast import Forecast
from disagg.scheduling.dispatch.sequence_sample import SequenceSample
from disagg.scheduling.recent_work import RecentWork


class Whereabouts(enum.Enum):
    """Where a sequence is. ``holder`` computes it, ``lease`` names who keeps KV blocks for somebody else.

    ========== ================= ======== ===================================================
    state      holder            lease    meaning
    ========== ================= ======== ===================================================
    QUEUED     none              none     no live instance can start it, or start it again
    BORROWING  chosen            lender   another instance looks for the blocks of the sequence's beginning;
                                          the chosen one was told nothing yet
    PREFILLING prefill           none     on its way to the first token
    OFFERING   prefill           none     the first token is out, the offer has not come yet
    OFFERED    none              source   no live decode instance can adopt it
    PULLING    decode, or chosen source,  the holder copies the KV blocks, or waits for room; no lease any more when
                                 lender   the instance that it copies from died meanwhile
    DECODING   decode            none     the decode instance owns all of it
    MIGRATING  decode, colocated none     it goes on there until its blocks are offered, after its next token
    RUNNING    colocated         none     one instance does everything; a decode instance may, for a resumed sequence
                                          or one whose beginning it holds
    ENDED      none              none     finished, failed or cancelled; not remembered
    ========== ================= ======== ===================================================
    """

    QUEUED = "queued"
    BORROWING = "borrowing"
    PREFILLING = "prefilling"
    OFFERING = "offering"
    OFFERED = "offered"
    PULLING = "pulling"
    DECODING = "decoding"
    RUNNING = "running"
    MIGRATING = "migrating"
    ENDED = "ended"

    __hash__ = object.__hash__  # Enum's own is Python code, and every move looks up two states


TRANSITIONS: Final[dict[Whereabouts, frozenset[Whereabouts]]] = {
    Whereabouts.QUEUED: frozenset(
        {Whereabouts.BORROWING, Whereabouts.PREFILLING, Whereabouts.RUNNING, Whereabouts.ENDED}
    ),
    Whereabouts.BORROWING: frozenset(
        {Whereabouts.PULLING, Whereabouts.PREFILLING, Whereabouts.RUNNING, Whereabouts.QUEUED, Whereabouts.ENDED}
    ),
    Whereabouts.PREFILLING: frozenset({Whereabouts.OFFERING, Whereabouts.QUEUED, Whereabouts.ENDED}),
    Whereabouts.OFFERING: frozenset({Whereabouts.OFFERED, Whereabouts.QUEUED, Whereabouts.ENDED}),
    Whereabouts.OFFERED: frozenset({Whereabouts.PULLING, Whereabouts.QUEUED, Whereabouts.ENDED}),
    Whereabouts.PULLING: frozenset(
        {
            Whereabouts.DECODING,
            Whereabouts.PREFILLING,
            Whereabouts.RUNNING,
            Whereabouts.QUEUED,
            Whereabouts.ENDED,
        }
    ),
    Whereabouts.DECODING: frozenset({Whereabouts.MIGRATING, Whereabouts.QUEUED, Whereabouts.ENDED}),
    Whereabouts.RUNNING: frozenset({Whereabouts.MIGRATING, Whereabouts.QUEUED, Whereabouts.ENDED}),
    Whereabouts.MIGRATING: frozenset({Whereabouts.OFFERED, Whereabouts.QUEUED, Whereabouts.ENDED}),
    Whereabouts.ENDED: frozenset(),
}
"""Every legal move; anything else is a fault of ours or of an instance, and raises with the sequence's story.

The way back to QUEUED is for sequences whose instance died or drains: they start again in a new epoch.
"""


class InstanceState(enum.Enum):
    """Life of an instance as the router sees it."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    """It is given nothing new, gives running answers away, and goes on with what is left."""
    LOST = "lost"
    """It died and will be started again."""
    GONE = "gone"
    """Given up, or it left: it will not come back."""

    __hash__ = object.__hash__  # Enum's own is Python code, and every placing asks which instances are coming


READ_ALREADY: Final = frozenset({Whereabouts.PREFILLING, Whereabouts.OFFERING})
"""States in which another instance than the holder may read a sequence's blocks."""
ALIVE: Final = frozenset({InstanceState.READY, InstanceState.DRAINING})
"""States in which an instance takes messages."""
COMING: Final = frozenset({InstanceState.STARTING, InstanceState.LOST})
"""States from which an instance will be ready."""


@dataclass(frozen=True, slots=True)
class KvLink:
    """How long KV blocks take from one instance to another: ``latency_s`` and so much for each token."""

    latency_s: float
    token_s: float

    def transfer_time_s(self, num_tokens: int) -> float:
        """Return the seconds of one transfer that has the link for itself."""
        return self.latency_s + num_tokens * self.token_s


@dataclass(slots=True)
class InstanceEntry:
    """One instance and the load that dispatch has put on it, in tokens."""

    instance: InstanceId
    role: Role
    state: InstanceState = InstanceState.STARTING
    capacity: int | None = None
    """Longest sequence it can hold; unknown until it was up once."""
    prefill_tokens: int = 0
    """Tokens given to it that wait to be prefilled or are being so."""
    kv_tokens: int = 0
    """Tokens of the sequences whose KV blocks it holds or is about to."""
    is_cordoned: bool = False
    """An operator has it drained: it stays so through deaths."""
    prefill_squares: int = 0
    """Squares of those numbers of tokens, in sum, and of how many sequences they are."""
    num_prefills: int = 0
    prefilling_since_s: float = 0.0
    """When the first of them could begin."""
    prompts: dict[RequestId, "SequenceEntry"] = field(default_factory=dict)
    """Those of them that this router has put there."""
    answers: dict[RequestId, "SequenceEntry"] = field(default_factory=dict)
    """Sequences that it decodes, or is about to."""
    prefill_work: RecentWork = field(default_factory=RecentWork)
    """Seconds of prefill that it was given."""
    expected: dict[RequestId, "SequenceEntry"] = field(default_factory=dict)
    """Sequences that are being prefilled, there or elsewhere, to be decoded there, and their tokens in sum."""
    expected_tokens: int = 0
    pool_tokens: int | None = None
    """Tokens of its KV pool, all layers of each; unknown until it was up once."""
    window: WindowBlocks | None = None
    """Which KV blocks hold its layers with a sliding window, where those have blocks of their own."""
    limits: StepLimits = field(default_factory=StepLimits)
    lesson: CostsLearned | None = None
    """What it said last of the cost of its steps."""
    reads: dict[InstanceId, KvLink] = field(default_factory=dict)
    """How fast it reads the KV blocks of others, where that was measured."""
    num_sequences: int = 0
    """Sequences that it computes, or whose KV blocks it keeps for another instance."""
    foreign: ForeignLoad = field(default_factory=ForeignLoad)
    """The part of the numbers of tokens and of prefills that other routers have put on it."""
    untold_tokens: int = 0
    """The part of ``kv_tokens`` of which it is not known whose they are."""
    order: int = 0
    """Its place in the order of joining: decides between equals."""

    @property
    def is_alive(self) -> bool:
        """True while it takes messages."""
        return self.state in ALIVE

    @property
    def is_coming(self) -> bool:
        """True while it is starting, or will be started again, to take sequences."""
        return self.state in COMING and not self.is_cordoned

    @property
    def will_take(self) -> bool:
        """True when it takes new sequences, now or once it is up."""
        return self.state is InstanceState.READY or self.is_coming

    @property
    def num_held(self) -> int:
        """How many sequences it computes or keeps KV blocks of, those of other routers included."""
        return self.num_sequences + self.foreign.num_sequences

    @property
    def num_decodes(self) -> int:
        """How many sequences it decodes, or is about to."""
        return len(self.answers) + self.foreign.num_decodes

    @property
    def has_work(self) -> bool:
        """True while it has something to compute."""
        return self.prefill_tokens > 0 or self.num_decodes > 0

    @property
    def lends_cores(self) -> bool:
        """True where it and others of its host lend each other their cores."""
        return self.limits.num_borrowable > 0 and self.is_alive

    def can_hold(self, num_tokens: int) -> bool:
        """True unless it is known to be too small for a sequence of ``num_tokens``."""
        return self.capacity is None or num_tokens <= self.capacity

    def held_tokens(self, num_tokens: float, num_sequences: int = 1) -> float:
        """Return how many of ``pool_tokens`` so many tokens take: of layers with a window only what is in sight."""
        return num_tokens * (1.0 if self.window is None else self.window.held_share(num_tokens, num_sequences))

    def pool_tokens_of(self, context_tokens: float) -> float:
        """Return how many tokens of sequences of this length its KV pool holds; 0 where that is not known."""
        return (self.pool_tokens or 0) * context_tokens / max(1e-9, self.held_tokens(context_tokens))

    def describe(self) -> str:
        """Return name, state and capacity in words."""
        capacity = "" if self.capacity is None else f", holds {self.capacity} tokens"
        return f"{self.instance}: {self.state.value}{capacity}"


@dataclass(slots=True)
class Charge:
    """One sequence's part of an instance's load."""

    prefill_tokens: int = 0
    kv_tokens: int = 0
    is_decoding: bool = False


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
    arrived_s: float
    deadline_s: float
    tenant: str = ""
    service_class: str = ""
    objectives: Objectives = NO_OBJECTIVES
    rank: tuple[int, float, int] = (0, 0.0, 0)
    """Its place among those of its tenant that wait."""
    is_best_effort: bool = False
    """It was predicted to miss, and is served when others leave time."""
    chosen: Forecast | None = None
    """The path that it was given last, where predictions decided, and the best of the others then."""
    other: Forecast | None = None
    promised_ttft_s: float | None = None
    """Its TTFT as predicted when it was admitted by predictions, without a margin."""
    expected: tuple[InstanceId, int] | None = None
    """Who is expected to go on with it, and with how many tokens, until somebody does."""
    started_s: float = math.nan
    """When it was given to an instance last."""
    first_token_s: float = math.nan
    last_token_s: float = math.nan
    num_answer_tokens: int = 0
    sample: SequenceSample | None = None
    """What is kept of it for those who look at the workload."""
    hand_over_s: float | None = None
    """How long its KV blocks travelled, once they have."""
    state: Whereabouts = Whereabouts.QUEUED
    holder: InstanceId | None = None
    lease: InstanceId | None = None
    reader: InstanceId | None = None
    """Who reads its KV blocks already while it is being prefilled, to go on with it."""
    borrows_for: Whereabouts | None = None
    """While it borrows its beginning: what its holder does then."""
    wait_until_s: float = math.inf
    """When waiting for an instance ends with an error."""
    charges: dict[InstanceId, Charge] = field(default_factory=dict)
    story: list[tuple[float, str, Whereabouts]] = field(default_factory=list)
    """What happened to it and when; its path is as long as the instances that it may lose allow."""
    block_hashes: tuple[BlockHash, ...] = ()
    """Names of its leading KV blocks."""
    hash_block_size: int = 0
    """Tokens of each of those."""
    held: Mapping[InstanceId, HeldPrefix] = field(default_factory=dict)
    """Who holds its first blocks, as known when it was last placed."""
    losses: list[str] = field(default_factory=list)
    """The instances that died while it was on them: which, when and why."""
    is_resumed: bool = False
    """True from its second attempt on."""
    visited: set[InstanceId] = field(default_factory=set)
    """The instances that held it in this attempt. They remember that it ended there, and do not take it back.

    Who merely lent its beginning is none of them, and may well go on with it."""

    @classmethod
    def arrived(cls, event: SequenceArrived, order: int, now: float, timeout_s: float) -> "SequenceEntry":
        """Return a sequence that arrives now and is given up after ``timeout_s``."""
        return cls(
            request_id=event.request_id,
            epoch=event.epoch,
            num_tokens=event.num_tokens,
            max_total_tokens=event.max_total_tokens,
            priority=event.priority,
            tenant=event.tenant,
            service_class=event.service_class,
            objectives=event.objectives,
            block_hashes=event.block_hashes,
            hash_block_size=event.hash_block_size,
            order=order,
            arrived_s=now - event.prepared_s,
            deadline_s=now + timeout_s,
            story=[(now, "arrived", Whereabouts.QUEUED)],
        )

    @property
    def ends_at_first_token(self) -> bool:
        """True when nothing is left to decode after the prefill."""
        return self.max_total_tokens <= self.num_tokens + 1

    @property
    def kv_source(self) -> InstanceId | None:
        """Return whose KV blocks whoever goes on with it reads; None where there are none."""
        return self.lease or self.holder

    def num_cached(self, instance: InstanceId) -> int:
        """Return how many of its tokens an instance need not compute; at least the last one it does."""
        held = self.held.get(instance)
        return 0 if held is None else min(held.num_tokens, self.num_tokens - 1)

    def move(self, state: Whereabouts, now: float, why: str) -> None:
        """Change the state; raise InternalError with the story when ``TRANSITIONS`` does not allow it."""
        if state not in TRANSITIONS[self.state]:
            self.refuse_event(f"{why}: {self.state.value} -> {state.value}")
        self.state = state
        self.story.append((now, why, state))

    def hold(self, instance: InstanceId) -> None:
        """Note who computes it from now on."""
        self.holder = instance
        self.visited.add(instance)
        self.wait_until_s = math.inf

    def begin_attempt(self) -> None:
        """Begin the next attempt, on no instance yet."""
        self.epoch = Epoch(self.epoch + 1)
        self.is_resumed = True
        self.visited = set()
        self.wait_until_s = math.inf

    def assign(self, instance: InstanceId, chosen: Forecast | None, other: Forecast | None, now: float) -> None:
        """Let an instance start it, by these predictions."""
        self.holder = instance
        self.chosen, self.other, self.started_s = chosen, other, now

    def degrade(self) -> None:
        """Make it one that is served when others leave time, and at the latest so much later."""
        self.is_best_effort, self.objectives = True, BEST_EFFORT
        priority, rank_s, order = self.rank
        self.rank = (priority, rank_s + MAX_OVERTAKE_S, order)

    def note_tokens(self, count: int, now: float) -> None:
        """Take account of tokens of the answer."""
        if not self.num_answer_tokens:
            self.first_token_s = now
        self.last_token_s = now
        self.num_answer_tokens += count

    @property
    def tpot_s(self) -> float | None:
        """Mean gap between the tokens of its answer; None where there are fewer than two."""
        num_gaps = self.num_answer_tokens - 1
        return (self.last_token_s - self.first_token_s) / num_gaps if num_gaps > 0 else None

    def keeps(self, objectives: Objectives) -> bool:
        """Return whether its tokens have come as they ought to."""
        in_time = objectives.ttft_s is None or self.first_token_s - self.arrived_s <= objectives.ttft_s
        return in_time and (objectives.tpot_s is None or (self.tpot_s or 0.0) <= objectives.tpot_s)

    @property
    def loss_story(self) -> str:
        """Why it is given up for what died with it, in words."""
        number, story = len(self.losses), "; ".join(self.losses)
        return f"the request was on {number} instance(s) that died, which is the limit (--max-instance-losses): {story}"

    def note_loss(self, lost: InstanceId, now: float, why: str) -> None:
        """Remember that an instance died while the sequence was on it."""
        self.losses.append(f"{lost} died {now - self.arrived_s:.3f} s after its arrival: {why}")

    def validate(self) -> None:
        """Raise InternalError unless holder, lease and charges are what the state says."""
        held = self.state not in (Whereabouts.QUEUED, Whereabouts.OFFERED)
        leased = self.lease is not None
        may_be_leased = self.state in (Whereabouts.OFFERED, Whereabouts.PULLING, Whereabouts.BORROWING)
        must_be_leased = self.state in (Whereabouts.OFFERED, Whereabouts.BORROWING)
        present = {name for name in (self.holder, self.lease, self.reader) if name is not None}
        if self.reader is not None and self.state not in READ_ALREADY:
            self.refuse_event(f"reader {self.reader} in state {self.state.value}")
        if (self.holder is not None) != held or not must_be_leased <= leased <= may_be_leased:
            self.refuse_event(f"holder {self.holder} and lease {self.lease} in state {self.state.value}")
        if set(self.charges) != present:
            self.refuse_event(f"charges on {sorted(self.charges)}")

    def refuse_event(self, what: str) -> NoReturn:
        """Raise InternalError: ``what`` cannot happen to this sequence in its state."""
        story = "; ".join(f"{time_s:.3f} {why} -> {state.value}" for time_s, why, state in self.story)
        raise InternalError(f"sequence {self.request_id} epoch {self.epoch} cannot take {what}; its story: {story}")
