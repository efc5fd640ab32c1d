"""Bytes and listings of local folders, archives, URIs, and an S3 store that runs on this machine."""

from __future__ import annotations

import contextlib
import gzip
import os
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_archives import tar_of
from test_run_folder import ODD

from ray_cxr.data.manifest import describe_listing
from ray_cxr.errors import ImageError, InputError
from ray_cxr.storage import paths, remote, stores
from ray_cxr.storage.files import Listing, find_images, read_bytes
from ray_cxr.storage.paths import MEMBER_PATTERN, file_name, file_names, split_member

DICOM = bytes(128) + b"DICM" + bytes(100)


def tar_bytes(members: dict[str, bytes]) -> bytes:
    return gzip.compress(tar_of(*members.items()))


def write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def reading_code(path: Any, **limits: int) -> str:
    """The code of the error that reading raises; its message is one line and holds no path."""
    with pytest.raises(ImageError) as caught:
        read_bytes(path, **limits)
    assert "\n" not in caught.value.message
    assert str(path) == "" or str(path) not in caught.value.message
    return caught.value.code


def listing_error(location: str) -> str:
    with pytest.raises(InputError) as caught:
        find_images(location)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(found: Listing) -> list[str]:
    assert all(path.startswith(found.root) for path in found.paths.to_pylist())
    return [path.removeprefix(found.root) for path in found.paths.to_pylist()]


@pytest.fixture(params=[str, Path.as_uri], ids=["path", "uri"])
def address(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_read_bytes(tmp_path: Path, address: Any) -> None:
    write_files(tmp_path, {"ä b%20c.png": b"12345", "empty.png": b""})
    file = address(tmp_path / "ä b%20c.png")
    assert read_bytes(file) == read_bytes(file, max_bytes=5) == b"12345"
    assert reading_code(file, max_bytes=4) == "too_large"
    for name, code in (("empty.png", "empty"), ("none.png", "missing"), ("", "missing")):
        assert reading_code(address(tmp_path / name)) == code


def test_errors_of_paths_disks_and_stores_have_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "pipe")
    below, pipe, link = (str(tmp_path / name) for name in ("file/below", "pipe", "link.png"))
    assert find_images(str(tmp_path)).paths.to_pylist() == [link]
    for path in (below, pipe, link, "/dev/zero", "a\0b", "", None, float("nan")):
        assert reading_code(path) == "missing"
    (tmp_path / "a.png").write_bytes(b"1")
    for error, code in ((PermissionError(13, "Permission denied"), "permission"), (OSError(5, "Input"), "storage")):
        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", Mock(side_effect=error))
            assert reading_code(str(tmp_path / "a.png")) == code
    assert reading_code("nothing://a/b.png") == "storage"
    for uri in ("ht!tp://x", "file://%%%/"):
        assert reading_code(uri) in ("storage", "missing")
    assert listing_error("nothing://bucket/folder").startswith("nothing://bucket/folder: cannot be listed")


TREE = ["a.png", "b.PNG", "sub/c.JPeG", "sub/d e.jpg", "sub/x.dcm", "sub/y%41.dicom"]


def test_listing_of_a_folder(tmp_path: Path, address: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = (".hidden.png", "sub/._c.jpeg", ".cache/e.png", "notes.txt", "raw")
    write_files(tmp_path, {name: name.encode() for name in (*TREE, *hidden)})
    (tmp_path / "sub" / "folder.png").mkdir()
    for location in (address(tmp_path), f"{address(tmp_path)}/"):
        found = find_images(location)
        assert found.root == f"{address(tmp_path)}/"
        assert [read_bytes(path).decode() for path in found.paths.to_pylist()] == TREE
        assert found.left_out == {".txt": 1, "": 1}
    monkeypatch.chdir(tmp_path)
    assert find_images("sub").paths.to_pylist() == TREE[2:]


def test_link_loops_are_listed_once(tmp_path: Path) -> None:
    write_files(tmp_path, {"real/a.png": b"1", "root/notes.txt": b""})
    (tmp_path / "root" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(tmp_path / "root")
    assert find_images(str(tmp_path / "root")).paths.to_pylist() == [str(tmp_path / "root" / "link" / "a.png")]


def test_locations_without_images_are_refused(tmp_path: Path, address: Any) -> None:
    (tmp_path / "empty").mkdir()
    write_files(tmp_path / "bad", {"a.png": b"x", "b.tar.gz": b"<html>"})
    assert listing_error(address(tmp_path / "bad")).startswith(address(tmp_path / "bad" / "b.tar.gz") + ": ")
    write_files(tmp_path, {"a.png": b"1", "none.tgz": tar_bytes({"b.txt": b"b"})})
    write_files(tmp_path / "other", {"a.tif": b"x", "b.tif": b"x", "c": b"x"})
    for name, part in {
        "none": "no such folder",
        "a.png": "is a file",
        "empty": "no images found; searched it and all folders and archives below for .png",
        "none.tgz": "no images found (left out: 1 .txt)",
        "other": "no images found (left out: 2 .tif, 1 without suffix)",
    }.items():
        assert listing_error(address(tmp_path / name)).startswith(f"{address(tmp_path / name)}: {part}")
    counts = {".txt": 1200, "": 3, ".a": 2, ".b": 2, ".c": 1, ".d": 1, ".e": 1}
    assert paths.format_suffixes(counts) == "1,200 .txt, 3 without suffix, 2 .a, 2 .b, 1 .c, 2 others"


NAMES = st.text(st.sampled_from("ab-.0~"), min_size=1, max_size=3).filter(lambda name: not name.startswith("."))


@settings(max_examples=40)
@given(st.sets(st.lists(NAMES, min_size=1, max_size=3).map("/".join), min_size=1, max_size=12))
def test_listing_is_in_the_order_of_whole_paths(tmp_path_factory: pytest.TempPathFactory, chosen: set[str]) -> None:
    root = tmp_path_factory.mktemp("walk")
    write_files(root, {f"{name}.png": b"x" for name in chosen})
    assert find_images(str(root)).paths.to_pylist() == sorted(f"{root}/{name}.png" for name in chosen)


def test_dicom_files_without_suffix_are_found_by_their_first_bytes(tmp_path: Path, address: Any) -> None:
    images = {"IM0001": DICOM, "PAT/ST/CT.1.2.840.113619.2.5": DICOM, "x.dcm": b"whatever"}
    others = {"PAT/1.2.840.3": DICOM[:131], "PAT/README": b"DICM", "DICOMDIR": DICOM, "sub/dicomdir": DICOM}
    write_files(tmp_path, {**images, **others, "scan.dcm.bak": DICOM, "notes.TXT": b""})
    os.mkfifo(tmp_path / "PIPE")
    found = find_images(address(tmp_path))
    assert names(found) == sorted(images)
    pipe = 1 if address is str else 0  # Arrow lists files and folders only
    assert found.left_out == {"": len(others) + pipe, ".bak": 1, ".txt": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux only")
def test_names_that_are_not_utf8_are_counted(tmp_path: Path) -> None:
    for name in (b"a.png", b"gr\xf6\xdfe.png"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"x")
    with tarfile.open(tmp_path / "b.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        for name in ("ö.png", "o.png"):
            tar.addfile(tarfile.TarInfo(name))
    found = find_images(str(tmp_path))
    assert names(found) == ["a.png", "b.tar::o.png"]
    assert found.left_out == {"not named in UTF-8": 2}


MEMBERS = [
    ("/d/images_001.tar.gz::images/00000001_000.png", ("/d/images_001.tar.gz", "images/00000001_000.png")),
    ("a.TAR::x", ("a.TAR", "x")),
    ("a.tgz::b.tgz::c", ("a.tgz", "b.tgz::c")),
    ("s3://b/a.tar.bz2?region=x&scheme=http::m/n.png", ("s3://b/a.tar.bz2?region=x&scheme=http", "m/n.png")),
    *((path, None) for path in ("a.tar?x::m", "a.tar::", "a.zip::m", "a.tar.gz", "::m", "a.png", "", None)),
]
PIECES = st.sampled_from([".tar", ".tar.gz", ".TGZ", "::", ":", "?", "s3://", "a", "/", ".", "\n", "é", ".png"])


@given(st.lists(PIECES, max_size=9).map("".join))
def test_python_and_arrow_split_members_alike(path: str) -> None:
    assert [split_member(path) for path, _ in MEMBERS] == [parts for _, parts in MEMBERS]
    found = pc.extract_regex(pa.array([path]), MEMBER_PATTERN)[0].as_py()
    assert (found and (found["archive"], found["member"])) == split_member(path)


def test_names_in_paths_and_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert paths.make_absolute("x/../a.tar::./i/b.png") == f"{tmp_path}/a.tar::./i/b.png"
    assert paths.make_absolute("s3://b/a.tar?x=1::i") == "s3://b/a.tar?x=1::i"
    assert paths.plain_path("s3://b/a%20b.tar?x=1/2::i/%20?.png") == "s3://b/a b.tar::i/%20?.png"
    given = ["/a/b.png", "s3://b/c%20d.png?x=a/b", "/a/b.tar::c.png", "/a/b.tar::d/c.png", "/a/x::y.png", None]
    expected = ["b.png", "c d.png", "c.png", "c.png", "x::y.png", None]
    assert [path and file_name(path) for path in given] == expected
    assert file_names(pa.chunked_array([given[:2], given[2:]])).to_pylist() == expected
    # An address in a message holds no key and no options.
    assert paths.redact("s3://KEY:SECRET@bucket/a?x=SECRET") == "s3://bucket/a"
    assert paths.redact("/a/b@c?d") == "/a/b@c?d"


def test_archives_are_read_and_listed_in_their_place(tmp_path: Path, address: Any) -> None:
    root = tmp_path / "a set"
    first = tar_bytes({"images/2.png": b"22", "images/1 %.png": b"1", "note.txt": b"n", "images/0.png": b""})
    files = {name: name.encode() for name in ("a.png", "images_001.tar.gz.md5", "z.png")}
    write_files(root, {**files, "images_001.tar.gz": first, "sub/images_002.tar": tar_of(("3.png", b"3"))})
    found = find_images(address(root))
    members = [f"images_001.tar.gz::images/{name}.png" for name in ("2", "1 %", "0")]
    assert names(found) == ["a.png", *members, "sub/images_002.tar::3.png", "z.png"]
    assert found.left_out == {".txt": 1, ".md5": 1}
    contents = [read_bytes(path) for path in found.paths.to_pylist() if not path.endswith("/0.png")]
    assert contents == [b"a.png", b"22", b"1", b"3", b"z.png"]

    archive = address(root / "images_001.tar.gz")
    assert find_images(archive).paths.to_pylist() == [f"{archive}::images/{name}.png" for name in ("2", "1 %", "0")]
    assert [reading_code(f"{archive}::images/{number}.png") for number in (9, 0)] == ["missing", "empty"]
    assert reading_code(f"{archive}::images/2.png", max_bytes=1) == "too_large"
    assert reading_code(f"{address(root / 'none.tar')}::images/1.png") == "missing"


@pytest.mark.parametrize("place", ["images", "images_001/images"])
def test_members_that_are_also_unpacked_are_listed_once(tmp_path: Path, place: str, address: Any) -> None:
    write_files(tmp_path, {"images_001.tar.gz": tar_bytes({f"images/{i} .png": b"x" for i in range(3)})})
    write_files(tmp_path, {f"{place}/{i} .png": b"x" for i in range(2)})
    found = find_images(address(tmp_path))
    assert found.unpacked == 2
    assert sorted(map(file_name, found.paths.to_pylist())) == ["0 .png", "1 .png", "2 .png"]
    assert sum("::" in path for path in found.paths.to_pylist()) == 1


def test_an_unpacked_member_in_another_unicode_form_is_listed_once(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.tar": tar_of(("s/Ren\u00e9.png", b"x"), ("s/b.png", b"x")), "s/Rene\u0301.png": b"x"})
    found = find_images(str(tmp_path))
    assert (found.unpacked, names(found)) == (1, ["a.tar::s/b.png", "s/Rene\u0301.png"])


@pytest.mark.parametrize("odd", ODD)
def test_folders_and_files_of_any_name_are_listed_and_read(tmp_path: Path, odd: str, address: Any) -> None:
    write_files(tmp_path, {f"d{odd}e/f{odd}g.png": b"1", f"d{odd}e/x.tar": tar_of((f"m{odd}.png", b"2"))})
    found = find_images(address(tmp_path / f"d{odd}e"))
    assert [read_bytes(path) for path in found.paths.to_pylist()] == [b"1", b"2"]
    assert file_names(found.paths).to_pylist() == [f"f{odd}g.png", f"m{odd}.png"]
    assert names(find_images(str(tmp_path))) == [f"d{odd}e/f{odd}g.png", f"d{odd}e/x.tar::m{odd}.png"]


def test_a_folder_named_as_an_archive_is_a_folder(tmp_path: Path) -> None:
    write_files(tmp_path, {"x.tar/a.png": b"1", "x.tar/y.tgz/b.png": b"2"})
    found = find_images(str(tmp_path / "x.tar"))
    assert [read_bytes(path) for path in found.paths.to_pylist()] == [b"1", b"2"]


def test_a_local_name_that_reads_as_a_member_is_refused_by_name(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.png": b"1", "sub/x.tar::b.png": b"2"})
    assert listing_error(str(tmp_path)).startswith(f"{tmp_path}/sub/x.tar::b.png: reads as a member of an archive; ")
    found = find_images(tmp_path.as_uri())  # its escapes tell it from a member
    assert [read_bytes(path) for path in found.paths.to_pylist()] == [b"1", b"2"]
    assert file_names(found.paths).to_pylist() == ["a.png", "x.tar::b.png"]
    with pytest.raises(ImageError, match="missing: no such archive"):
        read_bytes(str(tmp_path / "sub" / "x.tar::b.png"))


#: Names of files, and how they are counted.
OTHERS = {
    "1.IMA": ".ima", "2.ima": ".ima", "3.dic": ".dic", "4.dcm.gz": ".dcm.gz", "5.PNG.zip": ".png.zip",
    "6.txt.gz": ".gz", "7.ima.bz2": ".ima.bz2", "1.2.840.5.gz": ".gz",
    **{f"{i}.{kind}": f".{kind}" for kind in ("txt", "csv", "xml", "md", "doc") for i in range(9)},
}  # fmt: skip


def test_files_that_may_be_images_are_named_with_the_remedy(tmp_path: Path, address: Any) -> None:
    assert {name: paths.get_suffix(name) for name in OTHERS} == OTHERS
    write_files(tmp_path / "only", dict.fromkeys(OTHERS, DICOM))
    error = listing_error(address(tmp_path / "only"))
    counts = "9 .txt, 9 .csv, 9 .xml, 9 .md, 9 .doc, 2 .ima, 1 .dic, 1 .dcm.gz, 1 .png.zip, 1 .ima.bz2, 2 others"
    assert sorted(error.partition("left out: ")[2].partition(";")[0].split(", ")) == sorted(counts.split(", "))
    unpack, rename = (
        "files with .dcm.gz, .ima.bz2, .png.zip may be images: to include them, unpack them",
        "files with .dic, .ima may be images: to include them, rename them to .dcm, or add links with that suffix",
    )
    assert f"; {unpack}" in error
    assert f"; {rename}" in error
    write_files(tmp_path / "only", {"a.png": b"x"})
    assert set(describe_listing(find_images(address(tmp_path / "only")).left_out, 0)[1:]) == {rename, unpack}
    assert describe_listing({".txt": 1, ".gz": 2}, 0) == ["files left out because they are not images: 2 .gz, 1 .txt"]


def test_folders_of_thumbnails_are_skipped_and_counted(tmp_path: Path, address: Any) -> None:
    skipped = ("@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "s/@eaDir/b.png", "s/@eaDir/c/d.txt", "__MACOSX/s/._a.png")
    more = (".thumbnails/a.png", "#recycle/old.png", "$RECYCLE.BIN/x.png", ".@__thumb/default.jpg")
    files = dict.fromkeys(("a.png", "s/eaDir/b.png", "s/@eaDir.png", *skipped, *more), b"x")
    left_out = {"folders named @eaDir": 2} | {
        f"folders named {name}": 1 for name in ("__MACOSX", ".thumbnails", "#recycle", "$RECYCLE.BIN", ".@__thumb")
    }
    write_files(tmp_path / "set", files)
    (tmp_path / "x.tar").write_bytes(tar_of(*files.items()))
    for location in (address(tmp_path / "set"), address(tmp_path / "x.tar")):
        found = find_images(location)
        assert sorted(names(found)) == ["a.png", "s/@eaDir.png", "s/eaDir/b.png"]
        assert found.left_out == left_out
    assert describe_listing({"folders named @eaDir": 2, ".txt": 1}, 0) == [
        "files left out because they are not images: 2 folders named @eaDir, 1 .txt"
    ]
    # A folder that the user names is listed.
    assert names(find_images(address(tmp_path / "set" / "s" / "@eaDir"))) == ["b.png"]


@contextlib.contextmanager
def no_access(endpoint: str) -> Iterator[None]:
    """The S3 server at `endpoint` refuses every request."""

    def allow(count: int) -> None:
        body, headers = str(count).encode(), {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset-auth", body, headers)).close()

    allow(0)
    try:
        yield
    finally:
        allow(10**9)


@pytest.fixture(scope="module")
def s3(bucket: Any) -> str:
    """Options of the addresses of the S3 bucket `images`."""
    bucket.client.create_bucket(Bucket="images")
    members = {f"images/{i}.png": os.urandom(200_000) for i in range(3)}
    files = {"a b.png": b"a b", "sub/c.png": b"c", "sub/IM1": DICOM, "sub/LICENSE": b"text", "sub/n.txt": b"n"}
    files |= {".hidden/x.png": b"x", "images_001.tar.gz": tar_bytes(members), "empty.png": b""}
    for name, data in files.items():
        bucket.client.put_object(Bucket="images", Key=f"set/{name}", Body=data)
    return bucket.options


def test_bucket_is_listed_and_read(s3: str, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_images(f"s3://images/set{s3}")
    members = [f"images_001.tar.gz{s3}::images/{i}.png" for i in range(3)]
    inner = [f"a%20b.png{s3}", f"empty.png{s3}", *members, f"sub/IM1{s3}", f"sub/c.png{s3}"]
    assert found.paths.to_pylist() == [f"s3://images/set/{name}" for name in inner]
    assert found.left_out == {"": 1, ".txt": 1}
    contents = [read_bytes(path) for path in found.paths.to_pylist() if "empty" not in path]
    assert [contents[0], *map(len, contents[1:4]), *contents[4:]] == [b"a b", *[200_000] * 3, DICOM, b"c"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)  # names the store too
    stores._open_bucket.cache_clear()
    for location in (f"s3://images{s3}", f"s3://images/{s3}", "s3://images/set"):
        assert len(find_images(location).paths) == 7
    assert read_bytes("s3://images/set/sub/c.png") == b"c"
    stores._open_bucket.cache_clear()


def test_missing_objects_and_buckets(s3: str) -> None:
    missing = ("images/set/none.png", "images/set", "nonesuch/a.png")
    assert [reading_code(f"s3://{place}{s3}") for place in missing] == ["missing"] * 3
    assert reading_code(f"s3://images/set/none.tar{s3}::a.png") == "missing"
    assert reading_code(f"s3://images/set/empty.png{s3}") == "empty"
    assert reading_code(f"s3://images/set/a%20b.png{s3}", max_bytes=2) == "too_large"
    for place in ("s3://images/none", "s3://nonesuch/set", "s3://images/set/sub/c.png"):
        part = "is a file" if place.endswith("c.png") else "no such folder"
        assert listing_error(f"{place}{s3}").startswith(f"{place}: {part}")


def test_refused_access_is_permission(s3: str, bucket: Any) -> None:
    with no_access(bucket.endpoint):
        assert reading_code(f"s3://images/set/sub/c.png{s3}") == "permission"
        assert reading_code(f"s3://images/set/images_001.tar.gz{s3}::images/0.png") == "permission"
        assert listing_error(f"s3://images/set{s3}").startswith("s3://images/set: ")
    assert read_bytes(f"s3://images/set/sub/c.png{s3}") == b"c"


def test_unreachable_store_is_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MAX_ATTEMPTS", 1)
    stores._open_bucket.cache_clear()
    options = "?endpoint_override=127.0.0.1:1&scheme=http&region=moon-1"
    assert reading_code(f"s3://images/a.png{options}") == "storage"
    assert reading_code(f"s3://images/a.tar{options}::a.png") == "storage"
    message = listing_error(f"s3://images/set{options}")
    assert "NETWORK_CONNECTION" in message
    assert "moon-1" not in message
    stores._open_bucket.cache_clear()
    google = "gs://anonymous@images/a.png?endpoint_override=127.0.0.1:1&scheme=http&retry_limit_seconds=1"
    assert reading_code(google) == "storage"


def test_addresses_with_keys_or_unknown_options_are_refused_without_secrets() -> None:
    keys = ("s3://AKIA:hush@images/a.png", "s3://AKIA@images/a.png", "gs://AKIA:hush@images/a.png")
    for address in (*keys, "s3://images/a.png?secret_key=hush&region=x"):
        part = "contains a secret key" if "AKIA" in address else "secret_key"
        with pytest.raises(ImageError, match=part) as caught:
            read_bytes(address)
        for message in (str(caught.value), listing_error(address)):
            assert part in message
            assert "AKIA" not in message
            assert "hush" not in message


def test_escapes_that_are_not_utf8_never_make_two_names_one(tmp_path: Path) -> None:
    """With replacement characters `%DC` and `%C4` would name one file, and give one image_id."""
    uris = [f"{(tmp_path / 'M').as_uri()}{escape}-17.dcm" for escape in ("%DC", "%C4")]
    (tmp_path / "M\ufffd-17.dcm").write_bytes(b"another patient's")
    assert len({file_name(uri) for uri in uris}) == 2
    assert file_names(pa.chunked_array([uris])).to_pylist() == ["M%DC-17.dcm", "M%C4-17.dcm"]
    for uri in uris:
        with pytest.raises(ImageError, match="not UTF-8"):
            read_bytes(uri)
    with pytest.raises(InputError, match="not UTF-8"):
        remote.to_path("s3://bucket/M%DC-17")
