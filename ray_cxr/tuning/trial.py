"""One trial: the function that Ray Tune runs in a process of its own.

A trial is a RUN of `train` in STUDY/trials/NNNN. Its process holds no CPU, because its Ray Train workers need them. If
the process ends early, the next process of the same trial continues in that folder.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from ray_cxr import cluster
from ray_cxr.config import InputSpec, TrainSettings, build
from ray_cxr.errors import DivergedError, RayCxrError
from ray_cxr.models.architecture import Architecture
from ray_cxr.storage import atomic
from ray_cxr.storage.run_folder import read_json
from ray_cxr.training import trainer
from ray_cxr.training.planning import plan_training
from ray_cxr.training.worker import UNSCORED
from ray_cxr.tuning.records import read_curve

#: In STUDY: measured images per second of exported models, one file per architecture.
SPEEDS = "speeds"
#: Seconds to wait until Tune has read all reports of a trial.
REPORTS_WAIT_S = 60


@dataclass(frozen=True)
class TrialContext:
    """The values that all trials of a search share.

    Attributes:
        measure_threads: CPU threads for timing an exported model; None: do not time it.
        selector: Ray's label selector of the nodes that may work; None: all nodes.
    """

    prepared: str
    out: str
    use_gpu: bool
    measure_threads: int | None
    selector: dict[str, str] | None


def run_trial(config: dict[str, Any], context: TrialContext) -> dict[str, Any]:
    """Train one trial and report each epoch to Tune, including those before a restart; return the last with `ended`.

    A failure that would repeat is returned as a result with `failure`, because Tune restarts a trial that raises.
    Failures that may pass are raised, such as a folder that cannot be read. The trial waits for missing resources.
    """
    cluster.set_selector(context.selector)
    settings, folder = build(TrainSettings, config["settings"]), Path(config["folder"])
    plan = plan_training(context.prepared, folder, settings)
    rate = None
    if context.measure_threads is not None:
        architecture = Architecture.of(plan.settings, plan.data.size)
        rate = _measure_rate(Path(context.out), architecture, plan.data.input_spec, context.measure_threads)
    builder = ReportBuilder(rate)
    for epoch in read_curve(folder):
        tune.report(builder.build(epoch))
    forwarder = ReportForwarder(builder)
    try:
        curves = trainer.fit(plan, use_gpu=context.use_gpu, listeners=[forwarder], queue=True)
    except RayCxrError as error:
        # Image ids of a diverged step remain in the trial's failure.json.
        reason = error.reason if isinstance(error, DivergedError) else str(error)
        return {"epoch": 0, "val_auroc": math.nan, "best_val_auroc": math.nan, "failure": reason}
    forwarder.wait()
    builder, last = ReportBuilder(rate), {}
    for epoch in curves:
        last = builder.build(epoch)
    return {**last, "ended": 1}


class ReportBuilder:
    """Convert epochs to Tune's reports, which contain the best AUROC so far: that of a bundle made now.

    `rate` is the exported model's, images per second; None if not measured.
    """

    def __init__(self, rate: float | None) -> None:
        self._best: dict[str, Any] | None = None
        self._rate = rate

    def build(self, epoch: dict[str, Any]) -> dict[str, Any]:
        """Return the report of the next epoch; raise RayCxrError if it has no validation AUROC."""
        if epoch["val_auroc"] is None:
            raise RayCxrError(
                "an epoch has no validation AUROC: no finding has both positives and negatives among its images"
            )
        if self._best is None or epoch["val_auroc"] > self._best["val_auroc"]:
            self._best = epoch
        return {
            "epoch": int(epoch["epoch"]),
            "loss": epoch["loss"],
            "val_auroc": epoch["val_auroc"],
            "best_val_auroc": self._best["val_auroc"],
            "calibration": self._best["val_calibration_error"],
            **({} if self._rate is None else {"images_per_second": self._rate}),
        }


class ReportForwarder(TuneReportCallback):
    """Forward reports of a run's controller to Tune, except those of checkpoints during an epoch."""

    def __init__(self, builder: ReportBuilder) -> None:
        super().__init__()
        self._builder = builder

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if metrics[0]["selection"] != UNSCORED:
            super().after_report(run_context, [self._builder.build(metrics[0])], None)

    def wait(self) -> None:
        """Wait until Tune has read all reports: one after the result would block Tune's queue, which holds one."""
        deadline = time.monotonic() + REPORTS_WAIT_S
        while not self._training_actor_item_queue.empty() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # a report leaves the queue a moment before Tune has it


def _measure_rate(out: Path, architecture: Architecture, spec: InputSpec, threads: int) -> float:
    """Return images per second of the exported model, measured once per architecture of a study.

    A task with `threads` CPUs measures it in another process, so that this one never imports TensorFlow.
    """
    identity = architecture.model_dump(mode="json", exclude={"findings", "dropout"})
    text = f"{threads} {architecture.model_dump_json(exclude={'findings', 'dropout'})}"
    path = out / SPEEDS / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    known = read_json(path)
    if known:
        return float(known["images_per_second"])
    options = {"num_cpus": threads, "scheduling_strategy": "DEFAULT", "label_selector": cluster.get_selector()}
    rate = float(ray.get(ray.remote(_measure).options(**options).remote(architecture, spec, threads)))
    path.parent.mkdir(exist_ok=True)
    atomic.write_json(path, {"images_per_second": rate, "threads": threads, "architecture": identity})
    return rate


def _measure(architecture: Architecture, spec: InputSpec, threads: int) -> float:
    from ray_cxr.models import throughput

    return throughput.images_per_second(architecture, spec, threads=threads)
