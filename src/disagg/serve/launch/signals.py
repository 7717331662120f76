"""The signals that end a server, one after the other."""

import asyncio
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Self


class SignalQueue:
    """Takes SIGINT, SIGTERM and SIGHUP on the running event loop for the length of a block.

    SIGHUP calls ``on_hangup``, where there is one; without, it ends a server as the others do.
    """

    def __init__(self, on_hangup: Callable[[], None] | None = None) -> None:
        self._queue: asyncio.Queue[signal.Signals] = asyncio.Queue(maxsize=16)
        self._on_hangup = on_hangup

    async def next(self) -> signal.Signals:
        """Return the next one that ends a server, once it has come."""
        return await self._queue.get()

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._take, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)

    def _take(self, number: signal.Signals) -> None:
        if number is signal.SIGHUP and self._on_hangup is not None:
            self._on_hangup()
        elif not self._queue.full():
            self._queue.put_nowait(number)
