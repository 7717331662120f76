"""A sequence as a sample of the workload."""

import msgspec

from disagg.base.message_fields import Count, Seconds


class SequenceSample(msgspec.Struct, array_like=True):
    """A sequence of the workload; of its prompt, so many tokens were computed, of its answer so many came till now."""

    arrival_s: Seconds
    num_computed_tokens: Count
    num_prompt_tokens: Count
    num_answer_tokens: Count = 0
    has_ended: bool = False
    has_kept: bool = False
    """It has ended within its objectives."""

    def become(self, later: "SequenceSample") -> None:
        """Take over what became of it."""
        self.num_computed_tokens, self.num_answer_tokens = later.num_computed_tokens, later.num_answer_tokens
        self.has_ended, self.has_kept = later.has_ended, later.has_kept
