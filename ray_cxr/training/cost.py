"""What a run of `train` takes, from one step on the user's images and from an earlier run in the same folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ray_cxr.config import TrainSettings
from ray_cxr.costs import RAY_S, Cost, Rate
from ray_cxr.data.prepare_cost import describe_splits
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.models.architecture import Architecture
from ray_cxr.progress import silence_stderr
from ray_cxr.training.planning import TrainPlan, plan_training
from ray_cxr.training.worker import METRICS

#: Validation takes this part of the time that training takes per image: it has no gradients.
VALIDATION_PART = 0.35
#: Seconds from the start of a worker to its model, and to trace the first step, per layer of the model.
WORKER_S, LAYER_S = 7.0, 0.065
#: Seconds to write the bundle, and per layer of the model.
EXPORT_S, EXPORT_LAYER_S = 6.0, 0.05
#: Seconds of a step besides its gradients, measured with TinyCNN: optimizer, input, and adding in a fixed order.
STEP_S = 0.05
#: Images of the step that is measured.
STEP_IMAGES = 8
#: Seconds that the measured step may take, about, and the layers of a model up to which it is compiled.
MAX_STEP_S, MAX_TRACED = 2.0, 60
#: Checkpoints that a run keeps while it writes another.
CHECKPOINTS = 3
#: Bytes of a file of weights without the numbers, also per tensor; and of a bundle without weights and graph.
FILE_BYTES, TENSOR_BYTES, BUNDLE_BYTES = 700_000, 500, 400_000
NO_GPU_RATE = "a GPU is measured by a run only; train one epoch in another --out, and see its images/s"


@dataclass(frozen=True)
class ModelCost:
    """Images per second of training a model, its parameters, its layers and its weight tensors."""

    rate: Rate
    parameters: int
    layers: int
    tensors: int

    @property
    def start_s(self) -> float:
        """Seconds of a run without its epochs."""
        return RAY_S + WORKER_S + EXPORT_S + self.layers * (LAYER_S + EXPORT_LAYER_S)

    def list_sizes(self, settings: TrainSettings) -> dict[str, int]:
        """Return the bytes of the checkpoints and of the bundle."""
        weights = 4 * self.parameters + FILE_BYTES + TENSOR_BYTES * self.tensors
        copies = (2 if settings.optimizer == "sgd" else 3) + (
            settings.ema is not None
        )  # of the weights, in `state.npz`
        return {
            "checkpoints": CHECKPOINTS * (weights + 4 * self.parameters * copies),
            "bundle": weights + 4 * self.parameters + BUNDLE_BYTES,
        }


def estimate_train(prepared: str | Path, out: str | Path, settings: TrainSettings, *, use_gpu: bool = False) -> Cost:
    """Make the checks of `train`, run one training step in this process, and write nothing.

    Raises:
        ConfigError, TableError, LeakError, OutputError, BundleError: as `train`.
    """
    plan = plan_training(prepared, out, settings)
    counts = describe_splits(plan.data.rows())
    if plan.bundle is not None:
        return Cost(f"{counts}; finished already", {}, (0.0, 0.0), {})
    epochs = read_epochs([plan.out / METRICS], f"of the {len(_read_metrics(plan.out / METRICS))} epochs in {plan.out}")
    left = settings.epochs - len(_read_metrics(plan.out / METRICS))
    cost = measure_step(plan.data, plan.settings, plan.architecture)
    passes = count_images(plan)
    counts = f"{counts}; {left:,} of {settings.epochs:,} epochs to train"
    sizes = cost.list_sizes(plan.settings)
    if epochs is not None:
        cost = replace(cost, rate=epochs)
    elif use_gpu:
        return Cost(counts, {}, None, sizes, NO_GPU_RATE)
    seconds = cost.start_s + left * passes / cost.rate.per_second
    shortest = seconds if settings.patience is None else cost.start_s + passes / cost.rate.per_second
    return Cost(counts, {"train": cost.rate}, (shortest, seconds), sizes, notes=list_warnings(plan))


def list_warnings(plan: TrainPlan) -> list[str]:
    return [f"WARNING: {warning}" for warning in plan.list_warnings()]


def count_images(plan: TrainPlan) -> float:
    """Return the images of an epoch; an image without gradients counts as a part, because it costs less.

    These are the images of the validation, and those of `batchnorm_images`.
    """
    images = len(plan.data.usable("train"))
    train = min(images, plan.steps_per_epoch * plan.settings.images_per_step)
    return train + VALIDATION_PART * (len(plan.data.usable("val")) + min(images, plan.settings.batchnorm_images))


def read_epochs(tables: list[Path], source: str) -> Rate | None:
    """Return the median rate of epochs that earlier runs trained, validation included as in `count_images`."""
    rows = pd.concat([pd.DataFrame(), *map(_read_metrics, tables)])
    if rows.empty:
        return None
    return Rate(float(rows["images_per_second"].median()), source)


def _read_metrics(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except (OSError, ValueError):
        return pd.DataFrame()


def measure_step(data: PreparedSet, settings: TrainSettings, architecture: Architecture) -> ModelCost:
    """Compute gradients of a batch with random weights, twice, and measure the second time."""
    with silence_stderr():
        from ray_cxr.models.keras_setup import tf  # imports TensorFlow, which prints
    from ray_cxr.models import classifier
    from ray_cxr.training.augmentation import augment, draw_random

    model = classifier.build(architecture)
    logits, split = classifier.build_logits_model(model), data.load("train")

    def compute(images: Any, draws: Any) -> None:
        with tf.GradientTape() as tape:
            y = logits(augment(images, draws, settings), training=True)
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(tf.zeros_like(y), y))
        tape.gradient(loss, model.trainable_variables)

    def time_step(function: Callable[[Any, Any], None], count: int) -> float:
        images = split.images[np.arange(count) % len(split)][..., None]
        started = time.monotonic()
        function(images, draw_random(settings.seed, 0, 0, count))
        return time.monotonic() - started

    few = min(STEP_IMAGES, settings.batch_size)
    warm = time_step(compute, few)
    # Tracing the graph of a large model takes longer than the steps.
    function = compute if len(model.layers) > MAX_TRACED else tf.function(compute)
    count = int(np.clip(few * MAX_STEP_S / warm, few, settings.batch_size))
    if count > few or function is not compute:
        time_step(function, count)
    seconds = time_step(function, count) + STEP_S * count / settings.images_per_step
    rate = Rate(count / seconds, f"measured with {count} of the images")
    return ModelCost(rate, model.count_params(), len(model.layers), len(model.weights))
