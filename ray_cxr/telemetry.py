"""Prometheus metrics of a run: their definitions, and functions that record them.

    workers: add, set_gauge  --about once a second-->  ray.util.metrics  --every 10 s-->  each node's metrics port

The names are those at the port, where Ray adds the prefix `ray_`. Without Ray in the process, nothing is recorded.
Tags have few values and identify no person: no image, patient or study id is a tag.

Times are counters, not histograms. Ray 2.60 rebuilds a histogram at the node from the middles of its buckets, so its
sum is an estimate (0.605 for an observed 0.52). The sum of a counter is exact, and it is one series instead of ten.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

#: The prefix that Ray adds to every name.
PREFIX = "ray_"
#: Seconds for which counts are collected before Ray gets them; Ray exports them every 10 seconds.
GATHER_S = 1.0


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric; `add` and `set_gauge` take the values of its tags in the order of `tags`.

    A counter only grows; a gauge holds the last value of a running process.
    """

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    meaning: str
    tags: tuple[str, ...] = ()


def _counter(name: str, unit: str, meaning: str, *tags: str) -> Metric:
    return Metric(f"ray_cxr_{name}_total", "counter", unit, meaning, tags)


def _gauge(name: str, unit: str, meaning: str) -> Metric:
    return Metric(f"ray_cxr_{name}", "gauge", unit, meaning, ("run",))


IMAGES_PREPARED = _counter("images_prepared", "images", "Images that prepare has read, including failures.")
IMAGES_SCORED = _counter("images_scored", "images", "Rows that score has written, including failures.")
IMAGES_DRAWN = _counter("images_drawn", "images", "Images whose heat maps are written, including failures.")
IMAGE_ERRORS = _counter(
    "image_errors", "images", "Failed images of the three counters above, by code.", "command", "code"
)
IMAGES_DECODED = _counter("images_decoded", "files", "Files sent to a decoder, successful or not.", "command")
DECODE_SECONDS = _counter("decode_seconds", "seconds", "Time to read, decode and resize, over all decoders.", "command")
INSTANCES_FETCHED = _counter(
    "pacs_instances", "instances", "Instances fetched from a PACS, or not after all attempts.", "command"
)
PACS_BYTES = _counter("pacs_bytes", "bytes", "Size of the instances fetched from a PACS.", "command")
PACS_SECONDS = _counter("pacs_seconds", "seconds", "Time of fetches, over all threads, with their waits.", "command")
BATCHES_INFERRED = _counter("batches_inferred", "batches", "Batches that the model completed.", "command")
INFER_SECONDS = _counter("infer_seconds", "seconds", "Time of batches in the model; batches overlap.", "command")
IMAGES_TRAINED = _counter("images_trained", "images", "Images trained on, by all workers of the run.", "run")
TRAIN_STEPS = _counter("train_steps", "steps", "Completed training steps.", "run")
TRAIN_STEP_SECONDS = _counter("train_step_seconds", "seconds", "Time of training steps, without validation.", "run")
TRAIN_WAIT_SECONDS = _counter("train_wait_seconds", "seconds", "Time that the slowest worker waited for images.", "run")
TRAIN_EPOCH = _gauge("train_epoch", "epochs", "Completed epochs.")
TRAIN_LOSS = _gauge("train_loss", "nats", "Mean training loss of the last epoch.")
VAL_LOSS = _gauge("val_loss", "nats", "Validation cross-entropy after the last epoch.")
VAL_AUROC = _gauge("val_auroc", "AUROC", "Macro validation AUROC after the last epoch.")

#: All metrics.
METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))

_lock = threading.Lock()
_counts: dict[tuple[Metric, tuple[str, ...]], float] = {}
_flushed_at = 0.0
#: Ray's metric objects of this process.
_instruments: dict[Metric, Any] = {}


def add(metric: Metric, amount: float, *tags: str) -> None:
    """Add to a counter, from any thread, in under 2 microseconds; `flush`, or an `add` after 1 s, sends it to Ray."""
    with _lock:
        key = metric, tags
        _counts[key] = _counts.get(key, 0.0) + amount
        due = time.monotonic() - _flushed_at >= GATHER_S
    if due:
        flush()


def set_gauge(metric: Metric, value: float | None, *tags: str) -> None:
    """Set a gauge; None leaves it unchanged."""
    if value is not None and _is_ray_running():
        with _lock:
            _instrument(metric).set(float(value), dict(zip(metric.tags, tags, strict=True)))


def flush() -> None:
    """Send the counts to Ray. Call it at the end of a task, whose process may end before its next `add`."""
    global _flushed_at
    is_running = _is_ray_running()
    with _lock:
        _flushed_at = time.monotonic()
        for (metric, tags), amount in _counts.items():
            if is_running and amount > 0:  # Ray refuses to add nothing
                _instrument(metric).inc(amount, dict(zip(metric.tags, tags, strict=True)))
        _counts.clear()


def add_decode(command: str, seconds: float) -> None:
    """Count one decoded file and its time."""
    add(IMAGES_DECODED, 1, command)
    add(DECODE_SECONDS, seconds, command)


def add_fetch(command: str, size: int, seconds: float) -> None:
    """Count one instance of a PACS, its bytes, and the time until it arrived or failed for good."""
    add(INSTANCES_FETCHED, 1, command)
    add(PACS_BYTES, size, command)
    add(PACS_SECONDS, seconds, command)


def add_inference(command: str, seconds: float) -> None:
    """Count one inferred batch and its time."""
    add(BATCHES_INFERRED, 1, command)
    add(INFER_SECONDS, seconds, command)


def add_written(metric: Metric, command: str, images: int, errors: Iterable[str]) -> None:
    """Count the images of a written file, and the codes of those that failed; sends the counts to Ray at once."""
    add(metric, images)
    for code, n in Counter(errors).items():
        add(IMAGE_ERRORS, n, command, code)
    flush()


def _is_ray_running() -> bool:
    ray = sys.modules.get("ray")  # no import: a process without Ray has no port
    return ray is not None and bool(ray.is_initialized())


def _instrument(metric: Metric) -> Any:
    if metric not in _instruments:
        from ray.util import metrics

        kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
        _instruments[metric] = kind(metric.name.removeprefix(PREFIX), metric.meaning, metric.tags)
    return _instruments[metric]
