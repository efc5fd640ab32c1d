"""The benchmarks run and say what they should; how fast anything is, no test judges."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ray_cxr.data.phantoms import PhantomSet
from ray_cxr.models.bundle import Bundle

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.ray  # slow, as those with Ray are: it starts four TensorFlows
def test_training_is_compared_with_fit_and_two_workers_with_one(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    options = "--backbone TinyCNN --size 32 --batch 8 --steps 2 --rounds 2 --only ours fit two"
    done = subprocess.run(
        [sys.executable, "benchmarks/training.py", *options.split(), "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for text in ("ours, 1 worker x 2 threads", "bare fit", "ours, 2 workers x 1 thread", ">= 0.95", ">= 0.90", "met"):
        assert text in done.stdout
    result = json.loads(out.read_text())["backbones"]["TinyCNN"]
    assert list(result["contestants"]) == ["ours", "fit", "two"]
    for name, contestant in result["contestants"].items():
        assert len(contestant["images_per_second"]) == 2
        assert all(rate > 0 for rate in contestant["images_per_second"])
        assert [len(block) for block in contestant["blocks"]] == [2 if name == "two" else 1] * 2
    assert result["contestants"]["fit"]["jit_compile"] is False
    assert set(result["ratios"]) == {"ours/fit", "two/ours"}
    assert all(ratio > 0 for pair in result["ratios"].values() for ratio in pair.values())
    assert [(bar["contestant"], bar["rival"], bar["bar"]) for bar in result["bars"]] == [
        ("ours", "fit", 0.95),
        ("two", "ours", 0.90),
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it finds its processes in /proc")
def test_scoring_is_compared_with_a_bare_program_and_pytorch_left_out_with_a_line(
    tmp_path: Path, tiny_bundle: Bundle, phantoms: PhantomSet
) -> None:
    # Nothing here needs Keras or Ray: the bundle is there already, and two threads score with its graph.
    work, shared, out = tmp_path / "work", tmp_path / "shared", tmp_path / "speed.json"
    shutil.copytree(tiny_bundle.path, work / "bundle-TinyCNN-64")
    images = shared / "nih" / "images1024"
    images.mkdir(parents=True)
    for path in sorted(phantoms.images.glob("*.png"))[:6]:
        shutil.copy(path, images)
    options = "--backbone TinyCNN --size 64 --images 100 --rounds 1 --only bound-fp32 inline-fp32 torch-fp32"
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/scoring.py", *options.split()),
            *("--work", str(work), "--shared", str(shared), "--out", str(out)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for text in ("(b) is left out", "(c) bare program, fp32", "start-up of (c) bare program, fp32, s: imports"):
        assert text in done.stdout
    result = json.loads(out.read_text())["speed"]
    assert list(result["contestants"]) == ["bound-fp32", "inline-fp32"]
    for contestant in result["contestants"].values():
        assert [run["images"] for run in contestant["rounds"]] == [100]
        assert all(run["marks"][-1][1] == 100 for run in contestant["rounds"])
        assert all(run[name] > 0 for run in contestant["rounds"] for name in ("steady", "first", "whole"))
    assert max(result["agreement"].values()) < 1e-4


def test_intervals_are_compared_with_a_loop_that_gives_the_same_ones(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    options = "--images 400 --patients 60 --findings 2 --resamples 80 --rival-resamples 2 --rounds 2"
    done = subprocess.run(
        [sys.executable, "benchmarks/evaluation.py", *options.split(), "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for text in ("400 images of 60 patients", "loop with scikit-learn", "from 2 resamples", "<= 60 s: met"):
        assert text in done.stdout
    result = json.loads(out.read_text())["bootstrap"]
    assert {name: len(seconds) for name, seconds in result["seconds"].items()} == {"ours": 2, "sklearn": 2, "areas": 2}
    assert result["largest_difference"] < 1e-9
    assert set(result["ratios"]) == {"sklearn/ours", "areas/ours"}
    assert all(ratio > 0 for ratio in result["ratios"].values())
