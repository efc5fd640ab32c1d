"""Figures of labels: prevalence and co-occurrence."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ray_cxr.reporting import plots
from ray_cxr.reporting.plots import FAINT, INK, MUTED, SKY, VERMILION, format_finding

#: Colour of full cells as red, green and blue, and of texts on them; both are the same on light and dark pages.
_CELL, _WHITE = (0.03, 0.32, 0.61), "#fefefe"


def plot_prevalence(rows: Sequence[tuple[str, float, int, float | None]]) -> Figure:
    """Plot rows of (finding, share of positive images, number of positives, share flagged or None)."""
    rows = sorted(rows, key=lambda row: row[1])
    figure, (ax,) = plots.create_axes(4.8, 1.1 + 0.28 * len(rows), grid="x")
    positions = range(len(rows))
    ax.barh(positions, [row[1] for row in rows], height=0.62, color=SKY, label="labelled positive")
    flagged = [(row[3], position) for position, row in enumerate(rows) if row[3] is not None]
    if flagged:
        ax.plot(*zip(*flagged, strict=True), "D", color=VERMILION, markersize=5.5, label="flagged", clip_on=False)
    top = max([0.01, *(max(row[1], row[3] or 0.0) for row in rows)])
    ax.set_xlim(0, top * 1.05)
    ax.set_yticks(positions, [f"{format_finding(row[0])} ({row[2]:,})" for row in rows])
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel("share of labelled images (in brackets: positives)")
    ax.legend(loc="lower left", frameon=False, fontsize=8.5, ncols=2, bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
    return figure


def plot_cooccurrence(counts: np.ndarray, findings: Sequence[str], n: int) -> Figure:
    """Plot the share of the images with the row's finding that also have the column's finding.

    `counts` are integers [F, F]: images with both findings, and on the diagonal all images with the finding, of `n`.
    """
    size = len(findings)
    names = [format_finding(finding) for finding in findings]
    totals = np.diag(counts)
    shares = counts / np.maximum(totals, 1)[:, None]
    off = ~np.eye(size, dtype=bool) & (totals > 0)[:, None]
    most = max(0.01, float(shares.max(where=off, initial=0)))
    cell, slope = 0.52, math.radians(50)
    lengths = [plots.measure_text(name, 8.5) for name in names]
    left, high = 0.25 + max(lengths), 0.45 + max(lengths) * math.sin(slope)
    ends = [(column + 0.8) * cell + length * math.cos(slope) for column, length in enumerate(lengths)]
    wide = max(left + max(cell * size + 1.1, *ends), 4.5)
    figure, box = plots.create_sheet(wide, high + cell * size + 0.6)
    ax = figure.add_axes(box(left, high, cell * size, cell * size))
    # One colour of growing opacity, so that the cells suit light and dark pages.
    colours = LinearSegmentedColormap.from_list("cells", [(*_CELL, 0.0), (*_CELL, 1.0)])
    colours.set_bad(FAINT)
    cells = np.where(off, shares, np.nan)
    mesh = ax.pcolormesh(cells, cmap=colours, norm=Normalize(0, most), edgecolors=FAINT, linewidth=0.8)
    ax.set_ylim(size, 0)
    for row, column in np.ndindex(counts.shape):
        diagonal = row == column
        share = float(totals[row] / n if diagonal else shares[row, column])
        # From this opacity on, white has the higher contrast on a light page.
        colour = _WHITE if off[row, column] and share / most > 0.62 else INK
        text = f"{counts[row, column]:,}\n{plots.format_share(share) if diagonal or totals[row] else '–'}"
        style: dict[str, Any] = {"fontsize": 8, "linespacing": 1.15, "fontweight": "bold" if diagonal else "normal"}
        ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, **style)
    middles = np.arange(size) + 0.5
    ax.set_yticks(middles, names, fontsize=8.5)
    ax.xaxis.tick_top()
    ax.set_xticks(middles, names, fontsize=8.5, rotation=math.degrees(slope), ha="left", rotation_mode="anchor")
    ax.tick_params(length=0, pad=3, labelcolor=INK)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar_axes = figure.add_axes(box(left + cell * size + 0.2, high, 0.16, min(cell * size, 2.6)))
    bar = figure.colorbar(mesh, cax=bar_axes)
    bar_axes.yaxis.set_major_locator(MaxNLocator(5))
    bar_axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: plots.format_percent(share)))
    bar_axes.tick_params(labelsize=8, color=MUTED, labelcolor=INK, length=3)
    bar.set_label("share of row", fontsize=8, color=MUTED)
    bar.outline.set_visible(False)
    caption = f"Share of the images with the row's finding that also have the column's. Diagonal: of all {n:,} images."
    x, y, _, _ = box(0.12, figure.get_figheight() - 0.08, 0, 0)
    # Short lines, which a phone shows without scrolling.
    style = {"fontsize": plots.SMALL_TEXT, "color": MUTED, "va": "bottom"}
    figure.text(x, y, textwrap.fill(caption, min(52, int(wide * 15))), **style)
    return figure
