"""CSV tables as text: every cell is a string, and every row is known by its line in the file.

All readers of tables (manifest, consensus labels, boxes, split lists) share the parser, the spellings of columns and
the checks in this module, so that their errors name file and line in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ray_cxr import labels
from ray_cxr.data import identity, table_text
from ray_cxr.errors import TableError

#: Spellings of the columns that several kinds of tables have, normalised by `normalize_header`.
COLUMNS: dict[str, tuple[str, ...]] = {
    "image_id": ("imageindex", "image", "imageid", "imagename", "filename"),
    "labels": ("findinglabels",),
    "patient_id": ("patientid", "patient"),
    "study_id": ("studyid", "studyinstanceuid", "study"),
    "age": ("patientage", "age"),
    "sex": ("patientgender", "patientsex", "sex", "gender"),
    # Several of these can be in one table; see `CsvTable.find_all` and `views.choose_view`.
    "view": (
        *("viewposition", "view", "projection", "viewpositiondicom", "viewcodesequencecodemeaning"),
        *("frontallateral", "appa"),
    ),
    "follow_up": ("followup",),
}
KNOWN_HEADERS = frozenset(spelling for spellings in COLUMNS.values() for spelling in spellings)
#: Numbers with a decimal comma, also with a unit or an exponent. Three digits after a comma can be thousands. In tables
#: separated by semicolons they are decimals: spreadsheets write those where the comma is the decimal mark.
_DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d{1,2}|\d{4,})((?:\s*[A-Za-z][\w+-]*)?)")
_ANY_DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d+)((?:\s*[A-Za-z][\w+-]*)?)")


@dataclass(frozen=True, eq=False)
class CsvTable:
    """A table with at least one row of text cells; the index of `rows` holds line numbers."""

    path: str
    rows: pd.DataFrame
    separator: str

    @property
    def headers(self) -> list[str]:
        return [str(name) for name in self.rows.columns]

    def shown_headers(self) -> str:
        return ", ".join(self.headers[:12]) + (" ..." if len(self.headers) > 12 else "")

    def find_columns(self, spellings: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
        """Return for each name the header that spells it; names without a column are left out."""
        headers = {normalize_header(name): name for name in reversed(self.headers)}
        matches = {name: [headers[text] for text in texts if text in headers] for name, texts in spellings.items()}
        return {name: columns[0] for name, columns in matches.items() if columns}

    def find_all(self, spellings: Sequence[str]) -> list[str]:
        """Return the headers of all columns that one of the spellings spells, in the order of the spellings."""
        found = [self.find_columns({"": (spelling,)}) for spelling in spellings]
        return [columns[""] for columns in found if columns]

    def find_labels(self, canonicalize: Callable[[str], str | None]) -> dict[str, str]:
        """Return the headers of columns for labels, by the label that `canonicalize` returns for the header."""
        columns: dict[str, str] = {}
        for column in self.headers:
            label = canonicalize(column)
            if label in columns:
                raise TableError(
                    f"{self.path}: {columns[label]!r} and {column!r} both spell {label}; remove one of them"
                )
            if label:
                columns[label] = column
        return columns

    def read_image_ids(self, columns: Mapping[str, str]) -> pd.Series:
        """Return the image names, after a check of all columns of ids; `columns` come from `find_columns`."""
        if "image_id" not in columns:
            raise TableError(
                f"{self.path}: has no image column ('Image Index' or 'Image'); its columns are: {self.shown_headers()}"
            )
        ids = self.rows[columns["image_id"]].str.strip()
        if (ids == "").any():
            raise self.error(ids == "", "has no image name")
        for name in identity.COLUMNS:
            if name in columns:
                identity.check_series(self.rows[columns[name]], self.path, images=name == "image_id")
        return ids

    def read_patient_ids(self, column: str | None) -> pd.Series:
        """Return the patient ids as the table writes them; None for blanks and for a table without the column."""
        mark = "[.,]" if self.separator == ";" else "[.]"
        ids = self.read_optional(column).str.replace(rf"^(\d+){mark}0+$", r"\1", regex=True)
        return ids.where(ids.notna(), None)

    def read_optional(self, column: str | None) -> pd.Series:
        """Return a column's text without outer blanks; None for `identity.MISSING`, or without the column."""
        if column is None:
            return pd.Series([None] * len(self.rows), index=self.rows.index, dtype="object")
        text = self.rows[column].str.strip().astype("object")
        return text.mask(text.isin(identity.MISSING), None)

    def read_numbers(self, column: str) -> pd.Series:
        """Return a column's text without outer blanks, and numbers with a decimal comma with a point instead."""
        text = self.rows[column].str.strip()
        pattern = _ANY_DECIMAL_COMMA if self.separator == ";" else _DECIMAL_COMMA
        numbers = {cell: match for cell in text.unique() if "," in cell and (match := pattern.fullmatch(cell))}
        return text.replace({cell: match.expand(r"\1.\2\3") for cell, match in numbers.items()}) if numbers else text

    def read_values(self, column: str, values: Mapping[str, int | None], expected: str) -> pd.Series:
        """Translate the cells of a column by `values`, in lower case and without outer blanks: Int8; refuse others."""
        text = self.read_numbers(column).str.lower()
        is_bad = ~text.isin(list(values))
        if is_bad.any():
            raise self.error(is_bad, f"{column} is {self.rows[column][is_bad].iloc[0].strip()!r}; use {expected}")
        return text.map(values).astype("Int8")

    def refuse_contradictions(self, values: pd.DataFrame) -> None:
        """Refuse rows with No Finding together with another label; `values` has a column per label."""
        if labels.NO_FINDING in values:
            others = values.drop(columns=labels.NO_FINDING)
            clash = (values[labels.NO_FINDING] == 1).fillna(False) & (others == 1).any(axis=1)
            if clash.any():
                raise self.error(clash, "No Finding is 1 together with a finding; correct the row")

    def error(self, is_bad: pd.Series, reason: str) -> TableError:
        """Return the error for the first row where `is_bad` is true."""
        return TableError(f"{self.path}: line {is_bad.index[int(np.argmax(is_bad.to_numpy()))]}: {reason}")


def normalize_header(header: str) -> str:
    """Return a header in lower case with letters and digits only, as `COLUMNS` spells it."""
    return re.sub(r"[^a-z0-9]", "", header.lower())


def read_csv(path: str) -> CsvTable:
    """Read a CSV file in any form that `table_text` reads; refuse repeated columns and rows of another length."""
    separator, lines = table_text.split_rows(table_text.read_text(path), path, _names_images)
    if not lines:
        raise TableError(f"{path}: the table is empty")
    first = next(iter(lines))
    header = lines.pop(first)
    if not lines:
        raise TableError(f"{path}: the table has a header but no rows")
    named = max(i for i, name in enumerate(header) if name.strip()) + 1
    for line, row in lines.items():
        if len(row) < named or any(cell.strip() for cell in row[len(header) :]):
            counts = f"line {line} has {len(row)} columns, the header (line {first}) {len(header)}"
            raise TableError(f"{path}: {counts}; correct the row")
        row[len(header) :] = []
        row += [""] * (len(header) - len(row))
    names: list[str] = []
    for i, name in enumerate(header):
        if name in names and (normalize_header(name) in KNOWN_HEADERS or labels.canonicalize(name)):
            raise TableError(f"{path}: has the column {name!r} twice; remove one of them")
        names.append(f"Unnamed {i}" if not name.strip() else f"{name} ({i})" if name in names else name)
    rows = pd.DataFrame(list(lines.values()), columns=names, index=list(lines), dtype=str)
    return CsvTable(path, rows, separator)


def read_image_list(path: str) -> list[str]:
    """Read a list of image names, one per line, gzipped or not."""
    text = table_text.read_text(path, table_text.SPLIT_LIST)
    lines = dict(table_text.split_lines(text, path, _names_images))
    if not lines:
        raise TableError(f"{path}: the list is empty")
    names = pd.Series(lines, name="the image name", dtype=object)
    identity.check_series(names, path, images=True)
    return names.tolist()


def _names_images(header: Sequence[str]) -> bool:
    return any(normalize_header(cell) in COLUMNS["image_id"] for cell in header)
