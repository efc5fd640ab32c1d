"""Every argument of every command that names a file or folder: on this machine, and in a bucket."""

from __future__ import annotations

import argparse
import io
import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from conftest import Bucket, make_tiny_bundle, replace_ray, score_arguments, write_phantom_manifest
from sr_site import Site

from ray_cxr.cli import _build_parser, main
from ray_cxr.cli.arguments import PATH_TYPES, any_address
from ray_cxr.imaging.phantoms import write_phantoms
from ray_cxr.labels import FINDINGS
from ray_cxr.review import server
from ray_cxr.review.verdicts import Verdict, VerdictLog
from ray_cxr.storage import stores

Command = Callable[..., tuple[int, str, str]]

#: Every command with all of its paths. A path after `@` may be in a bucket, one after `#` must be on this machine.
LINES = [
    "manifest @t.csv --train-val-list @l --test-list @k --out @m",
    "prepare @m --out @o --config #c",
    "train @p --out @o",
    "tune @p --out @o",
    "score @b --manifest @m --out @o --skip-scored @s",
    "score @b --prepared @p --out @o",
    "report @s --out @o --manifest @m --consensus @c --boxes @b --compare @s --prevalence @p",
    "export-sr @s --out @o --replaces @o",
    "review @s --manifest @m --boxes @b",
    "reviews @s --out @m",
    "quantize @b @p --out @o",
    "recalibrate @b @s --manifest @m --out @o",
    "probe @s --manifest @m --bundle @b --out @o",
    "ensemble @b --out @o",
    "export-onnx @b --out @o",
    "import-weights #w --out @o",
    "benchmark @b --json #f",
    "demo --out #o",
]


def mark(line: str) -> list[tuple[str, str]]:
    """Return the words of a line, each with its mark or an empty one."""
    return [(word[:1], word[1:]) if word[0] in "@#" else ("", word) for word in line.split()]


@pytest.mark.parametrize("line", LINES)
def test_addresses_that_a_command_cannot_use_are_refused(line: str, command: Command, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = mark(line)
    for place in (index for index, (marked, _) in enumerate(words) if marked):
        for address in ("s3:/b/x", "http://host/x", *(["s3://b/x"] if words[place][0] == "#" else [])):
            code, _, err = command(*(address if index == place else word for index, (_, word) in enumerate(words)))
            assert (code, err.count("\n")) == (2, 1), err
            assert address in err
    assert list(tmp_path.iterdir()) == []


def test_the_lines_name_every_path_of_every_command() -> None:
    for name, parser in _build_parser().commands.choices.items():
        words = [word for line in LINES if line.startswith(f"{name} ") for _, word in mark(line)]
        for action in parser._actions:
            if action.type in PATH_TYPES and action.type is not any_address and action.dest != "config":
                is_another_name = action.default == argparse.SUPPRESS
                assert is_another_name or not action.option_strings or {*words} & {*action.option_strings}, action
        places = [action for action in parser._get_positional_actions() if action.type in PATH_TYPES]
        options = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
        assert len(words[1:options]) >= len(places), name


#: Commands on real input. `@x` is the file or folder x of `material`, and `>x` an output.
REAL = [
    "manifest @labels.csv --images @images --split official --train-val-list @train_val_list.txt "
    "--test-list @test_list.txt --out >m.parquet",
    "prepare @m.parquet --out >set --set sizes=[64] --set rows_per_shard=16",
    "score @bundle --manifest @m.parquet --out >scores --precision fp32 --heatmaps 1 --features --max-error-rate 1",
    "score @bundle --images @images --skip-scored @few --out >scores --precision fp32",
    "score @bundle --prepared @prepared --out >scores --precision fp32",
    "report @scores --manifest @m.parquet --compare @scores2 --consensus @labels.parquet "
    "--boxes @boxes.csv --prevalence @shares.toml --out >report",
    "report @few @scores --out >report",
    "quantize @bundle @prepared100 --out >int8 --set max_auroc_fall=0.9",
    "recalibrate @bundle @scores --manifest @m.parquet --out >new --set min_positives=2",
    "probe @scores --manifest @m.parquet --bundle @bundle --out >probe --set min_positives=2",
    "ensemble @bundle @bundle2 --out >both",
    "export-onnx @bundle --out >model.onnx",
    "review @scores --manifest @m.parquet --boxes @boxes.csv",
    "reviews @scores --out >labels.parquet",
    "export-sr @sr/scores --replaces @sr/reports --out >sr --heatmaps",
]
PAIRS = [
    (line, place)
    for line in REAL
    for place in [*(index for index, word in enumerate(line.split()) if word[0] in "@>"), "all"]
]


@pytest.fixture(scope="module")
def material(
    phantoms: Any, manifest: Path, prepared: Path, tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Make what the commands read: tables, images, a prepared set, models, scores, verdicts and documents."""
    home = tmp_path_factory.mktemp("material")
    shutil.copytree(phantoms.images, home / "images")
    shutil.copy(phantoms.table, home / "labels.csv")
    for path in (phantoms.train_val_list, phantoms.test_list):
        shutil.copy(path, home / path.name)
    shutil.copy(manifest, home / "m.parquet")
    shutil.copytree(prepared, home / "prepared")
    shutil.copytree(tiny_bundle.path, home / "bundle")
    make_tiny_bundle(home / "bundle2", seed=1)
    # Measuring 8-bit weights takes more images of each split.
    more_images = write_phantoms(tmp_path_factory.mktemp("more") / "set", patients=100, size=64, broken=False)
    more_rows = write_phantom_manifest(more_images, tmp_path_factory.mktemp("more") / "m.parquet")
    with replace_ray(), redirect_stdout(io.StringIO()):
        assert main(["prepare", str(more_rows), "--out", str(home / "prepared100"), "--size", "64"]) == 0
        for bundle, out, more in (
            ("bundle", "few", ("--limit", 20)),
            ("bundle", "scores", ("--features", "--heatmaps", 1)),
            ("bundle2", "scores2", ()),
        ):
            given = score_arguments(home / bundle, home / "m.parquet", home / out, *more)
            assert main([*given, "--max-error-rate", "1"]) == 0
        log = VerdictLog(home / "scores", "anna")
        fixed: dict[str, Any] = {"session": log.session, "reader": "anna", "time": "2026-01-01T00:00:00.000+00:00"}
        fixed |= {"model_digest": None, "study_id": None, "flag": None, "verdict": None, "note": ""}
        fixed |= {"blind": False, "sample": None, "heatmap": False, "labels": False}
        names = sorted(path.name for path in (home / "images").iterdir())[:12]
        log.append(
            Verdict(**fixed, image_id=name, finding=finding, present=(number + place) % 2)
            for number, name in enumerate(names)
            for place, finding in enumerate(FINDINGS)
        )
        log.close()
        assert main(["reviews", str(home / "scores"), "--out", str(home / "labels.parquet")]) == 0
        (home / "sr").mkdir()
        site = Site(home / "sr")
        site.add(1, 1)
        site.add(2, 2)
        site.write()
        site.draw_maps()
        assert main(["export-sr", str(site.scores), "--out", str(site.out)]) == 0
    rows = "".join(f"{name},Mass,10,20,30,40\n" for name in names)
    (home / "boxes.csv").write_text(f"Image Index,Finding Label,Bbox [x,y,w,h]\n{rows}")
    (home / "shares.toml").write_text("Effusion = 0.12\n")
    return home


@pytest.fixture(scope="module")
def uploaded(bucket: Bucket, material: Path) -> Bucket:
    bucket.upload(material, "places")
    return bucket


@pytest.fixture(scope="module")
def expected() -> dict[str, set[str]]:
    """The names of the files that each line leaves on a disk."""
    return {}


@pytest.fixture
def run(material: Path, command: Command, monkeypatch, tmp_path: Path) -> Iterator[Callable[..., str]]:
    monkeypatch.setenv("RAY_CXR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(server, "serve", lambda *_: None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(line: str, find: Callable[[int, str], object]) -> str:
        words = [find(index, word) if word[0] in "@>" else word for index, word in enumerate(line.split())]
        with replace_ray():
            code, printed, err = command(*words)
        assert code == 0, err
        return printed

    yield call
    assert not list((tmp_path / "here").iterdir()), "an address was taken for a local path"


def list_names(folder: Path) -> set[str]:
    if folder.is_file():
        return {folder.name}
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
@pytest.mark.parametrize(("line", "place"), PAIRS, ids=lambda part: str(part).replace(" ", "_")[:60])
def test_each_path_of_each_command_works_in_a_bucket(
    run, uploaded: Bucket, material: Path, expected: dict[str, set[str]], tmp_path: Path, line: str, place: Any
) -> None:
    """The command writes the same files as with all paths on a disk."""
    base = f"out/{REAL.index(line)}-{place}"

    def find(index: int, word: str, *, is_far: bool) -> object:
        name = word[1:]
        if word[0] == "@":
            return uploaded(f"places/{name}") if is_far else material / name
        return uploaded(f"{base}/{name}") if is_far else tmp_path / name

    outputs = [(index, word[1:]) for index, word in enumerate(line.split()) if word[0] == ">"]
    if line not in expected:
        run(line, lambda index, word: find(index, word, is_far=False))
        expected[line] = set(itertools.chain.from_iterable(list_names(tmp_path / name) for _, name in outputs))
        for _, name in outputs:
            shutil.rmtree(tmp_path / name) if (tmp_path / name).is_dir() else (tmp_path / name).unlink()
    run(line, lambda index, word: find(index, word, is_far=place in ("all", index)))
    for index, name in outputs:
        if place in ("all", index):
            keys = [key for key in uploaded.keys(f"{base}/{name}") if not key.endswith("/")]
            prefix = f"{base}/" if "." in name else f"{base}/{name}/"
            assert {key.removeprefix(prefix) for key in keys} == expected[line]
        else:
            assert list_names(tmp_path / name) == expected[line]


#: Commands whose bucket does not answer: `!x` is there, and the second value names its argument.
DEAD = [
    ("prepare @m.parquet --out !set", "--out"),
    ("prepare !m.parquet --out set", "M.parquet"),
    ("prepare --manifest !m.parquet --out set", "--manifest"),
    ("train @prepared --out !run --set size=64", "--out"),
    ("train !prepared --out run", "PREPARED"),
    ("tune @prepared --out !study --set train.weights=none", "--out"),
    ("tune !prepared --out study", "PREPARED"),
    ("score @bundle --manifest @m.parquet --out !scores", "--out"),
    ("score !bundle --manifest @m.parquet --out scores", "BUNDLE"),
]


@pytest.mark.parametrize(("line", "name"), DEAD, ids=[line for line, _ in DEAD])
def test_a_bucket_that_does_not_answer_is_named_as_its_argument(
    line: str,
    name: str,
    prepared: Path,
    manifest: Path,
    tiny_bundle: Any,
    tmp_path: Path,
    command: Command,
    monkeypatch,
) -> None:
    """The message has the address of the argument, not that of a file inside it."""
    monkeypatch.setattr(stores, "MAX_ATTEMPTS", 1)
    monkeypatch.setenv("RAY_CXR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    stores._open_bucket.cache_clear()
    found = {"prepared": prepared, "m.parquet": manifest, "bundle": tiny_bundle.path}
    words = [
        word.replace("!", "s3://dead/a/") + "?endpoint_override=127.0.0.1:1&scheme=http" * (word[0] == "!")
        for word in line.split()
    ]
    with replace_ray():
        code, _, err = command(*(found[word[1:]] if word[0] == "@" else word for word in words))
    stores._open_bucket.cache_clear()
    (address,) = [word for word in words if word.startswith("s3://")]
    assert (code, err.count("\n")) == (1, 1), err
    assert err.startswith(f"ray-cxr {words[0]}: {name} {address}: cannot be "), err
