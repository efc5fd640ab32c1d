"""Published values equal their sources, and are comparable only on the same images and labels."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from ray_cxr.evaluation import published
from ray_cxr.labels import FINDINGS, LABELS

WHOLE = published.OFFICIAL_TEST_IMAGES
OFFICIAL = [record.name for record in published.PUBLISHED if record.tested == "official"]
MEANS_ONLY = [record.name for record in published.PUBLISHED if record.tested == "official" and not record.aurocs]


def find_record(name: str) -> published.Published:
    (record,) = (record for record in published.PUBLISHED if record.name == name)
    return record


def list_reasons(
    split: str | None, kind: str | None, n_images: int = WHOLE, findings: Sequence[str] = FINDINGS
) -> dict[str, str | None]:
    pairs = published.list_published(split, kind, n_images=n_images, findings=findings)
    return {record.name: reason for record, reason in pairs}


def test_values_equal_the_notes(shared: Path) -> None:
    facts = shared / "FACTS.md"
    if not facts.is_file():
        pytest.skip(f"{facts} does not exist")
    text = facts.read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    table = {row[0]: [float(cell) for cell in row[1:]] for row in rows if row[0] in (*FINDINGS, "mean")}
    assert len(table) == 15
    records = [record for record in published.PUBLISHED if len(record.aurocs) == 14 and record.tested != "official"]
    assert len(records) == 5
    for position, record in enumerate(records):
        assert {f: printed.auroc for f, printed in record.aurocs.items()} == {f: table[f][position] for f in FINDINGS}
        assert record.mean == pytest.approx(table["mean"][position], abs=0.0005)
    intervals = {
        finding: published.PublishedAuroc(float(value), float(low), float(high))
        for finding, value, low, high in re.findall(r"(\w+) (\.\d+) \((\.\d+)-(\.\d+)\)", text)
    }
    assert find_record("CheXNeXt 2018").aurocs == intervals
    assert len(intervals) == 8


def test_records_are_consistent() -> None:
    for record in published.PUBLISHED:
        assert record.aurocs or record.mean is not None
        for printed in record.aurocs.values():
            assert 0.5 < (printed.auroc_low or 0.51) <= printed.auroc <= (printed.auroc_high or 1.0) <= 1.0
        assert (record.mean_low or 0) <= (record.mean or 0) <= (record.mean_high or 1)
        if record.mean is not None and record.aurocs:
            # Means are printed with three digits.
            assert abs(np.mean([printed.auroc for printed in record.aurocs.values()]) - record.mean) <= 0.0005
    plain = json.loads(json.dumps(find_record("CheXNeXt 2018").to_json()))
    assert plain["aurocs"]["Edema"] == {"auroc": 0.924, "auroc_low": 0.886, "auroc_high": 0.955}
    dense = find_record("DenseNet-121, official split").to_json()
    assert (dense["mean"], dense["mean_to"], dense["mean_computed"]) == (0.806, 0.822, False)
    assert [find_record(name).mean_low for name in ("DenseNet-121 of Yzaza, 320 px", "ViT-B, official split")] == [
        0.8036,
        None,
    ]


def test_means_that_no_source_prints_are_marked_as_computed() -> None:
    computed = {record.name: record.mean for record in published.PUBLISHED if record.mean_computed}
    assert {name.split()[0] for name in computed} == {"Wang", "Yao", "CheXNet", "The"}
    assert computed["Wang et al. 2017, official split"] == pytest.approx(0.7451, abs=5e-5)
    assert not find_record("CheXNet 2017").mean_computed


def test_only_the_same_images_and_labels_are_comparable() -> None:
    names = {record.name for record in published.PUBLISHED}
    for given in product((None, "train", "test"), (None, "official", "patient"), (1, WHOLE)):
        reasons = list_reasons(*given)
        assert set(reasons) == names
        comparable = OFFICIAL if given == ("test", "official", WHOLE) else []
        assert [name for name, reason in reasons.items() if reason is None] == comparable
    assert list(list_reasons("test", "official"))[: len(OFFICIAL)] == OFFICIAL  # comparable ones first


def test_reason_names_the_difference() -> None:
    for split, kind, n_images, part in (
        ("train", "official", WHOLE, "train images"),
        ("test", "patient", WHOLE, "a random patient split"),
        ("test", "given", WHOLE, "as the tables gave it"),
        ("test", None, WHOLE, "unknown origin"),
        (None, "official", WHOLE, "all labelled images"),
        ("test", "official", WHOLE - 1, "25,595"),
    ):
        found = list_reasons(split, kind, n_images)
        assert all(part in found[name] for name in OFFICIAL)
    found = list_reasons("test", "official")
    for name, part in (("Wang et al. 2017", "no split"), ("CheXNet 2017", "by patient"), ("CheXNeXt 2018", "420 ")):
        assert part in found[name]
    assert "5,213 of 25,596 images" in found["The same model of J. Zech, official part"]
    # A record with only a mean is comparable over the same findings.
    for findings, comparable in ((FINDINGS, True), (LABELS, True), (FINDINGS[:13], False)):
        found = list_reasons("test", "official", findings=findings)
        assert {found[name] is None for name in MEANS_ONLY} == {comparable}


def test_comparable_means_cover_the_same_findings() -> None:
    wang = "Wang et al. 2017, official split"
    for findings, mean in (
        (("Mass", "Nodule"), (0.6933 + 0.6687) / 2),
        ((), None),
        (LABELS, find_record(wang).mean),
    ):
        pairs = published.list_published("test", "official", n_images=WHOLE, findings=findings)
        (record,) = (record for record, reason in pairs if record.name == wang and reason is None)
        assert (record.mean, record.aurocs) == (pytest.approx(mean), find_record(wang).aurocs)
        assert all(record == find_record(record.name) for record, reason in pairs if reason is not None)


def test_the_gap_between_validation_and_test_is_named_for_the_official_split_only() -> None:
    gaps = [validation - test for validation, test in published.VALIDATION_AND_TEST.values()]
    assert min(gaps) > 0
    words = published.describe_gap("official", synthetic=False)
    assert words is not None
    assert f"{min(gaps):.3f} to {max(gaps):.3f} lower" in words
    assert published.describe_gap("official", synthetic=True) is None
    assert [published.describe_gap(kind, synthetic=False) for kind in ("patient", "given", None)] == [None] * 3
