"""What ``disagg top`` shows, out of what a server said: rates between answers, latencies of recent requests. Pure."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Final

import msgspec

from disagg.measure.slo import Slo
from disagg.measure.statistics import Percentiles, Share
from disagg.serve.api.views import InstanceView, RequestView, ServerView

MAX_REQUESTS: Final = 4096
RATE_WINDOW_S: Final = 5.0
"""Rates are means over this time: single seconds jump."""
_COMPLETE: Final = frozenset({"stop", "length"})


class LatencyFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One latency of the requests of the window, in seconds. ``within`` counts those that keep the objective."""

    percentiles: Percentiles
    within: Share


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One frame. Rates are per second, ``window_s`` is the time over which requests are looked at.

    ``attainment`` is the share of all requests that ended in the window within both objectives: what failed, was
    refused or whose client left is a miss. The courses are rates from one answer to the next, oldest first.
    """

    status: ServerView
    slo: Slo
    window_s: float
    request_rate: float
    prefill_token_rate: float
    decode_token_rate: float
    hand_over_rate: float
    hand_over_byte_rate: float
    hand_over_s: float | None
    """Mean duration of one pull since the server started; None before the first."""
    instance_token_rates: dict[str, float]
    """Prompt tokens of a prefill instance, generated ones of the others."""
    ttft: LatencyFigures
    tpot: LatencyFigures
    attainment: Share
    course_of_tokens: list[float]
    course_under_way: list[float]
    requests: list[RequestView]
    """Those that ended last, the newest first."""


class History:
    """What the server said lately, as far back as ``window_s``."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self.statuses: deque[ServerView] = deque()
        self.requests: deque[RequestView] = deque(maxlen=MAX_REQUESTS)

    def take(self, status: ServerView, requests: Iterable[RequestView]) -> None:
        """Add an answer, and the requests that ended since the one before; forget what is too old."""
        self.statuses.append(status)
        self.requests.extend(requests)
        oldest_s = status.now_unix_s - max(self.window_s, RATE_WINDOW_S)
        while self.statuses[0].now_unix_s < oldest_s and len(self.statuses) > 2:
            self.statuses.popleft()


def ended_unix_s(request: RequestView) -> float:
    """Return when a request ended, by the server's clock."""
    return request.arrival_unix_s + request.stamps.get("finished", request.e2e_s or 0.0)


def keeps(request: RequestView, slo: Slo) -> bool:
    """Return whether a request came to its end within both objectives."""
    return (
        request.finish_reason in _COMPLETE
        and slo.keeps_ttft(_seconds(request.ttft_s))
        and slo.keeps_tpot(_seconds(request.tpot_s))
    )


def make_figures(history: History, slo: Slo, num_shown: int) -> Figures:
    """Return the frame after the last answer, with up to ``num_shown`` requests. There must have been an answer."""
    now = history.statuses[-1]
    recent = [status for status in history.statuses if status.now_unix_s >= now.now_unix_s - RATE_WINDOW_S]
    ended = [one for one in history.requests if ended_unix_s(one) >= now.now_unix_s - history.window_s]
    just_ended = sum(ended_unix_s(one) >= now.now_unix_s - RATE_WINDOW_S for one in ended)
    return Figures(
        status=now,
        slo=slo,
        window_s=history.window_s,
        request_rate=just_ended / min(RATE_WINDOW_S, history.window_s),
        prefill_token_rate=sum(_rates(recent, _prefill_tokens).values()),
        decode_token_rate=sum(_rates(recent, _decode_tokens).values()),
        hand_over_rate=_rate(recent, lambda status: status.hand_overs.num_total),
        hand_over_byte_rate=_rate(recent, lambda status: status.hand_overs.bytes_total),
        hand_over_s=now.hand_overs.seconds_total / now.hand_overs.num_total if now.hand_overs.num_total else None,
        instance_token_rates=_rates(recent, _own_tokens),
        ttft=_latency((one.ttft_s for one in ended), slo.keeps_ttft),
        tpot=_latency((one.tpot_s for one in ended), slo.keeps_tpot),
        attainment=Share.that(keeps(one, slo) for one in ended),
        course_of_tokens=[sum(_rates(pair, _decode_tokens).values()) for pair in pairwise(history.statuses)],
        course_under_way=[float(status.num_under_way) for status in history.statuses],
        requests=list(history.requests)[: -num_shown - 1 : -1] if num_shown > 0 else [],
    )


def _seconds(value: float | None) -> float:
    return float("nan") if value is None else value


def _latency(values: Iterable[float | None], keeps_objective: Callable[[float], bool]) -> LatencyFigures:
    known = [value for value in values if value is not None]
    return LatencyFigures(percentiles=Percentiles.of(known), within=Share.that(map(keeps_objective, known)))


def _prefill_tokens(one: InstanceView) -> int:
    return one.num_prefill_tokens_total


def _decode_tokens(one: InstanceView) -> int:
    return one.num_decode_tokens_total


def _own_tokens(one: InstanceView) -> int:
    return one.num_prefill_tokens_total if one.role == "prefill" else one.num_decode_tokens_total


def _rates(statuses: Sequence[ServerView], count: Callable[[InstanceView], int]) -> dict[str, float]:
    """Return how fast a counter of each instance of the last answer grew over these answers."""
    grown = {one.instance: 0.0 for one in statuses[-1].instances}
    for before, after in pairwise(statuses):
        known = {one.instance: count(one) for one in before.instances}
        for one in after.instances:
            if one.instance in grown and one.instance in known:
                grown[one.instance] += _growth(known[one.instance], count(one))
    elapsed_s = statuses[-1].now_unix_s - statuses[0].now_unix_s
    return {name: growth / elapsed_s if elapsed_s > 0 else 0.0 for name, growth in grown.items()}


def _rate(statuses: Sequence[ServerView], count: Callable[[ServerView], int]) -> float:
    grown = sum(_growth(count(before), count(after)) for before, after in pairwise(statuses))
    elapsed_s = statuses[-1].now_unix_s - statuses[0].now_unix_s
    return grown / elapsed_s if elapsed_s > 0 else 0.0


def _growth(before: int, after: int) -> int:
    """Return by how much a counter grew; one that fell began anew with its instance or its server."""
    return after - before if after >= before else after
