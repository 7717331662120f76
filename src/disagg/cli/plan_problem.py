"""From the flags of ``disagg plan`` to what is to be planned: a cluster, or the cores of a profiled host."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from disagg.base.config import CacheSettings, RouterSettings, SchedulerSettings, SchedulingMode
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.base.transfer_settings import KvTransferDtype
from disagg.cli.flags import flag_name
from disagg.cli.simulate_platform import ChosenPlatform, choose_cluster, choose_platform
from disagg.cli.workload_flags import choose_workload
from disagg.costs.links import KvCodec
from disagg.costs.profile import load_profile
from disagg.costs.profiled_platform import ProfiledPlatform
from disagg.costs.thread_scaling import estimate_words
from disagg.costs.topology import Topology
from disagg.measure.slo import SloTarget
from disagg.measure.windows import keep_rows
from disagg.placement.host_planner import HostProblem, platforms_on
from disagg.placement.instance_choice import BatchLimits
from disagg.placement.problem import CostUnit, PlanProblem
from disagg.simulator.engines import IMITATED, EngineRules, own_rules

OVERLAY: Final = "k8s"
"""Value of --as: our own instances on Kubernetes."""
_MANY: Final = 10**9
_PATIENT: Final = RouterSettings(max_queued_requests=_MANY, request_timeout_s=1e9)
_SEQUENCES: Final = 512
"""In a decode step of a GPU, at most: objectives and KV memory end batches before."""
_BATCHINGS: Final[Mapping[Role, tuple[BatchLimits, ...]]] = {
    Role.PREFILL: (BatchLimits(None, 2048, 64), BatchLimits(None, 512, 64), BatchLimits(None, 8192, 128)),
    Role.DECODE: (BatchLimits(None, _SEQUENCES, _SEQUENCES),),
    Role.COLOCATED: (
        BatchLimits(SchedulingMode.CHUNKED.value, 1024, _SEQUENCES),
        BatchLimits(SchedulingMode.CHUNKED.value, 512, _SEQUENCES),
        BatchLimits(SchedulingMode.CHUNKED.value, 2048, _SEQUENCES),
        BatchLimits(SchedulingMode.PREFILL_FIRST.value, 8192, _SEQUENCES),
    ),
}
"""What a GPU's instances may be told, the usual first."""


def choose_problem(values: Mapping[str, Any], target: SloTarget, cache: CacheSettings) -> PlanProblem:
    """Return the problem. Raises ConfigurationError when flags are missing or contradict each other."""
    if values["launch_as"] == OVERLAY:
        raise ConfigurationError(
            f"--as {OVERLAY} starts instances of disagg on CPU cores, so plan with a profile (disagg profile); for the "
            "devices of a cluster take --as k8s-vllm"
        )
    if values["lend_cores"] is not None:
        raise ConfigurationError(
            "--lend-cores and --no-lend-cores are for the cores of one host: plan with its profile, or leave them out"
        )
    on = _platform(values, cache)
    topology = on.topology or Topology.one_node(on.platform.link, _num_devices(values))
    kinds = dict.fromkeys(node.device for node in topology.nodes)
    engine = values["engine"]
    return PlanProblem(
        topology=topology,
        platforms={kind: on.by_kind.get(kind, on.platform) for kind in kinds},
        rules=_rules(engine, cache),
        batchings=dict.fromkeys(Role, (BatchLimits(),)) if engine in IMITATED else _BATCHINGS,
        workload=keep_rows(_workload(values)),
        target=target,
        target_rate=values["target_rate"],
        per=None if values["per"] is None else CostUnit(values["per"]),
        codecs=_codecs(values),
        max_nodes=values["max_nodes"],
        min_requests=values["num_requests"] or PlanProblem.min_requests,
        num_seeds=values["seeds"],
    )


def is_for_a_host(values: Mapping[str, Any]) -> bool:
    """Return whether step times are those of a profile, and so the plan one for the cores of its machine."""
    return values["cluster"] is None and (values["latency"] or "").endswith(".json")


def choose_host_problem(values: Mapping[str, Any], target: SloTarget, cache: CacheSettings) -> HostProblem:
    """Return the problem of the host that profiles are of. Raises ConfigurationError for flags that it has not."""
    for name in ("target_rate", "per", "model"):
        if values[name] is not None:
            raise ConfigurationError(
                f"a profile is of one model on one machine, and its plan for all of it: leave out {flag_name(name)}"
            )
    if values["beside"]:
        raise ConfigurationError("a profile's plan simulates every placement of its cores: leave out --beside")
    if values["launch_as"] not in (None, OVERLAY):
        raise ConfigurationError(f"a profile's plan is of disagg's own instances: take --as {OVERLAY}")
    profile = load_profile(Path(values["latency"]))
    platform = ProfiledPlatform(profile, cache.kv_memory_bytes)
    num_cores = values["num_devices"] or profile.num_cores or len(os.sched_getaffinity(0))
    platforms = platforms_on(platform, num_cores)
    estimates = (estimate_words(profile, num_threads) for num_threads in platforms)
    return HostProblem(
        platforms=platforms,
        num_cores=num_cores,
        most_tokens=platform.most_tokens,
        cache=cache,
        notes=tuple(words for words in estimates if words is not None),
        workload=keep_rows(_workload(values)),
        target=target,
        num_requests=values["num_requests"] or HostProblem.num_requests,
        num_seeds=values["seeds"],
        lends_cores=_lends_cores(values),
    )


def _lends_cores(values: Mapping[str, Any]) -> bool:
    """Return whether instances lend each other their cores: those in pods cannot, and others do unless told."""
    is_for_pods = values["launch_as"] == OVERLAY
    if is_for_pods and values["lend_cores"]:
        raise ConfigurationError(
            f"instances in pods of their own lend no cores: leave out --lend-cores or --as {OVERLAY}"
        )
    return not is_for_pods if values["lend_cores"] is None else bool(values["lend_cores"])


def _codecs(values: Mapping[str, Any]) -> tuple[KvCodec, ...]:
    """Return the forms in which KV may travel: those of vLLM, and of other engines, is as it is in the pool."""
    asked = values["kv_transfer_dtype"]
    is_ours = values["engine"] not in IMITATED and values["launch_as"] is None
    if asked == KvTransferDtype.AUTO.value:
        return (KvCodec.RAW, KvCodec.INT8) if is_ours else (KvCodec.RAW,)
    if asked == KvTransferDtype.INT8.value and not is_ours:
        raise ConfigurationError("only disagg sends KV blocks as int8: leave out --kv-transfer-dtype, --engine or --as")
    return (KvCodec(asked),)


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
