"""A search with Ray Tune whose trials only pretend: who is stopped, fails, is started again, waits, goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pyarrow.parquet as pq
import pytest

from ray_cxr import config
from ray_cxr.config import TrainSettings, TuneSettings
from ray_cxr.errors import ConfigError, OutputError
from ray_cxr.tuning import study as studies
from ray_cxr.tuning.study import Plan

pytestmark = pytest.mark.ray

BASE = TrainSettings(backbone="TinyCNN", weights="none", size=64, epochs=3)
Act = Callable[[int, int, Callable[[str], bool]], None]


def fake(act: Act | None = None, rates: dict[int, float] | None = None) -> Any:
    """A trial that writes its epochs as a worker does and reports them as a trial does, without a network.

    Its AUROC is 0.5 and half its dropout, and rises by 0.001 an epoch.

    Args:
        act: called before each epoch with the trial's number, the epoch, and what tells whether a note was written.
        rates: images a second by number.
    """

    def run(given: dict[str, Any], job: Any) -> dict[str, Any]:
        from ray import tune

        from ray_cxr.tuning import trial
        from ray_cxr.tuning.study import curve_of

        number, settings, folder = given["number"], given["settings"], Path(given["folder"])
        path = Path(job.out) / "notes"

        def note(what: str) -> None:
            with open(path, "a") as file:
                file.write(f"{number} {what} {time.time()}\n")

        def noted(what: str) -> bool:
            return f"{what} " in path.read_text()

        note("begin")
        points, last, rows = trial.Points(rates and rates[number]), {}, curve_of(folder)
        for row in rows:
            last = points.next(row)
            tune.report(last)
        for epoch in range(len(rows) + 1, settings["epochs"] + 1):
            if act is not None:
                try:
                    act(number, epoch, noted)
                except ValueError as error:
                    nan = float("nan")
                    return {"epoch": 0, "val_auroc": nan, "best_val_auroc": nan, "failure": str(error)}
            auroc = 0.5 + settings["dropout"] / 2 + epoch / 1000
            row = {"epoch": epoch, "loss": 1 / epoch, "val_loss": 0.7, "val_auroc": auroc, "learning_rate": 0.1}
            rows.append({**row, "val_calibration_error": 0.1, "seconds": 1.0, "val_seconds": 0.5})
            pd.DataFrame(rows).to_csv(folder / "part", index=False)
            (folder / "part").rename(folder / "metrics.csv")
            note(f"epoch{epoch}")
            last = points.next(rows[-1])
            tune.report(last)
        note("end")
        return {**last, "ended": 1}

    return run


def plan_of(prepared: Path, out: Path, dropouts: list[float], base: TrainSettings = BASE, **settings: Any) -> Plan:
    """A search whose trials have these dropouts, in this order."""
    given = {
        "trials": len(dropouts),
        "space": {"dropout": {"low": 0.0, "high": 0.5}},
        "enqueue": tuple({"dropout": value} for value in dropouts),
        "known": False,
        "concurrent": 2,
        "reduction_factor": 2,
        **settings,
    }
    return Plan(prepared, out, base, TuneSettings(**given))


def notes(out: Path) -> list[tuple[int, str, float]]:
    lines = [line.split() for line in (out / "notes").read_text().splitlines()]
    return [(int(number), what, float(when)) for number, what, when in lines]


def begun(out: Path) -> Counter[int]:
    """How many processes each trial had."""
    return Counter(number for number, what, _ in notes(out) if what == "begin")


def crowd(out: Path) -> int:
    """How many trials were between their beginning and their last word at a time."""
    spans: dict[int, list[float]] = {}
    for number, what, when in notes(out):
        if what == "begin":
            spans[number] = [when, when]
        spans[number][1] = when
    return max(sum(first <= when <= last for first, last in spans.values()) for when, _ in spans.values())


@contextlib.contextmanager
def captured(path: Path) -> Iterator[None]:
    """What this process writes to its stdout and stderr goes there, past Python too."""
    kept = [os.dup(1), os.dup(2)]
    with open(path, "a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            for stream, before in zip((1, 2), kept, strict=True):
                os.dup2(before, stream)
                os.close(before)


@dataclass
class Searched:
    """A search that was run: its outcome, its events, what was printed past them, and the rows on disk."""

    plan: Plan
    outcome: Any
    said: list[str]
    printed: str

    @property
    def rows(self) -> pd.DataFrame:
        return pq.read_table(self.plan.out / "trials.parquet").to_pandas().set_index("number")

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        storage = f"sqlite:///{self.plan.out / 'study.db'}"
        return optuna.load_study(study_name=self.plan.name, storage=storage).trials


def searched(plan: Plan, trial: Any) -> Searched:
    from ray_cxr.tuning import search

    said: list[str] = []
    log = plan.out.with_suffix(".log")
    with captured(log):
        outcome = search.search(plan, trial=trial, finish=False, on_event=said.append)
    # Ray itself, and not Tune, says of a process that was killed that it was.
    printed = "".join(line for line in log.read_text().splitlines(keepends=True) if "(raylet)" not in line)
    return Searched(plan, outcome, said, printed)


@pytest.fixture(scope="module")
def asha(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A good trial, a bad one, one that fails, one whose process dies once, and one whose process always dies."""

    def act(number: int, epoch: int, noted: Callable[[str], bool]) -> None:
        while number == 1 and not noted("0 epoch2"):  # by then the scheduler has heard of the first
            time.sleep(0.02)
        if number == 2 and epoch == 2:
            raise ValueError("the loss is nan\nat epoch 2")
        if (number == 3 and epoch == 2 and not noted("3 died")) or number == 4:
            if number == 3:
                with open(path, "a") as file:
                    file.write(f"3 died {time.time()}\n")
            os._exit(1)

    out = tmp_path_factory.mktemp("asha") / "study"
    path = str(out / "notes")
    return searched(plan_of(prepared, out, [0.4, 0.1, 0.42, 0.44, 0.46]), fake(act))


def test_a_bad_trial_is_stopped_early_and_told_as_such(asha: Searched) -> None:
    rows, trials = asha.rows, asha.trials
    wanted = {0: "finished", 1: "stopped", 2: "failed", 3: "finished", 4: "failed"}
    assert rows["state"].to_dict() == wanted, asha.said
    assert rows["epochs"].to_dict() == {0: 3, 1: 1, 2: 1, 3: 3, 4: 0}
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL", "COMPLETE", "FAIL"]
    assert trials[0].value == pytest.approx(0.703)
    assert trials[0].intermediate_values == {epoch: pytest.approx(0.7 + epoch / 1000) for epoch in (1, 2, 3)}
    assert trials[1].intermediate_values == {1: pytest.approx(0.551)}
    assert rows["param_dropout"].tolist() == [0.4, 0.1, 0.42, 0.44, 0.46]
    assert "tune: trial 1 is stopped after epoch 1: AUROC 0.5510" in asha.said
    assert "tune: trial 0, epoch 3 of 3: AUROC 0.7030" in asha.said
    assert any(re.match(r"tune: trial 0 is finished: AUROC 0.7030(, the best so far)?$", line) for line in asha.said)


def test_what_fails_by_its_own_word_is_not_tried_again(asha: Searched) -> None:
    assert begun(asha.plan.out)[2] == 1
    assert asha.rows.loc[2, "reason"] == "the loss is nan at epoch 2"
    assert "tune: trial 2 failed: the loss is nan at epoch 2" in asha.said


def test_a_lost_process_is_started_again_so_often_and_goes_on_where_it_was(asha: Searched) -> None:
    out, rows = asha.plan.out, asha.rows
    assert begun(out) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 2}
    assert rows["restarts"].tolist() == [0, 0, 0, 1, 1]
    assert [epoch["epoch"] for epoch in rows.loc[3, "curve"]] == [1, 2, 3]
    assert [what for number, what, _ in notes(out) if number == 3].count("epoch1") == 1
    assert rows.loc[4, "reason"].startswith("its process was lost, or raised: ")
    assert json.loads((out / "trials" / "0004" / "failure.json").read_text())["message"] == rows.loc[4, "reason"]
    assert asha.said.count("tune: trial 3: its process was lost; it starts again where it was") == 1
    assert "tune: trial 3 goes on after epoch 1" in asha.said
    told = [line for line in asha.said if ", epoch " in line]
    assert len(told) == len(set(told)) == 8  # each epoch once, whoever reported it twice


def test_the_search_as_a_whole(asha: Searched) -> None:
    out, outcome = asha.plan.out, asha.outcome
    assert crowd(out) <= 3  # two, and one ahead
    assert asha.printed == ""
    assert "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS" not in os.environ
    assert (outcome.best, outcome.interrupted, outcome.bundle, outcome.epochs) == (3, False, None, 8)
    assert outcome.facts["trials_over"] == 5
    assert outcome.facts["scheduler"] == "ASHA (grace 1, reduction 2)"
    text = (out / "best.toml").read_text()
    assert text.startswith(f"# Trial 3 of {asha.plan.name}: validation AUROC 0.7230 in epoch 3, finished after 3 of 3.")
    assert config.load(out / "best.toml").train == BASE.replace(dropout=0.44)
    assert not list(out.glob("trials/*/ray"))


@pytest.fixture(scope="module")
def front(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Searched, Searched, dict[str, Any]]:
    """Three trials with two objectives; then a fourth that a kill left, a bad one and a failure.

    Returns:
        both lives, and the parameters of the trial that was left.
    """

    def act(number: int, epoch: int, noted: Callable[[str], bool]) -> None:
        if number == 5:
            raise ValueError("nothing came of it")

    out = tmp_path_factory.mktemp("front") / "study"
    settings = {"objectives": ("auroc", "images_per_second"), "scheduler": "median"}
    dropouts = [0.5, 0.48, 0.46, 0.49, 0.1, 0.2]
    trial = fake(act, {0: 10.0, 1: 20.0, 2: 15.0, 3: 50.0, 4: 99.0, 5: 1.0})
    first = searched(plan_of(prepared, out, dropouts, trials=3, ahead=0, **settings), trial)
    plan = plan_of(prepared, out, dropouts, **settings)
    left = plan.open().ask()
    plan.space.suggest(left)
    left.set_user_attr("starts", 1)
    (out / "trials" / "0003").mkdir()
    row = {"epoch": 1, "loss": 1.0, "val_loss": 0.7, "val_auroc": 0.746, "val_calibration_error": 0.1}
    row |= {"learning_rate": 0.1, "seconds": 1.0, "val_seconds": 0.5}
    pd.DataFrame([row]).to_csv(out / "trials" / "0003" / "metrics.csv", index=False)
    (out / "notes").rename(out / "notes of the first life")
    (out / "notes").touch()
    return first, searched(plan, trial), left.params


def test_what_is_over_is_not_run_again_and_what_was_left_goes_on(
    front: tuple[Searched, Searched, dict[str, Any]],
) -> None:
    first, second, left = front
    assert "3 trials are done already and stay as they are" in "\n".join(second.said)
    assert begun(second.plan.out) == {3: 1, 4: 1, 5: 1}
    assert [what for number, what, _ in notes(second.plan.out) if number == 3] == ["begin", "epoch2", "epoch3", "end"]
    assert second.trials[3].params == left == {"dropout": 0.49}
    rows = second.rows
    assert rows["restarts"].tolist() == [0, 0, 0, 1, 0, 0]
    assert rows.loc[3, "epochs"] == 3
    assert "tune: trial 3, epoch 1 of 3: AUROC 0.7460" not in second.said
    assert rows.loc[:2, "val_auroc"].tolist() == first.outcome.rows["val_auroc"].tolist()


def test_the_scheduler_of_a_second_life_knows_the_trials_of_the_first(
    front: tuple[Searched, Searched, dict[str, Any]],
) -> None:
    """None of the three whose median stops the fifth trial ran beside it."""
    _, second, _ = front
    assert second.rows.loc[4, ["state", "epochs"]].tolist() == ["stopped", 1]
    assert "tune: trial 4 is stopped after epoch 1: AUROC 0.5510" in second.said


def test_several_objectives_make_a_front_and_stopped_trials_are_on_it(
    front: tuple[Searched, Searched, dict[str, Any]],
) -> None:
    first, second, _ = front
    assert first.outcome.facts["pareto"] == [0, 1]
    assert second.outcome.facts["pareto"] == [0, 3, 4]
    kept = second.trials
    assert [trial.state.name for trial in kept] == ["COMPLETE"] * 5 + ["FAIL"]
    assert kept[4].values == [pytest.approx(0.551), 99.0]  # noqa: PD011
    assert second.rows["images_per_second"].tolist()[:5] == [10.0, 20.0, 15.0, 50.0, 99.0]
    assert second.rows["state"].tolist() == ["finished"] * 4 + ["stopped", "failed"], second.said
    assert second.rows.loc[5, "reason"] == "nothing came of it"  # it has neither objective, and the search went on
    assert second.outcome.best == 0
    assert second.printed == ""


def test_halving_lets_trials_wait_for_the_others_without_a_process(prepared: Path, tmp_path: Path) -> None:
    """Three trials, two at a time: the first comes to its rung first, waits, and goes on in a new process."""

    def act(number: int, epoch: int, noted: Callable[[str], bool]) -> None:
        while number and not noted("0 epoch1"):
            time.sleep(0.02)

    plan = plan_of(prepared, tmp_path / "study", [0.5, 0.2, 0.3], scheduler="halving", reduction_factor=3, concurrent=1)
    done = searched(plan, fake(act))
    rows = done.rows
    assert rows["state"].tolist() == ["finished", "stopped", "stopped"], done.said
    assert rows["epochs"].tolist() == [3, 1, 1]
    assert [epoch["epoch"] for epoch in rows.loc[0, "curve"]] == [1, 2, 3]
    assert [trial.state.name for trial in done.trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert [len(trial.intermediate_values) for trial in done.trials] == [3, 1, 1]
    assert begun(plan.out) == {0: 2, 1: 1, 2: 1}
    assert rows["restarts"].tolist() == [0, 0, 0]  # none was lost
    whats = [(number, what) for number, what, _ in notes(plan.out)]
    assert whats.index((0, "epoch2")) > max(whats.index((1, "epoch1")), whats.index((2, "epoch1")))
    assert "tune: trial 0 goes on after epoch 1" in done.said
    assert done.printed == ""


def test_trials_that_all_fail_end_the_search_and_those_that_wait_need_not(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first waits at its rung for eight others, of which the first two fail and the rest never comes."""
    from ray_cxr.tuning import search

    def act(number: int, epoch: int, noted: Callable[[str], bool]) -> None:
        if number:
            raise ValueError("no such file")

    monkeypatch.setattr(search, "HOPELESS", 2)
    base = BASE.replace(epochs=9)
    plan = plan_of(prepared, tmp_path / "study", [0.3], base, trials=9, scheduler="halving", reduction_factor=3)
    done = searched(plan, fake(act))
    assert f"{plan.out}: 2 trials in a row failed before their first epoch" in done.outcome.gave_up
    assert not done.outcome.interrupted
    rows = done.rows
    assert rows["state"].tolist() == ["finished"] + ["failed"] * (len(rows) - 1), done.said
    assert rows.loc[0, "epochs"] == 9
    assert 3 <= len(rows) <= 5  # those that were begun before it was known


def test_a_second_search_in_the_same_folder_is_refused(prepared: Path, tmp_path: Path) -> None:
    from ray_cxr.tuning import search

    plan = plan_of(prepared, tmp_path, [0.1], scheduler="none")
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputError) as caught:
            search.search(plan, trial=fake(), finish=False)
    said = str(caught.value)
    assert said == f"{tmp_path}: another `ray-cxr tune` is at work here; wait for it, or stop it"
    assert not (tmp_path / "study.db").exists()


def test_a_ray_whose_dashboard_does_not_answer_is_refused(
    ray_here: None, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_cxr.tuning import search

    monkeypatch.setattr(search, "DASHBOARD_WAIT_S", 0)
    monkeypatch.setattr(search, "_state_api_answers", lambda: "ConnectionError: nobody there")
    with pytest.raises(ConfigError) as caught:
        search.search(plan_of(prepared, tmp_path / "study", [0.1]), trial=fake(), finish=False)
    said = str(caught.value)
    assert said.splitlines() == [said]
    assert said.startswith(
        "this Ray's dashboard does not answer, so what stopped or lost trials hold would never be free again; start "
    )
    assert said.endswith("(ConnectionError: nobody there)")
    assert not (tmp_path / "study").exists()


#: `ray-cxr tune` with trials that pretend; the second waits in its second epoch until somebody ends the command.
COMMAND = """
import functools, sys, time, types
sys.path.insert(0, {here!r})
from test_search import fake

def act(number, epoch, noted):
    while (number, epoch) == (1, 2):
        time.sleep(0.1)

from ray_cxr.cli import main, start_ray
from ray_cxr.config import RaySettings
with start_ray(RaySettings(num_cpus=2), dashboard=True):
    from ray_cxr.tuning import search
    search.search = functools.partial(search.search, trial=fake(act))
    search._bundle = lambda *given: types.SimpleNamespace(path="none")
    raise SystemExit(main(sys.argv[1:]))
"""


def test_ctrl_c_writes_what_there_is_and_leaves_the_rest_to_a_resume(
    ray_here: None, prepared: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "study", tmp_path / "log"
    (tmp_path / "command.py").write_text(COMMAND.format(here=str(Path(__file__).parent)))
    plan = plan_of(prepared, out, [0.3, 0.4], scheduler="none")
    settings = [
        *(f"train.{name}={value}" for name, value in BASE.model_dump(exclude_unset=True).items()),
        *("trials=2", "known=false", "concurrent=2", "scheduler=none", "reduction_factor=2"),
        *("space={dropout={low=0.0, high=0.5}}", "enqueue=[{dropout=0.3}, {dropout=0.4}]"),
    ]
    given = [part for setting in settings for part in ("--set", setting)]
    program = [sys.executable, str(tmp_path / "command.py"), "tune", str(prepared), "--out", str(out), *given]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with open(log, "w") as stream:
        process = subprocess.Popen(program, start_new_session=True, stdout=stream, stderr=stream, env=environment)
        deadline = time.monotonic() + 200
        while not all(line in log.read_text() for line in ("trial 0 is finished", "trial 1, epoch 1 of 3")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to Ray's processes, too
        assert process.wait(timeout=100) == 130, log.read_text()
    said = log.read_text()
    assert said.splitlines()[-1] == "ray-cxr tune: stopped; the same command continues"
    assert "Traceback" not in said
    assert "Resume experiment with" not in said
    rows = pq.read_table(out / "trials.parquet").to_pandas().set_index("number")
    assert rows["state"].to_dict() == {0: "finished", 1: "running"}
    assert rows["epochs"].to_dict() == {0: 3, 1: 1}
    assert config.load(out / "best.toml").train.dropout == 0.4  # what there was when it was stopped
    assert (out / "report.html").exists()
    assert [one.state.name for one in plan.open().get_trials()] == ["COMPLETE", "RUNNING"]
    assert not plan.done()
    base, chosen = studies.resumed(out, [])
    done = searched(Plan(prepared, out, base, chosen), fake())
    assert done.rows["state"].tolist() == ["finished"] * 2
    assert begun(out) == {0: 1, 1: 2}
    assert Counter(what for number, what, _ in notes(out) if number == 1) == {
        "begin": 2, "epoch1": 1, "epoch2": 1, "epoch3": 1, "end": 1,
    }  # fmt: skip
    assert done.rows["restarts"].tolist() == [0, 1]
    assert not done.outcome.interrupted
