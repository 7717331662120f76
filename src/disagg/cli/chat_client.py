"""A client of the chat API: streams one answer at a time and times it."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx

from disagg.base.errors import DisaggError, ProtocolError, UnavailableError

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class ShownPiece:
    """A piece of an answer for the eyes: of its text, or of what the model thinks before it."""

    text: str
    is_reasoning: bool = False


@dataclass
class ShownCall:
    """A call of a tool, whose arguments grow."""

    call_id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass
class ChatAnswer:
    """One answer as it comes, and when."""

    asked_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    last_s: float | None = None
    text: str = ""
    num_tokens: int = 0
    stopped: bool = False
    calls: dict[int, ShownCall] = field(default_factory=dict)

    def add(self, piece: ShownPiece) -> None:
        """Note a piece that arrived now."""
        self.arrived()
        if not piece.is_reasoning:
            self.text += piece.text

    def arrived(self) -> None:
        """Note that something arrived now."""
        self.last_s = time.monotonic()
        if self.first_s is None:
            self.first_s = self.last_s

    def as_message(self) -> dict[str, Any]:
        """Return the answer as the conversation goes on with it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.calls:
            message["tool_calls"] = [
                {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls.values()
            ]
        return message

    def describe(self) -> str:
        """Return how fast it came, in words."""
        if self.first_s is None or self.last_s is None:
            return "[stopped]" if self.stopped else "[no answer]"
        first = f"first token after {1e3 * (self.first_s - self.asked_s):.0f} ms"
        if self.stopped:
            return f"[stopped; {first}]"
        if self.num_tokens < 2 or self.last_s == self.first_s:
            return f"[{first}]"
        rate = (self.num_tokens - 1) / (self.last_s - self.first_s)
        return f"[{self.num_tokens} tokens, {rate:.1f} tokens/s, {first}]"


class ChatClient:
    """One server. ``model`` is the name asked for, or that of the one model the server has.

    Raises UnavailableError when there is no server at ``url``, DisaggError with its words when it refuses.
    """

    def __init__(self, url: str, api_key: str | None, model: str | None, settings: Mapping[str, object]) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self._url = url.rstrip("/").removesuffix("/v1")
        self._settings = settings
        try:
            self._http = httpx.Client(base_url=self._url, headers=headers, timeout=timeout)
        except httpx.InvalidURL as error:
            raise UnavailableError(f"--url {url!r} is not a URL: {error}") from error
        self.model = model or self._first_model()

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def stream(self, messages: Sequence[Mapping[str, Any]], answer: ChatAnswer) -> Iterator[ShownPiece]:
        """Yield the pieces of an answer and keep them in ``answer``. Leaving early aborts it on the server."""
        body = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._settings,
        }
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise DisaggError(_error_message(response))
                for event in _events(response.iter_lines()):
                    for piece in _take(event, answer):
                        answer.add(piece)
                        yield piece
        except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
            raise self._unreachable(error) from error

    def _first_model(self) -> str:
        try:
            response = self._http.get("/v1/models")
        except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
            self._http.close()
            raise self._unreachable(error) from error
        if response.is_error:
            self._http.close()
            raise DisaggError(_error_message(response))
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            self._http.close()
            raise ProtocolError(f"{self._url} does not speak OpenAI's API: no list of models at /v1/models") from error

    def _unreachable(self, error: Exception) -> UnavailableError:
        return UnavailableError(f"no answer from {self._url} ({error}); start a server with: disagg serve")


def _events(lines: Iterator[str]) -> Iterator[dict[str, object]]:
    """Yield the JSON objects of a stream of server-sent events."""
    for line in lines:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        try:
            event = json.loads(data)
        except ValueError as error:
            raise ProtocolError(f"the server sent an event that is no JSON: {data[:200]!r}") from error
        if isinstance(event, dict):
            yield event


def _take(event: Mapping[str, object], answer: ChatAnswer) -> Iterator[ShownPiece]:
    """Yield what an event shows, and note its usage and its calls. Raises DisaggError for an error."""
    match event:
        case {"error": {"message": message}}:
            raise DisaggError(str(message))
        case {"usage": {"completion_tokens": int(num_tokens)}}:
            answer.num_tokens = num_tokens
    match event:
        case {"choices": [{"delta": dict(delta)}, *_]}:
            reasoning = delta.get("reasoning_content") or delta.get("reasoning")
            if isinstance(reasoning, str) and reasoning:
                yield ShownPiece(reasoning, is_reasoning=True)
            for call in delta.get("tool_calls") or ():
                _add_call(call, answer)
            content = delta.get("content")
            if isinstance(content, str) and content:
                yield ShownPiece(content)


def _add_call(delta: Any, answer: ChatAnswer) -> None:
    match delta:
        case {"index": int(index), "function": dict(function)}:
            answer.arrived()
            call = answer.calls.setdefault(index, ShownCall())
            call.call_id = str(delta.get("id") or call.call_id)
            call.name = str(function.get("name") or call.name)
            call.arguments += str(function.get("arguments") or "")


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"{response.request.url} answered {response.status_code}: {response.text[:200]}"
