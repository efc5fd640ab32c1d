"""What one Ray Train worker does: its data, its network, its epochs; and what it leaves for others to see.

RUN/ is on storage that all nodes share; in it rank 0 writes what people watch. Checkpoints go through Ray Train.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ray_cxr import telemetry
from ray_cxr.config import TrainSettings, build
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import ConfigError, RayCxrError
from ray_cxr.evaluation import calibration
from ray_cxr.labels import NO_FINDING
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import WEIGHTS
from ray_cxr.storage import atomic, remote

if TYPE_CHECKING:
    from ray_cxr.training.loop import Epoch, Loop, Progress

#: In RUN: a line per epoch; the same for TensorBoard; where rank 0 is; how the start went; why a worker gave up.
METRICS, EVENTS, LIVE, STARTED, FAILURE = "metrics.csv", "tensorboard", "live.json", "started.json", "failure.json"
#: In a checkpoint, beside the loop's state; the latter two only at the end of an epoch, with the weights to export.
PROGRESS, RESULT, VALIDATION = "progress.json", "result.json", "validation.npz"
#: Seconds between two writings of live.json.
LIVE_EVERY_S = 2.0
#: A checkpoint in mid-epoch has no score: it is the latest, and never among the best.
UNSCORED = -1e30
#: What callbacks get to see at the end of an epoch.
LOGS = ("loss", "val_loss", "val_auroc", "learning_rate")

#: Makes the callbacks of one worker; called in each.
Callbacks = Callable[[], Sequence[Any]]


def run(config: dict[str, Any]) -> None:
    """One worker. Errors of ours come back as a file: Ray Train would restart what can only fail again."""
    import ray.train

    failure = remote.path(config["out"]) / FAILURE
    try:
        try:
            _train(config)
        except Exception as error:
            if not _out_of_memory(error):
                raise
            settings = config["settings"]
            raise RayCxrError(
                f"out of memory with batch_size={settings['batch_size']} over {settings['workers']} workers and images "
                f"of {settings['size']} pixels; lower one of them, or take more workers"
            ) from error
    except RayCxrError as error:
        atomic.write_json(failure, {"message": str(error), "input": error.exit_code == 2})
        context = ray.train.get_context()
        if context.get_world_size() > 1:
            # The others may be waiting for this one in an exchange: Ray Train ends them all. Its logs get no image ids.
            raise RayCxrError(f"worker {context.get_world_rank()} gave up; {failure} says why") from None


def _out_of_memory(error: Exception) -> bool:
    """Whether TensorFlow, or Python, could not have the memory it asked for: it would ask for as much again."""
    return isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError"


def _train(config: dict[str, Any]) -> None:
    """One worker's training, from its data to its last checkpoint."""
    import os

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    times = {"Ray": time.time()}
    import ray.train

    from ray_cxr.models import runtime
    from ray_cxr.training import schedule
    from ray_cxr.training.distributed import Replicas
    from ray_cxr.training.loop import Loop, Progress

    times["TensorFlow"] = time.time()
    settings, out, gpu = build(TrainSettings, config["settings"]), remote.path(config["out"]), bool(config["use_gpu"])
    policy = runtime.prepare_device(gpu, settings.precision)
    runtime.limit_threads(config["cpus"])
    if settings.deterministic if settings.deterministic is not None else not (gpu or settings.xla):
        runtime.make_deterministic()
    replicas = Replicas(gpu=gpu)
    if replicas.any((out / FAILURE).exists()):
        return  # a restart after an error of ours, which all must leave together
    data = PreparedSet(config["prepared"], settings.size)
    train, val = data.load("train"), data.load("val")
    times["data"] = time.time()
    checkpoint, progress = ray.train.get_checkpoint(), Progress(policy=policy)
    if checkpoint:
        with checkpoint.as_directory() as folder:
            progress = Progress(**json.loads((Path(folder) / PROGRESS).read_text(encoding="utf-8")))
        # A run goes on as it began: half precision does not come or go with the machine that it is continued on.
        policy = progress.policy
        if progress.epochs_done > settings.epochs:
            raise ConfigError(f"{out}: has {progress.epochs_done} epochs already, more than epochs={settings.epochs}")
    loop = Loop(
        replicas,
        settings,
        Architecture.of(settings, data.size),
        train,
        val,
        weights="none" if checkpoint else settings.weights,
        policy=policy,
        callbacks=config["callbacks"]() if config["callbacks"] else (),
    )
    if checkpoint:
        with checkpoint.as_directory() as folder:
            loop.restore(Path(folder), progress)
    replicas.agree(loop.shared(), "at the start")
    times["network"] = time.time()
    watch = _Watch(out, loop, times, policy, progress) if replicas.rank == 0 else None
    if watch:
        watch.metrics(progress)

    def on_step(step: int, loss: float) -> None:
        if watch:
            watch.step(progress.epochs_done, step, loss)

    def on_checkpoint() -> None:
        with tempfile.TemporaryDirectory(prefix="ray_cxr-") as name:
            _report({"epoch": progress.epochs_done + 1, "selection": UNSCORED}, loop, progress, Path(name))

    loop.callbacks.on_train_begin()
    while progress.epochs_done < settings.epochs and not progress.stopped:
        if schedule.is_out_of_patience(settings, progress.scores):
            break
        epoch = progress.epochs_done
        loop.begin_epoch(progress)
        if watch:
            watch.began()
        done = loop.run_epoch(progress, on_step=on_step, on_checkpoint=on_checkpoint)
        with tempfile.TemporaryDirectory(prefix="ray_cxr-") as name:
            point, selection = _validate(loop, progress, done, Path(name))
            loop.callbacks.on_epoch_end(epoch, {key: point[key] for key in LOGS})
            progress.epochs_done, progress.losses = epoch + 1, []
            progress.scores.append(selection)
            progress.curves.append(point)
            progress.stopped = loop.stop_wanted()
            if watch:
                watch.metrics(progress)
                watch.tell(point)
            # Of equals the first: Ray Train would keep the last.
            _report({**point, "selection": selection - 1e-12 * epoch}, loop, progress, Path(name))
    loop.callbacks.on_train_end()


def _validate(loop: Loop, progress: Progress, epoch: Epoch, folder: Path) -> tuple[dict[str, Any], float]:
    """The epoch's line of metrics and its selection score; rank 0 leaves in `folder` what a bundle needs."""
    from ray_cxr.training.loop import cross_entropy, selection

    start = time.monotonic()
    with loop.optimizer.averaged():
        probabilities, result = loop.validate()
        if loop.replicas.rank == 0:
            loop.model.save_weights(str(folder / WEIGHTS))
            (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")
            np.savez(folder / VALIDATION, probabilities=probabilities, image_ids=loop.val.image_ids.astype(str))
    values = loop.val.labels[:, loop.columns]
    real = [j for j, name in enumerate(loop.findings) if name != NO_FINDING]
    point = {
        "epoch": progress.epochs_done + 1,
        "loss": epoch.loss,
        "val_loss": cross_entropy(probabilities, values),
        "val_auroc": result["macro_auroc"],
        "val_calibration_error": calibration.cross_fitted_error(
            values[:, real],
            probabilities[:, real],
            loop.val.patient_ids,
            method=loop.settings.calibration,
            min_positives=loop.settings.min_positives,
        ),
        "learning_rate": float(np.asarray(loop.optimizer.keras.learning_rate)),
        "seconds": round(epoch.seconds, 3),
        "wait_seconds": round(epoch.waited, 3),
        "val_seconds": round(time.monotonic() - start, 3),
        "images_per_second": round(epoch.images / epoch.seconds, 2),
    }
    return point, selection(result, probabilities, values)


def _report(metrics: dict[str, Any], loop: Loop, progress: Progress, folder: Path) -> None:
    """Hand rank 0's state to Ray Train as a checkpoint; a meeting of all workers."""
    import ray.train

    checkpoint = None
    if loop.replicas.rank == 0:
        loop.save(folder)
        (folder / PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
        checkpoint = ray.train.Checkpoint.from_directory(folder)
    ray.train.report(metrics, checkpoint=checkpoint)


class _Watch:
    """What rank 0 leaves in RUN for people to see."""

    def __init__(self, out: Path, loop: Loop, times: dict[str, float], policy: str, progress: Progress) -> None:
        self._out, self._loop, self._times, self._policy = out, loop, times, policy
        self._begun = progress.epochs_done, len(progress.losses)
        self._written, self._told = 0.0, len(progress.curves)
        self._stepped = time.monotonic()

    def began(self) -> None:
        """An epoch's first step begins."""
        self._stepped = time.monotonic()

    def step(self, epoch: int, step: int, loss: float) -> None:
        if not self._written:
            self._times["first step"] = time.time()
            start = {
                "epoch": self._begun[0],
                "step": self._begun[1],
                "random": self._loop.random_layers,
                "policy": self._policy,
                "times": self._times,
            }
            atomic.write_json(self._out / STARTED, start)
        now = time.monotonic()
        # The last step of an epoch has what is left.
        size = self._loop.settings.batch_size
        telemetry.count(telemetry.IMAGES_TRAINED, min(size, len(self._loop.train) - (step - 1) * size), self._out.name)
        telemetry.count(telemetry.TRAIN_STEPS, 1, self._out.name)
        telemetry.count(telemetry.TRAIN_STEP_SECONDS, now - self._stepped, self._out.name)
        self._stepped = now
        if now - self._written >= LIVE_EVERY_S:
            self._written = now
            with contextlib.suppress(RayCxrError):  # a bucket that stumbles: nothing but the next look needs this file
                atomic.write_json(self._out / LIVE, {"epoch": epoch + 1, "step": step, "loss": loss})

    def tell(self, point: dict[str, Any]) -> None:
        """An epoch's line to Ray's metrics."""
        run = self._out.name
        telemetry.count(telemetry.TRAIN_WAIT_SECONDS, point["wait_seconds"], run)
        telemetry.show(telemetry.TRAIN_EPOCH, point["epoch"], run)
        telemetry.show(telemetry.TRAIN_LOSS, point["loss"], run)
        telemetry.show(telemetry.VAL_LOSS, point["val_loss"], run)
        telemetry.show(telemetry.VAL_AUROC, point["val_auroc"], run)
        telemetry.flush()

    def metrics(self, progress: Progress) -> None:
        """Write metrics.csv anew, and what it has more than before to TensorBoard's log."""
        if not progress.curves:
            (self._out / METRICS).unlink(missing_ok=True)  # of a life that ended before its first checkpoint
            return
        atomic.write(
            self._out / METRICS,
            lambda part: pd.DataFrame(progress.curves).to_csv(part, index=False, lineterminator="\n"),
        )
        from tensorboardX import SummaryWriter

        (self._out / EVENTS).mkdir(exist_ok=True)
        for point in progress.curves[self._told :]:
            # A file for each epoch, because only closing one writes all of it. An epoch that was logged before a kill
            # and is trained again replaces its old points.
            epoch = point["epoch"]
            with tempfile.TemporaryDirectory(prefix="ray_cxr-") as folder:
                with SummaryWriter(folder, purge_step=epoch, filename_suffix=f".{epoch:05d}") as writer:
                    for name, value in point.items():
                        if name != "epoch" and value is not None:
                            writer.add_scalar(name, value, epoch)
                for events in Path(folder).iterdir():
                    atomic.write(self._out / EVENTS / events.name, functools.partial(shutil.copyfile, events))
        self._told = len(progress.curves)
