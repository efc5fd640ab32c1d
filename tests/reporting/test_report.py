"""The report from outside: folders in, metrics.json, worklist.csv, pictures and the page out."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn import metrics as sklearn_metrics

from ray_cxr.data import manifest
from ray_cxr.errors import InputError, LeakError, OutputError, TableError
from ray_cxr.evaluation import intervals
from ray_cxr.labels import FINDINGS, LABELS, NO_FINDING
from ray_cxr.reporting import pictures, plots
from ray_cxr.reporting.examples import examples
from ray_cxr.reporting.labelled import join
from ray_cxr.reporting.report import write_report
from ray_cxr.reporting.scores import read_scores

FEW = ("Cardiomegaly", "Effusion", "Hernia")


class Archive:
    """A made-up archive: images of patients, labels, and a SCORES folder whose model knows something.

    Every patient has three images. Patients 0-9 are train, 10-14 val, the rest test. The last test patient's images
    failed, each with another code. Hernia has no positive at all. Pictures exist for a few images only.
    """

    def __init__(
        self, root: Path, patients: int = 60, findings: Sequence[str] = (*FEW, NO_FINDING), seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.root, self.findings = root, tuple(findings)
        n = 3 * patients
        self.patient = [f"{i // 3}" for i in range(n)]
        self.ids = [f"{i // 3:08d}_{i % 3:03d}.png" for i in range(n)]
        number = np.arange(n) // 3
        self.split = np.where(number < 10, "train", np.where(number < 15, "val", "test"))
        self.y = {f: (rng.random(n) < 0.3).astype(np.int8) for f in findings}
        if "Hernia" in self.y:
            self.y["Hernia"][:] = 0
        self.p = {
            f: (1 / (1 + np.exp(-(2.0 * y - 2.0 + rng.normal(size=n))))).astype(np.float32) for f, y in self.y.items()
        }
        self.ok = number < patients - 1
        pictures = root / "pictures"
        pictures.mkdir(parents=True)
        self.paths = [str(pictures / name) for name in self.ids]
        for i in range(0, n, 4):
            picture = rng.integers(0, 255, (48, 40), dtype=np.uint8)
            Image.fromarray(picture).save(self.paths[i])
        self.study: list[str | None] = [f"s{i // 3}" if i % 3 < 2 else None for i in range(n)]
        self.threshold = 0.3

    def labels(self, **changes: Any) -> str:
        n = len(self.ids)
        columns: dict[str, Any] = {
            "image_id": self.ids,
            "path": self.paths,
            "patient_id": self.patient,
            "split": list(self.split),
            **{f: values.tolist() for f, values in self.y.items()},
            **changes,
        }
        keep = columns.pop("keep", range(n))
        info = columns.pop("info", {"kind": "patient", "seed": 0, "tables": {"table.csv": "ab" * 32}})
        arrays = {}
        for item in manifest.SCHEMA:
            values = columns.get(item.name, [None] * n)
            arrays[item.name] = pa.array([values[i] for i in keep], item.type)
        table = pa.table(arrays).replace_schema_metadata({manifest.SPLIT_KEY: json.dumps(info).encode()})
        path = self.root / "labels.parquet"
        pq.write_table(table, path)
        return str(path)

    def scores(self, *, ids: Sequence[str] | None = None, success: bool = True, **model: Any) -> str:
        n = len(self.ids)
        bad = ~self.ok
        codes = ["missing", "corrupt", "missing"] * n
        top = np.array(self.findings)[np.argmax([self.p[f] for f in self.findings if f != NO_FINDING], axis=0)]
        columns: dict[str, pa.Array] = {
            "image_id": pa.array(ids or self.ids),
            "path": pa.array(self.paths),
            "patient_id": pa.array(self.patient, pa.string()),
            "study_id": pa.array(self.study, pa.string()),
            "status": pa.array(["error" if b else "ok" for b in bad]),
            "error_code": pa.array([codes[i] if bad[i] else None for i in range(n)], pa.string()),
            "error": pa.array(["it broke" if b else None for b in bad], pa.string()),
        }
        for f in self.findings:
            columns[f"p_{f}"] = pa.array(self.p[f], pa.float32(), mask=bad)
            columns[f"c_{f}"] = pa.array(self.p[f] * 0.9, pa.float32(), mask=bad)
            columns[f"flag_{f}"] = pa.array(self.p[f] >= self.threshold, pa.bool_(), mask=bad)
        columns["top_finding"] = pa.array(top, pa.string(), mask=bad)
        highest = np.max([self.p[f] for f in self.findings if f != NO_FINDING], axis=0)
        columns["priority"] = pa.array(highest, pa.float32(), mask=bad)
        columns["quality_flag"] = pa.array(["lateral" if i == 50 else None for i in range(n)])
        columns["model_digest"] = pa.array(["d1" * 32] * n, mask=bad)
        columns["embedding"] = pa.array([[0.0, 1.0]] * n)  # what a report has no use for
        folder = self.root / "SCORES"
        (folder / "scores").mkdir(parents=True, exist_ok=True)
        table = pa.table(columns)
        for part, start in enumerate(range(0, n, 70)):
            pq.write_table(table.slice(start, 70), folder / "scores" / f"{part:05d}.parquet")
        trained = np.isin(self.split, ("train", "val"))
        pq.write_table(
            pa.table(
                {
                    "image_id": np.array(self.ids)[trained],
                    "patient_id": np.array(self.patient)[trained],
                    "split": self.split[trained],
                }
            ),
            folder / "split.parquet",
        )
        point = {"threshold": self.threshold, "rule": "youden", "n": 45, "positives": 9, "flag_rate": 0.4}
        described = {
            "format": 1,
            "digest": "d1" * 32,
            "backbone": "TinyCNN",
            "findings": list(self.findings),
            "input_spec": {"size": 64, "aspect": "stretch", "interpolation": "area"},
            "calibration": dict.fromkeys(self.findings),
            "operating_points": dict.fromkeys(self.findings, point),
            "expected_flag_rates": dict.fromkeys(self.findings, 0.4),
            "provenance": {"split": {"kind": "patient"}, "initial_weights": "random", "lineage": "known"},
            "curves": [
                {"epoch": e, "loss": 0.7 / e, "val_auroc": None if e == 1 else 1 - 0.4 / e, "seconds": 2.0}
                for e in range(1, 7)
            ],
            **model,
        }
        (folder / "model.json").write_text(json.dumps(described))
        (folder / "run.json").write_text(json.dumps({"rows": n, "input_digest": "aa"}))
        (folder / "_SUCCESS").unlink(missing_ok=True)
        if success:
            (folder / "_SUCCESS").write_text("")
        return str(folder)

    def tested(self, finding: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = (self.split == "test") & self.ok
        return self.y[finding][rows], self.p[finding][rows], np.array(self.patient)[rows]


@pytest.fixture(autouse=True)
def drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests read numbers and text: for them pictures are not drawn, which takes seconds."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(plots, "encode", lambda figure: (b"png", b"svg"))
        monkeypatch.setattr(pictures, "of_evaluation", lambda *_: {})


@pytest.fixture
def drawn() -> None:
    """For tests that look at the pictures."""


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path / "archive")


def report(archive: Archive, out: Path, scores: str | None = None, **options: Any) -> tuple[dict[str, Any], str]:
    """metrics.json as it was written, and the page."""
    options.setdefault("n_resamples", 60)
    returned = write_report(scores or archive.scores(), out, **options)
    written = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(returned, allow_nan=False))
    return written, (out / "report.html").read_text(encoding="utf-8")


def read_worklist(out: Path) -> list[dict[str, str]]:
    with open(out / "worklist.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_numbers_equal_sklearn_on_the_same_rows(archive: Archive, tmp_path: Path) -> None:
    m, _ = report(archive, tmp_path / "out", labels=archive.labels(), split="test")
    assert (m["split"], m["split_kind"], m["split_seed"]) == ("test", "patient", 0)
    assert (m["n_images"], m["n_patients"]) == (3 * 44, 44)
    for finding in ("Cardiomegaly", "Effusion", NO_FINDING):
        y, p, patients = archive.tested(finding)
        got = m["findings"][finding]
        assert (got["n"], got["positives"]) == (len(y), y.sum())
        assert got["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(y, p), abs=1e-12)
        expected = sklearn_metrics.average_precision_score(y, p)
        assert got["average_precision"] == pytest.approx(expected, abs=1e-12)
        flags = p >= archive.threshold
        assert got["sensitivity"] == pytest.approx(sklearn_metrics.recall_score(y, flags), abs=1e-15)
        assert got["specificity"] == pytest.approx(sklearn_metrics.recall_score(1 - y, ~flags), abs=1e-15)
        assert got["ppv"] == pytest.approx(sklearn_metrics.precision_score(y, flags), abs=1e-15)
        assert got["threshold"] == archive.threshold
        assert got["sensitivity_low"] <= got["sensitivity"] <= got["sensitivity_high"]
        interval = intervals.bootstrap_auroc(y[:, None], p[:, None], patients, n_resamples=60).findings[0]
        assert (got["auroc_low"], got["auroc_high"]) == (interval.low, interval.high)
        assert got["auroc_delong_low"] < got["auroc"] < got["auroc_delong_high"]
        assert got["reason"] is None


def test_macro_leaves_no_finding_and_the_undefined_out(archive: Archive, tmp_path: Path) -> None:
    m, page = report(archive, tmp_path / "out", labels=archive.labels(), split="test")
    assert m["macro"]["findings"] == ["Cardiomegaly", "Effusion"]
    assert m["macro"]["auroc"] == np.mean([m["findings"][f]["auroc"] for f in ("Cardiomegaly", "Effusion")])
    assert m["macro"]["auroc_low"] < m["macro"]["auroc"] < m["macro"]["auroc_high"]
    hernia = m["findings"]["Hernia"]
    assert hernia["auroc"] is None
    assert hernia["auroc_low"] is None
    assert hernia["average_precision"] is None
    assert hernia["sensitivity"] is None
    assert hernia["reason"] == "no positive images"
    assert hernia["n"] == 3 * 44
    assert "undefined: no positive images" in page


def test_every_row_is_counted(archive: Archive, tmp_path: Path) -> None:
    keep = list(range(5, len(archive.ids)))  # five scored images have no label
    labels = archive.labels(keep=keep, image_id=[*archive.ids[:-4], "unscored.png", *archive.ids[-3:]])
    m, page = report(archive, tmp_path / "out", labels=labels, split="test")
    assert m["counts"] == {
        "rows": 180,
        "scored": 177,
        "errors": 3,
        "by_code": {"missing": 2, "corrupt": 1},
        "quality_flags": {"lateral": 1},
        "labelled": 135,
        "evaluated": 131,
        "labelled_not_scored": 1,
        "labelled_errors": 3,
        "scored_not_labelled": 6,
        "scored_other_split": 40,
    }
    assert m["counts"]["labelled"] == sum(
        m["counts"][name] for name in ("evaluated", "labelled_errors", "labelled_not_scored")
    )
    assert "3 of 180 images (1.67%) could not be scored: missing 2, corrupt 1" in page


def test_null_labels_are_not_negatives(archive: Archive, tmp_path: Path) -> None:
    values: list[int | None] = archive.y["Effusion"].tolist()
    rows = [i for i in range(len(values)) if i % 2]
    for i in rows:
        values[i] = None
    m, _ = report(archive, tmp_path / "out", labels=archive.labels(Effusion=values), split="test")
    kept = np.array([v is not None for v in values]) & (archive.split == "test") & archive.ok
    got = m["findings"]["Effusion"]
    assert got["n"] == kept.sum()
    expected = sklearn_metrics.roc_auc_score(archive.y["Effusion"][kept], archive.p["Effusion"][kept])
    assert got["auroc"] == pytest.approx(expected, abs=1e-12)


def test_findings_on_one_side_only_are_listed(archive: Archive, tmp_path: Path) -> None:
    n = len(archive.ids)
    labels = archive.labels(Mass=[i % 2 for i in range(n)], Effusion=[None] * n)
    m, _ = report(archive, tmp_path / "out", labels=labels, split="test")
    assert m["findings"]["Mass"]["reason"] == "labelled, but the scores have no column for it"
    assert m["findings"]["Mass"]["positives"] == 66
    assert m["findings"]["Effusion"]["reason"] == "no labelled images"
    assert m["findings"]["Effusion"]["n"] == 0
    assert list(m["findings"]) == ["Cardiomegaly", "Effusion", "Hernia", "Mass", NO_FINDING]


@pytest.mark.parametrize("split", [None, "test"])
def test_training_images_are_refused(archive: Archive, tmp_path: Path, split: str | None) -> None:
    # As if the labels had been split anew: what trained the model is now called test.
    labels = archive.labels(split=["test"] * len(archive.ids))
    with pytest.raises(LeakError, match="45 images and 15 patients") as caught:
        report(archive, tmp_path / "out", labels=labels, split=split)
    assert ("`--split test`" in str(caught.value)) == (split is None)
    assert not (tmp_path / "out").exists()


def test_another_image_of_a_training_patient_is_refused(archive: Archive, tmp_path: Path) -> None:
    patients = [*archive.patient]
    patients[100] = "3"
    labels = archive.labels(patient_id=patients)
    with pytest.raises(LeakError, match="0 images and 1 patients"):
        report(archive, tmp_path / "out", labels=labels, split="test")


def test_a_folder_inside_scores_does_not_slip_past_the_guard(archive: Archive, tmp_path: Path) -> None:
    inside = Path(archive.scores()) / "scores"
    for path in (inside, inside / "00000.parquet"):
        with pytest.raises(LeakError):
            write_report(path, tmp_path / "out", labels=archive.labels())


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_splits_are_evaluated_as_such(archive: Archive, tmp_path: Path, split: str) -> None:
    m, page = report(archive, tmp_path / "out", labels=archive.labels(), split=split)
    assert m["split"] == split
    assert m["leak_check"]["shared_images"] == m["n_images"] == {"train": 30, "val": 15}[split]
    assert m["notes"][0].startswith(f"This is the {split} split")
    assert f"This is the {split} split" in page


@pytest.mark.parametrize(
    ("info", "label"),
    [
        ({"kind": "official", "seed": 0}, "official test split"),
        ({"kind": "patient", "seed": 7}, "test split of a random patient split, seed 7"),
        ({"kind": "given", "seed": None}, "test split as the tables gave it"),
        ({}, "test split of unknown origin"),
    ],
)
def test_numbers_carry_their_split(archive: Archive, tmp_path: Path, info: dict[str, Any], label: str) -> None:
    m, page = report(archive, tmp_path / "out", labels=archive.labels(info=info), split="test")
    assert m["split_label"] == label
    assert page.count(label) >= 2


def test_unfinished_scores_are_refused(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="score did not finish; run it again to continue"):
        write_report(archive.scores(success=False), tmp_path / "out")


def test_split_needs_labels_that_have_it(archive: Archive, tmp_path: Path) -> None:
    scores, n = archive.scores(), len(archive.ids)
    with pytest.raises(InputError, match="needs --labels"):
        write_report(scores, tmp_path / "out", split="test")
    with pytest.raises(InputError, match="has no splits"):
        write_report(scores, tmp_path / "out", labels=archive.labels(split=[None] * n), split="test")
    with pytest.raises(InputError, match="its splits are train"):
        write_report(scores, tmp_path / "out", labels=archive.labels(split=["train"] * n), split="test")
    with pytest.raises(InputError, match="use train, val or test"):
        write_report(scores, tmp_path / "out", labels=archive.labels(), split="Test")


def test_nothing_in_common_is_refused(archive: Archive, tmp_path: Path) -> None:
    labels = archive.labels(image_id=[f"other_{i}.png" for i in range(len(archive.ids))])
    with pytest.raises(InputError, match="no image in common"):
        write_report(archive.scores(), tmp_path / "out", labels=labels)


def test_an_image_scored_twice_is_refused(archive: Archive, tmp_path: Path) -> None:
    scores = archive.scores(ids=[*archive.ids[:-1], archive.ids[0]])
    with pytest.raises(TableError, match="1 images have more than one row"):
        write_report(scores, tmp_path / "out")


@pytest.mark.parametrize("label", [2, -1])
def test_other_labels_than_0_and_1_are_refused(archive: Archive, tmp_path: Path, label: int) -> None:
    values = archive.y["Effusion"].tolist()
    values[100] = label
    with pytest.raises(TableError, match=r"Effusion holds \[.*\]; use 0, 1 and null"):
        write_report(archive.scores(), tmp_path / "out", labels=archive.labels(Effusion=values), split="test")


def test_out_that_is_a_file_is_refused(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        write_report(archive.scores(), tmp_path / "out")


def test_no_scores_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        write_report(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no Parquet files"):
        write_report(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(TableError, match="not a readable Parquet file"):
        write_report(tmp_path / "text.parquet", tmp_path / "out")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"p_Mass": [0.1]}, "no column image_id"),
        ({"image_id": ["a"]}, "no column p_<Finding>"),
        ({"image_id": ["a"], "p_Mass": [1.5]}, r"outside 0\.\.1"),
        ({"image_id": ["a"], "p_Mass": ["high"]}, "not numbers"),
        ({"image_id": ["a"], "p_Mass": [0.1], "status": ["fine"]}, "use ok or error"),
        ({"image_id": ["a"], "p_Infiltrate": [0.1], "p_Infiltration": [0.2]}, "same finding"),
        ({"image_id": pa.array([], pa.string()), "p_Mass": pa.array([], pa.float32())}, "holds no rows"),
        ({"image_id": pa.array([None], pa.string()), "p_Mass": [0.1]}, "have no image_id"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(TableError, match=message):
        write_report(tmp_path / "p.parquet", tmp_path / "out")


@pytest.mark.parametrize("folder", [False, True])
def test_another_systems_predictions(archive: Archive, tmp_path: Path, folder: bool) -> None:
    table = pa.table(
        {
            "image_id": archive.ids,
            "p_Effusion": archive.p["Effusion"].astype(np.float64),
            "p_Pleural Thickening": archive.p["Cardiomegaly"],
            "p_Lung Lesion": archive.p["Cardiomegaly"],
        }
    )
    path = tmp_path / "theirs"
    if folder:
        path.mkdir()
        pq.write_table(table.slice(0, 100), path / "a.parquet")
        pq.write_table(table.slice(100), path / "b.parquet")
    else:
        pq.write_table(table, path)
    m, page = report(archive, tmp_path / "out", scores=str(path), labels=archive.labels())
    assert m["split"] is None
    assert m["n_images"] == len(archive.ids)
    expected = sklearn_metrics.roc_auc_score(archive.y["Effusion"], archive.p["Effusion"])
    assert m["findings"]["Effusion"]["auroc"] == pytest.approx(expected, abs=1e-12)
    assert m["findings"]["Effusion"]["sensitivity"] is None
    assert m["macro"]["findings"] == ["Effusion"]
    assert m["leak_check"]["checked"] is False
    assert "another system" in page
    assert "p_Lung Lesion" in page
    best = read_worklist(tmp_path / "out")[0]
    highest = np.maximum(archive.p["Effusion"], archive.p["Cardiomegaly"])
    assert best["image_id"] == archive.ids[int(highest.argmax())]


@pytest.mark.parametrize("how", ["imported", "started from a file"])
def test_where_the_training_images_are_not_all_known_no_leak_check_is_claimed(
    archive: Archive, tmp_path: Path, how: str
) -> None:
    scores = Path(archive.scores(provenance={"initial_weights": "a file", "lineage": "unknown"}))
    if how == "imported":  # as import-weights leaves it: nothing is known to have trained it
        empty = pq.read_table(scores / "split.parquet").slice(0, 0)
        pq.write_table(empty, scores / "split.parquet")
    m, page = report(archive, tmp_path / "out", scores=str(scores), labels=archive.labels(), split="test")
    assert m["leak_check"]["checked"] is False
    assert "passed: none of the" not in page
    assert "cannot be ruled out here" in page


def test_a_net_that_was_never_trained_is_called_so(archive: Archive, tmp_path: Path) -> None:
    _, page = report(archive, tmp_path / "out", scores=archive.scores(curves=[]), labels=archive.labels(), split="test")
    assert "may never have been trained" in page


def test_the_rows_of_an_unfinished_run_are_not_taken_for_another_systems(archive: Archive, tmp_path: Path) -> None:
    scores = Path(archive.scores(success=False))
    for name in ("run.json", "model.json", "split.parquet"):
        (scores / name).unlink()
    (scores / "settings.json").write_text("{}")
    for inside in (scores, scores / "scores", next((scores / "scores").iterdir())):
        with pytest.raises(InputError, match="did not finish"):
            write_report(inside, tmp_path / "out", labels=archive.labels())


def test_examples_without_operating_points_are_the_ends_of_the_scores(archive: Archive, tmp_path: Path) -> None:
    table = read_scores(archive.scores())
    for flags in table.flags.values():
        flags[:] = -1
    labels = archive.labels()
    evaluated = join(table, manifest.read_manifest(labels), labels, "test", {})
    groups = examples(table, evaluated, 0)
    assert [title for title, _ in groups] == [
        "Positives that score high", "Positives that score low", "Negatives that score high",
    ]  # fmt: skip
    assert groups[0][1]
    for tile in groups[0][1]:
        assert tile.heading in tile.true


def test_missing_probabilities_of_another_system_are_counted(archive: Archive, tmp_path: Path) -> None:
    p = archive.p["Effusion"].astype(np.float64)
    p[:7] = np.nan
    pq.write_table(pa.table({"image_id": archive.ids, "p_Effusion": p}), tmp_path / "theirs.parquet")
    m, page = report(archive, tmp_path / "out", scores=str(tmp_path / "theirs.parquet"), labels=archive.labels())
    assert (m["findings"]["Effusion"]["n"], m["findings"]["Effusion"]["unscored"]) == (len(p) - 7, 7)
    assert "7 labelled images have no score for it" in page


def test_without_labels(archive: Archive, tmp_path: Path) -> None:
    m, page = report(archive, tmp_path / "out")
    assert (m["split"], m["findings"], m["macro"]) == (None, {}, None)
    assert (m["n_images"], m["n_patients"]) == (177, 59)
    assert m["counts"]["by_code"] == {"missing": 2, "corrupt": 1}
    observed = (archive.p["Effusion"][archive.ok] >= archive.threshold).mean()
    assert m["flag_rates"]["Effusion"] == {"observed": pytest.approx(observed), "expected": 0.4, "n": 177}
    assert "says what was found, not how well" in page
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"priority.png", "priority.svg", "learning_curves.png", "worklist.csv"} <= names
    assert "roc.png" not in names


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_pictures_are_written_and_old_ones_removed(archive: Archive, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scores = archive.scores()
    report(archive, out, scores=scores, labels=archive.labels(), split="test")
    for name in ("auroc", "roc", "precision_recall", "examples", "learning_curves", "prevalence"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width > 400
            assert round(picture.info["dpi"][0]) == 150
        assert (out / f"{name}.svg").read_text().startswith("<?xml")
    assert not (out / "priority.png").exists()
    report(archive, out, scores=scores)
    assert not (out / "roc.png").exists()
    assert (out / "priority.png").exists()


def test_the_same_input_gives_the_same_files(archive: Archive, tmp_path: Path) -> None:
    scores, labels = archive.scores(), archive.labels()
    for name in ("one", "two"):
        report(archive, tmp_path / name, scores=scores, labels=labels, split="test")
    for name in ("metrics.json", "worklist.csv", "report.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_worklist_has_one_row_per_study(archive: Archive, tmp_path: Path) -> None:
    report(archive, tmp_path / "out")
    rows = read_worklist(tmp_path / "out")
    assert len(rows) == 120  # of three images two share a study and one has none
    assert sum(int(row["n_images"]) for row in rows) == 180
    assert sum(int(row["n_errors"]) for row in rows) == 3
    scored = [float(row["priority"]) for row in rows if row["priority"]]
    assert scored == sorted(scored, reverse=True)
    assert [row["priority"] for row in rows[-2:]] == ["", ""]
    assert {row["errors"] for row in rows[-2:]} == {"corrupt|missing", "missing"}
    study = next(row for row in rows if row["patient_id"] == "20" and row["study_id"] == "s20")
    first = 60
    diseases = [f for f in archive.findings if f != NO_FINDING]
    highest = max(archive.p[f][i] for f in diseases for i in (first, first + 1))
    assert np.float32(study["priority"]) == highest
    flagged = [f for f in diseases if max(archive.p[f][first : first + 2]) >= archive.threshold]
    assert study["flagged"] == "|".join(flagged)
    assert NO_FINDING not in study["flagged"]


def test_worklist_cells_are_no_formulas(archive: Archive, tmp_path: Path) -> None:
    ids = [*archive.ids]
    ids[0], ids[3], ids[6], ids[9] = "=HYPERLINK(1)", "+1.png", "-1.png", "@a.png"
    archive.patient[0] = "=1+1"
    report(archive, tmp_path / "out", scores=archive.scores(ids=ids))
    cells = {cell for row in read_worklist(tmp_path / "out") for cell in row.values()}
    assert {"'=1+1"} <= cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_text_from_tables_is_escaped(archive: Archive, tmp_path: Path) -> None:
    plain = Tags()
    plain.feed(report(archive, tmp_path / "plain")[1])
    ids = [*archive.ids]
    ids[int(archive.p["Effusion"].argmax())] = '<img src=x onerror="alert(1)">.png'
    archive.patient = [f"<b>{patient}</b>" for patient in archive.patient]
    archive.study = ["</td><script>alert(2)</script>" if s else None for s in archive.study]
    scores = archive.scores(ids=ids, backbone="<i>x</i>", provenance={"<u>": "<s>"})
    _, page = report(archive, tmp_path / "hostile", scores=scores)
    hostile = Tags()
    hostile.feed(page)
    assert "&lt;img src=x onerror=" in page
    assert sorted(set(hostile.tags)) == sorted(set(plain.tags))
    assert hostile.tags.count("script") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_page_asks_no_network_for_anything(archive: Archive, tmp_path: Path) -> None:
    _, page = report(archive, tmp_path / "out", labels=archive.labels(), split="test")
    tags = Tags()
    tags.feed(page)
    assert tags.urls
    assert all(url.startswith("data:image/png;base64,") for url in tags.urls)
    assert not re.search(r"@import|url\(|https?://", page)
    assert "Research use only" in page


def test_all_labels_of_the_whole_list(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive", patients=40, findings=LABELS)
    m, _ = report(archive, tmp_path / "out", labels=archive.labels(), split="test")
    assert list(m["findings"]) == list(LABELS)
    assert m["macro"]["findings"] == [f for f in FINDINGS if f != "Hernia"]


def test_all_failed(archive: Archive, tmp_path: Path) -> None:
    archive.ok[:] = False
    scores = archive.scores(curves=[])
    m, page = report(archive, tmp_path / "out", scores=scores, labels=archive.labels(), split="test")
    assert m["n_images"] == 0
    assert m["macro"]["auroc"] is None
    assert m["macro"]["findings"] == []
    assert all(entry["auroc"] is None for entry in m["findings"].values())
    assert "180 of 180 images (100.00%) could not be scored" in page
    assert len(read_worklist(tmp_path / "out")) == 120
