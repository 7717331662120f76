from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from disagg.bench.report.runs import Load, SystemRun
from disagg.bench.report.saved import write_results
from disagg.cli.main import main
from disagg.measure.record import Ending, RequestRecord
from disagg.measure.slo import Slo


def run(system: str, gap_s: float) -> SystemRun:
    records = []
    for index in range(6):
        events = tuple(index * 0.5 + 0.1 + gap_s * number for number in range(20))
        records.append(
            RequestRecord(
                index=index,
                request_id=str(index),
                prompt_len=10,
                max_output_len=20,
                due_s=index * 0.5,
                sent_s=index * 0.5,
                finished_s=events[-1],
                event_s=events,
                event_tokens=(1,) * 20,
                ending=Ending.FINISHED,
            )
        )
    return SystemRun(
        system=system,
        workload="chat",
        load=Load(rate=2.0),
        seed=0,
        num_devices=2,
        slo=Slo(ttft_s=0.5, tpot_s=0.05),
        records=tuple(records),
        settings={"Command": f"serve-{system}"},
    )


@pytest.fixture
def results(tmp_path: Path) -> list[str]:
    paths = []
    for system, gap_s in (("slow", 0.06), ("quick", 0.02)):
        path = tmp_path / f"{system}.json"
        write_results(path, [run(system, gap_s)])
        paths.append(str(path))
    return paths


def report(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", "report", *arguments])


def test_results_of_several_files_become_one_page(results: list[str], tmp_path: Path) -> None:
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    done = report(*results, "-o", str(page), "--png", str(figures), "--title", "Slow and quick")
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "<title>Slow and quick</title>" in text
    assert text.index("serve-slow") < text.index("serve-quick")
    assert len(list(figures.glob("*.png"))) == 4
    assert "wrote 4 figures" in done.output


def test_a_window_can_be_chosen(results: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert report(*results, "-o", str(page), "--window", "1.5,0.5").exit_code == 0
    assert "0.5 s at 2 requests/s" in page.read_text()


@pytest.mark.parametrize("window", ["1", "1,0", "a,b", "-1,2", "1,nan", "inf,1", f"1,{'9' * 400}", "9" * 17 + ",1"])
def test_a_wrong_window_is_refused(results: list[str], window: str) -> None:
    done = report(*results, "--window", window)
    assert done.exit_code == 2
    assert "12.5,2" in done.output


def test_files_that_are_not_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[]")
    done = report(str(tmp_path / "other.json"))
    assert done.exit_code == 2
    assert "other.json holds no saved results" in done.output
    assert report(str(tmp_path / "absent.json")).exit_code == 2


def test_a_page_that_cannot_be_written_is_an_error(results: list[str], tmp_path: Path) -> None:
    done = report(*results, "-o", str(tmp_path / "no" / "such" / "folder.html"))
    assert done.exit_code == 2
    assert "cannot write the report" in done.output
