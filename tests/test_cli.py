"""The command line: what is wrong is said in one line and with exit code 2, before Ray starts."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import ray_cxr
from ray_cxr import cli
from ray_cxr.data import manifest
from ray_cxr.errors import ErrorRateExceeded, ImageError, TableError

Command = Callable[..., tuple[int, str, str]]

TABLE = """\
Image Index,Finding Labels,Patient ID
1_000.png,Mass,1
1_001.png,Mass|Edema,1
2_000.png,No Finding,2
3_000.png,Hernia,3
"""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused here is refused before Ray starts."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr(cli, "start_ray", refuse)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one of everything, good and bad."""
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(TABLE)
    Path("no_columns.csv").write_text("a,b\n1,2\n")
    Path("bad_label.csv").write_text("Image Index,Finding Labels\n1.png,Masss\n")
    Path("leak_a.csv").write_text("Image,Finding Labels,Patient ID\n1.png,Mass,1\n")
    Path("leak_b.csv").write_text("Image,Finding Labels,Patient ID\n2.png,Mass,1\n")
    Path("bad.toml").write_text("train = 3\n")
    Path("unknown.toml").write_text("[score]\nbatchsize = 3\n")
    Path("notes.txt").write_text("nothing\n")
    Path("empty").mkdir()
    Path("images").mkdir()
    Image.new("L", (64, 64)).save("images/1_000.png")
    Path("unfinished/scores").mkdir(parents=True)
    Path("unfinished/settings.json").write_text("{}")
    Path("prepared_half").mkdir()
    Path("prepared_half/settings.json").write_text("{}")
    Path("bundle_half").mkdir()
    Path("bundle_half/bundle.json").write_text("{}")
    pq.write_table(pa.table({"image_id": ["1_000.png"], "p_Mass": [0.5]}), "other.parquet")
    pq.write_table(pa.table({"name": ["1_000.png"]}), "no_id.parquet")
    table, _ = manifest.build_manifest(["t.csv"])
    manifest.write_manifest(table, "m.parquet")
    return tmp_path


#: A command line, and what its one line must say.
WRONG: list[tuple[str, str]] = [
    ("", "the following arguments are required: COMMAND"),
    ("predict", "invalid choice: 'predict' (choose from"),
    ("--frobnicate manifest t.csv --out o.parquet", "unrecognized arguments: --frobnicate"),
    ("manifest", "the following arguments are required: TABLE, --out"),
    ("manifest t.csv", "the following arguments are required: --out"),
    ("manifest t.csv --out o.parquet --frobnicate", "unrecognized arguments: --frobnicate"),
    ("manifest none.csv --out o.parquet", "none.csv: no such file; name an existing CSV table"),
    ("manifest empty --out o.parquet", "empty: cannot be read: Is a directory"),
    ("manifest no_columns.csv --out o.parquet", "no_columns.csv: has no image column"),
    ("manifest bad_label.csv --out o.parquet", "line 2 (1.png): unknown finding 'Masss'; did you mean 'Mass'?"),
    ("manifest t.csv t.csv --out o.parquet", "4 images are named more than once"),
    ("manifest train=t.csv no_columns.csv --out o.parquet", "either every table has a prefix"),
    ("manifest train=leak_a.csv test=leak_b.csv --out o.parquet", "1 patients stand in more than one split: 1 (test"),
    ("manifest t.csv --out o.parquet --images none", "none: no such folder"),
    ("manifest t.csv --out o.parquet --images empty", "empty: holds no image"),
    ("manifest t.csv --out o.parquet --images t.csv", "t.csv: is a file; name the folder"),
    ("manifest t.csv --out o.parquet --split half", "invalid choice: 'half'"),
    ("manifest t.csv --out o.parquet --split official", "--split official: needs --train-val-list and --test-list"),
    (
        "manifest t.csv --out o.parquet --split official --train-val-list none --test-list none",
        "none: no such file; name an existing split list",
    ),
    ("manifest t.csv --out o.parquet --split patient --fractions a,b,c", "--fractions a,b,c: give three numbers"),
    ("manifest t.csv --out o.parquet --split patient --fractions 0.5,0.5", "--fractions 0.5,0.5: give three numbers"),
    ("manifest t.csv --out o.parquet --split patient --fractions 0.5,0.5,0.5", "that sum to 1"),
    ("manifest t.csv --out o.parquet --split patient --fractions nan,nan,nan", "that sum to 1"),
    ("manifest t.csv --out o.parquet --split patient --fractions=-1,1,1", "that sum to 1"),
    ("manifest t.csv --out o.parquet --split patient --seed -1", "--seed -1: give a whole number from 0 on"),
    ("manifest t.csv --out o.parquet --split patient --seed x", "argument --seed: invalid int value: 'x'"),
    ("manifest t.csv --out o.parquet --on-leak ignore", "invalid choice: 'ignore'"),
    ("manifest t.csv --out empty", "--out empty: cannot be written: Is a directory"),
    ("manifest t.csv --out notes.txt/m.parquet", "--out notes.txt/m.parquet: cannot be written: "),
    ("prepare", "the following arguments are required: M.parquet, --out"),
    ("prepare none.parquet --out p", "none.parquet: no such file; make it with `ray-cxr manifest`"),
    ("prepare t.csv --out p", "t.csv: not a Parquet file"),
    ("prepare no_id.parquet --out p", "no_id.parquet: has no column image_id"),
    ("prepare m.parquet --out p --size big", "--size big: give pixels, such as 224 or 224,320"),
    ("prepare m.parquet --out p --size 224,", "--size 224,: give pixels"),
    ("prepare m.parquet --out p --size 8", "Input should be greater than or equal to 32 (got 8)"),
    ("prepare m.parquet --out p --size 0", "Input should be greater than or equal to 32 (got 0)"),
    ("prepare m.parquet --out p --set sizez=[64]", "unknown key 'prepare.sizez'; did you mean 'sizes'?"),
    ("prepare m.parquet --out p --set aspect=square", "prepare.aspect: Input should be 'stretch', 'pad' or 'crop'"),
    ("prepare m.parquet --out p --config none.toml", "--config none.toml: No such file or directory"),
    ("prepare m.parquet --out p --config bad.toml", "train is a section: write [train] and its keys below"),
    ("prepare m.parquet --out p --config notes.txt", "--config notes.txt: not TOML"),
    ("train none --out run", "none: not a prepared folder; make one with `ray-cxr prepare`"),
    ("train prepared_half --out run", "prepared_half: no size is complete"),
    ("train prepared_half --out run --workers 0", "workers: Input should be greater than or equal to 1 (got 0)"),
    ("train prepared_half --out run --workers x", "argument --workers: invalid int value: 'x'"),
    ("train prepared_half --out run --set epoch=3", "unknown key 'train.epoch'; did you mean 'epochs'?"),
    ("train prepared_half --out run --set epochs", "--set epochs: write it as key=value"),
    ("train prepared_half --out run --set backbone=VGG", "train.backbone: Input should be 'ResNet50', "),
    ("train prepared_half --out run --set findings=Mas", "train.findings: unknown finding 'Mas'; did you mean 'Mass'?"),
    (
        "train prepared_half --out run --config unknown.toml",
        "unknown key 'score.batchsize'; did you mean 'batch_size'?",
    ),
    ("score --out s --images images", "the following arguments are required: --model"),
    ("score --model b --out s", "one of the arguments --manifest --images is required"),
    ("score --model b --out s --images images --manifest m.parquet", "not allowed with argument"),
    ("score --model none --out s --images images", "none: no such folder; name a bundle"),
    ("score --model empty --out s --images images", "empty: has no bundle.json; name a bundle"),
    ("score --model bundle_half --out s --images images", "bundle_half: bundle.json names no format; is it a bundle?"),
    ("score --model none --out s --images images --limit 0", "--limit 0: give at least 1"),
    ("score --model none --out s --images images --limit -3", "--limit -3: give at least 1"),
    ("score --model none --out s --images images --max-error-rate 1.5", "max_error_rate: Input should be less than or"),
    ("score --model none --out s --images images --max-error-rate nan", "max_error_rate: Input should be a finite"),
    (
        "score --model none --out s --images images --set batch=3",
        "unknown key 'score.batch'; did you mean 'batch_size'",
    ),
    ("report none --out r", "none: no such file or folder; name what `ray-cxr score` wrote, or a Parquet file"),
    ("report empty --out r", "empty: holds no Parquet files"),
    ("report unfinished --out r", "unfinished: score did not finish; run it again to continue"),
    ("report no_id.parquet --out r", "no_id.parquet: "),
    ("report t.csv --out r", "t.csv: "),
    ("report other.parquet --out r --split test", "--split test: needs --labels, whose rows it chooses"),
    ("report other.parquet --out r --split dev", "invalid choice: 'dev'"),
    ("report other.parquet --out t.csv", "--out t.csv: is a file; name a folder"),
    ("report other.parquet --out r --labels none.parquet", "none.parquet: no such file"),
    ("recalibrate b s --out b2", "the following arguments are required: --labels"),
    ("recalibrate b s --labels m.parquet", "the following arguments are required: --out"),
    ("recalibrate none s --labels m.parquet --out b2", "none: no such folder; name a bundle"),
    ("recalibrate none s --labels m.parquet --out b2 --set rule=youden", "unknown key 'recalibrate.rule'"),
    ("import-weights w.h5 --out b --findings 14", "the following arguments are required: --backbone"),
    ("import-weights w.h5 --out b --backbone ResNet50", "--findings: say what the outputs are, in their order"),
    ("demo", "the following arguments are required: --out"),
]


@pytest.mark.parametrize(("line", "part"), WRONG, ids=[line or "nothing" for line, _ in WRONG])
def test_wrong_arguments_are_one_line_and_exit_code_2(here: Path, command: Command, line: str, part: str) -> None:
    before = sorted(here.rglob("*"))
    code, out, err = command(*line.split())
    assert (code, out) == (2, "")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert part in err
    name = line.split()[0] if line and not line.startswith("--") else ""
    assert err.startswith(f"ray-cxr {name}: " if name in COMMANDS and "unrecognized" not in err else "ray-cxr: ")
    assert sorted(here.rglob("*")) == before, "a refused command wrote something"


COMMANDS = ("manifest", "prepare", "train", "score", "report", "recalibrate", "import-weights", "demo")


def test_line_breaks_in_an_argument_do_not_break_the_line(here: Path, command: Command) -> None:
    for arguments in (["a\nb"], ["manifest", "a\nb", "--out", "o"], ["manifest", "t.csv", "--out", "o", "--x\ny"]):
        code, _, err = command(*arguments)
        assert (code, err.count("\n")) == (2, 1)


def run(
    *arguments: str, cwd: Path, program: tuple[str, ...] = ("-m", "ray_cxr.cli")
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(ray_cxr.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=cwd, capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("manifest", "none.csv", "--out", "o.parquet"), "none.csv: no such file"),
        (("report", "other.parquet", "--out", "r", "--labels", "none.parquet"), "none.parquet: no such file"),
        (("score", "--model", "none", "--out", "s", "--images", "images"), "none: no such folder"),
    ],
)
def test_as_a_process_of_its_own(here: Path, arguments: tuple[str, ...], part: str) -> None:
    """Logging, warnings and imports may speak there, and must not."""
    done = run(*arguments, cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(f"ray-cxr {arguments[0]}: ")
    assert part in done.stderr


def test_job_takes_the_commands_arguments(here: Path) -> None:
    job = Path(__file__).parents[1] / "jobs" / "train.py"
    done = run("none", "--out", "run", cwd=here, program=(str(job),))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ray-cxr train: none: not a prepared folder; make one with `ray-cxr prepare`\n"


def test_version_and_help(command: Command) -> None:
    assert command("--version") == (0, f"ray-cxr {ray_cxr.__version__}\n", "")
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    assert all(f"    {name} " in out or f"    {name}\n" in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(command: Command, name: str) -> None:
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: ray-cxr {name} ")


def test_manifest_end_to_end(here: Path, command: Command) -> None:
    with gzip.open("t.csv.gz", "wt") as stream:
        stream.write(TABLE)
    arguments = ("manifest", "t.csv.gz", "--images", "images", "--out", "new/m.parquet", "--split", "patient")
    code, out, err = command(*arguments, "--fractions", "0.34,0.33,0.33", "--seed", "1")
    assert (code, err) == (0, "")
    table = manifest.read_manifest("new/m.parquet")
    assert out.splitlines()[0].startswith("4 images of 3 patients: train ")
    assert out.splitlines()[1:] == [
        "pictures: 1 found, 3 in the table but not on disk, 0 on disk but not in the table",
        "manifest: new/m.parquet",
    ]
    assert table["image_id"].to_pylist() == ["1_000.png", "1_001.png", "2_000.png", "3_000.png"]
    assert table["path"].to_pylist() == [str(here / "images" / "1_000.png"), None, None, None]
    assert sorted(set(table["split"].to_pylist())) == ["test", "train", "val"]
    assert manifest.split_info(table)["fractions"] == [0.34, 0.33, 0.33]
    # The same command again gives the same bytes.
    before = Path("new/m.parquet").read_bytes()
    assert command(*arguments, "--fractions", "0.34,0.33,0.33", "--seed", "1")[0] == 0
    assert Path("new/m.parquet").read_bytes() == before


def test_manifest_drops_a_leak_on_request(here: Path, command: Command) -> None:
    code, out, err = command(
        "manifest", "train=leak_a.csv", "test=leak_b.csv", "--out", "m2.parquet", "--on-leak", "drop"
    )
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "1 images of 1 patients: test 1",
        "1 rows removed, their patients being in a more protected split: train 1",
        "manifest: m2.parquet",
    ]


class Wrapped(Exception):
    """As Ray wraps what a worker raised."""

    cause: BaseException


def wrapped(error: BaseException) -> Wrapped:
    result = Wrapped("many\nlines\nof a remote traceback")
    result.cause = error
    return result


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TableError("bad\n table"), 2, "bad table"),
        (ErrorRateExceeded("too many"), 3, "too many"),
        (ImageError("corrupt", "x"), 1, "corrupt: x"),
        (wrapped(TableError("inside")), 2, "inside"),
        (wrapped(OSError(28, "No space left on device")), 1, "[Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "stopped; the same command continues"),
    ],
)
def test_exit_codes(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def fail(_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "_demo", fail)
    assert command("demo", "--out", "d") == (code, "", f"ray-cxr demo: {line}\n")


def test_a_bug_is_not_dressed_up(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "_demo", fail)
    with pytest.raises(ZeroDivisionError):
        command("demo", "--out", "d")
