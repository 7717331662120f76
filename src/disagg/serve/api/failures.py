"""Errors to responses in OpenAI's shape: the one place where a DisaggError meets HTTP."""

import logging
from typing import Final

from starlette.responses import Response

from disagg.base.errors import (
    AuthenticationError,
    ContextLengthError,
    DisaggError,
    InstanceLostError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    RequestTimeoutError,
    ServerRestartingError,
    UnavailableError,
    http_status,
)
from disagg.serve.api.responses import DONE, ErrorBody, ErrorResponse, encode, event

logger = logging.getLogger(__name__)

UNAVAILABLE_RETRY_S: Final = 2
"""Hint for a client that met no live instance: a restart takes a few seconds."""

_TYPES: Final = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
_CODES: Final[dict[type[DisaggError], str]] = {
    ContextLengthError: "context_length_exceeded",
    ModelNotFoundError: "model_not_found",
    AuthenticationError: "invalid_api_key",
    OverloadedError: "rate_limit_exceeded",
    InstanceLostError: "instance_lost",
    ServerRestartingError: "server_restarting",
    UnavailableError: "unavailable",
    RequestTimeoutError: "timeout",
}
"""OpenAI's codes where it has one."""


def error_response(error: DisaggError) -> Response:
    """Return an error with its status, and with Retry-After where to try again makes sense."""
    status = http_status(error)
    headers: dict[str, str] = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    elif isinstance(error, UnavailableError):
        headers["Retry-After"] = str(UNAVAILABLE_RETRY_S)
    elif isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(encode(ErrorResponse(error_body(error))), status, headers, media_type="application/json")


def plain_error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """Return an error that HTTP itself has, such as an unknown path, in the same shape."""
    kind = _TYPES.get(status, "invalid_request_error")
    body = ErrorResponse(ErrorBody(message=message, type=kind, param=None, code=None))
    return Response(encode(body), status, headers, media_type="application/json")


def error_event(error: DisaggError) -> bytes:
    """Return an error for a stream whose status is sent already, and the stream's end."""
    return event(ErrorResponse(error_body(error))) + DONE


def as_disagg_error(error: Exception) -> DisaggError:
    """Return an error as it may be shown; a fault of ours is logged with its traceback and shown without."""
    if isinstance(error, DisaggError):
        return error
    logger.error("a request failed", exc_info=error)
    return InternalError("internal error: the server's log has the details")


def error_body(error: DisaggError) -> ErrorBody:
    """Return an error as clients see it, with OpenAI's types and codes."""
    status = http_status(error)
    code = next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), None)
    param = error.param if isinstance(error, InvalidRequestError) else None
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return ErrorBody(message=str(error), type=kind, param=param, code=code)
