"""Instances put together: how many of which make a unit, and how many units the cluster has room for."""

import enum
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from disagg.base.request import Role
from disagg.costs.links import KvCodec
from disagg.placement.instance_choice import InstanceChoice
from disagg.placement.networks import Networks, NodeNetwork
from disagg.placement.problem import CostUnit, PlanProblem

Goodputs = Callable[[InstanceChoice], float]
"""Known or estimated requests/s of one instance in its phase."""


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
    """Requests/s whose KV the network could carry in time for all units."""
    codec: KvCodec = KvCodec.RAW
    """In which form it carries KV."""
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
    return score_of(problem, composition.cost(problem, problem.compared_by()), rate)


def score_of(problem: PlanProblem, cost: float, rate: float) -> tuple[float, ...]:
    """Return how good it is to serve ``rate`` at a cost."""
    if problem.target_rate is not None:
        reached = min(1.0, rate / problem.target_rate)
        return (reached, -cost, rate) if reached >= 1.0 else (reached, rate, -cost)
    if problem.per is not None:
        return (rate / cost, rate)
    return (rate, -cost)


def compose(problem: PlanProblem, choices: Iterable[InstanceChoice], goodputs: Goodputs) -> Iterator[Composition]:
    """Yield the best composition of every pair of a prefill and a decode choice, and of every colocated choice."""
    networks = Networks(problem)
    by_role: dict[Role, list[InstanceChoice]] = {role: [] for role in Role}
    for choice in choices:
        by_role[choice.role].append(choice)
    for choice in by_role[Role.COLOCATED]:
        composition = _colocated(problem, choice, goodputs(choice))
        if composition is not None:
            yield composition
    for prefill in by_role[Role.PREFILL]:
        for decode in by_role[Role.DECODE]:
            yield from _pairs(problem, prefill, decode, goodputs, networks)


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
    problem: PlanProblem, prefill: InstanceChoice, decode: InstanceChoice, goodputs: Goodputs, networks: Networks
) -> Iterator[Composition]:
    pair = _Pair(problem, prefill, decode, goodputs(prefill), goodputs(decode))
    found = [pair.anywhere(networks.between(prefill.kind, decode.kind))]
    if prefill.kind == decode.kind and len(problem.nodes(prefill.kind)) > 1:
        found.append(pair.segments())
    yield from (one for one in found if one is not None)


class _Pair:
    """A prefill and a decode choice, and how many of each are best. Counts are compared as numbers: there are many."""

    def __init__(
        self,
        problem: PlanProblem,
        prefill: InstanceChoice,
        decode: InstanceChoice,
        prefill_rate: float,
        decode_rate: float,
    ) -> None:
        self._problem = problem
        self._prefill, self._decode = prefill, decode
        self._rates = prefill_rate, decode_rate
        self._costs = tuple(problem.cost(choice, problem.compared_by()) for choice in (prefill, decode))

    def anywhere(self, networks: Sequence[NodeNetwork]) -> Composition | None:
        """Return the best on any devices: for each number of prefill instances the decodes that keep up with them.

        KV travels in the first form that serves as much as any.
        """
        problem, prefill, decode = self._problem, self._prefill, self._decode
        most_decode = room(problem, decode)
        free = sum(node.num_devices for node in problem.nodes(prefill.kind))
        shared = prefill.kind == decode.kind
        best: tuple[tuple[float, ...], int, int, int] = ((-math.inf,), 0, 0, 0)
        for num_prefill in _counts(problem, room(problem, prefill), self._rates[0]):
            left = (free - num_prefill * prefill.num_devices) // decode.num_devices if shared else most_decode
            for num_decode in self._decodes(num_prefill, left):
                for number, network in enumerate(networks):
                    reached = self._score(num_prefill, num_decode, 1, self._carried(network, num_prefill, num_decode))
                    best = max(best, (reached, -number, num_prefill, num_decode))
        _, number, num_prefill, num_decode = best
        if not num_prefill:
            return None
        # Equal parts serve among themselves: the smaller a unit, the shorter its hand-overs.
        units = math.gcd(num_prefill, num_decode)
        network = networks[-number]
        unit = ((prefill, num_prefill // units), (decode, num_decode // units))
        return Composition(
            Family.ANYWHERE,
            unit,
            units,
            hand_over_rate=self._carried(network, num_prefill, num_decode),
            codec=network.codec,
        )

    def segments(self) -> Composition | None:
        """Return the best whose pipelines are cut into as many parts as a unit has nodes, a part of each in a node."""
        problem, prefill, decode = self._problem, self._prefill, self._decode
        nodes = problem.nodes(prefill.kind)
        devices = min(node.num_devices for node in nodes)
        best: tuple[tuple[float, ...], int, int, int, int] = ((-math.inf,), 0, 0, 0, 0)
        for width in range(1, min(problem.max_nodes, len(nodes)) + 1):
            if prefill.pipeline_parallel % width or decode.pipeline_parallel % width:
                continue
            ours, theirs = prefill.num_devices // width, decode.num_devices // width
            for num_prefill in range(1, devices // ours + 1):
                for num_decode in self._decodes(num_prefill, (devices - num_prefill * ours) // theirs):
                    units = self._units(num_prefill, num_decode, len(nodes) // width)
                    reached = self._score(num_prefill, num_decode, units, math.inf)
                    # Of equals the narrower unit: its pipelines cross no network.
                    best = max(best, (reached, -width, num_prefill, num_decode, units))
        _, width, num_prefill, num_decode, units = best
        if not num_prefill:
            return None
        unit = ((prefill, num_prefill), (decode, num_decode))
        return Composition(Family.SEGMENTS, unit, units, nodes_per_unit=-width)

    def _carried(self, network: NodeNetwork, num_prefill: int, num_decode: int) -> float:
        counts = ((num_prefill, self._prefill), (num_decode, self._decode))
        return network.rate(*(count * _spanned(self._problem, choice) for count, choice in counts))

    def _decodes(self, num_prefill: int, most: int) -> set[int]:
        """Return the numbers of decode instances that keep up, or nearly, with so many prefill instances."""
        wanted = num_prefill * self._rates[0] / self._rates[1]
        return {count for count in (min(most, math.ceil(wanted)), min(most, math.floor(wanted))) if count > 0}

    def _units(self, num_prefill: int, num_decode: int, most: int) -> int:
        if self._problem.target_rate is None:
            return most
        rate = min(num_prefill * self._rates[0], num_decode * self._rates[1])
        return min(most, _needed(self._problem.target_rate, rate))

    def _score(self, num_prefill: int, num_decode: int, units: int, network: float) -> tuple[float, ...]:
        rate = min(num_prefill * self._rates[0], num_decode * self._rates[1]) * units
        cost = (num_prefill * self._costs[0] + num_decode * self._costs[1]) * units
        return score_of(self._problem, cost, min(rate, network))


def _spanned(problem: PlanProblem, choice: InstanceChoice) -> int:
    """Return how many nodes an instance is on, at least."""
    return -(-choice.num_devices // max(node.num_devices for node in problem.nodes(choice.kind)))


def _counts(problem: PlanProblem, most: int, goodput: float) -> Iterable[int]:
    """Return how many instances to try: enough for the target rate, or up to what the cluster holds."""
    if problem.target_rate is None:
        return range(1, most + 1)
    return range(1, min(most, _needed(problem.target_rate, goodput)) + 1)


def _needed(target_rate: float, goodput: float) -> int:
    return max(1, math.ceil(target_rate / goodput - 1e-9)) if goodput > 0 else 1
