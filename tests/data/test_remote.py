"""Paths in a bucket do what paths on a disk do: each operation on both, and the server asked by another client."""

from __future__ import annotations

import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_bundle

from ray_cxr.data import atomic, remote, storage
from ray_cxr.errors import BundleError, InputError, OutputError, RayCxrError
from ray_cxr.models.bundle import load_bundle, written
from ray_cxr.scoring import pipeline


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that is not there yet."""
    if request.param == "disk":
        (tmp_path / "disk").mkdir()
        return remote.path(str(tmp_path / "disk"))
    bucket = request.getfixturevalue("bucket")
    return remote.path(bucket(f"both/{request.node.name.replace('[', '-')}"))


def test_what_the_package_asks_of_a_path_is_answered_alike(folder: Path) -> None:
    assert sorted(folder.glob("*")) == []
    atomic.write_text(folder / "a b%.txt", "ä")
    atomic.write_json(folder / "sub.json", {"x": [1]})
    (folder / "in").mkdir(exist_ok=True)
    atomic.write_parquet(pa.table({"x": [1, 2]}), folder / "in" / "t.parquet")
    atomic.write_text(folder / "_SUCCESS", "")
    assert (folder / "a b%.txt").read_text(encoding="utf-8") == "ä"
    assert (folder / "a b%.txt").read_bytes() == "ä".encode()
    assert json.loads((folder / "sub.json").read_text()) == {"x": [1]}
    assert pq.read_table(folder / "in" / "t.parquet")["x"].to_pylist() == [1, 2]
    with open(folder / "_SUCCESS", "rb") as stream:
        assert stream.read() == b""
    assert sorted(path.name for path in folder.iterdir()) == ["_SUCCESS", "a b%.txt", "in", "sub.json"]
    assert sorted(path.name for path in folder.glob("*.*")) == ["a b%.txt", "sub.json"]
    assert sorted(path.name for path in folder.glob("s?b.json")) == ["sub.json"]
    assert (folder / "sub.json").with_suffix(".svg").name == (folder / "sub.json").with_name("sub.svg").name
    assert (folder / "in" / "t.parquet").parent == folder / "in"
    assert ((folder / "in").is_dir(), (folder / "in").is_file(), (folder / "in").exists()) == (True, False, True)
    assert ((folder / "_SUCCESS").is_dir(), (folder / "_SUCCESS").is_file()) == (False, True)
    assert (folder / "sub.json").stat().st_size == len((folder / "sub.json").read_bytes())
    with pytest.raises(FileNotFoundError):
        (folder / "none").read_bytes()
    with pytest.raises(FileNotFoundError):
        (folder / "none").stat()
    with pytest.raises(FileNotFoundError):
        (folder / "none").unlink()
    (folder / "none").unlink(missing_ok=True)
    (folder / "sub.json").unlink()
    assert not (folder / "sub.json").exists()
    assert remote.path(remote.address(folder)) == folder
    assert pickle.loads(pickle.dumps(folder)) == folder
    assert remote.is_inside(folder / "in", folder)
    assert not remote.is_inside(folder, folder / "in")
    assert not remote.is_inside(folder.with_name(f"{folder.name}2"), folder)
    files = [folder / name for name in ("_SUCCESS", "none", "a b%.txt")]
    assert [file and file.read() for file in remote.contents(files)] == [b"", None, "ä".encode()]
    names = {path.name for path in remote.folder_here(folder).iterdir() if path.is_file()}
    assert names == {"_SUCCESS", "a b%.txt"}
    assert not remote.folder_here(folder / "none").exists()


def test_what_is_written_is_there_under_its_name_for_another_client(bucket) -> None:
    atomic.write_text(remote.path(bucket("w/a b/c.txt")), "x")
    atomic.write(remote.path(bucket("w/large")), lambda part: part.write_bytes(bytes(12_000_000)) and None)
    assert bucket.keys("w/") == ["w/a b/c.txt", "w/large"]
    assert bucket.get("w/a b/c.txt") == b"x"
    assert bucket.get("w/large") == bytes(12_000_000)


def test_what_fails_while_it_is_made_leaves_nothing(bucket) -> None:
    bucket.put("half/old", b"old")

    def produce(part: Path) -> None:
        part.write_bytes(b"half")
        raise ZeroDivisionError

    for name in ("old", "new"):
        with pytest.raises(ZeroDivisionError):
            atomic.write(remote.path(bucket(f"half/{name}")), produce)
    assert bucket.keys("half/") == ["half/old"]
    assert bucket.get("half/old") == b"old"


def test_a_changed_object_is_never_taken_for_the_old_one(bucket, cache: Path) -> None:
    """Of the same length, and changed within the same second: the ETag is what tells."""
    place = remote.path(bucket("changing/x.bin"))
    copies = []
    for data in (b"one", b"two", b"one"):
        bucket.put("changing/x.bin", data)
        copies.append(Path(os.fspath(place)))
        assert copies[-1].read_bytes() == data
    assert copies[0] != copies[1]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    with pytest.raises(PermissionError) if os.getuid() else pytest.raises(FileExistsError):
        open(copies[0], "wb" if os.getuid() else "xb").close()
    folders = []
    for data in (b"one", b"two"):
        bucket.put("changing/x.bin", data)
        folders.append(remote.folder_here(remote.path(bucket("changing"))))
        assert (folders[-1] / "x.bin").read_bytes() == data
    assert remote.folder_here(remote.path(bucket("changing"))) == folders[1]


def test_what_is_there_is_found_by_listing(bucket, caplog: pytest.LogCaptureFixture) -> None:
    """Two requests for 1,030 files, of which a page holds a thousand; and a file's contents are two more."""
    folder = remote.path(bucket("many"))
    for number in range(1030):
        bucket.put(f"many/part-{number:05d}.parquet", b"x")
    with caplog.at_level("INFO", "werkzeug"):
        caplog.clear()
        assert pipeline._written(folder) == set(range(1030))
        assert len(caplog.records) == 2
        caplog.clear()
        assert remote.content(folder / "part-00000.parquet").read() == b"x"
        assert len(caplog.records) == 2


def test_one_copy_serves_all_who_ask(bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    fetch = remote.StorePath._fetch
    monkeypatch.setattr(
        remote.StorePath, "_fetch", lambda self, *given: (fetched.append(self.name), fetch(self, *given))[1]
    )
    bucket.put("once/x", b"x" * 1000)
    copies = remote.here([remote.path(bucket("once/x"))] * 40)
    assert len(set(copies)) == 1
    assert fetched == ["x"]


def test_a_cache_of_others_is_refused(bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("open/x", b"x")
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for name in ("open", "link"):
        monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / name))
        with pytest.raises(InputError, match="closed to others"):
            os.fspath(remote.path(bucket("open/x")))
        assert not any((tmp_path / name).iterdir())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gs://b/x", "only s3:// and paths on this machine"),
        ("https://host/x", "only s3:// and paths on this machine"),
        ("s3a://b/x", "only s3:// and paths on this machine"),
        ("file:///tmp/x", "only s3:// and paths on this machine"),
        ("s3:/b/x", "names no bucket; write it as s3://BUCKET/FOLDER"),
        ("s3:", "names no bucket"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://AKIA:hush@b/x", "the address holds a key; leave it out"),
        ("s3://b/x?scheme=hush&region=r", "its options are not such as s3 has"),
        ("s3://b/x?secret_key=hush&region=r", "options that s3 does not: secret_key"),
    ],
)
def test_what_is_no_place_is_refused_in_a_line_without_secrets(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        remote.path(text)
    assert words in str(caught.value)
    assert "hush" not in str(caught.value)
    assert "AKIA" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_of_pathlib_that_was_an_address_is_refused() -> None:
    with pytest.raises(InputError, match="s3://BUCKET/FOLDER"):
        remote.path(Path("s3://bucket/x"))


@pytest.mark.parametrize("name", ["a:b", "./s3:x", "12:/x", "C", "ein Ordner/x"])
def test_local_names_with_colons_stay_local(name: str) -> None:
    assert remote.path(name) == Path(name)


#: What a store that has no answer raises, by what is asked of it.
ASKED: list[Callable[[Path], object]] = [
    lambda path: path.exists(),
    lambda path: path.read_bytes(),
    lambda path: atomic.write_text(path, "x"),
    lambda path: list(path.iterdir()),
    lambda path: path.unlink(),
    os.fspath,
]


@pytest.mark.parametrize("number", range(len(ASKED)))
def test_access_that_is_not_allowed_is_one_line(bucket, number: int) -> None:
    from urllib.request import Request, urlopen

    def free_actions(count: int) -> None:
        headers = {"Content-Type": "text/plain"}
        urlopen(Request(f"{bucket.endpoint}/moto-api/reset-auth", data=str(count).encode(), headers=headers)).close()

    bucket.put("shut/x", b"x")
    place = remote.path(bucket("shut/x"))
    free_actions(0)
    try:
        with pytest.raises(InputError) as caught:
            ASKED[number](place)
    finally:
        free_actions(10**9)
    assert "the store does not permit it; check the credentials in the environment" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_one_line(bucket) -> None:
    place = remote.path(bucket("x").replace("chests", "nonesuch"))
    with pytest.raises(InputError, match="no such bucket; make it"):
        atomic.write_text(place, "x")
    with pytest.raises(InputError, match="there is no bucket nonesuch; make it"):
        remote.check_bucket(place)
    remote.check_bucket(remote.path(bucket("x")))
    assert not place.exists()


def test_a_store_that_is_down_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_ATTEMPTS", 1)
    storage._bucket.cache_clear()
    place = remote.path("s3://chests/x?anonymous=true&endpoint_override=127.0.0.1:1&scheme=http&region=moon-1")
    for ask in ASKED:
        with pytest.raises(RayCxrError, match="NETWORK_CONNECTION; check the address and the network") as caught:
            ask(place)
        assert "\n" not in str(caught.value)
    storage._bucket.cache_clear()


#: Of each command the arguments that name places, and whether one of them may be in a bucket.
GIVEN = {
    "manifest": {"": False, "--train-val-list": False, "--test-list": False, "--out": True},
    "prepare": {"": True, "--out": True, "--config": False},
    "train": {"": True, "--out": True, "--config": False},
    "tune": {"": True, "--out": False, "--config": False},
    "score": {"--model": True, "--manifest": True, "--out": True, "--config": False},
    "report": {
        "": True,
        "--out": True,
        "--labels": True,
        "--compare": True,
        "--consensus": False,
        "--boxes": False,
        "--prevalence": False,
    },
    "export-sr": {"": False, "--out": False},
    "quantize": {"": True, "--out": True, "--config": False},
    "recalibrate": {"": True, "--labels": True, "--out": True},
    "import-weights": {"": False, "--out": True},
    "demo": {"--out": False},
}
NEEDED = {
    "manifest": ["t.csv", "--out", "m"],
    "prepare": ["m", "--out", "o"],
    "train": ["p", "--out", "o"],
    "tune": ["p", "--out", "o"],
    "score": ["--model", "b", "--manifest", "m", "--out", "o"],
    "report": ["s", "--out", "o"],
    "export-sr": ["s", "--out", "o"],
    "quantize": ["b", "p", "--out", "o"],
    "recalibrate": ["b", "s", "--labels", "l", "--out", "o"],
    "import-weights": ["w", "--backbone", "TinyCNN", "--out", "o"],
    "demo": ["--out", "o"],
}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, given in GIVEN.items() for option in given])
def test_no_command_makes_a_folder_of_an_address(
    name: str, option: str, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("s3:/b/x", "http://host/x", "s3://b/x"):
        if text == "s3://b/x" and GIVEN[name][option]:
            continue
        words = list(NEEDED[name])
        if option in words:
            words[words.index(option) + 1] = text
        elif option:
            words += [option, text]
        else:
            words[0] = text
        code, _, err = command(name, *words)
        assert (code, err.count("\n")) == (2, 1), err
        assert storage.shown(text) in err
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_in_a_bucket_is_whole_or_none(bucket, tiny_bundle, command, cache: Path) -> None:
    place = remote.path(bucket("made/bundle"))
    for name in ("MODEL_CARD.md", "bundle.json", "curves.json"):  # an upload that was cut off
        bucket.put(f"made/bundle/{name}", (tiny_bundle.path / name).read_bytes())
    assert not written(place)
    with pytest.raises(BundleError, match="has no SHA256SUMS"):
        load_bundle(place)
    made = make_tiny_bundle(place)
    assert written(place)
    assert (made.digest, made.place) == (tiny_bundle.digest, str(place))
    assert made.path.is_relative_to(cache)
    for path in tiny_bundle.path.iterdir():
        assert bucket.get(f"made/bundle/{path.name}") == path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        make_tiny_bundle(place)
    assert load_bundle(str(place)).digest == tiny_bundle.digest

    # A byte changed in the bucket is noticed, and it is the bucket's that the message names.
    bucket.put("made/bundle/curves.json", tiny_bundle.path.joinpath("curves.json").read_bytes()[:-1] + b" ")
    with pytest.raises(BundleError) as caught:
        load_bundle(place)
    assert str(caught.value).startswith(f"{place}: curves.json is not as it was written")
    bucket.put("made/other/notes.txt", b"mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt, which is not of this"):
        make_tiny_bundle(remote.path(bucket("made/other")))
    assert bucket.keys("made/other/") == ["made/other/notes.txt"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--out": "nonesuch/out"}, "there is no bucket nonesuch; make it, or name another"),
        ({"--model": "chests/none"}, "no such folder; name a bundle"),
        ({"--manifest": "chests/none.parquet"}, "no such file; make it with `ray-cxr manifest`"),
        ({"--out": "chests/taken"}, "is a file; name another --out"),
    ],
)
def test_score_says_in_a_line_what_a_bucket_lacks(
    bucket, tiny_bundle, manifest: Path, command, changed: dict[str, str], words: str
) -> None:
    bucket.put("taken", b"x")
    given = {"--model": tiny_bundle.path, "--manifest": manifest, "--out": bucket("unused")}
    given |= {name: f"s3://{place}{bucket.options}" for name, place in changed.items()}
    code, _, err = command("score", *[word for pair in given.items() for word in pair])
    assert (code, err.count("\n")) == (2, 1), err
    assert words in err
    assert next(iter(changed.values())) in err
    assert bucket.keys("unused") == []
