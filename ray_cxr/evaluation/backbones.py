"""Compare the backbones of a hyper-parameter search, and judge whether the best two differ by more than noise.

Two tests cover different noise. The paired patient bootstrap shows whether two trained models would change ranks on
other patients. The second test shows whether the backbones differ by more than seeds and settings do. With confirming
trainings it is `confirmation.sign_flip_test`, and their mean must also exceed the noise of patients. Without them it is
a permutation test of the trials whose settings were drawn at random. Trials that a sampler such as TPE chose are not
exchangeable between backbones, because it repeats the settings of the backbone that led by chance: a permutation test
of all trials finds a difference between two identical backbones in 23% of simulated searches of 20 trials, and in 95%
of searches of 100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from ray_cxr.evaluation.confirmation import MIN_PAIRS, Confirmation
from ray_cxr.evaluation.intervals import to_record
from ray_cxr.evaluation.paired import PairedAuroc

State = Literal["finished", "stopped", "failed", "running"]
Answer = Literal["yes", "no", "disagree", "undecided"]

#: A difference counts as more than noise if p is below this level, or if its 95% interval excludes 0.
LEVEL = 0.05
#: With fewer values, quartiles equal the extremes.
_MIN_QUARTILES = 3
#: Values permuted at once, to bound memory.
_CELLS = 1 << 20


@dataclass(frozen=True)
class PermutationTest:
    """Comparison of two small groups by their medians; `reason` is set if p is None."""

    difference: float | None  # median of the first minus that of the second
    p: float | None  # two-sided
    smallest: float | None  # smallest p that any arrangement of these values allows
    arrangements: int
    exact: bool  # whether these are all arrangements, rather than random ones
    reason: str | None = None


@dataclass(frozen=True)
class TrialCurve:
    """Learning curve of one trial: (epoch, validation AUROC) per trained epoch, None if undefined."""

    number: int
    backbone: str
    state: State
    curve: tuple[tuple[int, float | None], ...]
    is_random: bool = True  # whether its settings were drawn without knowledge of other trials


@dataclass(frozen=True)
class BackboneResult:
    """Validation macro AUROC that one backbone reached.

    A failed trial's epochs count as spent; its AUROC does not count, because it left no model.
    """

    backbone: str
    trials: int
    finished: int
    stopped: int
    failed: int
    running: int
    epochs: int
    best: float | None
    best_trial: int | None
    best_at_budget: float | None  # highest AUROC within the first `Comparison.budget` epochs, trials in order
    median: float | None  # of `values`
    lower: float | None  # quartiles of `values`; None with fewer than three
    upper: float | None
    values: tuple[float, ...]  # highest AUROC in the first `Comparison.grace` epochs of each trial that has them
    numbers: tuple[int, ...]  # of the trials behind `values`
    independent: tuple[float, ...]  # those of `values` whose trials have random settings


@dataclass(frozen=True)
class Comparison:
    """Backbones side by side."""

    backbones: tuple[BackboneResult, ...]  # best first; those without an AUROC last
    grace: int  # epochs per trial that `BackboneResult.values` compares
    budget: int  # epochs per backbone that `BackboneResult.best_at_budget` compares; 0 without any epoch
    test: PermutationTest | None  # of `independent` of the best two; None if fewer than two have an AUROC

    @property
    def pair(self) -> tuple[BackboneResult, BackboneResult] | None:
        """The best two backbones; None if fewer than two have an AUROC."""
        return (self.backbones[0], self.backbones[1]) if self.test is not None else None


@dataclass(frozen=True)
class Verdict:
    """Whether the best two backbones differ by more than noise; details and noise are empty without two backbones."""

    answer: Answer  # "yes" or "no" if both tests agree, "disagree" if not, "undecided" if a test is missing
    headline: str
    details: str  # one sentence per test with its numbers
    noise: str  # which noise the tests cover, and which not


def permutation_test(x: Sequence[float], y: Sequence[float], n: int = 10_000, seed: int = 0) -> PermutationTest:
    """Test the difference of two groups' medians, two-sided, by permuting values between the groups.

    Evaluates all arrangements if there are at most `n`. Otherwise draws `n` random ones and adds the observed one.
    """
    values = np.array([*x, *y], dtype=np.float64)
    size = len(x)
    if size < 2 or len(y) < 2:
        return PermutationTest(None, None, None, 0, False, f"groups of {size} and {len(y)} values; each needs two")
    observed = float(np.median(values[:size]) - np.median(values[size:]))
    exact = math.comb(len(values), size) <= n
    if exact:
        gaps = _compute_median_gaps(values, np.array(list(combinations(range(len(values)), size))))
    else:
        rng = np.random.default_rng(seed)
        step = max(1, _CELLS // len(values))
        sizes = [min(step, n - start) for start in range(0, n, step)]
        # The positions of the smallest random numbers are a draw without replacement.
        draws = (np.argpartition(rng.random((rows, len(values))), size, axis=1)[:, :size] for rows in sizes)
        gaps = np.concatenate([_compute_median_gaps(values, members) for members in draws])
    added = 0 if exact else 1
    rounding = 1e-12 * max(1.0, float(np.abs(values).max()))
    return PermutationTest(
        difference=observed,
        p=(int((gaps >= abs(observed) - rounding).sum()) + added) / (len(gaps) + added),
        smallest=(int((gaps >= gaps.max() - rounding).sum()) + added) / (len(gaps) + added),
        arrangements=len(gaps),
        exact=exact,
    )


def compare_backbones(trials: Sequence[TrialCurve], grace: int, n: int = 10_000, seed: int = 0) -> Comparison:
    """Compare backbones by their best epoch, at equal cost, and per trial at equal length.

    The best of many trials exceeds the best of few, and ten epochs exceed three. So the result also has each backbone's
    best within the number of epochs that the least trained backbone had, and each trial's best within `grace` epochs.
    Every trial reaches `grace` epochs unless it failed.
    """
    groups: dict[str, list[TrialCurve]] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        curve = tuple(sorted(trial.curve, key=lambda point: point[0]))
        groups.setdefault(trial.backbone, []).append(replace(trial, curve=curve))
    # A backbone without epochs has no result, and must not reduce the others' budget to 0.
    spent = [total for group in groups.values() if (total := sum(len(trial.curve) for trial in group))]
    budget = min(spent, default=0)
    results = [_summarize(name, group, grace, budget) for name, group in groups.items()]
    results.sort(key=lambda result: (result.best is None, -(result.best or 0.0), result.backbone))
    test = None
    if len(results) > 1 and results[1].best is not None:
        test = permutation_test(results[0].independent, results[1].independent, n, seed)
    return Comparison(tuple(results), grace, budget, test)


def judge_backbones(
    compared: Comparison, paired: PairedAuroc | None, confirmation: Confirmation | None = None
) -> Verdict:
    """Decide whether the best two backbones differ by more than noise.

    `paired` compares the best trials of both on the same validation images; None if it was not computed.
    `confirmation` replaces the permutation test.
    """
    if compared.pair is None:
        names = [result.backbone for result in compared.backbones if result.best is not None]
        reason = (
            f"only one backbone, {names[0]}, has a validation AUROC" if names else "no trial has a validation AUROC"
        )
        return Verdict("undecided", f"No verdict on backbones: {reason}.", "", "")
    assert compared.test is not None
    first, second = compared.pair
    by_patients, patients_text = _judge_by_patients(first, second, paired)
    if confirmation is None:
        by_trials, trials_text = _judge_by_trials(first, second, compared.test, compared.grace)
    else:
        by_trials, trials_text = _judge_by_confirmation(first, second, confirmation, paired)
    repeated = "seeds" if confirmation is not None else "trials"
    pair = f"{first.backbone} and {second.backbone}"
    answer: Answer
    if by_patients is None or by_trials is None:
        answer = "undecided"
        signs = {"patients": by_patients, repeated: by_trials}
        missing = " and between ".join(name for name, sign in signs.items() if sign is None)
        headline = f"No verdict on {pair}: too little data to estimate the noise between {missing}."
    elif by_patients != by_trials:
        answer = "disagree"
        headline = f"Neither of {pair} is shown to be better: the tests over patients and over {repeated} disagree."
    elif by_patients == 0:
        answer = "no"
        headline = (
            f"{pair} are not shown to differ by more than noise, neither between patients nor between {repeated}."
        )
    else:
        answer = "yes"
        better, other = (first, second) if by_patients > 0 else (second, first)
        headline = (
            f"{better.backbone} is better than {other.backbone} by more than noise, both between patients and between "
            f"{repeated}."
        )
    if answer != "yes" and confirmation is None:
        headline += f" To test smaller differences, add --resume --confirm {MIN_PAIRS}."
    noise = _explain_noise(first, second, compared, is_confirmed=confirmation is not None)
    return Verdict(answer, headline, f"{patients_text} {trials_text}", noise)


def comparison_record(
    compared: Comparison, paired: PairedAuroc | None, confirmation: Confirmation | None = None
) -> dict[str, Any]:
    """Return comparison and verdict as a JSON object; `patients` holds `paired`, and `trials` the permutation test."""
    pair = None
    if compared.pair is not None:
        first, second = compared.pair
        pair = {"a": first.backbone, "b": second.backbone, "trial_a": first.best_trial, "trial_b": second.best_trial}
    return {
        "grace": compared.grace,
        "budget": compared.budget,
        "backbones": [to_record(result) for result in compared.backbones],
        "pair": pair,
        "patients": None if paired is None else to_record(paired),
        "trials": None if compared.test is None else to_record(compared.test),
        "confirmation": None if confirmation is None else to_record(confirmation),
        "verdict": to_record(judge_backbones(compared, paired, confirmation)),
    }


def _compute_median_gaps(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Return the distance of the medians when values[members[b]] form one group, float64 [b]."""
    outside = np.ones((len(members), len(values)), dtype=bool)
    np.put_along_axis(outside, members, False, axis=1)
    rest = np.broadcast_to(values, outside.shape)[outside].reshape(len(members), -1)
    return np.asarray(np.abs(np.median(values[members], axis=1) - np.median(rest, axis=1)))


def _summarize(name: str, trials: Sequence[TrialCurve], grace: int, budget: int) -> BackboneResult:
    """Summarise one backbone's trials, in order of their numbers, with their epochs in order."""
    states: list[str] = [trial.state for trial in trials]
    kept = [trial for trial in trials if trial.state != "failed"]
    highest = {trial.number: top for trial in kept if (top := _find_highest(trial.curve)) is not None}
    best_trial = max(highest, key=lambda number: highest[number], default=None)  # the first of equal trials
    epochs = [(trial.state, point) for trial in trials for point in trial.curve]
    values = {
        trial.number: top
        for trial in kept
        if len(trial.curve) >= grace and (top := _find_highest(trial.curve[:grace])) is not None
    }
    q1, median, q3 = np.percentile([*values.values()], [25, 50, 75]).tolist() if values else [None] * 3
    few = len(values) < _MIN_QUARTILES
    return BackboneResult(
        backbone=name,
        trials=len(trials),
        **{state: states.count(state) for state in ("finished", "stopped", "failed", "running")},
        epochs=len(epochs),
        best=None if best_trial is None else highest[best_trial],
        best_trial=best_trial,
        best_at_budget=_find_highest([point for state, point in epochs[:budget] if state != "failed"]),
        median=median,
        lower=None if few else q1,
        upper=None if few else q3,
        values=tuple(values.values()),
        numbers=tuple(values),
        independent=tuple(values[trial.number] for trial in kept if trial.is_random and trial.number in values),
    )


def _find_highest(curve: Sequence[tuple[int, float | None]]) -> float | None:
    values = [float(value) for _, value in curve if value is not None and math.isfinite(value)]
    return max(values, default=None)


def _judge_by_patients(
    first: BackboneResult, second: BackboneResult, paired: PairedAuroc | None
) -> tuple[int | None, str]:
    """Return which is better (1 first, -1 second, 0 neither, None unknown), and a sentence for `Verdict.details`."""
    pair = f"trial {first.best_trial} ({first.backbone}) against trial {second.best_trial} ({second.backbone})"
    if paired is None:
        return None, f"Patients: {pair} was not compared."
    if paired.difference is None or paired.low is None or paired.high is None or paired.p is None:
        return None, f"Patients: {pair} cannot be compared: {paired.reason}."
    sign = 1 if paired.low > 0 else -1 if paired.high < 0 else 0
    return sign, (
        f"Patients: {pair} is {_format_signed(paired.difference)} macro AUROC on the same validation images (95% "
        f"interval {_format_signed(paired.low)} to {_format_signed(paired.high)}, {_format_p(paired.p)}); other "
        f"patients {'could hardly' if sign else 'could'} reverse the order."
        + (" No patient id is known, so each image counts as one patient." if paired.n_patients is None else "")
    )


def _judge_by_trials(
    first: BackboneResult, second: BackboneResult, test: PermutationTest, grace: int
) -> tuple[int | None, str]:
    """Return which is better and a sentence, as `_judge_by_patients` does, from the spread between random trials."""
    length = f"the first {f'{grace} epochs' if grace != 1 else 'epoch'} of each trial with random settings"
    if test.p is None or test.difference is None or test.smallest is None:
        return None, f"Trials: medians over {length} cannot be compared: {test.reason}."
    medians = " and ".join(
        f"{np.median(result.independent):.3f} ({result.backbone}, {len(result.independent)} trials)"
        for result in (first, second)
    )
    medians = f"Trials: the median over {length} is {medians}"
    if test.smallest >= LEVEL:
        return None, f"{medians}; the trials are too few or too much alike: p cannot fall below {test.smallest:.3f}."
    sign = 0 if test.p >= LEVEL else 1 if test.difference > 0 else -1
    return sign, (
        f"{medians}: they differ {'more than' if sign else 'no more than'} trials of one backbone differ among "
        f"themselves (permutation {_format_p(test.p)})."
    )


def _judge_by_confirmation(
    first: BackboneResult, second: BackboneResult, confirmation: Confirmation, paired: PairedAuroc | None
) -> tuple[int | None, str]:
    """Return which is better and a sentence, as `_judge_by_patients` does, from the confirming trainings.

    All pairs share the validation images, and the lead of the best trials is partly luck. So the mean of the pairs must
    also exceed the noise of seeds and patients together. Their distances to the limits add as squares, as for any sum
    of independent estimates (Zou and Donner 2008, "Construction of confidence limits about effect measures").
    """
    test, total = confirmation.test, len(confirmation.pairs)
    if confirmation.ended < total:
        return None, (
            f"Confirmation: {confirmation.ended} of {total} pairs of trainings have ended; add --resume --confirm "
            f"{total} to continue."
        )
    if test.p is None or test.mean is None or test.low is None or test.high is None:
        return None, f"Confirmation: {test.reason}; raise --confirm to add pairs."
    orient = 1 if confirmation.a == first.backbone else -1
    low, high = sorted((orient * test.low, orient * test.high))
    mean = orient * test.mean
    sign, together = 0 if test.p >= LEVEL else 1 if mean > 0 else -1, ""
    if paired is not None and paired.difference is not None and paired.low is not None and paired.high is not None:
        lower = mean - math.hypot(mean - low, paired.difference - paired.low)
        upper = mean + math.hypot(high - mean, paired.high - paired.difference)
        sign = 0 if lower <= 0 <= upper else sign
        together = f"; with the noise between patients {_format_signed(lower)} to {_format_signed(upper)}"
    return sign, (
        f"Confirmation: in {test.n} pairs of new trainings with equal settings and seeds, {first.backbone} against "
        f"{second.backbone} is {_format_signed(mean)} macro AUROC on average (95% interval "
        f"{_format_signed(low)} to {_format_signed(high)}, sign-flip {_format_p(test.p)}{together})."
    )


def _explain_noise(first: BackboneResult, second: BackboneResult, compared: Comparison, *, is_confirmed: bool) -> str:
    backbones = sum(result.best is not None for result in compared.backbones)
    selected = f" The two backbones were selected as the best of {backbones}, partly by luck." if backbones > 2 else ""
    patients = (
        "Sources of noise: the interval over patients covers validation patients only, for two fixed models. It does "
        f"not cover that they are the best of {first.trials} and of {second.trials} trials, selected on these same "
        "images. "
    )
    if is_confirmed:
        return patients + (
            "The confirming pairs repeat the comparison with new seeds on the same images, and with settings that "
            "were good for one backbone or the other. They show nothing about other settings, or about a longer "
            f"training.{selected}"
        )
    return patients + (
        "Every trial was trained with one seed. The second test uses only trials with random settings, because the "
        "sampler chose the others from earlier results. These trials are few, so the test finds large differences "
        f"only. An early lead (epochs: {compared.grace}) may not last.{selected}"
    )


def _format_signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _format_p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
