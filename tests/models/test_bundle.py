"""Bundles: what is written is what is read, and nothing else is."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ray_cxr
from ray_cxr.data import imaging
from ray_cxr.errors import BundleError, ConfigError, OutputError
from ray_cxr.models import bundle as bundles
from ray_cxr.models import predictions

#: What `exports` adds to a bundle that was made without images.
EXPORTED = ("golden.npz", "openvino.bin", "openvino.xml")


@pytest.fixture
def copy(tiny_bundle, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(tiny_bundle.path, target)
    for file in target.iterdir():
        file.chmod(0o644)
    return target


def reseal(path: Path) -> None:
    """Write the sums again, as somebody would who changed a bundle on purpose."""
    lines = [
        f"{hashlib.sha256((path / name).read_bytes()).hexdigest()}  {name}\n"
        for name in sorted(file.name for file in path.iterdir() if file.name != bundles.SUMS)
    ]
    (path / bundles.SUMS).write_text("".join(lines))


def edit(path: Path, **changes: object) -> None:
    info = json.loads((path / "bundle.json").read_text())
    (path / "bundle.json").write_text(json.dumps({**info, **changes}))
    reseal(path)


def test_round_trip_keeps_digest_findings_and_spec(tiny_bundle, copy: Path) -> None:
    again = ray_cxr.load_bundle(copy)
    assert again.digest == tiny_bundle.digest
    assert again.findings == ray_cxr.FINDINGS
    assert again.input_spec.size == 64
    assert again.files == {*bundles.FILES, *EXPORTED}
    assert {file.name for file in copy.iterdir()} == {*again.files, bundles.SUMS}


@pytest.mark.parametrize("name", [*bundles.FILES, *EXPORTED])
def test_a_changed_byte_is_noticed(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=r"not as it was written|cannot be read as JSON"):
        ray_cxr.load_bundle(copy)


@pytest.mark.parametrize("name", [*bundles.FILES, *EXPORTED, bundles.SUMS])
def test_a_missing_file_is_noticed(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}"):
        ray_cxr.load_bundle(copy)


def test_an_added_file_is_noticed(copy: Path) -> None:
    (copy / "extra.py").write_text("raise SystemExit(1)")
    with pytest.raises(BundleError, match=r"extra\.py"):
        ray_cxr.load_bundle(copy)


def test_a_newer_format_says_so(copy: Path) -> None:
    edit(copy, format=bundles.FORMAT + 1)
    with pytest.raises(BundleError, match="newer ray-cxr"):
        ray_cxr.load_bundle(copy)


@pytest.mark.parametrize(
    "findings",
    [["Effusion"], list(reversed(ray_cxr.FINDINGS)), ["Fracture", *ray_cxr.FINDINGS[1:]]],
    ids=["fewer", "reordered", "unknown"],
)
def test_findings_that_do_not_agree_are_refused_even_when_resealed(copy: Path, findings: list[str]) -> None:
    edit(copy, findings=findings)
    with pytest.raises(BundleError, match="findings do not agree"):
        ray_cxr.load_bundle(copy)


def test_weights_of_another_architecture_are_refused(copy: Path) -> None:
    info = json.loads((copy / "bundle.json").read_text())
    edit(copy, architecture={**info["architecture"], "dense": [7]})
    with pytest.raises(BundleError, match="do not fit"):
        ray_cxr.load_bundle(copy).model()


def test_a_damaged_calibration_is_refused_on_loading(copy: Path) -> None:
    info = json.loads((copy / "bundle.json").read_text())
    broken = {**info["calibration"], "Effusion": {"method": "platt", "slope": -1.0, "intercept": 0.0}}
    edit(copy, calibration=broken)
    with pytest.raises(BundleError, match="calibration"):
        ray_cxr.load_bundle(copy)


def test_a_temperature_is_read_and_applied(copy: Path) -> None:
    info = json.loads((copy / "bundle.json").read_text())
    cool = {"method": "temperature", "slope": 0.5, "intercept": 0.0}
    edit(copy, calibration={**info["calibration"], "Effusion": cool})
    frame = ray_cxr.load_bundle(copy).predict(np.random.default_rng(0).integers(0, 256, (1, 64, 64), dtype=np.uint8))
    p = frame["p_Effusion"].to_numpy(dtype=float)
    # Half the logit is the square root of the odds.
    odds = np.sqrt(p / (1 - p))
    np.testing.assert_allclose(frame["c_Effusion"].to_numpy(dtype=float), odds / (1 + odds), rtol=1e-5)
    edit(copy, calibration={**info["calibration"], "Effusion": {**cool, "intercept": 0.1}})
    with pytest.raises(BundleError, match="calibration"):
        ray_cxr.load_bundle(copy)


POINT = {"threshold": 0.25, "sensitivity": 0.9, "specificity": 0.4}


def again(source: ray_cxr.Bundle, out: Path, **more: object) -> ray_cxr.Bundle:
    """The tiny bundle written once more, with additions."""
    info = source.info
    return bundles.write_bundle(
        out,
        save_weights=lambda path: shutil.copyfile(source.path / bundles.WEIGHTS, path),
        architecture=source.architecture,
        input_spec=source.input_spec,
        calibration=info["calibration"],
        operating_points=info["operating_points"],
        expected_flag_rates=info["expected_flag_rates"],
        provenance=info["provenance"],
        config_toml="",
        curves=[],
        split=pq.read_table(source.path / "split.parquet"),
        **more,  # type: ignore[arg-type]
    )


def test_alternatives_and_notes_are_kept_and_stand_in_the_card(tiny_bundle, tmp_path: Path) -> None:
    first, second, *rest = tiny_bundle.findings
    points = {first: {"specificity=0.9": None}, second: {"specificity=0.9": POINT}}
    points |= {name: {"specificity=0.9": None} for name in rest}
    notes = dict.fromkeys(tiny_bundle.findings) | {first: "3 positives, needs 5"}
    bundle = again(tiny_bundle, tmp_path / "b", operating_alternatives=points, rule_notes=notes)
    assert bundle.info["operating_alternatives"] == points
    assert bundle.info["rule_notes"] == notes
    assert bundle.model_json()["rule_notes"] == notes
    card = (bundle.path / "MODEL_CARD.md").read_text().splitlines()
    table = card.index("| finding | specificity=0.9 |")
    assert card[table + 2 : table + 4] == [f"| {second} | 0.2500 (0.900, 0.400) |", ""]
    assert f"- {first}: 3 positives, needs 5." in card
    # No reason was given for these; they are named all the same.
    info = bundle.info
    uncalibrated = [name for name in rest if info["operating_points"][name] and not info["calibration"][name]]
    assert len(uncalibrated) > 1
    assert f"- {', '.join(uncalibrated)}: no calibration: not fitted." in card


def test_bundles_without_alternatives_and_notes_are_read(tiny_bundle) -> None:
    assert not {"operating_alternatives", "rule_notes"} & set(tiny_bundle.info)
    assert "other rules" not in (tiny_bundle.path / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("operating_alternatives", []),
        ("operating_alternatives", {"Effusion": {}}),
        ("operating_alternatives", dict.fromkeys(ray_cxr.FINDINGS)),
        ("operating_alternatives", {name: {"youden": {"threshold": 2.0}} for name in ray_cxr.FINDINGS}),
        ("operating_alternatives", {name: {"youden": 0.5} for name in ray_cxr.FINDINGS}),
        ("rule_notes", "none"),
        ("rule_notes", {"Effusion": None}),
        ("rule_notes", dict.fromkeys(ray_cxr.FINDINGS, 3)),
    ],
)
def test_damaged_alternatives_and_notes_are_refused_on_loading(copy: Path, key: str, value: object) -> None:
    edit(copy, **{key: value})
    with pytest.raises(BundleError, match="damaged"):
        ray_cxr.load_bundle(copy)


FP32 = {"largest_drift": 0.0, "tolerance": 0.001, "accepted": True}
BF16 = {"largest_drift": None, "tolerance": 0.02, "accepted": None}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"runtimes": None}, "runtimes is not an object"),
        ({"runtimes": []}, "runtimes is not an object"),
        ({"runtimes": {"fp32": FP32}}, "runtimes are for fp32"),
        ({"runtimes": {"fp32": FP32, "bf16": BF16, "fp8": FP32}}, "fp8"),
        ({"runtimes": {"fp32": "quick", "bf16": BF16}}, "fp32 is not an object"),
        ({"runtimes": {"fp32": {**FP32, "accepted": "yes"}, "bf16": BF16}}, "accepted of fp32"),
        ({"runtimes": {"fp32": {**FP32, "accepted": 1}, "bf16": BF16}}, "accepted of fp32"),
        ({"runtimes": {"fp32": FP32, "bf16": {**BF16, "accepted": False}}}, "not a number"),
        ({"runtimes": {"fp32": {**FP32, "largest_drift": float("nan")}, "bf16": BF16}}, "not a number"),
        ({"runtimes": {"fp32": {**FP32, "tolerance": "0.1"}, "bf16": BF16}}, "not a number"),
        ({"runtimes": {"fp32": FP32, "bf16": {"accepted": None}}}, "largest_drift"),
        ({"runtimes": {"fp32": FP32, "bf16": BF16, "int8": FP32}}, r"does not list golden-int8\.npz; .*openvino-int8"),
        ({"quality": {}}, "expected_rates"),
        ({"quality": "none"}, "quality is not an object"),
        ({"quality": {"lacking": None}}, "lacking is not a text"),
        ({"quality": {"expected_rates": {"lateral": "few"}}}, "not a number"),
        (
            {"quality": {"expected_rates": {}, "train_images": 60, "held_out_images": 30}},
            r"does not list quality\.npz",
        ),
    ],
)
def test_damaged_runtimes_and_quality_are_refused_on_loading(copy: Path, changes: dict, reason: str) -> None:
    edit(copy, **changes)
    with pytest.raises(BundleError, match=f"runtimes or quality are damaged: .*{reason}") as refused:
        ray_cxr.load_bundle(copy)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", EXPORTED)
def test_runtimes_without_their_files_are_refused_even_when_resealed(copy: Path, name: str) -> None:
    (copy / name).unlink()
    reseal(copy)
    with pytest.raises(BundleError, match=rf"SHA256SUMS does not list {name}"):
        ray_cxr.load_bundle(copy)


def test_files_that_nothing_is_said_of_are_refused(copy: Path) -> None:
    (copy / "quality.npz").write_bytes(b"")
    reseal(copy)
    with pytest.raises(BundleError, match=r"nothing is said of quality\.npz"):
        ray_cxr.load_bundle(copy)
    (copy / "quality.npz").unlink()
    info = json.loads((copy / "bundle.json").read_text())
    del info["runtimes"]
    (copy / "bundle.json").write_text(json.dumps(info))
    reseal(copy)
    with pytest.raises(BundleError, match=r"nothing is said of openvino\.bin"):
        ray_cxr.load_bundle(copy)


def aged(path: Path) -> ray_cxr.Bundle:
    """A bundle as it was before it had runtimes, golden images and quality flags."""
    for name in EXPORTED:
        (path / name).unlink()
    info = json.loads((path / "bundle.json").read_text())
    del info["runtimes"], info["quality"]
    (path / "bundle.json").write_text(json.dumps(info))
    reseal(path)
    return ray_cxr.load_bundle(path)


def test_an_older_bundle_is_read_and_run_by_keras(tiny_bundle, copy: Path) -> None:
    old = aged(copy)
    images = np.random.default_rng(3).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    columns = [f"p_{name}" for name in old.findings]
    now, before = tiny_bundle.predict(images, precision="fp32"), old.predict(images)
    np.testing.assert_allclose(now[columns].to_numpy(), before[columns].to_numpy(), rtol=0, atol=1e-5)
    assert before["quality_flag"].isna().all()
    for precision in ("bf16", "int8"):
        with pytest.raises(ConfigError, match=f"--precision {precision}"):
            old.predict(images, precision=precision)


def test_a_bundle_goes_to_another_process_after_predict(tiny_bundle) -> None:
    images = np.random.default_rng(3).integers(0, 256, (1, 64, 64), dtype=np.uint8)
    frame = tiny_bundle.predict(images)
    there = pickle.loads(pickle.dumps(tiny_bundle))
    assert there == tiny_bundle
    pd.testing.assert_frame_equal(there.predict(images), frame)


@pytest.mark.parametrize("threshold", ["abc", 7.0, 0.0, None])
def test_a_damaged_operating_point_is_refused_on_loading(copy: Path, threshold: object) -> None:
    info = json.loads((copy / "bundle.json").read_text())
    edit(copy, operating_points={**info["operating_points"], "Effusion": {"threshold": threshold}})
    with pytest.raises(BundleError, match="operating points"):
        ray_cxr.load_bundle(copy)


def test_sums_cannot_name_files_outside(copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("x")
    with open(copy / bundles.SUMS, "a") as stream:
        stream.write(f"{hashlib.sha256(b'x').hexdigest()}  ../outside\n")
    with pytest.raises(BundleError, match="damaged"):
        ray_cxr.load_bundle(copy)


def test_a_link_in_place_of_a_file_is_refused(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "config.toml", tmp_path / "config.toml")
    (copy / "config.toml").symlink_to(tmp_path / "config.toml")
    with pytest.raises(BundleError, match=r"config\.toml"):
        ray_cxr.load_bundle(copy)


def test_not_a_bundle(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(BundleError, match="name a bundle"):
            ray_cxr.load_bundle(path)


def test_a_bundle_is_never_overwritten(tiny_bundle) -> None:
    from conftest import make_tiny_bundle

    with pytest.raises(OutputError, match="never changed"):
        make_tiny_bundle(tiny_bundle.path)


def test_predict_gives_the_score_columns_in_order_and_errors_as_rows(tiny_bundle, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good = rng.integers(0, 256, (100, 80), dtype=np.uint8)
    Image.fromarray(good).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no picture")
    frame = tiny_bundle.predict([tmp_path / "good.png", str(tmp_path / "text.png"), good, tmp_path / "none.png"])
    assert list(frame.columns) == predictions.schema(tiny_bundle.findings).names
    assert frame["status"].tolist() == ["ok", "error", "ok", "error"]
    assert frame["error_code"].tolist()[1::2] == ["not_an_image", "missing"]
    assert frame["image_id"].tolist() == ["good.png", "text.png", "array_2", "none.png"]
    p = [f"p_{name}" for name in tiny_bundle.findings]
    # A path and the array that is in it are the same picture, so the same numbers, bit for bit.
    assert frame.loc[0, p].tolist() == frame.loc[2, p].tolist()
    assert frame.loc[1, [*p, "priority", "top_finding", "model_digest"]].isna().all()


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_predict_does_not_depend_on_the_company(tiny_bundle, precision: str) -> None:
    images = np.random.default_rng(1).integers(0, 256, (5, 64, 64), dtype=np.uint8)
    together = tiny_bundle.predict(images, batch_size=4, precision=precision)
    alone = pd.concat([tiny_bundle.predict(images[i : i + 1], batch_size=4, precision=precision) for i in range(5)])
    columns = [f"p_{name}" for name in tiny_bundle.findings]
    np.testing.assert_array_equal(together[columns].to_numpy(), alone[columns].to_numpy())


def test_predict_is_the_network_on_what_imaging_gives(tiny_bundle) -> None:
    image = np.random.default_rng(2).integers(0, 256, (300, 200), dtype=np.uint8)
    fed = imaging.resize(image, tiny_bundle.input_spec)[None, ..., None]
    expected = np.asarray(tiny_bundle.model()(fed))[0]
    frame = tiny_bundle.predict([image], precision="fp32")
    np.testing.assert_allclose(
        frame[[f"p_{name}" for name in tiny_bundle.findings]].to_numpy()[0], expected, rtol=0, atol=1e-6
    )


def test_loading_and_predicting_need_no_ray(tiny_bundle) -> None:
    code = (
        "import sys, numpy as np, ray_cxr\n"
        f"b = ray_cxr.load_bundle({str(tiny_bundle.path)!r})\n"
        "assert 'tensorflow' not in sys.modules\n"
        "f = b.predict(np.zeros((1, 64, 64), 'uint8') + np.arange(64, dtype='uint8'))\n"
        "assert f['status'].tolist() == ['ok'], f\n"
        "assert 'ray' not in sys.modules\n"
        # Keras takes seconds to start, and is not needed where the bundle brings its graph.
        "assert 'tensorflow' not in sys.modules\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
