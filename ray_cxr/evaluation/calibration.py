"""Turn raw outputs into probabilities (Platt or temperature scaling) and into flags (operating points).

Both are fitted per finding on validation images. An image is flagged if its raw probability is >= the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np
from scipy.special import expit, logit

from ray_cxr.config import DEFAULT_RULE, normalize_rule
from ray_cxr.errors import ConfigError
from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.clustered import clustered_share_interval
from ray_cxr.evaluation.intervals import patient_codes
from ray_cxr.labels import NO_FINDING

#: Probabilities are clipped to this distance from 0 and 1 before the logit; float32 has no finer resolution near 1.
EPSILON = 1e-7
#: Rules whose operating points are reported next to the chosen operating point.
ALTERNATIVES = (DEFAULT_RULE, "youden", "sensitivity=0.9", "specificity=0.9", "flag_rate=0.1", "npv=0.99")
_RIDGE = 1e-6
#: Why a finding has no operating point: its flags would be no better than chance, or point away from it.
_INVERTED = "scores are not higher with the finding (AUROC of 0.5 or less)"


@dataclass(frozen=True)
class Calibration:
    """calibrated = sigmoid(slope * logit(p) + intercept); slope > 0 keeps the order of images.

    For temperature scaling the slope is 1 / T and the intercept 0.
    """

    slope: float
    intercept: float
    method: str = "platt"

    def as_dict(self) -> dict[str, Any]:
        """Return the form stored in a bundle."""
        return {"method": self.method, "slope": self.slope, "intercept": self.intercept}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Calibration:
        """Read the form that `as_dict` returns; raise ConfigError if it is invalid."""
        try:
            slope, intercept, method = float(value["slope"]), float(value["intercept"]), value["method"]
        except (KeyError, TypeError, ValueError):
            raise ConfigError("calibration: needs a method, a slope and an intercept") from None
        is_valid = method == "platt" or (method == "temperature" and intercept == 0.0)
        if not (is_valid and 0.0 < slope < math.inf and math.isfinite(intercept)):
            raise ConfigError(
                "calibration: needs the method 'platt' or 'temperature', a slope > 0, and for 'temperature' the "
                f"intercept 0 (got {dict(value)!r})"
            )
        return cls(slope, intercept, method)


class OperatingPoint(TypedDict):
    """A threshold, and its rates on the images that it was chosen from, as stored in a bundle."""

    threshold: float
    rule: str
    sensitivity: float
    specificity: float
    flag_rate: float
    n: int
    positives: int


@dataclass(frozen=True)
class FittedRules:
    """Entries of bundle.json: each mapping has all findings as keys, and None where a value is missing."""

    calibration: dict[str, dict[str, Any] | None]  # in the form of `Calibration.as_dict`
    operating_points: dict[str, OperatingPoint | None]
    expected_flag_rates: dict[str, float | None]  # share of the images that the operating point flags
    operating_alternatives: dict[str, dict[str, OperatingPoint | None]]  # by each other rule of `ALTERNATIVES`
    rule_notes: dict[str, str | None]  # why calibration or operating point is missing


@dataclass(frozen=True)
class ReliabilityBin:
    """The images with low <= probability < high; the last bin includes 1.

    Mean probability (`predicted`), share of positives (`observed`) and its 95% interval are None without images.
    """

    low: float
    high: float
    n: int
    predicted: float | None
    observed: float | None
    observed_low: float | None
    observed_high: float | None


def fit_rules(
    labels: np.ndarray,
    probabilities: np.ndarray,
    findings: Sequence[str],
    *,
    method: str = "platt",
    rule: str = DEFAULT_RULE,
    min_positives: int = 5,
) -> FittedRules:
    """Fit calibration and operating point per finding, each on the images labelled for it.

    `any_flag_rate=X` also counts the flags of images that are not labelled.

    Args:
        labels: [N,F], 1 or 0; NaN or negative if not labelled.
        probabilities: float32 [N,F], raw, columns in the order of `findings`.
        method, rule: see `fit_calibration` and `find_operating_points`.
        min_positives: minimum number of positives, and of negatives, to fit from.

    Raises:
        ConfigError: unknown rule.
    """
    rule, kind, target = _parse_rule(rule)
    others = [other for other in ALTERNATIVES if _parse_rule(other)[1:] != (kind, target)]
    if labels.shape != probabilities.shape or probabilities.shape[1:] != (len(findings),):
        raise ValueError(
            f"labels are {labels.shape}, probabilities {probabilities.shape}, for {len(findings)} findings"
        )
    known = [labels[:, j] >= 0 for j in range(len(findings))]
    scalings = [
        fit_calibration(labels[rows, j], probabilities[rows, j], method, min_positives) for j, rows in enumerate(known)
    ]
    slopes = np.array([1.0 if scaling is None else scaling.slope for scaling, _ in scalings])
    for j, rows in enumerate(known):
        if _is_inverted(labels[rows, j] == 1, probabilities[rows, j], min_positives):
            slopes[j] = 0.0
    points = {
        each: find_operating_points(labels, probabilities, findings, each, min_positives, slopes)
        for each in (rule, *others)
    }
    fitted = FittedRules({}, {}, {}, {}, {})
    for j, name in enumerate(findings):
        scaling, no_scaling = scalings[j]
        point, no_point = points[rule][j]
        fitted.calibration[name] = None if scaling is None else scaling.as_dict()
        fitted.operating_points[name] = point
        fitted.expected_flag_rates[name] = None if point is None else point["flag_rate"]
        fitted.operating_alternatives[name] = {other: points[other][j][0] for other in others}
        reasons = {"calibration": no_scaling, "operating point": no_point}
        parts = [f"no {missing}: {reason}" for missing, reason in reasons.items() if reason is not None]
        fitted.rule_notes[name] = no_point if no_point == no_scaling else "; ".join(parts)
    return fitted


def _is_inverted(y: np.ndarray, p: np.ndarray, min_positives: int) -> bool:
    """Return whether scores that differ rank positives no higher than negatives; False with too few of them."""
    if _explain_too_few(y, min_positives) is not None or np.ptp(p) == 0.0:
        return False
    value = metrics.auroc(y, p)
    return value is not None and value <= 0.5


def fit_calibration(
    y: np.ndarray, p: np.ndarray, method: str = "platt", min_positives: int = 5
) -> tuple[Calibration | None, str | None]:
    """Fit slope and intercept on logit(p) (Platt 1999), or with `temperature` only the slope 1 / T (Guo et al. 2017).

    Platt's targets (P + 1) / (P + 2) and 1 / (N + 2) instead of 1 and 0 keep the slope finite on separable data. A
    model whose loss gave both classes equal weight overestimates rare findings everywhere; only an intercept corrects
    that.

    Returns (calibration, None), or (None, reason) with too few positives or negatives, if all scores are equal, or if
    the best slope is not positive, which would reverse the order of images.
    """
    y, p = metrics.check_scores(y, p)
    x = _compute_logit(p)
    reason = _explain_too_few(y, min_positives)
    if reason is not None:
        return None, reason
    positives, negatives = int(y.sum()), int((~y).sum())
    if np.ptp(x) == 0.0:
        return None, "all scores are equal"
    target = np.where(y, (positives + 1.0) / (positives + 2.0), 1.0 / (negatives + 2.0))
    if method == "temperature":
        scale = math.sqrt(float(np.mean(x**2)))
        slope, intercept = float(fit_logistic((x / scale)[:, None], target, np.zeros(1), np.zeros(1))[0] / scale), 0.0
    else:
        # Centred and scaled, the two parameters are nearly independent and the problem is well conditioned.
        centre, scale = x.mean(), x.std()
        z = np.column_stack([(x - centre) / scale, np.ones_like(x)])
        beta = fit_logistic(z, target, np.array([0.0, logit(positives / y.size)]), np.array([_RIDGE, 0.0]))
        slope, intercept = float(beta[0] / scale), float(beta[1] - beta[0] * centre / scale)
    if not slope > 0.0:
        return None, "the best slope is not positive"
    return Calibration(slope, intercept, method), None


def _explain_too_few(y: np.ndarray, minimum: int) -> str | None:
    if not y.size:
        return "no labelled images"
    minimum = max(minimum, 1)
    parts = [
        f"{count:,} {kind if count == 1 else kind + 's'}, needs {minimum:,}"
        for count, kind in ((int(y.sum()), "positive"), (int((~y).sum()), "negative"))
        if count < minimum
    ]
    return "; ".join(parts) or None


def fit_logistic(
    z: np.ndarray, target: np.ndarray, start: np.ndarray, ridge: np.ndarray, offset: np.ndarray | float = 0.0
) -> np.ndarray:
    """Return coefficients [k] that minimise cross-entropy for features z [n,k], targets [n] and an L2 penalty [k].

    The offset [n] is added to the linear predictor.
    """
    from scipy.optimize import least_squares  # slow to import

    def gradient(beta: np.ndarray) -> np.ndarray:
        return np.asarray(z.T @ (expit(z @ beta + offset) - target) + ridge * beta)

    def hessian(beta: np.ndarray) -> np.ndarray:
        q = expit(z @ beta + offset)
        return np.asarray((z * (q * (1.0 - q))[:, None]).T @ z + np.diag(ridge + 1e-12))

    # The gradient's root rather than the loss' minimum: near it the loss is constant in float64, the gradient is not.
    return np.asarray(least_squares(gradient, start, jac=hessian, xtol=1e-13, ftol=None, gtol=None).x)


def reliability_curve(y: np.ndarray, p: np.ndarray, patients: np.ndarray, bins: int = 10) -> tuple[ReliabilityBin, ...]:
    """Compute the share of positives in `bins` classes of the predicted probability with equal numbers of images.

    Bins of equal width would put nearly all images of a rare finding into the first bin. The bins are those of
    `metrics.equal_mass_error` and cover 0 to 1. They are fewer if many probabilities are equal.

    The interval is Wilson's for an effective number of images, at most n; see `clustered.share_interval`.
    """
    y, p = metrics.check_scores(y, p)
    metrics.check_probabilities(p)
    codes = patient_codes(patients)[0]
    if codes.size != y.size:
        raise ValueError(f"{y.size} labels and {codes.size} patients do not fit")
    positions = metrics.rank_bins(p, bins)
    inner = [float(p[positions == i].min()) for i in range(1, positions.max(initial=0) + 1)]
    return tuple(
        _summarize_bin(*limits, *(column[positions == i] for column in (y, p, codes)))
        for i, limits in enumerate(pairwise([0.0, *inner, 1.0]))
    )


def _summarize_bin(lowest: float, highest: float, y: np.ndarray, p: np.ndarray, codes: np.ndarray) -> ReliabilityBin:
    if not y.size:
        return ReliabilityBin(lowest, highest, 0, None, None, None, None)
    low, high = clustered_share_interval(y, codes)
    return ReliabilityBin(lowest, highest, int(y.size), float(p.mean()), float(y.mean()), low, high)


def cross_fitted_error(
    labels: np.ndarray, p: np.ndarray, patients: np.ndarray, *, method: str = "platt", min_positives: int = 5
) -> float | None:
    """Compute the expected calibration error after calibration on other patients, averaged over findings.

    Patients are split in halves, and each half is calibrated with a fit on the other half. The error would nearly
    vanish if it were measured on the images of the fit. A finding is left out if one half has too few positives or
    negatives for a fit, or scores that no fit improves. Labels are int8 [N,F], -1 if not labelled; the result is None
    if no finding remains.
    """
    half = patient_codes(patients)[0] % 2 == 0
    errors = []
    for j in range(labels.shape[1]):
        known = labels[:, j] >= 0
        y, raw = labels[known, j], p[known, j].astype(np.float64)
        calibrated = np.full(raw.shape, np.nan)
        for part in (half[known], ~half[known]):
            rule, _ = fit_calibration(y[~part], raw[~part], method, min_positives)
            if rule is not None:
                calibrated[part] = apply_calibration(rule, raw[part])
        error = None if np.isnan(calibrated).any() else metrics.expected_calibration_error(y, calibrated)
        if error is not None:
            errors.append(error)
    return float(np.mean(errors)) if errors else None


def apply_calibration(calibration: Calibration | Mapping[str, Any], p: np.ndarray) -> np.ndarray:
    """Return calibrated probabilities, float32, in the shape of the raw probabilities p; NaN stays NaN.

    A mapping has the form stored in a bundle. Raises ConfigError if it is invalid.
    """
    if not isinstance(calibration, Calibration):
        calibration = Calibration.from_dict(calibration)
    return np.asarray(expit(calibration.slope * _compute_logit(p) + calibration.intercept), dtype=np.float32)


def apply_threshold(p: np.ndarray, threshold: float) -> np.ndarray:
    """Return flags, bool: True where the raw probability is at or above the threshold."""
    return np.asarray(p, dtype=np.float64) >= threshold


def find_operating_points(
    labels: np.ndarray,
    probabilities: np.ndarray,
    findings: Sequence[str],
    rule: str,
    min_positives: int = 1,
    slopes: np.ndarray | None = None,
) -> list[tuple[OperatingPoint | None, str | None]]:
    """Choose the threshold of every finding by a rule; see `find_operating_point` for rules of a single finding.

    `any_flag_rate=0.3` starts from Youden's thresholds, and multiplies the odds of all of them by one factor, the
    lowest with which at most 30% of all images have a flag. The odds are those of calibrated probabilities, so the
    factor means the same for each finding: how much larger the odds must be than at Youden's threshold. A finding
    without Youden's threshold has no operating point, nor has one that the factor leaves without a flag; the others use
    the whole 30% then. `No_Finding` does not count, and has the operating point of `youden`.

    Args:
        labels, probabilities, findings: see `fit_rules`.
        slopes: of each finding's calibration, float64 [F]; None for 1. A finding whose slope is not positive has no
            operating point.

    Returns:
        Per finding (operating point, None) or (None, reason).
    """
    rule, name, target = _parse_rule(rule)
    known = [labels[:, j] >= 0 for j in range(len(findings))]
    single = "youden" if name == "any_flag_rate" else rule
    scale = np.ones(len(findings)) if slopes is None else slopes
    points = [
        find_operating_point(labels[rows, j], probabilities[rows, j], single, min_positives)
        if scale[j] > 0.0
        else (None, _INVERTED)
        for j, rows in enumerate(known)
    ]
    if name != "any_flag_rate":
        return points
    p = np.asarray(probabilities, dtype=np.float32)
    starts = {
        j: float(_compute_logit(np.array(point["threshold"])))
        for j, (point, _) in enumerate(points)
        if point and findings[j] != NO_FINDING
    }
    # The logarithm of how many times larger the odds are than at Youden's threshold.
    margins = {j: scale[j] * (_compute_logit(p[:, j]) - start) for j, start in starts.items()}
    cut, dropped = _find_common_cut(margins, min(math.floor(target * len(p) + 1e-9), len(p) - 1))
    for j, start in starts.items():
        if j in dropped:
            points[j] = (None, f"{rule} {dropped[j]}")
            continue
        threshold = _fit_between(p[:, j], margins[j] >= cut, float(expit(start + cut / scale[j])))
        points[j] = _describe_point(labels[known[j], j] == 1, p[known[j], j], threshold, rule)
    return points


def _find_common_cut(margins: Mapping[int, np.ndarray], allowed: int) -> tuple[float, dict[int, str]]:
    """Return the lowest cut that at most `allowed` images reach for any finding, and the findings left out, with why.

    Findings that no such cut flags an image for are left out one at a time, the highest first, and the cut is searched
    again. Otherwise, many images that share the highest margin of one finding would keep the cut high for all. Findings
    that reach the cut still do afterwards, since it only becomes lower.
    """
    left, dropped = dict(margins), dict[int, str]()
    while left:
        highest = np.max(list(left.values()), axis=0)
        excess = np.sort(highest)[-1 - allowed]  # the cut is above it: it would flag one image too many
        tops = {j: float(values.max()) for j, values in left.items()}
        below = {j: top for j, top in tops.items() if top <= excess}
        if not below:
            lowest = min(highest[highest > excess].min(), *tops.values())
            middle = (lowest + excess) / 2.0
            return float(middle if middle > excess else lowest), dropped
        j = max(below, key=below.__getitem__)
        tied = int((left.pop(j) == below[j]).sum())
        why = "the scores of other findings are further above Youden's thresholds"
        if tied > allowed:
            who = f"{tied:,} images share" if tied > 1 else "1 image has"
            why = f"{who} its highest score and at most {allowed:,} may have flags"
        dropped[j] = f"flags no validation image, because {why}"
    return math.inf, dropped


def _fit_between(p: np.ndarray, flagged: np.ndarray, wanted: float) -> float:
    """Return the float32 closest to `wanted` that separates the flagged from the other scores, float32 [n]."""
    above = np.nextafter(np.max(p[~flagged], initial=np.float32(0.0)), np.float32(2.0))
    lowest_flagged = np.min(p[flagged], initial=np.float32(2.0))
    largest = np.nextafter(np.float32(1.0), np.float32(0.0))
    return float(min(max(min(np.float32(wanted), largest), above), lowest_flagged))


def find_operating_point(
    y: np.ndarray, p: np.ndarray, rule: str = "youden", min_positives: int = 1
) -> tuple[OperatingPoint | None, str | None]:
    """Choose a threshold by a rule of a single finding, and measure it on the same images.

    `youden` maximises sensitivity + specificity - 1 (Youden 1950); if several reach the maximum, the most sensitive.
    `sensitivity=0.9` is the highest threshold with a sensitivity of at least 0.9, `specificity=0.9` the lowest
    with a specificity of at least 0.9. `flag_rate=0.1` is the lowest threshold with at most 10% of the images flagged,
    and `npv=0.99` the highest threshold at which at least 99% of the images below it are negative.

    The threshold lies strictly inside 0..1, midway between the lowest flagged score and the next lower score (0 if
    there is none), or at the lowest flagged score if no float32 lies between them. It is exact in float32, so
    comparisons in float32 and float64 return the same flags.

    Returns (operating point, None), or (None, reason) if a class is absent or too small, `youden` finds nothing better
    than chance, the target is reached only if no image or every image is flagged, or scores saturated at 0 or 1 allow
    no threshold. Raises ConfigError for an unknown rule, a target outside 0..1, or `any_flag_rate`.
    """
    rule, name, target = _parse_rule(rule)
    if name == "any_flag_rate":
        raise ConfigError(f"operating point {rule!r}: limits the flags of all findings, so it needs all of them")
    y, p = metrics.check_scores(y, np.asarray(p, dtype=np.float32))
    metrics.check_probabilities(p)
    reason = _explain_too_few(y, min_positives)
    if reason is not None:
        return None, reason
    curve = metrics.roc_curve(y, p)
    assert curve is not None
    k, reason = _choose_step(curve, y, name, target)
    if reason is not None:
        return None, reason if name == "youden" else f"{rule} {reason}"
    return _describe_point(y, p, _place_threshold(curve.thresholds, k), rule)


def _choose_step(curve: metrics.Curve, y: np.ndarray, name: str, target: float) -> tuple[int, str | None]:
    """Return how many of the distinct scores, from the highest, are flagged, and the reason if there is none."""
    positives, negatives = int(y.sum()), int((~y).sum())
    # Point k flags the k highest distinct scores. Integers, so that a target of 0.9 means 9 of 10.
    true = np.rint(curve.y * positives).astype(np.int64)
    false = np.rint(curve.x * negatives).astype(np.int64)
    below = y.size - true - false
    if name == "youden":
        gain = true * negatives - false * positives
        best = int(gain.max())
        return int(np.flatnonzero(gain == best)[-1]), None if best > 0 else "no threshold is better than chance"
    if name == "npv":
        reached = np.flatnonzero((below > 0) & (negatives - false >= np.ceil(target * below - 1e-9)))
        if not reached.size:
            return 0, "is reached only if every image is flagged"
        rare = f"is reached without a flag, because only {positives:,} of {y.size:,} images are positive"
        return int(reached[0]), rare if reached[0] == 0 else None
    if name == "sensitivity":
        return int(np.flatnonzero(true >= math.ceil(target * positives - 1e-9))[0]), None
    if name == "specificity":
        allowed = negatives - false >= math.ceil(target * negatives - 1e-9)
    else:
        allowed = true + false <= math.floor(target * y.size + 1e-9)
    k = int(np.flatnonzero(allowed)[-1])
    return k, "is reached only if no image is flagged" if k == 0 else None


def _describe_point(
    y: np.ndarray, p: np.ndarray, threshold: float, rule: str
) -> tuple[OperatingPoint | None, str | None]:
    """Measure a threshold on images with the labels y, bool [n], and the scores p, float32 [n]."""
    if not 0.0 < threshold < 1.0:
        return None, "scores saturated at 0 or 1 allow no threshold"
    flags = apply_threshold(p, threshold)
    point = OperatingPoint(
        threshold=threshold,
        rule=rule,
        sensitivity=float(flags[y].mean()),
        specificity=float((~flags[~y]).mean()),
        flag_rate=float(flags.mean()),
        n=y.size,
        positives=int(y.sum()),
    )
    return point, None


def _place_threshold(descending: np.ndarray, k: int) -> float:
    """Return a float32 threshold that flags exactly the k >= 1 highest scores; `descending[0]` is infinity."""
    lowest_flagged = np.float32(descending[k])
    highest_unflagged = np.float32(0.0) if k == len(descending) - 1 else np.float32(descending[k + 1])
    middle = np.float32((float(lowest_flagged) + float(highest_unflagged)) / 2.0)
    # If no float32 lies between the two scores, the lowest flagged score is the threshold.
    return float(middle if middle > highest_unflagged else lowest_flagged)


def _parse_rule(rule: str) -> tuple[str, str, float]:
    """Return the normal form of a rule, its name, and its target (0 for `youden`)."""
    try:
        normal = normalize_rule(rule)
    except ValueError as error:
        raise ConfigError(f"operating point {rule!r}: {error}") from None
    name, _, target = normal.partition("=")
    return normal, name, float(target or 0.0)


def _compute_logit(p: np.ndarray) -> np.ndarray:
    p = np.asarray(p, dtype=np.float64)
    metrics.check_probabilities(p)
    return np.asarray(logit(np.clip(p, EPSILON, 1.0 - EPSILON)))
