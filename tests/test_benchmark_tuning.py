"""What benchmarks/tuning.py makes of a search's record; that its searches run, and what they find, no test judges."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from ray_cxr.config import TrainSettings
from ray_cxr.tuning.space import Space

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tuning() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_tuning", ROOT / "benchmarks" / "tuning.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trial(number: int, epochs: int, auroc: float | None, state: str = "finished") -> dict[str, Any]:
    return {"number": number, "epochs": epochs, "auroc": auroc, "state": state, "settings": {}, "params": {}}


def search(*aurocs: float, epochs: int = 9) -> dict[str, Any]:
    return {"trials": [trial(number, epochs, auroc) for number, auroc in enumerate(aurocs)]}


def test_every_epoch_counts_and_a_failed_trial_is_no_incumbent(tuning: ModuleType) -> None:
    trials = [
        trial(0, 0, None, "failed"),
        trial(1, 3, 0.6, "stopped"),
        trial(2, 2, 0.9, "failed"),
        trial(3, 9, 0.7),
        trial(4, 1, 0.7, "stopped"),
    ]
    assert tuning.history(trials) == [
        {"trial": 0, "spent": 0, "best": None, "auroc": None},
        {"trial": 1, "spent": 3, "best": 1, "auroc": 0.6},
        {"trial": 2, "spent": 5, "best": 1, "auroc": 0.6},
        {"trial": 3, "spent": 14, "best": 3, "auroc": 0.7},
        {"trial": 4, "spent": 15, "best": 3, "auroc": 0.7},  # of equals the first, as in `tune`
    ]


def test_an_incumbent_is_of_a_trial_that_ended_within_the_budget(tuning: ModuleType) -> None:
    points = tuning.history([trial(0, 3, 0.6), trial(1, 9, 0.7), trial(2, 1, 0.8)])
    assert tuning.incumbent(points, 2) is None
    assert tuning.incumbent(points, 11.5)["best"] == 0
    assert tuning.incumbent(points, 12)["best"] == 1
    assert tuning.incumbent(points, 100)["best"] == 2
    assert tuning.reached(points, 0.7) == 12
    assert tuning.reached(points, 0.75) == 13
    assert tuning.reached(points, 0.9) is None


def test_winners_are_at_half_and_all_of_the_rivals_epochs(tuning: ModuleType) -> None:
    found = {
        "random": search(0.5, 0.8, 0.6, 0.7),
        "random-asha": search(0.6, 0.7, 0.75, 0.78, epochs=6),
        "tpe-asha": search(0.7, 0.8, 0.85, 0.9, epochs=6),
    }
    one = tuning.judged(found)
    assert one["budget"] == 36
    assert one["target"] == 0.8
    assert one["reached"] == {"random-asha": None, "tpe-asha": 12}
    assert {name: winner["best"] for name, winner in one["winners"].items()} == {
        "random": 1,
        "random-asha at half": 2,
        "random-asha at whole": 3,
        "tpe-asha at half": 2,
        "tpe-asha at whole": 3,
    }


def compared(tuning: ModuleType, seed: int, *tests: float) -> dict[str, Any]:
    """A search seed whose winners have these test AUROCs: of random, and of the others at half and whole."""
    found = {"random": search(0.5, 0.8), "random-asha": search(0.6, 0.7), "tpe-asha": search(0.8, 0.9)}
    one = {"seed": seed, "methods": found, **tuning.judged(found)}
    for winner, test in zip(one["winners"].values(), tests, strict=True):
        winner["test"] = test
    return one


def test_the_bar_is_the_median_of_the_searches_test_aurocs(tuning: ModuleType) -> None:
    searches = [
        compared(tuning, 0, 0.80, 0.7, 0.7, 0.81, 0.9),
        compared(tuning, 1, 0.82, 0.7, 0.7, 0.79, 0.9),
        compared(tuning, 2, 0.70, 0.7, 0.7, 0.80, 0.9),
    ]
    told = tuning.summary(searches)
    assert told["test"]["random"] == 0.80
    assert told["test"]["tpe-asha at half"] == 0.80
    assert told["met"] is True
    assert told["reached_part"] == {"random-asha": None, "tpe-asha": 0.5}
    assert told["difference"]["tpe-asha at half"]["not_below"] == 2
    assert told["difference"]["tpe-asha at half"]["median"] == pytest.approx(0.01)
    searches[0]["winners"]["tpe-asha at half"]["test"] = 0.78
    assert tuning.summary(searches)["met"] is False


def test_the_searches_are_shown_with_the_verdict(tuning: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    searches = [compared(tuning, 0, 0.80, 0.7, 0.7, 0.81, 0.9)]
    tuning.show_searches(
        Console(width=160), {"searches": searches, "summary": tuning.summary(searches), "fresh_seeds": 3}
    )
    shown = capsys.readouterr().out
    assert "not within 18" in shown
    assert "tpe-asha at half of random's epochs: test AUROC 0.8100 against random's 0.8000: met" in shown


def test_the_parts_of_a_trials_wall_time_add_up(tuning: ModuleType, tmp_path: Path) -> None:
    class Plan:
        def folder(self, number: int) -> Path:
            return tmp_path / str(number)

    rows = []
    for number, ended in ((1, 160.0), (0, 130.0)):
        folder = tmp_path / str(number)
        folder.mkdir()
        began = ended - 20
        times = {
            "Ray": began,
            "TensorFlow": began + 7,
            "data": began + 8,
            "network": began + 9,
            "first step": began + 11,
        }
        (folder / tuning.STARTED).write_text(json.dumps({"times": times}))
        (folder / tuning.METRICS).write_text("epoch\n")
        os.utime(folder / tuning.METRICS, (ended - 1.5, ended - 1.5))
        curve = [{"seconds": 4.0, "val_seconds": 1.0}, {"seconds": 3.0, "val_seconds": 0.5}]
        rows.append({"number": number, "ended": pd.Timestamp(ended, unit="s", tz="UTC"), "curve": curve})
    first, second = tuning.parts(Plan(), pd.DataFrame(rows), 100.0)
    known = {"training": 7.0, "validation": 1.5, "TensorFlow": 7.0, "network": 2.0, "between": 1.0, "end": 1.5}
    assert first == pytest.approx({"wall": 30.0, "start": 10.0, "overhead": 12.5, **known})
    assert second == pytest.approx({"wall": 30.0, "start": 10.0, "overhead": 12.5, **known})
    runs = [{"ahead": 1, "seconds": 61.0, "trials": [{**first, "overhead": 14.0}, second]}]
    told = tuning.overhead_summary(runs, 1)
    assert (told["first"], told["medians"]["overhead"], told["met"]) == (14.0, pytest.approx(12.5), False)
    assert told["whole"] == pytest.approx((61.0 - 35.0) / 2)


def test_the_space_is_one_that_tune_takes(tuning: ModuleType) -> None:
    for table in (tuning.SPACE, tuning.OVERHEAD_SPACE):
        assert Space.read(table, tuning.base_settings(9), (tuning.SIZE,)).fields
    assert isinstance(tuning.base_settings(9), TrainSettings)


def test_wrong_arguments_are_refused(tuning: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--work", "w", "--trials", "0"], ["--work", "w", "--overhead", "--trials", "1"]):
        with pytest.raises(SystemExit) as stop:
            tuning.parse(words)
        assert stop.value.code == 2
    capsys.readouterr()
    given = tuning.parse(["--work", "w"])
    assert (given.seeds, given.trials, given.asha_trials, given.retrain) == (5, 20, 80, 3)
