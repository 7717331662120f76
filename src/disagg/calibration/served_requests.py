"""What requests cost a real server and its client beside their steps.

Prompts of several lengths are sent as text, with answers of two tokens. The longer ones wait in line, as in service.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Final

import uvloop

from disagg.bench.client.calls import Call
from disagg.bench.client.inquiries import served_model
from disagg.bench.client.load_plan import OpenLoad, Server
from disagg.bench.client.prompt_texts import PromptText, TextTokenizer, english_text
from disagg.calibration.measured_load import CpuReadings, send_all
from disagg.calibration.served_streams import StreamLimits
from disagg.costs.serving_fit import ServedRequest
from disagg.measure.record import RequestRecord
from disagg.measure.workload import RequestSpec

_OUTPUT_LEN: Final = 2
_LOADS: Final = ((24, 10, 0.06), (512, 6, 0.0), (1024, 4, 0.0), (2048, 3, 0.0))
"""Prompt tokens, requests, and seconds between them. Short prompts would share a step if they came together."""
_IDLE_S: Final = 1.0
_SAMPLE_CHARACTERS: Final = 20_000
"""Of the text, to see how many make a token."""
_UNIQUE_BYTES: Final = 6
"""At each prompt's start, so that none finds a prefix in the cache."""


class TextPrompts:
    """Makes prompts of English text, of about as many tokens as asked and never more than ``longest``.

    ``PromptMaker`` makes exact ones, but of words that are a single token each, which not every model has.
    """

    def __init__(self, tokenizer: TextTokenizer, longest: int) -> None:
        self._tokenizer = tokenizer
        self._longest = longest
        self._text = english_text()
        sample = self._text[:_SAMPLE_CHARACTERS]
        self._characters_per_token = len(sample) / len(tokenizer.encode(sample))

    def make(self, call: Call) -> PromptText:
        """Return the prompt of a call."""
        unique = secrets.token_hex(_UNIQUE_BYTES)
        num_characters = int(call.prompt_len * self._characters_per_token)
        while True:
            text = f"{unique} {self._text}"[: max(1, num_characters)]
            token_ids = self._tokenizer.encode(text)
            if len(token_ids) <= self._longest or num_characters <= 1:
                return PromptText(text, token_ids, len(token_ids))
            num_characters = num_characters * 9 // 10


def measure_served_requests(
    server: Server, tokenizer: TextTokenizer, limits: StreamLimits, num_rounds: int, cpu_s: Callable[[], float]
) -> Iterator[ServedRequest]:
    """Yield what requests cost, ``num_rounds`` times for each length that the server takes.

    ``cpu_s`` tells the CPU seconds that the server, without its instances, and this process have used.
    Raises DisaggError when the server refuses a request.
    """
    model = served_model(server)
    longest = limits.max_total_len - _OUTPUT_LEN
    prompts = TextPrompts(tokenizer, longest)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        idle = CpuReadings(cpu_s)
        runner.run(_read_for(idle, _IDLE_S))
        for prompt_len, count, apart_s in _fitting(longest) * num_rounds:
            specs = tuple(RequestSpec(prompt_len, _OUTPUT_LEN, arrival_s=number * apart_s) for number in range(count))
            readings = CpuReadings(cpu_s)
            records = runner.run(send_all(server, model, OpenLoad(specs), prompts.make, readings))
            yield request_cost(records, readings, idle)


def _fitting(longest: int) -> list[tuple[int, int, float]]:
    """Return the loads that fit, and one of the longest prompts that do."""
    fitting = [load for load in _LOADS if load[0] < longest]
    return fitting + [(longest, *load[1:]) for load in _LOADS[len(fitting) :][:1]]


def request_cost(records: Sequence[RequestRecord], readings: CpuReadings, idle: CpuReadings) -> ServedRequest:
    """Share out what a run cost among its requests, less what server and client take when there are none."""
    cpu_s = readings.total_s - idle.total_s / idle.lasted_s * readings.lasted_s
    return ServedRequest(
        prompt_len=round(fmean(record.prompt_len for record in records)),
        num_tokens=_OUTPUT_LEN,
        cpu_s=max(0.0, cpu_s) / len(records),
    )


async def _read_for(readings: CpuReadings, duration_s: float) -> None:
    async with readings.going_on(time.perf_counter):
        await asyncio.sleep(duration_s)
