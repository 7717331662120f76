"""Deltas to responses: one class for each endpoint, for the whole answer and for its stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec import UNSET, UnsetType

from disagg.base.sampling import FinishReason, PositionLogprobs
from disagg.models.tokenizer import IncrementalDecoder, Tokenizer
from disagg.serve.api.answer import Delta
from disagg.serve.api.logprobs import chat_logprobs, join_legacy, legacy_logprobs
from disagg.serve.api.prompts import Prompt
from disagg.serve.api.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    MessageDelta,
    Usage,
)
from disagg.serve.api.schema import ChatCompletionRequest, CompletionRequest

ShownUsage = Usage | None | UnsetType
"""OpenAI shows null in a stream's events where its end brings the usage, and nothing where it does not."""


@dataclass(frozen=True, slots=True)
class Heading:
    """What all events of one answer have in common."""

    response_id: str
    created: int
    model: str


class Shape(Protocol):
    """How one request's deltas become JSON."""

    def shows(self, delta: Delta) -> bool:
        """Return whether a delta gets an event."""

    def openings(self, usage: ShownUsage) -> list[Completion]:
        """Return the events that come before the first delta."""

    def chunk(self, delta: Delta, usage: ShownUsage) -> Completion:
        """Return the event of one delta."""

    def closing(self, usage: Usage) -> Completion:
        """Return the event that carries the usage, after all choices."""

    def whole(self, deltas: Sequence[Sequence[Delta]], usage: Usage) -> Completion:
        """Return the answer, given every choice's deltas."""


class CompletionShape:
    """``/v1/completions``. ``prompts[i]`` is the prompt of choice i, echoed where asked for."""

    def __init__(
        self, request: CompletionRequest, heading: Heading, tokenizer: Tokenizer, prompts: Sequence[Prompt]
    ) -> None:
        self._request = request
        self._heading = (heading.response_id, "text_completion", heading.created, heading.model)
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._echoes = [prompt.text or "" for prompt in prompts]
        self._is_open = [False] * len(prompts)
        self._shows_answer = request.most_tokens != 0

    def shows(self, delta: Delta) -> bool:
        """See Shape."""
        return _shows(delta, self._request)

    def openings(self, usage: ShownUsage) -> list[Completion]:
        """Return nothing: completions open with their first text."""
        return []

    def chunk(self, delta: Delta, usage: ShownUsage) -> Completion:
        """See Shape."""
        is_first = not self._is_open[delta.choice]
        text, logprobs = self._content(delta)
        wants_ids = self._request.return_token_ids
        choice = CompletionChoice(
            index=delta.choice,
            text=text,
            logprobs=logprobs,
            finish_reason=_reason(delta.finish_reason),
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if wants_ids else UNSET,
            prompt_token_ids=self._prompts[delta.choice].token_ids if wants_ids and is_first else UNSET,
        )
        return Completion(*self._heading, [choice], usage)

    def closing(self, usage: Usage) -> Completion:
        """See Shape."""
        return Completion(*self._heading, [], usage)

    def whole(self, deltas: Sequence[Sequence[Delta]], usage: Usage) -> Completion:
        """See Shape."""
        choices = [self._choice(index, parts) for index, parts in enumerate(deltas)]
        return Completion(*self._heading, choices, usage)

    def _choice(self, index: int, parts: Sequence[Delta]) -> CompletionChoice:
        contents = [self._content(delta) for delta in parts]
        logprobs = [part for _, part in contents if part is not None]
        wants_ids = self._request.return_token_ids
        return CompletionChoice(
            index=index,
            text="".join(text for text, _ in contents),
            logprobs=join_legacy(logprobs) if logprobs else None,
            finish_reason=_reason(parts[-1].finish_reason),
            stop_reason=parts[-1].stop_reason,
            token_ids=_joined_ids(parts) if wants_ids else UNSET,
            prompt_token_ids=self._prompts[index].token_ids if wants_ids else UNSET,
        )

    def _content(self, delta: Delta) -> tuple[str, CompletionLogprobs | None]:
        """Return a delta's text and log probabilities, the prompt's before them where it is echoed."""
        text, parts = "", []
        echo, num_top = self._echoes[delta.choice], self._request.logprobs
        if self._request.echo and not self._is_open[delta.choice]:
            text = echo
            if num_top is not None:
                parts.append(self._echoed_logprobs(delta, num_top))
        self._is_open[delta.choice] = True
        if self._shows_answer:
            text += delta.text
            if num_top is not None:
                offsets = [len(echo) + offset for offset in delta.offsets]
                parts.append(legacy_logprobs(self._tokenizer, delta.token_ids, delta.logprobs, offsets, num_top))
        return text, join_legacy(parts) if parts else None

    def _echoed_logprobs(self, delta: Delta, num_top: int) -> CompletionLogprobs:
        prompt = self._prompts[delta.choice]
        offsets = _prompt_offsets(self._tokenizer, prompt.token_ids, len(self._echoes[delta.choice]))
        return legacy_logprobs(self._tokenizer, prompt.token_ids, (None, *delta.prompt_logprobs), offsets, num_top)


class ChatShape:
    """``/v1/chat/completions``."""

    def __init__(self, request: ChatCompletionRequest, heading: Heading, tokenizer: Tokenizer, prompt: Prompt) -> None:
        self._request = request
        self._heading = (heading.response_id, "chat.completion", heading.created, heading.model)
        self._chunk_heading = (heading.response_id, "chat.completion.chunk", heading.created, heading.model)
        self._tokenizer = tokenizer
        self._prompt = prompt

    def shows(self, delta: Delta) -> bool:
        """See Shape."""
        return _shows(delta, self._request)

    def openings(self, usage: ShownUsage) -> list[Completion]:
        """Return one event for each choice, saying whose words follow; with the prompt's tokens where asked for."""
        prompt_token_ids = self._prompt.token_ids if self._request.return_token_ids else UNSET
        choices = [
            ChatChunkChoice(index=index, delta=MessageDelta("", "assistant"), prompt_token_ids=prompt_token_ids)
            for index in range(self._request.n or 1)
        ]
        first, *others = choices
        opening = Completion(*self._chunk_heading, [first], usage, prompt_token_ids)
        return [opening, *(Completion(*self._chunk_heading, [choice], usage) for choice in others)]

    def chunk(self, delta: Delta, usage: ShownUsage) -> Completion:
        """See Shape."""
        choice = ChatChunkChoice(
            index=delta.choice,
            delta=MessageDelta(delta.text),
            logprobs=self._shown(delta.logprobs) if delta.logprobs else None,
            finish_reason=_reason(delta.finish_reason),
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._request.return_token_ids else UNSET,
        )
        return Completion(*self._chunk_heading, [choice], usage)

    def closing(self, usage: Usage) -> Completion:
        """See Shape."""
        return Completion(*self._chunk_heading, [], usage)

    def whole(self, deltas: Sequence[Sequence[Delta]], usage: Usage) -> Completion:
        """See Shape."""
        wants_ids = self._request.return_token_ids
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage("assistant", "".join(delta.text for delta in parts)),
                logprobs=self._shown([position for delta in parts for position in delta.logprobs]),
                finish_reason=_reason(parts[-1].finish_reason),
                stop_reason=parts[-1].stop_reason,
                token_ids=_joined_ids(parts) if wants_ids else UNSET,
                prompt_token_ids=self._prompt.token_ids if wants_ids else UNSET,
            )
            for index, parts in enumerate(deltas)
        ]
        return Completion(*self._heading, choices, usage, self._prompt.token_ids if wants_ids else UNSET)

    def _shown(self, positions: Sequence[PositionLogprobs]) -> ChatLogprobs | None:
        if not self._request.logprobs:
            return None
        return chat_logprobs(self._tokenizer, positions, self._request.top_logprobs or 0)


def _shows(delta: Delta, request: CompletionRequest | ChatCompletionRequest) -> bool:
    return delta.is_visible or bool(request.return_token_ids and delta.token_ids)


def _reason(reason: FinishReason | None) -> str | None:
    return None if reason is None else reason.value


def _joined_ids(parts: Sequence[Delta]) -> tuple[int, ...]:
    return tuple(token_id for delta in parts for token_id in delta.token_ids)


def _prompt_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], length: int) -> list[int]:
    """Return where each prompt token begins in the echoed text of ``length`` characters.

    What the tokenizer put before the text, such as a begin-of-sequence token, begins at 0 and has no length.
    """
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=False)
    offsets, num_decoded = [], 0
    for token_id in token_ids:
        offsets.append(num_decoded)
        num_decoded += len(decoder.push(token_id))
    num_added = max(0, num_decoded - length)
    return [max(0, offset - num_added) for offset in offsets]
