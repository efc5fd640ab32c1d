"""Prepared sets: every radiograph decoded and resized once, so that epochs and trials never decode again.

    PREPARED/manifest.parquet      the manifest it was made from, frozen
    PREPARED/settings.json         what another run must agree with to continue here
    PREPARED/224/part-00000.arrow, ...   manifest columns, image (uint8[S*S] or null), error_code, error
    PREPARED/224/counts.json       written last: the set of this size is whole

A shard holds exactly one row per manifest row of its range and has a fixed name, so that work is repeated only
where a shard is absent, and repeating it gives the same bytes.

A shard is an uncompressed Arrow IPC file of one record batch, so that an image is S*S bytes at a known place of it.
Training takes images in another random order every epoch, and reads each straight from its shard: nothing is unpacked
or copied first, every worker of a node shares the system's cache of the same files, and of a larger set only the names
and labels take more of a process's memory (docs/decisions/0009-arrow-shards.md).
"""

from __future__ import annotations

import json
import logging
import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_cxr import labels
from ray_cxr.config import InputSpec, PrepareSettings
from ray_cxr.data import atomic, imaging
from ray_cxr.data import manifest as manifests
from ray_cxr.errors import ConfigError, ImageError, OutputError, TableError
from ray_cxr.progress import Work

logger = logging.getLogger(__name__)


SETTINGS = "settings.json"
#: Of the prepared folder. 1 had its shards in Parquet.
FORMAT = 2
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

    out = Path(out)
    table, wanted = check(manifest, out, settings)
    begin(out, wanted)
    if not (out / "manifest.parquet").exists():
        # One row group per shard: a task reads its own rows and nothing else.
        atomic.write_parquet(table, out / "manifest.parquet", row_group_size=settings.rows_per_shard)
    n_shards = -(-len(table) // settings.rows_per_shard)
    for size in settings.sizes:
        (out / str(size)).mkdir(exist_ok=True)
    missing = {
        index: [size for size in settings.sizes if not (out / str(size) / shard_name(index)).exists()]
        for index in range(n_shards)
    }
    todo = [{"index": index, "sizes": sizes} for index, sizes in missing.items() if sizes]
    if todo:
        done = sum(rows_in(i, len(table), settings.rows_per_shard) for i, sizes in missing.items() if not sizes)
        # One block per shard, so that a shard is one task, and a lost node costs single shards.
        work = ray.data.from_items(todo, override_num_blocks=len(todo)).map(
            _prepare_shard, fn_kwargs={"out": str(out.absolute()), "settings": settings}, num_cpus=1
        )
        failed = 0
        with Work("prepare", len(table), done=done) as progress:
            for row in work.iter_rows():
                failed += row["failed"]
                progress.advance(row["rows"], f"{failed:,} failed")
    return {size: _count(out, size, n_shards, len(table)) for size in settings.sizes}


def check(manifest: str | Path, out: Path, settings: PrepareSettings) -> tuple[pa.Table, dict[str, Any]]:
    """What `prepare` would refuse, refused before Ray starts; the manifest, and what `out` must agree with.

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
    agree(out, wanted)
    return table, wanted


def agree(out: Path, wanted: dict[str, Any], *, remedy: str = "name another --out") -> None:
    """Check that what `out` holds, if anything, was begun with the same input and settings.

    Raises:
        OutputError: it was not; the message names each difference.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; name another --out")
    path = out / SETTINGS
    if not path.exists():
        return
    try:
        found = _flat(json.loads(path.read_text(encoding="utf-8")))
        wanted = _flat(wanted)
        differing = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    except (OSError, ValueError, TypeError, AttributeError):
        raise OutputError(f"{path}: is damaged; {remedy}") from None
    if differing:
        shown = ", ".join(f"{name} {_short(found.get(name))} (now {_short(wanted.get(name))})" for name in differing)
        raise OutputError(f"{out}: was begun with another {shown}; {remedy}")


def begin(out: Path, wanted: dict[str, Any]) -> None:
    """Make `out` and write down what a later run must agree with.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / SETTINGS).exists():
            atomic.write_json(out / SETTINGS, wanted)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}; name another --out") from None


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def rows_in(index: int, rows: int, per_shard: int) -> int:
    """How many rows the shard or output file of a number holds."""
    return min(rows, (index + 1) * per_shard) - index * per_shard


def _prepare_shard(task: dict[str, Any], out: str, settings: PrepareSettings) -> dict[str, int]:
    """One shard, in a Ray task: decode each picture once, write it at every size still wanted."""
    cv2.setNumThreads(1)  # Ray gives this task one core; OpenCV would take them all
    rows = pq.ParquetFile(Path(out) / "manifest.parquet").read_row_group(task["index"])
    images: dict[int, list[bytes | None]] = {size: [] for size in task["sizes"]}
    codes: list[str | None] = []
    messages: list[str | None] = []
    for path in rows["path"].to_pylist():
        try:
            picture = imaging.load(path or "")
            resized = {size: imaging.resize(picture, settings.spec(size)).tobytes() for size in images}
        except ImageError as error:
            codes.append(error.code)
            messages.append(error.message)
            for column in images.values():
                column.append(None)
            continue
        codes.append(None)
        messages.append(None)
        for size, column in images.items():
            column.append(resized[size])
    for size, column in images.items():
        schema = shard_schema(size)
        arrays = [rows[name] for name in manifests.SCHEMA.names]
        arrays += [
            pa.array(column, pa.binary(size * size)),
            pa.array(codes, pa.string()),
            pa.array(messages, pa.string()),
        ]
        shard = pa.Table.from_arrays(arrays, schema=schema)
        atomic.write_arrow(shard, Path(out) / str(size) / shard_name(task["index"]))
    return {"rows": len(rows), "failed": sum(code is not None for code in codes)}


def _count(out: Path, size: int, n_shards: int, rows: int) -> Counter[str]:
    """Count a size's rows from the shards themselves, and mark it whole."""
    counts: Counter[str] = Counter()
    for index in range(n_shards):
        codes = _read_shard(out / str(size) / shard_name(index), size, ["error_code"]).table["error_code"]
        counts.update("ok" if code is None else code for code in codes.to_pylist())
    if counts.total() != rows:
        raise OutputError(f"{out / str(size)}: holds {counts.total():,} rows for a manifest of {rows:,}; remove it")
    atomic.write_json(out / str(size) / "counts.json", dict(sorted(counts.items())))
    return counts


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
        with pa.memory_map(str(path)) as source:
            file = source.read_buffer()
            reader = pa.ipc.open_file(file)
            if reader.num_record_batches != 1 or not reader.schema.equals(shard_schema(size)):
                raise pa.ArrowInvalid("other batches or columns")
            batch = reader.get_batch(0)
            batch.validate()
    except FileNotFoundError:
        raise OutputError(f"{path}: is missing; run `ray-cxr prepare` again to make it") from None
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


class PreparedSet:
    """One size of a prepared folder, open for reading.

    Args:
        path: the folder that `prepare` made.
        size: pixels; None takes the only size there is.

    Raises:
        ConfigError: no such folder or size, several sizes and none named, an unfinished one, or one of another format.
    """

    def __init__(self, path: str | Path, size: int | None = None) -> None:
        self.path = Path(path)
        try:
            self._settings: dict[str, Any] = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
            made_by, made_in = self._settings.get("kind", "prepare"), self._settings.get("format", FORMAT)
        except (OSError, ValueError, AttributeError):
            made_by, made_in = None, None
        if made_by != "prepare":
            raise ConfigError(f"{path}: not a prepared folder; make one with `ray-cxr prepare`")
        if made_in != FORMAT:
            raise ConfigError(
                f"{path}: has format {made_in}, and this version reads format {FORMAT}; "
                "run `ray-cxr prepare` again into another folder"
            )
        whole = sorted(int(file.parent.name) for file in self.path.glob("*/counts.json"))
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
            self._shards(),
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

    def _shards(self) -> list[Path]:
        # By number, so that one that is lost is missed and not passed over.
        count = -(-self._settings["rows"] // self._settings["rows_per_shard"])
        return [self.path / str(self.size) / shard_name(index) for index in range(count)]

    def _read(self, columns: Sequence[str], split: str | None = None) -> list[_ShardRows]:
        read = [_read_shard(shard, self.size, columns, split) for shard in self._shards()]
        if split is not None and not any(len(shard.offsets) for shard in read):
            raise TableError(
                f"{self.path}: no usable image in split {split!r}; make the manifest with --split, "
                "or with train= and val= tables"
            )
        return read
