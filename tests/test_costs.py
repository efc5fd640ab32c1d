"""`--dry-run` of prepare, train, tune and score: what it states, that it fails as the run would, and writes nothing."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from ray_cxr import costs, session
from ray_cxr.config import InputSpec, PrepareSettings, ScoreSettings
from ray_cxr.data.prepare_cost import estimate_prepare
from ray_cxr.imaging.sample import decode_sample
from ray_cxr.scoring.cost import estimate_score
from ray_cxr.scoring.plan import ScoreRequest, plan_run

Command = Callable[..., tuple[int, str, str]]
TINY = ["--set", "train.backbone=TinyCNN", "--set", "train.weights=none", "--set", "train.size=64"]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a dry run starts no Ray")

    monkeypatch.setattr(session, "start_ray", fail)


def run_dry(command: Command, out: Path, *arguments: object) -> str:
    before = sorted(out.parent.rglob("*"))
    code, printed, err = command(*arguments, "--out", out, "--dry-run")
    assert code == 0, err
    assert sorted(out.parent.rglob("*")) == before, "a dry run writes nothing"
    assert "nothing was written" in printed
    assert re.search(r"^time: (about )?\d", printed, re.MULTILINE)
    assert re.search(r"^disk: about [\d.,]+ [kMG]?B", printed, re.MULTILINE)
    return printed


@pytest.mark.slow
def test_prepare_states_splits_and_the_size_of_the_prepared_set(
    command: Command, manifest: Path, prepared: Path, tmp_path: Path
) -> None:
    printed = run_dry(command, tmp_path / "new", "prepare", manifest, "--size", "64,96")
    rows = pd.read_parquet(manifest)
    for split, count in rows["split"].value_counts().items():
        assert f"{split} {count}" in printed
    cost = estimate_prepare(manifest, tmp_path / "new", PrepareSettings(sizes=(64, 96)), cpus=2)
    for size in (64, 96):
        written = sum(path.stat().st_size for path in (prepared / str(size)).glob("part-*"))
        assert 0.8 < cost.sizes[f"{size} pixels"] / written < 1.4
    # The folder that is complete has nothing left to prepare.
    settings = PrepareSettings(sizes=(64, 96), rows_per_shard=16)
    assert not any(estimate_prepare(manifest, prepared, settings, cpus=2).sizes.values())


@pytest.mark.slow
def test_train_uses_the_rate_of_an_earlier_run_in_the_folder(command: Command, prepared: Path, tmp_path: Path) -> None:
    arguments = ["train", prepared, *TINY, "--set", "epochs=7"]
    printed = run_dry(command, tmp_path / "run", *arguments)
    assert "7 of 7 epochs" in printed
    assert "measured with" in printed
    pd.DataFrame({"epoch": [1, 2], "images_per_second": [123.0, 123.0]}).pipe(
        lambda table: (tmp_path / "run").mkdir() or table.to_csv(tmp_path / "run" / "metrics.csv", index=False)
    )
    printed = run_dry(command, tmp_path / "run", *arguments)
    assert "5 of 7 epochs" in printed
    assert "123 images/s, of the 2 epochs" in printed


def test_train_on_a_gpu_says_that_its_rate_is_unknown(command: Command, prepared: Path, tmp_path: Path) -> None:
    code, printed, _ = command("train", prepared, *TINY, "--gpu", "--out", tmp_path / "run", "--dry-run")
    assert code == 0
    assert "time: unknown" in printed


def test_tune_states_trials_and_a_range(command: Command, prepared: Path, tmp_path: Path) -> None:
    space = "space={learning_rate={low=1e-4,high=1e-2,log=true}}"
    printed = run_dry(
        command, tmp_path / "study", "tune", prepared, *TINY, "--trials", 5, "--set", space, "--set", "train.epochs=900"
    )
    assert "5 of 5 trials" in printed
    assert re.search(r"^time: .* to ", printed, re.MULTILINE)


@pytest.mark.slow
def test_score_states_heat_maps_and_overlays(
    command: Command, tiny_bundle: Any, manifest: Path, tmp_path: Path
) -> None:
    source = ["score", "--model", tiny_bundle.path, "--manifest", manifest, "--precision", "fp32"]
    plain = run_dry(command, tmp_path / "scores", *source)
    drawn = run_dry(command, tmp_path / "scores", *source, "--heatmaps", 2)
    assert "heat maps" not in plain
    assert f"next: ray-cxr score --bundle {tiny_bundle.path} --manifest" in plain
    assert "heat maps of up to" in drawn
    sizes = {}
    for images in ("flagged", "all"):
        settings = ScoreSettings(precision="fp32", heatmap_images=images)
        request = ScoreRequest(tiny_bundle.path, tmp_path / "s", settings, manifest=str(manifest), heatmaps=2)
        sizes[images] = estimate_score(plan_run(request), cpus=2).sizes
    assert 0 < sizes["flagged"]["overlays (flagged)"] < sizes["all"]["overlays (all)"]
    assert sizes["flagged"]["maps"] == sizes["all"]["maps"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "none.parquet"], "none.parquet"),
        (["prepare", "{manifest}", "--out", "{file}"], "is a file"),
        (["prepare", "{manifest}", "--out", "{inside}"], "cannot be written: Not a directory"),
        (["train", "{prepared}", *TINY, "--set", "batch_size=5", "--set", "workers=2"], "not a multiple"),
        (["train", "{prepared}"], "choose one with --set size"),
        (["tune", "{prepared}", *TINY, "--set", "grace_epochs=99"], "grace_epochs"),
        (["score", "{prepared}", "--images", "."], "not a bundle"),
    ],
)
def test_a_dry_run_fails_where_the_run_would(
    arguments: list[str], message: str, command: Command, manifest: Path, prepared: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    places = {"manifest": manifest, "prepared": prepared, "file": tmp_path / "file", "inside": tmp_path / "file" / "x"}
    words = [word.format(**places) if word.startswith("{") else word for word in arguments]
    out = [] if "--out" in words else ["--out", str(tmp_path / "new")]
    code, printed, err = command(*words, *out, "--dry-run")
    assert (code, printed) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_images_are_sampled_from_archives_and_failures_counted(phantoms: Any, tmp_path: Path) -> None:
    files = [path for path in sorted(phantoms.images.rglob("*.png")) if path.stat().st_size > 1000][:3]
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for path in files:
            archive.add(path, f"images/{path.name}")
    inside = [f"{tmp_path}/a.tar.gz::images/{path.name}" for path in files]
    sample = decode_sample(pa.chunked_array([inside]), [InputSpec(size=64)])
    assert (len(sample.images), sample.failed) == (3, 0)
    assert sample.seconds > 0
    sample = decode_sample(
        pa.chunked_array([[str(files[0]), str(tmp_path / "missing.png"), None]]), [InputSpec(size=64)]
    )
    assert (len(sample.images), sample.failed) == (1, 1)
    assert decode_sample(pa.chunked_array([pa.array([], pa.string())]), [InputSpec(size=64)]).count == 0


def test_cpus_are_counted_where_a_process_has_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert costs.count_cpus() == os.cpu_count()
    assert costs.count_cpus(3) == 3
