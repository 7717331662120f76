"""Messages over a pair of connected sockets, each after its length."""

import asyncio
import socket
from typing import Final

from disagg.base.errors import ProtocolError, UnavailableError
from disagg.base.message_fields import MAX_MESSAGE_BYTES, Message
from disagg.base.messages import encode

_LENGTH_BYTES: Final = 4
_MOST_UNSENT_BYTES: Final = 2 * MAX_MESSAGE_BYTES


class MessagePipe:
    """One end. ``open`` it on the event loop that uses it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, end: socket.socket) -> "MessagePipe":
        """Take a connected socket, which is closed with the pipe."""
        end.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=end))

    def send(self, message: Message) -> None:
        """Queue a message without waiting; raise UnavailableError when the other end is gone or does not read."""
        transport = self._writer.transport
        if transport.is_closing() or transport.get_write_buffer_size() > _MOST_UNSENT_BYTES:
            raise UnavailableError("the other end of the pipe is gone, or reads nothing")
        data = encode(message)
        self._writer.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)

    async def receive(self) -> bytes | None:
        """Return the next message, None at the end. Raises ProtocolError on a length that cannot be."""
        try:
            length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "big")
            if length > MAX_MESSAGE_BYTES:
                raise ProtocolError(f"a message of {length} bytes is over the limit of {MAX_MESSAGE_BYTES}")
            return await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def close(self) -> None:
        """End the connection. May be called twice."""
        self._writer.close()
