"""Ids of patients, studies and images in tables, and the check that they lost no digits.

A spreadsheet keeps 15 digits of a number and shows long ones as `2.05367E+37`; a float64 keeps 53 bits. Both can merge
the ids of many patients, or split one patient between train and test. All readers of tables refuse such columns.
`12E10` may be a pseudonym and is accepted. `12345.0` is accepted too: pandas writes it if another id is missing.

Errors name the file, the column and the line of an example, never the id.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_cxr.errors import TableError

#: The columns of a manifest and of scores that identify an image, its patient and its study.
COLUMNS: tuple[str, ...] = ("image_id", "patient_id", "study_id")
#: Text that stands for a missing value, as pandas and databases write it; as an id it would unite many patients.
MISSING: tuple[str, ...] = ("", "nan", "NaN", "None", "null", "NULL", "<NA>")
REMEDY = (
    "format the column as text in the spreadsheet before saving, or export the table again from the source, "
    "ids as text in UTF-8"
)

#: The name of an NIH image starts with its patient's number.
_NIH_NAME = re.compile(r"\d{8}_\d{3}\.png", re.ASCII)

#: A column whose pattern has a smaller probability than this by chance has lost digits.
_CHANCE = 1e-4
_SPREADSHEET_DIGITS = 15
_FIRST_ROWS = 1000
#: Integers below 2**bits are exact in a float.
_FLOAT_BITS = {pa.float16(): 11, pa.float32(): 24, pa.float64(): 53}

_EXPONENT = r"^[+-]?(?:[0-9]+[.,][0-9]+[eE][+-]?|[0-9][.,]?[eE][+-])[0-9]+$"
_LONG_FLOAT = r"^[+-]?[0-9]{16,300}[.,]0+$"
_LONG_INTEGER = r"^[+-]?[1-9][0-9]{15,299}$"
_CELL_ERROR = r"^#(?:#{2,}|N/A|NV|[A-ZÀ-Þ0-9/]+[!?])$"
_REPLACED = "\ufffd"
_SUSPICIOUS = "|".join((_EXPONENT, _LONG_FLOAT, _LONG_INTEGER, _CELL_ERROR, _REPLACED))


def check_series(column: pd.Series, source: str, *, images: bool = False) -> None:
    """Refuse a text column with ids that lost digits. The column has its header as name and the lines of `source` as
    index.
    """
    text = pa.chunked_array([pa.array(column.str.strip(), pa.string(), from_pandas=True)])
    _check_text(text, f"{source}: line", column.index, str(column.name), images=images)


def read_ids(column: pa.ChunkedArray, name: str, source: str) -> pa.ChunkedArray:
    """Return a Parquet column of ids as string [n], with the nulls of `to_text`; refuse ids that lost digits."""
    column = _decode_dictionary(column)
    if pa.types.is_floating(column.type):
        _check_floats(column, name, source)
    try:
        # Through binary, because Arrow does not validate the bytes of a string column.
        text = to_text(column, name).cast(pa.binary()).cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise TableError(f"{source}: column {name} is {column.type}, not text in UTF-8; {REMEDY}") from None
    _check_text(text, f"{source}: row", range(1, len(text) + 1), name, images=name == "image_id")
    return text


def to_text(column: pa.ChunkedArray | pa.Array, name: str) -> pa.ChunkedArray | pa.Array:
    """Return a part of a checked column as string [n], with nulls for NaN and, for patients and studies, `MISSING`."""
    column = _decode_dictionary(column)
    if pa.types.is_floating(column.type):
        column = _drop_nan(column)
    text = column.cast(pa.string())
    if name == "image_id":
        return text
    missing = pc.is_in(pc.ascii_trim_whitespace(text), value_set=pa.array(MISSING))
    return pc.if_else(missing, pa.scalar(None, pa.string()), text)


def find_ids(ids: Sequence[str] | np.ndarray, known: Sequence[str] | np.ndarray) -> np.ndarray:
    """Return the position of each image id in the ids `known`, int [n], -1 for none.

    An id that is not there counts as equal to one in another Unicode form (UAX #15): macOS, and archives made there,
    write the letter of `é` and its accent as two characters in file names, and tables write one.
    """
    rows = {name: row for row, name in enumerate(known) if name is not None}
    positions = np.array([rows.get(name, -1) for name in ids], dtype=np.int64)
    missing = [row for row in np.flatnonzero(positions < 0).tolist() if ids[row] and not ids[row].isascii()]
    if missing:
        taken = set(positions.tolist())
        free = {name: row for name, row in rows.items() if row not in taken and not name.isascii()}
        composed = {unicodedata.normalize("NFC", name): row for name, row in free.items()}
        positions[missing] = [composed.get(unicodedata.normalize("NFC", ids[row]), -1) for row in missing]
    return positions


def unify_patients(image_ids: Iterable[Any], patients: Iterable[Any]) -> np.ndarray:
    """Return patient ids [n] in the spelling in which files are compared, as objects.

    Copies of NIH's table write one patient as 13 or 00000013; in other tables 007 and 7 may be two people. The name of
    an NIH image, such as 00000013_008.png, separates the two cases.
    """
    unified = np.array([*patients], dtype=object)
    for row, (image, patient) in enumerate(zip(image_ids, unified, strict=True)):
        padded = isinstance(patient, str) and patient.startswith("0") and patient.zfill(8) == str(image)[:8]
        if padded and _NIH_NAME.fullmatch(str(image)):
            unified[row] = patient.lstrip("0") or "0"
    return unified


def check_table(table: pa.Table, source: str) -> pa.Table:
    """Return a table after checking its identity columns as `read_ids` does."""
    for name in COLUMNS:
        if name in table.column_names:
            read_ids(table[name], name, source)
    return table


def read_split(folder: Path, schema: pa.Schema | None = None) -> pa.Table:
    """Read `split.parquet`, the images that trained a bundle, with patients as `unify_patients` spells them.

    Ids that lost digits are refused, because they hide leaks.
    """
    file = folder / "split.parquet"
    table = check_table(pq.read_table(file, schema=schema), str(file))
    images, patients = (to_text(table[name], name).to_pylist() for name in ("image_id", "patient_id"))
    unified = pa.array(unify_patients(images, patients), table.schema.field("patient_id").type)
    return table.set_column(table.schema.get_field_index("patient_id"), table.schema.field("patient_id"), unified)


def _decode_dictionary(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Return the values of a dictionary-encoded column, which pandas writes for categories."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _drop_nan(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Return floats as float64 with null for NaN, because all unknown patients would become one patient `nan`."""
    values = column.cast(pa.float64())
    return pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)


def _check_floats(column: pa.ChunkedArray, name: str, source: str) -> None:
    """Refuse floats that are not integers, or too large to be exact."""
    bits = _FLOAT_BITS[column.type]
    values = _drop_nan(column)
    too_large = pc.greater_equal(pc.abs(values), 2.0**bits)
    for is_damaged, reason in (
        (too_large, f"a float of {bits} bits, too large for all its digits to be kept"),
        (pc.not_equal(pc.floor(values), values), "a number with a fraction"),
    ):
        row = pc.index(is_damaged, True).as_py()
        if row >= 0:
            raise _error(f"{source}: row", row + 1, name, reason)


def _check_text(text: pa.ChunkedArray, source: str, lines: Iterable[int], name: str, *, images: bool) -> None:
    rows = pc.indices_nonzero(pc.fill_null(pc.match_substring_regex(text, _SUSPICIOUS), False))
    if len(rows) and (loss := _find_loss(text.take(rows), images=images)):
        position, reason = loss
        raise _error(source, list(lines)[rows[position].as_py()], name, reason)


def _find_loss(suspects: pa.ChunkedArray, *, images: bool) -> tuple[int, str] | None:
    """Return the position of the first damaged id and the reason; None if all are intact."""
    for pattern, reason in (
        (_EXPONENT, "a number in exponent form, in which digits are lost"),
        (_CELL_ERROR, "the error value of a spreadsheet's cell"),
        *(() if images else ((_REPLACED, "text with a replacement character instead of a letter"),)),
    ):
        position = pc.index(pc.match_substring_regex(suspects, pattern), True).as_py()
        if position >= 0:
            return position, reason
    for position in pc.indices_nonzero(pc.match_substring_regex(suspects, _LONG_FLOAT)).to_pylist():
        if abs(int(suspects[position].as_py().replace(",", ".").partition(".")[0])) >= 2**53:
            return position, "a float of 53 bits, too large for all its digits to be kept"
    integers = pc.match_substring_regex(suspects, _LONG_INTEGER)
    reason = _describe_rounding(suspects.filter(integers))
    return (pc.index(integers, True).as_py(), reason) if reason else None


def _describe_rounding(texts: pa.ChunkedArray) -> str | None:
    """Return how integers of more than 15 digits were rounded; None if they were not, or if chance can explain it."""
    for count_digits, reason in (
        (_count_zeroed, "a number with zeros after its first 15 digits, as all long ones of the column"),
        (_count_lost_in_floats, "a number that passed through a float of 53 bits, as all long ones of the column"),
    ):
        digits: float | None = None
        # The first rows decide nearly every column; a million numbers take seconds.
        for part in (texts.slice(0, _FIRST_ROWS), texts):
            digits = count_digits([abs(int(value)) for value in part.unique().to_pylist()])
            if digits is None:
                break
        if digits is not None and digits > -math.log10(_CHANCE):
            return reason
    return None


def _count_zeroed(numbers: Sequence[int]) -> float | None:
    """Return the number of digits that a spreadsheet set to zero; None if any is not zero."""
    if any(set(str(n)[_SPREADSHEET_DIGITS:]) != {"0"} for n in numbers):
        return None
    return sum(len(str(n)) - _SPREADSHEET_DIGITS for n in numbers)


def _count_lost_in_floats(numbers: Sequence[int]) -> float | None:
    """Return the number of digits lost in float64; None if any number is not a float64, 0 if no low bit is used."""
    if any(int(float(n)) != n for n in numbers):
        return None
    steps = [int(max(math.ulp(float(n)), 1.0)) for n in numbers]
    in_use = any(n // step % 2 for n, step in zip(numbers, steps, strict=True))
    return in_use * sum(math.log10(step) for step in steps)


def _error(source: str, line: int, name: str, reason: str) -> TableError:
    return TableError(f"{source} {line}: {name} is {reason}: different ids can become equal; {REMEDY}")
