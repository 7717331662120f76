"""How every figure looks: Okabe and Ito's colours, a line style and a marker for each system, quiet axes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK: Final = "#1c2733"
FAINT: Final = "#5d6b79"
GRID: Final = "#dfe5eb"
PAPER: Final = "#ffffff"
QUEUE: Final = "#b4bec8"
BLUE: Final = "#0072b2"
VERMILLION: Final = "#d55e00"
GREEN: Final = "#009e73"
PURPLE: Final = "#cc79a7"
ORANGE: Final = "#e69f00"
SKY: Final = "#56b4e9"
ON_SOFT: Final = "#1c2734"
"""Text on queue, orange and sky."""
ON_STRONG: Final = "#fffffe"
"""Text on blue, green, vermillion and purple."""

COLOURS: Final = {
    "ink": INK,
    "faint": FAINT,
    "grid": GRID,
    "paper": PAPER,
    "queue": QUEUE,
    "blue": BLUE,
    "vermillion": VERMILLION,
    "green": GREEN,
    "purple": PURPLE,
    "orange": ORANGE,
    "sky": SKY,
    "on-soft": ON_SOFT,
    "on-strong": ON_STRONG,
}
"""Names under which a page gives each of these colours a value for light, dark and paper."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which of how many systems is drawn."""

    index: int
    count: int

    @property
    def is_crowded(self) -> bool:
        """True when bands would hide one another."""
        return self.count > _MANY_SYSTEMS


@dataclass(frozen=True, slots=True)
class SeriesStyle:
    """What tells one system from another, with colours or without."""

    colour: str
    dashes: Any
    marker: str


_STYLES: Final = (
    SeriesStyle(VERMILLION, "-", "o"),
    SeriesStyle(BLUE, (0, (5, 2)), "s"),
    SeriesStyle(GREEN, (0, (5, 2, 1, 2)), "^"),
    SeriesStyle(PURPLE, (0, (1, 1.3)), "D"),
    SeriesStyle(ORANGE, (0, (9, 3)), "v"),
    SeriesStyle(SKY, (0, (5, 2, 1, 2, 1, 2)), "P"),
    SeriesStyle(INK, (0, (3, 1)), "X"),
)
_MANY_SYSTEMS: Final = 3
_LEGEND_INCHES: Final = 0.09
"""Of a character there, with its part of the handle."""
_LONG_NAME: Final = 24
"""Characters: a longer one would cover curves."""
_BAR_STEP: Final = 0.008
"""Between the bars of two systems, as a share of the axis."""

_SETTINGS: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "disagg",
    # Verdana has nearly the widths of DejaVu Sans, by which matplotlib sets the text.
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 3.0,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "hatch.linewidth": 0.6,
}


def styles_of(systems: Sequence[str]) -> dict[str, SeriesStyle]:
    """Return a style for each system; they repeat after the seventh."""
    return {name: _STYLES[index % len(_STYLES)] for index, name in enumerate(systems)}


def draw_spread(
    axes: "Axes", x: Sequence[float], low: Sequence[float], high: Sequence[float], style: SeriesStyle, place: Place
) -> None:
    """Show from where to where a system's values go: as a band, or among many systems as bars side by side."""
    if not place.is_crowded:
        axes.fill_between(x, low, high, color=style.colour, alpha=0.14, linewidth=0)
        return
    shift = (place.index - (place.count - 1) / 2) * _BAR_STEP * max(x)
    axes.vlines([value + shift for value in x], low, high, color=style.colour, linewidth=1.1)


def add_legend(figure: "Figure", axes: "Axes") -> None:
    """Name the systems where the curves leave room, or below them when there are many, or their names are long."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= _MANY_SYSTEMS and max(map(len, labels), default=0) <= _LONG_NAME:
        axes.legend(loc="best")
    else:
        width = max(map(len, labels)) * _LEGEND_INCHES
        num_columns = 2 if 2 * width <= figure.get_figwidth() else 1
        figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, fontsize=7.5)


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in this style within a block."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield
