"""The rows to score, from a manifest or the listing of a folder; only their ids and paths are kept in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr.data import manifest as manifests
from ray_cxr.data.partition import group_by_archive
from ray_cxr.data.prepared import PreparedSet, Scan
from ray_cxr.scoring.selection import Selection
from ray_cxr.storage import atomic
from ray_cxr.storage.paths import find_dicomweb

#: The frozen input has row groups of at least 8,192 rows, and at most about 1,000 groups. For each task a worker reads
#: the row groups of the task, and the footer of the file, which grows with the number of groups.
_GROUP_ROWS, _MAX_GROUPS = 8192, 1000


@dataclass
class InputRows:
    """The rows of a run, in the order of reading.

    Attributes:
        digest: digest of all columns, see `manifest.digest`.
        in_pacs: path of the first image that is in a PACS; None if there is none.
        notes: sentences about files in the folder that are not images.
        source: all columns, or the manifest that holds them.
        selection: what was left out before; None if nothing was chosen.
    """

    ids: pa.ChunkedArray
    paths: pa.ChunkedArray
    digest: str
    notes: list[str]
    source: pa.Table | str | Path
    in_pacs: str | None = None
    selection: Selection | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def read_table(self) -> pa.Table:
        """Return all columns."""
        return self.source if isinstance(self.source, pa.Table) else manifests.read_manifest(self.source)

    def freeze(self, path: Path, rows_per_group: int) -> None:
        """Write all columns to a Parquet file."""
        if isinstance(self.source, pa.Table):
            atomic.write_parquet(self.source, path, row_group_size=rows_per_group)
            return
        with manifests.open_manifest(self.source) as file:
            atomic.write(path, lambda part: file.copy(part, rows_per_group))

    def release(self) -> None:
        """Free all columns but the ids."""
        self.paths, self.source = pa.chunked_array([], pa.string()), ""


def group_rows(rows: int, rows_per_file: int) -> int:
    """Return the rows per row group of the frozen input: a multiple of a range, so that tasks share few groups."""
    return rows_per_file * -(-max(_GROUP_ROWS, rows // _MAX_GROUPS) // rows_per_file)


def read_frozen(path: Path) -> InputRows:
    """Read the input that an earlier command froze, with its selection."""
    with manifests.open_manifest(path) as file:
        selection = Selection.from_metadata(file.metadata)
    return replace(read_manifest(path), selection=selection)


def read_manifest(path: str | Path) -> InputRows:
    """Read the rows of a manifest."""
    with manifests.open_manifest(path) as file:
        paths = file.column("path")
        if any(pc.any(pc.match_substring(part, "::")).as_py() for part in paths.chunks):
            return _from_table(file.read())
        ids = file.column("image_id")
        notes = manifests.listing_notes(pa.schema([], metadata=file.metadata).empty_table())
        digest = file.digest({"image_id": ids, "path": paths})
        return InputRows(ids, paths, digest, notes, path, find_dicomweb(paths))


def read_prepared(data: PreparedSet, scan: Scan) -> InputRows:
    """Return the rows of a prepared set in the order of its shards; their paths are not read."""
    table = scan.rows.replace_schema_metadata(data.manifest_metadata())
    paths = pa.chunked_array([pa.nulls(len(table), pa.string())])
    return InputRows(table["image_id"], paths, manifests.digest(table), [], table)


def list_folder(location: str) -> InputRows:
    """List the images below a folder or URI."""
    return _from_table(manifests.manifest_of_images(location))


def list_search(address: str, **options: Any) -> InputRows:
    """List the radiographs that a search of a PACS finds; the options are those of `list_radiographs`."""
    from ray_cxr.data.dicomweb_listing import list_radiographs  # pydicom is slow to import

    return _from_table(list_radiographs(address, **options))


def select(rows: InputRows, kept: np.ndarray, selection: Selection) -> InputRows:
    """Return chosen rows, bool [n], with the selection in their metadata."""
    table = rows.read_table()
    table = table.filter(pa.array(kept)).replace_schema_metadata(
        {**(table.schema.metadata or {}), **selection.to_metadata()}
    )
    return replace(_from_table(table), notes=rows.notes, selection=selection)


def _from_table(table: pa.Table) -> InputRows:
    """Return the rows of a manifest in memory, with the rows of each archive moved together."""
    table = group_by_archive(table)
    digest, notes = manifests.digest(table), manifests.listing_notes(table)
    return InputRows(table["image_id"], table["path"], digest, notes, table, find_dicomweb(table["path"]))
