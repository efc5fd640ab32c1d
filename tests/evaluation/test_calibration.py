"""Calibration and operating points against exact solutions, definitions written out, and scipy."""

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
from ray_cxr.evaluation.calibration import Calibration, fit_platt, fit_rules, fit_temperature, operating_point

Fit = Callable[..., Calibration | None]
LABELLED = st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, width=32)), min_size=2, max_size=40)
RULES = st.sampled_from(["youden", "sensitivity=0.9", "specificity=0.9", "sensitivity=1", "specificity=0.5"])
FITS = pytest.mark.parametrize("fit", [fit_platt, fit_temperature])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def columns(rows: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([row[0] for row in rows]), np.array([row[1] for row in rows], dtype=np.float32)


# ---- scaling ----


def test_scaling_by_hand() -> None:
    """At logit 1, 29 of 38 images are positive; at logit -1, 10 of 60. So Platt's targets are 40/41 and 1/61."""
    y = np.repeat([1, 0, 1, 0], [29, 9, 10, 50])
    p = sigmoid(np.repeat([1.0, -1.0], [38, 60]))
    high, low = (29 * 40 / 41 + 9 / 61) / 38, (10 * 40 / 41 + 50 / 61) / 60  # mean targets at the two logits
    # Two parameters meet both means.
    got = fit_platt(y, p)
    assert got.slope == pytest.approx((logit(high) - logit(low)) / 2, rel=1e-5)
    assert got.intercept == pytest.approx((logit(high) + logit(low)) / 2, rel=1e-5)
    assert got.method == "platt"
    # One parameter meets the mean after the points at -1 are mirrored to 1.
    got = fit_temperature(y, p)
    assert got.slope == pytest.approx(logit((38 * high + 60 * (1 - low)) / 98), rel=1e-6)
    assert (got.intercept, got.method) == (0.0, "temperature")


@settings(max_examples=40)
@given(LABELLED)
def test_no_other_temperature_is_better(rows: list[tuple[int, float]]) -> None:
    y, p = columns(rows)
    positives = int(y.sum())
    x = np.clip(p.astype(float), calibration.EPSILON, 1 - calibration.EPSILON)
    x = np.log(x) - np.log1p(-x)
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (len(y) - positives + 2))

    def loss(slope: float) -> float:
        return float(np.sum(np.logaddexp(0, slope * x) - target * slope * x))

    got = fit_temperature(y, p, min_positives=1)
    if got is not None:
        assert loss(got.slope) <= min(loss(got.slope * step) for step in (0.9, 0.99, 1.01, 1.1)) + 1e-9
    elif 0 < positives < len(y) and np.ptp(x) > 0:
        # The loss is convex, so one step shows that it falls towards slopes below 0.
        assert loss(-1e-4) <= loss(1e-4)


@FITS
@settings(max_examples=30)
@given(rows=LABELLED)
def test_calibration_keeps_order(rows: list[tuple[int, float]], fit: Fit) -> None:
    y, p = columns(rows)
    got = fit(y, p, min_positives=1)
    if got is not None:
        calibrated = calibration.apply(got, p)
        assert calibrated.dtype == np.float32
        assert ((calibrated >= 0) & (calibrated <= 1)).all()
        assert (np.diff(calibrated[np.argsort(p)]) >= 0).all()


@FITS
def test_scaling_of_separable_saturated_scores_is_finite(fit: Fit) -> None:
    got = fit(np.repeat([0, 1], 20), np.repeat([0.0, 1.0], 20))
    assert calibration.apply(got, np.array([0.0, 1.0])) == pytest.approx([1 / 22, 21 / 22], abs=1e-4)


@FITS
def test_scaling_declines(fit: Fit) -> None:
    assert fit(np.array([1, 0] * 10), np.full(20, 0.3)) is None  # equal scores
    assert fit(np.repeat([0, 1], 10), np.linspace(0.9, 0.1, 20)) is None  # reversed order
    for y, p in ((np.repeat([1, 0], [5, 40]), np.linspace(1, 0, 45)), (np.repeat([1, 0], [40, 5]), np.linspace(1, 0, 45))):
        assert fit(y, p, min_positives=5) is not None
        assert fit(y, p, min_positives=6) is None
    assert fit(np.ones(9, int), np.linspace(0.1, 0.9, 9), min_positives=0) is None


def test_apply_by_hand() -> None:
    # logit(.8) = log 4; 2 log 4 - log 4 = log 4 again.
    rule = Calibration(2.0, -np.log(4.0))
    for form in (rule, rule.as_dict()):
        got = calibration.apply(form, np.array([0.8, 0.5, np.nan]))
        assert got[:2] == pytest.approx([0.8, 0.2], abs=1e-6)
        assert np.isnan(got[2])


def test_calibration_survives_the_bundle() -> None:
    for rule in (Calibration(1.5, -0.25), Calibration(0.5, 0.0, "temperature")):
        assert rule.as_dict() == {"method": rule.method, "slope": rule.slope, "intercept": rule.intercept}
        assert Calibration.from_dict(rule.as_dict()) == rule


@pytest.mark.parametrize(
    "value",
    [
        {"method": "isotonic", "slope": 1.0, "intercept": 0.0},
        {"method": "platt", "slope": -1.0, "intercept": 0.0},
        {"method": "platt", "slope": 0.0, "intercept": 0.0},
        {"method": "platt", "slope": float("nan"), "intercept": 0.0},
        {"method": "platt", "slope": 1.0, "intercept": float("inf")},
        {"method": "platt", "slope": 1.0},
        {"slope": 1.0, "intercept": 0.0},
        {"method": "temperature", "slope": 1.0, "intercept": 0.5},
    ],
)
def test_bad_calibration_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="calibration"):
        Calibration.from_dict(value)


# ---- operating points ----


def test_operating_points_by_hand() -> None:
    y = np.array([0, 0, 0, 1, 0, 1, 1, 1, 1, 1])
    p = np.array([0.125, 0.25, 0.375, 0.5, 0.5625, 0.625, 0.75, 0.8125, 0.875, 0.9375])
    # Above .5625: 5 of 6 positives and no negative (J = .833); above .375: all 6 and one negative (J = .75).
    assert operating_point(y, p) == {
        "threshold": 0.59375,
        "rule": "youden",
        "sensitivity": 5 / 6,
        "specificity": 1.0,
        "flag_rate": 0.5,
        "n": 10,
        "positives": 6,
    }
    for rule in ("sensitivity=0.9", "specificity=0.75"):
        point = operating_point(y, p, rule)
        assert (point["threshold"], point["sensitivity"], point["specificity"]) == (0.4375, 1.0, 0.75)
    # A target of 0.9 is met by 9 of 10.
    point = operating_point(np.repeat([1, 0], 10), np.linspace(0.95, 0.05, 20), "sensitivity=0.9")
    assert point["sensitivity"] == 0.9


@given(LABELLED, RULES)
def test_operating_point_keeps_its_rule(rows: list[tuple[int, float]], rule: str) -> None:
    y, p = columns(rows)
    point = operating_point(y, p, rule)
    if point is None:
        return
    assert 0.0 < point["threshold"] < 1.0
    flags = calibration.flags(p, point["threshold"])
    assert (flags == (p >= np.float32(point["threshold"]))).all()  # the same flags in float32
    cells = metrics.confusion(y, flags)
    rates = (cells.sensitivity, cells.specificity, cells.flag_rate)
    assert rates == (point["sensitivity"], point["specificity"], point["flag_rate"])
    others = {float(t): metrics.sensitivity_specificity(y, p >= t) for t in p}
    name, _, target = rule.partition("=")
    if name == "youden":
        best = max(map(sum, others.values()))
        assert point["sensitivity"] + point["specificity"] == pytest.approx(best, abs=1e-12)
        # Of equal thresholds the more sensitive.
        assert all(t >= point["threshold"] for t, rates in others.items() if sum(rates) > best - 1e-9)
    elif name == "sensitivity":
        assert point[name] >= float(target) - 1e-12
        assert all(rates[0] < float(target) for t, rates in others.items() if not flags[p == np.float32(t)].all() or 0)
    else:
        assert point[name] >= float(target) - 1e-12
