"""Where pictures lie: local folders and the stores that `pyarrow.fs` opens. Bytes and listings, no pixels."""

from __future__ import annotations

import functools
import os
import re
import stat
from typing import Any
from urllib.parse import quote, unquote

from pyarrow import fs as arrow_fs

from ray_cxr.errors import ImageError, InputError

#: Larger files are refused before they are read, bytes.
MAX_BYTES = 512 * 1024 * 1024
#: What `list_images` takes for an image. `decode` itself never looks at names.
SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://|file:")
_URI_SAFE = "/!$&'()*+,;=:@~"


def read_bytes(path: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The contents of one file.

    Args:
        path: a local path, or a URI that `pyarrow.fs` can open (`file://`, `s3://`, `gs://`, `hdfs://`, ...).
        max_bytes: larger files are refused before they are read.

    Raises:
        ImageError: `missing` (no path, no such file, or not a file), `permission`, `empty`, `too_large`, or
            `storage` for any other failure to read. The message leaves the path out: its row names it.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ImageError("missing", "there is no path")
    name = os.fspath(path)
    try:
        data = _read_uri(name, max_bytes) if _URI.match(name) else _read_local(name, max_bytes)
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ImageError("missing", "no such file") from None
    except PermissionError:
        raise ImageError("permission", "no permission to read the file") from None
    except MemoryError:
        raise ImageError("too_large", "the file does not fit into memory") from None
    except Exception as error:  # each store has its own exceptions, and their texts can hold keys and host names
        detail = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise ImageError("storage", f"the file cannot be read: {_one_line(detail)}") from None
    if not data:
        raise ImageError("empty", "the file holds 0 bytes")
    return data


def list_images(location: str) -> list[str]:
    """Every image under a folder, by its suffix (`SUFFIXES`, in any case), for `read_bytes`.

    Files and folders whose names begin with a dot (macOS writes `._` files) are left out. Links to folders
    are followed; a folder that can be reached on several ways is listed once.

    Args:
        location: a local folder, or the URI of one.

    Returns:
        Paths that begin with `location` as it was given, sorted; of a URI they are URIs.

    Raises:
        InputError: no such folder, a folder that cannot be listed, or no image in it.
    """
    if _URI.match(location):
        found = _list_uri(location)
    elif os.path.isdir(location):
        found = _list_local(location)
    elif os.path.exists(location):
        raise InputError(f"{location}: is a file; name the folder that holds the images")
    else:
        raise InputError(f"{location}: no such folder; name one that holds images")
    if not found:
        raise InputError(f"{location}: holds no image; looked for {', '.join(SUFFIXES)} in it and all folders below")
    return sorted(found)


def absolute(path: str) -> str:
    """A URI as it is, a local path made absolute: what other processes and other nodes can open."""
    return path if _URI.match(path) else os.path.abspath(path)


def plain_path(path: str) -> str:
    """A local path as it is; a URI without its options (`?region=...`), and with `%20` as the blank it stands for."""
    return unquote(path.partition("?")[0]) if _URI.match(path) else path


def _read_local(path: str, max_bytes: int) -> bytes:
    if "\0" in path:
        raise ImageError("missing", "no such file")
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):  # a pipe would wait for ever, /dev/zero would never end
        raise ImageError("missing", "the path names a folder or a device, not a file")
    _check_bytes(info.st_size, max_bytes)
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    _check_bytes(len(data), max_bytes)
    return data


def _read_uri(uri: str, max_bytes: int) -> bytes:
    store, path = _open_uri(uri)
    info = store.get_file_info(path)
    if info.type == arrow_fs.FileType.NotFound:
        raise ImageError("missing", "no such file")
    if info.type == arrow_fs.FileType.Directory:
        raise ImageError("missing", "the path names a folder, not a file")
    _check_bytes(info.size or 0, max_bytes)
    with store.open_input_stream(path) as stream:
        data = bytes(stream.read(max_bytes + 1))
    _check_bytes(len(data), max_bytes)
    return data


def _check_bytes(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ImageError("too_large", f"more than {max_bytes} bytes")


def _open_uri(uri: str) -> tuple[Any, str]:
    """The store of a URI and the path in it; opened once per folder, since that can cost a request."""
    place, mark, options = uri.partition("?")
    folder, _, name = place.rpartition("/")
    if not name or folder.endswith("/") or "#" in place:
        return arrow_fs.FileSystem.from_uri(uri)
    store, path = _store(folder + mark + options)
    return store, f"{path.rstrip('/')}/{unquote(name)}"


@functools.lru_cache(maxsize=256)
def _store(folder: str) -> tuple[Any, str]:
    return arrow_fs.FileSystem.from_uri(folder)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def _list_local(folder: str) -> list[str]:
    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); change its permissions or move it")

    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        info = os.stat(here)
        if (info.st_dev, info.st_ino) in seen:  # a link back to a folder above would be walked for ever
            folders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(here, name) for name in files if _is_image(name)]
    return found


def _list_uri(location: str) -> list[str]:
    place, mark, options = location.partition("?")
    try:
        store, base = arrow_fs.FileSystem.from_uri(location)
        kind = store.get_file_info(base).type
        if kind == arrow_fs.FileType.Directory:
            entries = store.get_file_info(arrow_fs.FileSelector(base, recursive=True))
        elif kind == arrow_fs.FileType.NotFound:
            raise InputError(f"{place}: no such folder; name one that holds images")
        else:
            raise InputError(f"{place}: is a file; name the folder that holds the images")
    except InputError:
        raise
    except Exception as error:  # each store has its own exceptions
        detail = _one_line(str(error)) or type(error).__name__
        raise InputError(f"{place}: cannot be listed ({detail}); check the address and the access to it") from None
    found: list[str] = []
    for entry in entries:
        inner = entry.path[len(base.rstrip("/")) :].lstrip("/")
        parts = inner.split("/")
        hidden = any(part.startswith(".") for part in parts)
        if entry.type == arrow_fs.FileType.File and _is_image(parts[-1]) and not hidden:
            found.append(f"{place.rstrip('/')}/{quote(inner, safe=_URI_SAFE)}{mark}{options}")
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
