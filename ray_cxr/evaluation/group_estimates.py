"""AUROC and shares of several groups of images, with intervals for each group and for the difference of two groups.

A patient can be in several groups, for example in two views. So an estimate keeps each patient's contribution to its
sampling error: their squares sum to the variance, and their products to the covariance of two estimates.

The interval of a group's own value is that of all images (`clustered`). The interval of a difference combines other
limits of the two groups (MOVER: Newcombe 1998; Zou & Donner 2008; with their covariance: Zou 2009): logit for AUROC and
means, and Wilson's (1927) for the effective number of images for shares. Both use Student's t with one degree of
freedom less than patients (of the smaller class), as in surveys with few clusters (Korn & Graubard 1998). If all
patients of a finding agree, its variance is unknown, and a mean's limits are at least those of its own interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import ndtri, stdtrit

from ray_cxr.evaluation.clustered import (
    limited_auroc_interval,
    logit_interval,
    mean_interval,
    share_interval,
    sum_deviations,
)
from ray_cxr.evaluation.delong import compute_components
from ray_cxr.evaluation.intervals import Patients, wilson_interval
from ray_cxr.evaluation.roc_steps import divide_or_nan

#: Standard errors of a single patient's mean rank (uniform in 0..1) and share. No deviation shows them, so the
#: value has no interval, but means have to include them.
ONE_RANK, ONE_SHARE = 12**-0.5, 0.5
INTERVAL_METHOD = (
    "Wilson with the effective number of images; MOVER for means and differences, for differences with limits from "
    "variances over patients and Student's t: logit (AUROC, means) or Wilson (rates)"
)


@dataclass(frozen=True, eq=False)
class LabelledScores:
    """Labels and predictions of n images for F findings."""

    labels: np.ndarray  # int8 [n, F], 1 or 0; -1 if not labelled or not scored
    scores: np.ndarray  # [n, F], NaN if missing
    flags: np.ndarray  # int8 [n, F], 1 at or above the operating point, 0 below, -1 if there is none
    patients: Patients
    findings: tuple[str, ...]
    macro: np.ndarray  # bool [F], findings that means count

    @classmethod
    def build(
        cls,
        labels: np.ndarray,
        scores: np.ndarray,
        flags: np.ndarray,
        patients: np.ndarray,
        findings: Sequence[str],
        macro: np.ndarray,
    ) -> LabelledScores:
        """Check the arrays of n images, and remove labels without a score. Missing labels are NaN or negative."""
        if {labels.shape, scores.shape, flags.shape} != {(len(patients), len(findings))}:
            raise ValueError(
                f"labels {labels.shape}, scores {scores.shape}, flags {flags.shape}, {len(patients)} patients and "
                f"{len(findings)} findings do not fit"
            )
        known = (labels >= 0) & ~np.isnan(scores.astype(np.float64))
        labels = np.where(known, labels, -1).astype(np.int8)
        return cls(labels, scores, flags, Patients.of(patients), tuple(findings), macro)


@dataclass(frozen=True, eq=False)
class Estimates:
    """K values of one group, in 0..1 and NaN where undefined."""

    values: np.ndarray  # float64 [K]
    errors: np.ndarray  # float64 [patients, K], contributions to the sampling error
    freedom: np.ndarray  # float64 [K], degrees of freedom of the variance
    images: np.ndarray  # float64 [K], of the denominator of a share; NaN for AUROC and means
    own: np.ndarray  # float64 [K, 2], 95% intervals of the values
    #: A mean of values of which one has an unknown variance: it has one patient, or all patients agree.
    is_guessed: bool = field(default=False, kw_only=True)

    def mean(self, columns: np.ndarray) -> Estimates:
        """Average columns bool [K] into one; NaN if one of them is NaN. Freedom is Satterthwaite's (1946)."""
        if not columns.any():
            return Estimates(*(np.full(shape, np.nan) for shape in (1, (len(self.errors), 1), 1, 1, (1, 2))))
        errors, variances = self.errors[:, columns], (self.errors[:, columns] ** 2).sum(axis=0)
        total = variances.sum(keepdims=True)
        known = np.where(self.freedom[columns] > 0.0, self.freedom[columns], 1e9)  # 1e9: assumed, not estimated
        freedom = divide_or_nan(total**2, (variances**2 / known).sum(keepdims=True))
        lowest = known.min(keepdims=True)  # if no patient deviates
        own = None
        if self.freedom[columns].max() > 0.0 and not np.isnan(total).any():
            own = mean_interval(self.values[columns], self.own[columns], errors.T, np.ones(columns.sum()))
        return Estimates(
            self.values[columns].mean(keepdims=True),
            errors.mean(axis=1, keepdims=True),
            np.where(np.isnan(freedom), lowest, freedom),
            np.full(1, np.nan),
            np.array([own or (np.nan, np.nan)]),
            is_guessed=bool(((variances < 1e-20) | (self.freedom[columns] < 1.0)).any()),
        )

    def interval(self, k: int) -> tuple[float, float] | None:
        """Return the 95% interval of value k; None if fewer than two patients define the value."""
        if not self.freedom[k] > 0.0 or np.isnan(self.own[k]).any():
            return None
        return float(self.own[k, 0]), float(self.own[k, 1])

    def limits(self, k: int, miss_rate: float) -> tuple[float, float] | None:
        """Compute the limits of value k for differences; None if fewer than two patients define the value."""
        value, variance, freedom = float(self.values[k]), float((self.errors[:, k] ** 2).sum()), float(self.freedom[k])
        if np.isnan(value) or np.isnan(variance) or not freedom > 0.0:
            return None
        stretch = float(stdtrit(freedom, 1.0 - miss_rate / 2.0) / ndtri(0.975)) ** 2
        deviates = variance >= 1e-20 and 0.0 < value < 1.0
        if not np.isnan(self.images[k]):
            found = freedom + 1.0  # no patient deviates: as many images as patients
            if deviates:
                found = min(self.images[k], value * (1.0 - value) / variance)
            return wilson_interval(value, found / stretch)
        spread = logit_interval(value, variance * stretch) if deviates else None
        if spread is not None and not self.is_guessed:
            return spread
        # The variance is too small, and the value's own interval covers that.
        low, high = (float(limit) for limit in self.own[k])
        if math.isnan(low):
            return spread
        return (low, high) if spread is None else (min(low, spread[0]), max(high, spread[1]))

    def difference_interval(self, other: Estimates, k: int, miss_rate: float = 0.05) -> tuple[float, float] | None:
        """Compute the interval of value k minus that of another group; None if one of them has no interval."""
        first, second = self.limits(k, miss_rate), other.limits(k, miss_rate)
        if first is None or second is None:
            return None
        a, b = float(self.values[k]), float(other.values[k])
        u, w = self.errors[:, k], other.errors[:, k]
        scale = math.sqrt(float(u @ u) * float(w @ w))
        correlation = float(u @ w) / scale if scale > 0.0 else 0.0
        below = _combine(a - first[0], second[1] - b, correlation)
        above = _combine(first[1] - a, b - second[0], correlation)
        return a - b - below, a - b + above


def estimate_aurocs(labels: np.ndarray, scores: np.ndarray, codes: np.ndarray, n_patients: int) -> Estimates:
    """Estimate the AUROC of each column; labels [n, F] below 0 are left out."""
    count = labels.shape[1]
    values, freedom = np.full(count, np.nan), np.zeros(count)
    errors, own = np.full((n_patients, count), np.nan), np.full((count, 2), np.nan)
    for j in range(count):
        members = [np.flatnonzero(labels[:, j] == label) for label in (1, 0)]
        # A class of one image has it twice: that changes no rank.
        members = [np.repeat(rows, 2) if len(rows) == 1 else rows for rows in members]
        y = np.repeat([True, False], [len(rows) for rows in members])
        components = compute_components(y, scores[np.concatenate(members), j])
        if components is None:
            continue
        values[j] = components[0].mean()
        errors[:, j], sizes = 0.0, []
        for component, rows in zip(components, members, strict=True):
            sums, size = sum_deviations(component - values[j], codes[rows], n_patients)
            errors[:, j] += sums * math.sqrt(size / (size - 1)) if size > 1 else 0.0
            errors[codes[rows[0]], j] += ONE_RANK if size == 1 else 0.0
            sizes.append(size)
        freedom[j] = min(sizes) - 1
        variance = float((errors[:, j] ** 2).sum()) if freedom[j] else 0.0
        own[j] = limited_auroc_interval(float(values[j]), variance, *sizes)
    return Estimates(values, errors, freedom, np.full(count, np.nan), own)


def estimate_shares(parts: np.ndarray, wholes: np.ndarray) -> Estimates:
    """Estimate the shares sum(parts) / sum(wholes) from counts of images per patient [patients, K]."""
    images, units = wholes.sum(axis=0), (wholes > 0).sum(axis=0)
    values = divide_or_nan(parts.sum(axis=0), images)
    deviations = (parts - values * wholes) * np.sqrt(divide_or_nan(units, units - 1))
    errors = divide_or_nan(deviations, np.broadcast_to(images, parts.shape))
    errors = np.where(units == 1, ONE_SHARE * (wholes > 0), errors)
    own = [share_interval(*pair) if pair[1].any() else (np.nan, np.nan) for pair in zip(parts.T, wholes.T, strict=True)]
    return Estimates(values, errors, units - 1.0, images, np.array(own).reshape(-1, 2))


def sum_per_patient(values: np.ndarray, codes: np.ndarray, n_patients: int) -> np.ndarray:
    """Sum bool [n, K] over each patient's images, float64 [patients, K]."""
    width = values.shape[1]
    rows, columns = np.nonzero(values)
    flat = np.bincount(codes[rows] * width + columns, minlength=n_patients * width)
    return flat.reshape(n_patients, width).astype(np.float64)


def _combine(mine: float, others: float, correlation: float) -> float:
    """Combine the distances of two estimates from their limits into that of their difference."""
    return math.sqrt(max(0.0, mine**2 - 2.0 * correlation * mine * others + others**2))
