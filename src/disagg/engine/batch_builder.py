"""From a step's chunks to the tensors that the decoder reads, through buffers that are filled again each step."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from disagg.base.ids import BlockId
from disagg.engine.kernels.interface import UNDECIDED, StepBatch
from disagg.engine.sequences import Work


class _Buffer:
    """A flat tensor that grows when a step needs more, and NumPy's view of it."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._is_copied = device.type != "cpu"
        self._last_shape: tuple[int, ...] = ()
        self._allocate(size, dtype)

    def reserve(self, size: int) -> None:
        if size > len(self.array):
            self._allocate(max(size, 2 * len(self.array)), self._tensor.dtype)

    def tensor(self, *shape: int) -> torch.Tensor:
        """Return as many of the first elements as the shape has, on the device: on CPU without a copy."""
        if shape != self._last_shape:
            self._last = self._tensor[: math.prod(shape)].view(shape)
            self._last_shape = shape
        return self._last.to(self._device) if self._is_copied else self._last

    def _allocate(self, size: int, dtype: torch.dtype) -> None:
        self._tensor = torch.zeros(size, dtype=dtype)
        self.array = self._tensor.numpy()
        # Most steps have the shape of the step before, and even a view costs microseconds.
        self._last = self._tensor
        self._last_shape = (size,)


class BatchBuilder:
    """Builds a StepBatch of each step. It is valid until the next one is built."""

    def __init__(
        self,
        max_tokens: int,
        max_sequences: int,
        max_blocks: int,
        device: torch.device,
        layer_tables: tuple[int, ...] = (),
    ) -> None:
        """The limits are those of a usual step; ``max_blocks`` is that of one sequence.

        For ``layer_tables`` see ``StepBatch``: the last of them that any layer has is how many others there are.
        """
        self._tokens = _Buffer(max_tokens, torch.int64, device)
        self._positions = _Buffer(max_tokens, torch.int32, device)
        self._query_start = _Buffer(max_sequences + 1, torch.int32, device)
        self._context_lens = _Buffer(max_sequences, torch.int32, device)
        self._tables = _Buffer(max_sequences * max_blocks, torch.int32, device)
        self._logit_rows = _Buffer(max_sequences, torch.int64, device)
        self._layer_tables = layer_tables
        self._beside = [
            _Buffer(max_sequences * max_blocks, torch.int32, device) for _ in range(max(layer_tables, default=0))
        ]
        self._most_likely = np.empty(0, dtype=np.int64)
        self._num_decodes = 0
        """How many, where the last step was nothing else."""
        self._last_block_ids: list[tuple[BlockId, ...]] = []
        self._last_table = (0, 0)

    def build(self, step: Sequence[Work]) -> StepBatch:
        """Return the batch of one step.

        ``logit_rows`` are first the last rows of the chunks that sample, then those that predict wanted prompt
        tokens, each in the order of the chunks.
        """
        starts = [work.chunk.start for work in step]
        lengths = [work.chunk.num_tokens for work in step]
        longest = max(lengths)
        if longest == 1 and all(work.chunk.samples for work in step):
            num_logits = self._fill_decodes(step, starts)
        else:
            num_logits = self._fill_chunks(step, starts, lengths)
        num_sequences, num_tokens, width = len(step), sum(lengths), self._fill_tables(step)
        batch = StepBatch(
            token_ids=self._tokens.tensor(num_tokens),
            positions=self._positions.tensor(num_tokens),
            query_start=self._query_start.tensor(num_sequences + 1),
            context_lens=self._context_lens.tensor(num_sequences),
            block_tables=self._tables.tensor(num_sequences, width),
            logit_rows=self._logit_rows.tensor(num_logits),
            max_query_len=longest,
            max_context_len=max(starts) + 1 if longest == 1 else int(self._context_lens.array[:num_sequences].max()),
            most_likely=self._undecided(num_logits) if any(work.sequence.sampling.greedy for work in step) else None,
        )
        if not self._beside:
            return batch
        self._fill_tables_beside(step, width)
        tables = [beside.tensor(num_sequences, width) for beside in self._beside]
        others = tuple([replace(batch, block_tables=table) for table in tables])
        return replace(batch, layer_tables=self._layer_tables, others=others)

    def _fill_decodes(self, step: Sequence[Work], starts: list[int]) -> int:
        """Fill in a step of one token for each; return the number of rows whose logits are wanted.

        What would be the same as in the last step is left.
        """
        size = len(step)
        for buffer in (self._tokens, self._positions, self._context_lens):
            buffer.reserve(size)
        self._tokens.array[:size] = [work.sequence.last_token_id for work in step]
        self._positions.array[:size] = starts
        np.add(self._positions.array[:size], 1, out=self._context_lens.array[:size])
        if self._num_decodes != size:
            self._fill(self._query_start, list(range(size + 1)))
            self._fill(self._logit_rows, list(range(size)))
            self._num_decodes = size
        return size

    def _fill_chunks(self, step: Sequence[Work], starts: list[int], lengths: list[int]) -> int:
        """Fill in any step; return the number of rows whose logits are wanted."""
        self._num_decodes = 0
        row_starts = list(accumulate(lengths, initial=0))
        self._fill(self._query_start, row_starts)
        self._fill(self._context_lens, [start + length for start, length in zip(starts, lengths, strict=True)])
        self._fill_tokens(step, starts, lengths, row_starts)
        logit_rows = _logit_rows(step, row_starts)
        self._fill(self._logit_rows, logit_rows)
        return len(logit_rows)

    def _undecided(self, size: int) -> npt.NDArray[np.int64]:
        if len(self._most_likely) != size:
            self._most_likely = np.empty(size, dtype=np.int64)
        self._most_likely.fill(UNDECIDED)
        return self._most_likely

    @staticmethod
    def _fill(buffer: _Buffer, values: list[int]) -> None:
        buffer.reserve(len(values))
        buffer.array[: len(values)] = values

    def _fill_tokens(self, step: Sequence[Work], starts: list[int], lengths: list[int], row_starts: list[int]) -> None:
        num_tokens = row_starts[-1]
        self._tokens.reserve(num_tokens)
        self._positions.reserve(num_tokens)
        tokens, positions = self._tokens.array, self._positions.array
        for work, row, start, length in zip(step, row_starts, starts, lengths, strict=False):
            tokens[row : row + length] = work.sequence.tokens[start : start + length]
            positions[row : row + length] = np.arange(start, start + length)

    def _fill_tables(self, step: Sequence[Work]) -> int:
        """Fill in the blocks of the sequences, where they are not those of the last step; return the longest."""
        block_ids = [work.chunk.block_ids for work in step]
        width, size = max(map(len, block_ids)), len(step)
        self._tables.reserve(size * width)
        known = self._last_block_ids if (size, width) == self._last_table else [()] * size
        changed = [place for place, (ids, before) in enumerate(zip(block_ids, known, strict=True)) if ids is not before]
        if changed:
            table = self._tables.array[: size * width].reshape(size, width)
            for place in changed:
                ids = block_ids[place]
                table[place, : len(ids)] = ids
                table[place, len(ids) :] = 0
        self._last_block_ids, self._last_table = block_ids, (size, width)
        return width

    def _fill_tables_beside(self, step: Sequence[Work], width: int) -> None:
        """Fill the tables of the layers that have blocks of their own; what no layer sees any more is 0."""
        size = len(step) * width
        for beside in self._beside:
            beside.reserve(size)
            beside.array[:size] = 0
        for row, work in enumerate(step):
            blocks = work.sequence.window_table(work.chunk.window_ids).reshape(-1, len(self._beside))
            start = row * width + work.chunk.first_in_window
            for index, beside in enumerate(self._beside):
                beside.array[start : start + len(blocks)] = blocks[:, index]


def num_prompt_rows(work: Work) -> int:
    """Return how many rows of a chunk predict prompt tokens whose log-probabilities are wanted."""
    if not work.sequence.wants_prompt_logprobs:
        return 0
    return max(0, min(work.chunk.num_tokens, work.sequence.num_prompt_tokens - 1 - work.chunk.start))


def _logit_rows(step: Sequence[Work], row_starts: Sequence[int]) -> list[int]:
    rows = [end - 1 for work, end in zip(step, row_starts[1:], strict=True) if work.chunk.samples]
    for work, first in zip(step, row_starts, strict=False):
        if work.sequence.wants_prompt_logprobs:
            rows.extend(range(first, first + num_prompt_rows(work)))
    return rows
