"""One choice of an answer: from the outputs of its sequence to what the client sees of them."""

import msgspec

from disagg.base.messages import SequenceOutput
from disagg.base.request import GenerationRequest
from disagg.base.sampling import FinishReason, PositionLogprobs
from disagg.serve.api.text_stream import TextStream


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
        if self.num_tokens and not self._text.may_stop and _is_plain(output):
            self.num_tokens += 1
            start = self._text.num_decoded
            return Delta(self._choice, self._text.push(output.token_ids[0]), output.token_ids, offsets=(start,))
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
