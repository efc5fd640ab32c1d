"""Boxes that radiologists drew round findings: NIH's BBox_List_2017, in the spellings it is found in.

The file's header breaks `Bbox [x,y,w,h]` at the commas and has three empty columns at its end; it says Infiltrate for
Infiltration. Copies have the bracket whole (quoted) or plain columns x, y, w, h.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ray_cxr.data import identity, manifest
from ray_cxr.errors import TableError
from ray_cxr.labels import FINDINGS, NO_FINDING, canonical, suggestion

#: NIH drew on PNGs of this side, so its boxes are in these pixels whatever the size of the file at hand.
IMAGE_SIDE = 1024

_FINDING_WORDS = ("findinglabel", "findinglabels", "finding", "label")
_NUMBERS = {"x": ("bboxx", "x"), "y": ("bboxy", "y"), "w": ("bboxw", "w", "width"), "h": ("bboxh", "h", "height")}


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes as read, one row each; a finding may have several in an image.

    Attributes:
        image_ids: str objects [n].
        findings: str objects [n], canonical.
        xywh: float64 [n,4]: left, top, width and height in pixels of a square image of `image_side`; the picture
            reaches from 0 to `image_side` on both axes, y downwards.
        image_side: pixels.
        source: where the boxes come from, in words.
        digest: SHA-256 of the file, hex.
    """

    image_ids: np.ndarray
    findings: np.ndarray
    xywh: np.ndarray
    image_side: int
    source: str
    digest: str

    def __len__(self) -> int:
        return len(self.image_ids)


def read_boxes(path: str) -> Boxes:
    """Read a table of boxes, CSV or gzipped CSV, in NIH's form.

    Raises:
        TableError: no such file, a column is missing, an unknown finding, a number that is none, a box without area
            or one that reaches out of the picture; each with its line.
    """
    raw = manifest._read_csv(path)
    if not len(raw):
        raise TableError(f"{path}: the table has a header but no rows")
    columns = _identify(raw, path)
    ids = raw[columns["image"]].str.strip()
    if (ids == "").any():
        raise TableError(f"{path}: line {manifest._line(ids == '')} has no image name")
    identity.check_series(raw[columns["image"]], path, images=True)
    return Boxes(
        image_ids=ids.to_numpy(dtype=object),
        findings=_findings(raw[columns["finding"]], path),
        xywh=_numbers(raw, columns, path),
        image_side=IMAGE_SIDE,
        source="boxes drawn by a radiologist on NIH images (BBox_List_2017; Wang et al., CVPR 2017)",
        digest=manifest._sha256(path),
    )


def _identify(raw: pd.DataFrame, path: str) -> dict[str, str]:
    names = [str(name) for name in raw.columns]
    words = {manifest._word(name): name for name in reversed(names)}
    wanted = {"image": manifest._COLUMNS["image_id"], "finding": _FINDING_WORDS, **_NUMBERS}
    found = {name: next((words[word] for word in known if word in words), None) for name, known in wanted.items()}
    whole = words.get("bboxxywh")
    if whole is not None and names.index(whole) + 4 <= len(names):
        # The bracket is quoted, so that its name stands over the first of the four columns alone.
        start = names.index(whole)
        found.update(zip(_NUMBERS, names[start : start + 4], strict=True))
    missing = [name for name, column in found.items() if column is None]
    if missing:
        raise TableError(
            f"{path}: has no column for {', '.join(missing)}; a table of boxes has Image Index, Finding Label and "
            f"Bbox [x,y,w,h]; its columns are: {manifest._shown(raw.columns)}"
        )
    return {name: column for name, column in found.items() if column is not None}


def _findings(text: pd.Series, path: str) -> np.ndarray:
    known = {value: canonical(value) for value in text.unique()}
    odd = text.map({value: label in (None, NO_FINDING) for value, label in known.items()}).astype(bool)
    if odd.any():
        word = text[odd].iloc[0].strip()
        raise TableError(
            f"{path}: line {manifest._line(odd)}: unknown finding {word!r}{suggestion(word, FINDINGS)}; "
            "a box has one of the 14 findings"
        )
    return text.map(known).to_numpy(dtype=object)


def _numbers(raw: pd.DataFrame, columns: dict[str, str], path: str) -> np.ndarray:
    values = np.empty((len(raw), 4))
    for position, name in enumerate(_NUMBERS):
        text = raw[columns[name]].str.strip()
        numbers = pd.to_numeric(text, errors="coerce").astype("float64")
        bad = ~numbers.between(-np.inf, np.inf, inclusive="neither")
        if bad.any():
            raise TableError(
                f"{path}: line {manifest._line(bad)}: {name} is {text[bad].iloc[0]!r}, not a number; mend the row"
            )
        values[:, position] = numbers
    corner, size = values[:, :2], values[:, 2:]
    # Half a pixel of grace: edges that were rounded to whole pixels.
    out = (size <= 0).any(axis=1) | (corner < -0.5).any(axis=1) | (corner + size > IMAGE_SIDE + 0.5).any(axis=1)
    if out.any():
        row = int(np.argmax(out))
        shown = ", ".join(f"{value:g}" for value in values[row])
        raise TableError(
            f"{path}: line {raw.index[row]}: the box x, y, w, h = {shown} has no area or reaches out of the picture; "
            f"boxes are in pixels of the {IMAGE_SIDE} x {IMAGE_SIDE} image"
        )
    return values
