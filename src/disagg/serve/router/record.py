"""All that the router knows about one sequence under way.

This is also what a sequence is resumed from: prompt, sampling settings with their seed, and the tokens so far. Noise
is a function of (seed, position), so an instance given ``request_now()`` continues as the lost one would have.
"""

import math
from dataclasses import dataclass, field

from msgspec import structs

from disagg.base.ids import InstanceId
from disagg.base.messages import KvOffer, SequenceOutput, StageStamps
from disagg.base.request import GenerationRequest, Role
from disagg.serve.router.stream import LiveStream


@dataclass(slots=True)
class SequenceRecord:
    """One sequence, what came of it so far, and where its tokens go."""

    request: GenerationRequest
    stream: LiveStream
    offer: KvOffer | None = None
    output_token_ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.output_token_ids = list(self.request.output_token_ids)

    def request_now(self) -> GenerationRequest:
        """Return the request with all tokens so far, as an instance needs it to continue."""
        if len(self.output_token_ids) == len(self.request.output_token_ids):
            return self.request
        return structs.replace(self.request, output_token_ids=tuple(self.output_token_ids))

    def accept(self, output: SequenceOutput, instance: InstanceId, role: Role, now: float) -> None:
        """Keep the tokens that an instance of this role brought, stamp the timeline, and pass them on."""
        timeline = self.stream.timeline
        self._note(instance, role)
        self.output_token_ids.extend(output.token_ids)
        if role is Role.DECODE:
            self._stamp_decode(output.stamps, now)
        elif math.isnan(timeline.first_token_s):
            self._stamp_prefill(output.stamps, now)
        elif math.isnan(timeline.second_token_s):
            timeline.decode_started_s = timeline.first_token_s
            timeline.second_token_s = now
        if output.token_ids:
            timeline.last_token_s = now
        self.stream.push(output)

    def _note(self, instance: InstanceId, role: Role) -> None:
        served_by = self.stream.served_by
        if role is not Role.DECODE and served_by.prefill != instance:
            served_by = structs.replace(served_by, prefill=instance)
        if role is not Role.PREFILL and served_by.decode != instance:
            served_by = structs.replace(served_by, decode=instance)
        self.stream.served_by = served_by

    def _stamp_prefill(self, stamps: StageStamps | None, now: float) -> None:
        timeline = self.stream.timeline
        timeline.first_token_s = now
        if stamps is not None:
            timeline.prefill_started_s = _passed(stamps.scheduled_s)
            timeline.first_token_s = stamps.first_step_done_s or now

    def _stamp_decode(self, stamps: StageStamps | None, now: float) -> None:
        timeline = self.stream.timeline
        if not math.isnan(timeline.second_token_s):
            return
        timeline.second_token_s = now
        if stamps is not None:
            timeline.pull_started_s = _passed(stamps.pull_started_s)
            timeline.pulled_s = _passed(stamps.pulled_s)
            timeline.decode_started_s = _passed(stamps.scheduled_s)
            timeline.second_token_s = stamps.first_step_done_s or now


def _passed(stamp_s: float) -> float:
    """Return the stamp, or NaN for a stage that was not passed."""
    return stamp_s or math.nan
