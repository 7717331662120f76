"""What a JSON schema costs a token: decode steps with and without one in turn, and the parts of the difference.

    .venv/bin/python benchmarks/structured_output.py [MODEL] [--context 512] [--rounds 60] [--threads 2]

The steps are the engine's own: forward pass, masks, choice of the tokens, and the matchers that take them. The text is
what the model writes over a KV pool of noise, so that the matchers meet likely and unlikely tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future

import llguidance
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
        self.num_complete = 0

    def accept(self, tokens: Sequence[int]) -> None:
        """Note the batch's next tokens."""
        for index, token in enumerate(tokens):
            state = self.states[index]
            if token != EOS:
                state.accept(token)
            if token == EOS or state.is_complete:
                self.states[index] = self._begin()
                self.num_complete += 1

    def _begin(self) -> GrammarState:
        compiled: Future[llguidance.LLMatcher] = Future()
        compiled.set_result(self._compiler.compile(GRAMMAR))
        return GrammarState(compiled, ())


def measure(ready: EngineBenchmark, compiler: GrammarCompiler, count: int, context: int, rounds: int) -> None:
    """Print one batch size: medians over steps without and with the schema in turn."""
    pool = ready.make_pool(count * -(-context // BLOCK_SIZE))
    batch = make_batch(StepCase(Phase.DECODE, count, 1, context), BLOCK_SIZE)
    chooser = chooser_of(ready.backend)
    documents = Documents(compiler, count)
    params = [SamplingParams(max_tokens=context, seed=index, temperature=0.8, top_p=0.95) for index in range(count)]
    times: dict[bool, list[float]] = {False: [], True: []}
    for round_number in range(2 * rounds + 4):
        constrained = round_number % 2 == 1
        # Whether the sequences' rows are made anew costs the same for both.
        rows = [
            SamplingRow(one, range(round_number), grammar=state if constrained else None)
            for one, state in zip(params, documents.states, strict=True)
        ]
        started_s = time.perf_counter()
        chosen = sample(ready.decoder.forward(batch, pool), rows, chooser)
        tokens = [token.token_id for token in chosen if token is not None]
        if constrained:
            documents.accept(tokens)
        times[constrained].append(time.perf_counter() - started_s)
        batch.token_ids.copy_(torch.tensor(tokens))
    plain, masked = (statistics.median(times[kind][2:]) for kind in (False, True))
    print(
        f"batch {count:3d}: step {plain * 1e3:7.2f} ms, with a schema {masked * 1e3:7.2f} ms: "
        f"{(masked - plain) / count * 1e6:6.1f} us a token, {masked / plain - 1:6.1%} of the step "
        f"({documents.num_complete} documents)"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    files = locate_model(options.model)
    ready = prepare(files, dtype=DType.BFLOAT16, num_threads=options.threads, block_size=BLOCK_SIZE)
    compiler = GrammarCompiler(load_tokenizer(files), load_config(files).vocab_size, (EOS,))
    started_s = time.perf_counter()
    compiler.compile(GRAMMAR)
    print(f"vocabulary and grammar compiled in {time.perf_counter() - started_s:.2f} s, once for each instance")
    with torch.inference_mode():
        for count in (1, 16, 32):
            measure(ready, compiler, count, options.context, options.rounds)


if __name__ == "__main__":
    main()
