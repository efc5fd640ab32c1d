"""Archives read in one pass, whatever is wrong with them; and how work over a table is cut."""

from __future__ import annotations

import bz2
import contextlib
import gc
import gzip
import io
import lzma
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr.data import archives, storage
from ray_cxr.data.archives import Range, Unit, in_reading_order, list_members, read, units
from ray_cxr.errors import ImageError, InputError


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A plain tar archive: of names and contents, and of headers without contents."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                tar.addfile(header(member[0], len(member[1])), io.BytesIO(member[1]))
    return out.getvalue()


def put(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def noise(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


class Everything(Container[str]):
    """Wants all and has no length."""

    def __contains__(self, name: object) -> bool:
        return True


def all_of(archive: str, wanted: Container[str] | None = None, **limits: int) -> list[tuple[str, Any]]:
    """What `read` gives: contents, or the code of an error; at the end the code of the archive's own error."""
    found: list[tuple[str, Any]] = []
    try:
        for name, content in read(archive, Everything() if wanted is None else wanted, **limits):
            assert not isinstance(content, ImageError) or "\n" not in content.message
            found.append((name, content.code if isinstance(content, ImageError) else content))
    except ImageError as error:
        found.append(("", error.code))
    return found


THREE = [("i/1.png", b"one"), ("i/2.png", noise(70_000)), ("i/3.png", b"three")]

COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "gzip in two streams": lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:]),
    "gzip on a tape": lambda data: gzip.compress(data) + bytes(9000),
    "gzip with something behind": lambda data: gzip.compress(data) + b"more",
    "bzip2 in two streams": lambda data: bz2.compress(data[:1000]) + bz2.compress(data[1000:]),
}


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("uri", [False, True])
def test_members_come_in_the_archives_order(tmp_path: Path, kind: str, uri: bool) -> None:
    put(tmp_path / "x.tar", COMPRESSED[kind](tar_of(*THREE)))  # its name does not say how it is compressed
    archive = (tmp_path / "x.tar").as_uri() if uri else str(tmp_path / "x.tar")
    assert all_of(archive) == THREE
    assert all_of(archive, {"i/3.png", "i/1.png", "none"}) == [THREE[0], THREE[2]]
    assert all_of(archive, []) == []
    assert list_members(archive) == ["i/1.png", "i/2.png", "i/3.png"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar(tmp_path: Path, form: int) -> None:
    members = [(f"{'d' * 60}/{'e' * 60}/{i}.png", noise(i * 511, i)) for i in range(1, 6)]
    if form != tarfile.USTAR_FORMAT:
        members.append(("ä" * 200 + ".png", b"long"))
    assert all_of(put(tmp_path / "x.tar", tar_of(*members, form=form))) == members


def test_tar_from_before_posix(tmp_path: Path) -> None:
    block = bytearray(tar_of(("a.png", b"old"), form=tarfile.USTAR_FORMAT))
    block[257:265] = bytes(8)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    assert all_of(put(tmp_path / "x.tar", bytes(block))) == [("a.png", b"old")]


def test_reading_ends_with_the_last_wanted_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_FETCH_BYTES", 4096)
    data = tar_of(("a.png", b"a"), ("b.png", b"b"), ("c.png", noise(500_000)))
    archive = put(tmp_path / "x.tar", data[:5000])  # what is behind is not even there
    assert all_of(archive, ["b.png", "a.png"]) == [("a.png", b"a"), ("b.png", b"b")]
    assert all_of(archive, ["c.png"]) == [("", "truncated")]


def test_a_name_that_occurs_again_is_passed_over(tmp_path: Path) -> None:
    archive = put(tmp_path / "x.tar", tar_of(("a.png", b"first"), ("b.png", b"b"), ("a.png", b"second")))
    assert all_of(archive) == [("a.png", b"first"), ("b.png", b"b")]
    assert list_members(archive) == ["a.png", "b.png"]


def test_members_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"outside")
    archive = put(
        tmp_path / "x.tar",
        tar_of(
            ("a.png", b"a"),
            header("soft.png", kind=tarfile.SYMTYPE, link=str(tmp_path / "secret.png")),
            header("hard.png", kind=tarfile.LNKTYPE, link="a.png"),
            header("folder.png", kind=tarfile.DIRTYPE),
            header("device.png", kind=tarfile.CHRTYPE),
            ("empty.png", b""),
            ("large.png", bytes(101)),
            ("../../etc/b.png", b"b"),
        ),
    )
    assert all_of(archive, max_bytes=100) == [
        ("a.png", b"a"),
        ("soft.png", "missing"),
        ("hard.png", "missing"),
        ("folder.png", "missing"),
        ("device.png", "missing"),
        ("empty.png", "empty"),
        ("large.png", "too_large"),
        ("../../etc/b.png", b"b"),
    ]
    # A folder above has a name that begins with a dot; nothing is unpacked, so that it does no harm either.
    assert list_members(archive) == ["a.png", "empty.png", "large.png"]


def test_what_is_listed(tmp_path: Path) -> None:
    dicom = bytes(128) + b"DICM" + bytes(10)
    archive = put(
        tmp_path / "x.tar",
        tar_of(
            ("./b.PNG", b"b"),
            ("a.jpeg", b"a"),
            ("._a.jpeg", b"mac"),
            (".cache/c.png", b"c"),
            ("d/IM0001", dicom),
            ("d/1.2.840.9", dicom),
            ("d/README", b"text"),
            ("d/DICOMDIR", dicom),
            ("d/t.csv", b"t"),
        ),
    )
    assert list_members(archive) == ["./b.PNG", "a.jpeg", "d/IM0001", "d/1.2.840.9"]
    left_out: Counter[str] = Counter()
    archives.scan(archive, left_out)
    assert left_out == {"": 2, ".csv": 1}


# ---------------------------------------------------------------- what can be wrong


def test_archives_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    closed = tmp_path / "closed.tar"
    closed.write_bytes(tar_of(*THREE))
    for archive, code in (
        (str(tmp_path / "none.tar"), "missing"),
        ((tmp_path / "none.tar").as_uri(), "missing"),
        (str(tmp_path), "missing"),
        (str(tmp_path / "pipe.tar"), "missing"),
        ("nothing://x/y.tar", "storage"),
        (put(tmp_path / "0.tar.gz", b""), "empty"),
        (put(tmp_path / "1.tar.gz", gzip.compress(b"")), "empty"),
        (put(tmp_path / "2.tar.gz", b"<html>" * 200), "not_an_image"),
        (put(tmp_path / "3.tar.gz", b"PK\3\4" + noise(2000)), "not_an_image"),
        (put(tmp_path / "4.tar.gz", gzip.compress(b"text")), "not_an_image"),
        (put(tmp_path / "5.tar.gz", b"x"), "not_an_image"),
        (put(tmp_path / "6.tar.gz", b"\x1f\x8b" + noise(2000)), "corrupt"),
        (put(tmp_path / "7.tar.gz", b"\x1f\x8b\x08"), "truncated"),
        (put(tmp_path / "8.tar.xz", b"\xfd7zXZ\0" + noise(2000)), "corrupt"),
    ):
        assert all_of(archive) == [("", code)], archive
        with pytest.raises(InputError) as caught:
            list_members(archive)
        assert str(caught.value).startswith(f"{archive}: cannot be read as a tar archive: ")
        assert str(caught.value).endswith(f"({code}); copy or download it again, or move it away")
    assert all_of(put(tmp_path / "9.tar", tar_of())) == []


def test_an_archive_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = put(tmp_path / "x.tar", tar_of(*THREE))

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert all_of(archive) == [("", "permission")]


@pytest.mark.parametrize("kind", ["plain", "gzip", "bzip2", "xz"])
def test_every_cut_is_noticed_and_keeps_what_came_before(tmp_path: Path, kind: str) -> None:
    whole = COMPRESSED[kind](tar_of(*[(name, data[:600]) for name, data in THREE]))
    expected = [(name, data[:600]) for name, data in THREE]
    # A plain archive may end within the zeros behind its end mark.
    end = 6 * 512 + 512 + 511 if kind == "plain" else len(whole)
    for cut in range(6, end, 7):
        found = all_of(put(tmp_path / "x.tar", whole[:cut]))
        # Fewer than the 512 bytes of a header tell nobody that they are the beginning of an archive.
        assert found[-1] in ([("", "truncated")] if cut >= 512 or kind != "plain" else [("", "not_an_image")]), cut
        assert found[:-1] == expected[: len(found) - 1]


def test_a_damaged_header_in_the_midst_is_not_the_end(tmp_path: Path) -> None:
    data = bytearray(tar_of(("a.png", b"a"), ("b.png", b"b"), ("c.png", b"c")))
    data[1024 + 5] ^= 1
    assert all_of(put(tmp_path / "x.tar", bytes(data))) == [("a.png", b"a"), ("", "corrupt")]
    with pytest.raises(InputError, match="a header inside the archive is damaged"):
        list_members(str(tmp_path / "x.tar"))
    assert all_of(str(tmp_path / "x.tar"), {"a.png"}) == [("a.png", b"a")]


def test_a_changed_bit_in_compressed_data_is_noticed_at_the_end(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(tar_of(("a.png", noise(50_000)))))
    data[25_000] ^= 1
    assert all_of(put(tmp_path / "x.tar.gz", bytes(data)))[-1] == ("", "corrupt")


@pytest.mark.parametrize("field", ["size", "GNU.sparse.size", "GNU.sparse.map", "path", "hdrcharset"])
@pytest.mark.parametrize("value", ["-5", "x", "9" * 30, "", "1,2,3"])
def test_odd_extended_headers_raise_image_errors_only(tmp_path: Path, field: str, value: str) -> None:
    info = header("a.png", 1)
    info.pax_headers = {field: value}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"a"))
        tar.addfile(header("b.png", 1), io.BytesIO(b"b"))
    for _, content in all_of(put(tmp_path / "x.tar", out.getvalue())):
        assert content in (b"a", b"b", "corrupt", "truncated", "too_large", "empty", "missing")


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["plain", "gzip", "bzip2", "xz"]),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=5),
)
def test_damage_raises_image_errors_only(
    tmp_path_factory: pytest.TempPathFactory, kind: str, flips: list[tuple[int, int]]
) -> None:
    data = bytearray(COMPRESSED[kind](tar_of(*[(name, content[:600]) for name, content in THREE])))
    for place, change in flips:
        data[place % len(data)] ^= change
    found = all_of(put(tmp_path_factory.getbasetemp() / "damaged.tar", bytes(data)), max_bytes=10_000)
    assert len(found) <= 4


BOMBS = """
import io, resource, sys, tarfile, zlib
from ray_cxr.data import archives
from ray_cxr.errors import ImageError
limit = int(sys.argv[2]) * 2**20
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
codes = []
try:
    for name, content in archives.read(sys.argv[1], {"bomb.png", "z.png"}, max_bytes=2**20):
        codes.append(content.code if isinstance(content, ImageError) else content)
except ImageError as error:
    codes.append(error.code)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < limit, "too much memory"
print(codes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize(("kind", "codes"), [(tarfile.REGTYPE, "['too_large', b'z']"), (b"L", "['corrupt']")])
def test_a_bomb_is_not_read_into_memory(tmp_path: Path, kind: bytes, codes: str) -> None:
    """A member, or a long name, of 256 MiB of zeros, which gzip makes 1 MB."""
    size = 2**28
    with gzip.open(tmp_path / "x.tar.gz", "wb", compresslevel=1) as out:
        out.write(header("bomb.png", size, kind).tobuf(tarfile.GNU_FORMAT))
        for _ in range(size // 2**22):
            out.write(bytes(2**22))
        out.write(tar_of(("z.png", b"z")))
    arguments = [sys.executable, "-c", BOMBS, str(tmp_path / "x.tar.gz"), "48"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == codes


def test_headers_are_not_kept(tmp_path: Path) -> None:
    archive = put(tmp_path / "x.tar", header("0.txt").tobuf() * 2000 + tar_of(("z.png", b"z")))
    for _ in read(archive, {"z.png"}):
        assert sum(isinstance(one, tarfile.TarInfo) for one in gc.get_objects()) < 10


def test_a_store_that_fails_in_the_midst_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = put(tmp_path / "x.tar", tar_of(*[(f"{i}.png", noise(2000, i)) for i in range(10)]))
    monkeypatch.setattr(archives, "_FETCH_BYTES", 1000)
    calls: list[int] = []

    def failing_after(*counts: int) -> None:
        calls.clear()

        @contextlib.contextmanager
        def open_stream(path: str) -> Iterator[Callable[[int], bytes]]:
            calls.append(0)
            with original(path) as fetch:

                def some(count: int) -> bytes:
                    calls[-1] += 1
                    if len(calls) <= len(counts) and calls[-1] > counts[len(calls) - 1]:
                        raise ImageError("storage", "the connection broke")
                    return fetch(count)

                yield some

        monkeypatch.setattr(storage, "open_stream", open_stream)

    original = storage.open_stream
    failing_after(8, 15)
    found = all_of(archive)
    assert [name for name, _ in found] == [f"{i}.png" for i in range(10)]
    assert len(calls) == 3
    failing_after(8, 15, 20)
    assert all_of(archive)[-1] == ("", "storage")
    failing_after(8, 8)  # no further than before
    assert all_of(archive)[-1] == ("", "storage")
    assert len(calls) == 2
    failing_after(0)  # down from the start
    assert all_of(archive) == [("", "storage")]
    assert len(calls) == 1


# ---------------------------------------------------------------- how work is cut


def table_of(paths: list[str | None], chunk: int = 3) -> pa.Table:
    chunks = [pa.array(paths[at : at + chunk], pa.string()) for at in range(0, len(paths), chunk)]
    return pa.table({"row": range(len(paths)), "path": pa.chunked_array(chunks, pa.string())})


def test_in_reading_order_moves_each_archives_rows_together() -> None:
    table = table_of(["a.tar::1", "x.png", "s3://b/c.tgz?q=1::2", None, "a.tar::0", "a.png", "s3://b/c.tgz?q=1::1"])
    assert in_reading_order(table)["row"].to_pylist() == [1, 3, 5, 0, 4, 2, 6]


def test_a_table_in_reading_order_comes_back_as_it_is() -> None:
    for paths in (["b.png", None, "a.png", "z.tar::1", "z.tar::0", "a.tar::1"], ["b.png", "a::b"], []):
        table = table_of(paths)
        assert in_reading_order(table) is table


def test_units_by_hand() -> None:
    paths = ["1.png", "2.png", "3.png", "a.tar::1", "a.tar::2", "a.tar::3", "b.tar::1"]
    assert units(table_of(paths)["path"], 2) == [
        Unit(None, (Range(0, 0, 2),)),
        Unit(None, (Range(1, 2, 1),)),
        Unit("a.tar", (Range(2, 3, 2), Range(3, 5, 1))),
        Unit("b.tar", (Range(4, 6, 1),)),
    ]
    assert units(pa.chunked_array([], pa.string()), 2) == []


PLACES = st.sampled_from([None, "1.png", "s3://b/2.png", "a.tar::", "b.tar.gz::", "s3://b/a.tar?x=1::"])


@given(st.lists(st.tuples(PLACES, st.integers(0, 3)), max_size=40), st.integers(1, 9), st.integers(1, 7))
def test_units_cover_every_row_once_and_straddle_nothing(
    rows: list[tuple[str | None, int]], rows_per_file: int, chunk: int
) -> None:
    table = in_reading_order(table_of([place and f"{place}{i}" for place, i in rows], chunk))
    assert sorted(table["row"].to_pylist()) == list(range(len(rows)))
    paths = table["path"].to_pylist()
    found = units(table["path"], rows_per_file)
    ranges = [one for unit in found for one in unit.ranges]
    assert [one.index for one in ranges] == list(range(len(ranges)))
    assert [row for one in ranges for row in range(one.start, one.start + one.rows)] == list(range(len(rows)))
    for unit in found:
        assert unit.rows == sum(one.rows for one in unit.ranges)
        assert unit.archive is not None or len(unit.ranges) == 1
        for one in unit.ranges:
            inside = [storage.split_member(path) for path in paths[one.start : one.start + one.rows]]
            assert {parts and parts[0] for parts in inside} == {unit.archive}
            assert 1 <= one.rows <= rows_per_file
    named = [unit.archive for unit in found if unit.archive]
    assert len(named) == len(set(named)), "one unit an archive"


def test_without_archives_rows_are_cut_as_they_ever_were() -> None:
    table = table_of([f"{i}.png" for i in range(1000)], 100)
    assert [(unit.archive, unit.ranges[0].start, unit.rows) for unit in units(table["path"], 256)] == [
        (None, 0, 256),
        (None, 256, 256),
        (None, 512, 256),
        (None, 768, 232),
    ]
