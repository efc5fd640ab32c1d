"""The order of the training images, and the thread that reads batches ahead of the step.

The order is a pure function of (seed, epoch, step, global batch). So a step has the same images with any number of
workers, and after a restart. Each worker reads its own share of each global batch from the prepared shards.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from ray_cxr.data.prepared import SplitData
from ray_cxr.training.augmentation import draw_random, mix_labels

_T = TypeVar("_T")

#: Number of batches read ahead: one is ready while the next is read.
QUEUE_SIZE = 2


def shuffle_epoch(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of n images in an epoch, int64 [n]."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def iter_batches(
    order: np.ndarray, batch_size: int, padded: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield global batches as (rows int64 [P], real bool [P]); `real` is false for padding.

    P is `padded` or else the batch size. The last batch has more padding than the others.
    """
    padded = padded or batch_size
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield np.resize(rows, padded), np.arange(padded) < len(rows)


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step of the optimizer, which sums the gradients of K global batches (`accumulate`).

    The arrays hold this worker's b images of each global batch, one batch after the other. With `mixup`, the b images
    of each batch are followed by their b partners in `images` and `draws`.

    Attributes:
        step: number in the epoch, from 0.
        rows: row numbers in the split, of all workers' images of the step without padding, int64 [<=K B].
        batches: number of global batches with images: K, or less at the end of an epoch.
        images: uint8 [K b,S,S,1], or [2 K b,S,S,1] with `mixup`.
        labels: float32 [K b,F], 0 for null; mixed with `mixup`.
        weight: float32 [K b,F], 1 for labels, 0 for nulls and padding.
        denominator: number of labels in the whole step, at least 1.
        draws: float32 [K b,D] or [2 K b,D], see `augmentation`.
    """

    step: int
    rows: np.ndarray
    batches: np.int32
    images: np.ndarray
    labels: np.ndarray
    weight: np.ndarray
    denominator: np.float32
    draws: np.ndarray


class Feed:
    """Read the batches of one split for worker `rank` of `count`.

    All workers have equal shares of a global batch of `batch_size` images. If these are not a multiple of `count`, the
    last shares are padded with images of weight 0, so that the steps stay the same with any number of workers. A step
    has `accumulate` global batches; `mixup` is the setting.
    """

    def __init__(
        self,
        data: SplitData,
        columns: Sequence[int],
        batch_size: int,
        rank: int,
        count: int,
        *,
        accumulate: int = 1,
        mixup: float = 0.0,
    ) -> None:
        self._data, self._columns, self._batch_size = data, list(columns), batch_size
        self._accumulate, self._mixup = accumulate, mixup
        share = -(-batch_size // count)
        self._padded = share * count
        self._rows = slice(rank * share, (rank + 1) * share)

    def prefetch_training(self, seed: int, epoch: int, first: int, last: int) -> Prefetcher[Batch]:
        """Return the batches of steps first..last-1 of an epoch."""
        order = shuffle_epoch(len(self._data), seed, epoch)
        plan = list(iter_batches(order, self._batch_size * self._accumulate))[first:last]
        columns = np.arange(self._padded)[self._rows]
        # Which images of the step are this worker's, [K,b].
        own = np.arange(self._accumulate)[:, None] * self._batch_size + columns % self._batch_size
        counts = np.tile(columns < self._batch_size, self._accumulate)[:, None]

        def fetch(i: int) -> Batch:
            (rows, real), step = plan[i], first + i
            values = self._data.labels[rows][:, self._columns]
            labels = np.maximum(values, 0).astype(np.float32)
            weight = ((values >= 0) & real[:, None]).astype(np.float32)
            draws, sources = draw_random(seed, epoch, step, len(rows)), own
            if self._mixup:
                labels, weight, partners = mix_labels(labels, weight, draws, real, self._mixup)
                sources = np.concatenate([own, partners[own]], axis=1)
            return Batch(
                step=step,
                rows=rows[real],
                batches=np.int32(-(-int(real.sum()) // self._batch_size)),
                images=self._data.images[rows[sources.ravel()]][..., None],
                labels=labels[own.ravel()],
                weight=weight[own.ravel()] * counts,
                denominator=np.float32(max(weight.sum(), 1.0)),
                draws=draws[sources.ravel()],
            )

        return Prefetcher(fetch, len(plan))

    def prefetch_images(self) -> Prefetcher[np.ndarray]:
        """Return batches uint8 [b,S,S,1] of all images in order, padded as in training; see `join_shares`."""
        plan = list(iter_batches(np.arange(len(self._data)), self._batch_size, self._padded))
        return Prefetcher(lambda i: self._data.images[plan[i][0][self._rows]][..., None], len(plan))

    def join_shares(self, parts: np.ndarray) -> np.ndarray:
        """Return results for `prefetch_images` of all workers [workers,steps,b,F] in the order of images, [n,F]."""
        batches = np.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1, parts.shape[-1])
        return batches[:, : self._batch_size].reshape(-1, parts.shape[-1])[: len(self._data)]


class Prefetcher(Generic[_T]):
    """Fetch items 0 to count-1 in a thread ahead of the consumer, whose total waiting time is `wait_seconds`."""

    def __init__(self, fetch: Callable[[int], _T], count: int) -> None:
        self._fetch, self._count = fetch, count
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[_T]:
        with ThreadPoolExecutor(1, thread_name_prefix="fetch") as pool:
            pending: deque[Future[_T]] = deque(pool.submit(self._fetch, i) for i in range(min(QUEUE_SIZE, self._count)))
            try:
                for i in range(self._count):
                    start = time.monotonic()
                    item = pending.popleft().result()
                    self.wait_seconds += time.monotonic() - start
                    if i + QUEUE_SIZE < self._count:
                        pending.append(pool.submit(self._fetch, i + QUEUE_SIZE))
                    yield item
            finally:
                for future in pending:
                    future.cancel()
