"""Every row exactly once, whatever is killed: real processes, real SIGKILLs, the rows read from the Parquet files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROWS = 900
#: Ends the process as a power cut would, at the moment between the last row and the mark that says so.
DIES_BEFORE_SUCCESS = """
import os, signal, sys
from ray_cxr.data import atomic
write_text = atomic.write_text
def write(path, text):
    if str(path).endswith("_SUCCESS"):
        os.kill(os.getpid(), signal.SIGKILL)
    write_text(path, text)
atomic.write_text = write
from ray_cxr.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def slow_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows enough, of pictures large enough, that there is a middle to be killed in; two rows have no file."""
    folder = tmp_path_factory.mktemp("slow")
    noise = np.random.default_rng(0)
    for number in range(6):
        picture = noise.integers(0, 256, (900, 900), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png", compress_level=1)
    ids = [f"{row:08d}_000.png" for row in range(ROWS)]
    paths = [str(folder / f"{row % 6}.png") for row in range(ROWS)]
    paths[5] = paths[700] = str(folder / "none.png")
    pq.write_table(pa.table({"image_id": ids, "path": paths}), folder / "m.parquet")
    return folder / "m.parquet"


def arguments(bundle: Path, manifest: Path, out: Path, *more: str) -> list[str]:
    given = ["score", "--model", str(bundle), "--manifest", str(manifest), "--out", str(out)]
    return [*given, "--set", "rows_per_file=32", "--set", "batch_size=8", *more]


def started(program: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with open(log, "ab") as stream:
        return subprocess.Popen(program, start_new_session=True, stdout=stream, stderr=stream, env=environment)


def parts(out: Path) -> int:
    return len(list((out / "scores").glob("part-*.parquet")))


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes] | None, log: Path | None = None) -> None:
    deadline = time.monotonic() + 150
    while not what():
        assert process is None or process.poll() is None, log and log.read_text()
        assert time.monotonic() < deadline, log and log.read_text()
        time.sleep(0.02)


def processes(title: bytes, *, session: int | None = None, below: int | None = None) -> list[int]:
    """Process ids by a part of the command line: of one session, or of those that a process started, and they."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line, number = (folder / "cmdline").read_bytes(), int(folder.name)
            if title in line and (os.getsid(number) == session or (below is not None and below in ancestors(number))):
                found.append(number)
        except OSError:
            continue
    return found


def ancestors(number: int) -> Iterator[int]:
    while number > 1:
        # The second field, in brackets, is a name that can hold anything.
        number = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
        yield number


def assert_each_row_once(out: Path, manifest: Path) -> pd.DataFrame:
    files = sorted((out / "scores").iterdir())
    assert all(file.name.startswith("part-") for file in files)
    table = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    assert table["image_id"].tolist() == pd.read_parquet(manifest)["image_id"].tolist()
    assert table["error_code"].dropna().to_dict() == {5: "missing", 700: "missing"}
    assert (out / "_SUCCESS").exists()
    return table


@pytest.mark.ray
@pytest.mark.timeout(420)
def test_the_command_and_its_raylet_killed_again_and_again(slow_manifest: Path, tiny_bundle, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    given = arguments(tiny_bundle.path, slow_manifest, out)
    command = [sys.executable, "-m", "ray_cxr.cli", *given]

    process = started(command, log)  # in the middle
    wait_for(lambda: parts(out) >= 3, process, log)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert parts(out) < -(-ROWS // 32)
    kept = {path: path.stat().st_mtime_ns for path in (out / "scores").glob("part-*.parquet")}

    process = started(command, log)  # its only node dies under it: it ends by itself, and says something
    wait_for(lambda: parts(out) >= len(kept) + 3, process, log)
    for raylet in processes(b"/raylet/raylet", session=process.pid):
        os.kill(raylet, signal.SIGKILL)
    assert process.wait(120) not in (0, -signal.SIGKILL), log.read_text()
    for left in processes(b"ray", session=process.pid):
        os.kill(left, signal.SIGKILL)
    assert not (out / "_SUCCESS").exists()

    process = started([sys.executable, "-c", DIES_BEFORE_SUCCESS, *given], log)  # between the last row and the mark
    assert process.wait(180) == -signal.SIGKILL, log.read_text()
    assert not (out / "_SUCCESS").exists()
    assert parts(out) == -(-ROWS // 32)

    begun = time.monotonic()
    process = started(command, log)  # nothing is left but to count: Ray is not started for it
    assert process.wait(60) == 0, log.read_text()
    assert time.monotonic() - begun < 60
    assert_each_row_once(out, slow_manifest)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # what was whole was not done again

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert started(command, log).wait(60) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.ray
def test_a_scoring_actor_and_its_decoders_killed(
    ray_here, slow_manifest: Path, tiny_bundle, tmp_path: Path, command
) -> None:
    """Ray starts the actor again, the ranges that it had in work are done again, and nothing else is."""
    out, killed = tmp_path / "out", []

    def kill() -> None:
        wait_for(lambda: parts(out) >= 2, None)
        for decoder in processes(b"ray_cxr.data.sandbox", below=os.getpid()):
            os.kill(decoder, signal.SIGKILL)
            killed.append("decoder")
        wait_for(lambda: parts(out) >= 8, None)
        for actor in processes(b"ray::MapWorker", below=os.getpid()):
            os.kill(actor, signal.SIGKILL)
            killed.append("actor")

    thread = threading.Thread(target=kill)
    thread.start()
    code, said, err = command(*arguments(tiny_bundle.path, slow_manifest, out))
    thread.join()
    assert code == 0, err
    assert killed.count("actor") == 1, said
    assert killed.count("decoder") >= 1
    assert_each_row_once(out, slow_manifest)
