"""Warnings in the page, the metrics and the terminal of a report, and no headline AUROC from few patients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from score_archive import Archive, without_drawing

from ray_cxr.cli import main
from ray_cxr.labels import FINDINGS


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
    top = page[page.index('id="summary"') :]
    top = top[: top.index("</ul>")]
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
