"""Clustered intervals against DeLong's variance, a plain double loop, a jackknife and published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.clustered import (
    auroc_influence,
    auroc_interval,
    clustered_auroc,
    clustered_share_interval,
    logit_interval,
    mean_interval,
)
from ray_cxr.evaluation.delong import delong
from ray_cxr.evaluation.intervals import wilson_interval


def simulate_images(patients: int, per_patient: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, scores that are correlated within patients, and patients; most patients have both labels."""
    rng = np.random.default_rng(seed)
    codes = rng.permutation(np.repeat(np.arange(patients), per_patient))
    y = rng.random(len(codes)) < (0.6 * rng.random(patients))[codes]
    return y, 1.5 * y + rng.normal(size=patients)[codes] + rng.normal(size=len(codes)), codes


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=4, max_size=40))
def test_a_patient_per_image_is_delong(rows: list[tuple[int, int]]) -> None:
    y, s = (np.array(column) for column in zip(*rows, strict=True))
    assume(2 <= y.sum() <= len(y) - 2)
    assert clustered_auroc(y, s, np.arange(len(y))) == pytest.approx(delong(y, s), abs=1e-12)


def test_clustered_auroc_equals_obuchowski_by_loops() -> None:
    y, s, codes = simulate_images(12, 4, seed=0)
    x, z = s[y], s[~y]
    m, n = len(x), len(z)
    theta = sum((a > b) + 0.5 * (a == b) for a in x for b in z) / (m * n)
    s10 = s01 = s11 = 0.0
    for patient in range(12):
        xs, zs = s[y & (codes == patient)], s[~y & (codes == patient)]
        first = sum(np.mean([(a > b) + 0.5 * (a == b) for b in z]) - theta for a in xs)
        second = sum(np.mean([(a > b) + 0.5 * (a == b) for a in x]) - theta for b in zs)
        s10, s01, s11 = s10 + first**2, s01 + second**2, s11 + first * second
    k10, k01, k = len(set(codes[y])), len(set(codes[~y])), 12
    s10, s01, s11 = s10 * k10 / (k10 - 1) / m, s01 * k01 / (k01 - 1) / n, s11 * k / (k - 1)
    assert clustered_auroc(y, s, codes) == pytest.approx((theta, s10 / m + s01 / n + 2 * s11 / (m * n)), abs=1e-12)


def test_clustered_auroc_agrees_with_a_jackknife_over_patients() -> None:
    y, s, codes = simulate_images(300, 3, seed=1)
    left_out = np.array([metrics.auroc(y[codes != k], s[codes != k]) for k in range(300)])
    jackknife = 299 / 300 * ((left_out - left_out.mean()) ** 2).sum()
    _, variance = clustered_auroc(y, s, codes)
    assert variance == pytest.approx(jackknife, rel=0.03)
    assert variance > 1.2 * delong(y, s)[1]  # images of one patient add less than new patients


def test_clustered_auroc_needs_two_patients_of_each_class() -> None:
    for y, codes in (([1, 1, 0, 0], [0, 0, 1, 2]), ([1, 1, 0, 0], [0, 1, 2, 2]), ([1, 0, 0, 0], [0, 1, 2, 3])):
        assert clustered_auroc(np.array(y), np.arange(4.0), np.array(codes)) is None


def test_logit_interval() -> None:
    # logit(.9) = log 9; standard error .03 / (.9 * .1) = 1/3 on that scale.
    reach = 1.959963984540054 / 3
    expected = 1 / (1 + math.exp(reach) / 9), 1 / (1 + math.exp(-reach) / 9)
    assert logit_interval(0.9, 0.0009) == pytest.approx(expected, abs=1e-12)
    assert logit_interval(0.1, 0.0009) == pytest.approx((1 - expected[1], 1 - expected[0]), abs=1e-12)
    assert logit_interval(0.001, 0.2) == pytest.approx((0.0, 1.0))  # extreme logits do not overflow
    for value, variance in ((1.0, 0.1), (0.0, 0.1), (0.5, 0.0)):
        assert logit_interval(value, variance) is None


def test_share_interval_is_wilson_for_the_effective_number_of_images() -> None:
    all_12 = np.ones(12, dtype=bool)
    assert clustered_share_interval(all_12, np.arange(12)) == pytest.approx((0.7575, 1.0), abs=5e-5)
    assert clustered_share_interval(~all_12, np.arange(12)) == pytest.approx((0.0, 0.2425), abs=5e-5)
    seven = np.arange(20) < 7
    assert clustered_share_interval(seven, np.arange(20)) == pytest.approx(wilson_interval(0.35, 20), abs=1e-12)
    # Three images per patient with one result each are worth one image; twelve images of six patients at 100% are six.
    thrice = clustered_share_interval(np.repeat(seven, 3), np.repeat(np.arange(20), 3))
    assert thrice == pytest.approx(wilson_interval(0.35, 20), abs=1e-12)
    assert clustered_share_interval(all_12, np.arange(12) // 2) == pytest.approx(wilson_interval(1.0, 6), abs=1e-12)
    # At 100%, a patient with nine of ten images counts little more than one: 10^2 / (9^2 + 1).
    uneven = clustered_share_interval(all_12[:10], np.arange(10) // 9)
    assert uneven == pytest.approx(wilson_interval(1.0, 100 / 82), abs=1e-12)


def test_share_interval_of_few_patients_includes_the_largest_design_effect() -> None:
    """Four patients with ten images: 9, 8, 9, 6 hits. Their variance alone would give 67 effective images, above 40."""
    hits = np.concatenate([np.arange(10) < count for count in (9, 8, 9, 6)])
    sample, largest = (1 + 0 + 1 + 4) / 40**2, 0.8 * 0.2 / 4
    independent = 0.8 * 0.2 / ((4 * sample + 2 * largest) / 6)
    assert independent == pytest.approx(10.1, abs=0.1)
    found = clustered_share_interval(hits, np.repeat(np.arange(4), 10))
    assert found == pytest.approx(wilson_interval(0.8, independent), abs=1e-12)


def test_auroc_interval_is_wilson_for_a_limited_number_of_images() -> None:
    # All of m positives above n negatives: Hanley & McNeil's variance / (AUROC (1 - AUROC)) is (1 + (n - 1) / 2) / mn.
    y, s = np.arange(1005) >= 1000, np.arange(1005.0)
    independent = 5 * 1000 / (1 + 999 / 2) * 1.05
    assert auroc_interval(y, s, np.arange(1005)) == pytest.approx(wilson_interval(1.0, independent), abs=1e-12)
    assert auroc_interval(y, s, np.arange(1005))[0] == pytest.approx(0.7319, abs=5e-5)
    assert auroc_interval(~y, -s, np.arange(1005)) == auroc_interval(y, s, np.arange(1005))  # classes are symmetric
    mirrored = auroc_interval(y, -s, np.arange(1005))
    assert mirrored == pytest.approx((0.0, 1 - 0.7319), abs=5e-5)
    # Five images of one patient count as one patient.
    one = auroc_interval(y, s, np.r_[np.arange(1000), [1000] * 5])
    assert one == pytest.approx(wilson_interval(1.0, 1000 / (1 + 999 / 2) * 1.01), abs=1e-12)
    # With many patients it is Wilson's for the sample's own variance.
    y, s, codes = simulate_images(1500, 3, seed=2)
    auroc, variance = clustered_auroc(y, s, codes)
    assert auroc_interval(y, s, codes) == wilson_interval(auroc, auroc * (1 - auroc) / variance)
    assert auroc_interval(np.ones(3), np.arange(3.0), np.arange(3)) is None


def test_mean_interval_combines_intervals_by_their_correlation() -> None:
    values, limits = np.array([0.8, 0.6]), np.array([[0.7, 0.85], [0.56, 0.68]])
    independent = mean_interval(values, limits, np.eye(2), np.ones(2))
    expected = 0.7 - math.hypot(0.1, 0.04) / 2, 0.7 + math.hypot(0.05, 0.08) / 2
    assert independent == pytest.approx(expected, abs=1e-12)
    equal = mean_interval(values, limits, np.ones((2, 3)), np.array([1.0, 3.0]))
    assert equal == pytest.approx((0.65 - (0.1 + 3 * 0.04) / 4, 0.65 + (0.05 + 3 * 0.08) / 4), abs=1e-12)
    # Patients' influence has the correlation and the variance of the AUROCs.
    y, s, codes = simulate_images(400, 3, seed=3)
    influence = auroc_influence(y, s, codes, 400)
    assert (influence**2).sum() == pytest.approx(clustered_auroc(y, s, codes)[1], rel=0.01)
    low, high = auroc_interval(y, s, codes)
    both = np.array([metrics.auroc(y, s)] * 2), np.array([[low, high]] * 2)
    assert mean_interval(*both, np.array([influence] * 2), np.ones(2)) == pytest.approx((low, high), abs=1e-12)


def test_mean_interval_of_unknown_correlations_is_as_wide_as_that_of_equal_findings() -> None:
    values, limits = np.array([0.8, 0.6]), np.array([[0.7, 0.85], [0.56, 0.68]])
    equal = 0.7 - (0.1 + 0.04) / 2, 0.7 + (0.05 + 0.08) / 2
    assert mean_interval(values, limits, np.zeros((2, 3)), np.ones(2)) == pytest.approx(equal, abs=1e-12)
    assert mean_interval(values, limits, np.eye(2, 3) * [[1], [0]], np.ones(2)) == pytest.approx(equal, abs=1e-12)
    assert mean_interval(values, limits, np.ones((2, 1)), np.ones(2)) is None  # one patient
    # Opposite influence, which two patients always have, does not make a mean certain.
    opposite = mean_interval(values, limits, np.array([[1.0, -1.0], [-1.0, 1.0]]), np.ones(2))
    assert opposite[0] < 0.7 - math.hypot(0.1, 0.04) / 2 + 1e-12


def test_findings_without_deviations_are_correlated_by_their_patients() -> None:
    """At AUROC 1, and with one patient of a class, no image shows a patient's influence."""
    codes = np.arange(40)
    one, two = np.arange(40) < 4, np.arange(40) >= 36

    def influence(y: np.ndarray) -> np.ndarray:
        return auroc_influence(y.astype(int), y.astype(float), codes, 40)

    np.testing.assert_allclose(influence(one), np.where(one, 1 / 4, 1 / 36))
    values, limits = np.ones(2), np.array([[0.6, 1.0]] * 2)
    same = mean_interval(values, limits, np.array([influence(one)] * 2), np.ones(2))
    other = mean_interval(values, limits, np.array([influence(one), influence(two)]), np.ones(2))
    assert same == pytest.approx((0.6, 1.0))
    # Correlation: the negative patients they share, (2 * 4 / 4 / 36 + 32 / 36^2) / (4 / 4^2 + 36 / 36^2).
    correlation = (2 / 36 + 32 / 1296) / (1 / 4 + 1 / 36)
    assert other == pytest.approx((1 - 0.4 * math.sqrt((1 + correlation) / 2), 1.0))
    s = np.array([0.1, 0.5, 0.3, 0.7])
    np.testing.assert_allclose(auroc_influence(np.array([0, 0, 1, 1]), s, np.array([0, 1, 2, 2]), 3), [0.5, 0.5, 1.0])


def test_interval_of_a_mean_contains_the_mean() -> None:
    values, limits = np.ones(13), np.column_stack([np.full(13, 0.9), np.ones(13)])
    for weights in (np.ones(13), np.arange(1.0, 14.0) / 7.0):
        assert mean_interval(values, limits, np.zeros((13, 2)), weights)[1] >= np.average(values, weights=weights)
