"""How latencies are distributed: TTFT and TPOT as shares of requests, gaps by how rare the long ones are."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from disagg.bench.report.picture import Picture
from disagg.bench.report.runs import RunGroup
from disagg.bench.report.theme import FAINT, SeriesStyle, house_style
from disagg.bench.report.words import by_system, objective, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE: Final = (9.6, 3.1)
_MAX_POINTS: Final = 300
_TICK_DIGITS: Final = (
    (6.0, (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
    (40.0, (1.0, 2.0, 5.0)),
    (1000.0, (1.0, 3.0)),
    (np.inf, (1.0,)),
)
"""Leading digits of the numbers on an axis that reaches over less than this factor."""
Floats = NDArray[np.float64]


def draw_distributions(groups: Sequence[RunGroup], styles: dict[str, SeriesStyle], *, load: str, name: str) -> Picture:
    """Draw the distributions of TTFT, TPOT and the gaps between tokens, of systems under one load."""
    from matplotlib.figure import Figure

    slo = groups[0].slo
    with house_style():
        figure = Figure(figsize=_SIZE, layout="constrained")
        ttft, tpot, itl = figure.subplots(1, 3)
        _draw_shares(ttft, groups, styles, lambda group: [record.ttft_s for record in group.finished])
        _draw_shares(tpot, groups, styles, lambda group: [record.tpot_s for record in group.finished])
        _draw_tails(itl, groups, styles)
        for axes, title, limit_s in (
            (ttft, "Time to first token", slo.ttft_s),
            (tpot, "Time per output token", slo.tpot_s),
            (itl, "Gap between tokens", float("inf")),
        ):
            _finish(axes, title, limit_s)
        ttft.set_ylabel("Requests that are faster (%)")
        itl.set_ylabel("Gaps that are longer (%)")
        handles, labels = ttft.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return Picture(
        name=name,
        title=_title(groups, load),
        caption=(
            "Times on a logarithmic axis. Left and middle: the share of finished requests up to each time, and the "
            "objective as a dashed line. Right: the share of gaps longer than each time, on a logarithmic axis too: "
            "stalls are rare among all gaps, and live in its lower right corner."
        ),
        figure=figure,
        readings={
            ttft: ("TTFT {} ms", "{} % are faster"),
            tpot: ("TPOT {} ms", "{} % are faster"),
            itl: ("gap {} ms", "{} % are longer"),
        },
    )


def cumulative_shares(values: Sequence[float]) -> tuple[Floats, Floats]:
    """Return sorted values and, in percent, how many are at most as large; at most 300 points, both ends kept."""
    data = np.sort(np.asarray(values, dtype=np.float64))
    data = data[~np.isnan(data)]
    chosen = _thin(len(data))
    return data[chosen], 100.0 * (chosen + 1) / max(1, len(data))


def tail_shares(values: Sequence[float]) -> tuple[Floats, Floats]:
    """Return sorted values and, in percent, how many are at least as large; the points lie densest at the long end."""
    data = np.sort(np.asarray(values, dtype=np.float64))
    if not len(data):
        return data, data
    # Equal steps of the logarithm of the rank, counted from the longest.
    ranks = np.unique(np.geomspace(1, len(data), _MAX_POINTS).round().astype(np.int64))[::-1]
    return data[len(data) - ranks], 100.0 * ranks / len(data)


def _thin(count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, _MAX_POINTS)).round().astype(np.int64))


def _draw_shares(
    axes: "Axes",
    groups: Sequence[RunGroup],
    styles: dict[str, SeriesStyle],
    values: Callable[[RunGroup], list[float]],
) -> None:
    for group in groups:
        x, y = cumulative_shares(values(group))
        style = styles[group.system]
        axes.step(x * 1e3, y, where="post", color=style.colour, linestyle=style.dashes, label=group.system)
    axes.set_ylim(0, 100)


def _draw_tails(axes: "Axes", groups: Sequence[RunGroup], styles: dict[str, SeriesStyle]) -> None:
    for group in groups:
        x, y = tail_shares(list(chain.from_iterable(record.gaps_s for record in group.finished)))
        style = styles[group.system]
        axes.plot(x * 1e3, y, color=style.colour, linestyle=style.dashes)
    axes.set_yscale("log")
    axes.set_ylim(top=100)


def _finish(axes: "Axes", title: str, limit_s: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_title(title)
    axes.set_xscale("log")
    axes.set_xlabel("ms")
    low, high = axes.get_xlim()
    digits = next(digits for reach, digits in _TICK_DIGITS if high < reach * low)
    axes.xaxis.set_major_locator(LogLocator(subs=digits, numticks=12))
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(plain)
    axes.tick_params(axis="x", labelsize=8)
    if np.isfinite(limit_s):
        axes.axvline(limit_s * 1e3, color=FAINT, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"SLO {objective(limit_s)}",
            (limit_s * 1e3, 4),
            xytext=(-3, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            color=FAINT,
            size=8,
        )


def _title(groups: Sequence[RunGroup], load: str) -> str:
    longest = {group.system: group.itl.p99 for group in groups}
    return f"At {load} one gap in a hundred is longer than: {by_system(longest, seconds)}"
