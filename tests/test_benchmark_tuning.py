"""benchmarks/tuning.py: what it computes from the records of searches, and its command line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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


def test_the_incumbent_is_the_best_trial_that_ended_within_the_budget(tuning: ModuleType) -> None:
    trials = [trial(0, 0, None, "failed"), trial(1, 3, 0.6, "stopped"), trial(2, 2, 0.9, "failed")]
    points = tuning.history([*trials, trial(3, 9, 0.7), trial(4, 1, 0.7, "stopped"), trial(5, 1, 0.8)])
    # Every epoch counts, a failed trial is no incumbent, and of equals the first stays.
    assert [point["spent"] for point in points] == [0, 3, 5, 14, 15, 16]
    assert [point["best"] for point in points] == [None, 1, 1, 3, 3, 5]
    assert [point["auroc"] for point in points] == [None, 0.6, 0.6, 0.7, 0.7, 0.8]
    assert tuning.incumbent(points, 2) is None
    assert tuning.incumbent(points, 13.5)["best"] == 1
    assert tuning.incumbent(points, 14)["best"] == 3
    assert tuning.incumbent(points, 100)["best"] == 5
    assert [tuning.reached(points, auroc) for auroc in (0.7, 0.75, 0.95)] == [14, 16, None]


def test_winners_are_those_at_half_and_all_of_the_epochs_of_random_search(tuning: ModuleType) -> None:
    asha = {"random-asha": search(0.6, 0.7, 0.75, 0.78, epochs=6), "tpe-asha": search(0.7, 0.8, 0.85, 0.9, epochs=6)}
    judged = tuning.judged({"random": search(0.5, 0.8, 0.6, 0.7), **asha})
    assert (judged["budget"], judged["target"]) == (36, 0.8)
    assert judged["reached"] == {"random-asha": None, "tpe-asha": 12}
    winners = {name: winner["best"] for name, winner in judged["winners"].items()}
    assert winners.pop("random") == 1
    assert winners == {f"{name} at {part}": best for name in asha for part, best in (("half", 2), ("whole", 3))}


def test_the_verdict_is_about_the_medians_of_the_test_aurocs(tuning: ModuleType) -> None:
    searches = []
    for seed, (random, half) in enumerate([(0.80, 0.81), (0.82, 0.79), (0.70, 0.80)]):
        methods = {"random": search(0.5, 0.8), "random-asha": search(0.6, 0.7), "tpe-asha": search(0.8, 0.9)}
        one = {"seed": seed, "methods": methods, **tuning.judged(methods)}
        for winner, test in zip(one["winners"].values(), (random, 0.7, 0.7, half, 0.9), strict=True):
            winner["test"] = test
        searches.append(one)
    summary = tuning.summary(searches)
    assert summary["test"]["random"] == summary["test"]["tpe-asha at half"] == 0.80
    assert summary["met"] is True
    assert summary["reached_part"] == {"random-asha": None, "tpe-asha": 0.5}
    assert summary["difference"]["tpe-asha at half"]["not_below"] == 2
    assert summary["difference"]["tpe-asha at half"]["median"] == pytest.approx(0.01)
    searches[0]["winners"]["tpe-asha at half"]["test"] = 0.78
    assert tuning.summary(searches)["met"] is False


def test_spaces_and_arguments(tuning: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for table in (tuning.SPACE, tuning.OVERHEAD_SPACE):
        assert Space.read(table, tuning.base_settings(9), (tuning.SIZE,)).fields
    for words in ([], ["--work", "w", "--trials", "0"], ["--work", "w", "--overhead", "--trials", "1"]):
        with pytest.raises(SystemExit) as stop:
            tuning.parse(words)
        assert stop.value.code == 2
    assert str(tuning.parse(["--work", "w"]).work) == "w"
