"""The second turn of a long conversation against the first, on a live server: ``python benchmarks/next_turn.py``.

Serves the default model on one prefill and one decode instance with a disk, asks a question with ``--words`` words
before it, then a second one; starts the server again on the same disk and asks the second one again. Prints time to
first token and cached tokens of each, and whether the answer after the restart is the one before. Takes two cores.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console

from disagg.bench.compare.server_process import running, serve_command

WORDS = (
    "river",
    "stone",
    "music",
    "window",
    "garden",
    "winter",
    "summer",
    "silver",
    "copper",
    "letter",
    "market",
    "forest",
)


@dataclass(frozen=True)
class Answer:
    """What came, and when the first of it did."""

    text: str
    ttft_s: float
    prompt_tokens: int
    cached_tokens: int


def ask(client: OpenAI, messages: Sequence[Any]) -> Answer:
    """Ask for 48 tokens, the most likely ones."""
    started_s = time.perf_counter()
    ttft_s, text, usage = 0.0, "", None
    stream = client.chat.completions.create(
        model="smollm2-135m-instruct",
        messages=list(messages),
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    for event in stream:
        usage = event.usage or usage
        piece = event.choices[0].delta.content if event.choices else None
        if piece:
            ttft_s = ttft_s or time.perf_counter() - started_s
            text += piece
    assert usage is not None, "the server tells it"
    details = usage.prompt_tokens_details
    return Answer(text, ttft_s, usage.prompt_tokens, (details.cached_tokens if details else None) or 0)


def main() -> None:
    """Serve twice, and print what came."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--words", type=int, default=7500, help="length of the first question")
    num_words = parser.parse_args().words
    draw = random.Random(1)
    question = " ".join(draw.choice(WORDS) for _ in range(num_words)) + " What is this?"
    messages = [{"role": "user", "content": question}]
    console = Console(highlight=False, width=160)
    with tempfile.TemporaryDirectory() as folder:
        command = serve_command("next-turn", ["--kv-disk", f"{folder}/blocks,2GiB"])
        log = Path(folder) / "log"
        with running(command, log):
            client = OpenAI(base_url=f"{command.url}/v1", api_key="none")
            ask(client, [{"role": "user", "content": "Hello!"}])
            first = ask(client, messages)
            messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Tell me more."}]
            second = ask(client, messages)
        with running(command, log):
            ask(client, [{"role": "user", "content": "Hello!"}])
            again = ask(client, messages)
    for name, answer in (("first turn", first), ("second turn", second), ("after a restart", again)):
        console.print(
            f"{name:16} {answer.prompt_tokens:6} tokens, {answer.cached_tokens:6} cached: first token after "
            f"{answer.ttft_s:.3f} s, {answer.ttft_s / first.ttft_s:.3f} of the first turn's"
        )
    console.print(f"the answer after the restart is {'the same' if again.text == second.text else 'ANOTHER'}")


if __name__ == "__main__":
    main()
