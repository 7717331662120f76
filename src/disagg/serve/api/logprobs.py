"""Log probabilities by token id to OpenAI's two forms, with the tokens' texts."""

from collections.abc import Sequence
from typing import Final

from msgspec import UNSET, UnsetType

from disagg.base.sampling import PositionLogprobs, TokenLogprob
from disagg.models.tokenizer import Tokenizer
from disagg.serve.api.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    ContentLogprob,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)

IMPOSSIBLE: Final = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI and vLLM use the same."""


def legacy_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    offsets: Sequence[int],
    num_top: int,
) -> CompletionLogprobs:
    """Return the parallel lists of ``/v1/completions``; None stands for a token that nothing came before."""
    return CompletionLogprobs(
        tokens=[_legacy_text(tokenizer, token_id) for token_id in token_ids],
        token_logprobs=[None if position is None else _finite(position.chosen) for position in positions],
        top_logprobs=[None if position is None else _top(tokenizer, position, num_top) for position in positions],
        text_offset=list(offsets),
    )


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
        return TopLogprob(tokenizer.token_text(one.token_id), _finite(one), list(tokenizer.token_bytes(one.token_id)))

    content = []
    for position in positions:
        chosen = shown(position.chosen)
        top = [shown(one) for one in position.top[:num_top]]
        content.append(ContentLogprob(chosen.token, chosen.logprob, chosen.bytes, top))
    return ChatLogprobs(content)


def prompt_logprobs_shown(
    tokenizer: Tokenizer, positions: Sequence[PositionLogprobs], num_top: int | None
) -> PromptLogprobs | UnsetType:
    """Return vLLM's form of ``prompt_logprobs``, nothing where they were not asked for.

    ``positions`` are those of the prompt's tokens from the second on.
    """
    if num_top is None:
        return UNSET

    def shown(position: PositionLogprobs) -> dict[str, PromptLogprob]:
        likely = (position.chosen, *position.top[:num_top])
        return {
            str(one.token_id): PromptLogprob(_finite(one), one.rank, tokenizer.token_text(one.token_id))
            for one in likely
        }

    return [None, *map(shown, positions)]


def _top(tokenizer: Tokenizer, position: PositionLogprobs, num_top: int) -> dict[str, float]:
    """Return the likely tokens by text, and the chosen one, as OpenAI does."""
    likely = (*position.top[:num_top], position.chosen)
    return {_legacy_text(tokenizer, one.token_id): _finite(one) for one in likely}


def _legacy_text(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token's text; part of a character as OpenAI writes it, so that two such tokens stay two keys."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(one: TokenLogprob) -> float:
    return max(one.logprob, IMPOSSIBLE)
