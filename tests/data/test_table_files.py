"""Tables as programs save them: encodings, separators, decimal commas, comments, and files that are no tables."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import sqlite3
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_cxr.data import boxes, consensus, csv_table, manifest_builder
from ray_cxr.errors import TableError
from ray_cxr.labels import LABELS

CELLS = (
    ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Comment"),
    ("a.png", "Cardiomegaly|Mass", "007", "45", "first, second; third\tfourth"),
    ("b.png", "No Finding", "7", "6M", "Lungenödem"),
)
UTF_16 = "utf-16-le", "utf-16-be"
BOMS = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE, "utf-32-le": codecs.BOM_UTF32_LE}


def join(separator: str, end: str = "\n", *, quoted: bool = False, trailing: str = "") -> str:
    def quote(cell: str) -> str:
        return f'"{cell}"' if quoted or separator in cell else cell

    return "".join(separator.join(map(quote, row)) + trailing + end for row in CELLS)


def put(path: Path, data: bytes | str) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def refusal(path: str, read=csv_table.read_csv) -> str:
    with pytest.raises(TableError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


PLAIN = join(",")
SAVED = {
    "semicolon": join(";"),
    "tab": join("\t"),
    "all cells quoted": join(";", quoted=True),
    "CRLF": join(";", "\r\n"),
    "lone CR": join(",", "\r"),
    "sep=": "sep=;\r\n" + join(";", "\r\n"),
    "sep= quoted, with separators": '"sep=,",,,,\n' + PLAIN,
    "sep= tab": "SEP=\t\n" + join("\t"),
    "sep= of another character": "sep=^\n" + join("^"),
    "trailing comma": join(",", trailing=","),
    "trailing semicolon": join(";", trailing=";"),
    "trailing tab": join("\t", trailing="\t"),
    "trailing bar": join("|", quoted=True, trailing="|"),
    "blank lines at the top": "\r\n\n ,,,\n" + PLAIN,
    "comments at the top": "# exported by PACS, version 2; all rights reserved\n#\n" + PLAIN,
    "a comment sign before the header": "#" + PLAIN,
    "end-of-file mark of DOS": PLAIN + "\x1a",
    "UTF-8 BOM": codecs.BOM_UTF8 + PLAIN.encode(),
    "UTF-8 BOM and sep=": codecs.BOM_UTF8 + b"sep=;\n" + join(";").encode(),
    **{name: (PLAIN if name == "utf-16-be" else join("\t", "\r\n")).encode(name) for name in UTF_16},
    **{f"{name} BOM": bom + join("\t", "\r\n").encode(name) for name, bom in BOMS.items()},
    "gzip of UTF-16": gzip.compress(join(";").encode("utf-16"), mtime=0),
}


@pytest.mark.parametrize("case", SAVED)
def test_tables_as_programs_save_them(tmp_path: Path, case: str) -> None:
    table = csv_table.read_csv(put(tmp_path / "t.csv", SAVED[case]))
    assert [name.lstrip("#") for name in table.headers[:5]] == list(CELLS[0])
    assert table.rows.iloc[:, :5].to_numpy().tolist() == [list(row) for row in CELLS[1:]]
    rows = manifest_builder.read_table(table.path)
    assert rows["image_id"].tolist() == ["a.png", "b.png"]
    assert rows["patient_id"].tolist() == ["007", "7"]
    assert rows["age"].tolist() == [45.0, 0.5]
    assert [[name for name in LABELS if row[name] == 1] for _, row in rows.iterrows()] == [
        ["Cardiomegaly", "Mass"],
        ["No_Finding"],
    ]


def test_line_numbers_count_all_lines_of_the_file(tmp_path: Path) -> None:
    text = "sep=;\n\n# comment\nImage;Finding Labels\na.png;Mass\nb.png;Nodul\n"
    assert refusal(put(tmp_path / "t.csv", text), manifest_builder.read_table).startswith("line 6 (b.png)")
    assert refusal(put(tmp_path / "t.csv", text.replace("b.png;", "b.png;;"))).startswith("line 6 has 3 columns")


def test_blank_findings_between_bars_are_no_findings(tmp_path: Path) -> None:
    text = "Image,Finding Labels\na.png,Mass|\nb.png,|Mass||Edema|\n"
    rows = manifest_builder.read_table(put(tmp_path / "t.csv", text))
    assert rows["Mass"].tolist() == [1, 1]
    assert rows["Edema"].tolist() == [0, 1]
    message = refusal(put(tmp_path / "t.csv", "Image,Finding Labels\na.png,|\n"), manifest_builder.read_table)
    assert message.startswith("line 2 (a.png): unknown finding '|'")


def test_ids_written_as_formulas_of_a_spreadsheet(tmp_path: Path) -> None:
    text = 'Image,Mass,Patient ID\na.png,1,="00123"\nb.png,1,"=""0124"""\n'
    assert manifest_builder.read_table(put(tmp_path / "t.csv", text))["patient_id"].tolist() == ["00123", "0124"]


def test_decimal_commas(tmp_path: Path) -> None:
    head, cells = ("Image", "Patient ID", "Age", "Mass", "Edema"), ("a.png", "12,0", "45,5", "1,0", "0,0")
    for separator, patient in ((";", "12"), ("\t", "12,0"), ("|", "12,0")):
        path = put(tmp_path / "t.csv", f"{separator.join(head)}\n{separator.join(cells)}\n")
        row = manifest_builder.read_table(path).iloc[0]
        assert (row["age"], row["Mass"], row["Edema"], row["patient_id"]) == (45.5, 1, 0, patient)
        assert {name: values.tolist() for name, values in consensus.read_consensus(path).labels.items()} == {
            "Edema": [0],
            "Mass": [1],
        }
    quoted = put(tmp_path / "t.csv", 'Image,Age,Mass\na.png,"45,5","1,0"\nb.png,"1,024",0\n')
    assert manifest_builder.read_table(quoted)["age"].tolist()[0] == 45.5


def test_decimal_commas_of_boxes(tmp_path: Path) -> None:
    text = "Image;Finding;x;y;w;h\na.png;Mass;225,084;2,5E+02;10,25;7\n"
    assert boxes.read_boxes(put(tmp_path / "t.csv", text)).xywh.tolist() == [[225.084, 250.0, 10.25, 7.0]]
    text = text.replace(";", "\t")
    assert "line 2: x is '225,084', not a number" in refusal(put(tmp_path / "t.csv", text), boxes.read_boxes)
    text = text.replace("225,084", "225,0847")
    assert boxes.read_boxes(put(tmp_path / "t.csv", text)).xywh[0, 0] == 225.0847


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Image,Mass;Image;Edema\n1,2;3;4\n", ["separated by comma or by semicolon", "sep=,"]),
        ("sep=,\nImage;Mass\na.png;1\n", ["sep=,", "semicolon"]),
        ("sep=;\n", ["empty"]),
        (codecs.BOM_UTF16_LE, ["empty"]),
        ("sep=;\nImage;Mass\n", ["no rows"]),
        ("# no table\n# at all\n", ["empty"]),
        ("Export of today\nImage,Mass\na.png,1\n", ["line 2 has 2 columns", "the header (line 1) 1"]),
        ("Image,Mass,Comment\na.png,1,ödem\n".encode("latin-1"), ["line 2", "not text in UTF-8", "iconv"]),
        (codecs.BOM_UTF16_LE + "Image,Mass\na.png,1".encode("utf-16-le")[:-1], ["UTF-16", "damaged"]),
        ("Image,Mass\na.png,1\n\0\0\0\0", ["NUL", "copy it again"]),
    ],
)
def test_ambiguous_or_damaged_tables_are_refused(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    message = refusal(put(tmp_path / "t.csv", text))
    assert all(part in message for part in parts), message


def zip_bytes(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, "application/vnd.oasis.opendocument.spreadsheet" if name == "mimetype" else PLAIN)
    return stream.getvalue()


def parquet_bytes() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"image_id": ["a.png"], "path": ["/a.png"]}), stream)
    return stream.getvalue()


def sqlite_bytes() -> bytes:
    with sqlite3.connect(":memory:") as database:
        database.execute("CREATE TABLE t (image TEXT)")
        return database.serialize()


def npy_bytes() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


SAVE, UNPACK = "save the table as CSV in UTF-8", "unpack it and pass a file of it"
OTHER_FILES = {
    "zip": (zip_bytes("t.csv"), "is a ZIP archive", UNPACK),
    "empty zip": (zip_bytes(), "is a ZIP archive", UNPACK),
    "xlsx": (zip_bytes("[Content_Types].xml", "xl/workbook.xml"), "is an Excel workbook (.xlsx)", SAVE),
    "xlsx of other programs": (zip_bytes("xl/worksheets/sheet1.xml"), "is an Excel workbook (.xlsx)", SAVE),
    "ods": (zip_bytes("mimetype", "content.xml"), "is an OpenDocument spreadsheet", SAVE),
    "xls": (bytes.fromhex("d0cf11e0a1b11ae1") + bytes(600), "is an Excel workbook (.xls) or another Office file", SAVE),
    "bzip2": (bz2.compress(PLAIN.encode()), "is a bzip2 file", UNPACK),
    "xz": (lzma.compress(PLAIN.encode()), "is an xz file", UNPACK),
    "zstd": (pa.compress(PLAIN.encode(), "zstd", asbytes=True), "is a Zstandard file", UNPACK),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(40), "is a 7z archive", UNPACK),
    "tar.gz": (gzip.compress(bytes(257) + b"ustar\0" + bytes(249), mtime=0), "is a tar archive", UNPACK),
    "parquet": (parquet_bytes(), "is a manifest (Parquet)", SAVE),
    "gzip of parquet": (gzip.compress(parquet_bytes(), mtime=0), "is a Parquet file", SAVE),
    "sqlite": (sqlite_bytes(), "is an SQLite database", SAVE),
    "numpy": (npy_bytes(), "is a NumPy array", SAVE),
    "html": ("\n<!DOCTYPE html><html><body>Sign in</body></html>", "is an HTML page", "download the file again"),
    "html in UTF-16": ("<html><table>".encode("utf-16"), "is an HTML page", "download the file again"),
    "xml": ('<?xml version="1.0"?>\n<Workbook>', "is an XML file", SAVE),
    "json": ('{"Image Index": ["a.png"]}', "is a JSON file", SAVE),
    "json lines": ('[{"Image Index": "a.png"}]', "is a JSON file", SAVE),
    "lfs": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is a pointer of Git LFS",
        "run `git lfs pull`",
    ),
    "pdf": ("%PDF-1.7\n", "is a PDF file", SAVE),
    "png": (b"\x89PNG\r\n\x1a\n\0\0", "is a PNG image", SAVE),
    "dicom": (bytes(128) + b"DICM\x02\0", "is a DICOM file", SAVE),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_files_that_are_no_tables_are_named(tmp_path: Path, case: str) -> None:
    data, kind, remedy = OTHER_FILES[case]
    message = refusal(put(tmp_path / "t.csv", data))
    assert message.startswith(f"{kind}, not a CSV table; {remedy}"), message
    message = refusal(put(tmp_path / "t.txt", data), csv_table.read_image_list)
    assert message.startswith(f"{kind}, not a split list; "), message


def test_folders_and_missing_files_are_no_tables(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)).startswith("is a folder, not a CSV table; ")
    assert refusal(str(tmp_path / "none")) == "no such file; pass an existing CSV table"


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_split_lists_as_programs_save_them(tmp_path: Path, separator: str, encoding: str) -> None:
    expected = ["00000001_000.png", "a, b;c.png"]
    for text in (
        "\n".join(expected),
        f"\n{expected[0]}\r\n\r\n{expected[1]}\r\n",
        "\r".join(expected),
        "".join(f"{name}{separator}\n" for name in expected),
        "".join(f'"{name}"\n' for name in expected),
        f"sep={separator}\n" + "".join(f'"{name}"{separator}\n' for name in expected),
        "Image Index\n" + "\n".join(expected),
    ):
        assert csv_table.read_image_list(put(tmp_path / "l.txt", text.encode(encoding))) == expected, text


def test_a_table_is_no_split_list(tmp_path: Path) -> None:
    for separator in ",;\t":
        message = refusal(put(tmp_path / "l.txt", join(separator)), csv_table.read_image_list)
        assert re.match("is a table with 5 columns, not a split list; .*one image name per line", message)
