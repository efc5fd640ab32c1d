"""The first screen of a report: what needs a look, what to read first, and whether the scores can be trusted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from score_archive import Archive, without_drawing

from ray_cxr.reporting import summary
from ray_cxr.reporting.report import write_report


def read_summary(out: Path) -> list[str]:
    page = (out / "report.html").read_text(encoding="utf-8")
    box = page[page.index('id="summary"') :]
    return re.findall(r"<li>(.*?)</li>", box[: box.index("</ul>")])


def describe_validation(macro: float, **more: Any) -> dict[str, Any]:
    rows = {finding: {"n": 45, "positives": 9, "auroc": macro} for finding in ("Cardiomegaly", "Effusion")}
    validation = {"findings": rows, "macro_auroc": macro}
    return {"provenance": {"lineage": "known", "best_epoch": 2, "validation": validation, **more}}


def test_scores_without_labels_say_what_to_read_and_whether_to_trust_them(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive", patients=20)
    archive.split[7] = "test"  # the other images of this patient are in the training
    scores = archive.scores(**describe_validation(0.713))
    with without_drawing():
        metrics = write_report(scores, tmp_path / "report")
    sentences = read_summary(tmp_path / "report")
    worklist = (tmp_path / "report" / "worklist.csv").read_text(encoding="utf-8").splitlines()
    names = worklist[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in worklist[1:]]
    assert sentences[0].startswith("What needs a look: ")
    assert rows[0]["image_id"] in sentences[1]
    flagged = [bool(row["flagged"]) for row in rows]
    assert flagged == sorted(flagged, reverse=True)
    (warning,) = [one for one in metrics["warnings"] if one["kind"] == "training_images"]
    own = dict(zip(archive.ids, archive.split, strict=True))
    single = [row for row in rows if row["n_images"] == "1"]
    assert [row["used_in_training"] for row in single] == [own[row["image_id"]].replace("test", "") for row in single]
    assert next(row for row in rows if row["study_id"] == "s2")["used_in_training"] == "train"  # one of its two images
    flags = np.any([archive.p[f] >= archive.threshold for f in archive.diseases], axis=0) & archive.ok
    of_flagged = f"{(flags & (archive.split != 'test')).sum()} of the {flags.sum()} flagged images"
    counts = f"44 of 57 images, and {of_flagged}, were used to train or tune this model"
    assert f"{counts}; 1 more is of the same patients" in warning["text"]
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "training image of this model" in page
    assert "44 of 57" in page.partition('id="flags"')[2].partition("<details")[0]
    assert (metrics["leak_check"]["shared_images"], metrics["leak_check"]["related_images"]) == (44, 1)
    (trust,) = [sentence for sentence in sentences if "validation images" in sentence and "AUROC" in sentence]
    assert "45 validation images" in trust
    assert "0.713" in trust
    # Imported weights: nothing is known.
    imported = Archive(tmp_path / "imported", patients=20)
    with without_drawing():
        write_report(imported.scores(), tmp_path / "again", n_resamples=2)
    assert any("how good they are is unknown" in sentence for sentence in read_summary(tmp_path / "again"))


def test_highest_and_lowest_need_patients_and_name_shared_values() -> None:
    assert summary._summarize_extremes({"Mass": 1.0}, 1) == []
    aurocs = {"Nodule": 0.5, "Mass": 1.0, "Edema": 1.0}
    assert summary._summarize_extremes(aurocs, 3) == ["Lowest AUROC: Nodule 0.500. Highest: 1.000, of 2 findings."]
    (uncertain,) = summary._summarize_extremes({"Nodule": 0.5, "Mass": 0.7}, 2, ["Nodule", "Mass"])
    assert "Mass 0.700, which may be chance" in uncertain
    (limited,) = summary._summarize_extremes(aurocs, 14)
    assert limited.startswith("Of the 3 findings with at least 5 patients")


def test_underdiagnosis_counts_findings_that_can_be_flagged(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive", patients=40, findings=("Mass",))
    others = [int(i % 3 == 0) for i in range(archive.n)]
    labels = archive.labels(sex=["FM"[i % 2] for i in range(archive.n)], Edema=others)
    with without_drawing():
        metrics = write_report(archive.scores(), tmp_path / "report", labels=labels, split="test", n_resamples=2)
    found = metrics["underdiagnosis"]
    n = found["overall"]["underdiagnosis"]["n"]
    assert metrics["alerts"]["n_with_finding"] > n
    markdown = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    for text in ("\n".join(read_summary(tmp_path / "report")), markdown.replace("\\", "")):
        assert f"of the {n} images with a finding that can be flagged (Mass)" in text
