"""Tables, lists and folders to a manifest: both NIH dialects, one-hot tables, and every refusal by its place."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_cxr.data import demographics, imaging, manifest
from ray_cxr.errors import ConfigError, InputError, LeakError, RayCxrError, TableError
from ray_cxr.labels import FINDINGS, LABELS

#: As NIH's table of 2017: ages with units, padded patients, a comma at the end of every line.
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
ONE_HOT_HEADER = f"Image,{','.join(FINDINGS)},PatientId"


def one_hot_line(image: str, patient: str, **values: Any) -> str:
    return ",".join([image, *(str(values.get(name, 0)) for name in FINDINGS), patient])


def put(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((32, 32)).save(path)


def build(*tables: str, **options: Any) -> list[dict[str, Any]]:
    table, _ = manifest.build_manifest(list(tables), **options)
    assert table.schema.equals(manifest.SCHEMA)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def refusal(kind: type[RayCxrError], *tables: str, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        manifest.build_manifest(list(tables), **options)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    return text


def positives(row: dict[str, Any]) -> list[str]:
    return [name for name in LABELS if row[name] == 1]


# --- NIH's two dialects


def test_columns_of_a_manifest_are_the_contract() -> None:
    kinds = [(item.name, str(item.type)) for item in manifest.SCHEMA]
    assert kinds[:9] == [
        ("image_id", "string"),
        ("path", "string"),
        ("patient_id", "string"),
        ("study_id", "string"),
        ("age", "double"),
        ("sex", "string"),
        ("view", "string"),
        ("follow_up", "int32"),
        ("split", "string"),
    ]
    assert kinds[9:] == [(name, "int8") for name in LABELS]


def test_nih_2017(tmp_path: Path) -> None:
    table, report = manifest.build_manifest([put(tmp_path / "t.csv", NIH_2017)])
    rows = table.to_pylist()
    assert [row["image_id"] for row in rows] == [
        "00000001_000.png",
        "00000001_001.png",
        "00000002_000.png",
        "00000003_000.png",
    ]
    assert [row["patient_id"] for row in rows] == ["1", "1", "2", "3"]
    assert [row["age"] for row in rows] == [58.0, 58.0, None, 0.5]
    assert [row["sex"] for row in rows] == ["M", "M", "F", "F"]
    assert [row["view"] for row in rows] == ["PA", "PA", "AP", "PA"]
    assert [row["follow_up"] for row in rows] == [0, 1, 0, 3]
    assert [positives(row) for row in rows] == [
        ["Cardiomegaly"],
        ["Cardiomegaly", "Emphysema"],
        ["No_Finding"],
        ["Hernia", "Infiltration"],
    ]
    assert all(row[name] in (0, 1) for row in rows for name in LABELS)
    assert all(row["split"] is row["path"] is row["study_id"] is None for row in rows)
    assert (report.absurd_ages, report.unreadable_ages, report.ignored_columns) == (1, 0, [])
    assert report.lines() == ["4 images of 3 patients", "1 ages over 120 years made null"]


def test_both_dialects_give_the_same_patients_and_labels(tmp_path: Path) -> None:
    old = build(put(tmp_path / "2017.csv", NIH_2017))
    new = build(put(tmp_path / "v2020.csv", NIH_V2020))
    for name in ("image_id", "patient_id", "sex", "view", "follow_up", *LABELS):
        assert [row[name] for row in old] == [row[name] for row in new], name
    assert [row["age"] for row in new] == [58.0, 58.0, 81.0, 0.0]


@pytest.mark.parametrize(
    "header",
    [
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position,"
        "OriginalImageWidth,OriginalImageHeight,OriginalImagePixelSpacing_x,OriginalImagePixelSpacing_y",
        "image_index,finding_labels,follow_up,patient_id,age,sex,view,Width,Height,PixelSpacingX,PixelSpacingY",
        'Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"OriginalImage['
        'Width","Height]","OriginalImagePixelSpacing[x","y]"',
    ],
)
def test_renamed_columns_are_known(tmp_path: Path, header: str) -> None:
    body = NIH_V2020.partition("\n")[2]
    table, report = manifest.build_manifest([put(tmp_path / "t.csv", f"{header}\n{body}")])
    plain, _ = manifest.build_manifest([put(tmp_path / "p.csv", NIH_V2020)])
    assert table.equals(plain)
    assert report.ignored_columns == []


def test_unused_columns_are_told(tmp_path: Path) -> None:
    text = "Image Index,Finding Labels,Notes,Room\na.png,Mass,x,1\n"
    _, report = manifest.build_manifest([put(tmp_path / "t.csv", text)])
    assert report.lines()[-1] == "columns not used: Notes, Room"


@pytest.mark.parametrize("form", ["gz", "gz without its suffix", "bom", "crlf", "blank lines", "no last line end"])
def test_forms_of_a_file(tmp_path: Path, form: str) -> None:
    data = NIH_V2020.encode()
    data = {
        "gz": gzip.compress(data, mtime=0),
        "gz without its suffix": gzip.compress(data, mtime=0),
        "bom": b"\xef\xbb\xbf" + data,
        "crlf": data.replace(b"\n", b"\r\n"),
        "blank lines": data.replace(b"\n", b"\n\n") + b",,\n\n",
        "no last line end": data.rstrip(b"\n"),
    }[form]
    table, _ = manifest.build_manifest([put(tmp_path / ("t.csv.gz" if form == "gz" else "t.csv"), data)])
    plain, _ = manifest.build_manifest([put(tmp_path / "plain.csv", NIH_V2020)])
    assert table.equals(plain)


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("058Y", 58.0),
        ("58", 58.0),
        (" 58 ", 58.0),
        ("58.5", 58.5),
        ("006M", 0.5),
        ("026W", 26 * 7 / 365.25),
        ("010D", 10 / 365.25),
        ("000D", 0.0),
        ("010d", 10 / 365.25),
        ("", None),
        ("Y", None),
        ("-3", None),
        ("58YY", None),
        ("abc", None),
        ("nan", None),
    ],
)
def test_age_units(text: str, years: float | None) -> None:
    assert demographics.parse_age(text) == (None if years is None else pytest.approx(years, abs=1e-12))


def test_ages_that_cannot_be_or_cannot_be_read_are_null_and_counted(tmp_path: Path) -> None:
    lines = "".join(f"{i}.png,Mass,{age}\n" for i, age in enumerate(["120", "121", "148Y", "?", "", "1400M", "1500M"]))
    table, report = manifest.build_manifest([put(tmp_path / "t.csv", f"Image,Finding Labels,Age\n{lines}")])
    ages = table["age"].to_pylist()
    assert ages == [120.0, None, None, None, None, pytest.approx(1400 / 12), None]
    assert (report.absurd_ages, report.unreadable_ages) == (3, 1)


@pytest.mark.parametrize(
    ("visit", "expected"), [("7", 7), ("007", 7), ("2.0", 2), ("", None), ("x", None), ("1e20", None), ("inf", None)]
)
def test_follow_up(tmp_path: Path, visit: str, expected: int | None) -> None:
    text = f"Image,Finding Labels,Follow-up #\na.png,Mass,{visit}\n"
    assert build(put(tmp_path / "t.csv", text))[0]["follow_up"] == expected


@pytest.mark.parametrize(
    ("sex", "view", "expected"),
    [
        ("M", "PA", ("M", "PA")),
        ("female", "lateral", ("F", "LATERAL")),
        (" f ", "LL", ("F", "LATERAL")),
        ("O", "ap ", (None, "AP")),
        ("", "", (None, None)),
    ],
)
def test_sex_and_view(tmp_path: Path, sex: str, view: str, expected: tuple[str | None, str | None]) -> None:
    (row,) = build(put(tmp_path / "t.csv", f"Image,Finding Labels,Sex,View\na.png,Mass,{sex},{view}\n"))
    assert (row["sex"], row["view"]) == expected


def test_patients_of_other_places_keep_their_zeros(tmp_path: Path) -> None:
    """In NIH's copies 1 and 00000001 are one patient; elsewhere 007 and 7 may be two people."""
    text = f"{ONE_HOT_HEADER}\n{one_hot_line('a.png', '007')}\n{one_hot_line('b.png', '7')}\n"
    assert [row["patient_id"] for row in build(put(tmp_path / "t.csv", text))] == ["007", "7"]
    nih = (
        f"{ONE_HOT_HEADER}\n{one_hot_line('00000007_000.png', '00000007')}\n{one_hot_line('00000007_001.png', '7.0')}\n"
    )
    assert [row["patient_id"] for row in build(put(tmp_path / "n.csv", nih))] == ["7", "7"]


# --- labels


def test_text_labels_blank_is_not_labelled(tmp_path: Path) -> None:
    table, report = manifest.build_manifest([put(tmp_path / "t.csv", "Image,Finding Labels\na.png,\nb.png,Mass\n")])
    blank, mass = table.to_pylist()
    assert {blank[name] for name in LABELS} == {None}
    assert positives(mass) == ["Mass"]
    assert report.unlabelled_rows == 1


def test_unknown_finding_is_named_with_line_and_image(tmp_path: Path) -> None:
    path = put(tmp_path / "t.csv", "Image Index,Finding Labels\na.png,Mass\n\nb.png,Mass|Nodul\nc.png,Mass|Nodul\n")
    assert refusal(TableError, path) == (f"{path}: line 4 (b.png): unknown finding 'Nodul'; did you mean 'Nodule'?")


def test_no_finding_with_a_finding_is_refused_with_line(tmp_path: Path) -> None:
    path = put(tmp_path / "t.csv", "Image Index,Finding Labels\na.png,Mass\nb.png,No Finding|Mass\n")
    assert refusal(TableError, path).startswith(f"{path}: line 3 (b.png): 'No Finding' stands together with")


def test_one_hot_without_no_finding_column(tmp_path: Path) -> None:
    """No_Finding is 1 where all 14 are 0, null where any is null."""
    lines = [
        one_hot_line("none.png", "1"),
        one_hot_line("mass.png", "2", Mass="1", Nodule="1.0", Edema="0.0"),
        one_hot_line("part.png", "3", Mass=""),
        one_hot_line("both.png", "4", Mass="", Edema="1"),
    ]
    table, report = manifest.build_manifest([put(tmp_path / "t.csv", "\n".join([ONE_HOT_HEADER, *lines]))])
    none, mass, part, both = table.to_pylist()
    assert positives(none) == ["No_Finding"]
    assert positives(mass) == ["Mass", "Nodule"]
    assert mass["No_Finding"] == 0
    assert (part["Mass"], part["Edema"], part["No_Finding"]) == (None, 0, None)
    assert (both["Mass"], both["Edema"], both["No_Finding"]) == (None, 1, None)
    assert report.unlabelled_rows == 0


def test_one_hot_with_no_finding_column_is_taken_as_it_is(tmp_path: Path) -> None:
    text = (
        "Image,Mass,Pleural Thickening,Infiltrate,No Finding\na.png,0,0,0,1\nb.png,1,0,,0\nc.png,,,,\nd.png,0,0,0,0\n"
    )
    table, report = manifest.build_manifest([put(tmp_path / "t.csv", text)])
    rows = table.to_pylist()
    assert [row["No_Finding"] for row in rows] == [1, 0, None, 0]
    assert [row["Mass"] for row in rows] == [0, 1, None, 0]
    assert [row["Infiltration"] for row in rows] == [0, None, None, 0]
    assert [row["Pleural_Thickening"] for row in rows] == [0, 0, None, 0]
    assert {row["Hernia"] for row in rows} == {None}
    assert report.unlabelled_rows == 1


def test_one_hot_of_some_findings_leaves_no_finding_null(tmp_path: Path) -> None:
    (row,) = build(put(tmp_path / "t.csv", "Image,Mass\na.png,0\n"))
    assert row["No_Finding"] is None


def test_one_hot_no_finding_with_a_finding_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "t.csv", "Image,Mass,No Finding\na.png,0,1\nb.png,1,1\n")
    assert refusal(TableError, path) == (f"{path}: line 3: No Finding is 1 together with a finding; mend the row")


@pytest.mark.parametrize("value", ["-1", "-1.0", "2", "0.5", "yes", "nan", "True"])
def test_one_hot_other_values_are_refused_with_line_and_column(tmp_path: Path, value: str) -> None:
    path = put(tmp_path / "t.csv", f"Image,Edema,Mass\na.png,0,1\nb.png,0,{value}\n")
    assert refusal(TableError, path) == (f"{path}: line 3: Mass is {value!r}; use 0, 1 or blank (not labelled)")


# --- tables that are none


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the table is empty"),
        ("\n\n", "the table is empty"),
        ("Image,Finding Labels\n", "the table has a header but no rows"),
        ("Patient ID,Finding Labels\n1,Mass\n", "has no image column ('Image Index' or 'Image'); its columns are: "),
        ("Image Index,Patient ID\na.png,1\n", "has neither 'Finding Labels' nor a column for any finding; its columns"),
        ("Image,Finding Labels,Mass,Edema\na.png,Mass,1,0\n", "Mass, Edema; remove one of the two"),
        ("Image,Infiltration,Infiltrate\na.png,1,0\n", "two columns spell the same finding: Infiltration"),
        ("Image,Mass,Mass\na.png,1,0\n", "has the column 'Mass' twice"),
        ("Image,Mass\na.png,1\n,1\n", "line 3 has no image name"),
        ("Image,Finding Labels,Sex\na.png,Mass,M\nb.png,Ma\n", "line 3 has 2 columns, the header 3; mend the row"),
        ("Image,Finding Labels\na.png,Mass\nb.png,Mass,Edema\n", "line 3 has 3 columns, the header 2; mend the row"),
        ('Image,Finding Labels\na.png,"Mass\nb.png,Mass\n', "cannot be read as CSV: "),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "is not text in UTF-8"),
        ("Image,Finding Labels\nä.png,Mass\n".encode("latin-1"), "is not text in UTF-8"),
        (
            gzip.compress(b"Image,Finding Labels\na.png,Mass\n" * 99, mtime=0)[:-20],
            "is a damaged gzip file; copy it again",
        ),
        (b"\x1f\x8b\x08\x00" + b"\x00" * 6 + b"\xff" * 20, "is a damaged gzip file; copy it again"),
        (b"PK\x03\x04" + b"\xff" * 20, "is not text in UTF-8"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = put(tmp_path / "t.csv", text)
    found = refusal(TableError, path)
    assert found.startswith(f"{path}: ")
    assert message in found


def test_no_such_table_a_folder_a_uri(tmp_path: Path) -> None:
    assert refusal(TableError, f"{tmp_path}/none.csv").endswith("none.csv: no such file; name an existing CSV table")
    assert "Is a directory" in refusal(TableError, str(tmp_path))
    assert refusal(TableError, "s3://bucket/t.csv").startswith("s3://bucket/t.csv: is a URI; copy the CSV table")


@settings(deadline=None, max_examples=100)
@given(st.one_of(st.binary(max_size=200), st.text(alphabet='Image,Finding Labels\n"|01-.png', max_size=200)))
def test_any_bytes_give_a_manifest_or_a_table_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes | str
) -> None:
    body = data if isinstance(data, bytes) else data.encode()
    for header in (b"", b"Image,Finding Labels\n", b"Image,Mass,Patient ID,Age,Follow-up #\n"):
        path = put(tmp_path_factory.getbasetemp() / "any.csv", header + body)
        try:
            rows = build(path)
        except TableError:
            continue
        assert rows


# --- several tables


def test_tables_are_concatenated_and_repeats_refused(tmp_path: Path) -> None:
    head = "Image,Finding Labels,Patient ID\n"
    a = put(tmp_path / "a.csv", f"{head}1.png,Mass,1\n2.png,Edema,2\n")
    b = put(tmp_path / "b.csv", "Image,Edema\n3.png,1\n")
    c = put(tmp_path / "c.csv", f"{head}4.png,Mass,4\n2.png,Mass,2\n1.png,Mass,1\n")
    assert [row["image_id"] for row in build(a, b)] == ["1.png", "2.png", "3.png"]
    assert refusal(TableError, a, b, c) == (
        "2 images are named more than once, such as '1.png' in a.csv and c.csv; each image may stand in the tables once"
    )
    twice = put(tmp_path / "d.csv", f"{head}1.png,Mass,1\n1.png,Mass,1\n")
    assert "such as '1.png' in d.csv;" in refusal(TableError, twice)


def three(folder: Path, *, leak: bool = False, same_image: bool = False) -> list[str]:
    head = "Image,Finding Labels,Patient ID\n"
    train = f"{head}1.png,Mass,1\n2.png,Edema,2\n2b.png,Edema,2\n"
    val = f"{head}3.png,Mass,{'2' if leak else '3'}\n"
    test = f"{head}4.png,Mass,4\n" + ("1.png,Mass,1\n" if same_image else "")
    names = {"train": train, "val": val, "test": test}
    return [f"{name}={put(folder / f'{name}.csv', text)}" for name, text in names.items()]


def test_split_by_file(tmp_path: Path) -> None:
    table, report = manifest.build_manifest(three(tmp_path))
    assert table["split"].to_pylist() == ["train", "train", "train", "val", "test"]
    assert report.by_split == {"train": 3, "val": 1, "test": 1}
    info = manifest.split_info(table)
    assert (info["kind"], info["seed"], info["fractions"]) == ("given", None, None)
    assert set(info["tables"]) == {"train.csv", "val.csv", "test.csv"}


def test_split_by_file_refuses_a_leak_and_drops_it_on_request(tmp_path: Path) -> None:
    tables = three(tmp_path, leak=True)
    assert refusal(LeakError, *tables).startswith("1 patients stand in more than one split: 2 (val+train); ")
    table, report = manifest.build_manifest(tables, on_leak="drop")
    assert table["image_id"].to_pylist() == ["1.png", "3.png", "4.png"]
    assert report.lines()[-1] == ("2 rows removed, their patients being in a more protected split: train 2")
    assert manifest.split_info(table)["dropped_by_split"] == {"train": 2}


def test_an_image_in_two_splits_tables_is_a_leak_that_drop_mends(tmp_path: Path) -> None:
    tables = three(tmp_path, same_image=True)
    assert refusal(LeakError, *tables).startswith("1 patients stand in more than one split: 1 (test+train); ")
    rows = build(*tables, on_leak="drop")
    assert [(row["image_id"], row["split"]) for row in rows if row["patient_id"] == "1"] == [("1.png", "test")]


def test_an_image_in_two_splits_without_patients_is_refused_even_with_drop(tmp_path: Path) -> None:
    a, b = (put(tmp_path / f"{name}.csv", "Image,Finding Labels\n1.png,Mass\n") for name in "ab")
    assert "1 images are named more than once" in refusal(TableError, f"train={a}", f"test={b}", on_leak="drop")


def test_prefixes_and_options_that_contradict(tmp_path: Path) -> None:
    train, val, test = three(tmp_path)
    assert "either every table has a prefix" in refusal(ConfigError, train, val.partition("=")[2])
    assert "--split patient: the tables' prefixes give the split" in refusal(ConfigError, train, split="patient")
    plain = test.partition("=")[2]
    assert refusal(ConfigError, plain, split="official") == ("--split official: needs --train-val-list and --test-list")
    assert "belong to --split official" in refusal(ConfigError, plain, test_list="x", split="patient")


def test_tables_of_one_name_keep_their_digests(tmp_path: Path) -> None:
    a = put(tmp_path / "a" / "labels.csv", "Image,Finding Labels\n1.png,Mass\n")
    b = put(tmp_path / "b" / "labels.csv", "Image,Finding Labels\n2.png,Mass\n")
    table, _ = manifest.build_manifest([a, b])
    assert set(manifest.split_info(table)["tables"]) == {a, b}


# --- splits


def test_split_patient_is_in_the_metadata(tmp_path: Path) -> None:
    path = put(tmp_path / "t.csv", NIH_V2020)
    options: dict[str, Any] = {"split": "patient", "fractions": (0.4, 0.3, 0.3), "seed": 5}
    table, _ = manifest.build_manifest([path], **options)
    info = json.loads(table.schema.metadata[b"ray_cxr.split"])
    digest = info.pop("tables")["t.csv"]
    assert digest == hashlib.sha256(NIH_V2020.encode()).hexdigest()
    assert info == {"kind": "patient", "seed": 5, "fractions": [0.4, 0.3, 0.3]}
    assert sorted(set(table["split"].to_pylist())) == ["test", "train", "val"]
    assert table.equals(manifest.build_manifest([path], **options)[0])


def test_split_patient_refuses_bad_fractions_seeds_and_unknown_patients(tmp_path: Path) -> None:
    path = put(tmp_path / "t.csv", NIH_V2020)
    assert "--fractions 0.5,0.5" in refusal(ConfigError, path, split="patient", fractions=(0.5, 0.5))
    assert "--seed -1" in refusal(ConfigError, path, split="patient", seed=-1)
    bare = put(tmp_path / "b.csv", "Image,Finding Labels\n1.png,Mass\n")
    assert "needs patient ids" in refusal(TableError, bare, split="patient")


@pytest.mark.parametrize("packed", [False, True])
def test_split_official(tmp_path: Path, packed: bool) -> None:
    def listed(name: str, *images: str) -> str:
        data = "\r\n".join([*images, ""]).encode()
        return put(tmp_path / f"{name}.txt{'.gz' if packed else ''}", gzip.compress(data, mtime=0) if packed else data)

    path = put(tmp_path / "t.csv", NIH_V2020)
    train_val = listed("train_val", "00000001_000.png", "00000001_001.png", "99999999_000.png")
    test = listed("test", "00000002_000.png")
    table, report = manifest.build_manifest([path], split="official", train_val_list=train_val, test_list=test)
    assert table["split"].to_pylist() == ["train", "train", "test", None]
    assert (report.listed_not_in_table, report.in_neither_list) == (1, 1)
    assert "1 names in the split lists that no table has" in report.lines()
    assert "1 images in neither split list (split is null)" in report.lines()
    info = manifest.split_info(table)
    assert (info["kind"], info["seed"], info["fractions"]) == ("official", 0, None)
    assert set(info["lists"]) == {Path(train_val).name, Path(test).name}


def test_split_official_refuses_what_cannot_be(tmp_path: Path) -> None:
    path = put(tmp_path / "t.csv", NIH_V2020)
    a = put(tmp_path / "a.txt", "00000001_000.png\n00000002_000.png\n")
    b = put(tmp_path / "b.txt", "00000002_000.png\n")
    c = put(tmp_path / "c.txt", "x.png\n")
    empty = put(tmp_path / "e.txt", "\n")

    def message(kind: type[RayCxrError], one: str, two: str) -> str:
        return refusal(kind, path, split="official", train_val_list=one, test_list=two)

    assert message(TableError, a, b).startswith("1 images stand in both lists, such as '00000002_000.png'")
    assert message(TableError, c, c.replace("c.txt", "d.txt")).endswith(
        "d.txt: no such file; name an existing split list"
    )
    assert message(TableError, a, empty) == f"{empty}: the list is empty"
    assert "damaged gzip" in message(TableError, a, put(tmp_path / "z.gz", b"\x1f\x8b\x08\x00zz"))
    assert "not text in UTF-8" in message(TableError, a, put(tmp_path / "u.txt", b"\xff\xfe\x00"))
    assert message(TableError, c, put(tmp_path / "f.txt", "y.png\n")).endswith("are they NIH's lists?")


def test_split_official_by_lists_that_share_a_patient_is_a_leak(tmp_path: Path) -> None:
    path = put(tmp_path / "t.csv", NIH_V2020)
    a, b = (put(tmp_path / f"{i}.txt", f"00000001_00{i}.png\n") for i in range(2))
    assert "1 (test+train)" in refusal(LeakError, path, split="official", train_val_list=a, test_list=b)


# --- pictures


NIH_NAMES = ("00000001_000.png", "00000001_001.png", "00000002_000.png")


@pytest.mark.parametrize(
    "layout", ["flat", "nih", "uri", "a folder with blanks", "uri with blanks", "uri with options"]
)
def test_pictures_are_found_in_any_layout(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / ("my images #1" if "blanks" in layout else "images")
    places = {name: folder / (f"images_00{i}/images" if layout == "nih" else ".") for i, name in enumerate(NIH_NAMES)}
    for name, place in places.items():
        picture(place / name)
    picture(folder / "other.png")
    location = str(folder)
    if "uri" in layout:
        location = folder.as_uri() + ("?anonymous=a/b" if "options" in layout else "")
    table, report = manifest.build_manifest([put(tmp_path / "t.csv", NIH_V2020)], images=location)
    *found, missing = table["path"].to_pylist()
    assert missing is None
    assert all(path.startswith("file://" if "uri" in layout else "/") for path in found)
    assert (report.images_found, report.images_missing, report.files_not_in_table) == (3, 1, 1)
    if "options" not in layout:
        assert imaging.load(found[0]).shape == (32, 32)
    assert report.lines()[1] == ("pictures: 3 found, 1 in the table but not on disk, 1 on disk but not in the table")


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "images" / NIH_NAMES[0])
    monkeypatch.chdir(tmp_path)
    rows = build(put(tmp_path / "t.csv", NIH_V2020), images="images")
    assert rows[0]["path"] == str(tmp_path / "images" / NIH_NAMES[0])


def test_a_name_found_twice_is_refused(tmp_path: Path) -> None:
    for place in ("a", "b"):
        picture(tmp_path / "images" / place / NIH_NAMES[0])
        picture(tmp_path / "images" / place / "not_in_the_table.png")
    path = put(tmp_path / "t.csv", NIH_V2020)
    images = tmp_path / "images"
    assert refusal(TableError, path, images=str(images)) == (
        f"--images {images}: 1 names are found more than once, such as {images}/a/{NIH_NAMES[0]} "
        f"and {images}/b/{NIH_NAMES[0]}; point --images at one copy"
    )


def test_folders_that_cannot_serve(tmp_path: Path) -> None:
    path = put(tmp_path / "t.csv", NIH_V2020)
    (tmp_path / "empty").mkdir()
    assert "no such folder" in refusal(InputError, path, images=str(tmp_path / "none"))
    assert "holds no image" in refusal(InputError, path, images=str(tmp_path / "empty"))
    picture(tmp_path / "images" / "x.png")
    assert refusal(TableError, path, images=str(tmp_path / "images")) == (
        f"--images {tmp_path / 'images'}: none of its 1 pictures is named in the tables; "
        "the tables want names such as '00000001_000.png'"
    )


def test_manifest_of_images_takes_names_where_they_are_unique(tmp_path: Path) -> None:
    for name in ("b.png", "sub/a.png", "sub/note.txt", ".hidden.png"):
        put(tmp_path / name, b"x")
    for location in (str(tmp_path), f"{tmp_path}/", tmp_path.as_uri()):
        table = manifest.manifest_of_images(location)
        assert table.schema.equals(manifest.SCHEMA)
        assert table["image_id"].to_pylist() == ["b.png", "a.png"]
        assert [path.rpartition("/")[2] for path in table["path"].to_pylist()] == ["b.png", "a.png"]
        assert all(table[name].null_count == 2 for name in manifest.SCHEMA.names[2:])


@pytest.mark.parametrize("uri", [False, True])
def test_manifest_of_images_takes_paths_where_names_repeat(tmp_path: Path, uri: bool) -> None:
    for name in ("p 1/view.png", "p2/view.png", "p2/other.png"):
        put(tmp_path / name, b"x")
    for location in [tmp_path.as_uri(), f"{tmp_path.as_uri()}/?x=a/b"] if uri else [str(tmp_path), f"{tmp_path}/"]:
        table = manifest.manifest_of_images(location)
        assert table["image_id"].to_pylist() == ["p 1/view.png", "p2/other.png", "p2/view.png"]


# --- archives


def archive_of(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    picture_bytes = np.zeros((32, 32), np.uint8)
    picture_bytes[0, 0] = 9
    Image.fromarray(picture_bytes).save(data, "PNG")
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(data.getvalue())
            tar.addfile(info, io.BytesIO(data.getvalue()))
    return path


@pytest.mark.parametrize("uri", [False, True])
def test_pictures_are_found_inside_archives(tmp_path: Path, uri: bool) -> None:
    images = tmp_path / "my images"
    archive_of(images / "images_001.tar.gz", f"images/{NIH_NAMES[0]}", "images/other.png")
    archive_of(images / "images_002.tar.gz", NIH_NAMES[1], "README.txt")
    picture(images / "unpacked" / NIH_NAMES[2])
    table, report = manifest.build_manifest(
        [put(tmp_path / "t.csv", NIH_V2020)], images=images.as_uri() if uri else str(images)
    )
    *found, missing = table["path"].to_pylist()
    place = images.as_uri() if uri else str(images)
    assert found == [
        f"{place}/images_001.tar.gz::images/{NIH_NAMES[0]}",
        f"{place}/images_002.tar.gz::{NIH_NAMES[1]}",
        f"{place}/unpacked/{NIH_NAMES[2]}",
    ]
    assert missing is None
    assert all(imaging.load(path).shape == (32, 32) for path in found)
    assert (report.images_found, report.images_missing, report.files_not_in_table) == (3, 1, 1)
    assert report.lines()[2] == "files left out, not being images: 1 .txt"


def test_pictures_unpacked_beside_their_archive_are_found_once(tmp_path: Path) -> None:
    images = tmp_path / "images"
    archive_of(images / "images_001.tar.gz", *(f"images/{name}" for name in NIH_NAMES))
    for name in NIH_NAMES[:2]:
        picture(images / "images" / name)
    table, report = manifest.build_manifest([put(tmp_path / "t.csv", NIH_V2020)], images=str(images))
    assert [path and "::" in path for path in table["path"].to_pylist()] == [False, False, True, None]
    assert "2 members of archives not taken, their files lying unpacked beside the archive" in report.lines()


def test_a_name_in_two_archives_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        archive_of(tmp_path / "images" / f"images_00{number}.tar.gz", f"images/{NIH_NAMES[0]}")
    images = tmp_path / "images"
    assert refusal(TableError, put(tmp_path / "t.csv", NIH_V2020), images=str(images)) == (
        f"--images {images}: 1 names are found more than once, such as {images}/images_001.tar.gz::images/"
        f"{NIH_NAMES[0]} and {images}/images_002.tar.gz::images/{NIH_NAMES[0]}; point --images at one copy"
    )


def test_manifest_of_images_inside_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive_of(tmp_path / "images" / "a.tar.gz", "i/2.png", "i/1.png", "notes.txt")
    put(tmp_path / "images" / "0.png", b"x")
    monkeypatch.chdir(tmp_path)
    table = manifest.manifest_of_images("images/")
    assert table["image_id"].to_pylist() == ["0.png", "2.png", "1.png"]
    assert table["path"][1].as_py() == f"{tmp_path}/images/a.tar.gz::i/2.png"
    manifest.write_manifest(table, tmp_path / "m.parquet")
    again = manifest.read_manifest(tmp_path / "m.parquet")
    assert manifest.listing_notes(again) == ["files left out, not being images: 1 .txt"]
    assert manifest.split_info(again) == {}
    assert manifest.manifest_of_images("images/a.tar.gz")["image_id"].to_pylist() == ["2.png", "1.png"]
    archive_of(tmp_path / "images" / "b.tgz", "i/1.png")
    ids = ["0.png", "a.tar.gz::i/2.png", "a.tar.gz::i/1.png", "b.tgz::i/1.png"]
    assert manifest.manifest_of_images("images")["image_id"].to_pylist() == ids
    assert manifest.manifest_of_images((tmp_path / "images").as_uri())["image_id"].to_pylist() == ids
    archive_of(tmp_path / "twice.tar", "a/1.png", "b/1.png")
    assert manifest.manifest_of_images("twice.tar")["image_id"].to_pylist() == ["a/1.png", "b/1.png"]


def test_listing_notes_of_any_table() -> None:
    table = pa.table({"image_id": ["a"]})
    assert manifest.listing_notes(table) == []
    for text in ("{", "[1]", '{"left_out": 3}'):
        assert manifest.listing_notes(table.replace_schema_metadata({"ray_cxr.listing": text})) == []


def test_manifest_of_images_reads_as_a_manifest(tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        put(tmp_path / "images" / name, b"x")
    table = manifest.manifest_of_images(str(tmp_path / "images"))
    manifest.write_manifest(table, tmp_path / "m.parquet")
    again = manifest.read_manifest(tmp_path / "m.parquet")
    assert again.equals(table)
    assert manifest.digest(again) == manifest.digest(table)
    assert manifest.split_info(again) == {}


# --- reading back


def write(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, **options)
    return path


def test_write_and_read(tmp_path: Path) -> None:
    table, _ = manifest.build_manifest([put(tmp_path / "t.csv", NIH_2017)], split="patient")
    manifest.write_manifest(table, tmp_path / "new" / "m.parquet")
    again = manifest.read_manifest(tmp_path / "new" / "m.parquet")
    assert again.equals(table)
    assert manifest.split_info(again) == manifest.split_info(table)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.parquet"]


def test_read_fills_absent_columns_and_casts_what_can_be(tmp_path: Path) -> None:
    given_table = pa.table({"Mass": pa.array([1, None], pa.int64()), "image_id": ["a", "b"], "patient_id": [7, 8]})
    table = manifest.read_manifest(write(tmp_path / "m.parquet", given_table))
    assert table.schema.equals(manifest.SCHEMA)
    assert table["Mass"].to_pylist() == [1, None]
    assert table["patient_id"].to_pylist() == ["7", "8"]
    assert table["age"].null_count == 2


IDS = pa.array(["a", "b"])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"name": IDS}), "has no column image_id; make it with `ray-cxr manifest`"),
        (pa.table({"image_id": ["a", "a"]}), "1 rows repeat an image_id; each image stands in a manifest once"),
        (pa.table({"image_id": ["a", None]}), "1 rows have no image_id"),
        (pa.table({"image_id": IDS, "age": ["x", "y"]}), "column age is string, not double"),
        (pa.table({"image_id": IDS, "Mass": [0.5, 1.0]}), "column Mass is double, not int8"),
        (pa.table({"image_id": IDS, "Mass": [[1], [0]]}), "column Mass is list<"),
        (pa.table({"image_id": IDS, "Mass": [1, 300]}), "column Mass is int64, not int8"),
        (pa.table({"image_id": IDS, "Mass": [1, -1]}), "column Mass holds [-1]; use 0, 1 and null only"),
        (pa.table({"image_id": IDS, "No_Finding": [2, 0]}), "column No_Finding holds [2]; use 0, 1 and null only"),
        (
            pa.table({"image_id": IDS, "split": ["train", "dev"]}),
            "column split holds ['dev']; use train, val, test and null",
        ),
        (pa.Table.from_arrays([IDS, IDS], names=["image_id", "image_id"]), ""),
    ],
)
def test_read_refuses(tmp_path: Path, table: pa.Table, message: str) -> None:
    path = write(tmp_path / "m.parquet", table)
    with pytest.raises(TableError) as caught:
        manifest.read_manifest(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_read_refuses_what_is_no_parquet(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"none\.parquet: no such file; make it with"):
        manifest.read_manifest(tmp_path / "none.parquet")
    for data in (b"", b"PAR1", b"Image,Mass\na.png,1\n"):
        path = put(tmp_path / "m.parquet", data)
        with pytest.raises(TableError, match=r"m\.parquet: not a Parquet file; make it with"):
            manifest.read_manifest(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(TableError, match="folder: "):
        manifest.read_manifest(tmp_path / "folder")


def test_split_info_that_is_not_json() -> None:
    table = pa.table({"image_id": ["a"]})
    assert manifest.split_info(table) == {}
    assert manifest.split_info(table.replace_schema_metadata({"ray_cxr.split": "[1]"})) == {}
    with pytest.raises(TableError, match=r"ray_cxr\.split is not JSON"):
        manifest.split_info(table.replace_schema_metadata({"ray_cxr.split": "{"}))


def some_manifest(count: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)

    def some(values: Any, kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind, mask=rng.random(count) < 0.3)

    columns = {name: some([f"{name}{i % 7}" for i in range(count)], pa.string()) for name in manifest.SCHEMA.names[:9]}
    columns["image_id"] = pa.array([f"{i}.png" for i in range(count)])
    columns["split"] = some(rng.choice(["train", "val", "test"], count), pa.string())
    columns["age"] = some(rng.uniform(0, 99, count), pa.float64())
    columns["follow_up"] = some(rng.integers(0, 9, count).astype(np.int32), pa.int32())
    columns |= {name: some(rng.integers(0, 2, count).astype(np.int8), pa.int8()) for name in LABELS}
    return pa.table(columns, schema=manifest.SCHEMA)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 40), st.sampled_from(["zstd", "none"]), st.booleans())
def test_digest_does_not_depend_on_how_a_file_is_written(
    tmp_path_factory: pytest.TempPathFactory, count: int, group: int, cut: int, codec: str, dictionary: bool
) -> None:
    table = some_manifest(count)
    path = tmp_path_factory.getbasetemp() / "digest.parquet"
    write(path, table, row_group_size=group, compression=codec, use_dictionary=dictionary)
    read = manifest.read_manifest(path)
    pieces = pa.concat_tables([table.slice(0, cut), table.slice(cut)])
    pandas = pa.Table.from_pandas(read.to_pandas(), schema=manifest.SCHEMA, preserve_index=False)
    assert {manifest.digest(one) for one in (read, pieces, pandas)} == {manifest.digest(table)}
    # A part of a table is what is written of it, too.
    part = table.slice(cut // 2, group)
    assert manifest.digest(part) == manifest.digest(manifest.read_manifest(write(path, part)))


def test_digest_changes_with_any_value() -> None:
    table = some_manifest(9)
    digests = {manifest.digest(table)}
    for name, kind in zip(manifest.SCHEMA.names, manifest.SCHEMA.types, strict=True):
        values = table[name].to_pylist()
        for row in (0, 8):
            other = list(values)
            other[row] = (None, {"string": "x", "double": 1.5}.get(str(kind), 1))[values[row] is None]
            changed = table.set_column(table.column_names.index(name), name, pa.array(other, kind))
            digests.add(manifest.digest(changed))
    digests |= {manifest.digest(table.slice(1)), manifest.digest(table.take([1, 0, *range(2, 9)]))}
    assert len(digests) == 1 + 2 * len(manifest.SCHEMA) + 2


def test_digest_tells_null_from_zero_and_from_blank_and_where_texts_end() -> None:
    def of(**columns: list[Any]) -> str:
        count = len(next(iter(columns.values())))
        values = {name: columns.get(name, [None] * count) for name in manifest.SCHEMA.names}
        return manifest.digest(pa.table(values, schema=manifest.SCHEMA))

    assert of(Mass=[0]) != of(Mass=[None])
    assert of(Mass=[1]) != of(Nodule=[1])
    assert of(sex=[""]) != of(sex=[None])
    assert of(image_id=["ab", "c"]) != of(image_id=["a", "bc"])
    assert of(image_id=["a"]) != of(path=["a"])


def test_digest_is_for_ever(tmp_path: Path) -> None:
    """Prepared folders and score runs name their input by it."""
    table, _ = manifest.build_manifest([put(tmp_path / "t.csv", NIH_V2020)])
    assert manifest.digest(table) == "dab02e1e5af8df98b2c984ae630179f35176e820709586462be0f0fcfd6acb8b"


def test_one_patient_in_two_spellings_is_one_patient_row_by_row(tmp_path: Path) -> None:
    """A single foreign row in a table must not hide that 00000001 and 1 are the same patient of NIH's."""
    (tmp_path / "a.csv").write_text("Image,PatientId,Mass\n00000001_000.png,1,0\n")
    (tmp_path / "b.csv").write_text("Image,PatientId,Mass\n00000001_001.png,00000001,0\nextra.png,007,0\n")
    given = [f"train={tmp_path / 'a.csv'}", f"test={tmp_path / 'b.csv'}"]
    with pytest.raises(LeakError, match=r"1 patients .*: 1 \(test\+train\)"):
        manifest.build_manifest(given)
    table, _ = manifest.build_manifest(given, on_leak="drop")
    assert table["patient_id"].to_pylist() == ["1", "007"]


def test_rows_without_a_patient_in_a_split_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Image,Mass\na.png,1\n")
    (tmp_path / "b.csv").write_text("Image,Mass\nb.png,1\n")
    _, report = manifest.build_manifest([f"train={tmp_path / 'a.csv'}", f"test={tmp_path / 'b.csv'}"])
    assert report.unguarded == 2
    assert "2 rows have a split but no patient id: a leak among them cannot be seen" in report.lines()


def test_found_only_leaves_out_and_counts_what_has_no_picture(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Image,PatientId,Mass\na.png,1,0\nb.png,2,1\n")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "b.png").write_bytes(b"x")
    table, report = manifest.build_manifest(
        [str(tmp_path / "t.csv")], images=str(tmp_path / "pictures"), found_only=True
    )
    assert table["image_id"].to_pylist() == ["b.png"]
    assert (report.rows, report.left_out, report.images_missing) == (1, 1, 1)
    assert manifest.split_info(table)["rows_without_picture_left_out"] == 1
    with pytest.raises(ConfigError, match="needs --images"):
        manifest.build_manifest([str(tmp_path / "t.csv")], found_only=True)


def test_file_uris_stay_uris(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Image,Mass\nb.png,1\n")
    (tmp_path / "b.png").write_bytes(b"x")
    for uri in (f"file://{tmp_path}", f"file:{tmp_path}"):
        table, _ = manifest.build_manifest([str(tmp_path / "t.csv")], images=uri)
        assert table["path"][0].as_py() == f"{uri}/b.png"
