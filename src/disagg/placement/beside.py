"""A placement that somebody has or thinks of, as a composition: judged beside those that the search finds."""

import math

from disagg.base.config import InstanceGroup, Placement
from disagg.base.request import Role
from disagg.base.transfer_settings import KvTransferDtype
from disagg.costs.links import KvCodec
from disagg.costs.topology import read_devices
from disagg.placement.composition import Composition, Family
from disagg.placement.instance_choice import BatchLimits, InstanceChoice
from disagg.placement.problem import PlanProblem

Counts = tuple[tuple[InstanceChoice, int], ...]


def composition_of(problem: PlanProblem, placement: Placement) -> Composition:
    """Return a placement in as many equal units as it divides into. Devices that it names say their kind alone."""
    counts: dict[InstanceChoice, int] = {}
    for group in placement.groups:
        choice = _choice(problem, group)
        counts[choice] = counts.get(choice, 0) + group.count
    pairs = tuple((choice, count) for choice, count in counts.items() if choice.role is not Role.COLOCATED)
    alone = tuple((choice, count) for choice, count in counts.items() if choice.role is Role.COLOCATED)
    whole = pairs or alone
    num_units = math.gcd(*(count for _, count in whole))
    unit = tuple((choice, count // num_units) for choice, count in whole)
    extra = alone if pairs else ()
    codec = KvCodec.INT8 if placement.kv_transfer_dtype is KvTransferDtype.INT8 else KvCodec.RAW
    width = _nodes_per_unit(problem, unit) if pairs else 0
    family = Family.COLOCATED if not pairs else Family.SEGMENTS if width else Family.ANYWHERE
    return Composition(
        Family.MIXED if extra else family, unit, num_units, nodes_per_unit=width, codec=codec, extra=extra
    )


def _choice(problem: PlanProblem, group: InstanceGroup) -> InstanceChoice:
    node = problem.topology.nodes[0]
    if group.devices:
        node = problem.topology.node(read_devices(group.devices)[0].node)
    mode = None if group.scheduling is None else group.scheduling.value
    batching = BatchLimits(mode, group.max_batch_tokens, group.max_batch_size)
    return InstanceChoice(group.role, node.device, group.tensor_parallel, group.pipeline_parallel, batching)


def _nodes_per_unit(problem: PlanProblem, unit: Counts) -> int:
    """Return over how many nodes a unit has equal parts of all its pipelines in each; 0 where it has not."""
    kinds = {choice.kind for choice, _ in unit}
    nodes = problem.nodes(next(iter(kinds)))
    if len(kinds) > 1 or len(nodes) == 1:
        return 0
    devices = min(node.num_devices for node in nodes)
    for width in range(1, len(nodes) + 1):
        divides = all(choice.pipeline_parallel % width == 0 for choice, _ in unit)
        if divides and sum(choice.num_devices // width * count for choice, count in unit) <= devices:
            return width
    return 0
