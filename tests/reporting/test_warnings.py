"""Warnings in the page, the metrics and the terminal of a report, and no headline AUROC from few patients."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from score_archive import Archive, without_drawing

from ray_cxr.cli import main
from ray_cxr.labels import FINDINGS
from ray_cxr.reporting.report import write_report


def run_report(
    archive: Archive, out: Path, capsys: pytest.CaptureFixture[str], **model: object
) -> tuple[dict, str, str]:
    """Return metrics.json, the page and the terminal's lines of a report on the test split."""
    options = ["--labels", archive.labels(), "--split", "test", "--out", str(out)]
    with without_drawing():
        assert main(["report", archive.scores(**model), *options]) == 0
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return metrics, (out / "report.html").read_text(encoding="utf-8"), capsys.readouterr().out


@pytest.mark.slow
def test_auroc_of_few_patients_is_no_headline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = Archive(tmp_path / "few", patients=18)
    metrics, page, printed = run_report(archive, tmp_path / "report", capsys)
    macro = metrics["macro"]
    assert macro["auroc"] is not None, "metrics.json keeps the number"
    assert "2 of 2 findings" in macro["headline_reason"]
    assert "few_patients" in {warning["kind"] for warning in metrics["warnings"]}
    top = page[page.index('id="summary"') : page.index("<h2")]
    for text in (top, printed):
        assert macro["headline_reason"] in text
        assert f"{macro['auroc']:.3f}" not in text
    assert f"<b>{macro['auroc']:.3f}" not in page
    assert macro["headline_reason"] in (tmp_path / "report" / "checklist.md").read_text(encoding="utf-8")
    # Enough patients
    metrics, page, printed = run_report(Archive(tmp_path / "many"), tmp_path / "again", capsys)
    assert metrics["macro"]["headline_reason"] is None
    assert f"macro AUROC {metrics['macro']['auroc']:.3f}" in printed
    assert f"<b>{metrics['macro']['auroc']:.3f}" in page


def test_findings_without_a_threshold_are_in_page_metrics_and_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = Archive(tmp_path / "archive", patients=30, findings=FINDINGS[:4])
    point = {"threshold": 0.3, "rule": "youden", "n": 45, "positives": 9, "flag_rate": 0.4}
    points = {finding: None if finding == "Edema" else point for finding in archive.findings}
    counts = {"findings": {"Edema": {"n": 45, "positives": 3, "auroc": 0.5}}}
    provenance = {"validation": counts, "lineage": "known"}
    given = {"operating_points": points, "provenance": provenance}
    metrics, page, printed = run_report(archive, tmp_path / "report", capsys, **given)
    (warning,) = [one for one in metrics["warnings"] if one["kind"] == "no_threshold"]
    assert warning["findings"] == ["Edema"]
    assert "1 of 4 findings cannot be flagged: Edema" in warning["text"]
    assert "fewer than 5 positives" in warning["reasons"]
    assert warning["advice"] in printed
    for text in (page, printed, (tmp_path / "report" / "report.md").read_text(encoding="utf-8")):
        assert warning["text"] in text
    assert warning["reasons"] in page[page.index('id="needs-look"') :], "the section has the reasons"


def test_a_remedy_states_what_it_would_flag_and_children_are_counted(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive", patients=30, findings=FINDINGS[:4])
    point = {"threshold": 0.3, "rule": "any_flag_rate=0.3", "n": 45, "positives": 9, "flag_rate": 0.4}
    rule = "flag_rate=0.1"
    model = {
        "operating_points": {finding: None if finding == "Edema" else point for finding in archive.findings},
        "operating_alternatives": {finding: {rule: {**point, "threshold": 0.5}} for finding in archive.findings},
        "rule_notes": {"Edema": "any_flag_rate=0.3 flags no validation image"},
        "provenance": {"validation": {"findings": {"Edema": {"n": 45, "positives": 9, "auroc": 0.5}}}},
    }
    ages = [10.0 if archive.patient[row] == "20" else 50.0 for row in range(archive.n)]
    labels = archive.labels(age=ages, No_Finding=[0, 1] * (archive.n // 2))
    with without_drawing():
        metrics = write_report(archive.scores(**model), tmp_path / "report", labels=labels, split="test", n_resamples=2)
    (warning,) = [one for one in metrics["warnings"] if one["kind"] == "no_threshold"]
    flagged = np.any([archive.p[f][archive.tested] >= 0.5 for f in archive.findings], axis=0).mean()
    assert f"`--set operating_point={rule}` (flags {100 * flagged:.0f}% of these images)" in warning["advice"]
    (note,) = [note for note in metrics["notes"] if "children" in note]
    assert note.startswith(f"3 of {archive.tested.sum()} evaluated images are of children (under 18 years)")
    assert "too few" in note
    assert "No_Finding" not in metrics["findings"], "labelled, but no output of the model"
