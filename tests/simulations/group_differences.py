"""Measure how often the interval of a difference between two groups excludes 0 although the groups do not differ.

    python tests/simulations/group_differences.py [ROUNDS]

Each round draws the scores of a group and of a reference group with one or three times as many patients, which have one
to three images of each label they have. Scores of one patient have the correlation 0.4. The groups are of different
patients, or of the same patients (as two views of each). A number in the table is the share of rounds, in percent, whose
interval excludes 0. AUROCs of 0.7, 0.85 and 0.95 go with sensitivities of 0.5, 0.8 and 0.95.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product

import numpy as np
from scipy.special import ndtri

from ray_cxr.evaluation.group_estimates import LabelledScores
from ray_cxr.evaluation.groups import Group
from ray_cxr.evaluation.subgroups import Difference, measure_groups

POSITIVE_PATIENTS = (10, 12, 20, 50)
#: AUROC, and sensitivity at the operating point.
LEVELS = ((0.7, 0.5), (0.85, 0.8), (0.95, 0.95))
CORRELATION = 0.4
NEGATIVES_PER_POSITIVE = 8
FINDINGS = 14
#: The highest percentage in any setting, and the range of the average over all settings of a number of patients.
HIGHEST, LOWEST_AVERAGE, HIGHEST_AVERAGE = 9.0, 2.5, 6.0


def draw_images(rng: np.random.Generator, patients: int) -> tuple[np.ndarray, np.ndarray]:
    """Return patients and labels of images; half of the positive patients also have negative images."""
    positive = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    mixed = np.flatnonzero(rng.random(patients) < 0.5)
    negative = np.concatenate([mixed, np.arange(patients, patients * (1 + NEGATIVES_PER_POSITIVE))])
    negative = np.repeat(negative, rng.integers(1, 4, len(negative)))
    return np.concatenate([positive, negative]), np.repeat([1, 0], [len(positive), len(negative)])


def simulate(
    rng: np.random.Generator, patients: int, ratio: int, level: tuple[float, float], shared: bool, rounds: int
) -> tuple[Difference, ...]:
    """Return all differences of one layout of images, with `rounds` columns of scores."""
    auroc, sensitivity = level
    codes, labels = draw_images(rng, patients)
    others, other_labels = draw_images(rng, patients * ratio)
    if not shared:
        others = others + codes.max() + 1
    patient, y = np.concatenate([codes, others]), np.concatenate([labels, other_labels])
    scores = draw_scores(rng, patient, y[:, None], auroc, rounds)
    shift = np.sqrt(2) * ndtri(auroc)
    names = tuple(map(str, range(rounds)))
    images = LabelledScores.build(
        np.repeat(y[:, None], rounds, axis=1).astype(np.int8),
        scores,
        (scores >= shift - ndtri(sensitivity)).astype(np.int8),
        patient,
        names,
        np.zeros(rounds, dtype=bool),
    )
    first = np.arange(len(y)) < len(labels)
    groups = [Group("view", "AP", first), Group("view", "PA", ~first)]
    return tuple(d for d in measure_groups(groups, images).differences if d.finding is not None)


def draw_scores(rng: np.random.Generator, patient: np.ndarray, y: np.ndarray, auroc: float, columns: int) -> np.ndarray:
    own = rng.normal(size=(patient.max() + 1, columns))[patient]
    noise = rng.normal(size=(len(patient), columns))
    return np.sqrt(2) * ndtri(auroc) * y + np.sqrt(CORRELATION) * own + np.sqrt(1 - CORRELATION) * noise


def simulate_means(rng: np.random.Generator, patients: int, shared: bool, rounds: int) -> Iterator[Difference]:
    """Yield differences of means over 14 findings, of which `patients` patients each are positive on average."""
    for _ in range(rounds):
        own = 10 * patients
        codes = np.repeat(np.arange(own), rng.integers(1, 4, own))
        others = np.repeat(np.arange(2 * own), rng.integers(1, 4, 2 * own)) + (0 if shared else own)
        patient = np.concatenate([codes, others])
        ill = rng.random((3 * own, FINDINGS)) < 0.13
        y = (ill[patient] & (rng.random((len(patient), FINDINGS)) < 0.75)).astype(np.int8)
        auroc = np.linspace(0.7, 0.95, FINDINGS)
        # Scores of different findings share noise of the image.
        scores = draw_scores(rng, patient, y, 0.5, FINDINGS) + np.sqrt(2) * ndtri(auroc) * y
        scores = (scores + 0.5 * rng.normal(size=(len(patient), 1))).astype(np.float64)
        flags = (scores >= np.sqrt(2) * ndtri(auroc) - 0.5).astype(np.int8)
        images = LabelledScores.build(
            y, scores, flags, patient, tuple(map(str, range(FINDINGS))), np.ones(FINDINGS, dtype=bool)
        )
        first = np.arange(len(patient)) < len(codes)
        groups = [Group("view", "AP", first), Group("view", "PA", ~first)]
        yield from (d for d in measure_groups(groups, images).differences if d.finding is None)


def measure(differences: list[Difference], quantity: str) -> float:
    judged = [d.excludes_zero for d in differences if d.quantity == quantity and d.excludes_zero is not None]
    return 100.0 * float(np.mean(judged)) if judged else np.nan


def main(rounds: int) -> int:
    rng = np.random.default_rng(20211210)
    missed = []
    quantities = ("auroc", "sensitivity", "specificity")
    heads = [f"{q[:5]} {level[q == 'sensitivity']}" for q in quantities for level in LEVELS]
    heads[6:] = [f"speci {spec}" for spec in ("", "", "")]
    print("positive patients, ratio, same patients".ljust(42), *(f"{head:>10}" for head in heads))
    for patients in POSITIVE_PATIENTS:
        found = []
        for ratio, shared in product((1, 3), (False, True)):
            cells: dict[str, list[float]] = {q: [] for q in quantities}
            for level in LEVELS:
                # Two layouts of images.
                both = [d for _ in range(2) for d in simulate(rng, patients, ratio, level, shared, rounds // 2)]
                for q in quantities:
                    cells[q].append(measure(both, q))
            row = [value for q in quantities for value in cells[q]]
            found.append(row)
            print(f"{patients:>10} x{ratio} {shared!s:>8}".ljust(42), *(f"{value:10.1f}" for value in row), flush=True)
        average = np.mean(found, axis=0)
        print(f"{patients:>10} average".ljust(42), *(f"{value:10.1f}" for value in average))
        for q, part in zip(quantities, np.split(average, 3), strict=True):
            if not LOWEST_AVERAGE <= part.mean() <= HIGHEST_AVERAGE:
                missed.append(f"{q} with {patients} positive patients: {part.mean():.1f}% on average")
        if np.max(found) > HIGHEST:
            missed.append(f"{patients} positive patients: {np.max(found):.1f}% in one setting")
    print("\nmeans over 14 findings".ljust(43), *(f"{q:>12}" for q in quantities))
    for patients, shared in product((10, 20), (False, True)):
        means = list(simulate_means(rng, patients, shared, rounds // 2))
        row = [measure(means, q) for q in quantities]
        print(f"{patients:>10} {shared!s:>8}".ljust(42), *(f"{value:12.1f}" for value in row), flush=True)
        if not 2.0 <= np.mean(row) <= 7.0 or max(row) > HIGHEST:
            missed.append(f"means with {patients} positive patients: {row}")
    print(*(f"missed: {line}" for line in missed), sep="\n")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
