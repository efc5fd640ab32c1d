"""Read members of tar archives without unpacking to disk, many in one pass.

NIH's ChestX-ray14 has twelve archives `images_001.tar.gz` with about 10,000 PNGs each. A tar archive has no index and
a compressed one has no random access, so members are read in the archive's order. The path of a member is
`ARCHIVE::MEMBER`. Links in archives are not followed.
"""

from __future__ import annotations

import bz2
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from ray_cxr.errors import ImageError, InputError
from ray_cxr.storage.paths import (
    count_skipped,
    find_skipped_folder,
    get_suffix,
    has_dicom_magic,
    is_image_name,
    may_be_dicom,
    redact,
)
from ray_cxr.storage.stores import MAX_BYTES, open_stream

#: Maximum number of times that an archive is read again from the start after its store failed.
RETRIES = 2
#: Bytes per read of a disk, or per request to a store.
_FETCH_BYTES = 8 * 1024 * 1024
#: Maximum input and output of one decompression step, so that bombs unpack piece by piece.
_INPUT_BYTES, _OUTPUT_BYTES = 256 * 1024, 4 * 1024 * 1024
#: Memory limit of xz, which can request more than a machine has.
_XZ_MEMORY = 256 * 1024 * 1024
#: Maximum size of long names and comments, which `tarfile` reads into memory unchecked.
_MAX_HEADER_BYTES = 1024 * 1024
_BAD_HEADER = "a header inside the archive is damaged"
#: Members that belong to the next member's header.
_EXTRA = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_ENGINES: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(zlib.MAX_WBITS | 16),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY),
}


def read_members(
    archive: str, wanted: Container[str], *, max_bytes: int = MAX_BYTES
) -> Iterator[tuple[str, bytes | ImageError]]:
    """Yield wanted members of an archive in its order, each name with its contents or an `ImageError`.

    Reading stops after the last wanted member, or at the end of the archive if `wanted` has no length. If a name occurs
    twice, only the first member counts (`tar -x` would keep the last). If the store fails, the archive is read again
    from the start; no member is yielded twice. If the archive is damaged, the error is raised after the members before
    the damage.
    """
    seen: set[str] = set()
    count = len(wanted) if isinstance(wanted, Sized) else None
    failures = 0
    while count is None or len(seen) < count:
        before = len(seen)
        try:
            with _open(archive) as (members, stream):
                for info in members:
                    if info.name in wanted and info.name not in seen:
                        content = _read_content(info, stream, max_bytes)
                        seen.add(info.name)
                        yield info.name, content
                        if len(seen) == count:
                            return
            return
        except ImageError as error:
            failures += 1
            # Without progress the store is down; `stores` has repeated the request already.
            if error.code != "storage" or failures > RETRIES or len(seen) == before:
                raise


def read_member(archive: str, member: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the contents of one member; an `ImageError` that `read_members` yields is raised."""
    for _, content in read_members(archive, (member,), max_bytes=max_bytes):
        if isinstance(content, ImageError):
            raise content
        return content
    raise ImageError("missing", "the archive has no such member")


def scan_archive(archive: str, left_out: Counter[str]) -> list[str]:
    """Return the names of the images in an archive, in its order and without repeats. The rules are those of
    `find_images`. The numbers of other files are added to `left_out`, by suffix.
    """
    names: dict[str, None] = {}
    skipped: set[str] = set()
    try:
        with _open(archive) as (members, stream):
            for info in members:
                parts = info.name.removeprefix("./").split("/")
                if (folder := find_skipped_folder(parts[:-1])) is not None:
                    skipped.add(folder)
                    continue
                if info.type not in _PLAIN or info.name in names or any(part.startswith(".") for part in parts):
                    continue
                if is_image_name(parts[-1]) or (
                    may_be_dicom(parts[-1]) and has_dicom_magic(stream.read(min(info.size, 132)))
                ):
                    names[info.name] = None
                else:
                    left_out[get_suffix(parts[-1])] += 1
    except ImageError as error:
        raise InputError(
            f"{redact(archive)}: cannot be read as a tar archive: {error.message} ({error.code}); "
            "download it again, or move it away"
        ) from None
    count_skipped(skipped, left_out)
    return list(names)


@contextmanager
def _open(archive: str) -> Iterator[tuple[Iterator[tarfile.TarInfo], _Stream]]:
    """Yield an iterator over the members of an archive, and the stream that holds the current member's contents."""
    try:
        with open_stream(archive) as fetch:
            stream = _Stream(_decompress(fetch))
            head = stream.peek_head()
            if not head:
                raise ImageError("empty", "the archive has 0 bytes")
            try:
                tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
            except tarfile.TarError:
                if len(head) < tarfile.BLOCKSIZE or any(head):  # a block of zeros is an archive without members
                    raise ImageError("not_an_image", "the file is not a tar archive") from None
            yield _iter_members(stream), stream
    except ImageError as error:
        if error.code == "missing":
            raise ImageError("missing", "no such archive (the path before `::`)") from None
        raise


def _iter_members(stream: _Stream) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.TarFile(fileobj=stream, tarinfo=_Header, encoding="utf-8") as tar:  # type: ignore[arg-type]
            while (info := tar.next()) is not None:
                if info.size < 0:  # possible in an extended header
                    raise ImageError("corrupt", _BAD_HEADER)
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all headers, possibly millions
                yield info
    except ImageError:
        raise
    except Exception:  # `tarfile` also raises ValueErrors and others
        raise ImageError("corrupt", _BAD_HEADER) from None
    if any(stream.last):
        raise ImageError("corrupt", _BAD_HEADER)  # `tarfile` takes a damaged header for the end
    stream.drain()  # to the checksum at the end of the compressed data


def _read_content(info: tarfile.TarInfo, stream: _Stream, max_bytes: int) -> bytes | ImageError:
    if info.issym() or info.islnk():
        return ImageError("missing", "links inside archives are not followed")
    if info.issparse():
        return ImageError("corrupt", "a sparse file inside an archive")
    if info.type not in _PLAIN:
        return ImageError("missing", "the path names a folder or a device, not a file")
    if info.size > max_bytes:
        return ImageError("too_large", f"more than {max_bytes} bytes")
    if not info.size:
        return ImageError("empty", "the file has 0 bytes")
    return stream.read(info.size)


class _Header(tarfile.TarInfo):
    """A header that is checked when it is read; `tarfile` takes a damaged header for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> _Header:
        return cls._check(super().frombuf, buf, encoding, errors)

    @classmethod
    def _frombuf(cls, buf: bytes, encoding: str | None, errors: str, **options: Any) -> _Header:
        # Newer Python versions and Debian's patched 3.11.2 call this method instead of `frombuf`.
        return cls._check(super()._frombuf, buf, encoding, errors, **options)  # type: ignore[misc]

    @classmethod
    def _check(cls, read: Callable[..., Any], buf: bytes | bytearray, *arguments: Any, **options: Any) -> _Header:
        try:
            header: _Header = read(buf, *arguments, **options)
        except tarfile.TarError:
            if not any(buf):
                raise  # the zero block at the end of an archive
            raise ImageError("corrupt", _BAD_HEADER) from None
        if header.size < 0 or (header.type in _EXTRA and header.size > _MAX_HEADER_BYTES):
            raise ImageError("corrupt", _BAD_HEADER)
        return header


class _Stream:
    """A file that `tarfile` reads forwards, made from pieces of bytes. `last` is the result of the last `read`."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")
        self._position = 0
        self.last = b""

    def peek_head(self) -> bytes:
        """Return the first 512 bytes, or fewer of a short file, without advancing."""
        while len(self._piece) < tarfile.BLOCKSIZE and (piece := next(self._pieces, None)) is not None:
            self._piece = memoryview(bytes(self._piece) + piece)
        return bytes(self._piece[: tarfile.BLOCKSIZE])

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position < self._position:
            raise ImageError("corrupt", _BAD_HEADER)
        while self._position < position:
            self._take(position - self._position)
        return position

    def read(self, count: int) -> bytes:
        parts = []
        while count > 0:
            parts.append(self._take(count))
            count -= len(parts[-1])
        self.last = b"".join(parts)
        return self.last

    def drain(self) -> None:
        self._piece = memoryview(b"")
        for _ in self._pieces:
            pass

    def _take(self, count: int) -> memoryview:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                raise ImageError("truncated", "the archive is incomplete")
            self._piece = memoryview(piece)
        part, self._piece = self._piece[:count], self._piece[count:]
        self._position += len(part)
        return part


def _decompress(fetch: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed if the first bytes show a known compression; checksums are checked."""
    pieces = _read_pieces(fetch)
    data = next(pieces, b"")
    while 0 < len(data) < max(map(len, _ENGINES)) and (more := next(pieces, b"")):
        data += more  # a network can deliver few bytes at a time
    engine = next((make for magic, make in _ENGINES.items() if data.startswith(magic)), None)
    if engine:
        yield from _decompress_streams(engine, data, pieces)
    elif data:
        yield data
        yield from pieces


def _read_pieces(fetch: Callable[[int], bytes]) -> Iterator[bytes]:
    while data := fetch(_FETCH_BYTES):
        for start in range(0, len(data), _INPUT_BYTES):
            yield data[start : start + _INPUT_BYTES]


def _decompress_streams(make: Callable[[], Any], data: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    while data:  # several concatenated streams are one archive, as for gzip
        engine = make()
        while not engine.eof:
            if not data and getattr(engine, "needs_input", True):
                data = next(pieces, b"")
                if not data:
                    raise ImageError("truncated", "the compressed archive is incomplete")
            try:
                output = engine.decompress(data, _OUTPUT_BYTES)
            except (zlib.error, OSError, EOFError, lzma.LZMAError, MemoryError):
                raise ImageError("corrupt", "the compressed data of the archive are damaged") from None
            data = getattr(engine, "unconsumed_tail", b"")
            if output:
                yield output
        data = engine.unused_data
        while not data.strip(b"\0"):  # zero padding of the last block
            data = next(pieces, b"")
            if not data:
                return
        data = data.lstrip(b"\0")
        if not any(data.startswith(magic) for magic in _ENGINES):
            return  # trailing data are ignored, as by gzip
