"""Locks of run folders, files of operating systems in them, and names of folders with any character."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import socket
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import score_arguments

from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import OutputError
from ray_cxr.imaging.overlays import has_heatmaps
from ray_cxr.storage import atomic, remote, run_folder
from ray_cxr.storage.paths import is_system_file

#: Characters that addresses, patterns or shells interpret, and a name with all of them.
ODD = [
    "?",
    "#",
    "%",
    "%20",
    "*",
    "[",
    "]",
    "{",
    "}",
    "{0}",
    "&",
    ";",
    "'",
    '"',
    " ",
    "~",
    "=",
    ":",
    "::",
    "\n",
    "\\",
    "é",
]
ODD_NAME = "s" + "".join(ODD) + "s"


def test_the_second_command_in_a_folder_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    with run_folder.lock(out, "train"):
        holder = f"`ray-cxr train` (process {os.getpid()} on {socket.gethostname()})"
        for command in ("train", "score"):
            with pytest.raises(OutputError) as caught, run_folder.lock(out, command):
                pytest.fail("locked twice")
            assert str(caught.value).startswith(f"{out}: {holder} is writing here; ")
        with run_folder.lock(tmp_path / "other", "train"):
            pass
    assert not out.exists(), "a command that wrote nothing leaves nothing"
    assert not (tmp_path / "other").exists()


def test_the_lock_is_removed_with_its_command_and_the_rest_of_the_folder_stays(tmp_path: Path) -> None:
    with run_folder.lock(tmp_path / "run", "train"):
        (tmp_path / "run" / "settings.json").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["settings.json"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZeroDivisionError), run_folder.lock(tmp_path / "empty", "train"):
        raise ZeroDivisionError
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_lock_of_a_killed_command_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("`ray-cxr train` (process 1234567 on elsewhere)" + " " * 80, encoding="utf-8")
    with run_folder.lock(tmp_path, "score"):
        text = (tmp_path / ".lock").read_text(encoding="utf-8")
        assert text == f"`ray-cxr score` (process {os.getpid()} on {socket.gethostname()})"


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch) -> None:
    flock, calls = fcntl.flock, []

    def remove_first(descriptor: int, operation: int) -> None:
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with run_folder.lock(tmp_path, "train"):
        assert len(calls) == 2
        with pytest.raises(OutputError), run_folder.lock(tmp_path, "train"):
            pytest.fail("locked twice")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch, caplog, code: int) -> None:
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(code, os.strerror(code))))
    with caplog.at_level(logging.WARNING, "ray_cxr"), run_folder.lock(tmp_path, "train"):
        pass
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path}: this file system has no locks ({os.strerror(code)})")


def test_a_bucket_has_no_lock() -> None:
    out = remote.StorePath("chests", "run")
    with run_folder.lock(out, "train"), run_folder.lock(out, "train"):  # sends no request
        pass


def test_commands_are_refused_before_ray_starts(tmp_path: Path, command, monkeypatch, tiny_bundle, manifest) -> None:
    monkeypatch.setattr("ray_cxr.session.start_ray", lambda *_, **__: pytest.fail("Ray starts"))
    for line in (
        ["prepare", manifest, "--size", 64],
        ["score", "--model", tiny_bundle.path, "--manifest", manifest],
    ):
        with run_folder.lock(tmp_path / "out", "tune"):
            code, _, error = command(*line, "--out", tmp_path / "out")
        assert code == 2
        assert error.startswith(f"ray-cxr {line[0]}: {tmp_path / 'out'}: `ray-cxr tune` (process ")


def test_train_report_and_export_are_refused_at_their_start(
    tmp_path: Path, command, monkeypatch, prepared, scores
) -> None:
    monkeypatch.setattr("ray_cxr.session.start_ray", lambda *_, **__: pytest.fail("Ray starts"))
    train = ["train", prepared, "--set", "backbone=TinyCNN", "--set", "weights=none", "--set", "size=64"]
    for line in (train, ["report", scores], ["export-sr", scores]):
        with run_folder.lock(tmp_path / "out", "tune"):
            code, _, error = command(*line, "--out", tmp_path / "out")
            assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
        assert code == 2
        assert error.startswith(f"ray-cxr {line[0]}: {tmp_path / 'out'}: `ray-cxr tune` (process ")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (".DS_Store", True), ("._model.weights.h5", True), ("Thumbs.db", True), ("thumbs.db", True),
        ("desktop.ini", True), ("ehthumbs.db", True), ("@eaDir", True), ("Thumbs.db.py", False),
        ("part.parquet", False), ("DS_Store", False), ("extra.py", False),
    ],
)  # fmt: skip
def test_files_of_operating_systems(name: str, expected: bool) -> None:
    assert is_system_file(name) is expected


def test_a_folder_with_files_of_operating_systems_alone_is_empty(tmp_path: Path) -> None:
    for name in (".DS_Store", "Thumbs.db", "._a", ".lock"):
        (tmp_path / name).touch()
    run_folder.refuse_foreign(tmp_path, "score")
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(OutputError, match="holds files but no run of score"):
        run_folder.refuse_foreign(tmp_path, "score")


@pytest.mark.parametrize("odd", ODD)
def test_odd_names_are_inside_their_own_folder_only(tmp_path: Path, odd: str) -> None:
    folder = tmp_path / f"scores{odd}1"
    assert remote.is_inside(folder, folder)
    assert remote.is_inside(folder / "report", folder)
    assert remote.is_inside(folder / f"a{odd}b" / "c", folder)
    for outside in (tmp_path / f"scores{odd}2", tmp_path / "scores", tmp_path, tmp_path / f"scores{odd}1-report"):
        assert not remote.is_inside(outside, folder)


def test_links_lead_inside(tmp_path: Path) -> None:
    (tmp_path / "scores").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scores")
    assert remote.is_inside(tmp_path / "link" / "report", tmp_path / "scores")
    assert not remote.is_inside(tmp_path / "scores-report", tmp_path / "link")


@pytest.mark.slow
def test_a_report_in_odd_folders(tmp_path: Path, command, scores: Path) -> None:
    folder = tmp_path / ODD_NAME
    shutil.copytree(scores, folder / "scores?1")
    code, _, error = command("report", folder / "scores?1", "--out", folder / "scores?2")
    assert (code, error) == (0, "")
    assert {"report.html", "report.md", "metrics.json"} <= {path.name for path in (folder / "scores?2").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == [ODD_NAME]


def test_files_of_operating_systems_change_no_result(
    tmp_path: Path, command, monkeypatch, scores: Path, prepared: Path, tiny_bundle, manifest: Path
) -> None:
    monkeypatch.setattr("ray_cxr.session.start_ray", lambda *_, **__: pytest.fail("Ray starts"))
    shutil.copytree(scores, tmp_path / "scores")
    shutil.copytree(prepared, tmp_path / "prepared")
    (tmp_path / "scores" / "heatmaps").mkdir()  # as `--fresh` leaves it
    for folder in ("scores", "scores/scores", "scores/heatmaps", "prepared", "prepared/64"):
        for name in (".DS_Store", "Thumbs.db", "._part-00000.parquet", "._part-00000.arrow"):
            (tmp_path / folder / name).write_bytes(b"\0\5\26\7")
    code, out, error = command(*score_arguments(tiny_bundle.path, manifest, tmp_path / "scores"))
    assert (code, error) == (0, "")
    assert "is already complete" in out
    assert not has_heatmaps(tmp_path / "scores")
    images, expected = (PreparedSet(path, 64).load("train").images[:] for path in (tmp_path / "prepared", prepared))
    assert np.array_equal(images, expected)


def test_a_bundle_that_another_command_writes_meanwhile_is_named(tmp_path: Path) -> None:
    def write() -> None:
        with atomic.new_folder(tmp_path / "bundle", "last.txt"):
            (tmp_path / "bundle").mkdir()
            (tmp_path / "bundle" / "last.txt").touch()

    with pytest.raises(OutputError, match="bundle: another command has written it now, and it is complete; use it"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_settings_that_a_folder_lacks_have_their_default(tmp_path: Path) -> None:
    """Folders of versions without a setting continue, and a message names its default."""
    run_folder.create_run(tmp_path, {"kind": "score"})
    run_folder.check_run(tmp_path, {"kind": "score", "tta": 1}, defaults={"tta": 1})
    with pytest.raises(OutputError, match=r"tta 1 \(now 3\)"):
        run_folder.check_run(tmp_path, {"kind": "score", "tta": 3}, defaults={"tta": 1})
