"""Statistics of BatchNorm that belong to given weights, estimated on a sample of training images.

Moving averages lag behind the weights: after an epoch of 55 steps, 58 % of them are still from before it (momentum
0.99), and with `ema` they belong to other weights. The estimate is the mean and variance of each layer's input over the
sample, as in "precise BatchNorm" (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021). All layers are measured in
one pass, in which each batch is normalised by its own statistics: the first layer is exact, the others as exact as
those of a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ray_cxr.data.prepared import SplitData
from ray_cxr.models.keras_setup import keras, tf
from ray_cxr.training.distributed import Replicas
from ray_cxr.training.ingest import Prefetcher

#: Images per batch, independent of `batch_size`: large enough for statistics, small enough for the memory of a worker.
BATCH_SIZE = 32


def list_statistics(model: keras.Model) -> list[keras.Variable]:
    """Return the moving mean and variance of each BatchNorm layer, in turn."""
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    return [v for layer in norms for v in (layer.moving_mean, layer.moving_variance)]


class StatisticsEstimator:
    """Estimate the statistics of a model's BatchNorm layers on `count` images of `data`.

    The images are the same in each call and for each number of workers, which share the batches. They are not
    augmented, because the images that are validated and scored are not either. `count` is limited to the images there
    are, and rounded down to whole batches.
    """

    def __init__(self, replicas: Replicas, model: keras.Model, data: SplitData, count: int, seed: int) -> None:
        self._replicas, self._model, self._data = replicas, model, data
        count = min(count, len(data))
        size = min(count, BATCH_SIZE)
        rows = np.random.default_rng(seed).permutation(len(data))[: count // size * size]
        self._batches = np.split(rows, count // size)
        self._statistics = list_statistics(model)
        self._measure_batch = replicas.compile(self._measure)

    def estimate(self, on_progress: Callable[[], None] = lambda: None) -> list[np.ndarray]:
        """Return the estimate of each of `list_statistics`, with the same bits on all workers.

        It is that of the model's current weights. The model's own statistics are overwritten.
        """
        own = self._batches[self._replicas.rank :: self._replicas.count]
        sizes = [int(np.prod(v.shape)) for v in self._statistics]
        sums = np.zeros(sum(sizes))
        ends = np.cumsum(sizes)[:-1]
        for images in Prefetcher(lambda i: self._data.images[own[i]][..., None], len(own)):
            parts = np.split(np.asarray(self._measure_batch(tf.constant(images)), np.float64), ends)
            # The mean of squares, from which the variance of the whole sample follows.
            parts[1::2] = [variance + mean**2 for mean, variance in zip(parts[::2], parts[1::2], strict=True)]
            sums += np.concatenate(parts)
            on_progress()
        means = np.split(self._replicas.gather(sums).sum(axis=0) / len(self._batches), ends)
        means[1::2] = [np.maximum(x - mean**2, 0.0) for mean, x in zip(means[::2], means[1::2], strict=True)]
        return [x.astype(np.float32) for x in means]

    def _measure(self, images: Any) -> Any:
        """Return all means and variances of a batch, in the order of `list_statistics`, as one vector."""
        with _measure_only(self._model.layers):
            self._model(images, training=True)
        return tf.concat([tf.reshape(v.value, [-1]) for v in self._statistics], axis=0)


@contextlib.contextmanager
def _measure_only(layers: Sequence[keras.layers.Layer]) -> Iterator[None]:
    """Make a pass in training mode store the statistics of its batch alone, and apply no dropout."""
    changes: list[tuple[Any, str, Any]] = []
    for layer in layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            changes += [(layer, "momentum", 0.0), (layer, "synchronized", False)]
        elif isinstance(layer, keras.layers.Dropout):
            changes.append((layer, "rate", 0.0))
    before = [getattr(layer, name) for layer, name, _ in changes]
    for layer, name, value in changes:
        setattr(layer, name, value)
    try:
        yield
    finally:
        for (layer, name, _), value in zip(changes, before, strict=True):
            setattr(layer, name, value)
