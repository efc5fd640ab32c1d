"""Count rounds in which a group is named as clearly different in underdiagnosis although no groups differ.

    python tests/simulations/underdiagnosis.py [ROUNDS]

Each round draws 13 groups and a reference group of 300 patients with a finding. Patients have geometric numbers of
images, on average 3 or 10, and their images are correlated (0.6 of the variance is the patient's). The number in the
table is the percentage of rounds that name any of the 13 groups; 5% is the level of the correction. The last column is
the power: one of the 13 groups has a rate 0.3 higher than 0.3.
"""

from __future__ import annotations

import sys
from itertools import product

import numpy as np
from scipy.special import ndtri

from ray_cxr.evaluation.group_estimates import LabelledScores
from ray_cxr.evaluation.groups import Group
from ray_cxr.evaluation.underdiagnosis import Underdiagnosis, measure_underdiagnosis

GROUPS, REFERENCE = 13, 300
PATIENTS, IMAGES = (12, 30, 60, 120), (3, 10)
#: Shares of images with a finding that are missed.
RATES = (0.1, 0.5, 0.9)
CORRELATION = 0.6
#: Bars in percent of rounds that name a group: for any setting, and on average over settings.
HIGHEST, HIGHEST_AVERAGE = 10.0, 5.0


def simulate(rng: np.random.Generator, patients: int, images: int, rates: np.ndarray) -> Underdiagnosis:
    """Draw one round; `rates` [groups] with the reference last."""
    sizes = np.repeat([patients, REFERENCE], [len(rates) - 1, 1])
    group = np.repeat(np.arange(len(rates)), sizes)
    codes = np.repeat(np.arange(len(group)), rng.geometric(1 / images, len(group)))
    own, noise = rng.normal(size=len(group))[codes], rng.normal(size=len(codes))
    missed = np.sqrt(CORRELATION) * own + np.sqrt(1 - CORRELATION) * noise < ndtri(rates)[group[codes]]
    labels = np.ones((len(codes), 1), dtype=np.int8)
    flags = (~missed).astype(np.int8)[:, None]
    data = LabelledScores.build(labels, labels.astype(float), flags, codes, ("Mass",), np.ones(1, dtype=bool))
    masks = [Group("age", str(i), group[codes] == i) for i in range(len(rates))]
    found = measure_underdiagnosis(masks, data, np.ones(len(codes), dtype=np.int8))
    assert isinstance(found, Underdiagnosis)
    return found


def main(rounds: int) -> int:
    rng = np.random.default_rng(20211210)
    heads = [f"rate {rate}" for rate in RATES]
    print(f"{'patients':10}{'images each':12}", *(f"{head:>9}" for head in [*heads, "power"]))
    rows, missed = [], []
    for patients, images in product(PATIENTS, IMAGES):
        row = []
        for rate in RATES:
            found = (simulate(rng, patients, images, np.full(GROUPS + 1, rate)) for _ in range(rounds))
            row.append(100 * float(np.mean([each.highest is not None for each in found])))
        raised = np.where(np.arange(GROUPS + 1) == 0, 0.6, 0.3)
        found = (simulate(rng, patients, images, raised) for _ in range(rounds // 2))
        power = 100 * float(np.mean([bool(each.groups[0].beyond_chance) for each in found]))
        print(f"{patients:<10}{images:<12}", *(f"{value:9.1f}" for value in [*row, power]), flush=True)
        rows.append(row)
        if max(row) > HIGHEST:
            missed.append(f"{patients} patients with {images} images each: {max(row):.1f}%")
    average = float(np.mean(rows[len(IMAGES) :]))  # without the groups that are too small for a claim
    print(f"average from {PATIENTS[1]} patients: {average:.1f}%")
    if average > HIGHEST_AVERAGE or np.max(rows[: len(IMAGES)]) > 0.0:
        missed.append("the average, or a group below the least number of patients")
    print(*(f"missed: {line}" for line in missed), sep="\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 150))
