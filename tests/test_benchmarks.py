"""The benchmarks run and say what they should; how fast anything is, no test judges."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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
