"""Figures of estimates with intervals in rows: subgroups, paired differences, drift, localisation.

An undefined estimate is written as text, never drawn as a point. Every colour is repeated by a shape or a text.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ray_cxr.evaluation.drift import DIFFERS, LARGE, OK, WORDS, RateDrift
from ray_cxr.evaluation.localisation import IOU_LEVELS, FindingLocalisation, Localisation
from ray_cxr.reporting import plots
from ray_cxr.reporting.comparators import ScoreComparison
from ray_cxr.reporting.plots import (
    BLUE,
    FAINT,
    GREY,
    INK,
    MUTED,
    SMALL_TEXT,
    VERMILION,
    Estimate,
    Piece,
    format_finding,
)

#: Height of a row in inches.
_ROW = 0.27
#: Colour and marker of each overlap threshold, lowest first.
_COLOURS = (plots.SKY, BLUE, plots.GREEN, plots.ORANGE, VERMILION, MUTED, INK)
_THRESHOLD_MARKS = tuple(zip(_COLOURS, "os^DvPX", strict=True))
#: Colour and marker of a verdict on drift, and colour of the tolerated range.
_DRIFT_MARKS = {OK: (BLUE, "o"), DIFFERS: (VERMILION, "D"), LARGE: (VERMILION, "D")}
_TOLERATED = FAINT


@dataclass(frozen=True)
class ForestColumn:
    """One chart of a forest plot; `reference` is a line through all rows, labelled `reference_name`."""

    name: str
    reference: float | None = None
    reference_name: str = ""
    signed: bool = False
    percent: int | None = None  # digits after the point


@dataclass(frozen=True)
class ForestRow:
    """One group of a forest plot, with one estimate per chart; a small group has too few patients to be reliable."""

    attribute: str
    label: str
    n: int
    estimates: tuple[Estimate | None, ...]
    small: bool = False


@dataclass(frozen=True)
class _Line:
    """One row: cells of text at the left, and one text at the right of each chart."""

    cells: tuple[str, ...]
    values: tuple[str, ...] = ()
    colour: str = INK
    is_bold: bool = False


def plot_subgroups(rows: Sequence[ForestRow], columns: Sequence[ForestColumn], counted: str = "images") -> Figure:
    """Plot each group's estimates in one chart per column, with the value of all images as a line.

    `counted` heads the column of numbers.

    Small groups are grey and hollow. Intervals that leave a chart end in an arrow head.
    """
    lines: list[_Line] = []
    row_at_line: dict[int, ForestRow] = {}
    for attribute in dict.fromkeys(row.attribute for row in rows):
        lines.append(_Line((attribute, ""), is_bold=True))
        for row in (row for row in rows if row.attribute == attribute):
            row_at_line[len(lines)] = row
            pairs = zip(row.estimates, columns, strict=True)
            values = tuple(
                value.format(signed=column.signed, percent=column.percent) if value else "undefined"
                for value, column in pairs
            )
            lines.append(_Line((f"   {row.label}", f"{row.n:,}"), values, GREY if row.small else INK))
    legend: list[Artist] = [plots.create_marker_entry("value with 95% interval", BLUE, "o")]
    if any(row.small for row in rows):
        legend.append(plots.create_marker_entry("small group: interpret with caution", GREY, "o", "white"))
    width = 2.7 if len(columns) < 3 else 1.5
    figure, axes = _draw_forest(lines, ("", counted), [column.name for column in columns], legend, width=width)
    for index, (ax, column) in enumerate(zip(axes, columns, strict=True)):
        _set_limits(ax, [(row.estimates[index], row.small) for row in rows], column.reference)
        if column.percent is not None:
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:z.3g}%"))
        if column.reference is not None:
            ax.axvline(column.reference, color=VERMILION, linewidth=1.3, linestyle=plots.DASHED, zorder=1)
            low, high = ax.get_xlim()
            share = (column.reference - low) / (high - low)
            align = "left" if share < 0.3 else "right" if share > 0.7 else "center"
            style: dict[str, Any] = {"ha": align, "va": "bottom", "fontsize": SMALL_TEXT, "color": MUTED}
            above = ((column.reference, 1), (0, 4), ("data", "axes fraction"), "offset points")
            ax.annotate(column.reference_name, *above, **style)
        for line, row in row_at_line.items():
            colour = GREY if row.small else BLUE
            _draw_estimate(ax, line, row.estimates[index], colour=colour, marker="o", hollow=row.small)
    return figure


def _set_limits(ax: Axes, estimates: Sequence[tuple[Estimate | None, bool]], reference: float | None) -> None:
    """Fit the reference and all intervals of large groups; values of small groups extend the axis by at most half."""
    known = [(estimate, small) for estimate, small in estimates if estimate is not None]
    scaling = [estimate for estimate, small in known if not small] or [estimate for estimate, _ in known]
    ends = [end for estimate in scaling for end in _bounds(estimate)]
    ends = [*ends, *([] if reference is None else [reference])] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    reach = max(0.5 * (high - low), 0.02)
    points = [min(max(estimate.value, low - reach), high + reach) for estimate, _ in known]
    low, high = min([low, *points]), max([high, *points])
    margin = max(0.06 * (high - low), 0.004)
    ax.set_xlim(low - margin, high + margin)


def plot_differences(compared: ScoreComparison) -> Figure:
    """Plot the paired differences of two score tables, these scores − the others, below their macro mean.

    A marker is filled if its interval excludes 0, and hollow if not.
    """
    pairs = [("Macro mean", compared.macro), *compared.findings.items()]
    differences = [Estimate.of(pair, "difference") for _, pair in pairs]
    lines = []
    for row, ((name, pair), difference) in enumerate(zip(pairs, differences, strict=True)):
        value = difference.format(signed=True) + _format_p(pair.p) if difference else "undefined"
        lines.append(_Line((format_finding(name),), (value,), is_bold=row == 0))
    legend = [
        plots.create_marker_entry("95% interval excludes 0", BLUE, "o"),
        plots.create_marker_entry("interval includes 0", BLUE, "o", "white"),
        plots.create_marker_entry("macro mean", VERMILION, "D"),
    ]
    title = "AUROC of these scores − AUROC of the others\nright of 0: these scores have the higher AUROC"
    figure, (ax,) = _draw_forest(lines, ("",), [title], legend, width=3.0)
    ends = [abs(end) for difference in differences if difference for end in _bounds(difference)]
    end = max(1.08 * max(ends, default=0.0), 0.004)
    ax.set_xlim(-end, end)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+.3g}".replace("-", "−") if abs(x) > 1e-12 else "0"))
    ax.axvline(0, color=INK, linewidth=1.1, zorder=1)
    for row, difference in enumerate(differences):
        low, high = (difference.low, difference.high) if difference else (None, None)
        has_zero = low is None or high is None or low <= 0 <= high
        colour, marker = (VERMILION, "D") if row == 0 else (BLUE, "o")
        _draw_estimate(ax, row, difference, colour=colour, marker=marker, hollow=has_zero)
    ax.axhline(0.5, color=FAINT, linewidth=1)
    return figure


def plot_drift(rates: Sequence[RateDrift]) -> Figure | None:
    """Plot the difference of observed and expected flag rate of each finding, with the interval that decides.

    A bar behind each row is the tolerated range. A finding without a verdict has text instead of a marker. Returns None
    without flags.
    """
    rates = [rate for rate in rates if rate.observed is not None]
    if not rates:
        return None
    lines = []
    for rate in rates:
        shares = ("unknown" if share is None else plots.format_share(share) for share in (rate.expected, rate.observed))
        is_bold = rate.verdict in (DIFFERS, LARGE)
        lines.append(_Line((format_finding(rate.name), *shares), (WORDS[rate.verdict],), is_bold=is_bold))
    legend = [
        plots.create_marker_entry("as expected", BLUE, "o"),
        plots.create_marker_entry("inconclusive", GREY, "o", "white"),
        plots.create_marker_entry("different", VERMILION, "D"),
        plots.create_marker_entry("tolerated", _TOLERATED, "s"),
    ]
    title = "flagged − expected, in percentage points"
    figure, (ax,) = _draw_forest(lines, ("", "expected", "flagged"), [title], legend, width=3.0)
    ax.axvline(0, color=INK, linewidth=1.1, zorder=1)
    points = [_convert_to_points(rate) for rate in rates]
    bands = [100 * rate.tolerance if rate.tolerance is not None else 0.0 for rate in rates]
    end = max([1.5, *bands, *(abs(bound) for estimate in points if estimate for bound in _bounds(estimate))])
    ax.set_xlim(-1.05 * end, 1.05 * end)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+.3g}".replace("-", "−") if abs(x) > 1e-9 else "0"))
    for row, (rate, estimate, band) in enumerate(zip(rates, points, bands, strict=True)):
        ax.barh(row, 2 * band, left=-band, height=0.72, color=_TOLERATED, zorder=0.5)
        colour, marker = _DRIFT_MARKS.get(rate.verdict, (GREY, "o"))
        hollow = rate.verdict not in (OK, DIFFERS, LARGE)
        _draw_estimate(ax, row, estimate, colour=colour, marker=marker, hollow=hollow)
    return figure


def _convert_to_points(rate: RateDrift) -> Estimate | None:
    """Return the difference and its interval in percentage points; None if the finding has no verdict."""
    if rate.difference is None or rate.difference_low is None or rate.difference_high is None:
        return None
    return Estimate(100 * rate.difference, 100 * rate.difference_low, 100 * rate.difference_high)


def plot_localisation(found: Localisation) -> Figure:
    """Plot hit rate and, per level of overlap, the share of cases that reach it; bars mark chance and ceiling."""
    rows: list[tuple[str, FindingLocalisation]] = [*found.findings.items(), ("All findings", found.overall)]
    # Levels that no finding has a rate for are left out.
    rates = {t: [Estimate.of(row.iou_at_least[t]) for _, row in rows] for t in IOU_LEVELS}
    rates = {threshold: values for threshold, values in rates.items() if any(values)}
    hits = [Estimate.of(row.hit_rate) for _, row in rows]
    lines = [
        _Line((format_finding(name), f"{row.n:,}"), (hit.format(percent=0) if hit else "undefined", ""))
        for (name, row), hit in zip(rows, hits, strict=True)
    ]
    titles = ["hit rate: the map peaks in the box", "share of cases whose region and boxes overlap"]
    marks = dict(zip(rates, itertools.cycle(_THRESHOLD_MARKS), strict=False))
    legend: list[Artist] = [
        plots.create_line_entry("chance", INK, "-"),
        plots.create_line_entry("ceiling of these maps", MUTED, ":"),
        *(plots.create_marker_entry(f"IoU ≥ {threshold:g}", *mark) for threshold, mark in marks.items()),
    ]
    height = max(_ROW, 0.09 + 0.105 * len(rates))
    figure, axes = _draw_forest(lines, ("", "cases"), titles if rates else titles[:1], legend, height=height)
    for ax in axes:
        ax.set_xlim(-0.02, 1.02)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        for y in range(len(rows) - 1):
            ax.axhline(y + 0.5, color=FAINT, linewidth=0.7)
    for y, ((_, row), hit) in enumerate(zip(rows, hits, strict=True)):
        _draw_estimate(axes[0], y, hit, colour=BLUE, marker="o")
        for limit, colour, style in ((row.chance, INK, "-"), (row.ceiling, MUTED, ":")):
            if limit is not None:
                axes[0].plot([limit] * 2, [y - 0.28, y + 0.28], color=colour, linestyle=style, linewidth=1.6)
        for index, (threshold, values) in enumerate(rates.items()):
            offset = 0.8 * ((index + 0.5) / len(rates) - 0.5)
            colour, marker = marks[threshold]
            _draw_estimate(axes[1], y + offset, values[y], colour=colour, marker=marker, size=4.5)
    return figure


def _draw_forest(
    lines: Sequence[_Line],
    headers: Sequence[str],
    charts: Sequence[str],
    handles: Sequence[Artist],
    *,
    width: float = 2.7,
    height: float = _ROW,
) -> tuple[Figure, list[Axes]]:
    """Draw a legend, columns of text, and empty charts with a column of text each; row i is at y = i from the top."""
    gap, edge, measure = 0.15, 0.15, plots.measure_text
    cell_widths = [
        max(measure(head, SMALL_TEXT), *(measure(line.cells[i], 9, bold=line.is_bold) for line in lines))
        for i, head in enumerate(headers)
    ]
    value_widths = [
        max([0.0, *(measure(line.values[i], 8.5, bold=line.is_bold) for line in lines if line.values)])
        for i in range(len(charts))
    ]
    names = ["\n".join(textwrap.fill(part, int(width * 17)) for part in name.split("\n")) for name in charts]
    total = edge + sum(size + gap for size in cell_widths) + sum(width + 0.12 + size + gap for size in value_widths)
    legend_rows = math.ceil(len(handles) / plots.count_legend_columns(total, handles))
    top, bottom = 0.45 + 0.2 * legend_rows, 0.4 + 0.15 * max(name.count("\n") + 1 for name in names)
    figure, box = plots.create_sheet(total, top + height * len(lines) + bottom)
    figure.is_whole_on_wide = True
    plots.draw_legend(figure, handles)

    def write(left: float, texts: Sequence[str], align: str, size: float) -> list[Artist]:
        written: list[Artist] = []
        for row, (line, text) in enumerate(zip(lines, texts, strict=True)):
            x, y, _, _ = box(left, top + (row + 0.5) * height, 0, 0)
            style: dict[str, Any] = {"color": line.colour, "fontweight": "bold" if line.is_bold else "normal"}
            if text:
                written.append(figure.text(x, y, text, ha=align, va="center_baseline", fontsize=size, **style))
        return written

    left = edge
    texts: list[Artist] = []
    for i, (size, head) in enumerate(zip(cell_widths, headers, strict=True)):
        # Names are left-aligned, numbers right-aligned.
        anchor, align = (left, "left") if i == 0 else (left + size, "right")
        x, y, _, _ = box(anchor, top - 0.14, 0, 0)
        if head:
            style: dict[str, Any] = {"ha": align, "va": "center_baseline", "fontsize": SMALL_TEXT, "color": MUTED}
            texts.append(figure.text(x, y, head, **style))
        texts += write(anchor, [line.cells[i] for line in lines], align, 9)
        left += size + gap
        if i == 0:
            # A narrow page shows each chart next to the names; its tables have the numbers.
            above = top - 0.25
            names_of_rows = Piece((0, above, left, figure.get_figheight() - above), tuple(texts))
    axes = []
    for i, (size, name) in enumerate(zip(value_widths, names, strict=True)):
        ax = figure.add_axes(box(left, top, width, height * len(lines)))
        plots.style_axes(ax, grid="x")
        ax.set(ylim=(len(lines) - 0.5, -0.5), yticks=[], xlabel=name)
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(max(2, int(width / 0.62))))
        axes.append(ax)
        figure.parts.append((names_of_rows, Piece((left, above, width + gap, names_of_rows.box[3]), (ax,))))
        write(left + width + 0.12, [line.values[i] if line.values else "" for line in lines], "left", 8.5)
        left += width + 0.12 + size + gap
    return figure, axes


def _draw_estimate(
    ax: Axes, y: float, estimate: Estimate | None, *, colour: str, marker: str, hollow: bool = False, size: float = 6.5
) -> None:
    """Draw an estimate at height `y`, or nothing for None; parts beyond the frame become an arrow head."""
    if estimate is None:
        return
    left, right = ax.get_xlim()
    ends = _bounds(estimate)
    if estimate.low is not None and estimate.high is not None:
        bar = [min(max(end, left), right) for end in (estimate.low, estimate.high)]
        ax.plot(bar, [y, y], color=colour, linewidth=1.4 if hollow else 2.2, solid_capstyle="butt", zorder=2)
    for edge, arrow, is_cut in ((left, "<", min(ends) < left), (right, ">", max(ends) > right)):
        if is_cut:
            ax.plot([edge], [y], arrow, color=colour, markersize=5, clip_on=False, zorder=3)
    if left <= estimate.value <= right:
        face = "white" if hollow else colour
        ax.plot([estimate.value], [y], marker, color=colour, markerfacecolor=face, markersize=size, zorder=4)


def _bounds(estimate: Estimate) -> list[float]:
    return [end for end in (estimate.value, estimate.low, estimate.high) if end is not None]


def _format_p(p: float | None) -> str:
    return "" if p is None else ", p < 0.001" if p < 0.001 else f", p {p:.3f}" if p < 0.1 else f", p {p:.2f}"
