"""Localisation: agreement of heat maps with the boxes that radiologists drew. Three protocols:

1. Ours. Pointing game (after Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016): a map hits if
   its highest cell's centre lies in a box of its finding, or at most `TOLERANCE` pixels outside. If several cells share
   the maximum, the hit is the share of these cells that lie in a box. Overlap: intersection over union (IoU) of the
   region above half of the map's maximum and the union of the boxes. The limit of one half was fixed before any map was
   measured.
2. Boxes after Wang et al. (ChestX-ray8, CVPR 2017; arXiv 1705.02315): the map is scaled to 0..255, and a box is drawn
   around each connected region above 60 and above 180. A radiologist's box is found if IoBB, the intersection divided
   by the area of the drawn box, or IoU with any drawn box exceeds a threshold T. Accuracy is the share of radiologists'
   boxes found; a drawn box that finds none is false. The paper does not state whether both thresholds' boxes count
   together, how regions connect, or which maps enter its false positives (its values are multiples of 1/984, the number
   of all boxes). Here boxes of both thresholds count together, and false boxes are counted per case.
3. After Saporta et al. (CheXlocalize, Nature Machine Intelligence 2022): the pointing game without tolerance, and IoU
   at a threshold tuned per finding on maps scaled to 0..1. They compare with segmentations and tune on validation
   images. Here boxes stand for segmentations, and the threshold of a case comes from the other patients' cases
   (cross-fitting over `FOLDS` folds). At the image's border, where upsampling makes a plateau, the maximum is here at
   the cell's centre.

Coordinates: see `heatmap_regions`. A map with fewer than `WORKING_SIDE` cells along an axis is interpolated bilinearly
to that number before regions are drawn. Each resulting cell is in the region or not.

Limits: hit rates depend on box size, since a box around a heart is often hit by chance; the hit rate of a random point
is reported next to them. A coarse map cannot hit a small box between its cells' centres; `ceiling` is the share of
cases that some map of the same shape could hit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np

from ray_cxr.evaluation import heatmap_regions as regions
from ray_cxr.evaluation.bootstrap import bootstrap_ratios
from ray_cxr.evaluation.clustered import clustered_share_interval
from ray_cxr.evaluation.intervals import NO_VARIATION, Interval, patient_codes
from ray_cxr.evaluation.published import WANG_BOX_ACCURACY
from ray_cxr.labels import FINDINGS

#: Tolerance of the pointing game, in pixels of the boxes' coordinates.
TOLERANCE = 15.0
#: The region is where a map has at least this share of its maximum.
MAP_SHARE = 0.5
#: IoU levels for which the share of cases that reach them is reported.
IOU_LEVELS = (0.1, 0.25, 0.5, 0.75)
#: Thresholds T(IoBB) and T(IoU) of Wang et al. 2017.
BOX_THRESHOLDS = {"iobb": (0.1, 0.25, 0.5, 0.75, 0.9), "iou": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)}
#: Thresholds of a map scaled to 0..1 among which CheXlocalize tunes.
TUNED_LEVELS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
#: Folds of patients for tuning.
FOLDS = 5
#: A column of the results: the rate's name, and its threshold if it has one.
_Column = tuple[str, float | None]
_THRESHOLDS = [(name, threshold) for name, thresholds in BOX_THRESHOLDS.items() for threshold in thresholds]
#: Shares, which get Wilson's interval if all resamples agree.
_SHARES: list[_Column] = [
    *(("hit_rate", None), ("hit_rate_inside", None)),
    *(("iou_at_least", level) for level in IOU_LEVELS),
    *((f"{name}_accuracy", threshold) for name, threshold in _THRESHOLDS),
]
_MEANS: list[_Column] = [
    *(("iou", None), ("tuned_iou", None)),
    *((f"{name}_false_boxes", threshold) for name, threshold in _THRESHOLDS),
]
_Rates = Mapping[_Column, "LocalisationRate"]


@dataclass(frozen=True)
class LocalisationRate:
    """A mean over maps or boxes with its 95% interval; `reason` is set if a number is None."""

    value: float | None
    low: float | None = None
    high: float | None = None
    method: str | None = None  # `bootstrap` over patients; `wilson` for a share if all resamples agree
    reason: str | None = None

    def to_json(self, name: str) -> dict[str, Any]:
        ends = {f"{name}_low": self.low, f"{name}_high": self.high}
        return {name: self.value, **ends, f"{name}_interval_method": self.method, f"{name}_reason": self.reason}


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
    ceiling: float | None  # hit rate that no map of these shapes can exceed
    hit_rate_inside: LocalisationRate  # without tolerance, as CheXlocalize
    ceiling_inside: float | None
    chance: float | None  # mean hit rate of a uniformly random point
    box_share: float | None  # mean share of the image inside boxes; also the IoU of a map that marks everything
    iou: LocalisationRate
    iou_at_least: Mapping[float, LocalisationRate]  # share of maps with at least this IoU
    tuned_iou: LocalisationRate  # IoU at the threshold tuned on other patients
    tuned_thresholds: tuple[float, ...]  # of each fold; for all findings empty
    accuracy: Mapping[str, Mapping[float, LocalisationRate]]  # by measure and threshold: share of boxes found
    false_boxes: Mapping[str, Mapping[float, LocalisationRate]]  # drawn boxes per case that find no box

    def to_json(self) -> dict[str, Any]:
        counts = ("boxes", "cases", "n", "patients", "missing", "flat", "hits", "hit_rate_of_all")
        others = ("ceiling", "ceiling_inside", "chance", "box_share")
        rates = ("hit_rate", "hit_rate_inside", "iou", "tuned_iou")
        wang = {
            name: {
                f"{threshold:g}": {
                    **rate.to_json("accuracy"),
                    **self.false_boxes[name][threshold].to_json("false_boxes"),
                }
                for threshold, rate in by_threshold.items()
            }
            for name, by_threshold in self.accuracy.items()
        }
        return {
            **{name: getattr(self, name) for name in (*counts, *others)},
            **{key: number for name in rates for key, number in getattr(self, name).to_json(name).items()},
            "iou_at_least": {f"{level:g}": rate.to_json("share") for level, rate in self.iou_at_least.items()},
            "tuned_thresholds": list(self.tuned_thresholds),
            "wang": wang,
        }


@dataclass(frozen=True)
class Localisation:
    """Results per finding that has a box, in canonical order, and over all cases.

    `hits` are those of each image and finding with a map: 0 or 1, or a fraction with a shared maximum.
    """

    findings: Mapping[str, FindingLocalisation]
    overall: FindingLocalisation
    hits: Mapping[tuple[str, str], float]
    map_shape: tuple[int, int] | None  # rows and columns of the maps; None without maps or if they differ
    image_side: float
    n_resamples: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return the entry of metrics.json."""
        return {
            "image_side": self.image_side,
            "tolerance": TOLERANCE,
            "map_shape": list(self.map_shape) if self.map_shape else None,
            "map_share": MAP_SHARE,
            "working_side": regions.WORKING_SIDE,
            "iou_levels": list(IOU_LEVELS),
            "wang": {
                "region_thresholds": list(regions.REGION_THRESHOLDS),
                **{name: list(thresholds) for name, thresholds in BOX_THRESHOLDS.items()},
                "published_accuracy": WANG_BOX_ACCURACY,
                "comparable": False,
            },
            "tuning": {"thresholds": list(TUNED_LEVELS), "folds": FOLDS},
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
            pairs = f"{missing:,} of {cases:,} pair{'s' if cases > 1 else ''} of a boxed image and finding"
            absent = f"{pairs} {'have' if missing > 1 else 'has'} no heat map"
            notes.append(
                f"{absent} and {'are' if missing > 1 else 'is'} in no rate; if maps were drawn for the highest scores "
                "only, the rates are too high."
                if n
                else f"{absent}, so nothing can be measured. Draw more maps with `score --heatmaps {len(FINDINGS)}`."
            )
        if flat:
            what = (
                "maps show no positive evidence; they count as misses"
                if flat > 1
                else (f"map{'s' if n > 1 else ''} shows no positive evidence; it counts as a miss")
            )
            notes.append(f"{flat:,} of {n:,} heat {what}.")
        return notes


@dataclass(frozen=True)
class _Case:
    """One image and finding, its boxes as edges [k,4] (left, top, right, bottom)."""

    finding: str
    patient: tuple[str, str]  # ("patient", id), or ("image", id) if the patient is unknown
    boxes: np.ndarray


@dataclass(frozen=True)
class _MapResult:
    """Measurements of one case's map."""

    case: _Case
    shape: tuple[int, int]
    flat: bool
    hit: float
    hit_inside: float
    reachable: bool  # whether some map of this shape can hit
    reachable_inside: bool
    iou: float
    tuned_ious: np.ndarray  # float [levels] at each of `TUNED_LEVELS`
    found: np.ndarray  # int [thresholds], radiologists' boxes found at each of `_THRESHOLDS`
    false: np.ndarray  # int [thresholds], drawn boxes that find none
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
    hits = {}
    for (image, finding), case in cases.items():
        heat = maps.get((image, finding))
        if heat is not None:
            measured.append(_measure_map(case, _check_map(heat, f"the map of {finding} in {image}"), image_side))
            hits[image, finding] = measured[-1].hit
    all_cases = list(cases.values())
    present = {case.finding for case in all_cases}
    names = [*(f for f in FINDINGS if f in present), *sorted(present - set(FINDINGS))]
    # Results per finding; None stands for all findings.
    members = [np.array([name in (None, result.case.finding) for result in measured], bool) for name in (*names, None)]
    tuned_ious, thresholds = _tune_thresholds(measured, names, seed)
    rates = _compute_rates(measured, tuned_ious, members, n_resamples, seed)
    *results, overall = (
        _summarize(
            [case for case in all_cases if name in (None, case.finding)],
            list(compress(measured, member)),
            rate,
            thresholds.get(name, ()),
        )
        for name, member, rate in zip((*names, None), members, rates, strict=True)
    )
    shapes = {result.shape for result in measured}
    return Localisation(
        findings=dict(zip(names, results, strict=True)),
        overall=overall,
        hits=hits,
        map_shape=shapes.pop() if len(shapes) == 1 else None,
        image_side=float(image_side),
        n_resamples=n_resamples,
        seed=seed,
    )


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
    return np.maximum(heat, 0.0)  # negative values are no evidence


def _measure_map(case: _Case, heat: np.ndarray, side: float) -> _MapResult:
    grown = case.boxes + TOLERANCE * np.array([-1, -1, 1, 1])
    near, inside = (regions.find_cells_inside(heat.shape, boxes, side) for boxes in (grown, case.boxes))
    flat = bool(heat.max() <= 0 or heat.max() == heat.min())
    highest = heat == heat.max()
    return _MapResult(
        case=case,
        shape=heat.shape,
        flat=flat,
        hit=0.0 if flat else float(near[highest].mean()),
        hit_inside=0.0 if flat else float(inside[highest].mean()),
        reachable=bool(near.any()),
        reachable_inside=bool(inside.any()),
        **(_NO_REGION if flat else _measure_regions(case.boxes, heat, side)),
        chance=regions.compute_union_area(grown, side) / side**2,
        box_share=regions.compute_union_area(case.boxes, side) / side**2,
    )


#: Measurements of a flat map, which has no region and no drawn box.
_NO_REGION: dict[str, Any] = {
    "iou": 0.0,
    "tuned_ious": np.zeros(len(TUNED_LEVELS)),
    "found": np.zeros(len(_THRESHOLDS)),
    "false": np.zeros(len(_THRESHOLDS)),
}


def _measure_regions(boxes: np.ndarray, heat: np.ndarray, side: float) -> dict[str, Any]:
    fine = regions.upsample(heat)
    low, high = fine.min(), fine.max()
    unit = (fine - low) / (high - low)
    # A share of the maximum of the map itself: interpolated cells can miss its peak.
    levels = np.array([(MAP_SHARE * heat.max() - low) / (high - low), *TUNED_LEVELS])
    order = np.argsort(levels)
    ious = np.empty(len(levels))
    ious[order] = regions.compute_overlaps(unit, levels[order], regions.compute_cover(fine.shape, boxes, side))
    pairs = regions.compare_boxes(regions.draw_boxes(unit, side), boxes)
    exceeds = np.array(
        [pairs[name == "iou"] > threshold for name, threshold in _THRESHOLDS]
    )  # [thresholds,drawn,boxes]
    return {
        "iou": float(ious[0]),
        "tuned_ious": ious[1:],
        "found": exceeds.any(axis=1).sum(axis=1),
        "false": (~exceeds.any(axis=2)).sum(axis=1),
    }


def _list_patients(measured: Sequence[_MapResult]) -> np.ndarray:
    patients = np.empty(len(measured), dtype=object)
    patients[:] = [each.case.patient for each in measured]
    return patients


def _tune_thresholds(
    measured: Sequence[_MapResult], names: Sequence[str], seed: int
) -> tuple[np.ndarray, dict[str | None, tuple[float, ...]]]:
    """Return each case's IoU at the best threshold of the other folds' patients, and each finding's thresholds.

    The IoU is NaN if its finding has fewer than two patients.
    """
    values = np.full(len(measured), np.nan)
    chosen: dict[str | None, tuple[float, ...]] = {}
    patients, all_ious = _list_patients(measured), np.array([each.tuned_ious for each in measured])
    for name in names:
        rows = np.flatnonzero([each.case.finding == name for each in measured])
        codes, n_patients = patient_codes(patients[rows])
        if n_patients < 2:
            continue
        ious = all_ious[rows]
        folds = np.random.default_rng(seed).permutation(n_patients)[codes] % FOLDS
        levels = []
        for fold in np.unique(folds):
            best = int(ious[folds != fold].mean(axis=0).argmax())
            values[rows[folds == fold]] = ious[folds == fold, best]
            levels.append(TUNED_LEVELS[best])
        chosen[name] = tuple(levels)
    return values, chosen


def _compute_rates(
    measured: Sequence[_MapResult],
    tuned_ious: np.ndarray,
    members: Sequence[np.ndarray],
    n_resamples: int,
    seed: int,
) -> list[_Rates]:
    """Compute all rates of groups, bool [n] each, from the same resamples of patients."""
    columns = _SHARES + _MEANS
    if not measured:
        return [dict.fromkeys(columns, LocalisationRate(None, reason="no heat map"))] * len(members)
    rows = (  # in the order of `_SHARES` and `_MEANS`
        (
            each.hit,
            each.hit_inside,
            [each.iou >= level for level in IOU_LEVELS],
            each.found,
            each.iou,
            tuned,
            each.false,
        )
        for each, tuned in zip(measured, tuned_ious, strict=True)
    )
    values = np.array([np.hstack(row) for row in rows], dtype=np.float64)
    weights = np.ones_like(values)
    for k, (name, _) in enumerate(columns):
        if name.endswith("accuracy"):
            weights[:, k] = [len(each.case.boxes) for each in measured]
    weights[np.isnan(values)] = 0.0
    values = np.nan_to_num(values)
    patients = _list_patients(measured)
    parts, wholes = (np.hstack([table * member[:, None] for member in members]) for table in (values, weights))
    bounds = bootstrap_ratios(parts, wholes, patients, n_resamples, seed)
    codes, _ = patient_codes(patients)
    return [
        {
            column: _build_rate(
                values[member, k], weights[member, k], codes[member], bounds[group * len(columns) + k], k
            )
            for k, column in enumerate(columns)
        }
        for group, member in enumerate(members)
    ]


def _build_rate(
    values: np.ndarray, weights: np.ndarray, codes: np.ndarray, bounds: Interval, column: int
) -> LocalisationRate:
    if not len(values):
        return LocalisationRate(None, reason="no heat map")
    if not weights.any():
        return LocalisationRate(None, reason="fewer than two patients")
    value = float(values.sum() / weights.sum())
    if bounds.reason == NO_VARIATION or (bounds.low is not None and bounds.low == bounds.high):
        # As when all maps hit in almost every resample; equal limits do not mean certainty.
        if column >= len(_SHARES):
            return LocalisationRate(value, reason=f"no interval: {NO_VARIATION}")
        return LocalisationRate(value, *clustered_share_interval(values / weights, codes), method="wilson")
    reason = f"no interval: {bounds.reason}" if bounds.reason else None
    return LocalisationRate(value, bounds.low, bounds.high, None if reason else "bootstrap", reason)


def _summarize(
    cases: Sequence[_Case], measured: Sequence[_MapResult], rates: _Rates, tuned_thresholds: tuple[float, ...]
) -> FindingLocalisation:
    hits = float(sum(each.hit for each in measured))
    known = {each.case.patient for each in measured if each.case.patient[0] == "patient"}

    def mean(name: str) -> float | None:
        return float(np.mean([getattr(each, name) for each in measured])) if measured else None

    def select(name: str, thresholds: Sequence[float]) -> dict[float, LocalisationRate]:
        return {threshold: rates[name, threshold] for threshold in thresholds}

    return FindingLocalisation(
        boxes=sum(len(case.boxes) for case in cases),
        cases=len(cases),
        n=len(measured),
        patients=len(known) if known or not measured else None,
        missing=len(cases) - len(measured),
        flat=sum(each.flat for each in measured),
        hits=hits,
        hit_rate=rates["hit_rate", None],
        hit_rate_of_all=hits / len(cases) if cases else None,
        ceiling=mean("reachable"),
        hit_rate_inside=rates["hit_rate_inside", None],
        ceiling_inside=mean("reachable_inside"),
        chance=mean("chance"),
        box_share=mean("box_share"),
        iou=rates["iou", None],
        iou_at_least=select("iou_at_least", IOU_LEVELS),
        tuned_iou=rates["tuned_iou", None],
        tuned_thresholds=tuned_thresholds,
        accuracy={name: select(f"{name}_accuracy", thresholds) for name, thresholds in BOX_THRESHOLDS.items()},
        false_boxes={name: select(f"{name}_false_boxes", thresholds) for name, thresholds in BOX_THRESHOLDS.items()},
    )
