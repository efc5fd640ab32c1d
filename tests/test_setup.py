"""Tests of scripts/setup and scripts/wheels. A fake Python records their calls of pip; nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
  "-c "*) exit 0 ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") [ "$3" = --version ] || echo "$*" >> "$CALLS" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    target, python, wheels = tmp_path / "checkout", tmp_path / "python", tmp_path / "some wheels"
    (target / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "scripts/setup", "scripts/wheels"):
        shutil.copy(ROOT / name, target / name)
    for kind in ("", "-dev", "-gpu"):
        (target / f"requirements{kind}.lock").write_text(kind, encoding="utf-8")
    python.write_text(FAKE_PYTHON, encoding="utf-8")
    python.chmod(0o755)
    wheels.mkdir()
    (wheels / "one-1-py3-none-any.whl").touch()
    return target


def run(checkout: Path, script: str, *arguments: str) -> tuple[int, list[str], str]:
    """Run a script from the folder above the checkout: exit code, calls of pip, stderr."""
    home, calls = checkout.parent, checkout.parent / "calls"
    calls.write_text("", encoding="utf-8")
    env = {**os.environ, "PYTHON": str(home / "python"), "CALLS": str(calls)}
    program = [checkout / "scripts" / script, *arguments]
    done = subprocess.run(program, cwd=home, env=env, capture_output=True, encoding="utf-8", check=False)
    return done.returncode, calls.read_text(encoding="utf-8").splitlines(), done.stderr


@pytest.mark.parametrize(("kind", "offline"), [("", True), ("gpu", False)])
def test_setup_installs_a_lock_with_its_hashes_once(kind: str, offline: bool, checkout: Path) -> None:
    lock = f"requirements{'-' if kind else ''}{kind}.lock"
    arguments = [kind] * bool(kind) + ["--wheels", "some wheels"] * offline
    code, (packages, ours), err = run(checkout, "setup", *arguments)
    assert code == 0, err
    assert packages.endswith(f"--require-hashes -r {lock}")
    assert (f"--no-index --find-links {checkout.parent / 'some wheels'} " in packages) == offline
    assert ("--no-index" in packages) == offline
    assert "--no-index" in ours
    assert ours.endswith("--no-deps --no-build-isolation --editable .")
    assert run(checkout, "setup", *arguments)[:2] == (0, []), "an installed lock is not installed again"
    assert run(checkout, "setup")[:2] == (0, []), "the other locks include the one for running"
    for name in ("requirements.lock", lock):
        (checkout / name).write_text("changed", encoding="utf-8")
    assert len(run(checkout, "setup", *arguments)[1]) == 2
    assert [len(run(checkout, "setup", other)[1]) for other in ("dev", "gpu")] == [2, 2], "another kind replaces it"


def test_wheels_downloads_a_lock_with_its_hashes(checkout: Path) -> None:
    for arguments, lock in (([], "requirements.lock"), (["dev"], "requirements-dev.lock")):
        code, (call,), err = run(checkout, "wheels", "new", *arguments)
        assert code == 0, err
        assert call.startswith("-m pip download ")
        assert "--only-binary :all: --require-hashes" in call
        assert call.endswith(f"--dest {checkout.parent / 'new'} -r {lock}")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["setup", "production"], "'production'"),
        (["setup", "--wheels"], "--wheels: pass the folder"),
        (["setup", "dev", "--wheels", "checkout"], "--wheels checkout"),
        (["wheels"], "pass a folder"),
        (["wheels", "x", "cpu"], "'cpu'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], names: str, checkout: Path) -> None:
    code, calls, err = run(checkout, *arguments)
    assert (code, calls, err.count("\n")) == (2, [], 1)
    assert names in err
    assert not (checkout / ".venv").exists()
