"""Preferred and required nodes, on a cluster of a spot and an on-demand node; the spot nodes are killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import score_arguments, write_noise
from nodes import Nodes, cluster, training_arguments, wait_until

import ray_cxr

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]
PREFER = ("--set", "ray.prefer=ray.io/market-type=spot")
ROWS, EPOCHS = 400, 30


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with cluster(tmp_path_factory.mktemp("labels") / "logs") as made:
        made.add_node("demand", cpus=2, market="on-demand")
        yield made


@pytest.fixture
def spot(nodes: Nodes, request: pytest.FixtureRequest) -> str:
    """Start a spot node that the test kills."""
    name = f"spot-{request.node.name.split('_')[1]}"
    nodes.add_node(name, cpus=2, market="spot")
    return name


def find_workers(nodes: Nodes, log: Path, title: str, name: str) -> set[str]:
    """Return the nodes with workers of this title, once there are any on the node `name` or the command has ended."""
    wait_until(lambda: name in nodes.find_nodes(title) or nodes.has_ended(log), 240, log.read_text)
    return nodes.find_nodes(title)


def test_scores_on_the_other_node_after_the_preferred_one_is_lost(
    nodes: Nodes, spot: str, tiny_bundle: Any, tmp_path: Path
) -> None:
    """One file is one actor, which the preferred node has room for."""
    paths = list(map(str, write_noise(tmp_path)))
    table = pd.DataFrame({"image_id": [f"{i:08d}_000.png" for i in range(ROWS)], "path": paths[:1] * ROWS})
    table.to_parquet(tmp_path / "m.parquet", index=False)
    arguments = score_arguments(tiny_bundle.path, tmp_path / "m.parquet", tmp_path / "scores")
    log = nodes.start([*arguments, "--set", f"rows_per_file={ROWS}", *PREFER], name="score")
    assert find_workers(nodes, log, "ray::MapWorker", spot) == {spot}, log.read_text()
    nodes.kill(spot)
    assert find_workers(nodes, log, "ray::MapWorker", "demand") == {"demand"}, log.read_text()
    code, printed = nodes.wait_for_job(log, 400)
    assert code == 0, printed
    (part,) = (tmp_path / "scores" / "scores").iterdir()
    assert pd.read_parquet(part)["image_id"].tolist() == table["image_id"].tolist()


def test_trains_on_the_other_node_after_the_preferred_one_is_lost(
    nodes: Nodes, spot: str, prepared: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = {"epochs": EPOCHS, "workers": 1, "cpus_per_worker": 2, "batch_size": 1}
    log = nodes.start([*training_arguments(prepared, run, **settings), *PREFER], name="train")
    assert find_workers(nodes, log, "RayTrainWorker", spot) == {spot}, log.read_text()
    wait_until(lambda: (run / "metrics.csv").exists() or nodes.has_ended(log), 240, log.read_text)
    nodes.kill(spot)
    assert find_workers(nodes, log, "RayTrainWorker", "demand") == {"demand"}, log.read_text()
    code, printed = nodes.wait_for_job(log, 500)
    assert code == 0, printed
    assert "a worker failed or was lost" in printed
    assert pd.read_csv(run / "metrics.csv")["epoch"].tolist() == list(range(1, EPOCHS + 1))
    ray_cxr.load_bundle(run / "bundle")


def test_a_requirement_that_no_node_meets_ends_in_one_line(nodes: Nodes, prepared: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    arguments = training_arguments(prepared, tmp_path / "run")
    log = nodes.start([*arguments, "--set", "ray.label_selector=ray.io/market-type=sopt"], name="refused")
    code, printed = nodes.wait_for_job(log, 120)
    assert code == 2, printed
    line = printed.splitlines()[-1]
    assert line.startswith("ray-cxr train: ray.label_selector=ray.io/market-type=sopt: "), printed
    assert "on-demand" in line
    assert "Traceback" not in printed
    print(f"refused after {time.monotonic() - started:.0f} s: {line}")
