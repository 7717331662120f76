"""When a run is given up: rules over counts. Pure."""

import math

from disagg.bench.client.load_plan import Limits


def reason_to_stop(
    limits: Limits, *, elapsed_s: float, num_requests: int, num_outstanding: int, num_missed: int
) -> str | None:
    """Return why a run should end now, in words; None when it should go on.

    ``num_missed`` are requests that can no longer keep the objectives, whether they have ended or not.
    """
    if elapsed_s > limits.deadline_s:
        return f"the run's deadline of {limits.deadline_s:g} s passed"
    if num_outstanding > limits.max_outstanding:
        return f"more than {limits.max_outstanding} requests under way at once: the server falls hopelessly behind"
    if limits.target is not None and num_missed > most_misses(limits.target, num_requests):
        return f"{num_missed} of {num_requests} requests missed {limits.slo}: {limits.target:.0%} is out of reach"
    return None


def most_misses(target: float, num_requests: int) -> int:
    """Return how many requests may miss while the others still reach ``target``."""
    return num_requests - math.ceil(target * num_requests - 1e-9)
