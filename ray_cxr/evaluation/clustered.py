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
    numbers = (len(np.unique(codes[rows])) for rows in (positive, ~positive))
    found = clustered_auroc(y, s, codes)
    return limited_auroc_interval(auc, 0.0 if found is None else found[1], *numbers)


def limited_auroc_interval(
    auc: float, variance: float, positive_patients: int, negative_patients: int
) -> tuple[float, float]:
    """Compute the interval of `auroc_interval`; the variance is 0 if it is unknown."""
    few, many = sorted((positive_patients, negative_patients))
    high = max(auc, 1.0 - auc)
    independent = few * many / (1.0 + (few - 1) * (1.0 - high) / (2.0 - high) + (many - 1) * high / (1.0 + high))
    independent *= 1.0 + few / 100.0
    if variance > 0.0:
        independent = min(independent, auc * (1.0 - auc) / variance)
    return wilson_interval(auc, independent)


def auroc_influence(y: np.ndarray, s: np.ndarray, codes: np.ndarray, n_patients: int) -> np.ndarray:
    """Return each patient's contribution to the deviation of AUROC, float64 [n_patients].

    The variance of AUROC is about the sum of squares, a covariance that of products. Where no image deviates (AUROC 1
    or 0) or a class has one patient, the result is each patient's share of the positive plus that of the negative
    images: two findings of the same patients then count as one. All are 0 without a class. `codes` are below
    `n_patients`.
    """
    components = compute_components(y, s)
    if components is None:
        return np.zeros(n_patients)
    positive = np.asarray(y).astype(bool)
    pairs = zip(components, (positive, ~positive), strict=True)
    (first, m), (second, n) = (sum_deviations(part - part.mean(), codes[rows], n_patients) for part, rows in pairs)
    influence = np.asarray(first + second)
    if min(m, n) > 1 and np.abs(influence).max() > 1e-12:  # less is rounding
        return influence
    shares = [np.bincount(codes[rows], minlength=n_patients) / np.count_nonzero(rows) for rows in (positive, ~positive)]
    return np.asarray(shares[0] + shares[1])


def mean_interval(
    values: np.ndarray, limits: np.ndarray, influence: np.ndarray, weights: np.ndarray
) -> tuple[float, float] | None:
    """Compute an interval of a weighted mean from the intervals of its terms (MOVER; Zou & Donner 2008).

    A value without influence has the correlation 1 with the others, so that images of the same few patients do not look
    like independent evidence. Negative correlations, which chance makes large with few patients,
    count as 0. Returns None with fewer than two patients.

    Args:
        values: [k].
        limits: intervals of the values, [k, 2].
        influence: contributions of the patients to each value [k, patients]; only their correlations matter.
        weights: [k], treated as exact.
    """
    if influence.shape[1] < 2:
        return None
    share = weights / weights.sum()
    length = np.sqrt((influence**2).sum(axis=1))
    known = length > 1e-12  # less is rounding
    scaled = influence / np.where(known, length, 1.0)[:, None]
    correlations = np.where(known[:, None] & known, np.clip(scaled @ scaled.T, 0.0, 1.0), 1.0)
    reach = share[:, None] * np.abs(limits - values[:, None])
    below, above = (math.sqrt(float(side @ correlations @ side)) for side in reach.T)
    mean = float(np.average(values, weights=weights))
    # The mean itself is a bound because rounding could leave a limit just inside it.
    return min(mean, max(0.0, mean - below)), max(mean, min(1.0, mean + above))


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
    """Compute `share_interval` of the share of successes [n], n > 0, in images of patients `codes` [n]."""
    patients = np.unique(codes, return_inverse=True)[1]
    return share_interval(np.bincount(patients, weights=successes), np.bincount(patients))


def share_interval(parts: np.ndarray, wholes: np.ndarray) -> tuple[float, float]:
    """Compute Wilson's interval of sum(parts) / sum(wholes), numbers of images of each patient.

    The effective number of independent images comes from the variance between patients (Kish's design effect, 1965).
    With few patients, or a share near 0 or 1, this variance is often too small by chance. So it is averaged with the
    largest possible one, that of patients whose images all agree. The first counts once for each patient with images of
    the rarer outcome, the second twice. It decides alone at 0% and 100%. If each patient has one image, the variances
    are equal, and it is Wilson's interval for the images. tests/simulations/auroc_intervals.py measures the coverage.
    """
    images = float(wholes.sum())
    share = float(parts.sum()) / images
    independent = images**2 / float((np.asarray(wholes, dtype=np.float64) ** 2).sum())
    rarer = min(int(np.count_nonzero(parts > 0)), int(np.count_nonzero(parts < wholes)))
    if rarer and 0.0 < share < 1.0:
        binomial = share * (1.0 - share)
        variance = float(((parts - share * wholes) ** 2).sum()) / images**2
        independent = min(images, binomial * (rarer + 2) / (rarer * variance + 2.0 * binomial / independent))
    return wilson_interval(share, independent)


def _correct(n: int) -> float:
    return n / (n - 1)
