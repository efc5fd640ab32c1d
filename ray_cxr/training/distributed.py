"""The only file that knows `tf.distribute`: one strategy, one replica per worker, the same for 1 and N workers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf


class Replicas:
    """This worker's place among the workers, and what they do together.

    Ray Train has set `TF_CONFIG` before; MultiWorkerMirroredStrategy reads it. One worker is a cluster of one.

    Attributes:
        rank: this worker's number, from 0.
        count: how many workers there are.
    """

    def __init__(self) -> None:
        config = json.loads(os.environ.get("TF_CONFIG", "{}"))
        self.rank = int(config.get("task", {}).get("index", 0))
        self.count = len(config.get("cluster", {}).get("worker", [""]))
        self._strategy = tf.distribute.MultiWorkerMirroredStrategy()

    def scope(self) -> Any:
        """Where the model and the optimizer must be built, so that their variables are mirrored."""
        return self._strategy.scope()

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of this worker's tensors as one graph run by every worker; returns this worker's result."""

        @tf.function
        def run(*args: Any) -> Any:
            return self._strategy.run(function, args=args)

        return run

    @staticmethod
    def gather(value: Any) -> Any:
        """Inside `compile`: all workers' rows, in order of rank."""
        context = tf.distribute.get_replica_context()
        return context.all_gather(value, axis=0) if context.num_replicas_in_sync > 1 else value

    @staticmethod
    def total(value: Any) -> Any:
        """Inside `compile`: the sum over the workers."""
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)

    def average(self, variables: Sequence[keras.Variable]) -> None:
        """Set each variable to its mean over the workers: BatchNorm's statistics are else only one worker's own."""
        if self.count == 1 or not variables:
            return

        def mean() -> list[Any]:
            context = tf.distribute.get_replica_context()
            return [context.all_reduce(tf.distribute.ReduceOp.MEAN, tf.convert_to_tensor(v.value)) for v in variables]

        for variable, value in zip(variables, self.compile(mean)(), strict=True):
            variable.assign(value)
