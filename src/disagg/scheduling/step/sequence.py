"""One sequence as the step scheduler sees it: counts of tokens, blocks held, and a state with legal moves."""

import enum
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import msgspec

from disagg.base.errors import InternalError
from disagg.base.ids import BlockHash, BlockId, Epoch, InstanceId, RequestId
from disagg.base.kv_events import Medium
from disagg.base.objectives import NO_OBJECTIVES, Objectives
from disagg.base.sampling import FinishReason
from disagg.scheduling.step.actions import BlockCopy, BlockLoad


class SequenceState(enum.Enum):
    """Where a sequence is on one instance.

    ``WAITING`` to be computed, holding no block. ``RUNNING``: holds blocks and takes part in steps. ``OFFERED``: KV
    blocks of it are elsewhere or in tiers and there was no room yet. ``PULLING``: they are being copied here.
    ``AWAITING``: it is still being computed elsewhere, and all that can be copied already is here.
    ``LEASED``: computed here, its blocks wait to be read by another instance. ``ENDED``: gone; it holds nothing.
    """

    WAITING = "waiting"
    RUNNING = "running"
    OFFERED = "offered"
    PULLING = "pulling"
    AWAITING = "awaiting"
    LEASED = "leased"
    ENDED = "ended"

    __hash__ = object.__hash__  # Enum's own is Python code, and every move looks up two states


_MOST_MOVES: Final = 16
_State = SequenceState
TRANSITIONS: Final = frozenset(
    {
        (_State.WAITING, _State.RUNNING),  # blocks found
        (_State.WAITING, _State.OFFERED),  # just arrived, part of it is in a tier
        (_State.RUNNING, _State.WAITING),  # preempted: will be computed again
        (_State.RUNNING, _State.LEASED),  # first token sampled, hand-over begins
        (_State.OFFERED, _State.PULLING),  # room found
        (_State.OFFERED, _State.WAITING),  # the offer is gone: computed here instead
        (_State.OFFERED, _State.AWAITING),  # room found, all that is computed elsewhere was here
        (_State.PULLING, _State.AWAITING),  # a part has arrived
        (_State.AWAITING, _State.PULLING),  # the next part, or the rest
        (_State.AWAITING, _State.OFFERED),  # others need the room
        (_State.PULLING, _State.OFFERED),  # a part did not come
        (_State.AWAITING, _State.RUNNING),  # nothing was left to pull
        (_State.AWAITING, _State.WAITING),  # the whole offer is not what was reserved for
        (_State.AWAITING, _State.ENDED),
        (_State.PULLING, _State.RUNNING),  # blocks arrived
        (_State.PULLING, _State.WAITING),  # the pull failed: computed here instead
        (_State.WAITING, _State.ENDED),
        (_State.RUNNING, _State.ENDED),
        (_State.OFFERED, _State.ENDED),
        (_State.PULLING, _State.ENDED),
        (_State.LEASED, _State.ENDED),
    }
)


class RemoteKv(msgspec.Struct, frozen=True):
    """Where the KV blocks of an adopted sequence are, or with ``is_prefix`` those that are lent of its beginning."""

    source: InstanceId
    blocks: tuple[BlockId, ...]
    num_tokens: int
    expires_s: float
    is_prefix: bool = False


class KvPart(msgspec.Struct, frozen=True):
    """What can be read of a sequence before it is computed to its end, from ``first_block`` to before ``end_block``.

    In ``blocks`` those of layers with a sliding window come last. With ``behind_step`` that step of the other instance
    is still writing them.
    """

    first_block: int
    end_block: int
    blocks: tuple[BlockId, ...]
    expires_s: float
    behind_step: int = 0


@dataclass(slots=True)
class EarlyKv:
    """What is known of the blocks of a sequence that another instance is still computing, and how far they are here."""

    source: InstanceId
    parts: deque[KvPart]
    """Those that are not here yet, in order."""
    num_here: int = 0
    """Leading blocks whose contents are here, and those of them that were final when they were read."""
    num_final: int = 0
    reading: KvPart | None = None
    num_coming: int = 0
    """Leading blocks whose contents will be here when what is being read is."""
    fits: bool = True
    """The whole offer is of as many blocks as were reserved."""
    is_given_up: bool = False
    """The whole offer is waited for: a part did not come, or others needed the room."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable record of one sequence.

    ::

        [0 .......... num_computed .......... num_tokens ......... max_total_tokens]
         KV in block_ids             known, to be computed         not sampled yet
    """

    request_id: RequestId
    epoch: Epoch
    num_tokens: int
    max_total_tokens: int
    order: tuple[int, float, int]
    """(priority, seconds, number at this instance): lower is served earlier and preempted later. See ``QueueOrder``."""
    state: SequenceState
    hand_over: bool = False
    """Another instance goes on with it after the next token that is sampled here."""
    block_hashes: tuple[BlockHash, ...] = ()
    reuse_prefix: bool = True
    objectives: Objectives = NO_OBJECTIVES
    remote: RemoteKv | None = None
    num_prefill_tokens: int = 0
    """Tokens before this position count as prefill in the statistics, later ones as decode."""
    num_computed: int = 0
    block_ids: tuple[BlockId, ...] = ()
    window_ids: tuple[BlockId, ...] = ()
    """Blocks of layers with a sliding window, a run of them for each of ``block_ids`` from ``first_in_window`` on."""
    first_in_window: int = 0
    num_published: int = 0
    """Leading blocks already findable by their prefix."""
    num_offered: int = 0
    """Leading blocks that another instance may be reading already."""
    early: EarlyKv | None = None
    """While it is computed elsewhere, or what was read then is not all."""
    copies: tuple[BlockCopy, ...] = ()
    """What the running pull writes."""
    filling: tuple[BlockId, ...] = ()
    """Blocks that are reserved for pulls or for reads, written or not."""
    end_of_read: int = 0
    """Up to which of its blocks it reads what is in tiers behind the pool, and where those were when that was said."""
    to_read: tuple[Medium, ...] = ()
    loads: tuple[BlockLoad, ...] = ()
    """What is being read from tiers."""
    batch: int | None = None
    """Which of a pipeline's fixed batches it is in; None before it is in one, and where there are none."""
    num_in_flight: int = 0
    """Tokens of this sequence in steps that have not ended."""
    num_coming: int = 0
    """Tokens that those steps will sample."""
    discarded: FinishReason | None = None
    """Why nobody wants what its steps in flight bring; None while somebody does."""
    first_token_s: float = math.nan
    """When the first token of the answer came, NaN before; and the last one from this instance."""
    last_token_s: float = math.nan
    num_later_tokens: int = 0
    """Tokens of the answer after the first."""
    story: list[tuple[float, SequenceState]] = field(default_factory=list)
    """Its last moves."""

    @property
    def held(self) -> tuple[BlockId, ...]:
        """All blocks that it holds."""
        return self.block_ids + self.window_ids

    @property
    def num_planned(self) -> int:
        """Tokens that are computed, or will be when the steps in flight have ended."""
        return self.num_computed + self.num_in_flight

    @property
    def num_remaining(self) -> int:
        """Tokens that are known, or will be when the steps in flight have ended, and that no step computes yet."""
        return self.num_tokens + self.num_coming - self.num_computed - self.num_in_flight

    @property
    def ends_with_step_in_flight(self) -> bool:
        """True when nothing is left to compute here after the steps in flight."""
        return bool(self.num_coming) and (self.hand_over or self.num_tokens + self.num_coming >= self.max_total_tokens)

    @property
    def is_plain_decode(self) -> bool:
        """True when a step of one token after the other is all that there is to do, and nothing is in flight."""
        is_idle = not self.num_in_flight and self.discarded is None
        is_next = self.num_computed == self.num_tokens - 1 and self.num_computed >= self.num_prefill_tokens
        return is_idle and is_next and not self.hand_over

    @property
    def is_answering(self) -> bool:
        """True when its prompt is computed, here or elsewhere."""
        return self.num_planned >= self.num_prefill_tokens

    def go_on(self, answer_age_s: float, num_later_tokens: int, now: float) -> None:
        """Go on with an answer that began elsewhere, so long ago; with so many tokens after its first."""
        self.first_token_s, self.num_later_tokens = now - answer_age_s, num_later_tokens

    def add_token(self, now: float, names: tuple[BlockHash, ...] = ()) -> None:
        """Take account of a sampled token, and of the names of the blocks that it fills."""
        if names:
            self.block_hashes += names
        self.num_tokens += 1
        self.last_token_s = now
        if self.num_later_tokens or not math.isnan(self.first_token_s):
            self.num_later_tokens += 1
        else:
            self.first_token_s = now

    def move(self, state: SequenceState, now: float) -> None:
        """Change state; raise InternalError with the sequence's story when the move is not legal."""
        if (self.state, state) not in TRANSITIONS:
            told = ", ".join(f"{at:.6f} {past.value}" for at, past in self.story)
            raise InternalError(
                f"sequence {self.request_id} cannot go from {self.state.value} to {state.value} at {now:.6f} "
                f"(story: {told})"
            )
        self.state = state
        if len(self.story) == _MOST_MOVES:
            del self.story[0]
        self.story.append((now, state))
