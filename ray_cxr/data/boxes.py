"""Boxes that radiologists drew around findings: NIH's BBox_List_2017 and its copies.

The original header breaks `Bbox [x,y,w,h]` at the commas, ends with three empty columns, and spells Infiltration as
Infiltrate. Copies quote the bracket, or have plain columns x, y, w, h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ray_cxr.data.csv_table import COLUMNS, CsvTable, normalize_header, read_csv
from ray_cxr.errors import TableError
from ray_cxr.labels import FINDINGS, canonicalize, suggest
from ray_cxr.storage.files import hash_file

#: NIH drew on PNGs of this side length, so its boxes are in these pixels for files of any size.
IMAGE_SIDE = 1024

_NUMBERS = {"x": ("bboxx", "x"), "y": ("bboxy", "y"), "w": ("bboxw", "w", "width"), "h": ("bboxh", "h", "height")}
_COLUMNS = {
    "image_id": COLUMNS["image_id"],
    "finding": ("findinglabel", "findinglabels", "finding", "label"),
    **_NUMBERS,
}


@dataclass(frozen=True, eq=False)
class Boxes:
    """One row per box; a finding may have several boxes in an image."""

    image_ids: np.ndarray  # str objects [n]
    findings: np.ndarray  # str objects [n], canonical
    xywh: np.ndarray  # float64 [n,4]: left, top (y downwards), width and height, pixels
    image_side: int  # side of the square image on which the boxes were drawn, pixels
    source: str  # origin of the boxes, as text
    digest: str  # SHA-256 of the file, hex

    def __len__(self) -> int:
        return len(self.image_ids)


def read_boxes(path: str) -> Boxes:
    """Read a table of boxes, CSV as `csv_table` reads it, in NIH's form; errors name the line."""
    table = read_csv(path)
    columns = _find_columns(table)
    return Boxes(
        image_ids=table.read_image_ids({"image_id": columns["image_id"]}).to_numpy(dtype=object),
        findings=_read_findings(table, columns["finding"]),
        xywh=_read_numbers(table, columns),
        image_side=IMAGE_SIDE,
        source="boxes drawn by a radiologist on NIH images (BBox_List_2017; Wang et al., CVPR 2017)",
        digest=hash_file(path),
    )


def _find_columns(table: CsvTable) -> dict[str, str]:
    columns, headers = table.find_columns(_COLUMNS), table.headers
    bracket = next((i for i, name in enumerate(headers) if normalize_header(name) == "bboxxywh"), len(headers))
    # Only the first of the four columns has a quoted bracket in its header.
    if bracket + 4 <= len(headers):
        columns.update(zip(_NUMBERS, headers[bracket : bracket + 4], strict=True))
    if missing := [name for name in _COLUMNS if name not in columns]:
        raise TableError(
            f"{table.path}: has no column for {', '.join(missing)}; a table of boxes has Image Index, Finding Label "
            f"and Bbox [x,y,w,h]; its columns are: {table.shown_headers()}"
        )
    return columns


def _read_findings(table: CsvTable, column: str) -> np.ndarray:
    text = table.rows[column]
    findings = text.map({value: canonicalize(value) for value in text.unique()})
    is_unknown = ~findings.isin(FINDINGS)
    if is_unknown.any():
        name = text[is_unknown].iloc[0].strip()
        raise table.error(is_unknown, f"unknown finding {name!r}{suggest(name, FINDINGS)}; use one of the 14 findings")
    return findings.to_numpy(dtype=object)


def _read_numbers(table: CsvTable, columns: dict[str, str]) -> np.ndarray:
    values = np.empty((len(table.rows), 4))
    for position, name in enumerate(_NUMBERS):
        text = table.read_numbers(columns[name])
        numbers = pd.to_numeric(text, errors="coerce").astype("float64")
        is_bad = ~numbers.between(-np.inf, np.inf, inclusive="neither")
        if is_bad.any():
            raise table.error(is_bad, f"{name} is {text[is_bad].iloc[0]!r}, not a number; correct the row")
        values[:, position] = numbers
    corner, size = values[:, :2], values[:, 2:]
    # Half a pixel of tolerance, for edges that were rounded to whole pixels.
    is_outside = ((size <= 0) | (corner < -0.5) | (corner + size > IMAGE_SIDE + 0.5)).any(axis=1)
    if is_outside.any():
        box = ", ".join(f"{value:g}" for value in values[int(np.argmax(is_outside))])
        raise table.error(
            pd.Series(is_outside, index=table.rows.index),
            f"the box x, y, w, h = {box} has no area or reaches out of the image; "
            f"boxes are in pixels of the {IMAGE_SIDE} x {IMAGE_SIDE} image",
        )
    return values
