"""`benchmark`: what it measures, counts and refuses; no test depends on how fast anything is."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_cxr.imaging.phantoms import BREAKAGES, PhantomSet
from ray_cxr.models.bundle import Bundle
from ray_cxr.scoring.benchmark import DIFFERENT, Benchmark, ImageSource, Measurement

Command = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("auto", marks=pytest.mark.long)])
def test_parts_are_measured_in_each_precision(
    precision: str,
    tiny_bundle: Bundle,
    phantoms: PhantomSet,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    out, images = tmp_path / "speed.json", [phantoms.images / name for name in os.listdir(phantoms.images)]
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(images)[-20:]:  # the last patients have unusable files
        (folder / path.name).symlink_to(path)
    code, text, _ = command(
        "benchmark", tiny_bundle.path, "--images", folder, "--seconds", 0.2, "--count", 7200, "--json", out,
        "--set", "ray.num_cpus=1", "--set", "batch_size=2", "--precision", precision,
    )  # fmt: skip
    assert code == 0
    assert "WARNING: the load average" in text
    found = json.loads(out.read_text(encoding="utf-8"))
    measured = [row["precision"] for row in found["measurements"] if row["part"] == "both"]
    assert "fp32" in measured
    assert sorted([*measured, *found["refused"]]) == (["bf16", "fp32", "int8"] if precision == "auto" else ["fp32"])
    parts = [(row["part"], row["precision"]) for row in found["measurements"]]
    assert parts == [("decode", None), *((part, name) for name in measured for part in ("model", "both"))]
    unusable = sum(found["images"]["failures"].values())
    assert found["images"]["images"] == 20 - unusable < 20
    assert unusable <= len(BREAKAGES)
    assert (found["cpus"], found["actors"], found["cpus_per_actor"], found["batch_size"]) == (1, 1, 1, 2)
    assert found["model"]["digest"] == tiny_bundle.digest
    for row in found["measurements"]:
        spread = row["images_per_second"]
        assert len(spread["rounds"]) >= 3
        assert 0 < min(spread["rounds"]) == spread["lowest"] <= spread["median"] <= spread["highest"]
        assert row["hours"] == pytest.approx(2 / spread["median"])
        assert row["images"] >= 3
        assert row["cpu_ms_per_image"] >= 0  # in steps of 10 ms
        assert row["memory_bytes"] > 0
    assert sorted(os.listdir(tmp_path)) == ["images", "speed.json"]


@pytest.mark.long
def test_images_that_cannot_be_read_are_refused_in_one_line(
    tiny_bundle: Bundle, tmp_path: Path, command: Command
) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    options = "--precision", "fp32", "--set", "ray.num_cpus=1"
    code, out, err = command("benchmark", tiny_bundle.path, "--images", tmp_path, *options)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].endswith(f"{tmp_path}: none of 2 images could be read (empty 2)")


def test_wrong_input_is_refused_in_one_line(tiny_bundle: Bundle, tmp_path: Path, command: Command) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    with tarfile.open(tmp_path / "packed" / "images.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    bundle = str(tiny_bundle.path)
    for arguments, part in [
        ((str(tmp_path),), "bundle"),
        ((bundle, "--precision", "int8"), "quantize"),
        ((bundle, "--images", str(tmp_path / "empty")), "empty"),
        ((bundle, "--images", str(tmp_path / "none")), "none"),
        ((bundle, "--images", str(tmp_path / "packed")), "archives"),
        ((bundle, "--images", "dicomweb+https://host/root?PatientID=1"), "PACS"),
        ((bundle, "--count", "0"), "--count"),
        ((bundle, "--seconds", "-1"), "--seconds"),
        ((bundle, "--seconds", "inf"), "--seconds"),
        ((bundle, "--json", str(tmp_path)), "--json"),
        ((bundle, "--set", "ray.address=10.0.0.1:6379"), "ray.address"),
        ((bundle, "--set", "jit_compile=true"), "jit_compile"),
        ((bundle, "--json", str(tmp_path / "none" / "speed.json")), "--json"),
        ((bundle, "--set", "cpus_per_actor=5000"), "cpus_per_actor"),
        ((bundle, "--set", "decode=apart"), "decode"),
    ]:
        code, out, err = command("benchmark", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), arguments
        assert part in err
        assert "PatientID" not in err


def make_result(decode: float, model: float, *, use_gpu: bool) -> Benchmark:
    """Return a result in which decoding and the model take these seconds per image of one core."""
    parts = {("decode", None): decode, ("model", "fp32"): model, ("both", "fp32"): decode + model}
    measurements: list[Any] = [
        Measurement(part, precision, images=10, cpu_s=10 * seconds, rates=[1 / seconds])
        for (part, precision), seconds in parts.items()
    ]
    device = {"cpu": "", "cores": 4, "memory_bytes": 1, "gpu": None, "gpus": 0, "system": ""}
    source = ImageSource("", DIFFERENT, None, {})
    return Benchmark(device, {}, source, 4.0, 4, use_gpu, 1, 4, 4, {}, measurements, {})


@pytest.mark.parametrize("use_gpu", [False, True])
def test_limit_is_the_part_with_most_of_the_work(use_gpu: bool) -> None:
    for decode, model, limit in [(0.010, 0.030, "model"), (0.030, 0.010, "decode"), (0.020, 0.021, None)]:
        result = make_result(decode, model, use_gpu=use_gpu)
        assert result.find_limit("fp32") == limit
        assert result.fastest == "fp32"
        assert result.describe_load() is None
