"""Bytes and listings: local folders, archives among them, URIs, and a store of S3 that runs on this machine."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_cxr.data import archives, storage
from ray_cxr.data.storage import list_images, listing, read_bytes, split_member
from ray_cxr.errors import ImageError, InputError

DICOM = bytes(128) + b"DICM" + bytes(100)


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def reading_code(path: Any, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        read_bytes(path, **limits)
    assert "\n" not in caught.value.message
    assert str(path) == "" or str(path) not in caught.value.message
    return caught.value.code


def test_read_bytes(tmp_path: Path) -> None:
    file = tmp_path / "ä b%20c.png"
    file.write_bytes(b"12345")
    assert read_bytes(str(file)) == b"12345"
    assert read_bytes(file.as_uri()) == b"12345"
    assert read_bytes(str(file), max_bytes=5) == b"12345"
    assert reading_code(str(file), max_bytes=4) == "too_large"
    assert reading_code(file.as_uri(), max_bytes=4) == "too_large"


def test_missing_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    os.mkfifo(tmp_path / "pipe")
    for path in (
        str(tmp_path / "none.png"),
        (tmp_path / "none.png").as_uri(),
        str(tmp_path),
        tmp_path.as_uri(),
        str(file / "below"),
        str(tmp_path / "pipe"),
        "/dev/zero",
        "a\0b",
        "",
        None,
        float("nan"),
    ):
        assert reading_code(path) == "missing"


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert reading_code(str(tmp_path / "a.png")) == "empty"
    assert reading_code((tmp_path / "a.png").as_uri()) == "empty"


def test_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"1")
    file.chmod(0)
    if os.access(file, os.R_OK):  # root may read everything

        def refuse(*args: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
    assert reading_code(str(file)) == "permission"


def test_failing_disk_is_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"1")

    def fail(*args: Any) -> None:
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(ImageError) as caught:
        read_bytes(str(file))
    assert caught.value.code == "storage"
    assert caught.value.message == "the file cannot be read: Input/output error"


@pytest.mark.parametrize("uri", ["nothing://a/b.png", "ht!tp://x", "file://%%%/"])
def test_unknown_store(uri: str) -> None:
    assert reading_code(uri) in ("storage", "missing")
    assert reading_code("nothing://a/b.png") == "storage"


def make_tree(root: Path) -> None:
    for name in ("b.PNG", "a.png", "sub/c.JPeG", "sub/d e.jpg", "sub/x.dcm", "sub/y%41.dicom", "notes.txt", "raw"):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    for name in (".hidden.png", "sub/._c.jpeg", ".cache/e.png"):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"no")
    (root / "sub" / "folder.png").mkdir()


TREE = ["a.png", "b.PNG", "sub/c.JPeG", "sub/d e.jpg", "sub/x.dcm", "sub/y%41.dicom"]


def test_list_local_folder(tmp_path: Path) -> None:
    make_tree(tmp_path)
    found = list_images(str(tmp_path))
    assert found == [str(tmp_path / name) for name in TREE]
    assert list_images(f"{tmp_path}/") == found
    assert [read_bytes(path).decode() for path in found] == TREE


def test_list_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert list_images("sub") == ["sub/c.JPeG", "sub/d e.jpg", "sub/x.dcm", "sub/y%41.dicom"]


def test_list_uri(tmp_path: Path) -> None:
    make_tree(tmp_path)
    for location in (tmp_path.as_uri(), tmp_path.as_uri() + "/"):
        found = list_images(location)
        assert all(path.startswith(tmp_path.as_uri()) for path in found)
        assert sorted(read_bytes(path).decode() for path in found) == TREE


def test_links_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"1")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(tmp_path / "root")
    assert list_images(str(tmp_path / "root")) == [str(tmp_path / "root" / "link" / "a.png")]


def test_broken_links_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert reading_code(list_images(str(tmp_path))[0]) == "missing"


def test_nothing_to_list(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").write_bytes(b"1")
    for location, reason in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "empty", "holds no image"),
        (tmp_path / "a.png", "is a file"),
    ):
        for text in (str(location), location.as_uri()):
            with pytest.raises(InputError, match=reason) as caught:
                list_images(text)
            assert "\n" not in str(caught.value)
            assert str(caught.value).startswith(text)
    with pytest.raises(InputError, match="cannot be listed"):
        list_images("nothing://bucket/folder")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/d/images_001.tar.gz::images/00000001_000.png", ("/d/images_001.tar.gz", "images/00000001_000.png")),
        ("a.TAR::x", ("a.TAR", "x")),
        ("a.tgz::b.tgz::c", ("a.tgz", "b.tgz::c")),
        ("a::b.tar.xz::c d", ("a::b.tar.xz", "c d")),
        ("s3://b/a.tar.bz2?region=x&scheme=http::m/n.png", ("s3://b/a.tar.bz2?region=x&scheme=http", "m/n.png")),
        ("a.tar?x::m", None),
        ("a.tar::", None),
        ("a.zip::m", None),
        ("a.tar.gz", None),
        ("::m", None),
        ("a.png", None),
        ("", None),
        (None, None),
    ],
)
def test_split_member(path: str | None, parts: tuple[str, str] | None) -> None:
    assert split_member(path) == parts


PIECES = st.sampled_from(
    [".tar", ".tar.gz", ".TGZ", "::", ":", "?", "s3://", "file:", "a", "/", ".", "\n", "é", ".png"]
)


@given(st.lists(PIECES, max_size=9).map("".join))
def test_arrow_splits_members_as_python_does(path: str) -> None:
    found = pc.extract_regex(pa.array([path]), storage.MEMBER_PATTERN)[0].as_py()
    assert (found and (found["archive"], found["member"])) == split_member(path)


def test_names_of_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("x/../a.tar::./i/b.png") == f"{tmp_path}/a.tar::./i/b.png"
    assert storage.absolute("s3://b/a.tar?x=1::i") == "s3://b/a.tar?x=1::i"
    assert storage.plain_path("s3://b/a%20b.tar?x=1/2::i/%20?.png") == "s3://b/a b.tar::i/%20?.png"
    names = ["/a/b.png", "s3://b/c%20d.png?x=a/b", "/a/b.tar::c.png", "/a/b.tar::d/c.png", "/a/x::y.png", None]
    expected = ["b.png", "c d.png", "c.png", "c.png", "x::y.png", None]
    assert [name and storage.file_name(name) for name in names] == expected
    assert storage.file_names(pa.chunked_array([names[:2], names[2:]])).to_pylist() == expected


def test_a_shown_address_holds_no_key_and_no_options() -> None:
    assert storage.shown("s3://KEY:SECRET@bucket/a?x=SECRET") == "s3://bucket/a"
    assert storage.shown("/a/b@c?d") == "/a/b@c?d"


# ---------------------------------------------------------------- archives and files without a suffix


def test_read_bytes_of_a_member(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "a b.tar.gz", {"i/1.png": b"one", "i/2.png": b"two", "i/3.png": b""})
    for place in (str(archive), archive.as_uri()):
        assert read_bytes(f"{place}::i/2.png") == b"two"
        assert reading_code(f"{place}::i/9.png") == "missing"
        assert reading_code(f"{place}::i/3.png") == "empty"
        assert reading_code(f"{place}::i/1.png", max_bytes=2) == "too_large"
    assert reading_code(f"{tmp_path / 'none.tar'}::i/1.png") == "missing"


@pytest.mark.parametrize("uri", [False, True])
def test_members_are_listed_in_the_place_of_their_archive(tmp_path: Path, uri: bool) -> None:
    root = tmp_path / "a set"
    write_tar(root / "images_001.tar.gz", {"images/2.png": b"2", "images/1 %.png": b"1", "note.txt": b"n"})
    write_tar(root / "sub" / "images_002.tar", {"3.png": b"3"}, "w")
    for name in ("a.png", "images_001.tar.gz.md5", "z.png"):
        (root / name).write_bytes(name.encode())
    location = root.as_uri() if uri else str(root)
    found = listing(location)
    assert found.root == f"{location}/"
    assert [path.removeprefix(found.root) for path in found.paths.to_pylist()] == [
        "a.png",
        "images_001.tar.gz::images/2.png",
        "images_001.tar.gz::images/1 %.png",
        "sub/images_002.tar::3.png",
        "z.png",
    ]
    assert found.left_out == {".txt": 1, ".md5": 1}
    assert [read_bytes(path) for path in found.paths.to_pylist()] == [b"a.png", b"2", b"1", b"3", b"z.png"]


def test_an_archive_is_a_location(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tgz", {"b.png": b"b", "a/a.png": b"a"})
    assert list_images(str(archive)) == [f"{archive}::b.png", f"{archive}::a/a.png"]
    assert list_images(archive.as_uri()) == [f"{archive.as_uri()}::b.png", f"{archive.as_uri()}::a/a.png"]
    write_tar(tmp_path / "none.tgz", {"b.txt": b"b"})
    with pytest.raises(InputError, match=r"none\.tgz: holds no image \(left out: 1 \.txt\)"):
        listing(str(tmp_path / "none.tgz"))


@pytest.mark.parametrize("uri", [False, True])
@pytest.mark.parametrize("place", ["images", "images_001/images"])
def test_what_lies_unpacked_beside_its_archive_is_taken_once(tmp_path: Path, place: str, uri: bool) -> None:
    members = {f"images/{i} .png": b"x" for i in range(3)}
    write_tar(tmp_path / "images_001.tar.gz", members)
    (tmp_path / place).mkdir(parents=True)
    for name in list(members)[:2]:
        (tmp_path / place / Path(name).name).write_bytes(b"x")
    found = listing(tmp_path.as_uri() if uri else str(tmp_path))
    assert found.unpacked == 2
    assert sorted(map(storage.file_name, found.paths.to_pylist())) == ["0 .png", "1 .png", "2 .png"]
    assert sum("::" in path for path in found.paths.to_pylist()) == 1


@pytest.mark.parametrize("uri", [False, True])
def test_dicom_files_without_a_suffix_are_found_by_their_first_bytes(tmp_path: Path, uri: bool) -> None:
    files = {
        "IM0001": DICOM,
        "PAT/ST/CT.1.2.840.113619.2.5": DICOM,
        "PAT/1.2.840.3": DICOM[:131],
        "PAT/README": b"DICM",
        "DICOMDIR": DICOM,
        "sub/dicomdir": DICOM,
        "x.dcm": b"whatever",
        "scan.dcm.bak": DICOM,
        "notes.TXT": b"",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "PIPE")
    found = listing(tmp_path.as_uri() if uri else str(tmp_path))
    names = [path.removeprefix(found.root) for path in found.paths.to_pylist()]
    assert names == ["IM0001", "PAT/ST/CT.1.2.840.113619.2.5", "x.dcm"]
    pipe = 0 if uri else 1  # Arrow does not list what is neither a file nor a folder
    assert found.left_out == {"": 4 + pipe, ".bak": 1, ".txt": 1}


def test_counts_by_suffix_read_well() -> None:
    counts = {".txt": 1200, "": 3, ".a": 2, ".b": 2, ".c": 1, ".d": 1, ".e": 1}
    assert storage.suffixes_text(counts) == "1,200 .txt, 3 without suffix, 2 .a, 2 .b, 1 .c, 2 others"


def test_a_folder_of_other_files_says_what_they_are(tmp_path: Path) -> None:
    for name in ("a.tif", "b.tif", "c"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"holds no image \(left out: 2 \.tif, 1 without suffix\); looked for \.png"):
        listing(str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux only")
def test_names_that_no_table_can_hold_are_counted(tmp_path: Path) -> None:
    for name in (b"a.png", b"gr\xf6\xdfe.png"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"x")
    with tarfile.open(tmp_path / "b.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        for name in ("ö.png", "o.png"):
            tar.addfile(tarfile.TarInfo(name))
    found = listing(str(tmp_path))
    assert found.paths.to_pylist() == [f"{tmp_path}/a.png", f"{tmp_path}/b.tar::o.png"]
    assert found.left_out == {"not named in UTF-8": 2}


NAMES = st.text(st.sampled_from("ab-.0~"), min_size=1, max_size=3).filter(lambda name: not name.startswith("."))


@given(st.sets(st.lists(NAMES, min_size=1, max_size=3).map("/".join), min_size=1, max_size=12))
def test_a_folder_is_walked_in_the_order_of_whole_paths(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    root = tmp_path_factory.mktemp("walk")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.png").write_bytes(b"x")
    assert list_images(str(root)) == sorted(f"{root}/{name}.png" for name in names)


def test_an_archive_that_cannot_be_read_stops_a_listing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b.tar.gz").write_bytes(b"<html>")
    with pytest.raises(InputError) as caught:
        listing(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}/b.tar.gz: cannot be read as a tar archive: the file is not a tar archive (not_an_image); "
        "copy or download it again, or move it away"
    )


# ---------------------------------------------------------------- a store


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[str, str]]:
    """A bucket of S3 on this machine: the options of its addresses, and where its server is told things."""
    import boto3
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing-secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        address = "{}:{}".format(*server.get_host_and_port())
        client = boto3.client("s3", endpoint_url=f"http://{address}", region_name="us-east-1")
        client.create_bucket(Bucket="chests")
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            for i in range(3):
                info = tarfile.TarInfo(f"images/{i}.png")
                info.size = 1_000_000
                tar.addfile(info, io.BytesIO(os.urandom(info.size)))
        for key, data in {
            "set/a b.png": b"a b",
            "set/sub/c.png": b"c",
            "set/sub/IM1": DICOM,
            "set/sub/LICENSE": b"text",
            "set/sub/n.txt": b"n",
            "set/.hidden/x.png": b"x",
            "set/images_001.tar.gz": archive.getvalue(),
            "set/empty.png": b"",
        }.items():
            client.put_object(Bucket="chests", Key=key, Body=data)
        yield f"?endpoint_override={address}&scheme=http", f"http://{address}"
        server.stop()


def test_a_bucket_is_listed_and_read(s3: tuple[str, str]) -> None:
    options, _ = s3
    found = listing(f"s3://chests/set{options}")
    assert found.paths.to_pylist() == [
        f"s3://chests/set/a%20b.png{options}",
        f"s3://chests/set/empty.png{options}",
        *(f"s3://chests/set/images_001.tar.gz{options}::images/{i}.png" for i in range(3)),
        f"s3://chests/set/sub/IM1{options}",
        f"s3://chests/set/sub/c.png{options}",
    ]
    assert found.left_out == {"": 1, ".txt": 1}
    contents = [read_bytes(path) for path in found.paths.to_pylist() if "empty" not in path]
    assert [contents[0], *map(len, contents[1:4]), *contents[4:]] == [b"a b", *[1_000_000] * 3, DICOM, b"c"]
    assert len(listing(f"s3://chests{options}").paths) == len(listing(f"s3://chests/{options}").paths) == 7


def test_an_archive_in_a_bucket_is_read_in_one_pass(s3: tuple[str, str]) -> None:
    archive = f"s3://chests/set/images_001.tar.gz{s3[0]}"
    wanted = {"images/2.png", "images/0.png", "none"}
    assert [(name, len(data)) for name, data in archives.read(archive, wanted) if isinstance(data, bytes)] == [
        ("images/0.png", 1_000_000),
        ("images/2.png", 1_000_000),
    ]
    assert archives.list_members(archive) == [f"images/{i}.png" for i in range(3)]


def test_what_a_bucket_lacks_is_missing(s3: tuple[str, str]) -> None:
    options, _ = s3
    assert reading_code(f"s3://chests/set/none.png{options}") == "missing"
    assert reading_code(f"s3://chests/set{options}") == "missing"
    assert reading_code(f"s3://nonesuch/a.png{options}") == "missing"
    assert reading_code(f"s3://chests/set/none.tar{options}::a.png") == "missing"
    assert reading_code(f"s3://chests/set/empty.png{options}") == "empty"
    assert reading_code(f"s3://chests/set/a%20b.png{options}", max_bytes=2) == "too_large"
    for place, message in (
        ("chests/none", "no such folder; name one that holds images"),
        ("nonesuch/set", "no such folder; name one that holds images"),
        ("chests/set/sub/c.png", "is a file; name the folder that holds the images, or a tar archive"),
    ):
        with pytest.raises(InputError) as caught:
            listing(f"s3://{place}{options}")
        assert str(caught.value) == f"s3://{place}: {message}"


def test_the_environment_can_name_the_store(s3: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3[1])
    storage._bucket.cache_clear()
    assert read_bytes("s3://chests/set/sub/c.png") == b"c"
    assert len(listing("s3://chests/set").paths) == 7
    storage._bucket.cache_clear()


def test_access_that_is_not_allowed_is_permission(s3: tuple[str, str]) -> None:
    options, server = s3

    def free_actions(count: int) -> None:
        request = urllib.request.Request(
            f"{server}/moto-api/reset-auth", data=str(count).encode(), headers={"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(request).close()

    free_actions(0)
    try:
        assert reading_code(f"s3://chests/set/sub/c.png{options}") == "permission"
        assert reading_code(f"s3://chests/set/images_001.tar.gz{options}::images/0.png") == "permission"
        with pytest.raises(InputError) as caught:
            listing(f"s3://chests/set{options}")
    finally:
        free_actions(10**9)
    assert str(caught.value) == (
        "s3://chests/set: cannot be listed (the access is not allowed); check the address and the access to it"
    )
    assert read_bytes(f"s3://chests/set/sub/c.png{options}") == b"c"


@pytest.mark.slow
def test_a_store_that_is_down_is_told_in_seconds(s3: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = "?endpoint_override=127.0.0.1:1&scheme=http&region=moon-1"
    start = time.monotonic()
    with pytest.raises(ImageError) as caught:
        read_bytes(f"s3://chests/a.png{options}")
    assert (caught.value.code, caught.value.message) == ("storage", "the file cannot be read: NETWORK_CONNECTION")
    assert time.monotonic() - start < 30
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 1)
    storage._bucket.cache_clear()
    assert reading_code(f"s3://chests/a.tar{options}::a.png") == "storage"
    with pytest.raises(InputError, match="NETWORK_CONNECTION") as refused:
        listing(f"s3://chests/set{options}")
    assert "moon-1" not in str(refused.value)
    storage._bucket.cache_clear()


def test_an_address_that_holds_a_key_is_refused_without_saying_it() -> None:
    for address in ("s3://AKIA:hush@chests/a.png", "s3://AKIA@chests/a.png", "gs://AKIA:hush@chests/a.png"):
        with pytest.raises(ImageError, match="the address holds a key; leave it out") as caught:
            read_bytes(address)
        with pytest.raises(InputError, match="the address holds a key; leave it out") as refused:
            listing(address)
        for text in (str(caught.value), str(refused.value)):
            assert "AKIA" not in text
            assert "hush" not in text


def test_options_that_s3_does_not_have_are_named_without_their_values() -> None:
    with pytest.raises(ImageError) as caught:
        read_bytes("s3://chests/a.png?secret_key=hush&region=x")
    assert caught.value.message == "the address has options that s3 does not: secret_key"


def test_a_gs_store_that_is_down_is_storage() -> None:
    address = "gs://anonymous@chests/a.png?endpoint_override=127.0.0.1:1&scheme=http&retry_limit_seconds=1"
    assert reading_code(address) == "storage"
