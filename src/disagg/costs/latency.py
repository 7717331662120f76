"""How long a step takes: what of a step counts, and the interface of everything that predicts it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class ComputedChunk(Protocol):
    """One sequence's part of a step: tokens ``[start, start + num_tokens)``, and whether its next one is sampled."""

    @property
    def start(self) -> int:
        """Tokens before the chunk."""

    @property
    def num_tokens(self) -> int:
        """New tokens."""

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last known token."""


@dataclass(slots=True)
class StepShape:
    """What of a step its duration depends on. All fields are sums over the step's chunks.

    A chunk of one new token is a decode, a longer one prefill: that is what kernels distinguish. Attention's work in
    prefill is given as ``prefill_squares``, the sum of ``end**2 - start**2`` over chunks ``[start, end)``: the square
    of the length for a whole prompt, and twice its number of query-key pairs.
    """

    num_prefills: int = 0
    num_prefill_tokens: int = 0
    prefill_squares: int = 0
    num_decodes: int = 0
    decode_context: int = 0
    """Tokens that the decodes attend to, their own new one included."""
    num_samples: int = 0
    """Sequences whose next token is sampled."""

    @property
    def num_tokens(self) -> int:
        """New tokens of the step."""
        return self.num_prefill_tokens + self.num_decodes

    @classmethod
    def of(cls, chunks: Iterable[ComputedChunk]) -> "StepShape":
        """Sum up the chunks of one step."""
        shape = cls()
        num_decodes = decode_context = num_samples = 0
        for chunk in chunks:
            if chunk.num_tokens == 1:
                num_decodes += 1
                decode_context += chunk.start
                num_samples += chunk.samples
            else:
                shape.add_prefill(chunk.start, chunk.num_tokens, chunk.samples)
        shape.num_decodes = num_decodes
        shape.decode_context = decode_context + num_decodes
        shape.num_samples += num_samples
        return shape

    def add_prefill(self, start: int, num_tokens: int, samples: bool = True) -> None:
        """Add a chunk ``[start, start + num_tokens)`` of a prompt."""
        self.num_prefills += 1
        self.num_prefill_tokens += num_tokens
        self.prefill_squares += num_tokens * (num_tokens + 2 * start)
        self.num_samples += samples


class LatencyModel(Protocol):
    """Predicts the duration of a step on one instance (a tensor-parallel group of devices, or a pipeline of them)."""

    @property
    def num_stages(self) -> int:
        """Pipeline stages that a step passes one after the other."""

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """Return the seconds that a step keeps each stage busy, the sending to the next stage included."""


class PredictsRuns:
    """Base of latency models that predict a run of decode steps in one go, to the last bit as one by one."""

    def decode_run_s(self, shape: StepShape, count: int) -> list[float]:
        """Return the seconds of ``count`` steps, of a single stage and decodes alone, which start with this one.

        Each of them attends to one token more of every sequence than the one before.
        """
        raise NotImplementedError


class Pipeline:
    """The stages of one instance. Each serves one step at a time, in the order in which the steps entered."""

    def __init__(self, num_stages: int) -> None:
        self._free_at_s = [0.0] * num_stages

    def enter(self, now: float, stage_times_s: tuple[float, ...]) -> float:
        """Return when a step that may start at ``now`` leaves the last stage."""
        time_s = now
        for stage, duration_s in enumerate(stage_times_s):
            time_s = max(time_s, self._free_at_s[stage]) + duration_s
            self._free_at_s[stage] = time_s
        return time_s


@dataclass(frozen=True)
class ConstantLatency:
    """Every step takes the same time: for closed forms and tests."""

    step_s: float
    num_stages: int = 1

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """Return ``step_s`` in equal parts."""
        return (self.step_s / self.num_stages,) * self.num_stages
