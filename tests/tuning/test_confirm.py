"""Confirming trainings: their settings, and a search that makes, interrupts, continues and extends them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from optuna.trial import TrialState
from test_search import EPOCH, IN_PROCESS, fake_trial, interrupt, run_search
from test_study import refuse

from ray_cxr.config import TrainSettings, TuneSettings
from ray_cxr.errors import ConfigError
from ray_cxr.tuning import confirm, records, results
from ray_cxr.tuning.confirm import Source, build_pairs
from ray_cxr.tuning.plan import StudyPlan
from ray_cxr.tuning.space import Space

BASE = TrainSettings(backbone="TinyCNN", weights="none", size=64, epochs=2, seed=7)
SPACE: dict[str, Any] = {
    "backbone": ["TinyCNN", "ResNet50"],
    "dropout": {"low": 0.0, "high": 0.5},
    "optimizer": ["adam", "adamw"],
    "when": {
        "backbone=ResNet50": {"dense": [[], [8]]},
        "backbone=TinyCNN": {"batch_size": [8]},
        "optimizer=adamw": {"weight_decay": {"low": 1e-6, "high": 1e-2}},
    },
}


def test_pairs_have_equal_settings_from_both_backbones_alternately() -> None:
    space = Space.read(SPACE, BASE, [64])
    adamw = {"optimizer": "adamw", "weight_decay": 1e-3}
    tiny = [
        Source(4, {"backbone": "TinyCNN", "dropout": 0.1, "batch_size": 8, **adamw}),
        Source(2, {"backbone": "TinyCNN", "dropout": 0.2, "batch_size": 8, "optimizer": "adam"}),
    ]
    res = [Source(9, {"backbone": "ResNet50", "dropout": 0.4, "dense": (8,), "optimizer": "adam"})]
    pairs = build_pairs(space, ("ResNet50", "TinyCNN"), [res, tiny], 6)
    assert [trial for trial, _ in pairs] == [9, 4, 9, 2, 9, 4]  # ResNet50 has one trial
    adam = {"optimizer": "adam"}
    assert pairs[0][1] == (
        {"backbone": "ResNet50", "dropout": 0.4, "dense": (8,), **adam},
        {"backbone": "TinyCNN", "dropout": 0.4, "batch_size": 8, **adam},
    )
    # Dense layers, which TinyCNN has not, come from the trial of ResNet50.
    assert pairs[1][1] == (
        {"backbone": "ResNet50", "dropout": 0.1, "dense": (8,), **adamw},
        {"backbone": "TinyCNN", "dropout": 0.1, "batch_size": 8, **adamw},
    )


def test_random_trials_start_before_enough_others_have_ended() -> None:
    first = datetime(2026, 1, 1)

    def freeze(number: int, start: int, end: int | None, state: TrialState, **system: Any) -> Any:
        times = {"datetime_start": first + timedelta(hours=start)}
        times |= {"datetime_complete": None if end is None else first + timedelta(hours=end)}
        return SimpleNamespace(number=number, state=state, system_attrs=system, **times)

    complete, pruned, fail, running = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING
    trials = [
        freeze(0, 0, 2, complete, fixed_params={"dropout": 0.1}),
        freeze(1, 0, 3, fail),
        freeze(2, 2, 5, pruned),
        freeze(3, 4, 9, complete),
        freeze(4, 5, None, running),  # trials 0 and 2 have ended
    ]
    study: Any = SimpleNamespace(get_trials=lambda deepcopy: trials)

    def find(**settings: Any) -> set[int]:
        plan: Any = SimpleNamespace(settings=TuneSettings(**settings))
        return records.list_random_trials(plan, study)

    assert find(startup_trials=2) == {1, 2, 3}
    assert find(startup_trials=3) == {1, 2, 3, 4}
    assert find(sampler="random") == {1, 2, 3, 4}
    assert find(sampler="cmaes") == set()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"space": {"dropout": [0.1, 0.2]}, "confirm": 6}, "tune.confirm"),
        ({"confirm": 5}, "even"),
        ({"confirm": 4}, "6"),
    ],
)
def test_wrong_numbers_of_pairs_are_refused(settings: dict[str, Any], words: str, prepared, tmp_path: Path) -> None:
    if "space" in settings:
        assert words in refuse(ConfigError, prepared, tmp_path / "study", **settings)
    else:
        with pytest.raises(ConfigError, match=words):
            TuneSettings().replace(**settings)


def plan_of(prepared: Path, out: Path, **settings: Any) -> StudyPlan:
    space = {"backbone": ["TinyCNN", "ResNet50"], "dropout": {"low": 0.0, "high": 0.5}}
    points = tuple({"backbone": name, "dropout": 0.1} for name in ("TinyCNN", "ResNet50"))
    values = {"trials": 2, "known": False, "space": space, "enqueue": points, "scheduler": "none", **settings}
    return StudyPlan(prepared, out, BASE, TuneSettings(**values))


def no_act(number: int) -> None:
    """Let every training succeed."""


def fake_training(started: list[tuple[str, int]], act: Callable[[int], None] = no_act) -> Any:
    """Make trials that do not train; a confirming training has an AUROC by backbone and seed, unless `act` is given.

    With `act`, which receives each number first, ResNet50 fails with seed 9.
    """
    trial = fake_trial(aurocs={0: 0.70, 1: 0.71})

    def run(config: dict[str, Any], context: Any) -> dict[str, Any]:
        settings, number = config["settings"], config["number"]
        act(number)
        assert (settings["patience"], settings["dropout"], context.measure_threads) == (None, 0.1, None)
        if settings["seed"] == 9 and settings["backbone"] == "ResNet50" and act is not no_act:
            return {"epoch": 0, "val_auroc": float("nan"), "failure": "the loss is nan\nat epoch 1"}
        started.append((settings["backbone"], settings["seed"]))
        lead = 0.01 * (settings["backbone"] == "ResNet50") + settings["seed"] / 1e5
        curve = [{**EPOCH, "epoch": epoch, "val_auroc": 0.7 + lead + epoch / 1000} for epoch in (1, 2)]
        pd.DataFrame(curve).to_csv(Path(config["folder"]) / "metrics.csv", index=False)
        (Path(config["folder"]) / "ray").mkdir()
        return {"epoch": 2, "val_auroc": curve[-1]["val_auroc"], "ended": 1}

    run.epochs = trial.epochs  # type: ignore[attr-defined]
    return run


@pytest.mark.slow
def test_a_search_confirms_its_two_best_backbones(prepared: Path, tmp_path: Path, monkeypatch) -> None:
    """After the search, with an interruption, and with more pairs later."""
    monkeypatch.setattr(results, "export_best", lambda plan, *_: (plan.out / "bundle").mkdir(exist_ok=True))
    out, started = tmp_path / "study", []

    def confirm_pairs(pairs: int, act: Callable[[int], None] = no_act, *, finish: bool = False) -> Any:
        return run_search(plan_of(prepared, out, confirm=pairs), fake_training(started, act), IN_PROCESS, finish=finish)

    assert confirm_pairs(0).outcome.comparison["confirmation"] is None
    assert started == []

    def stop(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    facts, comparison = (done := confirm_pairs(6, stop).outcome).facts, done.comparison
    assert started == [("ResNet50", 8), ("TinyCNN", 8)]  # and a failed one of ResNet50
    assert (facts["interrupted"], facts["confirm_over"], facts["trials_over"]) == (True, 0, 2)
    assert "1 of 6 pairs" in comparison["verdict"]["details"]
    (failure,) = out.glob("confirm/*/*/failure.json")
    failure.unlink()
    done = confirm_pairs(6, finish=True).outcome
    assert started == [(name, seed) for seed in range(8, 14) for name in ("ResNet50", "TinyCNN")]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    confirmation = summary["comparison"]["confirmation"]
    assert (confirmation["a"], confirmation["b"], confirmation["test"]["p"]) == ("ResNet50", "TinyCNN", 2 / 64)
    assert confirmation["test"]["mean"] == pytest.approx(0.01)
    assert [pair["trial"] for pair in confirmation["pairs"]] == [1, 0] * 3
    assert (summary["confirm_over"], summary["confirm_epochs"], summary["interrupted"]) == (6, 24, False)
    assert done.facts["best_number"] == 1  # the bundle remains that of a trial
    assert not list((out / "confirm").glob("*/*/ray"))
    assert "Confirming pairs" in (out / "report.html").read_text(encoding="utf-8")
    finished = {pairs: plan_of(prepared, out, confirm=pairs).is_finished() for pairs in (0, 6, 8)}
    assert finished == {0: True, 6: True, 8: False}
    # More pairs; then, without the setting, the pairs remain.
    assert confirm_pairs(8).outcome.comparison["confirmation"]["test"]["n"] == 8
    assert confirm_pairs(0).outcome.comparison["confirmation"]["test"]["n"] == 8
    assert len(started) == 16


def test_a_failed_training_leaves_its_pair_out(prepared: Path, tmp_path: Path) -> None:
    def act(number: int) -> None:
        pass

    settings = {"storage": f"sqlite:///{tmp_path / 'x.db'}", "objectives": ("auroc", "calibration_error")}
    plan = plan_of(prepared, tmp_path / "study", confirm=6, **settings)
    done = run_search(plan, fake_training([], act), IN_PROCESS)
    confirmation, facts = done.outcome.comparison["confirmation"], done.outcome.facts
    assert confirmation["pairs"][1]["reason"] == "ResNet50: the loss is nan at epoch 1"
    assert confirmation["test"]["n"] == 5
    assert done.outcome.comparison["verdict"]["answer"] == "undecided"
    assert (facts["confirm_over"], facts["interrupted"]) == (6, False)  # it is not repeated
    assert "adds 12 trainings of all epochs" in " ".join(done.events)


def test_an_interrupted_search_plans_no_pairs(prepared: Path, tmp_path: Path) -> None:
    """Later trials may have better settings."""
    training = fake_training([])
    training.epochs = fake_trial(interrupt(1)).epochs
    done = run_search(plan_of(prepared, tmp_path / "study", confirm=6), training, IN_PROCESS)
    assert done.rows["val_auroc"].notna().all(), "both backbones have an AUROC"
    assert (done.outcome.facts["interrupted"], done.outcome.facts["confirm_over"]) == (True, 0)
    assert not (tmp_path / "study" / "confirm").exists()


def test_one_backbone_alone_is_not_confirmed(prepared: Path, tmp_path: Path) -> None:
    plan = plan_of(prepared, tmp_path / "study", confirm=6, trials=1)
    done = run_search(plan, fake_training([]), IN_PROCESS)
    assert "no confirming trainings" in " ".join(done.events)
    assert done.outcome.facts["confirm_over"] == 6
    assert not (plan.out / "confirm").exists()


def test_pairs_do_not_change_with_later_trials(prepared: Path, tmp_path: Path) -> None:
    plan = plan_of(prepared, tmp_path / "study", confirm=6)
    study = plan.open_study()

    def list_trials(*aurocs: tuple[str, float]) -> list[int]:
        while len(study.trials) < len(aurocs) or study.trials[len(aurocs) - 1].state == TrialState.WAITING:
            plan.space.suggest(study.ask())
        rows = [{"number": n, "state": "finished", "backbone": b, "val_auroc": a} for n, (b, a) in enumerate(aurocs)]
        return [run.trial for run in confirm.plan_runs(plan, study, pd.DataFrame(rows), 6)[::2]]

    trials = (("TinyCNN", 0.7), ("ResNet50", 0.8))
    assert list_trials(*trials) == [1, 0] * 3
    assert list_trials(*trials, ("ResNet50", 0.9)) == [1, 0] * 3
    # Another backbone among the best two has other pairs, in another folder.
    assert list_trials(*trials, ("MobileNetV3Small", 0.75)) == [2, 1] * 3
    assert list_trials(*trials) == [1, 0] * 3
    folders = {path.name for path in (plan.out / "confirm").iterdir()}
    assert folders == {"ResNet50-TinyCNN", "MobileNetV3Small-ResNet50"}
