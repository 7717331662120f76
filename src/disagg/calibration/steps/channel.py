"""The control channel of a profiled instance: the real one, with a script in the router's place and a stop-watch.

The loop asks for messages once in each turn. What lies between two such calls is what the turn costs in service:
waiting messages, the scheduler, building the batch, the forward pass, sampling, and the outputs of the step before
on their way through a ZeroMQ socket. Reading that socket's other end and choosing the next messages is not counted.
"""

import select
import sys
import time
from collections.abc import Sequence
from itertools import count
from typing import Final

import msgspec
import zmq

from disagg.base.clock import Clock
from disagg.base.errors import ProtocolError
from disagg.base.ids import BlockId, InstanceId
from disagg.base.message_fields import Message
from disagg.base.messages import Ready, Stop, ToEngine, decode_for_engine, encode
from disagg.calibration.steps.player import ScriptPlayer, ScriptStage
from disagg.calibration.steps.script import Command, InstanceReady, MeasuredStep, Report, RunScript, StopScript
from disagg.engine.control import ControlChannel
from disagg.engine.executor import ChunkResult, Executor
from disagg.engine.sequences import Work
from disagg.transfer.page_toucher import wait_until_touched

_TOUCH_DEADLINE_S: Final = 120.0


class WatchedExecutor:
    """An executor that notes what its last step computed. See ``Executor``."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._chunks: tuple[tuple[int, int], ...] = ()

    def run(self, step: Sequence[Work]) -> list[ChunkResult]:
        """See ``Executor.run``."""
        self._chunks = tuple((work.chunk.start, work.chunk.num_tokens) for work in step)
        return self._executor.run(step)

    def publish_blocks(self, blocks: Sequence[BlockId]) -> None:
        """See ``Executor.publish_blocks``."""
        self._executor.publish_blocks(blocks)

    def receive_blocks(self, blocks: Sequence[BlockId]) -> None:
        """See ``Executor.receive_blocks``."""
        self._executor.receive_blocks(blocks)

    def take_chunks(self) -> tuple[tuple[int, int], ...]:
        """Return the chunks of the step since the last call; none when there was none."""
        chunks, self._chunks = self._chunks, ()
        return chunks


class ScriptedChannel(ControlChannel):
    """Feeds a loop with the scripts that come on stdin and answers on stdout, one JSON line each."""

    def __init__(self, endpoint: str, instance: InstanceId, clock: Clock) -> None:
        self._router_context = zmq.Context()
        self._router = self._router_context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.bind(endpoint)
        super().__init__(endpoint, instance)
        self._clock = clock
        self._turn_started_s = self._cpu_started_s = 0.0
        self._numbers = count()
        self._commands = msgspec.json.Decoder(Command)
        self._player: ScriptPlayer | None = None
        self._ready: Ready | None = None
        self._news: list[Message] = []
        self.executor: WatchedExecutor | None = None

    def watch(self, executor: Executor) -> Executor:
        """Keep an eye on the executor's steps."""
        self.executor = WatchedExecutor(executor)
        return self.executor

    def send(self, message: Message) -> None:
        """See ``ControlChannel.send``. What was sent is known here at once, however long the socket takes."""
        super().send(message)
        self._news.append(message)

    def receive(self, timeout_s: float) -> list[ToEngine]:
        """See ``ControlChannel.receive``: the end of one turn and the start of the next one."""
        messages = [encode(message) for message in self._next_messages(self._end_turn())]
        self._turn_started_s, self._cpu_started_s = self._clock.now(), time.thread_time()
        received = super().receive(0.0 if messages else timeout_s)
        return [decode_for_engine(data) for data in messages] + received

    def close(self) -> None:
        """See ``ControlChannel.close``."""
        super().close()
        self._router.close()
        self._router_context.term()

    def _end_turn(self) -> MeasuredStep:
        assert self.executor is not None, "the loop was built with ``watch``"
        time_s, cpu_s = self._clock.now() - self._turn_started_s, time.thread_time() - self._cpu_started_s
        return MeasuredStep(chunks=self.executor.take_chunks(), time_s=time_s, on_core=min(1.0, cpu_s / time_s))

    def _next_messages(self, turn: MeasuredStep) -> Sequence[Message]:
        news, self._news = self._news, []
        self._empty_socket()
        if self._ready is None:
            self._welcome(news)
        if self._player is None:
            return self._wait_for_command()
        has_begun = self._player.has_begun
        messages = self._player.after_turn(turn, news)
        if self._player.script.is_endless:
            if self._player.has_begun and not has_begun:
                self._answer(self._player.result())
            if _is_readable():
                self._obey_stop(self._player)
        if self._player.stage is ScriptStage.DONE:
            self._answer(self._player.result())
            self._player = None
            return self._wait_for_command()
        return messages

    def _welcome(self, news: Sequence[Message]) -> None:
        self._ready = next(message for message in news if isinstance(message, Ready))
        wait_until_touched(_TOUCH_DEADLINE_S)
        self._answer(InstanceReady(facts=self._ready.facts))

    def _wait_for_command(self) -> Sequence[Message]:
        command = self._read_command()
        if command is None:
            return (Stop(),)
        if not isinstance(command, RunScript) or self._ready is None:
            raise ProtocolError(f"{command} is no script, and none is running")
        self._player = ScriptPlayer(command.script, self._ready, self._numbers)
        messages = self._player.begin()
        if command.script.is_endless and self._player.has_begun:
            self._answer(self._player.result())
        return messages

    def _obey_stop(self, player: ScriptPlayer) -> None:
        command = self._read_command()
        if not isinstance(command, StopScript):
            raise ProtocolError(f"an endless script ends by StopScript, not by {command}")
        player.stop()

    def _read_command(self) -> Command | None:
        line = sys.stdin.buffer.readline()
        try:
            return self._commands.decode(line) if line else None
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"not a command: {error}") from error

    def _empty_socket(self) -> None:
        while self._router.poll(0):
            self._router.recv_multipart()

    def _answer(self, report: Report) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
        sys.stdout.buffer.flush()


def _is_readable() -> bool:
    return bool(select.select([sys.stdin.buffer], [], [], 0)[0])
