"""Sections of a report beyond the labels' metrics: groups, consensus, boxes, other scores, prevalences."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_archive import Archive, Report, add_heatmaps, refused, report, write_boxes, write_csv
from sklearn.metrics import recall_score, roc_auc_score

from ray_cxr.errors import InputError, LeakError, TableError
from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.alerts import find_abnormal
from ray_cxr.labels import FINDINGS, LABELS
from ray_cxr.reporting import html, tables
from ray_cxr.reporting import report as report_module
from ray_cxr.reporting.report import _read_prevalences


def test_thresholds_keep_two_digits_for_rare_findings() -> None:
    shown = html.format_ranges([(0.000312, 0.0139), (0.05, 0.05001), (0.124, 0.3)])
    assert shown == "0.031% to 1.4%, 5.0%, 12% to 30%"


def write_consensus(path: Path, archive: Archive, rows: np.ndarray) -> str:
    """Write consensus labels that differ from the archive's labels on every fifth image."""
    y = archive.y["Effusion"] ^ (np.arange(archive.n) % 5 == 0)
    return write_csv(path, [["image_id", "Effusion", "Fracture"], *([archive.ids[i], int(y[i]), 0] for i in rows)])


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report on the test split with every reference standard and comparator."""
    home = tmp_path_factory.mktemp("everything")
    archive = Archive(home / "archive")
    scores, tested = archive.scores(), np.flatnonzero(archive.tested)
    add_heatmaps(scores, archive, tested[:36], hits=set(tested[:30].tolist()))
    rng = np.random.default_rng(5)
    worse = {f"p_{f}": rng.permutation(archive.p[f]) for f in ("Cardiomegaly", "Effusion")}
    pq.write_table(pa.table({"image_id": archive.ids, **worse}).slice(0, archive.n - 30), home / "worse.parquet")
    (home / "p.toml").write_text("Effusion = 0.02\n", encoding="utf-8")
    patient, number = [int(name) for name in archive.patient if name], range(archive.n)
    people = {"sex": ["MF"[k % 2] for k in patient], "age": [20.0 + k for k in patient]}
    people |= {"view": [("AP", "PA", "PA")[i % 3] for i in number], "follow_up": [i % 3 for i in number]}
    boxes = [*([archive.ids[i], "Effusion", 0, 0, 256, 256] for i in tested[:40])]
    boxes.append([archive.ids[tested[0]], "Effusion", 500, 0, 50, 50])  # a second box in one image
    return report(
        archive,
        home / "out",
        scores=scores,
        labels=archive.labels(**people),
        split="test",
        consensus=write_consensus(home / "consensus.csv", archive, tested[::2]),
        boxes=write_boxes(home / "boxes.csv", boxes),
        compare=home / "worse.parquet",
        prevalence=home / "p.toml",
        n_resamples=100,
    )


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path / "archive")


def test_consensus_labels_replace_the_mined_ones(everything: Report) -> None:
    m, archive = everything.metrics, everything.archive
    found, rows = m["consensus"], np.flatnonzero(archive.tested)[::2]
    y = archive.y["Effusion"][rows] ^ (rows % 5 == 0)
    assert found["n_images"] == len(rows)
    assert found["images"] == "test split of a random patient split, seed 0"
    auroc = found["findings"]["Effusion"]["auroc"]
    assert auroc == pytest.approx(roc_auc_score(y, archive.p["Effusion"][rows]), abs=1e-12)
    assert auroc != m["findings"]["Effusion"]["auroc"]
    assert list(found["left_out"]) == ["Fracture"]


@pytest.mark.slow
def test_consensus_without_labels_is_an_evaluation_and_is_guarded(archive: Archive, tmp_path: Path) -> None:
    rows = np.flatnonzero(archive.split == "test")
    (tmp_path / "p.toml").write_text("Effusion = 0.02\n", encoding="utf-8")
    path = write_consensus(tmp_path / "c.csv", archive, rows)
    found = report(archive, tmp_path / "out", consensus=path, prevalence=tmp_path / "p.toml")
    entry = found.metrics["consensus"]
    assert found.metrics["macro"] is None
    assert entry["n_images"] == int(archive.ok[rows].sum())
    assert entry["counts"]["failed"] == int((~archive.ok[rows]).sum()) > 0
    assert f"{entry['findings']['Effusion']['ppv_at_prevalence']:.3f}" in found.page
    trained = write_consensus(tmp_path / "trained.csv", archive, np.arange(6))
    refused(LeakError, "6 images and 2 patients", archive.scores(), tmp_path / "out2", consensus=trained)
    named = report(archive, tmp_path / "out3", labels=archive.labels(), split="train", consensus=trained)
    assert named.metrics["consensus"]["images"].startswith("train split")


@pytest.mark.slow
def test_composite_findings_take_the_highest_calibrated_score(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "nih", patients=40, findings=LABELS)
    rows = np.flatnonzero(archive.tested)
    either = archive.y["Mass"] | archive.y["Nodule"]
    lines = [["Image Index", "Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass"]]
    for i in rows:
        found = (0, archive.y["Pneumothorax"][i], 1 - i % 2, either[i])
        lines.append([archive.ids[i], *("YES" if positive else "NO" for positive in found)])
    consensus = write_csv(tmp_path / "google.csv", lines)
    made = report(archive, tmp_path / "out", labels=archive.labels(), split="test", consensus=consensus, n_resamples=20)
    assert list(made.metrics["findings"]) == list(LABELS)
    assert made.metrics["macro"]["findings"] == [f for f in FINDINGS if f != "Hernia"]
    entry = made.metrics["consensus"]
    assert entry["composites"]["Nodule or mass"] == {"findings": ["Mass", "Nodule"], "scores": "calibrated"}
    highest = np.maximum(archive.p["Mass"], archive.p["Nodule"])[rows] * np.float32(0.9)
    composite = entry["findings"]["Nodule or mass"]
    assert composite["auroc"] == pytest.approx(roc_auc_score(either[rows], highest), abs=1e-12)
    flagged = ((archive.p["Mass"] >= archive.threshold) | (archive.p["Nodule"] >= archive.threshold))[rows]
    assert composite["sensitivity"] == pytest.approx(recall_score(either[rows], flagged), abs=1e-15)


def test_heat_maps_are_measured_against_boxes(everything: Report) -> None:
    found = everything.metrics["localisation"]
    effusion = found["findings"]["Effusion"]
    assert (effusion["cases"], effusion["n"], effusion["missing"], found["counts"]["evaluated"]) == (40, 36, 4, 40)
    assert (effusion["boxes"], effusion["ceiling"], found["map_shape"]) == (41, 1.0, [4, 4])
    assert effusion["hit_rate_low"] < effusion["hit_rate"] == 30 / 36 < effusion["hit_rate_high"]
    assert "4 of 40 pairs of a boxed image and finding have no heat map" in everything.page


def test_unusable_tables_are_refused(archive: Archive, tmp_path: Path) -> None:
    labels, scores = archive.labels(), archive.scores()
    strange = [["elsewhere.png", "Effusion", 0, 0, 9, 9]]
    boxes = {"boxes": write_boxes(tmp_path / "boxes.csv", strange)}
    other = {"consensus": write_csv(tmp_path / "consensus.csv", [["image_id", "Effusion"], ["elsewhere.png", 1]])}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (boxes, InputError, "--heatmaps 14"),
        (other, InputError, "--consensus .*none of its 1 image is evaluated"),
        ({"compare": scores}, InputError, "--compare .* needs --manifest"),
        ({"prevalence": "p.toml"}, InputError, "--prevalence p.toml: needs --manifest or --consensus"),
        ({"labels": labels, "prevalence": tmp_path / "none.toml"}, InputError, r"none\.toml"),
        ({"consensus": tmp_path / "none.csv"}, TableError, r"none\.csv"),
    ]
    for options, error, names in cases:
        refused(error, names, scores, tmp_path / "out", **options)


def test_a_consensus_table_without_an_evaluated_image_costs_no_computation(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "evaluate", lambda *_, **__: pytest.fail("computed metrics first"))
    trained = write_csv(tmp_path / "consensus.csv", [["image_id", "Effusion"], [archive.ids[0], 1]])
    options = {"labels": archive.labels(), "split": "test", "consensus": trained}
    refused(InputError, "none of its 1 image is evaluated", archive.scores(), tmp_path / "out", **options)


@pytest.mark.slow
def test_boxes_that_cannot_be_measured_cost_only_their_section(archive: Archive, tmp_path: Path) -> None:
    labels, scores = archive.labels(), archive.scores()
    add_heatmaps(scores, archive, np.arange(1), set())
    trained, tested = archive.ids[0], archive.ids[int(np.flatnonzero(archive.tested)[0])]
    lines = [[trained, "Effusion", 0, 0, 9, 9], ["elsewhere.png", "Mass", 0, 0, 9, 9]]
    boxes = write_boxes(tmp_path / "boxes.csv", lines)
    made = report(archive, tmp_path / "out", scores=scores, labels=labels, split="test", boxes=boxes, n_resamples=20)
    assert made.metrics["localisation"] is None
    (warning,) = (found for found in made.metrics["warnings"] if found["kind"] == "no_boxes")
    assert re.search(r"none of its 2 images .*1 without a score, 1 in split (train|val)", warning["text"])
    boxes = write_boxes(tmp_path / "boxes.csv", [[tested, "Mass", 0, 0, 9, 9]])
    made = report(archive, tmp_path / "out", scores=scores, labels=labels, split="test", boxes=boxes, n_resamples=20)
    section = made.page.partition('<h2 id="localisation"')[2].partition("<h2 ")[0]
    assert "1 of 1 pair of a boxed image and finding has no heat map" in section
    assert "<table" not in section


def test_other_scores_are_compared_on_the_same_images(everything: Report) -> None:
    archive, m = everything.archive, everything.metrics
    found = m["compared"]
    rows = archive.tested & (np.arange(archive.n) < archive.n - 30)
    assert (found["n_images"], found["left_out"]) == (rows.sum(), m["n_images"] - rows.sum())
    worse = pq.read_table(everything.options["compare"])["p_Effusion"].to_numpy()[rows[: archive.n - 30]]
    y, p = archive.y["Effusion"][rows], archive.p["Effusion"][rows]
    effusion = found["findings"]["Effusion"]
    assert effusion["difference"] == pytest.approx(roc_auc_score(y, p) - roc_auc_score(y, worse), abs=1e-12)
    assert effusion["low"] < effusion["difference"] < effusion["high"]
    assert found["macro"]["findings"] == ["Cardiomegaly", "Effusion"]
    assert found["macro"]["p"] < 0.05


def test_comparison_with_a_model_trained_on_the_images_is_refused(archive: Archive, tmp_path: Path) -> None:
    other = Archive(tmp_path / "other")
    other.split[other.split == "test"] = "train"
    options = {"labels": archive.labels(), "split": "test", "compare": other.scores(), "n_resamples": 2}
    refused(LeakError, str(other.root), archive.scores(), tmp_path / "out", **options)


def test_predictive_values_follow_the_given_prevalence(everything: Report) -> None:
    findings = everything.metrics["findings"]
    effusion = findings["Effusion"]
    true, false = 0.02 * effusion["sensitivity"], 0.98 * (1 - effusion["specificity"])
    assert effusion["ppv_at_prevalence"] == pytest.approx(true / (true + false), abs=1e-12)
    assert effusion["ppv_at_prevalence_low"] <= effusion["ppv_at_prevalence"] <= effusion["ppv_at_prevalence_high"]
    assert effusion["assumed_prevalence"] == 0.02
    assert findings["Cardiomegaly"]["undefined"]["ppv_at_prevalence"] == "no prevalence was given"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Effusion = 2", "Effusion = 2"),
        ("Effusion = 0", "Effusion = 0"),
        ("Effusion = true", "Effusion = True"),
        ("Efusion = 0.1", "'Efusion'.*'Effusion'"),
        ("Infiltration = 0.1\nInfiltrate = 0.2", "Infiltration is named twice"),
        ("Effusion = ", "not TOML"),
        ("", "no finding"),
    ],
)
def test_unusable_prevalences_are_refused(archive: Archive, tmp_path: Path, text: str, names: str) -> None:
    (tmp_path / "p.toml").write_text(text, encoding="utf-8")
    options = {"labels": archive.labels(), "prevalence": tmp_path / "p.toml"}
    refused(InputError, names, archive.scores(), tmp_path / "out", **options)


def test_byte_order_mark_of_prevalences_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_bytes(b"\xef\xbb\xbfEffusion = 0.1\n")
    assert _read_prevalences(str(tmp_path / "p.toml")) == {"Effusion": 0.1}


def test_groups_are_measured_separately(everything: Report) -> None:
    archive, found = everything.archive, everything.metrics["subgroups"]
    groups = {(group["attribute"], group["value"]): group for group in found["groups"]}
    women = archive.tested & (np.arange(archive.n) // 3 % 2 == 1)
    group = groups["sex", "F"]
    y, p = archive.y["Effusion"][women], archive.p["Effusion"][women]
    assert group["n"] == women.sum()
    assert group["findings"]["Effusion"]["auroc"] == pytest.approx(roc_auc_score(y, p), abs=1e-12)
    assert group["findings"]["Effusion"]["sensitivity"] == pytest.approx(recall_score(y, p >= archive.threshold))
    assert ("sex & view", "F & AP") in groups
    assert {difference["attribute"] for difference in found["differences"]} >= {"sex", "view", "follow_up"}


def test_decisions_are_measured_on_calibrated_probabilities(everything: Report) -> None:
    archive, result = everything.archive, everything.metrics
    rows, y = archive.tested, archive.y["Effusion"]
    c, found = 0.9 * archive.p["Effusion"][rows].astype(np.float64), result["selection"]["Effusion"]
    flags = archive.p["Effusion"][rows] >= archive.threshold
    assert found["error_rate_all"] == pytest.approx(np.mean(flags != y[rows]))
    assert found["cutoff"] == pytest.approx(0.9 * archive.threshold, abs=0.02)
    curve, measures = result["net_benefit"]["Effusion"], result["calibration"]["Effusion"]
    middle = curve["thresholds"][24]
    assert middle == pytest.approx(y[rows].mean())
    benefit = np.mean(np.where(c >= middle, np.where(y[rows] == 1, 1, -middle / (1 - middle)), 0))
    assert curve["model"][24] == curve["gain"][24] == pytest.approx(benefit)
    assert (result["net_benefit"]["Hernia"]["reason"], measures["n"]) == ("no positive images", rows.sum())
    labels = {f: values[rows] for f, values in archive.y.items()}
    abnormal = find_abnormal(labels)
    score = 1 - np.prod([1 - 0.9 * archive.p[f][rows] for f in archive.diseases], axis=0)
    flagged = np.any([archive.p[f][rows] >= archive.threshold for f in archive.diseases], axis=0).sum()
    cutoff = np.sort(score)[-flagged]
    any_finding = result["selection"]["abnormality"]
    assert any_finding["error_rate_all"] == pytest.approx(np.mean((score >= cutoff) != abnormal))
    assert any_finding["cutoff"] == pytest.approx(cutoff, abs=1e-6)
    table = pq.read_table(everything.out / "metrics.parquet").to_pylist()
    (slope,) = [row for row in table if (row["finding"], row["metric"]) == ("Effusion", "slope")]
    assert (slope["value"], slope["low"]) == (measures["slope"], measures["slope_low"])
    for section in ("calibration", "net_benefit", "selective"):
        assert f'<h2 id="{section}">' in everything.page


def test_errors_are_counted_where_averaged_models_disagree(archive: Archive, tmp_path: Path) -> None:
    rows, y = archive.tested, archive.y["Effusion"]
    wrong = (archive.p["Effusion"] >= archive.threshold) != y
    # The spread is largest for some of the wrong images: a tenth of the images, all of them errors.
    n, spread = rows.sum() // 10, np.zeros(archive.n)
    spread[np.flatnonzero(rows & wrong)[:n]] = 0.2
    archive.spread = {"Effusion": spread}
    written = report(archive, tmp_path / "out", labels=archive.labels(), split="test")
    found = written.metrics["selection"]
    assert found["Effusion"]["errors_by_spread"] == pytest.approx(n / wrong[rows].sum(), abs=0.02)
    assert "errors_by_spread" not in found["Cardiomegaly"]
    assert "Errors in the tenth of largest spread" in written.page


def test_metrics_parquet_has_every_number_with_its_split(everything: Report) -> None:
    m = everything.metrics
    found = pq.read_table(everything.out / "metrics.parquet")
    assert found.schema == tables.SCHEMA
    frame = found.to_pandas()
    assert (set(frame["split"]), set(frame["split_kind"])) == ({"test"}, {"patient"})
    sections = {"findings", "macro", "weighted", "subgroups", "differences", "localisation", "compared", "drift"}
    assert set(frame["section"]) >= {*sections, "consensus", "consensus macro"}
    own = frame[frame["section"] == "findings"]
    assert set(own["labels_sha256"]) == {m["digests"]["labels"]}
    assert set(frame[frame["section"] == "consensus"]["labels_sha256"]) == {m["consensus"]["digest"]}
    aurocs = own[own["metric"] == "auroc"].set_index("finding")
    entry = m["findings"]["Effusion"]
    numbers = [entry["auroc"], entry["auroc_low"], entry["auroc_high"]]
    assert aurocs.loc["Effusion", ["value", "low", "high"]].tolist() == numbers
    assert np.isnan(aurocs.loc["Hernia", "value"])
    undefined = frame[frame["value"].isna() & ~frame["section"].isin(["drift", "compared"])]
    assert undefined["reason"].notna().all()


def test_new_metric_is_in_every_output(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    miss_rate = metrics.RateMetric("miss_rate", "Miss rate", "Share of positives missed.", "main", undefined="none")
    monkeypatch.setattr(metrics.Confusion, "miss_rate", property(lambda cells: 1 - cells.sensitivity), raising=False)
    monkeypatch.setattr(metrics, "RATE_METRICS", (*metrics.RATE_METRICS, miss_rate))
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, miss_rate))
    archive.y["Hernia"][::2] = 1
    found = report(archive, tmp_path / "out", labels=archive.labels(), split="test")
    effusion = found.metrics["findings"]["Effusion"]
    assert effusion["miss_rate"] == pytest.approx(1 - effusion["sensitivity"])
    assert effusion["miss_rate_low"] == pytest.approx(1 - effusion["sensitivity_high"])
    frame = pq.read_table(found.out / "metrics.parquet").to_pandas()
    assert effusion["miss_rate"] in frame[frame["metric"] == "miss_rate"]["value"].tolist()
    for page in (found.page, (found.out / "report.md").read_text(encoding="utf-8")):
        assert "Miss rate" in page
        assert f"{effusion['miss_rate']:.3f}" in page
