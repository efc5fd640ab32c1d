"""Manifests: one Parquet row per image with its path, patient, split and labels."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_cxr import labels
from ray_cxr.data import identity
from ray_cxr.errors import TableError
from ray_cxr.imaging.demographics import MAX_AGE_YEARS
from ray_cxr.storage import atomic, contents, remote
from ray_cxr.storage.files import Listing, find_images
from ray_cxr.storage.paths import explain_suffixes, file_names, format_suffixes, make_absolute, plain_path, plain_paths

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("patient_id", pa.string()),
        ("study_id", pa.string()),
        ("age", pa.float64()),
        ("sex", pa.string()),
        ("view", pa.string()),
        ("follow_up", pa.int32()),
        ("split", pa.string()),
        *((label, pa.int8()) for label in labels.LABELS),
    ]
)
#: Metadata entries: how the manifest was split, and which files of a listed folder are not images.
SPLIT_KEY = b"ray_cxr.split"
LISTING_KEY = b"ray_cxr.listing"
#: A kind of objects that a listing of a PACS leaves out by default.
CAPTURES = "Secondary Capture"
SPLITS = ("train", "val", "test")
#: Small row groups let a scoring task read its own rows only.
_ROW_GROUP_SIZE = 8192


def write_manifest(table: pa.Table, out: str | Path) -> None:
    """Write a manifest atomically: readers see the old file or the new one."""
    out = remote.to_path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_parquet(table, out, row_group_size=_ROW_GROUP_SIZE)


def read_manifest(path: str | Path) -> pa.Table:
    """Return a manifest's columns in `SCHEMA` order, checked. Absent columns, except image_id, become nulls."""
    with open_manifest(path) as file:
        return file.read()


def check_manifest(table: pa.Table, name: str) -> pa.Table:
    """Return the columns of a manifest in memory, checked as by `read_manifest`; `name` starts messages."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    with pq.ParquetFile(pa.BufferReader(sink.getvalue())) as file:
        return ManifestFile(name, file).read()


@contextmanager
def open_manifest(path: str | Path) -> Iterator[ManifestFile]:
    """Open a manifest to read single columns or batches."""
    try:
        file = pq.ParquetFile(remote.to_path(path))
    except (OSError, pa.ArrowInvalid):
        raise TableError(contents.explain(path, "a manifest", "make one with `ray-cxr manifest`")) from None
    with file:
        yield ManifestFile(path, file)


class ManifestFile:
    """An open manifest. A million rows take much memory, so columns and batches are read one at a time."""

    def __init__(self, path: str | Path, file: pq.ParquetFile) -> None:
        self._path, self._file = path, file
        self.metadata: dict[bytes, bytes] | None = file.schema_arrow.metadata
        if "image_id" not in file.schema_arrow.names:
            remedy = "it has no column image_id; make one with `ray-cxr manifest`"
            raise TableError(contents.explain(path, "a manifest", remedy))
        if repeats := sorted(name for name, count in Counter(file.schema_arrow.names).items() if count > 1):
            raise TableError(f"{path}: has two columns {repeats[0]}; keep one")

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column of `SCHEMA`, after checking its type and values."""
        kind = SCHEMA.field(name).type
        if name not in self._file.schema_arrow.names:
            return pa.chunked_array([pa.nulls(len(self), kind)], kind)
        try:
            column = self._file.read(columns=[name], use_threads=False)[name]
        except (OSError, pa.ArrowException):
            raise TableError(f"{self._path}: damaged; make it again with `ray-cxr manifest`") from None
        if name in identity.COLUMNS:
            ids = identity.read_ids(column, name, str(self._path))
            if name == "image_id" and ids.null_count:
                raise TableError(f"{self._path}: {ids.null_count:,} rows have no image_id; remove or name them")
            if name == "image_id" and (repeats := len(ids) - pc.count_distinct(ids).as_py()):
                raise TableError(f"{self._path}: {repeats:,} rows repeat an image_id; keep one row per image")
            return ids
        try:
            column = column.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise TableError(f"{self._path}: column {name} is {column.type}, not {kind}") from None
        allowed = SPLITS if name == "split" else (0, 1) if name in labels.LABELS else None
        if allowed is not None:
            others = [value for value in column.unique().to_pylist() if value is not None and value not in allowed]
            if others:
                expected = ", ".join(map(str, allowed))
                raise TableError(f"{self._path}: column {name} holds {others[:5]}; use {expected} and null only")
        if name == "age":
            # NaN, which is unknown, compares as false.
            wrong = column.filter(pc.or_(pc.less(column, 0), pc.greater(column, MAX_AGE_YEARS)))
            if len(wrong):
                expected = f"years from 0 to {MAX_AGE_YEARS:g}, or null"
                raise TableError(f"{self._path}: column age holds {wrong[0].as_py():g}; use {expected}")
        return column

    def read(self) -> pa.Table:
        """Return all rows and columns."""
        columns = [self.column(name) for name in SCHEMA.names]
        return pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(self.metadata))

    def digest(self, loaded: Mapping[str, pa.ChunkedArray]) -> str:
        """Return `digest` of the table. Columns that are not in `loaded` are read one at a time."""
        return _digest_columns(lambda name: loaded[name] if name in loaded else self.column(name))

    def copy(self, target: Path, row_group_size: int) -> None:
        """Write the columns of `SCHEMA` as a Parquet file, with one row group in memory at a time."""
        schema = SCHEMA.with_metadata(self.metadata)
        names = [name for name in SCHEMA.names if name in self._file.schema_arrow.names]

        def cast(batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
            if field.name not in names:
                return pa.nulls(len(batch), field.type)
            column = batch.column(field.name)
            return identity.to_text(column, field.name) if field.name in identity.COLUMNS else column.cast(field.type)

        with pq.ParquetWriter(target, schema) as writer:
            for batch in self._file.iter_batches(batch_size=row_group_size, columns=names):
                arrays = [cast(batch, field) for field in SCHEMA]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema), row_group_size=row_group_size)


def digest(table: pa.Table) -> str:
    """Return the SHA-256 of a manifest's values, hex; the layout of the file does not matter."""
    return _digest_columns(lambda name: table[name])


def _digest_columns(column_of: Callable[[str], pa.ChunkedArray]) -> str:
    sink = hashlib.sha256()
    for field in SCHEMA:
        column = column_of(field.name)
        # Values only: the filling of nulls and the row groups differ between files.
        sink.update(np.packbits(_to_numpy(column.is_valid(), bool)).tobytes())
        if pa.types.is_string(field.type):
            # Chunk by chunk, to avoid a copy of a million paths.
            sink.update(_to_numpy(pc.fill_null(pc.binary_length(column), 0), np.int32).tobytes())
            for chunk in column.chunks:
                texts = chunk.fill_null("")
                if len(texts):
                    edges = np.frombuffer(texts.buffers()[1], np.int32)
                    start, end = int(edges[texts.offset]), int(edges[texts.offset + len(texts)])
                    sink.update(memoryview(texts.buffers()[2] or b"")[start:end])
        else:
            sink.update(_to_numpy(column.fill_null(0), field.type.to_pandas_dtype()).tobytes())
    return sink.hexdigest()


def _to_numpy(column: pa.ChunkedArray, dtype: Any) -> np.ndarray:
    """Return a column without nulls as one array."""
    chunks = [np.asarray(chunk.to_numpy(zero_copy_only=False), dtype) for chunk in column.chunks]
    return np.concatenate([np.empty(0, dtype), *chunks])


def has_split(path: str | Path, name: str) -> bool:
    """Return whether a manifest has rows of a split."""
    with open_manifest(path) as file:
        return name in pc.unique(file.column("split")).to_pylist()


def split_info(table: pa.Table) -> dict[str, Any]:
    """Return the metadata that describes the split; `{}` if there is none."""
    try:
        info = json.loads((table.schema.metadata or {}).get(SPLIT_KEY, b"{}"))
    except ValueError:
        raise TableError("the manifest's metadata entry ray_cxr.split is not JSON; make the manifest again") from None
    return info if isinstance(info, dict) else {}


def manifest_of_images(location: str) -> pa.Table:
    """Return a manifest of every image in a folder, an archive or a URI, without labels.

    The image_ids are file names if these are unique; otherwise all are paths below the folder (`sub/a.png`,
    `images_001.tar.gz::images/a.png`). `listing_notes` describes the other files in the folder.
    """
    listing = find_images(location)
    ids = file_names(listing.paths)
    if pc.count_distinct(ids).as_py() < len(ids):
        ids = pc.binary_replace_slice(plain_paths(listing.paths), 0, len(plain_path(listing.root).encode()), "")
    # Columns of one type share their nulls, which saves 30 bytes per row.
    nulls = {field.type: pa.nulls(len(ids), field.type) for field in SCHEMA}
    columns = {field.name: nulls[field.type] for field in SCHEMA} | {"image_id": ids, "path": absolute_paths(listing)}
    notes = json.dumps({"left_out": listing.left_out, "unpacked": listing.unpacked}, sort_keys=True)
    return pa.table(columns, schema=SCHEMA.with_metadata({LISTING_KEY: notes.encode()}))


def listing_notes(table: pa.Table) -> list[str]:
    """Return sentences about the files that `manifest_of_images` left out; `[]` for other manifests."""
    return describe_notes(table.schema.metadata)


def describe_notes(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    """Return `listing_notes` from the metadata of a manifest."""
    try:
        notes = json.loads((metadata or {}).get(LISTING_KEY, b"{}"))
        lines = describe_kinds(notes["kinds"]) if notes.get("kinds") else []
        if gaps := notes.get("gaps"):
            lines.append(f"WARNING: the listing is not complete: {format_counts(gaps)}")
        if repeats := notes.get("repeats"):
            lines.append(
                f"{repeats:,} images have a SOP Instance UID that another image has too; their image_id is "
                "STUDY/SERIES/INSTANCE"
            )
        return describe_listing(notes.get("left_out", {}), notes.get("unpacked", 0)) + lines
    except (ValueError, AttributeError, TypeError):
        return []


def describe_listing(left_out: dict[str, int], unpacked: int) -> list[str]:
    """Return `Listing.left_out` and `Listing.unpacked` as sentences; counts of 0 are left out."""
    lines = []
    if left_out:
        lines.append(f"files left out because they are not images: {format_suffixes(left_out)}")
        lines += explain_suffixes(left_out)
    if unpacked:
        lines.append(f"{unpacked:,} archive members left out because their files are also next to the archive")
    return lines


def describe_kinds(kinds: Mapping[str, int]) -> list[str]:
    """Return the objects of a PACS that are no radiographs, by kind, as sentences."""
    lines = [f"objects left out because they are not radiographs: {format_counts(kinds)}"]
    if CAPTURES in kinds:
        lines.append(f"to include {CAPTURES}, for example scanned films, pass --set pacs.captures=true")
    return lines


def format_counts(counts: Mapping[str, int]) -> str:
    """Return counts as text, the largest first: `12 SR, 3 PR`."""
    return ", ".join(f"{count:,} {name}" for name, count in Counter(counts).most_common())


def absolute_paths(listing: Listing) -> pa.ChunkedArray:
    """Return the paths of a listing, made absolute as `make_absolute` does."""
    root = make_absolute(listing.root.removesuffix("/"))
    if listing.root.endswith("/"):
        root = root.rstrip("/") + "/"
    return pc.binary_replace_slice(listing.paths, 0, len(listing.root.encode()), root)
