"""Patient-level bootstrap: 95% percentile intervals from resampled patients (Efron 1979; clusters drawn whole).

Images of one patient are not independent. So each resample draws patients with replacement, as many as in the sample,
and weights a patient's images by the number of draws. All functions here draw the same resamples for the same
patients, number of resamples and seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.intervals import MIN_RESAMPLES, Interval, patient_codes, percentile_interval
from ray_cxr.evaluation.roc_steps import Ranking, divide_or_nan

#: False positive rates from 0 to 1 at which ROC bands are computed.
ROC_GRID = 101
#: Maximum numbers of draws (resamples x images) per thread at a time: 16 MiB of int32, and a few arrays of this size.
_CELLS = 4 << 20
#: Findings processed at once. numpy releases the GIL in all slow operations here.
THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False)
class ResampledAuroc:
    """AUROC in each resample."""

    values: np.ndarray  # float64 [n_resamples, F]; NaN if the resample has no positive or no negative image
    defined: np.ndarray  # bool [F], columns with both classes in the sample
    n_patients: int


@dataclass(frozen=True, eq=False)
class RocBand:
    """Pointwise 95% intervals of sensitivity, float64 [ROC_GRID]; less than 95% of whole curves lie inside."""

    false_positive_rate: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, eq=False)
class DerivedOutputs:
    """Flags and probabilities that a model derives from its scores, and prevalences for its predictive values."""

    flags: np.ndarray  # int8 [n, F], 1 flagged, 0 not, negative if there is no operating point
    calibrated: np.ndarray  # probabilities [n, F] in 0..1, NaN if missing
    assumed_prevalence: np.ndarray  # float [F] in 0..1, treated as exact; NaN if missing


@dataclass(frozen=True, eq=False)
class BootstrapFindings:
    """Intervals of all metrics from one set of resamples."""

    findings: tuple[Mapping[str, Interval], ...]  # per column, an interval for each key of `metrics.METRICS`
    macro: Mapping[str, Interval]  # intervals of the means of each key of `metrics.RANKING_METRICS`
    weighted: Mapping[str, Interval]  # the same means, weighted by the numbers of positive images in the sample
    roc: tuple[RocBand | None, ...]  # per column; None without an interval


def resampled_aurocs(
    labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, n_resamples: int = 1000, seed: int = 0
) -> ResampledAuroc:
    """Compute the AUROC of each column in each resample. Columns share resamples, so they can be subtracted.

    Labels [n, F] are 1 or 0, NaN or negative if not labelled; scores [n, F] are NaN if missing. The same seed gives the
    same numbers, bit for bit.
    """
    _check_table(labels, scores, patients)
    codes, n_patients = patient_codes(patients)
    rankings = [_rank(labels[:, f], scores[:, f], codes) for f in range(labels.shape[1])]
    values = np.full((n_resamples, len(rankings)), np.nan)

    def fill(f: int, rows: slice, counts: np.ndarray) -> None:
        ranking = rankings[f]
        if ranking is not None:
            values[rows, f] = ranking.steps(counts).aurocs()

    with ThreadPoolExecutor(THREADS) as pool:
        for rows, counts in resample_patients(n_patients, len(labels), n_resamples, seed):
            _for_each_column(pool, fill, len(rankings), rows, counts)
    return ResampledAuroc(values, np.array([ranking is not None for ranking in rankings], dtype=bool), n_patients)


def bootstrap_findings(
    labels: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    derived: DerivedOutputs,
    *,
    macro: np.ndarray,
    n_resamples: int = 1000,
    seed: int = 0,
) -> BootstrapFindings:
    """Compute intervals of all metrics of each finding, and of their means.

    In each resample a metric has the value that `metrics` computes from the resample's images. It can be undefined
    there, because a class is lost or nothing is flagged. Such resamples are counted, and left out of its percentiles.
    A mean leaves out resamples in which any of its findings is undefined: a mean over fewer findings is another
    quantity. ROC bands use the ROC curve with straight lines between its points; the area under it is the AUROC.

    Percentiles do not correct bias. The calibration errors sum absolute values, also of noise, so they are too high in
    small samples and higher in resamples: percentiles may lie above the value, and rarely reach 0 even with perfect
    calibration, so there are none. In a resample, all copies of a positive image have one score. Their precision is
    computed after the last copy, where it is highest, so resampled average precision is slightly too high. With few
    positive patients all intervals are too narrow, most of all near 0 and 1: at AUROC 0.9 with normal scores they
    covered the truth in 95% of simulated data sets with 200 positive patients, 90% with 20, 85% with 10 and 78% with 5;
    with other scores less. `clustered` has intervals that hold there.

    Up to four threads share the work; each needs about 100 MB beyond the arguments.

    Args:
        labels, scores, patients: see `resampled_aurocs`.
        macro: bool [F]: the findings to include in the means over findings; one without a defined AUROC is left out.
    """
    _check_table(labels, scores, patients)
    count = labels.shape[1]
    for name, array, shape in (
        ("flags", derived.flags, labels.shape),
        ("calibrated", derived.calibrated, labels.shape),
        ("assumed_prevalence", derived.assumed_prevalence, (count,)),
        ("macro", macro, (count,)),
    ):
        if array.shape != shape:
            raise ValueError(f"{name} has the shape {array.shape}; the labels need {shape}")
    codes, n_patients = patient_codes(patients)
    rankings = [_rank(labels[:, f], scores[:, f], codes) for f in range(count)]
    sums = [_PatientSums(labels, derived, codes, n_patients, f) for f in range(count)]
    keys = [metric.key for metric in metrics.METRICS]
    unbounded = [metric for metric in metrics.PROBABILITY_METRICS if metric.resample is None]
    without_interval = {metric.key: Interval(None, None, 0, metric.no_interval) for metric in unbounded}
    values = {key: np.full((n_resamples, count), np.nan) for key in keys}
    curves = np.full((count, n_resamples, ROC_GRID), np.nan)

    def fill(f: int, rows: slice, counts: np.ndarray, drawn: np.ndarray) -> None:
        for key, column in sums[f].compute(drawn).items():
            values[key][rows, f] = column
        ranking = rankings[f]
        if ranking is not None:
            steps = ranking.steps(counts)
            for metric in metrics.RANKING_METRICS:
                values[metric.key][rows, f] = metric.resample(steps)
            curves[f, rows] = steps.sensitivities(ROC_GRID)

    with ThreadPoolExecutor(THREADS) as pool:
        for rows, counts in resample_patients(n_patients, len(labels), n_resamples, seed):
            _for_each_column(pool, fill, count, rows, counts, counts.astype(np.float64))
    counted = {f: ranking for f, ranking in enumerate(rankings) if macro[f] and ranking is not None}
    positives = [len(ranking.positive_codes) for ranking in counted.values()]
    averaged = {metric.key: values[metric.key][:, list(counted)] for metric in metrics.RANKING_METRICS}
    return BootstrapFindings(
        findings=tuple(
            {key: percentile_interval(values[key][:, f]) for key in keys} | without_interval for f in range(count)
        ),
        macro={key: _compute_mean_interval(drawn) for key, drawn in averaged.items()},
        weighted={key: _compute_mean_interval(drawn, positives) for key, drawn in averaged.items()},
        roc=tuple(_compute_roc_band(curve) for curve in curves),
    )


def bootstrap_ratios(
    parts: np.ndarray, wholes: np.ndarray, patients: np.ndarray, n_resamples: int = 1000, seed: int = 0
) -> tuple[Interval, ...]:
    """Compute intervals of ratios of sums over images, parts[:, k].sum() / wholes[:, k].sum(), from arrays [n, K]."""
    codes, n_patients = patient_codes(patients)
    sums = np.zeros((n_patients, 2 * parts.shape[1]))
    np.add.at(sums, codes, np.hstack([parts, wholes]))
    values = np.empty((n_resamples, parts.shape[1]))
    for rows, counts in resample_patients(n_patients, len(parts), n_resamples, seed):
        # The last bits of sums of fractions depend on this memory layout; keep it, so that reported numbers stay.
        drawn = counts.astype(np.float64, order="F") @ sums
        values[rows] = divide_or_nan(*np.hsplit(drawn, 2))
    return tuple(percentile_interval(column) for column in values.T)


def resample_patients(
    n_patients: int, n_images: int, n_resamples: int, seed: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield chunks of resamples: their rows in the result, and each patient's number of draws, int32 [b, patients]."""
    rng = np.random.default_rng(seed)
    chunk = int(np.clip(_CELLS // max(n_images, n_patients, 1), 1, 128))
    for start in range(0, n_resamples, chunk):
        size = min(chunk, n_resamples - start)
        # Such counts are multinomial; with many patients this is faster than `rng.multinomial`. Chunks change no draw.
        draws = rng.integers(0, n_patients, (size, n_patients)) + n_patients * np.arange(size)[:, None]
        counts = np.bincount(draws.ravel(), minlength=size * n_patients)
        yield slice(start, start + size), counts.astype(np.int32).reshape(size, n_patients)


def resample_counts(
    cells: np.ndarray, codes: np.ndarray, shape: tuple[int, int], n_resamples: int, seed: int
) -> np.ndarray:
    """Count images per cell in each resample, float64 [n_resamples, cells].

    Entry i of [m] is an image of the patient `codes[i]` in the cell `cells[i]`; `shape` is (cells, patients).
    """
    from scipy.sparse import csr_array  # slow to import

    counted = csr_array((np.ones(len(cells)), (cells, codes)), shape=shape)
    values = np.empty((n_resamples, shape[0]))
    for rows, drawn in resample_patients(shape[1], shape[1], n_resamples, seed):
        values[rows] = (counted @ np.ascontiguousarray(drawn.T, dtype=np.float64)).T
    return values


def _rank(labels: np.ndarray, scores: np.ndarray, codes: np.ndarray) -> Ranking | None:
    """Rank the labelled and scored images of one finding; None if a class is missing."""
    usable = ~np.isnan(scores.astype(np.float64)) & (labels >= 0)
    y, s = metrics.check_scores(labels[usable], scores[usable])
    if metrics.undefined_reason(y) is not None:
        return None
    codes = codes[usable]
    order = np.argsort(-s, kind="stable")
    positive, negative = order[y[order]], order[~y[order]]
    values, negative_values = -s[positive], -s[negative]
    ends = np.flatnonzero(np.concatenate([values[1:] != values[:-1], [True]]))
    return Ranking(
        positive_codes=codes[positive],
        negative_codes=codes[negative],
        ends=ends,
        before=np.searchsorted(negative_values, values[ends], side="left"),
        upto=np.searchsorted(negative_values, values[ends], side="right"),
    )


class _PatientSums:
    """One finding's confusion counts and squared errors, summed over each patient's images."""

    def __init__(self, labels: np.ndarray, derived: DerivedOutputs, codes: np.ndarray, n_patients: int, f: int) -> None:
        y, flags, p = labels[:, f], derived.flags[:, f], derived.calibrated[:, f].astype(np.float64)
        self._prevalence = float(derived.assumed_prevalence[f])
        judged = (y >= 0) & (flags >= 0)
        # 0 true negative, 1 false positive, 2 false negative, 3 true positive
        kind = 2 * (y[judged] == 1) + (flags[judged] > 0)
        counts = np.bincount(4 * codes[judged] + kind, minlength=4 * n_patients)
        self._cells = counts.reshape(n_patients, 4).astype(np.float64)
        known = (y >= 0) & ~np.isnan(p)
        self._errors = _sum_errors(y[known] == 1, p[known], codes[known], n_patients)

    def compute(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """Compute rates and probability metrics, float64 [b], NaN if undefined, from draws float64 [b, patients]."""
        tn, fp, fn, tp = (drawn @ self._cells).T
        cells = metrics.Confusion(tp, fp, tn, fn)
        sums = metrics.ErrorSums(*(drawn @ self._errors).T)
        return {
            rate.key: rate.value(cells, self._prevalence)
            for rate in metrics.RATE_METRICS
            if not (rate.at_prevalence and np.isnan(self._prevalence))
        } | {metric.key: metric.resample(sums) for metric in metrics.PROBABILITY_METRICS if metric.resample}


def _sum_errors(y: np.ndarray, p: np.ndarray, codes: np.ndarray, n_patients: int) -> np.ndarray:
    """Return the number of images and the sum of squared errors of each patient, float64 [patients, 2]."""
    metrics.check_probabilities(p)
    images = np.bincount(codes, minlength=n_patients)
    squared = np.bincount(codes, weights=(p - y) ** 2, minlength=n_patients)
    return np.column_stack([images, squared])


def _compute_mean_interval(drawn: np.ndarray, weights: Sequence[int] | None = None) -> Interval:
    """Compute the interval of the mean over columns of drawn [n_resamples, F]; a NaN makes the mean undefined."""
    if not drawn.shape[1]:
        return Interval(None, None, len(drawn), "no finding has both positive and negative images")
    return percentile_interval(np.average(drawn, axis=1, weights=weights))


def _compute_roc_band(curve: np.ndarray) -> RocBand | None:
    usable = curve[~np.isnan(curve).any(axis=1)]
    if len(usable) < MIN_RESAMPLES:
        return None
    low, high = np.percentile(usable, [2.5, 97.5], axis=0)
    return RocBand(np.linspace(0.0, 1.0, ROC_GRID), low, high)


def _check_table(labels: np.ndarray, scores: np.ndarray, patients: np.ndarray) -> None:
    if labels.ndim != 2 or labels.shape != scores.shape or len(patients) != len(labels):
        raise ValueError(f"labels {labels.shape}, scores {scores.shape} and {len(patients)} patients do not fit")


def _for_each_column(pool: ThreadPoolExecutor, fill: Callable[..., None], count: int, *chunk: object) -> None:
    """Call fill(f, *chunk) for f < count in parallel; raise the first error."""
    for _ in pool.map(lambda f: fill(f, *chunk), range(count)):
        pass
