"""How fast a link is, and how fast the hardware under it: what a link doctor compares.

A link is read into memory of its own, not into the pool: no block is touched, and requests go on. The figures are those
of a link that nobody else uses at that moment.
"""

import ipaddress
import socket
import threading
from collections.abc import Callable
from statistics import median
from typing import Final

import numpy as np
import psutil

from disagg.base.clock import Clock
from disagg.base.messages import LinkFigure
from disagg.transfer.link import Link
from disagg.transfer.nixl_link import NixlLink
from disagg.transfer.tcp_link import TcpLink

_MOST_BYTES: Final = 32 << 20
_FEWEST_BYTES: Final = 1 << 20
_AIM_S: Final = 0.05
"""What one measurement takes, on links on which it is fewer than ``_MOST_BYTES``."""
_NUM_TIMES: Final = 5
_WORD_BYTES: Final = 8
_DEADLINE_S: Final = 10.0


def measure_link(link: Link, access: bytes, why: str, clock: Clock) -> LinkFigure:
    """Return the speed of an open link, beside its limit. It blocks; raises TransferError when the peer is gone."""
    memory = np.ones(_MOST_BYTES, np.uint8).data

    def read(num_bytes: int) -> float:
        return _times(lambda: link.probe(memory[:num_bytes], access), clock, 1)[0]

    read(_FEWEST_BYTES)  # connections are made, pages mapped
    num_bytes = int(min(_MOST_BYTES, max(_FEWEST_BYTES, _FEWEST_BYTES * _AIM_S / read(_FEWEST_BYTES))))
    latency_s = median(read(_WORD_BYTES) for _ in range(_NUM_TIMES))
    taken_s = median(read(num_bytes) for _ in range(_NUM_TIMES))
    # On a busy machine a small read may take as long as a large one, by chance: then half of that is no latency.
    transfer_s = max(taken_s - latency_s, taken_s / 2)
    limit, limit_bytes_per_s = _limit_of(link, memory[:num_bytes], clock)
    return LinkFigure(
        link=link.kind.value,
        why=why,
        bytes_per_s=num_bytes / transfer_s,
        latency_s=latency_s,
        limit_bytes_per_s=limit_bytes_per_s,
        limit=limit,
    )


def _limit_of(link: Link, memory: memoryview, clock: Clock) -> tuple[str, float]:
    """Return what the hardware under a link is, and its bytes per second; 0 where it cannot be found out."""
    if isinstance(link, NixlLink) and not (_is_loopback(link.host) or _interface_of(link.host)):
        return "unknown", 0.0
    if not isinstance(link, TcpLink):
        return "a copy in memory", len(memory) / median(_times(_plain_copy(memory), clock, _NUM_TIMES))
    here, there = link.way_here()
    if here == there or _is_loopback(there):
        return "a socket of this host", _loopback_bytes_per_s(memory, clock)
    name = _interface_of(here)
    speed = psutil.net_if_stats()[name].speed if name else 0
    return f"network interface {name}" if speed else "unknown", speed * 1e6 / 8


def _plain_copy(memory: memoryview) -> Callable[[], None]:
    source = np.ones(len(memory), np.uint8)
    return lambda: np.copyto(np.frombuffer(memory, np.uint8), source)


def _loopback_bytes_per_s(memory: memoryview, clock: Clock) -> float:
    """Return the speed of a plain socket between two threads, into memory of the same size."""
    data = memoryview(b"\1" * len(memory))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname(), _DEADLINE_S) as reader:
            sender, _ = listener.accept()
            with sender:

                def move() -> None:
                    thread = threading.Thread(target=sender.sendall, args=(data,))
                    thread.start()
                    rest = memory
                    while rest and (count := reader.recv_into(rest)):
                        rest = rest[count:]
                    thread.join()

                return len(memory) / median(_times(move, clock, _NUM_TIMES))


def _times(call: Callable[[], None], clock: Clock, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        started_s = clock.now()
        call()
        taken.append(max(clock.now() - started_s, 1e-9))
    return taken


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _interface_of(host: str) -> str:
    """Return the name of the network interface that has an address; empty where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == host for address in addresses):
            return name
    return ""
