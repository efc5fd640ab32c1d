"""From raw outputs to probabilities (Platt scaling) and to flags (operating points).

Both are fitted per finding on validation images. The flag rule is: raw probability >= threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.errors import ConfigError
from ray_cxr.evaluation import metrics

#: Probabilities are kept this far from 0 and 1 before the logit; float32 cannot resolve more near 1.
EPSILON = 1e-7
_RIDGE = 1e-6
_STEPS = 100


@dataclass(frozen=True)
class Calibration:
    """Platt scaling: calibrated = sigmoid(slope * logit(p) + intercept), slope > 0, so that order is kept."""

    slope: float
    intercept: float

    def as_dict(self) -> dict[str, Any]:
        """The form in which a bundle keeps it."""
        return {"method": "platt", "slope": self.slope, "intercept": self.intercept}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Calibration:
        """The inverse of `as_dict`.

        Raises:
            ConfigError: another method, or a slope or intercept that is no such number.
        """
        try:
            slope, intercept = float(value["slope"]), float(value["intercept"])
        except (KeyError, TypeError, ValueError):
            raise ConfigError("calibration: needs a slope and an intercept") from None
        if value.get("method") != "platt" or not (math.isfinite(slope) and math.isfinite(intercept) and slope > 0):
            raise ConfigError(f"calibration: needs the method 'platt' and a slope > 0 (got {dict(value)!r})")
        return cls(slope, intercept)


def fit_platt(y: np.ndarray, p: np.ndarray, min_positives: int = 5) -> Calibration | None:
    """Fit slope and intercept on logit(p) by Newton's method, with Platt's smoothed targets (Platt 1999).

    The targets (P + 1) / (P + 2) and 1 / (N + 2) in place of 1 and 0 keep the slope finite on separable data.

    Args:
        y: labels [n], 0 or 1.
        p: raw probabilities [n] in 0..1.
        min_positives: the least number of positives, and of negatives, to fit from.

    Returns:
        None with too few positives or negatives, with scores all alike, or where the best slope is not
        positive: a finding whose order would be turned round must not be calibrated.

    Raises:
        ValueError: as `metrics.auroc`, or a probability outside 0..1.
    """
    y, p = metrics.checked(y, p)
    x = _logit(p)
    positives = int(y.sum())
    negatives = y.size - positives
    if min(positives, negatives) < max(min_positives, 1) or np.ptp(x) == 0.0:
        return None
    target = np.where(y, (positives + 1.0) / (positives + 2.0), 1.0 / (negatives + 2.0))
    # Centred and scaled, the two parameters are nearly independent and Newton's steps well conditioned.
    centre, scale = x.mean(), x.std()
    z = np.column_stack([(x - centre) / scale, np.ones_like(x)])
    prevalence = positives / y.size
    beta = np.array([0.0, math.log(prevalence / (1.0 - prevalence))])
    ridge = np.array([_RIDGE, 0.0])
    loss = _cross_entropy(z, target, beta, ridge)
    for _ in range(_STEPS):
        q = _expit(z @ beta)
        gradient = z.T @ (q - target) + ridge * beta
        hessian = (z * (q * (1.0 - q))[:, None]).T @ z + np.diag(ridge + 1e-12)
        step = np.linalg.solve(hessian, gradient)
        # Halving guards against the overshoot of a full step far from the optimum; the loss is convex.
        for _ in range(40):
            new = _cross_entropy(z, target, beta - step, ridge)
            if new <= loss:
                break
            step = step / 2.0
        else:
            break
        beta, loss = beta - step, new
        if np.abs(step).max() < 1e-10:
            break
    slope = float(beta[0] / scale)
    if not slope > 0.0:
        return None
    return Calibration(slope, float(beta[1] - beta[0] * centre / scale))


def apply(calibration: Calibration | Mapping[str, Any], p: np.ndarray) -> np.ndarray:
    """Calibrated probabilities float32, in the shape of p; NaN stays NaN.

    Args:
        calibration: a `Calibration`, or the form in which a bundle keeps it.
        p: raw probabilities in 0..1, any shape.

    Raises:
        ConfigError: as `Calibration.from_dict`.
        ValueError: a probability outside 0..1.
    """
    if not isinstance(calibration, Calibration):
        calibration = Calibration.from_dict(calibration)
    return _expit(calibration.slope * _logit(p) + calibration.intercept).astype(np.float32)


def flags(p: np.ndarray, threshold: float) -> np.ndarray:
    """The flag rule: bool, True where the raw probability is at or above the threshold."""
    return np.asarray(p, dtype=np.float64) >= threshold


def operating_point(
    y: np.ndarray, p: np.ndarray, rule: str = "youden", min_positives: int = 1
) -> dict[str, Any] | None:
    """The threshold that a rule picks on these images, and what it gives on them.

    Rules: `youden` maximises sensitivity + specificity - 1 (Youden 1950; of equals, the more sensitive);
    `sensitivity=0.9` is the highest threshold that keeps that sensitivity; `specificity=0.9` the lowest that
    keeps that specificity.

    The threshold lies strictly inside 0..1, midway between two neighbouring scores, and is itself a float32:
    comparing it in float32 or in float64 gives the same flags, and a score that differs in its last bits
    falls on the same side.

    Args:
        y: labels [n], 0 or 1.
        p: raw probabilities [n]; taken as float32, as the score table holds them.
        rule: see above.
        min_positives: None with fewer positives, or fewer negatives, than this.

    Returns:
        threshold, sensitivity, specificity, flag_rate (floats), rule (str), n and positives (ints); or None
        where there is no such threshold: a class is absent or too small, `youden` finds nothing better than
        chance, only flagging nothing reaches the specificity, or scores saturated at 0 or 1 leave no room.

    Raises:
        ConfigError: a rule that is none of the three, or a target outside 0..1.
        ValueError: as `fit_platt`.
    """
    name, target = _rule(rule)
    y, p64 = metrics.checked(y, np.asarray(p, dtype=np.float32))
    _check_range(p64)
    positives = int(y.sum())
    negatives = y.size - positives
    if min(positives, negatives) < max(min_positives, 1):
        return None
    curve = metrics.roc_curve(y, p64)
    assert curve is not None
    # Point k flags the k highest distinct scores. Whole numbers, so that a target of 0.9 means 9 of 10.
    true = np.rint(curve.y * positives).astype(np.int64)
    false = np.rint(curve.x * negatives).astype(np.int64)
    if name == "youden":
        gain = true * negatives - false * positives
        best = int(gain.max())
        if best <= 0:
            return None
        k = int(np.flatnonzero(gain == best)[-1])
    elif name == "sensitivity":
        k = int(np.flatnonzero(true >= math.ceil(target * positives - 1e-9))[0])
    else:
        k = int(np.flatnonzero(negatives - false >= math.ceil(target * negatives - 1e-9))[-1])
    threshold = _between(curve.thresholds, k)
    if not 0.0 < threshold < 1.0:
        return None
    return {
        "threshold": threshold,
        "rule": rule.strip(),
        "sensitivity": float(true[k] / positives),
        "specificity": float((negatives - false[k]) / negatives),
        "flag_rate": float((true[k] + false[k]) / y.size),
        "n": int(y.size),
        "positives": positives,
    }


def _between(descending: np.ndarray, k: int) -> float:
    """A float32 threshold that flags exactly the k highest distinct scores; `descending[0]` is infinity."""
    if k == 0:
        return math.inf
    lowest_flagged = np.float32(descending[k])
    highest_unflagged = np.float32(0.0) if k == len(descending) - 1 else np.float32(descending[k + 1])
    middle = np.float32((float(lowest_flagged) + float(highest_unflagged)) / 2.0)
    # Between two neighbouring float32 there is no third: then the flagged score itself is the threshold.
    return float(middle if middle > highest_unflagged else lowest_flagged)


def _rule(rule: str) -> tuple[str, float]:
    name, equals, text = rule.strip().partition("=")
    if name == "youden" and not equals:
        return name, math.nan
    try:
        target = float(text)
    except ValueError:
        target = math.nan
    if name not in ("sensitivity", "specificity") or not 0.0 < target <= 1.0:
        raise ConfigError(
            f"operating point {rule!r}: use youden, sensitivity=X or specificity=X; X is above 0, at most 1"
        )
    return name, target


def _check_range(p: np.ndarray) -> None:
    if ((p < 0.0) | (p > 1.0)).any():
        raise ValueError("probabilities must lie in 0..1")


def _logit(p: np.ndarray) -> np.ndarray:
    p = np.asarray(p, dtype=np.float64)
    _check_range(p)
    p = np.clip(p, EPSILON, 1.0 - EPSILON)
    return np.log(p) - np.log1p(-p)


def _expit(x: np.ndarray) -> np.ndarray:
    # tanh saturates where exp would overflow.
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x)))


def _cross_entropy(z: np.ndarray, target: np.ndarray, beta: np.ndarray, ridge: np.ndarray) -> float:
    x = z @ beta
    return float(np.sum(np.logaddexp(0.0, x) - target * x) + 0.5 * np.sum(ridge * beta**2))
