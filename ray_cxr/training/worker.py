"""A Ray Train worker: its data, its model, its epochs, and the files that rank 0 writes to RUN.

RUN is on storage that all nodes share. Ray Train stores the checkpoints.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ray_cxr import ray_api, telemetry
from ray_cxr.config import TrainSettings, build
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import ConfigError, RayCxrError, to_record
from ray_cxr.evaluation import calibration
from ray_cxr.labels import NO_FINDING
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import WEIGHTS
from ray_cxr.storage import atomic, remote
from ray_cxr.training.uploads import FAILURE, Uploads
from ray_cxr.training.watchdog import Watchdog, record_lost

if TYPE_CHECKING:
    from ray_cxr.training.loop import EpochResult, Loop, TrainState

#: In RUN, see `trainer`.
METRICS, EVENTS, LIVE, STARTED = "metrics.csv", "tensorboard", "live.json", "started.json"
#: In RUN, while a machine of the run is going away: epoch and step of the checkpoint that was written for it.
LEAVING = "leaving.json"
#: In a checkpoint: `TrainState`; and after an epoch, the result and the probabilities of validation.
PROGRESS, RESULT, VALIDATION = "progress.json", "result.json", "validation.npz"
#: Minimum seconds between two writes of live.json.
LIVE_EVERY_S = 2.0
#: Selection score of a checkpoint during an epoch, which may be the latest but must never be the best.
UNSCORED = -1e30
#: Names of the metrics that callbacks get at the end of an epoch.
LOGS = ("loss", "val_loss", "val_auroc", "learning_rate")

#: Each worker calls this function, which returns its callbacks.
Callbacks = Callable[[], Sequence[Any]]


def run(config: dict[str, Any]) -> None:
    """Run one worker. It writes our own errors to a file, because Ray Train would retry permanent failures."""
    import ray.train

    try:
        with contextlib.ExitStack() as stack:
            _train(config, stack)
    except Exception as error:
        cause, failure, settings = error, remote.to_path(config["out"]) / FAILURE, config["settings"]
        if isinstance(error, MemoryError) or type(error).__name__ == "ResourceExhaustedError":
            cause = RayCxrError(
                f"out of memory with batch_size={settings['batch_size']} over {settings['workers']} workers and images "
                f"of {settings['size']} pixels; lower one of them (accumulate keeps the size of a step), or add workers"
            )
        context = ray.train.get_context()
        rank, workers = context.get_world_rank(), context.get_world_size()
        if not isinstance(cause, RayCxrError):
            record_lost(error, failure.parent, rank, workers)
            raise
        atomic.write_json(failure, to_record(cause))
        if workers > 1:
            # Other workers may be waiting in an exchange: this exception makes Ray Train end them. It must not hold
            # image ids, because its text goes to Ray's logs.
            raise RayCxrError(f"worker {rank} failed; see {failure}") from None


def _train(config: dict[str, Any], stack: contextlib.ExitStack) -> None:
    """Train from the latest checkpoint to the last epoch, with contexts that end with `stack`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    times = {"Ray": time.time()}
    import ray.train

    from ray_cxr.models import runtime
    from ray_cxr.training import schedule
    from ray_cxr.training.distributed import Replicas
    from ray_cxr.training.loop import Loop, TrainState
    from ray_cxr.training.preemption import PreemptionWatch

    times["TensorFlow"] = time.time()
    settings, out, gpu = build(TrainSettings, config["settings"]), remote.to_path(config["out"]), config["use_gpu"]
    state = TrainState(policy=runtime.prepare_device(gpu, settings.precision))
    runtime.limit_threads(config["cpus"])
    if settings.deterministic if settings.deterministic is not None else not (gpu or settings.xla):
        runtime.make_deterministic()
    replicas = Replicas(gpu=gpu)
    watchdog = stack.enter_context(Watchdog(settings.step_timeout_s, out, replicas.rank, replicas.count))
    if replicas.any((out / FAILURE).exists()):
        return  # restarted after one of our errors: all workers must stop together
    data = PreparedSet(config["prepared"], settings.size)
    train, val = data.load("train"), data.load("val")
    times["data"] = time.time()
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = TrainState(**json.loads((Path(folder) / PROGRESS).read_text(encoding="utf-8")))
        if state.epochs_done > settings.epochs:
            raise ConfigError(f"{out}: has {state.epochs_done} epochs already, more than epochs={settings.epochs}")
    loop = Loop(
        replicas,
        settings,
        build(Architecture, config["architecture"]),
        train,
        val,
        weights="none" if checkpoint else settings.weights,
        policy=state.policy,  # a run continues on any machine with the precision that it started with
        callbacks=config["callbacks"]() if config["callbacks"] else (),
        on_progress=watchdog.beat,
    )
    if checkpoint:
        with checkpoint.as_directory() as folder:
            loop.restore(Path(folder), state)
    replicas.check_equal(loop.list_shared(), "at the start")
    times["model"] = time.time()
    recorder = RunRecorder(out, loop, times, state) if replicas.rank == 0 else None
    preemption, uploads = (
        PreemptionWatch(replicas, ray_api.get_preemption_info),
        Uploads(out, replicas.any, watchdog.beat),
    )
    if recorder:
        recorder.write_metrics(state)

    def on_checkpoint() -> None:
        started, leaving = time.monotonic(), preemption.info is not None
        metrics = {"epoch": state.epochs_done + 1, "selection": UNSCORED}
        # While a machine goes away, wait until the checkpoint is stored.
        _report(metrics, uploads, loop, state, uploads.make_folder(), wait=leaving)
        preemption.record_save(time.monotonic() - started)
        watchdog.beat()
        if recorder and leaving:
            recorder.record_preemption(state)

    loop.callbacks.on_train_begin()
    while not schedule.has_ended(settings, state.scores, stopped=state.stopped):
        epoch = state.epochs_done
        loop.start_epoch(state)
        if recorder:
            recorder.start_epoch()
        on_step = functools.partial(recorder.record_step, epoch) if recorder else None
        result = loop.run_epoch(state, on_step=on_step, is_due=preemption.is_due, on_checkpoint=on_checkpoint)
        folder = uploads.make_folder()
        point, selection = validate_epoch(loop, state, result, folder)
        loop.callbacks.on_epoch_end(epoch, {key: point[key] for key in LOGS})
        state.epochs_done, state.losses = epoch + 1, []
        state.scores.append(selection)
        state.curves.append(point)
        state.stopped = loop.is_stop_requested()
        if recorder:
            recorder.write_metrics(state)
            recorder.send_metrics(point)
        # Prefer the first of equal epochs; Ray Train would keep the last.
        metrics, leaving = {**point, "selection": selection - 1e-12 * epoch}, preemption.info is not None
        _report(metrics, uploads, loop, state, folder, wait=leaving)
        watchdog.beat()
    loop.callbacks.on_train_end()


def validate_epoch(loop: Loop, state: TrainState, epoch: EpochResult, folder: Path) -> tuple[dict[str, Any], float]:
    """Return the row of metrics of the last epoch and its selection score.

    Rank 0 also writes weights, results and probabilities to `folder`, for the bundle.
    """
    from ray_cxr.training.loop import compute_cross_entropy, compute_selection_score

    start = time.monotonic()
    with loop.use_export_weights():
        probabilities, result = loop.validate()
        if loop.replicas.rank == 0:
            loop.model.save_weights(str(folder / WEIGHTS))
            (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")
            np.savez(folder / VALIDATION, probabilities=probabilities, image_ids=loop.val.image_ids.astype(str))
    values = loop.val.labels[:, loop.columns]
    loss = compute_cross_entropy(probabilities, values)
    real = [j for j, name in enumerate(loop.findings) if name != NO_FINDING]
    fitting: dict[str, Any] = {"method": loop.settings.calibration, "min_positives": loop.settings.min_positives}
    scores = values[:, real], probabilities[:, real], loop.val.patient_ids
    point = {
        "epoch": state.epochs_done + 1,
        "loss": epoch.loss,
        "val_loss": loss,
        "val_auroc": result["macro_auroc"],
        "val_calibration_error": calibration.cross_fitted_error(*scores, **fitting),
        "learning_rate": float(np.asarray(loop.optimizer.keras.learning_rate)),
        "seconds": round(epoch.seconds, 3),
        "wait_seconds": round(epoch.wait_seconds, 3),
        "val_seconds": round(time.monotonic() - start, 3),
        "images_per_second": round(epoch.images / epoch.seconds, 2),
    }
    return point, compute_selection_score(result["macro_auroc"], loss)


def _report(
    metrics: dict[str, Any], uploads: Uploads, loop: Loop, state: TrainState, folder: Path, *, wait: bool = False
) -> None:
    """Report metrics to Ray Train, with a checkpoint from rank 0 in `folder`; see `Uploads.report`."""
    if loop.replicas.rank == 0:
        loop.save(folder)
        (folder / PROGRESS).write_text(json.dumps(asdict(state)), encoding="utf-8")
        uploads.report(metrics, folder, wait=wait)
    else:
        shutil.rmtree(folder)
        uploads.report(metrics, None, wait=wait)


class RunRecorder:
    """Write the progress of rank 0 to RUN, and to Ray's metrics with the name of RUN as the tag.

    Args:
        times: when each part of the start-up ended, seconds since 1970; the first step is added to it.
        state: the progress at which training starts or continues.
    """

    def __init__(self, out: Path, loop: Loop, times: dict[str, float], state: TrainState) -> None:
        self._out, self._loop = out, loop
        self._start: dict[str, Any] = {
            "epoch": state.epochs_done,
            "step": len(state.losses),
            "random": loop.random_layers,
            "policy": state.policy,
            "workers": loop.replicas.count,
            "times": times,
        }
        self._live_at, self._n_logged = 0.0, len(state.curves)
        self._step_at = time.monotonic()

    def start_epoch(self) -> None:
        self._step_at = time.monotonic()

    def record_step(self, epoch: int, step: int, loss: float) -> None:
        if not self._live_at:
            self._start["times"]["first step"] = time.time()
            atomic.write_json(self._out / STARTED, self._start)
        now = time.monotonic()
        whole = self._loop.settings.images_per_step
        images = min(whole, len(self._loop.train) - (step - 1) * whole)  # the last step has fewer
        telemetry.add(telemetry.IMAGES_TRAINED, images, self._out.name)
        telemetry.add(telemetry.TRAIN_STEPS, 1, self._out.name)
        telemetry.add(telemetry.TRAIN_STEP_SECONDS, now - self._step_at, self._out.name)
        self._step_at = now
        if now - self._live_at >= LIVE_EVERY_S:
            self._live_at = now
            with contextlib.suppress(RayCxrError):  # only the progress display needs this file
                atomic.write_json(self._out / LIVE, {"epoch": epoch + 1, "step": step, "loss": loss})

    def record_preemption(self, state: TrainState) -> None:
        with contextlib.suppress(RayCxrError):  # only for the log
            atomic.write_json(self._out / LEAVING, {"epoch": state.epochs_done, "step": len(state.losses)})

    def send_metrics(self, point: dict[str, Any]) -> None:
        run = self._out.name
        telemetry.add(telemetry.TRAIN_WAIT_SECONDS, point["wait_seconds"], run)
        telemetry.set_gauge(telemetry.TRAIN_EPOCH, point["epoch"], run)
        telemetry.set_gauge(telemetry.TRAIN_LOSS, point["loss"], run)
        telemetry.set_gauge(telemetry.VAL_LOSS, point["val_loss"], run)
        telemetry.set_gauge(telemetry.VAL_AUROC, point["val_auroc"], run)
        telemetry.flush()

    def write_metrics(self, state: TrainState) -> None:
        """Rewrite metrics.csv, and append its new epochs to TensorBoard's log."""
        if not state.curves:
            (self._out / METRICS).unlink(missing_ok=True)  # left by an attempt that ended within epoch 1
            return
        atomic.write_text(self._out / METRICS, pd.DataFrame(state.curves).to_csv(index=False, lineterminator="\n"))
        from tensorboardX import SummaryWriter

        (self._out / EVENTS).mkdir(exist_ok=True)
        for point in state.curves[self._n_logged :]:
            # One file per epoch, because a file is complete only when it is closed. An epoch that is trained again
            # after a kill replaces its old points.
            epoch = point["epoch"]
            with tempfile.TemporaryDirectory(prefix="ray_cxr-") as folder:
                with SummaryWriter(folder, purge_step=epoch, filename_suffix=f".{epoch:05d}") as writer:
                    for name, value in point.items():
                        if name != "epoch" and value is not None:
                            writer.add_scalar(name, value, epoch)
                for events in Path(folder).iterdir():
                    atomic.write(self._out / EVENTS / events.name, functools.partial(shutil.copyfile, events))
        self._n_logged = len(state.curves)
