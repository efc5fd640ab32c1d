"""What one worker of `score` does with ranges of the input: read, decode, run the network, write whole files.

    sources (paths, or members of an archive in its order)
      -> threads, each with a decoder in a child process      uint8[S,S], in order, a bounded number ahead
      -> batches -> the network, several in flight            float32[F] and features
      -> per range one Parquet file, when its last row is there

Everything is bounded: pictures ahead of the network, batches in it. Two ranges can be in work at once: the second
begins to decode when the first has nothing left to read, so that neither decoders nor network run dry in between.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_cxr import tasks, telemetry
from ray_cxr.config import InputSpec, ScoreSettings
from ray_cxr.errors import RETRYABLE_CODES, ImageError, RayCxrError, from_record
from ray_cxr.evaluation import quality
from ray_cxr.imaging.sandbox import DecodedImage, Decoder, Failure
from ray_cxr.models import predictions
from ray_cxr.models.bundle import Bundle, load_bundle
from ray_cxr.models.runtime import Outputs, Runtime
from ray_cxr.storage import atomic, remote
from ray_cxr.storage.archives import read_members
from ray_cxr.storage.paths import split_member
from ray_cxr.storage.run_folder import SETTINGS

logger = logging.getLogger(__name__)

INPUT = "input.parquet"
#: Columns that a worker reads of the input.
COLUMNS = [*predictions.IDENTITY, *(name for name, _ in predictions.ABOUT)]
#: Pictures decoded ahead of the network, at least, so that neither waits for the other; and in batches, for large ones.
PICTURES_AHEAD, BATCHES_AHEAD = 32, 2
#: Contents of archive members that wait for a decoder, bytes.
BYTES_AHEAD = 256 * 1024 * 1024
#: Keys of a file's metadata.
RUN_KEY, ERRORS_KEY = b"ray_cxr.run", b"ray_cxr.errors"
#: What a DICOM's header may fill in where the input says nothing.
_FROM_TAGS = ("patient_id", "study_id", "age", "sex", "view")

#: How long a batch took; waited for, because a future wakes who waits for it before it calls anybody back.
Took = queue.SimpleQueue[float]
#: A picture's place: which of the ranges at hand, and which row of it.
Place = tuple[int, int]
Source = str | bytes | None


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def part_path(out: Path, index: int) -> Path:
    return out / "scores" / part_name(index)


class Secret:
    """Bytes that nothing shows: Ray Data describes a job's arguments in its logs and statistics."""

    __slots__ = ("value",)

    def __init__(self, value: bytes) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Secret()"


@dataclass(frozen=True)
class Job:
    """What every worker of a run is told.

    Attributes:
        bundle, out: absolute paths or addresses, on storage that all nodes share.
        digest: of the bundle; one that has changed since is refused.
        precision: `fp32`, `bf16` or `int8`.
        batch_size: images per forward pass.
        key: secret for pseudonyms of ids from DICOM headers, or None for the ids themselves.
        settings_file: contents of OUT/settings.json, which a run with --fresh replaces before it removes anything.
    """

    bundle: str
    out: str
    digest: str
    precision: str
    settings: ScoreSettings
    spec: InputSpec
    use_gpu: bool
    batch_size: int
    key: Secret | None = field(repr=False)
    settings_file: bytes = field(repr=False)

    @property
    def run(self) -> str:
        """What every file of the run carries, so that one of a run with other settings is told apart."""
        return run_digest(self.settings_file)

    @property
    def folder(self) -> Path:
        """`out` as a path."""
        return remote.path(self.out)

    def load(self) -> Bundle:
        bundle = load_bundle(self.bundle)
        if bundle.digest != self.digest:
            raise RayCxrError(f"{self.bundle}: changed since the job began")
        return bundle


@dataclass
class Work:
    """One range in work.

    Attributes:
        rows: of the input, `COLUMNS`, those that are scored now.
        left: rows without a result yet.
    """

    index: int
    rows: pa.Table
    #: Of a range that is being read again: the table as it was, and which of its rows `rows` are.
    old: pa.Table | None
    again: np.ndarray | None
    probabilities: np.ndarray
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    flags: list[str | None] = field(default_factory=list)
    tags: dict[int, Any] = field(default_factory=dict)
    left: int = 0


def run_digest(settings_file: bytes) -> str:
    return hashlib.sha256(settings_file).hexdigest()


def run_of(part: pa.NativeFile | None) -> tuple[str | None, int] | None:
    """The run that wrote a file of scores and how many of its rows are errors; None where there is no whole file."""
    if part is None:
        return None
    try:
        metadata = pq.read_metadata(part).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    run = metadata.get(RUN_KEY)
    return (run.decode() if run else None), int(metadata.get(ERRORS_KEY, 0))


def take_up(job: Job, task: dict[str, Any], findings: int, positions: list[int] | None = None) -> list[Work]:
    """The ranges of a task with their rows of the input, ready to be filled; of a range that is there already none.

    Args:
        task: `indices`, `starts` and `counts` of ranges, and whether they are read again (`retry`).
        findings: outputs of the network.
        positions: of a single range that is read again, which of its rows; None: those whose error may have passed.
    """
    out = job.folder
    works = []
    groups: dict[int, pa.Table] = {}
    with pq.ParquetFile(out / INPUT) as file:
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        for index, start, count in zip(task["indices"], task["starts"], task["counts"], strict=True):
            # Where Ray does a task again, because a worker was lost, the ranges that it had finished stay as they are.
            if not task["retry"] and (run_of(remote.content(part_path(out, index))) or ("", 0))[0] == job.run:
                continue
            first = int(np.searchsorted(ends, start, side="right"))
            last = int(np.searchsorted(ends, start + count - 1, side="right"))
            for group in range(first, last + 1):
                if group not in groups:
                    groups[group] = file.read_row_group(group, columns=COLUMNS)
            begin = int(ends[first - 1]) if first else 0
            table = pa.concat_tables([groups[group] for group in range(first, last + 1)])
            rows = table.slice(start - begin, count)
            old = again = None
            if task["retry"]:
                old = pq.read_table(remote.content(part_path(out, index)))
                if positions is None:
                    again = np.array([code in RETRYABLE_CODES for code in old["error_code"].to_pylist()], bool)
                else:
                    again = np.isin(np.arange(count), positions)
                rows = rows.filter(pa.array(again))
            n = len(rows)
            works.append(Work(index, rows, old, again, np.zeros((n, findings), np.float32), flags=[None] * n, left=n))
    return works


class Reading:
    """Decoders in child processes, each with a thread that waits for it.

    Args:
        decoders: how many.
        more: sizes to make of each picture beside the network's own, which comes first.
        command: what its metrics are counted under.
    """

    def __init__(self, job: Job, decoders: int, more: Sequence[InputSpec] = (), command: str = "score") -> None:
        self._job, self._command = job, command
        self._specs = (job.spec, *more)
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
        self._ahead = max(PICTURES_AHEAD, BATCHES_AHEAD * job.batch_size) + decoders
        self._turn = threading.Lock()
        # The children start while the network is being compiled.
        barrier = threading.Barrier(decoders)
        for _ in range(decoders):
            self._pool.submit(self._begin, barrier)

    def iter_images(self, works: Sequence[Work]) -> Iterator[tuple[Place, DecodedImage | Failure]]:
        """Every row's picture or failure; of single files in order, of an archive in the archive's order."""
        ahead: deque[tuple[Place, int, Future[DecodedImage | Failure]]] = deque()
        held = 0
        # One range after the other: both at once would end at once, and leave the network without work.
        with self._turn:
            for place, source in _sources(works):
                size = len(source) if isinstance(source, bytes) else 0
                held += size
                if isinstance(source, ImageError):
                    ahead.append((place, size, _done(Failure(source.code, source.message, None))))
                else:
                    ahead.append((place, size, self._pool.submit(self._load, source)))
                while len(ahead) >= self._ahead or (held > BYTES_AHEAD and ahead):
                    at, size, future = ahead.popleft()
                    held -= size
                    yield at, future.result()
        while ahead:
            at, _, future = ahead.popleft()
            yield at, future.result()

    def _begin(self, barrier: threading.Barrier) -> None:
        barrier.wait()  # so that each thread of the pool comes here once
        self._decoder().start()

    def _decoder(self) -> Decoder:
        if not hasattr(self._local, "decoder"):
            settings = self._job.settings
            self._local.decoder = Decoder(
                self._specs, max_pixels=settings.max_pixels, timeout_s=settings.decode_timeout_s, tags=True
            )
        found: Decoder = self._local.decoder
        return found

    def _load(self, source: Source) -> DecodedImage | Failure:
        decoder = self._decoder()
        found = decoder.load(source)
        if decoder.seconds:
            telemetry.decoded(self._command, decoder.seconds)
        return found


def _done(value: DecodedImage | Failure) -> Future[DecodedImage | Failure]:
    future: Future[DecodedImage | Failure] = Future()
    future.set_result(value)
    return future


def _sources(works: Sequence[Work]) -> Iterator[tuple[Place, Source | ImageError]]:
    """Where each row's picture is to be had: its path, or its bytes out of an archive; in the order of reading."""
    members: dict[str, dict[str, list[Place]]] = {}
    for w, work in enumerate(works):
        for i, path in enumerate(work.rows["path"].to_pylist()):
            inside = split_member(path)
            if inside is None:
                yield (w, i), path
            else:
                members.setdefault(inside[0], {}).setdefault(inside[1], []).append((w, i))
    for archive, wanted in members.items():
        reason = ImageError("missing", "the archive holds no such member")
        try:
            for name, content in read_members(archive, frozenset(wanted)):
                for place in wanted.pop(name):
                    yield place, content
        except ImageError as error:
            reason = ImageError(error.code, f"the archive: {error.message}")
        for places in wanted.values():
            for place in places:
                yield place, reason


class Scoring:
    """A network, and the files that its answers go into; several callers can `score` at once."""

    def __init__(self, job: Job, threads: int) -> None:
        bundle = job.load()
        self._job = job
        self._rules, self._quality = bundle.rules, bundle.quality
        self.findings = len(bundle.findings)
        self._size = bundle.input_spec.size
        self._runtime: Runtime = bundle.open_runtime(
            job.precision,
            batch_size=job.batch_size,
            threads=threads,
            gpu=job.use_gpu,
        )
        self.first_at: float | None = None

    def score(
        self, works: Sequence[Work], pictures: Iterator[tuple[Place, DecodedImage | Failure]]
    ) -> Iterator[tuple[int, int, int]]:
        """Take pictures in any order; write each range when its last row is there.

        Yields:
            Per file written its number, how many of its rows were scored now, and how many of its rows are errors.
        """
        batch_size = self._job.batch_size
        batch = np.empty((batch_size, self._size, self._size), np.uint8)
        members: list[Place] = []
        running: deque[tuple[list[Place], np.ndarray, Future[Outputs], Took]] = deque()

        def launch() -> None:
            images, took, began = batch[: len(members)].copy(), Took(), time.monotonic()
            future = self._runtime.submit(images)
            future.add_done_callback(lambda _: took.put(time.monotonic() - began))
            running.append((members.copy(), images, future, took))
            members.clear()

        for w, work in enumerate(works):
            if not work.left:
                yield self._write(works[w])
        for (w, i), found in pictures:
            work = works[w]
            if found.tags is not None:
                work.tags[i] = found.tags
            if isinstance(found, Failure):
                work.failures[i] = (found.code, found.message)
                work.left -= 1
                if not work.left:
                    yield self._write(work)
            else:
                batch[len(members)] = found.images[0]
                members.append((w, i))
                if len(members) == batch_size:
                    launch()
            while running and running[0][2].done():
                yield from self._settle(works, *running.popleft())
        if members:
            launch()
        while running:
            yield from self._settle(works, *running.popleft())

    def _settle(
        self, works: Sequence[Work], places: list[Place], images: np.ndarray, future: Future[Outputs], took: Took
    ) -> Iterator[tuple[int, int, int]]:
        found = future.result()
        telemetry.inferred("score", took.get())
        if self.first_at is None:
            self.first_at = time.time()
        flags = [None] * len(places) if self._quality is None else quality.judge(self._quality, images, found.features)
        for (w, i), probabilities, flag in zip(places, found.probabilities, flags, strict=True):
            work = works[w]
            work.probabilities[i], work.flags[i] = probabilities, flag
            work.left -= 1
            if not work.left:
                yield self._write(work)

    def _write(self, work: Work) -> tuple[int, int, int]:
        key = None if self._job.key is None else self._job.key.value
        rows = _with_tags(work.rows, work.tags, key)
        result = predictions.assemble(rows, work.probabilities, work.failures, self._rules, work.flags)
        scored = len(result)
        if work.old is not None and work.again is not None:
            # Each row keeps its place: take it from the old table, or from the new one behind it.
            position = np.arange(len(work.old))
            position[work.again] = len(work.old) + np.arange(scored)
            result = pa.concat_tables([work.old, result]).take(pa.array(position))
        out = self._job.folder
        if (out / SETTINGS).read_bytes() != self._job.settings_file:
            raise RayCxrError(f"{out}: another run has begun there; this one stops")
        errors = len(result) - result["error_code"].null_count
        # In the file's own metadata, so that the driver can tell the errors so far without reading a column.
        result = result.replace_schema_metadata({RUN_KEY: self._job.run, ERRORS_KEY: str(errors)})
        atomic.write_parquet(result, part_path(out, work.index), compression="zstd")
        telemetry.wrote(telemetry.IMAGES_SCORED, "score", scored, (code for code, _ in work.failures.values()))
        # Of an archive's ranges each lets go of its memory when it is written; slices would keep it.
        work.rows, work.old, work.flags = work.rows.schema.empty_table(), None, []
        work.probabilities = np.empty((0, self.findings), np.float32)
        return work.index, scored, errors


def _with_tags(rows: pa.Table, tags: dict[int, Any], key: bytes | None) -> pa.Table:
    """Fill what the input does not say from DICOM headers; ids by way of a keyed hash where there is a key."""
    if not tags:
        return rows
    for name in _FROM_TAGS:
        values = rows[name].to_pylist()
        for i, found in tags.items():
            value = found.get(name)
            if values[i] is None and value is not None:
                values[i] = pseudonym(key, value) if key is not None and name.endswith("_id") else value
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values, rows.schema.field(name).type))
    return rows


def pseudonym(key: bytes, value: str) -> str:
    """The first 32 hex digits of HMAC-SHA256: the same id for the same patient, and no way back without the key."""
    return hmac.new(key, value.encode("utf-8"), hashlib.sha256).hexdigest()[:32]


class ScoreActor:
    """Decoding and network in one Ray actor, which is quickest on CPUs: no picture goes through Ray's object store."""

    def __init__(self, job: Job, cpus: int) -> None:
        born = time.time()
        self._job = job
        self._failed: RayCxrError | None = None
        try:
            self._reading = Reading(job, cpus)
            self._scoring = Scoring(job, cpus)
        except Exception as error:
            self._failed = tasks.sanitize_error(error, "score")  # by the first call
        self._times = {"born": born, "ready": time.time()}

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        if self._failed is not None:
            return failure(self._failed)
        try:
            works = take_up(self._job, task, self._scoring.findings)
            written = list(self._scoring.score(works, self._reading.iter_images(works)))
        except Exception as error:
            return failure(tasks.sanitize_error(error, "score"))
        return summary(written, self._times, self._scoring.first_at)


def summary(written: list[tuple[int, int, int]], times: dict[str, float], first_at: float | None) -> dict[str, Any]:
    """What a task tells the driver."""
    return {
        "scored": sum(scored for _, scored, _ in written),
        "files": len(written),
        "done": [index for index, _, _ in written],
        "born": times["born"],
        "ready": times["ready"],
        "first": first_at or 0.0,
        **tasks.SUCCESS,
    }


def failure(error: RayCxrError) -> dict[str, Any]:
    """Return the row of a task that failed."""
    return {**summary([], {"born": 0.0, "ready": 0.0}, None), **tasks.encode_error(error)}


# ---------------------------------------------------------------- decoding apart from the network, for GPUs

_READING: dict[Job, Reading] = {}
#: A row between decoding and network that holds nothing.
_EMPTY: dict[str, Any] = {
    "indices": [],
    "starts": [],
    "counts": [],
    "retry": False,
    "positions": [],
    "images": b"",
    "failures": [],
    "tags": [],
    **tasks.SUCCESS,
}


def decode_task(task: dict[str, Any], job: Job) -> Iterator[dict[str, Any]]:
    """A Ray task of one CPU: the pictures of a unit's ranges, a row per range, uint8 and nothing wider."""
    try:
        yield from _decode(task, job)
    except Exception as error:
        yield {**_EMPTY, **tasks.encode_error(tasks.sanitize_error(error, "score"))}
    finally:
        telemetry.flush()


def _decode(task: dict[str, Any], job: Job) -> Iterator[dict[str, Any]]:
    reading = _READING.get(job)
    if reading is None:
        _READING.clear()
        reading = _READING[job] = Reading(job, 1)  # kept by the worker process for the next task
    works = take_up(job, task, 0)
    size = job.spec.size
    images: list[np.ndarray | None] = [np.zeros((len(work.rows), size, size), np.uint8) for work in works]
    for w, work in enumerate(works):
        if not work.left:
            yield _decoded(task, work, images, w)
    for (w, i), found in reading.iter_images(works):
        work = works[w]
        if found.tags is not None:
            work.tags[i] = found.tags
        if isinstance(found, Failure):
            work.failures[i] = (found.code, found.message)
        else:
            room = images[w]
            assert room is not None
            room[i] = found.images[0]
        work.left -= 1
        if not work.left:
            yield _decoded(task, work, images, w)


def _decoded(task: dict[str, Any], work: Work, images: list[np.ndarray | None], w: int) -> dict[str, Any]:
    """A range's pictures as a row; they are let go of here."""
    found, images[w] = images[w], None
    assert found is not None
    at = list(task["indices"]).index(work.index)
    count = int(task["counts"][at])
    return {
        **_EMPTY,
        "indices": [work.index],
        "starts": [task["starts"][at]],
        "counts": [count],
        "retry": task["retry"],
        "positions": list(range(count)) if work.again is None else np.flatnonzero(work.again).tolist(),
        "images": found.tobytes(),
        # As pairs of JSON-like texts: what Arrow makes of dictionaries with other keys in every row is another schema.
        "failures": [[str(i), code, message] for i, (code, message) in work.failures.items()],
        "tags": [[str(i), *(_text(tags.get(name)) for name in _FROM_TAGS)] for i, tags in work.tags.items()],
    }


def _text(value: Any) -> str:
    return "" if value is None else str(value)


class NetworkActor:
    """The network alone, on a GPU (or on CPUs, where decoding is told to stand apart)."""

    def __init__(self, job: Job, cpus: int) -> None:
        born = time.time()
        self._job = job
        self._failed: RayCxrError | None = None
        try:
            self._scoring = Scoring(job, cpus)
        except Exception as error:
            self._failed = tasks.sanitize_error(error, "score")
        self._times = {"born": born, "ready": time.time()}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["error"]:
            return failure(from_record(json.loads(row["error"])))
        if self._failed is not None:
            return failure(self._failed)
        try:
            return summary(self._written(row), self._times, self._scoring.first_at)
        except Exception as error:
            return failure(tasks.sanitize_error(error, "score"))

    def _written(self, row: dict[str, Any]) -> list[tuple[int, int, int]]:
        # Exactly the rows whose pictures came, whatever has become of the file since.
        works = take_up(self._job, row, self._scoring.findings, row["positions"])
        if not works:
            return []
        (work,) = works
        size = self._job.spec.size
        images = np.frombuffer(row["images"], np.uint8).reshape(-1, size, size)
        failures = {int(i): Failure(code, message, None) for i, code, message in row["failures"]}
        tags: dict[int, dict[str, Any]] = {}
        for i, *texts in row["tags"]:
            found: dict[str, Any] = {name: text or None for name, text in zip(_FROM_TAGS, texts, strict=True)}
            found["age"] = None if found["age"] is None else float(found["age"])
            tags[int(i)] = found
        pictures: Iterator[tuple[Place, DecodedImage | Failure]] = (
            ((0, i), failures.get(i) or DecodedImage((images[i],), None)) for i in range(len(work.rows))
        )
        work.tags = tags
        return list(self._scoring.score(works, pictures))
