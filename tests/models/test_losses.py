"""Losses against plain formulas in float64, and at values where these formulas break."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from ray_cxr.config import TrainSettings
from ray_cxr.models.losses import compute_finding_weights, make_loss

POSITIVE, NEGATIVE = np.float32([0.9, 0.5, 0.2]), np.float32([0.1, 0.5, 0.8])
ONES = np.ones(3, np.float32)

#: Every loss: integer and fractional exponents, margins from 0 to 0.999, with and without label smoothing.
CASES: list[dict[str, Any]] = [
    {"loss": "bce"},
    {"loss": "weighted_bce", "label_smoothing": 0.1},
    {"loss": "focal", "focal_gamma": 0.0},
    {"loss": "focal", "focal_gamma": 0.5},
    {"loss": "focal", "focal_gamma": 10.0, "label_smoothing": 0.2},
    {"loss": "asymmetric"},
    {"loss": "asymmetric", "asymmetric_gamma_positive": 1.0, "label_smoothing": 0.1},
    {"loss": "asymmetric", "asymmetric_gamma_positive": 0.3, "asymmetric_gamma_negative": 0.3},
    {"loss": "asymmetric", "asymmetric_gamma_negative": 0.0, "asymmetric_margin": 0.3},
    {"loss": "asymmetric", "asymmetric_gamma_positive": 0.0, "asymmetric_gamma_negative": 0.0},
    {"loss": "asymmetric", "asymmetric_margin": 0.0},
    {"loss": "asymmetric", "asymmetric_margin": 1e-300},
    {"loss": "asymmetric", "asymmetric_margin": 0.999},
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()))


def weights_of(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return (POSITIVE, NEGATIVE) if case["loss"] == "weighted_bce" else (ONES, ONES)


def plain(case: dict[str, Any], y: np.ndarray, z: np.ndarray, weight: np.ndarray, denominator: float) -> float:
    """Return the loss in float64 NumPy as the papers write it; p must be neither 0 nor 1."""
    wanted = TrainSettings(**case)
    positive, negative = (side.astype(np.float64) for side in weights_of(case))
    y, z = y.astype(np.float64), z.astype(np.float64)
    p, not_p = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    if wanted.loss == "focal":
        present, absent = not_p**wanted.focal_gamma * -np.log(p), p**wanted.focal_gamma * -np.log(not_p)
    elif wanted.loss == "asymmetric":
        shifted = np.maximum(p - wanted.asymmetric_margin, 0)
        present = not_p**wanted.asymmetric_gamma_positive * -np.log(p)
        absent = shifted**wanted.asymmetric_gamma_negative * -np.log(np.minimum(not_p + wanted.asymmetric_margin, 1))
    else:
        present, absent = -np.log(p), -np.log(not_p)
    e = wanted.label_smoothing
    soft = np.where(y == 1, 1 - e, e)
    return float(((soft * positive * present + (1 - soft) * negative * absent) * weight).sum() / denominator)


def value_and_gradient(case: dict, y, z, weight, denominator: float, **graph: Any) -> tuple[np.ndarray, np.ndarray]:
    """Run eagerly, or as the `tf.function` of these options."""
    loss = make_loss(TrainSettings(**case), *weights_of(case))

    def run(labels: Any, logits: Any, mask: Any, count: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(logits)
            value = loss(labels, logits, mask, count)
        return value, tape.gradient(value, logits)

    given = (*map(tf.constant, (y, z, weight)), tf.constant(denominator, tf.float32))
    value, gradient = (tf.function(run, **graph) if graph else run)(*given)
    assert (value.dtype, value.shape) == (tf.float32, ())
    return value.numpy(), gradient.numpy()


def batch(seed: int, rows: int = 6, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, (rows, 3)).astype(np.float32)
    z = rng.normal(0, spread, (rows, 3)).astype(np.float32)
    weight = (rng.random((rows, 3)) < 0.7).astype(np.float32)
    return y, z, weight, max(float(weight.sum()), 1.0)


def test_weights_balance_positives_and_negatives_of_a_finding() -> None:
    values = np.array([[1, 1, -1], [0, 1, -1], [0, -1, -1], [0, 0, -1]], dtype=np.int8)
    positive, negative = compute_finding_weights(values, "weighted_bce")
    assert positive.dtype == negative.dtype == np.float32
    np.testing.assert_allclose(positive, [0.75, 1 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose(negative, [0.25, 2 / 3, 0], rtol=1e-6)
    for kind in ("bce", "focal", "asymmetric"):
        np.testing.assert_array_equal(compute_finding_weights(values, kind), np.ones((2, 3)))


def test_balanced_findings_have_the_same_total_weight_and_the_same_sum() -> None:
    """By hand: n * 2p(1-p) is 4, 1.5 and 0, whose sum is 5.5; each of the first two findings gets 2.75."""
    values = np.array([[1, 1, 0]] * 1 + [[1, 0, 0]] * 2 + [[1, 0, -1]] * 1 + [[0, -1, 0]] * 4, dtype=np.int8)
    positive, negative = compute_finding_weights(values, "weighted_bce", "findings")
    assert positive.dtype == negative.dtype == np.float32
    np.testing.assert_allclose(positive[:2], [0.5 * 2.75 / 4, 0.75 * 2.75 / 1.5], rtol=1e-6)
    np.testing.assert_allclose(negative[:2], [0.5 * 2.75 / 4, 0.25 * 2.75 / 1.5], rtol=1e-6)
    assert negative[2] == 0.0, "a finding without positives has no weight"
    for kind in ("bce", "focal", "asymmetric"):
        np.testing.assert_array_equal(compute_finding_weights(values, kind, "findings"), np.ones((2, 3)))


def sum_weights(values: np.ndarray, balance: str) -> np.ndarray:
    positive, negative = (x.astype(np.float64) for x in compute_finding_weights(values, "weighted_bce", balance))
    return np.asarray(((values == 1) * positive + (values == 0) * negative).sum(axis=0))


def test_the_weights_of_very_rare_findings_are_limited() -> None:
    values = np.zeros((20_000, 5), dtype=np.int8)
    for j, count in enumerate((1, 2, 40, 4000, 10_000)):
        values[:count, j] = 1
    plain, balanced = (sum_weights(values, balance) for balance in ("none", "findings"))
    np.testing.assert_allclose(balanced[:3], 32 * plain[:3], rtol=1e-5)
    assert balanced[3] == pytest.approx(balanced[4], rel=1e-5)
    assert balanced.sum() == pytest.approx(plain.sum(), rel=1e-5)
    rare = values[:, [2]]
    np.testing.assert_allclose(sum_weights(rare, "findings"), sum_weights(rare, "none"))


@each_case
def test_value_and_gradient_are_those_of_the_plain_formula(case: dict[str, Any]) -> None:
    for seed, spread in ((1, 3.0), (2, 0.1), (3, 1.0), (4, 4.0)):
        y, z, weight, denominator = batch(seed, spread=spread)
        value, gradient = value_and_gradient(case, y, z, weight, denominator)
        assert value == pytest.approx(plain(case, y, z, weight, denominator), rel=2e-5, abs=1e-12)
        for entry in np.ndindex(z.shape):
            step = np.zeros(z.shape)
            step[entry] = 1e-5
            up, down = (plain(case, y, z + side * step, weight, denominator) for side in (1, -1))
            assert gradient[entry] == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-9), (seed, entry)


EXTREME = np.float32([1e4, 1e3, 200, 104, 89, 88, 50, 17, 16, 3, 1, 1e-3, 1e-20, 1e-45, 0])


@each_case
def test_extreme_logits_have_finite_loss_and_gradient(case: dict[str, Any]) -> None:
    z = np.repeat(np.tile(np.concatenate([EXTREME, -EXTREME]), 2)[:, None], 3, axis=1)
    y = np.repeat(np.repeat(np.float32([0, 1]), len(z) // 2)[:, None], 3, axis=1)
    value, gradient = value_and_gradient(case, y, z, np.ones_like(z), 1.0)
    assert 0.0 <= value < np.inf
    assert np.isfinite(gradient).all(), z[~np.isfinite(gradient)]


@pytest.mark.parametrize("case", [{"loss": "bce"}, {"loss": "focal"}, {"loss": "asymmetric", "asymmetric_margin": 0}])
def test_loss_of_a_confident_error_is_its_logit_with_full_gradient(case: dict[str, Any]) -> None:
    """A loss that clips probabilities is flat here, and the worst errors would have no gradient."""
    one = np.ones((1, 3), np.float32)
    for label, z in ((1.0, -1e4), (0.0, 1e4)):
        value, gradient = value_and_gradient(case, one * np.float32(label), one * np.float32(z), one, 3.0)
        assert value == pytest.approx(1e4)
        np.testing.assert_allclose(gradient, np.sign(z) / 3, rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0, 4.0])
def test_asymmetric_is_finite_at_the_margin(gamma: float) -> None:
    """Where the shifted probability leaves 0, a power below 1 has an infinite slope, and infinity times 0 is NaN."""
    margin = 0.05
    z = np.float32(np.log(margin / (1 - margin)))
    near = (np.arange(-300, 300) * np.spacing(np.abs(z)) + z).astype(np.float32)
    z3, zeros = np.repeat(near[:, None], 3, axis=1), np.zeros((600, 3), np.float32)
    case = {"loss": "asymmetric", "asymmetric_gamma_negative": gamma, "asymmetric_margin": margin}
    value, gradient = value_and_gradient(case, zeros, z3, zeros + 1, 1.0)
    assert np.isfinite(value)
    # The steepest possible slope is that of p itself, p (1 - p).
    assert np.abs(gradient).max() <= margin * (1 - margin) * 1.001


@each_case
def test_masked_entries_reach_neither_value_nor_gradient(case: dict[str, Any]) -> None:
    y, z, weight, denominator = batch(5)
    weight[:, 1] = 0.0
    clean = value_and_gradient(case, y, z, weight, denominator)
    for hidden in (np.nan, np.inf, -np.inf, -1.0, 1e38):
        dirty_y, dirty_z = np.where(weight, y, np.float32(hidden)), np.where(weight, z, np.float32(hidden))
        value, gradient = value_and_gradient(case, dirty_y, dirty_z, weight, denominator)
        np.testing.assert_array_equal(value, clean[0])
        np.testing.assert_array_equal(gradient, clean[1])
        assert (gradient[weight == 0] == 0.0).all()
    for nothing in value_and_gradient(case, y * np.nan, z, weight * 0.0, 1.0):
        assert (nothing == 0.0).all()
    # Labelled entries are not masked.
    z[tuple(np.argwhere(weight)[0])] = np.nan
    assert np.isnan(value_and_gradient(case, y, z, weight, denominator)[0])


@each_case
def test_shares_of_a_batch_add_up_to_the_whole(case: dict[str, Any]) -> None:
    y, z, weight, denominator = batch(7, rows=8)
    value, gradient = value_and_gradient(case, y, z, weight, denominator)
    halves = [value_and_gradient(case, y[part], z[part], weight[part], denominator) for part in (slice(4), slice(4, 8))]
    assert weight[:4].sum() != weight[4:].sum(), "equal shares would hide a wrong denominator"
    assert halves[0][0] + halves[1][0] == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(np.concatenate([half[1] for half in halves]), gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(("jit", "cases"), [(False, CASES), (True, CASES[1::3])], ids=["graph", "xla"])
def test_graphs_and_xla_equal_eager(jit: bool, cases: list[dict[str, Any]]) -> None:
    y, z, weight, denominator = batch(8)
    y[weight == 0] = np.nan
    z[0], weight[0] = np.float32([1e4, -1e4, 0.0]), 1.0
    y[0] = np.float32([1, 0, 1])
    for case in cases:
        value, gradient = value_and_gradient(case, y, z, weight, denominator, jit_compile=jit)
        eager = value_and_gradient(case, y, z, weight, denominator)
        np.testing.assert_allclose(value, eager[0], rtol=1e-5, atol=1e-12, err_msg=str(case))
        np.testing.assert_allclose(gradient, eager[1], rtol=1e-4, atol=1e-8, err_msg=str(case))


def test_half_precision_logits_are_summed_in_float32() -> None:
    """In bfloat16 the sum over a large batch would stall: 256 + 1 is 256."""
    y, z = np.zeros((2000, 3), np.float32), tf.zeros((2000, 3), tf.bfloat16)
    value = make_loss(TrainSettings(loss="bce"), ONES, ONES)(y, z, y + 1, 6000.0)
    assert value.dtype == tf.float32
    assert float(value) == pytest.approx(np.log(2), rel=1e-5)
