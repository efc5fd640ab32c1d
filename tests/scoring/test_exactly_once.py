"""Every row is written exactly once when processes are killed: real Ray, real SIGKILLs, rows read from the files."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_noise
from nodes import wait_until
from score_folders import (
    arguments,
    assert_done,
    count_parts,
    find_processes,
    modification_times,
    read_maps,
    read_rows,
    start_command,
)

ROWS, ROWS_PER_FILE, MISSING = 640, 16, [5, 500]
IDS = [f"{row:05d}.png" for row in range(ROWS)]


@pytest.fixture(scope="module")
def large_manifest(tmp_path_factory) -> Path:
    """A manifest of enough large images that a run can be killed in the middle; two rows have no file."""
    folder = tmp_path_factory.mktemp("large_manifest")
    images = write_noise(folder)
    paths = [str(folder / "none.png" if row in MISSING else images[row % 6]) for row in range(ROWS)]
    pq.write_table(pa.table({"image_id": IDS, "path": paths}), folder / "m.parquet")
    return folder / "m.parquet"


def assert_each_row_once(out: Path) -> None:
    assert {path.name[:5] for path in (out / "scores").iterdir()} == {"part-"}
    table = read_rows(out)
    assert table["image_id"].tolist() == IDS
    assert table["error_code"].dropna().to_dict() == dict.fromkeys(MISSING, "missing")
    ok = table[table["status"] == "ok"]
    p = ok.filter(regex="^p_").to_numpy()
    for image in range(6):  # rows of the same image have the same scores
        assert np.ptp(p[ok.index % 6 == image], axis=0).max() < 1e-5
    assert (out / "_SUCCESS").exists()


@pytest.mark.ray
@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    ("victim", "folder"),
    [
        ("command", "scores"),
        pytest.param("command", "heatmaps", marks=pytest.mark.long),
        pytest.param("command", "features", marks=pytest.mark.long),
        pytest.param("raylet", "scores", marks=pytest.mark.long),
    ],
)
def test_killed_command_continues(large_manifest, tiny_bundle, tmp_path: Path, victim: str, folder: str) -> None:
    """The same command finishes the run and keeps the finished files. Its Ray has one CPU.

    With features, the images come from a prepared set.
    """
    out, log = tmp_path / "out", tmp_path / "log"
    maps = ["--heatmaps", "1"] if folder == "heatmaps" else []
    given = arguments(tiny_bundle, large_manifest, out, "--set", "ray.num_cpus=1", *maps)
    if folder == "features":
        made = ["prepare", str(large_manifest), "--out", str(tmp_path / "set"), "--size", "64"]
        assert start_command(made, log).wait(300) == 0, log.read_text(encoding="utf-8")
        place = given.index("--manifest")
        # Copies of each image, so that the run takes long enough to be killed.
        given[place : place + 2] = ["--prepared", str(tmp_path / "set"), "--features", "--set", "tta=16"]
    process = start_command(given, log)
    wait_until(lambda: count_parts(out, folder) >= 3 or process.poll() is not None, 200)
    assert process.poll() is None, log.read_text(encoding="utf-8")
    if victim == "raylet":
        for raylet in find_processes("/raylet/raylet", process.pid):
            os.kill(raylet, signal.SIGKILL)
        assert process.wait(200) not in (0, -signal.SIGKILL), log.read_text(encoding="utf-8")
        for remaining in find_processes("ray", process.pid):
            os.kill(remaining, signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    wait_until(lambda: not find_processes("ray_cxr.imaging.sandbox", process.pid), 200)
    assert count_parts(out, folder) < ROWS // ROWS_PER_FILE
    assert not (out / "_SUCCESS").exists()
    kept = modification_times(out, "part-*.parquet")

    assert start_command(given, log).wait(300) == 0, log.read_text(encoding="utf-8")
    assert_each_row_once(out)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert (run["rows"], run["errors"]) == (ROWS, len(MISSING))
    if folder == "features":
        parts = [pq.read_table(part) for part in sorted((out / "features").glob("*.parquet"))]
        table = pa.concat_tables(parts)
        assert table["image_id"].to_pylist() == IDS
        assert np.flatnonzero(table["features"].is_null()).tolist() == MISSING
    elif folder == "scores":
        assert (run["actors"], run["cpus_per_actor"]) == (1, 1)
    else:
        assert read_maps(out)["image_id"].tolist() == read_rows(out).query("status == 'ok'")["image_id"].tolist()
        names = {path.name for path in (out / "heatmaps").glob("*.jpg")}
        assert names == set(read_maps(out)["overlay"].dropna())


@pytest.mark.ray
def test_killed_actor_and_decoders_restart(shared_ray, large_manifest, tiny_bundle, tmp_path: Path, command) -> None:
    """One command survives both kills; only the ranges in progress are scored again."""
    out, killed, kept = tmp_path / "out", [], {}

    def kill() -> None:
        wait_until(lambda: count_parts(out) >= 2, 200)
        for decoder in find_processes("ray_cxr.imaging.sandbox"):
            os.kill(decoder, signal.SIGKILL)
            killed.append("decoder")
        wait_until(lambda: count_parts(out) >= 6, 200)
        kept.update(modification_times(out, "part-*.parquet"))
        for actor in find_processes("ray::MapWorker")[:1]:
            os.kill(actor, signal.SIGKILL)
            killed.append("actor")

    thread = threading.Thread(target=kill)
    thread.start()
    outcome = command(*arguments(tiny_bundle, large_manifest, out))
    thread.join()
    assert_done(outcome)
    assert set(killed) == {"actor", "decoder"}
    assert_each_row_once(out)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
