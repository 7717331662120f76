"""Deltas to ``/v1/completions``."""

from collections.abc import Sequence

from msgspec import UNSET

from disagg.models.tokenizer import IncrementalDecoder, Tokenizer
from disagg.serve.api.answer import Delta
from disagg.serve.api.logprobs import join_legacy, legacy_logprobs, prompt_logprobs_shown
from disagg.serve.api.prompts import Prompt
from disagg.serve.api.responses import Completion, CompletionChoice, CompletionLogprobs, EventTemplate, Usage, event
from disagg.serve.api.schema import CompletionRequest
from disagg.serve.api.shapes import ChunkedShape, Heading, ShownUsage, joined_ids, reason_shown, shows


class CompletionShape(ChunkedShape):
    """``/v1/completions``. ``prompts[i]`` is the prompt of choice i, echoed where asked for."""

    def __init__(
        self, request: CompletionRequest, heading: Heading, tokenizer: Tokenizer, prompts: Sequence[Prompt]
    ) -> None:
        self._request = request
        self._heading = (heading.response_id, "text_completion", heading.created, heading.model)
        super().__init__(self._heading, request.stream_options)
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._echoes = [prompt.text or "" for prompt in prompts]
        self._is_open = [False] * len(prompts)
        self._shows_answer = request.most_tokens != 0
        self._plain: dict[int, EventTemplate] = {}
        """By choice, where the text alone differs from event to event."""

    def openings(self, usage: ShownUsage) -> bytes:
        """Return nothing: completions open with their first text."""
        return b""

    def chunk(self, delta: Delta, usage: ShownUsage) -> bytes:
        """See Shape."""
        if delta.is_plain and self._writes_plainly(delta.choice, usage):
            template = self._plain.get(delta.choice)
            if template is None:
                template = self._plain[delta.choice] = self._template(delta.choice, usage)
            return template.event(delta.text)
        if not shows(delta, self._request):
            return b""
        is_first = not self._is_open[delta.choice]
        text, logprobs = self._content(delta)
        wants_ids = self._request.return_token_ids
        choice = CompletionChoice(
            index=delta.choice,
            text=text,
            logprobs=logprobs,
            finish_reason=reason_shown(delta.finish_reason),
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if wants_ids else UNSET,
            prompt_token_ids=self._prompts[delta.choice].token_ids if wants_ids and is_first else UNSET,
        )
        return event(Completion(*self._heading, [choice], usage))

    def _writes_plainly(self, choice: int, usage: ShownUsage) -> bool:
        """Return whether the text is all that an event adds: it is not the first, which may echo the prompt."""
        is_open = self._is_open[choice] and self._shows_answer
        return is_open and not (self._request.return_token_ids or isinstance(usage, Usage))

    def _template(self, choice: int, usage: ShownUsage) -> EventTemplate:
        def make(text: str) -> Completion:
            written = CompletionChoice(index=choice, text=text, logprobs=None, finish_reason=None, stop_reason=None)
            return Completion(*self._heading, [written], usage)

        return EventTemplate(make)

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
            finish_reason=reason_shown(parts[-1].finish_reason),
            stop_reason=parts[-1].stop_reason,
            token_ids=joined_ids(parts) if wants_ids else UNSET,
            prompt_token_ids=self._prompts[index].token_ids if wants_ids else UNSET,
            prompt_logprobs=prompt_logprobs_shown(
                self._tokenizer,
                [position for delta in parts for position in delta.prompt_logprobs],
                self._request.prompt_logprobs,
            ),
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
