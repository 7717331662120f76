"""Placements on clusters of several nodes: what a hand-over takes, and who disturbs whom."""

import pytest
from simulated import cluster_spec, instance, poisson, serve, stamps

from disagg.base.config import InstanceGroup, Placement
from disagg.base.errors import ConfigurationError
from disagg.base.ids import RequestId
from disagg.base.request import Role
from disagg.costs.contention import Activity, ServingCost
from disagg.costs.links import LinkKind, LinkModel
from disagg.costs.measured_steps import FittedInterference
from disagg.costs.published import PublishedPlatform
from disagg.costs.topology import DeviceRef, Network, Node, NodeLink, NodeName, Place, Topology
from disagg.measure.timeline import Stage
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.engines import DISTSERVE, build_cluster
from disagg.simulator.request import SimulatedRequest

NVLINK = LinkModel(300e9, 10e-6, kind=LinkKind.NVLINK)
GIGABIT = LinkModel(125e6, 100e-6, kind=LinkKind.TCP)
FREE = LinkModel()
INTERFERENCE = FittedInterference(dict.fromkeys(Activity, (0.003, 0.0, 0.0)))
SERVING = ServingCost(step_s=0.0006, token_s=0.0001, num_cores=2, request_s=0.004)


def nodes(*names: str, link: LinkModel = NVLINK) -> list[Node]:
    return [Node(name=NodeName(name), device="any", num_devices=4, link=link) for name in names]


def on(node: str, *indices: int) -> Place:
    return tuple(DeviceRef(NodeName(node), index) for index in indices)


def pair_on(prefill: Place, decode: Place, topology: Topology, **changes: object) -> ClusterSpec:
    instances = (
        instance(Role.PREFILL, place=prefill, num_devices=len(prefill)),
        instance(Role.DECODE, place=decode, num_devices=len(decode)),
    )
    return cluster_spec(*instances, topology=topology, **changes)


def hand_over_s(spec: ClusterSpec, num_requests: int = 1) -> list[float]:
    """Of prompts of 160 tokens, 10 blocks of 16,000 bytes: 160,000 bytes."""
    requests = [SimulatedRequest(RequestId(f"r{number}"), 0.0, 160, 3) for number in range(num_requests)]
    serve(spec, requests)
    return [request.timeline.stages()[Stage.HAND_OVER] for request in requests]


def test_the_same_placement_hands_over_as_fast_as_its_links() -> None:
    topology = Topology(nodes("a", "b"), Network(GIGABIT))
    assert hand_over_s(pair_on(on("a", 0), on("a", 1), topology)) == pytest.approx([160_000 / 300e9 + 10e-6])
    assert hand_over_s(pair_on(on("a", 0), on("b", 0), topology)) == pytest.approx([160_000 / 125e6 + 100e-6])


def test_several_devices_help_within_a_node_and_not_over_one_port() -> None:
    topology = Topology(nodes("a", "b"), Network(GIGABIT))
    assert hand_over_s(pair_on(on("a", 0, 1), on("a", 2, 3), topology)) == pytest.approx([80_000 / 300e9 + 10e-6])
    assert hand_over_s(pair_on(on("a", 0, 1), on("b", 2, 3), topology)) == pytest.approx([160_000 / 125e6 + 100e-6])
    ports = Topology(nodes("a", "b"), Network(GIGABIT, num_ports=2))
    assert hand_over_s(pair_on(on("a", 0, 1), on("b", 2, 3), ports)) == pytest.approx([80_000 / 125e6 + 100e-6])


def two_pairs(topology: Topology, *places: Place) -> ClusterSpec:
    roles = (Role.PREFILL, 0), (Role.PREFILL, 1), (Role.DECODE, 0), (Role.DECODE, 1)
    instances = [instance(*role, place=place) for role, place in zip(roles, places, strict=True)]
    return cluster_spec(*instances, topology=topology)


def test_pairs_share_the_port_of_a_node_and_no_link_inside() -> None:
    """Two prompts at once, each to its own decode instance: over one port, the second waits for the first."""
    slow_inside = Topology(nodes("a", "b", link=GIGABIT), Network(GIGABIT))
    alone_s = GIGABIT.transfer_time_s(160_000)
    together = two_pairs(slow_inside, on("a", 0), on("a", 1), on("a", 2), on("a", 3))
    assert hand_over_s(together, 2) == pytest.approx([alone_s] * 2)
    far = two_pairs(slow_inside, on("a", 0), on("a", 1), on("b", 0), on("b", 1))
    assert sorted(hand_over_s(far, 2)) == pytest.approx([alone_s, 2 * alone_s])


def test_prompts_are_handed_over_within_their_node() -> None:
    """Two pairs behind one router: between the nodes a prompt's blocks would travel for 128 ms."""
    slow = Network(LinkModel(1.25e6, kind=LinkKind.TCP))
    apart = two_pairs(Topology(nodes("a", "b"), slow), on("a", 0), on("b", 0), on("b", 1), on("a", 1))
    assert hand_over_s(apart, 2) == pytest.approx([160_000 / 300e9 + 10e-6] * 2)


def test_two_nodes_may_have_a_better_link_than_the_others() -> None:
    a, b, c = (NodeName(name) for name in "abc")
    fast = LinkModel(25e9, 5e-6, kind=LinkKind.RDMA)
    topology = Topology(nodes(a, b, c), Network(GIGABIT), [NodeLink((a, c), Network(fast))])
    assert hand_over_s(pair_on(on(a, 0), on(c, 0), topology)) == pytest.approx([fast.transfer_time_s(160_000)])
    assert hand_over_s(pair_on(on(b, 0), on(c, 0), topology)) == pytest.approx([GIGABIT.transfer_time_s(160_000)])


def test_instances_on_different_hosts_do_not_disturb_each_other() -> None:
    topology = Topology(nodes("a", "b", link=FREE), Network(FREE))

    def served(decode: Place, **changes: object) -> list[tuple[object, ...]]:
        return stamps(serve(pair_on(on("a", 0), decode, topology, **changes), poisson(40, 60, 1)))

    undisturbed = served(on("a", 1))
    assert served(on("b", 0)) == undisturbed
    assert served(on("b", 0), interference=INTERFERENCE) == undisturbed
    assert served(on("a", 1), interference=INTERFERENCE) != undisturbed


def test_serving_takes_time_of_the_host_of_the_router_alone() -> None:
    topology = Topology(nodes("a", "b", "c", link=FREE), Network(FREE))

    def served(*places: Place, **changes: object) -> list[tuple[object, ...]]:
        return stamps(serve(pair_on(*places, topology, **changes), poisson(40, 60, 1)))

    undisturbed = served(on("b", 0), on("b", 1))
    assert served(on("b", 0), on("b", 1), serving=SERVING) == undisturbed
    assert served(on("a", 0), on("a", 1), serving=SERVING) != undisturbed


def test_a_deployment_fills_the_nodes_in_order() -> None:
    topology = Topology(nodes("a", "b"), Network(GIGABIT))
    groups = (
        InstanceGroup(role=Role.PREFILL, count=1, tensor_parallel=2),
        InstanceGroup(role=Role.DECODE, count=2, tensor_parallel=2),
    )
    platform = PublishedPlatform("distserve", "facebook/opt-13b")
    spec = build_cluster(Placement(groups=groups), platform, DISTSERVE, topology)
    assert [one.place for one in spec.instances] == [on("a", 0, 1), on("a", 2, 3), on("b", 0, 1)]


def test_places_are_checked() -> None:
    topology = Topology(nodes("a", "b"), Network(GIGABIT))
    with pytest.raises(ConfigurationError, match="two instances are on device a:0"):
        serve(pair_on(on("a", 0), on("a", 0), topology), [])
    with pytest.raises(ConfigurationError, match="prefill-0 has no place, others have"):
        serve(cluster_spec(instance(Role.PREFILL), instance(Role.DECODE, place=on("a", 0)), topology=topology), [])
    with pytest.raises(ConfigurationError, match=r"prefill-0 has 1 device.* and a place of 2"):
        instance(Role.PREFILL, place=on("a", 0, 1))
