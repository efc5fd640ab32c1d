"""Read one file from a local disk or a store that `pyarrow.fs` opens, with errors as `ImageError`."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qsl, unquote

from pyarrow import fs as arrow_fs

from ray_cxr.errors import ImageError, one_line
from ray_cxr.storage.dicomweb_retrieve import fetch_instance
from ray_cxr.storage.paths import MAX_BYTES, is_dicomweb, is_uri

#: Limits of requests to s3:// or gs://. A store that is down is an error within seconds; failed requests are repeated.
CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 30.0
MAX_ATTEMPTS = 5
RETRY_LIMIT_S = 60
_S3_OPTIONS = """
    region scheme endpoint_override anonymous allow_delayed_open allow_bucket_creation allow_bucket_deletion
    tls_ca_file_path force_virtual_addressing
"""
_AWS_ERROR = re.compile(r"AWS Error ([A-Z][A-Z0-9_]*) ")


def read_file(path: str, max_bytes: int) -> bytes:
    """Return the contents of one file, local or by URI, with the errors of `files.read_bytes`."""
    if is_dicomweb(path):
        return fetch_instance(path, max_bytes=max_bytes)
    with storage_errors():
        size, stream = _open_uri_file(path) if is_uri(path) else _open_local_file(path)
        with stream:
            data = b"" if size > max_bytes else bytes(stream.read(max_bytes + 1))
    if max(size, len(data)) > max_bytes:
        raise ImageError("too_large", f"more than {max_bytes} bytes")
    if not data:
        raise ImageError("empty", "the file has 0 bytes")
    return data


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[Callable[[int], bytes]]:
    """Open a file to read it from start to end: `read(n)` returns up to n bytes, `b""` at the end.

    An instance of a PACS is fetched whole.
    """
    if is_dicomweb(path):
        yield io.BytesIO(fetch_instance(path, max_bytes=MAX_BYTES)).read
        return
    with storage_errors():
        if is_uri(path):
            store, inner = open_uri(path)
            stream = store.open_input_stream(inner, compression=None)
        else:
            _, stream = _open_local_file(path)

    def read(count: int) -> bytes:
        with storage_errors():
            return bytes(stream.read(count) or b"")

    try:
        yield read
    finally:
        with contextlib.suppress(Exception):  # errors of closing a broken connection are irrelevant
            stream.close()


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Turn exceptions of a disk or a store in the block into an `ImageError`, without the text of the store."""
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
    except Exception as error:  # exceptions of stores have no common type; their texts can contain keys and host names
        if is_access_denied(error):
            raise ImageError("permission", "the store denies access to the file") from None
        raise ImageError("storage", f"the file cannot be read: {describe_error(error)}") from None


def describe_error(error: Exception) -> str:
    """Return the failure as a word or short line, without the address and the store's text."""
    aws = _AWS_ERROR.search(str(error))
    reason = aws[1] if aws else getattr(error, "strerror", "")
    return one_line(reason or type(error).__name__)[:200]


def _open_local_file(path: str) -> tuple[int, Any]:
    """Return the size of a regular file, and the open file; refuse anything else."""
    if "\0" in path:
        raise ImageError("missing", "no such file")
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):  # a pipe would block, /dev/zero would never end
        raise ImageError("missing", "the path names a folder or a device, not a file")
    return info.st_size, open(path, "rb")


def _open_uri_file(uri: str) -> tuple[int, Any]:
    """Return the size of a file in a store, and the open file."""
    store, path = open_uri(uri)
    if not isinstance(store, (arrow_fs.S3FileSystem, arrow_fs.GcsFileSystem)):
        # S3 and Google report missing files; the other stores would block when a pipe is opened.
        info = store.get_file_info(path)
        if info.type == arrow_fs.FileType.NotFound:
            raise ImageError("missing", "no such file")
        if info.type == arrow_fs.FileType.Directory:
            raise ImageError("missing", "the path names a folder, not a file")
    stream = store.open_input_file(path)
    return stream.size(), stream


def is_access_denied(error: Exception) -> bool:
    """Whether a store denied access; Arrow reports this only in the text."""
    text = str(error)
    return isinstance(error, PermissionError) or any(
        word in text
        for word in ("ACCESS_DENIED", "HTTP response code 403", "INVALID_ACCESS_KEY_ID", "PERMISSION_DENIED")
    )


def open_uri(uri: str) -> tuple[Any, str]:
    """Return the store of a URI, and the path in this store. Opening can need a request, so a bucket or folder is
    opened once.
    """
    address, mark, options = uri.partition("?")
    user = re.match(r"[A-Za-z0-9+.\-]+://([^/]*)@", address)
    if user and user[1] != "anonymous":  # manifests and score tables contain paths and are shared
        raise ImageError("storage", "the address contains a secret key; remove it and set it in the environment")
    scheme, _, location = address.partition("://")
    if scheme.lower() in ("s3", "gs", "gcs"):
        bucket, _, key = location.partition("/")
        return _open_bucket(scheme.lower(), bucket, options), unescape(f"{bucket.rpartition('@')[2]}/{key}").rstrip("/")
    folder, _, name = address.rpartition("/")
    if not name or folder.endswith("/") or "#" in address:
        return arrow_fs.FileSystem.from_uri(uri)
    store, path = _open_folder(folder + mark + options)
    return store, f"{path.rstrip('/')}/{unescape(name)}"


def unescape(text: str) -> str:
    """Decode the escapes (`%20`) of a URI; refuse other bytes than UTF-8, because replacement characters would make
    `%DC` and `%C4` equal.
    """
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ImageError("missing", "the address has escapes that are not UTF-8") from None


_open_folder = functools.lru_cache(maxsize=256)(arrow_fs.FileSystem.from_uri)


@functools.lru_cache(maxsize=256)
def _open_bucket(scheme: str, bucket: str, options: str) -> Any:
    """Open a bucket so that failed requests are repeated."""
    if scheme in ("gs", "gcs"):
        if "retry_limit_seconds" not in options:
            options += f"{'&' if options else ''}retry_limit_seconds={RETRY_LIMIT_S}"
        return arrow_fs.FileSystem.from_uri(f"gs://{bucket}?{options}")[0]
    values: dict[str, Any] = dict(parse_qsl(options, keep_blank_values=True))
    if unknown := values.keys() - set(_S3_OPTIONS.split()):
        raise ImageError("storage", f"unknown s3 options in the address: {', '.join(sorted(unknown))}")
    for name in values.keys() - {"region", "scheme", "endpoint_override"}:
        if (value := values[name].lower()) in ("true", "false", "1", "0"):
            values[name] = value in ("true", "1")
    if bucket.startswith("anonymous@"):
        values["anonymous"] = True
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if "endpoint_override" not in values and endpoint:
        values["endpoint_override"] = endpoint
    # A file written in one piece is then one PUT instead of the three requests of a multipart upload.
    values.setdefault("allow_delayed_open", True)
    if "region" not in values and "endpoint_override" not in values:
        # As pyarrow does for an address, because AWS refuses requests to another region than the bucket's.
        values["region"] = arrow_fs.resolve_s3_region(bucket.rpartition("@")[2])
    return arrow_fs.S3FileSystem(
        **values,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=arrow_fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
    )
