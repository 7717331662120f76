"""Addresses of one server: the TCP port for clients and the private endpoint for its instances."""

import errno
import fcntl
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from disagg.base.config import ServeSettings
from disagg.base.errors import ConfigurationError
from disagg.serve.launch.descriptors import accept_backlog

_KEEP_ALIVE: Final = (
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 60),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 15),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 4),
)
"""Clients whose host has gone without a word are noticed after two minutes."""
_PREFIX: Final = "disagg-"
_LOCK: Final = "lock"
"""A file that the server holds locked for as long as it lives."""
_MAX_SOCKET_PATH_BYTES: Final = 107
"""``sun_path`` of unix(7) without its closing zero."""


def listen(settings: ServeSettings) -> socket.socket:
    """Return a listening socket; connections wait in its backlog until somebody accepts them.

    Raises ConfigurationError when the address is not there, not allowed or in use.
    """
    host, port = settings.host.removeprefix("[").removesuffix("]"), settings.port
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConfigurationError(f"--host {host!r} is not an address of this machine: {error.strerror}") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for option, value in _KEEP_ALIVE:  # connections inherit it
            bound.setsockopt(*option, value)
        bound.bind(address)
        bound.listen(accept_backlog())
    except OSError as error:
        bound.close()
        raise ConfigurationError(_explain(host, port, error)) from error
    bound.setblocking(False)
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the URL at which a client on this machine reaches a listening socket."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def private_endpoint() -> Iterator[str]:
    """Give a ZeroMQ endpoint that only this user can reach, in a folder that goes when the block ends.

    Folders of servers that were killed before they could remove theirs go too.
    """
    _remove_orphans(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        path = folder / "control"
        if len(bytes(path)) > _MAX_SOCKET_PATH_BYTES:
            raise ConfigurationError(
                f"the socket path {str(path)!r} is over {_MAX_SOCKET_PATH_BYTES} bytes; set TMPDIR to a shorter folder"
            )
        with (folder / "unlocked").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            Path(lock.name).rename(folder / _LOCK)
            yield f"ipc://{path}"


def _remove_orphans(parent: Path) -> None:
    """Remove the folders of ended servers: their locks can be had, which no process id could say across containers."""
    for lock_path in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), lock_path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock_path.parent)


def _explain(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use; stop what listens there, or choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} is not allowed for this user; choose one above 1023 with --port"
    return f"cannot listen on {host} port {port}: {error.strerror}"
