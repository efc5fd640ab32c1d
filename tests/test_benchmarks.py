"""The benchmarks run, compare and compute what they should; no test depends on how fast anything is."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from orthanc import is_installed

from ray_cxr.imaging.phantoms import PhantomSet
from ray_cxr.models.bundle import Bundle

ROOT = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="it finds its processes in /proc")


def run_script(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a script, which imports its neighbours."""
    program = [sys.executable, f"benchmarks/{script}", *options]
    return subprocess.run(program, cwd=ROOT, capture_output=True, encoding="utf-8")


def run_benchmark(script: str, out: Path, options: str) -> tuple[dict[str, Any], str]:
    """Run a benchmark and return its results and its output."""
    done = run_script(script, *options.split(), "--out", str(out))
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


@pytest.mark.long
@pytest.mark.ray
def test_training_is_compared_with_fit_and_two_workers_with_one(tmp_path: Path) -> None:
    options = "--backbone TinyCNN --size 32 --batch 8 --steps 2 --rounds 2 --only ours fit two"
    result = run_benchmark("training.py", tmp_path / "speed.json", options)[0]["backbones"]["TinyCNN"]
    assert list(result["contestants"]) == ["ours", "fit", "two"]
    for contestant in result["contestants"].values():
        first, second = contestant["images_per_second"]
        assert min(first, second) > 0
    assert result["contestants"]["fit"]["jit_compile"] is False
    assert [(bar["contestant"], bar["rival"]) for bar in result["bars"]] == [("ours", "fit"), ("two", "ours")]


@pytest.mark.long
@pytest.mark.ray
def test_uploads_in_the_background_are_compared_with_waiting_for_them(tmp_path: Path) -> None:
    options = "--backbone TinyCNN --size 32 --batch 8 --every 2 --checkpoints 2 --rounds 1 --speed 0.1"
    result, _ = run_benchmark("uploads.py", tmp_path / "uploads.json", options)
    seconds = {block["name"]: sum(block["checkpoints"]) for block in result["blocks"]}
    assert seconds["none"] < seconds["async"] < seconds["sync"]
    assert set(result["ratios"]) == {"async/none", "sync/none", "async/sync"}


@pytest.mark.long
def test_options_are_compared_on_the_same_images_and_no_training_is_repeated(tmp_path: Path) -> None:
    options = ["--option", "default", "balance", "--seeds", "2", "--train", "24", "--test", "60", "--epochs", "1"]
    results = tmp_path / "results.jsonl"
    for seeds in (["--seeds", "1"], []):
        done = run_script("recipe.py", "--work", str(tmp_path), *options, *seeds)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [(row["seed"], row["option"]) for row in rows] == [
        (seed, option) for seed in (0, 1) for option in ("default", "balance")
    ]
    positives = [[one["positives"] for one in row["epochs"][-1][-1]["findings"].values()] for row in rows]
    assert positives[0] == positives[1] != positives[2] == positives[3]
    assert '| `balance = "findings"` | 2 |' in done.stdout


def test_the_differences_of_options_are_paired_by_seed(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    recipe = importlib.import_module("recipe")
    aurocs = {"default": (0.6, 0.7, 0.8), "bce": (0.61, 0.72, 0.83)}
    findings = {name: {"auroc": None if name == "Hernia" else 0.5} for name in recipe.FINDINGS}
    rows = [
        {
            "task": "options",
            "option": option,
            "seed": seed,
            "seconds": 1.0,
            "images": [10, 20],
            "epochs": [[{"macro_auroc": value, "findings": findings}]],
        }
        for option, values in aurocs.items()
        for seed, value in enumerate(values)
    ]
    recipe.show(rows)
    # The standard error of 0.01, 0.02 and 0.03 is 0.01 / sqrt(3).
    assert "| 3 | 0.720 ± 0.110 | +0.020 ± 0.006 | 0.500 ± 0.000 | +0.000 ± 0.000 |" in capsys.readouterr().out


@pytest.mark.slow
@LINUX
def test_scoring_is_compared_with_a_bare_program_and_pytorch_may_be_missing(
    tmp_path: Path, tiny_bundle: Bundle, phantoms: PhantomSet
) -> None:
    work, shared = tmp_path / "work", tmp_path / "shared"
    shutil.copytree(tiny_bundle.path, work / "bundle-TinyCNN-64")
    images = shared / "nih" / "images1024"
    images.mkdir(parents=True)
    for path in sorted(phantoms.images.glob("*.png"))[:6]:
        shutil.copy(path, images)
    options = "--backbone TinyCNN --size 64 --images 20 --rounds 1 --only bound-fp32 inline-fp32 torch-fp32"
    options += f" --work {work} --shared {shared}"
    results, printed = run_benchmark("scoring.py", tmp_path / "speed.json", options)
    assert "(b) is left out" in printed
    result = results["speed"]
    assert list(result["contestants"]) == ["bound-fp32", "inline-fp32"]
    for contestant in result["contestants"].values():
        (measured,) = contestant["rounds"]
        assert measured["images"] == measured["marks"][-1][1] == 20
    assert max(result["agreement"].values()) < 1e-4


@pytest.mark.long
def test_gpu_table_has_a_row_per_batch_size_and_a_gpu_is_required(tmp_path: Path, monkeypatch) -> None:
    result = run_benchmark("gpu.py", tmp_path / "gpu.json", "--cpu --jit")[0]["gpu"]
    assert [row["batch"] for row in result["rows"]] == [2, 4]
    for row in result["rows"]:
        for part in (row["alone"], row["decoding"]):
            assert part["images_per_second"] > 0
            assert 0 <= part["wait"] <= 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    done = run_script("gpu.py")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_gpu_script_keeps_the_other_rows_after_a_failed_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CPU stands for the GPU. It is out of memory at 4 images: in float32 with decoding, in bfloat16 at once."""
    import tensorflow as tf

    from ray_cxr.models import runtime

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = importlib.import_module("gpu")
    scale = gpu.Scale("TinyCNN", 64, ("fp32", "bf16"), (4, 2), 0, 64, 1, 0.02)
    opened: list[Any] = []
    readers: list[int] = []

    class Decoding:
        """Images in memory."""

        rate, images = 500.0, np.zeros((3, 64, 64), np.uint8)

        def __init__(self, *_: Any) -> None:
            pass

        def read(self, count: int) -> Iterator[np.ndarray]:
            readers.append(count)
            return itertools.islice(itertools.cycle(self.images), count)

    class Runtime(runtime.KerasRuntime):
        def __init__(self, model: Any, batch_size: int, *, jit_compile: bool = False) -> None:
            super().__init__(model, batch_size, jit_compile=jit_compile)
            opened.append(self)
            start, is_half = self._start, model.dtype_policy.compute_dtype == "bfloat16"

            def run(images: Any) -> Any:
                if batch_size == 4 and (is_half or readers):
                    raise tf.errors.ResourceExhaustedError(None, None, "OOM")
                return start(images)

            self._start = run

    monkeypatch.setattr(gpu, "choose_scale", lambda _: scale)
    monkeypatch.setattr(gpu, "Decoding", Decoding)
    monkeypatch.setattr(runtime, "KerasRuntime", Runtime)
    policies = {"fp32": "float32", "bf16": "mixed_bfloat16"}
    monkeypatch.setattr(runtime, "prepare_gpu", policies.__getitem__)
    monkeypatch.setattr(runtime, "describe_gpu", lambda: runtime.GpuInfo("Test GPU", 1, 0))
    result: dict[str, Any] = {"machine": {"cpu": "Test CPU"}}
    before = keras.config.dtype_policy()
    try:
        gpu.measure(argparse.Namespace(cpu=False, jit=False), result)
    finally:
        keras.config.set_dtype_policy(before)
    found = result["gpu"]
    measured = [(row["precision"], row["batch"]) for row in found["rows"]]
    assert measured == [("fp32", 2), ("bf16", 2)]
    for text, precision in zip(found["skipped"], ("fp32", "bf16"), strict=True):
        assert re.search(f"{precision} in batches of 4 .*out of memory", text)
    assert len(opened) == 4
    for model in opened:
        with pytest.raises(RuntimeError):  # closed
            model.submit(Decoding.images[:1])
    printed = capsys.readouterr().out
    for part in ("Test GPU", "precision", "batch", "alone", "decoding", "GPU waits", "start", "not measured: "):
        assert part in printed
    monkeypatch.setattr(runtime, "prepare_gpu", lambda _: "float32")
    monkeypatch.setattr(gpu, "LIMIT_S", -1.0)
    gpu.measure(argparse.Namespace(cpu=False, jit=False), result)
    assert result["gpu"]["rows"] == []
    assert len(result["gpu"]["skipped"]) == 3  # no time for two batch sizes; no bfloat16


@pytest.mark.slow
def test_intervals_agree_with_a_loop_of_scikit_learn(tmp_path: Path) -> None:
    options = "--images 400 --patients 60 --findings 2 --resamples 20 --rival-resamples 2 --rounds 2"
    result = run_benchmark("evaluation.py", tmp_path / "speed.json", options)[0]["bootstrap"]
    assert {name: len(seconds) for name, seconds in result["seconds"].items()} == {"ours": 2, "sklearn": 2, "areas": 2}
    assert result["largest_difference"] < 1e-9


@pytest.mark.long
@pytest.mark.ray
@LINUX
def test_scoring_from_a_pacs_is_compared_with_the_same_files_on_disk(tmp_path: Path) -> None:
    if not is_installed():
        pytest.skip("Orthanc is not installed; run scripts/services pacs as root")
    options = f"--backbone TinyCNN --size 64 --images 32 --loop-images 32 --rounds 1 --work {tmp_path / 'work'}"
    result, _ = run_benchmark("pacs.py", tmp_path / "speed.json", options)
    assert {name: [one["images"] for one in rounds] for name, rounds in result["contestants"].items()} == {
        "pacs": [32],
        "disk": [32],
        "loop": [32],
    }
    assert result["difference"] < 1e-4
    assert [(one["contestant"], one["rival"]) for one in result["ratios"]] == [("pacs", "disk"), ("pacs", "loop")]


def test_interval_of_a_median_lies_between_two_of_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 10 values, the median is outside the second and the ninth with a probability of 22 / 1024, on both sides."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    find_median_interval = importlib.import_module("harness").find_median_interval
    assert find_median_interval([3, 1, 2, 9, 5, 4, 7, 6, 10, 8]) == (2, 9)
    assert find_median_interval([1, 2, 3, 4, 5, 6]) == (1, 6)
    assert find_median_interval([1, 2, 3, 4, 5]) is None


def test_a_prediction_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 images, 2 nodes of 5 cores at 10 images per second, files of 100 rows."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scaling = importlib.import_module("scaling")
    costs = {"start_s": 7, "plan_row_s": 0.001, "count_file_s": 0.1, "driver_range_s": 0.01, "ready_s": 60}
    sizes = {"driver_bytes": 1000, "driver_row_bytes": 2, "driver_range_bytes": 30, "image_bytes": 1000}
    nodes = {"rate": 10, "cores": 5, "rows_per_file": 100, "cpus_per_actor": 4, "price": 36.0, "head_price": 3.6}
    figures = scaling.Figures(**costs, **sizes, **nodes)
    found = scaling.predict(10_000, 2, figures)
    parts = {"ready": 60, "start": 7, "plan": 10, "work": 100, "last files": 5, "count": 10}
    assert found.parts == pytest.approx(parts)
    assert (found.limit, found.seconds) == ("workers", pytest.approx(192))
    assert found.node_hours == pytest.approx(2 * 192 / 3600)
    assert found.cost == pytest.approx(192 * 2 * 0.01 + 192 * 0.001)
    assert found.needed == pytest.approx(100_000)
    assert found.driver_bytes == 1000 + 20_000 + 3000
    # Storage of 50 kB/s is half as fast as the workers, and a driver that needs 3 s per file a third.
    for change, limit, seconds in (({"storage": 50_000}, "storage", 200), ({"driver_range_s": 3}, "driver", 300)):
        slow = scaling.predict(10_000, 2, dataclasses.replace(figures, **change))
        assert (slow.limit, slow.parts["work"]) == (limit, pytest.approx(seconds))


def test_probabilities_are_compared_after_a_single_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library comes last, and the other runs of the same bundle have other probabilities."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    models = importlib.import_module("models")

    def score(work: Path, bundle: str, *more: str) -> float:
        (folder := work / f"scores-{bundle}" / "scores").mkdir(parents=True, exist_ok=True)
        row = {"image_id": ["a.png"], "p_Mass": [0.5 if more else 0.9]}
        pq.write_table(pa.table(row), folder / "part-00000.parquet")
        return 1.0

    answer = {"wall_s": 1.0, "probabilities": [[0.4, 0.7]]}
    monkeypatch.setattr(models, "prepare", lambda _: ["/images/a.png"])
    monkeypatch.setattr(models, "score", score)
    monkeypatch.setattr(models, "ask_child", lambda *_, **__: answer)
    result: dict[str, Any] = {}
    given = argparse.Namespace(work=tmp_path, only=None, rounds=1, torch="python")
    models.measure(given, result)
    assert result["difference"] == pytest.approx({"median": 0.1, "largest": 0.1})


def test_the_page_has_the_tables_of_the_script() -> None:
    page = " ".join((ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").split())
    printed = run_script("scaling.py")
    lines = [line for line in printed.stdout.splitlines() if line]
    assert len(lines) > 10
    assert [line for line in lines if line not in page] == []


@pytest.mark.long
@pytest.mark.ray
@LINUX
def test_the_run_with_a_stub_model_scores_every_row_once(tmp_path: Path) -> None:
    options = f"--rows 700 --set rows_per_file=64 --work {tmp_path / 'work'}"
    found = run_benchmark("scaling.py", tmp_path / "run.json", options)[0]["run"]
    counts = {"doubled": 0, "missing": 0, "unknown": 0, "errors": 0}
    assert found["checks"] == {"rows": 700, "files": 11, "success": True, **counts}
    assert 0 < found["driver_peak_bytes"] < found["all_peak_bytes"]
