"""write_report: folders in; metrics.json, worklist.csv, figures and the page out."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import Page
from PIL import Image
from score_archive import FEW, Archive, Report, refused, report
from sklearn import metrics as sklearn_metrics

from ray_cxr.errors import InputError, LeakError, OutputError, TableError
from ray_cxr.evaluation.bootstrap import resampled_aurocs
from ray_cxr.evaluation.clustered import auroc_interval, clustered_share_interval
from ray_cxr.evaluation.intervals import patient_codes, percentile_interval, wilson_interval
from ray_cxr.evaluation.published import OFFICIAL_TEST_IMAGES
from ray_cxr.imaging.phantoms import TABLE_NAME
from ray_cxr.imaging.sandbox import Decoder
from ray_cxr.labels import LABELS, NO_FINDING
from ray_cxr.reporting import html, plots
from ray_cxr.reporting.cases import CaseBuilder, load_image
from ray_cxr.reporting.evaluation_set import join_labels
from ray_cxr.reporting.examples import sample_examples
from ray_cxr.reporting.figure_set import build_reliability
from ray_cxr.reporting.measures import BootstrapSettings, ModelOutputs, evaluate
from ray_cxr.reporting.scores import read_scores

N = 180  # images of an archive


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path / "archive")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report on the test split; five scored images have no label, one labelled image has no score."""
    home = tmp_path_factory.mktemp("evaluated")
    archive = Archive(home / "archive")
    scores, ids = archive.scores(), [*archive.ids]
    ids[-4], archive.ok[-4] = "unscored.png", False
    labels = archive.labels(keep=range(5, N), image_id=ids)
    return report(archive, home / "out", scores=scores, labels=labels, split="test")


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Report:
    home = tmp_path_factory.mktemp("unlabelled")
    return report(Archive(home / "archive"), home / "out")


def test_numbers_equal_sklearn_on_the_same_rows(evaluated: Report) -> None:
    m, archive = evaluated.metrics, evaluated.archive
    assert (m["split"], m["split_kind"], m["split_seed"]) == ("test", "patient", 0)
    assert (m["n_images"], m["n_patients"]) == (3 * 44 - 1, 44)
    rows = archive.tested
    for finding in ("Cardiomegaly", "Effusion", NO_FINDING):
        y, p, patients = archive.y[finding][rows], archive.p[finding][rows], np.array(archive.patient)[rows]
        flags = p >= archive.threshold
        got = m["findings"][finding]
        expected = {
            "n": len(y),
            "positives": y.sum(),
            "auroc": sklearn_metrics.roc_auc_score(y, p),
            "average_precision": sklearn_metrics.average_precision_score(y, p),
            "sensitivity": sklearn_metrics.recall_score(y, flags),
            "specificity": sklearn_metrics.recall_score(1 - y, ~flags),
            "ppv": sklearn_metrics.precision_score(y, flags),
            "threshold": archive.threshold,
            "reason": None,
        }
        assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert got["sensitivity_low"] <= got["sensitivity"] <= got["sensitivity_high"]
        interval = percentile_interval(resampled_aurocs(y[:, None], p[:, None], patients, n_resamples=60).values[:, 0])
        assert (got["auroc_low"], got["auroc_high"]) == (interval.low, interval.high)
        assert got["auroc_delong_low"] < got["auroc"] < got["auroc_delong_high"]
        codes = patient_codes(patients)[0]
        shown = {
            "auroc": auroc_interval(y, p, codes),
            "sensitivity": clustered_share_interval(flags[y == 1], codes[y == 1]),
            "specificity": clustered_share_interval(~flags[y == 0], codes[y == 0]),
            "ppv": clustered_share_interval(y[flags] == 1, codes[flags]),
            "npv": clustered_share_interval(y[~flags] == 0, codes[~flags]),
            "flag_rate": clustered_share_interval(flags, codes),
        }
        for name, (low, high) in shown.items():
            assert (got[f"{name}_interval_low"], got[f"{name}_interval_high"]) == pytest.approx((low, high), abs=1e-12)
            assert got[f"{name}_interval_method"]
        low, high = shown["auroc"]
        assert f"({low:.3f}–{high:.3f})" in evaluated.page


def test_page_and_markdown_show_the_computed_numbers(evaluated: Report) -> None:
    auroc = f"{evaluated.metrics['findings']['Effusion']['auroc']:.3f}"
    for text in ((evaluated.out / "report.md").read_text(encoding="utf-8"), evaluated.page):
        for words in (auroc, "test split of a random patient split, seed 0", "Research use only"):
            assert words in text


def test_page_names_its_sections_its_date_and_what_it_was_computed_from(evaluated: Report, unlabelled: Report) -> None:
    for found in (evaluated, unlabelled):
        page, scores = Page(found.page), found.archive.root / "SCORES"
        listed = {url[1:] for url in page.urls if url.startswith("#")}
        assert {"worklist", "alerts", "model"} <= listed <= page.ids
        assert ("findings" in listed) == (found is evaluated)
        report, digests = found.metrics["report"], found.metrics["digests"]
        assert report["created"] == "2023-11-14T22:13:20+00:00"
        assert digests["run"] == hashlib.sha256((scores / "run.json").read_bytes()).hexdigest()
        assert all(text in page.text for text in (report["created"], report["version"], digests["run"], "d1" * 32))


def test_synthetic_images_are_compared_with_no_published_result(archive: Archive, tmp_path: Path) -> None:
    labels = archive.labels(info={"kind": "patient", "seed": 0, "tables": {TABLE_NAME: "ab" * 32}})
    found = report(archive, tmp_path / "out", labels=labels, split="test")
    assert (found.metrics["report"]["synthetic"], found.metrics["published"]) == (True, [])
    assert "published" not in Page(found.page).ids


def test_undefined_numbers_have_a_reason_and_stay_out_of_the_macro(evaluated: Report) -> None:
    m = evaluated.metrics
    assert m["macro"]["findings"] == ["Cardiomegaly", "Effusion"]
    assert m["macro"]["auroc"] == np.mean([m["findings"][f]["auroc"] for f in ("Cardiomegaly", "Effusion")])
    assert m["macro"]["auroc_low"] < m["macro"]["auroc"] < m["macro"]["auroc_high"]
    assert m["macro"]["auroc_interval_low"] < m["macro"]["auroc"] < m["macro"]["auroc_interval_high"]
    hernia = m["findings"]["Hernia"]
    assert [hernia[name] for name in ("auroc", "auroc_low", "average_precision", "sensitivity")] == [None] * 4
    assert hernia["reason"] == "no positive images"
    assert hernia["n"] == m["n_images"]
    assert "undefined: no positive images" in evaluated.page
    assert m["published"]
    assert all(paper["reason"] and not paper["comparable"] for paper in m["published"]), "published for another split"
    for entry in m["findings"].values():
        for name in ("auroc", "average_precision", "sensitivity", "ppv", "npv", "f1", "brier", "ppv_at_prevalence"):
            assert (entry[name] is None) == (name in entry["undefined"]), name


def test_every_row_is_counted(evaluated: Report) -> None:
    counts = evaluated.metrics["counts"]
    assert counts == {
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
    assert f"3 of {evaluated.metrics['flagged']['images']} images (" in evaluated.page
    assert evaluated.metrics["drift"]["flags"]["Effusion"]["n"] == 131, "other images may have trained the model"


def test_null_labels_are_not_negatives_and_each_gap_has_a_reason(archive: Archive, tmp_path: Path) -> None:
    effusion = [None if i % 2 else int(y) for i, y in enumerate(archive.y["Effusion"])]
    columns = {"Effusion": effusion, "Mass": [i % 2 for i in range(N)], "Cardiomegaly": [None] * N}
    labels = archive.labels(**columns, info={"kind": "official", "seed": 0})
    m = report(archive, tmp_path / "out", labels=labels, split="test").metrics
    assert any(f"{OFFICIAL_TEST_IMAGES:,}" in note for note in m["notes"]), (
        "these are not all images of the official split"
    )
    found = m["findings"]
    kept = archive.tested & (np.arange(N) % 2 == 0)
    assert found["Effusion"]["n"] == kept.sum()
    expected = sklearn_metrics.roc_auc_score(archive.y["Effusion"][kept], archive.p["Effusion"][kept])
    assert found["Effusion"]["auroc"] == pytest.approx(expected, abs=1e-12)
    assert (found["Cardiomegaly"]["n"], found["Cardiomegaly"]["reason"]) == (0, "no labelled images")
    assert "no column" in found["Mass"]["reason"]
    assert found["Mass"]["positives"] == 66
    assert list(found) == ["Cardiomegaly", "Effusion", "Hernia", "Mass", NO_FINDING]


@pytest.mark.parametrize("normal", [None, 1])
def test_macro_of_no_scored_finding_is_undefined(archive: Archive, tmp_path: Path, normal: int | None) -> None:
    nothing: dict[str, Any] = dict.fromkeys(FEW, [None] * N) | {"No_Finding": [normal] * N}
    labels = archive.labels(sex=["F", "M"] * (N // 2), Mass=archive.y["Effusion"].tolist(), **nothing)
    macro = report(archive, tmp_path / "out", labels=labels, split="test").metrics["macro"]
    assert (macro["auroc"], macro["reason"]) == (None, "no finding has a defined AUROC")


def test_rate_without_variation_between_resamples_shows_wilson(archive: Archive, tmp_path: Path) -> None:
    """No positive is flagged, so [0, 0] would overstate the certainty."""
    positive = archive.y["Effusion"] == 1
    archive.p["Effusion"][positive] = np.linspace(0.1, 0.2, positive.sum(), dtype=np.float32)
    archive.p["Effusion"][~positive] = np.linspace(0.19, 0.25, (~positive).sum(), dtype=np.float32)
    found = report(archive, tmp_path / "out", labels=archive.labels(), split="test")
    effusion = found.metrics["findings"]["Effusion"]
    assert (effusion["sensitivity"], effusion["sensitivity_low"], effusion["sensitivity_high"]) == (0.0, None, None)
    assert effusion["undefined"]["sensitivity_low"] in found.page
    counts = np.unique(np.array(archive.patient)[archive.tested & positive], return_counts=True)[1]
    low, high = effusion["sensitivity_interval_low"], effusion["sensitivity_interval_high"]
    assert (low, high) == pytest.approx(wilson_interval(0.0, counts.sum() ** 2 / (counts**2).sum()), abs=1e-12)
    assert f"(0.00–{high:.2f})" in found.page
    assert "Worse than chance: Effusion." in found.page


@pytest.mark.parametrize("split", [None, "test"])
def test_training_images_are_refused(archive: Archive, tmp_path: Path, split: str | None) -> None:
    # The labels assign the model's training images to the test split.
    labels = archive.labels(split=["test"] * N)
    found = "45 images and 15 patients"
    error = refused(LeakError, found, archive.scores(), tmp_path / "out", labels=labels, split=split)
    assert ("`--split test`" in error) == (split is None)


def test_the_remedy_for_training_images_names_only_the_missing_option(archive: Archive, tmp_path: Path) -> None:
    error = refused(LeakError, "--split test", archive.scores(), tmp_path / "out", labels=archive.labels())
    assert "--manifest" not in error


def test_commands_in_markdown_can_be_copied() -> None:
    shown = html.escape_around_code("a_b | `cxr --set operating_point=flag_rate=0.1`\n<b> `")
    assert shown == "a\\_b \\| `cxr --set operating_point=flag_rate=0.1` \\<b\\> \\`"


def test_images_with_a_quality_flag_are_named_and_a_stated_view_is_no_guess(archive: Archive, tmp_path: Path) -> None:
    table = pq.read_table(f"{archive.scores()}/scores").drop_columns("quality_flag")
    flags = {3: "lateral", 4: "lateral", **dict.fromkeys(range(8, 18), "not_frontal_chest")}
    flags |= dict.fromkeys(range(20, 31), "inverted")
    columns = {"quality_flag": [flags.get(i) for i in range(archive.n)], "view": ["LATERAL"] * 4 + [None] * archive.n}
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values[: archive.n], pa.string()))
    pq.write_table(table, tmp_path / "scores.parquet")
    found = report(archive, tmp_path / "out", scores=str(tmp_path / "scores.parquet"))
    quality = found.metrics["flagged"]["quality_flags"]
    assert (quality["stated_lateral"], quality["first_images"]["lateral"]) == (1, [archive.ids[4], archive.ids[3]])
    section = found.page.partition('id="failed"')[2].partition("<h2")[0]
    assert [archive.ids[i] in section for i in (3, 4, *range(8, 18), 20, 23)] == [True] * 13 + [False]


@pytest.mark.parametrize("prefix", ["", "X"])
def test_other_images_of_training_patients_are_refused(archive: Archive, tmp_path: Path, prefix: str) -> None:
    """Labels and scores may spell the patients differently."""
    patients = [f"{prefix}{patient}" for patient in archive.patient]
    labels = archive.labels(patient_id=patients, split=["test"] * N, keep=range(1, N, 3))
    scores = Path(archive.scores())
    trained = pq.read_table(scores / "split.parquet")
    others = [name not in archive.ids[1::3] for name in trained["image_id"].to_pylist()]
    pq.write_table(trained.filter(pa.array(others)), scores / "split.parquet")
    refused(LeakError, "0 images and 15 patients", scores, tmp_path / "out", labels=labels, split="test")


def test_zeros_of_patient_ids_survive_and_hide_no_leak(archive: Archive, tmp_path: Path) -> None:
    """The model was trained with NIH's newer table (13), and is evaluated with the older one (00000013)."""
    scores = Path(archive.scores())
    trained = pq.read_table(scores / "split.parquet")
    others = pa.array([name not in archive.ids[1::3] for name in trained["image_id"].to_pylist()])
    archive.patient = [f"{patient:0>8}" for patient in archive.patient]
    archive.scores()
    found = report(archive, tmp_path / "padded", scores=str(scores), labels=archive.labels(), split="test")
    shown = {row["patient_id"] for row in found.worklist()}
    assert shown == {patient for patient, part in zip(archive.patient, archive.split, strict=True) if part == "test"}
    assert found.worklist()[0]["patient_id"] in found.page
    pq.write_table(trained.filter(others), scores / "split.parquet")
    labels = archive.labels(split=["test"] * N, keep=range(1, N, 3))
    refused(LeakError, "0 images and 15 patients", scores, tmp_path / "out", labels=labels, split="test")


def test_paths_inside_the_score_folder_do_not_bypass_the_guard(archive: Archive, tmp_path: Path) -> None:
    inside, labels = Path(archive.scores()) / "scores", archive.labels()
    (tmp_path / "link").symlink_to(inside)
    for path in (inside, inside / "00000.parquet", tmp_path / "link"):
        refused(LeakError, "trained this model", path, tmp_path / "out", labels=labels)


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_splits_are_evaluated_and_marked(archive: Archive, tmp_path: Path, split: str) -> None:
    found = report(archive, tmp_path / "out", labels=archive.labels(info={}), split=split)
    assert found.metrics["split"] == split
    assert found.metrics["leak_check"]["shared_by_part"] == {split: found.metrics["n_images"]}
    assert found.metrics["leak_check"]["shared_images"] == found.metrics["n_images"] == {"train": 30, "val": 15}[split]
    for words in (f"This is the {split} split", f"{split} split of unknown origin"):
        assert words in found.page


def test_validation_of_the_official_split_warns_of_a_lower_test(archive: Archive, tmp_path: Path) -> None:
    def find_words(split: str, info: dict[str, Any]) -> bool:
        return (
            "Expect less on test"
            in report(archive, tmp_path / "out", labels=archive.labels(info=info), split=split).page
        )

    official = {"kind": "official", "tables": {"Data_Entry_2017.csv": "ab" * 32}}
    assert find_words("val", official)
    assert not find_words("train", official)
    assert not find_words("val", official | {"kind": "patient"})
    assert not find_words("val", official | {"tables": {TABLE_NAME: "ab" * 32}})


def test_labels_with_another_split_than_the_model_are_reported(archive: Archive, tmp_path: Path) -> None:
    archive.patient = [None] * N
    labels = archive.labels(split=["val"] * N, info={"kind": "given"})
    found = report(archive, tmp_path / "out", labels=labels, split="val")
    assert "val split as given in the tables" in found.page
    assert "30 images are val" in found.page
    check = found.metrics["leak_check"]
    assert check["shared_by_part"] == {"train": 30, "val": 15}
    assert check["unknown_patients"] == found.metrics["n_images"]
    assert (check["training_patients"], check["unknown_training_patients"]) == (None, 45)


def test_unknown_patients_are_in_no_number_of_patients(archive: Archive, tmp_path: Path) -> None:
    archive.patient = [None] * N
    found = report(archive, tmp_path / "out", labels=archive.labels(sex=["F"] * N), split="test")
    m = found.metrics
    assert (m["n_images"], m["n_patients"], m["images_without_patient"]) == (132, None, 132)
    texts = [found.page, (found.out / "report.md").read_text(encoding="utf-8")]
    assert all("patients unknown" in text and "132 patients" not in text for text in texts)
    assert {f["positive_patients"] for f in m["findings"].values() if f["positives"]} == {None}
    assert {group["n_patients"] for group in m["subgroups"]["groups"]} == {None}
    assert {rate["n_patients"] for rate in m["drift"]["flags"].values()} == {None}
    assert "training images have no patient id" in found.page
    assert "132 evaluated images have no patient id. Each counts as one patient in the intervals" in found.page
    assert "0 training patients" not in found.page
    # Some are known, two of them apart from leading zeros.
    archive.patient = ["007", "7", *[None] * (N - 2)]
    found = report(archive, tmp_path / "again", scores=archive.scores())
    assert (found.metrics["n_patients"], found.metrics["images_without_patient"]) == (2, 175)
    assert "2 patients (175 images without a patient id)" in found.page
    assert {row["patient_id"] for row in found.worklist()} == {"007", "7", ""}


@pytest.mark.parametrize("imported", [True, False])
def test_no_leak_check_is_claimed_without_all_training_images(archive: Archive, tmp_path: Path, imported: bool) -> None:
    scores = Path(archive.scores(curves=[], provenance={"initial_weights": "random", "lineage": "unknown"}))
    if imported:  # import-weights writes a split without rows
        pq.write_table(pq.read_table(scores / "split.parquet").slice(0, 0), scores / "split.parquet")
    found = report(archive, tmp_path / "out", scores=str(scores), labels=archive.labels(), split="test")
    assert found.metrics["leak_check"]["checked"] is False
    assert "passed: none of the" not in found.page
    assert "a leak between its training and this evaluation cannot be excluded" in found.page


@pytest.mark.parametrize(
    ("columns", "split", "error", "names"),
    [
        (None, "test", InputError, "--manifest"),
        ({}, "Test", InputError, "--split Test"),
        ({"split": [None] * N}, "test", InputError, "has no splits"),
        ({"split": ["train"] * N}, "test", InputError, "train"),
        ({"keep": []}, None, InputError, "holds no rows"),
        (dict.fromkeys(LABELS, [None] * N), None, InputError, "not a manifest with labels; no image has a label"),
        ({"image_id": [f"other_{i}.png" for i in range(N)]}, None, InputError, "other_0.png"),
        ({"Effusion": [2] * N}, "test", TableError, r"Effusion holds \[2\]"),
        ({"Effusion": [-1] * N}, "test", TableError, r"Effusion holds \[-1\]"),
    ],
)
def test_unusable_labels_are_refused(
    archive: Archive, tmp_path: Path, columns: dict[str, Any] | None, split: str, error: type[Exception], names: str
) -> None:
    labels = None if columns is None else archive.labels(**columns)
    refused(error, names, archive.scores(), tmp_path / "out", labels=labels, split=split)


def test_unusable_scores_are_refused(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no", encoding="utf-8")
    cases: list[tuple[str, type[Exception], str]] = [
        (str(tmp_path / "absent"), InputError, "absent"),
        (str(tmp_path / "empty"), InputError, "no Parquet files"),
        (str(tmp_path / "text.parquet"), TableError, r"text\.parquet"),
        (archive.scores(ids=[*archive.ids[:-1], archive.ids[0]]), TableError, "1 images have more than one row"),
    ]
    for scores, error, names in cases:
        refused(error, names, scores, tmp_path / "out")


def test_unfinished_scores_are_refused(archive: Archive, tmp_path: Path) -> None:
    """Paths inside the folder are refused too, even before `score` wrote anything but rows."""
    scores = Path(archive.scores(finished=False))
    refused(InputError, "did not finish", scores, tmp_path / "out")
    for name in ("run.json", "model.json", "split.parquet"):
        (scores / name).unlink()
    (scores / "settings.json").write_text("{}", encoding="utf-8")
    for inside in (scores, scores / "scores", next((scores / "scores").iterdir())):
        refused(InputError, "did not finish", inside, tmp_path / "out", labels=archive.labels())


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({"p_Mass": [0.1]}, "image_id"),
        ({"image_id": ["a"]}, "p_<Finding>"),
        ({"image_id": ["a"], "p_Mass": [1.5]}, "p_Mass"),
        ({"image_id": ["a"], "p_Mass": [-0.1]}, "p_Mass"),
        ({"image_id": ["a"], "p_Mass": ["high"]}, "p_Mass"),
        ({"image_id": ["a"], "p_Mass": [0.1], "status": ["fine"]}, "fine"),
        ({"image_id": ["a"], "p_Infiltrate": [0.1], "p_Infiltration": [0.2]}, "p_Infiltrate and p_Infiltration"),
        ({"image_id": pa.array([], pa.string()), "p_Mass": pa.array([], pa.float32())}, "holds no rows"),
        ({"image_id": pa.array([None], pa.string()), "p_Mass": [0.1]}, "image_id"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, columns: dict[str, Any], names: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    refused(TableError, names, tmp_path / "p.parquet", tmp_path / "out")


def test_unusable_output_is_refused(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    pq.write_table(pa.table({"image_id": archive.ids, "p_Effusion": archive.p["Effusion"]}), theirs / "a.parquet")
    scores = Path(archive.scores())
    for source, out in ((scores, tmp_path / "file"), (theirs, theirs / "report"), (scores, scores / "scores")):
        refused(OutputError, f"--out {out}", source, out)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("", encoding="utf-8")
    error = refused(OutputError, f"--out {tmp_path / 'thesis'}", scores, tmp_path / "thesis")
    assert "chapter.tex" in error
    made = report(archive, tmp_path / "made", scores=str(scores), labels=archive.labels(), split="test").out
    before = {path: path.read_bytes() for path in made.iterdir()}
    refused(OutputError, f"--out {made}", scores, made)  # it would lose the evaluation
    assert {path: path.read_bytes() for path in made.iterdir()} == before
    for _ in range(2):  # next to the rows; the second report does not read the first as scores
        report(archive, scores / "report", scores=str(scores))


def test_predictions_of_another_system_are_evaluated(archive: Archive, tmp_path: Path) -> None:
    effusion = archive.p["Effusion"].astype(np.float64)
    effusion[:7] = np.nan
    columns = {"p_Effusion": effusion, "p_Pleural Thickening": archive.p["Cardiomegaly"], "p_Lung Lesion": effusion}
    table = pa.table({"image_id": archive.ids, **columns})
    (tmp_path / "theirs").mkdir()
    pq.write_table(table.slice(0, 100), tmp_path / "theirs" / "a.parquet")
    pq.write_table(table.slice(100), tmp_path / "theirs" / "b.parquet")
    found = report(archive, tmp_path / "out", scores=str(tmp_path / "theirs"), labels=archive.labels())
    m = found.metrics
    assert (m["split"], m["n_images"], m["leak_check"]["checked"]) == (None, N, False)
    result = m["findings"]["Effusion"]
    expected = sklearn_metrics.roc_auc_score(archive.y["Effusion"][7:], effusion[7:])
    assert result["auroc"] == pytest.approx(expected, abs=1e-12)
    assert (result["sensitivity"], result["n"], result["unscored"]) == (None, N - 7, 7)
    assert m["macro"]["findings"] == ["Effusion"]
    assert "p_Lung Lesion" in found.page
    highest = np.fmax(effusion, archive.p["Cardiomegaly"])
    assert found.worklist()[0]["image_id"] == archive.ids[int(highest.argmax())]


def test_report_without_labels_counts_and_flags(unlabelled: Report) -> None:
    m, archive = unlabelled.metrics, unlabelled.archive
    assert (m["split"], m["findings"], m["macro"], m["n_images"], m["n_patients"]) == (None, {}, None, 177, 59)
    assert m["counts"]["by_code"] == {"missing": 2, "corrupt": 1}
    observed = (archive.p["Effusion"][archive.ok] >= archive.threshold).mean()
    assert m["flag_rates"]["Effusion"] == {"observed": pytest.approx(observed), "expected": 0.4, "n": 177}
    assert m["drift"]["flags"]["Effusion"]["n"] == 177


def test_report_of_failed_images_only(archive: Archive, tmp_path: Path) -> None:
    archive.ok[:] = False
    scores = archive.scores(curves=[])
    found = report(archive, tmp_path / "out", scores=scores, labels=archive.labels(), split="test")
    assert (found.metrics["n_images"], found.metrics["macro"]["auroc"]) == (0, None)
    assert all(entry["auroc"] is None for entry in found.metrics["findings"].values())
    assert "135 of 135 images (100.00%)" in found.page
    assert len(found.worklist()) == 90


def test_worklist_has_one_row_per_study(unlabelled: Report) -> None:
    archive, rows = unlabelled.archive, unlabelled.worklist()
    assert len(rows) == 120  # of every three images, two share a study and one has none
    assert [sum(int(row[name]) for row in rows) for name in ("n_images", "n_errors")] == [180, 3]
    doubtful = [bool(row["quality_flags"] or row["errors"]) for row in rows]
    parts = [0 if row["flagged"] else 1 if doubt else 2 for row, doubt in zip(rows, doubtful, strict=True)]
    order = [(part, -float(row["priority"] or 0)) for part, row in zip(parts, rows, strict=True)]
    assert order == sorted(order), "studies with a flag first, then those that need a look for another reason"
    failed = [row for row in rows if not row["priority"]]
    assert {row["errors"] for row in failed} == {"corrupt|missing", "missing"}
    assert rows[-1]["priority"]
    study = next(row for row in rows if row["patient_id"] == "20" and row["study_id"] == "s20")
    highest = {f: archive.p[f][60:62].max() for f in archive.diseases}
    abnormality = 1 - np.prod([1 - 0.9 * p for p in highest.values()])
    assert float(study["priority"]) == float(study["abnormality"]) == pytest.approx(abnormality, abs=1e-6)
    assert study["top_finding"] == max(highest, key=lambda f: highest[f])
    assert study["flagged"] == "|".join(f for f, p in highest.items() if p >= archive.threshold)


def test_order_of_images_and_studies_is_measured(evaluated: Report) -> None:
    """An image has a finding if one is labelled; its abnormality combines the calibrated probabilities 0.9 p."""
    archive, found = evaluated.archive, evaluated.metrics["abnormality"]
    rows = np.flatnonzero(archive.tested)
    rows = rows[rows != N - 4]  # without a score
    y = np.any([archive.y[f][rows] for f in archive.diseases], axis=0) | (archive.y[NO_FINDING][rows] == 0)
    abnormality = (1 - np.prod([1 - np.float32(0.9) * archive.p[f][rows] for f in archive.diseases], axis=0)).astype(
        "f4"
    )
    expected = sklearn_metrics.roc_auc_score(y, abnormality)
    assert found["images"]["abnormality_auroc"]["value"] == pytest.approx(expected, abs=1e-3)
    assert found["images"]["priority_auroc"] == found["images"]["abnormality_auroc"]
    assert (found["images"]["n"], found["images"]["abnormal"]) == (len(rows), y.sum())
    # The first two images of a patient are a study, the third has no study id.
    assert found["studies"]["n"] == len({(i // 3, i % 3 == 2) for i in rows})
    assert set(found["findings"]) == {"Cardiomegaly", "Effusion"}
    assert "ranking" in Page(evaluated.page).ids


def test_the_same_input_gives_the_same_files(unlabelled: Report, evaluated: Report, tmp_path: Path) -> None:
    for first in (unlabelled, evaluated):
        scores = str(first.archive.root / "SCORES")
        again = report(first.archive, tmp_path / first.out.parent.name, scores=scores, **first.options)
        for name in ("metrics.json", "worklist.csv", "report.html"):
            assert (first.out / name).read_bytes() == (again.out / name).read_bytes()


def test_hostile_text_is_escaped_in_page_and_worklist(unlabelled: Report, archive: Archive, tmp_path: Path) -> None:
    ids = [*archive.ids]
    ids[int(archive.p["Effusion"].argmax())] = '<img src=x onerror="alert(1)">.png'
    ids[2], ids[5], ids[8], ids[11] = "=HYPERLINK(1)", "+1.png", "-1.png", "@a.png"
    archive.patient = ["=1+1", *(f"<b>{patient}</b>" for patient in archive.patient[1:])]
    archive.study = ["</td><script>alert(2)</script>" if s else None for s in archive.study]
    scores = archive.scores(ids=ids, backbone="<i>x</i>", provenance={"<u>": "<s>"})
    found = report(archive, tmp_path / "hostile", scores=scores)
    hostile, plain = Page(found.page), Page(unlabelled.page)
    assert "&lt;img src=x onerror=" in found.page
    assert sorted(set(hostile.tags)) == sorted(set(plain.tags))
    assert hostile.tags.count("script") == 1
    cells = {cell for row in found.worklist() for cell in row.values()}
    assert {"'=1+1", "'=HYPERLINK(1)", "'+1.png", "'-1.png", "'@a.png"} <= cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]


@pytest.mark.slow
def test_figures_are_in_the_folder_and_in_a_page_that_loads_nothing(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "DPI", 50)
    out, scores = tmp_path / "out", archive.scores()
    page = Page(report(archive, out, scores=scores, draw=True, labels=archive.labels(), split="test").page)
    assert page.urls
    assert all(url.startswith(("data:image/", "#")) for url in page.urls)
    assert not re.search(r"@import|url\((?!#)|https?://", page.source)
    names = {"auroc", "roc", "precision_recall", "examples", "learning_curves", "prevalence"}
    for path in [*out.glob("*.png")]:
        with Image.open(path) as image:
            assert image.width > 130
        assert path.with_suffix(".svg").read_text(encoding="utf-8").startswith("<?xml")
    assert names <= {path.stem for path in out.glob("*.png")}
    assert not (out / "priority.png").exists()
    (out / "metrics.json").unlink()  # a report without labels replaces one whose numbers are gone
    report(archive, out, scores=scores)
    assert {"priority", "learning_curves"} <= {path.stem for path in out.glob("*.svg")}
    assert not (out / "roc.png").exists()


@pytest.mark.slow
def test_decoder_that_aborts_costs_its_example(archive: Archive, tmp_path: Path, monkeypatch) -> None:
    site = (
        "import os\nfrom ray_cxr.imaging import decode\ndecode.decode_with_flags = lambda data, **limits: os.abort()\n"
    )
    (tmp_path / "sitecustomize.py").write_text(site, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Decoder([None]) as decoder:
        path = next(path for path in read_scores(archive.scores()).paths if path is not None)
        assert load_image(path, decoder) == (None, "decoder_crash")
        assert load_image(None, decoder) == (None, "missing")


def test_examples_and_reliability_follow_the_scores(archive: Archive) -> None:
    table, labels = read_scores(archive.scores()), archive.labels()
    evaluated = join_labels(table, labels, "test")
    outputs, bootstrap = ModelOutputs.select(table, evaluated.rows), BootstrapSettings(10, 0)
    found = evaluate(outputs, evaluated.labels, evaluated.patients, prevalences={}, bootstrap=bootstrap)
    curves = {curve.finding: curve for curve in build_reliability(table, evaluated, found)}
    predicted = curves["Effusion"].predicted
    shares, _ = np.histogram(curves["Effusion"].p, [0, *((predicted[1:] + predicted[:-1]) / 2), 1])
    assert shares.max() <= 2 * shares.min(), "bins of equal counts"
    for flags in table.flags.values():
        flags[:] = -1  # without operating points, examples come from the highest and lowest scores
    with Decoder([None]) as decoder:
        groups = dict(sample_examples(table, evaluated, CaseBuilder(table, {}, decoder), 0))
    assert list(groups) == ["High-scoring positives", "Low-scoring positives", "High-scoring negatives"]
    high, low, negative = ({case.finding in case.positives for case in cases} for cases in groups.values())
    assert (high, low | {True}, negative) == ({True}, {True}, {False})
