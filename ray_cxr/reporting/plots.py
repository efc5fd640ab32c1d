"""The report's pictures, one style for all: white ground, colours that the colour-blind can tell apart.

Only matplotlib's object interface is used (no pyplot, no rcParams): there is no state that threads could
share, and a figure is freed with its last reference.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ray_cxr.evaluation import metrics

# Okabe & Ito (2008): distinct under the common colour deficiencies, and in grey print by lightness.
BLUE, VERMILION, GREEN, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#E69F00"
INK, MUTED, FAINT = "#1a1a1a", "#5f6368", "#d9dce0"
#: Greyed, and still read: 4.6 to 1 against white.
GREY = "#70757a"
DASHED = (0, (4, 3))
DPI = 150
#: A curve has as many points as an archive has images; an eye follows fewer.
_POINTS = 500


@dataclass(frozen=True)
class Panel:
    """One finding in the curve figures.

    Attributes:
        finding: its name.
        y, s: labels [n] and scores [n], both classes present.
        auroc, low, high, average_precision: for the title; an interval of None is left out.
        at: sensitivity, specificity and positive predictive value at the operating point, or None.
        band: false positive rates [k], ascending, and the interval's lower and upper sensitivity [k] there, or None.
        ap_low, ap_high: interval of the average precision, for the title; None is left out.
        threshold: the operating point's, on the scale of `s`, or None.
    """

    finding: str
    y: np.ndarray
    s: np.ndarray
    auroc: float
    low: float | None
    high: float | None
    average_precision: float | None
    at: tuple[float | None, float | None, float | None] | None = None
    band: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    ap_low: float | None = None
    ap_high: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Example:
    """One tile of the page of examples.

    Attributes:
        picture: uint8[H, W], or None where it cannot be shown; then `code` says why.
        heading: the finding that it is an example of.
        true, flagged: findings by label and by flag.
        bars: (finding, raw probability, threshold or None), highest first.
    """

    picture: np.ndarray | None
    code: str | None
    heading: str
    true: tuple[str, ...]
    flagged: tuple[str, ...]
    bars: tuple[tuple[str, float, float | None], ...]


def spaced(finding: str) -> str:
    """A finding's name as a reader writes it: `Pleural_Thickening` as `Pleural Thickening`."""
    return finding.replace("_", " ")


def encode(figure: Figure) -> tuple[bytes, bytes]:
    """A figure as the bytes of a PNG file (150 dots per inch) and of an SVG file without a date in it."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    # The layout stands; finding it once more would take as long as all the drawing.
    figure.set_layout_engine("none")
    figure.savefig(svg, format="svg", dpi=DPI, metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


def auroc_overview(panels: Sequence[Panel], macro: Mapping[str, Any] | None) -> Figure:
    """AUROC and its interval of every finding, best on top, with the macro mean as a band."""
    rows = sorted(panels, key=lambda panel: panel.auroc)
    figure, ax = single(7.2, 1.3 + 0.32 * len(rows))
    for row, panel in enumerate(rows):
        if panel.low is not None and panel.high is not None:
            ax.plot([panel.low, panel.high], [row, row], color=BLUE, linewidth=2.2, solid_capstyle="butt")
        ax.plot([panel.auroc], [row], "o", color=BLUE, markersize=6.5)
    ax.set_yticks(range(len(rows)), [spaced(panel.finding) for panel in rows])
    ax.set_ylim(-0.7, len(rows) - 0.3)
    lowest = min([0.5, *(panel.low if panel.low is not None else (panel.auroc) for panel in rows)])
    ax.set_xlim(max(0.0, lowest - 0.03), 1.01)
    ax.axvline(0.5, color=MUTED, linewidth=1, linestyle=DASHED)
    if macro and macro.get("auroc") is not None:
        if macro.get("auroc_low") is not None:
            ax.axvspan(macro["auroc_low"], macro["auroc_high"], color=ORANGE, alpha=0.25, linewidth=0)
        ax.axvline(macro["auroc"], color=VERMILION, linewidth=1.4, label=f"macro mean {macro['auroc']:.3f}")
        ax.legend(loc="lower left", frameon=False, fontsize=8.5, bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
    ax.set_xlabel("AUROC with 95% interval (patient bootstrap); dashed: chance")
    ax.grid(axis="x", color=FAINT, linewidth=0.7)
    return figure


def roc(panels: Sequence[Panel]) -> Figure:
    """ROC curves, one panel per finding, with a band where one is given; the dot is the operating point."""
    known: list[Artist] = [line_key("chance", MUTED, DASHED)]
    if any(panel.at and panel.at[0] is not None for panel in panels):
        known.append(mark_key("operating point", VERMILION, "o"))
    if any(panel.band is not None for panel in panels):
        known.append(Patch(color=SKY, alpha=0.45, linewidth=0, label="95% interval of the curve"))
    figure, axes = grid(len(panels), known)
    for ax, panel in zip(axes, panels, strict=True):
        curve = metrics.roc_curve(panel.y, panel.s)
        assert curve is not None
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=DASHED)
        if panel.band is not None:
            ax.fill_between(*panel.band, color=SKY, alpha=0.45, linewidth=0)
        ax.plot(*thin(curve.x, curve.y), color=BLUE, linewidth=1.7)
        if panel.at and panel.at[0] is not None and panel.at[1] is not None:
            ax.plot([1 - panel.at[1]], [panel.at[0]], "o", color=VERMILION, markersize=6, clip_on=False, zorder=4)
        title(ax, panel.finding, "AUROC", panel.auroc, panel.low, panel.high)
        unit_square(ax, "1 − specificity", "sensitivity")
    return figure


def precision_recall(panels: Sequence[Panel]) -> Figure:
    """Precision against recall, one panel per finding; dashed: the prevalence, which is chance."""
    known: list[Artist] = [line_key("prevalence, which is chance", MUTED, DASHED)]
    if any(panel.at and panel.at[0] is not None for panel in panels):
        known.append(mark_key("operating point", VERMILION, "o"))
    figure, axes = grid(len(panels), known)
    for ax, panel in zip(axes, panels, strict=True):
        curve = metrics.precision_recall_curve(panel.y, panel.s)
        prevalence = float(np.mean(panel.y))
        ax.plot([0, 1], [prevalence, prevalence], color=MUTED, linewidth=1, linestyle=DASHED)
        x, y = np.concatenate([[0.0], curve.x]), np.concatenate([curve.y[:1], curve.y])
        # Steps, as average precision sums them: between two thresholds there is no precision to interpolate.
        ax.plot(*thin(x, y), color=BLUE, linewidth=1.5, drawstyle="steps-pre")
        if panel.at and panel.at[0] is not None and panel.at[2] is not None:
            ax.plot([panel.at[0]], [panel.at[2]], "o", color=VERMILION, markersize=6, clip_on=False, zorder=4)
        title(ax, panel.finding, "average precision", panel.average_precision, panel.ap_low, panel.ap_high)
        unit_square(ax, "recall (sensitivity)", "precision")
    return figure


def prevalence(rows: Sequence[tuple[str, float, int, float | None]]) -> Figure:
    """Share of positive images per finding, and beside it the share that was flagged.

    Args:
        rows: (finding, share of positives, number of positives, share flagged or None).
    """
    rows = sorted(rows, key=lambda row: row[1])
    figure, ax = single(7.2, 1.3 + 0.32 * len(rows))
    places = list(range(len(rows)))
    ax.barh(places, [row[1] for row in rows], height=0.62, color=SKY, label="labelled positive")
    flagged = [(place, row[3]) for place, row in zip(places, rows, strict=True) if row[3] is not None]
    if flagged:
        ax.plot(
            [f for _, f in flagged],
            [p for p, _ in flagged],
            "D",
            color=VERMILION,
            markersize=5.5,
            label="flagged",
        )
    top = max([0.01, *(max(row[1], row[3] or 0.0) for row in rows)])
    ax.set_xlim(0, top * 1.05)
    ax.set_yticks(places, [f"{spaced(row[0])} ({row[2]:,})" for row in rows])
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    ax.set_xlabel("share of labelled images; in brackets: number of positives")
    ax.grid(axis="x", color=FAINT, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.legend(loc="lower left", frameon=False, fontsize=8.5, ncols=2, bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
    return figure


def priority_histogram(priority: np.ndarray) -> Figure:
    """How many images have which priority.

    Args:
        priority: floats [n], n > 0, finite.
    """
    figure, ax = single(7.2, 3.2)
    inside = bool((priority >= 0).all() and (priority <= 1).all())
    ax.hist(priority, bins=40, range=(0, 1) if inside else None, color=SKY, edgecolor=BLUE, linewidth=0.6)
    if inside:
        ax.set_xlim(0, 1)
    ax.set_xlabel("priority")
    ax.set_ylabel("images")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y", color=FAINT, linewidth=0.7)
    ax.set_axisbelow(True)
    return figure


def learning_curves(epochs: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss, validation cross-entropy and AUROC per epoch; a value that an epoch lacks is left out."""
    figure = Figure(figsize=(12.6, 3.2), layout=layout(), facecolor="white")
    numbers = [row["epoch"] for row in epochs if "epoch" in row]
    for ax, key, name, colour in zip(
        figure.subplots(1, 3),
        ("loss", "val_loss", "val_auroc"),
        ("training loss", "validation cross-entropy", "validation AUROC (macro)"),
        (BLUE, GREEN, VERMILION),
        strict=True,
    ):
        points = [(row["epoch"], row[key]) for row in epochs if row.get(key) is not None and "epoch" in row]
        style(ax)
        ax.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, linewidth=1.6) if points else None
        if points and key == "val_auroc":
            epoch, best = max(points, key=lambda point: point[1])
            ax.plot([epoch], [best], "o", markersize=10, markerfacecolor="none", markeredgecolor=INK)
            ax.set_title(f"best {best:.3f} at epoch {epoch}", fontsize=9, color=MUTED, loc="right")
        ax.set_xlabel("epoch")
        ax.set_ylabel(name)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(numbers) > 1:
            ax.set_xlim(min(numbers) - 0.2, max(numbers) + 0.2)
        ax.grid(color=FAINT, linewidth=0.7)
    return figure


def examples(groups: Sequence[tuple[str, Sequence[Example]]]) -> Figure:
    """A page of radiographs: one band per group, in each tile the picture, its findings, and three bars.

    Args:
        groups: (name such as "Missed", its tiles); groups without tiles are left out, one at least has some.
    """
    groups = [(name, tiles) for name, tiles in groups if tiles]
    columns = max(2, *(len(tiles) for _, tiles in groups))
    tile, band, margin = 2.75, 4.75, 0.12
    width, height = columns * tile + margin, len(groups) * band
    figure, box = sheet(width, height)
    for row, (name, tiles) in enumerate(groups):
        top = row * band
        figure.text(
            margin / width,
            1 - (top + 0.14) / height,
            name,
            va="top",
            fontsize=13,
            fontweight="bold",
            color=INK,
        )
        for column, example in enumerate(tiles):
            left = margin + column * tile
            radiograph(figure.add_axes(box(left, top + 0.72, 2.6, 2.6)), example)
            # Names take the left of the bars' line: written over the bars they would hide the threshold.
            bars(figure.add_axes(box(left + 1.42, top + 3.98, 1.12, 0.5)), example)
    return figure


def radiograph(ax: Axes, tile: Example, wide: int = 42) -> None:
    """One picture (or why there is none) with its heading above, and label and flags, `wide` letters a line, below."""
    if tile.picture is None:
        blank(ax, f"cannot be shown:\n{tile.code}")
    else:
        scan(ax, tile.picture)
    # Offsets from the axes' box in points: a tall picture narrows the box, which must not move the text.
    ax.annotate(
        spaced(tile.heading),
        (0, 1),
        (0, 5),
        "axes fraction",
        "offset points",
        fontsize=10,
        fontweight="bold",
        color=INK,
    )
    lines = "\n".join([listed("label", tile.true, wide), listed("flags", tile.flagged, wide)])
    ax.annotate(
        lines,
        (0, 0),
        (0, -4),
        "axes fraction",
        "offset points",
        va="top",
        fontsize=7.5,
        color=INK,
        linespacing=1.25,
    )


def scan(ax: Axes, picture: np.ndarray) -> None:
    """A radiograph, uint8[H,W], or an overlay, uint8[H,W,3], without a frame; a tall one stands at the left."""
    ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
    ax.set_anchor("W")
    _bare(ax)


def blank(ax: Axes, words: str) -> None:
    """A grey field that says why there is no picture."""
    ax.set_facecolor("#c2c6ca")
    ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", fontsize=9, color=INK)
    _bare(ax)


def _bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def listed(word: str, findings: Sequence[str], wide: int = 42) -> str:
    """Findings after a word, in two lines at most."""
    text = ", ".join(spaced(name) for name in findings) or "none"
    lines = textwrap.wrap(f"{word}: {text}", width=wide)
    # Two lines at most, so that tiles stay in line; the score table holds the rest.
    return "\n".join(lines[:2]) + (" …" if len(lines) > 2 else "")


def bars(ax: Axes, tile: Example) -> None:
    """The example's highest raw probabilities as bars, each with its threshold as a tick."""
    names = [f"{spaced(finding)}  {p:.2f}" for finding, p, _ in tile.bars]
    for place, (_, p, threshold) in enumerate(tile.bars):
        reached = threshold is not None and p >= threshold
        ax.barh([place], [p], height=0.7, color=ORANGE if reached else SKY)
        if threshold is not None:
            ax.plot([threshold] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=1.3)
    ax.set_ylim(2.6, -0.6)
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=7, color=MUTED)
    ax.set_yticks(range(len(names)), names, fontsize=7.5, color=INK)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    ax.tick_params(length=0, pad=3)


def layout() -> ConstrainedLayoutEngine:
    """What places the axes of a figure that is not placed by hand."""
    return ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)


def single(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one pair of axes, in inches."""
    figure = Figure(figsize=(width, height), layout=layout(), facecolor="white")
    ax = figure.subplots()
    style(ax)
    return figure, ax


#: Left, top, width and height in inches from the top left, as the fractions that `Figure.add_axes` takes.
Box = Callable[[float, float, float, float], tuple[float, float, float, float]]


def sheet(width: float, height: float) -> tuple[Figure, Box]:
    """An empty figure to place axes on by hand, so that they are of one size and nothing collides."""
    figure = Figure(figsize=(width, height), facecolor="white")

    def box(left: float, top: float, wide: float, high: float) -> tuple[float, float, float, float]:
        return left / width, 1 - (top + high) / height, wide / width, high / height

    return figure, box


def grid(count: int, handles: Sequence[Artist], below: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure of `count` square panels, four a row, with room for a title above each, and a key above all.

    Args:
        count: number of panels.
        handles: of the key.
        below: height in inches of a flat panel below each; those follow the square ones in the answer.
    """
    columns = max(1, min(count, 4))
    cell, side, gap = 2.75, 2.05, 0.14
    tall = 3.0 + (below + gap if below else 0.0)
    width = max(cell * columns + 0.1, 3.6)
    top = 0.2 + 0.2 * math.ceil(len(handles) / key_columns(width, handles))
    figure, box = sheet(width, top + tall * max(1, math.ceil(count / columns)))
    key(figure, handles)
    squares, flats = [], []
    for place in range(count):
        left, down = 0.6 + place % columns * cell, top + 0.45 + place // columns * tall
        squares.append(figure.add_axes(box(left, down, side, side)))
        if below:
            flats.append(figure.add_axes(box(left, down + side + gap, side, below)))
    for ax in [*squares, *flats]:
        style(ax)
    return figure, [*squares, *flats]


def key(figure: Figure, handles: Sequence[Artist]) -> None:
    """What the marks mean, above all of a figure placed by hand, in as many columns as have room."""
    figure.legend(
        handles=list(handles),
        loc="upper left",
        ncols=key_columns(figure.get_figwidth(), handles),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        borderaxespad=0.15,
    )


def key_columns(width: float, handles: Sequence[Artist]) -> int:
    """How many marks of a key fit side by side into `width` inches."""
    widest = 0.55 + max(inches(str(handle.get_label()), 8.5) for handle in handles)
    return int(np.clip((width - 0.1) // widest, 1, len(handles)))


def inches(text: str, size: float, *, bold: bool = False) -> float:
    """Width of a text in the figures' type."""
    if not text.strip():
        return 0.0
    # A blank at either end has no outline, yet takes room.
    properties = FontProperties(size=size, weight="bold" if bold else "normal")
    return float(text_to_path.get_text_width_height_descent(text.replace(" ", "n"), properties, False)[0]) / 72


def line_key(label: str, colour: str, linestyle: Any = "-") -> Line2D:
    """A line, for a key."""
    return Line2D([], [], color=colour, linestyle=linestyle, linewidth=1.4, label=label)


def mark_key(label: str, colour: str, marker: str, face: str | None = None) -> Line2D:
    """A marker, for a key; hollow with another `face`."""
    return Line2D(
        [], [], color=colour, marker=marker, linestyle="", markersize=6, label=label, markerfacecolor=face or colour
    )


def style(ax: Axes) -> None:
    """The frame, ticks and labels that all axes here have."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(MUTED)
    ax.tick_params(labelsize=8.5, color=MUTED, labelcolor=INK, length=3)
    ax.xaxis.label.set(fontsize=8.5, color=MUTED)
    ax.yaxis.label.set(fontsize=8.5, color=MUTED)


def unit_square(ax: Axes, x: str, y: str) -> None:
    """Both axes from 0 to 1, named `x` and `y`."""
    ax.set_xlim(-0.01, 1.01)
    ax.set_ylim(-0.01, 1.01)
    ax.set_aspect("equal")
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.yaxis.set_label_coords(-0.15, 0.5)
    ax.grid(color=FAINT, linewidth=0.6)


def title(ax: Axes, finding: str, quantity: str, value: float | None, low: float | None, high: float | None) -> None:
    """A panel's finding, and below it a quantity with its interval."""
    shown = "undefined" if value is None else f"{value:.3f}"
    if low is not None and high is not None:
        shown += f" ({low:.3f}–{high:.3f})"
    heading(ax, finding, f"{quantity} {shown}")


def heading(ax: Axes, finding: str, line: str) -> None:
    """A panel's finding, in two lines where it is long, and a line below it."""
    name, size = spaced(finding), 10.0
    if len(name) > 24:
        name, size = "\n".join(textwrap.wrap(name, 32)[:2]), 8.0
    ax.set_title(name, fontsize=size, fontweight="bold", color=INK, loc="left", pad=16)
    ax.text(0.0, 1.03, line, transform=ax.transAxes, fontsize=7.8, color=INK, va="bottom")


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of a curve at even steps along its length, both ends kept."""
    if len(x) <= _POINTS:
        return x, y
    along = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
    kept = np.unique(np.searchsorted(along, np.linspace(0.0, along[-1], _POINTS)).clip(0, len(x) - 1))
    return x[kept], y[kept]


# The page of a search draws with these too.
_single, _layout, _style = single, layout, style
