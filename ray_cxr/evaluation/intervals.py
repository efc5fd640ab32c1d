"""How sure a number is: the patient-level bootstrap, and DeLong's variance beside it.

Images of one patient are not independent, so the bootstrap draws patients and takes all images of each; its
percentiles are the interval to quote. DeLong's takes images as independent and is mostly too narrow here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

import numpy as np

from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.roc_steps import Ranking

#: Fewer usable resamples than this have no 2.5th percentile apart from their minimum.
MIN_RESAMPLES = 40
#: Weights held at once by a thread, which bounds memory: 4 Mi int32, and a few copies of that size at most.
_CELLS = 4 << 20
#: Findings worked on at once. numpy lets go of the interpreter in all that takes long here.
_THREADS = min(4, os.cpu_count() or 1)
_One = TypeVar("_One")


@dataclass(frozen=True)
class Interval:
    """One bootstrap interval.

    Attributes:
        low, high: the 2.5th and 97.5th percentiles, or None.
        undefined: resamples left out because the quantity was undefined in them.
        reason: why low and high are None; None otherwise.
    """

    low: float | None
    high: float | None
    undefined: int
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class ResampledAuroc:
    """AUROC in each resample.

    Attributes:
        values: float64 [n_resamples, F]; NaN where a column has lost a class, or never had both.
        defined: bool [F], which columns have both classes in the images as they are.
        n_patients: how many patients each resample draws.
    """

    values: np.ndarray
    defined: np.ndarray
    n_patients: int


@dataclass(frozen=True)
class BootstrapAuroc:
    """Intervals per column of the scores, in their order, and of the macro mean."""

    findings: tuple[Interval, ...]
    macro: Interval
    n_patients: int
    n_resamples: int
    seed: int


@dataclass(frozen=True, eq=False)
class RocBand:
    """Where the ROC curve lies, point by point: at each false positive rate a 95% interval of the sensitivity.

    Attributes:
        false_positive_rate: float64 [roc_grid], from 0 to 1.
        low, high: float64 [roc_grid]. Each point has its own interval; 95% of all curves do not lie inside as a whole.
    """

    false_positive_rate: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, eq=False)
class BootstrapFindings:
    """Intervals of everything that a report says of a finding, from one set of resamples.

    Attributes:
        findings: per column, in their order, an interval for each key of `metrics.METRICS`.
        macro: intervals of the plain means of `auroc` and of `average_precision`.
        weighted: the same means, each finding weighted by its positive images in the sample as it is.
        roc: per column its band; None without an interval, or where no grid was asked for.
        counted: columns that `macro` and `weighted` are means of.
        n_patients, n_resamples, seed: of the bootstrap.
    """

    findings: tuple[Mapping[str, Interval], ...]
    macro: Mapping[str, Interval]
    weighted: Mapping[str, Interval]
    roc: tuple[RocBand | None, ...]
    counted: tuple[int, ...]
    n_patients: int
    n_resamples: int
    seed: int


def patient_codes(patients: np.ndarray) -> tuple[np.ndarray, int]:
    """Patients as whole numbers.

    Args:
        patients: ids [n] of any kind; None and NaN mean an image whose patient is not known, which then
            counts as a patient of its own.

    Returns:
        int64[n] in 0..k-1, numbered by first appearance, and k.
    """
    known: dict[object, int] = {}
    codes = np.empty(len(patients), dtype=np.int64)
    count = 0
    for row, patient in enumerate(np.asarray(patients, dtype=object)):
        if patient is None or patient != patient:
            codes[row] = count
            count += 1
            continue
        code = known.setdefault(patient, count)
        codes[row] = code
        count += code == count
    return codes, count


def bootstrap_auroc(
    labels: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    n_resamples: int = 1000,
    seed: int = 0,
    macro: np.ndarray | None = None,
) -> BootstrapAuroc:
    """95% percentile intervals of AUROC from resampled patients (Efron 1979; clusters drawn whole).

    Each resample draws as many patients as there are, with replacement, once for all findings; a patient's
    images all get the number of times the patient was drawn as their weight. A resample in which a finding
    has lost a class is left out of that finding's percentiles and counted; the macro mean leaves a resample
    out when any of its findings is undefined in it, because a mean over fewer findings is another quantity.

    Args:
        labels: [n, F], 1, 0, and NaN or a negative number where there is no label.
        scores: [n, F], NaN where there is no score.
        patients: ids [n]; see `patient_codes`.
        n_resamples: how many; `MIN_RESAMPLES` usable ones are needed for an interval.
        seed: the same seed gives the same intervals, bit for bit.
        macro: bool [F], which findings the macro mean counts if defined; default all.

    Raises:
        ValueError: shapes that do not fit, a label that is neither 0 nor 1, n_resamples < 1.
    """
    drawn = resampled_aurocs(labels, scores, patients, n_resamples, seed)
    counted = drawn.defined if macro is None else drawn.defined & np.asarray(macro, dtype=bool)
    means = drawn.values[:, counted].mean(axis=1) if counted.any() else np.full(n_resamples, np.nan)
    return BootstrapAuroc(
        findings=tuple(percentile_interval(column) for column in drawn.values.T),
        macro=percentile_interval(means),
        n_patients=drawn.n_patients,
        n_resamples=n_resamples,
        seed=seed,
    )


def resampled_aurocs(
    labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, n_resamples: int = 1000, seed: int = 0
) -> ResampledAuroc:
    """AUROC of each column in each resample of patients; what `bootstrap_auroc` takes its percentiles of.

    All columns share their resamples, so columns may be subtracted within a resample.

    Args:
        labels, scores, patients, n_resamples, seed: as `bootstrap_auroc`.

    Raises:
        ValueError: as `bootstrap_auroc`.
    """
    labels, scores = _checked_table(labels, scores, patients, n_resamples)
    codes, n_patients = patient_codes(patients)
    rankings = [_ranking(labels[:, f], scores[:, f], codes) for f in range(labels.shape[1])]
    values = np.full((n_resamples, len(rankings)), np.nan)
    with ThreadPoolExecutor(_THREADS) as pool:
        for rows, counts in _resamples(n_patients, len(labels), n_resamples, seed):
            drawn = counts.T

            def fill(f: int, rows: slice = rows, drawn: np.ndarray = drawn) -> None:
                ranking = rankings[f]
                if ranking is not None:
                    values[rows, f] = ranking.steps(drawn).aurocs()

            _each(pool, fill, range(len(rankings)))
    return ResampledAuroc(values, np.array([one is not None for one in rankings], dtype=bool), n_patients)


def bootstrap_findings(
    labels: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray,
    *,
    flags: np.ndarray | None = None,
    calibrated: np.ndarray | None = None,
    assumed_prevalence: np.ndarray | None = None,
    macro: np.ndarray | None = None,
    roc_grid: int = 101,
    n_resamples: int = 1000,
    seed: int = 0,
) -> BootstrapFindings:
    """95% percentile intervals of all that is measured of findings, from one set of resampled patients.

    The resamples are those of `bootstrap_auroc` with the same patients, number and seed; see there. A quantity is in
    each resample what `metrics` and `calibration` give for the resample's images: ties count one half in AUROC, tied
    scores are one threshold of average precision. Where a resample leaves a quantity undefined (a class is lost,
    nothing is flagged), it is left out of that quantity's percentiles and counted.

    Percentiles do not mend bias. The expected calibration error takes absolute values of what is partly noise, so it
    is too high in small samples and higher in resamples of them: its interval may lie above the value itself, and
    hardly reaches 0 even where calibration is perfect. Its bins are of equal width and so the same in each resample.
    The resampled average precision, too, comes out a little high, as repeated images share a threshold. With few
    positive patients all intervals are too narrow: in simulations those of AUROC covered the truth in about 95% of
    cases with 160 positive patients, 93% with 20, 90% with 10 and 85% with 5.

    The work is shared among up to four threads; memory beyond the arguments stays at some 100 MB for each.

    Args:
        labels: [n, F], 1, 0, and NaN or a negative number where there is no label.
        scores: [n, F], larger is more likely, NaN where there is none.
        patients: ids [n]; see `patient_codes`.
        flags: int8 [n, F], 1 flagged, 0 not, negative where not judged; None without any.
        calibrated: probabilities [n, F] in 0..1, NaN where there is none; None without any.
        assumed_prevalence: float [F] in 0..1, of the population that predictive values shall hold for, NaN where none
            is given; None without any. It is taken as exact.
        macro: bool [F], which findings the means count if defined; default all.
        roc_grid: false positive rates 0, 1 / (roc_grid - 1), ..., 1 at which the ROC band is given, along the curve
            of straight lines that has AUROC as its area; 0 for no bands.
        n_resamples: how many; `MIN_RESAMPLES` usable ones are needed for an interval.
        seed: the same seed gives the same intervals.

    Raises:
        ValueError: shapes that do not fit, a label that is neither 0 nor 1, a probability or prevalence outside
            0..1, n_resamples < 1, roc_grid 1 or negative.
    """
    labels, scores = _checked_table(labels, scores, patients, n_resamples)
    if roc_grid < 0 or roc_grid == 1:
        raise ValueError(f"roc_grid is {roc_grid}; it must be 0, or at least 2 for both ends")
    count = labels.shape[1]
    for name, given in (("assumed_prevalence", assumed_prevalence), ("macro", macro)):
        if given is not None and np.shape(given) != (count,):
            raise ValueError(f"{name} has the shape {np.shape(given)}; there are {count} findings")
    codes, n_patients = patient_codes(patients)
    rankings = [_ranking(labels[:, f], scores[:, f], codes) for f in range(count)]
    tables = [_Sums(labels, flags, calibrated, assumed_prevalence, codes, n_patients, f) for f in range(count)]
    keys = [metric.key for metric in metrics.METRICS]
    values = {name: np.full((n_resamples, count), np.nan) for name in keys}
    curves = np.full((count, n_resamples, roc_grid), np.nan)
    with ThreadPoolExecutor(_THREADS) as pool:
        for rows, counts in _resamples(n_patients, len(labels), n_resamples, seed):
            drawn = counts.T
            drawn_float = drawn.astype(np.float64)

            def fill(
                f: int, rows: slice = rows, drawn: np.ndarray = drawn, drawn_float: np.ndarray = drawn_float
            ) -> None:
                for name, column in tables[f].ratios(drawn_float).items():
                    values[name][rows, f] = column
                ranking = rankings[f]
                if ranking is not None:
                    steps = ranking.steps(drawn)
                    for metric in metrics.RANKING_METRICS:
                        values[metric.key][rows, f] = metric.resample(steps)
                    if roc_grid:
                        curves[f, rows] = steps.sensitivities(roc_grid)

            _each(pool, fill, range(count))
    chosen = np.ones(count, dtype=bool) if macro is None else np.asarray(macro, dtype=bool)
    counted = np.array([f for f in range(count) if chosen[f] and rankings[f] is not None], dtype=np.int64)
    weights = np.array([len(one.positive_codes) if one is not None else 0 for one in rankings])[counted]
    both = {name: values[name][:, counted] for name in ("auroc", "average_precision")}
    return BootstrapFindings(
        findings=tuple(
            {name: _explained(values[name][:, f], tables[f].missing(name)) for name in keys} for f in range(count)
        ),
        macro={name: _mean_interval(drawn) for name, drawn in both.items()},
        weighted={name: _mean_interval(drawn, weights) for name, drawn in both.items()},
        roc=tuple(_band(curve) for curve in curves),
        counted=tuple(int(f) for f in counted),
        n_patients=n_patients,
        n_resamples=n_resamples,
        seed=seed,
    )


def bootstrap_ratios(
    parts: np.ndarray, wholes: np.ndarray, patients: np.ndarray, n_resamples: int = 1000, seed: int = 0
) -> tuple[Interval, ...]:
    """95% percentile intervals of ratios of sums over images, such as sensitivity, from resampled patients.

    The resamples are those of `bootstrap_auroc` with the same patients, number and seed.

    Args:
        parts, wholes: numbers [n, K]; the ratio k is parts[:, k].sum() / wholes[:, k].sum().
        patients: ids [n]; see `patient_codes`.

    Raises:
        ValueError: shapes that do not fit.
    """
    parts, wholes = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    if parts.ndim != 2 or parts.shape != wholes.shape or len(patients) != len(parts):
        raise ValueError(f"parts {parts.shape}, wholes {wholes.shape} and {len(patients)} patients do not fit")
    codes, n_patients = patient_codes(patients)
    sums = np.zeros((n_patients, 2 * parts.shape[1]))
    np.add.at(sums, codes, np.hstack([parts, wholes]))
    values = np.full((n_resamples, parts.shape[1]), np.nan)
    for rows, counts in _resamples(n_patients, len(parts), n_resamples, seed):
        # The last bits of sums of fractions depend on this layout; with it, numbers stay as they were reported.
        drawn = counts.T.astype(np.float64, order="F") @ sums
        part, whole = drawn[:, : parts.shape[1]], drawn[:, parts.shape[1] :]
        np.divide(part, whole, out=values[rows], where=whole > 0)
    return tuple(percentile_interval(values[:, k]) for k in range(parts.shape[1]))


def percentile_interval(values: np.ndarray, *, certain: bool = False) -> Interval:
    """The 95% percentile interval of a quantity's resampled values [n]; NaN where it was undefined.

    Args:
        values: floats [n].
        certain: one value throughout is an interval of no width, as of the difference of a network to itself; of all
            else it is none, because resamples of a few images without an error are without one, too.
    """
    usable = values[~np.isnan(values)]
    undefined = len(values) - len(usable)
    if len(usable) < MIN_RESAMPLES:
        return Interval(None, None, undefined, f"{len(usable)} usable resamples; {MIN_RESAMPLES} are needed")
    low, high = np.percentile(usable, [2.5, 97.5])
    if np.ptp(usable) <= 1e-12 * max(1.0, float(np.abs(usable).max())) and not certain:  # equal but for rounding
        # Not certainty: a bootstrap cannot draw what it has not seen, such as a positive that is missed.
        return Interval(None, None, undefined, "every resample gives the same")
    return Interval(float(low), float(high), undefined)


def delong(y: np.ndarray, s: np.ndarray) -> tuple[float, float] | None:
    """AUROC and its variance with images taken as independent (DeLong, DeLong & Clarke-Pearson 1988).

    The structural components come from midranks in O(n log n) (Sun & Xu 2014).

    Args:
        y: labels [n], 0 or 1.
        s: scores [n].

    Returns:
        (AUROC, variance), float64; None with fewer than two positives or two negatives.

    Raises:
        ValueError: as `metrics.auroc`.
    """
    y, s = metrics.checked(y, s)
    parts = _components(y, s)
    if parts is None:
        return None
    v10, v01 = parts
    variance = v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01)
    return float(v10.mean()), float(variance)


def delong_paired(y: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, float, float] | None:
    """AUROC of two scores of the same images, and the variance of their difference (DeLong et al. 1988).

    Images are taken as independent, as in `delong`. The two curves are not: the variance of the difference is that
    of the differences of their structural components.

    Args:
        y: labels [n], 0 or 1.
        a, b: scores [n] of either.

    Returns:
        (AUROC of a, AUROC of b, variance of a - b), float64; None with fewer than two positives or two negatives.

    Raises:
        ValueError: as `metrics.auroc`.
    """
    y, a = metrics.checked(y, a)
    _, b = metrics.checked(y, b)
    first, second = _components(y, a), _components(y, b)
    if first is None or second is None:
        return None
    v10, v01 = first[0] - second[0], first[1] - second[1]
    variance = v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01)
    return float(first[0].mean()), float(second[0].mean()), float(variance)


def normal_p(difference: float, variance: float) -> float | None:
    """Two-sided p of a difference, normal around 0 with this variance if there is none; None without variance."""
    return math.erfc(abs(difference) / math.sqrt(2.0 * variance)) if variance > 0.0 else None


def delong_interval(auc: float, variance: float, level: float = 0.95) -> tuple[float, float] | None:
    """DeLong's interval, symmetric on the logit scale so that it stays inside 0..1.

    Returns:
        (low, high); None where the variance is 0 or AUROC is 0 or 1: the formula then knows no uncertainty.

    Raises:
        ValueError: `level` is not between 0 and 1.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}; it must lie between 0 and 1")
    if variance <= 0.0 or not 0.0 < auc < 1.0:
        return None
    centre = math.log(auc / (1.0 - auc))
    # The delta method: the derivative of logit at auc is 1 / (auc (1 - auc)).
    reach = NormalDist().inv_cdf(0.5 + level / 2.0) * math.sqrt(variance) / (auc * (1.0 - auc))
    return _expit(centre - reach), _expit(centre + reach)


def _ranking(labels: np.ndarray, scores: np.ndarray, codes: np.ndarray) -> Ranking | None:
    kept = ~np.isnan(scores.astype(np.float64)) & (labels >= 0)
    y, s = metrics.checked(labels[kept], scores[kept])
    if metrics.undefined_reason(y) is not None:
        return None
    codes = codes[kept]
    falling = -s
    order = np.argsort(falling, kind="stable")
    positive, negative = order[y[order]], order[~y[order]]
    values, tops = falling[positive], falling[negative]
    ends = np.flatnonzero(np.concatenate([values[1:] != values[:-1], [True]]))
    return Ranking(
        positive_codes=codes[positive],
        negative_codes=codes[negative],
        ends=ends,
        before=np.searchsorted(tops, values[ends], side="left"),
        upto=np.searchsorted(tops, values[ends], side="right"),
    )


class _Sums:
    """One finding's counts of flags and sums of errors, added up over each patient's images, float64 [patients, K]."""

    def __init__(
        self,
        labels: np.ndarray,
        flags: np.ndarray | None,
        calibrated: np.ndarray | None,
        assumed_prevalence: np.ndarray | None,
        codes: np.ndarray,
        n_patients: int,
        f: int,
    ) -> None:
        y = labels[:, f]
        known = y >= 0
        self._prevalence = np.nan if assumed_prevalence is None else float(np.asarray(assumed_prevalence)[f])
        if not (np.isnan(self._prevalence) or 0.0 <= self._prevalence <= 1.0):
            raise ValueError(f"the prevalence {self._prevalence} of column {f} must lie in 0..1")
        self._cells = self._errors = None
        if flags is not None:
            seen = known & (_column(flags, labels, f, "flags") >= 0)
            if seen.any():
                # 0 true negative, 1 false positive, 2 false negative, 3 true positive
                kind = 2 * (y[seen] == 1) + (np.asarray(flags)[seen, f] > 0)
                sums = np.bincount(4 * codes[seen] + kind, minlength=4 * n_patients)
                self._cells = sums.reshape(n_patients, 4).astype(np.float64)
        if calibrated is not None:
            p = _column(calibrated, labels, f, "calibrated").astype(np.float64)
            seen = known & ~np.isnan(p)
            if seen.any():
                self._errors = _errors(y[seen] == 1, p[seen], codes[seen], n_patients)

    def missing(self, name: str) -> str | None:
        """Return why the metric is undefined whatever the labels; None if it may be defined."""
        rates = {metric.key: metric for metric in metrics.RATE_METRICS}
        if name in rates and self._cells is None:
            return "no flags on labelled images"
        if name in rates and rates[name].at_prevalence and np.isnan(self._prevalence):
            return "no assumed prevalence"
        if name in {metric.key for metric in metrics.PROBABILITY_METRICS} and self._errors is None:
            return "no calibrated probabilities of labelled images"
        return None

    def ratios(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """Compute each metric that can be, float64 [b], NaN where undefined, from drawn float64 [b, patients]."""
        found: dict[str, np.ndarray] = {}
        if self._cells is not None:
            tn, fp, fn, tp = (drawn @ self._cells).T
            cells = metrics.Confusion(tp, fp, tn, fn)
            for rate in metrics.RATE_METRICS:
                if not (rate.at_prevalence and np.isnan(self._prevalence)):
                    found[rate.key] = rate.value(cells, self._prevalence)
        if self._errors is not None:
            columns = drawn @ self._errors
            sums = metrics.ErrorSums(columns[:, 0], columns[:, 1], columns[:, 2:])
            found |= {metric.key: metric.resample(sums) for metric in metrics.PROBABILITY_METRICS}
        return found


def _errors(y: np.ndarray, p: np.ndarray, codes: np.ndarray, n_patients: int) -> np.ndarray:
    """Images, squared errors and, bin by bin, errors p - y of each patient, float64 [patients, 2 + bins]."""
    if ((p < 0) | (p > 1)).any():
        raise ValueError("calibrated probabilities must lie in 0..1")
    bins = metrics.CALIBRATION_BINS
    place = metrics.probability_bins(p)
    gaps = np.bincount(bins * codes + place, weights=p - y, minlength=bins * n_patients)
    return np.column_stack(
        [
            np.bincount(codes, minlength=n_patients),
            np.bincount(codes, weights=(p - y) ** 2, minlength=n_patients),
            gaps.reshape(n_patients, bins),
        ]
    )


def _column(table: np.ndarray, labels: np.ndarray, f: int, what: str) -> np.ndarray:
    table = np.asarray(table)
    if table.shape != labels.shape:
        raise ValueError(f"labels {labels.shape} and {what} {table.shape} do not fit")
    return table[:, f]


def _explained(values: np.ndarray, missing: str | None) -> Interval:
    return percentile_interval(values) if missing is None else Interval(None, None, len(values), missing)


def _mean_interval(drawn: np.ndarray, weights: np.ndarray | None = None) -> Interval:
    """Of the mean over columns of drawn [n_resamples, F]; NaN in one of them is NaN in the mean."""
    if not drawn.shape[1]:
        return Interval(None, None, len(drawn), "no finding has both positive and negative images")
    return percentile_interval(np.average(drawn, axis=1, weights=weights))


def _band(curve: np.ndarray) -> RocBand | None:
    usable = curve[~np.isnan(curve).any(axis=1)]
    if not curve.shape[1] or len(usable) < MIN_RESAMPLES:
        return None
    low, high = np.percentile(usable, [2.5, 97.5], axis=0)
    return RocBand(np.linspace(0.0, 1.0, curve.shape[1]), low, high)


def _checked_table(
    labels: np.ndarray, scores: np.ndarray, patients: np.ndarray, n_resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 2 or labels.shape != scores.shape or len(patients) != len(labels):
        raise ValueError(f"labels {labels.shape}, scores {scores.shape} and {len(patients)} patients do not fit")
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples}; it must be at least 1")
    return labels, scores


def _each(pool: ThreadPoolExecutor, work: Callable[[_One], None], things: Iterable[_One]) -> None:
    """All done, or the first error raised."""
    for _ in pool.map(work, things):
        pass


def _resamples(n_patients: int, n_images: int, n_resamples: int, seed: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Chunks of resamples: rows of the result, and how often each patient was drawn, int32[patients, b]."""
    rng = np.random.default_rng(seed)
    chunk = int(np.clip(_CELLS // max(n_images, n_patients, 1), 1, 128))
    for start in range(0, n_resamples, chunk):
        size = min(chunk, n_resamples - start)
        # Counted draws are a multinomial sample, and faster than numpy's multinomial for many classes. Drawn at once
        # they are the numbers that row after row would be.
        draws = rng.integers(0, n_patients, (size, n_patients)) + n_patients * np.arange(size)[:, None]
        counts = np.bincount(draws.ravel(), minlength=size * n_patients).astype(np.int32).reshape(size, n_patients)
        yield slice(start, start + size), counts.T


def _components(y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """DeLong's structural components of the positives and of the negatives; None with fewer than two of either."""
    positive, negative = s[y], s[~y]
    m, n = len(positive), len(negative)
    if m < 2 or n < 2:
        return None
    ranks = _midranks(np.concatenate([positive, negative]))
    # A positive's component is the share of negatives below it; a negative's, of positives above it.
    return (ranks[:m] - _midranks(positive)) / n, 1.0 - (ranks[m:] - _midranks(negative)) / m


def _midranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, tied values sharing the mean of theirs; float64."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def _expit(x: float) -> float:
    # Written for either sign, so that exp never overflows.
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
