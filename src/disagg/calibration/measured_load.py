"""Prompts of our own making sent to a real server, while the CPU clocks of server and client are read."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import numpy as np

from disagg.base.errors import DisaggError
from disagg.bench.client.attempt import Attempt
from disagg.bench.client.calls import Call, chains_of
from disagg.bench.client.connection import Address, ConnectionPool
from disagg.bench.client.http_messages import MessageBuilder
from disagg.bench.client.load_plan import Asking, Limits, OpenLoad, Server
from disagg.bench.client.prompt_texts import PromptText
from disagg.bench.client.running import LoadRun
from disagg.measure.record import Ending, RequestRecord

_READING_S: Final = 0.02


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

    @asynccontextmanager
    async def going_on(self, now: Callable[[], float]) -> AsyncIterator[None]:
        """Take readings in the background, and one at the end."""
        reading = asyncio.create_task(self._keep_reading(now))
        try:
            yield
        finally:
            reading.cancel()
        self.read(now())

    async def _keep_reading(self, now: Callable[[], float]) -> None:
        while True:
            self.read(now())
            await asyncio.sleep(_READING_S)

    def between(self, begin_s: float, end_s: float) -> float:
        """Return the CPU seconds of a part of the run."""
        begin, end = np.interp([begin_s, end_s], self._moments_s, self._readings_s)
        return float(end - begin)

    @property
    def lasted_s(self) -> float:
        """From the first reading to the last."""
        return self._moments_s[-1] - self._moments_s[0]

    @property
    def total_s(self) -> float:
        """CPU seconds from the first reading to the last."""
        return self._readings_s[-1] - self._readings_s[0]


async def send_all(
    server: Server, model: str, load: OpenLoad, make_prompt: Callable[[Call], PromptText], readings: CpuReadings
) -> tuple[RequestRecord, ...]:
    """Send everything and wait for all answers; ``readings`` go on meanwhile.

    Raises DisaggError when a request is not finished.
    """
    address = Address.of(server.base_url)
    messages = MessageBuilder(server, address, model, Asking(temperature=0.0))
    chains = chains_of(load)
    attempts = []
    for call in (call for chain in chains for call in chain.calls):
        prompt, request_id = make_prompt(call), f"profile-{secrets.token_hex(6)}"
        message = messages.build(prompt, call.output_len, request_id)
        attempts.append(Attempt(call, request_id, message, prompt.num_tokens))
    pool = ConnectionPool(address)
    try:
        await pool.open()
        run = LoadRun(attempts, Limits(), pool, None)
        async with readings.going_on(run.now):
            await run.drive(chains, None)
    finally:
        pool.close()
    records = run.records()
    failed = next((record for record in records if record.ending is not Ending.FINISHED or not record.event_s), None)
    if failed is not None:
        raise DisaggError(f"the server did not finish a request of {failed.prompt_len} tokens: {failed.detail}")
    return records
