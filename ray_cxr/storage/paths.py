"""Paths of files: local paths, URIs, and members of archives (`ARCHIVE::MEMBER`). No function opens a file."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

#: Suffixes of images for `find_images`. `decode` ignores names.
IMAGE_SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
ARCHIVE_SUFFIXES: tuple[str, ...] = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
#: `ARCHIVE::MEMBER`, for `re` and Arrow's RE2. The first `::` after an archive's suffix separates ARCHIVE and MEMBER.
#: The options of a URI (`?region=...`) belong to ARCHIVE.
MEMBER_PATTERN = (
    r"(?is)^(?P<archive>(?:[a-z][a-z0-9+.\-]*://|file:).*?\.(?:tar|tar\.gz|tgz|tar\.bz2|tar\.xz)(?:\?.*?)?"
    r"|.*?\.(?:tar|tar\.gz|tgz|tar\.bz2|tar\.xz))::(?P<member>.+)$"
)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://|file:")
URI_SAFE = "/!$&'()*+,;=:@~"
_MEMBER = re.compile(MEMBER_PATTERN)
#: Suffix of a file name. Exports name files by UIDs, so a final `.2` is not a suffix.
_SUFFIX = re.compile(r"\.[A-Za-z0-9_~-]{0,11}[A-Za-z~][A-Za-z0-9_~-]{0,11}$")
#: A DICOM file starts with 128 arbitrary bytes, then these (PS3.10, 7.1).
DICOM_HEAD, _DICOM_MAGIC = 132, b"DICM"
#: Key in `left_out` of files whose names are not UTF-8, so that no table can hold them.
NOT_UTF8 = "not named in UTF-8"
CHUNK_ROWS = 1 << 16
_SHOWN_SUFFIXES = 5


def is_uri(path: str) -> bool:
    """Whether a path is a URI, such as `s3://bucket/key`."""
    return _URI.match(path) is not None


def format_suffixes(left_out: dict[str, int]) -> str:
    """Return counts by suffix as text: `12 .txt, 3 without suffix, 7 others`."""
    counts = Counter(left_out).most_common()
    parts = [f"{count:,} {suffix or 'without suffix'}" for suffix, count in counts[:_SHOWN_SUFFIXES]]
    rest = sum(count for _, count in counts[_SHOWN_SUFFIXES:])
    return ", ".join(parts + ([f"{rest:,} others"] if rest else []))


def split_member(path: str | None) -> tuple[str, str] | None:
    """Split `ARCHIVE::MEMBER` as in `("/data/images_001.tar.gz", "images/00000001_000.png")`; None for other paths."""
    match = _MEMBER.match(path) if path else None
    return (match["archive"], match["member"]) if match else None


def is_archive(path: str) -> bool:
    """Whether a path, without the options of a URI, has the suffix of an archive."""
    return (path.partition("?")[0] if is_uri(path) else path).lower().endswith(ARCHIVE_SUFFIXES)


def is_image_name(name: str) -> bool:
    """Whether a file with this name, given without folders, is listed as an image."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def get_suffix(name: str) -> str:
    """Return the suffix of a file's name in lower case; `""` for none, and for a number at the end of a UID."""
    match = _SUFFIX.search(name)
    return match[0].lower() if match else ""


def may_be_dicom(name: str) -> bool:
    """Whether the name of a file leaves open if it is DICOM, so that its first bytes have to be read."""
    return not get_suffix(name) and name.upper() != "DICOMDIR"


def has_dicom_magic(head: bytes) -> bool:
    """Whether the first 132 bytes of a file are those of a DICOM file."""
    return head[DICOM_HEAD - 4 : DICOM_HEAD] == _DICOM_MAGIC


def make_absolute(path: str) -> str:
    """Make a local path absolute, so that other processes and nodes can open it; URIs stay unchanged."""
    if is_uri(path):
        return path
    parts = split_member(path)
    return f"{os.path.abspath(parts[0])}::{parts[1]}" if parts else os.path.abspath(path)


def plain_path(path: str) -> str:
    """Remove the options of a URI (`?region=...`) and decode its escapes (`%20`); local paths stay unchanged."""
    if not is_uri(path):
        return path
    if parts := split_member(path):
        return f"{plain_path(parts[0])}::{parts[1]}"
    address = path.partition("?")[0]
    try:
        return unquote(address, errors="strict")
    except UnicodeDecodeError:  # unchanged, so that different names stay different
        return address


def plain_paths(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return `plain_path` of every path, string [n]."""
    chunks = []
    for part in iter_slices(paths):
        # Nearly all tables have no URI with options or escapes.
        if pc.any(pc.match_substring_regex(part, r"[?%]")).as_py():
            part = pa.array([None if path is None else plain_path(path) for path in part.to_pylist()], pa.string())
        chunks.append(part)
    return pa.chunked_array(chunks, pa.string())


def file_name(path: str) -> str:
    """Return the name of an image's file, without folders, the archive and the options of a URI."""
    parts = split_member(path)
    return (parts[1] if parts else plain_path(path)).rsplit("/", 1)[-1]


def file_names(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return `file_name` of every path, string [n]."""
    chunks = []
    for part in iter_slices(plain_paths(paths)):
        names = pc.replace_substring_regex(part, r"(?s)^.*/", "")
        if pc.any(pc.match_substring(names, "::")).as_py():  # a member at the top of its archive
            names = pa.array([None if path is None else file_name(path) for path in part.to_pylist()], pa.string())
        chunks.append(names)
    return pa.chunked_array(chunks, pa.string())


def redact(path: str) -> str:
    """Return a path or URI for a message: without options and without the part before `@`, which can be a secret."""
    if not is_uri(path):
        return path
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.\-]*://)[^/]*@", r"\1", path.partition("?")[0])


def iter_slices(paths: pa.ChunkedArray) -> Iterator[pa.Array]:
    for chunk in paths.chunks:
        for start in range(0, len(chunk), CHUNK_ROWS):
            yield chunk.slice(start, CHUNK_ROWS)
