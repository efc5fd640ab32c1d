"""Subgroups: who belongs where, numbers as of each group alone, differences as of resampling written out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ray_cxr.evaluation import intervals, subgroups

NIH = Path(__file__).parents[2].parent / "shared" / "nih" / "meta"
NAMES = ("A", "B")

PEOPLE = st.lists(
    st.tuples(
        st.sampled_from(["M", "F", None]),
        st.one_of(st.none(), st.floats(0, 110)),
        st.sampled_from(["PA", "AP", "LATERAL", None]),
        st.sampled_from([0, 1, 7, None]),
    ),
    min_size=1,
    max_size=30,
)


def columns(rows: list[tuple]) -> list[np.ndarray]:
    return [np.array(column, dtype=object) for column in zip(*rows, strict=True)]


def crowd(patients: int, each: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Images of patients who have a sex, and who are seen from two sides."""
    rng = np.random.default_rng(seed)
    n = patients * each
    codes = np.repeat(np.arange(patients), each)
    y = (rng.random((n, 2)) < (0.4, 0.3)).astype(np.int8)
    s = 1 / (1 + np.exp(-(y + rng.normal(size=(n, 2)) + 0.8 * rng.normal(size=(patients, 2))[codes])))
    return {
        "sex": np.where(rng.random(patients) < 0.3, "F", "M").astype(object)[codes],
        "age": np.full(n, np.nan),
        "view": np.where(rng.random(n) < 0.3, "AP", "PA").astype(object),
        "follow_up": np.tile(np.arange(each), patients),
        "patients": codes,
        "labels": y,
        "scores": s,
        "flags": (s > 0.6).astype(np.int8),
    }


def groups_of(c: dict[str, np.ndarray], **more: bool) -> list[subgroups.Group]:
    return subgroups.groups(c["sex"], c["age"], c["view"], c["follow_up"], **more)


def measured(c: dict[str, np.ndarray], found: list[subgroups.Group], **more: object) -> subgroups.Subgroups:
    given: dict = {"n_resamples": 100, "n_resamples_crossings": 60, **more}
    return subgroups.measure(found, c["labels"], c["scores"], c["flags"], c["patients"], NAMES, **given)


def of(found: subgroups.Subgroups, attribute: str, value: str) -> subgroups.Measured:
    return next(one for one in found.groups if (one.attribute, one.value) == (attribute, value))


@given(PEOPLE)
def test_every_image_is_in_one_group_of_each_attribute(rows: list[tuple]) -> None:
    found = subgroups.groups(*columns(rows))
    for attribute in ("sex", "age_band", "view", "follow_up"):
        masks = [group.mask for group in found if group.attribute == attribute]
        assert (np.sum(masks, axis=0) == 1).all()
    assert all(group.mask.any() for group in found)
    assert len({(group.attribute, group.value) for group in found}) == len(found)
    for group in found:
        if group.crossing:
            one, other = group.attribute.split(subgroups.AND)
            a, b = group.value.split(subgroups.AND)
            mask = {(g.attribute, g.value): g.mask for g in found}
            assert (group.mask == (mask[one, a] & mask[other, b])).all()
            assert subgroups.UNKNOWN not in (a, b)


@pytest.mark.parametrize(
    ("age", "band"),
    [
        (0, "0-17"),
        (17.9, "0-17"),
        (18, "18-39"),
        (39.99, "18-39"),
        (40, "40-59"),
        (60, "60-79"),
        (80, "80+"),
        (104, "80+"),
        (None, "unknown"),
        (float("nan"), "unknown"),
        (-1, "unknown"),
        (pd.NA, "unknown"),
    ],
)
def test_age_bands(age: object, band: str) -> None:
    found = subgroups.groups(*columns([("F", age, "PA", 0)]), crossings=False)
    assert [(group.attribute, group.value) for group in found] == [
        ("sex", "F"),
        ("age_band", band),
        ("view", "PA"),
        ("follow_up", "first image"),
    ]


def test_values_stand_in_order_and_unknown_last() -> None:
    rows = [("M", 90.0, "PA", 3), (None, None, None, None), ("F", 2.0, "AP", 0), ("M", 30.0, " ", 0)]
    found = subgroups.groups(*columns(rows), crossings=False)
    assert [group.value for group in found if group.attribute == "age_band"] == ["0-17", "18-39", "80+", "unknown"]
    assert [group.value for group in found if group.attribute == "view"] == ["AP", "PA", "unknown"]
    assert [group.value for group in found if group.attribute == "follow_up"] == [
        "first image",
        "later image",
        "unknown",
    ]


def test_an_attribute_that_nobody_knows_is_one_group_and_is_not_crossed() -> None:
    found = groups_of(crowd(5, 2))
    assert [group.value for group in found if group.attribute == "age_band"] == ["unknown"]
    assert {group.attribute for group in found if group.crossing} == {
        "sex & view",
        "sex & follow_up",
        "view & follow_up",
    }


def test_a_group_is_measured_as_if_it_stood_alone() -> None:
    c = crowd(80, 4)
    c["labels"][::7, 0] = -1
    c["scores"][::11, 1] = np.nan
    c["flags"][::11, 1] = -1
    found = measured(c, groups_of(c))
    for group, one in zip(groups_of(c), found.groups, strict=True):
        assert (one.n, one.n_patients) == (group.mask.sum(), len(np.unique(c["patients"][group.mask])))
        for j, cell in enumerate(one.cells):
            rows = group.mask & (c["labels"][:, j] >= 0) & ~np.isnan(c["scores"][:, j])
            y, s, flags = c["labels"][rows, j], c["scores"][rows, j], c["flags"][rows, j]
            assert (cell.finding, cell.n, cell.positives) == (NAMES[j], rows.sum(), y.sum())
            assert cell.n_patients == len(np.unique(c["patients"][rows]))
            assert cell.positive_patients == len(np.unique(c["patients"][rows][y == 1]))
            assert cell.auroc == pytest.approx(roc_auc_score(y, s), abs=1e-12)
            assert cell.sensitivity == pytest.approx(flags[y == 1].mean())
            assert cell.specificity == pytest.approx(1 - flags[y == 0].mean())
        assert one.own.auroc.value == pytest.approx(np.mean([cell.auroc for cell in one.cells]))
        assert one.own.sensitivity.value == pytest.approx(np.mean([cell.sensitivity for cell in one.cells]))


def test_the_whole_as_a_group_has_the_intervals_of_the_whole() -> None:
    c = crowd(60, 3)
    whole = measured(c, [subgroups.Group("all", "all", np.ones(180, dtype=bool))], n_resamples=200, seed=5).groups[0]
    plain = intervals.bootstrap_auroc(c["labels"], c["scores"], c["patients"], n_resamples=200, seed=5)
    for cell, interval in zip(whole.cells, plain.findings, strict=True):
        assert (cell.auroc_low, cell.auroc_high) == (interval.low, interval.high)
    assert (whole.own.auroc.low, whole.own.auroc.high) == (plain.macro.low, plain.macro.high)
    positive = c["labels"] == 1
    sensitivity = intervals.bootstrap_ratios(positive & (c["flags"] == 1), positive, c["patients"], 2000, seed=1)
    many = measured(c, [subgroups.Group("all", "all", np.ones(180, dtype=bool))], n_resamples=2000).groups[0]
    for cell, interval in zip(many.cells, sensitivity, strict=True):
        assert (cell.sensitivity_low, cell.sensitivity_high) == pytest.approx((interval.low, interval.high), abs=0.02)


def test_differences_are_of_groups_drawn_together() -> None:
    """Every patient has the same image twice, once in each group: whatever is drawn, there is no difference."""
    c = crowd(60, 2, seed=3)
    for name in ("labels", "scores", "flags"):
        c[name][1::2] = c[name][::2]
    first = np.arange(120) % 2 == 0
    found = measured(c, [subgroups.Group("copy", "one", first), subgroups.Group("copy", "two", ~first)])
    assert found.groups[0].own.auroc.low < found.groups[0].own.auroc.high
    assert len(found.differences) == 6
    for one in found.differences:
        assert (one.difference, one.low, one.high, one.excludes_zero) == (0.0, None, None, None)
        assert one.reason == "every resample gives the same"


def test_a_difference_is_a_groups_value_less_the_largest_groups() -> None:
    c = crowd(100, 4)
    c["flags"][(c["sex"] == "F") & (c["labels"][:, 0] == 1), 0] = 0
    found = measured(c, groups_of(c))
    assert of(found, "sex", "M").reference
    assert not of(found, "sex", "F").reference
    one = next(d for d in found.differences if (d.attribute, d.finding, d.quantity) == ("sex", "A", "sensitivity"))
    reference = of(found, "sex", "M").cells[0].sensitivity
    assert (one.value, one.reference, one.difference) == ("F", "M", pytest.approx(-reference))
    assert one.low <= one.difference <= one.high < 0
    assert one.excludes_zero
    assert {d.reference for d in found.differences if d.attribute == "sex & view"} == {"M & PA"}


def test_intervals_of_differences_cover_the_truth() -> None:
    """Two groups alike, their patients shared: 95 of 100 intervals hold 0."""
    rng = np.random.default_rng(7)
    hits: dict[str, list[bool]] = {"auroc": [], "sensitivity": []}
    for seed in range(200):
        c = crowd(150, 4, seed)
        half = rng.random(600) < 0.5
        parts = [subgroups.Group("half", "a", half), subgroups.Group("half", "b", ~half)]
        found = measured(c, parts, n_resamples=200, seed=seed)
        for one in found.differences:
            if one.finding == "A":
                hits[one.quantity].append(not one.excludes_zero)
    for values in hits.values():
        assert 0.90 <= np.mean(values) <= 0.985


def test_small_cells_are_marked_and_kept() -> None:
    c = crowd(80, 3)
    nine = c["patients"] < 9
    parts = [subgroups.Group("few", "nine", nine), subgroups.Group("few", "rest", ~nine)]
    found = measured(c, parts)
    few, rest = found.groups
    assert (few.small, rest.small) == (True, False)
    assert all(cell.small and cell.auroc is not None for cell in few.cells)
    assert not any(cell.small for cell in rest.cells)
    assert few.own.auroc.small == 2
    assert all(one.small for one in found.differences)
    assert (found.single.made, found.single.small) == (0, 6)


def test_what_is_not_defined_is_none_and_says_why() -> None:
    c = crowd(60, 3)
    here = c["sex"] == "F"
    c["labels"][here, 1] = 0
    c["flags"][:, 0] = -1
    found = measured(c, groups_of(c, crossings=False))
    cell = of(found, "sex", "F").cells[1]
    assert (cell.auroc, cell.auroc_low, cell.reason) == (None, None, "no positive images")
    assert (cell.sensitivity, cell.rates_reason) == (None, "no positive images")
    assert cell.specificity is not None
    assert of(found, "sex", "M").cells[0].rates_reason == "no operating point"
    assert of(found, "sex", "F").own.auroc.findings == ("A",)
    assert of(found, "sex", "M").own.auroc.findings == NAMES
    # Only A is defined in both, so that is what compares.
    assert of(found, "sex", "M").shared.auroc.findings == ("A",)
    assert of(found, "sex", "M").shared.auroc.value == of(found, "sex", "M").cells[0].auroc
    none = next(d for d in found.differences if (d.attribute, d.finding, d.quantity) == ("sex", "B", "auroc"))
    assert (none.difference, none.excludes_zero, none.reason) == (None, None, "no auroc in F")
    mean = next(d for d in found.differences if (d.attribute, d.finding, d.quantity) == ("sex", None, "auroc"))
    assert mean.findings == ("A",)
    assert of(found, "sex", "F").own.sensitivity.reason == "no finding has sensitivity"


def test_unknown_is_measured_and_compared_with_nothing() -> None:
    c = crowd(60, 3)
    c["sex"][c["patients"] < 40] = None
    found = measured(c, groups_of(c, crossings=False))
    unknown = of(found, "sex", "unknown")
    assert unknown.cells[0].auroc is not None
    assert not unknown.reference
    assert not any("unknown" in (one.value, one.reference) for one in found.differences)
    nobody = [one for one in found.differences if one.attribute == "age_band"]
    assert nobody == []


def test_comparisons_are_counted() -> None:
    found = measured(crowd(100, 4), groups_of(crowd(100, 4)))
    single = [one for one in found.differences if not one.crossing]
    assert len(single) == 3 * 2 * 3  # three attributes of two values; two quantities; two findings and their mean
    judged = [one for one in single if not one.small]
    assert found.single.made == len(judged)
    assert found.single.exclude_zero == sum(one.excludes_zero for one in judged)
    assert found.single.expected_by_chance == pytest.approx(0.05 * len(judged))
    assert "about 1 would" in found.single.words


def test_means_count_the_findings_that_they_are_told_to() -> None:
    found = measured(crowd(60, 3), groups_of(crowd(60, 3)), macro=np.array([True, False]))
    one = of(found, "sex", "F")
    assert one.own.auroc.findings == one.shared.auroc.findings == ("A",)
    assert one.own.auroc.value == one.cells[0].auroc
    assert [cell.finding for cell in one.cells] == list(NAMES)


def test_memory_does_not_change_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    c = crowd(50, 3)
    whole = measured(c, groups_of(c))
    monkeypatch.setattr(subgroups, "_CELLS", 1)
    monkeypatch.setattr(subgroups, "_RATES_AT_A_TIME", 7)
    assert measured(c, groups_of(c)) == whole


def test_as_dict_is_plain() -> None:
    plain = measured(crowd(40, 3), groups_of(crowd(40, 3))).as_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    row = next(one for one in plain["groups"] if one["value"] == "F")
    assert set(row["findings"]) == set(NAMES)
    assert row["own"]["auroc"]["findings"] == list(NAMES)


@pytest.mark.parametrize("wrong", ["labels", "flags", "patients"])
def test_shapes_that_do_not_fit_are_refused(wrong: str) -> None:
    c = crowd(10, 2)
    found = groups_of(c)
    c[wrong] = c[wrong][1:]
    with pytest.raises(ValueError, match="do not fit"):
        measured(c, found)


@settings(deadline=None)
@given(PEOPLE)
def test_a_description_counts_every_image(rows: list[tuple]) -> None:
    told = subgroups.describe(*columns(rows), np.arange(len(rows)) // 2)
    assert (told["images"], told["patients"]) == (len(rows), (len(rows) + 1) // 2)
    for attribute in ("sex", "age_band", "view", "follow_up"):
        assert sum(told[attribute].values()) == len(rows)
    ages = [row[1] for row in rows if row[1] is not None]
    if ages:
        assert told["age"]["median"] == pytest.approx(np.median(ages))
        assert told["age"]["q1"] <= told["age"]["median"] <= told["age"]["q3"]
    else:
        assert told["age"] == {"q1": None, "median": None, "q3": None}


@pytest.mark.skipif(not NIH.is_dir(), reason=f"the real tables are not at hand: no {NIH}")
def test_groups_of_the_official_test_set() -> None:
    """Counts that pandas gives of NIH's own table."""
    table = pd.read_csv(NIH / "Data_Entry_2017_v2020.csv.gz")
    table = table[table["Image Index"].isin(pd.read_csv(NIH / "test_list.txt.gz", header=None)[0])]
    assert len(table) == 25_596
    found = subgroups.groups(
        table["Patient Sex" if "Patient Sex" in table else "Patient Gender"].to_numpy(dtype=object),
        table["Patient Age"].to_numpy(),
        table["View Position"].to_numpy(dtype=object),
        table["Follow-up #"].to_numpy(),
    )
    counts = {(group.attribute, group.value): int(group.mask.sum()) for group in found}
    assert counts["view", "AP"] == (table["View Position"] == "AP").sum() == 14_500
    assert counts["age_band", "0-17"] == (table["Patient Age"] < 18).sum()
    assert (
        counts["age_band & view", "80+ & PA"] == ((table["Patient Age"] >= 80) & (table["View Position"] == "PA")).sum()
    )
    assert counts["follow_up", "first image"] == (table["Follow-up #"] == 0).sum()
