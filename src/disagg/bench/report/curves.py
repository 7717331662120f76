"""DistServe's two curves: SLO attainment against the arrival rate, and against the scale of the objectives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from disagg.bench.report.picture import Picture
from disagg.bench.report.runs import Interval, RunGroup
from disagg.bench.report.theme import FAINT, Place, SeriesStyle, add_legend, draw_spread, house_style
from disagg.bench.report.words import by_system, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCALES: Final = tuple(float(2.0**power) for power in np.arange(-2, 2.01, 0.125))
"""Factors on both objectives, from a quarter to four times."""
_SIZE: Final = (4.6, 3.1)


@dataclass(frozen=True)
class AttainmentCurve:
    """Attainment of one system at rising values of ``x``."""

    system: str
    x: tuple[float, ...]
    attainment: tuple[Interval, ...]

    def last_above(self, target: float) -> float | None:
        """Return where it first falls below ``target``, between points on a straight line; None when it never does.

        NaN when it starts below.
        """
        shares = [point.share for point in self.attainment]
        for index, share in enumerate(shares):
            if share < target:
                if index == 0:
                    return float("nan")
                before, part = shares[index - 1], (shares[index - 1] - target) / (shares[index - 1] - share)
                assert before >= target
                return self.x[index - 1] + part * (self.x[index] - self.x[index - 1])
        return None

    def first_above(self, target: float) -> float | None:
        """Return the first ``x`` at which it reaches ``target``; None when it never does."""
        reached = (x for x, point in zip(self.x, self.attainment, strict=True) if point.share >= target)
        return next(reached, None)


def rate_curves(groups: Sequence[RunGroup], *, per_device: bool) -> list[AttainmentCurve]:
    """Return attainment against the arrival rate, for each system driven by an open loop at two rates or more."""
    by_system: dict[str, list[RunGroup]] = {}
    for group in groups:
        if group.load.is_open_loop:
            by_system.setdefault(group.system, []).append(group)
    curves = []
    for system, members in by_system.items():
        members.sort(key=lambda group: group.load.rate)
        if len(members) > 1:
            x = tuple(group.load.rate / (group.num_devices if per_device else 1) for group in members)
            curves.append(AttainmentCurve(system, x, tuple(group.attainment() for group in members)))
    return curves


def scale_curves(groups: Sequence[RunGroup]) -> list[AttainmentCurve]:
    """Return attainment against the scale of the objectives, of systems under one load."""
    return [
        AttainmentCurve(group.system, SCALES, tuple(group.attainment(scale) for scale in SCALES))
        for group in groups
        if group.finished
    ]


def draw_rate_curves(
    curves: Sequence[AttainmentCurve], styles: dict[str, SeriesStyle], target: float, *, per_device: bool, name: str
) -> Picture:
    """Draw attainment against rate."""
    from matplotlib.figure import Figure

    with house_style():
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        _draw(axes, curves, styles, target, markers=True)
        add_legend(figure, axes)
        axes.set_xlim(left=0)
        axes.set_xlabel("Arrival rate" + (" per device" if per_device else "") + " (requests/s)")
    return Picture(
        name=name,
        title=_rate_title(curves, target),
        caption=(
            "Share of all requests that kept both objectives, against the arrival rate; bands, or bars, are 95 % "
            f"intervals. The dashed line is the target of {percent(target)}: where a curve crosses it lies the goodput."
        ),
        figure=figure,
        readings={axes: ("{} requests/s", "{} % attainment")},
    )


def draw_scale_curves(
    curves: Sequence[AttainmentCurve], styles: dict[str, SeriesStyle], target: float, *, load: str, name: str
) -> Picture:
    """Draw attainment against SLO scale."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    with house_style():
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        _draw(axes, curves, styles, target, markers=False)
        add_legend(figure, axes)
        axes.axvline(1, color=FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_xlim(SCALES[0], SCALES[-1])
        axes.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("SLO scale (factor on both objectives; left is tighter)")
    return Picture(
        name=name,
        title=_scale_title(curves, target, load),
        caption=(
            f"The same runs at {load}, judged by objectives tightened or loosened by a common factor; 1 is the SLO as "
            "given. The further left a curve reaches the target, the tighter the objectives that system can keep."
        ),
        figure=figure,
        readings={axes: ("scale {}", "{} % attainment")},
    )


def _draw(
    axes: "Axes", curves: Sequence[AttainmentCurve], styles: dict[str, SeriesStyle], target: float, *, markers: bool
) -> None:
    for index, curve in enumerate(curves):
        style = styles[curve.system]
        shares, low, high = (
            [getattr(point, field) * 100 for point in curve.attainment] for field in ("share", "low", "high")
        )
        place = Place(index, len(curves))
        if markers or not place.is_crowded:
            draw_spread(axes, curve.x, low, high, style, place)
        axes.plot(
            curve.x,
            shares,
            color=style.colour,
            linestyle=style.dashes,
            marker=style.marker,
            markevery=1 if markers else 4,
            label=curve.system,
            clip_on=False,
        )
    axes.axhline(target * 100, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_ylim(0, 100)
    axes.set_ylabel("SLO attainment (%)")
    axes.margins(x=0.02)


def _rate_title(curves: Sequence[AttainmentCurve], target: float) -> str:
    limits: dict[str, float] = {}
    beyond: set[float] = set()
    for curve in curves:
        limit = curve.last_above(target)
        if limit is None:
            beyond.add(limit := curve.x[-1])
        limits[curve.system] = 0.0 if np.isnan(limit) else limit

    def words(limit: float) -> str:
        if limit == 0:
            return "at no rate that was tried"
        return f"{'beyond' if limit in beyond else 'up to'} {limit:.3g}"

    return f"{percent(target)} of requests keep their objectives, in requests/s: {by_system(limits, words)}"


def _scale_title(curves: Sequence[AttainmentCurve], target: float, load: str) -> str:
    tightest = {curve.system: curve.first_above(target) or np.inf for curve in curves}
    told = by_system(tightest, lambda scale: "none of these" if np.isinf(scale) else f"×{scale:.2g}")
    return f"At {load} {percent(target)} keep objectives as tight as: {told}"
