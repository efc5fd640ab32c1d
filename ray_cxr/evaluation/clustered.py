"""95% intervals for AUROC and shares from one pass over the sample, where images of one patient are correlated.

Arrays have one entry per image. `codes` are patients as integers, see `intervals.patient_codes`.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import expit, logit, ndtri

from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.delong import compute_components
from ray_cxr.evaluation.intervals import wilson_interval

#: Names of the methods of `auroc_interval`, `mean_interval` and `clustered_share_interval` in metrics.json.
AUROC_METHOD = "Wilson with the effective number of images, from Obuchowski's and Hanley and McNeil's variances"
MEAN_METHOD = "MOVER (Zou and Donner 2008) of the findings' intervals"
SHARE_METHOD = "Wilson with the effective number of images, from the design effect of patients"


def clustered_auroc(y: np.ndarray, s: np.ndarray, codes: np.ndarray) -> tuple[float, float] | None:
    """Compute AUROC and its variance with correlated images of patients (Obuchowski 1997).

    A patient can have positive and negative images. If no patient has two images, the result is DeLong's.
    Returns None with fewer than two patients with positive images, or with negative ones.
    """
    components = compute_components(y, s)
    if components is None:
        return None
    v10, v01 = components
    positive = np.asarray(y).astype(bool)
    patients, rows = np.unique(codes, return_inverse=True)
    auc = float(v10.mean())
    first, with_positive = sum_deviations(v10 - auc, rows[positive], len(patients))
    second, with_negative = sum_deviations(v01 - auc, rows[~positive], len(patients))
    if min(with_positive, with_negative) < 2:
        return None
    variance = (first**2).sum() * _correct(with_positive) + (second**2).sum() * _correct(with_negative)
    variance += 2.0 * (first * second).sum() * _correct(len(patients))
    return auc, max(0.0, float(variance))


def auroc_interval(y: np.ndarray, s: np.ndarray, codes: np.ndarray) -> tuple[float, float] | None:
    """Compute an interval of AUROC that holds also with few patients; None if AUROC is undefined.

    This is Wilson's interval for an effective number of images, AUROC (1 - AUROC) / variance, with the variance of
    `clustered_auroc`. Scores of few patients often happen to lie close together, so their variance is too small: at
    AUROC 1 it is 0. So the number is limited to that of Hanley & McNeil's (1982) variance with one image per patient,
    about two per patient of the smaller class. With k patients in this class the limit is multiplied by 1 + k / 100,
    because for most distributions that variance is too large, and with many patients the sample's is reliable.
    tests/simulations/auroc_intervals.py measures the coverage.
    """
    auc = metrics.auroc(y, s)
    if auc is None:
        return None
    positive = np.asarray(y).astype(bool)
    few, many = sorted(len(np.unique(codes[rows])) for rows in (positive, ~positive))
    high = max(auc, 1.0 - auc)
    independent = few * many / (1.0 + (few - 1) * (1.0 - high) / (2.0 - high) + (many - 1) * high / (1.0 + high))
    independent *= 1.0 + few / 100.0
    found = clustered_auroc(y, s, codes)
    if found is not None and found[1] > 0.0:
        independent = min(independent, auc * (1.0 - auc) / found[1])
    return wilson_interval(auc, independent)


def auroc_influence(y: np.ndarray, s: np.ndarray, codes: np.ndarray, n_patients: int) -> np.ndarray:
    """Return each patient's contribution to the deviation of AUROC, float64 [n_patients]; 0 if it is unknown.

    `codes` are below `n_patients`. The variance of AUROC is about the sum of squares, a covariance that of products.
    """
    components = compute_components(y, s)
    if components is None:
        return np.zeros(n_patients)
    positive = np.asarray(y).astype(bool)
    pairs = zip(components, (positive, ~positive), strict=True)
    first, second = (sum_deviations(part - part.mean(), codes[rows], n_patients)[0] for part, rows in pairs)
    return np.asarray(first + second)


def mean_interval(
    values: np.ndarray, limits: np.ndarray, influence: np.ndarray, weights: np.ndarray
) -> tuple[float, float]:
    """Compute an interval of a weighted mean from the intervals of its terms (MOVER; Zou & Donner 2008).

    Args:
        values: [k].
        limits: intervals of the values, [k, 2].
        influence: contributions of the patients to each value [k, patients]; only their correlations matter.
        weights: [k], treated as exact.
    """
    share = weights / weights.sum()
    length = np.sqrt((influence**2).sum(axis=1))
    scaled = influence / np.where(length > 0.0, length, 1.0)[:, None]
    correlations = scaled @ scaled.T
    np.fill_diagonal(correlations, 1.0)
    reach = share[:, None] * np.abs(limits - values[:, None])
    below, above = (math.sqrt(max(0.0, float(side @ correlations @ side))) for side in reach.T)
    mean = float(share @ values)
    return max(0.0, mean - below), min(1.0, mean + above)


def sum_deviations(deviations: np.ndarray, rows: np.ndarray, n_patients: int) -> tuple[np.ndarray, int]:
    """Return the sum of a class's deviations per patient, divided by its images; and the number of its patients.

    `rows` [n] are the patients of the n deviations, as integers below `n_patients`.
    """
    sums = np.bincount(rows, weights=deviations, minlength=n_patients) / len(deviations)
    return sums, int(np.count_nonzero(np.bincount(rows, minlength=n_patients)))


def logit_interval(value: float, variance: float) -> tuple[float, float] | None:
    """Compute an interval of a value in 0..1, symmetric on the logit scale so that it stays within 0..1.

    Returns None if the variance is 0 or the value is 0 or 1, where the formula has no width.
    """
    if variance <= 0.0 or not 0.0 < value < 1.0:
        return None
    # Delta method: the derivative of logit at a value is 1 / (value (1 - value)).
    reach = ndtri(0.975) * math.sqrt(variance) / (value * (1.0 - value))
    return float(expit(logit(value) - reach)), float(expit(logit(value) + reach))


def clustered_share_interval(successes: np.ndarray, codes: np.ndarray) -> tuple[float, float]:
    """Compute Wilson's interval of the share of successes [n], n > 0, for the effective number of independent images.

    That is the number of images divided by the design effect (Kish 1965), which comes from the deviations of patients
    from the share; at most n. If no patient deviates, as at 0% and 100%, it is the number of patients.
    """
    share = float(np.mean(successes))
    deviations = np.bincount(np.unique(codes, return_inverse=True)[1], weights=successes - share)
    variance = float((deviations**2).sum()) / len(codes) ** 2
    independent = float(len(deviations))
    if variance > 1e-20:  # less is rounding
        independent = min(float(len(codes)), share * (1.0 - share) / variance)
    return wilson_interval(share, independent)


def _correct(n: int) -> float:
    return n / (n - 1)
