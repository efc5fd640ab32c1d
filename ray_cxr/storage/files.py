"""Read images by path from any storage, and list the images below a folder.

A path names a file, local or by URI, or a member of an archive as `ARCHIVE::MEMBER`; see `archives` for those.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as arrow_fs

from ray_cxr.errors import ImageError, InputError
from ray_cxr.storage.archives import read_member, scan_archive, scan_archives
from ray_cxr.storage.paths import (
    ARCHIVE_SUFFIXES,
    CHUNK_ROWS,
    DICOM_HEAD,
    IMAGE_SUFFIXES,
    NOT_UTF8,
    URI_SAFE,
    format_suffixes,
    get_suffix,
    has_dicom_magic,
    is_archive,
    is_image_name,
    is_uri,
    may_be_dicom,
    redact,
    split_member,
    to_one_line,
)
from ray_cxr.storage.stores import MAX_BYTES, is_access_denied, open_uri, read_file

_SNIFF_THREADS = 32


def read_bytes(path: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the contents of one file, or of one member of an archive.

    `path` is a local path, a URI that `pyarrow.fs` can open (`file://`, `s3://`, `gs://`, `hdfs://`, ...), or
    `ARCHIVE::MEMBER`. Reading a member scans its archive from the start; `read_members` reads many in one pass.

    Raises:
        ImageError: `missing` (no path, no such file, or not a file), `permission`, `empty`, `too_large`, or `storage`
            for other failures; for a member also the errors of its archive. The message omits the path, which the row
            has.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ImageError("missing", "the row has no path")
    name = os.fspath(path)
    inside = split_member(name)
    if inside is not None:
        return read_member(*inside, max_bytes=max_bytes)
    return read_file(name, max_bytes)


@dataclass(frozen=True)
class Listing:
    """The images below a folder."""

    root: str  # the prefix of every path, such as `/data/images/`; for an archive `/data/images_001.tar.gz::`
    paths: pa.ChunkedArray  # string [n], for `read_bytes`; sorted, members of an archive in the archive's order
    left_out: dict[str, int] = field(default_factory=dict)  # other files by suffix in lower case, `""` for none
    unpacked: int = 0  # members left out because the same file is also unpacked next to the archive


def find_images(location: str) -> Listing:
    """List the images below a local folder or a URI, by their suffix in any case, and inside archives.

    Files without a suffix are included if their first 132 bytes are those of DICOM (a DICOMDIR is not an image).
    Archives are read once, which takes as long as unpacking them. Members are left out if their file is also unpacked
    next to the archive (`images_001.tar.gz` and `images/a.png` or `images_001/images/a.png`). Names that start with a
    dot (macOS writes `._` files) are left out and not counted. Links to folders are followed; a folder that is
    reachable in several ways is listed once.
    """
    place, mark, options = location.partition("?") if is_uri(location) else (location, "", "")
    place = redact(place)
    left_out: Counter[str] = Counter()
    if is_archive(location):
        root = f"{location}::"
        names = _keep_utf8(scan_archive(location, left_out), left_out)
        paths = _to_chunks(f"{root}{name}" for name in names)
        unpacked = 0
    else:
        if is_uri(location):
            root = location.partition("?")[0].rstrip("/") + "/"
            found = _list_uri(location, root, left_out)
            found = found.take(pc.sort_indices(found))
        elif os.path.isdir(location):
            root = location.rstrip("/") + "/"
            found = _to_chunks(_keep_utf8(_list_local(root, left_out), left_out))
        elif os.path.exists(location):
            raise InputError(f"{location}: is a file; pass the folder with the images, or a tar archive")
        else:
            raise InputError(f"{location}: no such folder; pass a folder with images")
        paths, unpacked = _expand_archives(found, mark + options, left_out)
    if not len(paths):
        others = f" (left out: {format_suffixes(left_out)})" if left_out else ""
        raise InputError(
            f"{place}: no images found{others}; searched it and all folders and archives below for "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    return Listing(root, paths, dict(left_out.most_common()), unpacked)


def _list_local(root: str, left_out: Counter[str]) -> Iterator[str]:
    """Yield images and archives below a folder, sorted by path."""
    seen: set[int] = set()
    pending = [root]
    while pending:
        place = pending.pop()
        if not place.endswith("/"):
            yield place
            continue
        try:
            info = os.stat(place)
            key = info.st_dev << 64 | info.st_ino
            if key in seen:  # a link to a folder above would never end
                continue
            seen.add(key)
            with os.scandir(place) as entries:
                names = [_entry_name(entry, left_out) for entry in entries]
        except OSError as error:
            raise InputError(
                f"{place.rstrip('/')}: cannot be listed ({error.strerror}); change its permissions or move it"
            ) from None
        # With its `/` a folder sorts among the files as its contents do.
        found = sorted((name for name in names if name), reverse=True)
        pending += [place + name for name in found]


def _entry_name(entry: os.DirEntry[str], left_out: Counter[str]) -> str | None:
    """Return the name of an image or an archive, the name of a folder with a final `/`, or None."""
    name = entry.name
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


def _list_uri(location: str, root: str, left_out: Counter[str]) -> pa.ChunkedArray:
    """Return images and archives below a URI, as URIs with its options, unsorted."""
    place = redact(location)
    mark, options = location.partition("?")[1:]
    try:
        store, base = open_uri(location)
        kind = store.get_file_info(base).type
        if kind == arrow_fs.FileType.NotFound:
            raise InputError(f"{place}: no such folder; pass a folder with images")
        if kind == arrow_fs.FileType.File:
            raise InputError(f"{place}: is a file; pass the folder with the images, or a tar archive")
        entries = store.get_file_info(arrow_fs.FileSelector(base, recursive=True))
        names = _uri_names(store, base, entries, left_out)
        return _to_chunks(f"{root}{quote(name, safe=URI_SAFE)}{mark}{options}" for name in _keep_utf8(names, left_out))
    except InputError:
        raise
    except ImageError as error:
        raise InputError(f"{place}: cannot be listed: {error.message}") from None
    except Exception as error:  # exceptions of stores have no common type; their texts can contain parts of the address
        detail = "access denied" if is_access_denied(error) else _describe_store_error(error, options)
        raise InputError(f"{place}: cannot be listed ({detail}); check the address and the credentials") from None


def _uri_names(store: Any, base: str, entries: list[Any], left_out: Counter[str]) -> Iterator[str]:
    """Yield names of images and archives below `base`; this empties `entries`, which can be large."""
    skip = len(base.rstrip("/")) + 1
    unknown: list[str] = []
    while entries:
        entry = entries.pop()
        inner = entry.path[skip:]
        name = inner.rsplit("/", 1)[-1]
        if entry.type != arrow_fs.FileType.File or inner.startswith(".") or "/." in inner:
            continue
        if is_image_name(name) or is_archive(name):
            yield inner
        elif may_be_dicom(name):
            unknown.append(inner)
        else:
            left_out[get_suffix(name)] += 1
    if unknown:
        # One request each, mostly waiting.
        with ThreadPoolExecutor(_SNIFF_THREADS, thread_name_prefix="sniff") as pool:
            for at in range(0, len(unknown), CHUNK_ROWS):
                some = unknown[at : at + CHUNK_ROWS]
                for inner, found in zip(some, pool.map(lambda name: _sniff(store, base, name), some), strict=True):
                    if found:
                        yield inner
                    else:
                        left_out[""] += 1


def _sniff(store: Any, base: str, inner: str) -> bool:
    try:
        with store.open_input_file(f"{base.rstrip('/')}/{inner}") as file:
            return has_dicom_magic(bytes(file.read_at(DICOM_HEAD, 0)))
    except (FileNotFoundError, PermissionError):
        return False
    except OSError as error:
        if is_access_denied(error):
            return False
        raise


def _expand_archives(found: pa.ChunkedArray, options: str, left_out: Counter[str]) -> tuple[pa.ChunkedArray, int]:
    """Replace each archive by its members; also return how many were left out because they are also unpacked."""
    pattern = rf"(?i)\.(?:tar|tar\.gz|tgz|tar\.bz2|tar\.xz){re.escape(options)}$"
    rows = pc.indices_nonzero(pc.match_substring_regex(found, pattern)).to_pylist() if len(found) else []
    if not rows:
        return found, 0
    names: list[str] = found.take(pa.array(rows)).to_pylist()
    pieces: list[pa.Array] = []
    left = 0
    at = 0
    for row, archive, inside in zip(rows, names, scan_archives(names, left_out), strict=True):
        pieces += found.slice(at, row - at).chunks
        inside = list(_keep_utf8(inside, left_out))
        members = _to_chunks(f"{archive}::{name}" for name in inside)
        if len(found) > len(rows):
            unpacked = _find_unpacked(archive, inside, options, found)
            left += unpacked.true_count
            members = members.filter(pc.invert(unpacked))
        pieces += members.chunks
        at = row + 1
    pieces += found.slice(at).chunks
    return pa.chunked_array([piece for piece in pieces if len(piece)], pa.string()), left


def _find_unpacked(archive: str, members: list[str], options: str, found: pa.ChunkedArray) -> pa.BooleanArray:
    """Return which members are also files in the archive's folder, or in a folder with the archive's name."""
    place = archive.removesuffix(options)
    stem = place[: -len(next(end for end in sorted(ARCHIVE_SUFFIXES, key=len)[::-1] if place.lower().endswith(end)))]
    result = pa.array(np.zeros(len(members), bool))
    for folder in (f"{place.rpartition('/')[0]}/", f"{stem}/"):
        below = (name.removeprefix("./") for name in members)
        quoted = (quote(name, safe=URI_SAFE) for name in below) if is_uri(archive) else below
        expected = _to_chunks(f"{folder}{name}{options}" for name in quoted)
        # In this order the hash table is never larger than one archive.
        present = found.filter(pc.is_in(found, value_set=expected.combine_chunks()))
        result = pc.or_(result, pc.is_in(expected, value_set=present.combine_chunks()).combine_chunks())
    return result


def _keep_utf8(names: Iterable[str], left_out: Counter[str]) -> Iterator[str]:
    """Yield names in UTF-8, which a table can hold, and count the others."""
    for name in names:
        if name.isascii():
            yield name
            continue
        try:
            name.encode()
        except UnicodeEncodeError:
            left_out[NOT_UTF8] += 1
        else:
            yield name


def _to_chunks(texts: Iterable[str]) -> pa.ChunkedArray:
    """Return texts as Arrow strings, which take a third of the memory of a list."""
    chunks = []
    texts = iter(texts)
    while some := list(itertools.islice(texts, CHUNK_ROWS)):
        chunks.append(pa.array(some, pa.string()))
    return pa.chunked_array(chunks, pa.string())


def _describe_store_error(error: Exception, options: str) -> str:
    """Return the text of a store's exception on one line, without values of options in the address."""
    text = to_one_line(str(error)) or type(error).__name__
    for _, value in parse_qsl(options):
        text = text.replace(value, "...")
    return text
