"""Paths in a bucket behave as paths on a disk: each operation on both, and a second client asks the server."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_bundle
from test_files import no_access

from ray_cxr.errors import BundleError, InputError, OutputError, RayCxrError
from ray_cxr.models.bundle import is_written, load_bundle
from ray_cxr.scoring.ranges import list_parts
from ray_cxr.storage import atomic, remote, stores


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_path_operations_are_alike_on_a_disk_and_in_a_bucket(kind: str, tmp_path: Path, request) -> None:
    bucket = request.getfixturevalue("bucket") if kind == "bucket" else None
    folder = remote.to_path(bucket("both/ways") if bucket else str(tmp_path / "disk"))
    assert sorted(folder.glob("*")) == []
    folder.mkdir()
    atomic.write_text(folder / "a b%.txt", "ä")
    atomic.write_json(folder / "sub.json", {"x": [1]})
    (folder / "in").mkdir(exist_ok=True)
    atomic.write_parquet(pa.table({"x": [1, 2]}), folder / "in" / "t.parquet")
    atomic.write_text(folder / "_SUCCESS", "")
    assert (folder / "a b%.txt").read_text(encoding="utf-8") == "ä"
    assert (folder / "a b%.txt").read_bytes() == "ä".encode()
    assert json.loads((folder / "sub.json").read_text()) == {"x": [1]}
    assert pq.read_table(folder / "in" / "t.parquet")["x"].to_pylist() == [1, 2]
    assert sorted(path.name for path in folder.iterdir()) == ["_SUCCESS", "a b%.txt", "in", "sub.json"]
    assert sorted(path.name for path in folder.glob("*.*")) == ["a b%.txt", "sub.json"]
    assert ((folder / "in").is_dir(), (folder / "in").is_file(), (folder / "in").exists()) == (True, False, True)
    assert (folder / "sub.json").stat().st_size == len((folder / "sub.json").read_bytes())
    assert (folder / "sub.json").with_suffix(".svg").name == (folder / "sub.json").with_name("sub.svg").name
    assert (folder / "in" / "t.parquet").parent == folder / "in"
    assert remote.to_path(remote.to_address(folder)) == pickle.loads(pickle.dumps(folder)) == folder
    assert remote.is_inside(folder / "in", folder)
    assert not remote.is_inside(folder.with_name(f"{folder.name}2"), folder)
    for operation in ("read_bytes", "stat", "unlink"):
        with pytest.raises(FileNotFoundError):
            getattr(folder / "none", operation)()
    (folder / "none").unlink(missing_ok=True)
    (folder / "sub.json").unlink()
    assert not (folder / "sub.json").exists()
    files = [folder / name for name in ("_SUCCESS", "none", "a b%.txt")]
    assert [file and file.read() for file in remote.read_files(files)] == [b"", None, "ä".encode()]
    downloaded = remote.download_folder(folder).iterdir()
    assert {path.name for path in downloaded if path.is_file()} == {"_SUCCESS", "a b%.txt"}
    assert not remote.download_folder(folder / "none").exists()


def test_objects_appear_whole_or_not_at_all(bucket) -> None:
    def fail(part: Path) -> None:
        part.write_bytes(b"half")
        raise ZeroDivisionError

    atomic.write_text(remote.to_path(bucket("w/a b/c.txt")), "x")
    atomic.write(remote.to_path(bucket("w/large")), lambda part: part.write_bytes(bytes(12_000_000)) and None)
    for name in ("a b/c.txt", "new"):
        with pytest.raises(ZeroDivisionError):
            atomic.write(remote.to_path(bucket(f"w/{name}")), fail)
    assert bucket.keys("w/") == ["w/a b/c.txt", "w/large"]
    assert bucket.get("w/a b/c.txt") == b"x"
    assert bucket.get("w/large") == bytes(12_000_000)


def test_file_that_completes_a_folder_is_written_last(bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    write = atomic.write
    monkeypatch.setattr(atomic, "write", lambda path, produce: (order.append(path.name), write(path, produce)))
    with atomic.new_folder(remote.to_path(bucket("folder")), "b") as folder:
        for name in "abc":
            (folder / name).write_bytes(b"x")
        assert bucket.keys("folder/") == []
    assert order == ["a", "c", "b"]
    assert bucket.keys("folder/") == ["folder/a", "folder/b", "folder/c"]


def test_changed_object_gets_a_new_copy(bucket, cache: Path) -> None:
    """The ETag distinguishes them: the length is equal, and both may be written in the same second."""
    place = remote.to_path(bucket("changing/x.bin"))
    copies, folders = [], []
    for data in (b"one", b"two", b"one"):
        bucket.put("changing/x.bin", data)
        copies.append(Path(os.fspath(place)))
        folders.append(remote.download_folder(place.parent))
        assert copies[-1].read_bytes() == (folders[-1] / "x.bin").read_bytes() == data
    assert copies[0] != copies[1]
    assert remote.download_folder(place.parent) == folders[2]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(copies[0].stat().st_mode) == 0o400


def test_requests_do_not_grow_with_the_number_of_files(bucket, caplog, monkeypatch) -> None:
    """A listing of 30 files takes one request, a small file two, and 40 readers of one object share one download."""
    folder = remote.to_path(bucket("many"))
    for number in range(30):
        bucket.put(f"many/part-{number:05d}.parquet", b"x")
    with caplog.at_level("INFO", "werkzeug"):
        caplog.clear()
        assert list_parts(folder) == set(range(30))
        assert len(caplog.records) == 1
        caplog.clear()
        assert remote.read_file(folder / "part-00000.parquet").read() == b"x"
        assert len(caplog.records) == 2

    fetch = Mock(wraps=remote.StorePath._fetch)
    monkeypatch.setattr(remote.StorePath, "_fetch", lambda *given: fetch(*given))
    assert len(set(remote.download([folder / "part-00000.parquet"] * 40))) == 1
    assert fetch.call_count == 1


def test_cache_of_another_user_or_open_to_others_is_refused(bucket, tmp_path: Path, monkeypatch) -> None:
    bucket.put("open/x", b"x")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    user = os.getuid()
    for name, mode in {"world": 0o705, "group": 0o750, "own": 0o700, "link": 0o700}.items():
        place = tmp_path / name
        place.mkdir(mode, exist_ok=True)
        place.chmod(mode)
        monkeypatch.setenv(remote.CACHE_VARIABLE, str(place))
        monkeypatch.setattr(os, "getuid", lambda other=(name == "own"): user + other)
        with pytest.raises(InputError, match=str(place)):
            os.fspath(remote.to_path(bucket("open/x")))
        assert not any(place.iterdir())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        *((f"{scheme}b/x", "only s3://") for scheme in ("gs://", "s3a://", "file:///")),
        *((text, "has no bucket") for text in ("s3:/b/x", "s3:", "s3:///x")),
        ("run:", "run:: only s3:// and local paths work here; a local path is ./run:"),
        ("a:/b", "a:/b: only s3:// and local paths work here; a local path is ./a:/b"),
        ("s3://AKIA:hush@b/x", "contains a secret key"),
        ("s3://b/x?scheme=hush&region=r", "options"),
        ("s3://b/x?secret_key=hush&region=r", "secret_key"),
        (Path("s3://bucket/x"), "s3://BUCKET/FOLDER"),
    ],
)
def test_bad_addresses_are_refused_without_secrets(text: str | Path, part: str) -> None:
    with pytest.raises(InputError) as caught:
        remote.to_path(text)
    assert part in str(caught.value)
    assert not any(word in str(caught.value) for word in ("hush", "AKIA", "\n"))
    for name in ("a:b", "./s3:x", "12:/x", "C", "ein Ordner/x"):
        assert remote.to_path(name) == Path(name), "a local name with a colon stays local"
    for name in ("./run:", "./a:/b", ".//s3://x"):
        assert remote.to_path(remote.to_path(name)) == Path(name).absolute(), "without ./ an address"


OPERATIONS: dict[str, Callable[[Path], object]] = {
    "exists": lambda path: path.exists(),
    "read": lambda path: path.read_bytes(),
    "write": lambda path: atomic.write_text(path, "x"),
    "list": lambda path: list(path.iterdir()),
    "remove": lambda path: path.unlink(),
    "copy": os.fspath,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_store_errors_are_one_line(bucket, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("shut/x", b"x")
    with no_access(bucket.endpoint), pytest.raises(InputError, match="credentials") as refused:
        OPERATIONS[name](remote.to_path(bucket("shut/x")))
    monkeypatch.setattr(stores, "MAX_ATTEMPTS", 1)
    stores._open_bucket.cache_clear()
    place = remote.to_path("s3://chests/x?anonymous=true&endpoint_override=127.0.0.1:1&scheme=http&region=moon-1")
    with pytest.raises(RayCxrError, match="NETWORK_CONNECTION") as unreachable:
        OPERATIONS[name](place)
    stores._open_bucket.cache_clear()
    assert "\n" not in f"{refused.value}{unreachable.value}"


@pytest.mark.parametrize(
    ("code", "word"), [("SLOW_DOWN", "overloaded"), ("INTERNAL_FAILURE", "overloaded"), ("UNKNOWN", "the network")]
)
def test_a_busy_store_has_its_own_remedy(code: str, word: str) -> None:
    place = remote.to_path("s3://b/study/a/b?region=here")
    with pytest.raises(RayCxrError, match=word) as caught, remote._store_errors(place):
        raise OSError(f"When reading: AWS Error {code} during PutObject operation: it failed")
    message = remote.describe_in(caught.value, remote.to_path("s3://b/study?region=here"))
    assert message == str(caught.value).replace("/a/b", "")
    for elsewhere in ("s3://b/stud?region=here", "here"):
        assert remote.describe_in(caught.value, remote.to_path(elsewhere)) is None
    assert remote.describe_in(RayCxrError("another error"), remote.to_path("s3://b/study?region=here")) is None


def test_missing_bucket_is_named(bucket) -> None:
    place = remote.to_path(bucket("x").replace("chests", "nonesuch"))
    for use in (OPERATIONS["write"], remote.check_bucket):
        with pytest.raises(InputError, match="nonesuch"):
            use(place)
    assert not place.exists()


@pytest.mark.slow
def test_bundle_in_a_bucket_is_whole_or_none(bucket, tiny_bundle, command, cache: Path) -> None:
    place = remote.to_path(bucket("made/bundle"))
    for name in ("MODEL_CARD.md", "bundle.json", "curves.json"):  # an upload that was cut off
        bucket.put(f"made/bundle/{name}", (tiny_bundle.path / name).read_bytes())
    assert not is_written(place)
    with pytest.raises(BundleError, match="SHA256SUMS"):
        load_bundle(place)
    made = make_tiny_bundle(place)
    assert is_written(place)
    assert (made.digest, made.location) == (tiny_bundle.digest, str(place))
    assert made.path.is_relative_to(cache)
    for path in tiny_bundle.path.iterdir():
        assert bucket.get(f"made/bundle/{path.name}") == path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        make_tiny_bundle(place)
    assert load_bundle(str(place)).digest == tiny_bundle.digest

    # A changed byte is noticed, and the message names the bucket's file.
    bucket.put("made/bundle/curves.json", tiny_bundle.path.joinpath("curves.json").read_bytes()[:-1] + b" ")
    with pytest.raises(BundleError, match=rf"^{re.escape(str(place))}: curves\.json"):
        load_bundle(place)
    bucket.put("made/other/notes.txt", b"mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        make_tiny_bundle(remote.to_path(bucket("made/other")))
    assert bucket.keys("made/other/") == ["made/other/notes.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["--out none/out", "--out chests/taken", "--model chests/no", "--manifest chests/no"])
def test_score_names_what_a_bucket_lacks(bucket, tiny_bundle, manifest: Path, command, place: str) -> None:
    bucket.put("taken", b"x")
    option, key = place.split()
    given = {"--model": tiny_bundle.path, "--manifest": manifest, "--out": bucket("unused")}
    given[option] = f"s3://{key}{bucket.options}"
    code, _, err = command("score", *[word for pair in given.items() for word in pair])
    assert (code, err.count("\n")) == (2, 1), err
    assert key in err
    assert bucket.keys("unused") == []
