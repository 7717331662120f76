"""What a deployment does under a workload, over seeds, and its goodput: for commands, planners and tests."""

import math
from collections.abc import Callable
from statistics import fmean

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.measure.goodput_search import MAX_DOUBLINGS, bracket_goodput
from disagg.measure.open_loop import OpenLoop
from disagg.measure.sessions import SessionWorkload
from disagg.measure.slo import Slo, SloTarget
from disagg.measure.statistics import Estimate, Percentiles
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.event_log import EventLogFolder
from disagg.simulator.run_report import RunReport
from disagg.simulator.session_load import SimulatedSessions
from disagg.simulator.simulated_requests import simulated_requests
from disagg.simulator.simulation import simulate
from disagg.simulator.timeline_page import TimelineRecorder


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a deployment under a workload: one run for each seed. ``rate`` in requests/s, or sessions/s."""

    num_devices: int
    rate: float
    slo: Slo
    attainment: Estimate
    runs: tuple[RunReport, ...]

    def missed(self, target: SloTarget) -> tuple[str, ...]:
        """Return in words what of a target is not kept, by means over the runs; nothing where all is."""
        of_runs = [run.percentiles() for run in self.runs]
        means = {name: Percentiles.mean_of([one[name] for one in of_runs]) for name in of_runs[0]}
        return target.missed(fmean(run.attainment for run in self.runs), means)


def evaluate(
    spec: ClusterSpec,
    workload: OpenLoop | SessionWorkload,
    slo: Slo,
    *,
    num_seeds: int = 1,
    log: EventLogFolder | None = None,
    timeline: TimelineRecorder | None = None,
) -> Evaluation:
    """Run once for each seed; a workload that replays its own times is the same for all, so it runs once.

    ``spec`` is what ``engines.build_cluster`` makes of placement, platform and rules. ``log`` and ``timeline`` get the
    first run. Raises ConfigurationError when a request can never fit.
    """
    runs = [run_workload(spec, workload, slo, 0, log=log, timeline=timeline)]
    if workload.is_drawn:
        runs += [run_workload(spec, workload, slo, seed) for seed in range(1, num_seeds)]
    return Evaluation(
        num_devices=sum(instance.num_devices for instance in spec.instances),
        rate=workload.rate,
        slo=slo,
        attainment=Estimate.of([run.attainment for run in runs]),
        runs=tuple(runs),
    )


def run_workload(
    spec: ClusterSpec,
    workload: OpenLoop | SessionWorkload,
    slo: Slo,
    seed: int,
    *,
    log: EventLogFolder | None = None,
    timeline: TimelineRecorder | None = None,
    most_misses: float = math.inf,
) -> RunReport:
    """Serve the requests, or the sessions, that a seed draws. Raises TargetLostError as ``simulate`` does."""
    block_size = min(instance.block_size for instance in spec.instances)
    if isinstance(workload, OpenLoop):
        requests = simulated_requests(workload.draw(seed), workload.name, block_size, spec.router.classes)
        return simulate(spec, requests, slo, log=log, timeline=timeline, most_misses=most_misses)
    load = SimulatedSessions(workload.draw(seed), block_size)
    return simulate(
        spec,
        load.first_calls(),
        slo,
        log=log,
        timeline=timeline,
        next_call=load.next_call,
        most_misses=most_misses,
    )


def search_goodput(
    spec: ClusterSpec, workload: OpenLoop | SessionWorkload, target: SloTarget, *, num_seeds: int = 1
) -> float:
    """Return the highest rate of the workload, of all devices together, at which the target is kept.

    Raises what ``highest_rate`` raises.
    """

    def meets(rate: float) -> bool:
        found = evaluate(spec, workload.at_rate(rate), target.slo, num_seeds=num_seeds)
        return not found.missed(target)

    return highest_rate(meets, workload.rate if math.isfinite(workload.rate) else 1.0, str(target))


def highest_rate(meets: Callable[[float], bool], start_rate: float, target: str) -> float:
    """Return the highest rate that ``meets`` the target, to 2%: see ``bracket_goodput``; ``target`` is for words.

    Raises ConfigurationError when no rate is low or high enough: then the objectives, not the load, decide.
    """
    bracket = bracket_goodput(meets, start_rate)
    if not bracket.is_closed:
        side = "met at any rate" if bracket.met > 0 else "missed at any rate"
        raise ConfigurationError(
            f"{target} is {side} that was tried ({start_rate / 2**MAX_DOUBLINGS:.2g} to "
            f"{start_rate * 2**MAX_DOUBLINGS:.2g} requests/s): change the objectives or the placement"
        )
    return bracket.met
