"""`train`: make a bundle from a prepared set, through Ray Train.

RUN/settings.json      settings that a later run must match
RUN/ray/               Ray Train's own checkpoints: the latest and the best
RUN/live.json          the current step of rank 0, for the progress display
RUN/started.json       where training continues, and when each part of the start-up ended
RUN/metrics.csv        one row per epoch
RUN/tensorboard/       the same for TensorBoard
RUN/bundle/            written when training has ended
RUN/learning_curves.*  written last
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ray_cxr import cluster, limits
from ray_cxr.config import TrainSettings
from ray_cxr.errors import RayCxrError, from_record, last_line, own_error
from ray_cxr.models.bundle import Bundle
from ray_cxr.progress import Stage
from ray_cxr.storage import remote
from ray_cxr.storage.run_folder import create_run, lock, remove_settings
from ray_cxr.training import schedule, worker
from ray_cxr.training.checkpoints import read_progress, remove_incomplete
from ray_cxr.training.export import CURVES, export_bundle, write_curves
from ray_cxr.training.monitor import RunMonitor
from ray_cxr.training.planning import TrainPlan, plan_resources, plan_training
from ray_cxr.training.uploads import FAILURE
from ray_cxr.training.watchdog import read_stalled
from ray_cxr.training.worker import LEAVING, LIVE, STARTED, Callbacks

logger = logging.getLogger(__name__)


def train(
    prepared: str | Path,
    out: str | Path,
    settings: TrainSettings,
    *,
    use_gpu: bool = False,
    callbacks: Callbacks | None = None,
    started: float | None = None,
    on_event: Callable[[str], None] = logger.info,
    start_ray: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Bundle:
    """Train a model on a prepared set, or continue an earlier run with the same settings in the same folder.

    Args:
        prepared: the folder that `prepare` wrote; needs the splits train and val.
        out: the run's folder, on storage that all nodes share.
        settings: settings of the run.
        use_gpu: whether each worker uses a GPU.
        callbacks: called once in every worker; returns `keras.callbacks.Callback`s. They get the logs `loss`,
            `val_loss`, `val_auroc` and `learning_rate`, the same on all workers. They may set `model.stop_training`
            and, with a constant schedule, the optimizer's learning rate. Checkpoints do not hold their state. A
            callback that writes files should do so only where the task index in `TF_CONFIG` is 0.
        started: when the command started, seconds since 1970, for the time to the first step; None: now.
        on_event: called with one line per event.
        start_ray: returns a context in which Ray runs; it is entered only if the run is unfinished.

    Returns:
        The bundle of the epoch with the best validation macro AUROC.

    Raises:
        ConfigError, TableError, LeakError, OutputError, BundleError: an argument is wrong, or another command writes
            to `out`.
        RayCxrError: training failed.
    """
    with Stage("checking the prepared set"):
        plan = plan_training(prepared, out, settings)
    if plan.bundle is not None:
        on_event(f"train: {plan.out / 'bundle'} is finished already")
        if not (plan.out / CURVES).exists():
            write_curves(plan.out, plan.bundle)
        return plan.bundle
    with lock(plan.out, "train"), start_ray():
        for warning in plan.list_warnings():
            on_event(f"train: WARNING: {warning}")
        cluster.require_shared(plan.out, {"PREPARED": remote.to_path(prepared), "weights": plan.settings.weights})
        with cluster.log_node_changes("train", on_event):
            fit(plan, use_gpu=use_gpu, callbacks=callbacks, started=started, on_event=on_event)
        with Stage("writing the bundle"):
            bundle = export_bundle(plan, plan.out / "bundle")
            write_curves(plan.out, bundle)
    return bundle


def fit(
    plan: TrainPlan,
    *,
    use_gpu: bool = False,
    callbacks: Callbacks | None = None,
    started: float | None = None,
    on_event: Callable[[str], None] | None = None,
    listeners: Sequence[Any] = (),
    queue: bool = False,
) -> list[dict[str, Any]]:
    """Train from the latest checkpoint until the run ends. RUN/ray then holds the checkpoint of the best epoch.

    Args:
        use_gpu, callbacks, started: as in `train`.
        on_event: called with one line per event; None: show neither lines nor a progress bar.
        listeners: `UserCallback`s of Ray Train, which get each report in the run's controller.
        queue: whether to wait while no nodes can hold the workers; each gets `settings.cpus_per_worker` CPUs, or 1.

    Returns:
        The metrics of each epoch, from the last checkpoint: metrics.csv is written on another node, and shared storage
        may show it late.
    """
    out, settings = plan.out, plan.settings
    if not plan.started:
        remove_settings(out)  # left by a run without a checkpoint, which does not bind the folder
    if not queue:
        settings = settings.replace(cpus_per_worker=plan_resources(settings, use_gpu=use_gpu, runs=1)[0])
    create_run(out, plan.run_settings)
    for name in (FAILURE, STARTED, LIVE, LEAVING):
        (out / name).unlink(missing_ok=True)
    read_stalled(out)
    monitor: AbstractContextManager[None] = contextlib.nullcontext()
    if on_event is not None:
        started = started or time.time()
        monitor = RunMonitor(out, settings.epochs, plan.steps_per_epoch, started, on_event).report()
    config = {
        "settings": settings.model_dump(mode="json"),
        "architecture": plan.architecture.model_dump(mode="json"),
        "prepared": remote.to_address(plan.data.path),
        "out": remote.to_address(out),
        "cpus": settings.cpus_per_worker or 1,
        "use_gpu": use_gpu,
        "callbacks": callbacks,
    }
    with monitor:
        result = _run_workers(out, settings, config, listeners)
    # Trust the checkpoint, not the absence of failure.json, which shared storage may show late.
    if result.checkpoint is None:
        raise RayCxrError(f"{out}: training ended without a checkpoint; see {out / 'ray'}")
    progress = read_progress(result.checkpoint)
    scores = progress["scores"]
    if not schedule.has_ended(settings, scores, stopped=progress["stopped"]):
        raise RayCxrError(
            f"{out}: training ended after {len(scores)} of {settings.epochs} epochs without a reason; "
            "run the same command again to continue"
        )
    remove_incomplete(out)
    return list(progress["curves"])


def _run_workers(out: Path, settings: TrainSettings, config: dict[str, Any], listeners: Sequence[Any]) -> Any:
    """Run Ray Train to its end and return its result."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    from ray_cxr.training.backend import PreferredNodes, TensorflowCluster, Trainer

    resources = {"CPU": float(config["cpus"])}
    if config["use_gpu"]:
        resources["GPU"] = settings.gpus_per_worker
    store, path = remote.to_arrow(out)
    placement = cluster.placement
    preference = [PreferredNodes(placement.first_choice, resources)] if placement.preferred else []
    trainer = Trainer(
        worker.run,
        train_loop_config=config,
        backend_config=TensorflowCluster(),
        scaling_config=ScalingConfig(
            num_workers=settings.workers if settings.min_workers is None else (settings.min_workers, settings.workers),
            use_gpu=config["use_gpu"],
            resources_per_worker=resources,
            label_selector=dict(placement.required) or None,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=store,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="selection", checkpoint_score_order="max"
            ),
            callbacks=[*listeners, *preference],
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        _raise_failure(out)
        cause = own_error(error)
        if isinstance(cause, RayCxrError):
            raise cause from error
        if reason := limits.explain_loss(error, advise(settings)):
            raise RayCxrError(f"training failed: {reason}; then run the same command again to continue") from error
        raise RayCxrError(f"training failed: {last_line(cause or error)}") from error
    _raise_failure(out)
    return result


def advise(settings: TrainSettings) -> str:
    """Return what lowers the memory of a run."""
    fewer = ", or workers" if settings.workers > 1 else ""
    return f"lower batch_size (now {settings.batch_size}){fewer}, or choose a smaller backbone or size"


def _raise_failure(out: Path) -> None:
    """Raise the error that a worker left in failure.json, if there is one."""
    if (out / FAILURE).exists():
        raise from_record(json.loads((out / FAILURE).read_text(encoding="utf-8")))
