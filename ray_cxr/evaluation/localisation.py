"""Does a heat map point at what the radiologist boxed? Two questions, neither of which is about the diagnosis.

Pointing game: does the map's maximum lie in a box of its finding, or within a tolerance of one (after Zhang et al.,
Top-down Neural Attention by Excitation Backprop, ECCV 2016; 15 pixels, here of 1024)? A box is grown by the
tolerance on every side. Where several cells share the maximum, the hit is the share of them that lie in a box: what a
blind choice among them would hit on average.

Overlap: the region where the map is at least half its maximum, against the union of the boxes of its finding, as
intersection over union (IoU); and the share of maps whose IoU reaches each of four levels (T(IoU), as in Wang et al.,
CVPR 2017). Half the maximum was settled on before any map was measured; a share chosen by what it gives would flatter.

Coordinates: a map [h,w] covers the whole image, its cells are h x w equal rectangles, and a value belongs to the
centre of its cell. The maximum is looked for among the cells themselves. For the overlap a map of fewer than
`WORKING_SIDE` cells along an axis is interpolated to that many, bilinearly and flat beyond the outermost centres; each
cell of the result is in the region or not, and areas, of cells cut by the edges of boxes too, are exact.

How good a rate is depends on the size of the boxes: one round a heart is often hit by chance. So the rate that a
point drawn at random would reach stands beside each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.evaluation import intervals
from ray_cxr.labels import FINDINGS

#: Cells along an axis, at least, of the map whose region is compared with boxes.
WORKING_SIDE = 256
#: Pixels of the image that a maximum may lie beside a box and still be a hit.
TOLERANCE = 15.0
#: The region is where a map is at least this share of its maximum.
MAP_SHARE = 0.5
#: T(IoU) is given at these.
IOU_LEVELS = (0.1, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Rate:
    """A mean over maps with its 95% patient-bootstrap interval.

    Attributes:
        value: None where there is no map.
        low, high: percentiles, or None.
        reason: what is None and why; None where nothing is.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class FindingLocalisation:
    """How well the maps of one finding, or of all, point. A case is an image with at least one box of a finding.

    Attributes:
        boxes: as given.
        cases: images with boxes; over all findings, pairs of an image and a finding.
        n: cases with a map, which all rates are over.
        patients: of those.
        missing: cases without a map, which no rate counts: cases = n + missing.
        flat: maps without positive evidence (nothing above 0, or one value throughout); each is a miss with IoU 0.
        hits: maps that hit; with a shared maximum a fraction.
        hit_rate: hits / n.
        hit_rate_of_all: hits / cases, that is, with a missing map as a miss; None without cases.
        chance: mean hit rate of a point drawn evenly from the image; None where n is 0.
        box_share: mean share of the image that the boxes cover, which is also the IoU of a map that marks all of it;
            None where n is 0.
        iou: mean IoU.
        accuracy: T(IoU) at each of `Localisation.iou_levels`: the share of maps with at least that IoU.
    """

    boxes: int
    cases: int
    n: int
    patients: int
    missing: int
    flat: int
    hits: float
    hit_rate: Rate
    hit_rate_of_all: float | None
    chance: float | None
    box_share: float | None
    iou: Rate
    accuracy: tuple[Rate, ...]


@dataclass(frozen=True)
class Localisation:
    """What `measure` found.

    Attributes:
        findings: by finding that has a box, in their one order.
        overall: over all cases, each counting once.
        image_side: of the boxes' coordinates, in pixels.
        tolerance: of the pointing game, in these pixels.
        map_share: of a map's maximum, from which on its region counts.
        iou_levels: of T(IoU).
        n_resamples, seed: of the bootstrap.
    """

    findings: Mapping[str, FindingLocalisation]
    overall: FindingLocalisation
    image_side: float
    tolerance: float
    map_share: float
    iou_levels: tuple[float, ...]
    n_resamples: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "image_side": self.image_side,
            "tolerance": self.tolerance,
            "map_share": self.map_share,
            "working_side": WORKING_SIDE,
            "iou_levels": list(self.iou_levels),
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
        """What a reader must know before the rates, as sentences; none where nothing is amiss."""
        one = self.overall
        notes = []
        if one.missing:
            notes.append(
                f"{one.missing:,} of {one.cases:,} pairs of a boxed image and finding have no heat map and are in no "
                "rate; where maps were made for the highest scores only, the rates flatter."
            )
        if one.flat:
            notes.append(f"{one.flat:,} of {one.n:,} heat maps show no positive evidence; they count as misses.")
        return notes

    def _entry(self, one: FindingLocalisation) -> dict[str, Any]:
        counts = (
            "boxes",
            "cases",
            "n",
            "patients",
            "missing",
            "flat",
            "hits",
            "hit_rate_of_all",
            "chance",
            "box_share",
        )
        levels = (f"{level:g}" for level in self.iou_levels)
        return {
            **{name: getattr(one, name) for name in counts},
            **_flat_entry("hit_rate", one.hit_rate),
            **_flat_entry("iou", one.iou),
            "accuracy": {
                level: _flat_entry("accuracy", rate) for level, rate in zip(levels, one.accuracy, strict=True)
            },
        }


@dataclass(frozen=True)
class _Case:
    """One image and finding, its boxes as edges [k,4] (left, top, right, bottom)."""

    finding: str
    patient: object
    boxes: np.ndarray


@dataclass(frozen=True)
class _Measured:
    """One case's map: hit 0..1, IoU, and what no map decides."""

    case: _Case
    hit: float
    iou: float
    flat: bool
    chance: float
    box_share: float


def measure(
    maps: Mapping[tuple[str, str], np.ndarray],
    image_ids: Sequence[str] | np.ndarray,
    findings: Sequence[str] | np.ndarray,
    xywh: np.ndarray,
    patients: Sequence[str | None] | np.ndarray | None = None,
    *,
    image_side: float = 1024.0,
    tolerance: float = TOLERANCE,
    map_share: float = MAP_SHARE,
    iou_levels: Sequence[float] = IOU_LEVELS,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Localisation:
    """Compare heat maps with boxes.

    Args:
        maps: by image and finding, floats [h,w] over the whole image, any size, larger where the finding is seen;
            values below 0 are evidence against it and count as none. Each is asked for once (`maps.get`) and not kept.
        image_ids, findings: [n], one per box.
        xywh: floats [n,4], left, top, width and height of each box in pixels of an image of side `image_side`.
        patients: ids [n], one per box; an image whose patient is None is a patient of its own. Default: all are.
        image_side: of the boxes' coordinates.
        tolerance: of the pointing game, in the same pixels; 0 asks for the box itself.
        map_share: of the maximum, between 0 and 1.
        iou_levels: for T(IoU).
        n_resamples, seed: of the patient bootstrap.

    Raises:
        ValueError: lengths that do not fit, a box without area, a map that is not [h,w] or not finite, a setting out
            of its range.
    """
    xywh = np.asarray(xywh, dtype=np.float64).reshape(-1, 4)
    if not len(image_ids) == len(findings) == len(xywh) or (patients is not None and len(patients) != len(xywh)):
        raise ValueError(f"{len(image_ids)} images, {len(findings)} findings and {len(xywh)} boxes do not fit")
    if not np.isfinite(xywh).all() or (xywh[:, 2:] <= 0).any():
        raise ValueError("boxes must be finite and have an area")
    if image_side <= 0 or tolerance < 0 or not 0 < map_share < 1:
        raise ValueError(f"image_side {image_side}, tolerance {tolerance}, map_share {map_share}: out of range")
    cases = _cases(image_ids, findings, xywh, patients)
    measured: list[_Measured] = []
    for (image, finding), case in cases.items():
        found = maps.get((image, finding))
        if found is not None:
            heat = _checked(found, f"the map of {finding} in {image}")
            measured.append(_measure_one(case, heat, image_side, tolerance, map_share))
    present = {case.finding for case in cases.values()}
    names = [*(f for f in FINDINGS if f in present), *sorted(present - set(FINDINGS))]
    groups = [[one for one in measured if one.case.finding == name] for name in names] + [measured]
    rates = _rates(groups, measured, tuple(iou_levels), n_resamples, seed)
    all_cases = list(cases.values())
    results = [
        _summary([case for case in all_cases if name in (None, case.finding)], group, rate)
        for name, group, rate in zip([*names, None], groups, rates, strict=True)
    ]
    return Localisation(
        findings=dict(zip(names, results[:-1], strict=True)),
        overall=results[-1],
        image_side=float(image_side),
        tolerance=float(tolerance),
        map_share=float(map_share),
        iou_levels=tuple(float(level) for level in iou_levels),
        n_resamples=n_resamples,
        seed=seed,
    )


def _cases(
    image_ids: Sequence[str] | np.ndarray,
    findings: Sequence[str] | np.ndarray,
    xywh: np.ndarray,
    patients: Sequence[str | None] | np.ndarray | None,
) -> dict[tuple[str, str], _Case]:
    """Boxes by image and finding, in the order of their first box."""
    rows: dict[tuple[str, str], list[int]] = {}
    for row, (image, finding) in enumerate(zip(image_ids, findings, strict=True)):
        rows.setdefault((str(image), str(finding)), []).append(row)
    edges = np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])
    cases = {}
    for (image, finding), which in rows.items():
        patient = None if patients is None else patients[which[0]]
        # One id for all findings of an image of no known patient; a pair, so that it is no patient's by accident.
        known = ("image", image) if patient is None or patient != patient else ("patient", patient)
        cases[image, finding] = _Case(finding, known, edges[which])
    return cases


def _checked(heat: np.ndarray, which: str) -> np.ndarray:
    heat = np.asarray(heat)
    if heat.ndim != 2 or not heat.size:
        raise ValueError(f"{which} has the shape {heat.shape}; a map is [h,w]")
    heat = heat.astype(np.float64)
    if not np.isfinite(heat).all():
        raise ValueError(f"{which} has values that are not finite")
    return heat


def _measure_one(case: _Case, heat: np.ndarray, side: float, tolerance: float, share: float) -> _Measured:
    grown = case.boxes + np.array([-tolerance, -tolerance, tolerance, tolerance])
    flat = bool(heat.max() <= 0 or heat.max() == heat.min())
    return _Measured(
        case=case,
        hit=0.0 if flat else _hit(heat, grown, side),
        iou=0.0 if flat else _iou(heat, case.boxes, side, share),
        flat=flat,
        chance=_covered(grown, side) / side**2,
        box_share=_covered(case.boxes, side) / side**2,
    )


def _hit(heat: np.ndarray, boxes: np.ndarray, side: float) -> float:
    """The share of the cells with the highest value whose centre lies in a box."""
    rows, columns = np.nonzero(heat == heat.max())
    y = (rows + 0.5) * side / heat.shape[0]
    x = (columns + 0.5) * side / heat.shape[1]
    inside = np.zeros(len(x), dtype=bool)
    for left, top, right, bottom in boxes:
        inside |= (left <= x) & (x <= right) & (top <= y) & (y <= bottom)
    return float(inside.mean())


def _iou(heat: np.ndarray, boxes: np.ndarray, side: float, share: float) -> float:
    height, width = (max(n, WORKING_SIDE) for n in heat.shape)
    # Of the map itself: between centres nothing is higher, and the interpolated cells may step over its peak.
    threshold = share * heat.max()
    fine = _interpolated(_interpolated(heat, height).T, width).T
    region = fine >= threshold
    y_edges = _edges(boxes[:, [1, 3]], height, side)
    x_edges = _edges(boxes[:, [0, 2]], width, side)
    y, x = (y_edges[1:] + y_edges[:-1]) / 2, (x_edges[1:] + x_edges[:-1]) / 2
    boxed = _within(boxes, y, x)
    marked = region[np.ix_(_cell(y, height, side), _cell(x, width, side))]
    tall, wide = np.diff(y_edges), np.diff(x_edges)
    both, either = (float(tall @ area @ wide) for area in (boxed & marked, boxed | marked))
    return both / either if either > 0 else 0.0


def _interpolated(values: np.ndarray, n_out: int) -> np.ndarray:
    """Values of equal cells of axis 0, taken linearly from their centres to those of `n_out` cells."""
    n = len(values)
    if n == n_out:
        return values
    position = np.clip((np.arange(n_out) + 0.5) * n / n_out - 0.5, 0, n - 1)
    below = np.floor(position).astype(int)
    above = np.minimum(below + 1, n - 1)
    part = (position - below)[:, None]
    return np.asarray(values[below] * (1.0 - part) + values[above] * part)


def _covered(boxes: np.ndarray, side: float) -> float:
    """Area of the union of boxes that lies within the image."""
    y_edges, x_edges = _edges(boxes[:, [1, 3]], 1, side), _edges(boxes[:, [0, 2]], 1, side)
    boxed = _within(boxes, (y_edges[1:] + y_edges[:-1]) / 2, (x_edges[1:] + x_edges[:-1]) / 2)
    return float(np.diff(y_edges) @ boxed @ np.diff(x_edges))


def _edges(of_boxes: np.ndarray, cells: int, side: float) -> np.ndarray:
    """Every place along an axis where a cell or a box begins or ends, within the image, ascending."""
    return np.unique(np.concatenate([np.arange(cells + 1) * side / cells, np.clip(of_boxes.ravel(), 0.0, side)]))


def _cell(middles: np.ndarray, cells: int, side: float) -> np.ndarray:
    return np.minimum((middles * cells / side).astype(int), cells - 1)


def _within(boxes: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether points lie in any box, bool [len(y),len(x)]."""
    result = np.zeros((len(y), len(x)), dtype=bool)
    for left, top, right, bottom in boxes:
        result |= ((top <= y) & (y <= bottom))[:, None] & ((left <= x) & (x <= right))
    return result


def _rates(
    groups: Sequence[Sequence[_Measured]],
    measured: Sequence[_Measured],
    levels: tuple[float, ...],
    n_resamples: int,
    seed: int,
) -> list[tuple[Rate, ...]]:
    """Hit rate, mean IoU and T(IoU) of each group, all from the same resamples of patients."""
    if not measured:
        return [tuple(_rate([], None) for _ in range(2 + len(levels))) for _ in groups]
    values = np.array([[one.hit, one.iou, *(one.iou >= level for level in levels)] for one in measured])
    ids = [id(one) for one in measured]
    members = [np.isin(ids, [id(one) for one in group]) for group in groups]
    wholes = np.hstack([np.repeat(member[:, None], values.shape[1], axis=1) for member in members]).astype(np.float64)
    parts = np.hstack([values * member[:, None] for member in members])
    patients = np.empty(len(measured), dtype=object)
    patients[:] = [one.case.patient for one in measured]
    bounds = intervals.bootstrap_ratios(parts, wholes, patients, n_resamples, seed)
    k = values.shape[1]
    return [
        tuple(_rate(values[member, column], bounds[group * k + column]) for column in range(k))
        for group, member in enumerate(members)
    ]


def _rate(values: Sequence[float] | np.ndarray, bounds: intervals.Interval | None) -> Rate:
    if not len(values) or bounds is None:
        return Rate(None, reason="no heat map")
    value = float(np.mean(values))
    if bounds.low is not None and bounds.low == bounds.high:
        # As with all hits: resampling knows of no uncertainty there, which is not to say that there is none.
        return Rate(value, reason="no interval: every resample gives the same")
    return Rate(value, bounds.low, bounds.high, f"no interval: {bounds.reason}" if bounds.reason else None)


def _summary(cases: Sequence[_Case], group: Sequence[_Measured], rates: tuple[Rate, ...]) -> FindingLocalisation:
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


def _flat_entry(name: str, rate: Rate) -> dict[str, Any]:
    return {name: rate.value, f"{name}_low": rate.low, f"{name}_high": rate.high, f"{name}_reason": rate.reason}
