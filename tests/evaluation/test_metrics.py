"""Metrics against scikit-learn, against their definitions, and against rows that are really repeated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from ray_cxr.evaluation import metrics

# Few distinct scores, so that ties are the rule.
TIED = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=60)
FREE = st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, allow_nan=False, width=32)), min_size=2, max_size=60)


def both_classes(rows: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    y = np.array([row[0] for row in rows], dtype=np.uint8)
    s = np.array([row[1] for row in rows], dtype=np.float64) / 7
    assume(0 < y.sum() < len(y))
    return y, s


@settings(deadline=None)
@given(TIED | FREE)
def test_auroc_equals_sklearn(rows: list[tuple[int, float]]) -> None:
    y, s = both_classes(rows)
    assert metrics.auroc(y, s) == pytest.approx(sklearn_metrics.roc_auc_score(y, s), abs=1e-12)


@settings(deadline=None)
@given(TIED | FREE)
def test_average_precision_equals_sklearn(rows: list[tuple[int, float]]) -> None:
    y, s = both_classes(rows)
    expected = sklearn_metrics.average_precision_score(y, s)
    assert metrics.average_precision(y, s) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(TIED)
def test_auroc_is_the_share_of_pairs_in_order(rows: list[tuple[int, float]]) -> None:
    y, s = both_classes(rows)
    pairs = s[y == 1][:, None] - s[y == 0][None, :]
    assert metrics.auroc(y, s) == ((pairs > 0).sum() + 0.5 * (pairs == 0).sum()) / pairs.size


@settings(deadline=None)
@given(TIED, st.data())
def test_counts_as_weights_equal_repeated_rows(rows: list[tuple[int, float]], data: st.DataObject) -> None:
    y, s = both_classes(rows)
    w = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(y), max_size=len(y))))
    repeated = metrics.auroc(np.repeat(y, w), np.repeat(s, w))
    assert metrics.auroc(y, s, w) == repeated
    if repeated is not None:
        assert metrics.auroc(y, s, w * 0.3) == pytest.approx(repeated, abs=1e-12)


@settings(deadline=None)
@given(TIED)
def test_auroc_ignores_monotone_maps_and_mirrors(rows: list[tuple[int, float]]) -> None:
    y, s = both_classes(rows)
    value = metrics.auroc(y, s)
    assert value is not None
    assert metrics.auroc(y, np.exp(3 * s) - 5) == value
    assert metrics.auroc(y, -s) == pytest.approx(1 - value, abs=1e-15)
    assert metrics.auroc(1 - y, s) == pytest.approx(1 - value, abs=1e-15)


@settings(deadline=None)
@given(TIED | FREE)
def test_area_under_the_roc_curve_is_the_auroc(rows: list[tuple[int, float]]) -> None:
    y, s = both_classes(rows)
    curve = metrics.roc_curve(y, s)
    assert curve is not None
    assert (curve.x[0], curve.y[0], curve.x[-1], curve.y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(curve.y, curve.x) == pytest.approx(metrics.auroc(y, s), abs=1e-12)
    for x, sensitivity, threshold in zip(curve.x, curve.y, curve.thresholds, strict=True):
        got = metrics.sensitivity_specificity(y, s >= threshold)
        assert got == (pytest.approx(sensitivity), pytest.approx(1 - x))


@settings(deadline=None)
@given(TIED, st.data())
def test_weighted_auroc_equals_sklearn(rows: list[tuple[int, float]], data: st.DataObject) -> None:
    y, s = both_classes(rows)
    w = np.array(data.draw(st.lists(st.integers(1, 9), min_size=len(y), max_size=len(y)))) / 4
    assert metrics.auroc(y, s, w) == pytest.approx(sklearn_metrics.roc_auc_score(y, s, sample_weight=w), abs=1e-12)


def test_auroc_equals_sklearn_on_as_many_images_as_the_official_test_set() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random(25_596) < 0.03).astype(np.uint8)
    s = (1 / (1 + np.exp(4 - y - rng.normal(size=len(y))))).astype(np.float32).round(4)  # with ties
    assert metrics.auroc(y, s) == pytest.approx(sklearn_metrics.roc_auc_score(y, s), abs=1e-12)
    expected = sklearn_metrics.average_precision_score(y, s)
    assert metrics.average_precision(y, s) == pytest.approx(expected, abs=1e-12)


def test_auroc_by_hand() -> None:
    # Pairs (positive, negative): .8 beats both; .4 beats .1 and ties .4, so 3.5 of 4.
    assert metrics.auroc(np.array([1, 1, 0, 0]), np.array([0.8, 0.4, 0.4, 0.1])) == 0.875


def test_average_precision_by_hand() -> None:
    # In order 1 0 1 0: precision 1 at the first positive, 2/3 at the second.
    value = metrics.average_precision(np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.1]))
    assert value == pytest.approx((1 + 2 / 3) / 2, abs=1e-15)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [([], "no labelled images"), ([0, 0], "no positive images"), ([1, 1], "no negative images"), ([0, 1], None)],
)
def test_undefined_is_none_with_a_reason(labels: list[int], reason: str | None) -> None:
    y = np.array(labels, dtype=np.uint8)
    s = np.linspace(0.1, 0.9, len(y))
    assert metrics.undefined_reason(y) == reason
    for value in (metrics.auroc(y, s), metrics.average_precision(y, s), metrics.roc_curve(y, s)):
        assert (value is None) == (reason is not None)


def test_auroc_without_weight_on_a_class_is_none() -> None:
    assert metrics.auroc(np.array([1, 0]), np.array([0.1, 0.2]), np.array([0.0, 2.0])) is None


def test_float32_scores_are_compared_as_they_are() -> None:
    s = np.array([0.1, np.nextafter(np.float32(0.1), np.float32(1))], dtype=np.float32)
    assert metrics.auroc(np.array([0, 1]), s) == 1.0


def test_confusion_by_hand() -> None:
    cells = metrics.confusion(np.array([1, 1, 1, 0, 0]), np.array([True, True, False, True, False]))
    assert (cells.true_positives, cells.false_negatives) == (2, 1)
    assert (cells.false_positives, cells.true_negatives) == (1, 1)
    assert (cells.sensitivity, cells.specificity) == (2 / 3, 1 / 2)
    assert (cells.ppv, cells.npv, cells.flag_rate) == (2 / 3, 1 / 2, 3 / 5)
    assert cells.f1 == 4 / 6


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_f1_equals_sklearn(rows: list[tuple[bool, bool]]) -> None:
    y, flags = np.array([row[0] for row in rows], int), np.array([row[1] for row in rows])
    expected = sklearn_metrics.f1_score(y, flags, zero_division=np.nan)
    got = metrics.confusion(y, flags).f1
    assert got == pytest.approx(expected) if got is not None else np.isnan(expected)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_predictive_values_at_the_prevalence_of_the_sample_are_those_of_the_sample(
    rows: list[tuple[bool, bool]],
) -> None:
    y, flags = np.array([row[0] for row in rows], int), np.array([row[1] for row in rows])
    cells = metrics.confusion(y, flags)
    got = metrics.predictive_values_at(cells.sensitivity, cells.specificity, float(y.mean()))
    if cells.sensitivity is None or cells.specificity is None:
        assert got == (None, None)
    else:
        assert [value is None for value in got] == [value is None for value in (cells.ppv, cells.npv)]
        pairs = [(a, b) for a, b in zip(got, (cells.ppv, cells.npv), strict=True) if a is not None]
        assert all(a == pytest.approx(b) for a, b in pairs)


def test_predictive_values_at_a_prevalence_by_hand() -> None:
    # Of 1,000 people 10 are sick, 9 of whom are flagged; of the 990 others, 99 are.
    assert metrics.predictive_values_at(0.9, 0.9, 0.01) == (pytest.approx(9 / 108), pytest.approx(891 / 892))
    assert metrics.predictive_values_at(0.9, 1.0, 0.0) == (None, 1.0)
    assert metrics.predictive_values_at(1.0, 0.5, 1.0) == (1.0, None)
    with pytest.raises(ValueError, match="prevalence"):
        metrics.predictive_values_at(0.9, 0.9, 5.0)
    with pytest.raises(ValueError, match="sensitivity"):
        metrics.predictive_values_at(float("nan"), 0.9, 0.5)


def test_rates_without_a_denominator_are_none() -> None:
    cells = metrics.confusion(np.array([0, 0]), np.array([False, False]))
    assert (cells.sensitivity, cells.ppv, cells.specificity, cells.npv) == (None, None, 1.0, 1.0)
    assert cells.f1 is None
    assert metrics.confusion(np.zeros(0), np.zeros(0, dtype=bool)).flag_rate is None


def test_brier_by_hand() -> None:
    assert metrics.brier(np.array([1, 0]), np.array([0.5, 0.25])) == (0.25 + 0.0625) / 2
    assert metrics.brier(np.zeros(0), np.zeros(0)) is None


@pytest.mark.parametrize(
    ("y", "s", "rule"),
    [
        ([0, 1, 2], [0.1, 0.2, 0.3], "labels must be 0 or 1"),
        ([0, 1, -1], [0.1, 0.2, 0.3], "labels must be 0 or 1"),
        ([0, 1], [0.1, np.nan], "scores must be finite"),
        ([0, 1], [0.1, np.inf], "scores must be finite"),
        ([0, 1], [0.1], "both must be"),
    ],
)
def test_bad_input_is_refused_by_its_rule(y: list[int], s: list[float], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        metrics.auroc(np.array(y), np.array(s))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, np.nan]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        metrics.auroc(np.array([0, 1]), np.array([0.1, 0.2]), np.array(weights))


def test_precision_recall_without_positives_is_refused() -> None:
    with pytest.raises(ValueError, match="positive label"):
        metrics.precision_recall_curve(np.array([0, 0]), np.array([0.1, 0.2]))
