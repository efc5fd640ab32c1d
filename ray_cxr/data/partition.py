"""Partition the rows of a table into output files and tasks; one task reads each archive."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr.storage.paths import MEMBER_PATTERN, iter_slices, split_member


def first_location(paths: pa.ChunkedArray) -> str | None:
    """Return the path of the first image of a table, or of the image's archive; None if the table has no paths."""
    path: str | None = next((path.as_py() for path in paths if path.is_valid), None)
    parts = split_member(path)
    return parts[0] if parts else path


@dataclass(frozen=True)
class Range:
    """Rows of a table that become the output file number `index`."""

    index: int
    start: int
    rows: int


@dataclass(frozen=True)
class Unit:
    """The input of one task: an archive, which is read in one pass for all ranges, or one range of single files."""

    archive: str | None  # None for single files
    ranges: tuple[Range, ...]

    @property
    def rows(self) -> int:
        return sum(range_.rows for range_ in self.ranges)


def group_by_archive(table: pa.Table) -> pa.Table:
    """Sort a table with a column `path`, stably, so that the rows of each archive are together. Single files and rows
    without a path come first, then the archives by their first appearance. A sorted table is returned unchanged.
    """
    codes, _ = _archives(table["path"])
    order = np.argsort(codes, kind="stable")
    if (codes[order] == codes).all():
        return table
    return table.take(pa.array(order))


def plan_units(paths: pa.ChunkedArray, rows_per_file: int) -> list[Unit]:
    """Cut a table in reading order into output files of at most `rows_per_file` rows, and tasks. No range spans two
    archives, or an archive and single files. Ranges are numbered from 0 in the table's order.
    """
    codes, names = _archives(paths)
    units: list[Unit] = []
    index = 0
    edges = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    for start, end in pairwise(edges if len(codes) else []):
        starts = range(start, end, rows_per_file)
        ranges = [Range(index + i, row, min(rows_per_file, end - row)) for i, row in enumerate(starts)]
        index += len(ranges)
        if codes[start] < 0:
            units += [Unit(None, (range_,)) for range_ in ranges]
        else:
            units.append(Unit(names[codes[start]], tuple(ranges)))
    return units


def _archives(paths: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Return each row's archive, int32 [n], -1 for none, and the archives in order of their first appearance."""
    numbers: dict[str, int] = {}
    codes = np.full(len(paths), -1, np.int32)
    row = 0
    for part in iter_slices(paths):
        if pc.any(pc.match_substring(part, "::")).as_py():
            archive = pc.struct_field(pc.extract_regex(part, MEMBER_PATTERN), "archive").dictionary_encode()
            lookup = [numbers.setdefault(name, len(numbers)) for name in archive.dictionary.to_pylist()]
            # The last entry is for index -1, which means null.
            codes[row : row + len(part)] = np.array([*lookup, -1])[archive.indices.fill_null(-1).to_numpy()]
        row += len(part)
    return codes, list(numbers)
