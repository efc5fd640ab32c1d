"""Names of files: local paths, URIs, and members of archives (`ARCHIVE::MEMBER`). Nothing here opens a file."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

#: What `list_images` takes for an image. `decode` itself never looks at names.
IMAGE_SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
ARCHIVE_SUFFIXES: tuple[str, ...] = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
#: `ARCHIVE::MEMBER`, for `re` and for Arrow's RE2 alike; of a URI its options (`?region=...`) belong to ARCHIVE. The
#: first `::` that stands behind an archive's suffix parts the two.
MEMBER_PATTERN = (
    r"(?is)^(?P<archive>(?:[a-z][a-z0-9+.\-]*://|file:).*?\.(?:tar|tar\.gz|tgz|tar\.bz2|tar\.xz)(?:\?.*?)?"
    r"|.*?\.(?:tar|tar\.gz|tgz|tar\.bz2|tar\.xz))::(?P<member>.+)$"
)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://|file:")
URI_SAFE = "/!$&'()*+,;=:@~"
_MEMBER = re.compile(MEMBER_PATTERN)
#: The end of a name that tells what a file is. Exports name files by UIDs, so that `.2` at the end of one is none.
_SUFFIX = re.compile(r"\.[A-Za-z0-9_~-]{0,11}[A-Za-z~][A-Za-z0-9_~-]{0,11}$")
#: The first bytes of a DICOM file: 128 of any value, then these (PS3.10, 7.1).
DICOM_HEAD, _DICOM_MAGIC = 132, b"DICM"
#: How `left_out` counts files whose names are bytes of another encoding, which no table can hold.
NOT_UTF8 = "not named in UTF-8"
ROWS_AT_ONCE = 1 << 16
_SHOWN_SUFFIXES = 5


def is_uri(path: str) -> bool:
    """Whether a path is a URI, such as `s3://bucket/key`."""
    return _URI.match(path) is not None


def format_suffixes(left_out: dict[str, int]) -> str:
    """Counts by suffix as a reader likes them: `12 .txt, 3 without suffix, 7 others`."""
    counts = Counter(left_out).most_common()
    parts = [f"{count:,} {suffix or 'without suffix'}" for suffix, count in counts[:_SHOWN_SUFFIXES]]
    rest = sum(count for _, count in counts[_SHOWN_SUFFIXES:])
    return ", ".join(parts + ([f"{rest:,} others"] if rest else []))


def split_member(path: str | None) -> tuple[str, str] | None:
    """Archive and member of `ARCHIVE::MEMBER`, such as `("/data/images_001.tar.gz", "images/00000001_000.png")`.

    None for any other path, and for None.
    """
    match = _MEMBER.match(path) if path else None
    return (match["archive"], match["member"]) if match else None


def is_archive(path: str) -> bool:
    """Whether a path, without the options of a URI, ends like an archive's."""
    return (path.partition("?")[0] if is_uri(path) else path).lower().endswith(ARCHIVE_SUFFIXES)


def is_image_name(name: str) -> bool:
    """Whether a file of this name, which holds no folder, is listed as an image."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def get_suffix(name: str) -> str:
    """The suffix of a file's name in lower case; `""` for none, and for a number, as at the end of a UID."""
    match = _SUFFIX.search(name)
    return match[0].lower() if match else ""


def may_be_dicom(name: str) -> bool:
    """Whether only the first bytes of a file can tell if it is a DICOM image."""
    return not get_suffix(name) and name.upper() != "DICOMDIR"


def has_dicom_magic(head: bytes) -> bool:
    """Whether these first 132 bytes of a file are a DICOM file's."""
    return head[DICOM_HEAD - 4 : DICOM_HEAD] == _DICOM_MAGIC


def make_absolute(path: str) -> str:
    """A URI as it is, a local path made absolute: what other processes and other nodes can open."""
    if is_uri(path):
        return path
    inside = split_member(path)
    return f"{os.path.abspath(inside[0])}::{inside[1]}" if inside else os.path.abspath(path)


def plain_path(path: str) -> str:
    """A local path as it is; a URI without its options (`?region=...`), and with `%20` as the blank it stands for."""
    if not is_uri(path):
        return path
    inside = split_member(path)
    if inside:
        return f"{plain_path(inside[0])}::{inside[1]}"
    place = path.partition("?")[0]
    try:
        return unquote(place, errors="strict")
    except UnicodeDecodeError:  # no name of ours; as it is, so that two such names stay two
        return place


def plain_paths(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """`plain_path` of every path, string [n]."""
    chunks = []
    for part in iter_slices(paths):
        # Where no URI has options or an escaped letter, and that is nearly everywhere, there is nothing to be done.
        if pc.any(pc.match_substring_regex(part, r"[?%]")).as_py():
            part = pa.array([None if path is None else plain_path(path) for path in part.to_pylist()], pa.string())
        chunks.append(part)
    return pa.chunked_array(chunks, pa.string())


def file_name(path: str) -> str:
    """The name of an image's own file: without its folders, its archive, and the options of a URI."""
    inside = split_member(path)
    return (inside[1] if inside else plain_path(path)).rsplit("/", 1)[-1]


def file_names(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """`file_name` of every path, string [n]."""
    chunks = []
    for part in iter_slices(plain_paths(paths)):
        names = pc.replace_substring_regex(part, r"(?s)^.*/", "")
        if pc.any(pc.match_substring(names, "::")).as_py():  # a member that lies in no folder of its archive
            names = pa.array([None if path is None else file_name(path) for path in part.to_pylist()], pa.string())
        chunks.append(names)
    return pa.chunked_array(chunks, pa.string())


def redact(place: str) -> str:
    """A path or URI as a message may show it: without what stands before an `@`, which can be a key, and options."""
    if not is_uri(place):
        return place
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.\-]*://)[^/]*@", r"\1", place.partition("?")[0])


def iter_slices(paths: pa.ChunkedArray) -> Iterator[pa.Array]:
    for chunk in paths.chunks:
        for at in range(0, len(chunk), ROWS_AT_ONCE):
            yield chunk.slice(at, ROWS_AT_ONCE)


def to_one_line(text: str) -> str:
    return " ".join(text.split())[:200]
