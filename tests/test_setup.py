"""scripts/setup and scripts/wheels: what they ask of pip. A stand-in for Python notes it down; nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAND_IN = """#!/bin/sh
case "$1 $2" in
  "-c "*) exit 0 ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") [ "$3" = --version ] || echo "$*" >> "$CALLS" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    target = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts", target / "scripts")
    for name in ("pyproject.toml", "requirements.lock", "requirements-dev.lock", "requirements-gpu.lock"):
        shutil.copy(ROOT / name, target)
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "some wheels").mkdir()
    (tmp_path / "some wheels" / "one-1-py3-none-any.whl").touch()
    return target


def run(checkout: Path, script: str, *arguments: str) -> tuple[int, list[str], str]:
    """From the folder above the checkout: exit code, what pip was asked, stderr."""
    calls = checkout.parent / "calls"
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        [checkout / "scripts" / script, *arguments],
        cwd=checkout.parent,
        env={**os.environ, "PYTHON": str(checkout.parent / "python"), "CALLS": str(calls)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stderr


@pytest.mark.parametrize(("kind", "lock"), [("", ""), ("dev", "-dev"), ("gpu", "-gpu")])
@pytest.mark.parametrize("offline", [False, True])
def test_setup_installs_a_lock_with_its_hashes_once(kind: str, lock: str, offline: bool, checkout: Path) -> None:
    arguments = [kind] * bool(kind) + ["--wheels", "some wheels"] * offline
    code, (packages, ours), err = run(checkout, "setup", *arguments)
    assert code == 0, err
    assert packages.endswith(f"--require-hashes -r requirements{lock}.lock")
    wanted = f"--no-index --find-links {checkout.parent / 'some wheels'} "
    assert (wanted in packages) == offline
    assert ("--no-index" in packages) == offline
    assert "--no-index" in ours
    assert ours.endswith("--no-deps --no-build-isolation --editable .")
    assert run(checkout, "setup", *arguments)[:2] == (0, []), "what is installed is not installed again"
    assert run(checkout, "setup")[:2] == (0, []), "the others are more than what running needs"
    (checkout / "requirements.lock").write_text("changed")
    (checkout / f"requirements{lock}.lock").write_text("changed")
    assert len(run(checkout, "setup", *arguments)[1]) == 2


def test_setup_of_another_kind_is_another_setup(checkout: Path) -> None:
    assert len(run(checkout, "setup", "dev")[1]) == 2
    assert len(run(checkout, "setup", "gpu")[1]) == 2
    assert len(run(checkout, "setup", "dev")[1]) == 2, "no two are there at once"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["production"], "unknown argument 'production'"),
        (["--wheels"], "--wheels: name the folder"),
        (["--wheels", "nowhere"], "--wheels nowhere: no wheels there"),
        (["dev", "--wheels", "checkout"], "no wheels there"),
    ],
)
def test_setup_refuses(arguments: list[str], words: str, checkout: Path) -> None:
    code, calls, err = run(checkout, "setup", *arguments)
    assert (code, calls, err.count("\n")) == (2, [], 1)
    assert words in err
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(("kind", "lock"), [("", ""), ("dev", "-dev"), ("gpu", "-gpu")])
def test_wheels_downloads_a_lock_with_its_hashes(kind: str, lock: str, checkout: Path) -> None:
    code, (call,), err = run(checkout, "wheels", "new", *[kind] * bool(kind))
    assert code == 0, err
    assert call.startswith("-m pip download ")
    assert "--only-binary :all: --require-hashes" in call
    assert call.endswith(f"--dest {checkout.parent / 'new'} -r requirements{lock}.lock")


@pytest.mark.parametrize(("arguments", "words"), [([], "name a folder"), (["x", "cpu"], "unknown kind 'cpu'")])
def test_wheels_refuses(arguments: list[str], words: str, checkout: Path) -> None:
    code, calls, err = run(checkout, "wheels", *arguments)
    assert (code, calls) == (2, [])
    assert words in err
