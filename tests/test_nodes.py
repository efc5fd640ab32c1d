"""Test jobs on a cluster of a head and two nodes with a token, as in the README.

Each node has its own object store. The head has no CPU for work; the GPU of one node is declared but not real.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import score_arguments, write_noise
from nodes import Nodes, cluster, training_arguments, wait_until

import ray_cxr

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
#: Many small files, so that some are pending when a node is lost; as in `score_arguments`.
ROWS, ROWS_PER_FILE = 800, 16
#: Command lines of processes that score images.
WORK = ("ray::MapWorker", "ray_cxr.imaging.sandbox")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with cluster(tmp_path_factory.mktemp("nodes") / "logs", a=0, b=1) as made:
        yield made


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a manifest of large images, with patient ids that no log may show."""
    folder = tmp_path_factory.mktemp("large")
    paths = list(map(str, write_noise(folder)))
    rows = [(f"{row:08d}_000.png", paths[row % 6], f"SECRET-PATIENT-{row}") for row in range(ROWS)]
    pd.DataFrame(rows, columns=["image_id", "path", "patient_id"]).to_parquet(folder / "m.parquet", index=False)
    return folder / "m.parquet"


def list_parts(out: Path) -> dict[Path, int]:
    """Return the finished score files with their modification times."""
    return {path: path.stat().st_mtime_ns for path in (out / "scores").glob("part-*.parquet")}


def wait_for_parts(nodes: Nodes, log: Path, out: Path) -> None:
    wait_until(lambda: len(list_parts(out)) >= 4 or nodes.has_ended(log), 240, log.read_text)


def watch_nodes(nodes: Nodes, log: Path, wanted: set[str], *titles: str) -> set[str]:
    """Collect the nodes with processes of these titles, until all wanted ones had one or the job ends."""
    seen = set[str]()

    def look() -> bool:
        seen.update(nodes.find_nodes(*titles))
        return seen >= wanted or nodes.has_ended(log)

    wait_until(look, 240, log.read_text)
    return seen


def assert_succeeds(nodes: Nodes, log: Path, seconds: float = 240) -> str:
    code, printed = nodes.wait_for_job(log, seconds)
    assert code == 0, printed
    return printed


def assert_refused(nodes: Nodes, log: Path, line: str) -> None:
    code, printed = nodes.wait_for_job(log)
    assert code != 0
    assert line in printed
    assert "failed with exit code 2" in printed


def assert_each_row_once(out: Path, manifest: Path, rows: int | None = None) -> None:
    table = pd.concat([pd.read_parquet(file) for file in sorted((out / "scores").iterdir())], ignore_index=True)
    assert table["image_id"].tolist() == pd.read_parquet(manifest)["image_id"].tolist()[:rows]
    assert (table["status"] == "ok").all()
    assert (out / "_SUCCESS").exists()


def test_jobs_without_the_token_are_refused(nodes: Nodes) -> None:
    for wrong in ({"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}):
        refused = nodes.run_ray("job", "submit", "--address", nodes.job_server, "--", "true", **wrong)
        assert refused.returncode != 0
        assert "submitted successfully" not in refused.stdout
        assert re.search(r"40[13]|[Uu]nauth|[Tt]oken", refused.stdout), refused.stdout


def test_each_row_is_scored_once_despite_a_lost_node(
    nodes: Nodes, images: Path, tiny_bundle: Any, tmp_path: Path
) -> None:
    """The head does no work, and no log contains a patient id."""
    out = tmp_path / "scores"
    log = nodes.submit(score_arguments(tiny_bundle.path, images, out), name="lost-node")
    wait_for_parts(nodes, log, out)
    assert watch_nodes(nodes, log, {"a", "b"}, *WORK) == {"a", "b"}, log.read_text()
    nodes.kill("b")
    assert len(list_parts(out)) < ROWS // ROWS_PER_FILE, "all files were written before the node was killed"
    printed = assert_succeeds(nodes, log, 400)
    assert_each_row_once(out, images)
    assert "Traceback" not in printed
    assert "SECRET-PATIENT" not in printed
    for file in nodes.temp.rglob("*"):
        if file.is_file() and "logs" in file.parts and file.stat().st_size < 50_000_000:
            assert b"SECRET-PATIENT" not in file.read_bytes(), file
    nodes.add_node("b", gpus=1)  # for the next tests


@pytest.mark.long
def test_prepare_train_score_and_report_as_jobs(nodes: Nodes, manifest: Path, tmp_path: Path) -> None:
    """Each job reads the output of the previous one; `train` uses two workers on two nodes."""
    prepared, scores = tmp_path / "prepared", tmp_path / "scores"
    for arguments in (
        ["prepare", manifest, "--out", prepared, "--size", "64"],
        training_arguments(prepared, tmp_path / "run", epochs=1, workers=2),
        score_arguments(tmp_path / "run" / "bundle", manifest, scores),
        ["report", scores, "--labels", manifest, "--split", "test", "--out", tmp_path / "report"],
    ):
        log = nodes.submit(arguments, name=f"chain-{arguments[0]}")
        if arguments[0] == "train":
            assert watch_nodes(nodes, log, {"a", "b"}, "RayTrainWorker") == {"a", "b"}, log.read_text()
        assert_succeeds(nodes, log)
    rows = len(pq.read_table(manifest))
    assert len(pq.read_table(scores / "scores")) == rows
    assert json.loads((scores / "run.json").read_text())["actors"] == 2
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert 0 < metrics["n_images"] < rows


@pytest.mark.long
def test_a_node_that_joins_late_works(nodes: Nodes, images: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    """The job lasts until the node works, and is then stopped."""
    table, many = pd.read_parquet(images), tmp_path / "many.parquet"
    copies = [table.assign(image_id=[f"{copy}-{row}" for row in range(ROWS)]) for copy in range(20)]
    pd.concat(copies).to_parquet(many, index=False)
    log = nodes.submit(score_arguments(tiny_bundle.path, many, tmp_path / "scores"), name="late-node")
    wait_for_parts(nodes, log, tmp_path / "scores")
    with nodes.temporary_node("c"):
        assert watch_nodes(nodes, log, {"c"}, *WORK) >= {"c"}, log.read_text()
        wait_until(lambda: "has joined" in log.read_text() or nodes.has_ended(log), 120, log.read_text)
        assert nodes.run_ray("job", "stop", "late-node", "--address", nodes.job_server).returncode == 0
        assert "has joined" in nodes.wait_for_job(log)[1]


@pytest.mark.long
def test_a_job_that_is_stopped_continues(nodes: Nodes, images: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    given = score_arguments(tiny_bundle.path, images, out, "--limit", 640)
    log = nodes.submit(given, name="stopped")
    wait_for_parts(nodes, log, out)
    nodes.stop_job("stopped")
    printed = nodes.wait_for_job(log)[1]
    kept = list_parts(out)
    assert 4 <= len(kept) < 640 // ROWS_PER_FILE
    assert not (out / "_SUCCESS").exists()
    assert "the same command again" in printed
    assert_succeeds(nodes, nodes.submit(given, name="continued"))
    assert kept.items() <= list_parts(out).items()
    assert_each_row_once(out, images, 640)


@pytest.mark.long
def test_models_run_only_on_gpu_nodes(nodes: Nodes, images: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    """The actor starts on the node with the declared GPU, finds none, and the job fails with that line."""
    log = nodes.submit(score_arguments(tiny_bundle.path, images, tmp_path / "scores", "--gpu"), name="gpu")
    assert watch_nodes(nodes, log, {"none of them"}, "MapWorker(Map(ModelActor))") == {"b"}, log.read_text()
    assert_refused(nodes, log, "--gpu: TensorFlow sees no GPU on")


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system for one node")
def test_a_folder_that_is_not_shared_is_refused(nodes: Nodes, images: Path, tiny_bundle: Any, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    with nodes.temporary_node("d", hidden=own):
        log = nodes.submit(score_arguments(tiny_bundle.path, images, own / "scores"), name="unshared")
        assert_refused(nodes, log, f"ray-cxr score: --out {own / 'scores'}: not found on the node ")
    assert not (own / "scores" / "_SUCCESS").exists()


@pytest.mark.long
def test_training_continues_on_the_remaining_nodes(nodes: Nodes, manifest: Path, tmp_path: Path) -> None:
    """Ray Train restarts both workers from the last checkpoint."""
    prepare = ["prepare", manifest, "--out", tmp_path / "prepared", "--size", "64"]
    assert_succeeds(nodes, nodes.submit(prepare, name="to-train-on"))
    nodes.add_node("e", cpus=2)
    nodes.add_node("f", cpus=2)
    settings = {"epochs": 6, "workers": 2, "checkpoint_steps": 2, "cpus_per_worker": 2}
    arguments = training_arguments(tmp_path / "prepared", tmp_path / "run", **settings)
    log = nodes.submit(arguments, name="lost-in-training")
    wait_until(lambda: (tmp_path / "run" / "metrics.csv").exists() or nodes.has_ended(log), 300, log.read_text)
    nodes.kill("e")
    nodes.add_node("g", cpus=2)
    printed = assert_succeeds(nodes, log, 500)
    assert "a worker failed or was lost" in printed
    assert re.search(r"train: continues in epoch [1-9][0-9]* after step [1-9]", printed), printed
    assert len(pd.read_csv(tmp_path / "run" / "metrics.csv")) == 6
    ray_cxr.load_bundle(tmp_path / "run" / "bundle")


@pytest.mark.long
def test_training_survives_machines_that_come_and_go(prepared: Path, tmp_path: Path) -> None:
    """A machine is announced to go, goes, and another joins: two workers, one, two; every epoch is trained."""
    run = tmp_path / "run"
    settings = {"epochs": 300, "workers": "1-2", "cpus_per_worker": 2, "batch_size": 1}
    with cluster(tmp_path / "spot") as nodes:
        nodes.add_node("h", cpus=2)
        nodes.add_node("i", cpus=2)
        log = nodes.start(training_arguments(prepared, run, **settings), name="spot")

        def wait_for(text: str, seconds: float) -> None:
            wait_until(lambda: text in log.read_text() or nodes.has_ended(log), seconds, log.read_text)
            assert text in log.read_text(), log.read_text()

        wait_until(lambda: (run / "started.json").exists() or nodes.has_ended(log), 300, log.read_text)
        assert json.loads((run / "started.json").read_text())["workers"] == 2
        time.sleep(10)
        nodes.drain("i", 20)
        wait_for("is going away; checkpoint written", 60)
        time.sleep(20)
        nodes.kill("i")
        wait_for("1 worker instead of 2", 300)
        nodes.add_node("j", cpus=2)
        wait_for("2 workers instead of 1", 300)
        printed = assert_succeeds(nodes, log, 900)
    print(printed)  # the log of a run that lost a machine and got another
    assert pd.read_csv(run / "metrics.csv")["epoch"].tolist() == list(range(1, 301))
    ray_cxr.load_bundle(run / "bundle")


@pytest.mark.long
def test_a_job_continues_on_a_new_cluster_after_its_head_is_lost(
    images: Path, tiny_bundle: Any, tmp_path: Path
) -> None:
    out, given = tmp_path / "scores", score_arguments(tiny_bundle.path, images, tmp_path / "scores")
    with cluster(tmp_path / "first", a=0) as first:
        log = first.submit(given, name="headless")
        wait_for_parts(first, log, out)
        first.kill("head")
        first.wait_for_job(log)
    kept = list_parts(out)
    assert 4 <= len(kept) < ROWS // ROWS_PER_FILE
    with cluster(tmp_path / "second", a=0) as second:
        assert_succeeds(second, second.submit(given, name="again"))
    assert kept.items() <= list_parts(out).items()
    assert_each_row_once(out, images)
