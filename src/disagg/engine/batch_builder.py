"""From a step's chunks to the tensors that the decoder reads, through buffers that are filled again each step."""

from collections.abc import Sequence

import numpy as np
import torch

from disagg.engine.executor import Work
from disagg.engine.kernels.interface import StepBatch


class _Buffer:
    """A flat tensor that grows when a step needs more, and NumPy's view of it."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self._tensor = torch.zeros(size, dtype=dtype)
        self.array = self._tensor.numpy()

    def reserve(self, size: int) -> None:
        if size > len(self.array):
            self._tensor = torch.zeros(max(size, 2 * len(self.array)), dtype=self._tensor.dtype)
            self.array = self._tensor.numpy()

    def tensor(self, size: int, device: torch.device) -> torch.Tensor:
        """Return the first ``size`` elements, on ``device``: on CPU without a copy."""
        return self._tensor[:size].to(device)


class BatchBuilder:
    """Builds a StepBatch of each step. It is valid until the next one is built."""

    def __init__(self, max_tokens: int, max_sequences: int, max_blocks: int, device: torch.device) -> None:
        """The limits are those of a usual step; ``max_blocks`` is that of one sequence."""
        self._device = device
        self._tokens = _Buffer(max_tokens, torch.int64)
        self._positions = _Buffer(max_tokens, torch.int32)
        self._query_start = _Buffer(max_sequences + 1, torch.int32)
        self._context_lens = _Buffer(max_sequences, torch.int32)
        self._tables = _Buffer(max_sequences * max_blocks, torch.int32)

    def build(self, step: Sequence[Work]) -> StepBatch:
        """Return the batch of one step.

        ``logit_rows`` are first the last rows of the chunks that sample, then those that predict wanted prompt
        tokens, each in the order of the chunks.
        """
        num_sequences = len(step)
        starts = np.fromiter((work.chunk.start for work in step), np.int32, num_sequences)
        lengths = np.fromiter((work.chunk.num_tokens for work in step), np.int32, num_sequences)
        row_ends = lengths.cumsum(dtype=np.int32)
        num_tokens = int(row_ends[-1])
        self._fill_sequences(starts, lengths, row_ends)
        self._fill_tokens(step, starts, lengths, row_ends)
        width = self._fill_tables(step)
        rows = torch.from_numpy(_logit_rows(step, row_ends - lengths))
        device = self._device
        return StepBatch(
            token_ids=self._tokens.tensor(num_tokens, device),
            positions=self._positions.tensor(num_tokens, device),
            query_start=self._query_start.tensor(num_sequences + 1, device),
            context_lens=self._context_lens.tensor(num_sequences, device),
            block_tables=self._tables.tensor(num_sequences * width, device).view(num_sequences, width),
            logit_rows=rows.to(device),
            max_query_len=int(lengths.max()),
            max_context_len=int((starts + lengths).max()),
        )

    def _fill_sequences(self, starts: np.ndarray, lengths: np.ndarray, row_ends: np.ndarray) -> None:
        num_sequences = len(starts)
        self._query_start.reserve(num_sequences + 1)
        self._context_lens.reserve(num_sequences)
        self._query_start.array[1 : num_sequences + 1] = row_ends
        self._context_lens.array[:num_sequences] = starts + lengths

    def _fill_tokens(self, step: Sequence[Work], starts: np.ndarray, lengths: np.ndarray, row_ends: np.ndarray) -> None:
        num_tokens = int(row_ends[-1])
        self._tokens.reserve(num_tokens)
        self._positions.reserve(num_tokens)
        tokens, positions = self._tokens.array, self._positions.array
        if num_tokens == len(step):
            tokens[:num_tokens] = [work.sequence.tokens[work.chunk.start] for work in step]
            positions[:num_tokens] = starts
            return
        for work, end, length in zip(step, row_ends.tolist(), lengths.tolist(), strict=True):
            first = work.chunk.start
            tokens[end - length : end] = work.sequence.tokens[first : first + length]
        positions[:num_tokens] = np.arange(num_tokens) + (starts - row_ends + lengths).repeat(lengths)

    def _fill_tables(self, step: Sequence[Work]) -> int:
        tables = [work.sequence.block_table(work.chunk.block_ids) for work in step]
        width = max(map(len, tables))
        self._tables.reserve(len(step) * width)
        flat = self._tables.array[: len(step) * width]
        flat.fill(0)
        for row, table in zip(flat.reshape(len(step), width), tables, strict=True):
            row[: len(table)] = table
        return width


def num_prompt_rows(work: Work) -> int:
    """Return how many rows of a chunk predict prompt tokens whose log-probabilities are wanted."""
    if not work.sequence.wants_prompt_logprobs:
        return 0
    return max(0, min(work.chunk.num_tokens, work.sequence.num_prompt_tokens - 1 - work.chunk.start))


def _logit_rows(step: Sequence[Work], first_rows: np.ndarray) -> np.ndarray:
    rows = [
        first + work.chunk.num_tokens - 1
        for work, first in zip(step, first_rows.tolist(), strict=True)
        if work.chunk.samples
    ]
    for work, first in zip(step, first_rows.tolist(), strict=True):
        if work.sequence.sampling.prompt_logprobs is not None:
            rows.extend(range(first, first + num_prompt_rows(work)))
    return np.array(rows, dtype=np.int64)
