"""Figures of curves and distributions: ROC, precision-recall, calibration, score distributions, learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter
from scipy.special import expit, logit

from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.bootstrap import RocBand
from ray_cxr.evaluation.reading_order import ReadingOrder
from ray_cxr.reporting import plots
from ray_cxr.reporting.plots import Estimate, format_finding

_CHANCE: dict[str, Any] = {"color": plots.MUTED, "linewidth": 1, "linestyle": plots.DASHED}
#: Maximum points of a drawn curve; the data have one per image.
_POINTS = 500
#: Probabilities on a logit axis stay this far from 0 and 1, where float32 resolves no more.
_EPSILON = 1e-6


@dataclass(frozen=True)
class Panel:
    """One finding in the figures of curves.

    Attributes:
        y, s: labels [n] and scores [n], both classes present.
        rates: sensitivity, specificity and positive predictive value at the operating point.
        threshold: the operating point, on the scale of `s`.
    """

    finding: str
    y: np.ndarray
    s: np.ndarray
    auroc: Estimate
    average_precision: Estimate | None
    rates: tuple[float | None, float | None, float | None]
    band: RocBand | None = None
    threshold: float | None = None


def plot_aurocs(aurocs: Mapping[str, Estimate], macro: Estimate | None) -> Figure:
    """Plot the AUROC of every finding with its interval, best on top, and the macro mean as a band."""
    rows = sorted(aurocs.items(), key=lambda row: row[1].value)
    figure, (ax,) = plots.create_axes(4.8, 1.1 + 0.28 * len(rows), grid="x")
    for row, (_, auroc) in enumerate(rows):
        if auroc.low is not None and auroc.high is not None:
            ax.plot([auroc.low, auroc.high], [row, row], color=plots.BLUE, linewidth=2.2, solid_capstyle="butt")
        ax.plot([auroc.value], [row], "o", color=plots.BLUE, markersize=6.5)
    ax.set_yticks(range(len(rows)), [format_finding(finding) for finding, _ in rows])
    ax.set_ylim(-0.7, len(rows) - 0.3)
    lowest = min([0.5, *(auroc.value if auroc.low is None else auroc.low for _, auroc in rows)])
    ax.set_xlim(max(0.0, lowest - 0.03), 1.01)
    ax.axvline(0.5, **_CHANCE)
    if macro is not None:
        if macro.low is not None and macro.high is not None:
            ax.axvspan(macro.low, macro.high, color=plots.ORANGE, alpha=0.25, linewidth=0)
        ax.axvline(macro.value, color=plots.VERMILION, linewidth=1.4, label=f"macro mean {macro.value:.3f}")
        ax.legend(loc="lower left", frameon=False, fontsize=8.5, bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
    ax.set_xlabel("AUROC with 95% interval; dashed: chance")
    return figure


def plot_roc(panels: Sequence[Panel]) -> Figure:
    """Plot ROC curves, one panel per finding, with bands of the interval; a dot marks the operating point."""
    legend: list[Artist] = [plots.create_line_entry("chance", plots.MUTED, plots.DASHED), *_point_entry(panels)]
    band_style: dict[str, Any] = {"color": plots.SKY, "alpha": 0.45, "linewidth": 0}
    if any(panel.band is not None for panel in panels):
        legend.append(Patch(label="95% interval of the curve", **band_style))
    figure, axes = plots.create_grid(len(panels), legend)
    for ax, panel in zip(axes, panels, strict=True):
        curve = metrics.roc_curve(panel.y, panel.s)
        assert curve is not None
        ax.plot([0, 1], [0, 1], **_CHANCE)
        if panel.band is not None:
            ax.fill_between(panel.band.false_positive_rate, panel.band.low, panel.band.high, **band_style)
        ax.plot(*_thin(curve.x, curve.y), color=plots.BLUE, linewidth=1.7)
        sensitivity, specificity, _ = panel.rates
        _mark_point(ax, None if specificity is None else 1 - specificity, sensitivity)
        plots.set_heading(ax, panel.finding, f"AUROC {panel.auroc.format()}")
        _set_unit_square(ax, "1 − specificity", "sensitivity")
    return figure


def plot_precision_recall(panels: Sequence[Panel]) -> Figure:
    """Plot precision against recall, one panel per finding; the dashed prevalence is chance."""
    chance = plots.create_line_entry("prevalence (chance)", plots.MUTED, plots.DASHED)
    figure, axes = plots.create_grid(len(panels), [chance, *_point_entry(panels)])
    for ax, panel in zip(axes, panels, strict=True):
        curve = metrics.precision_recall_curve(panel.y, panel.s)
        prevalence = float(np.mean(panel.y))
        ax.plot([0, 1], [prevalence, prevalence], **_CHANCE)
        x, y = np.concatenate([[0.0], curve.x]), np.concatenate([curve.y[:1], curve.y])
        # Steps, as average precision sums them: precision is undefined between two thresholds.
        ax.plot(*_thin(x, y), color=plots.BLUE, linewidth=1.5, drawstyle="steps-pre")
        sensitivity, _, ppv = panel.rates
        _mark_point(ax, sensitivity, ppv)
        shown = "undefined" if panel.average_precision is None else panel.average_precision.format()
        plots.set_heading(ax, panel.finding, f"average precision {shown}")
        _set_unit_square(ax, "recall (sensitivity)", "precision")
    return figure


def _point_entry(panels: Sequence[Panel]) -> list[Artist]:
    """Return the legend entry of the operating points, if there are any."""
    has_points = any(panel.rates[0] is not None for panel in panels)
    return [plots.create_marker_entry("operating point", plots.VERMILION, "o")] if has_points else []


def _mark_point(ax: Axes, x: float | None, y: float | None) -> None:
    if x is not None and y is not None:
        ax.plot([x], [y], "o", color=plots.VERMILION, markersize=6, clip_on=False, zorder=4)


def plot_priorities(priority: np.ndarray) -> Figure:
    """Plot a histogram of the priorities, finite floats [n], n > 0."""
    figure, (ax,) = plots.create_axes(4.8, 2.8, grid="y")
    inside = bool((priority >= 0).all() and (priority <= 1).all())
    ax.hist(priority, bins=40, range=(0, 1) if inside else None, color=plots.SKY, edgecolor=plots.BLUE, linewidth=0.6)
    if inside:
        ax.set_xlim(0, 1)
    ax.set(xlabel="priority", ylabel="images")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure


def plot_reading_order(found: ReadingOrder) -> Figure:
    """Plot the share of abnormal studies read against the share of the list read, with the best and the average order.

    The band is the pointwise 95% interval.
    """
    figure, (ax,) = plots.create_axes(4.8, 3.8, grid="both")
    keys = ("list_read", "abnormal_read", "low", "high")
    x, y, low, high = (100 * np.array(found.curve[key], dtype=np.float64) for key in keys)
    ax.plot([0, 100], [0, 100], label="first come, first served", **_CHANCE)
    best = 100 * found.abnormal / found.studies
    ax.plot([0, best, 100], [0, 100, 100], color=plots.GREEN, linewidth=1.2, label="all abnormal studies first")
    ax.fill_between(x, low, high, color=plots.SKY, alpha=0.45, linewidth=0, label="95% interval")
    ax.plot(x, y, color=plots.BLUE, linewidth=1.7, label="worklist")
    ax.set(xlim=(0, 100), ylim=(0, 101), xlabel="share of the list read, %", ylabel="share of abnormal studies read, %")
    ax.legend(loc="lower right", frameon=False, fontsize=8.5)
    return figure


def plot_learning_curves(epochs: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot training loss, validation cross-entropy and validation AUROC per epoch; missing values are skipped."""
    figure, axes = plots.create_grid(3, wide=2.6, high=2.0, margin=0.75)
    numbers = [row["epoch"] for row in epochs if "epoch" in row]
    charts = (
        ("loss", "training loss", plots.BLUE),
        ("val_loss", "validation cross-entropy", plots.GREEN),
        ("val_auroc", "validation AUROC (macro)", plots.VERMILION),
    )
    for ax, (key, name, colour) in zip(axes, charts, strict=True):
        points = [(row["epoch"], row[key]) for row in epochs if row.get(key) is not None and "epoch" in row]
        if points:
            ax.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, linewidth=1.6)
        if points and key == "val_auroc":
            epoch, best = max(points, key=lambda point: point[1])
            ax.plot([epoch], [best], "o", markersize=10, markerfacecolor="none", markeredgecolor=plots.INK)
            ax.set_title(f"best {best:.3f} at epoch {epoch}", fontsize=9, color=plots.MUTED, loc="right")
        ax.set(xlabel="epoch", ylabel=name)
        ax.grid(color=plots.FAINT, linewidth=0.6)
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(numbers) > 1:
            ax.set_xlim(min(numbers) - 0.2, max(numbers) + 0.2)
    return figure


@dataclass(frozen=True)
class Reliability:
    """Calibration of one finding.

    Attributes:
        p: calibrated probabilities [n].
        predicted, observed: mean probability and share of positives in each bin that has images, [k].
        low, high: 95% interval of the share [k], NaN if undefined.
        error: the expected calibration error.
    """

    finding: str
    p: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error: Estimate


def plot_reliability(panels: Sequence[Reliability]) -> Figure:
    """Plot observed share against calibrated probability, one panel per finding, above a histogram of predictions.

    Both axes of a panel end just above its largest point. An interval that leaves the frame ends in an arrow head.
    """
    legend: list[Artist] = [
        plots.create_line_entry("perfect calibration", plots.MUTED, plots.DASHED),
        plots.create_marker_entry("images of similar probability, with 95% interval", plots.BLUE, "o"),
        Patch(color=plots.SKY, label="number of images, log scale (last bar: this probability or more)"),
    ]
    figure, axes = plots.create_grid(len(panels), legend, below=0.5)
    for panel, square, flat in zip(panels, axes[: len(panels)], axes[len(panels) :], strict=True):
        end = _find_end(panel)
        _draw_observed(square, panel, end)
        _draw_predictions(flat, panel, end)
    return figure


def _draw_observed(ax: Axes, panel: Reliability, end: float) -> None:
    ax.plot([0, end], [0, end], **_CHANCE)
    style: dict[str, Any] = {"color": plots.BLUE, "markersize": 4.5, "clip_on": False}
    ax.vlines(panel.predicted, panel.low, np.minimum(panel.high, end), color=plots.BLUE, linewidth=1.3)
    beyond = panel.predicted[panel.high > end]
    if beyond.size:
        ax.plot(beyond, np.full(beyond.size, end), "^", **style)
    ax.plot(panel.predicted, panel.observed, "o-", linewidth=0.8, zorder=4, **style)
    ticks = [0, end / 2, end]
    ax.set(xlim=(0, end), ylim=(0, end))
    ax.set_xticks(ticks, [])
    ax.set_yticks(ticks, [plots.format_percent(tick) for tick in ticks], fontsize=7.5)
    ax.set_ylabel("observed share", fontsize=8)
    ax.yaxis.set_label_coords(-0.2, 0.5)
    ax.grid(color=plots.FAINT, linewidth=0.6)
    plots.set_heading(ax, panel.finding, f"ECE, equal mass {panel.error.format()}")


def _draw_predictions(ax: Axes, panel: Reliability, end: float) -> None:
    counts, edges = np.histogram(np.clip(panel.p, 0, end), bins=30, range=(0, end))
    ax.set_yscale("log")
    ax.stairs(np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, color=plots.SKY)
    most = int(counts.max())
    ax.set_ylim(0.5, 1.6 * most)
    ax.set_yticks([1, most] if most > 3 else [most], ["1", f"{most:,}"] if most > 3 else [f"{most}"])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.tick_params(axis="y", labelsize=7)
    ax.set_xlim(0, end)
    ticks = [0, end / 2, end]
    ax.set_xticks(ticks, [plots.format_percent(tick) for tick in ticks])
    ax.set_xlabel("calibrated probability", fontsize=8)


def _find_end(panel: Reliability) -> float:
    """Return a round number above all points and most predictions; intervals may leave the frame."""
    points = max(float(np.max(panel.predicted)), float(np.max(panel.observed)), 1e-4)
    highs = panel.high[~np.isnan(panel.high)]
    reach = min(1.25 * points, float(highs.max())) if highs.size else 0.0
    largest = max(1.04 * points, reach, float(np.quantile(panel.p, 0.99)))
    power = 10.0 ** math.floor(math.log10(largest))
    return min(1.0, next(step * power for step in (1, 2, 3, 4, 6, 8, 10) if largest <= step * power * (1 + 1e-9)))


def plot_distributions(panels: Sequence[Panel]) -> Figure:
    """Plot the scores of positives (upwards) and negatives (downwards), one panel per finding, with the threshold.

    Scores in 0..1 have a logit axis, others a linear one. Each half is scaled to its own peak, so compare shapes, not
    counts.
    """
    legend: list[Artist] = [
        Patch(color=plots.ORANGE, label="up: positives"),
        Patch(color=plots.BLUE, label="down: negatives (each half to its own peak)"),
    ]
    if any(panel.threshold is not None for panel in panels):
        legend.append(plots.create_line_entry("operating point: flagged to the right", plots.INK))
    figure, axes = plots.create_grid(len(panels), legend)
    for ax, panel in zip(axes, panels, strict=True):
        _draw_halves(ax, panel)
    return figure


def _draw_halves(ax: Axes, panel: Panel) -> None:
    y, s = panel.y.astype(bool), panel.s.astype(np.float64)
    has_logit = bool(s.min() >= 0 and s.max() <= 1)
    x = _logit(s) if has_logit else s
    line = panel.threshold
    if line is not None and has_logit:
        line = float(_logit(line))
    ends = [*np.quantile(x[y], [0.001, 0.999]), *np.quantile(x[~y], [0.001, 0.999]), *([] if line is None else [line])]
    low, high = float(min(ends)), float(max(ends))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
    # Limit the bars to what the rarer class can fill.
    edges = np.linspace(low, high, int(np.clip(2 * math.sqrt(min(y.sum(), (~y).sum())), 8, 50)) + 1)
    if line is not None:
        # An edge at the threshold, so that no bar stands on both sides of it.
        width = edges[1] - edges[0]
        edges = line + width * np.arange(-math.ceil((line - low) / width), math.ceil((high - line) / width) + 1)
        low, high = float(edges[0]), float(edges[-1])
    for half, sign, colour in ((x[y], 1, plots.ORANGE), (x[~y], -1, plots.BLUE)):
        counts, _ = np.histogram(np.clip(half, low, high), bins=edges)
        ax.stairs(sign * counts / counts.max(), edges, fill=True, color=colour)
    ax.axhline(0, color=plots.INK, linewidth=0.8)
    if line is not None:
        ax.axvline(line, color=plots.INK, linewidth=1.4)
    ax.set(xlim=(low, high), ylim=(-1.08, 1.08), yticks=[])
    ax.spines["left"].set_visible(False)
    if has_logit:
        ax.set_xticks(*_choose_logit_ticks(low, high))
        ax.set_xlabel("raw score (logit axis)", fontsize=8)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_xlabel("raw score", fontsize=8)
    plots.set_heading(ax, panel.finding, f"{int(y.sum()):,} positives, {int((~y).sum()):,} negatives")


def _logit(p: Any) -> np.ndarray:
    return np.asarray(logit(np.clip(p, _EPSILON, 1 - _EPSILON)))


def _choose_logit_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Return the positions of round probabilities on a logit axis, and their labels."""
    tiers: list[Sequence[float]] = [
        (1e-4, 1e-2, 0.5, 0.99, 0.9999) if high - low > 12 else (1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 0.999),
        (*(k * 10.0**-e for e in (4, 3, 2) for k in (1, 2, 5)), *(k / 10 for k in range(1, 10)), 0.95, 0.98, 0.99),
        _round_apart(expit(np.linspace(low + 0.05 * (high - low), high - 0.05 * (high - low), 3))),
    ]
    for candidates in tiers:
        chosen: list[float] = []
        for p in candidates:
            position = float(_logit(p))
            inside = low - 1e-9 <= position <= high + 1e-9
            if inside and (not chosen or position - float(_logit(chosen[-1])) >= _space(chosen[-1], p) * (high - low)):
                chosen.append(p)
        if len(chosen) >= 3:
            break
    return [float(_logit(p)) for p in chosen], list(map(_format_tick, chosen))


def _round_apart(values: np.ndarray) -> list[float]:
    """Round values to the fewest digits, at least two, that keep them distinct."""
    for digits in range(2, 17):
        rounded = [float(f"{value:.{digits}g}") for value in values]
        if len(set(rounded)) == len(rounded):
            break
    return rounded


def _space(left: float, right: float) -> float:
    """Return the minimum distance of two ticks, as a share of the axis, at which their labels do not touch."""
    widths = [plots.measure_text(_format_tick(p), 8.5) for p in (left, right)]
    return max(0.17, (sum(widths) / 2 + 0.08) / plots.PANEL_SIDE)


def _format_tick(p: float) -> str:
    return f"{p:.4f}".rstrip("0") if p < 0.01 or p > 0.99 else f"{p:.3g}"


def _set_unit_square(ax: Axes, x: str, y: str) -> None:
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.yaxis.set_label_coords(-0.15, 0.5)
    ax.grid(color=plots.FAINT, linewidth=0.6)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep at most `_POINTS` points of a curve at even steps along its length, including both ends."""
    if len(x) <= _POINTS:
        return x, y
    length = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
    kept = np.unique(np.searchsorted(length, np.linspace(0.0, length[-1], _POINTS)).clip(0, len(x) - 1))
    return x[kept], y[kept]
