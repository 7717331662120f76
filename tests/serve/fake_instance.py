"""An engine instance without a model: it speaks the control protocol over a real socket and computes sums.

Run as a script it takes the place of ``python -m disagg.engine``: settings on stdin, words on stderr. The first token
of a prompt tells it where to get stuck or how to misbehave (``Behaviour``), so that tests can act in a known state.
"""

import argparse
import contextlib
import ctypes
import enum
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import zmq

from disagg.base.config import InstanceSettings
from disagg.base.ids import InstanceId
from disagg.base.message_fields import PROTOCOL_VERSION, Message
from disagg.base.messages import (
    Abort,
    Adopt,
    Failed,
    FailureKind,
    Generate,
    InstanceFacts,
    InstanceLoad,
    KvOffer,
    Loading,
    LoadReport,
    Migrate,
    Offered,
    Pulled,
    Ready,
    Release,
    SequenceOutput,
    StageStamps,
    StepOutput,
    Stop,
    ToEngine,
    decode_for_engine,
    encode,
)
from disagg.base.request import GenerationRequest, Role
from disagg.base.sampling import FinishReason

HEARTBEAT_S = 0.05


class Behaviour(enum.IntEnum):
    """What a sequence makes the instance do, by its first prompt token; any other token means: work.

    What gets stuck in its first attempt goes on in the next, and on the instance that it moves to.
    """

    STUCK_IN_PREFILL = 1001
    STUCK_BEFORE_OFFER = 1002
    STUCK_IN_PULL = 1003
    STUCK_IN_DECODE = 1004
    FAIL = 1005
    DIE_IN_PREFILL = 1006
    FALL_SILENT = 1007
    TALK_NONSENSE = 1008


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def next_token(request: GenerationRequest, num_output: int) -> int:
    """The token after ``num_output`` output tokens: the same on every instance."""
    return (sum(request.prompt_token_ids) + request.sampling.seed + num_output) % 1000


def expected_tokens(request: GenerationRequest) -> list[int]:
    """What a whole answer is."""
    return [next_token(request, index) for index in range(request.sampling.max_tokens)]


def facts(pid: int = 0, max_model_len: int = 512) -> InstanceFacts:
    return InstanceFacts(
        pid=pid,
        device="cpu",
        kernel_backend="sums",
        num_blocks=64,
        block_size=32,
        max_model_len=max_model_len,
        vocab_size=1000,
        weight_bytes=0,
        kv_bytes=0,
        load_s=0.0,
        pool=b"",
    )


@dataclass
class FakeInstance:
    """The logic of one instance: one message in, messages out."""

    instance: InstanceId
    role: Role
    incarnation: str = "1"
    sequences: dict[str, GenerationRequest] = field(default_factory=dict)
    leases: set[str] = field(default_factory=set)
    silent: bool = False

    def hello(self) -> Iterator[Message]:
        for fraction in (0.5, 1.0):
            yield Loading(instance=self.instance, stage="weights", fraction=fraction)
        yield Ready(
            version=PROTOCOL_VERSION,
            instance=self.instance,
            incarnation=self.incarnation,
            role=self.role,
            facts=facts(os.getpid()),
        )

    def load_report(self) -> LoadReport:
        load = InstanceLoad(num_running=len(self.sequences), num_leases=len(self.leases))
        return LoadReport(instance=self.instance, incarnation=self.incarnation, load=load)

    def take(self, message: ToEngine) -> Iterator[Message]:
        match message:
            case Generate():
                yield from self._prefill(message)
            case Adopt():
                yield from self._adopt(message)
            case Abort():
                self.sequences.pop(message.request_id, None)
                self.leases.discard(message.request_id)
            case Migrate():
                yield from self._migrate(message)
            case Release():
                self.leases.discard(message.request_id)
        yield self.load_report()

    def _prefill(self, message: Generate) -> Iterator[Message]:
        request = message.request
        name, behaviour = request.request_id, request.prompt_token_ids[0]
        self.sequences[name] = request
        match behaviour:
            case Behaviour.STUCK_IN_PREFILL if not request.epoch:
                return
            case Behaviour.DIE_IN_PREFILL:
                say("about to die")
                os.kill(os.getpid(), signal.SIGKILL)
            case Behaviour.FALL_SILENT:
                self.silent = True
                return
            case Behaviour.FAIL:
                del self.sequences[name]
                yield Failed(request_id=name, epoch=request.epoch, kind=FailureKind.INTERNAL, message="sum overflow")
                return
        if not message.hand_over:
            yield from self._decode(request, num_output=len(request.output_token_ids))
            return
        num_output = len(request.output_token_ids)
        finished = FinishReason.LENGTH if request.sampling.max_tokens == num_output + 1 else None
        yield self._output(request, num_output, finished)
        if finished or (behaviour == Behaviour.STUCK_BEFORE_OFFER and not request.epoch):
            return
        yield self._offer(request)

    def _offer(self, request: GenerationRequest) -> Offered:
        del self.sequences[request.request_id]
        self.leases.add(request.request_id)
        return Offered(
            offer=KvOffer(
                request_id=request.request_id,
                epoch=request.epoch,
                source=self.instance,
                incarnation=self.incarnation,
                num_tokens=request.num_tokens,
                block_size=16,
                block_ids=(),
                lease_s=60.0,
                pool=b"",
            )
        )

    def _migrate(self, message: Migrate) -> Iterator[Message]:
        """Hand over what is stuck, after the one token that it had brought here and another."""
        request = self.sequences.get(message.request_id)
        if request is not None:
            yield self._output(request, len(request.output_token_ids) + 1, None)
            yield self._offer(request)

    def _adopt(self, message: Adopt) -> Iterator[Message]:
        request = message.request
        name, behaviour = request.request_id, request.prompt_token_ids[0]
        self.sequences[name] = request
        if behaviour == Behaviour.STUCK_IN_PULL and not request.epoch:
            return
        yield Pulled(
            request_id=name, epoch=request.epoch, source=message.offer.source, num_bytes=1000, duration_s=0.001
        )
        yield from self._decode(request, num_output=len(request.output_token_ids))

    def _decode(self, request: GenerationRequest, num_output: int) -> Iterator[Message]:
        for index in range(num_output, request.sampling.max_tokens):
            last = index == request.sampling.max_tokens - 1
            yield self._output(request, index, FinishReason.LENGTH if last else None)
            is_first = not request.epoch and len(request.output_token_ids) <= 1
            if request.prompt_token_ids[0] == Behaviour.STUCK_IN_DECODE and is_first:
                return

    def _output(self, request: GenerationRequest, index: int, finished: FinishReason | None) -> StepOutput:
        if finished:
            del self.sequences[request.request_id]
        now = time.monotonic()
        stamps = StageStamps(received_s=now, pull_started_s=now, pulled_s=now, scheduled_s=now, first_step_done_s=now)
        output = SequenceOutput(
            request_id=request.request_id,
            epoch=request.epoch,
            token_ids=(next_token(request, index),),
            finish_reason=finished,
            stamps=stamps,
        )
        return StepOutput(outputs=(output,))


def serve(settings: InstanceSettings, *, ignore_stop: bool) -> None:
    """Run an instance until Stop."""
    fake = FakeInstance(settings.instance, settings.role, incarnation=str(os.getpid()))
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.ROUTING_ID, settings.instance.encode())
        socket.setsockopt(zmq.LINGER, 500)
        if settings.control_key is not None:
            socket.setsockopt(zmq.PLAIN_USERNAME, settings.instance.encode())
            socket.setsockopt(zmq.PLAIN_PASSWORD, settings.control_key.encode())
        socket.connect(settings.control_endpoint)
        for message in fake.hello():
            socket.send(encode(message))
        while True:
            if not socket.poll(int(HEARTBEAT_S * 1000)):
                if not fake.silent:
                    socket.send(encode(fake.load_report()))
                continue
            message = decode_for_engine(socket.recv())
            if isinstance(message, Stop) and not ignore_stop:
                return
            if isinstance(message, Generate) and message.request.prompt_token_ids[0] == Behaviour.TALK_NONSENSE:
                for _ in range(3):
                    socket.send(b"nonsense")
            elif not fake.silent:
                for answer in fake.take(message):
                    socket.send(encode(answer))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fail", help="name of an instance that cannot start")
    parser.add_argument("--status", type=int, default=2, help="its exit status")
    parser.add_argument("--ignore-stop", action="store_true", help="neither Stop nor SIGTERM end it")
    options = parser.parse_args()
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=InstanceSettings)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != settings.parent_pid:
        sys.exit("error: the parent is gone")
    if options.ignore_stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(f"pinned to {settings.cpus}")
    if options.fail == settings.instance:
        say("error: the KV pool needs 9 GiB, 4 GiB are free; lower --kv-memory")
        sys.exit(options.status)
    with contextlib.suppress(KeyboardInterrupt):
        serve(settings, ignore_stop=options.ignore_stop)


if __name__ == "__main__":
    main()
