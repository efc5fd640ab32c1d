"""The bootstrap against resamples written out, DeLong against its definition and published numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ray_cxr.evaluation import intervals, metrics

#: 113 patients after a brain haemorrhage by their WFNS grade, 1 to 5: good outcome, poor outcome (Turck et al. 2010).
WFNS = ((37, 20, 3, 8, 4), (2, 12, 1, 8, 18))
#: DeLong, DeLong & Clarke-Pearson (1988): 43 patients with ovarian cancer who have all three tests: albumin, total
#: protein and K-G score, which falls with the outlook. Those without and with benefit (POPIND 0 and 1 in SAS's manual).
NO_BENEFIT = """3.0 5.8 10  2.8 4.8 6  0.9 4.0 5  2.5 5.7 8  3.6 6.7 4  4.2 7.6 4  4.0 6.6 6  3.0 4.7 8  3.3 6.8 6
    1.7 4.0 7  2.9 5.7 9  2.8 6.2 8"""
BENEFIT = """3.2 6.3 5  3.9 6.8 3  3.2 5.8 3  1.6 5.6 5  3.8 5.7 5  3.7 6.7 6  3.2 5.4 4  3.8 6.6 6  4.1 6.6 5
    3.6 5.7 5  4.3 7.0 4  2.3 4.4 6  3.5 5.8 6  3.8 6.8 7  4.5 7.4 5  3.7 7.4 5  3.1 6.6 6  4.1 8.2 6  4.3 7.0 5
    4.3 6.5 4  3.2 5.1 5  2.6 4.7 6  3.7 6.1 5  3.3 6.3 7  4.2 7.7 6  3.5 6.2 5  2.1 4.8 7  4.0 7.0 7  3.3 5.7 6
    3.7 6.9 5  3.6 6.6 5"""
RATES = ("sensitivity", "specificity", "ppv", "npv", "f1", "flag_rate")


def simulated(patients: int, per_patient: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and scores [n,2] that images of a patient share much of, and patients."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(patients), per_patient)
    y = (rng.random((patients, 2)) < 0.4)[codes].astype(np.int8)
    s = y + rng.normal(size=(patients, 2))[codes] + 0.5 * rng.normal(size=(len(codes), 2))
    return y, s, codes


def ends(interval: intervals.Interval) -> tuple[float | None, float | None]:
    return interval.low, interval.high


def percentiles(values: list[float]) -> object:
    return pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=1e-12)


def written_out(patients: np.ndarray, n_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """The rows of each resample, those of a patient once per draw."""
    rng = np.random.default_rng(seed)
    known = list(dict.fromkeys(patients.tolist()))
    rows = {patient: np.flatnonzero(patients == patient) for patient in known}
    for _ in range(n_resamples):
        yield np.concatenate([rows[known[i]] for i in rng.integers(0, len(known), len(known))])


def plain_quantities(y: np.ndarray, s: np.ndarray, flags: np.ndarray, p: np.ndarray, prevalence: float) -> dict:
    """What `metrics` and `calibration` return for one finding in some rows."""
    scored, judged, calibrated = (y >= 0) & ~np.isnan(s), (y >= 0) & (flags >= 0), (y >= 0) & ~np.isnan(p)
    cells = metrics.confusion(y[judged], flags[judged] == 1)
    ppv, npv = metrics.predictive_values_at(cells.sensitivity, cells.specificity, prevalence)
    return {
        "auroc": metrics.auroc(y[scored], s[scored]),
        "average_precision": metrics.average_precision(y[scored], s[scored]),
        **{name: getattr(cells, name) for name in RATES},
        "ppv_at_prevalence": ppv,
        "npv_at_prevalence": npv,
        "brier": metrics.brier(y[calibrated], p[calibrated]),
        "expected_calibration_error": metrics.expected_calibration_error(y[calibrated], p[calibrated]),
    }


def plain_sensitivity(curve: metrics.Curve, rate: float) -> float:
    """Along the straight lines between the points of the ROC curve, at their upper end where they are upright."""
    at = curve.x <= rate + 1e-12
    left, low = curve.x[at][-1], curve.y[at][-1]
    if at.all():
        return float(low)
    right, high = curve.x[~at][0], curve.y[~at][0]
    return float(low + (high - low) * (rate - left) / (right - left))


@pytest.mark.parametrize(
    ("seed", "rows", "positives", "prevalence"),
    [(0, 40, 0.4, 0.02), (1, 40, 0.1, 0.0), (2, 12, 0.5, 1.0), (3, 25, 0.9, 0.5), (4, 40, 0.0, 0.5)],
)
def test_intervals_equal_measuring_the_rows_of_each_resample(
    seed: int, rows: int, positives: float, prevalence: float
) -> None:
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, max(5, rows // 3), rows)
    y = np.where(rng.random(rows) < 0.1, -1, rng.random(rows) < positives)
    s = np.where(rng.random(rows) < 0.1, np.nan, rng.integers(0, 6, rows) + y)
    flags = np.where(rng.random(rows) < 0.1, -1, s > 2)
    # Multiples of 1/8 and their squares add up exactly in any order.
    p = rng.choice([np.nan, 0.0, 0.125, 0.375, 0.5, 0.875, 1.0], rows)
    options = {"flags": flags.astype(np.int8)[:, None], "calibrated": p[:, None], "roc_grid": 5, "n_resamples": 50}
    options["assumed_prevalence"] = np.array([prevalence])
    got = intervals.bootstrap_findings(y[:, None], s[:, None], patients, **options, seed=3)
    drawn = [[part[kept] for part in (y, s, flags, p)] for kept in written_out(patients, 50, seed=3)]
    expected = [plain_quantities(*parts, prevalence) for parts in drawn]
    assert list(got.findings[0]) == [metric.key for metric in metrics.METRICS] == list(expected[0])
    for name, interval in got.findings[0].items():
        values = [each[name] for each in expected if each[name] is not None]
        assert interval.undefined == 50 - len(values), name
        known = len(values) >= 40 and np.ptp(values) > 1e-12
        assert ends(interval) == (percentiles(values) if known else (None, None)), name
        assert (interval.reason is None) == known, name
    curves = []
    for label, score, _, _ in drawn:
        scored = (label >= 0) & ~np.isnan(score)
        curve = metrics.roc_curve(label[scored], score[scored])
        if curve is not None:
            curves.append([plain_sensitivity(curve, rate) for rate in np.linspace(0, 1, 5)])
    band = got.roc[0]
    assert (band is None) == (len(curves) < 40)
    if band is not None:
        low, high = np.percentile(curves, [2.5, 97.5], axis=0)
        np.testing.assert_allclose(band.low, low, atol=1e-12)
        np.testing.assert_allclose(band.high, high, atol=1e-12)
        assert band.false_positive_rate.tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_means_are_over_the_findings_that_count() -> None:
    y, s, patients = simulated(30, 2, seed=2)
    y, s = np.hstack([y, 1 - y, np.zeros_like(y[:, :1])]), np.hstack([s, -(s**3), s[:, :1]])
    y[:7, 1] = -1
    chosen = np.array([True, True, False, True, True])
    got = intervals.bootstrap_findings(y, s, patients, macro=chosen, n_resamples=60, roc_grid=0, seed=4)
    assert got.counted == (0, 1, 3)
    assert got.roc == (None,) * 5
    weights = np.array([np.sum(y[:, f] == 1) for f in got.counted])
    plain, weighted = [], []
    for kept in written_out(patients, 60, seed=4):
        known = [(f, kept[y[kept, f] >= 0]) for f in got.counted]
        values = [metrics.average_precision(y[rows, f], s[rows, f]) for f, rows in known]
        plain.append(np.mean(values))
        weighted.append(np.sum(values * weights) / weights.sum())
    assert ends(got.macro["average_precision"]) == percentiles(plain)
    assert ends(got.weighted["average_precision"]) == percentiles(weighted)
    # `bootstrap_auroc` draws the same resamples.
    alone = intervals.bootstrap_auroc(y, s, patients, macro=chosen, n_resamples=60, seed=4)
    assert got.macro["auroc"] == alone.macro
    assert tuple(finding["auroc"] for finding in got.findings) == alone.findings
    assert (ends(alone.findings[4]), alone.findings[4].undefined) == ((None, None), 60)
    none = intervals.bootstrap_findings(y, s, patients, macro=np.zeros(5, bool), n_resamples=60, roc_grid=0)
    for mean in (none.macro["auroc"], none.weighted["auroc"]):
        assert (ends(mean), bool(mean.reason)) == ((None, None), True)
    # A mean leaves out resamples that lack a finding: one positive patient is absent from about 1/e of them.
    y = np.zeros((50, 2), dtype=np.int8)
    y[0, 0] = y[::2, 1] = 1
    s = np.random.default_rng(0).random((50, 2))
    got = intervals.bootstrap_findings(y, s, np.arange(50), n_resamples=200, roc_grid=0)
    lost = sum(0 not in rows for rows in written_out(np.arange(50), 200, seed=0))
    assert [finding["auroc"].undefined for finding in got.findings] == [lost, 0]
    assert {mean.undefined for mean in (*got.macro.values(), *got.weighted.values())} == {lost}


def test_missing_input_has_no_interval_and_a_reason() -> None:
    codes, k = intervals.patient_codes(np.array(["a", None, "a", float("nan"), None, "b"], dtype=object))
    assert (codes.tolist(), k) == ([0, 1, 0, 2, 3, 4], 5)  # unknown patients are patients of their own
    y, s, patients = simulated(30, 2, seed=2)
    flags = np.stack([(s[:, 0] > 0).astype(np.int8), np.full(len(s), -1, np.int8)], axis=1)
    given = {"flags": flags, "assumed_prevalence": np.array([math.nan, 0.1]), "n_resamples": 60}
    first, second = intervals.bootstrap_findings(y, s, patients, **given).findings
    assert first["ppv"].reason is first["auroc"].reason is None
    assert "prevalence" in first["ppv_at_prevalence"].reason
    assert "flags" in second["ppv_at_prevalence"].reason
    assert "flags" in second["f1"].reason
    for name in ("brier", "expected_calibration_error"):
        assert "calibrated" in first[name].reason
        assert (first[name].low, first[name].undefined) == (None, 60)


def test_seed_fixes_the_numbers_and_chunks_and_threads_do_not_change_them(monkeypatch: pytest.MonkeyPatch) -> None:
    y, s, patients = simulated(40, 3, seed=0)
    y[:, 1], s[:, 1] = y[:, 0], s[:, 0]

    def measured(seed: int = 0) -> tuple[object, ...]:
        flags = (s > 0).astype(np.int8)
        got = intervals.bootstrap_findings(y, s, patients, flags=flags, n_resamples=150, roc_grid=9, seed=seed)
        assert got.findings[0] == got.findings[1]  # findings share their resamples
        bands = [(band.low.tolist(), band.high.tolist()) for band in got.roc]
        auroc = intervals.bootstrap_auroc(y, s, patients, n_resamples=150, seed=seed)
        return got.findings, got.macro, got.weighted, bands, auroc

    whole = measured()
    assert measured() == whole != measured(seed=1)
    monkeypatch.setattr(intervals, "_THREADS", 1)
    assert measured() == whole
    monkeypatch.setattr(intervals, "_CELLS", 500)
    assert measured() == whole


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"flags": np.zeros((4, 2), np.int8)}, "flags"),
        ({"calibrated": np.zeros((3, 1))}, "calibrated"),
        ({"calibrated": np.full((4, 1), 1.5)}, "0..1"),
        ({"calibrated": np.full((4, 1), -0.5)}, "0..1"),
        ({"assumed_prevalence": np.array([1.5])}, "0..1"),
        ({"assumed_prevalence": np.array([0.5, 0.5])}, "1 findings"),
        ({"macro": np.array([True, True])}, "1 findings"),
        ({"roc_grid": 1}, "roc_grid"),
        ({"roc_grid": -1}, "roc_grid"),
        ({"n_resamples": 0}, "at least 1"),
        ({"scores": np.zeros((4, 2))}, "do not fit"),
        ({"patients": np.arange(3)}, "do not fit"),
    ],
)
def test_bad_input_is_refused(given: dict[str, object], part: str) -> None:
    table = {"labels": np.array([[0], [1], [0], [1]]), "scores": np.zeros((4, 1)), "patients": np.arange(4)}
    with pytest.raises(ValueError, match=part):
        intervals.bootstrap_findings(**{**table, **given})


def test_interval_needs_enough_values_that_differ() -> None:
    values = np.r_[np.arange(40.0), np.nan]
    assert intervals.percentile_interval(values) == intervals.Interval(pytest.approx(0.975), pytest.approx(38.025), 1)
    few = intervals.percentile_interval(values[1:])
    assert (ends(few), few.undefined, bool(few.reason)) == ((None, None), 1, True)
    same = intervals.percentile_interval(np.ones(50))
    assert (ends(same), bool(same.reason)) == ((None, None), True)
    assert intervals.percentile_interval(np.ones(50), certain=True) == intervals.Interval(1.0, 1.0, 0)
    # The interval of a ratio
    y, _, patients = simulated(30, 3, seed=4)
    flags = np.random.default_rng(0).random(y.shape) < 0.5
    got = intervals.bootstrap_ratios((y == 1) & flags, y == 1, patients, n_resamples=140, seed=1)
    for f in (0, 1):
        values = [flags[rows, f][y[rows, f] == 1].mean() for rows in written_out(patients, 140, seed=1)]
        assert ends(got[f]) == percentiles(values)
    for shape in ((3, 1), (4, 2)):
        with pytest.raises(ValueError, match="do not fit"):
            intervals.bootstrap_ratios(np.zeros(shape), np.zeros((4, 1)), np.arange(4))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=40))
def test_delong_equals_its_definition(rows: list[tuple[int, int, int]]) -> None:
    y, a, b = (np.array(column) for column in zip(*rows, strict=True))
    assume(2 <= y.sum() <= len(y) - 2)
    v10, v01 = [], []
    for s in (a, b):
        x, z = s[y == 1][:, None], s[y == 0][None]
        wins = (x > z) + 0.5 * (x == z)
        v10.append(wins.mean(axis=1))
        v01.append(wins.mean(axis=0))
    areas = [part.mean() for part in v10]
    covariance = np.cov(v10) / len(v10[0]) + np.cov(v01) / len(v01[0])  # of the two areas
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert intervals.delong(y, a) == pytest.approx((areas[0], covariance[0, 0]), abs=1e-12)
    assert intervals.delong_paired(y, a, b) == pytest.approx((*areas, variance), abs=1e-12)


def test_delong_agrees_with_published_numbers() -> None:
    # The R package pROC (Robin et al. 2011): AUC in its documentation, variance in its tests.
    grades = np.concatenate([np.repeat(np.arange(1, 6), counts) for counts in WFNS])
    got = intervals.delong(np.repeat([0, 1], [72, 41]), grades)
    assert got == (pytest.approx(0.8236789, abs=5e-8), pytest.approx(0.00146991470882363, abs=1e-14))
    # Areas, their standard errors and the contrasts as printed in SAS/STAT's manual, PROC LOGISTIC.
    rows = np.array([*NO_BENEFIT.split(), *BENEFIT.split()], dtype=float).reshape(-1, 3)
    y = np.repeat([0, 1], [12, 31])
    tests = {"albumin": rows[:, 0], "protein": rows[:, 1], "K-G": 10 - rows[:, 2]}
    for name, area, error in (("albumin", 0.7366, 0.0927), ("protein", 0.6478, 0.1000), ("K-G", 0.7258, 0.1028)):
        auc, variance = intervals.delong(y, tests[name])
        assert (auc, math.sqrt(variance)) == pytest.approx((area, error), abs=5e-5)
    for name, difference, error, p in (("albumin", 0.0108, 0.0953, 0.9102), ("protein", -0.0780, 0.1046, 0.4561)):
        a, b, variance = intervals.delong_paired(y, tests[name], tests["K-G"])
        got = (a - b, math.sqrt(variance), intervals.normal_p(a - b, variance))
        assert got == pytest.approx((difference, error, p), abs=5e-5)
    assert intervals.normal_p(0.0, 0.0) is None
    for y in (np.array([1, 0, 0]), np.array([1, 1, 0])):  # two of each class are needed
        assert intervals.delong(y, np.arange(3)) is intervals.delong_paired(y, np.arange(3), np.zeros(3)) is None


def test_delong_interval_by_hand() -> None:
    # logit(.9) = log 9; standard error .03 / (.9 * .1) = 1/3 on that scale.
    reach = 1.959963984540054 / 3
    expected = 1 / (1 + math.exp(reach) / 9), 1 / (1 + math.exp(-reach) / 9)
    assert intervals.delong_interval(0.9, 0.0009) == pytest.approx(expected, abs=1e-12)
    assert intervals.delong_interval(0.1, 0.0009) == pytest.approx((1 - expected[1], 1 - expected[0]), abs=1e-12)
    low, high = intervals.delong_interval(0.9, 0.0009, level=0.5)
    assert expected[0] < low < 0.9 < high < expected[1]
    assert intervals.delong_interval(0.001, 0.2) == pytest.approx((0.0, 1.0))  # far out without overflow
    for auc, variance in ((1.0, 0.1), (0.0, 0.1), (0.5, 0.0)):
        assert intervals.delong_interval(auc, variance) is None
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="level"):
            intervals.delong_interval(0.5, 0.1, level=level)
