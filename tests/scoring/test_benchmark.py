"""`benchmark`: what it measures, counts and refuses; no test depends on how fast anything is."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from ray_cxr import environment
from ray_cxr.imaging.phantoms import BREAKAGES, PhantomSet
from ray_cxr.models.bundle import Bundle
from ray_cxr.scoring import benchmark
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
        assert row["hours"] == (pytest.approx(2 / spread["median"]) if row["part"] == "both" else None)
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


def test_wrong_input_is_refused_in_one_line(
    tiny_bundle: Bundle, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").write_bytes(b"")
    with tarfile.open(tmp_path / "packed" / "images.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    bundle = str(tiny_bundle.path)
    monkeypatch.setattr(environment, "count_gpus", lambda: 0)
    for arguments, part in [
        ((bundle, "--gpu"), "--gpu: this machine has no GPU"),
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


def test_a_gpu_that_tensorflow_does_not_see_is_refused_before_phantoms_are_drawn(
    tiny_bundle: Bundle, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "count_gpus", lambda: 1)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    monkeypatch.setattr("ray_cxr.imaging.phantoms.write_phantoms", None)
    code, out, err = command("benchmark", tiny_bundle.path, "--gpu")
    assert (code, out) == (2, "")
    assert "requirements-gpu.lock" in err.splitlines()[-1]


def make_result(decode: float, model: float, *, use_gpu: bool) -> Benchmark:
    """Return a result in which decoding and the model take these seconds per image of one core."""
    parts = {("decode", None): decode, ("model", "fp32"): model, ("both", "fp32"): decode + model}
    measurements: list[Any] = [
        Measurement(part, precision, images=10, cpu_s=10 * seconds, rates=[1 / seconds])
        for (part, precision), seconds in parts.items()
    ]
    device = {"cpu": "", "cores": 4, "memory_bytes": 1, "gpu": None, "gpus": 0, "system": ""}
    source = ImageSource("", DIFFERENT, None, {})
    return Benchmark(device, {}, source, 4.0, 4, use_gpu, 1, 4, 4, {}, {}, measurements, {})


@pytest.mark.parametrize("use_gpu", [False, True])
def test_limit_is_the_part_with_most_of_the_work(use_gpu: bool) -> None:
    for decode, model, limit in [(0.010, 0.030, "model"), (0.030, 0.010, "decode"), (0.020, 0.021, None)]:
        result = make_result(decode, model, use_gpu=use_gpu)
        assert result.find_limit("fp32") == limit
        assert result.fastest == (None if limit == "decode" else "fp32")
        assert result.describe_load() is None


def add_precision(result: Benchmark, precision: str, model_s: float, rates: list[float]) -> Benchmark:
    """Return the result with another precision, whose rounds of `both` had these rates."""
    more: list[Any] = [
        Measurement("model", precision, images=10, cpu_s=10 * model_s, rates=[1 / model_s]),
        Measurement("both", precision, images=10, cpu_s=1.0, rates=rates),
    ]
    return replace(result, measurements=[*result.measurements, *more])


def test_fastest_precision_is_judged_by_both_and_named_only_if_it_is_clear() -> None:
    slow = make_result(0.010, 0.090, use_gpu=False)  # `both` does 10 images/s
    assert add_precision(slow, "bf16", 0.030, [19, 20, 25]).fastest == "bf16"
    assert add_precision(slow, "bf16", 0.030, [10, 20, 25]).fastest is None, "a round was not faster"
    # The model alone is faster in int8; what `score` does is not.
    assert add_precision(slow, "int8", 0.030, [5, 6, 7]).fastest == "fp32"
    assert add_precision(slow, "int8", 0.002, [19, 20, 25]).fastest is None, "decoding limits int8"


@pytest.mark.parametrize(
    ("lower", "bf16", "fp32"),
    [
        ({"bf16": "--precision bf16", "int8": "int8"}, "use int8, a smaller", "bf16, int8, a smaller"),
        ({"bf16": "--precision bf16"}, "use a smaller model", "use --precision bf16, a smaller"),
        ({}, "use a smaller model", "use a smaller model"),
    ],
)  # fmt: skip
def test_remedy_names_the_lower_precisions_of_the_bundle(lower: dict[str, str], bf16: str, fp32: str) -> None:
    result = replace(add_precision(make_result(0.01, 0.09, use_gpu=False), "bf16", 0.09, [10]), lower=lower)
    lines = result.list_findings()
    assert fp32 in next(line for line in lines if line.startswith("fp32"))
    assert bf16 in next(line for line in lines if line.startswith("bf16"))


@pytest.mark.parametrize(
    ("int8", "expected"),
    [(None, "ray-cxr quantize"), ({"accepted": True}, "--precision int8"), ({"accepted": False}, None)],
)
def test_int8_is_reached_by_quantize_unless_the_bundle_refused_it(
    int8: dict[str, Any] | None, expected: str | None, tiny_bundle: Bundle
) -> None:
    info = {**tiny_bundle.info, "runtimes": {**tiny_bundle.info["runtimes"], **({"int8": int8} if int8 else {})}}
    found = benchmark._list_lower(replace(tiny_bundle, info=info)).get("int8")
    assert found is None if expected is None else expected in str(found)
    assert "int8" not in benchmark._list_lower(replace(tiny_bundle, info={**info, "runtimes": {}}))
