"""Machines that go away and workers that hang, without Ray: when a checkpoint is due, and when a worker ends itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ray_cxr.config import TrainSettings, build
from ray_cxr.errors import ConfigError
from ray_cxr.training import preemption, watchdog


class Clock:
    """Time that only the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def watch(monkeypatch: pytest.MonkeyPatch, answers: list[object]) -> tuple[preemption.PreemptionWatch, Clock, list]:
    """Return a watch on one worker, its clock, and the times at which it asked; `answers` ends with the last answer."""
    clock, asked = Clock(), []
    monkeypatch.setattr(preemption, "time", clock)

    def ask() -> object:
        asked.append(clock.now)
        return answers.pop(0) if len(answers) > 1 else answers[0]

    replicas = SimpleNamespace(gather=lambda array: np.asarray(array)[None])
    return preemption.PreemptionWatch(replicas, ask), clock, asked


def test_workers_ask_every_few_seconds_and_not_at_every_step(monkeypatch) -> None:
    found, clock, asked = watch(monkeypatch, [None])
    for _ in range(1000):
        clock.now += 0.1
        assert not found.is_due()
    seconds = np.diff(asked)
    assert 10 < len(asked) < 30
    assert seconds[3:].max() <= 2 * preemption.ASK_EVERY_S


def test_a_machine_that_goes_away_costs_seconds(monkeypatch) -> None:
    """A checkpoint at once, then again and again, but never most of the time."""
    found, clock, _ = watch(monkeypatch, [None, None, "a node is drained"])
    saved = []
    for _ in range(600):
        clock.now += 0.2
        if found.is_due():
            saved.append(clock.now)
            clock.now += 3.0
            found.record_save(3.0)
    gaps = np.diff(saved)
    assert saved[0] < 1000 + 20
    assert 12 < gaps.min() <= gaps.max() < 30


@pytest.mark.slow
@pytest.mark.parametrize("beats", [0, 1])
def test_a_worker_that_waits_in_vain_ends_itself_and_says_so(beats: int, tmp_path: Path) -> None:
    """With `beats` the main thread makes progress all the time, so nothing happens."""
    program = (
        "import sys, time; from pathlib import Path; from ray_cxr.training.watchdog import Watchdog\n"
        "dog = Watchdog(1.0, Path(sys.argv[1]), 0, 3).__enter__()\n"
        f"for _ in range(25):\n    time.sleep(0.1)\n    dog.beat() if {beats} else None\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60, check=False)
    notes = watchdog.read_stalled(tmp_path)
    assert (done.returncode, len(notes)) == ((0, 0) if beats else (watchdog.EXIT_CODE, 1))
    if notes:
        line = watchdog.explain_stalled([*notes, {**notes[0], "rank": 2}])
        assert "worker 1 " in line, "the worker that left no note is the one that hangs"
        assert watchdog.read_stalled(tmp_path) == [], "a note is read once"


@pytest.mark.parametrize(("text", "expected"), [("2-8", (2, 8)), ("4", (None, 4)), ("3-3", (3, 3))])
def test_workers_may_be_a_range(text: str, expected: tuple[int | None, int]) -> None:
    settings = build(TrainSettings, {"workers": text})
    assert (settings.min_workers, settings.workers) == expected
    assert settings.replace(epochs=3).min_workers == expected[0]


@pytest.mark.parametrize("text", ["8-2", "2-", "0-3", "two"])
def test_other_ranges_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="workers"):
        build(TrainSettings, {"workers": text})
