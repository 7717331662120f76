"""One choice of an answer: from the outputs of its sequence to what the client sees of them.

That is text of whole characters only, and never the beginning of a stop string.
"""

from collections.abc import Sequence

import msgspec

from disagg.base.messages import SequenceOutput
from disagg.base.request import GenerationRequest
from disagg.base.sampling import FinishReason, PositionLogprobs
from disagg.models.tokenizer import IncrementalDecoder


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What one output added to one choice. ``prompt_logprobs`` and ``num_cached_tokens`` come with the first.

    ``offsets`` say, for each token with log probabilities, where its text begins: in characters from the answer's
    start, counting what a stop string cut off.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[PositionLogprobs, ...] = ()
    offsets: tuple[int, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    num_cached_tokens: int = 0

    @property
    def is_plain(self) -> bool:
        """True when it is a text and nothing else, but for token ids."""
        return bool(self.text) and not (self.finish_reason or self.logprobs or self.prompt_logprobs)

    @property
    def is_visible(self) -> bool:
        """False when a client that did not ask for token ids would learn nothing: the text is held back."""
        return bool(self.text or self.logprobs or self.prompt_logprobs) or self.finish_reason is not None

    def without_text(self) -> "Delta":
        """Return what is left for a client where the text is held back."""
        return msgspec.structs.replace(self, text="")

    @property
    def num_logprobs(self) -> int:
        """Log probabilities of the answer and of the prompt."""
        if not self.logprobs and not self.prompt_logprobs:
            return 0
        return sum(1 + len(position.top) for part in (self.logprobs, self.prompt_logprobs) for position in part)


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


class Answer:
    """One sequence to generate and the text it becomes."""

    def __init__(self, choice: int, request: GenerationRequest, text: TextStream) -> None:
        self.request = request
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._choice = choice
        self._text = text

    def accept(self, output: SequenceOutput) -> Delta:
        """Take the next output. Tokens after the one that completes a stop string are not the client's."""
        if (plain := self.accept_plain(output)) is not None:
            return plain
        text, offsets = self._push(output)
        num_used = len(offsets)
        is_first = self.num_tokens == 0
        self.num_tokens += num_used
        stop_reason: str | int | None = self._text.stopped_by
        if stop_reason is not None:
            self.finish_reason = FinishReason.STOP
        elif output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            text += self._text.finish()
            if (stop_reason := self._text.stopped_by) is not None:
                self.finish_reason = FinishReason.STOP
            elif output.stop_token_id in self.request.sampling.stop_token_ids:
                stop_reason = output.stop_token_id
        return Delta(
            choice=self._choice,
            text=text,
            token_ids=output.token_ids[:num_used],
            finish_reason=self.finish_reason,
            stop_reason=stop_reason,
            logprobs=output.logprobs[:num_used],
            offsets=tuple(offsets),
            prompt_logprobs=output.prompt_logprobs,
            num_cached_tokens=output.num_cached_tokens if is_first else 0,
        )

    def accept_plain(self, output: SequenceOutput) -> Delta | None:
        """Take the next output if it is one token more and cannot be the last; else None, and nothing is taken."""
        if not self.num_tokens or self._text.may_stop or not _is_plain(output):
            return None
        self.num_tokens += 1
        start = self._text.num_decoded
        return Delta(self._choice, self._text.push(output.token_ids[0]), output.token_ids, offsets=(start,))

    def _push(self, output: SequenceOutput) -> tuple[str, list[int]]:
        """Return the text to show, and where each token that was used begins."""
        shown = ""
        offsets: list[int] = []
        stop_at = len(output.token_ids) - 1 if output.stop_token_id is not None else -1
        for position, token_id in enumerate(output.token_ids):
            offsets.append(self._text.num_decoded)
            # The token that ends an answer is control, not text, unless the client asked to see it.
            if position != stop_at or self._text.include_stop_string:
                shown += self._text.push(token_id)
            if self._text.stopped_by is not None:
                break
        return shown, offsets


def _is_plain(output: SequenceOutput) -> bool:
    """Return whether it is one token of which nothing more is told, as nearly all are."""
    has_more = output.finish_reason or output.logprobs or output.prompt_logprobs
    return not has_more and len(output.token_ids) == 1


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
