"""Checkpoints before a machine is taken away, for example a reclaimed spot instance.

Ray Train reports to the workers that a node is being drained. All workers ask together, since asking waits for all of
them, and they write a checkpoint at once. Until the machine is gone they write more, so that its loss costs seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ray_cxr.training.distributed import Replicas

#: Seconds between two questions, measured on the slowest worker.
ASK_EVERY_S = 5.0
#: While a machine goes away, checkpoints take at most about this share of the time.
_MAX_SHARE = 0.2


class PreemptionWatch:
    """Decides after each step whether a machine that goes away calls for a checkpoint; the same on all workers.

    Args:
        ask: `ray.train.get_preemption_info`, which waits until all workers call it.

    Attributes:
        info: the report of Ray Train on the machine; None while no machine goes away.
    """

    def __init__(self, replicas: Replicas, ask: Callable[[], Any]) -> None:
        self._replicas, self._ask = replicas, ask
        self.info: Any = None
        self._steps, self._ask_at = 0, 1
        self._asked_at = time.monotonic()
        self._saved_at, self._save_seconds = -np.inf, 0.0

    def is_due(self) -> bool:
        """Return whether to write a checkpoint now; every worker calls this after every step."""
        self._steps += 1
        if self._steps < self._ask_at:
            return False
        self.info = self._ask() or self.info
        now = time.monotonic()
        own = [(now - self._asked_at) / self._steps, self._saved_at - now, self._save_seconds]
        step_seconds, saved_at, save_seconds = self._replicas.gather(np.array(own)).max(axis=0)
        self._steps, self._ask_at = 0, max(1, int(ASK_EVERY_S / max(step_seconds, 1e-6)))
        self._asked_at = now
        return self.info is not None and -saved_at >= save_seconds / _MAX_SHARE

    def record_save(self, seconds: float) -> None:
        """State that a checkpoint took this long."""
        self._saved_at, self._save_seconds = time.monotonic(), seconds
