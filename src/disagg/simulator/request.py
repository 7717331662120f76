"""One simulated request: lengths in, stamps out."""

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from disagg.base.block_hash import names_for
from disagg.base.ids import BlockHash, Epoch, InstanceId, RequestId
from disagg.base.messages import StageStamps
from disagg.base.objectives import NO_OBJECTIVES, Objectives
from disagg.measure.timeline import RequestTimeline
from disagg.scheduling.dispatch.actions import FailReason, PathEnded
from disagg.scheduling.dispatch.events import Progress, TokensEmitted
from disagg.scheduling.instance.inputs import SequenceFacts

FIRST_EPOCH = Epoch(1)
"""The first attempt of each simulated request; one more for every instance that it loses."""


class Outcome(enum.Enum):
    """How a request ended."""

    FINISHED = "finished"
    REFUSED = "refused"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """Mutable record of one request on its way; shared by router and instances, owned by the router.

    The answer ends after ``output_len`` tokens, whatever they are.
    """

    request_id: RequestId
    arrival_s: float
    prompt_len: int
    output_len: int
    block_hashes: tuple[BlockHash, ...] = ()
    """Names of its full KV blocks, as far as somebody else's can be equal: of the prompt, and on into the answer."""
    hash_block_size: int = 0
    """Tokens of each of those blocks."""
    priority: int = 0
    tenant: str = ""
    service_class: str = ""
    objectives: Objectives = NO_OBJECTIVES
    num_output_tokens: int = 0
    num_reported_tokens: int = 0
    """Output tokens that the dispatcher was told of."""
    num_delivered_tokens: int = 0
    """Output tokens that the router had when it was last told of some."""
    epoch: Epoch = FIRST_EPOCH
    deliver_s: float = 0.0
    """How long its tokens travel from the instance to the client."""
    cancel_s: float = math.inf
    """When its client goes away."""
    outcome: Outcome | None = None
    fail_reason: FailReason | None = None
    detail: str = ""
    path_ended: PathEnded | None = None
    """Predictions beside what came, where predictions chose its path."""
    timeline: RequestTimeline = field(init=False)

    def __post_init__(self) -> None:
        self.timeline = RequestTimeline(arrival_s=self.arrival_s)

    @property
    def max_total_tokens(self) -> int:
        """Prompt and answer."""
        return self.prompt_len + self.output_len

    @property
    def is_complete(self) -> bool:
        """True when all tokens of the answer are there."""
        return self.num_output_tokens >= self.output_len

    @property
    def ttft_s(self) -> float:
        """Arrival to first token at the client; NaN when none came."""
        return self.timeline.first_token_s + self.deliver_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean gap between the answer's tokens; NaN when there are fewer than two."""
        if self.num_output_tokens < 2:
            return math.nan
        return (self.timeline.last_token_s - self.timeline.first_token_s) / (self.num_output_tokens - 1)

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt, and answer so far."""
        return self.prompt_len + self.num_output_tokens

    @property
    def prompt_names(self) -> tuple[BlockHash, ...]:
        """The names of the prompt's full KV blocks, of ``hash_block_size`` tokens each."""
        return self.block_hashes[: self.prompt_len // self.hash_block_size] if self.block_hashes else ()

    def names_of_new(self, count: int, block_size: int) -> tuple[BlockHash, ...]:
        """Return the names of an instance's KV blocks that the last ``count`` tokens have filled."""
        if block_size % self.hash_block_size:
            return ()
        each = block_size // self.hash_block_size
        first, end = (self.num_tokens - count) // block_size, self.num_tokens // block_size
        return self.block_hashes[(first + 1) * each - 1 : end * each : each]

    def facts(self, block_size: int) -> SequenceFacts:
        """Return what policy knows of it now, where KV blocks hold ``block_size`` tokens."""
        return SequenceFacts(
            request_id=self.request_id,
            epoch=self.epoch,
            num_tokens=self.num_tokens,
            max_total_tokens=self.max_total_tokens,
            priority=self.priority,
            objectives=self.objectives,
            arrival_s=self.arrival_s,
            block_hashes=self._names(block_size) if self.block_hashes else (),
        )

    def _names(self, block_size: int) -> tuple[BlockHash, ...]:
        return names_for(self.block_hashes, self.hash_block_size, block_size)[: self.num_tokens // block_size]

    def resume(self, epoch: Epoch, now: float) -> None:
        """Begin a new attempt, from the tokens that the router has: those on their way are lost with their instance."""
        self.epoch = epoch
        self.num_output_tokens = self.num_reported_tokens = self.num_delivered_tokens
        self.timeline.forget_after(self.num_delivered_tokens)
        self.timeline.pause(now)


def add_tokens(
    requests: Iterable[SimulatedRequest],
    count: int,
    first_s: float,
    last_s: float,
    stamps: Mapping[RequestId, StageStamps],
) -> list[float]:
    """Stamp ``count`` sampled tokens of each request, one a step, in steps that ended from ``first_s`` to ``last_s``.

    ``stamps`` come with the first token that an instance brings. Return the gaps before the first of these tokens; NaN
    where none came before.
    """
    gaps_s = []
    for request in requests:
        if request.num_output_tokens - count > 1 and not (stamps and request.request_id in stamps):
            timeline = request.timeline
            gaps_s.append(first_s - timeline.last_token_s)
            timeline.last_token_s = last_s  # as below, but for what the first two tokens need
        else:
            gaps_s.append(first_s - request.timeline.last_token_s)
            request.timeline.add_tokens(count, first_s, last_s, stamps.get(request.request_id))
    return gaps_s


def tokens_emitted(instance: InstanceId, requests: Iterable[SimulatedRequest], num_untold: int = 0) -> TokensEmitted:
    """Report all tokens of these requests that were not reported yet; ``num_untold`` are those of others."""
    progress = []
    for request in requests:
        num_new = request.num_output_tokens - request.num_reported_tokens
        request.num_reported_tokens = request.num_output_tokens
        is_complete = request.num_output_tokens >= request.output_len
        progress.append(Progress(request.request_id, request.epoch, num_new, is_complete))
    return TokensEmitted(instance=instance, progress=tuple(progress), num_untold=num_untold)
