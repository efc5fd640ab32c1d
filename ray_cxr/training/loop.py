"""The training loop of one worker: a custom loop, because Keras 3 `fit` fails under a multi-worker strategy."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ray_cxr.config import TrainSettings
from ray_cxr.data.prepared import SplitData
from ray_cxr.errors import ConfigError, DivergedError
from ray_cxr.evaluation import metrics
from ray_cxr.labels import LABELS, NO_FINDING
from ray_cxr.models import classifier, losses
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import WEIGHTS, load_bundle
from ray_cxr.training import schedule
from ray_cxr.training.augmentation import augment
from ray_cxr.training.distributed import Replicas
from ray_cxr.training.ingest import Batch, Feed
from ray_cxr.training.optimizer import FlatOptimizer

STATE = "state.npz"


@dataclass
class Progress:
    """Where training stands; what a checkpoint keeps beside weights and optimizer.

    There is no random state to keep: order, augmentation and dropout are functions of seed, epoch and step.

    Attributes:
        epochs_done: whole epochs.
        losses: those of the steps done in the epoch after them; empty between epochs.
        scores: the selection score of each epoch done, the higher the better.
        curves: a line of metrics per epoch done.
        stopped: whether a callback has ended the training.
        policy: the Keras dtype policy that it is computed with.
    """

    epochs_done: int = 0
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    policy: str = "float32"


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave.

    Attributes:
        loss: the mean of its steps, those before a restart included.
        images: trained on since the start or restart, padding left out.
        seconds: that these took.
        waited: the seconds that the slowest worker waited for images.
    """

    loss: float
    images: int
    seconds: float
    waited: float


class Loop:
    """Model, optimizer and data of one worker.

    Args:
        replicas: the workers.
        settings: the run's.
        architecture: what to build.
        train, val: the two splits.
        weights: what to start from: `imagenet`, `none`, a bundle or a file.
        policy: the Keras dtype policy to compute with: `float32`, `mixed_bfloat16` or `mixed_float16`.
        callbacks: stock or own `keras.callbacks.Callback`s; every worker runs them, with the same logs.

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
        policy: str = "float32",
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ) -> None:
        if settings.batch_size % replicas.count:
            raise ConfigError(
                f"batch_size: {settings.batch_size} cannot be shared equally by {replicas.count} workers; "
                f"use {math.ceil(settings.batch_size / replicas.count) * replicas.count}"
            )
        self.settings, self.replicas = settings, replicas
        self.train, self.val = train, val
        self.findings = architecture.findings
        self.columns = [LABELS.index(name) for name in self.findings]
        feed = (self.columns, settings.batch_size, replicas.rank, replicas.count)
        self._feed, self._val_feed = Feed(train, *feed), Feed(val, *feed)
        full = math.ceil(len(train) / settings.batch_size)
        self.steps_per_epoch = min(full, settings.steps_per_epoch or full)
        keras.utils.set_random_seed(settings.seed)
        with _policy(policy):
            self.model = classifier.build(architecture, weights="imagenet" if weights == "imagenet" else None)
        self.random_layers: list[str] = []
        if weights not in ("imagenet", "none"):
            source, order = Path(weights), None
            if source.is_dir():
                bundle = load_bundle(source)
                source, order = source / WEIGHTS, bundle.findings
            self.random_layers = classifier.initialize_weights(self.model, architecture, source, order)
        self._logits = classifier.build_logits_model(self.model)
        self._norms = [x for x in self.model.layers if isinstance(x, keras.layers.BatchNormalization)]
        for layer in self._norms:
            layer.synchronized = settings.sync_batchnorm
        self._dropouts = [x.seed_generator for x in self.model.layers if isinstance(x, keras.layers.Dropout)]
        self._float16 = policy == "mixed_float16"
        positive, negative = losses.compute_finding_weights(train.labels[:, self.columns], settings.loss)
        self._loss = losses.make_loss(settings, positive, negative)
        self._head_only: bool | None = None
        self._planned_rate: float | None = None
        self.callbacks = keras.callbacks.CallbackList(
            list(callbacks), add_history=False, add_progbar=False, model=self.model
        )
        self._enter_stage(0)
        # Half precision is for training: what is measured and what is exported are the same network, in float32.
        self._exported = self.model if policy == "float32" else classifier.build(architecture)
        exported = classifier.build_logits_model(self._exported)
        self._predict_step = replicas.compile(lambda images: tf.sigmoid(exported(images, training=False)))

    def _enter_stage(self, epoch: int) -> None:
        """Freeze or free the backbone as this epoch asks; each stage has an optimizer and a graph of its own."""
        head_only = epoch < self.settings.frozen_epochs
        if head_only == self._head_only:
            return
        self._head_only, self._planned_rate = head_only, None
        for layer in self.model.layers:
            # A frozen BatchNorm also keeps its statistics: Keras runs it as in inference.
            layer.trainable = not head_only or layer.name.startswith("head_") or layer.name == "logits"
        self.optimizer = FlatOptimizer(self.settings, self.model.trainable_variables, float16=self._float16)
        # `compile` only ties the two together, for callbacks that look at model.optimizer.
        self.model.compile(optimizer=self.optimizer.keras, jit_compile=False, auto_scale_loss=False)
        gradients = self._gradients
        if self.settings.xla:
            gradients = tf.function(gradients, jit_compile=True, autograph=False)

        def together(images: Any, labels: Any, weight: Any, denominator: Any, draws: Any, seeds: Any) -> Any:
            for generator, seed in zip(self._dropouts, tf.unstack(seeds) if self._dropouts else (), strict=True):
                generator.state.assign(seed)
            return self.replicas.total(gradients(augment(images, draws, self.settings), labels, weight, denominator))

        def alone(values: Any) -> Any:
            loss, *summed = values
            self.optimizer.apply(summed)
            return loss

        self._train_step = self.replicas.compile(together, alone)

    def _gradients(self, images: Any, labels: Any, weight: Any, denominator: Any) -> list[Any]:
        """This worker's part of the global batch's loss, and that loss's gradients: the workers' parts add up."""
        # Only what learns is watched: a frozen backbone then costs no backward pass.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for weight_variable in self.optimizer.weights:
                tape.watch(weight_variable.value)
            logits = self._logits(images, training=True)
            loss = self._loss(labels, logits, weight, denominator)
            scaled = self.optimizer.keras.scale_loss(loss)
        return [loss, *self.optimizer.flatten(tape.gradient(scaled, self.optimizer.weights))]

    def run_epoch(
        self,
        progress: Progress,
        *,
        on_step: Callable[[int, float], None] | None = None,
        on_checkpoint: Callable[[], None] | None = None,
    ) -> Epoch:
        """Train the epoch after those done, from the step after the losses in `progress`; the losses are added there.

        Args:
            on_step: called with the number of steps done and the last known loss.
            on_checkpoint: called every `checkpoint_steps` steps, when weights and `progress` belong together.

        Raises:
            DivergedError: a loss that is not finite; names the step and the images of the batch.
        """
        epoch, start, images = progress.epochs_done, time.monotonic(), 0
        self._enter_stage(epoch)
        self.optimizer.take_up()
        fetched = self._feed.train(self.settings.seed, epoch, len(progress.losses), self.steps_per_epoch)
        pending: tuple[Batch, Any] | None = None
        watched = bool(self.callbacks.callbacks)

        def settle() -> None:
            nonlocal pending
            if pending is None:
                return
            batch, value = pending
            pending = None
            loss = float(value)
            if not math.isfinite(loss):
                raise self._not_finite(f"the loss is {loss}", epoch, batch)
            progress.losses.append(loss)
            if watched:
                self.callbacks.on_train_batch_end(batch.step, {"loss": loss})
            if on_step is not None:
                on_step(batch.step + 1, loss)

        for batch in fetched:
            if watched:
                self.callbacks.on_train_batch_begin(batch.step)
            value = self._step(epoch, batch, progress.scores)
            # The last step's loss is looked at while the device works on this one, which need not wait for it.
            settle()
            pending = batch, value
            images += len(batch.rows)
            due = self.settings.checkpoint_steps and (batch.step + 1) % self.settings.checkpoint_steps == 0
            if watched or due:
                settle()
            if due and on_checkpoint is not None and batch.step + 1 < self.steps_per_epoch:
                self._share_statistics(epoch, batch)
                on_checkpoint()
        settle()
        self._share_statistics(epoch, batch)
        waited = float(self.replicas.gather(np.array(fetched.waited)).max())
        return Epoch(float(np.mean(progress.losses)), images, time.monotonic() - start, waited)

    def _not_finite(self, what: str, epoch: int, batch: Batch) -> DivergedError:
        ids = ", ".join(map(str, self.train.image_ids[batch.rows]))
        reason = f"{what} at epoch {epoch + 1}, step {batch.step + 1}"
        return DivergedError(
            f"{reason}; lower the learning rate or set clip_norm, in another --out; the images of that step: {ids}",
            reason,
        )

    def begin_epoch(self, progress: Progress) -> None:
        """Enter the next epoch's stage and set its first learning rate; callbacks may then change it."""
        self._enter_stage(progress.epochs_done)
        self._plan_rate(progress.epochs_done, len(progress.losses), progress.scores)
        self.callbacks.on_epoch_begin(progress.epochs_done)

    def _plan_rate(self, epoch: int, step: int, scores: Sequence[float]) -> None:
        rate = schedule.compute_learning_rate(self.settings, self.steps_per_epoch, epoch, step, scores)
        if rate != self._planned_rate:
            # Set only when the plan changes, so that a callback that changes it is not overruled.
            self._planned_rate = rate
            self.optimizer.keras.learning_rate = rate

    def _step(self, epoch: int, batch: Batch, scores: Sequence[float]) -> Any:
        self._plan_rate(epoch, batch.step, scores)
        seeds = np.random.default_rng([self.settings.seed, epoch, batch.step, self.replicas.rank, 1]).integers(
            0, 2**32, (len(self._dropouts), 2), dtype=np.uint32
        )
        return self._train_step(
            *map(tf.constant, (batch.images, batch.labels, batch.weight, batch.denominator, batch.draws, seeds))
        )

    def _share_statistics(self, epoch: int, batch: Batch) -> None:
        """Average BatchNorm's moving statistics, which else are each worker's own; then all must be alike.

        Raises:
            DivergedError: a weight is not finite: a loss shows only what it was computed from.
        """
        self.replicas.average([v for layer in self._norms for v in (layer.moving_mean, layer.moving_variance)])
        self.replicas.agree(self.shared(), f"epoch {epoch + 1}, step {batch.step + 1}")
        for variable in self.model.trainable_variables:
            if not np.isfinite(np.asarray(variable)).all():
                raise self._not_finite(f"the weights of {variable.path} are not finite", epoch, batch)

    def shared(self) -> list[keras.Variable]:
        """The variables that must be the same on all workers: all but dropout's seeds."""
        seeds = {id(generator.state) for generator in self._dropouts}
        return [v for v in (*self.model.variables, *self.optimizer.variables) if id(v) not in seeds]

    def predict(self, feed: Feed, n: int) -> np.ndarray:
        """Probabilities float32 [n,F] of every image of a split, each exactly once, from all workers."""
        mine = np.stack([np.asarray(self._predict_step(tf.constant(images))) for images in feed.images()])
        parts = self.replicas.gather(mine)  # [workers, steps, share, F]
        return np.moveaxis(parts, 0, 1).reshape(-1, parts.shape[-1])[:n]

    def validate(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Validation probabilities float32 [N,F] of all workers, and `evaluate` of them, as the bundle would give."""
        if self._exported is not self.model:
            for variable, value in zip(self._exported.variables, self.model.variables, strict=True):
                variable.assign(value)
        probabilities = self.predict(self._val_feed, len(self.val))
        return probabilities, evaluate(self.val.labels[:, self.columns], probabilities, self.findings)

    def stop_wanted(self) -> bool:
        """Whether a callback on any worker has set `model.stop_training`; the answer is the same on all."""
        return bool(self.callbacks.callbacks) and self.replicas.any(bool(self.model.stop_training))

    def save(self, folder: Path) -> None:
        """Write the raw weights and the optimizer's state as `state.npz`."""
        arrays = {f"model-{i:04d}": np.asarray(v) for i, v in enumerate(self.model.variables)}
        arrays |= {f"optimizer-{i:04d}": np.asarray(v) for i, v in enumerate(self.optimizer.variables)}
        np.savez(folder / STATE, allow_pickle=False, **arrays)

    def restore(self, folder: Path, progress: Progress) -> None:
        """Take up what `save` wrote, at the point that `progress` tells."""
        # A checkpoint at the end of the frozen stage holds that stage's optimizer, which the next one does not use.
        fresh = progress.epochs_done == self.settings.frozen_epochs > 0 and not progress.losses
        self._enter_stage(progress.epochs_done)
        with np.load(folder / STATE, allow_pickle=False) as arrays:
            for i, variable in enumerate(self.model.variables):
                variable.assign(arrays[f"model-{i:04d}"])
            for i, variable in enumerate(() if fresh else self.optimizer.variables):
                variable.assign(arrays[f"optimizer-{i:04d}"])
        self.optimizer.take_up()
        if not fresh and (progress.losses or progress.epochs_done):
            # The rate in the state may be a callback's; the plan that it differs from is that of the step before.
            epoch, step = progress.epochs_done, len(progress.losses) - 1
            if step < 0:
                epoch, step = epoch - 1, self.steps_per_epoch - 1
            self._planned_rate = schedule.compute_learning_rate(
                self.settings, self.steps_per_epoch, epoch, step, progress.scores[:epoch]
            )


@contextlib.contextmanager
def _policy(name: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


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


def cross_entropy(probabilities: np.ndarray, values: np.ndarray) -> float | None:
    """Plain binary cross-entropy over the labelled entries, whatever the training loss; None where there is none."""
    known = values >= 0
    p = np.clip(probabilities[known].astype(np.float64), 1e-7, 1 - 1e-7)
    y = values[known]
    return float(np.mean(-(y * np.log(p) + (1 - y) * np.log(1 - p)))) if known.any() else None


def selection(result: Mapping[str, Any], probabilities: np.ndarray, values: np.ndarray) -> float:
    """The number that picks the best epoch: macro AUROC; where no finding defines one, minus the validation loss.

    Minus a loss is below every AUROC, so that the two never compete wrongly.
    """
    if result["macro_auroc"] is not None:
        return float(result["macro_auroc"])
    loss = cross_entropy(probabilities, values)
    return -loss if loss is not None else -math.inf
