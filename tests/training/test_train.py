"""`train` from outside: once with real Ray Train workers, and with one worker in this process for all the rest."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run, replace_ray
from keras.callbacks import LambdaCallback
from nodes import TRAINING, training_arguments
from sklearn.metrics import roc_auc_score
from tensorflow.compat.v1.train import summary_iterator

import ray_cxr
from ray_cxr import cluster, environment
from ray_cxr.cli import main
from ray_cxr.config import DEFAULT_RULE, TrainSettings, build
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import ConfigError, LeakError, OutputError, RayCxrError, TableError
from ray_cxr.labels import FINDINGS
from ray_cxr.models import importing, runtime
from ray_cxr.models.bundle_writer import derive_bundle
from ray_cxr.ray_api import CHECKPOINT_LIST
from ray_cxr.storage.run_folder import create_run
from ray_cxr.training import planning, trainer
from ray_cxr.training.checkpoints import find_best_checkpoint
from ray_cxr.training.export import export_bundle
from ray_cxr.training.monitor import RunMonitor
from ray_cxr.training.worker import VALIDATION

SETTINGS: dict[str, Any] = TRAINING | {"batch_size": 16}


def assert_refused(outcome: tuple[int, str, str], *words: str) -> None:
    """Exit code 2 and one line on stderr, which names what is wrong."""
    code, _, error = outcome
    assert (code, error.count("\n"), all(word in error for word in words)) == (2, 1, True), error


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.ray
def test_two_workers_train_until_patience_ends(uninterrupted: Run, prepared: Path) -> None:
    assert "RANDOM weights" in uninterrupted.output
    bundle = ray_cxr.load_bundle(uninterrupted.out / "bundle")
    source, rows = bundle.info["provenance"], pd.read_csv(uninterrupted.out / "metrics.csv")
    best = source["best_epoch"]
    assert rows["epoch"].tolist() == list(range(1, best + 2))
    assert len(rows) < source["settings"]["epochs"]
    assert rows["val_auroc"].idxmax() + 1 == best
    assert source["validation"]["macro_auroc"] == pytest.approx(rows["val_auroc"].max(), abs=1e-12)
    assert [point["epoch"] for point in bundle.model_json()["curves"]] == rows["epoch"].tolist()
    assert (bundle.findings, bundle.input_spec.size) == (FINDINGS, 64)
    assert (source["initial_weights"], source["lineage"]) == ("random", "known")
    assert source["split"]["kind"] == "patient"
    assert source["prepared_digest"] == PreparedSet(prepared, 64).manifest_digest
    assert 0 <= source["age_range"][0] < source["age_range"][1] <= 120
    assert (uninterrupted.out / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    # TensorBoard's events have the numbers of metrics.csv.
    files = (uninterrupted.out / "tensorboard").glob("events*")
    events = [event for file in files for event in summary_iterator(str(file))]
    logged = {(value.tag, event.step): value.simple_value for event in events for value in event.summary.value}
    for name in ("loss", "val_loss", "val_auroc", "learning_rate"):
        assert [logged[name, epoch] for epoch in rows["epoch"]] == pytest.approx(rows[name].tolist(), rel=1e-6)


@pytest.mark.ray
def test_ctrl_c_after_a_run_is_not_left_to_ray_train(uninterrupted: Run) -> None:
    """In a background job the handler is `SIG_IGN`."""
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)


@pytest.mark.ray
def test_bundle_reproduces_its_validation(uninterrupted: Run, prepared: Path, manifest: Path, monkeypatch) -> None:
    """The exported bundle gives the validated probabilities again; scikit-learn gives their AUROC."""
    monkeypatch.chdir(uninterrupted.out.parent)  # Ray Train would take a relative path for an address
    checkpoint = find_best_checkpoint(Path(uninterrupted.out.name))
    with checkpoint.as_directory() as folder, np.load(Path(folder) / VALIDATION) as arrays:
        validated = arrays["probabilities"]
    bundle = ray_cxr.load_bundle(uninterrupted.out / "bundle")
    val = PreparedSet(prepared, 64).load("val")
    predicted = bundle.predict(np.asarray(val.images), precision="fp32")[[f"p_{name}" for name in FINDINGS]]
    np.testing.assert_allclose(predicted.to_numpy(), validated, atol=1e-4)
    source, points = bundle.info["provenance"], bundle.info["operating_points"]
    for j, name in enumerate(FINDINGS):
        row, cell = (source[key]["findings"][name] for key in ("validation", "evaluation"))
        y = val.labels[:, j]
        assert (row["n"], row["positives"]) == (cell["n"], cell["positives"]) == (len(y), y.sum())
        auroc = pytest.approx(roc_auc_score(y, validated[:, j]), abs=1e-12) if 0 < y.sum() < len(y) else None
        assert row["auroc"] == auroc
        assert cell["auroc"] == auroc
        assert {"youden", "sensitivity=0.9", "specificity=0.9"} <= set(bundle.info["operating_alternatives"][name])
        assert points[name]["rule"] == DEFAULT_RULE if points[name] else bundle.info["rule_notes"][name]
    flagged = [predicted[f"p_{name}"] >= points[name]["threshold"] for name in FINDINGS if points[name]]
    assert np.any(flagged, axis=0).mean() <= 0.3 + 1 / len(predicted)  # p of another process may differ in the last bit
    split = pq.read_table(bundle.path / "split.parquet").to_pandas().set_index("image_id")
    table = pq.read_table(manifest).to_pandas().set_index("image_id").loc[split.index]
    pd.testing.assert_frame_equal(split, table[list(split.columns)], check_dtype=False)
    assert set(split["split"]) == {"train", "val"}
    for name in ("train", "val"):
        images = source["demographics"][name]["images"], source["images"][name]["images"]
        assert set(images) == {(table["split"] == name).sum()}
    assert any(points.values())
    means = source["evaluation"]["means"]
    assert means["auroc"]["value"] == pytest.approx(source["validation"]["macro_auroc"], abs=1e-12)


def read_result(path: str | Path, storage_filesystem: Any = None) -> SimpleNamespace:
    """Stand in for Ray Train's `Result.from_path`: the checkpoints that `LocalTrainer` listed, the latest one last."""
    from ray.train import Checkpoint

    listed = Path(path) / CHECKPOINT_LIST
    entries = read_json(listed) if listed.exists() else []
    found = [(Checkpoint.from_directory(Path(path) / name), metrics) for name, metrics in entries]
    return SimpleNamespace(checkpoint=found[-1][0] if found else None, best_checkpoints=found)


class LocalTrainer:
    """Stand-in for Ray Train: runs the function of worker 0 in this process, and keeps every checkpoint."""

    def __init__(self, function: Any, *, train_loop_config: Any, scaling_config: Any, run_config: Any, **_: Any):
        self._run, self._count = lambda: function(train_loop_config), scaling_config.num_workers
        self._folder = Path(run_config.storage_path) / run_config.name

    def fit(self) -> SimpleNamespace:
        import ray.train

        context = SimpleNamespace(get_world_size=lambda: self._count, get_world_rank=lambda: 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray.train, "get_context", lambda: context)
            patch.setattr(ray.train, "get_checkpoint", lambda: read_result(self._folder).checkpoint)
            patch.setattr(ray.train, "report", self._report)
            patch.setattr(ray.train, "get_preemption_info", lambda: None)
            self._run()
        return read_result(self._folder)

    def _report(self, metrics: dict[str, Any], checkpoint: Any, *, checkpoint_upload_fn: Any, **_: Any) -> None:
        listed = self._folder / CHECKPOINT_LIST
        entries = read_json(listed) if listed.exists() else []
        name = f"checkpoint_{len(entries)}"
        checkpoint_upload_fn(checkpoint, name)
        shutil.rmtree(checkpoint.path)
        listed.write_text(json.dumps([*entries, (name, metrics)]), encoding="utf-8")


@contextlib.contextmanager
def replace_ray_train() -> Iterator[list[str]]:
    """Train in this process, without Ray and without changing TensorFlow's global state; yields the omitted calls."""
    import ray.train

    from ray_cxr.training import backend

    left_out: list[str] = []
    with replace_ray(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "Trainer", LocalTrainer)
        patch.setattr(ray.train, "Result", SimpleNamespace(from_path=read_result))
        patch.setattr(runtime, "prepare_device", lambda gpu, wanted: "float32" if wanted == "auto" else wanted)
        patch.setattr(runtime, "limit_threads", lambda count: left_out.append(f"{count} threads"))
        patch.setattr(runtime, "make_deterministic", lambda: left_out.append("deterministic"))
        yield left_out


@pytest.fixture
def local_train() -> Iterator[None]:
    with replace_ray_train():
        yield


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("local_train")
@pytest.mark.parametrize("backbone", ["DenseNet201", "EfficientNetV2S", "ConvNeXtTiny"])
def test_large_backbones_are_trained_scored_explained_and_exported(
    backbone: str, prepared: Path, manifest: Path, tmp_path: Path, command
) -> None:
    """With every option of training, through the commands that read a bundle."""
    options: dict[str, Any] = {"backbone": backbone, "epochs": 1, "accumulate": 2, "layer_decay": 0.8, "mixup": 0.2}
    options |= {"intensity": 2, "crop": 0.3, "erase": 0.1, "shear": 5.0, "optimizer": "adamw", "ema": 0.5}
    options |= {"balance": "findings", "batchnorm_images": 32}
    assert command(*training_arguments(prepared, tmp_path / "run", **options))[0] == 0
    bundle = ray_cxr.load_bundle(tmp_path / "run" / "bundle")
    model = bundle.model()
    images = np.asarray(PreparedSet(prepared, 64).load("val").images)
    expected = np.asarray(model(images[..., None], training=False))
    score = ["score", bundle.path, "--out", tmp_path / "scores", "--precision", "fp32", "--heatmaps", 2]
    assert command(*score, "--manifest", manifest)[0] == 0
    rows = pq.read_table(tmp_path / "scores" / "scores").to_pandas().set_index("image_id")
    rows = rows.loc[PreparedSet(prepared, 64).load("val").image_ids, [f"p_{name}" for name in FINDINGS]]
    np.testing.assert_allclose(rows.to_numpy(), expected, atol=1e-4)
    maps = pd.concat(map(pd.read_parquet, (tmp_path / "scores" / "heatmaps").glob("*.parquet")))
    assert set(maps["height"].dropna()) == {2}
    code, _, err = command("export-onnx", bundle.path, "--out", tmp_path / "m.onnx")
    assert code == 0, err


RULES = {"findings": 15, "calibration": "temperature", "operating_point": "specificity=0.8"}
NORMALIZATION = ((0.01, -0.5),)
FROM_BUNDLE = RULES | {"epochs": 1, "frozen_epochs": 1, "checkpoint_steps": 2, "precision": "mixed_bfloat16"}


@pytest.fixture(scope="module")
def start_bundle(tiny_bundle, tmp_path_factory: pytest.TempPathFactory) -> ray_cxr.Bundle:
    """A bundle whose backbone takes other values than by default."""
    architecture = tiny_bundle.architecture.replace(normalization=NORMALIZATION)
    return derive_bundle(tiny_bundle, tmp_path_factory.mktemp("start") / "bundle", architecture=architecture)


@pytest.fixture(scope="module")
def from_bundle(prepared: Path, start_bundle, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One epoch that starts from a bundle, in another precision than the default of CPUs."""
    out = tmp_path_factory.mktemp("from_bundle") / "run"
    arguments = training_arguments(prepared, out, **SETTINGS | FROM_BUNDLE | {"weights": start_bundle.path})
    with replace_ray_train() as left_out, contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(arguments) == 0
    assert left_out == ["2 threads", "deterministic"]
    return Run(out, arguments, output.getvalue())


@pytest.mark.slow
def test_a_run_that_starts_from_a_bundle_inherits_its_split(from_bundle: Run, start_bundle) -> None:
    start = read_json(from_bundle.out / "started.json")
    assert (start["epoch"], start["step"], start["policy"]) == (0, 0, "mixed_bfloat16")
    assert start["random"] == ["logits of No_Finding"]
    bundle = ray_cxr.load_bundle(from_bundle.out / "bundle")
    assert bundle.architecture.normalization == NORMALIZATION
    source = bundle.info["provenance"]
    split = pq.read_table(bundle.path / "split.parquet").to_pandas().set_index("image_id")
    assert split.loc["00000099_000.png", "patient_id"] == "99"  # from the first bundle
    assert len(split) > 20
    assert source["initial_weights"] == f"the bundle {start_bundle.digest}"
    assert source["precision"] == "mixed_bfloat16"
    assert source["lineage"] == "unknown"  # the first bundle does not state its lineage
    assert {fit["method"] for fit in bundle.info["calibration"].values() if fit} == {"temperature"}
    assert {point["rule"] for point in bundle.info["operating_points"].values() if point} == {"specificity=0.8"}
    assert "sensitivity=0.9" in bundle.info["operating_alternatives"]["Mass"]


@pytest.mark.slow
def test_a_run_without_its_bundle_continues_until_a_callback_stops_it(
    from_bundle: Run, prepared: Path, start_bundle, tmp_path: Path, local_train
) -> None:
    """As if the command had died just before the bundle; the precision of the first part stays."""
    out = tmp_path / "run"
    shutil.copytree(from_bundle.out, out, ignore=shutil.ignore_patterns("bundle"))
    for path in (out / "ray").glob("checkpoint_*/progress.json"):
        path.write_text(path.read_text(encoding="utf-8").replace('"mixed_bfloat16"', '"float32"'), encoding="utf-8")

    def stop(epoch: int, logs: dict[str, float]) -> None:
        assert set(logs) == {"loss", "val_loss", "val_auroc", "learning_rate"}
        callback.model.stop_training = True

    callback = LambdaCallback(on_epoch_end=stop)
    settings = build(TrainSettings, SETTINGS | FROM_BUNDLE | {"epochs": 4, "weights": str(start_bundle.path)})
    lines: list[str] = []
    bundle = trainer.train(prepared, out, settings, callbacks=lambda: [callback], on_event=lines.append)
    assert [line.split(":")[1] for line in lines if line.startswith("train: epoch")] == [" epoch 2 of 4"]
    start = read_json(out / "started.json")
    assert (start["epoch"], start["step"], start["random"]) == (1, 0, [])
    assert bundle.info["provenance"]["precision"] == "float32"
    assert pd.read_csv(out / "metrics.csv")["epoch"].tolist() == [1, 2]
    # A checkpoint during an epoch has no score, so that it is never the best.
    listed = read_json(out / "ray" / CHECKPOINT_LIST)
    assert [metrics["selection"] > -2 for _, metrics in listed] == [False, True] * 2


@pytest.mark.slow
def test_a_finished_run_is_left_alone(from_bundle: Run, prepared: Path, command) -> None:
    sums = from_bundle.out / "bundle" / "SHA256SUMS"
    before = sums.stat().st_mtime_ns
    config = ["--config", from_bundle.out / "bundle" / "config.toml"]
    for again in (from_bundle.arguments, ["train", prepared, "--out", from_bundle.out, *config]):
        code, output, error = command(*again)
        assert code == 0, error
        assert "finished already" in output
    for change, name in (("learning_rate=0.05", "train.learning_rate 0.0001 (now 0.05)"), ("epochs=2", "epochs=1")):
        assert_refused(command(*from_bundle.arguments, "--set", change), name)
    assert sums.stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "workers", "message"),
    [
        (None, 1, "the loss is nan at epoch 1, step 1"),
        (MemoryError(), 2, "out of memory with batch_size=16 over 2 workers and images of 64 pixels"),
        (ValueError("an unforeseen error"), 1, "an unforeseen error"),
    ],
)
@pytest.mark.usefixtures("local_train")
def test_failed_worker_ends_the_run_with_its_reason(error, workers, message, prepared: Path, tmp_path: Path) -> None:
    def fail(batch: int, logs: object) -> None:
        if error:
            raise error
        kernel = callback.model.get_layer("logits").kernel
        kernel.assign(kernel * float("nan"))

    callback = LambdaCallback(on_train_batch_begin=fail)
    settings = TrainSettings(**SETTINGS, epochs=1, workers=workers)
    with pytest.raises(RayCxrError, match=message) as caught:
        trainer.train(prepared, tmp_path, settings, callbacks=lambda: [callback])
    assert "\n" not in str(caught.value)
    # Ray Train restarts what fails by an error that is not ours.
    assert (tmp_path / "failure.json").exists() != isinstance(error, ValueError)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_weights_that_do_not_fit_do_not_bind_the_folder(prepared: Path, tmp_path: Path, command, local_train) -> None:
    weights = tmp_path / "other.weights.h5"
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save_weights(weights)
    given = training_arguments(prepared, tmp_path / "run", weights=weights)
    assert_refused(command(*given), "tiny_conv0", str(weights))
    # Nothing was trained, so that other settings may use the folder.
    for frozen in (0, 1):
        settings = TrainSettings(weights="none", size=64, frozen_epochs=frozen)
        plan = planning.plan_training(prepared, tmp_path / "run", settings)
        assert not plan.started
        images = len(plan.data.usable("train"))
        sizes = (images, images - 1, 1)
        steps = [replace(plan, settings=settings.replace(batch_size=size)).steps_per_epoch for size in sizes]
        assert steps == [1, 2, images], "the last batch may be smaller"
        assert any("frozen_epochs" in line for line in plan.list_warnings()) == bool(frozen)


@pytest.mark.parametrize(
    ("settings", "options", "part"),
    [
        ({"workers": 3}, [], "use 18"),
        ({"weights": "none.h5"}, [], "none.h5"),
        ({"rotation": 90}, [], "rotation"),
        ({"xla": "true", "deterministic": "true"}, [], "deterministic"),
        ({"xla": "true", "sync_batchnorm": "true"}, [], "sync_batchnorm"),
        ({"gpus_per_worker": 0.5, "workers": 2}, [], "gpus_per_worker"),
        ({}, ["--workers", 4], "4 workers of 1 CPUs"),
        ({}, ["--gpu"], "--gpu: this machine has no GPU"),
    ],
)
@pytest.mark.usefixtures("without_ray")
def test_settings_that_do_not_fit_are_refused(
    settings, options, part, prepared: Path, tmp_path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "count_gpus", lambda: 0)
    if "--gpu" in options:
        monkeypatch.setattr("ray.is_initialized", lambda: False)  # earlier tests may have started one
    assert_refused(command(*training_arguments(prepared, tmp_path / "run", **SETTINGS | settings), *options), part)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("without_ray")
def test_a_graph_is_refused_as_initial_weights(prepared: Path, tmp_path: Path, command) -> None:
    small = Path(__file__).parents[1] / "models" / "small.onnx"
    options = importing.ImportOptions(outputs=("Mass", "-", "-"), normalization="none", layout="nchw", logits=True)
    importing.import_weights(small, tmp_path / "graph", backbone=None, options=options)
    for weights in (small, tmp_path / "graph"):
        given = training_arguments(prepared, tmp_path / "run", weights=weights)
        assert_refused(command(*given), f"weights: {weights}: holds only a graph; it cannot be trained further")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("schedule", "allowed"), [("cosine", False), ("plateau", True)])
def test_a_cosine_run_refuses_more_epochs(schedule: str, allowed: bool, prepared: Path, tmp_path: Path) -> None:
    """Its learning rates would have been others from the first step."""
    settings = TrainSettings(weights="none", size=64, epochs=2, schedule=schedule)
    wanted = [planning.plan_training(prepared, tmp_path, settings.replace(epochs=n)).run_settings for n in (2, 3)]
    assert (wanted[0] == wanted[1]) == allowed


@pytest.mark.parametrize(
    ("nodes", "settings", "gpu", "runs", "expected"),
    [
        ([(2, 0)], {"workers": 2}, False, None, (1, 1)),  # the laptop: a run's own processes must hold no CPU
        ([(2, 0)], {}, False, 2, (1, 2)),
        ([(8, 0)] * 4, {"workers": 2}, False, None, (8, 2)),
        ([(2, 0), (1, 0)], {}, False, None, (2, 1)),  # not 3: no node has them
        ([(16, 0), (8, 0)], {"workers": 3}, False, None, (8, 1)),
        ([(4, 0), (4, 0)], {"workers": 2, "cpus_per_worker": 3}, False, None, (3, 1)),
        ([(8, 1), (8, 1)], {"workers": 2}, True, None, (8, 1)),  # one GPU each
        ([(16, 8)], {}, True, None, (2, 8)),  # no GPU idles because one run took all CPUs
        ([(16, 8)], {}, True, 1, (16, 1)),
        ([(16, 8), (64, 0)], {"workers": 2}, True, None, (2, 4)),
        ([(10, 1)], {"gpus_per_worker": 0.2}, True, None, (2, 5)),  # 1 // 0.2 is 4
        ([(2, 8)], {}, True, None, (1, 2)),  # GPUs without a CPU
    ],
)
def test_capacity_for_runs(nodes, settings: dict, gpu: bool, runs: int | None, expected, monkeypatch) -> None:
    working = [{"Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}} for cpus, gpus in nodes]
    monkeypatch.setattr(cluster, "list_nodes", lambda: working)
    assert planning.plan_resources(TrainSettings(**settings), use_gpu=gpu, runs=runs) == expected


def test_too_few_gpus_are_refused(monkeypatch) -> None:
    nodes = [{"Resources": {"CPU": 4, "GPU": 1}}, {"Resources": {"CPU": 4}}]
    monkeypatch.setattr(cluster, "list_nodes", lambda: nodes)
    monkeypatch.setattr(cluster, "list_alive", lambda: nodes)
    with pytest.raises(ConfigError, match=r"--gpu: 2 workers need 2 GPUs, Ray has 1"):
        planning.plan_resources(TrainSettings(workers=2), use_gpu=True)


@pytest.mark.parametrize(
    ("spot", "others", "workers", "expected"),
    [
        ([8], [16], 1, (8, 3)),  # not 16, which no preferred node has
        ([16], [8], 1, (8, 3)),  # the others take over
        ([8], [8], 2, (4, 2)),
        ([8], [2, 2], 5, (1, 2)),
        ([], [4, 4], 2, (4, 1)),
    ],
)
def test_workers_fit_the_preferred_nodes_and_the_others(spot, others, workers, expected, monkeypatch) -> None:
    kinds = [*((cpus, "spot") for cpus in spot), *((cpus, "on-demand") for cpus in others)]
    nodes = [{"NodeID": str(i), "Resources": {"CPU": cpus}, "Labels": {"m": m}} for i, (cpus, m) in enumerate(kinds)]
    monkeypatch.setattr(cluster, "list_nodes", lambda: nodes)
    monkeypatch.setattr(cluster, "placement", cluster.Placement(preferred={"m": "spot"}))
    assert planning.plan_resources(TrainSettings(workers=workers), use_gpu=False) == expected


def test_varying_workers_are_refused_where_ray_counts_nodes_that_may_not_work(monkeypatch) -> None:
    nodes = [
        {"NodeID": name, "Resources": {"CPU": cpus}, "Labels": {"n": name}, "NodeManagerAddress": name}
        for name, cpus in (("head", 2.0), ("a", 2.0), ("b", 2.0))
    ]
    monkeypatch.setattr(cluster, "list_alive", lambda: nodes)
    monkeypatch.setattr(cluster, "placement", cluster.Placement({"n": "!head"}))
    varying = TrainSettings(workers=2, min_workers=1)
    with pytest.raises(ConfigError, match=r"^workers=1-2: .*\(head\)"):
        planning.plan_resources(varying, use_gpu=False)
    assert planning.plan_resources(TrainSettings(workers=2), use_gpu=False) == (2, 1)
    nodes[0]["Resources"]["CPU"] = 1.0  # too few for a worker
    assert planning.plan_resources(varying, use_gpu=False)[0] == 2


def test_validation_images_that_trained_the_starting_bundle_are_refused(prepared: Path, tmp_path: Path) -> None:
    val = PreparedSet(prepared, 64).usable("val")
    images, patients = val["image_id"].to_pylist(), val["patient_id"].to_pylist()

    def refuse(image: str, patient: str | None, split: str) -> None:
        table = pa.table({"image_id": [image], "patient_id": pa.array([patient], pa.string()), "split": [split]})
        pq.write_table(table, tmp_path / "split.parquet")
        planning.refuse_leak(SimpleNamespace(path=tmp_path), val)

    refuse("other.png", None, "train")
    refuse(images[0], patients[0], "val")
    with pytest.raises(LeakError, match=r"1 of \d+ validation images"):
        refuse(images[0], None, "train")
    with pytest.raises(LeakError, match=f"{patients.count(patients[0])} of"):
        refuse("other.png", patients[0], "train")


def test_a_run_of_an_earlier_version_continues_with_the_defaults(prepared: Path, tmp_path: Path) -> None:
    settings = TrainSettings(size=64, weights="none")
    stored = planning.plan_training(prepared, tmp_path, settings).run_settings
    assert stored["train"].pop("accumulate") == 1
    create_run(tmp_path, stored)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / CHECKPOINT_LIST).touch()
    assert planning.plan_training(prepared, tmp_path, settings).started
    with pytest.raises(OutputError, match=r"accumulate 1 \(now 2\); "):
        planning.plan_training(prepared, tmp_path, settings.replace(accumulate=2))


def test_a_validation_split_without_labels_is_refused(prepared: Path, tmp_path: Path, monkeypatch) -> None:
    val = PreparedSet(prepared, 64).usable("val")
    unlabelled = val.set_column(val.column_names.index("Mass"), "Mass", pa.nulls(len(val), pa.int8()))
    tables = {"train": PreparedSet(prepared, 64).usable("train"), "val": unlabelled}
    monkeypatch.setattr(PreparedSet, "usable", lambda _, split: tables[split])
    planning.plan_training(prepared, tmp_path, TrainSettings(size=64, findings=("Mass", "Edema")))
    with pytest.raises(TableError, match="Mass"):
        planning.plan_training(prepared, tmp_path, TrainSettings(size=64, findings=("Mass",)))


@pytest.mark.parametrize(
    ("progress", "message"),
    [({"stopped": False, "scores": [0.5], "curves": [{}]}, "after 1 of 3 epochs"), (None, "without a checkpoint")],
)
@pytest.mark.usefixtures("without_ray")
def test_unfinished_run_makes_no_bundle(progress, message: str, prepared: Path, tmp_path, monkeypatch) -> None:
    """On slow shared storage the reason of a failure may be seen late: the checkpoint itself must say that it ended."""
    (tmp_path / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
    checkpoint = progress and SimpleNamespace(as_directory=lambda: contextlib.nullcontext(str(tmp_path)))
    monkeypatch.setattr(trainer, "_run_workers", lambda *args, **options: SimpleNamespace(checkpoint=checkpoint))
    settings, out = TrainSettings(**SETTINGS, epochs=3), tmp_path / "run"
    with pytest.raises(RayCxrError, match=message):
        trainer.train(prepared, out, settings)
    with pytest.raises(RayCxrError, match="no epoch"):
        export_bundle(planning.plan_training(prepared, out, settings), out / "bundle")


def test_last_epochs_are_reported_before_the_run_returns(tmp_path: Path) -> None:
    lines: list[str] = []
    rows = "".join(f"{epoch},0.5,0.25,3.0,10.0,{epoch / 4}\n" for epoch in (1, 2))
    with RunMonitor(tmp_path, 2, 3, 0.0, lines.append).report():
        header = "epoch,loss,val_loss,seconds,images_per_second,val_auroc\n"
        (tmp_path / "metrics.csv").write_text(header + rows)
    assert [line.partition(":")[2].partition(":")[0] for line in lines] == [" epoch 1 of 2", " epoch 2 of 2"]


def test_start_and_restart_are_reported(tmp_path: Path) -> None:
    start = {"epoch": 2, "step": 4, "random": ["head_dense0"], "policy": "float32", "times": {"data": 15.0}}
    start["workers"] = 1
    lines: list[str] = []
    monitor = RunMonitor(tmp_path, 2, 3, 10.0, lines.append)
    monitor.report_start(start, is_restart=True)
    assert ["lost" in lines[0], "epoch 3 after step 4" in lines[1], "head_dense0" in lines[2]] == [True] * 3
    monitor.report_start(start | {"epoch": 0, "step": 0, "random": []}, is_restart=False)
    assert lines[3].startswith("train: first step done after 5 s (data 5)")
    assert "float32" in lines[3]


@pytest.mark.parametrize(
    ("kind", "positives", "has_gap"), [("official", 40, True), ("official", 2, False), ("patient", 40, False)]
)
def test_the_last_lines_say_what_validation_chose(
    kind: str, positives: int, has_gap: bool, command, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"n": 100, "positives": positives, "auroc": 0.84}
    provenance = {
        "validation": {"findings": dict.fromkeys(FINDINGS, row), "macro_auroc": 0.84},
        "best_epoch": 2,
        "split": {"kind": kind, "tables": {"Data_Entry_2017.csv": ""}},
    }
    empty: dict[str, Any] = dict.fromkeys(FINDINGS)
    info = {"provenance": provenance, "calibration": empty, "operating_points": empty, "expected_flag_rates": empty}
    made = SimpleNamespace(info=info, findings=FINDINGS, model_json=lambda: {"curves": [{}] * 3})
    monkeypatch.setattr(trainer, "train", lambda *_, **__: made)
    (tmp_path / "run" / "bundle").mkdir(parents=True)  # the next command names it
    code, printed, err = command("train", prepared, "--out", tmp_path / "run")
    assert code == 0, err
    assert "0.84" in printed
    assert "chosen on these images" in printed
    assert ("official test split" in printed) == has_gap


def test_a_restart_with_other_workers_has_its_reason(tmp_path: Path) -> None:
    start = {"epoch": 0, "step": 0, "random": [], "policy": "float32", "times": {}, "workers": 2}
    lines: list[str] = []
    monitor = RunMonitor(tmp_path, 2, 3, 10.0, lines.append)
    monitor._start = start
    note = {"rank": 0, "workers": 2, "seconds": 0.0, "lost": [1]}
    (tmp_path / "stalled-0.json").write_text(json.dumps(note), encoding="utf-8")
    for workers in (1, 1, 4):
        monitor.report_start(start | {"workers": workers}, is_restart=True)
    assert "1 stopped answering" in lines[0]
    assert "1 worker instead of 2" in lines[0]
    assert "lost" in lines[1]
    assert "4 workers instead of 2" in lines[2]
    assert "lost" not in lines[2]  # a node has joined
