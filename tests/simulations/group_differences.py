"""Measure how often the interval of a difference between two groups excludes 0 although the groups do not differ.

    python tests/simulations/group_differences.py [ROUNDS]

Each round draws the scores of a group and of a reference group with one or three times as many patients. Patients have
one to three images of each label they have, and scores with the correlation 0.4. The groups are of different patients,
or of the same patients (as two views of each). A number in the table is the percentage of rounds whose interval
excludes 0. One table is of the worst case for few patients: some positive patients score like negative ones, and the
rest are separated. The last one has higher AUROCs, and reference groups with 10 and 30 times as many patients. AUROCs
of 0.7, 0.85 and 0.95 go with sensitivities of 0.5, 0.8 and 0.95.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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
MISSED_LEVELS, HIGHEST_MISSED = (0.8, 0.9, 0.95, 0.97), 22.0
#: Levels and ratios of the table of large reference groups and high AUROCs, all with different patients.
LARGE_LEVELS, LARGE_RATIOS, HIGHEST_LARGE = (*LEVELS[1:], (0.97, 0.9), (0.99, 0.98)), (1, 10, 30), 12.0
#: Bars in percent: for any setting, and for the average over the settings of a number of patients. With 10 positives
#: and a sensitivity of 0.95 hardly any sample can differ from another, so sensitivity stays below 5%.
HIGHEST, HIGHEST_AVERAGE = 10.0, 6.5
#: With fewer patients, findings whose patients all agree make the intervals of means wider.
LOWEST_MEANS, HIGHEST_MEANS = 2.5, 7.0
LOWEST_AVERAGE = {"AUROC": 3.5, "sensitivity": 2.0, "specificity": 3.5}


def draw_images(rng: np.random.Generator, patients: int) -> tuple[np.ndarray, np.ndarray]:
    """Return patients and labels of images; half of the positive patients also have negative images."""
    positive = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    mixed = np.flatnonzero(rng.random(patients) < 0.5)
    negative = np.concatenate([mixed, np.arange(patients, patients * (1 + NEGATIVES_PER_POSITIVE))])
    negative = np.repeat(negative, rng.integers(1, 4, len(negative)))
    return np.concatenate([positive, negative]), np.repeat([1, 0], [len(positive), len(negative)])


def simulate(
    rng: np.random.Generator,
    patients: int,
    ratio: int,
    level: tuple[float, float],
    shared: bool,
    rounds: int,
    *,
    draw: Callable[..., np.ndarray] | None = None,
) -> tuple[Difference, ...]:
    """Return all differences of one layout of images, with `rounds` columns of scores."""
    auroc, sensitivity = level
    codes, labels = draw_images(rng, patients)
    others, other_labels = draw_images(rng, patients * ratio)
    if not shared:
        others = others + codes.max() + 1
    patient, y = np.concatenate([codes, others]), np.concatenate([labels, other_labels])
    scores = (draw or draw_scores)(rng, patient, y[:, None], auroc, rounds)
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


def draw_missed(rng: np.random.Generator, patient: np.ndarray, y: np.ndarray, auroc: float, columns: int) -> np.ndarray:
    missed = rng.random((patient.max() + 1, columns)) < 2 * (1 - auroc)
    return draw_scores(rng, patient, y, 0.5, columns) + np.where(missed[patient], 0.0, 5.0) * y


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
    # Also of small cells, which `excludes_zero` does not judge.
    judged = [d.low > 0.0 or d.high < 0.0 for d in differences if d.quantity == quantity and d.low is not None]
    return 100.0 * float(np.mean(judged))


def check_findings(rng: np.random.Generator, rounds: int) -> list[str]:
    """Print a row per setting and the average per number of positive patients; return what misses a bar."""
    heads = [f"AUROC {auroc}" for auroc, _ in LEVELS] + [f"sens. {sensitivity}" for _, sensitivity in LEVELS]
    print(
        f"{'positive patients':18}{'other group':14}{'patients':10}",
        *(f"{head:>11}" for head in [*heads, "specificity"]),
    )
    missed = []
    for patients in POSITIVE_PATIENTS:
        rows = []
        for ratio, shared in product((1, 3), (False, True)):
            # Two layouts of images for each level.
            levels = [
                [d for _ in range(2) for d in simulate(rng, patients, ratio, level, shared, rounds // 2)]
                for level in LEVELS
            ]
            row = [measure(found, quantity) for quantity in ("auroc", "sensitivity") for found in levels]
            row.append(measure([d for found in levels for d in found], "specificity"))
            print(
                f"{patients:<18}{f'{ratio} x as many':14}{'the same' if shared else 'others':10}",
                *(f"{value:11.1f}" for value in row),
                flush=True,
            )
            rows.append(row)
        average = np.mean(rows, axis=0)
        print(f"{patients:<18}{'average':24}", *(f"{value:11.1f}" for value in average))
        for name, rate in (
            ("AUROC", average[:3].mean()),
            ("sensitivity", average[3:6].mean()),
            ("specificity", average[6]),
        ):
            if not LOWEST_AVERAGE[name] <= rate <= HIGHEST_AVERAGE:
                missed.append(f"{name}, {patients} positive patients: {rate:.1f}% on average")
        if np.max(rows) > HIGHEST:
            missed.append(f"{patients} positive patients: {np.max(rows):.1f}% in one setting")
    return missed


def check_means(rng: np.random.Generator, rounds: int) -> list[str]:
    missed = []
    quantities = ("auroc", "sensitivity", "specificity")
    print(f"\n{'means, patients':18}{'patients':24}", *(f"{name:>11}" for name in quantities))
    for patients, shared in product((1, 2, 5, 10, 20), (False, True)):
        found = list(simulate_means(rng, patients, shared, rounds // 2))
        row = [measure(found, quantity) for quantity in quantities]
        print(f"{patients:<18}{'the same' if shared else 'others':24}", *(f"{rate:11.1f}" for rate in row), flush=True)
        lowest = LOWEST_MEANS if patients >= 10 else 0.0
        if not lowest <= np.mean(row) <= HIGHEST_MEANS or max(row) > HIGHEST:
            missed.append(f"means with {patients} positive patients per finding: {np.mean(row):.1f}% on average")
    return missed


def check_large(rng: np.random.Generator, rounds: int) -> list[str]:
    missed = []
    print(f"\n{'positive patients':18}{'other group':24}", *(f"{f'AUROC {auroc}':>11}" for auroc, _ in LARGE_LEVELS))
    for patients, ratio in product(POSITIVE_PATIENTS[:3:2], LARGE_RATIOS):
        found = (simulate(rng, patients, ratio, level, False, rounds) for level in LARGE_LEVELS)
        row = [measure(list(each), "auroc") for each in found]
        print(f"{patients:<18}{f'{ratio} x as many':24}", *(f"{rate:11.1f}" for rate in row), flush=True)
        if max(row) > HIGHEST_LARGE:
            missed.append(f"{patients} positive patients, {ratio} x as many: {max(row):.1f}%")
    return missed


def check_missed(rng: np.random.Generator, rounds: int) -> list[str]:
    missed = []
    print(f"\n{'some missed':42}", *(f"{f'AUROC {auroc}':>11}" for auroc in MISSED_LEVELS))
    for patients in POSITIVE_PATIENTS:
        row = []
        for auroc in MISSED_LEVELS:
            settings = product((1, 3), (False, True))
            found = [
                simulate(rng, patients, *one, rounds // 4, draw=draw_missed)
                for one in ((r, (auroc, 0.8), s) for r, s in settings)
            ]
            row.append(measure([d for part in found for d in part], "auroc"))
        print(f"{patients:<42}", *(f"{rate:11.1f}" for rate in row), flush=True)
        if max(row) > HIGHEST_MISSED:
            missed.append(f"{patients} positive patients, some missed: {max(row):.1f}%")
    return missed


def main(rounds: int) -> int:
    rng = np.random.default_rng(20211210)
    missed = [*check_findings(rng, rounds), *check_means(rng, rounds), *check_missed(rng, rounds)]
    missed += check_large(np.random.default_rng(10), rounds // 2)
    print(*(f"missed: {line}" for line in missed), sep="\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
