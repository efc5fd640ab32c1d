"""NIH's own tables and lists, and one-hot tables of teaching material that leak patients between splits."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ray_cxr.data import manifest, manifest_builder
from ray_cxr.errors import LeakError
from ray_cxr.labels import FINDINGS, LABELS

#: Positive images of each label, in the order of `LABELS`.
COUNTS = (11559, 2776, 4667, 2303, 13317, 2516, 1686, 227, 19894, 5782, 6331, 3385, 1431, 5302, 60361)
#: Patients that are in train-small.csv and in valid-small.csv.
LEAKED = ("13256", "13993", "15826", "16014", "17138", "18464", "2274", "23325", "28208", "28214", "8760")

Built = tuple[pa.Table, manifest_builder.ManifestReport]


@pytest.fixture(scope="module")
def meta(shared: Path) -> Path:
    return shared / "nih" / "meta"


@pytest.fixture(scope="module")
def whole(meta: Path) -> Built:
    lists = {f"{name}_list": str(meta / f"{name}_list.txt.gz") for name in ("train_val", "test")}
    table, images = meta / "Data_Entry_2017_v2020.csv.gz", meta.parent / "images1024"
    return manifest_builder.build_manifest([str(table)], images=str(images), split="official", **lists)


def counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {row["values"]: row["counts"] for row in pc.value_counts(column).to_pylist()}


@pytest.mark.slow
def test_whole_table(whole: Built) -> None:
    table, report = whole
    assert table.schema.equals(manifest.SCHEMA)
    assert len(table) == report.rows == 112_120
    assert (report.patients.number, report.patients.without_id) == (30_805, 0)
    assert report.by_split == {"train": 78_302, "val": 8_222, "test": 25_596}
    assert (report.images_found, report.images_missing, report.files_not_in_table) == (208, 111_912, 0)
    assert (report.absurd_ages, report.unreadable_ages, report.unknown_views, report.unlabelled_rows) == (0, 0, 0, 0)
    assert (report.in_neither_list, report.listed_not_in_table, report.dropped_rows) == (0, 0, 0)
    assert tuple(pc.sum(table[name]).as_py() for name in LABELS) == COUNTS
    assert all(table[name].null_count == 0 for name in LABELS)
    assert pc.min_max(table["age"]).as_py() == {"min": 0.0, "max": 95.0}
    assert pc.min_max(table["follow_up"]).as_py() == {"min": 0, "max": 183}
    assert counts(table["view"]) == {"PA": 67310, "AP": 44810}
    assert counts(table["sex"]) == {"M": 63340, "F": 48780}
    pairs = table.group_by(["patient_id", "split"]).aggregate([])
    assert len(pairs) == 30_805
    # Each patient is in one split; validation has a tenth of the 28,008 patients of the train+val list.
    assert counts(pairs["split"]) == {"train": 25_207, "val": 2_801, "test": 2_797}


def test_leak_of_the_small_tables_is_refused_or_dropped(meta: Path) -> None:
    files = {"train": "train-small.csv", "val": "valid-small.csv", "test": "test.csv"}
    tables = [f"{split}={meta / name}" for split, name in files.items()]
    with pytest.raises(LeakError, match=r"^11 patients") as caught:
        manifest_builder.build_manifest(tables)
    assert all(f" {patient} (val+train)" in str(caught.value) for patient in LEAKED)

    table, report = manifest_builder.build_manifest(tables, on_leak="drop")
    assert report.by_split == {"train": 852, "val": 109, "test": 420}
    assert (report.dropped_rows, report.dropped_by_split) == (23, {"train": 23})
    chosen = zip(table["patient_id"].to_pylist(), table["split"].to_pylist(), strict=True)
    assert all(split == "val" for patient, split in chosen if patient in LEAKED)


@pytest.mark.slow
def test_one_hot_and_text_labels_agree(whole: Built, meta: Path) -> None:
    """NIH's README: 418 of the 420 rows of test.csv have the labels of Data_Entry."""
    table, _ = manifest_builder.build_manifest([str(meta / "test.csv")])
    names = ["image_id", "patient_id", *FINDINGS]
    same_images = whole[0].filter(pc.is_in(whole[0]["image_id"], table["image_id"])).select(names)
    rows = {row["image_id"]: row for row in same_images.to_pylist()}
    one_hot = table.select(names).to_pylist()
    assert sum(rows[row["image_id"]] == row for row in one_hot) == 418
    assert all(rows[row["image_id"]]["patient_id"] == row["patient_id"] for row in one_hot)
