"""Kill `score`, `train` or `tune` at random moments until they finish, or score damaged files.

    python tests/soak.py scoring DIR --rounds 5     also training or tuning
    python tests/soak.py files DIR --files 10000    mutated PNG, JPEG and DICOM: no crash, one row each

Each round must end with the results of an uninterrupted run: every row once with identical values; the metrics of every
epoch and every bit of the weights; or the same trials, epochs and best trial.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / folder) for folder in (".", "scoring", "training")]
import score_folders  # noqa: E402
import soak_files  # noqa: E402
import test_kill  # noqa: E402
from conftest import make_tiny_bundle, write_noise, write_phantom_manifest  # noqa: E402

import ray_cxr  # noqa: E402
from ray_cxr.imaging.phantoms import write_phantoms  # noqa: E402

STARTS = 60  # per round
#: Victims apart from the command and its children, by a part of their command line.
VICTIMS = {
    "actors": b"ray::MapWorker",
    "decoders": b"ray_cxr.imaging.sandbox",
    "raylet": b"/raylet/raylet",
    "workers": b"RayTrainWorker",
}
RATES = [0.003, 0.01, 0.0003, 0.03, 0.001]
SEARCH = f"""
train = {{backbone = "TinyCNN", weights = "none", epochs = 4, batch_size = 8, min_positives = 2, checkpoint_steps = 3}}
[tune]
trials = {len(RATES)}
scheduler = "none"
enqueue = [{", ".join(f"{{ learning_rate = {rate} }}" for rate in RATES)}]
[tune.space]
learning_rate = {{ low = 1e-5, high = 1e-1, log = true }}
"""


class Soak(NamedTuple):
    """A command to kill."""

    arguments: Callable[[Path], list[str]]  # returns the command line for an output folder
    victims: Sequence[str]  # each kill picks a victim at random
    seconds: tuple[float, float]  # minimum and maximum time between two kills
    compare: Callable[[Path, Path], None]  # compares the output of a round with that of the uninterrupted run


def run(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "ray_cxr.cli", *arguments], check=True)


def kill(session: int, victim: str, draw: random.Random) -> bool:
    """Kill a victim; return False if there is none."""
    if victim == "command":
        os.killpg(session, signal.SIGKILL)
        return True
    found = score_folders.find_processes(VICTIMS[victim], session=session)
    for process in [draw.choice(found)] if found and victim == "workers" else found:
        os.kill(process, signal.SIGKILL)
    return bool(found)


def run_round(number: int, soak: Soak, out: Path, reference: Path, draw: random.Random) -> None:
    """Start the command until it finishes, and kill a victim at random moments."""
    start, killed, log = time.monotonic(), Counter[str](), out.with_suffix(".log")
    for _ in range(STARTS):
        process = score_folders.start_command(soak.arguments(out), log)
        while process.poll() is None:
            try:
                process.wait(draw.uniform(*soak.seconds))
            except subprocess.TimeoutExpired:
                victim = draw.choice(soak.victims)
                if kill(process.pid, victim, draw):
                    killed[victim] += 1
        if process.returncode == 0:
            break
        if process.returncode != -signal.SIGKILL and not set(killed) - {"command"}:
            raise SystemExit(f"round {number}: failed without a kill:\n{log.read_text(encoding='utf-8')[-3000:]}")
        for remaining in score_folders.find_processes(b"ray", session=process.pid):
            os.kill(remaining, signal.SIGKILL)
    else:
        raise SystemExit(f"round {number}: not done after {STARTS} starts:\n{log.read_text(encoding='utf-8')[-3000:]}")
    soak.compare(out, reference)
    print(f"round {number}: kills {dict(killed)}; {time.monotonic() - start:.0f} s; identical results", flush=True)


def write_rows(path: Path, paths: list[str]) -> Path:
    ids = [f"{row:08d}_{Path(name).name}" for row, name in enumerate(paths)]
    pq.write_table(pa.table({"image_id": ids, "path": paths}), path)
    return path


def scoring(home: Path) -> Soak:
    bundle, images = make_tiny_bundle(home / "bundle"), [*write_noise(home), home / "missing.png"]
    manifest = write_rows(home / "m.parquet", [str(images[row % 7]) for row in range(6000)])

    def compare(out: Path, reference: Path) -> None:
        rows = score_folders.read_rows(out)
        assert rows["image_id"].tolist() == pd.read_parquet(manifest)["image_id"].tolist()
        pd.testing.assert_frame_equal(rows, score_folders.read_rows(reference))

    victims = ("command", "command", "actors", "decoders", "raylet")
    arguments = lambda out: score_folders.arguments(bundle, manifest, out)  # noqa: E731
    return Soak(arguments, victims, (3, 20), compare)


def prepare(home: Path) -> Path:
    drawn = write_phantoms(home / "phantoms", patients=60, size=128)
    manifest = write_phantom_manifest(drawn, home / "m.parquet")
    run(["prepare", str(manifest), "--out", str(home / "prepared"), "--size", "64"])
    return home / "prepared"


def training(home: Path) -> Soak:
    prepared = prepare(home)
    arguments = lambda out: test_kill.arguments(prepared, out, 2, epochs=8, patience=8)  # noqa: E731
    return Soak(arguments, ("command", "workers"), (8, 45), test_kill.assert_same_bits)


def read_search(out: Path) -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    rows = pq.read_table(out / "trials.parquet").to_pandas().set_index("number")
    curves = [pd.read_csv(out / f"trials/{number:04d}/metrics.csv")[test_kill.NUMBERS] for number in rows.index]
    return rows, curves


def compare_search(out: Path, reference: Path) -> None:
    (rows, curves), (reference_rows, reference_curves) = read_search(out), read_search(reference)
    assert rows.index.tolist() == list(range(len(RATES))), rows.index
    assert rows["state"].tolist() == ["finished"] * len(RATES), rows["state"]
    assert rows["param_learning_rate"].tolist() == RATES, "a trial has another's settings"
    for number, (found, wanted) in enumerate(zip(curves, reference_curves, strict=True)):
        pd.testing.assert_frame_equal(found, wanted, check_exact=True, obj=f"trial {number}")
    best = ray_cxr.load_bundle(out / "bundle").info["provenance"]["tuned"]["trial"]
    assert best == reference_rows["val_auroc"].idxmax(), best


def tuning(home: Path) -> Soak:
    prepared, settings = prepare(home), home / "search.toml"
    settings.write_text(SEARCH, encoding="utf-8")
    arguments = lambda out: ["tune", str(prepared), "--out", str(out), "--config", str(settings)]  # noqa: E731
    return Soak(arguments, ("command",), (20, 90), compare_search)


def score_damaged(home: Path, count: int, seed: int) -> None:
    folder, out = home / "files", home / "scores"
    folder.mkdir()
    for number in range(count):
        name, data = soak_files.mutated(seed, number)
        (folder / name).write_bytes(data)
    paths = sorted(map(str, folder.iterdir()))
    manifest = write_rows(home / "files.parquet", paths)
    run(score_folders.arguments(make_tiny_bundle(home / "bundle"), manifest, out, "--max-error-rate", 1))
    table = score_folders.read_rows(out)
    assert table["path"].tolist() == paths
    counts = Counter(table["error_code"].fillna("ok"))
    assert not {"decoder_crash", "decode_timeout"} & set(counts), counts
    print(f"{len(table):,} mutated files, one row each: {dict(counts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    soaks = {"scoring": scoring, "training": training, "tuning": tuning}
    parser.add_argument("what", choices=[*soaks, "files"])
    parser.add_argument("out", type=Path, help="an empty folder to work in")
    for name, default in (("rounds", 5), ("files", 10_000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.what == "files":
        score_damaged(chosen.out, chosen.files, chosen.seed)
        return
    soak, draw, reference = soaks[chosen.what](chosen.out), random.Random(chosen.seed), chosen.out / "reference"
    run(soak.arguments(reference))
    soak.compare(reference, reference)
    for number in range(1, chosen.rounds + 1):
        run_round(number, soak, chosen.out / f"round{number}", reference, draw)


if __name__ == "__main__":
    main()
