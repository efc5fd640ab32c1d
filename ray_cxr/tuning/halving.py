"""Synchronous successive halving (Jamieson & Talwalkar 2016) as a scheduler of Ray Tune.

It replaces Ray's HyperBandScheduler, whose first bracket halves nothing and which has no grace period. That scheduler
also judges a rung as soon as all started trials have reached it; if fewer trials run at a time than a bracket has, this
is never a whole bracket.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler


class Halving(FIFOScheduler):
    """Trials wait at each rung for their whole bracket; one in `reduction` continues, and the others are stopped.

    A waiting trial holds no resources: its process ends, and a new process continues in its folder. A bracket may thus
    have more trials than run at a time. `has_capacity` replaces Ray's limit, which would count waiting trials.

    Args:
        metric, time_attr: names in reports; a higher metric is better.
        epochs, grace: of a complete trial, and of the first rung; each next rung is `reduction` times as long.
        trials, most: number of trials expected, and maximum number of processes.
        count_epochs: returns how many epochs a trial had completed when it was added.
    """

    _supports_buffered_results = False

    def __init__(
        self,
        *,
        metric: str,
        time_attr: str,
        epochs: int,
        grace: int,
        reduction: int,
        trials: int,
        most: int,
        count_epochs: Callable[[Trial], int],
    ) -> None:
        super().__init__()
        self._metric, self._time_attr = metric, time_attr
        self._reduction, self._most, self._count_epochs = reduction, most, count_epochs
        self.rungs: list[int] = []
        while grace < epochs:
            self.rungs.append(grace)
            grace *= reduction
        #: Trials per bracket. The number of brackets lets the best trial of each finish; their sizes are equal.
        count = math.ceil(trials / reduction ** len(self.rungs))
        self.sizes = [trials // count + (place < trials % count) for place in range(count)]
        self._brackets: list[list[Trial]] = [[]]
        self._closed = False
        self._bracket_of: dict[Trial, int] = {}
        #: For trials that have not ended: the number of rungs passed, and the score at the rung where they wait.
        self._passed: dict[Trial, int] = {}
        self._waiting: dict[Trial, float] = {}

    def has_capacity(self) -> bool:
        """Return whether another trial may start."""
        return len(self._passed) - len(self._waiting) < self._most

    def close(self) -> None:
        """Stop waiting for trials that have not been added: none will be."""
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
        """Pause, continue or stop a trial at a rung; continue it elsewhere."""
        passed = self._passed[trial]
        if passed == len(self.rungs) or result[self._time_attr] < self.rungs[passed]:
            return TrialScheduler.CONTINUE
        score = float(result[self._metric])
        self._waiting[trial] = -math.inf if math.isnan(score) else score
        self._judge(tune_controller, self._bracket_of[trial], trial)
        if trial in self._waiting:
            return TrialScheduler.PAUSE
        return TrialScheduler.CONTINUE if trial in self._passed else TrialScheduler.STOP

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self.on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Remove a failed trial; one that Tune restarts already has the status of an error."""
        if trial.status != Trial.ERROR:
            self.on_trial_remove(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Remove a trial that has ended, so that its bracket no longer waits for it."""
        self._waiting.pop(trial, None)
        if self._passed.pop(trial, None) is not None:
            self._judge(tune_controller, self._bracket_of[trial])

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return the next trial to run: those that passed a rung come before new ones."""
        if self._closed:
            self._judge(tune_controller, len(self._brackets) - 1)
        live = [trial for trial in self._passed if trial.status in (Trial.PENDING, Trial.RUNNING)]
        if len(live) < self._most:
            for trial in self._passed:
                if trial.status == Trial.PAUSED and trial not in self._waiting:
                    return trial
        return next((trial for trial in live if trial.status == Trial.PENDING), None)

    def _judge(self, tune_controller: Any, place: int, current: Trial | None = None) -> None:
        """Decide every rung of a bracket that all its remaining trials have reached, and stop the losers.

        The caller stops `current`, the trial that has just reported.
        """
        if len(self._brackets[place]) < self.sizes[place] and not self._closed:
            return
        for rung in range(len(self.rungs)):
            candidates = [trial for trial in self._brackets[place] if self._passed.get(trial, math.inf) <= rung]
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
