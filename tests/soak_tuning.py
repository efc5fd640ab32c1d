"""Long runs of `scripts/soak`: a search whose command is killed at random moments until it ends by itself.

The settings of the trials are fixed, so each round must give the same trials, epochs and best trial as a search that
nothing happened to.
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

import pandas as pd
import pyarrow.parquet as pq
from soak_training import started

import ray_cxr

COLUMNS = ["epoch", "loss", "val_loss", "val_auroc", "learning_rate"]
RATES = [0.003, 0.01, 0.0003, 0.03, 0.001]
SEARCH = f"""
[train]
backbone = "TinyCNN"
weights = "none"
epochs = 4
batch_size = 8
min_positives = 2
checkpoint_steps = 3
[tune]
trials = {len(RATES)}
scheduler = "none"
enqueue = [{", ".join(f"{{ learning_rate = {rate} }}" for rate in RATES)}]
[tune.space]
learning_rate = {{ low = 1e-5, high = 1e-1, log = true }}
"""


def read_outcome(out: Path) -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    """Return the record of a search and the epochs of each trial."""
    rows = pq.read_table(out / "trials.parquet").to_pandas().set_index("number")
    return rows, [pd.read_csv(out / f"trials/{number:04d}/metrics.csv")[COLUMNS] for number in rows.index]


def check(out: Path, expected: Any) -> None:
    rows, curves = read_outcome(out)
    assert rows.index.tolist() == list(range(len(RATES))), rows.index
    assert rows["state"].tolist() == ["finished"] * len(RATES), rows["state"]
    assert rows["param_learning_rate"].tolist() == RATES, "a trial has another's settings"
    for number, (found, wanted) in enumerate(zip(curves, expected[1], strict=True)):
        pd.testing.assert_frame_equal(found, wanted, check_exact=True, obj=f"trial {number}")
    best = ray_cxr.load_bundle(out / "bundle").info["provenance"]["tuned"]["trial"]
    assert best == expected[0]["val_auroc"].idxmax(), best


def run_round(number: int, program: list[str], out: Path, expected: Any, draw: random.Random) -> None:
    start, kills, log = time.monotonic(), 0, out.with_suffix(".log")
    while True:
        process = started(program, log)
        try:
            code = process.wait(draw.uniform(20, 90))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            time.sleep(2)  # Ray's own processes notice that the command is gone
            continue
        if code:
            raise SystemExit(f"round {number}: failed by itself:\n{log.read_text(encoding='utf-8')}")
        break
    check(out, expected)
    print(f"round {number}: {kills} kills, {time.monotonic() - start:.0f} s, every trial as expected", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="an empty folder to work in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from ray_cxr.data.manifest import build_manifest, write_manifest
    from ray_cxr.data.phantoms import write_phantoms

    home, draw = arguments.out, random.Random(arguments.seed)
    home.mkdir(parents=True, exist_ok=True)
    drawn = write_phantoms(home / "phantoms", patients=60, size=128)
    fractions = (0.6, 0.2, 0.2)
    table, _ = build_manifest([str(drawn.table)], images=str(drawn.images), split="patient", fractions=fractions)
    write_manifest(table, home / "m.parquet")
    (home / "search.toml").write_text(SEARCH, encoding="utf-8")
    command, prepared = [sys.executable, "-m", "ray_cxr.cli"], str(home / "prepared")
    subprocess.run([*command, "prepare", str(home / "m.parquet"), "--out", prepared, "--size", "64"], check=True)

    def program(out: Path) -> list[str]:
        return [*command, "tune", prepared, "--out", str(out), "--config", str(home / "search.toml")]

    subprocess.run(program(home / "untouched"), check=True)
    expected = read_outcome(home / "untouched")
    check(home / "untouched", expected)
    for number in range(1, arguments.rounds + 1):
        out = home / f"round{number}"
        run_round(number, program(out), out, expected, draw)


if __name__ == "__main__":
    main()
