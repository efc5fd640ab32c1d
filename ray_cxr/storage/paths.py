"""Paths of files: local paths, URIs, and members of archives (`ARCHIVE::MEMBER`). No function opens a file."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
#: Files and folders that operating systems and network drives put into any folder, in lower case.
_SYSTEM_NAMES = frozenset(
    {".ds_store", ".localized", ".directory", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir"}
)
#: Folders with thumbnails or deleted files, in lower case. Their files are copies, or belong to no image.
_SKIPPED_FOLDERS = frozenset({"@eadir", "#recycle", "$recycle.bin", ".@__thumb", ".thumbnails", ".trashes", "__macosx"})
#: Key in `left_out` of files whose names are not UTF-8, so that no table can hold them.
NOT_UTF8 = "not named in UTF-8"
CHUNK_ROWS = 1 << 16
#: Larger files are refused before they are read, bytes.
MAX_BYTES = 512 * 1024 * 1024
_INSTANCE = re.compile(r"/instances/([0-9.]{1,64})$")
_SHOWN_SUFFIXES = 5
#: Suffixes that DICOM files have besides those of `IMAGE_SUFFIXES`, and suffixes of compressed files.
_DICOM_SUFFIXES = (".ima", ".dic", ".dc3", ".dcm30", ".acr")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".zst")


def is_uri(path: str) -> bool:
    """Whether a path is a URI, such as `s3://bucket/key`."""
    return _URI.match(path) is not None


def is_dicomweb(path: str) -> bool:
    """Whether a path is an address of a PACS, such as `dicomweb+https://host/dicom-web/studies/...`."""
    return path[:9].lower() == "dicomweb+"


def find_dicomweb(paths: pa.ChunkedArray) -> str | None:
    """Return the first path that is an address of a PACS; None if there is none."""
    row = pc.index(pc.starts_with(paths, "dicomweb+", ignore_case=True), True).as_py()
    return None if row < 0 else str(paths[row])


def find_instance_uid(path: str | None) -> str | None:
    """Return the SOP Instance UID in the path of an instance of a PACS; None for other paths."""
    found = _INSTANCE.search(path) if path is not None and is_dicomweb(path) else None
    return found[1] if found else None


def format_suffixes(left_out: dict[str, int]) -> str:
    """Return counts by suffix as text: `12 .txt, 3 without suffix, 7 others`. Suffixes of images are always named."""
    counts = Counter(left_out).most_common()
    shown = [pair for place, pair in enumerate(counts) if place < _SHOWN_SUFFIXES or _get_remedy(pair[0])]
    parts = [f"{count:,} {suffix or 'without suffix'}" for suffix, count in shown]
    rest = sum(left_out.values()) - sum(count for _, count in shown)
    return ", ".join(parts + ([f"{rest:,} others"] if rest else []))


def explain_suffixes(left_out: dict[str, int]) -> list[str]:
    """Return a sentence for each kind of files left out that may be images: how to include them."""
    remedies: dict[str, list[str]] = {}
    for suffix in sorted(left_out):
        if remedy := _get_remedy(suffix):
            remedies.setdefault(remedy, []).append(suffix)
    return [f"files with {', '.join(suffixes)} may be images: {remedy}" for remedy, suffixes in remedies.items()]


def _get_remedy(suffix: str) -> str:
    if suffix in _DICOM_SUFFIXES:
        return "to include them, rename them to .dcm, or add links with that suffix"
    return "to include them, unpack them" if suffix.endswith(_COMPRESSED) and suffix.count(".") > 1 else ""


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
    """Return the suffix of a file's name in lower case; `""` for none, and for a number at the end of a UID.

    Of a compressed image it is both suffixes, such as `.dcm.gz`.
    """
    match = _SUFFIX.search(name)
    suffix = match[0].lower() if match else ""
    if suffix in _COMPRESSED:
        inner = get_suffix(name[: -len(suffix)])
        return inner + suffix if inner in (*IMAGE_SUFFIXES, *_DICOM_SUFFIXES) else suffix
    return suffix


def is_system_file(name: str) -> bool:
    """Whether an operating system leaves a file of this name, such as `Thumbs.db` or `._a.png`, in folders it shows."""
    return name.startswith("._") or name.lower() in _SYSTEM_NAMES


def find_skipped_folder(folders: list[str]) -> str | None:
    """Return the path of the first folder that holds thumbnails or deleted files, such as `@eaDir`; None for none."""
    place = next((i for i, name in enumerate(folders) if name.lower() in _SKIPPED_FOLDERS), None)
    return None if place is None else "/".join(folders[: place + 1])


def count_skipped(folders: Iterable[str], left_out: Counter[str]) -> None:
    """Add folders that `find_skipped_folder` returned to the counts of files left out."""
    left_out.update(f"folders named {path.rpartition('/')[2]}" for path in folders)


def escape_member(uri: str) -> str:
    """Return the URI of a file so that `split_member` does not take a part of its name for a member of an archive."""
    return uri.replace("::", "%3A%3A") if split_member(uri) else uri


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
    for part in iter_slices(paths):
        names = pc.replace_substring_regex(plain_paths(pa.chunked_array([part])), r"(?s)^.*/", "").combine_chunks()
        if pc.any(pc.match_substring(names, "::")).as_py():  # a member at the top of its archive
            names = pa.array([None if path is None else file_name(path) for path in part.to_pylist()], pa.string())
        chunks.append(names)
    return pa.chunked_array(chunks, pa.string())


def redact(path: str) -> str:
    """Return a path or URI for a message: without options and without the part before `@`, which can be a secret."""
    if not is_uri(path):
        return path
    if is_dicomweb(path):
        # No part of such an address contains `@`, and a password can contain any character that ends the part before.
        return f"{path.partition('://')[0]}://..." if "@" in path else re.split("[?#]", path, maxsplit=1)[0]
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.\-]*://)[^/]*@", r"\1", path.partition("?")[0])


def hide_search(word: str) -> str:
    """Return an argument for a message: the address of a PACS in it without credentials and without its query."""
    start = word.lower().find("dicomweb+")
    if start < 0:
        return word
    shown = redact(word[start:])
    return word[:start] + (shown if shown == word[start:] else f"{shown}?...")


def name_search(address: str, hide: Callable[[str], str] | None = None) -> str:
    """Return the address of a search with a digest of its keys, which can name a patient; for settings.json.

    `hide` makes the digest, if the keys must not be guessed from it.
    """
    query = address.partition("?")[2]
    return f"{redact(address)}?{hide(query) if hide else hashlib.sha256(query.encode()).hexdigest()[:32]}"


def iter_slices(paths: pa.ChunkedArray) -> Iterator[pa.Array]:
    for chunk in paths.chunks:
        for start in range(0, len(chunk), CHUNK_ROWS):
            yield chunk.slice(start, CHUNK_ROWS)
