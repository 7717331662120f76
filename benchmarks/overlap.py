"""What a client sees of the hand-over of long prompts, with parts that travel during the prefill and without.

For each link and length: the gap between the first and the second token, less the median of the gaps after it, which is
what the hand-over costs a client; its share of the time to the first token; the ratio of that gap to those after it;
and what the control path (until the decode instance knows of the offer) and the pull took of it. Real servers, one
request at a time, the settings taking turns. ``--rate 1gbit`` holds the loopback interface to a rate (``tc tbf``; needs
root, and a network namespace of its own: run it behind ``unshare --net``).
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import httpx

from disagg.bench.compare.server_process import running, serve_command

NUM_TOKENS = 12


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """Run a server with one prefill and one decode instance; yield its URL."""
    with tempfile.TemporaryDirectory() as folder:
        with running(serve_command("server", arguments), Path(folder) / "log") as server:
            yield server.command.url


def token_times(url: str, num_tokens: int, salt: int) -> list[float]:
    """Send a prompt that nobody has cached; return the seconds from the request to each token."""
    prompt = [1000 + (salt * 7919 + position * 104_729) % 40_000 for position in range(num_tokens)]
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0, "stream": True}
    body["model"] = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    started_s = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as response:
        response.raise_for_status()
        return [time.perf_counter() - started_s for line in response.iter_lines() if line.startswith("data: {")]


def exposed(times: list[float]) -> tuple[float, float, float]:
    """Return the time to the first token, what the second gap has more than those after it, and its ratio to them."""
    gaps = [after - before for before, after in pairwise(times)]
    later_s = statistics.median(gaps[1:])
    return times[0], max(0.0, gaps[0] - later_s), gaps[0] / later_s


def stages(url: str) -> tuple[float, float]:
    """Return what the last request's control path and what was left of its pull took, in seconds."""
    (last,) = httpx.get(f"{url}/requests", params={"after": -1}).json()["requests"]
    return last["stages"]["hand_over_control"], last["stages"]["hand_over"]


def main() -> None:
    """Print a row for each length and setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8000])
    parser.add_argument("--links", nargs="+", default=["shm", "tcp"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rate", help="such as 1gbit, for TCP")
    chosen = parser.parse_args()
    if chosen.rate:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        shape = f"tc qdisc replace dev lo root tbf rate {chosen.rate} burst 256kb latency 50ms"
        subprocess.run(shape.split(), check=True)
    common = ("--max-model-len", "8192", "--threads", "1", "--no-prefix-caching")
    columns = (
        "link",
        "tokens",
        "overlap",
        "TTFT ms",
        "exposed ms",
        "share of TTFT",
        "gap ratio",
        "control ms",
        "pull ms",
    )
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for link in chosen.links:
        found: dict[tuple[int, str], list[tuple[float, ...]]] = {}
        with (
            serving(*common, "--kv-link", link, "--kv-overlap") as on,
            serving(*common, "--kv-link", link, "--no-kv-overlap") as off,
        ):
            for url in (on, off):
                token_times(url, 512, 0)
            for repeat in range(chosen.repeats):
                for length in chosen.lengths:
                    for word, url in (("on", on), ("off", off)):
                        times = token_times(url, length, 1 + repeat)
                        found.setdefault((length, word), []).append((*exposed(times), *stages(url)))
        for (length, word), rows in found.items():
            ttft_s, exposed_s, ratio, control_s, pull_s = (
                statistics.median(column) for column in zip(*rows, strict=True)
            )
            print(
                f"| {link} | {length} | {word} | {ttft_s * 1e3:.0f} | {exposed_s * 1e3:.1f} | {exposed_s / ttft_s:.1%} "
                f"| {ratio:.2f} | {control_s * 1e3:.1f} | {pull_s * 1e3:.1f} |"
            )


if __name__ == "__main__":
    main()
