"""From the flags of ``disagg plan`` to what is to be planned."""

from collections.abc import Mapping
from typing import Any, Final

from disagg.base.config import CacheSettings, RouterSettings, SchedulerSettings, SchedulingMode
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.cli.simulate_platform import ChosenPlatform, choose_cluster, choose_platform
from disagg.cli.workload_flags import choose_workload
from disagg.costs.topology import Topology
from disagg.measure.slo import SloTarget
from disagg.measure.windows import keep_rows
from disagg.placement.instance_choice import Batching
from disagg.placement.problem import CostUnit, PlanProblem
from disagg.simulator.engines import IMITATED, EngineRules, own_rules

_MANY: Final = 10**9
_PATIENT: Final = RouterSettings(max_queued_requests=_MANY, request_timeout_s=1e9)
_SEQUENCES: Final = 512
"""In a decode step of a GPU, at most: objectives and KV memory end batches before."""
_BATCHINGS: Final[Mapping[Role, tuple[Batching, ...]]] = {
    Role.PREFILL: (Batching(None, 2048, 64), Batching(None, 512, 64), Batching(None, 8192, 128)),
    Role.DECODE: (Batching(None, _SEQUENCES, _SEQUENCES),),
    Role.COLOCATED: (
        Batching(SchedulingMode.CHUNKED.value, 1024, _SEQUENCES),
        Batching(SchedulingMode.CHUNKED.value, 512, _SEQUENCES),
        Batching(SchedulingMode.CHUNKED.value, 2048, _SEQUENCES),
        Batching(SchedulingMode.PREFILL_FIRST.value, 8192, _SEQUENCES),
    ),
}
"""What a GPU's instances may be told, the usual first."""


def choose_problem(values: Mapping[str, Any], target: SloTarget, cache: CacheSettings) -> PlanProblem:
    """Return the problem. Raises ConfigurationError when flags are missing or contradict each other."""
    on = _platform(values, cache)
    topology = on.topology or Topology.one_node(on.platform.link, _num_devices(values))
    kinds = dict.fromkeys(node.device for node in topology.nodes)
    engine = values["engine"]
    return PlanProblem(
        topology=topology,
        platforms={kind: on.by_kind.get(kind, on.platform) for kind in kinds},
        rules=_rules(engine, cache),
        batchings=dict.fromkeys(Role, (Batching(),)) if engine in IMITATED else _BATCHINGS,
        workload=keep_rows(_workload(values)),
        target=target,
        target_rate=values["target_rate"],
        per=None if values["per"] is None else CostUnit(values["per"]),
        max_nodes=values["max_nodes"],
        min_requests=values["num_requests"] or PlanProblem.min_requests,
        num_seeds=values["seeds"],
    )


def _platform(values: Mapping[str, Any], cache: CacheSettings) -> ChosenPlatform:
    source = values["latency"], values["model"], values["engine"], cache.kv_memory_bytes
    if values["cluster"] is None:
        return choose_platform(*source)
    if values["num_devices"] is not None:
        raise ConfigurationError("--cluster says how many devices there are: leave out --devices")
    return choose_cluster(values["cluster"], *source)


def _num_devices(values: Mapping[str, Any]) -> int:
    if values["num_devices"] is None:
        raise ConfigurationError("which devices are there? Give --cluster FILE, or --devices N for one node of N")
    return int(values["num_devices"])


def _rules(engine: str, cache: CacheSettings) -> EngineRules:
    return IMITATED[engine] if engine in IMITATED else own_rules(SchedulerSettings(), cache, _PATIENT)


def _workload(values: Mapping[str, Any]) -> Any:
    if values["sessions"] is not None:
        raise ConfigurationError(
            "plans are made for requests that arrive by themselves: give --workload, not --sessions"
        )
    # The search sets the rate; the workload says the lengths, and how unevenly requests arrive.
    rate = values["rate"] or (None if values["scale"] else 1.0)
    return choose_workload({**values, "rate": rate, "num_requests": None})
