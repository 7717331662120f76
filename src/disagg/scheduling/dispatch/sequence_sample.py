"""A sequence as a sample of the workload."""

import msgspec


class SequenceSample(msgspec.Struct, array_like=True):
    """A sequence of the workload; of its prompt, so many tokens were computed, of its answer so many came till now."""

    arrival_s: float
    num_computed_tokens: int
    num_prompt_tokens: int
    num_answer_tokens: int = 0
    has_ended: bool = False
    has_kept: bool = False
    """It has ended within its objectives."""
