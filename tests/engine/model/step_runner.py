"""Drives a ``Decoder`` over a paged pool without the engine: what a step needs, and a greedy loop."""

from collections.abc import Sequence

import torch

from disagg.engine.kernels.interface import StepBatch
from disagg.engine.model.decoder import Decoder


class StepRunner:
    """Holds a KV pool and the blocks of a few sequences.

    Blocks are handed out in a scattered order and begin as NaN, so that reading a wrong or unwritten place shows.
    """

    def __init__(
        self, decoder: Decoder, block_size: int = 16, num_blocks: int = 256, dtype: torch.dtype = torch.float32
    ) -> None:
        config = decoder.config
        self.decoder = decoder
        self.device = decoder.device
        self.block_size = block_size
        self.kv = torch.full(
            (config.num_layers, num_blocks, 2, config.num_kv_heads, block_size * config.head_dim),
            float("nan"),
            dtype=dtype,
            device=self.device,
        )
        self._free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
        self._blocks: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def step(self, new_tokens: dict[int, Sequence[int]], all_rows: bool = False, no_rows: bool = False) -> torch.Tensor:
        """Run one step: ``new_tokens`` of each sequence. Returns logits of each last row, of every row, or of none."""
        query_start, positions, tokens, context_lens = [0], [], [], []
        for sequence, ids in new_tokens.items():
            start = self._lengths.get(sequence, 0)
            end = start + len(ids)
            blocks = self._blocks.setdefault(sequence, [])
            while len(blocks) * self.block_size < end:
                blocks.append(self._free.pop())
            self._lengths[sequence] = end
            positions.extend(range(start, end))
            tokens.extend(ids)
            context_lens.append(end)
            query_start.append(len(tokens))
        width = max(len(self._blocks[sequence]) for sequence in new_tokens)
        tables = [self._blocks[sequence] + [0] * (width - len(self._blocks[sequence])) for sequence in new_tokens]
        rows = range(len(tokens)) if all_rows else [end - 1 for end in query_start[1:]]
        batch = StepBatch(
            token_ids=torch.tensor(tokens, device=self.device),
            positions=torch.tensor(positions, dtype=torch.int32, device=self.device),
            query_start=torch.tensor(query_start, dtype=torch.int32, device=self.device),
            context_lens=torch.tensor(context_lens, dtype=torch.int32, device=self.device),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=self.device),
            logit_rows=torch.tensor([] if no_rows else list(rows), dtype=torch.int64, device=self.device),
            max_query_len=max(len(ids) for ids in new_tokens.values()),
            max_context_len=max(context_lens),
        )
        return self.decoder.forward(batch, self.kv).float()

    def release(self, sequence: int) -> None:
        self._free.extend(self._blocks.pop(sequence))
        del self._lengths[sequence]


def greedy(
    decoder: Decoder, prompts: Sequence[Sequence[int]], max_tokens: int, dtype: torch.dtype = torch.float32
) -> list[list[int]]:
    """Return greedy continuations of a few prompts: each prefilled alone, all decoded together."""
    num_blocks = sum(-(-(len(prompt) + max_tokens) // 16) for prompt in prompts)
    runner = StepRunner(decoder, num_blocks=num_blocks, dtype=dtype)
    outputs = [[int(runner.step({index: prompt}).argmax())] for index, prompt in enumerate(prompts)]
    running = {index for index, output in enumerate(outputs) if output[-1] not in decoder.config.eos_token_ids}
    for _ in range(max_tokens - 1):
        if not running:
            break
        logits = runner.step({index: outputs[index][-1:] for index in sorted(running)})
        for index, token in zip(sorted(running), logits.argmax(-1).tolist(), strict=True):
            outputs[index].append(token)
            if token in decoder.config.eos_token_ids:
                running.remove(index)
    return outputs
