"""Tokens to the text a client may see: whole characters only, and never the beginning of a stop string."""

from collections.abc import Sequence

from disagg.models.tokenizer import IncrementalDecoder


class TextStream:
    """The text of one choice. What ``push`` and ``finish`` return adds up to the answer, cut at the first stop string.

    Text that could be the beginning of a stop string is held back until the next tokens decide. ``min_tokens`` tokens
    pass before stop strings count.
    """

    def __init__(
        self,
        decoder: IncrementalDecoder,
        stop_strings: Sequence[str] = (),
        *,
        include_stop_string: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = decoder
        self._stop_strings = stop_strings
        self.include_stop_string = include_stop_string
        self._num_free_tokens = min_tokens
        self._held = ""
        self._stopped_by: str | None = None

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the answer, once one has."""
        return self._stopped_by

    def push(self, token_id: int) -> str:
        """Return the text that may be shown now. Once ``stopped_by`` is set, the answer is complete."""
        text = self._decoder.push(token_id)
        if self._num_free_tokens > 0:
            self._num_free_tokens -= 1
            return text
        if not self._stop_strings:
            return text
        return self._release(text)

    def finish(self) -> str:
        """Return what was held back, for an answer that ended without a stop string."""
        if self.stopped_by is not None:
            return ""
        rest = self._decoder.flush()
        shown = self._release(rest) if self._stop_strings and rest else rest
        held, self._held = self._held, ""
        return shown + held if self.stopped_by is None else shown

    def _release(self, text: str) -> str:
        self._held += text
        found = [(at, stop) for stop in self._stop_strings if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda one: one[0])
            end = at + len(stop) if self.include_stop_string else at
            self._stopped_by = stop
            shown, self._held = self._held[:end], ""
            return shown
        keep = max(_overlap(self._held, stop) for stop in self._stop_strings)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
