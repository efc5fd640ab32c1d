"""Metrics equal scikit-learn and their definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from ray_cxr.evaluation import metrics

# Few distinct scores, so that most are tied.
TIED = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6)), min_size=2, max_size=40)
FREE = st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, width=32)), min_size=2, max_size=40)


def both_classes(rows: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    y = np.array([row[0] for row in rows], dtype=np.uint8)
    s = np.array([row[1] for row in rows], dtype=np.float64) / 7
    assume(0 < y.sum() < len(y))
    return y, s


@settings(max_examples=40)
@given(TIED)
def test_auroc_is_the_share_of_ordered_pairs(rows: list[tuple[int, float]]) -> None:
    y, s = both_classes(rows)
    pairs = s[y == 1][:, None] - s[y == 0][None, :]
    value = metrics.auroc(y, s)
    assert value == ((pairs > 0).sum() + 0.5 * (pairs == 0).sum()) / pairs.size
    assert metrics.auroc(y, np.exp(3 * s) - 5) == value
    assert metrics.auroc(y, -s) == pytest.approx(1 - value, abs=1e-15)
    # Scores that differ in the last bit of float32 are not tied.
    close = np.array([0.1, np.nextafter(np.float32(0.1), np.float32(1))], dtype=np.float32)
    assert metrics.auroc(np.array([0, 1]), close) == 1.0


@settings(max_examples=40)
@given(TIED | FREE)
def test_areas_equal_sklearn_and_roc_curve_has_the_auroc_as_its_area(rows: list[tuple[int, float]]) -> None:
    y, s = both_classes(rows)
    precision = sklearn_metrics.average_precision_score(y, s)
    assert metrics.average_precision(y, s) == pytest.approx(precision, abs=1e-12)
    area = sklearn_metrics.roc_auc_score(y, s)
    curve = metrics.roc_curve(y, s)
    assert (curve.x[0], curve.y[0], curve.x[-1], curve.y[-1]) == (0, 0, 1, 1)
    assert metrics.auroc(y, s) == pytest.approx(area, abs=1e-12) == np.trapezoid(curve.y, curve.x)
    for x, sensitivity, threshold in zip(curve.x, curve.y, curve.thresholds, strict=True):
        cells = metrics.confusion(y, s >= threshold)
        assert (cells.sensitivity, cells.specificity) == (pytest.approx(sensitivity), pytest.approx(1 - x))


def test_precision_recall_curve_by_hand() -> None:
    # In order 1 0 1 0: precision 1 at the first positive, 2/3 at the second.
    y, s = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.1])
    curve = metrics.precision_recall_curve(y, s)
    assert (curve.x.tolist(), curve.thresholds.tolist()) == ([0.5, 0.5, 1.0, 1.0], s.tolist())
    assert curve.y == pytest.approx([1.0, 0.5, 2 / 3, 0.5])
    assert metrics.average_precision(y, s) == pytest.approx((1 + 2 / 3) / 2, abs=1e-15)
    for labels in ([0, 0], []):
        with pytest.raises(ValueError, match="positive label"):
            metrics.precision_recall_curve(np.array(labels), np.linspace(0.1, 0.2, len(labels)))


def test_undefined_is_none_with_a_reason() -> None:
    reasons = ("no labelled images", "no positive images", "no negative images", None)
    for labels, reason in zip(([], [0, 0], [1, 1], [0, 1]), reasons, strict=True):
        y, s = np.array(labels, dtype=np.uint8), np.linspace(0.1, 0.9, len(labels))
        assert metrics.undefined_reason(y) == reason
        for value in (metrics.auroc(y, s), metrics.average_precision(y, s), metrics.roc_curve(y, s)):
            assert (value is None) == (reason is not None)


def test_confusion_and_brier_by_hand() -> None:
    cells = metrics.confusion(np.array([1, 1, 1, 0, 0]), np.array([True, True, False, True, False]))
    assert (cells.true_positives, cells.false_negatives) == (2, 1)
    assert (cells.false_positives, cells.true_negatives) == (1, 1)
    assert cells.flag_rate == 3 / 5
    assert metrics.confusion(np.array([0, 0]), np.array([False, False])).flag_rate == 0.0
    assert metrics.confusion(np.zeros(0), np.zeros(0, dtype=bool)).flag_rate is None
    assert metrics.brier(np.array([1, 0]), np.array([0.5, 0.25])) == (0.25 + 0.0625) / 2
    assert metrics.brier(np.zeros(0), np.zeros(0)) is None


@settings(max_examples=25)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_rates_equal_sklearn_and_predictive_values_their_definition(rows: list[tuple[bool, bool]]) -> None:
    y, flags = np.array([row[0] for row in rows], int), np.array([row[1] for row in rows])
    cells = metrics.confusion(y, flags)
    # Predictive values at the prevalence of the sample are those of the sample.
    at_sample = cells.expect_at(float(y.mean()))
    assert (at_sample is None) == (cells.sensitivity is None or cells.specificity is None)
    if at_sample is not None:
        expected = [None if value is None else pytest.approx(value) for value in (cells.ppv, cells.npv)]
        assert [at_sample.ppv, at_sample.npv] == expected
    expected = {
        "f1": sklearn_metrics.f1_score(y, flags, zero_division=np.nan),
        "sensitivity": sklearn_metrics.recall_score(y, flags, zero_division=np.nan),
        "specificity": sklearn_metrics.recall_score(1 - y, ~flags, zero_division=np.nan),
        "ppv": sklearn_metrics.precision_score(y, flags, zero_division=np.nan),
        "npv": sklearn_metrics.precision_score(1 - y, ~flags, zero_division=np.nan),
    }
    for name, value in expected.items():
        assert (getattr(cells, name) is None) == bool(np.isnan(value)), name
        assert np.isnan(value) or getattr(cells, name) == pytest.approx(value), name


def test_predictive_values_at_a_prevalence_by_hand() -> None:
    # 9 of 10 positives and 99 of 990 negatives would be flagged.
    cells = metrics.Confusion(9, 1, 9, 1).expect_at(0.01)
    assert (cells.ppv, cells.npv) == (pytest.approx(9 / 108), pytest.approx(891 / 892))
    cells = metrics.Confusion(9, 0, 9, 1).expect_at(0.0)
    assert (cells.ppv, cells.npv) == (None, 1.0)
    cells = metrics.Confusion(9, 5, 5, 0).expect_at(1.0)
    assert (cells.ppv, cells.npv) == (1.0, None)
    with pytest.raises(ValueError, match="prevalence is 5"):
        metrics.Confusion(1, 1, 1, 1).expect_at(5.0)


def test_bad_input_is_refused() -> None:
    for y, s, part in (
        ([0, 1, 2], [0.1, 0.2, 0.3], "labels must be 0 or 1"),
        ([0, 1, -1], [0.1, 0.2, 0.3], "labels must be 0 or 1"),
        ([0, 1], [0.1, np.nan], "scores must be finite"),
        ([0, 1], [0.1], "scores"),
        ([[0, 1]], [[0.1, 0.2]], "scores"),
    ):
        with pytest.raises(ValueError, match=part):
            metrics.auroc(np.array(y), np.array(s))


def test_each_metric_is_registered_once_and_documented() -> None:
    keys = [metric.key for metric in metrics.METRICS]
    assert len(set(keys)) == len(keys)
    assert {metric.table for metric in metrics.METRICS} == set(metrics.TABLES)
    docs = Path(__file__).parents[2] / "docs" / "report.md"
    rows = [f"| {metric.label} | `{metric.key}` | {metric.meaning} |\n" for metric in metrics.METRICS]
    assert "".join(["| metric | key | meaning |\n|---|---|---|\n", *rows]) in docs.read_text(encoding="utf-8")


def test_calibration_error_in_bins_of_equal_mass_by_hand() -> None:
    # Four bins of two images: |0.1 + 0.2 - 1|, |0.3 + 0.3|, |0.4 + 0.5 - 1| and |0.6 + 0.9 - 2|, over eight images.
    y, p = np.array([0, 1, 0, 0, 1, 0, 1, 1]), np.array([0.1, 0.2, 0.3, 0.3, 0.4, 0.5, 0.6, 0.9])
    assert metrics.equal_mass_error(y, p, bins=4) == pytest.approx((0.7 + 0.6 + 0.1 + 0.5) / 8)
    assert metrics.rank_bins(p, 8).tolist() == [0, 1, 2, 2, 3, 4, 5, 6], "equal values share a bin"
    assert metrics.equal_mass_error(np.zeros(0), np.zeros(0)) is None
