"""A router in memory whose sequences say what the test wrote, token by token, when the test lets them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from disagg.base.errors import DisaggError
from disagg.base.ids import InstanceId, RequestId
from disagg.base.messages import InstanceFacts, InstanceLoad, SequenceOutput
from disagg.base.request import GenerationRequest, Role
from disagg.base.sampling import FinishReason, PositionLogprobs, TokenLogprob
from disagg.measure.timeline import RequestTimeline
from disagg.serve.router.interface import InstanceState, InstanceStatus

MAX_MODEL_LEN = 256


def facts() -> InstanceFacts:
    return InstanceFacts(
        pid=1,
        device="cpu",
        kernel_backend="native",
        num_blocks=100,
        block_size=32,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=49152,
        weight_bytes=1,
        kv_bytes=1,
        load_s=0.1,
        pool=b"",
    )


@dataclass
class ScriptedStream:
    """Yields one token an output; waits for ``gate`` before each when there is one."""

    request: GenerationRequest
    token_ids: Sequence[int]
    error: DisaggError | None
    gate: asyncio.Semaphore | None
    timeline: RequestTimeline = field(default_factory=lambda: RequestTimeline(arrival_s=0.0))

    async def __aiter__(self) -> AsyncIterator[SequenceOutput]:
        sampling = self.request.sampling
        for position, token_id in enumerate(self.token_ids[: sampling.max_tokens]):
            if self.gate is not None:
                await self.gate.acquire()
            if self.error is not None and position == len(self.token_ids) - 1:
                raise self.error
            stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(self.request.eos_token_ids))
            reason = FinishReason.STOP if token_id in stops else None
            if reason is None and position + 1 == sampling.max_tokens:
                reason = FinishReason.LENGTH
            yield SequenceOutput(
                request_id=self.request.request_id,
                epoch=self.request.epoch,
                token_ids=(token_id,),
                finish_reason=reason,
                stop_token_id=token_id if reason is FinishReason.STOP else None,
                logprobs=(logprobs_of(token_id),) if sampling.logprobs is not None else (),
                prompt_logprobs=self.prompt_logprobs() if position == 0 else (),
                num_cached_tokens=32 if position == 0 else 0,
            )
            if reason is not None:
                return

    def prompt_logprobs(self) -> tuple[PositionLogprobs, ...]:
        if self.request.sampling.prompt_logprobs is None:
            return ()
        return tuple(logprobs_of(token_id) for token_id in self.request.prompt_token_ids[1:])


def logprobs_of(token_id: int) -> PositionLogprobs:
    chosen = TokenLogprob(token_id, -0.5, 1)
    return PositionLogprobs(chosen, (chosen, TokenLogprob(token_id + 1, -1.5, 2)))


@dataclass
class ScriptedRouter:
    """Answers every request with ``script(request)``; remembers requests and aborts."""

    script: Callable[[GenerationRequest], Sequence[int]]
    error: DisaggError | None = None
    refusal: DisaggError | None = None
    gate: asyncio.Semaphore | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[RequestId] = field(default_factory=list)
    aborting: asyncio.Event = field(default_factory=asyncio.Event)
    live: bool = True

    def submit(self, request: GenerationRequest) -> ScriptedStream:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        return ScriptedStream(request, self.script(request), self.error, self.gate)

    def abort(self, request_id: RequestId) -> None:
        self.aborted.append(request_id)
        self.aborting.set()

    def instances(self) -> tuple[InstanceStatus, ...]:
        state = InstanceState.READY if self.live else InstanceState.STARTING
        known = facts() if self.live else None
        load = InstanceLoad(blocks_total=100, blocks_free=60, blocks_cached=15, blocks_active=25, num_running=2)
        return tuple(
            InstanceStatus(instance=InstanceId(f"{role.value}-0"), role=role, state=state, facts=known, load=load)
            for role in (Role.PREFILL, Role.DECODE)
        )

    def is_ready(self) -> bool:
        return self.live
