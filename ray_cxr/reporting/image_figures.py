"""Figures of radiographs as files: examples, heat maps, and a random sample. The page shows them as `cards`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ray_cxr.imaging.overlays import color_scale
from ray_cxr.reporting import plots
from ray_cxr.reporting.cases import Band, Box, Case, Judgement, describe_labels, format_p
from ray_cxr.reporting.plots import GREY, INK, MUTED, VERMILION, format_finding

#: Sides in inches of an image and of its tile, with the gaps to its neighbours.
_SIDE, _MARGIN = 3.0, 0.15
#: Height in inches of a line of a table, and the left edges of its columns.
_LINE, _COLUMNS = 0.17, (0.0, 1.25, 1.68, 2.06, 2.7)
#: Lines of a table without its heading; findings beyond are counted.
_MOST = 6
#: Colour of boxes: distinct from the colours of heat maps, on black lungs and on white bones.
BOX_COLOUR = "#00e5ff"
_KEY = (
    "evidence for the finding, from none to the highest value in this map\n"
    "each map has its own scale: compare p, not colours"
)
_BOX_KEY = "radiologist's box for this finding\ndashed: for another finding"


def draw_examples(bands: Sequence[Band]) -> Figure:
    """Draw one row of radiographs per band, each with what labels and model state."""
    return _draw_cases(bands, pairs=False)


def draw_heatmaps(bands: Sequence[Band]) -> Figure:
    """Draw one row per band, each radiograph next to its heat map, below a colour key."""
    return _draw_cases(bands, pairs=True)


def _draw_cases(bands: Sequence[Band], *, pairs: bool) -> Figure:
    bands = [(title, cases) for title, cases in bands if cases]
    columns = max(len(cases) for _, cases in bands)
    wide = (2 if pairs else 1) * (_SIDE + _MARGIN)
    has_boxes = any(case.boxes for _, cases in bands for case in cases)
    top = 0.45 if pairs or has_boxes else 0.0
    tables = [1 + max(min(len(case.judgements), _MOST + 1) for case in cases) for _, cases in bands]
    heights = [0.4 + 0.5 + _SIDE + 0.32 + _LINE * lines + 0.25 for lines in tables]
    figure, place = plots.create_sheet(max(columns * wide + _MARGIN, 9.4 if pairs else 6.4), top + sum(heights))
    if pairs:
        _draw_key(figure, place)
    if has_boxes:
        _draw_box_key(figure, place, _MARGIN + (5.6 if pairs else 0.0))
    for (title, cases), height in zip(bands, heights, strict=True):
        _write(figure, place, _MARGIN, top + 0.08, title, fontsize=14, fontweight="bold")
        for column, case in enumerate(cases):
            left, down = _MARGIN + column * wide, top + 0.4
            _write_heading(figure, place, left, down, case)
            _draw_image(figure.add_axes(place(left, down + 0.5, _SIDE, _SIDE)), case.image, _explain(case), case)
            if pairs:
                ax = figure.add_axes(place(left + _SIDE + 0.06, down + 0.5, _SIDE, _SIDE))
                _draw_image(ax, case.overlay, f"no heat map: {case.no_overlay}", case)
            _write(figure, place, left, down + _SIDE + 0.56, _shorten(case.image_id), fontsize=9, color=MUTED)
            _write_table(figure, place, left, down + _SIDE + 0.8, case)
        top += height
    return figure


def _write(figure: Figure, place: plots.Box, left: float, down: float, text: str, **style: Any) -> None:
    x, y, *_ = place(left, down, 0, 0)
    figure.text(x, y, text, va="top", **{"color": INK, **style})


def _write_heading(figure: Figure, place: plots.Box, left: float, down: float, case: Case) -> None:
    """Name the finding that the case is an example of, with its probability and threshold."""
    assert case.finding is not None
    judged = case.judgements[0]
    threshold = "no threshold" if judged.threshold is None else f"threshold {format_p(judged.threshold, judged.p)}"
    _write(figure, place, left, down, format_finding(case.finding), fontsize=11, fontweight="bold")
    _write(figure, place, left, down + 0.23, f"p {format_p(judged.p, judged.threshold)}, {threshold}", fontsize=9)


def _write_table(figure: Figure, place: plots.Box, left: float, down: float, case: Case) -> None:
    """Write a line per finding that is labelled positive or flagged, that of the example first."""
    lines = [("finding", "label", "p", "threshold", "flag"), *map(_list_cells, case.judgements[:_MOST])]
    for row, cells in enumerate(lines):
        for column, text in zip(_COLUMNS, cells, strict=True):
            strong = column == 0 and row == 1
            colour = MUTED if row == 0 else VERMILION if (column, text) == (_COLUMNS[-1], "yes") else INK
            weight = "bold" if strong else "normal"
            _write(figure, place, left + column, down + row * _LINE, text, fontsize=8, color=colour, fontweight=weight)
    if len(case.judgements) > _MOST:
        more = f"and {len(case.judgements) - _MOST} more"
        _write(figure, place, left, down + len(lines) * _LINE, more, fontsize=8, color=GREY)


def _list_cells(judged: Judgement) -> tuple[str, ...]:
    label = "–" if judged.label is None else "yes" if judged.label else "no"
    flag = "–" if judged.flagged is None else "yes" if judged.flagged else "no"
    name = format_finding(judged.finding)
    p, threshold = format_p(judged.p, judged.threshold), format_p(judged.threshold, judged.p)
    return name if len(name) < 20 else name[:18] + "…", label, p, threshold, flag


def _explain(case: Case) -> str:
    return f"cannot be shown:\n{case.code}"


def _shorten(text: str, most: int = 44) -> str:
    return text if len(text) <= most else f"…{text[-most + 1 :]}"


def _draw_image(ax: Axes, image: np.ndarray | None, reason: str, case: Case) -> None:
    """Draw a radiograph [H, W] or an overlay [H, W, 3], uint8, with its boxes; or why there is none, on grey."""
    if image is None:
        ax.set_facecolor("#c2c6ca")
        reason = textwrap.fill(reason, 30)
        ax.text(0.5, 0.5, reason, transform=ax.transAxes, ha="center", va="center", fontsize=9, color=INK)
    else:
        ax.imshow(image, cmap="gray", vmin=0, vmax=255)
        ax.set_anchor("NW")
        for box in case.boxes:
            _draw_box(ax, box, image.shape[:2], is_own=box.finding == case.finding)
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _draw_box(ax: Axes, box: Box, shape: tuple[int, ...], *, is_own: bool) -> None:
    height, width = shape
    top, left, bottom, right = box.area
    corner = (left * width - 0.5, top * height - 0.5)  # pixels are centred on whole numbers
    style: dict[str, Any] = {"fill": False, "edgecolor": BOX_COLOUR, "linewidth": 1.6 if is_own else 1.0}
    line = "-" if is_own else "--"
    ax.add_patch(Rectangle(corner, (right - left) * width, (bottom - top) * height, linestyle=line, **style))


def _draw_key(figure: Figure, place: plots.Box) -> None:
    """Draw the colours of heat maps over gray, from no evidence to the highest value of a map."""
    scale = color_scale(64)
    colours = scale[:, :3] * scale[:, 3:] + 0.5 * (1 - scale[:, 3:])
    ax = figure.add_axes(place(_MARGIN, 0.12, 1.6, 0.14))
    ax.imshow(colours[None], aspect="auto")
    ax.set(xticks=[], yticks=[])
    _write(figure, place, _MARGIN + 1.75, 0.06, _KEY, fontsize=8.5, color=MUTED)


def _draw_box_key(figure: Figure, place: plots.Box, left: float) -> None:
    ax = figure.add_axes(place(left, 0.12, 0.24, 0.14), facecolor="#555555")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(color=BOX_COLOUR, linewidth=1.6)
    _write(figure, place, left + 0.34, 0.06, _BOX_KEY, fontsize=8.5, color=MUTED)


def draw_radiographs(bands: Sequence[Band]) -> Figure:
    """Draw a page of radiographs with their labels."""
    cases = [case for _, cases in bands for case in cases]
    columns = min(4, math.ceil(math.sqrt(len(cases))))
    rows = math.ceil(len(cases) / columns)
    tile, band = _SIDE + _MARGIN, _SIDE + 1.0
    figure, place = plots.create_sheet(columns * tile + _MARGIN, rows * band + 0.1)
    for index, case in enumerate(cases):
        left, down = _MARGIN + index % columns * tile, 0.1 + index // columns * band
        _draw_image(figure.add_axes(place(left, down, _SIDE, _SIDE)), case.image, _explain(case), case)
        text = "\n".join((_shorten(case.image_id), *textwrap.wrap(describe_labels(case), 46)[:2], case.note))
        _write(figure, place, left, down + _SIDE + 0.06, text, fontsize=8.5, linespacing=1.3)
    return figure
