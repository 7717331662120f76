"""Processes that prepare bodies, so that no body holds up the API: bounded in number, time and memory, and replaced.

A chat template is a program that somebody wrote, and a tokenizer takes as long as its text: in a process that may be
killed they hold up nobody. Both ends of its socket are here: the server's, and the process's, which prepares one body
after the other (``python -m disagg.serve.api.preparers``).
"""

import asyncio
import ctypes
import logging
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Final, NoReturn, Self

import msgspec

from disagg.base.errors import (
    ContextLengthError,
    DisaggError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    UnavailableError,
)
from disagg.base.parent import end_with_parent
from disagg.serve.api.preparing import (
    PreparedChat,
    PreparedCompletion,
    PreparedResponse,
    Task,
    detokenize,
    may_need_grammar,
    prepare_chat,
    prepare_completion,
    prepare_response,
    tokenize,
)
from disagg.serve.api.served_model import ServedModel

logger = logging.getLogger(__name__)

NUM_PREPARERS: Final = 2
SHORT_BODY_BYTES: Final = 16 * 1024
"""Bodies up to here take at most some 10 ms, where no template takes part."""
CPU_S: Final = 2.0
"""CPU time that preparing the shortest body may take."""
WALL_TIME_FACTOR: Final = 3.0
"""Seconds that may pass for each second of CPU time: after them a preparer is stuck in one long instruction."""
START_S: Final = 60.0
WAIT_S: Final = 30.0
"""How long a body may wait for a preparer."""
MAX_WAITING_BYTES: Final = 256 << 20
"""Bodies that may be with the preparers at once, or wait for them."""
GIVE_BACK_AFTER_S: Final = 1.0

_ASK: Final = struct.Struct("<BQQ")
"""Task, longest sequence in tokens (0: not known), bytes of the body that follows."""
_REPLY: Final = struct.Struct("<?Q")
"""Whether it went well, bytes of the result or ``Failure`` that follows."""

CPU_S_PER_MIB: Final = 4.0
"""CPU time for a body's length. A tokenizer was measured to take 0.5 s for a MiB."""
_LARGE_BYTES: Final = 1 << 20
_AGAIN_S: Final = 0.2
_MEMORY_BYTES: Final = 3 << 30
"""What one body may take beside the model. The tokenizer was measured to take 110 bytes for each of a text."""

_REFUSALS: Final[dict[str, type[DisaggError]]] = {
    kind.__name__: kind for kind in (InvalidRequestError, ContextLengthError, ModelNotFoundError)
}


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """An error on its way to the API: the name of its class, what it says, and the traceback of a fault of ours."""

    kind: str
    message: str
    param: str | None = None
    traceback: str = ""


# In the server ---------------------------------------------------------------------------------------------------


class Preparation:
    """What endpoints ask to have a body prepared: short ones are done at once, all others and all chats by preparers.

    Without ``preparers`` everything is done at once, which only bodies and templates of one's own deserve.
    """

    def __init__(self, model: ServedModel, preparers: "Preparers | None" = None) -> None:
        self._model = model
        self._preparers = preparers
        self._is_large_gone: asyncio.TimerHandle | None = None

    async def completion(self, body: bytes, max_model_len: int) -> PreparedCompletion:
        """See ``prepare_completion``."""
        if len(body) <= SHORT_BODY_BYTES and not may_need_grammar(body):
            return prepare_completion(body, self._model, max_model_len)
        return msgspec.msgpack.decode(
            await self._perform(Task.COMPLETION, body, max_model_len), type=PreparedCompletion
        )

    async def chat(self, body: bytes, max_model_len: int) -> PreparedChat:
        """See ``prepare_chat``."""
        return msgspec.msgpack.decode(await self._perform(Task.CHAT, body, max_model_len), type=PreparedChat)

    async def response(self, body: bytes, max_model_len: int) -> PreparedResponse:
        """See ``prepare_response``."""
        return msgspec.msgpack.decode(await self._perform(Task.RESPONSE, body, max_model_len), type=PreparedResponse)

    async def tokenize(self, body: bytes, max_model_len: int | None) -> bytes:
        """Return the answer to a ``/tokenize`` body."""
        return await self._perform(Task.TOKENIZE, body, max_model_len)

    async def detokenize(self, body: bytes, max_model_len: int | None) -> bytes:
        """Return the answer to a ``/detokenize`` body."""
        return await self._perform(Task.DETOKENIZE, body, max_model_len)

    async def _perform(self, task: Task, body: bytes, max_model_len: int | None) -> bytes:
        if self._preparers is None:
            return perform(task, body, self._model, max_model_len)
        if len(body) > _LARGE_BYTES:
            self._give_back_soon()
        return await self._preparers.run(task, body, max_model_len)

    def _give_back_soon(self) -> None:
        """Return freed memory to the system once nothing large has come for a while."""
        if self._is_large_gone is not None:
            self._is_large_gone.cancel()
        self._is_large_gone = asyncio.get_running_loop().call_later(GIVE_BACK_AFTER_S, give_back)


class Preparers:
    """The processes, within ``with``. At least one of them is kept free of long bodies."""

    def __init__(self, model: ServedModel, count: int = NUM_PREPARERS, cpu_s: float = CPU_S) -> None:
        self._cpu_s = cpu_s
        self._free = asyncio.Semaphore(count)
        self._free_for_long = asyncio.Semaphore(max(1, count - 1))
        self._num_bytes = 0
        self._idle: list[_Process | None] = [None] * count
        self._ended: list[_Process] = []
        self._model = os.memfd_create("disagg-model")
        with os.fdopen(os.dup(self._model), "wb") as file:
            file.write(model.to_bytes())

    def __enter__(self) -> Self:
        self._idle = [self._start() for _ in self._idle]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._idle:
            if process is not None:
                self._end(process)
        for process in self._ended:
            process.reap()
        os.close(self._model)

    @property
    def pids(self) -> list[int]:
        """Process ids of those that are idle."""
        return [process.pid for process in self._idle if process is not None]

    async def run(self, task: Task, body: bytes, max_model_len: int | None) -> bytes:
        """Have one body prepared.

        Raises what is wrong with it; OverloadedError or UnavailableError when it does not come to that.
        """
        if self._num_bytes + len(body) > MAX_WAITING_BYTES:
            raise OverloadedError("too many large bodies wait to be read: try again later")
        self._num_bytes += len(body)
        try:
            async with self._process_for(body) as process:
                went_well, result = await process.ask(task, body, max_model_len)
        finally:
            self._num_bytes -= len(body)
        if went_well:
            return result
        raise _error(msgspec.msgpack.decode(result, type=Failure))

    @asynccontextmanager
    async def _process_for(self, body: bytes) -> AsyncIterator["_Process"]:
        """Lend an idle process. One that did not come to the end of its task is replaced."""
        is_long = len(body) > SHORT_BODY_BYTES
        async with _in_time(self._free_for_long) if is_long else nullcontext(), _in_time(self._free):
            process = self._idle.pop()
            if process is not None and process.is_gone():
                self._end(process)
                process = None
            process = process or self._start()
            if process is None:
                self._idle.insert(0, None)
                raise UnavailableError("no process can be started to prepare this request: try again later")
            try:
                yield process
            except BaseException:
                self._end(process)
                process = self._start()
                raise
            finally:
                self._idle.append(process)

    def _start(self) -> "_Process | None":
        self._ended = [process for process in self._ended if not process.is_gone()]
        try:
            return _Process(self._model, self._cpu_s)
        except OSError as error:
            logger.error("cannot start a process that prepares requests: %s", error)
            return None

    def _end(self, process: "_Process") -> None:
        process.kill()
        self._ended.append(process)


class _Process:
    """One preparer and the socket to it. It takes one task at a time."""

    def __init__(self, model_descriptor: int, cpu_s: float) -> None:
        self._cpu_s = cpu_s
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._is_ready = False
        try:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "disagg.serve.api.preparers"),
                    *(str(theirs.fileno()), str(model_descriptor), str(os.getpid()), str(cpu_s)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), model_descriptor),
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
            )
        except OSError:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid

    async def ask(self, task: Task, body: bytes, max_model_len: int | None) -> tuple[bool, bytes]:
        """Return whether the task went well, and what came of it. After an exception it can only be killed."""
        loop = asyncio.get_running_loop()
        limit_s = WALL_TIME_FACTOR * (self._cpu_s + CPU_S_PER_MIB * len(body) / (1 << 20))
        try:
            if not self._is_ready:
                async with asyncio.timeout(START_S):
                    await self._receive()
                self._is_ready = True
            async with asyncio.timeout(limit_s):
                header = _ASK.pack(task, max_model_len or 0, len(body))
                # A large body is not copied for its header's sake.
                for data in (header, body) if len(body) > SHORT_BODY_BYTES else (header + body,):
                    await loop.sock_sendall(self._socket, data)
                return await self._receive()
        except TimeoutError:
            raise _overtime(task, limit_s) from None
        except OSError as error:
            raise UnavailableError(
                "the process that prepared this request ended, perhaps for want of memory: send less, or try again"
            ) from error

    async def _receive(self) -> tuple[bool, bytes]:
        header = await self._read(_REPLY.size)
        went_well, size = _REPLY.unpack(header)
        return went_well, await self._read(size)

    async def _read(self, size: int) -> bytes:
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            received = await asyncio.get_running_loop().sock_recv_into(self._socket, view[filled:])
            if not received:
                raise ConnectionResetError("the preparer ended")
            filled += received
        return bytes(data)

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._socket.close()
        self._process.kill()

    def is_gone(self) -> bool:
        """Return whether the process has ended."""
        return self._process.poll() is not None

    def reap(self) -> None:
        """Wait for the end of a killed process."""
        self._process.wait()


@asynccontextmanager
async def _in_time(semaphore: asyncio.Semaphore) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(WAIT_S):
            await semaphore.acquire()
    except TimeoutError:
        raise UnavailableError(f"other requests have been prepared for {WAIT_S:g} s: try again later") from None
    try:
        yield
    finally:
        semaphore.release()


def _error(failure: Failure) -> DisaggError:
    kind = _REFUSALS.get(failure.kind)
    if kind is None:
        logger.error("preparing a request failed\n%s", failure.traceback)
        return InternalError("internal error: the server's log has the details")
    if issubclass(kind, InvalidRequestError):
        return kind(failure.message, failure.param)
    return kind(failure.message)


def _overtime(task: Task, limit_s: float) -> DisaggError:
    if task in (Task.CHAT, Task.RESPONSE):
        words = f"the chat template, or the grammar, did not come to an end in {limit_s:.0f} s with these messages"
        return InvalidRequestError(words, "messages")
    return UnavailableError(f"this request could not be prepared in {limit_s:.0f} s: send less, or try again later")


# In both ---------------------------------------------------------------------------------------------------------


def perform(task: Task, body: bytes, model: ServedModel, max_model_len: int | None) -> bytes:
    """Return a prepared request in msgpack, or the answer of the other two endpoints in JSON."""
    if task is Task.TOKENIZE:
        return msgspec.json.encode(tokenize(body, model, max_model_len))
    if task is Task.DETOKENIZE:
        return msgspec.json.encode(detokenize(body, model, max_model_len))
    assert max_model_len is not None, "nothing is generated before an instance is known"
    match task:
        case Task.COMPLETION:
            return msgspec.msgpack.encode(prepare_completion(body, model, max_model_len))
        case Task.RESPONSE:
            return msgspec.msgpack.encode(prepare_response(body, model, max_model_len))
    return msgspec.msgpack.encode(prepare_chat(body, model, max_model_len))


def give_back() -> None:
    """Have the C library return to the system what it holds free; nothing happens with one that cannot (musl)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# In the process --------------------------------------------------------------------------------------------------


class _OvertimeError(Exception):
    """The CPU time for one body is used up."""


def main() -> None:
    """Serve a socket until its other end closes.

    The arguments are its number, the number of the file that holds the model, the parent's process id, and the seconds
    of CPU time for the shortest body.
    """
    *numbers, cpu_s = sys.argv[1:]
    descriptor, model_descriptor, parent_pid = map(int, numbers)
    if not end_with_parent(parent_pid):
        return
    signal.signal(signal.SIGPROF, _stop)
    with socket.socket(fileno=descriptor) as connection:
        with mmap.mmap(model_descriptor, 0, access=mmap.ACCESS_READ) as data:
            model = ServedModel.from_bytes(bytes(data))
        os.close(model_descriptor)
        _bound_memory()
        prepare_all(connection, model, float(cpu_s))


def prepare_all(connection: socket.socket, model: ServedModel, cpu_s: float) -> None:
    """Prepare what is asked, until the server closes the connection or is gone."""
    with suppress(ConnectionError):
        connection.sendall(_REPLY.pack(True, 0))
        while header := _read(connection, _ASK.size):
            task, max_model_len, size = _ASK.unpack(header)
            limit_s = cpu_s + CPU_S_PER_MIB * size / (1 << 20)
            went_well, result = _answer(Task(task), _read(connection, size), model, max_model_len or None, limit_s)
            connection.sendall(_REPLY.pack(went_well, len(result)) + result)
            if size + len(result) > _LARGE_BYTES:
                del result
                give_back()


def _answer(task: Task, body: bytes, model: ServedModel, max_model_len: int | None, cpu_s: float) -> tuple[bool, bytes]:
    try:
        with _bounded_time(cpu_s):
            return True, perform(task, body, model, max_model_len)
    except _OvertimeError as error:
        failure = Failure(InvalidRequestError.__name__, f"preparing this request took over {cpu_s:.1f} s: {error}")
    except MemoryError:
        words = f"preparing this request takes more than the {_MEMORY_BYTES >> 20} MiB that one may have: send less"
        failure = Failure(InvalidRequestError.__name__, words)
    except DisaggError as error:
        failure = Failure(type(error).__name__, str(error), getattr(error, "param", None))
    except Exception:
        failure = Failure(InternalError.__name__, "internal error", traceback=traceback.format_exc())
    return False, msgspec.msgpack.encode(failure)


@contextmanager
def _bounded_time(cpu_s: float) -> Iterator[None]:
    """Raise _OvertimeError out of Python code of the block once it has used so much CPU time.

    And again soon after, since Jinja swallows what is raised while it computes constants.
    """
    signal.setitimer(signal.ITIMER_PROF, cpu_s, _AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _stop(*_: object) -> NoReturn:
    raise _OvertimeError("the chat template or the text is too much; make it shorter")


def _bound_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as statistics:
        num_pages = int(statistics.read().split()[0])
    limit = num_pages * mmap.PAGESIZE + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _read(connection: socket.socket, size: int) -> bytes:
    """Return so many bytes, or none at the connection's end."""
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
        received = connection.recv_into(view[filled:])
        if not received:
            return b""
        filled += received
    return bytes(data)


if __name__ == "__main__":
    main()
