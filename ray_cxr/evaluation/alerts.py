"""Alert budget: how many images and patients have a flag, by rule of operating points, and how many flags are right.

An image has any flag if a finding other than No_Finding is flagged. Its status is abnormal if a finding is present,
whether or not the model has an output for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.evaluation.bootstrap import bootstrap_ratios
from ray_cxr.evaluation.clustered import clustered_share_interval
from ray_cxr.evaluation.intervals import NO_VARIATION, Interval, Patients, to_record
from ray_cxr.labels import NO_FINDING

#: Measures of a rule, with the reason if there is nothing to divide by.
MEASURES = {
    "images_flagged": "no image has flags",
    "images_flagged_without_finding": "no image is known to be without a finding",
    "images_flagged_with_finding": "no image is known to have a finding",
    "patients_flagged": "no patient id is known",
    "patients_flagged_without_finding": "no patient is known to be without a finding",
    "patients_flagged_with_finding": "no patient is known to have a finding",
    "flags_per_image": "no image has flags",
    "flag_ppv": "no flag of a labelled finding",
    "any_flag_ppv": "no flagged image has a known status",
}


@dataclass(frozen=True)
class Share:
    """A ratio of sums over `n` images, patients or flags, with its 95% interval.

    `reason` explains a missing value or interval.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None = None


@dataclass(frozen=True)
class RuleAlerts:
    """What one rule flags.

    Attributes:
        chosen: it is the rule of the model's flags, not an alternative.
        findings: number of findings with flags, without No_Finding.
        shares: by the keys of `MEASURES`.
    """

    rule: str
    chosen: bool
    findings: int
    shares: dict[str, Share]


@dataclass(frozen=True)
class Alerts:
    """What each rule flags on the same images; the chosen rule first. `reason` explains missing rules."""

    images: str
    n_with_finding: int
    n_without_finding: int
    n_unknown: int
    rules: tuple[RuleAlerts, ...]
    reason: str | None = None

    @property
    def chosen(self) -> RuleAlerts | None:
        return self.rules[0] if self.rules and self.rules[0].chosen else None

    def to_json(self) -> dict[str, Any]:
        return dict(to_record(self))


def find_abnormal(labels: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return 1 for images with a finding, 0 for images without, and -1 if unknown: int8 [n].

    Labels are int8 [n] per finding, 1, 0 or -1 if not labelled. An image is without a finding if No_Finding is 1, or
    if it is 0 for every finding that is labelled in any image.
    """
    diseases = [y for finding, y in labels.items() if finding != NO_FINDING and (y >= 0).any()]
    no_finding = labels.get(NO_FINDING)
    n = len(next(iter(labels.values()), np.zeros(0)))
    if no_finding is None:
        no_finding = np.full(n, -1)
    columns = np.column_stack(diseases) if diseases else np.full((n, 1), -1)
    present = (columns == 1).any(axis=1) | (no_finding == 0)
    absent = (columns == 0).all(axis=1) | (no_finding == 1)
    return np.where(present, 1, np.where(absent, 0, -1)).astype(np.int8)


def measure_rules(
    flags: Mapping[str, np.ndarray],
    labels: np.ndarray,
    abnormal: np.ndarray,
    patients: np.ndarray,
    *,
    n_resamples: int,
    seed: int,
) -> dict[str, dict[str, Share]]:
    """Measure what each rule flags, with intervals from resampled patients.

    If all resamples agree, the interval of a share of images or patients is Wilson's for clustered images.

    Args:
        flags: per rule, int8 [n, F], 1, 0 or -1 without an operating point; without the column of No_Finding.
        labels: int8 [n, F], 1, 0 or -1 if not labelled.
        abnormal: int8 [n], see `find_abnormal`.
        patients: ids [n].
    """
    people = Patients.of(patients)
    counted = {rule: _count(found, labels, abnormal, people) for rule, found in flags.items()}
    if not counted:
        return {}
    parts, wholes = (np.hstack([pair[i] for pair in counted.values()]) for i in (0, 1))
    intervals = iter(bootstrap_ratios(parts, wholes, patients, n_resamples, seed))
    return {
        rule: {
            key: _build_share(key, part, whole, next(intervals), people.codes)
            for key, part, whole in zip(MEASURES, *(columns.T for columns in pair), strict=True)
        }
        for rule, pair in counted.items()
    }


def _count(
    flags: np.ndarray, labels: np.ndarray, abnormal: np.ndarray, people: Patients
) -> tuple[np.ndarray, np.ndarray]:
    """Return numerators and denominators of `MEASURES`, float64 [n, 9]."""
    judged, flagged = (np.asarray(np.any(found, axis=1)) for found in (flags >= 0, flags == 1))
    known = (flags == 1) & (labels >= 0)
    wholes = [judged, np.logical_and(judged, abnormal == 0), np.logical_and(judged, abnormal == 1)]
    images = [flagged & whole for whole in wholes]
    # A patient is counted in the row of the first image.
    _, first, codes = np.unique(people.codes, return_index=True, return_inverse=True)

    def by_patient(values: np.ndarray, combine: np.ufunc, start: bool = False) -> np.ndarray:
        result = np.full(len(first), start)
        combine.at(result, codes, values)
        rows = np.zeros(len(codes), dtype=bool)
        rows[first] = result
        return rows

    patients = [by_patient(judged, np.logical_or), by_patient(wholes[1], np.logical_and, True)]
    groups = [group & people.has_id for group in (*patients, by_patient(wholes[2], np.logical_or))]
    with_flag = by_patient(flagged, np.logical_or)
    n_flags = (flags == 1).sum(axis=1)
    parts = [*images, *(with_flag & group for group in groups), n_flags, (known & (labels == 1)).sum(axis=1), images[2]]
    totals = [*wholes, *groups, judged, known.sum(axis=1), flagged & (abnormal >= 0)]
    return np.column_stack(parts).astype(np.float64), np.column_stack(totals).astype(np.float64)


def _build_share(key: str, part: np.ndarray, whole: np.ndarray, found: Interval, codes: np.ndarray) -> Share:
    n = int(whole.sum())
    if n == 0:
        return Share(None, None, None, 0, MEASURES[key])
    value = float(part.sum() / n)
    if found.reason == NO_VARIATION and key not in ("flags_per_image", "flag_ppv"):
        counted = whole > 0
        return Share(value, *clustered_share_interval(part[counted], codes[counted]), n)
    return Share(value, found.low, found.high, n, found.reason and f"no interval: {found.reason}")
