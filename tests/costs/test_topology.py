"""Which link joins what, how KV travels between places, and which instance goes where."""

import pytest

from disagg.base.errors import ConfigurationError
from disagg.costs.links import LinkKind, LinkModel
from disagg.costs.topology import (
    DeviceRef,
    InstanceSize,
    Network,
    Node,
    NodeLink,
    NodeName,
    Place,
    Topology,
    first_fit,
)

NVLINK = LinkModel(300e9, 10e-6, kind=LinkKind.NVLINK)
PCIE = LinkModel(32e9, 10e-6, kind=LinkKind.PCIE)
SLOW = Network(LinkModel(125e6, 100e-6, kind=LinkKind.TCP))
RDMA = Network(LinkModel(25e9, 5e-6, kind=LinkKind.RDMA), num_ports=2)
A, B, C = NodeName("a"), NodeName("b"), NodeName("c")
MB = 10**6


def node(name: str, num_devices: int = 4, link: LinkModel = NVLINK) -> Node:
    return Node(name=NodeName(name), device="a100-sxm", num_devices=num_devices, link=link)


def topology(network: Network | None = SLOW, *links: NodeLink) -> Topology:
    return Topology([node("a"), node("b"), node("c", 2, PCIE)], network, links)


def place(*devices: str) -> Place:
    """Devices written as ``a0``."""
    return tuple(DeviceRef(NodeName(device[0]), int(device[1:])) for device in devices)


def test_every_pair_has_its_link() -> None:
    cluster = topology(SLOW, NodeLink((B, C), RDMA))
    (a0, a1, b0, c0, c1) = place("a0", "a1", "b0", "c0", "c1")
    assert cluster.link_between(a0, a1) == NVLINK
    assert cluster.link_between(c0, c1) == PCIE
    assert cluster.link_between(a0, b0) == cluster.link_between(B, a1) == SLOW.link
    assert cluster.link_between(b0, c1) == cluster.link_between(C, B) == RDMA.link
    assert cluster.link_between(A, A).kind is cluster.link_between(a0, A).kind is LinkKind.SHM
    assert cluster.link_between(a0, a0) == LinkModel()


@pytest.mark.parametrize(
    ("source", "target", "network", "expected_s"),
    [
        # Within a node, each device of the smaller side has a link for its part.
        (("a0",), ("a1",), SLOW, NVLINK.transfer_time_s(8 * MB)),
        (("a0", "a1"), ("a2", "a3"), SLOW, NVLINK.transfer_time_s(4 * MB)),
        (("a0", "a1", "a2"), ("a3",), SLOW, NVLINK.transfer_time_s(8 * MB)),
        # Over the network all parts share the ports of their nodes.
        (("a0", "a1"), ("b0", "b1"), SLOW, SLOW.link.transfer_time_s(8 * MB)),
        (("a0", "a1"), ("b0", "b1"), RDMA, RDMA.link.transfer_time_s(4 * MB)),
        (("a0", "a1", "a2", "a3"), ("b0", "b1", "b2", "b3"), RDMA, RDMA.link.transfer_time_s(4 * MB)),
        # One device uses one port, whatever its node has.
        (("a0",), ("b0",), RDMA, RDMA.link.transfer_time_s(8 * MB)),
        # The second half of the layers lives elsewhere: only that part travels far.
        (("a0", "a1"), ("a2", "b0"), SLOW, SLOW.link.transfer_time_s(4 * MB)),
        # Equal stages that share nodes send nothing over the network, whatever their tensor parallelism.
        (("a0", "a1", "b0", "b1"), ("a2", "b2"), SLOW, NVLINK.transfer_time_s(4 * MB)),
        # Two parts leave one node through one port, to two nodes.
        (("a0", "a1"), ("b0", "c0"), SLOW, SLOW.link.transfer_time_s(8 * MB)),
    ],
)
def test_kv_travels_over_the_links_between_two_places(
    source: tuple[str, ...], target: tuple[str, ...], network: Network, expected_s: float
) -> None:
    route = topology(network).route(place(*source), place(*target))
    assert route.transfer_time_s(8 * MB) == pytest.approx(expected_s)


def test_the_slowest_link_of_a_stage_is_what_its_all_reduces_take() -> None:
    links = topology().instance_links(place("a0", "a1", "c0", "c1", "b0", "b1"), tensor_parallel=2)
    assert links.tensor == PCIE
    assert links.stages == (SLOW.link, SLOW.link)
    inside = topology().instance_links(place("a0", "a1"), tensor_parallel=1)
    assert (inside.tensor, inside.stages) == (NVLINK, (NVLINK,))


def test_instances_go_to_the_first_node_with_room() -> None:
    sizes = [InstanceSize("p", 2), InstanceSize("q", 4), InstanceSize("d", 1), InstanceSize("e", 1, 2)]
    assert first_fit(topology(), sizes) == [
        place("a0", "a1"),
        place("b0", "b1", "b2", "b3"),
        place("a2"),
        place("c0", "c1"),
    ]


def test_a_pipeline_that_no_node_holds_goes_stage_by_stage() -> None:
    assert first_fit(topology(), [InstanceSize("p", 2, 4)]) == [
        place("a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3"),
    ]
    with pytest.raises(ConfigurationError, match=r"p needs 3 .* each of 3 stage.* 1 on a, 1 on b, 2 on c"):
        first_fit(topology(), [InstanceSize("p", 3, 3)])


@pytest.mark.parametrize(
    ("nodes", "network", "links", "words"),
    [
        ([], SLOW, (), "the cluster has no nodes"),
        ([node("a"), node("b"), node("a")], SLOW, (), "there are 2 nodes a"),
        ([node("a"), node("b")], None, (), "nothing joins the nodes a and b"),
        ([node("a"), node("b"), node("c")], None, (NodeLink((A, B), SLOW),), "nothing joins the nodes a and c"),
        ([node("a")], SLOW, (NodeLink((A, B), SLOW),), "has no node 'b', only a"),
        ([node("a")], SLOW, (NodeLink((A, A), SLOW),), "joins a with itself"),
        ([node("a"), node("b")], SLOW, (NodeLink((A, B), SLOW), NodeLink((B, A), RDMA)), "two links between b and a"),
    ],
)
def test_what_is_no_cluster_is_refused(
    nodes: list[Node], network: Network | None, links: tuple[NodeLink, ...], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Topology(nodes, network, links)


def test_what_joins_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="0 ports joins nothing"):
        Network(SLOW.link, 0)
    with pytest.raises(ConfigurationError, match="node a has 0 devices"):
        node("a", 0)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ((place("a0"), place("a4")), "no device a:4: a has 4"),
        ((place("d0"),), "has no node 'd', only a, b, c"),
        ((place("a0", "a1"), place("a1")), "two instances are on device a:1"),
    ],
)
def test_places_that_cannot_be_are_refused(places: tuple[Place, ...], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        topology().check_places(places)
