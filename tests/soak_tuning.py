"""The long runs that `scripts/soak` starts: a search whose command is killed at random until it ends by itself.

The trials' settings are given, so that an untouched search has the same ones. Each round must end with as many trials,
each with every number of every epoch of its twin, none of them twice, and the same best one.
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

import pandas as pd
import pyarrow.parquet as pq
from soak_training import started

import ray_cxr

NUMBERS = ["epoch", "loss", "val_loss", "val_auroc", "learning_rate"]
RATES = (0.003, 0.01, 0.0003, 0.03, 0.001)
SEARCH = """
[train]
backbone = "TinyCNN"
weights = "none"
epochs = 4
batch_size = 8
min_positives = 2
checkpoint_steps = 3
[tune]
trials = {trials}
scheduler = "none"
[tune.space]
learning_rate = {{ low = 1e-5, high = 1e-1, log = true }}
"""


def outcome(out: Path) -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    """The trials, and the numbers of the epochs of each."""
    rows = pq.read_table(out / "trials.parquet").to_pandas().set_index("number")
    curves = [pd.read_csv(out / "trials" / f"{number:04d}" / "metrics.csv")[NUMBERS] for number in rows.index]
    return rows, curves


def check(out: Path, expected: tuple[pd.DataFrame, list[pd.DataFrame]]) -> None:
    rows, curves = outcome(out)
    assert rows.index.tolist() == list(range(len(RATES))), rows.index
    assert rows["state"].tolist() == ["finished"] * len(RATES), rows["state"]
    assert rows["param_learning_rate"].tolist() == list(RATES), "a trial has another's settings"
    for number, (found, wanted) in enumerate(zip(curves, expected[1], strict=True)):
        pd.testing.assert_frame_equal(found, wanted, check_exact=True, obj=f"trial {number}")
    best = ray_cxr.load_bundle(out / "bundle").info["provenance"]["tuned"]["trial"]
    assert best == expected[0]["val_auroc"].idxmax(), best


def one_round(number: int, program: list[str], out: Path, expected: object, draw: random.Random) -> None:
    begun, kills, log = time.monotonic(), 0, out.with_suffix(".log")
    while True:
        process = started(program, log)
        try:
            process.wait(draw.uniform(20, 90))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            time.sleep(2)  # Ray's own processes notice that their command is gone
            continue
        if process.returncode:
            raise SystemExit(f"round {number}: failed by itself:\n{log.read_text()}")
        break
    check(out, expected)  # type: ignore[arg-type]
    print(
        f"round {number}: killed {kills} times; {time.monotonic() - begun:.0f} s; every trial as untouched", flush=True
    )


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
    points = "".join(f"[[tune.enqueue]]\nlearning_rate = {rate}\n" for rate in RATES)
    config = chosen.out / "search.toml"
    config.write_text(SEARCH.format(trials=len(RATES)) + points, encoding="utf-8")

    def program(out: Path) -> list[str]:
        return [*command, "tune", str(prepared), "--out", str(out), "--config", str(config)]

    subprocess.run(program(chosen.out / "untouched"), check=True)
    expected = outcome(chosen.out / "untouched")
    check(chosen.out / "untouched", expected)
    for number in range(1, chosen.rounds + 1):
        out = chosen.out / f"round{number}"
        one_round(number, program(out), out, expected, draw)


if __name__ == "__main__":
    main()
