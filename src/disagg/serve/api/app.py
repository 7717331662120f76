"""The application: routes, the API key, and the one place where errors become responses."""

import hmac
import logging
from collections.abc import Awaitable, Callable
from importlib import resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

import disagg
from disagg.base.clock import Clock, MonotonicClock
from disagg.base.errors import (
    AuthenticationError,
    DisaggError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    UnavailableError,
)
from disagg.serve.api.decoding import decode_body
from disagg.serve.api.endpoints import Endpoints
from disagg.serve.api.http import ClientDisconnectedError, error_response, json_response, read_body
from disagg.serve.api.metrics import ServerMetrics
from disagg.serve.api.prompts import tokenize_prompt
from disagg.serve.api.responses import Detokenized, ModelCard, ModelList, Tokenized
from disagg.serve.api.schema import DetokenizeRequest, TokenizeRequest
from disagg.serve.api.served_model import ServedModel
from disagg.serve.api.status import view, what_is_missing
from disagg.serve.router.interface import Router

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
CLIENT_CLOSED_REQUEST = 499


class Api:
    """Everything that is not generation, and the list of routes."""

    def __init__(self, router: Router, model: ServedModel, metrics: ServerMetrics, clock: Clock) -> None:
        self._router = router
        self._model = model
        self._metrics = metrics
        self._endpoints = Endpoints(router, model, metrics, clock)

    def routes(self, protect: Callable[[Handler], Handler]) -> list[Route]:
        """Return all routes; ``protect`` guards those that need the API key."""
        guarded: dict[str, tuple[Handler, str]] = {
            "/v1/completions": (self._endpoints.completions, "POST"),
            "/v1/chat/completions": (self._endpoints.chat_completions, "POST"),
            "/v1/models": (self.models, "GET"),
            "/v1/models/{name:path}": (self.model, "GET"),
            "/tokenize": (self.tokenize, "POST"),
            "/detokenize": (self.detokenize, "POST"),
            "/status": (self.status, "GET"),
        }
        open_to_all: dict[str, Handler] = {
            "/": self.page,
            "/health": self.health,
            "/live": self.health,
            "/liveness": self.health,
            "/ready": self.ready,
            "/readiness": self.ready,
            "/version": self.version,
            "/metrics": self.metrics,
        }
        return [
            *(Route(path, protect(handler), methods=[method]) for path, (handler, method) in guarded.items()),
            *(Route(path, handler, methods=["GET"]) for path, handler in open_to_all.items()),
        ]

    async def models(self, _: Request) -> Response:
        """List the one model that is served."""
        return json_response(ModelList([self._card()]))

    async def model(self, request: Request) -> Response:
        """Describe a model by name."""
        self._endpoints.check_model(request.path_params["name"])
        return json_response(self._card())

    async def tokenize(self, request: Request) -> Response:
        """Return the token ids of a prompt or a chat."""
        body = decode_body(await read_body(request), TokenizeRequest)
        self._endpoints.check_model(body.model)
        tokens = tokenize_prompt(body, self._model)
        texts = [self._model.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
        return json_response(Tokenized(len(tokens), self._max_model_len(), tokens, texts))

    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids."""
        body = decode_body(await read_body(request), DetokenizeRequest)
        self._endpoints.check_model(body.model)
        return json_response(Detokenized(self._model.tokenizer.decode(body.tokens, skip_special_tokens=False)))

    async def status(self, _: Request) -> Response:
        """Return what is running."""
        return json_response(view(self._router, self._model.name, disagg.__version__))

    async def page(self, _: Request) -> Response:
        """Show what is running and how to call it."""
        page = resources.files("disagg.serve.api").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(page)

    async def health(self, _: Request) -> Response:
        """Answer while the server lives, whatever its instances do."""
        return json_response({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Answer 200 with one live prefill and one live decode instance, or one live colocated instance."""
        if self._router.is_ready():
            return json_response({"status": "ready"})
        return error_response(UnavailableError(f"not ready: {what_is_missing(self._router.instances())}"))

    async def version(self, _: Request) -> Response:
        """Return the version."""
        return json_response({"version": disagg.__version__})

    async def metrics(self, _: Request) -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(self._metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _card(self) -> ModelCard:
        return ModelCard(self._model.name, self._model.created, self._max_model_len())

    def _max_model_len(self) -> int | None:
        try:
            return self._endpoints.max_model_len()
        except UnavailableError:
            return None


def create_app(
    router: Router,
    model: ServedModel,
    metrics: ServerMetrics,
    *,
    api_key: str | None = None,
    clock: Clock | None = None,
) -> Starlette:
    """Return the ASGI application over a router. With ``api_key``, all but health, metrics and the page need it."""
    metrics.watch(router)
    api = Api(router, model, metrics, clock or MonotonicClock())

    def protect(handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            if api_key is not None:
                _check_key(request, api_key)
            return await handler(request)

        return guarded

    return Starlette(
        routes=api.routes(protect),
        exception_handlers={
            DisaggError: _on_disagg_error,
            ClientDisconnectedError: _on_disconnect,
            HTTPException: _on_http_exception,
            Exception: _on_bug,
        },
    )


def _check_key(request: Request, api_key: str) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if not hmac.compare_digest(given.encode(), api_key.encode()):
        what = "a wrong API key" if given else "no API key"
        raise AuthenticationError(f"{what} was given: send the header 'Authorization: Bearer KEY'")


async def _on_disagg_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DisaggError)
    logger.info("%s %s refused: %s", request.method, request.url.path, error)
    return error_response(error)


async def _on_disconnect(request: Request, _: Exception) -> Response:
    logger.info("%s %s: the client went away", request.method, request.url.path)
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        known = "/v1/completions, /v1/chat/completions, /v1/models, /tokenize, /detokenize, /status, /metrics"
        return error_response(ModelNotFoundError(f"no such path: {request.url.path}; there are {known}"))
    response = error_response(InvalidRequestError(f"{request.method} {request.url.path}: {error.detail}"))
    response.status_code = error.status_code
    return response


async def _on_bug(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(InternalError("internal error: the server's log has the details"))
