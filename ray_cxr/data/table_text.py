"""Text of tables as programs save it: encodings, gzip, separators, and lines before the header.

Nothing is guessed: a file whose encoding or separator is not certain is an error.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator

from ray_cxr.errors import TableError
from ray_cxr.storage import contents, remote

SEPARATORS: dict[str, str] = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
CSV_TABLE, SPLIT_LIST = "a CSV table", "a split list"
_REMEDIES = {
    CSV_TABLE: "save the table as CSV in UTF-8",
    SPLIT_LIST: "save the list as text in UTF-8, with one image name per line",
}
# UTF-32 first: its mark starts with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BLANKS = " \r\n" + "".join(SEPARATORS)
#: A line that names the separator for spreadsheets, which may quote it, or fill it up with separators.
_SEPARATOR_LINE = re.compile(r'"?sep=([^\w"\s]|\t)"?[,;|\s]*', re.IGNORECASE)
#: A header is shorter, and reading it once per separator is fast.
_HEADER_LENGTH = 1 << 20


def read_text(path: str, wanted: str = CSV_TABLE) -> str:
    """Return the text of a file, on a disk or in a bucket, gzipped or not, in UTF-8, UTF-16 or UTF-32."""
    what = wanted.removeprefix("a ")
    try:
        data = original = remote.to_path(path).read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise TableError(f"{path}: no such file; pass an existing {what}") from None
    except IsADirectoryError:
        raise TableError(contents.explain(path, wanted, _REMEDIES[wanted])) from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise TableError(f"{path}: damaged gzip file; copy it again") from None
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or error}; pass a {what}") from None
    if found := contents.identify(data[: contents.HEAD]):
        if data is original:
            raise TableError(contents.explain(path, wanted, _REMEDIES[wanted]))
        raise TableError(f"{path}: is {found[0]}, not {wanted}; {found[1] or _REMEDIES[wanted]}")
    text = _decode(data, path, _REMEDIES[wanted])
    if found := contents.identify_text(text):
        raise TableError(f"{path}: is {found[0]}, not {wanted}; {found[1] or _REMEDIES[wanted]}")
    return text


def split_rows(text: str, path: str, is_header: Callable[[list[str]], bool]) -> tuple[str, dict[int, list[str]]]:
    """Return the separator of a table, and the cells of each line that is not blank, by line number.

    Blank lines, `sep=;` and comments (`#`) before the header are skipped.

    Args:
        is_header: whether cells are those of a header, which decides between several separators.
    """
    skipped, start, declared = 0, 0, None
    for line in io.StringIO(text, newline=""):
        if found := _SEPARATOR_LINE.fullmatch(line):
            declared = found[1]
        elif line.strip(_BLANKS) and not (line.startswith("#") and not _find_separators(line, is_header)):
            break
        skipped, start = skipped + 1, start + len(line)
    text = text[start:]
    separator = _choose_separator(text[:_HEADER_LENGTH], declared, path, is_header)
    # strict: otherwise a quotation mark that is never closed swallows the rest of the table.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    has_formulas = '="' in text
    rows: dict[int, list[str]] = {}
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows[skipped + reader.line_num] = [_strip_formula(cell) for cell in row] if has_formulas else row
    except csv.Error as error:
        raise TableError(f"{path}: line {skipped + reader.line_num}: cannot be read as CSV: {error}") from None
    return separator, rows


def split_lines(text: str, path: str, is_header: Callable[[list[str]], bool]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a list with their numbers, without blank lines, header, quotes and trailing separators."""
    numbered = enumerate(io.StringIO(text, newline=None), start=1)
    lines = [(n, line.strip()) for n, line in numbered if line.strip() and not _SEPARATOR_LINE.fullmatch(line)]
    for mark in SEPARATORS:
        if all(line.endswith(mark) for _, line in lines):
            lines = [(number, line.rstrip(mark).rstrip()) for number, line in lines]
    if lines and (separators := _find_separators(lines[0][1], is_header)):
        columns = max(map(len, separators.values()))
        raise TableError(f"{path}: is a table with {columns} columns, not {SPLIT_LIST}; {_REMEDIES[SPLIT_LIST]}")
    if all(len(line) > 1 and line[0] == line[-1] == '"' for _, line in lines):
        lines = [(number, line[1:-1].replace('""', '"')) for number, line in lines]
    yield from lines[1:] if lines and is_header([lines[0][1]]) else lines


def _decode(data: bytes, path: str, remedy: str) -> str:
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8-sig")
    # The first characters of every table and list are Latin, whose other byte is 0 in UTF-16.
    low, high = data[0:8:2], data[1:8:2]
    if encoding == "utf-8-sig" and len(data) >= 8 and (0 in low) != (0 in high):
        encoding = "utf-16-le" if not any(high) else "utf-16-be" if not any(low) else encoding
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-8-sig":
            line = data.count(b"\n", 0, error.start) + 1
            command = "iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
            raise TableError(f"{path}: line {line}: not text in UTF-8; {remedy}, e.g. with `{command}`") from None
        raise TableError(f"{path}: damaged text in {encoding[:6].upper()}; copy it again, or {remedy}") from None
    text = text.removesuffix("\x1a")  # the mark for the end of a file in DOS
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise TableError(f"{path}: line {line}: holds NUL characters, so it is damaged or no text; copy it again")
    return text


def _find_separators(text: str, is_header: Callable[[list[str]], bool]) -> dict[str, list[str]]:
    """Return the cells of the first line by each separator that makes it a header of several columns."""
    cells = {separator: _first_row(text, separator) for separator in SEPARATORS}
    return {separator: row for separator, row in cells.items() if len(row) > 1 and is_header(row)}


def _choose_separator(text: str, declared: str | None, path: str, is_header: Callable[[list[str]], bool]) -> str:
    found = list(_find_separators(text, is_header))
    if declared is None and len(found) > 1:
        names = " or by ".join(SEPARATORS[separator] for separator in found)
        raise TableError(f"{path}: its columns can be separated by {names}; add a first line sep={found[0]}")
    if declared is not None and found and declared not in found:
        name = SEPARATORS[found[0]]
        raise TableError(f"{path}: has the line sep={declared}, but a {name} separates its columns; correct that line")
    # Without a header that is known, the separator with most columns serves the error about the columns.
    return declared or next(iter(found), max(SEPARATORS, key=lambda separator: len(_first_row(text, separator))))


def _first_row(text: str, separator: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), [])
    except csv.Error:
        return []


def _strip_formula(cell: str) -> str:
    """Return the text of `="007"`, by which programs keep a spreadsheet from removing zeros."""
    return cell[2:-1] if cell.startswith('="') and cell.endswith('"') and len(cell) > 2 else cell
