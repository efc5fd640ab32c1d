"""The long runs of `score` that `scripts/soak` starts: killed at random, and over thousands of damaged files.

    python tests/soak_scoring.py DIR --rounds 5     killed until it is done; then every row once
    python tests/soak_scoring.py DIR --files 10000  mutated PNG, JPEG and DICOM: no crash, one row each

What dies in a round, at random moments: the command with all that it started, its raylet, the actor that scores, the
decoders.
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
from test_exactly_once import arguments, processes, started  # noqa: E402

VICTIMS = {"an actor": b"ray::MapWorker", "the decoders": b"ray_cxr.data.sandbox", "the raylet": b"/raylet/raylet"}


def picture_rows(folder: Path, rows: int) -> Path:
    """A manifest of so many rows over a few pictures that take some milliseconds each."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for number in range(6):
        picture = noise.integers(0, 256, (900, 900), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png", compress_level=1)
    ids = [f"{row:08d}_000.png" for row in range(rows)]
    paths = [str(folder / f"{row % 7}.png") for row in range(rows)]  # each seventh is missing
    pq.write_table(pa.table({"image_id": ids, "path": paths}), folder / "m.parquet")
    return folder / "m.parquet"


def table_of(out: Path) -> pd.DataFrame:
    parts = sorted((out / "scores").glob("*.parquet"))
    return pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True)


def one_round(
    number: int, bundle: Path, manifest: Path, out: Path, expected: pd.DataFrame, draw: random.Random
) -> None:
    begun, killed, log = time.monotonic(), Counter[str](), out.with_suffix(".log")
    program = [sys.executable, "-m", "ray_cxr.cli", *arguments(bundle, manifest, out)]
    for _ in range(60):
        process = started(program, log)
        while process.poll() is None:
            try:
                process.wait(draw.uniform(3, 20))
            except subprocess.TimeoutExpired:
                name = draw.choice(["the command", "the command", *VICTIMS])
                if name == "the command":
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    for victim in processes(VICTIMS[name], session=process.pid):
                        os.kill(victim, signal.SIGKILL)
                killed[name] += 1
        if process.returncode == 0:
            break
        for left in processes(b"ray", session=process.pid):
            os.kill(left, signal.SIGKILL)
    else:
        raise SystemExit(f"round {number}: is not done after 60 starts:\n{log.read_text()[-3000:]}")
    pd.testing.assert_frame_equal(table_of(out), expected)
    kills = ", ".join(f"{what} {count} times" for what, count in sorted(killed.items())) or "nothing"
    print(f"round {number}: killed {kills}; {time.monotonic() - begun:.0f} s; every row once, every value the same")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="an empty folder to work in")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--files", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    bundle = make_tiny_bundle(chosen.out / "bundle").path
    if chosen.rounds:
        manifest = picture_rows(chosen.out / "pictures", chosen.rows)
        untouched = [sys.executable, "-m", "ray_cxr.cli", *arguments(bundle, manifest, chosen.out / "untouched")]
        subprocess.run(untouched, check=True)
        expected = table_of(chosen.out / "untouched")
        assert expected["image_id"].tolist() == pd.read_parquet(manifest)["image_id"].tolist()
        draw = random.Random(chosen.seed)
        for number in range(1, chosen.rounds + 1):
            one_round(number, bundle, manifest, chosen.out / f"round{number}", expected, draw)
    if chosen.files:
        folder, out = chosen.out / "files", chosen.out / "files-scores"
        make = [sys.executable, str(Path(__file__).with_name("soak_files.py")), str(folder)]
        subprocess.run([*make, "--files", str(chosen.files), "--seed", str(chosen.seed)], check=True)
        names = sorted(str(path) for path in folder.rglob("*") if path.is_file())
        pq.write_table(
            pa.table({"image_id": [Path(name).name for name in names], "path": names}), out.with_suffix(".m")
        )
        given = ["score", "--model", str(bundle), "--manifest", str(out.with_suffix(".m")), "--out", str(out)]
        subprocess.run([sys.executable, "-m", "ray_cxr.cli", *given, "--max-error-rate", "1"], check=True)
        table = table_of(out)
        assert sorted(table["path"]) == names
        counts = table["error_code"].fillna("ok").value_counts()
        assert "decoder_crash" not in counts
        assert "decode_timeout" not in counts
        print(f"{len(table):,} mutated files, one row each: {dict(counts)}")


if __name__ == "__main__":
    main()
