"""Underdiagnosis: images with a finding that the model passes as normal, by group (Seyyed-Kalantari et al. 2021).

The paper measures the false-positive rate of a model's output "No Finding" by sex, age, race and insurance, and for
pairs of these. Here an image is passed as normal if no finding is flagged, because that is
what a reader of the flags sees; the attributes are those of `groups`; and differences have intervals.

The findings are those with an operating point. Images count as follows:

underdiagnosis  images with a positive label of one of these findings: share without any flag
overdiagnosis   images that are known to be without any finding (`alerts.find_abnormal`): share with a flag

Null labels neither exclude an image with a positive label nor make one normal. A patient is underdiagnosed in a group
if none of the patient's images with a finding there has a flag, and overdiagnosed if one of those without has a flag.

A group is named as clearly different only if both groups have at least `CLAIM_PATIENTS` patients with a finding, and
the difference excludes 0 after Bonferroni's correction. Limits that far out need many independent patients: Student's
t has the degrees of freedom of a variance to which patients contribute by the square of their number of images
(Satterthwaite 1946). `tests/simulations/underdiagnosis.py` counts groups that are named although none differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np

from ray_cxr.evaluation.group_estimates import Estimates, LabelledScores, estimate_shares, sum_per_patient
from ray_cxr.evaluation.groups import Group
from ray_cxr.evaluation.intervals import to_record
from ray_cxr.evaluation.subgroups import (
    FEW_PATIENTS,
    MISS_RATE,
    Comparisons,
    Difference,
    find_reference,
    split_by_attribute,
    subtract,
)

#: Patients with a finding that both groups need before one is named as clearly different.
CLAIM_PATIENTS = 30
#: Rates by key, with the reason if there is nothing to divide by.
RATES = {
    "underdiagnosis": "no image with a finding",
    "underdiagnosis_patients": "no patient with a finding",
    "overdiagnosis": "no image is known to be without a finding",
    "overdiagnosis_patients": "no patient has an image that is known to be without a finding",
}


@dataclass(frozen=True)
class Rate:
    """A share of `n` images or patients, with its 95% interval; `reason` explains a missing value or interval."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    small: bool  # fewer than `FEW_PATIENTS` patients; an image without a patient id counts as one
    reason: str | None


@dataclass(frozen=True)
class GroupRates:
    """The rates of one group by the keys of `RATES`, and their differences to the largest group of the attribute.

    `beyond_chance`: the difference in underdiagnosis of images excludes 0 also at 0.05 divided by the number of groups
    for which this is tested (Bonferroni); None if it is not: without a difference, if one of the groups has fewer than
    `CLAIM_PATIENTS` patients with a finding, and for pairs of attributes.
    """

    attribute: str
    value: str
    crossing: bool
    reference: bool
    rates: Mapping[str, Rate]
    differences: Mapping[str, Difference]
    beyond_chance: bool | None = None

    def to_json(self) -> dict[str, Any]:
        differences = {
            key: {**to_record(found), "excludes_zero": found.excludes_zero} for key, found in self.differences.items()
        }
        return {**to_record(replace(self, differences={})), "differences": differences}


@dataclass(frozen=True)
class Underdiagnosis:
    """The rates of all images and of each group, and how many differences in underdiagnosis of images exclude 0."""

    findings: tuple[str, ...]
    overall: Mapping[str, Rate]
    groups: tuple[GroupRates, ...]
    single: Comparisons
    crossings: Comparisons

    @property
    def tested(self) -> int:
        """Number of groups that could be named as clearly different."""
        return sum(group.beyond_chance is not None for group in self.groups)

    @property
    def highest(self) -> tuple[GroupRates, GroupRates] | None:
        """The groups with the higher and lower rate of the clear differences, for the highest rate; None without."""
        pairs = []
        for group in self.groups:
            if group.beyond_chance:
                other = next(g for g in self.groups if g.attribute == group.attribute and g.reference)
                is_higher = (group.differences["underdiagnosis"].difference or 0.0) > 0.0
                pairs.append((group, other) if is_higher else (other, group))
        return max(pairs, key=lambda pair: pair[0].rates["underdiagnosis"].value or 0.0, default=None)

    def to_json(self) -> dict[str, Any]:
        highest = self.highest
        return {
            "findings": list(self.findings),
            "overall": {key: to_record(rate) for key, rate in self.overall.items()},
            "groups": [group.to_json() for group in self.groups],
            "comparisons": {
                name: {**to_record(count), "words": count.describe("differences in underdiagnosis of images")}
                for name, count in (("single", self.single), ("crossings", self.crossings))
            },
            "claims": {"patients": CLAIM_PATIENTS, "tested": self.tested},
            "highest": highest
            and {"attribute": highest[0].attribute, "higher": highest[0].value, "lower": highest[1].value},
        }


def measure_underdiagnosis(
    groups: Sequence[Group], images: LabelledScores, abnormal: np.ndarray
) -> Underdiagnosis | str:
    """Measure the rates of each group, or return why there are none; `abnormal` [n] is of `alerts.find_abnormal`."""
    columns = images.macro & (images.flags >= 0).any(axis=0)
    if not columns.any():
        return "no finding has an operating point"
    flags = images.flags[:, columns]
    flagged = (flags == 1).any(axis=1)
    judged = flagged | (flags >= 0).all(axis=1)
    ill, well = judged & (images.labels[:, columns] == 1).any(axis=1), judged & (abnormal == 0)
    counted = np.column_stack([ill & ~flagged, ill, well & flagged, well])
    names = tuple(compress(images.findings, columns))
    whole = _estimate(np.ones(len(flagged), dtype=bool), counted, images)
    results: list[GroupRates] = []
    compared: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for part in split_by_attribute(groups):
        estimates = [_estimate(group.mask, counted, images) for group in part]
        largest = find_reference(part)
        for i, group in enumerate(part):
            differences = {}
            if largest is not None and i != largest and group.is_known:
                pair = estimates[i], estimates[largest]
                differences = _compare(group, part[largest], pair, names)
                if not group.crossing and all(one.freedom[0] + 1 >= CLAIM_PATIENTS for one in pair):
                    compared[len(results)] = group.mask, part[largest].mask
            attributes = (group.attribute, group.value, group.crossing, i == largest)
            results.append(GroupRates(*attributes, _list_rates(estimates[i]), differences))
    single, crossings = (
        [g.differences["underdiagnosis"] for g in results if g.differences and g.crossing == kind]
        for kind in (False, True)
    )
    for i, masks in compared.items():
        first, second = (_estimate_claim(mask, counted, images) for mask in masks)
        low, high = first.difference_interval(second, 0, MISS_RATE / len(compared)) or (0.0, 0.0)
        results[i] = replace(results[i], beyond_chance=low > 0.0 or high < 0.0)
    counts = (Comparisons.count(found) for found in (single, crossings))
    return Underdiagnosis(names, _list_rates(whole), tuple(results), *counts)


def _estimate(mask: np.ndarray, counted: np.ndarray, images: LabelledScores) -> Estimates:
    """Estimate the rates in the order of `RATES` from bool [n, 4]: both numerators and denominators."""
    sums = sum_per_patient(counted[mask], images.patients.codes[mask], images.patients.units)
    missed, ill, alarmed, well = sums.T
    parts = [missed, (ill > 0) & (missed == ill), alarmed, alarmed > 0]
    return estimate_shares(np.column_stack(parts), np.column_stack([ill, ill > 0, well, well > 0]))


def _estimate_claim(mask: np.ndarray, counted: np.ndarray, images: LabelledScores) -> Estimates:
    """Estimate underdiagnosis of images for a claim; see the module's docstring."""
    missed, ill = sum_per_patient(counted[mask, :2], images.patients.codes[mask], images.patients.units).T[..., None]
    estimates, squares = estimate_shares(missed, ill), ill**2
    equal = squares.sum() ** 2 / (squares**2).sum()  # patients, if all have the same number of images
    return replace(estimates, freedom=estimates.freedom * equal / (estimates.freedom + 1.0))


def _list_rates(estimates: Estimates) -> dict[str, Rate]:
    rates = {}
    for k, (key, reason) in enumerate(RATES.items()):
        n, small = int(estimates.images[k]), estimates.freedom[k] + 1 < FEW_PATIENTS
        if not n:
            rates[key] = Rate(None, None, None, 0, True, reason)
            continue
        low, high = estimates.interval(k) or (None, None)
        missing = "only one patient" if low is None else None
        rates[key] = Rate(float(estimates.values[k]), low, high, n, bool(small), missing)
    return rates


def _compare(
    group: Group, reference: Group, pair: tuple[Estimates, Estimates], names: tuple[str, ...]
) -> dict[str, Difference]:
    blank = Difference(
        attribute=group.attribute,
        value=group.value,
        reference=reference.value,
        crossing=group.crossing,
        finding=None,
        quantity="",
        findings=names,
        small=False,
    )
    found = {}
    for k, key in enumerate(RATES):
        small = any(estimates.freedom[k] + 1 < FEW_PATIENTS for estimates in pair)
        found[key] = subtract(replace(blank, quantity=key, small=small), *pair, k)
    return found
