"""Measure a Keras model on one GPU by precision and batch size, with and without decoding, in under 5 minutes.

    .venv/bin/python benchmarks/gpu.py --out gpu.json     all precisions and batch sizes
    .venv/bin/python benchmarks/gpu.py --jit              the same, compiled with XLA (score.jit_compile)
    .venv/bin/python benchmarks/gpu.py --cpu              a tiny model on a CPU, to try this script

The model is DenseNet121 at 224 pixels with random weights, which do not change its speed. It runs as in `score --gpu`,
but without Ray and without files of scores; `ray-cxr benchmark BUNDLE --gpu` includes the files.

    alone       on images in memory
    decoding    on synthetic PNGs of 1024 x 1024 pixels, which one decoder process per CPU reads, decodes and resizes
    GPU waits   share of the time in which the GPU had no batch
    start       seconds to trace and compile the model, with its first batch

After `LIMIT_S` no further batch size is measured; the last line lists those left out.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from harness import create_console, create_parser, run_script

#: Seconds after which no measurement starts.
LIMIT_S = 240.0


class Scale(NamedTuple):
    """What is measured: model, batch sizes, sides of images, and seconds per measurement."""

    backbone: str
    size: int
    precisions: tuple[str, ...]
    batches: tuple[int, ...]
    patients: int
    side: int
    decoders: int
    seconds: float


def choose_scale(is_tiny: bool) -> Scale:
    if is_tiny:
        return Scale("TinyCNN", 64, ("fp32",), (2, 4), 2, 96, 1, 0.1)
    return Scale("DenseNet121", 224, ("fp32", "bf16"), (8, 32, 64, 128), 24, 1024, os.cpu_count() or 1, 3.0)


class Decoding:
    """Synthetic radiographs in a folder, and decoders for them."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        import numpy as np
        import pyarrow as pa

        from ray_cxr.config import InputSpec, ScoreSettings
        from ray_cxr.imaging.phantoms import write_phantoms
        from ray_cxr.scoring.ranges import ScoreJob
        from ray_cxr.scoring.reader import ImageReader

        drawn = write_phantoms(folder, patients=scale.patients, size=scale.side, broken=False)
        self._paths = pa.table({"path": [str(path) for path in sorted(drawn.images.glob("*.png"))]})
        job = ScoreJob("", "", "", "", ScoreSettings(), InputSpec(size=scale.size), True, max(scale.batches), None, "")
        self._reader = ImageReader(job, scale.decoders)
        self.images = np.stack(list(self.read(len(self._paths))))
        self.rate = self._measure(2 * len(self._paths))  # short on many CPUs, and so too low
        self.rate = self._measure(max(len(self._paths), round(scale.seconds * self.rate)))

    def _measure(self, count: int) -> float:
        """Decode this number of images; return images per second."""
        started = time.monotonic()
        for _ in self.read(count):
            pass
        return count / (time.monotonic() - started)

    def read(self, count: int) -> Iterator[Any]:
        """Yield this number of images uint8 [S,S], which repeat."""
        import numpy as np
        import pyarrow as pa

        from ray_cxr.scoring.ranges import RangeState

        rows = self._paths.take(pa.array(np.arange(count) % len(self._paths)))
        for _, outcome in self._reader.iter_images([RangeState(0, rows)]):
            yield outcome.images[0]


def run_model(opened: Any, images: Iterable[Any]) -> dict[str, float]:
    """Run the model on images uint8 [S,S]; return its rate, and the share of the time that it waited for them."""
    import numpy as np

    opened.usage.reset()
    futures: list[Future[Any]] = []
    started, iterator, count = time.monotonic(), iter(images), 0
    while batch := list(itertools.islice(iterator, opened.batch_shape[0])):
        futures.append(opened.submit(np.stack(batch)))
        count += len(batch)
    for future in futures:
        future.result()
    seconds = time.monotonic() - started
    return {"images_per_second": count / seconds, "wait": opened.usage.take().shares()["model_waited_for_images"]}


def repeat_for(images: Any, seconds: float) -> Iterator[Any]:
    """Yield images again and again for some seconds."""
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, itertools.cycle(images))


def build_model(scale: Scale, policy: str) -> Any:
    from ray_cxr.config import TrainSettings
    from ray_cxr.models import classifier
    from ray_cxr.models.architecture import Architecture
    from ray_cxr.models.keras_setup import keras

    keras.config.set_dtype_policy(policy)
    return classifier.build(Architecture.of(TrainSettings(backbone=scale.backbone), scale.size))  # type: ignore[arg-type]


def measure_batch(model: Any, batch: int, decoding: Decoding, scale: Scale, *, jit: bool) -> dict[str, Any]:
    from ray_cxr.models.runtime import KerasRuntime

    started = time.monotonic()
    with contextlib.closing(KerasRuntime(model, batch, jit_compile=jit)) as opened:
        opened.predict(decoding.images[:1])
        start_s = time.monotonic() - started
        alone = run_model(opened, repeat_for(decoding.images, scale.seconds))
        count = round(scale.seconds * min(decoding.rate, alone["images_per_second"]))
        with_decoding = run_model(opened, decoding.read(max(count, 4 * batch)))
    return {"batch": batch, "start_s": start_s, "alone": alone, "decoding": with_decoding}


def measure(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    from ray_cxr.errors import RayCxrError
    from ray_cxr.models import runtime

    started, scale = time.monotonic(), choose_scale(arguments.cpu)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    result["gpu"] = found = {**scale._asdict(), "jit_compile": arguments.jit, "rows": rows, "skipped": skipped}
    with tempfile.TemporaryDirectory(prefix="ray_cxr-gpu-") as folder:
        decoding = Decoding(Path(folder) / "phantoms", scale)
        for precision in scale.precisions:
            policy = "float32" if arguments.cpu else runtime.prepare_gpu(precision)
            found["device"] = "CPU" if arguments.cpu else runtime.describe_gpu().name
            if precision == "bf16" and policy == "float32":
                skipped.append("bf16 (this GPU has no bfloat16)")
                continue
            model = build_model(scale, policy)
            for batch in scale.batches:
                if time.monotonic() - started > LIMIT_S:
                    skipped.append(f"{precision} in batches of {batch} (no time was left)")
                    continue
                try:
                    row = measure_batch(model, batch, decoding, scale, jit=arguments.jit)
                except RayCxrError as error:  # out of memory, for example
                    skipped.append(f"{precision} in batches of {batch} ({error})")
                    continue
                rows.append({"precision": precision, **row})
    found["decode_images_per_second"] = decoding.rate
    show(result)


def show(result: dict[str, Any]) -> None:
    from rich.table import Table

    console, found = create_console(), result["gpu"]
    xla = "with XLA" if found["jit_compile"] else "without XLA"
    console.print(
        f"{found['device']}, {result['machine']['cpu']}, {found['decoders']} decoders: {found['backbone']} at "
        f"{found['size']} pixels {xla}; the decoders alone reach {found['decode_images_per_second']:,.0f} images/s"
    )
    names = ("precision", "batch", "alone: images/s", "GPU waits", "decoding: images/s", "GPU waits", "start, s")
    table = Table(*names)
    for row in found["rows"]:
        cells = [
            text
            for part in (row["alone"], row["decoding"])
            for text in (f"{part['images_per_second']:,.0f}", f"{part['wait']:.0%}")
        ]
        table.add_row(row["precision"], str(row["batch"]), *cells, f"{row['start_s']:.0f}")
    console.print(table)
    if found["skipped"]:
        console.print(f"not measured: {', '.join(found['skipped'])}")


def parse() -> argparse.Namespace:
    parser = create_parser(__doc__)
    parser.add_argument("--jit", action="store_true", help="compile the model with XLA")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on a CPU, to try this script")
    arguments = parser.parse_args()
    from ray_cxr.progress import silence_stderr

    with silence_stderr():  # TensorFlow prints
        from ray_cxr.models.keras_setup import tf

        has_gpu = bool(tf.config.list_physical_devices("GPU"))
    if not (has_gpu or arguments.cpu):
        print("gpu.py: TensorFlow sees no GPU; install requirements-gpu.lock, or try --cpu", file=sys.stderr)
        sys.exit(2)
    return arguments


if __name__ == "__main__":
    sys.exit(run_script(parse, measure))
