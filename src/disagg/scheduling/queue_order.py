"""The order of whatever waits, on an instance and in the router: one definition for both. Pure."""

from disagg.base.config import MAX_OVERTAKE_S, QueueOrder

_FCFS, _SJF, _PRIORITY = QueueOrder.FCFS, QueueOrder.SJF, QueueOrder.PRIORITY  # looked up in every ranking
_JOB_S_PER_TOKEN = 0.01
"""Seconds by which an earlier prompt is put back for each of its tokens, where the shortest comes first."""


def rank_of(
    order: QueueOrder, *, priority: int, arrival_s: float, num_tokens: int, ttft_s: float | None
) -> tuple[int, float]:
    """Return the sort key of a sequence: what is smaller is served earlier, ties by arrival.

    ``ttft_s`` is its objective, None without one.
    """
    if order is _PRIORITY:
        return (priority, arrival_s)
    if order is _FCFS:
        return (0, arrival_s)
    if order is _SJF:
        return (priority, arrival_s + min(num_tokens * _JOB_S_PER_TOKEN, MAX_OVERTAKE_S))
    return (priority, arrival_s + (MAX_OVERTAKE_S if ttft_s is None else min(ttft_s, MAX_OVERTAKE_S)))
