"""Where a server is to which instances of other hosts connect: a name, looked up anew at each attempt."""

import asyncio
import socket
from dataclasses import dataclass

from disagg.base.errors import ConfigurationError, UnavailableError


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """What a name stands for at the moment."""

    endpoint: str
    """ZeroMQ's words for the server's address."""
    kv_host: str
    """This host's own address, at which others read its KV blocks."""


@dataclass(frozen=True, slots=True)
class ServerName:
    """A server by name or by number; ``kv_host`` where this host's own address is not the one towards the server."""

    host: str
    port: int
    kv_host: str | None = None

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def look_up(self) -> ServerAddress:
        """Ask the resolver. Raises UnavailableError when the name is unknown, or there is no way to it."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_DGRAM)
            family, kind, protocol, _, address = min(found, key=lambda one: one[0] is not socket.AF_INET)
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing
                towards = str(probe.getsockname()[0])
        except OSError as error:
            raise UnavailableError(f"{self.host} cannot be found: {error.strerror}") from error
        return ServerAddress(zmq_endpoint(str(address[0]), self.port), self.kv_host or towards)


def parse_host_port(value: str, flag: str) -> tuple[str, int]:
    """Return the parts of HOST:PORT or [HOST]:PORT. Raises ConfigurationError on anything else."""
    host, colon, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ConfigurationError(f"{flag} {value!r} is no HOST:PORT, such as 10.0.0.1:7000")
    return host, int(port)


def zmq_endpoint(host: str, port: int) -> str:
    """Return ZeroMQ's words for a TCP address."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
