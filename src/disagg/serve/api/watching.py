"""What an operator, her browser or a scraper asks: state, recent requests, metrics, pages."""

from collections.abc import Awaitable, Callable

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

import disagg
from disagg.base.errors import InvalidRequestError
from disagg.serve.api.observer import Accounts
from disagg.serve.api.pages import Page
from disagg.serve.api.recent_requests import DEFAULT_PAGE, MAX_PAGE
from disagg.serve.api.responses import json_response
from disagg.serve.api.served_model import ServedModel
from disagg.serve.api.status import server_view
from disagg.serve.router.interface import Router

AllMetrics = Callable[[], Awaitable[bytes]]
"""Returns what all routers of a server have counted."""


class Watching:
    """Handlers of what shows the server at work."""

    def __init__(
        self, router: Router, model: ServedModel, accounts: Accounts, all_metrics: AllMetrics | None = None
    ) -> None:
        self._all_metrics = all_metrics
        self._router = router
        self._model = model
        self._accounts = accounts
        self._front_page = Page("page.html")
        self._dashboard = Page("dashboard.html")

    async def status(self, _: Request) -> Response:
        """Return what is running."""
        return json_response(server_view(self._router, self._model, disagg.__version__, self._accounts))

    async def requests(self, request: Request) -> Response:
        """Return a page of the requests that ended last; raise InvalidRequestError for a bad ``after`` or ``limit``."""
        after, limit = _integer(request, "after", 0), _integer(request, "limit", DEFAULT_PAGE)
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidRequestError(f"'limit' is {limit}, but must be from 1 to {MAX_PAGE}", "limit")
        return json_response(self._accounts.recent.page(after, limit))

    async def metrics(self, _: Request) -> Response:
        """Return the metrics in Prometheus' text format."""
        own, others = self._accounts.metrics, self._all_metrics
        text = own.exposition() if others is None else await others()
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def front_page(self, _: Request) -> Response:
        """Show what is running and how to call it."""
        return self._front_page.response()

    async def dashboard(self, _: Request) -> Response:
        """Show the server at work."""
        return self._dashboard.response()


def _integer(request: Request, name: str, default: int) -> int:
    """Return a parameter of the query. Raises InvalidRequestError when it is not an integer."""
    given = request.query_params.get(name)
    try:
        return default if given is None else int(given)
    except ValueError:
        raise InvalidRequestError(f"'{name}' is {given!r}, but must be an integer", name) from None
