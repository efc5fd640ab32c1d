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
    LineStyle("#CC79A7", "v", (0, (5, 1))),
    LineStyle(plots.SKY, "P", (0, (3, 1, 1, 1))),
    LineStyle(plots.INK, "h", (0, (1, 1))),
)
Styles = Mapping[str, LineStyle]


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
    figure, (ax,) = plots.create_axes(9.6, 3.7, grid="y")
    failed = [row.number for row in rows if row.state == "failed"]
    ax.plot(failed, [0.02] * len(failed), "x", color=plots.MUTED, markersize=5, transform=ax.get_xaxis_transform())
    scored = [(row, row.val_auroc) for row in rows if row.state != "failed" and row.val_auroc is not None]
    for name, style in styles.items():
        mine = [(float(row.number), auroc, row.state) for row, auroc in scored if row.backbone == name]
        _draw_points(ax, mine, style, 6)
    finished = [(row.number, auroc) for row, auroc in scored if row.state == "finished"]
    last = max(row.number for row in rows)
    if finished:
        numbers, values = zip(*finished, strict=True)
        best = np.maximum.accumulate(values)
        ax.step([*numbers, last], [*best, best[-1]], where="post", color=plots.MUTED, linewidth=1.2, zorder=1)
    extra = [plots.create_line_entry("best finished so far", plots.MUTED)] if finished else []
    _draw_legend(ax, rows, styles, extra, lines=False)
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
            title = f"first {comparison['grace']} epochs of each trial: equal length"
            panels.append((title, sorted(equal.items())))
    height = 1.25 + 0.62 * len(names)
    figure, axes = plots.create_axes(5.2 * len(panels), height, len(panels), grid="x", sharey=True)
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
    figure, (ax,) = plots.create_axes(9.6, 4.2, grid="both")
    with_curve = [row for row in rows if row.curve]
    for row in with_curve:
        style, is_best = styles[row.backbone], row.number == best
        epochs, values = zip(*row.curve, strict=True)
        width, alpha, order = (2.6, 1.0, 4) if is_best else (1.1, 0.6, 2)
        (line,) = ax.plot(epochs, values, linestyle=style.line, color=style.colour)
        line.set(linewidth=width, alpha=alpha, zorder=order)
        end = {"stopped": "x", "failed": "|", "running": ""}.get(row.state, style.marker)
        ax.plot(epochs[-1:], values[-1:], end, color=style.colour, markersize=6.5, zorder=5)
        if is_best:
            font: dict[str, Any] = {"fontsize": 8.5, "fontweight": "bold", "color": style.colour}
            end_point = (epochs[-1], values[-1])
            ax.annotate(f"trial {row.number}", end_point, (7, 0), textcoords="offset points", va="center", **font)
    states = {row.state for row in with_curve}
    marks = [("stopped", "x", "stopped early"), ("failed", "|", "failed")]
    extra = [plots.create_marker_entry(text, plots.MUTED, mark) for state, mark, text in marks if state in states]
    _draw_legend(ax, rows, styles, extra, lines=True)
    ax.set(xlabel="epoch", ylabel="validation AUROC (macro)")
    ax.margins(x=0.06)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _draw_legend(ax: Axes, rows: Sequence[TrialRow], styles: Styles, extra: Sequence[Line2D], *, lines: bool) -> None:
    handles = [
        Line2D([], [], color=style.colour, marker=style.marker, linestyle=style.line if lines else "", label=name)
        for name, style in styles.items()
    ]
    if not lines:
        states = {row.state for row in rows}
        if states & {"stopped", "running"}:
            handles.append(plots.create_marker_entry("hollow: not finished", plots.MUTED, "o", "white"))
        if "failed" in states:
            handles.append(plots.create_marker_entry("failed", plots.MUTED, "x"))
    style: dict[str, Any] = {"bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2, "frameon": False, "fontsize": 8.5}
    ax.legend(handles=[*handles, *extra], loc="lower left", ncols=5, **style)
