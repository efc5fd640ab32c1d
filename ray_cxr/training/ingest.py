"""The order in which images are seen, and the threads that fetch them ahead of the step.

The order is a pure function of (seed, epoch, step, global batch): one worker or eight, first run or continued, the
same images are in the same step. Each worker reads its own rows of each global batch out of the prepared shards.
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
from ray_cxr.training.augmentation import draws

_T = TypeVar("_T")

#: Batches fetched ahead: one that waits, and one in the making.
AHEAD = 2


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n images in an epoch, int64 [n]: a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def batches(order: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Global batches of row numbers: (rows int64 [B], real bool [B]); the last one padded, its padding not real."""
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        real = np.arange(batch_size) < len(rows)
        yield np.resize(rows, batch_size), real


@dataclass(frozen=True)
class Batch:
    """One worker's share b of a global batch B.

    Attributes:
        step: its number in the epoch, from 0.
        rows: row numbers of the whole global batch, padding left out, int64 [<=B].
        images: uint8 [b,S,S,1].
        labels: float32 [b,F], 0 where null.
        weight: float32 [b,F], 0 for nulls and padding.
        denominator: labelled entries in the whole global batch, at least 1.
        draws: float32 [b,D], see `augmentation`.
    """

    step: int
    rows: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    weight: np.ndarray
    denominator: np.float32
    draws: np.ndarray


class Feed:
    """One worker's batches of one split.

    Args:
        data: the split.
        columns: the columns of its labels that are the model's findings.
        batch_size: the global batch; a multiple of `count`.
        rank, count: this worker among the workers.
    """

    def __init__(self, data: SplitData, columns: Sequence[int], batch_size: int, rank: int, count: int) -> None:
        self._data, self._columns, self._batch_size = data, list(columns), batch_size
        share = batch_size // count
        self._mine = slice(rank * share, (rank + 1) * share)

    def train(self, seed: int, epoch: int, first: int, last: int) -> Fetched[Batch]:
        """The steps first..last-1 of an epoch, each row of the epoch's order once."""
        plan = list(batches(epoch_order(len(self._data), seed, epoch), self._batch_size))[first:last]

        def fetch(i: int) -> Batch:
            (rows, real), step = plan[i], first + i
            labels = self._data.labels[rows][:, self._columns]
            weight = ((labels >= 0) & real[:, None]).astype(np.float32)
            return Batch(
                step=step,
                rows=rows[real],
                images=self._data.images[rows[self._mine]][..., None],
                labels=np.maximum(labels[self._mine], 0).astype(np.float32),
                weight=weight[self._mine],
                denominator=np.float32(max(weight.sum(), 1.0)),
                draws=draws(seed, epoch, step, self._batch_size)[self._mine],
            )

        return Fetched(fetch, len(plan))

    def images(self) -> Fetched[np.ndarray]:
        """Every image in order of rows, uint8 [b,S,S,1] a batch; the last batch is padded."""
        plan = list(batches(np.arange(len(self._data)), self._batch_size))
        return Fetched(lambda i: self._data.images[plan[i][0][self._mine]][..., None], len(plan))


class Fetched(Generic[_T]):
    """Items made by a thread ahead of their use, in order.

    Args:
        fetch: makes item i.
        count: how many.

    Attributes:
        waited: seconds that the user of the items has waited for them; 0 when fetching keeps pace.
    """

    def __init__(self, fetch: Callable[[int], _T], count: int) -> None:
        self._fetch, self._count = fetch, count
        self.waited = 0.0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[_T]:
        with ThreadPoolExecutor(1, thread_name_prefix="fetch") as pool:
            pending: deque[Future[_T]] = deque(pool.submit(self._fetch, i) for i in range(min(AHEAD, self._count)))
            try:
                for i in range(self._count):
                    start = time.monotonic()
                    item = pending.popleft().result()
                    self.waited += time.monotonic() - start
                    if i + AHEAD < self._count:
                        pending.append(pool.submit(self._fetch, i + AHEAD))
                    yield item
            finally:
                for future in pending:
                    future.cancel()
