"""A router in memory whose sequences say what the test wrote, token by token, when the test lets them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from disagg.base.clock import MonotonicClock
from disagg.base.errors import DisaggError
from disagg.base.ids import InstanceId, RequestId, RouterId
from disagg.base.messages import InstanceFacts, InstanceLoad, SequenceOutput
from disagg.base.request import GenerationRequest, Role
from disagg.base.sampling import FinishReason, PositionLogprobs, TokenLogprob
from disagg.measure.timeline import RequestTimeline
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.router.elastic_view import ElasticView
from disagg.serve.router.interface import InstanceStatus, ServedBy
from disagg.serve.router.record import LiveStream
from disagg.serve.router.start_gate import StartGate

MAX_MODEL_LEN = 256
NUM_CACHED = 32
PAIR = ServedBy(InstanceId("prefill-0"), InstanceId("decode-0"))
Script = Callable[[GenerationRequest], Sequence[int]]


def facts(max_model_len: int = MAX_MODEL_LEN) -> InstanceFacts:
    return InstanceFacts(
        pid=1,
        device="cpu",
        kernel_backend="native",
        num_blocks=100,
        block_size=32,
        max_model_len=max_model_len,
        vocab_size=258,
        weight_bytes=1,
        kv_bytes=1,
        load_s=0.1,
        pool=b"",
    )


def logprobs_of(token_id: int) -> PositionLogprobs:
    """The token with probability exp(-0.5), and the next one as its only rival."""
    chosen = TokenLogprob(token_id, -0.5, 1)
    return PositionLogprobs(chosen, (chosen, TokenLogprob((token_id + 1) % 256, -1.5, 2)))


_ONLY = RouterId("")


@dataclass
class ScriptedSequence:
    """Says one token an output, waiting for ``gate`` before each when there is one; then ends, with ``error``."""

    request: GenerationRequest
    token_ids: Sequence[int]
    error: DisaggError | None
    gate: asyncio.Semaphore | None
    stream: LiveStream = field(
        default_factory=lambda: LiveStream(RequestTimeline(arrival_s=0.0), MonotonicClock()), init=False
    )

    def start(self) -> None:
        self.stream.served_by = PAIR
        self._talking = asyncio.ensure_future(self._talk())

    async def _talk(self) -> None:
        sampling = self.request.sampling
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(self.request.eos_token_ids))
        for position, token_id in enumerate(self.token_ids[: sampling.max_tokens]):
            await (asyncio.sleep(0) if self.gate is None else self.gate.acquire())
            reason = FinishReason.STOP if token_id in stops else None
            if reason is None and position + 1 == sampling.max_tokens:
                reason = FinishReason.LENGTH
            self.stream.push(self._output(position, token_id, reason))
            if reason is not None:
                self.stream.end()
                return
        self.stream.end(self.error)

    def _output(self, position: int, token_id: int, reason: FinishReason | None) -> SequenceOutput:
        is_first, sampling = position == 0, self.request.sampling
        scored = is_first and sampling.prompt_logprobs is not None
        return SequenceOutput(
            request_id=self.request.request_id,
            epoch=self.request.epoch,
            token_ids=(token_id,),
            finish_reason=reason,
            stop_token_id=token_id if reason is FinishReason.STOP else None,
            logprobs=(logprobs_of(token_id),) if sampling.logprobs is not None else (),
            prompt_logprobs=tuple(map(logprobs_of, self.request.prompt_token_ids[1:])) if scored else (),
            num_cached_tokens=NUM_CACHED if is_first else 0,
        )


@dataclass
class ScriptedRouter:
    """Answers every request with ``script(request)``; remembers requests and aborts.

    ``refusal`` is raised for every sequence after the first ``num_accepted``.
    """

    script: Script
    error: DisaggError | None = None
    refusal: DisaggError | None = None
    num_accepted: int = 0
    best_effort: bool = False
    gate: asyncio.Semaphore | None = None
    live: bool = True
    name: RouterId = _ONLY
    instance_wait_s: float = 20.0
    max_model_len: int = MAX_MODEL_LEN
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[RequestId] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _sequences: list[ScriptedSequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start_gate = StartGate(self.instance_wait_s, max_waiting=3)
        if self.live:
            self.start_gate.open()

    def submit(self, request: GenerationRequest) -> LiveStream:
        if self.refusal is not None and len(self.requests) >= self.num_accepted:
            raise self.refusal
        self.requests.append(request)
        self._notify()
        sequence = ScriptedSequence(request, self.script(request), self.error, self.gate)
        sequence.stream.is_best_effort = self.best_effort
        sequence.start()
        self._sequences.append(sequence)
        return sequence.stream

    async def wait_started(self) -> None:
        await self.start_gate.wait()

    def come_alive(self) -> None:
        self.live = True
        self.start_gate.open()

    def abort(self, request_id: RequestId) -> None:
        self.aborted.append(request_id)
        self._notify()

    def instances(self) -> tuple[InstanceStatus, ...]:
        state = InstanceState.READY if self.live else InstanceState.STARTING
        load = InstanceLoad(blocks_total=100, blocks_free=60, blocks_cached=15, blocks_active=25, num_running=2)
        return tuple(
            InstanceStatus(
                instance=InstanceId(f"{role.value}-0"),
                role=role,
                state=state,
                facts=facts(self.max_model_len) if self.live else None,
                load=load,
                detail="" if self.live else "reading weights",
            )
            for role in (Role.PREFILL, Role.DECODE)
        )

    def elastic_view(self) -> ElasticView:
        return ElasticView()

    def is_ready(self) -> bool:
        return self.live

    async def wait_for(self, num_requests: int = 0, num_aborted: int = 0) -> None:
        """Return once so many sequences have come and been aborted."""
        async with asyncio.timeout(20), self.changed:
            await self.changed.wait_for(lambda: len(self.requests) >= num_requests and len(self.aborted) >= num_aborted)

    def _notify(self) -> None:
        async def notify() -> None:
            async with self.changed:
                self.changed.notify_all()

        self._notifying = asyncio.ensure_future(notify())
