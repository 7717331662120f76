"""One simulated request: lengths in, stamps out."""

import enum
import math
from dataclasses import dataclass, field

from disagg.base.ids import BlockHash, Epoch, InstanceId, RequestId
from disagg.base.request import Role
from disagg.measure.timeline import RequestTimeline
from disagg.scheduling.step.actions import OfferKv

FIRST_EPOCH = Epoch(1)
"""No simulated request is ever resumed by the API, so each has one attempt."""


class Outcome(enum.Enum):
    """How a request ended."""

    FINISHED = "finished"
    REFUSED = "refused"
    FAILED = "failed"


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
    priority: int = 0
    num_output_tokens: int = 0
    num_reported_tokens: int = 0
    """Output tokens that the dispatcher was told of."""
    has_started_here: bool = False
    """A step of the instance that holds it has begun with it."""
    deliver_s: float = 0.0
    """How long its tokens travel from the instance to the client."""
    offer: OfferKv | None = None
    source: InstanceId | None = None
    """Who made the offer."""
    outcome: Outcome | None = None
    detail: str = ""
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

    def start_step(self, now: float, role: Role) -> None:
        """Note that its first step on an instance of this role begins."""
        self.has_started_here = True
        if role is Role.DECODE:
            self.timeline.decode_started_s = now
        else:
            self.timeline.prefill_started_s = now

    def add_tokens(self, count: int, first_s: float, last_s: float) -> float:
        """Note ``count`` sampled tokens, one a step, in steps that ended from ``first_s`` to ``last_s``.

        Return the gap before the first of them; NaN where none came before.
        """
        timeline = self.timeline
        gap_s = first_s - timeline.last_token_s
        if self.num_output_tokens == 0:
            timeline.first_token_s = first_s
        elif self.num_output_tokens == 1:
            timeline.second_token_s = first_s
            if math.isnan(timeline.decode_started_s):
                timeline.decode_started_s = timeline.first_token_s
        timeline.last_token_s = last_s
        self.num_output_tokens += count
        return gap_s
