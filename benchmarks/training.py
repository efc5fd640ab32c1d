"""Compare the speed of training with Keras's own `fit` on this machine in the same minutes, or measure memory.

    .venv/bin/python benchmarks/training.py --out speed.json
    .venv/bin/python benchmarks/training.py --memory --out memory.json

Speed: every contestant has one or two processes, which live through the whole comparison. Each trains a block of a few
steps while the others wait, and every round starts with another contestant. Other load on the machine thus affects all
of them: a ratio is meaningful where images per second alone are not. Only complete training steps count, with fetching
images. Start-up does not count, and neither does the end of our epoch, which the table shows separately.

    ours             1 worker with 2 threads, set up as `training/worker.py` does, on shards; without augmentation,
                     because the rival has none
    ours-augmented   the same with the default augmentation
    fit              `Model.fit` of the same model, the same images in memory behind tf.data, jit_compile=False
    fit-xla          the same with Keras's default, jit_compile="auto"; only with --xla-rival. Keras 3.15 makes it False
                     without a GPU, so that this equals `fit`; a line under the table shows it
    two              2 workers with 1 thread each, sharing the same global batch

Memory (--memory, Linux only): the peak memory of one worker that trains a TinyCNN at 64 pixels and validates, on 500
and on 50,000 images, in the same number of steps.

The images are noise. Exit codes: 0 done, whether or not the bars are met; 1 a contestant failed; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from harness import (
    POSITIVE,
    Channel,
    Children,
    compare_rounds,
    compute_medians,
    create_console,
    create_parser,
    format_bar,
    interleave,
    log,
    meets,
    read_load,
    read_status,
    run_script,
)
from rich.table import Table

from ray_cxr.config import Backbone, InputSpec, TrainSettings, build
from ray_cxr.data import prepared, shards
from ray_cxr.errors import ConfigError
from ray_cxr.storage import atomic
from ray_cxr.storage.run_folder import create_run

#: Threads of a contestant, divided among its workers.
THREADS = 2
#: Steps before the timing starts; the first one also builds the graph.
WARM_UP_STEPS = 2
#: Seconds that a contestant may take to warm up, and for a block; XLA can compile for many minutes.
WARM_UP_S, BLOCK_S = 5400.0, 3600.0
NO_AUGMENTATION = {"flip": False, "shift": 0.0, "contrast": 0.0, "rotation": 0.0, "zoom": 0.0}
#: Images that --memory compares, number of passes, and steps per pass; an epoch ends with the images or the pass.
MEMORY_ROWS, MEMORY_PASSES, MEMORY_STEPS = (500, 50_000), 3, 200
MEMORY_SETTINGS: dict[str, Any] = {"backbone": "TinyCNN", "size": 64, "batch_size": 32, "weights": "none"}


@dataclass(frozen=True)
class Contestant:
    """One contestant.

    Attributes:
        title: for people.
        ours: our loop; otherwise Keras's `fit`.
        rival: the contestant to compare it with; None: no comparison.
        workers: number of processes, which share `THREADS` and the global batch.
        settings: training settings in addition to those of the command line.
        jit: `jit_compile` of `fit`.
    """

    title: str
    ours: bool
    rival: str | None
    workers: int = 1
    settings: tuple[tuple[str, Any], ...] = ()
    jit: bool | str = False


CONTESTANTS = {
    "ours": Contestant("ours, 1 worker x 2 threads", True, "fit", settings=tuple(NO_AUGMENTATION.items())),
    "ours-augmented": Contestant("ours with the default augmentation", True, "ours"),
    "fit": Contestant("bare fit", False, None),
    "fit-xla": Contestant('bare fit, jit_compile="auto"', False, "fit", jit="auto"),
    "two": Contestant("ours, 2 workers x 1 thread", True, "ours", workers=2, settings=tuple(NO_AUGMENTATION.items())),
}
#: Contestant, rival, and the minimum of the median of their ratios; None: report only.
BARS: list[tuple[str, str, float | None]] = [("ours", "fit", 0.95), ("two", "ours", 0.90), ("ours", "fit-xla", None)]


# ---------------------------------------------------------------- in the children


def train_ours(spec: dict[str, Any], channel: Channel) -> None:
    """Run one worker, set up as `ray_cxr.training.worker` does."""
    from ray_cxr.models import runtime
    from ray_cxr.models.architecture import Architecture
    from ray_cxr.training.distributed import Replicas
    from ray_cxr.training.loop import Loop, TrainState

    settings = TrainSettings(**spec["settings"])
    policy = runtime.prepare_device(False, settings.precision)
    runtime.limit_threads(spec["threads"])
    runtime.make_deterministic()
    replicas = Replicas()
    data = prepared.PreparedSet(spec["folder"], settings.size)
    loop = Loop(
        replicas,
        settings,
        Architecture.of(settings, data.size),
        data.load("train"),
        data.load("val"),
        weights=settings.weights,
        policy=policy,
    )
    replicas.check_equal(loop.list_shared(), "at the start")
    whole, epoch = loop.steps_per_epoch, 0
    clock = Clock()
    while True:
        left = _receive_steps(channel)
        clock.start()
        seconds = end_seconds = waited = 0.0
        while left:
            loop.steps_per_epoch = min(left, whole)
            start = time.monotonic()
            last = start

            def on_step(step: int, loss: float) -> None:
                nonlocal last
                last = time.monotonic()

            done = loop.run_epoch(TrainState(epochs_done=epoch), on_step=on_step)
            seconds += last - start
            end_seconds += time.monotonic() - last
            waited += done.wait_seconds
            left, epoch = left - loop.steps_per_epoch, epoch + 1
            if spec["validate"]:
                loop.validate()
        channel.answer(seconds=seconds, end_seconds=end_seconds, waited=waited, **clock.stop())


def train_fit(spec: dict[str, Any], channel: Channel) -> None:
    """Run Keras's `fit` in a single call, which waits between blocks."""
    import keras
    import tensorflow as tf

    from ray_cxr.models import classifier
    from ray_cxr.models.architecture import Architecture

    settings = TrainSettings(**spec["settings"])
    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(spec["threads"])
    tf.config.threading.set_inter_op_parallelism_threads(1)
    keras.utils.set_random_seed(settings.seed)
    data = prepared.PreparedSet(spec["folder"], settings.size)
    train = data.load("train")
    architecture = Architecture.of(settings, data.size)
    images = np.asarray(train.images)[..., None]
    labels = train.labels[:, : len(architecture.findings)].astype(np.float32)
    model = classifier.build(architecture)
    model.compile(
        optimizer=keras.optimizers.Adam(settings.learning_rate), loss="binary_crossentropy", jit_compile=spec["jit"]
    )
    clock = Clock()

    class Gate(keras.callbacks.Callback):
        """Wait after the number of steps that the script sent."""

        left = 0

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if not self.left:
                self.left = _receive_steps(channel)
                clock.start()
                self.start = time.monotonic()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.left -= 1
            if not self.left:
                float(logs["loss"])  # waits for the end of the step
                jit = bool(self.model.jit_compile)
                channel.answer(seconds=time.monotonic() - self.start, jit_compile=jit, **clock.stop())

    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(train), seed=settings.seed).repeat()
    dataset = dataset.batch(settings.batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    model.fit(dataset, steps_per_epoch=10**9, verbose=0, callbacks=[Gate()])


def _receive_steps(channel: Channel) -> int:
    """Wait for the command `steps N` and return N."""
    command, number = channel.receive().split()
    if command != "steps":
        raise ValueError(f"unknown command {command!r}")
    return int(number)


class Clock:
    """Measure the processor time of a process in and between its blocks, and its memory."""

    def __init__(self) -> None:
        self._stopped: float | None = None

    def start(self) -> None:
        self._started = time.process_time()

    def stop(self) -> dict[str, float | None]:
        """Return the seconds of this block and of the wait before it; memory in MiB, None if the system hides it."""
        idle = None if self._stopped is None else self._started - self._stopped
        self._stopped = time.process_time()
        status = read_status()
        memory = {
            name: round(status[key] / 2**20, 1) if key in status else None
            for name, key in (("memory_mib", "VmRSS"), ("peak_mib", "VmHWM"))
        }
        return {"cpu_seconds": self._stopped - self._started, "idle_cpu_seconds": idle, **memory}


_CHILDREN = {"ours": train_ours, "fit": train_fit}


# ---------------------------------------------------------------- the script


def start_contestant(
    name: str, folder: Path, logs: Path, contestant: Contestant, settings: dict[str, Any], *, validate: bool = False
) -> Children:
    """Start the processes of a contestant.

    Args:
        name: for its logs.
        folder: of the prepared set.
        logs: folder for the logs.
        contestant: see there.
        settings: the training settings, in addition to the contestant's.
        validate: after every epoch.
    """
    workers = contestant.workers
    spec = {
        "kind": "ours" if contestant.ours else "fit",
        "folder": str(folder),
        "settings": {**settings, **dict(contestant.settings)},
        "threads": THREADS // workers,
        "jit": contestant.jit,
        "validate": validate,
    }
    cluster = {"worker": [f"127.0.0.1:{port}" for port in find_free_ports(workers)]}
    tasks = [{"cluster": cluster, "task": {"type": "worker", "index": rank}} for rank in range(workers)]
    environments = [{"TF_CONFIG": json.dumps(task)} if contestant.ours else {} for task in tasks]
    paths = [logs / f"{name}-{rank}.log" for rank in range(workers)]
    return Children(__file__, [spec] * workers, paths, environments=environments)


def train_steps(children: Children, count: int, limit_s: float = BLOCK_S) -> list[dict[str, Any]]:
    """Train a block of steps and return each process's answer."""
    children.send(f"steps {count}")
    return children.receive(limit_s)


def find_free_ports(count: int) -> list[int]:
    """Return unused ports of this machine."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def write_set(out: Path, size: int, rows: dict[str, int]) -> Path:
    """Write a prepared folder of noise with random labels and these numbers of rows by split."""
    rng = np.random.default_rng(0)
    splits = np.repeat(list(rows), list(rows.values())).tolist()
    per_shard, spec = 1024, InputSpec(size=size)
    settings = {
        "kind": "prepare",
        "format": prepared.FORMAT,
        "rows": len(splits),
        "rows_per_shard": per_shard,
        "manifest_digest": "noise",
        "aspect": spec.aspect,
        "interpolation": spec.interpolation,
    }
    create_run(out, settings)
    (out / str(size)).mkdir()
    schema = shards.shard_schema(size)
    for index, first in enumerate(range(0, len(splits), per_shard)):
        n = min(per_shard, len(splits) - first)
        known: dict[str, Any] = {
            "image_id": pa.array([f"{first + i:08d}_000.png" for i in range(n)]),
            "patient_id": pa.array([str(first + i) for i in range(n)]),
            "split": pa.array(splits[first : first + n]),
            "image": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(size * size), n, [None, pa.py_buffer(rng.bytes(n * size * size))]
            ),
        }
        columns = []
        for field in schema:
            if pa.types.is_int8(field.type):
                columns.append(pa.array(rng.integers(0, 2, n, dtype=np.int8)))
            else:
                columns.append(known.get(field.name, pa.nulls(n, field.type)))
        shard = pa.Table.from_arrays(columns, schema=schema)
        atomic.write_arrow(shard, out / str(size) / shards.shard_name(index))
    atomic.write_json(out / str(size) / "counts.json", {"ok": len(splits)})
    return out


def measure_speed(arguments: argparse.Namespace, backbone: str, folder: Path) -> dict[str, Any]:
    """Measure every contestant's images per second by round, with one backbone."""
    settings = {"backbone": backbone, "size": arguments.size, "batch_size": arguments.batch, "weights": "none"}
    result: dict[str, Any] = {"load_before": read_load(), "contestants": {}}
    with contextlib.ExitStack() as stack:
        running: dict[str, Children] = {}
        for key in arguments.only:
            one, start = CONTESTANTS[key], time.monotonic()
            running[key] = stack.enter_context(start_contestant(key, folder, folder, one, settings))
            answers = train_steps(running[key], WARM_UP_STEPS, WARM_UP_S)
            ready = time.monotonic() - start
            log(f"{backbone}: {one.title}: started and trained {WARM_UP_STEPS} steps in {ready:.0f} s")
            result["contestants"][key] = {
                "title": one.title,
                "ready_seconds": ready,
                **({} if one.ours else {"jit_compile": answers[0]["jit_compile"]}),
                "images_per_second": [],
                "blocks": [],
            }
        for number, key in interleave(arguments.only, arguments.rounds):
            answers = train_steps(running[key], arguments.steps)
            # Workers synchronise: a block takes as long as the slowest of them.
            rate = arguments.batch * arguments.steps / max(answer["seconds"] for answer in answers)
            result["contestants"][key]["images_per_second"].append(rate)
            result["contestants"][key]["blocks"].append(answers)
            log(f"{backbone}: round {number + 1} of {arguments.rounds}: {key}: {rate:.1f} images/s")
    result["load_after"] = read_load()
    result["ratios"], result["bars"] = compute_ratios(result["contestants"])
    return result


def compute_ratios(contestants: dict[str, Any]) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Return each contestant's ratio to its rival, by `a/b`; and the bars, by the median of the rounds' ratios."""
    rates = {key: each["images_per_second"] for key, each in contestants.items()}
    pairs = [(key, CONTESTANTS[key].rival) for key in rates] + [(key, rival) for key, rival, _ in BARS]
    ratios, bars = {}, []
    for key, rival in dict.fromkeys(pairs):
        if key in rates and rival in rates:
            found = compare_rounds(rates[key], rates[rival])
            ratios[f"{key}/{rival}"] = {"of_medians": found["of_medians"], "median_of_rounds": found["ratio"]}
    for key, rival, bar in BARS:
        if f"{key}/{rival}" in ratios:
            ratio = ratios[f"{key}/{rival}"]["median_of_rounds"]
            bars.append({"contestant": key, "rival": rival, "bar": bar, "ratio": ratio, "met": meets(ratio, bar)})
    return ratios, bars


def show_speed(console: Any, backbone: str, result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print the table of one backbone, and the bars."""
    table = Table(
        title=f"{backbone}, {arguments.size} pixels, global batch {arguments.batch}: "
        f"{arguments.rounds} rounds of {arguments.steps} steps"
    )
    table.add_column("contestant", no_wrap=True)
    for name in ("images/s", "min", "max"):
        table.add_column(name, justify="right")
    table.add_column("against", no_wrap=True)
    for name in ("medians", "rounds", "waited, s", "epoch's end, s", "ready, s", "peak, MiB"):
        table.add_column(name, justify="right")
    idle: list[float] = []
    for key, each in result["contestants"].items():
        rates, blocks, rival = each["images_per_second"], each["blocks"], CONTESTANTS[key].rival
        ratio = result["ratios"].get(f"{key}/{rival}")
        ours = CONTESTANTS[key].ours
        waited = sum(max(answer["waited"] for answer in block) for block in blocks) if ours else 0.0
        worked = sum(max(answer["seconds"] for answer in block) for block in blocks)
        ends = statistics.median(max(answer["end_seconds"] for answer in block) for block in blocks) if ours else 0.0
        peaks = [answer["peak_mib"] for answer in blocks[-1]]
        idle += [answer["idle_cpu_seconds"] or 0.0 for block in blocks for answer in block]
        table.add_row(
            each["title"],
            f"{statistics.median(rates):.2f}",
            f"{min(rates):.2f}",
            f"{max(rates):.2f}",
            CONTESTANTS[rival].title if ratio and rival else "",
            f"{ratio['of_medians']:.3f}" if ratio else "",
            f"{ratio['median_of_rounds']:.3f}" if ratio else "",
            f"{waited:.2f} of {worked:.1f}" if ours else "",
            f"{ends:.2f}" if ours else "",
            f"{each['ready_seconds']:.0f}",
            " + ".join("?" if peak is None else f"{peak:.0f}" for peak in peaks),
        )
    console.print(table)
    console.print(
        "images/s: median of the rounds; medians: ratio of the medians; rounds: median of the rounds' ratios;\n"
        "waited: for images, of all the time in steps; epoch's end: the time after a block's last step;\n"
        f"ready: from the start of the process until {WARM_UP_STEPS} steps were done"
    )
    xla = result["contestants"].get("fit-xla")
    if xla:
        console.print(f'jit_compile="auto" became {xla["jit_compile"]}')
    for bar in result["bars"]:
        names = f"{CONTESTANTS[bar['contestant']].title} / {CONTESTANTS[bar['rival']].title}"
        console.print(format_bar(f"{backbone}: {names}", bar["ratio"], bar["bar"], digits=3))
    console.print(
        f"{backbone}: contestants used {sum(idle):.1f} s of processor time while they waited; "
        f"the machine's load was {result['load_before']:.1f} before and {result['load_after']:.1f} after"
    )


def measure_memory(folder: Path) -> dict[str, Any]:
    """Measure the memory of a worker after each pass, by number of training images, in two rounds."""
    settings, contestant = {**MEMORY_SETTINGS}, Contestant("ours", True, None)
    sets = {n: write_set(folder / str(n), settings["size"], {"train": n, "val": n // 10}) for n in MEMORY_ROWS}
    runs = []
    for n in MEMORY_ROWS * 2:
        with start_contestant(f"{n}-rows", sets[n], folder, contestant, settings, validate=True) as one:
            warm = train_steps(one, WARM_UP_STEPS, WARM_UP_S)[0]
            passes = [train_steps(one, MEMORY_STEPS)[0] for _ in range(MEMORY_PASSES)]
        runs.append({"rows": n, "warm_up": warm, "passes": passes})
        log(f"{n:,} rows: peak {passes[-1]['peak_mib']} MiB")
    peaks = compute_medians((run["rows"], run["passes"][-1]["peak_mib"]) for run in runs)
    few, many = MEMORY_ROWS
    return {
        "settings": settings,
        "steps_per_pass": MEMORY_STEPS,
        "runs": runs,
        "peak_mib": peaks,
        "difference_mib": peaks[many] - peaks[few],
        "bytes_per_row": (peaks[many] - peaks[few]) * 2**20 / (many - few),
    }


def show_memory(console: Any, result: dict[str, Any]) -> None:
    side = result["settings"]["size"]
    table = Table(title=f"TinyCNN, {side} pixels, passes of {result['steps_per_pass']} steps: peak MiB (now)")
    table.add_column("training images", justify="right")
    for name in (f"after {WARM_UP_STEPS} steps", *(f"pass {i + 1}" for i in range(MEMORY_PASSES))):
        table.add_column(name, justify="right")
    for run in result["runs"]:
        answers = [run["warm_up"], *run["passes"]]
        table.add_row(f"{run['rows']:,}", *(f"{one['peak_mib']:.0f} ({one['memory_mib']:.0f})" for one in answers))
    console.print(table)
    few, many = MEMORY_ROWS
    console.print(
        f"{many:,} images instead of {few:,}: {result['difference_mib']:+.1f} MiB at the peak, "
        f"{result['bytes_per_row']:.0f} bytes an image, whose pixels are {side * side:,} bytes"
    )


def parse() -> argparse.Namespace:
    parser = create_parser(__doc__)
    parser.add_argument(
        "--backbone", action="append", choices=get_args(Backbone), help="repeatable; DenseNet121 and ResNet50"
    )
    parser.add_argument("--size", default=224, help="of the images, pixels (224)", **POSITIVE)
    parser.add_argument("--batch", default=32, help="global batch (32)", **POSITIVE)
    parser.add_argument("--steps", default=3, help="of a block (3)", **POSITIVE)
    parser.add_argument("--rounds", default=5, help="blocks of each contestant (5)", **POSITIVE)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CONTESTANTS,
        help="contestants (all but fit-xla); each needs about 4 GB with DenseNet121",
    )
    parser.add_argument("--xla-rival", action="store_true", help="also fit-xla; XLA may compile for minutes")
    parser.add_argument("--memory", action="store_true", help="compare memory instead of speed")
    arguments = parser.parse_args()
    if arguments.child:
        return arguments
    arguments.backbone = list(dict.fromkeys(arguments.backbone or ["DenseNet121", "ResNet50"]))
    wanted = arguments.only or [key for key in CONTESTANTS if key != "fit-xla"]
    arguments.only = [key for key in CONTESTANTS if key in wanted or (key == "fit-xla" and arguments.xla_rival)]
    if "two" in arguments.only and arguments.batch % 2:
        parser.error(f"--batch {arguments.batch}: two workers cannot divide it")
    try:
        build(TrainSettings, {"size": arguments.size, "batch_size": arguments.batch})
    except ConfigError as error:
        parser.error(str(error))
    if arguments.memory and sys.platform != "linux":
        parser.error("--memory: needs Linux, which reports the peak memory of a process")
    return arguments


def measure(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    console = create_console()
    with tempfile.TemporaryDirectory(prefix="ray_cxr-benchmark-") as name:
        if arguments.memory:
            result["memory"] = measure_memory(Path(name))
            show_memory(console, result["memory"])
            return
        rows = {"train": max(512, arguments.batch * max(arguments.steps, WARM_UP_STEPS)), "val": 8}
        folder = write_set(Path(name) / "set", arguments.size, rows)
        result["backbones"] = {}
        for backbone in arguments.backbone:
            result["backbones"][backbone] = measure_speed(arguments, backbone, folder)
            show_speed(console, backbone, result["backbones"][backbone], arguments)


if __name__ == "__main__":
    sys.exit(run_script(parse, measure, _CHILDREN))
