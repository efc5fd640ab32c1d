"""Files of a run in a bucket: what the package asks of a `pathlib.Path`, asked of `s3://` through `pyarrow.fs`.

    path("runs/1")           a `pathlib.Path`
    path("s3://b/runs/1")    a `StorePath`, which does the same under the same names

A PUT shows an object whole or not at all, which on a disk takes a temporary file and a rename; so `atomic.write` puts,
and nothing else has to know (docs/decisions/0016-storage.md). What wants a file's name, such as `open` or Parquet's
reader, gets that of a copy on this machine, which is made anew when the object is another one than the copy was of.
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
from ray_cxr.storage.paths import redact
from ray_cxr.storage.stores import describe_error, is_access_denied, open_uri, unescape

#: Names the folder for copies, which must be on a disk of the machine; without it one in the system's temporary folder.
CACHE_VARIABLE = "RAY_CXR_CACHE"
#: Requests at a time where many objects are wanted: nearly all of it is waiting.
THREADS = 16

T = TypeVar("T")

#: `s3:/b` and `s3:` are slips of the pen for an address; as local names they would be a folder `s3:`.
_ADDRESS = re.compile(r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)(?P<slashes>://|:/|:$)")
_SAFE = "/!$&'()*+,;=:@~"


def is_address(text: str | os.PathLike[str]) -> bool:
    """Whether a text names, or means to name, something that is no local path."""
    return isinstance(text, StorePath) or _ADDRESS.match(os.fspath(text)) is not None


def path(text: str | os.PathLike[str]) -> Path:
    """A local path, or the place in a bucket that `s3://...` names.

    Raises:
        InputError: an address of another kind, one that names no bucket, holds a key or an option that s3 has not.
    """
    if isinstance(text, StorePath):
        return cast(Path, text)
    text = os.fspath(text)
    found = _ADDRESS.match(text)
    if found is None:
        return Path(text)
    scheme, place = found["scheme"].lower(), redact(text)
    if scheme != "s3":
        raise InputError(f"{place}: only s3:// and paths on this machine can be used here; copy it, or name another")
    rest, mark, options = text[found.end() :].partition("?")
    bucket, _, key = rest.partition("/")
    if found["slashes"] != "://" or not bucket:
        raise InputError(f"{place}: names no bucket; write it as s3://BUCKET/FOLDER")
    try:
        one = StorePath(bucket, unescape(key).strip("/"), mark + options)
        with _failures(one, "opened"):
            one.store()
    except ImageError as error:
        raise InputError(f"{place}: {error.message}") from None
    except pa.ArrowInvalid:
        raise InputError(f"{place}: its options are not such as s3 has; see docs/storage.md") from None
    return cast(Path, one)


class StorePath:
    """A file or folder in a bucket, with the part of `pathlib.Path` that the package uses.

    Folders are prefixes: they are there when something is in them, `mkdir` has nothing to do, and a name that is asked
    for and not there raises `FileNotFoundError` as on a disk. As text it is its whole address.

    Args:
        bucket: as in the address, which may begin with `anonymous@`.
        key: without slashes at its ends, and without escapes.
        options: of the address, with their `?`, or nothing.

    Raises:
        InputError: from all that asks the store: it does not permit it, or has no such bucket.
        RayCxrError: likewise: it does not answer, or fails.
    """

    def __init__(self, bucket: str, key: str, options: str = "") -> None:
        self._bucket, self._key, self._options = bucket, posixpath.normpath(key) if key else "", options

    # --- names

    def __str__(self) -> str:
        return f"s3://{self._bucket}{'/' * bool(self._key)}{quote(self._key, safe=_SAFE)}{self._options}"

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

    def resolve(self) -> StorePath:
        return self

    # --- the store

    def store(self) -> Any:
        """The file system that holds it."""
        return open_uri(str(self))[0]

    @property
    def inner(self) -> str:
        """Its path in `store`."""
        return f"{self._bucket.rpartition('@')[2]}/{self._key}".rstrip("/")

    def at(self, inner: str) -> StorePath:
        """The path of the same bucket that `inner` names."""
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
        """Size and time of change; of a folder neither."""
        info = self._info()
        if info.type == arrow_fs.FileType.NotFound:
            raise _missing(self)
        kind = stat.S_IFREG if info.type == arrow_fs.FileType.File else stat.S_IFDIR
        changed = (info.mtime_ns or 0) // 10**9
        return os.stat_result((kind, 0, 0, 1, 0, 0, info.size or 0, changed, changed, changed))

    def iterdir(self) -> Iterator[StorePath]:
        """What is in the folder, in order; one request for a thousand names."""
        return iter([self / name for name, _ in self.entries()])

    def entries(self, *, below: bool = False) -> list[tuple[str, bool]]:
        """Names in the folder, and whether each is a file; or, below, of all files in it and its folders."""
        with _failures(self):
            found = self.store().get_file_info(arrow_fs.FileSelector(self.inner, recursive=below))
        skip = len(self.inner) + 1
        return sorted(
            (one.path[skip:], one.type == arrow_fs.FileType.File)
            for one in found
            if not below or one.type == arrow_fs.FileType.File
        )

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """Names in the folder itself that match; nothing where there is no folder."""
        try:
            names = [name for name, _ in self.entries()]
        except FileNotFoundError:
            names = []
        return iter([self / name for name in names if fnmatch.fnmatchcase(name, pattern)])

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there when something is in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with _failures(self):
                self.store().delete_file(self.inner)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmdir(self) -> None:
        with _failures(self):
            self.store().delete_dir(self.inner)

    # --- contents

    def read_bytes(self) -> bytes:
        with _failures(self), self.store().open_input_file(self.inner) as stream:
            return bytes(stream.read())

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        self._put(pa.py_buffer(data))

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def write(self, produce: Callable[[Path], None]) -> None:
        """Let `produce` write a file of this machine, then put it."""
        with tempfile.TemporaryDirectory(prefix="ray_cxr-") as folder:
            part = Path(folder) / (self.name or "part")
            produce(part)
            if part.stat().st_size:
                with pa.memory_map(str(part)) as source:
                    self._put(source.read_buffer())
            else:  # which cannot be mapped
                self._put(pa.py_buffer(b""))

    def __fspath__(self) -> str:
        """The name of a copy on this machine, for reading."""
        return str(self.here())

    def here(self) -> Path:
        """A copy of the object as it is now, on this machine; made where there is none yet.

        A copy lies under the object's address and ETag, which is another one when the object is changed.
        """
        with _failures(self):
            with self.store().open_input_file(self.inner) as stream:
                version = _version(stream)
            folder = cache() / hashlib.sha256(f"{self}\n{version}".encode()).hexdigest()[:32]
            copy = folder / self.name
            if copy.exists():
                return copy
            with _caching(folder):
                folder.mkdir(mode=0o700, exist_ok=True)
                with open(folder / ".lock", "w") as lock:
                    # Of the workers of a machine one fetches; the others wait for it.
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    return copy if copy.exists() else self._fetch(copy, version)

    def _fetch(self, copy: Path, version: str) -> Path:
        part = copy.with_name(f".{copy.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            with self.store().open_input_file(self.inner) as stream, open(part, "xb") as file:
                file.write(stream.read_buffer())
            with self.store().open_input_file(self.inner) as stream:
                if version != _version(stream):
                    raise RayCxrError(f"{self}: was changed while it was read; run the command again")
            part.chmod(0o400)  # whoever would write to it has taken it for the object itself
            part.rename(copy)
        finally:
            part.unlink(missing_ok=True)
        return copy

    def _info(self) -> Any:
        with _failures(self):
            return self.store().get_file_info(self.inner)

    def _put(self, data: pa.Buffer) -> None:
        with _failures(self, "written"):
            # Not in a `with`: closing is what makes the object, and nothing may close it half-way.
            stream = self.store().open_output_stream(self.inner, compression=None)
            stream.write(data)
            stream.close()


def stored(place: object) -> StorePath | None:
    """A path in a bucket as what it is; None of a path on this machine."""
    return place if isinstance(place, StorePath) else None


def address(place: Path) -> str:
    """A path as other processes, and other nodes, can use it with `path`."""
    return str(place.absolute())


@contextlib.contextmanager
def opened(place: Path) -> Iterator[pa.NativeFile]:
    """A file to be read here and there: of a bucket only what is read is fetched."""
    if (there := stored(place)) is None:
        with pa.memory_map(str(place)) as source:
            yield source
        return
    with _failures(there), there.store().open_input_file(there.inner) as source:
        yield source


def is_inside(place: Path, folder: Path) -> bool:
    """Whether a path is a folder's, or the folder itself; links are followed."""
    one, other = (str(path.resolve()).partition("?")[0].rstrip("/") for path in (place, folder))
    return f"{one}/".startswith(f"{other}/")


def arrow(place: Path) -> tuple[Any, str]:
    """A path as Ray takes it: the Arrow file system, None for that of the machine, and the path in it."""
    if (there := stored(place)) is not None:
        return there.store(), there.inner
    return None, str(place.absolute())


def check_bucket(place: Path) -> None:
    """Refuse, before any work is done, a bucket that is not there.

    Raises:
        InputError: it is not there.
    """
    if (there := stored(place)) is not None:
        bucket = StorePath(there._bucket, "", there._options)
        found = True
        with contextlib.suppress(InputError):  # who may use one folder need not be permitted to ask for the bucket
            found = bucket.exists()
        if not found:
            raise InputError(f"{place}: there is no bucket {bucket.inner}; make it, or name another")


def content(place: Path) -> pa.NativeFile | None:
    """A small file's bytes, to be read as a file; None where there is none. No copy of it is kept."""
    try:
        return pa.BufferReader(place.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None


def contents(paths: Iterable[Path]) -> Iterator[pa.NativeFile | None]:
    """`content` of each, in order and some of them ahead: a bucket answers many requests in the time of one."""
    return ahead(content, paths)


def remove(paths: Iterable[Path]) -> None:
    """Remove files, several at a time; one that is gone already is no matter."""
    for _ in ahead(lambda one: one.unlink(missing_ok=True), paths):
        pass


def here(paths: Sequence[Path]) -> list[Path]:
    """Files of this machine as they are, of a bucket copies, see `StorePath.here`; fetched several at a time."""
    return list(ahead(lambda one: Path(os.fspath(one)), paths))


def folder_here(place: Path) -> Path:
    """A folder of this machine as it is; of a bucket a folder of copies of the files right in it.

    The copies are of one moment's listing, and a folder of other versions is another folder.
    """
    if (there := stored(place)) is None:
        return place
    try:
        names = [name for name, is_file in there.entries() if is_file and name]
    except FileNotFoundError:
        return Path(cache() / "nothing")  # which does not exist
    copies = here([place / name for name in names])
    key = hashlib.sha256("\n".join([str(place), *(str(copy) for copy in copies)]).encode()).hexdigest()[:32]
    folder = cache() / f"{key}-folder" / (place.name or "folder")
    with _caching(folder):
        if not folder.exists():
            part = folder.parent / f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.part"
            part.mkdir(mode=0o700, parents=True)
            for name, copy in zip(names, copies, strict=True):
                os.link(copy, part / name)
            with contextlib.suppress(OSError):  # where another process was quicker, its folder is the same
                part.rename(folder)
    return folder


def cache() -> Path:
    """The folder for copies, which nobody else may enter.

    Raises:
        InputError: it is another user's, or open to others.
    """
    named = os.environ.get(CACHE_VARIABLE)
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"ray_cxr-{os.getuid()}"
    with _caching(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise InputError(
            f"{folder}: is not a folder of your own that is closed to others (mode 0700), so nothing is copied into "
            f"it; set {CACHE_VARIABLE} to another"
        )
    return folder


@contextlib.contextmanager
def _caching(folder: Path) -> Iterator[None]:
    try:
        yield
    except (RayCxrError, FileNotFoundError):
        raise
    except OSError as error:
        if not isinstance(error.filename, (str, os.PathLike)) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # the store's
        raise RayCxrError(
            f"{folder}: copies of a bucket's files cannot be kept there: {error.strerror}; set {CACHE_VARIABLE} to a "
            "folder on a disk with room"
        ) from None


def ahead(work: Callable[[Path], T], paths: Iterable[Path]) -> Iterator[T]:
    """What `work` makes of each path, in order, some of them at a time."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="store") as pool:
        running: deque[Future[T]] = deque()
        try:
            for one in paths:
                running.append(pool.submit(work, one))
                if len(running) > THREADS:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _version(stream: Any) -> str:
    """What of an opened object is another when it is changed."""
    said = {key.lower(): value.decode() for key, value in (stream.metadata() or {}).items()}
    return f"{said.get('etag', '')} {said.get('last-modified', '')} {stream.size()}"


def _missing(place: StorePath) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, "no such file or folder", str(place))


@contextlib.contextmanager
def _failures(place: StorePath, done: str = "read") -> Iterator[None]:
    """What a store raises, as one line of ours without its own words, which can hold keys and host names."""
    try:
        yield
    except (RayCxrError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise _missing(place) from None
    except OSError as error:
        if is_access_denied(error):
            raise InputError(
                f"{place}: may not be {done}: the store does not permit it; check the credentials in the environment"
            ) from None
        said = describe_error(error)
        if said == "NO_SUCH_BUCKET":
            raise InputError(f"{place}: cannot be {done}: there is no such bucket; make it, or name another") from None
        raise RayCxrError(
            f"{place}: cannot be {done}: {said}; check the address and the network, then run the command again"
        ) from None
