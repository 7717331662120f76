"""What a real server and its client cost while answers stream and other prompts are prefilled.

Some answers stream from the decode instance, and prompts wait in line for the prefill instance, so that both compute
without pause. What serves, and the client, is read off their own clocks of CPU time.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import numpy as np
import uvloop

from disagg.base.errors import DisaggError
from disagg.measure.client.attempt import Attempt
from disagg.measure.client.calls import chains_of
from disagg.measure.client.connection import Address, ConnectionPool
from disagg.measure.client.inquiries import served_model
from disagg.measure.client.messages import MessageBuilder
from disagg.measure.client.plan import Asking, Endpoint, Limits, OpenLoad, Server
from disagg.measure.client.prompts import Prompt
from disagg.measure.client.running import LoadRun
from disagg.measure.record import Ending, RequestRecord
from disagg.measure.workload import RequestSpec
from disagg.simulator.served_steps import ServedSample

_STREAM_PROMPT_LEN: Final = 24
_STREAM_OUTPUT_LEN: Final = 256
_FEWEST_STEPS: Final = 8
"""Steps of the streams that both instances must have computed through, for their mean to count."""
_READING_S: Final = 0.02


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
    server: Server, limits: StreamLimits, streams: Sequence[int], num_prompts: int, server_cpu_s: Callable[[], float]
) -> list[ServedSample]:
    """Send a load for each number of streams; return what serving cost. A load that ended too soon brings nothing.

    ``server_cpu_s`` tells the CPU seconds that the server has used, without those of its instances.
    Raises DisaggError when the server refuses a request.
    """
    model = served_model(server)
    samples = []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for num_streams in streams:
            load = StreamLoad.within(limits, num_streams, num_prompts)
            readings = CpuReadings(lambda: server_cpu_s() + time.process_time())
            records = runner.run(_send(server, model, load, limits.vocab_size, readings))
            samples += served_steps(load, records, readings)
    return samples


class CpuReadings:
    """What serving has cost so far, read at moments of a run."""

    def __init__(self, cpu_s: Callable[[], float]) -> None:
        self._cpu_s = cpu_s
        self._moments_s: list[float] = []
        self._readings_s: list[float] = []

    def read(self, now_s: float) -> None:
        """Take a reading; ``now_s`` never goes back."""
        self._moments_s.append(now_s)
        self._readings_s.append(self._cpu_s())

    async def keep_reading(self, now: Callable[[], float]) -> None:
        """Take readings until cancelled."""
        while True:
            self.read(now())
            await asyncio.sleep(_READING_S)

    def between(self, begin_s: float, end_s: float) -> float:
        """Return the CPU seconds of a part of the run."""
        begin, end = np.interp([begin_s, end_s], self._moments_s, self._readings_s)
        return float(end - begin)


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
    return [ServedSample(num_streams=load.num_streams, step_s=step_s, cpu_s=cpu_s)]


async def _send(
    server: Server, model: str, load: StreamLoad, vocab_size: int, readings: CpuReadings
) -> tuple[RequestRecord, ...]:
    """Send everything and wait for all answers."""
    address = Address.of(server.base_url)
    by_ids = Server(server.base_url, Endpoint.COMPLETION_TOKENS)
    messages = MessageBuilder(by_ids, address, model, Asking(temperature=0.0))
    chains = chains_of(load.requests())
    attempts = []
    for call in (call for chain in chains for call in chain.calls):
        # Other tokens in every prompt: none finds a prefix in the cache.
        first = secrets.randbelow(vocab_size)
        token_ids = [(first + 7919 * index * (call.index + 1)) % vocab_size for index in range(call.prompt_len)]
        request_id = f"profile-{secrets.token_hex(6)}"
        message = messages.build(Prompt("", token_ids, call.prompt_len), call.output_len, request_id)
        attempts.append(Attempt(call, request_id, message, call.prompt_len))
    pool = ConnectionPool(address)
    try:
        await pool.open()
        run = LoadRun(attempts, Limits(), pool, None)
        reading = asyncio.create_task(readings.keep_reading(run.now))
        try:
            await run.drive(chains, None)
        finally:
            reading.cancel()
        readings.read(run.now())
    finally:
        pool.close()
    records = run.records()
    failed = next((record for record in records if record.ending is not Ending.FINISHED or not record.event_s), None)
    if failed is not None:
        raise DisaggError(f"the server did not finish a request of {failed.prompt_len} tokens: {failed.detail}")
    return records
