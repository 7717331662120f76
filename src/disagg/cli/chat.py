"""``disagg chat``."""

import sys
from contextlib import suppress

import click

from disagg.cli.chat_client import ChatAnswer, ChatClient
from disagg.cli.values import Count, Number

_HELP = "/exit or Ctrl-D ends, /clear forgets the conversation, Ctrl-C stops an answer"


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the server listens.")
@click.option("--model", help="Name of the model.  [default: the one that the server has]")
@click.option("--system", help="System message.")
@click.option("--max-tokens", type=Count(min=1), help="Longest answer.  [default: the server's]")
@click.option("--temperature", type=Number(min=0), help="Randomness; 0 takes the most likely token.")
@click.option("--seed", type=int, help="Makes answers repeatable.")
@click.option("--api-key", envvar="DISAGG_API_KEY", show_envvar=True, help="Key of the server.")
def chat(
    url: str,
    model: str | None,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    api_key: str | None,
) -> None:
    """Talk to a running server. With something piped in, answer that and end.

    While a conversation runs, /exit or Ctrl-D ends it, /clear forgets it, and Ctrl-C stops an answer.
    """
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
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
        self._opening = [{"role": "system", "content": system}] if system else []
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

    def ask(self, question: str) -> ChatAnswer:
        """Send a question and show its answer; Ctrl-C keeps what has come."""
        self._messages.append({"role": "user", "content": question})
        answer = ChatAnswer()
        try:
            for text in self._client.stream(self._messages, answer):
                click.echo(text, nl=False)
        except KeyboardInterrupt:
            answer.stopped = True
        click.echo()
        self._messages.append({"role": "assistant", "content": answer.text})
        return answer
