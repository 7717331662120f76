"""One figure of a report, as an SVG inside the page and as a PNG file."""

import html
import io
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.bench.report.theme import COLOURS, INK, PAPER, house_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PNG_DPI: Final = 200
_FULL_WIDTH_IN: Final = 9.0
_LETTERS_PER_IN: Final = 10.5
"""Of a title in a PNG."""
_COLOUR_NAMES: Final = {value: name for name, value in COLOURS.items()}
_NO_METADATA: Final = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Picture:
    """A drawn figure with what is said about it."""

    name: str
    """For the file, and for links within the page: letters, digits and hyphens."""
    title: str
    """What one sees."""
    caption: str
    """How to read it."""
    figure: "Figure"
    tips: dict[str, str] = field(default_factory=dict)
    """Text shown over the artist of this gid."""
    readings: "dict[Axes, tuple[str, str]]" = field(default_factory=dict)
    """Axes whose coordinates are read out under the pointer: words for x and y, with ``{}`` for the number."""

    @property
    def is_narrow(self) -> bool:
        """True when two of its kind stand side by side."""
        return float(self.figure.get_figwidth()) < _FULL_WIDTH_IN

    def svg(self) -> str:
        """Return an ``<svg>`` element whose colours are the page's and whose ids are its own."""
        text = io.StringIO()
        with house_style():
            self.figure.savefig(text, format="svg", metadata=_NO_METADATA)
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        # The page sets fonts and line joins: a style element in one figure would reach into all the others.
        svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", svg, flags=re.DOTALL)
        svg = svg.replace("; font-family: 'DejaVu Sans'", "")
        svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{self.name}-", svg)
        svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: _page_colour(match[0]), svg)
        svg = re.sub(rf'<g id="{self.name}-([^"]+)"', self._with_tip, svg)
        return self._with_head(svg)

    def write_png(self, folder: Path) -> Path:
        """Write ``name.png`` with its title, on white; raise ConfigurationError when it cannot be written."""
        path = folder / f"{self.name}.png"
        with house_style():
            title = self.figure.text(
                0.01, 1.02, self._wrapped_title(), ha="left", va="bottom", weight="bold", size=11, color=INK
            )
            try:
                self.figure.savefig(path, format="png", dpi=_PNG_DPI, facecolor=PAPER, bbox_inches="tight")
            except OSError as error:
                raise ConfigurationError(f"cannot write the figure {path}: {error.strerror}") from error
            finally:
                title.remove()
        return path

    def _wrapped_title(self) -> str:
        return textwrap.fill(self.title, int(_LETTERS_PER_IN * self.figure.get_figwidth()))

    def _with_tip(self, match: re.Match[str]) -> str:
        tip = self.tips.get(match[1])
        return match[0] if tip is None else f'{match[0]} data-tip="{html.escape(tip)}"'

    def _with_head(self, svg: str) -> str:
        """Let the element fill its column, tell its axes to the page's script and its content to a screen reader."""
        width, height = self.figure.get_size_inches() * 72
        axes = html.escape(msgspec.json.encode(self._axes(width, height)).decode())
        label = html.escape(f"{self.title}. {self.caption}")
        body = svg[svg.index(">") + 1 :]
        return (
            f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width:g} {height:g}" role="img" '
            f'aria-label="{label}" data-axes="{axes}">{body}'
        )

    def _axes(self, width: float, height: float) -> list[dict[str, object]]:
        """Return where the axes lie in the picture, in its units from the top left, and what they show."""
        found: list[dict[str, object]] = []
        for axes, (x_words, y_words) in self.readings.items():
            box = axes.get_position()
            x_low, x_high = (float(limit) for limit in axes.get_xlim())
            y_low, y_high = (float(limit) for limit in axes.get_ylim())
            left, right = box.x0 * width, box.x1 * width
            top, bottom = (1 - box.y1) * height, (1 - box.y0) * height
            found.append(
                {
                    "box": [round(float(edge), 2) for edge in (left, top, right, bottom)],
                    "x": [x_low, x_high, axes.get_xscale() == "log", x_words],
                    "y": [y_low, y_high, axes.get_yscale() == "log", y_words],
                }
            )
        return found


def _page_colour(value: str) -> str:
    name = _COLOUR_NAMES.get(value)
    return value if name is None else f"var(--{name})"
