"""How good a finding's scores are. A quantity that the data cannot define is None, never 0, 0.5 or NaN.

Labels are `uint8`, `int8` or `bool` arrays [n] of 0 and 1; the caller leaves rows without a label out. Scores
are finite floats [n] in which larger means more likely; only their order matters to all but `brier`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """A curve over thresholds, from "flag nothing" to "flag everything".

    Attributes:
        x, y: float64[k]. ROC: false positive rate and sensitivity. Precision-recall: recall and precision.
        thresholds: float64[k]; a point's rates are those of the rule score >= threshold. The first point of a
            ROC curve, where nothing is flagged, has the threshold infinity.
    """

    x: np.ndarray
    y: np.ndarray
    thresholds: np.ndarray


@dataclass(frozen=True)
class Confusion:
    """Counts of images at one threshold; each rate is None where its denominator is 0."""

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int

    @property
    def sensitivity(self) -> float | None:
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def specificity(self) -> float | None:
        return _ratio(self.true_negatives, self.true_negatives + self.false_positives)

    @property
    def ppv(self) -> float | None:
        """Positive predictive value: of the flagged, the share that is positive."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def npv(self) -> float | None:
        """Negative predictive value: of those not flagged, the share that is negative."""
        return _ratio(self.true_negatives, self.true_negatives + self.false_negatives)

    @property
    def f1(self) -> float | None:
        """The harmonic mean of sensitivity and PPV, in counts; None only where nothing is positive or flagged."""
        twice = 2 * self.true_positives
        return _ratio(twice, twice + self.false_positives + self.false_negatives)

    @property
    def flag_rate(self) -> float | None:
        flagged = self.true_positives + self.false_positives
        return _ratio(flagged, flagged + self.true_negatives + self.false_negatives)


def undefined_reason(y: np.ndarray) -> str | None:
    """Why nothing that compares positives with negatives can be computed from labels [n]; None if it can."""
    y = np.asarray(y)
    if y.size == 0:
        return "no labelled images"
    positives = int(np.count_nonzero(y))
    if positives == 0:
        return "no positive images"
    if positives == y.size:
        return "no negative images"
    return None


def auroc(y: np.ndarray, s: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Area under the ROC curve: P(score of a positive > score of a negative), ties counting one half.

    Without weights this is the Mann-Whitney statistic in whole numbers (what midranks give), so the one
    division at the end is all the rounding there is.

    Args:
        y: labels [n], 0 or 1.
        s: scores [n].
        weights: floats or counts [n] >= 0; a count of k is the same as k copies of the row.

    Returns:
        float64 in 0..1, or None where a class is absent (or has no weight).

    Raises:
        ValueError: shapes differ, a label is not 0 or 1, a score is not finite, a weight is negative or not
            finite.
    """
    y, s = checked(y, s)
    if weights is None:
        w = np.ones(y.size, dtype=np.int64)
    else:
        w = np.asarray(weights)
        if w.shape != y.shape:
            raise ValueError(f"weights have the shape {w.shape}, labels {y.shape}")
        w = w.astype(np.int64 if w.dtype.kind in "biu" else np.float64)
        if not np.isfinite(w).all() or (w < 0).any():
            raise ValueError("weights must be finite and not negative")
    positive, negative, _ = _by_score(y, s, w)
    total = positive.sum() * negative.sum()
    if total == 0:
        return None
    below = np.cumsum(negative) - negative
    return float((positive * (2 * below + negative)).sum() / (2 * total))


def average_precision(y: np.ndarray, s: np.ndarray) -> float | None:
    """Average precision: the sum over thresholds of (gain in recall) x (precision).

    Tied scores are one threshold. A score without any skill reaches the prevalence, so values compare only
    within one set of images.

    Returns:
        float64, or None where a class is absent.

    Raises:
        ValueError: as `auroc`.
    """
    y, s = checked(y, s)
    if undefined_reason(y) is not None:
        return None
    curve = precision_recall_curve(y, s)
    return float(np.sum(np.diff(curve.x, prepend=0.0) * curve.y))


def roc_curve(y: np.ndarray, s: np.ndarray) -> Curve | None:
    """The ROC curve with one point per distinct score; None where a class is absent.

    Raises:
        ValueError: as `auroc`.
    """
    y, s = checked(y, s)
    if undefined_reason(y) is not None:
        return None
    positive, negative, values = _by_score(y, s, np.ones(y.size, dtype=np.int64))
    true = np.cumsum(positive[::-1], dtype=np.float64)
    false = np.cumsum(negative[::-1], dtype=np.float64)
    return Curve(
        x=np.concatenate([[0.0], false / false[-1]]),
        y=np.concatenate([[0.0], true / true[-1]]),
        thresholds=np.concatenate([[np.inf], values[::-1]]),
    )


def precision_recall_curve(y: np.ndarray, s: np.ndarray) -> Curve:
    """Recall (x) and precision (y) with one point per distinct score, from the highest score down.

    Raises:
        ValueError: as `auroc`, or no positive label.
    """
    y, s = checked(y, s)
    positive, negative, values = _by_score(y, s, np.ones(y.size, dtype=np.int64))
    true = np.cumsum(positive[::-1], dtype=np.float64)
    flagged = true + np.cumsum(negative[::-1])
    if y.size == 0 or true[-1] == 0:
        raise ValueError("recall needs a positive label")
    return Curve(x=true / true[-1], y=true / flagged, thresholds=values[::-1])


def confusion(y: np.ndarray, flags: np.ndarray) -> Confusion:
    """Counts of flags against labels.

    Args:
        y: labels [n], 0 or 1.
        flags: bool [n].

    Raises:
        ValueError: shapes differ, or a label is not 0 or 1.
    """
    flags = np.asarray(flags)
    y, _ = checked(y, flags)
    flags = flags.astype(bool)
    positives, flagged = int(y.sum()), int(flags.sum())
    both = int((y & flags).sum())
    return Confusion(
        true_positives=both,
        false_positives=flagged - both,
        true_negatives=y.size - positives - flagged + both,
        false_negatives=positives - both,
    )


def sensitivity_specificity(y: np.ndarray, flags: np.ndarray) -> tuple[float | None, float | None]:
    """Sensitivity and specificity of flags; each None where its class is absent.

    Raises:
        ValueError: as `confusion`.
    """
    counts = confusion(y, flags)
    return counts.sensitivity, counts.specificity


def predictive_values_at(
    sensitivity: float | None, specificity: float | None, prevalence: float
) -> tuple[float | None, float | None]:
    """What PPV and NPV would be where the finding has another prevalence, by Bayes' theorem.

    It holds as far as sensitivity and specificity carry over: the sick there must be as sick, and the well as well,
    as here.

    Args:
        sensitivity, specificity: in 0..1; None where undefined.
        prevalence: share of positives in the population asked about, in 0..1.

    Returns:
        (PPV, NPV); each None where sensitivity or specificity is, or where nobody would be flagged (PPV) or nobody
        would not be (NPV).

    Raises:
        ValueError: a number outside 0..1.
    """
    for name, value in (("sensitivity", sensitivity), ("specificity", specificity), ("prevalence", prevalence)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}; it must lie in 0..1")
    if sensitivity is None or specificity is None:
        return None, None
    hits, misses = prevalence * sensitivity, prevalence * (1.0 - sensitivity)
    passes, alarms = (1.0 - prevalence) * specificity, (1.0 - prevalence) * (1.0 - specificity)
    return _ratio(hits, hits + alarms), _ratio(passes, passes + misses)


def brier(y: np.ndarray, p: np.ndarray) -> float | None:
    """Mean squared difference of probabilities and labels (Brier 1950); None without rows. 0 is best.

    Raises:
        ValueError: as `auroc`.
    """
    y, p = checked(y, p)
    return float(np.mean((p - y) ** 2)) if y.size else None


def checked(y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels as bool [n] and scores as float64 [n].

    Raises:
        ValueError: not one-dimensional, shapes differ, a label is not 0 or 1, or a score is not finite.
    """
    y, s = np.asarray(y), np.asarray(s)
    if y.ndim != 1 or y.shape != s.shape:
        raise ValueError(f"labels have the shape {y.shape}, scores {s.shape}; both must be [n]")
    if not ((y == 0) | (y == 1)).all():
        raise ValueError("labels must be 0 or 1; leave rows without a label out")
    s = s.astype(np.float64)
    if not np.isfinite(s).all():
        raise ValueError("scores must be finite; leave rows without a score out")
    return y.astype(bool), s


def _by_score(y: np.ndarray, s: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight of positives and of negatives at each distinct score, scores ascending."""
    if y.size == 0:
        return w[:0], w[:0], s
    order = np.argsort(s, kind="stable")
    s, y, w = s[order], y[order], w[order]
    starts = np.flatnonzero(np.concatenate([[True], s[1:] != s[:-1]]))
    return np.add.reduceat(w * y, starts), np.add.reduceat(w * ~y, starts), s[starts]


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
