"""Run `ray-cxr` in environments of hospital, HPC and laptop machines, as a user would.

    python tests/environments.py [NAME ...]

Each case is a function with the decorator `case`. It gets an empty folder, runs the command with `run`, and checks the
result with `check_success` or `check_error`. Prints one line per case; the exit code is 1 if a case failed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

#: The environment of every command, without settings of the machine that runs the cases. Taken before other imports,
#: which change the environment of this process.
_LEFT_OUT = re.compile("(RAY|KERAS|TF|PYTHON|OMP)_?|.*proxy$", re.IGNORECASE)
ENVIRONMENT = {name: value for name, value in os.environ.items() if not _LEFT_OUT.match(name)}
PROGRAM = Path(sys.executable).with_name("ray-cxr")
#: One epoch of the smallest model.
TRAINING = ("backbone=TinyCNN", "weights=none", "epochs=1", "batch_size=8", "min_positives=2")

Case = Callable[[Path], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Add a function to the cases, under its name."""
    CASES[function.__name__] = function
    return function


class Result(NamedTuple):
    """A command that has ended. `code` is None if it was killed at the time limit."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float

    def __str__(self) -> str:
        return f"exit code {self.code} after {self.seconds:.0f} s\n{self.stdout}{self.stderr}"


def run(
    folder: Path,
    *arguments: object,
    variables: Mapping[str, str | None] | None = None,
    limit_s: float = 60,
    program: Sequence[str | Path] = (PROGRAM,),
) -> Result:
    """Run a command in `folder`, with an own HOME there, and return its result.

    Args:
        folder: The working directory. HOME is its folder `home`, which is created if `variables` does not set HOME.
        arguments: Arguments of `ray-cxr`.
        variables: Changes to the environment; None removes a variable.
        limit_s: Seconds after which the command is killed.
        program: The command's own start, such as `("prlimit", "--nproc=100", PROGRAM)`.
    """
    changed = {"HOME": str(folder / "home"), **(variables or {})}
    if "HOME" not in (variables or {}):
        (folder / "home").mkdir(exist_ok=True)
    environment = {name: value for name, value in {**ENVIRONMENT, **changed}.items() if value is not None}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [str(part) for part in (*program, *arguments)],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
        code: int | None = None
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait()
        seconds = time.monotonic() - started
        out.seek(0)
        err.seek(0)
        return Result(code, out.read(), err.read(), seconds)


def check_success(result: Result, *facts: str) -> None:
    """Require exit code 0, no traceback, and each fact in the output."""
    assert result.code == 0, str(result)
    assert "Traceback" not in result.stderr, str(result)
    for fact in facts:
        assert fact in result.stdout + result.stderr, f"{fact!r} is missing: {result}"


def check_error(result: Result, *facts: str) -> None:
    """Require a failure whose last line is an error of `ray-cxr` that has each fact, and no traceback."""
    assert result.code in (1, 2, 3), str(result)
    assert "Traceback" not in result.stderr, str(result)
    last = (result.stderr.strip().splitlines() or [""])[-1]
    assert last.startswith("ray-cxr"), str(result)
    for fact in facts:
        assert fact in last, f"{fact!r} is missing: {result}"


class Inputs:
    """Small inputs of commands, each made on first use and shared by all cases, which must not change them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def images(self) -> Path:
        """A folder of about 20 PNGs."""
        return Path(self._phantoms.images)

    @functools.cached_property
    def manifest(self) -> Path:
        from conftest import write_phantom_manifest

        return write_phantom_manifest(self._phantoms, self.folder / "manifest.parquet")

    @functools.cached_property
    def prepared(self) -> Path:
        """The output of `prepare` at 64 pixels."""
        from conftest import replace_ray

        from ray_cxr.config import PrepareSettings
        from ray_cxr.data.prepared import prepare

        with replace_ray():
            prepare(self.manifest, self.folder / "prepared", PrepareSettings(sizes=(64,)))
        return self.folder / "prepared"

    @functools.cached_property
    def bundle(self) -> Path:
        """A bundle of TinyCNN at 64 pixels, with random weights."""
        from conftest import make_tiny_bundle

        return Path(make_tiny_bundle(self.folder / "bundle").path)

    @functools.cached_property
    def _phantoms(self):
        from ray_cxr.imaging.phantoms import write_phantoms

        return write_phantoms(self.folder / "phantoms", patients=8, size=128, broken=False)

    def prepare(self, folder: Path) -> list[object]:
        """Return the arguments of `prepare` into `folder`."""
        return ["prepare", self.manifest, "--out", folder / "prepared", "--size", "64"]

    def train(self, folder: Path) -> list[object]:
        """Return the arguments of `train` into `folder`."""
        settings = [part for item in TRAINING for part in ("--set", item)]
        return ["train", self.prepared, "--out", folder / "run", *settings]

    def score(self, folder: Path) -> list[object]:
        """Return the arguments of `score` into `folder`."""
        return ["score", "--model", self.bundle, "--images", self.images, "--out", folder / "scores"]


#: Set by `main`.
inputs: Inputs


def main(names: Sequence[str]) -> int:
    """Run the named cases, or all of them, and return the exit code."""
    global inputs
    if unknown := [name for name in names if name not in CASES]:
        print(f"environments.py: no case {', '.join(unknown)}; the cases: {', '.join(CASES)}", file=sys.stderr)
        return 2
    failed = 0
    with tempfile.TemporaryDirectory(prefix="env-") as folder:
        inputs = Inputs(Path(folder) / "inputs")
        inputs.folder.mkdir()
        for name in names or CASES:
            (Path(folder) / name).mkdir()
            started = time.monotonic()
            try:
                CASES[name](Path(folder) / name)
            except Exception as error:
                failed += 1
                print(f"FAILED {name}: {error if isinstance(error, AssertionError) else repr(error)}", flush=True)
            else:
                print(f"ok {name} {time.monotonic() - started:.0f} s", flush=True)
    return 1 if failed else 0


# ---------------------------------------------------------------- configuration of Keras


@case
def keras_on_another_backend(folder: Path) -> None:
    """`KERAS_BACKEND` is for the user's other projects."""
    check_success(run(folder, *inputs.train(folder), variables={"KERAS_BACKEND": "jax"}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    raise SystemExit(main(sys.argv[1:]))
