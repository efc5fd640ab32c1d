"""Selective prediction by hand, against a direct computation, and its limiting cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit

from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.selective import GRID, Selection, measure_selection


def measure(y: np.ndarray, p: np.ndarray, flags: np.ndarray, patients: np.ndarray | None = None) -> Selection | str:
    owners = np.arange(len(y)) if patients is None else patients
    columns = (part[:, None] for part in (y, p, flags))
    return measure_selection(*columns, owners, n_resamples=60, seed=0)[0]


def test_twenty_images_by_hand() -> None:
    # The least certain two are 0.45, a missed positive, and 0.6, a false alarm. 0.91 is a false alarm, too.
    low = np.arange(1, 10) / 100
    p = np.array([*low, 0.45, 0.6, *(1 - low)])
    y, flags = (p > 0.91).astype(np.int8), (p > 0.5).astype(np.int8)
    y[9] = 1
    found = measure(y, p, flags)
    every = {"error_rate": 3 / 20, "sensitivity": 8 / 9, "specificity": 9 / 11, "auroc": 97 / 99}
    assert found.all_images == pytest.approx(every)
    assert found.kept == pytest.approx({"error_rate": 1 / 18, "sensitivity": 1, "specificity": 9 / 10, "auroc": 1})
    assert found.changes["sensitivity"].value == pytest.approx(1 / 9)
    assert (found.errors_handed_over.value, found.missed_handed_over.value) == pytest.approx((2 / 3, 1))
    assert found.best_possible == pytest.approx(2 / 3)
    assert found.curves["error_rate"].value[[0, -1]] == pytest.approx([0, 3 / 20])
    assert (found.n, found.positives) == (20, 9)


def test_rates_equal_a_direct_computation_and_a_wide_interval_holds_them() -> None:
    rng = np.random.default_rng(0)
    n = 4000
    x = rng.normal(-1.5, 1.3, n)
    y, p = (rng.random(n) < expit(x)).astype(np.int8), expit(x)
    flags = (p >= 0.3).astype(np.int8)
    found = measure(y, p, flags, rng.integers(0, 900, n))
    confidence = np.abs(logit(p) - logit(found.cutoff))
    assert found.cutoff == pytest.approx(0.3, abs=1e-3)
    for coverage in (0.5, 0.75, 0.9):
        order = np.argsort(-confidence)[: round(coverage * n)]
        cells = metrics.confusion(y[order], flags[order] == 1)
        at = int(np.argmin(np.abs(GRID - coverage)))
        assert found.curves["sensitivity"].value[at] == pytest.approx(cells.sensitivity)
        assert found.curves["specificity"].value[at] == pytest.approx(cells.specificity)
        assert (
            found.curves["error_rate"].low[at] < np.mean(y[order] != flags[order]) < found.curves["error_rate"].high[at]
        )
    assert found.kept["auroc"] == pytest.approx(metrics.auroc(y[order], p[order]), abs=1e-12)
    assert found.changes["error_rate"].high < 0
    assert found.errors_handed_over.low > 0.1


def test_equal_confidence_hands_over_a_random_tenth() -> None:
    y, flags = np.tile([1, 0, 1, 0], 50), np.tile([1, 1, 0, 0], 50)
    p = np.where(flags == 1, 0.8, 0.2)
    found = measure(y, p, flags)
    for name in ("error_rate", "sensitivity", "specificity"):
        assert found.changes[name].value == pytest.approx(0, abs=1e-12)
    assert found.errors_handed_over.value == pytest.approx(0.1)


def test_confidence_is_the_distance_to_a_known_cutoff() -> None:
    """The image of 0.5, a false alarm, is at the cutoff. Between 0.4 and 0.5, both images are equally uncertain."""
    p = np.array([0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.4, 0.5, 0.97, 0.98])[:, None]
    y, flags = (p > 0.9).astype(np.int8), (p >= 0.5).astype(np.int8)
    for cutoff, handed_over in ((0.5, 1), (np.nan, 0.5)):
        known = {"cutoffs": np.array([cutoff]), "n_resamples": 20, "seed": 0}
        (found,) = measure_selection(y, p, flags, np.arange(10), **known)
        assert isinstance(found, Selection)
        assert found.errors_handed_over.value == pytest.approx(handed_over)


def test_undefined_curves_have_reasons() -> None:
    y, p = np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.3, 0.7])
    for flags, reason in (
        ([0, 0, 0, 0], "no image is flagged"),
        ([1, 1, 1, 1], "every image is flagged"),
        ([-1, -1, -1, -1], "no image has"),
        ([1, 0, 0, 1], "do not follow"),
    ):
        found = measure(y, p, np.array(flags))
        assert isinstance(found, str)
        assert reason in found
    perfect = measure(y, p, np.array([0, 1, 0, 1]))
    assert perfect.best_possible is None
    assert perfect.to_json()["errors_handed_over"] is None


def test_share_of_errors_in_the_tenth_of_largest_spread() -> None:
    labels = np.array([[1], [0]] * 10)
    flags = labels.copy()
    flags[[0, 1, 2, 3]] = 1 - flags[[0, 1, 2, 3]]  # four errors
    calibrated = np.where(flags == 1, 0.8, 0.2)
    spread = np.full((20, 1), 0.1)
    spread[0] = 0.9  # one of two images that are handed over; the other is any of the rest
    patients = np.arange(20).astype(object)
    (found,) = measure_selection(labels, calibrated, flags, patients, spread=spread, n_resamples=50, seed=0)
    assert isinstance(found, Selection)
    assert found.errors_by_spread is not None
    assert found.errors_by_spread.value == pytest.approx((1 + 3 / 19) / 4)
    (without,) = measure_selection(labels, calibrated, flags, patients, n_resamples=50, seed=0)
    assert isinstance(without, Selection)
    assert without.errors_by_spread is None
    assert "errors_by_spread" not in without.to_json()
