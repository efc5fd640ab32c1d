"""Style and building blocks of all figures: white background, colours that remain distinct with colour blindness.

Only matplotlib's object interface is used (no pyplot), so threads share no state and a figure is freed with its last
reference.
"""

from __future__ import annotations

import io
import logging
import math
import textwrap
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path

from ray_cxr import environment

_log = logging.getLogger(__name__)

if environment.is_command:
    matplotlib.rcdefaults()  # without the user's matplotlibrc, whose `text.usetex` or colours are for other figures

# Okabe & Ito (2008): distinct with the common colour vision deficiencies, and in greyscale print by lightness.
BLUE, VERMILION, GREEN, SKY, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#E69F00", "#CC79A7"
INK, MUTED, FAINT = "#1a1a1a", "#5f6368", "#d9dce0"
#: For small groups; contrast 4.6 to 1 against white.
GREY = "#70757a"
DASHED = (0, (4, 3))
DPI = 150
SMALL_TEXT, LEGEND_TEXT = 8.0, 8.5
#: Side of the square panels of `create_grid` in inches.
PANEL_SIDE = 2.05
#: Left, top, width and height in inches from the top left, as the fractions that `Figure.add_axes` takes.
Box = Callable[[float, float, float, float], tuple[float, float, float, float]]
# The settings of an SVG file are global in matplotlib.
_svg_lock = threading.Lock()


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval, or None without an interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, result: Any, name: str = "value") -> Estimate | None:
        """Convert a result with the attributes `name`, `low` and `high`; None if the result or its value is None."""
        value = getattr(result, name, None)
        return None if value is None else cls(value, result.low, result.high)

    def format(self, *, signed: bool = False, percent: int | None = None) -> str:
        """Return `0.812 (0.790–0.831)`; signed `+0.012 (−0.003 to +0.027)`; in percent with 0 digits `81% (79–83%)`.

        Zero has no sign.
        """
        sign = "+" if signed else ""
        spec, scale, unit = (f"{sign}z.3f", 1, "") if percent is None else (f"{sign}z.{percent}f", 100, "%")
        known = (number for number in (self.value, self.low, self.high) if number is not None)
        texts = (f"{scale * number:{spec}}" for number in known)
        value, *bounds = (text.replace("-", "−") if float(text) else text.lstrip("+") for text in texts)
        if len(bounds) < 2:
            return value + unit
        between = " to " if signed else "–"
        return f"{value}{unit} ({bounds[0]}{between}{bounds[1]}{unit})"


class Piece(NamedTuple):
    """Artists of a sheet within a rectangle: left, top, width and height in inches from the top left."""

    box: tuple[float, float, float, float]
    artists: tuple[Artist, ...]


class Sheet(Figure):
    """A figure with a fixed layout.

    Attributes:
        parts: what a page can arrange by its width; each part is a row of pieces. Empty for an indivisible figure.
        is_whole_on_wide: a wide page shows the whole figure instead of its parts.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), facecolor="white")
        self.parts: list[tuple[Piece, ...]] = []
        self.is_whole_on_wide = False


class Drawing(NamedTuple):
    """A figure as PNG, and as HTML for a page; `html` is None for radiographs, which a page shows as PNG."""

    png: bytes
    html: Markup | None


def format_finding(finding: str) -> str:
    """Return a finding's name for readers: `Pleural_Thickening` as `Pleural Thickening`."""
    return finding.replace("_", " ")


def encode_figure(figure: Figure) -> tuple[bytes, bytes]:
    """Return a figure as the bytes of a PNG file (150 dots per inch) and of an SVG file without a date.

    Texts of the SVG remain texts: they can be selected, searched and edited.
    """
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    # Computing the layout again would take as long as drawing.
    figure.set_layout_engine("none")
    with _svg_lock, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ray_cxr"}):
        figure.savefig(svg, format="svg", dpi=DPI, metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


def create_axes(
    width: float, height: float, columns: int = 1, *, grid: Literal["x", "y", "both"], sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Create a figure with a row of axes that fit their texts, and grid lines of the named axis."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    axes = list(np.ravel(figure.subplots(1, columns, sharey=sharey)))
    for ax in axes:
        style_axes(ax, grid=grid)
    return figure, axes


def create_sheet(width: float, height: float) -> tuple[Sheet, Box]:
    """Create an empty figure for a fixed layout, so that axes have one size and texts do not collide."""

    def box(left: float, top: float, wide: float, high: float) -> tuple[float, float, float, float]:
        return left / width, 1 - (top + high) / height, wide / width, high / height

    return Sheet(width, height), box


def create_grid(
    count: int,
    handles: Sequence[Artist] = (),
    below: float = 0.0,
    *,
    wide: float = PANEL_SIDE,
    high: float = PANEL_SIDE,
    margin: float = 0.6,
) -> tuple[Sheet, list[Axes]]:
    """Create a figure of panels, up to four per row, with space for a title above each, and a legend on top.

    `below` is the height in inches of a flat panel below each panel; the result lists the flat panels last. `margin` is
    the space for the texts left of a panel.
    """
    columns = max(1, min(count, 4))
    cell, gap = margin + wide + 0.1, 0.14
    tall = high + 0.95 + (below + gap if below else 0.0)
    width = max(cell * columns + 0.1, 3.6)
    top = 0.2 + 0.2 * math.ceil(len(handles) / count_legend_columns(width, handles)) if handles else 0.0
    figure, box = create_sheet(width, top + tall * max(1, math.ceil(count / columns)))
    if handles:
        draw_legend(figure, handles)
    panels, flats = [], []
    for index in range(count):
        left, down = margin + index % columns * cell, top + 0.45 + index // columns * tall
        artists = [figure.add_axes(box(left, down, wide, high))]
        panels.append(artists[0])
        if below:
            artists.append(figure.add_axes(box(left, down + high + gap, wide, below)))
            flats.append(artists[1])
        figure.parts.append((Piece((left - margin + 0.08, down - 0.45, cell, tall), tuple(artists)),))
    axes = [*panels, *flats]
    for ax in axes:
        style_axes(ax)
    return figure, axes


def draw_legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Draw the legend at the top of a fixed layout, in as many columns as fit."""
    columns = count_legend_columns(figure.get_figwidth(), handles)
    style: dict[str, Any] = {"frameon": False, "fontsize": LEGEND_TEXT, "labelcolor": INK, "borderaxespad": 0.15}
    figure.legend(handles=list(handles), loc="upper left", ncols=columns, **style)


def count_legend_columns(width: float, handles: Sequence[Artist]) -> int:
    widest = 0.55 + max(measure_text(str(handle.get_label()), LEGEND_TEXT) for handle in handles)
    return int(np.clip((width - 0.1) // widest, 1, len(handles)))


def measure_text(text: str, size: float, *, bold: bool = False) -> float:
    """Return the width of a text in the figures' font."""
    if not text.strip():
        return 0.0
    # A leading or trailing space has no outline but takes space.
    properties = FontProperties(size=size, weight="bold" if bold else "normal")
    return float(text_to_path.get_text_width_height_descent(text.replace(" ", "n"), properties, False)[0]) / 72


def create_line_entry(label: str, colour: str, linestyle: Any = "-") -> Line2D:
    return Line2D([], [], color=colour, linestyle=linestyle, linewidth=1.4, label=label)


def create_marker_entry(label: str, colour: str, marker: str, face: str | None = None) -> Line2D:
    """Return the legend entry of a marker; hollow if `face` differs from its colour."""
    style: dict[str, Any] = {"marker": marker, "markersize": 6, "markerfacecolor": face or colour}
    return Line2D([], [], color=colour, linestyle="", label=label, **style)


def style_axes(ax: Axes, *, grid: Literal["x", "y", "both"] | None = None) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(MUTED)
    ax.tick_params(labelsize=8.5, color=MUTED, labelcolor=INK, length=3)
    ax.xaxis.label.set(fontsize=8.5, color=MUTED)
    ax.yaxis.label.set(fontsize=8.5, color=MUTED)
    if grid is not None:
        ax.grid(axis=grid, color=FAINT, linewidth=0.7)
        ax.set_axisbelow(True)


def set_heading(ax: Axes, finding: str, line: str) -> None:
    """Title a panel with its finding, in up to two lines, and a line below it."""
    name, size = format_finding(finding), 10.0
    if len(name) > 24:
        name, size = "\n".join(textwrap.wrap(name, 32)[:2]), 8.0
    ax.set_title(name, fontsize=size, fontweight="bold", color=INK, loc="left", pad=16)
    ax.text(0.0, 1.03, line, transform=ax.transAxes, fontsize=7.8, color=INK, va="bottom")


def format_percent(share: float) -> str:
    """Format a share for an axis, with as few digits as possible: `0.75%`, `5%`, `12%`."""
    return f"{float(f'{100 * share:.3g}'):g}%"


def format_share(share: float) -> str:
    """Format a share for a column, with two or three digits: `0.34%`, `5.0%`, `12%`."""
    value = 100 * share
    if value == 0:
        return "0%"
    return f"{value:.0f}%" if value >= 9.95 else f"{value:.1f}%" if value >= 0.995 else f"{value:.2g}%"
