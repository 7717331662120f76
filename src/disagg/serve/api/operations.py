"""The endpoints beside generation: models, tokens, and what an operator, a probe or a scraper asks."""

from importlib import resources
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

import disagg
from disagg.base.errors import InvalidRequestError, UnavailableError
from disagg.serve.api.decoding import decode_body
from disagg.serve.api.generation import longest_sequence
from disagg.serve.api.http import read_body
from disagg.serve.api.jobs import check_model
from disagg.serve.api.metrics import ServerMetrics
from disagg.serve.api.prompts import tokenize_prompt
from disagg.serve.api.responses import Detokenized, ModelCard, ModelList, Tokenized, encode
from disagg.serve.api.schema import DetokenizeRequest, TokenizeRequest
from disagg.serve.api.served_model import ServedModel
from disagg.serve.api.status import readiness, server_view
from disagg.serve.router.interface import Router

_PAGE_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Operations:
    """Handlers of everything that does not generate."""

    def __init__(self, router: Router, model: ServedModel, metrics: ServerMetrics) -> None:
        self._router = router
        self._model = model
        self._metrics = metrics
        self._page = resources.files("disagg.serve.api").joinpath("page.html").read_text(encoding="utf-8")

    async def models(self, _: Request) -> Response:
        """List the one model that is served."""
        return _json(ModelList([self._card()]))

    async def model(self, request: Request) -> Response:
        """Describe a model by name."""
        check_model(request.path_params["name"], self._model)
        return _json(self._card())

    async def tokenize(self, request: Request) -> Response:
        """Return the token ids of a prompt or a chat."""
        body = decode_body(await read_body(request.receive), TokenizeRequest)
        check_model(body.model, self._model)
        tokens = tokenize_prompt(body, self._model)
        texts = [self._model.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
        return _json(Tokenized(len(tokens), self._max_model_len(), tokens, texts))

    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids."""
        body = decode_body(await read_body(request.receive), DetokenizeRequest)
        check_model(body.model, self._model)
        largest = max(body.tokens, default=0)
        if largest >= self._model.vocab_size:
            raise InvalidRequestError(
                f"'tokens': token id {largest} is outside the vocabulary of {self._model.vocab_size}", "tokens"
            )
        return _json(Detokenized(self._model.tokenizer.decode(body.tokens, skip_special_tokens=False)))

    async def status(self, _: Request) -> Response:
        """Return what is running."""
        return _json(server_view(self._router, self._model.name, disagg.__version__))

    async def page(self, _: Request) -> Response:
        """Show what is running and how to call it."""
        return HTMLResponse(self._page, headers=_PAGE_HEADERS)

    async def health(self, _: Request) -> Response:
        """Answer while the server lives, whatever its instances do."""
        return _json({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Answer 200 with one live prefill and one live decode instance, or one live colocated; else say what lacks."""
        state = readiness(self._router)
        return _json(state, 200 if state.ready else 503)

    async def version(self, _: Request) -> Response:
        """Return the version."""
        return _json({"version": disagg.__version__})

    async def metrics(self, _: Request) -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(self._metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _card(self) -> ModelCard:
        return ModelCard(self._model.name, self._model.created, self._max_model_len())

    def _max_model_len(self) -> int | None:
        try:
            return longest_sequence(self._router)
        except UnavailableError:
            return None


def _json(value: object, status: int = 200) -> Response:
    return Response(encode(value), status, media_type="application/json")
