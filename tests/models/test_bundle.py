"""Bundles are read back as written, and damaged ones are refused."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_dicom import file_of
from test_run_folder import ODD_NAME

import ray_cxr
from ray_cxr.data import identity
from ray_cxr.errors import BundleError, ConfigError, OutputError
from ray_cxr.evaluation.calibration import Calibration
from ray_cxr.imaging import sandbox
from ray_cxr.imaging.resize import resize
from ray_cxr.imaging.sandbox import _Child as Child
from ray_cxr.models import bundle as bundles
from ray_cxr.models import predictions
from ray_cxr.models.card import model_card

#: Files that `exports` adds to a bundle that was made without images.
EXPORTED = ("golden.npz", "openvino.bin", "openvino.xml")
P = [f"p_{name}" for name in ray_cxr.FINDINGS]


def writable_copy(bundle: ray_cxr.Bundle, target: Path) -> Path:
    shutil.copytree(bundle.path, target)
    for file in target.iterdir():
        file.chmod(0o644)
    return target


@pytest.fixture
def copy(tiny_bundle, tmp_path: Path) -> Path:
    return writable_copy(tiny_bundle, tmp_path / "copy")


def reseal(path: Path) -> None:
    """Rewrite the checksums, as an attacker would after changing a bundle."""
    names = sorted(file.name for file in path.iterdir() if file.name != bundles.SUMS)
    lines = [f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (path / bundles.SUMS).write_text("".join(lines), encoding="utf-8")


def edit(path: Path, *remove: str, **changes: object) -> None:
    """Change entries of bundle.json and reseal."""
    info = json.loads((path / "bundle.json").read_text(encoding="utf-8")) | changes
    for name in remove:
        del info[name]
    (path / "bundle.json").write_text(json.dumps(info), encoding="utf-8")
    reseal(path)


def remove_graph(path: Path, *entries: str) -> None:
    """Remove the OpenVINO graph and more entries of bundle.json, as in bundles of older versions."""
    for name in ("openvino.xml", "openvino.bin"):
        (path / name).unlink()
    edit(path, "runtimes", *entries)


def run_python(*arguments: object, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """Run Python in a child process that must succeed, in this environment with some changes."""
    environment = {name: value for name, value in (os.environ | changes).items() if value is not None}
    given = [sys.executable, *map(str, arguments)]
    done = subprocess.run(given, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, 64, 64), dtype=np.uint8)


def test_bundle_is_read_as_written_and_never_overwritten(tiny_bundle, copy: Path) -> None:
    from conftest import make_tiny_bundle

    again = ray_cxr.load_bundle(copy)
    assert (again.digest, again.findings, again.input_spec.size) == (tiny_bundle.digest, ray_cxr.FINDINGS, 64)
    assert again.files == {*bundles.FILES, bundles.WEIGHTS, *EXPORTED}
    assert {file.name for file in copy.iterdir()} == {*again.files, bundles.SUMS}
    with pytest.raises(OutputError, match=str(copy)):
        make_tiny_bundle(copy)


def test_files_of_operating_systems_are_no_part_of_a_bundle(tiny_bundle, copy: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._bundle.json", ".gitattributes", ".gitignore", ".lock"):
        (copy / name).write_bytes(b"x")
    (copy / "@eaDir").mkdir()
    (copy / ".git").mkdir()
    assert ray_cxr.load_bundle(copy).digest == tiny_bundle.digest
    for name in ("notes.db", ".notes", ".bundle.json.swp"):
        (copy / name).touch()
        with pytest.raises(BundleError, match=rf": contains {re.escape(name)}, which is not part of the bundle"):
            ray_cxr.load_bundle(copy)
        (copy / name).unlink()


@pytest.mark.parametrize("name", ["MODEL_CARD.md", "config.toml", "curves.json", "bundle.json", bundles.SUMS])
def test_a_bundle_that_git_changed_says_so(copy: Path, name: str) -> None:
    (copy / name).write_bytes((copy / name).read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(BundleError) as caught:
        ray_cxr.load_bundle(copy)
    assert str(caught.value).startswith(f"{copy}: {name} was changed (its lines end with CR LF, as git writes them ")
    assert "`* -text`" in str(caught.value)


def test_a_pointer_of_git_lfs_is_named(copy: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (copy / bundles.WEIGHTS).write_text(pointer, encoding="utf-8")
    with pytest.raises(BundleError, match=r"model\.weights\.h5 was changed \(it is a pointer of Git LFS\); run `"):
        ray_cxr.load_bundle(copy)


def test_a_bundle_works_in_a_folder_of_any_name(tiny_bundle, copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / ODD_NAME / "split=1"
    shutil.copytree(copy, folder)
    moved = ray_cxr.load_bundle(folder)
    assert moved.digest == tiny_bundle.digest
    assert moved.predict(pixels(1)).equals(tiny_bundle.predict(pixels(1)))
    weights, expected = moved.model().get_weights(), tiny_bundle.model().get_weights()
    assert all(np.array_equal(*pair) for pair in zip(weights, expected, strict=True))
    assert identity.read_split(folder)["split"].to_pylist() == ["train"]
    assert identity.read_split(folder, bundles.SPLIT_SCHEMA).column_names == ["image_id", "patient_id", "split"]


@pytest.mark.parametrize("name", [*bundles.FILES, bundles.WEIGHTS, *EXPORTED])
def test_changed_or_missing_file_is_refused(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} (was changed|is not a readable JSON object)"):
        ray_cxr.load_bundle(copy)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name):
        ray_cxr.load_bundle(copy)


def test_missing_checksums_and_foreign_files_are_refused(copy: Path, tmp_path: Path) -> None:
    def refused(reason: str, path: Path = copy) -> None:
        with pytest.raises(BundleError, match=reason):
            ray_cxr.load_bundle(path)

    (copy / "extra.py").write_text("raise SystemExit(1)", encoding="utf-8")
    refused(r"extra\.py")
    reseal(copy)
    refused(r"extra\.py")
    (copy / "extra.py").unlink()
    reseal(copy)
    shutil.move(copy / "config.toml", tmp_path / "config.toml")
    (copy / "config.toml").symlink_to(tmp_path / "config.toml")
    refused(r"config\.toml")
    (copy / bundles.SUMS).unlink()
    refused(f"no {bundles.SUMS}")
    for path in (tmp_path / "nowhere", tmp_path):
        refused(f"{path}: .*pass a bundle", path)


NONE = dict.fromkeys(ray_cxr.FINDINGS)
FP32 = {"largest_drift": 0.0, "tolerance": 0.001, "accepted": True}
BF16 = {"largest_drift": None, "tolerance": 0.02, "accepted": None}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": bundles.FORMAT + 1}, "format 2.*newer ray-cxr"),
        ({"findings": ["Effusion"]}, "findings do not agree"),
        ({"findings": ["Fracture", *ray_cxr.FINDINGS[1:]]}, "findings do not agree"),
        ({"calibration": NONE | {"Effusion": {"method": "platt", "slope": -1.0, "intercept": 0.0}}}, "a slope > 0"),
        (
            {"calibration": NONE | {"Effusion": {"method": "temperature", "slope": 1, "intercept": 1}}},
            "the intercept 0",
        ),
        ({"calibration": {"Effusion": None}}, "calibration must have exactly one entry"),
        ({"operating_points": NONE | {"Effusion": {"threshold": 1.0}}}, r"operating_points\.Effusion\.threshold"),
        ({"operating_points": NONE | {"Effusion": {"threshold": 0.0}}}, r"operating_points\.Effusion\.threshold"),
        ({"operating_alternatives": []}, "operating_alternatives: "),
        ({"operating_alternatives": NONE}, r"operating_alternatives\.Hernia: "),
        (
            {"operating_alternatives": {name: {"youden": {"threshold": 2.0}} for name in NONE}},
            r"Hernia\.youden\.thresh",
        ),
        ({"rule_notes": dict.fromkeys(NONE, 3)}, r"rule_notes\.Hernia: "),
        ({"runtimes": None}, "runtimes: "),
        ({"runtimes": {"fp32": FP32}}, r"runtimes\.bf16: Field required"),
        ({"runtimes": {"fp32": FP32, "bf16": BF16, "fp8": FP32}}, r"unknown key 'runtimes\.fp8'"),
        ({"runtimes": {"fp32": "quick", "bf16": BF16}}, r"runtimes\.fp32: "),
        ({"runtimes": {"fp32": {**FP32, "accepted": 1}, "bf16": BF16}}, r"runtimes\.fp32\.accepted: "),
        ({"runtimes": {"fp32": FP32, "bf16": {**BF16, "accepted": False}}}, r"runtimes\.bf16: accepted is not null"),
        ({"runtimes": {"fp32": {**FP32, "largest_drift": float("nan")}, "bf16": BF16}}, r"fp32\.largest_drift: "),
        ({"runtimes": {"fp32": FP32, "bf16": BF16, "int8": None}}, r"runtimes\.int8: "),
        ({"runtimes": {"fp32": FP32, "bf16": BF16, "int8": FP32}}, r"golden-int8\.npz; .*openvino-int8"),
        ({"quality": "none"}, r"quality\."),
        ({"quality": {"lacking": None}}, r"quality\.\w+\.lacking: "),
        ({"quality": {"expected_rates": {"lateral": "few"}}}, r"quality\.\w+\.expected_rates\.lateral: "),
        ({"quality": {"expected_rates": {}, "train_images": 60, "held_out_images": 30}}, r"quality\.npz"),
    ],
)
def test_damaged_entries_are_refused_even_when_resealed(copy: Path, changes: dict, reason: str) -> None:
    edit(copy, **changes)
    with pytest.raises(BundleError, match=f"{copy}: .*{reason}") as refused:
        ray_cxr.load_bundle(copy)
    assert "\n" not in str(refused.value)


def test_entries_and_files_must_agree_even_when_resealed(copy: Path) -> None:
    (copy / "quality.npz").write_bytes(b"")
    reseal(copy)
    with pytest.raises(BundleError, match=r"nothing refers to quality\.npz"):
        ray_cxr.load_bundle(copy)
    (copy / "quality.npz").unlink()
    for name in EXPORTED:
        data = (copy / name).read_bytes()
        (copy / name).unlink()
        reseal(copy)
        with pytest.raises(BundleError, match=f"SHA256SUMS does not list {name}"):
            ray_cxr.load_bundle(copy)
        (copy / name).write_bytes(data)
    edit(copy, "runtimes")
    with pytest.raises(BundleError, match=r"nothing refers to openvino\.bin"):
        ray_cxr.load_bundle(copy)


@pytest.mark.slow
def test_weights_of_another_architecture_are_refused(tiny_bundle, copy: Path) -> None:
    edit(copy, architecture={**tiny_bundle.info["architecture"], "dense": [7]})
    with pytest.raises(BundleError, match="do not fit"):
        ray_cxr.load_bundle(copy).model()


def test_alternatives_and_notes_are_kept_and_shown_in_the_card(tiny_bundle, copy: Path) -> None:
    info, (first, second, *rest) = tiny_bundle.info, tiny_bundle.findings
    assert not {"operating_alternatives", "rule_notes"} & set(info)
    assert "other rules" not in model_card(info, [])
    point = {"threshold": 0.25, "sensitivity": 0.9, "specificity": 0.4}
    cool = {"method": "temperature", "slope": 0.5, "intercept": 0.0}
    added = {
        "operating_alternatives": {name: {"specificity=0.9": point if name == second else None} for name in NONE},
        "rule_notes": NONE | {first: "3 positives, needs 5"},
        "calibration": {**info["calibration"], "Effusion": cool},
    }
    edit(copy, **added)
    bundle = ray_cxr.load_bundle(copy)
    assert {name: bundle.model_json()[name] for name in added} == added
    assert bundle.rules.calibrations["Effusion"] == Calibration.from_dict(cool)
    card = model_card(bundle.info, []).splitlines()
    table = card.index("| finding | specificity=0.9 |")
    assert card[table + 2 : table + 4] == [f"| {second} | 0.2500 (0.900, 0.400) |", ""]
    assert f"- {first}: 3 positives, needs 5." in card
    # Findings without a note are listed too.
    uncalibrated = [name for name in rest if info["operating_points"][name] and not bundle.info["calibration"][name]]
    assert f"- {', '.join(uncalibrated)}: no calibration: not fitted." in card


@pytest.mark.slow
def test_older_bundle_runs_in_keras(tiny_bundle, copy: Path) -> None:
    """An older bundle has no graph, golden images or quality flags."""
    (copy / "golden.npz").unlink()
    remove_graph(copy, "quality")
    old = ray_cxr.load_bundle(copy)
    now, before = tiny_bundle.predict(pixels(3), precision="fp32"), old.predict(pixels(3))
    np.testing.assert_allclose(now[P].to_numpy(), before[P].to_numpy(), rtol=0, atol=1e-5)
    assert before["quality_flag"].isna().all()
    with pytest.raises(ConfigError, match="--precision bf16"):
        old.predict(pixels(3), precision="bf16")


@pytest.mark.slow
def test_predict_equals_keras_in_order_with_errors_as_rows(tiny_bundle, tmp_path: Path) -> None:
    good = np.random.default_rng(0).integers(0, 256, (100, 80), dtype=np.uint8)
    Image.fromarray(good).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no image", encoding="utf-8")
    images = [tmp_path / "good.png", str(tmp_path / "text.png"), pixels(1)[0], tmp_path / "none.png"]
    copy = pickle.loads(pickle.dumps(tiny_bundle))
    assert copy == tiny_bundle
    frame = copy.predict(images, precision="fp32")
    assert list(frame.columns) == predictions.schema(tiny_bundle.findings).names
    assert frame["status"].tolist() == ["ok", "error", "ok", "error"]
    assert frame["error_code"].tolist()[1::2] == ["not_an_image", "missing"]
    assert frame["image_id"].tolist() == ["good.png", "text.png", "array_2", "none.png"]
    inputs = np.stack([resize(image, tiny_bundle.input_spec) for image in (good, images[2])])
    expected = np.asarray(tiny_bundle.model()(inputs[..., None]))
    np.testing.assert_allclose(frame.loc[[0, 2], P].to_numpy(dtype=float), expected, rtol=0, atol=1e-5)
    assert frame.loc[1, [*P, "priority", "top_finding", "model_digest"]].isna().all()


def test_predict_sets_flags_of_dicom_headers(tiny_bundle, tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(file_of(pixels(1)[0], BurnedInAnnotation="YES"))
    frame = tiny_bundle.predict([pixels(1)[0], tmp_path / "a.dcm"])
    assert frame["quality_flag"].fillna("none").tolist() == ["none", "burned_in_annotation"]


#: A decoder that aborts its process for some files, as native code can. Python imports this module at startup.
ABORT = """
import os
from ray_cxr.imaging import decode as decoding

decode = decoding.decode_with_flags
decoding.decode_with_flags = lambda data, **limits: os.abort() if data == b"ABORT" else decode(data, **limits)
"""
#: `predict` in a script without an `if __name__ == "__main__"`, and in a daemon process.
SCRIPT = """
import multiprocessing, sys, ray_cxr

def run(bundle, images):
    frame = ray_cxr.load_bundle(bundle).predict(images)
    print(frame["status"].tolist(), frame["error_code"].tolist(), flush=True)

process = multiprocessing.get_context("fork").Process(target=run, args=(sys.argv[1], sys.argv[2:]), daemon=True)
process.start()
process.join()
run(sys.argv[1], sys.argv[2:])
"""


@pytest.mark.slow
def test_predict_survives_a_decoder_that_aborts(tiny_bundle, tmp_path: Path) -> None:
    Image.fromarray(pixels(1)[0]).save(tmp_path / "good.png")
    (tmp_path / "bad.dcm").write_bytes(b"ABORT")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(ABORT, encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    images = [tmp_path / name for name in ("good.png", "bad.dcm", "good.png")]
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, sys.path)])
    done = run_python(tmp_path / "script.py", tiny_bundle.path, *images, PYTHONPATH=path)
    expected = "['ok', 'error', 'ok'] [None, 'decoder_crash', None]\n"
    assert done.stdout.replace("nan", "None") == 2 * expected, done.stderr


@pytest.mark.slow
def test_predict_keeps_one_decoder_and_starts_none_for_arrays(tiny_bundle, tmp_path: Path, monkeypatch) -> None:
    started: list[sandbox._Child] = []
    monkeypatch.setattr(sandbox, "_Child", lambda settings: started.append(Child(settings)) or started[-1])
    bundle = ray_cxr.load_bundle(tiny_bundle.path)
    Image.fromarray(pixels(1)[0]).save(tmp_path / "good.png")
    files = [tmp_path / "good.png"] * 3
    assert bundle.predict(pixels(2))["status"].tolist() == ["ok"] * 2
    assert started == []
    for _ in range(2):
        assert bundle.predict(files)["status"].tolist() == ["ok"] * 3
    assert [child.process.poll() is None for child in started] == [True]
    with ThreadPoolExecutor(4) as pool:
        frames = list(pool.map(bundle.predict, [files] * 8))
    assert all(frame.equals(frames[0]) for frame in frames)
    assert sum(child.process.poll() is None for child in started) == 1
    started[0].kill()
    with pytest.raises(ValueError, match="uint8"):
        bundle.predict([files[0], np.zeros((4, 4))])
    assert bundle.predict(files)["status"].tolist() == ["ok"] * 3
    del bundle
    gc.collect()
    assert [child.process.poll() is None for child in started] == [False] * len(started)


@pytest.mark.slow
def test_predict_imports_neither_ray_nor_tensorflow(tiny_bundle) -> None:
    """Keras takes seconds to import, and the bundle's graph does not need it."""
    code = (
        "import sys, numpy as np, ray_cxr\n"
        f"frame = ray_cxr.load_bundle({str(tiny_bundle.path)!r}).predict(np.zeros((1, 64, 64), 'uint8'))\n"
        "assert frame['status'].tolist() == ['ok'], frame\n"
        "assert not {'ray', 'tensorflow'} & set(sys.modules)\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
    )
    run_python("-c", code)
