"""`train`: a prepared set in, a bundle out, through Ray Train.

RUN/settings.json    what another run must agree with to continue here
RUN/ray/             Ray Train's own checkpoints: the latest and the best
RUN/metrics.csv      one row per epoch
RUN/bundle/          written last
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w

from ray_cxr.config import TrainSettings, build
from ray_cxr.data import atomic
from ray_cxr.data.prepared import PreparedSet, agree, begin
from ray_cxr.errors import ConfigError, RayCxrError, own_error
from ray_cxr.evaluation import calibration
from ray_cxr.labels import LABELS
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import SPLIT_SCHEMA, WEIGHTS, Bundle, load_bundle, write_bundle
from ray_cxr.versions import versions

logger = logging.getLogger(__name__)

#: The operating point that a bundle carries: where sensitivity + specificity is largest (Youden 1950).
OPERATING_RULE = "youden"
METRICS = "metrics.csv"
FAILURE = "failure.json"
STARTED = "started.json"


def train(
    prepared: str | Path,
    out: str | Path,
    settings: TrainSettings,
    *,
    use_gpu: bool = False,
    on_event: Callable[[str], None] = logger.info,
) -> Bundle:
    """Train a network on a prepared set; continues an earlier run of the same settings in the same folder.

    Args:
        prepared: what `prepare` made; needs the splits train and val.
        out: the run's folder, on storage that all nodes share.
        settings: the run's.
        use_gpu: one GPU per worker.
        on_event: takes one line per event for people.

    Returns:
        The bundle of the epoch with the best validation macro AUROC.

    Raises:
        ConfigError, TableError, OutputError: see the messages.
        RayCxrError: training failed; says how.
    """
    prepared, out = Path(prepared), Path(out)
    plan = check(prepared, out, settings)
    if plan.finished is not None:
        on_event(f"train: {plan.finished.path} is finished already")
        return plan.finished
    data, settings = plan.data, plan.settings
    begin(out, plan.wanted)
    if settings.weights == "none":
        on_event("train: WARNING: weights=none: the network starts from RANDOM weights, not from pre-trained ones")
    lacking = _one_sided(data, settings.finding_names())
    if lacking:
        on_event(
            f"train: WARNING: the training images do not show both sides of {', '.join(lacking)}: "
            "what the network says of that will mean nothing"
        )
    result = _fit(prepared, out, settings, use_gpu=use_gpu, on_event=on_event)
    with tempfile.TemporaryDirectory(prefix="ray_cxr-") as folder, result.as_directory() as best:
        # Ray's folder may be a view of remote storage: copy what the bundle needs once.
        shutil.copytree(best, folder, dirs_exist_ok=True)
        return _finish(Path(folder), out, data, settings)


@dataclass(frozen=True)
class Plan:
    """A run that can begin: its data, its settings with size and weights resolved; or the bundle it has made."""

    data: PreparedSet
    settings: TrainSettings
    wanted: dict[str, Any]
    finished: Bundle | None


def check(prepared: str | Path, out: str | Path, settings: TrainSettings) -> Plan:
    """What `train` would refuse of its arguments, refused before Ray starts.

    Raises:
        ConfigError, TableError, OutputError, BundleError: see the messages.
    """
    out = Path(out)
    data = PreparedSet(prepared, settings.size)
    settings = settings.replace(size=data.size)
    if settings.weights not in ("imagenet", "none"):
        if not Path(settings.weights).exists():
            raise ConfigError(f"weights: {settings.weights}: no such file or bundle; or say imagenet, or none")
        if Path(settings.weights).is_dir():
            load_bundle(settings.weights)
        # Workers have other working directories.
        settings = settings.replace(weights=str(Path(settings.weights).absolute()))
    for name in ("train", "val"):
        data.usable(name)
    wanted = {
        "kind": "train",
        "format": 1,
        "prepared": data.manifest_digest,
        "input_spec": data.input_spec.model_dump(mode="json"),
        # More epochs, workers or restarts continue a run; all else makes another one.
        "train": settings.model_dump(mode="json", exclude={"epochs", "workers", "cpus_per_worker", "max_failures"}),
    }
    agree(out, wanted)
    finished = None
    if (out / "bundle").exists():
        finished = load_bundle(out / "bundle")
        done = finished.info["provenance"]["settings"]["epochs"]
        if done != settings.epochs:
            raise ConfigError(f"{out}: is finished with epochs={done}; name another --out for epochs={settings.epochs}")
    return Plan(data, settings, wanted, finished)


def _one_sided(data: PreparedSet, findings: tuple[str, ...]) -> list[str]:
    """Findings that training shows with one value alone: their outputs cannot mean anything."""
    table = data.usable("train")
    return [name for name in findings if len(set(table[name].drop_null().to_pylist())) < 2]


def _fit(prepared: Path, out: Path, settings: TrainSettings, *, use_gpu: bool, on_event: Callable[[str], None]) -> Any:
    """Run Ray Train to its end; the best checkpoint."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer

    total = ray.cluster_resources()
    if use_gpu and total.get("GPU", 0) < settings.workers:
        raise ConfigError(
            f"--gpu: {settings.workers} workers need as many GPUs, Ray has {total.get('GPU', 0):g}; "
            "leave --gpu out, or connect to a cluster that has them"
        )
    cpus = settings.cpus_per_worker or max(1, int(total.get("CPU", 1)) // settings.workers)
    if cpus * settings.workers > total.get("CPU", 0):
        raise ConfigError(
            f"train: {settings.workers} workers of {cpus} CPUs need {cpus * settings.workers}, "
            f"Ray has {total.get('CPU', 0):g}; lower workers or cpus_per_worker"
        )
    resources = {"CPU": float(cpus), **({"GPU": 1.0} if use_gpu else {})}
    trainer = TensorflowTrainer(
        _worker,
        train_loop_config={
            "settings": settings.model_dump(mode="json"),
            "prepared": str(prepared.absolute()),
            "out": str(out.absolute()),
            "cpus": cpus,
            "use_gpu": use_gpu,
        },
        scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name="ray",
            storage_path=str(out.absolute()),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute="selection", checkpoint_score_order="max"
            ),
        ),
    )
    for name in (FAILURE, STARTED):
        (out / name).unlink(missing_ok=True)
    try:
        with _telling(out, settings, on_event):
            result = trainer.fit()
    except Exception as error:
        raise _plain(error) from error
    if (out / FAILURE).exists():
        failure = json.loads((out / FAILURE).read_text(encoding="utf-8"))
        raise (ConfigError if failure["input"] else RayCxrError)(failure["message"])
    ranked = [(metrics["selection"], checkpoint) for checkpoint, metrics in result.best_checkpoints]
    if not ranked:
        raise RayCxrError(f"{out}: training ended without a checkpoint; see {out / 'ray'}")
    return max(ranked, key=lambda pair: pair[0])[1]


@contextlib.contextmanager
def _telling(out: Path, settings: TrainSettings, on_event: Callable[[str], None]) -> Iterator[None]:
    """While Ray Train runs, tell each epoch as its line appears in metrics.csv; rank 0 writes it there."""
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
        return len(lines)

    def follow() -> None:
        told = len(_read_metrics(out))
        if told:
            on_event(f"train: continues after epoch {told}")
        started = False
        while not over.wait(0.5):
            if not started and (out / STARTED).exists():
                started = True
                random = json.loads((out / STARTED).read_text(encoding="utf-8"))["random"]
                if random:
                    on_event(f"train: WARNING: not in the weights, so started at random: {', '.join(random)}")
            told = tell(told)
        tell(told)

    thread = threading.Thread(target=follow, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _write_metrics(out: Path, curves: list[dict[str, Any]]) -> None:
    atomic.write(out / METRICS, lambda part: pd.DataFrame(curves).to_csv(part, index=False))


def _read_metrics(out: Path) -> list[dict[str, Any]]:
    try:
        frame = pd.read_csv(out / METRICS)
    except FileNotFoundError:
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


def _worker(config: dict[str, Any]) -> None:
    """One Ray Train worker. Errors of ours come back as a file: Ray Train would restart what can only fail again."""
    import ray.train

    try:
        _train(config)
    except RayCxrError as error:
        if ray.train.get_context().get_world_rank() == 0:
            atomic.write_json(Path(config["out"]) / FAILURE, {"message": str(error), "input": error.exit_code == 2})


def _train(config: dict[str, Any]) -> None:
    """One worker's training, from its data to its last checkpoint."""
    import os

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import ray.train

    from ray_cxr.models import runtime
    from ray_cxr.training.distributed import Replicas
    from ray_cxr.training.loop import Loop, Progress, selection, timed

    settings = build(TrainSettings, config["settings"])
    if config["use_gpu"] and not runtime.use_gpu_memory_as_needed():
        raise ConfigError("--gpu: this worker sees no GPU; is tensorflow[and-cuda] installed there?")
    runtime.limit_threads(config["cpus"])
    replicas = Replicas()
    data = PreparedSet(config["prepared"], settings.size)
    architecture = Architecture.of(settings, data.size)
    checkpoint = ray.train.get_checkpoint()
    loop = Loop(
        replicas,
        settings,
        architecture,
        data.load("train"),
        data.load("val"),
        weights="none" if checkpoint else settings.weights,
    )
    if replicas.rank == 0:
        atomic.write_json(Path(config["out"]) / STARTED, {"random": loop.random_layers})
    progress = Progress()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            loop.restore(Path(folder))
            progress = Progress(**json.loads((Path(folder) / "progress.json").read_text()))
    columns = [LABELS.index(name) for name in architecture.findings]
    for epoch in range(progress.epochs_done, settings.epochs):
        if _out_of_patience(progress, settings):
            break
        loss, seconds = timed(lambda epoch=epoch: loop.run_epoch(epoch))  # type: ignore[misc]
        (probabilities, result), val_seconds = timed(loop.validate)
        score = selection(result, probabilities, loop.val.labels[:, columns])
        if progress.best is None or score > progress.best:
            progress.best, progress.best_epoch = score, epoch + 1
        progress.epochs_done = epoch + 1
        point = {
            "epoch": epoch + 1,
            "loss": loss,
            "val_auroc": result["macro_auroc"],
            "seconds": round(seconds, 3),
            "val_seconds": round(val_seconds, 3),
            "images_per_second": round(min(len(loop.train), loop.steps_per_epoch * settings.batch_size) / seconds, 2),
        }
        progress.curves.append(point)
        with tempfile.TemporaryDirectory(prefix="ray_cxr-") as name:
            folder = Path(name)
            saved = None
            if replicas.rank == 0:
                loop.save(folder)
                (folder / "progress.json").write_text(json.dumps(asdict(progress)))
                np.save(folder / "val_probabilities.npy", probabilities, allow_pickle=False)
                (folder / "val_ids.json").write_text(json.dumps(loop.val.image_ids.tolist()))
                (folder / "result.json").write_text(json.dumps(result))
                saved = ray.train.Checkpoint.from_directory(name)
                _write_metrics(Path(config["out"]), progress.curves)
            ray.train.report({**point, "selection": score}, checkpoint=saved)


def _out_of_patience(progress: Any, settings: TrainSettings) -> bool:
    return (
        settings.patience is not None
        and progress.best_epoch is not None
        and progress.epochs_done - progress.best_epoch >= settings.patience
    )


def _finish(best: Path, out: Path, data: PreparedSet, settings: TrainSettings) -> Bundle:
    """Fit calibration and operating points on validation, and write the bundle."""
    progress = json.loads((best / "progress.json").read_text())
    result = json.loads((best / "result.json").read_text())
    probabilities = np.load(best / "val_probabilities.npy", allow_pickle=False)
    rows = data.rows()
    table = rows.select(["image_id", "patient_id", "split", "age", "error_code", *LABELS]).to_pandas()
    table = table[table["error_code"].isna()]
    val = table[table["split"] == "val"].reset_index(drop=True)
    if val["image_id"].tolist() != json.loads((best / "val_ids.json").read_text()):
        raise RayCxrError(f"{out}: the validation images changed during the run; start again in another --out")
    architecture = Architecture.of(settings, data.size)
    calibrations, points, rates = fit_rules(
        val[list(architecture.findings)], probabilities, architecture.findings, settings.min_positives
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
        "best_epoch": progress["best_epoch"],
        "chosen_by": "validation macro AUROC" if result["macro_auroc"] is not None else "validation loss",
        "validation": result,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
    }
    # All epochs, also those after the best one, whose checkpoint cannot know of them.
    curves = _read_metrics(out)
    plain = {key: value for key, value in settings.model_dump(mode="json").items() if value is not None}
    return write_bundle(
        out / "bundle",
        save_weights=lambda path: shutil.copyfile(best / WEIGHTS, path),
        architecture=architecture,
        input_spec=data.input_spec,
        calibration=calibrations,
        operating_points=points,
        expected_flag_rates=rates,
        provenance=provenance,
        config_toml=tomli_w.dumps({"train": plain}),
        curves=curves,
        split=split,
    )


def _lineage(used: pd.DataFrame, weights: str) -> tuple[pa.Table, str]:
    """What trained the network, its starting weights included, and whether that is all: `known` or `unknown`."""
    frame = used[["image_id", "patient_id", "split"]]
    lineage = "known" if weights in ("none", "imagenet") else "unknown"  # ImageNet holds no radiographs of patients
    if Path(weights).is_dir():
        earlier = load_bundle(weights)
        before = pq.read_table(earlier.path / "split.parquet").to_pandas()
        frame = pd.concat([frame, before[~before["image_id"].isin(frame["image_id"])]], ignore_index=True)
        lineage = earlier.info["provenance"].get("lineage", "unknown")
    return pa.Table.from_pandas(frame, schema=SPLIT_SCHEMA, preserve_index=False), lineage


def fit_rules(
    labels: pd.DataFrame, probabilities: np.ndarray, findings: tuple[str, ...], min_positives: int
) -> tuple[dict[str, Any], dict[str, Any], dict[str, float | None]]:
    """Calibration, operating point and flag rate per finding; null where there are too few positives or negatives.

    Args:
        labels: a column per finding, 0, 1 or null, [N].
        probabilities: float32 [N,F].
    """
    calibrations: dict[str, Any] = {}
    points: dict[str, Any] = {}
    rates: dict[str, float | None] = {}
    for j, name in enumerate(findings):
        known = labels[name].notna().to_numpy()
        y = labels[name].to_numpy(dtype=float, na_value=-1)[known].astype(np.int8)
        p = probabilities[known, j]
        fitted = calibration.fit_platt(y, p, min_positives)
        calibrations[name] = fitted.as_dict() if fitted else None
        enough = min(int(y.sum()), int((1 - y).sum())) >= min_positives
        points[name] = calibration.operating_point(y, p, OPERATING_RULE) if enough else None
        rates[name] = points[name]["flag_rate"] if points[name] else None
    return calibrations, points, rates


def _weights_words(weights: str) -> str:
    if Path(weights).is_dir():
        return f"the bundle {load_bundle(weights).digest}"
    known = {"none": "random", "imagenet": "ImageNet (keras.applications)"}
    return known.get(weights, f"the file {Path(weights).name}")
