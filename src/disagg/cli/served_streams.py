"""Steps of a real server that streams answers while it prefills other prompts: what is read off at the client.

Some answers stream from the decode instance, and prompts wait in line for the prefill instance, so that both compute
without pause; what serves, and the client, finds no other cores than theirs, or does.
"""

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

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
from disagg.simulator.contention import Activity
from disagg.simulator.served_steps import ServedSample

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
    server: Server, limits: StreamLimits, streams: Sequence[int], num_prompts: int
) -> list[ServedSample]:
    """Send a load for each number of streams and return the steps seen; a load that ended too soon brings none.

    Raises DisaggError when the server refuses a request.
    """
    model = served_model(server)
    samples = []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for num_streams in streams:
            load = StreamLoad.within(limits, num_streams, num_prompts)
            samples += served_steps(load, runner.run(_send(server, model, load, limits.vocab_size)))
    return samples


def served_steps(load: StreamLoad, records: Sequence[RequestRecord]) -> list[ServedSample]:
    """Return the mean decode step and the mean prefill step of the time in which all streams and the prompts ran."""
    streams, prompts = records[: load.num_streams], records[load.num_streams :]
    prefilled_s = sorted(record.event_s[0] for record in prompts)
    begin_s = max(prefilled_s[0], *(record.event_s[0] for record in streams))
    end_s = min(prefilled_s[-1], *(record.event_s[-1] for record in streams))
    shared = [[moment_s for moment_s in record.event_s if begin_s <= moment_s <= end_s] for record in streams]
    prefilled_s = [moment_s for moment_s in prefilled_s if begin_s <= moment_s <= end_s]
    if len(prefilled_s) <= load.num_packed or min(map(len, shared)) <= _FEWEST_STEPS:
        return []
    decode_s = fmean((moments_s[-1] - moments_s[0]) / (len(moments_s) - 1) for moments_s in shared)
    prefill_s = (prefilled_s[-1] - prefilled_s[0]) / (len(prefilled_s) - 1) * load.num_packed
    num_before = [sum(moment_s < begin_s for moment_s in record.event_s) for record in streams]
    contexts = [
        load.stream_prompt_len + before + len(moments_s) // 2
        for before, moments_s in zip(num_before, shared, strict=True)
    ]
    return [
        ServedSample(
            chunks=tuple((context, 1) for context in contexts),
            time_s=decode_s,
            neighbour=Activity.PREFILL,
            neighbour_tokens=load.num_packed,
            neighbour_step_s=prefill_s,
        ),
        ServedSample(
            chunks=((0, load.prompt_len),) * load.num_packed,
            time_s=prefill_s,
            neighbour=Activity.DECODE,
            neighbour_tokens=load.num_streams,
            neighbour_step_s=decode_s,
        ),
    ]


async def _send(server: Server, model: str, load: StreamLoad, vocab_size: int) -> tuple[RequestRecord, ...]:
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
        await run.drive(chains, None)
    finally:
        pool.close()
    records = run.records()
    failed = next((record for record in records if record.ending is not Ending.FINISHED or not record.event_s), None)
    if failed is not None:
        raise DisaggError(f"the server did not finish a request of {failed.prompt_len} tokens: {failed.detail}")
    return records
