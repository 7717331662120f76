"""The keys with which hosts of one deployment know each other: CURVE pairs, in the files that pyzmq writes.

A folder has ``server.key_secret`` (stays with the server), ``server.key`` and ``instance.key_secret`` (also on every
host whose instances join) and ``instance.key`` (whom the server lets in).
"""

import os
from pathlib import Path
from typing import Final

import zmq.auth

from disagg.base.config import CurveKeys
from disagg.base.errors import ConfigurationError
from disagg.serve.router.doorkeeper import CurveGuard

_SERVER: Final = "server"
_INSTANCE: Final = "instance"


def default_folder() -> Path:
    """Return where the keys are unless told otherwise."""
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config).expanduser() / "disagg" / "keys"


def make_keys(folder: Path) -> bool:
    """Make what is missing, readable for this user alone; return whether that was anything.

    Raises ConfigurationError where nothing can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        missing = [name for name in (_SERVER, _INSTANCE) if not (folder / f"{name}.key_secret").exists()]
        mask = os.umask(0o077)
        try:
            for name in missing:
                zmq.auth.create_certificates(folder, name)
        finally:
            os.umask(mask)
    except OSError as error:
        raise ConfigurationError(f"--keys {folder}: keys cannot be made there: {error}") from error
    return bool(missing)


def server_guard(folder: Path) -> CurveGuard:
    """Return who is let in by the server with these keys. Raises ConfigurationError when they are not there."""
    _, secret = _load(folder / f"{_SERVER}.key_secret")
    public, _ = _load(folder / f"{_INSTANCE}.key")
    return CurveGuard(_needed(secret, folder / f"{_SERVER}.key_secret"), frozenset({public}))


def instance_keys(folder: Path) -> CurveKeys:
    """Return with what a joining instance shows itself. Raises ConfigurationError when that is not there."""
    server, _ = _load(folder / f"{_SERVER}.key")
    public, secret = _load(folder / f"{_INSTANCE}.key_secret")
    return CurveKeys(
        server_public=server.decode(),
        public=public.decode(),
        secret=_needed(secret, folder / f"{_INSTANCE}.key_secret").decode(),
    )


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"--keys: {path} is no key ({error}); `disagg keys` makes them on the server's host, and says what to copy"
        ) from error


def _needed(secret: bytes | None, path: Path) -> bytes:
    if secret is None:
        raise ConfigurationError(f"--keys: {path} has no secret key; copy it again from the server's host")
    return secret
