"""Deltas to responses: what each endpoint makes of them, for the whole answer and for its stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import UnsetType

from disagg.base.errors import DisaggError
from disagg.base.sampling import FinishReason
from disagg.serve.api.answer import Delta
from disagg.serve.api.failures import error_event
from disagg.serve.api.responses import DONE, Completion, Usage, event
from disagg.serve.api.schema import ChatCompletionRequest, CompletionRequest, StreamOptions

ShownUsage = Usage | None | UnsetType
"""OpenAI shows null in a stream's events where its end brings the usage, and nothing where it does not."""


@dataclass(frozen=True, slots=True)
class Heading:
    """What all events of one answer have in common."""

    response_id: str
    created: int
    model: str


class Shape(Protocol):
    """How one request's deltas become JSON. Events are bytes, none where a client would learn nothing."""

    def openings(self, usage: ShownUsage) -> bytes:
        """Return the events that come before the first delta's."""

    def chunk(self, delta: Delta, usage: ShownUsage) -> bytes:
        """Return the events of one delta."""

    def ending(self, usage: Usage) -> bytes:
        """Return the events after all choices, that with the usage if it is wanted, and the stream's end."""

    def failure(self, error: DisaggError) -> bytes:
        """Return the events of an error after others, and the stream's end."""

    def whole(self, deltas: Sequence[Sequence[Delta]], usage: Usage) -> Any:
        """Return the answer, given every choice's deltas."""


class ChunkedShape:
    """What the streams of completions and chats have in common. ``heading``: the first fields of every event."""

    def __init__(self, heading: tuple[str, str, int, str], options: StreamOptions | None) -> None:
        self._chunk_heading = heading
        self._shows_usage = options is not None and bool(options.include_usage)

    def ending(self, usage: Usage) -> bytes:
        """See Shape."""
        closing = event(Completion(*self._chunk_heading, [], usage)) if self._shows_usage else b""
        return closing + DONE

    def failure(self, error: DisaggError) -> bytes:
        """See Shape."""
        return error_event(error)


def shows(delta: Delta, request: CompletionRequest | ChatCompletionRequest) -> bool:
    """Return whether a client would learn something from a delta."""
    return delta.is_visible or bool(request.return_token_ids and delta.token_ids)


def reason_shown(reason: FinishReason | None) -> str | None:
    """Return why an answer ended, in OpenAI's words."""
    return None if reason is None else reason.value


def joined_ids(parts: Sequence[Delta]) -> tuple[int, ...]:
    """Return the tokens of one choice."""
    return tuple(token_id for delta in parts for token_id in delta.token_ids)
