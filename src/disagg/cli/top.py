"""``disagg top``."""

import re
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, TypeVar

import click
import httpx
import msgspec
from rich.console import Console, RenderableType
from rich.live import Live

from disagg.base.errors import DisaggError, ProtocolError, UnavailableError
from disagg.cli.top_figures import History, make_figures
from disagg.cli.top_view import render, room_for
from disagg.cli.workload_flags import SloType
from disagg.measure.slo import Slo
from disagg.serve.api.views import RequestPage, RequestView, ServerView

T = TypeVar("T")

TIMEOUT_S: Final = 5.0
_LONGEST_S: Final = 86_400.0
_PAGE: Final = 1000
_NUM_REQUESTS_ONCE: Final = 10


class Seconds(click.ParamType[float]):
    """A time: 1s, 500ms, or seconds without a unit."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds, above 0."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min)?", str(value).strip())
        seconds = float(match[1]) * {"ms": 1e-3, "s": 1.0, "min": 60.0}[match[2] or "s"] if match else 0.0
        if not 0 < seconds <= _LONGEST_S:
            self.fail(f"{value!r} is not a time such as 1s, 500ms or 5min, up to a day", param, ctx)
        return seconds


@click.command()
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--slo", type=SloType(), default=Slo(), metavar="ttft=250ms,tpot=100ms", help="Latency objectives.")
@click.option("--interval", "interval_s", type=Seconds(), default="1s", show_default=True, help="Between two frames.")
@click.option("--window", "window_s", type=Seconds(), default="1min", show_default=True, help="Whose requests count.")
@click.option("--once", is_flag=True, help="Print one frame, after one interval, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print frames as JSON, one a line.")
@click.option("--api-key", envvar="DISAGG_API_KEY", show_envvar=True, help="Key of the server.")
def top(url: str, slo: Slo, interval_s: float, window_s: float, once: bool, as_json: bool, api_key: str | None) -> None:
    """Watch a running server: instances, hand-overs, latencies against objectives, the last requests.

    Ctrl-C ends it. Without a terminal, frames are printed one after another.
    """
    with Watcher(url, api_key, History(window_s)) as watcher:
        watcher.ask()
        try:
            time.sleep(interval_s)
            if as_json:
                _print_frames(watcher, once, interval_s, lambda: click.echo(_json_frame(watcher, slo)))
            elif once or not sys.stdout.isatty():
                console = Console()
                _print_frames(watcher, once, interval_s, lambda: console.print(_frame(watcher, slo, console)))
            else:
                _show_live(watcher, slo, interval_s)
        except KeyboardInterrupt:
            return


class Watcher:
    """Asks one server, and keeps what it said.

    Raises UnavailableError when there is none at the URL, DisaggError with its words when it refuses, ProtocolError
    when it is another kind of server.
    """

    def __init__(self, url: str, api_key: str | None, history: History) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.history = history
        self._after = -_PAGE
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S)
        except httpx.InvalidURL as error:
            raise UnavailableError(f"{url!r} is not a URL: {error}") from error

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def ask(self) -> None:
        """Ask once."""
        status = self._get("/status", ServerView)
        ended: list[RequestView] = []
        while True:
            page = self._get(f"/requests?after={self._after}&limit={_PAGE}", RequestPage)
            self._after = page.next
            ended += page.requests
            if len(page.requests) < _PAGE:
                break
        self.history.take(status, ended)

    def _get(self, path: str, kind: type[T]) -> T:
        try:
            response = self._http.get(path)
        except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
            words = f"no answer from {self.url} ({error}); start a server with: disagg serve"
            raise UnavailableError(words) from error
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise DisaggError(f"{self.url} wants its API key: give --api-key or set DISAGG_API_KEY")
        try:
            response.raise_for_status()
            return msgspec.json.decode(response.content, type=kind)
        except (httpx.HTTPStatusError, msgspec.MsgspecError) as error:
            words = f"{self.url}{path} answered {response.status_code}: this is no disagg server, or an older one"
            raise ProtocolError(words) from error


def _print_frames(watcher: Watcher, once: bool, interval_s: float, show: Callable[[], None]) -> None:
    """Print frames without a screen; an error ends it."""
    while True:
        watcher.ask()
        show()
        if once:
            return
        sys.stdout.flush()
        time.sleep(interval_s)


def _show_live(watcher: Watcher, slo: Slo, interval_s: float) -> None:
    """Draw over the last frame; what goes wrong is shown above it, and tried again."""
    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            trouble = ""
            try:
                watcher.ask()
            except DisaggError as error:
                trouble = f"{error}. Trying again; what you see is old."
            live.update(_frame(watcher, slo, console, trouble), refresh=True)
            time.sleep(interval_s)


def _frame(watcher: Watcher, slo: Slo, console: Console, trouble: str = "") -> RenderableType:
    instances = watcher.history.statuses[-1].instances
    num_requests, num_instances = _NUM_REQUESTS_ONCE, len(instances)
    if console.is_terminal:
        num_requests, num_instances = room_for(console.height, instances)
    figures = make_figures(watcher.history, slo, num_requests)
    return render(figures, watcher.url, console.width, trouble, num_instances)


def _json_frame(watcher: Watcher, slo: Slo) -> str:
    return msgspec.json.encode(make_figures(watcher.history, slo, _NUM_REQUESTS_ONCE)).decode()
