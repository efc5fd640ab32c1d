"""Random long runs of `score`, which `scripts/soak` starts: killed at random moments, and over damaged files.

    python tests/soak_scoring.py DIR --rounds 5     killed until it is done; then every row once
    python tests/soak_scoring.py DIR --files 10000  mutated PNG, JPEG and DICOM: no crash, one row each

Each kill hits the command with all that it started, its raylet, its actors, or its decoders.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).with_name("scoring"))]
from conftest import make_tiny_bundle  # noqa: E402
from score_folders import arguments, find_processes, read_rows, start_command  # noqa: E402

VICTIMS = {"actors": b"ray::MapWorker", "decoders": b"ray_cxr.data.sandbox", "raylet": b"/raylet/raylet"}
STARTS = 60  # per round


def write_manifest(path: Path, paths: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"{row:08d}_{Path(name).name}" for row, name in enumerate(paths)]
    pq.write_table(pa.table({"image_id": ids, "path": paths}), path)
    return path


def run(given: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "ray_cxr.cli", *given], check=True)


def kill(session: int, victim: str) -> None:
    if victim == "command":
        os.killpg(session, signal.SIGKILL)
        return
    for process in find_processes(VICTIMS[victim], session=session):
        os.kill(process, signal.SIGKILL)


def run_round(number: int, given: list[str], out: Path, expected: pd.DataFrame, draw: random.Random) -> None:
    """Start the command until it exits with 0, and kill something every few seconds."""
    start, killed, log = time.monotonic(), Counter[str](), out.with_suffix(".log")
    for _ in range(STARTS):
        process = start_command(given, log)
        while process.poll() is None:
            try:
                process.wait(draw.uniform(3, 20))
            except subprocess.TimeoutExpired:
                victim = draw.choice(["command", "command", *VICTIMS])
                kill(process.pid, victim)
                killed[victim] += 1
        if process.returncode == 0:
            break
        for remaining in find_processes(b"ray", session=process.pid):
            os.kill(remaining, signal.SIGKILL)
    else:
        raise SystemExit(f"round {number}: not done after {STARTS} starts:\n{log.read_text()[-3000:]}")
    pd.testing.assert_frame_equal(read_rows(out), expected)
    print(
        f"round {number}: kills {dict(killed)}; {time.monotonic() - start:.0f} s; every row once, every value the same"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="an empty folder to work in")
    for name, default in (("rounds", 0), ("rows", 6000), ("files", 0), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    bundle = make_tiny_bundle(chosen.out / "bundle")
    if chosen.rounds:
        noise = np.random.default_rng(0)
        images = [chosen.out / f"{number}.png" for number in range(7)]
        for path in images[:6]:  # the seventh is missing
            Image.fromarray(noise.integers(0, 256, (900, 900), dtype=np.uint8)).save(path, compress_level=1)
        manifest = write_manifest(chosen.out / "m.parquet", [str(images[row % 7]) for row in range(chosen.rows)])
        undisturbed = chosen.out / "undisturbed"
        run(arguments(bundle, manifest, undisturbed))
        expected, draw = read_rows(undisturbed), random.Random(chosen.seed)
        assert expected["image_id"].tolist() == pd.read_parquet(manifest)["image_id"].tolist()
        for number in range(1, chosen.rounds + 1):
            out = chosen.out / f"round{number}"
            run_round(number, arguments(bundle, manifest, out), out, expected, draw)
    if chosen.files:
        folder, out = chosen.out / "files", chosen.out / "files-scores"
        make = [sys.executable, str(Path(__file__).with_name("soak_files.py")), str(folder)]
        subprocess.run([*make, "--files", str(chosen.files), "--seed", str(chosen.seed)], check=True)
        paths = sorted(str(path) for path in folder.rglob("*") if path.is_file())
        manifest = write_manifest(chosen.out / "files.parquet", paths)
        run(arguments(bundle, manifest, out, "--max-error-rate", 1))
        table = read_rows(out)
        assert table["path"].tolist() == paths
        counts = Counter(table["error_code"].fillna("ok"))
        assert not {"decoder_crash", "decode_timeout"} & set(counts)
        print(f"{len(table):,} mutated files, one row each: {dict(counts)}")


if __name__ == "__main__":
    main()
