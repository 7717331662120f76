"""What a streamed answer says: from stamped pieces of the body to the tokens each event carried. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

_DATA: Final = b"data:"
_ERROR: Final = b"error:"
"""llama.cpp's way to say that something failed in a stream."""
_DONE: Final = b"[DONE]"
_MAX_DETAIL: Final = 300


class _Usage(msgspec.Struct, gc=False):
    completion_tokens: int = 0
    prompt_tokens: int | None = None


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    """One event of either endpoint. Fields of other names are ignored."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    message: Any = None


@dataclass(frozen=True, slots=True)
class Stream:
    """A streamed answer. ``event_s`` are the moments of the events that carried tokens, ``event_tokens`` how many."""

    event_s: tuple[float, ...]
    event_tokens: tuple[int, ...]
    prompt_tokens: int | None
    """As the server counted them; None where it did not say."""
    is_whole: bool
    """It said that it ends: with a reason or with ``[DONE]``."""
    error: str = ""
    """What an error event said, or what is wrong with the stream."""


@dataclass(slots=True)
class _Seen:
    """One event: what it may have carried. ``total`` are the answer's tokens up to here, where the server says so."""

    moment_s: float
    has_text: bool
    may_be_token: bool
    total: int | None


class StreamReader:
    """Reads whole streams; keeps a decoder."""

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(_Event)

    def read(self, pieces: Sequence[tuple[float, bytes]]) -> Stream:
        """Return what the pieces say, cut anywhere. An event's moment is that of the piece which completes its line."""
        seen: list[_Seen] = []
        usage: _Usage | None = None
        error = ""
        is_whole = False
        for moment_s, data in _events(pieces):
            if data == _DONE:
                is_whole = True
                continue
            try:
                event = self._decoder.decode(data)
            except msgspec.MsgspecError as failure:
                error = error or f"malformed event {_shorten(data)}: {failure}"
                continue
            usage = event.usage or usage
            if not event.choices:
                error = error or _error_in(event)
                continue
            seen.append(_look(moment_s, event))
            is_whole = is_whole or event.choices[0].finish_reason is not None
        event_s, event_tokens = _count(seen, usage.completion_tokens if usage else None)
        prompt_tokens = usage.prompt_tokens if usage else None
        return Stream(event_s, event_tokens, prompt_tokens, is_whole and not error, error)


def _events(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yield the data of each event with its moment. Servers of this API write each event's data in one line."""
    ends, end = [], 0
    for _, piece in pieces:
        end += len(piece)
        ends.append(end)
    number = position = 0
    *lines, rest = b"".join(piece for _, piece in pieces).split(b"\n")
    for line in lines:
        position += len(line) + 1
        if line.startswith((_DATA, _ERROR)):
            while ends[number] < position:
                number += 1
        if line.startswith(_DATA):
            yield pieces[number][0], line[len(_DATA) :].strip()
        elif line.startswith(_ERROR):
            yield pieces[number][0], b'{"error":' + line[len(_ERROR) :].strip() + b"}"
    # What was cut off is no event; the end itself needs no line's end.
    if rest.startswith(_DATA) and rest[len(_DATA) :].strip() == _DONE:
        yield pieces[-1][0], _DONE


def _look(moment_s: float, event: _Event) -> _Seen:
    choice = event.choices[0]
    delta = choice.delta
    if delta is None:
        has_text, has_role = bool(choice.text), False
    else:
        has_text = bool(delta.content or delta.reasoning_content or delta.reasoning)
        has_role = delta.role is not None
    may_be_token = has_text or not (has_role or choice.finish_reason is not None)
    return _Seen(moment_s, has_text, may_be_token, event.usage.completion_tokens if event.usage else None)


def _count(seen: Sequence[_Seen], total: int | None) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return moments and tokens of the events that carried any.

    By the running total, where the server sends one. Else each event with text counts as one token, and so does one
    without text, role and reason to finish (vLLM sends such for a token that is part of a character); the answer's
    total, where it is known, is then spread over them.
    """
    if any(one.total is not None for one in seen) and all(one.total is not None for one in seen if one.has_text):
        return _by_running_total(seen, total or 0)
    carriers = [one for one in seen if one.may_be_token]
    if total is not None and len(carriers) > total:
        carriers = [one for one in carriers if one.has_text] or carriers[:total]
    if not carriers or total == 0:
        return (), ()
    counts = [1] * len(carriers) if total is None else _spread(total, len(carriers))
    kept = [(one.moment_s, count) for one, count in zip(carriers, counts, strict=True) if count]
    return tuple(moment_s for moment_s, _ in kept), tuple(count for _, count in kept)


def _by_running_total(seen: Sequence[_Seen], total: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
    moments: list[float] = []
    counts: list[int] = []
    known = 0
    for one in seen:
        if one.total is not None and one.total > known:
            moments.append(one.moment_s)
            counts.append(one.total - known)
            known = one.total
    if total > known and counts:
        counts[-1] += total - known
    return tuple(moments), tuple(counts)


def _spread(total: int, num_events: int) -> list[int]:
    """Return ``total`` in even parts, at least one for the first event."""
    ends = [max(1, (index + 1) * total // num_events) for index in range(num_events)]
    return [end - before for before, end in zip([0, *ends[:-1]], ends, strict=True)]


def _error_in(event: _Event) -> str:
    """Return what an event without choices says went wrong; empty for one that only counts."""
    error = event.error if event.error is not None else event.message
    if error is None:
        return ""
    message = error.get("message", error) if isinstance(error, dict) else error
    return _shorten(str(message)) or "an error event"


def read_error(body: bytes) -> str:
    """Return the message of an error answer, or the beginning of whatever it is."""
    try:
        event = msgspec.json.decode(body, type=_Event)
    except msgspec.MsgspecError:
        return _shorten(body)
    return _error_in(event) or _shorten(body)


def _shorten(text: str | bytes) -> str:
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    text = " ".join(text.split())
    return text if len(text) <= _MAX_DETAIL else text[: _MAX_DETAIL - 3] + "..."
