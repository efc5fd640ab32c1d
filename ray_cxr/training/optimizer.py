"""A stock Keras optimizer over all weights as one or two flat vectors.

DenseNet121 has 364 weight tensors. An optimizer with a variable for each is more than half of the training graph and
of the time to the first step. Flat, it is a few dozen operations on the same numbers, and workers exchange one vector
of gradients instead of hundreds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ray_cxr.config import TrainSettings

#: Weight decay of biases and of BatchNorm's scales regularises nothing.
NOT_DECAYED = ("bias", "gamma", "beta")


class FlatOptimizer:
    """The optimizer of one stage of training, for the model's trainable weights.

    With `float16` it scales the loss, because small gradients vanish; bfloat16 has float32's range.
    """

    def __init__(self, settings: TrainSettings, weights: Sequence[keras.Variable], *, float16: bool = False) -> None:
        self.weights = list(weights)
        decayed = [settings.optimizer == "adamw" and v.name not in NOT_DECAYED for v in self.weights]
        groups = ([i for i, d in enumerate(decayed) if d], [i for i, d in enumerate(decayed) if not d])
        self._groups = [group for group in groups if group]
        self._flats = [
            keras.Variable(self._flatten(group, self.weights), name="decayed" if decayed[group[0]] else "plain")
            for group in self._groups
        ]
        self._ema = settings.ema is not None
        inner = _build_optimizer(settings)
        self.keras = keras.optimizers.LossScaleOptimizer(inner) if float16 else inner
        self._inner = inner
        self.keras.build(self._flats)

    @property
    def variables(self) -> list[keras.Variable]:
        """The optimizer's state: slots, counters, learning rate, averages."""
        return list(self.keras.variables)

    def flatten(self, gradients: Sequence[Any]) -> list[Any]:
        """Return the flat gradients of each group."""
        return [self._flatten(group, gradients) for group in self._groups]

    def apply(self, flat_gradients: Sequence[Any]) -> None:
        """Apply one step, with gradients summed over all workers."""
        self.keras.apply(list(flat_gradients), self._flats)
        self._write_weights()

    def load_weights(self) -> None:
        """Copy the model's current weights, which a restart or a callback may have set."""
        for flat, group in zip(self._flats, self._groups, strict=True):
            flat.assign(self._flatten(group, self.weights))

    @contextlib.contextmanager
    def use_average(self) -> Iterator[None]:
        """With `ema`, give the model the averaged weights while the block runs."""
        if not self._ema or not int(np.asarray(self._inner.iterations)):
            yield  # no step was applied yet, so there is no average
            return
        raw = [np.asarray(flat) for flat in self._flats]
        self._inner.finalize_variable_values(self._flats)
        self._write_weights()
        try:
            yield
        finally:
            for flat, value in zip(self._flats, raw, strict=True):
                flat.assign(value)
            self._write_weights()

    def _flatten(self, group: Sequence[int], tensors: Sequence[Any]) -> Any:
        return tf.concat([tf.reshape(tensors[i], [-1]) for i in group], axis=0)

    def _write_weights(self) -> None:
        """Copy the flat vectors into the model's weights."""
        for flat, group in zip(self._flats, self._groups, strict=True):
            sizes = [int(np.prod(self.weights[i].shape)) for i in group]
            for i, part in zip(group, tf.split(flat.value, sizes), strict=True):
                self.weights[i].assign(tf.reshape(part, self.weights[i].shape))


def _build_optimizer(settings: TrainSettings) -> keras.optimizers.Optimizer:
    common: dict[str, Any] = {"global_clipnorm": settings.clip_norm}
    if settings.ema is not None:
        common |= {"use_ema": True, "ema_momentum": settings.ema, "ema_overwrite_frequency": None}
    rate = settings.learning_rate  # `schedule` replaces it
    if settings.optimizer == "adamw":
        optimizer = keras.optimizers.AdamW(rate, weight_decay=settings.weight_decay, **common)
        optimizer.exclude_from_weight_decay(var_names=["plain"])
        return optimizer
    if settings.optimizer == "adam":
        return keras.optimizers.Adam(rate, **common)
    return keras.optimizers.SGD(rate, momentum=settings.momentum, nesterov=settings.momentum > 0, **common)
