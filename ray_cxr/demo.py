"""`demo`: run every step on synthetic radiographs, through the commands that a user would type."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ray_cxr.errors import RayCxrError
from ray_cxr.imaging import phantoms

#: Enough patients that each finding has positives, and few enough that the demo takes minutes on two cores.
PATIENTS = 440
SIZE = 96
SPLIT = ("--split", "patient", "--fractions", "0.6,0.2,0.2")
TRAINING = (
    "backbone=TinyCNN weights=none epochs=14 batch_size=32 learning_rate=0.003 warmup_epochs=1 schedule=cosine "
    "pooling=avgmax dropout=0.1 loss=bce optimizer=adamw"
)
#: Small heat maps of the two highest findings of each image, which show hits and false alarms.
MAPS = ("--heatmaps", "2", "--set", "heatmap_pixels=256")
#: Settings of a search that is small enough for a laptop and for a test.
SEARCH = """\
[train]
backbone = "TinyCNN"
weights = "none"
epochs = 4
warmup_epochs = 1
optimizer = "adamw"

[tune]
trials = 4
reduction_factor = 2

[tune.space]
learning_rate = { low = 1e-4, high = 1e-2, log = true }
pooling = ["avg", "max", "avgmax"]
batch_size = [16, 32]
loss = ["bce", "weighted_bce"]

[[tune.enqueue]]
learning_rate = 0.003
pooling = "avgmax"
batch_size = 32
loss = "bce"
"""


def run_demo(
    out: Path, command: Callable[[Sequence[str]], int], on_event: Callable[[str], None], *, tune: bool = False
) -> None:
    """Draw phantoms, then run manifest, prepare, train, score and report; or continue an interrupted demo.

    Args:
        out: Folder for all files.
        command: Runs the arguments of `ray-cxr` and returns the exit code.
        on_event: Prints a line.
        tune: Whether to run a small search before the training, and to train with the settings it found.
    """
    started, seconds = time.monotonic(), {}
    on_event(f"drawing radiographs of {PATIENTS} synthetic patients, with some broken files on purpose")
    drawn = phantoms.write_phantoms(out / "phantoms", patients=PATIENTS)
    seconds["drawing"] = time.monotonic() - started
    manifest, prepared, model = out / "manifest.parquet", out / "prepared", out / "run"
    scores, report = out / "scores", out / "report"
    training = [part for setting in TRAINING.split() for part in ("--set", setting)]
    search = []
    if tune:
        (out / "search.toml").write_text(SEARCH, encoding="utf-8")
        search = [["tune", str(prepared), "--out", str(out / "study"), "--config", str(out / "search.toml")]]
        training = ["--config", str(out / "study" / "best.toml"), "--set", "epochs=14"]
    steps: list[list[str]] = [
        ["manifest", str(drawn.table), "--images", str(drawn.images), "--out", str(manifest), *SPLIT],
        ["prepare", str(manifest), "--out", str(prepared), "--size", str(SIZE)],
        *search,
        ["train", str(prepared), "--out", str(model), *training],
        ["score", str(model / "bundle"), "--manifest", str(manifest), "--out", str(scores), *MAPS],
        ["report", str(scores), "--manifest", str(manifest), "--split", "test", "--out", str(report)],
    ]
    for step in steps:
        on_event("")
        on_event(f"$ {shlex.join(['ray-cxr', *step])}")
        step_started = time.monotonic()
        code = command(step)
        seconds[step[0]] = time.monotonic() - step_started
        if code:
            raise RayCxrError(f"the step `{step[0]}` failed with exit code {code}; see its message above")
    metrics = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
    on_event("")
    parts = ", ".join(f"{name} {spent:.0f}" for name, spent in seconds.items())
    on_event(f"demo: {time.monotonic() - started:.0f} s ({parts})")
    on_event(f"demo: macro AUROC on the test split {metrics['macro']['auroc']:.3f}")
    on_event(f"demo: open {report / 'report.html'}")
    review = ["ray-cxr", "review", str(scores), "--manifest", str(manifest)]
    on_event(f"demo: go through the images as a reader: {shlex.join(review)}")
