"""The loop of an agent framework, as it comes: it offers tools, runs what is called, and sends back what they say."""

from typing import Any

import pytest
from api_site import EOS, Serve, Site, ids_of
from pydantic_ai import Agent
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

CALLS = "".join(
    f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}"}}}}\n</tool_call>\n' for city in ("Ulm", "Bonn")
)


def calling_then_answering(site_requests: list[Any]) -> Any:
    """Return a script that calls the tool for two cities, and answers once it has heard of both."""

    def script(request: Any) -> list[int]:
        site_requests.append(request)
        prompt = bytes(token for token in request.prompt_token_ids if token < 256).decode()
        return [*ids_of("Ulm is warmer." if "21 degrees" in prompt and "19 degrees" in prompt else CALLS), EOS]

    return script


def chat_model(site: Site) -> Model:
    return OpenAIChatModel("tiny", provider=OpenAIProvider(openai_client=site.client))


def responses_model(site: Site) -> Model:
    return OpenAIResponsesModel("tiny", provider=OpenAIProvider(openai_client=site.client))


@pytest.mark.parametrize("make_model", [chat_model, responses_model])
@pytest.mark.parametrize("streams", [False, True])
async def test_an_agent_calls_tools_until_it_can_answer(serve: Serve, make_model: Any, streams: bool) -> None:
    requests: list[Any] = []
    site = await serve(max_model_len=4000, script=calling_then_answering(requests))
    agent = Agent(make_model(site), instructions="Be brief.")
    asked: list[str] = []

    @agent.tool_plain
    def weather(city: str) -> str:
        """Return the weather of a city."""
        asked.append(city)
        return "21 degrees" if city == "Ulm" else "19 degrees"

    if streams:
        async with agent.run_stream("Where is it warmer, in Ulm or in Bonn?") as stream:
            answer = await stream.get_output()
    else:
        answer = (await agent.run("Where is it warmer, in Ulm or in Bonn?")).output
    assert (answer, sorted(asked), len(requests)) == ("Ulm is warmer.", ["Bonn", "Ulm"], 2)
