"""Level and power of the tests between trials that decide whether a backbone is better (`tune`).

python tests/simulations/backbone_verdict.py [SEARCHES PER ROW]

Simulated searches use the sampler, the default space and the choice of confirming settings of `tune`. A formula
replaces the training: settings spread by 0.03 of AUROC, seeds by 0.003. "all trials" is a test of all trials, which
`tune` does not use, because TPE chose most of them.
The verdict also needs the patient test to agree, so it says yes at most as often as the test between trials.
Exits with 1 if a test in use says yes too often for identical backbones, or if the confirming pairs lack power.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import log10
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna

from ray_cxr.config import TrainSettings, TuneSettings
from ray_cxr.evaluation import backbones
from ray_cxr.evaluation.confirmation import sign_flip_test
from ray_cxr.evaluation.intervals import wilson_interval
from ray_cxr.tuning.confirm import Source, build_pairs
from ray_cxr.tuning.plan import StudyPlan
from ray_cxr.tuning.space import Space, default_space

SEED_NOISE, PAIRS = 0.003, 6
TESTS = ("all trials", "random trials", "confirming pairs")
NAMES = ("ResNet50", "DenseNet121", "EfficientNetV2B0")
BASE = TrainSettings(size=64)
#: Trials, backbones, true lead of the first backbone, and spread of the settings' effects between backbones.
CASES = [
    *((trials, 2, 0.0, 0.0) for trials in (20, 40, 60, 100)),
    (60, 3, 0.0, 0.0),
    (60, 2, 0.0, 0.005),
    *((trials, 2, 0.02, 0.0) for trials in (20, 60)),
    (60, 2, 0.02, 0.005),
    (60, 2, 0.01, 0.005),
]


def describe(values: Mapping[str, Any]) -> np.ndarray:
    """Return the settings as numbers of about unit spread."""
    return np.array(
        [
            (log10(values["learning_rate"]) + 3.75) / 0.72,
            2.0 * (values["optimizer"] == "adamw") - 1,
            2.0 * (values["schedule"] == "cosine") - 1,
            {16: -1.2, 32: 0.0, 64: 1.2}[values["batch_size"]],
            {"bce": 0.0, "weighted_bce": -1.2, "focal": 1.2}[values["loss"]],
            {"avg": 0.0, "max": -1.2, "avgmax": 1.2}[values["pooling"]],
            (values["dropout"] - 0.25) / 0.17,
            (values["rotation"] - 5) / 3.2,
            (values["shift"] - 0.05) / 0.029,
            (values["contrast"] - 0.15) / 0.087,
        ]
    )


#: Effects of the settings; the learning rate has an optimum, as dropout does.
LINEAR = np.array([0.0, 0.002, 0.004, -0.002, 0.006, 0.004, 0.0, 0.002, 0.002, 0.002])


class Surface:
    """AUROC of any settings, with the noise of a seed."""

    def __init__(self, rng: np.random.Generator, lead: float, interaction: float) -> None:
        self._rng, self._lead = rng, lead
        weights = rng.normal(size=(len(NAMES), len(LINEAR)))
        self._weights = interaction * weights / np.linalg.norm(weights, axis=1, keepdims=True)

    def train(self, values: Mapping[str, Any]) -> float:
        return self.expect(values) + SEED_NOISE * float(self._rng.normal())

    def expect(self, values: Mapping[str, Any]) -> float:
        x, index = describe(values), NAMES.index(values["backbone"])
        level = 0.8 + x @ LINEAR - 0.03 * x[0] ** 2 - 0.003 * x[6] ** 2 + x @ self._weights[index]
        return float(level + (self._lead if index == 0 else 0.0))


def search(seed: int, trials: int, count: int, lead: float, interaction: float) -> dict[str, int]:
    """Return the answer of each test after one search: 1 if the first backbone is better, -1 or 0.

    `truth` compares the best of all settings of the search with either backbone, without noise.
    """
    rng = np.random.default_rng([seed, trials, count])
    surface = Surface(rng, lead, interaction)
    space = Space.read({**default_space(BASE, [64]), "backbone": list(NAMES[:count])}, BASE, [64])
    settings = TuneSettings(seed=int(rng.integers(2**31)))
    sampler = StudyPlan.create_sampler(SimpleNamespace(settings=settings), 0)  # type: ignore[arg-type]
    study = optuna.create_study(direction="maximize", sampler=sampler)
    results = []
    for number in range(trials):
        trial = study.ask()
        space.suggest(trial)
        values = space.values(trial.params)
        results.append((surface.train(values), number, values))
        study.tell(trial, results[-1][0])
    # Two of the start-up trials of `tune` have known settings.
    curves = [
        backbones.TrialCurve(number, values["backbone"], "finished", ((1, y),), 2 <= number < settings.startup_trials)
        for y, number, values in results
    ]
    compared = backbones.compare_backbones(curves, 1, n=999, seed=seed)
    if compared.pair is None or compared.test is None:
        return {**dict.fromkeys(TESTS, 0), "truth": 0}
    names = (compared.pair[0].backbone, compared.pair[1].backbone)
    every = backbones.permutation_test(compared.pair[0].values, compared.pair[1].values, n=999, seed=seed)
    ranked = [
        [Source(n, v) for _, n, v in sorted(results, key=lambda r: -r[0]) if v["backbone"] == name] for name in names
    ]
    pairs = build_pairs(space, names, ranked, PAIRS)
    flips = sign_flip_test([surface.train(a) - surface.train(b) for _, (a, b) in pairs])
    tops = [max(surface.expect({**values, "backbone": name}) for _, _, values in results) for name in names]
    orient = 1 if names[0] == NAMES[0] else -1
    tests = {
        "all trials": (every.p, every.difference),
        "random trials": (compared.test.p, compared.test.difference),
        "confirming pairs": (flips.p, flips.mean),
    }
    answers = {
        name: 0 if p is None or difference is None or p >= backbones.LEVEL else orient * (1 if difference > 0 else -1)
        for name, (p, difference) in tests.items()
    }
    return {**answers, "truth": orient * int(np.sign(tops[0] - tops[1]))}


def summarize(found: int, count: int) -> str:
    low, high = wilson_interval(found / count, count)
    return f"{100 * found / count:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def main(rounds: int, cases: Sequence[tuple[int, int, float, float]] = CASES) -> int:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    status, null = 0, []
    print("% of searches that name the better backbone, or any backbone if both are identical (95% Wilson interval)")
    print(f"trials | backbones | lead | interaction | {' | '.join(TESTS)} | pairs that name the wrong one")
    for trials, count, lead, interaction in cases:
        answers = [search(seed, trials, count, lead, interaction) for seed in range(rounds)]
        found = {name: sum(one[name] == 1 if lead else one[name] != 0 for one in answers) for name in TESTS}
        wrong = sum(one[TESTS[-1]] * one["truth"] < 0 for one in answers) if lead or interaction else found[TESTS[-1]]
        texts = " | ".join(summarize(number, rounds) for number in (*found.values(), wrong))
        print(f"{trials} | {count} | {lead} | {interaction} | {texts}", flush=True)
        if not lead and not interaction:
            null += answers
        elif lead == 0.02 and found[TESTS[-1]] < 0.8 * rounds:
            status = 1
    for name in TESTS[1:] if null else ():
        found_null = sum(one[name] != 0 for one in null)
        print(f"identical backbones, {len(null)} searches, {name}: {summarize(found_null, len(null))}")
        if wilson_interval(found_null / len(null), len(null))[0] > backbones.LEVEL:
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 40))
