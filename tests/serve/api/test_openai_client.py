"""The official `openai` client against a real HTTP server."""

import asyncio
import json
from typing import Any

import openai
import pytest
from api_site import ANSWER, BOS, EOS, Serve, ids_of
from scripted_router import MAX_MODEL_LEN, NUM_CACHED

from disagg.base.errors import InstanceLostError, OverloadedError, RequestTimeoutError, UnavailableError

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Three rivers?"}]}


async def test_chat(serve: Serve) -> None:
    site = await serve()
    answer = await site.client.chat.completions.create(**CHAT)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    (request,) = site.router.requests
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens == NUM_CACHED
    assert answer.usage.completion_tokens == len(ids_of(ANSWER)) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_chat_stream_opens_with_the_role_and_ends_with_the_usage(serve: Serve) -> None:
    site = await serve()
    stream = await site.client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(ids_of(ANSWER)) + 1
    assert len({chunk.id for chunk in chunks}) == 1


async def test_usage_can_come_with_every_event(serve: Serve) -> None:
    site = await serve()
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = await site.client.completions.create(
        model="tiny", prompt="x", max_tokens=3, stream=True, stream_options=options
    )
    assert [chunk.usage.completion_tokens async for chunk in stream] == [1, 2, 3, 3]


async def test_chat_logprobs_whole_and_streamed(serve: Serve) -> None:
    site = await serve()
    asked = {**CHAT, "logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    whole = (await site.client.chat.completions.create(**asked)).choices[0].logprobs.content
    stream = await site.client.chat.completions.create(**asked, stream=True)
    pieces = [one async for chunk in stream if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert pieces == whole
    assert "".join(one.token for one in whole) == ANSWER[:3]
    assert bytes(whole[0].bytes).decode() == whole[0].token
    assert [[top.logprob for top in one.top_logprobs] for one in whole] == [[-0.5, -1.5]] * 3


async def test_n_choices_have_seeds_of_their_own(serve: Serve) -> None:
    site = await serve()
    answer = await site.client.completions.create(model="tiny", prompt="Rivers:", n=3, seed=7, max_tokens=80)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text for choice in answer.choices] == [ANSWER] * 3
    assert sorted(request.sampling.seed for request in site.router.requests) == [7, 8, 9]
    assert answer.usage.prompt_tokens == len(site.router.requests[0].prompt_token_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens == NUM_CACHED


async def test_several_prompts_with_several_choices_stream_side_by_side(serve: Serve) -> None:
    site = await serve(lambda request: [*request.prompt_token_ids, request.sampling.seed, EOS])
    stream = await site.client.completions.create(
        model="tiny", prompt=[[97], [98]], n=2, seed=48, max_tokens=50, stream=True
    )
    texts = dict.fromkeys(range(4), "")
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "a0", 1: "a1", 2: "b0", 3: "b1"}


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stop_string_ends_the_answer_and_aborts_the_sequence(serve: Serve, streamed: bool) -> None:
    # The sequence gets no token after the one that completes the stop string, so only an abort can end it.
    gate = asyncio.Semaphore(ANSWER.index(" and the") + len(" and the"))
    site = await serve(gate=gate)
    asked = {"model": "tiny", "prompt": "Rivers:", "stop": ["zebra", " and the"], "max_tokens": 50}
    if streamed:
        stream = await site.client.completions.create(**asked, stream=True)
        chunks = [chunk async for chunk in stream]
        text, last = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0]
    else:
        last = (await site.client.completions.create(**asked)).choices[0]
        text = last.text
    assert text == "The Rhine, the Danube"
    assert last.finish_reason == "stop"
    assert last.stop_reason == " and the"  # type: ignore[attr-defined]
    assert site.router.aborted == [site.router.requests[0].request_id]


async def test_a_stop_token_is_named_as_the_reason(serve: Serve) -> None:
    site = await serve()
    answer = await site.client.completions.create(
        model="tiny", prompt="x", max_tokens=50, extra_body={"stop_token_ids": [ord("R")]}
    )
    assert answer.choices[0].text == "The "
    assert answer.choices[0].stop_reason == ord("R")  # type: ignore[attr-defined]
    assert site.router.aborted == []


async def test_echo_with_logprobs_covers_prompt_and_answer(serve: Serve) -> None:
    site = await serve()
    answer = await site.client.completions.create(model="tiny", prompt="Größe: ", echo=True, logprobs=1, max_tokens=2)
    (choice,) = answer.choices
    assert choice.text == "Größe: Th"
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    assert len(tokens) == len(offsets) == len(site.router.requests[0].prompt_token_ids) + 2
    assert choice.logprobs.token_logprobs[:2] == [None, -0.5]
    assert choice.logprobs.top_logprobs[0] is None
    assert tokens[0] == "<bos>"
    assert "".join(choice.text[at] for token, at in zip(tokens, offsets, strict=True) if len(token) == 1) == "Gre: Th"
    assert offsets == sorted(offsets)


async def test_echo_of_a_prompt_alone_scores_it(serve: Serve) -> None:
    site = await serve()
    answer = await site.client.completions.create(model="tiny", prompt="Rivers", echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer.choices
    assert choice.text == "Rivers"
    assert choice.logprobs.tokens == ["<bos>", *"Rivers"]
    assert answer.usage.completion_tokens == 0


async def test_token_ids_come_when_asked_for(serve: Serve) -> None:
    site = await serve()
    extra = {"return_token_ids": True}
    whole = await site.client.completions.create(model="tiny", prompt="ab", max_tokens=3, extra_body=extra)
    assert whole.choices[0].prompt_token_ids == [BOS, 97, 98]  # type: ignore[attr-defined]
    assert whole.choices[0].token_ids == ids_of(ANSWER[:3])  # type: ignore[attr-defined]
    stream = await site.client.chat.completions.create(**CHAT, max_tokens=3, stream=True, extra_body=extra)
    streamed = [token async for chunk in stream for token in getattr(chunk.choices[0], "token_ids", [])]
    assert streamed == ids_of(ANSWER[:3])


@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
@pytest.mark.parametrize("n", [1, 2])
async def test_every_token_id_comes_though_its_text_is_held_back(serve: Serve, endpoint: str, n: int) -> None:
    site = await serve()
    asked = {"prompt": "ab"} if endpoint == "completions" else {"messages": CHAT["messages"]}
    asked |= {"stream": True, "return_token_ids": True, "max_tokens": 8, "n": n, "stop": [ANSWER[1:20], "ß€"]}
    response = await site.http.post(f"/v1/{endpoint}", json=asked)
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    prompt = list(site.router.requests[0].prompt_token_ids)
    for index in range(n):
        own = [choice for choice in choices if choice["index"] == index]
        assert [token for choice in own for token in choice.get("token_ids", [])] == ids_of(ANSWER[:8])
        assert [choice["prompt_token_ids"] for choice in own if "prompt_token_ids" in choice] == [prompt]
        assert "prompt_token_ids" in own[0]
    if endpoint == "chat/completions":
        assert events[0]["prompt_token_ids"] == prompt  # where vLLM has them


async def test_sampling_extras_reach_the_engine_under_vllm_names(serve: Serve) -> None:
    site = await serve()
    extras = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 2, "priority": -3}
    await site.client.completions.create(
        model="tiny", prompt=[1, 2, 3], logit_bias={"5": -100}, max_tokens=4, extra_body=extras, user="me"
    )
    (request,) = site.router.requests
    sampling = request.sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (0, 0.1, 1.1)
    assert (sampling.ignore_eos, sampling.min_tokens, sampling.logit_bias) == (True, 2, ((5, -100.0),))
    assert request.priority == -3


async def test_latency_objectives_come_from_headers_and_before_them_from_the_body(serve: Serve) -> None:
    site = await serve()
    headers = {"x-slo-ttft-ms": "500", "x-slo-tpot-ms": "50"}
    for body in ({}, {"x_slo_tpot_ms": 20}):
        await site.client.completions.create(
            model="tiny", prompt=[1, 2, 3], max_tokens=4, extra_headers=headers, extra_body=body
        )
    first, second = (request.objectives for request in site.router.requests)
    assert (first.ttft_s, first.tpot_s) == (0.5, 0.05)
    assert (second.ttft_s, second.tpot_s) == (0.5, 0.02)


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "1e300", ""])
async def test_a_header_that_is_no_objective_is_refused_by_name(value: str, serve: Serve) -> None:
    site = await serve()
    with pytest.raises(openai.BadRequestError, match="x-slo-ttft-ms"):
        await site.client.completions.create(
            model="tiny", prompt=[1, 2, 3], max_tokens=4, extra_headers={"x-slo-ttft-ms": value}
        )


async def test_the_largest_prompts_are_tokenised_aside_and_answered_alike(serve: Serve) -> None:
    site = await serve()
    padding = {"metadata": {"ballast": "x" * 20_000}}
    answer = await site.client.chat.completions.create(**CHAT, extra_body=padding)
    assert answer.choices[0].message.content == ANSWER


async def test_a_bad_request_is_a_400_that_names_the_parameter(serve: Serve) -> None:
    site = await serve()
    with pytest.raises(openai.BadRequestError, match=r"'temperature': expected float >= 0.*got -1") as caught:
        await site.client.chat.completions.create(**CHAT, temperature=-1)
    assert (caught.value.type, caught.value.param, caught.value.code) == ("invalid_request_error", "temperature", None)
    assert site.router.requests == []


async def test_an_unknown_model_is_a_404(serve: Serve) -> None:
    site = await serve()
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here, only 'tiny'") as caught:
        await site.client.completions.create(model="gpt-9", prompt="x")
    assert caught.value.code == "model_not_found"


async def test_a_prompt_that_is_too_long_says_limit_and_length(serve: Serve) -> None:
    site = await serve()
    with pytest.raises(openai.BadRequestError, match=r"256 tokens.*the prompt has 300 tokens") as caught:
        await site.client.completions.create(model="tiny", prompt=[5] * 300)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InstanceLostError("prefill-0 died"), 503),
        (RequestTimeoutError("600 s have passed"), 408),
        (RuntimeError("a bug"), 500),
    ],
)
async def test_an_error_before_the_first_token_is_a_status(
    serve: Serve, streamed: bool, error: Exception, status: int
) -> None:
    site = await serve(lambda _: [], error=error)
    with pytest.raises(openai.APIStatusError) as caught:
        await site.client.completions.create(model="tiny", prompt="x", stream=streamed)
    assert caught.value.status_code == status
    assert ("a bug" in str(caught.value)) is False
    assert site.router.aborted == [site.router.requests[0].request_id]


async def test_an_error_inside_a_stream_is_an_event(serve: Serve) -> None:
    site = await serve(lambda _: ids_of("abc"), error=UnavailableError("decode-0 died"))
    stream = await site.client.completions.create(model="tiny", prompt="x", stream=True)
    assert [(await anext(stream)).choices[0].text for _ in range(3)] == ["a", "b", "c"]
    with pytest.raises(openai.APIError, match="decode-0 died"):
        await anext(stream)


async def test_overload_says_when_to_come_back(serve: Serve) -> None:
    site = await serve(refusal=OverloadedError("1024 are under way", retry_after_s=3))
    with pytest.raises(openai.RateLimitError, match="1024 are under way") as caught:
        await site.client.completions.create(model="tiny", prompt="x", stream=True)
    assert caught.value.response.headers["retry-after"] == "3"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("best_effort", [False, True])
async def test_a_client_learns_that_it_is_served_as_best_effort(serve: Serve, stream: bool, best_effort: bool) -> None:
    site = await serve(best_effort=best_effort)
    async with site.client.completions.with_streaming_response.create(
        model="tiny", prompt="x", stream=stream
    ) as answer:
        assert answer.headers.get("x-slo-service") == ("best-effort" if best_effort else None)
        await answer.read()
    [view] = (await site.http.get("/requests")).json()["requests"]
    assert view["is_best_effort"] == best_effort


async def test_when_one_of_n_choices_is_refused_none_is_kept(serve: Serve) -> None:
    site = await serve(refusal=OverloadedError("full"), num_accepted=2)
    with pytest.raises(openai.RateLimitError):
        await site.client.completions.create(model="tiny", prompt="x", n=3)
    assert sorted(site.router.aborted) == sorted(request.request_id for request in site.router.requests)
    assert len(site.router.aborted) == 2


async def test_without_a_live_instance_there_is_a_503(serve: Serve) -> None:
    site = await serve(live=False, instance_wait_s=0.01)
    with pytest.raises(openai.InternalServerError, match=r"no instance became ready in 0\.01 s") as caught:
        await site.client.completions.create(model="tiny", prompt="x")
    assert caught.value.status_code == 503
    assert "retry-after" in caught.value.response.headers


async def test_an_api_key_is_asked_for(serve: Serve) -> None:
    site = await serve(api_key="secret")
    assert (await site.client.models.list()).data[0].id == "tiny"
    async with openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="guess", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError, match="wrong API key"):
            await stranger.chat.completions.create(**CHAT)
    assert site.router.requests == []


async def test_prompt_logprobs_as_vllm_has_them(serve: Serve) -> None:
    site = await serve()
    extra = {"prompt_logprobs": 1}
    answer = await site.client.completions.create(model="tiny", prompt=[97, 98], max_tokens=1, extra_body=extra)
    expected = [None, {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}]
    assert answer.choices[0].prompt_logprobs == expected  # type: ignore[attr-defined]
    chat = await site.client.chat.completions.create(**CHAT, max_tokens=1, extra_body=extra)
    assert len(chat.prompt_logprobs) == len(site.router.requests[1].prompt_token_ids)  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError, match="whole answers alone"):
        await site.client.chat.completions.create(**CHAT, stream=True, extra_body=extra)


async def test_prompts_are_cut_from_the_left(serve: Serve) -> None:
    site = await serve()
    for wanted, kept in ((2, [98, 99]), (-1, [97, 98, 99])):
        extra = {"truncate_prompt_tokens": wanted}
        asked = {"model": "tiny", "prompt": [97, 98, 99], "max_tokens": 1, "echo": True}
        answer = await site.client.completions.create(**asked, extra_body=extra)
        assert site.router.requests[-1].prompt_token_ids == tuple(kept)
        assert answer.choices[0].text == bytes(kept).decode() + ANSWER[0]
    await site.client.completions.create(
        model="tiny", prompt=[97] * 1000, max_tokens=6, extra_body={"truncate_prompt_tokens": -1}
    )
    assert len(site.router.requests[-1].prompt_token_ids) == MAX_MODEL_LEN - 6
    for wanted in (0, MAX_MODEL_LEN):
        extra = {"truncate_prompt_tokens": wanted}
        with pytest.raises(openai.BadRequestError, match="'truncate_prompt_tokens' is"):
            await site.client.completions.create(model="tiny", prompt="x", extra_body=extra)


async def test_words_and_tokens_that_may_and_may_not_come(serve: Serve) -> None:
    site = await serve()
    extra: dict[str, Any] = {"bad_words": ["ab", " c"], "allowed_token_ids": [1, 2]}
    await site.client.completions.create(model="tiny", prompt="x", max_tokens=1, extra_body=extra)
    sampling = site.router.requests[0].sampling
    assert sampling.bad_words == ((97, 98), (32, 99))
    assert sampling.allowed_token_ids == (1, 2)
    extra = {"allowed_token_ids": [300]}
    with pytest.raises(openai.BadRequestError, match="'allowed_token_ids': token id 300 is outside"):
        await site.client.completions.create(model="tiny", prompt="x", extra_body=extra)
    with pytest.raises(openai.BadRequestError, match="'suffix' is not supported"):
        await site.client.completions.create(model="tiny", prompt="x", suffix="y")
