"""``disagg chat``."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from disagg.base.errors import ConfigurationError
from disagg.cli.chat_client import ChatAnswer, ChatClient, ShownPiece
from disagg.cli.values import Count, Number

_HELP = "/exit or Ctrl-D ends, /clear forgets the conversation, Ctrl-C stops an answer"


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the server listens.")
@click.option("--model", help="Name of the model.  [default: the one that the server has]")
@click.option("--system", help="System message.")
@click.option("--max-tokens", type=Count(min=1), help="Longest answer.  [default: the server's]")
@click.option("--temperature", type=Number(min=0), help="Randomness; 0 takes the most likely token.")
@click.option("--seed", type=int, help="Makes answers repeatable.")
@click.option(
    "--tools",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Tools that the model may call: JSON, a list as in OpenAI's API. You are asked for what a call gives.",
)
@click.option("--api-key", envvar="DISAGG_API_KEY", show_envvar=True, help="Key of the server.")
def chat(
    url: str,
    model: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    tools: Path | None,
    api_key: str | None,
) -> None:
    """Talk to a running server. With something piped in, answer that and end.

    While a conversation runs, /exit or Ctrl-D ends it, /clear forgets it, and Ctrl-C stops an answer. What the model
    thinks is dim, and its calls of tools have an arrow before them.
    """
    known_tools = None if tools is None else _read_tools(tools)
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "tools": known_tools}
    settings = {name: value for name, value in given.items() if value is not None}
    with ChatClient(url, api_key, model, settings) as client:
        conversation = Conversation(client, system)
        if sys.stdin.isatty():
            click.echo(f"{client.model} on {url}. {_HELP}.", err=True)
            conversation.run()
        else:
            conversation.ask(sys.stdin.read().strip())


class Conversation:
    """Questions and answers so far; the answer appears as it comes."""

    def __init__(self, client: ChatClient, system: str | None) -> None:
        self._client = client
        self._opening: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def run(self) -> None:
        """Ask for lines until the user ends it."""
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing and history for input())
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                click.echo(err=True)
                return
            if line == "/exit":
                return
            if line == "/clear":
                self._messages = list(self._opening)
            elif line.startswith("/"):
                click.echo(_HELP, err=True)
            elif line:
                answer = self.ask(line)
                click.echo(answer.describe(), err=True)
                while answer.calls and self._give_results(answer):
                    answer = self._answer()
                    click.echo(answer.describe(), err=True)

    def ask(self, question: str) -> ChatAnswer:
        """Send a question and show its answer; Ctrl-C keeps what has come."""
        self._messages.append({"role": "user", "content": question})
        return self._answer()

    def _answer(self) -> ChatAnswer:
        answer = ChatAnswer()
        was_reasoning = False
        try:
            for piece in self._client.stream(self._messages, answer):
                if was_reasoning and not piece.is_reasoning:
                    click.echo("\n")
                was_reasoning = piece.is_reasoning
                _show(piece)
        except KeyboardInterrupt:
            answer.stopped = True
        if answer.text or was_reasoning or not answer.calls:
            click.echo()
        for call in answer.calls.values():
            click.echo(f"→ {call.name}({call.arguments})")
        self._messages.append(answer.as_message())
        return answer

    def _give_results(self, answer: ChatAnswer) -> bool:
        """Ask the user what the calls give; without an answer to one, forget them all."""
        results: list[dict[str, Any]] = []
        for call in answer.calls.values():
            try:
                given = input(f"{call.name} gives> ")
            except (EOFError, KeyboardInterrupt):
                click.echo(err=True)
                self._messages.pop()
                return False
            results.append({"role": "tool", "tool_call_id": call.call_id, "content": given})
        self._messages += results
        return True


def _show(piece: ShownPiece) -> None:
    click.echo(click.style(piece.text, dim=True) if piece.is_reasoning else piece.text, nl=False)


def _read_tools(file: Path) -> list[Any]:
    try:
        tools = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"--tools: cannot read {file}: {error}") from error
    if not isinstance(tools, list):
        raise ConfigurationError(f"--tools: {file} holds no list: write the tools as in OpenAI's API, [{{...}}, ...]")
    return tools
