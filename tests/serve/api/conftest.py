"""A real HTTP server over a scripted router, and the official client for it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import openai
import pytest
import uvicorn
from api_site import ANSWER, EOS, Serve, Site
from scripted_router import ScriptedRouter

from disagg.base.request import GenerationRequest
from disagg.models.chat_template import load_chat_template
from disagg.models.locate import locate_model
from disagg.models.tokenizer import load_tokenizer
from disagg.serve.api.app import create_app
from disagg.serve.api.metrics import ServerMetrics
from disagg.serve.api.served_model import ServedModel


@pytest.fixture(scope="session")
def served_model() -> ServedModel:
    files = locate_model(None)
    tokenizer = load_tokenizer(files)
    return ServedModel(
        name="tiny",
        tokenizer=tokenizer,
        chat_template=load_chat_template(files, tokenizer.special_tokens),
        eos_token_ids=(EOS,),
        vocab_size=tokenizer.vocab_size,
        block_size=32,
    )


@pytest.fixture
async def serve(served_model: ServedModel) -> AsyncIterator[Serve]:
    """Start servers; each is stopped at the end of the test."""
    running = []

    async def start(
        script: Callable[[GenerationRequest], Sequence[int]] | None = None, api_key: str | None = None, **router: object
    ) -> Site:
        default = [*served_model.tokenizer.encode(ANSWER, add_special_tokens=False), EOS]
        scripted = ScriptedRouter(script or (lambda _: default), **router)  # type: ignore[arg-type]
        app = create_app(scripted, served_model, ServerMetrics("tiny"), api_key=api_key)
        context = listening(app)
        url = await context.__aenter__()
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0)
        running.append((context, client))
        return Site(url, scripted, client)

    yield start
    for context, client in running:
        await client.close()
        await context.__aexit__(None, None, None)


@asynccontextmanager
async def listening(app: object) -> AsyncIterator[str]:
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=5))  # type: ignore[arg-type]
    task = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        bound.close()
