"""What happens as the load grows: latencies and throughput against arrival rate, number of users or prompt length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from disagg.bench.report.picture import Picture
from disagg.bench.report.runs import Load, RunGroup
from disagg.bench.report.theme import Place, SeriesStyle, add_legend, draw_spread, house_style
from disagg.bench.report.words import by_system, number, seconds
from disagg.measure.statistics import Percentiles

_SIZE: Final = (4.6, 3.1)
_LOG_FROM: Final = 20.0
"""Values that differ by more than this factor are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class _X:
    """What grows."""

    label: str
    reading: str
    of: Callable[[Load], float]
    at: Callable[[float], str]
    """In words: at this load."""


@dataclass(frozen=True)
class _Y:
    """What follows: the line, and the upper end of its band."""

    key: str
    label: str
    reading: str
    title: str
    of: Callable[[RunGroup], tuple[float, float]]
    words: Callable[[float], str]


def draw_load_curves(groups: Sequence[RunGroup], styles: dict[str, SeriesStyle], *, name: str) -> list[Picture]:
    """Return two figures about runs of one kind of load, or none where no system has two loads."""
    loads = {str(group.load): group.load for group in groups}
    if len(loads) < 2:
        return []
    x, ys = _axes_of(next(iter(loads.values())))
    return [_draw(groups, styles, x, y, f"{name}-{y.key}") for y in ys]


def _axes_of(load: Load) -> tuple[_X, tuple[_Y, _Y]]:
    if load.is_open_loop:
        rate = _X("Arrival rate (requests/s)", "{} requests/s", lambda one: one.rate, lambda x: f"{x:.3g} requests/s")
        return rate, (_TTFT, _TPOT)
    if load.prompt_len:
        length = _X(
            "Prompt length (tokens)", "{} tokens", lambda one: one.prompt_len, lambda x: f"{x:,.0f} prompt tokens alone"
        )
        return length, (_TTFT, _TPOT)
    users = _X("Users at once", "{} users", lambda one: one.num_users, lambda x: f"{x:.0f} users")
    return users, (_OUTPUT, _TPOT)


def _latency(key: str, name: str, get: Callable[[RunGroup], Percentiles]) -> _Y:
    return _Y(
        key=key,
        label=f"{name} (ms)",
        reading=f"{name} {{}} ms",
        title=f"Median {name}",
        of=lambda group: (get(group).p50 * 1e3, get(group).p90 * 1e3),
        words=lambda value: seconds(value * 1e-3),
    )


def _output_rate(group: RunGroup) -> tuple[float, float]:
    rate = group.mean(lambda summary: summary.output_tokens_per_s)
    return rate, rate


_TTFT: Final = _latency("ttft", "TTFT", lambda group: group.ttft)
_TPOT: Final = _latency("tpot", "TPOT", lambda group: group.tpot)
_OUTPUT: Final = _Y(
    key="output",
    label="Output (tokens/s)",
    reading="{} tokens/s",
    title="Output",
    of=_output_rate,
    words=lambda value: f"{number(value)} tokens/s",
)


def _draw(groups: Sequence[RunGroup], styles: dict[str, SeriesStyle], x: _X, y: _Y, name: str) -> Picture:
    from matplotlib.figure import Figure

    points: dict[str, list[tuple[float, float, float]]] = {group.system: [] for group in groups}
    for group in sorted(groups, key=lambda group: x.of(group.load)):
        if group.finished:
            points[group.system].append((x.of(group.load), *y.of(group)))
    with house_style():
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for index, (system, found) in enumerate(points.items()):
            if not found:
                continue
            at, line, top = zip(*found, strict=True)
            style = styles[system]
            draw_spread(axes, at, line, top, style, Place(index, len(points)))
            axes.plot(at, line, color=style.colour, linestyle=style.dashes, marker=style.marker, label=system)
        values = [value for found in points.values() for _, *both in found for value in both if value > 0]
        if values and max(values) > _LOG_FROM * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel(x.label)
        axes.set_ylabel(y.label)
        add_legend(figure, axes)
    band = "" if y is _OUTPUT else " Lines are medians; bands, or bars, reach up to the 90th percentile."
    return Picture(
        name=name,
        title=_title(points, x, y),
        caption=f"{y.label.split(' (')[0]} against {x.label[0].lower()}{x.label[1:].split(' (')[0]}.{band}",
        figure=figure,
        readings={axes: (x.reading, y.reading)},
    )


def _title(points: dict[str, list[tuple[float, float, float]]], x: _X, y: _Y) -> str:
    """Say what each system does at the highest load that it was put under."""
    highest = max((found[-1][0] for found in points.values() if found), default=0.0)
    last = {system: found[-1][1] for system, found in points.items() if found and found[-1][0] == highest}
    return f"{y.title} at {x.at(highest)}: {by_system(last, y.words)}"
