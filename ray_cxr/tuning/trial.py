"""One trial: the function that Ray Tune runs in a separate process.

A trial is a RUN of `train` in STUDY/trials/NNNN. Its process holds no CPU, because its Ray Train workers need them. If
the process ends early, the next process of the same trial continues in that folder.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from ray_cxr import cluster, limits
from ray_cxr.config import InputSpec, TrainSettings, build
from ray_cxr.errors import DivergedError, RayCxrError, list_causes
from ray_cxr.models.architecture import Architecture
from ray_cxr.storage import atomic, remote
from ray_cxr.storage.run_folder import read_json
from ray_cxr.training import trainer
from ray_cxr.training.checkpoints import read_stored_epochs
from ray_cxr.training.planning import plan_training
from ray_cxr.training.worker import UNSCORED

#: In STUDY: measured images per second of exported models, one file per architecture.
SPEEDS = "speeds"
#: What Ray raises if a node or a process is gone.
_LOST = (ray.exceptions.RayActorError, ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError)
#: Seconds to wait until Tune has read all reports of a trial.
REPORTS_WAIT_S = 60


@dataclass(frozen=True)
class TrialContext:
    """The values that all trials of a search share.

    Attributes:
        prepared, out: addresses of the prepared folder and of the study.
        measure_threads: CPU threads for timing an exported model; None: do not time it.
        placement: the nodes for the workers.
    """

    prepared: str
    out: str
    use_gpu: bool
    measure_threads: int | None
    placement: cluster.Placement


def run_trial(config: dict[str, Any], context: TrialContext) -> dict[str, Any]:
    """Train a trial, report each epoch to Tune, and return the last report with `ended`.

    The epochs before a restart are reported again. Tune restarts a trial that raises, so only a failure that may pass
    is raised, e.g. an unreadable folder or a lost node; a failure that would repeat is returned as `failure`. The trial
    waits for missing resources.
    """
    cluster.placement = context.placement
    settings, folder = build(TrainSettings, config["settings"]), remote.to_path(config["folder"])
    run = plan_training(context.prepared, folder, settings)
    rate, out = None, remote.to_path(context.out)
    if context.measure_threads is not None:
        rate = _measure_rate(out, run.architecture, run.data.input_spec, context.measure_threads)
    curve = read_stored_epochs(folder)
    for report in build_reports(curve, rate):
        tune.report(report)
    forwarder = ReportForwarder(curve, rate)
    try:
        curve = trainer.fit(run, use_gpu=context.use_gpu, listeners=[forwarder], queue=True)
    except RayCxrError as error:
        if _is_loss(error):
            raise RayCxrError(f"a node or a process of its training was lost ({error})") from error
        # Image ids of a diverged step remain in the trial's failure.json.
        reason = error.reason if isinstance(error, DivergedError) else str(error)
        return {"epoch": 0, "val_auroc": math.nan, "best_val_auroc": math.nan, "failure": reason}
    forwarder.wait()
    return {**build_reports(curve, rate)[-1], "ended": 1}


def _is_loss(error: RayCxrError) -> bool:
    """Return whether a node or process of a training is gone, without a known shortage of memory or processes."""
    lost = any(isinstance(cause, _LOST) for cause in list_causes(error))
    return lost and limits.explain_loss(error.__cause__, "") is None


def build_report(curve: Sequence[dict[str, Any]], rate: float | None) -> dict[str, Any]:
    """Return Tune's report of the last epoch of a curve; raise RayCxrError if it has no validation AUROC.

    `rate` is the measured speed of the exported model, images per second.
    """
    last = curve[-1]
    if last["val_auroc"] is None:
        raise RayCxrError("an epoch has no validation AUROC: no finding has positives and negatives among its images")
    best = max(curve, key=lambda epoch: epoch["val_auroc"])  # a bundle made now has this epoch
    return {
        "epoch": int(last["epoch"]),
        "loss": last["loss"],
        "val_auroc": last["val_auroc"],
        "best_val_auroc": best["val_auroc"],
        "calibration": best["val_calibration_error"],
        **({} if rate is None else {"images_per_second": rate}),
    }


def build_reports(curve: Sequence[dict[str, Any]], rate: float | None) -> list[dict[str, Any]]:
    """Return the report of each epoch of a curve."""
    return [build_report(curve[: index + 1], rate) for index in range(len(curve))]


class ReportForwarder(TuneReportCallback):
    """Forward the reports of a run's controller to Tune, except for checkpoints within an epoch.

    `curve` has the epochs that Tune knows.
    """

    def __init__(self, curve: Sequence[dict[str, Any]], rate: float | None) -> None:
        super().__init__()
        self._curve, self._rate = list(curve), rate

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if metrics[0]["selection"] != UNSCORED:
            # A trial that was lost repeats epochs that it had reported, but not stored.
            self._curve = [point for point in self._curve if point["epoch"] < metrics[0]["epoch"]] + [metrics[0]]
            super().after_report(run_context, [build_report(self._curve, self._rate)], None)

    def wait(self) -> None:
        """Wait until Tune has read all reports; a report after the result would block Tune's queue, which holds one."""
        deadline = time.monotonic() + REPORTS_WAIT_S
        while not self._training_actor_item_queue.empty() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # a report leaves the queue a moment before Tune has it


def _measure_rate(out: Path, architecture: Architecture, spec: InputSpec, threads: int) -> float:
    """Return images per second of the exported model, measured once per architecture of a study.

    A task with `threads` CPUs measures the speed, so that this process never imports TensorFlow.
    """
    identity = architecture.model_dump(mode="json", exclude={"findings", "dropout"})
    text = f"{threads} {architecture.model_dump_json(exclude={'findings', 'dropout'})}"
    path = out / SPEEDS / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    known = read_json(path)
    if known:
        return float(known["images_per_second"])
    options = {"num_cpus": threads, "scheduling_strategy": "DEFAULT", **cluster.placement.options}
    rate = float(ray.get(ray.remote(_measure).options(**options).remote(architecture, spec, threads)))
    path.parent.mkdir(exist_ok=True)
    atomic.write_json(path, {"images_per_second": rate, "threads": threads, "architecture": identity})
    return rate


def _measure(architecture: Architecture, spec: InputSpec, threads: int) -> float:
    from ray_cxr.models import exports

    return exports.measure_images_per_second(architecture, spec, threads=threads)
