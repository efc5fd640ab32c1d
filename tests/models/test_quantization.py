"""`quantize`: int8 beside a bundle's own precision, or one line that says why not, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pyarrow as pa
import pytest
from test_exports import SIZE, drawn, write

import ray_cxr
from ray_cxr.config import PrepareSettings, QuantizeSettings
from ray_cxr.data import atomic, manifest, prepared
from ray_cxr.errors import BundleError, ConfigError, OutputError
from ray_cxr.labels import LABELS
from ray_cxr.models import bundle as bundles
from ray_cxr.models import classifier, exports, quantization, runtime
from ray_cxr.models.architecture import Architecture

COUNTS = {"train": 40, "val": 36, "test": 4}


def prepare(out: Path, *, size: int = SIZE, labelled: bool = True, **settings: object) -> Path:
    """A prepared set of drawn radiographs, a patient each, without Ray: its one shard is written by hand."""
    splits = [split for split, count in COUNTS.items() for _ in range(count)]
    n = len(splits)
    columns = {
        "image_id": [f"{i:08d}_000.png" for i in range(1, n + 1)],
        "path": [f"/nowhere/{i}.png" for i in range(1, n + 1)],
        "patient_id": [str(i) for i in range(1, n + 1)],
        "split": splits,
        **{name: [int((i + j) % 3 == 0) if labelled else None for i in range(n)] for j, name in enumerate(LABELS)},
    }
    table = pa.table(
        [pa.array(columns.get(field.name, [None] * n), field.type) for field in manifest.SCHEMA], schema=manifest.SCHEMA
    )
    path = out.with_name(f"{out.name}.parquet")
    manifest.write_manifest(table, path)
    table, wanted = prepared.check(path, out, PrepareSettings(sizes=(size,), **settings))  # type: ignore[arg-type]
    prepared.begin(out, wanted)
    shutil.move(path, out / "manifest.parquet")
    pictures = drawn(0, n) if size == SIZE else np.zeros((n, size, size), np.uint8)
    arrays = [table[name].combine_chunks() for name in manifest.SCHEMA.names]
    arrays.append(pa.array([picture.tobytes() for picture in pictures], pa.binary(size * size)))
    arrays += [pa.nulls(n, pa.string()), pa.nulls(n, pa.string())]
    (out / str(size)).mkdir()
    shard = pa.Table.from_arrays(arrays, schema=prepared.shard_schema(size))
    atomic.write_arrow(shard, out / str(size) / prepared.shard_name(0))
    atomic.write_json(out / str(size) / "counts.json", {"ok": n})
    return out


def lineage(train: list[int]) -> pa.Table:
    """What trained a bundle: patients of the set by number."""
    return pa.table(
        {
            "image_id": [f"other_{i}.png" for i in train],
            "patient_id": [str(i) for i in train],
            "split": ["train"] * len(train),
        },
        schema=bundles.SPLIT_SCHEMA,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("prepared") / "set")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> bundles.Bundle:
    """Of random weights, whose outputs are pulled apart: so close to one half int8 would move nothing."""
    architecture = Architecture(backbone="TinyCNN", size=SIZE, findings=ray_cxr.FINDINGS[:2])
    keras.utils.set_random_seed(4)
    model = classifier.build(architecture)
    kernel, bias = model.get_layer("logits").get_weights()
    model.get_layer("logits").set_weights([kernel * 5, bias])
    pictures = drawn(100, 190)
    return write(
        tmp_path_factory.mktemp("bundle") / "b",
        save_weights=lambda path: model.save_weights(str(path)),
        ordinary=exports.Ordinary(pictures[:60], pictures[60:]),
        split=lineage([1, 2, 3]),
    )


@pytest.fixture(scope="module")
def made(bundle, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bundles.Bundle, list[str]]:
    """The bundle with int8, and what was said."""
    said: list[str] = []
    out = tmp_path_factory.mktemp("int8") / "b"
    return quantization.quantize(bundle.path, images, out, QuantizeSettings(), on_event=said.append), said


def test_int8_stands_beside_the_rest(bundle, made) -> None:
    new, said = made
    int8 = {"golden-int8.npz", "openvino-int8.bin", "openvino-int8.xml"}
    assert new.files - bundle.files == int8
    for name in bundle.files - {"bundle.json", "MODEL_CARD.md"}:
        assert (new.path / name).read_bytes() == (bundle.path / name).read_bytes(), name
    for name in ("calibration", "operating_points", "expected_flag_rates", "quality", "findings", "input_spec"):
        assert new.info[name] == bundle.info[name]
    assert {name: new.info["runtimes"][name] for name in ("fp32", "bf16")} == bundle.info["runtimes"]
    row, source = new.info["runtimes"]["int8"], new.info["provenance"]["quantized"]
    assert (source["from"], source["range_images"], source["check_images"]) == (bundle.digest, 40, 36)
    assert 0 < row["p99_drift"] <= row["largest_drift"]
    assert (row["p99_drift"], row["tolerance"], row["accepted"]) == (source["p99_drift"], 0.03, True)
    assert set(source["auroc_fall"]) == set(bundle.findings)
    assert source["macro_auroc_fall"] == pytest.approx(np.mean(list(source["auroc_fall"].values())))
    assert said[0] == "int8: ranges from 40 training images, checked on 36 of validation"
    assert said[1].startswith("int8 against float32: probabilities move by")
    assert "- int8, on 36 validation images against fp32:" in (new.path / "MODEL_CARD.md").read_text()
    assert "int8" not in bundle.info["runtimes"], "the old bundle's entries are its own"


def test_the_drift_is_what_predict_shows(made, images: Path) -> None:
    new, _ = made
    pixels = prepared.PreparedSet(images, SIZE).load("val").images[:]
    names = [f"p_{name}" for name in new.findings]
    int8, fp32 = (new.predict(pixels, precision=one)[names].to_numpy() for one in ("int8", "fp32"))
    moved = np.abs(int8 - fp32)
    assert moved.max() == pytest.approx(new.info["runtimes"]["int8"]["largest_drift"], abs=1e-6)
    assert moved.max() > 1e-4
    alone = new.predict(pixels[5:6], precision="int8")[names].to_numpy()
    np.testing.assert_array_equal(alone[0], int8[5])


def test_the_weights_are_in_eight_bits(made) -> None:
    new, _ = made
    graph = (new.path / "openvino-int8.xml").read_text()
    assert "FakeQuantize" in graph
    assert 'element_type="i8"' in graph
    small, whole = ((new.path / name).stat().st_size for name in ("openvino-int8.bin", "openvino.bin"))
    assert small < 0.4 * whole


def test_done_again_it_does_nothing(bundle, made, images: Path) -> None:
    new, _ = made
    said: list[str] = []
    again = quantization.quantize(bundle.path, images, new.path, QuantizeSettings(), on_event=said.append)
    assert again.digest == new.digest
    assert said == [f"{new.path}: is done already, from the same bundle, images and settings"]


def test_all_of_it_may_lie_in_a_bucket(
    bucket, bundle, made, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_CXR_CACHE", str(tmp_path / "cache"))
    bucket.upload(bundle.path, "int8/old")
    bucket.upload(images, "int8/set")
    given = (bucket("int8/old"), bucket("int8/set"), bucket("int8/new"), QuantizeSettings())
    quantization.quantize(*given)
    assert {key.removeprefix("int8/new/") for key in bucket.keys("int8/new/")} == made[0].files | {"SHA256SUMS"}
    assert bucket.get("int8/new/openvino-int8.bin") == (made[0].path / "openvino-int8.bin").read_bytes()
    said: list[str] = []
    quantization.quantize(*given, on_event=said.append)
    assert said == [f"{given[2]}: is done already, from the same bundle, images and settings"]


def test_int8_can_be_made_anew_of_a_bundle_that_has_it(made, images: Path, tmp_path: Path) -> None:
    new, _ = made
    more = quantization.quantize(new.path, images, tmp_path / "b", QuantizeSettings(images=32), on_event=str)
    assert more.info["provenance"]["quantized"]["from"] == new.digest
    assert more.info["provenance"]["quantized"]["range_images"] == 32


def test_another_out_is_refused(bundle, made, images: Path, tmp_path: Path) -> None:
    new, _ = made
    (tmp_path / "folder").mkdir()
    for out, settings in (
        (tmp_path / "folder", QuantizeSettings()),
        (bundle.path, QuantizeSettings()),
        (new.path, QuantizeSettings(seed=1)),
    ):
        before = sorted(out.iterdir())
        with pytest.raises(OutputError, match=r"exists already .*name another --out"):
            quantization.quantize(bundle.path, images, out, settings, on_event=str)
        assert sorted(out.iterdir()) == before


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"max_p99_drift": 1e-6}, "max_p99_drift allows 1e-06"), ({"max_auroc_fall": 1e-9}, "max_auroc_fall allows")],
)
def test_drift_past_its_limit_leaves_nothing_behind(
    bundle, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, reason: str
) -> None:
    if "max_auroc_fall" in settings:
        measure = quantization._measure
        monkeypatch.setattr(quantization, "_measure", lambda *given: measure(*given) | {"macro_auroc_fall": 0.006})
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    out = tmp_path / "new" / "b"
    with pytest.raises(ConfigError, match=f"{reason}.*no bundle was written"):
        quantization.quantize(bundle.path, images, out, QuantizeSettings(**settings), on_event=str)
    assert not out.parent.exists()
    assert list(temporary.iterdir()) == []


def test_patients_that_trained_the_bundle_do_not_check_it(bundle, images: Path, tmp_path: Path) -> None:
    """36 validation patients, numbers 41 to 76; four of them trained the network before."""
    mine = write(
        tmp_path / "mine",
        save_weights=lambda path: shutil.copyfile(bundle.path / bundles.WEIGHTS, path),
        like=bundle,
        split=lineage([41, 42, 43, 44]),
    )
    said: list[str] = []
    new = quantization.quantize(mine.path, images, tmp_path / "b", QuantizeSettings(), on_event=said.append)
    assert new.info["provenance"]["quantized"]["check_images"] == 32
    assert said[0].endswith("checked on 32 of validation; 4 others are of patients that trained the network")
    mine = write(
        tmp_path / "more",
        save_weights=lambda path: shutil.copyfile(bundle.path / bundles.WEIGHTS, path),
        like=bundle,
        split=lineage([41, 42, 43, 44, 45]),
    )
    with pytest.raises(ConfigError, match="40 images of split train, and 31 of split val whose patients trained noth"):
        quantization.quantize(mine.path, images, tmp_path / "b2", QuantizeSettings(), on_event=str)
    assert not (tmp_path / "b2").exists()


def test_a_set_without_labels_cannot_check_the_auroc(bundle, tmp_path: Path) -> None:
    unlabelled = prepare(tmp_path / "set", labelled=False)
    with pytest.raises(ConfigError, match="AUROC cannot be; no bundle was written"):
        quantization.quantize(bundle.path, unlabelled, tmp_path / "b", QuantizeSettings(), on_event=str)
    assert not (tmp_path / "b").exists()


def test_a_set_of_another_size_or_kind_is_refused(bundle, tmp_path: Path) -> None:
    larger = prepare(tmp_path / "larger", size=96)
    with pytest.raises(ConfigError, match="has no complete size 64, only 96"):
        quantization.quantize(bundle.path, larger, tmp_path / "b", QuantizeSettings(), on_event=str)
    padded = prepare(tmp_path / "padded", aspect="pad")
    with pytest.raises(ConfigError, match=r"was prepared with .*aspect='pad'.*, the bundle takes .*aspect='stretch'"):
        quantization.quantize(bundle.path, padded, tmp_path / "b", QuantizeSettings(), on_event=str)
    assert not (tmp_path / "b").exists()


def test_a_bundle_without_a_graph_is_refused(bundle, images: Path, tmp_path: Path) -> None:
    def add(part: Path, info: dict) -> None:
        del info["runtimes"]
        for name in ("openvino.xml", "openvino.bin"):
            (part / name).unlink()

    old = write(tmp_path / "old", add=add)
    with pytest.raises(BundleError, match="has no OpenVINO graph to make int8 of"):
        quantization.quantize(old.path, images, tmp_path / "b", QuantizeSettings(), on_event=str)


def test_golden_images_guard_int8_too(made, images: Path, tmp_path: Path) -> None:
    new, _ = made

    def add(part: Path, info: dict) -> None:
        with np.load(part / runtime.GOLDEN_INT8) as arrays:
            np.savez(part / runtime.GOLDEN_INT8, int8=1 - arrays["int8"])

    broken = write(
        tmp_path / "b",
        save_weights=lambda path: shutil.copyfile(new.path / bundles.WEIGHTS, path),
        like=new,
        add=add,
        provenance=new.info["provenance"],
    )
    with pytest.raises(BundleError, match=r"in int8 on this machine .*golden images are off by"):
        broken.predict(drawn(0, 1), precision="int8")


COMMANDS = """
import logging, sys
{before}
from ray_cxr.cli import main
theirs, images, out = sys.argv[1:]
assert main(["import-weights", theirs, "--backbone", "TinyCNN", "--findings", "14", "--size", "64", "--out", out]) == 0
print("-----", flush=True)
assert main(["quantize", out, images, "--out", out + "8", "--set", "max_auroc_fall=0.9"]) == 0
there = [name for name, module in sys.modules.items() if name.startswith("openvino_telemetry") and module is not None]
assert "nncf" in sys.modules and "pytest" not in sys.modules
assert logging.getLoggerClass() is logging.Logger
{after}
"""
#: As if other code in the process had imported OpenVINO first, telemetry and all, where there is a network.
IMPORTED_BEFORE = """
import openvino_telemetry.backend.backend_ga4 as backend
sent = []
backend.GA4Backend.send = lambda self, message: sent.append(message)
import openvino, time
time.sleep(1)
assert len(sent), "importing it does report"
sent.clear()
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["we", "somebody"])
def test_nothing_is_reported_and_nothing_is_printed_but_our_lines(first: str, images: Path, tmp_path: Path) -> None:
    """Both libraries keep silent under pytest and in CI jobs by themselves: only another process tells."""
    classifier.build(Architecture(backbone="TinyCNN", size=SIZE, findings=ray_cxr.FINDINGS)).save_weights(
        tmp_path / "theirs.weights.h5"
    )
    before, after = ("", "assert there == [], there")
    if first == "somebody":
        before, after = IMPORTED_BEFORE, "time.sleep(1); assert there and sent == [], sent"
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            *("-c", COMMANDS.format(before=before, after=after)),
            *(tmp_path / "theirs.weights.h5", images, tmp_path / "b"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_CURRENT_TEST")}
        | {"HOME": str(tmp_path / "home"), "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("-----\n")[1].splitlines()
    assert [line.split(" ")[0] for line in said] == ["int8:", "int8", "bundle:"], said
    if first == "we":
        assert not (tmp_path / "home" / "intel").exists(), "where a client's id would be kept"
    assert done.stderr.replace(_OF_TENSORFLOW, "") == "", done.stderr
    assert json.loads((tmp_path / "b8" / "bundle.json").read_text())["runtimes"]["int8"]["accepted"] is True


_OF_TENSORFLOW = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
