"""Decision curves equal the definition, and claim no benefit that few images cannot show."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from ray_cxr.evaluation.net_benefit import DecisionCurve, measure_net_benefit


def measure(y: np.ndarray, p: np.ndarray, patients: np.ndarray, n_resamples: int = 60) -> DecisionCurve | str:
    return measure_net_benefit(y[:, None], p[:, None], patients, n_resamples=n_resamples, seed=0)[0]


def test_net_benefit_by_hand() -> None:
    # Prevalence 1/2, so the middle threshold is 1/2, with odds 1; the outermost have the odds 1/8 and 8.
    y, p = np.array([1, 1, 0, 0]), np.array([0.9, 0.4, 0.6, 0.05])
    curve = measure(y, p, np.arange(4))
    assert curve.thresholds[[0, 24, 48]] == pytest.approx([1 / 9, 1 / 2, 8 / 9])
    # 2 hits and a false alarm at 1/9; one of each at 1/2; one hit at 8/9.
    assert curve.model.value[[0, 24, 48]] == pytest.approx([2 / 4 - 1 / 4 / 8, 0, 1 / 4])
    assert curve.treat_all[[0, 24, 48]] == pytest.approx([2 / 4 - 2 / 4 / 8, 0, 2 / 4 - 2 / 4 * 8], abs=1e-12)
    assert curve.gain.value[[0, 24, 48]] == pytest.approx([1 / 4 / 8, 0, 1 / 4])


def test_limits_equal_resampled_images_where_many_are_flagged() -> None:
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 300, 2000)
    p = rng.beta(1, 4, 2000)
    y = (rng.random(2000) < p).astype(np.int8)
    curve = measure(y, p, patients, 50)
    draws = np.random.default_rng(0)
    # Codes number patients by first appearance.
    known = list(dict.fromkeys(patients.tolist()))
    rows = [np.flatnonzero(patients == patient) for patient in known]
    gains = []
    for _ in range(50):
        kept = np.concatenate([rows[i] for i in draws.integers(0, len(known), len(known))])
        flagged, odds = p[kept] >= curve.thresholds[24], curve.thresholds[24] / (1 - curve.thresholds[24])
        benefit = np.mean(flagged * (y[kept] - (1 - y[kept]) * odds))
        gains.append((benefit, benefit - max(0, np.mean(y[kept] - (1 - y[kept]) * odds))))
    low, high = np.percentile(gains, [2.5, 97.5], axis=0)
    assert (curve.model.low[24], curve.model.high[24]) == (pytest.approx(low[0]), pytest.approx(high[0]))
    assert curve.gain.low[24] <= low[1] + 1e-12
    assert curve.gain.high[24] >= high[1] - 1e-12
    ((start, end),) = curve.benefit
    assert start < y.mean() < end


def test_few_images_show_no_benefit() -> None:
    # Of 100 images with 2 positives, 20 have low scores and are all negative, which chance explains: no resample has a
    # positive among them. The exact limit of the share of positives there is that of 0 of 20.
    y, p = np.zeros(100, dtype=np.int8), np.full(100, 0.5)
    y[:2], p[80:] = 1, 0.0
    curve = measure(y, p, np.arange(100))
    upper = binomtest(0, 20).proportion_ci(method="exact").high
    t = curve.thresholds[0]
    assert curve.gain.value[0] > 0
    assert curve.gain.low[0] == pytest.approx(0.2 * (t - upper) / (1 - t))
    assert curve.benefit == ()
    # With every image twice for the same patient, the limit is that of 20 patients.
    twice = measure(np.tile(y, 2), np.tile(p, 2), np.tile(np.arange(100), 2))
    assert twice.gain.low[0] == pytest.approx(curve.gain.low[0])


def test_missing_values_and_classes() -> None:
    labels = np.array([[1, 0, -1], [0, 0, 1], [1, -1, 0], [-1, 0, 1]])
    calibrated = np.array([[0.9, 0.1, 0.2], [0.2, 0.2, np.nan], [np.nan, 0.3, 0.4], [0.5, 0.1, 0.6]])
    first, second, third = measure_net_benefit(labels, calibrated, np.arange(4), n_resamples=50, seed=0)
    assert (first.n, first.positives, third.n) == (2, 1, 2)
    assert second == "no positive images"
    assert first.to_json()["gain"][0] == 0.0, "both images are flagged"
