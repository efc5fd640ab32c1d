"""Metrics of every finding in each group, and differences between groups.

A patient may be in several groups of one attribute, having grown older or having been imaged in two views. So each
resample draws patients once for all groups of an attribute, and each group takes its own images of those patients.
Differences are taken within a resample.

Small cells have fewer than `FEW_PATIENTS` patients with or without the finding. They are marked and kept; their
intervals are too narrow. Differences are reported with the number of comparisons, because one in twenty intervals
excludes 0 by chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ray_cxr.evaluation import bootstrap, metrics
from ray_cxr.evaluation.groups import Group
from ray_cxr.evaluation.intervals import patient_codes, percentile_interval

#: With fewer positive (or negative) patients the bootstrap interval is too narrow to trust.
FEW_PATIENTS = 10
#: Share of intervals that miss the truth by chance.
_MISS_RATE = 0.05
#: Labels of several groups resampled together, to bound memory.
_CELLS = 8 << 20
_QUANTITIES = ("auroc", "sensitivity", "specificity")


@dataclass(frozen=True)
class Cell:
    """One finding in one group.

    Attributes:
        n, positives: images with a label and a score, and the positive ones among them.
        n_patients, positive_patients, negative_patients: patients of those images; one patient may be both.
        auroc, auroc_low, auroc_high: with patient-bootstrap interval.
        sensitivity, specificity: at the operating point, with intervals.
        reason: why there is no AUROC.
        rates_reason: why sensitivity or specificity is missing.
        interval_reason: why AUROC has no interval.
        small: fewer than `FEW_PATIENTS` positive or negative patients.
    """

    finding: str
    n: int
    n_patients: int
    positives: int
    positive_patients: int
    negative_patients: int
    auroc: float | None
    auroc_low: float | None
    auroc_high: float | None
    sensitivity: float | None
    sensitivity_low: float | None
    sensitivity_high: float | None
    specificity: float | None
    specificity_low: float | None
    specificity_high: float | None
    reason: str | None
    rates_reason: str | None
    interval_reason: str | None
    small: bool


@dataclass(frozen=True)
class Mean:
    """A quantity's unweighted mean over findings.

    Attributes:
        value, low, high: None if no finding defines it. The interval omits resamples that leave a finding undefined.
        findings: names of the averaged findings.
        small: number of small cells among them.
        undefined: number of omitted resamples.
        reason: why there is no value, or no interval.
    """

    value: float | None
    low: float | None
    high: float | None
    findings: tuple[str, ...]
    small: int
    undefined: int
    reason: str | None


@dataclass(frozen=True)
class Means:
    """Means of AUROC, sensitivity and specificity over findings."""

    auroc: Mean
    sensitivity: Mean
    specificity: Mean


@dataclass(frozen=True)
class GroupResult:
    """Metrics of one group.

    Attributes:
        attribute, value, crossing: see `Group`.
        n, n_patients: images, labelled or not, and their patients.
        own: means over the findings that this group defines; not comparable between groups.
        shared: means over the findings that every known group of the attribute defines; comparable.
        cells: one per finding.
        reference: whether this is the largest group of its attribute, to which the others are compared.
        small: fewer than `FEW_PATIENTS` patients, or only small cells.
    """

    attribute: str
    value: str
    crossing: bool
    n: int
    n_patients: int
    own: Means
    shared: Means
    cells: tuple[Cell, ...]
    reference: bool
    small: bool


@dataclass(frozen=True)
class Difference:
    """A group's value minus that of the reference group of its attribute.

    A difference of -0.1 in sensitivity is underdiagnosis: ten more of 100 images with the finding are missed.

    Attributes:
        finding: None for the mean over `findings`; see `GroupResult.shared`.
        quantity: `auroc` or `sensitivity`.
        low, high: 95% percentiles of the difference over resampled patients.
        reason: why there is no difference, or no interval.
        small: one of the two cells, or for a mean one of the groups, is small.
    """

    attribute: str
    value: str
    reference: str
    crossing: bool
    finding: str | None
    quantity: str
    difference: float | None
    low: float | None
    high: float | None
    findings: tuple[str, ...]
    reason: str | None
    small: bool

    @property
    def excludes_zero(self) -> bool | None:
        """Whether the interval excludes 0; None without an interval."""
        return None if self.low is None or self.high is None else self.low > 0.0 or self.high < 0.0


@dataclass(frozen=True)
class Comparisons:
    """Number of comparisons, and of those that exclude 0.

    Attributes:
        made: differences with an interval, without small cells.
        exclude_zero: those whose interval excludes 0.
        expected_by_chance: expected `exclude_zero` if no groups differ.
        small: differences with a small cell, which are not counted.
    """

    made: int
    exclude_zero: int
    expected_by_chance: float
    small: int

    @classmethod
    def count(cls, differences: Iterable[Difference]) -> Comparisons:
        listed = list(differences)
        judged = [one.excludes_zero for one in listed if one.excludes_zero is not None and not one.small]
        return cls(len(judged), sum(judged), _MISS_RATE * len(judged), sum(one.small for one in listed))

    @property
    def summary(self) -> str:
        """One sentence with these counts."""
        return (
            f"{self.exclude_zero:,} of {self.made:,} differences have an interval that excludes 0; without any true "
            f"difference about {self.expected_by_chance:.0f} would, because one 95% interval in twenty does "
            f"({self.small:,} more have too few patients to count)"
        )


@dataclass(frozen=True)
class Subgroups:
    """Results of all groups.

    Attributes:
        groups: in the order of the arguments.
        differences: each known group against the reference of its attribute.
        single, crossings: comparisons between groups of one attribute, and between crossings.
        n_resamples: resamples of all intervals except AUROC of crossings, which has `n_resamples_crossings`.
    """

    groups: tuple[GroupResult, ...]
    differences: tuple[Difference, ...]
    single: Comparisons
    crossings: Comparisons
    n_resamples: int
    n_resamples_crossings: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return the entry of metrics.json: lists of groups and differences; a group's findings by name."""
        return {
            "groups": [_group_to_json(group) for group in self.groups],
            "differences": [
                {**asdict(one), "findings": list(one.findings), "excludes_zero": one.excludes_zero}
                for one in self.differences
            ],
            "comparisons": {
                name: {**asdict(count), "words": count.summary}
                for name, count in (("single", self.single), ("crossings", self.crossings))
            },
            "n_resamples": self.n_resamples,
            "n_resamples_crossings": self.n_resamples_crossings,
            "seed": self.seed,
            "few_patients": FEW_PATIENTS,
        }


@dataclass(frozen=True, eq=False)
class LabelledScores:
    """Labels and predictions of n images for F findings.

    Attributes:
        labels: [n, F], 1 or 0; NaN or negative if not labelled.
        scores: [n, F], NaN if missing.
        flags: int8 [n, F], 1 at or above the operating point, 0 below, -1 if there is none.
        patients: ids [n]; see `intervals.patient_codes`.
        findings: F names.
        macro: bool [F], findings that means count; None for all.
    """

    labels: np.ndarray
    scores: np.ndarray
    flags: np.ndarray
    patients: np.ndarray
    findings: Sequence[str]
    macro: np.ndarray | None = None


def measure_groups(
    groups: Sequence[Group],
    images: LabelledScores,
    *,
    n_resamples: int = 500,
    n_resamples_crossings: int = 200,
    seed: int = 0,
) -> Subgroups:
    """Measure every finding in every group, and compare each group with the largest of its attribute.

    Args:
        groups: see `groups.build_groups`.
        images: labels and predictions.
        n_resamples: resamples of patients; also for sensitivity and specificity of crossings.
        n_resamples_crossings: resamples for AUROC of crossings, which takes most of the time.
        seed: seed of the resamples.

    Raises:
        ValueError: shapes differ, a label is neither 0 nor 1, or a number of resamples is below 1.
    """
    table = _Images.build(images)
    if any(group.mask.shape != table.codes.shape for group in groups):
        raise ValueError(f"a group's mask is not of {len(table.codes)} images")
    if min(n_resamples, n_resamples_crossings) < 1:
        raise ValueError("the number of resamples must be at least 1")
    by_attribute: dict[str, list[Group]] = {}
    for group in groups:
        by_attribute.setdefault(group.attribute, []).append(group)
    results: list[GroupResult] = []
    differences: list[Difference] = []
    for part in by_attribute.values():
        aurocs = _resample_aurocs(part, table, n_resamples_crossings if part[0].crossing else n_resamples, seed)
        rates = _resample_rates(part, table, n_resamples, seed)
        measured, compared = _measure_attribute(
            part, table, [{"auroc": auroc, **rate} for auroc, rate in zip(aurocs, rates, strict=True)]
        )
        results += measured
        differences += compared
    return Subgroups(
        groups=tuple(results),
        differences=tuple(differences),
        single=Comparisons.count(one for one in differences if not one.crossing),
        crossings=Comparisons.count(one for one in differences if one.crossing),
        n_resamples=n_resamples,
        n_resamples_crossings=n_resamples_crossings,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _Images:
    """Validated arrays: labels int8 [n, F], -1 if not labelled or not scored; counted bool [F]."""

    labels: np.ndarray
    scores: np.ndarray
    flags: np.ndarray
    codes: np.ndarray
    n_patients: int
    findings: tuple[str, ...]
    counted: np.ndarray

    @classmethod
    def build(cls, images: LabelledScores) -> _Images:
        labels, scores, flags = (np.asarray(table) for table in (images.labels, images.scores, images.flags))
        width = len(images.findings)
        if {labels.shape, scores.shape, flags.shape} != {(len(images.patients), width)}:
            raise ValueError(
                f"labels {labels.shape}, scores {scores.shape}, flags {flags.shape}, {len(images.patients)} patients "
                f"and {width} findings do not fit"
            )
        known = (labels >= 0) & ~np.isnan(scores.astype(np.float64))
        counted = np.ones(width, dtype=bool) if images.macro is None else np.asarray(images.macro, dtype=bool)
        labels = np.where(known, labels, -1).astype(np.int8)
        return cls(labels, scores, flags, *patient_codes(images.patients), tuple(images.findings), counted)

    def names(self, columns: np.ndarray) -> tuple[str, ...]:
        return tuple(name for name, one in zip(self.findings, columns, strict=True) if one)

    def sum_per_patient(self, values: np.ndarray) -> np.ndarray:
        """Sum bool [n, K] over each patient's images, float32 [patients, K]; exact for such small integers."""
        width = values.shape[1]
        rows, columns = np.nonzero(values)
        flat = np.bincount(self.codes[rows] * width + columns, minlength=self.n_patients * width)
        return flat.reshape(self.n_patients, width).astype(np.float32)


@dataclass(frozen=True, eq=False)
class _Values:
    """One quantity in one group: in the sample [F] and in each resample [R, F]; NaN if undefined."""

    point: np.ndarray
    drawn: np.ndarray

    def mean(self, columns: np.ndarray) -> _Values:
        """Average columns bool [F], as [1] and [R, 1]; NaN if one of them is NaN."""
        if not columns.any():
            return _Values(np.full(1, np.nan), np.full((len(self.drawn), 1), np.nan))
        return _Values(self.point[columns].mean(keepdims=True), self.drawn[:, columns].mean(axis=1, keepdims=True))


def _resample_aurocs(part: Sequence[Group], images: _Images, n_resamples: int, seed: int) -> list[_Values]:
    """Compute AUROC of every finding in each group; all groups share their resamples."""
    n, width = images.labels.shape
    batch = max(1, _CELLS // max(1, n * width))
    found: list[_Values] = []
    for start in range(0, len(part), batch):
        groups = part[start : start + batch]
        drawn = bootstrap.resampled_aurocs(
            np.hstack([np.where(group.mask[:, None], images.labels, -1) for group in groups]),
            np.tile(images.scores, (1, len(groups))),
            images.codes,
            n_resamples,
            seed,
        ).values
        for k, group in enumerate(groups):
            point = np.full(width, np.nan)
            for j in range(width):
                rows = group.mask & (images.labels[:, j] >= 0)
                value = metrics.auroc(images.labels[rows, j], images.scores[rows, j])
                point[j] = np.nan if value is None else value
            found.append(_Values(point, drawn[:, k * width : (k + 1) * width]))
    return found


def _resample_rates(part: Sequence[Group], images: _Images, n_resamples: int, seed: int) -> list[dict[str, _Values]]:
    """Compute sensitivity and specificity of every finding in each group; all groups share their resamples."""
    width = len(images.findings)
    judged = (images.labels >= 0) & (images.flags >= 0)
    positive, flagged = images.labels == 1, images.flags == 1
    sums = []
    for group in part:
        own = judged & group.mask[:, None]
        cells = [own & positive & flagged, own & positive, own & ~positive & ~flagged, own & ~positive]
        sums.append(images.sum_per_patient(np.hstack(cells)))
    points = [_divide_counts(one.sum(axis=0, dtype=np.float64)[None], width)[:, 0] for one in sums]
    together = np.hstack(sums)
    drawn = np.empty((len(part), 2, n_resamples, width))
    chunks = bootstrap.resample_patients(images.n_patients, len(images.labels), n_resamples, seed)
    for rows, counts in chunks:
        products = np.hsplit(counts.astype(np.float32) @ together, len(part))
        for k, product in enumerate(products):
            drawn[k, :, rows] = _divide_counts(product, width)
    return [
        {"sensitivity": _Values(point[0], values[0]), "specificity": _Values(point[1], values[1])}
        for point, values in zip(points, drawn, strict=True)
    ]


def _divide_counts(counts: np.ndarray, width: int) -> np.ndarray:
    """Return sensitivity and specificity, float64 [2, R, F], from [R, 4F]: two numerator-denominator pairs."""
    pairs = counts.astype(np.float64).reshape(len(counts), 2, 2, width)
    parts, wholes = pairs[:, :, 0], pairs[:, :, 1]
    result = np.full((len(counts), 2, width), np.nan)
    np.divide(parts, wholes, out=result, where=wholes > 0)
    return result.swapaxes(0, 1)


def _measure_attribute(
    part: Sequence[Group], images: _Images, values: Sequence[Mapping[str, _Values]]
) -> tuple[list[GroupResult], list[Difference]]:
    """Summarise the groups of one attribute, and compare the known ones with the largest."""
    known = [i for i, group in enumerate(part) if group.known]
    defined = {
        name: np.logical_and.reduce([~np.isnan(values[i][name].point) for i in known] or [~images.counted])
        for name in _QUANTITIES
    }
    largest = max(known, key=lambda i: int(part[i].mask.sum()), default=None)
    results = []
    for i, group in enumerate(part):
        cells = _measure_cells(group, images, values[i])
        n_patients = len(np.unique(images.codes[group.mask]))
        results.append(
            GroupResult(
                attribute=group.attribute,
                value=group.value,
                crossing=group.crossing,
                n=int(group.mask.sum()),
                n_patients=n_patients,
                own=_average(values[i], cells, images),
                shared=_average(values[i], cells, images, defined),
                cells=tuple(cells),
                reference=i == largest,
                small=n_patients < FEW_PATIENTS or all(cell.small for cell in cells),
            )
        )
    if largest is None:
        return results, []
    differences = [
        one
        for i in known
        if i != largest
        for one in _compare((results[i], results[largest]), (values[i], values[largest]), images, defined)
    ]
    return results, differences


def _measure_cells(group: Group, images: _Images, values: Mapping[str, _Values]) -> list[Cell]:
    labels, flags, codes = images.labels[group.mask], images.flags[group.mask], images.codes[group.mask]
    cells = []
    for j, finding in enumerate(images.findings):
        known, positive = labels[:, j] >= 0, labels[:, j] == 1
        positive_patients, negative_patients = (len(np.unique(codes[rows])) for rows in (positive, known & ~positive))
        reason = metrics.undefined_reason(labels[known, j])
        rates_reason: str | None = "no operating point"
        if (images.flags[:, j] >= 0).any():
            rates_reason = metrics.undefined_reason(positive[known & (flags[:, j] >= 0)])
        bounds = {name: percentile_interval(values[name].drawn[:, j]) for name in _QUANTITIES}
        numbers: dict[str, float | None] = {}
        for name, interval in bounds.items():
            numbers |= {name: _float_or_none(values[name].point[j])}
            numbers |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        cells.append(
            Cell(
                finding=finding,
                n=int(known.sum()),
                n_patients=len(np.unique(codes[known])),
                positives=int(positive.sum()),
                positive_patients=positive_patients,
                negative_patients=negative_patients,
                **numbers,
                reason=reason,
                rates_reason=rates_reason,
                interval_reason=bounds["auroc"].reason if reason is None else None,
                small=min(positive_patients, negative_patients) < FEW_PATIENTS,
            )
        )
    return cells


def _average(
    values: Mapping[str, _Values],
    cells: Sequence[Cell],
    images: _Images,
    among: Mapping[str, np.ndarray] | None = None,
) -> Means:
    """Average over the findings that a group defines, or over those `among`, bool [F] per quantity."""
    means = {}
    for name, value in values.items():
        columns = images.counted & (~np.isnan(value.point) if among is None else among[name])
        mean = value.mean(columns)
        point = _float_or_none(mean.point[0])
        names = images.names(columns)
        if point is None:
            if names:
                reason = f"not every one of {len(names)} findings has {name} here"
            else:
                reason = f"no finding has {name}" + ("" if among is None else " defined in all groups")
            means[name] = Mean(None, None, None, (), 0, len(mean.drawn), reason)
            continue
        interval = percentile_interval(mean.drawn[:, 0])
        small = sum(cell.small for cell, one in zip(cells, columns, strict=True) if one)
        means[name] = Mean(point, interval.low, interval.high, names, small, interval.undefined, interval.reason)
    return Means(**means)


def _compare(
    pair: tuple[GroupResult, GroupResult],
    values: tuple[Mapping[str, _Values], Mapping[str, _Values]],
    images: _Images,
    defined: Mapping[str, np.ndarray],
) -> Iterator[Difference]:
    """Yield differences of AUROC and of sensitivity: first of the shared means, then of each finding."""
    one, reference = pair
    for quantity in ("auroc", "sensitivity"):
        a, b = (value[quantity] for value in values)
        columns = defined[quantity] & images.counted
        blank = Difference(
            attribute=one.attribute,
            value=one.value,
            reference=reference.value,
            crossing=one.crossing,
            finding=None,
            quantity=quantity,
            difference=None,
            low=None,
            high=None,
            findings=images.names(columns),
            reason=None,
            small=one.small or reference.small,
        )
        yield _subtract(blank, a.mean(columns), b.mean(columns), 0)
        for j, finding in enumerate(images.findings):
            small = any(
                # Sensitivity does not depend on negatives.
                cell.positive_patients < FEW_PATIENTS if quantity == "sensitivity" else cell.small
                for cell in (one.cells[j], reference.cells[j])
            )
            yield _subtract(replace(blank, finding=finding, findings=(finding,), small=small), a, b, j)


def _subtract(blank: Difference, a: _Values, b: _Values, j: int) -> Difference:
    difference = _float_or_none(a.point[j] - b.point[j])
    if difference is None:
        undefined = [name for name, value in ((blank.value, a), (blank.reference, b)) if np.isnan(value.point[j])]
        return replace(blank, reason=f"no {blank.quantity} in {' nor in '.join(undefined)}")
    interval = percentile_interval(a.drawn[:, j] - b.drawn[:, j])
    return replace(blank, difference=difference, low=interval.low, high=interval.high, reason=interval.reason)


def _float_or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _group_to_json(group: GroupResult) -> dict[str, Any]:
    plain = asdict(group)
    plain["findings"] = {cell.pop("finding"): cell for cell in plain.pop("cells")}
    for means in (plain["own"], plain["shared"]):
        for mean in means.values():
            mean["findings"] = list(mean["findings"])
    return plain
