"""Figures of estimates with intervals in rows: subgroups, paired differences, drift, localisation.

An undefined estimate is written as text, never drawn as a point. Every colour is repeated by a shape or a text.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ray_cxr.reporting import plots
from ray_cxr.reporting.plots import BLUE, FAINT, GREY, INK, MUTED, SMALL_TEXT, VERMILION, Estimate, format_finding

#: Height of a row in inches.
_ROW = 0.27
#: Colour and marker of each overlap threshold, lowest first.
_COLOURS = (plots.SKY, BLUE, plots.GREEN, plots.ORANGE, VERMILION, MUTED, INK)
_THRESHOLD_MARKS = tuple(zip(_COLOURS, "os^DvPX", strict=True))


@dataclass(frozen=True)
class ForestColumn:
    """One chart of a forest plot; `reference` is a line through all rows, labelled `reference_name`."""

    name: str
    reference: float | None = None
    reference_name: str = ""
    signed: bool = False


@dataclass(frozen=True)
class ForestRow:
    """One group of a forest plot, with one estimate per chart; a small group has too few patients to be reliable."""

    attribute: str
    label: str
    n: int
    estimates: tuple[Estimate | None, ...]
    small: bool = False


@dataclass(frozen=True)
class DifferenceRow:
    """One finding of a paired comparison, or their macro mean; p is two-sided."""

    label: str
    estimate: Estimate | None
    p: float | None = None
    macro: bool = False


@dataclass(frozen=True)
class DriftRow:
    """One finding's share of flagged images and the expected share; `significant` if chance does not explain it."""

    finding: str
    observed: Estimate
    expected: float | None
    significant: bool


@dataclass(frozen=True)
class LocalisationRow:
    """One finding's heat maps and boxes: hit rate, that of a random point, and share of cases with IoU >= T by T."""

    finding: str
    cases: int
    hit: Estimate | None
    hit_chance: float | None
    accuracy: Mapping[float, Estimate]


@dataclass(frozen=True)
class _Line:
    """One row: cells of text at the left, and one text at the right of each chart."""

    cells: tuple[str, ...]
    values: tuple[str, ...] = ()
    colour: str = INK
    bold: bool = False


def plot_subgroups(rows: Sequence[ForestRow], columns: Sequence[ForestColumn]) -> Figure:
    """Plot each group's estimates in one chart per column, with the value of all images as a line.

    Small groups are grey and hollow. Intervals that leave a chart end in an arrow head.
    """
    if any(len(row.estimates) != len(columns) for row in rows):
        raise ValueError(f"each row needs {len(columns)} estimates, one per column")
    if not rows or not columns:
        return plots.create_placeholder("no groups")
    lines: list[_Line] = []
    placed: dict[int, ForestRow] = {}
    for attribute in dict.fromkeys(row.attribute for row in rows):
        lines.append(_Line((attribute, ""), bold=True))
        for row in (row for row in rows if row.attribute == attribute):
            placed[len(lines)] = row
            pairs = zip(row.estimates, columns, strict=True)
            values = tuple(one.format(signed=column.signed) if one else "undefined" for one, column in pairs)
            lines.append(_Line((f"   {row.label}", f"{row.n:,}"), values, GREY if row.small else INK))
    known: list[Artist] = [plots.create_marker_entry("value with 95% interval", BLUE, "o")]
    if any(row.small for row in rows):
        known.append(plots.create_marker_entry("small group: interpret with caution", GREY, "o", "white"))
    figure, axes = _forest(lines, ("", "images"), [column.name for column in columns], known)
    for place, (ax, column) in enumerate(zip(axes, columns, strict=True)):
        _set_limits(ax, [(row.estimates[place], row.small) for row in rows], column.reference)
        if column.reference is not None:
            ax.axvline(column.reference, color=VERMILION, linewidth=1.3, linestyle=plots.DASHED, zorder=1)
            low, high = ax.get_xlim()
            part = (column.reference - low) / (high - low)
            style: dict[str, Any] = {
                "ha": "left" if part < 0.3 else "right" if part > 0.7 else "center",
                "va": "bottom",
            }
            style |= {"fontsize": SMALL_TEXT, "color": VERMILION}
            above = ((column.reference, 1), (0, 4), ("data", "axes fraction"), "offset points")
            ax.annotate(column.reference_name, *above, **style)
        for at, row in placed.items():
            colour = GREY if row.small else BLUE
            _draw_estimate(ax, at, row.estimates[place], colour=colour, marker="o", hollow=row.small)
    return figure


def _set_limits(ax: Axes, estimates: Sequence[tuple[Estimate | None, bool]], reference: float | None) -> None:
    """Fit the reference and all intervals of large groups; values of small groups extend the axis by at most half."""
    known = [(one, small) for one, small in estimates if one is not None]
    scaling = [one for one, small in known if not small] or [one for one, _ in known]
    ends = [end for one in scaling for end in _bounds(one)]
    ends = [*ends, *([] if reference is None else [reference])] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    reach = max(0.5 * (high - low), 0.02)
    points = [min(max(one.value, low - reach), high + reach) for one, _ in known]
    low, high = min([low, *points]), max([high, *points])
    room = max(0.06 * (high - low), 0.004)
    ax.set_xlim(low - room, high + room)


def plot_differences(rows: Sequence[DifferenceRow], first: str, second: str) -> Figure:
    """Plot paired differences of two score tables, `first` − `second`, per finding, with the macro mean on top.

    A filled marker has an interval that excludes 0; a hollow one has an interval that includes it.
    """
    if not rows:
        return plots.create_placeholder("nothing to compare")
    rows = sorted(rows, key=lambda row: not row.macro)
    lines = []
    for row in rows:
        value = row.estimate.format(signed=True) + _format_p(row.p) if row.estimate else "undefined"
        lines.append(_Line((format_finding(row.label),), (value,), bold=row.macro))
    known: list[Artist] = [
        plots.create_marker_entry("95% interval excludes 0", BLUE, "o"),
        plots.create_marker_entry("interval includes 0", BLUE, "o", "white"),
    ]
    if any(row.macro for row in rows):
        known.append(plots.create_marker_entry("macro mean", VERMILION, "D"))
    name = f"AUROC of {first} − AUROC of {second}\nright of 0: {first} is higher"
    figure, (ax,) = _forest(lines, ("",), [name], known, width=3.6)
    ends = [abs(end) for row in rows if row.estimate for end in _bounds(row.estimate)]
    end = max(1.08 * max(ends, default=0.0), 0.004)
    ax.set_xlim(-end, end)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+.3g}".replace("-", "−") if abs(x) > 1e-12 else "0"))
    ax.axvline(0, color=INK, linewidth=1.1, zorder=1)
    for at, row in enumerate(rows):
        low, high = (row.estimate.low, row.estimate.high) if row.estimate else (None, None)
        includes = low is None or high is None or low <= 0 <= high
        colour, marker = (VERMILION, "D") if row.macro else (BLUE, "o")
        _draw_estimate(ax, at, row.estimate, colour=colour, marker=marker, hollow=includes)
    if any(row.macro for row in rows) and not all(row.macro for row in rows):
        ax.axhline(sum(row.macro for row in rows) - 0.5, color=FAINT, linewidth=1)
    return figure


def plot_drift(rows: Sequence[DriftRow]) -> Figure:
    """Plot the ratio of observed to expected flag rate of each finding on a logarithmic axis.

    A diamond differs by more than chance, a hollow circle does not. A finding without flags is an arrow head at the
    left edge; one without an expected rate, or with the rate 0, has text instead of a marker.
    """
    if not rows:
        return plots.create_placeholder("no flags")
    ratios = [_divide(row.observed, row.expected) if row.expected else None for row in rows]
    lines = []
    for row, ratio in zip(rows, ratios, strict=True):
        expected = "unknown" if row.expected is None else plots.format_share(row.expected)
        cells = (format_finding(row.finding), expected, plots.format_share(row.observed.value))
        lines.append(_Line(cells, (_format_ratio(ratio.value) if ratio else "no ratio",), bold=row.significant))
    known = [
        plots.create_marker_entry("consistent with chance, with 95% interval", BLUE, "o", "white"),
        plots.create_marker_entry("more than chance", VERMILION, "D"),
    ]
    name = "ratio of flagged to expected"
    figure, (ax,) = _forest(lines, ("", "expected", "flagged"), [name], known, width=3.8)
    _ratio_axis(ax, [ratio for ratio in ratios if ratio])
    ax.axvline(1, color=INK, linewidth=1.1, zorder=1)
    for at, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        colour, marker = (VERMILION, "D") if row.significant else (BLUE, "o")
        _draw_estimate(ax, at, ratio, colour=colour, marker=marker, hollow=not row.significant)
    return figure


def _ratio_axis(ax: Axes, ratios: Sequence[Estimate]) -> None:
    """Set a logarithmic axis around 1 with ticks at powers of two."""
    ax.set_xscale("log")
    away = [1.12 * max(end, 1 / end) for ratio in ratios for end in _bounds(ratio) if end > 0]
    points = [1.12 * max(ratio.value, 1 / ratio.value) for ratio in ratios if ratio.value > 0]
    # Intervals of rare findings may leave the axis, values may not.
    span = max([2.2, min(16.0, max(away, default=1.0)), *points])
    ax.set_xlim(1 / span, span)
    doublings = int(math.log2(span))
    step = math.ceil(doublings / 3)
    powers = range(-(doublings // step) * step, doublings + 1, step)
    ax.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"× {x:g}" if x >= 1 else f"× 1/{1 / x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def _divide(one: Estimate, divisor: float) -> Estimate:
    low, high = (None if end is None else end / divisor for end in (one.low, one.high))
    return Estimate(one.value / divisor, low, high)


def _format_ratio(ratio: float) -> str:
    return "none flagged" if ratio == 0 else f"× {ratio:.2g}" if ratio < 100 else f"× {ratio:.0f}"


def plot_localisation(rows: Sequence[LocalisationRow]) -> Figure:
    """Plot hit rate and, per threshold of overlap, the share of boxes found; short bars mark chance."""
    if not rows:
        return plots.create_placeholder("no boxes")
    thresholds = sorted({threshold for row in rows for threshold in row.accuracy})
    marks = {threshold: _THRESHOLD_MARKS[place % len(_THRESHOLD_MARKS)] for place, threshold in enumerate(thresholds)}
    rates = [row.hit.format(percent=True) if row.hit else "undefined" for row in rows]
    cells = [(format_finding(row.finding), f"{row.cases:,}") for row in rows]
    lines = [_Line(cell, (rate, "")) for cell, rate in zip(cells, rates, strict=True)]
    names = ["hit rate: the map peaks in the box", "boxes found: IoU of map and box ≥ T"]
    known: list[Artist] = [
        plots.create_line_entry("chance", INK, "-"),
        *(plots.create_marker_entry(f"T = {threshold:g}", *marks[threshold]) for threshold in thresholds),
    ]
    tall = max(_ROW, 0.09 + 0.105 * len(thresholds))
    figure, axes = _forest(lines, ("", "cases"), names if thresholds else names[:1], known, row=tall)
    for ax in axes:
        ax.set_xlim(-0.02, 1.02)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        for at in range(len(rows) - 1):
            ax.axhline(at + 0.5, color=FAINT, linewidth=0.7)
    for at, row in enumerate(rows):
        _draw_estimate(axes[0], at, row.hit, colour=BLUE, marker="o")
        if row.hit_chance is not None:
            axes[0].plot([row.hit_chance] * 2, [at - 0.28, at + 0.28], color=INK, linewidth=1.6)
        for place, threshold in enumerate(thresholds):
            where = at + 0.8 * ((place + 0.5) / len(thresholds) - 0.5)
            colour, marker = marks[threshold]
            _draw_estimate(axes[1], where, row.accuracy.get(threshold), colour=colour, marker=marker, size=4.5)
    return figure


def _forest(
    lines: Sequence[_Line],
    headers: Sequence[str],
    charts: Sequence[str],
    handles: Sequence[Artist],
    *,
    width: float = 2.7,
    row: float = _ROW,
) -> tuple[Figure, list[Axes]]:
    """Lay out a legend, columns of text, and charts with a column of text each; row i is at y = i from the top."""
    gap, edge, measure = 0.2, 0.15, plots.measure_text
    cells = [
        max(measure(head, SMALL_TEXT), *(measure(line.cells[i], 9, bold=line.bold) for line in lines))
        for i, head in enumerate(headers)
    ]
    values = [
        max([0.0, *(measure(line.values[i], 8.5, bold=line.bold) for line in lines if line.values)])
        for i in range(len(charts))
    ]
    names = ["\n".join(textwrap.fill(part, int(width * 17)) for part in name.split("\n")) for name in charts]
    wide = edge + sum(size + gap for size in cells) + sum(width + 0.12 + size + gap for size in values)
    keyed = math.ceil(len(handles) / plots.count_legend_columns(wide, handles))
    top, bottom = 0.45 + 0.2 * keyed, 0.4 + 0.15 * max(name.count("\n") + 1 for name in names)
    figure, box = plots.create_sheet(wide, top + row * len(lines) + bottom)
    plots.draw_legend(figure, handles)

    def write(left: float, texts: Sequence[str], align: str, size: float) -> None:
        for at, (line, text) in enumerate(zip(lines, texts, strict=True)):
            x, y, _, _ = box(left, top + (at + 0.5) * row, 0, 0)
            style: dict[str, Any] = {
                "fontsize": size,
                "color": line.colour,
                "fontweight": "bold" if line.bold else "normal",
            }
            figure.text(x, y, text, ha=align, va="center_baseline", **style)

    left = edge
    for i, (size, head) in enumerate(zip(cells, headers, strict=True)):
        # Names are left-aligned, numbers right-aligned.
        at, align = (left, "left") if i == 0 else (left + size, "right")
        x, y, _, _ = box(at, top - 0.14, 0, 0)
        figure.text(x, y, head, ha=align, va="center_baseline", fontsize=SMALL_TEXT, color=MUTED)
        write(at, [line.cells[i] for line in lines], align, 9)
        left += size + gap
    axes = []
    for i, (size, name) in enumerate(zip(values, names, strict=True)):
        ax = figure.add_axes(box(left, top, width, row * len(lines)))
        plots.style_axes(ax)
        ax.set(ylim=(len(lines) - 0.5, -0.5), yticks=[], xlabel=name)
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.grid(axis="x", color=FAINT, linewidth=0.7)
        ax.set_axisbelow(True)
        axes.append(ax)
        write(left + width + 0.12, [line.values[i] if line.values else "" for line in lines], "left", 8.5)
        left += width + 0.12 + size + gap
    return figure, axes


def _draw_estimate(
    ax: Axes, at: float, estimate: Estimate | None, *, colour: str, marker: str, hollow: bool = False, size: float = 6.5
) -> None:
    """Draw an estimate in row `at`, or nothing for None; parts beyond the frame become an arrow head."""
    if estimate is None:
        return
    left, right = ax.get_xlim()
    ends = _bounds(estimate)
    if estimate.low is not None and estimate.high is not None:
        bar = [min(max(end, left), right) for end in (estimate.low, estimate.high)]
        ax.plot(bar, [at, at], color=colour, linewidth=1.4 if hollow else 2.2, solid_capstyle="butt", zorder=2)
    for edge, arrow, beyond in ((left, "<", min(ends) < left), (right, ">", max(ends) > right)):
        if beyond:
            ax.plot([edge], [at], arrow, color=colour, markersize=5, clip_on=False, zorder=3)
    if left <= estimate.value <= right:
        face = "white" if hollow else colour
        ax.plot([estimate.value], [at], marker, color=colour, markerfacecolor=face, markersize=size, zorder=4)


def _bounds(estimate: Estimate) -> list[float]:
    return [end for end in (estimate.value, estimate.low, estimate.high) if end is not None]


def _format_p(p: float | None) -> str:
    return "" if p is None else ", p < 0.001" if p < 0.001 else f", p {p:.3f}" if p < 0.1 else f", p {p:.2f}"
