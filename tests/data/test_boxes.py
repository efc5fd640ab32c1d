"""Tables of boxes in the dialects they are found in, and their refusals."""

from __future__ import annotations

import gzip
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ray_cxr.data import boxes
from ray_cxr.errors import TableError

ROWS = "00013118_008.png,Atelectasis,225.08,547.02,86.78,79.19\n00014716_007.png,Infiltrate,686.1,131.5,185.5,313.5\n"
HEADERS = {
    "nih, broken at the commas": "Image Index,Finding Label,Bbox [x,y,w,h],,,",
    "without the empty columns": "Image Index,Finding Label,Bbox [x,y,w,h]",
    "the bracket quoted": 'Image Index,Finding Label,"Bbox [x,y,w,h]",,,',
    "plain": "image_id,finding,x,y,w,h",
    "named by pandas": "Image Index,Finding Label,Bbox [x,y,w,h],Unnamed: 6,Unnamed: 7,Unnamed: 8",
}


@pytest.mark.parametrize("dialect", HEADERS)
def test_dialects_give_the_same_boxes(tmp_path: Path, dialect: str) -> None:
    rows = ROWS.replace("\n", ",,,\n") if dialect == "named by pandas" else ROWS
    data = f"{HEADERS[dialect]}\n{rows}".encode()
    for contents in (data, gzip.compress(data)):
        (tmp_path / "b.csv").write_bytes(contents)
        found = boxes.read_boxes(str(tmp_path / "b.csv"))
        assert found.image_ids.tolist() == ["00013118_008.png", "00014716_007.png"]
        assert found.findings.tolist() == ["Atelectasis", "Infiltration"]
        assert found.xywh.tolist() == [[225.08, 547.02, 86.78, 79.19], [686.1, 131.5, 185.5, 313.5]]
        assert (found.xywh.dtype, found.image_side, len(found)) == (np.float64, 1024, 2)
        assert found.digest == hashlib.sha256(contents).hexdigest()


NIH = HEADERS["without the empty columns"]


@pytest.mark.parametrize(
    ("header", "line", "parts"),
    [
        (NIH, "a.png,Masss,1,2,3,4", ["line 2", "'Masss'", "'Mass'"]),
        (NIH, "a.png,No Finding,1,2,3,4", ["line 2", "'No Finding'"]),
        (NIH, "a.png,Mass,1,2,three,4", ["line 2", "w is 'three'"]),
        (NIH, "a.png,Mass,,2,3,4", ["line 2", "x is ''"]),
        (NIH, "a.png,Mass,1,2,inf,4", ["line 2", "w is 'inf'"]),
        (NIH, "a.png,Mass,1,2,0,4", ["line 2", "no area"]),
        (NIH, "a.png,Mass,1,2,3,-4", ["line 2", "no area"]),
        (NIH, "a.png,Mass,-0.6,2,30,40", ["line 2", "1024 x 1024"]),
        (NIH, "a.png,Mass,1,2,3,4\na.png,Mass,1,2,3,1022.6", ["line 3", "1, 2, 3, 1022.6", "1024 x 1024"]),
        (NIH, ",Mass,1,2,3,4", ["line 2"]),
        (NIH, "a.png,Mass,1,2,3", ["line 2", "5 columns"]),
        (NIH, "", ["no rows"]),
        ("Image,x,y,w", "a.png,1,2,3", ["finding, h;", "Image, x, y, w"]),
    ],
)
def test_refusals_name_file_line_and_value(tmp_path: Path, header: str, line: str, parts: list[str]) -> None:
    path = tmp_path / "b.csv"
    path.write_text(f"{header}\n{line}\n", encoding="utf-8")
    with pytest.raises(TableError) as caught:
        boxes.read_boxes(str(path))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []
    path.write_text(f"{NIH}\na.png,Mass,-0.5,2,3,1022.5\n", encoding="utf-8")  # half a pixel out is allowed
    assert boxes.read_boxes(str(path)).xywh.tolist() == [[-0.5, 2, 3, 1022.5]]


def test_the_real_boxes(shared: Path) -> None:
    found = boxes.read_boxes(str(shared / "nih" / "meta" / "BBox_List_2017.csv.gz"))
    assert (len(found), len(set(found.image_ids))) == (984, 880)
    counts = Counter(found.findings)
    assert (len(counts), counts["Atelectasis"], counts["Infiltration"], counts["Nodule"]) == (8, 180, 123, 79)
