"""Simulate calibration measures, net benefit and selective prediction with few positives and correlated images.

`python tests/simulations/decisions.py [ROUNDS]` prints two tables, and fails if intervals of intercept or slope of
calibrated probabilities cover the truth in less than 93% of data sets (88% with few patients of 20 images each), if
`ici_if_calibrated` is not within 15% of the mean ICI, if net benefit is claimed at a threshold without one in more than
5%, or, with 20 positives or more, if intervals of the change of error rate by handing over a tenth cover the truth in
less than 92%.

A patient has three images. Log-odds are normal, and labels share a normal factor within a patient. Net benefit is also
claimed for models without skill, with odds four times too high, and with a slope of 3.
"""

from __future__ import annotations

import sys

import numpy as np
from scipy.special import expit, ndtr

from ray_cxr.evaluation.calibration_measures import MIN_PATIENTS, fit_line, measure_calibration
from ray_cxr.evaluation.metrics import equal_mass_error, expected_calibration_error
from ray_cxr.evaluation.net_benefit import DecisionCurve, measure_net_benefit
from ray_cxr.evaluation.selective import Selection, measure_selection

CENTRE, PREVALENCE, CUTOFF, COLUMNS = -3.4, 0.05, 0.08, 10
MODELS = {"no skill": (0.0, 0.0), "odds x 4": (1.0, np.log(4)), "slope 3": (3.0, 0.0)}
RESAMPLES = 200


def draw(n: int, rng: np.random.Generator, columns: int = COLUMNS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw log-odds and labels [n, columns], and patients [n]."""
    patients = np.arange(n) // 3
    shared = rng.normal(size=(2, patients[-1] + 1, columns))[:, patients]
    own = rng.normal(size=(2, n, columns))
    x = CENTRE + 0.7 * shared[0] + 0.714 * own[0]
    y = ndtr(0.6 * shared[1] + 0.8 * own[1]) < expit(x)
    return x, y.astype(np.int8), patients


def distort(x: np.ndarray, model: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    slope, shift = model
    noise = rng.normal(size=x.shape) if slope == 0 else 0.0
    return np.asarray(expit(CENTRE + slope * (x - CENTRE) + shift + noise))


def true_gain(p: np.ndarray, hits: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the gain at thresholds from ascending probabilities [n] and the hits with the i highest, [n + 1]."""
    flagged = len(p) - np.searchsorted(p, thresholds)
    odds, prevalence = thresholds / (1 - thresholds), hits[-1] / len(p)
    benefit = (hits[flagged] - (flagged - hits[flagged]) * odds) / len(p)
    return np.asarray(benefit - np.maximum(prevalence - (1 - prevalence) * odds, 0))


def true_change(x: np.ndarray, y: np.ndarray) -> float:
    """Return the change of error rate if the tenth closest to the cutoff is handed over."""
    distance = np.abs(x - np.log(CUTOFF / (1 - CUTOFF)))
    wrong = y != (expit(x) >= CUTOFF)
    return float(wrong[distance >= np.quantile(distance, 0.1)].mean() - wrong.mean())


def cover_few_patients(rounds: int) -> bool:
    """Print the coverage of intercept and slope for few patients with 20 images each; return if it is too low."""
    rng, lowest = np.random.default_rng(1), 1.0
    print("patients     intercept         slope")
    for patients in (MIN_PATIENTS, 30, 50):
        codes = np.repeat(np.arange(patients), 20)
        covered = []
        for _ in range(rounds):
            shared, own = rng.normal(size=(2, patients))[:, codes], rng.normal(size=(2, codes.size))
            x = 0.7 * shared[0] + 0.714 * own[0] - 1
            y = ndtr(0.6 * shared[1] + 0.8 * own[1]) < expit(x)
            found = zip(fit_line(y, expit(x), codes), (0, 1), strict=True)
            covered.append([part.low <= ideal <= part.high for part, ideal in found])
        shares = np.mean(covered, axis=0)
        print(f"{patients:8d}", *(f"{share:13.1%}" for share in shares), flush=True)
        lowest = min(lowest, *shares)
    return lowest < 0.88


def main(rounds: int) -> int:
    rng = np.random.default_rng(0)
    x, y, _ = draw(2_000_000, rng, 1)
    truth = true_change(x[:, 0], y[:, 0])
    large = {}
    for name, model in MODELS.items():
        p = distort(x, model, rng)[:, 0]
        order = np.argsort(p)
        large[name] = p[order], np.concatenate([[0], np.cumsum(y[order[::-1], 0], dtype=np.int64)])
    failed = cover_few_patients(rounds)
    names = ("intercept", "slope", "ICI", "if calibrated", "ECE", "ECE mass", *MODELS, "tenth")
    print("positives", *(f"{name:>13}" for name in names))
    for positives in (5, 10, 20, 50, 200):
        rows: list[list[float]] = []
        claims: dict[str, list[bool]] = {name: [] for name in MODELS}
        options = {"n_resamples": RESAMPLES, "seed": 0}
        for _ in range(-(-rounds // COLUMNS)):
            x, y, patients = draw(round(positives / PREVALENCE), rng)
            p = expit(x)
            measured = measure_calibration(y, p, patients, seed=0)
            selected = measure_selection(y, p, (p >= CUTOFF).astype(np.int8), patients, **options)
            for f, found in enumerate(measured):
                chosen = selected[f]
                covered = [np.nan] * 2
                if found is not None and found.slope.value is not None:
                    estimates = ((found.intercept, 0), (found.slope, 1))
                    covered = [float(part.low <= ideal <= part.high) for part, ideal in estimates]
                change = chosen.changes["error_rate"] if isinstance(chosen, Selection) else None
                known = change is not None and change.low is not None
                errors = [expected_calibration_error(y[:, f], p[:, f]), equal_mass_error(y[:, f], p[:, f])]
                tenth = float(change.low <= truth <= change.high) if known else np.nan
                rows.append([*covered, found.ici, found.ici_if_calibrated, *errors, tenth])
            for name, model in MODELS.items():
                for curve in measure_net_benefit(y, distort(x, model, rng), patients, **options):
                    if isinstance(curve, DecisionCurve):
                        useless = true_gain(*large[name], curve.thresholds) <= 0
                        claims[name].append(bool((useless & (np.nan_to_num(curve.gain.low, nan=-1) > 0)).any()))
        intercept, slope, ici, ideal, width, mass, tenth = np.nanmean(rows, axis=0)
        rates = [float(np.mean(claims[name])) for name in MODELS]
        print(
            f"{positives:9d}",
            *(f"{share:13.1%}" for share in (intercept, slope)),
            *(f"{value:13.4f}" for value in (ici, ideal, width, mass)),
            *(f"{share:13.1%}" for share in (*rates, tenth)),
            flush=True,
        )
        failed |= min(intercept, slope) < 0.93 or abs(ideal / ici - 1) > 0.15 or max(rates) > 0.05
        failed |= positives >= 20 and tenth < 0.92
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 400))
