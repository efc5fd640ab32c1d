"""What a terminal and a log show: the next command, tables of 80 columns, colours."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import read_next
from rich.table import Table

from ray_cxr.cli import next_step, output
from ray_cxr.labels import FINDINGS

Command = Callable[..., tuple[int, str, str]]


def test_manifest_names_a_command_that_runs(
    without_ray: None, phantoms: Any, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "with space's"
    folder.mkdir()
    monkeypatch.chdir(folder)
    given = ["manifest", phantoms.table, "--images", phantoms.images, "--out", "m.parquet"]
    code, out, _ = command(*given)
    assert (code, read_next(out)) == (0, [*map(str, given), "--split", "patient"])
    code, out, _ = command(*read_next(out))
    assert (code, read_next(out)) == (0, ["prepare", "m.parquet", "--out", "prepared"])
    (folder / "run").mkdir()
    code, out, _ = command(*read_next(out), "--size", "64")
    assert (code, read_next(out)) == (0, ["train", "prepared", "--out", "run-2"])


@pytest.mark.slow
def test_next_command_after_scores_depends_on_labels(
    without_ray: None, scores: Path, manifest: Path, phantoms: Any, tiny_bundle: Any, tmp_path: Path, command: Command
) -> None:
    given = ["score", tiny_bundle.path, "--precision", "fp32", "--set", "rows_per_file=16", "--set", "batch_size=8"]
    code, out, _ = command(*given, "--manifest", manifest, "--out", scores)
    assert code == 0
    assert read_next(out)[1:6] == [str(scores), "--manifest", str(manifest), "--split", "test"]
    code, out, _ = command(*given, "--images", phantoms.images, "--out", tmp_path / "new", "--limit", 4)
    words = read_next(out)
    assert (code, words) == (0, ["report", str(tmp_path / "new"), "--out", str(tmp_path / "report")])
    assert command(*words)[0] == 0
    assert (tmp_path / "report" / "report.html").is_file()


def test_demo_names_the_next_command_once(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(out: Path, steps: Any, on_event: Any, *, tune: bool) -> None:
        assert steps(["manifest", str(tmp_path / "t.csv"), "--out", str(tmp_path / "m.parquet")]) == 0
        (out / "run" / "bundle").mkdir(parents=True)
        (out / "phantoms" / "images").mkdir(parents=True)

    (tmp_path / "t.csv").write_text("Image,Finding Labels,Patient ID\n1.png,Mass,1\n", encoding="utf-8")
    monkeypatch.setattr("ray_cxr.demo.run_demo", run)
    code, out, _ = command("demo", "--out", tmp_path / "demo")
    assert (code, read_next(out)[0]) == (0, "score")


def test_next_command_of_a_job_has_absolute_paths(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / next_step.JOB_FOLDER.strip("/") / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    next_step.print_next("prepare", Path("m.parquet"), "--out", Path("/data/p"))
    assert shlex.split(capsys.readouterr().out)[2:] == ["prepare", str(folder / "m.parquet"), "--out", "/data/p"]
    folder.rmdir()  # as Ray does once nothing uses it
    next_step.print_next("prepare", Path("/data/m.parquet"), "--out", Path("/data/p"))
    assert shlex.split(capsys.readouterr().out)[2:] == ["prepare", "/data/m.parquet", "--out", "/data/p"]


def test_next_command_finds_the_model_of_scores_made_in_another_folder(tmp_path: Path, capsys, monkeypatch) -> None:
    for place, text in (("project", "right"), ("other", "wrong")):
        (tmp_path / place / "run").mkdir(parents=True)
        (tmp_path / place / "run" / "SHA256SUMS").write_text(text, encoding="utf-8")
    (tmp_path / "project" / "scores").mkdir()
    record = {"model": "run", "model_digest": hashlib.sha256(b"right").hexdigest()}
    (tmp_path / "project" / "scores" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "other")
    folders = ["../project/scores"]
    given = {"scores": folders, "out": "report", "labels": "m.parquet", "split": "test", "csv": False}
    next_step.suggest_after_report(argparse.Namespace(**given), folders)
    model = Path(shlex.split(capsys.readouterr().out)[3])
    assert model.resolve() == tmp_path / "project" / "run"


@pytest.mark.parametrize("is_live", [True, False])
def test_log_lines_are_folded_on_a_terminal_only(is_live: bool, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(output, "is_live", lambda: is_live)
    record = logging.makeLogRecord({"msg": "WARNING: %s", "args": ("word " * 40 + "end",)})
    lines = output.LogFormatter("%(message)s").format(record).splitlines()
    assert len(lines) == (3 if is_live else 1)
    assert not is_live or max(map(len, lines)) <= 80


@pytest.mark.parametrize("columns", [None, "80"])
def test_names_of_findings_are_whole_in_80_columns(columns: str | None, capsys, monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    table = Table("finding", "images", *(f"long name {number}" for number in range(4)), show_edge=False, pad_edge=False)
    for name in FINDINGS:
        table.add_row(name, "112,120", "0.1234", "0.1234", "0.1234", "none")
    output.print_table(table, optional=("images",))
    lines = capsys.readouterr().out.splitlines()
    assert (max(map(len, lines)) <= 80) == (columns == "80")
    assert {line.split()[0] for line in lines if "0.1234" in line} == set(FINDINGS)
    assert any("images" in line for line in lines) == (columns is None)


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_colours_of_a_table(variables: dict[str, str], coloured: bool, capsys, monkeypatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    table = Table("finding", header_style="red")
    table.add_row("Mass")
    output.print_table(table)
    assert ("\x1b[31m" in (out := capsys.readouterr().out) or "\x1b[1;31m" in out) == coloured
