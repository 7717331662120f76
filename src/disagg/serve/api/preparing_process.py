"""``python -m disagg.serve.api.preparing_process``: prepares one body after the other for the API, which may kill it.

A chat template is a program that somebody wrote, and a tokenizer takes as long as its text: here they hold up nobody,
their memory is bounded, and so is their CPU time.
"""

import mmap
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, NoReturn

import msgspec

from disagg.base.errors import DisaggError, InternalError, InvalidRequestError
from disagg.base.parent import end_with_parent
from disagg.serve.api.freed_memory import give_back
from disagg.serve.api.preparing import (
    Task,
    detokenize,
    prepare_chat,
    prepare_completion,
    prepare_response,
    tokenize,
)
from disagg.serve.api.served_model import ServedModel

ASK: Final = struct.Struct("<BQQ")
"""Task, longest sequence in tokens (0: not known), bytes of the body that follows."""
REPLY: Final = struct.Struct("<?Q")
"""Whether it went well, bytes of the result or ``Failure`` that follows."""

CPU_S_PER_MIB: Final = 4.0
"""CPU time for a body's length. A tokenizer was measured to take 0.5 s for a MiB."""
LARGE_BYTES: Final = 1 << 20
_AGAIN_S: Final = 0.2
_MEMORY_BYTES: Final = 3 << 30
"""What one body may take beside the model. The tokenizer was measured to take 110 bytes for each of a text."""


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """An error on its way to the API: the name of its class, what it says, and the traceback of a fault of ours."""

    kind: str
    message: str
    param: str | None = None
    traceback: str = ""


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
        connection.sendall(REPLY.pack(True, 0))
        while header := _read(connection, ASK.size):
            task, max_model_len, size = ASK.unpack(header)
            limit_s = cpu_s + CPU_S_PER_MIB * size / (1 << 20)
            went_well, result = _answer(Task(task), _read(connection, size), model, max_model_len or None, limit_s)
            connection.sendall(REPLY.pack(went_well, len(result)) + result)
            if size + len(result) > LARGE_BYTES:
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
