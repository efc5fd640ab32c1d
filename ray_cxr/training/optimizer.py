"""A stock Keras optimizer over all weights, which are joined into one or two flat vectors.

DenseNet121 has 364 weight tensors. An optimizer that updates each of them takes more than half of the training graph,
and of the time to the first step. On flat vectors it needs a few dozen operations for the same numbers, and workers
exchange one vector of gradients instead of hundreds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ray_cxr.config import TrainSettings
from ray_cxr.models.keras_setup import keras, tf

#: Names of biases and of BatchNorm's weights: weight decay of these regularises nothing.
NOT_DECAYED = ("bias", "gamma", "beta")


class FlatOptimizer:
    """The optimizer of one stage of training, for the model's trainable weights.

    With `float16` the loss is scaled, because small gradients would vanish; bfloat16 has the range of float32.
    """

    def __init__(self, settings: TrainSettings, weights: Sequence[keras.Variable], *, float16: bool = False) -> None:
        self.weights = list(weights)
        has_decay = settings.optimizer == "adamw"
        names = ["decayed" if has_decay and v.name not in NOT_DECAYED else "plain" for v in self.weights]
        groups = {name: [i for i, other in enumerate(names) if other == name] for name in sorted(set(names))}
        self._groups = list(groups.values())
        self._flats = [keras.Variable(self._flatten(group, self.weights), name=name) for name, group in groups.items()]
        self._inner = _build_optimizer(settings)
        self.keras = keras.optimizers.LossScaleOptimizer(self._inner) if float16 else self._inner
        self.keras.build(self._flats)

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
        if not self._inner.use_ema or not int(np.asarray(self._inner.iterations)):
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
