"""Subgroups: assignment of images, metrics of each group, differences from shared resamples."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr.evaluation import bootstrap, group_resamples, groups, metrics, subgroups
from ray_cxr.evaluation.group_resamples import LabelledScores

NAMES = ("A", "B")
ATTRIBUTES = ("sex", "age_band", "view", "follow_up")
PERSON = st.tuples(
    st.sampled_from(["M", "F", None]),
    st.none() | st.floats(0, 110),
    st.sampled_from(["PA", "AP", "LATERAL", None]),
    st.sampled_from([0, 1, 7, None]),
)


def to_columns(rows: list[tuple]) -> list[np.ndarray]:
    return [np.array(column, dtype=object) for column in zip(*rows, strict=True)]


def simulate_images(patients: int, each: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return images of patients with known sex and unknown age, in two views."""
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


def build(c: dict[str, np.ndarray], **more: bool) -> list[groups.Group]:
    return groups.build_groups(c["sex"], c["age"], c["view"], c["follow_up"], **more)


def measure(c: dict, found: list[groups.Group] | None = None, **more: object) -> subgroups.Subgroups:
    found = build(c) if found is None else found
    macro = more.pop("macro", np.ones(2, dtype=bool))
    images = LabelledScores.build(c["labels"], c["scores"], c["flags"], c["patients"], NAMES, macro)
    return subgroups.measure_groups(found, images, **{"n_resamples": 60, "n_resamples_crossings": 50, **more})


def find_group(found: subgroups.Subgroups, attribute: str, value: str) -> subgroups.GroupResult:
    return next(group for group in found.groups if (group.attribute, group.value) == (attribute, value))


def find_difference(found: subgroups.Subgroups, finding: str | None, quantity: str) -> subgroups.Difference:
    return next(d for d in found.differences if (d.attribute, d.finding, d.quantity) == ("sex", finding, quantity))


@settings(max_examples=40)
@given(st.lists(PERSON, min_size=1, max_size=20))
def test_every_image_is_in_one_group_of_each_attribute(rows: list[tuple]) -> None:
    found = groups.build_groups(*to_columns(rows))
    for attribute in ATTRIBUTES:
        masks = [group.mask for group in found if group.attribute == attribute]
        assert (np.sum(masks, axis=0) == 1).all()
    assert all(group.mask.any() for group in found)
    mask = {(group.attribute, group.value): group.mask for group in found}
    assert len(mask) == len(found)
    for group in found:
        if group.crossing:
            first, second = group.attribute.split(groups.AND)
            a, b = group.value.split(groups.AND)
            assert (group.mask == (mask[first, a] & mask[second, b])).all()
            assert groups.UNKNOWN not in (a, b)
    # A description counts the same groups.
    counts = groups.describe_population(*to_columns(rows), np.arange(len(rows)) // 2)
    assert (counts["images"], counts["patients"]) == (len(rows), (len(rows) + 1) // 2)
    assert groups.describe_population(*to_columns(rows), np.full(len(rows), None))["patients"] is None
    for group in found:
        assert group.crossing or counts[group.attribute][group.value] == group.mask.sum()
    ages = [row[1] for row in rows if row[1] is not None]
    quartiles = np.quantile(ages, [0.25, 0.5, 0.75]) if ages else [None] * 3
    assert [counts["age"][name] for name in ("q1", "median", "q3")] == pytest.approx(list(quartiles))


def test_age_bands_and_other_values() -> None:
    ages = [0, 17.9, 18, 39.99, 40, 59, 60, 79.5, 80, 104, None, float("nan"), -1, 999, pd.NA]
    bands = ["0-17"] * 2 + ["18-39"] * 2 + ["40-59"] * 2 + ["60-79"] * 2 + ["80+"] * 2 + ["unknown"] * 5
    for age, band in zip(ages, bands, strict=True):
        found = groups.build_groups(*to_columns([("F", age, "PA", 0)]), crossings=False)
        assert [(group.attribute, group.value) for group in found] == list(
            zip(ATTRIBUTES, ("F", band, "PA", "first image"), strict=True)
        )
    # Values are sorted, unknown last.
    rows = [("M", 90.0, "PA", 3), (None, None, None, None), ("F", 2.0, "AP", 0), ("M", 30.0, " ", -1)]
    found = groups.build_groups(*to_columns(rows), crossings=False)
    values = {name: [group.value for group in found if group.attribute == name] for name in ATTRIBUTES}
    assert values["age_band"] == ["0-17", "18-39", "80+", "unknown"]
    assert values["view"] == ["AP", "PA", "unknown"]
    assert values["follow_up"] == ["first image", "later image", "unknown"]
    # Attributes with a single value are not crossed.
    crossed = {group.attribute for group in build(simulate_images(5, 2)) if group.crossing}
    assert crossed == {"sex & view", "sex & follow_up", "view & follow_up"}
    with pytest.raises(ValueError, match="images"):
        groups.build_groups(*to_columns(rows)[:3], np.zeros(3))


def test_spellings_of_a_view_and_a_sex_are_one_group() -> None:
    views = ["LL", "Lateral", "LATERAL", "P.A.", "PA", "PA and lateral", None]
    sexes = ["female", "F", "f", "Male", "M", "O", None]
    rows = [(sex, 50.0, view, 0) for sex, view in zip(sexes, views, strict=True)]
    found = groups.build_groups(*to_columns(rows), crossings=False)
    counts = {name: {g.value: g.mask.sum() for g in found if g.attribute == name} for name in ("sex", "view")}
    assert counts == {"sex": {"F": 3, "M": 2, "unknown": 2}, "view": {"LATERAL": 3, "PA": 2, "unknown": 2}}


def test_group_metrics_equal_those_of_its_images() -> None:
    c = simulate_images(60, 4)
    c["labels"][::7, 0] = -1
    c["scores"][::11, 1] = np.nan
    c["flags"][::11, 1] = -1
    found = measure(c)
    for group, result in zip(build(c), found.groups, strict=True):
        assert (result.n, result.n_patients) == (group.mask.sum(), len(np.unique(c["patients"][group.mask])))
        for j, cell in enumerate(result.cells):
            rows = group.mask & (c["labels"][:, j] >= 0) & ~np.isnan(c["scores"][:, j])
            y, s, flags, people = (c[name][rows] for name in ("labels", "scores", "flags", "patients"))
            y, s, flags = y[:, j], s[:, j], flags[:, j]
            assert (cell.finding, cell.n, cell.positives) == (NAMES[j], rows.sum(), y.sum())
            patients = (cell.n_patients, cell.positive_patients, cell.negative_patients)
            assert patients == tuple(len(np.unique(people[part])) for part in (y >= 0, y == 1, y == 0))
            cells = metrics.confusion(y, flags == 1)
            expected = (metrics.auroc(y, s), cells.sensitivity, cells.specificity)
            assert (cell.auroc, cell.sensitivity, cell.specificity) == pytest.approx(expected, abs=1e-12)
        for name in ("auroc", "sensitivity", "specificity"):
            mean = getattr(result.own, name)
            assert mean.value == pytest.approx(np.mean([getattr(cell, name) for cell in result.cells]))
            assert mean.low <= mean.value <= mean.high


def test_group_of_all_images_has_their_intervals() -> None:
    c, options = simulate_images(60, 3), {"n_resamples": 100, "seed": 5}
    whole = measure(c, [groups.Group("all", "all", np.ones(180, dtype=bool))], **options).groups[0]
    derived = bootstrap.DerivedOutputs(c["flags"], np.full((180, 2), np.nan), np.full(2, np.nan))
    table, macro = (c["labels"], c["scores"], c["patients"]), np.ones(2, dtype=bool)
    plain = bootstrap.bootstrap_findings(*table, derived, macro=macro, **options)
    for cell, finding in zip(whole.cells, plain.findings, strict=True):
        for name in ("auroc", "sensitivity", "specificity"):
            got = (getattr(cell, f"{name}_low"), getattr(cell, f"{name}_high"))
            assert got == pytest.approx((finding[name].low, finding[name].high), abs=1e-12)
    assert (whole.own.auroc.low, whole.own.auroc.high) == (plain.macro["auroc"].low, plain.macro["auroc"].high)


def test_small_cells_are_marked_and_kept() -> None:
    c = simulate_images(80, 3)
    for few, small in ((9, True), (10, False)):
        # Every patient has a positive and a negative image of each finding.
        c["labels"][:] = np.tile([[1], [0], [1]], (80, 2))
        mask = c["patients"] < few
        parts = [groups.Group("few", "few", mask), groups.Group("few", "rest", ~mask)]
        found = measure(c, parts)
        assert [group.small for group in found.groups] == [small, False]
        assert all(cell.small == small and cell.auroc is not None for cell in found.groups[0].cells)
        assert found.groups[0].own.auroc.small == (2 if small else 0)
        assert all(d.small == small for d in found.differences)
        assert (found.single.made == 0, found.single.small) == (small, 6 if small else 0)


def test_undefined_values_have_a_reason() -> None:
    c = simulate_images(60, 3)
    c["labels"][c["sex"] == "F", 1] = 0
    c["flags"][:, 0] = -1
    found = measure(c, build(c, crossings=False))
    women, men = find_group(found, "sex", "F"), find_group(found, "sex", "M")
    cell = women.cells[1]
    assert (cell.auroc, cell.auroc_low, cell.reason) == (None, None, "no positive images")
    assert (cell.sensitivity, cell.rates_reason) == (None, "no positive images")
    assert (cell.specificity is not None, cell.interval_reason, men.cells[1].reason) == (True, None, None)
    assert (men.cells[0].rates_reason, men.cells[1].rates_reason) == ("no operating point", None)
    assert (women.own.auroc.findings, men.own.auroc.findings) == (("A",), NAMES)
    # Only A is defined in both, so only A is compared.
    assert (men.shared.auroc.findings, men.shared.auroc.value) == (("A",), men.cells[0].auroc)
    none = find_difference(found, "B", "auroc")
    assert (none.difference, none.excludes_zero, none.reason) == (None, None, "no auroc in F")
    assert find_difference(found, None, "auroc").findings == ("A",)
    assert women.own.sensitivity.value is men.shared.sensitivity.value is None
    assert women.own.sensitivity.reason == "no finding has sensitivity"
    assert "in all groups" in men.shared.sensitivity.reason
    # Unknown values are measured and not compared.
    c = simulate_images(60, 3)
    c["sex"][c["patients"] < 40] = None
    found = measure(c, build(c, crossings=False))
    unknown = find_group(found, "sex", "unknown")
    assert (unknown.cells[0].auroc is None, unknown.reference) == (False, False)
    assert not any("unknown" in (d.value, d.reference) or d.attribute == "age_band" for d in found.differences)
    # Means cover the findings of `macro`.
    chosen = find_group(measure(simulate_images(60, 3), macro=np.array([True, False])), "sex", "F")
    assert chosen.own.auroc.findings == chosen.shared.auroc.findings == ("A",)
    assert chosen.own.auroc.value == chosen.cells[0].auroc


def test_differences_share_their_resamples() -> None:
    """Each patient has the same image in both groups, so no resample shows a difference."""
    c = simulate_images(60, 2, seed=3)
    for name in ("labels", "scores", "flags"):
        c[name][1::2] = c[name][::2]
    first = np.arange(120) % 2 == 0
    found = measure(c, [groups.Group("copy", "one", first), groups.Group("copy", "two", ~first)])
    assert found.groups[0].own.auroc.low < found.groups[0].own.auroc.high
    assert len(found.differences) == 6
    for d in found.differences:
        assert (d.difference, d.low, d.high, d.excludes_zero, bool(d.reason)) == (0.0, None, None, None, True)


def test_differences_are_relative_to_the_largest_group() -> None:
    c = simulate_images(100, 4)
    c["flags"][(c["sex"] == "F") & (c["labels"][:, 0] == 1), 0] = 0
    found = measure(c)
    women, men = find_group(found, "sex", "F"), find_group(found, "sex", "M")
    assert (women.reference, men.reference) == (False, True)
    missed = find_difference(found, "A", "sensitivity")
    assert (missed.value, missed.reference, missed.difference) == ("F", "M", pytest.approx(-men.cells[0].sensitivity))
    assert missed.low <= missed.difference <= missed.high < 0
    assert missed.excludes_zero
    mean = find_difference(found, None, "auroc")
    assert mean.difference == pytest.approx(women.shared.auroc.value - men.shared.auroc.value)
    assert {d.reference for d in found.differences if d.attribute == "sex & view"} == {"M & PA"}
    # 18 comparisons: three attributes with two values, two quantities, two findings and their mean.
    single = [d for d in found.differences if not d.crossing]
    made = [d for d in single if not d.small]
    assert len(single) == 18
    assert (found.single.made, found.single.small) == (len(made), 18 - len(made))
    assert found.single.exclude_zero == sum(d.excludes_zero for d in made) >= 1
    assert found.single.expected_by_chance == pytest.approx(0.05 * len(made))
    assert found.crossings.made + found.crossings.small == len(found.differences) - 18


def test_chunks_do_not_change_results_and_results_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    c = simulate_images(50, 3)
    whole = measure(c)
    monkeypatch.setattr(group_resamples, "_CELLS", 1)
    monkeypatch.setattr(bootstrap, "_CELLS", 7 * 150)
    assert measure(c) == whole
    plain = whole.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    row = next(group for group in plain["groups"] if group["value"] == "F")
    assert set(row["findings"]) == set(NAMES)
    assert row["own"]["auroc"]["findings"] == list(NAMES)


def test_bad_input_is_refused() -> None:
    c = simulate_images(10, 2)
    found = build(c)
    for name in ("labels", "scores", "flags", "patients"):
        with pytest.raises(ValueError, match="do not fit"):
            measure({**c, name: c[name][1:]}, found)
    with pytest.raises(ValueError, match="mask"):
        measure(c, [groups.Group("sex", "F", np.ones(3, bool)), *found[1:]])
