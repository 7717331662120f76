"""What a real server and its client cost while answers stream and other prompts are prefilled.

Some answers stream from the decode instance, and prompts wait in line for the prefill instance, so that both compute
without pause. What serves, and the client, is read off their own clocks of CPU time.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Final

import uvloop

from disagg.bench.client.calls import Call
from disagg.bench.client.inquiries import served_model
from disagg.bench.client.load_plan import Endpoint, OpenLoad, Server
from disagg.bench.client.prompt_texts import PromptText
from disagg.calibration.measured_load import CpuReadings, send_all
from disagg.costs.serving_fit import ServedSample
from disagg.measure.record import RequestRecord
from disagg.measure.workload import RequestSpec

_STREAM_PROMPT_LEN: Final = 24
_STREAM_OUTPUT_LEN: Final = 256
_FEWEST_STEPS: Final = 8
"""Steps of the streams that both instances must have computed through, for their mean to count."""


@dataclass(frozen=True)
class StreamLimits:
    """What the server takes: tokens of one sequence, tokens and sequences of one step, ids of its vocabulary."""

    max_total_len: int
    max_batch_tokens: int
    max_batch_size: int
    vocab_size: int


@dataclass(frozen=True)
class StreamLoad:
    """So many answers that stream, and so many prompts that wait; ``num_packed`` of these make up one step."""

    num_streams: int
    stream_prompt_len: int
    stream_output_len: int
    num_prompts: int
    prompt_len: int
    num_packed: int

    @classmethod
    def within(cls, limits: StreamLimits, num_streams: int, num_prompts: int) -> "StreamLoad":
        """Choose lengths that the server takes; prompts that fill whole steps."""
        longest = limits.max_total_len - 2
        stream_prompt_len = min(_STREAM_PROMPT_LEN, longest // 4)
        num_packed = -(-limits.max_batch_tokens // longest)
        return cls(
            num_streams=min(num_streams, limits.max_batch_size),
            stream_prompt_len=stream_prompt_len,
            stream_output_len=min(_STREAM_OUTPUT_LEN, longest - stream_prompt_len),
            num_prompts=num_prompts * num_packed,
            prompt_len=limits.max_batch_tokens // num_packed,
            num_packed=num_packed,
        )

    def requests(self) -> OpenLoad:
        """Return all requests, sent at once: those that stream come first."""
        stream = RequestSpec(self.stream_prompt_len, self.stream_output_len, arrival_s=0.0)
        prompt = RequestSpec(self.prompt_len, 1, arrival_s=0.0)
        return OpenLoad((stream,) * self.num_streams + (prompt,) * self.num_prompts)


def measure_served_steps(
    server: Server, limits: StreamLimits, streams: Sequence[int], num_prompts: int, cpu_s: Callable[[], float]
) -> list[ServedSample]:
    """Send a load for each number of streams; return what serving cost. A load that ended too soon brings nothing.

    ``cpu_s`` tells the CPU seconds that the server, without its instances, and this process have used.
    Raises DisaggError when the server refuses a request.
    """
    model = served_model(server)
    by_ids = Server(server.base_url, Endpoint.COMPLETION_TOKENS)
    samples = []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for num_streams in streams:
            load = StreamLoad.within(limits, num_streams, num_prompts)
            readings = CpuReadings(cpu_s)
            make_prompt = partial(_random_prompt, limits.vocab_size)
            records = runner.run(send_all(by_ids, model, load.requests(), make_prompt, readings))
            samples += served_steps(load, records, readings)
    return samples


def served_steps(load: StreamLoad, records: Sequence[RequestRecord], readings: CpuReadings) -> list[ServedSample]:
    """Return the mean decode step of the time in which all streams and the prompts ran, and what serving it cost."""
    streams, prompts = records[: load.num_streams], records[load.num_streams :]
    prefilled_s = sorted(record.event_s[0] for record in prompts)
    begin_s = max(prefilled_s[0], *(record.event_s[0] for record in streams))
    end_s = min(prefilled_s[-1], *(record.event_s[-1] for record in streams))
    shared = [[moment_s for moment_s in record.event_s if begin_s <= moment_s <= end_s] for record in streams]
    num_prefilled = sum(begin_s <= moment_s <= end_s for moment_s in prefilled_s)
    if num_prefilled <= load.num_packed or min(map(len, shared)) <= _FEWEST_STEPS:
        return []
    step_s = fmean((moments_s[-1] - moments_s[0]) / (len(moments_s) - 1) for moments_s in shared)
    cpu_s = readings.between(begin_s, end_s) * step_s / (end_s - begin_s)
    return [ServedSample(num_streams=load.num_streams, cpu_s=cpu_s)]


def _random_prompt(vocab_size: int, call: Call) -> PromptText:
    """Return a prompt with other tokens than any before: none finds a prefix in the cache."""
    first = secrets.randbelow(vocab_size)
    token_ids = [(first + 7919 * index * (call.index + 1)) % vocab_size for index in range(call.prompt_len)]
    return PromptText("", token_ids, call.prompt_len)
