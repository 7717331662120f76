"""Whole HTTP requests, as bytes, made before the run."""

from dataclasses import dataclass

import msgspec

import disagg
from disagg.bench.client.connection import Address
from disagg.bench.client.load_plan import Asking, Endpoint, Server
from disagg.bench.client.prompt_texts import PromptText


@dataclass(frozen=True, slots=True)
class MessageBuilder:
    """Writes requests to one server."""

    server: Server
    address: Address
    model: str
    asking: Asking

    def build(self, prompt: PromptText, output_len: int, request_id: str) -> bytes:
        """Return a request for ``output_len`` tokens, with its headers."""
        return self._with_headers(msgspec.json.encode(self._body(prompt, output_len)), request_id)

    def _body(self, prompt: PromptText, output_len: int) -> dict[str, object]:
        asking = self.asking
        body: dict[str, object] = {"model": self.model}
        match self.server.endpoint:
            case Endpoint.COMPLETIONS:
                body["prompt"] = prompt.text
            case Endpoint.COMPLETION_TOKENS:
                body["prompt"] = prompt.token_ids
            case Endpoint.CHAT:
                body["messages"] = [{"role": "user", "content": prompt.text}]
        stream_options = {"include_usage": True}
        if asking.continuous_usage:
            stream_options["continuous_usage_stats"] = True
        body |= {"stream": True, "stream_options": stream_options, "max_tokens": output_len}
        body["temperature"] = asking.temperature
        if asking.ignore_eos:
            body["ignore_eos"] = True
        if asking.min_tokens:
            body["min_tokens"] = output_len
        return body | asking.extra

    def _with_headers(self, body: bytes, request_id: str) -> bytes:
        path = "chat/completions" if self.server.endpoint is Endpoint.CHAT else "completions"
        lines = [
            f"POST {self.address.path}/v1/{path} HTTP/1.1",
            f"Host: {self.address.host_header}",
            f"User-Agent: disagg-bench/{disagg.__version__}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            f"X-Request-Id: {request_id}",
            f"Content-Length: {len(body)}",
        ]
        if self.server.api_key:
            lines.append(f"Authorization: Bearer {self.server.api_key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body
