"""Where a request's time goes, stage by stage."""

from collections.abc import Sequence
from typing import Final

from disagg.bench.report.picture import Picture
from disagg.bench.report.runs import RunGroup
from disagg.bench.report.theme import (
    BLUE,
    FAINT,
    GREEN,
    ON_SOFT,
    ON_STRONG,
    ORANGE,
    PAPER,
    PURPLE,
    QUEUE,
    SKY,
    VERMILLION,
    house_style,
)
from disagg.bench.report.words import by_system, seconds
from disagg.measure.timeline import Stage

_LOOKS: Final = {
    Stage.QUEUE_PREFILL.value: ("queue for prefill", QUEUE, ""),
    Stage.PREFILL.value: ("prefill", ORANGE, ""),
    "until_first_token": ("until the first token (queue and prefill)", ORANGE, "//"),
    Stage.HAND_OVER_CONTROL.value: ("offer on its way", QUEUE, "||"),
    Stage.HAND_OVER_WAIT.value: ("wait for hand-over", QUEUE, "////"),
    Stage.HAND_OVER.value: ("hand-over of KV blocks", GREEN, ""),
    Stage.QUEUE_DECODE.value: ("queue for decode", QUEUE, "...."),
    Stage.FIRST_DECODE.value: ("second token", SKY, ""),
    Stage.DECODE.value: ("further tokens", BLUE, ""),
    "after_first_token": ("after the first token", BLUE, "//"),
    Stage.DELIVERY.value: ("delivery", PURPLE, ""),
    Stage.PAUSE.value: ("pause after the loss of an instance", VERMILLION, ""),
}
"""Label, colour and hatch of each stage, in order."""
_LEAST_SHARE: Final = 0.002
_LABELLED_SHARE: Final = 0.07


def draw_stages(groups: Sequence[RunGroup], *, load: str, name: str) -> Picture:
    """Draw one bar for each system: the mean seconds of a request in each stage."""
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

    stages = {group.system: group.mean_stages() for group in groups}
    longest = max((sum(parts.values()) for parts in stages.values()), default=0.0)
    with house_style():
        figure = Figure(figsize=(9.6, 1.25 + 0.42 * len(stages)), layout="constrained")
        axes = figure.subplots()
        shown: dict[str, Artist] = {}
        for row, parts in enumerate(stages.values()):
            left = 0.0
            for stage, (label, colour, hatch) in _LOOKS.items():
                width = parts.get(stage, 0.0)
                if width <= _LEAST_SHARE * longest:
                    left += width
                    continue
                # Bars of the same look, one entry of the legend.
                (bar,) = axes.barh(row, width, left=left, height=0.62, color=colour, hatch=hatch, edgecolor=PAPER)
                shown.setdefault(label, bar)
                if width >= _LABELLED_SHARE * longest:
                    ink = ON_SOFT if colour in (QUEUE, ORANGE, SKY) else ON_STRONG
                    axes.text(left + width / 2, row, seconds(width), ha="center", va="center", size=8, color=ink)
                left += width
            axes.text(left, row, f"  {seconds(left)}", ha="left", va="center", size=8, color=FAINT)
        axes.set_yticks(range(len(stages)), list(stages))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, longest * 1.1 or 1.0)
        axes.set_xlabel("Mean time of a finished request (s)")
        ordered = [label for label, *_ in _LOOKS.values() if label in shown]
        figure.legend([shown[label] for label in ordered], ordered, loc="outside lower center", ncols=4)
    return Picture(
        name=name,
        title=_title(stages, load),
        caption=(
            "Mean over finished requests, as the server stamped them; a system that tells no stages shows what its "
            "client saw. The parts add up to the end-to-end time."
        ),
        figure=figure,
    )


def _title(stages: dict[str, dict[str, float]], load: str) -> str:
    first = {
        system: sum(parts.get(stage, 0.0) for stage in ("queue_prefill", "prefill", "until_first_token"))
        for system, parts in stages.items()
        if parts
    }
    return f"At {load} the first token takes: {by_system(first, seconds)}"
