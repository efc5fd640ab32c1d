"""How fast training is beside Keras's own `fit` on this machine in the same minutes, and what memory a worker takes.

    .venv/bin/python benchmarks/training.py --out speed.json
    .venv/bin/python benchmarks/training.py --memory --out memory.json

Speed: every contestant is a process of its own, or two, that lives through the whole comparison. Each trains a block
of a few steps while the others stand still; every round begins with another contestant. So what else the machine does
falls on all of them, and a ratio can be read where images per second alone cannot. Counted are whole training steps,
images fetched: not start-up, and not what our loop does at the end of an epoch, which is given beside it.

    ours             1 worker with 2 threads, driven as `training/worker.py` does, on shards; augmentation off, because
                     the rival has none
    ours-augmented   the same with the default augmentation
    fit              `Model.fit` of the same network, the same images in memory behind tf.data, jit_compile=False
    fit-xla          the same with Keras's own default, jit_compile="auto"; with --xla-rival. Keras 3.15 makes it False
                     where there is no GPU, and then this is `fit` once more; the foot of the table says so
    two              2 workers with 1 thread each, sharing the same global batch

Memory (--memory): the peak memory of one worker that trains a TinyCNN at 64 pixels and validates, on 500 and on 50,000
images, in the same number of steps. Linux only.

The images are noise. Exit codes: 0 done, whether or not the bars are met; 1 a contestant failed; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import queue
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, get_args

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from ray_cxr.config import Backbone, TrainSettings, build
from ray_cxr.data import prepared, shards
from ray_cxr.errors import ConfigError
from ray_cxr.storage import atomic
from ray_cxr.storage.run_folder import create_run
from ray_cxr.versions import versions

#: Threads of a contestant in all.
THREADS = 2
#: Steps before anything is timed; the first of them also builds the graph.
WARM_UP_STEPS = 2
#: Longest that a contestant may take until it has warmed up, and for a block; XLA can compile for many minutes.
WARM_UP_S, BLOCK_S = 5400.0, 3600.0
NO_AUGMENTATION = {"flip": False, "shift": 0.0, "contrast": 0.0, "rotation": 0.0, "zoom": 0.0}
#: What --memory compares, in passes of so many steps; an epoch ends where the images or the pass end.
MEMORY_ROWS, MEMORY_PASSES, MEMORY_STEPS = (500, 50_000), 3, 200
MEMORY_SETTINGS: dict[str, Any] = {"backbone": "TinyCNN", "size": 64, "batch_size": 32, "weights": "none"}
#: Lines of a dead contestant's stderr that are shown.
LAST_LINES = 40


@dataclass(frozen=True)
class Kind:
    """One contestant.

    Attributes:
        title: for people.
        ours: our loop; else Keras's `fit`.
        rival: whom it is compared with; None: nobody.
        workers: processes, which share `THREADS` and the global batch.
        settings: training settings beside those given on the command line.
        jit: for `fit`, its `jit_compile`.
    """

    title: str
    ours: bool
    rival: str | None
    workers: int = 1
    settings: tuple[tuple[str, Any], ...] = ()
    jit: bool | str = False


KINDS = {
    "ours": Kind("ours, 1 worker x 2 threads", True, "fit", settings=tuple(NO_AUGMENTATION.items())),
    "ours-augmented": Kind("ours with the default augmentation", True, "ours"),
    "fit": Kind("bare fit", False, None),
    "fit-xla": Kind('bare fit, jit_compile="auto"', False, "fit", jit="auto"),
    "two": Kind("ours, 2 workers x 1 thread", True, "ours", workers=2, settings=tuple(NO_AUGMENTATION.items())),
}
#: Contestant, rival, and what the median of the ratios should reach; None: told, not judged.
BARS: list[tuple[str, str, float | None]] = [("ours", "fit", 0.95), ("two", "ours", 0.90), ("ours", "fit-xla", None)]


class ContestantError(Exception):
    """A child failed; the message holds what it said."""


# The children.


class Channel:
    """A child's line to the script: commands come in on stdin, answers go out on stdout, a line of JSON each.

    Whatever else writes to stdout in this process goes to stderr. When stdin ends the script is gone, however it went,
    and this process ends at once.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._commands: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._commands.put(line)
        os._exit(0)

    def steps(self) -> int:
        """Wait for the next command, which is `steps N`; returns N."""
        command, number = self._commands.get().split()
        if command != "steps":
            raise ValueError(f"unknown command {command!r}")
        return int(number)

    def answer(self, value: dict[str, Any]) -> None:
        self._out.write(json.dumps(value) + "\n")
        self._out.flush()


def child(spec: dict[str, Any]) -> NoReturn:
    """One process of a contestant; ends with the script."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all, and the script ends its children
    channel = Channel()
    try:
        (train_ours if spec["ours"] else train_fit)(spec, channel)
    except BaseException:
        channel.answer({"error": traceback.format_exc()})
    # At an orderly end TensorFlow's workers would wait for one another.
    os._exit(1)


def train_ours(spec: dict[str, Any], channel: Channel) -> None:
    """One worker, set up as `ray_cxr.training.worker` does."""
    from ray_cxr.models import runtime
    from ray_cxr.models.architecture import Architecture
    from ray_cxr.training.distributed import Replicas
    from ray_cxr.training.loop import Loop, Progress

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
    replicas.agree(loop.shared(), "at the start")
    whole, epoch = loop.steps_per_epoch, 0
    clock = Clock()
    while True:
        left = channel.steps()
        clock.begin()
        seconds = end_seconds = waited = 0.0
        while left:
            loop.steps_per_epoch = min(left, whole)
            start = time.monotonic()
            last = start

            def on_step(step: int, loss: float) -> None:
                nonlocal last
                last = time.monotonic()

            done = loop.run_epoch(Progress(epochs_done=epoch), on_step=on_step)
            seconds += last - start
            end_seconds += time.monotonic() - last
            waited += done.waited
            left, epoch = left - loop.steps_per_epoch, epoch + 1
            if spec["validate"]:
                loop.validate()
        channel.answer({"seconds": seconds, "end_seconds": end_seconds, "waited": waited, **clock.end()})


def train_fit(spec: dict[str, Any], channel: Channel) -> None:
    """Keras's `fit`: a single call, which stands still between blocks, so that it starts only once."""
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
        """Lets so many steps pass as the script asks for."""

        left = 0

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if not self.left:
                self.left = channel.steps()
                clock.begin()
                self.start = time.monotonic()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.left -= 1
            if not self.left:
                float(logs["loss"])  # the step is done
                jit = bool(self.model.jit_compile)
                channel.answer({"seconds": time.monotonic() - self.start, "jit_compile": jit, **clock.end()})

    dataset = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(train), seed=settings.seed).repeat()
    dataset = dataset.batch(settings.batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    model.fit(dataset, steps_per_epoch=10**9, verbose=0, callbacks=[Gate()])


class Clock:
    """What a process used: processor time in its blocks and between them, and memory."""

    def __init__(self) -> None:
        self._ended: float | None = None

    def begin(self) -> None:
        self._began = time.process_time()

    def end(self) -> dict[str, float | None]:
        """Of the block that ends and the rest before it; memory in MiB, None where the system does not tell."""
        idle = None if self._ended is None else self._began - self._ended
        self._ended = time.process_time()
        return {"cpu_seconds": self._ended - self._began, "idle_cpu_seconds": idle, **memory()}


def memory() -> dict[str, float | None]:
    """This process's memory now and at its highest, MiB."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {"memory_mib": None, "peak_mib": None}
    fields = dict(line.split(":", 1) for line in lines)
    return {
        name: round(int(fields[key].split()[0]) / 1024, 1)
        for name, key in [("memory_mib", "VmRSS"), ("peak_mib", "VmHWM")]
    }


# The script.


class Contestant:
    """The processes of one contestant: start, warm up, train blocks, end.

    Args:
        title: for messages.
        folder: where the prepared set lies.
        logs: where its processes' stderr goes.
        ours, workers, settings, jit: see `Kind`; the settings are complete here.
        validate: after every epoch.
    """

    def __init__(
        self,
        title: str,
        folder: Path,
        logs: Path,
        *,
        ours: bool,
        settings: dict[str, Any],
        workers: int = 1,
        jit: bool | str = False,
        validate: bool = False,
    ) -> None:
        self._title = title
        self._said: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []
        self._logs = [logs / f"{title}-{rank}.log" for rank in range(workers)]
        spec = {
            "ours": ours,
            "folder": str(folder),
            "settings": settings,
            "threads": THREADS // workers,
            "jit": jit,
            "validate": validate,
        }
        cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(workers)]}
        for rank in range(workers):
            environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
            environment.pop("TF_CONFIG", None)
            if ours:
                task = {"type": "worker", "index": rank}
                environment["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
            with open(self._logs[rank], "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, __file__, "--child", json.dumps(spec)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    text=True,
                    bufsize=1,
                )
            self._processes.append(process)
            threading.Thread(target=self._read, args=(rank, process), daemon=True).start()

    def _read(self, rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._said.put((rank, line))
        self._said.put((rank, None))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def steps(self, count: int, limit_s: float = BLOCK_S) -> list[dict[str, Any]]:
        """Train so many steps; what each process answered, in order of rank.

        Raises:
            ContestantError: one has failed, died or not answered in time.
        """
        for rank, process in enumerate(self._processes):
            assert process.stdin is not None
            try:
                process.stdin.write(f"steps {count}\n")
                process.stdin.flush()
            except OSError:
                raise self._died(rank) from None
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + limit_s
        while len(answers) < len(self._processes):
            try:
                rank, line = self._said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise ContestantError(f"{self._title}: no answer after {limit_s / 60:.0f} minutes") from None
            if line is None:
                raise self._died(rank)
            answers[rank] = json.loads(line)
            if "error" in answers[rank]:
                raise ContestantError(f"{self._title}, process {rank}:\n{answers[rank]['error']}")
        return [answers[rank] for rank in sorted(answers)]

    def _died(self, rank: int) -> ContestantError:
        code = self._processes[rank].wait()
        lines = self._logs[rank].read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        hint = "; killed: for want of memory? --only leaves contestants out" if code == -signal.SIGKILL else ""
        return ContestantError("\n".join([f"{self._title}, process {rank}: ended with code {code}{hint}", *lines]))


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def write_set(out: Path, size: int, rows: dict[str, int]) -> Path:
    """A prepared folder of noise with random labels: so many rows of each split."""
    rng = np.random.default_rng(0)
    splits = np.repeat(list(rows), list(rows.values())).tolist()
    per_shard = 1024
    settings = {"kind": "prepare", "format": prepared.FORMAT, "rows": len(splits), "rows_per_shard": per_shard}
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


def speed(arguments: argparse.Namespace, backbone: str, folder: Path, log: Console) -> dict[str, Any]:
    """Every contestant's images per second by round, of one backbone."""
    settings = {"backbone": backbone, "size": arguments.size, "batch_size": arguments.batch, "weights": "none"}
    result: dict[str, Any] = {"load_before": os.getloadavg()[0], "contestants": {}}
    with contextlib.ExitStack() as stack:
        living: dict[str, Contestant] = {}
        for key in arguments.only:
            kind, start = KINDS[key], time.monotonic()
            living[key] = stack.enter_context(
                Contestant(
                    key,
                    folder,
                    folder,
                    ours=kind.ours,
                    settings={**settings, **dict(kind.settings)},
                    workers=kind.workers,
                    jit=kind.jit,
                )
            )
            answers = living[key].steps(WARM_UP_STEPS, WARM_UP_S)
            ready = time.monotonic() - start
            log.print(f"{backbone}: {kind.title}: started and {WARM_UP_STEPS} steps done in {ready:.0f} s")
            result["contestants"][key] = {
                "title": kind.title,
                "ready_seconds": ready,
                **({} if kind.ours else {"jit_compile": answers[0]["jit_compile"]}),
                "images_per_second": [],
                "blocks": [],
            }
        for number in range(arguments.rounds):
            turn = number % len(living)
            for key in [*arguments.only[turn:], *arguments.only[:turn]]:
                answers = living[key].steps(arguments.steps)
                # Workers go in step: a block takes as long as the slower of them.
                seconds = max(answer["seconds"] for answer in answers)
                contestant = result["contestants"][key]
                contestant["images_per_second"].append(arguments.batch * arguments.steps / seconds)
                contestant["blocks"].append(answers)
            latest = {key: round(each["images_per_second"][-1], 1) for key, each in result["contestants"].items()}
            log.print(f"{backbone}: round {number + 1} of {arguments.rounds}: {latest}")
    result["load_after"] = os.getloadavg()[0]
    result["ratios"], result["bars"] = ratios(result["contestants"])
    return result


def ratios(contestants: dict[str, Any]) -> tuple[dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Each contestant against its rival, `a/b` by name; and the bars, judged by the median of the rounds' ratios."""
    rates = {key: each["images_per_second"] for key, each in contestants.items()}
    pairs = [(key, KINDS[key].rival) for key in rates] + [(key, rival) for key, rival, _ in BARS]
    found = {}
    for key, rival in dict.fromkeys(pairs):
        if key in rates and rival in rates:
            found[f"{key}/{rival}"] = {
                "of_medians": statistics.median(rates[key]) / statistics.median(rates[rival]),
                "median_of_rounds": statistics.median(a / b for a, b in zip(rates[key], rates[rival], strict=True)),
            }
    bars = []
    for key, rival, bar in BARS:
        if f"{key}/{rival}" in found:
            ratio = found[f"{key}/{rival}"]["median_of_rounds"]
            bars.append(
                {
                    "contestant": key,
                    "rival": rival,
                    "bar": bar,
                    "ratio": ratio,
                    "met": None if bar is None else ratio >= bar,
                }
            )
    return found, bars


def show_speed(console: Console, backbone: str, result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """The table of one backbone, and the bars."""
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
        rates, blocks, rival = each["images_per_second"], each["blocks"], KINDS[key].rival
        ratio = result["ratios"].get(f"{key}/{rival}")
        ours = KINDS[key].ours
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
            KINDS[rival].title if ratio and rival else "",
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
        "waited: for images, of all the time in steps; epoch's end: what a block's last step is followed by;\n"
        f"ready: from the start of the process until {WARM_UP_STEPS} steps were done"
    )
    xla = result["contestants"].get("fit-xla")
    if xla:
        console.print(f'jit_compile="auto" came out as {xla["jit_compile"]}')
    for bar in result["bars"]:
        names = f"{KINDS[bar['contestant']].title} / {KINDS[bar['rival']].title}"
        if bar["bar"] is None:
            console.print(f"{backbone}: {names}: {bar['ratio']:.3f} (no bar)")
        else:
            met = "met" if bar["met"] else "NOT met"
            console.print(f"{backbone}: {names} >= {bar['bar']:.2f}: {bar['ratio']:.3f}, {met}")
    console.print(
        f"{backbone}: contestants used {sum(idle):.1f} s of processor time while they stood still; "
        f"the machine's load was {result['load_before']:.1f} before and {result['load_after']:.1f} after"
    )


def compare_memory(folder: Path, log: Console) -> dict[str, Any]:
    """Memory of a worker after each pass, by number of training images, twice in turn."""
    settings = {**MEMORY_SETTINGS}
    sets = {n: write_set(folder / str(n), settings["size"], {"train": n, "val": n // 10}) for n in MEMORY_ROWS}
    runs = []
    for n in MEMORY_ROWS * 2:
        with Contestant(f"{n} rows", sets[n], folder, ours=True, settings=settings, validate=True) as one:
            warm = one.steps(WARM_UP_STEPS, WARM_UP_S)[0]
            passes = [one.steps(MEMORY_STEPS)[0] for _ in range(MEMORY_PASSES)]
        runs.append({"rows": n, "warm_up": warm, "passes": passes})
        log.print(f"{n:,} rows: peak {passes[-1]['peak_mib']} MiB")
    peaks = {
        n: statistics.median(run["passes"][-1]["peak_mib"] for run in runs if run["rows"] == n) for n in MEMORY_ROWS
    }
    few, many = MEMORY_ROWS
    return {
        "settings": settings,
        "steps_per_pass": MEMORY_STEPS,
        "runs": runs,
        "peak_mib": peaks,
        "difference_mib": peaks[many] - peaks[few],
        "bytes_per_row": (peaks[many] - peaks[few]) * 2**20 / (many - few),
    }


def show_memory(console: Console, result: dict[str, Any]) -> None:
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
        f"{many:,} images in place of {few:,}: {result['difference_mib']:+.1f} MiB at the peak, "
        f"{result['bytes_per_row']:.0f} bytes an image, whose pixels are {side * side:,} bytes"
    )


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"system": platform.platform(), "cpu": model, "cpus": os.cpu_count()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    whole: dict[str, Any] = {"type": _positive, "metavar": "N"}
    parser.add_argument(
        "--backbone", action="append", choices=get_args(Backbone), help="repeatable; DenseNet121 and ResNet50"
    )
    parser.add_argument("--size", default=224, help="of the images, pixels (224)", **whole)
    parser.add_argument("--batch", default=32, help="global batch (32)", **whole)
    parser.add_argument("--steps", default=3, help="of a block (3)", **whole)
    parser.add_argument("--rounds", default=5, help="blocks of each contestant (5)", **whole)
    parser.add_argument(
        "--only", nargs="+", choices=KINDS, help="contestants; all but fit-xla. DenseNet121 takes some 4 GB for each"
    )
    parser.add_argument(
        "--xla-rival", action="store_true", help="also fit-xla; where XLA is used it may compile for minutes"
    )
    parser.add_argument("--memory", action="store_true", help="compare memory in place of speed")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the raw numbers there")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.backbone = list(dict.fromkeys(arguments.backbone or ["DenseNet121", "ResNet50"]))
    wanted = arguments.only or [key for key in KINDS if key != "fit-xla"]
    arguments.only = [key for key in KINDS if key in wanted or (key == "fit-xla" and arguments.xla_rival)]
    if "two" in arguments.only and arguments.batch % 2:
        parser.error(f"--batch {arguments.batch}: two workers cannot share it")
    try:
        build(TrainSettings, {"size": arguments.size, "batch_size": arguments.batch})
    except ConfigError as error:
        parser.error(str(error))
    if arguments.memory and sys.platform != "linux":
        parser.error("--memory: only Linux tells a process's peak memory")
    return arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.child:
        child(arguments.child)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children end and the folder goes
    log = Console(stderr=True, highlight=False)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
    result: dict[str, Any] = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["benchmarks/training.py", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(),
        "versions": versions(),
    }
    with tempfile.TemporaryDirectory(prefix="ray_cxr-benchmark-") as name:
        try:
            if arguments.memory:
                result["memory"] = compare_memory(Path(name), log)
                show_memory(console, result["memory"])
            else:
                rows = {"train": max(512, arguments.batch * max(arguments.steps, WARM_UP_STEPS)), "val": 8}
                folder = write_set(Path(name) / "set", arguments.size, rows)
                result["backbones"] = {}
                for backbone in arguments.backbone:
                    result["backbones"][backbone] = speed(arguments, backbone, folder, log)
                    show_speed(console, backbone, result["backbones"][backbone], arguments)
        except ContestantError as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    if arguments.out:
        atomic.write_json(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
