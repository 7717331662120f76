"""Noticing that a client has gone while its answer is still being made."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.types import Receive


class ClientDisconnectedError(Exception):
    """The client went away before its answer was complete; nobody is there to be told."""


@asynccontextmanager
async def noticing_disconnect(receive: Receive, react: Callable[[], None]) -> AsyncIterator[None]:
    """Call ``react`` if the client goes away within the block. The request's body must have been read."""
    watching = asyncio.create_task(_watch(receive, react))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait({watching})


async def _watch(receive: Receive, react: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    react()
