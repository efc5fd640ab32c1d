"""Compare rules for operating points on synthetic scores of 14 findings, with new images after the fit.

Prevalences are those of ChestX-ray14, AUROCs those of a DenseNet-121 on the official split, rounded. The scores of an
image share a factor, chosen so that Youden's thresholds flag about as many images as on public predictions of such a
model: 81% of all and 69% of those without a finding.

    python tests/simulations/operating_points.py [ROUNDS]

It prints the tables of docs/decisions/0019-operating-points.md. The exit code is 1 if the default rule misses its limit
on new images by more than 2 percentage points on average, with 1,000 or more images to fit on.
"""

from __future__ import annotations

import sys

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm

from ray_cxr.config import DEFAULT_RULE
from ray_cxr.evaluation import calibration
from ray_cxr.labels import FINDINGS

PREVALENCE = np.array([10.3, 2.5, 4.2, 2.1, 11.9, 2.2, 1.5, 0.2, 17.7, 5.2, 5.6, 3.0, 1.3, 4.7]) / 100
AUROC = np.array([0.78, 0.88, 0.75, 0.85, 0.83, 0.92, 0.82, 0.91, 0.70, 0.82, 0.77, 0.78, 0.73, 0.87])
#: Correlation of labels and of scores within an image, and by how much any finding raises the scores of all, in
#: standard deviations.
LABELS, SCORES, RAISED = 0.15, 0.45, 0.7
RULES = (
    "youden", "sensitivity=0.9", "npv=0.99", "specificity=0.9", "specificity=0.95", "flag_rate=0.1", "flag_rate=0.05",
    "any_flag_rate=0.2", "any_flag_rate=0.3", "any_flag_rate=0.4",
)  # fmt: skip


def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and raw probabilities [n, 14]."""

    def correlated(share: float) -> np.ndarray:
        return np.sqrt(share) * rng.normal(size=(n, 1)) + np.sqrt(1 - share) * rng.normal(size=(n, len(FINDINGS)))

    y = (correlated(LABELS) > norm.isf(PREVALENCE)).astype(int)
    abnormal = y.any(axis=1)
    s = correlated(SCORES) + RAISED * abnormal[:, None] + DISTANCES * y
    return y, expit(1.2 * s - 1.5).astype(np.float32)


def find_distances() -> np.ndarray:
    """Return by how much a finding raises its own score, so that it has its AUROC: float64 [14]."""
    any_finding = 0.46  # share of images with any finding
    others = (any_finding - PREVALENCE) / (1 - PREVALENCE)  # share of them among the images without the finding

    def excess(distance: float, j: int) -> float:
        healthy = norm.cdf((distance + RAISED) / np.sqrt(2))
        return float(others[j] * norm.cdf(distance / np.sqrt(2)) + (1 - others[j]) * healthy - AUROC[j])

    return np.array([brentq(excess, -5, 5, args=(j,)) for j in range(len(AUROC))])


DISTANCES = find_distances()


def flag(p: np.ndarray, points: list[calibration.OperatingPoint | None]) -> np.ndarray:
    thresholds = [2.0 if point is None else point["threshold"] for point in points]
    return p >= np.array(thresholds)


def describe(y: np.ndarray, flags: np.ndarray) -> str:
    abnormal, flagged = y.any(axis=1), flags.any(axis=1)
    sensitivity = np.array([flags[y[:, j] == 1, j].mean() for j in range(y.shape[1])])
    cells = (flagged.mean(), flagged[~abnormal].mean(), flagged[abnormal].mean())
    ppv = (flags & (y == 1)).sum() / flags.sum()
    shares = " | ".join(f"{100 * cell:.0f}%" for cell in cells)
    mean, lowest = sensitivity.mean(), sensitivity.min()
    return f"{shares} | {flags.sum(axis=1).mean():.2f} | {100 * ppv:.0f}% | {mean:.2f} | {lowest:.2f}"


def fit_one_threshold(y: np.ndarray, p: np.ndarray, new: np.ndarray, share: float) -> np.ndarray:
    """Flag new images above one threshold on the calibrated probabilities of all findings."""
    scalings = [calibration.fit_calibration(y[:, j], p[:, j])[0] for j in range(y.shape[1])]
    c, later = (
        np.column_stack([calibration.apply_calibration(s, x[:, j]) for j, s in enumerate(scalings)]) for x in (p, new)
    )
    return later >= np.quantile(c.max(axis=1), 1 - share)


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    rng = np.random.default_rng(0)
    (y, p), (new_y, new_p) = draw(rng, 11_000), draw(rng, 25_596)
    abnormal = new_y.any(axis=1).mean()
    print(f"{len(new_y):,} new images, {100 * abnormal:.0f}% with a finding; thresholds from {len(y):,} images\n")
    print("| rule | flagged | without a finding | with a finding | flags per image | PPV | mean sensitivity | lowest |")
    print("|---|---|---|---|---|---|---|---|")
    scalings = [calibration.fit_calibration(y[:, j], p[:, j])[0] for j in range(len(FINDINGS))]
    slopes = np.array([scaling.slope for scaling in scalings])
    for rule in RULES:
        points = [point for point, _ in calibration.find_operating_points(y, p, FINDINGS, rule, 5, slopes)]
        lacking = f" ({sum(point is None for point in points)} without)" if None in points else ""
        print(f"| `{rule}`{lacking} | {describe(new_y, flag(new_p, points))} |")
    print(f"| one calibrated threshold, 0.3 | {describe(new_y, fit_one_threshold(y, p, new_p, 0.3))} |")

    print(f"\n`{DEFAULT_RULE}` on new images, {rounds} rounds\n")
    print("| images to fit on | findings with a threshold | images flagged: mean | 5% to 95% of rounds |")
    print("|---|---|---|---|")
    target, failed = float(DEFAULT_RULE.partition("=")[2]), False
    for n in (200, 500, 1000, 3000, 10_000):
        shares, findings = [], []
        for _ in range(rounds):
            y, p = draw(rng, n)
            fitted = calibration.fit_rules(y, p, FINDINGS)
            points = list(fitted.operating_points.values())
            shares.append(flag(new_p, points).any(axis=1).mean())
            findings.append(sum(point is not None for point in points))
        mean, (low, high) = float(np.mean(shares)), np.quantile(shares, [0.05, 0.95])
        failed |= n >= 1000 and abs(mean - target) > 0.02
        print(f"| {n:,} | {np.mean(findings):.1f} | {100 * mean:.1f}% | {100 * low:.0f}% to {100 * high:.0f}% |")
    print("\n" + ("FAILED: the default rule misses its limit" if failed else "The default rule keeps its limit."))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
