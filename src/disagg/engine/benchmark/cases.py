"""The steps that are measured, and the floors below which no engine can get on a given machine."""

import enum
from dataclasses import dataclass

from disagg.engine.benchmark.machine import MachinePeaks
from disagg.models.config import ModelConfig


class Phase(enum.Enum):
    """What a step computes."""

    PREFILL = "prefill"
    DECODE = "decode"


class Limit(enum.Enum):
    """Which floor is the higher one."""

    COMPUTE = "compute"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class ElementSizes:
    """Bytes of an element of the weight matrices and of the KV cache."""

    weight: int
    cache: int


@dataclass(frozen=True, slots=True)
class StepCase:
    """A step of ``batch`` sequences: ``new_tokens`` each, ending at ``context`` tokens."""

    phase: Phase
    batch: int
    new_tokens: int
    context: int

    def flops(self, config: ModelConfig) -> int:
        """Return the floating-point operations of the step, attention counted, one logit row a sequence."""
        attention = config.attention_flops(self.new_tokens, self.context)
        return config.linear_flops(self.batch * self.new_tokens, self.batch) + self.batch * attention

    def read_bytes(self, config: ModelConfig, sizes: ElementSizes) -> int:
        """Return the bytes that must be read: every weight of the matrix products once, and the KV cache."""
        cached = self.batch * self.context * config.kv_bytes_per_token(sizes.cache)
        return config.num_linear_parameters * sizes.weight + cached


@dataclass(frozen=True, slots=True)
class StepTime:
    """A measured step beside its floors, all in seconds."""

    case: StepCase
    time_s: float
    compute_floor_s: float
    memory_floor_s: float

    @property
    def limit(self) -> Limit:
        """The floor that counts."""
        return Limit.COMPUTE if self.compute_floor_s >= self.memory_floor_s else Limit.MEMORY

    @property
    def share(self) -> float:
        """The higher floor as a share of the measured time: 1 is the machine's limit."""
        return max(self.compute_floor_s, self.memory_floor_s) / self.time_s


def with_floors(
    case: StepCase, time_s: float, config: ModelConfig, peaks: MachinePeaks, sizes: ElementSizes
) -> StepTime:
    """Put a measured time beside what the machine could do at best."""
    return StepTime(
        case=case,
        time_s=time_s,
        compute_floor_s=case.flops(config) / peaks.gemm_flops,
        memory_floor_s=case.read_bytes(config, sizes) / peaks.read_bandwidth,
    )


def standard_cases(max_model_len: int, quick: bool) -> list[StepCase]:
    """Return prefills of growing prompts and decodes over batch size and context, as far as the model reaches."""
    prompts = (512,) if quick else (128, 512, 1024, 2048)
    batches = (1, 16) if quick else (1, 4, 16, 32, 64)
    contexts = (1024,) if quick else (256, 1024, 4096)
    prefills = [StepCase(Phase.PREFILL, 1, length, length) for length in prompts]
    decodes = [StepCase(Phase.DECODE, batch, 1, context) for batch in batches for context in contexts]
    return [case for case in prefills + decodes if case.context <= max_model_len]
