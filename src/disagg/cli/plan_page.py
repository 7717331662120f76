"""The page of ``disagg plan --html``: the frontier, the curves, and which instance is on which device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.bench.report.curves import AttainmentCurve, draw_rate_curves, draw_scale_curves
from disagg.bench.report.picture import Picture
from disagg.bench.report.runs import Interval
from disagg.bench.report.theme import SeriesStyle, add_legend, house_style, styles_of
from disagg.cli.plan_report import effort_words, router_words
from disagg.costs.topology import read_devices
from disagg.placement.plan import Plan, PlannedCurve, PlannedPlacement

_SIZE: Final = (9.2, 3.4)
_ROLE_COLOURS: Final = {"prefill": "blue", "decode": "vermillion", "colocated": "green"}


@dataclass(frozen=True)
class DrawnDevice:
    """One square of the drawing."""

    index: int
    label: str
    colour: str


@dataclass(frozen=True)
class DrawnNode:
    """A row of the drawing."""

    name: str
    devices: tuple[DrawnDevice, ...]


def write_page(plan: Plan, path: Path) -> None:
    """Write the page, which loads nothing from anywhere. Raises ConfigurationError when it cannot be written."""
    try:
        path.write_text(page(plan), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write the page {path}: {error.strerror}") from error


def page(plan: Plan) -> str:
    """Return the page."""
    import jinja2

    import disagg.bench.report as report_files

    folders = [Path(__file__).parent, Path(next(iter(report_files.__path__)))]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("plan_page.html").render(
        plan=plan,
        best=plan.best,
        wanted="as many requests as the cluster can"
        if plan.target_rate is None
        else f"{plan.target_rate:g} requests/s",
        nodes=draw_nodes(plan.best),
        rows=_rows(list(_pictures(plan))),
        router=None if plan.behind_one_router is None else router_words(plan),
        effort=effort_words(plan),
    )


def draw_nodes(placement: PlannedPlacement) -> list[DrawnNode]:
    """Return the nodes that a placement is on, device by device; the idle ones between used ones too."""
    taken: dict[str, dict[int, DrawnDevice]] = {}
    counts: dict[str, int] = {}
    for group in placement.placement.groups:
        devices = read_devices(group.devices)
        size = group.tensor_parallel * group.pipeline_parallel
        for start in range(0, len(devices), size):
            role = group.role.value
            number = counts[role] = counts.get(role, -1) + 1
            for device in devices[start : start + size]:
                square = DrawnDevice(device.index, f"{role[0].upper()}{number}", _ROLE_COLOURS[role])
                taken.setdefault(device.node, {})[device.index] = square
    return [
        DrawnNode(name, tuple(found.get(index) or DrawnDevice(index, "", "grid") for index in range(max(found) + 1)))
        for name, found in sorted(taken.items())
    ]


def _rows(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """Return the figures as they stand on the page: narrow ones side by side, below the others."""
    narrow = [picture for picture in pictures if picture.is_narrow]
    return [*([picture] for picture in pictures if not picture.is_narrow), *([narrow] if narrow else [])]


def _pictures(plan: Plan) -> Iterator[Picture]:
    yield _frontier(plan.placements)
    styles = styles_of([curve.words for curve in plan.curves if curve.over == "rate per device"])
    for over, name in (("rate per device", "rates"), ("SLO scale", "scales")):
        curves = [_curve(curve) for curve in plan.curves if curve.over == over]
        if curves and name == "rates":
            yield draw_rate_curves(curves, styles, plan.target.attainment, per_device=True, name=name)
        elif curves:
            load = f"{plan.best.goodput_per_device.mean:.3g} requests/s per device"
            yield draw_scale_curves(curves, styles, plan.target.attainment, load=load, name=name)


def _curve(curve: PlannedCurve) -> AttainmentCurve:
    points = tuple(Interval(one.share, one.low, one.high) for one in curve.attainment)
    return AttainmentCurve(curve.words, curve.x, points)


def _frontier(placements: Sequence[PlannedPlacement]) -> Picture:
    """Draw what each placement serves for what it costs, unit by unit."""
    from matplotlib.figure import Figure

    priced = all(one.price_per_hour is not None for one in placements)
    styles = styles_of([one.words for one in placements])
    with house_style():
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for one in placements:
            _units(axes, one, styles[one.words], priced)
        add_legend(figure, axes)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("Dollars an hour" if priced else "Devices")
        axes.set_ylabel("Goodput (requests/s)")
    return Picture(
        name="frontier",
        title="Goodput against cost",
        caption="Each placement with one unit, two, and so on; the last point is the placement as it is written. What "
        "lies above and to the left is better.",
        figure=figure,
        readings={axes: ("{} dollars an hour" if priced else "{} devices", "{} requests/s")},
    )


def _units(axes: "object", one: PlannedPlacement, style: SeriesStyle, priced: bool) -> None:
    parts = [number / one.num_units for number in range(1, one.num_units + 1)]
    cost = (one.price_per_hour or 0.0) if priced else one.num_devices
    axes.plot(  # type: ignore[attr-defined]
        [cost * part for part in parts],
        [one.goodput.mean * part for part in parts],
        color=style.colour,
        linestyle=style.dashes,
        marker=style.marker,
        label=one.words,
        clip_on=False,
    )
