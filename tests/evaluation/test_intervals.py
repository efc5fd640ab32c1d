"""The bootstrap against resampling written out, DeLong against its definition, both against a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ray_cxr.evaluation import intervals, metrics

CASES = st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 5), st.integers(0, 6)), min_size=6, max_size=40)


def simulated(patients: int, per_patient: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and scores [n,2] that images of a patient share much of; true AUROC is the same for all seeds."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(patients), per_patient)
    y = (rng.random((patients, 2)) < 0.4)[codes].astype(np.int8)
    shared = rng.normal(size=(patients, 2))[codes]
    s = y * 1.0 + shared + 0.5 * rng.normal(size=(len(codes), 2))
    return y, s, codes


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_bootstrap_equals_repeating_the_patients_rows(rows: list[tuple[int, int, int]]) -> None:
    y = np.array([[row[0]] for row in rows])
    s = np.array([[float(row[1])] for row in rows])
    patients = np.array([row[2] for row in rows])
    codes, k = intervals.patient_codes(patients)
    known = y[:, 0] >= 0
    assume(0 < (y[known] == 1).sum() < known.sum())
    expected = []
    for _, counts in intervals._resamples(k, len(rows), 60, seed=3):
        for column in range(counts.shape[1]):
            times = counts[:, column][codes][known]
            expected.append(metrics.auroc(np.repeat(y[known, 0], times), np.repeat(s[known, 0], times)))
    defined = [value for value in expected if value is not None]
    got = intervals.bootstrap_auroc(y, s, patients, n_resamples=60, seed=3).findings[0]
    assert got.undefined == expected.count(None)
    if len(defined) >= intervals.MIN_RESAMPLES:
        assert (got.low, got.high) == tuple(np.percentile(defined, [2.5, 97.5]))
    else:
        assert (got.low, got.high) == (None, None)
        assert got.reason is not None


def test_bootstrap_is_fixed_by_its_seed() -> None:
    y, s, patients = simulated(40, 3, seed=0)
    first = intervals.bootstrap_auroc(y, s, patients, n_resamples=200, seed=7)
    assert intervals.bootstrap_auroc(y, s, patients, n_resamples=200, seed=7) == first
    assert intervals.bootstrap_auroc(y, s, patients, n_resamples=200, seed=8) != first


def test_bootstrap_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    y, s, patients = simulated(40, 3, seed=0)
    whole = intervals.bootstrap_auroc(y, s, patients, n_resamples=100)
    monkeypatch.setattr(intervals, "_CELLS", 500)
    assert intervals.bootstrap_auroc(y, s, patients, n_resamples=100) == whole


def test_findings_share_their_resamples() -> None:
    y, s, patients = simulated(40, 3, seed=0)
    same = intervals.bootstrap_auroc(y[:, [0, 0]], s[:, [0, 0]], patients, n_resamples=100)
    assert same.findings[0] == same.findings[1]
    assert (same.macro.low, same.macro.high) == (same.findings[0].low, same.findings[0].high)


def test_unknown_patients_are_patients_of_their_own() -> None:
    codes, k = intervals.patient_codes(np.array(["a", None, "a", float("nan"), None, "b"], dtype=object))
    assert codes.tolist() == [0, 1, 0, 2, 3, 4]
    assert k == 5


def test_images_of_one_patient_widen_the_interval() -> None:
    y, s, patients = simulated(60, 8, seed=1)
    clustered = intervals.bootstrap_auroc(y, s, patients, n_resamples=300).findings[0]
    independent = intervals.bootstrap_auroc(y, s, np.arange(len(y)), n_resamples=300).findings[0]
    assert clustered.low is not None
    assert clustered.high is not None
    assert independent.low is not None
    assert independent.high is not None
    assert clustered.high - clustered.low > 1.5 * (independent.high - independent.low)


def test_coverage_of_the_patient_bootstrap() -> None:
    big_y, big_s, _ = simulated(60_000, 1, seed=99)
    truth = metrics.auroc(big_y[:, 0], big_s[:, 0])
    hits = 0
    for seed in range(60):
        y, s, patients = simulated(60, 4, seed=seed)
        got = intervals.bootstrap_auroc(y, s, patients, n_resamples=200, seed=seed).findings[0]
        assert got.low is not None
        assert got.high is not None
        assert truth is not None
        hits += got.low <= truth <= got.high
    # 95% nominal; images taken as independent would cover about 70% here.
    assert hits >= 51


def test_absent_class_gives_no_interval_and_spares_the_others() -> None:
    y, s, patients = simulated(30, 2, seed=2)
    y[:, 1] = 0
    got = intervals.bootstrap_auroc(y, s, patients, n_resamples=100)
    assert (got.findings[1].low, got.findings[1].undefined) == (None, 100)
    assert got.macro.low == got.findings[0].low


def test_resamples_that_lose_a_class_are_counted() -> None:
    y = np.zeros((50, 1), dtype=np.int8)
    y[0] = 1  # one positive patient: absent from about 1/e of the resamples
    s = np.random.default_rng(0).random((50, 1))
    got = intervals.bootstrap_auroc(y, s, np.arange(50), n_resamples=500).findings[0]
    assert 140 < got.undefined < 230
    assert got.low is not None


def test_macro_counts_only_the_chosen_findings() -> None:
    y, s, patients = simulated(30, 2, seed=2)
    got = intervals.bootstrap_auroc(y, s, patients, n_resamples=100, macro=np.array([True, False]))
    assert (got.macro.low, got.macro.high) == (got.findings[0].low, got.findings[0].high)


def test_missing_scores_are_left_out() -> None:
    y, s, patients = simulated(30, 2, seed=2)
    s[5, 0] = np.nan
    masked = y.copy()
    masked[5, 0] = -1
    filled = np.nan_to_num(s)
    first = intervals.bootstrap_auroc(y, s, patients, n_resamples=50)
    assert first == intervals.bootstrap_auroc(masked, filled, patients, n_resamples=50)


def test_ratio_interval_equals_resampling_rows() -> None:
    y, _, patients = simulated(30, 3, seed=4)
    flags = np.random.default_rng(0).random(y.shape) < 0.5
    got = intervals.bootstrap_ratios((y == 1) & flags, y == 1, patients, n_resamples=80, seed=1)[0]
    codes, k = intervals.patient_codes(patients)
    values = []
    for _, counts in intervals._resamples(k, len(y), 80, seed=1):
        for column in range(counts.shape[1]):
            times = counts[:, column][codes]
            drawn = np.repeat(flags[:, 0], times)[np.repeat(y[:, 0], times) == 1]
            values.append(drawn.mean())
    assert (got.low, got.high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=1e-12)


@pytest.mark.parametrize("shape", [(3, 1), (4, 2)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        intervals.bootstrap_auroc(np.zeros(shape), np.zeros((4, 1)), np.arange(4))
    with pytest.raises(ValueError, match="do not fit"):
        intervals.bootstrap_ratios(np.zeros(shape), np.zeros((4, 1)), np.arange(4))


def test_no_resamples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        intervals.bootstrap_auroc(np.array([[0], [1]]), np.zeros((2, 1)), np.arange(2), n_resamples=0)


def test_delong_by_hand() -> None:
    # Positives 3 and 5, negatives 1, 2 and 4. V10 = 2/3, 1: variance 1/18. V01 = 1, 1, 1/2: variance 1/12.
    got = intervals.delong(np.array([1, 0, 0, 1, 0]), np.array([3.0, 1.0, 2.0, 5.0, 4.0]))
    assert got == (pytest.approx(5 / 6, abs=1e-15), pytest.approx(1 / 36 + 1 / 36, abs=1e-15))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 8)), min_size=4, max_size=50))
def test_delong_equals_its_definition(rows: list[tuple[int, int]]) -> None:
    y = np.array([row[0] for row in rows])
    s = np.array([row[1] for row in rows], dtype=float)
    assume(y.sum() >= 2)
    assume((1 - y).sum() >= 2)
    x, z = s[y == 1], s[y == 0]
    psi = (x[:, None] > z[None, :]) + 0.5 * (x[:, None] == z[None, :])
    variance = psi.mean(axis=1).var(ddof=1) / len(x) + psi.mean(axis=0).var(ddof=1) / len(z)
    got = intervals.delong(y, s)
    assert got == (pytest.approx(psi.mean(), abs=1e-12), pytest.approx(variance, abs=1e-12))
    assert got is not None
    assert got[0] == pytest.approx(metrics.auroc(y, s), abs=1e-12)


def test_delong_needs_two_of_each_class() -> None:
    assert intervals.delong(np.array([1, 0, 0]), np.array([0.3, 0.2, 0.1])) is None


def test_delong_interval_by_hand() -> None:
    # logit(.9) = log 9; standard error .03 / (.9 * .1) = 1/3 on that scale.
    low, high = intervals.delong_interval(0.9, 0.0009) or (0.0, 0.0)
    reach = 1.959963984540054 / 3
    assert low == pytest.approx(1 / (1 + math.exp(reach) / 9), abs=1e-12)
    assert high == pytest.approx(1 / (1 + math.exp(-reach) / 9), abs=1e-12)


@settings(deadline=None)
@given(st.floats(0.001, 0.999), st.floats(1e-9, 0.2))
def test_delong_interval_stays_inside(auc: float, variance: float) -> None:
    bounds = intervals.delong_interval(auc, variance)
    assert bounds is not None
    assert 0.0 <= bounds[0] <= auc + 1e-12
    assert auc - 1e-12 <= bounds[1] <= 1.0


def test_delong_interval_knows_where_it_knows_nothing() -> None:
    assert intervals.delong_interval(1.0, 0.0) is None
    assert intervals.delong_interval(0.5, 0.0) is None
    with pytest.raises(ValueError, match="level"):
        intervals.delong_interval(0.5, 0.1, level=1.0)
