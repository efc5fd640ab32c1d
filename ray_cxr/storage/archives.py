"""Tar archives, read as they were downloaded: nothing is unpacked to disk, and one pass serves many members.

NIH's ChestX-ray14 comes as twelve `images_001.tar.gz` of about 10,000 PNGs each. A tar archive has no index, and a
compressed one cannot be entered in the middle, so several members are read in the archive's order. A path inside is
`ARCHIVE::MEMBER`. Links in archives are not followed.
"""

from __future__ import annotations

import bz2
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

from ray_cxr.errors import ImageError, InputError
from ray_cxr.progress import Progress
from ray_cxr.storage.paths import get_suffix, has_dicom_magic, is_image_name, may_be_dicom, redact
from ray_cxr.storage.stores import MAX_BYTES, open_stream

#: An archive whose store fails in the midst is read again from the start, so often at most.
RETRIES = 2
#: What is asked of a disk or store at once; each is a request where it is a store.
_FETCH_BYTES = 8 * 1024 * 1024
#: What goes into a decompressor at once, and what may come out of it at once: a bomb unpacks piece by piece.
_PIECE_BYTES, _UNPACKED_BYTES = 256 * 1024, 4 * 1024 * 1024
#: xz can ask for more than a machine has.
_XZ_MEMORY = 256 * 1024 * 1024
#: Long names and comments; they are read into memory before anything can be asked about them.
_MAX_HEADER_BYTES = 1024 * 1024
_BAD_HEADER = "a header inside the archive is damaged"
#: Members that are part of the next one's header.
_IN_MEMORY = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_ENGINES: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(zlib.MAX_WBITS | 16),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY),
}


def read_members(
    archive: str, wanted: Container[str], *, max_bytes: int = MAX_BYTES
) -> Iterator[tuple[str, bytes | ImageError]]:
    """Wanted members of an archive, in its order, in one pass that ends with the last of them.

    A name that occurs again later in the archive is passed over: the first one counts. (`tar -x` would keep the
    last.) Where the store fails in the midst, the archive is read again from the start; no member comes twice.

    Args:
        archive: a local path or a URI, compressed with gzip, bzip2 or xz, or not; told by its first bytes.
        wanted: names of members, as in the archive. Without a length, the archive is read to its end.
        max_bytes: larger members are passed over and come as an error.

    Yields:
        The name of a member, and its contents or an `ImageError`: `missing` (a link, folder or device), `too_large`,
        `empty`, `corrupt` (sparse). Members that the archive does not hold do not come.

    Raises:
        ImageError: what is wrong with the archive itself: `missing`, `permission`, `storage`, `empty`, `truncated`,
            `corrupt`, `not_an_image` (no tar archive). Members before the damage have been given by then.
    """
    met: set[str] = set()
    failures = 0
    while True:
        before = len(met)
        try:
            yield from _read_once(archive, wanted, met, max_bytes)
            return
        except ImageError as error:
            failures += 1
            # Without progress the store is down, and asking again is for the retries inside it.
            if error.code != "storage" or failures > RETRIES or len(met) == before:
                raise


def _read_once(
    archive: str, wanted: Container[str], met: set[str], max_bytes: int
) -> Iterator[tuple[str, bytes | ImageError]]:
    count = len(wanted) if isinstance(wanted, Sized) else None
    if count is not None and len(met) >= count:
        return
    with _open(archive) as (members, stream):
        for info in members:
            if info.name in met or info.name not in wanted:
                continue
            content = _content(info, stream, max_bytes)
            met.add(info.name)
            yield info.name, content
            if len(met) == count:
                return


def read_member(archive: str, member: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """One member.

    Raises:
        ImageError: as `read_members` raises and yields; `missing` where the archive does not hold it.
    """
    for _, content in read_members(archive, (member,), max_bytes=max_bytes):
        if isinstance(content, ImageError):
            raise content
        return content
    raise ImageError("missing", "the archive holds no such member")


def list_members(archive: str) -> list[str]:
    """Names of the images in an archive by the rules of `find_images`, in its order, each once.

    Raises:
        InputError: the archive cannot be read to its end.
    """
    return scan_archive(archive, Counter())


def scan_archive(archive: str, left_out: Counter[str]) -> list[str]:
    """`list_members`, which adds to `left_out` how many other files there are, by suffix."""
    names: dict[str, None] = {}
    try:
        with _open(archive) as (members, stream):
            for info in members:
                parts = info.name.removeprefix("./").split("/")
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
            "copy or download it again, or move it away"
        ) from None
    return list(names)


def scan_archives(archives: Sequence[str], left_out: Counter[str]) -> Iterator[list[str]]:
    """`scan_archive` of each archive in turn, which tells how far it is where that takes long."""
    with Progress("list", len(archives), unit="archives", last_line=False) as progress:
        for archive in archives:
            yield scan_archive(archive, left_out)
            progress.advance(1)


@contextmanager
def _open(archive: str) -> Iterator[tuple[Iterator[tarfile.TarInfo], _Stream]]:
    """The members of an archive, and the bytes behind the header of the one that came last.

    Raises:
        ImageError: see `read_members`; also while the members are gone through.
    """
    with open_stream(archive) as fetch:
        stream = _Stream(_unpacked(fetch))
        head = stream.head()
        if not head:
            raise ImageError("empty", "the archive holds 0 bytes")
        try:
            tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
        except tarfile.TarError:
            if len(head) < tarfile.BLOCKSIZE or any(head):  # a block of zeros is an archive without members
                raise ImageError("not_an_image", "the file is not a tar archive") from None
        yield _members(stream), stream


def _members(stream: _Stream) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.TarFile(
            fileobj=stream,  # type: ignore[arg-type]
            mode="r",
            tarinfo=_Header,
            encoding="utf-8",
            errors="surrogateescape",
        ) as tar:
            while (info := tar.next()) is not None:
                if info.size < 0:  # an extended header can say so
                    raise ImageError("corrupt", _BAD_HEADER)
                tar.members.clear()  # type: ignore[attr-defined]  # it keeps all headers, which can be millions
                yield info
    except ImageError:
        raise
    except Exception:  # `tarfile` lets out ValueErrors and others, too
        raise ImageError("corrupt", _BAD_HEADER) from None
    if any(stream.last):
        raise ImageError("corrupt", _BAD_HEADER)  # which `tarfile` takes for the end
    stream.drain()  # the compressed data's checksum stands behind all that


def _content(info: tarfile.TarInfo, stream: _Stream, max_bytes: int) -> bytes | ImageError:
    if info.issym() or info.islnk():
        return ImageError("missing", "a link inside an archive, which is not followed")
    if info.issparse():
        return ImageError("corrupt", "a sparse file inside an archive")
    if info.type not in _PLAIN:
        return ImageError("missing", "the path names a folder or a device, not a file")
    if info.size > max_bytes:
        return ImageError("too_large", f"more than {max_bytes} bytes")
    if not info.size:
        return ImageError("empty", "the file holds 0 bytes")
    return stream.read(info.size)


class _Header(tarfile.TarInfo):
    """A header that is checked as it is read; `tarfile` takes a damaged one for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> _Header:
        return cls._checked(super().frombuf, buf, encoding, errors)

    @classmethod
    def _frombuf(cls, buf: bytes, encoding: str | None, errors: str, **options: Any) -> _Header:
        # Newer Pythons, and Debian's patched 3.11.2, read headers through this one and not through `frombuf`.
        return cls._checked(super()._frombuf, buf, encoding, errors, **options)  # type: ignore[misc]

    @classmethod
    def _checked(cls, read: Callable[..., Any], buf: bytes | bytearray, *given: Any, **options: Any) -> _Header:
        try:
            header: _Header = read(buf, *given, **options)
        except tarfile.TarError:
            if not any(buf):
                raise  # the block of zeros that ends an archive
            raise ImageError("corrupt", _BAD_HEADER) from None
        if header.size < 0 or (header.type in _IN_MEMORY and header.size > _MAX_HEADER_BYTES):
            raise ImageError("corrupt", _BAD_HEADER)
        return header


class _Stream:
    """Pieces of bytes as the forward-only file that `tarfile` reads.

    Attributes:
        last: what was read last.

    Raises:
        ImageError: `truncated` where bytes are asked for that are not there.
    """

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")
        self._at = 0
        self.last = b""

    def head(self) -> bytes:
        """The first 512 bytes, or all there are, without going on."""
        while len(self._piece) < tarfile.BLOCKSIZE and (piece := next(self._pieces, None)) is not None:
            self._piece = memoryview(bytes(self._piece) + piece)
        return bytes(self._piece[: tarfile.BLOCKSIZE])

    def tell(self) -> int:
        return self._at

    def seek(self, place: int) -> int:
        left = place - self._at
        if left < 0:
            raise ImageError("corrupt", _BAD_HEADER)
        while left:
            left -= len(self._some(left))
        return self._at

    def read(self, count: int) -> bytes:
        parts = []
        while count > 0:
            some = self._some(count)
            parts.append(some)
            count -= len(some)
        self.last = b"".join(parts)
        return self.last

    def drain(self) -> None:
        """Go to the end."""
        self._piece = memoryview(b"")
        for _ in self._pieces:
            pass

    def _some(self, count: int) -> memoryview:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                raise ImageError("truncated", "the archive ends too early")
            self._piece = memoryview(piece)
        some, self._piece = self._piece[:count], self._piece[count:]
        self._at += len(some)
        return some


def _unpacked(fetch: Callable[[int], bytes]) -> Iterator[bytes]:
    """The bytes of a file, decompressed where its first bytes say so; every checksum is compared.

    Raises:
        ImageError: `truncated`, `corrupt`, and those of `fetch`.
    """
    pieces = _pieces(fetch)
    data = next(pieces, b"")
    while 0 < len(data) < max(map(len, _ENGINES)) and (more := next(pieces, b"")):
        data += more  # what comes from a network can come in crumbs
    engine = next((make for magic, make in _ENGINES.items() if data.startswith(magic)), None)
    if engine:
        yield from _decompressed(engine, data, pieces)
    elif data:
        yield data
        yield from pieces


def _pieces(fetch: Callable[[int], bytes]) -> Iterator[bytes]:
    while data := fetch(_FETCH_BYTES):
        for at in range(0, len(data), _PIECE_BYTES):
            yield data[at : at + _PIECE_BYTES]


def _decompressed(make: Callable[[], Any], data: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    while data:  # one compressed stream behind the other is one archive, as for gzip and pigz
        engine = make()
        while not engine.eof:
            if not data and getattr(engine, "needs_input", True):
                data = next(pieces, b"")
                if not data:
                    raise ImageError("truncated", "the compressed archive ends too early")
            try:
                some = engine.decompress(data, _UNPACKED_BYTES)
            except (zlib.error, OSError, EOFError, lzma.LZMAError, MemoryError):
                raise ImageError("corrupt", "the compressed data of the archive are damaged") from None
            data = getattr(engine, "unconsumed_tail", b"")
            if some:
                yield some
        data = engine.unused_data
        while not data.strip(b"\0"):  # zeros fill up the last block of a tape
            data = next(pieces, b"")
            if not data:
                return
        data = data.lstrip(b"\0")
        if not any(data.startswith(magic) for magic in _ENGINES):
            return  # gzip, too, leaves aside what else stands behind
