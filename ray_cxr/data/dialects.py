"""Table dialects: how each kind of label table writes its columns, ages and labels.

`detect_dialect` picks one of `DIALECTS` by the columns that hold labels. To add a dialect, derive from `Dialect` (or
from `OneHotDialect`, if the table has a column per finding) and append an instance to `DIALECTS`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import pandas as pd

from ray_cxr import labels
from ray_cxr.data.csv_table import COLUMNS, CsvTable
from ray_cxr.errors import TableError
from ray_cxr.imaging import demographics


class Dialect(ABC):
    """One kind of label table."""

    description: str  # the columns that hold its labels, as an error names them
    columns: Mapping[str, tuple[str, ...]] = COLUMNS  # spellings of the other columns by their name in a manifest

    @abstractmethod
    def find_label_columns(self, table: CsvTable) -> list[str]:
        """Return the headers of the columns with labels; an empty list if the table is of another dialect."""

    @abstractmethod
    def read_labels(self, table: CsvTable, image_ids: pd.Series) -> pd.DataFrame:
        """Return Int8 [n,15] with the columns `labels.LABELS`: 1, 0, or null where the table has no label."""

    def parse_age(self, text: str) -> float | None:
        """Return an age in years, or None if the text is not an age."""
        return demographics.parse_age(text)

    def is_redundant(self, header: str) -> bool:
        """Whether the column is a regular part of this dialect that a manifest does not need."""
        return False


class NihDialect(Dialect):
    """NIH's `Data_Entry`: one text column of findings, separated by `|`.

    Its header breaks bracketed names at the comma. Its copies differ in the names of columns, in ages (`058Y` or `58`)
    and in patient ids (`00000001` or `1`).
    """

    description = "'Finding Labels'"
    _SIZE_COLUMN = re.compile(r"OriginalImage|Height|Width|^[xy]\]?$|Spacing")

    def find_label_columns(self, table: CsvTable) -> list[str]:
        return list(table.find_columns({"labels": COLUMNS["labels"]}).values())

    def read_labels(self, table: CsvTable, image_ids: pd.Series) -> pd.DataFrame:
        text = table.rows[self.find_label_columns(table)[0]]
        codes, unique = pd.factorize(text)
        rows = np.full((len(unique), len(labels.LABELS)), np.nan)
        for position, value in enumerate(unique):
            try:
                if value.strip():
                    rows[position] = labels.encode(labels.parse(value))
            except TableError as error:
                row = int(np.argmax(codes == position))
                raise TableError(f"{table.path}: line {text.index[row]} ({image_ids.iloc[row]}): {error}") from None
        return pd.DataFrame(rows[codes], columns=list(labels.LABELS), index=text.index).astype("Int8")

    def is_redundant(self, header: str) -> bool:
        return self._SIZE_COLUMN.search(header) is not None


class OneHotDialect(Dialect):
    """A column of 0 and 1 per finding; findings without a column are not labelled.

    Without a No Finding column, No_Finding is 1 where all 14 findings are 0, and null where any is null. `values` holds
    the label of each cell text, None for not labelled; map the texts of uncertain labels there.
    """

    description = "a column for any finding"
    values: Mapping[str, int | None] = {"": None, "0": 0, "0.0": 0, "1": 1, "1.0": 1}

    def find_label_columns(self, table: CsvTable) -> list[str]:
        return [name for name in table.headers if labels.canonicalize(name)]

    def read_labels(self, table: CsvTable, image_ids: pd.Series) -> pd.DataFrame:
        columns = table.find_labels(labels.canonicalize)
        out = pd.DataFrame(index=table.rows.index, columns=list(labels.LABELS), dtype="Int8")
        for label, column in columns.items():
            out[label] = table.read_values(column, self.values, "0, 1 or blank (not labelled)")
        if labels.NO_FINDING in columns:
            table.refuse_contradictions(out)
        else:
            findings = out[list(labels.FINDINGS)]
            all_negative = (findings.fillna(0).sum(axis=1) == 0).astype("Int8")
            out[labels.NO_FINDING] = all_negative.mask(findings.isna().any(axis=1))
        return out


class UnlabelledDialect(Dialect):
    """A table without labels: the image, and patient, study, age, sex, view or follow-up; no other columns.

    Another column could hold labels under an unknown name, which must not be lost.
    """

    description = "no labels"

    def find_label_columns(self, table: CsvTable) -> list[str]:
        return []

    def read_labels(self, table: CsvTable, image_ids: pd.Series) -> pd.DataFrame:
        return pd.DataFrame(index=table.rows.index, columns=list(labels.LABELS), dtype="Int8")

    def accepts(self, table: CsvTable) -> bool:
        """Whether the table names images and something about them, and has only known columns."""
        known = table.find_columns(self.columns)
        views = table.find_all(self.columns["view"])
        return "image_id" in known and len({*known.values(), *views}) == len(table.headers) > 1


DIALECTS: tuple[Dialect, ...] = (NihDialect(), OneHotDialect())


def detect_dialect(table: CsvTable) -> Dialect:
    """Return the dialect of a table; refuse one without labels, or with labels of two dialects."""
    found = [dialect for dialect in DIALECTS if dialect.find_label_columns(table)]
    if not found:
        unlabelled = UnlabelledDialect()
        if unlabelled.accepts(table):
            return unlabelled
        expected = " nor ".join(dialect.description for dialect in DIALECTS)
        raise TableError(
            f"{table.path}: has neither {expected}; its columns are: {table.shown_headers()}. For a manifest without "
            "labels keep only image_id and any of patient_id, study_id, age, sex, view, follow_up"
        )
    if len(found) > 1:
        both = " and in ".join(", ".join(dialect.find_label_columns(table)) for dialect in found)
        raise TableError(f"{table.path}: has labels in {both}; keep one of the two")
    return found[0]
