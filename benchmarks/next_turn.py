"""The second turn of a long conversation against the first, on a live server: ``python benchmarks/next_turn.py``.

Serves the default model on one prefill and one decode instance with a disk, asks a question with ``--words`` words
before it, then a second one; starts the server again on the same disk and asks the second one again. Prints time to
first token and cached tokens of each, and whether the answer after the restart is the one before. Takes two cores.

The default model has 8,192 positions. ``--positions N`` serves a Llama of random weights instead (four layers of width
256) with as many, and the default model's tokenizer: its answers are noise, its KV cache is like any other.
"""

import argparse
import json
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
from disagg.models.locate import locate_model
from disagg.models.tokenizer import load_tokenizer

PATIENCE_S = 3600.0

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


def save_long_model(folder: Path, num_positions: int) -> None:
    """Make a model of random weights that takes so many positions, as transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    files = locate_model(None)
    tokenizer = load_tokenizer(files)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=num_positions,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")


def ask(client: OpenAI, messages: Sequence[Any]) -> Answer:
    """Ask for 48 tokens, the most likely ones."""
    started_s = time.perf_counter()
    ttft_s, text, usage = 0.0, "", None
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
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
    parser.add_argument("--positions", type=int, help="serve a model of random weights with so many positions")
    options = parser.parse_args()
    num_words = options.words
    draw = random.Random(1)
    question = " ".join(draw.choice(WORDS) for _ in range(num_words)) + " What is this?"
    messages = [{"role": "user", "content": question}]
    console = Console(highlight=False, width=160)
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--kv-disk", f"{folder}/blocks,2GiB"]
        if options.positions is not None:
            save_long_model(Path(folder) / "model", options.positions)
            settings += [f"{folder}/model", "--request-timeout-s", str(PATIENCE_S)]
        command = serve_command("next-turn", settings)
        log = Path(folder) / "log"
        client = OpenAI(base_url=f"{command.url}/v1", api_key="none", timeout=PATIENCE_S, max_retries=0)
        with running(command, log):
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
