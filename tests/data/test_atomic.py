"""Files are whole or absent."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_cxr.data import atomic


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    atomic.write_text(target, "old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        atomic.write(target, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert target.read_text() == "old"


def test_nothing_has_the_final_name_before_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.parquet"

    def look(part: Path) -> None:
        pq.write_table(pa.table({"x": [1]}), part)
        assert not target.exists()
        assert part.name.startswith("."), "a reader of *.parquet must not see it"

    atomic.write(target, look)
    assert pq.read_table(target)["x"].to_pylist() == [1]


def test_json_never_holds_what_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "a.json", {"auroc": math.nan})
    assert not list(tmp_path.iterdir())
