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

from ray_cxr.config import InputSpec, ScoreSettings
from ray_cxr.data import archives, atomic
from ray_cxr.data.prepared import SETTINGS
from ray_cxr.data.sandbox import Decoder, Failure, Picture
from ray_cxr.errors import RETRYABLE_CODES, ImageError, RayCxrError
from ray_cxr.evaluation import quality
from ray_cxr.models import predictions
from ray_cxr.models.bundle import Bundle, load_bundle
from ray_cxr.models.runtime import Outputs, Runtime, open_runtime

INPUT = "input.parquet"
#: Columns that a worker reads of the input.
COLUMNS = [*predictions.IDENTITY, "age", "view"]
#: Pictures decoded ahead of the network, at least, so that neither waits for the other; and in batches, for large ones.
PICTURES_AHEAD, BATCHES_AHEAD = 32, 2
#: What a DICOM's header may fill in where the input says nothing.
_FROM_TAGS = ("patient_id", "study_id", "age", "view")

#: A picture's place: which of the ranges at hand, and which row of it.
Place = tuple[int, int]
Source = str | bytes | None


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def part_path(out: Path, index: int) -> Path:
    return out / "scores" / part_name(index)


@dataclass(frozen=True)
class Job:
    """What every worker of a run is told.

    Attributes:
        bundle, out: absolute paths, on storage that all nodes share.
        digest: of the bundle; one that has changed since is refused.
        precision: `fp32`, `bf16` or `int8`.
        batch_size: images per forward pass.
        key: secret for pseudonyms of ids from DICOM headers, or None for the ids themselves.
        settings_file: contents of OUT/settings.json, which a later run replaces before it removes anything.
    """

    bundle: str
    out: str
    digest: str
    precision: str
    settings: ScoreSettings
    spec: InputSpec
    use_gpu: bool
    batch_size: int
    key: bytes | None = field(repr=False)
    settings_file: bytes = field(repr=False)

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


def take_up(job: Job, task: dict[str, Any], findings: int) -> list[Work]:
    """The ranges of a task with their rows of the input, ready to be filled."""
    out = Path(job.out)
    works = []
    with pq.ParquetFile(out / INPUT) as file:
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        for index, start, count in zip(task["indices"], task["starts"], task["counts"], strict=True):
            first = int(np.searchsorted(ends, start, side="right"))
            last = int(np.searchsorted(ends, start + count - 1, side="right"))
            begin = int(ends[first - 1]) if first else 0
            rows = file.read_row_groups(list(range(first, last + 1)), columns=COLUMNS).slice(start - begin, count)
            old = again = None
            if task["retry"]:
                old = pq.read_table(part_path(out, index))
                again = np.array([code in RETRYABLE_CODES for code in old["error_code"].to_pylist()])
                rows = rows.filter(pa.array(again))
            n = len(rows)
            works.append(Work(index, rows, old, again, np.zeros((n, findings), np.float32), flags=[None] * n, left=n))
    return works


class Reading:
    """Decoders in child processes, each with a thread that waits for it."""

    def __init__(self, job: Job, decoders: int) -> None:
        self._job = job
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
        self._ahead = max(PICTURES_AHEAD, BATCHES_AHEAD * job.batch_size) + decoders
        self._turn = threading.Lock()
        # The children start while the network is being compiled.
        barrier = threading.Barrier(decoders)
        for _ in range(decoders):
            self._pool.submit(self._begin, barrier)

    def pictures(self, works: Sequence[Work]) -> Iterator[tuple[Place, Picture | Failure]]:
        """Every row's picture or failure; of single files in order, of an archive in the archive's order."""
        ahead: deque[tuple[Place, Future[Picture | Failure]]] = deque()
        # One range after the other: both at once would end at once, and leave the network without work.
        with self._turn:
            for place, source in _sources(works):
                if isinstance(source, ImageError):
                    ahead.append((place, _done(Failure(source.code, source.message, None))))
                else:
                    ahead.append((place, self._pool.submit(self._load, source)))
                if len(ahead) >= self._ahead:
                    at, future = ahead.popleft()
                    yield at, future.result()
        while ahead:
            at, future = ahead.popleft()
            yield at, future.result()

    def _begin(self, barrier: threading.Barrier) -> None:
        barrier.wait()  # so that each thread of the pool comes here once
        self._decoder().start()

    def _decoder(self) -> Decoder:
        if not hasattr(self._local, "decoder"):
            settings = self._job.settings
            self._local.decoder = Decoder(
                (self._job.spec,), max_pixels=settings.max_pixels, timeout_s=settings.decode_timeout_s, tags=True
            )
        found: Decoder = self._local.decoder
        return found

    def _load(self, source: Source) -> Picture | Failure:
        return self._decoder().load(source)


def _done(value: Picture | Failure) -> Future[Picture | Failure]:
    future: Future[Picture | Failure] = Future()
    future.set_result(value)
    return future


def _sources(works: Sequence[Work]) -> Iterator[tuple[Place, Source | ImageError]]:
    """Where each row's picture is to be had: its path, or its bytes out of an archive; in the order of reading."""
    members: dict[str, dict[str, list[Place]]] = {}
    for w, work in enumerate(works):
        for i, path in enumerate(work.rows["path"].to_pylist()):
            inside = archives.split_member(path)
            if inside is None:
                yield (w, i), path
            else:
                members.setdefault(inside[0], {}).setdefault(inside[1], []).append((w, i))
    for archive, wanted in members.items():
        reason = ImageError("missing", "the archive holds no such member")
        try:
            for name, content in archives.read(archive, frozenset(wanted)):
                for place in wanted.pop(name):
                    yield place, content
        except ImageError as error:
            reason = ImageError(error.code, f"the archive: {error.message}")
        for places in wanted.values():
            for place in places:
                yield place, reason


class Scoring:
    """A network, and the files that its answers go into. `add` and `finish` are one caller's; see `score`."""

    def __init__(self, job: Job, threads: int) -> None:
        bundle = job.load()
        self._job = job
        self._rules, self._quality = bundle.rules, bundle.quality
        self.findings = len(bundle.findings)
        self._size = bundle.input_spec.size
        self._runtime: Runtime = open_runtime(
            bundle,
            job.precision,
            batch_size=job.batch_size,
            threads=threads,
            gpu=job.use_gpu,
        )
        self.first_at: float | None = None

    def score(
        self, works: Sequence[Work], pictures: Iterator[tuple[Place, Picture | Failure]]
    ) -> Iterator[tuple[int, int, int]]:
        """Take pictures in any order; write each range when its last row is there.

        Yields:
            Per file written its number, how many of its rows were scored now, and how many of its rows are errors.
        """
        batch_size = self._job.batch_size
        batch = np.empty((batch_size, self._size, self._size), np.uint8)
        members: list[Place] = []
        running: deque[tuple[list[Place], np.ndarray, Future[Outputs]]] = deque()

        def launch() -> None:
            images = batch[: len(members)].copy()
            running.append((members.copy(), images, self._runtime.submit(images)))
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
        self, works: Sequence[Work], places: list[Place], images: np.ndarray, future: Future[Outputs]
    ) -> Iterator[tuple[int, int, int]]:
        found = future.result()
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
        rows = _with_tags(work.rows, work.tags, self._job.key)
        result = predictions.assemble(rows, work.probabilities, work.failures, self._rules, work.flags)
        scored = len(result)
        if work.old is not None and work.again is not None:
            # Each row keeps its place: take it from the old table, or from the new one behind it.
            position = np.arange(len(work.old))
            position[work.again] = len(work.old) + np.arange(scored)
            result = pa.concat_tables([work.old, result]).take(pa.array(position))
        out = Path(self._job.out)
        if (out / SETTINGS).read_bytes() != self._job.settings_file:
            raise RayCxrError(f"{out}: another run has begun there; this one stops")
        errors = len(result) - result["error_code"].null_count
        # In the file's own metadata, so that the driver can tell the errors so far without reading a column.
        result = result.replace_schema_metadata({"ray_cxr.errors": str(errors)})
        atomic.write_parquet(result, part_path(out, work.index), compression="zstd")
        work.rows = work.rows.slice(0, 0)
        work.probabilities = work.probabilities[:0]
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
    """Decoding and network in one Ray actor, which is quickest on CPUs: pictures never leave the process."""

    def __init__(self, job: Job, cpus: int) -> None:
        born = time.time()
        self._job = job
        self._reading = Reading(job, cpus)
        self._scoring = Scoring(job, cpus)
        self._times = {"born": born, "ready": time.time()}

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        works = take_up(self._job, task, self._scoring.findings)
        written = list(self._scoring.score(works, self._reading.pictures(works)))
        return summary(written, self._times, self._scoring.first_at)


def summary(written: list[tuple[int, int, int]], times: dict[str, float], first_at: float | None) -> dict[str, Any]:
    """What a task tells the driver."""
    return {
        "scored": sum(scored for _, scored, _ in written),
        "files": len(written),
        "born": times["born"],
        "ready": times["ready"],
        "first": first_at or 0.0,
    }


# ---------------------------------------------------------------- decoding apart from the network, for GPUs

_READING: dict[Job, Reading] = {}


def decode_task(task: dict[str, Any], job: Job) -> Iterator[dict[str, Any]]:
    """A Ray task of one CPU: the pictures of a unit's ranges, a row per range, uint8 and nothing wider."""
    reading = _READING.get(job)
    if reading is None:
        _READING.clear()
        reading = _READING[job] = Reading(job, 1)  # kept by the worker process for the next task
    works = take_up(job, task, 0)
    size = job.spec.size
    images = [np.zeros((len(work.rows), size, size), np.uint8) for work in works]
    for w, work in enumerate(works):
        if not work.left:
            yield _decoded(task, w, work, images)
    for (w, i), found in reading.pictures(works):
        work = works[w]
        if found.tags is not None:
            work.tags[i] = found.tags
        if isinstance(found, Failure):
            work.failures[i] = (found.code, found.message)
        else:
            images[w][i] = found.images[0]
        work.left -= 1
        if not work.left:
            yield _decoded(task, w, work, images)


def _decoded(task: dict[str, Any], w: int, work: Work, images: list[np.ndarray]) -> dict[str, Any]:
    row = {
        "indices": [task["indices"][w]],
        "starts": [task["starts"][w]],
        "counts": [task["counts"][w]],
        "retry": task["retry"],
        "images": images[w].tobytes(),
        # As pairs of JSON-like texts: what Arrow makes of dictionaries with other keys in every row is another schema.
        "failures": [[str(i), code, message] for i, (code, message) in work.failures.items()],
        "tags": [[str(i), *(_text(found.get(name)) for name in _FROM_TAGS)] for i, found in work.tags.items()],
    }
    images[w] = images[w][:0]
    return row


def _text(value: Any) -> str:
    return "" if value is None else str(value)


class NetworkActor:
    """The network alone, on a GPU (or on CPUs, where decoding is told to stand apart)."""

    def __init__(self, job: Job, cpus: int) -> None:
        born = time.time()
        self._job = job
        self._scoring = Scoring(job, cpus)
        self._times = {"born": born, "ready": time.time()}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        (work,) = works = take_up(self._job, row, self._scoring.findings)
        size = self._job.spec.size
        images = np.frombuffer(row["images"], np.uint8).reshape(-1, size, size)
        failures = {int(i): Failure(code, message, None) for i, code, message in row["failures"]}
        tags: dict[int, dict[str, Any]] = {}
        for i, *texts in row["tags"]:
            found: dict[str, Any] = {name: text or None for name, text in zip(_FROM_TAGS, texts, strict=True)}
            found["age"] = None if found["age"] is None else float(found["age"])
            tags[int(i)] = found
        pictures: Iterator[tuple[Place, Picture | Failure]] = (
            ((0, i), failures.get(i) or Picture((images[i],), None)) for i in range(len(work.rows))
        )
        work.tags = tags
        return summary(list(self._scoring.score(works, pictures)), self._times, self._scoring.first_at)
