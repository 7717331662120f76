"""The official `openai` client against a real HTTP server."""

import openai
import pytest
from api_site import ANSWER, Serve

from disagg.base.errors import InstanceLostError, OverloadedError, UnavailableError

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Three rivers?"}]}


async def test_chat(serve: Serve) -> None:
    site = await serve()
    answer = await site.client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    request = site.router.requests[0]
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens == 32
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_chat_stream_opens_with_the_role_and_ends_with_the_usage(serve: Serve) -> None:
    site = await serve()
    stream = await site.client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 10


async def test_chat_logprobs(serve: Serve) -> None:
    site = await serve()
    answer = await site.client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2, max_tokens=3)  # type: ignore[call-overload]
    content = answer.choices[0].logprobs.content
    assert len(content) == 3
    assert "".join(one.token for one in content) == ANSWER[: sum(len(one.token) for one in content)]
    assert bytes(content[0].bytes).decode() == content[0].token
    assert [len(one.top_logprobs) for one in content] == [2, 2, 2]


async def test_completion_with_n_choices_gives_each_its_own_seed(serve: Serve) -> None:
    site = await serve()
    answer = await site.client.completions.create(model="tiny", prompt="Rivers:", n=3, seed=7, max_tokens=50)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == [ANSWER] * 3
    assert sorted(request.sampling.seed for request in site.router.requests) == [7, 8, 9]


async def test_completion_stream_of_several_prompts(serve: Serve) -> None:
    site = await serve()
    stream = await site.client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=50, stream=True)
    texts = dict.fromkeys(range(4), "")
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert set(texts.values()) == {ANSWER}


async def test_stop_string_ends_the_answer_and_aborts_the_sequence(serve: Serve) -> None:
    site = await serve()
    answer = await site.client.completions.create(model="tiny", prompt="Rivers:", stop=[" and the"], max_tokens=50)
    assert answer.choices[0].text == "The Rhine, the Danube"
    assert answer.choices[0].finish_reason == "stop"
    assert site.router.aborted == [site.router.requests[0].request_id]


async def test_echo_with_logprobs_covers_prompt_and_answer(serve: Serve) -> None:
    site = await serve()
    answer = await site.client.completions.create(model="tiny", prompt="Rivers: ", echo=True, logprobs=1, max_tokens=2)
    (choice,) = answer.choices
    assert choice.text.startswith("Rivers: The")
    assert choice.logprobs.token_logprobs[0] is None
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[1] == len(choice.logprobs.tokens[0])


async def test_echo_of_a_prompt_alone_scores_it(serve: Serve) -> None:
    site = await serve()
    answer = await site.client.completions.create(model="tiny", prompt="Rivers: ", echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == "Rivers: "
    assert answer.usage.completion_tokens == 0


async def test_sampling_extras_reach_the_engine_under_vllm_names(serve: Serve) -> None:
    site = await serve()
    extras = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 2}
    await site.client.completions.create(
        model="tiny", prompt=[1, 2, 3], logit_bias={"5": -100}, max_tokens=4, extra_body=extras
    )
    sampling = site.router.requests[0].sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (0, 0.1, 1.1)
    assert (sampling.ignore_eos, sampling.min_tokens, sampling.logit_bias) == (True, 2, ((5, -100.0),))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1}, r"'temperature': expected float >= 0.*got -1"),
        ({"max_tokens": "many"}, r"'max_tokens': expected int.*got \"many\""),
        ({"n": 65}, r"'n': expected int <= 64.*got 65"),
        ({"extra_body": {"guided_json": {}}}, "unknown parameter 'guided_json'"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "'tools' is not supported"),
        ({"response_format": {"type": "json_object"}}, "'response_format' of type 'json_object'"),
        ({"logit_bias": {"cat": 1}}, "keyed by token ids, got 'cat'"),
        ({"stop": [""]}, "empty string"),
        ({"top_logprobs": 3}, "needs 'logprobs'"),
        ({"max_tokens": 250}, r"\d+ tokens and 250 more were asked for, but the model's limit is 256"),
        ({"extra_body": {"min_tokens": 9}, "max_tokens": 4}, "'min_tokens' is 9"),
    ],
)
async def test_a_bad_request_names_field_value_and_remedy(serve: Serve, fields: dict[str, object], words: str) -> None:
    site = await serve()
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        await site.client.chat.completions.create(**{**CHAT, **fields})  # type: ignore[call-overload]
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param is not None
    assert site.router.requests == []


async def test_an_unknown_model_is_a_404(serve: Serve) -> None:
    site = await serve()
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here, only 'tiny'"):
        await site.client.completions.create(model="gpt-9", prompt="x")


async def test_a_prompt_that_is_too_long_says_limit_and_length(serve: Serve) -> None:
    site = await serve()
    with pytest.raises(openai.BadRequestError, match=r"the prompt has 300 tokens.*limit is 256"):
        await site.client.completions.create(model="tiny", prompt=[5] * 300)


async def test_overload_and_absence_before_the_first_token_are_proper_statuses(serve: Serve) -> None:
    full = await serve(refusal=OverloadedError("full", retry_after_s=2))
    with pytest.raises(openai.RateLimitError) as caught:
        await full.client.completions.create(model="tiny", prompt="x", stream=True)
    assert caught.value.response.headers["retry-after"] == "2"
    lost = await serve(script=lambda _: [5], error=InstanceLostError("prefill-0 died"))
    with pytest.raises(openai.InternalServerError, match="prefill-0 died") as gone:
        await lost.client.completions.create(model="tiny", prompt="x", stream=True)
    assert gone.value.status_code == 503
    nobody = await serve(live=False)
    with pytest.raises(openai.InternalServerError, match="no instance is ready"):
        await nobody.client.completions.create(model="tiny", prompt="x")


async def test_an_error_inside_a_stream_is_an_event(serve: Serve) -> None:
    site = await serve(script=lambda _: [5, 6, 7], error=UnavailableError("decode-0 died"))
    stream = await site.client.completions.create(model="tiny", prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="decode-0 died"):
        async for _ in stream:
            pass


async def test_an_api_key_is_asked_for(serve: Serve) -> None:
    site = await serve(api_key="secret")
    assert (await site.client.models.list()).data[0].id == "tiny"
    async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="guess", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError, match="wrong API key"):
            await stranger.models.list()
