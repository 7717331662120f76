"""Before a run: try the server with a request that is not counted, and write all requests."""

import dataclasses
import secrets
import uuid
from collections.abc import Iterable
from typing import Final

from disagg.base.errors import DisaggError, UnavailableError
from disagg.bench.client.answer_stream import StreamReader
from disagg.bench.client.attempt import Attempt
from disagg.bench.client.calls import Call
from disagg.bench.client.connection import Address, ConnectionPool
from disagg.bench.client.http_messages import MessageBuilder
from disagg.bench.client.load_plan import Endpoint, LoadPlan
from disagg.bench.client.prompt_texts import PromptMaker, PromptSource
from disagg.measure.record import Ending, RequestRecord
from disagg.measure.workload import NO_PREFIX

_BAD_REQUEST: Final = ("HTTP 400", "HTTP 422")


class LoadPreparation:
    """Makes attempts for one plan; ``try_server`` adapts to the server first. ``notes`` say how."""

    def __init__(self, plan: LoadPlan, model: str, source: PromptSource) -> None:
        self.notes: list[str] = []
        self._plan = plan
        self._source = source
        self._run_id = uuid.uuid4().hex[:12]
        self.prompt_seed = secrets.randbits(32) if plan.prompt_seed is None else plan.prompt_seed
        self._messages = MessageBuilder(plan.server, Address.of(plan.server.base_url), model, plan.asking)
        self._is_chat = plan.server.endpoint is Endpoint.CHAT
        self._prompts = self._prompt_maker(extra_tokens=0)
        self._reader = StreamReader()

    async def try_server(self, pool: ConnectionPool, calls: Iterable[Call]) -> None:
        """Send warm-up requests as long as these calls, one after the other.

        Raises UnavailableError when the server does not answer, DisaggError with its words when it refuses.
        """
        for number, call in enumerate(calls):
            record, prompt_tokens = await self._warm_up(pool, call, number)
            if record.error in _BAD_REQUEST and self._messages.asking.continuous_usage:
                asking = dataclasses.replace(self._messages.asking, continuous_usage=False)
                self._messages = dataclasses.replace(self._messages, asking=asking)
                record, prompt_tokens = await self._warm_up(pool, call, number)
                if record.ending is Ending.FINISHED:
                    self.notes.append("the server refuses continuous_usage_stats: an event counts as one token")
            if record.ending is not Ending.FINISHED:
                kind = UnavailableError if record.ending is Ending.UNREACHABLE else DisaggError
                raise kind(f"a request before the run failed: {record.error}: {record.detail}")
            if number == 0 and prompt_tokens is not None and self._is_chat and self._source.encode_chat is None:
                self._prompts = self._prompt_maker(extra_tokens=prompt_tokens - record.prompt_len)

    def attempts(self, calls: Iterable[Call]) -> list[Attempt]:
        """Return an attempt for each call, its request written out."""
        calls = list(calls)
        attempts = [self._attempt(call, str(call.index)) for call in calls]
        num_longer = sum(call.prompt_len < self._prompts.least_len for call in calls)
        if num_longer:
            self.notes.append(
                f"{num_longer} prompts are longer than asked: the shortest has {self._prompts.least_len} tokens, with "
                "what the model wants around it"
            )
        return attempts

    async def _warm_up(self, pool: ConnectionPool, call: Call, number: int) -> tuple[RequestRecord, int | None]:
        # Nothing that is measured may be in a prefix cache because of it.
        attempt = self._attempt(dataclasses.replace(call, prefix=NO_PREFIX), f"warm-up {number}")
        attempt.due_s = 0.0
        await attempt.send(pool, self._plan.limits.request_timeout_s)
        return attempt.record(self._reader, attempt.sent_s)

    def _attempt(self, call: Call, key: str) -> Attempt:
        prompt = self._prompts.make(key, call.prompt_len, call.prefix)
        request_id = f"{self._run_id}-{key.replace(' ', '-')}"
        message = self._messages.build(prompt, call.output_len, request_id)
        return Attempt(call, request_id, message, prompt.num_tokens)

    def _prompt_maker(self, extra_tokens: int) -> PromptMaker:
        source = self._source
        encode = source.encode
        if self._is_chat and source.encode_chat is not None:
            encode = source.encode_chat
        return PromptMaker(source.words, encode, seed=self.prompt_seed, extra_tokens=extra_tokens)
