"""What ends trials early, without Ray: halving in a simulated Tune, and schedulers told of earlier trials."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.experiment import Trial

from ray_cxr.config import TuneSettings
from ray_cxr.tuning.halving import Halving
from ray_cxr.tuning.search import METRIC, scheduler

PENDING, RUNNING, PAUSED, ERROR, OVER = Trial.PENDING, Trial.RUNNING, Trial.PAUSED, Trial.ERROR, Trial.TERMINATED


@dataclass(eq=False)
class Fake:
    """A trial as a scheduler sees it.

    Attributes:
        score: what it reports, the same at every epoch.
        known: epochs that it had behind it when it was added.
        done: epochs that it has done in all its lives; `at`: that it has reported in this one.
        fate: of its process at so many epochs: `lost` once, or `failed`.
    """

    number: int
    score: float
    known: int = 0
    fate: tuple[str, int] | None = None
    status: str = PENDING
    done: int = 0
    at: int = 0
    starts: int = 0
    seen: list[int] = field(default_factory=list)

    @property
    def trial_id(self) -> str:
        return f"t{self.number}"


class Tune:
    """Ray Tune's controller, as far as a scheduler knows it: `order` chooses which running trial reports next."""

    def __init__(self, made: Halving, trials: Sequence[Fake], epochs: int, most: int, order: Sequence[int]) -> None:
        self.made, self.coming, self.epochs, self.most = made, list(trials), epochs, most
        self.trials: list[Fake] = []
        self.order = list(order)
        self.crowd = 0
        #: So many trials come, and then no more.
        self.comes = len(trials)

    def stop_trial(self, trial: Fake) -> None:
        """As TuneController.stop_trial."""
        if trial.status in (ERROR, OVER):
            return
        if trial.status in (PENDING, PAUSED):
            self.made.on_trial_remove(self, trial)
        else:
            self.made.on_trial_complete(self, trial, {})
        trial.status = OVER

    def run(self) -> None:
        for step in range(10_000):
            if len(self.trials) == self.comes:
                self.coming = []
                self.made.no_more()
            if self.coming and self.made.room():
                self.trials.append(self.coming.pop(0))
                self.made.on_trial_add(self, self.trials[-1])
            chosen = self.made.choose_trial_to_run(self)
            assert chosen is None or chosen.status in (PENDING, PAUSED)
            assert chosen is self.made.choose_trial_to_run(self)
            if chosen is not None:
                chosen.status, chosen.at = RUNNING, 0
                chosen.starts += 1
            running = [trial for trial in self.trials if trial.status == RUNNING]
            self.crowd = max(self.crowd, sum(trial.status in (RUNNING, PENDING) for trial in self.trials))
            if running:
                self.report(running[self.order[step % len(self.order)] % len(running)])
            elif all(trial.status in (OVER, ERROR) for trial in self.trials) and not self.coming:
                return
            else:
                assert chosen is not None or (self.coming and self.made.room()), "nothing runs, and nothing will"
        raise AssertionError("no end")

    def report(self, trial: Fake) -> None:
        if trial.fate and trial.at + 1 == trial.fate[1] and trial.at + 1 > trial.done:
            if trial.fate[0] == "lost":
                trial.fate, trial.status = None, ERROR
                self.made.on_trial_error(self, trial)
                trial.status = PENDING
                self.made.on_trial_add(self, trial)
            else:
                self.made.on_trial_error(self, trial)
                trial.status = ERROR
            return
        if trial.at == self.epochs:
            self.stop_trial(trial)
            return
        trial.at += 1
        trial.done = max(trial.done, trial.at)
        trial.seen.append(trial.at)
        decision = self.made.on_trial_result(self, trial, {"epoch": trial.at, METRIC: trial.score})
        if decision == "STOP":
            self.stop_trial(trial)
        elif decision == "PAUSE":
            trial.status = PAUSED


def halving(trials: int, epochs: int, *, grace: int = 1, reduction: int = 3, most: int = 2) -> Halving:
    return Halving(
        metric=METRIC,
        time_attr="epoch",
        epochs=epochs,
        grace=grace,
        reduction=reduction,
        trials=trials,
        most=most,
        known=lambda trial: trial.known,
    )


def test_nine_trials_by_thirds() -> None:
    made = halving(9, 9)
    assert made.rungs == [1, 3]
    trials = [Fake(number, score / 10) for number, score in enumerate([5, 1, 9, 3, 8, 2, 7, 4, 6])]
    tune = Tune(made, trials, 9, 2, [0, 1, 1, 0])
    tune.run()
    assert [trial.done for trial in trials] == [1, 1, 9, 1, 3, 1, 3, 1, 1]
    assert tune.crowd <= 2
    # A process for the first rung, one after it, one after the second; who comes last to a rung need not wait.
    assert trials[2].starts <= 3
    assert all(trial.starts == 1 for trial in trials if trial.done == 1)


@pytest.mark.parametrize(
    ("trials", "epochs", "grace", "reduction", "rungs", "sizes"),
    [
        (20, 10, 1, 3, [1, 3, 9], [20]),
        (20, 4, 1, 3, [1, 3], [7, 7, 6]),
        (9, 3, 1, 3, [1], [3, 3, 3]),
        (4, 3, 1, 3, [1], [2, 2]),
        (1, 10, 1, 3, [1, 3, 9], [1]),
        (3, 5, 5, 3, [], [1, 1, 1]),
        (8, 16, 2, 2, [2, 4, 8], [8]),
    ],
)
def test_rungs_and_brackets(
    trials: int, epochs: int, grace: int, reduction: int, rungs: list[int], sizes: list[int]
) -> None:
    made = halving(trials, epochs, grace=grace, reduction=reduction)
    assert (made.rungs, made.sizes) == (rungs, sizes)


FATES = st.none() | st.tuples(st.sampled_from(["lost", "failed"]), st.integers(1, 9))
FAKES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), FATES), min_size=1, max_size=14)


@settings(max_examples=200, deadline=None)
@given(
    given_trials=FAKES,
    epochs=st.integers(1, 9),
    grace=st.integers(1, 9),
    reduction=st.integers(2, 4),
    most=st.integers(1, 5),
    order=st.lists(st.integers(0, 20), min_size=1, max_size=40),
)
def test_whatever_happens_to_trials_each_rung_keeps_its_share(
    given_trials: list[tuple[int, int, tuple[str, int] | None]],
    epochs: int,
    grace: int,
    reduction: int,
    most: int,
    order: list[int],
) -> None:
    """Processes are lost, trials fail, some have epochs behind them from an earlier run of the command."""
    grace = min(grace, epochs)
    trials = [
        Fake(number, score / 10, min(known, epochs - 1) if number < 3 else 0, fate)
        for number, (score, known, fate) in enumerate(given_trials)
    ]
    for trial in trials:
        trial.done = trial.known
    made = halving(len(trials), epochs, grace=grace, reduction=reduction, most=most)
    tune = Tune(made, trials, epochs, most, order)
    tune.run()
    assert tune.crowd <= most
    assert made.room()
    bracket = 0
    for size in made.sizes:
        here, bracket = trials[bracket : bracket + size], bracket + size
        # Those that failed had no say wherever they did not come to.
        for trial in here:
            if trial.status == OVER:
                assert trial.done in (*made.rungs, epochs)
                assert trial.seen[-1] == trial.done
        for rung in made.rungs:
            came = [t for t in here if t.done >= rung and t.known <= rung]
            if any(t.status == ERROR for t in here):
                continue
            further = [t for t in came if t.done > rung]
            assert len(further) == math.ceil(len(came) / reduction)
            stopped = [t.score for t in came if t.done == rung]
            assert not stopped or max(stopped) <= min(t.score for t in further)
    for trial in trials:
        if not trial.fate or trial.fate[0] == "failed":
            # No more processes than rungs that it had to wait at.
            assert trial.starts <= 1 + len(made.rungs) + (given_trials[trial.number][2] is not None)


@pytest.mark.parametrize("comes", range(1, 9))
def test_those_that_wait_go_on_when_no_more_will_come(comes: int) -> None:
    made = halving(9, 9)
    trials = [Fake(number, score / 10) for number, score in enumerate([5, 1, 9, 3, 8, 2, 7, 4, 6])]
    tune = Tune(made, trials, 9, 2, [0, 1, 1])
    tune.comes = comes
    tune.run()
    done = Counter(trial.done for trial in trials[:comes])
    further = math.ceil(comes / 3)
    last = math.ceil(further / 3)
    assert done == Counter({1: comes - further, 3: further - last, 9: last})
    best = max(range(comes), key=lambda number: trials[number].score)
    assert trials[best].done == 9


def test_a_score_that_is_no_number_is_the_worst() -> None:
    trials = [Fake(0, math.nan), Fake(1, 0.1), Fake(2, math.nan)]
    Tune(halving(3, 2), trials, 2, 3, [0, 1, 2]).run()
    assert [trial.done for trial in trials] == [1, 2, 1]


# Schedulers that are told of trials that an earlier run brought to an end


def curve(*aurocs: float) -> list[dict[str, float]]:
    return [{"epoch": epoch, METRIC: auroc} for epoch, auroc in enumerate(aurocs, 1)]


def decisions(chosen: str, earlier: dict[int, list[dict[str, float]]], *aurocs: float, **more: int) -> list[str]:
    """What the scheduler says to a new trial, until it stops it."""
    made = scheduler(TuneSettings(scheduler=chosen, **more), 9, earlier, trials=1, most=1)
    trial, said = Fake(0, 0.0, status=RUNNING), []
    made.on_trial_add(None, trial)
    for report in curve(*aurocs):
        said.append(made.on_trial_result(None, trial, report))
        if said[-1] == "STOP":
            break
    return said


def test_asha_knows_the_rungs_of_earlier_trials() -> None:
    earlier = {0: curve(0.8, 0.8, 0.9), 1: curve(0.5), 2: curve(0.7)}
    assert decisions("asha", earlier, 0.6) == ["STOP"]
    assert decisions("asha", {}, 0.6) == ["CONTINUE"]
    # The third of three is above the cut at the first rung and below it at the second.
    assert decisions("asha", earlier, 0.79, 0.79, 0.89) == ["CONTINUE", "CONTINUE", "STOP"]
    assert decisions("asha", earlier, 0.81, 0.9, 0.91, 0.91) == ["CONTINUE"] * 4
    assert decisions("asha", earlier, 0.6, 0.6, grace_epochs=2) == ["CONTINUE", "STOP"]


def test_the_median_knows_earlier_trials() -> None:
    earlier = {number: curve(0.6, 0.7, 0.8) for number in range(3)}
    # Below the median of the others' means so far: 0.6, then 0.65.
    assert decisions("median", earlier, 0.5) == ["STOP"]
    assert decisions("median", earlier, 0.64, 0.64) == ["CONTINUE", "STOP"]
    assert decisions("median", earlier, 0.7, 0.7, 0.7, 0.7) == ["CONTINUE"] * 4
    del earlier[0]
    assert decisions("median", earlier, 0.1, 0.1, 0.1) == ["CONTINUE"] * 3  # two are too few


def test_none_stops_nothing() -> None:
    earlier = {number: curve(0.9) for number in range(9)}
    assert Counter(decisions("none", earlier, *[0.1] * 9)) == {"CONTINUE": 9}
