"""Two servers in turn, end to end: what they are asked, in which order, and that nothing of them is left."""

import os
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from disagg.base.errors import DisaggError
from disagg.bench.client.prompt_texts import PromptSource, Words, english_text
from disagg.bench.compare.comparison import Comparison, ComparisonProgress
from disagg.bench.compare.spec import ClosedLoopCase, ComparisonSpec, OpenLoopCase, Pinning, SystemSpec
from disagg.bench.report.runs import SystemRun

FAKE = Path(__file__).with_name("fake_openai_server.py")


class WordTokenizer:
    """One token for each word."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [len(word) for word in text.split()]


@pytest.fixture(scope="module")
def source() -> PromptSource:
    tokenizer = WordTokenizer()
    return PromptSource(Words(english_text(), tokenizer), tokenizer.encode)


def fake(name: str, *flags: str) -> SystemSpec:
    return SystemSpec(name=name, command=f"{sys.executable} {FAKE} --port {{port}} {' '.join(flags)}")


def comparison(**overrides: object) -> ComparisonSpec:
    cases = (
        ClosedLoopCase(prompt_len=8, output_len=3, users=(2,), requests=4, slo=("ttft=1s,tpot=1s", "loose")),
        OpenLoopCase(prompt_len=8, output_len=2, rates=(200.0,), requests=3),
    )
    settings = {
        "systems": (fake("quick"), fake("slow", "--first-s", "0.05")),
        "cases": cases,
        "cool_down_s": 0.0,
        "settle_s": 0.0,
    }
    return ComparisonSpec(**{**settings, **overrides})  # type: ignore[arg-type]


def left_over() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and FAKE.name in " ".join(child.cmdline())
    ]


@pytest.fixture(scope="module")
def steps() -> list[ComparisonProgress]:
    return []


@pytest.fixture(scope="module")
def runs(
    source: PromptSource, steps: list[ComparisonProgress], tmp_path_factory: pytest.TempPathFactory
) -> list[SystemRun]:
    return list(Comparison(comparison(), source, tmp_path_factory.mktemp("logs"), steps.append).runs())


def test_the_order_of_the_systems_is_reversed_with_every_repeat(runs: list[SystemRun]) -> None:
    order = list(dict.fromkeys((run.seed, run.system) for run in runs))
    assert order == [(0, "quick"), (0, "slow"), (1, "slow"), (1, "quick")]


def test_every_system_gets_every_run_once_for_each_objective(runs: list[SystemRun]) -> None:
    assert set(Counter((run.system, run.workload, str(run.load)) for run in runs).values()) == {2}
    assert {(run.workload, str(run.load)) for run in runs} == {
        ("8 tokens in, 3 out, ttft=1s,tpot=1s", "2 users"),
        ("8 tokens in, 3 out, loose objectives", "2 users"),
        ("8 tokens in, 2 out", "200 requests/s"),
    }


def test_everything_was_answered_with_the_lengths_that_were_asked(runs: list[SystemRun]) -> None:
    assert all(len(run.finished) == len(run.records) for run in runs)
    assert {record.num_output_tokens for run in runs for record in run.records} == {2, 3}
    assert {record.prompt_len for run in runs for record in run.records} == {8}
    assert all(run.notes == () or "client" in "".join(run.notes) for run in runs)


def test_objectives_are_derived_from_the_first_system_and_the_same_for_all(runs: list[SystemRun]) -> None:
    derived = {run.slo for run in runs if "loose" in run.workload}
    assert len(derived) == 1


def test_settings_tell_how_each_was_run(runs: list[SystemRun]) -> None:
    settings = runs[0].settings
    assert str(FAKE) in settings["Command"]
    assert settings["Model"] == "fake"
    assert settings["Cores of the client"].endswith("(shared with the server)")
    assert runs[0].machine is not None
    assert runs[0].other_cores >= 0


def test_progress_is_told(runs: list[SystemRun], steps: list[ComparisonProgress]) -> None:
    assert steps[0].words == "starting quick"
    assert {step.num_runs for step in steps} == {8}
    assert runs


def test_nothing_is_left_behind(runs: list[SystemRun]) -> None:
    assert runs
    assert left_over() == []


def test_nothing_is_left_behind_by_who_stops_listening(source: PromptSource, tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    spec = comparison(cpus=Pinning(client=(min(before),), servers=(max(before),)))
    with closing(Comparison(spec, source, tmp_path).runs()) as found:
        run = next(found)
        assert left_over()
        assert os.sched_getaffinity(0) == {min(before)}
        assert run.num_devices == 1
    assert left_over() == []
    assert os.sched_getaffinity(0) == before


def test_a_pinned_client_does_not_pin_the_servers(source: PromptSource, tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    with closing(Comparison(comparison(cpus=Pinning(client=(min(before),))), source, tmp_path).runs()) as found:
        run = next(found)
        assert {frozenset(process.cpu_affinity()) for process in left_over()} == {frozenset(before)}
        assert run.num_devices == len(before)


def test_a_server_that_dies_while_it_is_measured_is_named(source: PromptSource, tmp_path: Path) -> None:
    with closing(Comparison(comparison(), source, tmp_path).runs()) as found:
        next(found)
        for process in left_over():
            process.kill()
        with pytest.raises(DisaggError):
            list(found)
    assert left_over() == []
