"""Tokens to the text a client may see: whole characters only, and never the beginning of a stop string."""

from collections.abc import Sequence

from disagg.models.tokenizer import IncrementalDecoder


class TextStream:
    """The text of one choice. What ``push`` and ``finish`` return adds up to the answer, cut at a stop string.

    The stop string that is complete first counts, the longest of those that end together, so that the cut does not
    depend on how the text is split into tokens. Text that could be the beginning of a stop string is held back until
    later tokens decide. ``min_tokens`` tokens pass before stop strings count.
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
        self._num_free_tokens = min_tokens if stop_strings else 0
        self._held = ""
        self.include_stop_string = include_stop_string
        self.stopped_by: str | None = None
        """The stop string that ended the answer, once one has."""
        self.num_decoded = 0
        """Characters of all tokens so far, shown or not."""

    def push(self, token_id: int) -> str:
        """Return the text that may be shown now. Once ``stopped_by`` is set, the answer is complete."""
        text = self._decoder.push(token_id)
        self.num_decoded += len(text)
        if not self._stop_strings:
            return text
        if self._num_free_tokens > 0:
            self._num_free_tokens -= 1
            return text
        return self._release(text)

    def finish(self) -> str:
        """Return what was held back, for an answer that ended without a stop string."""
        if self.stopped_by is not None:
            return ""
        rest = self._decoder.flush()
        shown = self._release(rest) if self._stop_strings and rest else rest
        held, self._held = self._held, ""
        return shown + held

    def _release(self, text: str) -> str:
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stop_strings if (at := self._held.find(stop)) >= 0]
        if found:
            end, start, self.stopped_by = min(found)
            shown, self._held = self._held[: end if self.include_stop_string else start], ""
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
