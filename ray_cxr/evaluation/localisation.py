"""Localisation: how well heat maps match the boxes that radiologists drew.

Pointing game (after Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016): a map hits if its
maximum lies in a box of its finding or within a tolerance of one, here 15 of 1024 pixels on every side. If several
cells share the maximum, the hit is the share of them inside a box.

Overlap: intersection over union (IoU) of the region above half the map's maximum with the union of the boxes, and the
share of maps whose IoU reaches each of four levels (T(IoU), as in Wang et al., CVPR 2017). The share of one half was
fixed before any map was measured; tuning it on the results would inflate them.

Coordinates: a map [h,w] covers the whole image with h x w equal cells, and a value belongs to its cell's centre. The
maximum is taken over the cells. For the overlap, a map with fewer than `WORKING_SIDE` cells along an axis is
interpolated bilinearly to that many, constant beyond the outermost centres. Each resulting cell is in the region or
not. Areas are exact, including those of cells cut by box edges.

Rates depend on box size, since a box around a heart is often hit by chance. So each rate is reported with that of a
random point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np

from ray_cxr.evaluation.bootstrap import bootstrap_ratios
from ray_cxr.evaluation.intervals import NO_VARIATION, Interval
from ray_cxr.labels import FINDINGS

#: Minimum cells along an axis of the map whose region is compared with boxes.
WORKING_SIDE = 256


@dataclass(frozen=True)
class LocalisationSettings:
    """Definitions of a hit and of overlap."""

    image_side: float = 1024.0  # side of the image in the boxes' coordinates, in pixels
    tolerance: float = 15.0  # of the pointing game, in these pixels; with 0 the maximum must lie in the box
    map_share: float = 0.5  # the region is where a map is at least this share of its maximum, between 0 and 1
    iou_levels: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        if self.image_side <= 0 or self.tolerance < 0 or not 0 < self.map_share < 1:
            raise ValueError(
                f"image_side {self.image_side}, tolerance {self.tolerance}, map_share {self.map_share}: out of range"
            )


@dataclass(frozen=True)
class LocalisationRate:
    """A mean over maps with its 95% patient-bootstrap interval; `reason` is set if a number is None."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    def to_json(self, name: str) -> dict[str, Any]:
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high, f"{name}_reason": self.reason}


@dataclass(frozen=True)
class FindingLocalisation:
    """Results of one finding, or of all. A case is an image with at least one box of a finding."""

    boxes: int
    cases: int
    n: int  # cases with a map, over which all rates are taken; cases = n + missing
    patients: int  # patients of those
    missing: int
    flat: int  # maps without positive evidence (nothing above 0, or constant); each is a miss with IoU 0
    hits: float  # maps that hit; fractional with a shared maximum
    hit_rate: LocalisationRate
    hit_rate_of_all: float | None  # hits / cases, a missing map counting as a miss
    chance: float | None  # mean hit rate of a uniformly random point
    box_share: float | None  # mean share of the image inside boxes; also the IoU of a map that marks everything
    iou: LocalisationRate
    accuracy: tuple[LocalisationRate, ...]  # T(IoU) at each of `iou_levels`: share of maps with at least that IoU


@dataclass(frozen=True)
class Localisation:
    """Results per finding that has a box, in canonical order, and over all cases."""

    findings: Mapping[str, FindingLocalisation]
    overall: FindingLocalisation
    settings: LocalisationSettings
    n_resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return the entry of metrics.json."""
        settings = self.settings
        return {
            "image_side": float(settings.image_side),
            "tolerance": float(settings.tolerance),
            "map_share": float(settings.map_share),
            "working_side": WORKING_SIDE,
            "iou_levels": [float(level) for level in settings.iou_levels],
            "intervals": {
                "method": "percentile bootstrap over patients",
                "level": 0.95,
                "n_resamples": self.n_resamples,
                "seed": self.seed,
            },
            "findings": {finding: self._entry(one) for finding, one in self.findings.items()},
            "overall": self._entry(self.overall),
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """Return caveats that precede the rates, as sentences."""
        one = self.overall
        notes = []
        if one.missing:
            notes.append(
                f"{one.missing:,} of {one.cases:,} pairs of a boxed image and finding have no heat map and are in no "
                "rate; if maps were drawn for the highest scores only, the rates are too high."
            )
        if one.flat:
            notes.append(f"{one.flat:,} of {one.n:,} heat maps show no positive evidence; they count as misses.")
        return notes

    def _entry(self, one: FindingLocalisation) -> dict[str, Any]:
        before = ("boxes", "cases", "n", "patients", "missing", "flat", "hits")
        levels = zip(self.settings.iou_levels, one.accuracy, strict=True)
        return {
            **{name: getattr(one, name) for name in (*before, "hit_rate_of_all", "chance", "box_share")},
            **one.hit_rate.to_json("hit_rate"),
            **one.iou.to_json("iou"),
            "accuracy": {f"{level:g}": rate.to_json("accuracy") for level, rate in levels},
        }


@dataclass(frozen=True)
class _Case:
    """One image and finding, its boxes as edges [k,4] (left, top, right, bottom)."""

    finding: str
    patient: object
    boxes: np.ndarray


@dataclass(frozen=True)
class _MapResult:
    """Measurements of one case's map; chance and box_share depend on the boxes alone."""

    case: _Case
    hit: float
    iou: float
    flat: bool
    chance: float
    box_share: float


def measure_localisation(
    maps: Mapping[tuple[str, str], np.ndarray],
    image_ids: Sequence[str] | np.ndarray,
    findings: Sequence[str] | np.ndarray,
    xywh: np.ndarray,
    patients: Sequence[str | None] | np.ndarray | None = None,
    *,
    settings: LocalisationSettings | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Localisation:
    """Compare heat maps with boxes.

    Args:
        maps: by image and finding, floats [h,w] over the whole image, larger for more evidence; negative values count
            as none. Each map is read once with `maps.get` and not kept.
        image_ids, findings: [n], one per box.
        xywh: floats [n,4], left, top, width and height of each box in pixels of an image of side `image_side`.
        patients: ids [n], one per box; an image with patient None counts as a separate patient. Default: all do.
    """
    settings = settings or LocalisationSettings()
    xywh = np.asarray(xywh, dtype=np.float64).reshape(-1, 4)
    if not len(image_ids) == len(findings) == len(xywh) or (patients is not None and len(patients) != len(xywh)):
        raise ValueError(f"{len(image_ids)} images, {len(findings)} findings and {len(xywh)} boxes do not fit")
    if not np.isfinite(xywh).all() or (xywh[:, 2:] <= 0).any():
        raise ValueError("boxes must be finite and have an area")
    cases = _group_boxes(image_ids, findings, xywh, patients)
    measured: list[_MapResult] = []
    for (image, finding), case in cases.items():
        heat = maps.get((image, finding))
        if heat is not None:
            measured.append(_measure_map(case, _check_map(heat, f"the map of {finding} in {image}"), settings))
    all_cases = list(cases.values())
    present = {case.finding for case in all_cases}
    names = [*(f for f in FINDINGS if f in present), *sorted(present - set(FINDINGS))]
    # Results per finding; None stands for all findings.
    members = [np.array([name in (None, one.case.finding) for one in measured], bool) for name in (*names, None)]
    rates = _compute_rates(measured, members, settings.iou_levels, n_resamples, seed)
    results = [
        _summarize([case for case in all_cases if name in (None, case.finding)], list(compress(measured, member)), rate)
        for name, member, rate in zip((*names, None), members, rates, strict=True)
    ]
    return Localisation(
        findings=dict(zip(names, results[:-1], strict=True)),
        overall=results[-1],
        settings=settings,
        n_resamples=n_resamples,
        seed=seed,
    )


def _group_boxes(
    image_ids: Sequence[str] | np.ndarray,
    findings: Sequence[str] | np.ndarray,
    xywh: np.ndarray,
    patients: Sequence[str | None] | np.ndarray | None,
) -> dict[tuple[str, str], _Case]:
    """Group boxes by image and finding, in the order of first appearance."""
    rows: dict[tuple[str, str], list[int]] = {}
    for row, (image, finding) in enumerate(zip(image_ids, findings, strict=True)):
        rows.setdefault((str(image), str(finding)), []).append(row)
    edges = np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])
    cases = {}
    for (image, finding), which in rows.items():
        patient = None if patients is None else patients[which[0]]
        # All findings of an image without a patient share one id; the pair keeps it apart from patients' ids.
        known = ("image", image) if patient is None or patient != patient else ("patient", patient)
        cases[image, finding] = _Case(finding, known, edges[which])
    return cases


def _check_map(heat: np.ndarray, which: str) -> np.ndarray:
    heat = np.asarray(heat)
    if heat.ndim != 2 or not heat.size:
        raise ValueError(f"{which} has the shape {heat.shape}; a map is [h,w]")
    heat = heat.astype(np.float64)
    if not np.isfinite(heat).all():
        raise ValueError(f"{which} has values that are not finite")
    return heat


def _measure_map(case: _Case, heat: np.ndarray, settings: LocalisationSettings) -> _MapResult:
    side, tolerance = settings.image_side, settings.tolerance
    grown = case.boxes + np.array([-tolerance, -tolerance, tolerance, tolerance])
    flat = bool(heat.max() <= 0 or heat.max() == heat.min())
    return _MapResult(
        case=case,
        hit=0.0 if flat else _compute_hit(heat, grown, side),
        iou=0.0 if flat else _compute_iou(heat, case.boxes, side, settings.map_share),
        flat=flat,
        chance=_compute_union_area(grown, side) / side**2,
        box_share=_compute_union_area(case.boxes, side) / side**2,
    )


def _compute_hit(heat: np.ndarray, boxes: np.ndarray, side: float) -> float:
    """Return the share of the maximal cells whose centre lies in a box."""
    rows, columns = np.nonzero(heat == heat.max())
    y = (rows + 0.5) * side / heat.shape[0]
    x = (columns + 0.5) * side / heat.shape[1]
    inside = np.zeros(len(x), dtype=bool)
    for left, top, right, bottom in boxes:
        inside |= (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
    return float(inside.mean())


def _compute_iou(heat: np.ndarray, boxes: np.ndarray, side: float, share: float) -> float:
    height, width = (max(n, WORKING_SIDE) for n in heat.shape)
    # The maximum of the map itself: interpolated cells can miss its peak and never exceed it.
    threshold = share * heat.max()
    fine = _interpolate(_interpolate(heat, height).T, width).T
    region = fine >= threshold
    y_edges = _find_edges(boxes[:, [1, 3]], height, side)
    x_edges = _find_edges(boxes[:, [0, 2]], width, side)
    y, x = (y_edges[1:] + y_edges[:-1]) / 2, (x_edges[1:] + x_edges[:-1]) / 2
    boxed = _find_inside(boxes, y, x)
    marked = region[np.ix_(_find_cells(y, height, side), _find_cells(x, width, side))]
    tall, wide = np.diff(y_edges), np.diff(x_edges)
    both, either = (float(tall @ area @ wide) for area in (boxed & marked, boxed | marked))
    return both / either if either > 0 else 0.0


def _interpolate(values: np.ndarray, n_out: int) -> np.ndarray:
    """Interpolate axis 0 linearly from the centres of equal cells to those of `n_out` cells."""
    n = len(values)
    if n == n_out:
        return values
    position = np.clip((np.arange(n_out) + 0.5) * n / n_out - 0.5, 0, n - 1)
    below = np.floor(position).astype(int)
    above = np.minimum(below + 1, n - 1)
    part = (position - below)[:, None]
    return np.asarray(values[below] * (1.0 - part) + values[above] * part)


def _compute_union_area(boxes: np.ndarray, side: float) -> float:
    """Return the area of the union of boxes within the image."""
    y_edges, x_edges = _find_edges(boxes[:, [1, 3]], 1, side), _find_edges(boxes[:, [0, 2]], 1, side)
    boxed = _find_inside(boxes, (y_edges[1:] + y_edges[:-1]) / 2, (x_edges[1:] + x_edges[:-1]) / 2)
    return float(np.diff(y_edges) @ boxed @ np.diff(x_edges))


def _find_edges(of_boxes: np.ndarray, cells: int, side: float) -> np.ndarray:
    """Return all edges of cells and boxes along an axis, within the image, ascending."""
    return np.unique(np.concatenate([np.arange(cells + 1) * side / cells, np.clip(of_boxes.ravel(), 0.0, side)]))


def _find_cells(middles: np.ndarray, cells: int, side: float) -> np.ndarray:
    return np.minimum((middles * cells / side).astype(int), cells - 1)


def _find_inside(boxes: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return whether points lie in any box, bool [len(y),len(x)]."""
    result = np.zeros((len(y), len(x)), dtype=bool)
    for left, top, right, bottom in boxes:
        result |= ((top <= y) & (y <= bottom))[:, None] & ((left <= x) & (x <= right))
    return result


def _compute_rates(
    measured: Sequence[_MapResult],
    members: Sequence[np.ndarray],
    levels: tuple[float, ...],
    n_resamples: int,
    seed: int,
) -> list[tuple[LocalisationRate, ...]]:
    """Compute hit rate, mean IoU and T(IoU) of groups, bool [n] each, from the same resamples of patients."""
    if not measured:
        return [tuple(_build_rate([], None) for _ in range(2 + len(levels))) for _ in members]
    values = np.array([[one.hit, one.iou, *(one.iou >= level for level in levels)] for one in measured])
    wholes = np.hstack([np.repeat(member[:, None], values.shape[1], axis=1) for member in members]).astype(np.float64)
    parts = np.hstack([values * member[:, None] for member in members])
    patients = np.empty(len(measured), dtype=object)
    patients[:] = [one.case.patient for one in measured]
    bounds = bootstrap_ratios(parts, wholes, patients, n_resamples, seed)
    k = values.shape[1]
    return [
        tuple(_build_rate(values[member, column], bounds[group * k + column]) for column in range(k))
        for group, member in enumerate(members)
    ]


def _build_rate(values: Sequence[float] | np.ndarray, bounds: Interval | None) -> LocalisationRate:
    if not len(values) or bounds is None:
        return LocalisationRate(None, reason="no heat map")
    value = float(np.mean(values))
    if bounds.low is not None and bounds.low == bounds.high:
        # As when all maps hit in almost every resample; equal limits do not mean certainty.
        return LocalisationRate(value, reason=f"no interval: {NO_VARIATION}")
    return LocalisationRate(value, bounds.low, bounds.high, f"no interval: {bounds.reason}" if bounds.reason else None)


def _summarize(
    cases: Sequence[_Case], group: Sequence[_MapResult], rates: tuple[LocalisationRate, ...]
) -> FindingLocalisation:
    hits = float(sum(one.hit for one in group))
    return FindingLocalisation(
        boxes=sum(len(case.boxes) for case in cases),
        cases=len(cases),
        n=len(group),
        patients=len({one.case.patient for one in group}),
        missing=len(cases) - len(group),
        flat=sum(one.flat for one in group),
        hits=hits,
        hit_rate=rates[0],
        hit_rate_of_all=hits / len(cases) if cases else None,
        chance=float(np.mean([one.chance for one in group])) if group else None,
        box_share=float(np.mean([one.box_share for one in group])) if group else None,
        iou=rates[1],
        accuracy=rates[2:],
    )
