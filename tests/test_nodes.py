"""Jobs on a cluster of a head and two nodes with a token: as README says, on real radiographs where they are here.

The nodes are started by `ray start`, as on machines of their own, each with its own object store; the head has no CPU
for work, and the GPU of one node is only declared.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nodes import Nodes, until
from PIL import Image

import ray_cxr

pytestmark = pytest.mark.ray
#: Of one part each, so that there is a middle to lose a node in.
ROWS, ROWS_PER_FILE = 1200, 16


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    cluster = Nodes(tmp_path_factory.mktemp("nodes") / "logs")
    try:
        cluster.start_head()
        cluster.add("a")
        cluster.add("b", gpus=1)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of large pictures, with ids of patients that no log may show."""
    folder = tmp_path_factory.mktemp("large")
    noise = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(noise.integers(0, 256, (900, 900), dtype=np.uint8)).save(
            folder / f"{number}.png", compress_level=1
        )
    table = pa.table(
        {
            "image_id": [f"{row:08d}_000.png" for row in range(ROWS)],
            "path": [str(folder / f"{row % 6}.png") for row in range(ROWS)],
            "patient_id": [f"SECRET-PATIENT-{row}" for row in range(ROWS)],
        }
    )
    pq.write_table(table, folder / "m.parquet")
    return folder / "m.parquet"


def score_arguments(bundle: Any, manifest: Path, out: Path, *more: object) -> list[object]:
    given = ["--model", bundle.path, "--manifest", manifest, "--out", out, "--set", f"rows_per_file={ROWS_PER_FILE}"]
    return [*given, *more]


def training_arguments(prepared: Path, out: Path, **changes: object) -> list[object]:
    settings = {"backbone": "TinyCNN", "weights": "none", "epochs": 1, "batch_size": 6, "min_positives": 2, **changes}
    given = (part for key, value in settings.items() for part in ("--set", f"{key}={value}"))
    return [prepared, "--out", out, "--workers", 2, *given]


def parts(out: Path) -> int:
    return len(list((out / "scores").glob("part-*.parquet")))


def seen_while(nodes: Nodes, log: Path, wanted: set[str], *titles: str) -> set[str]:
    """Where there were processes of these titles, until they were on all of the nodes that are wanted or it ended."""
    seen = set[str]()

    def look() -> bool:
        seen.update(nodes.where(*titles))
        return seen >= wanted or nodes.over(log)

    until(look, 240, log.read_text)
    return seen


def assert_each_row_once(out: Path, manifest: Path) -> pd.DataFrame:
    table = pd.concat([pd.read_parquet(file) for file in sorted((out / "scores").iterdir())], ignore_index=True)
    assert table["image_id"].tolist() == pd.read_parquet(manifest)["image_id"].tolist()
    assert (table["status"] == "ok").all()
    assert (out / "_SUCCESS").exists()
    return table


# ---------------------------------------------------------------- the door


def test_nobody_without_the_token_gets_in(nodes: Nodes) -> None:
    submit = ("job", "submit", "--address", nodes.jobs, "--", "true")
    for wrong in ({"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}):
        refused = nodes.ray(*submit, **wrong)
        assert refused.returncode != 0
        assert "submitted successfully" not in refused.stdout
        assert re.search(r"40[13]|[Uu]nauth|[Tt]oken", refused.stdout), refused.stdout
    listed = nodes.ray("job", "list", "--address", nodes.jobs)
    assert listed.returncode == 0, listed.stdout


# ---------------------------------------------------------------- every job, one after the other


def test_prepare_train_score_and_report_as_jobs(nodes: Nodes, manifest: Path, tmp_path: Path) -> None:
    """Two workers of `train` on two nodes; the next job reads what the one before left."""
    jobs: dict[str, list[object]] = {
        "prepare": [manifest, "--out", tmp_path / "prepared", "--size", "64"],
        "train": training_arguments(tmp_path / "prepared", tmp_path / "run"),
        "score": [
            "--model",
            tmp_path / "run" / "bundle",
            "--manifest",
            manifest,
            "--out",
            tmp_path / "scores",
            "--set",
            "rows_per_file=16",
        ],
        "report": [tmp_path / "scores", "--labels", manifest, "--split", "test", "--out", tmp_path / "report"],
    }
    for job, arguments in jobs.items():
        log = nodes.submit(job, arguments, name=f"chain-{job}")
        if job == "train":
            assert seen_while(nodes, log, {"a", "b"}, "RayTrainWorker") == {"a", "b"}, log.read_text()
        assert nodes.finished(log) == 0, log.read_text()
    rows = len(pq.read_table(manifest))
    assert len(pq.read_table(tmp_path / "scores" / "scores")) == rows
    assert json.loads((tmp_path / "scores" / "run.json").read_text())["actors"] == 2
    scored = pq.read_table(tmp_path / "scores" / "scores", filters=[("status", "=", "ok")])["image_id"].to_pylist()
    tested = pq.read_table(manifest, filters=[("split", "=", "test")])["image_id"].to_pylist()
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["n_images"] == len(set(scored) & set(tested)) > 0
    said = nodes.ray("job", "logs", "chain-score", "--address", nodes.jobs).stdout
    assert f"scored {rows:,} images" in said, "what a job said can be read later"


def test_a_job_ends_with_the_commands_exit_code_and_line(nodes: Nodes, tmp_path: Path) -> None:
    log = nodes.submit("report", [tmp_path / "none", "--out", tmp_path / "out"], name="wrong")
    assert nodes.finished(log) != 0
    said = log.read_text()
    assert "failed with exit code 2" in said
    assert f"ray-cxr report: {tmp_path / 'none'}" in said
    assert "Traceback" not in said


# ---------------------------------------------------------------- nodes that go and come


@pytest.mark.timeout(600)
def test_a_node_lost_in_mid_score_and_one_that_joins_late(
    nodes: Nodes, images: Path, tiny_bundle: Any, tmp_path: Path
) -> None:
    """Every row once; the head never works; the late node does."""
    out = tmp_path / "scores"
    work = ("ray::MapWorker", "ray_cxr.data.sandbox")
    log = nodes.submit("score", score_arguments(tiny_bundle, images, out), name="lost-node")
    until(lambda: parts(out) >= 4 or nodes.over(log), 240, log.read_text)
    assert seen_while(nodes, log, {"a", "b"}, *work) == {"a", "b"}, "the head decodes nothing"
    nodes.kill("b")
    lost = parts(out)
    assert lost < ROWS // ROWS_PER_FILE, "there must be work left to lose"
    nodes.add("c", gpus=1)
    assert seen_while(nodes, log, {"a", "c"}, *work) == {"a", "c"}, "who joins late is used"
    assert nodes.finished(log) == 0, log.read_text()
    assert_each_row_once(out, images)
    said = log.read_text()
    assert "score: WARNING: the node" in said
    assert "has joined: 2 nodes with 2 CPUs" in said
    assert "Traceback" not in said, said
    assert "SECRET-PATIENT" not in said
    for file in nodes.temp.rglob("*"):
        if file.is_file() and "logs" in file.parts and file.stat().st_size < 50_000_000:
            assert b"SECRET-PATIENT" not in file.read_bytes(), file


@pytest.mark.long
def test_a_job_that_is_stopped_continues(nodes: Nodes, images: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    given = score_arguments(tiny_bundle, images, out, "--limit", 800)
    log = nodes.submit("score", given, name="stopped")
    until(lambda: parts(out) >= 4 or nodes.over(log), 240, log.read_text)
    stop = nodes.ray("job", "stop", "stopped", "--address", nodes.jobs)
    assert stop.returncode == 0, stop.stdout
    nodes.finished(log)
    kept = {path: path.stat().st_mtime_ns for path in (out / "scores").glob("part-*.parquet")}
    assert 4 <= len(kept) < 800 // ROWS_PER_FILE
    assert not (out / "_SUCCESS").exists()
    assert "stopped; the same command continues" in log.read_text()
    log = nodes.submit("score", given, name="continued")
    assert nodes.finished(log) == 0, log.read_text()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert sum(len(pq.read_table(path)) for path in (out / "scores").iterdir()) == 800
    assert (out / "_SUCCESS").exists()


@pytest.mark.long
def test_networks_go_to_gpus_and_nowhere_else(nodes: Nodes, images: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    """The GPU is declared and not there, which the actor on that node finds out and says."""
    with_gpu = {name for name in ("b", "c") if nodes.has(name)}
    log = nodes.submit("score", score_arguments(tiny_bundle, images, tmp_path / "scores", "--gpu"), name="gpu")
    assert seen_while(nodes, log, {"none of them"}, "MapWorker(Map(NetworkActor))") == with_gpu, log.read_text()
    assert nodes.finished(log) != 0
    assert "--gpu: this actor sees no GPU; is requirements-gpu.lock installed there?" in log.read_text()
    assert "failed with exit code 2" in log.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a node a file system of its own")
def test_a_folder_that_is_not_shared_is_refused(nodes: Nodes, images: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    nodes.add("d", hidden=own)
    until(lambda: nodes.count() == 4, 120, lambda: nodes.log("d"))
    try:
        log = nodes.submit("score", score_arguments(tiny_bundle, images, own / "scores"), name="unshared")
        assert nodes.finished(log) != 0
    finally:
        nodes.kill("d")
    said = log.read_text()
    assert f"ray-cxr score: --out {own / 'scores'}: the node " in said
    assert "does not see it" in said
    assert "failed with exit code 2" in said
    assert not (own / "scores" / "_SUCCESS").exists()


# ---------------------------------------------------------------- long ones, for scripts/soak


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_node_lost_in_mid_training(nodes: Nodes, manifest: Path, tmp_path: Path) -> None:
    """Ray Train starts both workers again on what is left, from the last checkpoint."""
    log = nodes.submit("prepare", [manifest, "--out", tmp_path / "prepared", "--size", "64"], name="to-train-on")
    assert nodes.finished(log) == 0, log.read_text()
    nodes.add("e", cpus=2)
    nodes.add("f", cpus=2)
    settings = {"epochs": 6, "checkpoint_steps": 2, "cpus_per_worker": 2}
    arguments = training_arguments(tmp_path / "prepared", tmp_path / "run", **settings)
    log = nodes.submit("train", arguments, name="lost-in-training")
    until(lambda: (tmp_path / "run" / "metrics.csv").exists() or nodes.over(log), 300, log.read_text)
    nodes.kill("e")
    nodes.add("g", cpus=2)
    assert nodes.finished(log, 500) == 0, log.read_text()
    said = log.read_text()
    assert "a worker failed or was lost; Ray Train has started all of them again" in said
    assert re.search(r"train: continues after epoch [0-9], step [1-9]", said), said
    assert len(pd.read_csv(tmp_path / "run" / "metrics.csv")) == 6
    ray_cxr.load_bundle(tmp_path / "run" / "bundle")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_head_lost_and_the_job_submitted_again(images: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    out, given = tmp_path / "scores", score_arguments(tiny_bundle, images, tmp_path / "scores")
    first = Nodes(tmp_path / "first")
    try:
        first.start_head()
        first.add("a")
        log = first.submit("score", given, name="headless")
        until(lambda: parts(out) >= 4 or first.over(log), 240, log.read_text)
        first.kill("head")
        first.finished(log)
    finally:
        first.stop()
    kept = {path: path.stat().st_mtime_ns for path in (out / "scores").glob("part-*.parquet")}
    assert 4 <= len(kept) < ROWS // ROWS_PER_FILE
    second = Nodes(tmp_path / "second")
    try:
        second.start_head()
        second.add("a")
        log = second.submit("score", given, name="again")
        assert second.finished(log) == 0, log.read_text()
    finally:
        second.stop()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_each_row_once(out, images)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_real_radiographs_with_a_node_lost(nodes: Nodes, shared: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    """What a closing note shows: a job with a token, three nodes, real images, one node killed on the way."""
    from ray_cxr.cli import main

    made, out = tmp_path / "real.parquet", tmp_path / "scores"
    table, pictures = shared / "nih" / "meta" / "Data_Entry_2017_v2020.csv.gz", shared / "nih" / "images1024"
    assert main(["manifest", str(table), "--images", str(pictures), "--found-only", "--out", str(made)]) == 0
    if not nodes.has("b"):
        nodes.add("b")
    log = nodes.submit("score", score_arguments(tiny_bundle, made, out, "--set", "rows_per_file=4"), name="real")
    until(lambda: parts(out) >= 2 or nodes.over(log), 240, log.read_text)
    nodes.kill("b")
    print(f"a node was killed when {parts(out)} of {-(-len(pq.read_table(made)) // 4)} files were there")
    assert nodes.finished(log, 400) == 0, log.read_text()
    print(log.read_text())
    print(f"rows: {len(assert_each_row_once(out, made)):,}")
