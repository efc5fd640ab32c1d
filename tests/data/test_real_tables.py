"""NIH's own tables and lists, and the one-hot tables of teaching material with their real leak."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ray_cxr.data import manifest
from ray_cxr.errors import LeakError

NIH = Path(__file__).parents[2].parent / "shared" / "nih"
META = NIH / "meta"

pytestmark = pytest.mark.skipif(not META.is_dir(), reason=f"the real tables are not at hand: no {META}")

POSITIVES = {
    "Atelectasis": 11559,
    "Cardiomegaly": 2776,
    "Consolidation": 4667,
    "Edema": 2303,
    "Effusion": 13317,
    "Emphysema": 2516,
    "Fibrosis": 1686,
    "Hernia": 227,
    "Infiltration": 19894,
    "Mass": 5782,
    "Nodule": 6331,
    "Pleural_Thickening": 3385,
    "Pneumonia": 1431,
    "Pneumothorax": 5302,
    "No_Finding": 60361,
}
#: The patients that train-small.csv and valid-small.csv share.
LEAKED = ("13256", "13993", "15826", "16014", "17138", "18464", "2274", "23325", "28208", "28214", "8760")


@pytest.fixture(scope="module")
def whole() -> tuple[pa.Table, manifest.ManifestReport]:
    return manifest.build_manifest(
        [str(META / "Data_Entry_2017_v2020.csv.gz")],
        images=str(NIH / "images1024"),
        split="official",
        train_val_list=str(META / "train_val_list.txt.gz"),
        test_list=str(META / "test_list.txt.gz"),
    )


def small_tables() -> list[str]:
    files = {"train": "train-small.csv", "val": "valid-small.csv", "test": "test.csv"}
    return [f"{split}={META / name}" for split, name in files.items()]


def test_counts_of_the_whole_table(whole: tuple[pa.Table, manifest.ManifestReport]) -> None:
    table, report = whole
    assert len(table) == report.rows == 112_120
    assert report.patients == 30_805
    assert report.by_split == {"train": 78_302, "val": 8_222, "test": 25_596}
    assert report.by_split["train"] + report.by_split["val"] == 86_524
    assert (report.images_found, report.images_missing, report.files_not_in_table) == (208, 111_912, 0)
    assert (report.absurd_ages, report.unreadable_ages, report.unlabelled_rows) == (0, 0, 0)
    assert (report.in_neither_list, report.listed_not_in_table, report.dropped_rows) == (0, 0, 0)
    assert report.ignored_columns == []
    assert report.lines() == [
        "112,120 images of 30,805 patients: train 78,302, val 8,222, test 25,596",
        "pictures: 208 found, 111,912 in the table but not on disk, 0 on disk but not in the table",
    ]


def test_positives_of_every_finding(whole: tuple[pa.Table, manifest.ManifestReport]) -> None:
    table, _ = whole
    assert {name: pc.sum(table[name]).as_py() for name in POSITIVES} == POSITIVES
    assert all(table[name].null_count == 0 for name in POSITIVES)


def test_columns_have_their_types(whole: tuple[pa.Table, manifest.ManifestReport]) -> None:
    table, _ = whole
    assert table.schema.equals(manifest.SCHEMA)
    assert manifest.split_info(table)["kind"] == "official"
    assert set(manifest.split_info(table)["lists"]) == {"train_val_list.txt.gz", "test_list.txt.gz"}
    assert pc.min_max(table["age"]).as_py() == {"min": 0.0, "max": 95.0}
    assert pc.min_max(table["follow_up"]).as_py() == {"min": 0, "max": 183}
    assert {row["values"]: row["counts"] for row in pc.value_counts(table["view"]).to_pylist()} == {
        "PA": 67310,
        "AP": 44810,
    }
    assert {row["values"]: row["counts"] for row in pc.value_counts(table["sex"]).to_pylist()} == {
        "M": 63340,
        "F": 48780,
    }


def test_a_patient_is_in_one_split(whole: tuple[pa.Table, manifest.ManifestReport]) -> None:
    table, _ = whole
    pairs = table.select(["patient_id", "split"]).group_by(["patient_id", "split"]).aggregate([])
    assert len(pairs) == 30_805
    patients = {row["split"]: row["n"] for row in _count(pairs)}
    # A tenth of train+val's 28,008 patients.
    assert patients == {"train": 25_207, "val": 2_801, "test": 2_797}


def _count(pairs: pa.Table) -> list[dict[str, object]]:
    return pairs.group_by("split").aggregate([("patient_id", "count")]).rename_columns(["split", "n"]).to_pylist()


def test_survives_writing(whole: tuple[pa.Table, manifest.ManifestReport], tmp_path: Path) -> None:
    table, _ = whole
    manifest.write_manifest(table, tmp_path / "m.parquet")
    again = manifest.read_manifest(tmp_path / "m.parquet")
    assert again.equals(table)
    assert manifest.digest(again) == manifest.digest(table)
    assert manifest.split_info(again) == manifest.split_info(table)


def test_the_leak_of_the_small_tables_is_refused_by_name() -> None:
    with pytest.raises(LeakError) as caught:
        manifest.build_manifest(small_tables())
    text = str(caught.value)
    assert text.startswith("11 patients stand in more than one split: ")
    assert all(f" {patient} (val+train)" in text for patient in LEAKED)
    assert "--on-leak drop" in text


def test_drop_mends_the_small_tables() -> None:
    table, report = manifest.build_manifest(small_tables(), on_leak="drop")
    assert report.by_split == {"train": 852, "val": 109, "test": 420}
    assert (report.dropped_rows, report.dropped_by_split) == (23, {"train": 23})
    assert manifest.split_info(table)["dropped_by_split"] == {"train": 23}
    assert table.schema.equals(manifest.SCHEMA)
    chosen = zip(table["patient_id"].to_pylist(), table["split"].to_pylist(), strict=True)
    assert all(split == "val" for patient, split in chosen if patient in LEAKED)


def test_one_hot_and_text_labels_agree(whole: tuple[pa.Table, manifest.ManifestReport]) -> None:
    """NIH's README: 418 of test.csv's 420 rows equal Data_Entry's labels."""
    table, _ = manifest.build_manifest([str(META / "test.csv")])
    names = [name for name in POSITIVES if name != "No_Finding"]
    of_nih = whole[0].filter(pc.is_in(whole[0]["image_id"], table["image_id"]))
    rows = {row["image_id"]: row for row in of_nih.select(["image_id", "patient_id", *names]).to_pylist()}
    mine = table.select(["image_id", "patient_id", *names]).to_pylist()
    assert sum(rows[row["image_id"]] == row for row in mine) == 418
    assert all(rows[row["image_id"]]["patient_id"] == row["patient_id"] for row in mine)
