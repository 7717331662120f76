"""A client of ``/admin``."""

from types import TracebackType
from typing import Final, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from disagg.base.errors import ConfigurationError, DisaggError, ProtocolError, UnavailableError
from disagg.serve.api.views import Audit, CommandReply, InstanceList, InstanceView, LinkList, LinkView

T = TypeVar("T")

_TIMEOUT_S: Final = 20.0
"""An audit waits for instances half as long."""
_PATH: Final = "/admin/instances"
_LINKS: Final = "/admin/links"


class ControlClient:
    """One server.

    Raises UnavailableError when there is none at the URL, ConfigurationError with its words when a command cannot be
    carried out, DisaggError when it refuses otherwise, ProtocolError when it is another kind of server.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._http = httpx.Client(base_url=self._url, headers=headers, timeout=_TIMEOUT_S)
        except httpx.InvalidURL as error:
            raise UnavailableError(f"--url {url!r} is not a URL: {error}") from error

    def __enter__(self) -> "ControlClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def state(self) -> InstanceList:
        """Return the instances, and what autoscaling sees of them."""
        return self._ask("GET", _PATH, None, InstanceList)

    def instances(self) -> list[InstanceView]:
        """Return the instances."""
        return self.state().instances

    def instance(self, name: str) -> InstanceView | None:
        """Return one instance; None when there is none of this name."""
        return next((one for one in self.instances() if one.instance == name), None)

    def audit(self) -> Audit:
        """Return the sum of every instance's KV blocks."""
        return self._ask("GET", "/debug/audit", None, Audit)

    def links(self) -> list[LinkView]:
        """Return the links over which KV blocks are handed over."""
        return self._ask("GET", _LINKS, None, LinkList).links

    def measure_links(self) -> None:
        """Have them measured anew."""
        self._ask("POST", _LINKS, None, LinkList)

    def restart(self) -> CommandReply:
        """Begin to start the routers anew."""
        return self._ask("POST", "/admin/restart", {}, CommandReply)

    def command(self, instance: str | None, verb: str, body: dict[str, object]) -> CommandReply:
        """Give a command to an instance; without one, to the server as a whole."""
        path = _PATH if instance is None else f"{_PATH}/{quote(instance, safe='')}/{verb}"
        return self._ask("POST", path, body, CommandReply)

    def _ask(self, method: str, path: str, body: dict[str, object] | None, kind: type[T]) -> T:
        try:
            response = self._http.request(method, path, json=body)
        except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
            words = f"no answer from {self._url} ({error}); start a server with: disagg serve"
            raise UnavailableError(words) from error
        if response.status_code == httpx.codes.CONFLICT:
            raise ConfigurationError(_words(response))
        if response.status_code in (httpx.codes.BAD_REQUEST, httpx.codes.UNAUTHORIZED):
            raise DisaggError(f"{self._url}: {_words(response)}")
        try:
            response.raise_for_status()
            return msgspec.json.decode(response.content, type=kind)
        except (httpx.HTTPStatusError, msgspec.MsgspecError) as error:
            words = f"{self._url}{path} answered {response.status_code}: this is no disagg server, or an older one"
            raise ProtocolError(words) from error


def _words(response: httpx.Response) -> str:
    """Return what the server said, in OpenAI's shape of an error."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"it answered {response.status_code}"
