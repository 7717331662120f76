"""Deltas to ``/v1/chat/completions``: content, reasoning and calls of tools."""

from collections.abc import Sequence

from msgspec import UNSET

from disagg.base.sampling import FinishReason, PositionLogprobs
from disagg.models.tokenizer import Tokenizer
from disagg.models.tool_calls.parsing import Piece, PieceKind, joined
from disagg.serve.api.answer import Delta
from disagg.serve.api.logprobs import chat_logprobs, prompt_logprobs_shown
from disagg.serve.api.prompts import Prompt
from disagg.serve.api.reading import AnswerReading
from disagg.serve.api.responses import (
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    Completion,
    EventTemplate,
    MessageDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
    event,
)
from disagg.serve.api.schema import ChatCompletionRequest
from disagg.serve.api.shapes import ChunkedShape, Heading, ShownUsage, joined_ids, reason_shown, shows


class ChatShape(ChunkedShape):
    """``/v1/chat/completions``. ``reading`` says how the model's text is read."""

    def __init__(
        self,
        request: ChatCompletionRequest,
        heading: Heading,
        tokenizer: Tokenizer,
        prompt: Prompt,
        reading: AnswerReading,
    ) -> None:
        self._request = request
        self._heading = (heading.response_id, "chat.completion", heading.created, heading.model)
        self._chunk_heading = (heading.response_id, "chat.completion.chunk", heading.created, heading.model)
        super().__init__(self._chunk_heading, request.stream_options)
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._reading = reading
        self._parsers = [reading.parser() for _ in range(request.n or 1)]
        self._plain: dict[int, EventTemplate] = {}
        """By choice, where the text alone differs from event to event."""

    def openings(self, usage: ShownUsage) -> bytes:
        """Return one event for each choice, saying whose words follow; with the prompt's tokens where asked for."""
        prompt_token_ids = self._prompt.token_ids if self._request.return_token_ids else UNSET
        choices = [
            ChatChunkChoice(index=index, delta=MessageDelta("", "assistant"), prompt_token_ids=prompt_token_ids)
            for index in range(self._request.n or 1)
        ]
        first, *others = choices
        opening = Completion(*self._chunk_heading, [first], usage, prompt_token_ids)
        rest = [Completion(*self._chunk_heading, [choice], usage) for choice in others]
        return b"".join(map(event, (opening, *rest)))

    def chunk(self, delta: Delta, usage: ShownUsage) -> bytes:
        """See Shape."""
        if delta.is_plain and self._writes_plainly(delta.choice, usage):
            template = self._plain.get(delta.choice)
            if template is None:
                template = self._plain[delta.choice] = self._template(delta.choice, usage)
            return template.event(delta.text)
        is_shown = shows(delta, self._request)
        parser = self._parsers[delta.choice]
        if parser is None:
            if not is_shown:
                return b""
            message, has_calls = MessageDelta(delta.text), False
        else:
            pieces = parser.push(delta.text, is_last=delta.finish_reason is not None)
            has_calls = parser.num_calls > 0
            if not pieces and not (is_shown and shows(delta.without_text(), self._request)):
                return b""
            message = _message_delta(pieces)
        choice = ChatChunkChoice(
            index=delta.choice,
            delta=message,
            logprobs=self._shown(delta.logprobs) if delta.logprobs else None,
            finish_reason=self._reason(delta.finish_reason, has_calls),
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._request.return_token_ids else UNSET,
        )
        return event(Completion(*self._chunk_heading, [choice], usage))

    def _writes_plainly(self, choice: int, usage: ShownUsage) -> bool:
        is_read = self._parsers[choice] is not None
        return not (is_read or self._request.return_token_ids or isinstance(usage, Usage))

    def _template(self, choice: int, usage: ShownUsage) -> EventTemplate:
        heading = self._chunk_heading
        return EventTemplate(
            lambda text: Completion(*heading, [ChatChunkChoice(index=choice, delta=MessageDelta(text))], usage)
        )

    def whole(self, deltas: Sequence[Sequence[Delta]], usage: Usage) -> Completion:
        """See Shape."""
        wants_ids = self._request.return_token_ids
        choices = [self._choice(index, parts) for index, parts in enumerate(deltas)]
        of_prompt = [position for delta in deltas[0] for position in delta.prompt_logprobs]
        return Completion(
            *self._heading,
            choices,
            usage,
            self._prompt.token_ids if wants_ids else UNSET,
            prompt_logprobs_shown(self._tokenizer, of_prompt, self._request.prompt_logprobs),
        )

    def _choice(self, index: int, parts: Sequence[Delta]) -> ChatChoice:
        wants_ids = self._request.return_token_ids
        text = "".join(delta.text for delta in parts)
        parser = self._parsers[index]
        pieces = [Piece(PieceKind.CONTENT, text)] if parser is None else parser.push(text, is_last=True)
        return ChatChoice(
            index=index,
            message=_message(pieces),
            logprobs=self._shown([position for delta in parts for position in delta.logprobs]),
            finish_reason=self._reason(parts[-1].finish_reason, parser is not None and parser.num_calls > 0),
            stop_reason=parts[-1].stop_reason,
            token_ids=joined_ids(parts) if wants_ids else UNSET,
            prompt_token_ids=self._prompt.token_ids if wants_ids else UNSET,
        )

    def _reason(self, reason: FinishReason | None, has_calls: bool) -> str | None:
        """Calls that the model chose to make are a reason of their own; a call that was named is not, as at OpenAI."""
        if reason is FinishReason.STOP and has_calls and not self._reading.names_call:
            return "tool_calls"
        return reason_shown(reason)

    def _shown(self, positions: Sequence[PositionLogprobs]) -> ChatLogprobs | None:
        if not self._request.logprobs:
            return None
        return chat_logprobs(self._tokenizer, positions, self._request.top_logprobs or 0)


def called(pieces: Sequence[Piece]) -> list[ToolCall]:
    """Return the calls among the pieces of a whole answer."""
    arguments: dict[int, str] = {}
    for piece in pieces:
        if piece.kind is PieceKind.ARGUMENTS:
            arguments[piece.index] = arguments.get(piece.index, "") + piece.text
    return [
        ToolCall(piece.call_id, CalledFunction(piece.text, arguments.get(piece.index, "")))
        for piece in pieces
        if piece.kind is PieceKind.CALL
    ]


def _message(pieces: Sequence[Piece]) -> AssistantMessage:
    content, reasoning, calls = joined(pieces, PieceKind.CONTENT), joined(pieces, PieceKind.REASONING), called(pieces)
    return AssistantMessage(
        "assistant",
        content if content or not calls else None,
        reasoning_content=reasoning or UNSET,
        tool_calls=calls or UNSET,
    )


def _message_delta(pieces: Sequence[Piece]) -> MessageDelta:
    """Return what an event adds: of each call its name and id once, and then arguments."""
    calls: dict[int, ToolCallDelta] = {}
    for piece in pieces:
        if piece.kind is PieceKind.CALL:
            calls[piece.index] = ToolCallDelta(piece.index, CalledFunction(piece.text, ""), piece.call_id, "function")
        elif piece.kind is PieceKind.ARGUMENTS:
            known = calls.get(piece.index, ToolCallDelta(piece.index, CalledFunction(UNSET, "")))
            function = CalledFunction(known.function.name, known.function.arguments + piece.text)
            calls[piece.index] = ToolCallDelta(piece.index, function, known.id, known.type)
    return MessageDelta(
        joined(pieces, PieceKind.CONTENT) or UNSET,
        reasoning_content=joined(pieces, PieceKind.REASONING) or UNSET,
        tool_calls=list(calls.values()) or UNSET,
    )
