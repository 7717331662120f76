"""Which instances of a placement a cluster keeps on one node."""

import pytest

from disagg.base.config import Device, InstanceGroup, Placement
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.serve.launch.deployment import HostSettings
from disagg.serve.launch.seats import Bench, Spread, benches

HOST = HostSettings()


def roles(bench: Bench) -> list[str]:
    return [one.group.role.value for one in bench.seats]


def test_instances_without_devices_sit_apart() -> None:
    placement = Placement(
        groups=(InstanceGroup(role=Role.PREFILL, count=2, num_threads=3), InstanceGroup(role=Role.DECODE, count=1))
    )
    (bench,) = benches(placement, HOST)
    assert (bench.spread, roles(bench)) == (Spread.APART, ["prefill", "prefill", "decode"])
    assert [one.bundle() for one in bench.seats] == [{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 1.0}]


def test_what_a_plan_puts_on_one_node_stays_on_one_node() -> None:
    placement = Placement(
        groups=(
            InstanceGroup(role=Role.PREFILL, count=2, devices=("a:0", "b:0")),
            InstanceGroup(role=Role.DECODE, count=3, devices=("a:1", "b:1", "c:0")),
        )
    )
    found = [(bench.spread, roles(bench)) for bench in benches(placement, HOST)]
    assert found == [
        (Spread.ONE_NODE, ["prefill", "decode"]),
        (Spread.ONE_NODE, ["prefill", "decode"]),
        (Spread.APART, ["decode"]),
    ]


def test_instances_that_hand_nothing_over_sit_apart_though_a_plan_put_them_on_one_node() -> None:
    placement = Placement(groups=(InstanceGroup(role=Role.COLOCATED, count=2, devices=("a:0-1",)),))
    (bench,) = benches(placement, HOST)
    assert (bench.spread, len(bench.seats)) == (Spread.APART, 2)


def test_threads_of_all_and_devices_are_asked_for() -> None:
    placement = Placement(groups=(InstanceGroup(role=Role.COLOCATED, count=1, num_threads=1),))
    (bench,) = benches(placement, HostSettings(threads=4, device=Device.CUDA))
    assert bench.seats[0].bundle() == {"CPU": 4.0, "GPU": 1.0}


def test_instances_of_several_devices_are_refused() -> None:
    placement = Placement(groups=(InstanceGroup(role=Role.COLOCATED, count=1, tensor_parallel=2),))
    with pytest.raises(ConfigurationError, match="tensor_parallel 2"):
        benches(placement, HOST)
