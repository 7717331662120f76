"""The steps that are measured, and the floors below which no engine can get on a given machine."""

import enum
from dataclasses import dataclass

from disagg.engine.benchmark.peaks import MachinePeaks
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
    """Bytes of an element of the weight matrices, on average, and of the KV cache."""

    weight: float
    cache: int


@dataclass(frozen=True, slots=True)
class StepCase:
    """A step of ``batch`` sequences: ``new_tokens`` each, ending at ``context`` tokens."""

    phase: Phase
    batch: int
    new_tokens: int
    context: int

    def products(self, config: ModelConfig, sizes: ElementSizes) -> "StepCost":
        """Return the products with weights: every weight that is needed read once, one logit row a sequence."""
        num_tokens = self.batch * self.new_tokens
        flops = config.linear_flops(num_tokens, self.batch)
        return StepCost(flops, round(config.num_read_parameters(num_tokens) * sizes.weight))

    def attention(self, config: ModelConfig, sizes: ElementSizes) -> "StepCost":
        """Return the attention: the whole KV cache of the sequences read once."""
        flops = self.batch * config.attention_flops(self.new_tokens, self.context)
        return StepCost(flops, self.batch * self.context * config.kv_bytes_per_token(sizes.cache))


@dataclass(frozen=True, slots=True)
class StepCost:
    """Floating-point operations, and the bytes that must be read for them."""

    flops: int
    read_bytes: int

    def __add__(self, other: "StepCost") -> "StepCost":
        return StepCost(self.flops + other.flops, self.read_bytes + other.read_bytes)

    def floors_s(self, peaks: MachinePeaks) -> tuple[float, float]:
        """Return the least time that the operations take, and the least that the bytes take."""
        return self.flops / peaks.gemm_flops, self.read_bytes / peaks.read_bandwidth


@dataclass(frozen=True, slots=True)
class StepTime:
    """A measured step beside its floors, all in seconds."""

    case: StepCase
    time_s: float
    compute_floor_s: float
    memory_floor_s: float
    in_turn_floor_s: float
    """The same for products and attention one after the other, neither using what the other leaves of the machine."""

    @property
    def limit(self) -> Limit:
        """The floor that counts."""
        return Limit.COMPUTE if self.compute_floor_s >= self.memory_floor_s else Limit.MEMORY

    @property
    def share(self) -> float:
        """The higher floor as a share of the measured time: 1 is the machine's limit."""
        return max(self.compute_floor_s, self.memory_floor_s) / self.time_s

    @property
    def share_in_turn(self) -> float:
        """The floor of products and attention one after the other as a share of the measured time."""
        return self.in_turn_floor_s / self.time_s


def with_floors(
    case: StepCase, time_s: float, config: ModelConfig, peaks: MachinePeaks, sizes: ElementSizes
) -> StepTime:
    """Put a measured time beside what the machine could do at best."""
    products, attention = case.products(config, sizes), case.attention(config, sizes)
    compute_s, memory_s = (products + attention).floors_s(peaks)
    in_turn_s = max(products.floors_s(peaks)) + max(attention.floors_s(peaks))
    return StepTime(case, time_s, compute_s, memory_s, in_turn_s)


def standard_cases(max_model_len: int, quick: bool) -> list[StepCase]:
    """Return prefills of growing prompts and decodes over batch size and context, as far as the model reaches."""
    prompts = (512,) if quick else (128, 512, 1024, 2048)
    batches = (1, 16) if quick else (1, 4, 16, 32, 64)
    contexts = (1024,) if quick else (256, 1024, 4096)
    prefills = [StepCase(Phase.PREFILL, 1, length, length) for length in prompts]
    decodes = [StepCase(Phase.DECODE, batch, 1, context) for batch in batches for context in contexts]
    return [case for case in prefills + decodes if case.context <= max_model_len]
