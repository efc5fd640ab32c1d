"""What real tasks of Ray Data bring back: errors as one line, retries that end, no timeout while nothing returns."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import score_arguments
from ray.exceptions import RaySystemError

from ray_cxr import tasks
from ray_cxr.errors import OutputError, RayCxrError

pytestmark = pytest.mark.ray
Command = Callable[..., tuple[int, str, str]]


def run(function: Callable[..., Any], count: int = 1) -> tuple[list[dict[str, Any]], list[int]]:
    """Send tasks through a function; return its rows and the number of tasks in each round."""
    rounds: list[int] = []

    def build(pending: list[tasks.Task]) -> Any:
        import ray

        rounds.append(len(pending))
        dataset = ray.data.from_items(pending, override_num_blocks=len(pending))
        return tasks.map_once(dataset, function, num_cpus=1)

    def keep_all(pending: list[tasks.Task], done: set[int]) -> list[tasks.Task]:
        return [task for task in pending if not done.issuperset(task["indices"])]

    return list(tasks.run_with_retries([{"indices": [index]} for index in range(count)], build, keep_all)), rounds


def test_silent_task_outlives_the_limit_of_ray_data(shared_ray: None, monkeypatch, caplog) -> None:
    from ray.data import DataContext

    def sleep(task: tasks.Task) -> dict[str, Any]:
        import time

        time.sleep(4)
        return {"done": task["indices"], "error": ""}

    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 1)
    monkeypatch.setattr(tasks, "STALL_S", 1.0)
    with caplog.at_level(logging.WARNING), tasks.poll(lambda: False, "prepare"):
        rows, _ = run(sleep)
    assert [list(row["done"]) for row in rows] == [[0]]
    assert "prepare: WARNING: no file finished" in caplog.text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OutputError("the folder is of another run"), OutputError),
        (RaySystemError("an error that repeats"), RayCxrError),
        pytest.param(OSError(28, "No space left on device", "out/part"), RayCxrError, marks=pytest.mark.long),
        pytest.param(ValueError("some reason"), RayCxrError, marks=pytest.mark.long),
    ],
)
def test_error_that_a_task_raises_is_one_line(shared_ray: None, error: Exception, expected: type[Exception]) -> None:
    def fail(task: tasks.Task) -> dict[str, Any]:
        raise error

    with pytest.raises(RayCxrError) as caught:
        run(fail)
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value)


def test_tasks_whose_workers_keep_dying_end_the_run(shared_ray: None) -> None:
    def die(task: tasks.Task) -> dict[str, Any]:
        import os

        os._exit(1)

    started = time.monotonic()
    with pytest.raises(RayCxrError, match="2 output files pending"):
        run(die, 2)
    assert time.monotonic() - started < 100


@pytest.mark.long
def test_lost_task_is_retried(shared_ray: None, tmp_path: Path) -> None:
    marker = str(tmp_path / "marker")

    def die_once(task: tasks.Task) -> dict[str, Any]:
        import os

        if task["indices"][0] == 1 and not os.path.exists(marker):
            open(marker, "w").close()
            os._exit(1)
        return {"done": task["indices"], "error": ""}

    rows, rounds = run(die_once, 3)
    assert sorted(index for row in rows for index in row["done"]) == [0, 1, 2]
    assert len(rounds) == 2


@pytest.mark.parametrize(
    "folder", ["prepare", *(pytest.param(f, marks=pytest.mark.long) for f in ("score", "heatmaps"))]
)
def test_command_reports_a_folder_that_cannot_be_written_in_one_line(
    shared_ray: None, manifest: Path, tiny_bundle: Any, scores: Path, command: Command, tmp_path: Path, folder: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    # Not even root can make a file in /proc.
    name = {"prepare": "64", "score": "scores", "heatmaps": "heatmaps"}[folder]
    os.symlink("/proc", out / name)
    if folder == "prepare":
        given = ["prepare", str(manifest), "--out", str(out), "--size", "64"]
    else:
        more = ["--heatmaps", "1", "--limit", "16"] if folder == "heatmaps" else ["--limit", "16"]
        given = score_arguments(tiny_bundle.path, manifest, out, *more)
    code, _, err = command(*given)
    assert code == 1, err
    assert "Traceback" not in err
    (last,) = [line for line in err.splitlines() if line.startswith(f"ray-cxr {given[0]}: ")]
    assert name in last
