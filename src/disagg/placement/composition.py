"""Instances put together: how many of which make a unit, and how many units the cluster has room for."""

import enum
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from disagg.base.request import Role
from disagg.costs.topology import DeviceRef
from disagg.placement.instance_choice import InstanceChoice
from disagg.placement.problem import CostUnit, PlanProblem

Goodputs = Callable[[InstanceChoice], float]
"""Known or estimated requests/s of one instance in its phase."""
_PORT_SHARE: Final = 0.9
"""Of a network port's bandwidth that hand-overs may take before they queue for ever."""


class Family(enum.Enum):
    """How a placement is built."""

    ANYWHERE = "disaggregated, any device"
    """DistServe's Algorithm 1: each phase wherever there is room, KV over whatever joins the two."""
    SEGMENTS = "disaggregated, stages paired in nodes"
    """DistServe's Algorithm 2: equal parts of both pipelines share a node, and KV never leaves it."""
    COLOCATED = "colocated"
    MIXED = "disaggregated, and colocated on the devices left over"


@dataclass(frozen=True)
class Composition:
    """``num_units`` equal units, each of so many instances of each choice. ``nodes_per_unit`` 0: on any devices."""

    family: Family
    unit: tuple[tuple[InstanceChoice, int], ...]
    num_units: int
    nodes_per_unit: int = 0
    hand_over_rate: float = math.inf
    """Requests/s whose KV the network could carry for all units."""
    extra: tuple[tuple[InstanceChoice, int], ...] = ()
    """Colocated instances on devices that no unit takes."""

    @cached_property
    def choices(self) -> tuple[InstanceChoice, ...]:
        """All choices that are in it."""
        return tuple(choice for choice, _ in (*self.unit, *self.extra))

    def count(self, role: Role) -> int:
        """Return the number of instances of a role."""
        units = sum(count for choice, count in self.unit if choice.role is role) * self.num_units
        return units + sum(count for choice, count in self.extra if choice.role is role)

    @property
    def num_devices(self) -> int:
        """Devices of all instances."""
        unit = sum(choice.num_devices * count for choice, count in self.unit) * self.num_units
        return unit + sum(choice.num_devices * count for choice, count in self.extra)

    def cost(self, problem: PlanProblem, unit: CostUnit) -> float:
        """Return what all its devices cost."""
        of_units = sum(problem.cost(choice, unit) * count for choice, count in self.unit) * self.num_units
        return of_units + sum(problem.cost(choice, unit) * count for choice, count in self.extra)

    def rate(self, goodputs: Goodputs) -> float:
        """Return the requests/s of all its instances, as far as their phases alone decide."""
        phases = dict.fromkeys(Role, 0.0)
        for choice, count in self.unit:
            phases[choice.role] += goodputs(choice) * count * self.num_units
        pairs = min(phases[Role.PREFILL], phases[Role.DECODE], self.hand_over_rate)
        return pairs + phases[Role.COLOCATED] + sum(goodputs(choice) * count for choice, count in self.extra)

    def __str__(self) -> str:
        words = [f"{count * self.num_units} x {choice}" for choice, count in self.unit]
        words += [f"{count} x {choice}" for choice, count in self.extra]
        return " + ".join(words)


def score(problem: PlanProblem, composition: Composition, rate: float) -> tuple[float, ...]:
    """Return how good a composition is that serves ``rate``; the larger, the better."""
    cost = composition.cost(problem, problem.compared_by())
    if problem.target_rate is not None:
        reached = min(1.0, rate / problem.target_rate)
        return (reached, -cost, rate) if reached >= 1.0 else (reached, rate, -cost)
    if problem.per is not None:
        return (rate / cost, rate)
    return (rate, -cost)


def compose(problem: PlanProblem, choices: Iterable[InstanceChoice], goodputs: Goodputs) -> Iterator[Composition]:
    """Yield the best composition of every pair of a prefill and a decode choice, and of every colocated choice."""
    by_role: dict[Role, list[InstanceChoice]] = {role: [] for role in Role}
    for choice in choices:
        by_role[choice.role].append(choice)
    for choice in by_role[Role.COLOCATED]:
        composition = _colocated(problem, choice, goodputs(choice))
        if composition is not None:
            yield composition
    for prefill in by_role[Role.PREFILL]:
        for decode in by_role[Role.DECODE]:
            yield from _pairs(problem, prefill, decode, goodputs)


def room(problem: PlanProblem, choice: InstanceChoice) -> int:
    """Return how many instances of a choice an empty cluster holds."""
    stages = [node.num_devices // choice.tensor_parallel for node in problem.nodes(choice.kind)]
    return sum(stages) // choice.pipeline_parallel


def _colocated(problem: PlanProblem, choice: InstanceChoice, goodput: float) -> Composition | None:
    count = room(problem, choice)
    if problem.target_rate is not None:
        count = min(count, _needed(problem.target_rate, goodput))
    return Composition(Family.COLOCATED, ((choice, 1),), count) if count else None


def _pairs(
    problem: PlanProblem, prefill: InstanceChoice, decode: InstanceChoice, goodputs: Goodputs
) -> Iterator[Composition]:
    best = _best(problem, goodputs, _anywhere(problem, prefill, decode, goodputs))
    if best is not None:
        yield best
    if prefill.kind == decode.kind and len(problem.nodes(prefill.kind)) > 1:
        best = _best(problem, goodputs, _segments(problem, prefill, decode, goodputs))
        if best is not None:
            yield best


def _best(problem: PlanProblem, goodputs: Goodputs, compositions: Iterable[Composition]) -> Composition | None:
    return max(compositions, key=lambda one: score(problem, one, one.rate(goodputs)), default=None)


def _anywhere(
    problem: PlanProblem, prefill: InstanceChoice, decode: InstanceChoice, goodputs: Goodputs
) -> Iterator[Composition]:
    """Yield for each number of prefill instances the decode instances that keep up with them."""
    most_prefill, most_decode = room(problem, prefill), room(problem, decode)
    free = sum(node.num_devices for node in problem.nodes(prefill.kind))
    shared = prefill.kind == decode.kind
    network = hand_over_rate(problem, prefill, decode)
    for num_prefill in _counts(problem, most_prefill, goodputs(prefill)):
        left = (free - num_prefill * prefill.num_devices) // decode.num_devices if shared else most_decode
        wanted = num_prefill * goodputs(prefill) / goodputs(decode)
        for num_decode in {min(left, math.ceil(wanted)), min(left, max(1, math.floor(wanted)))}:
            if num_decode < 1:
                continue
            # Equal parts serve among themselves: the smaller a unit, the shorter its hand-overs.
            units = math.gcd(num_prefill, num_decode)
            unit = ((prefill, num_prefill // units), (decode, num_decode // units))
            yield Composition(Family.ANYWHERE, unit, units, hand_over_rate=network)


def _segments(
    problem: PlanProblem, prefill: InstanceChoice, decode: InstanceChoice, goodputs: Goodputs
) -> Iterator[Composition]:
    """Yield what fits on the nodes of a unit, when both pipelines are cut into as many parts as it has nodes."""
    nodes = problem.nodes(prefill.kind)
    devices = min(node.num_devices for node in nodes)
    for num_nodes in range(1, min(problem.max_nodes, len(nodes)) + 1):
        if prefill.pipeline_parallel % num_nodes or decode.pipeline_parallel % num_nodes:
            continue
        ours, theirs = prefill.num_devices // num_nodes, decode.num_devices // num_nodes
        for num_prefill in range(1, devices // ours + 1):
            left = (devices - num_prefill * ours) // theirs
            wanted = num_prefill * goodputs(prefill) / goodputs(decode)
            num_decode = min(left, math.ceil(wanted))
            if num_decode < 1:
                continue
            unit = ((prefill, num_prefill), (decode, num_decode))
            composition = Composition(Family.SEGMENTS, unit, len(nodes) // num_nodes, num_nodes)
            if problem.target_rate is not None:
                one = replace(composition, num_units=1).rate(goodputs)
                composition = replace(
                    composition, num_units=min(composition.num_units, _needed(problem.target_rate, one))
                )
            yield composition


def _counts(problem: PlanProblem, most: int, goodput: float) -> Iterable[int]:
    """Return how many instances to try: enough for the target rate, or up to what the cluster holds."""
    if problem.target_rate is None:
        return range(1, most + 1)
    return range(1, min(most, _needed(problem.target_rate, goodput)) + 1)


def _needed(target_rate: float, goodput: float) -> int:
    return max(1, math.ceil(target_rate / goodput - 1e-9)) if goodput > 0 else 1


def hand_over_rate(problem: PlanProblem, prefill: InstanceChoice, decode: InstanceChoice) -> float:
    """Return the requests/s whose KV the network carries between instances on any nodes; infinite within one."""
    sources, targets = problem.nodes(prefill.kind), problem.nodes(decode.kind)
    pairs = [(a, b) for a in sources for b in targets if a.name != b.name]
    if not pairs:
        return math.inf
    source, target = pairs[0]
    route = problem.topology.route((DeviceRef(source.name, 0),), (DeviceRef(target.name, 0),))
    ports = next((passage.ports for passage in route.passages if passage.ports is not None), None)
    if ports is None:
        return math.inf
    prompt_bytes = problem.platforms[prefill.kind].kv_bytes_per_token * problem.sample.mean_prompt
    crossing = len(pairs) / (len(sources) * len(targets))
    bytes_per_s = ports.link.bytes_per_s * ports.count * min(len(sources), len(targets))
    return _PORT_SHARE * bytes_per_s / (prompt_bytes * crossing)
