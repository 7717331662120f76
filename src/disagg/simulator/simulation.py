"""One simulation from specification to report."""

from collections.abc import Callable, Iterable

from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.measure.slo import Slo
from disagg.simulator.cluster import ClusterSpec, SimulatedCluster
from disagg.simulator.event_log import EventLog
from disagg.simulator.request import SimulatedRequest
from disagg.simulator.run_report import Collector, KvUse, RunReport
from disagg.simulator.timeline_page import TimelineRecorder


def simulate(
    spec: ClusterSpec,
    requests: Iterable[SimulatedRequest],
    slo: Slo,
    *,
    log: EventLog | None = None,
    timeline: TimelineRecorder | None = None,
    next_call: Callable[[SimulatedRequest], SimulatedRequest | None] = lambda ended: None,
) -> RunReport:
    """Serve the requests, given in order of arrival, and report. Raise ConfigurationError when one can never fit.

    ``next_call`` may name a request that follows from one that ended, as in a closed loop.
    """
    collector = Collector(slo)

    def end(request: SimulatedRequest) -> None:
        collector.add(request)
        following = next_call(request)
        if following is not None:
            check_fit(following)
            cluster.submit_later(following)

    check_fit = _FitCheck(spec)
    cluster = SimulatedCluster(spec, end, log=log, timeline=timeline, gaps=collector.gaps)
    cluster.run(map(check_fit, requests))
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
    num_preemptions = sum(instance.load().num_preemptions_total for instance in cluster.instances)
    return collector.report(num_preemptions, kv)


class _FitCheck:
    """Passes requests on; refuses one that no path through the cluster could ever hold."""

    def __init__(self, spec: ClusterSpec) -> None:
        self._capacity = {
            role: max((instance.capacity for instance in spec.instances if instance.role is role), default=0)
            for role in Role
        }

    def __call__(self, request: SimulatedRequest) -> SimulatedRequest:
        capacity, needed = self._capacity, request.max_total_tokens
        ends_at_first = request.output_len == 1
        by_pair = request.prompt_len < capacity[Role.PREFILL] and (ends_at_first or needed <= capacity[Role.DECODE])
        if not by_pair and needed > capacity[Role.COLOCATED]:
            room = ", ".join(f"{role.value} {tokens}" for role, tokens in capacity.items() if tokens)
            raise ConfigurationError(
                f"request {request.request_id} ({request.prompt_len} + {request.output_len} tokens) never fits: the KV "
                f"pools hold {room} tokens; leave it out, or give the instances more memory or devices"
            )
        return request
