"""Helpers of the tests in this folder: arguments of `score`, and what it left in its output folder."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from ray_cxr.config import ScoreSettings
from ray_cxr.scoring.ranges import ScoreJob
from ray_cxr.storage import run_folder


def arguments(model: object, source: object, out: object, *more: object) -> list[str]:
    """Arguments of `score` in fp32; they agree with those that made the fixture `scores`."""
    kind = "--manifest" if str(source).partition("?")[0].endswith(".parquet") else "--images"
    given = ["score", "--model", getattr(model, "path", model), kind, source, "--out", out, "--precision", "fp32"]
    # With one CPU per actor the tests without Ray start one decoder.
    for setting in ("rows_per_file=16", "batch_size=8", "heatmap_pixels=128", "cpus_per_actor=1"):
        given += ["--set", setting]
    return [str(item) for item in (*given, *more)]


def make_job(bundle: Any, out: Path, **settings: Any) -> ScoreJob:
    """Build the job of a run in `out`, for tests that call the actor classes."""
    return ScoreJob(
        bundle=str(bundle.path),
        out=str(out),
        digest=bundle.digest,
        precision="fp32",
        settings=ScoreSettings(**settings),
        spec=bundle.input_spec,
        use_gpu=False,
        batch_size=8,
        key=None,
        run_digest=run_folder.digest_settings(out),
    )


def read_rows(out: Path) -> pd.DataFrame:
    """Read all rows of scores, in the order of their files."""
    return pd.concat([pd.read_parquet(part) for part in sorted((out / "scores").glob("*.parquet"))], ignore_index=True)


def read_maps(out: Path) -> pd.DataFrame:
    """Read all rows of heat maps, in the order of their files."""
    return pd.concat([pd.read_parquet(part) for part in sorted((out / "heatmaps").glob("*.parquet"))])


def modification_times(folder: Path, pattern: str = "*") -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern) if path.is_file()}


def assert_done(outcome: tuple[int, str, str]) -> str:
    """Exit code 0; returns what was printed."""
    code, said, err = outcome
    assert code == 0, err
    return said


def assert_refused(outcome: tuple[int, str, str], *words: str) -> None:
    """Exit code 2 and one line on stderr, which names what is wrong."""
    code, _, err = outcome
    assert (code, err.count("\n")) == (2, 1), err
    for word in words:
        assert word in err


def write_archive(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def start_command(given: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start `ray-cxr` in a new session, with its own Ray."""
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    program = [sys.executable, "-m", "ray_cxr.cli", *given]
    with open(log, "ab") as stream:
        return subprocess.Popen(
            program, start_new_session=True, stdout=stream, stderr=stream, env={**inherited, **environment}
        )


def count_parts(out: Path, folder: str = "scores") -> int:
    return len(list((out / folder).glob("part-*.parquet")))


def find_processes(title: str, session: int | None = None) -> list[int]:
    """Find processes by a part of their command line: those of a session, or the descendants of this process."""
    found = []
    for process in psutil.process_iter() if session else psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            if title in " ".join(process.cmdline()) and session in (None, os.getsid(process.pid)):
                found.append(process.pid)
    return found
