"""The planner on small clusters: what it chooses, and what it says when there is nothing to choose."""

from pathlib import Path

import msgspec
import pytest
from planning import EvenPlatform, nodes, problem, topology, workload

from disagg.base.config import InstanceGroup, Placement
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.cli.placement_file import read_placement, write_placement
from disagg.costs.published import PublishedPlatform
from disagg.costs.topology import Topology
from disagg.placement.beside import composition_of
from disagg.placement.composition import Composition, Family, compose
from disagg.placement.describe import describe
from disagg.placement.instance_choice import BatchLimits, InstanceChoice
from disagg.placement.judging import judge, serve_behind_one_router
from disagg.placement.layout import cluster_of, lay_out
from disagg.placement.mixing import fill_up
from disagg.placement.planner import Search, search
from disagg.placement.problem import CostUnit, PlanProblem
from disagg.placement.progress import PlanProgress
from disagg.placement.workers import Workers
from disagg.simulator.engines import DISTSERVE


def plan(one: PlanProblem) -> Search:
    return search(one, Workers(1), lambda progress: None)


@pytest.fixture(scope="module")
def three_devices() -> Search:
    """Any of one to three devices for each phase."""
    return plan(problem())


def test_the_best_comes_first(three_devices: Search) -> None:
    rates = [one.goodput.mean for one in three_devices.judged]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0


def test_every_family_is_judged(three_devices: Search) -> None:
    """One node: segments are the same as anywhere."""
    assert {one.composition.family for one in three_devices.judged} >= {Family.ANYWHERE, Family.COLOCATED}


def test_equal_problems_have_equal_plans_whoever_computes_them() -> None:
    one = problem(topology=topology(nodes(1, 2)), min_requests=20, max_requests=20)
    first = describe(plan(one))
    workers = Workers(2)
    try:
        second = describe(search(one, workers, lambda progress: None))
    finally:
        workers.close()
    assert msgspec.json.encode(first) == msgspec.json.encode(second)


def test_instances_have_devices_of_their_own(three_devices: Search) -> None:
    for judged in three_devices.judged:
        taken = [device for one in judged.placed for device in one.place]
        assert len(taken) == len(set(taken)) <= 3


def test_the_placement_file_is_what_was_simulated(three_devices: Search, tmp_path: Path) -> None:
    best = describe(three_devices).best
    write_placement(best.placement, tmp_path / "placement.yaml")
    assert read_placement(tmp_path / "placement.yaml") == best.placement
    names = [one.name for one in cluster_of(three_devices.problem, three_devices.judged[0].placed).instances]
    assert len(names) == sum(group.count for group in best.placement.groups)


def test_a_target_rate_takes_no_more_devices_than_it_needs() -> None:
    """One device prefills ten prompts/s: at three a second one of each phase, or one colocated, is enough."""
    found = plan(problem(target_rate=3.0)).judged[0]
    assert found.composition.num_devices <= 2
    assert found.goodput.mean >= 3.0


def test_a_slow_network_keeps_phases_together() -> None:
    """KV of 20 MB a prompt over 100 MB/s: five prompts/s leave a node; decode beside prefill sends none of it."""
    slow = problem(
        topology=topology(nodes(2, 2), bytes_per_s=1e8),
        platforms={"gpu": EvenPlatform(kv_bytes_per_token=20_000)},
        target="ttft=400ms,tpot=20ms",
    )
    families = [one.composition.family for one in plan(slow).judged]
    assert families.index(Family.SEGMENTS) < families.index(Family.ANYWHERE)


def test_each_unit_is_on_one_node_where_nodes_have_room() -> None:
    """Units of five devices on nodes of eight: the second does not begin in what the first leaves over."""
    one = problem(topology=topology(nodes(2, 8)))
    prefill, decode = InstanceChoice(Role.PREFILL, "gpu", 2), InstanceChoice(Role.DECODE, "gpu")
    for placed in lay_out(one, Composition(Family.ANYWHERE, ((prefill, 1), (decode, 3)), 2)):
        assert {device.node for device in placed.place} == {f"gpu-{placed.unit}"}


@pytest.mark.parametrize(("bytes_per_s", "agrees"), [(1e7, False), (1e12, True)])
def test_units_behind_one_router_hand_over_between_nodes(bytes_per_s: float, agrees: bool) -> None:
    """A pair in each of two nodes: apart, KV never leaves a node."""
    one = problem(
        topology=topology(nodes(2, 2), bytes_per_s=bytes_per_s),
        platforms={"gpu": EvenPlatform(kv_bytes_per_token=20_000)},
        target="ttft=400ms,tpot=40ms@80%",
    )
    pairs = composition_of(one, given((Role.PREFILL, 2, 1), (Role.DECODE, 2, 1)))
    (judged,) = judge(one, lambda choice: 4.0, lambda choice: 4.0, [pairs], Workers(1))
    behind = serve_behind_one_router(one, lambda choice: 4.0, judged)
    assert behind.asked == judged.goodput.mean > 0
    assert behind.is_as_predicted is agrees
    assert agrees or behind.served < 0.8 * behind.asked


def test_stages_of_a_pair_share_nodes() -> None:
    """A model that fills more than one device is cut in two: half of each phase's layers on either node."""
    big = problem(topology=topology(nodes(2, 2), bytes_per_s=1e7), platforms={"gpu": EvenPlatform(weights=1.2)})
    prefill, decode = (InstanceChoice(role, "gpu", 1, 2) for role in (Role.PREFILL, Role.DECODE))
    (one,) = [one for one in compose(big, [prefill, decode], lambda choice: 5.0) if one.family is Family.SEGMENTS]
    assert (one.nodes_per_unit, one.num_units) == (2, 1)
    for instance in lay_out(big, one):
        assert [device.node for device in instance.place] == ["gpu-0", "gpu-1"]


def test_dollars_decide_where_they_are_asked_for() -> None:
    """The second kind is as quick and costs half."""
    kinds = topology(nodes(1, 2, "dear", price_per_hour=4.0), nodes(1, 2, "cheap", price_per_hour=2.0))
    one = problem(
        topology=kinds,
        platforms={"dear": EvenPlatform(), "cheap": EvenPlatform()},
        per=CostUnit.DOLLAR,
    )
    best = plan(one).judged[0]
    assert {choice.kind for choice in best.composition.choices} == {"cheap"}


def test_costs_that_nobody_stated_are_asked_for() -> None:
    with pytest.raises(ConfigurationError, match="costs in watts is not known"):
        problem(per=CostUnit.WATT)


def given(*sizes: tuple[Role, int, int]) -> Placement:
    groups = [InstanceGroup(role=role, count=count, pipeline_parallel=stages) for role, count, stages in sizes]
    return Placement(groups=tuple(groups))


def test_a_placement_that_is_given_is_judged_like_those_that_are_found() -> None:
    one = problem()
    pair = composition_of(one, given((Role.PREFILL, 1, 1), (Role.DECODE, 2, 1)))
    found = search(one, Workers(1), lambda progress: None, beside=[pair])
    (its,) = [judged for judged in found.judged if judged.composition.unit == pair.unit]
    assert its.report is not None
    assert found.judged[0].goodput.mean >= its.goodput.mean > 0


def test_a_placement_that_is_given_is_taken_apart_into_units() -> None:
    one = problem(topology=topology(nodes(2, 4)), platforms={"gpu": EvenPlatform()})
    two = composition_of(one, given((Role.PREFILL, 2, 1), (Role.DECODE, 4, 1)))
    assert (two.num_units, two.nodes_per_unit, two.family) == (2, 1, Family.SEGMENTS)
    halves = composition_of(one, given((Role.PREFILL, 1, 4), (Role.DECODE, 1, 4)))
    assert (halves.num_units, halves.nodes_per_unit, halves.num_devices) == (1, 2, 8)
    mixed = composition_of(one, given((Role.PREFILL, 1, 1), (Role.DECODE, 1, 1), (Role.COLOCATED, 3, 1)))
    assert (mixed.family, mixed.count(Role.COLOCATED), mixed.num_units) == (Family.MIXED, 3, 1)
    alone = composition_of(one, given((Role.COLOCATED, 3, 1)))
    assert (alone.family, alone.num_units) == (Family.COLOCATED, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "target", "lengths", "prefill", "decode", "num_devices"),
    [
        ("opt-13b", "ttft=200ms,tpot=100ms@90%", (755, 200), (2, 1), (1, 1), 4),
        ("opt-66b", "ttft=2.5s,tpot=150ms@90%", (755, 200), (4, 1), (2, 2), 8),
        ("opt-66b", "ttft=125ms,tpot=200ms@90%", (171, 98), (4, 1), (2, 2), 8),
        ("opt-66b", "ttft=15s,tpot=150ms@90%", (1738, 91), (4, 1), (2, 2), 8),
    ],
)
def test_no_placement_of_distserve_is_better_than_what_is_found(
    model: str,
    target: str,
    lengths: tuple[int, int],
    prefill: tuple[int, int],
    decode: tuple[int, int],
    num_devices: int,
) -> None:
    """Its table 3, in one node. The given placement is judged and never looked at by the search itself."""
    platform = PublishedPlatform("distserve", f"facebook/{model}")
    one = problem(
        topology=Topology.one_node(platform.link, num_devices),
        platforms={kind.device: platform for kind in Topology.one_node(platform.link, num_devices).nodes},
        rules=DISTSERVE,
        batchings=dict.fromkeys(Role, (BatchLimits(),)),
        workload=workload(*lengths),
        target=target,
        per=CostUnit.DEVICE,
        min_requests=300,
        max_requests=1500,
    )
    sizes = ((Role.PREFILL, prefill), (Role.DECODE, decode))
    groups = [InstanceGroup(role=role, count=1, tensor_parallel=tp, pipeline_parallel=pp) for role, (tp, pp) in sizes]
    theirs = composition_of(one, Placement(groups=tuple(groups)))
    found = plan(one)
    (its,) = judge(one, found.phases.goodput, lambda choice: 1e9, [theirs], Workers(1))
    best = found.judged[0]
    ours = best.goodput.mean / best.composition.num_devices
    # A search closes in to 4%.
    assert ours >= 0.96 * its.goodput.mean / theirs.num_devices


def test_a_model_that_fits_nowhere_is_told_with_its_size() -> None:
    with pytest.raises(ConfigurationError, match=r"fits nowhere.*leave no room for KV on 3 device"):
        plan(problem(platforms={"gpu": EvenPlatform(weights=9)}))


def test_objectives_below_one_step_are_told_with_the_step() -> None:
    with pytest.raises(ConfigurationError, match=r"no instance keeps tpot=2ms@90%: a lone decode step takes"):
        plan(problem(target="tpot=2ms"))


def test_a_request_that_no_instance_holds_is_told_with_its_length() -> None:
    with pytest.raises(ConfigurationError, match="has a request of 1000"):
        plan(problem(workload=workload(prompt_len=100_000)))


def test_an_interruption_leaves_the_best_so_far() -> None:
    judged = 0

    def interrupt(progress: PlanProgress) -> None:
        nonlocal judged
        judged += "requests/s" in progress.best
        if judged == 2:
            raise KeyboardInterrupt

    found = search(problem(), Workers(1), interrupt)
    assert not found.is_complete
    assert len(found.judged) == 2
    assert "is_complete=False" in str(describe(found).effort)


def test_an_interruption_before_any_judgement_leaves_what_phases_promise() -> None:
    def interrupt(progress: PlanProgress) -> None:
        raise KeyboardInterrupt

    (only,) = search(problem(), Workers(1), interrupt).judged
    assert only.report is None
    assert only.goodput.mean > 0
    assert describe(search(problem(), Workers(1), interrupt)).best.attainment == 0.0


def test_colocated_wins_where_prompts_are_nothing() -> None:
    """Prompts of two tokens: a prefill instance would idle, and two instances decode twice as much as one."""
    found = plan(problem(workload=workload(prompt_len=2, output_len=40), topology=topology(nodes(1, 2))))
    assert found.judged[0].composition.family is Family.COLOCATED


def test_devices_that_pairs_leave_over_serve_colocated() -> None:
    """Three devices: a pair takes two of them."""
    one = problem()
    prefill, decode, colocated = (InstanceChoice(role, "gpu") for role in Role)
    pair = Composition(Family.ANYWHERE, ((prefill, 1), (decode, 1)), 1)
    mixed = fill_up(one, pair, [colocated], lambda choice: 5.0)
    assert mixed is not None
    assert (mixed.family, mixed.num_devices, mixed.count(Role.COLOCATED)) == (Family.MIXED, 3, 1)
    assert mixed.rate(lambda choice: 5.0) == 10.0


def test_kinds_share_the_phases_by_what_they_are_good_at() -> None:
    """One kind computes prompts ten times as fast, the other decodes so: together they beat either alone."""
    kinds = topology(nodes(1, 2, "fast"), nodes(1, 2, "wide"), bytes_per_s=1e10)
    platforms = {"fast": EvenPlatform(token_s=1e-5, step_s=40e-3), "wide": EvenPlatform(token_s=1e-4, step_s=4e-3)}
    best = plan(problem(topology=kinds, platforms=platforms, target="ttft=120ms,tpot=12ms")).judged[0]
    assert {choice.role: choice.kind for choice in best.composition.choices} == {
        Role.PREFILL: "fast",
        Role.DECODE: "wide",
    }
