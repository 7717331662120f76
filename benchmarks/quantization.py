"""What weight-only int8 costs in accuracy: logits, the choice of the next token, and perplexity against float32.

    .venv/bin/python benchmarks/quantization.py [MODEL] [--windows 8] [--tokens 512]

Text is the reference manual that Python carries. bfloat16 stands beside int8, since both are compared with float32.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pydoc_data.topics import topics

import torch

from disagg.base.config import DType, Quantization
from disagg.engine.benchmark.cases import Phase, StepCase
from disagg.engine.benchmark.engine_benchmark import EngineBenchmark, make_batch, prepare
from disagg.models.locate import locate_model
from disagg.models.tokenizer import load_tokenizer

BLOCK_SIZE = 32


def windows(model: str | None, count: int, num_tokens: int) -> Iterator[torch.Tensor]:
    """Yield pieces of text of equal length, as token ids."""
    text = "\n".join(str(topics[name]) for name in sorted(topics))
    ids = load_tokenizer(locate_model(model)).encode(text[: count * num_tokens * 8])
    for start in range(count):
        yield torch.tensor(ids[start * num_tokens : (start + 1) * num_tokens])


def logits_of(ready: EngineBenchmark, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the logits after every token, float32 [tokens, vocabulary]."""
    length = len(token_ids)
    batch = make_batch(StepCase(Phase.PREFILL, 1, length, length), BLOCK_SIZE)
    batch = replace(batch, token_ids=token_ids, logit_rows=torch.arange(length))
    return ready.decoder.forward(batch, ready.make_pool(-(-length // BLOCK_SIZE))).float()


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    texts = list(windows(options.model, options.windows, options.tokens))
    settings = {
        "float32": (DType.FLOAT32, None),
        "bfloat16": (DType.BFLOAT16, None),
        "int8, bfloat16 activations": (DType.BFLOAT16, Quantization.INT8),
    }
    reference: list[torch.Tensor] = []
    for name, (dtype, quantization) in settings.items():
        files = locate_model(options.model)
        ready = prepare(files, dtype=dtype, quantization=quantization, num_threads=2, block_size=BLOCK_SIZE)
        found = [logits_of(ready, text) for text in texts]
        reference = reference or found
        loss = sum(
            torch.nn.functional.cross_entropy(one[:-1], text[1:]).item() for one, text in zip(found, texts, strict=True)
        )
        error = torch.cat([(one - other).flatten() for one, other in zip(found, reference, strict=True)])
        scale = torch.cat([one.flatten() for one in reference]).std()
        same = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in zip(found, reference, strict=True)])
        print(
            f"{name:<28} logits off by {error.std() / scale:7.2%} of their spread, at most {error.abs().max():6.2f}; "
            f"same choice {same.float().mean():6.1%}; perplexity {math.exp(loss / len(texts)):7.3f}"
        )


if __name__ == "__main__":
    main()
