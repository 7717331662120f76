"""One simulation from specification to report."""

import math
from collections.abc import Callable, Iterable

from msgspec import structs

from disagg.base.errors import ConfigurationError
from disagg.measure.slo import Slo
from disagg.scheduling.dispatch.actions import FailReason
from disagg.simulator.cluster import ClusterSpec, SimulatedCluster
from disagg.simulator.event_log import EventLogFolder
from disagg.simulator.recording import Recording
from disagg.simulator.request import SimulatedRequest
from disagg.simulator.run_report import Collector, KvUse, RunReport
from disagg.simulator.timeline_page import TimelineRecorder


class TargetLostError(Exception):
    """A run was given up: more of its requests have missed their objectives than may."""


def simulate(
    spec: ClusterSpec,
    requests: Iterable[SimulatedRequest],
    slo: Slo,
    *,
    log: EventLogFolder | None = None,
    timeline: TimelineRecorder | None = None,
    next_call: Callable[[SimulatedRequest], SimulatedRequest | None] = lambda ended: None,
    most_misses: float = math.inf,
) -> RunReport:
    """Serve the requests, given in order of arrival, and report. Raise ConfigurationError when one can never fit.

    ``next_call`` may name a request that follows from one that ended, as in a closed loop. Raise TargetLostError as
    soon as more than ``most_misses`` requests have missed their objectives.
    """
    collector = Collector(slo, spec.router.classes)

    def end(request: SimulatedRequest) -> None:
        if request.fail_reason is FailReason.TOO_LONG:
            raise ConfigurationError(
                f"request {request.request_id} ({request.prompt_len} + {request.output_len} tokens) never fits: "
                f"{request.detail}; leave it out, or give the instances more memory or devices"
            )
        collector.add(request)
        if collector.num_missed > most_misses:
            raise TargetLostError
        following = next_call(request)
        if following is not None:
            cluster.submit_later(following)

    cluster = SimulatedCluster(spec, end, Recording(log=log, timeline=timeline, gaps=collector.gaps))
    cluster.run(requests)
    span_s = collector.last_end_s
    kv = []
    for instance in cluster.instances:
        use = instance.kv_use
        num_blocks = instance.spec.num_blocks
        kv.append(
            KvUse(
                instance=instance.spec.name,
                mean=use.mean(span_s) / num_blocks,
                peak=use.peak / num_blocks,
                interval_s=use.interval_s,
                course=tuple(peak / num_blocks for peak in use.peaks),
            )
        )
    loads = [load for instance in cluster.instances for load in instance.loads()]
    decisions = tuple((time_s, decided.words) for time_s, decided in cluster.decisions)
    return structs.replace(collector.report(loads, kv), decisions=decisions)
