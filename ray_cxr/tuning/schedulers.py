"""The schedulers of `tune`, which stop bad trials early."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from ray_cxr.config import TuneSettings
from ray_cxr.storage import remote
from ray_cxr.training.checkpoints import read_stored_epochs
from ray_cxr.tuning.halving import Halving
from ray_cxr.tuning.records import METRIC

Reports = Sequence[Mapping[str, Any]]
#: Minimum number of other trials for a median that can stop a trial.
_MIN_MEDIAN_TRIALS = 3


class EndedTrial:
    """A trial of an earlier run, with the attributes that a scheduler reads."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"earlier-{number}"


def create_scheduler(
    settings: TuneSettings, epochs: int, earlier: Mapping[int, Reports], *, trials: int, processes: int
) -> TrialScheduler:
    """Return Ray's scheduler for these settings, after replaying the reports of earlier runs.

    Args:
        epochs: number of epochs of a complete trial.
        earlier: the reports of each ended trial, by its number.
        trials: expected number of trials.
        processes: maximum number of trials that run at a time.
    """
    common: dict[str, Any] = {"time_attr": "epoch", "metric": METRIC, "mode": "max"}
    common["grace_period"] = settings.grace_epochs
    if settings.scheduler == "none":
        return FIFOScheduler()
    if settings.scheduler == "halving":
        return Halving(settings, epochs, trials, processes, _count_epochs)
    if settings.scheduler == "median":
        # With a finite time slice the rule would pause trials, which restarts their workers.
        median = MedianStoppingRule(**common, min_samples_required=_MIN_MEDIAN_TRIALS, min_time_slice=math.inf)
        for number, reports in earlier.items():
            trial = EndedTrial(number)
            for report in reports:
                # Only records the report; on_trial_result would also decide, and the trial has ended.
                median.on_trial_complete(None, trial, dict(report))
        return median
    # A trial ends after its last epoch anyway, so the last rung need not stop it.
    asha = ASHAScheduler(**common, max_t=epochs, reduction_factor=settings.reduction_factor, stop_last_trials=False)
    for number, reports in earlier.items():
        trial = EndedTrial(number)
        asha.on_trial_add(None, trial)
        for report in reports:
            asha.on_trial_result(None, trial, dict(report))
        asha.on_trial_remove(None, trial)
    return asha


def _count_epochs(trial: Trial) -> int:
    return len(read_stored_epochs(remote.to_path(trial.config["folder"])))


def describe_scheduler(settings: TuneSettings) -> str:
    rungs = f"grace {settings.grace_epochs}, reduction {settings.reduction_factor}"
    return {
        "asha": f"ASHA ({rungs})",
        "halving": f"successive halving ({rungs})",
        "median": f"median rule (grace {settings.grace_epochs})",
        "none": "none: every trial trains for all epochs",
    }[settings.scheduler]
