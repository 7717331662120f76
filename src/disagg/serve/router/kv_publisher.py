"""KV events for other routers, as vLLM publishes them: a ZeroMQ PUB socket, MessagePack, a topic for each instance.

A message has three frames: the topic ``kv@INSTANCE@MODEL``, a number that counts all messages (8 bytes, big endian),
and a batch ``[time, [event, ...], null]``. Who reads too slowly loses messages, which the numbers show; nobody waits.
The block hashes are this server's own, with the tokens that they stand for.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import msgspec
import zmq

from disagg.base.errors import ConfigurationError
from disagg.base.kv_events import AllBlocksCleared, AnyKvEvent
from disagg.base.messages import KvEvents

MAX_UNREAD_MESSAGES: Final = 10_000


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    """One message: ``ts`` is Unix time in seconds; ``data_parallel_rank`` is there for those who read vLLM's."""

    ts: float
    events: Sequence[AnyKvEvent]
    data_parallel_rank: int | None = None


class KvEventPublisher:
    """Publishes at ``endpoint`` what instances of ``model_name`` say; ConfigurationError where it cannot listen."""

    def __init__(self, endpoint: str, model_name: str) -> None:
        self._model_name = model_name
        self._encoder = msgspec.msgpack.Encoder()
        self._num_messages = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, MAX_UNREAD_MESSAGES)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigurationError(
                f"--kv-events {endpoint}: cannot listen there ({error}); give a ZeroMQ endpoint that is free, such as "
                "tcp://127.0.0.1:5557"
            ) from error

    @property
    def endpoint(self) -> str:
        """Where it listens, with the port that the system chose where none was given."""
        last = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(last, bytes), "the option is text"
        return last.rstrip(b"\0").decode()

    def publish(self, message: KvEvents) -> None:
        """Pass on what an instance says. The first message of a life begins with the end of what was before."""
        events = message.events if message.number else (AllBlocksCleared(), *message.events)
        topic = f"kv@{message.instance}@{self._model_name}".encode()
        batch = self._encoder.encode(EventBatch(time.time(), events))
        self._socket.send_multipart((topic, self._num_messages.to_bytes(8, "big"), batch))
        self._num_messages += 1

    def close(self) -> None:
        """Stop to listen."""
        self._socket.close()
        self._context.term()


def open_publisher(endpoint: str | None, model_name: str, resources: ExitStack) -> KvEventPublisher | None:
    """Return who publishes at ``endpoint``, if anybody is to; ``resources`` takes what is to be closed."""
    if endpoint is None:
        return None
    publisher = KvEventPublisher(endpoint, model_name)
    resources.callback(publisher.close)
    return publisher
