"""Log probabilities by token id to OpenAI's two forms, with the tokens' texts."""

from collections.abc import Iterable, Sequence

from disagg.base.sampling import PositionLogprobs, TokenLogprob
from disagg.models.tokenizer import Tokenizer
from disagg.serve.api.responses import ChatLogprobs, CompletionLogprobs, ContentLogprob, TopLogprob


class LegacyLogprobs:
    """Builds the parallel lists of ``/v1/completions``, counting text offsets from the start of the choice's text."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0

    def of_prompt(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs]) -> CompletionLogprobs:
        """Return the lists of an echoed prompt; its first token has no probability."""
        first = self._build([token_ids[0]], [None])
        rest = self.of_answer(positions)
        return CompletionLogprobs(
            tokens=first.tokens + rest.tokens,
            token_logprobs=first.token_logprobs + rest.token_logprobs,
            top_logprobs=first.top_logprobs + rest.top_logprobs,
            text_offset=first.text_offset + rest.text_offset,
        )

    def of_answer(self, positions: Sequence[PositionLogprobs]) -> CompletionLogprobs:
        """Return the lists of newly sampled tokens."""
        return self._build([position.chosen.token_id for position in positions], positions)

    def _build(self, token_ids: Sequence[int], positions: Iterable[PositionLogprobs | None]) -> CompletionLogprobs:
        texts = [self._tokenizer.token_text(token_id) for token_id in token_ids]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        known = list(positions)
        return CompletionLogprobs(
            tokens=texts,
            token_logprobs=[None if position is None else position.chosen.logprob for position in known],
            top_logprobs=[None if position is None else self._top(position) for position in known],
            text_offset=offsets,
        )

    def _top(self, position: PositionLogprobs) -> dict[str, float]:
        """Return the likely tokens by text, and the chosen one, as OpenAI does."""
        likely = (*position.top[: self._num_top], position.chosen)
        return {self._tokenizer.token_text(one.token_id): one.logprob for one in likely}


def join_legacy(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Return consecutive parts of one choice as a whole."""
    return CompletionLogprobs(
        tokens=[token for part in parts for token in part.tokens],
        token_logprobs=[value for part in parts for value in part.token_logprobs],
        top_logprobs=[value for part in parts for value in part.top_logprobs],
        text_offset=[value for part in parts for value in part.text_offset],
    )


def chat_logprobs(tokenizer: Tokenizer, positions: Sequence[PositionLogprobs], num_top: int) -> ChatLogprobs:
    """Return the form of ``/v1/chat/completions``."""

    def shown(one: TokenLogprob) -> TopLogprob:
        return TopLogprob(tokenizer.token_text(one.token_id), one.logprob, list(tokenizer.token_bytes(one.token_id)))

    content = []
    for position in positions:
        chosen = shown(position.chosen)
        top = [shown(one) for one in position.top[:num_top]]
        content.append(ContentLogprob(chosen.token, chosen.logprob, chosen.bytes, top))
    return ChatLogprobs(content)
