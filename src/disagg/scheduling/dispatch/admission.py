"""Whether a sequence that arrives is taken, and on which terms: bounds, and what is predicted. Pure.

What is predicted is the time until its turn comes, from the work of those before it and from how quickly the room has
emptied lately, and then what its best path brings. A prediction over the objective, less a margin, is a miss:
``Overload`` says what follows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from disagg.base.config import RouterSettings
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.base.service_classes import Overload
from disagg.scheduling.dispatch.actions import Refuse, RefuseReason
from disagg.scheduling.dispatch.forecast import Forecast
from disagg.scheduling.dispatch.forecaster import Forecaster
from disagg.scheduling.dispatch.margins import Margin
from disagg.scheduling.dispatch.state import InstanceEntry, InstanceState, SequenceEntry

_SHORTEST_RETRY_S: Final = 0.5
_LEAST_RATE: Final = 0.1
_MEMORY_S: Final = 10.0
_PRIOR_S: Final = 5.0
"""Seconds for which what is expected counts as if it had been seen, at first."""


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a sequence is predicted to miss its objectives, and after how long one like it would keep them."""

    why: str
    retry_after_s: float


class DrainRate:
    """Seconds of prefill that leave the room in a second, while somebody waits."""

    def __init__(self) -> None:
        self._work_s = 0.0
        self._time_s = 0.0
        self._prior_s = _PRIOR_S
        self._seen_s = 0.0
        self._somebody_waits = False

    def note(self, now: float, *, somebody_waits: bool, started_s: float = 0.0) -> None:
        """Take account of the time since the last call, and of work that was given to an instance just now."""
        if self._somebody_waits:
            passed_s = max(0.0, now - self._seen_s)
            kept = _MEMORY_S / (_MEMORY_S + passed_s)
            self._time_s = kept * self._time_s + passed_s
            self._work_s = kept * self._work_s + started_s
            self._prior_s *= kept
        self._seen_s, self._somebody_waits = now, somebody_waits

    def rate(self, expected: float) -> float:
        """Return the rate; ``expected`` counts until enough was seen."""
        return max(_LEAST_RATE, (self._work_s + self._prior_s * expected) / (self._time_s + self._prior_s))


def expected_rate(
    entries: Iterable[InstanceEntry], forecaster: Forecaster, num_tokens: int, *, has_walls: bool
) -> float:
    """Return the seconds of prefill, of prompts of so many tokens, that instances are expected to do in a second.

    Those that decode the answers as well have only a part of their time for it.
    """
    ready = [entry for entry in entries if entry.state is InstanceState.READY]
    rate = 0.0
    for entry in ready:
        if not has_walls or entry.role is Role.COLOCATED:
            rate += forecaster.prompts_part(entry, num_tokens)
        elif entry.role is Role.PREFILL:
            rate += 1.0
    return rate if rate else 1.0


def expected_ttft_s(
    best: Forecast, forecaster: Forecaster, ahead: Iterable[tuple[SequenceEntry, float]], rate: float
) -> float:
    """Return the seconds to the first token of a sequence whose turn has not come.

    ``ahead`` are those that are served before it, with how many tenants share meanwhile; ``rate`` that of the room.
    """
    return sum(forecaster.prompt_s(one.num_tokens) * share for one, share in ahead) / rate + best.ttft_s


def judge(
    sequence: SequenceEntry,
    best: Forecast,
    forecaster: Forecaster,
    ttft_s: float,
    objectives: Objectives,
    margin: Margin,
) -> Miss | None:
    """Return why the sequence is predicted to miss its ``objectives``; None when it is predicted to keep them."""
    if objectives.ttft_s is not None and margin.ttft * ttft_s > objectives.ttft_s:
        return Miss(
            f"its first token is predicted after {ttft_s:.2f} s, up to {margin.ttft:.2f} times that is to be expected, "
            f"the objective is {objectives.ttft_s:g} s",
            max(_SHORTEST_RETRY_S, ttft_s - objectives.ttft_s / margin.ttft),
        )
    tpot_s = max(best.tpot_s, best.others_tpot_s)
    if objectives.tpot_s is not None and margin.tpot * tpot_s > objectives.tpot_s:
        # The batch is as long as before once an answer has ended for each that is too many.
        late_s = (1 - objectives.tpot_s / (margin.tpot * tpot_s)) * forecaster.num_answer_tokens(sequence) * tpot_s
        return Miss(
            f"tokens are predicted every {1e3 * tpot_s:.1f} ms, up to {margin.tpot:.2f} times that is to be expected, "
            f"the objective is {1e3 * objectives.tpot_s:g} ms",
            max(_SHORTEST_RETRY_S, late_s),
        )
    return None


def unserved(sequence: SequenceEntry, instances: str) -> Refuse:
    """Return the refusal of a sequence that none of the instances, as described, could serve."""
    detail = f"no instances are left that could serve a request ({instances})"
    return _refuse(sequence, RefuseReason.UNAVAILABLE, detail)


def over_bounds(sequence: SequenceEntry, settings: RouterSettings, num_all: int, num_own: int) -> Refuse | None:
    """Return the refusal of a sequence beside which too many are under way, of all or of its tenant's."""
    if num_all >= settings.max_queued_requests:
        detail = f"{num_all} sequences are under way, which is the limit (--max-queued-requests)"
        return _refuse(sequence, RefuseReason.OVERLOADED, detail)
    tenant = settings.tenants.get(sequence.tenant)
    if tenant is not None and tenant.max_requests is not None and num_own >= tenant.max_requests:
        detail = f"{num_own} sequences of {sequence.tenant} are under way, which is its limit (max_requests)"
        return _refuse(sequence, RefuseReason.OVERLOADED, detail)
    return None


def overload_of(sequence: SequenceEntry, settings: RouterSettings) -> Overload:
    """Return what becomes of the sequence when it is predicted to miss: as its class says, or else as for all."""
    own = settings.classes.get(sequence.service_class)
    return settings.overload if own is None or own.overload is None else own.overload


def shed(sequence: SequenceEntry, miss: Miss) -> Refuse:
    """Return the refusal of a sequence that is predicted to miss."""
    why = f"overload of the class {sequence.service_class}" if sequence.service_class else "--overload"
    detail = f"the server has too much to do: {miss.why} ({why}: shed)"
    return _refuse(sequence, RefuseReason.SHED, detail, miss.retry_after_s)


def _refuse(sequence: SequenceEntry, reason: RefuseReason, detail: str, retry_after_s: float = 1.0) -> Refuse:
    return Refuse(
        request_id=sequence.request_id,
        epoch=sequence.epoch,
        reason=reason,
        detail=detail,
        retry_after_s=retry_after_s,
        tenant=sequence.tenant,
        priority=sequence.priority,
    )
