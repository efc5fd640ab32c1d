"""The figure of nights: the share of flagged images in each, by finding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ray_cxr.evaluation.drift import DIFFERS, LARGE, OK, RateDrift
from ray_cxr.reporting import plots
from ray_cxr.reporting.night_results import NightResult

_MARKS = {OK: (plots.BLUE, "o"), DIFFERS: (plots.VERMILION, "D"), LARGE: (plots.VERMILION, "D")}
#: With more nights, only the first, the last and some others have a date.
_TICKS = 4


def plot_nights(nights: Sequence[NightResult]) -> Figure | None:
    """Plot each finding's share of flagged images by night, with the interval that decides; None without flags.

    The line and the band are the share that the bundle expects and what it tolerates.
    """
    findings = [
        [night.expected.flags[place] for night in nights]
        for place, rate in enumerate(nights[0].expected.flags)
        if any(night.expected.flags[place].observed is not None for night in nights)
    ]
    totals = [night.flagged.total for night in nights]
    if not findings:
        return None
    legend = [
        plots.create_marker_entry("as expected", plots.BLUE, "o"),
        plots.create_marker_entry("inconclusive or not tested", plots.GREY, "o", "white"),
        plots.create_marker_entry("different", plots.VERMILION, "D"),
        plots.create_line_entry("expected by the bundle", plots.MUTED, plots.DASHED),
        Patch(color=plots.FAINT, label="tolerated"),
    ]
    figure, axes = plots.create_grid(2 + len(findings), legend, high=1.35)
    shares = [None if total is None else total.images / total.n for total in totals]
    _draw_shares(axes[0], "Any finding", shares, nights)
    _draw_rates(axes[1], "Images not scored", [night.expected.errors for night in nights], nights)
    for ax, rates in zip(axes[2:], findings, strict=True):
        _draw_rates(ax, rates[0].name, rates, nights)
    return figure


def _draw_shares(ax: Axes, name: str, shares: Sequence[float | None], nights: Sequence[NightResult]) -> None:
    known = [(x, share) for x, share in enumerate(shares) if share is not None]
    ax.plot(*zip(*known, strict=True), "o", color=plots.GREY, markerfacecolor="white", markersize=5)
    _finish(ax, name, shares[-1], max(share for _, share in known), nights)


def _draw_rates(ax: Axes, name: str, rates: Sequence[RateDrift], nights: Sequence[NightResult]) -> None:
    expected = [rate.expected for rate in rates]
    highest = [share for share in expected if share is not None]
    for x, rate in enumerate(rates):
        if rate.expected is not None and rate.tolerance is not None:
            bottom, top = max(0.0, rate.expected - rate.tolerance), rate.expected + rate.tolerance
            ax.fill_between([x - 0.5, x + 0.5], bottom, top, color=plots.FAINT, linewidth=0, zorder=0.5)
            highest.append(top)
    if expected[0] is not None:
        style: dict[str, Any] = {"linestyle": plots.DASHED, "linewidth": 1.1, "zorder": 1}
        ax.axhline(expected[0], color=plots.MUTED, **style)
    for x, rate in enumerate(rates):
        if rate.observed is None:
            continue
        colour, marker = _MARKS.get(rate.verdict, (plots.GREY, "o"))
        low, high = rate.low, rate.high
        if rate.expected is not None and rate.difference_low is not None and rate.difference_high is not None:
            # The interval of the verdict: it excludes the line, or lies within the band.
            low, high = (max(0.0, rate.expected + end) for end in (rate.difference_low, rate.difference_high))
        if low is not None and high is not None:
            ax.plot([x, x], [low, high], color=colour, linewidth=1.6, solid_capstyle="butt", zorder=2)
            highest.append(high)
        face = colour if rate.verdict in _MARKS else "white"
        ax.plot([x], [rate.observed], marker, color=colour, markerfacecolor=face, markersize=5, zorder=3)
        highest.append(rate.observed)
    _finish(ax, name, rates[-1].observed, max(highest, default=0.0), nights)


def _finish(ax: Axes, name: str, last: float | None, highest: float, nights: Sequence[NightResult]) -> None:
    shown = "none scored" if last is None else plots.format_share(last)
    plots.set_heading(ax, name, f"last night {shown}")
    plots.style_axes(ax, grid="y")
    ax.set_ylim(0.0, max(0.01, 1.08 * min(highest, 1.0)))
    ax.set_xlim(-0.6, len(nights) - 0.4)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: plots.format_percent(y)))
    places = sorted({round(i * (len(nights) - 1) / (_TICKS - 1)) for i in range(_TICKS)})
    ax.set_xticks(places, [_shorten(nights[place].name) for place in places])
    ax.tick_params(axis="x", labelsize=7)


def _shorten(name: str) -> str:
    """Return month and day of a date, or the start of another name."""
    return name[5:10] if name[4:5] == "-" else f"{name[:7]}…" if len(name) > 8 else name
