"""Exchange of tensors between workers through `tf.distribute`, which no other module uses.

Under a strategy, Keras optimizers clip the gradient norm of each worker before the sum. With float16 one worker can
skip a step that another takes, so that workers hang or diverge. So workers exchange only sums here: each has a plain
model and a plain optimizer, and all apply the same arithmetic to the same summed gradients. One worker runs the same
code.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ray_cxr.errors import RayCxrError
from ray_cxr.models.keras_setup import keras, tf


class Replicas:
    """Exchange tensors among `count` workers, of which this is number `rank`; on GPUs through NCCL.

    MultiWorkerMirroredStrategy reads `TF_CONFIG`, which Ray Train sets. One worker is a cluster of one.
    """

    def __init__(self, *, gpu: bool = False) -> None:
        config = json.loads(os.environ.get("TF_CONFIG", "{}"))
        self.rank = int(config.get("task", {}).get("index", 0))
        self.count = len(config.get("cluster", {}).get("worker", [""]))
        api = tf.distribute.experimental
        implementations = api.CommunicationImplementation
        options = api.CommunicationOptions(implementation=implementations.NCCL if gpu else implementations.RING)
        self._strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
        if self._strategy.num_replicas_in_sync != self.count:
            raise RayCxrError(
                f"worker {self.rank} sees {self._strategy.num_replicas_in_sync // self.count} GPUs but uses only one; "
                "start one worker per GPU with --workers"
            )
        # Compiled once, because a new graph per call would stay in memory and take longer than the exchange.
        self._gather = self.compile(
            lambda value: tf.distribute.get_replica_context().all_gather(tf.identity(value)[None], axis=0)
        )

    def compile(self, function: Callable[..., Any]) -> Any:
        """Return the graph of a function that runs in the strategy."""
        return tf.function(lambda *args: self.run(function, *args), autograph=False)  # tracing is faster without it

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in the strategy, within a graph. The function may exchange, but not in a loop."""
        return self._strategy.run(function, args=args)

    def sum(self, values: Sequence[Any]) -> list[Any]:
        """Return the sum of each tensor over the workers, in one exchange; call it only inside `run`."""
        if self.count == 1:
            return list(values)
        return list(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, list(values)))

    def gather(self, array: np.ndarray) -> np.ndarray:
        """Return all workers' arrays, of equal shape and dtype, as [workers, ...] in order of rank."""
        if self.count == 1:
            return array[None]
        return np.asarray(self._gather(tf.constant(array)))

    def average(self, variables: Sequence[keras.Variable]) -> None:
        """Set each float variable to its mean over the workers, with the same bits on all workers."""
        if self.count == 1 or not variables:
            return
        own = np.concatenate([np.asarray(v, np.float32).ravel() for v in variables])
        means = self.gather(own).mean(axis=0, dtype=np.float64)
        ends = np.cumsum([int(np.prod(v.shape)) for v in variables])
        for variable, part in zip(variables, np.split(means, ends[:-1]), strict=True):
            variable.assign(part.reshape(variable.shape).astype(np.float32))

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on at least one worker; the same on all workers."""
        return bool(self.gather(np.array(flag, dtype=np.int32)).any())

    def check_equal(self, variables: Iterable[keras.Variable], when: str) -> None:
        """Raise RayCxrError if the variables do not have the same bits on all workers."""
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
