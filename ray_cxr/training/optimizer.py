"""A stock Keras optimizer over all weights as one or two flat vectors.

DenseNet121 has 364 weight tensors. An optimizer over each of them is more than half of the training graph, and more
than half of the time until the first step; flat, it is a few dozen operations on the same numbers. The workers also
exchange one vector of gradients in place of hundreds of small ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ray_cxr.config import TrainSettings

#: Pulling BatchNorm's scales and the biases to zero regularises nothing.
NOT_DECAYED = ("bias", "gamma", "beta")


class FlatOptimizer:
    """One stage's optimizer.

    Args:
        settings: `optimizer`, `momentum`, `weight_decay`, `clip_norm` and `ema`.
        weights: the model's weights that learn.
        float16: scale the loss, because half precision's small gradients vanish; bfloat16 has float32's range.

    Attributes:
        weights: the model's weights, one by one.
        keras: the Keras optimizer.
    """

    def __init__(self, settings: TrainSettings, weights: Sequence[keras.Variable], *, float16: bool = False) -> None:
        self.weights = list(weights)
        decayed = [settings.optimizer == "adamw" and v.name not in NOT_DECAYED for v in self.weights]
        groups = ([i for i, d in enumerate(decayed) if d], [i for i, d in enumerate(decayed) if not d])
        self._groups = [group for group in groups if group]
        self._flats = [
            keras.Variable(self._flat(group, self.weights), name="decayed" if decayed[group[0]] else "plain")
            for group in self._groups
        ]
        self._ema = settings.ema is not None
        inner = _make(settings)
        self.keras = keras.optimizers.LossScaleOptimizer(inner) if float16 else inner
        self._inner = inner
        self.keras.build(self._flats)

    @property
    def variables(self) -> list[keras.Variable]:
        """Its state: slots, counters, learning rate, averages."""
        return list(self.keras.variables)

    def flatten(self, gradients: Sequence[Any]) -> list[Any]:
        """Gradients by weight to flat ones by group."""
        return [self._flat(group, gradients) for group in self._groups]

    def apply(self, flat_gradients: Sequence[Any]) -> None:
        """One step from gradients that are summed over all workers."""
        self.keras.apply(list(flat_gradients), self._flats)
        self._spread()

    def take_up(self) -> None:
        """Go on from the model's weights as they are now: after a restart, or where a callback has set them."""
        for flat, group in zip(self._flats, self._groups, strict=True):
            flat.assign(self._flat(group, self.weights))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """With `ema`, the model has the averaged weights; the raw ones come back after it."""
        if not self._ema or not int(np.asarray(self._inner.iterations)):
            yield  # no step yet, or every one of them skipped: there is no average
            return
        raw = [np.asarray(flat) for flat in self._flats]
        self._inner.finalize_variable_values(self._flats)
        self._spread()
        try:
            yield
        finally:
            for flat, value in zip(self._flats, raw, strict=True):
                flat.assign(value)
            self._spread()

    def _flat(self, group: Sequence[int], tensors: Sequence[Any]) -> Any:
        return tf.concat([tf.reshape(tensors[i], [-1]) for i in group], axis=0)

    def _spread(self) -> None:
        """Give the model's weights their parts of the flat vectors."""
        for flat, group in zip(self._flats, self._groups, strict=True):
            sizes = [int(np.prod(self.weights[i].shape)) for i in group]
            for i, part in zip(group, tf.split(flat.value, sizes), strict=True):
                self.weights[i].assign(tf.reshape(part, self.weights[i].shape))


def _make(settings: TrainSettings) -> keras.optimizers.Optimizer:
    common: dict[str, Any] = {"global_clipnorm": settings.clip_norm}
    if settings.ema is not None:
        common |= {"use_ema": True, "ema_momentum": settings.ema, "ema_overwrite_frequency": None}
    rate = settings.learning_rate  # set anew at every step, as `schedule` says
    if settings.optimizer == "adamw":
        optimizer = keras.optimizers.AdamW(rate, weight_decay=settings.weight_decay, **common)
        optimizer.exclude_from_weight_decay(var_names=["plain"])
        return optimizer
    if settings.optimizer == "adam":
        return keras.optimizers.Adam(rate, **common)
    return keras.optimizers.SGD(rate, momentum=settings.momentum, nesterov=settings.momentum > 0, **common)
