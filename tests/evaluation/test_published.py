"""Published figures are those of the sources, and are comparable only where images and labels are the same."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_cxr.evaluation import published
from ray_cxr.labels import FINDINGS, LABELS

FACTS = Path(__file__).parents[2].parent / "shared" / "FACTS.md"
WHOLE = published.OFFICIAL_TEST_IMAGES
OFFICIAL = ["DenseNet-121, official split", "ResNet-50, official split", "ViT-B, official split"]
RANKING = re.compile(r"better|worse|beat|outperform|superior|inferior|best|higher|lower", re.IGNORECASE)


def named(name: str) -> published.Published:
    (one,) = (one for one in published.PUBLISHED if one.name == name)
    return one


def reasons(*arguments: object, **options: object) -> dict[str, str | None]:
    return {one.name: reason for one, reason in published.beside(*arguments, **options)}  # type: ignore[arg-type]


def test_some_figures_to_read() -> None:
    assert named("Wang et al. 2017").aurocs["Infiltration"].value == 0.609
    assert named("CheXNet 2017").aurocs["Pneumonia"].value == 0.768
    assert named("CheXNeXt 2018").aurocs["Edema"] == published.PublishedAuroc(0.924, 0.886, 0.955)
    assert named("The same model of J. Zech, official part").aurocs["Hernia"].value == 0.994
    assert (named("ResNet-50, official split").mean, named("ResNet-50, official split").mean_to) == (0.809, 0.815)


def test_figures_are_those_of_the_notes() -> None:
    if not FACTS.is_file():
        pytest.skip(f"the notes are not at hand: no {FACTS}")
    text = FACTS.read_text(encoding="utf-8")
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
        assert {f: one.value for f, one in named(name).aurocs.items()} == {f: table[f][position] for f in FINDINGS}
        assert named(name).mean == table["mean"][position]
    intervals = {
        finding: published.PublishedAuroc(float(value), float(low), float(high))
        for finding, value, low, high in re.findall(r"(\w+) (\.\d+) \((\.\d+)-(\.\d+)\)", text)
    }
    assert named("CheXNeXt 2018").aurocs == intervals
    assert len(intervals) == 8


@pytest.mark.parametrize("one", published.PUBLISHED, ids=lambda one: one.name)
def test_record_is_whole(one: published.Published) -> None:
    assert one.source
    assert one.tested_on
    assert list(one.aurocs) == [finding for finding in FINDINGS if finding in one.aurocs]
    assert one.aurocs or one.mean is not None
    for auroc in one.aurocs.values():
        assert 0.5 < (auroc.low or 0.51) <= auroc.value <= (auroc.high or 1.0) <= 1.0
    if one.mean is not None and one.aurocs:
        # As printed, to three digits.
        assert abs(np.mean([auroc.value for auroc in one.aurocs.values()]) - one.mean) <= 0.0005
    assert json.loads(json.dumps(one.as_dict()))["tested"] == one.tested


def test_records_cannot_be_changed() -> None:
    one = published.PUBLISHED[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.mean = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        one.aurocs["Mass"] = published.PublishedAuroc(1.0)  # type: ignore[index]


def test_whole_official_test_with_its_own_labels_is_comparable() -> None:
    pairs = published.beside("test", "official", "nih", n_images=WHOLE)
    assert [one.name for one, reason in pairs if reason is None] == OFFICIAL
    assert [one.name for one, _ in pairs[:3]] == OFFICIAL
    assert len(pairs) == len(published.PUBLISHED)


@pytest.mark.parametrize(
    ("arguments", "n_images", "part"),
    [
        (("train", "official"), WHOLE, "this evaluation is of the train images"),
        (("val", "official"), WHOLE, "this evaluation is of the val images"),
        (("test", "patient"), WHOLE, "a random patient split"),
        (("test", "given"), WHOLE, "as the tables gave it"),
        (("test", None), WHOLE, "unknown origin"),
        ((None, "official"), WHOLE, "all labelled images"),
        ((None, None), None, "all labelled images"),
        (("test", "official"), WHOLE - 1, "this evaluation has 25,595 images, the official test split 25,596"),
        (("test", "official"), None, "how many images"),
        (("test", "official", "consensus"), WHOLE, "other labels: NIH's own"),
        (("test", "official", "adjudicated"), 1962, "other labels: NIH's own"),
    ],
)
def test_anything_else_is_not(arguments: tuple[object, ...], n_images: int | None, part: str) -> None:
    found = reasons(*arguments, n_images=n_images)
    assert None not in found.values()
    assert all(part in (found[name] or "") for name in OFFICIAL)


def test_reasons_say_what_differs() -> None:
    found = reasons("test", "official", n_images=WHOLE)
    assert found["Wang et al. 2017"] == found["Yao et al. 2017"] == "its source names no split"
    assert found["CheXNet 2017"] == "another split: random by patient"
    assert found["CheXNeXt 2018"] == "other labels: a radiologist consensus on 420 images, not NIH's"
    assert "5,213 of 25,596 images" in (found["The same model of J. Zech, official part"] or "")
    assert reasons("test", "patient")["CheXNet 2017"] == "another split: random by patient, drawn apart from this one"
    assert "another consensus" in (reasons(None, None, "consensus", n_images=420)["CheXNeXt 2018"] or "")


@pytest.mark.parametrize(("findings", "comparable"), [(FINDINGS, True), (LABELS, True), (FINDINGS[:13], False)])
def test_a_mean_is_comparable_over_the_same_findings(findings: tuple[str, ...], comparable: bool) -> None:
    found = reasons("test", "official", n_images=WHOLE, findings=findings)
    assert [found[name] is None for name in OFFICIAL] == [comparable] * 3
    if not comparable:
        assert found[OFFICIAL[0]] == "a mean over other findings: theirs is over 14, this one over 13"


@given(
    split=st.sampled_from([None, "train", "val", "test"]),
    kind=st.sampled_from([None, "official", "patient", "given"]),
    labels=st.sampled_from(["nih", "adjudicated", "consensus"]),
    n_images=st.sampled_from([None, 1, 420, 5213, 22_433, WHOLE]),
)
def test_only_the_same_images_and_labels_are_ever_comparable(
    split: str | None, kind: str | None, labels: published.LabelSource, n_images: int | None
) -> None:
    same = (split, kind, labels, n_images) == ("test", "official", "nih", WHOLE)
    pairs = published.beside(split, kind, labels, n_images=n_images)
    assert {one.name for one, _ in pairs} == {one.name for one in published.PUBLISHED}
    for one, reason in pairs:
        assert (reason is None) == (same and one.tested == "official")
        assert not RANKING.search(f"{reason} {one.source} {one.tested_on} {one.name}")
