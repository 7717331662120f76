"""What one asks a server before and after a run: its model, its instances, the stages of recent requests."""

from collections.abc import Iterator
from typing import Any, Final

import httpx
import msgspec

from disagg.base.errors import DisaggError, ProtocolError, UnavailableError
from disagg.bench.client.answer_stream import read_error
from disagg.bench.client.load_plan import Server

_TIMEOUT_S: Final = 30.0
_PAGE: Final = 1000


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Instance(msgspec.Struct):
    state: str = ""


class TotalPredictions(msgspec.Struct, frozen=True, kw_only=True):
    """What our server says of predictions and admission since it started."""

    num_total: int = 0
    prompt_tokens_total: int = 0
    leaning_prompt_tokens_total: int = 0
    ttft_seconds_total: float = 0.0
    ttft_error_seconds_total: float = 0.0
    ttft_regret_seconds_total: float = 0.0
    num_refused_total: int = 0
    num_shed_total: int = 0
    num_degraded_total: int = 0

    def since(self, before: "TotalPredictions") -> "TotalPredictions":
        """Return what came after an earlier answer of the same server."""
        return TotalPredictions(
            **{name: getattr(self, name) - getattr(before, name) for name in self.__struct_fields__}
        )

    def words(self) -> tuple[str, ...]:
        """Return it as notes for a reader; none where there is nothing to say."""
        notes = []
        if self.num_total:
            share = self.leaning_prompt_tokens_total / max(1, self.prompt_tokens_total)
            error = self.ttft_error_seconds_total / max(1e-9, self.ttft_seconds_total)
            regret_s = self.ttft_regret_seconds_total / self.num_total
            notes.append(
                f"paths by prediction: {share:.0%} of prompt tokens prefilled against the roles, TTFT predicted to "
                f"{error:.0%}, mean regret {regret_s * 1e3:.0f} ms"
            )
        if self.num_refused_total or self.num_degraded_total:
            notes.append(
                f"{self.num_refused_total} refused, {self.num_shed_total} of them predicted to miss; "
                f"{self.num_degraded_total} served as best effort"
            )
        return tuple(notes)


class _Status(msgspec.Struct):
    instances: list[_Instance]
    predictions: TotalPredictions = TotalPredictions()


class RecentRequest(msgspec.Struct):
    """What our server tells of one of its recent requests: enough of it to add to a record."""

    request_id: str
    prefill_instance: str | None = None
    decode_instance: str | None = None
    num_output_tokens: int = 0
    is_best_effort: bool = False
    stages: dict[str, float] = {}


class _Page(msgspec.Struct):
    next: int
    requests: list[RecentRequest]


def served_model(server: Server) -> str:
    """Return the name of the server's first model.

    Raises UnavailableError when no server answers, DisaggError with its words when it refuses, ProtocolError when it
    does not speak this API.
    """
    response = _get(server, "/v1/models")
    if response.is_error:
        raise DisaggError(f"{response.request.url} answered {response.status_code}: {read_error(response.content)}")
    try:
        return msgspec.json.decode(response.content, type=_Models).data[0].id
    except (msgspec.MsgspecError, IndexError) as error:
        raise ProtocolError(
            f"{server.base_url} does not speak OpenAI's API: no list of models at /v1/models; name one with --model"
        ) from error


def num_instances(server: Server) -> int | None:
    """Return how many instances the server runs; None where it is not ours and does not tell."""
    status = _ours(server, "/status", _Status)
    return len(status.instances) if status is not None and status.instances else None


def predictions(server: Server) -> TotalPredictions:
    """Return what the server says of its predictions; zeros where it is not ours."""
    status = _ours(server, "/status", _Status)
    return TotalPredictions() if status is None else status.predictions


def recent_requests(server: Server) -> Iterator[RecentRequest]:
    """Yield what the server remembers of its latest requests; nothing where it is not ours."""
    after = 0
    while (page := _ours(server, f"/requests?after={after}&limit={_PAGE}", _Page)) is not None and page.requests:
        yield from page.requests
        if page.next <= after:
            return
        after = page.next


def _ours(server: Server, path: str, kind: type[Any]) -> Any:
    """Ask for something that only our server has; None when there is no such thing."""
    try:
        response = _get(server, path)
        return None if response.is_error else msgspec.json.decode(response.content, type=kind)
    except (UnavailableError, msgspec.MsgspecError):
        return None


def _get(server: Server, path: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    try:
        return httpx.get(f"{server.base_url}{path}", headers=headers, timeout=_TIMEOUT_S)
    except (httpx.TransportError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise UnavailableError(
            f"no answer from {server.base_url} ({error}); start a server with: disagg serve"
        ) from error
