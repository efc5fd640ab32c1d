"""Prepared sets: what `prepare` writes, mostly without Ray, and how they are read back."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_dicom import file_of

from ray_cxr.config import InputSpec, PrepareSettings
from ray_cxr.data import manifest as manifests
from ray_cxr.data import manifest_builder, shards
from ray_cxr.data import prepared as prepared_sets
from ray_cxr.data.manifest import SCHEMA, read_manifest
from ray_cxr.data.prepared import PreparedSet, prepare
from ray_cxr.errors import ConfigError, OutputError, TableError
from ray_cxr.imaging.decode import load_image
from ray_cxr.storage import atomic
from ray_cxr.storage.archives import read_members
from ray_cxr.storage.paths import split_member
from ray_cxr.storage.run_folder import create_run

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
BROKEN = {"truncated": 1, "empty": 1, "not_an_image": 1, "missing": 1, "corrupt": 1, "blank": 1}
#: Of the sets from archives. All in one place, so that all of these tests share one decoder.
SETTINGS = PrepareSettings(sizes=(64,), rows_per_shard=7)


def list_shards(prepared: Path, size: int) -> list[Path]:
    return sorted((prepared / str(size)).glob("part-*.arrow"))


def read(shard: Path) -> pa.Table:
    with pa.OSFile(str(shard)) as source:
        return pa.ipc.open_file(source).read_all()


def read_rows(prepared: Path, size: int) -> list[dict[str, object]]:
    return [row for shard in list_shards(prepared, size) for row in read(shard).to_pylist()]


def contents(prepared: Path, size: int) -> dict[str, bytes]:
    return {shard.name: shard.read_bytes() for shard in list_shards(prepared, size)}


def shard_table(images: list[np.ndarray | None], splits: list[str], first: int = 0) -> pa.Table:
    """The table of a shard; None is an image that could not be read. Names count from `first`."""
    size = next(len(image) for image in images if image is not None)
    codes = ["corrupt" if image is None else None for image in images]
    columns = {name: [None] * len(images) for name in SCHEMA.names} | {"error_code": codes, "error": codes}
    columns["image_id"] = [f"{first + i:08d}_000.png" for i in range(len(images))]
    columns["split"] = splits
    columns["image"] = [None if image is None else image.tobytes() for image in images]
    return pa.table(columns, schema=shards.shard_schema(size))


def write_set(out: Path, tables: list[pa.Table]) -> Path:
    """A prepared folder with one shard per table; the last may be shorter than the others."""
    size = round(tables[0].schema.field("image").type.byte_width ** 0.5)
    (out / str(size)).mkdir(parents=True)
    rows = sum(map(len, tables))
    settings = {"kind": "prepare", "format": 2, "rows": rows, "rows_per_shard": len(tables[0])}
    (out / "settings.json").write_text(json.dumps(settings))
    (out / str(size) / "counts.json").write_text(json.dumps({"ok": rows}))
    for index, table in enumerate(tables):
        atomic.write_arrow(table, out / str(size) / shards.shard_name(index))
    return out


def noise(n: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size), dtype=np.uint8)


@pytest.fixture
def five_shards(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Fifteen training images of 32 pixels in five shards, and the same as an array."""
    images = noise(15)
    tables = [shard_table(list(images[i : i + 3]), ["train"] * 3, i) for i in range(0, 15, 3)]
    return write_set(tmp_path / "five", tables), images


def test_shards_hold_each_row_of_the_manifest_once(prepared: Path, manifest: Path) -> None:
    table = read_manifest(manifest)
    for size in (64, 96):
        rows = read_rows(prepared, size)
        assert [row["image_id"] for row in rows] == table["image_id"].to_pylist()
        counts = json.loads((prepared / str(size) / "counts.json").read_text(encoding="utf-8"))
        assert counts == {"ok": len(table) - 6, **BROKEN}
        assert Counter(row["error_code"] or "ok" for row in rows) == counts
        for row in rows:
            assert (row["image"] is None) == (row["error"] is not None) == (row["error_code"] is not None)
        for row in rows[:16:3]:
            assert row["image"] == load_image(row["path"], InputSpec(size=size)).tobytes()
    assert [len(read(shard)) for shard in list_shards(prepared, 64)][:-1] == [16] * (len(table) // 16)


def test_splits_have_the_labels_and_pixels_of_the_manifest(prepared: Path, manifest: Path) -> None:
    with pytest.raises(ConfigError, match="sizes 64, 96"):
        PreparedSet(prepared)
    data = PreparedSet(prepared, 64)
    assert data.split_info()["kind"] == "patient"
    table = read_manifest(manifest).to_pandas().set_index("image_id")
    seen = 0
    for split in ("train", "val", "test"):
        part = data.load(split)
        seen += len(part)
        rows = table.loc[part.image_ids]
        assert set(rows["split"]) == {split}
        np.testing.assert_array_equal(part.images[-1], load_image(rows["path"].iloc[-1], data.input_spec))
        np.testing.assert_array_equal(part.labels, rows[list(table.columns[8:])].fillna(-1).to_numpy(dtype=np.int8))
        assert part.patient_ids.tolist() == rows["patient_id"].tolist()
    assert seen == len(table) - 6


@pytest.mark.usefixtures("without_ray")
def test_resume_makes_what_is_missing(prepared: Path, manifest: Path, tmp_path: Path, command) -> None:
    out = shutil.copytree(prepared, tmp_path / "set")
    before, first, second = contents(out, 64), *list_shards(out, 64)[:2]
    second.unlink()
    (out / "64" / "counts.json").unlink()
    with pytest.raises(ConfigError, match="no complete size 64"):
        PreparedSet(out, 64)
    kept = first.stat().st_mtime_ns
    given = ["prepare", manifest, "--out", out, "--size", "64,96", "--set", "rows_per_shard=16"]
    code, said, err = command(*given)
    assert (code, f"size 64: {len(read_manifest(manifest)) - 6:,} images, 6 failed" in said) == (0, True), err
    total = len(read_manifest(manifest))
    assert [f"prepare: {done} of {total} images" in err for done in (total - 16, total)] == [True, True], err
    assert first.stat().st_mtime_ns == kept
    assert contents(out, 64) == before

    short, pathless = tmp_path / "short.parquet", tmp_path / "pathless.parquet"
    pq.write_table(read_manifest(manifest).slice(0, 20), short)
    pq.write_table(read_manifest(manifest).drop_columns("path"), pathless)
    for bad, word in (
        ([*given, "--set", "aspect=pad"], "aspect"),
        (["prepare", short, *given[2:]], "manifest_digest"),
        (["prepare", pathless, "--out", tmp_path / "new"], "--images"),
    ):
        code, _, err = command(*bad)
        assert (code, err.count("\n"), word in err) == (2, 1, True), err
    last = list_shards(out, 64)[-1]
    last.write_bytes(first.read_bytes())
    code, _, err = command(*given)
    assert (code, err.count("\n"), last.name in err) == (2, 1, True), err


@pytest.mark.usefixtures("without_ray")
def test_flags_of_dicom_headers_are_counted(manifest: Path, tmp_path: Path, command) -> None:
    knee = {"BodyPartExamined": "KNEE", "BurnedInAnnotation": "YES"}
    paths = [tmp_path / f"{i}.dcm" for i in range(5)]
    for path, fields, image in zip(paths, ({}, knee, {}, {"BurnedInAnnotation": "YES"}), noise(4, 64), strict=False):
        path.write_bytes(file_of(image, **fields))
    table = read_manifest(manifest).slice(0, 5)
    column = table.schema.get_field_index("path")
    manifests.write_manifest(table.set_column(column, "path", [[*map(str, paths)]]), tmp_path / "m.parquet")
    out = tmp_path / "set"
    given = ["prepare", tmp_path / "m.parquet", "--out", out, "--size", "64", "--set", "rows_per_shard=2"]
    counted = "size 64: 4 images, 1 failed: missing 1; flags: burned_in_annotation 2, not_frontal_chest 1"
    code, said, err = command(*given)
    assert (code, said.splitlines()[0]) == (0, counted), err
    assert json.loads((out / "64" / "counts.json").read_text()) == {"missing": 1, "ok": 4}
    found = [shards.read_shard(shard, 64, []) for shard in list_shards(out, 64)]
    assert [json.loads(shard.metadata.get(shards.FLAGS_KEY, "{}")) for shard in found] == [
        {"burned_in_annotation": 1, "not_frontal_chest": 1},
        {"burned_in_annotation": 1},
        {},
    ]
    flags = [{row: sorted(details.flags) for row, details in (shard.details or {}).items()} for shard in found]
    assert flags == [{1: ["burned_in_annotation", "not_frontal_chest"]}, {1: ["burned_in_annotation"]}, {}]

    before, (first, second, _) = contents(out, 64), list_shards(out, 64)
    second.unlink()
    code, said, err = command(*given)
    assert (code, said.splitlines()[0], contents(out, 64)) == (0, counted, before), err
    np.testing.assert_array_equal(PreparedSet(out).rows()["image_id"].to_numpy(), table["image_id"].to_numpy())

    atomic.write_arrow(read(first).replace_schema_metadata(None), first)  # as older versions wrote it
    code, said, err = command(*given)
    counted = "size 64: 4 images, 1 failed: missing 1; flags: burned_in_annotation 1"
    assert (code, said.splitlines()[0]) == (0, counted), err
    atomic.write_arrow(read(first).replace_schema_metadata({b"flags": b"{"}), first)
    code, _, err = command(*given)
    assert (code, err.count("\n"), f"{first.name}: damaged" in err) == (2, 1, True), err


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_file_that_takes_too_long_is_a_row(manifest: Path, tmp_path: Path) -> None:
    """64 million pixels in 20 ms."""
    Image.new("L", (8000, 8000)).save(tmp_path / "large.png", compress_level=1)
    table = read_manifest(manifest).slice(0, 1)
    table = table.set_column(table.schema.get_field_index("path"), "path", [[str(tmp_path / "large.png")]])
    manifests.write_manifest(table, tmp_path / "m.parquet")
    settings = PrepareSettings(sizes=(64,), decode_timeout_s=0.02)
    assert prepare(tmp_path / "m.parquet", tmp_path / "set", settings)[64].codes == Counter(decode_timeout=1)


@pytest.mark.usefixtures("without_ray")
def test_manifest_without_training_images_is_reported_before_the_work(manifest: Path, tmp_path: Path, command) -> None:
    table = read_manifest(manifest).slice(0, 2)
    column = table.schema.get_field_index("split")
    unsplit, out = tmp_path / "m.parquet", tmp_path / "set"
    manifests.write_manifest(table.set_column(column, "split", pa.nulls(2, pa.string())), unsplit)
    for more in ("--dry-run",), ():
        code, said, err = command("prepare", unsplit, "--out", out, "--size", "64", *more)
        assert code == 0, err
        assert str(unsplit) in said.splitlines()[0]
        assert "--split patient" in said.splitlines()[0]
        assert "next: ray-cxr train" not in said
    code, _, err = command("train", out, "--out", tmp_path / "run")
    assert (code, "--split patient" in err) == (2, True), err


def test_failed_images_and_other_splits_leave_the_right_neighbours(tmp_path: Path) -> None:
    images = noise(10)
    failed = {0, 2, 3, 9}
    splits = ["train", "train", "val", "train", "val", "train", "train", "val", "train", "train"]
    tables = [
        shard_table([None if i in failed else images[i] for i in part], [splits[i] for i in part], part[0])
        for part in (range(4), range(4, 8), range(8, 10))
    ]
    data = PreparedSet(write_set(tmp_path / "set", tables))
    for split in ("train", "val"):
        rows = [i for i in range(10) if splits[i] == split and i not in failed]
        part = data.load(split)
        assert part.image_ids.tolist() == [f"{i:08d}_000.png" for i in rows]
        assert part.patient_ids.tolist() == [None] * len(rows)
        assert np.isnan(part.ages).all()
        assert (part.labels == np.int8(-1)).all()
        np.testing.assert_array_equal(np.asarray(part.images), images[rows])
        assert data.usable(split)["image_id"].to_pylist() == part.image_ids.tolist()
    assert data.rows()["error_code"].to_pylist() == ["corrupt" if i in failed else None for i in range(10)]
    assert "image" not in data.rows().column_names
    with pytest.raises(TableError, match="no usable image in split 'test'"):
        data.load("test")


def test_shards_cut_from_larger_tables_are_read_right(tmp_path: Path) -> None:
    images = noise(12)
    whole = shard_table([None, *images[1:]], ["train"] * 12)
    pieces = pa.concat_tables([whole.slice(9, 2), whole.slice(0, 2)])
    folder = write_set(tmp_path / "set", [whole.slice(3, 4), pieces])
    with pa.OSFile(str(list_shards(folder, 32)[1])) as source:
        assert pa.ipc.open_file(source).num_record_batches == 1
    np.testing.assert_array_equal(PreparedSet(folder).load("train").images[:], images[[3, 4, 5, 6, 9, 10, 1]])


@pytest.mark.slow
@linux
def test_shards_are_closed_and_unmapped_when_done(five_shards, monkeypatch) -> None:
    def open_shards() -> list[str]:
        gc.collect()
        found = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(entry.readlink())
        return sorted(path.name for path in found if folder in path.parents)

    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    folder, images = five_shards
    data = PreparedSet(folder)
    tables = data.rows(), data.usable("train")
    pixels = data.load("train").images
    assert open_shards() == []
    for row in (0, 3, 1, 6):  # shards 0, 1, 0, 2: the least recently used is closed
        np.testing.assert_array_equal(pixels[row], images[row])
    assert open_shards() == ["part-00000.arrow", "part-00002.arrow"]
    assert str(folder) not in Path("/proc/self/maps").read_text(), f"mapped by {len(tables)} tables"
    del pixels
    assert open_shards() == []


def test_neighbours_are_read_at_once_and_long_reads_in_parts(five_shards, monkeypatch) -> None:
    folder, images = five_shards
    pixels = PreparedSet(folder).load("train").images
    reads: list[int] = []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, _read=os.preadv) -> int:
        reads.append(len(buffers[0]))
        return _read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    for rows, limit, expected in (
        (slice(1, 8), 2**30, [2 * 1024, 3 * 1024, 2 * 1024]),
        ([1, 0, 0], 2**30, [1024] * 3),  # not adjacent in this order
        (slice(0, 2), 700, [700, 700, 648]),
    ):
        reads.clear()
        monkeypatch.setattr(shards, "READ_BYTES", limit)
        np.testing.assert_array_equal(pixels[rows], images[rows])
        assert reads == expected


def test_shard_that_changes_after_it_was_opened_is_an_error(five_shards) -> None:
    folder, images = five_shards
    pixels = PreparedSet(folder).load("train").images
    pixels[0]
    first, second, third, *_ = list_shards(folder, 32)
    for shard, row in ((first, 2), (second, 3)):  # the one is open by now, the other is not
        os.truncate(shard, 2000)
        with pytest.raises(OutputError, match=rf"part-0000{row // 3}\.arrow: .* `ray-cxr prepare`"):
            pixels[row]
    atomic.write_arrow(shard_table(list(images[:9]), ["train"] * 9), third)  # longer: its images lie elsewhere
    with pytest.raises(OutputError, match=r"part-00002\.arrow: .* `ray-cxr prepare`"):
        pixels[6]
    third.unlink()
    with pytest.raises(OutputError, match=r"part-00002\.arrow: .*No such file .* `ray-cxr prepare`"):
        pixels[np.array([9, 6])]
    np.testing.assert_array_equal(pixels[9], images[9])


def test_damaged_shard_is_refused(five_shards) -> None:
    folder, _ = five_shards
    shard = list_shards(folder, 32)[1]
    good, table = shard.read_bytes(), read(shard)

    def assert_is_refused(message: str) -> None:
        data = PreparedSet(folder)
        for use in (data.rows, lambda: data.usable("train"), lambda: data.load("train")):
            with pytest.raises(OutputError, match=rf"part-00001\.arrow: {message}.*$"):
                use()

    ends = [np.array([0, 16, 32, end], np.int32).tobytes() for end in (48, 2**30)]  # of the three names
    assert good.count(ends[0]) == 1
    renamed, overflowing = good.replace(b"image", b"imagf"), good.replace(*ends)
    for damaged in (b"", good[:-1], good[:1500], good[:8], b"not a shard" * 100, renamed, overflowing):
        shard.write_bytes(damaged)
        assert_is_refused("damaged or not a shard")
    two_batches = table.to_batches(max_chunksize=2)
    for options, written in (({}, two_batches), ({"compression": "zstd"}, table.to_batches())):
        with pa.ipc.new_file(str(shard), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            for batch in written:
                writer.write_batch(batch)
        assert_is_refused("damaged or not a shard")
    shard.unlink()
    assert_is_refused("missing")


def test_other_formats_and_folders_are_refused(five_shards, manifest: Path, tmp_path: Path) -> None:
    folder, _ = five_shards
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    (folder / "settings.json").write_text(json.dumps({**settings, "format": 1}))
    with pytest.raises(ConfigError, match="format 1, but this version reads formats 2 and 3"):
        PreparedSet(folder)
    _, wanted = prepared_sets.check(manifest, tmp_path / "new", PrepareSettings())
    create_run(tmp_path / "old", {**wanted, "format": 1})
    with pytest.raises(OutputError, match=r"old: .*format 1 \(now 2\)"):
        prepared_sets.check(manifest, tmp_path / "old", PrepareSettings())
    for text in ("[]", "no", '{"kind": "score", "format": 1}'):
        (folder / "settings.json").write_text(text)
        with pytest.raises(ConfigError, match="not a prepared folder"):
            PreparedSet(folder)


def test_threads_and_pickled_copies_read_the_same(five_shards, monkeypatch) -> None:
    monkeypatch.setattr(shards, "OPEN_SHARDS", 1)
    folder, images = five_shards
    monkeypatch.chdir(folder.parent)
    pixels = PreparedSet(folder.name).load("train").images
    monkeypatch.chdir("/")
    choices = [np.random.default_rng(i).integers(0, 15, 40) for i in range(100)]
    with ThreadPoolExecutor(4) as pool:
        for rows, got in zip(choices, pool.map(pixels.__getitem__, choices), strict=True):
            np.testing.assert_array_equal(got, images[rows])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pixels))[::-1], images[::-1])


@pytest.fixture(scope="module")
def with_gaps(tmp_path_factory) -> tuple[shards.Pixels, np.ndarray]:
    """Images of several shards with gaps between them, and the same as an array."""
    images = noise(40)
    failed = {0, 4, 5, 13, 20, 21, 22, 39}
    tables = [
        shard_table([None if i in failed else images[i] for i in range(first, first + 8)], ["val"] * 8, first)
        for first in range(0, 40, 8)
    ]
    folder = write_set(tmp_path_factory.mktemp("with_gaps") / "set", tables)
    return PreparedSet(folder).load("val").images, images[[i for i in range(40) if i not in failed]]


ROW = st.integers(-32, 31)
END = st.none() | st.integers(-50, 50)
ROWS = st.lists(ROW, max_size=50).map(lambda rows: np.array(rows, dtype=np.int64))
SLICES = st.builds(slice, END, END, st.none() | st.integers(-9, 9).filter(bool))


@given(choice=ROW | ROWS | SLICES)
def test_any_choice_of_rows_is_numpys(with_gaps, choice) -> None:
    pixels, images = with_gaps
    got = pixels[choice]
    np.testing.assert_array_equal(got, images[choice])
    assert got.dtype == np.uint8
    got[...] = 0  # the caller's own: the next read does not see it
    np.testing.assert_array_equal(pixels[choice], images[choice])


def test_pixels_convert_to_an_array(with_gaps) -> None:
    pixels, images = with_gaps
    assert (len(pixels), pixels.shape, np.asarray(pixels, dtype=np.float32).dtype) == (32, images.shape, np.float32)
    with pytest.raises(ValueError, match="always a copy"):
        np.asarray(pixels, copy=False)
    for rows in (32, -33, np.array([0, 32])):
        with pytest.raises(IndexError):
            pixels[rows]


@pytest.fixture(scope="module")
def download(phantoms, manifest: Path, tmp_path_factory) -> Path:
    """The phantoms in two archives, neither in the table's order, a few as single files, and the manifest of these."""
    files = [Path(path) for path in read_manifest(manifest)["path"].to_pylist() if path and Path(path).exists()]
    folder = tmp_path_factory.mktemp("download")
    for name, mode, inside in (
        ("images_001.tar.gz", "w:gz", files[:30][::-1]),
        ("images_002.tar", "w", files[30:-5][::2] + files[30:-5][1::2]),
    ):
        with tarfile.open(folder / name, mode) as tar:
            for file in inside:
                tar.add(file, f"images/{file.name}")
    for file in files[-5:]:
        shutil.copy(file, folder)
    made, report = manifest_builder.build_manifest([str(phantoms.table)], images=str(folder), split="patient", seed=1)
    assert report.images_found == len(files)
    # One that no archive holds.
    paths = made["path"].to_pylist()
    paths[paths.index(None)] = f"{folder}/images_001.tar.gz::images/late.png"
    made = made.set_column(made.column_names.index("path"), "path", pa.array(paths, pa.string()))
    manifests.write_manifest(made, folder / "m.parquet")
    return folder


@pytest.fixture(scope="module")
def archive_set(download: Path, tmp_path_factory) -> Path:
    """The set of `download`, which tests must not change."""
    from conftest import replace_ray

    out = tmp_path_factory.mktemp("archive_set") / "set"
    with replace_ray():
        counts = prepare(download / "m.parquet", out, SETTINGS)
    assert counts[64].codes == Counter(ok=len(read_manifest(download / "m.parquet")) - 6, **BROKEN)
    return out


@pytest.fixture
def copy(archive_set: Path, tmp_path: Path) -> Path:
    return shutil.copytree(archive_set, tmp_path / "copy")


def by_id(prepared: Path) -> dict[str, dict[str, object]]:
    rows = read_rows(prepared, 64)
    found = {str(row["image_id"]): {**row, "path": None, "split": None} for row in rows}
    assert len(found) == len(rows), "each row once"
    return found


def test_archives_give_the_rows_of_their_files(download: Path, archive_set: Path, prepared: Path) -> None:
    found, expected = by_id(archive_set), by_id(prepared)
    (late,) = (image_id for image_id, row in found.items() if row["error"] == "the archive holds no such member")
    assert expected[late]["error_code"] == "missing"
    expected[late]["error"] = found[late]["error"]
    assert found == expected
    inside = next(row for row in read_rows(archive_set, 64) if row["image"] and "::" in row["path"])
    assert load_image(inside["path"], InputSpec(size=64)).tobytes() == inside["image"]
    # No shard holds rows of two archives, and its rows are in the order of their archive.
    members: dict[str, list[str]] = {}
    for shard in list_shards(archive_set, 64):
        parts = [split_member(path) for path in read(shard)["path"].to_pylist()]
        assert len({part and part[0] for part in parts}) == 1
        for part in filter(None, parts):
            members.setdefault(part[0], []).append(part[1])
    assert len(members) == 2
    for archive, inside in members.items():
        with tarfile.open(archive) as tar:
            order = {name: i for i, name in enumerate(tar.getnames())}
        assert inside == sorted(inside, key=lambda name: order.get(name, len(order)))  # the one it lacks comes last

    source, data = read_manifest(download / "m.parquet"), PreparedSet(archive_set)
    frozen = pq.ParquetFile(archive_set / "manifest.parquet").metadata
    lengths = [len(read(shard)) for shard in list_shards(archive_set, 64)]
    assert [frozen.row_group(i).num_rows for i in range(frozen.num_row_groups)] == lengths
    settings = json.loads((archive_set / "settings.json").read_text(encoding="utf-8"))
    digest = manifests.digest(source)
    assert [settings[key] for key in ("format", "shards", "manifest_digest")] == [3, len(lengths), digest]
    assert data.split_info() == manifests.split_info(source)


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("lost", [[4, 5], [2, 6], range(99)], ids=["one archive", "two archives", "all"])
def test_resume_reads_archives_for_missing_rows_only(download: Path, copy: Path, lost, monkeypatch) -> None:
    before = contents(copy, 64)
    expected: Counter[str] = Counter()
    for shard in [shard for i, shard in enumerate(list_shards(copy, 64)) if i in lost]:
        rows = read(shard)
        if inside := split_member(rows["path"][0].as_py()):
            expected[Path(inside[0]).name] += len(rows)
        shard.unlink()
    wanted_rows: list[tuple[str, int]] = []

    def count_rows(archive: str, wanted: set[str], _read=read_members) -> Iterator[object]:
        wanted_rows.append((Path(archive).name, len(wanted)))
        return _read(archive, wanted)

    monkeypatch.setattr(prepared_sets, "read_members", count_rows)
    prepare(download / "m.parquet", copy, SETTINGS)
    assert contents(copy, 64) == before
    assert dict(wanted_rows) == expected
    wanted_rows.clear()
    prepare(download / "m.parquet", copy, SETTINGS)
    assert wanted_rows == []


@pytest.mark.usefixtures("without_ray")
def test_second_size_is_added_to_an_unfinished_one(download: Path, copy: Path) -> None:
    before = contents(copy, 64)
    list_shards(copy, 64)[3].unlink()
    prepare(download / "m.parquet", copy, SETTINGS.replace(sizes=(64, 96)))
    assert contents(copy, 64) == before
    ids = [[row["image_id"] for row in read_rows(copy, size)] for size in (64, 96)]
    assert ids[0] == ids[1]


@pytest.mark.usefixtures("without_ray")
def test_truncated_archive_gives_its_rows_and_errors_for_the_rest(download: Path, copy: Path) -> None:
    archive = download / "images_002.tar"
    whole = archive.read_bytes()
    shutil.rmtree(copy / "64")
    try:
        archive.write_bytes(whole[: len(whole) // 2])
        codes = prepare(download / "m.parquet", copy, SETTINGS)[64].codes
    finally:
        archive.write_bytes(whole)
    assert codes.total() == len(read_manifest(download / "m.parquet"))
    assert 5 < sum(row["error"] == "the archive is incomplete" for row in read_rows(copy, 64)) < 30
    assert codes["truncated"] > 5


@pytest.mark.usefixtures("without_ray")
def test_shards_with_other_rows_of_their_archive_are_refused(download: Path, copy: Path) -> None:
    first, *_, one, other, last = list_shards(copy, 64)
    last.unlink()
    for source, target in ((one, other), (first, one)):
        target.write_bytes(source.read_bytes())
        with pytest.raises(OutputError, match=r"64: .*part-.* remove them"):
            prepare(download / "m.parquet", copy, SETTINGS)


@pytest.mark.usefixtures("without_ray")
def test_images_of_one_shard_at_most_are_in_memory(download: Path, tmp_path: Path, monkeypatch) -> None:
    """An archive is read in one pass, and its rows fill its shards as they come."""
    waiting = []
    real = shards.ShardWriter.add

    def add(self, row, outcome) -> None:
        real(self, row, outcome)
        waiting.append(len(self._images))

    monkeypatch.setattr(shards.ShardWriter, "add", add)
    prepare(download / "m.parquet", tmp_path / "set", SETTINGS)
    assert max(waiting) == 6


READ_ALL = """
import sys
import numpy as np
from ray_cxr.data.prepared import PreparedSet
images = PreparedSet(sys.argv[1]).load("train").images
order = np.random.default_rng(0).permutation(len(images))
for start in range(0, len(order), 32):
    images[order[start : start + 32]]
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


@linux
@pytest.mark.long
def test_peak_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """20,000 images of 64 pixels are 78 MiB; the tables of names and labels may grow, by some 6 MiB."""
    shard = shard_table(list(noise(500, size=64)), ["train"] * 500)
    peaks = []
    for n_shards in (1, 40):
        folder = write_set(tmp_path / str(n_shards), [shard] * n_shards)
        done = subprocess.run([sys.executable, "-c", READ_ALL, folder], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 20, f"peaks of {peaks} MiB"


@pytest.mark.ray
def test_ray_prepares_the_shards_of_one_process(shared_ray, download, archive_set, tmp_path, command) -> None:
    """The other tests in this file rely on this."""
    out = tmp_path / "set"
    given = ("prepare", download / "m.parquet", "--out", out, "--size", "64", "--set", "rows_per_shard=7")
    code, said, err = command(*given)
    assert (code, "6 failed" in said) == (0, True), err
    assert contents(out, 64) == contents(archive_set, 64)
