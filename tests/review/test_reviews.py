"""`reviews`: labels from verdicts, the rule for conflicts, disagreements, and the commands that take the labels."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from review_browser import Browser
from score_archive import FEW, Archive, report, without_drawing
from sklearn.metrics import cohen_kappa_score

from ray_cxr.data import manifest
from ray_cxr.data.consensus import read_consensus
from ray_cxr.data.review_facts import read_facts
from ray_cxr.review.consensus import apply_rule
from ray_cxr.review.index import Sample
from ray_cxr.review.server import open_review

Open = Callable[..., Browser]
Command = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("present", "majority", "unanimous"),
    [
        ([1], 1, 1),
        ([0, 0], 0, 0),
        ([1, 0], None, None),
        ([1, 1, 0], 1, None),
        ([None], None, None),
        ([None, 0], 0, None),
        ([None, None, 1], 1, None),
    ],
)
def test_rule_for_several_readers(present: list[int | None], majority: int | None, unanimous: int | None) -> None:
    for order in (present, present[::-1]):
        assert (apply_rule(order, "majority"), apply_rule(order, "unanimous")) == (majority, unanimous)


def decide_all(browser: Browser, truth: dict[str, list[int | None]]) -> None:
    """Record the values of each finding for all images that can be read; None is `unsure`."""
    for row in np.flatnonzero(browser.review.index.ok):
        for finding, values in truth.items():
            value = values[row]
            given: dict[str, Any] = {"verdict": "unsure"} if value is None else {"present": int(value)}
            browser.decide(int(row), finding=finding, **given)


def run(command: Command, archive: Archive, *more: object) -> tuple[dict[str, list[Any]], list[dict[str, str]], str]:
    """Run `reviews`; return the columns of the table, the disagreements and what was printed."""
    out = archive.root / "read" / "labels.parquet"
    code, said, err = command("reviews", archive.root / "SCORES", "--out", out, *more)
    assert code == 0, err
    with open(out.with_name("disagreements.csv"), encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    return manifest.read_manifest(out).to_pydict(), lines, said


def test_labels_of_two_readers(open_page: Open, archive: Archive, command: Command) -> None:
    y = {finding: values.tolist() for finding, values in archive.y.items() if finding in FEW}
    other = {finding: list(values) for finding, values in y.items()}
    other["Effusion"][0] = 1 - other["Effusion"][0]
    other["Effusion"][1] = None
    decide_all(open_page(sample=Sample(100)), y)
    decide_all(open_page(reader="bert", sample=Sample(100)), other)
    table, lines, said = run(command, archive)
    n = int(archive.ok.sum())
    assert table["image_id"] == archive.ids[:n]
    assert table["patient_id"] == archive.patient[:n]
    assert table["study_id"] == archive.study[:n]
    assert table["Effusion"] == [None, *y["Effusion"][1:n]]
    assert table["Mass"] == table["No_Finding"] == [None] * n
    flags = archive.p["Effusion"] >= archive.threshold
    between = [line for line in lines if line["kind"] == "readers"]
    assert [(line["image_id"], line["finding"], line["label"]) for line in between] == [
        (archive.ids[0], "Effusion", "")
    ]
    assert between[0]["verdicts"] == f"anna={y['Effusion'][0]}|bert={other['Effusion'][0]}"
    against = {line["image_id"] for line in lines if (line["kind"], line["finding"]) == ("model", "Effusion")}
    assert against == {archive.ids[i] for i in range(1, n) if flags[i] != y["Effusion"][i]}
    for name, scale in (("p", 1.0), ("c", 0.9)):
        expected = [scale * archive.p[line["finding"]][archive.ids.index(line["image_id"])] for line in lines]
        assert [float(line[name]) for line in lines] == pytest.approx(expected, rel=1e-5)
    both = [(a, b) for a, b in zip(y["Effusion"][:n], other["Effusion"][:n], strict=True) if b is not None]
    kappa = cohen_kappa_score(*zip(*both, strict=True))
    assert f" {kappa:.2f} " in next(line for line in said.splitlines() if line.strip().startswith("Effusion"))
    facts = read_facts(pq.read_schema(archive.root / "read" / "labels.parquet").metadata)
    assert facts is not None
    assert (facts.readers, facts.images, facts.anchored, facts.images_not_sampled) == (2, n, 0, 0)
    assert facts.describe() == []
    strict, _, _ = run(command, archive, "--rule", "unanimous")
    assert strict["Effusion"][:2] == [None, None]
    assert strict["Hernia"] == y["Hernia"][:n]


def test_undone_and_earlier_verdicts_do_not_count(open_page: Open, archive: Archive, command: Command) -> None:
    browser = open_page()
    browser.decide(0, finding="Effusion", present=1)
    browser.decide(1, finding="Effusion", present=1)
    browser.send("/undo", {})
    open_page().decide(0, finding="Effusion", present=0)
    table, _, _ = run(command, archive)
    assert (table["image_id"], table["Effusion"]) == ([archive.ids[0]], [0])


@pytest.mark.parametrize("option", ["--labels", pytest.param("--consensus", marks=pytest.mark.long)])
def test_limits_of_labels_are_stated(option: str, tmp_path: Path, command: Command) -> None:
    """Open verdicts are anchored; verdicts on flagged images give no sensitivity."""
    archive = Archive(tmp_path, patients=22)
    scores = archive.scores()
    browser = Browser(open_review(scores, "anna")).log_in()
    flags = browser.review.index.flags["Effusion"]
    rows = [int(row) for row in np.flatnonzero(archive.tested)]
    for row in rows:
        if flags[row] == 1:
            browser.decide(row, finding="Effusion", present=int(archive.y["Effusion"][row]), labels=row == rows[0])
        browser.decide(row, finding="Cardiomegaly", present=int(archive.y["Cardiomegaly"][row]))
    _, _, said = run(command, archive)
    out = archive.root / "read" / "labels.parquet"
    facts = read_facts(pq.read_schema(out).metadata)
    assert facts is not None
    assert (facts.flagged_only, facts.anchored, facts.images_not_sampled) == (["Effusion"], facts.labels, len(rows))
    lines = facts.describe()
    assert len(lines) == 3 + bool(facts.labels_visible)
    with without_drawing():
        code, reported, err = command("report", scores, option, out, "--out", tmp_path / "report")
    assert code == 0, err
    page = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    for line in lines:
        assert f"WARNING: {line}" in said
        assert f"WARNING: {line}" in reported
        assert line.partition("'")[0].removeprefix("labels from readers: ") in page


def test_report_measures_against_the_readers(open_page: Open, archive: Archive, command: Command) -> None:
    decide_all(open_page(), {"Effusion": archive.y["Effusion"].tolist()})
    run(command, archive)
    labels = read_consensus(str(archive.root / "read" / "labels.parquet"))
    assert set(labels.labels) == {"Effusion"}
    assert labels.labels["Effusion"].tolist() == archive.y["Effusion"][archive.ok].tolist()
    assert labels.image_ids.tolist() == np.array(archive.ids)[archive.ok].tolist()


def test_run_without_verdicts_is_one_line(open_page: Open, archive: Archive, command: Command) -> None:
    out = archive.root / "labels-of-readers.parquet"
    arguments = ("reviews", archive.root / "SCORES", "--out", out)
    code, _, err = command(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    open_page().decide(0, finding="Effusion", verdict="unsure")
    code, _, err = command(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert not out.exists()


def test_other_commands_ignore_verdicts(open_page: Open, archive: Archive, tmp_path: Path) -> None:
    scores = archive.root / "SCORES"
    before = report(archive, tmp_path / "before", scores=str(scores)).metrics
    open_page().decide(0, finding="Effusion", present=1)
    assert (scores / "reviews").is_dir()
    assert report(archive, tmp_path / "after", scores=str(scores)).metrics == before
