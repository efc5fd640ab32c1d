"""How fast `ray-cxr score` is beside what one would write oneself, on this machine in the same hour.

    .venv/bin/python benchmarks/scoring.py --work DIR --out speed.json      the comparison
    .venv/bin/python benchmarks/scoring.py --work DIR --profile             where the start-up goes
    .venv/bin/python benchmarks/scoring.py --work DIR --full                112,120 rows, killed once on the way
    .venv/bin/python benchmarks/scoring.py --work DIR --memory              memory of the driver for each row

Every contestant scores the same radiographs, PNGs of 1024 x 1024, with the same network of random weights, in a process
of its own that starts anew in every round and runs alone; every round begins with another contestant.

    ours-bf16, ours-int8     the command itself, with its own Ray, read from outside
    bound-bf16, bound-int8   the bound: a bare program without Ray, two decoding threads, our decoder and runtime; each
                             thread has a child process that decodes, as in ours
    inline-bf16, inline-int8 the same, decoding in the threads themselves; the better of the two is the bound
    keras-16, keras-32       Keras `predict` on a tf.data pipeline in float32, in batches of so many
    torch-fp32, torch-bf16   PyTorch with a DataLoader and the same architecture; --torch names a Python that has it
    torch-last               the same in bf16 with its memory format tuned (channels last); no bar
    ray                      a bare `ray.init()`, for the start-up

Steady: the slope of a straight line through the images done over time, the first 15% of them left out. Of ours these
are the times and rows of the files in SCORES/scores; of a rival its batches. As two files are in work at once, the rows
between the first file and the last would not do. Start-up: from the start of the process to the first batch out of the
network; of ours as its run.json says. Whole: images over the time from the start of the process to its end.

The network's weights are random, so that its speed is a real one's and its probabilities mean nothing; they are
compared all the same, as a rival that computes something else is none. Linux only. All that is made for it stays in
DIR and is used again; remove DIR where other radiographs or a changed bundle are wanted. Exit codes: 0 done, whether or
not the bars are met; 1 a contestant or a check failed; 2 wrong arguments.
"""

# Children start from this file, some of them in a Python without ray_cxr: at the top it imports the library alone.
from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

ROOT = Path(__file__).resolve().parents[1]
#: Processor threads of a rival, and of what ours runs on.
THREADS = 2
#: Images per forward pass of the bound, as of ours.
BATCH = 4
#: Part of the images that is left out of the steady rate, at the start.
WARM_UP = 0.15
#: What `--memory` compares.
MEMORY_ROWS = (1_000, 100_000, 1_000_000)
#: Longest that a contestant may take, and --full's command; seconds.
CONTESTANT_S, FULL_S = 3600.0, 12 * 3600.0
SAMPLE_S = 1.0
#: Processes that a killed command leaves behind have so long to notice, seconds.
ORPHANS_S = 120.0
#: Lines of a dead process's log that are shown.
LAST_LINES = 40
#: In the environment of each process of a contestant, and so of Ray's, wherever they end up.
MARKER = "RAY_CXR_BENCHMARK"
#: Drift that int8 may show when it is made: on random weights AUROC is noise.
LENIENT = ("max_auroc_fall=0.5", "max_p99_drift=0.5")
#: Largest difference between any two contestants' probabilities that still counts as the same network.
SAME = 0.05


class BenchmarkError(Exception):
    """A process failed, or a check did; the message says which and what it said."""


# ---------------------------------------------------------------- the children


class Said:
    """What a child tells the script: a line of JSON at its end, on what was its standard output.

    Whatever else writes there goes to stderr.

    Args:
        began: `time.monotonic()` of the script when it started this process; the clock is the system's.
    """

    def __init__(self, began: float) -> None:
        self._began = self._last = began
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self.marks: list[tuple[float, int]] = []
        self._stages: dict[str, float] = {}

    def stage(self, name: str) -> None:
        """What was done since the last stage, or since the process was started."""
        now = time.monotonic()
        self._stages[name] = now - self._last
        self._last = now

    def images(self, count: int) -> None:
        """So many more images are through the network."""
        with self._lock:
            done = self.marks[-1][1] if self.marks else 0
            self.marks.append((time.monotonic() - self._began, done + count))

    def end(self, **more: Any) -> None:
        self._out.write(json.dumps({"marks": self.marks, "stages": self._stages, **more}) + "\n")
        self._out.flush()


def child(spec: dict[str, Any]) -> NoReturn:
    """One process of a contestant, or of what is made before them."""
    said = Said(spec["began"])
    try:
        _CHILDREN[spec["kind"]](spec, said)
    except BaseException:
        said.end(error=traceback.format_exc())
        os._exit(1)
    os._exit(0)  # some libraries' threads would hold the end up


def make_bundle(spec: dict[str, Any], said: Said) -> None:
    """A bundle of random weights."""
    import keras

    from ray_cxr.config import InputSpec
    from ray_cxr.labels import FINDINGS
    from ray_cxr.models import classifier
    from ray_cxr.models.architecture import Architecture
    from ray_cxr.models.bundle import SPLIT_SCHEMA
    from ray_cxr.models.bundle_writer import BundleContent, write_bundle

    architecture = Architecture(backbone=spec["backbone"], size=spec["size"], findings=FINDINGS)
    keras.utils.set_random_seed(0)
    model = classifier.build(architecture)
    point = {"threshold": 0.5, "rule": "youden", "sensitivity": 0.5, "specificity": 0.5, "flag_rate": 0.5}
    content = BundleContent(
        architecture=architecture,
        input_spec=InputSpec(size=spec["size"]),
        # Calibrated and flagged, as a trained one is: that is part of a row's cost.
        calibration={name: {"method": "platt", "slope": 2.0, "intercept": -1.0} for name in FINDINGS},
        operating_points=dict.fromkeys(FINDINGS, point),
        expected_flag_rates=dict.fromkeys(FINDINGS, 0.5),
        provenance={
            "origin": "benchmarks/scoring.py: random weights; its probabilities mean nothing",
            "initial_weights": "random",
            "age_range": [10.0, 90.0],
            "split": {"kind": "patient", "seed": 0, "fractions": [0.7, 0.1, 0.2]},
            "versions": {},
        },
        config_toml=f'[train]\nbackbone = "{spec["backbone"]}"\nsize = {spec["size"]}\nweights = "none"\n',
        curves=[],
        split=SPLIT_SCHEMA.empty_table(),
    )
    write_bundle(spec["out"], content, model)
    said.end()


def draw_phantoms(spec: dict[str, Any], said: Said) -> None:
    from ray_cxr.imaging.phantoms import write_phantoms

    write_phantoms(Path(spec["out"]), patients=48, size=1024, broken=False)
    said.end()


def score_bare(spec: dict[str, Any], said: Said) -> None:
    """The bound: threads that decode and feed the runtime, and one Parquet file at the end."""
    import cv2
    import numpy as np

    from ray_cxr.imaging import sandbox
    from ray_cxr.imaging.decode import load_image
    from ray_cxr.models.bundle import load_bundle

    said.stage("imports")
    bundle = load_bundle(spec["bundle"])
    spec_in, size = bundle.input_spec, bundle.input_spec.size
    decoders = []
    if not spec["inline"]:
        decoders = [sandbox.Decoder([spec_in]) for _ in range(THREADS)]
        for decoder in decoders:
            decoder.start()
    cv2.setNumThreads(1)
    network = bundle.open_runtime(spec["precision"], batch_size=BATCH, threads=THREADS)
    said.stage("network")
    ids, paths = _rows(spec["manifest"], spec["images"])
    said.stage("manifest")
    found = np.empty((len(ids), len(bundle.findings)), np.float32)
    turns, turn = iter(enumerate(paths)), threading.Lock()
    submitted: list[tuple[list[int], Any]] = []

    def in_process(path: str) -> Any:
        return load_image(path, spec_in)

    def in_child(decoder: Any, path: str) -> Any:
        return decoder.load(path).images[0]

    def work(load: Any) -> None:
        batch = np.empty((BATCH, size, size), np.uint8)
        members: list[int] = []
        while True:
            with turn:
                index, path = next(turns, (-1, None))
            if path is not None:
                batch[len(members)] = load(path)
                members.append(index)
            if members and (path is None or len(members) == BATCH):
                future = network.submit(batch[: len(members)])
                future.add_done_callback(functools.partial(lambda n, _: said.images(n), len(members)))
                submitted.append((members, future))
                members = []
            if path is None:
                return

    loads: list[Any] = [functools.partial(in_child, decoder) for decoder in decoders] or [in_process] * THREADS
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, load) for load in loads]:
            done.result()
    for members, future in submitted:
        found[members] = future.result().probabilities
    while len(said.marks) < len(submitted):  # the last calls back a moment after its result is there
        time.sleep(0.001)
    for decoder in decoders:
        decoder.close()
    _write_scores(spec["out"], ids, bundle.findings, found)
    said.end()


def score_keras(spec: dict[str, Any], said: Said) -> None:
    """Keras's `predict` on a tf.data pipeline, as its guides write it."""
    import keras
    import tensorflow as tf

    from ray_cxr.models.bundle import load_bundle

    said.stage("imports")
    bundle = load_bundle(spec["bundle"])
    model = bundle.model()
    said.stage("network")
    size = bundle.input_spec.size
    ids, paths = _rows(spec["manifest"], spec["images"])

    def read(path: Any) -> Any:
        image = tf.io.decode_png(tf.io.read_file(path), channels=1)  # a gray of RGBA, too
        return tf.cast(tf.round(tf.image.resize(image, [size, size], method="area")), tf.uint8)

    class Marks(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
            said.images(len(logs["outputs"]))

    dataset = tf.data.Dataset.from_tensor_slices(paths).map(read, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.batch(spec["batch"]).prefetch(tf.data.AUTOTUNE)
    found = model.predict(dataset, verbose=0, callbacks=[Marks()])
    _write_scores(spec["out"], ids, bundle.findings, found)
    said.end()


def score_torch(spec: dict[str, Any], said: Said) -> None:
    """PyTorch's DataLoader with two workers and a DenseNet121 of random weights. Runs without ray_cxr."""
    import torch
    from torch.utils.data import DataLoader

    said.stage("imports")
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    layout = torch.channels_last if spec["tuned"] else torch.contiguous_format
    network = torch_densenet121().eval().to(memory_format=layout)
    said.stage("network")
    dtype = torch.bfloat16 if spec["precision"] == "bf16" else None
    loader = DataLoader(Pictures(spec["paths"], spec["size"]), batch_size=spec["batch"], num_workers=THREADS)
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        for batch in loader:
            found = torch.sigmoid(network(batch.to(memory_format=layout)))
            said.images(len(found.float().numpy()))
    said.end()


class Pictures:
    """A data set in PyTorch's sense: float32 [3,S,S] in 0..1, less ImageNet's mean, by its deviation."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self._paths, self._size = paths, size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        import torch
        from PIL import Image

        with Image.open(self._paths[index]) as stored:
            picture = stored.convert("L").resize((self._size, self._size), Image.Resampling.BOX)
        gray = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(1, self._size, self._size)
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (gray / 255.0 - mean[:, None, None]) / deviation[:, None, None]


def torch_densenet121() -> Any:
    """DenseNet-121 (Huang et al. 2017, table 1) with 14 outputs, as torchvision builds it."""
    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
                nn.Conv2d(channels, 128, 1, bias=False),
                nn.BatchNorm2d(128),
                nn.ReLU(inplace=True),
                nn.Conv2d(128, 32, 3, padding=1, bias=False),
            )

        def forward(self, x: Any) -> Any:
            return torch.cat([x, self.body(x)], 1)

    parts: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    channels = 64
    for block, layers in enumerate((6, 12, 24, 16)):
        for _ in range(layers):
            parts.append(Layer(channels))
            channels += 32
        parts += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        if block < 3:
            parts += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 14))


def start_bare_ray(spec: dict[str, Any], said: Said) -> None:
    import ray

    said.stage("import ray")
    ray.init()
    said.stage("ray.init()")
    ray.shutdown()
    said.end()


def plan_only(spec: dict[str, Any], said: Said) -> None:
    """`ray-cxr score --dry-run` in this process, and the memory that it took at its highest."""
    from ray_cxr.cli import main

    said.stage("imports")
    code = main(["score", "--dry-run", *spec["arguments"]])
    said.stage("plan")
    if code:
        raise RuntimeError(f"score --dry-run ended with {code}")
    # Not getrusage: its peak is also that of the process that started this one.
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    said.end(peak_bytes=int(fields["VmHWM"].split()[0]) * 1024)


_CHILDREN = {
    "bundle": make_bundle,
    "phantoms": draw_phantoms,
    "bound": score_bare,
    "keras": score_keras,
    "torch": score_torch,
    "ray": start_bare_ray,
    "plan": plan_only,
}


def _rows(manifest: str, count: int) -> tuple[list[str], list[str]]:
    """image_ids and paths of the first rows."""
    import pyarrow.parquet as pq

    table = pq.read_table(manifest, columns=["image_id", "path"]).slice(0, count)
    return table["image_id"].to_pylist(), table["path"].to_pylist()


def _write_scores(out: str, ids: list[str], findings: Sequence[str], probabilities: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {f"p_{name}": probabilities[:, i] for i, name in enumerate(findings)}
    pq.write_table(pa.table({"image_id": ids, **columns}), out, compression="zstd")


# ---------------------------------------------------------------- starting, ending and watching processes


class Running:
    """A process of ours and all that it starts, Ray's among them: they carry a mark in their environment.

    Args:
        command: what to run.
        log: where its stderr goes, and its stdout where `keep` is false.
        keep: its stdout is the caller's to read.
    """

    _count = 0

    def __init__(self, command: Sequence[str], log: Path, *, keep: bool = False) -> None:
        Running._count += 1
        self._mark = f"{MARKER}={os.getpid()}-{Running._count}".encode()
        name, _, value = self._mark.decode().partition("=")
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "RAY_USAGE_STATS_ENABLED": "0", name: value}
        environment.pop("RAY_ADDRESS", None)
        self._log = log
        with open(log, "wb") as stream:
            self.began, self.began_at = time.monotonic(), time.time()
            self.process = subprocess.Popen(
                [command[0], *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if keep else stream,
                stderr=stream,
                env=environment,
                cwd=ROOT,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.kill()
        for pid in self.all():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL to the process and its group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def all(self) -> list[int]:
        """Every process that carries the mark."""
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if self._mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def said(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])


class Memory:
    """The memory of a command's processes together, sampled: PSS, in which shared pages count once.

    Attributes:
        peak: of the sum, bytes.
        parts: at that moment, by kind of process: bytes and how many.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.parts: dict[str, tuple[int, int]] = {}

    def sample(self, running: Running) -> None:
        sizes: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for pid in running.all():
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
                name = _process_name(pid)
                sizes[name] += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
                counts[name] += 1
        if sizes.total() > self.peak:
            self.peak = sizes.total()
            self.parts = {name: (size, counts[name]) for name, size in sizes.most_common()}


def _process_name(pid: int) -> str:
    """What a process is: the module or script that it runs, or its program; of Ray's workers their task."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0 ").split("\0")
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    return next((Path(word).name for word in words if word.endswith(".py")), Path(words[0]).name) or "ending"


def ask(spec: dict[str, Any], log: Path, *, python: str = sys.executable, limit_s: float = CONTESTANT_S) -> dict:
    """Run a child; what it said, with `wall_s`.

    Raises:
        BenchmarkError: it failed, died or took too long.
    """
    began = time.monotonic()
    words = [python, str(Path(__file__).resolve()), "--child", json.dumps({**spec, "began": began})]
    with Running(words, log, keep=True) as running:
        try:
            text = running.process.communicate(timeout=limit_s)[0]
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"{spec['kind']}: no end after {limit_s / 60:.0f} minutes") from None
        wall = time.monotonic() - began
        try:
            answer = json.loads(text.splitlines()[-1])
        except (ValueError, IndexError):
            code = running.process.returncode
            raise BenchmarkError(f"{spec['kind']}: ended with code {code}\n{running.said()}") from None
    if "error" in answer:
        raise BenchmarkError(f"{spec['kind']}:\n{answer['error']}")
    return {**answer, "wall_s": wall}


def command(words: Sequence[str], log: Path, *, limit_s: float = CONTESTANT_S) -> Running:
    """Run `ray-cxr` to its end.

    Raises:
        BenchmarkError: it ended with another code than 0, or took too long.
    """
    with Running([sys.executable, "-m", "ray_cxr.cli", *words], log) as running:
        try:
            code = running.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"ray-cxr {words[0]}: no end after {limit_s / 60:.0f} minutes") from None
        if code:
            raise BenchmarkError(f"ray-cxr {words[0]}: ended with code {code}\n{running.said()}")
    return running


# ---------------------------------------------------------------- what is scored


class Workshop:
    """The folder of this benchmark: radiographs under many names, manifests, bundles; made once, then used again.

    Args:
        folder: `--work`.
        shared: `--shared`, with the real radiographs.
        backbone, size: of the network.
        say: where progress goes.
    """

    def __init__(self, folder: Path, shared: Path, backbone: str, size: int, say: Any) -> None:
        self.folder, self._say = folder, say
        self._backbone, self._size = backbone, size
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.real = (shared / "nih" / "images1024").is_dir()
        if self.real:
            self.images = (shared / "nih" / "images1024").resolve()
            self.table = (shared / "nih" / "meta" / "Data_Entry_2017_v2020.csv.gz").resolve()
        else:
            say(f"{shared} has no nih/images1024: phantoms are drawn in place of real radiographs")
            ask({"kind": "phantoms", "out": str(folder / "phantoms")}, self.logs / "phantoms.log")
            self.images, self.table = folder / "phantoms" / "images", folder / "phantoms" / "Data_Entry_phantoms.csv"
        self.sources = sorted(self.images.glob("*.png"))

    def links(self, folder: Path, names: Iterable[str]) -> None:
        """A folder with the radiographs at hand under so many names, in turn."""
        folder.mkdir(parents=True, exist_ok=True)
        there = {entry.name for entry in os.scandir(folder)}
        for i, name in enumerate(names):
            if name not in there:
                (folder / name).symlink_to(self.sources[i % len(self.sources)])

    def manifest(self, rows: int) -> Path:
        """A manifest of so many rows, every row a file of its own name."""
        out = self.folder / f"manifest-{rows}.parquet"
        names = [f"{i // 10:08d}_{i % 10:03d}.png" for i in range(rows)]
        links = self.folder.resolve() / "links"
        self.links(links, names)
        if not out.exists():
            write_manifest(out, names, [f"{links}/{name}" for name in names])
        return out

    def bundle(self, precision: str) -> Path:
        """A bundle of random weights; for int8 one that holds its 8-bit graph, too."""
        kind = f"{self._backbone}-{self._size}"
        plain = self.folder / f"bundle-{kind}"
        if not plain.exists():
            self._say(f"making {plain}")
            spec = {"kind": "bundle", "out": str(plain), "backbone": self._backbone, "size": self._size}
            ask(spec, self.logs / "bundle.log")
        if precision != "int8":
            return plain
        out = self.folder / f"bundle-{kind}-int8"
        if not out.exists():
            self._say(f"making {out}")
            few, prepared = self.folder / "few.parquet", self.folder / f"prepared-{self._size}"
            words = ["manifest", str(self.table), "--images", str(self.images), "--found-only", "--out", str(few)]
            command([*words, "--split", "patient", "--fractions", "0.5,0.4,0.1"], self.logs / "manifest.log")
            words = ["prepare", str(few), "--out", str(prepared), "--size", str(self._size)]
            command(words, self.logs / "prepare.log")
            words = ["quantize", str(plain), str(prepared), "--out", str(out)]
            for setting in LENIENT:
                words += ["--set", setting]
            command(words, self.logs / "quantize.log")
        return out


def write_manifest(out: Path, names: Sequence[str], paths: Sequence[str]) -> None:
    """A manifest with all its columns filled, as a real one's are."""
    import numpy as np
    import pyarrow as pa

    from ray_cxr.data import manifest

    rng = np.random.default_rng(0)
    n = len(names)
    columns: dict[str, Any] = {
        "image_id": names,
        "path": paths,
        "patient_id": [name.split("_")[0].lstrip("0") or "0" for name in names],
        "age": rng.integers(20, 80, n).astype(float),
        "sex": np.array(["F", "M"], object)[rng.integers(0, 2, n)],
        "view": np.array(["PA", "AP"], object)[rng.integers(0, 2, n)],
        "follow_up": np.arange(n) % 10,
        "split": ["test"] * n,
    }
    columns |= {field.name: rng.integers(0, 2, n) for field in manifest.SCHEMA if pa.types.is_int8(field.type)}
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(n, field.type)
        for field in manifest.SCHEMA
    ]
    manifest.write_manifest(pa.Table.from_arrays(arrays, schema=manifest.SCHEMA), out)


# ---------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Contestant:
    """One of those that are compared.

    Attributes:
        title: for people.
        kind: `ours`, or the child that it is.
        precision: the network's.
        batch: images per forward pass, where it is not ours to say.
        inline: the bound decodes in its threads.
        tuned: PyTorch's tensors lie channels last.
        slow: a rival that needs no more than --rival-images for its steady rate.
    """

    title: str
    kind: str
    precision: str = "fp32"
    batch: int = BATCH
    slow: bool = False
    inline: bool = False
    tuned: bool = False


CONTESTANTS = {
    "ours-bf16": Contestant("ray-cxr score, bf16", "ours", "bf16"),
    "keras-16": Contestant("(a) Keras predict, fp32, batch 16", "keras", batch=16, slow=True),
    "bound-bf16": Contestant("(c) bare program, bf16", "bound", "bf16"),
    "torch-fp32": Contestant("(b) PyTorch, fp32", "torch", batch=32, slow=True),
    "inline-bf16": Contestant("(c) bare program, bf16, inline", "bound", "bf16", inline=True),
    "ours-int8": Contestant("ray-cxr score, int8", "ours", "int8"),
    "keras-32": Contestant("(a) Keras predict, fp32, batch 32", "keras", batch=32, slow=True),
    "bound-int8": Contestant("(c) bare program, int8", "bound", "int8"),
    "torch-bf16": Contestant("(b) PyTorch, bf16", "torch", "bf16", batch=32, slow=True),
    "inline-int8": Contestant("(c) bare program, int8, inline", "bound", "int8", inline=True),
    "torch-last": Contestant("(b) PyTorch, bf16, tuned", "torch", "bf16", batch=32, slow=True, tuned=True),
    "ours-fp32": Contestant("ray-cxr score, fp32", "ours", "fp32"),
    "bound-fp32": Contestant("(c) bare program, fp32", "bound", "fp32"),
    "inline-fp32": Contestant("(c) bare program, fp32, inline", "bound", "fp32", inline=True),
    "ray": Contestant("bare ray.init()", "ray"),
}
KERAS, TORCH = ("keras-16", "keras-32"), ("torch-fp32", "torch-bf16")
BOUND_BF16, BOUND_INT8 = ("bound-bf16", "inline-bf16"), ("bound-int8", "inline-int8")


@dataclass(frozen=True)
class Bar:
    """One comparison, with that rival whose median over the rounds is best.

    Attributes:
        what: `steady`, `whole` (images per second, the more the better) or `first` (seconds, the fewer the better).
        bar: what the median of the rounds' ratios should reach, or stay below for `first`; None: told, not judged.
        least, most: it is judged from so many images on, and below so many.
    """

    what: str
    ours: str
    rivals: tuple[str, ...]
    bar: float | None
    least: int = 0
    most: float = math.inf


BARS = [
    Bar("steady", "ours-bf16", (*KERAS, *TORCH), 3.0),
    Bar("steady", "ours-bf16", ("torch-last",), None),
    Bar("steady", "ours-bf16", BOUND_BF16, 0.85),
    Bar("steady", "ours-int8", KERAS, 8.0),
    Bar("steady", "ours-int8", BOUND_INT8, None),
    Bar("whole", "ours-bf16", BOUND_BF16, 0.50, least=2_000, most=10_000),
    Bar("whole", "ours-bf16", BOUND_BF16, 0.75, least=10_000),
    Bar("whole", "ours-bf16", BOUND_BF16, None, most=2_000),
    Bar("whole", "ours-int8", BOUND_INT8, None),
    # At most 30 s to the first image where a bare ray.init() takes 12.
    Bar("first", "ours-bf16", ("ray",), 30 / 12),
    Bar("first", "ours-bf16", BOUND_BF16, None),
]


def steady(marks: Sequence[tuple[float, int]]) -> float | None:
    """Images per second by the slope of images over seconds, less the warm-up; None where too few marks are left."""
    if not marks:
        return None
    kept = [(seconds, done) for seconds, done in marks if done >= WARM_UP * marks[-1][1]]
    if len(kept) < 3 or kept[0][0] == kept[-1][0]:
        return None
    return statistics.linear_regression(*zip(*kept, strict=True)).slope


def run_ours(words: Sequence[str], out: Path, log: Path) -> dict[str, Any]:
    """The command as a user gives it, in a new folder; read from what it leaves there."""
    remove_scores(out)
    running = command(["score", "--out", str(out), *words], log)
    wall = time.monotonic() - running.began
    return {**read_scores(out, running.began_at), "wall_s": wall}


def read_scores(out: Path, began_at: float) -> dict[str, Any]:
    """What a run tells of its speed.

    Args:
        began_at: `time.time()` when its process was started.
    """
    import pyarrow.parquet as pq

    files = sorted((path.stat().st_mtime, path) for path in (out / "scores").glob("part-*.parquet"))
    marks, done = [], 0
    for seconds, path in files:
        done += pq.ParquetFile(path).metadata.num_rows
        marks.append((seconds - began_at, done))
    record = json.loads((out / "run.json").read_text(encoding="utf-8")).get("last_run", {})
    return {"marks": marks, "record": record, "stages": record.get("start_up") or {}}


def remove_scores(out: Path) -> None:
    """Remove what an earlier run of this script left, and nothing else."""
    if out.exists() and any(out.iterdir()) and not (out / "settings.json").exists():
        raise BenchmarkError(f"{out}: is not what score left; remove it")
    shutil.rmtree(out, ignore_errors=True)


def first_image(answer: dict[str, Any]) -> float | None:
    """Seconds from the start of the process to the first batch out of the network; None where nobody says."""
    if "record" not in answer:
        if answer["marks"]:
            return answer["marks"][0][0]
        return answer["stages"].get("ray.init()")
    return answer["stages"].get("all")


def speed(arguments: argparse.Namespace, workshop: Workshop, say: Any) -> dict[str, Any]:
    """Every contestant in every round."""
    kinds = {key: CONTESTANTS[key] for key in arguments.only}
    manifest = workshop.manifest(arguments.images)
    bundles = {one.precision: workshop.bundle(one.precision) for one in kinds.values() if one.kind in ("ours", "bound")}
    bundles["fp32"] = workshop.bundle("fp32")
    outs = workshop.folder / "out"
    outs.mkdir(exist_ok=True)
    result: dict[str, Any] = {"load_before": os.getloadavg()[0], "contestants": {}}
    for key, one in kinds.items():
        result["contestants"][key] = {"title": one.title, "rounds": []}

    def run(key: str) -> dict[str, Any]:
        one = kinds[key]
        log = workshop.logs / f"{key}.log"
        images = arguments.images
        if one.slow:  # whole batches, so that Keras traces its graph for one size only
            images = max(one.batch, min(images, arguments.rival_images) // one.batch * one.batch)
        spec = {"kind": one.kind, "images": images, "batch": one.batch, "precision": one.precision}
        if one.kind == "ours":
            words = ["--model", str(bundles[one.precision]), "--manifest", str(manifest)]
            words += ["--precision", one.precision, *arguments.settings]
            answer = run_ours(words, outs / key, log)
        elif one.kind == "torch":
            spec |= {"paths": _rows(str(manifest), images)[1], "size": arguments.size, "tuned": one.tuned}
            answer = ask(spec, log, python=arguments.torch)
        else:
            spec |= {"bundle": str(bundles[one.precision]), "manifest": str(manifest), "inline": one.inline}
            answer = ask({**spec, "out": str(outs / f"{key}.parquet")}, log)
        found: dict[str, Any] = {
            "images": images if one.kind != "ray" else 0,
            "first": first_image(answer),
            "steady": steady(answer["marks"]),
            "whole": images / answer["wall_s"] if one.kind != "ray" else None,
        }
        return found | {name: answer[name] for name in ("wall_s", "stages", "record", "marks") if name in answer}

    for number in range(arguments.rounds):
        turn = number % len(kinds)
        for key in [*arguments.only[turn:], *arguments.only[:turn]]:
            found = run(key)
            result["contestants"][key]["rounds"].append(found)
            rates = {name: _text(found[name]) for name in ("first", "steady", "whole")}
            say(f"round {number + 1} of {arguments.rounds}: {key}: {found['wall_s']:.0f} s, {rates}")
    result["load_after"] = os.getloadavg()[0]
    result["agreement"] = agreement(outs, kinds)
    result["bars"] = judge(result["contestants"], arguments.images)
    return result


def agreement(outs: Path, kinds: dict[str, Contestant]) -> dict[str, float]:
    """Each contestant's largest difference, in any probability, from Keras; from the first of them without Keras.

    Raises:
        BenchmarkError: larger than `SAME`: it is not the same network on the same images.
    """
    import numpy as np
    import pyarrow.parquet as pq

    tables = {}
    for key, one in kinds.items():
        if one.kind in ("ours", "bound", "keras"):
            table = pq.read_table(outs / key / "scores" if one.kind == "ours" else outs / f"{key}.parquet")
            names = [name for name in table.column_names if name.startswith("p_")]
            values = np.column_stack([table[name].to_numpy() for name in names])
            tables[key] = dict(zip(table["image_id"].to_pylist(), values, strict=True))
    if not tables:
        return {}
    reference = next((tables[key] for key in KERAS if key in tables), next(iter(tables.values())))
    found = {}
    for key, table in tables.items():
        both = sorted(reference.keys() & table.keys())
        found[key] = float(np.abs(np.stack([table[i] - reference[i] for i in both])).max()) if both else math.nan
        if not found[key] <= SAME:
            raise BenchmarkError(f"{key}: a probability is off by {found[key]:.3g}: not the same network or images")
    return found


def judge(contestants: dict[str, Any], images: int) -> list[dict[str, Any]]:
    """The bars that can be told with these contestants, by the median of the rounds' ratios."""
    found = []
    for bar in BARS:
        if bar.ours not in contestants or not bar.least <= images < bar.most:
            continue
        values = {
            key: [each[bar.what] for each in contestants[key]["rounds"]]
            for key in (bar.ours, *bar.rivals)
            if key in contestants
        }
        # Not the best of each round: the highest of several noisy numbers is higher than any of them tends to be.
        medians = {key: statistics.median(each) for key, each in values.items() if None not in each}
        rivals = [key for key in bar.rivals if key in medians]
        if bar.ours not in medians or not rivals:
            continue
        rival = (min if bar.what == "first" else max)(rivals, key=medians.__getitem__)
        each = [ours / theirs for ours, theirs in zip(values[bar.ours], values[rival], strict=True)]
        ratio = statistics.median(each)
        met = None if bar.bar is None else (ratio <= bar.bar if bar.what == "first" else ratio >= bar.bar)
        found.append(
            {
                "what": bar.what,
                "contestant": bar.ours,
                "rival": rival,
                "among": rivals,
                "bar": bar.bar,
                "ratio": ratio,
                "ratios": each,
                "of_medians": medians[bar.ours] / medians[rival],
                "met": met,
            }
        )
    return found


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _spread(values: Sequence[float | None]) -> str:
    """Median, and least to most."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.median(known):.1f} ({min(known):.1f} to {max(known):.1f})"


def show_speed(console: Any, result: dict[str, Any], arguments: argparse.Namespace) -> None:
    from rich.table import Table

    table = Table(
        title=f"{arguments.backbone} at {arguments.size} pixels, {arguments.rounds} rounds: median (min to max)"
    )
    table.add_column("contestant", no_wrap=True)
    for name in ("images", "steady, images/s", "first image, s", "whole, images/s", "whole, s", "off by"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, one in result["contestants"].items():
        rounds, off = one["rounds"], result["agreement"].get(key)
        table.add_row(
            one["title"],
            f"{rounds[0]['images']:,}" if rounds[0]["images"] else "",
            *(_spread([each[name] for each in rounds]) for name in ("steady", "first", "whole", "wall_s")),
            "" if off is None else f"{off:.4f}",
        )
    console.print(table)
    console.print(
        "steady: less start-up and the first images; first image: from the start of the process until a batch is out\n"
        "of the network, of ray.init() its own seconds; whole: from the start of the process to its end;\n"
        "off by: largest difference from Keras in a probability"
    )
    for bar in result["bars"]:
        ours = CONTESTANTS[bar["contestant"]].title
        theirs = CONTESTANTS[bar["rival"]].title + (" (the best)" if len(bar["among"]) > 1 else "")
        spread = f"{min(bar['ratios']):.2f} to {max(bar['ratios']):.2f}"
        text = f"{bar['what']}: {ours} / {theirs}: {bar['ratio']:.2f} ({spread})"
        if bar["bar"] is None:
            console.print(f"{text}, no bar")
        else:
            sign = "<=" if bar["what"] == "first" else ">="
            console.print(f"{text} {sign} {bar['bar']:.2f}: {'met' if bar['met'] else 'NOT met'}")
    show_start_up(console, result)
    console.print(f"the machine's load was {result['load_before']:.1f} before and {result['load_after']:.1f} after")


def show_start_up(console: Any, result: dict[str, Any]) -> None:
    """What each contestant says of its start, medians of the rounds."""
    for one in result["contestants"].values():
        names = list(dict.fromkeys(name for each in one["rounds"] for name in each["stages"]))
        parts = []
        for name in names:
            values = [each["stages"].get(name) for each in one["rounds"]]
            numbers = [value for value in values if isinstance(value, (int, float))]
            if numbers:
                parts.append(f"{name} {statistics.median(numbers):.1f}")
        if parts:
            console.print(f"start-up of {one['title']}, s: {', '.join(parts)}")


# ---------------------------------------------------------------- the whole archive


def full(arguments: argparse.Namespace, workshop: Workshop, say: Any) -> dict[str, Any]:
    """As many rows as the archive has, killed once a third in, continued, and counted.

    Raises:
        BenchmarkError: a row is missing, doubled or failed, or the command did not end well.
    """
    import csv

    folder = workshop.folder / "full"
    folder.mkdir(exist_ok=True)
    opened = gzip.open if workshop.table.suffix == ".gz" else open
    with opened(workshop.table, "rt", encoding="utf-8-sig", newline="") as stream:
        table = list(csv.reader(stream))
    header, rows = table[0], table[1 : None if arguments.rows is None else arguments.rows + 1]
    names = [row[header.index("Image Index")] for row in rows]
    images, manifest, out = folder / f"images-{len(rows)}", folder / "m.parquet", folder / "scores"
    say(f"{len(rows):,} names for {len(workshop.sources)} radiographs")
    workshop.links(images, names)
    short = workshop.table
    if len(rows) < len(table) - 1:
        short = folder / "table.csv"
        with open(short, "w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])
    began = time.monotonic()
    command(["manifest", str(short), "--images", str(images), "--out", str(manifest)], workshop.logs / "full.log")
    result: dict[str, Any] = {"rows": len(rows), "manifest_s": time.monotonic() - began, "load_before": os.getloadavg()}

    precision = arguments.precision[0]
    remove_scores(out)
    words = ["score", "--model", str(workshop.bundle(precision)), "--manifest", str(manifest), "--out", str(out)]
    words += ["--precision", precision, *arguments.settings]
    say("ray-cxr " + " ".join(words))
    memory = Memory()
    result["runs"] = [
        _watched(words, workshop.logs / "full-1.log", out, len(rows), memory, say, kill_at=len(rows) / 3),
        _watched(words, workshop.logs / "full-2.log", out, len(rows), memory, say),
    ]
    result["record"] = read_scores(out, 0.0)["record"]
    result["memory"] = {"peak_bytes": memory.peak, "at_the_peak": memory.parts}
    result["load_after"] = os.getloadavg()
    result["checks"] = check_scores(out, names)
    return result


def _watched(
    words: Sequence[str], log: Path, out: Path, rows: int, memory: Memory, say: Any, *, kill_at: float | None = None
) -> dict[str, Any]:
    """Run `score`, sampling its memory; kill it when so many rows are written."""
    files: dict[str, int] = {}
    before = _written(out, files)
    tenth = before * 10 // rows
    with Running([sys.executable, "-m", "ray_cxr.cli", *words], log) as running:
        while running.process.poll() is None:
            memory.sample(running)
            done = _written(out, files)
            seconds = time.monotonic() - running.began
            if done * 10 // rows > tenth:
                tenth = done * 10 // rows
                say(f"{done:,} of {rows:,} rows written, {seconds:.0f} s")
            if kill_at is not None and done >= kill_at:
                running.kill()
                killed, died = time.monotonic(), None
                while (left := running.all()) and time.monotonic() - killed < ORPHANS_S:
                    time.sleep(0.1)
                died = None if left else time.monotonic() - killed
                say(f"SIGKILL to the command's process group after {seconds:.0f} s, {done:,} rows written")
                return _told(files, running, before) | {
                    "killed_after_s": seconds,
                    "written": _written(out, files),
                    "others_gone_after_s": died,
                    "left_over": len(left),
                }
            if seconds > FULL_S:
                raise BenchmarkError(f"score: no end after {FULL_S / 3600:.0f} hours")
            time.sleep(SAMPLE_S)
        wall = time.monotonic() - running.began
        if running.process.returncode:
            raise BenchmarkError(f"score: ended with code {running.process.returncode}\n{running.said()}")
        if kill_at is not None:
            raise BenchmarkError("score: ended before it could be killed; give more --rows")
        return {"wall_s": wall, "written": _written(out, files)} | _told(files, running, before)


def _written(out: Path, files: dict[str, int]) -> int:
    """Rows of the finished files; `files` keeps what is known of them."""
    import pyarrow.parquet as pq

    for path in (out / "scores").glob("part-*.parquet"):
        if str(path) not in files:
            files[str(path)] = pq.ParquetFile(path).metadata.num_rows
    return sum(files.values())


def _told(files: dict[str, int], running: Running, before: int) -> dict[str, Any]:
    """The steady rate of the files that this run wrote."""
    own = sorted((Path(path).stat().st_mtime - running.began_at, rows) for path, rows in files.items())
    marks, done = [], 0
    for seconds, rows in own:
        if seconds >= 0:
            done += rows
            marks.append((seconds, done))
    first = marks[0][0] if marks else None
    return {"written_before": before, "first_file_s": first, "steady": steady(marks)}


def check_scores(out: Path, names: Sequence[str]) -> dict[str, Any]:
    """That every name has one row, and all are well.

    Raises:
        BenchmarkError: they are not.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(out / "scores", columns=["image_id", "status"])
    found = Counter(table["image_id"].to_pylist())
    checks = {
        "rows": len(table),
        "doubled": sum(count > 1 for count in found.values()),
        "missing": len(set(names) - found.keys()),
        "unknown": len(found.keys() - set(names)),
        "errors": sum(status != "ok" for status in table["status"].to_pylist()),
        "success": (out / "_SUCCESS").exists(),
        "files": len(list((out / "scores").glob("*.parquet"))),
    }
    good = checks["rows"] == len(names) and checks["success"]
    if not good or any(checks[name] for name in ("doubled", "missing", "unknown", "errors")):
        raise BenchmarkError(f"{out}: {checks}, for {len(names):,} rows")
    return checks


def show_full(console: Any, result: dict[str, Any]) -> None:
    first, second = result["runs"]
    console.print(f"{result['rows']:,} rows; manifest made in {result['manifest_s']:.1f} s")
    gone = first["others_gone_after_s"]
    console.print(
        f"first run: first file after {first['first_file_s']:.0f} s, {_text(first['steady'])} images/s steady; SIGKILL "
        f"after {first['killed_after_s']:.0f} s with {first['written']:,} rows written; "
        + (f"{first['left_over']} processes were left over" if gone is None else f"Ray's were gone {gone:.1f} s later")
    )
    console.print(
        f"second run: {second['wall_s']:.0f} s, first file after {_text(second['first_file_s'])} s, "
        f"{_text(second['steady'])} images/s steady; it found {second['written_before']:,} rows written"
    )
    seconds = first["killed_after_s"] + second["wall_s"]
    console.print(f"both: {seconds:.0f} s, {result['rows'] / seconds:.1f} images/s, start-ups and kill included")
    console.print(f"rows: {result['checks']}")
    memory = result["memory"]
    parts = ", ".join(f"{name} x {n} {size / 2**20:.0f}" for name, (size, n) in memory["at_the_peak"].items())
    console.print(f"memory of all processes together at its peak: {memory['peak_bytes'] / 2**30:.2f} GiB; MiB: {parts}")
    console.print(f"load before {result['load_before'][0]:.1f}, after {result['load_after'][0]:.1f}")


# ---------------------------------------------------------------- the driver's memory


def driver_memory(arguments: argparse.Namespace, workshop: Workshop, say: Any) -> dict[str, Any]:
    """Peak memory of `score --dry-run`, which reads and checks the whole manifest, by rows; twice in turn."""
    bundle = workshop.bundle("fp32")
    runs = []
    for rows in arguments.memory_rows * 2:
        manifest = workshop.folder / f"plan-{rows}.parquet"
        if not manifest.exists():  # all rows name one file: a plan opens none
            names = [f"{i // 10:08d}_{i % 10:03d}.png" for i in range(rows)]
            write_manifest(manifest, names, [str(workshop.sources[0])] * rows)
        words = ["--model", str(bundle), "--manifest", str(manifest), "--out", str(workshop.folder / "plan")]
        answer = ask({"kind": "plan", "arguments": [*words, *arguments.settings]}, workshop.logs / "plan.log")
        runs.append({"rows": rows, "peak_bytes": answer["peak_bytes"], "plan_s": answer["stages"]["plan"]})
        say(f"{rows:,} rows: {answer['peak_bytes'] / 2**20:.0f} MiB")
    peaks = {
        rows: statistics.median(run["peak_bytes"] for run in runs if run["rows"] == rows)
        for rows in arguments.memory_rows
    }
    pairs = list(zip(arguments.memory_rows, arguments.memory_rows[1:], strict=False))
    steps = {f"{few}-{many}": (peaks[many] - peaks[few]) / (many - few) for few, many in pairs}
    return {"runs": runs, "peak_bytes": peaks, "bytes_per_row": steps}


def show_memory(console: Any, result: dict[str, Any]) -> None:
    for rows, peak in result["peak_bytes"].items():
        seconds = statistics.median(run["plan_s"] for run in result["runs"] if run["rows"] == rows)
        console.print(f"{rows:,} rows: peak {peak / 2**20:.0f} MiB, planned in {seconds:.1f} s")
    for step, size in result["bytes_per_row"].items():
        few, many = step.split("-")
        console.print(f"from {int(few):,} to {int(many):,} rows: {size:.0f} bytes a row")


# ---------------------------------------------------------------- the script


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {"system": platform.platform(), "cpu": model, "cpus": os.cpu_count()}


def has_torch(python: str) -> bool:
    """Whether an interpreter has PyTorch and Pillow."""
    find = "import importlib.util as u, sys; sys.exit(not (u.find_spec('torch') and u.find_spec('PIL')))"
    try:
        return subprocess.run([python, "-c", find], stdin=subprocess.DEVNULL, check=False).returncode == 0
    except OSError:
        return False


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    whole: dict[str, Any] = {"type": _positive, "metavar": "N"}
    parser.add_argument("--work", type=Path, metavar="DIR", help="where bundles, links and scores go, and stay")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="real radiographs (../shared)")
    parser.add_argument("--backbone", default="DenseNet121", help="TinyCNN for a quick try (DenseNet121)")
    parser.add_argument("--size", default=224, help="of the network's input, pixels (224)", **whole)
    parser.add_argument("--images", default=None, help="to score in each round (2000; with --profile 128)", **whole)
    parser.add_argument("--rival-images", default=512, help="for Keras and PyTorch, which are slow (512)", **whole)
    parser.add_argument("--rounds", default=3, help="runs of each contestant (3)", **whole)
    parser.add_argument(
        "--precision", default="bf16,int8", help="of ours and the bound; --full takes the first (bf16,int8)"
    )
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="contestants, in place of those of --precision")
    parser.add_argument(
        "--torch", default=sys.executable, metavar="PYTHON", help="an interpreter with PyTorch and Pillow"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value", help="for score")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--profile", action="store_true", help="ours, the bound and ray.init() alone: the start-up")
    modes.add_argument("--full", action="store_true", help="the whole archive's rows, with a kill")
    modes.add_argument("--memory", action="store_true", help="the driver's memory by rows of the manifest")
    parser.add_argument("--rows", default=None, help="--full: only so many of the table's rows", **whole)
    parser.add_argument(
        "--memory-rows", nargs="+", default=list(MEMORY_ROWS), help="--memory: rows of the manifests", **whole
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the raw numbers there")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        return arguments
    if sys.platform != "linux":
        parser.error("runs on Linux only: it finds processes and their memory in /proc")
    if arguments.work is None:
        parser.error("the following arguments are required: --work")
    arguments.precision = list(dict.fromkeys(arguments.precision.split(",")))
    if unknown := set(arguments.precision) - {"fp32", "bf16", "int8"}:
        parser.error(f"--precision {','.join(sorted(unknown))}: give fp32, bf16 or int8, or several with commas")
    if arguments.images is None:
        arguments.images = 128 if arguments.profile else 2000
    if arguments.only is None:
        kinds = ("ours", "bound", "ray") if arguments.profile else ("ours", "bound", "keras", "torch", "ray")
        arguments.only = [
            key
            for key, one in CONTESTANTS.items()
            if one.kind in kinds and (one.kind not in ("ours", "bound") or one.precision in arguments.precision)
        ]
    arguments.memory_rows = sorted(set(arguments.memory_rows))
    arguments.settings = [word for text in arguments.overrides for word in ("--set", text)]
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

    from rich.console import Console

    from ray_cxr.storage import atomic
    from ray_cxr.versions import versions

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends, too
    say = functools.partial(print, file=sys.stderr, flush=True)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
    result: dict[str, Any] = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["benchmarks/scoring.py", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(),
        "versions": versions(),
    }
    try:
        workshop = Workshop(arguments.work, arguments.shared, arguments.backbone, arguments.size, say)
        result["images"] = f"{len(workshop.sources)} {'radiographs of NIH' if workshop.real else 'phantoms'}"
        if arguments.full:
            result["full"] = full(arguments, workshop, say)
            show_full(console, result["full"])
        elif arguments.memory:
            result["memory"] = driver_memory(arguments, workshop, say)
            show_memory(console, result["memory"])
        else:
            torch = [key for key in arguments.only if CONTESTANTS[key].kind == "torch"]
            reason = ""
            if torch and arguments.backbone != "DenseNet121":
                reason = f"PyTorch has no {arguments.backbone} here"
            elif torch and not has_torch(arguments.torch):
                reason = f"PyTorch and Pillow are not installed for {arguments.torch}; --torch names another Python"
            if reason:
                console.print(f"(b) is left out: {reason}")
                arguments.only = [key for key in arguments.only if key not in torch]
            result["speed"] = speed(arguments, workshop, say)
            show_speed(console, result["speed"], arguments)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if arguments.out:
        atomic.write_json(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
