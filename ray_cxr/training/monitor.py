"""Show the progress of a training run: read the files that rank 0 writes, log each start and each epoch."""

from __future__ import annotations

import contextlib
import io
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from ray_cxr.errors import RayCxrError
from ray_cxr.progress import Progress, run_periodically
from ray_cxr.storage.run_folder import read_json
from ray_cxr.training.watchdog import explain_stalled, read_stalled
from ray_cxr.training.worker import LEAVING, LIVE, METRICS, STARTED

#: If the first step is not done this many seconds after the command started, a message says that Ray may be waiting.
WAITING_S = 240
_POLL_S = 0.5


class RunMonitor:
    """Report on a run in other processes. `started` is when the command started, seconds since 1970."""

    def __init__(
        self, out: Path, epochs: int, steps_per_epoch: int, started: float, on_event: Callable[[str], None]
    ) -> None:
        self._out, self._epochs, self._steps_per_epoch = out, epochs, steps_per_epoch
        self._started, self._on_event = started, on_event
        self._start: dict[str, Any] | None = None
        self._has_warned = self._leaving = False
        self._reported = len(read_metrics(out))  # epochs of an earlier run
        self._step, total = self._reported * steps_per_epoch, epochs * steps_per_epoch
        # No line at the end: each epoch has its own line, and after an early stop it would show an unfinished run.
        waiting = "starting the workers, loading TensorFlow"
        self._progress = Progress("train", total, done=self._step, unit="steps", waiting=waiting, last_line=False)

    @contextlib.contextmanager
    def report(self) -> Iterator[None]:
        """Report while the block runs; when it ends, report the finished epochs that were not reported yet."""
        with self._progress:
            try:
                with run_periodically(self._update, _POLL_S, "metrics"):
                    yield
            finally:
                self._report_epochs()
                self._advance(self._reported * self._steps_per_epoch)

    def _update(self) -> None:
        if (leaving := _read(self._out / LEAVING)) and not self._leaving:
            self._on_event(
                "train: WARNING: a machine of the run is going away; checkpoint written in epoch "
                f"{leaving['epoch'] + 1} after step {leaving['step']}"
            )
        self._leaving = bool(leaving)
        start = _read(self._out / STARTED)
        if start and start != self._start:
            self.report_start(start, is_restart=self._start is not None)
            self._start = start
        if not (self._start or self._has_warned) and time.time() - self._started > WAITING_S:
            self._has_warned = True
            self._on_event(f"train: no step after {WAITING_S} s; Ray may wait for CPUs or GPUs that other work holds")
        self._report_epochs()
        if live := _read(self._out / LIVE):
            step = (live["epoch"] - 1) * self._steps_per_epoch + live["step"]
            self._advance(step, f"epoch {live['epoch']}, loss {live['loss']:.4f}")

    def report_start(self, start: dict[str, Any], *, is_restart: bool) -> None:
        """Log what rank 0 wrote to started.json."""
        if is_restart:
            stalled, before, now = read_stalled(self._out), (self._start or start)["workers"], start["workers"]
            change = "Ray Train restarted all of them"
            if now != before:
                change = f"Ray Train restarted with {now} worker{'s' * (now > 1)} instead of {before}"
            if stalled:
                line = f"train: WARNING: {explain_stalled(stalled)}; {change}"
            elif now > before:
                line = f"train: WARNING: {change}"
            else:
                line = f"train: WARNING: a worker failed or was lost; {change}"
            self._on_event(line)
            (self._out / LEAVING).unlink(missing_ok=True)
        if start["epoch"] or start["step"]:
            self._on_event(f"train: continues in epoch {start['epoch'] + 1} after step {start['step']}")
        if start["random"]:
            self._on_event(
                "train: WARNING: these layers are missing in the weights file and start from random values: "
                f"{', '.join(start['random'])}"
            )
        if is_restart:
            return
        ends = [self._started, *start["times"].values()]
        seconds = [f"{end - start_at:.0f}" for start_at, end in itertools.pairwise(ends)]
        parts = ", ".join(map(" ".join, zip(start["times"], seconds, strict=True)))
        total = f"first step done after {ends[-1] - ends[0]:.0f} s"
        self._on_event(f"train: {total} ({parts}); precision {start['policy']}")

    def _report_epochs(self) -> None:
        points = read_metrics(self._out)
        for point in points[self._reported :]:
            auroc = "undefined" if point["val_auroc"] is None else f"{point['val_auroc']:.4f}"
            self._on_event(
                f"train: epoch {point['epoch']} of {self._epochs}: loss {point['loss']:.4f}, validation AUROC {auroc}, "
                f"{point['seconds']:.0f} s, {point['images_per_second']:.1f} images/s"
            )
        self._reported = max(self._reported, len(points))

    def _advance(self, step: int, note: str = "") -> None:
        # After a restart from a checkpoint the step is lower than before.
        self._progress.advance(step - self._step, note)
        self._step = step


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(RayCxrError):  # a bucket may answer the next time
        return read_json(path)
    return {}


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.csv, with None for missing values; no rows if the file cannot be read now."""
    try:
        frame = pd.read_csv(io.BytesIO((out / METRICS).read_bytes()))
    except (FileNotFoundError, RayCxrError, pd.errors.EmptyDataError):
        return []
    rows = frame.to_dict("records")
    return [{str(key): None if pd.isna(value) else value for key, value in row.items()} for row in rows]
