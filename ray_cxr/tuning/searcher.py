"""The searcher: Optuna proposes trials to Ray Tune, and Optuna's storage records how they end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import optuna
import tomli_w
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from sqlalchemy.exc import SQLAlchemyError

from ray_cxr.errors import RayCxrError, one_line
from ray_cxr.storage import atomic, remote
from ray_cxr.training.monitor import read_metrics
from ray_cxr.tuning.halving import Halving
from ray_cxr.tuning.plan import DIRECTIONS, StudyPlan
from ray_cxr.tuning.records import METRIC, REPORT_NAMES, get_state, read_objectives
from ray_cxr.tuning.storage import explain_database_error

T = TypeVar("T")

_DATABASE_ERRORS = (optuna.exceptions.StorageInternalError, SQLAlchemyError)
#: After this many successive trials that fail before any epoch the search ends: their settings are not the cause.
MAX_FAILED_TRIALS = 5


class StudySearcher(OptunaSearch):
    """Ray's OptunaSearch on a study that outlives this process; each worker of a trial has `cpus` CPUs.

    Stopped trials are recorded as pruned, and failed trials as failed with their reason. Unfinished trials of an
    earlier run are suggested first, with the same numbers and settings.
    """

    def __init__(self, plan: StudyPlan, study: optuna.Study, cpus: int) -> None:
        self._objectives = plan.settings.objectives
        self._is_multi_objective = several = len(self._objectives) > 1
        super().__init__(
            space=plan.space.suggest,
            metric=[REPORT_NAMES[name] for name in self._objectives] if several else METRIC,
            mode=[DIRECTIONS[name][:3] for name in self._objectives] if several else "max",
            sampler=study.sampler,
            study_name=study.study_name,
            storage=study._storage,
        )
        self.plan, self.study, self.cpus = plan, study, cpus
        self._ot_study = study  # the study that OptunaSearch uses
        self._failed_in_row = 0
        #: Why no more trials are started, if `MAX_FAILED_TRIALS` have failed.
        self.gave_up: str | None = None
        #: The scheduler `halving`, which replaces Ray's limit on the number of trials; None with another scheduler.
        self.halving: Halving | None = None
        #: Numbers of the unfinished trials of an earlier run.
        trials = study.get_trials(deepcopy=False)
        self.unfinished = [trial.number for trial in trials if get_state(trial) == "running"]

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles a searcher to restore it, and this one continues from Optuna's storage."""
        return {}

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Return whether this searcher limits the number of trials in place of Ray."""
        return self.halving is not None

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the next trial's configuration, None to be called again later, or `Searcher.FINISHED`."""
        if self._failed_in_row >= MAX_FAILED_TRIALS:
            self.gave_up = (
                f"{self.plan.out}: {MAX_FAILED_TRIALS} successive trials failed before their first epoch, so no more "
                "were started; fix the cause that they report, then run the same command again to continue"
            )
            if self.halving is not None:
                self.halving.close()
            return Searcher.FINISHED
        if self.halving is not None and not self.halving.has_capacity():
            return None
        if self.unfinished:
            # Optuna suggests the values of the earlier run again.
            trial = optuna.trial.Trial(self.study, self._get_frozen(self.unfinished.pop(0))._trial_id)
        else:
            trial = self._ask()
        self._retry(lambda: self.plan.space.suggest(trial))
        self._ot_trials[trial_id] = trial
        self.count_start(trial_id)
        folder = self.plan.folder(trial.number)
        folder.mkdir(parents=True, exist_ok=True)
        settings = self.plan.build_settings(trial).replace(cpus_per_worker=self.cpus)
        # Users can repeat a trial with its trial.toml.
        plain = settings.model_dump(mode="json", exclude_none=True)
        atomic.write_text(folder / "trial.toml", tomli_w.dumps({"train": plain}))
        return {
            "number": trial.number,
            "name": f"trial-{trial.number:04d}-{settings.backbone}",
            "folder": remote.to_address(folder),
            "settings": settings.model_dump(mode="json"),
        }

    def _ask(self) -> optuna.trial.Trial:
        """Return the next trial; after an error, the one that Optuna may have created before it."""
        is_repeated = False

        def ask() -> optuna.trial.Trial:
            nonlocal is_repeated
            if is_repeated:
                known = {trial.number for trial in self._ot_trials.values()}
                for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                    if trial.number not in known:
                        return optuna.trial.Trial(self.study, trial._trial_id)
            is_repeated = True
            return self.study.ask()

        return self._retry(ask)

    def _get_frozen(self, number: int) -> FrozenTrial:
        return self._retry(lambda: self.study.get_trials(deepcopy=False)[number])

    def count_start(self, trial_id: str) -> None:
        """Count the starts of a trial's processes, also after a loss."""
        trial = self._ot_trials[trial_id]
        self._write(lambda: trial.set_user_attr("starts", int(trial.user_attrs.get("starts", 0)) + 1))

    def get_values(self, trial_id: str) -> dict[str, Any]:
        return self.plan.space.values(self._retry(lambda: self._ot_trials[trial_id].params))

    def get_reason(self, trial_id: str) -> str | None:
        """Return why a trial failed; None if it did not."""
        reason: str | None = self._retry(lambda: self._ot_trials[trial_id].user_attrs.get("reason"))
        return reason

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record the AUROC of an epoch; Optuna accepts no epochs in a study with several objectives."""
        if self._is_multi_objective or math.isnan(result[METRIC]):
            return
        trial = self._ot_trials[trial_id]
        if result["epoch"] not in self._get_frozen(trial.number).intermediate_values:
            self._write(lambda: trial.report(result[METRIC], result["epoch"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record how a trial ended; `fail` records the trials that raised an exception."""
        if trial_id in self._completed_trials or error or not result:
            return
        if "failure" in result:
            self.fail(trial_id, str(result["failure"]))
            return
        trial, finished = self._ot_trials[trial_id], is_finished(result, self.plan.base.epochs)
        if result.get("images_per_second") is not None:
            self._write(lambda: trial.set_user_attr("images_per_second", result["images_per_second"]))
        values = read_objectives(result, self._objectives)
        if values is None:
            self.fail(trial_id, f"it has no {' and '.join(self._objectives)}")
            return
        if finished or self._is_multi_objective:
            self._write(lambda: trial.set_user_attr("state", "finished" if finished else "stopped"))
            self._write(lambda: self._tell(trial, values))
        else:
            self.on_trial_result(trial_id, result)
            self._write(lambda: self._tell(trial, state=TrialState.PRUNED))
        self._completed_trials.add(trial_id)
        self._failed_in_row = 0

    def fail(self, trial_id: str, reason: str) -> None:
        """Record that a trial failed, and why."""
        if trial_id in self._completed_trials:
            return
        trial = self._ot_trials[trial_id]
        self._write(lambda: trial.set_user_attr("reason", one_line(reason)[:500]))
        self._write(lambda: self._tell(trial, state=TrialState.FAIL))
        self._completed_trials.add(trial_id)
        self._failed_in_row = 0 if read_metrics(self.plan.folder(trial.number)) else self._failed_in_row + 1

    def _tell(
        self, trial: optuna.trial.Trial, values: list[float] | None = None, state: TrialState | None = None
    ) -> None:
        # A trial has ended already if a database has stored its end, but its answer was lost.
        self.study.tell(trial, values, state, skip_if_finished=True)

    def _write(self, write: Callable[[], Any]) -> None:
        self._retry(write)
        self._retry(self.plan.storage.save)

    def _retry(self, call: Callable[[], T]) -> T:
        """Use Optuna's storage with retries: other programs may lock it, or it may be restarting."""
        for wait in (1, 2, 4, 8, 16, 32):
            try:
                return call()
            except (*_DATABASE_ERRORS, RayCxrError):  # the latter: a bucket cannot be written
                time.sleep(wait)
        try:
            return call()
        except _DATABASE_ERRORS as error:
            raise RayCxrError(f"{self.plan.storage}: {explain_database_error(error)}") from None

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: Optuna's storage holds the state."""

    restore = save


def is_finished(result: dict[str, Any], epochs: int) -> bool:
    """Return whether a trial completed all epochs, even if the scheduler stopped it at the last one."""
    return "ended" in result or result["epoch"] >= epochs
