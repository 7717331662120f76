"""Answers of a given form, and calls of tools, by the official client's own helpers: two instances, the default model.

Every answer here is handed over after its first token, so that the grammar goes on on another instance.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from server_process import ServerProcess, serving

CHAT: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "messages": [{"role": "user", "content": "Tell me of the river Danube."}],
    "temperature": 0.0,
}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time"}},
]

BROKEN_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}]


class River(pydantic.BaseModel):
    """What is asked about."""

    name: Literal["Danube", "Rhine"]
    long: bool
    kilometres: int = pydantic.Field(ge=1, le=9999)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving("--max-model-len", "1024", "--kv-memory", "256MiB") as server:
        yield server


def test_the_parse_helper_gives_an_object(server: ServerProcess) -> None:
    answer = server.client.chat.completions.parse(**CHAT, response_format=River, max_tokens=60)
    assert answer.choices[0].finish_reason == "stop"
    river = answer.choices[0].message.parsed
    assert isinstance(river, River)
    assert river == River.model_validate_json(answer.choices[0].message.content or "")


def test_the_stream_helper_gives_the_same_object(server: ServerProcess) -> None:
    whole = server.client.chat.completions.parse(**CHAT, response_format=River, max_tokens=60, logprobs=True)
    with server.client.chat.completions.stream(**CHAT, response_format=River, max_tokens=60) as stream:
        for event in stream:
            assert event.type in ("chunk", "content.delta", "content.done")
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed
    assert whole.choices[0].logprobs is not None


@pytest.mark.parametrize("seed", range(3))
def test_sampled_documents_are_documents(server: ServerProcess, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {"cities": {"type": "array", "items": WEATHER, "minItems": 2, "maxItems": 2}},
        "required": ["cities"],
        "additionalProperties": False,
    }
    asked = {**CHAT, "temperature": 1.5, "seed": seed, "max_tokens": 200}
    form = {"type": "json_schema", "json_schema": {"name": "cities", "schema": schema, "strict": True}}
    choice = server.client.chat.completions.create(**asked, response_format=form).choices[0]
    assert choice.finish_reason == "stop"
    cities = json.loads(choice.message.content)["cities"]
    assert [sorted(city) for city in cities] == [["city", "unit"]] * 2


@pytest.mark.parametrize(
    ("asked", "texts"),
    [
        ({"guided_choice": ["Vienna", "Berlin"]}, {"Vienna", "Berlin"}),
        ({"structured_outputs": {"choice": ["Vienna"]}}, {"Vienna"}),
        ({"guided_regex": "(ab|cd){2}"}, {"abab", "abcd", "cdab", "cdcd"}),
        ({"structured_outputs": {"grammar": 'root ::= "x" ("y" | "z")'}}, {"xy", "xz"}),
        ({"guided_grammar": 'start: "go" | "stop"'}, {"go", "stop"}),
        ({"guided_json": '{"enum": [1, 2]}'}, {"1", "2"}),
    ],
)
def test_vllms_fields(server: ServerProcess, asked: dict[str, Any], texts: set[str]) -> None:
    answer = server.client.completions.create(model=CHAT["model"], prompt="The capital is", extra_body=asked)
    assert answer.choices[0].text in texts
    assert answer.choices[0].finish_reason == "stop"


def test_a_document_that_max_tokens_cuts_says_length(server: ServerProcess) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}}
    choice = server.client.chat.completions.create(**CHAT, response_format=form, max_tokens=2).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.content.startswith("{")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"guided_json": {"properties": {"age": {"items": {"type": "strng"}}}}}, r"'guided_json.properties.age.items'"),
        ({"guided_json": {"$ref": "#/$defs/x"}}, "does not exist"),
        ({"guided_json": "{"}, "no JSON schema"),
        ({"guided_regex": "(a"}, "'guided_regex' is no grammar"),
        ({"guided_grammar": "start: nobody"}, "'guided_grammar' is no grammar"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "exclude each other"),
        ({"guided_choice": ["a"], "ignore_eos": True}, "exclude each other"),
        ({"guided_json": {"enum": ["x" * 1000] * 300}}, "more than 262144 bytes"),
        ({"response_format": {"type": "json_schema"}}, "missing parameter 'response_format.json_schema'"),
    ],
)
def test_what_is_no_form_is_refused_with_its_place(server: ServerProcess, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        server.client.completions.create(model=CHAT["model"], prompt="x", extra_body=asked)


def test_a_required_tool_is_called(server: ServerProcess) -> None:
    answer = server.client.chat.completions.create(
        **CHAT, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=120
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name in ("get_weather", "get_time")
    assert isinstance(json.loads(call.function.arguments), dict)


def test_a_named_tool_is_called_and_its_result_goes_back(server: ServerProcess) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    asked = {**CHAT, "tools": TOOLS, "tool_choice": named, "max_tokens": 120}
    choice = server.client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "stop"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert sorted(json.loads(call.function.arguments)) == ["city", "unit"]
    turns = [
        *CHAT["messages"],
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"},
    ]
    answer = server.client.chat.completions.create(**{**CHAT, "messages": turns}, tools=TOOLS, max_tokens=8)
    assert answer.usage.prompt_tokens > 200
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_calls_stream_as_the_client_puts_them_together(server: ServerProcess) -> None:
    asked = {**CHAT, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 120}
    (expected,) = server.client.chat.completions.create(**asked).choices[0].message.tool_calls
    with server.client.chat.completions.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == (expected.function.name, expected.function.arguments)
    assert final.choices[0].finish_reason == "tool_calls"
    assert "tool_calls.function.arguments.done" in kinds
    assert final.choices[0].message.content in (None, "")


def test_an_agents_loop_over_responses(server: ServerProcess) -> None:
    """Call, result, answer: each turn is sent with all that came before, since nothing is stored."""
    tools: list[Any] = [{"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}]
    items: list[Any] = [{"role": "user", "content": "How is the weather in Ulm?"}]
    asked: dict[str, Any] = {"model": CHAT["model"], "tools": tools, "temperature": 0.0, "max_output_tokens": 80}
    called = server.client.responses.create(**asked, input=items, tool_choice="required", parallel_tool_calls=False)
    (call,) = called.output
    assert call.type == "function_call"
    assert sorted(json.loads(call.arguments)) == ["city", "unit"]
    items += [item.model_dump(exclude_none=True) for item in called.output]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees"})
    answer = server.client.responses.parse(**asked, input=items, tool_choice="none", text_format=River)
    assert answer.status == "completed"
    assert isinstance(answer.output_parsed, River)
    assert answer.usage.input_tokens_details.cached_tokens >= 0


async def test_an_agent_frameworks_output_is_an_object(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        model = OpenAIChatModel("smollm2-135m-instruct", provider=OpenAIProvider(openai_client=client))
        agent = Agent(model, output_type=River, model_settings={"max_tokens": 80, "temperature": 0.0})
        run = await agent.run("Tell me of the river Danube.")
    assert isinstance(run.output, River)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"tool_choice": "required"}, "'tools' has none"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "twice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "'fly', which is not in"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "leave one of them"),
        ({"tools": BROKEN_TOOLS, "tool_choice": "required"}, r"'tools\[0\].function.parameters'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"'messages\[0\].tool_call_id'"),
    ],
)  # fmt: skip
def test_tools_that_make_no_sense_are_refused(server: ServerProcess, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        server.client.chat.completions.create(**{**CHAT, **asked})
