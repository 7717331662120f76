"""Ray's nodes as a cluster to plan for."""

import pytest

from disagg.base.errors import ConfigurationError
from disagg.cli.cluster_source import ASSUMED_NETWORK, cluster_of
from disagg.costs.cluster_file import PROFILED

pytest.importorskip("ray", reason="Ray is not installed (pip install 'disagg[ray]')")

from disagg.serve.launch.ray_connection import RayNode


def node(name: str, num_cpus: int = 8, num_gpus: int = 0, accelerator: str = "", node_id: str = "0" * 56) -> RayNode:
    return RayNode(name, node_id, num_cpus, num_gpus, accelerator)


def test_nodes_with_gpus_are_the_cluster_where_there_are_any() -> None:
    found = cluster_of([node("head"), node("gpu-0", num_gpus=8, accelerator="H100"), node("gpu-1", 8, 4, "L40S")], 1)
    assert [(one.name, one.device, one.devices) for one in found.nodes] == [
        ("gpu-0", "h100-sxm", 8),
        ("gpu-1", "l40s", 4),
    ]
    assert found.network == ASSUMED_NETWORK


def test_without_gpus_cores_are_shared_out_as_the_profile_used_them() -> None:
    found = cluster_of([node("head", num_cpus=1), node("a", num_cpus=8), node("b", num_cpus=5)], 2)
    assert [(one.name, one.device, one.devices) for one in found.nodes] == [("a", PROFILED, 4), ("b", PROFILED, 2)]


def test_nodes_of_one_host_are_told_apart() -> None:
    found = cluster_of([node("10.0.0.1", node_id="ab" * 28), node("10.0.0.1", node_id="cd" * 28)], 1)
    assert [one.name for one in found.nodes] == ["10.0.0.1-abababab", "10.0.0.1-cdcdcdcd"]


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([node("old", num_gpus=2, accelerator="K80")], "GPUs of kind 'K80', of which there is no data sheet"),
        ([node("new", num_gpus=2)], "GPUs of kind 'unknown'"),
        ([node("head", num_cpus=0)], "no GPU, and none has 1 CPU"),
    ],
)
def test_what_cannot_be_planned_for_is_told(nodes: list[RayNode], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        cluster_of(nodes, 1)
