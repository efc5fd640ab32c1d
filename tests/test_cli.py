"""The command line: what is wrong is reported in one line with exit code 2, before Ray starts."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.exceptions import ActorDiedError

import ray_cxr
from ray_cxr import cli
from ray_cxr.data import manifest
from ray_cxr.data.manifest_builder import build_manifest
from ray_cxr.errors import ErrorRateExceeded, ImageError, TableError

Command = Callable[..., tuple[int, str, str]]

COMMANDS = ("manifest", "prepare", "train", "score", "report", "recalibrate", "import-weights", "demo")
TABLE = """\
Image Index,Finding Labels,Patient ID
1_000.png,Mass,1
1_001.png,Mass|Edema,1
2_000.png,No Finding,2
3_000.png,Hernia,3
"""
FILES = {
    "t.csv": TABLE,
    "leak_a.csv": "Image,Finding Labels,Patient ID\n1.png,Mass,1\n",
    "leak_b.csv": "Image,Finding Labels,Patient ID\n2.png,Mass,1\n",
    "unknown.toml": "[score]\nbatchsize = 3\n",
    "unfinished/settings.json": "{}",
    "prepared_half/settings.json": "{}",
    "bundle_half/bundle.json": "{}",
}


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_cxr.session.start_ray", Mock(side_effect=AssertionError("the command started Ray")))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of everything, good and bad; the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "images", "unfinished/scores", "prepared_half", "bundle_half"):
        Path(name).mkdir(parents=True)
    for name, text in FILES.items():
        Path(name).write_text(text, encoding="utf-8")
    Image.new("L", (64, 64)).save("images/1_000.png")
    pq.write_table(pa.table({"image_id": ["1_000.png"], "p_Mass": [0.5]}), "other.parquet")
    pq.write_table(pa.table({"name": ["1_000.png"]}), "no_id.parquet")
    manifest.write_manifest(build_manifest(["t.csv"])[0], "m.parquet")
    return tmp_path


#: A command line, and what its one line must name.
WRONG: list[tuple[str, str]] = [
    ("a\nb", r"'a\nb'"),
    ("manifest t.csv --out o --x\ny", "--x y"),
    ("manifest", "TABLE, --out"),
    ("manifest t.csv --out o.parquet --frobnicate", "--frobnicate"),
    ("manifest none.csv --out o.parquet", "none.csv: "),
    ("manifest train=leak_a.csv test=leak_b.csv --out o.parquet", "1 (test"),
    ("manifest t.csv --out o.parquet --split official", "--split official: "),
    ("manifest t.csv --out o.parquet --split patient --fractions a,b,c", "--fractions a,b,c: "),
    ("manifest t.csv --out empty", "--out empty: "),
    ("prepare", "M.parquet, --out"),
    ("prepare no_id.parquet --out p", "no_id.parquet: "),
    ("prepare m.parquet --out p --size big", "--size big: "),
    ("train none --out run", "none: "),
    ("train prepared_half --out run", "prepared_half: "),
    ("train prepared_half --out run --workers 0", "workers: "),
    ("train prepared_half --out run --config unknown.toml", "'score.batchsize'; did you mean 'batch_size'?"),
    ("score --out s --images images", "BUNDLE"),
    ("score --model b --out s", "--manifest --images"),
    ("score --model none --out s --images images", "none: "),
    ("score --model empty --out s --images images", "empty: "),
    ("score --model bundle_half --out s --images images", "bundle_half: bundle.json"),
    ("score --model none --out s --images images --limit 0", "--limit 0: "),
    ("score --model none --out s --images images --max-error-rate 1.5", "max_error_rate: "),
    ("report none --out r", "none: "),
    ("report unfinished --out r", "unfinished: "),
    ("report no_id.parquet --out r", "no_id.parquet: "),
    ("report t.csv --out r", "t.csv: "),
    ("report other.parquet --out r --split test", "--split test: "),
    ("report other.parquet --out t.csv", "--out t.csv: "),
    ("report other.parquet --out r --labels none.parquet", "none.parquet: "),
    ("recalibrate b s --out b2", "--manifest"),
    ("import-weights w.h5 --out b --findings 14", "--backbone"),
    ("import-weights w.h5 --out b --backbone ResNet50", "--findings: "),
    ("demo", "--out"),
]


@pytest.mark.parametrize(("line", "part"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_arguments_are_one_line_and_exit_code_2(files: Path, command: Command, line: str, part: str) -> None:
    before = sorted(files.rglob("*"))
    code, out, err = command(*line.split(" "))
    assert (code, out, err.count("\n"), err[-1]) == (2, "", 1, "\n")
    assert part in err
    name = line.split(" ")[0]
    assert err.startswith(f"ray-cxr {name}: " if name in COMMANDS else "ray-cxr: ")
    assert sorted(files.rglob("*")) == before, "a refused command wrote something"


@pytest.mark.parametrize(
    "line",
    [
        "manifest t.csv",
        "prepare m.parquet",
        "train p",
        "tune p",
        "score --model b --images i",
        "report s",
        "export-sr s",
        "quantize b p",
        "recalibrate b s --labels l",
        "import-weights w.h5 --backbone ResNet50",
        "demo",
    ],
)
def test_output_in_the_folder_of_a_job_is_refused(
    line: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray removes the copy of the working directory that a job runs in."""
    folder = tmp_path / "session_latest" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    name, *arguments = line.split()
    for out in ("runs/a", str(folder / "runs")):
        code, _, err = command(name, *arguments, "--out", out)
        assert (code, err) == (
            2,
            f"ray-cxr {name}: --out {out}: is in the working directory of a job, which Ray removes later; "
            "pass an absolute path outside of it\n",
        )
    assert list(folder.iterdir()) == []


def test_working_directory_that_was_removed_is_one_line(command: Command, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    code, _, err = command("manifest", "t.csv", "--out", "m.parquet")
    assert (code, err) == (
        2,
        "ray-cxr manifest: the working directory was removed; change to an existing folder\n",
    )


JOB = str(Path(__file__).parents[1] / "jobs" / "train.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "arguments", "start"),
    [
        (["-m", "ray_cxr.cli", "score"], "--model none --out s --images images", "ray-cxr score: none: "),
        ([JOB], "none --out run", "ray-cxr train: none: "),
    ],
)
def test_own_process_prints_nothing_but_the_error(files: Path, program: list[str], arguments: str, start: str) -> None:
    """Logging, warnings and imports may print in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(ray_cxr.__file__).parents[1])}
    line = [sys.executable, *program, *arguments.split()]
    done = subprocess.run(line, cwd=files, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(start)


def test_version_and_help(command: Command) -> None:
    assert command("--version") == (0, f"ray-cxr {ray_cxr.__version__}\n", "")
    for name in ("", *COMMANDS):
        code, out, err = command(*name.split(), "--help")
        assert (code, err) == (0, "")
        assert out.startswith(f"usage: ray-cxr {name}")


def test_manifest_from_table_to_file(files: Path, command: Command) -> None:
    (files / "t.csv.gz").write_bytes(gzip.compress(TABLE.encode()))
    line = "manifest t.csv.gz --images images --out new/m.parquet --split patient --fractions 0.34,0.33,0.33 --seed 1"
    code, out, err = command(*line.split())
    assert (code, err) == (0, "")
    table = manifest.read_manifest("new/m.parquet")
    first, second, last, _ = out.splitlines()
    assert first.startswith("4 images of 3 patients: train ")
    assert second.startswith("images: 1 found, 3 ")
    assert last == "manifest: new/m.parquet"
    assert table["image_id"].to_pylist() == ["1_000.png", "1_001.png", "2_000.png", "3_000.png"]
    assert table["path"].to_pylist() == [str(files / "images" / "1_000.png"), None, None, None]
    assert sorted(set(table["split"].to_pylist())) == ["test", "train", "val"]
    assert manifest.split_info(table)["fractions"] == [0.34, 0.33, 0.33]
    before = Path("new/m.parquet").read_bytes()
    assert command(*line.split())[0] == 0
    assert Path("new/m.parquet").read_bytes() == before, "the same command wrote other bytes"
    line = "manifest train=leak_a.csv test=leak_b.csv --out m2.parquet --on-leak drop"
    assert command(*line.split())[1].startswith("1 image of 1 patient: test 1\n1 rows removed")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("t.csv", ["no split", "train", "--split patient"]),
        ("anonymous.csv", ["no split", "patient ids"]),
        ("t.csv --split patient", []),
        ("train=leak_a.csv", []),
    ],
)
def test_manifest_without_a_split_warns(files: Path, command: Command, arguments: str, parts: list[str]) -> None:
    Path("anonymous.csv").write_text("Image,Mass\n1_000.png,1\n")
    code, out, _ = command("manifest", *arguments.split(), "--out", "new.parquet")
    assert code == 0
    found = [line for line in out.splitlines() if line.startswith("no split")]
    assert len(found) == bool(parts)
    assert all(part in found[0] for part in parts)
    if parts:
        suggested = [line for line in out.splitlines() if line.startswith("next: ") and "--split patient" in line]
        assert bool(suggested) == ("--split patient" in parts)


class Wrapped(Exception):
    """An error that wraps another in `cause`, as Ray wraps what a worker raised."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("many\nlines\nof a remote traceback")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TableError("bad\n table"), 2, "bad table"),
        (ErrorRateExceeded("too many"), 3, "too many"),
        (ImageError("corrupt", "x"), 1, "corrupt: x"),
        (Wrapped(TableError("inside")), 2, "inside"),
        (Wrapped(OSError(28, "No space left on device")), 1, "[Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "stopped"),
        (ActorDiedError(), 1, "Ray failed (ActorDiedError: "),
        (ZeroDivisionError("a bug"), None, ""),
    ],
)
def test_exit_codes(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int | None, line: str
) -> None:
    """A bug keeps its traceback."""
    monkeypatch.setattr(cli, "_demo", Mock(side_effect=error))
    if code is None:
        with pytest.raises(type(error)):
            command("demo", "--out", "d")
        return
    found, out, err = command("demo", "--out", "d")
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert err.startswith(f"ray-cxr demo: {line}")


def test_ctrl_c_before_the_arguments_are_parsed_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_build_parser", Mock(side_effect=KeyboardInterrupt))
    assert command("demo") == (130, "", "ray-cxr: stopped; run the same command again to continue\n")


def test_a_call_from_python_leaves_the_module_path_of_later_processes(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    assert command("--version") == (0, "ray-cxr 0.1.0\n", "")
    assert "PYTHONSAFEPATH" not in os.environ
