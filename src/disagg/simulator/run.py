"""One simulation from specification to report, several over seeds, and the search for the goodput."""

import math
from collections.abc import Callable, Iterable
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.measure.slo import Slo
from disagg.scheduling.dispatch.actions import FailReason
from disagg.simulator.cluster import ClusterSpec, SimulatedCluster
from disagg.simulator.event_log import EventLogFolder
from disagg.simulator.recording import Recording
from disagg.simulator.report import Collector, KvUse, RunReport
from disagg.simulator.request import SimulatedRequest
from disagg.simulator.timeline_page import TimelineRecorder

RATE_TOLERANCE: Final = 0.02
_MAX_DOUBLINGS: Final = 20


def simulate(
    spec: ClusterSpec,
    requests: Iterable[SimulatedRequest],
    slo: Slo,
    *,
    log: EventLogFolder | None = None,
    timeline: TimelineRecorder | None = None,
    next_call: Callable[[SimulatedRequest], SimulatedRequest | None] = lambda ended: None,
) -> RunReport:
    """Serve the requests, given in order of arrival, and report. Raise ConfigurationError when one can never fit.

    ``next_call`` may name a request that follows from one that ended, as in a closed loop.
    """
    collector = Collector(slo)

    def end(request: SimulatedRequest) -> None:
        if request.fail_reason is FailReason.TOO_LONG:
            raise ConfigurationError(
                f"request {request.request_id} ({request.prompt_len} + {request.output_len} tokens) never fits: "
                f"{request.detail}; leave it out, or give the instances more memory or devices"
            )
        collector.add(request)
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
    num_preemptions = sum(instance.num_preemptions for instance in cluster.instances)
    return collector.report(num_preemptions, kv)


def find_goodput(attainment: Callable[[float], float], target: float, start_rate: float) -> float:
    """Return the highest rate at which ``attainment(rate)`` is at least ``target``, to 2%.

    ``attainment`` is taken to fall with the rate. The search doubles or halves from ``start_rate`` until it has
    bracketed the goodput, then halves the bracket. Raises ConfigurationError when no rate is low or high enough:
    then the objectives, not the load, decide.
    """
    low, high = 0.0, math.inf
    rate = start_rate
    for _ in range(_MAX_DOUBLINGS):
        if attainment(rate) >= target:
            low, rate = rate, rate * 2
        else:
            high, rate = rate, rate / 2
        if low > 0 and high < math.inf:
            break
    else:
        side = "met at any rate" if low > 0 else "missed at any rate"
        raise ConfigurationError(
            f"an attainment of {target:.0%} is {side} that was tried ({start_rate / 2**_MAX_DOUBLINGS:.2g} to "
            f"{start_rate * 2**_MAX_DOUBLINGS:.2g} requests/s): change the objectives or the placement"
        )
    while high - low > RATE_TOLERANCE * low:
        middle = (low + high) / 2
        if attainment(middle) >= target:
            low = middle
        else:
            high = middle
    return low
