"""Texts, token ids and chats to prompts."""

import json
from dataclasses import replace
from typing import Any

import pytest
from api_site import BOS, ids_of

from disagg.base.errors import InvalidRequestError
from disagg.serve.api.prompts import chat_prompt, completion_prompts
from disagg.serve.api.schema import ChatCompletionRequest, CompletionRequest, decode_body
from disagg.serve.api.served_model import ServedModel

USER = {"role": "user", "content": "Hi"}


def rendered(model: ServedModel, messages: list[dict[str, Any]], **fields: Any) -> str:
    body = json.dumps({"messages": messages, **fields}).encode()
    request = decode_body(body, ChatCompletionRequest)
    return model.tokenizer.decode(chat_prompt(request, model, 10_000).prompt.token_ids, skip_special_tokens=False)


def prompts(model: ServedModel, prompt: Any, max_model_len: int = 10_000, **fields: Any) -> list[tuple[int, ...]]:
    request = decode_body(json.dumps({"prompt": prompt, **fields}).encode(), CompletionRequest)
    return [one.token_ids for one in completion_prompts(request, model, max_model_len)]


def test_prompts_come_as_text_token_ids_or_lists_of_either(served_model: ServedModel) -> None:
    hi = (BOS, *ids_of("Hi"))
    assert prompts(served_model, "Hi") == [hi]
    assert prompts(served_model, ["Hi", "Hi"]) == [hi, hi]
    assert prompts(served_model, [5, 6]) == [(5, 6)]
    assert prompts(served_model, [[5], [6, 7]]) == [(5,), (6, 7)]
    assert prompts(served_model, "Hi", add_special_tokens=False) == [hi[1:]]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty list"),
        (["a", 5], "mixes"),
        ([5, "a"], "mixes"),
        ([258], "token id 258 is outside the vocabulary of 258"),
        ([[]], "no tokens"),
        (["a"] * 257, "257 prompts, more than 256"),
    ],
)
def test_prompts_that_cannot_be_are_refused(served_model: ServedModel, prompt: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        prompts(served_model, prompt)
    assert caught.value.param == "prompt"


def test_a_chat_is_written_by_the_template(served_model: ServedModel) -> None:
    assert rendered(served_model, [USER]) == "<bos>[user]Hi\n[assistant]"
    assert rendered(served_model, [USER], add_generation_prompt=False) == "<bos>[user]Hi\n"


def test_a_developer_speaks_as_the_system(served_model: ServedModel) -> None:
    developer = {"role": "developer", "content": "Be brief."}
    assert rendered(served_model, [developer, USER]) == "<bos>[system]Be brief.\n[user]Hi\n[assistant]"


def test_text_parts_become_lines_and_other_parts_are_refused(served_model: ServedModel) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "[user]one\ntwo\n" in rendered(served_model, [{"role": "user", "content": parts}])
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(InvalidRequestError, match=r"'messages\[1\].content\[0\]' of type 'image_url'"):
        rendered(served_model, [USER, {"role": "user", "content": [image]}])


@pytest.mark.parametrize("begun", ["The riv", "  The riv", "The riv  "])
def test_the_final_message_can_be_continued(served_model: ServedModel, begun: str) -> None:
    # This template strips what it writes, as many do.
    messages = [USER, {"role": "assistant", "content": begun}]
    assert rendered(served_model, messages, continue_final_message=True) == "<bos>[user]Hi\n[assistant]The riv"


@pytest.mark.parametrize("begun", ["", "\n", None, []])
def test_a_final_message_without_text_can_be_continued(served_model: ServedModel, begun: Any) -> None:
    messages = [USER, {"role": "assistant", "content": begun}]
    assert rendered(served_model, messages, continue_final_message=True) == "<bos>[user]Hi\n[assistant]"


def test_a_text_that_the_template_itself_writes_can_be_continued(served_model: ServedModel) -> None:
    messages = [{"role": "assistant", "content": "user"}, {"role": "user", "content": "user"}]
    assert rendered(served_model, messages, continue_final_message=True) == "<bos>[assistant]user\n[user]user"


def test_continuing_excludes_beginning_an_answer(served_model: ServedModel) -> None:
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        rendered(served_model, [USER], continue_final_message=True, add_generation_prompt=True)


def test_a_template_of_the_request_runs_only_where_it_is_trusted(served_model: ServedModel) -> None:
    with pytest.raises(InvalidRequestError, match="--trust-request-chat-template"):
        rendered(served_model, [USER], chat_template="own")
    trusting = replace(served_model, trusts_request_templates=True)
    assert rendered(trusting, [USER], chat_template="own") == "own"
    with pytest.raises(InvalidRequestError, match="does not compile"):
        rendered(trusting, [USER], chat_template="{% if %}")


def test_template_variables_pass_through(served_model: ServedModel) -> None:
    trusting = replace(served_model, trusts_request_templates=True)
    fields = {"chat_template": "{{ mood }}", "chat_template_kwargs": {"mood": "glad"}}
    assert rendered(trusting, [USER], **fields) == "glad"


def test_an_echo_is_prepared_with_the_prompt(served_model: ServedModel) -> None:
    def echoes(**fields: Any) -> list[str | None]:
        request = decode_body(json.dumps(fields).encode(), CompletionRequest)
        return [one.text for one in completion_prompts(request, served_model, 100)]

    assert echoes(prompt=["Hi", "Ho"], echo=True) == ["Hi", "Ho"]
    assert echoes(prompt=[BOS, 72, 105], echo=True) == ["Hi"]
    assert echoes(prompt=[BOS, 72, 105], echo=True, skip_special_tokens=False) == ["<bos>Hi"]
    assert echoes(prompt="Hi") == [None]
