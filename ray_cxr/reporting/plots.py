"""The report's pictures, one style for all: white ground, colours that the colour-blind can tell apart.

Only matplotlib's object interface is used (no pyplot, no rcParams): there is no state that threads could
share, and a figure is freed with its last reference.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ray_cxr.evaluation import metrics

# Okabe & Ito (2008): distinct under the common colour deficiencies, and in grey print by lightness.
BLUE, VERMILION, GREEN, SKY, ORANGE = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#E69F00"
INK, MUTED, FAINT = "#1a1a1a", "#5f6368", "#d9dce0"
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
    """

    finding: str
    y: np.ndarray
    s: np.ndarray
    auroc: float
    low: float | None
    high: float | None
    average_precision: float | None
    at: tuple[float | None, float | None, float | None] | None = None


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
    figure, ax = _single(7.2, 1.3 + 0.32 * len(rows))
    for row, panel in enumerate(rows):
        if panel.low is not None and panel.high is not None:
            ax.plot([panel.low, panel.high], [row, row], color=BLUE, linewidth=2.2, solid_capstyle="butt")
        ax.plot([panel.auroc], [row], "o", color=BLUE, markersize=6.5)
    ax.set_yticks(range(len(rows)), [spaced(panel.finding) for panel in rows])
    ax.set_ylim(-0.7, len(rows) - 0.3)
    lowest = min([0.5, *(panel.low if panel.low is not None else (panel.auroc) for panel in rows)])
    ax.set_xlim(max(0.0, lowest - 0.03), 1.01)
    ax.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    if macro and macro.get("auroc") is not None:
        if macro.get("auroc_low") is not None:
            ax.axvspan(macro["auroc_low"], macro["auroc_high"], color=ORANGE, alpha=0.25, linewidth=0)
        ax.axvline(macro["auroc"], color=VERMILION, linewidth=1.4, label=f"macro mean {macro['auroc']:.3f}")
        ax.legend(loc="lower left", frameon=False, fontsize=8.5, bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
    ax.set_xlabel("AUROC with 95% interval (patient bootstrap); dashed: chance")
    ax.grid(axis="x", color=FAINT, linewidth=0.7)
    return figure


def roc(panels: Sequence[Panel]) -> Figure:
    """ROC curves, one panel per finding; the dot is the operating point."""
    figure, axes = _grid(len(panels))
    for ax, panel in zip(axes, panels, strict=True):
        curve = metrics.roc_curve(panel.y, panel.s)
        assert curve is not None
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        ax.plot(*_thin(curve.x, curve.y), color=BLUE, linewidth=1.7)
        if panel.at and panel.at[0] is not None and panel.at[1] is not None:
            ax.plot([1 - panel.at[1]], [panel.at[0]], "o", color=VERMILION, markersize=6, clip_on=False, zorder=4)
        _title(ax, panel.finding, "AUROC", panel.auroc, panel.low, panel.high)
        _unit_square(ax, "1 − specificity", "sensitivity")
    return figure


def precision_recall(panels: Sequence[Panel]) -> Figure:
    """Precision against recall, one panel per finding; dashed: the prevalence, which is chance."""
    figure, axes = _grid(len(panels))
    for ax, panel in zip(axes, panels, strict=True):
        curve = metrics.precision_recall_curve(panel.y, panel.s)
        prevalence = float(np.mean(panel.y))
        ax.plot([0, 1], [prevalence, prevalence], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        x, y = np.concatenate([[0.0], curve.x]), np.concatenate([curve.y[:1], curve.y])
        # Steps, as average precision sums them: between two thresholds there is no precision to interpolate.
        ax.plot(*_thin(x, y), color=BLUE, linewidth=1.5, drawstyle="steps-pre")
        if panel.at and panel.at[0] is not None and panel.at[2] is not None:
            ax.plot([panel.at[0]], [panel.at[2]], "o", color=VERMILION, markersize=6, clip_on=False, zorder=4)
        _title(ax, panel.finding, "average precision", panel.average_precision, None, None)
        _unit_square(ax, "recall (sensitivity)", "precision")
    return figure


def prevalence(rows: Sequence[tuple[str, float, int, float | None]]) -> Figure:
    """Share of positive images per finding, and beside it the share that was flagged.

    Args:
        rows: (finding, share of positives, number of positives, share flagged or None).
    """
    rows = sorted(rows, key=lambda row: row[1])
    figure, ax = _single(7.2, 1.3 + 0.32 * len(rows))
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
    figure, ax = _single(7.2, 3.2)
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
    figure = Figure(figsize=(12.6, 3.2), layout=_layout(), facecolor="white")
    numbers = [row["epoch"] for row in epochs if "epoch" in row]
    for ax, key, name, colour in zip(
        figure.subplots(1, 3),
        ("loss", "val_loss", "val_auroc"),
        ("training loss", "validation cross-entropy", "validation AUROC (macro)"),
        (BLUE, GREEN, VERMILION),
        strict=True,
    ):
        points = [(row["epoch"], row[key]) for row in epochs if row.get(key) is not None and "epoch" in row]
        _style(ax)
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
    # Placed by hand, in inches from the top left, so that all pictures are of one size and nothing collides.
    tile, band, margin = 2.75, 4.75, 0.12
    width, height = columns * tile + margin, len(groups) * band
    figure = Figure(figsize=(width, height), facecolor="white")

    def box(left: float, top: float, wide: float, high: float) -> tuple[float, float, float, float]:
        return left / width, 1 - (top + high) / height, wide / width, high / height

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
            _picture(figure.add_axes(box(left, top + 0.72, 2.6, 2.6)), example)
            # Names take the left of the bars' line: written over the bars they would hide the threshold.
            _bars(figure.add_axes(box(left + 1.42, top + 3.98, 1.12, 0.5)), example)
    return figure


def _picture(ax: Axes, tile: Example) -> None:
    if tile.picture is None:
        ax.set_facecolor("#b5b9be")
        ax.text(0.5, 0.5, f"cannot be shown:\n{tile.code}", ha="center", va="center", fontsize=9, color=INK)
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
    else:
        ax.imshow(tile.picture, cmap="gray", vmin=0, vmax=255)
        ax.set_anchor("W")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
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
    lines = "\n".join([_listed("label", tile.true), _listed("flags", tile.flagged)])
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


def _listed(word: str, findings: Sequence[str]) -> str:
    text = ", ".join(spaced(name) for name in findings) or "none"
    lines = textwrap.wrap(f"{word}: {text}", width=42)
    # Two lines at most, so that tiles stay in line; the score table holds the rest.
    return "\n".join(lines[:2]) + (" …" if len(lines) > 2 else "")


def _bars(ax: Axes, tile: Example) -> None:
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


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)


def _single(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout=_layout(), facecolor="white")
    ax = figure.subplots()
    _style(ax)
    return figure, ax


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 4)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(2.75 * columns, 3.6), 3.05 * rows), layout=_layout(), facecolor="white")
    axes = list(np.asarray(figure.subplots(rows, columns, squeeze=False)).ravel())
    for ax in axes[count:]:
        ax.axis("off")
    for ax in axes[:count]:
        _style(ax)
    return figure, axes[:count]


def _style(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(MUTED)
    ax.tick_params(labelsize=8.5, color=MUTED, labelcolor=INK, length=3)
    ax.xaxis.label.set(fontsize=8.5, color=MUTED)
    ax.yaxis.label.set(fontsize=8.5, color=MUTED)


def _unit_square(ax: Axes, x: str, y: str) -> None:
    ax.set_xlim(-0.01, 1.01)
    ax.set_ylim(-0.01, 1.01)
    ax.set_aspect("equal")
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.grid(color=FAINT, linewidth=0.6)


def _title(ax: Axes, finding: str, quantity: str, value: float | None, low: float | None, high: float | None) -> None:
    shown = "undefined" if value is None else f"{value:.3f}"
    if low is not None and high is not None:
        shown += f" ({low:.3f}–{high:.3f})"
    ax.set_title(spaced(finding), fontsize=10, fontweight="bold", color=INK, loc="left", pad=16)
    ax.text(0.0, 1.03, f"{quantity} {shown}", transform=ax.transAxes, fontsize=7.8, color=INK, va="bottom")


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of a curve at even steps along its length, both ends kept."""
    if len(x) <= _POINTS:
        return x, y
    along = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
    kept = np.unique(np.searchsorted(along, np.linspace(0.0, along[-1], _POINTS)).clip(0, len(x) - 1))
    return x[kept], y[kept]
