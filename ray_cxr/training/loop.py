"""The training loop of one worker: a custom loop, because Keras 3 `fit` fails under a multi-worker strategy."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ray_cxr.config import TrainSettings
from ray_cxr.data.prepared import SplitData
from ray_cxr.errors import ConfigError, RayCxrError
from ray_cxr.evaluation import metrics
from ray_cxr.labels import LABELS, NO_FINDING
from ray_cxr.models import classifier
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import WEIGHTS, load_bundle
from ray_cxr.training.distributed import Replicas

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where training stands after a whole number of epochs; what a checkpoint keeps beside the weights."""

    epochs_done: int = 0
    best: float | None = None
    best_epoch: int | None = None
    curves: list[dict[str, Any]] = field(default_factory=list)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n images in an epoch: a pure function of its arguments, whatever the number of workers."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def batches(order: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Global batches of row numbers: (rows int64 [B], real bool [B]); the last one padded, its padding not real."""
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        real = np.arange(batch_size) < len(rows)
        yield np.resize(rows, batch_size), real


def finding_weights(values: np.ndarray, loss: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights of positives and negatives per finding, float32 [F] each, from training labels int8 [N,F], -1 null.

    `weighted_bce` weights a positive by the finding's share of negatives and a negative by its share of positives,
    so that both sides of a finding add up to the same. `bce` weights all by 1.
    """
    if loss == "bce":
        ones = np.ones(values.shape[1], dtype=np.float32)
        return ones, ones
    known = np.maximum((values >= 0).sum(axis=0), 1)
    prevalence = ((values == 1).sum(axis=0) / known).astype(np.float32)
    return 1.0 - prevalence, prevalence


def bce(labels: Any, logits: Any, weight: Any, positive: Any, negative: Any, denominator: Any) -> Any:
    """Weighted binary cross-entropy summed over this worker's entries, over the global number of them.

    Args:
        labels: float [B,F], 0 or 1 (anything where weight is 0).
        logits: float32 [B,F].
        weight: float [B,F], 0 for nulls and padding.
        positive, negative: float [F], see `finding_weights`.
        denominator: the number of labelled entries in the whole global batch.
    """
    losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits)
    sides = labels * positive + (1.0 - labels) * negative
    return tf.reduce_sum(losses * sides * weight) / denominator


def augment(images: Any, draws: Any, settings: TrainSettings) -> Any:
    """Random flip, shift and contrast of uint8 [B,S,S,1], on the device; the size stays.

    Args:
        draws: float32 [B,4] uniform in 0..1: flip, horizontal shift, vertical shift, contrast. They come from outside
            so that the same image gets the same change on any number of workers.
    """
    if not (settings.flip or settings.shift or settings.contrast):
        return images
    x = tf.cast(images, tf.float32)
    if settings.flip or settings.shift:
        side = float(images.shape[1])
        mirrored = tf.cast(draws[:, 0] < 0.5, tf.float32) if settings.flip else tf.zeros_like(draws[:, 0])
        dx = tf.round((draws[:, 1] * 2.0 - 1.0) * settings.shift * side)
        dy = tf.round((draws[:, 2] * 2.0 - 1.0) * settings.shift * side)
        one, zero = tf.ones_like(dx), tf.zeros_like(dx)
        # Rows of the projective transform: output (x, y) takes input (a0 x + a1 y + a2, b0 x + b1 y + b2).
        transforms = tf.stack(
            [one - 2.0 * mirrored, zero, mirrored * (side - 1.0) + dx, zero, one, dy, zero, zero], axis=1
        )
        x = tf.raw_ops.ImageProjectiveTransformV3(
            images=x,
            transforms=transforms,
            output_shape=tf.constant([int(side), int(side)], tf.int32),
            fill_value=0.0,
            interpolation="NEAREST",  # whole pixels: nothing to interpolate
            fill_mode="NEAREST",
        )
    if settings.contrast:
        gain = 1.0 + (draws[:, 3] * 2.0 - 1.0) * settings.contrast
        mean = tf.reduce_mean(x, axis=[1, 2, 3], keepdims=True)
        x = mean + (x - mean) * tf.reshape(gain, [-1, 1, 1, 1])
    return tf.cast(tf.clip_by_value(tf.round(x), 0.0, 255.0), tf.uint8)


def learning_rate(settings: TrainSettings, steps_per_epoch: int) -> Any:
    """A constant, or with warm-up a linear rise and then a cosine to zero at the last step."""
    if not settings.warmup_epochs:
        return settings.learning_rate
    warmup = max(1, round(settings.warmup_epochs * steps_per_epoch))
    total = max(1, settings.epochs * steps_per_epoch - warmup)
    return keras.optimizers.schedules.CosineDecay(0.0, total, warmup_target=settings.learning_rate, warmup_steps=warmup)


def make_optimizer(settings: TrainSettings, steps_per_epoch: int) -> keras.optimizers.Optimizer:
    rate = learning_rate(settings, steps_per_epoch)
    if settings.optimizer == "adamw":
        return keras.optimizers.AdamW(rate, weight_decay=settings.weight_decay)
    if settings.optimizer == "adam":
        return keras.optimizers.Adam(rate)
    return keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)


class Loop:
    """Model, optimizer and data of one worker.

    Args:
        replicas: the workers.
        settings: the run's.
        architecture: what to build.
        train, val: the two splits.
        weights: what to start from: `imagenet`, `none`, a bundle or a file.

    Raises:
        ConfigError: a batch that the workers cannot share equally, or weights that cannot be had.
    """

    def __init__(
        self,
        replicas: Replicas,
        settings: TrainSettings,
        architecture: Architecture,
        train: SplitData,
        val: SplitData,
        *,
        weights: str,
    ) -> None:
        if settings.batch_size % replicas.count:
            raise ConfigError(
                f"batch_size: {settings.batch_size} cannot be shared equally by {replicas.count} workers; "
                f"use {math.ceil(settings.batch_size / replicas.count) * replicas.count}"
            )
        self.settings, self.replicas = settings, replicas
        self.train, self.val = train, val
        self.findings = architecture.findings
        self._columns = [LABELS.index(name) for name in self.findings]
        self._share = settings.batch_size // replicas.count
        full = math.ceil(len(train) / settings.batch_size)
        self.steps_per_epoch = min(full, settings.steps_per_epoch or full)
        keras.utils.set_random_seed(settings.seed)
        with replicas.scope():
            self.model = classifier.build(architecture, weights="imagenet" if weights == "imagenet" else None)
            self.random_layers: list[str] = []
            if weights not in ("imagenet", "none"):
                source, order = Path(weights), None
                if source.is_dir():
                    bundle = load_bundle(source)
                    source, order = source / WEIGHTS, bundle.findings
                self.random_layers = classifier.initialise(self.model, architecture, source, order)
            self._logits = classifier.logits_of(self.model)
            self.optimizer = make_optimizer(settings, self.steps_per_epoch)
            self.optimizer.build(self.model.trainable_variables)
        positive, negative = finding_weights(train.labels[:, self._columns], settings.loss)
        self._positive, self._negative = tf.constant(positive), tf.constant(negative)
        self._train_step = replicas.compile(self._step)
        self._predict_step = replicas.compile(self._predict)

    def _step(self, images: Any, labels: Any, weight: Any, denominator: Any, draws: Any) -> Any:
        images = augment(images, draws, self.settings)
        with tf.GradientTape() as tape:
            logits = self._logits(images, training=True)
            loss = bce(labels, logits, weight, self._positive, self._negative, denominator)
        variables = self.model.trainable_variables
        # The losses of the workers add up to that of the global batch, and so do their gradients, which
        # apply_gradients sums over the workers.
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return self.replicas.total(loss)

    def _predict(self, images: Any) -> Any:
        return self.replicas.gather(tf.sigmoid(self._logits(images, training=False)))

    def _mine(self, values: np.ndarray) -> np.ndarray:
        start = self.replicas.rank * self._share
        return values[start : start + self._share]

    def run_epoch(self, epoch: int, on_step: Callable[[int], None] | None = None) -> float:
        """Train one epoch; the mean loss of its steps.

        Raises:
            RayCxrError: a loss that is not finite; names the step and the images of the batch.
        """
        settings, train = self.settings, self.train
        order = epoch_order(len(train), settings.seed, epoch)
        losses = []
        for step, (rows, real) in enumerate(batches(order, settings.batch_size)):
            if step == self.steps_per_epoch:
                break
            labels = train.labels[rows][:, self._columns].astype(np.float32)
            weight = (labels >= 0) & real[:, None]
            draws = np.random.default_rng([settings.seed, epoch, step]).random((settings.batch_size, 4), np.float32)
            loss = float(
                self._train_step(
                    tf.constant(train.images[self._mine(rows)][..., None]),
                    tf.constant(np.maximum(self._mine(labels), 0.0)),
                    tf.constant(self._mine(weight).astype(np.float32)),
                    tf.constant(max(float(weight.sum()), 1.0), tf.float32),
                    tf.constant(self._mine(draws)),
                )
            )
            if not math.isfinite(loss):
                ids = ", ".join(map(str, train.image_ids[rows[real]][:8]))
                raise RayCxrError(
                    f"the loss is {loss} at epoch {epoch + 1}, step {step + 1} (images {ids}, ...); "
                    "lower the learning rate"
                )
            losses.append(loss)
            if on_step is not None:
                on_step(step + 1)
        self.replicas.average(_statistics(self.model))
        return float(np.mean(losses))

    def predict(self, data: SplitData) -> np.ndarray:
        """Probabilities float32 [N,F] of every image of a split, each exactly once, from all workers."""
        results = []
        for rows, real in batches(np.arange(len(data)), self.settings.batch_size):
            images = tf.constant(data.images[self._mine(rows)][..., None])
            results.append(np.asarray(self._predict_step(images))[real])
        return np.concatenate(results)

    def validate(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Validation probabilities float32 [N,F], and `evaluate` of them."""
        probabilities = self.predict(self.val)
        return probabilities, evaluate(self.val.labels[:, self._columns], probabilities, self.findings)

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state."""
        self.model.save_weights(str(folder / "model.weights.h5"))
        arrays: Any = {f"{i:04d}": np.asarray(v) for i, v in enumerate(self.optimizer.variables)}
        np.savez(folder / "optimizer.npz", **arrays)

    def restore(self, folder: Path) -> None:
        """Take up weights and optimizer state from `save`."""
        classifier.load_own_weights(self.model, folder / "model.weights.h5")
        with np.load(folder / "optimizer.npz", allow_pickle=False) as arrays:
            for i, variable in enumerate(self.optimizer.variables):
                variable.assign(arrays[f"{i:04d}"])


def evaluate(values: np.ndarray, probabilities: np.ndarray, findings: tuple[str, ...]) -> dict[str, Any]:
    """n, positives and AUROC per finding (null where undefined) and the macro AUROC over the defined ones.

    Args:
        values: labels int8 [N,F], -1 where not labelled.
        probabilities: float32 [N,F].
    """
    rows: dict[str, Any] = {}
    for j, name in enumerate(findings):
        known = values[:, j] >= 0
        y = values[known, j]
        rows[name] = {
            "n": int(known.sum()),
            "positives": int(y.sum()),
            "auroc": metrics.auroc(y, probabilities[known, j].astype(np.float64)),
        }
    defined = [row["auroc"] for name, row in rows.items() if row["auroc"] is not None and name != NO_FINDING]
    return {"findings": rows, "macro_auroc": float(np.mean(defined)) if defined else None}


def _statistics(model: keras.Model) -> list[keras.Variable]:
    """BatchNorm's moving statistics: what each worker updates from its own images alone."""
    return [v for v in model.non_trainable_variables if not isinstance(v.dtype, str) or "float" in v.dtype]


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """A call's result and its seconds."""
    start = time.monotonic()
    return function(), time.monotonic() - start


def selection(result: Mapping[str, Any], probabilities: np.ndarray, values: np.ndarray) -> float:
    """The number that picks the best epoch: macro AUROC; where no finding defines one, minus the validation loss.

    Minus a loss is below every AUROC, so that the two never compete wrongly.
    """
    if result["macro_auroc"] is not None:
        return float(result["macro_auroc"])
    known = values >= 0
    p = np.clip(probabilities[known].astype(np.float64), 1e-7, 1 - 1e-7)
    y = values[known]
    return -float(np.mean(-(y * np.log(p) + (1 - y) * np.log(1 - p)))) if known.any() else -math.inf
