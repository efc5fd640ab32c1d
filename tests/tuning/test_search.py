"""A search whose trials do not train: stopped, failing, lost and resumed trials, in this process or on Ray."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pickle
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import optuna
import pandas as pd
import pytest
from fake_tune import FakeTune
from ray import tune as ray_tune
from studies import get_refusal, load_study, read_rows, store_checkpoints

from ray_cxr import cluster, config, environment
from ray_cxr.config import TrainSettings, TuneSettings
from ray_cxr.errors import ConfigError, OutputError, RayCxrError
from ray_cxr.storage import remote
from ray_cxr.storage.remote import to_path
from ray_cxr.tuning import results, search, search_monitor, searcher, trial
from ray_cxr.tuning.plan import StudyPlan

BASE = TrainSettings(backbone="TinyCNN", weights="none", size=64, epochs=3)
EPOCH = {"loss": 0.5, "val_loss": 0.7, "learning_rate": 0.1, "val_calibration_error": 0.1}
EPOCH |= {"seconds": 1.0, "val_seconds": 0.5}
Act = Callable[[int, int, Callable[[str], bool]], None]


def fake_trial(
    act: Act | None = None, aurocs: Mapping[int, float] | None = None, rates: Mapping[int, float] | None = None
) -> Any:
    """Make a trial that writes and reports epochs as a real one does, without a model.

    `act` is called before each epoch with the trial's number, the epoch, and a function that looks for a note. Each
    AUROC rises by 0.001 per epoch.
    """

    def epochs(given: dict[str, Any], job: Any) -> Iterator[dict[str, Any]]:
        from ray_cxr.training.checkpoints import read_stored_epochs
        from ray_cxr.tuning import trial

        number, folder, notes = given["number"], Path(given["folder"]), Path(job.out) / "notes"
        curve, rate = read_stored_epochs(folder), rates and rates[number]

        def note(what: str) -> None:
            with open(notes, "a", encoding="utf-8") as file:
                file.write(f"{number} {what} {time.time()}\n")

        def has_note(what: str) -> bool:
            return f"{what} " in notes.read_text(encoding="utf-8")

        note("start")
        yield from trial.build_reports(curve, rate)
        for epoch in range(len(curve) + 1, given["settings"]["epochs"] + 1):
            try:
                if act is not None:
                    act(number, epoch, has_note)
            except ValueError as error:
                nan = float("nan")
                yield {"epoch": 0, "val_auroc": nan, "best_val_auroc": nan, "failure": str(error)}
                return
            curve.append({**EPOCH, "epoch": epoch, "val_auroc": (aurocs or {}).get(number, 0.7) + epoch / 1000})
            pd.DataFrame(curve).to_csv(folder / "part", index=False)
            (folder / "part").rename(folder / "metrics.csv")
            store_checkpoints(folder, {point["epoch"]: point["val_auroc"] for point in curve})
            note(f"epoch{epoch}")
            yield trial.build_report(curve, rate)
        note("end")
        yield {**trial.build_report(curve, rate), "ended": 1}

    def run(given: dict[str, Any], job: Any) -> dict[str, Any]:
        from ray import tune

        for report in epochs(given, job):
            if "ended" in report or "failure" in report:
                return report
            tune.report(report)
        raise AssertionError("no last report")

    run.epochs = epochs  # type: ignore[attr-defined]
    return run


def create_tuner(trial: Any, *, tune_config: Any, run_config: Any, param_space: Any = None) -> SimpleNamespace:
    """Create a stand-in for Ray's `Tuner`, which runs the trials one at a time in this process.

    `trial` has `epochs`, or is the function of a grid, which this process calls as Ray does.
    """
    job = SimpleNamespace(out=str(Path(run_config.storage_path).parent))
    if param_space is not None:
        return SimpleNamespace(fit=lambda: run_grid(trial, param_space["number"]["grid_search"], *run_config.callbacks))
    parts = tune_config.scheduler, tune_config.search_alg, *run_config.callbacks
    tune = FakeTune(*parts, lambda running: trial.epochs(running.config, job), processes=1)
    return SimpleNamespace(fit=lambda: tune.run(tune_config.num_samples))


def run_grid(function: Callable[[dict[str, Any]], Any], numbers: list[int], monitor: Any) -> None:
    """Call a function with each number of a grid, until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        for number in numbers:
            running = SimpleNamespace(config={"number": number}, last_result=None)
            monitor.on_trial_start(0, [], running)
            running.last_result = function(running.config)
            monitor.on_trial_complete(0, [], running)


IN_PROCESS = "in process"
#: Where a search runs; on Ray it takes tens of seconds.
ENGINES = [IN_PROCESS, pytest.param("on Ray", marks=[pytest.mark.ray, pytest.mark.long])]


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    if request.param != IN_PROCESS:
        request.getfixturevalue("shared_ray")
    return request.param


def plan_of(prepared: Path, out: Path, dropouts: list[float], base: TrainSettings = BASE, **settings: Any) -> StudyPlan:
    """A search whose trials have these dropouts, in this order."""
    values: dict[str, Any] = {"trials": len(dropouts), "known": False, "concurrent": 2, "reduction_factor": 2}
    values |= {"space": {"dropout": {"low": 0.0, "high": 0.5}}, **settings}
    points = tuple({"dropout": value} for value in dropouts)
    return StudyPlan(prepared, out, base, TuneSettings(enqueue=points, **values))


def interrupt(trial: int) -> Act:
    """Make an act that presses Ctrl-C in the second epoch of this trial."""

    def act(number: int, epoch: int, has_note: Callable[[str], bool]) -> None:
        if (number, epoch) == (trial, 2):
            raise KeyboardInterrupt

    return act


class Searched(NamedTuple):
    """A finished search."""

    plan: StudyPlan
    outcome: Any
    events: list[str]
    printed: str

    @property
    def rows(self) -> pd.DataFrame:
        return read_rows(self.plan.out)

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        return load_study(self.plan.out).trials

    def notes(self) -> list[tuple[int, str, float]]:
        lines = [line.split() for line in (self.plan.out / "notes").read_text(encoding="utf-8").splitlines()]
        return [(int(number), what, float(when)) for number, what, when in lines]

    def starts(self) -> Counter[int]:  # processes of each trial
        return Counter(number for number, what, _ in self.notes() if what == "start")


def run_search(plan: StudyPlan, trial: Any, engine: str = "on Ray", *, finish: bool = False) -> Searched:
    events: list[str] = []
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        patch.setattr(sys, "stderr", printed)
        if engine == IN_PROCESS:
            # Ray makes a class of the function that it runs.
            patch.setattr(search, "wrap_function", lambda function: type("Wrapped", (), {"function": function}))
            patch.setattr(search.ray_tune, "with_resources", lambda wrapped, _: wrapped)

            def make(wrapped: Any, **configs: Any) -> SimpleNamespace:
                return create_tuner(wrapped.function if configs.get("param_space") else trial, **configs)

            patch.setattr(search.ray_tune, "Tuner", make)
            patch.setattr(search, "_check_dashboard", lambda: None)
            node = {"NodeID": "here", "Resources": {"CPU": 2.0}, "Labels": {}}
            patch.setattr(cluster, "list_alive", lambda: [node])
        outcome = search.search(plan, trial=trial, finish=finish, on_event=events.append)
    # Ray itself, not Tune, reports a killed process.
    lines = printed.getvalue().splitlines(keepends=True)
    return Searched(plan, outcome, events, "".join(line for line in lines if "(raylet)" not in line))


@pytest.fixture(scope="module")
def asha(shared_ray: None, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """A resumed search on Ray.

    An earlier run finished trial 0 and was interrupted in trial 1. Trial 2 is bad, trial 3 fails, the process of trial
    4 dies once and that of trial 5 always.
    """

    def act(number: int, epoch: int, has_note: Callable[[str], bool]) -> None:
        if number == 3 and epoch == 2:
            raise ValueError("the loss is nan\nat epoch 2")
        if number == 5 or (number == 4 and epoch == 2 and not has_note("4 died")):
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{number} died {time.time()}\n")
            os._exit(1)

    out = tmp_path_factory.mktemp("asha") / "study"
    path = str(out / "notes")
    dropouts = [0.3, 0.4, 0.1, 0.42, 0.44, 0.46]
    aurocs = {0: 0.65, 2: 0.55}
    first = run_search(plan_of(prepared, out, dropouts), fake_trial(interrupt(1), aurocs), IN_PROCESS)
    assert first.rows["state"].to_dict() == {0: "finished", 1: "running"}
    (out / "notes").unlink()
    return run_search(plan_of(prepared, out, dropouts), fake_trial(act, aurocs))


@pytest.mark.ray
def test_a_bad_trial_is_stopped_early(asha: Searched) -> None:
    rows, trials = asha.rows, asha.trials
    states = {0: "finished", 1: "finished", 2: "stopped", 3: "failed", 4: "finished", 5: "failed"}
    assert rows["state"].to_dict() == states, asha.events
    assert rows["epochs"].tolist() == [3, 3, 1, 1, 3, 0]
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL", "COMPLETE", "FAIL"]
    assert trials[1].value == pytest.approx(0.703)
    assert trials[1].intermediate_values == {epoch: pytest.approx(0.7 + epoch / 1000) for epoch in (1, 2, 3)}
    assert trials[2].intermediate_values == {1: pytest.approx(0.551)}
    assert rows["param_dropout"].tolist() == [0.3, 0.4, 0.1, 0.42, 0.44, 0.46]


@pytest.mark.ray
def test_resume_keeps_finished_trials_and_continues_the_others(asha: Searched) -> None:
    assert asha.starts() == {1: 1, 2: 1, 3: 1, 4: 2, 5: 2}
    assert asha.rows["restarts"].tolist() == [0, 1, 0, 0, 1, 1]
    epochs = {number: [what for one, what, _ in asha.notes() if one == number] for number in (1, 4)}
    assert epochs[1] == ["start", "epoch2", "epoch3", "end"]
    assert epochs[4].count("epoch1") == 1
    for number in epochs:
        assert [epoch["epoch"] for epoch in asha.rows.loc[number, "curve"]] == [1, 2, 3]


@pytest.mark.ray
def test_failures_are_recorded_and_each_epoch_is_reported_once(asha: Searched) -> None:
    reasons = asha.rows["reason"]
    assert reasons[3] == "the loss is nan at epoch 2"
    assert "process" in reasons[5]
    failure = asha.plan.out / "trials" / "0005" / "failure.json"
    assert json.loads(failure.read_text(encoding="utf-8"))["message"] == reasons[5]
    # A new process reports the epochs of the old one again.
    epochs = [event for event in asha.events if ", epoch " in event]
    assert len(epochs) == len(set(epochs)) == 2 + 1 + 1 + 3


@pytest.mark.ray
def test_the_outcome_of_a_search(asha: Searched) -> None:
    out, outcome = asha.plan.out, asha.outcome
    spans: dict[int, list[float]] = {}
    for number, _, when in asha.notes():
        spans.setdefault(number, []).append(when)
    assert max(sum(span[0] <= when <= span[-1] for span in spans.values()) for _, _, when in asha.notes()) <= 3
    assert asha.printed == ""
    assert "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS" not in os.environ
    assert (outcome.bundle, outcome.facts["interrupted"]) == (None, False)
    assert (outcome.facts["best_number"], outcome.facts["epochs_spent"], outcome.facts["trials_over"]) == (1, 11, 6)
    assert outcome.facts["epochs_full"] == 13
    assert config.load(out / "best.toml").train == BASE.replace(dropout=0.4)
    assert [path.parent.name for path in out.glob("trials/*/ray")] == ["0001"], "checkpoints of the best trial alone"


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_several_objectives_make_a_front(engine: str, prepared: Path, tmp_path: Path) -> None:
    """A stopped trial may be on it, the scheduler knows the earlier run, and a trial without an objective fails."""

    def act(number: int, epoch: int, has_note: Callable[[str], bool]) -> None:
        if number == 5:
            raise ValueError("no objective")

    out = tmp_path / "study"
    settings = {"objectives": ("auroc", "images_per_second"), "scheduler": "median"}
    dropouts = [0.5, 0.48, 0.46, 0.49, 0.1, 0.2]
    aurocs = {0: 0.75, 1: 0.74, 2: 0.73, 3: 0.745, 4: 0.55}
    rates = {0: 10.0, 1: 20.0, 2: 15.0, 3: 50.0, 4: 99.0, 5: 1.0}
    plan = plan_of(prepared, out, dropouts, **settings)
    first = run_search(plan, fake_trial(interrupt(3), aurocs, rates), IN_PROCESS)
    assert first.outcome.facts["interrupted"]
    assert first.rows["epochs"].tolist() == [3, 3, 3, 1]
    assert config.load(out / "best.toml").train.dropout == 0.5
    (out / "notes").unlink()
    second = run_search(plan_of(prepared, out, dropouts, **settings), fake_trial(act, aurocs, rates), engine)
    assert second.starts() == {3: 1, 4: 1, 5: 1}
    rows, trials = second.rows, second.trials
    assert rows["state"].tolist() == ["finished"] * 4 + ["stopped", "failed"], second.events
    assert rows["epochs"].tolist() == [3, 3, 3, 3, 1, 0]
    assert rows["restarts"].tolist() == [0, 0, 0, 1, 0, 0]
    assert rows["images_per_second"].tolist()[:5] == [10.0, 20.0, 15.0, 50.0, 99.0]
    assert rows.loc[5, "reason"] == "no objective"
    assert trials[3].params == {"dropout": 0.49}
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 5 + ["FAIL"]
    assert trials[4].values == [pytest.approx(0.551), 99.0]  # noqa: PD011
    assert first.outcome.facts["pareto"] == [0, 1]
    assert second.outcome.facts["pareto"] == [0, 3, 4]
    assert second.outcome.facts["best_number"] == 0
    assert second.printed == ""


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_halving_pauses_trials_until_the_others_reach_the_rung(engine: str, prepared: Path, tmp_path: Path) -> None:
    """Three trials, two at a time: trial 0 waits at its rung without a process, and a new one continues it."""

    def act(number: int, epoch: int, has_note: Callable[[str], bool]) -> None:
        while number and not has_note("0 epoch1"):
            time.sleep(0.02)

    settings = {"scheduler": "halving", "reduction_factor": 3, "concurrent": 1}
    plan = plan_of(prepared, tmp_path / "study", [0.5, 0.2, 0.3], **settings)
    done = run_search(plan, fake_trial(act, {0: 0.75}), engine)
    rows = done.rows
    assert rows["state"].tolist() == ["finished", "stopped", "stopped"], done.events
    assert rows["epochs"].tolist() == [3, 1, 1]
    assert [trial.state.name for trial in done.trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert [len(trial.intermediate_values) for trial in done.trials] == [3, 1, 1]
    assert done.starts() == {0: 2, 1: 1, 2: 1}
    assert rows["restarts"].tolist() == [0, 0, 0]  # no process was lost
    notes = [(number, what) for number, what, _ in done.notes()]
    assert notes.index((0, "epoch2")) > max(notes.index((1, "epoch1")), notes.index((2, "epoch1")))
    assert done.printed == ""


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_trials_that_all_fail_end_the_search(engine: str, prepared: Path, tmp_path: Path, monkeypatch) -> None:
    """Trial 0 waits at its rung for eight others: the first two fail, and the rest never starts."""

    def act(number: int, epoch: int, has_note: Callable[[str], bool]) -> None:
        if number:
            raise ValueError("no such file")

    monkeypatch.setattr(searcher, "MAX_FAILED_TRIALS", 2)
    base = BASE.replace(epochs=9)
    plan = plan_of(prepared, tmp_path / "study", [0.3], base, trials=9, scheduler="halving", reduction_factor=3)
    done = run_search(plan, fake_trial(act), engine)
    assert str(plan.out) in done.outcome.gave_up
    assert not done.outcome.facts["interrupted"]
    rows = done.rows
    assert rows["state"].tolist() == ["finished"] + ["failed"] * (len(rows) - 1), done.events
    assert rows.loc[0, "epochs"] == 9
    assert 3 <= len(rows) <= 5  # on Ray some have started before the second failure is known


@pytest.mark.slow
def test_search_writes_the_report_and_last_the_summary(prepared: Path, tmp_path: Path, monkeypatch) -> None:
    """Also for a caller in Python; a search that runs again removes the summary first."""
    monkeypatch.setattr(results, "export_best", lambda *_: None)
    plan = plan_of(prepared, tmp_path / "study", [0.3, 0.4])
    first = run_search(plan, fake_trial(interrupt(1)), IN_PROCESS, finish=True)
    out, summary = plan.out, plan.out / "summary.json"
    assert json.loads(summary.read_text(encoding="utf-8")) == {**first.outcome.facts, "comparison": None}
    assert first.outcome.facts["interrupted"]
    written = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file()}
    assert written.keys() >= {"report.html", "history.png", "history.svg", "curves.png", "best.toml", "trials.parquet"}
    assert written["summary.json"] == max(written.values())
    act = lambda *_: pytest.fail("no summary expected") if summary.exists() else None  # noqa: E731
    second = run_search(plan_of(prepared, out, [0.3, 0.4]), fake_trial(act), IN_PROCESS, finish=True)
    assert json.loads(summary.read_text(encoding="utf-8"))["trials_over"] == 2 == len(second.rows)
    assert not plan.is_finished()  # without a bundle


def test_a_second_command_in_the_same_folder_is_refused(prepared: Path, tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "w", encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        plan = plan_of(prepared, tmp_path, [0.1], scheduler="none")
        message = get_refusal(OutputError, run_search, plan, fake_trial(), IN_PROCESS)
    assert message.startswith(f"{tmp_path}: ")
    assert not (tmp_path / "study.db").exists()


def test_a_machine_without_a_gpu_is_refused_before_ray_starts(prepared: Path, tmp_path, command, monkeypatch) -> None:
    monkeypatch.setattr(environment, "count_gpus", lambda: 0)
    monkeypatch.setattr(search.ray, "is_initialized", lambda: False)  # earlier tests may have started one
    code, out, err = command("tune", prepared, "--out", tmp_path / "study", "--gpu")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--gpu: this machine has no GPU" in err


def test_a_ray_without_its_dashboard_is_refused(prepared: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(search, "DASHBOARD_WAIT_S", 0)
    monkeypatch.setattr(search, "_query_state_api", lambda: "ConnectionError: no answer")
    monkeypatch.setattr(search.ray, "remote", lambda **_: lambda function: SimpleNamespace(remote=function))
    monkeypatch.setattr(search.ray, "get", lambda answer: answer)
    plan = plan_of(prepared, tmp_path / "study", [0.1])
    message = get_refusal(ConfigError, search.search, plan, trial=fake_trial(), finish=False)
    assert "dashboard" in message
    assert "no answer" in message
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("reason", "raised"), [("Connection refused", True), ("killed due to the node running low on memory", False)]
)
def test_a_trial_whose_node_is_lost_is_raised_so_that_it_restarts(
    reason: str, raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shortage of memory would repeat, so it is the trial's result."""
    from ray.exceptions import ActorUnavailableError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    lost = ActorUnavailableError(reason, b"0" * 16)
    errors = [ControllerError(lost), WorkerGroupError("rank 0", {0: WorkerHealthCheckFailedError("no answer", lost)})]

    def fit(*_: Any, **__: Any) -> None:
        # As it arrives from the controller's process.
        raise RayCxrError("training failed: no answer") from pickle.loads(pickle.dumps(errors.pop()))

    monkeypatch.setattr(trial.trainer, "fit", fit)
    monkeypatch.setattr(trial, "ReportForwarder", lambda *_: None)
    monkeypatch.setattr(trial, "plan_training", lambda *_: None)
    context = trial.TrialContext("p", "o", use_gpu=False, measure_threads=None, placement=cluster.Placement())
    given = {"settings": BASE.model_dump(mode="json"), "folder": str(tmp_path)}
    while errors:
        if raised:
            assert "was lost" in get_refusal(RayCxrError, trial.run_trial, given, context)
        else:
            assert "failure" in trial.run_trial(given, context)


def test_a_bucket_that_fails_while_trials_run_is_named_as_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune raises an error of a callback as text."""
    out = to_path("s3://chests/study?region=here")

    def fit() -> None:
        try:
            with remote._store_errors(out / "study.db", "written"):  # type: ignore[arg-type]
                raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation")
        except RayCxrError:
            raise ray_tune.TuneError(traceback.format_exc())  # noqa: B904

    monkeypatch.setattr(search, "wrap_function", lambda _: type("Wrapped", (), {}))
    monkeypatch.setattr(search.ray_tune, "with_resources", lambda wrapped, _: wrapped)
    monkeypatch.setattr(search.ray_tune, "Tuner", lambda *_, **__: SimpleNamespace(fit=fit))
    monkeypatch.setattr(search.cluster, "avoid_spot", lambda *_: {})
    plan: Any = SimpleNamespace(out=out, settings=TuneSettings(), base=BASE)
    message = get_refusal(RayCxrError, search._run_tune, plan, print, None, max_concurrent_trials=1)
    assert message.startswith(f"{out}: cannot be written: NETWORK_CONNECTION; ")


def test_a_table_that_cannot_be_stored_is_stored_after_the_next_trial(prepared: Path, tmp_path: Path) -> None:
    write, failures = search_monitor.write_trials, iter([True])

    def fail_once(*given: Any) -> Any:
        if next(failures, False):
            raise RayCxrError("s3://chests/study/trials.parquet: cannot be written: NETWORK_CONNECTION")
        return write(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_monitor, "write_trials", fail_once)
        done = run_search(plan_of(prepared, tmp_path / "study", [0.3, 0.4]), fake_trial(), IN_PROCESS)
    assert sum("WARNING: cannot update trials.parquet" in event for event in done.events) == 1
    assert done.rows["state"].tolist() == ["finished", "finished"], done.events
