"""One trial: what the tuned function does in its own process. It holds no CPU: its Ray Train workers do.

A trial is a RUN of `train` in STUDY/trials/NNNN. Whatever ends a trial's process, the next one of the same number
continues there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from ray_cxr import cluster
from ray_cxr.config import TrainSettings, build
from ray_cxr.errors import RayCxrError
from ray_cxr.models.architecture import Architecture
from ray_cxr.storage import atomic
from ray_cxr.training import trainer
from ray_cxr.training.worker import UNSCORED
from ray_cxr.tuning.study import curve_of

#: In STUDY: rates of exported networks, one file for each architecture.
SPEEDS = "speeds"


@dataclass(frozen=True)
class Job:
    """What all trials of a search share.

    Attributes:
        prepared, out: the prepared folder and the study's.
        use_gpu: whether workers train on GPUs.
        measure_threads: CPU threads that an exported network is timed on; None: it is not timed.
        where: nodes that may work, as a label selector of Ray's; None: all.
    """

    prepared: str
    out: str
    use_gpu: bool
    measure_threads: int | None
    where: dict[str, str] | None


def run(config: dict[str, Any], job: Job) -> dict[str, Any]:
    """Train one trial to its end, reporting each epoch to Tune; what went before a restart is reported again.

    A failure that would only happen again comes back as a result, `failure`: Tune would start whatever raises anew.
    What may pass, such as a folder that cannot be read just now, is raised. Resources that are gone are waited for.

    Args:
        config: `folder`, the trial's, and `settings`, whole.
        job: what trials share.

    Returns:
        The last report: that of the last epoch, with `ended`.
    """
    cluster.set_selector(job.where)
    settings, folder = build(TrainSettings, config["settings"]), Path(config["folder"])
    plan = trainer.check(job.prepared, folder, settings)
    rate = None
    if job.measure_threads is not None:
        rate = _rate(Path(job.out), Architecture.of(plan.settings, plan.data.size), plan.data, job.measure_threads)
    points = Points(rate)
    for epoch in curve_of(folder):
        tune.report(points.next(epoch))
    relay = Relay(points)
    try:
        curves = trainer.fit(plan, folder, use_gpu=job.use_gpu, listeners=[relay], queue=True)
    except RayCxrError as error:
        # The images of the step that failed stand in the trial's own failure.json; a reason travels further.
        reason = str(error).split("; lower the learning rate or set clip_norm")[0]
        return {"epoch": 0, "val_auroc": float("nan"), "best_val_auroc": float("nan"), "failure": reason}
    relay.wait()
    points, last = Points(rate), {}
    for epoch in curves:
        last = points.next(epoch)
    return {**last, "ended": 1}


class Points:
    """Epochs as Tune gets them: with the best AUROC so far, which is what a bundle would have."""

    def __init__(self, rate: float | None) -> None:
        self._best: dict[str, Any] | None = None
        self._rate = rate

    def next(self, epoch: dict[str, Any]) -> dict[str, Any]:
        """The report of an epoch, which comes after those that were asked for before."""
        if epoch["val_auroc"] is None:
            raise RayCxrError("an epoch has no validation AUROC: no finding has both sides among the images it was on")
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


class Relay(TuneReportCallback):
    """Ray's way from a run's controller to Tune; checkpoints in mid-epoch are no news there."""

    def __init__(self, points: Points) -> None:
        super().__init__()
        self._points = points

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if metrics[0]["selection"] != UNSCORED:
            super().after_report(run_context, [self._points.next(metrics[0])], None)

    def wait(self) -> None:
        """Wait until Tune has taken all that was handed on.

        A last report that comes after the function's own would find Tune's queue of one full, and its reader waiting to
        put it there.
        """
        deadline = time.monotonic() + 60
        while not self._training_actor_item_queue.empty() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # it is out of the queue a moment before it is with Tune


def _rate(out: Path, architecture: Architecture, data: Any, threads: int) -> float:
    """Images a second of the exported network; timed once for each architecture of a study.

    It is timed in a task that holds as many CPUs, in a process of its own: this one stays without TensorFlow.
    """
    import hashlib
    import json

    text = f"{threads} {architecture.model_dump_json(exclude={'findings', 'dropout'})}"
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = out / SPEEDS / f"{name}.json"
    if path.exists():
        return float(json.loads(path.read_text(encoding="utf-8"))["images_per_second"])
    rate = float(
        ray.get(
            ray.remote(_measure)
            .options(num_cpus=threads, scheduling_strategy="DEFAULT", label_selector=cluster.get_selector())
            .remote(architecture, data.input_spec, threads)
        )
    )
    path.parent.mkdir(exist_ok=True)
    known = architecture.model_dump(mode="json", exclude={"findings", "dropout"})
    atomic.write_json(path, {"images_per_second": rate, "threads": threads, "architecture": known})
    return rate


def _measure(architecture: Architecture, spec: Any, threads: int) -> float:
    from ray_cxr.models import throughput

    return throughput.images_per_second(architecture, spec, threads=threads)
