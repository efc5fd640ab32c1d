"""Partition the rows of a table into output files and tasks; one task reads each archive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr.storage.paths import MEMBER_PATTERN, iter_slices, split_member


def first_location(paths: pa.ChunkedArray) -> str | None:
    """Return the path of the first image of a table, or of its archive; None if the table has no paths."""
    named = paths.drop_null()
    if not len(named):
        return None
    path: str = named[0].as_py()
    inside = split_member(path)
    return inside[0] if inside else path


@dataclass(frozen=True)
class Range:
    """Rows of a table that become the output file number `index`."""

    index: int
    start: int
    rows: int


@dataclass(frozen=True)
class Unit:
    """The input of one task: an archive, read in one pass for all ranges; or one range of single files and None."""

    archive: str | None
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
    found: list[Unit] = []
    index = 0
    edges = np.flatnonzero(np.diff(codes)) + 1
    for start, end in zip([0, *edges.tolist()], [*edges.tolist(), len(codes)], strict=True):
        ranges = [
            Range(index + i, at, min(rows_per_file, end - at)) for i, at in enumerate(range(start, end, rows_per_file))
        ]
        if not ranges:
            continue
        index += len(ranges)
        code = int(codes[start])
        if code < 0:
            found += [Unit(None, (range_,)) for range_ in ranges]
        else:
            found.append(Unit(names[code], tuple(ranges)))
    return found


def _archives(paths: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Return each row's archive, int32 [n], -1 for none, and the archives in order of their first appearance."""
    numbers: dict[str, int] = {}
    codes = np.full(len(paths), -1, np.int32)
    at = 0
    for part in iter_slices(paths):
        if pc.any(pc.match_substring(part, "::")).as_py():
            archive = pc.struct_field(pc.extract_regex(part, MEMBER_PATTERN), "archive").dictionary_encode()
            # The last entry is for index -1, which means null.
            lookup = np.array(
                [*(numbers.setdefault(name, len(numbers)) for name in archive.dictionary.to_pylist()), -1]
            )
            codes[at : at + len(part)] = lookup[archive.indices.fill_null(-1).to_numpy()]
        at += len(part)
    return codes, list(numbers)
