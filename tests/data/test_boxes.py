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

ROWS = """\
00013118_008.png,Atelectasis,225.08,547.02,86.78,79.19
00014716_007.png,Infiltrate,686.1,131.5,185.5,313.5
"""
HEADERS = {
    "as NIH's, broken at the commas": "Image Index,Finding Label,Bbox [x,y,w,h],,,",
    "without the empty columns": "Image Index,Finding Label,Bbox [x,y,w,h]",
    "the bracket quoted": 'Image Index,Finding Label,"Bbox [x,y,w,h]",,,',
    "plain": "image_id,finding,x,y,w,h",
    "named by pandas": "Image Index,Finding Label,Bbox [x,y,w,h],Unnamed: 6,Unnamed: 7,Unnamed: 8",
}


def put(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("dialect", HEADERS)
@pytest.mark.parametrize("packed", [False, True])
def test_dialects_give_the_same_boxes(tmp_path: Path, dialect: str, packed: bool) -> None:
    rows = ROWS.replace("\n", ",,,\n") if dialect == "named by pandas" else ROWS
    data = f"{HEADERS[dialect]}\n{rows}".encode()
    path = put(tmp_path / "b.csv", gzip.compress(data) if packed else data)
    found = boxes.read_boxes(path)
    assert found.image_ids.tolist() == ["00013118_008.png", "00014716_007.png"]
    assert found.findings.tolist() == ["Atelectasis", "Infiltration"]
    assert found.xywh.tolist() == [[225.08, 547.02, 86.78, 79.19], [686.1, 131.5, 185.5, 313.5]]
    assert (found.xywh.dtype, found.image_side, len(found)) == (np.float64, 1024, 2)
    assert found.digest == hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("a.png,Masss,1,2,3,4", ["line 2", "unknown finding 'Masss'", "did you mean 'Mass'"]),
        ("a.png,No Finding,1,2,3,4", ["line 2", "'No Finding'", "one of the 14 findings"]),
        ("a.png,Mass,1,2,three,4", ["line 2", "w is 'three', not a number"]),
        ("a.png,Mass,,2,3,4", ["line 2", "x is ''"]),
        ("a.png,Mass,nan,2,3,4", ["line 2", "x is 'nan'"]),
        ("a.png,Mass,1,2,inf,4", ["line 2", "w is 'inf'"]),
        ("a.png,Mass,1,2,0,4", ["line 2", "no area"]),
        ("a.png,Mass,1,2,3,-4", ["line 2", "no area"]),
        ("a.png,Mass,-9,2,30,40", ["line 2", "reaches out of the picture", "1024 x 1024"]),
        ("a.png,Mass,1,2,3,1400", ["line 2", "1, 2, 3, 1400", "reaches out of the picture"]),
        (",Mass,1,2,3,4", ["line 2", "no image name"]),
        ("a.png,Mass,1,2,3", ["line 2 has 5 columns"]),
        ("", ["no rows"]),
    ],
)
def test_refusals(tmp_path: Path, line: str, parts: list[str]) -> None:
    path = put(tmp_path / "b.csv", f"{HEADERS['without the empty columns']}\n{line}\n")
    with pytest.raises(TableError) as caught:
        boxes.read_boxes(path)
    message = str(caught.value)
    assert message.startswith(path)
    assert "\n" not in message
    assert all(part in message for part in parts)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"has no column for finding, h; .* its columns are: Image, x, y, w"):
        boxes.read_boxes(put(tmp_path / "b.csv", "Image,x,y,w\na.png,1,2,3\n"))
    with pytest.raises(TableError, match="no such file"):
        boxes.read_boxes(str(tmp_path / "none.csv"))


def test_the_real_boxes(shared: Path) -> None:
    found = boxes.read_boxes(str(shared / "nih" / "meta" / "BBox_List_2017.csv.gz"))
    assert (len(found), len(set(found.image_ids))) == (984, 880)
    assert Counter(found.findings) == {
        "Atelectasis": 180,
        "Effusion": 153,
        "Cardiomegaly": 146,
        "Infiltration": 123,
        "Pneumonia": 120,
        "Pneumothorax": 98,
        "Mass": 85,
        "Nodule": 79,
    }
    assert (found.xywh[:, 2:] > 0).all()
    assert (found.xywh[:, :2] + found.xywh[:, 2:]).max() <= 1024
    assert found.xywh[0].round(2).tolist() == [225.08, 547.02, 86.78, 79.19]
