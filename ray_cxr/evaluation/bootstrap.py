"""Patient-level bootstrap: 95% percentile intervals from resampled patients (Efron 1979; clusters drawn whole).

Images of one patient are not independent. Each resample draws as many patients as there are, with replacement, and
weights a patient's images by the number of draws. All functions here draw the same resamples for the same patients,
number of resamples and seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.intervals import MIN_RESAMPLES, Interval, patient_codes, percentile_interval
from ray_cxr.evaluation.roc_steps import Ranking

#: Weights held at once per thread, to bound memory: 4 Mi int32, and a few copies of that size.
_CELLS = 4 << 20
#: Findings processed at once. numpy releases the GIL in all slow operations here.
THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False)
class ResampledAuroc:
    """AUROC in each resample."""

    values: np.ndarray  # float64 [n_resamples, F]; NaN if a class is missing from the column
    defined: np.ndarray  # bool [F], columns with both classes in the sample
    n_patients: int


@dataclass(frozen=True, eq=False)
class RocBand:
    """Pointwise 95% intervals of sensitivity at each false positive rate, float64 [roc_grid]; less than 95% of whole
    curves lie inside.
    """

    false_positive_rate: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, eq=False)
class DerivedOutputs:
    """Optional inputs of `bootstrap_findings`."""

    flags: np.ndarray | None = None  # int8 [n, F], 1 flagged, 0 not, negative if there is no operating point
    calibrated: np.ndarray | None = None  # probabilities [n, F] in 0..1, NaN if missing
    assumed_prevalence: np.ndarray | None = None  # float [F], for predictive values, taken as exact; NaN if missing


@dataclass(frozen=True, eq=False)
class BootstrapFindings:
    """Intervals of all metrics from one set of resamples."""

    findings: tuple[Mapping[str, Interval], ...]  # per column, an interval for each key of `metrics.METRICS`
    macro: Mapping[str, Interval]  # intervals of the means of each key of `metrics.RANKING_METRICS`
    weighted: Mapping[str, Interval]  # the same means, weighted by the numbers of positive images in the sample
    roc: tuple[RocBand | None, ...]  # per column; None without an interval, or if `roc_grid` is 0
    counted: tuple[int, ...]  # columns that `macro` and `weighted` average
    n_patients: int
    n_resamples: int
    seed: int


def resampled_aurocs(
    labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, n_resamples: int = 1000, seed: int = 0
) -> ResampledAuroc:
    """Compute the AUROC of each column in each resample. Columns share resamples, so they can be subtracted.

    Labels [n, F] are 1 or 0, NaN or negative if not labelled; scores [n, F] are NaN if missing. The same seed gives the
    same numbers, bit for bit.
    """
    labels, scores = _check_table(labels, scores, patients, n_resamples)
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
    return ResampledAuroc(values, np.array([one is not None for one in rankings], dtype=bool), n_patients)


def bootstrap_findings(
    labels: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    derived: DerivedOutputs | None = None,
    *,
    macro: np.ndarray | None = None,
    roc_grid: int = 101,
    n_resamples: int = 1000,
    seed: int = 0,
) -> BootstrapFindings:
    """Compute intervals of all metrics of each finding, and of their means.

    In each resample a metric equals what `metrics` computes from the resample's images. A resample that leaves it
    undefined (a class is lost, nothing is flagged) is left out of its percentiles and counted. A mean leaves out
    resamples in which any of its findings is undefined: a mean over fewer findings is another quantity.

    Percentiles do not correct bias. The expected calibration error takes absolute values of partly noise, so it is too
    high in small samples and higher in resamples: its interval may lie above the value, and rarely reaches 0 even with
    perfect calibration. Resampled average precision is slightly high because repeated images share a threshold. With
    few positive patients all intervals are too narrow: in simulations those of AUROC covered the truth in about 95% of
    cases with 160 positive patients, 93% with 20, 90% with 10 and 85% with 5.

    Up to four threads share the work; each needs about 100 MB beyond the arguments.

    Args:
        labels, scores, patients: see `resampled_aurocs`.
        derived: metrics without their input have no interval.
        macro: bool [F], findings that the means count if defined; default all.
        roc_grid: number of false positive rates from 0 to 1 for the ROC band, along the curve of straight lines whose
            area is AUROC; 0 for no bands.
    """
    labels, scores = _check_table(labels, scores, patients, n_resamples)
    if roc_grid < 0 or roc_grid == 1:
        raise ValueError(f"roc_grid is {roc_grid}; it must be 0, or at least 2 for both ends")
    derived = derived or DerivedOutputs()
    count = labels.shape[1]
    for name, value in (("assumed_prevalence", derived.assumed_prevalence), ("macro", macro)):
        if value is not None and np.shape(value) != (count,):
            raise ValueError(f"{name} has the shape {np.shape(value)}; there are {count} findings")
    codes, n_patients = patient_codes(patients)
    rankings = [_rank(labels[:, f], scores[:, f], codes) for f in range(count)]
    sums = [_PatientSums(labels, derived, codes, n_patients, f) for f in range(count)]
    keys = [metric.key for metric in metrics.METRICS]
    values = {key: np.full((n_resamples, count), np.nan) for key in keys}
    curves = np.full((count, n_resamples, roc_grid), np.nan)

    def fill(f: int, rows: slice, counts: np.ndarray, drawn: np.ndarray) -> None:
        for key, column in sums[f].compute(drawn).items():
            values[key][rows, f] = column
        ranking = rankings[f]
        if ranking is not None:
            steps = ranking.steps(counts)
            for metric in metrics.RANKING_METRICS:
                values[metric.key][rows, f] = metric.resample(steps)
            if roc_grid:
                curves[f, rows] = steps.sensitivities(roc_grid)

    with ThreadPoolExecutor(THREADS) as pool:
        for rows, counts in resample_patients(n_patients, len(labels), n_resamples, seed):
            _for_each_column(pool, fill, count, rows, counts, counts.astype(np.float64))
    chosen = np.ones(count, dtype=bool) if macro is None else np.asarray(macro, dtype=bool)
    counted = np.array([f for f in range(count) if chosen[f] and rankings[f] is not None], dtype=np.int64)
    positives = np.array([len(one.positive_codes) if one is not None else 0 for one in rankings])[counted]
    ranking_values = {metric.key: values[metric.key][:, counted] for metric in metrics.RANKING_METRICS}
    return BootstrapFindings(
        findings=tuple({key: sums[f].interval(key, values[key][:, f]) for key in keys} for f in range(count)),
        macro={key: _compute_mean_interval(drawn) for key, drawn in ranking_values.items()},
        weighted={key: _compute_mean_interval(drawn, positives) for key, drawn in ranking_values.items()},
        roc=tuple(_compute_roc_band(curve) for curve in curves),
        counted=tuple(int(f) for f in counted),
        n_patients=n_patients,
        n_resamples=n_resamples,
        seed=seed,
    )


def bootstrap_ratios(
    parts: np.ndarray, wholes: np.ndarray, patients: np.ndarray, n_resamples: int = 1000, seed: int = 0
) -> tuple[Interval, ...]:
    """Compute intervals of ratios of sums over images, parts[:, k].sum() / wholes[:, k].sum(), such as sensitivity."""
    parts, wholes = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    if parts.ndim != 2 or parts.shape != wholes.shape or len(patients) != len(parts):
        raise ValueError(f"parts {parts.shape}, wholes {wholes.shape} and {len(patients)} patients do not fit")
    codes, n_patients = patient_codes(patients)
    sums = np.zeros((n_patients, 2 * parts.shape[1]))
    np.add.at(sums, codes, np.hstack([parts, wholes]))
    values = np.full((n_resamples, parts.shape[1]), np.nan)
    for rows, counts in resample_patients(n_patients, len(parts), n_resamples, seed):
        # The last bits of sums of fractions depend on this memory layout; keep it, so that reported numbers stay.
        drawn = counts.astype(np.float64, order="F") @ sums
        part, whole = np.hsplit(drawn, 2)
        np.divide(part, whole, out=values[rows], where=whole > 0)
    return tuple(percentile_interval(column) for column in values.T)


def resample_patients(
    n_patients: int, n_images: int, n_resamples: int, seed: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield chunks of resamples: their rows in the result, and each patient's number of draws, int32 [b, patients]."""
    rng = np.random.default_rng(seed)
    chunk = int(np.clip(_CELLS // max(n_images, n_patients, 1), 1, 128))
    for start in range(0, n_resamples, chunk):
        size = min(chunk, n_resamples - start)
        # Counting draws samples a multinomial, faster than numpy's for many classes. The draws do not depend on chunk.
        draws = rng.integers(0, n_patients, (size, n_patients)) + n_patients * np.arange(size)[:, None]
        counts = np.bincount(draws.ravel(), minlength=size * n_patients)
        yield slice(start, start + size), counts.astype(np.int32).reshape(size, n_patients)


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
    """One finding's confusion counts and calibration errors, summed over each patient's images."""

    def __init__(self, labels: np.ndarray, derived: DerivedOutputs, codes: np.ndarray, n_patients: int, f: int) -> None:
        y = labels[:, f]
        prevalence = derived.assumed_prevalence
        self._prevalence = np.nan if prevalence is None else float(np.asarray(prevalence)[f])
        if not (np.isnan(self._prevalence) or 0.0 <= self._prevalence <= 1.0):
            raise ValueError(f"the prevalence {self._prevalence} of column {f} must lie in 0..1")
        self._cells = self._errors = None  # float64 [patients, 4] and [patients, 2 + bins]
        if derived.flags is not None:
            flags = _select_column(derived.flags, labels, f, "flags")
            rows = (y >= 0) & (flags >= 0)
            if rows.any():
                # 0 true negative, 1 false positive, 2 false negative, 3 true positive
                kind = 2 * (y[rows] == 1) + (flags[rows] > 0)
                counts = np.bincount(4 * codes[rows] + kind, minlength=4 * n_patients)
                self._cells = counts.reshape(n_patients, 4).astype(np.float64)
        if derived.calibrated is not None:
            p = _select_column(derived.calibrated, labels, f, "calibrated").astype(np.float64)
            rows = (y >= 0) & ~np.isnan(p)
            if rows.any():
                self._errors = _sum_errors(y[rows] == 1, p[rows], codes[rows], n_patients)

    def interval(self, key: str, values: np.ndarray) -> Interval:
        """Compute a metric's interval from its resampled values, or explain which input is missing."""
        rates = {metric.key: metric for metric in metrics.RATE_METRICS}
        missing = None
        if key in rates and self._cells is None:
            missing = "no flags on labelled images"
        elif key in rates and rates[key].at_prevalence and np.isnan(self._prevalence):
            missing = "no assumed prevalence"
        elif self._errors is None and any(key == metric.key for metric in metrics.PROBABILITY_METRICS):
            missing = "no calibrated probabilities of labelled images"
        return percentile_interval(values) if missing is None else Interval(None, None, len(values), missing)

    def compute(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """Compute rates and probability metrics, float64 [b], NaN if undefined, from draws float64 [b, patients]."""
        values: dict[str, np.ndarray] = {}
        if self._cells is not None:
            tn, fp, fn, tp = (drawn @ self._cells).T
            cells = metrics.Confusion(tp, fp, tn, fn)
            for rate in metrics.RATE_METRICS:
                if not (rate.at_prevalence and np.isnan(self._prevalence)):
                    values[rate.key] = rate.value(cells, self._prevalence)
        if self._errors is not None:
            columns = drawn @ self._errors
            sums = metrics.ErrorSums(columns[:, 0], columns[:, 1], columns[:, 2:])
            values |= {metric.key: metric.resample(sums) for metric in metrics.PROBABILITY_METRICS}
        return values


def _sum_errors(y: np.ndarray, p: np.ndarray, codes: np.ndarray, n_patients: int) -> np.ndarray:
    """Return per patient: images, squared errors, errors p - y in each bin; float64 [patients, 2 + bins]."""
    if ((p < 0) | (p > 1)).any():
        raise ValueError("calibrated probabilities must lie in 0..1")
    bins = metrics.CALIBRATION_BINS
    cell = bins * codes + metrics.probability_bins(p)
    by_bin = np.bincount(cell, weights=p - y, minlength=bins * n_patients).reshape(n_patients, bins)
    images = np.bincount(codes, minlength=n_patients)
    squared = np.bincount(codes, weights=(p - y) ** 2, minlength=n_patients)
    return np.column_stack([images, squared, by_bin])


def _select_column(table: np.ndarray, labels: np.ndarray, f: int, name: str) -> np.ndarray:
    table = np.asarray(table)
    if table.shape != labels.shape:
        raise ValueError(f"labels {labels.shape} and {name} {table.shape} do not fit")
    return table[:, f]


def _compute_mean_interval(drawn: np.ndarray, weights: np.ndarray | None = None) -> Interval:
    """Compute the interval of the mean over columns of drawn [n_resamples, F]; a NaN makes the mean undefined."""
    if not drawn.shape[1]:
        return Interval(None, None, len(drawn), "no finding has both positive and negative images")
    return percentile_interval(np.average(drawn, axis=1, weights=weights))


def _compute_roc_band(curve: np.ndarray) -> RocBand | None:
    usable = curve[~np.isnan(curve).any(axis=1)]
    if not curve.shape[1] or len(usable) < MIN_RESAMPLES:
        return None
    low, high = np.percentile(usable, [2.5, 97.5], axis=0)
    return RocBand(np.linspace(0.0, 1.0, curve.shape[1]), low, high)


def _check_table(
    labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, n_resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 2 or labels.shape != scores.shape or len(patients) != len(labels):
        raise ValueError(f"labels {labels.shape}, scores {scores.shape} and {len(patients)} patients do not fit")
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples}; it must be at least 1")
    return labels, scores


def _for_each_column(pool: ThreadPoolExecutor, fill: Callable[..., None], count: int, *chunk: object) -> None:
    """Call fill(f, *chunk) for f < count in parallel; raise the first error."""
    for _ in pool.map(lambda f: fill(f, *chunk), range(count)):
        pass
