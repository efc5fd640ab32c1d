"""Ids that a spreadsheet or a float has changed are refused, in every table; all others stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_cxr.data import boxes, consensus, csv_table, identity, manifest
from ray_cxr.data.manifest_builder import read_table
from ray_cxr.errors import LeakError, TableError
from ray_cxr.reporting import scores
from ray_cxr.reporting.evaluation_set import JoinCounts, Population, join_labels
from ray_cxr.reporting.leakage import check_leakage

REMEDY = "export the table again from the source"
GOOD = "P-1"
#: Seventeen digits as a spreadsheet keeps them: two zeros at the end.
ROUNDED = ["12345678901234500", "12345678901235600", "98765432109876500"]

LOST = [
    *([x] for x in ["2.05367E+37", "2,05367E+37", "-1.5e12", "1.23457E15", "1.23456789012346E+015", "2E+37", "2e-7"]),
    *([x] for x in ["12345678901234567.0", "12345678901234567,0", "9007199254740992.00", "10000000000000000000"]),
    *([x] for x in ["#N/A", "#NV", "#BEZUG!", "#NAME?", "########"]),
    ROUNDED,
    [str(int(float(7**21 + i * 10**14))) for i in range(1, 6)],
]
KEPT = [
    *([x] for x in ("12E10", "12E+10", "2E37", "A1.5E+10", "1.5E+10-B", "1.2.840.10008.1", "12345.0", "12.5", "nan")),
    *([x] for x in ("1234567890123456.0", "#17", "M\xdc-17", r"M\xdc-17", "1234567890123450000", "1" * 40)),
    ["00012345678901234500000"],
    ROUNDED[:2],  # as likely as 1 in 10,000
    [*ROUNDED, "12345678901234567"],
    ["12345678901234567168"],  # what a float64 keeps, and by chance in 1 of 2,048
    [str((1 << 62) + (i << 22)) for i in range(9)],  # low bits without a use, and far more of them than a float loses
]


def csv(path: Path, header: str, rows: list[str]) -> str:
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return str(path)


def ids(values: list[str]) -> list[str]:
    """The rows of an id's table: each value once between two good ones."""
    return [GOOD, *values, GOOD + "b"]


def in_csv(read: Callable[[str], object], header: str, row: str) -> Callable[[Path, list[str], str], object]:
    """Read a table whose rows are `row` with the ids as {x}."""

    def table(home: Path, values: list[str], column: str) -> object:
        rows = [row.format(i=i, x=f'"{x}"') for i, x in enumerate(ids(values))]
        return read(csv(home / "t.csv", header, rows))

    return table


def in_list(home: Path, values: list[str], column: str) -> object:
    return csv_table.read_image_list(csv(home / "t.csv", GOOD, values))


def parquet(home: Path, column: str, values: Any, **more: Any) -> str:
    columns = {"image_id": [f"{i}.png" for i in range(len(values))], **more, column: values}
    pq.write_table(pa.table(columns), home / "t.parquet")
    return str(home / "t.parquet")


def in_manifest(home: Path, values: Any, column: str) -> object:
    return manifest.read_manifest(parquet(home, column, ids(values) if isinstance(values, list) else values))


def in_scores(home: Path, values: Any, column: str) -> object:
    values = ids(values) if isinstance(values, list) else values
    return scores.read_scores(parquet(home, column, values, p_Mass=[0.5] * len(values)))


TABLES: list[tuple[Callable[[Path, Any, str], object], str, str]] = [
    (in_csv(read_table, "Image,Patient ID,Mass", "{i}.png,{x},1"), "patient_id", "Patient ID"),
    (in_csv(read_table, "Image,StudyInstanceUID,Mass", "{i}.png,{x},1"), "study_id", "StudyInstanceUID"),
    (in_csv(read_table, "Image,Mass", "{x},1"), "image_id", "Image"),
    (in_csv(read_table, "Image Index,Finding Labels,Patient ID", "{i}.png,Mass,{x}"), "patient_id", "Patient ID"),
    (in_csv(consensus.read_consensus, "Image,Patient ID,Mass", "{i}.png,{x},1"), "patient_id", "Patient ID"),
    (in_csv(consensus.read_consensus, "Image,Mass", "{x},1"), "image_id", "Image"),
    (in_csv(boxes.read_boxes, "Image,Finding,x,y,w,h", "{x},Mass,1,1,9,9"), "image_id", "Image"),
    (in_list, "image_id", "the image name"),
    *((table, name, name) for table in (in_manifest, in_scores) for name in identity.COLUMNS),
]


def test_ids_that_lost_digits_are_distinguished_from_ids_that_look_odd() -> None:
    def series(values: list[str]) -> pd.Series:
        return pd.Series(ids(values), index=range(2, 4 + len(values)), name="Patient ID", dtype=str)

    for values in LOST:
        with pytest.raises(TableError, match=r"^t.csv: line 3: Patient ID .*" + REMEDY) as caught:
            identity.check_series(series(values), "t.csv")
        assert not [value for value in values if value in str(caught.value)], "an id must not stand in an error"
    for values in KEPT:
        identity.check_series(series(values), "t.csv")
    column = pd.Series(["a", "1", "2E+37", "2E+38"], index=[2, 3, 7, 8], name="Patient ID")
    with pytest.raises(TableError, match=r"^t\.csv: line 7: Patient ID "):  # the first of two
        identity.check_series(column, "t.csv")


@pytest.mark.parametrize(("table", "column", "shown"), TABLES)
def test_every_table_refuses_ids_that_lost_digits(tmp_path: Path, table, column: str, shown: str) -> None:
    for values in (["2,05367E+37"], ["12345678901234567.0"], ROUNDED):
        with pytest.raises(TableError) as caught:
            table(tmp_path, values, column)
        message = str(caught.value)
        place = "row 2" if table in (in_manifest, in_scores) else "line 2" if table is in_list else "line 3"
        assert message.startswith(f"{tmp_path}/t."), values
        assert f": {place}: {shown} " in message, (values, message)
        assert REMEDY in message
        assert "\n" not in message
        assert not [value for value in values if value in message], "an id must not stand in an error"
    for values in (["12E10"], ["12345.0"], ROUNDED[:2]):
        table(tmp_path, values, column)


def test_replacement_characters_are_refused_in_ids_of_people_but_not_in_names_of_files(tmp_path: Path) -> None:
    for table, column, _ in TABLES:
        if column == "image_id":
            table(tmp_path, ["M\ufffd-17"], column)
        else:
            with pytest.raises(TableError, match=f"replacement character.*{REMEDY}"):
                table(tmp_path, ["M\ufffd-17"], column)


def test_ids_stay_as_they_are(tmp_path: Path) -> None:
    rows = [f"{i}.png,{x},1" for i, x in enumerate(("12E10", "12345.0", "007", ""))]
    found = read_table(csv(tmp_path / "t.csv", "Image,Patient ID,Mass", rows))
    assert found["patient_id"].tolist() == ["12E10", "12345", "007", None]


def test_text_for_a_missing_value_is_no_patient_and_no_study(tmp_path: Path) -> None:
    texts = ["007", "nan", "None", "<NA>", "NULL", "null", "NaN", "", " ", "7"]
    expected = ["007", *[None] * 8, "7"]
    for column, header in (("patient_id", "Patient ID"), ("study_id", "StudyInstanceUID")):
        rows = [f"{i}.png,{text},1" for i, text in enumerate(texts)]
        found = read_table(csv(tmp_path / "t.csv", f"Image,{header},Mass", rows))
        assert found[column].tolist() == expected
        path = parquet(tmp_path, column, texts, p_Mass=[0.5] * len(texts))
        assert manifest.read_manifest(path)[column].to_pylist() == expected
        with manifest.open_manifest(path) as file:
            file.copy(tmp_path / "copy.parquet", 3)
        assert manifest.read_manifest(tmp_path / "copy.parquet")[column].to_pylist() == expected
    assert scores.read_scores(parquet(tmp_path, "patient_id", texts, p_Mass=[0.5] * 10)).patients.tolist() == expected


def test_impossible_ages_of_a_manifest_are_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path, "age", [0.0, 120.0, float("nan"), None])
    assert manifest.read_manifest(path)["age"].to_pylist()[:2] == [0.0, 120.0]
    for age in (999.0, -1.0):
        with pytest.raises(TableError, match=f"column age holds {age:g}; use years from 0 to 120, or null"):
            manifest.read_manifest(parquet(tmp_path, "age", [50.0, age]))


@pytest.mark.parametrize("table", [in_manifest, in_scores])
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (pa.array([1.0, 2.0**53]), "53 bits"),
        (pa.array([1.0, -(2.0**60)]), "53 bits"),
        (pa.array([1.0, float("inf")]), "53 bits"),
        (pa.array([1.0, 2.0**24], pa.float32()), "24 bits"),
        (pa.array([1.0, 2.0**24], pa.float32()).dictionary_encode(), "24 bits"),
        (pa.array([1.0, 2.0**11], pa.float16()), "11 bits"),
        (pa.array([1.0, 1.5]), "fraction"),
        (pa.array([1.0, 1e10]), "exponent form"),
        (pa.array([1.0, 12345678901.0]), "exponent form"),
        (pa.array(["a", "2.05367E+37"]).dictionary_encode(), "exponent form"),
        (pa.array([1, 12345678901234500000], pa.uint64()), "15 digits"),
        (pa.array(["a", "2.05367E+37"], pa.large_string()), "exponent form"),
    ],
)
def test_parquet_columns_that_lost_digits_are_refused(tmp_path: Path, table, values: pa.Array, reason: str) -> None:
    for column in identity.COLUMNS:
        with pytest.raises(TableError, match=f"t.parquet: row 2: {column} .*{reason}.*{REMEDY}"):
            table(tmp_path, values, column)


def test_floats_that_lost_nothing_are_read_and_nan_is_no_patient(tmp_path: Path) -> None:
    values = pa.array([12345.0, float("nan"), None, 0.0, 1234567890.0])
    expected = ["12345", None, None, "0", "1234567890"]
    path = parquet(tmp_path, "patient_id", values, p_Mass=[0.5] * 5)
    assert manifest.read_manifest(path)["patient_id"].to_pylist() == expected
    with manifest.open_manifest(path) as file:  # as `score` freezes its input, two rows at a time
        file.copy(tmp_path / "copy.parquet", 2)
    assert manifest.read_manifest(tmp_path / "copy.parquet")["patient_id"].to_pylist() == expected
    assert scores.read_scores(path).patients.tolist() == expected


def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    raw = pa.array([b"M\xdc-17", b"M\xc4-17"])
    invalid = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    for values in (raw, invalid):
        path = parquet(tmp_path, "patient_id", values, p_Mass=[0.5] * 2)
        for read in (manifest.read_manifest, scores.read_scores):
            with pytest.raises(TableError, match="patient_id"):
                read(path)


def test_split_of_an_older_bundle_is_refused(tmp_path: Path) -> None:
    table = pa.table({"image_id": ["a"], "patient_id": ["2.05367E+37"], "split": ["train"]})
    pq.write_table(table, tmp_path / "split.parquet")
    for read in (
        identity.read_split,
        lambda folder: scores.read_training_images(scores.Location.of(str(folder / "split.parquet"))),
    ):
        with pytest.raises(TableError, match=r"split.parquet: row 1: patient_id .*exponent form"):
            read(tmp_path)
    sound = table.set_column(1, "patient_id", pa.array(["17"]))
    pq.write_table(sound, tmp_path / "split.parquet")
    assert identity.read_split(tmp_path).equals(sound)


#: `é` as one character (Unicode's form NFC), and as two (NFD), as macOS writes it in file names.
ONE, TWO = "Ren\u00e9.png", "Rene\u0301.png"


@pytest.mark.parametrize(
    ("names", "known", "expected"),
    [
        (["a", "b", "a"], ["b", "a"], [1, 0, 1]),
        ([ONE, "x", TWO], [TWO, "x"], [-1, 1, 0]),  # both forms are there: only the equal one
        ([ONE, ONE], [TWO], [0, 0]),
        ([TWO], ["a", ONE], [1]),
        ([ONE, TWO], [TWO, ONE], [1, 0]),
        ([None, ONE, "Rene.png"], [TWO, None], [-1, 0, -1]),
        ([], [ONE], []),
        (["\ufb01.png"], ["fi.png"], [-1]),  # a ligature is another name
    ],
)
def test_ids_are_found_in_any_unicode_form(names: list[Any], known: list[Any], expected: list[int]) -> None:
    assert identity.find_ids(names, known).tolist() == expected
    assert identity.find_ids(np.array(names, object), np.array(known, object)).tolist() == expected


def test_tables_join_in_any_unicode_form(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image_id": ["b.png", TWO], "p_Mass": [0.25, 0.75]}), tmp_path / "scores.parquet")
    labels = {field.name: pa.nulls(2, field.type) for field in manifest.SCHEMA}
    labels |= {"image_id": [ONE, "c.png"], "split": ["test", "train"], "Mass": pa.array([1, 0], pa.int8())}
    manifest.write_manifest(pa.table(labels, schema=manifest.SCHEMA), tmp_path / "labels.parquet")
    table = scores.read_scores(tmp_path / "scores.parquet")
    found = join_labels(table, tmp_path / "labels.parquet", "test")
    assert (found.rows.tolist(), found.labels["Mass"].tolist()) == ([1], [1])
    assert found.counts == JoinCounts(1, 1, 0, 0, scored_not_labelled=1, scored_other_split=0)
    population = Population.select_scored(table)
    kept, rows, _, missing = population.match(table, np.array([ONE, ONE, "z.png"], object), "--boxes t.csv")
    assert (kept.tolist(), rows.tolist()) == ([True, True, False], [1, 1])
    assert missing == {"not_scored": 1, "failed": 0, "outside_split": 0}


def test_a_leak_is_found_in_any_unicode_form(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image_id": ["b.png", TWO], "p_Mass": [0.25, 0.75]}), tmp_path / "scores.parquet")
    unknown = np.array([None, None], object)
    training = scores.TrainingImages(np.array([ONE, "z.png"], object), unknown, np.array(["train", "val"], object))
    table = replace(scores.read_scores(tmp_path / "scores.parquet"), training=training)
    with pytest.raises(LeakError, match="1 images and 0 patients of the test split trained this model"):
        check_leakage(table, np.arange(2), unknown, "test", "the test split")


def test_folders_named_as_columns_add_no_column(tmp_path: Path) -> None:
    folder = tmp_path / "split=7" / "patient_id=8"
    folder.mkdir(parents=True)
    table = pa.table({"image_id": ["a"], "patient_id": ["17"], "split": ["train"]})
    pq.write_table(table, folder / "split.parquet")
    assert identity.read_split(folder).equals(table)
    assert identity.read_split(folder, table.schema).equals(table)
