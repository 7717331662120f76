"""The one exception tree.

::

    DisaggError                     everything this package raises on purpose
    ├── ConfigurationError          a setting, flag, file or command that cannot be used as things are (409)
    │   └── UnsupportedModelError   a model that no code here can run
    │       └── UnknownArchitectureError   of a family that no code here knows
    ├── InvalidRequestError         a request that is wrong in itself (HTTP 400)
    │   └── ContextLengthError      prompt plus answer do not fit the model or the KV pool (400)
    ├── ModelNotFoundError          the request names a model that is not served (404)
    ├── AuthenticationError         missing or wrong API key (401)
    ├── OverloadedError             a bounded queue is full (429, with Retry-After)
    ├── UnavailableError            no instance can take the request now (503)
    │   ├── InstanceLostError       too many instances died with the request (503)
    │   └── ServerRestartingError   the router that had the request is started anew (503)
    ├── RequestTimeoutError         a deadline passed (408)
    ├── ProtocolError               a message that is too long, malformed or of another version
    ├── TransferError               a KV hand-over that did not complete
    │   └── HungError               a transfer that was given up and cannot be stopped
    └── InternalError               a fault of ours that must not be hidden (500)

Messages say what was wrong, with the value, and what to do about it. ``HTTP_STATUS`` maps the tree to HTTP.
"""

from typing import Final


class DisaggError(Exception):
    """Base of every error raised on purpose."""


class ConfigurationError(DisaggError):
    """A setting, flag, file or command that cannot be used as things are."""


class UnsupportedModelError(ConfigurationError):
    """A model that no code here can run; says the architecture, the field, and what is supported."""


class UnknownArchitectureError(UnsupportedModelError):
    """A model of a family that our decoder does not know; transformers' code may compute it."""


class InvalidRequestError(DisaggError):
    """A request that is wrong in itself.

    ``param`` names the offending field as the client wrote it, where there is one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """Prompt plus answer do not fit; says the limit and the length."""


class ModelNotFoundError(DisaggError):
    """The request names a model that is not served."""


class AuthenticationError(DisaggError):
    """Missing or wrong API key."""


class OverloadedError(DisaggError):
    """A bounded queue is full. ``retry_after_s`` is a hint for the client, in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(DisaggError):
    """No instance can take the request now."""


class InstanceLostError(UnavailableError):
    """More instances died with the request on them than ``max_instance_losses`` lets it survive."""


class ServerRestartingError(UnavailableError):
    """The router that had the request is started anew, and waited for it as long as it was told to."""


class RequestTimeoutError(DisaggError):
    """A deadline passed."""


class ProtocolError(DisaggError):
    """A message that is too long, malformed, or of another version."""


class TransferError(DisaggError):
    """A KV hand-over that did not complete."""


class HungError(TransferError):
    """A transfer was given up that cannot be stopped."""


class InternalError(DisaggError):
    """A fault of ours that must not be hidden."""


HTTP_STATUS: Final[dict[type[DisaggError], int]] = {
    InvalidRequestError: 400,
    AuthenticationError: 401,
    ConfigurationError: 409,
    ModelNotFoundError: 404,
    RequestTimeoutError: 408,
    OverloadedError: 429,
    UnavailableError: 503,
    DisaggError: 500,
}
"""Nearest base class wins; everything not named is a 500."""


def http_status(error: DisaggError) -> int:
    """Return the HTTP status of the nearest class in ``HTTP_STATUS``."""
    return next(HTTP_STATUS[kind] for kind in type(error).__mro__ if kind in HTTP_STATUS)
