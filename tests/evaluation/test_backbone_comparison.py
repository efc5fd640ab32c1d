"""The permutation test against all arrangements; results of backbones and verdicts on worked examples."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr.evaluation import backbones
from ray_cxr.evaluation.backbones import Comparison, TrialCurve
from ray_cxr.evaluation.paired import PairedAuroc

GROUP = st.lists(st.integers(0, 6), min_size=2, max_size=4)


@settings(max_examples=40)
@given(GROUP, GROUP)
def test_permutation_test_equals_enumeration(x: list[int], y: list[int]) -> None:
    both = [v / 10 for v in (*x, *y)]
    gaps = []
    for places in combinations(range(len(both)), len(x)):
        inside = [both[i] for i in places]
        outside = [both[i] for i in range(len(both)) if i not in places]
        gaps.append(abs(median(inside) - median(outside)))
    seen = median(both[: len(x)]) - median(both[len(x) :])
    got = backbones.permutation_test(both[: len(x)], both[len(x) :], n=len(gaps))
    assert (got.exact, got.arrangements) == (True, len(gaps))
    assert got.difference == pytest.approx(seen, abs=1e-12)
    assert got.p == pytest.approx(np.mean([gap >= abs(seen) - 1e-9 for gap in gaps]), abs=1e-12)
    assert got.smallest == pytest.approx(np.mean([gap >= max(gaps) - 1e-9 for gap in gaps]), abs=1e-12)
    assert backbones.permutation_test(both[: len(x)], both[len(x) :], n=len(gaps) - 1).exact is False


def test_permutation_test_with_random_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=8), rng.normal(size=7) + 0.9
    exact = backbones.permutation_test(x, y)
    drawn = backbones.permutation_test(x, y, n=2000, seed=1)
    assert (exact.exact, drawn.exact, exact.arrangements, drawn.arrangements) == (True, False, 6435, 2000)
    assert drawn.p == pytest.approx(exact.p, abs=4 * math.sqrt(exact.p * (1 - exact.p) / 2000))
    monkeypatch.setattr(backbones, "_CELLS", 1500)
    assert drawn == backbones.permutation_test(x, y, n=2000, seed=1)
    # The observed arrangement is added, so p is never 0.
    apart = backbones.permutation_test(np.arange(20), 100 + np.arange(20), n=99)
    assert apart.p == pytest.approx(0.01)
    # Two values per group are needed.
    for groups in (([0.7], [0.6, 0.8, 0.9]), ([0.6, 0.8, 0.9], [0.7])):
        got = backbones.permutation_test(*groups)
        assert (got.p, got.difference, got.smallest, bool(got.reason)) == (None, None, None, True)
        assert got.arrangements == 0


def build_trial(number: int, backbone: str, *values: float | None, state: backbones.State = "finished") -> TrialCurve:
    return TrialCurve(number, backbone, state, tuple(enumerate(values, start=1)))


def test_compare_backbones() -> None:
    trials = [
        build_trial(3, "DenseNet121", 0.70, 0.75, 0.80),
        build_trial(0, "DenseNet121", 0.60, 0.64, state="stopped"),
        build_trial(1, "ResNet50", 0.66, 0.65),
        build_trial(2, "ResNet50", 0.99, state="failed"),
        build_trial(4, "ResNet50", 0.50, None, 0.71, state="running"),
        build_trial(5, "ResNet50", 0.61, 0.62, state="stopped"),
        build_trial(6, "TinyCNN", state="failed"),
    ]
    compared = backbones.compare_backbones(trials, grace=2)
    dense, res, tiny = compared.backbones
    assert (dense.backbone, res.backbone, tiny.backbone) == ("DenseNet121", "ResNet50", "TinyCNN")
    assert compared.budget == 5  # that of DenseNet121; a backbone without epochs does not count
    assert (dense.trials, dense.finished, dense.stopped, dense.failed, dense.running) == (2, 1, 1, 0, 0)
    assert (res.trials, res.finished, res.stopped, res.failed, res.running) == (4, 1, 1, 1, 1)
    assert (dense.epochs, res.epochs, tiny.epochs) == (5, 8, 0)
    assert (dense.best, dense.best_trial, dense.best_at_budget) == (0.80, 3, 0.80)
    # Five epochs of ResNet50: two of trial 1, the failed one of trial 2 (spent, without AUROC), two of trial 4.
    assert (res.best, res.best_trial, res.best_at_budget) == (0.71, 4, 0.66)
    assert (tiny.best, tiny.best_trial, tiny.best_at_budget, tiny.median) == (None, None, None, None)
    assert (res.values, res.numbers) == ((0.66, 0.50, 0.62), (1, 4, 5))
    assert (res.median, res.lower, res.upper) == pytest.approx((0.62, 0.56, 0.64))
    assert (dense.values, dense.numbers) == ((0.64, 0.75), (0, 3))
    assert (dense.median, dense.lower, dense.upper) == (pytest.approx(0.695), None, None)
    assert compared.pair == (dense, res)
    assert compared.test == backbones.permutation_test([0.64, 0.75], [0.66, 0.50, 0.62])
    # Points of a curve may be in any order.
    curve = ((3, 0.9), (1, 0.5), (2, 0.6))
    result = backbones.compare_backbones([TrialCurve(0, "A", "finished", curve)], grace=2).backbones[0]
    assert (result.best, result.values) == (0.9, (0.6,))
    # Trials shorter than `grace` are not compared at equal length. Ties for the best go to the first trial.
    compared = backbones.compare_backbones(
        [build_trial(0, "A", 0.6), build_trial(1, "B", 0.5, 0.8, 0.7), build_trial(2, "B", 0.8)], 3
    )
    assert [(result.values, result.best_trial) for result in compared.backbones] == [((0.8,), 1), ((), 0)]
    assert compared.test.reason


def compare(shift: float = 0.0, n: int = 8, spread: float = 0.01) -> Comparison:
    """Compare two backbones of n trials each; the first is higher by `shift` at equal length."""
    rng = np.random.default_rng(0)
    # A's last trial makes A the best over all epochs for any shift.
    curves = [
        build_trial(
            2 * i + k, name, *(0.7 + lift + spread * rng.normal(size=2)), 0.95 if name == "A" and i == n - 1 else 0.6
        )
        for k, (name, lift) in enumerate((("A", shift), ("B", 0.0)))
        for i in range(n)
    ]
    return backbones.compare_backbones(curves, grace=2)


def build_paired(difference: float, half: float) -> PairedAuroc:
    low, high = difference - half, difference + half
    values = {"a": 0.8, "b": 0.8 - difference, "difference": difference, "low": low, "high": high, "p": 0.012}
    return PairedAuroc(**values, columns=(0, 1), n_patients=100, n_resamples=1000, undefined=0, seed=0)


def test_verdict() -> None:
    for shift, difference, half, answer, better in (
        (0.05, 0.02, 0.01, "yes", "A is better than B"),
        (-0.05, -0.02, 0.01, "yes", "B is better than A"),
        (0.0, 0.01, 0.03, "no", None),
        (0.0, 0.02, 0.02, "no", None),  # the interval ends at 0
        (0.0, -0.02, 0.02, "no", None),
        (0.05, 0.01, 0.03, "disagree", None),
        (0.05, -0.02, 0.01, "disagree", None),
    ):
        got = backbones.judge_backbones(compare(shift), build_paired(difference, half))
        assert got.answer == answer
        assert (better or "A") in got.headline
        assert ("is better than" in got.headline) == (better is not None)
        assert ("hardly" in got.details) == (half < abs(difference)), "an interval without 0 is not turned round"
        assert "No patient id is known" not in got.details
    unknown = replace(build_paired(0.02, 0.01), n_patients=None)
    assert "No patient id is known, so each" in backbones.judge_backbones(compare(0.05), unknown).details
    # p at the level, with no difference between patients.
    case = compare()
    for p, smallest, answer in ((0.05, 0.01, "no"), (0.049, 0.01, "disagree"), (0.5, 0.05, "undecided")):
        changed = replace(case, test=replace(case.test, p=p, smallest=smallest))
        assert backbones.judge_backbones(changed, build_paired(0.0, 0.1)).answer == answer


@pytest.mark.parametrize("third", [None, 0.55])
def test_verdict_counts_the_backbones_among_which_the_best_two_were_chosen(third: float | None) -> None:
    pair = [build_trial(2 * i + k, name, 0.6 + i / 50) for k, name in enumerate("AB") for i in range(3)]
    compared = backbones.compare_backbones([*pair, build_trial(6, "C", third)], grace=1)
    noise = backbones.judge_backbones(compared, build_paired(0.0, 0.1)).noise
    assert ("best of 3, partly" in noise) == (third is not None)


def test_no_verdict_without_data() -> None:
    pair_of_both = build_paired(0.02, 0.01)
    one_lacks = [build_trial(0, "A", 0.7), build_trial(1, "B", None)]
    for case, pair, part in (
        (backbones.compare_backbones([], 1), None, "no trial"),
        (backbones.compare_backbones(one_lacks, 1), None, "only one backbone, A,"),
        (compare(0.05), None, "not compared"),
        (compare(0.05), replace(pair_of_both, low=None, high=None, reason="too few resamples"), "too few resam"),
        (compare(0.05, n=2), pair_of_both, "too few"),
        (compare(0.05, n=1), pair_of_both, "groups of 1 and 1"),
        (compare(0.0, spread=0.0), pair_of_both, "alike"),
    ):
        got = backbones.judge_backbones(case, pair)
        assert got.answer == "undecided"
        assert part in f"{got.headline} {got.details}"
        assert "better" not in f"{got.headline} {got.details}"


def test_comparison_record_is_json() -> None:
    bootstrap = build_paired(0.02, 0.01)
    empty = backbones.comparison_record(backbones.compare_backbones([], 3), None)
    assert (empty["grace"], empty["budget"]) == (3, 0)
    assert empty["pair"] is empty["patients"] is empty["trials"] is None
    case = compare()
    record = backbones.comparison_record(case, bootstrap)
    first, second = (result.best_trial for result in case.backbones)
    assert record["pair"] == {"a": "A", "b": "B", "trial_a": first, "trial_b": second}
    assert record["verdict"] == vars(backbones.judge_backbones(case, bootstrap))
    assert f"trial {first} (A) against trial {second} (B)" in record["verdict"]["details"]
    assert (record["patients"]["low"], record["trials"]["p"]) == (bootstrap.low, case.test.p)
    for plain in (empty, record):
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
