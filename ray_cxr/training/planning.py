"""Check a training run before Ray starts, and divide the CPUs and GPUs of Ray's nodes among the run's workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr import cluster
from ray_cxr.config import TrainSettings
from ray_cxr.data import identity
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import ConfigError, LeakError, TableError
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import Bundle, is_written, load_bundle
from ray_cxr.storage import remote
from ray_cxr.storage.run_folder import check_run, read_settings
from ray_cxr.training.checkpoints import has_checkpoint


@dataclass(frozen=True)
class TrainPlan:
    """A training run that passed all checks.

    Attributes:
        settings: settings of the run, with the size of the prepared set, and weights as an absolute path.
        architecture: that of the settings, with the normalization of the bundle that the run starts from.
        run_settings: the content of settings.json, which later runs in `out` must match.
        started: whether this run continues an earlier one.
        bundle: the run's bundle if it is finished, else None.
    """

    out: Path
    data: PreparedSet
    settings: TrainSettings
    architecture: Architecture
    run_settings: dict[str, Any]
    started: bool
    bundle: Bundle | None

    @property
    def steps_per_epoch(self) -> int:
        steps = math.ceil(len(self.data.usable("train")) / self.settings.images_per_step)
        return min(steps, self.settings.steps_per_epoch or steps)

    def list_warnings(self) -> list[str]:
        """Return one sentence for each setting without effect, and for each reason to expect a bad model."""
        settings = self.settings
        warnings = [f"no effect: {name}" for name in settings.list_unused()]
        if settings.weights == "none" and not self.started:
            warnings.append("weights=none: the model starts from RANDOM weights, not from pre-trained ones")
        table = self.data.usable("train")
        constant = [name for name in settings.finding_names() if len(set(table[name].drop_null().to_pylist())) < 2]
        if constant:
            warnings.append(
                f"the training images lack positives or negatives of {', '.join(constant)}: the model's output for "
                "them is meaningless"
            )
        if settings.frozen_epochs and settings.weights == "none":
            warnings.append("frozen_epochs freezes a backbone with random weights")
        return warnings


def plan_training(prepared: str | Path, out: str | Path, settings: TrainSettings) -> TrainPlan:
    """Check the arguments of `train` without Ray, whose start takes seconds."""
    out = remote.to_path(out)
    data = PreparedSet(prepared, settings.size)
    settings = settings.replace(size=data.size)
    if settings.min_workers is None and settings.batch_size % settings.workers:
        multiple = math.ceil(settings.batch_size / settings.workers) * settings.workers
        problem = f"{settings.batch_size} is not a multiple of {settings.workers} workers"
        raise ConfigError(f"batch_size: {problem}; use {multiple}")
    if settings.weights not in ("imagenet", "none"):
        if "://" in settings.weights:
            raise ConfigError(f"weights: {settings.weights}: copy the file or bundle to a disk that all nodes mount")
        if not Path(settings.weights).exists():
            raise ConfigError(f"weights: {settings.weights}: no such file or bundle; or use imagenet or none")
        if Path(settings.weights).suffix.lower() == ".onnx":
            raise _refuse_graph(settings.weights)
        # Workers have other working directories.
        settings = settings.replace(weights=str(Path(settings.weights).absolute()))
    data.usable("train")
    val = data.usable("val")
    findings = settings.finding_names()
    if all(val[name].null_count == len(val) for name in findings):
        raise TableError(
            f"{data.path}: no image of split 'val' is labelled for {', '.join(findings)}, so no epoch can be chosen"
        )
    architecture = Architecture.of(settings, data.size)
    if Path(settings.weights).is_dir():
        start = load_bundle(settings.weights)
        if start.is_graph:
            raise _refuse_graph(settings.weights)
        refuse_leak(start, val)
        # Its weights were trained on this input.
        architecture = architecture.replace(normalization=start.architecture.normalization)
    run_settings = {
        "kind": "train",
        "format": 1,
        "prepared": data.manifest_digest,
        "input_spec": data.input_spec.model_dump(mode="json"),
        "train": settings.model_dump(mode="json", exclude=list_free_settings(settings)),
    }
    finished = is_written(out / "bundle")
    started = finished or has_checkpoint(out)
    if started or read_settings(out).get("kind") != "train":  # a run without a checkpoint does not bind its folder
        # A run of an earlier version lacks the settings that were added since.
        defaults = {f"train.{name}": value for name, value in TrainSettings().model_dump(mode="json").items()}
        check_run(out, run_settings, defaults=defaults)
    bundle = load_bundle(out / "bundle") if finished else None
    if bundle is not None and (epochs := bundle.info["provenance"]["settings"].get("epochs")) != settings.epochs:
        raise ConfigError(f"{out}: is finished with epochs={epochs}; choose another --out for epochs={settings.epochs}")
    return TrainPlan(out, data, settings, architecture, run_settings, started, bundle)


def _refuse_graph(weights: str) -> ConfigError:
    return ConfigError(
        f"weights: {weights}: holds only a graph; it cannot be trained further; use weights that Keras or PyTorch saved"
    )


def refuse_leak(start: Bundle, val: pa.Table) -> None:
    """Refuse validation images or patients that trained the starting weights, since validation selects the model."""
    split = identity.read_split(start.path)
    trained = split.filter(pc.equal(split["split"], "train"))
    images = pa.array(identity.find_ids(val["image_id"].to_pylist(), trained["image_id"].to_pylist()) >= 0)
    unified = identity.unify_patients(val["image_id"].to_pylist(), val["patient_id"].to_pylist())
    patients = pc.is_in(pa.array(unified, pa.string()), trained["patient_id"].drop_null().combine_chunks())
    count = pc.sum(pc.or_(images, patients)).as_py()
    if count:
        raise LeakError(
            f"weights: {count:,} of {len(val):,} validation images, or their patients, trained {start.path}; "
            "prepare a manifest with that bundle's split, or without those patients in val"
        )


def list_free_settings(settings: TrainSettings) -> set[str]:
    """Return the names of settings that may change when a run continues: the steps so far do not depend on them."""
    free = {"workers", "min_workers", "cpus_per_worker", "gpus_per_worker", "max_failures", "checkpoint_steps"}
    free.add("step_timeout_s")
    # A cosine ends with the last epoch, so another number of epochs changes all learning rates.
    return free if settings.schedule == "cosine" else {*free, "epochs"}


def plan_resources(settings: TrainSettings, *, use_gpu: bool, runs: int | None = None) -> tuple[int, int]:
    """Return the CPUs per worker on Ray's current nodes, and the number of such runs that fit at a time.

    The CPUs are divided among `runs` runs; by default among as many runs as fit on the GPUs, or one without GPUs. If
    the number of workers may vary, the nodes of the moment need to hold only the minimum.

    Raises:
        ConfigError: not even one run fits, so that Ray would wait indefinitely.
    """
    groups = [[node["Resources"] for node in group] for group in cluster.group_nodes()]
    resources = [node for group in groups for node in group]
    gpus = sum(node.get("GPU", 0) for node in resources)
    least = settings.min_workers or settings.workers
    if use_gpu and gpus < least * settings.gpus_per_worker:
        raise ConfigError(
            f"--gpu: {least} workers need {least * settings.gpus_per_worker:g} GPUs, Ray has "
            f"{gpus:g}; omit --gpu, or join a cluster that has them{cluster.hint_at_unused('GPU')}"
        )
    # A worker cannot use parts of two GPUs, so the number is rounded down; 1 / 0.2 is 5, but 1 // 0.2 is 4.
    per_gpu = int(1 / settings.gpus_per_worker + 1e-9)

    def list_slots(group: list[dict[str, float]]) -> list[tuple[float, float]]:
        return [(node.get("CPU", 0), int(node.get("GPU", 0)) * per_gpu if use_gpu else math.inf) for node in group]

    def fit(nodes: list[tuple[float, float]]) -> int | None:
        most = max(1, int(sum(slots for _, slots in nodes)) // least if use_gpu else 1)
        counts = (runs,) if runs else range(most, 0, -1)  # fewer than the GPUs allow, if some GPUs have no CPU
        sizes = range(settings.workers, least - 1, -1)
        fits = (_fit_cpus(nodes, workers * count, settings.cpus_per_worker) for count in counts for workers in sizes)
        return next(filter(None, fits), None)

    nodes = list_slots(resources)
    cpus = fit(nodes)
    if cpus is None:
        available = ", ".join(f"{cpus:g}" for cpus, slots in nodes if slots)
        prefix = f"{runs} runs of " if runs and runs > 1 else ""
        raise ConfigError(
            f"{prefix}{least} workers of {settings.cpus_per_worker or 1} CPUs do not fit Ray's nodes, "
            f"which have {available}; lower {'concurrent, ' if prefix else ''}workers or cpus_per_worker"
        )
    # Workers that fit the preferred nodes, and the others when these are lost.
    cpus = min([cpus, *filter(None, (fit(list_slots(group)) for group in groups))])
    if settings.min_workers is not None:
        _refuse_counted_nodes(settings, cpus, use_gpu=use_gpu)
    return cpus, _count_workers(nodes, cpus) // least


def _refuse_counted_nodes(settings: TrainSettings, cpus: int, *, use_gpu: bool) -> None:
    """Refuse a varying number of workers if nodes that may not work could hold some.

    Ray ignores labels when it counts the workers that fit on the nodes, and would wait for these without a message.
    """
    allowed = {node["NodeID"] for node in cluster.list_nodes()}
    others = [node for node in cluster.list_alive() if node["NodeID"] not in allowed]
    gpus = settings.gpus_per_worker if use_gpu else 0.0
    counted = [n for n in others if n["Resources"].get("CPU", 0) >= cpus and n["Resources"].get("GPU", 0) >= gpus]
    if counted:
        names = ", ".join(node["NodeManagerAddress"] for node in counted[:3])
        raise ConfigError(
            f"workers={settings.min_workers}-{settings.workers}: Ray would wait for workers on nodes that may not work "
            f"({names}{', ...' if len(counted) > 3 else ''}); start the head with --num-cpus=0, set ray.on_head=true, "
            "or use a fixed number of workers"
        )


def _fit_cpus(nodes: Sequence[tuple[float, float]], workers: int, requested: int | None) -> int | None:
    """Return the most CPUs per worker on nodes of (CPUs, worker slots); None if the workers do not fit."""
    most = int(max((cpus for cpus, _ in nodes), default=0))
    candidates = (requested,) if requested else range(most, 0, -1)
    return next((cpus for cpus in candidates if _count_workers(nodes, cpus) >= workers), None)


def _count_workers(nodes: Sequence[tuple[float, float]], cpus_each: int) -> int:
    return int(sum(min(cpus // cpus_each, slots) for cpus, slots in nodes))
