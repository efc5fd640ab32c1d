"""Synchronous successive halving (Jamieson & Talwalkar 2016) as a scheduler of Ray Tune.

Ray's HyperBandScheduler is no substitute: its first bracket halves nothing, and it has no grace period. It also judges
a rung once all started trials have reached it. If a bracket has more trials than run at a time, these are never all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from ray_cxr.config import TuneSettings
from ray_cxr.tuning.records import METRIC


class Halving(FIFOScheduler):
    """Trials wait at each rung for their whole bracket; some continue, and the others are stopped.

    A waiting trial holds no resources: its process ends, and a new process continues in its folder. A bracket may thus
    have more trials than run at a time. `has_capacity` replaces Ray's limit, which would count waiting trials.

    Args:
        settings: `grace_epochs` until the first rung; each next rung is `reduction_factor` times as long.
        epochs: number of epochs of a complete trial.
        trials: expected number of trials.
        processes: maximum number of trials that run at a time.
        count_epochs: returns how many epochs a trial had completed when it was added.
    """

    _supports_buffered_results = False

    def __init__(
        self, settings: TuneSettings, epochs: int, trials: int, processes: int, count_epochs: Callable[[Trial], int]
    ) -> None:
        super().__init__()
        self._reduction, self._processes, self._count_epochs = settings.reduction_factor, processes, count_epochs
        self.rungs: list[int] = []
        rung = settings.grace_epochs
        while rung < epochs:
            self.rungs.append(rung)
            rung *= self._reduction
        #: Number of trials in each bracket; the sizes differ by at most one. One trial of each bracket finishes.
        count = math.ceil(trials / self._reduction ** len(self.rungs))
        self.sizes = [trials // count + (index < trials % count) for index in range(count)]
        self._brackets: list[list[Trial]] = [[]]
        self._closed = False
        self._bracket_of: dict[Trial, int] = {}
        #: Number of rungs that each unfinished trial has passed, and the score of each waiting trial at its rung.
        self._passed: dict[Trial, int] = {}
        self._waiting: dict[Trial, float] = {}

    def has_capacity(self) -> bool:
        """Return whether another trial may start."""
        return len(self._passed) - len(self._waiting) < self._processes

    def close(self) -> None:
        """Stop waiting for further trials."""
        self._closed = True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Put a new trial into a bracket; ignore a trial whose process was restarted."""
        if trial in self._bracket_of:
            return
        if len(self._brackets[-1]) == self.sizes[len(self._brackets) - 1]:
            self._brackets.append([])
        self._brackets[-1].append(trial)
        self._bracket_of[trial] = len(self._brackets) - 1
        completed = self._count_epochs(trial)
        self._passed[trial] = sum(rung < completed for rung in self.rungs)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Pause, continue or stop a trial at a rung; continue a trial between rungs."""
        passed = self._passed[trial]
        if passed == len(self.rungs) or result["epoch"] < self.rungs[passed]:
            return TrialScheduler.CONTINUE
        score = float(result[METRIC])
        self._waiting[trial] = -math.inf if math.isnan(score) else score
        self._judge(tune_controller, self._bracket_of[trial], trial)
        if trial in self._waiting:
            return TrialScheduler.PAUSE
        return TrialScheduler.CONTINUE if trial in self._passed else TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Remove a failed trial, unless Tune restarts it: then its status is already ERROR."""
        if trial.status != Trial.ERROR:
            self.on_trial_remove(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial, result: dict[str, Any] | None = None) -> None:
        """Remove a trial that has ended, so that its bracket no longer waits for it."""
        self._waiting.pop(trial, None)
        if self._passed.pop(trial, None) is not None:
            self._judge(tune_controller, self._bracket_of[trial])

    on_trial_complete = on_trial_remove

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return the next trial to run; trials that passed a rung come before new trials."""
        if self._closed:
            self._judge(tune_controller, len(self._brackets) - 1)
        live = [trial for trial in self._passed if trial.status in (Trial.PENDING, Trial.RUNNING)]
        if len(live) < self._processes:
            for trial in self._passed:
                if trial.status == Trial.PAUSED and trial not in self._waiting:
                    return trial
        return next((trial for trial in live if trial.status == Trial.PENDING), None)

    def _judge(self, tune_controller: Any, index: int, current: Trial | None = None) -> None:
        """Decide each rung that all remaining trials of a bracket have reached, and stop the losers.

        The caller stops `current`, the trial that has just reported.
        """
        bracket = self._brackets[index]
        if len(bracket) < self.sizes[index] and not self._closed:
            return
        for rung in range(len(self.rungs)):
            candidates = [trial for trial in bracket if self._passed.get(trial, math.inf) <= rung]
            if any(self._passed[trial] < rung or trial not in self._waiting for trial in candidates):
                return
            # The sort is stable: among equal scores the earlier trial continues.
            candidates.sort(key=lambda trial: -self._waiting[trial])
            for i, trial in enumerate(candidates):
                del self._waiting[trial]
                if i < math.ceil(len(candidates) / self._reduction):
                    self._passed[trial] += 1
                    continue
                del self._passed[trial]
                if trial is not current:
                    tune_controller.stop_trial(trial)
