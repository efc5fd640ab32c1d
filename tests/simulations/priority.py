"""Simulate how abnormality ranks images with a finding, compared with the priority of format 2.

`python tests/simulations/priority.py [ROUNDS] [--labels DATA_ENTRY.csv]` prints a table, and fails if for the first two
models, abnormality ranks worse than the old priority or top_finding is right less often; or if abnormality is not
calibrated for independent findings.

Labels are drawn with the prevalences of ChestX-ray14 and correlated by one factor, or taken from NIH's table. Scores
are normal with the AUROC per finding of a public model (retrained by jrzech/reproduce-chexnet). A share of their noise
is common to all findings of an image, and another finding raises a score by a share of the effect of the finding. The
shares of the second model give results like those of that model's public predictions (old priority 0.771, abnormality
0.789). The old priority is the highest rank: 0.5 p / t below the threshold t by Youden's rule, 0.5 + 0.5 (p - t) / (1 -
t) from t on. `flags first` is the order of the worklist: by flag, then by abnormality.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit, ndtri

from ray_cxr.evaluation import calibration, metrics
from ray_cxr.evaluation.ranking import combine
from ray_cxr.labels import FINDINGS

AUROCS = (0.816, 0.911, 0.801, 0.898, 0.884, 0.923, 0.829, 0.901, 0.708, 0.831, 0.775, 0.786, 0.765, 0.874)
PREVALENCES = (0.103, 0.025, 0.042, 0.021, 0.119, 0.022, 0.015, 0.002, 0.177, 0.052, 0.056, 0.030, 0.013, 0.047)
VALIDATION, TEST = 9_000, 22_433
#: Correlation of labels, share of noise that is common, and effect of another finding.
MODELS = {"independent": (0.0, 0.0, 0.0), "like public": (0.15, 0.2, 0.27), "common noise": (0.15, 0.5, 0.27)}
#: Rule of the flags that the worklist puts first.
_FLAGS = "any_flag_rate=0.3"
COLUMNS = ("old priority", "abnormality", "flags first", "old top", "top", "Pneumothorax", "own", "mean", "observed")


def draw_labels(n: int, correlation: float, rng: np.random.Generator) -> np.ndarray:
    latent = correlation**0.5 * rng.normal(size=(n, 1)) + (1 - correlation) ** 0.5 * rng.normal(size=(n, len(AUROCS)))
    return latent > ndtri(1 - np.array(PREVALENCES))


def read_labels(path: Path) -> np.ndarray:
    found = pd.read_csv(path, usecols=["Finding Labels"])["Finding Labels"].str.get_dummies("|")
    return found[[name if name in found else name.replace("_", " ") for name in FINDINGS]].to_numpy() == 1


def draw_probabilities(y: np.ndarray, common: float, effect: float, rng: np.random.Generator) -> np.ndarray:
    """Draw probabilities of a model trained without class weights, float32 [n, F]."""
    distance = np.sqrt(2) * ndtri(np.array(AUROCS))
    others = (y.sum(axis=1, keepdims=True) - y) > 0
    noise = common**0.5 * rng.normal(size=(len(y), 1)) + (1 - common) ** 0.5 * rng.normal(size=y.shape)
    score = distance * (y + effect * others) + noise
    prevalence = y.mean(axis=0)
    # Bayes' rule for normal scores of the two classes.
    logit = distance * (score - distance / 2) + np.log(prevalence / (1 - prevalence))
    return expit(logit).astype(np.float32)


def compute_old_ranks(p: np.ndarray, t: np.ndarray) -> np.ndarray:
    return np.where(p >= t, 0.5 + 0.5 * (p - t) / (1 - t), 0.5 * p / t)


def measure(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Fit calibration and thresholds on the first images, and measure the columns on the others."""
    rules = calibration.fit_rules(y[:VALIDATION].astype(float), p[:VALIDATION], FINDINGS, rule="youden")
    y, p = y[VALIDATION:], p[VALIDATION:]
    thresholds = np.array([rules.operating_points[name]["threshold"] for name in FINDINGS])
    c = np.column_stack([calibration.apply_calibration(rules.calibration[f], p[:, j]) for j, f in enumerate(FINDINGS)])
    ranks, abnormality, status = compute_old_ranks(p.astype(float), thresholds), combine(c), y.any(axis=1)
    points = [rules.operating_alternatives[name][_FLAGS] for name in FINDINGS]
    flagged = (p >= [np.inf if point is None else point["threshold"] for point in points]).any(axis=1)
    rows = np.flatnonzero(status)
    last = y[:, -1] | ~status
    return np.array(
        [
            metrics.auroc(status, ranks.max(axis=1)),
            metrics.auroc(status, abnormality),
            metrics.auroc(status, abnormality + flagged),
            y[rows, ranks.argmax(axis=1)[rows]].mean(),
            y[rows, c.argmax(axis=1)[rows]].mean(),
            metrics.auroc(y[last, -1], abnormality[last]),
            metrics.auroc(y[last, -1], p[last, -1]),
            abnormality.mean(),
            status.mean(),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", type=int, nargs="?", default=10)
    parser.add_argument("--labels", type=Path)
    arguments = parser.parse_args()
    failures = []
    given = None if arguments.labels is None else read_labels(arguments.labels)
    print(f"{'model':>12}", *(f"{name:>12}" for name in COLUMNS))
    for name, (correlation, common, effect) in MODELS.items():
        results = []
        for seed in range(arguments.rounds):
            rng = np.random.default_rng(seed)
            n = VALIDATION + TEST
            y = draw_labels(n, correlation, rng) if given is None else given[rng.permutation(len(given))[:n]]
            results.append(measure(y, draw_probabilities(y, common, effect, rng)))
        found = dict(zip(COLUMNS, np.mean(results, axis=0), strict=True))
        print(f"{name:>12}", *(f"{value:>12.3f}" for value in found.values()))
        is_worse = found["abnormality"] < found["old priority"] + 0.005 or found["top"] < found["old top"]
        if is_worse and name != "common noise":
            failures.append(f"{name}: not better than the old priority")
        if name == "independent" and given is None and abs(found["mean"] - found["observed"]) > 0.01:
            failures.append("independent findings: abnormality is not calibrated")
    for failure in failures:
        print("FAILED", failure)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
