"""A report out of runs: which figures, of which load and window, and the page that holds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.bench.report.curves import draw_rate_curves, draw_scale_curves, rate_curves, scale_curves
from disagg.bench.report.distributions import draw_distributions
from disagg.bench.report.load_curves import draw_load_curves
from disagg.bench.report.picture import Picture
from disagg.bench.report.report_tables import (
    HEADLINE_COLUMNS,
    ClientRow,
    HeadlineRow,
    client_rows,
    goodput_rows,
    headline,
    machine_facts,
    settings_blocks,
)
from disagg.bench.report.runs import GoodputResult, Load, RunGroup, SystemRun, group_runs, systems_of
from disagg.bench.report.stage_bars import draw_stages
from disagg.bench.report.swimlanes import draw_lanes
from disagg.bench.report.theme import styles_of
from disagg.bench.report.window import Window, choose_window, stall_threshold_s, stalled_share, window_length_s
from disagg.bench.report.words import objectives, percent
from disagg.measure.slo import Slo

TARGET: Final = 0.9
"""Share of requests that must keep their objectives, unless said otherwise."""
_MAX_SYSTEMS_IN_LANES: Final = 3


@dataclass(frozen=True)
class ReportOptions:
    """What may be chosen. ``window`` None: where the answers spend most time in stalls."""

    title: str = "Serving benchmark"
    target: float = TARGET
    window: Window | None = None


@dataclass(frozen=True)
class WorkloadSection:
    """All that is told of one workload."""

    name: str
    slo: str
    groups: tuple[RunGroup, ...]
    focus: tuple[RunGroup, ...]
    """Those of the load that is looked at closely."""
    pictures: tuple[Picture, ...]
    goodput: tuple[GoodputResult, ...]

    @property
    def rows(self) -> list[list[Picture]]:
        """The figures as they stand on the page: narrow ones side by side."""
        narrow = [picture for picture in self.pictures if picture.is_narrow]
        return [*([narrow] if narrow else []), *([picture] for picture in self.pictures if not picture.is_narrow)]

    @property
    def headline(self) -> list[HeadlineRow]:
        """Rows of the first table."""
        return headline(self.focus)

    @property
    def all_loads(self) -> list[HeadlineRow]:
        """Rows of every load, where there are several."""
        return headline(self.groups) if len(self.groups) > len(self.focus) else []

    @property
    def goodput_rows(self) -> list[tuple[str, object, object]]:
        """Rows of the table of goodput searches."""
        return [*goodput_rows(self.goodput)]

    @property
    def client_rows(self) -> list[ClientRow]:
        """The client's own part."""
        return client_rows(self.groups)


@dataclass(frozen=True)
class Report:
    """The page and its figures."""

    title: str
    target: float
    runs: tuple[SystemRun, ...]
    sections: tuple[WorkloadSection, ...]

    @property
    def target_words(self) -> str:
        """The target for people."""
        return percent(self.target)

    @cached_property
    def systems(self) -> list[str]:
        """Names in order."""
        return systems_of(self.runs)

    def html(self) -> str:
        """Return one HTML document that loads nothing from anywhere."""
        import jinja2

        folder = Path(__file__).parent
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(folder),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        return environment.get_template("report.html").render(
            report=self,
            columns=HEADLINE_COLUMNS,
            settings=settings_blocks(self.runs),
            machines=machine_facts(self.runs),
        )

    def write(self, path: Path) -> None:
        """Write the page; raise ConfigurationError when the file cannot be written."""
        try:
            path.write_text(self.html(), encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"cannot write the report {path}: {error.strerror}") from error

    def write_pngs(self, folder: Path) -> list[Path]:
        """Write every figure as a PNG and return their paths; raise ConfigurationError when that is not possible."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"cannot make the folder {folder}: {error.strerror}") from error
        return [picture.write_png(folder) for section in self.sections for picture in section.pictures]


def make_report(
    runs: Sequence[SystemRun], goodput: Sequence[GoodputResult] = (), options: ReportOptions | None = None
) -> Report:
    """Draw a report about ``runs``, the first system being the one that others are compared with.

    Raises ConfigurationError when there are no runs, or when those of one workload have different objectives.
    """
    chosen = options or ReportOptions()
    if not runs:
        raise ConfigurationError("there is no run to report on")
    sections = []
    for index, workload in enumerate(dict.fromkeys(run.workload for run in runs)):
        of_workload = [run for run in runs if run.workload == workload]
        found = tuple(result for result in goodput if result.workload == workload)
        sections.append(_section(of_workload, found, chosen, prefix=f"w{index}", all_runs=runs))
    return Report(chosen.title, chosen.target, tuple(runs), tuple(sections))


def focus_groups(groups: Sequence[RunGroup], target: float) -> list[RunGroup]:
    """Return the groups of the load that is looked at closely.

    Of the loads under which most systems were run: the heaviest at which one of them still attains the target, or if
    none does, the lightest.
    """
    by_load: dict[str, list[RunGroup]] = {}
    for group in groups:
        by_load.setdefault(str(group.load), []).append(group)
    most = max(len(members) for members in by_load.values())
    candidates = [members for members in by_load.values() if len(members) == most]
    candidates.sort(key=lambda members: _weight(members[0].load))
    kept = [members for members in candidates if max(group.attainment().share for group in members) >= target]
    return kept[-1] if kept else candidates[0]


def _weight(load: Load) -> tuple[float, int, int]:
    """Return a key by which loads of one kind go from light to heavy."""
    return (load.rate if load.is_open_loop else 0.0, load.num_users, load.prompt_len)


def _section(
    runs: Sequence[SystemRun],
    goodput: tuple[GoodputResult, ...],
    options: ReportOptions,
    *,
    prefix: str,
    all_runs: Sequence[SystemRun],
) -> WorkloadSection:
    judged_by = dict.fromkeys(objectives(run.slo) for run in runs)
    if len(judged_by) > 1:
        raise ConfigurationError(
            f"runs of {runs[0].workload} were judged by different objectives ({'; '.join(judged_by)}): they cannot be "
            "compared; give one --slo for all"
        )
    groups = group_runs(runs)
    focus = focus_groups(groups, options.target)
    styles = styles_of(systems_of(all_runs))
    load = str(focus[0].load)
    pictures = []
    per_device = len({group.num_devices for group in groups}) > 1
    curves = rate_curves(groups, per_device=per_device)
    has_slo = runs[0].slo != Slo()
    if curves and has_slo:
        pictures.append(draw_rate_curves(curves, styles, options.target, per_device=per_device, name=f"{prefix}-rate"))
    answered = [group for group in focus if group.finished]
    if answered and has_slo:
        scales = scale_curves(answered)
        pictures.append(draw_scale_curves(scales, styles, options.target, load=load, name=f"{prefix}-scale"))
    pictures += draw_load_curves(groups, styles, name=f"{prefix}-load")
    if answered:
        pictures.append(draw_distributions(answered, styles, load=load, name=f"{prefix}-latencies"))
        if focus[0].load.num_users != 1:
            pictures.append(_lanes(answered, options, load, f"{prefix}-lanes"))
        pictures.append(draw_stages(answered, load=load, name=f"{prefix}-stages"))
    return WorkloadSection(
        runs[0].workload, objectives(runs[0].slo), tuple(groups), tuple(focus), tuple(pictures), goodput
    )


def _lanes(groups: Sequence[RunGroup], options: ReportOptions, load: str, name: str) -> Picture:
    """Draw the first run of each system, or of those with most and least stalls when there are many."""
    runs = [group.runs[0] for group in groups]
    threshold_s = stall_threshold_s(runs[0].slo, [record for run in runs for record in run.records])
    gaps = [gap for run in runs for record in run.records for gap in record.gaps_s]
    span_s = max(run.summary.span_s for run in runs)
    length_s = window_length_s(gaps, span_s)
    whole = Window(0.0, span_s)
    stalled = {run.system: stalled_share(run.records, threshold_s, whole) for run in runs}
    worst = max(runs, key=lambda run: stalled[run.system])
    window = options.window or choose_window(worst.records, threshold_s, length_s)
    if len(runs) > _MAX_SYSTEMS_IN_LANES:
        best = min(runs, key=lambda run: stalled[run.system])
        runs = [run for run in runs if run is worst or run is best]
    return draw_lanes(runs, window, threshold_s, load=load, name=name)
