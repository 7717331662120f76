"""Deltas to responses: one class for each endpoint, for the whole answer and for its stream."""

from collections.abc import Sequence
from typing import Protocol

from disagg.base.sampling import FinishReason, PositionLogprobs
from disagg.serve.api.generation import Delta
from disagg.serve.api.logprobs import LegacyLogprobs, chat_logprobs, join_legacy
from disagg.serve.api.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    MessageDelta,
    Usage,
)
from disagg.serve.api.schema import ChatCompletionRequest, CompletionRequest
from disagg.serve.api.served_model import ServedModel


class Shape(Protocol):
    """How one request's deltas become JSON."""

    def opening(self, index: int, usage: Usage | None) -> Completion | ChatCompletion | None:
        """Return the event that opens a choice's stream, if there is one."""

    def chunk(self, delta: Delta, usage: Usage | None) -> Completion | ChatCompletion:
        """Return the event of one delta."""

    def closing(self, usage: Usage) -> Completion | ChatCompletion:
        """Return the event that carries the usage, after all choices."""

    def whole(self, deltas: Sequence[Sequence[Delta]], usage: Usage) -> Completion | ChatCompletion:
        """Return the answer, given every choice's deltas."""


def reason_text(reason: FinishReason | None) -> str | None:
    """Return what the client sees of a finish reason."""
    return None if reason is None else reason.value


class CompletionShape:
    """``/v1/completions``. ``prompts[i]`` is the prompt of choice i, echoed where asked for."""

    def __init__(
        self,
        request: CompletionRequest,
        response_id: str,
        created: int,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self._request = request
        self._head = (response_id, "text_completion", created, model.name)
        self._tokenizer = model.tokenizer
        self._prompts = prompts
        self._logprobs = [LegacyLogprobs(model.tokenizer, request.logprobs or 0) for _ in prompts]
        self._is_open = [False] * len(prompts)

    def opening(self, index: int, usage: Usage | None) -> None:
        """Completions open with their first text."""

    def chunk(self, delta: Delta, usage: Usage | None) -> Completion:
        """See Shape."""
        text, logprobs = self._content(delta)
        choice = CompletionChoice(delta.choice, text, logprobs, reason_text(delta.finish_reason), delta.stop_reason)
        return Completion(*self._head, [choice], usage)

    def closing(self, usage: Usage) -> Completion:
        """See Shape."""
        return Completion(*self._head, [], usage)

    def whole(self, deltas: Sequence[Sequence[Delta]], usage: Usage) -> Completion:
        """See Shape."""
        choices = []
        for index, parts in enumerate(deltas):
            contents = [self._content(delta) for delta in parts]
            logprobs = [part for _, part in contents if part is not None]
            choices.append(
                CompletionChoice(
                    index,
                    "".join(text for text, _ in contents),
                    join_legacy(logprobs) if logprobs else None,
                    reason_text(parts[-1].finish_reason),
                    parts[-1].stop_reason,
                )
            )
        return Completion(*self._head, choices, usage)

    def _content(self, delta: Delta) -> tuple[str, CompletionLogprobs | None]:
        """Return a delta's text and log probabilities, the prompt's before them where it is echoed."""
        builder = self._logprobs[delta.choice]
        texts, parts = [], []
        if self._request.echo and not self._is_open[delta.choice]:
            prompt = self._prompts[delta.choice]
            texts.append(self._tokenizer.decode(prompt, skip_special_tokens=self._request.skip_special_tokens))
            if self._request.logprobs is not None:
                parts.append(builder.of_prompt(prompt, delta.prompt_logprobs))
        self._is_open[delta.choice] = True
        if not (self._request.echo and self._request.max_tokens == 0):
            # A prompt alone was asked about, and the one token sampled after it is not shown.
            texts.append(delta.text)
            if self._request.logprobs is not None:
                parts.append(builder.of_answer(delta.logprobs))
        return "".join(texts), join_legacy(parts) if parts else None


class ChatShape:
    """``/v1/chat/completions``."""

    def __init__(self, request: ChatCompletionRequest, response_id: str, created: int, model: ServedModel) -> None:
        self._request = request
        self._head = (response_id, "chat.completion", created, model.name)
        self._chunk_head = (response_id, "chat.completion.chunk", created, model.name)
        self._tokenizer = model.tokenizer

    def opening(self, index: int, usage: Usage | None) -> ChatCompletion:
        """See Shape."""
        choice = ChatChunkChoice(index, MessageDelta(role="assistant", content=""), None, None)
        return ChatCompletion(*self._chunk_head, [choice], usage)

    def chunk(self, delta: Delta, usage: Usage | None) -> ChatCompletion:
        """See Shape."""
        choice = ChatChunkChoice(
            delta.choice,
            MessageDelta(content=delta.text),
            self._shown(delta.logprobs),
            reason_text(delta.finish_reason),
            delta.stop_reason,
        )
        return ChatCompletion(*self._chunk_head, [choice], usage)

    def closing(self, usage: Usage) -> ChatCompletion:
        """See Shape."""
        return ChatCompletion(*self._chunk_head, [], usage)

    def whole(self, deltas: Sequence[Sequence[Delta]], usage: Usage) -> ChatCompletion:
        """See Shape."""
        choices = [
            ChatChoice(
                index,
                AssistantMessage("assistant", "".join(delta.text for delta in parts)),
                self._shown([position for delta in parts for position in delta.logprobs]),
                reason_text(parts[-1].finish_reason),
                parts[-1].stop_reason,
            )
            for index, parts in enumerate(deltas)
        ]
        return ChatCompletion(*self._head, choices, usage)

    def _shown(self, positions: Sequence[PositionLogprobs]) -> ChatLogprobs | None:
        if not self._request.logprobs:
            return None
        return chat_logprobs(self._tokenizer, positions, self._request.top_logprobs or 0)
