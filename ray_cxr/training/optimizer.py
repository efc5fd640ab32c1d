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


class FlatOptimizer:
    """The optimizer of one stage of training, for the model's trainable weights.

    `rates` has the factor of the learning rate for each weight, also of its decay. With `float16` the loss is scaled,
    because small gradients would vanish; bfloat16 has the range of float32.
    """

    def __init__(
        self,
        settings: TrainSettings,
        weights: Sequence[keras.Variable],
        rates: Sequence[float],
        *,
        float16: bool = False,
    ) -> None:
        self.weights = list(weights)
        has_decay = settings.optimizer == "adamw"
        # Weight decay regularises nothing in vectors: biases, BatchNorm's weights and the scales of ConvNeXt's layers.
        keys = [
            (rate, settings.weight_decay if has_decay and len(v.shape) > 1 else 0.0)
            for v, rate in zip(self.weights, rates, strict=True)
        ]
        groups = sorted(set(keys), key=lambda key: (key[0], -key[1]))
        self._groups = [[i for i, key in enumerate(keys) if key == group] for group in groups]
        self._flats = [
            keras.Variable(self._flatten(group, self.weights), name=f"group{number}")
            for number, group in enumerate(self._groups)
        ]
        self._inner = _build_optimizer(settings)
        self._inner.options = {flat.name: group for flat, group in zip(self._flats, groups, strict=True)}
        self.keras = keras.optimizers.LossScaleOptimizer(self._inner) if float16 else self._inner
        self.keras.build(self._flats)

    def list_zeros(self) -> list[Any]:
        """Return zeros in the shapes of the flat gradients, to which gradients can be added."""
        return [tf.zeros_like(flat.value) for flat in self._flats]

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


class _Grouped:
    """Adds to a Keras optimizer the factor of the learning rate and the weight decay of each flat vector.

    Keras has one of each for all variables. `options` has them by the variable's name.
    """

    options: dict[str, tuple[float, float]]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        factor, decay = self.options[variable.name.rpartition("/")[2].partition(":")[0]]
        rate = tf.cast(learning_rate, variable.dtype) * factor
        if decay:
            variable.assign_sub(variable * decay * rate)
        super().update_step(gradient, variable, rate)  # type: ignore[misc]


class _Adam(_Grouped, keras.optimizers.Adam):
    """Adam, and with a decay AdamW."""


class _SGD(_Grouped, keras.optimizers.SGD):
    """SGD with momentum."""


def _build_optimizer(settings: TrainSettings) -> keras.optimizers.Optimizer:
    common: dict[str, Any] = {"name": settings.optimizer, "global_clipnorm": settings.clip_norm}
    if settings.ema is not None:
        common |= {"use_ema": True, "ema_momentum": settings.ema, "ema_overwrite_frequency": None}
    rate = settings.learning_rate  # `schedule` replaces it
    if settings.optimizer == "sgd":
        return _SGD(rate, momentum=settings.momentum, nesterov=settings.momentum > 0, **common)
    return _Adam(rate, **common)
