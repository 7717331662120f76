"""An HTTP server that takes no more connections: what those get that are there already."""

import asyncio
import socket

from fakes import DEADLINE_S, wait_until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from disagg.base.config import ServeSettings
from disagg.serve.launch.api_server import make_api_server
from disagg.serve.launch.descriptors import DescriptorBudget


async def hello(_: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


async def test_a_client_that_has_just_connected_is_answered_once_and_one_that_asks_nothing_is_let_go() -> None:
    bound = socket.create_server(("127.0.0.1", 0))
    server = make_api_server(
        Starlette(routes=[Route("/", hello)]), ServeSettings(port=0), DescriptorBudget(max_connections=9, backlog=9)
    )
    async with asyncio.timeout(DEADLINE_S):
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        await server.has_begun.wait()
        address = bound.getsockname()
        (asks, writer), (silent, other) = [await asyncio.open_connection(*address) for _ in range(2)]
        await wait_until(lambda: len(server.server_state.connections) == 2)
        server.retire(DEADLINE_S)
        await wait_until(lambda: not server.servers[0].is_serving())
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await asks.read()
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"connection: close" in answer.lower()
        assert await silent.read() == b""
        writer.close()
        other.close()
        await serving
