"""Consensus tables: any one-hot one, and the adjudicated one of NIH images with its composite findings."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr.data import consensus, manifest
from ray_cxr.errors import TableError
from ray_cxr.labels import FINDINGS, canonical

FIVE = ("Consolidation", "Edema", "Effusion", "Cardiomegaly", "Atelectasis")
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


def put(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refusal(path: str) -> str:
    with pytest.raises(TableError) as caught:
        consensus.read_consensus(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(path)
    return text


def test_table_of_the_five_findings(tmp_path: Path) -> None:
    path = put(tmp_path / "five.csv", TABLE)
    table = consensus.read_consensus(path)
    assert table.image_ids.tolist() == ["00000001_000.png", "00000001_001.png", "00000002_000.png"]
    assert list(table.labels) == [finding for finding in FINDINGS if finding in FIVE]
    assert {name: values.tolist() for name, values in table.labels.items()} == {
        "Atelectasis": [0, 1, 0],
        "Cardiomegaly": [1, ABSENT, 0],
        "Consolidation": [1, 0, 0],
        "Edema": [0, 0, 1],
        "Effusion": [0, 1, 0],
    }
    assert all(values.dtype == np.int8 for values in table.labels.values())
    assert (table.kind, table.composites, table.left_out, table.unused) == ("consensus", {}, {}, ())
    assert table.patient_ids.tolist() == table.parts.tolist() == [None, None, None]
    assert table.digest == hashlib.sha256(TABLE.encode()).hexdigest()
    assert table.notes == ()


def test_adjudicated_table(tmp_path: Path) -> None:
    table = consensus.read_consensus(put(tmp_path / "a.csv", ADJUDICATED))
    assert table.kind == "adjudicated"
    assert "Majkowska" in table.source
    assert {name: values.tolist() for name, values in table.labels.items()} == {
        "Pneumothorax": [0, 1, 0],
        "Airspace opacity": [1, 0, 0],
        "Nodule or mass": [0, 0, 1],
    }
    assert table.composites == {
        "Airspace opacity": ("Consolidation", "Edema", "Infiltration", "Pneumonia"),
        "Nodule or mass": ("Mass", "Nodule"),
    }
    assert list(table.left_out) == ["Fracture"]
    assert any("Fracture was left out: none of the 14" in note for note in table.notes)
    assert any("Atelectasis" in note for note in table.notes)
    assert table.unused == ("Finding Labels", "Follow-up #")
    assert table.patient_ids.tolist() == ["13", "13", "32"]


def test_parts_are_the_tables_own(tmp_path: Path) -> None:
    table = consensus.read_consensus(put(tmp_path / "a.csv", ADJUDICATED))
    assert table.parts.tolist() == ["test", "test", "val"]
    part = table.of_part("val")
    assert part.image_ids.tolist() == ["00000032_002.png"]
    assert {name: values.tolist() for name, values in part.labels.items()} == {
        "Pneumothorax": [0],
        "Airspace opacity": [0],
        "Nodule or mass": [1],
    }
    assert (part.digest, len(part)) == (table.digest, 1)
    with pytest.raises(TableError, match=r"no part 'train'; its parts are: test, val"):
        table.of_part("train")


def test_composites_are_of_findings() -> None:
    for name, members in consensus.COMPOSITES.items():
        assert canonical(name) is None
        assert list(members) == [finding for finding in FINDINGS if finding in members]


def test_gzip_and_plain_are_one_table(tmp_path: Path) -> None:
    plain = consensus.read_consensus(put(tmp_path / "a.csv", TABLE))
    packed = consensus.read_consensus(put(tmp_path / "a.csv.gz", gzip.compress(TABLE.encode())))
    assert packed.image_ids.tolist() == plain.image_ids.tolist()
    assert all((packed.labels[name] == plain.labels[name]).all() for name in plain.labels)
    assert packed.digest != plain.digest  # of the file as it lies there


@pytest.mark.parametrize("header", ["image_id", "Image", "Image Index", "filename"])
def test_names_of_the_image_column(tmp_path: Path, header: str) -> None:
    table = consensus.read_consensus(put(tmp_path / "a.csv", f"{header},Infiltrate\n a.png ,1\n"))
    assert table.image_ids.tolist() == ["a.png"]
    assert table.labels["Infiltration"].tolist() == [1]


def test_columns_that_look_like_labels_are_left_out_by_name(tmp_path: Path) -> None:
    text = "Image,Mass,Pleural Effusion,Fracture,Reader,Follow-up #,Remark\na.png,1,1,0,JS,1,\nb.png,0,0,,AB,0,\n"
    table = consensus.read_consensus(put(tmp_path / "a.csv", text))
    assert list(table.labels) == ["Mass"]
    assert set(table.left_out) == {"Pleural Effusion", "Fracture"}
    assert "did you mean 'Effusion'" in table.left_out["Pleural Effusion"]
    assert all(any(name in note for note in table.notes) for name in table.left_out)
    assert table.unused == ("Reader", "Follow-up #", "Remark")


def test_a_composite_in_any_table(tmp_path: Path) -> None:
    table = consensus.read_consensus(put(tmp_path / "a.csv", "Image,Nodule or Mass,Edema\na.png,1,0\n"))
    assert table.kind == "consensus"
    assert list(table.labels) == ["Edema", "Nodule or mass"]
    assert table.composites == {"Nodule or mass": ("Mass", "Nodule")}


def test_repeated_rows_are_taken_once(tmp_path: Path) -> None:
    table = consensus.read_consensus(put(tmp_path / "a.csv", TABLE + "00000001_000.png,1,0,0,1.0,0\n"))
    assert len(table) == 3
    assert table.notes == ("1 rows that repeat another were taken once.",)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Name,Mass\na.png,1\n", ["no image column", "Name, Mass"]),
        ("Image,Reader\na.png,JS\n", ["no column for any finding", "Image, Reader"]),
        ("Image,Finding Labels\na.png,Mass\n", ["no column for any finding"]),
        ("Image,Mass\na.png,1\nb.png,2\n", ["line 3", "Mass is '2'", "use 0 or 1"]),
        ("Image,Mass\na.png,-1\n", ["line 2", "Mass is '-1'"]),
        ("Image,Mass\na.png,0.5\n", ["line 2", "Mass is '0.5'"]),
        ("Image,Mass,Edema\na.png,1,0\nb.png,1,0\na.png,1,1\n", ["line 4", "a.png", "line 2", "one set per image"]),
        ("Image,Mass,Edema\na.png,1,0\na.png,1,\n", ["line 3", "a.png"]),
        ("Image,Mass\n,1\n", ["line 2", "no image name"]),
        ("Image,Infiltrate,Infiltration\na.png,1,1\n", ["'Infiltrate' and 'Infiltration' both spell Infiltration"]),
        ("Image,Mass,No Finding\na.png,1,1\n", ["line 2", "No Finding is 1 together with a finding"]),
        ("Image,Mass\n", ["no rows"]),
        ("", ["empty"]),
    ],
)
def test_refusals(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(put(tmp_path / "a.csv", text))
    assert all(part in message for part in parts)


def test_no_such_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(str(tmp_path / "none.csv"))


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(*[st.sampled_from([0, 1, ABSENT])] * 5), min_size=1, max_size=20), yes=st.booleans())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, ...]], yes: bool
) -> None:
    words = {0: "No" if yes else "0", 1: "YES" if yes else "1", ABSENT: ""}
    lines = [f"{i}.png,{','.join(words[value] for value in row)}" for i, row in enumerate(rows)]
    path = tmp_path_factory.mktemp("t") / "a.csv"
    table = consensus.read_consensus(put(path, "\n".join([f"Image,{','.join(FIVE)}", *lines])))
    assert np.column_stack([table.labels[name] for name in FIVE]).tolist() == [list(row) for row in rows]


SCORES = st.lists(st.tuples(*[st.floats(0, 1) | st.just(float("nan"))] * 3), min_size=1, max_size=20)
FLAGS = st.lists(st.tuples(*[st.sampled_from([0, 1, ABSENT])] * 3), min_size=1, max_size=20)
THREE = ("Edema", "Mass", "Nodule")


@given(SCORES)
def test_score_of_a_composite_is_the_highest(rows: list[tuple[float, ...]]) -> None:
    p = {name: np.array([row[i] for row in rows], dtype=np.float32) for i, name in enumerate(THREE)}
    got = consensus.composite_scores("either", ("Mass", "Nodule"), p)
    for row, value in zip(rows, got, strict=True):
        pair = [float(np.float32(one)) for one in row[1:]]
        assert np.isnan(value) if np.isnan(pair).any() else value == max(pair)
    assert got.dtype == np.float64


@given(FLAGS)
def test_a_composite_is_flagged_where_any_is(rows: list[tuple[int, ...]]) -> None:
    flags = {name: np.array([row[i] for row in rows]) for i, name in enumerate(THREE)}
    got = consensus.composite_flags("any", THREE, flags)
    for row, value in zip(rows, got, strict=True):
        assert value == (1 if 1 in row else ABSENT if ABSENT in row else 0)
    assert got.dtype == np.int8


def test_a_composite_needs_all_its_findings() -> None:
    with pytest.raises(
        TableError, match=r"Nodule or mass: needs a score of each of Mass, Nodule; there is none of Mass"
    ):
        consensus.composite_scores("Nodule or mass", ("Mass", "Nodule"), {"Nodule": np.zeros(2)})
    with pytest.raises(TableError, match="needs a flag of each"):
        consensus.composite_flags("Nodule or mass", ("Mass", "Nodule"), {"Nodule": np.zeros(2)})


def test_the_real_adjudicated_table(shared: Path) -> None:
    meta = shared / "nih" / "meta"
    table = consensus.read_consensus(str(meta / "google2019_nih-chest-xray-labels.csv.gz"))
    assert (len(table), table.kind) == (4376, "adjudicated")
    assert {name: int((values == 1).sum()) for name, values in table.labels.items()} == {
        "Pneumothorax": 238,
        "Airspace opacity": 2166,
        "Nodule or mass": 605,
    }
    assert all((values >= 0).all() for values in table.labels.values())
    assert list(table.left_out) == ["Fracture"]
    assert len(set(table.image_ids)) == 4376
    lists = {
        part: set(gzip.decompress((meta / name).read_bytes()).decode().split())
        for part, name in {"val": "train_val_list.txt.gz", "test": "test_list.txt.gz"}.items()
    }
    assert {part: len(table.of_part(part)) for part in lists} == {"val": 2414, "test": 1962}
    assert all(set(table.of_part(part).image_ids) <= names for part, names in lists.items())
    entry = manifest.read_table(str(meta / "Data_Entry_2017_v2020.csv.gz")).set_index("image_id")["patient_id"]
    assert (entry.loc[table.image_ids].to_numpy() == table.patient_ids).all()
