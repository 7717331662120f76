"""The application: the gate that every request passes, routes, and handlers that turn errors into responses."""

import hmac
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, ExceptionHandler, Message, Receive, Scope, Send

from disagg.base.clock import Clock, MonotonicClock
from disagg.base.errors import AuthenticationError, DisaggError
from disagg.base.text import one_line
from disagg.serve.api.admin import Administration, Operator
from disagg.serve.api.disconnect import ClientDisconnectedError
from disagg.serve.api.failures import as_disagg_error, error_response, plain_error_response
from disagg.serve.api.generation import SERVICE_HEADER, GenerationEndpoint
from disagg.serve.api.inflate import Inflate
from disagg.serve.api.jobs import JobFactory
from disagg.serve.api.metrics import ServerMetrics
from disagg.serve.api.observer import Accounts
from disagg.serve.api.operations import Operations
from disagg.serve.api.preparers import Preparation, Preparers
from disagg.serve.api.recent_requests import RecentRequests
from disagg.serve.api.served_model import ServedModel
from disagg.serve.api.terms import NO_TERMS, ServiceTerms
from disagg.serve.api.watching import AllMetrics, Watching
from disagg.serve.router.interface import Router

if TYPE_CHECKING:  # its library is an extra
    from disagg.serve.api.tracing import Traces

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST: Final = 499
REQUEST_ID_HEADER: Final = "X-Request-Id"
OPEN_PATHS: Final = frozenset(
    {"/", "/dashboard", "/health", "/live", "/liveness", "/ready", "/readiness", "/version", "/metrics"}
)
"""What answers without a key: nothing there shows or changes what anybody asks the model."""

_ACCEPTED_ID: Final = re.compile(r"[!-~]{1,128}")


def create_app(  # noqa: PLR0913 (each is one thing that a server may have)
    router: Router,
    model: ServedModel,
    metrics: ServerMetrics,
    *,
    operator: Operator | None = None,
    preparers: Preparers | None = None,
    api_keys: Sequence[str] = (),
    tenant_keys: Mapping[str, str] | None = None,
    terms: ServiceTerms = NO_TERMS,
    cors_origins: Sequence[str] = (),
    traces: "Traces | None" = None,
    all_metrics: AllMetrics | None = None,
    clock: Clock | None = None,
) -> ASGIApp:
    """Return the ASGI application over a router.

    With ``api_keys`` or ``tenant_keys``, everything but health, readiness, version, metrics and the pages needs a key.
    ``terms`` are what requests have that say nothing else. Pages of ``cors_origins`` may call it from a browser.
    ``clock`` must be the router's. ``all_metrics`` is asked for what all routers of a server have counted, where there
    are several. Without ``preparers``, bodies are prepared by the event loop; with ``traces``, requests are traced
    there. With ``operator``, ``/admin`` takes commands.
    """
    metrics.watch(router)
    accounts = Accounts(metrics, RecentRequests(), clock or MonotonicClock(), traces, terms.objectives)
    routes = _routes(router, model, Preparation(model, preparers), accounts, terms, all_metrics)
    if operator is not None:
        routes += Administration(
            router, operator, has_key=bool(api_keys or tenant_keys), tenants=set((tenant_keys or {}).values())
        ).routes()
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Gate, api_keys=api_keys, tenant_keys=tenant_keys), Middleware(Inflate)],
        exception_handlers=_exception_handlers(metrics),
    )
    if not cors_origins:
        return app
    # Around everything: preflights bring no key, and pages may read refusals and faults, too.
    return CORSMiddleware(
        app,
        allow_origins=cors_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        allow_private_network=True,
        expose_headers=(REQUEST_ID_HEADER, SERVICE_HEADER, "Retry-After", "traceparent"),
    )


def _routes(
    router: Router,
    model: ServedModel,
    preparation: Preparation,
    accounts: Accounts,
    terms: ServiceTerms,
    all_metrics: AllMetrics | None,
) -> list[Route]:
    jobs = JobFactory(model, preparation, router.name, terms)
    operations = Operations(router, model, preparation)
    watching = Watching(router, model, accounts, all_metrics)
    completions = GenerationEndpoint(jobs.completion, router, accounts)
    chat = GenerationEndpoint(jobs.chat, router, accounts)
    responses = GenerationEndpoint(jobs.response, router, accounts)
    return [
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", operations.models),
        Route("/v1/models/{name:path}", operations.model),
        Route("/tokenize", operations.tokenize, methods=["POST"]),
        Route("/detokenize", operations.detokenize, methods=["POST"]),
        Route("/status", watching.status),
        Route("/requests", watching.requests),
        Route("/", watching.front_page),
        Route("/dashboard", watching.dashboard),
        *(Route(path, operations.health) for path in ("/health", "/live", "/liveness")),
        *(Route(path, operations.ready) for path in ("/ready", "/readiness")),
        Route("/version", operations.version),
        Route("/metrics", watching.metrics),
    ]


def _exception_handlers(metrics: ServerMetrics) -> dict[type[Exception], ExceptionHandler]:
    async def refuse(request: Request, error: Exception) -> Response:
        response = error_response(as_disagg_error(error))
        # Starlette answers what nobody foresaw outside of the gate, which would have added the id.
        response.headers[REQUEST_ID_HEADER] = _request_id(request)
        return noted(request, response, error)

    async def refuse_plainly(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {request.url.path}"
        response = plain_error_response(error.status_code, f"{where}: {error.detail}", dict(error.headers or {}))
        return noted(request, response, error)

    async def give_up(request: Request, error: Exception) -> Response:
        logger.debug("%s %s: the client went away", _request_id(request), one_line(request.url.path))
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    def noted(request: Request, response: Response, error: Exception) -> Response:
        metrics.error_shown(response.status_code)
        path, why = one_line(request.url.path), one_line(str(error))
        logger.info("%s %s refused status=%d: %s", _request_id(request), path, response.status_code, why)
        return response

    return {DisaggError: refuse, HTTPException: refuse_plainly, ClientDisconnectedError: give_up, Exception: refuse}


def _request_id(request: Request) -> str:
    return str(request.scope.get("state", {}).get("request_id", "-"))


class Gate:
    """ASGI middleware. With ``api_keys`` or ``tenant_keys``, all but ``OPEN_PATHS`` answers 401 without one of them.

    A client's own request id is echoed and logged, never used as a key; one that is too long or not printable is
    replaced by one of ours.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], tenant_keys: Mapping[str, str] | None = None) -> None:
        self._app = app
        several = len(api_keys) > 1  # then each is a tenant of its own
        named = {key: f"key {number}" if several else "" for number, key in enumerate(api_keys, start=1)}
        named |= tenant_keys or {}
        self._keys = [(spelling, name) for key, name in named.items() for spelling in _spellings(key)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID_HEADER, "")
        request_id = given if _ACCEPTED_ID.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        tenant = _tenant_of(headers, self._keys)
        scope["state"]["tenant"] = tenant or ""
        if not self._keys or scope["path"] in OPEN_PATHS or tenant is not None:
            await self._app(scope, receive, send_with_id)
            return
        what = "a wrong API key was given" if "authorization" in headers else "no API key was given"
        refusal = AuthenticationError(f"{what}: send the header 'Authorization: Bearer KEY'")
        await error_response(refusal)(scope, receive, send_with_id)


def _spellings(api_key: str) -> tuple[bytes, ...]:
    """Return the bytes that a client may send for a key: most write UTF-8, some what HTTP once was in, latin-1."""
    try:
        return tuple({api_key.encode(), api_key.encode("latin-1")})
    except UnicodeEncodeError:
        return (api_key.encode(),)


def _tenant_of(headers: Mapping[str, str], keys: Sequence[tuple[bytes, str]]) -> str | None:
    """Return the name that goes with the key; None for a wrong one.

    Compares in a time that does not tell how much of the key was right.
    """
    scheme, _, given = headers.get("authorization", "").partition(" ")
    data = given.strip(" \t").encode("latin-1")  # the bytes as they came
    same = [name for key, name in keys if hmac.compare_digest(data, key)]
    return same[0] if scheme.lower() == "bearer" and same else None
