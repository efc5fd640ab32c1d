"""Compare training that uploads checkpoints in the background with training that waits for each upload.

    .venv/bin/python benchmarks/uploads.py --out uploads.json

RUN is in a bucket of an S3 server on this machine (moto), which takes uploads at a limited speed. One worker trains
through Ray, as `train` does. In its epoch, blocks of steps alternate: every round starts with another contestant, and
between two blocks the worker waits until all uploads are done, which does not count. The time of a checkpoint is that
of the training loop: it includes writing to the local disk.

    async   as `train`: a checkpoint is written to the local disk, and uploaded while training continues
    sync    the worker waits until each checkpoint is stored
    none    no checkpoints

The server shares the processor with the training. The images are noise. Exit codes: 0 done; 1 failed; 2 wrong
arguments.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from harness import (
    POSITIVE,
    ROOT,
    compare_rounds,
    create_console,
    create_parser,
    interleave,
    log,
    read_load,
    run_script,
)
from rich.table import Table
from training import write_set

from ray_cxr.config import Backbone, RaySettings, TrainSettings

sys.path.insert(0, str(ROOT / "tests"))

CONTESTANTS = ("async", "sync", "none")
#: Contestant and rival, by steps per second.
PAIRS = (("async", "none"), ("sync", "none"), ("async", "sync"))


def take_turns(turns: list[str], checkpoints: int, record: str) -> Callable[[], list[Any]]:
    """Return callbacks for a worker, whose n-th block of steps uploads its checkpoints as `turns[n]`.

    The worker writes seconds per block, and per checkpoint of it, to the file `record`.
    """

    def make() -> list[Any]:
        import shutil
        import time

        from keras.callbacks import LambdaCallback

        from ray_cxr.training import worker

        report, done = worker._report, []
        seconds: list[float] = []
        started = time.monotonic()

        def report_in_turn(metrics: Any, uploads: Any, *given: Any, wait: bool = False) -> None:
            nonlocal started, seconds
            if len(done) == len(turns):  # the end of the epoch
                return report(metrics, uploads, *given, wait=wait)
            turn, since = turns[len(done)], time.monotonic()
            if turn == "none":
                shutil.rmtree(given[-1])
            else:
                report(metrics, uploads, *given, wait=turn == "sync")
            seconds.append(time.monotonic() - since)
            if len(seconds) == checkpoints:
                done.append({"name": turn, "seconds": time.monotonic() - started, "checkpoints": seconds})
                uploads.wait()
                started, seconds = time.monotonic(), []
            return None

        def write(logs: object) -> None:
            Path(record).write_text(json.dumps(done), encoding="utf-8")

        worker._report = report_in_turn
        return [LambdaCallback(on_train_end=write)]

    return make


def measure(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_EC2_METADATA_DISABLED="true")
    from slow_store import SlowStore

    from ray_cxr.session import start_ray
    from ray_cxr.training.planning import plan_training
    from ray_cxr.training.trainer import fit

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    turns = ["none", *(name for _, name in interleave(CONTESTANTS, arguments.rounds))]  # the first is the warm-up
    per_block = arguments.every * arguments.checkpoints
    with tempfile.TemporaryDirectory(prefix="ray_cxr-benchmark-") as name, SlowStore(arguments.speed * 1e6) as store:
        rows = {"train": arguments.batch * (per_block * len(turns) + 2), "val": 8}
        prepared, record = write_set(Path(name) / "set", arguments.size, rows), Path(name) / "record.json"
        settings = TrainSettings(
            backbone=arguments.backbone,
            size=arguments.size,
            batch_size=arguments.batch,
            weights="none",
            epochs=1,
            checkpoint_steps=arguments.every,
        )
        result["load_before"] = read_load()
        callbacks = take_turns(turns, arguments.checkpoints, str(record))
        with start_ray(RaySettings()):
            fit(plan_training(prepared, store("run"), settings), callbacks=callbacks, on_event=log)
        result["load_after"] = read_load()
        listed = store.client.list_objects_v2(Bucket="slow", Prefix="run/ray/checkpoint")["Contents"]
        # A checkpoint during an epoch; the one at its end also has the weights alone.
        result["checkpoint_mb"] = max(entry["Size"] for entry in listed if entry["Key"].endswith("state.npz")) / 1e6
        result["blocks"] = json.loads(record.read_text(encoding="utf-8"))[1:]
    show(create_console(), result, arguments, per_block)


def format_spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def show(console: Any, result: dict[str, Any], arguments: argparse.Namespace, per_block: int) -> None:
    """Print the table, and add steps per second and ratios to the result."""
    blocks = {name: [one for one in result["blocks"] if one["name"] == name] for name in CONTESTANTS}
    rates = {name: [per_block / one["seconds"] for one in each] for name, each in blocks.items()}
    table = Table(
        title=f"{arguments.backbone}, {arguments.size} pixels, batch {arguments.batch}: {arguments.rounds} rounds of "
        f"{per_block} steps, a checkpoint every {arguments.every} steps, uploads of "
        f"{result['checkpoint_mb']:.1f} MB at {arguments.speed:g} MB/s"
    )
    table.add_column("checkpoints")
    for title in ("steps/s, median (min to max)", "seconds per checkpoint in the loop"):
        table.add_column(title, justify="right")
    for name, each in blocks.items():
        waits = [seconds for one in each for seconds in one["checkpoints"]]
        table.add_row(name, format_spread(rates[name]), format_spread(waits) if name != "none" else "-")
    console.print(table)
    result["ratios"] = {f"{a}/{b}": compare_rounds(rates[a], rates[b]) for a, b in PAIRS}
    for pair, found in result["ratios"].items():
        console.print(f"steps/s, {pair}: {found['ratio']:.3f} (median of the rounds' ratios)")
    console.print(f"load {result['load_before']:.1f} before, {result['load_after']:.1f} after")


def parse() -> argparse.Namespace:
    parser = create_parser(__doc__)
    parser.add_argument("--backbone", default="MobileNetV3Small", choices=get_args(Backbone), help="MobileNetV3Small")
    parser.add_argument("--size", default=96, help="of the images, pixels (96)", **POSITIVE)
    parser.add_argument("--batch", default=16, help="images per step (16)", **POSITIVE)
    parser.add_argument("--every", default=24, help="steps between checkpoints (24)", **POSITIVE)
    parser.add_argument("--checkpoints", default=2, help="of a block (2)", **POSITIVE)
    parser.add_argument("--rounds", default=4, help="blocks of each contestant (4)", **POSITIVE)
    parser.add_argument(
        "--speed", type=float, default=10.0, metavar="MB", help="of an upload, megabytes per second (10)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_script(parse, measure))
