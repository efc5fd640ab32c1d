"""A command that starts its own Ray: another Ray on the machine, a proxy, Ctrl-C, and the loss of its Ray."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from nodes import BIN, TRAINING, find_free_port, training_arguments, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]

ADDRESS_FILE = Path("/tmp/ray/ray_current_cluster")


@pytest.fixture(scope="module")
def other_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray as `ray start` leaves it, in the folder where every other Ray looks for one."""
    log = tmp_path_factory.mktemp("other") / "log"
    ports = [f"--{name}={find_free_port()}" for name in ("port", "dashboard-port", "ray-client-server-port")]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    before = ADDRESS_FILE.read_text() if ADDRESS_FILE.exists() else None
    ADDRESS_FILE.unlink(missing_ok=True)
    with log.open("wb") as stream:
        given = [BIN / "ray", "start", "--head", "--block", "--num-cpus=1", *ports]
        process = subprocess.Popen(given, stdout=stream, stderr=stream, env=environment, start_new_session=True)
    try:
        wait_until(ADDRESS_FILE.exists, 120, log.read_text)
        wait_until(lambda: "Ray runtime started" in log.read_text(), 120, log.read_text)
        yield
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()
        process.wait()
        ADDRESS_FILE.unlink(missing_ok=True)
        if before is not None:
            ADDRESS_FILE.write_text(before)


#: A background job ignores Ctrl-C, and so do its children, unless they change that.
DEFAULT_SIGINT = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
COMMAND = "from ray_cxr.cli import main\nraise SystemExit(main())\n"


def start(log: Path, *given: object, program: str = COMMAND) -> Any:
    """Start a command with a proxy whose port is closed."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= dict.fromkeys(("http_proxy", "https_proxy"), f"http://127.0.0.1:{find_free_port()}")
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-c", DEFAULT_SIGINT + program, *map(str, given)],
            stdout=stream, stderr=stream, env=environment, start_new_session=True,
        )  # fmt: skip


def test_commands_are_independent_of_another_ray(other_ray: None, manifest: Path, tmp_path: Path) -> None:
    sets, run, out, config = (tmp_path / name for name in ("sets", "run", "scores", "tune.toml"))
    settings = "".join(f"{key} = {value!r}\n" for key, value in (TRAINING | {"epochs": 1}).items())
    config.write_text(f"[train]\n{settings}[tune]\ntrials = 1\n")
    for given in (
        ["prepare", manifest, "--out", sets, "--size", "64"],
        training_arguments(sets, run, epochs=2, workers=2),
        ["score", "--model", run / "bundle", "--manifest", manifest, "--out", out],
        ["tune", sets, "--out", tmp_path / "study", "--config", config],
    ):
        log = tmp_path / f"{given[0]}.log"
        assert start(log, *given).wait(400) == 0, log.read_text()
    assert (out / "_SUCCESS").exists()


def stop_in_mid_run(prepared: Path, folder: Path, how: str) -> tuple[int, str, float]:
    """Start a long run and stop it after its first step; returns exit code, log and seconds."""
    log = folder / "log"
    process = start(log, *training_arguments(prepared, folder / "run", epochs=5000, patience=5000))
    wait_until(lambda: "first step done" in log.read_text() or process.poll() is not None, 200, log.read_text)
    children = {child.name(): child for child in psutil.Process(process.pid).children()}
    stopped_at = time.monotonic()
    if how == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    for name in {"gcs_server", "raylet"} & set(how.split()):
        children[name].terminate()
    code = process.wait(100)
    seconds = time.monotonic() - stopped_at
    time.sleep(1)  # a line may come right after the end
    return code, log.read_text(), seconds


def test_ctrl_c_in_training_names_the_way_to_continue(prepared: Path, tmp_path: Path) -> None:
    code, log, seconds = stop_in_mid_run(prepared, tmp_path, "Ctrl-C")
    assert code == 130, log
    assert re.fullmatch("ray-cxr train: stopped; .*the same command again.*", log.splitlines()[-1])
    assert seconds < 60


@pytest.mark.parametrize("lost", ["gcs_server", "raylet", "gcs_server raylet"])
def test_ray_that_goes_away_in_training_ends_it_with_a_line(lost: str, prepared: Path, tmp_path: Path) -> None:
    code, log, seconds = stop_in_mid_run(prepared, tmp_path, lost)
    assert code == 1, log
    assert "`ray stop`" in log.splitlines()[-1]
    assert "Traceback" not in log
    assert seconds < 55, "Ray's own limit"


def test_ctrl_c_during_export_ends_the_command(prepared: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = (
        "import time\nfrom ray_cxr.cli import main\nfrom ray_cxr.training import trainer\n"
        "def wait(*_, **__):\n    print('exporting', flush=True)\n    time.sleep(100)\n"
        "trainer.export_bundle = wait\nraise SystemExit(main())"
    )
    process = start(log, *training_arguments(prepared, tmp_path / "run", epochs=1), program=program)
    wait_until(lambda: "exporting" in log.read_text() or process.poll() is not None, 200, log.read_text)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, log.read_text()
    assert re.fullmatch("ray-cxr train: stopped; .*the same command again.*", log.read_text().splitlines()[-1])
