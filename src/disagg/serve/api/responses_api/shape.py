"""Deltas to ``/v1/responses``."""

from collections.abc import Sequence
from typing import Final

import msgspec

from disagg.base.errors import DisaggError
from disagg.base.sampling import FinishReason, SamplingParams
from disagg.models.tool_calls.parsing import Piece, PieceKind
from disagg.serve.api.answer import Delta
from disagg.serve.api.failures import error_body
from disagg.serve.api.reading import AnswerReading
from disagg.serve.api.responses import Usage, encode
from disagg.serve.api.responses_api.items import (
    ErrorEvent,
    IncompleteDetails,
    InputTokensDetails,
    ItemEvent,
    ModelResponse,
    OutputTokensDetails,
    PieceEvent,
    ResponseEvent,
    ResponseUsage,
)
from disagg.serve.api.responses_api.output import OutputWriter
from disagg.serve.api.responses_api.schema import ResponsesRequest
from disagg.serve.api.shapes import Heading, ShownUsage

_OPENINGS: Final = ("created", "in_progress")


class ResponsesShape:
    """See Shape: a response is one choice."""

    def __init__(
        self, request: ResponsesRequest, heading: Heading, reading: AnswerReading, sampling: SamplingParams
    ) -> None:
        self._request = request
        self._heading = heading
        self._sampling = sampling
        self._parser = reading.parser()
        self._writer = OutputWriter(first_number=len(_OPENINGS))
        self._is_open = False
        self._reason: FinishReason | None = None

    def openings(self, usage: ShownUsage) -> bytes:
        """See Shape. Their numbers are the first two, though they are written after other events."""
        self._is_open = True
        return _written([self._whole_event(name, number) for number, name in enumerate(_OPENINGS)])

    def chunk(self, delta: Delta, usage: ShownUsage) -> bytes:
        """See Shape."""
        return _written(self._take(delta))

    def _take(self, delta: Delta) -> list[ItemEvent | PieceEvent]:
        is_last = delta.finish_reason is not None
        if self._parser is not None:
            pieces = self._parser.push(delta.text, is_last=is_last)
        else:
            pieces = [Piece(PieceKind.CONTENT, delta.text)] if delta.text else []
        events = self._writer.take(pieces)
        if is_last:
            self._reason = delta.finish_reason
            events += self._writer.finish(self._status())
        return events

    def ending(self, usage: Usage) -> bytes:
        """See Shape."""
        opening = b"" if self._is_open else self.openings(usage)
        last = ResponseEvent(
            type=f"response.{self._status()}", sequence_number=self._writer.number(), response=self._response(usage)
        )
        return opening + _written([last])

    def failure(self, error: DisaggError) -> bytes:
        """See Shape."""
        body = error_body(error)
        return _written(
            [
                ErrorEvent(
                    sequence_number=self._writer.number(),
                    message=body.message,
                    code=body.code,
                    error=body,
                    param=body.param,
                )
            ]
        )

    def whole(self, deltas: Sequence[Sequence[Delta]], usage: Usage) -> ModelResponse:
        """See Shape."""
        for delta in deltas[0]:
            self._take(delta)
        return self._response(usage)

    def _status(self) -> str:
        return "incomplete" if self._reason is FinishReason.LENGTH else "completed"

    def _whole_event(self, name: str, number: int) -> ResponseEvent:
        return ResponseEvent(type=f"response.{name}", sequence_number=number, response=self._response(None))

    def _response(self, usage: Usage | None) -> ModelResponse:
        """Return the response so far, or with its usage the whole one."""
        request, sampling = self._request, self._sampling
        is_cut = self._reason is FinishReason.LENGTH
        tool_choice = request.tool_choice
        return ModelResponse(
            id=self._heading.response_id,
            created_at=self._heading.created,
            model=self._heading.model,
            status="in_progress" if usage is None else self._status(),
            output=[] if usage is None else list(self._writer.items),
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            parallel_tool_calls=request.parallel_tool_calls is not False,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            text=request.text or {"format": {"type": "text"}},
            tool_choice="auto" if tool_choice is None else tool_choice,
            tools=[] if request.tools is None else list(request.tools),
            truncation=request.truncation or "disabled",
            usage=None if usage is None else _usage(usage),
            incomplete_details=IncompleteDetails("max_output_tokens") if is_cut and usage is not None else None,
        )


def _usage(usage: Usage) -> ResponseUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return ResponseUsage(
        usage.prompt_tokens,
        InputTokensDetails(cached),
        usage.completion_tokens,
        OutputTokensDetails(),
        usage.total_tokens,
    )


def _written(events: Sequence[msgspec.Struct]) -> bytes:
    return b"".join(b"event: %s\ndata: %s\n\n" % (one.type.encode(), encode(one)) for one in events)  # type: ignore[attr-defined]
