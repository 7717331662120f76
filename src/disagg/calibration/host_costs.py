"""What serving adds: HTTP, tokenising and messages to a request, streaming to steps. Asked of real servers."""

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from disagg.base.errors import DisaggError, ProtocolError
from disagg.bench.client.hand_over_times import OUTPUT_LEN as HAND_OVER_OUTPUT_LEN
from disagg.bench.client.hand_over_times import HandOverTimes, measure_hand_overs
from disagg.bench.client.inquiries import recent_requests, served_model
from disagg.bench.client.load_plan import Server
from disagg.bench.client.prompt_texts import TextTokenizer, english_text
from disagg.bench.compare.server_process import RunningServer, running, serve_command
from disagg.calibration.served_requests import measure_served_requests
from disagg.calibration.served_streams import StreamLimits, measure_served_steps
from disagg.costs.platform import HostCosts
from disagg.costs.serving_fit import ServedRequest, ServedSample
from disagg.measure.timeline import Stage

_PROMPT_CHARACTERS: Final = 600
_OUTPUT_LEN: Final = 3
_NUM_WARMUP: Final = 3
_REQUEST_DEADLINE_S: Final = 60.0
_NUM_STREAMS: Final = (1, 4, 16)
_NUM_PROMPTS: Final = 8


@dataclass(frozen=True)
class HostNumbers:
    """How much is measured: lone requests, rounds of prompts and streams, and hand-overs of each length."""

    requests: int
    rounds: int
    hand_overs: int
    hand_over_lengths: tuple[int, ...]


@dataclass(frozen=True)
class LoneRequest:
    """A request that had the server for itself: the client's TTFT, and the seconds of the server's stages."""

    ttft_s: float
    stages: Mapping[str, float]


@dataclass(frozen=True)
class HostMeasurement:
    """What requests that had the server for themselves cost beside their steps, and what serving costs.

    ``hand_overs`` are those of prompts of several lengths, whole and one at a time.
    """

    lone: tuple[LoneRequest, ...]
    hand_overs: tuple[HandOverTimes, ...]
    served: tuple[ServedSample, ...] = ()
    requests: tuple[ServedRequest, ...] = ()


def measure_host_costs(
    model: str | None, arguments: Sequence[str], numbers: HostNumbers, limits: StreamLimits
) -> HostMeasurement:
    """Start a prefill and a decode instance, send single requests, then rounds of prompts and of streams.

    Then the same once more, for hand-overs that are not spread over the prefill: only of these it is known which bytes
    were pulled in which time. Raises UnavailableError when a server cannot be started, DisaggError when it refuses a
    request.
    """
    named = () if model is None else (model,)
    command = (*named, *arguments, "--no-lend-cores")  # as its steps were measured
    with _serving(command) as server:
        asked = Server(server.command.url)

        def cpu_s() -> float:
            return server.own_cpu_s() + time.process_time()

        lone = tuple(_ask(asked, numbers.requests, limits.max_total_len))
        requests = tuple(measure_served_requests(asked, _tokenizer(model), limits, numbers.rounds, cpu_s))
        streams = _NUM_STREAMS * numbers.rounds
        served = tuple(measure_served_steps(asked, limits, streams, _NUM_PROMPTS, cpu_s))
    with _serving((*command, "--no-kv-overlap")) as server:
        hand_overs = tuple(_hand_overs(Server(server.command.url), numbers, limits))
    return HostMeasurement(lone, hand_overs, served, requests)


@contextmanager
def _serving(arguments: Sequence[str]) -> Iterator[RunningServer]:
    with tempfile.TemporaryDirectory(prefix="disagg-profile-") as folder:
        with running(serve_command("disagg serve", arguments), Path(folder) / "log") as server:
            yield server


def _hand_overs(server: Server, numbers: HostNumbers, limits: StreamLimits) -> Iterator[HandOverTimes]:
    """Yield the hand-overs of each length; the longest that the server takes stands for those that it does not."""
    longest = limits.max_total_len - HAND_OVER_OUTPUT_LEN
    for length in sorted({min(length, longest) for length in numbers.hand_over_lengths}):
        yield measure_hand_overs(server, numbers.hand_overs, length, range(limits.vocab_size))


def _tokenizer(model: str | None) -> TextTokenizer:
    from disagg.models.locate import locate_model
    from disagg.models.tokenizer import load_tokenizer

    return load_tokenizer(locate_model(model))


def host_costs(requests: Sequence[LoneRequest], message_s: float) -> HostCosts:
    """Return the medians, where a message between router and instance takes ``message_s``.

    Before the first step there is one. What the client waits for its first token beyond that step and what comes before
    it is delivery.
    """
    wanted = {Stage.QUEUE_PREFILL.value, Stage.PREFILL.value}
    told = [request for request in requests if wanted <= request.stages.keys()]
    if not told:
        raise ProtocolError("the server told the stages of no request: is another version of it installed?")
    queue_s = [request.stages[Stage.QUEUE_PREFILL.value] for request in told]
    deliver_s = statistics.median(
        request.ttft_s - before_s - request.stages[Stage.PREFILL.value]
        for request, before_s in zip(told, queue_s, strict=True)
    )
    return HostCosts(max(0.0, statistics.median(queue_s) - message_s), message_s, max(0.0, deliver_s))


def _ask(server: Server, num_requests: int, max_total_len: int) -> list[LoneRequest]:
    """Send requests one after the other; no two begin alike, so that none finds a prefix in the cache."""
    model = served_model(server)
    text = english_text()[: min(_PROMPT_CHARACTERS, max_total_len // 2)]
    ttfts: dict[str, float] = {}
    with httpx.Client(base_url=server.base_url, timeout=_REQUEST_DEADLINE_S) as client:
        for number in range(_NUM_WARMUP + num_requests):
            request_id, ttft_s = _first_token(client, model, f"{number} {text}")
            if number >= _NUM_WARMUP:
                ttfts[request_id] = ttft_s
    stages = {view.request_id: view.stages for view in recent_requests(server)}
    return [LoneRequest(ttft_s, stages.get(request_id, {})) for request_id, ttft_s in ttfts.items()]


def _first_token(client: httpx.Client, model: str, prompt: str) -> tuple[str, float]:
    """Send a request, read its answer to the end, and return its id and the seconds to the first event."""
    body = {"model": model, "prompt": prompt, "max_tokens": _OUTPUT_LEN, "ignore_eos": True, "temperature": 0.0}
    sent_s = time.perf_counter()
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        if response.is_error:
            raise DisaggError(f"the server refused a request with {response.status_code}: {response.read()[:500]!r}")
        lines = response.iter_lines()
        next(lines, None)
        ttft_s = time.perf_counter() - sent_s
        for _ in lines:
            pass
    return response.headers.get("x-request-id", ""), ttft_s
