"""Metrics of one finding, and the registry `METRICS` that drives everything a report shows of them.

Labels are `uint8`, `int8` or `bool` arrays [n] of 0 and 1; rows without a label must be left out. Scores are finite
floats [n], larger meaning more likely. A metric that the data cannot define is None, never 0, 0.5 or NaN.

To add a metric, append an entry to `METRICS`. Bootstrap intervals, metrics.json, metrics.parquet, the tables of
report.html and report.md, and the check of the table in docs/report.md follow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ray_cxr.evaluation.roc_steps import RocSteps

#: Bins of the expected calibration error, of equal width.
CALIBRATION_BINS = 10
#: An int in one sample, float64 [b] in b bootstrap resamples.
Count: TypeAlias = Any
#: `float | None` in one sample; float64 [b], NaN where undefined, in b bootstrap resamples.
Rate: TypeAlias = Any


@dataclass(frozen=True)
class Curve:
    """A curve over thresholds, from "flag nothing" to "flag everything".

    Attributes:
        x, y: float64 [k]. ROC: false positive rate and sensitivity. Precision-recall: recall and precision.
        thresholds: float64 [k]; each point has the rates of the rule score >= threshold. A ROC curve starts at
            infinity, where nothing is flagged.
    """

    x: np.ndarray
    y: np.ndarray
    thresholds: np.ndarray


@dataclass(frozen=True)
class Confusion:
    """Counts of images at one threshold. A rate with the denominator 0 is None, or NaN in resamples."""

    true_positives: Count
    false_positives: Count
    true_negatives: Count
    false_negatives: Count

    @property
    def sensitivity(self) -> Rate:
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def specificity(self) -> Rate:
        return _ratio(self.true_negatives, self.true_negatives + self.false_positives)

    @property
    def ppv(self) -> Rate:
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def npv(self) -> Rate:
        return _ratio(self.true_negatives, self.true_negatives + self.false_negatives)

    @property
    def f1(self) -> Rate:
        twice = 2 * self.true_positives
        return _ratio(twice, twice + self.false_positives + self.false_negatives)

    @property
    def flag_rate(self) -> Rate:
        flagged = self.true_positives + self.false_positives
        return _ratio(flagged, flagged + self.true_negatives + self.false_negatives)


@dataclass(frozen=True)
class ErrorSums:
    """Sums of calibration errors p - y in b bootstrap resamples.

    Attributes:
        images, squared: float64 [b], number of images and sum of squared errors.
        by_bin: float64 [b, CALIBRATION_BINS], sum of errors in each bin of the probability.
    """

    images: np.ndarray
    squared: np.ndarray
    by_bin: np.ndarray


def undefined_reason(y: np.ndarray) -> str | None:
    """Return why labels [n] define no comparison of positives with negatives; None if they do."""
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
    """Compute the area under the ROC curve: P(score of a positive > score of a negative), ties counting one half.

    Without weights this is the Mann-Whitney statistic in integers, rounded only by the final division.

    Args:
        y: labels [n], 0 or 1.
        s: scores [n].
        weights: floats or counts [n] >= 0; a count of k equals k copies of the row.

    Returns:
        float64 in 0..1, or None if a class is absent or has no weight.

    Raises:
        ValueError: shapes differ, a label is not 0 or 1, a score or weight is not finite, or a weight is negative.
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
    """Compute average precision: the sum over thresholds of (gain in recall) x (precision).

    Tied scores share one threshold. A score without skill reaches the prevalence, so compare values only on the same
    images. Return None if a class is absent.

    Raises:
        ValueError: see `auroc`.
    """
    y, s = checked(y, s)
    if undefined_reason(y) is not None:
        return None
    curve = precision_recall_curve(y, s)
    return float(np.sum(np.diff(curve.x, prepend=0.0) * curve.y))


def roc_curve(y: np.ndarray, s: np.ndarray) -> Curve | None:
    """Compute the ROC curve with one point per distinct score; None if a class is absent.

    Raises:
        ValueError: see `auroc`.
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
    """Compute recall (x) and precision (y) with one point per distinct score, highest score first.

    Raises:
        ValueError: see `auroc`; or no label is positive.
    """
    y, s = checked(y, s)
    positive, negative, values = _by_score(y, s, np.ones(y.size, dtype=np.int64))
    true = np.cumsum(positive[::-1], dtype=np.float64)
    flagged = true + np.cumsum(negative[::-1])
    if y.size == 0 or true[-1] == 0:
        raise ValueError("recall needs a positive label")
    return Curve(x=true / true[-1], y=true / flagged, thresholds=values[::-1])


def confusion(y: np.ndarray, flags: np.ndarray) -> Confusion:
    """Count flags, bool [n], against labels [n].

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
    """Compute sensitivity and specificity of flags; each is None if its class is absent.

    Raises:
        ValueError: see `confusion`.
    """
    counts = confusion(y, flags)
    return counts.sensitivity, counts.specificity


def predictive_values_at(
    sensitivity: float | None, specificity: float | None, prevalence: float
) -> tuple[float | None, float | None]:
    """Compute the PPV and NPV expected at another prevalence, by Bayes' theorem.

    The result holds if sensitivity and specificity carry over, that is if positives and negatives have the same
    spectrum of disease in both populations.

    Args:
        sensitivity, specificity: in 0..1, or None.
        prevalence: share of positives in the other population, in 0..1.

    Returns:
        (PPV, NPV). Both are None if an argument is None; PPV if nothing would be flagged, NPV if everything would.

    Raises:
        ValueError: a number is outside 0..1.
    """
    for name, value in (("sensitivity", sensitivity), ("specificity", specificity), ("prevalence", prevalence)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}; it must lie in 0..1")
    return _predictive_values(sensitivity, specificity, prevalence)


def _predictive_values(sensitivity: Rate, specificity: Rate, prevalence: float) -> tuple[Rate, Rate]:
    if sensitivity is None or specificity is None:
        return None, None
    true_positives, false_negatives = prevalence * sensitivity, prevalence * (1.0 - sensitivity)
    true_negatives, false_positives = (1.0 - prevalence) * specificity, (1.0 - prevalence) * (1.0 - specificity)
    return (
        _ratio(true_positives, true_positives + false_positives),
        _ratio(true_negatives, true_negatives + false_negatives),
    )


def brier(y: np.ndarray, p: np.ndarray) -> float | None:
    """Compute the mean squared difference of probabilities and labels (Brier 1950); None without rows.

    Raises:
        ValueError: see `auroc`.
    """
    y, p = checked(y, p)
    return float(np.mean((p - y) ** 2)) if y.size else None


def expected_calibration_error(y: np.ndarray, p: np.ndarray, bins: int = CALIBRATION_BINS) -> float | None:
    """Compute |mean probability - share of positives| in bins of equal width, averaged with the bins' image counts.

    As in Guo et al. 2017, but for one finding: p is the finding's probability, not that of the winning class.

    Args:
        y: labels [n], 0 or 1.
        p: probabilities [n] in 0..1.
        bins: number of bins.

    Returns:
        A number in 0..1; None without images.

    Raises:
        ValueError: see `auroc`; or a probability is outside 0..1.
    """
    y, p = checked(y, p)
    if ((p < 0.0) | (p > 1.0)).any():
        raise ValueError("probabilities must lie in 0..1")
    if not y.size:
        return None
    errors = np.bincount(probability_bins(p, bins), weights=p - y, minlength=bins)
    return float(np.abs(errors).sum() / y.size)


def probability_bins(p: np.ndarray, bins: int = CALIBRATION_BINS) -> np.ndarray:
    """Return the bin of equal width that each probability falls into, int64 [n]."""
    return np.minimum((p * bins).astype(np.int64), bins - 1)


def checked(y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as bool [n] and scores as float64 [n].

    Raises:
        ValueError: an array is not one-dimensional, shapes differ, a label is not 0 or 1, or a score is not finite.
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


def _ratio(part: Any, whole: Any) -> Rate:
    if not np.ndim(whole):
        return part / whole if whole else None
    result = np.full(np.shape(whole), np.nan)
    np.divide(part, whole, out=result, where=whole > 0)
    return result


@dataclass(frozen=True)
class Metric:
    """What the report knows of a metric.

    Attributes:
        key: its name in metrics.json, next to `<key>_low` and `<key>_high`, and in metrics.parquet.
        label: its column heading.
        meaning: one sentence for the documentation and the page.
        table: the page's table that shows it: `main`, `more` or `prevalence`.
        digits: decimals on the page.
        percent: shown as a percentage.
    """

    key: str
    label: str
    meaning: str
    table: str = "more"
    digits: int = 3
    percent: bool = False


@dataclass(frozen=True)
class RankingMetric(Metric):
    """A metric of the order of raw scores.

    Attributes:
        value: function of labels [n] and scores [n].
        resample: function of the ROC curves of b resamples; float64 [b], NaN where undefined.
    """

    value: Callable[[np.ndarray, np.ndarray], float | None] = auroc
    resample: Callable[[RocSteps], np.ndarray] = RocSteps.aurocs


@dataclass(frozen=True)
class RateMetric(Metric):
    """A metric of flags at the operating point.

    Attributes:
        value: function of the counts and of the assumed prevalence; serves the sample and all resamples.
        undefined: the reason given where it is None.
        at_prevalence: needs an assumed prevalence.
    """

    value: Callable[[Confusion, float], Rate] = lambda cells, prevalence: None
    undefined: str = ""
    at_prevalence: bool = False


@dataclass(frozen=True)
class ProbabilityMetric(Metric):
    """A metric of calibrated probabilities.

    Attributes:
        value: function of labels [n] and probabilities [n].
        resample: function of the sums of errors in b resamples; float64 [b].
    """

    value: Callable[[np.ndarray, np.ndarray], float | None] = brier
    resample: Callable[[ErrorSums], np.ndarray] = lambda sums: _ratio(sums.squared, sums.images)


RANKING_METRICS = (
    RankingMetric(
        "auroc",
        "AUROC",
        "Probability that an image with the finding scores higher than one without it, ties counting one half; "
        "0.5 is chance.",
        "main",
        value=auroc,
        resample=RocSteps.aurocs,
    ),
    RankingMetric(
        "average_precision",
        "Average precision",
        "Precision averaged over the ranks of the positive images; a score without skill reaches the prevalence.",
        "main",
        value=average_precision,
        resample=RocSteps.average_precisions,
    ),
)
RATE_METRICS = (
    RateMetric(
        "sensitivity",
        "Sensitivity",
        "Share of the images with the finding that are flagged.",
        "main",
        2,
        value=lambda cells, _: cells.sensitivity,
        undefined="no positive images",
    ),
    RateMetric(
        "specificity",
        "Specificity",
        "Share of the images without the finding that are not flagged.",
        "main",
        2,
        value=lambda cells, _: cells.specificity,
        undefined="no negative images",
    ),
    RateMetric(
        "ppv",
        "PPV",
        "Positive predictive value: share of the flagged images that have the finding; depends on the prevalence.",
        "main",
        2,
        value=lambda cells, _: cells.ppv,
        undefined="no image is flagged",
    ),
    RateMetric(
        "npv",
        "NPV",
        "Negative predictive value: share of the images not flagged that lack the finding; depends on the prevalence.",
        value=lambda cells, _: cells.npv,
        undefined="every image is flagged",
    ),
    RateMetric(
        "f1",
        "F1",
        "Harmonic mean of PPV and sensitivity.",
        value=lambda cells, _: cells.f1,
        undefined="no positive images, and none flagged",
    ),
    RateMetric(
        "flag_rate",
        "Flagged",
        "Share of the labelled images that are flagged.",
        digits=1,
        percent=True,
        value=lambda cells, _: cells.flag_rate,
        undefined="no labelled images",
    ),
    RateMetric(
        "ppv_at_prevalence",
        "PPV at this prevalence",
        "PPV expected at the prevalence given with `--prevalence`, from sensitivity and specificity by Bayes' theorem.",
        "prevalence",
        value=lambda cells, prevalence: _predictive_values(cells.sensitivity, cells.specificity, prevalence)[0],
        undefined="nothing would be flagged",
        at_prevalence=True,
    ),
    RateMetric(
        "npv_at_prevalence",
        "NPV at this prevalence",
        "NPV expected at the prevalence given with `--prevalence`, from sensitivity and specificity by Bayes' theorem.",
        "prevalence",
        value=lambda cells, prevalence: _predictive_values(cells.sensitivity, cells.specificity, prevalence)[1],
        undefined="everything would be flagged",
        at_prevalence=True,
    ),
)
PROBABILITY_METRICS = (
    ProbabilityMetric(
        "brier",
        "Brier score",
        "Mean squared difference between calibrated probability and label; 0 is best.",
        digits=4,
        value=brier,
        resample=lambda sums: _ratio(sums.squared, sums.images),
    ),
    ProbabilityMetric(
        "expected_calibration_error",
        "Calibration error",
        "Expected calibration error: mean distance of calibrated probability and observed share in ten bins of equal "
        "width.",
        value=expected_calibration_error,
        resample=lambda sums: _ratio(np.abs(sums.by_bin).sum(axis=1), sums.images),
    ),
)
#: Tables of the page that show metrics; see `Metric.table`.
TABLES = ("main", "more", "prevalence")
#: Every metric that a report computes with an interval, in the order of metrics.json.
METRICS: tuple[Metric, ...] = (*RANKING_METRICS, *RATE_METRICS, *PROBABILITY_METRICS)


def markdown_table() -> str:
    """Return the table of metrics in docs/report.md."""
    rows = [f"| {metric.label} | `{metric.key}` | {metric.meaning} |" for metric in METRICS]
    return "\n".join(["| metric | key | meaning |", "|---|---|---|", *rows]) + "\n"
