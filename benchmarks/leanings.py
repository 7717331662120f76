"""Roles as walls or as leanings: ``python benchmarks/leanings.py --profile profile.json``.

Simulates one prefill and one decode instance, with strict roles and without, beside two colocated instances, on the
machine of a profile: chat, code and summarise of the standard workloads, tight and loose objectives, ``--seeds`` runs
each. Cores are lent as ``disagg serve`` lends them, unless ``--no-lend-cores`` says otherwise. Rates are parts
(``--loads``) of what one prefill instance that does nothing else can do. Prints attainment (with the 95% interval of
its mean), latencies, and what came of the predictions.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from disagg.base.config import (
    CacheSettings,
    InstanceGroup,
    Placement,
    RouterSettings,
    SchedulerSettings,
    SchedulingMode,
)
from disagg.base.request import Role
from disagg.costs.latency import StepShape
from disagg.costs.profile import load_profile
from disagg.costs.profiled_platform import ProfiledPlatform
from disagg.measure.open_loop import OpenLoop
from disagg.measure.slo import Slo
from disagg.measure.standard import SloKind, slo_from_unloaded, standard_workload
from disagg.simulator.engines import build_cluster, own_rules
from disagg.simulator.evaluate import Evaluation, evaluate

MEDIAN_PROMPTS: Final = {"chat": 516, "code": 750, "summarise": 1389}
PAIR: Final = {Role.PREFILL: 1, Role.DECODE: 1}
SYSTEMS: Final[dict[str, tuple[dict[Role, int], SchedulingMode, bool]]] = {
    "1 + 1, strict roles": (PAIR, SchedulingMode.CHUNKED, True),
    "1 + 1, leanings": (PAIR, SchedulingMode.CHUNKED, False),
    "1 + 1, leanings, slack": (PAIR, SchedulingMode.SLACK, False),
    "2 colocated, chunked": ({Role.COLOCATED: 2}, SchedulingMode.CHUNKED, True),
    "2 colocated, by prediction, slack": ({Role.COLOCATED: 2}, SchedulingMode.SLACK, False),
}


class Case(msgspec.Struct, frozen=True):
    """One row."""

    workload: str
    load: float
    kind: SloKind
    slo: Slo
    system: str
    evaluation: Evaluation


def prefill_rate(platform: ProfiledPlatform, workload: OpenLoop) -> float:
    """Return the requests/s of a workload that one instance can prefill, whole prompts one after the other."""
    latency = platform.latency(1, 1)
    times_s = []
    for request in workload.draw(0):
        shape = StepShape()
        shape.add_prefill(0, request.prompt_len)
        times_s.append(sum(latency.stage_times_s(shape)))
    return 1 / fmean(times_s)


def objectives(platform: ProfiledPlatform, workload: str, kind: SloKind) -> Slo:
    """Return the objectives from the latencies of a lone request of median length, by the profile."""
    latency = platform.latency(1, 1)
    prompt, decode = StepShape(), StepShape(num_decodes=1, decode_context=MEDIAN_PROMPTS[workload], num_samples=1)
    prompt.add_prefill(0, MEDIAN_PROMPTS[workload])
    host = platform.host
    ttft_s = host.accept_s + host.message_s + sum(latency.stage_times_s(prompt)) + host.deliver_s
    return slo_from_unloaded(kind, ttft_s, sum(latency.stage_times_s(decode)))


def cases(platform: ProfiledPlatform, args: argparse.Namespace) -> Iterator[Case]:
    """Simulate one case after the other."""
    for name in args.workloads:
        workload = standard_workload(name, 1.0, args.requests, args.traces)
        rate = prefill_rate(platform, workload)
        for load, kind in product(args.loads, map(SloKind, args.objectives)):
            slo = objectives(platform, name, kind)
            for system, (roles, mode, strict_roles) in SYSTEMS.items():
                placement = Placement(groups=tuple(InstanceGroup(role=role, count=n) for role, n in roles.items()))
                rules = own_rules(
                    SchedulerSettings(scheduling=mode, objectives=slo.objectives()),
                    CacheSettings(),
                    RouterSettings(strict_roles=strict_roles),
                )
                lent_cores = None if args.no_lend_cores else platform.profile.num_cores
                spec = build_cluster(placement, platform, rules, lent_cores=lent_cores)
                evaluation = evaluate(spec, workload.at_rate(load * rate), slo, num_seeds=args.seeds)
                yield Case(name, load, kind, slo, system, evaluation)


def row(case: Case) -> tuple[str, ...]:
    """Return the cells of a case."""
    runs = case.evaluation.runs
    paths = [run.paths for run in runs if run.paths is not None]
    estimate = case.evaluation.attainment
    slo = f"{case.slo.ttft_s:.2f} s, {case.slo.tpot_s * 1e3:.1f} ms"
    return (
        f"{case.workload} at {case.load:g}, {case.kind.value} ({slo})",
        case.system,
        f"{estimate.mean:.0%} ± {estimate.half_width:.0%}",
        f"{fmean(run.ttft.p50 for run in runs) * 1e3:,.0f} / {fmean(run.ttft.p90 for run in runs) * 1e3:,.0f}",
        f"{fmean(run.tpot.p50 for run in runs) * 1e3:.1f} / {fmean(run.tpot.p90 for run in runs) * 1e3:.1f}",
        f"{fmean(run.itl.p99 for run in runs) * 1e3:.0f}",
        f"{fmean(one.leaning_share for one in paths):.0%}" if paths else "",
        f"{fmean(one.ttft_error for one in paths):.0%} / {fmean(one.tpot_error for one in paths):.0%}" if paths else "",
        f"{fmean(one.ttft_regret_s for one in paths) * 1e3:.0f}" if paths else "",
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--workloads", nargs="+", choices=list(MEDIAN_PROMPTS), default=list(MEDIAN_PROMPTS))
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--loads", nargs="+", type=float, default=[0.5, 0.9])
    parser.add_argument("--objectives", nargs="+", choices=[kind.value for kind in SloKind], default=["tight", "loose"])
    parser.add_argument("--no-lend-cores", action="store_true", help="instances keep their cores to themselves")
    parser.add_argument("--traces", type=Path, help="folder whose traces are replayed; without it lengths are drawn")
    args = parser.parse_args()
    platform = ProfiledPlatform(load_profile(args.profile), CacheSettings().kv_memory_bytes)
    table = Table(title=f"{platform.name}, {args.requests} requests, {args.seeds} seeds")
    for heading in (
        *("workload, objectives", "system", "attainment", "TTFT P50 / P90 ms", "TPOT P50 / P90 ms", "gap P99 ms"),
        *("leaning", "error of TTFT / TPOT", "regret ms"),
    ):
        table.add_column(heading)
    for case in cases(platform, args):
        table.add_row(*row(case))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
