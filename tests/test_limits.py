"""Errors about too little memory and too few processes: real texts of Ray 2.60, of the system and of Python."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, WorkerCrashedError
from ray.train.v2.api.exceptions import WorkerGroupError

from ray_cxr import limits, tasks
from ray_cxr.errors import RayCxrError

#: Of Ray's memory monitor; an actor's error has the same lines.
RAYS_TEXT = (
    "Task was killed due to the node running low on memory.\n"
    "Memory on the node (IP: 10.0.0.7, ID: 5d1e) was 22.83GB used / 24.00GB limit (0.951250)\n"
    "1 worker(s) were killed due to the node running low on memory. \n"
    "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/en/latest/x.html."
)
#: Of an actor that the kernel ended, for example at the memory limit of a Slurm job or of a container.
KERNELS_TEXT = (
    "The actor died unexpectedly before finishing this task.\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by SIGKILL by OOM killer due to high memory usage. (2) ray stop --force is called. (3) The worker is "
    "crashed unexpectedly due to SIGSEGV or other unexpected errors."
)
LOST = "a worker process died; the usual cause is too little memory: less"
MEMORY = "the node 10.0.0.7 ran out of memory (22.83 of 24.00 GB in use), so Ray ended a worker; "


def wrapped(error: BaseException) -> RuntimeError:
    outer = RuntimeError("training failed")
    outer.__cause__ = error
    return outer


def died(text: str) -> ActorDiedError:
    error = ActorDiedError()
    error.args = (text,)
    error.error_msg = text
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OutOfMemoryError(RAYS_TEXT), MEMORY),
        (died(RAYS_TEXT), MEMORY),
        (wrapped(OutOfMemoryError(RAYS_TEXT)), MEMORY),
        (WorkerGroupError("a worker failed", {0: OutOfMemoryError(RAYS_TEXT)}), MEMORY),
        (died(KERNELS_TEXT), LOST),
        (wrapped(died(KERNELS_TEXT)), LOST),
        (WorkerGroupError(KERNELS_TEXT, {0: died(KERNELS_TEXT)}), LOST),
        (WorkerGroupError(KERNELS_TEXT, {0: OutOfMemoryError(RAYS_TEXT)}), MEMORY),
        (OutOfMemoryError("in other words"), "a node ran out of memory, so Ray ended a worker; less"),
        (MemoryError(), "the memory is used up; less"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the memory is used up; less"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no further process or thread can be"),
        (RuntimeError("can't start new thread"), "no further process or thread can be started (ulimit -u is 350)"),
        (WorkerCrashedError(), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (ValueError("memory of a patient"), None),
        (None, None),
    ],
)
def test_the_cause_of_a_loss_is_named(error: BaseException | None, reason: str | None, monkeypatch) -> None:
    monkeypatch.setattr(limits, "_read_user_limit", lambda: [350])
    monkeypatch.setattr(limits, "_read_container_limit", list)
    found = limits.explain_loss(error, "less")
    assert found == reason if reason is None else str(found).startswith(reason)


@pytest.mark.parametrize(("command", "setting"), [("prepare", "rows_per_shard"), ("score", "cpus_per_actor")])
@pytest.mark.parametrize("is_raised", [False, True])
def test_tasks_that_memory_ends_again_and_again_end_the_command(
    command: str, setting: str, is_raised: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray Data skips a lost task and logs its exception, or raises it when too many were lost."""
    rounds = 0

    class Dataset:
        def iter_rows(self) -> Iterator[dict[str, Any]]:
            nonlocal rounds
            rounds += 1
            yield {"done": [], "error": ""}
            if is_raised:
                raise OutOfMemoryError(RAYS_TEXT)
            log = logging.getLogger("ray.data._internal.execution.streaming_executor_state")
            log.error("An exception was raised from a task.", exc_info=OutOfMemoryError(RAYS_TEXT))

    with pytest.raises(RayCxrError) as caught:
        list(tasks.run_with_retries([{"indices": [7]}], lambda _: Dataset(), lambda pending, _: pending, command))
    message = str(caught.value)
    assert rounds == tasks.MAX_IDLE_ROUNDS
    assert message.startswith("workers keep dying (1 output files pending, last with OutOfMemoryError): ")
    assert MEMORY in message
    assert setting in message
    assert "\n" not in message
    assert f"workers were lost ({MEMORY}" in caplog.text


def test_a_task_without_memory_names_the_setting() -> None:
    error = tasks.sanitize_error(BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "prepare")
    assert str(error).startswith("prepare: no further process or thread can be started (")
    assert "ray.num_cpus" in str(error)


@pytest.mark.parametrize(
    ("free", "outcome"), [(None, "starts"), (400, "starts"), (399, "warns"), (180, "warns"), (179, "is refused")]
)
def test_ray_is_refused_before_it_starts_if_its_processes_cannot_run(
    free: int | None, outcome: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "count_free_processes", lambda: free)
    monkeypatch.setattr(limits, "_read_user_limit", lambda: [500])
    monkeypatch.setattr(limits, "_read_container_limit", list)
    monkeypatch.setattr(limits, "shortage", None)
    shortage = f"about 400 processes and threads are needed on 2 CPUs, but only {free} more can be started (ulimit -u"
    if outcome == "is refused":
        with pytest.raises(RayCxrError) as caught:
            limits.check_processes(2)
        assert str(caught.value).startswith(f"Ray: {shortage} is 500); raise that limit, ")
        return
    limits.check_processes(2)
    assert (shortage in caplog.text) == (outcome == "warns")
    # A worker that aborts when it starts a thread leaves no other reason.
    assert str(limits.explain_loss(WorkerCrashedError(), "less")).startswith(shortage) == (outcome == "warns")


def test_free_processes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_read_container_limit", lambda: [(100, 70)])
    monkeypatch.setattr(limits, "_read_user_limit", list)
    assert limits.count_free_processes() == 30
    monkeypatch.setattr(limits, "_read_container_limit", list)
    monkeypatch.setattr(limits, "_read_user_limit", lambda: [50])
    user = limits.psutil.Process().uids().real
    processes = [
        {"uids": SimpleNamespace(real=user), "num_threads": 7},
        {"uids": SimpleNamespace(real=user), "num_threads": 5},
        {"uids": SimpleNamespace(real=user + 1), "num_threads": 20},
        {"uids": None, "num_threads": None},  # access denied
    ]
    monkeypatch.setattr(limits.psutil, "process_iter", lambda _: [SimpleNamespace(info=info) for info in processes])
    assert limits.count_free_processes() == 38
    monkeypatch.setattr(limits, "_read_container_limit", lambda: [(100, 90)])
    assert limits.count_free_processes() == 10
    monkeypatch.setattr(limits, "_read_container_limit", list)
    monkeypatch.setattr(limits, "_read_user_limit", list)
    assert limits.count_free_processes() is None
