"""Estimated statistics of BatchNorm, against NumPy and in the weights that an epoch validates and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from workers import SIZE, make, split, train, weights

from ray_cxr.models import classifier
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import WEIGHTS
from ray_cxr.training import batchnorm, worker
from ray_cxr.training.batchnorm import StatisticsEstimator, list_statistics
from ray_cxr.training.distributed import Replicas
from ray_cxr.training.loop import EpochResult, Loop, TrainState

EPOCH = EpochResult(loss=0.5, images=24, seconds=1.0, wait_seconds=0.0)
#: Everything that could reach the statistics by mistake, and averaged weights.
OPTIONS: dict[str, Any] = {"batchnorm_images": 20, "ema": 0.5, "optimizer": "sgd", "learning_rate": 0.1}
OPTIONS |= {"shift": 0.2, "contrast": 0.5, "mixup": 0.5, "dropout": 0.5, "sync_batchnorm": True}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchnorm, "BATCH_SIZE", 8)


def values(variables: Any) -> list[np.ndarray]:
    return [np.asarray(v).copy() for v in variables]


def estimate(model: keras.Model, data: Any, count: int = 20) -> list[np.ndarray]:
    return StatisticsEstimator(Replicas(), model, data, count, seed=0).estimate()


def test_estimates_are_population_statistics_of_each_layer_without_dropout() -> None:
    """Computed in float64 NumPy: each batch of 8 is normalised by itself; 20 images are two batches."""
    keras.utils.set_random_seed(1)
    images = keras.Input((6, 6, 1), dtype="uint8")
    x = keras.layers.Rescaling(1 / 100)(images)
    x = keras.layers.BatchNormalization(axis=-1, epsilon=0.1, name="first")(x)
    x = keras.layers.Dropout(0.5)(x)
    x = keras.layers.Dense(3, use_bias=False, name="dense")(x)
    x = keras.layers.BatchNormalization(name="second")(x)
    model, data = keras.Model(images, x), split(29, size=6)
    found = estimate(model, data)
    rows = np.stack(data.images.reads)
    assert rows.shape == (2, 8)
    assert len(set(rows.ravel())) == 16

    first = data.images.pixels[rows][..., None] / 100
    mean, variance = (f(first, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.var))
    second = (first - mean) / np.sqrt(variance + 0.1) @ np.asarray(model.get_layer("dense").kernel, np.float64)
    for got, x in zip((found[:2], found[2:]), (first, second), strict=True):
        np.testing.assert_allclose(got[0], x.mean(axis=(0, 1, 2, 3)), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got[1], x.var(axis=(0, 1, 2, 3)), rtol=1e-4)
    assert [layer.momentum for layer in model.layers[2::3]] == [0.99, 0.99]
    assert model.layers[3].rate == 0.5


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_the_bundle_has_what_was_validated_and_training_keeps_its_own(policy: str, tmp_path: Path) -> None:
    item = make(24, 10, policy=policy, **OPTIONS)
    progress = train(item, 2)
    own = weights(item)
    worker.validate_epoch(item, progress, EPOCH, tmp_path)
    for name, value in weights(item).items():
        np.testing.assert_array_equal(value, own[name], err_msg=name)

    plain = classifier.build(Architecture.of(item.settings, SIZE))
    plain.load_weights(str(tmp_path / WEIGHTS))
    exported = values(list_statistics(plain))
    with np.load(tmp_path / worker.VALIDATION) as arrays:
        images = tf.constant(item.val.images.pixels[..., None])
        np.testing.assert_allclose(np.asarray(plain(images, training=False)), arrays["probabilities"], atol=1e-5)
    for got, expected, moving in zip(exported, estimate(plain, item.train), item._statistics, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert np.abs(got - np.asarray(moving)).max() > 1e-3


def test_estimates_leave_the_steps_and_a_frozen_backbone_unchanged(tmp_path: Path) -> None:
    """An epoch with a frozen backbone and one without, each validated with and without estimates."""
    runs: list[tuple[Loop, dict[str, np.ndarray]]] = []
    for count in (20, 0):
        item = make(16, 4, frozen_epochs=1, **OPTIONS | {"batchnorm_images": count})
        progress, frozen = TrainState(), values(item._statistics)
        for _ in range(2):
            progress = train(item, 1, progress)
            reads = len(item.train.images.reads)
            worker.validate_epoch(item, progress, EPOCH, tmp_path)
            estimated = count > 0 and progress.epochs_done == 2
            assert len(item.train.images.reads) - reads == (2 if estimated else 0)
            if progress.epochs_done == 1:
                for value, start in zip(values(item._statistics), frozen, strict=True):
                    np.testing.assert_array_equal(value, start)
        runs.append((item, weights(item)))
    for name, value in runs[0][1].items():
        np.testing.assert_array_equal(value, runs[1][1][name], err_msg=name)
