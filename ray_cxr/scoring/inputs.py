"""The rows to score, from a manifest or the listing of a folder, with only ids and paths in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr.data import manifest as manifests
from ray_cxr.data.ranges import group_by_archive
from ray_cxr.storage import atomic

#: Row groups of the frozen input: at least 8,192 rows each, and about 1,000 groups at most. For each task a worker
#: reads the groups of its rows and the file's footer, which grows with the number of groups.
_GROUP_ROWS, _MAX_GROUPS = 8192, 1000


@dataclass
class InputRows:
    """The rows of a run, in the order of reading.

    Attributes:
        digest: of all columns, see `manifest.digest`.
        notes: sentences about files in a folder that are not images.
        freeze: writes all columns to a Parquet file with row groups of the given size.
    """

    ids: pa.ChunkedArray
    paths: pa.ChunkedArray
    digest: str
    notes: list[str]
    freeze: Callable[[Path, int], None]

    def __len__(self) -> int:
        return len(self.ids)

    def release(self) -> None:
        """Free all columns but the ids."""
        self.paths = pa.chunked_array([], pa.string())
        self.freeze = lambda path, rows: None


def group_rows(rows: int, rows_per_file: int) -> int:
    """Return the rows per row group of the frozen input: whole ranges, so that a worker reads few rows of others."""
    return rows_per_file * -(-max(_GROUP_ROWS, rows // _MAX_GROUPS) // rows_per_file)


def read_manifest(path: str | Path) -> InputRows:
    """Read the rows of a manifest."""
    with manifests.open_manifest(path) as file:
        paths = file.column("path")
        if any(pc.any(pc.match_substring(part, "::")).as_py() for part in paths.chunks):
            return _from_table(file.read())
        ids = file.column("image_id")
        notes = manifests.listing_notes(pa.schema([], metadata=file.metadata).empty_table())
        digest = file.digest({"image_id": ids, "path": paths})
        return InputRows(ids, paths, digest, notes, lambda to, rows: _copy_manifest(path, to, rows))


def list_folder(location: str) -> InputRows:
    """List the images below a folder or URI."""
    return _from_table(manifests.manifest_of_images(location))


def _from_table(table: pa.Table) -> InputRows:
    """Return the rows of a manifest in memory, with the rows of each archive moved together."""
    table = group_by_archive(table)
    return InputRows(
        table["image_id"],
        table["path"],
        manifests.digest(table),
        manifests.listing_notes(table),
        lambda to, rows: atomic.write_parquet(table, to, row_group_size=rows),
    )


def _copy_manifest(path: str | Path, to: Path, rows: int) -> None:
    with manifests.open_manifest(path) as file:
        atomic.write(to, lambda part: file.copy(part, rows))
