"""Scaling and operating points: recovered truth, kept order, thresholds that rounding cannot flip."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ray_cxr.errors import ConfigError
from ray_cxr.evaluation import calibration, metrics
from ray_cxr.evaluation.calibration import ALTERNATIVES, Calibration, FittedRules, fit_rules, operating_point

SCORED = st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, width=32)), min_size=2, max_size=60)
RULES = st.sampled_from(["youden", "sensitivity=0.9", "specificity=0.9", "sensitivity=1", "specificity=0.5"])
Fit = Callable[..., Calibration | None]
FITS = pytest.mark.parametrize("fit", [calibration.fit_platt, calibration.fit_temperature])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_platt_recovers_slope_and_intercept() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=200_000)
    y = rng.random(len(x)) < sigmoid(0.6 * x - 2.0)
    got = calibration.fit_platt(y, sigmoid(x))
    assert got is not None
    assert got.slope == pytest.approx(0.6, abs=0.03)
    assert got.intercept == pytest.approx(-2.0, abs=0.03)
    assert calibration.apply(got, sigmoid(x)).mean() == pytest.approx(y.mean(), abs=1e-4)


def test_temperature_recovers_the_slope() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(-1.0, 1.0, size=200_000)
    y = rng.random(len(x)) < sigmoid(0.6 * x)
    got = calibration.fit_temperature(y, sigmoid(x))
    assert got is not None
    assert got.slope == pytest.approx(0.6, abs=0.01)
    assert (got.method, got.intercept) == ("temperature", 0.0)
    assert calibration.apply(got, np.array([0.5])) == pytest.approx([0.5])


def test_temperature_by_hand() -> None:
    # At logits 1 and -1, 29 of 38 and 10 of 40 are positive: the smoothed mean target there has the odds e^slope.
    y = np.array([1] * 29 + [0] * 9 + [1] * 10 + [0] * 30)
    p = sigmoid(np.repeat([1.0, -1.0], [38, 40]))
    high, low = 40 / 41, 1 / 41
    share = (29 * high + 9 * low + 10 * (1 - high) + 30 * (1 - low)) / 78
    got = calibration.fit_temperature(y, p)
    assert got is not None
    assert got.slope == pytest.approx(np.log(share / (1 - share)), rel=1e-7)


@settings(max_examples=50, deadline=None)
@given(SCORED)
def test_no_other_temperature_is_better(rows: list[tuple[int, float]]) -> None:
    y, p = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], dtype=np.float32)
    positives = int(y.sum())
    x = np.clip(p.astype(float), calibration.EPSILON, 1 - calibration.EPSILON)
    x = np.log(x) - np.log1p(-x)
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (len(y) - positives + 2))

    def loss(slope: float) -> float:
        return float(np.sum(np.logaddexp(0, slope * x) - target * slope * x))

    got = calibration.fit_temperature(y, p, min_positives=1)
    if got is not None:
        assert loss(got.slope) <= min(loss(got.slope * step) for step in (0.9, 0.99, 1.01, 1.1)) + 1e-9
    elif 0 < positives < len(y) and np.ptp(x) > 0:
        # Declined because the loss falls towards slopes below 0 (it is convex, so one step tells).
        assert loss(-1e-4) <= loss(1e-4)


@FITS
def test_scaling_survives_separable_and_saturated_scores(fit: Fit) -> None:
    y = np.repeat([0, 1], 20)
    got = fit(y, np.repeat([0.0, 1.0], 20))
    assert got is not None
    c = calibration.apply(got, np.array([0.0, 1.0]))
    # Platt's targets: 1/22 and 21/22 are all that 20 images of each class can vouch for.
    assert c == pytest.approx([1 / 22, 21 / 22], abs=1e-4)


@pytest.mark.parametrize(
    ("y", "p"),
    [
        ([1] * 4 + [0] * 40, np.linspace(1, 0, 44)),
        ([1] * 40 + [0] * 4, np.linspace(1, 0, 44)),
        ([1, 0] * 10, np.full(20, 0.3)),
        ([0] * 10 + [1] * 10, np.linspace(0.9, 0.1, 20)),
    ],
    ids=["few positives", "few negatives", "all alike", "order turned round"],
)
@FITS
def test_scaling_declines(y: list[int], p: np.ndarray, fit: Fit) -> None:
    assert fit(np.array(y), p, min_positives=5) is None


@FITS
@settings(max_examples=50, deadline=None)
@given(rows=SCORED)
def test_calibration_keeps_order(rows: list[tuple[int, float]], fit: Fit) -> None:
    y, p = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], dtype=np.float32)
    got = fit(y, p, min_positives=1)
    if got is None:
        return
    c = calibration.apply(got, p)
    assert c.dtype == np.float32
    assert ((c >= 0) & (c <= 1)).all()
    assert (np.diff(c[np.argsort(p)]) >= 0).all()


def test_apply_by_hand() -> None:
    # logit(.8) = log 4; 2 log 4 - log 4 = log 4 again.
    got = calibration.apply(Calibration(2.0, -np.log(4.0)), np.array([0.8, 0.5, np.nan]))
    assert got[:2] == pytest.approx([0.8, 0.2], abs=1e-6)
    assert np.isnan(got[2])


def test_calibration_as_a_bundle_keeps_it() -> None:
    one = Calibration(1.5, -0.25)
    assert one.as_dict() == {"method": "platt", "slope": 1.5, "intercept": -0.25}
    assert Calibration.from_dict(one.as_dict()) == one
    p = np.linspace(0, 1, 5)
    assert (calibration.apply(one.as_dict(), p) == calibration.apply(one, p)).all()
    cool = Calibration(0.5, 0.0, "temperature")
    assert cool.as_dict() == {"method": "temperature", "slope": 0.5, "intercept": 0.0}
    assert Calibration.from_dict(cool.as_dict()) == cool


@pytest.mark.parametrize(
    "value",
    [
        {"method": "isotonic", "slope": 1.0, "intercept": 0.0},
        {"method": "platt", "slope": -1.0, "intercept": 0.0},
        {"method": "platt", "slope": float("nan"), "intercept": 0.0},
        {"method": "platt", "slope": 1.0},
        {"slope": 1.0, "intercept": 0.0},
        {"method": "temperature", "slope": 1.0, "intercept": 0.5},
        {"method": "temperature", "slope": -1.0, "intercept": 0.0},
        {"method": "temperature", "slope": 1.0},
    ],
)
def test_bad_calibration_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="calibration"):
        Calibration.from_dict(value)


def test_operating_points_by_hand() -> None:
    y = np.array([0, 0, 0, 1, 0, 1, 1, 1, 1, 1])
    p = np.array([0.125, 0.25, 0.375, 0.5, 0.5625, 0.625, 0.75, 0.8125, 0.875, 0.9375])
    youden = operating_point(y, p)
    # Above .5625: 5 of 6 positives and no negative (J = .833); above .375: all 6 and one negative (J = .75).
    assert youden == {
        "threshold": 0.59375,
        "rule": "youden",
        "sensitivity": 5 / 6,
        "specificity": 1.0,
        "flag_rate": 0.5,
        "n": 10,
        "positives": 6,
    }
    sensitive = operating_point(y, p, "sensitivity=0.9")
    assert sensitive is not None
    assert (sensitive["threshold"], sensitive["sensitivity"], sensitive["specificity"]) == (0.4375, 1.0, 0.75)
    specific = operating_point(y, p, "specificity=0.75")
    assert specific is not None
    assert (specific["threshold"], specific["sensitivity"], specific["specificity"]) == (0.4375, 1.0, 0.75)


def test_a_target_of_nine_tenths_means_nine_of_ten() -> None:
    y = np.repeat([1, 0], 10)
    p = np.linspace(0.95, 0.05, 20)
    sensitive = operating_point(y, p, "sensitivity=0.9")
    assert sensitive is not None
    assert sensitive["sensitivity"] == 0.9


@settings(deadline=None)
@given(SCORED, RULES)
def test_threshold_gives_what_the_point_says(rows: list[tuple[int, float]], rule: str) -> None:
    y, p = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], dtype=np.float32)
    point = operating_point(y, p, rule)
    if point is None:
        return
    assert 0.0 < point["threshold"] < 1.0
    wide = calibration.flags(p, point["threshold"])
    # Compared as float32, as another language might, the flags are the same.
    assert (wide == (p >= np.float32(point["threshold"]))).all()
    cells = metrics.confusion(y, wide)
    assert (cells.sensitivity, cells.specificity) == (point["sensitivity"], point["specificity"])
    assert cells.flag_rate == point["flag_rate"]
    name, _, target = rule.partition("=")
    if name != "youden":
        assert point[name] >= float(target) - 1e-12


@settings(deadline=None)
@given(SCORED)
def test_youden_is_the_best_of_all_thresholds(rows: list[tuple[int, float]]) -> None:
    y, p = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], dtype=np.float32)
    point = operating_point(y, p)
    if point is None:
        return
    best = max(sum(metrics.sensitivity_specificity(y, p >= t)) for t in p)  # type: ignore[arg-type]
    assert point["sensitivity"] + point["specificity"] == pytest.approx(best, abs=1e-12)


def test_threshold_between_neighbouring_float32() -> None:
    low = np.float32(0.3)
    high = np.nextafter(low, np.float32(1))
    point = operating_point(np.array([0, 1]), np.array([low, high]))
    assert point is not None
    assert calibration.flags(np.array([low, high]), point["threshold"]).tolist() == [False, True]


@pytest.mark.parametrize(
    ("y", "p", "rule"),
    [
        ([1, 1], [0.2, 0.3], "youden"),
        ([0, 0], [0.2, 0.3], "youden"),
        ([0, 1], [0.3, 0.2], "youden"),
        ([0, 1], [0.3, 0.3], "specificity=0.9"),
        ([0, 1, 1], [0.5, 0.0, 0.9], "sensitivity=1"),
    ],
    ids=["no negatives", "no positives", "worse than chance", "flags nothing", "no room below 0"],
)
def test_no_operating_point(y: list[int], p: list[float], rule: str) -> None:
    assert operating_point(np.array(y), np.array(p), rule) is None


def test_operating_point_needs_enough_of_each_class() -> None:
    y, p = np.array([0, 0, 1]), np.array([0.1, 0.2, 0.9])
    assert operating_point(y, p, min_positives=1) is not None
    assert operating_point(y, p, min_positives=2) is None


@pytest.mark.parametrize("rule", ["", "f1", "youden=1", "sensitivity", "sensitivity=0", "specificity=1.1"])
def test_unknown_rules_are_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match="operating point"):
        operating_point(np.array([0, 1]), np.array([0.1, 0.9]), rule)


def test_probabilities_outside_the_range_are_refused() -> None:
    for call in (
        lambda p: operating_point(np.array([0, 1]), p),
        lambda p: calibration.fit_platt(np.array([0, 1]), p),
        lambda p: calibration.fit_temperature(np.array([0, 1]), p),
        lambda p: calibration.apply(Calibration(1.0, 0.0), p),
    ):
        with pytest.raises(ValueError, match=r"0\.\.1"):
            call(np.array([0.5, 1.5]))
    with pytest.raises(ValueError, match=r"0\.\.1"):
        fit_rules(np.array([[0], [1]]), np.array([[0.5], [1.5]]), ["Mass"], min_positives=1)


WRONG_WAY = "no calibration: the best slope is not positive; no operating point: no threshold is better than chance"


def site() -> tuple[pd.DataFrame, np.ndarray]:
    """Five findings on 60 images: a good one, one with few positives, one unlabelled, one the wrong way, one half."""
    rng = np.random.default_rng(4)
    y = (np.arange(60) % 3 == 0).astype(float)
    good = sigmoid(2 * y - 1 + rng.normal(size=60))
    few = np.zeros(60)
    few[:3] = 1
    half = np.where(np.arange(60) < 30, y, np.nan)
    labels = pd.DataFrame({"Mass": y, "Hernia": few, "Edema": np.nan, "Fibrosis": 1 - y, "Nodule": half})
    return labels, np.column_stack([good, good, good, good, good]).astype(np.float32)


def test_rules_per_finding() -> None:
    labels, p = site()
    names = list(labels.columns)
    got = fit_rules(labels, p, names)
    y = labels["Mass"].to_numpy().astype(int)
    platt = calibration.fit_platt(y, p[:, 0])
    assert platt is not None
    assert got.calibrations["Mass"] == platt.as_dict()
    point = operating_point(y, p[:, 0])
    assert point is not None
    assert got.operating_points["Mass"] == point
    assert got.expected_flag_rates["Mass"] == point["flag_rate"]
    assert got.alternatives["Mass"] == {
        name: operating_point(y, p[:, 0], name) for name in ("sensitivity=0.9", "specificity=0.9")
    }
    assert got.reasons == {
        "Mass": None,
        "Hernia": "3 positives, needs 5",
        "Edema": "no labelled images",
        "Fibrosis": WRONG_WAY,
        "Nodule": None,
    }
    for name in ("Hernia", "Edema"):
        assert got.calibrations[name] is got.operating_points[name] is got.expected_flag_rates[name] is None
        assert got.alternatives[name] == {"sensitivity=0.9": None, "specificity=0.9": None}
    assert got.calibrations["Fibrosis"] is None
    # Only the half that is labelled counts.
    assert got.operating_points["Nodule"] == operating_point(y[:30], p[:30, 0])
    for part in (got.calibrations, got.operating_points, got.expected_flag_rates, got.alternatives, got.reasons):
        assert list(part) == names


def test_rules_by_another_method_and_rule() -> None:
    labels, p = site()
    got = fit_rules(labels, p, list(labels.columns), method="temperature", rule="sensitivity=0.90", min_positives=3)
    assert got.calibrations["Mass"] is not None
    assert got.calibrations["Mass"]["method"] == "temperature"
    for name in ("Mass", "Hernia"):
        point = got.operating_points[name]
        assert point is not None
        assert (point["rule"], point["sensitivity"] >= 0.9) == ("sensitivity=0.90", True)
    # The chosen rule, however it is written, is no alternative to itself.
    assert list(got.alternatives["Mass"]) == ["youden", "specificity=0.9"]
    third = fit_rules(labels, p, list(labels.columns), rule="specificity=0.5")
    assert tuple(third.alternatives["Mass"]) == ALTERNATIVES


def test_rules_from_arrays_tables_and_nulls_are_the_same() -> None:
    labels, p = site()
    names = list(labels.columns)
    expected = fit_rules(labels, p, names)
    minus = labels.fillna(-1).to_numpy().astype(np.int8)
    nullable = labels.astype("Int8")[names[::-1]]  # a table's columns are taken by name
    for form in (labels.to_numpy(), minus, nullable, labels.astype(object).where(labels.notna(), None)):
        assert fit_rules(form, p, names) == expected


def test_reasons_tell_calibration_and_operating_point_apart() -> None:
    def reason(y: list[int], p: list[float], rule: str = "youden") -> str | None:
        got: FittedRules = fit_rules(np.array(y)[:, None], np.array(p)[:, None], ["Mass"], rule=rule, min_positives=1)
        return got.reasons["Mass"]

    alike = "no calibration: the scores are all alike; no operating point: "
    assert reason([0, 1], [0.3, 0.3]) == alike + "no threshold is better than chance"
    assert reason([0, 1], [0.3, 0.3], "specificity=0.9") == alike + "only flagging nothing reaches specificity=0.9"
    assert reason([0] * 5 + [1] * 10, [1e-6] * 5 + [0.0] + [0.9] * 9, "sensitivity=1") == (
        "no operating point: scores saturated at 0 or 1 leave no room for a threshold"
    )
    assert reason([0, 1], [0.3, 0.2]) == WRONG_WAY
    assert reason([0, 1], [0.3, 0.2], "sensitivity=1") == "no calibration: the best slope is not positive"
    assert reason([1, 1], [0.3, 0.2]) == "0 negatives, needs 1"


def test_rules_refuse_what_does_not_fit() -> None:
    y, p = np.array([[0], [1]]), np.array([[0.1], [0.9]])
    with pytest.raises(ConfigError, match="isotonic"):
        fit_rules(y, p, ["Mass"], method="isotonic")
    with pytest.raises(ConfigError, match="operating point"):
        fit_rules(y, p, ["Mass"], rule="f1")
    with pytest.raises(ValueError, match="for 2 findings"):
        fit_rules(y, p, ["Mass", "Nodule"])
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        fit_rules(np.array([[0], [2]]), p, ["Mass"])


def plain_error(y: list[int], p: list[float], bins: int) -> float:
    """The expected calibration error, said as a sentence: bin by bin, weighted by images."""
    total = 0.0
    for place in range(bins):
        here = [(a, b) for a, b in zip(y, p, strict=True) if min(int(b * bins), bins - 1) == place]
        if here:
            share, mean = sum(a for a, _ in here) / len(here), sum(b for _, b in here) / len(here)
            total += len(here) / len(y) * abs(mean - share)
    return total


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=40), bins=st.integers(1, 20))
def test_expected_error_is_what_it_says(rows: list[tuple[int, float]], bins: int) -> None:
    y, p = [row[0] for row in rows], [row[1] for row in rows]
    got = calibration.expected_error(np.array(y), np.array(p), bins)
    assert got == pytest.approx(plain_error(y, p, bins), abs=1e-12)
    assert 0 <= got <= 1
    order = np.random.default_rng(0).permutation(len(y))
    assert calibration.expected_error(np.array(y)[order], np.array(p)[order], bins) == pytest.approx(got, abs=1e-12)


def test_expected_error_by_hand() -> None:
    # In 0.0..0.1 two images at 0.05, none positive; in 0.9..1.0 two at 0.95 and 1.0, one positive.
    y, p = np.array([0, 0, 0, 1]), np.array([0.05, 0.05, 1.0, 0.95])
    assert calibration.expected_error(y, p) == pytest.approx(0.5 * 0.05 + 0.5 * (0.975 - 0.5))
    assert calibration.expected_error(y, p, bins=1) == pytest.approx(0.5125 - 0.25)
    assert calibration.expected_error(np.array([], int), np.array([])) is None
    with pytest.raises(ValueError, match="probabilit"):
        calibration.expected_error(np.array([0, 1]), np.array([0.5, 1.5]))


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=60), bins=st.integers(1, 12))
def test_reliability_curve_is_what_the_expected_error_is_made_of(rows: list[tuple[int, float]], bins: int) -> None:
    y, p = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    curve = calibration.reliability(y, p, bins)
    assert [(one.low, one.high) for one in curve] == [(i / bins, (i + 1) / bins) for i in range(bins)]
    assert sum(one.n for one in curve) == len(rows)
    total = 0.0
    for one in curve:
        if one.n == 0:
            assert (one.predicted, one.observed, one.observed_low, one.observed_high) == (None,) * 4
            continue
        assert one.predicted is not None
        assert one.observed is not None
        total += one.n / len(rows) * abs(one.predicted - one.observed)
        wilson = stats.binomtest(round(one.observed * one.n), one.n).proportion_ci(method="wilson")
        assert (one.observed_low, one.observed_high) == pytest.approx((wilson.low, wilson.high), abs=1e-9)
    assert calibration.expected_error(y, p, bins) == pytest.approx(total, abs=1e-12)


def test_copies_of_a_patients_images_do_not_narrow_the_reliability_interval() -> None:
    y, p = np.array([0, 1, 1, 0, 1, 0, 0]), np.array([0.1, 0.1, 0.15, 0.12, 0.9, 0.95, 0.5])
    once = calibration.reliability(y, p, 5)
    thrice = calibration.reliability(np.repeat(y, 3), np.repeat(p, 3), 5, patients=np.repeat(np.arange(7), 3))
    for one, more in zip(once, thrice, strict=True):
        assert more.n == 3 * one.n
        for name in ("predicted", "observed", "observed_low", "observed_high"):
            assert getattr(more, name) == pytest.approx(getattr(one, name), abs=1e-12)
    with pytest.raises(ValueError, match="do not fit"):
        calibration.reliability(y, p, 5, patients=np.arange(3))
    with pytest.raises(ValueError, match="probabilit"):
        calibration.reliability(y, p + 1)


def test_reliability_interval_is_never_narrower_than_that_of_independent_images() -> None:
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 60), rng.random(60)
    for one, more in zip(
        calibration.reliability(y, p), calibration.reliability(y, p, patients=rng.integers(0, 20, 60)), strict=True
    ):
        assert one.observed_low is not None
        assert one.observed_high is not None
        assert more.observed_low is not None
        assert more.observed_high is not None
        assert more.observed_high - more.observed_low >= one.observed_high - one.observed_low - 1e-12


def test_probabilities_that_come_true_have_a_small_error_and_others_a_large_one() -> None:
    rng = np.random.default_rng(0)
    p = sigmoid(rng.normal(-1, 1.5, size=100_000))
    y = (rng.random(len(p)) < p).astype(int)
    small = calibration.expected_error(y, p)
    assert small is not None
    assert small < 0.01
    too_high = calibration.expected_error(y, p**0.5)
    assert too_high == pytest.approx((p**0.5 - p).mean(), abs=0.01)


def simulated(patients: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two findings on two images a patient whose raw probabilities are all too high, a tenth of the labels missing."""
    rng = np.random.default_rng(seed)
    ids = np.array([f"p{i // 2}" for i in rng.permutation(2 * patients)])
    true = sigmoid(rng.normal(-1.5, 1.5, size=(2 * patients, 2)))
    labels = (rng.random(true.shape) < true).astype(np.int8)
    labels[rng.random(true.shape) < 0.1] = -1
    x = np.log(true / (1 - true))
    return labels, sigmoid(0.5 * x + 1.5), ids


def plain_cross_fitted(labels: np.ndarray, p: np.ndarray, patients: np.ndarray, fit: Fit, least: int = 5) -> float:
    """Every other patient, in order of appearance, makes one half; each half is calibrated by the other."""
    seen: list[str] = []
    for patient in patients:
        if patient not in seen:
            seen.append(patient)
    errors = []
    for j in range(labels.shape[1]):
        y: list[int] = []
        calibrated: list[float] = []
        for half in (0, 1):
            rows = [i for i in range(len(p)) if labels[i, j] != -1 and seen.index(patients[i]) % 2 == half]
            others = [i for i in range(len(p)) if labels[i, j] != -1 and seen.index(patients[i]) % 2 != half]
            rule = fit(labels[others, j], p[others, j], least)
            y += labels[rows, j].tolist()
            calibrated += (p[rows, j] if rule is None else calibration.apply(rule, p[rows, j])).tolist()
        errors.append(plain_error(y, calibrated, 10))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("method", ["platt", "temperature"])
def test_cross_fitted_error_is_what_it_says(method: str) -> None:
    labels, p, patients = simulated(60)
    fit = {"platt": calibration.fit_platt, "temperature": calibration.fit_temperature}[method]
    got = calibration.cross_fitted_error(labels, p, patients, method=method)
    assert got == pytest.approx(plain_cross_fitted(labels, p, patients, fit), abs=1e-9)


def test_cross_fitting_leaves_what_calibration_cannot_mend() -> None:
    labels, p, patients = simulated(2000)
    known = labels >= 0
    raw = np.mean([calibration.expected_error(labels[known[:, j], j], p[known[:, j], j]) for j in range(2)])
    left = calibration.cross_fitted_error(labels, p, patients)
    assert left is not None
    assert raw > 0.3
    assert left < 0.03
    # Temperature has no intercept, which is what is lacking here.
    cooled = calibration.cross_fitted_error(labels, p, patients, method="temperature")
    assert cooled is not None
    assert left < cooled <= raw
    # Where the order is turned round, as a bundle would have it: nothing is calibrated.
    turned = calibration.cross_fitted_error(labels, 1 - p, patients)
    raw = np.mean([calibration.expected_error(labels[known[:, j], j], 1 - p[known[:, j], j]) for j in range(2)])
    assert turned == pytest.approx(raw)


def test_patients_are_halved_and_not_images() -> None:
    """A patient with many images that say the opposite of everybody's: his own half does not learn from him."""
    labels, p, patients = simulated(60)
    labels[:30] = labels[:30] ^ 1
    labels[labels < 0] = -1
    found = []
    for ids in (np.where(np.arange(120) < 30, "odd", patients), patients):
        found.append(calibration.cross_fitted_error(labels, p, ids))
        assert found[-1] == pytest.approx(plain_cross_fitted(labels, p, ids, calibration.fit_platt), abs=1e-9)
    assert found[0] != pytest.approx(found[1], abs=1e-3)


def test_cross_fitted_error_of_too_little() -> None:
    labels, p, patients = simulated(60)
    assert calibration.cross_fitted_error(np.full_like(labels, -1), p, patients) is None
    # A finding that nobody labelled does not count.
    half = labels.copy()
    half[:, 1] = -1
    alone = calibration.cross_fitted_error(labels[:, :1], p[:, :1], patients)
    assert calibration.cross_fitted_error(half, p, patients) == pytest.approx(alone)
    # With too few positives probabilities stay as they are.
    known = labels[:, 0] >= 0
    raw = calibration.expected_error(labels[known, 0], p[known, 0])
    few = calibration.cross_fitted_error(labels[:, :1], p[:, :1], patients, min_positives=1000)
    assert few == pytest.approx(raw)
    unknown = calibration.cross_fitted_error(labels, p, np.array([None] * len(p), object))
    assert unknown is not None
    one_patient = calibration.cross_fitted_error(labels[:, :1], p[:, :1], np.array(["a"] * len(p)))
    assert one_patient == pytest.approx(raw)


def test_reliability_bins_of_equal_counts_hold_equal_counts() -> None:
    rng = np.random.default_rng(3)
    p = rng.beta(1, 40, 1000)
    y = rng.random(1000) < p
    bins = calibration.reliability(y, p, equal_counts=True)
    assert [one.n for one in bins] == [100] * 10
    order = np.argsort(p)
    for k, one in enumerate(bins):
        rows = order[100 * k : 100 * (k + 1)]
        assert one.predicted == pytest.approx(p[rows].mean(), abs=1e-15)
        assert one.observed == y[rows].mean()
        assert one.low <= p[rows].min() <= p[rows].max() <= one.high
    # One value throughout is one bin, not ten of which nine are empty.
    assert [one.n for one in calibration.reliability(y, np.full(1000, 0.02), equal_counts=True)] in ([1000], [0, 1000])
