"""Published values equal their sources, and are comparable only on the same images and labels."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from ray_cxr.evaluation import published
from ray_cxr.labels import FINDINGS, LABELS

WHOLE = published.OFFICIAL_TEST_IMAGES
OFFICIAL = ["DenseNet-121, official split", "ResNet-50, official split", "ViT-B, official split"]


def find_record(name: str) -> published.Published:
    (one,) = (one for one in published.PUBLISHED if one.name == name)
    return one


def list_reasons(*arguments: object, **options: object) -> dict[str, str | None]:
    return {one.name: reason for one, reason in published.list_published(*arguments, **options)}  # type: ignore[arg-type]


def test_values_equal_the_notes(shared: Path) -> None:
    facts = shared / "FACTS.md"
    if not facts.is_file():
        pytest.skip(f"{facts} does not exist")
    text = facts.read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    table = {row[0]: [float(cell) for cell in row[1:]] for row in rows if row[0] in (*FINDINGS, "mean")}
    assert len(table) == 15
    columns = (
        "Wang et al. 2017",
        "Yao et al. 2017",
        "CheXNet 2017",
        "CheXNet retrained by J. Zech",
        "The same model of J. Zech, official part",
    )
    for position, name in enumerate(columns):
        assert {f: one.value for f, one in find_record(name).aurocs.items()} == {
            f: table[f][position] for f in FINDINGS
        }
        assert find_record(name).mean == table["mean"][position]
    intervals = {
        finding: published.PublishedAuroc(float(value), float(low), float(high))
        for finding, value, low, high in re.findall(r"(\w+) (\.\d+) \((\.\d+)-(\.\d+)\)", text)
    }
    assert find_record("CheXNeXt 2018").aurocs == intervals
    assert len(intervals) == 8


def test_records_are_consistent() -> None:
    for one in published.PUBLISHED:
        assert one.aurocs or one.mean is not None
        for auroc in one.aurocs.values():
            assert 0.5 < (auroc.low or 0.51) <= auroc.value <= (auroc.high or 1.0) <= 1.0
        if one.mean is not None and one.aurocs:
            # Means are printed with three digits.
            assert abs(np.mean([auroc.value for auroc in one.aurocs.values()]) - one.mean) <= 0.0005
    plain = json.loads(json.dumps(find_record("CheXNeXt 2018").to_json()))
    assert plain["aurocs"]["Edema"] == {"auroc": 0.924, "auroc_low": 0.886, "auroc_high": 0.955}
    assert find_record("ResNet-50, official split").to_json()["mean_to"] == 0.815


def test_only_the_same_images_and_labels_are_comparable() -> None:
    splits, kinds = (None, "train", "test"), (None, "official", "patient")
    for given in product(splits, kinds, (None, 1, WHOLE)):
        split, kind, n_images = given
        same = given == ("test", "official", WHOLE)
        pairs = published.list_published(split, kind, n_images=n_images)
        assert {one.name for one, _ in pairs} == {one.name for one in published.PUBLISHED}
        assert [reason is None for _, reason in pairs] == [same and one.tested == "official" for one, _ in pairs]
        if same:
            assert [one.name for one, _ in pairs[:3]] == OFFICIAL  # comparable ones first


def test_reason_names_the_difference() -> None:
    for arguments, n_images, part in (
        (("train", "official"), WHOLE, "train images"),
        (("test", "patient"), WHOLE, "a random patient split"),
        (("test", "given"), WHOLE, "as the tables gave it"),
        (("test", None), WHOLE, "unknown origin"),
        ((None, "official"), WHOLE, "all labelled images"),
        (("test", "official"), WHOLE - 1, "25,595"),
        (("test", "official"), None, "how many images"),
    ):
        found = list_reasons(*arguments, n_images=n_images)
        assert all(part in found[name] for name in OFFICIAL)
    found = list_reasons("test", "official", n_images=WHOLE)
    for name, part in (("Wang et al. 2017", "no split"), ("CheXNet 2017", "by patient"), ("CheXNeXt 2018", "420 ")):
        assert part in found[name]
    assert "5,213 of 25,596 images" in found["The same model of J. Zech, official part"]
    # A record with only a mean is comparable over the same findings.
    for findings, comparable in ((FINDINGS, True), (LABELS, True), (FINDINGS[:13], False)):
        found = list_reasons("test", "official", n_images=WHOLE, findings=findings)
        assert [found[name] is None for name in OFFICIAL] == [comparable] * 3
