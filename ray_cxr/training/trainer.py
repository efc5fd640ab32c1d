"""`train`: a prepared set in, a bundle out, through Ray Train.

RUN/settings.json    what another run must agree with to continue here
RUN/ray/             Ray Train's own checkpoints: the latest and the best
RUN/live.json        the step that rank 0 is at, for whoever watches
RUN/started.json     when the parts of the start-up were over
RUN/metrics.csv      one row per epoch
RUN/tensorboard/     the same for TensorBoard
RUN/bundle/          written last
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import tomli_w

from ray_cxr import cluster
from ray_cxr.config import TrainSettings
from ray_cxr.data import identity
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import ConfigError, LeakError, RayCxrError, TableError, own_error
from ray_cxr.evaluation.calibration import fit_rules
from ray_cxr.models import exports
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import SPLIT_SCHEMA, WEIGHTS, Bundle, load_bundle, write_bundle, written
from ray_cxr.progress import Progress, silence_stderr
from ray_cxr.storage import remote
from ray_cxr.storage.run_folder import SETTINGS, check_run, create_run
from ray_cxr.training import schedule, worker
from ray_cxr.training.provenance import COLUMNS, demographics, evaluation, score_quantiles
from ray_cxr.training.worker import (
    FAILURE,
    LIVE,
    METRICS,
    PROGRESS,
    RESULT,
    STARTED,
    UNSCORED,
    VALIDATION,
    Callbacks,
)
from ray_cxr.versions import versions

logger = logging.getLogger(__name__)


#: In RUN/ray: Ray Train's own list of its checkpoints.
SNAPSHOT = "checkpoint_manager_snapshot.json"
#: Seconds without a first step after which it is said that something may be waited for.
WAITING_S = 240


def train(
    prepared: str | Path,
    out: str | Path,
    settings: TrainSettings,
    *,
    use_gpu: bool = False,
    callbacks: Callbacks | None = None,
    began: float | None = None,
    on_event: Callable[[str], None] = logger.info,
) -> Bundle:
    """Train a network on a prepared set; continues an earlier run of the same settings in the same folder.

    Args:
        prepared: what `prepare` made; needs the splits train and val.
        out: the run's folder, on storage that all nodes share.
        settings: the run's.
        use_gpu: one GPU per worker.
        callbacks: makes `keras.callbacks.Callback`s, stock or own, once in every worker. They see the logs `loss`,
            `val_loss`, `val_auroc` and `learning_rate`, the same on all workers, may set `model.stop_training` and,
            where the schedule is constant, the optimizer's learning rate. Their own state is not in checkpoints. One
            that writes files should do so where the task index in `TF_CONFIG` is 0.
        began: when the command began, seconds since 1970, to say how long it took to the first step; None: now.
        on_event: takes one line per event for people.

    Returns:
        The bundle of the epoch with the best validation macro AUROC.

    Raises:
        ConfigError, TableError, OutputError: see the messages.
        RayCxrError: training failed; says how.
    """
    prepared, out = remote.path(prepared), remote.path(out)
    plan = check(prepared, out, settings)
    if plan.finished is not None:
        on_event(f"train: {out / 'bundle'} is finished already")
        return plan.finished
    for name in settings.idle():
        on_event(f"train: WARNING: no effect: {name}")
    if settings.weights == "none" and not plan.begun:
        on_event("train: WARNING: weights=none: the network starts from RANDOM weights, not from pre-trained ones")
    lacking = _one_sided(plan.data, settings.finding_names())
    if lacking:
        on_event(
            f"train: WARNING: the training images do not show both sides of {', '.join(lacking)}: "
            "what the network says of that will mean nothing"
        )
    if settings.frozen_epochs and settings.weights == "none":
        on_event("train: WARNING: frozen_epochs keeps a backbone frozen whose weights are random")
    cluster.require_shared(out, PREPARED=prepared, weights=plan.settings.weights)
    with cluster.log_node_changes("train", on_event):
        fit(plan, out, use_gpu=use_gpu, callbacks=callbacks, began=began, on_event=on_event)
    return export(plan, out, out / "bundle")


def fit(
    plan: Plan,
    out: Path,
    *,
    use_gpu: bool = False,
    callbacks: Callbacks | None = None,
    began: float | None = None,
    on_event: Callable[[str], None] | None = None,
    listeners: Sequence[Any] = (),
    queue: bool = False,
) -> list[dict[str, Any]]:
    """Train to the end of the run, or from where it was left; RUN/ray then holds the best epoch's checkpoint.

    Args:
        plan: what `check` gave for this `out`.
        out: the run's folder.
        use_gpu, callbacks, began: as in `train`.
        on_event: takes one line per event for people; None: nobody watches, nor is a bar shown.
        listeners: Ray Train's own `UserCallback`s, which see each report in the run's controller.
        queue: wait for nodes that hold the workers, should there be none now; `cpus_per_worker` must be set.

    Returns:
        A line of metrics per epoch, from the last checkpoint: metrics.csv is another node's, and may be seen late.

    Raises:
        ConfigError, OutputError, RayCxrError: see the messages.
    """
    data, settings = plan.data, plan.settings
    if not plan.begun:
        # Nothing was trained here yet, so what an earlier attempt had wanted binds nobody.
        (out / SETTINGS).unlink(missing_ok=True)
    if not queue:
        settings = settings.replace(cpus_per_worker=room(settings, use_gpu=use_gpu, runs=1)[0])
    resources = {"CPU": float(settings.cpus_per_worker or 1)}
    if use_gpu:
        resources["GPU"] = settings.gpus_per_worker
    create_run(out, plan.wanted)
    result = _fit(
        out,
        data,
        settings,
        resources,
        use_gpu=use_gpu,
        callbacks=callbacks,
        began=began or time.time(),
        on_event=on_event,
        listeners=listeners,
    )
    # The run's own word that it ended, and not the absence of a file that says why it did not: on shared storage a
    # file can be there and not be seen for a while.
    if result.checkpoint is None:
        raise RayCxrError(f"{out}: training ended without a checkpoint; see {out / 'ray'}")
    last = _progress(result.checkpoint)
    scores = last["scores"]
    if not (last["stopped"] or len(scores) >= settings.epochs or schedule.out_of_patience(settings, scores)):
        raise RayCxrError(
            f"{out}: training ended after {len(scores)} of {settings.epochs} epochs and left no reason; "
            "run the command again to continue"
        )
    curves: list[dict[str, Any]] = last["curves"]
    return curves


def export(plan: Plan, out: Path, to: Path, *, provenance: Mapping[str, Any] | None = None) -> Bundle:
    """Make a bundle of the best epoch that a run has trained so far, whether or not it has ended.

    Args:
        plan: what `check` gave for this run.
        out: the run's folder.
        to: the bundle's.
        provenance: what the bundle should say of its origin besides the run itself.

    Raises:
        RayCxrError: no epoch was finished yet.
    """
    with silence_stderr():  # what TensorFlow has to say past Python when it is imported and looks for GPUs
        import tensorflow as tf

        tf.config.list_physical_devices()
    best = best_checkpoint(out)
    if best is None:
        raise RayCxrError(f"{out}: no epoch was finished yet, so there is nothing to make a bundle of")
    with tempfile.TemporaryDirectory(prefix="ray_cxr-") as folder, best.as_directory() as seen:
        # Ray's folder may be a view of remote storage: copy what the bundle needs once.
        shutil.copytree(seen, folder, dirs_exist_ok=True)
        # The latest checkpoint's, because the best one's ends with that epoch.
        curves = _progress(_result(out).checkpoint)["curves"]
        return _finish(Path(folder), out, to, plan.data, plan.settings, curves, provenance or {})


def best_checkpoint(out: Path) -> Any:
    """Ray Train's checkpoint of the best epoch of a run so far; None before the first is done."""
    if not (out / "ray" / SNAPSHOT).exists():
        return None
    # A checkpoint in mid-epoch has no score.
    scored = [
        (metrics["selection"], checkpoint)
        for checkpoint, metrics in _result(out).best_checkpoints
        if metrics["selection"] > UNSCORED
    ]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def _result(out: Path) -> Any:
    """What Ray Train has written down of a run, ended or not."""
    from ray.train import Result

    # Ray takes a relative path for an address without a scheme.
    store, path = remote.arrow((out / "ray").resolve())
    return Result.from_path(path, storage_filesystem=store)


def _progress(checkpoint: Any) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        progress: dict[str, Any] = json.loads((Path(folder) / PROGRESS).read_text(encoding="utf-8"))
    return progress


@dataclass(frozen=True)
class Plan:
    """A run that can begin: its data, its settings with size and weights resolved; or the bundle it has made.

    `begun` says whether something has been trained that is to be continued.
    """

    data: PreparedSet
    settings: TrainSettings
    wanted: dict[str, Any]
    begun: bool
    finished: Bundle | None


def check(prepared: str | Path, out: str | Path, settings: TrainSettings) -> Plan:
    """What `train` would refuse of its arguments, refused before Ray starts.

    Raises:
        ConfigError, TableError, OutputError, BundleError: see the messages.
    """
    out = remote.path(out)
    data = PreparedSet(prepared, settings.size)
    settings = settings.replace(size=data.size)
    if settings.batch_size % settings.workers:
        raise ConfigError(
            f"batch_size: {settings.batch_size} cannot be shared equally by {settings.workers} workers; "
            f"use {math.ceil(settings.batch_size / settings.workers) * settings.workers}"
        )
    if settings.weights not in ("imagenet", "none"):
        if not Path(settings.weights).exists():
            raise ConfigError(f"weights: {settings.weights}: no such file or bundle; or say imagenet, or none")
        # Workers have other working directories.
        settings = settings.replace(weights=str(Path(settings.weights).absolute()))
    data.usable("train")
    val = data.usable("val")
    findings = settings.finding_names()
    if all(val[name].null_count == len(val) for name in findings):
        raise TableError(
            f"{data.path}: no image of split 'val' is labelled for {', '.join(findings)}; no epoch could be chosen"
        )
    if Path(settings.weights).is_dir():
        _refuse_leak(load_bundle(settings.weights), val)
    wanted = {
        "kind": "train",
        "format": 1,
        "prepared": data.manifest_digest,
        "input_spec": data.input_spec.model_dump(mode="json"),
        "train": settings.model_dump(mode="json", exclude=free(settings)),
    }
    begun = (out / "ray" / SNAPSHOT).exists() or written(out / "bundle")
    if begun or not _abandoned(out):
        check_run(out, wanted)
    finished = None
    if written(out / "bundle"):
        finished = load_bundle(out / "bundle")
        done = finished.info["provenance"]["settings"]["epochs"]
        if done != settings.epochs:
            raise ConfigError(f"{out}: is finished with epochs={done}; name another --out for epochs={settings.epochs}")
    return Plan(data, settings, wanted, begun, finished)


def _abandoned(out: Path) -> bool:
    """Whether `out` holds what a training run wanted that never came to its first checkpoint."""
    try:
        found = _read_json(out / SETTINGS)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("kind") == "train"


def _refuse_leak(start: Bundle, val: pa.Table) -> None:
    """Refuse validation images, or patients, that trained the network which is to be trained on.

    Raises:
        LeakError: there are some; epochs, calibration and operating points would be chosen on what is known already.
    """
    split = identity.read_split(start.path)
    trained = split.filter(pc.equal(split["split"], "train"))
    images = pc.is_in(val["image_id"], trained["image_id"].combine_chunks())
    patients = pc.is_in(val["patient_id"], trained["patient_id"].drop_null().combine_chunks())
    count = pc.sum(pc.or_(images, patients)).as_py()
    if count:
        raise LeakError(
            f"weights: {count:,} of {len(val):,} validation images, or their patients, trained {start.path}; "
            "prepare a manifest with that bundle's split, or without those patients in val"
        )


def free(settings: TrainSettings) -> set[str]:
    """Settings that may change when a run is continued: they leave what was trained so far as it would be anyway."""
    free = {"workers", "cpus_per_worker", "gpus_per_worker", "max_failures", "checkpoint_steps"}
    # A cosine ends with the last epoch, so another number of epochs would have made other steps from the start.
    return free if settings.schedule == "cosine" else {*free, "epochs"}


def _one_sided(data: PreparedSet, findings: tuple[str, ...]) -> list[str]:
    """Findings that training shows with one value alone: their outputs cannot mean anything."""
    table = data.usable("train")
    return [name for name in findings if len(set(table[name].drop_null().to_pylist())) < 2]


def room(settings: TrainSettings, *, use_gpu: bool, runs: int | None = None) -> tuple[int, int]:
    """The CPUs that each worker of a run gets on Ray's nodes as they are, and how many such runs fit at a time.

    Args:
        settings: the runs'.
        use_gpu: as in `train`.
        runs: so many should fit, which leaves each worker less; None: as many as there are GPUs for, and one on CPUs.

    Raises:
        ConfigError: not even one fits; Ray would wait for ever.
    """
    alive = [node["Resources"] for node in cluster.list_nodes()]
    gpus = sum(node.get("GPU", 0) for node in alive)
    if use_gpu and gpus < settings.workers * settings.gpus_per_worker:
        raise ConfigError(
            f"--gpu: {settings.workers} workers need {settings.workers * settings.gpus_per_worker:g} GPUs, Ray has "
            f"{gpus:g}; leave --gpu out, or connect to a cluster that has them{cluster.hint_at_head('GPU')}"
        )
    nodes = [(node.get("CPU", 0), places(node.get("GPU", 0), settings) if use_gpu else math.inf) for node in alive]
    wanted = max(1, int(sum(held for _, held in nodes)) // settings.workers if use_gpu else 1)
    each = None
    for count in (runs,) if runs else range(wanted, 0, -1):  # there may be GPUs without a CPU for each
        each = each or cpus_each(nodes, settings.workers * count, settings.cpus_per_worker)
    if each is None:
        have = ", ".join(f"{cpus:g}" for cpus, held in nodes if held)
        of = f"{runs} runs of " if runs and runs > 1 else ""
        raise ConfigError(
            f"{of}{settings.workers} workers of {settings.cpus_per_worker or 1} CPUs do not fit Ray's nodes, "
            f"which have {have}; lower {'concurrent, ' if of else ''}workers or cpus_per_worker"
        )
    return each, int(sum(min(cpus // each, held) for cpus, held in nodes)) // settings.workers


def places(gpus: float, settings: TrainSettings) -> int:
    """How many workers so many GPUs hold; 1 / 0.2 is 5, though 1 // 0.2 is 4."""
    return int(gpus) * int(1 / settings.gpus_per_worker + 1e-9)  # Ray takes no worker's part from two GPUs


def cpus_each(nodes: Sequence[tuple[float, float]], workers: int, wanted: int | None) -> int | None:
    """The most CPUs that each worker can have on nodes of (CPUs, places); None where they do not fit."""
    most = int(max((cpus for cpus, _ in nodes), default=0))
    for each in (wanted,) if wanted else range(most, 0, -1):
        if sum(min(cpus // each, held) for cpus, held in nodes) >= workers:
            return each
    return None


def _fit(
    out: Path,
    data: PreparedSet,
    settings: TrainSettings,
    resources: dict[str, float],
    *,
    use_gpu: bool,
    callbacks: Callbacks | None,
    began: float,
    on_event: Callable[[str], None] | None,
    listeners: Sequence[Any],
) -> Any:
    """Run Ray Train to its end; its result."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    from ray_cxr.training.backend import TensorflowCluster, Trainer

    store, path = remote.arrow(out)
    trainer = Trainer(
        worker.run,
        train_loop_config={
            "settings": settings.model_dump(mode="json"),
            "prepared": remote.address(data.path),
            "out": remote.address(out),
            "cpus": int(resources["CPU"]),
            "use_gpu": use_gpu,
            "callbacks": callbacks,
        },
        backend_config=TensorflowCluster(),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            label_selector=cluster.get_selector(),
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=store,
            # What other work holds is waited for, as in a queue; what no node has was refused before.
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="selection", checkpoint_score_order="max"
            ),
            callbacks=list(listeners),
        ),
    )
    for name in (FAILURE, STARTED, LIVE):
        (out / name).unlink(missing_ok=True)
    steps = math.ceil(len(data.usable("train")) / settings.batch_size)
    try:
        with (
            _telling(out, settings, min(steps, settings.steps_per_epoch or steps), began, on_event)
            if on_event
            else contextlib.nullcontext()
        ):
            result = trainer.fit()
    except Exception as error:
        _raise_failure(out)
        raise _plain(error) from error
    _raise_failure(out)
    return result


def _raise_failure(out: Path) -> None:
    """Raise what a worker has written down as its reason to give up."""
    if (out / FAILURE).exists():
        failure = json.loads((out / FAILURE).read_text(encoding="utf-8"))
        raise (ConfigError if failure["input"] else RayCxrError)(failure["message"])


@contextlib.contextmanager
def _telling(
    out: Path, settings: TrainSettings, steps: int, began: float, on_event: Callable[[str], None]
) -> Iterator[None]:
    """While Ray Train runs, show where rank 0 is and tell each epoch as its line appears in metrics.csv."""
    over = threading.Event()

    def tell(told: int) -> int:
        lines = _read_metrics(out)
        for point in lines[told:]:
            auroc = point["val_auroc"]
            on_event(
                f"train: epoch {point['epoch']} of {settings.epochs}: loss {point['loss']:.4f}, validation AUROC "
                f"{'undefined' if auroc is None else f'{auroc:.4f}'}, "
                f"{point['seconds']:.0f} s, {point['images_per_second']:.1f} images/s"
            )
        return max(told, len(lines))

    known = len(_read_metrics(out))  # before the thread starts, which can take a while

    def follow() -> None:
        told, total = known, settings.epochs * steps
        # The epochs have lines of their own, and an end for want of patience is not an unfinished run.
        bar = Progress("train", total, done=told * steps, unit="steps", line_every=60.0, last_line=False)
        with bar if told * steps < total else Progress("train", 0, line_every=math.inf, last_line=False) as work:
            at, started, waiting = told * steps, None, False
            while not over.wait(0.5):
                if (start := _read_json(out / STARTED)) and start != started:
                    _tell_start(start, began, again=started is not None, on_event=on_event)
                    started = start
                if not (started or waiting) and time.time() - began > WAITING_S:
                    waiting = True
                    on_event(
                        f"train: no step after {WAITING_S} s; Ray may be waiting for CPUs or GPUs that other work holds"
                    )
                told = tell(told)
                if live := _read_json(out / LIVE):
                    now = (live["epoch"] - 1) * steps + live["step"]
                    # After a restart from a checkpoint the count falls back.
                    work.advance(now - at, f"epoch {live['epoch']}, loss {live['loss']:.4f}")
                    at = now
            told = tell(told)
            work.advance(told * steps - at)

    thread = threading.Thread(target=follow, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _tell_start(start: dict[str, Any], began: float, *, again: bool, on_event: Callable[[str], None]) -> None:
    if again:
        on_event("train: WARNING: a worker failed or was lost; Ray Train has started all of them again")
    if start["epoch"] or start["step"]:
        on_event(f"train: continues after epoch {start['epoch']}, step {start['step']}")
    if start["random"]:
        on_event(f"train: WARNING: not in the weights, so started at random: {', '.join(start['random'])}")
    if again:
        return
    at, parts = began, []
    for what, when in start["times"].items():
        parts.append(f"{what} {when - at:.0f}")
        at = when
    on_event(f"train: first step done after {at - began:.0f} s ({', '.join(parts)}); {start['policy']}")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, RayCxrError):  # what a bucket does not tell now it tells when it is asked again
        return None
    return value


def _read_metrics(out: Path) -> list[dict[str, Any]]:
    try:
        frame = pd.read_csv(io.BytesIO((out / METRICS).read_bytes()))
    except (FileNotFoundError, RayCxrError):
        return []
    rows = frame.to_dict("records")
    return [{str(key): None if pd.isna(value) else value for key, value in row.items()} for row in rows]


def _plain(error: BaseException) -> RayCxrError:
    """What went wrong in a worker, as one line."""
    inner = own_error(error)
    if isinstance(inner, RayCxrError):
        return inner
    if inner is not None:
        return RayCxrError(f"training failed: {inner}")
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return RayCxrError(f"training failed: {lines[-1][:300]}")


def _finish(
    best: Path,
    out: Path,
    to: Path,
    data: PreparedSet,
    settings: TrainSettings,
    curves: list[dict[str, Any]],
    more: Mapping[str, Any],
) -> Bundle:
    """Fit calibration and operating points on validation, and write the bundle.

    Args:
        best: the best epoch's checkpoint.
        curves: of all epochs, also those after the best one, whose checkpoint cannot know of them.
        more: what its provenance says besides.
    """
    progress = json.loads((best / PROGRESS).read_text(encoding="utf-8"))
    result = json.loads((best / RESULT).read_text())
    with np.load(best / VALIDATION, allow_pickle=False) as arrays:
        probabilities, ids = arrays["probabilities"], arrays["image_ids"]
    rows = data.rows()
    table = rows.select(["image_id", "split", "error_code", *COLUMNS]).to_pandas()
    table = table[table["error_code"].isna()]
    val = table[table["split"] == "val"].reset_index(drop=True)
    if val["image_id"].tolist() != ids.tolist():
        raise RayCxrError(f"{out}: the validation images changed during the run; start again in another --out")
    architecture = Architecture.of(settings, data.size)
    rules = fit_rules(
        val[list(architecture.findings)],
        probabilities,
        architecture.findings,
        method=settings.calibration,
        rule=settings.operating_point,
        min_positives=settings.min_positives,
    )
    used = table[table["split"].isin(["train", "val"])]
    split, lineage = _lineage(used, settings.weights)
    ages = table.loc[table["split"] == "train", "age"].dropna()
    provenance = {
        "origin": f"trained by ray-cxr train on {int((table['split'] == 'train').sum()):,} images",
        "initial_weights": _weights_words(settings.weights),
        "lineage": lineage,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "prepared_digest": data.manifest_digest,
        "split": data.split_info(),
        "images": {
            name: {"images": len(group), "patients": int(group["patient_id"].nunique())}
            for name, group in used.groupby("split")
        },
        "age_range": [float(ages.min()), float(ages.max())] if len(ages) else None,
        "demographics": {str(name): demographics(group) for name, group in used.groupby("split")},
        "best_epoch": progress["epochs_done"],
        "precision": progress["policy"],
        "chosen_by": "validation macro AUROC" if result["macro_auroc"] is not None else "validation loss",
        "validation": result,
        "evaluation": evaluation(
            val,
            probabilities,
            architecture.findings,
            rules,
            method=settings.calibration,
            min_positives=settings.min_positives,
        ),
        "score_quantiles": score_quantiles(probabilities, architecture.findings),
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        **more,
    }
    plain = {key: value for key, value in settings.model_dump(mode="json").items() if value is not None}
    return write_bundle(
        to,
        save_weights=lambda path: shutil.copyfile(best / WEIGHTS, path),
        architecture=architecture,
        input_spec=data.input_spec,
        calibration=rules.calibrations,
        operating_points=rules.operating_points,
        expected_flag_rates=rules.expected_flag_rates,
        operating_alternatives=rules.alternatives,
        rule_notes=rules.reasons,
        provenance=provenance,
        config_toml=tomli_w.dumps({"train": plain}),
        curves=curves,
        split=split,
        ordinary=exports.Ordinary(
            exports.sample(data.load("train").images, settings.seed),
            exports.sample(data.load("val").images, settings.seed),
        ),
    )


def _lineage(used: pd.DataFrame, weights: str) -> tuple[pa.Table, str]:
    """What trained the network, its starting weights included, and whether that is all: `known` or `unknown`."""
    frame = used[["image_id", "patient_id", "split"]]
    lineage = "known" if weights in ("none", "imagenet") else "unknown"  # ImageNet holds no radiographs of patients
    if Path(weights).is_dir():
        earlier = load_bundle(weights)
        before = identity.read_split(earlier.path).to_pandas()
        frame = pd.concat([frame, before[~before["image_id"].isin(frame["image_id"])]], ignore_index=True)
        lineage = earlier.info["provenance"].get("lineage", "unknown")
    return pa.Table.from_pandas(frame, schema=SPLIT_SCHEMA, preserve_index=False), lineage


def _weights_words(weights: str) -> str:
    if Path(weights).is_dir():
        return f"the bundle {load_bundle(weights).digest}"
    known = {"none": "random", "imagenet": "ImageNet (keras.applications)"}
    return known.get(weights, f"the file {Path(weights).name}")
