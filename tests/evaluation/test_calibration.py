"""Platt scaling and operating points: recovered truth, kept order, thresholds that rounding cannot flip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr.errors import ConfigError
from ray_cxr.evaluation import calibration, metrics
from ray_cxr.evaluation.calibration import Calibration, operating_point

SCORED = st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, width=32)), min_size=2, max_size=60)
RULES = st.sampled_from(["youden", "sensitivity=0.9", "specificity=0.9", "sensitivity=1", "specificity=0.5"])


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


def test_platt_survives_separable_and_saturated_scores() -> None:
    y = np.repeat([0, 1], 20)
    got = calibration.fit_platt(y, np.repeat([0.0, 1.0], 20))
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
def test_platt_declines(y: list[int], p: np.ndarray) -> None:
    assert calibration.fit_platt(np.array(y), p, min_positives=5) is None


@settings(max_examples=50, deadline=None)
@given(SCORED)
def test_calibration_keeps_order(rows: list[tuple[int, float]]) -> None:
    y, p = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], dtype=np.float32)
    got = calibration.fit_platt(y, p, min_positives=1)
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


@pytest.mark.parametrize(
    "value",
    [
        {"method": "isotonic", "slope": 1.0, "intercept": 0.0},
        {"method": "platt", "slope": -1.0, "intercept": 0.0},
        {"method": "platt", "slope": float("nan"), "intercept": 0.0},
        {"method": "platt", "slope": 1.0},
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
        lambda p: calibration.apply(Calibration(1.0, 0.0), p),
    ):
        with pytest.raises(ValueError, match=r"0\.\.1"):
            call(np.array([0.5, 1.5]))
