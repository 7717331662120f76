"""The executor with a real model: decoder, sampler and KV store."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch

from disagg.base.ids import BlockId
from disagg.base.messages import FailureKind
from disagg.base.sampling import PositionLogprobs
from disagg.engine.batch_builder import BatchBuilder, num_prompt_rows
from disagg.engine.executor import ChunkResult
from disagg.engine.kv_store import KvStore
from disagg.engine.model.adjustments import SamplingRow
from disagg.engine.model.decoder import StepDecoder
from disagg.engine.model.logprobs import position_logprobs
from disagg.engine.model.sampler import chooser_of, sample
from disagg.engine.sequences import LiveSequence, SequenceFailure, Work
from disagg.transfer.step_progress import StepProgress


class ModelExecutor:
    """Runs steps of one decoder, which may count the layers of prompts in ``progress``. See ``Executor``."""

    def __init__(
        self, decoder: StepDecoder, store: KvStore, builder: BatchBuilder, progress: StepProgress | None = None
    ) -> None:
        self._decoder = decoder
        self._progress = progress
        self._store = store
        # A model's layers in their own order: in the pool those that slide come last, in blocks of their own.
        in_pool, in_block = decoder.config.pool_layers, len(store.layers)
        is_same = in_pool == tuple(range(in_block))
        self._kv = store.layers if is_same else tuple(store.layers[layer % in_block] for layer in in_pool)
        self._builder = builder
        self._chooser = chooser_of(decoder.backend)

    def run(self, step: Sequence[Work]) -> list[ChunkResult]:
        """See ``Executor.run``."""
        if torch.is_inference_mode_enabled():  # once for the whole loop: each time costs tens of microseconds
            return self._run(step)
        with torch.inference_mode():
            return self._run(step)

    def _run(self, step: Sequence[Work]) -> list[ChunkResult]:
        batch = self._builder.build(step)
        if self._progress is not None and batch.max_query_len > 1:
            batch = replace(batch, progress=self._progress.take())
        logits = self._decoder.forward(batch, self._kv)
        if batch.most_likely is not None and all(work.sequence.takes_most_likely for work in step):
            token_ids = batch.most_likely.tolist()
            if min(token_ids, default=0) >= 0:
                found = iter(token_ids)
                return [ChunkResult(next(found) if work.chunk.samples else None) for work in step]
        rows = [_row(work.sequence) for work in step if work.chunk.samples]
        prompt_logprobs = _prompt_logprobs(step, logits, len(rows))
        # Even a view that changes nothing costs microseconds.
        sampled = logits if logits.shape[0] == len(rows) else logits[: len(rows)]
        known = None if batch.most_likely is None else batch.most_likely[: len(rows)]
        tokens = sample(sampled, rows, self._chooser, known)
        places = iter(range(len(rows)))
        results = []
        for work, of_prompt in zip(step, prompt_logprobs, strict=True):
            place = next(places) if work.chunk.samples else None
            if isinstance(of_prompt, SequenceFailure):
                results.append(ChunkResult(failure=of_prompt))
            elif place is None:
                results.append(ChunkResult(prompt_logprobs=of_prompt))
            elif (token := tokens[place]) is None:
                results.append(ChunkResult(failure=_why_unsampled(rows[place], sampled[place])))
            else:
                results.append(ChunkResult(token.token_id, token.logprobs, of_prompt))
        return results

    def publish_blocks(self, blocks: Sequence[BlockId]) -> None:
        """See ``Executor.publish_blocks``."""
        self._store.publish(blocks)

    def receive_blocks(self, blocks: Sequence[BlockId]) -> None:
        """See ``Executor.receive_blocks``."""
        self._store.receive(blocks)


def _row(sequence: LiveSequence) -> SamplingRow:
    """Return the sampler's view of a sequence, with all its tokens."""
    row = sequence.row
    if row is None:
        request = sequence.request
        row = sequence.row = SamplingRow(
            request.sampling,
            request.prompt_token_ids,
            request.output_token_ids,
            request.eos_token_ids,
            sequence.grammar,
        )
    row.extend(sequence.tokens[row.position : sequence.num_tokens])
    return row


def _prompt_logprobs(
    step: Sequence[Work], logits: torch.Tensor, first_row: int
) -> list[tuple[PositionLogprobs, ...] | SequenceFailure]:
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
    logprobs = iter(position_logprobs(logits[first_row:].float(), token_ids, nums_top))
    found: list[tuple[PositionLogprobs, ...] | SequenceFailure] = []
    for work, count in zip(step, counts, strict=True):
        of_chunk = list(islice(logprobs, count))
        sound = tuple(position for position in of_chunk if position is not None)
        found.append(sound if len(sound) == count else _broken_model(work.chunk.start + 1 + of_chunk.index(None)))
    return found


def _why_unsampled(row: SamplingRow, logits: torch.Tensor) -> SequenceFailure:
    if row.grammar is not None and row.grammar.failure:
        return SequenceFailure(FailureKind.INVALID, row.grammar.failure)
    if not row.is_to_blame(logits):
        return _broken_model(row.position)
    return SequenceFailure(
        FailureKind.INVALID,
        f"the sampling parameters leave no token to choose for position {row.position}: "
        "ease the penalties, 'logit_bias', 'allowed_token_ids', 'bad_words', or 'stop_token_ids' with 'min_tokens'",
    )


def _broken_model(position: int) -> SequenceFailure:
    return SequenceFailure(
        FailureKind.INTERNAL,
        f"the model's logits for the token at position {position} hold NaN or infinity: its weights do not go with "
        "this text, or are broken",
    )
