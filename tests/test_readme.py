"""Test the README's commands: the gate parses them, and `scripts/test all` runs them (except scripts/test).

They run in a copy of the tracked files with this environment. `$NIH` is a folder of phantoms under NIH's file names,
and `$WEIGHTS` is `none`, because a test must not depend on a download.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pandas as pd
import psutil
import pytest
from mutate import copy_checkout

from ray_cxr import cli

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(900)


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language in the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for name, content in found if name == language]


SHELL = blocks("sh")
COMMANDS = [line for block in [*SHELL, *blocks("")] for line in block.splitlines() if line.strip()]


def parse(words: list[str]) -> None:
    """Parse a command with the parser of its program."""
    match words:
        case ["ray-cxr", *arguments]:
            cli._build_parser().parse_args(arguments)
        case ["ray", *arguments]:
            from ray.scripts.scripts import cli as ray_cli

            if "--" in arguments:
                end = arguments.index("--")
                arguments, (_, script, *rest) = [*arguments[:end], "--", "true"], arguments[end + 1 :]
                cli._build_parser().parse_args([Path(script).stem, *rest])
                assert (ROOT / script).is_file()
            group = ray_cli
            while arguments and arguments[0] in getattr(group, "commands", {}):
                group, arguments = group.commands[arguments[0]], arguments[1:]
            group.make_context(group.name, arguments)
        case ["." | "export" | "cd", *_] | ["git", "clone", _, _]:
            pass
        case [script]:
            assert os.access(ROOT / script, os.X_OK)
        case _:
            raise AssertionError(f"unknown command: {words}")


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_valid(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # some options need existing files
    parse(shlex.split(line.partition(" > ")[0], comments=True))


def test_wrong_commands_and_new_blocks_are_noticed() -> None:
    for line in ("ray-cxr score --modle runs/x", "ray job submit --adress x -- python jobs/score.py", "scripts/none"):
        with pytest.raises((SystemExit, AssertionError, click.ClickException)):
            parse(shlex.split(line))
    assert (SHELL[0], SHELL[-1]) == ("scripts/demo\n", "scripts/test\n")
    assert [len(blocks(language)) for language in ("sh", "python", "bash", "console")] == [6, 1, 0, 0]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("readme") / "checkout"
    try:
        copy_checkout(target)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: the list of its files is unknown")
    return target


@pytest.fixture(scope="module")
def nih(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write phantoms under the names of NIH's download, and third-party weights of a DenseNet121."""
    import keras

    from ray_cxr.imaging.phantoms import write_phantoms

    # 24 images: more than the 20 of a --limit, and one batch to train on.
    drawn = write_phantoms(tmp_path_factory.mktemp("nih") / "phantoms", patients=9, size=256, broken=False)
    folder = tmp_path_factory.mktemp("nih") / "nih"
    shutil.copytree(drawn.images, folder / "images" / "images_001" / "images")
    names = ("Data_Entry_2017_v2020.csv.gz", "train_val_list.txt.gz", "test_list.txt.gz")
    for source, name in zip((drawn.table, drawn.train_val_list, drawn.test_list), names, strict=True):
        (folder / name).write_bytes(gzip.compress(source.read_bytes()))
    backbone = keras.applications.DenseNet121(False, None, input_shape=(224, 224, 3), pooling="avg")
    head = keras.layers.Dense(14, activation="sigmoid")(backbone.output)
    keras.Model(backbone.input, head).save_weights(folder / "theirs.weights.h5")
    return folder


def run(commands: str, checkout: Path, **changes: str) -> str:
    """Run a block with `sh -eu` and return its output."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {**inherited, "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}", **changes}
    done = subprocess.run(
        ["sh", "-euxc", commands], cwd=checkout, env=environment, text=True, timeout=800, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


PROBE = """\
cd demo-out
ray-cxr score run/bundle --manifest manifest.parquet --out featured --features
ray-cxr probe featured --manifest manifest.parquet --out probe
ray-cxr score probe --prepared prepared --out rescored
ray-cxr report rescored --manifest manifest.parquet --split test --out probed
"""


@pytest.mark.readme
def test_scripts_demo(checkout: Path) -> None:
    printed = run(SHELL[0], checkout)
    out = checkout / "demo-out"
    metrics = json.loads((out / "report" / "metrics.json").read_text())
    assert metrics["macro"]["auroc"] > 0.9, "the model must learn the synthetic findings"
    assert f"macro AUROC on the test split {metrics['macro']['auroc']:.3f}" in printed
    assert "demo: open demo-out/report/report.html" in printed
    assert "Traceback" not in printed
    scores = pd.concat([pd.read_parquet(part) for part in sorted((out / "scores" / "scores").iterdir())])
    assert len(scores) == scores["image_id"].nunique() == len(pd.read_parquet(out / "manifest.parquet"))
    codes = ["blank", "corrupt", "empty", "missing", "not_an_image", "truncated"]
    assert sorted(scores["error_code"].dropna()) == codes
    for name in ("report.html", "roc.png", "examples.png", "worklist.csv"):
        assert (out / "report" / name).stat().st_size > 500
    # A new head on the features of the model does not lose to the head that was trained with it.
    run(PROBE, checkout)
    probed = json.loads((out / "probed" / "metrics.json").read_text())
    assert probed["macro"]["auroc"] > metrics["macro"]["auroc"] - 0.02


@pytest.mark.readme
def test_your_own_images(checkout: Path, nih: Path) -> None:
    lines = SHELL[1].splitlines()
    assert lines[1] == "export NIH=~/nih WEIGHTS=imagenet"
    printed = run("\n".join([lines[0], *lines[2:]]), checkout, NIH=str(nih), WEIGHTS="none")
    assert "RANDOM weights" in printed
    assert (checkout / "runs" / "report" / "report.html").exists()


@pytest.mark.readme
def test_a_search(checkout: Path) -> None:
    printed = run(SHELL[2], checkout)
    assert "best trial: " in printed
    assert len(pd.read_parquet(checkout / "runs" / "search" / "trials.parquet")) == 2
    assert (checkout / "runs" / "search" / "report.html").exists()


@pytest.mark.readme
def test_third_party_weights(checkout: Path, nih: Path) -> None:
    run(SHELL[3], checkout, NIH=str(nih))
    (part,) = (checkout / "runs" / "screened" / "scores").iterdir()
    assert len(pd.read_parquet(part)) == 20


@pytest.mark.readme
def test_python(checkout: Path, nih: Path) -> None:
    shutil.copy(next((nih / "images").rglob("*.png")), checkout / "image.png")
    (checkout / "example.py").write_text(blocks("python")[0])
    printed = run(".venv/bin/python example.py", checkout)
    assert re.search(r"image\.png\s+ok", printed)


@pytest.mark.readme
def test_ray_job_submit(checkout: Path) -> None:
    """Start a head with its job server and two nodes. `ray stop` ends every Ray, so none may run before."""
    if any(process.info["name"] == "gcs_server" for process in psutil.process_iter(["name"])):
        pytest.skip("the README's `ray stop` would end another Ray on this machine")
    try:
        printed = run(SHELL[4], checkout)
    finally:
        subprocess.run([ROOT / ".venv" / "bin" / "ray", "stop"], check=False, capture_output=True)
    assert printed.count("Ray runtime started") == 3
    assert printed.count("succeeded") >= 2
    assert (checkout / "runs" / "scores-job" / "_SUCCESS").exists()
    assert len(pd.read_parquet(checkout / "runs" / "search" / "trials.parquet")) == 3
