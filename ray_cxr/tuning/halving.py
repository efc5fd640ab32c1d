"""Synchronous successive halving (Jamieson & Talwalkar 2016) as a scheduler of Ray Tune.

Ray's own HyperBandScheduler is not used: its first bracket halves nothing, it knows no grace, and it judges whoever has
come to a rung as soon as all trials that were begun have, which is never a whole bracket where fewer trials run at a
time than the bracket has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler


class Halving(FIFOScheduler):
    """Trials of a bracket wait at each rung for all others, one in so many goes on, and the rest is stopped.

    A trial that waits holds nothing: its process is ended, and a new one goes on from its folder. So a bracket may have
    more trials than run at a time, and `room` takes the place of Ray's limit, which would count those that wait.

    Args:
        metric, time_attr: names in reports; more is better.
        epochs: of a whole trial.
        grace: the first rung.
        reduction: one in so many goes on, so much longer.
        trials: how many will come in all.
        most: processes at a time.
        known: how many epochs a trial has behind it when it is added.
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
        known: Callable[[Trial], int],
    ) -> None:
        super().__init__()
        self._metric, self._time_attr = metric, time_attr
        self._reduction, self._most, self._known = reduction, most, known
        self.rungs: list[int] = []
        while grace < epochs:
            self.rungs.append(grace)
            grace *= reduction
        #: Trials of each bracket: so few brackets that the best of each comes to its end, and all as large.
        count = math.ceil(trials / reduction ** len(self.rungs))
        self.sizes = [trials // count + (place < trials % count) for place in range(count)]
        self._brackets: list[list[Trial]] = [[]]
        self._closed = False
        self._bracket_of: dict[Trial, int] = {}
        #: Of the trials that are not over: how many rungs they have passed, and their scores at the one they wait at.
        self._passed: dict[Trial, int] = {}
        self._waits: dict[Trial, float] = {}

    def room(self) -> bool:
        """Whether another trial may begin beside those that run or are about to."""
        return len(self._passed) - len(self._waits) < self._most

    def no_more(self) -> None:
        """Fewer trials come than were to come: those that wait need not wait for them."""
        self._closed = True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """A trial is new, or its process was lost and it comes again."""
        if trial in self._bracket_of:
            return
        if len(self._brackets[-1]) == self.sizes[len(self._brackets) - 1]:
            self._brackets.append([])
        self._brackets[-1].append(trial)
        self._bracket_of[trial] = len(self._brackets) - 1
        known = self._known(trial)
        self._passed[trial] = sum(rung < known for rung in self.rungs)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """At a rung a trial waits, goes on or is stopped."""
        passed = self._passed[trial]
        if passed == len(self.rungs) or result[self._time_attr] < self.rungs[passed]:
            return TrialScheduler.CONTINUE
        score = float(result[self._metric])
        self._waits[trial] = -math.inf if math.isnan(score) else score
        self._judge(tune_controller, self._bracket_of[trial], trial)
        if trial in self._waits:
            return TrialScheduler.PAUSE
        return TrialScheduler.CONTINUE if trial in self._passed else TrialScheduler.STOP

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """A trial came to its end, or was stopped."""
        self.on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A trial failed; one that is to be started again has the status of an error already."""
        if trial.status != Trial.ERROR:
            self.on_trial_remove(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """A trial is over: the others of its bracket need not wait for it."""
        self._waits.pop(trial, None)
        if self._passed.pop(trial, None) is not None:
            self._judge(tune_controller, self._bracket_of[trial])

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Trials that go on after a rung come before new ones."""
        if self._closed:
            self._judge(tune_controller, len(self._brackets) - 1)
        live = [trial for trial in self._passed if trial.status in (Trial.PENDING, Trial.RUNNING)]
        if len(live) < self._most:
            for trial in self._passed:
                if trial.status == Trial.PAUSED and trial not in self._waits:
                    return trial
        return next((trial for trial in live if trial.status == Trial.PENDING), None)

    def _judge(self, tune_controller: Any, place: int, current: Trial | None = None) -> None:
        """Decide at every rung of a bracket that all who may come to it have come to; stop those that go no further.

        Args:
            tune_controller: Tune's.
            place: of the bracket.
            current: the trial that is being reported, which its caller stops.
        """
        if len(self._brackets[place]) < self.sizes[place] and not self._closed:
            return
        for rung in range(len(self.rungs)):
            left = [trial for trial in self._brackets[place] if self._passed.get(trial, math.inf) <= rung]
            if any(self._passed[trial] < rung or trial not in self._waits for trial in left):
                return
            # Of equals the earlier.
            left.sort(key=lambda trial: -self._waits[trial])
            for i, trial in enumerate(left):
                del self._waits[trial]
                if i < math.ceil(len(left) / self._reduction):
                    self._passed[trial] += 1
                    continue
                del self._passed[trial]
                if trial is not current:
                    tune_controller.stop_trial(trial)
