"""The figures of a search: AUROC by trial, by backbone, and by epoch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ray_cxr.reporting import plots

NAMES = ("history", "backbones", "curves")


@dataclass(frozen=True)
class TrialRow:
    """One row of the table of trials, see `tuning.records.build_trial_table`; missing values are None.

    Attributes:
        params: the trial's searched settings by name, without the backbone.
        curve: (epoch, validation AUROC) of the epochs with a defined AUROC, in order.
    """

    number: int
    state: str
    reason: str | None
    backbone: str
    epochs: int
    best_epoch: int | None
    val_auroc: float | None
    images_per_second: float | None
    calibration_error: float | None
    seconds: float | None
    started: pd.Timestamp | None
    restarts: int
    params: Mapping[str, Any]
    curve: tuple[tuple[int, float], ...]


class LineStyle(NamedTuple):
    """Colour, marker and line of a backbone: three ways to distinguish it."""

    colour: str
    marker: str
    line: Any


STYLES = (
    LineStyle(plots.BLUE, "o", "-"),
    LineStyle(plots.VERMILION, "s", "--"),
    LineStyle(plots.GREEN, "^", "-."),
    LineStyle(plots.ORANGE, "D", ":"),
    LineStyle(plots.PURPLE, "v", (0, (5, 1))),
    LineStyle(plots.SKY, "P", (0, (3, 1, 1, 1))),
    LineStyle(plots.INK, "h", (0, (1, 1))),
)
Styles = Mapping[str, LineStyle]
#: Width of a figure with one panel in inches.
_WIDE = 4.2


def draw_figures(rows: Sequence[TrialRow], best: int | None, comparison: Mapping[str, Any] | None) -> dict[str, Figure]:
    """Draw the figures by name, except those without data; `best` is the number of the best trial."""
    names = sorted({row.backbone for row in rows})
    styles = dict(zip(names, itertools.cycle(STYLES), strict=False))
    figures = {}
    if any(row.val_auroc is not None for row in rows):
        figures["history"] = _draw_history(rows, styles)
    succeeded = [row for row in rows if row.curve and row.state != "failed"]
    if succeeded:
        figures["backbones"] = _draw_backbones(succeeded, styles, comparison)
    if any(row.curve for row in rows):
        figures["curves"] = _draw_curves(rows, styles, best)
    return figures


def _draw_history(rows: Sequence[TrialRow], styles: Styles) -> Figure:
    """Draw the validation AUROC of every trial by its number, and the best finished trial so far."""
    finished = [(row.number, row.val_auroc) for row in rows if row.state == "finished" and row.val_auroc is not None]
    extra = [plots.create_line_entry("best finished so far", plots.MUTED)] if finished else []
    entries = [*_list_entries(rows, styles, lines=False), *extra]
    figure, (ax,) = plots.create_grid(1, entries, wide=_WIDE, high=2.6, margin=0.75)
    ax.grid(axis="y", color=plots.FAINT, linewidth=0.7)
    look: dict[str, Any] = {"color": plots.MUTED, "markerfacecolor": "white", "markersize": 5, "clip_on": False}
    for state, mark in (("failed", "x"), ("waiting", "d")):
        at = [row.number for row in rows if row.state == state and (state == "failed" or row.val_auroc is None)]
        ax.plot(at, [0.02] * len(at), mark, transform=ax.get_xaxis_transform(), **look)
    scored = [(row, row.val_auroc) for row in rows if row.state != "failed" and row.val_auroc is not None]
    for name, style in styles.items():
        mine = [(float(row.number), auroc, row.state) for row, auroc in scored if row.backbone == name]
        _draw_points(ax, mine, style, 6)
    last = max(row.number for row in rows)
    if finished:
        numbers, values = zip(*finished, strict=True)
        best = np.maximum.accumulate(values)
        ax.step([*numbers, last], [*best, best[-1]], where="post", color=plots.MUTED, linewidth=1.2, zorder=1)
    ax.set(xlabel="trial", ylabel="validation AUROC (macro)", xlim=(-0.7, last + 0.7))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _draw_backbones(rows: Sequence[TrialRow], styles: Styles, comparison: Mapping[str, Any] | None) -> Figure:
    """Draw every trial's highest AUROC by backbone: over all its epochs and, in a comparison, at equal length.

    A backbone with at least three trials also has its quartiles.
    """
    names = [name for name in sorted(styles) if any(row.backbone == name for row in rows)]
    panels = [("all epochs of each trial", [(row.number, max(value for _, value in row.curve)) for row in rows])]
    if comparison is not None:
        equal = {n: v for item in comparison["backbones"] for n, v in zip(item["numbers"], item["values"], strict=True)}
        if equal:
            title = f"first {comparison['grace']} epochs: equal length"
            panels.append((title, sorted(equal.items())))
    margin = 0.25 + max(plots.measure_text(name, 8.5) for name in names)
    figure, axes = plots.create_grid(len(panels), wide=3.0, high=0.62 * len(names), margin=margin)
    by_number = {row.number: row for row in rows}
    for ax, (title, points) in zip(axes, panels, strict=True):
        for y, name in enumerate(reversed(names)):
            mine = [(n, value) for n, value in points if n in by_number and by_number[n].backbone == name]
            if len(mine) > 2:
                lower, middle, upper = np.percentile([value for _, value in mine], [25, 50, 75])
                ax.barh([y], [upper - lower], left=lower, height=0.56, color=plots.FAINT, zorder=1)
                ax.plot([middle] * 2, [y - 0.28, y + 0.28], color=plots.INK, linewidth=1.8, zorder=2)
            # Multiples of the golden ratio spread like noise, but are the same on every run.
            spread = [(v, y + 0.4 * ((n * 0.6180339887) % 1 - 0.5), by_number[n].state) for n, v in mine]
            _draw_points(ax, spread, styles[name], 5)
        ax.set_yticks(range(len(names)), list(reversed(names)))
        ax.set(xlabel="highest validation AUROC", ylim=(-0.6, len(names) - 0.4))
        ax.set_title(title, fontsize=9, color=plots.INK, loc="left")
        ax.grid(axis="x", color=plots.FAINT, linewidth=0.7)
        ax.xaxis.set_major_locator(MaxNLocator(4))
    return figure


def _draw_points(ax: Axes, points: Sequence[tuple[float, float, str]], style: LineStyle, size: int) -> None:
    """Draw points (x, y, state), hollow if the trial did not finish."""
    for finished in (False, True):
        xy = [(x, y) for x, y, state in points if (state == "finished") == finished]
        x, y = zip(*xy, strict=True) if xy else ((), ())
        face = style.colour if finished else "white"
        ax.plot(x, y, style.marker, color=style.colour, markerfacecolor=face, markersize=size, zorder=3)


def _draw_curves(rows: Sequence[TrialRow], styles: Styles, best: int | None) -> Figure:
    """Draw the validation AUROC by epoch; a cross marks the end of a stopped trial, a bar that of a failed one."""
    with_curve = [row for row in rows if row.curve]
    states = {row.state for row in with_curve}
    marks = [("stopped", "x", "stopped early"), ("failed", "|", "failed"), ("waiting", "d", "waiting")]
    extra = [plots.create_marker_entry(text, plots.MUTED, mark) for state, mark, text in marks if state in states]
    entries = [*_list_entries(rows, styles, lines=True), *extra]
    figure, (ax,) = plots.create_grid(1, entries, wide=_WIDE, high=3.0, margin=0.75)
    ax.grid(color=plots.FAINT, linewidth=0.7)
    for row in with_curve:
        style, is_best = styles[row.backbone], row.number == best
        epochs, values = zip(*row.curve, strict=True)
        width, alpha, order = (2.6, 1.0, 4) if is_best else (1.1, 0.6, 2)
        (line,) = ax.plot(epochs, values, linestyle=style.line, color=style.colour)
        line.set(linewidth=width, alpha=alpha, zorder=order)
        end = {"stopped": "x", "failed": "|", "waiting": "d"}.get(row.state, style.marker)
        ax.plot(epochs[-1:], values[-1:], end, color=style.colour, markersize=6.5, zorder=5)
        if is_best:
            font: dict[str, Any] = {"fontsize": 8.5, "fontweight": "bold", "color": style.colour}
            end_point = (epochs[-1], values[-1])
            ax.annotate(f"trial {row.number}", end_point, (7, 0), textcoords="offset points", va="center", **font)
    ax.set(xlabel="epoch", ylabel="validation AUROC (macro)")
    ax.margins(x=0.1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _list_entries(rows: Sequence[TrialRow], styles: Styles, *, lines: bool) -> list[Line2D]:
    """Return the legend's entries of the backbones and, without lines, of the states."""
    entries = [
        Line2D([], [], color=style.colour, marker=style.marker, linestyle=style.line if lines else "", label=name)
        for name, style in styles.items()
    ]
    if not lines:
        states = {row.state for row in rows}
        if states & {"stopped", "waiting"}:
            entries.append(plots.create_marker_entry("hollow: not finished", plots.MUTED, "o", "white"))
        if "failed" in states:
            entries.append(plots.create_marker_entry("failed", plots.MUTED, "x"))
        if any(row.state == "waiting" and row.val_auroc is None for row in rows):
            entries.append(plots.create_marker_entry("waiting", plots.MUTED, "d", "white"))
    return entries
