"""Level and power of the verdict whether a backbone is better (`tune`), and of its tests.

python tests/simulations/backbone_verdict.py [SEARCHES]

Simulated searches use the sampler, the default space, the choice of confirming settings and the verdict of `tune`. A
formula replaces the training: settings spread by 0.03 of AUROC, seeds by 0.003.

What is reused: a search of 20 trials is the start of one of 100 trials, so one search counts once per size. Given a
search, its confirming pairs are random only by their seeds, so each search gets 10 sets of new pairs. Intervals and
bars treat all verdicts of a search as one cluster. The test of random trials does not depend on TPE: its trials are
drawn separately, 1,000 times.

The test of patients uses a normal interval. Its standard error comes from the bootstrap of `tune` on simulated scores
of 14 findings, 11,000 images and 2,800 patients: AUROC 0.80, correlation of the two models' scores 0.8. The script
checks it against the spread of the differences between such data sets.

"all trials" is a test of all trials, which `tune` does not use, because TPE chose most of them.
The exit code is 1 if a test in use or the verdict says yes too often for identical backbones, if the verdict lacks
power with confirming pairs, or if the standard error is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from math import log10
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import optuna
from scipy.special import ndtri

from ray_cxr.config import TrainSettings, TuneSettings
from ray_cxr.evaluation import backbones, metrics
from ray_cxr.evaluation.confirmation import Confirmation, ConfirmedPair
from ray_cxr.evaluation.intervals import wilson_interval
from ray_cxr.evaluation.paired import PairedAuroc, paired_macro_auroc
from ray_cxr.tuning.confirm import Source, build_pairs
from ray_cxr.tuning.plan import StudyPlan
from ray_cxr.tuning.space import Space, default_space

SEED_NOISE, PAIRS, DRAWS = 0.003, 6, 10
IMAGES, PATIENTS, AUROC, CORRELATION = 11_000, 2_800, 0.80, 0.8
#: Prevalences of ChestX-ray14.
PREVALENCE = np.array([10.3, 2.5, 4.2, 2.1, 11.9, 2.2, 1.5, 0.2, 17.7, 5.2, 5.6, 3.0, 1.3, 4.7]) / 100
TESTS = ("all trials", "patients", "confirming pairs", "verdict")
NAMES = ("ResNet50", "DenseNet121", "EfficientNetV2B0")
BASE = TrainSettings(size=64)


class Case(NamedTuple):
    """Searches that are alike."""

    trials: tuple[int, ...]  # at which the search is judged
    backbones: int
    lead: float  # of the first backbone, for all patients
    interaction: float  # spread of the settings' effects between backbones
    luck: float  # spread of the lead between sets of validation patients, in standard errors
    share: float  # of the number of searches


CASES = (
    Case((20, 40, 60, 100), 2, 0.0, 0.0, 0.0, 1.0),
    Case((60,), 3, 0.0, 0.0, 0.0, 0.3),
    Case((20, 60), 2, 0.0, 0.0, 1.0, 0.5),
    Case((20, 60), 2, 0.0, 0.005, 1.0, 0.25),
    Case((20, 60), 2, 0.02, 0.005, 1.0, 0.25),
    Case((20, 60), 2, 0.01, 0.005, 1.0, 0.25),
)


def describe(values: Mapping[str, Any]) -> np.ndarray:
    """Return the settings as numbers of about unit spread."""
    return np.array(
        [
            (log10(values["learning_rate"]) + 3.75) / 0.72,
            2.0 * (values["optimizer"] == "adamw") - 1,
            2.0 * (values["schedule"] == "plateau") - 1,
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
    """AUROC of any settings, with the noise of a seed. `luck` is the part of the lead that other patients lack."""

    def __init__(self, rng: np.random.Generator, case: Case, error: float) -> None:
        self._rng, self._lead, self._luck = rng, case.lead, case.luck * error * float(rng.normal())
        weights = rng.normal(size=(len(NAMES), len(LINEAR)))
        self._weights = case.interaction * weights / np.linalg.norm(weights, axis=1, keepdims=True)

    def train(self, values: Mapping[str, Any]) -> float:
        luck = self._luck if values["backbone"] == NAMES[0] else 0.0
        return self.expect(values) + luck + SEED_NOISE * float(self._rng.normal())

    def expect(self, values: Mapping[str, Any]) -> float:
        x, index = describe(values), NAMES.index(values["backbone"])
        level = 0.8 + x @ LINEAR - 0.03 * x[0] ** 2 - 0.003 * x[6] ** 2 + x @ self._weights[index]
        return float(level + (self._lead if index == 0 else 0.0))


Trained = list[tuple[float, int, dict[str, Any]]]  # AUROC, number and settings of each trial


class Search:
    """A search and the verdicts after it."""

    def __init__(self, seed: int, case: Case, error: float) -> None:
        self._rng = np.random.default_rng([seed, case.backbones, round(1000 * case.lead)])
        self._names, self._error = NAMES[: case.backbones], error
        self._surface = Surface(self._rng, case, error)
        self._space = Space.read({**default_space(BASE, [64]), "backbone": list(self._names)}, BASE, [64])

    def run(self, trials: int, sampler: str = "tpe") -> Trained:
        settings = TuneSettings(seed=int(self._rng.integers(2**31)), sampler=sampler)
        created = StudyPlan.create_sampler(SimpleNamespace(settings=settings), 0)  # type: ignore[arg-type]
        study = optuna.create_study(direction="maximize", sampler=created)
        results: Trained = []
        for number in range(trials):
            trial = study.ask()
            self._space.suggest(trial)
            values = self._space.values(trial.params)
            results.append((self._surface.train(values), number, values))
            study.tell(trial, results[-1][0])
        return results

    def compare(self, results: Trained) -> backbones.Comparison:
        # The permutation test of random trials is measured with other trials.
        return backbones.compare_backbones(
            [backbones.TrialCurve(number, v["backbone"], "finished", ((1, y),)) for y, number, v in results], 1, n=999
        )

    def judge(self, results: Trained) -> dict[str, np.ndarray]:
        """Return the answers of each test, [DRAWS]: 1 if the first of `NAMES` is better, -1 if another one, or 0.

        `truth` compares the best of all settings of the search with either backbone, without noise.
        """
        compared = self.compare(results)
        if compared.pair is None or compared.test is None:
            return {name: np.zeros(DRAWS) for name in (*TESTS, "truth")}
        first, second = compared.pair
        assert first.best is not None
        assert second.best is not None
        gap, reach = first.best - second.best, -float(ndtri(0.025)) * self._error
        paired = PairedAuroc(
            a=first.best, b=second.best, difference=gap, low=gap - reach, high=gap + reach, p=0.5, undefined=0,
            columns=tuple(range(len(PREVALENCE))), n_patients=PATIENTS, n_resamples=1000, seed=0,
        )  # fmt: skip
        names = (first.backbone, second.backbone)
        ordered = sorted(results, key=lambda result: -result[0])
        ranked = [[Source(n, v) for _, n, v in ordered if v["backbone"] == name] for name in names]
        pairs = build_pairs(self._space, names, ranked, PAIRS)
        signs: dict[str, list[float]] = {"confirming pairs": [], "verdict": []}
        for _ in range(DRAWS):
            trained = [(self._surface.train(a), self._surface.train(b)) for _, (a, b) in pairs]
            confirmation = Confirmation.of(*names, [ConfirmedPair(0, 0, a, b, True) for a, b in trained])
            assert confirmation.test.p is not None
            assert confirmation.test.mean is not None
            sign = np.sign(confirmation.test.mean)
            answer = backbones.judge_backbones(compared, paired, confirmation).answer
            signs["confirming pairs"].append(sign * (confirmation.test.p < backbones.LEVEL))
            signs["verdict"].append(sign * (answer == "yes"))
        tops = [max(self._surface.expect({**v, "backbone": name}) for _, _, v in results) for name in names]
        every = 0.0
        if compared.test.p is not None and compared.test.difference is not None:
            every = np.sign(compared.test.difference) * (compared.test.p < backbones.LEVEL)
        answers = {"all trials": every, "patients": float(gap > reach), **signs, "truth": np.sign(tops[0] - tops[1])}
        orient = 1 if names[0] == NAMES[0] else -1
        return {name: orient * np.broadcast_to(np.array(value), DRAWS) for name, value in answers.items()}


def summarize(found: np.ndarray) -> tuple[str, float]:
    """Return the share of [searches, verdicts of each] in %, with a 95% interval by search, and its lower limit."""
    share, error = float(found.mean()), float(found.mean(axis=1).std()) / np.sqrt(len(found))
    # Without variation between searches the number of verdicts would count as certain; count searches.
    count = min(share * (1 - share) / error**2, found.size) if error else len(found)
    low, high = wilson_interval(share, count)
    return f"{100 * share:.1f} ({100 * low:.1f} to {100 * high:.1f})", low


def draw_models(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, the scores of two equally good models, and patients."""
    patients = np.concatenate([np.arange(PATIENTS), rng.integers(0, PATIENTS, IMAGES - PATIENTS)])

    def noise() -> np.ndarray:
        own = rng.normal(size=(PATIENTS, len(PREVALENCE)))[patients]
        return np.sqrt(0.4) * own + np.sqrt(0.6) * rng.normal(size=(IMAGES, len(PREVALENCE)))

    labels, common = (noise() < ndtri(PREVALENCE)).astype(np.int8), noise()
    level = np.sqrt(2) * ndtri(AUROC) * labels + np.sqrt(CORRELATION) * common
    return labels, *(level + np.sqrt(1 - CORRELATION) * noise() for _ in range(2)), patients


def measure_error(rounds: int = 120, bootstraps: int = 20) -> tuple[float, float]:
    """Return the standard error by the bootstrap, and the standard deviation of differences between data sets."""
    rng, differences, errors = np.random.default_rng(0), [], []
    for number in range(rounds):
        labels, a, b, patients = draw_models(rng)
        if number < bootstraps:
            paired = paired_macro_auroc(labels, a, b, patients, n_resamples=400)
            assert paired.low is not None
            assert paired.high is not None
            errors.append((paired.high - paired.low) / (2 * -float(ndtri(0.025))))
        aurocs = [[metrics.auroc(y, s) for y, s in zip(labels.T, scores.T, strict=True)] for scores in (a, b)]
        differences.append(np.subtract(*np.array(aurocs, dtype=np.float64)).mean())
    return float(np.mean(errors)), float(np.std(differences, ddof=1))


def check_random_trials(searches: int) -> bool:
    """Print how often the permutation test of the random start-up trials finds a difference, and check its level."""
    # Two of the ten start-up trials have known settings.
    count, held = TuneSettings().startup_trials - 2, True
    for number, lead in ((2, 0.0), (3, 0.0), (2, 0.02)):
        case = Case((count,), number, lead, 0.0, 0.0, 1.0)
        found = []
        for seed in range(searches):
            search = Search(10_000 + seed, case, 0.0)
            test = search.compare(search.run(count, "random")).test
            found.append(test is not None and test.p is not None and test.p < backbones.LEVEL)
        text, low = summarize(np.array(found, dtype=float)[:, None])
        print(
            f"{count} random trials, {number} backbones, lead {lead}: a difference in {text} of {searches}", flush=True
        )
        held = held and (lead > 0 or low <= backbones.LEVEL)
    return held


def check_verdicts(searches: int, error: float) -> bool:
    """Print a row per case and number of trials, and check level and power."""
    print("% of verdicts that name the better backbone, or any one if both are equally good (95% interval)")
    print(f"trials | backbones | lead | interaction | luck | searches | {' | '.join(TESTS)} | wrong verdict")
    held = True
    for case in CASES:
        rounds = max(2, round(case.share * searches))
        answers: dict[int, list[dict[str, np.ndarray]]] = {size: [] for size in case.trials}
        for seed in range(rounds):
            search = Search(seed, case, error)
            results = search.run(max(case.trials))
            for size in case.trials:
                answers[size].append(search.judge(results[:size]))
        is_null = not case.lead and not case.interaction
        by_size = {}
        for size, judged in answers.items():
            signs = {name: np.array([one[name] for one in judged]) for name in (*TESTS, "truth")}
            found = {name: (signs[name] == 1 if case.lead else signs[name] != 0) for name in TESTS}
            wrong = found["verdict"] if is_null else signs["verdict"] * signs["truth"] < 0
            by_size[size] = found
            row = (size, case.backbones, case.lead, case.interaction, case.luck, rounds)
            texts = [summarize(one)[0] for one in (*found.values(), wrong)]
            print(" | ".join(map(str, (*row, *texts))), flush=True)
            held = held and (case.lead < 0.02 or size < 60 or found["verdict"].mean() >= 0.8)
        pooled = {name: np.hstack([found[name] for found in by_size.values()]) for name in TESTS}
        for name in ("confirming pairs", "verdict") if is_null else ():
            text, low = summarize(pooled[name])
            print(f"  all {pooled[name].size} verdicts, {name}: {text}")
            held = held and (low <= backbones.LEVEL or (name == "confirming pairs" and case.luck > 0))
    return held


def main(searches: int) -> int:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    error, spread = measure_error()
    print(f"standard error of the difference: {error:.4f} by bootstrap, {spread:.4f} between data sets", flush=True)
    held = [abs(error / spread - 1) < 0.25, check_random_trials(1000), check_verdicts(searches, error)]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 130))
