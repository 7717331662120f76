"""Engine loops in threads of the test's process, with real sockets and real pools, and the router's end of the wire."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import zmq
from fake_executor import FakeExecutor, HeldExecutor, continue_prompt
from msgspec import structs

from disagg.base.clock import Clock, MonotonicClock
from disagg.base.config import SchedulerSettings
from disagg.base.event_log import EventLog
from disagg.base.ids import BlockHash, Epoch, InstanceId, RequestId
from disagg.base.kv_events import Medium
from disagg.base.message_fields import PROTOCOL_VERSION, Message
from disagg.base.messages import (
    Abort,
    Adopt,
    Failed,
    Generate,
    InstanceFacts,
    KvOffer,
    LoadReport,
    Offered,
    Ready,
    Release,
    SequenceOutput,
    StepOutput,
    ToRouter,
    decode_for_router,
    encode,
)
from disagg.base.request import GenerationRequest, Role
from disagg.base.sampling import SamplingParams
from disagg.base.transfer_settings import TransferSettings
from disagg.cache.block_pool import BlockAudit
from disagg.cache.layout import KvDtype, KvFormat, KvLayout
from disagg.engine.control import ControlChannel
from disagg.engine.disk_files import BlockFiles
from disagg.engine.executor import Executor
from disagg.engine.host_blocks import HostBlocks
from disagg.engine.kv_tiers import BlockStore, KvTiers
from disagg.engine.loop import Accessories, EngineLoop
from disagg.engine.pulls import Pulls
from disagg.engine.steps import InlineSteps, Steps, ThreadedSteps
from disagg.scheduling.instance.copy_queue import MAX_BEHIND_STEPS
from disagg.scheduling.instance.core import InstanceCore
from disagg.scheduling.instance.header import InstanceHeader
from disagg.transfer.links import Links, SharedBlocks
from disagg.transfer.pool import KvPool

DEADLINE_S = 30.0
BLOCK_SIZE = 4
MAX_MODEL_LEN = 96
VOCAB_SIZE = 1000
AnyMessage = TypeVar("AnyMessage", bound=Message)


def request(name: str, num_tokens: int, max_tokens: int = 6, epoch: int = 1, **changes: Any) -> GenerationRequest:
    """A prompt of ``num_tokens`` tokens that differs from name to name."""
    sampling = {name: changes.pop(name) for name in SamplingParams.__struct_fields__ if name in changes}
    start = sum(name.encode()) % 97
    prompt = changes.pop("prompt_token_ids", tuple((start + 7 * n) % VOCAB_SIZE for n in range(num_tokens)))
    changes.setdefault("hash_block_size", BLOCK_SIZE)
    return GenerationRequest(
        request_id=RequestId(name),
        epoch=Epoch(epoch),
        prompt_token_ids=prompt,
        sampling=SamplingParams(**{"max_tokens": max_tokens, "seed": 1, **sampling}),
        **changes,
    )


class RouterEnd:
    """The router's socket, and everything that was received on it."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # an instance that comes back takes its name over
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.received: list[tuple[str, ToRouter]] = []

    def send(self, instance: str, *messages: Message) -> None:
        for message in messages:
            self._socket.send_multipart([instance.encode(), encode(message)])

    def send_bytes(self, instance: str, data: bytes) -> None:
        self._socket.send_multipart([instance.encode(), data])

    def wait(self, is_there: Callable[[], bool]) -> None:
        """Receive until ``is_there``."""
        deadline = time.monotonic() + DEADLINE_S
        while not is_there():
            remaining_s = deadline - time.monotonic()
            assert remaining_s > 0, f"it did not come; received: {self.news[-10:]}"
            if self._socket.poll(remaining_s * 1000):
                instance, data = self._socket.recv_multipart()
                if not instance.startswith(b"\0"):  # ZeroMQ's name for who lost its own to one that came after it
                    self.received.append((instance.decode(), decode_for_router(data)))

    @property
    def news(self) -> list[tuple[str, ToRouter]]:
        """What was received, without the regular reports."""
        return [entry for entry in self.received if not isinstance(entry[1], LoadReport)]

    def all(self, kind: type[AnyMessage], instance: str | None = None) -> list[AnyMessage]:
        return [m for sender, m in self.received if isinstance(m, kind) and instance in (None, sender)]

    def expect(self, kind: type[AnyMessage], instance: str | None = None) -> AnyMessage:
        """Wait for the first message of a kind and take it out of the record."""
        self.wait(lambda: bool(self.all(kind, instance)))
        message = self.all(kind, instance)[0]
        self.received.remove(next(entry for entry in self.received if entry[1] is message))
        return message

    def outputs(self, name: str) -> list[SequenceOutput]:
        return [o for message in self.all(StepOutput) for o in message.outputs if o.request_id == name]

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.outputs(name) for token in output.token_ids]

    def wait_for_tokens(self, name: str, count: int) -> None:
        self.wait(lambda: len(self.tokens(name)) >= count)

    def wait_for_end(self, *names: str) -> None:
        self.wait(lambda: all((outputs := self.outputs(n)) and outputs[-1].finish_reason for n in names))

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@dataclass(frozen=True)
class ServedModel:
    """What an instance computes, with whom, and the layout of its pool but for the number of blocks."""

    layout: KvLayout
    make_executor: Callable[[KvPool], Executor]
    vocab_size: int
    max_model_len: int


def fake_model(**layout_changes: Any) -> ServedModel:
    """The model of ``FakeExecutor``."""
    layout = {
        "num_layers": 3,
        "num_blocks": 1,
        "num_kv_heads": 1,
        "block_size": BLOCK_SIZE,
        "head_dim": 4,
        "dtype": KvDtype.FLOAT32,
        "format": KvFormat.TOKEN_MAJOR,
    }
    return ServedModel(
        layout=KvLayout(**{**layout, **layout_changes}),
        make_executor=lambda pool: FakeExecutor(pool, VOCAB_SIZE),
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
    )


@dataclass
class Instance:
    """One engine loop in a thread. ``pull_thread`` and ``executor`` are the places where a test can hold it."""

    router: RouterEnd
    name: str
    incarnation: str = "a1"
    num_blocks: int = 64
    model: ServedModel = field(default_factory=fake_model)
    settings: SchedulerSettings = field(
        default_factory=lambda: SchedulerSettings(max_batch_tokens=16, max_batch_size=8, lease_s=100.0)
    )
    transfer: TransferSettings = field(default_factory=TransferSettings)
    prefix_caching: bool = False
    disk_folder: Path | None = None
    max_disk_blocks: int = 16
    max_host_blocks: int = 0
    tells_tokens: bool = False
    shows_progress: bool = False
    log_path: Path | None = None
    audit: BlockAudit | None = None
    error: BaseException | None = None
    _num_settled: int = 0

    def __enter__(self) -> Self:
        self.pool = KvPool(structs.replace(self.model.layout, num_blocks=self.num_blocks), self.incarnation)
        self.executor = HeldExecutor(self.model.make_executor(self.pool))
        self.pull_thread = ThreadPoolExecutor(max_workers=1 + MAX_BEHIND_STEPS * self.shows_progress)
        self._stack = ExitStack()
        self._thread = threading.Thread(target=self._run, name=self.name)
        self._thread.start()
        self.ready = self.router.expect(Ready, self.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.executor.gate.open()
        self.loop.stop()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the loop did not stop"
        self._stack.close()
        if self.error is not None:
            raise AssertionError(f"{self.name} failed") from self.error

    def _run(self) -> None:
        try:
            self._serve(self._stack)
        except BaseException as error:
            self.error = error

    def _serve(self, stack: ExitStack) -> None:
        clock = MonotonicClock()
        stack.callback(self.pool.close)
        channel = ControlChannel(self.router.endpoint, InstanceId(self.name))
        stack.callback(channel.close)
        stack.enter_context(self.pull_thread)
        self.shared = SharedBlocks(self.pool, self.transfer, None, clock, stack)
        links = Links(self.pool, self.pull_thread, clock, self.transfer, nixl=self.shared.nixl)
        pulls = Pulls(links, self.shared, self.pool.layout, channel.wake)
        stack.callback(pulls.close)
        ready = Ready(
            version=PROTOCOL_VERSION,
            instance=InstanceId(self.name),
            incarnation=self.incarnation,
            role=Role.COLOCATED,
            facts=self._facts(),
        )
        tiers, saved = self._tiers(channel, stack)
        header = InstanceHeader(
            instance=ready.instance,
            incarnation=self.incarnation,
            settings=self.settings,
            num_blocks=self.num_blocks,
            block_size=self.pool.layout.block_size,
            prefix_caching=self.prefix_caching,
            max_model_len=self.model.max_model_len,
            pool=ready.facts.pool,
            max_host_blocks=self.max_host_blocks,
            max_disk_blocks=0 if self.disk_folder is None else self.max_disk_blocks,
            saved_blocks=saved,
            window=self.pool.layout.window_blocks,
            tells_tokens=self.tells_tokens,
            shows_progress=self.shows_progress,
        )
        self.core = InstanceCore(header)
        log = None if self.log_path is None else stack.enter_context(EventLog(self.log_path, header))
        steps = self._steps(channel, clock, stack)
        self.loop = EngineLoop(ready, self.core, steps, self.executor, pulls, channel, clock, Accessories(log, tiers))
        self.loop.run()
        self.core.validate()
        self.audit = self.core.audit()

    def _tiers(self, channel: ControlChannel, stack: ExitStack) -> tuple[KvTiers | None, tuple[BlockHash, ...]]:
        stores: dict[Medium, BlockStore] = {}
        saved: tuple[BlockHash, ...] = ()
        if self.max_host_blocks:
            stores[Medium.CPU] = HostBlocks(self.max_host_blocks, self.pool.layout)
        if self.disk_folder is not None:
            files = BlockFiles(self.disk_folder, self.name, b"fake model", self.pool.layout)
            stack.callback(files.close)
            stores[Medium.DISK], saved = files, files.scan(self.max_disk_blocks)
        if not stores:
            return None, ()
        tiers = KvTiers(stores, self.pool, MonotonicClock(), channel.wake)
        stack.callback(tiers.close)
        return tiers, saved

    def _steps(self, channel: ControlChannel, clock: Clock, stack: ExitStack) -> Steps:
        if self.settings.max_steps_in_flight == 1:
            return InlineSteps(self.executor, clock, self.pool.progress)
        steps = ThreadedSteps(self.executor, clock, channel.wake, lambda: None, self.pool.progress)
        stack.callback(steps.close)
        return steps

    def _facts(self) -> InstanceFacts:
        return InstanceFacts(
            pid=1,
            device="cpu",
            kernel_backend="fake",
            num_blocks=self.num_blocks,
            block_size=self.pool.layout.block_size,
            max_model_len=self.model.max_model_len,
            vocab_size=self.model.vocab_size,
            weight_bytes=0,
            kv_bytes=self.pool.layout.total_bytes,
            load_s=0.0,
            pool=self.shared.address,
        )

    def send(self, *messages: Message) -> None:
        self.router.send(self.name, *messages)

    def settle(self) -> None:
        """With the gate closed: let steps through, one by one, until everything sent so far has been received.

        Each of these steps has to sample, so that it can be waited for.
        """
        self._num_settled += 1
        refused = request(f"marker-{self._num_settled}", 0)
        self.send(Generate(request=refused))
        while not any(failed.request_id == refused.request_id for failed in self.router.all(Failed)):
            num_known = len(self.router.news)
            self.executor.gate.let_through(1)
            self.router.wait(lambda: len(self.router.news) > num_known)  # noqa: B023

    def join(self) -> None:
        """Wait until the loop has ended by itself."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the loop did not end"

    def wait_until_idle(self) -> None:
        """Wait for a load report in which every block is free or cached and nobody waits or runs."""

        def is_idle() -> bool:
            reports = self.router.all(LoadReport, self.name)
            load = reports[-1].load if reports else None
            idle = load is not None and not (load.num_running or load.num_waiting or load.num_leases)
            return idle and load.blocks_free + load.blocks_cached == self.num_blocks  # type: ignore[union-attr]

        self.router.received = [
            entry for entry in self.router.received if not (entry[0] == self.name and isinstance(entry[1], LoadReport))
        ]
        self.router.wait(is_idle)


def answer(sequence: GenerationRequest) -> list[int]:
    """The tokens that the fake executor gives to a request."""
    count = sequence.sampling.max_tokens
    return continue_prompt(sequence.prompt_token_ids, count, 3, VOCAB_SIZE, sequence.sampling.seed)


def continuation(original: GenerationRequest, tokens: Sequence[int]) -> GenerationRequest:
    """The request as it travels on, with the tokens that are already out."""
    return structs.replace(original, output_token_ids=tuple(tokens))


def hand_over(router: RouterEnd, source: Instance, target: Instance, sequence: GenerationRequest) -> KvOffer:
    """Prefill on ``source``, let ``target`` adopt; return the offer."""
    source.send(Generate(request=sequence, hand_over=True))
    offer = router.expect(Offered, source.name).offer
    first = router.tokens(sequence.request_id)
    target.send(Adopt(request=continuation(sequence, first), offer=offer))
    return offer


def release(offer: KvOffer) -> Release:
    return Release(request_id=offer.request_id, epoch=offer.epoch)


def abort(name: str, epoch: int = 1) -> Abort:
    return Abort(request_id=RequestId(name), epoch=Epoch(epoch))
