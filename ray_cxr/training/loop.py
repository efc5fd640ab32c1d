"""The training loop of one worker. It replaces `fit` of Keras 3, which fails under a multi-worker strategy."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ray_cxr.config import TrainSettings
from ray_cxr.data.prepared import SplitData
from ray_cxr.errors import DivergedError
from ray_cxr.evaluation import metrics
from ray_cxr.labels import LABELS, NO_FINDING
from ray_cxr.models import classifier, losses
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import WEIGHTS, load_bundle
from ray_cxr.models.keras_setup import keras, tf
from ray_cxr.training import schedule
from ray_cxr.training.augmentation import augment, mix_images
from ray_cxr.training.batchnorm import StatisticsEstimator, list_statistics
from ray_cxr.training.distributed import Replicas
from ray_cxr.training.ingest import Batch, Feed
from ray_cxr.training.optimizer import FlatOptimizer

#: In a checkpoint: the file of `Loop.save`.
STATE = "state.npz"


@dataclass
class TrainState:
    """The progress of training. A checkpoint holds it in addition to the weights and the optimizer's state.

    There is no random state: the order of images, augmentation and dropout are functions of seed, epoch and step.

    Attributes:
        losses: the loss of each finished step of the current epoch; empty between epochs.
        scores: the selection score of each finished epoch; higher is better.
        curves: the row of metrics of each finished epoch.
        stopped: whether a callback has ended the training.
        policy: the Keras dtype policy that the run started with.
    """

    epochs_done: int = 0
    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    policy: str = "float32"


@dataclass(frozen=True)
class EpochResult:
    """The result of one epoch. Only `loss` includes the steps before a restart.

    Attributes:
        loss: mean loss over all steps.
        images: number of images that all workers trained on, without padding.
        seconds: duration of training.
        wait_seconds: how long the slowest worker waited for images.
    """

    loss: float
    images: int
    seconds: float
    wait_seconds: float


class Loop:
    """Model, optimizer and data of one worker.

    Args:
        settings: all settings of the run; the number of workers is that of `replicas`.
        weights: starting weights: `imagenet`, `none` for random ones, or the path of a bundle or a weights file.
        policy: the Keras dtype policy: `float32`, `mixed_bfloat16` or `mixed_float16`.
        callbacks: run on every worker, with the same logs.
        on_progress: called after each step of training or validation.
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
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings, self.replicas, self.on_progress = settings, replicas, on_progress
        self.train, self.val = train, val
        self.findings = architecture.findings
        self.columns = [LABELS.index(name) for name in self.findings]
        feed = (self.columns, settings.batch_size, replicas.rank, replicas.count)
        self._feed = Feed(train, *feed, accumulate=settings.accumulate, mixup=settings.mixup)
        self._val_feed = Feed(val, *feed)
        full = math.ceil(len(train) / settings.images_per_step)
        self.steps_per_epoch = min(full, settings.steps_per_epoch or full)
        keras.utils.set_random_seed(settings.seed)
        default_policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            self.model = classifier.build(architecture, weights="imagenet" if weights == "imagenet" else None)
        finally:
            keras.config.set_dtype_policy(default_policy)
        self.random_layers: list[str] = []
        if weights not in ("imagenet", "none"):
            source, order = Path(weights), None
            if source.is_dir():
                source, order = source / WEIGHTS, load_bundle(source).findings
            self.random_layers = classifier.initialize_weights(self.model, architecture, source, order)
        self._logits = classifier.build_logits_model(self.model)
        for layer in self.model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = settings.sync_batchnorm
        self._statistics = list_statistics(self.model)
        self._dropouts = [x.seed_generator for x in self.model.layers if isinstance(x, keras.layers.Dropout)]
        self._float16 = policy == "mixed_float16"
        values = train.labels[:, self.columns]
        positive, negative = losses.compute_finding_weights(values, settings.loss, settings.balance)
        self._loss = losses.make_loss(settings, positive, negative)
        self._head_only: bool | None = None
        self._scheduled_rate: float | None = None
        self.callbacks = keras.callbacks.CallbackList(list(callbacks), model=self.model)
        self._enter_stage(0)
        # Half precision is only for training. Validation and export use a model in float32 with the same weights.
        self._exported = self.model if policy == "float32" else classifier.build(architecture)
        exported = classifier.build_logits_model(self._exported)
        self._predict_step = replicas.compile(lambda images: tf.sigmoid(exported(images, training=False)))
        self._estimator: StatisticsEstimator | None = None
        if settings.batchnorm_images and self._statistics:
            count = settings.batchnorm_images
            self._estimator = StatisticsEstimator(replicas, self._exported, train, count, settings.seed)

    def _enter_stage(self, epoch: int) -> None:
        """Freeze or unfreeze the backbone for an epoch; each stage has its own optimizer and graph."""
        head_only = epoch < self.settings.frozen_epochs
        if head_only == self._head_only:
            return
        self._head_only, self._scheduled_rate = head_only, None
        for layer in self.model.layers:
            # Keras runs a frozen BatchNorm in inference mode, so that its statistics stay unchanged too.
            layer.trainable = not head_only or classifier.is_head(layer)
        depths = classifier.compute_depths(self.model)
        weights = [(v, depths[layer.name]) for layer in self.model.layers for v in layer.trainable_variables]
        rates = [self.settings.layer_decay**depth for _, depth in weights]
        self.optimizer = FlatOptimizer(self.settings, [v for v, _ in weights], rates, float16=self._float16)
        # Some callbacks use model.optimizer.
        self.model.compile(optimizer=self.optimizer.keras, jit_compile=False, auto_scale_loss=False)
        self._train_step = self._build_train_step()

    def _build_train_step(self) -> Any:
        """Return the graph of one step, which takes the arrays of a `Batch` and returns the loss."""
        gradients = self._gradients
        if self.settings.xla:
            gradients = tf.function(gradients, jit_compile=True, autograph=False)

        def compute(arrays: Sequence[Any], denominator: Any) -> list[Any]:
            images, labels, weight, draws = arrays
            images = augment(images, draws, self.settings)
            if self.settings.mixup:
                images = mix_images(images, draws)
            return gradients(images, labels, weight, denominator)

        def step(images: Any, labels: Any, weight: Any, denominator: Any, draws: Any, seeds: Any, batches: Any) -> Any:
            for generator, seed in zip(self._dropouts, tf.unstack(seeds) if self._dropouts else (), strict=True):
                generator.state.assign(seed)
            arrays, run = (images, labels, weight, draws), self.replicas.run
            if self.settings.accumulate == 1:
                loss, *summed = run(lambda *args: self.replicas.sum(compute(args, denominator)), *arrays)
            else:
                parts = [tf.reshape(x, [self.settings.accumulate, -1, *x.shape[1:]]) for x in arrays]

                def add(i: Any, sums: list[Any]) -> tuple[Any, list[Any]]:
                    own = run(lambda *args: compute(args, denominator), *(x[i] for x in parts))
                    return i + 1, [x + y for x, y in zip(sums, own, strict=True)]

                # A loop in the graph, so that the graph and its tracing time do not grow.
                start = [tf.constant(0), [tf.constant(0.0), *self.optimizer.list_zeros()]]
                _, sums = tf.while_loop(lambda i, _: i < batches, add, start, parallel_iterations=1)
                # In the strategy, `identity` places the sums on the device, which the exchange needs.
                loss, *summed = run(lambda *values: self.replicas.sum(list(map(tf.identity, values))), *sums)
            self.optimizer.apply(summed)
            return loss

        return tf.function(step, autograph=False)

    def _gradients(self, images: Any, labels: Any, weight: Any, denominator: Any) -> list[Any]:
        """Return the loss and gradients of this worker's images; their sums over workers are the global batch's."""
        # Watching only trainable variables saves the backward pass of a frozen backbone.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            for weight_variable in self.optimizer.weights:
                tape.watch(weight_variable.value)
            logits = self._logits(images, training=True)
            loss = self._loss(labels, logits, weight, denominator)
            scaled = self.optimizer.keras.scale_loss(loss)
        return [loss, *self.optimizer.flatten(tape.gradient(scaled, self.optimizer.weights))]

    def run_epoch(
        self,
        state: TrainState,
        *,
        on_step: Callable[[int, float], None] | None = None,
        is_due: Callable[[], bool] = lambda: False,
        on_checkpoint: Callable[[], None] | None = None,
    ) -> EpochResult:
        """Train the next epoch from step `len(state.losses)` on, and append the loss of each step to `state`.

        Args:
            on_step: called after each step with the number of finished steps and the loss of the step.
            is_due: called after each step; whether to write a checkpoint now, the same on all workers.
            on_checkpoint: called if one is due, or after `checkpoint_steps` steps, when weights and `state` agree.

        Raises:
            DivergedError: a loss or a weight is not finite; the message names the step and the images of its batch.
        """
        epoch, start, images = state.epochs_done, time.monotonic(), 0
        self._enter_stage(epoch)
        self.optimizer.load_weights()
        batches = self._feed.prefetch_training(self.settings.seed, epoch, len(state.losses), self.steps_per_epoch)
        pending: tuple[Batch, Any] | None = None
        has_callbacks = bool(self.callbacks.callbacks)

        def finish_step() -> None:
            nonlocal pending
            if pending is None:
                return
            (batch, value), pending = pending, None
            loss = float(value)
            self.on_progress()
            if not math.isfinite(loss):
                raise self._build_error(f"the loss is {loss}", epoch, batch)
            state.losses.append(loss)
            if has_callbacks:
                self.callbacks.on_train_batch_end(batch.step, {"loss": loss})
            if on_step is not None:
                on_step(batch.step + 1, loss)

        for batch in batches:
            if has_callbacks:
                self.callbacks.on_train_batch_begin(batch.step)
            value = self._step(epoch, batch, state.scores)
            # The previous loss is read only after this step was started, so that the device is never idle.
            finish_step()
            pending = batch, value
            images += len(batch.rows)
            every = self.settings.checkpoint_steps
            due = is_due() or (every is not None and (batch.step + 1) % every == 0)
            if has_callbacks or due:
                finish_step()
            if due and on_checkpoint is not None and batch.step + 1 < self.steps_per_epoch:
                self._agree_on_variables(epoch, batch)
                on_checkpoint()
        finish_step()
        self._agree_on_variables(epoch, batch)
        wait_seconds = float(self.replicas.gather(np.array(batches.wait_seconds)).max())
        return EpochResult(float(np.mean(state.losses)), images, time.monotonic() - start, wait_seconds)

    def _build_error(self, problem: str, epoch: int, batch: Batch) -> DivergedError:
        ids = ", ".join(map(str, self.train.image_ids[batch.rows]))
        reason = f"{problem} at epoch {epoch + 1}, step {batch.step + 1}"
        remedy = "start again in a new --out with a lower learning rate, or with clip_norm"
        return DivergedError(f"{reason}; {remedy}; images of this step: {ids}", reason)

    def start_epoch(self, state: TrainState) -> None:
        """Enter the stage of the next epoch, and set its first learning rate before callbacks can change it."""
        self._enter_stage(state.epochs_done)
        self._set_rate(state.epochs_done, len(state.losses), state.scores)
        self.callbacks.on_epoch_begin(state.epochs_done)

    def _set_rate(self, epoch: int, step: int, scores: Sequence[float]) -> None:
        rate = schedule.compute_learning_rate(self.settings, self.steps_per_epoch, epoch, step, scores)
        if rate != self._scheduled_rate:
            # Only when the rate of the schedule changes, so that a rate that a callback has set stays.
            self._scheduled_rate = rate
            self.optimizer.keras.learning_rate = rate

    def _step(self, epoch: int, batch: Batch, scores: Sequence[float]) -> Any:
        self._set_rate(epoch, batch.step, scores)
        rng = np.random.default_rng([self.settings.seed, epoch, batch.step, self.replicas.rank, 1])
        seeds = rng.integers(0, 2**32, (len(self._dropouts), 2), dtype=np.uint32)
        inputs = batch.images, batch.labels, batch.weight, batch.denominator, batch.draws, seeds, batch.batches
        return self._train_step(*map(tf.constant, inputs))

    def _agree_on_variables(self, epoch: int, batch: Batch) -> None:
        """Average BatchNorm's moving statistics over the workers, then check that all variables are equal and finite.

        A weight that is not finite would show in the loss only one step later.
        """
        self.replicas.average(self._statistics)
        self.replicas.check_equal(self.list_shared(), f"epoch {epoch + 1}, step {batch.step + 1}")
        for variable in self.model.trainable_variables:
            if not np.isfinite(np.asarray(variable)).all():
                raise self._build_error(f"the weights of {variable.path} are not finite", epoch, batch)

    def list_shared(self) -> list[keras.Variable]:
        """Return the variables that must be equal on all workers: all but dropout's seeds."""
        seeds = {id(generator.state) for generator in self._dropouts}
        return [v for v in (*self.model.variables, *self.optimizer.keras.variables) if id(v) not in seeds]

    def predict(self, feed: Feed) -> np.ndarray:
        """Return the probabilities of the images of `feed`, float32 [n,F]; each worker computes its share."""
        own = []
        for images in feed.prefetch_images():
            own.append(np.asarray(self._predict_step(tf.constant(images))))
            self.on_progress()
        return feed.join_shares(self.replicas.gather(np.stack(own)))

    @contextlib.contextmanager
    def use_export_weights(self) -> Iterator[None]:
        """Give the model the weights to validate and export while the block runs.

        With `ema` these are averages, and with `batchnorm_images` BatchNorm's statistics are estimated for them.
        Then training continues with its own. A frozen backbone keeps its statistics, on which the head is trained.
        """
        with self.optimizer.use_average():
            if self._estimator is None or self._head_only:
                yield
                return
            own = [np.asarray(v) for v in self._statistics]
            try:
                self._update_exported()
                estimates = self._estimator.estimate(self.on_progress)
                for variable, value in zip(self._statistics, estimates, strict=True):
                    variable.assign(value)
                yield
            finally:
                for variable, value in zip(self._statistics, own, strict=True):
                    variable.assign(value)

    def _update_exported(self) -> None:
        if self._exported is not self.model:
            for variable, value in zip(self._exported.variables, self.model.variables, strict=True):
                variable.assign(value)

    def validate(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the probabilities of all validation images, float32 [N,F], and the result of `evaluate` on them."""
        self._update_exported()
        probabilities = self.predict(self._val_feed)
        return probabilities, evaluate(self.val.labels[:, self.columns], probabilities, self.findings)

    def is_stop_requested(self) -> bool:
        """Return whether a callback on any worker has set `model.stop_training`; the same on all workers."""
        return bool(self.callbacks.callbacks) and self.replicas.any(bool(self.model.stop_training))

    def save(self, folder: Path) -> None:
        """Write `state.npz`: the optimizer's state and the weights of training, not those averaged by `ema`."""
        arrays = {f"model-{i:04d}": np.asarray(v) for i, v in enumerate(self.model.variables)}
        arrays |= {f"optimizer-{i:04d}": np.asarray(v) for i, v in enumerate(self.optimizer.keras.variables)}
        np.savez(folder / STATE, allow_pickle=False, **arrays)

    def restore(self, folder: Path, state: TrainState) -> None:
        """Load what `save` wrote when the progress was `state`."""
        # After the last frozen epoch, a checkpoint has the optimizer of the frozen stage; the next stage has a new one.
        fresh = state.epochs_done == self.settings.frozen_epochs > 0 and not state.losses
        self._enter_stage(state.epochs_done)
        with np.load(folder / STATE, allow_pickle=False) as arrays:
            for i, variable in enumerate(self.model.variables):
                variable.assign(arrays[f"model-{i:04d}"])
            for i, variable in enumerate(() if fresh else self.optimizer.keras.variables):
                variable.assign(arrays[f"optimizer-{i:04d}"])
        self.optimizer.load_weights()
        last_step = state.epochs_done * self.steps_per_epoch + len(state.losses) - 1
        if not fresh and last_step >= 0:
            # A callback may have set the restored learning rate: keep it until the schedule changes its rate.
            epoch, step = divmod(last_step, self.steps_per_epoch)
            self._scheduled_rate = schedule.compute_learning_rate(
                self.settings, self.steps_per_epoch, epoch, step, state.scores[:epoch]
            )


def evaluate(labels: np.ndarray, probabilities: np.ndarray, findings: tuple[str, ...]) -> dict[str, Any]:
    """Return `findings`, with n, positives and AUROC of each, and `macro_auroc`; an undefined AUROC is None.

    Labels are int8 [N,F], -1 for null. The macro AUROC is the mean of the defined AUROCs without No_Finding.
    """
    rows: dict[str, Any] = {}
    for j, name in enumerate(findings):
        known = labels[:, j] >= 0
        y = labels[known, j]
        rows[name] = {
            "n": int(known.sum()),
            "positives": int(y.sum()),
            "auroc": metrics.auroc(y, probabilities[known, j].astype(np.float64)),
        }
    defined = [row["auroc"] for name, row in rows.items() if row["auroc"] is not None and name != NO_FINDING]
    return {"findings": rows, "macro_auroc": float(np.mean(defined)) if defined else None}


def compute_cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the mean binary cross-entropy over the labelled entries; None if no entry is labelled."""
    known = labels >= 0
    p = np.clip(probabilities[known].astype(np.float64), 1e-7, 1 - 1e-7)
    y = labels[known]
    return float(np.mean(-(y * np.log(p) + (1 - y) * np.log(1 - p)))) if known.any() else None


def compute_selection_score(macro_auroc: float | None, loss: float | None) -> float:
    """Return the macro AUROC; if it is undefined, minus the validation loss; if both are, minus infinity.

    The epoch with the highest score is selected. Minus a loss is negative, so below every AUROC.
    """
    if macro_auroc is not None:
        return macro_auroc
    return -math.inf if loss is None else -loss
