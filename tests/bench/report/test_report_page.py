"""The page as a browser gets it: well formed, loading nothing, and showing stalls where there are some."""

import html.parser
import re
from dataclasses import replace
from pathlib import Path

import pytest
from simulated_runs import SLO, all_runs, run

from disagg.base.errors import ConfigurationError
from disagg.bench.report.report import Report, ReportOptions, make_report
from disagg.bench.report.runs import GoodputResult, Load
from disagg.bench.report.saved import read_results, write_results
from disagg.bench.report.swimlanes import draw_lanes, lane_bars
from disagg.bench.report.window import Window
from disagg.measure.slo import Slo
from disagg.measure.statistics import Estimate

FIGURES = ["w0-rate", "w0-scale", "w0-load-ttft", "w0-load-tpot", "w0-latencies", "w0-lanes", "w0-stages"]
VOID = {"meta", "br", "img", "hr", "link", "input"}


class PageParser(html.parser.HTMLParser):
    """Notes what is open, every id, every address and every tip; complains about anything closed out of turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.tips: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in {"src", "href", "xlink:href", "data", "action"}:
                self.loads.append(value or "")
            elif name == "data-tip":
                self.tips.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report() -> Report:
    goodput = [
        GoodputResult("colocated", "chat", 2, 0.9, Estimate(mean=2.1, half_width=0.2)),
        GoodputResult("disaggregated", "chat", 2, 0.9, Estimate(mean=2.5, half_width=float("nan"))),
    ]
    return make_report(list(all_runs(1, 3)), goodput, ReportOptions(title="Two <devices> & a title"))


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return report.html()


@pytest.fixture(scope="module")
def page(text: str) -> PageParser:
    parser = PageParser()
    parser.feed(text)
    parser.close()
    return parser


def test_the_page_is_well_formed(page: PageParser) -> None:
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))


def test_the_page_loads_nothing(text: str, page: PageParser) -> None:
    assert all(address.startswith("#") for address in page.loads)
    assert set(page.loads) <= {f"#{name}" for name in page.ids}
    addresses = set(re.findall(r"https?://[^\s\"']+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_every_colour_is_one_of_the_page(text: str) -> None:
    """So that light, dark and paper each get their own."""
    assert not re.findall(r"(?:fill|stroke): #", text)
    named = set(re.findall(r"var\((--[a-z-]+)\)", text))
    assert all(f"{name}: #" in text for name in named)


def test_a_title_is_text_not_markup(text: str) -> None:
    assert "Two &lt;devices&gt; &amp; a title" in text


def test_figures_say_what_one_sees(report: Report) -> None:
    titles = {picture.name: picture.title for section in report.sections for picture in section.pictures}
    assert list(titles) == FIGURES
    assert "no stalls with disaggregated" in titles["w0-lanes"]
    assert re.search(r"\d+ stalls with colocated", titles["w0-lanes"])


def test_every_request_in_the_lanes_tells_about_itself(report: Report, page: PageParser) -> None:
    assert page.tips
    assert all(re.match(r"request \d+: \d+ prompt tokens, \d+ answered · TTFT", tip) for tip in page.tips)


def test_goodput_is_told_per_device(report: Report) -> None:
    assert [(name, each.text) for name, _, each in report.sections[0].goodput_rows] == [  # type: ignore[attr-defined]
        ("colocated", "1.05"),
        ("disaggregated", "1.25"),
    ]


def test_a_closed_loop_has_no_rate_curve() -> None:
    runs = [replace(run(name, 2.0), load=Load(num_users=8)) for name in ("colocated", "disaggregated")]
    (section,) = make_report(runs).sections
    assert [picture.name for picture in section.pictures] == ["w0-scale", "w0-latencies", "w0-lanes", "w0-stages"]


def test_more_users_are_drawn_against_throughput() -> None:
    runs = [replace(run("colocated", rate), load=Load(num_users=users)) for rate, users in ((1.0, 2), (3.0, 8))]
    titles = {picture.name: picture.title for picture in make_report(runs).sections[0].pictures}
    assert titles["w0-load-output"].endswith("tokens/s with colocated")
    assert titles["w0-load-tpot"].startswith("Median TPOT at 8 users: ")


def test_single_requests_are_drawn_against_their_prompts_without_lanes() -> None:
    loads = (Load(num_users=1, prompt_len=128), Load(num_users=1, prompt_len=1024))
    runs = [replace(run("colocated", 0.1, count=3), load=load, slo=Slo()) for load in loads]
    names = [picture.name for picture in make_report(runs).sections[0].pictures]
    assert names == ["w0-load-ttft", "w0-load-tpot", "w0-latencies", "w0-stages"]


def test_many_systems_have_a_style_each_and_a_legend_below() -> None:
    runs = [replace(run("colocated", rate, count=20), system=f"system {n}") for n in range(5) for rate in (1.0, 2.0)]
    (section,) = make_report(runs).sections
    rate = section.pictures[0]
    assert rate.figure.axes[0].get_legend() is None
    assert [text.get_text() for text in rate.figure.legends[0].get_texts()] == [f"system {n}" for n in range(5)]
    lanes = next(picture for picture in section.pictures if picture.name == "w0-lanes")
    assert len(lanes.figure.axes) <= 3


def test_the_load_of_a_closed_loop_is_named() -> None:
    (section,) = make_report([replace(run("colocated", 2.0), load=Load(num_users=8))]).sections
    assert section.headline[0].load == "8 users"


def test_runs_in_which_nothing_finished_are_told_without_figures() -> None:
    runs = [replace(run("colocated", 2.0), records=())]
    (section,) = make_report(runs).sections
    assert section.pictures == ()
    assert "colocated" in make_report(runs).html()


def test_lanes_show_the_window_that_was_asked_for() -> None:
    bars = lane_bars(run("colocated", 3.0).records, Window(5.0, 2.0))
    assert bars
    assert all(bar.sent_s < 7.0 and bar.end_s > 5.0 for bar in bars)
    assert all(bar.sent_s <= bar.prefill_s <= bar.first_token_s <= bar.ready_s <= bar.end_s for bar in bars)


def test_more_requests_than_lanes_are_counted() -> None:
    crowded = run("colocated", 60.0, count=80)
    picture = draw_lanes([crowded], Window(0.0, 30.0), 0.05, load="60 requests/s", name="lanes")
    assert "more not shown" in picture.figure.axes[0].get_title(loc="left")


def test_different_objectives_cannot_be_compared() -> None:
    runs = [run("colocated", 1.0), run("disaggregated", 1.0, slo=Slo(ttft_s=1.0))]
    with pytest.raises(ConfigurationError, match="TTFT ≤ 800 ms, TPOT ≤ 50 ms; TTFT ≤ 1 s"):
        make_report(runs)


def test_no_run_no_report() -> None:
    with pytest.raises(ConfigurationError, match="no run"):
        make_report([])


def test_png_files_carry_their_title(report: Report, tmp_path: Path) -> None:
    paths = report.write_pngs(tmp_path / "figures")
    assert [path.stem for path in paths] == FIGURES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_saved_results_come_back_as_they_were(tmp_path: Path) -> None:
    runs = [*all_runs(1, count=5), replace(run("colocated", 1.0, count=3, slo=Slo()), load=Load(num_users=2))]
    goodput = [GoodputResult("colocated", "chat", 2, 0.9, Estimate(mean=2.1, half_width=0.2))]
    write_results(tmp_path / "new" / "results.json", runs, goodput)
    found = read_results(tmp_path / "new" / "results.json")
    assert list(found.goodput) == goodput
    assert [one.records for one in found.runs] == [one.records for one in runs]
    assert [(one.system, str(one.load), one.slo, one.settings, one.machine) for one in found.runs] == [
        (one.system, str(one.load), one.slo, one.settings, one.machine) for one in runs
    ]
    assert runs[0].slo == SLO


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{}", "holds no saved results: Object missing required field `format`"),
        ('{"format": "disagg-results-1", "runs": [{"sytem": 1}]}', r"unknown field `sytem` - at `\$.runs\[0\]`"),
        ('{"format": "disagg-results-9", "runs": []}', "is of the format 'disagg-results-9'"),
    ],
)
def test_other_files_are_refused_by_place(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=complaint):
        read_results(path)
