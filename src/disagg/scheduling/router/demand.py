"""What instances of a role are asked to do, and which part of it so many of them are predicted to do in time. Pure.

Prompts are taken to wait as in an M/G/n queue: Erlang's C says how many wait, and an exponential tail how long (the
mean is Pollaczek and Khinchine's, shared out among n). Answers are taken to run as many at once as their rate and the
time of a step of so many say, with Poisson's spread: those are in time whose step is not longer than the objective.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from disagg.base.messages import StepCosts
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.base.step_limits import StepLimits
from disagg.costs.step_costs import decode_work_s, prefill_work_s
from disagg.scheduling.dispatch.fleet_facts import known_decode_costs, known_prefill_costs
from disagg.scheduling.dispatch.state import InstanceEntry
from disagg.scheduling.dispatch.workload import WorkloadWindow
from disagg.scheduling.dispatch.workload_report import Arrival

_FEWEST_ARRIVALS: Final = 10
_SHORTEST_S: Final = 10.0
"""With fewer arrivals in less time, nothing is predicted."""
_MOST_PROMPTS: Final = 128
"""That are looked at one by one."""
_PRIOR_ANSWER_TOKENS: Final = 128.0
"""Until an answer has ended."""
_MOST_BUSY: Final = 0.98
"""Part of the time from which on a queue counts as endless."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What the instances of one role are asked, all together; seconds are those of one instance."""

    prompt_rate: float = 0.0
    prompts_s: tuple[float, ...] = ()
    """What recent prompts take, a sample."""
    backlog_s: float = 0.0
    """Prefill that was given to them and is not done."""
    answer_rate: float = 0.0
    answer_tokens: float = 1.0
    context_tokens: float = 0.0
    """Mean KV of an answer under way."""
    decode_costs: StepCosts | None = None
    limits: StepLimits = field(default_factory=StepLimits)
    pool_tokens: float = math.inf

    def is_behind(self, count: int, objectives: Objectives) -> bool:
        """Return whether a prompt that comes now is too late for what ``count`` instances were given before it."""
        return objectives.ttft_s is not None and self.backlog_s / max(1, count) > objectives.ttft_s

    def attainment(self, count: int, objectives: Objectives) -> float:
        """Return the part of the requests for which ``count`` instances are predicted to keep both, in the long run."""
        return self._ttft_attainment(count, objectives.ttft_s) * self._tpot_attainment(count, objectives.tpot_s)

    def best_attainment(self, objectives: Objectives) -> float:
        """Return the same for any number of instances: what a single prompt or answer takes stays."""
        return self.attainment(1 << 20, objectives)

    def _prefill_load(self, count: int) -> float:
        """Return the part of each instance's time that prompts take."""
        if not self.prompts_s:
            return 0.0
        return self.prompt_rate * sum(self.prompts_s) / len(self.prompts_s) / count

    def _decode_load(self, count: int) -> float:
        """Return the part of each instance's time that tokens of answers take, their steps' own time left out."""
        return self.answer_rate * self.answer_tokens * self._token_s() / count

    def _token_s(self) -> float:
        costs = self.decode_costs
        return 0.0 if costs is None else decode_work_s(costs, 1, 0) + costs.context_s * self.context_tokens

    def _ttft_attainment(self, count: int, ttft_s: float | None) -> float:
        if not self.prompts_s:
            return 1.0
        stretch = 1 / (1 - min(self._decode_load(count), _MOST_BUSY))
        load = self._prefill_load(count) * stretch
        if load >= _MOST_BUSY:
            return 0.0
        if ttft_s is None:
            return 1.0
        times = [stretch * one for one in self.prompts_s]
        mean_wait_s = sum(one * one for one in times) / (2 * sum(times)) / (count * (1 - load))
        waits = erlang_c(count, load)
        kept = 0.0
        for prompt_s in times:
            slack_s = ttft_s - prompt_s
            if slack_s >= 0:
                kept += 1 - waits * math.exp(-slack_s / mean_wait_s)
        return kept / len(times)

    def _tpot_attainment(self, count: int, tpot_s: float | None) -> float:
        costs = self.decode_costs
        if costs is None or not self.answer_rate:
            return 1.0
        stretch = 1 / (1 - min(self._prefill_load(count), _MOST_BUSY))
        token_s, step_s = stretch * self._token_s(), stretch * costs.step_s
        tokens_per_s = self.answer_rate * self.answer_tokens / count
        if tokens_per_s * token_s >= _MOST_BUSY:
            return 0.0
        running = tokens_per_s * step_s / (1 - tokens_per_s * token_s)
        most = min(float(self.limits.max_batch_size), self.pool_tokens / max(1.0, self.context_tokens))
        if tpot_s is not None:
            most = min(most, (tpot_s - step_s) / token_s if token_s else math.inf)
        if most < 1:
            return 0.0
        # An answer sees itself, and of the others as many as there happen to be.
        return _normal_cdf((most - 0.5 - running) / math.sqrt(max(running, 1e-9)))


def demand_of(role: Role, instances: Sequence[InstanceEntry], window: WorkloadWindow, now: float) -> Demand | None:
    """Return what the instances of a role are asked; None while too little is known to say.

    Of arrivals, those are theirs that recent starts say: what prefill instances begin, decode instances go on with.
    """
    span_s, arrivals = window.span_s(now), window.arrivals(now)
    if not arrivals:
        return Demand()
    starts, answers = window.starts(now), window.answers
    prefill_costs, decode_costs = known_prefill_costs(instances), known_decode_costs(instances)
    is_short = len(arrivals) < _FEWEST_ARRIVALS and span_s < _SHORTEST_S
    if is_short or not starts or prefill_costs is None:
        return None
    begins, own = _began(role), [entry for entry in instances if entry.role is role and entry.is_alive]
    theirs = [one for one in starts if one.role in begins]
    rate = _rate(arrivals, span_s, now) * len(theirs) / len(starts)
    prompts = [one for one in starts if one.role is role][-_MOST_PROMPTS:]
    decodes = role is not Role.PREFILL
    answer_tokens = sum(answers) / len(answers) if answers else _PRIOR_ANSWER_TOKENS
    context_tokens = sum(one.num_prompt_tokens for one in starts) / len(starts) + answer_tokens / 2
    return Demand(
        prompt_rate=rate if prompts and role is not Role.DECODE else 0.0,
        prompts_s=tuple(_prompt_s(prefill_costs, one.num_computed_tokens) for one in prompts),
        backlog_s=sum(_backlog_s(prefill_costs, entry) for entry in own),
        answer_rate=rate if decodes else 0.0,
        answer_tokens=max(1.0, answer_tokens - 1),
        context_tokens=context_tokens,
        decode_costs=decode_costs if decodes else None,
        limits=own[0].limits if own else StepLimits(),
        pool_tokens=min((entry.pool_tokens_of(context_tokens) for entry in own if entry.pool_tokens), default=math.inf),
    )


def erlang_c(count: int, load: float) -> float:
    """Return the part of arrivals that wait where ``count`` servers are busy for ``load`` of their time, below 1."""
    offered, blocked = count * load, 1.0
    if offered < 1e-3 * count:
        return 0.0
    for number in range(1, count + 1):
        blocked = offered * blocked / (number + offered * blocked)
    return blocked / (1 - load * (1 - blocked))


def _rate(arrivals: Sequence[Arrival], span_s: float, now: float) -> float:
    """Return the arrivals in a second: lately, or very lately where that is more, so that a rise is seen at once."""
    num_latest = sum(1 for one in arrivals if one.time_s > now - _SHORTEST_S)
    latest = num_latest / _SHORTEST_S if num_latest >= _FEWEST_ARRIVALS else 0.0
    return max(len(arrivals) / max(span_s, 1.0), latest)


def _began(role: Role) -> Iterable[Role]:
    """Return on which kind of instance those begin that an instance of a role computes something of."""
    return (Role.PREFILL, Role.DECODE) if role is Role.DECODE else (role,)


def _prompt_s(costs: StepCosts, num_tokens: int) -> float:
    return costs.step_s + prefill_work_s(costs, num_tokens, num_tokens**2, 1)


def _backlog_s(costs: StepCosts, entry: InstanceEntry) -> float:
    return prefill_work_s(costs, entry.prefill_tokens, entry.prefill_squares, entry.num_prefills)


def _normal_cdf(deviations: float) -> float:
    return 0.5 * math.erfc(-deviations / math.sqrt(2))
