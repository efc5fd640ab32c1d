"""Figures of decisions: net benefit over thresholds, and rates over the share of images that the model keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy.special import logit

from ray_cxr.evaluation.net_benefit import DecisionCurve
from ray_cxr.evaluation.selective import GRID, RATES, Selection
from ray_cxr.reporting import plots

_ALPHA = 0.2
_COLOURS = dict(zip(RATES, (plots.VERMILION, plots.BLUE, plots.GREEN), strict=True))


def plot_net_benefit(curves: Mapping[str, DecisionCurve]) -> Figure:
    """Plot net benefit in hits per 1,000 images, one panel per finding, over thresholds on a log-odds axis."""
    legend: list[Artist] = [
        plots.create_line_entry("flag by calibrated probability, with 95% interval", plots.BLUE),
        plots.create_line_entry("flag all images", plots.ORANGE),
        plots.create_line_entry("flag no image", plots.MUTED, plots.DASHED),
    ]
    figure, axes = plots.create_grid(len(curves), legend)
    for ax, (finding, curve) in zip(axes, curves.items(), strict=True):
        x, model = logit(curve.thresholds), 1000 * curve.model.value
        ax.fill_between(x, 1000 * curve.model.low, 1000 * curve.model.high, color=plots.BLUE, alpha=_ALPHA, linewidth=0)
        ax.plot(x, 1000 * curve.treat_all, color=plots.ORANGE, linewidth=1.4)
        ax.axhline(0, color=plots.MUTED, linewidth=1, linestyle=plots.DASHED)
        ax.plot(x, model, color=plots.BLUE, linewidth=1.7)
        top = 1.1 * max(float(np.nanmax(1000 * np.append(curve.model.high, curve.model.value))), 1e-6)
        ax.set(xlim=(x[0], x[-1]), ylim=(-0.25 * top, top))
        ticks = np.array([0, len(x) // 2, len(x) - 1])
        ax.set_xticks(x[ticks], [plots.format_share(t) for t in curve.thresholds[ticks]])
        ax.set_xlabel("threshold probability (log-odds axis)", fontsize=8)
        ax.set_ylabel("net hits per 1,000 images", fontsize=8)
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_formatter(FuncFormatter(_format_hits))
        ax.tick_params(axis="y", labelsize=7.5)
        ax.grid(color=plots.FAINT, linewidth=0.6)
        ranges = [" to ".join(dict.fromkeys(map(plots.format_share, limits))) for limits in curve.benefit]
        more = f" and {len(ranges) - 2} more" if len(ranges) > 2 else ""
        plots.set_heading(ax, finding, f"useful: {', '.join(ranges[:2])}{more}" if ranges else "no benefit shown")
    return figure


def _format_hits(value: float, _: int) -> str:
    return f"{value:z,.3g}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}"


def plot_selection(found: Mapping[str, Selection]) -> Figure:
    """Plot error rate, sensitivity and specificity of the images kept over their share, one panel per finding."""
    legend: list[Artist] = [plots.create_line_entry(name.replace("_", " "), _COLOURS[name]) for name in RATES]
    legend.append(plots.create_line_entry("error rate if only errors were handed over", plots.MUTED, plots.DASHED))
    legend.append(Patch(color=plots.MUTED, alpha=_ALPHA, label="95% interval"))
    figure, axes = plots.create_grid(len(found), legend)
    style: dict[str, Any] = {"alpha": _ALPHA, "linewidth": 0}
    for ax, (finding, selection) in zip(axes, found.items(), strict=True):
        for name in RATES:
            band = selection.curves[name]
            ax.fill_between(GRID, band.low, band.high, color=_COLOURS[name], **style)
            ax.plot(GRID, band.value, color=_COLOURS[name], linewidth=1.6)
        best = np.maximum(selection.curves["error_rate"].value[-1] - (1 - GRID), 0) / GRID
        ax.plot(GRID, best, color=plots.MUTED, linewidth=1, linestyle=plots.DASHED)
        ax.set(xlim=(GRID[0], 1), ylim=(-0.01, 1.01))
        ax.set_xticks([0.5, 0.75, 1], ["50%", "75%", "100%"])
        ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        ax.set_xlabel("images kept, most certain first", fontsize=8)
        ax.grid(color=plots.FAINT, linewidth=0.6)
        share = selection.errors_handed_over.value
        line = "no errors" if share is None else f"least certain 10%: {plots.format_share(share)} of errors"
        plots.set_heading(ax, finding.capitalize() if finding.islower() else finding, line)
    return figure
