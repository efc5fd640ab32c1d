"""The report's further pictures, in the style of `plots`: calibration, subgroups, drift, labels, pages of scans.

Numbers come in finished and are only drawn here. What nothing is known of is drawn as words, never as a point;
with nothing at all to draw, a figure says so. Whatever a colour says, a shape, a place or a word says too.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ray_cxr.reporting import plots
from ray_cxr.reporting.plots import (
    BLUE,
    DASHED,
    FAINT,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    SKY,
    VERMILION,
    Example,
    Panel,
    spaced,
)

_ROW = 0.27  # inches a line of a forest plot takes
_SMALL_TEXT = 8.0
#: Probabilities are kept this far from 0 and 1 on a logit axis; float32 cannot resolve more near 1.
_EPSILON = 1e-6
#: Marks of localisation's thresholds and their shades, the least overlap first.
_SHADES = ((SKY, "o"), (BLUE, "s"), (GREEN, "^"), (ORANGE, "D"), (VERMILION, "v"), (MUTED, "P"), (INK, "X"))


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval; an interval that is not known is None."""

    value: float
    low: float | None = None
    high: float | None = None

    def written(self, *, signed: bool = False, percent: bool = False) -> str:
        """`0.812 (0.790–0.831)`; signed `+0.012 (−0.003 to +0.027)`; in percent `81% (79–83%)`."""
        sign = "+" if signed else ""
        spec, scale, unit = (f"{sign}.0f", 100, "%") if percent else (f"{sign}.3f", 1, "")
        value, *bounds = (
            f"{scale * number:{spec}}".replace("-", "−")
            for number in (self.value, self.low, self.high)
            if number is not None
        )
        if len(bounds) < 2:
            return value + unit
        between = " to " if signed else "–"
        return f"{value}{unit} ({bounds[0]}{between}{bounds[1]}{unit})"


@dataclass(frozen=True)
class Reliability:
    """Calibration of one finding.

    Attributes:
        finding: its name.
        p: calibrated probabilities [n] in 0..1, n > 0, for the histogram.
        predicted, observed: floats [k], k > 0: mean probability and share of positives in each bin that has images.
        low, high: floats [k], the 95% interval of `observed`; NaN where a bin has none.
        error: expected calibration error, or None.
    """

    finding: str
    p: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error: Estimate | None


@dataclass(frozen=True)
class ForestColumn:
    """One quantity of a forest plot.

    Attributes:
        name: the axis says it.
        reference: value of the line through all rows, or None.
        reference_name: what the line is, such as `all images 0.812`.
        signed: values are differences.
    """

    name: str
    reference: float | None = None
    reference_name: str = ""
    signed: bool = False


@dataclass(frozen=True)
class ForestRow:
    """One group of a forest plot.

    Attributes:
        attribute: what the group is a value of, such as `Sex`; rows of one attribute stand together.
        label: the group.
        n, positives: images, and positive labels (None: not told).
        estimates: one per column of the figure, None where undefined.
        small: too few for the value to be leaned on; drawn grey and hollow.
    """

    attribute: str
    label: str
    n: int
    positives: int | None
    estimates: tuple[Estimate | None, ...]
    small: bool = False


@dataclass(frozen=True)
class Difference:
    """One finding (or the macro mean) of a paired comparison.

    Attributes:
        label: the finding.
        estimate: difference and interval, None where undefined.
        p: two-sided, or None.
        macro: the row is the mean over findings; it stands on top.
    """

    label: str
    estimate: Estimate | None
    p: float | None = None
    macro: bool = False


@dataclass(frozen=True)
class Drift:
    """One finding's flags against what was expected.

    Attributes:
        finding: its name.
        observed: share of images flagged, with its interval.
        expected: share to expect, or None.
        beyond: further off than chance explains.
    """

    finding: str
    observed: Estimate
    expected: float | None
    beyond: bool


@dataclass(frozen=True)
class Localisation:
    """How well one finding's heat maps point to its boxes.

    Attributes:
        finding: its name.
        boxes: number of cases with a map, an image and a finding each.
        hit: share of boxes that the map's peak falls into, or None.
        hit_chance: the same for a point thrown anywhere, or None.
        accuracy: by threshold T, the share of boxes overlapped with IoU >= T.
        chance: the same without looking at the image, by threshold; may lack some.
    """

    finding: str
    boxes: int
    hit: Estimate | None
    hit_chance: float | None
    accuracy: Mapping[float, Estimate]
    chance: Mapping[float, float]


@dataclass(frozen=True)
class HeatmapExample:
    """One tile of the page of heat maps.

    Attributes:
        example: the picture, its findings by label and by flag, and its highest probabilities.
        finding: what the heat map was drawn for.
        overlay: uint8[H,W,3], or None; then `reason` says why.
        score: the finding's raw probability, or None.
    """

    example: Example
    finding: str
    overlay: np.ndarray | None
    reason: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Radiograph:
    """One tile of the page of scans.

    Attributes:
        picture: uint8[H,W], or None where it cannot be shown; then `code` says why.
        code: the error code, or None.
        findings: by label; empty for none of them, None for an image without labels.
        note: a line of the caller's, such as view, sex and age.
    """

    picture: np.ndarray | None
    code: str | None
    findings: tuple[str, ...] | None
    note: str = ""


# --- Calibration and scores


def reliability(panels: Sequence[Reliability]) -> Figure:
    """Share of positives against mean calibrated probability, one panel per finding, over a histogram of predictions.

    Both axes of a panel end just above its largest point and are square-root scales, so that rare findings and small
    probabilities can be read; the label says so. An interval that goes on beyond the frame ends in an arrow head.
    """
    if not panels:
        return _nothing("no calibrated probabilities with labels")
    known: list[Artist] = [
        plots.line_key("perfect calibration", MUTED, DASHED),
        plots.mark_key("images of like probability, with 95% interval", BLUE, "o"),
        Patch(color=SKY, label="number of images, log scale (last bar: and above)"),
    ]
    figure, axes = plots.grid(len(panels), known, below=0.5)
    for place, panel in enumerate(panels):
        end = _end(panel)
        _observed(axes[place], panel, end)
        _predictions(axes[len(panels) + place], panel, end)
    return figure


def _observed(ax: Axes, panel: Reliability, end: float) -> None:
    ax.plot([0, end], [0, end], color=MUTED, linewidth=1, linestyle=DASHED)
    predicted, low, high = (np.asarray(part, dtype=float) for part in (panel.predicted, panel.low, panel.high))
    ax.vlines(predicted, low, np.minimum(high, end), color=BLUE, linewidth=1.3)
    beyond = high > end
    if beyond.any():
        ax.plot(predicted[beyond], np.full(int(beyond.sum()), end), "^", color=BLUE, markersize=4.5, clip_on=False)
    ax.plot(predicted, panel.observed, "o-", color=BLUE, markersize=4.5, linewidth=0.8, clip_on=False, zorder=4)
    ax.set_xscale("function", functions=(_root, np.square))
    ax.set_yscale("function", functions=(_root, np.square))
    ax.set_xlim(0, end)
    ax.set_ylim(0, end)
    ticks = [0, end / 4, end]
    ax.set_xticks(ticks, [])
    ax.set_yticks(ticks, [_percent(tick) for tick in ticks], fontsize=7.5)
    ax.set_ylabel("observed share", fontsize=8)
    ax.yaxis.set_label_coords(-0.2, 0.5)
    ax.grid(color=FAINT, linewidth=0.6)
    error = "undefined" if panel.error is None else panel.error.written()
    plots.heading(ax, panel.finding, f"ECE {error}")


def _predictions(ax: Axes, panel: Reliability, end: float) -> None:
    # As wide as each other where they are drawn.
    edges = end * np.linspace(0, 1, 31) ** 2
    counts, _ = np.histogram(np.clip(panel.p, 0, end), bins=edges)
    ax.set_yscale("log")
    ax.stairs(np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, color=SKY)
    most = int(counts.max())
    ax.set_ylim(0.5, 1.6 * most)
    ax.set_yticks([1, most] if most > 3 else [most], ["1", f"{most:,}"] if most > 3 else [f"{most}"])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.tick_params(axis="y", labelsize=7)
    ax.set_xscale("function", functions=(_root, np.square))
    ax.set_xlim(0, end)
    ticks = [0, end / 4, end]
    ax.set_xticks(ticks, [_percent(tick) for tick in ticks])
    ax.set_xlabel(f"calibrated probability (root scale to {_percent(end)})", fontsize=8)


def _root(x: np.ndarray) -> np.ndarray:
    # Matplotlib tries a scale below 0 too.
    return np.sqrt(np.maximum(x, 0))


def _end(panel: Reliability) -> float:
    """Where both axes end: the least round number above all points, nearly all predictions and, up to twice as far
    as the points, their intervals."""
    points = max(float(np.max(panel.predicted)), float(np.max(panel.observed)), 1e-4)
    highs = np.asarray(panel.high, dtype=float)
    highs = highs[~np.isnan(highs)]
    reach = min(2 * points, float(highs.max())) if highs.size else 0.0
    largest = max(1.04 * points, reach, float(np.quantile(panel.p, 0.99)))
    power = 10.0 ** math.floor(math.log10(largest))
    return min(1.0, next(step * power for step in (1, 2, 3, 4, 6, 8, 10) if largest <= step * power * (1 + 1e-9)))


def distributions(panels: Sequence[Panel]) -> Figure:
    """Scores of positives (upwards) and negatives (downwards), one panel per finding, with the threshold as a line.

    Scores in 0..1 stand on a logit axis, others on a plain one. Each half is scaled to its own peak: shapes compare,
    not numbers.
    """
    if not panels:
        return _nothing("no finding has positives and negatives")
    known: list[Artist] = [
        Patch(color=ORANGE, label="up: positives"),
        Patch(color=BLUE, label="down: negatives (each half to its own peak)"),
    ]
    if any(panel.threshold is not None for panel in panels):
        known.append(plots.line_key("operating point: flagged to the right", INK))
    figure, axes = plots.grid(len(panels), known)
    for ax, panel in zip(axes, panels, strict=True):
        _halves(ax, panel)
    return figure


def _halves(ax: Axes, panel: Panel) -> None:
    y, s = np.asarray(panel.y).astype(bool), np.asarray(panel.s, dtype=np.float64)
    on_logit = bool(s.min() >= 0 and s.max() <= 1)
    x = _logit(s) if on_logit else s
    line = panel.threshold
    if line is not None and on_logit:
        line = float(_logit(np.asarray(line)))
    ends = [*np.quantile(x[y], [0.001, 0.999]), *np.quantile(x[~y], [0.001, 0.999]), *([] if line is None else [line])]
    low, high = float(min(ends)), float(max(ends))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
    # As many bars as the rarer class can fill.
    bins = int(np.clip(2 * math.sqrt(min(y.sum(), (~y).sum())), 8, 50))
    for part, sign, colour in ((x[y], 1, ORANGE), (x[~y], -1, BLUE)):
        counts, edges = np.histogram(np.clip(part, low, high), bins=bins, range=(low, high))
        ax.stairs(sign * counts / counts.max(), edges, fill=True, color=colour)
    ax.axhline(0, color=INK, linewidth=0.8)
    if line is not None:
        ax.axvline(line, color=INK, linewidth=1.4)
    ax.set_xlim(low, high)
    ax.set_ylim(-1.08, 1.08)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    if on_logit:
        places, names = _logit_ticks(low, high)
        ax.set_xticks(places, names)
        ax.set_xlabel("raw score (logit axis)", fontsize=8)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.set_xlabel("raw score", fontsize=8)
    told = f"{int(y.sum()):,} positives, {int((~y).sum()):,} negatives"
    plots.heading(ax, panel.finding, told)


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, _EPSILON, 1 - _EPSILON)
    return np.log(p) - np.log1p(-p)


def _logit_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Round probabilities on a logit axis, as many as have room."""
    tiers: list[Sequence[float]] = [
        (1e-4, 1e-2, 0.5, 0.99, 0.9999) if high - low > 12 else (1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 0.999),
        (*(k * 10.0**-e for e in (4, 3, 2) for k in (1, 2, 5)), *(k / 10 for k in range(1, 10)), 0.95, 0.98, 0.99),
        list(np.linspace(1 / (1 + math.exp(-low)), 1 / (1 + math.exp(-high)), 3)),
    ]
    for candidates in tiers:
        chosen: list[float] = []
        for p in candidates:
            place = float(_logit(np.asarray(p)))
            inside = low - 1e-9 <= place <= high + 1e-9
            if inside and (not chosen or place - float(_logit(np.asarray(chosen[-1]))) >= 0.17 * (high - low)):
                chosen.append(p)
        if len(chosen) >= 3:
            break
    return [float(_logit(np.asarray(p))) for p in chosen], [
        f"{p:.4f}".rstrip("0") if p < 0.01 or p > 0.99 else f"{p:.3g}" for p in chosen
    ]


# --- Labels


def cooccurrence(counts: np.ndarray, findings: Sequence[str], n: int) -> Figure:
    """How often findings are labelled together: in each row the images with its finding, by what else they have.

    Args:
        counts: whole numbers [F,F]: images with both findings; the diagonal has all images with the one.
        findings: F names.
        n: number of images, for the diagonal's share.

    Raises:
        ValueError: shapes differ.
    """
    counts = np.asarray(counts)
    size = len(findings)
    if counts.shape != (size, size):
        raise ValueError(f"counts have the shape {counts.shape}, for {size} findings")
    if not size or not n:
        return _nothing("no labelled images")
    names = [spaced(finding) for finding in findings]
    totals = np.diag(counts)
    shares = counts / np.maximum(totals, 1)[:, None]
    off = ~np.eye(size, dtype=bool) & (totals > 0)[:, None]
    most = max(0.01, float(shares[off].max())) if off.any() else 0.01
    cell, slope = 0.52, math.radians(50)
    lengths = [plots.inches(name, 8.5) for name in names]
    left, high = 0.25 + max(lengths), 0.45 + max(lengths) * math.sin(slope)
    ends = [(place + 0.8) * cell + length * math.cos(slope) for place, length in enumerate(lengths)]
    wide = max(left + max(cell * size + 1.1, *ends), 4.5)
    figure, box = plots.sheet(wide, high + cell * size + 0.45)
    ax = figure.add_axes(box(left, high, cell * size, cell * size))
    colours = colormaps["Blues"].copy()
    colours.set_bad(FAINT)
    mesh = ax.pcolormesh(
        np.where(off, shares, np.nan), cmap=colours, norm=Normalize(0, most), edgecolors="white", linewidth=0.8
    )
    ax.set_ylim(size, 0)
    for row, column in np.ndindex(counts.shape):
        share = float(totals[row] / n if row == column else shares[row, column])
        defined = row == column or bool(totals[row])
        dark = bool(off[row, column]) and _luminance(colours(share / most)) < 0.22
        _cell(ax, row, column, int(counts[row, column]), share if defined else None, "white" if dark else INK)
    middles = np.arange(size) + 0.5
    ax.set_yticks(middles, names, fontsize=8.5)
    ax.xaxis.tick_top()
    ax.set_xticks(middles, names, fontsize=8.5, rotation=math.degrees(slope), ha="left", rotation_mode="anchor")
    ax.tick_params(length=0, pad=3, labelcolor=INK)
    for spine in ax.spines.values():
        spine.set_visible(False)
    _colour_bar(figure, figure.add_axes(box(left + cell * size + 0.2, high, 0.16, min(cell * size, 2.6))), mesh)
    told = f"Each cell: of the images with the row's finding, those with the column's too. Diagonal: of all {n:,}."
    x, y, _, _ = box(0.12, figure.get_figheight() - 0.08, 0, 0)
    figure.text(x, y, textwrap.fill(told, int(wide * 15)), fontsize=_SMALL_TEXT, color=MUTED)
    return figure


def _cell(ax: Axes, row: int, column: int, count: int, share: float | None, colour: str) -> None:
    ax.text(
        column + 0.5,
        row + 0.5,
        f"{count:,}\n{'–' if share is None else _share(share)}",
        ha="center",
        va="center",
        fontsize=6.6,
        linespacing=1.2,
        color=colour,
        fontweight="bold" if row == column else "normal",
    )


def _colour_bar(figure: Figure, ax: Axes, mesh: QuadMesh) -> None:
    bar = figure.colorbar(mesh, cax=ax)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: _percent(share)))
    ax.tick_params(labelsize=8, color=MUTED, labelcolor=INK, length=3)
    bar.set_label("share of the row", fontsize=8, color=MUTED)
    bar.outline.set_visible(False)


# --- Intervals in rows


@dataclass(frozen=True)
class _Line:
    """One row of a forest plot: its cells at the left, and one text per chart at the chart's right."""

    cells: tuple[str, ...]
    values: tuple[str, ...] = ()
    colour: str = INK
    bold: bool = False


def subgroup_forest(rows: Sequence[ForestRow], columns: Sequence[ForestColumn]) -> Figure:
    """Groups with their numbers, and for each column a chart of values and intervals around the value of all images.

    Small groups are grey and hollow. Intervals that leave a chart end in an arrow head.

    Raises:
        ValueError: a row has not one estimate per column.
    """
    if any(len(row.estimates) != len(columns) for row in rows):
        raise ValueError(f"each row needs {len(columns)} estimates, one per column")
    if not rows or not columns:
        return _nothing("no groups")
    lines: list[_Line] = []
    placed: dict[int, ForestRow] = {}
    for attribute in dict.fromkeys(row.attribute for row in rows):
        lines.append(_Line((attribute, "", ""), bold=True))
        for row in (row for row in rows if row.attribute == attribute):
            placed[len(lines)] = row
            values = tuple(
                "undefined" if estimate is None else estimate.written(signed=column.signed)
                for estimate, column in zip(row.estimates, columns, strict=True)
            )
            numbers = (f"{row.n:,}", "" if row.positives is None else f"{row.positives:,}")
            lines.append(_Line((f"   {row.label}", *numbers), values, GREY if row.small else INK))
    told = any(row.positives is not None for row in rows)
    known: list[Artist] = [plots.mark_key("value with 95% interval", BLUE, "o")]
    if any(row.small for row in rows):
        known.append(plots.mark_key("small group: do not lean on it", GREY, "o", "white"))
    headers = ("", "images", "positives" if told else "")
    figure, axes = _forest(lines, headers, [column.name for column in columns], known)
    for place, (ax, column) in enumerate(zip(axes, columns, strict=True)):
        _set_limits(ax, [(row.estimates[place], row.small) for row in rows], column.reference)
        if column.reference is not None:
            ax.axvline(column.reference, color=VERMILION, linewidth=1.3, linestyle=DASHED, zorder=1)
            _above(ax, column.reference, column.reference_name)
        for at, row in placed.items():
            look = {"colour": GREY, "marker": "o", "hollow": True} if row.small else {"colour": BLUE, "marker": "o"}
            _estimate(ax, at, row.estimates[place], **look)
    return figure


def _set_limits(ax: Axes, estimates: Sequence[tuple[Estimate | None, bool]], reference: float | None) -> None:
    """Room for the firm estimates whole and for the reference; a small group's point may add a half of that."""
    known = [(one, small) for one, small in estimates if one is not None]
    firm = [end for one, small in known for end in _ends(one) if not small]
    firm = firm or [end for one, _ in known for end in _ends(one)]
    ends = [*firm, *([] if reference is None else [reference])] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    reach = max(0.5 * (high - low), 0.02)
    points = [min(max(one.value, low - reach), high + reach) for one, _ in known]
    low, high = min([low, *points]), max([high, *points])
    room = max(0.06 * (high - low), 0.004)
    ax.set_xlim(low - room, high + room)


def compared(rows: Sequence[Difference], first: str, second: str, quantity: str = "AUROC") -> Figure:
    """Paired differences of two score sets, `first` less `second`, per finding; the macro mean on top.

    A filled mark: the interval leaves 0 out. A hollow one: it holds 0.
    """
    if not rows:
        return _nothing("nothing to compare")
    rows = [*(row for row in rows if row.macro), *(row for row in rows if not row.macro)]
    lines = [
        _Line(
            (spaced(row.label),),
            ("undefined" if row.estimate is None else row.estimate.written(signed=True) + _p(row.p),),
            bold=row.macro,
        )
        for row in rows
    ]
    known: list[Artist] = [
        plots.mark_key("95% interval leaves 0 out", BLUE, "o"),
        plots.mark_key("interval holds 0: no difference shown", BLUE, "o", "white"),
    ]
    if any(row.macro for row in rows):
        known.append(plots.mark_key("macro mean", VERMILION, "D"))
    name = f"{quantity} of {first} − {quantity} of {second}\nright of 0: {first} is higher"
    figure, axes = _forest(lines, ("",), [name], known, width=3.6)
    ax = axes[0]
    ends = [abs(end) for row in rows if row.estimate for end in _ends(row.estimate)]
    end = max(1.08 * max(ends, default=0.0), 0.004)
    ax.set_xlim(-end, end)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+.3g}".replace("-", "−") if abs(x) > 1e-12 else "0"))
    ax.axvline(0, color=INK, linewidth=1.1, zorder=1)
    for at, row in enumerate(rows):
        clear = row.estimate is not None and _excludes(row.estimate, 0.0)
        _estimate(
            ax, at, row.estimate, colour=VERMILION if row.macro else BLUE, marker="D" if row.macro else "o",
            hollow=not clear,
        )  # fmt: skip
    if any(row.macro for row in rows) and not all(row.macro for row in rows):
        ax.axhline(sum(row.macro for row in rows) - 0.5, color=FAINT, linewidth=1)
    return figure


def drift(rows: Sequence[Drift]) -> Figure:
    """How many times as often as expected each finding was flagged, on a logarithmic axis.

    A diamond: beyond chance. A hollow circle: within it. No flags at all are an arrow head at the left edge; a
    finding without an expected rate, or with one of 0, has words instead of a mark.
    """
    if not rows:
        return _nothing("no flags")
    ratios = [_over(row) for row in rows]
    lines = [
        _Line(
            (
                spaced(row.finding),
                "not known" if row.expected is None else _share(row.expected),
                _share(row.observed.value),
            ),
            ("no ratio" if ratio is None else _times(ratio.value),),
            bold=row.beyond,
        )
        for row, ratio in zip(rows, ratios, strict=True)
    ]
    known = [
        plots.mark_key("within chance, with 95% interval", BLUE, "o", "white"),
        plots.mark_key("beyond chance", VERMILION, "D"),
    ]
    name = "flagged, as a multiple of what was expected"
    figure, (ax,) = _forest(lines, ("", "expected", "flagged"), [name], known, width=3.8)
    _ratio_axis(ax, [ratio for ratio in ratios if ratio])
    ax.axvline(1, color=INK, linewidth=1.1, zorder=1)
    for at, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        colour, marker = (VERMILION, "D") if row.beyond else (BLUE, "o")
        _estimate(ax, at, ratio, colour=colour, marker=marker, hollow=not row.beyond)
    return figure


def _ratio_axis(ax: Axes, ratios: Sequence[Estimate]) -> None:
    """A logarithmic axis around 1, with ticks at powers of two."""
    ax.set_xscale("log")
    away = [1.12 * max(end, 1 / end) for ratio in ratios for end in _ends(ratio) if end > 0]
    points = [1.12 * max(ratio.value, 1 / ratio.value) for ratio in ratios if ratio.value > 0]
    # Intervals of rare findings reach far; points stay inside.
    span = max([2.2, min(16.0, max(away, default=1.0)), *points])
    ax.set_xlim(1 / span, span)
    doublings = int(math.log2(span))
    step = math.ceil(doublings / 3)
    powers = range(-(doublings // step) * step, doublings + 1, step)
    ax.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"× {x:g}" if x >= 1 else f"× 1/{1 / x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())


def _over(row: Drift) -> Estimate | None:
    if not row.expected:
        return None
    low, high = row.observed.low, row.observed.high
    return Estimate(
        row.observed.value / row.expected,
        None if low is None else low / row.expected,
        None if high is None else high / row.expected,
    )


def _times(ratio: float) -> str:
    return "none flagged" if ratio == 0 else f"× {ratio:.2g}" if ratio < 100 else f"× {ratio:.0f}"


def localisation(rows: Sequence[Localisation]) -> Figure:
    """Hit rate and, at each threshold of overlap, the share of boxes found, per finding; short bars are chance."""
    if not rows:
        return _nothing("no boxes")
    thresholds = sorted({threshold for row in rows for threshold in row.accuracy})
    looks = {threshold: _SHADES[place % len(_SHADES)] for place, threshold in enumerate(thresholds)}
    lines = [
        _Line(
            (spaced(row.finding), f"{row.boxes:,}"),
            ("undefined" if row.hit is None else row.hit.written(percent=True), ""),
        )
        for row in rows
    ]
    names = ["hit rate: the map's peak lies in the box", "boxes found: IoU of map and box ≥ T"]
    known: list[Artist] = [
        plots.line_key("chance", INK, "-"),
        *(plots.mark_key(f"T = {threshold:g}", *looks[threshold]) for threshold in thresholds),
    ]
    tall = max(_ROW, 0.09 + 0.105 * len(thresholds))
    figure, axes = _forest(lines, ("", "cases"), names if thresholds else names[:1], known, row=tall)
    for ax in axes:
        ax.set_xlim(-0.02, 1.02)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        for at in range(len(rows) - 1):
            ax.axhline(at + 0.5, color=FAINT, linewidth=0.7)
    for at, row in enumerate(rows):
        _estimate(axes[0], at, row.hit, colour=BLUE, marker="o")
        if row.hit_chance is not None:
            axes[0].plot([row.hit_chance] * 2, [at - 0.28, at + 0.28], color=INK, linewidth=1.6)
        for place, threshold in enumerate(thresholds):
            where = at + 0.8 * ((place + 0.5) / len(thresholds) - 0.5)
            colour, marker = looks[threshold]
            _estimate(axes[1], where, row.accuracy.get(threshold), colour=colour, marker=marker, size=4.5)
            if threshold in row.chance:
                half = 0.32 / len(thresholds)
                axes[1].plot([row.chance[threshold]] * 2, [where - half, where + half], color=INK, linewidth=1.6)
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
    """A key, columns of text, then charts with a column of text each; rows from the top, row i at y = i."""
    gap, edge = 0.2, 0.15
    cells = [
        max(plots.inches(head, _SMALL_TEXT), *(plots.inches(line.cells[i], 9, bold=line.bold) for line in lines))
        for i, head in enumerate(headers)
    ]
    values = [
        max([0.0, *(plots.inches(line.values[i], 8.5, bold=line.bold) for line in lines if line.values)])
        for i in range(len(charts))
    ]
    names = ["\n".join(textwrap.fill(part, int(width * 17)) for part in name.split("\n")) for name in charts]
    wide = edge + sum(size + gap for size in cells) + sum(width + 0.12 + size + gap for size in values)
    keyed = math.ceil(len(handles) / plots.key_columns(wide, handles))
    top, bottom = 0.45 + 0.2 * keyed, 0.4 + 0.15 * max(name.count("\n") + 1 for name in names)
    figure, box = plots.sheet(wide, top + row * len(lines) + bottom)
    plots.key(figure, handles)
    left = edge
    for i, (size, head) in enumerate(zip(cells, headers, strict=True)):
        # Names from the left, numbers to the right.
        at, align = (left, "left") if i == 0 else (left + size, "right")
        x, y, _, _ = box(at, top - 0.14, 0, 0)
        figure.text(x, y, head, ha=align, va="center_baseline", fontsize=_SMALL_TEXT, color=MUTED)
        _column(figure, box, at, top, row, [(line, line.cells[i]) for line in lines], align, 9)
        left += size + gap
    axes = []
    for i, (size, name) in enumerate(zip(values, names, strict=True)):
        ax = figure.add_axes(box(left, top, width, row * len(lines)))
        plots.style(ax)
        ax.set_ylim(len(lines) - 0.5, -0.5)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_xlabel(name)
        ax.grid(axis="x", color=FAINT, linewidth=0.7)
        ax.set_axisbelow(True)
        axes.append(ax)
        told = [(line, line.values[i] if line.values else "") for line in lines]
        _column(figure, box, left + width + 0.12, top, row, told, "left", 8.5)
        left += width + 0.12 + size + gap
    return figure, axes


def _column(
    figure: Figure,
    box: plots.Box,
    left: float,
    top: float,
    row: float,
    texts: Sequence[tuple[_Line, str]],
    align: str,
    size: float,
) -> None:
    for at, (line, text) in enumerate(texts):
        if text:
            x, y, _, _ = box(left, top + (at + 0.5) * row, 0, 0)
            weight = "bold" if line.bold else "normal"
            figure.text(x, y, text, ha=align, va="center_baseline", fontsize=size, color=line.colour, fontweight=weight)


def _estimate(
    ax: Axes,
    at: float,
    estimate: Estimate | None,
    *,
    colour: str,
    marker: str,
    hollow: bool = False,
    size: float = 6.5,
) -> None:
    """A point and its interval in row `at`, nothing for None; what lies beyond the frame is an arrow head there."""
    if estimate is None:
        return
    left, right = ax.get_xlim()
    ends = _ends(estimate)
    if estimate.low is not None and estimate.high is not None:
        bar = [min(max(end, left), right) for end in (estimate.low, estimate.high)]
        ax.plot(bar, [at, at], color=colour, linewidth=1.4 if hollow else 2.2, solid_capstyle="butt", zorder=2)
    for edge, arrow, beyond in ((left, "<", min(ends) < left), (right, ">", max(ends) > right)):
        if beyond:
            ax.plot([edge], [at], arrow, color=colour, markersize=5, clip_on=False, zorder=3)
    if left <= estimate.value <= right:
        face = "white" if hollow else colour
        ax.plot([estimate.value], [at], marker, color=colour, markerfacecolor=face, markersize=size, zorder=4)


def _above(ax: Axes, x: float, words: str) -> None:
    """Words over a line at x, kept within the axes' width."""
    low, high = ax.get_xlim()
    part = (x - low) / (high - low)
    align = "left" if part < 0.3 else "right" if part > 0.7 else "center"
    ax.annotate(words, (x, 1), (0, 4), ("data", "axes fraction"), "offset points", ha=align, va="bottom",
                fontsize=_SMALL_TEXT, color=VERMILION)  # fmt: skip


def _ends(estimate: Estimate) -> list[float]:
    return [end for end in (estimate.value, estimate.low, estimate.high) if end is not None]


def _excludes(estimate: Estimate, value: float) -> bool:
    return estimate.low is not None and estimate.high is not None and not estimate.low <= value <= estimate.high


def _p(p: float | None) -> str:
    return "" if p is None else ", p < 0.001" if p < 0.001 else f", p {p:.3f}" if p < 0.1 else f", p {p:.2f}"


# --- Pages of scans


def heatmap_examples(groups: Sequence[tuple[str, Sequence[HeatmapExample]]]) -> Figure:
    """A page of predictions: one band per group, in each tile the radiograph and beside it its heat map.

    Args:
        groups: (name such as "Missed, lowest scores", its tiles); groups without tiles are left out.
    """
    groups = [(name, tiles) for name, tiles in groups if tiles]
    if not groups:
        return _nothing("no examples")
    columns = min(3, max(len(tiles) for _, tiles in groups))
    side, tile, band, head, margin = 2.2, 4.72, 3.5, 0.45, 0.12
    lines = [math.ceil(len(tiles) / columns) for _, tiles in groups]
    figure, box = plots.sheet(columns * tile + margin, sum(lines) * band + len(groups) * head)
    width, height = figure.get_size_inches()
    top = 0.0
    for (name, tiles), count in zip(groups, lines, strict=True):
        figure.text(
            margin / width, 1 - (top + 0.14) / height, name, va="top", fontsize=13, fontweight="bold", color=INK
        )
        for place, one in enumerate(tiles):
            left, down = margin + place % columns * tile, top + head + 0.27 + place // columns * band
            plots.radiograph(figure.add_axes(box(left, down, side, side)), one.example, 38)
            right = left + side + 0.06
            _overlay(figure.add_axes(box(right, down, side, side)), one)
            plots.bars(figure.add_axes(box(right + 1.42, down + side + 0.1, side - 1.44, 0.5)), one.example)
        top += head + count * band
    return figure


def _overlay(ax: Axes, one: HeatmapExample) -> None:
    if one.overlay is None:
        plots.blank(ax, textwrap.fill(f"no heat map: {one.reason or 'not drawn'}", 26))
    else:
        plots.scan(ax, one.overlay)
    score = "" if one.score is None else f", p {one.score:.2g}"
    ax.annotate(f"heat map: {spaced(one.finding)}{score}", (0, 1), (0, 5), "axes fraction", "offset points",
                fontsize=8.5, color=INK)  # fmt: skip


def radiographs(tiles: Sequence[Radiograph]) -> Figure:
    """A page of scans with their labels."""
    if not tiles:
        return _nothing("no radiographs")
    columns = min(6, math.ceil(math.sqrt(len(tiles))))
    rows = math.ceil(len(tiles) / columns)
    side, tile, band = 2.1, 2.25, 2.72
    figure, box = plots.sheet(columns * tile + 0.13, rows * band + 0.1)
    for place, one in enumerate(tiles):
        ax = figure.add_axes(box(0.14 + place % columns * tile, 0.1 + place // columns * band, side, side))
        if one.picture is None:
            plots.blank(ax, f"cannot be shown:\n{one.code}")
        else:
            plots.scan(ax, one.picture)
        names = "not labelled" if one.findings is None else ", ".join(map(spaced, one.findings)) or "no finding"
        written = textwrap.wrap(names, 36)
        below = ["\n".join(written[:2]) + (" …" if len(written) > 2 else ""), *([one.note] if one.note else [])]
        ax.annotate("\n".join(below), (0, 0), (0, -4), "axes fraction", "offset points", va="top",
                    fontsize=7.8, color=INK, linespacing=1.25)  # fmt: skip
    return figure


# --- What they share


def _nothing(why: str) -> Figure:
    figure, _ = plots.sheet(4.5, 0.8)
    figure.text(0.5, 0.5, f"Nothing to show: {why}.", ha="center", va="center", fontsize=10, color=MUTED)
    return figure


def _percent(share: float) -> str:
    """A share in percent with no more digits than it takes, for axes: `0.75%`, `5%`, `12%`."""
    return f"{float(f'{100 * share:.3g}'):g}%"


def _share(share: float) -> str:
    """A share in percent with two or three digits, for columns of them: `0.34%`, `5.0%`, `12%`."""
    value = 100 * share
    return (
        "0%"
        if value == 0
        else f"{value:.0f}%"
        if value >= 9.95
        else f"{value:.1f}%"
        if value >= 0.995
        else f"{value:.2g}%"
    )


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
