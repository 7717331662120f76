"""An exception that one sequence raises in a step ends that sequence, not the instance."""

import logging
from collections.abc import Sequence
from typing import Final

import torch

from disagg.base.errors import DisaggError
from disagg.base.ids import BlockId
from disagg.base.messages import FailureKind
from disagg.engine.executor import ChunkResult, Executor
from disagg.engine.sequences import SequenceFailure, Work

logger = logging.getLogger(__name__)

MAX_FAILURES: Final = 16
"""So many sequences in a row that raise, with none between that was computed, are a fault of the instance."""

_WANT_OF_MEMORY: Final = ("can't allocate memory", "bad_alloc")
"""What PyTorch says of the host's memory, in a plain RuntimeError."""


class IsolatingExecutor:
    """Another executor, whose steps fail by the sequence.

    A step that raises is computed again, each sequence alone: what it writes is the same. Those that raise again fail.
    Where one sequence alone finds no memory, or the device is broken, the next would meet the same: the instance ends,
    and its sequences go on elsewhere.
    """

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self._num_failures = 0

    def run(self, step: Sequence[Work]) -> list[ChunkResult]:
        """See ``Executor.run``. Raises what is a fault of the instance."""
        try:
            results = self._inner.run(step)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if len(step) > 1:
                return [result for work in step for result in self.run([work])]
            if _is_want_of_memory(error):
                raise
            return [self._failed(step[0], error)]
        self._num_failures = 0
        return results

    def publish_blocks(self, blocks: Sequence[BlockId]) -> None:
        """See ``Executor.publish_blocks``."""
        self._inner.publish_blocks(blocks)

    def receive_blocks(self, blocks: Sequence[BlockId]) -> None:
        """See ``Executor.receive_blocks``."""
        self._inner.receive_blocks(blocks)

    def _failed(self, work: Work, error: Exception) -> ChunkResult:
        self._num_failures += 1
        if self._num_failures >= MAX_FAILURES:
            raise error
        logger.error("sequence %s failed alone", work.sequence.request_id, exc_info=error)
        shown = str(error) if isinstance(error, DisaggError) else "the instance's log has the details"
        return ChunkResult(failure=SequenceFailure(FailureKind.INTERNAL, f"the engine could not compute it: {shown}"))


def _is_want_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WANT_OF_MEMORY)
