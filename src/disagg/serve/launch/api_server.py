"""The HTTP server under the API: uvicorn with our connections."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, cast

import uvicorn
from starlette.types import ASGIApp

from disagg.base.config import ServeSettings
from disagg.serve.launch.descriptors import DescriptorBudget
from disagg.serve.launch.http_connection import Connection
from disagg.serve.launch.idle import IdleConnections

CLOSE_S: Final = 3.0
"""What connections get to send their last bytes once all requests have ended."""


class ApiServer(uvicorn.Server):
    """A uvicorn server that leaves the signals to us."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_begun = asyncio.Event()
        """Set once clients are accepted."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        await super().startup(sockets)
        self.has_begun.set()

    def retire(self, timeout_s: float) -> None:
        """Accept no more, and give the answers under way so long."""
        self.config.timeout_graceful_shutdown = int(timeout_s + CLOSE_S)
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing: ``Server`` handles the signals of the process."""
        yield


def make_api_server(app: ASGIApp, settings: ServeSettings, budget: DescriptorBudget) -> ApiServer:
    """Return a server for ``app`` that has not begun to serve."""
    connect = partial(
        Connection, idle=IdleConnections(budget.max_connections), header_timeout_s=settings.header_timeout_s
    )
    return ApiServer(
        uvicorn.Config(
            app,
            http=cast(Any, connect),
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            backlog=budget.backlog,
            timeout_keep_alive=cast(int, settings.keep_alive_s),
            timeout_graceful_shutdown=int(settings.drain_s + CLOSE_S),
        )
    )
