"""The paired bootstrap against one written out, the permutation test against all arrangements, the rest by hand."""

from __future__ import annotations

import json
import math
from itertools import combinations
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ray_cxr.evaluation import comparison, intervals, metrics
from ray_cxr.evaluation.comparison import Comparison, PairedAuroc, TrialCurve


def two_networks(
    patients: int, seed: int, better: float = 0.0, per_patient: int = 3
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels [n,2], scores of two networks that err alike, and patients; `better` lifts the first network."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(patients), per_patient)
    y = (rng.random((patients, 2)) < 0.4)[codes].astype(np.int8)
    shared = rng.normal(size=(patients, 2))[codes]
    a, b = (
        (1.0 + lift) * y + shared + 0.7 * rng.normal(size=(patients, 2))[codes] + 0.3 * rng.normal(size=y.shape)
        for lift in (better, 0.0)
    )
    return y, a, b, codes


def slow_bootstrap(y: np.ndarray, a: np.ndarray, b: np.ndarray, patients: np.ndarray, n: int, seed: int) -> list[float]:
    """Differences of macro AUROC with each resample's rows written out; resamples without one left out."""
    rng = np.random.default_rng(seed)
    known = list(dict.fromkeys(patients.tolist()))
    rows = {patient: np.flatnonzero(patients == patient) for patient in known}
    columns = [f for f in range(y.shape[1]) if len({int(v) for v in y[:, f] if v >= 0}) == 2]
    found = []
    for _ in range(n):
        drawn = np.concatenate([rows[known[i]] for i in rng.integers(0, len(known), len(known))])
        pairs = []
        for f in columns:
            kept = drawn[y[drawn, f] >= 0]
            pairs.append([metrics.auroc(y[kept, f], s[kept, f]) for s in (a, b)])
        if all(value is not None for pair in pairs for value in pair):
            one, other = (np.mean([pair[k] for pair in pairs]) for k in (0, 1))
            found.append(float(one - other))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_paired_bootstrap_equals_the_one_written_out(seed: int) -> None:
    y, a, b, patients = two_networks(15, seed, better=0.5)
    rng = np.random.default_rng(seed)
    y[rng.random(y.shape) < 0.2] = -1
    y = np.hstack([y, np.zeros((len(y), 1), dtype=np.int8)])  # a finding that nobody has
    a, b = (np.hstack([s, rng.random((len(y), 1))]) for s in (a, b))
    got = comparison.paired_macro_auroc(y, a, b, patients, n_resamples=200, seed=seed)
    expected = slow_bootstrap(y, a, b, patients, 200, seed)
    assert got.columns == (0, 1)
    assert got.undefined == 200 - len(expected)
    assert (got.low, got.high) == pytest.approx(tuple(np.percentile(expected, [2.5, 97.5])), abs=1e-12)
    tail = min(sum(d <= 0 for d in expected), sum(d >= 0 for d in expected))
    assert got.p == pytest.approx(min(1.0, 2 * (tail + 1) / (len(expected) + 1)), abs=1e-15)
    singles = [np.mean([metrics.auroc(y[y[:, f] >= 0, f], s[y[:, f] >= 0, f]) for f in got.columns]) for s in (a, b)]
    assert (got.a, got.b) == pytest.approx(tuple(singles), abs=1e-15)
    assert got.difference == pytest.approx(singles[0] - singles[1], abs=1e-15)
    assert got.n_patients == 15
    assert got.reason is None


def test_each_network_alone_has_the_interval_of_intervals() -> None:
    y, a, _, patients = two_networks(30, 0)
    got = comparison.paired_macro_auroc(y, a, np.zeros_like(a), patients, n_resamples=100, seed=5)
    alone = intervals.bootstrap_auroc(y, a, patients, n_resamples=100, seed=5).macro
    assert got.b == 0.5
    assert alone.low is not None
    assert alone.high is not None
    assert (got.low, got.high) == pytest.approx((alone.low - 0.5, alone.high - 0.5), abs=1e-12)


def test_pairing_narrows_the_interval() -> None:
    y, a, b, patients = two_networks(80, 1)
    got = comparison.paired_macro_auroc(y, a, b, patients, n_resamples=300)
    widths = []
    for s in (a, b):
        alone = intervals.bootstrap_auroc(y, s, patients, n_resamples=300).macro
        assert alone.low is not None
        assert alone.high is not None
        widths.append(alone.high - alone.low)
    assert got.low is not None
    assert got.high is not None
    assert got.high - got.low < 0.8 * math.hypot(*widths)  # which is what resamples apart would give


def test_coverage_of_the_paired_interval() -> None:
    y, a, b, _ = two_networks(60_000, 99, better=0.4, per_patient=1)
    truth = np.mean([metrics.auroc(y[:, f], a[:, f]) - metrics.auroc(y[:, f], b[:, f]) for f in (0, 1)])
    hits, found = 0, 0
    for seed in range(60):
        case = comparison.paired_macro_auroc(*two_networks(60, seed, better=0.4), n_resamples=200, seed=seed)
        assert case.low is not None
        assert case.high is not None
        hits += case.low <= truth <= case.high
        found += case.low > 0
    assert hits >= 51  # 95% nominal
    assert found >= 10


def test_networks_without_difference_are_seldom_told_apart() -> None:
    cases = [comparison.paired_macro_auroc(*two_networks(60, seed), n_resamples=200) for seed in range(60)]
    assert sum(case.p is not None and case.p < 0.05 for case in cases) <= 9


def test_a_network_against_itself() -> None:
    y, a, _, patients = two_networks(20, 0)
    got = comparison.paired_macro_auroc(y, a, a, patients, n_resamples=50)
    assert (got.difference, got.low, got.high, got.p) == (0.0, 0.0, 0.0, 1.0)


def test_findings_are_compared_each_as_if_alone_and_in_the_mean_together() -> None:
    y, a, b, patients = two_networks(40, 3, better=0.5)
    y, a, b = (np.hstack([table, table[:, :1] * 0, table[:, 1:]]) for table in (y, a, b))
    a[4, 1] = b[9, 1] = np.nan
    chosen = np.array([True, True, True, False])
    got = comparison.paired_findings(y, a, b, patients, n_resamples=100, seed=2, macro=chosen)
    whole = comparison.paired_macro_auroc(y[:, :2], a[:, :2], b[:, :2], patients, n_resamples=100, seed=2)
    assert got.macro.columns == (0, 1)
    assert got.macro == whole
    for f in (0, 1, 3):
        part = slice(f, f + 1)
        alone = comparison.paired_macro_auroc(y[:, part], a[:, part], b[:, part], patients, n_resamples=100, seed=2)
        one = got.findings[f]
        for name in ("a", "b", "difference", "low", "high", "p", "undefined", "reason"):
            assert getattr(one, name) == getattr(alone, name)
        kept = ~np.isnan(a[:, f]) & ~np.isnan(b[:, f])
        assert (one.n, one.positives) == (kept.sum(), y[kept, f].sum())
        assert one.delong_p == pytest.approx(plain_delong_p(y[kept, f], a[kept, f], b[kept, f]), rel=1e-9)
    absent = got.findings[2]
    assert (absent.a, absent.difference, absent.low, absent.p, absent.delong_p) == (None,) * 5
    assert absent.reason == absent.delong_reason == "no positive images"
    assert absent.undefined == 100


def plain_delong_p(y: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """From the U statistics' definition, pair by pair."""
    wins = [(s[y == 1][:, None] > s[y == 0][None]) + 0.5 * (s[y == 1][:, None] == s[y == 0][None]) for s in (a, b)]
    apart = wins[0] - wins[1]
    variance = apart.mean(axis=1).var(ddof=1) / len(apart) + apart.mean(axis=0).var(ddof=1) / apart.shape[1]
    return float(2 * stats.norm.sf(abs(apart.mean()) / math.sqrt(variance)))


def test_what_cannot_be_compared_is_none_with_a_reason() -> None:
    y, a, _, patients = two_networks(20, 0)
    same = comparison.paired_findings(y, a, a, patients, n_resamples=50).findings[0]
    assert (same.difference, same.p, same.reason) == (0.0, 1.0, None)
    assert (same.delong_p, same.delong_reason) == (None, "the difference has no variance between these images")
    few = comparison.paired_findings(y, a, a[:, ::-1], patients, n_resamples=10).findings[0]
    assert few.difference is not None
    assert (few.low, few.p) == (None, None)
    assert few.reason == "10 usable resamples; 40 are needed"
    y[:, 0] = 0
    y[0, 0] = 1
    single = comparison.paired_findings(y, a, a[:, ::-1], patients, n_resamples=50).findings[0]
    assert single.delong_reason == "fewer than two positive or two negative images"


def test_swapped_networks_mirror_the_result() -> None:
    y, a, b, patients = two_networks(30, 2, better=0.3)
    one = comparison.paired_macro_auroc(y, a, b, patients, n_resamples=100)
    other = comparison.paired_macro_auroc(y, b, a, patients, n_resamples=100)
    assert one.low is not None
    assert one.high is not None
    assert (other.difference, other.low, other.high) == pytest.approx((-one.difference, -one.high, -one.low))
    assert one.p == other.p


def test_a_label_counts_where_both_have_a_score() -> None:
    y, a, b, patients = two_networks(30, 3)
    y = y.astype(np.uint8)
    a[4, 0] = b[9, 1] = np.nan
    masked = y.astype(np.int8)
    masked[4, 0] = masked[9, 1] = -1
    got = comparison.paired_macro_auroc(y, a, b, patients, n_resamples=60)
    assert got == comparison.paired_macro_auroc(masked, np.nan_to_num(a), np.nan_to_num(b), patients, n_resamples=60)


def test_what_cannot_be_compared_has_its_reason() -> None:
    y, a, b, patients = two_networks(20, 0)
    nothing = comparison.paired_macro_auroc(np.zeros_like(y), a, b, patients, n_resamples=50)
    assert (nothing.a, nothing.difference, nothing.low, nothing.p, nothing.columns) == (None, None, None, None, ())
    assert nothing.reason == "no finding has both positive and negative images"
    few = comparison.paired_macro_auroc(y, a, b, patients, n_resamples=10)
    assert few.difference is not None
    assert (few.low, few.high, few.p) == (None, None, None)
    assert few.reason is not None
    assert "usable resamples" in few.reason
    with pytest.raises(ValueError, match="do not fit"):
        comparison.paired_macro_auroc(y, a[:, :1], b, patients)
    with pytest.raises(ValueError, match="do not fit"):
        comparison.paired_macro_auroc(y, a, b, patients[1:])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=4),
    st.lists(st.integers(0, 6), min_size=2, max_size=4),
)
def test_permutation_over_all_arrangements(x: list[int], y: list[int]) -> None:
    x_, y_ = [v / 10 for v in x], [v / 10 for v in y]
    both = [*x_, *y_]
    dealt = []
    for places in combinations(range(len(both)), len(x)):
        inside = [both[i] for i in places]
        outside = [both[i] for i in range(len(both)) if i not in places]
        dealt.append(abs(median(inside) - median(outside)))
    seen = median(x_) - median(y_)
    got = comparison.permutation_p(x_, y_)
    assert got.exact
    assert got.arrangements == math.comb(len(both), len(x)) == len(dealt)
    assert got.difference == pytest.approx(seen, abs=1e-12)
    assert got.p == pytest.approx(np.mean([d >= abs(seen) - 1e-9 for d in dealt]), abs=1e-12)
    assert got.smallest == pytest.approx(np.mean([d >= max(dealt) - 1e-9 for d in dealt]), abs=1e-12)


def test_permutation_by_draws_is_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=8), rng.normal(size=7) + 0.9
    exact = comparison.permutation_p(x, y)
    drawn = comparison.permutation_p(x, y, n=6000, seed=1)
    assert (exact.exact, drawn.exact, exact.arrangements, drawn.arrangements) == (True, False, 6435, 6000)
    assert exact.p is not None
    assert drawn.p == pytest.approx(exact.p, abs=4 * math.sqrt(exact.p * (1 - exact.p) / 6000))
    assert drawn == comparison.permutation_p(x, y, n=6000, seed=1)
    assert drawn.p is not None
    assert drawn.p >= 1 / 6001
    monkeypatch.setattr(comparison, "_CELLS", 1500)
    assert drawn == comparison.permutation_p(x, y, n=6000, seed=1)


def test_permutation_is_level() -> None:
    rng = np.random.default_rng(3)
    p = [comparison.permutation_p(rng.normal(size=9), rng.normal(size=9), n=300, seed=i).p for i in range(200)]
    assert sum(value is not None and value < 0.05 for value in p) <= 20


def test_permutation_needs_two_values_a_group() -> None:
    got = comparison.permutation_p([0.7], [0.6, 0.8, 0.9])
    assert (got.p, got.difference, got.smallest) == (None, None, None)
    assert got.reason == "groups of 1 and 3; each needs two values at least"
    with pytest.raises(ValueError, match="finite"):
        comparison.permutation_p([0.1, math.nan], [0.2, 0.3])
    with pytest.raises(ValueError, match="at least 1"):
        comparison.permutation_p([0.1, 0.2], [0.2, 0.3], n=0)


def trial(number: int, backbone: str, *values: float | None, state: comparison.State = "finished") -> TrialCurve:
    return TrialCurve(number, backbone, state, tuple(enumerate(values, start=1)))


def test_backbones_by_hand() -> None:
    trials = [
        trial(3, "DenseNet121", 0.70, 0.75, 0.80),
        trial(0, "DenseNet121", 0.60, 0.64, state="stopped"),
        trial(1, "ResNet50", 0.66, 0.65),
        trial(2, "ResNet50", 0.99, state="failed"),
        trial(4, "ResNet50", 0.50, None, 0.71, state="running"),
        trial(5, "ResNet50", 0.61, 0.62, state="stopped"),
        trial(6, "TinyCNN", state="failed"),
    ]
    compared = comparison.compare_backbones(trials, grace=2)
    dense, res, tiny = compared.backbones
    assert (dense.backbone, res.backbone, tiny.backbone) == ("DenseNet121", "ResNet50", "TinyCNN")
    assert compared.budget == 5  # DenseNet121's; TinyCNN's nothing would compare nothing
    assert (dense.trials, dense.finished, dense.stopped, dense.failed, dense.running) == (2, 1, 1, 0, 0)
    assert (res.trials, res.finished, res.stopped, res.failed, res.running) == (4, 1, 1, 1, 1)
    assert (dense.epochs, res.epochs, tiny.epochs) == (5, 8, 0)
    assert (dense.best, dense.best_trial, dense.best_at_budget) == (0.80, 3, 0.80)
    # Five epochs of ResNet50: two of trial 1, the failed one of trial 2 that counts but has no AUROC, two of trial 4.
    assert (res.best, res.best_trial, res.best_at_budget) == (0.71, 4, 0.66)
    assert (tiny.best, tiny.best_trial, tiny.best_at_budget, tiny.median) == (None, None, None, None)
    assert (res.values, res.numbers) == ((0.66, 0.50, 0.62), (1, 4, 5))
    assert (res.median, res.lower, res.upper) == pytest.approx((0.62, 0.56, 0.64))
    assert (dense.values, dense.numbers) == ((0.64, 0.75), (0, 3))
    assert (dense.median, dense.lower, dense.upper) == (pytest.approx(0.695), None, None)
    assert compared.pair == (dense, res)
    assert compared.test == comparison.permutation_p([0.64, 0.75], [0.66, 0.50, 0.62])


def test_epochs_of_a_curve_may_come_in_any_order() -> None:
    curve = ((3, 0.9), (1, 0.5), (2, 0.6))
    one = comparison.compare_backbones([TrialCurve(0, "A", "finished", curve)], grace=2).backbones[0]
    assert (one.best, one.values) == (0.9, (0.6,))


def test_a_trial_shorter_than_grace_is_not_compared_at_equal_length() -> None:
    compared = comparison.compare_backbones([trial(0, "A", 0.6), trial(1, "B", 0.5, 0.7, 0.8)], grace=3)
    assert [result.values for result in compared.backbones] == [(0.8,), ()]
    assert compared.test is not None
    assert compared.test.reason == "groups of 1 and 0; each needs two values at least"
    with pytest.raises(ValueError, match="grace"):
        comparison.compare_backbones([], grace=0)


def compared(shift: float = 0.0, n: int = 12, spread: float = 0.01) -> Comparison:
    """Two backbones of n trials each, the first higher by `shift` at equal length."""
    rng = np.random.default_rng(0)
    # The last of A's trials shows an AUROC later that makes A the best over everything, whatever the shift.
    curves = [
        trial(2 * i + k, name, *(0.7 + lift + spread * rng.normal(size=2)), 0.95 if name == "A" and i == n - 1 else 0.6)
        for k, (name, lift) in enumerate((("A", shift), ("B", 0.0)))
        for i in range(n)
    ]
    return comparison.compare_backbones(curves, grace=2)


def paired(difference: float, half: float) -> PairedAuroc:
    return PairedAuroc(
        a=0.8,
        b=0.8 - difference,
        difference=difference,
        low=difference - half,
        high=difference + half,
        p=0.012,
        columns=(0, 1),
        n_patients=100,
        n_resamples=1000,
        undefined=0,
        seed=0,
    )


@pytest.mark.parametrize(
    ("shift", "difference", "half", "answer", "says"),
    [
        (0.05, 0.02, 0.01, "yes", "A is better than B by more than noise"),
        (-0.05, -0.02, 0.01, "yes", "B is better than A by more than noise"),
        (0.0, 0.01, 0.03, "no", "A and B are not shown to differ by more than noise"),
        (0.05, 0.01, 0.03, "disagree", "Neither of A and B is shown to be better"),
        (0.0, 0.02, 0.01, "disagree", "Neither of A and B is shown to be better"),
        (0.05, -0.02, 0.01, "disagree", "Neither of A and B is shown to be better"),
    ],
)
def test_verdict(shift: float, difference: float, half: float, answer: str, says: str) -> None:
    got = comparison.verdict(compared(shift), paired(difference, half))
    assert got.answer == answer
    assert says in got.headline
    assert "95% interval" in got.details
    assert "p = 0.012" in got.details
    assert "(A, 12 trials)" in got.details
    assert "(B, 12 trials)" in got.details
    for admitted in ("validation patients only", "same images", "another seed", "small number of trials"):
        assert admitted in got.noise


def test_verdict_names_the_trials_that_were_compared() -> None:
    case = compared()
    assert f"trial {case.backbones[0].best_trial} (A)" in comparison.verdict(case, paired(0.0, 0.1)).details
    assert "trial 4 (A) against trial 5 (B)" in comparison.verdict(case, paired(0.0, 0.1), (4, 5)).details


@pytest.mark.parametrize(
    ("case", "pair", "says"),
    [
        (comparison.compare_backbones([], 1), None, "no trial has a validation AUROC"),
        (comparison.compare_backbones([trial(0, "A", 0.7), trial(1, "B", None)], 1), None, "only one backbone, A,"),
        (compared(0.05), None, "was not compared"),
        (compared(0.05, n=2), paired(0.02, 0.01), "so few, or so much alike"),
        (compared(0.05, n=1), paired(0.02, 0.01), "groups of 1 and 1"),
        (compared(0.0, n=8, spread=0.0), paired(0.02, 0.01), "so few, or so much alike"),
    ],
)
def test_no_verdict_without_data(case: Comparison, pair: PairedAuroc | None, says: str) -> None:
    got = comparison.verdict(case, pair)
    assert got.answer == "undecided"
    assert got.headline.startswith("No verdict on ")
    assert says in f"{got.headline} {got.details}"
    assert "better" not in f"{got.headline} {got.details}"


def test_no_verdict_where_the_patients_cannot_be_compared() -> None:
    y, a, b, patients = two_networks(20, 0)
    none = comparison.paired_macro_auroc(np.zeros_like(y), a, b, patients, n_resamples=50)
    got = comparison.verdict(compared(0.05), none)
    assert got.answer == "undecided"
    assert "no finding has both positive and negative images" in got.details


def test_more_than_two_backbones_are_said_to_be_picked() -> None:
    trials = [trial(3 * i + k, name, 0.7 + k / 100 + i / 1000) for i in range(6) for k, name in enumerate("ABC")]
    case = comparison.compare_backbones(trials, 1)
    assert [result.backbone for result in case.backbones] == ["C", "B", "A"]
    assert "the best of 3, picked" in comparison.verdict(case, None).noise
    assert "picked" not in comparison.verdict(compared(), None).noise


def test_record_is_json_and_comes_back_the_same() -> None:
    y, a, b, patients = two_networks(20, 0)
    bootstrap = comparison.paired_macro_auroc(y, a, b, patients, n_resamples=50)
    for case, pair in ((compared(), bootstrap), (comparison.compare_backbones([], 3), None)):
        record = comparison.comparison_record(case, pair)
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert set(record) == {"grace", "budget", "backbones", "pair", "patients", "trials", "verdict"}
    assert record["pair"] is None
    record = comparison.comparison_record(compared(), bootstrap, (0, 1))
    assert record["pair"] == {"a": "A", "b": "B", "trial_a": 0, "trial_b": 1}
    assert record["verdict"] == vars(comparison.verdict(compared(), bootstrap, (0, 1)))
