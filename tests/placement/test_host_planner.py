"""Plans for the cores of one host: every role, number of threads and scheduling mode, simulated whole."""

from dataclasses import dataclass, replace
from typing import Self

import pytest
from planning import EvenPlatform, workload

from disagg.base.config import CacheSettings, SchedulingMode
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.measure.slo import parse_target
from disagg.placement.describe_host import describe_host
from disagg.placement.host_planner import HostProblem, host_placements, platforms_on, search_host
from disagg.placement.progress import PlanProgress
from disagg.placement.workers import Workers


def host(**changes: object) -> HostProblem:
    fields = {
        "platforms": {1: EvenPlatform(tokens=100_000), 2: EvenPlatform(5e-5, 5e-3, tokens=100_000)},
        "num_cores": 2,
        "most_tokens": 128,
        "cache": CacheSettings(prefix_caching=False),
        "workload": workload(prompt_len=400, output_len=30),
        "target": parse_target("ttft=300ms,tpot=30ms"),
        "num_requests": 30,
        "num_seeds": 1,
    }
    return HostProblem(**{**fields, **changes})  # type: ignore[arg-type]


def test_all_roles_threads_and_modes_are_tried() -> None:
    found = host_placements(host())
    groups = {(one.num_threads, tuple((group.role, group.count) for group in one.placement.groups)) for one in found}
    assert groups == {
        (1, ((Role.COLOCATED, 1),)),
        (1, ((Role.COLOCATED, 2),)),
        (1, ((Role.PREFILL, 1), (Role.DECODE, 1))),
        (2, ((Role.COLOCATED, 1),)),
    }
    assert {group.scheduling for one in found for group in one.placement.groups} == {*SchedulingMode, None}
    assert {group.max_batch_tokens for one in found for group in one.placement.groups} == {128, None}
    assert all(one.num_cores <= 2 for one in found)


def test_the_best_are_judged_and_told() -> None:
    """Two threads halve every step: one instance of both serves each request in half the time."""
    seen: list[PlanProgress] = []
    problem = host(notes=("step times on 2 thread(s) are an estimate",))
    judged, is_complete = search_host(problem, Workers(1), seen.append)
    plan = describe_host(problem, judged, is_complete)
    assert plan.notes == problem.notes
    assert is_complete
    assert plan.best.placement.groups[0].num_threads == 2
    assert plan.best.num_devices == 2
    assert any("prefill" in one.words for one in plan.losing)
    assert 0 < seen[-1].done <= seen[-1].total


@dataclass(frozen=True)
class CorePlatform(EvenPlatform):
    """Twice the threads take half the time."""

    num_threads: int = 1  # type: ignore[assignment]

    def at_threads(self, num_threads: int | None) -> Self:
        part = self.num_threads / (num_threads or self.num_threads)
        return replace(
            self, token_s=self.token_s * part, step_s=self.step_s * part, num_threads=num_threads or self.num_threads
        )


def goodput_of_a_pair(*, lends_cores: bool) -> float:
    platforms = platforms_on(CorePlatform(tokens=100_000), 2)
    problem = host(platforms=platforms, lends_cores=lends_cores, target=parse_target("ttft=60ms,tpot=30ms"))
    judged, _ = search_host(problem, Workers(1), lambda progress: None)
    pairs = [one for one in judged if one.candidate.placement.count(Role.PREFILL)]
    assert {one.candidate.placement.lend_cores for one in pairs} == {lends_cores}
    return pairs[0].goodput.mean


def test_a_pair_that_lends_its_cores_serves_more() -> None:
    """A prompt takes 40 ms on one core, 20 on both."""
    assert goodput_of_a_pair(lends_cores=True) > 1.1 * goodput_of_a_pair(lends_cores=False)


def test_one_instance_has_nobody_to_lend_to() -> None:
    lone = [one for one in host_placements(host()) if one.placement.count(Role.COLOCATED) == 1]
    assert {one.placement.lend_cores for one in lone} == {None}


def test_objectives_that_no_placement_keeps_are_told() -> None:
    with pytest.raises(ConfigurationError, match=r"no placement on 2 core\(s\) keeps tpot=1ms@90%"):
        search_host(host(target=parse_target("tpot=1ms")), Workers(1), lambda progress: None)


def test_no_more_is_planned_than_can_be_computed_for_long() -> None:
    """A prompt of 400 tokens takes 20 ms on both cores: 30 requests are over before anybody waits for 60 s."""
    judged, _ = search_host(host(target=parse_target("ttft=60s,tpot=1s")), Workers(1), lambda progress: None)
    assert 30 < judged[0].goodput.mean < 50


def test_a_profile_of_more_threads_than_cores_is_told() -> None:
    with pytest.raises(ConfigurationError, match="of 2 threads and there are 1 cores"):
        host(platforms={2: EvenPlatform()}, num_cores=1)


def test_a_plan_tries_each_power_of_two_of_threads_and_all_cores() -> None:
    assert list(platforms_on(EvenPlatform(), 6)) == [1, 2, 4, 6]
    assert list(platforms_on(EvenPlatform(), 1)) == [1]
