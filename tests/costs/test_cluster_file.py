"""Cluster files: units, defaults, and what is wrong with the bad ones."""

from typing import Any

import msgspec
import pytest

from disagg.base.errors import ConfigurationError
from disagg.costs.cluster_file import ClusterFile
from disagg.costs.devices import DEVICES
from disagg.costs.links import LinkKind, LinkModel
from disagg.costs.topology import NodeName

TCP = {"kind": "tcp", "bandwidth": "1 Gbit/s", "latency": "100 us"}


def cluster(**changes: Any) -> ClusterFile:
    nodes = [{"name": "gpu", "count": 2, "device": "a100-sxm", "devices": 8}]
    return msgspec.convert({"nodes": nodes, "network": TCP, **changes}, ClusterFile)


def test_nodes_take_what_they_leave_out_from_the_data_sheet() -> None:
    first, second = cluster(devices={"a100-sxm": {"price_per_hour": 2.5}}).topology().nodes
    assert (first.name, second.name) == ("gpu-0", "gpu-1")
    assert first.link == DEVICES["a100-sxm"].peer
    assert (first.num_devices, first.price_per_hour, first.watts) == (8, 2.5, 400)


def test_what_the_file_says_comes_before_step_times_and_those_before_the_data_sheet() -> None:
    measured = LinkModel(1e9)
    assert cluster().topology(measured).nodes[0].link == measured
    link = {"kind": "pcie", "bandwidth": 32e9}
    nodes = [{"name": "one", "device": "l40s", "devices": 2, "link": link, "host_link": {**link, "kind": "shm"}}]
    (node,) = cluster(nodes=nodes).topology(measured).nodes
    assert (node.name, node.link.kind, node.link.bytes_per_s, node.host_link.bytes_per_s) == (
        "one",
        LinkKind.PCIE,
        32e9,
        32e9,
    )
    watts = cluster(devices={"a100-sxm": {"watts": 300}}).topology().nodes[0].watts
    assert watts == 300


def test_two_nodes_may_have_a_link_of_their_own() -> None:
    fast = {"between": ["gpu-0", "gpu-1"], "kind": "rdma", "bandwidth": "200 Gbit/s", "ports": 8}
    topology = cluster(links=[fast]).topology()
    assert topology.link_between(NodeName("gpu-0"), NodeName("gpu-1")) == LinkModel(25e9, kind=LinkKind.RDMA)


@pytest.mark.parametrize(
    ("bandwidth", "expected"),
    [
        (125_000_000, 125e6),
        (3e11, 3e11),
        ("300e9", 3e11),
        ("1Gbit/s", 125e6),
        ("25 Gbps", 3.125e9),
        ("1.5 TB/s", 1.5e12),
        ("10 MB/s", 1e7),
    ],
)
def test_bandwidths_have_units(bandwidth: float | str, expected: float) -> None:
    topology = cluster(network={"kind": "tcp", "bandwidth": bandwidth}).topology()
    assert topology.link_between(NodeName("gpu-0"), NodeName("gpu-1")).bytes_per_s == pytest.approx(expected)


@pytest.mark.parametrize(("latency", "expected"), [(0.001, 0.001), ("10us", 1e-5), ("0.5 ms", 5e-4), ("2 s", 2.0)])
def test_times_have_units(latency: float | str, expected: float) -> None:
    topology = cluster(network={**TCP, "latency": latency, "overhead": latency}).topology()
    link = topology.link_between(NodeName("gpu-0"), NodeName("gpu-1"))
    assert (link.latency_s, link.overhead_s) == pytest.approx((expected, expected))


def nodes(**changes: Any) -> dict[str, Any]:
    return {"nodes": [{"name": "gpu", "device": "a100-sxm", "devices": 8, **changes}]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network": {**TCP, "bandwidth": "1 Gbits"}}, "bandwidth of '1 Gbits' is none: .* Gbit/s"),
        ({"network": {**TCP, "bandwidth": "fast"}}, "bandwidth of 'fast'"),
        ({"network": {**TCP, "bandwidth": 0}}, "0.0 bytes/s moves nothing"),
        ({"network": {**TCP, "latency": "10 GB/s"}}, "latency of '10 GB/s' is none: .*units are s, ms"),
        ({"network": {**TCP, "latency": -1}}, "latency of -1.0 s cannot be"),
        ({"network": None}, "nothing joins the nodes gpu-0 and gpu-1"),
        ({"devices": {"h100-sxm": {}}}, "no device 'h100-sxm', only a100-sxm"),
        (nodes(device="abacus"), "node gpu: no data sheet of a device 'abacus'; there are a100-sxm.* and profiled"),
        ({"links": [{**TCP, "between": ["gpu-0", "gpu-7"]}]}, "no node 'gpu-7', only gpu-0, gpu-1"),
    ],
)
def test_what_cannot_be_is_refused_with_its_value(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        cluster(**changes)


def test_profiled_devices_take_the_link_of_the_profile() -> None:
    profiled = cluster(**nodes(device="profiled"))
    assert profiled.topology(LinkModel(5e9)).nodes[0].link.bytes_per_s == 5e9
    with pytest.raises(ConfigurationError, match="node gpu: profiled devices have no data sheet: give their link"):
        profiled.topology()
