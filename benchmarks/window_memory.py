"""The KV memory of a sequence in models with sliding windows: all layers kept, and what the step scheduler holds.

    .venv/bin/python benchmarks/window_memory.py

Shapes are Gemma 3's, 16 bits an element, blocks of 64 tokens. A scheduler is given one sequence: a prompt in chunks of
512 tokens, then an answer of 200. What it holds is counted step by step, not computed from a formula.
"""

from disagg.base.config import SchedulerSettings
from disagg.base.ids import Epoch, RequestId
from disagg.base.sampling import FinishReason
from disagg.base.units import format_bytes
from disagg.models.known_shapes import KNOWN_SHAPES
from disagg.models.shape import ModelShape
from disagg.scheduling.step.actions import RunStep
from disagg.scheduling.step.events import AnyEvent, Arrived, StepDone, StepResult
from disagg.scheduling.step.kv_ledger import KvMemory
from disagg.scheduling.step.scheduler import StepScheduler

MODELS = ("gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b")
CONTEXTS = (1024, 8192, 32_768, 131_072)
ITEMSIZE, BLOCK, ANSWER = 2, 64, 200
NAME = RequestId("one")


def held_bytes(shape: ModelShape, context: int, *, slides: bool) -> tuple[int, int]:
    """Return the bytes that a sequence holds before its last token, and the most that it held."""
    num_layers = shape.block_layers if slides else shape.num_layers
    block_bytes = BLOCK * 2 * num_layers * shape.kv_size * ITEMSIZE
    memory = KvMemory(window=shape.window_blocks if slides else None)
    settings = SchedulerSettings(max_batch_tokens=512)
    scheduler = StepScheduler(settings, 10 * context // BLOCK, BLOCK, prefix_caching=False, memory=memory)
    event: AnyEvent = Arrived(request_id=NAME, epoch=Epoch(1), num_tokens=context - ANSWER, max_total_tokens=context)
    held, now = [], 0.0
    while True:
        now += 1.0
        steps = [action for action in scheduler.handle([event], now) if isinstance(action, RunStep)]
        if not steps:
            return held[-1] * block_bytes, max(held) * block_bytes
        held.append(scheduler.num_held_blocks)
        (chunk,) = steps[0].chunks
        is_last = chunk.start + chunk.num_tokens + 1 == context
        result = StepResult(NAME, FinishReason.LENGTH if is_last else None)
        event = StepDone(step_id=steps[0].step_id, results=(result,) if chunk.samples else ())


def main() -> None:
    print("| model | context | all layers | held | share | at most |")
    print("|---|---|---|---|---|---|")
    for model in MODELS:
        shape = KNOWN_SHAPES[model]
        for context in CONTEXTS:
            if context <= shape.max_position_embeddings:
                before, _ = held_bytes(shape, context, slides=False)
                after, most = held_bytes(shape, context, slides=True)
                figures = (
                    f"{format_bytes(before)} | {format_bytes(after)} | {after / before:.2f} | {format_bytes(most)}"
                )
                print(f"| {model} | {context:,} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
