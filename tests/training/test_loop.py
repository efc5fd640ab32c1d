"""The pieces of the training loop, each against a plain computation."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from ray_cxr.config import TrainSettings
from ray_cxr.data.prepared import SplitData
from ray_cxr.errors import ConfigError, RayCxrError
from ray_cxr.labels import FINDINGS, LABELS
from ray_cxr.models.architecture import Architecture
from ray_cxr.training import loop
from ray_cxr.training.distributed import Replicas

SIZE = 32


def split(n: int, seed: int = 0, size: int = SIZE) -> SplitData:
    """Images whose brightness in a corner says whether Effusion is there; some labels are null."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, len(LABELS))).astype(np.int8)
    images = rng.integers(60, 120, (n, size, size)).astype(np.uint8)
    images[labels[:, LABELS.index("Effusion")] == 1, : size // 2, : size // 2] += 100
    labels[rng.random(labels.shape) < 0.1] = -1
    ids = np.array([f"{i:08d}_000.png" for i in range(n)], dtype=object)
    return SplitData(ids, ids, np.full(n, 50.0), labels, images)


def make(n_train: int = 24, n_val: int = 10, **changes: object) -> loop.Loop:
    settings = TrainSettings(
        **{
            "backbone": "TinyCNN",
            "weights": "none",
            "batch_size": 8,
            "size": SIZE,
            "contrast": 0,
            "shift": 0,
            **changes,
        }
    )
    architecture = Architecture.of(settings, SIZE)
    return loop.Loop(Replicas(), settings, architecture, split(n_train), split(n_val, 1), weights=settings.weights)


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_an_epoch_has_every_image_exactly_once(n: int, batch: int, seed: int, epoch: int) -> None:
    order = loop.epoch_order(n, seed, epoch)
    seen = [row for rows, real in loop.batches(order, batch) for row in rows[real]]
    assert sorted(seen) == list(range(n))
    assert all(len(rows) == batch for rows, _ in loop.batches(order, batch))
    np.testing.assert_array_equal(order, loop.epoch_order(n, seed, epoch))


def test_epochs_differ_and_seeds_differ() -> None:
    assert loop.epoch_order(50, 0, 0).tolist() != loop.epoch_order(50, 0, 1).tolist()
    assert loop.epoch_order(50, 0, 0).tolist() != loop.epoch_order(50, 1, 0).tolist()


def test_weights_balance_the_two_sides_of_a_finding() -> None:
    values = np.array([[1, 1], [0, 1], [0, -1], [0, 0]], dtype=np.int8)
    positive, negative = loop.finding_weights(values, "weighted_bce")
    np.testing.assert_allclose(positive, [0.75, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(negative, [0.25, 2 / 3], rtol=1e-6)
    for j in range(2):
        assert positive[j] * (values[:, j] == 1).sum() == pytest.approx(negative[j] * (values[:, j] == 0).sum())
    assert loop.finding_weights(values, "bce")[0].tolist() == [1.0, 1.0]


def test_loss_is_the_weighted_cross_entropy_over_the_labelled_entries() -> None:
    rng = np.random.default_rng(0)
    y, z = rng.integers(0, 2, (5, 3)).astype(np.float32), rng.normal(0, 3, (5, 3)).astype(np.float32)
    mask = (rng.random((5, 3)) < 0.7).astype(np.float32)
    positive, negative = np.float32([0.9, 0.5, 0.2]), np.float32([0.1, 0.5, 0.8])
    p = 1 / (1 + np.exp(-z.astype(np.float64)))
    plain = -(y * positive * np.log(p) + (1 - y) * negative * np.log(1 - p)) * mask
    ours = float(loop.bce(y, z, mask, positive, negative, tf.constant(float(mask.sum()))))
    assert ours == pytest.approx(plain.sum() / mask.sum(), rel=1e-5)


@pytest.mark.parametrize("setting", ["weighted_bce", "bce"])
def test_the_loss_setting_reaches_the_weights(setting: str) -> None:
    """Class weights that are computed and never used are this field's classic fault."""
    one, other = make(loss=setting), make(loss="bce" if setting == "weighted_bce" else "weighted_bce")
    for item in (one, other):
        item.run_epoch(0)
    assert np.abs(one.model.get_layer("logits").kernel - other.model.get_layer("logits").kernel).max() > 1e-6


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.01},
        {"optimizer": "sgd"},
        {"optimizer": "adamw", "weight_decay": 0.5, "learning_rate": 0.01},
        {"warmup_epochs": 2.0},
        {"flip": True},
        {"shift": 0.2},
        {"contrast": 0.5},
        {"dropout": 0.5},
        {"batch_size": 4},
        {"pooling": "max"},
        {"seed": 7},
    ],
    ids=lambda change: next(iter(change)) + "=" + str(next(iter(change.values()))),
)
def test_every_option_reaches_the_weights(change: dict[str, object], plain_weights: np.ndarray) -> None:
    changed = make(**change)
    changed.run_epoch(0)
    assert np.abs(np.asarray(changed.model.get_layer("tiny_conv0").kernel) - plain_weights).max() > 1e-7


@pytest.fixture(scope="module")
def plain_weights() -> np.ndarray:
    plain = make()
    plain.run_epoch(0)
    again = make()
    again.run_epoch(0)
    weights = np.asarray(plain.model.get_layer("tiny_conv0").kernel)
    # The comparison means something only if nothing else moves the weights.
    np.testing.assert_array_equal(weights, np.asarray(again.model.get_layer("tiny_conv0").kernel))
    return weights


def recorded(item: loop.Loop) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """What each step of an epoch is given: labels, weights, denominator."""
    steps: list[tuple[np.ndarray, np.ndarray, float]] = []
    step = item._train_step

    def spy(images, labels, weight, denominator, draws):
        steps.append((np.asarray(labels), np.asarray(weight), float(denominator)))
        return step(images, labels, weight, denominator, draws)

    item._train_step = spy
    item.run_epoch(0)
    return steps


def test_every_label_counts_once_and_nulls_and_padding_never() -> None:
    item = make(n_train=11)  # a batch of 8 and one of 3, padded with 5
    steps = recorded(item)
    known = item.train.labels[:, :14] >= 0
    assert [weight[:, 0].shape for _, weight, _ in steps] == [(8,), (8,)]
    assert (steps[1][1][3:] == 0).all(), "padding must have no weight"
    assert sum(weight.sum() for _, weight, _ in steps) == known.sum() < known.size
    assert [denominator for *_, denominator in steps] == [weight.sum() for _, weight, _ in steps]
    positives = sum((labels * weight).sum() for labels, weight, _ in steps)
    assert positives == (item.train.labels[:, :14] == 1).sum()


def test_a_weight_of_zero_takes_an_entry_out_of_the_gradient() -> None:
    z = tf.constant(np.float32([[0.3, -2.0], [1.5, 0.7]]))
    weight = np.float32([[1, 0], [0, 1]])
    gradients = []
    for hidden in (0.0, 1.0):
        y = np.float32([[1, hidden], [hidden, 0]])
        with tf.GradientTape() as tape:
            tape.watch(z)
            loss = loop.bce(y, z, weight, np.float32([1, 1]), np.float32([1, 1]), tf.constant(2.0))
        gradients.append(np.asarray(tape.gradient(loss, z)))
    np.testing.assert_array_equal(gradients[0], gradients[1])
    assert (gradients[0][weight == 0] == 0).all()
    assert (gradients[0][weight == 1] != 0).all()


def test_learns_and_validates_every_image_once() -> None:
    item = make(n_train=64, n_val=13, learning_rate=0.01, findings=("Effusion",), optimizer="adam")
    for epoch in range(6):
        item.run_epoch(epoch)
    probabilities, result = item.validate()
    assert probabilities.shape == (13, 1)
    assert result["findings"]["Effusion"]["auroc"] == 1.0
    assert result["macro_auroc"] == 1.0


def test_save_and_restore_continue_bit_for_bit(tmp_path) -> None:
    straight = make(warmup_epochs=1, epochs=4, dropout=0.0)
    for epoch in range(2):
        straight.run_epoch(epoch)
    straight.save(tmp_path)
    straight.run_epoch(2)
    resumed = make(warmup_epochs=1, epochs=4, dropout=0.0)
    resumed.restore(tmp_path)
    resumed.run_epoch(2)
    for a, b in zip(straight.model.weights, resumed.model.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=a.path)


def test_a_loss_that_is_not_finite_names_step_and_images() -> None:
    item = make(learning_rate=10.0, optimizer="sgd")
    kernel = item.model.get_layer("logits").kernel
    kernel.assign(np.full(kernel.shape, np.nan, np.float32))
    with pytest.raises(RayCxrError, match=r"epoch 1, step 1 \(images 0000.*lower the learning rate"):
        item.run_epoch(0)


def test_augmentation_moves_as_told_and_keeps_type_and_size() -> None:
    image = np.zeros((1, SIZE, SIZE, 1), np.uint8)
    image[0, 10, 12] = 200
    settings = TrainSettings(flip=True, shift=0.25, contrast=0.0)
    still = np.float32([[0.9, 0.5, 0.5, 0.5]])  # no flip, no shift
    np.testing.assert_array_equal(loop.augment(tf.constant(image), still, settings), image)
    flipped = np.asarray(loop.augment(tf.constant(image), np.float32([[0.1, 0.5, 0.5, 0.5]]), settings))
    assert np.argwhere(flipped[0, ..., 0]).tolist() == [[10, SIZE - 1 - 12]]
    shifted = np.asarray(loop.augment(tf.constant(image), np.float32([[0.9, 1.0, 0.0, 0.5]]), settings))
    assert np.argwhere(shifted[0, ..., 0]).tolist() == [[10 + 8, 12 - 8]]
    assert shifted.dtype == np.uint8


def test_contrast_keeps_the_mean() -> None:
    image = np.random.default_rng(0).integers(90, 160, (1, SIZE, SIZE, 1)).astype(np.uint8)
    settings = TrainSettings(contrast=0.5, shift=0.0)
    out = np.asarray(loop.augment(tf.constant(image), np.float32([[0.5, 0.5, 0.5, 1.0]]), settings)).astype(float)
    assert out.mean() == pytest.approx(image.mean(), abs=0.5)
    assert out.std() == pytest.approx(1.5 * image.std(), rel=0.02)


def test_warm_up_rises_and_then_falls_to_zero() -> None:
    rate = loop.learning_rate(TrainSettings(learning_rate=0.1, warmup_epochs=1, epochs=5), steps_per_epoch=10)
    assert float(rate(0)) == 0.0
    assert float(rate(10)) == pytest.approx(0.1)
    assert float(rate(50)) == pytest.approx(0.0, abs=1e-6)


def test_selection_falls_back_to_the_loss_where_no_auroc_is_defined() -> None:
    values = np.array([[1], [1]], dtype=np.int8)
    p = np.float32([[0.9], [0.8]])
    result = loop.evaluate(values, p, ("Effusion",))
    assert result["findings"]["Effusion"] == {"n": 2, "positives": 2, "auroc": None}
    assert result["macro_auroc"] is None
    assert loop.selection(result, p, values) == pytest.approx(np.log(0.9 * 0.8) / 2, rel=1e-6)
    assert loop.selection({"macro_auroc": 0.5}, p, values) == 0.5


def test_macro_never_counts_no_finding() -> None:
    values = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=np.int8)
    p = np.float32([[0.9, 0.9], [0.1, 0.1], [0.8, 0.8], [0.2, 0.2]])
    result = loop.evaluate(values, p, ("Effusion", "No_Finding"))
    assert result["findings"]["No_Finding"]["auroc"] == 0.0
    assert result["macro_auroc"] == 1.0


def test_a_batch_that_workers_cannot_share_is_refused() -> None:
    replicas = Replicas()
    replicas.count = 3
    settings = TrainSettings(backbone="TinyCNN", weights="none", batch_size=8)
    with pytest.raises(ConfigError, match="use 9"):
        loop.Loop(replicas, settings, Architecture.of(settings, SIZE), split(8), split(4), weights="none")


def test_findings_of_the_loop_are_the_models_outputs_in_order() -> None:
    item = make(findings=("Mass", "Effusion"))
    assert item.findings == ("Effusion", "Mass")
    assert item.model.output.shape == (None, 2)
    assert [LABELS[c] for c in item._columns] == ["Effusion", "Mass"]
    assert keras.config.floatx() == "float32"
    assert FINDINGS[4] == "Effusion"
