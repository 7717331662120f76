"""Bodies to requests: what is taken, and how each refusal names field, value and remedy."""

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.base.errors import ContextLengthError, InvalidRequestError
from disagg.models.generation_config import GenerationDefaults
from disagg.serve.api.jobs import chat_length, completion_length, sampling_params, stop_strings
from disagg.serve.api.schema import IGNORED, NEUTRAL, ChatCompletionRequest, CompletionRequest, decode_body

MESSAGES = [{"role": "user", "content": "Hi"}]
VOCAB_SIZE = 258


def completion(**fields: Any) -> CompletionRequest:
    return decode_body(json.dumps({"prompt": "x", **fields}).encode(), CompletionRequest)


def chat(**fields: Any) -> ChatCompletionRequest:
    return decode_body(json.dumps({"messages": MESSAGES, **fields}).encode(), ChatCompletionRequest)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "missing parameter 'prompt'"),
        (b'{"prompt": "\xff"}', "body"),
        (b'{"prompt": "x", "stream_options": {"foo": 1}}', "unknown parameter 'stream_options.foo'"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature|out of range"),
    ],
)
def test_a_malformed_body_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        decode_body(body, CompletionRequest)


@pytest.mark.parametrize(
    ("fields", "words", "param"),
    [
        ({"temperature": -1}, "'temperature': expected float >= 0.*got -1", "temperature"),
        ({"temperature": 2.5}, "'temperature': expected float <= 2.*got 2.5", "temperature"),
        ({"top_p": 0}, "'top_p': expected float > 0.*got 0", "top_p"),
        (
            {"repetition_penalty": 1e-300},
            "'repetition_penalty': expected float >= 0.01.*got 1e-300",
            "repetition_penalty",
        ),
        ({"repetition_penalty": 101}, "'repetition_penalty': expected float <= 100.*got 101", "repetition_penalty"),
        ({"n": 65}, "'n': expected int <= 64, got 65", "n"),
        ({"max_tokens": "many"}, "'max_tokens': expected int.*got \"many\"", "max_tokens"),
        ({"max_tokens": 10**40}, "'max_tokens': .*got 1", "max_tokens"),
        ({"max_completion_tokens": 2**63}, "'max_completion_tokens'", "max_completion_tokens"),
        ({"min_tokens": 2**64}, "'min_tokens'", "min_tokens"),
        ({"seed": 2**63}, "'seed': .*got 9223372036854775808", "seed"),
        ({"stop": ["a"] * 17}, "'stop': expected array of length <= 16", "stop"),
        ({"stop": "a" * 1001}, "'stop': expected str of length <= 1000", "stop"),
        ({"stop": ["a", "a" * 1001]}, r"'stop\[1\]': expected str of length <= 1000", "stop"),
        ({"stop_token_ids": [1] * 257}, "'stop_token_ids': expected array of length <= 256", "stop_token_ids"),
        ({"tools": [{}], "tool_choice": "auto"}, r"missing parameter 'tools\[0\].type'", "tools"),
        ({"stream_options": {"foo": 1}}, "unknown parameter 'stream_options.foo'", "stream_options"),
        ({"logit_bias": {"5": 101}}, "expected float <= 100", "logit_bias"),
        ({"stream": "yes"}, "'stream': expected bool.*got \"yes\"", "stream"),
        ({"guidance": 3}, "unknown parameter 'guidance'", "guidance"),
        ({"tools": [{"type": "function"}]}, r"missing parameter 'tools\[0\].function'", "tools"),
        ({"tools": [{"type": "custom"}]}, r"'tools\[0\].type': .*got \"custom\"", "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, r"'tools\[0\].function.name'", "tools"),
        ({"tool_choice": "perhaps"}, "'tool_choice': .*got \"perhaps\"", "tool_choice"),
        ({"response_format": {"type": "json"}}, "'response_format.type': .*got \"json\"", "response_format"),
        ({"structured_outputs": {"yaml": 1}}, "unknown parameter 'structured_outputs.yaml'", "structured_outputs"),
        ({"guided_choice": []}, "'guided_choice': expected array of length >= 1", "guided_choice"),
        ({"messages": []}, "'messages': expected array of length >= 1", "messages"),
        ({"messages": [{"role": "user", "cargo": 1}]}, r"unknown parameter 'messages\[0\].cargo'", "messages"),
    ],
)
def test_a_refusal_names_field_value_and_remedy(fields: dict[str, Any], words: str, param: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        chat(**fields)
    assert caught.value.param is not None
    assert caught.value.param.startswith(param)


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_what_never_changes_an_answer_is_taken(name: str) -> None:
    completion(**{name: {"any": ["thing"]}})


SENT_FOR_NOTHING: list[dict[str, Any]] = [
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    {"functions": [{"name": "f"}], "function_call": "none"},
    {"guidance": None, "reasoning": None, "": None},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False, "new": None}},
    {"stream": True, "stream_options": {"include_usage": None}},
    {"stream": False, "stream_options": None},
    {"parallel_tool_calls": True, "store": False, "metadata": {}, "service_tier": "auto", "user": "me"},
    {"modalities": ["text"], "response_format": {"type": "text"}, "verbosity": "medium", "prediction": None},
    {"logprobs": False, "top_logprobs": 0, "logit_bias": {}, "stop": [], "n": 1, "seed": None, "tool_choice": None},
    {"audio": None, "web_search_options": None, "functions": None, "function_call": None, "reasoning_effort": None},
    {"safety_identifier": "x", "prompt_cache_key": "x", "prompt_cache_retention": "24h"},
]


@pytest.mark.parametrize("fields", SENT_FOR_NOTHING)
def test_what_clients_send_for_nothing_is_taken(fields: dict[str, Any]) -> None:
    (sampling,) = sampling_params(chat(**fields), 4, VOCAB_SIZE)
    assert sampling.max_tokens == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_call_id": None, "name": None, "refusal": None, "audio": None, "function_call": None, "tool_calls": None},
        {"tool_calls": [], "annotations": [], "reasoning_content": None, "reasoning": None, "provider_fields": None},
        {"refusal": "", "prefix": False},
    ],
)
def test_what_clients_send_for_nothing_in_a_message_is_taken(fields: dict[str, Any]) -> None:
    (message,) = chat(messages=[MESSAGES[0] | fields]).messages
    assert (message.role, message.content) == ("user", "Hi")


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_is_not_supported_is_taken_unused_and_refused_used(name: str) -> None:
    for value in (None, *NEUTRAL[name]):
        completion(**{name: value})
    with pytest.raises(InvalidRequestError, match=f"'{name}' is not supported"):
        completion(**{name: {"some": "thing"}})


def test_no_parameter_is_both_served_and_in_a_table() -> None:
    of_completions, of_chats = {*CompletionRequest.__struct_fields__}, {*ChatCompletionRequest.__struct_fields__}
    assert not of_completions & (IGNORED | NEUTRAL.keys())
    assert of_chats & (IGNORED | NEUTRAL.keys()) == {"tools", "tool_choice", "parallel_tool_calls"}, "of chats alone"
    assert not IGNORED & NEUTRAL.keys()


def test_an_answer_can_be_sent_back_as_the_official_client_dumps_it() -> None:
    message = {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "tool_calls": None}
    assert chat(messages=[*MESSAGES, message]).messages[1].content == "Hi"


@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda children: (
            st.lists(children, max_size=3)
            | st.dictionaries(
                st.text(max_size=5) | st.sampled_from([*ChatCompletionRequest.__struct_fields__, *NEUTRAL]),
                children,
                max_size=5,
            )
        ),
        max_leaves=12,
    )
)
def test_no_json_value_does_worse_than_a_refusal(body: Any) -> None:
    data = msgspec.json.encode(body)
    for kind in (ChatCompletionRequest, CompletionRequest):
        with contextlib.suppress(InvalidRequestError):
            decode_body(data, kind)


def test_defaults_are_openais() -> None:
    (sampling,) = sampling_params(completion(), 16, VOCAB_SIZE)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.0, 0.0, 0.0)
    assert sampling.logprobs is None


def test_the_models_defaults_hold_where_a_client_says_nothing() -> None:
    defaults = GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1)

    (silent,) = sampling_params(completion(temperature=None), 16, VOCAB_SIZE, defaults)
    (said,) = sampling_params(completion(temperature=0, top_p=1, top_k=0, min_p=0), 16, VOCAB_SIZE, defaults)

    assert (silent.temperature, silent.top_p, silent.top_k, silent.min_p) == (0.6, 0.9, 20, 0.1)
    assert (said.temperature, said.top_p, said.top_k, said.min_p) == (0.0, 1.0, 0, 0.0)
    assert said.repetition_penalty == 1.1


def test_the_models_length_holds_where_a_client_says_none() -> None:
    defaults = GenerationDefaults(max_tokens=12)

    assert chat_length(chat(), 10, 100, defaults) == 12
    assert chat_length(chat(max_tokens=50), 10, 100, defaults) == 50
    assert completion_length(completion(), 10, 100, defaults) == 12
    assert completion_length(completion(), 10, 100, GenerationDefaults(max_tokens=99)) == 16


def test_an_explicit_null_means_the_default() -> None:
    nulls = {name: None for name in CompletionRequest.__struct_fields__ if name != "prompt"}
    given, default = (sampling_params(completion(seed=1, **fields), 16, VOCAB_SIZE) for fields in ({}, {}))
    assert given == default
    assert completion(**nulls) == completion()


def test_choice_k_samples_with_seed_plus_k() -> None:
    assert [one.seed for one in sampling_params(completion(seed=7, n=3), 16, VOCAB_SIZE)] == [7, 8, 9]
    assert [one.seed for one in sampling_params(completion(seed=-1, n=2), 16, VOCAB_SIZE)] == [2**64 - 1, 0]


def test_without_a_seed_each_request_draws_one() -> None:
    seeds = {sampling_params(completion(), 16, VOCAB_SIZE)[0].seed for _ in range(8)}
    assert len(seeds) == 8


def test_minus_one_and_zero_switch_top_k_off() -> None:
    assert [sampling_params(completion(top_k=k), 16, VOCAB_SIZE)[0].top_k for k in (-1, 0, 40)] == [0, 0, 40]


def test_logit_bias_is_keyed_by_token_ids() -> None:
    (sampling,) = sampling_params(completion(logit_bias={"9": 1, "5": -100}), 16, VOCAB_SIZE)
    assert sampling.logit_bias == ((5, -100.0), (9, 1.0))
    with pytest.raises(InvalidRequestError, match="keyed by token ids, got 'cat'"):
        sampling_params(completion(logit_bias={"cat": 1}), 16, VOCAB_SIZE)
    with pytest.raises(InvalidRequestError, match="token id 258 is outside the vocabulary of 258"):
        sampling_params(completion(logit_bias={"258": 1}), 16, VOCAB_SIZE)


@pytest.mark.parametrize("keys", [("1", "01"), ("01", "1"), ("7", "0007")])
def test_a_token_has_one_bias(keys: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match=f"twice, as '{keys[0]}' and '{keys[1]}'"):
        sampling_params(completion(logit_bias=dict.fromkeys(keys, 5)), 16, VOCAB_SIZE)


def test_a_stop_string_alone_may_not_be_empty_either() -> None:
    with pytest.raises(InvalidRequestError, match="empty string"):
        stop_strings(completion(stop=""))


def test_contradictions_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="'min_tokens' is 9, above the 4"):
        sampling_params(completion(min_tokens=9, max_tokens=4), 4, VOCAB_SIZE)
    with pytest.raises(InvalidRequestError, match="'top_logprobs' needs 'logprobs'"):
        sampling_params(chat(top_logprobs=3), 4, VOCAB_SIZE)
    with pytest.raises(InvalidRequestError, match="empty string"):
        stop_strings(completion(stop=["a", ""]))


def test_an_answer_has_16_tokens_by_default_and_a_chat_all_that_fit() -> None:
    assert completion_length(completion(), 10, 100) == 16
    assert completion_length(completion(), 95, 100) == 5
    assert chat_length(chat(), 10, 100) == 90
    assert chat_length(chat(max_tokens=5, max_completion_tokens=7), 10, 100) == 7


def test_what_does_not_fit_is_refused_with_limit_and_length() -> None:
    with pytest.raises(ContextLengthError, match=r"100 tokens.*prompt has 100 tokens: shorten"):
        chat_length(chat(), 100, 100)
    with pytest.raises(ContextLengthError, match=r"100 tokens.*prompt has 90 tokens and 11 more.*at most 10"):
        completion_length(completion(max_tokens=11), 90, 100)


def test_no_tokens_at_all_can_be_asked_of_an_echo_alone() -> None:
    assert completion_length(completion(max_tokens=0, echo=True), 10, 100) == 0
    with pytest.raises(InvalidRequestError, match="'max_tokens' is 0"):
        completion_length(completion(max_tokens=0), 10, 100)
