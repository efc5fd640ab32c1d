"""Reading archives, intact and damaged, in one pass; and partitioning a table into tasks."""

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
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr.data.partition import Range, Unit, group_by_archive, plan_units
from ray_cxr.errors import ImageError, InputError
from ray_cxr.storage import archives, stores
from ray_cxr.storage.archives import read_members, scan_archive
from ray_cxr.storage.paths import split_member


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def tar_of(*members: tuple[str | tarfile.TarInfo, bytes] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A plain tar archive of members (name or header, and contents), and of headers without contents."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for member in members:
            info, data = member if isinstance(member, tuple) else (member, b"")
            tar.addfile(header(info, len(data)) if isinstance(info, str) else info, io.BytesIO(data))
    return out.getvalue()


def put(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def noise(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


class Everything(Container[str]):
    """Contains every name and has no length."""

    def __contains__(self, name: object) -> bool:
        return True


def contents(archive: str, wanted: Container[str] | None = None, **limits: int) -> list[tuple[str, Any]]:
    """Name and data, or error code, of each member that `read` yields; the last item is the archive's own error."""
    found: list[tuple[str, Any]] = []
    try:
        for name, content in read_members(archive, Everything() if wanted is None else wanted, **limits):
            assert not isinstance(content, ImageError) or "\n" not in content.message
            found.append((name, content.code if isinstance(content, ImageError) else content))
    except ImageError as error:
        found.append(("", error.code))
    return found


THREE = [("i/1.png", b"one"), ("i/2.png", noise(70_000)), ("i/3.png", b"three")]
SMALL = [(name, data[:600]) for name, data in THREE]

COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "gzip in two streams": lambda data: gzip.compress(data[:1000]) + gzip.compress(data[1000:]),
    "gzip with zeros after it": lambda data: gzip.compress(data) + bytes(9000),
    "gzip with text after it": lambda data: gzip.compress(data) + b"more",
    "bzip2 in two streams": lambda data: bz2.compress(data[:1000]) + bz2.compress(data[1000:]),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_members_come_in_the_order_of_the_archive(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.tar"  # the name does not say how it is compressed
    path.write_bytes(COMPRESSED[kind](tar_of(*THREE)))
    for archive in (str(path), path.as_uri()):
        assert contents(archive) == THREE
        assert contents(archive, {"i/3.png", "i/1.png", "none"}) == [THREE[0], THREE[2]]
        assert contents(archive, []) == []
        assert scan_archive(archive, Counter()) == ["i/1.png", "i/2.png", "i/3.png"]


def test_every_form_of_tar(tmp_path: Path) -> None:
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [(f"{'d' * 60}/{'e' * 60}/{i}.png", noise(i * 511, i)) for i in range(1, 6)]
        if form != tarfile.USTAR_FORMAT:
            members.append(("ä" * 200 + ".png", b"long"))
        assert contents(put(tmp_path / "x.tar", tar_of(*members, form=form))) == members
    block = bytearray(tar_of(("a.png", b"old"), form=tarfile.USTAR_FORMAT))  # as before POSIX
    block[257:265] = bytes(8)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    assert contents(put(tmp_path / "x.tar", bytes(block))) == [("a.png", b"old")]


def test_reading_ends_with_the_last_wanted_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first of two equal names counts.
    archive = put(tmp_path / "x.tar", tar_of(("a.png", b"first"), ("b.png", b"b"), ("a.png", b"second")))
    assert contents(archive) == [("a.png", b"first"), ("b.png", b"b")]
    assert scan_archive(archive, Counter()) == ["a.png", "b.png"]
    monkeypatch.setattr(archives, "_FETCH_BYTES", 4096)
    data = tar_of(("a.png", b"a"), ("b.png", b"b"), ("c.png", noise(500_000)))
    archive = put(tmp_path / "x.tar", data[:5000])  # the rest is missing
    assert contents(archive, ["b.png", "a.png"]) == [("a.png", b"a"), ("b.png", b"b")]
    assert contents(archive, ["c.png"]) == [("", "truncated")]


def test_members_that_are_no_files_have_codes(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"outside")
    expected = {
        header("soft.png", kind=tarfile.SYMTYPE, link=str(tmp_path / "secret.png")): "missing",
        header("hard.png", kind=tarfile.LNKTYPE, link="a.png"): "missing",
        header("folder.png", kind=tarfile.DIRTYPE): "missing",
        header("device.png", kind=tarfile.CHRTYPE): "missing",
        header("empty.png"): "empty",
    }
    files = (("large.png", bytes(101)), ("most.png", bytes(100)), ("../../etc/b.png", b"b"))
    archive = put(tmp_path / "x.tar", tar_of(("a.png", b"a"), *expected, *files))
    assert contents(archive, max_bytes=100) == [
        ("a.png", b"a"),
        *((info.name, code) for info, code in expected.items()),
        ("large.png", "too_large"),
        *files[1:],
    ]
    # The name of a parent folder starts with a dot; as nothing is unpacked, reading it is safe, too.
    assert scan_archive(archive, Counter()) == ["a.png", "empty.png", "large.png", "most.png"]


def test_images_are_listed_and_other_files_counted(tmp_path: Path) -> None:
    dicom = bytes(128) + b"DICM" + bytes(10)
    files = {
        "./b.PNG": b"b",
        "a.jpeg": b"a",
        "d/IM0001": dicom,
        "d/1.2.840.9": dicom,
        "._a.jpeg": b"mac",
        ".cache/c.png": b"c",
        "d/README": b"text",
        "d/DICOMDIR": dicom,
        "d/t.csv": b"t",
    }
    left_out: Counter[str] = Counter()
    archive = put(tmp_path / "x.tar", tar_of(*files.items()))
    assert scan_archive(archive, left_out) == ["./b.PNG", "a.jpeg", "d/IM0001", "d/1.2.840.9"]
    assert left_out == {"": 2, ".csv": 1}


def test_files_that_are_no_archives_have_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
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
        (put(tmp_path / "6.tar.gz", b"\x1f\x8b" + noise(2000)), "corrupt"),
        (put(tmp_path / "7.tar.gz", b"\x1f\x8b\x08"), "truncated"),
        (put(tmp_path / "8.tar.xz", b"\xfd7zXZ\0" + noise(2000)), "corrupt"),
    ):
        assert contents(archive) == [("", code)], archive
        with pytest.raises(InputError) as caught:
            scan_archive(archive, Counter())
        assert str(caught.value).startswith(f"{archive}: ")
        assert f"({code})" in str(caught.value)
        assert "\n" not in str(caught.value)
    archive = put(tmp_path / "9.tar", tar_of())
    assert contents(archive) == []

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert contents(archive) == [("", "permission")]


@pytest.mark.parametrize("kind", ["plain", "gzip", "bzip2", "xz"])
def test_every_cut_is_found_and_keeps_the_members_before_it(tmp_path: Path, kind: str) -> None:
    whole = COMPRESSED[kind](tar_of(*SMALL))
    # A plain archive may end within the zeros after its end mark.
    end = 6 * 512 + 512 + 511 if kind == "plain" else len(whole)
    for cut in {*range(6, end, 37), 511, 512, end - 1}:
        found = contents(put(tmp_path / "x.tar", whole[:cut]))
        # Fewer bytes than the 512 of a header do not show that the file is an archive.
        assert found[-1] == ("", "truncated" if cut >= 512 or kind != "plain" else "not_an_image"), cut
        assert found[:-1] == SMALL[: len(found) - 1]


def test_a_changed_bit_is_corrupt(tmp_path: Path) -> None:
    data = bytearray(tar_of(("a.png", b"a"), ("b.png", b"b"), ("c.png", b"c")))
    data[1024 + 5] ^= 1  # in a header, which is not the end of the archive
    archive = put(tmp_path / "x.tar", bytes(data))
    assert contents(archive) == [("a.png", b"a"), ("", "corrupt")]
    assert contents(archive, {"a.png"}) == [("a.png", b"a")]
    data = bytearray(gzip.compress(tar_of(("a.png", noise(50_000)))))
    data[25_000] ^= 1  # in compressed data, which is found at the end
    assert contents(put(tmp_path / "x.tar.gz", bytes(data)))[-1] == ("", "corrupt")


@pytest.mark.parametrize("field", ["size", "GNU.sparse.size", "GNU.sparse.map", "path", "hdrcharset"])
def test_odd_extended_headers_raise_image_errors_only(tmp_path: Path, field: str) -> None:
    for value in ("-5", "x", "9" * 30, "", "1,2,3"):
        odd = header("a.png", 1)
        odd.pax_headers = {field: value}
        archive = put(tmp_path / "x.tar", tar_of((odd, b"a"), ("b.png", b"b")))
        found = {content for _, content in contents(archive)}
        assert found <= {b"a", b"b", "corrupt", "truncated", "too_large", "empty", "missing"}, value


@settings(max_examples=60, derandomize=True)
@given(
    kind=st.sampled_from(["plain", "gzip", "bzip2", "xz"]),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=5),
)
def test_damage_raises_image_errors_only(tmp_path_factory, kind: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray(COMPRESSED[kind](tar_of(*SMALL)))
    for place, change in flips:
        data[place % len(data)] ^= change
    assert len(contents(put(tmp_path_factory.getbasetemp() / "damaged.tar", bytes(data)), max_bytes=10_000)) <= 4


BOMBS = """
import re, sys
from ray_cxr.storage.archives import read_members
from ray_cxr.errors import ImageError

def peak():  # of this process alone, KiB
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])

before = peak()
for archive in sys.argv[1:]:
    codes = []
    try:
        for name, content in read_members(archive, {"bomb.png", "z.png"}, max_bytes=2**20):
            codes.append(content.code if isinstance(content, ImageError) else content)
    except ImageError as error:
        codes.append(error.code)
    print(codes)
assert peak() - before < 48 * 1024, "too much memory"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc exists on Linux only")
def test_bombs_are_not_read_into_memory(tmp_path: Path) -> None:
    """A member and a long name of 128 MiB of zeros, which gzip packs into 0.6 MB."""
    size = 2**27
    for name, kind in (("member.tar.gz", tarfile.REGTYPE), ("name.tar.gz", tarfile.GNUTYPE_LONGNAME)):
        packer = zlib.compressobj(1, wbits=zlib.MAX_WBITS | 16)
        parts = [packer.compress(header("bomb.png", size, kind).tobuf(tarfile.GNU_FORMAT))]
        parts += [packer.compress(bytes(2**22)) for _ in range(size // 2**22)]
        parts += [packer.compress(tar_of(("z.png", b"z"))), packer.flush()]
        put(tmp_path / name, b"".join(parts))
    arguments = [sys.executable, "-c", BOMBS, str(tmp_path / "member.tar.gz"), str(tmp_path / "name.tar.gz")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['too_large', b'z']", "['corrupt']"]


def test_headers_are_not_kept(tmp_path: Path) -> None:
    archive = put(tmp_path / "x.tar", header("0.txt").tobuf() * 500 + tar_of(("z.png", b"z")))
    for _ in read_members(archive, {"z.png"}):
        assert sum(isinstance(one, tarfile.TarInfo) for one in gc.get_objects()) < 10


@pytest.mark.parametrize(
    ("failures", "passes", "complete"),
    [
        ((8, 15), 3, True),
        ((8, 15, 20), 3, False),  # at most two retries
        ((8, 8), 2, False),  # no progress
        ((0,), 1, False),  # down from the start
    ],
)
def test_store_that_fails_is_read_again(tmp_path: Path, monkeypatch, failures, passes: int, complete: bool) -> None:
    members = [(f"{i}.png", noise(2000, i)) for i in range(10)]
    archive = put(tmp_path / "x.tar", tar_of(*members))
    original, calls = stores.open_stream, []

    @contextlib.contextmanager
    def open_stream(path: str) -> Iterator[Callable[[int], bytes]]:
        calls.append(0)
        with original(path) as fetch:

            def some(count: int) -> bytes:
                calls[-1] += 1
                if len(calls) <= len(failures) and calls[-1] > failures[len(calls) - 1]:
                    raise ImageError("storage", "the connection broke")
                return fetch(count)

            yield some

    monkeypatch.setattr(archives, "_FETCH_BYTES", 1000)
    monkeypatch.setattr(archives, "open_stream", open_stream)
    found = contents(archive)
    assert len(calls) == passes
    if complete:
        assert found == members
    else:
        assert found[-1] == ("", "storage")
        assert found[:-1] == members[: len(found) - 1]


def table_of(paths: list[str | None], chunk: int = 3) -> pa.Table:
    chunks = [pa.array(paths[at : at + chunk], pa.string()) for at in range(0, len(paths), chunk)]
    return pa.table({"row": range(len(paths)), "path": pa.chunked_array(chunks, pa.string())})


def test_reading_order_moves_the_rows_of_each_archive_together() -> None:
    table = table_of(["a.tar::1", "x.png", "s3://b/c.tgz?q=1::2", None, "a.tar::0", "a.png", "s3://b/c.tgz?q=1::1"])
    assert group_by_archive(table)["row"].to_pylist() == [1, 3, 5, 0, 4, 2, 6]
    for paths in (["b.png", None, "a.png", "z.tar::1", "z.tar::0", "a.tar::1"], ["b.png", "a::b"], []):
        table = table_of(paths)
        assert group_by_archive(table) is table


def test_units_by_hand() -> None:
    paths = ["1.png", "2.png", "3.png", "a.tar::1", "a.tar::2", "a.tar::3", "b.tar::1"]
    assert plan_units(table_of(paths)["path"], 2) == [
        Unit(None, (Range(0, 0, 2),)),
        Unit(None, (Range(1, 2, 1),)),
        Unit("a.tar", (Range(2, 3, 2), Range(3, 5, 1))),
        Unit("b.tar", (Range(4, 6, 1),)),
    ]
    # Single files of a chunk with archives and of a chunk without share a range.
    mixed = pa.chunked_array([["a.tar::1", "1.png"], ["2.png", None]])
    assert plan_units(mixed, 3) == [Unit("a.tar", (Range(0, 0, 1),)), Unit(None, (Range(1, 1, 3),))]
    assert plan_units(pa.chunked_array([], pa.string()), 2) == []


PLACES = st.sampled_from([None, "1.png", "s3://b/2.png", "a.tar::", "b.tar.gz::", "s3://b/a.tar?x=1::"])


@settings(max_examples=50, derandomize=True)
@given(st.lists(st.tuples(PLACES, st.integers(0, 3)), max_size=40), st.integers(1, 9), st.integers(1, 7))
def test_units_cover_every_row_once_and_no_range_straddles_archives(rows, rows_per_file: int, chunk: int) -> None:
    table = group_by_archive(table_of([place and f"{place}{i}" for place, i in rows], chunk))
    assert sorted(table["row"].to_pylist()) == list(range(len(rows)))
    paths = table["path"].to_pylist()
    found = plan_units(table["path"], rows_per_file)
    ranges = [range_ for unit in found for range_ in unit.ranges]
    assert [range_.index for range_ in ranges] == list(range(len(ranges)))
    covered = [row for range_ in ranges for row in range(range_.start, range_.start + range_.rows)]
    assert covered == list(range(len(rows)))
    for unit in found:
        assert unit.rows == sum(range_.rows for range_ in unit.ranges)
        assert unit.archive is not None or len(unit.ranges) == 1
        for range_ in unit.ranges:
            inside = [split_member(path) for path in paths[range_.start : range_.start + range_.rows]]
            assert {parts and parts[0] for parts in inside} == {unit.archive}
            assert 1 <= range_.rows <= rows_per_file
    named = [unit.archive for unit in found if unit.archive]
    assert len(named) == len(set(named)), "one unit per archive"
