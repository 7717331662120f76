"""What every request passes first: it gets an id, and shows its key."""

import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from disagg.base.errors import AuthenticationError
from disagg.serve.api.failures import error_response

REQUEST_ID_HEADER: Final = "X-Request-Id"
OPEN_PATHS: Final = frozenset(
    {"/", "/dashboard", "/health", "/live", "/liveness", "/ready", "/readiness", "/version", "/metrics"}
)
"""What answers without a key: nothing there shows or changes what anybody asks the model."""

_ACCEPTED_ID: Final = re.compile(r"[!-~]{1,128}")


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
