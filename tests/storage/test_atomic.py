"""Files and folders are whole or absent."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_cxr.storage import atomic


def test_file_is_flushed_under_a_hidden_name_and_then_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, events = tmp_path / "a.parquet", []
    real_fsync, real_replace = os.fsync, os.replace

    def produce(part: Path) -> None:
        pq.write_table(pa.table({"x": [1]}), part)
        assert not target.exists()
        assert part.parent == tmp_path
        assert part.name.startswith("."), "a reader of *.parquet must not see it"
        events.append(("written", part.stat().st_ino, part.stat().st_size))

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        events.append(("flushed", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    def replace(source: Path, destination: Path) -> None:
        events.append(("renamed", source.stat().st_ino, source.stat().st_size))
        real_replace(source, destination)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    atomic.write(target, produce)
    assert [event for event, *_ in events] == ["written", "flushed", "renamed"]
    assert {(inode, size) for _, inode, size in events} == {(target.stat().st_ino, target.stat().st_size)}
    assert pq.read_table(target)["x"].to_pylist() == [1]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    atomic.write_json(target, {"b": "ä", "a": 1})

    def fail(part: Path) -> None:
        part.write_text("half", encoding="utf-8")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        atomic.write(target, fail)
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(target, {"auroc": math.nan})
    assert list(tmp_path.iterdir()) == [target]
    assert list(json.loads(target.read_bytes()).items()) == [("b", "ä"), ("a", 1)]


def test_an_error_of_the_file_system_names_the_file(tmp_path: Path) -> None:
    """Arrow's own error names none."""

    def write(part: Path) -> None:
        part.symlink_to("/dev/full")
        pq.write_table(pa.table({"x": [1]}), part)

    with pytest.raises(OSError, match="No space left") as caught:
        atomic.write(tmp_path / "a.parquet", write)
    assert caught.value.filename == str(tmp_path / "a.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(RuntimeError), atomic.new_folder(target, "last.txt") as part:
        raise RuntimeError("the disk is full")
    assert list(tmp_path.iterdir()) == []
    part.mkdir()
    (part / "half.txt").touch()  # as a killed process leaves it
    with atomic.new_folder(target, "last.txt") as part:
        (part / "last.txt").touch()
        assert not target.exists()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["bundle", "bundle/last.txt"]
