"""Consensus tables: any one-hot table, and the adjudicated table of NIH images with its composite findings."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_cxr.data import consensus, manifest_builder
from ray_cxr.errors import TableError

TABLE = """\
Image,Consolidation,Edema,Effusion,Cardiomegaly,Atelectasis
00000001_000.png,1,0,0,1,0
00000001_001.png,0,0,1,,1.0
00000002_000.png,0,1,0.0,0,0
"""
ADJUDICATED = """\
Image Index,Finding Labels,Follow-up #,Patient ID,Fracture,Pneumothorax,Airspace opacity,Nodule or mass,Set Id
00000013_008.png,No Finding,0,13,NO,NO,YES,NO,test
00000013_026.png,Emphysema,1,13,YES,YES,NO,NO,test
00000032_002.png,No Finding,1,32,NO,NO,NO,YES,val
"""
ABSENT = -1


def read(folder: Path, data: str | bytes) -> consensus.ConsensusLabels:
    (folder / "a.csv").write_bytes(data if isinstance(data, bytes) else data.encode())
    return consensus.read_consensus(str(folder / "a.csv"))


def values(table: consensus.ConsensusLabels) -> dict[str, list[int]]:
    return {name: column.tolist() for name, column in table.labels.items()}


def test_one_hot_table(tmp_path: Path) -> None:
    table = read(tmp_path, TABLE)
    assert table.image_ids.tolist() == ["00000001_000.png", "00000001_001.png", "00000002_000.png"]
    expected = {"Atelectasis": [0, 1, 0], "Cardiomegaly": [1, ABSENT, 0], "Consolidation": [1, 0, 0]}
    assert values(table) == {**expected, "Edema": [0, 0, 1], "Effusion": [0, 1, 0]}
    assert list(table.labels) == sorted(table.labels), "in the order of all findings"
    assert all(column.dtype == np.int8 for column in table.labels.values())
    assert (table.kind, table.composites, table.left_out, table.unused, table.notes) == ("consensus", {}, {}, (), ())
    assert table.patient_ids.tolist() == table.parts.tolist() == [None, None, None]
    assert table.digest == hashlib.sha256(TABLE.encode()).hexdigest()
    assert values(read(tmp_path, gzip.compress(TABLE.encode()))) == values(table)
    repeated = read(tmp_path, TABLE + "00000001_000.png,1,0,0,1.0,0\n")
    assert values(repeated) == values(table)
    assert [note[:6] for note in repeated.notes] == ["1 rows"]


def test_adjudicated_table_and_its_parts(tmp_path: Path) -> None:
    table = read(tmp_path, ADJUDICATED)
    assert table.kind == "adjudicated"
    expected = {"Pneumothorax": [0, 1, 0], "Airspace opacity": [1, 0, 0], "Nodule or mass": [0, 0, 1]}
    assert values(table) == expected
    opacities = ("Consolidation", "Edema", "Infiltration", "Pneumonia")
    assert table.composites == {"Airspace opacity": opacities, "Nodule or mass": ("Mass", "Nodule")}
    assert list(table.left_out) == ["Fracture"]
    assert table.unused == ("Finding Labels", "Follow-up #")
    assert table.patient_ids.tolist() == ["13", "13", "32"]
    assert table.parts.tolist() == ["test", "test", "val"]


def test_columns_that_look_like_labels_are_left_out_by_name(tmp_path: Path) -> None:
    header = "filename,Infiltrate,Pleural Effusion,Fracture,Reader,Follow-up #,Remark,Nodule or Mass"
    table = read(tmp_path, f"{header}\n a.png ,1,1,0,JS,1,,1\nb.png,0,0,,AB,0,,1\n")
    assert (table.kind, table.image_ids.tolist()) == ("consensus", ["a.png", "b.png"])
    assert values(table) == {"Infiltration": [1, 0], "Nodule or mass": [1, 1]}
    assert table.composites == {"Nodule or mass": ("Mass", "Nodule")}
    assert set(table.left_out) == {"Pleural Effusion", "Fracture"}
    assert "'Effusion'" in table.left_out["Pleural Effusion"]
    assert all(any(name in note for note in table.notes) for name in table.left_out)
    assert table.unused == ("Reader", "Follow-up #", "Remark")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Name,Mass\na.png,1\n", ["no image column", "Name, Mass"]),
        ("Image,Reader\na.png,JS\n", ["no column for any finding", "Image, Reader"]),
        ("Image,Mass\na.png,1\nb.png,2\n", ["line 3", "Mass is '2'"]),
        ("Image,Mass,Edema\na.png,1,0\nb.png,1,0\na.png,1,1\n", ["line 4", "a.png", "line 2"]),
        ("Image,Mass,Edema\na.png,1,0\na.png,1,\n", ["line 3", "a.png"]),
        ("Image,Mass\n,1\n", ["line 2", "no image name"]),
        ("Image,Infiltrate,Infiltration\na.png,1,1\n", ["'Infiltrate' and 'Infiltration'"]),
        ("Image,Mass,No Finding\na.png,1,1\n", ["line 2", "No Finding is 1"]),
        ("Image,Mass\n", ["no rows"]),
        (None, ["no such file"]),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, text: str | None, parts: list[str]) -> None:
    with pytest.raises(TableError) as caught:
        read(tmp_path, text) if text is not None else consensus.read_consensus(str(tmp_path / "a.csv"))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "a.csv"))
    assert "\n" not in message
    assert all(part in message for part in parts)


THREE = ("Edema", "Mass", "Nodule")
SCORE = st.floats(0, 1, width=32) | st.just(float("nan"))
FLAG = st.sampled_from([0, 1, ABSENT])


@given(st.lists(st.tuples(*[SCORE] * 3, *[FLAG] * 3), min_size=1, max_size=20))
def test_composite_has_the_highest_score_and_any_flag_of_its_members(rows: list[tuple[float, ...]]) -> None:
    p = {name: np.array([row[i] for row in rows], dtype=np.float32) for i, name in enumerate(THREE)}
    flags = {name: np.array([row[3 + i] for row in rows]) for i, name in enumerate(THREE)}
    scores = consensus.composite_scores(("Mass", "Nodule"), p)
    flagged = consensus.composite_flags(THREE, flags)
    for (_, *pair, a, b, c), score, flag in zip(rows, scores, flagged, strict=True):
        assert np.isnan(score) if np.isnan(pair).any() else score == max(pair)
        assert flag == (1 if 1 in (a, b, c) else ABSENT if ABSENT in (a, b, c) else 0)
    assert (scores.dtype, flagged.dtype) == (np.float64, np.int8)


@pytest.mark.slow
def test_real_adjudicated_table(shared: Path) -> None:
    meta = shared / "nih" / "meta"
    table = consensus.read_consensus(str(meta / "google2019_nih-chest-xray-labels.csv.gz"))
    assert (len(table), len(set(table.image_ids)), table.kind) == (4376, 4376, "adjudicated")
    positives = {name: int((column == 1).sum()) for name, column in table.labels.items()}
    assert positives == {"Pneumothorax": 238, "Airspace opacity": 2166, "Nodule or mass": 605}
    assert all((column >= 0).all() for column in table.labels.values())
    assert list(table.left_out) == ["Fracture"]
    for part, name, count in (("val", "train_val_list.txt.gz", 2414), ("test", "test_list.txt.gz", 1962)):
        images = set(table.image_ids[table.parts == part])
        assert len(images) == count
        assert images <= set(gzip.decompress((meta / name).read_bytes()).decode().split())
    entry = manifest_builder.read_table(str(meta / "Data_Entry_2017_v2020.csv.gz")).set_index("image_id")["patient_id"]
    assert (entry.loc[table.image_ids].to_numpy() == table.patient_ids).all()
