"""Where requests wait that come before any instance could serve one."""

import asyncio

from disagg.base.errors import OverloadedError, UnavailableError


class StartGate:
    """Opens once, for good: with the first instances that are ready, or when the server ends.

    Later waits are the dispatcher's. Here nothing is known yet of what instances can hold, so that no request can be
    checked, let alone queued.
    """

    def __init__(self, timeout_s: float, max_waiting: int) -> None:
        self._timeout_s = timeout_s
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._opened = asyncio.Event()

    def open(self) -> None:
        """Let all through. May be called again."""
        self._opened.set()

    async def wait(self) -> None:
        """Return once it is open; raise OverloadedError when too many wait, UnavailableError after the timeout."""
        if self._opened.is_set():
            return
        if self._num_waiting >= self._max_waiting:
            raise OverloadedError(
                f"{self._max_waiting} requests wait for the first instance, which is the limit (--max-queued-requests)"
            )
        self._num_waiting += 1
        try:
            await asyncio.wait_for(self._opened.wait(), self._timeout_s)
        except TimeoutError:
            raise UnavailableError(
                f"no instance became ready in {self._timeout_s:g} s (--instance-wait-s): try again, or watch /ready"
            ) from None
        finally:
            self._num_waiting -= 1
