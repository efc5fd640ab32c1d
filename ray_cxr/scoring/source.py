"""What is to be scored: a manifest, or the listing of a folder, without holding all of it in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr.data import manifest as manifests
from ray_cxr.data.ranges import group_by_archive
from ray_cxr.storage import atomic

#: Row groups of the frozen input: of so many rows at least, and about so many at most. A worker reads the groups of its
#: own rows and, each time, the file's footer, which grows with their number.
_GROUP_ROWS, _MAX_GROUPS = 8192, 1000


@dataclass(frozen=True)
class Source:
    """The rows of a run, in the order of reading.

    Attributes:
        ids, paths: string [n].
        digest: of all columns, see `manifest.digest`.
        notes: what a folder holds besides its images, in sentences.
        freeze: writes all columns to a Parquet file with row groups of so many rows.
    """

    ids: pa.ChunkedArray
    paths: pa.ChunkedArray
    digest: str
    notes: list[str]
    freeze: Callable[[Path, int], None]

    def __len__(self) -> int:
        return len(self.ids)


def group_rows(rows: int, rows_per_file: int) -> int:
    """Rows of a row group of the frozen input: whole ranges, so that a worker reads its own rows and few others."""
    return rows_per_file * -(-max(_GROUP_ROWS, rows // _MAX_GROUPS) // rows_per_file)


def of_manifest(path: str | Path) -> Source:
    """A manifest's rows.

    Raises:
        TableError: it is none.
    """
    with manifests.open_manifest(path) as file:
        paths = file.column("path")
        if any(pc.any(pc.match_substring(part, "::")).as_py() for part in paths.chunks):
            return of_table(file.read())
        ids = file.column("image_id")
        notes = manifests.listing_notes(pa.schema([], metadata=file.metadata).empty_table())
        digest = file.digest({"image_id": ids, "path": paths})
        return Source(ids, paths, digest, notes, lambda to, rows: _freeze_file(path, to, rows))


def of_folder(location: str) -> Source:
    """The pictures below a folder or URI, as they are now.

    Raises:
        InputError: no such folder, or no pictures in it.
    """
    return of_table(manifests.manifest_of_images(location))


def of_table(table: pa.Table) -> Source:
    """A manifest in memory; rows inside archives are moved together."""
    table = group_by_archive(table)
    return Source(
        table["image_id"],
        table["path"],
        manifests.digest(table),
        manifests.listing_notes(table),
        lambda to, rows: atomic.write_parquet(table, to, row_group_size=rows),
    )


def _freeze_file(path: str | Path, to: Path, rows: int) -> None:
    with manifests.open_manifest(path) as file:
        atomic.write(to, lambda part: file.copy(part, rows))
