"""The benchmarks run and compare what they should; no test depends on how fast anything is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_cxr.data.phantoms import PhantomSet
from ray_cxr.models.bundle import Bundle

ROOT = Path(__file__).parents[1]


def run_benchmark(script: str, out: Path, *arguments: object) -> tuple[dict[str, Any], str]:
    """Run a benchmark and return its results and its output."""
    program = [sys.executable, f"benchmarks/{script}", *map(str, arguments), "--out", str(out)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


@pytest.mark.long
@pytest.mark.ray
def test_training_is_compared_with_fit_and_two_workers_with_one(tmp_path: Path) -> None:
    options = "--backbone TinyCNN --size 32 --batch 8 --steps 2 --rounds 2 --only ours fit two"
    results, _ = run_benchmark("training.py", tmp_path / "speed.json", *options.split())
    result = results["backbones"]["TinyCNN"]
    assert list(result["contestants"]) == ["ours", "fit", "two"]
    for name, contestant in result["contestants"].items():
        assert len(contestant["images_per_second"]) == 2
        assert all(rate > 0 for rate in contestant["images_per_second"])
        assert [len(block) for block in contestant["blocks"]] == [2 if name == "two" else 1] * 2
    assert result["contestants"]["fit"]["jit_compile"] is False
    assert set(result["ratios"]) == {"ours/fit", "two/ours"}
    assert [(bar["contestant"], bar["rival"]) for bar in result["bars"]] == [("ours", "fit"), ("two", "ours")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it finds its processes in /proc")
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
    folders = ("--work", work, "--shared", shared)
    results, printed = run_benchmark("scoring.py", tmp_path / "speed.json", *options.split(), *folders)
    assert "(b) is left out" in printed
    result = results["speed"]
    assert list(result["contestants"]) == ["bound-fp32", "inline-fp32"]
    for contestant in result["contestants"].values():
        (one,) = contestant["rounds"]
        assert one["images"] == one["marks"][-1][1] == 20
        assert one["whole"] > 0
    assert max(result["agreement"].values()) < 1e-4


@pytest.mark.slow
def test_intervals_agree_with_a_loop_of_scikit_learn(tmp_path: Path) -> None:
    options = "--images 400 --patients 60 --findings 2 --resamples 20 --rival-resamples 2 --rounds 2"
    results, _ = run_benchmark("evaluation.py", tmp_path / "speed.json", *options.split())
    result = results["bootstrap"]
    assert {name: len(seconds) for name, seconds in result["seconds"].items()} == {"ours": 2, "sklearn": 2, "areas": 2}
    assert result["largest_difference"] < 1e-9
    assert set(result["ratios"]) == {"sklearn/ours", "areas/ours"}
