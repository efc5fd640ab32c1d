"""The workers of `score`: decode the images of ranges, run the model, write one file per range.

    paths, or members of an archive in its order
      -> threads, each with a decoder in a child process      uint8[S,S], in order, a bounded number ahead of the model
      -> batches -> the model, several batches in flight      float32[F] and features
      -> one Parquet file per range, when its last row has a result

An actor works on two ranges at once, with a GPU on four. The second range starts to decode when the first has nothing
left to read, so that neither the decoders nor the model are idle in between.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import queue
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ray_cxr import telemetry
from ray_cxr.data.features import FEATURES, read_part, to_matrix, write_features
from ray_cxr.errors import from_record
from ray_cxr.evaluation import quality
from ray_cxr.imaging.sandbox import DecodedImage, Failure
from ray_cxr.models import predictions
from ray_cxr.models.augmented import AugmentedRuntime
from ray_cxr.models.runtime import Outputs
from ray_cxr.scoring import ranges
from ray_cxr.scoring.pool import PoolActor
from ray_cxr.scoring.prepared_reader import PreparedReader
from ray_cxr.scoring.ranges import Outcomes, RangeState, RowLocation, ScoreJob, ScoreTask, TaskResult
from ray_cxr.scoring.reader import ImageReader
from ray_cxr.storage import atomic
from ray_cxr.storage.paths import find_instance_uid
from ray_cxr.tasks import SUCCESS, encode_error, sanitize_error

#: Fields of a DICOM header that fill gaps in the input, and those of them that a key hides.
_TAGS = ("patient_id", "study_id", "age", "sex", "view", *predictions.MARKS)
_HIDDEN = {"patient_id", "study_id", *predictions.MARKS}

#: Passes on the seconds that a batch took. It is a queue, because a future wakes its waiters before its callbacks run.
LatencyQueue = queue.SimpleQueue[float]


class _Batch(NamedTuple):
    members: list[RowLocation]
    images: np.ndarray
    outputs: Future[Outputs]
    latency: LatencyQueue


class ModelActor(PoolActor):
    """Scores images that other tasks decoded: on a GPU, or on CPUs with decode=apart.

    `first_at` is when the first batch was scored, seconds since 1970; 0 before that.
    """

    def open(self, job: ScoreJob, cpus: int) -> None:
        bundle = job.load_bundle()
        self.job, self.quality = job, bundle.quality
        self.rules = replace(bundle.rules, weights=job.settings.weights)
        options: dict[str, Any] = {"threads": cpus, "gpu": job.use_gpu, "jit_compile": job.settings.jit_compile}
        opened = bundle.open_runtime(job.precision, batch_size=job.batch_size, **options)
        copies = job.settings.tta
        self.runtime = AugmentedRuntime(opened, copies, bundle.input_spec) if copies > 1 else opened
        # A batch of no image has the number of features.
        empty = np.zeros((0, *opened.batch_shape[1:3]), np.uint8)
        self.feature_count = opened.predict(empty).features.shape[1] if job.features else 0
        self.first_at, self.usage = 0.0, opened.usage
        self.usage.reset()

    def run(self, row: dict[str, Any]) -> TaskResult:
        if row["error"]:
            raise from_record(json.loads(row["error"]))
        # Exactly the rows that were decoded, even if the file has changed since.
        states = ranges.load_ranges(self.job, ScoreTask.from_row(row), row["positions"])
        return self.score(states, _read_outcomes(row, self.job.spec.size) if states else ())

    def score(self, states: Sequence[RangeState], outcomes: Outcomes) -> TaskResult:
        """Score images, and write each range when its last row has a result."""
        files = list(ranges.fill_ranges(states, outcomes, ScoreWriter(self, states)))
        done, images = [index for index, _ in files], sum(rows for _, rows in files)
        return TaskResult(done, images, first_at=self.first_at, usage=self.usage.take())


class ScoreActor(ModelActor):
    """Decodes, or reads prepared images, and scores in one actor.

    This is fastest on CPUs, because no image passes through Ray's object store.
    """

    def open(self, job: ScoreJob, cpus: int) -> None:
        self._reader = ImageReader(job, cpus) if job.prepared is None else PreparedReader(job)
        super().open(job, cpus)

    def run(self, row: dict[str, Any]) -> TaskResult:
        states = ranges.load_ranges(self.job, ScoreTask.from_row(row))
        return self.score(states, self._reader.iter_images(states))


class ScoreWriter:
    """Runs batches of a task's images through the model and writes a file of scores per range."""

    def __init__(self, actor: ModelActor, states: Sequence[RangeState]) -> None:
        self._actor, self._states = actor, states
        findings, size = len(actor.rules.findings), actor.job.spec.size
        self._probabilities = {i: np.zeros((len(s.rows), findings), np.float32) for i, s in enumerate(states)}
        self._spreads: dict[int, np.ndarray] | None = None
        if actor.runtime.has_spread:
            self._spreads = {i: np.zeros_like(p) for i, p in self._probabilities.items()}
        # Float16 once the range is written; until then as the model computes them.
        width = actor.feature_count
        self._features = {i: np.zeros((len(s.rows), width), np.float32) for i, s in enumerate(states)}
        self._flags: dict[int, list[str | None]] = {i: [None] * len(s.rows) for i, s in enumerate(states)}
        self._images = np.empty((actor.job.batch_size, size, size), np.uint8)
        self._members: list[RowLocation] = []
        self._running: deque[_Batch] = deque()

    def add(self, location: RowLocation, image: DecodedImage) -> Iterator[RowLocation]:
        self._images[len(self._members)] = image.images[0]
        self._members.append(location)
        if len(self._members) == len(self._images):
            self._launch()
        while self._running and self._running[0].outputs.done():
            yield from self._settle()

    def finish(self) -> Iterator[RowLocation]:
        if self._members:
            self._launch()
        while self._running:
            yield from self._settle()

    def _launch(self) -> None:
        images, latency, start = self._images[: len(self._members)].copy(), LatencyQueue(), time.monotonic()
        future = self._actor.runtime.submit(images)
        future.add_done_callback(lambda _: latency.put(time.monotonic() - start))
        self._running.append(_Batch(self._members, images, future, latency))
        self._members = []

    def _settle(self) -> list[RowLocation]:
        """Store the results of the oldest batch."""
        batch = self._running.popleft()
        outputs = batch.outputs.result()
        telemetry.add_inference("score", batch.latency.get())
        self._actor.first_at = self._actor.first_at or time.time()
        flags: Sequence[str | None] = [None] * len(batch.members)
        if (model := self._actor.quality) is not None:
            flags = quality.judge_images(model, batch.images, outputs.features)
        for (range_position, row), probabilities, flag in zip(batch.members, outputs.probabilities, flags, strict=True):
            self._probabilities[range_position][row], self._flags[range_position][row] = probabilities, flag
        if self._actor.job.features:
            for (range_position, row), values in zip(batch.members, outputs.features, strict=True):
                self._features[range_position][row] = values
        if self._spreads is not None and outputs.spread is not None:
            for (range_position, row), spread in zip(batch.members, outputs.spread, strict=True):
                self._spreads[range_position][row] = spread
        return batch.members

    def flush(self, range_position: int) -> tuple[int, int]:
        """Write a range; return the number of the range and how many of its rows were scored now."""
        state, job = self._states[range_position], self._actor.job
        rows = _add_tags(state.rows, state.tags, job.key)
        probabilities, flags = self._probabilities.pop(range_position), self._flags.pop(range_position)
        spread = None if self._spreads is None else self._spreads.pop(range_position)
        rules = self._actor.rules
        result = predictions.assemble(rows, probabilities, state.failures, rules, flags, state.flags, spread)
        scored = len(result)
        if state.previous is not None and state.retried is not None:
            # Positions in the previous table with the new table below it.
            position = np.arange(len(state.previous))
            position[state.retried] = len(state.previous) + np.arange(scored)
            # Files of earlier versions lack some columns.
            both = pa.concat_tables([state.previous, result], promote_options="default")
            result = both.select(result.column_names).take(pa.array(position))
        job.check_run()
        features = self._features.pop(range_position)
        if job.features:
            _write_features(job, state, features)
        errors = len(result) - result["error_code"].null_count
        # Metadata lets the driver count errors without reading a column.
        result = result.replace_schema_metadata({ranges.RUN_KEY: job.run_digest, ranges.ERRORS_KEY: str(errors)})
        atomic.write_parquet(result, ranges.part_path(job.folder, state.index), compression="zstd")
        telemetry.add_written(telemetry.IMAGES_SCORED, "score", scored, (code for code, _ in state.failures.values()))
        return state.index, scored


def _write_features(job: ScoreJob, state: RangeState, values: np.ndarray) -> None:
    """Write the features of a range; a retry replaces those of the rows that were scored again."""
    path = ranges.part_path(job.folder, state.index, FEATURES)
    ids, bad = state.rows["image_id"], np.zeros(len(state.rows), bool)
    bad[list(state.failures)] = True
    if state.previous is not None and state.retried is not None:
        table = read_part(path)
        before, missing = to_matrix(table["features"])
        before, missing = before.astype(np.float32), missing.copy()
        before[state.retried], missing[state.retried] = values, bad
        ids, values, bad = table["image_id"], before, missing
    write_features(path, ids, values, bad, {ranges.RUN_KEY: job.run_digest})


def _add_tags(rows: pa.Table, tags: dict[int, Any], key: bytes | None) -> pa.Table:
    """Add the columns of `predictions.MARKS`, and fill missing values from DICOM headers; a key hides ids.

    The UID of an instance of a PACS is in its path, also if it could not be fetched.
    """

    def hide(value: str | None) -> str | None:
        return value if key is None or value is None else make_pseudonym(key, value)

    uids = [hide(find_instance_uid(path)) for path in rows["path"].to_pylist()]
    columns = {"sop_instance_uid": pa.array(uids, pa.string()), "content_digest": pa.nulls(len(rows), pa.string())}
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    for name in _TAGS if tags else ():
        values = rows[name].to_pylist()
        for row, fields in tags.items():
            if values[row] is None:
                values[row] = hide(fields.get(name)) if name in _HIDDEN else fields.get(name)
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values, rows.schema.field(name).type))
    return rows


def make_pseudonym(key: bytes, value: str) -> str:
    """Return 32 hex digits of HMAC-SHA256: one id per patient, irreversible without the key."""
    return hmac.new(key, value.encode("utf-8"), hashlib.sha256).hexdigest()[:32]


def decode_task(row: dict[str, Any], job: ScoreJob) -> Iterator[dict[str, Any]]:
    """Decode the images of a task's ranges in a Ray task of one CPU; yield a row for `ModelActor` per range.

    A row has the columns of `ScoreTask`, and `error`; `positions`, the rows of the range that were read; `images`,
    uint8 [n*S*S], zeros for failures; `failures`, `tags` and `flags` of `RangeState` as JSON, so that all rows have one
    schema.
    """
    try:
        task = ScoreTask.from_row(row)
        states = ranges.load_ranges(job, task)
        yield from ranges.fill_ranges(states, _open_reader(job).iter_images(states), DecodedWriter(job, task, states))
    except Exception as error:
        columns = {"positions": [], "images": b"", "failures": "{}", "tags": "{}", "flags": "{}"}
        yield {**ScoreTask((), False).to_row(), **columns, **encode_error(sanitize_error(error, "score"))}
    finally:
        telemetry.flush()


@functools.lru_cache(maxsize=1)
def _open_reader(job: ScoreJob) -> ImageReader:
    """Return the reader that all tasks of a worker process share."""
    return ImageReader(job, 1)


class DecodedWriter:
    """Collects the images of each range into one array."""

    def __init__(self, job: ScoreJob, task: ScoreTask, states: Sequence[RangeState]) -> None:
        self._task, self._states = task, states
        size = job.spec.size
        self._images = {i: np.zeros((len(s.rows), size, size), np.uint8) for i, s in enumerate(states)}

    def add(self, location: RowLocation, image: DecodedImage) -> tuple[RowLocation]:
        self._images[location.range_position][location.row] = image.images[0]
        return (location,)

    def finish(self) -> tuple[()]:
        return ()

    def flush(self, range_position: int) -> dict[str, Any]:
        state = self._states[range_position]
        (own,) = (range_ for range_ in self._task.ranges if range_.index == state.index)
        retried = np.ones(own.rows, bool) if state.retried is None else state.retried
        return {
            **replace(self._task, ranges=(own,)).to_row(),
            "positions": np.flatnonzero(retried).tolist(),
            "images": self._images.pop(range_position).tobytes(),
            "failures": json.dumps(state.failures),
            "tags": json.dumps(state.tags),
            "flags": json.dumps(state.flags),
            **SUCCESS,
        }


def _read_outcomes(row: dict[str, Any], size: int) -> Iterator[tuple[RowLocation, DecodedImage | Failure]]:
    """Yield the images and failures in a row of `decode_task`."""
    failures, tags, flags = (json.loads(row[name]) for name in ("failures", "tags", "flags"))
    for i, image in enumerate(np.frombuffer(row["images"], np.uint8).reshape(-1, size, size)):
        failure, found = failures.get(str(i)), tags.get(str(i))
        decoded = DecodedImage((image,), found, flags=tuple(flags.get(str(i), ())))
        yield RowLocation(0, i), Failure(failure[0], failure[1], found) if failure else decoded
