"""On how many threads simulated instances compute: as ``disagg serve`` would start them on the profile's cores."""

from dataclasses import replace

import pytest

from disagg.base.config import InstanceGroup, Placement
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.cli.simulate_platform import ChosenPlatform, lent_cores, with_threads
from disagg.costs.measured_steps import StepSample
from disagg.costs.profile import ParallelSamples, Profile
from disagg.costs.profiled_platform import ProfiledPlatform
from disagg.costs.topology import Topology

STEPS = tuple(StepSample(chunks=((0, number),), time_s=0.01 * number) for number in range(1, 20))


def chosen(num_cores: int | None = 3) -> ChosenPlatform:
    profile = Profile(
        model="m",
        device="d",
        dtype="bfloat16",
        kv_bytes_per_token=1000,
        steps=(ParallelSamples(tensor_parallel=1, num_threads=1, samples=STEPS),),
        link_bytes_per_s=1e9,
        num_cores=num_cores,
    )
    return ChosenPlatform(ProfiledPlatform(profile, 1 << 20), {}, "profiled", profile=profile)


def placement(*groups: tuple[Role, int, int | None]) -> Placement:
    return Placement(
        groups=tuple(InstanceGroup(role=role, count=n, num_threads=threads) for role, n, threads in groups)
    )


def test_instances_share_out_the_cores() -> None:
    pair = placement((Role.PREFILL, 1, None), (Role.DECODE, 1, None))
    assert with_threads(pair, chosen(2), None) == placement((Role.PREFILL, 1, 1), (Role.DECODE, 1, 1))
    assert with_threads(pair, chosen(3), None) == placement((Role.PREFILL, 1, 2), (Role.DECODE, 1, 1))
    lone = placement((Role.COLOCATED, 1, None))
    assert with_threads(lone, chosen(3), None) == placement((Role.COLOCATED, 1, 3))
    two = placement((Role.COLOCATED, 2, None))
    assert with_threads(two, chosen(3), None) == placement((Role.COLOCATED, 1, 2), (Role.COLOCATED, 1, 1))


def test_what_a_placement_or_a_flag_says_counts() -> None:
    said = placement((Role.PREFILL, 1, None), (Role.DECODE, 1, 2))
    assert with_threads(said, chosen(3), None) == placement((Role.PREFILL, 1, 1), (Role.DECODE, 1, 2))
    assert with_threads(said, chosen(3), 4) == placement((Role.PREFILL, 1, 4), (Role.DECODE, 1, 4))


def test_where_nobody_knows_the_cores_nothing_is_said() -> None:
    pair = placement((Role.PREFILL, 1, None), (Role.DECODE, 1, None))
    assert with_threads(pair, chosen(None), None) == pair
    on_nodes = replace(chosen(2), topology=Topology.one_node())
    assert with_threads(pair, on_nodes, None) == pair


def test_cores_are_lent_where_serve_would_lend_them() -> None:
    pair = placement((Role.PREFILL, 1, None), (Role.DECODE, 1, None))
    assert lent_cores(pair, chosen(2), None, None) == 2
    assert lent_cores(pair, chosen(2), False, None) is None
    assert lent_cores(pair, chosen(2), None, 1) is None
    assert lent_cores(pair, chosen(2), True, 1) == 2
    assert lent_cores(pair, chosen(None), None, None) is None


@pytest.mark.parametrize("on", [chosen(None), replace(chosen(2), topology=Topology.one_node())])
def test_lending_is_for_the_cores_of_a_profiled_host(on: ChosenPlatform) -> None:
    pair = placement((Role.PREFILL, 1, None), (Role.DECODE, 1, None))
    with pytest.raises(ConfigurationError, match="only instances on the cores of one host lend them"):
        lent_cores(pair, on, True, None)
