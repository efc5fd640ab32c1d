"""Simulate the coverage and the width of 95% intervals of AUROC and sensitivity.

`python tests/simulations/auroc_intervals.py [ROUNDS]` prints three tables of coverage in percent / mean width. It fails
if a shown interval covers too rarely. Patients have 1 to 3 images with the finding, and one without it on average;
other patients have about three images without it. Half the variance of a score belongs to the patient.

- normal: scores are normal, with equal variances.
- missed: the same, but some patients with the finding score like those without it. The others are nearly always higher
  than patients without it. With few positives, a sample often contains none of the missed patients.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

import numpy as np
from scipy.special import ndtr, ndtri

from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.bootstrap import resample_patients, resampled_aurocs
from ray_cxr.evaluation.clustered import (
    auroc_influence,
    auroc_interval,
    clustered_auroc,
    clustered_share_interval,
    logit_interval,
    mean_interval,
)
from ray_cxr.evaluation.delong import compute_components

PATIENTS = (5, 10, 20, 50, 200)
AUROCS = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
#: Numbers of patients with 10 to 20 images each.
MANY_IMAGES = (5, 10, 20, 50)
SENSITIVITIES = (0.5, 0.7, 0.9, 0.95, 0.99)
#: AUROCs of findings with the numbers of positive patients above, for the mean over findings.
MEANS = ((0.7, 0.7, 0.7, 0.7, 0.7), (0.95, 0.9, 0.85, 0.8, 0.75), (0.95, 0.95, 0.95, 0.95, 0.95))
NEGATIVES = 600
#: AUROC of the patients that are not missed.
SEEN = 0.998
RESAMPLES = 300
#: Percent of data sets to cover with the shown interval: up to AUROC 0.95, at 0.99, on average; sensitivity and means.
BARS = (90.0, 85.0, 95.0, 87.0)
Limits = tuple[float, float]


def simulate_scores(model: str, positives: int, auroc: float, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return labels, scores and patients of images; `positives` patients have the finding."""
    with_finding = rng.choice([1, 1, 1, 2, 3], positives)
    without = rng.poisson(1.0, positives)
    others = np.minimum(rng.geometric(1 / 3, NEGATIVES), 12)
    others = others[: np.searchsorted(np.cumsum(others), NEGATIVES - without.sum()) + 1]
    numbers = np.arange(positives), np.arange(positives), positives + np.arange(len(others))
    codes = np.concatenate([np.repeat(*pair) for pair in zip(numbers, (with_finding, without, others), strict=True)])
    y = np.arange(len(codes)) < with_finding.sum()
    s = correlate(codes, rng)
    if model == "normal":
        return y, s + y * math.sqrt(2.0) * ndtri(auroc), codes
    seen = rng.random(positives + len(others)) < (auroc - 0.5) / (SEEN - 0.5)
    return y, s + (y & seen[codes]) * math.sqrt(2.0) * ndtri(SEEN), codes


def correlate(codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return standard normal values; half their variance belongs to the patient."""
    return math.sqrt(0.5) * (rng.normal(size=codes.max() + 1)[codes] + rng.normal(size=len(codes)))


def find_auroc_intervals(y: np.ndarray, s: np.ndarray, codes: np.ndarray, seed: int) -> dict[str, Limits]:
    auroc, variance = clustered_auroc(y, s, codes)
    order = np.argsort(s[~y])
    below = np.searchsorted(s[~y][order], s[y])
    n_patients = codes.max() + 1
    resampled = []
    for _, drawn in resample_patients(n_patients, len(y), RESAMPLES, seed):
        weights = drawn[:, codes[y]]
        passed = np.cumsum(np.pad(drawn[:, codes[~y][order]], ((0, 0), (1, 0))), axis=1)
        resampled.append((weights * passed[:, below]).sum(axis=1) / np.maximum(weights.sum(axis=1) * passed[:, -1], 1))
        resampled[-1][weights.sum(axis=1) == 0] = np.nan
    values = np.concatenate(resampled)
    values = values[~np.isnan(values)]
    positive, negative = compute_components(y, s)
    influence = np.bincount(codes[y], positive - auroc, n_patients) / len(positive)
    influence += np.bincount(codes[~y], negative - auroc, n_patients) / len(negative)
    return {
        "bootstrap": tuple(np.percentile(values, [2.5, 97.5])),
        "BCa": correct_bias(values, auroc, influence),
        "logit": logit_interval(auroc, variance) or (auroc, auroc),
        "shown": auroc_interval(y, s, codes),
    }


def correct_bias(values: np.ndarray, estimate: float, influence: np.ndarray) -> Limits:
    """Return the BCa interval (Efron 1987) of resampled values; `influence` is each patient's effect [k]."""
    if not influence.any():
        return estimate, estimate
    share = np.mean((values < estimate) + 0.5 * (values == estimate))
    bias = ndtri(np.clip(share, 0.5 / len(values), 1 - 0.5 / len(values)))
    speed = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    moved = bias + ndtri([0.025, 0.975])
    return tuple(np.quantile(values, ndtr(bias + moved / (1 - speed * moved))))


def find_share_intervals(flags: np.ndarray, codes: np.ndarray, rng: np.random.Generator) -> dict[str, Limits]:
    k = codes.max() + 1
    drawn = rng.multinomial(k, np.full(k, 1 / k), size=RESAMPLES)
    values = (drawn @ np.bincount(codes, flags)) / (drawn @ np.bincount(codes))
    return {
        "bootstrap": tuple(np.percentile(values, [2.5, 97.5])),
        "shown": clustered_share_interval(flags, codes),
    }


def find_mean_intervals(model: str, aurocs: np.ndarray, seed: int) -> dict[str, Limits]:
    """Simulate one finding per entry of `PATIENTS` in 400 patients, with correlated scores, and their mean AUROC."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(400), np.minimum(rng.geometric(1 / 3, 400), 12))
    common = correlate(codes, rng)
    labels, scores = [], []
    for positives, auroc in zip(PATIENTS, aurocs, strict=True):
        patients = rng.permutation(400) < positives
        y = patients[codes] & (rng.random(len(codes)) < 0.6)
        y[np.flatnonzero(patients[codes])[0]] = True
        seen = (rng.random(400) < (auroc - 0.5) / (SEEN - 0.5))[codes] if model == "missed" else 1.0
        shift = math.sqrt(2.0) * ndtri(SEEN if model == "missed" else auroc)
        labels.append(y)
        scores.append(math.sqrt(0.5) * (common + correlate(codes, rng)) + y * seen * shift)
    pairs = list(zip(labels, scores, strict=True))
    drawn = resampled_aurocs(np.transpose(labels).astype(np.int8), np.transpose(scores), codes, RESAMPLES, seed)
    values = drawn.values.mean(axis=1)
    limits = np.array([auroc_interval(y, s, codes) for y, s in pairs])
    influence = np.array([auroc_influence(y, s, codes, 400) for y, s in pairs])
    estimates = np.array([metrics.auroc(y, s) for y, s in pairs])
    return {
        "bootstrap": tuple(np.percentile(values[~np.isnan(values)], [2.5, 97.5])),
        "shown": mean_interval(estimates, limits, influence, np.ones(len(estimates))),
    }


def measure(draw: Callable[[int], dict[str, Limits]], truth: float, rounds: int) -> dict[str, tuple[float, float]]:
    """Return the coverage in percent and the mean width of each interval."""
    drawn = [draw(seed) for seed in range(rounds)]
    found = {name: np.array([limits[name] for limits in drawn]) for name in drawn[0]}
    return {
        name: (100 * float(np.mean((low <= truth) & (truth <= high))), float(np.mean(high - low)))
        for name, (low, high) in ((name, limits.T) for name, limits in found.items())
    }


def show(label: str, result: dict[str, tuple[float, float]]) -> None:
    print(f"{label:<24}" + "".join(f"{covered:9.1f} /{width:6.3f}" for covered, width in result.values()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", nargs="?", type=int, default=300)
    rounds = parser.parse_args().rounds
    failed, covered = [], []
    print(f"{'model, patients, AUROC':<24}" + "".join(f"{name:>17}" for name in ("bootstrap", "BCa", "logit", "shown")))
    for model in ("normal", "missed"):
        for positives in PATIENTS:
            for auroc in AUROCS:

                def draw(seed: int, cell: tuple[str, int, float] = (model, positives, auroc)) -> dict[str, Limits]:
                    return find_auroc_intervals(*simulate_scores(*cell, np.random.default_rng(seed)), seed)

                label, result = f"{model}, {positives}, {auroc}", measure(draw, auroc, rounds)
                show(label, result)
                covered.append(result["shown"][0])
                if covered[-1] < BARS[auroc > 0.95]:
                    failed.append(label)
    print(f"{'mean of shown':<24}{np.mean(covered):60.1f}")
    if np.mean(covered) < BARS[2]:
        failed.append("mean")
    print(f"\n{'patients, sensitivity':<24}" + "".join(f"{name:>17}" for name in ("bootstrap", "shown")))
    for positives in PATIENTS:
        for sensitivity in SENSITIVITIES:

            def draw(seed: int, positives: int = positives, sensitivity: float = sensitivity) -> dict[str, Limits]:
                rng = np.random.default_rng(seed)
                codes = np.repeat(np.arange(positives), rng.choice([1, 1, 1, 2, 3], positives))
                return find_share_intervals(correlate(codes, rng) < ndtri(sensitivity), codes, rng)

            label, result = f"{positives}, {sensitivity}", measure(draw, sensitivity, rounds)
            show(label, result)
            if result["shown"][0] < BARS[3]:
                failed.append(f"sensitivity {label}")
    for patients in MANY_IMAGES:
        for share in SENSITIVITIES:

            def draw(seed: int, patients: int = patients, share: float = share) -> dict[str, Limits]:
                rng = np.random.default_rng(seed)
                codes = np.repeat(np.arange(patients), rng.integers(10, 21, patients))
                return find_share_intervals(correlate(codes, rng) < ndtri(share), codes, rng)

            label, result = f"{patients} x 10-20, {share}", measure(draw, share, rounds)
            show(label, result)
            if result["shown"][0] < BARS[3]:
                failed.append(f"share {label}")
    print(f"\n{'model, mean AUROC':<24}" + "".join(f"{name:>17}" for name in ("bootstrap", "shown")))
    for model in ("normal", "missed"):
        for aurocs in MEANS:

            def draw(seed: int, model: str = model, aurocs: tuple[float, ...] = aurocs) -> dict[str, Limits]:
                return find_mean_intervals(model, np.array(aurocs), seed)

            label, result = (
                f"{model}, {np.mean(aurocs):.2f}",
                measure(draw, float(np.mean(aurocs)), max(1, rounds // 2)),
            )
            show(label, result)
            if result["shown"][0] < BARS[3]:
                failed.append(f"mean {label}")
    print("below the bar: " + "; ".join(failed) if failed else "all bars reached")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
