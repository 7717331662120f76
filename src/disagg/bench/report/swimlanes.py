"""A window of a run, request by request: waiting, first token, every later token, and the gaps that are stalls."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from disagg.bench.report.picture import Picture
from disagg.bench.report.runs import SystemRun
from disagg.bench.report.theme import BLUE, FAINT, GREEN, INK, ORANGE, QUEUE, VERMILLION, house_style
from disagg.bench.report.window import Window, pack_lanes, stalled_share, stalls
from disagg.bench.report.words import objective, percent, seconds
from disagg.measure.record import RequestRecord
from disagg.measure.timeline import Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LANES: Final = 48
_WIDTH_IN: Final = 9.6
_LANE_IN: Final = 0.15
_LABELLED_SHARE: Final = 0.06
"""Bars that are a smaller share of the window have no room for a number."""
_HALF: Final = 0.36
"""Half of a bar's height, in lanes."""
_STALL_FACE: Final = (VERMILLION, 0.3)
_HAND_OVER: Final = tuple(
    stage.value for stage in (Stage.HAND_OVER_CONTROL, Stage.HAND_OVER_WAIT, Stage.HAND_OVER, Stage.QUEUE_DECODE)
)


@dataclass(frozen=True)
class LaneBar:
    """One request in its lane. Times in seconds since the start of the run, NaN where there was none."""

    record: RequestRecord
    lane: int
    sent_s: float
    prefill_s: float
    """Start of its prefill, where the server tells it; else as ``sent_s``."""
    first_token_s: float
    ready_s: float
    """End of the hand-over of its KV blocks; as ``first_token_s`` without one."""
    end_s: float


def lane_bars(records: Sequence[RequestRecord], window: Window) -> list[LaneBar]:
    """Return the requests that are seen in a window, in lanes in the order in which they were sent."""
    seen = []
    for record in records:
        if math.isnan(record.sent_s):
            continue
        end_s = record.event_s[-1] if record.event_s else record.finished_s
        end_s = window.end_s if math.isnan(end_s) else end_s
        if window.overlaps(record.sent_s, end_s):
            seen.append((record, end_s))
    seen.sort(key=lambda pair: pair[0].sent_s)
    lanes = pack_lanes([(record.sent_s, end_s) for record, end_s in seen])
    return [_bar(record, lane, end_s) for (record, end_s), lane in zip(seen, lanes, strict=True)]


def draw_lanes(runs: Sequence[SystemRun], window: Window, threshold_s: float, *, load: str, name: str) -> Picture:
    """Draw the same window of runs of the same requests, one system above the other."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    bars = [lane_bars(run.records, window) for run in runs]
    num_lanes = [max(4, min(MAX_LANES, max((bar.lane + 1 for bar in found), default=0))) for found in bars]
    tips: dict[str, str] = {}
    with house_style():
        height = sum(num_lanes) * _LANE_IN + 0.42 * len(runs) + 0.75
        figure = Figure(figsize=(_WIDTH_IN, height), layout=ConstrainedLayoutEngine(hspace=0.02))
        panels = figure.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=num_lanes)[:, 0]
        for index, (axes, run, found, lanes) in enumerate(zip(panels, runs, bars, num_lanes, strict=True)):
            tips |= _draw_panel(axes, found, threshold_s, f"lane{index}")
            _label_longest(axes, found, threshold_s, window)
            share = percent(stalled_share(run.records, threshold_s, window))
            num_hidden = sum(bar.lane >= lanes for bar in found)
            hidden = f" ({num_hidden} more not shown)" if num_hidden else ""
            axes.set_title(f"{run.system}: {share} of answering time in stalls{hidden}")
            axes.set_ylim(lanes - 0.4, -0.6)
        panels[0].set_xlim(window.start_s, window.end_s)
        panels[-1].set_xlabel("Time since the start of the run (s)")
        _draw_legend(figure, threshold_s, has_hand_over=any(bar.ready_s > bar.first_token_s for f in bars for bar in f))
    return Picture(
        name=name,
        title=_title(runs, window, threshold_s, load),
        caption=(
            "One bar for each request, packed into lanes; a tick for each token that reached the client. The same "
            f"requests, sent at the same moments, and the same {window.length_s:g} s of every run. A red bar is a gap "
            f"of more than {objective(threshold_s)} inside an answer: a reader sees the text stop."
        ),
        figure=figure,
        tips=tips,
        readings=dict.fromkeys(panels, ("{} s", "")),
    )


def _bar(record: RequestRecord, lane: int, end_s: float) -> LaneBar:
    first_s = record.event_s[0] if record.event_s else end_s
    queued_s = record.stages.get(Stage.QUEUE_PREFILL.value, 0.0)
    handed_s = sum(record.stages.get(stage, 0.0) for stage in _HAND_OVER) if len(record.event_s) > 1 else 0.0
    return LaneBar(
        record=record,
        lane=lane,
        sent_s=record.sent_s,
        prefill_s=min(record.sent_s + queued_s, first_s),
        first_token_s=first_s,
        ready_s=min(first_s + handed_s, end_s),
        end_s=end_s,
    )


def _draw_panel(axes: "Axes", bars: Sequence[LaneBar], threshold_s: float, prefix: str) -> dict[str, str]:
    """Draw one system's lanes; return the text for each request's marks by their gid."""
    from matplotlib.collections import PolyCollection

    tips = {}
    ticks: list[tuple[float, int]] = []
    for bar in bars:
        if bar.lane >= MAX_LANES:
            continue
        pieces = [
            (bar.sent_s, bar.prefill_s, QUEUE, QUEUE),
            (bar.prefill_s, bar.first_token_s, ORANGE, ORANGE),
            (bar.first_token_s, bar.end_s, "none", BLUE),
            *((gap.start_s, gap.end_s, _STALL_FACE, VERMILLION) for gap in stalls(bar.record, threshold_s)),
            (bar.first_token_s, bar.ready_s, GREEN, GREEN),
        ]
        kept = [piece for piece in pieces if piece[1] > piece[0]]
        gid = f"{prefix}-{bar.record.index}"
        axes.add_collection(
            PolyCollection(
                [_box(start, end, bar.lane) for start, end, *_ in kept],
                facecolors=[face for *_, face, _ in kept],
                edgecolors=[edge for *_, edge in kept],
                linewidths=[0.9 if edge == VERMILLION else 0.35 for *_, edge in kept],
                gid=gid,
            )
        )
        tips[gid] = _describe(bar.record)
        ticks += [(moment, bar.lane) for moment in bar.record.event_s]
    _draw_ticks(axes, ticks, f"{prefix}-ticks")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    return tips


def _box(start_s: float, end_s: float, lane: int) -> list[tuple[float, float]]:
    low, high = lane - _HALF, lane + _HALF
    return [(start_s, low), (start_s, high), (end_s, high), (end_s, low)]


def _draw_ticks(axes: "Axes", ticks: Sequence[tuple[float, int]], gid: str) -> None:
    """Draw all tokens of a panel as one path: thousands of elements would make the page slow."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not ticks:
        return
    x = np.repeat([moment for moment, _ in ticks], 2)
    y = np.repeat([float(lane) for _, lane in ticks], 2) + np.tile([-_HALF, _HALF], len(ticks))
    path = Path(np.column_stack([x, y]), [Path.MOVETO, Path.LINETO] * len(ticks))
    axes.add_patch(PathPatch(path, facecolor="none", edgecolor=BLUE, linewidth=0.7, gid=gid))


def _label_longest(axes: "Axes", bars: Sequence[LaneBar], threshold_s: float, window: Window) -> None:
    """Write its length on the longest stall whose middle is in view."""
    gaps = [
        (gap, bar.lane)
        for bar in bars
        for gap in stalls(bar.record, threshold_s)
        if bar.lane < MAX_LANES and window.start_s < (gap.start_s + gap.end_s) / 2 < window.end_s
    ]
    if gaps:
        gap, lane = max(gaps, key=lambda pair: pair[0].length_s)
        if gap.length_s < _LABELLED_SHARE * window.length_s:
            return
        axes.annotate(
            seconds(gap.length_s),
            ((gap.start_s + gap.end_s) / 2, lane),
            ha="center",
            va="center",
            size=6.5,
            weight="bold",
            color=INK,
        )


def _draw_legend(figure: "Figure", threshold_s: float, *, has_hand_over: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color=QUEUE, label="queue"),
        Patch(color=ORANGE, label="prefill, until the first token"),
        *([Patch(color=GREEN, label="hand-over of KV blocks")] if has_hand_over else []),
        Line2D([], [], color=BLUE, marker="|", markersize=9, linestyle="none", label="token"),
        Patch(facecolor=_STALL_FACE, edgecolor=VERMILLION, label=f"stall: gap > {objective(threshold_s)}"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.4, labelcolor=FAINT)


def _describe(record: RequestRecord) -> str:
    longest = max(record.gaps_s, default=math.nan)
    who = f" · on {' → '.join(dict.fromkeys(record.instances))}" if record.instances else ""
    return (
        f"request {record.index}: {record.prompt_len} prompt tokens, {record.num_output_tokens} answered · "
        f"TTFT {seconds(record.ttft_s)} · TPOT {seconds(record.tpot_s)} · longest gap {seconds(longest)}"
        f"{who}{' · ' + record.error if record.error else ''}"
    )


def _title(runs: Sequence[SystemRun], window: Window, threshold_s: float, load: str) -> str:
    counts = []
    for run in runs:
        found = [gap for record in run.records for gap in stalls(record, threshold_s)]
        num_stalls = sum(window.overlaps(gap.start_s, gap.end_s) for gap in found)
        counts.append(f"{num_stalls or 'no'} stall{'s' * (num_stalls != 1)} with {run.system}")
    return f"{window.length_s:g} s at {load}: " + ", ".join(counts)
