"""Ranges of the input: their files, the tasks and results about them, and their rows while workers score them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_cxr.config import InputSpec, ScoreSettings
from ray_cxr.data.features import FEATURES
from ray_cxr.data.partition import Range, Unit
from ray_cxr.errors import RETRYABLE_CODES, OutputError, RayCxrError
from ray_cxr.imaging.sandbox import DecodedImage, Failure
from ray_cxr.models import predictions
from ray_cxr.models.bundle import Bundle, load_bundle
from ray_cxr.models.runtime import Usage
from ray_cxr.storage import remote, run_folder
from ray_cxr.storage.pacs_workers import PacsAccess
from ray_cxr.tasks import SUCCESS, encode_error

INPUT, SCORES = "input.parquet", "scores"
#: Columns of the input that workers read.
COLUMNS = [*predictions.IDENTITY, *(name for name, _ in predictions.ABOUT)]
#: Keys in the metadata of a file of scores.
RUN_KEY, ERRORS_KEY = b"ray_cxr.run", b"ray_cxr.errors"

T_co = TypeVar("T_co", covariant=True)


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def part_path(out: Path, index: int, folder: str = SCORES) -> Path:
    return out / folder / part_name(index)


def list_parts(folder: Path) -> set[int]:
    """Return the numbers of the output files in a folder."""
    with contextlib.suppress(FileNotFoundError):
        names = [path.name for path in folder.iterdir()]
        return {int(name[5:-8]) for name in names if name.startswith("part-") and name[5:-8].isdecimal()}
    return set()


def read_part(part: Path, file: pa.NativeFile | None, columns: list[str]) -> pa.Table:
    """Read columns of an output file that `remote.read_files` has fetched; None is a missing file."""
    try:
        if file is None:
            raise FileNotFoundError
        # `read_table` takes two to three times as long for small files.
        with pq.ParquetFile(file) as opened:
            return opened.read(columns=columns, use_threads=False)
    except (OSError, pa.ArrowException):
        raise OutputError(f"{part}: missing or damaged; remove it and run score again") from None


def read_metadata(file: pa.NativeFile | None) -> dict[bytes, bytes] | None:
    """Return the metadata of an output file; None if the file is missing or damaged."""
    if file is None:
        return None
    try:
        return dict(pq.read_metadata(file).metadata or {})
    except (OSError, pa.ArrowException):
        return None


class ProgressFile:
    """Number of images that are done of a range whose output file is not yet written, for the driver's progress line.

    The file is hidden, lies next to the output file, and is written at most once a second.
    """

    _NAME = ".part-{:05d}.progress.part"

    def __init__(self, part: Path) -> None:
        self._path = part.with_name(self._NAME.format(int(part.name[5:-8])))
        self._written_at = 0.0

    def write(self, count: int) -> None:
        if time.monotonic() - self._written_at >= 1:
            self._written_at = time.monotonic()
            with contextlib.suppress(OSError, RayCxrError):  # only for display
                self._path.write_bytes(str(count).encode())

    def remove(self) -> None:
        if self._written_at:
            with contextlib.suppress(OSError, RayCxrError):
                self._path.unlink(missing_ok=True)

    @classmethod
    def remove_all(cls, folder: Path) -> None:
        """Remove the files that killed workers left."""
        remote.remove_files(folder.glob(cls._NAME.replace("{:05d}", "*")))

    @classmethod
    def read_all(cls, folder: Path) -> dict[int, int]:
        """Return the counts in a folder of output files, by number of the range."""
        counts = {}
        for path in folder.glob(cls._NAME.replace("{:05d}", "*")):
            with contextlib.suppress(OSError, RayCxrError, ValueError):  # removed or being written
                counts[int(path.name.split("-")[1].split(".")[0])] = int(path.read_bytes())
        return counts


@dataclass(frozen=True)
class PreparedSource:
    """A prepared set to score: address, size in pixels, first row of each shard followed by the number of rows."""

    path: str
    size: int
    starts: tuple[int, ...]


@dataclass(frozen=True)
class ScoreJob:
    """Settings that all workers of a run share.

    Attributes:
        bundle, out: absolute paths or addresses, on storage that all nodes share.
        digest: digest of the bundle; workers refuse a bundle that has changed.
        key: secret for pseudonyms of ids from DICOM headers; None keeps the ids. Not in `repr`, which Ray Data logs.
        run_digest: digest of OUT/settings.json. Output files carry this digest, and workers stop when it changes.
        prepared: where the images come from, if not from files.
        features: whether to write the features of each image.
        pacs: how to reach the PACS that has images of the input; None if there is none.
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
    run_digest: str
    prepared: PreparedSource | None = None
    features: bool = False
    pacs: PacsAccess | None = None

    @property
    def folder(self) -> Path:
        return remote.to_path(self.out)

    def load_bundle(self) -> Bundle:
        bundle = load_bundle(self.bundle)
        if bundle.digest != self.digest:
            raise RayCxrError(f"{self.bundle}: the bundle changed during the run; run the command again")
        return bundle

    def has_written(self, index: int) -> bool:
        """Whether the files of a range are complete and belong to this run."""
        folders = (SCORES, FEATURES) if self.features else (SCORES,)
        found = [read_metadata(remote.read_file(part_path(self.folder, index, folder))) for folder in folders]
        return all((metadata or {}).get(RUN_KEY) == self.run_digest.encode() for metadata in found)

    def check_run(self) -> None:
        """Raise if the settings in the folder are no longer those of this run."""
        if run_folder.digest_settings(self.folder) != self.run_digest:
            raise RayCxrError(f"{self.out}: another run was started in this folder, so this one stops")


@dataclass(frozen=True)
class ScoreTask:
    """The ranges of one task. With `retry` they have files, whose rows with a retryable error are scored again."""

    ranges: tuple[Range, ...]
    retry: bool

    def to_row(self) -> dict[str, Any]:
        indices, starts, counts = (
            [getattr(range_, name) for range_ in self.ranges] for name in ("index", "start", "rows")
        )
        return {"indices": indices, "starts": starts, "counts": counts, "retry": self.retry}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        columns = (map(int, row[name]) for name in ("indices", "starts", "counts"))
        return cls(tuple(Range(*numbers) for numbers in zip(*columns, strict=True)), bool(row["retry"]))


def make_tasks(units: Iterable[Unit], indices: set[int], *, retry: bool) -> list[ScoreTask]:
    """Return one task per unit with chosen ranges, so that each archive is read once."""
    chosen = (tuple(range_ for range_ in unit.ranges if range_.index in indices) for unit in units)
    return [ScoreTask(ranges, retry) for ranges in chosen if ranges]


@dataclass(frozen=True)
class TaskResult:
    """Report of a task to the driver.

    Attributes:
        done: numbers of the files that the task wrote.
        images: rows that the task scored, or images that it drew.
        created_at, ready_at, first_at: when the actor was created, was ready, and had scored its first batch; seconds
            since 1970, 0 if unknown.
        usage: of the actor's model, since its previous result.
    """

    done: Sequence[int] = ()
    images: int = 0
    created_at: float = 0.0
    ready_at: float = 0.0
    first_at: float = 0.0
    usage: Usage = field(default_factory=Usage)
    error: RayCxrError | None = None

    def to_row(self) -> dict[str, Any]:
        columns = {name: value for name, value in vars(self).items() if name != "error"}
        columns |= {"done": list(self.done), "usage": list(self.usage)}
        return {**columns, **(SUCCESS if self.error is None else encode_error(self.error))}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        columns = {name: value for name, value in row.items() if name != "error"}
        return cls(**{**columns, "usage": Usage(*row["usage"])})


class RowLocation(NamedTuple):
    """Position of a range among the ranges of a task, and of a row in that range."""

    range_position: int
    row: int


@dataclass
class RangeState:
    """A range in progress.

    Attributes:
        rows: the rows that are scored now.
        previous: the rows of an existing file, some of which are scored again.
        retried: bool [len(previous)], true for the rows that are scored again.
        failures: code and message, by row.
        tags: fields of DICOM headers, by row.
        flags: quality flags from DICOM headers, by row.
        start: position of its first row in the input.
    """

    index: int
    rows: pa.Table
    previous: pa.Table | None = None
    retried: np.ndarray | None = None
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    tags: dict[int, Any] = field(default_factory=dict)
    flags: dict[int, tuple[str, ...]] = field(default_factory=dict)
    start: int = 0


def load_ranges(job: ScoreJob, task: ScoreTask, positions: list[int] | None = None) -> list[RangeState]:
    """Read the rows of a task's ranges, without ranges that this run has already written.

    A retry reads only rows with a retryable error, or the rows at `positions` of a single range.
    """
    states = []
    groups: dict[int, pa.Table] = {}
    with pq.ParquetFile(job.folder / INPUT) as file:
        starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
        for range_ in task.ranges:
            # Ray repeats a task whose worker was lost.
            if not task.retry and job.has_written(range_.index):
                continue
            edges = [range_.start, range_.start + range_.rows - 1]
            first, last = (np.searchsorted(starts, edges, side="right") - 1).tolist()
            for group in range(first, last + 1):
                if group not in groups:
                    groups[group] = file.read_row_group(group, columns=COLUMNS)
            offset = range_.start - int(starts[first])
            rows = pa.concat_tables([groups[group] for group in range(first, last + 1)]).slice(offset, range_.rows)
            state = RangeState(range_.index, rows, start=range_.start)
            if task.retry:
                state.previous = pq.read_table(remote.read_file(part_path(job.folder, range_.index)))
                if positions is None:
                    codes = state.previous["error_code"].to_pylist()
                    state.retried = np.array([code in RETRYABLE_CODES for code in codes], bool)
                else:
                    state.retried = np.isin(np.arange(range_.rows), positions)
                state.rows = rows.filter(pa.array(state.retried))
            states.append(state)
    return states


#: Images and failures of the ranges of a task, in any order.
Outcomes = Iterable[tuple[RowLocation, DecodedImage | Failure]]


class RangeWriter(Protocol[T_co]):
    """Callbacks of `fill_ranges` for images and for complete ranges."""

    def add(self, location: RowLocation, image: DecodedImage) -> Iterable[RowLocation]:
        """Take an image; return the rows whose results this completes."""

    def finish(self) -> Iterable[RowLocation]:
        """Compute the remaining results; return their rows."""

    def flush(self, range_position: int) -> T_co:
        """Write a complete range and free its results."""


def fill_ranges(states: Sequence[RangeState], outcomes: Outcomes, writer: RangeWriter[T_co]) -> Iterator[T_co]:
    """Pass images to a writer, and flush each range when its last row has a result or a failure."""
    pending = [len(state.rows) for state in states]

    def flush(range_position: int) -> T_co:
        result, state = writer.flush(range_position), states[range_position]
        # Free the memory of a written range at once; a slice would keep the whole table.
        state.rows, state.previous = state.rows.schema.empty_table(), None
        return result

    def settle(locations: Iterable[RowLocation]) -> Iterator[T_co]:
        for range_position, _ in locations:
            pending[range_position] -= 1
            if not pending[range_position]:
                yield flush(range_position)

    for range_position, rows in enumerate(pending):
        if not rows:
            yield flush(range_position)
    for location, outcome in outcomes:
        state = states[location.range_position]
        if outcome.tags is not None:
            state.tags[location.row] = outcome.tags
        if isinstance(outcome, Failure):
            state.failures[location.row] = (outcome.code, outcome.message)
            yield from settle((location,))
        else:
            if outcome.flags:
                state.flags[location.row] = outcome.flags
            yield from settle(writer.add(location, outcome))
    yield from settle(writer.finish())
