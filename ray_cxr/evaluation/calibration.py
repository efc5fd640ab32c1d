"""From raw outputs to probabilities (Platt or temperature scaling) and to flags (operating points).

Both are fitted per finding on validation images. The flag rule is: raw probability >= threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from ray_cxr.errors import ConfigError
from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.intervals import patient_codes

#: Probabilities are kept this far from 0 and 1 before the logit; float32 cannot resolve more near 1.
EPSILON = 1e-7
METHODS = ("platt", "temperature")
#: The operating points that are told beside the chosen one.
ALTERNATIVES = ("youden", "sensitivity=0.9", "specificity=0.9")
#: Standard errors on either side of a 95% interval.
_REACH = NormalDist().inv_cdf(0.975)
_RIDGE = 1e-6
_STEPS = 100


@dataclass(frozen=True)
class Calibration:
    """calibrated = sigmoid(slope * logit(p) + intercept), slope > 0, so that order is kept.

    Attributes:
        slope: for temperature scaling 1 / T.
        intercept: 0 for temperature scaling.
        method: `platt` or `temperature`.
    """

    slope: float
    intercept: float
    method: str = "platt"

    def as_dict(self) -> dict[str, Any]:
        """The form in which a bundle keeps it."""
        return {"method": self.method, "slope": self.slope, "intercept": self.intercept}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Calibration:
        """The inverse of `as_dict`.

        Raises:
            ConfigError: another method, a slope or intercept that is no such number, or a temperature with an
                intercept.
        """
        try:
            slope, intercept = float(value["slope"]), float(value["intercept"])
        except (KeyError, TypeError, ValueError):
            raise ConfigError("calibration: needs a slope and an intercept") from None
        method = value.get("method")
        if method not in METHODS or not (math.isfinite(slope) and math.isfinite(intercept) and slope > 0):
            raise ConfigError(
                f"calibration: needs the method 'platt' or 'temperature' and a slope > 0 (got {dict(value)!r})"
            )
        if method == "temperature" and intercept != 0.0:
            raise ConfigError(f"calibration: temperature has the intercept 0 (got {dict(value)!r})")
        return cls(slope, intercept, method)


@dataclass(frozen=True)
class FittedRules:
    """What labelled images say about reading raw probabilities; every mapping has every finding as a key.

    Attributes:
        calibrations: `Calibration.as_dict()`, or None.
        operating_points: `operating_point(...)` by the chosen rule, or None.
        expected_flag_rates: the share of the images that the operating point flags, or None.
        alternatives: the operating points by each of `ALTERNATIVES` that is not the chosen rule, or None.
        reasons: why there is no calibration or no operating point, in words; None where there are both.
    """

    calibrations: dict[str, dict[str, Any] | None]
    operating_points: dict[str, dict[str, Any] | None]
    expected_flag_rates: dict[str, float | None]
    alternatives: dict[str, dict[str, dict[str, Any] | None]]
    reasons: dict[str, str | None]


@dataclass(frozen=True)
class ReliabilityBin:
    """The images whose probability lies in low <= p < high; 1 belongs to the last bin.

    Attributes:
        low, high: the bin.
        n: how many images.
        predicted: their mean probability, or None without images.
        observed: the share of positives among them, or None without images.
        observed_low, observed_high: its 95% interval, or None without images.
    """

    low: float
    high: float
    n: int
    predicted: float | None
    observed: float | None
    observed_low: float | None
    observed_high: float | None


def fit_rules(
    labels: pd.DataFrame | np.ndarray,
    probabilities: np.ndarray,
    findings: Sequence[str],
    *,
    method: str = "platt",
    rule: str = "youden",
    min_positives: int = 5,
) -> FittedRules:
    """Calibration and operating points per finding, each on the images that are labelled for it.

    Args:
        labels: a table with a column per finding, 0, 1 or null; or an array [N,F] of 0, 1 and NaN or -1 for null.
        probabilities: float32 [N,F], raw.
        findings: names of the columns, in the order of `probabilities`.
        method: of calibration, `platt` or `temperature`.
        rule: of the operating point; see `operating_point`.
        min_positives: the least number of positives, and of negatives, to fit anything from.

    Raises:
        ConfigError: another method or rule.
        ValueError: shapes differ, a label is not 0, 1 or null, or a probability is not a number in 0..1.
    """
    if method not in METHODS:
        raise ConfigError(f"calibration {method!r}: use {' or '.join(METHODS)}")
    chosen = _rule(rule)
    others = [name for name in ALTERNATIVES if _rule(name) != chosen]
    if isinstance(labels, pd.DataFrame):
        y = labels[list(findings)].to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        y = np.asarray(labels, dtype=np.float64)
    p = np.asarray(probabilities)
    if p.ndim != 2 or y.shape != p.shape or p.shape[1] != len(findings):
        raise ValueError(f"labels are {y.shape}, probabilities {p.shape}, for {len(findings)} findings")
    fitted = FittedRules({}, {}, {}, {}, {})
    for j, name in enumerate(findings):
        known = ~(np.isnan(y[:, j]) | (y[:, j] == -1))
        one, scores = y[known, j], p[known, j]
        scaling = _fit(one, scores, min_positives, method)
        point = _operating_point(one, scores, rule, min_positives)
        fitted.calibrations[name] = None if isinstance(scaling, str) else scaling.as_dict()
        fitted.operating_points[name] = None if isinstance(point, str) else point
        fitted.expected_flag_rates[name] = None if isinstance(point, str) else point["flag_rate"]
        fitted.alternatives[name] = {
            other: operating_point(one, scores, other, min_positives=min_positives) for other in others
        }
        fitted.reasons[name] = _reason(scaling, point)
    return fitted


def _reason(scaling: Calibration | str, point: dict[str, Any] | str) -> str | None:
    if isinstance(scaling, str) and scaling == point:
        return scaling
    parts = []
    if isinstance(scaling, str):
        parts.append(f"no calibration: {scaling}")
    if isinstance(point, str):
        parts.append(f"no operating point: {point}")
    return "; ".join(parts) or None


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
    fitted = _fit(y, p, min_positives, "platt")
    return None if isinstance(fitted, str) else fitted


def fit_temperature(y: np.ndarray, p: np.ndarray, min_positives: int = 5) -> Calibration | None:
    """Fit the slope 1 / T alone on logit(p), the intercept being 0 (Guo et al. 2017), with Platt's targets.

    It makes probabilities bolder or more timid; p = 0.5 stays where it is. A network whose loss weighted positives
    and negatives alike gives probabilities that are all too high for a rare finding, which only Platt's intercept
    can mend.

    Args, Returns, Raises: as `fit_platt`.
    """
    fitted = _fit(y, p, min_positives, "temperature")
    return None if isinstance(fitted, str) else fitted


def _fit(y: np.ndarray, p: np.ndarray, min_positives: int, method: str) -> Calibration | str:
    """The calibration, or in words why there is none."""
    y, p = metrics.checked(y, p)
    x = _logit(p)
    positives = int(y.sum())
    negatives = y.size - positives
    lacking = _too_few(positives, negatives, min_positives)
    if lacking is not None:
        return lacking
    if np.ptp(x) == 0.0:
        return "the scores are all alike"
    target = np.where(y, (positives + 1.0) / (positives + 2.0), 1.0 / (negatives + 2.0))
    if method == "temperature":
        scale = math.sqrt(float(np.mean(x**2)))
        slope, intercept = float(_newton((x / scale)[:, None], target, np.zeros(1), np.zeros(1))[0] / scale), 0.0
    else:
        # Centred and scaled, the two parameters are nearly independent and Newton's steps well conditioned.
        centre, scale = x.mean(), x.std()
        z = np.column_stack([(x - centre) / scale, np.ones_like(x)])
        prevalence = positives / y.size
        start = np.array([0.0, math.log(prevalence / (1.0 - prevalence))])
        beta = _newton(z, target, start, np.array([_RIDGE, 0.0]))
        slope, intercept = float(beta[0] / scale), float(beta[1] - beta[0] * centre / scale)
    if not slope > 0.0:
        return "the best slope is not positive"
    return Calibration(slope, intercept, method)


def _too_few(positives: int, negatives: int, least: int) -> str | None:
    """In words, what there is too little of to fit anything from."""
    if not positives and not negatives:
        return "no labelled images"
    least = max(least, 1)
    parts = [
        f"{count:,} {kind if count == 1 else kind + 's'}, needs {least:,}"
        for count, kind in ((positives, "positive"), (negatives, "negative"))
        if count < least
    ]
    return "; ".join(parts) or None


def _newton(z: np.ndarray, target: np.ndarray, beta: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    """The coefficients [k] of least cross-entropy for features z [n,k] and targets [n], from `beta` on."""
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
    return beta


def reliability(
    y: np.ndarray,
    p: np.ndarray,
    bins: int = 10,
    patients: np.ndarray | None = None,
    *,
    equal_counts: bool = False,
) -> tuple[ReliabilityBin, ...]:
    """The reliability curve: what share was positive where so much was predicted.

    Bins of equal width are those of `metrics.expected_calibration_error`, the mean of |predicted - observed| over
    them, weighted by n. Of a rare finding they put nearly all images into the first; bins of equal counts show more.

    The interval of the observed share is Wilson's (1927). Images of one patient are not independent, so with
    `patients` the number of images in it is replaced by as many independent ones as would give the variance seen
    between patients, never more than there are (Kish's design effect); where all images of a bin agree, and no
    variance is seen, by the number of its patients.

    Args:
        y: labels [n], 0 or 1.
        p: probabilities [n] in 0..1.
        bins: how many.
        patients: ids [n], see `patient_codes`; None takes all images as independent.
        equal_counts: bins that hold as many images each, as far as equal probabilities allow; fewer where they do not.

    Returns:
        All bins from 0 to 1, empty ones among them.

    Raises:
        ValueError: as `metrics.auroc`; a probability outside 0..1, or another number of patients.
    """
    y, p = metrics.checked(y, p)
    _check_range(p)
    codes = np.arange(y.size) if patients is None else patient_codes(patients)[0]
    if codes.size != y.size:
        raise ValueError(f"{y.size} labels and {codes.size} patients do not fit")
    if equal_counts:
        inner = np.unique(np.quantile(p, np.arange(1, bins) / bins)) if p.size else np.zeros(0)
        inner = inner[(inner > 0) & (inner < 1)]
        place = np.searchsorted(inner, p, side="right")
        edges = [0.0, *inner.tolist(), 1.0]
    else:
        place = metrics.probability_bins(p, bins)
        edges = [i / bins for i in range(bins + 1)]
    return tuple(
        _reliability_bin(*ends, *(column[place == i] for column in (y, p, codes)))
        for i, ends in enumerate(pairwise(edges))
    )


def _reliability_bin(lowest: float, highest: float, y: np.ndarray, p: np.ndarray, codes: np.ndarray) -> ReliabilityBin:
    if not y.size:
        return ReliabilityBin(lowest, highest, 0, None, None, None, None)
    observed = float(y.mean())
    apart = np.bincount(np.unique(codes, return_inverse=True)[1], weights=y - observed)
    spread = float((apart**2).sum()) / y.size**2
    independent = float(len(apart)) if spread == 0 else min(float(y.size), observed * (1 - observed) / spread)
    low, high = _wilson(observed, independent)
    return ReliabilityBin(lowest, highest, int(y.size), float(p.mean()), observed, low, high)


def _wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share seen in n independent images."""
    square = _REACH**2 / n
    centre = (share + square / 2) / (1 + square)
    reach = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def cross_fitted_error(
    labels: np.ndarray, p: np.ndarray, patients: np.ndarray, *, method: str = "platt", min_positives: int = 5
) -> float | None:
    """The mean over findings of the expected calibration error that is left after calibrating on other patients.

    Patients are halved; each half is calibrated by what the other half gives, or left as it is where that has too few
    positives. Fitted and measured on the same images the error would all but vanish.

    Args:
        labels: int8 [N,F], -1 where not labelled.
        p: raw probabilities [N,F].
        patients: ids [N].
        method: `platt` or `temperature`.
        min_positives: a half with fewer positives, or negatives, of a finding calibrates nothing.

    Returns:
        A number in 0..1; None where nothing is labelled.
    """
    half = patient_codes(patients)[0] % 2 == 0
    errors = []
    for j in range(labels.shape[1]):
        known = labels[:, j] >= 0
        y, q = labels[known, j], p[known, j].astype(np.float64)
        calibrated = q.copy()
        for part in (half[known], ~half[known]):
            rule = _fit(y[~part], q[~part], min_positives, method)
            if isinstance(rule, Calibration):
                calibrated[part] = apply(rule, q[part])
        error = metrics.expected_calibration_error(y, calibrated)
        if error is not None:
            errors.append(error)
    return float(np.mean(errors)) if errors else None


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
    found = _operating_point(y, p, rule, min_positives)
    return None if isinstance(found, str) else found


def _operating_point(y: np.ndarray, p: np.ndarray, rule: str, min_positives: int) -> dict[str, Any] | str:
    """The operating point, or in words why there is none."""
    name, target = _rule(rule)
    y, p64 = metrics.checked(y, np.asarray(p, dtype=np.float32))
    _check_range(p64)
    positives = int(y.sum())
    negatives = y.size - positives
    lacking = _too_few(positives, negatives, min_positives)
    if lacking is not None:
        return lacking
    curve = metrics.roc_curve(y, p64)
    assert curve is not None
    # Point k flags the k highest distinct scores. Whole numbers, so that a target of 0.9 means 9 of 10.
    true = np.rint(curve.y * positives).astype(np.int64)
    false = np.rint(curve.x * negatives).astype(np.int64)
    if name == "youden":
        gain = true * negatives - false * positives
        best = int(gain.max())
        if best <= 0:
            return "no threshold is better than chance"
        k = int(np.flatnonzero(gain == best)[-1])
    elif name == "sensitivity":
        k = int(np.flatnonzero(true >= math.ceil(target * positives - 1e-9))[0])
    else:
        k = int(np.flatnonzero(negatives - false >= math.ceil(target * negatives - 1e-9))[-1])
    threshold = _between(curve.thresholds, k)
    if threshold == math.inf:
        return f"only flagging nothing reaches {rule.strip()}"
    if not 0.0 < threshold < 1.0:
        return "scores saturated at 0 or 1 leave no room for a threshold"
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
        return name, 0.0
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
