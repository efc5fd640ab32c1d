"""The schedulers of `tune`, which stop bad trials early."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from ray_cxr.config import TuneSettings
from ray_cxr.tuning.halving import Halving
from ray_cxr.tuning.records import REPORT_NAMES, read_curve

#: The metric that schedulers compare: the best AUROC so far, as a bundle made now would have it.
METRIC = REPORT_NAMES["auroc"]
#: Minimum number of other trials for a median that can stop one.
_MIN_MEDIAN_TRIALS = 3


class EndedTrial:
    """A trial of an earlier run, with the attributes that a scheduler reads."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"earlier-{number}"


def create_scheduler(
    settings: TuneSettings, epochs: int, earlier: Mapping[int, Sequence[Mapping[str, Any]]], *, trials: int, most: int
) -> TrialScheduler:
    """Return Ray's scheduler for these settings, after replaying the reports of earlier runs.

    Args:
        epochs: of a complete trial.
        earlier: the reports of each ended trial, by its number.
        trials, most: number of trials expected, and maximum number of processes.
    """
    common: dict[str, Any] = {"time_attr": "epoch", "metric": METRIC, "mode": "max"}
    scheduler: TrialScheduler
    if settings.scheduler == "asha":
        scheduler = ASHAScheduler(
            **common,
            max_t=epochs,
            grace_period=settings.grace_epochs,
            reduction_factor=settings.reduction_factor,
            stop_last_trials=False,  # a trial ends after its last epoch anyway
        )
    elif settings.scheduler == "median":
        scheduler = MedianStoppingRule(
            **common,
            grace_period=settings.grace_epochs,
            min_samples_required=_MIN_MEDIAN_TRIALS,
            min_time_slice=math.inf,  # otherwise it pauses trials, which restarts their workers
        )
    elif settings.scheduler == "halving":
        return Halving(
            metric=METRIC,
            time_attr="epoch",
            epochs=epochs,
            grace=settings.grace_epochs,
            reduction=settings.reduction_factor,
            trials=trials,
            most=most,
            count_epochs=lambda trial: len(read_curve(Path(trial.config["folder"]))),
        )
    else:
        return FIFOScheduler()
    for number, reports in earlier.items():
        trial = EndedTrial(number)
        scheduler.on_trial_add(None, trial)
        for report in reports:
            if settings.scheduler == "median":
                # Only records the report; on_trial_result would also decide, and the trial has ended.
                scheduler.on_trial_complete(None, trial, dict(report))
            else:
                scheduler.on_trial_result(None, trial, dict(report))
        if settings.scheduler == "asha":
            scheduler.on_trial_remove(None, trial)
    return scheduler


def describe_scheduler(settings: TuneSettings) -> str:
    rungs = f"grace {settings.grace_epochs}, reduction {settings.reduction_factor}"
    return {
        "asha": f"ASHA ({rungs})",
        "halving": f"successive halving ({rungs})",
        "median": f"median rule (grace {settings.grace_epochs})",
        "none": "none: every trial trains for all epochs",
    }[settings.scheduler]
