"""What a report holds beside the labels: groups, consensus, boxes, other scores, prevalences, published figures."""

# ruff: noqa: F811  # fixtures come from the other module by their name

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sklearn_metrics
from test_report import FEW, Archive, archive, drawing, report  # noqa: F401  # fixtures

from ray_cxr.data import heatmaps, manifest
from ray_cxr.errors import InputError, LeakError, OutputError, TableError
from ray_cxr.labels import FINDINGS
from ray_cxr.reporting import measures, pictures, tables
from ray_cxr.reporting.labelled import join
from ray_cxr.reporting.report import write_report
from ray_cxr.reporting.scores import read_scores

Files = Callable[[str, list[list[object]]], str]


@pytest.fixture
def table(tmp_path: Path) -> Files:
    """Write a CSV: its name and rows, the first of them the header."""

    def write(name: str, rows: list[list[object]]) -> str:
        path = tmp_path / name
        with open(path, "w", newline="") as stream:
            csv.writer(stream).writerows(rows)
        return str(path)

    return write


def consensus_of(archive: Archive, rows: np.ndarray) -> list[list[object]]:
    """Radiologists who disagree with the labels on every fifth image."""
    y = [archive.y["Effusion"][i] ^ (i % 5 == 0) for i in rows]
    return [["image_id", "Effusion", "Fracture"], *([archive.ids[i], int(y[k]), 0] for k, i in enumerate(rows))]


def test_consensus_labels_replace_the_mined_ones(archive: Archive, tmp_path: Path, table: Files) -> None:
    rows = np.flatnonzero((archive.split == "test") & archive.ok)[::2]
    path = table("consensus.csv", consensus_of(archive, rows))
    m, page = report(archive, tmp_path / "out", labels=archive.labels(), split="test", consensus=path)
    found = m["consensus"]
    y = archive.y["Effusion"][rows] ^ (rows % 5 == 0)
    assert found["n_images"] == len(rows)
    assert found["images"] == "test split of a random patient split, seed 0"
    assert found["findings"]["Effusion"]["auroc"] == pytest.approx(
        sklearn_metrics.roc_auc_score(y, archive.p["Effusion"][rows]), abs=1e-12
    )
    assert found["findings"]["Effusion"]["auroc"] != m["findings"]["Effusion"]["auroc"]
    assert list(found["left_out"]) == ["Fracture"]
    assert "Column Fracture was left out" in page
    assert len(found["digest"]) == 64


def test_consensus_alone_is_an_evaluation_and_is_guarded(archive: Archive, tmp_path: Path, table: Files) -> None:
    rows = np.flatnonzero(archive.split == "test")
    m, page = report(archive, tmp_path / "out", consensus=table("c.csv", consensus_of(archive, rows)))
    assert m["macro"] is None
    assert m["consensus"]["n_images"] == int(archive.ok[rows].sum())
    assert m["consensus"]["counts"]["failed"] == int((~archive.ok[rows]).sum()) > 0
    assert "Against a consensus table" in page
    trained = table("trained.csv", consensus_of(archive, np.arange(6)))
    with pytest.raises(LeakError, match="6 images and 2 patients of the consensus table trained this model"):
        write_report(archive.scores(), tmp_path / "out2", consensus=trained)
    # Named as what they are, they may be evaluated.
    m, _ = report(archive, tmp_path / "out3", labels=archive.labels(), split="train", consensus=trained)
    assert m["consensus"]["images"].startswith("train split")


def test_adjudicated_composites_are_mapped_by_their_rule(tmp_path: Path, table: Files) -> None:
    archive = Archive(tmp_path / "nih", findings=FINDINGS)
    rows = np.flatnonzero((archive.split == "test") & archive.ok)
    either = archive.y["Mass"] | archive.y["Nodule"]
    header = ["Image Index", "Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass"]
    lines = [
        [archive.ids[i], "NO", "YES" if archive.y["Pneumothorax"][i] else "NO", "NO" if i % 2 else "YES",
         "YES" if either[i] else "NO"]
        for i in rows
    ]  # fmt: skip
    m, page = report(archive, tmp_path / "out", consensus=table("google.csv", [header, *lines]))
    found = m["consensus"]
    assert found["kind"] == "adjudicated"
    assert found["composites"]["Nodule or mass"] == {"findings": ["Mass", "Nodule"], "scores": "calibrated"}
    highest = np.maximum(archive.p["Mass"], archive.p["Nodule"])[rows] * np.float32(0.9)
    entry = found["findings"]["Nodule or mass"]
    assert entry["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(either[rows], highest), abs=1e-12)
    flagged = ((archive.p["Mass"] >= archive.threshold) | (archive.p["Nodule"] >= archive.threshold))[rows]
    assert entry["sensitivity"] == pytest.approx(sklearn_metrics.recall_score(either[rows], flagged), abs=1e-15)
    assert "Airspace opacity is scored by the highest score of Consolidation, Edema, Infiltration, Pneumonia" in page
    assert "Nodule or mass: calibrated scores." in page


@pytest.mark.parametrize("what", ["consensus", "boxes"])
def test_a_table_of_other_images_is_refused(archive: Archive, tmp_path: Path, table: Files, what: str) -> None:
    scores = Path(archive.scores())
    (scores / "heatmaps").mkdir()
    rows: dict[str, list[list[object]]] = {
        "consensus": [["image_id", "Effusion"], ["elsewhere.png", 1]],
        "boxes": [["Image Index", "Finding Label", "x", "y", "w", "h"], ["elsewhere.png", "Effusion", 1, 1, 9, 9]],
    }
    with pytest.raises(InputError, match="none of its 1 images is evaluated here"):
        write_report(scores, tmp_path / "out", **{what: table("t.csv", rows[what])})


def with_heatmaps(archive: Archive, rows: np.ndarray, hit: set[int]) -> Path:
    """Heat maps for Effusion of 4 x 4 cells: the highest is the upper left one, or the lower right."""
    folder = Path(archive.scores()) / heatmaps.FOLDER
    folder.mkdir()
    lines = []
    for i in rows:
        cells = np.zeros((4, 4), np.float32)
        cells[(0, 0) if i in hit else (3, 3)] = 1.0
        lines.append(
            dict.fromkeys(heatmaps.SCHEMA.names)
            | {"image_id": archive.ids[i], "finding": "Effusion", "rank": 1, "p": 0.5, "evidence": 1.0, "height": 4,
               "width": 4, "map": cells.ravel().tolist(), "top": 0.0, "left": 0.0, "bottom": 1.0, "right": 1.0,
               "picture_height": 48, "picture_width": 40, "overlay": f"{i}.png"}
        )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(lines, heatmaps.SCHEMA), folder / "part-00000.parquet")
    return folder.parent


def test_heat_maps_are_measured_against_boxes(archive: Archive, tmp_path: Path, table: Files) -> None:
    rows = np.flatnonzero((archive.split == "test") & archive.ok)[:40]
    hit = set(rows[:30].tolist())
    scores = with_heatmaps(archive, rows[:36], hit)
    boxes = [["Image Index", "Finding Label", "Bbox [x", "y", "w", "h]"],
             *([archive.ids[i], "Effusion", 0, 0, 256, 256] for i in rows)]  # fmt: skip
    given = {"labels": archive.labels(), "split": "test", "boxes": table("b.csv", boxes)}
    m, page = report(archive, tmp_path / "out", scores=str(scores), **given)
    found = m["localisation"]["findings"]["Effusion"]
    assert (found["cases"], found["n"], found["missing"]) == (40, 36, 4)
    assert found["hit_rate"] == 30 / 36
    assert found["hit_rate_low"] < 30 / 36 < found["hit_rate_high"]
    assert m["localisation"]["counts"]["evaluated"] == 40
    assert "Do the heat maps point at the boxes?" in page
    assert "4 of 40 pairs of a boxed image and finding have no heat map" in page


def test_boxes_without_heat_maps_say_what_to_do(archive: Archive, tmp_path: Path, table: Files) -> None:
    boxes = [["Image Index", "Finding Label", "x", "y", "w", "h"], [archive.ids[0], "Effusion", 0, 0, 9, 9]]
    with pytest.raises(InputError, match="--heatmaps 14"):
        write_report(archive.scores(), tmp_path / "out", boxes=table("b.csv", boxes))


def test_another_score_table_is_compared_on_the_same_images(archive: Archive, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    worse = {f"p_{f}": rng.permutation(archive.p[f]) for f in ("Cardiomegaly", "Effusion")}
    keep = slice(0, len(archive.ids) - 30)
    pq.write_table(pa.table({"image_id": archive.ids, **worse}).slice(0, len(archive.ids) - 30), tmp_path / "b.parquet")
    m, page = report(
        archive, tmp_path / "out", labels=archive.labels(), split="test", compare=tmp_path / "b.parquet",
        n_resamples=300,
    )  # fmt: skip
    found = m["compared"]
    rows = np.zeros(len(archive.ids), bool)
    rows[keep] = True
    rows &= (archive.split == "test") & archive.ok
    assert (found["n_images"], found["left_out"]) == (rows.sum(), m["n_images"] - rows.sum())
    expected = sklearn_metrics.roc_auc_score(
        archive.y["Effusion"][rows], archive.p["Effusion"][rows]
    ) - sklearn_metrics.roc_auc_score(archive.y["Effusion"][rows], worse["p_Effusion"][rows])
    one = found["findings"]["Effusion"]
    assert one["difference"] == pytest.approx(expected, abs=1e-12)
    assert one["low"] < one["difference"] < one["high"]
    assert found["macro"]["findings"] == ["Cardiomegaly", "Effusion"]
    assert found["macro"]["p"] < 0.05
    assert "more than chance explains" in page
    assert "Compared with another score table" in page


def test_a_compared_model_that_was_trained_on_the_images_is_refused(archive: Archive, tmp_path: Path) -> None:
    other = Archive(tmp_path / "other")
    other.split[:] = "train"
    theirs = other.scores()
    with pytest.raises(LeakError, match="the images compared trained this model"):
        write_report(archive.scores(), tmp_path / "out", labels=archive.labels(), split="test", compare=theirs)


def test_predictive_values_for_another_prevalence(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("Effusion = 0.02\n")
    m, page = report(archive, tmp_path / "out", labels=archive.labels(), split="test", prevalence=tmp_path / "p.toml")
    one = m["findings"]["Effusion"]
    true, false = 0.02 * one["sensitivity"], 0.98 * (1 - one["specificity"])
    assert one["ppv_at_prevalence"] == pytest.approx(true / (true + false), abs=1e-12)
    assert one["ppv_at_prevalence_low"] <= one["ppv_at_prevalence"] <= one["ppv_at_prevalence_high"]
    assert one["assumed_prevalence"] == 0.02
    assert m["findings"]["Cardiomegaly"]["undefined"]["ppv_at_prevalence"] == "no prevalence was given"
    assert "Predictive values for your prevalence" in page


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Effusion = 2", "give a share between 0 and 1"),
        ("Effusion = true", "give a share between 0 and 1"),
        ("Efusion = 0.1", "did you mean 'Effusion'"),
        ("Infiltration = 0.1\nInfiltrate = 0.2", "named twice"),
        ("Effusion = ", "not TOML"),
        ("", "names no finding"),
    ],
)
def test_a_wrong_file_of_prevalences_is_one_line(archive: Archive, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        write_report(archive.scores(), tmp_path / "out", labels=archive.labels(), prevalence=tmp_path / "p.toml")
    assert "\n" not in str(caught.value)


def test_what_needs_labels_says_so(archive: Archive, tmp_path: Path) -> None:
    scores = archive.scores()
    with pytest.raises(InputError, match=r"--compare .* needs --labels"):
        write_report(scores, tmp_path / "out", compare=scores)
    with pytest.raises(InputError, match=r"--prevalence .* needs --labels or --consensus"):
        write_report(scores, tmp_path / "out", prevalence="p.toml")
    with pytest.raises(InputError, match="cannot be read"):
        write_report(scores, tmp_path / "out", labels=archive.labels(), prevalence=tmp_path / "none.toml")
    with pytest.raises(TableError):
        write_report(scores, tmp_path / "out", consensus=tmp_path / "none.csv")


def people(archive: Archive) -> str:
    """Labels with sex and view; every older patient a man."""
    n = len(archive.ids)
    patient = np.arange(n) // 3
    return archive.labels(
        sex=["F" if k % 2 else "M" for k in patient],
        view=["PA" if i % 3 else "AP" for i in range(n)],
        age=[float(20 + k) for k in patient],
        follow_up=[i % 3 for i in range(n)],
    )


def test_groups_are_measured_each_by_itself(archive: Archive, tmp_path: Path) -> None:
    m, page = report(archive, tmp_path / "out", labels=people(archive), split="test")
    groups = {(one["attribute"], one["value"]): one for one in m["subgroups"]["groups"]}
    women = groups["sex", "F"]
    rows = (archive.split == "test") & archive.ok & (np.arange(len(archive.ids)) // 3 % 2 == 1)
    assert women["n"] == rows.sum()
    assert women["findings"]["Effusion"]["auroc"] == pytest.approx(
        sklearn_metrics.roc_auc_score(archive.y["Effusion"][rows], archive.p["Effusion"][rows]), abs=1e-12
    )
    flags = archive.p["Effusion"][rows] >= archive.threshold
    assert women["findings"]["Effusion"]["sensitivity"] == pytest.approx(
        sklearn_metrics.recall_score(archive.y["Effusion"][rows], flags), abs=1e-15
    )
    assert ("sex & view", "F & AP") in groups
    assert {one["attribute"] for one in m["subgroups"]["differences"]} >= {"sex", "view", "follow_up"}
    assert "Groups of people and views" in page
    assert "differences have an interval that excludes 0" in page


def test_labels_that_know_nobody_say_that_no_group_was_looked_at(archive: Archive, tmp_path: Path) -> None:
    m, page = report(archive, tmp_path / "out", labels=archive.labels(), split="test")
    assert m["subgroups"] == {"reason": "the labels tell neither sex, age, view nor follow-up"}
    assert "Not looked at: the labels tell neither" in page


def test_published_figures_stand_apart_with_their_reason(archive: Archive, tmp_path: Path) -> None:
    m, page = report(archive, tmp_path / "out", labels=archive.labels(), split="test")
    assert m["published"]
    assert not any(one["comparable"] for one in m["published"])
    assert all(one["reason"] for one in m["published"])
    assert ">not comparable</th>" in page
    start = page.index("Beside published figures")
    section = page[start : page.index('<h2 id="curves"')]
    assert not any(word in section for word in ("better", "worse", "outperform"))


def test_metrics_parquet_has_every_number_with_its_split(archive: Archive, tmp_path: Path, table: Files) -> None:
    rows = np.flatnonzero((archive.split == "test") & archive.ok)
    given = {"labels": people(archive), "split": "test", "consensus": table("c.csv", consensus_of(archive, rows))}
    m, _ = report(archive, tmp_path / "out", compare=archive.scores(), **given)
    found = pq.read_table(tmp_path / "out" / "metrics.parquet")
    assert found.schema == tables.SCHEMA
    frame = found.to_pandas()
    assert set(frame["split"]) == {"test"}
    assert set(frame["split_kind"]) == {"patient"}
    assert set(frame["section"]) >= {
        "findings", "macro", "weighted", "subgroups", "differences", "consensus", "consensus macro", "compared", "drift"
    }  # fmt: skip
    own = frame[frame["section"] == "findings"]
    assert set(own["labels_sha256"]) == {m["digests"]["labels"]}
    assert set(frame[frame["section"] == "consensus"]["labels_sha256"]) == {m["consensus"]["digest"]}
    effusion = own[(own["finding"] == "Effusion") & (own["metric"] == "auroc")].iloc[0]
    entry = m["findings"]["Effusion"]
    assert (effusion["value"], effusion["low"], effusion["high"]) == (
        entry["auroc"], entry["auroc_low"], entry["auroc_high"],
    )  # fmt: skip
    # What is not there has its reason.
    numbers = frame[~frame["section"].isin(["drift", "compared"])]
    assert numbers.loc[numbers["value"].isna(), "reason"].notna().all()
    assert pd.isna(own[(own["finding"] == "Hernia") & (own["metric"] == "auroc")]["value"]).all()


def test_every_undefined_number_has_its_reason(archive: Archive, tmp_path: Path) -> None:
    m, _ = report(archive, tmp_path / "out", labels=archive.labels(), split="test")
    for finding, entry in m["findings"].items():
        for name in ("auroc", "average_precision", "sensitivity", "ppv", "npv", "f1", "brier", "ppv_at_prevalence"):
            assert (entry[name] is None) == (name in entry["undefined"]), (finding, name)


def test_the_report_in_markdown_says_the_same(archive: Archive, tmp_path: Path) -> None:
    m, _ = report(archive, tmp_path / "out", labels=people(archive), split="test")
    text = (tmp_path / "out" / "report.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| Effusion |"))
    assert f"{m['findings']['Effusion']['auroc']:.3f}" in line
    assert "Research use only" in text
    widths: list[int] = []
    for row in text.splitlines():
        # A table's rows all have its header's number of cells.
        if row.startswith("|"):
            cells = row.replace("\\|", "").count("|")
            widths.append(cells)
            assert cells == widths[0]
        else:
            widths = []
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["macro"]["auroc"] == m["macro"]["auroc"]


def test_what_no_resample_can_move_has_no_interval(archive: Archive, tmp_path: Path) -> None:
    """None of the positives is flagged: 0 of so many is no certainty, and [0, 0] would say so."""
    positive = archive.y["Effusion"] == 1
    archive.p["Effusion"][positive] = np.linspace(0.1, 0.2, positive.sum(), dtype=np.float32)
    archive.p["Effusion"][~positive] = np.linspace(0.19, 0.25, (~positive).sum(), dtype=np.float32)
    m, page = report(archive, tmp_path / "out", labels=archive.labels(), split="test")
    one = m["findings"]["Effusion"]
    assert (one["sensitivity"], one["sensitivity_low"], one["sensitivity_high"]) == (0.0, None, None)
    assert one["undefined"]["sensitivity_low"] == "no interval: every resample gives the same"
    assert "no interval for sensitivity, specificity: every resample gives the same" in page
    assert "Worse than chance: Effusion." in page


def test_drift_of_labelled_scores_is_of_the_evaluated_images(archive: Archive, tmp_path: Path) -> None:
    scores = archive.scores()
    labelled, _ = report(archive, tmp_path / "a", scores=scores, labels=archive.labels(), split="test")
    plain, _ = report(archive, tmp_path / "b", scores=scores)
    assert (
        labelled["drift"]["flags"]["Effusion"]["n"] == labelled["n_images"] < plain["drift"]["flags"]["Effusion"]["n"]
    )
    assert labelled["drift"]["images"].startswith("the evaluated images (test split")
    rows = pq.read_table(tmp_path / "b" / "metrics.parquet").to_pandas()
    assert rows["split"].isna().all()


def test_reliability_is_drawn_in_classes_of_equal_counts(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = read_scores(archive.scores())
    labels = archive.labels()
    evaluated = join(table, manifest.read_manifest(labels), labels, "test", {})
    scored = measures.columns(table, evaluated.rows)
    found = measures.measure(scored, evaluated.labels, evaluated.patients, prevalences={}, n_resamples=40, seed=0)
    (panel,) = (one for one in pictures._reliability(table, evaluated, found) if one.finding == "Effusion")
    assert len(panel.predicted) == 10
    shares = np.histogram(panel.p, [0, *((panel.predicted[1:] + panel.predicted[:-1]) / 2), 1])[0]
    assert shares.max() <= 2 * shares.min()


@pytest.mark.parametrize("kind", ["all null", "No_Finding alone", "others"])
def test_labels_of_nothing_that_was_scored_are_no_crash(archive: Archive, tmp_path: Path, kind: str) -> None:
    n = len(archive.ids)
    nothing = dict.fromkeys(FEW, [None] * n) | {"No_Finding": [1] * n if kind == "No_Finding alone" else [None] * n}
    if kind == "others":
        nothing["Mass"] = archive.y["Effusion"].tolist()
    m, _ = report(archive, tmp_path / "out", labels=archive.labels(sex=["F", "M"] * (n // 2), **nothing), split="test")
    assert m["macro"]["auroc"] is None
    assert m["macro"]["reason"] == "no finding has a defined AUROC"


def test_a_manifest_without_rows_is_one_line(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no rows"):
        write_report(archive.scores(), tmp_path / "out", labels=archive.labels(keep=[]))


def test_a_report_among_the_scores_is_refused(archive: Archive, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    pq.write_table(pa.table({"image_id": archive.ids, "p_Effusion": archive.p["Effusion"]}), folder / "a.parquet")
    with pytest.raises(OutputError, match="lies among the scores"):
        write_report(folder, folder / "report")
    with pytest.raises(OutputError, match="lies among the scores"):
        write_report(archive.scores(), Path(archive.scores()) / "scores")
    write_report(archive.scores(), Path(archive.scores()) / "report")  # beside them it may
    write_report(archive.scores(), Path(archive.scores()) / "report")


def test_a_patient_whom_the_labels_spell_otherwise_is_found_by_the_scores_spelling(
    archive: Archive, tmp_path: Path
) -> None:
    n = len(archive.ids)
    labels = archive.labels(
        image_id=[*archive.ids], patient_id=[f"X{k}" for k in archive.patient], split=["test"] * n, keep=range(1, n, 3)
    )
    # The images themselves did not train it, others of the same patients did.
    scores = Path(archive.scores())
    trained = pq.read_table(scores / "split.parquet").to_pandas()
    trained = trained[~trained["image_id"].isin(archive.ids[1::3])]
    pq.write_table(pa.Table.from_pandas(trained, preserve_index=False), scores / "split.parquet")
    with pytest.raises(LeakError, match="0 images and 15 patients"):
        write_report(scores, tmp_path / "out", labels=labels, split="test")


def test_where_no_patient_is_known_the_leak_check_says_so(archive: Archive, tmp_path: Path) -> None:
    archive.patient = [None] * len(archive.ids)
    m, page = report(archive, tmp_path / "out", labels=archive.labels(), split="test")
    assert m["leak_check"]["unknown_patients"] == m["n_images"]
    assert "nobody knows the patient, so only the images themselves were looked for" in page


def test_a_split_that_is_not_the_models_is_told(archive: Archive, tmp_path: Path) -> None:
    n = len(archive.ids)
    m, page = report(archive, tmp_path / "out", labels=archive.labels(split=["val"] * n), split="val")
    assert m["leak_check"]["shared_by_part"] == {"train": 30, "val": 15}
    assert "These labels call 30 images val that the model knows as its train images" in page


def test_a_link_to_the_rows_is_still_the_models_folder(archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(Path(archive.scores()) / "scores")
    with pytest.raises(LeakError):
        write_report(tmp_path / "link", tmp_path / "out", labels=archive.labels())


def test_prevalences_with_a_consensus_alone_are_shown(archive: Archive, tmp_path: Path, table: Files) -> None:
    (tmp_path / "p.toml").write_text("Effusion = 0.02\n")
    rows = np.flatnonzero(archive.split == "test")
    path = table("c.csv", consensus_of(archive, rows))
    m, page = report(archive, tmp_path / "out", consensus=path, prevalence=tmp_path / "p.toml")
    assert f"{m['consensus']['findings']['Effusion']['ppv_at_prevalence']:.3f}" in page
    assert "against the consensus table" in page
    assert "There are no labels" not in page
