"""What is asked of whoever computes: run one step, and bring KV blocks to and from the shared pool."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from disagg.base.ids import BlockId
from disagg.base.sampling import PositionLogprobs
from disagg.engine.sequences import SequenceFailure, Work


class ChunkResult(msgspec.Struct, frozen=True, gc=False):
    """What one chunk brought forth.

    ``token_id`` is set when the chunk samples. A chunk with a ``failure`` has nothing else: its sequence ends, and the
    others of the step go on. ``prompt_logprobs``, where the sequence wants them, are those of the
    tokens at positions ``chunk.start + 1`` to ``chunk.start + chunk.num_tokens``, as far as the prompt reaches.
    """

    token_id: int | None = None
    logprobs: PositionLogprobs | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    failure: SequenceFailure | None = None


class BlockMover(Protocol):
    """Brings KV blocks to and from the pool that instances share. Called from the loop's thread alone."""

    def publish_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Make computed blocks readable in the shared pool, before they are offered."""

    def receive_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Take over blocks that a pull wrote into the shared pool, before they are used."""


class Executor(BlockMover, Protocol):
    """The model behind the loop. ``engine.steps`` says in which thread it runs."""

    def run(self, step: Sequence[Work]) -> list[ChunkResult]:
        """Compute one step; one result for each chunk, in order."""
