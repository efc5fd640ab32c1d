"""Shards of prepared sets: their format, writing them, and reading single images from them.

A shard is an uncompressed Arrow IPC file of one record batch, so an image is S*S bytes at a known offset. Training
reads each image straight from its shard, in a new random order every epoch. Nothing is unpacked or copied first, and
all workers of a node share the system's cache of these files. Only names and labels use memory of the process
(docs/decisions/0009-arrow-shards.md).
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr.data import manifest as manifests
from ray_cxr.errors import OutputError
from ray_cxr.imaging.sandbox import DecodedImage, Failure
from ray_cxr.storage import atomic, remote

#: Open shards per `Pixels`: two sets stay below the 256 files that a process may open on macOS.
OPEN_SHARDS = 100
#: Maximum bytes per read: systems refuse or truncate reads of 2 GiB and more.
READ_BYTES = 2**30
#: Key of the schema's metadata: a JSON object, the number of images by quality flag; absent if there are none.
FLAGS_KEY = b"flags"
#: Key of the schema's metadata: a JSON object, `Details` by row of the shard, only of rows that have some. Shards of
#: earlier versions lack the key.
DETAILS_KEY = b"details"
#: Fields of DICOM headers that a shard keeps: none that identify a patient.
_HEADER_FIELDS = ("age", "sex", "view")


def shard_schema(size: int) -> pa.Schema:
    """Return the manifest's columns, then `image` (uint8 [size*size], row-major; null on failure) and the error."""
    return pa.schema(
        [*manifests.SCHEMA, ("image", pa.binary(size * size)), ("error_code", pa.string()), ("error", pa.string())]
    )


def shard_name(index: int) -> str:
    return f"part-{index:05d}.arrow"


@dataclass(frozen=True)
class Details:
    """What the header of a DICOM file says about an image: quality flags, and fields that fill gaps of a manifest."""

    flags: Sequence[str]
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, outcome: DecodedImage | Failure) -> Details | None:
        """Return the details of an outcome; None if there are none."""
        flags = () if isinstance(outcome, Failure) else outcome.flags
        known = outcome.tags or {}
        fields = {name: known[name] for name in _HEADER_FIELDS if known.get(name) is not None}
        return cls(flags, fields) if flags or fields else None


class ShardWriter:
    """Fill the missing shards of one unit at one size in order, and write each when it is full.

    `rows` are the manifest's rows of the unit. `lengths` has the number of rows of each shard of the unit, by index.
    `position` is the index of this size in `DecodedImage.images`. `wanted`, bool [n], is true for the rows that no
    shard holds yet.
    """

    def __init__(self, folder: Path, size: int, position: int, rows: pa.Table, lengths: dict[int, int]) -> None:
        self._folder, self._size, self._position, self._rows = folder, size, position, rows
        existing = [index for index in lengths if (folder / shard_name(index)).exists()]
        self.wanted = np.ones(len(rows), bool)
        if existing and len(lengths) == 1:
            self.wanted[:] = False
        elif existing:
            # The order of an archive's members decides which rows a shard holds, so the shards are read for their ids.
            ids = [read_shard(folder / shard_name(index), size, ["image_id"]).table["image_id"] for index in existing]
            self.wanted &= ~pc.is_in(rows["image_id"], value_set=pa.concat_arrays(ids)).to_numpy()
        self._missing = {index: count for index, count in lengths.items() if index not in existing}
        if self.wanted.sum() != sum(self._missing.values()):
            names = ", ".join(map(shard_name, existing[:3])) + " ..." * (len(existing) > 3)
            raise OutputError(f"{folder}: unexpected rows in {names}; remove them and run `ray-cxr prepare` again")
        self._order: list[int] = []
        self._images: list[bytes | None] = []
        self._errors: list[tuple[str | None, str | None]] = []  # code and message
        self._flags: Counter[str] = Counter()
        self._details: dict[int, Details] = {}

    def add(self, row: int, outcome: DecodedImage | Failure) -> None:
        """Append the outcome of a row, if it is wanted."""
        if not self.wanted[row]:
            return
        if details := Details.of(outcome):
            self._details[len(self._order)] = details
        self._order.append(row)
        if isinstance(outcome, Failure):
            self._images.append(None)
            self._errors.append((outcome.code, outcome.message))
        else:
            self._images.append(outcome.images[self._position].tobytes())
            self._errors.append((None, None))
            self._flags.update(outcome.flags)
        index = next(iter(self._missing))
        if len(self._order) == self._missing[index]:
            self._write(index)

    def _write(self, index: int) -> None:
        rows = self._rows.take(pa.array(self._order))
        arrays = [rows[name] for name in manifests.SCHEMA.names]
        arrays += [
            pa.array(self._images, pa.binary(self._size**2)),
            *(pa.array(column, pa.string()) for column in zip(*self._errors, strict=True)),
        ]
        shard = pa.Table.from_arrays(arrays, schema=shard_schema(self._size))
        metadata = {DETAILS_KEY: json.dumps({row: vars(details) for row, details in self._details.items()})}
        if self._flags:
            metadata[FLAGS_KEY] = json.dumps(self._flags, sort_keys=True)
        shard = shard.replace_schema_metadata(metadata)
        atomic.write_arrow(shard, self._folder / shard_name(index))
        del self._missing[index]
        for column in (self._order, self._images, self._errors, self._flags, self._details):
            column.clear()


def read_outcomes(path: Path, size: int) -> tuple[pa.Array, Counter[str]]:
    """Return the column error_code of a shard, and its number of images by quality flag, without fetching pixels."""
    try:
        with remote.open_file(path) as source:
            schema = pa.ipc.open_file(source).schema
            if not schema.equals(shard_schema(size)):
                raise _damaged(path)
            flags = Counter(json.loads((schema.metadata or {}).get(FLAGS_KEY, b"{}")))
            only = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index("error_code")])
            batch = pa.ipc.open_file(source, options=only).get_batch(0)
            batch.validate()
            # `take` copies, because the column may be in a memory map.
            return batch.column(0).take(pa.array(np.arange(len(batch)))), flags
    except FileNotFoundError:
        raise missing_shard(path) from None
    except (OSError, ValueError, pa.ArrowException):  # ValueError: metadata that is not JSON
        raise _damaged(path) from None


@dataclass(frozen=True)
class ShardRows:
    """Some columns and rows of one shard, copied from the file."""

    table: pa.RecordBatch
    offsets: np.ndarray  # int64 [n], start of each row's image in the file, bytes; undefined where the image is null
    length: int  # length of the file, bytes
    metadata: Mapping[bytes, bytes]  # of the schema

    @property
    def details(self) -> dict[int, Details] | None:
        """Return the details of rows that have some, of a shard that was read whole; None if it does not hold them."""
        if DETAILS_KEY not in self.metadata:
            return None
        return {int(row): Details(**found) for row, found in json.loads(self.metadata[DETAILS_KEY]).items()}


def read_shard(path: Path, size: int, columns: Sequence[str], split: str | None = None) -> ShardRows:
    """Return columns of a shard without its pixels: of all rows, or of the usable rows of a split."""
    # Arrow maps the whole file and reads only the pages that are used. `included_fields` would use more memory, because
    # it allocates the whole batch with the images.
    try:
        with pa.memory_map(os.fspath(path)) as source:
            file = source.read_buffer()
            reader = pa.ipc.open_file(file)
            if reader.num_record_batches != 1 or not reader.schema.equals(shard_schema(size)):
                raise pa.ArrowInvalid("other batches or columns")
            batch = reader.get_batch(0)
            batch.validate()
    except FileNotFoundError:
        raise missing_shard(path) from None
    except PermissionError:
        raise OutputError(f"{path}: permission denied; change its permissions") from None
    except (OSError, pa.ArrowException):
        raise _damaged(path) from None
    images = batch.column("image")
    pixels = images.buffers()[1]
    first = pixels.address - file.address
    if not 0 <= first <= file.size - pixels.size:
        raise _damaged(path)  # a compressed batch, which Arrow unpacked outside the mapped file
    if split is None:
        rows = np.arange(len(batch))
    else:
        usable = pc.and_(pc.equal(batch["split"], split), pc.is_null(batch["error_code"]))
        rows = pc.indices_nonzero(usable).to_numpy().astype(np.int64)
    # `take` copies: the rows must not keep the whole file mapped.
    offsets = first + (images.offset + rows) * size * size
    return ShardRows(batch.select(columns).take(rows), offsets, file.size, reader.schema.metadata or {})


def missing_shard(path: Path | str) -> OutputError:
    return OutputError(f"{path}: missing; run `ray-cxr prepare` again to make it")


def _damaged(path: Path) -> OutputError:
    return OutputError(f"{path}: damaged or not a shard; remove it and run `ray-cxr prepare` again")


class Pixels:
    """The images of a split, uint8 [N,S,S], read from their shards on demand.

    `pixels[rows]` reads rows into a new uint8 array: [n,S,S], or [S,S] for one number. `rows` is a numpy index of one
    axis: an array of row numbers in any order, repeated or not, a slice, or a number. `np.asarray(pixels)` reads all
    rows. Between reads, the object holds 12 bytes per image and at most `OPEN_SHARDS` open files. Threads take turns.

    `lengths` are the sizes of the shards in bytes. Image i is in shard `shard_of[i]` (int32) from byte `offsets[i]`
    (int64). Reading raises `OutputError` if a shard is missing or changed.
    """

    def __init__(
        self, paths: Sequence[Path], lengths: Sequence[int], shard_of: np.ndarray, offsets: np.ndarray, size: int
    ) -> None:
        # Absolute, because shards are opened later and the working directory may change.
        self._paths, self._lengths = [path.absolute() for path in paths], list(lengths)
        self._shard_of, self._offsets, self.size = shard_of, offsets, size
        self._open: OrderedDict[int, int] = OrderedDict()  # descriptors by shard, least recently used first
        # Otherwise one thread could close a descriptor that another is about to read.
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
            raise ValueError("pixels are read from files, so an array of them is always a copy")
        return self[:].astype(dtype or self.dtype, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Pixels, (self._paths, self._lengths, self._shard_of, self._offsets, self.size)

    def _read(self, into: np.ndarray, shard_of: np.ndarray, offsets: np.ndarray) -> None:
        """Read consecutive images of a file in one read."""
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
                # Not a memory map, whose pages would count as memory of this process, up to the whole set.
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
    return OutputError(f"{path}: changed since it was opened; remove it and run `ray-cxr prepare` again")
