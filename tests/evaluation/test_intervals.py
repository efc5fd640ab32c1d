"""The bootstrap against resampling written out, DeLong against its definition, both against a known truth."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn_metrics

from ray_cxr.evaluation import calibration, intervals, metrics

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

CASES = st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 5), st.integers(0, 6)), min_size=6, max_size=40)


def simulated(patients: int, per_patient: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and scores [n,2] that images of a patient share much of; true AUROC is the same for all seeds."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(patients), per_patient)
    y = (rng.random((patients, 2)) < 0.4)[codes].astype(np.int8)
    shared = rng.normal(size=(patients, 2))[codes]
    s = y * 1.0 + shared + 0.5 * rng.normal(size=(len(codes), 2))
    return y, s, codes


def ends(interval: intervals.Interval) -> tuple[float, float]:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low, interval.high


def written_out(patients: np.ndarray, n_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """The rows of each resample, a patient's as often as he was drawn."""
    rng = np.random.default_rng(seed)
    known = list(dict.fromkeys(patients.tolist()))
    rows = {patient: np.flatnonzero(patients == patient) for patient in known}
    for _ in range(n_resamples):
        yield np.concatenate([rows[known[i]] for i in rng.integers(0, len(known), len(known))])


def plain_quantities(
    y: np.ndarray, s: np.ndarray, flags: np.ndarray, p: np.ndarray, prevalence: float
) -> dict[str, float]:
    """What is measured of one finding in some rows, one after the other; what is undefined is left out."""
    found: dict[str, float] = {}
    scored = (y >= 0) & ~np.isnan(s)
    if len(set(y[scored].tolist())) == 2:
        found["auroc"] = sklearn_metrics.roc_auc_score(y[scored], s[scored])
        found["average_precision"] = sklearn_metrics.average_precision_score(y[scored], s[scored])
    tp = fp = tn = fn = 0
    for label, flag in zip(y.tolist(), flags.tolist(), strict=True):
        tp += (label, flag) == (1, 1)
        fp += (label, flag) == (0, 1)
        tn += (label, flag) == (0, 0)
        fn += (label, flag) == (1, 0)
    for name, part, whole in (
        ("sensitivity", tp, tp + fn),
        ("specificity", tn, tn + fp),
        ("ppv", tp, tp + fp),
        ("npv", tn, tn + fn),
        ("f1", tp, tp + (fp + fn) / 2),
        ("flag_rate", tp + fp, tp + fp + tn + fn),
    ):
        if whole:
            found[name] = part / whole
    if "sensitivity" in found and "specificity" in found:
        at = metrics.predictive_values_at(found["sensitivity"], found["specificity"], prevalence)
        found |= {
            f"{name}_at_prevalence": value for name, value in zip(("ppv", "npv"), at, strict=True) if value is not None
        }
    judged = (y >= 0) & ~np.isnan(p)
    if judged.any():
        found["brier"] = sklearn_metrics.mean_squared_error(y[judged], p[judged])
        error = calibration.expected_error(y[judged], p[judged])
        assert error is not None
        found["expected_calibration_error"] = error
    return found


def plain_sensitivity(fpr: np.ndarray, tpr: np.ndarray, rate: float) -> float:
    """Along the straight lines between the points of the ROC curve, at their upper end where they are upright."""
    at = fpr <= rate + 1e-12
    left, low = fpr[at][-1], tpr[at][-1]
    if at.all():
        return float(low)
    right, high = fpr[~at][0], tpr[~at][0]
    return float(low + (high - low) * (rate - left) / (right - left))


MAYBE = st.sampled_from([math.nan, 0.0, 0.1, 0.35, 0.5, 0.9, 1.0])
ROWS = st.lists(
    st.tuples(
        st.integers(-1, 1), st.one_of(st.integers(0, 5).map(float), MAYBE), st.integers(-1, 1), MAYBE, st.integers(0, 6)
    ),
    min_size=8,
    max_size=40,
)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(ROWS, st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_all_quantities_equal_measuring_each_resamples_rows(
    rows: list[tuple[int, float, int, float, int]], prevalence: float
) -> None:
    y, s, flags, p, patients = (np.array(column) for column in zip(*rows, strict=True))
    got = intervals.bootstrap_findings(
        y[:, None],
        s[:, None],
        patients,
        flags=flags.astype(np.int8)[:, None],
        calibrated=p[:, None],
        assumed_prevalence=np.array([prevalence]),
        roc_grid=5,
        n_resamples=50,
        seed=3,
    )
    drawn = [[part[kept] for part in (y, s, flags, p)] for kept in written_out(patients, 50, seed=3)]
    expected = [plain_quantities(*parts, prevalence) for parts in drawn]
    assert tuple(got.findings[0]) == intervals.QUANTITIES
    for name, interval in got.findings[0].items():
        values = [each[name] for each in expected if name in each]
        assert interval.undefined == 50 - len(values), name
        if interval.reason == "every resample gives the same":
            assert np.ptp(values) < 1e-12, name
        elif len(values) >= intervals.MIN_RESAMPLES:
            assert ends(interval) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=1e-12), name
            assert interval.reason is None
            assert np.ptp(values) > 0
        else:
            assert (interval.low, interval.high) == (None, None)
            assert interval.reason
    curves = []
    for label, score, _, _ in drawn:
        scored = (label >= 0) & ~np.isnan(score)
        if len(set(label[scored].tolist())) == 2:
            fpr, tpr, _ = sklearn_metrics.roc_curve(label[scored], score[scored], drop_intermediate=False)
            curves.append([plain_sensitivity(fpr, tpr, rate) for rate in np.linspace(0, 1, 5)])
    band = got.roc[0]
    assert (band is None) == (len(curves) < intervals.MIN_RESAMPLES)
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
    got = intervals.bootstrap_findings(y, s, patients, macro=chosen, n_resamples=80, roc_grid=0, seed=4)
    assert got.counted == (0, 1, 3)
    weights = np.array([np.sum(y[:, f] == 1) for f in got.counted])
    plain, weighted = [], []
    for kept in written_out(patients, 80, seed=4):
        values = []
        for f in got.counted:
            known = kept[y[kept, f] >= 0]
            values.append(sklearn_metrics.average_precision_score(y[known, f], s[known, f]))
        plain.append(np.mean(values))
        weighted.append(np.sum(values * weights) / weights.sum())
    for mean, expected in ((got.macro, plain), (got.weighted, weighted)):
        assert ends(mean["average_precision"]) == pytest.approx(tuple(np.percentile(expected, [2.5, 97.5])), abs=1e-12)
    alone = intervals.bootstrap_auroc(y, s, patients, macro=chosen, n_resamples=80, seed=4)
    assert got.macro["auroc"] == alone.macro
    assert tuple(finding["auroc"] for finding in got.findings) == alone.findings
    none = intervals.bootstrap_findings(y, s, patients, macro=np.zeros(5, bool), n_resamples=80, roc_grid=0)
    assert (
        none.macro["auroc"].reason
        == none.weighted["auroc"].reason
        == "no finding has both positive and negative images"
    )


def test_a_mean_leaves_out_resamples_that_lack_a_finding() -> None:
    y = np.zeros((50, 2), dtype=np.int8)
    y[0, 0] = y[::2, 1] = 1  # one positive patient: absent from about 1/e of the resamples
    s = np.random.default_rng(0).random((50, 2))
    got = intervals.bootstrap_findings(y, s, np.arange(50), n_resamples=200, roc_grid=0)
    lost = got.findings[0]["auroc"].undefined
    assert 50 < lost < 100
    for mean in (*got.macro.values(), *got.weighted.values()):
        assert mean.undefined == lost
    assert got.findings[1]["auroc"].undefined == 0


def test_what_was_not_given_has_no_interval_and_a_reason() -> None:
    y, s, patients = simulated(30, 2, seed=2)
    flags = np.stack([(s[:, 0] > 0).astype(np.int8), np.full(len(s), -1, np.int8)], axis=1)
    first, second = intervals.bootstrap_findings(
        y, s, patients, flags=flags, assumed_prevalence=np.array([math.nan, 0.1]), n_resamples=60
    ).findings
    assert first["ppv"].reason is None
    assert first["ppv_at_prevalence"].reason == "no assumed prevalence"
    assert second["ppv_at_prevalence"].reason == second["f1"].reason == "no flags on labelled images"
    assert first["brier"].reason == "no calibrated probabilities of labelled images"
    assert (first["brier"].low, first["brier"].undefined) == (None, 60)


def test_neither_chunks_nor_threads_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    y, s, patients = simulated(40, 3, seed=0)

    def measured() -> tuple[object, ...]:
        got = intervals.bootstrap_findings(y, s, patients, flags=(s > 0).astype(np.int8), n_resamples=100)
        return (
            got.findings,
            got.macro,
            got.weighted,
            [(band.low.tolist(), band.high.tolist()) for band in got.roc if band],
        )

    whole = measured()
    monkeypatch.setattr(intervals, "_THREADS", 1)
    assert measured() == whole
    monkeypatch.setattr(intervals, "_CELLS", 500)
    assert measured() == whole


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"flags": np.zeros((4, 2), np.int8)}, "flags"),
        ({"calibrated": np.zeros((3, 1))}, "calibrated"),
        ({"calibrated": np.full((4, 1), 1.5)}, "0..1"),
        ({"assumed_prevalence": np.array([1.5])}, "0..1"),
        ({"assumed_prevalence": np.array([0.5, 0.5])}, "1 findings"),
        ({"macro": np.array([True, True])}, "1 findings"),
        ({"roc_grid": 1}, "roc_grid"),
        ({"n_resamples": 0}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_rule(given: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        intervals.bootstrap_findings(np.array([[0], [1], [0], [1]]), np.zeros((4, 1)), np.arange(4), **given)


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
    if len(defined) >= intervals.MIN_RESAMPLES and min(defined) < max(defined):
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


@pytest.mark.slow
def test_intervals_cover_the_truth_at_their_rate() -> None:
    """1,000 sets of 400 patients, 40% of them positive, whose one to three images share much of their score.

    Scores are normal in either class, so that the truth is known in closed form. With 60 patients percentiles cover
    some 93% only, which is their known fault.
    """
    shift, between, within, share, cut = 1.2, 1.0, 0.7, 0.4, 0.8
    deviation = math.hypot(between, within)
    normal = stats.norm()
    sensitivity, specificity = normal.cdf((shift - cut) / deviation), normal.cdf(cut / deviation)
    truth = {
        "auroc": normal.cdf(shift / deviation / math.sqrt(2)),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": share * sensitivity / (share * sensitivity + (1 - share) * (1 - specificity)),
        "npv": (1 - share) * specificity / ((1 - share) * specificity + share * (1 - sensitivity)),
        "f1": 2 * share * sensitivity / (share * (1 + sensitivity) + (1 - share) * (1 - specificity)),
        "ppv_at_prevalence": 0.02 * sensitivity / (0.02 * sensitivity + 0.98 * (1 - specificity)),
    }
    hits = dict.fromkeys(truth, 0)
    as_independent = 0
    for number in range(100):
        rng = np.random.default_rng([1, number])
        codes = np.repeat(np.arange(400), rng.integers(1, 4, 400))
        # Ten sets at a time, as ten findings.
        y = (rng.random((400, 10)) < share)[codes].astype(np.int8)
        s = shift * y + between * rng.normal(size=(400, 10))[codes] + within * rng.normal(size=y.shape)
        got = intervals.bootstrap_findings(
            y,
            s,
            codes,
            flags=(s >= cut).astype(np.int8),
            assumed_prevalence=np.full(10, 0.02),
            roc_grid=0,
            n_resamples=300,
            seed=number,
        )
        for f, finding in enumerate(got.findings):
            for name, value in truth.items():
                low, high = ends(finding[name])
                hits[name] += low <= value <= high
            bounds = intervals.delong_interval(*(intervals.delong(y[:, f], s[:, f]) or (0.5, 0.0)))
            assert bounds is not None
            as_independent += bounds[0] <= truth["auroc"] <= bounds[1]
    # Three standard errors of 1,000 draws are 2%.
    assert {name: count for name, count in hits.items() if not 930 <= count <= 970} == {}
    assert as_independent < 900


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
    assert intervals.delong_paired(np.array([1, 0, 0]), np.array([0.3, 0.2, 0.1]), np.zeros(3)) is None


def test_delong_agrees_with_a_published_variance() -> None:
    """As the R package pROC (Robin et al. 2011) has it in its documentation (AUC) and its tests (variance)."""
    grades = np.concatenate([np.repeat(np.arange(1, 6), counts) for counts in WFNS])
    got = intervals.delong(np.repeat([0, 1], [72, 41]), grades)
    assert got == (pytest.approx(0.8236789, abs=5e-8), pytest.approx(0.00146991470882363, abs=1e-16))


def test_paired_delong_agrees_with_its_authors_example() -> None:
    """The areas, their standard errors and the contrasts as SAS/STAT's manual prints them, PROC LOGISTIC."""
    rows = np.array([*NO_BENEFIT.split(), *BENEFIT.split()], dtype=float).reshape(-1, 3)
    y = np.repeat([0, 1], [12, 31])
    tests = {"albumin": rows[:, 0], "protein": rows[:, 1], "K-G": 10 - rows[:, 2]}
    for name, area, error in (("albumin", 0.7366, 0.0927), ("protein", 0.6478, 0.1000), ("K-G", 0.7258, 0.1028)):
        auc, variance = intervals.delong(y, tests[name]) or (0.0, 0.0)
        assert (auc, math.sqrt(variance)) == (pytest.approx(area, abs=5e-5), pytest.approx(error, abs=5e-5))
    for name, difference, error, p in (("albumin", 0.0108, 0.0953, 0.9102), ("protein", -0.0780, 0.1046, 0.4561)):
        a, b, variance = intervals.delong_paired(y, tests[name], tests["K-G"]) or (0.0, 0.0, 0.0)
        assert (a - b, math.sqrt(variance)) == (pytest.approx(difference, abs=5e-5), pytest.approx(error, abs=5e-5))
        assert intervals.normal_p(a - b, variance) == pytest.approx(p, abs=5e-5)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=40))
def test_paired_delong_equals_its_definition(rows: list[tuple[int, int, int]]) -> None:
    y, a, b = (np.array(column) for column in zip(*rows, strict=True))
    assume(2 <= y.sum() <= len(y) - 2)
    v10, v01, areas = [], [], []
    for s in (a, b):
        positives, negatives = s[y == 1].tolist(), s[y == 0].tolist()
        wins = [[1.0 if u > v else 0.5 if u == v else 0.0 for v in negatives] for u in positives]
        v10.append([sum(row) / len(negatives) for row in wins])
        v01.append([sum(column) / len(positives) for column in zip(*wins, strict=True)])
        areas.append(sum(v10[-1]) / len(positives))
    s10, s01 = np.cov(v10), np.cov(v01)  # covariances of the two curves' components
    covariance = s10 / len(v10[0]) + s01 / len(v01[0])
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    got = intervals.delong_paired(y, a, b)
    assert got is not None
    assert got == pytest.approx((*areas, variance), abs=1e-12)


def test_normal_p() -> None:
    assert intervals.normal_p(-0.3, 0.02) == pytest.approx(2 * stats.norm.sf(0.3 / math.sqrt(0.02)), rel=1e-12)
    assert intervals.normal_p(0.0, 0.02) == 1.0
    assert intervals.normal_p(0.0, 0.0) is None


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
