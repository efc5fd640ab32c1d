"""The long runs that `scripts/soak` starts: training killed at random, again and again, and what it ends with.

Each round trains the same model as an untouched run did, with two workers. At random moments the command and all that
it started, or a single worker, gets SIGKILL; the command is started again until it ends by itself. Then every number
of every epoch and every bit of the weights must be those of the untouched run.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).with_name("training")))
from test_kill import arguments, assert_same_bits, outcome


def training_workers() -> list[int]:
    """Return the process ids of Ray Train's workers on this machine."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"RayTrainWorker" in title:
            found.append(int(folder.name))
    return found


def started(program: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, without a Ray address."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with open(log, "ab") as stream:
        return subprocess.Popen(program, start_new_session=True, stdout=stream, stderr=stream, env=environment)


def run_round(number: int, program: list[str], out: Path, expected: Any, draw: random.Random) -> None:
    start, kills, log = time.monotonic(), {"the command": 0, "a worker": 0}, out.with_suffix(".log")
    while True:
        process = started(program, log)
        while process.poll() is None:
            try:
                process.wait(draw.uniform(8, 45))
            except subprocess.TimeoutExpired:
                if draw.random() < 0.5:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    kills["the command"] += 1
                elif workers := training_workers():
                    os.kill(draw.choice(workers), signal.SIGKILL)
                    kills["a worker"] += 1
        if process.returncode == 0:
            break
        if process.returncode != -signal.SIGKILL and not kills["a worker"]:
            raise SystemExit(f"round {number}: failed by itself:\n{log.read_text(encoding='utf-8')}")
        time.sleep(2)  # Ray's own processes notice that their command is gone
    assert_same_bits(out, expected)
    shown = ", ".join(f"{what} {count} times" for what, count in kills.items())
    print(f"round {number}: killed {shown}; {time.monotonic() - start:.0f} s; every bit as untouched", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="an empty folder to work in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    from ray_cxr.data.manifest import build_manifest, write_manifest
    from ray_cxr.data.phantoms import write_phantoms

    chosen.out.mkdir(parents=True, exist_ok=True)
    drawn = write_phantoms(chosen.out / "phantoms", patients=60, size=128)
    fractions = (0.6, 0.2, 0.2)
    table, _ = build_manifest([str(drawn.table)], images=str(drawn.images), split="patient", fractions=fractions)
    write_manifest(table, chosen.out / "m.parquet")
    command = [sys.executable, "-m", "ray_cxr.cli"]
    prepared, draw = chosen.out / "prepared", random.Random(chosen.seed)
    subprocess.run([*command, "prepare", chosen.out / "m.parquet", "--out", prepared, "--size", "64"], check=True)

    def program(name: str) -> list[str]:
        return [*command, *arguments(prepared, chosen.out / name, 2, epochs=8, patience=8)]

    subprocess.run(program("untouched"), check=True)
    expected = outcome(chosen.out / "untouched")
    for number in range(1, chosen.rounds + 1):
        run_round(number, program(f"round{number}"), chosen.out / f"round{number}", expected, draw)


if __name__ == "__main__":
    main()
