"""What one of several routers tells of its sequences to whoever decides how the deployment changes: as data."""

import msgspec

from disagg.base.message_fields import Count, Seconds
from disagg.base.request import Role
from disagg.scheduling.dispatch.sequence_sample import SequenceSample


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """When a sequence arrived, and the tokens of its prompt."""

    time_s: Seconds
    num_prompt_tokens: Count


class Started(msgspec.Struct, frozen=True, array_like=True):
    """When and on what kind of instance a sequence began; of its prompt, what was computed."""

    time_s: Seconds
    role: Role
    num_prompt_tokens: Count
    num_computed_tokens: Count


class Answered(msgspec.Struct, frozen=True, array_like=True):
    """When an answer came to its end, and its tokens."""

    time_s: Seconds
    num_tokens: Count


class ReportedSample(msgspec.Struct, frozen=True, array_like=True):
    """A sequence as it is now, under its number among those that its router has taken."""

    number: Count
    sample: SequenceSample


class HandedOver(msgspec.Struct, frozen=True, array_like=True):
    """So many hand-overs have ended, and the tokens and seconds of all of them."""

    count: Count = 0
    num_tokens: Count = 0
    duration_s: Seconds = 0.0


class WorkloadReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was noted since the report before, each in order of time.

    Times are of the monotonic clock that all processes of a host share.
    """

    arrivals: tuple[Arrival, ...] = ()
    starts: tuple[Started, ...] = ()
    answers: tuple[Answered, ...] = ()
    num_ended: Count = 0
    """Answers that have ended; ``answers`` are the last of them."""
    taken: tuple[ReportedSample, ...] = ()
    changed: tuple[ReportedSample, ...] = ()
    """Sequences that were taken since, and those taken before that have changed."""
    handed_over: HandedOver = HandedOver()
