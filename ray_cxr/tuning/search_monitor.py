"""Log the events of a search, and keep trials.parquet up to date while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from ray.tune import Callback

from ray_cxr import limits
from ray_cxr.errors import RayCxrError, last_line, one_line, own_error, to_record
from ray_cxr.progress import TrialTable
from ray_cxr.storage import atomic
from ray_cxr.training.monitor import read_metrics
from ray_cxr.training.uploads import FAILURE
from ray_cxr.tuning.confirm import ConfirmRun
from ray_cxr.tuning.records import METRIC, build_trial_table
from ray_cxr.tuning.results import drop_checkpoints, write_trials
from ray_cxr.tuning.searcher import StudySearcher, is_finished
from ray_cxr.tuning.trial import build_reports


class SearchMonitor(Callback):
    """Ray Tune's callback of a search; `on_event` receives a line of text per event.

    Attributes:
        ended: number of trials that have ended.
        earlier: the reports of each trial that ended in an earlier run, by number.
    """

    def __init__(self, searcher: StudySearcher, table: TrialTable, on_event: Callable[[str], None]) -> None:
        self._searcher, self._table, self._on_event = searcher, table, on_event
        self._plan, self._study = searcher.plan, searcher.study
        self.ended = 0
        rows = build_trial_table(self._plan, self._study)
        #: Logged epochs of each trial; a restarted trial reports its earlier epochs again.
        self._logged: dict[int, int] = dict(zip(rows["number"].tolist(), rows["epochs"].tolist(), strict=True))
        self._started: set[int] = set()
        self._best = max(rows.loc[rows["state"] != "failed", "val_auroc"].dropna(), default=-math.inf)
        rows = rows[rows["state"].isin(["finished", "stopped"])]
        curves = zip(rows["number"].tolist(), rows["curve"], strict=True)
        self.earlier = {number: build_reports(curve, None) for number, curve in curves}

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune's pickle is never read."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, backbone = trial.config["number"], trial.config["settings"]["backbone"]
        self._table.start_trial(number, backbone)
        if number in self._started:
            self._on_event(f"tune: trial {number} continues after epoch {self._logged.get(number, 0)}")
            return
        self._started.add(number)
        values = self._searcher.get_values(trial.trial_id)
        settings = [f"{name} {_format(value)}" for name, value in values.items() if name != "backbone"]
        self._on_event(f"tune: trial {number} starts: {', '.join([backbone, *settings])}")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        if "failure" in result or "ended" in result:
            return
        number, epochs = trial.config["number"], trial.config["settings"]["epochs"]
        epoch, auroc = result["epoch"], result["val_auroc"]
        self._table.end_epoch(number, epoch, epochs, auroc)
        if epoch <= self._logged.get(number, 0):
            return
        self._logged[number] = epoch
        self._best = max(self._best, result[METRIC])
        self._on_event(f"tune: trial {number}, epoch {epoch} of {epochs}: AUROC {auroc:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        # Tune does not notify the searcher of a trial that was stopped while it waited at a rung.
        self._searcher.on_trial_complete(trial.trial_id, last)
        reason = self._searcher.get_reason(trial.trial_id)
        if reason is not None:
            self._end_trial(trial, "failed", f"failed: {reason}")
            return
        is_complete = is_finished(last, trial.config["settings"]["epochs"])
        state, end = ("finished", "finished") if is_complete else ("stopped", f"stopped after epoch {last['epoch']}")
        remark = ", the best so far" if last[METRIC] >= self._best else ""
        self._end_trial(trial, state, f"is {end}: AUROC {last[METRIC]:.4f}{remark}", last[METRIC])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        reason = _describe_error(trial)
        failure = self._plan.folder(trial.config["number"]) / FAILURE
        atomic.write_json(failure, to_record(RayCxrError(reason)))
        self._searcher.fail(trial.trial_id, reason)
        self._end_trial(trial, "failed", f"failed: {reason}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._searcher.count_start(trial.trial_id)
        self._on_event(f"tune: trial {trial.config['number']} lost its process; it continues in a new one")

    def _end_trial(self, trial: Any, state: str, text: str, auroc: float | None = None) -> None:
        number = trial.config["number"]
        self.ended += 1
        self._table.end_trial(number, state, auroc)
        self._on_event(f"tune: trial {number} {text}")
        try:
            rows = write_trials(self._plan, self._study)
            # The trial that has just ended may still use its files.
            drop_checkpoints(self._plan, self._study, rows, keep={number})
        except (OSError, RayCxrError, optuna.exceptions.OptunaError) as error:
            # The file is written again when the next trial ends.
            self._on_event(f"tune: WARNING: cannot update trials.parquet: {error}")


class ConfirmMonitor(Callback):
    """Ray Tune's callback of the confirming trainings; `on_event` receives a line of text per event."""

    def __init__(self, runs: Sequence[ConfirmRun], on_event: Callable[[str], None]) -> None:
        self._runs, self._on_event = runs, on_event
        self._logged = {run.number: len(read_metrics(run.folder)) for run in runs}

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune's pickle is never read."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run = self._runs[trial.config["number"]]
        text = f"{run.settings.backbone} with the settings of trial {run.trial}, seed {run.settings.seed}"
        self._on_event(f"tune: confirming run {run.number} starts: {text}")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        run, epoch = self._runs[trial.config["number"]], result["epoch"]
        if "failure" not in result and epoch > self._logged[run.number]:
            self._logged[run.number] = epoch
            of = f"epoch {epoch} of {run.settings.epochs}"
            self._on_event(f"tune: confirming run {run.number}, {of}: AUROC {result['val_auroc']:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if reason := (trial.last_result or {}).get("failure"):
            self._fail(trial, str(reason))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._fail(trial, _describe_error(trial))

    def _fail(self, trial: Any, reason: str) -> None:
        run = self._runs[trial.config["number"]]
        if not (run.folder / FAILURE).exists():
            atomic.write_json(run.folder / FAILURE, to_record(RayCxrError(one_line(reason)[:500])))
        self._on_event(f"tune: confirming run {run.number} failed: {reason}")


def _describe_error(trial: Any) -> str:
    """Return in one line why Tune gave up a trial."""
    error = trial.get_pickled_error() if trial.pickled_error_file else None
    cause = own_error(error) if error is not None else None
    if cause is not None:
        return str(cause)
    if reason := limits.explain_loss(error, "lower the largest batch_size of tune.space, or concurrent"):
        return reason
    return "its process was lost" + (f", or raised: {last_line(error)}" if error is not None else "")


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)
