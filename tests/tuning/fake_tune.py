"""A stand-in for Ray Tune's controller: it calls schedulers, searchers and callbacks as Tune does, in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.search import Searcher

Reports = Iterator[dict[str, Any]]


class ProcessLostError(Exception):
    """Tune restarts the process of the trial."""


class ProcessFailedError(Exception):
    """Tune gives the trial up."""


@dataclass(eq=False)
class FakeTrial:
    """A trial as schedulers and callbacks see it; `process` yields its reports."""

    trial_id: str
    config: Any
    status: str = Trial.PENDING
    last_result: dict[str, Any] = field(default_factory=dict)
    process: Reports | None = None
    starts: int = 0


@dataclass
class FakeTune:
    """Run trials, one report at a time."""

    scheduler: Any
    searcher: Any
    callback: Any
    start: Callable[[FakeTrial], Reports]  # the last report has `ended` or `failure`
    order: Sequence[int] = (0,)  # which of the running trials reports next
    processes: int = 1_000  # maximum number of trials at a time
    trials: list[FakeTrial] = field(default_factory=list)
    most_alive: int = 0  # largest number of trials that were alive at a time

    def get_trials(self) -> list[FakeTrial]:
        return self.trials

    def stop_trial(self, trial: FakeTrial) -> None:
        if trial.status == Trial.RUNNING:
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
        else:
            self.scheduler.on_trial_remove(self, trial)
        trial.status = Trial.TERMINATED
        self.callback.on_trial_complete(0, self.trials, trial)

    def alive(self) -> list[FakeTrial]:
        return [trial for trial in self.trials if trial.status in (Trial.RUNNING, Trial.PENDING)]

    def run(self, count: int) -> None:
        """Run up to `count` trials to their ends, or until Ctrl-C."""
        with contextlib.suppress(KeyboardInterrupt):
            for step in range(10_000):
                if len(self.trials) < count and len(self.alive()) < self.processes:
                    config = self.searcher.suggest(f"t{len(self.trials)}")
                    if config == Searcher.FINISHED:
                        count = len(self.trials)
                    elif config is not None:
                        self.trials.append(FakeTrial(f"t{len(self.trials)}", config))
                        self.scheduler.on_trial_add(self, self.trials[-1])
                chosen = self.scheduler.choose_trial_to_run(self)
                if chosen is not None:
                    assert chosen.status in (Trial.PENDING, Trial.PAUSED)
                    chosen.status, chosen.process = Trial.RUNNING, self.start(chosen)
                    chosen.starts += 1
                    self.callback.on_trial_start(0, self.trials, chosen)
                self.most_alive = max(self.most_alive, len(self.alive()))
                running = [trial for trial in self.trials if trial.status == Trial.RUNNING]
                if running:
                    self.advance(running[self.order[step % len(self.order)] % len(running)])
                elif len(self.trials) >= count:
                    assert all(trial.status in (Trial.TERMINATED, Trial.ERROR) for trial in self.trials)
                    return
            raise AssertionError("the search does not end")

    def advance(self, trial: FakeTrial) -> None:
        """Take the next report of a trial."""
        assert trial.process is not None
        try:
            result = next(trial.process)
        except ProcessLostError:
            trial.status = Trial.ERROR
            self.scheduler.on_trial_error(self, trial)
            trial.status = Trial.PENDING
            self.scheduler.on_trial_add(self, trial)
            return
        except ProcessFailedError:
            self.scheduler.on_trial_error(self, trial)
            trial.status = Trial.ERROR
            return
        is_last = "ended" in result or "failure" in result
        decision = "STOP" if is_last else self.scheduler.on_trial_result(self, trial, result)
        if decision != "STOP":
            self.searcher.on_trial_result(trial.trial_id, result)
        self.callback.on_trial_result(0, self.trials, trial, result)
        trial.last_result = result
        if decision == "STOP":
            self.stop_trial(trial)
        elif decision == "PAUSE":
            trial.status = Trial.PAUSED
