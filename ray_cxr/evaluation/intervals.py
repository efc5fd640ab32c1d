"""How sure a number is: the patient-level bootstrap, and DeLong's variance beside it.

Images of one patient are not independent, so the bootstrap draws patients and takes all images of each; its
percentiles are the interval to quote. DeLong's takes images as independent and is mostly too narrow here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ray_cxr.evaluation import metrics

#: Fewer usable resamples than this have no 2.5th percentile apart from their minimum.
MIN_RESAMPLES = 40
#: Weights held at once, which bounds memory: 4 Mi int32 and an int64 copy or two.
_CELLS = 4 << 20


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
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 2 or labels.shape != scores.shape or len(patients) != len(labels):
        raise ValueError(f"labels {labels.shape}, scores {scores.shape} and {len(patients)} patients do not fit")
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples}; it must be at least 1")
    codes, n_patients = patient_codes(patients)
    plans = [_plan(labels[:, f], scores[:, f], codes) for f in range(labels.shape[1])]
    values = np.full((n_resamples, len(plans)), np.nan)
    for rows, counts in _resamples(n_patients, len(labels), n_resamples, seed):
        for f, plan in enumerate(plans):
            if plan is not None:
                values[rows, f] = plan.aurocs(counts)
    return ResampledAuroc(values, np.array([plan is not None for plan in plans], dtype=bool), n_patients)


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
        drawn = counts.T.astype(np.float64) @ sums
        part, whole = drawn[:, : parts.shape[1]], drawn[:, parts.shape[1] :]
        np.divide(part, whole, out=values[rows], where=whole > 0)
    return tuple(percentile_interval(values[:, k]) for k in range(parts.shape[1]))


def percentile_interval(values: np.ndarray) -> Interval:
    """The 95% percentile interval of a quantity's resampled values [n]; NaN where it was undefined."""
    usable = values[~np.isnan(values)]
    undefined = len(values) - len(usable)
    if len(usable) < MIN_RESAMPLES:
        return Interval(None, None, undefined, f"{len(usable)} usable resamples; {MIN_RESAMPLES} are needed")
    low, high = np.percentile(usable, [2.5, 97.5])
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
    positive, negative = s[y], s[~y]
    m, n = len(positive), len(negative)
    if m < 2 or n < 2:
        return None
    ranks = _midranks(np.concatenate([positive, negative]))
    # A positive's component is the share of negatives below it; a negative's, of positives above it.
    v10 = (ranks[:m] - _midranks(positive)) / n
    v01 = 1.0 - (ranks[m:] - _midranks(negative)) / m
    variance = v10.var(ddof=1) / m + v01.var(ddof=1) / n
    return float(v10.mean()), float(variance)


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


@dataclass(frozen=True)
class _Plan:
    """One finding's images, sorted once, so that a resample costs one pass over them."""

    positive_codes: np.ndarray
    negative_codes: np.ndarray
    below: np.ndarray
    below_or_tied: np.ndarray

    def aurocs(self, counts: np.ndarray) -> np.ndarray:
        """AUROC float64[b] of each column of counts int32[patients, b]; NaN where a class has no weight.

        Whole numbers up to the division, ties one half, exactly as `metrics.auroc` with these weights.
        """
        weights = counts[self.positive_codes]
        cumulated = np.zeros((len(self.negative_codes) + 1, counts.shape[1]), dtype=np.int32)
        np.cumsum(counts[self.negative_codes], axis=0, out=cumulated[1:])
        doubled = np.zeros(counts.shape[1], dtype=np.int64)
        step = max(1, _CELLS // counts.shape[1])
        for start in range(0, len(weights), step):
            part = slice(start, start + step)
            wins = cumulated[self.below[part]].astype(np.int64) + cumulated[self.below_or_tied[part]]
            doubled += np.einsum("ib,ib->b", wins, weights[part], dtype=np.int64)
        total = weights.sum(axis=0, dtype=np.int64) * cumulated[-1].astype(np.int64)
        result = np.full(counts.shape[1], np.nan)
        np.divide(doubled, 2.0 * total, out=result, where=total > 0)
        return result


def _plan(labels: np.ndarray, scores: np.ndarray, codes: np.ndarray) -> _Plan | None:
    kept = ~np.isnan(scores.astype(np.float64)) & (labels >= 0)
    y, s = metrics.checked(labels[kept], scores[kept])
    if metrics.undefined_reason(y) is not None:
        return None
    codes = codes[kept]
    order = np.argsort(s[~y], kind="stable")
    negatives = s[~y][order]
    return _Plan(
        positive_codes=codes[y],
        negative_codes=codes[~y][order],
        below=np.searchsorted(negatives, s[y], side="left"),
        below_or_tied=np.searchsorted(negatives, s[y], side="right"),
    )


def _resamples(n_patients: int, n_images: int, n_resamples: int, seed: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Chunks of resamples: rows of the result, and how often each patient was drawn, int32[patients, b]."""
    rng = np.random.default_rng(seed)
    chunk = int(np.clip(_CELLS // max(n_images, n_patients, 1), 1, 128))
    for start in range(0, n_resamples, chunk):
        size = min(chunk, n_resamples - start)
        counts = np.empty((size, n_patients), dtype=np.int32)
        for row in range(size):
            # Counted draws are a multinomial sample, and faster than numpy's multinomial for many classes.
            counts[row] = np.bincount(rng.integers(0, n_patients, n_patients), minlength=n_patients)
        yield slice(start, start + size), np.ascontiguousarray(counts.T)


def _midranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, tied values sharing the mean of theirs; float64."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def _expit(x: float) -> float:
    # Written for either sign, so that exp never overflows.
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
