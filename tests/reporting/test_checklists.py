"""checklist.md: items are filled in with values of the run, and unknown without them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from score_archive import Archive

from ray_cxr.reporting import figure_set
from ray_cxr.reporting.checklists import AUTHORS, CLAIM, TRIPOD_AI, UNKNOWN
from ray_cxr.reporting.report import write_report

LISTS = ("CLAIM", "TRIPOD")


def read_checklist(out: Path) -> dict[tuple[str, str], str]:
    """Return the third cell of each row by list and item number."""
    cells: dict[tuple[str, str], str] = {}
    part = ""
    for line in (out / "checklist.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            part = next(name for name in LISTS if name in line)
        row = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(row) == 3 and row[0][:1].isdigit():
            cells[part, row[0]] = row[2].replace("\\", "")
    return cells


def test_lists_have_the_published_numbers() -> None:
    assert [number for number, *_ in CLAIM] == [str(i) for i in range(1, 45)]
    letters = {
        3: "abc",
        5: "ab",
        6: "abc",
        8: "abc",
        9: "abc",
        12: "abcdefg",
        18: "abcdef",
        20: "abc",
        23: "ab",
        27: "abc",
    }
    expected = [f"{i}{letter}" for i in range(1, 28) for letter in letters.get(i, [""])]
    assert [number for number, *_ in TRIPOD_AI] == expected
    assert len(expected) == 52


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure_set, "draw_figures", lambda *_: {})


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(tmp_path_factory.mktemp("archive"), patients=40)


@pytest.mark.slow
def test_items_hold_values_of_the_run(archive: Archive, tmp_path: Path) -> None:
    people = {"images": 30, "patients": 10, "images_without_patient": 0}
    provenance: dict[str, Any] = {
        "origin": "trained by ray-cxr train on 30 images",
        "initial_weights": "random",
        "lineage": "known",
        "split": {"kind": "patient", "seed": 7, "tables": {"table.csv": "ab" * 32}},
        "images": {"train": people, "val": {**people, "images": 15, "patients": None}},
        "demographics": {"train": {"sex": {"F": 12, "M": 18}, "age": {"median": 46.0}, "findings": {}}},
        "settings": {"loss": "focal", "seed": 3},
        "best_epoch": 2,
        "chosen_by": "validation macro AUROC",
        "versions": {"ray-cxr": "9.8.7"},
        "recalibrated": {**people, "created": "2026-01-02T03:04:05", "method": "platt", "rule": "youden"},
    }
    found = write_report(
        archive.scores(provenance=provenance), tmp_path, labels=archive.labels(), split="test", n_resamples=40
    )
    cells = read_checklist(tmp_path)
    assert set(cells) == {("CLAIM", n) for n, *_ in CLAIM} | {("TRIPOD", n) for n, *_ in TRIPOD_AI}
    macro = found["macro"]
    for item, words in {
        ("CLAIM", "7"): "table.csv (SHA-256 abab",
        ("CLAIM", "19"): "kind patient, seed 7. train 30 images of 10 patients; val 15 images, patients unknown",
        ("CLAIM", "23"): "ray-cxr 9.8.7",
        ("CLAIM", "25"): "loss focal, seed 3. 3 epochs",
        ("CLAIM", "26"): "Epoch 2, the best by validation macro AUROC",
        ("CLAIM", "29"): "40 resamples, seed 0",
        ("CLAIM", "30"): "different for Hernia",
        ("CLAIM", "32"): "test split of a random patient split, seed 0, of tables that the training also read",
        ("CLAIM", "33"): "Not in this run",
        ("CLAIM", "37"): f"Macro AUROC {macro['auroc']:.3f} (0.",
        ("CLAIM", "39"): "3 of 75 labelled images could not be scored. missing 2, corrupt 1",
        ("TRIPOD", "12f"): "2026-01-02 on 30 images of 10 patients: calibration platt, operating points youden",
        ("TRIPOD", "13"): "focal",
        (
            "TRIPOD",
            "20a",
        ): "Images of the scores: 120 (scored 117, failed 3). Labelled images to evaluate: 75 (evaluated",
        ("TRIPOD", "7"): "of 75 labelled images: lateral 1",
        ("TRIPOD", "20b"): "F 12, M 18",
        ("TRIPOD", "23a"): f"Effusion {found['findings']['Effusion']['auroc']:.3f}",
    }.items():
        assert words in cells[item], (item, cells[item])
    for item in (("CLAIM", "13"), ("TRIPOD", "17"), ("TRIPOD", "25")):
        assert cells[item] == AUTHORS
    assert cells["CLAIM", "31"] == UNKNOWN  # no boxes
    assert cells["TRIPOD", "14"] == UNKNOWN  # no sex, age or view


@pytest.mark.slow
def test_groups_and_other_tables_are_stated(archive: Archive, tmp_path: Path) -> None:
    labels = archive.labels(sex=["F" if i % 6 < 3 else "M" for i in range(archive.n)])
    provenance = {"split": {"kind": "given", "tables": {"elsewhere.csv": "cd" * 32}}}
    write_report(archive.scores(provenance=provenance), tmp_path, labels=labels, split="test", n_resamples=40)
    cells = read_checklist(tmp_path)
    assert cells["CLAIM", "32"] == UNKNOWN
    assert "of other tables than those of the training" in cells["CLAIM", "33"]
    assert "specificity by sex" in cells["TRIPOD", "14"]
    assert "underdiagnosis" in cells["TRIPOD", "14"]
    assert "Groups: " in cells["CLAIM", "30"]


@pytest.mark.slow
def test_numbers_are_of_the_evaluated_images(archive: Archive, tmp_path: Path) -> None:
    """One image with a quality flag and two that failed are in the scores, but not among the labels."""
    labels = archive.labels(keep=[i for i in range(archive.n) if i not in (50, archive.n - 3, archive.n - 1)])
    write_report(archive.scores(), tmp_path, labels=labels, split="test", n_resamples=40)
    cells = read_checklist(tmp_path)
    for item in (("CLAIM", "9"), ("TRIPOD", "7"), ("TRIPOD", "12b")):
        assert "lateral" not in cells[item]
    assert "1 of 72 labelled images" in cells["CLAIM", "12"]
    assert cells["TRIPOD", "27a"] == "1 of 72 labelled images could not be scored. corrupt 1"
    assert "120 (scored 117, failed 3)" in cells["CLAIM", "35"]
    assert "72 (evaluated 71, failed 1, without a score 0)" in cells["CLAIM", "35"]


@pytest.mark.slow
def test_another_systems_scores_leave_items_unknown(archive: Archive, tmp_path: Path) -> None:
    foreign = shutil.copy(Path(archive.scores()) / "scores" / "00000.parquet", tmp_path)
    for out, options in (("labels", {"labels": archive.labels(), "n_resamples": 40}), ("bare", {})):
        write_report(foreign, tmp_path / out, **options)
        cells = read_checklist(tmp_path / out)
        numbers = {"CLAIM": ("23", "24", "25", "26", "27", "32", "33"), "TRIPOD": ("12f", "12g", "13")}
        items = [(part, n) for part, found in numbers.items() for n in found]
        assert {cells[item] for item in items} == {UNKNOWN}
    assert cells["CLAIM", "37"] == UNKNOWN
