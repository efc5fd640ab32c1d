"""The only file that knows `tf.distribute`: one strategy, one replica per worker, the same for 1 and N workers.

Keras's own optimizers do more than add up gradients under a strategy, and some of it before they are added up: the
norm that clips is then each worker's own, and with float16 one worker can skip a step that another takes, which hangs
or parts them. So only numbers cross the wire here. Each worker has a plain model and a plain optimizer; gradients are
added up inside the strategy, and what follows is the same arithmetic on the same numbers on every worker.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ray_cxr.errors import RayCxrError


class Replicas:
    """This worker's place among the workers, and what they do together.

    Ray Train has set `TF_CONFIG` before; MultiWorkerMirroredStrategy reads it. One worker is a cluster of one.

    Args:
        gpu: whether this worker computes on its GPU; NCCL then carries the sums.

    Attributes:
        rank: this worker's number, from 0.
        count: how many workers there are.

    Raises:
        RayCxrError: this worker sees more than one device to compute on.
    """

    def __init__(self, *, gpu: bool = False) -> None:
        config = json.loads(os.environ.get("TF_CONFIG", "{}"))
        self.rank = int(config.get("task", {}).get("index", 0))
        self.count = len(config.get("cluster", {}).get("worker", [""]))
        how = tf.distribute.experimental.CommunicationImplementation
        self._strategy = tf.distribute.MultiWorkerMirroredStrategy(
            communication_options=tf.distribute.experimental.CommunicationOptions(
                implementation=how.NCCL if gpu else how.RING
            )
        )
        if self._strategy.num_replicas_in_sync != self.count:
            raise RayCxrError(
                f"worker {self.rank} sees {self._strategy.num_replicas_in_sync // self.count} GPUs and takes one: "
                "start a worker for each, with --workers"
            )
        # Compiled once: a new graph for each call would stay in memory and take longer than the exchange.
        self._gather = self.compile(
            lambda value: tf.distribute.get_replica_context().all_gather(tf.identity(value)[None], axis=0)
        )

    def compile(self, together: Callable[..., Any], alone: Callable[[Any], Any] = lambda value: value) -> Any:
        """One graph: `together` runs in the strategy and may call `total`; `alone` then gets what it returned.

        What `alone` gets should be the same on all workers, so that what it does with it is as well.

        Returns:
            A function of this worker's tensors; gives what `alone` returns.
        """

        # Nothing here needs Python rewritten into graph code, and tracing is quicker without it.
        @tf.function(autograph=False)
        def run(*args: Any) -> Any:
            return alone(self._strategy.run(together, args=args))

        return run

    def total(self, values: Sequence[Any]) -> list[Any]:
        """Inside `together`: each tensor summed over the workers, in one exchange."""
        if self.count == 1:
            return list(values)
        return list(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, list(values)))

    def gather(self, array: np.ndarray) -> np.ndarray:
        """All workers' arrays of one shape [...] and dtype, as [workers, ...] in order of rank, on every worker."""
        if self.count == 1:
            return array[None]
        return np.asarray(self._gather(tf.constant(array)))

    def average(self, variables: Sequence[keras.Variable]) -> None:
        """Set each float variable to its mean over the workers, the same bits on all of them."""
        if self.count == 1 or not variables:
            return
        mine = np.concatenate([np.asarray(v, np.float32).ravel() for v in variables])
        means = self.gather(mine).mean(axis=0, dtype=np.float64)
        ends = np.cumsum([int(np.prod(v.shape)) for v in variables])
        for variable, part in zip(variables, np.split(means, ends[:-1]), strict=True):
            variable.assign(part.reshape(variable.shape).astype(np.float32))

    def any(self, flag: bool) -> bool:
        """Whether it is true on at least one worker; the answer is the same on all."""
        return bool(self.gather(np.array(flag, dtype=np.int32)).any())

    def agree(self, variables: Iterable[keras.Variable], when: str) -> None:
        """A guard: every bit of these variables is the same on all workers.

        Raises:
            RayCxrError: it is not; training on would only be noise.
        """
        if self.count == 1:
            return
        digest = 0
        for variable in variables:
            digest = zlib.crc32(np.asarray(variable).tobytes(), digest)
        digests = self.gather(np.array(digest, dtype=np.int64))
        if (digests != digests[0]).any():
            apart = ", ".join(str(rank) for rank, value in enumerate(digests) if value != digests[0])
            raise RayCxrError(
                f"{when}: the weights of worker {apart} are not those of worker 0, which must not happen; "
                "run the command again to continue from the last checkpoint, and report this"
            )
