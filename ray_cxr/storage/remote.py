"""Files of a run in a bucket: `StorePath` implements `pathlib.Path` for `s3://` through `pyarrow.fs`.

    to_path("runs/1")           a `pathlib.Path`
    to_path("s3://b/runs/1")    a `StorePath` with the same methods

A PUT is atomic, as a rename is on a disk. So for a bucket `atomic.write` uploads the finished file instead of renaming
it, and almost no other code has to distinguish disk and bucket (docs/decisions/0016-storage.md). Code that needs a file
name, such as `open` or Parquet's reader, gets a local copy. A changed object is downloaded again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import os
import posixpath
import re
import secrets
import shutil
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs as arrow_fs

from ray_cxr.errors import ImageError, InputError, RayCxrError
from ray_cxr.storage.paths import URI_SAFE, redact
from ray_cxr.storage.stores import describe_error, is_access_denied, open_uri, unescape

#: Environment variable with the folder for copies, on a local disk; by default in the system's temporary folder.
CACHE_VARIABLE = "RAY_CXR_CACHE"
#: Concurrent requests for many objects; nearly all of their time is waiting.
THREADS = 16

#: Errors of a store that answers, but not now.
_BUSY = frozenset({"INTERNAL_FAILURE", "SERVICE_UNAVAILABLE", "SLOW_DOWN", "THROTTLING"})

P = TypeVar("P")
T = TypeVar("T")

#: `s3:/b` and `s3:` are typos of an address; as local paths they would create a folder `s3:`.
_ADDRESS = re.compile(r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)(?P<slashes>://|:/|:$)")


def is_address(text: str | os.PathLike[str]) -> bool:
    """Whether a text is an address, possibly a malformed one, and not a local path."""
    return isinstance(text, StorePath) or _ADDRESS.match(os.fspath(text)) is not None


def to_path(text: str | os.PathLike[str]) -> Path:
    """Return a local path, or a `StorePath` for `s3://...`; refuse other addresses with `InputError`."""
    if isinstance(text, StorePath):
        return cast(Path, text)
    text = os.fspath(text)
    found = _ADDRESS.match(text)
    if found is None:
        path = Path(text)
        return path.absolute() if _ADDRESS.match(str(path)) else path  # `Path` drops the `./` of `./a:/b`
    scheme, shown = found["scheme"].lower(), redact(text)
    if scheme != "s3":
        remedy = "copy the files, or pass another path" if found["slashes"] == "://" else f"a local path is ./{shown}"
        raise InputError(f"{shown}: only s3:// and local paths work here; {remedy}")
    location, mark, options = text[found.end() :].partition("?")
    bucket, _, key = location.partition("/")
    if found["slashes"] != "://" or not bucket:
        raise InputError(f"{shown}: has no bucket; write s3://BUCKET/FOLDER")
    try:
        result = StorePath(bucket, unescape(key).strip("/"), mark + options)
        with _store_errors(result, "opened"):
            result.open_store()
    except ImageError as error:
        raise InputError(f"{shown}: {error.message}") from None
    except pa.ArrowInvalid:
        raise InputError(f"{shown}: unknown options; see docs/storage.md") from None
    return cast(Path, result)


class StorePath:
    """A file or folder in a bucket, with the part of `pathlib.Path` that the package uses.

    Folders are prefixes: they exist if they are not empty, and `mkdir` does nothing. `str` returns the whole address.
    Arguments: `bucket`, with `anonymous@` if the address has it; `key`, unescaped; `options`, empty or with the leading
    `?`. Missing files raise `FileNotFoundError`, as on a disk. Any method that sends a request can raise `InputError`
    (access is denied, or the bucket does not exist) or `RayCxrError` (the store fails or does not answer).
    """

    def __init__(self, bucket: str, key: str, options: str = "") -> None:
        self._bucket, self._key, self._options = bucket, posixpath.normpath(key) if key else "", options

    def __str__(self) -> str:
        return f"s3://{self._bucket}{'/' * bool(self._key)}{quote(self._key, safe=URI_SAFE)}{self._options}"

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: StorePath) -> bool:
        return str(self) < str(other)

    def __reduce__(self) -> tuple[Any, ...]:
        return StorePath, (self._bucket, self._key, self._options)

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(self._bucket, f"{self._key}/{name}".strip("/"), self._options)

    @property
    def name(self) -> str:
        return self._key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> StorePath:
        return StorePath(self._bucket, self._key.rpartition("/")[0], self._options)

    def with_name(self, name: str) -> StorePath:
        return self.parent / name

    def with_suffix(self, suffix: str) -> StorePath:
        return self.with_name(self.name.removesuffix(self.suffix) + suffix)

    def absolute(self) -> StorePath:
        return self

    resolve = absolute

    def open_store(self) -> Any:
        """Return the Arrow file system of the bucket."""
        return open_uri(str(self))[0]

    @property
    def inner(self) -> str:
        """Its path in the Arrow file system."""
        return f"{self._bucket.rpartition('@')[2]}/{self._key}".rstrip("/")

    def from_inner(self, inner: str) -> StorePath:
        """Return the path in the same bucket for a path in the Arrow file system."""
        return StorePath(self._bucket, inner.partition("/")[2], self._options)

    def exists(self) -> bool:
        return self._info().type != arrow_fs.FileType.NotFound

    def is_file(self) -> bool:
        return bool(self._info().type == arrow_fs.FileType.File)

    def is_dir(self) -> bool:
        return bool(self._info().type == arrow_fs.FileType.Directory)

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> os.stat_result:
        """Return size and time of modification; both 0 for a folder."""
        info = self._info()
        if info.type == arrow_fs.FileType.NotFound:
            raise _missing(self)
        kind = stat.S_IFREG if info.type == arrow_fs.FileType.File else stat.S_IFDIR
        modified = (info.mtime_ns or 0) // 10**9
        return os.stat_result((kind, 0, 0, 1, 0, 0, info.size or 0, modified, modified, modified))

    def iterdir(self) -> Iterator[StorePath]:
        """Yield the contents of the folder in order; one request per 1,000 names."""
        return iter([self / name for name, _ in self.list_entries()])

    def list_entries(self) -> list[tuple[str, bool]]:
        """Return the names in the folder, sorted, and whether each is a file."""
        with _store_errors(self):
            found = self.open_store().get_file_info(arrow_fs.FileSelector(self.inner))
        skip = len(self.inner) + 1
        return sorted((info.path[skip:], info.type == arrow_fs.FileType.File) for info in found)

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """Yield matching paths directly in the folder; none if there is no folder."""
        try:
            return iter([path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern)])
        except FileNotFoundError:
            return iter(())

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: folders of a bucket exist if they are not empty."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with _store_errors(self):
                self.open_store().delete_file(self.inner)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmdir(self) -> None:
        with _store_errors(self):
            self.open_store().delete_dir(self.inner)

    def read_bytes(self) -> bytes:
        with _store_errors(self), self.open_store().open_input_file(self.inner) as stream:
            return bytes(stream.read())

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        self._put(pa.py_buffer(data))

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def write(self, produce: Callable[[Path], object]) -> None:
        """Let `produce` write a local file, then upload it."""
        with tempfile.TemporaryDirectory(prefix="ray_cxr-") as folder:
            temporary = Path(folder) / (self.name or "part")
            produce(temporary)
            if temporary.stat().st_size:
                with pa.memory_map(str(temporary)) as source:
                    self._put(source.read_buffer())
            else:  # an empty file cannot be mapped
                self._put(pa.py_buffer(b""))

    def __fspath__(self) -> str:
        """Return the name of a local copy of the current object, for reading. The object is downloaded once, into a
        folder that is named by its ETag, which changes with the object.
        """
        with _store_errors(self):
            with self.open_store().open_input_file(self.inner) as stream:
                version = _version(stream)
            folder = get_cache() / hashlib.sha256(f"{self}\n{version}".encode()).hexdigest()[:32]
            copy = folder / self.name
            if copy.exists():
                return str(copy)
            with _cache_errors(folder):
                folder.mkdir(mode=0o700, exist_ok=True)
                with open(folder / ".lock", "w") as lock:
                    # One of the machine's workers downloads; the others wait for it.
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    if not copy.exists():
                        self._fetch(copy, version)
        return str(copy)

    def _fetch(self, copy: Path, version: str) -> None:
        temporary = make_part_path(copy)
        try:
            with self.open_store().open_input_file(self.inner) as stream, open(temporary, "xb") as file:
                file.write(stream.read_buffer())
            with self.open_store().open_input_file(self.inner) as stream:
                if version != _version(stream):
                    raise RayCxrError(f"{self}: changed while it was read; run the command again")
            temporary.chmod(0o400)  # read-only, because writing to the copy would not change the object
            temporary.rename(copy)
        finally:
            temporary.unlink(missing_ok=True)

    def _info(self) -> Any:
        with _store_errors(self):
            return self.open_store().get_file_info(self.inner)

    def _put(self, data: pa.Buffer) -> None:
        with _store_errors(self, "written"):
            # No `with`: closing creates the object, so an error must not close an incomplete one.
            stream = self.open_store().open_output_stream(self.inner, compression=None)
            stream.write(data)
            stream.close()


def as_store_path(path: object) -> StorePath | None:
    """Return a path in a bucket as a `StorePath`; None for a local path."""
    return path if isinstance(path, StorePath) else None


def make_part_path(path: Path) -> Path:
    """Return the path of an incomplete file: hidden, in the same folder, with a unique name over all machines."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


def to_address(path: Path) -> str:
    """Return a path as text that other processes and nodes can pass to `to_path`."""
    return str(path.absolute())


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[pa.NativeFile]:
    """Open a file to read parts of it; from a bucket only these parts are fetched."""
    if (store_path := as_store_path(path)) is None:
        with pa.memory_map(str(path)) as source:
            yield source
        return
    with _store_errors(store_path), store_path.open_store().open_input_file(store_path.inner) as source:
        yield source


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is inside a folder, or the folder itself; links are followed."""
    inside, outside = (as_store_path(each) for each in (path, folder))
    if inside is not None and outside is not None:
        return f"{inside.inner}/".startswith(f"{outside.inner}/")
    return inside is None and outside is None and path.resolve().is_relative_to(folder.resolve())


def to_arrow(path: Path) -> tuple[Any, str]:
    """Return a path as Ray expects it: the Arrow file system (None for the local disk), and the path in it."""
    if (store_path := as_store_path(path)) is not None:
        return store_path.open_store(), store_path.inner
    return None, str(path.absolute())


def check_bucket(path: Path) -> None:
    """Refuse a missing bucket before any work is done."""
    if (store_path := as_store_path(path)) is not None:
        bucket = StorePath(store_path._bucket, "", store_path._options)
        exists = True
        # A user may have access to the folder but not to the bucket.
        with contextlib.suppress(InputError), _store_errors(store_path):
            exists = store_path.open_store().get_file_info(bucket.inner).type != arrow_fs.FileType.NotFound
        if not exists:
            raise InputError(f"{path}: no such bucket {bucket.inner}; make it, or pass another path")


def read_file(path: Path) -> pa.NativeFile | None:
    """Return the bytes of a small file as an Arrow file, without a local copy; None if it is missing."""
    try:
        return pa.BufferReader(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_files(paths: Iterable[Path]) -> Iterator[pa.NativeFile | None]:
    """Yield `read_file` of each path, in order; a bucket answers many requests in the time of one."""
    return map_concurrently(read_file, paths)


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files, several at a time; missing ones are ignored."""
    for _ in map_concurrently(lambda path: path.unlink(missing_ok=True), paths):
        pass


def remove_folder(path: Path) -> None:
    """Remove a folder with its contents, if it exists; a local file that cannot be removed is left."""
    if (store_path := as_store_path(path)) is None:
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        store_path.rmdir()


def download(paths: Sequence[Path]) -> list[Path]:
    """Return local paths unchanged, and local copies of files in a bucket, downloaded several at a time."""
    return list(map_concurrently(lambda path: Path(os.fspath(path)), paths))


def download_folder(path: Path) -> Path:
    """Return a local folder unchanged; for a bucket, a local folder with copies of the current files."""
    if (store_path := as_store_path(path)) is None:
        return path
    try:
        names = [name for name, is_file in store_path.list_entries() if is_file and name]
    except FileNotFoundError:
        return get_cache() / "missing-folder"  # never exists
    copies = download([path / name for name in names])
    key = hashlib.sha256("\n".join([str(path), *(str(copy) for copy in copies)]).encode()).hexdigest()[:32]
    folder = get_cache() / f"{key}-folder" / (path.name or "folder")
    with _cache_errors(folder):
        if not folder.exists():
            temporary = make_part_path(folder)
            temporary.mkdir(mode=0o700, parents=True)
            for name, copy in zip(names, copies, strict=True):
                os.link(copy, temporary / name)
            with contextlib.suppress(OSError):  # another process made the same folder
                temporary.rename(folder)
    return folder


def get_cache() -> Path:
    """Return the folder for copies, which only this user may enter."""
    named = os.environ.get(CACHE_VARIABLE)
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"ray_cxr-{os.getuid()}"
    with _cache_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise InputError(
            f"{folder}: must be a folder of yours with mode 0700, because copies of images are kept in it; "
            f"set {CACHE_VARIABLE} to another folder"
        )
    return folder


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if not isinstance(error.filename, (str, os.PathLike)) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # an error of the store
        raise RayCxrError(
            f"{folder}: cannot keep copies of files from a bucket: {error.strerror}; set {CACHE_VARIABLE} to a folder "
            "on a disk with free space"
        ) from None


def map_concurrently(function: Callable[[P], T], paths: Iterable[P], *, threads: int = THREADS) -> Iterator[T]:
    """Yield the results of `function` in the order of the paths, with up to `threads` calls at a time."""
    with ThreadPoolExecutor(threads, thread_name_prefix="store") as pool:
        running: deque[Future[T]] = deque()
        try:
            for path in paths:
                running.append(pool.submit(function, path))
                if len(running) > threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _version(stream: Any) -> str:
    """Return a text that changes with the object."""
    headers = {key.lower(): value.decode() for key, value in (stream.metadata() or {}).items()}
    return f"{headers.get('etag', '')} {headers.get('last-modified', '')} {stream.size()}"


def _missing(path: StorePath) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "no such file or folder", str(path))


@contextlib.contextmanager
def _store_errors(path: StorePath, action: str = "read") -> Iterator[None]:
    """Turn exceptions of a store into one line without their texts, which can contain keys and host names."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise _missing(path) from None
    except OSError as error:
        kind: type[RayCxrError] = InputError
        if is_access_denied(error):
            reason = "access denied; check the credentials in the environment"
        elif (reason := describe_error(error)) == "NO_SUCH_BUCKET":
            reason = "no such bucket; make it, or pass another path"
        else:
            kind = RayCxrError
            is_busy = reason in _BUSY
            remedy = "the storage is overloaded or failing; wait" if is_busy else "check the address and the network"
            reason += f"; {remedy}, then run the command again"
        failure = kind(f"{path}: cannot be {action}: {reason}")
        failure.place = path
        raise failure from None


def describe_in(error: RayCxrError, folder: Path) -> str | None:
    """Return the message of a store's error with `folder` in place of a path inside it; None for any other error."""
    if error.place is None or not is_inside(error.place, folder):
        return None
    return f"{folder}: {str(error).removeprefix(f'{error.place}: ')}"
