"""The endpoints beside generation that clients and probes ask: models, tokens, readiness, version."""

from starlette.requests import Request
from starlette.responses import Response

import disagg
from disagg.base.errors import UnavailableError
from disagg.serve.api.generation import longest_sequence
from disagg.serve.api.http import read_body
from disagg.serve.api.preparers import Preparation
from disagg.serve.api.preparing import check_model
from disagg.serve.api.responses import ModelCard, ModelList, json_response
from disagg.serve.api.served_model import ServedModel
from disagg.serve.api.status import readiness
from disagg.serve.router.interface import Router


class Operations:
    """Handlers of what neither generates nor watches."""

    def __init__(self, router: Router, model: ServedModel, preparation: Preparation) -> None:
        self._router = router
        self._model = model
        self._preparation = preparation

    async def models(self, _: Request) -> Response:
        """List the one model that is served."""
        return json_response(ModelList([self._card()]))

    async def model(self, request: Request) -> Response:
        """Describe a model by name."""
        check_model(request.path_params["name"], self._model)
        return json_response(self._card())

    async def tokenize(self, request: Request) -> Response:
        """Return the token ids of a prompt or a chat."""
        body = await read_body(request.receive)
        return _json(await self._preparation.tokenize(body, self._max_model_len()))

    async def detokenize(self, request: Request) -> Response:
        """Return the text of token ids."""
        body = await read_body(request.receive)
        return _json(await self._preparation.detokenize(body, self._max_model_len()))

    async def health(self, _: Request) -> Response:
        """Answer while the server lives, whatever its instances do."""
        return json_response({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        """Answer 200 with one live prefill and one live decode instance, or one live colocated; else say what lacks."""
        state = readiness(self._router)
        return json_response(state, 200 if state.ready else 503)

    async def version(self, _: Request) -> Response:
        """Return the version."""
        return json_response({"version": disagg.__version__})

    def _card(self) -> ModelCard:
        return ModelCard(self._model.name, self._model.created, self._max_model_len())

    def _max_model_len(self) -> int | None:
        try:
            return longest_sequence(self._router)
        except UnavailableError:
            return None


def _json(encoded: bytes) -> Response:
    return Response(encoded, media_type="application/json")
