"""Read images by path from any storage, and list the images below a folder.

A path names a file, local or by URI, or a member of an archive as `ARCHIVE::MEMBER`; see `archives` for those.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as arrow_fs

from ray_cxr.errors import ImageError, InputError, one_line
from ray_cxr.progress import Progress, Stage
from ray_cxr.storage import contents
from ray_cxr.storage.archives import read_member, scan_archive
from ray_cxr.storage.paths import (
    ARCHIVE_SUFFIXES,
    CHUNK_ROWS,
    DICOM_HEAD,
    IMAGE_SUFFIXES,
    NOT_UTF8,
    URI_SAFE,
    count_skipped,
    escape_member,
    explain_suffixes,
    find_skipped_folder,
    format_suffixes,
    get_suffix,
    has_dicom_magic,
    is_archive,
    is_image_name,
    is_uri,
    may_be_dicom,
    redact,
    split_member,
)
from ray_cxr.storage.remote import map_concurrently, to_path
from ray_cxr.storage.stores import MAX_BYTES, is_access_denied, open_uri, read_file

_SNIFF_THREADS = 32
_IS_FILE = "is a file; pass the folder with the images, or a tar archive"
_NO_FOLDER = "no such folder; pass a folder with images"


def read_bytes(path: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the contents of one file, or of one member of an archive.

    `path` is a local path, a URI that `pyarrow.fs` can open (`file://`, `s3://`, `gs://`, `hdfs://`, ...), or
    `ARCHIVE::MEMBER`. Reading a member scans its archive from the start; `read_members` reads many in one pass.

    Raises:
        ImageError: `missing` (no path, no such file, or not a file), `permission`, `empty`, `too_large`, or `storage`
            for other failures. For a member, also the errors of the archive. The message omits the path, because every
            caller knows it.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ImageError("missing", "the row has no path")
    name = os.fspath(path)
    if parts := split_member(name):
        return read_member(*parts, max_bytes=max_bytes)
    return read_file(name, max_bytes)


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, on a disk or in a bucket, hex."""
    with open(to_path(path), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class Listing:
    """The images below a folder."""

    root: str  # the prefix of every path, such as `/data/images/`; for an archive `/data/images_001.tar.gz::`
    paths: pa.ChunkedArray  # string [n], for `read_bytes`; sorted, but members of an archive in the archive's order
    left_out: dict[str, int] = field(default_factory=dict)  # number of other files by suffix, `""` for no suffix
    unpacked: int = 0  # number of members left out because the same file is also unpacked next to the archive


def find_images(location: str) -> Listing:
    """List the images below a local folder or a URI, by their suffix in any case, and inside archives.

    Files without a suffix are included if their first 132 bytes are those of DICOM (a DICOMDIR is not an image).
    Archives are read once, which takes as long as unpacking them. A member is left out if the same file is also
    unpacked next to the archive (`images_001.tar.gz` and `images/a.png` or `images_001/images/a.png`). Names that start
    with a dot (macOS writes `._` files) are left out and not counted. Folders with thumbnails or deleted files, such as
    `@eaDir`, are left out and counted. Links to folders are followed; a folder that is reachable in several ways is
    listed once.

    Raises:
        InputError: nothing is found, something cannot be listed, or a local path reads as a member of an archive.
    """
    with Stage(f"listing images in {redact(location)}") as stage:
        return _find_images(location, stage)


def _find_images(location: str, stage: Stage) -> Listing:
    left_out: Counter[str] = Counter()
    unpacked = 0
    if is_archive(location) and not os.path.isdir(location):
        root = f"{location}::"
        names = _keep_utf8(scan_archive(location, left_out), left_out)
        paths = _to_chunks(f"{root}{name}" for name in _show_count(names, location, stage))
    else:
        folder, mark, options = location.partition("?") if is_uri(location) else (location, "", "")
        root = folder.rstrip("/") + "/"
        if is_uri(location):
            paths = _list_uri(location, root, mark + options, left_out)
        elif os.path.isdir(location):
            names = _keep_utf8(_list_local(root, left_out), left_out)
            paths = _to_chunks(_show_count(names, location, stage))
        else:
            problem = f"{_IS_FILE} ({contents.describe(location)})" if os.path.exists(location) else _NO_FOLDER
            raise InputError(f"{location}: {problem}")
        paths, unpacked = _expand_archives(paths, mark + options, left_out)
    if not len(paths):
        others = "; ".join([f"left out: {format_suffixes(left_out)}", *explain_suffixes(left_out)])
        others = f" ({others})" if left_out else ""
        raise InputError(
            f"{redact(location)}: no images found{others}; searched it and all folders and archives below for "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    return Listing(root, paths, dict(left_out.most_common()), unpacked)


def _list_local(root: str, left_out: Counter[str]) -> Iterator[str]:
    """Yield images and archives below a folder, sorted by path."""
    seen: set[int] = set()
    pending = [root]
    while pending:
        path = pending.pop()
        if not path.endswith("/"):
            if "::" in path and split_member(path):
                raise InputError(f"{path}: reads as a member of an archive; rename it so that no `::` follows .tar")
            yield path
            continue
        try:
            info = os.stat(path)
            key = info.st_dev << 64 | info.st_ino
            if key in seen:  # a link to a folder above would never end
                continue
            seen.add(key)
            with os.scandir(path) as entries:
                names = [_entry_name(entry, left_out) for entry in entries]
        except OSError as error:
            raise InputError(
                f"{path.rstrip('/')}: cannot be listed ({error.strerror}); change its permissions or move it"
            ) from None
        # The name of a folder ends with `/`, so that it sorts among the files as its contents do.
        pending += sorted((path + name for name in names if name), reverse=True)


def _entry_name(entry: os.DirEntry[str], left_out: Counter[str]) -> str | None:
    """Return the name of an image or an archive, or of a folder with a final `/`; None for other entries."""
    name = entry.name
    if (skipped := find_skipped_folder([name])) and entry.is_dir():
        count_skipped([skipped], left_out)
        return None
    if name.startswith("."):
        return None
    if entry.is_dir():
        return f"{name}/"
    if is_image_name(name) or is_archive(name):
        return name
    if may_be_dicom(name) and entry.is_file():
        try:
            with open(entry.path, "rb", buffering=0) as file:
                if has_dicom_magic(file.read(DICOM_HEAD)):
                    return name
        except OSError:
            pass  # counted as left out
    left_out[get_suffix(name)] += 1
    return None


def _list_uri(location: str, root: str, options: str, left_out: Counter[str]) -> pa.ChunkedArray:
    """Return images and archives below a URI, sorted; each is a URI with the same options (`?region=...`)."""
    shown = redact(location)
    try:
        store, base = open_uri(location)
        kind = store.get_file_info(base).type
        if kind != arrow_fs.FileType.Directory:
            raise InputError(f"{shown}: {_NO_FOLDER if kind == arrow_fs.FileType.NotFound else _IS_FILE}")
        entries = store.get_file_info(arrow_fs.FileSelector(base, recursive=True))
        names = _keep_utf8(_uri_names(store, base, entries, left_out), left_out)
        paths = _to_chunks(escape_member(f"{root}{quote(name, safe=URI_SAFE)}{options}") for name in names)
        return paths.take(pc.sort_indices(paths))
    except InputError:
        raise
    except ImageError as error:
        raise InputError(f"{shown}: cannot be listed: {error.message}") from None
    except Exception as error:  # exceptions of stores have no common type; their texts can contain parts of the address
        detail = one_line(error)[:200] or type(error).__name__
        for _, value in parse_qsl(options.removeprefix("?")):
            detail = detail.replace(value, "...")
        if is_access_denied(error):
            detail = "access denied"
        raise InputError(f"{shown}: cannot be listed ({detail}); check the address and the credentials") from None


def _uri_names(store: Any, base: str, entries: list[Any], left_out: Counter[str]) -> Iterator[str]:
    """Yield the names of images and archives below `base`, and empty `entries`, which can be large."""
    skip = len(base.rstrip("/")) + 1
    unknown: list[str] = []
    skipped: set[str] = set()
    while entries:
        entry = entries.pop()
        path = entry.path[skip:]
        *folders, name = path.split("/")
        if entry.type != arrow_fs.FileType.File:
            continue
        if (folder := find_skipped_folder(folders)) is not None:
            skipped.add(folder)
            continue
        if path.startswith(".") or "/." in path:
            continue
        if is_image_name(name) or is_archive(name):
            yield path
        elif may_be_dicom(name):
            unknown.append(path)
        else:
            left_out[get_suffix(name)] += 1
    count_skipped(skipped, left_out)
    if unknown:
        # One request each, mostly waiting.
        sniffed = map_concurrently(lambda path: _sniff(store, base, path), unknown, threads=_SNIFF_THREADS)
        for path, is_dicom in zip(unknown, sniffed, strict=True):
            if is_dicom:
                yield path
            else:
                left_out[""] += 1


def _sniff(store: Any, base: str, path: str) -> bool:
    """Whether a file of a store starts like a DICOM file; False if it cannot be opened."""
    try:
        with store.open_input_file(f"{base.rstrip('/')}/{path}") as file:
            return has_dicom_magic(bytes(file.read_at(DICOM_HEAD, 0)))
    except OSError as error:
        if isinstance(error, FileNotFoundError) or is_access_denied(error):
            return False
        raise


def _expand_archives(paths: pa.ChunkedArray, options: str, left_out: Counter[str]) -> tuple[pa.ChunkedArray, int]:
    """Replace each archive by its members. Also return the number of members that are left out, because the same files
    are also unpacked.
    """
    pattern = rf"(?i)\.(?:tar|tar\.gz|tgz|tar\.bz2|tar\.xz){re.escape(options)}$"
    rows = pc.indices_nonzero(pc.match_substring_regex(paths, pattern)).to_pylist() if len(paths) else []
    if not rows:
        return paths, 0
    pieces: list[pa.Array] = []
    unpacked = next_row = 0
    composed = pc.utf8_normalize(paths, form="NFC")  # macOS unpacks `é` as two characters
    with Progress("list", len(rows), unit="archives", last_line=False) as progress:
        for row in rows:
            archive = paths[row].as_py()
            names = list(_keep_utf8(scan_archive(archive, left_out), left_out))
            members = _to_chunks(f"{archive}::{name}" for name in names)
            if len(paths) > len(rows):
                duplicates = _find_unpacked(archive, names, options, composed)
                unpacked += duplicates.true_count
                members = members.filter(pc.invert(duplicates))
            pieces += [*paths.slice(next_row, row - next_row).chunks, *members.chunks]
            next_row = row + 1
            progress.advance(1)
    pieces += paths.slice(next_row).chunks
    return pa.chunked_array([piece for piece in pieces if len(piece)], pa.string()), unpacked


def _find_unpacked(archive: str, members: list[str], options: str, paths: pa.ChunkedArray) -> pa.BooleanArray:
    """Return which members are also files in the archive's folder, or in a folder with the archive's name: bool [n].
    `paths` are in Unicode's form NFC.
    """
    path = archive.removesuffix(options)
    stem = path[: -len(next(end for end in sorted(ARCHIVE_SUFFIXES, key=len)[::-1] if path.lower().endswith(end)))]
    names = [name.removeprefix("./") for name in members]
    if is_uri(archive):
        names = [quote(name, safe=URI_SAFE) for name in names]
    result = pa.array(np.zeros(len(members), bool))
    for folder in (path.rpartition("/")[0], stem):
        expected = pc.utf8_normalize(_to_chunks(f"{folder}/{name}{options}" for name in names), form="NFC")
        # In this order the hash table is never larger than one archive.
        present = paths.filter(pc.is_in(paths, value_set=expected.combine_chunks()))
        result = pc.or_(result, pc.is_in(expected, value_set=present.combine_chunks()).combine_chunks())
    return result


def _keep_utf8(names: Iterable[str], left_out: Counter[str]) -> Iterator[str]:
    """Yield the names in UTF-8, which a table can hold, and count the others."""
    for name in names:
        if name.isascii() or name.encode(errors="ignore").decode() == name:
            yield name
        else:
            left_out[NOT_UTF8] += 1


def _show_count(names: Iterable[str], location: str, stage: Stage) -> Iterator[str]:
    for number, name in enumerate(names, 1):
        if number % 1000 == 0:
            stage.update(f"listing images in {location}: {number:,} found")
        yield name


def _to_chunks(texts: Iterable[str]) -> pa.ChunkedArray:
    """Return texts as Arrow strings, which take a third of the memory of a list."""
    chunks = []
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, CHUNK_ROWS)):
        chunks.append(pa.array(chunk, pa.string()))
    return pa.chunked_array(chunks, pa.string())
