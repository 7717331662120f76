"""A TCP relay between a reader and a KvServer that does what networks do: flips bytes, stops, cuts."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

import msgspec

from disagg.transfer.address import TcpWay, decode_address, encode_address

Change = Callable[[int, bytes], bytes | None]
"""Gets what the server sent from which byte of the connection on; returns what arrives, None to cut."""


def flip(position: int) -> Change:
    """Damage the byte at a position of each connection."""

    def change(start: int, data: bytes) -> bytes:
        if not start <= position < start + len(data):
            return data
        index = position - start
        return data[:index] + bytes([data[index] ^ 0xFF]) + data[index + 1 :]

    return change


def once(change: Change, min_bytes: int) -> Change:
    """Change only the first connection that carries at least so many bytes."""
    done = threading.Event()

    def change_once(start: int, data: bytes) -> bytes | None:
        if done.is_set():
            return data
        changed = change(start, data)
        if start + len(data) >= min_bytes:
            done.set()
        return changed

    return change_once


class Relay:
    """Listens on a free port, and forwards every connection to the pool at ``address``."""

    def __init__(self, address: bytes, change: Change) -> None:
        known = decode_address(address)
        (self._way,) = [way for way in known.ways if isinstance(way, TcpWay)]
        self._change = change
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        way = TcpWay(host="127.0.0.1", port=self._listener.getsockname()[1])
        self.address = encode_address(msgspec.structs.replace(known, ways=(way,)))
        """Where the pool seems to be."""

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        accepting, *_ = self._threads
        _shut(self._listener)
        accepting.join(30)  # it adds sockets: no other is closed before it has ended
        for one in self._sockets:
            _shut(one)
            one.close()
        for thread in self._threads:
            thread.join(30)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                reader, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection((self._way.host, self._way.port))
            self._sockets += [reader, server]
            self._start(self._forward, reader, server, lambda start, data: data)
            self._start(self._forward, server, reader, self._change)

    def _forward(self, source: socket.socket, target: socket.socket, change: Change) -> None:
        start = 0
        try:
            while data := source.recv(1 << 16):
                changed = change(start, data)
                if changed is None:
                    break
                target.sendall(changed)
                start += len(data)
        except OSError:
            pass
        for one in (source, target):
            _shut(one)


def _shut(one: socket.socket) -> None:
    """End what is sent and received, where anything still is."""
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
