"""Where pictures lie: local folders, archives, and the stores that `pyarrow.fs` opens. Bytes and listings, no pixels.

A path names a file, local or by URI, or a member of an archive as `ARCHIVE::MEMBER`; see `archives` for those.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as arrow_fs

from ray_cxr.errors import ImageError, InputError

#: Larger files are refused before they are read, bytes.
MAX_BYTES = 512 * 1024 * 1024
#: What `list_images` takes for an image. `decode` itself never looks at names.
SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
ARCHIVE_SUFFIXES: tuple[str, ...] = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
#: `ARCHIVE::MEMBER`, for `re` and for Arrow's RE2 alike; of a URI its options (`?region=...`) belong to ARCHIVE. The
#: first `::` that stands behind an archive's suffix parts the two.
MEMBER_PATTERN = (
    r"(?is)^(?P<archive>(?:[a-z][a-z0-9+.\-]*://|file:).*?\.(?:tar|tar\.gz|tgz|tar\.bz2|tar\.xz)(?:\?.*?)?"
    r"|.*?\.(?:tar|tar\.gz|tgz|tar\.bz2|tar\.xz))::(?P<member>.+)$"
)
#: What a request to s3:// or gs:// may take. A store that is not there is an error in seconds, and one that stumbles
#: is asked again.
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
MAX_ATTEMPTS = 5
RETRY_LIMIT_S = 60

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://|file:")
_URI_SAFE = "/!$&'()*+,;=:@~"
_AWS_ERROR = re.compile(r"AWS Error ([A-Z][A-Z0-9_]*) ")
_MEMBER = re.compile(MEMBER_PATTERN)
#: The end of a name that tells what a file is. Exports name files by UIDs, so that `.2` at the end of one is none.
_SUFFIX = re.compile(r"\.[A-Za-z0-9_~-]{0,11}[A-Za-z~][A-Za-z0-9_~-]{0,11}$")
#: The first bytes of a DICOM file: 128 of any value, then these (PS3.10, 7.1).
_DICOM_HEAD, _DICOM_MAGIC = 132, b"DICM"
#: How `left_out` counts files whose names are bytes of another encoding, which no table can hold.
NOT_UTF8 = "not named in UTF-8"
_ROWS_AT_ONCE = 1 << 16
_SNIFF_THREADS = 32
_SHOWN_SUFFIXES = 5


def read_bytes(path: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The contents of one file, or of one member of an archive.

    A member is found by reading its archive from the start; `archives.read` takes many in one pass.

    Args:
        path: a local path, a URI that `pyarrow.fs` can open (`file://`, `s3://`, `gs://`, `hdfs://`, ...), or
            `ARCHIVE::MEMBER`.
        max_bytes: larger files are refused before they are read.

    Raises:
        ImageError: `missing` (no path, no such file, or not a file), `permission`, `empty`, `too_large`, or
            `storage` for any other failure to read; of a member also what is wrong with its archive. The message
            leaves the path out: its row names it.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ImageError("missing", "there is no path")
    name = os.fspath(path)
    inside = split_member(name)
    if inside is not None:
        from ray_cxr.data import archives  # which reads with this module

        return archives.read_one(*inside, max_bytes=max_bytes)
    with failures():
        data = _read_uri(name, max_bytes) if _URI.match(name) else _read_local(name, max_bytes)
    if not data:
        raise ImageError("empty", "the file holds 0 bytes")
    return data


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[Callable[[int], bytes]]:
    """A file to be read from its start to its end: `read(n)` gives up to n bytes, none at the end.

    Raises:
        ImageError: `missing`, `permission` or `storage`; also from `read`.
    """
    with failures():
        if _URI.match(path):
            store, inner = open_uri(path)
            stream = store.open_input_stream(inner, compression=None)
        else:
            _check_regular(path)
            stream = open(path, "rb", buffering=0)  # noqa: SIM115

    def read(count: int) -> bytes:
        with failures():
            return bytes(stream.read(count) or b"")

    try:
        yield read
    finally:
        with contextlib.suppress(Exception):  # what closing a broken connection says is no news
            stream.close()


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Turn what a disk or a store raises inside the block into an `ImageError`, without the store's own text."""
    try:
        yield
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ImageError("missing", "no such file") from None
    except PermissionError:
        raise ImageError("permission", "no permission to read the file") from None
    except MemoryError:
        raise ImageError("too_large", "the file does not fit into memory") from None
    except Exception as error:  # each store has its own exceptions, and their texts can hold keys and host names
        if refused(error):
            raise ImageError("permission", "the store does not permit to read the file") from None
        raise ImageError("storage", f"the file cannot be read: {said(error)}") from None


def said(error: Exception) -> str:
    """What failed, in a word or a short line that holds nothing of the address or the store's own text."""
    aws = _AWS_ERROR.search(str(error))
    return _one_line((aws[1] if aws else error.strerror if isinstance(error, OSError) else "") or type(error).__name__)


@dataclass(frozen=True)
class Listing:
    """The images below a folder.

    Attributes:
        root: what every path begins with, such as `/data/images/`; of an archive `/data/images_001.tar.gz::`.
        paths: string [n], for `read_bytes`; sorted, members of an archive in the archive's own order.
        left_out: how many other files there are, by suffix in lower case; `""` for those without one.
        unpacked: members left out because the same file lies unpacked beside the archive.
    """

    root: str
    paths: pa.ChunkedArray
    left_out: dict[str, int] = field(default_factory=dict)
    unpacked: int = 0


def list_images(location: str) -> list[str]:
    """The paths of `listing` as a list."""
    found: list[str] = listing(location).paths.to_pylist()
    return found


def listing(location: str) -> Listing:
    """Every image under a folder: by its suffix (`SUFFIXES`, in any case), and inside archives (`ARCHIVE_SUFFIXES`).

    A file without a suffix is taken where its first 132 bytes are a DICOM file's (a DICOMDIR is not an image). Archives
    are read through once, which takes as long as unpacking them; members whose file lies unpacked beside the archive
    (`images_001.tar.gz` and `images/a.png` or `images_001/images/a.png`) are left out. Files and folders whose names
    begin with a dot (macOS writes `._` files) are left out, and not counted. Links to folders are followed; a folder
    that can be reached on several ways is listed once.

    Args:
        location: a local folder or archive, or the URI of one.

    Raises:
        InputError: no such folder, a folder or archive that cannot be read, or no image in it.
    """
    place, mark, options = location.partition("?") if _URI.match(location) else (location, "", "")
    place = shown(place)
    left_out: Counter[str] = Counter()
    if is_archive(location):
        from ray_cxr.data import archives

        root = f"{location}::"
        names = _in_utf8(archives.scan(location, left_out), left_out)
        paths = _chunked(f"{root}{name}" for name in names)
        unpacked = 0
    else:
        if _URI.match(location):
            root = location.partition("?")[0].rstrip("/") + "/"
            found = _list_uri(location, root, left_out)
            found = found.take(pc.sort_indices(found))
        elif os.path.isdir(location):
            root = location.rstrip("/") + "/"
            found = _chunked(_in_utf8(_list_local(root, left_out), left_out))
        elif os.path.exists(location):
            raise InputError(f"{location}: is a file; name the folder that holds the images, or a tar archive")
        else:
            raise InputError(f"{location}: no such folder; name one that holds images")
        paths, unpacked = _with_members(found, mark + options, left_out)
    if not len(paths):
        others = f" (left out: {suffixes_text(left_out)})" if left_out else ""
        raise InputError(
            f"{place}: holds no image{others}; looked for {', '.join(SUFFIXES)} in it and in all folders and archives "
            "below"
        )
    return Listing(root, paths, dict(left_out.most_common()), unpacked)


def suffixes_text(left_out: dict[str, int]) -> str:
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
    return (path.partition("?")[0] if _URI.match(path) else path).lower().endswith(ARCHIVE_SUFFIXES)


def is_image_name(name: str) -> bool:
    """Whether a file of this name, which holds no folder, is listed as an image."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def suffix_of(name: str) -> str:
    """The suffix of a file's name in lower case; `""` for none, and for a number, as at the end of a UID."""
    match = _SUFFIX.search(name)
    return match[0].lower() if match else ""


def may_be_dicom(name: str) -> bool:
    """Whether only the first bytes of a file can tell if it is a DICOM image."""
    return not suffix_of(name) and name.upper() != "DICOMDIR"


def is_dicom(head: bytes) -> bool:
    """Whether these first 132 bytes of a file are a DICOM file's."""
    return head[_DICOM_HEAD - 4 : _DICOM_HEAD] == _DICOM_MAGIC


def absolute(path: str) -> str:
    """A URI as it is, a local path made absolute: what other processes and other nodes can open."""
    if _URI.match(path):
        return path
    inside = split_member(path)
    return f"{os.path.abspath(inside[0])}::{inside[1]}" if inside else os.path.abspath(path)


def plain_path(path: str) -> str:
    """A local path as it is; a URI without its options (`?region=...`), and with `%20` as the blank it stands for."""
    if not _URI.match(path):
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
    for part in parts(paths):
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
    for part in parts(plain_paths(paths)):
        names = pc.replace_substring_regex(part, r"(?s)^.*/", "")
        if pc.any(pc.match_substring(names, "::")).as_py():  # a member that lies in no folder of its archive
            names = pa.array([None if path is None else file_name(path) for path in part.to_pylist()], pa.string())
        chunks.append(names)
    return pa.chunked_array(chunks, pa.string())


def shown(place: str) -> str:
    """A path or URI as a message may show it: without what stands before an `@`, which can be a key, and options."""
    if not _URI.match(place):
        return place
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.\-]*://)[^/]*@", r"\1", place.partition("?")[0])


# --- reading


def _check_regular(path: str) -> os.stat_result:
    if "\0" in path:
        raise ImageError("missing", "no such file")
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):  # a pipe would wait for ever, /dev/zero would never end
        raise ImageError("missing", "the path names a folder or a device, not a file")
    return info


def _read_local(path: str, max_bytes: int) -> bytes:
    _check_bytes(_check_regular(path).st_size, max_bytes)
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    _check_bytes(len(data), max_bytes)
    return data


def _read_uri(uri: str, max_bytes: int) -> bytes:
    store, path = open_uri(uri)
    if not isinstance(store, (arrow_fs.S3FileSystem, arrow_fs.GcsFileSystem)):
        # Those two say themselves what is missing; here opening a pipe would wait for ever.
        info = store.get_file_info(path)
        if info.type == arrow_fs.FileType.NotFound:
            raise ImageError("missing", "no such file")
        if info.type == arrow_fs.FileType.Directory:
            raise ImageError("missing", "the path names a folder, not a file")
    with store.open_input_file(path) as stream:
        _check_bytes(stream.size(), max_bytes)
        data = bytes(stream.read(max_bytes + 1))
    _check_bytes(len(data), max_bytes)
    return data


def _check_bytes(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ImageError("too_large", f"more than {max_bytes} bytes")


def refused(error: Exception) -> bool:
    """Whether a store said that the access is not allowed; Arrow has this as text only."""
    text = str(error)
    return isinstance(error, PermissionError) or any(
        word in text
        for word in ("ACCESS_DENIED", "HTTP response code 403", "INVALID_ACCESS_KEY_ID", "PERMISSION_DENIED")
    )


# --- stores


def open_uri(uri: str) -> tuple[Any, str]:
    """The store of a URI and the path in it; opened once per bucket or folder, since that can cost a request."""
    place, mark, options = uri.partition("?")
    _refuse_keys(place)
    scheme, _, rest = place.partition("://")
    if scheme.lower() in ("s3", "gs", "gcs"):
        bucket, _, key = rest.partition("/")
        return _bucket(scheme.lower(), bucket, options), unescape(f"{bucket.rpartition('@')[2]}/{key}").rstrip("/")
    folder, _, name = place.rpartition("/")
    if not name or folder.endswith("/") or "#" in place:
        return arrow_fs.FileSystem.from_uri(uri)
    store, path = _store(folder + mark + options)
    return store, f"{path.rstrip('/')}/{unescape(name)}"


def unescape(text: str) -> str:
    """Return the name that a URI's escapes (`%20`) stand for.

    Raises:
        ImageError: they are not UTF-8; with replacement characters `%DC` and `%C4` would be one name.
    """
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ImageError("missing", "the address has escapes that are not UTF-8") from None


def _refuse_keys(place: str) -> None:
    # Paths stand in manifests and score tables, which are passed on.
    user = re.match(r"[A-Za-z0-9+.\-]+://([^/]*)@", place)
    if user and user[1] != "anonymous":
        raise ImageError("storage", "the address holds a key; leave it out and set it in the environment")


@functools.lru_cache(maxsize=256)
def _store(folder: str) -> tuple[Any, str]:
    return arrow_fs.FileSystem.from_uri(folder)


@functools.lru_cache(maxsize=256)
def _bucket(scheme: str, bucket: str, options: str) -> Any:
    """The store of a bucket, which asks again where a request fails."""
    if scheme in ("gs", "gcs"):
        if "retry_limit_seconds" not in options:
            options += f"{'&' if options else ''}retry_limit_seconds={RETRY_LIMIT_S}"
        return arrow_fs.FileSystem.from_uri(f"gs://{bucket}?{options}")[0]
    chosen = dict(parse_qsl(options, keep_blank_values=True))
    unknown = chosen.keys() - {
        "region",
        "scheme",
        "endpoint_override",
        "anonymous",
        "allow_delayed_open",
        "allow_bucket_creation",
        "allow_bucket_deletion",
        "tls_ca_file_path",
        "force_virtual_addressing",
    }
    if unknown:
        raise ImageError("storage", f"the address has options that s3 does not: {', '.join(sorted(unknown))}")
    values: dict[str, Any] = dict(chosen)
    for name, value in chosen.items():
        if value.lower() in ("true", "false", "1", "0") and name not in ("region", "scheme", "endpoint_override"):
            values[name] = value.lower() in ("true", "1")
    if bucket.startswith("anonymous@"):
        values["anonymous"] = True
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if "endpoint_override" not in values and endpoint:
        values["endpoint_override"] = endpoint
    # What is written in one piece is one PUT then, and not the three requests of a large upload.
    values.setdefault("allow_delayed_open", True)
    if "region" not in values and "endpoint_override" not in values:
        # As pyarrow does for an address: the bucket is asked where it is, since AWS refuses requests elsewhere.
        values["region"] = arrow_fs.resolve_s3_region(bucket.rpartition("@")[2])
    return arrow_fs.S3FileSystem(
        **values,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=arrow_fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
    )


# --- listing


def _list_local(root: str, left_out: Counter[str]) -> Iterator[str]:
    """Images and archives below a folder, in the order of their whole paths."""
    seen: set[int] = set()
    ahead = [root]
    while ahead:
        place = ahead.pop()
        if not place.endswith("/"):
            yield place
            continue
        try:
            info = os.stat(place)
            key = info.st_dev << 64 | info.st_ino
            if key in seen:  # a link back to a folder above would be walked for ever
                continue
            seen.add(key)
            with os.scandir(place) as entries:
                names = [_entry_name(entry, left_out) for entry in entries]
        except OSError as error:
            raise InputError(
                f"{place.rstrip('/')}: cannot be listed ({error.strerror}); change its permissions or move it"
            ) from None
        # With its `/` a folder sorts among the files as the whole paths of what is in it do.
        found = sorted((name for name in names if name), reverse=True)
        ahead += [place + name for name in found]


def _entry_name(entry: os.DirEntry[str], left_out: Counter[str]) -> str | None:
    """The name of an image or an archive, of a folder with a `/` behind it, or None."""
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
                if is_dicom(file.read(_DICOM_HEAD)):
                    return name
        except OSError:
            pass  # counted as left out
    left_out[suffix_of(name)] += 1
    return None


def _list_uri(location: str, root: str, left_out: Counter[str]) -> pa.ChunkedArray:
    """Images and archives below a URI, as URIs with its options, in no order."""
    place = shown(location)
    mark, options = location.partition("?")[1:]
    try:
        store, base = open_uri(location)
        kind = store.get_file_info(base).type
        if kind == arrow_fs.FileType.NotFound:
            raise InputError(f"{place}: no such folder; name one that holds images")
        if kind == arrow_fs.FileType.File:
            raise InputError(f"{place}: is a file; name the folder that holds the images, or a tar archive")
        entries = store.get_file_info(arrow_fs.FileSelector(base, recursive=True))
        names = _uri_names(store, base, entries, left_out)
        return _chunked(f"{root}{quote(name, safe=_URI_SAFE)}{mark}{options}" for name in _in_utf8(names, left_out))
    except InputError:
        raise
    except ImageError as error:
        raise InputError(f"{place}: cannot be listed: {error.message}") from None
    except Exception as error:  # each store has its own exceptions, and their texts can hold what the address holds
        detail = "the access is not allowed" if refused(error) else _store_detail(error, options)
        raise InputError(f"{place}: cannot be listed ({detail}); check the address and the access to it") from None


def _uri_names(store: Any, base: str, entries: list[Any], left_out: Counter[str]) -> Iterator[str]:
    """Names below `base` of images and archives; `entries` is used up, since it can be large."""
    skip = len(base.rstrip("/")) + 1
    doubtful: list[str] = []
    while entries:
        entry = entries.pop()
        inner = entry.path[skip:]
        name = inner.rsplit("/", 1)[-1]
        if entry.type != arrow_fs.FileType.File or inner.startswith(".") or "/." in inner:
            continue
        if is_image_name(name) or is_archive(name):
            yield inner
        elif may_be_dicom(name):
            doubtful.append(inner)
        else:
            left_out[suffix_of(name)] += 1
    if doubtful:
        # A request each, and most of it is waiting.
        with ThreadPoolExecutor(_SNIFF_THREADS, thread_name_prefix="sniff") as pool:
            for at in range(0, len(doubtful), _ROWS_AT_ONCE):
                some = doubtful[at : at + _ROWS_AT_ONCE]
                for inner, found in zip(some, pool.map(lambda name: _sniff(store, base, name), some), strict=True):
                    if found:
                        yield inner
                    else:
                        left_out[""] += 1


def _sniff(store: Any, base: str, inner: str) -> bool:
    try:
        with store.open_input_file(f"{base.rstrip('/')}/{inner}") as file:
            return is_dicom(bytes(file.read_at(_DICOM_HEAD, 0)))
    except (FileNotFoundError, PermissionError):
        return False
    except OSError as error:
        if refused(error):
            return False
        raise


def _with_members(found: pa.ChunkedArray, options: str, left_out: Counter[str]) -> tuple[pa.ChunkedArray, int]:
    """Put its members in the place of each archive; also how many are left out, for lying there unpacked too."""
    pattern = rf"(?i)\.(?:tar|tar\.gz|tgz|tar\.bz2|tar\.xz){re.escape(options)}$"
    rows = pc.indices_nonzero(pc.match_substring_regex(found, pattern)).to_pylist() if len(found) else []
    if not rows:
        return found, 0
    from ray_cxr.data import archives

    names: list[str] = found.take(pa.array(rows)).to_pylist()
    pieces: list[pa.Array] = []
    left = 0
    at = 0
    for row, archive, inside in zip(rows, names, archives.scan_all(names, left_out), strict=True):
        pieces += found.slice(at, row - at).chunks
        inside = list(_in_utf8(inside, left_out))
        members = _chunked(f"{archive}::{name}" for name in inside)
        if len(found) > len(rows):
            here = _unpacked(archive, inside, options, found)
            left += here.true_count
            members = members.filter(pc.invert(here))
        pieces += members.chunks
        at = row + 1
    pieces += found.slice(at).chunks
    return pa.chunked_array([piece for piece in pieces if len(piece)], pa.string()), left


def _unpacked(archive: str, members: list[str], options: str, found: pa.ChunkedArray) -> pa.BooleanArray:
    """Which members are also found as files in the archive's folder, or in one that has the archive's name."""
    place = archive.removesuffix(options)
    stem = place[: -len(next(end for end in sorted(ARCHIVE_SUFFIXES, key=len)[::-1] if place.lower().endswith(end)))]
    result = pa.array(np.zeros(len(members), bool))
    for folder in (f"{place.rpartition('/')[0]}/", f"{stem}/"):
        below = (name.removeprefix("./") for name in members)
        quoted = (quote(name, safe=_URI_SAFE) for name in below) if _URI.match(archive) else below
        would = _chunked(f"{folder}{name}{options}" for name in quoted)
        # This way round the table that is looked up in is never larger than one archive's.
        there = found.filter(pc.is_in(found, value_set=would.combine_chunks()))
        result = pc.or_(result, pc.is_in(would, value_set=there.combine_chunks()).combine_chunks())
    return result


def _in_utf8(names: Iterable[str], left_out: Counter[str]) -> Iterator[str]:
    """Names that can stand in a table; the others, which hold bytes of another encoding, are counted."""
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


def _chunked(texts: Iterable[str]) -> pa.ChunkedArray:
    """Texts as Arrow has them, which takes a third of the memory of a list."""
    chunks = []
    texts = iter(texts)
    while some := list(itertools.islice(texts, _ROWS_AT_ONCE)):
        chunks.append(pa.array(some, pa.string()))
    return pa.chunked_array(chunks, pa.string())


def parts(paths: pa.ChunkedArray) -> Iterator[pa.Array]:
    for chunk in paths.chunks:
        for at in range(0, len(chunk), _ROWS_AT_ONCE):
            yield chunk.slice(at, _ROWS_AT_ONCE)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _store_detail(error: Exception, options: str) -> str:
    """A store's own words on one line, without the values that the address gave."""
    text = _one_line(str(error)) or type(error).__name__
    for _, value in parse_qsl(options):
        text = text.replace(value, "...")
    return text
