"""What coded and converted KV blocks cost in accuracy.

The second half of real texts is read over a first half that was handed over.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pydoc_data.topics import topics
from typing import Final

import torch

from disagg.base.ids import BlockId
from disagg.cache.layout import KvLayout
from disagg.engine.benchmark.cases import Phase, StepCase
from disagg.engine.benchmark.engine_benchmark import EngineBenchmark, make_batch
from disagg.models.locate import ModelFiles
from disagg.models.tokenizer import load_tokenizer
from disagg.transfer.block_forms import BlockForms
from disagg.transfer.int8_codec import Int8Codec, ScaleOf

_CHARACTERS_OF_TOKEN: Final = 8
"""More than any text has."""

Coding = Callable[[torch.Tensor, KvLayout], None]
"""Changes a pool as sending all of it would."""


@dataclass(frozen=True, slots=True)
class KvQuality:
    """One coding beside the blocks as they are, over all tokens of the second halves."""

    coding: str
    bytes_share: float
    """Coded bytes for each byte of the pool."""
    logit_error: float
    """Standard deviation of the logits' error over that of the logits."""
    largest_error: float
    same_choice: float
    """Share of positions whose most likely token is the same."""
    perplexity: float


def texts_of(files: ModelFiles, count: int, num_tokens: int) -> list[torch.Tensor]:
    """Return pieces of the reference manual that Python carries, as token ids."""
    text = "\n".join(str(topics[name]) for name in sorted(topics))
    ids = load_tokenizer(files).encode(text[: count * num_tokens * _CHARACTERS_OF_TOKEN])
    return [torch.tensor(ids[start * num_tokens : (start + 1) * num_tokens]) for start in range(count)]


def measure_quality(ready: EngineBenchmark, texts: Sequence[torch.Tensor]) -> Iterator[KvQuality]:
    """Yield each coding's figures, that of the blocks as they are first. Halves of texts should fill whole blocks."""
    num_blocks = -(-len(texts[0]) // ready.block_size)
    layout = ready.layout(num_blocks)
    reference = [_second_half(ready, text, lambda pool, layout: None) for text in texts]
    yield _compare("raw", 1.0, reference, reference, texts)
    for key_scales in ScaleOf:
        for value_scales in ScaleOf:
            try:
                codec = Int8Codec(layout, key_scales=key_scales, value_scales=value_scales)
            except ValueError:  # the kernels' order of elements has no such rows
                continue
            found = [_second_half(ready, text, _through(codec)) for text in texts]
            name = f"int8, K by {key_scales.value}, V by {value_scales.value}"
            yield _compare(name, codec.ratio, found, reference, texts)


def measure_kinds(
    prefill: EngineBenchmark, decode: EngineBenchmark, texts: Sequence[torch.Tensor]
) -> Iterator[KvQuality]:
    """Yield what decode computes alone, what prefill does, and decode over the blocks of prefill, converted.

    Logits are compared with those of decode alone.
    """
    reference = [_second_half(decode, text, lambda pool, layout: None) for text in texts]
    yield _compare("decode's kind alone", 1.0, reference, reference, texts)
    alone = [_second_half(prefill, text, lambda pool, layout: None) for text in texts]
    yield _compare("prefill's kind alone", 1.0, alone, reference, texts)
    theirs, ours = prefill.layout(1), decode.layout(1)
    found = [_second_half(decode, text, _converted(prefill, text)) for text in texts]
    yield _compare(
        "prefill's, then decode's", theirs.layer_block_bytes / ours.layer_block_bytes, found, reference, texts
    )


def _converted(prefill: EngineBenchmark, text: torch.Tensor) -> Coding:
    """Return what puts the blocks that another kind makes of a text's first half into a pool."""

    def take(pool: torch.Tensor, layout: KvLayout) -> None:
        theirs = prefill.layout(layout.num_blocks)
        source = _first_half(prefill, text, theirs.num_blocks)
        blocks, layers = [BlockId(block) for block in range(layout.num_blocks)], range(layout.num_layers)
        starts = [theirs.offset(layer, block) for layer in layers for block in blocks]
        BlockForms(theirs, layout).convert(_bytes_of(source), starts, _bytes_of(pool), layers, blocks)

    return take


def _bytes_of(pool: torch.Tensor) -> memoryview:
    return memoryview(pool.view(torch.uint8).flatten().numpy().data)


def _through(codec: Int8Codec) -> Coding:
    def send(pool: torch.Tensor, layout: KvLayout) -> None:
        data = _bytes_of(pool)
        blocks, layers = [BlockId(block) for block in range(layout.num_blocks)], range(layout.num_layers)
        coded = memoryview(bytearray(codec.layer_bytes * len(blocks) * len(layers)))
        codec.encode(data, layers, blocks, coded)
        codec.decode(coded, layers, blocks, data)

    return send


def _second_half(ready: EngineBenchmark, text: torch.Tensor, send: Coding) -> torch.Tensor:
    """Return the logits after each token of the second half, float32 [tokens, vocabulary]."""
    length = len(text)
    pool = _first_half(ready, text, -(-length // ready.block_size))
    send(pool, ready.layout(pool.shape[1]))
    return _forward(ready, text, pool, (length // 2, length))


def _first_half(ready: EngineBenchmark, text: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Return a pool with the KV blocks of the first half."""
    pool = ready.make_pool(num_blocks)
    _forward(ready, text, pool, (0, len(text) // 2))
    return pool


def _forward(ready: EngineBenchmark, text: torch.Tensor, pool: torch.Tensor, part: tuple[int, int]) -> torch.Tensor:
    """Compute the tokens from the first place to the second; return the logits after each."""
    (start, end), length = part, len(text)
    table = make_batch(StepCase(Phase.PREFILL, 1, length, length), ready.block_size).block_tables
    batch = make_batch(StepCase(Phase.PREFILL, 1, end - start, end), ready.block_size)
    batch = replace(batch, token_ids=text[start:end], block_tables=table, logit_rows=torch.arange(end - start))
    return ready.decoder.forward(batch, pool).float()


def _compare(
    coding: str,
    bytes_share: float,
    found: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    texts: Sequence[torch.Tensor],
) -> KvQuality:
    error = torch.cat([(one - other).flatten() for one, other in zip(found, reference, strict=True)])
    spread = torch.cat([one.flatten() for one in reference]).std()
    same = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in zip(found, reference, strict=True)])
    losses = [
        torch.nn.functional.cross_entropy(one[:-1], text[len(text) // 2 + 1 :]).item()
        for one, text in zip(found, texts, strict=True)
    ]
    return KvQuality(
        coding=coding,
        bytes_share=bytes_share,
        logit_error=float(error.std() / spread),
        largest_error=float(error.abs().max()),
        same_choice=float(same.float().mean()),
        perplexity=math.exp(sum(losses) / len(losses)),
    )
