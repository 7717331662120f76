"""A whole server in this process, its instances without a model in others: start, signals, end."""

import asyncio
import json
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from fake_instance import Behaviour
from fakes import DEADLINE_S, FAKE_ENGINE, Memory, make_deployment, wait_until
from reading import outputs
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from disagg.base.config import ServeSettings
from disagg.base.errors import ConfigurationError, DisaggError
from disagg.base.ids import Epoch, RequestId
from disagg.base.request import GenerationRequest
from disagg.base.sampling import SamplingParams
from disagg.serve.launch.deployment import Deployment
from disagg.serve.launch.listening import listen, url_of
from disagg.serve.launch.operator import LocalOperator
from disagg.serve.launch.server import LiveServer
from disagg.serve.router.live import LiveRouter


def make_app(router: LiveRouter, operator: LocalOperator) -> Starlette:
    """An API of two paths: /ready, and /generate/{first prompt token}, which streams tokens as lines."""

    async def ready(_: Request) -> JSONResponse:
        return JSONResponse({}, status_code=200 if router.is_ready() else 503)

    async def generate(request: Request) -> StreamingResponse:
        stream = router.submit(
            GenerationRequest(
                request_id=RequestId(os.urandom(8).hex()),
                epoch=Epoch(0),
                prompt_token_ids=(request.path_params["first"],),
                sampling=SamplingParams(max_tokens=3, seed=0),
            )
        )

        async def lines() -> AsyncIterator[str]:
            try:
                async for output in outputs(stream):
                    yield json.dumps(output.token_ids) + "\n"
            except DisaggError as error:
                yield f"{type(error).__name__}: {error}\n"

        return StreamingResponse(lines())

    return Starlette(routes=[Route("/ready", ready), Route("/generate/{first:int}", generate)])


class RunningServer:
    def __init__(self, deployment: Deployment, bound: socket.socket, options: tuple[str, ...]) -> None:
        self.memory = Memory()
        self.url = url_of(bound)
        self.client = httpx.AsyncClient(base_url=self.url, timeout=DEADLINE_S)
        server = LiveServer(
            deployment, bound, make_app, self.memory, model_name="sums", engine_command=(*FAKE_ENGINE, *options)
        )
        self.task = asyncio.create_task(server.run())

    async def ready(self) -> None:
        await wait_until(lambda: self.memory.url or self.task.done())
        assert self.memory.url == self.url

    def signal(self, number: signal.Signals = signal.SIGINT) -> None:
        os.kill(os.getpid(), number)

    async def ended(self) -> None:
        await asyncio.wait_for(self.task, DEADLINE_S)


@asynccontextmanager
async def running(*options: str, drain_s: float = 0.0) -> AsyncIterator[RunningServer]:
    deployment = make_deployment(drain_s=drain_s)
    with listen(deployment.serve) as bound:
        server = RunningServer(deployment, bound, options)
        try:
            yield server
        finally:
            if not server.task.done():
                server.signal()
                server.signal()
            await asyncio.wait({server.task}, timeout=DEADLINE_S)
            await server.client.aclose()


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each server ends without a process or a file left behind."""
    folder = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    of_other_tests = psutil.Process().children(recursive=True)  # multiprocessing's tracker lives as long as we do
    yield
    assert [child for child in psutil.Process().children(recursive=True) if child not in of_other_tests] == []
    assert not list(folder.iterdir())


async def test_the_api_answers_while_instances_load_and_serves_when_they_are_ready():
    async with running() as server:
        assert (await server.client.get("/ready")).status_code in (200, 503)
        await server.ready()
        assert (await server.client.get("/ready")).status_code == 200
        assert (await server.client.get("/generate/5")).text == "[5]\n[6]\n[7]\n"
        assert any(line.startswith("pinned to") for _, line in server.memory.lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_ends_it(number: signal.Signals):
    async with running() as server:
        await server.ready()
        server.signal(number)
        await server.ended()
        assert server.memory.stopping == number.name
        with pytest.raises(httpx.ConnectError):
            await server.client.get("/ready")


async def test_requests_under_way_get_time_to_finish_and_then_an_error():
    async with running(drain_s=0.2) as server, asyncio.timeout(DEADLINE_S):
        await server.ready()
        async with server.client.stream("GET", f"/generate/{Behaviour.STUCK_IN_DECODE.value}") as response:
            lines = response.aiter_lines()
            await anext(lines)
            server.signal()
            assert [line async for line in lines][-1] == "UnavailableError: the server is stopping"
        await server.ended()


async def test_a_second_signal_ends_it_at_once():
    async with running(drain_s=10 * DEADLINE_S) as server:
        await server.ready()
        async with server.client.stream("GET", f"/generate/{Behaviour.STUCK_IN_DECODE.value}") as response:
            await anext(response.aiter_lines())
            server.signal()
            await wait_until(lambda: server.memory.stopping)
            server.signal()
            await server.ended()


async def test_a_signal_while_instances_load_ends_it():
    async with running() as server:
        await wait_until(lambda: server.memory.lines)
        server.signal()
        await server.ended()


async def test_an_instance_that_cannot_start_ends_it_with_that_instances_words():
    async with running("--fail", "decode-0") as server:
        with pytest.raises(ConfigurationError, match="decode-0 could not start: the KV pool needs 9 GiB"):
            await server.ended()


async def test_a_request_that_kills_its_instances_does_not_end_it():
    async with running() as server:
        await server.ready()
        answer = await server.client.get(f"/generate/{Behaviour.DIE_IN_PREFILL.value}")
        assert answer.text.startswith("InstanceLostError: the request was on 2 instance(s) that died")
        assert (await server.client.get("/generate/5")).text == "[5]\n[6]\n[7]\n"
        assert [(instance, delay) for instance, _, delay in server.memory.lost] == [
            ("prefill-0", 0.0),
            ("decode-0", 0.0),
        ]


async def test_what_cannot_be_planned_is_said_before_anything_starts(tmp_path: Path):
    deployment = Deployment(placement=make_deployment().placement, serve=ServeSettings(port=0))
    with listen(deployment.serve) as bound:
        logs = tmp_path / "file"
        logs.touch()
        host = {"event_log": str(logs)}
        server = LiveServer(
            Deployment(placement=deployment.placement, host=type(deployment.host)(**host)),
            bound,
            make_app,
            Memory(),
            model_name="sums",
            engine_command=("/no/such/program",),
        )
        with pytest.raises(ConfigurationError, match="cannot write the event log"):
            await server.run()
