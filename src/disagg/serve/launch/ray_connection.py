"""The connection to a Ray cluster: from ``--cluster`` to a driver, and what nodes there are.

Ray is optional (``disagg[ray]``): this module is imported where ``--cluster`` asks for it, before others that need Ray.
"""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from disagg.base.errors import ConfigurationError, UnavailableError

try:
    import ray
except ImportError as missing:
    raise ConfigurationError(f"--cluster ray needs Ray ({missing}): pip install 'disagg[ray]'") from missing

_HERE: Final = "auto"
_PORT: Final = 6379
"""Of the head's control store, unless it was started with another one."""

_REACHED_S: Final = 5.0
_KIND: Final = "accelerator_type:"
"""What the resource that says a node's kind of GPU begins with."""


@dataclass(frozen=True)
class RayNode:
    """A node that is alive. ``accelerator`` is Ray's name of its GPUs' kind, an empty string where it has none."""

    name: str
    node_id: str
    num_cpus: int
    num_gpus: int
    accelerator: str


def address_of(cluster: str) -> str:
    """Return what Ray calls the cluster of ``--cluster``. Raises ConfigurationError for what names none."""
    if cluster in ("ray", f"ray:{_HERE}"):
        return _HERE
    scheme, _, head = cluster.partition("://")
    host, colon, port = head.rpartition(":")
    if scheme == "ray" and head and not colon:
        return f"{head}:{_PORT}"
    if scheme == "ray" and host and port.isdecimal():
        return head
    raise ConfigurationError(
        f"--cluster {cluster!r} is no Ray cluster: write ray for the one that this host belongs to, or ray://HEAD for "
        f"the one of that head node (ray://HEAD:PORT where its port is not {_PORT})"
    )


@contextmanager
def connected(cluster: str) -> Iterator[None]:
    """Be a driver of the cluster for the length of a block. Raises UnavailableError when it is not there."""
    address = address_of(cluster)
    try:
        if address != _HERE:
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), _REACHED_S).close()  # Ray itself would wait a minute
        ray.init(address=address, namespace="disagg", log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        why = str(error).partition(". ")[0]
        raise UnavailableError(
            f"--cluster {cluster}: Ray is not reached ({why}); start it with `ray start --head`, and "
            f"on this host, if that is another one, with `ray start --address=HEAD:{_PORT}`"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def nodes() -> tuple[RayNode, ...]:
    """Return the nodes of the cluster that is connected."""
    return tuple(_node(one) for one in ray.nodes() if one["Alive"])


def own_address() -> str:
    """Return the address at which the cluster reaches this host."""
    return str(ray.util.get_node_ip_address())


def _node(said: dict[str, Any]) -> RayNode:
    resources, labels = said["Resources"], said.get("Labels", {})
    kinds = [name.removeprefix(_KIND) for name in resources if name.startswith(_KIND)]
    return RayNode(
        name=str(said["NodeName"]),
        node_id=str(said["NodeID"]),
        num_cpus=int(resources.get("CPU", 0)),
        num_gpus=int(resources.get("GPU", 0)),
        accelerator=str(labels.get("ray.io/accelerator-type") or next(iter(kinds), "")),
    )
