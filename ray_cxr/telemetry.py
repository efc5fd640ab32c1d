"""What a run tells Prometheus while it works: every metric that there is, and the two ways to record one.

    workers: count, show  --about once a second-->  ray.util.metrics  --every 10 s-->  each node's metrics port

Names are those that stand at the port: Ray puts `ray_` before each, and `cxr_...` is what it is given. Where no Ray
runs in the process nothing is recorded, and nothing is said. A tag's values are few and say nothing of a person: no
image's, patient's or study's id is one.

Seconds are counters and not histograms. Ray 2.60 rebuilds a histogram at the node from the middles of its buckets, so
that its sum is a guess (0.605 where 0.52 was observed); a counter's sum is exact, and costs a series instead of ten.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

#: What Ray puts before the name of every metric.
PREFIX = "ray_"
#: Seconds for which counts are gathered in the process before Ray gets them; Ray hands them on every 10 seconds.
GATHER_S = 1.0


@dataclass(frozen=True, eq=False)
class Metric:
    """One metric.

    Attributes:
        name: at the metrics port.
        kind: a counter only grows, a gauge is the last value of a process that lives.
        unit: what is counted or measured.
        meaning: in one sentence.
        tags: names of its tags, in the order in which `count` and `show` take their values.
    """

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    meaning: str
    tags: tuple[str, ...] = ()


IMAGES_PREPARED = Metric(
    "ray_cxr_images_prepared_total", "counter", "images", "Images that prepare has read, failed ones included."
)
IMAGES_SCORED = Metric(
    "ray_cxr_images_scored_total", "counter", "images", "Rows that score has written, failed ones included."
)
IMAGES_DRAWN = Metric(
    "ray_cxr_images_drawn_total", "counter", "images", "Images whose heat maps score has written, failed ones included."
)
IMAGE_ERRORS = Metric(
    "ray_cxr_image_errors_total", "counter", "images", "Of these, images that failed, by code.", ("command", "code")
)
IMAGES_DECODED = Metric(
    "ray_cxr_images_decoded_total", "counter", "files", "Files given to a decoder, good or bad.", ("command",)
)
DECODE_SECONDS = Metric(
    "ray_cxr_decode_seconds_total",
    "counter",
    "seconds",
    "Time of decoders on files: reading, decoding and resizing, summed over decoders.",
    ("command",),
)
BATCHES_INFERRED = Metric(
    "ray_cxr_batches_inferred_total", "counter", "batches", "Batches that came back from the network.", ("command",)
)
INFER_SECONDS = Metric(
    "ray_cxr_infer_seconds_total",
    "counter",
    "seconds",
    "Time of batches from being handed to the network until done, summed over batches, which overlap.",
    ("command",),
)
IMAGES_TRAINED = Metric(
    "ray_cxr_images_trained_total", "counter", "images", "Images trained on, by all workers of the run.", ("run",)
)
TRAIN_STEPS = Metric("ray_cxr_train_steps_total", "counter", "steps", "Training steps done.", ("run",))
TRAIN_STEP_SECONDS = Metric(
    "ray_cxr_train_step_seconds_total",
    "counter",
    "seconds",
    "Time of training steps, waiting for images and checkpoints within an epoch included, validation not.",
    ("run",),
)
TRAIN_WAIT_SECONDS = Metric(
    "ray_cxr_train_wait_seconds_total",
    "counter",
    "seconds",
    "Of these, the seconds that the slowest worker waited for images, added at the end of an epoch.",
    ("run",),
)
TRAIN_EPOCH = Metric("ray_cxr_train_epoch", "gauge", "epochs", "Epochs done.", ("run",))
TRAIN_LOSS = Metric("ray_cxr_train_loss", "gauge", "nats", "Mean training loss of the last epoch.", ("run",))
VAL_LOSS = Metric("ray_cxr_val_loss", "gauge", "nats", "Validation cross-entropy after the last epoch.", ("run",))
VAL_AUROC = Metric("ray_cxr_val_auroc", "gauge", "AUROC", "Macro validation AUROC after the last epoch.", ("run",))

#: All of them.
METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))

_lock = threading.Lock()
_gathered: dict[tuple[Metric, tuple[str, ...]], float] = {}
_handed_on = 0.0
#: Ray's own objects, made in the process that uses them, each once.
_instruments: dict[Metric, Any] = {}


def count(metric: Metric, amount: float, *tags: str) -> None:
    """Add to a counter; from any thread, at less than two microseconds. `flush` hands it on, or a `count` 1 s later."""
    with _lock:
        key = metric, tags
        _gathered[key] = _gathered.get(key, 0.0) + amount
        due = time.monotonic() - _handed_on >= GATHER_S
    if due:
        flush()


def show(metric: Metric, value: float | None, *tags: str) -> None:
    """Set a gauge; what is undefined leaves it as it is."""
    if value is not None and _ray_runs():
        with _lock:
            _instrument(metric).set(float(value), dict(zip(metric.tags, tags, strict=True)))


def flush() -> None:
    """Hand on what was counted; at the end of a task, whose process may be gone before it counts again."""
    global _handed_on
    runs = _ray_runs()
    with _lock:
        _handed_on = time.monotonic()
        for (metric, tags), amount in _gathered.items():
            if runs and amount > 0:  # Ray refuses to add nothing
                _instrument(metric).inc(amount, dict(zip(metric.tags, tags, strict=True)))
        _gathered.clear()


def decoded(command: str, seconds: float) -> None:
    """One file that a decoder took so long for."""
    count(IMAGES_DECODED, 1, command)
    count(DECODE_SECONDS, seconds, command)


def inferred(command: str, seconds: float) -> None:
    """One batch that the network took so long for."""
    count(BATCHES_INFERRED, 1, command)
    count(INFER_SECONDS, seconds, command)


def wrote(metric: Metric, command: str, images: int, errors: Iterable[str]) -> None:
    """A file of so many images, of which those with these codes failed; handed on at once."""
    count(metric, images)
    for code, n in Counter(errors).items():
        count(IMAGE_ERRORS, n, command, code)
    flush()


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")  # not imported for this: who has no Ray has no port either
    return ray is not None and bool(ray.is_initialized())


def _instrument(metric: Metric) -> Any:
    if metric not in _instruments:
        from ray.util import metrics

        kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
        _instruments[metric] = kind(metric.name.removeprefix(PREFIX), metric.meaning, metric.tags)
    return _instruments[metric]
