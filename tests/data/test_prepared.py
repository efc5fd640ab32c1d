"""Prepared sets, made by Ray or by hand, and read back."""

from __future__ import annotations

import gc
import hashlib
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

from ray_cxr.config import InputSpec, PrepareSettings
from ray_cxr.data import archives, atomic, imaging
from ray_cxr.data import manifest as manifests
from ray_cxr.data import prepared as prepared_sets
from ray_cxr.data.manifest import SCHEMA, read_manifest
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.data.sandbox import Decoder
from ray_cxr.errors import ConfigError, OutputError, TableError

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
BROKEN = {"truncated": 1, "empty": 1, "not_an_image": 1, "missing": 1, "corrupt": 1, "blank": 1}


def shards(prepared: Path, size: int) -> list[Path]:
    return sorted((prepared / str(size)).glob("part-*.arrow"))


def read(shard: Path) -> pa.Table:
    with pa.OSFile(str(shard)) as source:
        return pa.ipc.open_file(source).read_all()


def shard_table(images: list[np.ndarray | None], splits: list[str], first: int = 0) -> pa.Table:
    """The table of a shard; None is a picture that could not be read. Names count from `first`."""
    size = next(len(image) for image in images if image is not None)
    codes = ["corrupt" if image is None else None for image in images]
    columns = {name: [None] * len(images) for name in SCHEMA.names}
    columns |= {
        "image_id": [f"{first + i:08d}_000.png" for i in range(len(images))],
        "split": splits,
        "image": [None if image is None else image.tobytes() for image in images],
        "error_code": codes,
        "error": codes,
    }
    return pa.table(columns, schema=prepared_sets.shard_schema(size))


def write_set(out: Path, tables: list[pa.Table]) -> Path:
    """A prepared folder with one shard per table; the last may be shorter than the others."""
    size = round(tables[0].schema.field("image").type.byte_width ** 0.5)
    (out / str(size)).mkdir(parents=True)
    rows = sum(map(len, tables))
    settings = {"kind": "prepare", "format": 2, "rows": rows, "rows_per_shard": len(tables[0])}
    (out / "settings.json").write_text(json.dumps(settings))
    (out / str(size) / "counts.json").write_text(json.dumps({"ok": rows}))
    for index, table in enumerate(tables):
        atomic.write_arrow(table, out / str(size) / prepared_sets.shard_name(index))
    return out


def noise(n: int, size: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size), dtype=np.uint8)


def open_shards() -> list[str]:
    """The shards that this process has open."""
    gc.collect()
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            names.append(os.path.basename(os.readlink(entry)))
        except FileNotFoundError:
            continue
    return sorted(name for name in names if name.endswith(".arrow"))


@pytest.fixture
def five(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Fifteen training images of 32 pixels in five shards, and the same as an array."""
    images = noise(15)
    tables = [shard_table(list(images[i : i + 3]), ["train"] * 3, i) for i in range(0, 15, 3)]
    return write_set(tmp_path / "five", tables), images


def prepare_here(manifest: Path, out: Path, settings: PrepareSettings) -> dict[int, Counter[str]]:
    """What `prepare` does, with its tasks one after another in this process."""
    table, wanted = prepared_sets.check(manifest, out, settings)
    units = archives.units(table["path"], settings.rows_per_shard)
    prepared_sets.begin(out, wanted)
    if not (out / "manifest.parquet").exists():
        prepared_sets.freeze(table, out / "manifest.parquet", units)
    for size in settings.sizes:
        (out / str(size)).mkdir(exist_ok=True)
    there = [{path.name for path in (out / str(size)).iterdir()} for size in settings.sizes]
    for unit in units:
        task = prepared_sets._task(unit, there)
        if task:
            prepared_sets._prepare(task, str(out), settings)
    ranges = [one for unit in units for one in unit.ranges]
    return {size: prepared_sets._count(out, size, ranges) for size in settings.sizes}


@pytest.fixture(scope="module")
def by_hand(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms at 64 pixels in shards of 7, made by what runs in Ray's tasks, without Ray."""
    out = tmp_path_factory.mktemp("by_hand") / "set"
    counts = prepare_here(manifest, out, PrepareSettings(sizes=(64,), rows_per_shard=7))
    assert counts == {64: Counter(ok=len(read_manifest(manifest)) - 6, **BROKEN)}
    return out


@pytest.mark.ray
def test_one_row_per_manifest_row_in_its_order_and_every_failure_with_its_code(prepared: Path, manifest: Path) -> None:
    table = read_manifest(manifest)
    for size in (64, 96):
        ids = [i for shard in shards(prepared, size) for i in read(shard)["image_id"].to_pylist()]
        assert ids == table["image_id"].to_pylist()
        counts = json.loads((prepared / str(size) / "counts.json").read_text())
        assert {code: n for code, n in counts.items() if code != "ok"} == BROKEN
        assert counts["ok"] == len(table) - 6
    assert max(len(read(shard)) for shard in shards(prepared, 64)) == 16


@pytest.mark.ray
def test_pixels_are_those_that_imaging_gives(prepared: Path) -> None:
    for size in (64, 96):
        table = read(shards(prepared, size)[0])
        assert table.schema.field("image").type.byte_width == size * size
        for path, stored in zip(table["path"].to_pylist(), table["image"].to_pylist(), strict=True):
            expected = imaging.load(path, InputSpec(size=size))
            assert stored == expected.tobytes()


@pytest.mark.ray
def test_a_split_is_read_whole_and_in_order(prepared: Path, manifest: Path) -> None:
    data = PreparedSet(prepared, 64)
    assert data.split_info()["kind"] == "patient"
    table = read_manifest(manifest).to_pandas()
    seen = 0
    for split in ("train", "val", "test"):
        part = data.load(split)
        seen += len(part)
        assert part.images.shape == (len(part), 64, 64)
        row = table[table["image_id"] == part.image_ids[-1]].iloc[0]
        assert row["split"] == split
        np.testing.assert_array_equal(part.images[-1], imaging.load(row["path"], data.input_spec))
        np.testing.assert_array_equal(part.labels[-1], row[list(table.columns[9:])].to_numpy(dtype=np.int8))
        assert part.patient_ids.tolist() == table.set_index("image_id").loc[part.image_ids, "patient_id"].tolist()
    assert seen == len(table) - 6


@pytest.mark.ray
def test_continues_where_a_shard_is_absent_and_leaves_the_others_alone(prepared: Path, manifest: Path, command) -> None:
    first, second, *_ = shards(prepared, 64)
    before = {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in (first, second)
    }
    second.unlink()
    (prepared / "64" / "counts.json").unlink()
    with pytest.raises(ConfigError, match="no complete size 64"):
        PreparedSet(prepared, 64)
    code, out, err = command("prepare", manifest, "--out", prepared, "--size", "64,96", "--set", "rows_per_shard=16")
    assert code == 0, err
    assert f"size 64: {len(read_manifest(manifest)) - 6:,} images, 6 failed" in out
    assert first.stat().st_mtime_ns == before[first][0]
    assert hashlib.sha256(second.read_bytes()).hexdigest() == before[second][1]


@pytest.mark.ray
def test_other_settings_or_another_manifest_are_refused(
    prepared: Path, manifest: Path, tmp_path: Path, command
) -> None:
    code, _, err = command("prepare", manifest, "--out", prepared, "--size", "64", "--set", "aspect=pad")
    assert (code, err.count("\n")) == (2, 1)
    assert "aspect stretch (now pad)" in err
    other = tmp_path / "other.parquet"
    pq.write_table(read_manifest(manifest).slice(0, 20), other)
    code, _, err = command("prepare", other, "--out", prepared, "--set", "rows_per_shard=16")
    assert code == 2
    assert "manifest_digest" in err


def test_a_manifest_without_paths_is_refused(manifest: Path, tmp_path: Path, command) -> None:
    table = read_manifest(manifest).drop_columns("path")
    pq.write_table(table, tmp_path / "m.parquet")
    code, _, err = command("prepare", tmp_path / "m.parquet", "--out", tmp_path / "out")
    assert code == 2
    assert "--images" in err


@pytest.mark.ray
def test_which_size_must_be_said_when_there_are_two(prepared: Path) -> None:
    with pytest.raises(ConfigError, match="sizes 64, 96"):
        PreparedSet(prepared)


def test_any_choice_of_rows_gives_the_pixels_of_imaging(by_hand: Path, manifest: Path) -> None:
    data = PreparedSet(by_hand)
    table = read_manifest(manifest).to_pandas().set_index("image_id")
    part = data.load("train")
    n = len(part)
    expected = np.stack([imaging.load(path, data.input_spec) for path in table.loc[part.image_ids, "path"]])
    assert n > 14, "more than one shard"
    assert (part.images.shape, part.images.dtype, len(part.images)) == (expected.shape, np.uint8, n)
    rng = np.random.default_rng(0)
    for rows in (
        rng.permutation(n),
        np.array([3, 3, 0, n - 1, 3]),
        np.array([-1, -n]),
        np.arange(0),
        slice(2, 9),
        slice(None, None, -2),
        slice(5, 5),
        0,
        np.int64(n - 1),
        -1,
    ):
        got = part.images[rows]
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, expected[rows])
    np.testing.assert_array_equal(np.asarray(part.images), expected)
    assert np.asarray(part.images, dtype=np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="always a copy"):
        np.asarray(part.images, copy=False)
    for rows in (n, -n - 1, np.array([0, n])):
        with pytest.raises(IndexError):
            part.images[rows]


def test_what_is_read_is_the_callers_own(five: tuple[Path, np.ndarray]) -> None:
    folder, images = five
    pixels = PreparedSet(folder).load("train").images
    pixels[np.arange(15)][:] = 0
    np.testing.assert_array_equal(pixels[:], images)


def test_pictures_that_failed_and_other_splits_leave_the_right_neighbours(tmp_path: Path) -> None:
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
        assert part.labels.dtype == np.int8
        assert (part.labels == -1).all()
        np.testing.assert_array_equal(np.asarray(part.images), images[rows])
        assert data.usable(split)["image_id"].to_pylist() == part.image_ids.tolist()
    assert data.rows()["error_code"].to_pylist() == ["corrupt" if i in failed else None for i in range(10)]
    assert "image" not in data.rows().column_names
    with pytest.raises(TableError, match="no usable image in split 'test'"):
        data.load("test")


def test_places_are_right_in_a_shard_cut_from_a_larger_table_and_in_one_of_pieces(tmp_path: Path) -> None:
    images = noise(12)
    whole = shard_table([None, *images[1:]], ["train"] * 12)
    cut = whole.slice(3, 4)
    pieces = pa.concat_tables([whole.slice(9, 2), whole.slice(0, 2)])
    folder = write_set(tmp_path / "set", [cut, pieces])
    with pa.OSFile(str(shards(folder, 32)[1])) as source:
        assert pa.ipc.open_file(source).num_record_batches == 1
    np.testing.assert_array_equal(PreparedSet(folder).load("train").images[:], images[[3, 4, 5, 6, 9, 10, 1]])


def test_only_so_many_shards_are_open_at_once(five: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_sets, "OPEN_SHARDS", 2)
    folder, images = five
    opened: list[str] = []
    monkeypatch.setattr(
        os, "open", lambda path, *rest, _open=os.open: opened.append(Path(path).name) or _open(path, *rest)
    )
    pixels = PreparedSet(folder).load("train").images
    opened.clear()
    for row in (0, 3, 1, 6, 2, 3):  # shards 0, 1, 0, 2, 0, 1
        np.testing.assert_array_equal(pixels[row], images[row])
    assert opened == [f"part-{i:05d}.arrow" for i in (0, 1, 2, 1)], "the least recently used is closed"
    rows = np.random.default_rng(0).integers(0, 15, 200)
    np.testing.assert_array_equal(pixels[rows], images[rows])


@linux
def test_shards_are_closed_when_done(five: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_sets, "OPEN_SHARDS", 2)
    folder, images = five
    data = PreparedSet(folder)
    data.rows()
    split = data.load("train")
    assert open_shards() == []
    pixels = split.images
    pixels[np.arange(15)]
    assert open_shards() == ["part-00003.arrow", "part-00004.arrow"]
    pixels.close()
    assert open_shards() == []
    np.testing.assert_array_equal(pixels[4], images[4])
    assert open_shards() == ["part-00001.arrow"]
    del pixels, split
    assert open_shards() == []


@linux
def test_no_table_keeps_a_shard_mapped(five: tuple[Path, np.ndarray]) -> None:
    data = PreparedSet(five[0])
    kept = data.rows(), data.usable("train"), data.load("train")
    kept[2].images[:]
    assert "part-00000.arrow" not in Path("/proc/self/maps").read_text()


def test_neighbours_are_read_at_once_and_long_reads_in_parts(
    five: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, images = five
    pixels = PreparedSet(folder).load("train").images
    reads: list[int] = []

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, _read=os.preadv) -> int:
        reads.append(len(buffers[0]))
        return _read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    np.testing.assert_array_equal(pixels[1:8], images[1:8])
    assert reads == [2 * 1024, 3 * 1024, 2 * 1024]
    reads.clear()
    np.testing.assert_array_equal(pixels[[1, 0, 0]], images[[1, 0, 0]])
    assert reads == [1024] * 3, "not adjacent in this order"
    reads.clear()
    monkeypatch.setattr(prepared_sets, "READ_BYTES", 700)
    np.testing.assert_array_equal(pixels[0:2], images[0:2])
    assert reads == [700, 700, 648]


def test_a_shard_cut_short_replaced_or_removed_is_an_error_whenever_it_happens(five: tuple[Path, np.ndarray]) -> None:
    folder, images = five
    pixels = PreparedSet(folder).load("train").images
    pixels[0]
    first, second, third, *_ = shards(folder, 32)
    for shard in (first, second):  # the one is open by now, the other is not
        os.truncate(shard, 2000)
    for row in (2, 3):
        with pytest.raises(OutputError, match=rf"part-0000{row // 3}\.arrow: is not as long .* `ray-cxr prepare`"):
            pixels[row]
    atomic.write_arrow(shard_table(list(images[:9]), ["train"] * 9), third)  # longer: its images lie elsewhere
    with pytest.raises(OutputError, match=r"part-00002\.arrow: is not as long"):
        pixels[6]
    third.unlink()
    with pytest.raises(OutputError, match=r"part-00002\.arrow: cannot be read: No such file .* `ray-cxr prepare`"):
        pixels[np.array([9, 6])]
    np.testing.assert_array_equal(pixels[9], images[9])


@pytest.mark.parametrize("use", ["load", "usable", "rows"])
def test_a_shard_that_is_no_shard_is_refused(five: tuple[Path, np.ndarray], use: str) -> None:
    folder, _ = five
    shard = shards(folder, 32)[1]
    good = shard.read_bytes()
    table = read(shard)

    def refused(message: str) -> None:
        data = PreparedSet(folder)
        with pytest.raises(OutputError, match=message) as caught:
            getattr(data, use)(*["train"] * (use != "rows"))
        assert "part-00001.arrow: " in str(caught.value)
        assert "\n" not in str(caught.value)

    ends = [np.array([0, 16, 32, end], np.int32).tobytes() for end in (48, 2**30)]  # of the three names
    assert good.count(ends[0]) == 1
    for damaged in (
        b"",
        good[:-1],
        good[:1500],
        good[:8],
        b"not a shard" * 100,
        good.replace(b"image", b"imagf"),
        good.replace(*ends),
    ):
        shard.write_bytes(damaged)
        refused("is damaged or not a shard; remove it and run `ray-cxr prepare` again")
    batches = table.to_batches(max_chunksize=2)
    for options, written in (({}, batches), ({"compression": "zstd"}, table.to_batches())):
        with pa.ipc.new_file(str(shard), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            for batch in written:
                writer.write_batch(batch)
        refused("is damaged or not a shard")
    shard.unlink()
    refused("is missing; run `ray-cxr prepare` again to make it")


def test_format_1_is_refused(five: tuple[Path, np.ndarray], manifest: Path, tmp_path: Path) -> None:
    folder, _ = five
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "format": 1}))
    with pytest.raises(ConfigError) as caught:
        PreparedSet(folder)
    assert str(caught.value) == (
        f"{folder}: has format 1, and this version reads formats 2 and 3; "
        "run `ray-cxr prepare` again into another folder"
    )
    _, wanted = prepared_sets.check(manifest, tmp_path / "new", PrepareSettings())
    prepared_sets.begin(tmp_path / "old", {**wanted, "format": 1})
    with pytest.raises(OutputError) as refused:
        prepared_sets.check(manifest, tmp_path / "old", PrepareSettings())
    assert str(refused.value) == f"{tmp_path / 'old'}: was begun with another format 1 (now 2); name another --out"


@pytest.mark.parametrize("settings", ["[]", "no", '{"kind": "score", "format": 1}'])
def test_another_folder_is_no_prepared_one(tmp_path: Path, settings: str) -> None:
    (tmp_path / "settings.json").write_text(settings)
    with pytest.raises(ConfigError, match="not a prepared folder; make one with `ray-cxr prepare`"):
        PreparedSet(tmp_path)


def test_threads_and_other_processes_read_the_same(
    five: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_sets, "OPEN_SHARDS", 1)
    folder, images = five
    monkeypatch.chdir(folder.parent)
    pixels = PreparedSet("five").load("train").images
    monkeypatch.chdir("/")
    choices = [np.random.default_rng(i).integers(0, 15, 40) for i in range(100)]
    with ThreadPoolExecutor(4) as pool:
        for rows, got in zip(choices, pool.map(pixels.__getitem__, choices), strict=True):
            np.testing.assert_array_equal(got, images[rows])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pixels))[::-1], images[::-1])


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[prepared_sets.Pixels, np.ndarray]:
    """Images of several shards with gaps between them, and the same as an array."""
    images = noise(40)
    gone = {0, 4, 5, 13, 20, 21, 22, 39}
    tables = [
        shard_table([None if i in gone else images[i] for i in range(first, first + 8)], ["val"] * 8, first)
        for first in range(0, 40, 8)
    ]
    folder = write_set(tmp_path_factory.mktemp("many") / "set", tables)
    return PreparedSet(folder).load("val").images, images[[i for i in range(40) if i not in gone]]


WHERE = st.integers(-32, 31)
END = st.none() | st.integers(-50, 50)
CHOICES = (
    WHERE
    | st.lists(WHERE, max_size=50).map(lambda rows: np.array(rows, dtype=np.int64))
    | st.builds(slice, END, END, st.none() | st.integers(-9, 9).filter(bool))
)


@given(choice=CHOICES)
def test_rows_are_taken_as_numpy_takes_them(many: tuple[prepared_sets.Pixels, np.ndarray], choice) -> None:
    pixels, images = many
    assert len(pixels) == len(images) == 32
    np.testing.assert_array_equal(pixels[choice], images[choice])


READ_ALL = """
import sys
import numpy as np
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.data.sandbox import Decoder
images = PreparedSet(sys.argv[1]).load("train").images
order = np.random.default_rng(0).permutation(len(images))
for start in range(0, len(order), 32):
    images[order[start : start + 32]]
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


@linux
def test_peak_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """20,000 images of 64 pixels are 78 MiB; what may grow is the tables of names and labels, some 6 MiB."""
    shard = shard_table(list(noise(500, size=64)), ["train"] * 500)
    peaks = []
    for n_shards in (1, 40):
        folder = write_set(tmp_path / str(n_shards), [shard] * n_shards)
        done = subprocess.run([sys.executable, "-c", READ_ALL, folder], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 15, f"peaks of {peaks} MiB"


# ---------------------------------------------------------------- archives


def tar_up(archive: Path, files: list[Path], *, mode: str = "w:gz") -> None:
    """Files under `images/`, in the order given."""
    with tarfile.open(archive, mode) as tar:
        for file in files:
            tar.add(file, f"images/{file.name}")


@pytest.fixture
def archived(phantoms, manifest: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The phantoms in two archives, neither in the table's order, and a few as single files; and their manifest."""
    table = read_manifest(manifest)
    files = [Path(path) for path in table["path"].to_pylist() if path and Path(path).exists()]
    folder = tmp_path / "download"
    folder.mkdir()
    tar_up(folder / "images_001.tar.gz", files[:30][::-1])
    tar_up(folder / "images_002.tar", files[30:-5][::2] + files[30:-5][1::2], mode="w")
    for file in files[-5:]:
        (folder / file.name).write_bytes(file.read_bytes())
    made, report = manifests.build_manifest([str(phantoms.table)], images=str(folder), split="patient", seed=1)
    assert report.images_found == len(files)
    # One that no archive holds, for it came late.
    paths = made["path"].to_pylist()
    paths[paths.index(None)] = f"{folder}/images_001.tar.gz::images/late.png"
    made = made.set_column(made.column_names.index("path"), "path", pa.array(paths, pa.string()))
    manifests.write_manifest(made, tmp_path / "m.parquet")
    return folder, tmp_path / "m.parquet"


def contents(prepared: Path, size: int) -> dict[str, bytes]:
    return {shard.name: shard.read_bytes() for shard in shards(prepared, size)}


def by_id(prepared: Path, size: int) -> dict[str, dict[str, object]]:
    rows = [row for shard in shards(prepared, size) for row in read(shard).to_pylist()]
    found = {str(row["image_id"]): {**row, "path": None, "split": None} for row in rows}
    assert len(found) == len(rows), "each row once"
    return found


def test_pictures_from_archives_are_those_from_files(
    archived: tuple[Path, Path], by_hand: Path, tmp_path: Path
) -> None:
    _, made = archived
    out = tmp_path / "set"
    counts = prepare_here(made, out, PrepareSettings(sizes=(64,), rows_per_shard=7))
    assert counts[64] == Counter(ok=len(read_manifest(made)) - 6, **BROKEN)
    found, expected = by_id(out, 64), by_id(by_hand, 64)
    (late,) = (image_id for image_id, row in found.items() if row["error"] == "the archive holds no such member")
    assert expected[late]["error_code"] == "missing"
    expected[late]["error"] = found[late]["error"]
    assert found == expected
    # No shard straddles, and the rows of an archive lie in it as the archive gave them.
    groups = []
    for shard in shards(out, 64):
        parts = [archives.split_member(path) for path in read(shard)["path"].to_pylist()]
        assert len({part and part[0] for part in parts}) == 1
        groups += [part for part in parts if part]
    for archive in dict.fromkeys(part[0] for part in groups):
        inside = [member for name, member in groups if name == archive]
        with tarfile.open(archive) as tar:
            order = [name for name in tar.getnames() if name in inside]
        assert inside == order + [name for name in inside if name not in order]
    frozen = pq.ParquetFile(out / "manifest.parquet")
    assert [frozen.metadata.row_group(i).num_rows for i in range(frozen.num_row_groups)] == [
        len(read(shard)) for shard in shards(out, 64)
    ]
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["format"], settings["shards"]) == (3, len(shards(out, 64)))
    assert settings["manifest_digest"] == manifests.digest(read_manifest(made))


def test_a_set_from_archives_is_read_whole(archived: tuple[Path, Path], tmp_path: Path) -> None:
    _, made = archived
    out = tmp_path / "set"
    prepare_here(made, out, PrepareSettings(sizes=(64,), rows_per_shard=7))
    data = PreparedSet(out)
    assert len(data.rows()) == len(read_manifest(made))
    assert data.split_info() == manifests.split_info(read_manifest(made))
    paths = dict(zip(*(read_manifest(made)[name].to_pylist() for name in ("image_id", "path")), strict=True))
    part = data.load("train")
    for i in (0, len(part) // 2, len(part) - 1):
        np.testing.assert_array_equal(part.images[i], imaging.load(paths[part.image_ids[i]], data.input_spec))


@pytest.mark.parametrize("gone", [[2], [4, 5], [2, 6], "all"])
def test_an_archive_is_continued_with_the_same_bytes(
    archived: tuple[Path, Path], tmp_path: Path, gone: list[int] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made = archived
    out, settings = tmp_path / "set", PrepareSettings(sizes=(64,), rows_per_shard=7)
    prepare_here(made, out, settings)
    before = contents(out, 64)
    for shard in shards(out, 64) if gone == "all" else [shards(out, 64)[i] for i in gone]:
        shard.unlink()
    read_again: list[tuple[str, int]] = []

    def counting(archive: str, wanted: set[str], _read=archives.read) -> Iterator[object]:
        read_again.append((Path(archive).name, len(wanted)))
        return _read(archive, wanted)

    monkeypatch.setattr(archives, "read", counting)
    prepare_here(made, out, settings)
    assert contents(out, 64) == before
    if gone != "all":
        # Only archives that lack something are read, and only for what is lacking.
        lost = [read_shard for i, read_shard in enumerate(sorted(before)) if i in gone]
        names = [Path(archives.split_member(read(out / "64" / name)["path"][0].as_py())[0]).name for name in lost]
        expected = Counter()
        for name, shard in zip(names, lost, strict=True):
            expected[name] += len(read(out / "64" / shard))
        assert dict(read_again) == expected
    read_again.clear()
    prepare_here(made, out, settings)
    assert read_again == []


def test_another_size_of_an_archive_beside_a_half_made_one(archived: tuple[Path, Path], tmp_path: Path) -> None:
    _, made = archived
    out = tmp_path / "set"
    prepare_here(made, out, PrepareSettings(sizes=(64,), rows_per_shard=7))
    before = contents(out, 64)
    shards(out, 64)[3].unlink()
    prepare_here(made, out, PrepareSettings(sizes=(64, 96), rows_per_shard=7))
    assert contents(out, 64) == before
    rows = [[row["image_id"] for shard in shards(out, size) for row in read(shard).to_pylist()] for size in (64, 96)]
    assert rows[0] == rows[1]


def test_a_truncated_archive_gives_its_rows_and_errors_for_the_rest(
    archived: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, made = archived
    whole = (folder / "images_002.tar").read_bytes()
    (folder / "images_002.tar").write_bytes(whole[: len(whole) // 2])
    out, settings = tmp_path / "set", PrepareSettings(sizes=(64,), rows_per_shard=7)
    counts = prepare_here(made, out, settings)
    assert counts[64].total() == len(read_manifest(made))
    rows = [row for row in by_id(out, 64).values() if row["error"] == "the archive ends too early"]
    assert {row["error_code"] for row in rows} == {"truncated"}
    assert 5 < len(rows) < 30
    # Once the download is mended, shards of failed rows can be removed and made again.
    (folder / "images_002.tar").write_bytes(whole)
    for shard in shards(out, 64):
        if "the archive ends too early" in read(shard)["error"].to_pylist():
            shard.unlink()
    assert prepare_here(made, out, settings)[64]["truncated"] == 1


def test_shards_of_an_archive_that_hold_other_rows_are_refused(archived: tuple[Path, Path], tmp_path: Path) -> None:
    _, made = archived
    out, settings = tmp_path / "set", PrepareSettings(sizes=(64,), rows_per_shard=7)
    prepare_here(made, out, settings)
    *_, one, other, last = shards(out, 64)
    other.write_bytes(one.read_bytes())
    last.unlink()
    with pytest.raises(OutputError, match=r"64: part-.* hold other rows than they should; remove them"):
        prepare_here(made, out, settings)
    one.write_bytes(shards(out, 64)[0].read_bytes())
    with pytest.raises(OutputError):
        prepare_here(made, out, settings)


def test_pictures_in_an_archive_are_not_all_held(archived: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    """However many there are: those of one shard, although the table has another order."""
    _, made = archived
    most = []
    real = prepared_sets._ShardMaker.add

    def add(self, row, outcome) -> None:
        real(self, row, outcome)
        most.append(len(self._images))

    monkeypatch.setattr(prepared_sets._ShardMaker, "add", add)
    prepare_here(made, tmp_path / "set", PrepareSettings(sizes=(64,), rows_per_shard=4))
    assert max(most) == 3


def test_a_shard_of_another_length_is_refused(by_hand: Path, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(by_hand, out)
    first, *_, last = shards(out, 64)
    last.write_bytes(first.read_bytes())
    with pytest.raises(OutputError, match=r"holds 7 rows and should hold \d; remove it and run `ray-cxr pre"):
        prepare_here(manifest, out, PrepareSettings(sizes=(64,), rows_per_shard=7))


def test_a_file_that_takes_too_long_is_a_row(manifest: Path, tmp_path: Path) -> None:
    table = read_manifest(manifest).slice(0, 1)
    manifests.write_manifest(table, tmp_path / "m.parquet")
    settings = PrepareSettings(sizes=(64,), decode_timeout_s=1e-6)
    assert prepare_here(tmp_path / "m.parquet", tmp_path / "set", settings) == {64: Counter(decode_timeout=1)}


def test_tasks_of_one_process_share_a_decoder() -> None:
    settings = PrepareSettings(sizes=(64, 96))
    assert isinstance(prepared_sets._decoder(settings), Decoder)
    assert prepared_sets._decoder(settings) is prepared_sets._decoder(PrepareSettings(sizes=(96, 64)))


@pytest.mark.ray
def test_archives_are_prepared_by_the_command(
    ray_here, archived: tuple[Path, Path], tmp_path: Path, command, by_hand: Path
) -> None:
    _, made = archived
    out = tmp_path / "set"
    arguments = ("prepare", made, "--out", out, "--size", "64", "--set", "rows_per_shard=7")
    code, said, err = command(*arguments)
    assert code == 0, err
    assert "6 failed" in said
    assert {name: row["image"] for name, row in by_id(out, 64).items()} == {
        name: row["image"] for name, row in by_id(by_hand, 64).items()
    }
    before = contents(out, 64)
    shards(out, 64)[3].unlink()
    assert command(*arguments)[0] == 0
    assert contents(out, 64) == before
