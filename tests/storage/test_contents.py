"""Swapped and renamed arguments: each reader says what it was given and what to pass instead."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_cxr.data import manifest
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import RayCxrError
from ray_cxr.models.bundle import load_bundle
from ray_cxr.reporting.scores import read_scores
from ray_cxr.storage import contents, run_folder
from ray_cxr.storage.files import find_images

CSV = "Image,Finding Labels\na.png,Mass\n"
KINDS = {
    "prepared": "a folder that `ray-cxr prepare` wrote",
    "scores": "a folder that `ray-cxr score` wrote",
    "study": "a folder that `ray-cxr tune` wrote",
    "bundle": "a bundle",
    "report": "a report",
    "folder": "a folder",
    "manifest.parquet": "a manifest (Parquet)",
    "scores.parquet": "a table of scores (Parquet)",
    "other.parquet": "a Parquet file with the columns a, b",
    "cut.parquet": "a damaged Parquet file",
    "csv.parquet": "a text or CSV file",
    "csv-utf-16.parquet": "a text or CSV file",
    "table.csv.gz": "a table of labels or images (CSV, gzip)",
    "text.gz": "a gzip file",
    "binary": "another binary file",
    "empty": "an empty file",
    "page.html": "an HTML page",
}
READERS = {
    "a manifest": (manifest.read_manifest, "make one with `ray-cxr manifest`", {"manifest.parquet", "scores.parquet"}),
    "a prepared folder": (PreparedSet, "make one with `ray-cxr prepare`", {"prepared"}),
    "a bundle (no bundle.json)": (load_bundle, "pass a bundle, e.g. RUN/bundle of `ray-cxr train`", {"bundle"}),
    "scores": (read_scores, "pass the folder that `ray-cxr score` wrote", {"scores", "scores.parquet"}),
    "a run of score": (
        lambda path: run_folder.check_complete(path, "score"),
        "pass the folder that `ray-cxr score` wrote",
        {"scores"},
    ),
}


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """One of each kind, incomplete but recognisable."""
    for name, kind in {"prepared": "prepare", "scores": "score", "study": "tune"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(json.dumps({"kind": kind}), encoding="utf-8")
    for folder, files in {"bundle": ["bundle.json"], "report": ["metrics.json", "report.html"], "folder": []}.items():
        (tmp_path / folder).mkdir()
        for name in files:
            (tmp_path / folder / name).write_text("{}", encoding="utf-8")
    write = pq.write_table
    write(pa.table({"image_id": ["a"], "path": ["/a"]}), tmp_path / "manifest.parquet")
    write(pa.table({"image_id": ["a"], "path": ["/a"], "p_Mass": [0.5]}), tmp_path / "scores.parquet")
    write(pa.table({"a": [1], "b": [2]}), tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "other.parquet").read_bytes()[:-9])
    (tmp_path / "csv.parquet").write_text(CSV, encoding="utf-8")
    (tmp_path / "csv-utf-16.parquet").write_text(CSV, encoding="utf-16")
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    (tmp_path / "text.gz").write_bytes(gzip.compress(bytes(100)))
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "empty").touch()
    (tmp_path / "page.html").write_text("<html>", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("wanted", READERS)
def test_other_inputs_are_named(inputs: Path, wanted: str) -> None:
    read, remedy, accepted = READERS[wanted]
    for name in KINDS.keys() - accepted:
        with pytest.raises(RayCxrError) as caught:
            read(inputs / name)
        message = str(caught.value)
        assert message.startswith(f"{inputs / name}: is {KINDS[name]}, not {wanted}; "), message
        assert remedy in message or KINDS[name] in ("an HTML page", "a gzip file")
        assert "\n" not in message
    with pytest.raises(RayCxrError, match=r"none: no(t found| such file or folder)"):
        read(inputs / "none")


def test_a_file_instead_of_a_folder_of_images_is_named(inputs: Path) -> None:
    for name in ("manifest.parquet", "csv.parquet"):
        with pytest.raises(RayCxrError, match="is a file; pass the folder with the images") as caught:
            find_images(str(inputs / name))
        assert str(caught.value).endswith(f" ({KINDS[name]})")


def test_the_folder_of_a_training_run_names_its_bundle(inputs: Path) -> None:
    (inputs / "bundle").rename(inputs / "study" / "bundle")
    with pytest.raises(RayCxrError) as caught:
        load_bundle(inputs / "study")
    path = inputs / "study"
    assert str(caught.value) == (
        f"{path}: is a folder that `ray-cxr tune` wrote, not a bundle (no bundle.json); "
        f"pass a bundle, e.g. {path}/bundle"
    )


def test_objects_in_a_bucket_are_named(bucket: Any) -> None:
    bucket.client.put_object(Bucket="chests", Key="swapped/m.parquet", Body=CSV.encode())
    bucket.client.put_object(Bucket="chests", Key="swapped/scores/settings.json", Body=b'{"kind": "score"}')
    for name, kind in {"m.parquet": "a text or CSV file", "scores": KINDS["scores"]}.items():
        for read in (manifest.read_manifest, load_bundle, PreparedSet):
            pattern = rf"^s3://chests/swapped/{re.escape(name)}: is {re.escape(kind)}, not "
            with pytest.raises(RayCxrError, match=pattern):
                read(bucket(f"swapped/{name}"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_says_so(inputs: Path) -> None:
    (inputs / "manifest.parquet").chmod(0)
    message = contents.explain(inputs / "manifest.parquet", "a manifest", "make one")
    assert message == f"{inputs}/manifest.parquet: cannot be read: Permission denied; make one"
