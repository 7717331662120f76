"""The search with a server that is a formula: what it runs, when it stops, what an interruption leaves."""

from collections.abc import Callable
from typing import Any

import pytest

from disagg.bench.client.goodput import GoodputPlan, find_goodput
from disagg.bench.client.load_plan import ClosedLoad, LoadPlan, OpenLoad, Server
from disagg.bench.client.run_load import LoadResult
from disagg.bench.client.running import INTERRUPTED
from disagg.measure.goodput_search import RateBracket
from disagg.measure.record import Ending, RequestRecord
from disagg.measure.slo import Slo, SloTarget, Tail
from disagg.measure.statistics import Percentiles
from disagg.measure.workload import RequestSpec

SLO = Slo(ttft_s=1.0, tpot_s=1.0)
NUM_REQUESTS = 20


def load_at(rate: float, seed: int) -> OpenLoad:
    return OpenLoad([RequestSpec(10, 2, index / rate) for index in range(NUM_REQUESTS)])


class FormulaServer:
    """TTFT grows with the rate: requests at ``rate`` have ``ttft(rate)`` seconds, spread from 0.5 to 1.5 times that."""

    def __init__(self, ttft: Callable[[float], float], interrupt_at: int = 10**9) -> None:
        self.ttft = ttft
        self.interrupt_at = interrupt_at
        self.plans: list[LoadPlan] = []
        self.rates: list[float] = []

    def run(self, plan: LoadPlan, what: str) -> LoadResult:
        self.plans.append(plan)
        rate = 0.0
        if isinstance(plan.load, OpenLoad):
            rate = 1 / plan.load.requests[1].arrival_s
            self.rates.append(rate)
        records = tuple(record(index, self.ttft(rate) * (0.5 + index / NUM_REQUESTS)) for index in range(NUM_REQUESTS))
        stopped = INTERRUPTED if len(self.plans) == self.interrupt_at else ""
        nothing = Percentiles.of([])
        return LoadResult(plan, "fake", records, 1.0, 0.0, nothing, 0.0, prompt_seed=0, stopped=stopped)


def record(index: int, ttft_s: float) -> RequestRecord:
    return RequestRecord(
        index=index,
        request_id=str(index),
        prompt_len=10,
        max_output_len=2,
        due_s=0.0,
        sent_s=0.0,
        finished_s=ttft_s + 0.1,
        event_s=(ttft_s, ttft_s + 0.1),
        event_tokens=(1, 1),
        ending=Ending.FINISHED,
    )


def asked(**changes: Any) -> GoodputPlan:
    plan = LoadPlan(Server("http://nowhere"), OpenLoad(()))
    return GoodputPlan(**{"plan": plan, "load_at": load_at, "start_rate": 1.0, "target": held_to(0.5), **changes})


def held_to(attainment: float, *tails: Tail) -> SloTarget:
    return SloTarget(slo=SLO, attainment=attainment, tails=tails)


def test_the_search_closes_in_on_the_rate_at_which_half_of_the_requests_keep_the_objectives() -> None:
    server = FormulaServer(lambda rate: rate / 4)
    found = find_goodput(asked(), server.run)
    assert found.bracket.met <= 4.2
    assert found.bracket.missed >= 4.0
    assert found.bracket.is_within(0.05)
    assert [trial.rate for trial in found.trials] == sorted(server.rates)
    best = found.at(found.bracket.met)
    assert best is not None
    assert best.is_met
    assert best.attainment.low <= 0.5 <= best.attainment.high


def test_a_limit_on_a_percentile_ends_the_search_below_what_the_attainment_allows() -> None:
    """TTFT is spread up to 1.45 times its mean of rate / 4: the slowest of 20 is within 0.5 s up to a rate of 1.4."""
    tail = Tail(latency="ttft", percentile="p99", limit_s=0.5)
    found = find_goodput(asked(target=held_to(0.5, tail)), FormulaServer(lambda rate: rate / 4).run)
    assert 1.3 <= found.bracket.met <= 1.4 <= found.bracket.missed <= 1.45
    missed = found.at(found.bracket.missed)
    assert missed is not None
    assert missed.attainment.share == 1.0
    assert missed.missed == ("ttft.p99 " + missed.missed[0].split()[1] + " not <=500ms",)


def test_the_grid_is_run_around_what_was_found_and_never_given_up_early() -> None:
    server = FormulaServer(lambda rate: rate / 4)
    found = find_goodput(asked(grid=(0.5, 2.0)), server.run)
    assert server.rates[-2:] == pytest.approx([found.bracket.met * 0.5, found.bracket.met * 2.0])
    assert [plan.limits.target for plan in server.plans[-2:]] == [None, None]
    assert server.plans[0].limits.target == 0.5


def test_attainment_under_other_objectives_comes_from_the_same_runs() -> None:
    server = FormulaServer(lambda rate: rate / 4)
    found = find_goodput(asked(), server.run)
    num_runs = len(server.plans)
    curve = [share.share for share in found.attainment_by_scale(SLO).values()]
    assert curve == sorted(curve)
    assert curve[0] == 0
    assert curve[-1] == 1
    assert len(server.plans) == num_runs


def test_a_second_seed_is_not_run_where_the_first_has_spoiled_it() -> None:
    server = FormulaServer(lambda rate: 10.0 * rate)
    found = find_goodput(asked(seeds=(0, 1, 2), target=held_to(0.9), max_doublings=3), server.run)
    assert found.bracket == RateBracket(0.0, 0.25)
    assert [len(trial.results) for trial in found.trials] == [1, 1, 1]
    assert all(trial.is_cut and trial.attainment.total == 3 * NUM_REQUESTS for trial in found.trials)
    assert found.attainment_by_scale(SLO) == {}


def test_misses_of_one_seed_are_taken_from_what_the_next_may_miss() -> None:
    server = FormulaServer(lambda rate: 0.75)
    find_goodput(asked(seeds=(0, 1), target=held_to(0.75), max_doublings=1), server.run)
    # Of 40 requests 10 may miss; the first run, in which 4 did, could have missed all 10 of its 20.
    targets = [plan.limits.target for plan in server.plans]
    assert targets == [0.5, 1 - (10 - num_missed(0.75)) / NUM_REQUESTS]


def num_missed(ttft_s: float) -> int:
    return sum(not record(index, ttft_s * (0.5 + index / NUM_REQUESTS)).meets(SLO) for index in range(NUM_REQUESTS))


def test_objectives_that_an_idle_server_misses_end_the_search_at_once() -> None:
    server = FormulaServer(lambda rate: 10.0)
    found = find_goodput(asked(grid=(0.5,)), server.run)
    assert found.is_hopeless
    assert found.bracket == RateBracket(0.0, 1.0)
    assert [type(plan.load) for plan in server.plans] == [OpenLoad, ClosedLoad]


def test_answers_may_take_a_while_after_the_last_request_but_not_for_ever() -> None:
    server = FormulaServer(lambda rate: rate / 4)
    find_goodput(asked(drain_s=7.0), server.run)
    plan = server.plans[0]
    assert isinstance(plan.load, OpenLoad)
    assert plan.limits.deadline_s == plan.load.requests[-1].arrival_s + 7.0


def test_every_run_has_texts_of_its_own_even_with_a_seed() -> None:
    server = FormulaServer(lambda rate: rate / 4)
    plan = LoadPlan(Server("http://nowhere"), OpenLoad(()), prompt_seed=7)
    find_goodput(asked(plan=plan), server.run)
    seeds = [one.prompt_seed for one in server.plans]
    assert len(seeds) == len(set(seeds))


def test_interrupting_leaves_the_bracket_so_far() -> None:
    server = FormulaServer(lambda rate: rate / 4, interrupt_at=5)
    found = find_goodput(asked(), server.run)
    assert found.is_interrupted
    assert found.bracket == RateBracket(4.0, 8.0)
    assert len(found.trials) == 4
