"""One simulated request: lengths in, stamps out."""

import enum
import math
from dataclasses import dataclass, field

from disagg.base.ids import BlockHash, Epoch, InstanceId, RequestId
from disagg.measure.timeline import RequestTimeline
from disagg.scheduling.actions import OfferKv

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
    def ttft_s(self) -> float:
        """Arrival to first token; NaN when none came."""
        return self.timeline.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean gap between the answer's tokens; NaN when there are fewer than two."""
        if self.num_output_tokens < 2:
            return math.nan
        return (self.timeline.last_token_s - self.timeline.first_token_s) / (self.num_output_tokens - 1)

    def start_step(self, now: float, is_decode: bool) -> None:
        """Note that a step with this request begins, on a decode instance or another."""
        timeline = self.timeline
        if is_decode:
            if math.isnan(timeline.decode_started_s):
                timeline.decode_started_s = now
        elif math.isnan(timeline.prefill_started_s):
            timeline.prefill_started_s = now

    def add_token(self, now: float) -> bool:
        """Note a sampled token; return True when it is the last one."""
        self.num_output_tokens += 1
        timeline = self.timeline
        timeline.last_token_s = now
        if self.num_output_tokens == 1:
            timeline.first_token_s = now
        elif self.num_output_tokens == 2:
            timeline.second_token_s = now
            if math.isnan(timeline.decode_started_s):
                timeline.decode_started_s = timeline.first_token_s
        return self.num_output_tokens >= self.output_len
