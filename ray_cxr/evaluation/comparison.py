"""Is one backbone better than another, or is it noise? Two yardsticks, which know different things.

The paired patient bootstrap asks whether two given networks would change places on other patients. The permutation
test asks whether the trials of one backbone differ from those of the other by more than trials of one differ among
themselves. Neither knows of what was not repeated: another seed, another choice of settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from ray_cxr.evaluation import intervals, metrics

State = Literal["finished", "stopped", "failed", "running"]
Answer = Literal["yes", "no", "disagree", "undecided"]

#: p below this, like a 95% interval without 0, counts as more than noise.
LEVEL = 0.05
#: Fewer values than this have no quartiles apart from their extremes.
_MIN_QUARTILES = 3
#: Values dealt at once, which bounds memory.
_CELLS = 1 << 20


@dataclass(frozen=True)
class PairedAuroc:
    """Macro AUROC of two networks on the same images.

    Attributes:
        a, b: macro AUROC of each, or None.
        difference: a - b, or None.
        low, high: its 95% percentile interval over resampled patients, or None.
        p: two-sided bootstrap p value of no difference, or None.
        columns: the findings that count, by column: those with both classes among their labels.
        n_patients, n_resamples, seed: of the bootstrap.
        undefined: resamples left out because a finding had lost a class.
        reason: what is None and why; None where nothing is.
    """

    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    columns: tuple[int, ...]
    n_patients: int
    n_resamples: int
    undefined: int
    seed: int
    reason: str | None = None


@dataclass(frozen=True)
class PairedFinding:
    """AUROC of one finding by two sets of scores of the same images.

    Attributes:
        a, b: AUROC of each, or None.
        difference: a - b, or None.
        low, high: its 95% percentile interval over resampled patients, or None.
        p: two-sided bootstrap p value of no difference, or None.
        undefined: resamples left out because a class was lost.
        delong_p: two-sided p of DeLong's test for correlated curves, or None. It takes images as independent, and is
            too small where patients have several.
        n, positives: images with a label and both scores, and the positive ones among them.
        reason: why a, b, difference, or low, high and p are None; None where none is.
        delong_reason: why delong_p is None; None where it is not.
    """

    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    undefined: int
    delong_p: float | None
    n: int
    positives: int
    reason: str | None = None
    delong_reason: str | None = None


@dataclass(frozen=True)
class PairedFindings:
    """Two sets of scores compared finding by finding, and in the macro mean; all from one set of resamples.

    Attributes:
        findings: per column, in their order.
        macro: of the means over `macro.columns`.
    """

    findings: tuple[PairedFinding, ...]
    macro: PairedAuroc


@dataclass(frozen=True)
class PermutationTest:
    """Two small groups compared by their medians.

    Attributes:
        difference: median of the first less that of the second, or None.
        p: two-sided, or None.
        smallest: the least p that these values could have given, however they fell into the groups, or None.
        arrangements: ways to deal the values that were looked at.
        exact: whether those were all the ways there are.
        reason: why the rest is None; None otherwise.
    """

    difference: float | None
    p: float | None
    smallest: float | None
    arrangements: int
    exact: bool
    reason: str | None = None


@dataclass(frozen=True)
class TrialCurve:
    """What one trial showed.

    Attributes:
        number: its place in the search, from 0.
        backbone: of its network.
        state: how it ended, or "running".
        curve: (epoch, validation AUROC) of each epoch trained, the AUROC None where it was undefined.
    """

    number: int
    backbone: str
    state: State
    curve: tuple[tuple[int, float | None], ...]


@dataclass(frozen=True)
class BackboneResult:
    """What a search found out about one backbone. AUROC is the validation macro AUROC of an epoch.

    A failed trial's epochs were spent and count as such; its AUROC counts nowhere, because it left no model.

    Attributes:
        backbone: its name.
        trials, finished, stopped, failed, running: how many.
        epochs: trained in all its trials.
        best, best_trial: highest AUROC and the number of its trial, or None.
        best_at_budget: highest AUROC within the first `Comparison.budget` epochs, trials in order, or None.
        median, lower, upper: of `values`, the last two its quartiles; None where there are too few.
        values: of each trial that has `Comparison.grace` epochs, the highest AUROC in those, trials in order.
        numbers: the trials of `values`.
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
    best_at_budget: float | None
    median: float | None
    lower: float | None
    upper: float | None
    values: tuple[float, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """Backbones side by side.

    Attributes:
        backbones: best first; those without any AUROC last.
        grace: epochs per trial that `BackboneResult.values` compare.
        budget: epochs per backbone that `BackboneResult.best_at_budget` compares; 0 without any epoch.
        test: of the values of the first two backbones; None where fewer than two have an AUROC.
    """

    backbones: tuple[BackboneResult, ...]
    grace: int
    budget: int
    test: PermutationTest | None

    @property
    def pair(self) -> tuple[BackboneResult, BackboneResult] | None:
        """The two best backbones, or None where fewer than two have an AUROC."""
        return (self.backbones[0], self.backbones[1]) if self.test is not None else None


@dataclass(frozen=True)
class Verdict:
    """Whether the two best backbones differ by more than noise.

    Attributes:
        answer: "yes" and "no" where both yardsticks agree, "disagree" where not, "undecided" where one is missing.
        headline: the answer in a sentence.
        details: a sentence for either yardstick with its numbers; empty without two backbones.
        noise: what counts as noise here, and what neither yardstick knows; empty without two backbones.
    """

    answer: Answer
    headline: str
    details: str
    noise: str


def paired_macro_auroc(
    labels: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    patients: np.ndarray,
    n_resamples: int = 1000,
    seed: int = 0,
) -> PairedAuroc:
    """Difference of two networks' macro AUROC, with both measured in the same resamples of patients.

    Args:
        labels: [N, F], 1, 0, and a negative number where there is no label; only findings that shall count.
        a, b: scores [N, F] of either network; a label counts where both have a score that is not NaN.
        patients: ids [N]; see `intervals.patient_codes`.
        n_resamples: how many.
        seed: the same seed gives the same numbers, bit for bit.

    Raises:
        ValueError: shapes that do not fit, a label that is neither 0 nor 1, n_resamples < 1.
    """
    pair = _Pair(labels, a, b, patients, n_resamples, seed)
    return _macro_difference(pair, pair.defined)


def paired_findings(
    labels: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    patients: np.ndarray,
    n_resamples: int = 1000,
    seed: int = 0,
    macro: np.ndarray | None = None,
) -> PairedFindings:
    """Differences of two score sets' AUROC, finding by finding and in the mean, in the same resamples of patients.

    All differences are a - b. Of 14 findings without any difference one has p < 0.05 in about half of all
    comparisons: p values here are of one finding each, not of the smallest among them.

    Args:
        labels: [n, F], 1, 0, and NaN or a negative number where there is no label.
        a, b: scores [n, F] of either; a label counts where both have a score that is not NaN.
        patients: ids [n]; see `intervals.patient_codes`.
        n_resamples: how many.
        seed: the same seed gives the same numbers, bit for bit.
        macro: bool [F], which findings the mean counts if defined; default all.

    Raises:
        ValueError: shapes that do not fit, a label that is neither 0 nor 1, n_resamples < 1.
    """
    pair = _Pair(labels, a, b, patients, n_resamples, seed)
    chosen = np.ones(len(pair.defined), dtype=bool) if macro is None else np.asarray(macro, dtype=bool)
    return PairedFindings(
        findings=tuple(_finding_difference(pair, f) for f in range(len(pair.defined))),
        macro=_macro_difference(pair, pair.defined & chosen),
    )


class _Pair:
    """Two score sets where both have a score, and their AUROC in the same resamples.

    Attributes:
        labels, a, b: [n, F], as given, scores NaN where either is missing.
        defined: bool [F].
        n_patients, n_resamples, seed: of the bootstrap.
    """

    def __init__(
        self, labels: np.ndarray, a: np.ndarray, b: np.ndarray, patients: np.ndarray, n_resamples: int, seed: int
    ) -> None:
        labels, a, b = np.asarray(labels), np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
        if a.shape != labels.shape or b.shape != labels.shape:
            raise ValueError(f"labels {labels.shape}, scores {a.shape} and {b.shape} do not fit")
        missing = np.isnan(a) | np.isnan(b)
        self.labels, self.a, self.b = labels, np.where(missing, np.nan, a), np.where(missing, np.nan, b)
        # As columns of one table both networks share each resample, which is what pairs them.
        drawn = intervals.resampled_aurocs(
            np.hstack([labels, labels]), np.hstack([self.a, self.b]), patients, n_resamples, seed
        )
        count = labels.shape[1]
        self.defined = drawn.defined[:count]
        self._first, self._second = drawn.values[:, :count], drawn.values[:, count:]
        self.n_patients, self.n_resamples, self.seed = drawn.n_patients, n_resamples, seed

    def differences(self, columns: np.ndarray) -> np.ndarray:
        """Of the means over columns, float64 [n_resamples]."""
        return np.asarray(self._first[:, columns].mean(axis=1) - self._second[:, columns].mean(axis=1))

    def known(self, f: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels and both scores of the images that count for a finding."""
        usable = (self.labels[:, f] >= 0) & ~np.isnan(self.a[:, f])
        return self.labels[usable, f], self.a[usable, f], self.b[usable, f]


def _finding_difference(pair: _Pair, f: int) -> PairedFinding:
    y, a, b = pair.known(f)
    n, positives = len(y), int(np.count_nonzero(y))
    reason = metrics.undefined_reason(y)
    if reason is not None:
        return PairedFinding(*(None,) * 6, pair.n_resamples, None, n, positives, reason=reason, delong_reason=reason)
    first, second = metrics.auroc(y, a), metrics.auroc(y, b)
    assert first is not None
    assert second is not None
    differences = pair.differences(np.array([f]))
    interval = intervals.percentile_interval(differences, certain=True)
    correlated = intervals.delong_paired(y, a, b)
    delong_p = None if correlated is None else intervals.normal_p(correlated[0] - correlated[1], correlated[2])
    delong_reason = None
    if delong_p is None:
        few = "fewer than two positive or two negative images"
        delong_reason = few if correlated is None else "the difference has no variance between these images"
    return PairedFinding(
        a=first,
        b=second,
        difference=first - second,
        low=interval.low,
        high=interval.high,
        p=None if interval.low is None else _tail_p(differences[~np.isnan(differences)]),
        undefined=interval.undefined,
        delong_p=delong_p,
        n=n,
        positives=positives,
        reason=interval.reason,
        delong_reason=delong_reason,
    )


def _macro_difference(pair: _Pair, counted: np.ndarray) -> PairedAuroc:
    columns = tuple(int(f) for f in np.flatnonzero(counted))
    n_resamples = pair.n_resamples
    if not columns:
        return PairedAuroc(
            a=None,
            b=None,
            difference=None,
            low=None,
            high=None,
            p=None,
            columns=(),
            n_patients=pair.n_patients,
            n_resamples=n_resamples,
            undefined=n_resamples,
            seed=pair.seed,
            reason="no finding has both positive and negative images",
        )
    first, second = (_macro(pair.labels, scores, columns) for scores in (pair.a, pair.b))
    differences = pair.differences(np.array(columns))
    interval = intervals.percentile_interval(differences, certain=True)
    return PairedAuroc(
        a=first,
        b=second,
        difference=first - second,
        low=interval.low,
        high=interval.high,
        p=None if interval.low is None else _tail_p(differences[~np.isnan(differences)]),
        columns=columns,
        n_patients=pair.n_patients,
        n_resamples=n_resamples,
        undefined=interval.undefined,
        seed=pair.seed,
        reason=interval.reason,
    )


def permutation_p(x: Sequence[float], y: Sequence[float], n: int = 10_000, seed: int = 0) -> PermutationTest:
    """Two-sided permutation test of the difference of two groups' medians.

    With no difference any way to deal the values into groups of these sizes is as likely as the one seen. Up to `n`
    ways are all looked at; of more, `n` are drawn, and the one seen counts as one more.

    Args:
        x, y: finite values of either group.
        n: see above.
        seed: of the draw.

    Raises:
        ValueError: a value is not finite, or n < 1.
    """
    values = np.array([*x, *y], dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("values must be finite; leave trials without a value out")
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    size = len(x)
    if size < 2 or len(y) < 2:
        reason = f"groups of {size} and {len(y)}; each needs two values at least"
        return PermutationTest(None, None, None, 0, False, reason)
    seen = float(np.median(values[:size]) - np.median(values[size:]))
    exact = math.comb(len(values), size) <= n
    if exact:
        inside = np.array(list(combinations(range(len(values)), size)))
        dealt = _median_gaps(values, inside)
    else:
        rng = np.random.default_rng(seed)
        step = max(1, _CELLS // len(values))
        sizes = [min(step, n - start) for start in range(0, n, step)]
        # The places of the smallest of random numbers are a draw without replacement.
        draws = (np.argpartition(rng.random((rows, len(values))), size, axis=1)[:, :size] for rows in sizes)
        dealt = np.concatenate([_median_gaps(values, inside) for inside in draws])
    more = 0 if exact else 1
    slack = 1e-12 * max(1.0, float(np.abs(values).max()))  # the same two medians, rounded otherwise, are a tie
    return PermutationTest(
        difference=seen,
        p=(int((dealt >= abs(seen) - slack).sum()) + more) / (len(dealt) + more),
        smallest=(int((dealt >= dealt.max() - slack).sum()) + more) / (len(dealt) + more),
        arrangements=len(dealt),
        exact=exact,
    )


def compare_backbones(trials: Sequence[TrialCurve], grace: int, n: int = 10_000, seed: int = 0) -> Comparison:
    """What the trials of each backbone reached: over everything, at equal cost, and per trial at equal length.

    The best of many trials is higher than the best of few, and a trial of ten epochs is higher than one that was
    stopped after three. So beside the best over everything stand the best within as many epochs as the backbone with
    the fewest had, and the values after `grace` epochs of each trial.

    Args:
        trials: in any order, all of them.
        grace: epochs that every trial that did not fail has.
        n, seed: of `permutation_p`, for the values of the two best backbones.

    Raises:
        ValueError: grace < 1.
    """
    if grace < 1:
        raise ValueError(f"grace is {grace}; it must be at least 1")
    ordered = sorted(trials, key=lambda trial: trial.number)
    groups: dict[str, list[TrialCurve]] = {}
    for trial in ordered:
        groups.setdefault(trial.backbone, []).append(trial)
    # A backbone without any epoch has no result to compare; it shall not take the others' away.
    spent = [total for group in groups.values() if (total := sum(len(trial.curve) for trial in group))]
    budget = min(spent, default=0)
    results = [_backbone(name, group, grace, budget) for name, group in groups.items()]
    results.sort(key=lambda result: (result.best is None, -(result.best or 0.0), result.backbone))
    test = None
    if len(results) > 1 and results[1].best is not None:
        test = permutation_p(results[0].values, results[1].values, n, seed)
    return Comparison(tuple(results), grace, budget, test)


def verdict(compared: Comparison, paired: PairedAuroc | None, trials: tuple[int, int] | None = None) -> Verdict:
    """In plain words, whether the two best backbones differ by more than noise.

    Args:
        compared: of all trials.
        paired: of the best trial of the best backbone against that of the second, on the validation images; None
            where it was not computed.
        trials: the numbers of those two trials, where they are not `best_trial` of the two.
    """
    if compared.pair is None:
        named = [result.backbone for result in compared.backbones if result.best is not None]
        why = f"only one backbone, {named[0]}, has a validation AUROC" if named else "no trial has a validation AUROC"
        return Verdict("undecided", f"No verdict on backbones: {why}.", "", "")
    assert compared.test is not None
    first, second = compared.pair
    by_patients, patients_text = _by_patients(first, second, paired, trials)
    by_trials, trials_text = _by_trials(first, second, compared.test, compared.grace)
    names = f"{first.backbone} and {second.backbone}"
    answer: Answer
    if by_patients is None or by_trials is None:
        answer = "undecided"
        signs = {"patients": by_patients, "trials": by_trials}
        missing = " and between ".join(what for what, sign in signs.items() if sign is None)
        headline = f"No verdict on {names}: there is too little to judge the noise between {missing}."
    elif by_patients != by_trials:
        answer = "disagree"
        headline = f"Neither of {names} is shown to be better: patients and trials as yardsticks disagree."
    elif by_patients == 0:
        answer = "no"
        headline = f"{names} are not shown to differ by more than noise, neither between patients nor between trials."
    else:
        answer = "yes"
        better, other = (first, second) if by_patients > 0 else (second, first)
        headline = (
            f"{better.backbone} is better than {other.backbone} by more than noise, both between patients and between "
            "trials."
        )
    noise = _noise(first, second, compared)
    return Verdict(answer, headline, f"{patients_text} {trials_text}", noise)


def comparison_record(
    compared: Comparison, paired: PairedAuroc | None, trials: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Everything above as one JSON object, verdict included; what is undefined is None.

    Args:
        compared, paired, trials: as `verdict`.

    Returns:
        grace, budget, backbones (a list of `BackboneResult`), pair (names and trial numbers of the two compared, or
        None), patients (`PairedAuroc` or None), trials (`PermutationTest` or None), verdict (`Verdict`).
    """
    pair = None
    if compared.pair is not None:
        first, second = compared.pair
        numbers = trials or (first.best_trial, second.best_trial)
        pair = {"a": first.backbone, "b": second.backbone, "trial_a": numbers[0], "trial_b": numbers[1]}
    return {
        "grace": compared.grace,
        "budget": compared.budget,
        "backbones": [_plain(result) for result in compared.backbones],
        "pair": pair,
        "patients": None if paired is None else _plain(paired),
        "trials": None if compared.test is None else _plain(compared.test),
        "verdict": _plain(verdict(compared, paired, trials)),
    }


def _macro(labels: np.ndarray, scores: np.ndarray, columns: Sequence[int]) -> float:
    values = []
    for f in columns:
        known = (labels[:, f] >= 0) & ~np.isnan(scores[:, f])
        value = metrics.auroc(labels[known, f], scores[known, f])
        assert value is not None
        values.append(value)
    return float(np.mean(values))


def _median_gaps(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """How far the medians are apart when the values at the places inside[b, k] are one group; float64 [b]."""
    outside = np.ones((len(inside), len(values)), dtype=bool)
    np.put_along_axis(outside, inside, False, axis=1)
    rest = np.broadcast_to(values, outside.shape)[outside].reshape(len(inside), -1)
    return np.asarray(np.abs(np.median(values[inside], axis=1) - np.median(rest, axis=1)))


def _tail_p(differences: np.ndarray) -> float:
    # One more in the tail, as if the difference seen were 0 once: no number of resamples proves p = 0.
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2.0 * (tail + 1) / (len(differences) + 1))


def _backbone(name: str, group: Sequence[TrialCurve], grace: int, budget: int) -> BackboneResult:
    """The result of one backbone from its trials, in order of their numbers."""
    states = [trial.state for trial in group]
    best: tuple[float, int] | None = None
    left, at_budget = budget, None
    kept: list[tuple[int, float]] = []
    for trial in group:
        curve = sorted(trial.curve, key=lambda point: point[0])
        affordable, left = curve[:left], max(0, left - len(curve))
        if trial.state == "failed":
            continue
        if (top := _highest(curve)) is not None and (best is None or top > best[0]):
            best = top, trial.number
        if (top := _highest(affordable)) is not None and (at_budget is None or top > at_budget):
            at_budget = top
        if len(curve) >= grace and (top := _highest(curve[:grace])) is not None:
            kept.append((trial.number, top))
    values = tuple(value for _, value in kept)
    lower, upper = np.percentile(values, [25, 75]) if len(values) >= _MIN_QUARTILES else (None, None)
    return BackboneResult(
        backbone=name,
        trials=len(group),
        finished=states.count("finished"),
        stopped=states.count("stopped"),
        failed=states.count("failed"),
        running=states.count("running"),
        epochs=sum(len(trial.curve) for trial in group),
        best=None if best is None else best[0],
        best_trial=None if best is None else best[1],
        best_at_budget=at_budget,
        median=float(np.median(values)) if values else None,
        lower=None if lower is None else float(lower),
        upper=None if upper is None else float(upper),
        values=values,
        numbers=tuple(number for number, _ in kept),
    )


def _highest(curve: Sequence[tuple[int, float | None]]) -> float | None:
    values = [float(value) for _, value in curve if value is not None and math.isfinite(value)]
    return max(values, default=None)


def _by_patients(
    first: BackboneResult, second: BackboneResult, paired: PairedAuroc | None, trials: tuple[int, int] | None
) -> tuple[int | None, str]:
    """Which is better on other patients too (1, -1; 0 neither is shown to be; None unknown), and the sentence."""
    one, other = trials or (first.best_trial, second.best_trial)
    who = f"trial {one} ({first.backbone}) against trial {other} ({second.backbone})"
    if paired is None:
        return None, f"Patients: {who} was not compared."
    if paired.difference is None or paired.low is None or paired.high is None:
        return None, f"Patients: {who} cannot be compared: {paired.reason}."
    sign = 1 if paired.low > 0 else -1 if paired.high < 0 else 0
    meaning = "could hardly" if sign else "could"
    return sign, (
        f"Patients: {who} is {_signed(paired.difference)} macro AUROC on the same validation images (95% interval "
        f"{_signed(paired.low)} to {_signed(paired.high)}, {_p(paired.p)}), which other patients {meaning} turn round."
    )


def _by_trials(
    first: BackboneResult, second: BackboneResult, test: PermutationTest, grace: int
) -> tuple[int | None, str]:
    """As `_by_patients`, from the spread between trials."""
    length = f"the first {f'{grace} epochs' if grace != 1 else 'epoch'} of each"
    if test.p is None or test.difference is None or test.smallest is None:
        return None, f"Trials: medians over {length} cannot be compared: {test.reason}."
    each = [f"{one.median:.3f} ({one.backbone}, {len(one.values)} trials)" for one in (first, second)]
    medians = f"Trials: the median over {length} is {each[0]} and {each[1]}"
    if test.smallest >= LEVEL:
        return None, (
            f"{medians}; these are so few, or so much alike, that no way to deal them out would come below "
            f"p = {test.smallest:.3f}."
        )
    sign = 0 if test.p >= LEVEL else 1 if test.difference > 0 else -1
    meaning = "more than" if sign else "no more than"
    return sign, f"{medians}: {meaning} trials of one backbone differ among themselves (permutation {_p(test.p)})."


def _noise(first: BackboneResult, second: BackboneResult, compared: Comparison) -> str:
    backbones = sum(result.best is not None for result in compared.backbones)
    picked = f" The two backbones are the best of {backbones}, picked by their luck too." if backbones > 2 else ""
    return (
        "What counts as noise: the interval is over validation patients only, as if the two networks were given. It "
        f"does not know that they are the best of {first.trials} and of {second.trials} trials, chosen on these same "
        "images, nor what another seed would have given: every trial was trained with one. The spread between trials "
        "holds settings and luck together, a search draws later trials near earlier good ones, so they are not "
        f"independent, and a lead so early (epochs: {compared.grace}) may not last. A small number of trials says "
        f"little either way.{picked}"
    )


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _p(value: float | None) -> str:
    if value is None:
        return "p unknown"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON would give it back: lists where it has tuples."""
    return {key: list(item) if isinstance(item, tuple) else item for key, item in asdict(value).items()}
