"""How many layers of a step's KV are there, in one word of the pool's first page: who reads them goes behind it.

The word holds the step's number and, in its last 16 bits, the number of layers; ``ALL_LAYERS`` when the step has ended.
Compiled kernels count the layers as they write them; of others the end of the step alone is seen. A step that is
computed again, sequence by sequence, counts none: its readers wait for its end.
"""

import time
from collections.abc import Callable, Iterator
from typing import Final

ALL_LAYERS: Final = 0xFFFF
WORD_OFFSET: Final = 2048
"""Bytes from the start of the pool's first page: a cache line that holds nothing else."""

_LAYER_BITS: Final = 16
_LOOK_S: Final = 0.002
"""Between two looks at the word: less than passes between a prompt's last KV and its first token."""


class StepProgress:
    """The word, for whoever maps the pool. Only its owner may ``begin``, ``take`` and ``end``, in one thread."""

    def __init__(self, page: memoryview, address: int = 0) -> None:
        """``page`` is the pool's first page, which the owner alone can write, and has at ``address`` of its memory."""
        self._word = page[WORD_OFFSET : WORD_OFFSET + 8].cast("Q")
        self._address = address + WORD_OFFSET
        self._is_taken = True

    def begin(self, step_id: int) -> None:
        """Say which step runs from now on; numbers grow, from 1."""
        self._word[0] = step_id << _LAYER_BITS
        self._is_taken = False

    def end(self) -> None:
        """Say that the step has ended: what it had to write is written."""
        self._word[0] |= ALL_LAYERS
        self._is_taken = True

    def take(self) -> int:
        """Return where kernels count the layers that they write: 0, nowhere, but in the first computation of a step."""
        if self._is_taken:
            return 0
        self._is_taken = True
        return self._address

    def num_layers(self, step_id: int) -> int:
        """Return how many layers of a step are there, ``ALL_LAYERS`` when it has ended; 0 before it begins."""
        word = self._word[0]
        running = word >> _LAYER_BITS
        if running != step_id:
            return ALL_LAYERS if running > step_id else 0
        return int(word & ALL_LAYERS)

    def follow(self, step_id: int, layers: range, check: Callable[[], None]) -> Iterator[range]:
        """Yield all of ``layers``, in order, as soon as the step has written them.

        ``check`` is called while nothing new is there, and ends the wait by what it raises.
        """
        first = layers.start
        while first < layers.stop:
            end = min(layers.stop, self.num_layers(step_id))
            if end > first:
                yield range(first, end)
                first = end
            else:
                check()
                time.sleep(_LOOK_S)
