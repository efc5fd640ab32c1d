"""Calibration measures equal scikit-learn, a direct computation, and values by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from ray_cxr.evaluation.calibration_measures import fit_line, measure_calibration


def simulate(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(-1.5, 1.2, n)
    return rng.random(n) < expit(0.4 + 0.7 * x), expit(x), rng.integers(0, n // 3, n)


def test_intercept_and_slope_equal_sklearn_and_the_sandwich() -> None:
    y, p, codes = simulate()
    intercept, slope = fit_line(y, p, codes)
    fitted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit(p)[:, None], y)
    assert slope.value == pytest.approx(float(fitted.coef_[0, 0]), abs=1e-5)
    # The intercept makes the sum of probabilities equal to the number of positives.
    assert expit(logit(p) + intercept.value).sum() == pytest.approx(y.sum(), abs=1e-8)
    # Clustered sandwich of both coefficients, one patient at a time.
    z = np.column_stack([np.ones_like(p), logit(p)])
    q = expit(fitted.intercept_ + z[:, 1] * slope.value)
    bread = np.linalg.inv(sum(v * (1 - v) * np.outer(row, row) for v, row in zip(q, z, strict=True)))
    known = np.unique(codes)
    sums = [(z[codes == patient] * (y - q)[codes == patient][:, None]).sum(axis=0) for patient in known]
    meat = sum(np.outer(total, total) for total in sums) * len(known) / (len(known) - 1)
    error = np.sqrt(max(bread[1, 1], (bread @ meat @ bread)[1, 1]))
    assert (slope.low, slope.high) == pytest.approx((slope.value - 1.96 * error, slope.value + 1.96 * error), abs=1e-4)


def test_repeated_images_of_a_patient_widen_the_intervals() -> None:
    y, p, _ = simulate()
    owners = np.arange(3600), np.arange(3600) % 400
    alone, together = (fit_line(np.tile(y, 9), np.tile(p, 9), codes) for codes in owners)
    single = fit_line(y, p, np.arange(400))
    for few, nine, one in zip(alone, together, single, strict=True):
        assert nine.high - nine.low == pytest.approx(one.high - one.low, rel=0.1)
        assert few.high - few.low == pytest.approx((one.high - one.low) / 3, rel=0.1)


def test_undefined_measures_have_reasons() -> None:
    codes = np.arange(20)
    for labels, p, reasons in (
        ([0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4], ("no positive images", "no positive images")),
        ([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4], (None, "separate")),
        ([0, 1, 0, 1], [0.2, 0.2, 0.2, 0.2], (None, "equal")),
    ):
        labels, p = 5 * labels, 5 * p
        for found, reason in zip(fit_line(np.array(labels) == 1, np.array(p), codes), reasons, strict=True):
            assert (found.value is None) == (reason is not None)
            assert reason is None or reason in found.reason
    assert fit_line(np.array(10 * [0, 1]) == 1, np.full(20, 0.2), codes)[0].value == pytest.approx(np.log(4))


def test_few_patients_have_no_interval() -> None:
    y, p, _ = simulate()
    for patients, is_enough in ((1, False), (19, False), (20, True)):
        for found in fit_line(y, p, np.arange(y.size) % patients):
            assert found.value is not None
            assert (found.low is not None, found.high is not None, found.reason is None) == (is_enough,) * 3
            assert is_enough or "patients" in found.reason


def test_index_equals_local_lines_through_every_image() -> None:
    y, p, codes = simulate(80, seed=3)
    (found,) = measure_calibration(y[:, None].astype(np.int8), p[:, None], codes, seed=0)
    errors = []
    for at in p:
        width = np.sort(np.abs(p - at))[59]  # three quarters of the images
        weight = np.clip(1 - (np.abs(p - at) / width) ** 3, 0, None) ** 3
        _, height = np.polyfit(p - at, y, 1, w=np.sqrt(weight))
        errors.append(abs(at - np.clip(height, 0, 1)))
    assert found.ici == pytest.approx(np.mean(errors), abs=1e-9)
    assert (found.e50, found.e90) == (pytest.approx(np.median(errors)), pytest.approx(np.quantile(errors, 0.9)))


def test_index_of_calibrated_and_of_shifted_probabilities() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(1, 6, 30_000)
    y = (rng.random(p.size) < p).astype(np.int8)
    labels, calibrated = np.column_stack([y, y, -np.ones_like(y)]), np.column_stack([p, np.clip(p + 0.1, 0, 1), p])
    good, shifted, none = measure_calibration(labels, calibrated, np.arange(p.size), seed=0)
    assert none is None
    assert good.ici < 2 * good.ici_if_calibrated < 0.01
    assert shifted.ici == pytest.approx(0.1, abs=0.005)
    assert good.slope.low < 1 < good.slope.high
    assert good.intercept.low < 0 < good.intercept.high
    assert shifted.intercept.high < 0
