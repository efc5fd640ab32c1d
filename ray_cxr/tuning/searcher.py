"""The searcher: Optuna proposes trials to Ray Tune, and Optuna's storage records how they end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import optuna
import tomli_w
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from sqlalchemy.exc import SQLAlchemyError

from ray_cxr.storage import atomic
from ray_cxr.tuning.halving import Halving
from ray_cxr.tuning.plan import DIRECTIONS, StudyPlan
from ray_cxr.tuning.records import REPORT_NAMES, get_state, read_curve, read_objectives
from ray_cxr.tuning.schedulers import METRIC

#: The search ends after this many successive trials that fail before any epoch: their settings are not the cause.
MAX_FAILED_TRIALS = 5


class StudySearcher(OptunaSearch):
    """Ray's OptunaSearch on a study that outlives this process; `cpus` are those of each worker.

    Stopped trials are recorded as pruned, failed ones as failed with their reason. Unfinished trials of an earlier
    process are suggested first, under their numbers.
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
        self._plan, self.cpus = plan, cpus
        self._ot_study = study
        self._failed_in_row = 0
        #: Whether the search ended because of `MAX_FAILED_TRIALS`.
        self.gave_up = False
        #: The scheduler, if it limits the number of trials in place of Ray.
        self.halving: Halving | None = None
        #: Numbers of the unfinished trials of an earlier run.
        self.unfinished = [one.number for one in study.get_trials(deepcopy=False) if get_state(one) == "running"]

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles a searcher to restore it, and this one continues from Optuna's storage."""
        return {}

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Return whether this searcher, and not Ray, limits the number of trials."""
        return self.halving is not None

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the next trial's configuration, None to be called again later, or `Searcher.FINISHED`."""
        if self._failed_in_row >= MAX_FAILED_TRIALS:
            self.gave_up = True
            if self.halving is not None:
                self.halving.close()
            return Searcher.FINISHED
        if self.halving is not None and not self.halving.has_capacity():
            return None
        if self.unfinished:
            # Optuna suggests the values of the earlier run again.
            trial = optuna.trial.Trial(self._ot_study, self._get_frozen(self.unfinished.pop(0))._trial_id)
        else:
            trial = self._ot_study.ask()
        self._plan.space.suggest(trial)
        self._ot_trials[trial_id] = trial
        self.count_start(trial_id)
        folder = self._plan.folder(trial.number)
        folder.mkdir(parents=True, exist_ok=True)
        settings = self._plan.build_settings(trial).replace(cpus_per_worker=self.cpus)
        # For users, who can repeat any trial with it.
        plain = {name: value for name, value in settings.model_dump(mode="json").items() if value is not None}
        atomic.write_text(folder / "trial.toml", tomli_w.dumps({"train": plain}))
        return {
            "number": trial.number,
            "name": f"trial-{trial.number:04d}-{settings.backbone}",
            "folder": str(folder.absolute()),
            "settings": settings.model_dump(mode="json"),
        }

    def _get_frozen(self, number: int) -> FrozenTrial:
        return self._ot_study.get_trials(deepcopy=False)[number]

    def count_start(self, trial_id: str) -> None:
        """Count the start of a trial's process, the first or one after a loss."""
        trial = self._ot_trials[trial_id]
        trial.set_user_attr("starts", int(trial.user_attrs.get("starts", 0)) + 1)

    def get_values(self, trial_id: str) -> dict[str, Any]:
        return self._plan.space.values(self._ot_trials[trial_id].params)

    def get_reason(self, trial_id: str) -> str | None:
        """Return why a trial failed; None if it did not."""
        reason: str | None = self._ot_trials[trial_id].user_attrs.get("reason")
        return reason

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record an epoch; Optuna accepts none in a study with several objectives."""
        if self._is_multi_objective or math.isnan(result[METRIC]):
            return
        trial = self._ot_trials[trial_id]
        if result["epoch"] not in self._get_frozen(trial.number).intermediate_values:
            self._write(lambda: trial.report(result[METRIC], result["epoch"]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record how a trial ended; `fail` records those that raised, with the reason."""
        if trial_id in self._completed_trials or error or not result:
            return
        if "failure" in result:
            self.fail(trial_id, str(result["failure"]))
            return
        trial, finished = self._ot_trials[trial_id], is_finished(result, self._plan.base.epochs)
        if result.get("images_per_second") is not None:
            self._write(lambda: trial.set_user_attr("images_per_second", result["images_per_second"]))
        values = read_objectives(result, self._objectives)
        if values is None:
            self.fail(trial_id, f"it has no {' and '.join(self._objectives)}")
            return
        if finished or self._is_multi_objective:
            self._write(lambda: trial.set_user_attr("state", "finished" if finished else "stopped"))
            self._write(lambda: self._ot_study.tell(trial, values))
        else:
            self.on_trial_result(trial_id, result)
            self._write(lambda: self._ot_study.tell(trial, state=TrialState.PRUNED))
        self._completed_trials.add(trial_id)
        self._failed_in_row = 0

    def fail(self, trial_id: str, reason: str) -> None:
        """Record that a trial failed, and why."""
        if trial_id in self._completed_trials:
            return
        trial = self._ot_trials[trial_id]
        self._write(lambda: trial.set_user_attr("reason", " ".join(reason.split())[:500]))
        self._write(lambda: self._ot_study.tell(trial, state=TrialState.FAIL))
        self._completed_trials.add(trial_id)
        self._failed_in_row = 0 if read_curve(self._plan.folder(trial.number)) else self._failed_in_row + 1

    def _write(self, write: Callable[[], Any]) -> None:
        """Write to Optuna's storage with retries: other programs may lock it, or it may be restarting."""
        for wait in (1, 2, 4, 8, 16, 32):
            try:
                write()
                return
            except (optuna.exceptions.StorageInternalError, SQLAlchemyError):
                time.sleep(wait)
        write()

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: Optuna's storage holds the state."""

    restore = save


def is_finished(result: dict[str, Any], epochs: int) -> bool:
    """Return whether a trial completed all epochs, even if the scheduler stopped it at the last one."""
    return "ended" in result or result["epoch"] >= epochs
