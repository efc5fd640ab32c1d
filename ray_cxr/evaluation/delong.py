"""DeLong's variance of AUROC, and tests from it (DeLong, DeLong & Clarke-Pearson 1988).

Images are taken as independent. Where patients have several images, variances and p values come out too small; prefer
`clustered` or the bootstrap over patients. Functions take labels y [n], 0 or 1, and scores [n].
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr

from ray_cxr.evaluation import metrics


def delong(y: np.ndarray, s: np.ndarray) -> tuple[float, float] | None:
    """Compute AUROC and its variance; None with fewer than two positives or two negatives."""
    components = compute_components(y, s)
    if components is None:
        return None
    v10, v01 = components
    return float(v10.mean()), _compute_variance(v10, v01)


def delong_paired(y: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, float, float] | None:
    """Compute the AUROC of scores a, that of scores b, and the variance of a - b; None as in `delong`.

    The two curves are correlated: the variance is that of the differences of their structural components.
    """
    first, second = compute_components(y, a), compute_components(y, b)
    if first is None or second is None:
        return None
    variance = _compute_variance(first[0] - second[0], first[1] - second[1])
    return float(first[0].mean()), float(second[0].mean()), variance


def normal_p(difference: float, variance: float) -> float | None:
    """Compute the two-sided p of a normally distributed difference; None if the variance is not positive."""
    return float(2.0 * ndtr(-abs(difference) / math.sqrt(variance))) if variance > 0.0 else None


def compute_components(y: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the structural components of positives and negatives, from midranks in O(n log n) (Sun & Xu 2014).

    None with fewer than two positives or two negatives.
    """
    from scipy.stats import rankdata  # slow to import

    y, s = metrics.check_scores(y, s)
    positive, negative = s[y], s[~y]
    m, n = len(positive), len(negative)
    if m < 2 or n < 2:
        return None
    ranks = rankdata(np.concatenate([positive, negative]))
    # A positive's component is the share of negatives below it; a negative's, of positives above it.
    return (ranks[:m] - rankdata(positive)) / n, 1.0 - (ranks[m:] - rankdata(negative)) / m


def _compute_variance(v10: np.ndarray, v01: np.ndarray) -> float:
    return float(v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01))
