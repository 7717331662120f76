"""Where a cluster is described: in a file, or by Ray, which knows its nodes but not what joins them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from disagg.base.errors import ConfigurationError
from disagg.cli.yaml_file import read_yaml
from disagg.costs.cluster_file import PROFILED, ClusterFile, NetworkEntry, NodeEntry
from disagg.costs.links import LinkKind
from disagg.costs.profile import load_profile

if TYPE_CHECKING:
    from disagg.serve.launch.ray_connection import RayNode

ASSUMED_NETWORK: Final = NetworkEntry(kind=LinkKind.TCP, bandwidth="10 Gbit/s", latency="50 us")
"""Between nodes, as Ray says nothing of that."""
_DATA_SHEETS: Final = {
    "A100": "a100-sxm",
    "A100-40G": "a100-sxm",
    "A100-80G": "a100-sxm",
    "H100": "h100-sxm",
    "H200": "h200-sxm",
    "L40S": "l40s",
}
"""By Ray's names of kinds of GPUs."""


def read_cluster(source: str, latency: str | None) -> ClusterFile:
    """Return the cluster of a file, or the one that Ray runs (``ray``, ``ray://HEAD``), whose cores ``latency`` is of.

    Raises ConfigurationError when there is none, or it cannot be planned for; UnavailableError when Ray is not there.
    """
    if source != "ray" and not source.startswith("ray:"):
        return read_yaml(Path(source), ClusterFile, "cluster")
    from disagg.serve.launch import ray_connection

    with ray_connection.connected(source):
        nodes = ray_connection.nodes()
    threads = load_profile(Path(latency)).threads if latency is not None and latency.endswith(".json") else ()
    found = cluster_of(nodes, threads[0] if threads else 1)
    words = ", ".join(f"{one.name} ({one.devices} x {one.device})" for one in found.nodes)
    click.echo(
        f"Ray's cluster: {words}; joined, as is assumed, by {ASSUMED_NETWORK.bandwidth} and {ASSUMED_NETWORK.latency}: "
        "a cluster file says otherwise",
        err=True,
    )
    return found


def cluster_of(nodes: Sequence["RayNode"], cores_per_device: int) -> ClusterFile:
    """Return Ray's nodes as a cluster: of their GPUs, or where no node has any, of so many cores each.

    Raises ConfigurationError for a kind of GPU without a data sheet, and where nothing computes.
    """
    with_gpus = [node for node in nodes if node.num_gpus]
    names = Counter(node.name for node in nodes)
    entries = [
        NodeEntry(
            name=node.name if names[node.name] == 1 else f"{node.name}-{node.node_id[:8]}",
            device=_kind(node),
            devices=node.num_gpus or node.num_cpus // cores_per_device,
        )
        for node in with_gpus or nodes
        if node.num_gpus or node.num_cpus >= cores_per_device
    ]
    if not entries:
        raise ConfigurationError(f"Ray's {len(nodes)} node(s) have no GPU, and none has {cores_per_device} CPU(s)")
    return ClusterFile(nodes=tuple(entries), network=ASSUMED_NETWORK)


def _kind(node: "RayNode") -> str:
    if not node.num_gpus:
        return PROFILED
    if node.accelerator not in _DATA_SHEETS:
        raise ConfigurationError(
            f"Ray's node {node.name} has GPUs of kind {node.accelerator or 'unknown'!r}, of which there is no data "
            f"sheet; there are {', '.join(_DATA_SHEETS)}: describe the cluster in a file"
        )
    return _DATA_SHEETS[node.accelerator]
