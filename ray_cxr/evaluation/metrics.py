"""Metrics of one finding, and the registry `METRICS` that drives everything a report shows of them.

Labels are `uint8`, `int8` or `bool` arrays [n] of 0 and 1; rows without a label must be left out. Scores and
probabilities are finite floats [n], larger meaning more likely. Other input raises ValueError, see `check_scores`. A
metric that the data cannot define is None, never 0, 0.5 or NaN.

To add a metric, append an entry to `METRICS`. Bootstrap intervals, metrics.json, metrics.parquet, the tables of
report.html and report.md, and the check of the table in docs/report.md follow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ray_cxr.evaluation.roc_steps import RocSteps, divide_or_nan

#: Bins of the expected calibration error, of equal width or of equal numbers of images.
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

    def expect_at(self, prevalence: float) -> Confusion | None:
        """Return the shares of images expected at another prevalence, by Bayes' theorem; None if a class is absent.

        Sensitivity and specificity carry over if positives and negatives have the same spectrum of disease there.
        """
        if not 0.0 <= prevalence <= 1.0:
            raise ValueError(f"prevalence is {prevalence}; it must lie in 0..1")
        sensitivity, specificity = self.sensitivity, self.specificity
        if sensitivity is None or specificity is None:
            return None
        present, absent = prevalence, 1.0 - prevalence
        return Confusion(
            present * sensitivity, absent * (1.0 - specificity), absent * specificity, present * (1.0 - sensitivity)
        )

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
    """Sums over the images of b bootstrap resamples."""

    images: np.ndarray  # [b], number of images
    squared: np.ndarray  # [b], of squared errors p - y


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


def auroc(y: np.ndarray, s: np.ndarray) -> float | None:
    """Compute the area under the ROC curve: P(score of a positive > score of a negative), ties counting one half.

    This is the Mann-Whitney statistic in integers, rounded only by the final division.
    """
    y, s = check_scores(y, s)
    if undefined_reason(y) is not None:
        return None
    positive, negative, _ = _count_by_score(y, s)
    below = np.cumsum(negative) - negative
    return float((positive * (2 * below + negative)).sum() / (2 * positive.sum() * negative.sum()))


def average_precision(y: np.ndarray, s: np.ndarray) -> float | None:
    """Compute average precision: the sum over thresholds of (gain in recall) x (precision).

    Tied scores share one threshold. A score without skill reaches the prevalence, so compare values only on the same
    images.
    """
    y, s = check_scores(y, s)
    if undefined_reason(y) is not None:
        return None
    curve = precision_recall_curve(y, s)
    return float(np.sum(np.diff(curve.x, prepend=0.0) * curve.y))


def roc_curve(y: np.ndarray, s: np.ndarray) -> Curve | None:
    """Compute the ROC curve with one point per distinct score; None if a class is absent."""
    y, s = check_scores(y, s)
    if undefined_reason(y) is not None:
        return None
    from sklearn import metrics as sklearn_metrics  # the import takes a second, which only reports need to spend

    return Curve(*sklearn_metrics.roc_curve(y, s, drop_intermediate=False))


def precision_recall_curve(y: np.ndarray, s: np.ndarray) -> Curve:
    """Compute recall (x) and precision (y) with one point per distinct score, highest first. Needs a positive label."""
    y, s = check_scores(y, s)
    if not y.any():
        raise ValueError("recall needs a positive label")
    positive, negative, values = _count_by_score(y, s)
    true = np.cumsum(positive[::-1], dtype=np.float64)
    flagged = true + np.cumsum(negative[::-1])
    return Curve(x=true / true[-1], y=true / flagged, thresholds=values[::-1])


def confusion(y: np.ndarray, flags: np.ndarray) -> Confusion:
    """Count flags, bool [n], against labels [n]."""
    flags = np.asarray(flags)
    y, _ = check_scores(y, flags)
    flags = flags.astype(bool)
    return Confusion(*(int(cell.sum()) for cell in (y & flags, ~y & flags, ~y & ~flags, y & ~flags)))


def brier(y: np.ndarray, p: np.ndarray) -> float | None:
    """Compute the mean squared difference of probabilities and labels (Brier 1950); None without rows."""
    y, p = check_scores(y, p)
    return float(np.mean((p - y) ** 2)) if y.size else None


def expected_calibration_error(y: np.ndarray, p: np.ndarray, bins: int = CALIBRATION_BINS) -> float | None:
    """Compute |mean probability - share of positives| in bins of equal width, averaged with the bins' image counts.

    As in Guo et al. 2017, but for one finding: p is the finding's probability, not that of the winning class.
    """
    y, p = check_scores(y, p)
    check_probabilities(p)
    if not y.size:
        return None
    errors = np.bincount(probability_bins(p, bins), weights=p - y, minlength=bins)
    return float(np.abs(errors).sum() / y.size)


def equal_mass_error(y: np.ndarray, p: np.ndarray, bins: int = CALIBRATION_BINS) -> float | None:
    """Compute `expected_calibration_error` in bins with equal numbers of images (Nixon et al. 2019)."""
    y, p = check_scores(y, p)
    check_probabilities(p)
    if not y.size:
        return None
    return float(np.abs(np.bincount(rank_bins(p, bins), weights=p - y)).sum() / y.size)


def rank_bins(values: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each value [n], int64 [n], ascending, in at most `bins` bins with equal numbers of values.

    Equal values share the bin of the first of them, so bins can be uneven or fewer.
    """
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - counts
    return np.asarray(np.unique(ranks * bins // max(len(values), 1), return_inverse=True)[1][places])


def probability_bins(p: np.ndarray, bins: int = CALIBRATION_BINS) -> np.ndarray:
    """Return the bin of equal width that each probability falls into, int64 [n]."""
    return np.minimum((p * bins).astype(np.int64), bins - 1)


def check_scores(y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def check_probabilities(p: np.ndarray) -> None:
    """Raise ValueError if a value is below 0 or above 1; NaN is accepted."""
    if ((p < 0.0) | (p > 1.0)).any():
        raise ValueError("probabilities must lie in 0..1")


def _count_by_score(y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count positives and negatives at each distinct score, int64; the scores ascend."""
    values, places, totals = np.unique(s, return_inverse=True, return_counts=True)
    positive = np.bincount(places[y], minlength=len(values))
    return positive, totals - positive, values


def _ratio(part: Any, whole: Any) -> Rate:
    if np.ndim(whole):
        return divide_or_nan(part, whole)
    return part / whole if whole else None


@dataclass(frozen=True)
class Metric:
    """Definition of a metric for reports."""

    key: str  # its name in metrics.json, next to `<key>_low` and `<key>_high`, and in metrics.parquet
    label: str  # its column heading
    meaning: str  # one sentence for the documentation and the page
    table: str = "more"  # the page's table that shows it, one of `TABLES`
    digits: int = 3
    percent: bool = False


@dataclass(frozen=True)
class RankingMetric(Metric):
    """A metric of labels [n] and raw scores [n]; `resample` computes it from ROC curves, float64 [b], NaN undefined."""

    value: Callable[[np.ndarray, np.ndarray], float | None] = auroc
    resample: Callable[[RocSteps], np.ndarray] = RocSteps.aurocs


@dataclass(frozen=True)
class RateMetric(Metric):
    """A rate at the operating point: the property of `Confusion` with the metric's key."""

    undefined: str = ""  # the reason given if it is None
    #: For a share of images: from labels and flags, bool [n], which images count as successes, and among which images.
    share: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    at_prevalence: str = ""  # the property of the confusion expected at an assumed prevalence, instead; or empty

    def value(self, cells: Confusion, prevalence: float) -> Rate:
        """Compute the rate from counts of the sample, or from counts of all resamples at once."""
        if not self.at_prevalence:
            return getattr(cells, self.key)
        expected = cells.expect_at(prevalence)
        return None if expected is None else getattr(expected, self.at_prevalence)


@dataclass(frozen=True)
class ProbabilityMetric(Metric):
    """A metric of labels [n] and calibrated probabilities [n]; `resample` computes it from sums of errors.

    Without `resample` the metric has no interval, for the reason `no_interval`.
    """

    value: Callable[[np.ndarray, np.ndarray], float | None] = brier
    resample: Callable[[ErrorSums], np.ndarray] | None = None
    no_interval: str = ""


_AUROC = "Probability that an image with the finding scores higher than one without it (ties one half); 0.5 is chance."
_PRECISION = "Precision averaged over the ranks of the positive images; a score without skill reaches the prevalence."
_SENSITIVITY = "Share of the images with the finding that are flagged."
_SPECIFICITY = "Share of the images without the finding that are not flagged."
_PPV = "Positive predictive value: share of the flagged images that have the finding; depends on the prevalence."
_NPV = "Negative predictive value: share of the images not flagged that lack the finding; depends on the prevalence."
_FLAG_RATE = "Share of the labelled images that are flagged."
_EXPECTED = "expected at the prevalence given with `--prevalence`, from sensitivity and specificity by Bayes' theorem."
_BRIER = "Mean squared difference between calibrated probability and label; 0 is best."
_ECE = "Mean distance of calibrated probability and observed share in ten bins of equal width, weighted by images."
_EQUAL_MASS = "The same in ten bins with equal numbers of images, which also separates the low scores of rare findings."
_NO_INTERVAL = "resampling adds noise to absolute differences, so percentiles can lie wholly above the value"
RANKING_METRICS = (
    RankingMetric("auroc", "AUROC", _AUROC, "main"),
    RankingMetric(
        "average_precision",
        "Average precision",
        _PRECISION,
        "main",
        value=average_precision,
        resample=RocSteps.average_precisions,
    ),
)
RATE_METRICS = (
    RateMetric(
        *("sensitivity", "Sensitivity", _SENSITIVITY, "main", 2),
        undefined="no positive images",
        share=lambda y, flags: (flags, y),
    ),
    RateMetric(
        *("specificity", "Specificity", _SPECIFICITY, "main", 2),
        undefined="no negative images",
        share=lambda y, flags: (~flags, ~y),
    ),
    RateMetric(*("ppv", "PPV", _PPV, "main", 2), undefined="no image is flagged", share=lambda y, flags: (y, flags)),
    RateMetric("npv", "NPV", _NPV, undefined="every image is flagged", share=lambda y, flags: (~y, ~flags)),
    RateMetric("f1", "F1", "Harmonic mean of PPV and sensitivity.", undefined="no positive images, and none flagged"),
    RateMetric(
        *("flag_rate", "Flagged", _FLAG_RATE, "more", 1, True),
        undefined="no labelled images",
        share=lambda y, flags: (flags, np.ones_like(y)),
    ),
    RateMetric(
        "ppv_at_prevalence",
        "PPV at this prevalence",
        f"PPV {_EXPECTED}",
        "prevalence",
        undefined="nothing would be flagged",
        at_prevalence="ppv",
    ),
    RateMetric(
        "npv_at_prevalence",
        "NPV at this prevalence",
        f"NPV {_EXPECTED}",
        "prevalence",
        undefined="everything would be flagged",
        at_prevalence="npv",
    ),
)
PROBABILITY_METRICS = (
    ProbabilityMetric(
        "brier", "Brier score", _BRIER, digits=4, resample=lambda sums: _ratio(sums.squared, sums.images)
    ),
    ProbabilityMetric(
        "expected_calibration_error",
        "Calibration error",
        _ECE,
        value=expected_calibration_error,
        no_interval=_NO_INTERVAL,
    ),
    ProbabilityMetric(
        "expected_calibration_error_equal_mass",
        "Calibration error, equal mass",
        _EQUAL_MASS,
        value=equal_mass_error,
        no_interval=_NO_INTERVAL,
    ),
)
#: Tables of the page that show metrics; see `Metric.table`.
TABLES = ("main", "more", "prevalence")
#: Every metric that a report computes with an interval, in the order of metrics.json.
METRICS: tuple[Metric, ...] = (*RANKING_METRICS, *RATE_METRICS, *PROBABILITY_METRICS)
