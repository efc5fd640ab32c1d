"""Early stopping without Ray: halving in a simulated Tune, and schedulers that know the trials of an earlier run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock

import pytest
from fake_tune import FakeTrial, FakeTune, ProcessFailedError, ProcessLostError, Reports
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from ray_cxr.config import TuneSettings
from ray_cxr.tuning.halving import Halving
from ray_cxr.tuning.records import METRIC
from ray_cxr.tuning.schedulers import create_scheduler


@dataclass
class History:
    """What happens to a trial."""

    score: float  # at every epoch
    known: int = 0  # epochs of an earlier run
    fate: tuple[str, int] | None = None  # `lost` (once) or `failed`, and the epoch at which that happens
    done: int = 0  # epochs of all its processes
    last: int = 0  # the last epoch that it reported

    def reports(self, epochs: int) -> Reports:
        for epoch in range(1, epochs + 1):
            if self.fate and epoch == self.fate[1] > self.done:
                if self.fate[0] == "failed":
                    raise ProcessFailedError
                self.fate = None
                raise ProcessLostError
            self.last, self.done = epoch, max(self.done, epoch)
            yield {"epoch": epoch, METRIC: self.score}
        yield {"epoch": epochs, METRIC: self.score, "ended": 1}


class Queue:
    """A searcher that suggests the histories of a list, as `StudySearcher` does with halving."""

    def __init__(self, halving: Halving, histories: Sequence[History]) -> None:
        self.halving, self.left = halving, list(histories)

    def suggest(self, trial_id: str) -> History | str | None:
        if not self.left:
            self.halving.close()
            return Searcher.FINISHED
        return self.left.pop(0) if self.halving.has_capacity() else None

    def on_trial_result(self, trial_id: str, result: dict[str, float]) -> None:
        """Nothing: halving alone decides."""


def run_halving(
    halving: Halving, histories: Sequence[History], epochs: int, order: Sequence[int], count: int
) -> FakeTune:
    """Run a search of up to `count` trials, with these histories."""
    queue = Queue(halving, histories)
    tune = FakeTune(halving, queue, MagicMock(), lambda trial: trial.config.reports(epochs), order)
    tune.run(count)
    assert halving.has_capacity()
    return tune


def make_halving(trials: int, epochs: int, *, grace: int = 1, reduction: int = 3, processes: int = 2) -> Halving:
    settings = TuneSettings(grace_epochs=grace, reduction_factor=reduction)
    return Halving(settings, epochs, trials, processes, lambda trial: trial.config.known)


@pytest.mark.parametrize("count", range(1, 10))
def test_a_third_of_the_trials_passes_each_rung(count: int) -> None:
    """Also where fewer trials come than were planned."""
    histories = [History(score / 10) for score in [5, 1, 9, 3, 8, 2, 7, 4, 6][:count]]
    tune = run_halving(make_halving(9, 9), histories, 9, [0, 1, 1, 0], 9)
    passed = math.ceil(count / 3)
    finished = math.ceil(passed / 3)
    assert Counter(one.done for one in histories) == Counter({1: count - passed, 3: passed - finished, 9: finished})
    assert max(histories, key=lambda one: one.score).done == 9
    for trial in tune.trials:
        assert trial.starts <= (1 if trial.config.done == 1 else 3)  # at most one process per rung
    assert tune.most_alive <= 2


@pytest.mark.parametrize(
    ("trials", "epochs", "grace", "reduction", "rungs", "sizes"),
    [
        (20, 10, 1, 3, [1, 3, 9], [20]),
        (20, 4, 1, 3, [1, 3], [7, 7, 6]),
        (9, 3, 1, 3, [1], [3, 3, 3]),
        (1, 10, 1, 3, [1, 3, 9], [1]),
        (3, 5, 5, 3, [], [1, 1, 1]),
        (8, 16, 2, 2, [2, 4, 8], [8]),
    ],
)
def test_rungs_and_brackets(trials: int, epochs: int, grace: int, reduction: int, rungs: Any, sizes: Any) -> None:
    halving = make_halving(trials, epochs, grace=grace, reduction=reduction)
    assert (halving.rungs, halving.sizes) == (rungs, sizes)


FATES = st.none() | st.tuples(st.sampled_from(["lost", "failed"]), st.integers(1, 9))
DRAWN = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), FATES), min_size=1, max_size=14)
ORDERS = st.lists(st.integers(0, 20), min_size=1, max_size=40)


@settings(max_examples=100)
@given(DRAWN, st.integers(1, 9), st.integers(1, 9), st.integers(2, 4), st.integers(1, 5), ORDERS)
def test_each_rung_keeps_its_share_with_lost_failed_and_resumed_trials(
    drawn: list[Any], epochs: int, grace: int, reduction: int, processes: int, order: list[int]
) -> None:
    histories = [History(score / 10, known, fate) for score, known, fate in drawn]
    for number, one in enumerate(histories):
        one.known = one.done = min(one.known, epochs - 1) if number < 3 else 0
    halving = make_halving(len(histories), epochs, grace=min(grace, epochs), reduction=reduction, processes=processes)
    tune = run_halving(halving, histories, epochs, order, len(histories))
    assert tune.most_alive <= processes
    start = 0
    for size in halving.sizes:
        bracket, start = tune.trials[start : start + size], start + size
        for trial in bracket:
            if trial.status == Trial.TERMINATED:
                assert trial.config.last == trial.config.done
                assert trial.config.done in (*halving.rungs, epochs)
        if any(trial.status == Trial.ERROR for trial in bracket):
            continue
        for rung in halving.rungs:
            judged = [trial.config for trial in bracket if trial.config.done >= rung >= trial.config.known]
            passed = [one.score for one in judged if one.done > rung]
            stopped = [one.score for one in judged if one.done == rung]
            assert len(passed) == math.ceil(len(judged) / reduction)
            assert not stopped or max(stopped) <= min(passed)
    for trial, (_, _, fate) in zip(tune.trials, drawn, strict=True):
        if fate is None:
            assert trial.starts <= 1 + len(halving.rungs)


def test_a_score_that_is_not_a_number_is_the_worst() -> None:
    histories = [History(math.nan), History(0.1), History(math.nan)]
    run_halving(make_halving(3, 2, processes=3), histories, 2, [0, 1, 2], 3)
    assert [one.done for one in histories] == [1, 2, 1]


THREE = ([0.8, 0.8, 0.9], [0.5], [0.7])
EQUAL = ([0.6, 0.7, 0.8],) * 3


@pytest.mark.parametrize(
    ("chosen", "grace", "earlier", "aurocs", "stop"),
    [
        ("asha", 1, THREE, [0.6], 1),
        ("asha", 1, (), [0.6], None),
        ("asha", 1, THREE, [0.79, 0.79, 0.89], 3),  # above the cut of the first rung, below that of the second
        ("asha", 1, THREE, [0.81, 0.9, 0.91, 0.91], None),
        ("asha", 2, THREE, [0.6, 0.6], 2),
        ("median", 1, EQUAL, [0.5], 1),
        ("median", 1, EQUAL, [0.64, 0.64], 2),  # the medians of the means so far: 0.6, then 0.65
        ("median", 1, EQUAL, [0.7, 0.7, 0.7, 0.7], None),
        ("median", 1, EQUAL[:2], [0.1, 0.1, 0.1], None),  # two trials are too few
        ("none", 1, THREE, [0.1] * 9, None),
    ],
)
def test_schedulers_know_the_trials_of_an_earlier_run(
    chosen: str, grace: int, earlier: Sequence[list[float]], aurocs: list[float], stop: int | None
) -> None:
    curves = [[{"epoch": epoch, METRIC: value} for epoch, value in enumerate(row, 1)] for row in (*earlier, aurocs)]
    settings = TuneSettings(scheduler=chosen, grace_epochs=grace)
    made = create_scheduler(settings, 9, dict(enumerate(curves[:-1])), trials=1, processes=1)
    trial = FakeTrial("t0", None, Trial.RUNNING)
    made.on_trial_add(None, trial)
    decisions = [made.on_trial_result(None, trial, report) for report in curves[-1]]
    assert decisions == ["CONTINUE"] * (len(aurocs) - (stop is not None)) + ["STOP"] * (stop is not None)
