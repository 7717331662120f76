"""One instance in its phase alone: what DistServe's Algorithm 1 simulates for prefill and decode each.

The other phase takes no time and has room for everything, and KV travels in no time: prefill is a workload of answers
of one token, decode a workload whose prompts are there at once. Colocated instances serve the whole workload.
"""

from dataclasses import dataclass, replace
from typing import Final

import msgspec

from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.costs.latency import ConstantLatency
from disagg.measure.open_loop import LengthLimits, OpenLoop
from disagg.measure.slo import Slo, SloTarget
from disagg.placement.bounds import Bound, phase_bound, token_s
from disagg.placement.goodput_job import GUESS_GROWTH, KNOWN_GROWTH, GoodputJob
from disagg.placement.problem import PlanProblem
from disagg.placement.queueing import prefill_estimate
from disagg.placement.shapes import BuiltChoice, build_choice
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.engines import build_instance
from disagg.simulator.instance_spec import InstanceSpec

_AT_ONCE: Final = ConstantLatency(1e-9)
_START: Final = {Role.PREFILL: 1.0, Role.DECODE: 1.0, Role.COLOCATED: 0.6}
"""Where searches begin, as a part of the estimate: rather too high, as a rate that misses is soon given up."""
MOST_BUSY: Final = 0.95
"""Of a bound that an instance reaches for long: closer to it queues grow without end, in runs longer than ours."""
_LEAST_PART: Final = 0.02
"""Of the bound: an estimate of nothing would begin no search."""
_MOST_WAITING: Final = 128
_ANSWERS: Final = 2.0
_TOLERANCE: Final = 0.06
"""Phases are compared; whole units are judged by longer runs, more closely."""
_LONGEST_ANSWER_S: Final = 120.0


@dataclass(frozen=True)
class PhaseChoice:
    """A choice with what it can serve at most in its phase, and about how much: requests/s for which it is searched."""

    built: BuiltChoice
    bound: Bound
    estimate: float


def bound_choice(problem: PlanProblem, built: BuiltChoice) -> PhaseChoice:
    """Return the choice with its bound and estimate."""
    bound = phase_bound(built, problem.sample, problem.target)
    estimate = bound.rate
    if built.choice.role is not Role.DECODE and bound.rate > 0:
        by_queue = prefill_estimate(built, problem.sample, problem.target, bound.rate)
        estimate = max(by_queue, bound.rate * _LEAST_PART)
    return PhaseChoice(built, bound, estimate)


def phase_job(problem: PlanProblem, phase: PhaseChoice, expected: float | None = None) -> GoodputJob:
    """Return the search of the goodput of one instance in its phase.

    ``expected`` is what others of the role let expect; None begins at a usual part of the bound.
    """
    role = phase.built.choice.role
    return GoodputJob(
        spec=_phase_spec(problem, phase.built),
        workload=_phase_workload(problem.workload, role),
        target=phase_target(problem.target, role),
        start_rate=expected or phase.estimate * _START[role],
        growth=GUESS_GROWTH if expected is None else KNOWN_GROWTH,
        seed=0,
        min_requests=problem.min_requests,
        max_requests=problem.max_requests,
        requests_per_rate=requests_per_rate(problem, phase.built, _ANSWERS),
        tolerance=_TOLERANCE,
        most_rate=MOST_BUSY * phase.bound.rate,
    )


def phase_target(target: SloTarget, role: Role) -> SloTarget:
    """Return what of a target one phase decides: prefill the first token, decode the rest, colocated all."""
    if role is Role.COLOCATED:
        return target
    ours = {Role.PREFILL: ("ttft",), Role.DECODE: ("tpot", "itl")}[role]
    slo = Slo(ttft_s=target.slo.ttft_s) if role is Role.PREFILL else Slo(tpot_s=target.slo.tpot_s)
    tails = tuple(tail for tail in target.tails if tail.latency in ours)
    return SloTarget(slo=slo, attainment=target.attainment, tails=tails)


def requests_per_rate(problem: PlanProblem, built: BuiltChoice, answers: float) -> float:
    """Return how many seconds a run must last: so many answers, one after the other, or twenty queues.

    Short runs flatter, as queues and batches are empty when they begin.
    """
    ttft_s = problem.target.slo.ttft_s
    queue_s = 20 * ttft_s if ttft_s < _LONGEST_ANSWER_S else 0.0
    return queue_s if built.choice.role is Role.PREFILL else max(queue_s, answers * _answer_s(problem, built))


def _answer_s(problem: PlanProblem, built: BuiltChoice) -> float:
    """Return how long an answer takes when batches are as full as the objective lets them be."""
    step_s = token_s(built.latency, 64 * built.latency.num_stages, problem.sample.mean_held)
    return min(problem.sample.mean_output * min(problem.target.slo.tpot_s, step_s), _LONGEST_ANSWER_S)


def other_batchings(problem: PlanProblem, phase: PhaseChoice) -> list[PhaseChoice]:
    """Return the choice with each other batching of its role."""
    others = problem.batchings[phase.built.choice.role][1:]
    choices = [phase.built.choice.with_batching(batching) for batching in others]
    return [bound_choice(problem, build_choice(problem, choice)) for choice in choices]


def _phase_workload(workload: OpenLoop, role: Role) -> OpenLoop:
    if role is not Role.PREFILL:
        return workload
    limits = workload.limits
    total = limits.max_total_len
    return replace(workload, limits=LengthLimits(min(limits.max_prompt_len, total - 1), 1, total))


def _num_each(instance: InstanceSpec) -> int:
    """Return how many KV blocks the tokens of one take."""
    return 1 if instance.window is None else 1 + instance.window.num_each


def _phase_spec(problem: PlanProblem, built: BuiltChoice) -> ClusterSpec:
    choice = built.choice
    named = build_instance(
        InstanceId(choice.role.value), choice.group(1), problem.platforms[choice.kind], problem.rules
    )
    window = named.kv_window and named.kv_window._replace(bytes_per_token=0)
    instance = replace(named, latency=built.latency, kv_bytes_per_token=0, kv_window=window)
    if choice.role is Role.COLOCATED:
        return ClusterSpec(instances=(instance,), router=problem.rules.router)
    other = Role.DECODE if choice.role is Role.PREFILL else Role.PREFILL
    # What waits for the phase in question waits here, and is late long before there is no room.
    waiting = _MOST_WAITING * problem.sample.mean_held if choice.role is Role.DECODE else 0
    instant = replace(
        instance,
        name=InstanceId(other.value),
        role=other,
        scheduler=msgspec.structs.replace(
            problem.rules.schedulers[other], max_batch_tokens=1 << 20, max_batch_size=4096, max_pulls_in_flight=4096
        ),
        num_blocks=_num_each(instance) * round(waiting + 4 * problem.sample.longest) // instance.block_size,
        latency=_AT_ONCE,
        num_devices=1,
        swap=None,
    )
    return ClusterSpec(instances=(instance, instant), router=problem.rules.router)
