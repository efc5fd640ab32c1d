"""Localisation: how well heat maps match the boxes that radiologists drew.

Pointing game (after Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016): a map hits if its
maximum lies in a box of its finding, or at most `TOLERANCE` pixels outside. If several cells share the maximum, the hit
is the share of these cells that lie in a box.

Overlap: intersection over union (IoU) of two regions, the map above half of its maximum and the union of the boxes;
and the share of maps whose IoU reaches each of four levels (T(IoU), as in Wang et al., CVPR 2017). The limit of one
half was fixed before any map was measured; tuning it on the results would inflate them.

Coordinates: a map [h,w] covers the whole image with h x w equal cells, and a value belongs to its cell's centre. The
maximum is taken over the cells. For the overlap, a map with fewer than `WORKING_SIDE` cells along an axis is
interpolated bilinearly to that number, constant beyond the outermost centres. Each resulting cell is in the region or
not. Areas are exact, also if a box edge cuts a cell.

Hit rates depend on box size, since a box around a heart is often hit by chance. So the hit rate of a random point is
reported next to them.
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

#: Tolerance of the pointing game, in pixels of the boxes' coordinates.
TOLERANCE = 15.0
#: The region is where a map has at least this share of its maximum.
MAP_SHARE = 0.5
#: Levels of T(IoU).
IOU_LEVELS = (0.1, 0.25, 0.5, 0.75)
#: Minimum cells along an axis of the map whose region is compared with boxes.
WORKING_SIDE = 256


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
    patients: int | None  # patients of the cases with a map; None if no image has a patient id
    missing: int
    flat: int  # maps without positive evidence (nothing above 0, or constant); each is a miss with IoU 0
    hits: float  # maps that hit; fractional with a shared maximum
    hit_rate: LocalisationRate
    hit_rate_of_all: float | None  # hits / cases, so that a missing map is a miss
    chance: float | None  # mean hit rate of a uniformly random point
    box_share: float | None  # mean share of the image inside boxes; also the IoU of a map that marks everything
    iou: LocalisationRate
    accuracy: tuple[LocalisationRate, ...]  # T(IoU) at each of `IOU_LEVELS`: share of maps with at least that IoU

    def to_json(self) -> dict[str, Any]:
        counts = ("boxes", "cases", "n", "patients", "missing", "flat", "hits")
        levels = zip(IOU_LEVELS, self.accuracy, strict=True)
        return {
            **{name: getattr(self, name) for name in (*counts, "hit_rate_of_all", "chance", "box_share")},
            **self.hit_rate.to_json("hit_rate"),
            **self.iou.to_json("iou"),
            "accuracy": {f"{level:g}": rate.to_json("accuracy") for level, rate in levels},
        }


@dataclass(frozen=True)
class Localisation:
    """Results per finding that has a box, in canonical order, and over all cases."""

    findings: Mapping[str, FindingLocalisation]
    overall: FindingLocalisation
    image_side: float
    n_resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return the entry of metrics.json."""
        return {
            "image_side": self.image_side,
            "tolerance": TOLERANCE,
            "map_share": MAP_SHARE,
            "working_side": WORKING_SIDE,
            "iou_levels": list(IOU_LEVELS),
            "intervals": {
                "method": "percentile bootstrap over patients",
                "level": 0.95,
                "n_resamples": self.n_resamples,
                "seed": self.seed,
            },
            "findings": {finding: result.to_json() for finding, result in self.findings.items()},
            "overall": self.overall.to_json(),
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """Return caveats that precede the rates, as sentences."""
        missing, cases, flat, n = (getattr(self.overall, name) for name in ("missing", "cases", "flat", "n"))
        notes = []
        if missing:
            notes.append(
                f"{missing:,} of {cases:,} pairs of a boxed image and finding have no heat map and are in no rate; if "
                "maps were drawn for the highest scores only, the rates are too high."
            )
        if flat:
            notes.append(f"{flat:,} of {n:,} heat maps show no positive evidence; they count as misses.")
        return notes


@dataclass(frozen=True)
class _Case:
    """One image and finding, its boxes as edges [k,4] (left, top, right, bottom)."""

    finding: str
    patient: tuple[str, str]  # ("patient", id), or ("image", id) if the patient is unknown
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
    patients: Sequence[str | None] | np.ndarray,
    *,
    image_side: float = 1024.0,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Localisation:
    """Compare heat maps with boxes.

    Args:
        maps: by image and finding, floats [h,w] over the whole image, larger for more evidence; negative values count
            as none. Each map is read once with `maps.get` and not kept.
        image_ids, findings: [n], one per box.
        xywh: floats [n,4], left, top, width and height of each box in pixels.
        patients: ids [n], one per box; an image with patient None counts as a separate patient.
        image_side: side of the image in these pixels.
    """
    xywh = np.asarray(xywh, dtype=np.float64).reshape(-1, 4)
    lengths = [len(column) for column in (image_ids, findings, xywh, patients)]
    if len(set(lengths)) > 1:
        raise ValueError(f"image_ids, findings, xywh and patients have the lengths {lengths}; they do not fit")
    if not np.isfinite(xywh).all() or (xywh[:, 2:] <= 0).any():
        raise ValueError("boxes must be finite and have an area")
    cases = _group_boxes(image_ids, findings, xywh, patients)
    measured: list[_MapResult] = []
    for (image, finding), case in cases.items():
        heat = maps.get((image, finding))
        if heat is not None:
            measured.append(_measure_map(case, _check_map(heat, f"the map of {finding} in {image}"), image_side))
    all_cases = list(cases.values())
    present = {case.finding for case in all_cases}
    names = [*(f for f in FINDINGS if f in present), *sorted(present - set(FINDINGS))]
    # Results per finding; None stands for all findings.
    members = [np.array([name in (None, result.case.finding) for result in measured], bool) for name in (*names, None)]
    rates = _compute_rates(measured, members, n_resamples, seed)
    *results, overall = (
        _summarize([case for case in all_cases if name in (None, case.finding)], list(compress(measured, member)), rate)
        for name, member, rate in zip((*names, None), members, rates, strict=True)
    )
    return Localisation(dict(zip(names, results, strict=True)), overall, float(image_side), n_resamples, seed)


def _group_boxes(
    image_ids: Sequence[str] | np.ndarray,
    findings: Sequence[str] | np.ndarray,
    xywh: np.ndarray,
    patients: Sequence[str | None] | np.ndarray,
) -> dict[tuple[str, str], _Case]:
    """Group boxes by image and finding, in the order of first appearance."""
    rows: dict[tuple[str, str], list[int]] = {}
    for row, (image, finding) in enumerate(zip(image_ids, findings, strict=True)):
        rows.setdefault((str(image), str(finding)), []).append(row)
    edges = np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])
    cases = {}
    for (image, finding), boxes in rows.items():
        patient = patients[boxes[0]]
        # All findings of an image without a patient share one id; the pair keeps it apart from patients' ids.
        known = ("image", image) if patient is None or patient != patient else ("patient", patient)
        cases[image, finding] = _Case(finding, known, edges[boxes])
    return cases


def _check_map(heat: np.ndarray, name: str) -> np.ndarray:
    heat = np.asarray(heat)
    if heat.ndim != 2 or not heat.size:
        raise ValueError(f"{name} has the shape {heat.shape}; a map is [h,w]")
    heat = heat.astype(np.float64)
    if not np.isfinite(heat).all():
        raise ValueError(f"{name} has values that are not finite")
    return heat


def _measure_map(case: _Case, heat: np.ndarray, side: float) -> _MapResult:
    grown = case.boxes + TOLERANCE * np.array([-1, -1, 1, 1])
    flat = bool(heat.max() <= 0 or heat.max() == heat.min())
    return _MapResult(
        case=case,
        hit=0.0 if flat else _compute_hit(heat, grown, side),
        iou=0.0 if flat else _compute_iou(heat, case.boxes, side),
        flat=flat,
        chance=_compute_union_area(grown, side) / side**2,
        box_share=_compute_union_area(case.boxes, side) / side**2,
    )


def _compute_hit(heat: np.ndarray, boxes: np.ndarray, side: float) -> float:
    """Return the share of the maximal cells whose centre lies in a box."""
    y, x = ((np.arange(cells) + 0.5) * side / cells for cells in heat.shape)
    return float(_find_inside(boxes, y, x)[heat == heat.max()].mean())


def _compute_iou(heat: np.ndarray, boxes: np.ndarray, side: float) -> float:
    height, width = (max(cells, WORKING_SIDE) for cells in heat.shape)
    fine = _interpolate(_interpolate(heat, height).T, width).T
    # The maximum of the map itself: interpolated cells can miss its peak and never exceed it.
    region = fine >= MAP_SHARE * heat.max()
    (y, heights), (x, widths) = _cut_axis(boxes[:, [1, 3]], height, side), _cut_axis(boxes[:, [0, 2]], width, side)
    boxed = _find_inside(boxes, y, x)
    marked = region[np.ix_(_find_cells(y, height, side), _find_cells(x, width, side))]
    both, either = (float(heights @ area @ widths) for area in (boxed & marked, boxed | marked))
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
    (y, heights), (x, widths) = _cut_axis(boxes[:, [1, 3]], 1, side), _cut_axis(boxes[:, [0, 2]], 1, side)
    return float(heights @ _find_inside(boxes, y, x) @ widths)


def _cut_axis(box_edges: np.ndarray, cells: int, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Cut an axis of the image at the edges of all cells and boxes; return the middles and lengths of the pieces."""
    edges = np.unique([*np.arange(cells + 1) * side / cells, *np.clip(box_edges.ravel(), 0.0, side)])
    return (edges[1:] + edges[:-1]) / 2, np.diff(edges)


def _find_cells(middles: np.ndarray, cells: int, side: float) -> np.ndarray:
    return np.minimum((middles * cells / side).astype(int), cells - 1)


def _find_inside(boxes: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return whether points lie in any box, bool [len(y),len(x)]."""
    result = np.zeros((len(y), len(x)), dtype=bool)
    for left, top, right, bottom in boxes:
        result |= ((top <= y) & (y <= bottom))[:, None] & ((left <= x) & (x <= right))
    return result


def _compute_rates(
    measured: Sequence[_MapResult], members: Sequence[np.ndarray], n_resamples: int, seed: int
) -> list[tuple[LocalisationRate, ...]]:
    """Compute hit rate, mean IoU and T(IoU) of groups, bool [n] each, from the same resamples of patients."""
    if not measured:
        return [(LocalisationRate(None, reason="no heat map"),) * (2 + len(IOU_LEVELS))] * len(members)
    values = np.array([[each.hit, each.iou, *(each.iou >= level for level in IOU_LEVELS)] for each in measured])
    wholes = np.hstack([np.repeat(member[:, None], values.shape[1], axis=1) for member in members]).astype(np.float64)
    parts = np.hstack([values * member[:, None] for member in members])
    patients = np.empty(len(measured), dtype=object)
    patients[:] = [each.case.patient for each in measured]
    bounds = bootstrap_ratios(parts, wholes, patients, n_resamples, seed)
    k = values.shape[1]
    return [
        tuple(_build_rate(values[member, column], bounds[group * k + column]) for column in range(k))
        for group, member in enumerate(members)
    ]


def _build_rate(values: np.ndarray, bounds: Interval) -> LocalisationRate:
    if not len(values):
        return LocalisationRate(None, reason="no heat map")
    value = float(np.mean(values))
    if bounds.low is not None and bounds.low == bounds.high:
        # As when all maps hit in almost every resample; equal limits do not mean certainty.
        return LocalisationRate(value, reason=f"no interval: {NO_VARIATION}")
    return LocalisationRate(value, bounds.low, bounds.high, f"no interval: {bounds.reason}" if bounds.reason else None)


def _summarize(
    cases: Sequence[_Case], measured: Sequence[_MapResult], rates: tuple[LocalisationRate, ...]
) -> FindingLocalisation:
    hits = float(sum(each.hit for each in measured))
    known = {each.case.patient for each in measured if each.case.patient[0] == "patient"}
    return FindingLocalisation(
        boxes=sum(len(case.boxes) for case in cases),
        cases=len(cases),
        n=len(measured),
        patients=len(known) if known or not measured else None,
        missing=len(cases) - len(measured),
        flat=sum(each.flat for each in measured),
        hits=hits,
        hit_rate=rates[0],
        hit_rate_of_all=hits / len(cases) if cases else None,
        chance=float(np.mean([each.chance for each in measured])) if measured else None,
        box_share=float(np.mean([each.box_share for each in measured])) if measured else None,
        iou=rates[1],
        accuracy=rates[2:],
    )
