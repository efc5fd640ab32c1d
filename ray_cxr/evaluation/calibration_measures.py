"""Calibration of probabilities: intercept, slope and integrated calibration index.

- Intercept, or calibration in the large: a of logit(share) = a + logit(p). Above 0, probabilities are too low on
  average.
- Slope: b of logit(share) = a + b logit(p) (Cox 1958). Below 1, probabilities are too extreme: too high above the
  average and too low below it. See Van Calster et al. 2019 for both.
- ICI: mean distance of p and a smooth curve of the observed share, after Austin & Steyerberg 2019; E50 and E90 are the
  median and the 90th percentile of this distance. The curve is a local line in p with tricube weights over the nearest
  75% of the images, as in loess (Cleveland 1979) without its robust steps, on `_GROUPS` groups with equal numbers of
  images. Austin & Steyerberg use R's `loess` on single images, by default a local parabola with the same span, so their
  numbers differ a little. Both curves reproduce perfect calibration, which is a line.

ICI averages absolute values, so noise makes it too high in small samples. `ici_if_calibrated` is its mean over labels
that are drawn from the probabilities, independently for each image: only an ICI well above it shows miscalibration.
ICI has no interval: in simulations of a calibrated model, whose ICI is 0, bootstrap percentiles never covered 0, and
excluded the estimate itself in up to one of ten data sets; basic intervals covered 0 in 78 to 86%, with 10 to 1,000
positives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, logit, ndtri

from ray_cxr.evaluation import calibration, metrics
from ray_cxr.evaluation.intervals import Estimate, patient_codes

_GROUPS = 100
_SPAN = 0.75
#: Sets of labels that are drawn from the probabilities.
_DRAWS = 200
#: With fewer patients the clustered variance is too small, with one patient 0.
MIN_PATIENTS = 20


@dataclass(frozen=True)
class CalibrationMeasures:
    """Measures of one finding."""

    n: int
    positives: int
    intercept: Estimate
    slope: Estimate
    ici: float
    ici_if_calibrated: float
    e50: float
    e90: float

    def to_json(self) -> dict[str, Any]:
        plain = {"n": self.n, "positives": self.positives}
        for name in ("intercept", "slope"):
            plain |= getattr(self, name).to_json(name)
        return plain | {name: getattr(self, name) for name in ("ici", "ici_if_calibrated", "e50", "e90")}


def measure_calibration(
    labels: np.ndarray, calibrated: np.ndarray, patients: np.ndarray, *, seed: int
) -> tuple[CalibrationMeasures | None, ...]:
    """Measure each column of labels [n, F] (negative if not labelled) and probabilities [n, F] (NaN if missing).

    A column without labelled probabilities is None. Intervals of intercept and slope use the larger of two variances:
    with patients as clusters (the sandwich), and with independent images. In tests/simulations/decisions.py they cover
    the truth in 93 to 97% of data sets with 5 positives or more. The first variance alone covered it in 82% in a
    similar simulation with 5 positives. Below `MIN_PATIENTS` patients there is no interval.
    """
    codes, _ = patient_codes(patients)
    rng = np.random.default_rng(seed)
    found: list[CalibrationMeasures | None] = []
    for f in range(labels.shape[1]):
        known = (labels[:, f] >= 0) & ~np.isnan(calibrated[:, f])
        y, p = metrics.check_scores(labels[known, f], calibrated[known, f])
        metrics.check_probabilities(p)
        found.append(_measure_column(y, p, codes[known], rng) if y.size else None)
    return tuple(found)


def _measure_column(y: np.ndarray, p: np.ndarray, codes: np.ndarray, rng: np.random.Generator) -> CalibrationMeasures:
    group = metrics.rank_bins(p, _GROUPS)
    n = np.bincount(group).astype(np.float64)
    smoother = _Smoother.build(np.bincount(group, weights=p) / n, n)
    errors = smoother.compute_errors(n, np.bincount(group, weights=y))
    ideal = rng.binomial(n.astype(np.int64), np.clip(smoother.p, 0.0, 1.0), (_DRAWS, n.size))
    e50, e90 = np.quantile(errors[group], [0.5, 0.9])
    return CalibrationMeasures(
        int(y.size),
        int(y.sum()),
        *fit_line(y, p, codes),
        ici=float(errors[group].mean()),
        ici_if_calibrated=float((smoother.compute_errors(n, ideal) @ n / n.sum()).mean()),
        e50=float(e50),
        e90=float(e90),
    )


@dataclass(frozen=True, eq=False)
class _Smoother:
    """Local lines through the shares of positives in groups of images."""

    p: np.ndarray  # float64 [k], mean probability of each group, ascending
    kernel: np.ndarray  # float64 [k, k], weight of an image of the column's group in the line at the row's group
    distance: np.ndarray  # float64 [k, k], p of the column's group minus p of the row's group

    @classmethod
    def build(cls, p: np.ndarray, images: np.ndarray) -> _Smoother:
        distance = p - p[:, None]
        order = np.argsort(np.abs(distance), axis=1, kind="stable")
        reached = np.cumsum(images[order], axis=1) >= _SPAN * images.sum()
        nearest = np.take_along_axis(np.abs(distance), order, axis=1)
        width = np.maximum(np.take_along_axis(nearest, reached.argmax(axis=1)[:, None], axis=1), 1e-12)
        return cls(p, (1 - np.minimum(np.abs(distance) / width, 1.0) ** 3) ** 3, distance)

    def compute_errors(self, images: np.ndarray, positives: np.ndarray) -> np.ndarray:
        """Return |p - curve| of each group [..., k] from numbers of images [k] and of positives [..., k]."""
        k0, k1, k2 = (self.kernel * self.distance**power for power in range(3))
        s0, s1, s2, t0, t1 = images @ k0.T, images @ k1.T, images @ k2.T, positives @ k0.T, positives @ k1.T
        determinant = s0 * s2 - s1**2
        is_line = determinant > 1e-9 * s0 * s2  # else all weight is on one probability
        height = np.where(is_line, s2 * t0 - s1 * t1, t0)
        curve = height / np.where(is_line, determinant, s0)
        return np.asarray(np.abs(self.p - np.clip(curve, 0.0, 1.0)))


def fit_line(y: np.ndarray, p: np.ndarray, codes: np.ndarray) -> tuple[Estimate, Estimate]:
    """Fit intercept (with slope 1) and slope of labels bool [n] on logit(p [n]); `codes` [n] number the patients."""
    reason = metrics.undefined_reason(y)
    if reason is not None:
        return Estimate(None, reason=reason), Estimate(None, reason=reason)
    x = logit(np.clip(p, calibration.EPSILON, 1 - calibration.EPSILON))
    ones, zero = np.ones((x.size, 1)), np.zeros(1)
    intercept = _estimate(ones, y, codes, x, calibration.fit_logistic(ones, y, zero, zero, offset=x))
    if np.ptp(x) == 0.0:
        return intercept, Estimate(None, reason="all probabilities are equal")
    if x[y].min() >= x[~y].max() or x[y].max() <= x[~y].min():
        return intercept, Estimate(None, reason="the probabilities separate the classes, so no finite slope fits")
    scale = x.std()
    z = np.column_stack([(x - x.mean()) / scale, ones])
    start = np.array([scale, logit(y.mean())])
    fitted = _estimate(z, y, codes, np.zeros_like(x), calibration.fit_logistic(z, y, start, np.zeros(2)))
    value, low, high = (end if end is None else end / float(scale) for end in (fitted.value, fitted.low, fitted.high))
    return intercept, Estimate(value, low, high, fitted.reason)


def _estimate(z: np.ndarray, y: np.ndarray, codes: np.ndarray, offset: np.ndarray, beta: np.ndarray) -> Estimate:
    """Return the first coefficient [k] of features z [n, k] with its interval."""
    value, patients = float(beta[0]), len(np.unique(codes))
    if patients < MIN_PATIENTS:
        return Estimate(value, reason=f"fewer than {MIN_PATIENTS} patients")
    q = expit(z @ beta + offset)
    independent = np.linalg.inv((z * (q * (1 - q))[:, None]).T @ z)
    scores = np.column_stack([np.bincount(codes, weights=column) for column in (z * (y - q)[:, None]).T])
    clustered = independent @ scores.T @ scores @ independent * (patients / (patients - 1))
    reach = ndtri(0.975) * np.sqrt(max(independent[0, 0], clustered[0, 0]))
    return Estimate(value, float(value - reach), float(value + reach))
