"""`quantize` adds int8 to a bundle, or refuses in one line and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pytest
from conftest import replace_ray
from PIL import Image
from sklearn.metrics import roc_auc_score
from test_bundle import remove_graph, reseal, run_python, writable_copy
from test_exports import SIZE, drawn, write

import ray_cxr
from ray_cxr.config import PrepareSettings, QuantizeSettings
from ray_cxr.data import manifest, prepared
from ray_cxr.errors import BundleError, ConfigError, OutputError
from ray_cxr.labels import LABELS
from ray_cxr.models import bundle as bundles
from ray_cxr.models import classifier, exports, quantization, runtime
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle_writer import derive_bundle
from ray_cxr.storage import run_folder

pytestmark = pytest.mark.slow


def prepare(out: Path, *, size: int = SIZE, **settings: Any) -> Path:
    """Prepare drawn radiographs, one per patient, without Ray: 40 train, 36 val, 4 test."""
    rows: list[dict[str, Any]] = []
    out.parent.mkdir(exist_ok=True)
    for i, split in enumerate(["train"] * 40 + ["val"] * 36 + ["test"] * 4, 1):
        path = out.parent / f"{i:08d}_000.png"
        Image.fromarray(drawn(i - 1, i)[0]).save(path)
        labels = {name: int((i + j) % 3 == 1) for j, name in enumerate(LABELS)}
        rows.append({"image_id": path.name, "path": str(path), "patient_id": str(i), "split": split} | labels)
    table = out.with_name(f"{out.name}.parquet")
    manifest.write_manifest(pa.Table.from_pylist(rows, manifest.SCHEMA), table)
    with replace_ray():
        prepared.prepare(table, out, PrepareSettings(sizes=(size,), **settings))
    return out


def lineage(train: list[int]) -> pa.Table:
    """Return the split of a bundle that was trained on these patients of the set."""
    rows = [{"image_id": f"other_{i}.png", "patient_id": str(i), "split": "train"} for i in train]
    return pa.Table.from_pylist(rows, schema=bundles.SPLIT_SCHEMA)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("prepared") / "set")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> bundles.Bundle:
    """Write a bundle with random weights and spread outputs; near 0.5, int8 would change nothing."""
    keras.utils.set_random_seed(4)
    model = classifier.build(Architecture(backbone="TinyCNN", size=SIZE, findings=ray_cxr.FINDINGS[:2]))
    kernel, bias = model.get_layer("logits").get_weights()
    model.get_layer("logits").set_weights([kernel * 5, bias])
    sample = exports.SampleImages(*np.split(drawn(100, 190), [60]))
    return write(tmp_path_factory.mktemp("bundle") / "b", model, sample, split=lineage([1, 2, 3]))


#: The labels are unrelated to the images, so a swapped pair may move the AUROC by more than the default.
SETTINGS = QuantizeSettings(max_auroc_fall=0.9)


@pytest.fixture(scope="module")
def made(bundle, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bundles.Bundle, list[str]]:
    """The bundle with int8, and the lines of its events."""
    events: list[str] = []
    out = tmp_path_factory.mktemp("int8") / "b"
    return quantization.quantize(bundle.path, images, out, SETTINGS, on_event=events.append), events


@pytest.fixture
def quick(made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace NNCF by the graph that it produced earlier."""
    graph = made[0].path / runtime.graph_file("int8")
    monkeypatch.setattr(quantization, "_quantize_graph", lambda *_: runtime.import_openvino().Core().read_model(graph))


def test_int8_is_added_and_the_rest_is_kept(bundle, made) -> None:
    new, events = made
    assert new.files - bundle.files == {"golden-int8.npz", "openvino-int8.bin", "openvino-int8.xml"}
    for name in bundle.files - {"bundle.json", "MODEL_CARD.md"}:
        assert (new.path / name).read_bytes() == (bundle.path / name).read_bytes(), name
    assert new.info | {name: bundle.info[name] for name in ("provenance", "runtimes")} == bundle.info
    assert {name: new.info["runtimes"][name] for name in ("fp32", "bf16")} == bundle.info["runtimes"]
    row, source = new.info["runtimes"]["int8"], new.info["provenance"]["quantized"]
    assert (source["from"], source["range_images"], source["check_images"]) == (bundle.digest, 40, 36)
    assert (row["p99_drift"], row["tolerance"], row["accepted"]) == (source["p99_drift"], SETTINGS.max_p99_drift, True)
    assert source["macro_auroc_fall"] == pytest.approx(np.mean(list(source["auroc_fall"].values())))
    assert "40 training images, check on 36 validation images" in events[0]
    assert "- int8, on 36 validation images" in (new.path / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert 'element_type="i8"' in (new.path / "openvino-int8.xml").read_text(encoding="utf-8")
    small, whole = ((new.path / name).stat().st_size for name in ("openvino-int8.bin", "openvino.bin"))
    assert small < 0.4 * whole


def test_recorded_drift_is_that_of_the_runtimes(made, images: Path) -> None:
    new, _ = made
    data = prepared.PreparedSet(images, SIZE).load("val")
    int8, fp32 = (
        new.open_runtime(precision, batch_size=16, threads=runtime.default_threads()).predict(data.images[:])[0]
        for precision in ("int8", "fp32")
    )
    moved, source = np.abs(int8 - fp32), new.info["provenance"]["quantized"]
    assert moved.max() > 1e-4
    assert source["largest_drift"] == pytest.approx(moved.max(), abs=1e-6)
    assert source["p99_drift"] == pytest.approx(np.quantile(moved, 0.99), abs=1e-6)
    for j, name in enumerate(new.findings):
        y = data.labels[:, LABELS.index(name)]
        fall = roc_auc_score(y, fp32[:, j]) - roc_auc_score(y, int8[:, j])
        assert source["auroc_fall"][name] == pytest.approx(fall, abs=1e-9)


def test_second_run_changes_nothing_and_another_out_is_refused(bundle, made, images: Path, tmp_path: Path) -> None:
    new, _ = made
    assert quantization.quantize(bundle.path, images, new.path, SETTINGS, on_event=str).digest == new.digest
    (tmp_path / "folder").mkdir()
    other = SETTINGS.model_copy(update={"seed": 1})
    for out, settings in ((tmp_path / "folder", SETTINGS), (bundle.path, SETTINGS), (new.path, other)):
        before = sorted(out.iterdir())
        with pytest.raises(OutputError, match=f"{out}: (exists already|was made from another configuration).*--out"):
            quantization.quantize(bundle.path, images, out, settings, on_event=str)
        assert sorted(out.iterdir()) == before


def test_a_second_command_for_one_bundle_is_refused_at_its_start(bundle, images: Path, tmp_path: Path) -> None:
    events: list[str] = []
    out = tmp_path / "b"
    with (
        run_folder.lock_bundle(out, "quantize"),
        pytest.raises(OutputError, match=rf"{out}: `ray-cxr quantize` \(process \d+ on .*\) is writing here"),
    ):
        quantization.quantize(bundle.path, images, out, SETTINGS, on_event=events.append)
    assert events == []
    assert list(tmp_path.iterdir()) == []


def test_inputs_and_output_may_be_in_a_bucket(bucket, bundle, made, quick, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_CXR_CACHE", str(tmp_path / "cache"))
    bucket.upload(bundle.path, "int8/old")
    bucket.upload(images, "int8/set")
    given = (bucket("int8/old"), bucket("int8/set"), bucket("int8/new"), SETTINGS)
    digest = quantization.quantize(*given).digest
    assert {key.removeprefix("int8/new/") for key in bucket.keys("int8/new/")} == made[0].files | {"SHA256SUMS"}
    assert quantization.quantize(*given).digest == digest


def test_refused_drift_leaves_nothing_behind(bundle, quick, images: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    settings = QuantizeSettings(max_p99_drift=1e-6)
    with pytest.raises(ConfigError, match=r"max_p99_drift is 1e-06.*no bundle was written"):
        quantization.quantize(bundle.path, images, tmp_path / "new" / "b", settings, on_event=str)
    assert list(tmp_path.iterdir()) == []


def test_fall_of_the_auroc_has_a_limit() -> None:
    settings = QuantizeSettings(max_p99_drift=0.03, max_auroc_fall=0.005)
    quantization._check_drift({"p99_drift": 0.03, "macro_auroc_fall": 0.005}, settings)
    for fall, reason in ((0.0051, "max_auroc_fall"), (None, "labels")):
        with pytest.raises(ConfigError, match=reason):
            quantization._check_drift({"p99_drift": 0.03, "macro_auroc_fall": fall}, settings)


def test_findings_without_labels_have_no_auroc() -> None:
    p = np.float32([[0.2, 0.2, 0.2], [0.8, 0.8, 0.8]])
    fake = SimpleNamespace(predict=lambda images: runtime.Outputs(p, p))
    findings = ("Mass", "Edema", "No_Finding")
    labels = np.full((2, len(LABELS)), -1)
    assert quantization._measure_drift(fake, fake, p, labels, findings)["macro_auroc_fall"] is None
    for name in ("Mass", "No_Finding"):
        labels[:, LABELS.index(name)] = 0, 1
    assert quantization._measure_drift(fake, fake, p, labels, findings)["auroc_fall"] == {"Mass": 0.0}


def test_patients_that_trained_the_bundle_do_not_check_it(bundle, made, quick, images: Path, tmp_path: Path) -> None:
    """The 36 validation patients are numbers 41 to 76."""
    mine = derive_bundle(made[0], tmp_path / "mine", split=lineage([41, 42, 43]))  # its int8 is replaced
    events: list[str] = []
    fewer = SETTINGS.model_copy(update={"images": 32, "check_images": 32})
    new = quantization.quantize(mine.path, images, tmp_path / "b", fewer, on_event=events.append)
    source = new.info["provenance"]["quantized"]
    assert (source["from"], source["range_images"], source["check_images"]) == (mine.digest, 32, 32)
    assert "check on 32 validation images; 3 others" in events[0]
    mine = derive_bundle(bundle, tmp_path / "more", split=lineage([41, 42, 43, 44, 45]))
    with pytest.raises(ConfigError, match="40 images of split train and 31 of split val"):
        quantization.quantize(mine.path, images, tmp_path / "b2", SETTINGS, on_event=str)
    assert not (tmp_path / "b2").exists()


def test_unsuitable_set_or_bundle_is_refused(bundle, images: Path, tmp_path: Path) -> None:
    old = writable_copy(bundle, tmp_path / "old")
    remove_graph(old)
    for model, data, error, reason in (
        (bundle.path, prepare(tmp_path / "larger", size=96), ConfigError, "larger: .* size 64, only 96"),
        (bundle.path, prepare(tmp_path / "padded", aspect="pad"), ConfigError, "padded: .*'pad'.* takes .*'stretch'"),
        (old, images, BundleError, f"{old}: has no OpenVINO graph"),
    ):
        with pytest.raises(error, match=reason):
            quantization.quantize(model, data, tmp_path / "b", SETTINGS, on_event=str)
    assert not (tmp_path / "b").exists()


def test_golden_images_guard_int8_too(made, tmp_path: Path) -> None:
    copy = writable_copy(made[0], tmp_path / "b")
    with np.load(copy / runtime.GOLDEN_INT8) as arrays:
        np.savez(copy / runtime.GOLDEN_INT8, int8=1 - arrays["int8"])
    reseal(copy)
    with pytest.raises(BundleError, match=r"in int8 .*golden images are off by"):
        ray_cxr.load_bundle(copy).predict(drawn(0, 1), precision="int8")


COMMANDS = """
import logging, sys
from ray_cxr import environment
environment.configure_command()
from ray_cxr.cli import main
theirs, images, out = sys.argv[1:]
assert main(["import-weights", theirs, "--backbone", "TinyCNN", "--findings", "14", "--size", "64", "--out", out]) == 0
print("-----", flush=True)
assert main(["quantize", out, images, "--out", out + "8", "--set", "max_auroc_fall=0.9"]) == 0
assert "nncf" in sys.modules and "pytest" not in sys.modules
assert not [name for name, module in sys.modules.items() if module and name.startswith("openvino_telemetry")]
assert logging.getLoggerClass() is logging.Logger
"""


def test_commands_report_nothing_and_print_only_our_lines(images: Path, tmp_path: Path) -> None:
    """Both libraries are silent under pytest and in CI jobs, so this needs a child process."""
    theirs = classifier.build(Architecture(backbone="TinyCNN", size=SIZE, findings=ray_cxr.FINDINGS))
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    (tmp_path / "home").mkdir()
    given = ("-c", COMMANDS, tmp_path / "theirs.weights.h5", images, tmp_path / "b")
    changes = {"HOME": str(tmp_path / "home"), "TF_CPP_MIN_LOG_LEVEL": "3", "CI": None, "PYTEST_CURRENT_TEST": None}
    done = run_python(*given, **changes)
    lines = done.stdout.split("-----\n")[1].splitlines()
    assert [line.split(" ")[0] for line in lines] == ["int8:", "int8", "bundle:", "next:"], lines
    assert not (tmp_path / "home" / "intel").exists(), "the client's id would be kept there"
    # Only the stages.
    assert all(line.endswith("…") for line in done.stderr.splitlines()), done.stderr
    assert ray_cxr.load_bundle(tmp_path / "b8").info["runtimes"]["int8"]["accepted"] is True
