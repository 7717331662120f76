"""A real HTTP server over a scripted router, a tokenizer of bytes, and the official client."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
import tokenizers
import uvloop
from api_site import ANSWER, BOS, EOS, Serve, Site, ids_of
from scripted_router import Script, ScriptedRouter

from disagg.base.config import ServeSettings
from disagg.models.chat_template import ChatTemplate
from disagg.models.tokenizer import Tokenizer, byte_alphabet
from disagg.models.tool_calls.syntax import syntax_of
from disagg.serve.api.admin import Operator
from disagg.serve.api.app import create_app
from disagg.serve.api.metrics import ServerMetrics
from disagg.serve.api.preparers import Preparers
from disagg.serve.api.served_model import ServedModel
from disagg.serve.api.terms import NO_TERMS, ServiceTerms
from disagg.serve.api.tracing import Traces
from disagg.serve.launch.api_server import make_api_server
from disagg.serve.launch.descriptors import DescriptorBudget

DEFAULTS = ServeSettings()
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], Any]]:
    """Run on what servers run on: transports differ in small ways."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One token for each byte, then ``<bos>`` and ``<eos>``: every character beyond ASCII spans tokens."""
    vocabulary = {character: byte for byte, character in byte_alphabet().items()}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in ("<bos>", "<eos>")])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return Tokenizer(backend, {"bos_token": "<bos>", "eos_token": "<eos>"})


@pytest.fixture(scope="session")
def served_model(tokenizer: Tokenizer) -> ServedModel:
    return ServedModel(
        name="tiny",
        tokenizer=tokenizer,
        chat_template=ChatTemplate(TEMPLATE, tokenizer.special_tokens),
        eos_token_ids=(EOS,),
        vocab_size=tokenizer.vocab_size,
        hash_block_size=32,
        syntax=syntax_of(TEMPLATE),
    )


@pytest.fixture
async def serve(served_model: ServedModel) -> AsyncIterator[Serve]:
    """Start servers that answer ``ANSWER``, or what ``script`` says; they stop at the end of the test."""
    async with AsyncExitStack() as stack:

        async def start(
            script: Script | None = None,
            api_key: str | None = None,
            further_keys: tuple[str, ...] = (),
            settings: ServeSettings = DEFAULTS,
            max_connections: int = 1000,
            preparers: Preparers | None = None,
            operator: Operator | None = None,
            traces: Traces | None = None,
            terms: ServiceTerms = NO_TERMS,
            tenant_keys: dict[str, str] | None = None,
            **router: Any,
        ) -> Site:
            scripted = ScriptedRouter(script or (lambda _: [*ids_of(ANSWER), EOS]), **router)
            app = create_app(
                scripted,
                served_model,
                ServerMetrics("tiny"),
                operator=operator,
                preparers=preparers,
                api_keys=() if api_key is None else (api_key, *further_keys),
                cors_origins=settings.cors_origin,
                traces=traces,
                terms=terms,
                tenant_keys=tenant_keys,
            )
            url = await stack.enter_async_context(listening(app, settings, max_connections))
            headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}".encode()}
            # Without certificates: reading them takes longer than most tests do.
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, headers=headers, verify=False))
            plain = openai.DefaultAsyncHttpxClient(verify=False)
            client = openai.AsyncOpenAI(
                base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0, http_client=plain
            )
            return Site(url, scripted, await stack.enter_async_context(client), http)

        yield start


@asynccontextmanager
async def listening(app: Any, settings: ServeSettings, max_connections: int) -> AsyncIterator[str]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()  # connections wait from now on, however long the server takes to start
        server = make_api_server(app, settings, DescriptorBudget(max_connections, backlog=128))
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
