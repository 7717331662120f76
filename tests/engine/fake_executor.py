"""A model without weights for the engine loop, and a gate that holds any executor's steps."""

import hashlib
import sys
import threading
from collections.abc import Sequence

import numpy as np

from disagg.base.ids import BlockId
from disagg.base.messages import FailureKind
from disagg.base.sampling import PositionLogprobs, TokenLogprob
from disagg.engine.executor import ChunkResult, Executor
from disagg.engine.sequences import SequenceFailure, Work
from disagg.transfer.pool import KvPool

DEADLINE_S = 30.0


class Gate:
    """Lets steps through: all of them until ``close``, then as many as ``let_through`` says."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_allowed: float = float("inf")
        self.num_waiting = 0

    def close(self) -> None:
        with self._changed:
            self._num_allowed = 0

    def open(self) -> None:
        self.let_through(float("inf"))

    def let_through(self, count: float) -> None:
        with self._changed:
            self._num_allowed += count
            self._changed.notify_all()

    def wait_until_held(self) -> None:
        """Wait until a step is at the closed gate."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.num_waiting > 0, DEADLINE_S), "no step came"

    def pass_through(self) -> None:
        with self._changed:
            self.num_waiting += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._num_allowed > 0, DEADLINE_S), "the gate stayed closed"
            self._num_allowed -= 1
            self.num_waiting -= 1


class HeldExecutor:
    """Another executor behind a gate. ``steps`` records each step as {request: (start, number of tokens)}.

    Chunks that start at or after the position in ``failures`` fail.
    """

    def __init__(self, inner: Executor) -> None:
        self.gate = Gate()
        self.steps: list[dict[str, tuple[int, int]]] = []
        self.published: list[tuple[BlockId, ...]] = []
        self.received: list[tuple[BlockId, ...]] = []
        self.error: Exception | None = None
        self.failures: dict[str, int] = {}
        self._inner = inner

    def run(self, step: Sequence[Work]) -> list[ChunkResult]:
        self.gate.pass_through()
        if self.error is not None:
            raise self.error
        self.steps.append({w.sequence.request_id: (w.chunk.start, w.chunk.num_tokens) for w in step})
        results = self._inner.run(step)
        failed = ChunkResult(failure=SequenceFailure(FailureKind.INTERNAL, "its logits are broken"))
        return [
            failed if work.chunk.start >= self.failures.get(work.sequence.request_id, sys.maxsize) else result
            for work, result in zip(step, results, strict=True)
        ]

    def publish_blocks(self, blocks: Sequence[BlockId]) -> None:
        self.published.append(tuple(blocks))
        self._inner.publish_blocks(blocks)

    def receive_blocks(self, blocks: Sequence[BlockId]) -> None:
        self.received.append(tuple(blocks))
        self._inner.receive_blocks(blocks)


class FakeExecutor:
    """Keeps token ids in the pool where keys and values would be, and reads them back to sample.

    A token is a function of every KV entry of its sequence in every layer, so that one wrong, missing or late block
    changes the answer, as it would with a real model; in layers that slide, of those in the window. Those are in blocks
    of their own.
    """

    def __init__(self, pool: KvPool, vocab_size: int) -> None:
        self._pool = pool
        self._vocab_size = vocab_size
        self._words = pool.layout.head_dim * pool.layout.dtype.itemsize // pool.blocks.itemsize
        """Of a token's key: there it is found in blocks of any size."""

    def run(self, step: Sequence[Work]) -> list[ChunkResult]:
        return [self._compute(work) for work in step]

    def publish_blocks(self, blocks: Sequence[BlockId]) -> None:
        """The pool is computed on."""

    def receive_blocks(self, blocks: Sequence[BlockId]) -> None:
        """The pool is computed on."""

    def _compute(self, work: Work) -> ChunkResult:
        sequence, chunk = work.sequence, work.chunk
        layout = self._pool.layout
        size, end = layout.block_size, chunk.start + chunk.num_tokens
        tables = self._tables(work)
        for position in range(chunk.start, end):
            for layer, table in enumerate(tables):
                block, slot = table[position // size], position % size
                entry = sequence.tokens[position] + 10_000 * layer
                self._pool.blocks[layer % layout.num_layers, block, slot * self._words] = entry
        prompt_logprobs: tuple[PositionLogprobs, ...] = ()
        if sequence.wants_prompt_logprobs:
            last = min(end + 1, sequence.num_prompt_tokens)
            prompt_logprobs = tuple(_logprobs(int(sequence.tokens[p])) for p in range(chunk.start + 1, last))
        if not chunk.samples:
            return ChunkResult(prompt_logprobs=prompt_logprobs)
        entries = np.zeros((len(tables), end), np.uint64)
        for layer, table in enumerate(tables):
            first = 0 if layer < layout.num_layers or layout.window is None else max(0, end - layout.window)
            for position in range(first, end):
                block, slot = table[position // size], position % size
                entries[layer, position] = self._pool.blocks[layer % layout.num_layers, block, slot * self._words]
        token = sample(entries, sequence.sampling.seed, self._vocab_size)
        logprobs = _logprobs(token) if sequence.sampling.logprobs is not None else None
        return ChunkResult(token_id=token, logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def _tables(self, work: Work) -> list[dict[int, int]]:
        """Where each layer has each of a sequence's blocks, as far as it does."""
        layout, chunk = self._pool.layout, work.chunk
        kept = dict(enumerate(chunk.block_ids))
        each = 0 if layout.window_blocks is None else layout.window_blocks.num_each
        blocks = work.sequence.window_table(chunk.window_ids).tolist()
        beside = [dict(enumerate(blocks[part::each], chunk.first_in_window)) for part in range(each)]
        num_layers = layout.num_layers + layout.num_window_layers
        return [(kept, *beside)[layer // layout.num_layers] for layer in range(num_layers)]


def sample(entries: np.ndarray, seed: int, vocab_size: int) -> int:
    digest = hashlib.blake2b(np.ascontiguousarray(entries).tobytes() + bytes([seed]), digest_size=8).digest()
    return int.from_bytes(digest, "little") % vocab_size


def continue_prompt(
    prompt: Sequence[int],
    num_tokens: int,
    num_layers: int,
    vocab_size: int,
    seed: int = 1,
    *,
    num_window_layers: int = 0,
    window: int = 0,
) -> list[int]:
    """What the fake model answers, computed without any engine."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        entries = np.array([[token + 10_000 * layer for token in tokens] for layer in range(num_layers)], np.uint64)
        entries[num_layers - num_window_layers :, : max(0, len(tokens) - window)] = 0
        tokens.append(sample(entries, seed, vocab_size))
    return tokens[len(prompt) :]


def _logprobs(token: int) -> PositionLogprobs:
    return PositionLogprobs(TokenLogprob(token, -1.0, 1), ())
