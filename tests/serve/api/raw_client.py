"""HTTP by hand: a connection that sends what a test likes, in pieces, and closes as a test likes."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from api_site import Site

DEADLINE_S = 20.0


def completion(http: str = "HTTP/1.1", *headers: str, **fields: Any) -> bytes:
    """A whole request for a completion of three tokens."""
    body = json.dumps({"prompt": "x", "max_tokens": 3, "ignore_eos": True} | fields).encode()
    lines = [f"POST /v1/completions {http}", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class RawClient:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def shut_sending_side(self) -> None:
        self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        """Go without a goodbye: the system sends RST."""
        connection = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def read_to_end(self) -> bytes:
        """Everything until the server closes."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._reader.read()

    async def read_until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self._reader.readuntil(mark)

    async def read_response(self) -> tuple[int, bytes]:
        """One response with a length: its status and body."""
        head = await self.read_until(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        async with asyncio.timeout(DEADLINE_S):
            body = await self._reader.readexactly(int(length.split(b":")[1]))
        return int(head.split()[1]), body


@asynccontextmanager
async def connected(site: Site) -> AsyncIterator[RawClient]:
    host, port = site.url.removeprefix("http://").split(":")
    async with asyncio.timeout(DEADLINE_S):
        client = RawClient(*await asyncio.open_connection(host, int(port)))
    try:
        yield client
    finally:
        client.close()


async def ask(site: Site, data: bytes) -> bytes:
    """Send ``data`` on a connection of its own and return all that comes back until the server closes it."""
    async with connected(site) as client:
        await client.send(data)
        return await client.read_to_end()
