"""Ranges of the input: their files, the tasks and results about them, and their rows while workers score them.

SCORES/input.parquet                    the frozen input
SCORES/scores/part-00000.parquet, ...   one file per range, complete or missing
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_cxr.config import InputSpec, ScoreSettings
from ray_cxr.data.ranges import Range, Unit
from ray_cxr.errors import RETRYABLE_CODES, RayCxrError
from ray_cxr.imaging.sandbox import DecodedImage, Failure
from ray_cxr.models import predictions
from ray_cxr.models.bundle import Bundle, load_bundle
from ray_cxr.storage import remote, run_folder
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
    """Return the numbers of the output files in a folder, by one listing."""
    with contextlib.suppress(FileNotFoundError):
        names = [path.name for path in folder.iterdir()]
        return {int(name[5:-8]) for name in names if name.startswith("part-") and name[5:-8].isdecimal()}
    return set()


class WrittenRun(NamedTuple):
    """The run that wrote a file of scores, and the number of error rows in the file."""

    digest: str | None
    errors: int


def read_run(part: pa.NativeFile | None) -> WrittenRun | None:
    """Return the run that wrote a file of scores and its number of errors; None if the file is missing or damaged."""
    if part is None:
        return None
    try:
        metadata = pq.read_metadata(part).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    run = metadata.get(RUN_KEY)
    return WrittenRun(run.decode() if run else None, int(metadata.get(ERRORS_KEY, 0)))


@dataclass(frozen=True)
class Secret:
    """Bytes without a readable `repr`: Ray Data logs the arguments of a job."""

    value: bytes = field(repr=False)


@dataclass(frozen=True)
class ScoreJob:
    """Settings that all workers of a run share.

    Attributes:
        bundle, out: absolute paths or addresses, on storage that all nodes share.
        digest: of the bundle; workers refuse a bundle that has changed.
        key: secret for pseudonyms of ids from DICOM headers; None keeps the ids.
        run_digest: digest of OUT/settings.json. Every file carries it, and a worker stops when another run replaces it.
    """

    bundle: str
    out: str
    digest: str
    precision: str
    settings: ScoreSettings
    spec: InputSpec
    use_gpu: bool
    batch_size: int
    key: Secret | None = field(repr=False, compare=False)
    run_digest: str

    @property
    def folder(self) -> Path:
        return remote.to_path(self.out)

    def load_bundle(self) -> Bundle:
        bundle = load_bundle(self.bundle)
        if bundle.digest != self.digest:
            raise RayCxrError(f"{self.bundle}: the bundle changed during the run; run the command again")
        return bundle

    def has_written(self, index: int) -> bool:
        """Whether the file of a range is complete and belongs to this run."""
        found = read_run(remote.read_file(part_path(self.folder, index)))
        return found is not None and found.digest == self.run_digest

    def check_run(self) -> None:
        """Raise if a run with --fresh has replaced this one."""
        if run_folder.digest_settings(self.folder) != self.run_digest:
            raise RayCxrError(f"{self.out}: another run was started in this folder, so this one stops")


@dataclass(frozen=True)
class ScoreTask:
    """The ranges of one task; with `retry` they have files, and rows with a retryable error are read again."""

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
        done: numbers of the files that it wrote.
        images: rows that it scored, or images that it drew.
        created_at, ready_at, first_at: when its actor was created, was ready, and had its first batch scored; seconds
            since the epoch, 0 if unknown.
    """

    done: Sequence[int] = ()
    images: int = 0
    created_at: float = 0.0
    ready_at: float = 0.0
    first_at: float = 0.0
    error: RayCxrError | None = None

    def to_row(self) -> dict[str, Any]:
        columns = {name: value for name, value in vars(self).items() if name != "error"}
        return {**columns, "done": list(self.done), **(SUCCESS if self.error is None else encode_error(self.error))}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Self:
        return cls(**{name: value for name, value in row.items() if name != "error"})


class RowLocation(NamedTuple):
    """Position of a range among those of a task, and of a row in that range."""

    range_position: int
    row: int


@dataclass
class RangeState:
    """A range in progress.

    Attributes:
        rows: the rows that are scored now.
        previous: the rows of its file, if some of them are scored again.
        retried: bool [len(previous)], which of them.
        failures: code and message, by row.
        tags: fields of DICOM headers, by row.
    """

    index: int
    rows: pa.Table
    previous: pa.Table | None = None
    retried: np.ndarray | None = None
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    tags: dict[int, Any] = field(default_factory=dict)


def load_ranges(job: ScoreJob, task: ScoreTask, positions: list[int] | None = None) -> list[RangeState]:
    """Read the rows of a task's ranges, without ranges that this run has already written.

    A retry reads the rows at `positions` of a single range, or by default those with a retryable error.
    """
    states = []
    groups: dict[int, pa.Table] = {}
    with pq.ParquetFile(job.folder / INPUT) as file:
        ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        for range_ in task.ranges:
            # Ray repeats a task whose worker was lost.
            if not task.retry and job.has_written(range_.index):
                continue
            first, last = (
                int(i) for i in np.searchsorted(ends, [range_.start, range_.start + range_.rows - 1], side="right")
            )
            for group in range(first, last + 1):
                if group not in groups:
                    groups[group] = file.read_row_group(group, columns=COLUMNS)
            offset = range_.start - (int(ends[first - 1]) if first else 0)
            rows = pa.concat_tables([groups[group] for group in range(first, last + 1)]).slice(offset, range_.rows)
            state = RangeState(range_.index, rows)
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


class RangeWriter(Protocol[T_co]):
    """Callbacks of `fill_ranges` for images and for complete ranges."""

    def add(self, location: RowLocation, image: DecodedImage) -> Iterable[RowLocation]:
        """Take an image; return the rows that have their result now."""

    def finish(self) -> Iterable[RowLocation]:
        """Compute the remaining results; return their rows."""

    def flush(self, range_position: int) -> T_co:
        """Write a complete range and free its results."""


def fill_ranges(
    states: Sequence[RangeState],
    outcomes: Iterable[tuple[RowLocation, DecodedImage | Failure]],
    writer: RangeWriter[T_co],
) -> Iterator[T_co]:
    """Pass images to a writer, in any order, and flush each range when its last row has a result or a failure."""
    pending = [len(state.rows) for state in states]

    def flush(range_position: int) -> T_co:
        result = writer.flush(range_position)
        # Frees the memory of a range of an archive as soon as it is written; a slice would keep the whole table.
        states[range_position].rows, states[range_position].previous = (
            states[range_position].rows.schema.empty_table(),
            None,
        )
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
            yield from settle(writer.add(location, outcome))
    yield from settle(writer.finish())
