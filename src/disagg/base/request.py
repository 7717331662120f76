"""One sequence to generate, as the API hands it to the router and the router to an engine."""

import enum

import msgspec

from disagg.base.ids import BlockHash, Epoch, RequestId
from disagg.base.objectives import Objectives
from disagg.base.sampling import SamplingParams


class Role(enum.Enum):
    """What an instance is for. Any instance can compute any step; the role says which requests it is given."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"

    __hash__ = object.__hash__  # Enum's own is Python code, and every dispatch looks at the roles that there are


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence: ``n`` choices of an API request are ``n`` of these.

    ``output_token_ids`` are tokens that were generated before (a resumed sequence); ``max_tokens`` and
    ``min_tokens`` count from the first of them.
    """

    request_id: RequestId
    epoch: Epoch
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()
    block_hashes: tuple[BlockHash, ...] = ()
    """Names of the prompt's full KV blocks: see ``block_hash``. Without them, nothing of the sequence is reused."""
    hash_block_size: int = 0
    """Tokens of each of those blocks. Instances whose blocks hold a multiple of it take theirs from among them."""
    cache_salt: str = ""
    """Only sequences of the same salt share KV blocks."""
    priority: int = 0
    """Lower is served earlier, as in vLLM."""
    objectives: Objectives = Objectives()
    """What is missing here is as the server says."""
    tenant: str = ""
    """Who shares fairly with others; the router's business."""
    service_class: str = ""
    """Whose objectives and priority it has; the router's business, too."""
    arrival_s: float = 0.0
    """When the API received it: monotonic seconds of the API's host."""

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: prompt and earlier output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def max_total_tokens(self) -> int:
        """Most tokens that the sequence can ever have."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens
