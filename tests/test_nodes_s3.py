"""Test jobs on a cluster of two nodes whose inputs and outputs are in a bucket, with a node lost in between."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Bucket, replace_ray, score_arguments
from nodes import Nodes, cluster, training_arguments, wait_until

from ray_cxr.cli import main

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1200)]
#: Many small files, so that some are pending when a node is lost; as in `score_arguments`.
COPIES, ROWS_PER_FILE = 24, 16


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with cluster(tmp_path_factory.mktemp("nodes") / "logs", a=0, b=0) as made:
        yield made


@pytest.fixture(scope="module")
def many(bucket: Bucket, phantoms: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, pd.DataFrame]:
    """Put phantoms and a manifest that names each of them many times into the bucket; some files are broken."""
    bucket.upload(phantoms.images, "cluster/images")
    given = ["manifest", phantoms.table, "--images", bucket("cluster/images"), "--out", bucket("cluster/m.parquet")]
    assert main([*map(str, given), "--split", "patient", "--fractions", "0.6,0.2,0.2", "--seed", "1"]) == 0
    one = tmp_path_factory.mktemp("many") / "many.parquet"
    one.write_bytes(bucket.get("cluster/m.parquet"))
    table = pd.read_parquet(one)
    table = pd.concat(
        [table.assign(image_id=[f"{copy}-{name}" for name in table["image_id"]]) for copy in range(COPIES)]
    )
    table.to_parquet(one, index=False)
    bucket.put("cluster/many.parquet", one.read_bytes())
    return bucket("cluster/many.parquet"), table


@pytest.fixture
def lost(nodes: Nodes) -> Iterator[None]:
    """Start the node `b` again at the end, for the next test."""
    yield
    nodes.add_node("b")


def list_files(out: str | Path, bucket: Bucket) -> dict[str, bytes]:
    """Return the files of a folder on a disk or in the bucket, by their name in the folder."""
    if isinstance(out, Path):
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    prefix = out.removeprefix("s3://chests/").partition("?")[0] + "/"
    return {key.removeprefix(prefix): bucket.get(key) for key in bucket.keys(prefix) if not key.endswith("/")}


def count_parts(out: str | Path, folder: str, bucket: Bucket) -> int:
    if isinstance(out, Path):
        return len(list((out / folder).glob("part-*.parquet")))
    return len(bucket.keys(f"{out.removeprefix('s3://chests/').partition('?')[0]}/{folder}/part-"))


def lose_node(nodes: Nodes, log: Path, out: str | Path, folder: str, files: int, bucket: Bucket) -> str:
    """Kill the node `b` while both nodes write files into a folder; return the output of the job, which succeeds."""
    workers = ("ray::MapWorker", "ray_cxr.imaging.sandbox")

    def has_begun() -> bool:
        return nodes.has_ended(log) or (
            count_parts(out, folder, bucket) >= 4 and nodes.find_nodes(*workers) >= {"a", "b"}
        )

    wait_until(has_begun, 300, log.read_text)
    nodes.kill("b")
    assert count_parts(out, folder, bucket) < files, f"all files were written before the loss: {log.read_text()}"
    code, printed = nodes.wait_for_job(log, 600)
    assert code == 0, printed
    assert "Traceback" not in printed
    return printed


def read_tables(files: dict[str, bytes], folder: str) -> pd.DataFrame:
    parts = sorted(name for name in files if name.startswith(f"{folder}/part-"))
    return pd.concat([pd.read_parquet(io.BytesIO(files[name])) for name in parts], ignore_index=True)


def test_every_step_in_a_bucket_with_a_lost_node(
    nodes: Nodes, lost: None, bucket: Bucket, many: tuple[str, pd.DataFrame], tmp_path: Path
) -> None:
    """`train` uses both nodes; `score` loses one and writes the same files as a run in one process."""
    address, table = many
    prepared, run, scores = (bucket(f"cluster/{name}") for name in ("prepared", "run", "scores"))
    bundle = bucket("cluster/run/bundle")
    for given in (
        ["prepare", bucket("cluster/m.parquet"), "--out", prepared, "--size", "64"],
        training_arguments(prepared, run, epochs=1, workers=2),  # type: ignore[arg-type]
    ):
        code, printed = nodes.wait_for_job(nodes.submit(given, name=f"s3-{given[0]}"), 300)
        assert code == 0, printed
    log = nodes.submit(score_arguments(bundle, address, scores), name="s3-score")  # type: ignore[arg-type]
    files = -(-len(table) // ROWS_PER_FILE)
    assert "files that they had in progress are retried" in lose_node(nodes, log, scores, "scores", files, bucket)
    for name in ("a", "b"):
        assert any((nodes.folder / f"cache-{name}").rglob("SHA256SUMS")), f"{name} fetched no bundle"

    found = list_files(scores, bucket)
    rows = read_tables(found, "scores")
    assert rows["image_id"].tolist() == table["image_id"].tolist()
    assert set(rows["status"]) == {"ok", "error"}
    assert "_SUCCESS" in found
    with replace_ray():
        assert main(score_arguments(bundle, address, tmp_path / "alone")) == 0  # type: ignore[arg-type]
    alone = list_files(tmp_path / "alone", bucket)
    assert set(found) == set(alone)
    for name in alone:
        if name.startswith("scores/"):
            assert found[name] == alone[name], name

    report = ["report", scores, "--manifest", address, "--split", "test", "--out", bucket("cluster/report")]
    code, printed = nodes.wait_for_job(nodes.submit(report, name="s3-report"), 300)
    assert code == 0, printed
    metrics = json.loads(bucket.get("cluster/report/metrics.json"))
    assert metrics["n_images"] == (rows["status"].eq("ok") & table["split"].eq("test").to_numpy()).sum()


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_heat_maps_with_a_lost_node(
    nodes: Nodes,
    lost: None,
    bucket: Bucket,
    many: tuple[str, pd.DataFrame],
    tiny_bundle: Any,
    tmp_path: Path,
    place: str,
) -> None:
    """Each requested map is there once, and is that of a run in one process; no file is incomplete."""
    address, table = many
    out = tmp_path / "scores" if place == "disk" else bucket("cluster/maps")
    alone = tmp_path / "alone"
    with replace_ray():
        for folder in (out, alone):
            assert main(score_arguments(tiny_bundle.path, address, folder)) == 0  # type: ignore[arg-type]
    more = ("--heatmaps", 3, "--set", "heatmap_pixels=128")
    given = score_arguments(tiny_bundle.path, address, out, *more)  # type: ignore[arg-type]
    log = nodes.submit(given, name=f"maps-{place}")
    lose_node(nodes, log, out, "heatmaps", -(-len(table) // ROWS_PER_FILE), bucket)
    with replace_ray():
        assert main(score_arguments(tiny_bundle.path, address, alone, *more)) == 0  # type: ignore[arg-type]

    found, expected = list_files(out, bucket), list_files(alone, bucket)
    assert set(found) == set(expected)
    for name in found:
        if name.endswith(".jpg"):
            assert found[name][-2:] == b"\xff\xd9", f"{name} is incomplete"
    maps, same = read_tables(found, "heatmaps"), read_tables(expected, "heatmaps")
    assert not maps.duplicated(["image_id", "finding"]).any()
    np.testing.assert_allclose(np.stack(maps.pop("map")), np.stack(same.pop("map")), rtol=0, atol=1e-6)
    pd.testing.assert_frame_equal(maps, same, rtol=0, atol=1e-5)
