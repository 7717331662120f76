"""How often prefill on one instance and decode on another give the very tokens that one instance gives.

    .venv/bin/python benchmarks/token_match.py [--dtype bfloat16] [--prompts 40] [--tokens 64] [--precision]

In float32 the tests demand all of them. In bfloat16 a step of another composition rounds differently, and a greedy
answer may leave the path where two tokens are almost equally likely: this prints how often, beside the same comparison
of one instance with itself at another concurrency, which has nothing to do with the hand-over. With --precision it
compares instead what arithmetic does: bfloat16, by our kernels and by PyTorch's, against float32.
"""

import argparse
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import httpx

from disagg.bench.compare.server_process import running, serve_command


@contextmanager
def serving(*placement: str, dtype: str) -> Iterator[str]:
    """Run a server and give its URL."""
    with tempfile.TemporaryDirectory() as folder:
        with running(serve_command("server", ("--dtype", dtype, *placement)), Path(folder) / "log") as server:
            yield server.command.url


def prompts(count: int) -> list[str]:
    """Return distinct English prompts of 20 to some hundred words, from the reference manual that Python carries."""
    words = " ".join(str(topics[name]) for name in sorted(topics)).split()
    return [" ".join(words[start * 997 :][: 20 + 9 * start]) for start in range(count)]


def answers(url: str, texts: list[str], num_tokens: int, concurrency: int) -> list[list[str]]:
    """Return the tokens of every prompt's greedy answer."""

    def ask(text: str) -> list[str]:
        body = {"prompt": text, "max_tokens": num_tokens, "temperature": 0, "logprobs": 0, "ignore_eos": True}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=300.0)
        response.raise_for_status()
        return list(response.json()["choices"][0]["logprobs"]["tokens"])

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(ask, texts))


def report(name: str, left: list[list[str]], right: list[list[str]]) -> None:
    """Print the share of equal answers, and of equal tokens up to the first difference."""
    equal = sum(one == other for one, other in zip(left, right, strict=True))
    same = 0
    for one, other in zip(left, right, strict=True):
        same += next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
    total = sum(map(len, left))
    print(f"{name:<52} {equal:>4}/{len(left)} answers equal   {same / total:7.1%} of tokens before a difference")


def compare_placements(texts: list[str], num_tokens: int, dtype: str) -> None:
    """Print how often a pair of instances answers as a single one."""
    with serving("--colocated", "1", dtype=dtype) as url:
        alone = answers(url, texts, num_tokens, 1)
        together = answers(url, texts, num_tokens, 8)
    with serving("--prefill", "1", "--decode", "1", dtype=dtype) as url:
        apart = answers(url, texts, num_tokens, 1)
        apart_together = answers(url, texts, num_tokens, 8)
    print(f"{dtype}, {len(texts)} prompts, {num_tokens} greedy tokens each")
    report("disaggregated against colocated, one at a time", alone, apart)
    report("disaggregated against colocated, eight at a time", together, apart_together)
    report("colocated: eight at a time against one at a time", alone, together)


def compare_precision(texts: list[str], num_tokens: int) -> None:
    """Print how often bfloat16 answers as float32 does."""
    found = {}
    for dtype, kernels in (("float32", "native"), ("float32", "torch"), ("bfloat16", "native"), ("bfloat16", "torch")):
        with serving("--colocated", "1", "--kernels", kernels, dtype=dtype) as url:
            found[dtype, kernels] = answers(url, texts, num_tokens, 4)
    reference = found.pop(("float32", "native"))
    print(f"against float32 with native kernels, {len(texts)} prompts, {num_tokens} greedy tokens each")
    for (dtype, kernels), given in found.items():
        report(f"{dtype}, {kernels} kernels", reference, given)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--precision", action="store_true", help="bfloat16 against float32, by kernel backend")
    options = parser.parse_args()
    texts = prompts(options.prompts)
    if options.precision:
        compare_precision(texts, options.tokens)
    else:
        compare_placements(texts, options.tokens, options.dtype)


if __name__ == "__main__":
    main()
