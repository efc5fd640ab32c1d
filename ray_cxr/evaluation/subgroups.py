"""Metrics of every finding in each group, and differences between groups.

Small cells have fewer than `FEW_PATIENTS` patients with the finding, or without it. They are kept, and marked because
their intervals are less reliable. Differences are reported with the number of comparisons, because about one
in twenty intervals excludes 0 by chance. `group_estimates` defines the intervals;
`tests/simulations/group_differences.py` measures the share that excludes 0 if there is no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np

from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.group_estimates import (
    INTERVAL_METHOD,
    Estimates,
    LabelledScores,
    estimate_aurocs,
    estimate_shares,
    sum_per_patient,
)
from ray_cxr.evaluation.groups import Group
from ray_cxr.evaluation.intervals import to_record

#: With fewer positive (or negative) patients an interval is too narrow to trust.
FEW_PATIENTS = 10
#: Share of intervals that miss the truth by chance.
MISS_RATE = 0.05
#: Why a value has no interval.
_FEW = {
    "auroc": "fewer than two patients with or without the finding",
    "sensitivity": "fewer than two patients with the finding",
    "specificity": "fewer than two patients without the finding",
}
_NAMES = {
    "auroc": "AUROC",
    "underdiagnosis_patients": "underdiagnosis of patients",
    "overdiagnosis_patients": "overdiagnosis of patients",
}
_QUANTITIES = ("auroc", "sensitivity", "specificity")


@dataclass(frozen=True)
class Cell:
    """One finding in one group; limits are 95% intervals over patients, rates are at the operating point."""

    finding: str
    n: int  # images with a label and a score
    n_patients: int | None  # here and below: None if no image has a patient id
    positives: int
    positive_patients: int | None  # with a positive image; a patient may be positive and negative
    negative_patients: int | None
    auroc: float | None
    auroc_low: float | None
    auroc_high: float | None
    sensitivity: float | None
    sensitivity_low: float | None
    sensitivity_high: float | None
    specificity: float | None
    specificity_low: float | None
    specificity_high: float | None
    reason: str | None  # why there is no AUROC
    rates_reason: str | None  # why sensitivity or specificity is missing
    interval_reason: str | None  # why AUROC has no interval
    few_positives: bool  # fewer than `FEW_PATIENTS` positive patients; an image without a patient id counts as one
    few_negatives: bool
    small: bool  # fewer than `FEW_PATIENTS` positive or negative patients

    def is_small(self, quantity: str) -> bool:
        """Return whether too few patients define a quantity: sensitivity does not depend on negatives."""
        few = {"sensitivity": self.few_positives, "specificity": self.few_negatives}
        return few.get(quantity, self.small)


@dataclass(frozen=True)
class Mean:
    """A quantity's unweighted mean over findings; `reason` is set if there is no value."""

    value: float | None
    low: float | None
    high: float | None
    findings: tuple[str, ...]
    small: int  # number of small cells among the findings
    reason: str | None


@dataclass(frozen=True)
class Means:
    """Means of AUROC, sensitivity and specificity over findings."""

    auroc: Mean
    sensitivity: Mean
    specificity: Mean


@dataclass(frozen=True)
class GroupResult:
    """Metrics of one group, with one cell per finding."""

    attribute: str
    value: str
    crossing: bool
    n: int  # images, labelled or not
    n_patients: int | None  # None if no image has a patient id
    own: Means  # over the findings that this group defines; not comparable between groups
    shared: Means  # over the findings that every known group with enough patients defines; comparable
    cells: tuple[Cell, ...]
    reference: bool  # whether this is the largest group of its attribute, to which the others are compared
    small: bool  # fewer than `FEW_PATIENTS` patients, or only small cells

    def to_json(self) -> dict[str, Any]:
        record = to_record(self)
        record["findings"] = {cell.pop("finding"): cell for cell in record.pop("cells")}
        return record


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A group's value minus that of the reference group of its attribute.

    A difference of -0.1 in sensitivity means that ten more of 100 images with the finding are missed.
    """

    attribute: str
    value: str
    reference: str
    crossing: bool
    finding: str | None  # None for the mean over `findings`; see `GroupResult.shared`
    quantity: str  # `auroc`, `sensitivity` or `specificity`
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    findings: tuple[str, ...]
    reason: str | None = None  # why there is no difference, or no interval
    small: bool  # one of the two cells, or for a mean one of the groups, is small

    @property
    def excludes_zero(self) -> bool | None:
        """Whether the interval excludes 0; None without an interval, or with a small cell, which proves nothing."""
        if self.small or self.low is None or self.high is None:
            return None
        return self.low > 0.0 or self.high < 0.0


@dataclass(frozen=True)
class Comparisons:
    """Number of comparisons, and of those that exclude 0."""

    made: int  # differences with an interval, without small cells
    exclude_zero: int  # those whose interval excludes 0
    expected_by_chance: float  # expected `exclude_zero` if no groups differ
    small: int  # differences with a small cell, which are not counted

    @classmethod
    def count(cls, differences: Sequence[Difference]) -> Comparisons:
        judged = [each.excludes_zero for each in differences if each.excludes_zero is not None]
        return cls(len(judged), sum(judged), MISS_RATE * len(judged), sum(each.small for each in differences))

    @property
    def summary(self) -> str:
        """One sentence with these counts."""
        return self.describe("differences")

    def describe(self, differences: str) -> str:
        """Return one sentence with these counts, about `differences` of one kind."""
        if not self.made:
            return "all subgroups have too few patients to be compared" if self.small else "no subgroups to compare"
        chance = f"about {self.expected_by_chance:.0f}" if self.expected_by_chance >= 1.0 else "less than one"
        small = f"; {self.small:,} more have too few patients to count" if self.small else ""
        return (
            f"the interval of {self.exclude_zero:,} of {self.made:,} {differences} excludes 0; without any true "
            f"difference {chance} would, because one 95% interval in twenty does, and more at high AUROC with few "
            f"patients{small}"
        )


@dataclass(frozen=True)
class Subgroups:
    """Results of all groups, each known one compared with the reference of its attribute."""

    groups: tuple[GroupResult, ...]
    differences: tuple[Difference, ...]
    single: Comparisons  # between groups of one attribute
    crossings: Comparisons  # between pairs of two attributes

    def to_json(self) -> dict[str, Any]:
        """Return the entry of metrics.json: lists of groups and differences; a group's findings by name."""
        return {
            "groups": [group.to_json() for group in self.groups],
            "differences": [
                {**to_record(difference), "excludes_zero": difference.excludes_zero} for difference in self.differences
            ],
            "comparisons": {
                name: {**to_record(count), "words": count.summary}
                for name, count in (("single", self.single), ("crossings", self.crossings))
            },
            "interval_method": INTERVAL_METHOD,
            "few_patients": FEW_PATIENTS,
        }


def measure_groups(groups: Sequence[Group], images: LabelledScores) -> Subgroups:
    """Measure every finding in every group, and compare each group with the largest of its attribute."""
    if any(group.mask.shape != images.patients.codes.shape for group in groups):
        raise ValueError(f"a group's mask is not of {len(images.labels)} images")
    results: list[GroupResult] = []
    differences: list[Difference] = []
    for part in split_by_attribute(groups):
        measured, compared = _measure_attribute(part, images)
        results += measured
        differences += compared
    return Subgroups(
        groups=tuple(results),
        differences=tuple(differences),
        single=Comparisons.count([difference for difference in differences if not difference.crossing]),
        crossings=Comparisons.count([difference for difference in differences if difference.crossing]),
    )


def split_by_attribute(groups: Sequence[Group]) -> list[list[Group]]:
    """Return the groups of each attribute, in order."""
    by_attribute: dict[str, list[Group]] = {}
    for group in groups:
        by_attribute.setdefault(group.attribute, []).append(group)
    return list(by_attribute.values())


def find_reference(part: Sequence[Group]) -> int | None:
    """Return the position of the largest known group of an attribute."""
    known = [i for i, group in enumerate(part) if group.is_known]
    return max(known, key=lambda i: int(part[i].mask.sum()), default=None)


def subtract(blank: Difference, a: Estimates, b: Estimates, j: int) -> Difference:
    """Fill in value j of `blank.value` minus that of `blank.reference`, or the reason why there is none."""
    difference = _float_or_none(a.values[j] - b.values[j])
    if difference is None:
        undefined = [name for name, value in ((blank.value, a), (blank.reference, b)) if np.isnan(value.values[j])]
        name = _NAMES.get(blank.quantity, blank.quantity)
        return replace(blank, reason=f"no {name} in {' nor in '.join(undefined)}")
    # One patient with the finding has no interval alone, so none in a difference.
    has_own = a.interval(j) is not None and b.interval(j) is not None
    interval = a.difference_interval(b, j) if has_own else None
    low, high = interval or (None, None)
    few = "fewer than two patients in a group"
    if blank.finding is not None:
        few = f"{_FEW[blank.quantity]} in a group"
    return replace(blank, difference=difference, low=low, high=high, reason=None if interval else few)


def _estimate(group: Group, images: LabelledScores) -> dict[str, Estimates]:
    """Estimate each quantity of every finding in a group."""
    labels, flags, codes = images.labels[group.mask], images.flags[group.mask], images.patients.codes[group.mask]
    judged, positive, flagged = (labels >= 0) & (flags >= 0), labels == 1, flags == 1
    cells = [judged & positive & flagged, judged & positive, judged & ~positive & ~flagged, judged & ~positive]
    counts = np.hsplit(sum_per_patient(np.hstack(cells), codes, images.patients.units), 4)
    return {
        "auroc": estimate_aurocs(labels, images.scores[group.mask], codes, images.patients.units),
        "sensitivity": estimate_shares(counts[0], counts[1]),
        "specificity": estimate_shares(counts[2], counts[3]),
    }


def _measure_attribute(part: Sequence[Group], images: LabelledScores) -> tuple[list[GroupResult], list[Difference]]:
    """Measure the groups of one attribute, and compare the known ones with the largest."""
    estimates = [_estimate(group, images) for group in part]
    known = [i for i, group in enumerate(part) if group.is_known]
    # A few children must not take findings from the means of all other ages.
    enough = [i for i in known if images.patients[part[i].mask].units >= FEW_PATIENTS]
    deciding = enough if len(enough) > 1 else known
    defined = {
        name: np.logical_and.reduce([~np.isnan(estimates[i][name].values) for i in deciding] or [~images.macro])
        for name in _QUANTITIES
    }
    largest = find_reference(part)
    results = []
    for i, group in enumerate(part):
        cells = _measure_cells(group, images, estimates[i])
        patients = images.patients[group.mask]
        results.append(
            GroupResult(
                attribute=group.attribute,
                value=group.value,
                crossing=group.crossing,
                n=int(group.mask.sum()),
                n_patients=patients.number,
                own=_average(estimates[i], cells, images),
                shared=_average(estimates[i], cells, images, defined),
                cells=tuple(cells),
                reference=i == largest,
                small=patients.units < FEW_PATIENTS or all(cell.small for cell in cells),
            )
        )
    if largest is None:
        return results, []
    differences: list[Difference] = []
    for i in known:
        if i != largest:
            pair = (results[i], results[largest])
            differences += _compare(pair, (estimates[i], estimates[largest]), images, defined)
    return results, differences


def _measure_cells(group: Group, images: LabelledScores, estimates: Mapping[str, Estimates]) -> list[Cell]:
    labels, flags, patients = images.labels[group.mask], images.flags[group.mask], images.patients[group.mask]
    cells = []
    for j, finding in enumerate(images.findings):
        known, positive = labels[:, j] >= 0, labels[:, j] == 1
        with_finding, without = patients[positive], patients[known & ~positive]
        reason = metrics.undefined_reason(labels[known, j])
        rates_reason: str | None = "no operating point"
        if (images.flags[:, j] >= 0).any():
            rates_reason = metrics.undefined_reason(positive[known & (flags[:, j] >= 0)])
        numbers: dict[str, float | None] = {}
        for name in _QUANTITIES:
            low, high = estimates[name].interval(j) or (None, None)
            value = _float_or_none(estimates[name].values[j])
            numbers |= {name: value, f"{name}_low": low, f"{name}_high": high}
        cells.append(
            Cell(
                finding=finding,
                n=int(known.sum()),
                n_patients=patients[known].number,
                positives=int(positive.sum()),
                positive_patients=with_finding.number,
                negative_patients=without.number,
                **numbers,
                reason=reason,
                rates_reason=rates_reason,
                interval_reason=_FEW["auroc"] if reason is None and numbers["auroc_low"] is None else None,
                few_positives=with_finding.units < FEW_PATIENTS,
                few_negatives=without.units < FEW_PATIENTS,
                small=min(with_finding.units, without.units) < FEW_PATIENTS,
            )
        )
    return cells


def _average(
    estimates: Mapping[str, Estimates],
    cells: Sequence[Cell],
    images: LabelledScores,
    shared: Mapping[str, np.ndarray] | None = None,
) -> Means:
    """Average over the findings that a group defines, or over `shared` findings, bool [F] per quantity."""
    means = {}
    for name, estimate in estimates.items():
        columns = images.macro & (~np.isnan(estimate.values) if shared is None else shared[name])
        mean = estimate.mean(columns)
        value = _float_or_none(mean.values[0])
        names = tuple(compress(images.findings, columns))
        if value is None:
            if names:
                reason = f"not every one of {len(names)} findings has {_NAMES.get(name, name)} here"
            else:
                reason = f"no finding has {_NAMES.get(name, name)}" + (
                    "" if shared is None else " defined in all groups with enough patients"
                )
            means[name] = Mean(None, None, None, (), 0, reason)
            continue
        low, high = mean.interval(0) or (None, None)
        small = sum(cell.small for cell in compress(cells, columns))
        means[name] = Mean(value, low, high, names, small, None)
    return Means(**means)


def _compare(
    pair: tuple[GroupResult, GroupResult],
    estimates: tuple[Mapping[str, Estimates], Mapping[str, Estimates]],
    images: LabelledScores,
    defined: Mapping[str, np.ndarray],
) -> Iterator[Difference]:
    """Yield differences of each quantity: first of the shared means, then of each finding."""
    group, reference = pair
    for quantity in _QUANTITIES:
        a, b = (estimate[quantity] for estimate in estimates)
        columns = defined[quantity] & images.macro
        blank = Difference(
            attribute=group.attribute,
            value=group.value,
            reference=reference.value,
            crossing=group.crossing,
            finding=None,
            quantity=quantity,
            findings=tuple(compress(images.findings, columns)),
            small=group.small or reference.small,
        )
        yield subtract(blank, a.mean(columns), b.mean(columns), 0)
        for j, finding in enumerate(images.findings):
            small = any(cell.is_small(quantity) for cell in (group.cells[j], reference.cells[j]))
            yield subtract(replace(blank, finding=finding, findings=(finding,), small=small), a, b, j)


def _float_or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
