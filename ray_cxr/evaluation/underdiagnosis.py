"""Underdiagnosis: images with a finding that the model passes as normal, by group (Seyyed-Kalantari et al. 2021).

The paper measures how often a model's output "No Finding" is positive for patients who have a finding, by sex, age,
race and insurance, and for pairs of these. Here an image is passed as normal if no finding is flagged, because that is
what a reader of the flags sees; the attributes are those of `groups`; and differences have intervals.

The findings are those with an operating point. Images count as follows:

underdiagnosis  images with a positive label of one of these findings: share without any flag
overdiagnosis   images that are known to be without any finding (`alerts.find_abnormal`): share with a flag

Null labels neither exclude an image with a positive label nor make one normal. A patient is underdiagnosed in a group
if none of the patient's images with a finding there has a flag, and overdiagnosed if one of those without has a flag.
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

    `beyond_chance`: the difference in underdiagnosis of images excludes 0 also at 0.05 divided by the number of such
    differences (Bonferroni); None if there is no difference, for small groups, and for pairs of attributes.
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
                name: {**to_record(count), "words": count.summary}
                for name, count in (("single", self.single), ("crossings", self.crossings))
            },
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
    compared: dict[int, tuple[Estimates, Estimates]] = {}
    for part in split_by_attribute(groups):
        estimates = [_estimate(group.mask, counted, images) for group in part]
        largest = find_reference(part)
        for i, group in enumerate(part):
            differences = {}
            if largest is not None and i != largest and group.is_known:
                pair = estimates[i], estimates[largest]
                differences = _compare(group, part[largest], pair, names)
                compared[len(results)] = pair
            attributes = (group.attribute, group.value, group.crossing, i == largest)
            results.append(GroupRates(*attributes, _list_rates(estimates[i]), differences))
    single, crossings = (
        [g.differences["underdiagnosis"] for g in results if g.differences and g.crossing == kind]
        for kind in (False, True)
    )
    counts = Comparisons.count(single)
    for i, (first, second) in compared.items():
        difference = results[i].differences["underdiagnosis"]
        if not results[i].crossing and not difference.small and difference.low is not None:
            low, high = first.difference_interval(second, 0, MISS_RATE / counts.made) or (0.0, 0.0)
            results[i] = replace(results[i], beyond_chance=low > 0.0 or high < 0.0)
    return Underdiagnosis(names, _list_rates(whole), tuple(results), counts, Comparisons.count(crossings))


def _estimate(mask: np.ndarray, counted: np.ndarray, images: LabelledScores) -> Estimates:
    """Estimate the rates in the order of `RATES` from bool [n, 4]: both numerators and denominators."""
    sums = sum_per_patient(counted[mask], images.patients.codes[mask], images.patients.units)
    missed, ill, alarmed, well = sums.T
    parts = [missed, (ill > 0) & (missed == ill), alarmed, alarmed > 0]
    return estimate_shares(np.column_stack(parts), np.column_stack([ill, ill > 0, well, well > 0]))


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
