"""The signals that end a server, one after the other."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self


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

    async def cut_short(self, patiently: Coroutine[Any, Any, None], at_once: Callable[[], None]) -> None:
        """Let a server end ``patiently``; the next signal has it end ``at_once`` instead."""
        impatience = asyncio.create_task(self.next(), name="second signal")
        ending = asyncio.create_task(patiently, name="end")
        try:
            ends: set[asyncio.Future[Any]] = {impatience, ending}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                at_once()
                ending.cancel()
        finally:
            impatience.cancel()

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
