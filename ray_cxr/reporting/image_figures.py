"""Pages of radiographs: examples, heat maps, and a random sample with labels."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ray_cxr.reporting import plots
from ray_cxr.reporting.plots import FAINT, INK, MUTED, ORANGE, SKY, format_finding


@dataclass(frozen=True)
class Example:
    """One tile of the page of examples: an image, uint8 [H, W], or the error `code` of an image that cannot be shown.

    The tile is an example of the finding `heading`. `true` lists the findings by label, `flagged` those by flag. `bars`
    are (finding, raw probability, threshold or None), highest first.
    """

    image: np.ndarray | None
    code: str | None
    heading: str
    true: tuple[str, ...]
    flagged: tuple[str, ...]
    bars: tuple[tuple[str, float, float | None], ...]


@dataclass(frozen=True)
class HeatmapExample:
    """One tile of the page of heat maps, for the finding of `example.heading`.

    `overlay` is uint8 [H, W, 3], or None for a `reason`.
    """

    example: Example
    score: float
    overlay: np.ndarray | None
    reason: str = ""


@dataclass(frozen=True)
class Radiograph:
    """One tile of the page of radiographs; see `Example`. `findings` is None for an image without labels."""

    image: np.ndarray | None
    code: str | None
    findings: tuple[str, ...] | None
    note: str = ""


def draw_examples(groups: Sequence[tuple[str, Sequence[Example]]]) -> Figure:
    """Draw one band per named group that has tiles: a radiograph, its findings, and its three highest probabilities."""
    groups = [(name, tiles) for name, tiles in groups if tiles]
    columns = max(2, *(len(tiles) for _, tiles in groups))
    tile, band, margin = 2.75, 4.75, 0.12
    width, height = columns * tile + margin, len(groups) * band
    figure, box = plots.create_sheet(width, height)
    for row, (name, tiles) in enumerate(groups):
        top = row * band
        _write_band_name(figure, margin / width, 1 - (top + 0.14) / height, name)
        for column, example in enumerate(tiles):
            left = margin + column * tile
            _draw_example(figure.add_axes(box(left, top + 0.72, 2.6, 2.6)), example)
            # Names left of the bars, because text over the bars would hide the threshold.
            _draw_bars(figure.add_axes(box(left + 1.42, top + 3.98, 1.12, 0.5)), example)
    return figure


def _write_band_name(figure: Figure, x: float, y: float, name: str) -> None:
    figure.text(x, y, name, va="top", fontsize=13, fontweight="bold", color=INK)


def _draw_example(ax: Axes, tile: Example, width: int = 42) -> None:
    """Draw an image or its error code, with a heading above and labels and flags below, `width` characters per line."""
    _draw_image(ax, tile.image, f"cannot be shown:\n{tile.code}")
    _write_above(ax, format_finding(tile.heading), 10, "bold")
    texts = (f"label: {_list_findings(tile.true) or 'none'}", f"flags: {_list_findings(tile.flagged) or 'none'}")
    _write_below(ax, "\n".join(_wrap(text, width) for text in texts), 7.5)


# Texts have offsets in points from the axes, because a tall image narrows the axes and must not move the text.
def _write_above(ax: Axes, text: str, size: float, weight: str = "normal") -> None:
    style: dict[str, Any] = {"fontsize": size, "fontweight": weight, "color": INK}
    ax.annotate(text, (0, 1), (0, 5), "axes fraction", "offset points", **style)


def _write_below(ax: Axes, text: str, size: float) -> None:
    style: dict[str, Any] = {"fontsize": size, "color": INK, "linespacing": 1.25}
    ax.annotate(text, (0, 0), (0, -4), "axes fraction", "offset points", va="top", **style)


def _draw_image(ax: Axes, image: np.ndarray | None, reason: str) -> None:
    """Draw a radiograph [H, W] or an overlay [H, W, 3], uint8, without a frame; or why there is none, on grey."""
    if image is None:
        ax.set_facecolor("#c2c6ca")
        ax.text(0.5, 0.5, reason, transform=ax.transAxes, ha="center", va="center", fontsize=9, color=INK)
    else:
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        ax.set_anchor("W")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _wrap(text: str, width: int) -> str:
    """Wrap a text to at most two lines, so that tiles stay aligned."""
    lines = textwrap.wrap(text, width)
    return "\n".join(lines[:2]) + (" …" if len(lines) > 2 else "")


def _draw_bars(ax: Axes, tile: Example) -> None:
    """Draw the highest raw probabilities as bars, each with a tick at its threshold."""
    names = [f"{format_finding(finding)}  {p:.2f}" for finding, p, _ in tile.bars]
    for row, (_, p, threshold) in enumerate(tile.bars):
        reached = threshold is not None and p >= threshold
        ax.barh([row], [p], height=0.7, color=ORANGE if reached else SKY)
        if threshold is not None:
            ax.plot([threshold] * 2, [row - 0.42, row + 0.42], color=INK, linewidth=1.3)
    ax.set_ylim(2.6, -0.6)
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=7, color=MUTED)
    ax.set_yticks(range(len(names)), names, fontsize=7.5, color=INK)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    ax.tick_params(length=0, pad=3)


def draw_heatmaps(groups: Sequence[tuple[str, Sequence[HeatmapExample]]]) -> Figure:
    """Draw one band per named group that has tiles: a radiograph and its heat map."""
    groups = [(name, tiles) for name, tiles in groups if tiles]
    columns = min(3, max(len(tiles) for _, tiles in groups))
    side, tile, band, head, margin = 2.2, 4.72, 3.5, 0.45, 0.12
    lines = [math.ceil(len(tiles) / columns) for _, tiles in groups]
    figure, box = plots.create_sheet(columns * tile + margin, sum(lines) * band + len(groups) * head)
    width, height = figure.get_size_inches()
    top = 0.0
    for (name, tiles), count in zip(groups, lines, strict=True):
        _write_band_name(figure, margin / width, 1 - (top + 0.14) / height, name)
        for index, case in enumerate(tiles):
            left, down = margin + index % columns * tile, top + head + 0.27 + index // columns * band
            _draw_example(figure.add_axes(box(left, down, side, side)), case.example, 38)
            right = left + side + 0.06
            ax = figure.add_axes(box(right, down, side, side))
            _draw_image(ax, case.overlay, textwrap.fill(f"no heat map: {case.reason}", 26))
            _write_above(ax, f"heat map: {format_finding(case.example.heading)}, p {_format_score(case.score)}", 8.5)
            _draw_bars(figure.add_axes(box(right + 1.42, down + side + 0.1, side - 1.44, 0.5)), case.example)
        top += head + count * band
    return figure


def draw_radiographs(tiles: Sequence[Radiograph]) -> Figure:
    """Draw a page of radiographs with their labels."""
    columns = min(6, math.ceil(math.sqrt(len(tiles))))
    rows = math.ceil(len(tiles) / columns)
    side, tile, band = 2.1, 2.25, 2.72
    figure, box = plots.create_sheet(columns * tile + 0.13, rows * band + 0.1)
    for index, scan in enumerate(tiles):
        ax = figure.add_axes(box(0.14 + index % columns * tile, 0.1 + index // columns * band, side, side))
        _draw_image(ax, scan.image, f"cannot be shown:\n{scan.code}")
        labels = "not labelled" if scan.findings is None else _list_findings(scan.findings) or "no finding"
        _write_below(ax, _wrap(labels, 36) + (f"\n{scan.note}" if scan.note else ""), 7.8)
    return figure


def _format_score(score: float) -> str:
    return "< 0.01" if score < 0.01 else f"{score:.2f}"


def _list_findings(findings: Sequence[str]) -> str:
    return ", ".join(map(format_finding, findings))
