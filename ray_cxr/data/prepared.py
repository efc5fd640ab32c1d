"""Prepared sets: every radiograph decoded and resized once, so that epochs and trials never decode again.

    PREPARED/manifest.parquet      the manifest it was made from, frozen
    PREPARED/settings.json         what another run must agree with to continue here
    PREPARED/224/part-00000.arrow, ...   manifest columns, image (uint8[S*S] or null), error_code, error
    PREPARED/224/counts.json       written last: the set of this size is whole

A shard holds exactly one row per manifest row of its range and has a fixed name, so that work is repeated only
where a shard is absent, and repeating it gives the same bytes.

Pictures inside archives come in the archive's order: the manifest is frozen with each archive's rows together, one
task reads an archive in one pass, and its rows fill its shards as they come, those without a picture last. No shard
straddles two archives, so that shards are of several lengths then.

A shard is an uncompressed Arrow IPC file of one record batch, so that an image is S*S bytes at a known place of it.
Training takes images in another random order every epoch, and reads each straight from its shard: nothing is unpacked
or copied first, every worker of a node shares the system's cache of the same files, and of a larger set only the names
and labels take more of a process's memory (docs/decisions/0009-arrow-shards.md).
"""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_cxr import cluster, labels, telemetry
from ray_cxr.config import InputSpec, PrepareSettings
from ray_cxr.data import manifest as manifests
from ray_cxr.data.ranges import Range, Unit, first_location, group_by_archive, plan_units
from ray_cxr.errors import ConfigError, ImageError, OutputError, TableError
from ray_cxr.imaging.pixels import MAX_PIXELS
from ray_cxr.imaging.sandbox import DecodedImage, Decoder, Failure
from ray_cxr.progress import Progress
from ray_cxr.storage import atomic, remote, run_folder
from ray_cxr.storage.archives import read_members
from ray_cxr.tasks import (
    MAX_LOST_PER_WORKER,
    SUCCESS,
    Task,
    map_once,
    poll,
    run_with_retries,
    sanitize_error,
    to_columns,
)

logger = logging.getLogger(__name__)


#: Of the prepared folder. 1 had its shards in Parquet; in 3, which has pictures from archives, their lengths differ.
FORMAT, FORMAT_WITH_ARCHIVES = 2, 3
#: Shards that one `Pixels` keeps open: two sets stay below the 256 files that a process may open on macOS.
OPEN_SHARDS = 100
#: What one read asks for at most: systems refuse or cut reads of 2 GiB and more.
READ_BYTES = 2**30


def shard_schema(size: int) -> pa.Schema:
    """The manifest's columns, then `image` (uint8 [size*size], rows first; null on failure) and the reason."""
    return pa.schema(
        [*manifests.SCHEMA, ("image", pa.binary(size * size)), ("error_code", pa.string()), ("error", pa.string())]
    )


def shard_name(index: int) -> str:
    return f"part-{index:05d}.arrow"


def prepare(manifest: str | Path, out: str | Path, settings: PrepareSettings) -> dict[int, Counter[str]]:
    """Decode and resize every picture of a manifest with Ray Data; continues where an earlier run stopped.

    Args:
        manifest: a manifest with paths.
        out: the folder for the sets, on storage that all nodes share.
        settings: sizes and the rest.

    Returns:
        Per size a count of rows by error code; `ok` counts the good ones.

    Raises:
        TableError: not a manifest, or one without a single path.
        OutputError: `out` holds sets of another manifest or of other settings.
    """
    import ray

    out = remote.path(out)
    table, wanted = check(manifest, out, settings)
    units = plan_units(table["path"], settings.rows_per_shard)
    n_rows = len(table)
    cluster.require_shared(out, **{"a picture at": first_location(table["path"])})
    run_folder.create_run(out, wanted)
    if not (out / "manifest.parquet").exists():
        freeze(table, out / "manifest.parquet", units)
    del table
    for size in settings.sizes:
        (out / str(size)).mkdir(exist_ok=True)

    def find_pending(*_: Any) -> list[Task]:
        written = [_written(out, size) for size in settings.sizes]
        return [task for unit in units if (task := _task(unit, written))]

    def build_dataset(pending: list[Task]) -> Any:
        # One block per task, so that a lost node costs few shards.
        dataset = ray.data.from_items(pending, override_num_blocks=len(pending))
        given = {"out": remote.address(out), "settings": settings}
        dataset = map_once(dataset, _prepare, fn_kwargs=given, num_cpus=1)
        cpus = sum(node["Resources"].get("CPU", 0) for node in cluster.list_nodes())
        dataset.context.max_errored_blocks = int(MAX_LOST_PER_WORKER * max(1, cpus))
        return dataset

    ranges = [one for unit in units for one in unit.ranges]
    if todo := find_pending():
        pending = sum(sum(task["rows"]) for task in todo)
        progress = Progress("prepare", n_rows, done=n_rows - pending)
        look = _progress_of(out, settings.sizes, ranges, progress)
        with progress, cluster.log_node_changes("prepare"), poll(look, "prepare"):
            for _ in run_with_retries(todo, build_dataset, find_pending):
                pass  # `look` shows what the tasks write
    return {size: _count(out, size, ranges) for size in settings.sizes}


def _written(out: Path, size: int) -> set[str]:
    """Return the names of a size's shards that are there."""
    return {path.name for path in (out / str(size)).glob("part-*.arrow")}


def _progress_of(out: Path, sizes: Sequence[int], ranges: Sequence[Range], progress: Progress) -> Callable[[], bool]:
    """Return a function that shows the shards written since its last call, and returns whether there were any."""

    def find() -> set[int]:
        names = set.intersection(*(_written(out, size) for size in sizes))
        return {one.index for one in ranges if shard_name(one.index) in names}

    rows = {one.index: one.rows for one in ranges}
    seen, failed = find(), 0

    def look() -> bool:
        nonlocal failed
        new = find() - seen
        for index in new:
            codes = _codes(out / str(sizes[0]) / shard_name(index), sizes[0])
            failed += len(codes) - codes.null_count
            seen.add(index)
            progress.advance(rows[index], f"{failed:,} failed")
        return bool(new)

    return look


def check(manifest: str | Path, out: Path, settings: PrepareSettings) -> tuple[pa.Table, dict[str, Any]]:
    """What `prepare` would refuse, refused before Ray starts.

    Returns:
        The manifest in reading order (`archives.in_reading_order`), and what `out` must agree with.

    Raises:
        TableError, OutputError: see `prepare`.
    """
    table = manifests.read_manifest(manifest)
    if not len(table) or table["path"].null_count == len(table):
        raise TableError(f"{manifest}: no row has a path; make it with `ray-cxr manifest ... --images FOLDER`")
    wanted = {
        "kind": "prepare",
        "format": FORMAT,
        "manifest_digest": manifests.digest(table),
        "rows": len(table),
        "rows_per_shard": settings.rows_per_shard,
        "aspect": settings.aspect,
        "interpolation": settings.interpolation,
    }
    table = group_by_archive(table)
    units = plan_units(table["path"], settings.rows_per_shard)
    if any(unit.archive for unit in units):
        wanted |= {"format": FORMAT_WITH_ARCHIVES, "shards": sum(len(unit.ranges) for unit in units)}
    run_folder.check_run(out, wanted)
    return table, wanted


def freeze(table: pa.Table, path: Path, units: Sequence[Unit]) -> None:
    """Write a table in reading order so that range `i` is row group `i`: a task reads its own rows and nothing else."""
    ranges = [one for unit in units for one in unit.ranges]

    def produce(part: Path) -> None:
        with pq.ParquetWriter(part, table.schema) as writer:
            for one in ranges:
                writer.write_table(table.slice(one.start, one.rows), row_group_size=one.rows)

    atomic.write(path, produce)


def rows_in(index: int, rows: int, per_shard: int) -> int:
    """How many rows the shard or output file of a number holds."""
    return min(rows, (index + 1) * per_shard) - index * per_shard


def _task(unit: Unit, there: Sequence[set[str]]) -> dict[str, Any] | None:
    """What a unit still needs; None where all its shards are there. `rows` counts those of absent shards.

    Args:
        there: names of the shards of each size.
    """
    absent = {one.index: one.rows for one in unit.ranges if any(shard_name(one.index) not in names for names in there)}
    if not absent:
        return None
    # All ranges of an archive, those that are there too: which rows are in those is not in the unit.
    return {
        "archive": unit.archive or "",
        "first": unit.ranges[0].index,
        "lengths": [one.rows for one in unit.ranges],
        "indices": list(absent),
        "rows": list(absent.values()),
    }


def _prepare(task: Task, out: str, settings: PrepareSettings) -> dict[str, Any]:
    """Write the absent shards of one unit, in a Ray task; each image is decoded once for all sizes."""
    try:
        _write_shards(task, out, settings)
    except Exception as error:
        return {"done": [], **to_columns(sanitize_error(error, "prepare"))}
    finally:
        telemetry.flush()
    return {"done": task["indices"], **SUCCESS}


def _write_shards(task: Task, out: str, settings: PrepareSettings) -> None:
    shards = range(task["first"], task["first"] + len(task["lengths"]))
    folder = remote.path(out)
    rows = pq.ParquetFile(folder / "manifest.parquet").read_row_groups(list(shards))
    makers = [
        _ShardMaker(folder / str(size), size, place, rows, dict(zip(shards, task["lengths"], strict=True)))
        for place, size in enumerate(settings.sizes)
    ]
    left = np.zeros(len(rows), bool)
    for maker in makers:
        left |= maker.wanted
    for row, outcome in _outcomes(task["archive"], rows["path"].to_pylist(), left, _decoder(settings)):
        telemetry.count(telemetry.IMAGES_PREPARED, 1)
        if isinstance(outcome, Failure):
            telemetry.count(telemetry.IMAGE_ERRORS, 1, "prepare", outcome.code)
        for maker in makers:
            maker.add(row, outcome)


@functools.lru_cache(maxsize=1)
def _decoder(settings: PrepareSettings) -> Decoder:
    """This process's own, so that all tasks of a Ray worker share one child."""
    specs = [settings.spec(size) for size in settings.sizes]
    return Decoder(specs, max_pixels=MAX_PIXELS, timeout_s=settings.decode_timeout_s)


def _load(decoder: Decoder, source: str | bytes | None) -> DecodedImage | Failure:
    outcome = decoder.load(source)
    if decoder.seconds:
        telemetry.decoded("prepare", decoder.seconds)
    return outcome


def _outcomes(
    archive: str, paths: list[str | None], left: np.ndarray, decoder: Decoder
) -> Iterator[tuple[int, DecodedImage | Failure]]:
    """Every row that is left, once, with its picture: single files in order, an archive's as they come."""
    rows = np.flatnonzero(left).tolist()
    if not archive:
        for row in rows:
            yield row, _load(decoder, paths[row])
        return
    members: dict[str, list[int]] = {}
    for row in rows:
        members.setdefault(str(paths[row])[len(archive) + 2 :], []).append(row)
    met: set[str] = set()
    reason = Failure("missing", "the archive holds no such member", None)
    try:
        for name, content in read_members(archive, members.keys()):
            met.add(name)
            if isinstance(content, ImageError):
                outcome: DecodedImage | Failure = Failure(content.code, content.message, None)
            else:
                outcome = _load(decoder, content)
            for row in members[name]:
                yield row, outcome
    except ImageError as error:
        reason = Failure(error.code, error.message, None)
    for row in rows:
        if str(paths[row])[len(archive) + 2 :] not in met:
            yield row, reason


class _ShardMaker:
    """Fills the absent shards of one unit at one size, one after another, and writes each when it is full.

    Args:
        folder: of the size.
        size: S.
        place: which of a picture's images is of this size.
        rows: the unit's rows of the manifest.
        lengths: rows of each of the unit's shards, by number.

    Attributes:
        wanted: bool [n], which rows stand in no shard yet.

    Raises:
        OutputError: a shard that is there is damaged, or holds rows that are not the unit's.
    """

    def __init__(self, folder: Path, size: int, place: int, rows: pa.Table, lengths: dict[int, int]) -> None:
        self._folder, self._size, self._place, self._rows = folder, size, place, rows
        there = [index for index in lengths if (folder / shard_name(index)).exists()]
        self.wanted = np.ones(len(rows), bool)
        if there and len(lengths) == 1:
            self.wanted[:] = False
        elif there:
            # By id, and from the shards themselves: which rows a shard of an archive holds is the archive's order.
            done = [_read_shard(folder / shard_name(index), size, ["image_id"]).table["image_id"] for index in there]
            self.wanted &= ~pc.is_in(rows["image_id"], value_set=pa.concat_arrays(done)).to_numpy()
        self._absent = {index: count for index, count in lengths.items() if index not in there}
        if self.wanted.sum() != sum(self._absent.values()):
            raise OutputError(
                f"{folder}: {', '.join(map(shard_name, there[:3]))}{' ...' * (len(there) > 3)} hold other rows than "
                "they should; remove them and run `ray-cxr prepare` again"
            )
        self._order: list[int] = []
        self._images: list[bytes | None] = []
        self._codes: list[str | None] = []
        self._messages: list[str | None] = []

    def add(self, row: int, outcome: DecodedImage | Failure) -> None:
        if not self.wanted[row]:
            return
        self._order.append(row)
        self._images.append(None if isinstance(outcome, Failure) else outcome.images[self._place].tobytes())
        self._codes.append(outcome.code if isinstance(outcome, Failure) else None)
        self._messages.append(outcome.message if isinstance(outcome, Failure) else None)
        index = next(iter(self._absent))
        if len(self._order) == self._absent[index]:
            self._write(index)

    def _write(self, index: int) -> None:
        rows = self._rows.take(pa.array(self._order))
        arrays = [rows[name] for name in manifests.SCHEMA.names]
        arrays += [
            pa.array(self._images, pa.binary(self._size**2)),
            pa.array(self._codes, pa.string()),
            pa.array(self._messages, pa.string()),
        ]
        shard = pa.Table.from_arrays(arrays, schema=shard_schema(self._size))
        atomic.write_arrow(shard, self._folder / shard_name(index))
        del self._absent[index]
        for column in (self._order, self._images, self._codes, self._messages):
            column.clear()


def _count(out: Path, size: int, ranges: Sequence[Range]) -> Counter[str]:
    """Count a size's rows from the shards themselves, and mark it whole."""
    counts: Counter[str] = Counter()
    paths = [out / str(size) / shard_name(one.index) for one in ranges]
    found = remote.ahead(functools.partial(_codes, size=size), paths)
    for one, path, codes in zip(ranges, paths, found, strict=True):
        if len(codes) != one.rows:
            raise OutputError(
                f"{path}: holds {len(codes):,} rows and should hold {one.rows:,}; remove it and run `ray-cxr prepare` "
                "again"
            )
        counts.update("ok" if code is None else code for code in codes.to_pylist())
    atomic.write_json(out / str(size) / "counts.json", dict(sorted(counts.items())))
    return counts


def _codes(path: Path, size: int) -> pa.Array:
    """The column error_code of a shard; of a bucket no more is fetched.

    Raises:
        OutputError: as `_read_shard`.
    """
    try:
        with remote.opened(path) as source:
            schema = pa.ipc.open_file(source).schema
            if not schema.equals(shard_schema(size)):
                raise _damaged(path)
            only = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index("error_code")])
            batch = pa.ipc.open_file(source, options=only).get_batch(0)
            batch.validate()
            # Copied, because it may lie in a map of the file.
            return batch.column(0).take(pa.array(np.arange(len(batch))))
    except FileNotFoundError:
        raise _lost(path) from None
    except (OSError, pa.ArrowException):
        raise _damaged(path) from None


@dataclass(frozen=True)
class _ShardRows:
    """Rows of one shard.

    Attributes:
        table: their columns, copied out of the file.
        offsets: int64 [n], where in the file each row's image begins, bytes; of no meaning where the image is null.
        length: of the file, bytes.
    """

    table: pa.RecordBatch
    offsets: np.ndarray
    length: int


def _read_shard(path: Path, size: int, columns: Sequence[str], split: str | None = None) -> _ShardRows:
    """Columns of a shard without its pixels: of every row, or of those of a split whose picture could be prepared.

    Raises:
        OutputError: the shard is absent, damaged, or not as this version writes it.
    """
    # The whole file is mapped, and Arrow reads nothing but what is touched. (Its `included_fields` would not be less:
    # it sets aside memory for the whole batch, images and all.)
    try:
        with pa.memory_map(os.fspath(path)) as source:
            file = source.read_buffer()
            reader = pa.ipc.open_file(file)
            if reader.num_record_batches != 1 or not reader.schema.equals(shard_schema(size)):
                raise pa.ArrowInvalid("other batches or columns")
            batch = reader.get_batch(0)
            batch.validate()
    except FileNotFoundError:
        raise _lost(path) from None
    except PermissionError:
        raise OutputError(f"{path}: may not be read; change its permissions") from None
    except (OSError, pa.ArrowException):
        raise _damaged(path) from None
    images = batch.column("image")
    pixels = images.buffers()[1]
    first = pixels.address - file.address
    if not 0 <= first <= file.size - pixels.size:
        raise _damaged(path)  # compressed: what Arrow shows is unpacked, and lies elsewhere in memory
    if split is None:
        rows = np.arange(len(batch))
    else:
        usable = pc.and_(pc.equal(batch["split"], split), pc.is_null(batch["error_code"]))
        rows = pc.indices_nonzero(usable).to_numpy().astype(np.int64)
    # `take` copies. What is returned must not lie in the map, which would stay for as long as the table does.
    return _ShardRows(batch.select(columns).take(rows), first + (images.offset + rows) * size * size, file.size)


def _lost(path: Path | str) -> OutputError:
    return OutputError(f"{path}: is missing; run `ray-cxr prepare` again to make it")


def _damaged(path: Path) -> OutputError:
    return OutputError(f"{path}: is damaged or not a shard; remove it and run `ray-cxr prepare` again")


class Pixels:
    """The images of a split, uint8 [N,S,S], which stay in their shards until some are asked for.

    `pixels[rows]` reads rows into a fresh uint8 array that nothing else holds: [n,S,S], or [S,S] for one number. `rows`
    is what numpy takes for one axis: an array of row numbers in any order, repeated or not, a slice, or a number.
    `np.asarray(pixels)` reads all. Between reads it holds 12 bytes an image and at most `OPEN_SHARDS` open files.
    Reads from several threads wait for one another.

    Args:
        paths: the shards.
        lengths: of those files, bytes.
        shard_of: int32 [N], which of `paths` holds an image.
        offsets: int64 [N], where in that file the image begins, bytes.
        size: S.

    Raises:
        IndexError: on reading, rows that are not there.
        OutputError: on reading, a shard that is gone or is not as long as it was.
    """

    def __init__(
        self, paths: Sequence[Path], lengths: Sequence[int], shard_of: np.ndarray, offsets: np.ndarray, size: int
    ) -> None:
        # Absolute, because shards are opened later, perhaps from another working directory.
        self._paths, self._lengths = [path.absolute() for path in paths], list(lengths)
        self._shard_of, self._offsets, self.size = shard_of, offsets, size
        self._open: OrderedDict[int, int] = OrderedDict()  # shard: descriptor, the least recently used first
        # Without it one thread could close a descriptor that another is about to read.
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._open)

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self), self.size, self.size

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    def __getitem__(self, rows: Any) -> np.ndarray:
        shard_of, offsets = np.asarray(self._shard_of[rows]), np.asarray(self._offsets[rows])
        images = np.empty((*offsets.shape, self.size, self.size), np.uint8)
        if images.size:
            with self._lock:
                self._read(images.reshape(-1), shard_of.reshape(-1), offsets.reshape(-1))
        return images

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the pixels lie in files: an array of them is always a copy")
        return self[:].astype(dtype or self.dtype, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Pixels, (self._paths, self._lengths, self._shard_of, self._offsets, self.size)

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        with self._lock:
            _close_all(self._open)

    def _read(self, into: np.ndarray, shard_of: np.ndarray, offsets: np.ndarray) -> None:
        """Read images that lie one after another in a file, and were asked for so, at once."""
        area = self.size * self.size
        follows = (shard_of[1:] == shard_of[:-1]) & (offsets[1:] == offsets[:-1] + area)
        for first, end in pairwise([0, *(np.flatnonzero(~follows) + 1).tolist(), len(offsets)]):
            view = into[first * area : end * area].data
            self._read_bytes(view, int(shard_of[first]), int(offsets[first]))

    def _read_bytes(self, into: memoryview, shard: int, offset: int) -> None:
        path, done = self._paths[shard], 0
        try:
            descriptor = self._descriptor(shard)
            while done < len(into):
                # Read, not mapped: mapped pages would count as this process's memory, up to the whole set.
                got = os.preadv(descriptor, [into[done : done + READ_BYTES]], offset + done)
                if not got:
                    raise _changed(path)
                done += got
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be read: {error.strerror}; if it is lost, run `ray-cxr prepare` again to make it"
            ) from None

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        descriptor = os.open(self._paths[shard], os.O_RDONLY)
        if os.fstat(descriptor).st_size != self._lengths[shard]:
            os.close(descriptor)
            raise _changed(self._paths[shard])
        self._open[shard] = descriptor
        return descriptor


def _close_all(descriptors: OrderedDict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _changed(path: Path) -> OutputError:
    return OutputError(
        f"{path}: is not as long as it was when it was opened; remove it and run `ray-cxr prepare` again"
    )


@dataclass(frozen=True)
class SplitData:
    """The images of one split at one size.

    Attributes:
        image_ids: strings [N], in manifest order.
        patient_ids: strings or None [N].
        ages: float64 [N], years, NaN where unknown.
        labels: int8 [N,15] in `labels.LABELS` order, -1 where not labelled.
        images: uint8 [N,S,S], read from the shards when rows are asked for.
    """

    image_ids: np.ndarray
    patient_ids: np.ndarray
    ages: np.ndarray
    labels: np.ndarray
    images: Pixels

    def __len__(self) -> int:
        return len(self.image_ids)


def complete_sizes(prepared: Path) -> list[int]:
    """The sizes of a prepared folder whose shards are all there, pixels."""
    names = [folder.name for folder in prepared.glob("*") if folder.name.isdecimal()]
    return sorted(int(name) for name in names if (prepared / name / "counts.json").exists())


class PreparedSet:
    """One size of a prepared folder, open for reading.

    Args:
        path: the folder that `prepare` made.
        size: pixels; None takes the only size there is.

    Raises:
        ConfigError: no such folder or size, several sizes and none named, an unfinished one, or one of another format.
    """

    def __init__(self, path: str | Path, size: int | None = None) -> None:
        self.path = remote.path(path)
        self._settings = run_folder.read_settings(self.path)
        made_in = self._settings.get("format", FORMAT)
        if not self._settings or self._settings.get("kind", "prepare") != "prepare":
            raise ConfigError(f"{path}: not a prepared folder; make one with `ray-cxr prepare`")
        if made_in not in (FORMAT, FORMAT_WITH_ARCHIVES):
            raise ConfigError(
                f"{path}: has format {made_in}, and this version reads formats {FORMAT} and {FORMAT_WITH_ARCHIVES}; "
                "run `ray-cxr prepare` again into another folder"
            )
        whole = complete_sizes(self.path)
        if not whole:
            raise ConfigError(f"{path}: no size is complete; run `ray-cxr prepare` again to continue it")
        if size is None:
            if len(whole) > 1:
                raise ConfigError(f"{path}: has sizes {', '.join(map(str, whole))}; choose one with --set size=...")
            size = whole[0]
        if size not in whole:
            raise ConfigError(
                f"{path}: has no complete size {size}, only {', '.join(map(str, whole))}; "
                f"run `ray-cxr prepare ... --size {size}`"
            )
        self.size = size
        self.counts: dict[str, int] = json.loads((self.path / str(size) / "counts.json").read_text())

    @property
    def input_spec(self) -> InputSpec:
        """How its images were made, and so how a model trained on them must be fed."""
        return InputSpec(size=self.size, aspect=self._settings["aspect"], interpolation=self._settings["interpolation"])

    @property
    def manifest_digest(self) -> str:
        return str(self._settings["manifest_digest"])

    def split_info(self) -> dict[str, Any]:
        """How the manifest was split."""
        return manifests.split_info(manifests.read_manifest(self.path / "manifest.parquet"))

    def rows(self) -> pa.Table:
        """The manifest's columns and error_code of every row, without the images.

        Raises:
            OutputError: a shard is absent or damaged.
        """
        return pa.Table.from_batches(shard.table for shard in self._read([*manifests.SCHEMA.names, "error_code"]))

    def usable(self, split: str) -> pa.Table:
        """The rows of a split whose picture could be prepared, as `rows` gives them.

        Raises:
            OutputError: a shard is absent or damaged.
            TableError: there is none.
        """
        read = self._read([*manifests.SCHEMA.names, "error_code"], split)
        return pa.Table.from_batches(shard.table for shard in read)

    def load(self, split: str) -> SplitData:
        """Open one split. Its labels and names are read; its pixels stay where they are, see `Pixels`.

        Raises:
            OutputError: a shard is absent or damaged.
            TableError: the split has no usable image.
        """
        read = self._read(["image_id", "patient_id", "age", *labels.LABELS], split)
        table = pa.Table.from_batches(shard.table for shard in read)
        images = Pixels(
            self._shards,
            [shard.length for shard in read],
            np.repeat(np.arange(len(read), dtype=np.int32), [len(shard.offsets) for shard in read]),
            np.concatenate([shard.offsets for shard in read]),
            self.size,
        )
        values = np.stack(
            [np.asarray(table[name].fill_null(-1).to_numpy(), dtype=np.int8) for name in labels.LABELS], axis=1
        )
        return SplitData(
            image_ids=table["image_id"].to_numpy(),
            patient_ids=table["patient_id"].to_numpy(),
            ages=np.asarray(table["age"].to_numpy(), dtype=float),
            labels=values,
            images=images,
        )

    @functools.cached_property
    def _shards(self) -> list[Path]:
        """On this machine, where `Pixels` reads them; of a bucket each is fetched once by all processes here."""
        # By number, so that one that is lost is missed and not passed over.
        count = self._settings.get("shards", -(-self._settings["rows"] // self._settings["rows_per_shard"]))
        try:
            return remote.here([self.path / str(self.size) / shard_name(index) for index in range(count)])
        except FileNotFoundError as error:  # of a bucket; on a disk whoever reads it finds that out
            raise _lost(error.filename) from None

    def _read(self, columns: Sequence[str], split: str | None = None) -> list[_ShardRows]:
        read = [_read_shard(shard, self.size, columns, split) for shard in self._shards]
        if split is not None and not any(len(shard.offsets) for shard in read):
            raise TableError(
                f"{self.path}: no usable image in split {split!r}; make the manifest with --split, "
                "or with train= and val= tables"
            )
        return read
