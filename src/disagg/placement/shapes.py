"""Every instance that the cluster's devices and the model allow, and why the others are none."""

from collections.abc import Iterator
from dataclasses import dataclass

from disagg.base.config import SchedulerSettings
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.costs.latency import LatencyModel
from disagg.costs.topology import DeviceRef, Place
from disagg.placement.instance_choice import InstanceChoice
from disagg.placement.problem import PlanProblem


@dataclass(frozen=True)
class BuiltChoice:
    """A choice with what its devices make of it: step times, the tokens that its KV pool holds, its scheduler."""

    choice: InstanceChoice
    latency: LatencyModel
    capacity: int
    scheduler: SchedulerSettings


@dataclass(frozen=True)
class Refusal:
    """A choice that cannot be, and why: for want of memory, or as the model cannot be divided so."""

    choice: InstanceChoice
    reason: str
    is_for_memory: bool


@dataclass(frozen=True)
class FoundShapes:
    """What can be built, and what cannot."""

    built: tuple[BuiltChoice, ...]
    refused: tuple[Refusal, ...]

    def why_none(self) -> str:
        """Return why nothing fits: of what is refused for memory, the one with the most devices says it best."""
        best = max(self.refused, key=lambda one: (one.is_for_memory, one.choice.num_devices))
        return best.reason


def find_shapes(problem: PlanProblem) -> FoundShapes:
    """Return all choices for the roles of the engine's rules, with the usual batching of each role.

    DistServe, Algorithm 1: tensor parallelism within a node, pipelines over as many nodes as an instance may have.
    """
    built: list[BuiltChoice] = []
    refused: list[Refusal] = []
    for choice in _choices(problem):
        try:
            latency_of(problem, choice)
        except ConfigurationError as error:
            refused.append(Refusal(choice, str(error), is_for_memory=False))
            continue
        try:
            built.append(build_choice(problem, choice))
        except ConfigurationError as error:
            refused.append(Refusal(choice, str(error), is_for_memory=True))
    return FoundShapes(tuple(built), tuple(refused))


def latency_of(problem: PlanProblem, choice: InstanceChoice) -> LatencyModel:
    """Return its step times; raise ConfigurationError where the model cannot be divided so, or nobody knows them."""
    links = problem.topology.instance_links(usual_place(problem, choice), choice.tensor_parallel)
    return problem.platforms[choice.kind].latency(choice.tensor_parallel, choice.pipeline_parallel, links)


def build_choice(problem: PlanProblem, choice: InstanceChoice) -> BuiltChoice:
    """Return the choice with its step times; raise ConfigurationError where the model does not fit on it."""
    latency = latency_of(problem, choice)
    platform = problem.platforms[choice.kind]
    window, token_bytes = platform.kv_window, platform.kv_bytes_per_token
    capacity = platform.capacity_tokens(choice.tensor_parallel, choice.pipeline_parallel)
    needed = max(problem.sample.prompts) if choice.role is Role.PREFILL else problem.sample.longest
    if capacity < needed - (0.0 if window is None else window.spared_bytes(needed) / token_bytes):
        raise ConfigurationError(
            f"{choice} on {choice.kind} holds {capacity} tokens of KV, and the workload has a request of {needed}: use "
            "more devices per instance, or --max-total-len"
        )
    if window is not None:  # as if nothing was in sight: no bound may be below what there is
        capacity = capacity * token_bytes // (token_bytes - window.bytes_per_token)
    return BuiltChoice(choice, latency, capacity, choice.group(1).scheduler(problem.rules.schedulers[choice.role]))


def usual_place(problem: PlanProblem, choice: InstanceChoice) -> Place:
    """Return devices for the first instance of a choice on an empty cluster: stages fill node after node."""
    place: Place = ()
    stages = choice.pipeline_parallel
    for node in problem.nodes(choice.kind):
        here = min(stages, node.num_devices // choice.tensor_parallel)
        place += tuple(DeviceRef(node.name, index) for index in range(here * choice.tensor_parallel))
        stages -= here
        if not stages:
            return place
    raise ConfigurationError(
        f"{choice} needs {choice.num_devices} devices of kind {choice.kind} with {choice.tensor_parallel} in each node"
    )


def _choices(problem: PlanProblem) -> Iterator[InstanceChoice]:
    for role in problem.rules.schedulers:
        batching = problem.batchings[role][0]
        for kind in dict.fromkeys(node.device for node in problem.topology.nodes):
            nodes = problem.nodes(kind)
            widest = max(node.num_devices for node in nodes)
            for tensor in range(1, widest + 1):
                stages = sum(node.num_devices // tensor for node in nodes[: problem.max_nodes])
                for pipeline in range(1, stages + 1):
                    yield InstanceChoice(role, kind, tensor, pipeline, batching)
