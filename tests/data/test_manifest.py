"""Manifests from tables, split lists and folders: both NIH dialects, one-hot tables, refusals by place."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_files import tar_bytes

from ray_cxr.data import manifest, manifest_builder
from ray_cxr.errors import ConfigError, InputError, LeakError, RayCxrError, TableError
from ray_cxr.imaging.decode import load_image
from ray_cxr.labels import FINDINGS, LABELS

#: As NIH's table of 2017: ages with units, padded patient ids, a comma at the end of every line.
NIH_2017 = """\
Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,\
Height],OriginalImagePixelSpacing[x,y],
00000001_000.png,Cardiomegaly,000,00000001,058Y,M,PA,2682,2749,0.143,0.143,
00000001_001.png,Cardiomegaly|Emphysema,001,00000001,058Y,M,PA,2894,2729,0.143,0.143,
00000002_000.png,No Finding,000,00000002,411Y,F,AP,2500,2048,0.168,0.168,
00000003_000.png,Hernia|Infiltration,003,00000003,006M,F,PA,2582,2991,0.143,0.143,
"""
NIH_V2020 = """\
Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,\
Height],OriginalImagePixelSpacing[x,y]
00000001_000.png,Cardiomegaly,0,1,58,M,PA,2682,2749,0.143,0.143
00000001_001.png,Cardiomegaly|Emphysema,1,1,58,M,PA,2894,2729,0.143,0.143
00000002_000.png,No Finding,0,2,81,F,AP,2500,2048,0.168,0.168
00000003_000.png,Hernia|Infiltration,3,3,0,F,PA,2582,2991,0.143,0.143
"""
NIH_NAMES = ("00000001_000.png", "00000001_001.png", "00000002_000.png")
HEAD = "Image,Finding Labels,Patient ID\n"


def put(path: Path, data: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def png() -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, *names: str) -> None:
    put(path, tar_bytes(dict.fromkeys(names, png())))


def build(*tables: str, **options: Any) -> tuple[pa.Table, manifest_builder.ManifestReport]:
    table, report = manifest_builder.build_manifest(list(tables), **options)
    assert table.schema.equals(manifest.SCHEMA)
    return table, report


def build_text(folder: Path, text: str | bytes, **options: Any) -> tuple[pa.Table, manifest_builder.ManifestReport]:
    return build(put(folder / "t.csv", text), **options)


def refusal(kind: type[RayCxrError], *tables: str, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        manifest_builder.build_manifest(list(tables), **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def positives(row: dict[str, Any]) -> list[str]:
    return [name for name in LABELS if row[name] == 1]


def test_nih_tables_of_2017_and_2020(tmp_path: Path) -> None:
    table, report = build_text(tmp_path, NIH_2017)
    rows = table.to_pylist()
    assert table["image_id"].to_pylist() == [*NIH_NAMES, "00000003_000.png"]
    assert table["patient_id"].to_pylist() == [name[:8] for name in table["image_id"].to_pylist()]
    assert table["age"].to_pylist() == [58.0, 58.0, None, 0.5]
    assert table["sex"].to_pylist() == ["M", "M", "F", "F"]
    assert table["view"].to_pylist() == ["PA", "PA", "AP", "PA"]
    assert table["follow_up"].to_pylist() == [0, 1, 0, 3]
    expected = [["Cardiomegaly"], ["Cardiomegaly", "Emphysema"], ["No_Finding"], ["Hernia", "Infiltration"]]
    assert [positives(row) for row in rows] == expected
    assert all(row[name] in (0, 1) for row in rows for name in LABELS)
    assert all(row["split"] is row["path"] is row["study_id"] is None for row in rows)
    assert (report.absurd_ages, report.unreadable_ages, report.ignored_columns) == (1, 0, [])
    assert report.lines() == ["4 images of 3 patients", "1 ages over 120 years set to null"]
    # NIH's table of 2020 differs in ages and in the spelling of patients.
    new, _ = build_text(tmp_path, NIH_V2020)
    assert new.drop_columns(["age", "patient_id"]).equals(table.drop_columns(["age", "patient_id"]))
    assert new["patient_id"].to_pylist() == ["1", "1", "2", "3"]
    assert new["age"].to_pylist() == [58.0, 58.0, 81.0, 0.0]


BODY = NIH_V2020.partition("\n")[2]
HEADERS = [
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position,"
    "OriginalImageWidth,OriginalImageHeight,OriginalImagePixelSpacing_x,OriginalImagePixelSpacing_y",
    "image_index,finding_labels,follow_up,patient_id,age,sex,view,Width,Height,PixelSpacingX,PixelSpacingY",
    'Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"OriginalImage['
    'Width","Height]","OriginalImagePixelSpacing[x","y]"',
]


def test_headers_and_encodings_of_a_table(tmp_path: Path) -> None:
    for data in (
        *(f"{header}\n{BODY}" for header in HEADERS),
        gzip.compress(NIH_V2020.encode(), mtime=0),
        b"\xef\xbb\xbf" + NIH_V2020.encode(),
        NIH_V2020.replace("\n", "\r\n"),
        NIH_V2020.replace("\n", "\n\n") + ",,\n\n",
        NIH_V2020.rstrip("\n"),
    ):
        table, report = build_text(tmp_path, data)
        assert table.equals(build_text(tmp_path, NIH_V2020)[0])
        assert report.ignored_columns == []


def test_ages_and_follow_up_numbers_that_cannot_be_are_null(tmp_path: Path) -> None:
    ages = ["120", "121", "148Y", "?", "x", "", "1400M", "1500M"]
    visits = ["7", "007", "2.0", "", "x", "3", "1e20", "inf"]
    lines = "".join(f"{i}.png,Mass,{age},{visit}\n" for i, (age, visit) in enumerate(zip(ages, visits, strict=True)))
    table, report = build_text(tmp_path, f"Image,Finding Labels,Age,Follow-up #\n{lines}")
    assert table["age"].to_pylist() == [120.0, None, None, None, None, None, pytest.approx(1400 / 12), None]
    assert table["follow_up"].to_pylist() == [7, 7, 2, None, None, 3, None, None]
    assert (report.absurd_ages, report.unreadable_ages) == (3, 2)


CHEXPERT = """Path,Image,Frontal/Lateral,AP/PA,Age,Mass
x,a.png,Frontal,AP,90 years,1
x,b.png,Frontal,,999Y,0
x,c.png,Lateral,,6 months,0
x,d.png,,SWIMMERS,58,0
x,e.png,,,58,0
"""
PADCHEST = """ImageID,Projection,ViewPosition_DICOM,Mass
a.png,L,PA,1
b.png,PA,,0
c.png,EXCLUDE,POSTEROANTERIOR,0
d.png,COSTAL,,0
"""
MIMIC = """image_id,ViewPosition,ViewCodeSequence_CodeMeaning,Mass
a.png,PA LLD,postero-anterior,1
b.png,,antero-posterior,0
c.png,XTABLE LATERAL,,0
d.png,PA,Erect,0
"""


def test_views_of_public_tables(tmp_path: Path) -> None:
    for text, views, unknown, unused in (
        (CHEXPERT, ["AP", "FRONTAL", "LATERAL", None, None], 1, ["Path"]),
        (PADCHEST, ["LATERAL", "PA", "PA", None], 1, []),
        (MIMIC, ["DECUBITUS", "AP", "LATERAL", "PA"], 0, []),
    ):
        table, report = build_text(tmp_path, text)
        assert table["view"].to_pylist() == views
        assert (report.unknown_views, report.ignored_columns) == (unknown, unused)
        assert ("1 views that are not known or not unique set to null" in report.lines()) == bool(unknown)
    table, _ = build_text(tmp_path, CHEXPERT)
    assert table["age"].to_pylist() == [90.0, None, 0.5, 58.0, 58.0]


@pytest.mark.parametrize("labels", ["Finding Labels", "Mass"])
def test_patient_ids_keep_their_zeros(tmp_path: Path, labels: str) -> None:
    """In NIH's copies 7 and 00000007 are one patient; elsewhere 008 and 8 may be two people."""
    lines = [("a.png", "008"), ("b.png", "8"), ("00000007_000.png", "00000007"), ("00000013_008.png", "00000013")]
    label = {"Finding Labels": "Mass", "Mass": "1"}[labels]
    head = f"Image,PatientId,{labels}\n"
    table, _ = build_text(tmp_path, head + "".join(f"{image},{patient},{label}\n" for image, patient in lines))
    assert table["patient_id"].to_pylist() == ["008", "8", "00000007", "00000013"]
    train = put(tmp_path / "train.csv", f"{head}00000007_002.png,7,{label}\n")
    assert "1 patients" in refusal(LeakError, f"train={train}", f"test={tmp_path / 't.csv'}")


def test_spelling_of_nih_patients_is_one_per_manifest_and_changes_no_split(tmp_path: Path) -> None:
    patients = range(1, 21)
    splits = []
    for spelling in ("{}", "{:08d}"):
        lines = "".join(f"{n:08d}_000.png,{spelling.format(n)},0\n" for n in patients)
        table, _ = build_text(tmp_path, f"Image,PatientId,Mass\n{lines}", split="patient", seed=3)
        assert table["patient_id"].to_pylist() == [spelling.format(n) for n in patients]
        splits.append(table["split"].to_pylist())
    assert splits[0] == splits[1]
    table, _ = build_text(tmp_path, "Image,PatientId,Mass\n00000007_000.png,7.0,0\n00000007_001.png,00000007,0\n")
    assert table["patient_id"].to_pylist() == ["00000007"] * 2


def test_one_hot_table_without_no_finding_column(tmp_path: Path) -> None:
    """No_Finding is 1 where all 14 are 0, null where any is null."""
    rows = {"none": {}, "mass": {"Mass": "1", "Nodule": "1.0", "Edema": "0.0"}, "both": {"Mass": "", "Edema": "1"}}
    lines = [",".join([image, *(values.get(name, "0") for name in FINDINGS)]) for image, values in rows.items()]
    table, report = build_text(tmp_path, "\n".join([f"Image,{','.join(FINDINGS)}", *lines]))
    none, mass, both = table.to_pylist()
    assert (positives(none), positives(mass), mass["No_Finding"]) == (["No_Finding"], ["Mass", "Nodule"], 0)
    assert (both["Mass"], both["Edema"], both["No_Finding"]) == (None, 1, None)
    assert report.unlabelled_rows == 0


def test_one_hot_table_with_no_finding_column(tmp_path: Path) -> None:
    header = "Image,Mass,Pleural Thickening,Infiltrate,No Finding,Notes"
    table, report = build_text(tmp_path, f"{header}\na.png,0,0,0,1,\nb.png,1,0,,0,x\nc.png,,,,,\nd.png,0,0,0,0,\n")
    assert table["No_Finding"].to_pylist() == [1, 0, None, 0]
    assert table["Mass"].to_pylist() == [0, 1, None, 0]
    assert table["Infiltration"].to_pylist() == [0, None, None, 0]
    assert table["Pleural_Thickening"].to_pylist() == [0, 0, None, 0]
    assert table["Hernia"].null_count == 4
    assert (report.unlabelled_rows, report.ignored_columns) == (1, ["Notes"])
    assert "Notes" in report.lines()[-1]
    assert build_text(tmp_path, "Image,Mass\na.png,0\n")[0]["No_Finding"].to_pylist() == [None]
    # The text of a blank cell is no label either.
    table, report = build_text(tmp_path, "Image,Finding Labels\na.png,\nb.png,Mass\n")
    assert all(table[name].to_pylist() == [None, int(name == "Mass")] for name in LABELS)
    assert report.unlabelled_rows == 1


def test_a_table_without_labels_keeps_patients_and_studies(tmp_path: Path) -> None:
    """Its columns are all known, so no label can be lost."""
    path = put(tmp_path / "t.csv", "image,patient,study,view\na.png,7,s1,PA\nb.png,7,s1,LL\n")
    table, report = build(str(path))
    rows = table.select(["image_id", "patient_id", "study_id", "view"]).to_pylist()
    assert [row["patient_id"] for row in rows] == ["7", "7"]
    assert [(row["study_id"], row["view"]) for row in rows] == [("s1", "PA"), ("s1", "LATERAL")]
    assert (report.unlabelled_rows, table["Mass"].null_count) == (2, 2)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty"]),
        ("Image,Finding Labels\n", ["no rows"]),
        ("Patient ID,Finding Labels\n1,Mass\n", ["no image column", "Patient ID, Finding Labels"]),
        ("Image Index,Patient ID,Nodul\na.png,1,1\n", ["'Finding Labels'", "Image Index, Patient ID, Nodul"]),
        ("Image Index\na.png\n", ["'Finding Labels'", "Image Index"]),
        ("Image,Finding Labels,Mass,Edema\na.png,Mass,1,0\n", ["Finding Labels", "Mass, Edema"]),
        ("Image,Infiltration,Infiltrate\na.png,1,0\n", ["'Infiltration' and 'Infiltrate'"]),
        ("Image,Mass,Mass\na.png,1,0\n", ["'Mass' twice"]),
        ("Image,Mass\na.png,1\n,1\n", ["line 3", "no image name"]),
        ("Image,Finding Labels,Sex\na.png,Mass,M\nb.png,Ma\n", ["line 3 has 2 columns, the header (line 1) 3"]),
        ('Image,Finding Labels\na.png,"Mass\nb.png,Mass\n', ["CSV"]),
        ("Image,Finding Labels\na.png,Mass\n\nb.png,Nodul\nc.png,Nodul\n", ["line 4 (b.png)", "'Nodul'", "'Nodule'"]),
        ("Image,Finding Labels\na.png,Mass\nb.png,No Finding|Mass\n", ["line 3 (b.png)", "'No Finding'"]),
        ("Image,Mass,No Finding\na.png,0,1\nb.png,1,1\n", ["line 3", "No Finding is 1"]),
        ("Image,Edema,Mass\na.png,0,1\nb.png,0,-1.0\n", ["line 3", "Mass is '-1.0'"]),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", ["UTF-8"]),
        (gzip.compress(b"Image,Finding Labels\na.png,Mass\n" * 99, mtime=0)[:-20], ["damaged gzip"]),
    ],
)
def test_bad_table_is_refused(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    path = put(tmp_path / "t.csv", text)
    message = refusal(TableError, path)
    assert message.startswith(f"{path}: ")
    assert all(part in message for part in parts)


@settings(max_examples=40)
@given(st.one_of(st.binary(max_size=200), st.text(alphabet='Image,Finding Labels\n"|01-.png', max_size=200)))
def test_any_bytes_make_a_manifest_or_a_table_error(tmp_path_factory, data: bytes | str) -> None:
    body = data if isinstance(data, bytes) else data.encode()
    for header in (b"", b"Image,Finding Labels\n", b"Image,Mass,Patient ID,Age,Follow-up #\n"):
        try:
            table, _ = build_text(tmp_path_factory.getbasetemp(), header + body)
        except TableError:
            continue
        assert len(table)


def test_tables_are_concatenated_and_repeats_refused(tmp_path: Path) -> None:
    a = put(tmp_path / "a.csv", f"{HEAD}1.png,Mass,1\n2.png,Edema,2\n")
    b = put(tmp_path / "b" / "a.csv", "Image,Edema\n3.png,1\n")
    c = put(tmp_path / "c.csv", f"{HEAD}4.png,Mass,4\n4.png,Mass,4\n2.png,Mass,2\n1.png,Mass,1\n")
    table, _ = build(a, b)
    assert table["image_id"].to_pylist() == ["1.png", "2.png", "3.png"]
    assert set(manifest.split_info(table)["tables"]) == {a, b}, "equal names need their folders"
    message = refusal(TableError, a, b, c)
    assert message.startswith("3 images")
    assert "'1.png' in a.csv and c.csv" in message
    assert "'4.png' in c.csv;" in refusal(TableError, c)


def three(folder: Path, *, val_patient: str = "3", more_test: str = "") -> list[str]:
    train = "1.png,Mass,1\n2.png,Edema,2\n2b.png,Edema,2\n"
    rows = {"train": train, "val": f"3.png,Mass,{val_patient}\n", "test": f"4.png,Mass,4\n{more_test}"}
    return [f"{name}={put(folder / f'{name}.csv', HEAD + text)}" for name, text in rows.items()]


def test_leak_between_tables_is_refused_or_dropped(tmp_path: Path) -> None:
    table, report = build(*three(tmp_path))
    assert table["split"].to_pylist() == ["train", "train", "train", "val", "test"]
    assert report.by_split == {"train": 3, "val": 1, "test": 1}
    info = manifest.split_info(table)
    assert (info["kind"], info["seed"], set(info["tables"])) == ("given", None, {"train.csv", "val.csv", "test.csv"})

    tables = three(tmp_path, val_patient="2")
    assert "2 (val+train)" in refusal(LeakError, *tables)
    table, report = build(*tables, on_leak="drop")
    assert table["image_id"].to_pylist() == ["1.png", "3.png", "4.png"]
    assert report.lines()[-1].startswith("2 rows removed")
    assert report.dropped_by_split == manifest.split_info(table)["dropped_by_split"] == {"train": 2}

    tables = three(tmp_path, more_test="1.png,Mass,1\n")  # the same image in two tables
    assert "1 (test+train)" in refusal(LeakError, *tables)
    table, _ = build(*tables, on_leak="drop")
    assert table["image_id"].to_pylist() == ["2.png", "2b.png", "3.png", "4.png", "1.png"]


def test_rows_without_patients_in_two_tables(tmp_path: Path) -> None:
    a, same, b = (put(tmp_path / f"{i}.csv", f"Image,Mass\n{name}.png,1\n") for i, name in enumerate(("a", "a", "b")))
    assert "a.png" in refusal(TableError, f"train={a}", f"test={same}", on_leak="drop")
    _, report = build(f"train={a}", f"test={b}")
    assert report.unguarded == 2
    assert report.lines()[0] == "2 images, patients unknown: train 1, test 1"
    assert any(line.startswith("2 rows have a split but no patient id") for line in report.lines())


def test_images_without_a_patient_are_in_no_number_of_patients(tmp_path: Path) -> None:
    for ids, line in (
        (["007", "7", "7"], "3 images of 2 patients"),
        (["007", "", "nan"], "3 images of 1 patient (2 images without a patient id)"),
        (["", "", ""], "3 images, patients unknown"),
    ):
        rows = "".join(f"{i}.png,{patient},1\n" for i, patient in enumerate(ids))
        assert build_text(tmp_path, f"Image,Patient ID,Mass\n{rows}")[1].lines()[0] == line


def test_bad_table_paths_and_contradicting_options_are_refused(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/none.csv", str(tmp_path)):
        assert refusal(TableError, path).startswith(f"{path}: ")
    assert "only s3:// and local paths" in refusal(InputError, "gs://bucket/t.csv")
    train, val, test = three(tmp_path)
    plain = test.partition("=")[2]
    assert "prefix" in refusal(ConfigError, train, val.partition("=")[2])
    assert "--split patient" in refusal(ConfigError, train, split="patient")
    assert "--train-val-list and --test-list" in refusal(ConfigError, plain, split="official")
    assert "--split official" in refusal(ConfigError, plain, test_list="x", split="patient")
    assert "--images" in refusal(ConfigError, plain, found_only=True)


def test_patient_split_is_recorded_and_repeatable(tmp_path: Path) -> None:
    options: dict[str, Any] = {"split": "patient", "fractions": (0.4, 0.3, 0.3), "seed": 5}
    table, _ = build_text(tmp_path, NIH_V2020, **options)
    tables = {"t.csv": hashlib.sha256(NIH_V2020.encode()).hexdigest()}
    expected = {"kind": "patient", "seed": 5, "fractions": [0.4, 0.3, 0.3], "tables": tables}
    assert manifest.split_info(table) == expected
    assert set(table["split"].to_pylist()) == {"test", "train", "val"}
    assert table.equals(build_text(tmp_path, NIH_V2020, **options)[0])


def test_official_split(tmp_path: Path) -> None:
    def write_list(name: str, *images: str) -> str:
        data = "\r\n".join([*images, ""]).encode()
        return put(tmp_path / name, gzip.compress(data, mtime=0) if name == "test" else data)

    train_val = write_list("train_val", *NIH_NAMES[:2], "99999999_000.png")
    lists = {"train_val_list": train_val, "test_list": write_list("test", NIH_NAMES[2])}
    table, report = build_text(tmp_path, NIH_V2020, split="official", **lists)
    assert table["split"].to_pylist() == ["train", "train", "test", None]
    assert (report.listed_not_in_table, report.in_neither_list) == (1, 1)
    info = manifest.split_info(table)
    assert (info["kind"], info["seed"], info["fractions"]) == ("official", 0, None)
    assert set(info["lists"]) == {"train_val", "test"}


def test_official_split_refuses_bad_lists(tmp_path: Path) -> None:
    for kind, train_val, test, part in (
        (TableError, "x.png\n", None, "/test.txt: no such file"),  # first: the file stays
        (TableError, f"{NIH_NAMES[0]}\n{NIH_NAMES[2]}\n", f"{NIH_NAMES[2]}\n", NIH_NAMES[2]),
        (TableError, "x.png\n", "\n", "/test.txt: the list is empty"),
        (TableError, "x.png\n", "y.png\n", "/test.txt; are they NIH's lists?"),
        (LeakError, f"{NIH_NAMES[0]}\n", f"{NIH_NAMES[1]}\n", "1 (test+train)"),
    ):
        lists = {"train_val_list": put(tmp_path / "a.txt", train_val), "test_list": str(tmp_path / "test.txt")}
        if test is not None:
            put(tmp_path / "test.txt", test)
        assert part in refusal(kind, put(tmp_path / "t.csv", NIH_V2020), split="official", **lists)


@pytest.mark.parametrize("layout", ["flat", "nih", "archives", "uri", "uri blanks #1", "uri archives", "uri options"])
def test_images_are_found_in_any_layout(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / layout
    location = folder.as_uri() if "uri" in layout else str(folder)
    if "archives" in layout:
        write_tar(folder / "a.tar.gz", f"images/{NIH_NAMES[0]}", "images/other.png", f"images/{NIH_NAMES[2]}")
        write_tar(folder / "b.tar.gz", NIH_NAMES[1], "README.txt")
        inner = [f"a.tar.gz::images/{NIH_NAMES[0]}", f"b.tar.gz::{NIH_NAMES[1]}", f"images/{NIH_NAMES[2]}"]
    else:
        inner = [f"images_00{i}/images/{name}" if layout == "nih" else name for i, name in enumerate(NIH_NAMES)]
        put(folder / "other.png", png())
    for name in inner:
        if "::" not in name:
            put(folder / name, png())
    options = "?anonymous=a/b" if "options" in layout else ""
    table, report = build_text(tmp_path, NIH_V2020, images=location + options)
    assert table["path"].to_pylist() == [*(f"{location}/{name}{options}" for name in inner), None]
    if not options:
        assert [load_image(path).shape for path in table["path"].to_pylist()[:3]] == [(32, 32)] * 3
    assert (report.images_found, report.images_missing, report.files_not_in_table) == (3, 1, 1)
    if "archives" in layout:
        assert (report.not_images, report.unpacked_members) == ({".txt": 1}, 1)
        assert len(report.lines()) == 4


def test_images_and_lists_in_another_unicode_form_match_the_table(tmp_path: Path) -> None:
    one, two = "Ren\u00e9.png", "Rene\u0301.png"
    for folder, name in (("i", two), ("i", "b.png"), ("both", one), ("both", two)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(png())
    text = f"Image,Patient ID,Mass\n{one},1,1\nb.png,2,0\n"
    lists = {"train_val_list": put(tmp_path / "tv", f"{two}\n"), "test_list": put(tmp_path / "te", "b.png\n")}
    table, report = build_text(tmp_path, text, images=str(tmp_path / "i"), split="official", **lists)
    assert table["image_id"].to_pylist() == [one, "b.png"]
    assert table["path"].to_pylist() == [f"{tmp_path}/i/{two}", f"{tmp_path}/i/b.png"]
    assert table["split"].to_pylist() == ["train", "test"]
    assert (report.images_found, report.files_not_in_table, report.listed_not_in_table) == (2, 0, 0)
    table, report = build_text(tmp_path, text, images=str(tmp_path / "both"))
    assert table["path"].to_pylist() == [f"{tmp_path}/both/{one}", None]
    assert report.files_not_in_table == 1


def test_local_paths_are_absolute_and_file_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "b.png", b"x")
    monkeypatch.chdir(tmp_path)
    for images, root in ((".", tmp_path), (f"file://{tmp_path}",) * 2, (f"file:{tmp_path}",) * 2):
        table, _ = build_text(tmp_path, "Image,Mass\nb.png,1\n", images=images)
        assert table["path"].to_pylist() == [f"{root}/b.png"]


@pytest.mark.parametrize("between", ["/", ".tar.gz::images/"])
def test_name_found_twice_is_refused(tmp_path: Path, between: str) -> None:
    images = tmp_path / "images"
    for place in ("a", "b"):
        if between != "/":
            write_tar(images / f"{place}.tar.gz", f"images/{NIH_NAMES[0]}", "images/not_in_the_table.png")
        else:
            put(images / place / NIH_NAMES[0], b"x")
            put(images / place / "not_in_the_table.png", b"x")
    message = refusal(TableError, put(tmp_path / "t.csv", NIH_V2020), images=str(images))
    assert message.startswith(f"--images {images}: 1 ")
    assert f"{images}/a{between}{NIH_NAMES[0]} and {images}/b{between}{NIH_NAMES[0]}" in message


def test_rows_without_image_are_left_out_on_request_and_no_image_at_all_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "images" / "b.png", b"x")
    message = refusal(TableError, put(tmp_path / "t.csv", NIH_V2020), images=str(tmp_path / "images"))
    assert message.startswith(f"--images {tmp_path / 'images'}: ")
    assert NIH_NAMES[0] in message
    text = f"{HEAD}a.png,Mass,1\nb.png,Mass,2\n"
    table, report = build_text(tmp_path, text, images=str(tmp_path / "images"), found_only=True)
    assert table["image_id"].to_pylist() == ["b.png"]
    assert (report.rows, report.left_out, report.images_missing) == (1, 1, 1)
    assert manifest.split_info(table)["rows_without_picture_left_out"] == 1


@pytest.mark.parametrize("uri", [False, True])
def test_manifest_of_images_uses_names_or_paths_as_ids(tmp_path: Path, uri: bool) -> None:
    """Names where they are unique; paths below the folder where any name repeats."""
    for name in ("b.png", "sub 1/a.png", "sub 1/note.txt", ".hidden.png"):
        put(tmp_path / name, b"x")
    root = tmp_path.as_uri() if uri else str(tmp_path)
    for location in (root, f"{root}/{'?x=a/b' if uri else ''}"):
        table = manifest.manifest_of_images(location)
        assert table.schema.equals(manifest.SCHEMA)
        assert table["image_id"].to_pylist() == ["b.png", "a.png"]
        assert all(table[name].null_count == 2 for name in manifest.SCHEMA.names[2:])
        put(tmp_path / "sub2" / "a.png", b"x")
        assert manifest.manifest_of_images(location)["image_id"].to_pylist() == ["b.png", "sub 1/a.png", "sub2/a.png"]
        (tmp_path / "sub2" / "a.png").unlink()


def test_manifest_of_images_inside_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ids(location: str) -> list[str]:
        return manifest.manifest_of_images(location)["image_id"].to_pylist()

    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "images" / "a.tar.gz", "i/2.png", "i/1.png", "notes.txt")
    put(tmp_path / "images" / "0.png", b"x")
    table = manifest.manifest_of_images("images/")
    assert table["image_id"].to_pylist() == ["0.png", "2.png", "1.png"]
    assert table["path"][1].as_py() == f"{tmp_path}/images/a.tar.gz::i/2.png"
    assert ids("images/a.tar.gz") == ["2.png", "1.png"]
    manifest.write_manifest(table, tmp_path / "m.parquet")
    again = manifest.read_manifest(tmp_path / "m.parquet")
    assert again.equals(table)
    assert [line.rpartition(": ")[2] for line in manifest.listing_notes(again)] == ["1 .txt"]
    assert manifest.split_info(again) == {}
    write_tar(tmp_path / "images" / "b.tgz", "i/1.png")
    expected = ["0.png", "a.tar.gz::i/2.png", "a.tar.gz::i/1.png", "b.tgz::i/1.png"]
    assert ids("images") == ids((tmp_path / "images").as_uri()) == expected
    write_tar(tmp_path / "twice.tar", "a/1.png", "b/1.png")
    assert ids("twice.tar") == ["a/1.png", "b/1.png"]


def test_bad_metadata() -> None:
    table = pa.table({"image_id": ["a"]})
    assert (manifest.listing_notes(table), manifest.split_info(table)) == ([], {})
    for text in ("{", "[1]", '{"left_out": 3}'):
        assert manifest.listing_notes(table.replace_schema_metadata({"ray_cxr.listing": text})) == []
    assert manifest.split_info(table.replace_schema_metadata({"ray_cxr.split": "[1]"})) == {}
    with pytest.raises(TableError, match=r"ray_cxr\.split"):
        manifest.split_info(table.replace_schema_metadata({"ray_cxr.split": "{"}))


def write(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, **options)
    return path


def test_written_manifest_is_read_back(tmp_path: Path) -> None:
    table, _ = build_text(tmp_path, NIH_2017, split="patient")
    manifest.write_manifest(table, tmp_path / "new" / "m.parquet")
    again = manifest.read_manifest(tmp_path / "new" / "m.parquet")
    assert (again, manifest.split_info(again)) == (table, manifest.split_info(table))
    # Absent columns are filled, other types are cast.
    columns = {"Mass": pa.array([1, None], pa.int64()), "image_id": ["a", "b"], "patient_id": [7, 8]}
    table = manifest.read_manifest(write(tmp_path / "m.parquet", pa.table(columns)))
    assert table.schema.equals(manifest.SCHEMA)
    assert table["Mass"].to_pylist() == [1, None]
    assert table["patient_id"].to_pylist() == ["7", "8"]
    assert table["age"].null_count == 2


IDS = pa.array(["a", "b"])


def test_bad_columns_are_refused(tmp_path: Path) -> None:
    for columns, part in (
        ({"name": IDS}, "image_id"),
        ({"image_id": ["a", "a"]}, "1 rows repeat an image_id"),
        ({"image_id": ["a", None]}, "1 rows have no image_id"),
        ({"image_id": IDS, "age": ["x", "y"]}, "column age is string, not double"),
        ({"image_id": IDS, "Mass": [0.5, 1.0]}, "column Mass is double, not int8"),
        ({"image_id": IDS, "Mass": [1, 300]}, "column Mass is int64, not int8"),
        ({"image_id": IDS, "Mass": [1, -1]}, "column Mass holds [-1]"),
        ({"image_id": IDS, "split": ["train", "dev"]}, "column split holds ['dev']"),
    ):
        path = write(tmp_path / "m.parquet", pa.table(columns))
        with pytest.raises(TableError, match=f"^{path}: .*{re.escape(part)}"):
            manifest.read_manifest(path)


def test_files_that_are_no_manifest_are_refused(tmp_path: Path) -> None:
    texts = [put(tmp_path / f"{i}", data) for i, data in enumerate((b"", b"PAR1", b"Image,Mass\na.png,1\n"))]
    twice = write(tmp_path / "twice", pa.Table.from_arrays([IDS, IDS], names=["image_id", "image_id"]))
    for path in (twice, *texts, tmp_path, tmp_path / "none.parquet"):
        with pytest.raises(TableError, match=f"^{path}: "):
            manifest.read_manifest(path)


def random_manifest(count: int) -> pa.Table:
    rng = np.random.default_rng(0)

    def with_nulls(values: Any, kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind, mask=rng.random(count) < 0.3)

    texts = {name: [f"{name}{i % 7}" for i in range(count)] for name in manifest.SCHEMA.names[:9]}
    columns = {name: with_nulls(values, pa.string()) for name, values in texts.items()}
    columns["image_id"] = pa.array([f"{i}.png" for i in range(count)])
    columns["split"] = with_nulls(rng.choice(["train", "val", "test"], count), pa.string())
    columns["age"] = with_nulls(rng.uniform(0, 99, count), pa.float64())
    columns["follow_up"] = with_nulls(rng.integers(0, 9, count).astype(np.int32), pa.int32())
    columns |= {name: with_nulls(rng.integers(0, 2, count).astype(np.int8), pa.int8()) for name in LABELS}
    return pa.table(columns, schema=manifest.SCHEMA)


@settings(max_examples=12)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 40), st.sampled_from(["zstd", "none"]), st.booleans())
def test_digest_does_not_depend_on_file_layout(tmp_path_factory, count, group, cut, codec, dictionary) -> None:
    table = random_manifest(count)
    path = tmp_path_factory.getbasetemp() / "digest.parquet"
    write(path, table, row_group_size=group, compression=codec, use_dictionary=dictionary)
    read = manifest.read_manifest(path)
    pieces = pa.concat_tables([table.slice(0, cut), table.slice(cut)])
    pandas = pa.Table.from_pandas(read.to_pandas(), schema=manifest.SCHEMA, preserve_index=False)
    assert {manifest.digest(one) for one in (read, pieces, pandas)} == {manifest.digest(table)}
    # A slice has the digest of the same rows written alone.
    part = table.slice(cut // 2, group)
    assert manifest.digest(part) == manifest.digest(manifest.read_manifest(write(path, part)))


def test_digest_changes_with_any_value() -> None:
    table = random_manifest(9)
    digests = {manifest.digest(table)}
    for index, field in enumerate(manifest.SCHEMA):
        for row in (0, 8):
            values = table[index].to_pylist()
            values[row] = {"string": "x", "double": 1.5}.get(str(field.type), 1) if values[row] is None else None
            digests.add(manifest.digest(table.set_column(index, field, pa.array(values, field.type))))
    digests |= {manifest.digest(table.slice(1)), manifest.digest(table.take([1, 0, *range(2, 9)]))}
    assert len(digests) == 1 + 2 * len(manifest.SCHEMA) + 2


def test_digest_separates_null_zero_blank_and_text_boundaries(tmp_path: Path) -> None:
    """Prepared folders and score runs name their input by it, so that it is stable over versions too."""

    def digest(**columns: list[Any]) -> str:
        nulls = [None] * max(map(len, columns.values()))
        return manifest.digest(pa.table({**dict.fromkeys(manifest.SCHEMA.names, nulls), **columns}, manifest.SCHEMA))

    assert digest(Mass=[0]) != digest(Mass=[None])
    assert digest(Mass=[1]) != digest(Nodule=[1])
    assert digest(sex=[""]) != digest(sex=[None])
    assert digest(image_id=["ab", "c"]) != digest(image_id=["a", "bc"])
    assert digest(image_id=["a"]) != digest(path=["a"])
    table, _ = build_text(tmp_path, NIH_V2020)
    assert manifest.digest(table) == "dab02e1e5af8df98b2c984ae630179f35176e820709586462be0f0fcfd6acb8b"
