"""Name what a file or folder holds, for errors about a wrong or renamed argument."""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import pyarrow as pa
import pyarrow.parquet as pq

from ray_cxr.storage import remote
from ray_cxr.storage.paths import DICOM_HEAD, has_dicom_magic, redact

#: Bytes from the start of a file that `identify` needs: a tar archive has its mark at 257.
HEAD = 4096
_UNPACK = "unpack it and pass a file of it"
_GZIP = b"\x1f\x8b"
_ZIP = b"PK\x03\x04"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_SHOWN_COLUMNS = 6
#: First bytes, the kind of file, and the remedy if it is not another table or another file.
_MAGICS: tuple[tuple[bytes, str, str], ...] = (
    (_ZIP, "a ZIP archive", _UNPACK),
    (b"PK\x05\x06", "a ZIP archive", _UNPACK),
    (_GZIP, "a gzip file", _UNPACK),
    (b"BZh", "a bzip2 file", _UNPACK),
    (b"\xfd7zXZ\0", "an xz file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", _UNPACK),
    (b"\x04\x22\x4d\x18", "an LZ4 file", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"PAR1", "a Parquet file", ""),
    (b"PARE", "an encrypted Parquet file", ""),
    (b"ARROW1", "an Arrow or Feather file", ""),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook (.xls) or another Office file", ""),
    (b"SQLite format 3\0", "an SQLite database", ""),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", ""),
    (b"\x93NUMPY", "a NumPy array", ""),
    (b"%PDF", "a PDF file", ""),
    (b"{\\rtf", "an RTF document", ""),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", ""),
    (b"\xff\xd8\xff", "a JPEG image", ""),
    (b"version https://git-lfs.github.com/", "a pointer of Git LFS", "run `git lfs pull`"),
)
_TEXTS: tuple[tuple[str, str, str], ...] = (
    (r"<(?:!doctype html|html|head|body|table)\b", "an HTML page", "download the file again; a login may be needed"),
    (r"<\?xml\b", "an XML file", ""),
    (r'\{\s*["}]|\[\s*[{\[]', "a JSON file", ""),
)


def identify(head: bytes) -> tuple[str, str] | None:
    """Return the kind of a file and its remedy, if any, by its first `HEAD` bytes; None for other text and bytes."""
    if has_dicom_magic(head[:DICOM_HEAD]):
        return "a DICOM file", ""
    if head[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if head.startswith(_ZIP):
        if b"opendocument.spreadsheet" in head[:100]:
            return "an OpenDocument spreadsheet", ""
        if b"xl/" in head or b"[Content_Types].xml" in head:
            return "an Excel workbook (.xlsx)", ""
    return next(((kind, remedy) for magic, kind, remedy in _MAGICS if head.startswith(magic)), None)


def identify_text(text: str) -> tuple[str, str] | None:
    """Return the kind of a text file and its remedy, if any, by its start; None for tables and other text."""
    start = text[:HEAD].lstrip("\ufeff \t\r\n").lower()
    return next(((kind, remedy) for pattern, kind, remedy in _TEXTS if re.match(pattern, start)), None)


def explain(path: str | Path, wanted: str, remedy: str) -> str:
    """Return the message for a path that is not what was `wanted`: what it is, and the remedy.

    Args:
        wanted: what the argument has to be, such as `a manifest`.
        remedy: what to do if there is none for this kind of file.
    """
    shown = redact(str(path))
    try:
        location = remote.to_path(path)
        if not location.exists():
            return f"{shown}: no such file or folder; {remedy}"
        kind, own_remedy = _describe_folder(location) if location.is_dir() else _describe_file(location)
    except OSError as error:
        return f"{shown}: cannot be read: {error.strerror or type(error).__name__}; {remedy}"
    return f"{shown}: is {kind}, not {wanted}; {own_remedy or remedy}"


def describe(path: str | Path) -> str:
    """Return what an existing local path is, such as `a manifest (Parquet)`."""
    location = Path(path)
    try:
        return (_describe_folder(location) if location.is_dir() else _describe_file(location))[0]
    except OSError:
        return "a file that cannot be read"


def _describe_folder(path: Path) -> tuple[str, str]:
    if (path / "bundle.json").exists():
        return "a bundle", ""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        settings = json.loads((path / "settings.json").read_text(encoding="utf-8"))
        # Those of `prepare` had no kind at first.
        return f"a folder that `ray-cxr {settings.get('kind', 'prepare')}` wrote", ""
    if (path / "metrics.json").exists() and (path / "report.html").exists():
        return "a report", ""
    return "a folder", ""


def _describe_file(path: Path) -> tuple[str, str]:
    with open(path, "rb") as stream:  # also a local copy of an object
        head = stream.read(HEAD)
    if not head:
        return "an empty file", ""
    if head.startswith(b"PAR1"):
        return _describe_parquet(path), ""
    if head.startswith(_ZIP) and (identify(head) or ("",))[0] == "a ZIP archive":
        return _describe_zip(path)
    if head.startswith(_GZIP):
        return _describe_gzip(head)
    text = head.decode("utf-16" if head[:2] in _UTF_16 else "utf-8", "ignore")
    if found := identify(head) or identify_text(text):
        return found
    return ("another binary file" if "\0" in text else "a text or CSV file"), ""


def _describe_gzip(head: bytes) -> tuple[str, str]:
    """Distinguish a table, which `ray-cxr manifest` reads without unpacking, from other packed files."""
    with contextlib.suppress(zlib.error):
        data = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, HEAD)
        line = data.decode("utf-16" if data[:2] in _UTF_16 else "utf-8", "ignore").partition("\n")[0]
        if "\0" not in line and re.search("[,;\t]", line):
            return "a table of labels or images (CSV, gzip)", ""
    return "a gzip file", _UNPACK


def _describe_zip(path: Path) -> tuple[str, str]:
    """Distinguish weights of Keras and workbooks, whose first member can have any name, from other archives."""
    try:
        with open(path, "rb") as stream, ZipFile(stream) as archive:
            names = archive.namelist()
    except (BadZipFile, OSError):
        return "a damaged ZIP archive", ""
    if any(name.endswith(".weights.h5") for name in names):
        return "a Keras model", ""
    return ("an Excel workbook (.xlsx)", "") if "xl/workbook.xml" in names else ("a ZIP archive", _UNPACK)


def _describe_parquet(path: Path) -> str:
    try:
        with remote.open_file(path) as source, pq.ParquetFile(source) as file:
            names = file.schema_arrow.names
    except (OSError, pa.ArrowException):
        return "a damaged Parquet file"
    if "image_id" in names and any(name.startswith("p_") for name in names):
        return "a table of scores (Parquet)"
    if {"image_id", "path"} <= set(names):
        return "a manifest (Parquet)"
    more = ", ..." if len(names) > _SHOWN_COLUMNS else ""
    return f"a Parquet file with the columns {', '.join(names[:_SHOWN_COLUMNS])}{more}"
