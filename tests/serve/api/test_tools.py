"""Tools and reasoning through the official client, with answers that the test writes."""

import dataclasses
import json
from typing import Any

import openai
import pytest
from api_site import EOS, Serve, ids_of

from disagg.models.chat_template import ChatTemplate
from disagg.models.tool_calls.syntax import AnswerSyntax, syntax_of
from disagg.serve.api.served_model import ServedModel

TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "description": "of a city"}}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Ulm?"}], "tools": TOOLS}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


def saying(text: str) -> Any:
    return lambda _: [*ids_of(text), EOS]


async def test_a_call_that_the_model_chose_to_make(serve: Serve) -> None:
    site = await serve(max_model_len=2000, script=saying(f"Let me look.\n{CALL}"))
    choice = (await site.client.chat.completions.create(**CHAT)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments, call.type) == ("weather", '{"city": "Ulm"}', "function")
    assert len(call.id) == 9


@pytest.mark.parametrize("text", [f"Let me look.\n{CALL}", f"{CALL}\n{CALL}", "No call <tool_call> here.", "Plain."])
async def test_the_clients_accumulator_gives_what_the_whole_answer_has(serve: Serve, text: str) -> None:
    site = await serve(max_model_len=2000, script=saying(text))
    whole = (await site.client.chat.completions.create(**CHAT)).choices[0]
    async with site.client.chat.completions.stream(**CHAT) as stream:
        async for _ in stream:
            pass
        streamed = (await stream.get_final_completion()).choices[0]
    assert streamed.finish_reason == whole.finish_reason
    assert (streamed.message.content or None) == (whole.message.content or None)
    calls = [[one.function for one in choice.message.tool_calls or ()] for choice in (whole, streamed)]
    assert [(one.name, one.arguments) for one in calls[0]] == [(one.name, one.arguments) for one in calls[1]]


async def test_without_tools_nothing_is_read_as_a_call(serve: Serve) -> None:
    site = await serve(max_model_len=2000, script=saying(CALL))
    for asked in ({**CHAT, "tools": None}, {**CHAT, "tool_choice": "none"}):
        choice = (await site.client.chat.completions.create(**asked)).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")


async def test_a_cut_call_says_length(serve: Serve) -> None:
    site = await serve(max_model_len=2000, script=saying(CALL))
    choice = (await site.client.chat.completions.create(**CHAT, max_tokens=55)).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments == CALL[45:55]


async def test_a_template_without_a_place_for_tools_tells_of_them_in_the_system_message(serve: Serve) -> None:
    site = await serve(max_model_len=2000, script=saying("21 degrees."))
    turns = [
        {"role": "system", "content": "Be brief."},
        *CHAT["messages"],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "x1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "x1", "content": "21"},
    ]
    await site.client.chat.completions.create(**{**CHAT, "messages": turns})
    prompt = bytes(token for token in site.router.requests[0].prompt_token_ids if token < 256).decode()
    assert prompt.startswith("[system]Be brief.\n\n# Tools")
    assert '"name":"weather"' in prompt
    assert prompt.endswith(
        '[assistant]<tool_call>\n{"name":"weather","arguments":{"city":"Ulm"}}\n</tool_call>\n'
        "[user]<tool_response>\n21\n</tool_response>\n[assistant]"
    )


async def test_strict_tools_hold_the_calls_that_the_model_chooses_to_make(serve: Serve) -> None:
    site = await serve(max_model_len=2000, script=saying("No call."))
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    await site.client.chat.completions.create(**{**CHAT, "tools": strict})
    await site.client.chat.completions.create(**CHAT)
    first, second = (request.sampling.grammar for request in site.router.requests)
    assert "opened" in first
    assert second == ""


class TestOwnTemplate:
    """A model that thinks, and whose template has a place for tools."""

    TEMPLATE = (
        "{{ tools | tojson if tools else '' }}{% for message in messages %}[{{ message.role }}]"
        "{% for call in message.tool_calls or [] %}"
        "<tool_call>{{ call.function.arguments.city }}</tool_call>{% endfor %}"
        "{{ message.content }}{{ message.tool_call_id }}{% endfor %}[assistant]{{ opening }}{# </think> #}"
    )

    @pytest.fixture
    def served_model(self, served_model: ServedModel) -> ServedModel:
        template = ChatTemplate(self.TEMPLATE, served_model.tokenizer.special_tokens)
        return dataclasses.replace(served_model, chat_template=template, syntax=syntax_of(self.TEMPLATE))

    async def test_turns_of_tools_go_through_the_template(self, serve: Serve) -> None:
        site = await serve(max_model_len=2000, script=saying("21 degrees."))
        call = {"id": "x1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
        turns = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "x1", "content": "21"},
        ]
        await site.client.chat.completions.create(**{**CHAT, "messages": turns})
        prompt = bytes(site.router.requests[0].prompt_token_ids).decode()
        assert prompt.endswith("[assistant]<tool_call>Ulm</tool_call>[tool]21x1[assistant]")
        assert (
            json.loads(prompt[: prompt.index("]", prompt.index("parameters")) + 1])[0]["function"]["name"] == "weather"
        )

    @pytest.mark.parametrize("is_opened", [False, True])
    async def test_reasoning_is_told_from_the_answer(self, serve: Serve, is_opened: bool) -> None:
        site = await serve(
            max_model_len=2000, script=saying(f"{'' if is_opened else '<think>'}\nHm </b>.\n</think>\n\nSo: {CALL}")
        )
        asked = {**CHAT, "extra_body": {"chat_template_kwargs": {"opening": "<think>\n" if is_opened else ""}}}
        message = (await site.client.chat.completions.create(**asked)).choices[0].message
        assert message.reasoning_content == "Hm </b>."
        assert message.content == "So:"
        assert message.tool_calls[0].function.name == "weather"
        pieces = [
            (getattr(delta, "reasoning_content", None) or "", delta.content or "")
            async for chunk in await site.client.chat.completions.create(**asked, stream=True)
            for delta in [chunk.choices[0].delta]
        ]
        assert "".join(piece[0] for piece in pieces) == "Hm </b>."
        assert "".join(piece[1] for piece in pieces) == "So:"

    @pytest.mark.parametrize("opening", ["", "<think>"])
    async def test_a_form_is_asked_for_after_the_reasoning(self, serve: Serve, opening: str) -> None:
        site = await serve(max_model_len=2000, script=saying("</think>1"))
        asked = {
            **CHAT,
            "tools": None,
            "extra_body": {"chat_template_kwargs": {"opening": opening}, "guided_regex": "1"},
        }
        await site.client.chat.completions.create(**asked)
        grammar = json.loads(site.router.requests[0].sampling.grammar)["grammars"]
        assert grammar[0]["lark_grammar"].startswith("start: thought" if opening else 'start: ("<think>" thought')
        assert grammar[1] == {"lark_grammar": "start: /1/", "name": "answer"}


class TestUnknownForm:
    """A template that writes calls in a way that nothing here reads."""

    @pytest.fixture
    def served_model(self, served_model: ServedModel) -> ServedModel:
        return dataclasses.replace(served_model, syntax=AnswerSyntax(None, describes_tools=True))

    async def test_tools_are_refused_with_the_remedy(self, serve: Serve) -> None:
        site = await serve()
        with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
            await site.client.chat.completions.create(**CHAT)


class TestResponses:
    """``/v1/responses``."""

    ASKED: dict[str, Any] = {"model": "tiny", "input": "Ulm?"}  # noqa: RUF012
    TOOLS: list[Any] = [{"type": "function", "name": "weather", "parameters": {"type": "object"}}]  # noqa: RUF012

    async def test_text(self, serve: Serve) -> None:
        site = await serve(max_model_len=2000, script=saying("21 degrees."))
        response = await site.client.responses.create(**self.ASKED, instructions="Be brief.", temperature=0.5)
        assert (response.output_text, response.status, response.error) == ("21 degrees.", "completed", None)
        assert (response.temperature, response.instructions, response.store) == (0.5, "Be brief.", False)
        assert response.usage.output_tokens == len("21 degrees.") + 1
        prompt = bytes(token for token in site.router.requests[0].prompt_token_ids if token < 256).decode()
        assert prompt == "[system]Be brief.\n[user]Ulm?\n[assistant]"

    async def test_a_cut_answer_is_incomplete(self, serve: Serve) -> None:
        site = await serve(max_model_len=2000, script=saying("21 degrees."))
        response = await site.client.responses.create(**self.ASKED, max_output_tokens=2)
        assert (response.status, response.output_text) == ("incomplete", "21")
        assert response.incomplete_details.reason == "max_output_tokens"

    async def test_calls_and_their_results(self, serve: Serve) -> None:
        site = await serve(max_model_len=2000, script=saying(CALL))
        response = await site.client.responses.create(**self.ASKED, tools=self.TOOLS)
        (call,) = response.output
        assert (call.type, call.name, call.arguments) == ("function_call", "weather", '{"city": "Ulm"}')
        items = [
            {"role": "user", "content": [{"type": "input_text", "text": "Ulm?"}]},
            *(item.model_dump(exclude_none=True) for item in response.output),
            {"type": "function_call_output", "call_id": call.call_id, "output": "21"},
        ]
        await site.client.responses.create(model="tiny", input=items, tools=self.TOOLS)
        prompt = bytes(token for token in site.router.requests[1].prompt_token_ids if token < 256).decode()
        assert prompt.endswith("</tool_call>\n[user]<tool_response>\n21\n</tool_response>\n[assistant]")

    @pytest.mark.parametrize("text", ["21 degrees.", f"Let me look.\n{CALL}\n{CALL}", ""])
    async def test_the_clients_accumulator(self, serve: Serve, text: str) -> None:
        site = await serve(max_model_len=2000, script=saying(text))
        whole = await site.client.responses.create(**self.ASKED, tools=self.TOOLS)
        async with site.client.responses.stream(**self.ASKED, tools=self.TOOLS) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        assert events[0].type == "response.created"
        assert events[-1].type == "response.completed"
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert final.output_text == whole.output_text
        assert [item.type for item in final.output] == [item.type for item in whole.output]
        arguments = [[one.arguments for one in r.output if one.type == "function_call"] for r in (whole, final)]
        assert arguments[0] == arguments[1]

    async def test_a_form_is_a_form(self, serve: Serve) -> None:
        site = await serve(max_model_len=2000, script=saying("{}"))
        form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
        await site.client.responses.create(**self.ASKED, text={"format": form})
        assert '"type":"object"' in site.router.requests[0].sampling.grammar

    @pytest.mark.parametrize(
        ("asked", "words"),
        [
            ({"previous_response_id": "resp_1"}, "'previous_response_id' is not supported"),
            ({"background": True}, "'background' is not supported"),
            ({"input": [{"type": "item_reference", "id": "x"}]}, r"'input\[0\]' of type 'item_reference'"),
            ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, r"'input\[0\].content\[0\]'"),
            ({"input": [{"type": "function_call_output", "output": "x"}]}, "needs 'call_id'"),
            ({"tools": [{"type": "web_search"}]}, r"'tools\[0\].type'"),
            ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "'text.format.schema' is no JSON"),
            (
                {"tools": [{**TOOLS[0], "parameters": {"type": "x"}}], "tool_choice": "required"},
                r"'tools\[0\].parameters' is no JSON schema",
            ),
        ],
    )
    async def test_what_is_not_served_is_refused_in_words(self, serve: Serve, asked: Any, words: str) -> None:
        site = await serve()
        with pytest.raises(openai.BadRequestError, match=words):
            await site.client.responses.create(**{**self.ASKED, **asked})
