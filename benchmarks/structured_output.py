"""What a JSON schema costs a token, part by part, beside the step that it belongs to.

    .venv/bin/python benchmarks/structured_output.py [MODEL] [--context 512] [--rounds 60] [--threads 2] [--cpu-time]

The steps are the engine's own: forward pass and choice of the tokens; the parts are finding the tokens that the schema
allows, forbidding the others, and taking the ones chosen. The text is what the model writes over a KV pool of noise, so
that the matchers meet likely and unlikely tokens. ``--cpu-time`` reads the CPU time of one thread (``--threads 1``).
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import pairwise

import llguidance
import numpy as np
import torch

from disagg.base.config import DType
from disagg.base.sampling import SamplingParams
from disagg.engine.benchmark.cases import Phase, StepCase
from disagg.engine.benchmark.engine_benchmark import EngineBenchmark, make_batch, prepare
from disagg.engine.grammar import GrammarState
from disagg.engine.model.adjustments import SamplingRow
from disagg.engine.model.sampler import chooser_of, sample
from disagg.models.grammar import GrammarCompiler
from disagg.models.locate import load_config, locate_model
from disagg.models.tokenizer import load_tokenizer

BLOCK_SIZE = 64
EOS = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "unit": {"enum": ["metre", "foot"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "place": {"type": "object", "properties": {"city": {"type": "string"}, "zip": {"pattern": "^[0-9]{5}$"}}},
    },
    "required": ["name", "age", "unit", "tags", "place"],
    "additionalProperties": False,
}
GRAMMAR = json.dumps({"grammars": [{"json_schema": SCHEMA}]})


class Documents:
    """The grammar states of a batch: a document that is complete is followed by the next."""

    def __init__(self, compiler: GrammarCompiler, count: int) -> None:
        self._compiler = compiler
        self.states = [self._begin() for _ in range(count)]

    def accept(self, tokens: Sequence[int]) -> None:
        """Note the batch's next tokens."""
        for index, token in enumerate(tokens):
            state = self.states[index]
            if token != EOS:
                state.accept(token)
            if token == EOS or state.is_complete:
                self.states[index] = self._begin()

    def _begin(self) -> GrammarState:
        compiled: Future[llguidance.LLMatcher] = Future()
        compiled.set_result(self._compiler.compile(GRAMMAR))
        return GrammarState(compiled, ())


def measure(ready: EngineBenchmark, compiler: GrammarCompiler, count: int, options: argparse.Namespace) -> None:
    """Print one batch size: medians over steps."""
    clock = time.thread_time if options.cpu_time else time.perf_counter
    pool = ready.make_pool(count * -(-options.context // BLOCK_SIZE))
    batch = make_batch(StepCase(Phase.DECODE, count, 1, options.context), BLOCK_SIZE)
    chooser = chooser_of(ready.backend)
    assert chooser is not None, "the native kernels are not built"
    documents = Documents(compiler, count)
    params = [SamplingParams(max_tokens=1, seed=index, temperature=0.8, top_p=0.95) for index in range(count)]
    numbers = np.arange(count)
    times: dict[str, list[float]] = {name: [] for name in ("step", "find", "forbid", "take")}
    for position in range(options.rounds + 3):
        rows = [SamplingRow(one, range(position)) for one in params]
        allowed = np.zeros((count, -(-ready.config.vocab_size // 32)), dtype=np.uint32)
        stamps = [clock()]
        logits = ready.decoder.forward(batch, pool)
        stamps.append(clock())
        for state, bits in zip(documents.states, allowed, strict=True):
            state.fill(bits)
        stamps.append(clock())
        chooser.forbid(logits, numbers, allowed)
        stamps.append(clock())
        tokens = [token.token_id for token in sample(logits, rows, chooser) if token is not None]
        stamps.append(clock())
        documents.accept(tokens)
        stamps.append(clock())
        forward_s, find_s, forbid_s, choice_s, take_s = (after - before for before, after in pairwise(stamps))
        for name, seconds in zip(times, (forward_s + choice_s, find_s, forbid_s, take_s), strict=True):
            times[name].append(seconds)
        batch.token_ids.copy_(torch.tensor(tokens))
    step_s, *parts_s = (statistics.median(values[3:]) for values in times.values())
    parts = ", ".join(
        f"{name} {part / count * 1e6:5.1f}" for name, part in zip(("find", "forbid", "take"), parts_s, strict=True)
    )
    print(
        f"batch {count:3d}: step {step_s * 1e3:6.2f} ms; a token costs {sum(parts_s) / count * 1e6:5.1f} us ({parts}), "
        f"{sum(parts_s) / step_s:5.2%} of the step"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    files = locate_model(options.model)
    ready = prepare(files, dtype=DType.BFLOAT16, num_threads=options.threads, block_size=BLOCK_SIZE)
    compiler = GrammarCompiler(load_tokenizer(files), load_config(files).vocab_size, (EOS,))
    started_s = time.perf_counter()
    compiler.compile(GRAMMAR)
    print(f"vocabulary and grammar compiled in {time.perf_counter() - started_s:.2f} s, once for each instance")
    with torch.inference_mode():
        for count in (1, 16, 32):
            measure(ready, compiler, count, options)


if __name__ == "__main__":
    main()
