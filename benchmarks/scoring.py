"""Compare the speed of `ray-cxr score` with simple programs, on this machine in the same hour. Linux only.

    .venv/bin/python benchmarks/scoring.py --work DIR --out speed.json      compare speeds
    .venv/bin/python benchmarks/scoring.py --work DIR --table               print the table of docs/scoring.md
    .venv/bin/python benchmarks/scoring.py --work DIR --profile             show where the start-up time goes
    .venv/bin/python benchmarks/scoring.py --work DIR --full                112,120 rows, killed once in between
    .venv/bin/python benchmarks/scoring.py --work DIR --memory              memory of the driver per row

Every contestant scores the same radiographs, PNGs of 1024 x 1024, with the same model. In every round each contestant
runs alone, in a new process, and another contestant starts.

    ours-bf16, ours-int8     the command, with its own Ray, measured from outside
    bound-bf16, bound-int8   the bound: a program without Ray, with two decoding threads, our decoder and runtime; each
                             thread decodes in a child process, as ours does
    inline-bf16, inline-int8 the same, decoding in the threads themselves; the faster of the two is the bound
    keras-16, keras-32       Keras `predict` on a tf.data pipeline in float32, with batches of 16 and 32
    torch-fp32, torch-bf16   PyTorch with a DataLoader and the same architecture; --torch names a Python that has it
    torch-last               the same in bf16 with the memory format channels last; without a bar
    ray                      `ray.init()` alone, for the start-up

Steady: the slope of a straight line through the number of images over time, without the first 15%. For ours, time and
rows of the files in SCORES/scores are the points; for a rival, its batches. Two files are written at a time, so the
rows between the first and the last file would not do. First: from the start of the process to the first batch of
predictions; ours reports it in run.json. Whole: images over the time from the start of the process to its end. CPU:
processor time per image of all processes of a contestant, Ray's included, in the steady part; on a machine that others
use it varies less than rates do.

The model has random weights: its speed is real, its probabilities are meaningless. They are compared all the same,
because a rival that computes something else does not count. All files remain in DIR and are used again; remove DIR to
use other radiographs or another bundle. Exit codes: 0 done, whether or not the bars are met; 1 a contestant or a check
failed; 2 wrong arguments.
"""

# Child processes run this file, some in a Python without ray_cxr: the top imports only the library and the harness.
from __future__ import annotations

import argparse
import csv
import functools
import gzip
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import (
    POSITIVE,
    ROOT,
    BenchmarkError,
    Channel,
    CpuSampler,
    MemorySampler,
    Process,
    ask_child,
    compare_rounds,
    compute_medians,
    create_console,
    create_parser,
    format_bar,
    format_number,
    format_spread,
    interleave,
    log,
    meets,
    read_load,
    read_status,
    run_command,
    run_script,
)

#: Processor threads of each contestant.
THREADS = 2
#: Images per forward pass of the bound, as of ours.
BATCH = 4
#: Share of the images that the steady rate leaves out, at the start.
WARM_UP = 0.15
#: Manifest rows that `--memory` compares.
MEMORY_ROWS = (1_000, 100_000, 1_000_000)
#: Seconds that the command of --full may take.
FULL_S = 12 * 3600.0
#: `--table`: images of each round, rounds, and images of the additional round that measures the whole command.
TABLE_IMAGES, TABLE_ROUNDS, WHOLE_IMAGES = 1_200, 10, 10_000
SAMPLE_S = 1.0
#: Seconds within which the other processes of a killed command must end.
ORPHANS_S = 120.0
#: Drift that int8 may show when it is made: with random weights AUROC is noise.
LENIENT = ("max_auroc_fall=0.5", "max_p99_drift=0.5")
#: Largest difference between two contestants' probabilities that counts as the same model.
SAME = 0.05


# ---------------------------------------------------------------- in the children


def make_bundle(spec: dict[str, Any], channel: Channel) -> None:
    """Write a bundle with random weights."""
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
        # Calibration and flags are part of a row's cost.
        calibration={name: {"method": "platt", "slope": 2.0, "intercept": -1.0} for name in FINDINGS},
        operating_points=dict.fromkeys(FINDINGS, point),
        expected_flag_rates=dict.fromkeys(FINDINGS, 0.5),
        provenance={
            "origin": "benchmarks/scoring.py: random weights; its probabilities are meaningless",
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
    channel.answer()


def draw_phantoms(spec: dict[str, Any], channel: Channel) -> None:
    from ray_cxr.imaging.phantoms import write_phantoms

    write_phantoms(Path(spec["out"]), patients=48, size=1024, broken=False)
    channel.answer()


def score_bare(spec: dict[str, Any], channel: Channel) -> None:
    """Run the bound: threads decode and feed the runtime, and one Parquet file is written at the end."""
    import cv2
    import numpy as np

    from ray_cxr.imaging import sandbox
    from ray_cxr.imaging.decode import load_image
    from ray_cxr.models.bundle import load_bundle

    channel.end_stage("imports")
    bundle = load_bundle(spec["bundle"])
    spec_in, size = bundle.input_spec, bundle.input_spec.size
    decoders = []
    if not spec["inline"]:
        decoders = [sandbox.Decoder([spec_in]) for _ in range(THREADS)]
        for decoder in decoders:
            decoder.start()
    cv2.setNumThreads(1)
    model = bundle.open_runtime(spec["precision"], batch_size=BATCH, threads=THREADS)
    channel.end_stage("model")
    ids, paths = _rows(spec["manifest"], spec["images"])
    channel.end_stage("manifest")
    found = np.empty((len(ids), len(bundle.findings)), np.float32)
    remaining, lock = iter(enumerate(paths)), threading.Lock()
    submitted: list[tuple[list[int], Any]] = []

    def in_process(path: str) -> Any:
        return load_image(path, spec_in)

    def in_child(decoder: Any, path: str) -> Any:
        return decoder.load(path).images[0]

    def work(load: Any) -> None:
        batch = np.empty((BATCH, size, size), np.uint8)
        members: list[int] = []
        while True:
            with lock:
                index, path = next(remaining, (-1, None))
            if path is not None:
                batch[len(members)] = load(path)
                members.append(index)
            if members and (path is None or len(members) == BATCH):
                future = model.submit(batch[: len(members)])
                future.add_done_callback(functools.partial(lambda n, _: channel.count_images(n), len(members)))
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
    while len(channel.marks) < len(submitted):  # callbacks run a moment after the result is available
        time.sleep(0.001)
    for decoder in decoders:
        decoder.close()
    _write_scores(spec["out"], ids, bundle.findings, found)
    channel.answer()


def score_keras(spec: dict[str, Any], channel: Channel) -> None:
    """Run Keras's `predict` on a tf.data pipeline, as its guides do."""
    import keras
    import tensorflow as tf

    from ray_cxr.models.bundle import load_bundle

    channel.end_stage("imports")
    bundle = load_bundle(spec["bundle"])
    model = bundle.model()
    channel.end_stage("model")
    size = bundle.input_spec.size
    ids, paths = _rows(spec["manifest"], spec["images"])

    def read(path: Any) -> Any:
        image = tf.io.decode_png(tf.io.read_file(path), channels=1)  # a gray of RGBA, too
        return tf.cast(tf.round(tf.image.resize(image, [size, size], method="area")), tf.uint8)

    class Marks(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
            channel.count_images(len(logs["outputs"]))

    dataset = tf.data.Dataset.from_tensor_slices(paths).map(read, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.batch(spec["batch"]).prefetch(tf.data.AUTOTUNE)
    found = model.predict(dataset, verbose=0, callbacks=[Marks()])
    _write_scores(spec["out"], ids, bundle.findings, found)
    channel.answer()


def score_torch(spec: dict[str, Any], channel: Channel) -> None:
    """Run PyTorch's DataLoader with two workers and a DenseNet121 with random weights, without ray_cxr."""
    import torch
    from torch.utils.data import DataLoader

    channel.end_stage("imports")
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    layout = torch.channels_last if spec["tuned"] else torch.contiguous_format
    model = torch_densenet121().eval().to(memory_format=layout)
    channel.end_stage("model")
    dtype = torch.bfloat16 if spec["precision"] == "bf16" else None
    loader = DataLoader(Radiographs(spec["paths"], spec["size"]), batch_size=spec["batch"], num_workers=THREADS)
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        for batch in loader:
            found = torch.sigmoid(model(batch.to(memory_format=layout)))
            channel.count_images(len(found.float().numpy()))
    channel.answer()


class Radiographs:
    """A PyTorch data set: float32 [3,S,S], normalised with ImageNet's mean and deviation."""

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self._paths, self._size = paths, size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        import torch
        from PIL import Image

        with Image.open(self._paths[index]) as stored:
            image = stored.convert("L").resize((self._size, self._size), Image.Resampling.BOX)
        gray = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(1, self._size, self._size)
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (gray / 255.0 - mean[:, None, None]) / deviation[:, None, None]


def torch_densenet121() -> Any:
    """Return DenseNet-121 (Huang et al. 2017, table 1) with 14 outputs, as torchvision builds it."""
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


def start_bare_ray(spec: dict[str, Any], channel: Channel) -> None:
    import ray

    channel.end_stage("import ray")
    ray.init()
    channel.end_stage("ray.init()")
    ray.shutdown()
    channel.answer()


def plan_only(spec: dict[str, Any], channel: Channel) -> None:
    """Run `ray-cxr score --dry-run` in this process, without its estimate, and report its peak memory."""
    from ray_cxr.cli import main
    from ray_cxr.costs import Cost
    from ray_cxr.scoring import cost

    cost.estimate_score = lambda *_: Cost("", {}, None, {})
    channel.end_stage("imports")
    code = main(["score", "--dry-run", *spec["arguments"]])
    channel.end_stage("plan")
    if code:
        raise RuntimeError(f"score --dry-run ended with {code}")
    channel.answer(peak_bytes=read_status()["VmHWM"])


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
    """Return image_ids and paths of the first rows."""
    import pyarrow.parquet as pq

    table = pq.read_table(manifest, columns=["image_id", "path"]).slice(0, count)
    return table["image_id"].to_pylist(), table["path"].to_pylist()


def _write_scores(out: str, ids: list[str], findings: Sequence[str], probabilities: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {f"p_{name}": probabilities[:, i] for i, name in enumerate(findings)}
    pq.write_table(pa.table({"image_id": ids, **columns}), out, compression="zstd")


# ---------------------------------------------------------------- the input


class Workspace:
    """The folder of this benchmark: radiographs under many names, manifests and bundles, made once.

    Args:
        folder: `--work`.
        shared: `--shared`, with the real radiographs.
        backbone, size: of the model.
    """

    def __init__(self, folder: Path, shared: Path, backbone: str, size: int) -> None:
        self.folder = folder
        self._backbone, self._size = backbone, size
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.real = (shared / "nih" / "images1024").is_dir()
        if self.real:
            self.images = (shared / "nih" / "images1024").resolve()
            self.table = (shared / "nih" / "meta" / "Data_Entry_2017_v2020.csv.gz").resolve()
        else:
            log(f"{shared} has no nih/images1024: drawing phantoms in place of real radiographs")
            ask_child(__file__, {"kind": "phantoms", "out": str(folder / "phantoms")}, self.logs / "phantoms.log")
            self.images, self.table = folder / "phantoms" / "images", folder / "phantoms" / "Data_Entry_phantoms.csv"
        self.sources = sorted(self.images.glob("*.png"))

    def links(self, folder: Path, names: Iterable[str]) -> None:
        """Fill a folder with links to the radiographs under these names."""
        folder.mkdir(parents=True, exist_ok=True)
        existing = {entry.name for entry in os.scandir(folder)}
        for i, name in enumerate(names):
            if name not in existing:
                (folder / name).symlink_to(self.sources[i % len(self.sources)])

    def manifest(self, rows: int) -> Path:
        """Return a manifest with `rows` rows, each with a different file name."""
        out = self.folder / f"manifest-{rows}.parquet"
        names = [f"{i // 10:08d}_{i % 10:03d}.png" for i in range(rows)]
        links = self.folder.resolve() / "links"
        self.links(links, names)
        if not out.exists():
            write_manifest(out, names, [f"{links}/{name}" for name in names])
        return out

    def prepared(self, manifest: Path, rows: int) -> Path:
        """Return the prepared set of a manifest."""
        out = self.folder / f"prepared-{rows}-{self._size}"
        if not (out / str(self._size) / "counts.json").exists():
            log(f"making {out}")
            command = ["prepare", str(manifest), "--out", str(out), "--size", str(self._size)]
            run_command(command, self.logs / "prepare-rows.log")
        return out

    def bundle(self, precision: str) -> Path:
        """Return a bundle with random weights; for int8 it also contains the 8-bit graph."""
        kind = f"{self._backbone}-{self._size}"
        plain = self.folder / f"bundle-{kind}"
        if not plain.exists():
            log(f"making {plain}")
            spec = {"kind": "bundle", "out": str(plain), "backbone": self._backbone, "size": self._size}
            ask_child(__file__, spec, self.logs / "bundle.log")
        if precision != "int8":
            return plain
        out = self.folder / f"bundle-{kind}-int8"
        if not out.exists():
            log(f"making {out}")
            few, prepared = self.folder / "few.parquet", self.folder / f"prepared-{self._size}"
            command = ["manifest", str(self.table), "--images", str(self.images), "--found-only", "--out", str(few)]
            run_command([*command, "--split", "patient", "--fractions", "0.5,0.4,0.1"], self.logs / "manifest.log")
            command = ["prepare", str(few), "--out", str(prepared), "--size", str(self._size)]
            run_command(command, self.logs / "prepare.log")
            command = ["quantize", str(plain), str(prepared), "--out", str(out)]
            for setting in LENIENT:
                command += ["--set", setting]
            run_command(command, self.logs / "quantize.log")
        return out


def write_manifest(out: Path, names: Sequence[str], paths: Sequence[str]) -> None:
    """Write a manifest with all columns filled."""
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
    """One of the compared programs.

    Attributes:
        title: for people.
        kind: `ours`, or the kind of child.
        precision: of the model.
        batch: images per forward pass; ours chooses its own.
        inline: the bound decodes in its threads.
        tuned: PyTorch's tensors are channels last.
        prepared: ours reads images that `ray-cxr prepare` has decoded and resized.
        slow: a rival that needs only --rival-images for its steady rate.
    """

    title: str
    kind: str
    precision: str = "fp32"
    batch: int = BATCH
    slow: bool = False
    inline: bool = False
    tuned: bool = False
    prepared: bool = False


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
    "prepared-bf16": Contestant("ray-cxr score --prepared, bf16", "ours", "bf16", prepared=True),
    "prepared-int8": Contestant("ray-cxr score --prepared, int8", "ours", "int8", prepared=True),
    "ray": Contestant("bare ray.init()", "ray"),
}
KERAS, TORCH = ("keras-16", "keras-32"), ("torch-fp32", "torch-bf16")
BOUND_BF16, BOUND_INT8 = ("bound-bf16", "inline-bf16"), ("bound-int8", "inline-int8")


@dataclass(frozen=True)
class Bar:
    """One comparison, with the rival whose median over the rounds is best.

    Attributes:
        what: `steady`, `whole` (images per second), `first` (seconds) or `cpu` (milliseconds per image).
        bar: minimum of the median of the rounds' ratios, for `first` and `cpu` the maximum; None: report only.
        least, most: judged from `least` images on, and below `most`.
    """

    what: str
    ours: str
    rivals: tuple[str, ...]
    bar: float | None
    least: int = 0
    most: float = math.inf

    @property
    def at_most(self) -> bool:
        return self.what in ("first", "cpu")


BARS = [
    Bar("steady", "ours-bf16", (*KERAS, *TORCH), 3.0),
    Bar("steady", "ours-bf16", ("torch-last",), None),
    Bar("steady", "ours-bf16", BOUND_BF16, 0.85),
    Bar("steady", "ours-int8", KERAS, 8.0),
    Bar("steady", "ours-int8", BOUND_INT8, None),
    Bar("whole", "ours-bf16", BOUND_BF16, 0.50, least=2_000, most=10_000),
    Bar("whole", "ours-bf16", BOUND_BF16, 0.85, least=10_000),
    Bar("whole", "ours-bf16", BOUND_BF16, None, most=2_000),
    Bar("whole", "ours-int8", BOUND_INT8, 0.85, least=10_000),
    Bar("whole", "ours-int8", BOUND_INT8, None, most=10_000),
    Bar("cpu", "ours-bf16", BOUND_BF16, 1.10),
    Bar("cpu", "ours-int8", BOUND_INT8, 1.05),
    # At most 30 s to the first image if ray.init() alone takes 12.
    Bar("steady", "prepared-bf16", ("ours-bf16",), None),
    Bar("steady", "prepared-int8", ("ours-int8",), None),
    Bar("first", "ours-bf16", ("ray",), 30 / 12),
    Bar("first", "ours-bf16", BOUND_BF16, None),
]


def steady(marks: Sequence[tuple[float, int]]) -> float | None:
    """Return the slope of images over seconds after the warm-up; None with fewer than three points."""
    if not marks:
        return None
    kept = [(seconds, done) for seconds, done in marks if done >= WARM_UP * marks[-1][1]]
    if len(kept) < 3 or kept[0][0] == kept[-1][0]:
        return None
    return statistics.linear_regression(*zip(*kept, strict=True)).slope


def run_ours(arguments: Sequence[str], out: Path, path: Path) -> dict[str, Any]:
    """Run the command in a new folder, and read its speed from there."""
    remove_scores(out)
    process = run_command(["score", "--out", str(out), *arguments], path)
    wall = time.monotonic() - process.started
    return {**read_scores(out, process.started_at), "wall_s": wall}


def read_scores(out: Path, started_at: float) -> dict[str, Any]:
    """Return a run's points of its steady rate, and its own record.

    Args:
        out: the scores' folder.
        started_at: `time.time()` when its process started.
    """
    import pyarrow.parquet as pq

    files = sorted((path.stat().st_mtime, path) for path in (out / "scores").glob("part-*.parquet"))
    marks, done = [], 0
    for seconds, path in files:
        done += pq.ParquetFile(path).metadata.num_rows
        marks.append((seconds - started_at, done))
    record = json.loads((out / "run.json").read_text(encoding="utf-8")).get("last_run", {})
    return {"marks": marks, "record": record, "stages": record.get("start_up") or {}}


def remove_scores(out: Path) -> None:
    """Remove the scores of an earlier run.

    Raises:
        BenchmarkError: the folder holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / "settings.json").exists():
        raise BenchmarkError(f"{out}: holds no scores; remove it")
    shutil.rmtree(out, ignore_errors=True)


def get_first_image_seconds(answer: dict[str, Any]) -> float | None:
    """Return the seconds from the start of the process to the first batch of predictions; None if unknown."""
    if "record" in answer:
        return answer["stages"].get("all")
    return answer["marks"][0][0] if answer["marks"] else answer["stages"].get("ray.init()")


def measure_speed(arguments: argparse.Namespace, workspace: Workspace) -> dict[str, Any]:
    """Run every contestant in every round."""
    contestants = {key: CONTESTANTS[key] for key in arguments.only}
    result: dict[str, Any] = {"load_before": read_load(), "contestants": {}}
    for key, one in contestants.items():
        result["contestants"][key] = {"title": one.title, "rounds": []}
    outs = workspace.folder / "out"
    outs.mkdir(exist_ok=True)
    manifest = workspace.manifest(arguments.images)
    for one in contestants.values():
        # Before anything is timed:
        workspace.bundle(one.precision if one.kind in ("ours", "bound") else "fp32")
        if one.prepared:
            workspace.prepared(manifest, arguments.images)
    for number, key in interleave(arguments.only, arguments.rounds):
        measured = run_contestant(key, arguments, workspace, manifest, outs)
        result["contestants"][key]["rounds"].append(measured)
        rates = {name: format_number(measured[name]) for name in ("first", "steady", "whole")}
        log(f"round {number + 1} of {arguments.rounds}: {key}: {measured['wall_s']:.0f} s, {rates}")
    result["load_after"] = read_load()
    result["agreement"] = check_agreement(outs, contestants)
    result["bars"] = judge(result["contestants"], arguments.images)
    return result


def run_contestant(
    key: str, arguments: argparse.Namespace, workspace: Workspace, manifest: Path, outs: Path
) -> dict[str, Any]:
    """Run one contestant once; its scores go to `outs`."""
    with CpuSampler() as cpu:
        measured = _run_contestant(key, arguments, workspace, manifest, outs)
    by_part = cpu.fit_per_image(measured.get("marks", ()), WARM_UP)
    total = sum(cpu.samples[-1][1].values()) if cpu.samples else None
    return measured | {"cpu": sum(by_part.values()) or None, "cpu_by_part": by_part, "cpu_s": total}


def _run_contestant(
    key: str, arguments: argparse.Namespace, workspace: Workspace, manifest: Path, outs: Path
) -> dict[str, Any]:
    one, path, images = CONTESTANTS[key], workspace.logs / f"{key}.log", arguments.images
    if one.slow:  # whole batches, so that Keras traces its graph for one size only
        images = max(one.batch, min(images, arguments.rival_images) // one.batch * one.batch)
    spec = {"kind": one.kind, "images": images, "batch": one.batch, "precision": one.precision}
    bundle = workspace.bundle(one.precision if one.kind in ("ours", "bound") else "fp32")
    if one.kind == "ours":
        source = ["--manifest", str(manifest)]
        if one.prepared:
            source = ["--prepared", str(workspace.prepared(manifest, images))]
        options = ["--model", str(bundle), *source, "--precision", one.precision]
        answer = run_ours([*options, *arguments.settings], outs / key, path)
    elif one.kind == "torch":
        spec |= {"paths": _rows(str(manifest), images)[1], "size": arguments.size, "tuned": one.tuned}
        answer = ask_child(__file__, spec, path, python=arguments.torch)
    else:
        spec |= {"bundle": str(bundle), "manifest": str(manifest), "inline": one.inline}
        answer = ask_child(__file__, {**spec, "out": str(outs / f"{key}.parquet")}, path)
    measured: dict[str, Any] = {
        "images": images if one.kind != "ray" else 0,
        "first": get_first_image_seconds(answer),
        "steady": steady(answer["marks"]),
        "whole": images / answer["wall_s"] if one.kind != "ray" else None,
    }
    return measured | {name: answer[name] for name in ("wall_s", "stages", "record", "marks") if name in answer}


def check_agreement(outs: Path, kinds: dict[str, Contestant]) -> dict[str, float]:
    """Return each contestant's largest difference from Keras in a probability; from the first one without Keras.

    Raises:
        BenchmarkError: larger than `SAME`: another model, or other images.
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
            raise BenchmarkError(f"{key}: a probability differs by {found[key]:.3g}: not the same model or images")
    return found


def judge(contestants: dict[str, Any], images: int) -> list[dict[str, Any]]:
    """Return the bars of these contestants, by the median of the rounds' ratios."""
    found = []
    for bar in BARS:
        if bar.ours not in contestants or not bar.least <= images < bar.most:
            continue
        values = {
            key: [each[bar.what] for each in contestants[key]["rounds"]]
            for key in (bar.ours, *bar.rivals)
            if key in contestants
        }
        # Not the best of each round: the highest of several noisy numbers exceeds what any of them tends to be.
        medians = {key: statistics.median(each) for key, each in values.items() if None not in each}
        rivals = [key for key in bar.rivals if key in medians]
        if bar.ours not in medians or not rivals:
            continue
        rival = (min if bar.at_most else max)(rivals, key=medians.__getitem__)
        one = {"what": bar.what, "contestant": bar.ours, "rival": rival, "among": rivals, "bar": bar.bar}
        one |= compare_rounds(values[bar.ours], values[rival])
        found.append(one | {"at_most": bar.at_most, "met": meets(one["ratio"], bar.bar, at_most=bar.at_most)})
    return found


def show_speed(console: Any, result: dict[str, Any], arguments: argparse.Namespace) -> None:
    from rich.table import Table

    table = Table(
        title=f"{arguments.backbone} at {arguments.size} pixels, {arguments.rounds} rounds: median (min to max)"
    )
    table.add_column("contestant", no_wrap=True)
    for name in (
        "images",
        "steady, images/s",
        "first image, s",
        "whole, images/s",
        "whole, s",
        "CPU, ms/image",
        "differs by",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for key, one in result["contestants"].items():
        rounds, off = one["rounds"], result["agreement"].get(key)
        table.add_row(
            one["title"],
            f"{rounds[0]['images']:,}" if rounds[0]["images"] else "",
            *(format_spread([each[name] for each in rounds]) for name in ("steady", "first", "whole", "wall_s", "cpu")),
            "" if off is None else f"{off:.4f}",
        )
    console.print(table)
    console.print(
        "steady: without start-up and the first images; first image: from the start of the process to the first batch\n"
        "of predictions, for ray.init() its own seconds; whole: from the start of the process to its end;\n"
        "differs by: largest difference from Keras in a probability"
    )
    for bar in result["bars"]:
        ours = CONTESTANTS[bar["contestant"]].title
        theirs = CONTESTANTS[bar["rival"]].title + (" (the best)" if len(bar["among"]) > 1 else "")
        spread = f"{min(bar['ratios']):.2f} to {max(bar['ratios']):.2f}"
        title = f"{bar['what']}: {ours} / {theirs} ({spread})"
        console.print(format_bar(title, bar["ratio"], bar["bar"], at_most=bar["at_most"]))
    show_cpu(console, result)
    show_start_up(console, result)
    console.print(f"the machine's load was {result['load_before']:.1f} before and {result['load_after']:.1f} after")


def measure_table(arguments: argparse.Namespace, workspace: Workspace, console: Any) -> dict[str, Any]:
    """Measure the rounds of the table, then one round with many images for the whole command."""
    whole = argparse.Namespace(**{**vars(arguments), "images": WHOLE_IMAGES, "rounds": 1})
    result = {}
    for name, chosen in (("rounds", arguments), ("whole", whole)):
        result[name] = measure_speed(chosen, workspace)
        show_speed(console, result[name], chosen)
    return result


def show_table(console: Any, result: dict[str, Any], precisions: Sequence[str]) -> None:
    """Print the table of docs/scoring.md, in Markdown."""
    short, whole = result["rounds"], result["whole"]
    titles = {
        "ours": "`ray-cxr score`",
        "bound": "our decoder and runtime without Ray",
        "inline": "the same, decoding without child processes",
    }

    def list_values(part: dict[str, Any], key: str, what: str) -> str:
        return format_spread([each[what] for each in part["contestants"][key]["rounds"]])

    def format_ratio(part: dict[str, Any], precision: str, what: str) -> str:
        (bar,) = (one for one in part["bars"] if (one["contestant"], one["what"]) == (f"ours-{precision}", what))
        interval = "" if bar["interval"] is None else " ({:.2f} to {:.2f})".format(*bar["interval"])
        return f"{bar['ratio']:.2f}{interval}"

    rows = []
    for part, what, unit in (
        (short, "cpu", "ms of CPU per image"),
        (short, "steady", "images/s after the first"),
        (short, "first", "seconds until the first"),
        (whole, "whole", f"images/s, whole command with {WHOLE_IMAGES:,} images"),
    ):
        for kind, title in titles.items():
            rows.append((unit, title, [list_values(part, f"{kind}-{one}", what) for one in precisions]))
            unit = ""
        if what != "first":
            best = "lower" if what == "cpu" else "higher"
            rows.append(("", f"`score` / the {best} of these", [format_ratio(part, one, what) for one in precisions]))
    console.print(f"| | | {' | '.join(precisions)} |")
    console.print("|---" * (2 + len(precisions)) + "|")
    for unit, title, cells in rows:
        console.print(f"| {unit} | {title} | {' | '.join(cells)} |")


def show_cpu(console: Any, result: dict[str, Any]) -> None:
    """Print each contestant's processor time by process, medians of the rounds."""
    for one in result["contestants"].values():
        parts = [(name, ms) for each in one["rounds"] for name, ms in each["cpu_by_part"].items()]
        values: dict[str, list[float]] = {}
        for name, ms in parts:
            values.setdefault(name, []).append(ms)
        medians = sorted(((statistics.median(found), name) for name, found in values.items()), reverse=True)
        if text := ", ".join(f"{name} {ms:.2f}" for ms, name in medians if ms >= 0.05):
            console.print(f"CPU of {one['title']}, ms per image: {text}")


def show_start_up(console: Any, result: dict[str, Any]) -> None:
    """Print the stages of each contestant's start-up, medians of the rounds."""
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


def measure_full(arguments: argparse.Namespace, workspace: Workspace) -> dict[str, Any]:
    """Score as many rows as the archive has; kill the command after a third, continue, and count the rows.

    Raises:
        BenchmarkError: a row is missing, doubled or failed, or the command failed.
    """
    folder = workspace.folder / "full"
    folder.mkdir(exist_ok=True)
    names, table = _select_rows(workspace, folder, arguments.rows)
    images, manifest, out = folder / f"images-{len(names)}", folder / "m.parquet", folder / "scores"
    log(f"{len(names):,} names for {len(workspace.sources)} radiographs")
    workspace.links(images, names)
    result: dict[str, Any] = {"rows": len(names), "load_before": os.getloadavg()}
    command = ["manifest", str(table), "--images", str(images), "--out", str(manifest)]
    started = time.monotonic()
    run_command(command, workspace.logs / "full.log")
    result["manifest_s"] = time.monotonic() - started
    precision = arguments.precision[0]
    remove_scores(out)
    command = ["score", "--model", str(workspace.bundle(precision)), "--manifest", str(manifest), "--out", str(out)]
    command += ["--precision", precision, *arguments.settings]
    log("ray-cxr " + " ".join(command))
    monitor = ScoreMonitor(command, out, len(names))
    result["runs"] = [
        monitor.run(workspace.logs / "full-1.log", kill_at=len(names) / 3),
        monitor.run(workspace.logs / "full-2.log"),
    ]
    result["record"] = read_scores(out, 0.0)["record"]
    result["memory"] = {"peak_bytes": monitor.memory.peak, "at_the_peak": monitor.memory.parts}
    result["parts_text"] = monitor.memory.describe_parts()
    result["load_after"] = os.getloadavg()
    result["checks"] = check_scores(out, names)
    return result


def _select_rows(workspace: Workspace, folder: Path, count: int | None) -> tuple[list[str], Path]:
    """Return the image names of the archive's first rows, and the table that lists only these."""
    opened = gzip.open if workspace.table.suffix == ".gz" else open
    with opened(workspace.table, "rt", encoding="utf-8-sig", newline="") as stream:
        header, *rows = list(csv.reader(stream))
    kept = rows[:count]
    names = [row[header.index("Image Index")] for row in kept]
    if len(kept) == len(rows):
        return names, workspace.table
    with open(folder / "table.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *kept])
    return names, folder / "table.csv"


class ScoreMonitor:
    """Run `score` while sampling its memory and the rows that it has written.

    Args:
        command: of `ray-cxr`.
        out: the scores' folder.
        rows: number of rows in all.
    """

    def __init__(self, command: Sequence[str], out: Path, rows: int) -> None:
        self._command, self._out, self._rows = command, out, rows
        self._files: dict[Path, int] = {}
        self.memory = MemorySampler()

    def run(self, path: Path, *, kill_at: float | None = None) -> dict[str, Any]:
        """Run the command once; kill it when `kill_at` rows are written."""
        before = self._count_rows()
        tenth = before * 10 // self._rows
        with Process([sys.executable, "-m", "ray_cxr.cli", *self._command], path) as process:
            while process.process.poll() is None:
                self.memory.sample(process)
                done, seconds = self._count_rows(), time.monotonic() - process.started
                if done * 10 // self._rows > tenth:
                    tenth = done * 10 // self._rows
                    log(f"{done:,} of {self._rows:,} rows written, {seconds:.0f} s")
                if kill_at is not None and done >= kill_at:
                    log(f"SIGKILL to the command's process group after {seconds:.0f} s, {done:,} rows written")
                    return self._kill(process) | {"killed_after_s": seconds} | self._describe(process, before)
                if seconds > FULL_S:
                    raise BenchmarkError(f"score: not finished after {FULL_S / 3600:.0f} hours")
                time.sleep(SAMPLE_S)
            wall = time.monotonic() - process.started
            if process.process.returncode:
                raise BenchmarkError(f"score: {process.describe_end()}")
            if kill_at is not None:
                raise BenchmarkError("score: ended before it could be killed; increase --rows")
            return {"wall_s": wall} | self._describe(process, before)

    def _kill(self, process: Process) -> dict[str, Any]:
        process.kill()
        killed = time.monotonic()
        while (left := process.list_pids()) and time.monotonic() - killed < ORPHANS_S:
            time.sleep(0.1)
        return {"others_gone_after_s": None if left else time.monotonic() - killed, "left_over": len(left)}

    def _count_rows(self) -> int:
        """Return the rows of the finished files."""
        import pyarrow.parquet as pq

        for path in (self._out / "scores").glob("part-*.parquet"):
            if path not in self._files:
                self._files[path] = pq.ParquetFile(path).metadata.num_rows
        return sum(self._files.values())

    def _describe(self, process: Process, before: int) -> dict[str, Any]:
        """Return the rows so far, and the steady rate of the files that this run wrote."""
        written = self._count_rows()
        marks, done = [], 0
        for at, rows in sorted((path.stat().st_mtime, rows) for path, rows in self._files.items()):
            if at >= process.started_at:
                done += rows
                marks.append((at - process.started_at, done))
        first = marks[0][0] if marks else None
        return {"written": written, "written_before": before, "first_file_s": first, "steady": steady(marks)}


def check_scores(out: Path, names: Sequence[str]) -> dict[str, Any]:
    """Check that every name has exactly one row, without an error.

    Raises:
        BenchmarkError: it does not.
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
        f"first run: first file after {first['first_file_s']:.0f} s, {format_number(first['steady'])} images/s steady; "
        f"SIGKILL after {first['killed_after_s']:.0f} s with {first['written']:,} rows written; "
        + (f"{first['left_over']} processes remained" if gone is None else f"Ray's processes ended {gone:.1f} s later")
    )
    console.print(
        f"second run: {second['wall_s']:.0f} s, first file after {format_number(second['first_file_s'])} s, "
        f"{format_number(second['steady'])} images/s steady; {second['written_before']:,} rows existed"
    )
    seconds = first["killed_after_s"] + second["wall_s"]
    console.print(f"both: {seconds:.0f} s, {result['rows'] / seconds:.1f} images/s, start-ups and kill included")
    console.print(f"rows: {result['checks']}")
    memory = result["memory"]
    console.print(
        f"peak memory of all processes together: {memory['peak_bytes'] / 2**30:.2f} GiB; MiB: {result['parts_text']}"
    )
    console.print(f"load before {result['load_before'][0]:.1f}, after {result['load_after'][0]:.1f}")


# ---------------------------------------------------------------- the driver's memory


def measure_memory(arguments: argparse.Namespace, workspace: Workspace) -> dict[str, Any]:
    """Measure the peak memory of `score --dry-run`, which reads the whole manifest, by rows; two rounds."""
    bundle = workspace.bundle("fp32")
    runs = []
    for rows in arguments.memory_rows * 2:
        manifest = workspace.folder / f"plan-{rows}.parquet"
        if not manifest.exists():  # all rows name one file, because a plan opens none
            names = [f"{i // 10:08d}_{i % 10:03d}.png" for i in range(rows)]
            write_manifest(manifest, names, [str(workspace.sources[0])] * rows)
        options = ["--model", str(bundle), "--manifest", str(manifest), "--out", str(workspace.folder / "plan")]
        answer = ask_child(
            __file__, {"kind": "plan", "arguments": [*options, *arguments.settings]}, workspace.logs / "plan.log"
        )
        runs.append({"rows": rows, "peak_bytes": answer["peak_bytes"], "plan_s": answer["stages"]["plan"]})
        log(f"{rows:,} rows: {answer['peak_bytes'] / 2**20:.0f} MiB")
    peaks = compute_medians((run["rows"], run["peak_bytes"]) for run in runs)
    pairs = list(zip(arguments.memory_rows, arguments.memory_rows[1:], strict=False))
    steps = {f"{few}-{many}": (peaks[many] - peaks[few]) / (many - few) for few, many in pairs}
    return {"runs": runs, "peak_bytes": peaks, "bytes_per_row": steps}


def show_memory(console: Any, result: dict[str, Any]) -> None:
    seconds = compute_medians((run["rows"], run["plan_s"]) for run in result["runs"])
    for rows, peak in result["peak_bytes"].items():
        console.print(f"{rows:,} rows: peak {peak / 2**20:.0f} MiB, planned in {seconds[rows]:.1f} s")
    for step, size in result["bytes_per_row"].items():
        few, many = step.split("-")
        console.print(f"from {int(few):,} to {int(many):,} rows: {size:.0f} bytes a row")


# ---------------------------------------------------------------- the script


def has_torch(python: str) -> bool:
    """Return whether an interpreter has PyTorch and Pillow."""
    find = "import importlib.util as u, sys; sys.exit(not (u.find_spec('torch') and u.find_spec('PIL')))"
    try:
        return subprocess.run([python, "-c", find], stdin=subprocess.DEVNULL, check=False).returncode == 0
    except OSError:
        return False


def parse() -> argparse.Namespace:
    parser = create_parser(__doc__)
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for bundles, links and scores; kept")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="real radiographs (../shared)")
    parser.add_argument("--backbone", default="DenseNet121", help="TinyCNN for a quick try (DenseNet121)")
    parser.add_argument("--size", default=224, help="of the model's input, pixels (224)", **POSITIVE)
    parser.add_argument("--images", help="to score in each round (2000; --table 1200, --profile 128)", **POSITIVE)
    parser.add_argument("--rival-images", default=512, help="for Keras and PyTorch, which are slow (512)", **POSITIVE)
    parser.add_argument("--rounds", help="runs of each contestant (3; --table 10)", **POSITIVE)
    parser.add_argument(
        "--precision", default="bf16,int8", help="of ours and the bound; --full takes the first (bf16,int8)"
    )
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="contestants, in place of those of --precision")
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="interpreter with PyTorch and Pillow")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value", help="for score")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--table", action="store_true", help="ours and the bound, as in docs/scoring.md")
    modes.add_argument("--profile", action="store_true", help="only ours, the bound and ray.init(): the start-up")
    modes.add_argument("--full", action="store_true", help="all rows of the archive, with a kill")
    modes.add_argument("--memory", action="store_true", help="the driver's memory by rows of the manifest")
    parser.add_argument("--rows", default=None, help="--full: only the table's first N rows", **POSITIVE)
    parser.add_argument(
        "--memory-rows", nargs="+", default=list(MEMORY_ROWS), help="--memory: rows of the manifests", **POSITIVE
    )
    arguments = parser.parse_args()
    if arguments.child:
        return arguments
    if sys.platform != "linux":
        parser.error("runs on Linux only: it finds processes and their memory in /proc")
    if arguments.work is None:
        parser.error("the following arguments are required: --work")
    arguments.precision = list(dict.fromkeys(arguments.precision.split(",")))
    if unknown := set(arguments.precision) - {"fp32", "bf16", "int8"}:
        parser.error(f"--precision {','.join(sorted(unknown))}: give fp32, bf16 or int8, or several with commas")
    images, rounds, kinds = 2000, 3, ("ours", "bound", "keras", "torch", "ray")
    if arguments.profile:
        images, kinds = 128, ("ours", "bound", "ray")
    if arguments.table:
        images, rounds, kinds = TABLE_IMAGES, TABLE_ROUNDS, ("ours", "bound")
        if arguments.only is not None or "fp32" in arguments.precision:
            parser.error("--table has fixed contestants in bf16 and int8: remove --only, and fp32 from --precision")
    arguments.images, arguments.rounds = arguments.images or images, arguments.rounds or rounds
    if arguments.only is None:
        arguments.only = [
            key
            for key, one in CONTESTANTS.items()
            if one.kind in kinds
            and not (arguments.table and one.prepared)
            and (one.kind not in ("ours", "bound") or one.precision in arguments.precision)
        ]
    arguments.memory_rows = sorted(set(arguments.memory_rows))
    arguments.settings = [word for text in arguments.overrides for word in ("--set", text)]
    return arguments


def measure(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    console = create_console()
    workspace = Workspace(arguments.work, arguments.shared, arguments.backbone, arguments.size)
    result["images"] = f"{len(workspace.sources)} {'radiographs of NIH' if workspace.real else 'phantoms'}"
    if arguments.full:
        result["full"] = measure_full(arguments, workspace)
        show_full(console, result["full"])
    elif arguments.memory:
        result["memory"] = measure_memory(arguments, workspace)
        show_memory(console, result["memory"])
    elif arguments.table:
        result["table"] = measure_table(arguments, workspace, console)
        show_table(console, result["table"], arguments.precision)
    else:
        drop_torch(arguments, console)
        result["speed"] = measure_speed(arguments, workspace)
        show_speed(console, result["speed"], arguments)


def drop_torch(arguments: argparse.Namespace, console: Any) -> None:
    """Leave PyTorch out where it cannot run, and print why."""
    torch = [key for key in arguments.only if CONTESTANTS[key].kind == "torch"]
    reason = ""
    if torch and arguments.backbone != "DenseNet121":
        reason = f"this script has no {arguments.backbone} for PyTorch"
    elif torch and not has_torch(arguments.torch):
        reason = f"{arguments.torch} has no PyTorch and Pillow; --torch names another Python"
    if reason:
        console.print(f"(b) is left out: {reason}")
        arguments.only = [key for key in arguments.only if key not in torch]


if __name__ == "__main__":
    sys.exit(run_script(parse, measure, _CHILDREN))
