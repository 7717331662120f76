"""Log probabilities in OpenAI's two forms."""

import math

from disagg.base.sampling import PositionLogprobs, TokenLogprob
from disagg.models.tokenizer import Tokenizer
from disagg.serve.api.logprobs import chat_logprobs, legacy_logprobs

H, PART = ord("h"), 0xE2


def position(chosen: TokenLogprob, *top: TokenLogprob) -> PositionLogprobs:
    return PositionLogprobs(chosen, top)


def test_the_chosen_token_is_among_the_legacy_top_even_when_it_is_unlikely(tokenizer: Tokenizer) -> None:
    chosen, best = TokenLogprob(H, -3.0, 7), TokenLogprob(H + 1, -0.1, 1)
    found = legacy_logprobs(tokenizer, [H], [position(chosen, best)], [4], num_top=1)
    assert found.tokens == ["h"]
    assert found.token_logprobs == [-3.0]
    assert found.top_logprobs == [{"i": -0.1, "h": -3.0}]
    assert found.text_offset == [4]


def test_parts_of_characters_stay_apart(tokenizer: Tokenizer) -> None:
    one, other = TokenLogprob(PART, -1.0, 1), TokenLogprob(PART + 1, -2.0, 2)
    found = legacy_logprobs(tokenizer, [PART], [position(one, one, other)], [0], num_top=2)
    assert found.tokens == ["bytes:\\xe2"]
    assert found.top_logprobs == [{"bytes:\\xe2": -1.0, "bytes:\\xe3": -2.0}]


def test_the_chat_form_has_bytes(tokenizer: Tokenizer) -> None:
    one = TokenLogprob(PART, -1.0, 1)
    (content,) = chat_logprobs(tokenizer, [position(one, one)], num_top=1).content
    assert (content.token, content.bytes, len(content.top_logprobs)) == ("\ufffd", [PART], 1)


def test_impossible_tokens_have_a_number_that_json_knows(tokenizer: Tokenizer) -> None:
    never = TokenLogprob(H, -math.inf, 50)
    assert legacy_logprobs(tokenizer, [H], [position(never)], [0], 0).token_logprobs == [-9999.0]
    assert chat_logprobs(tokenizer, [position(never)], 0).content[0].logprob == -9999.0
