"""Checkpoints go to a slow or broken store while training continues: none is half visible, none is lost silently."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
from nodes import cluster, training_arguments, wait_until
from slow_store import SlowStore
from test_kill import SETTINGS, act_in_mid_epoch_2, arguments, assert_same_bits

from ray_cxr import ray_api
from ray_cxr.config import TrainSettings, build
from ray_cxr.errors import InputError, RayCxrError
from ray_cxr.ray_api import CHECKPOINT_LIST
from ray_cxr.storage import remote
from ray_cxr.training import checkpoints, trainer, uploads


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))


def make_checkpoint(uploader: uploads.Uploads) -> Path:
    folder = uploader.make_folder()
    for name in ("a", "b"):
        (folder / name).write_text(name, encoding="utf-8")
    return folder


def test_a_refused_checkpoint_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    """Ray Train would restart the workers, which would train until the next refusal."""
    with SlowStore() as store:
        uploader = uploads.Uploads(remote.to_path(store("refused/run")))
        checkpoint = ray.train.Checkpoint.from_directory(make_checkpoint(uploader))
        store.refuse = lambda path: 403 if path.endswith("/b") else None
        with pytest.raises(InputError, match=r"refused/run/ray/one/b\?.*access denied") as caught:
            uploader.upload(checkpoint, "one")
        record = json.loads(store.get("refused/run/failure.json"))
        assert (record["type"], record["message"]) == ("InputError", str(caught.value))


def test_an_outage_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(uploads, "time", SimpleNamespace(sleep=waits.append))
    write, calls = uploads.atomic.write, iter([None, RayCxrError("no answer"), OSError(5, "I/O error"), None, None])

    def fail(path: Path, produce: Callable[[Path], object]) -> None:
        if error := next(calls, RayCxrError("no answer again")):
            raise error
        write(path, produce)

    monkeypatch.setattr(uploads.atomic, "write", fail)
    (tmp_path / "ray").mkdir()
    uploader = uploads.Uploads(tmp_path)
    checkpoint = ray.train.Checkpoint.from_directory(make_checkpoint(uploader))
    stored = uploader.upload(checkpoint, "one")
    assert (Path(stored.path), waits) == (tmp_path / "ray" / "one", list(uploads.RETRY_AFTER_S[:2]))
    assert {path.name: path.read_text() for path in Path(stored.path).iterdir()} == {"a": "a", "b": "b"}
    assert not (tmp_path / "failure.json").exists()
    with pytest.raises(RayCxrError, match="no answer again"):
        uploader.upload(checkpoint, "two")


def test_checkpoints_do_not_fill_the_local_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a store slower than the checkpoints, training waits."""
    reported: list[Path] = []
    monkeypatch.setattr(ray_api, "report", lambda metrics, checkpoint, **_: reported.append(Path(checkpoint.path)))
    uploader = uploads.Uploads(tmp_path)
    folders = [make_checkpoint(uploader) for _ in range(uploads.MAX_PENDING + 1)]
    for folder in folders[:-1]:
        uploader.report({}, folder)
    last = threading.Thread(target=uploader.report, args=({}, folders[-1]))
    last.start()
    time.sleep(4 * uploads._POLL_S)
    assert reported == folders[:-1]
    uploads.shutil.rmtree(folders[0])  # as Ray Train does after an upload
    last.join(10)
    assert reported == folders


def test_workers_without_a_checkpoint_wait_too_and_count_as_alive(tmp_path: Path) -> None:
    """Otherwise the watchdog would end them while rank 0 waits for a slow store."""
    others, beats = iter([True, True, False]), []
    uploads.Uploads(tmp_path, lambda own: own or next(others), lambda: beats.append(1)).wait(1)
    assert len(beats) == 2


def test_checkpoints_of_killed_workers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os, pathlib; from ray_cxr.training.uploads import Uploads; "
    code += "Uploads(pathlib.Path()).make_folder(); os._exit(1)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    (left,) = tmp_path.iterdir()
    own = uploads.Uploads(tmp_path).make_folder()
    uploads.Uploads(tmp_path)
    assert (left.exists(), own.exists()) == (False, True)


def test_what_a_kill_left_of_a_checkpoint_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["checkpoint_1", "checkpoint_2", "checkpoint_3"]
    for name in names:
        (tmp_path / "ray" / name).mkdir(parents=True)
        (tmp_path / "ray" / name / "progress.json").touch()
    (tmp_path / "ray" / CHECKPOINT_LIST).touch()
    kept = [SimpleNamespace(path=str(tmp_path / "ray" / name)) for name in names[:2]]
    result = SimpleNamespace(checkpoint=kept[1], best_checkpoints=[(one, {}) for one in kept])
    monkeypatch.setattr(checkpoints, "read_result", lambda out: result)
    checkpoints.remove_incomplete(tmp_path)
    assert {path.name for path in (tmp_path / "ray").iterdir()} == {*names[:2], CHECKPOINT_LIST}


def list_complete(store: SlowStore, run: str) -> tuple[set[str], set[str]]:
    """Return the checkpoints in Ray Train's list, and the folders of checkpoints."""
    listed = json.loads(store.get(f"{run}/ray/{CHECKPOINT_LIST}"))
    names = {entry["checkpoint_dir_name"] for entry in listed["checkpoint_results"]}
    keys = [key.removeprefix(f"{run}/ray/") for key in store.keys(f"{run}/ray/checkpoint_")]
    return names, {key.partition("/")[0] for key in keys if "/" in key and not key.endswith("/")}


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_end_waits_for_the_last_upload(uninterrupted, prepared: Path, command, tmp_path: Path) -> None:
    """An upload takes longer than an epoch here. Without the wait, the bundle would be of an earlier epoch."""
    with SlowStore(bytes_per_second=300_000) as store:
        code, _, error = command(*arguments(prepared, store("end/run"), 2))
        assert code == 0, error
        assert store.running == []
        listed, folders = list_complete(store, "end/run")
        assert folders == listed
        assert_same_bits(store.download("end/run", tmp_path / "run"), uninterrupted.out)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_lost_during_an_upload_costs_only_that_checkpoint(
    rank: int, uninterrupted, prepared: Path, tmp_path: Path
) -> None:
    """The third checkpoint, of epoch 2, is half stored when the worker is killed; the run continues from the second."""
    held, starts, folders = tmp_path / "held", [], []
    run = f"lost-{rank}/run"  # the tests of a process share what servers hold

    def has_two() -> bool:
        listed = f"{run}/ray/{CHECKPOINT_LIST}" in store.keys(f"{run}/ray/")
        return listed and len(list_complete(store, run)[0]) == 2

    def hold(path: str) -> int | None:
        if path.endswith("/started.json"):
            starts.append(path)
        folder, is_file, _ = path.partition("/ray/checkpoint_")[2].partition("/")  # Ray's list is not in a folder
        if is_file and folder not in folders:
            folders.append(folder)
        if is_file and folders.index(folder) == 2 and path.endswith("state.npz"):
            wait_until(has_two, 60)  # Ray Train lists a stored checkpoint a moment later
            held.touch()
            wait_until(lambda: len(starts) == 2, 120)
            return 500
        return None

    def kill() -> None:
        import os
        import signal
        import time

        while not held.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    lines: list[str] = []
    callbacks = act_in_mid_epoch_2(rank, tmp_path / "marker", kill)
    settings = build(TrainSettings, SETTINGS | {"workers": 2})
    with SlowStore() as store:
        store.refuse = hold
        trainer.train(prepared, store(run), settings, callbacks=callbacks, on_event=lines.append)
        lost = next(i for i, line in enumerate(lines) if "a worker failed or was lost" in line)
        assert "epoch 2 after step 0" in lines[lost + 1]
        listed, stored = list_complete(store, run)
        assert stored == listed, "what was half stored is removed"
        assert_same_bits(store.download(run, tmp_path / "run"), uninterrupted.out)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("status", "part", "code", "expected"),
    [
        (403, "/ray/checkpoint_", 2, "access denied"),
        (500, "/ray/checkpoint_", 1, "cannot be written"),
        (403, "/run/", 2, "access denied"),
    ],
)
def test_a_store_that_takes_no_checkpoint_ends_the_run(
    status: int, part: str, code: int, expected: str, shared_ray, prepared: Path, command, monkeypatch
) -> None:
    """After the first step: with one line, and neither with a bundle nor after hours."""

    def retry_soon() -> list[object]:
        from ray_cxr.training import uploads

        uploads.RETRY_AFTER_S = (0.5,)
        return []

    with SlowStore() as store:
        started: list[str] = []

        def refuse(path: str) -> int | None:
            if path.endswith("/started.json"):
                started.append(path)
            return status if started and part in path else None

        store.refuse = refuse
        name = f"refused-{status}-{len(part)}/run"
        monkeypatch.setattr(trainer, "train", functools.partial(trainer.train, callbacks=retry_soon))
        found, _, error = command(*arguments(prepared, store(name), 2))
        lines = [line for line in error.splitlines() if line.startswith("ray-cxr train:")]
        assert found == code, error
        assert len(lines) == 1
        assert expected in lines[0]
        assert f"s3://slow/{name}" in lines[0]
        assert not store.keys(f"{name}/bundle")


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_reclaimed_machine_with_a_slow_store(prepared: Path, tmp_path: Path) -> None:
    """The checkpoint of the notice is stored before the machine is gone, and the run continues from it."""
    settings = {"epochs": 200, "workers": "1-2", "cpus_per_worker": 2, "batch_size": 1}
    with SlowStore(bytes_per_second=1_000_000) as store, cluster(tmp_path / "nodes") as nodes:
        for name in ("k", "l"):
            nodes.add_node(name, cpus=2)
        log = nodes.start(training_arguments(prepared, store("spot/run"), **settings), name="slow")

        def wait_for(text: str, seconds: float) -> None:
            wait_until(lambda: text in log.read_text() or nodes.has_ended(log), seconds, log.read_text)
            assert text in log.read_text(), log.read_text()

        wait_for("first step done", 300)
        nodes.drain("l", 30)
        wait_for("is going away; checkpoint written", 60)
        time.sleep(15)  # Ray Train lists a stored checkpoint at its next polls; the notice leaves half a minute
        nodes.kill("l")
        wait_for("train: continues in epoch", 300)
        text = log.read_text()
        print(text)
    written, after = (text.partition(mark)[2].split("\n")[0] for mark in ("checkpoint written in ", "continues in "))
    assert [int(word) for word in after.split() if word.isdecimal()] >= [
        int(word) for word in written.split() if word.isdecimal()
    ]
