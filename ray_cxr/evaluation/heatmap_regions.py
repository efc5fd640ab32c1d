"""Geometry of heat maps and boxes: areas of overlap, and boxes around the regions of a map.

Coordinates: a map [h,w] covers a square image with h x w equal cells, and a value belongs to its cell's centre. Boxes
are edges [k,4]: left, top, right, bottom, in pixels of an image with the given side. Areas are exact, also if a box
edge cuts a cell.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy import ndimage

#: Minimum cells along an axis of the map whose regions are compared with boxes.
WORKING_SIDE = 256
#: Thresholds of a map scaled to 0..255, whose regions get boxes (Wang et al. 2017).
REGION_THRESHOLDS = (60, 180)


def upsample(heat: np.ndarray) -> np.ndarray:
    """Interpolate a map bilinearly to at least `WORKING_SIDE` cells per axis, constant beyond the outermost centres."""
    rows, columns = (_weigh_cells(cells, max(cells, WORKING_SIDE)) for cells in heat.shape)
    return heat if heat.shape == (len(rows), len(columns)) else np.asarray(rows @ heat @ columns.T)


def find_cells_inside(shape: tuple[int, ...], boxes: np.ndarray, side: float) -> np.ndarray:
    """Return which cells of a map of this shape have their centre in a box, bool [h,w]."""
    y, x = ((np.arange(cells) + 0.5) * side / cells for cells in shape)
    return _find_inside(boxes, y, x)


def compute_union_area(boxes: np.ndarray, side: float) -> float:
    """Return the area of the union of boxes within the image."""
    return float(compute_cover((1, 1), boxes, side)[0, 0]) * side**2


def compute_cover(shape: tuple[int, ...], boxes: np.ndarray, side: float) -> np.ndarray:
    """Return the part of each cell that lies in the union of boxes, float [h,w] in 0..1."""
    # Box edges cut the image into pieces, each inside or outside the union.
    y, x = (np.unique(np.clip(boxes[:, [start, start + 2]], 0.0, side)) for start in (1, 0))
    inside = _find_inside(boxes, (y[1:] + y[:-1]) / 2, (x[1:] + x[:-1]) / 2)
    rows, columns = (_cover_cells(edges, cells, side) for edges, cells in zip((y, x), shape, strict=True))
    return np.asarray(rows @ inside @ columns.T)


def compute_overlaps(values: np.ndarray, levels: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Return the IoU of the boxes with the region of values [h,w] that reach each of the ascending levels."""
    reached = np.searchsorted(levels, values.ravel(), side="right")  # number of levels that each cell reaches
    both, marked = (
        np.bincount(reached, weights, len(levels) + 1)[::-1].cumsum()[-2::-1] for weights in (cover.ravel(), None)
    )
    either = marked + cover.sum() - both
    return np.asarray(np.divide(both, either, out=np.zeros(len(levels)), where=either > 0))


def draw_boxes(unit: np.ndarray, side: float) -> np.ndarray:
    """Return boxes [k,4] around each connected region above each of `REGION_THRESHOLDS`, of a map scaled to 0..1."""
    found = []
    for threshold in REGION_THRESHOLDS:
        labels, _ = ndimage.label(255.0 * unit > threshold)  # regions connect through edges, not corners
        found += [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]
    height, width = unit.shape
    return np.array(found, dtype=np.float64).reshape(-1, 4) * (side / np.array([width, height, width, height]))


def compare_boxes(drawn: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return IoBB, the intersection divided by the area of the drawn box, and IoU of each pair; float [k,n] each."""
    low, high = np.maximum(drawn[:, None, :2], boxes[:, :2]), np.minimum(drawn[:, None, 2:], boxes[:, 2:])
    both = np.clip(high - low, 0.0, None).prod(axis=2)
    area, target = ((edges[:, 2:] - edges[:, :2]).prod(axis=1) for edges in (drawn, boxes))
    return both / area[:, None], both / (area[:, None] + target - both)


@functools.cache
def _weigh_cells(n: int, n_out: int) -> np.ndarray:
    """Return weights [n_out,n] that interpolate linearly from the centres of n equal cells to those of `n_out`."""
    position = np.clip((np.arange(n_out) + 0.5) * n / n_out - 0.5, 0, n - 1)
    return np.clip(1.0 - np.abs(position[:, None] - np.arange(n)), 0.0, None)


def _cover_cells(edges: np.ndarray, cells: int, side: float) -> np.ndarray:
    """Return the part of each cell of an axis that lies between each pair of successive edges, float [cells,pieces]."""
    start = np.arange(cells)[:, None] * side / cells
    size = side / cells
    return np.clip(np.minimum(start + size, edges[1:]) - np.maximum(start, edges[:-1]), 0.0, None) / size


def _find_inside(boxes: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return whether points lie in any box, bool [len(y),len(x)]."""
    result = np.zeros((len(y), len(x)), dtype=bool)
    for left, top, right, bottom in boxes:
        result |= ((top <= y) & (y <= bottom))[:, None] & ((left <= x) & (x <= right))
    return result
