"""Prepared sets, made by Ray and read back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ray_cxr.config import InputSpec
from ray_cxr.data import imaging
from ray_cxr.data.manifest import read_manifest
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import ConfigError

pytestmark = pytest.mark.ray
BROKEN = {"truncated": 1, "empty": 1, "not_an_image": 1, "missing": 1, "corrupt": 1, "blank": 1}


def shards(prepared: Path, size: int) -> list[Path]:
    return sorted((prepared / str(size)).glob("part-*.parquet"))


def test_one_row_per_manifest_row_in_its_order_and_every_failure_with_its_code(prepared: Path, manifest: Path) -> None:
    table = read_manifest(manifest)
    for size in (64, 96):
        ids = [i for shard in shards(prepared, size) for i in pq.read_table(shard)["image_id"].to_pylist()]
        assert ids == table["image_id"].to_pylist()
        counts = json.loads((prepared / str(size) / "counts.json").read_text())
        assert {code: n for code, n in counts.items() if code != "ok"} == BROKEN
        assert counts["ok"] == len(table) - 6
    assert max(len(pq.read_table(shard)) for shard in shards(prepared, 64)) == 16


def test_pixels_are_those_that_imaging_gives(prepared: Path) -> None:
    for size in (64, 96):
        table = pq.read_table(shards(prepared, size)[0])
        assert table.schema.field("image").type.byte_width == size * size
        for path, stored in zip(table["path"].to_pylist(), table["image"].to_pylist(), strict=True):
            expected = imaging.load(path, InputSpec(size=size))
            assert stored == expected.tobytes()


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
    assert seen == len(table) - 6


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


def test_which_size_must_be_said_when_there_are_two(prepared: Path) -> None:
    with pytest.raises(ConfigError, match="sizes 64, 96"):
        PreparedSet(prepared)
