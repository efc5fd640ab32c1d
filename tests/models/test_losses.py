"""The losses, each against a plain formula in float64, and at the places where such formulas break."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr.config import TrainSettings
from ray_cxr.models.losses import finding_weights, make_loss

POSITIVE, NEGATIVE = np.float32([0.9, 0.5, 0.2]), np.float32([0.1, 0.5, 0.8])
ONES = np.ones(3, np.float32)

#: Every kind, with parameters whole and broken, with a margin that is large, small and none, smoothed and not.
CASES: list[dict[str, Any]] = [
    {"loss": "bce"},
    {"loss": "bce", "label_smoothing": 0.1},
    {"loss": "weighted_bce"},
    {"loss": "weighted_bce", "label_smoothing": 0.1},
    {"loss": "focal"},
    {"loss": "focal", "focal_gamma": 0.5},
    {"loss": "focal", "focal_gamma": 10.0, "label_smoothing": 0.2},
    {"loss": "asymmetric"},
    {"loss": "asymmetric", "asymmetric_gamma_positive": 1.0, "label_smoothing": 0.1},
    {"loss": "asymmetric", "asymmetric_gamma_positive": 0.3, "asymmetric_gamma_negative": 0.3},
    {"loss": "asymmetric", "asymmetric_gamma_negative": 0.0, "asymmetric_margin": 0.3},
    {"loss": "asymmetric", "asymmetric_margin": 0.0},
    {"loss": "asymmetric", "asymmetric_margin": 1e-6},
    {"loss": "asymmetric", "asymmetric_margin": 1e-300},
    {"loss": "asymmetric", "asymmetric_margin": 0.999},
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()))


def weights_of(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    return (POSITIVE, NEGATIVE) if case["loss"] == "weighted_bce" else (ONES, ONES)


def plain(case: dict[str, Any], y: np.ndarray, z: np.ndarray, weight: np.ndarray, denominator: float) -> float:
    """The same number in float64 NumPy, written as the papers write it; needs p neither 0 nor 1."""
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


def value_and_gradient(
    case: dict[str, Any], y: np.ndarray, z: np.ndarray, weight: np.ndarray, denominator: float, **compiled: bool
) -> tuple[np.ndarray, np.ndarray]:
    loss = make_loss(TrainSettings(**case), *weights_of(case))

    def run(labels: Any, logits: Any, mask: Any, total: Any) -> tuple[Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(logits)
            value = loss(labels, logits, mask, total)
        return value, tape.gradient(value, logits)

    if compiled:
        run = tf.function(run, **compiled)
    value, gradient = run(tf.constant(y), tf.constant(z), tf.constant(weight), tf.constant(denominator, tf.float32))
    assert value.dtype == tf.float32
    assert value.shape == ()
    return value.numpy(), gradient.numpy()


def batch(seed: int, rows: int = 6, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, (rows, 3)).astype(np.float32)
    z = rng.normal(0, spread, (rows, 3)).astype(np.float32)
    weight = (rng.random((rows, 3)) < 0.7).astype(np.float32)
    return y, z, weight, max(float(weight.sum()), 1.0)


def test_weights_balance_the_two_sides_of_a_finding() -> None:
    values = np.array([[1, 1], [0, 1], [0, -1], [0, 0]], dtype=np.int8)
    positive, negative = finding_weights(values, "weighted_bce")
    assert positive.dtype == negative.dtype == np.float32
    np.testing.assert_allclose(positive, [0.75, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(negative, [0.25, 2 / 3], rtol=1e-6)
    for j in range(2):
        assert positive[j] * (values[:, j] == 1).sum() == pytest.approx(negative[j] * (values[:, j] == 0).sum())


@pytest.mark.parametrize("kind", ["bce", "focal", "asymmetric"])
def test_only_weighted_bce_has_weights(kind: str) -> None:
    values = np.array([[1, 1], [0, 1], [0, -1], [0, 0]], dtype=np.int8)
    for side in finding_weights(values, kind):
        assert side.dtype == np.float32
        assert side.tolist() == [1.0, 1.0]


def test_a_finding_without_any_label_has_finite_weights() -> None:
    positive, negative = finding_weights(np.array([[-1, 1], [-1, 0]], dtype=np.int8), "weighted_bce")
    assert positive.tolist() == [1.0, 0.5]
    assert negative.tolist() == [0.0, 0.5]


@each_case
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), spread=st.sampled_from([0.1, 1.0, 4.0]))
def test_value_is_that_of_the_plain_formula(case: dict[str, Any], seed: int, spread: float) -> None:
    y, z, weight, denominator = batch(seed, spread=spread)
    ours, _ = value_and_gradient(case, y, z, weight, denominator)
    assert ours == pytest.approx(plain(case, y, z, weight, denominator), rel=2e-5, abs=1e-12)


@each_case
def test_gradient_is_the_slope_of_the_plain_formula(case: dict[str, Any]) -> None:
    y, z, weight, denominator = batch(1)
    weight[0] = 1.0
    _, gradient = value_and_gradient(case, y, z, weight, denominator)
    step = 1e-5
    for place in np.ndindex(z.shape):
        up, down = z.astype(np.float64), z.astype(np.float64)
        up[place] += step
        down[place] -= step
        slope = (plain(case, y, up, weight, denominator) - plain(case, y, down, weight, denominator)) / (2 * step)
        assert gradient[place] == pytest.approx(slope, rel=1e-4, abs=1e-9), place


def test_known_numbers() -> None:
    """One entry each, worked with a pocket calculator: p = 0.8, so log p = -0.223144 and log(1 - p) = -1.609438."""
    z = np.float32([[np.log(4.0)]])
    there, absent, one = np.float32([[1]]), np.float32([[0]]), np.float32([[1]])
    unit = np.ones(1, np.float32)

    def value(y: np.ndarray, positive: np.ndarray = unit, negative: np.ndarray = unit, **case: Any) -> float:
        return float(make_loss(TrainSettings(**case), positive, negative)(y, z, one, 1.0))

    assert value(there, loss="bce") == pytest.approx(0.223144, rel=1e-5)
    assert value(absent, loss="bce") == pytest.approx(1.609438, rel=1e-5)
    assert value(there, loss="bce", label_smoothing=0.1) == pytest.approx(0.9 * 0.223144 + 0.1 * 1.609438, rel=1e-5)
    assert value(absent, loss="bce", label_smoothing=0.1) == pytest.approx(0.1 * 0.223144 + 0.9 * 1.609438, rel=1e-5)
    sides = {"positive": np.float32([0.75]), "negative": np.float32([0.25]), "loss": "weighted_bce"}
    assert value(there, **sides) == pytest.approx(0.75 * 0.223144, rel=1e-5)
    soft = 0.9 * 0.75 * 0.223144 + 0.1 * 0.25 * 1.609438
    assert value(there, **sides, label_smoothing=0.1) == pytest.approx(soft, rel=1e-5)
    assert value(there, loss="focal") == pytest.approx(0.2**2 * 0.223144, rel=1e-5)
    assert value(absent, loss="focal") == pytest.approx(0.8**2 * 1.609438, rel=1e-5)
    # The shifted probability is 0.75, and -log 0.25 is 1.386294.
    assert value(absent, loss="asymmetric") == pytest.approx(0.75**4 * 1.386294, rel=1e-5)
    assert value(there, loss="asymmetric", asymmetric_gamma_positive=1.0) == pytest.approx(0.2 * 0.223144, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "degenerate",
    [
        {"loss": "focal", "focal_gamma": 0.0},
        {
            "loss": "asymmetric",
            "asymmetric_gamma_positive": 0.0,
            "asymmetric_gamma_negative": 0.0,
            "asymmetric_margin": 0.0,
        },
    ],
    ids=lambda case: case["loss"],
)
def test_without_focus_and_margin_it_is_bce_to_the_bit(degenerate: dict[str, Any], smoothing: float) -> None:
    y, z, weight, denominator = batch(2, rows=64, spread=20.0)
    ours = value_and_gradient({**degenerate, "label_smoothing": smoothing}, y, z, weight, denominator)
    bce = value_and_gradient({"loss": "bce", "label_smoothing": smoothing}, y, z, weight, denominator)
    np.testing.assert_array_equal(ours[0], bce[0])
    np.testing.assert_array_equal(ours[1], bce[1])


def test_asymmetric_with_equal_gammas_and_no_margin_is_focal() -> None:
    y, z, weight, denominator = batch(3)
    same = {"asymmetric_gamma_positive": 2.0, "asymmetric_gamma_negative": 2.0, "asymmetric_margin": 0.0}
    ours = value_and_gradient({"loss": "asymmetric", **same}, y, z, weight, denominator)
    focal = value_and_gradient({"loss": "focal", "focal_gamma": 2.0}, y, z, weight, denominator)
    np.testing.assert_array_equal(ours[0], focal[0])
    np.testing.assert_array_equal(ours[1], focal[1])


def test_bce_is_tensorflows() -> None:
    y, z, weight, denominator = batch(4, rows=64, spread=10.0)
    ours, _ = value_and_gradient({"loss": "bce"}, y, z, weight, denominator)
    theirs = tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(y, z) * weight) / denominator
    assert ours == pytest.approx(float(theirs), rel=1e-6)


EXTREME = np.float32([1e4, 1e3, 200, 104, 89, 88, 50, 17, 16, 3, 1, 1e-3, 1e-20, 1e-45, 0])


@each_case
def test_extreme_logits_have_finite_loss_and_gradient(case: dict[str, Any]) -> None:
    z = np.repeat(np.tile(np.concatenate([EXTREME, -EXTREME]), 2)[:, None], 3, axis=1)
    y = np.repeat(np.repeat(np.float32([0, 1]), len(z) // 2)[:, None], 3, axis=1)
    value, gradient = value_and_gradient(case, y, z, np.ones_like(z), 1.0)
    assert np.isfinite(value)
    assert value >= 0.0
    assert np.isfinite(gradient).all(), z[~np.isfinite(gradient)]


@pytest.mark.parametrize("case", [{"loss": "bce"}, {"loss": "focal"}, {"loss": "asymmetric", "asymmetric_margin": 0}])
def test_a_confident_mistake_costs_its_logit_and_keeps_its_gradient(case: dict[str, Any]) -> None:
    """A loss that clips probabilities goes flat here: the worst mistakes would teach nothing."""
    one = np.ones((1, 3), np.float32)
    for label, z in ((1.0, -1e4), (0.0, 1e4)):
        value, gradient = value_and_gradient(case, one * np.float32(label), one * np.float32(z), one, 3.0)
        assert value == pytest.approx(1e4)
        np.testing.assert_allclose(gradient, np.sign(z) / 3, rtol=1e-6)


def test_asymmetric_ignores_negatives_below_the_margin() -> None:
    """And only those: p = 0.0474 is below 0.05, p = 0.0522 is not."""
    y, weight = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    z = np.float32([[-3.0] * 3, [-2.9] * 3])
    _, gradient = value_and_gradient({"loss": "asymmetric", "asymmetric_gamma_negative": 0.0}, y, z, weight, 1.0)
    assert (gradient[0] == 0.0).all()
    assert (gradient[1] > 0.0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0, 4.0])
def test_asymmetric_is_finite_on_the_margin_itself(gamma: float) -> None:
    """Where the shifted probability leaves 0 a power below 1 has an infinite slope, and infinity times 0 is NaN."""
    margin = 0.05
    z = np.float32(np.log(margin / (1 - margin)))
    near = np.concatenate([np.arange(-300, 300) * np.spacing(np.abs(z)) + z]).astype(np.float32)
    z3, zeros = np.repeat(near[:, None], 3, axis=1), np.zeros((600, 3), np.float32)
    case = {"loss": "asymmetric", "asymmetric_gamma_negative": gamma, "asymmetric_margin": margin}
    value, gradient = value_and_gradient(case, zeros, z3, zeros + 1, 1.0)
    assert np.isfinite(value)
    # The steepest it may be is the slope of p itself, p (1 - p).
    assert np.abs(gradient).max() <= margin * (1 - margin) * 1.001


@each_case
@pytest.mark.parametrize("hidden", [np.nan, np.inf, -np.inf, -1.0, 1e38])
def test_masked_entries_reach_neither_value_nor_gradient(case: dict[str, Any], hidden: float) -> None:
    y, z, weight, denominator = batch(5)
    clean = value_and_gradient(case, y, z, weight, denominator)
    assert 0 < weight.sum() < weight.size
    dirty_y, dirty_z = np.where(weight, y, np.float32(hidden)), np.where(weight, z, np.float32(hidden))
    dirty = value_and_gradient(case, dirty_y, dirty_z, weight, denominator)
    np.testing.assert_array_equal(dirty[0], clean[0])
    np.testing.assert_array_equal(dirty[1], clean[1])
    assert (dirty[1][weight == 0] == 0.0).all()


def test_a_logit_that_is_not_a_number_is_not_hidden_where_it_counts() -> None:
    y, z, weight, denominator = batch(5)
    z[tuple(np.argwhere(weight)[0])] = np.nan
    for case in CASES:
        assert np.isnan(value_and_gradient(case, y, z, weight, denominator)[0]), case


@each_case
def test_a_finding_without_any_label_adds_nothing(case: dict[str, Any]) -> None:
    y, z, weight, _ = batch(6)
    weight[:, 1] = 0.0
    y[:, 1] = np.nan
    denominator = float(weight.sum())
    value, gradient = value_and_gradient(case, y, z, weight, denominator)
    others = np.array(weight, bool)
    assert value == pytest.approx(plain(case, np.where(others, y, 0), z, weight, denominator), rel=2e-5)
    assert (gradient[:, 1] == 0.0).all()
    empty, nothing = value_and_gradient(case, y * np.nan, z, weight * 0.0, 1.0)
    assert empty == 0.0
    assert (nothing == 0.0).all()


@each_case
def test_shares_of_a_batch_add_up_to_the_whole(case: dict[str, Any]) -> None:
    y, z, weight, denominator = batch(7, rows=8)
    value, gradient = value_and_gradient(case, y, z, weight, denominator)
    halves = [value_and_gradient(case, y[part], z[part], weight[part], denominator) for part in (slice(4), slice(4, 8))]
    assert weight[:4].sum() != weight[4:].sum(), "equal shares would hide a denominator of their own"
    assert halves[0][0] + halves[1][0] == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(np.concatenate([half[1] for half in halves]), gradient, rtol=1e-5, atol=1e-8)


@each_case
def test_graphs_and_xla_give_what_eager_gives(case: dict[str, Any]) -> None:
    y, z, weight, denominator = batch(8)
    y[weight == 0] = np.nan
    z[0], weight[0] = np.float32([1e4, -1e4, 0.0]), 1.0
    y[0] = np.float32([1, 0, 1])
    eager = value_and_gradient(case, y, z, weight, denominator)
    for jit in (False, True):
        graph = value_and_gradient(case, y, z, weight, denominator, jit_compile=jit)
        np.testing.assert_allclose(graph[0], eager[0], rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(graph[1], eager[1], rtol=1e-4, atol=1e-8)


def test_half_precision_logits_are_lossless_inside() -> None:
    """The sum over a large batch would stand still in bfloat16: 256 + 1 is 256 there."""
    y, z, weight = np.zeros((2000, 3), np.float32), np.zeros((2000, 3), np.float32), np.ones((2000, 3), np.float32)
    loss = make_loss(TrainSettings(loss="bce"), ONES, ONES)
    value = loss(y, tf.cast(z, tf.bfloat16), weight, 6000.0)
    assert value.dtype == tf.float32
    assert float(value) == pytest.approx(np.log(2), rel=1e-5)
