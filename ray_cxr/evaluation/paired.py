"""Differences of AUROC between two sets of scores of the same images, by paired patient bootstrap and DeLong's test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.evaluation import bootstrap, metrics
from ray_cxr.evaluation.delong import delong_paired, normal_p
from ray_cxr.evaluation.intervals import Patients, percentile_interval


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """AUROC, or macro AUROC, of two sets of scores of the same images; `reason` is set if a value is None."""

    a: float | None = None
    b: float | None = None
    difference: float | None = None  # a - b
    low: float | None = None  # 95% percentile interval of the difference over resampled patients
    high: float | None = None
    p: float | None = None  # two-sided bootstrap p value of no difference
    undefined: int  # number of resamples omitted because a finding had lost a class
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class PairedAuroc(PairedDifference):
    """Difference of macro AUROC, averaged over `columns`: those with both classes among their labels."""

    columns: tuple[int, ...]
    n_patients: int | None  # None if no image has a patient id
    n_resamples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class PairedFinding(PairedDifference):
    """Difference of one finding's AUROC."""

    delong_p: float | None = None  # two-sided, for correlated curves; too small if patients have several images
    n: int  # images with a label and both scores
    positives: int
    delong_reason: str | None = None  # why delong_p is None


@dataclass(frozen=True)
class PairedFindings:
    """Two sets of scores compared per column, in order, and in the macro mean; all from one set of resamples."""

    findings: tuple[PairedFinding, ...]
    macro: PairedAuroc


def paired_macro_auroc(
    labels: np.ndarray, a: np.ndarray, b: np.ndarray, patients: np.ndarray, n_resamples: int = 1000, seed: int = 0
) -> PairedAuroc:
    """Compare the macro AUROC of two sets of scores over all columns, as `paired_findings` does."""
    pair = _Pair(labels, a, b, patients, n_resamples, seed)
    return _compare_means(pair, pair.defined)


def paired_findings(
    labels: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    patients: np.ndarray,
    *,
    macro: np.ndarray,
    n_resamples: int = 1000,
    seed: int = 0,
) -> PairedFindings:
    """Compare the AUROC of two sets of scores, per finding and in the mean, in the same resamples of patients.

    All differences are a - b. p values are not adjusted for the number of findings: without any true difference the
    smallest of 14 is below 0.05 in about half of all comparisons.

    Args:
        labels: [n, F], 1 or 0; NaN or negative if not labelled.
        a, b: scores [n, F], NaN if missing; a label counts if both scores are present.
        macro: bool [F], findings that the mean counts if defined.
    """
    pair = _Pair(labels, a, b, patients, n_resamples, seed)
    findings = tuple(_compare_finding(pair, f) for f in range(len(pair.defined)))
    return PairedFindings(findings, _compare_means(pair, pair.defined & macro))


class _Pair:
    """Two sets of scores, NaN if either is missing, and their AUROC in the same resamples."""

    def __init__(
        self, labels: np.ndarray, a: np.ndarray, b: np.ndarray, patients: np.ndarray, n_resamples: int, seed: int
    ) -> None:
        labels, a, b = np.asarray(labels), np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
        if a.shape != labels.shape or b.shape != labels.shape:
            raise ValueError(f"labels {labels.shape}, scores {a.shape} and {b.shape} do not fit")
        missing = np.isnan(a) | np.isnan(b)
        self.labels, self.a, self.b = labels, np.where(missing, np.nan, a), np.where(missing, np.nan, b)
        # Columns of one table share each resample, which pairs the two sets.
        drawn = bootstrap.resampled_aurocs(
            np.hstack([labels, labels]), np.hstack([self.a, self.b]), patients, n_resamples, seed
        )
        count = labels.shape[1]
        self.defined = drawn.defined[:count]
        self._first, self._second = drawn.values[:, :count], drawn.values[:, count:]
        self.n_patients, self.n_resamples, self.seed = Patients.of(patients).number, n_resamples, seed

    def select(self, f: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return labels and both scores of the images that count for a finding."""
        usable = (self.labels[:, f] >= 0) & ~np.isnan(self.a[:, f])
        return self.labels[usable, f], self.a[usable, f], self.b[usable, f]

    def compare(self, columns: list[int]) -> dict[str, Any]:
        """Return the fields of `PairedDifference` for the means over columns that have both classes."""
        aurocs = []
        for f in columns:
            y, *scores = self.select(f)
            aurocs.append([metrics.auroc(y, s) for s in scores])
        first, second = (float(mean) for mean in np.mean(np.array(aurocs, dtype=np.float64), axis=0))
        resampled = self._first[:, columns].mean(axis=1) - self._second[:, columns].mean(axis=1)
        interval = percentile_interval(resampled, allow_constant=True)
        return {
            "a": first,
            "b": second,
            "difference": first - second,
            "low": interval.low,
            "high": interval.high,
            "p": None if interval.low is None else _compute_p(resampled),
            "undefined": interval.undefined,
            "reason": interval.reason,
        }


def _compare_finding(pair: _Pair, f: int) -> PairedFinding:
    y, a, b = pair.select(f)
    counts: dict[str, Any] = {"n": len(y), "positives": int(np.count_nonzero(y))}
    reason = metrics.undefined_reason(y)
    if reason is not None:
        return PairedFinding(**counts, undefined=pair.n_resamples, reason=reason, delong_reason=reason)
    correlated = delong_paired(y, a, b)
    delong_p = None if correlated is None else normal_p(correlated[0] - correlated[1], correlated[2])
    delong_reason = None
    if correlated is None:
        delong_reason = "fewer than two positive or two negative images"
    elif delong_p is None:
        delong_reason = "the difference has no variance between these images"
    return PairedFinding(**pair.compare([f]), **counts, delong_p=delong_p, delong_reason=delong_reason)


def _compare_means(pair: _Pair, counted: np.ndarray) -> PairedAuroc:
    columns = [int(f) for f in np.flatnonzero(counted)]
    reason = "no finding has both positive and negative images"
    difference = pair.compare(columns) if columns else {"undefined": pair.n_resamples, "reason": reason}
    return PairedAuroc(
        **difference, columns=tuple(columns), n_patients=pair.n_patients, n_resamples=pair.n_resamples, seed=pair.seed
    )


def _compute_p(differences: np.ndarray) -> float:
    # Comparisons with NaN are false. One more difference in the tail: no number of resamples proves p = 0.
    defined = int((~np.isnan(differences)).sum())
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2.0 * (tail + 1) / (defined + 1))
