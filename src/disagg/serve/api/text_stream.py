"""Tokens to the text a client may see: whole characters only, and never the beginning of a stop string."""

from collections.abc import Sequence

from disagg.models.tokenizer import IncrementalDecoder


class StopString:
    """A stop string, prepared to be looked for (Knuth, Morris and Pratt): shared by the choices of a request."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._fallback = _failure_table(text)

    def follow(self, matched: int, text: str) -> tuple[int, int]:
        """Read on after ``matched`` characters of this string, and return how many are matched after ``text``.

        The second number says after how many characters of ``text`` the string was complete; reading ends there. It
        is -1 where it was not. The time is linear in ``text``.
        """
        wanted, fallback = self.text, self._fallback
        if matched == 0 and wanted[0] not in text:
            return 0, -1
        for position, character in enumerate(text):
            while matched and wanted[matched] != character:
                matched = fallback[matched - 1]
            if wanted[matched] == character:
                matched += 1
                if matched == len(wanted):
                    return matched, position + 1
        return matched, -1


class TextStream:
    """The text of one choice. What ``push`` and ``finish`` return adds up to the answer, cut at a stop string.

    The stop string that is complete first counts, the longest of those that end together, so that the cut does not
    depend on how the text is split into tokens. Text that could be the beginning of a stop string is held back until
    later tokens decide. ``min_tokens`` tokens pass before stop strings count.
    """

    def __init__(
        self,
        decoder: IncrementalDecoder,
        stop_strings: Sequence[StopString] = (),
        *,
        include_stop_string: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = decoder
        self._stop_strings = stop_strings
        self._num_free_tokens = min_tokens if stop_strings else 0
        self._matched = [0] * len(stop_strings)
        self._held = ""
        self.include_stop_string = include_stop_string
        self.stopped_by: str | None = None
        """The stop string that ended the answer, once one has."""
        self.num_decoded = 0
        """Characters of all tokens so far, shown or not."""

    @property
    def may_stop(self) -> bool:
        """True when there are stop strings."""
        return bool(self._stop_strings)

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
        """Return what of held and new text can be no part of a stop string, or all before one that is complete."""
        num_held = len(self._held)
        found: list[tuple[int, int, str]] = []
        for index, stop in enumerate(self._stop_strings):
            self._matched[index], end = stop.follow(self._matched[index], text)
            if end >= 0:
                found.append((num_held + end, num_held + end - len(stop.text), stop.text))
        self._held += text
        if found:
            end, start, self.stopped_by = min(found)
            shown, self._held = self._held[: end if self.include_stop_string else start], ""
            return shown
        cut = len(self._held) - max(self._matched)
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _failure_table(text: str) -> list[int]:
    """Return for each beginning of ``text`` the length of its longest proper end that begins ``text``, too."""
    table = [0] * len(text)
    matched = 0
    for position in range(1, len(text)):
        while matched and text[matched] != text[position]:
            matched = table[matched - 1]
        if text[matched] == text[position]:
            matched += 1
        table[position] = matched
    return table
