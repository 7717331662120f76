"""The executor with a real model: decoder, sampler and KV store."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from weakref import WeakKeyDictionary

import torch

from disagg.base.ids import BlockId
from disagg.base.sampling import PositionLogprobs
from disagg.engine.batch_builder import BatchBuilder, num_prompt_rows
from disagg.engine.executor import ChunkResult, Work
from disagg.engine.kv_store import KvStore
from disagg.engine.model.adjustments import SamplingRow
from disagg.engine.model.decoder import Decoder
from disagg.engine.model.logprobs import position_logprobs
from disagg.engine.model.sampler import chooser_of, sample
from disagg.engine.sequences import LiveSequence


class ModelExecutor:
    """Runs steps of one decoder. See ``Executor``."""

    def __init__(self, decoder: Decoder, store: KvStore, builder: BatchBuilder) -> None:
        self._decoder = decoder
        self._store = store
        self._builder = builder
        self._chooser = chooser_of(decoder.backend)
        # The sampler's view of each sequence; it goes when the loop lets go of the sequence.
        self._rows: WeakKeyDictionary[LiveSequence, SamplingRow] = WeakKeyDictionary()

    @torch.inference_mode()
    def run(self, step: Sequence[Work]) -> list[ChunkResult]:
        """See ``Executor.run``."""
        logits = self._decoder.forward(self._builder.build(step), self._store.layers)
        rows = [self._row(work.sequence) for work in step if work.chunk.samples]
        prompt_logprobs = _prompt_logprobs(step, logits, len(rows))
        # Even a view that changes nothing costs microseconds.
        sampled = logits if logits.shape[0] == len(rows) else logits[: len(rows)]
        tokens = iter(sample(sampled, rows, self._chooser))
        results = []
        for work, of_prompt in zip(step, prompt_logprobs, strict=True):
            token = next(tokens) if work.chunk.samples else None
            results.append(
                ChunkResult(
                    token_id=token.token_id if token is not None else None,
                    logprobs=token.logprobs if token is not None else None,
                    prompt_logprobs=of_prompt,
                )
            )
        return results

    def publish_blocks(self, blocks: Sequence[BlockId]) -> None:
        """See ``Executor.publish_blocks``."""
        self._store.publish(blocks)

    def receive_blocks(self, blocks: Sequence[BlockId]) -> None:
        """See ``Executor.receive_blocks``."""
        self._store.receive(blocks)

    def _row(self, sequence: LiveSequence) -> SamplingRow:
        """Return the sampler's view of a sequence, with all its tokens."""
        row = self._rows.get(sequence)
        if row is None:
            request = sequence.request
            row = SamplingRow(
                request.sampling, request.prompt_token_ids, request.output_token_ids, request.eos_token_ids
            )
            self._rows[sequence] = row
        for token_id in sequence.tokens[row.position : sequence.num_tokens].tolist():
            row.append(token_id)
        return row


def _prompt_logprobs(step: Sequence[Work], logits: torch.Tensor, first_row: int) -> list[tuple[PositionLogprobs, ...]]:
    """Return each chunk's prompt log-probabilities; rows of ``logits`` from the first on predict them, in order."""
    counts = [num_prompt_rows(work) for work in step]
    if not any(counts):
        return [()] * len(step)
    token_ids: list[int] = []
    nums_top: list[int] = []
    for work, count in zip(step, counts, strict=True):
        first = work.chunk.start + 1
        token_ids += work.sequence.tokens[first : first + count].tolist()
        nums_top += [work.sequence.sampling.prompt_logprobs or 0] * count
    logprobs = position_logprobs(logits[first_row:].float(), token_ids, nums_top)
    bounds = list(accumulate(counts, initial=0))
    return [tuple(logprobs[start:end]) for start, end in pairwise(bounds)]
