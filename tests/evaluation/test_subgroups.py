"""Subgroups: assignment of images, metrics of each group, differences from shared resamples."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ray_cxr.evaluation import bootstrap, group_estimates, groups, metrics, subgroups
from ray_cxr.evaluation.clustered import auroc_interval, clustered_auroc, clustered_share_interval, logit_interval
from ray_cxr.evaluation.group_estimates import Estimates, LabelledScores

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


def measure(
    c: dict, found: list[groups.Group] | None = None, macro: tuple[bool, bool] = (True, True)
) -> subgroups.Subgroups:
    found = build(c) if found is None else found
    images = LabelledScores.build(c["labels"], c["scores"], c["flags"], c["patients"], NAMES, np.array(macro))
    return subgroups.measure_groups(found, images)


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


def test_interval_of_a_group_is_that_of_all_images() -> None:
    c = simulate_images(60, 3)
    whole = measure(c, [groups.Group("all", "all", np.ones(180, dtype=bool))]).groups[0]
    for j, cell in enumerate(whole.cells):
        y, s, flags = (c[name][:, j] for name in ("labels", "scores", "flags"))
        found = auroc_interval(y == 1, s, c["patients"])
        assert (cell.auroc_low, cell.auroc_high) == pytest.approx(found, abs=2e-4)
        found = clustered_share_interval(flags[y == 1] == 1, c["patients"][y == 1])
        assert (cell.sensitivity_low, cell.sensitivity_high) == pytest.approx(found)


def test_limits_of_auroc_for_differences_are_logit_with_t_and_the_clustered_variance() -> None:
    c = simulate_images(60, 3)
    found = group_estimates.estimate_aurocs(c["labels"], c["scores"], c["patients"], 60)
    for j, freedom in enumerate(found.freedom):
        auroc, variance = clustered_auroc(c["labels"][:, j], c["scores"][:, j], c["patients"])
        limits = logit_interval(auroc, variance * (stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)) ** 2)
        assert found.limits(j, 0.05) == pytest.approx(limits, abs=2e-4)


def test_limits_of_a_share_for_differences_are_wilson_with_t() -> None:
    """Ten patients with one image each: eight hits, so n - 1 = 9 effective images, and t with 9 degrees of freedom."""
    found = group_estimates.estimate_shares(np.repeat([1.0, 0.0], [8, 2])[:, None], np.ones((10, 1)))
    assert found.limits(0, 0.05) == pytest.approx((0.427013, 0.955495), abs=1e-6)
    # Twice the images of the same patients add nothing; without an error the number of patients counts.
    double = group_estimates.estimate_shares(np.repeat([2.0, 0.0], [8, 2])[:, None], np.full((10, 1), 2.0))
    assert double.limits(0, 0.05) == pytest.approx(found.limits(0, 0.05))
    perfect = group_estimates.estimate_shares(np.full((10, 1), 3.0), np.full((10, 1), 3.0))
    assert perfect.limits(0, 0.05) == pytest.approx((1 / (1 + 2.262157**2 / 10), 1.0), abs=1e-6)
    single = group_estimates.estimate_shares(np.ones((1, 1)), np.ones((1, 1)))
    assert (single.limits(0, 0.05), single.interval(0)) == (None, None)


def test_difference_of_shares_equals_a_published_example() -> None:
    """Newcombe (1998), method 10: 56/70 - 48/80 is 0.2 with the limits 0.0524 and 0.3339."""

    def share(part: int, whole: int) -> Estimates:
        value = part / whole
        error = np.sqrt(value * (1 - value) / whole)
        return Estimates(
            np.array([value]),
            np.array([[error], [0.0]]),
            np.array([1e9]),
            np.array([float(whole)]),
            np.full((1, 2), np.nan),
        )

    first, second = share(56, 70), share(48, 80)
    second.errors[:] = second.errors[::-1]  # other patients
    assert first.difference_interval(second, 0) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    # The same patients in both groups: a positive covariance narrows the interval.
    low, high = first.difference_interval(share(48, 80), 0)
    assert 0.0524 < low < 0.2 < high < 0.3339


def test_intervals_of_means_and_of_differences_agree_with_the_bootstrap() -> None:
    """With many patients, who are in both groups."""
    c = simulate_images(800, 3, seed=1)
    found = measure(c, [group for group in build(c) if group.attribute == "view"])
    parts = [np.where(c["view"][:, None] == view, c["labels"], -1) for view in ("AP", "PA")]
    table = np.hstack(parts), np.tile(c["scores"], 2)
    drawn = bootstrap.resampled_aurocs(*table, c["patients"], 400).values  # noqa: PD011
    means = drawn.reshape(400, 2, 2).mean(axis=2)
    cell, mean = found.groups[0].cells[0], found.groups[0].own.auroc
    differences = {d.finding: d for d in found.differences if d.quantity == "auroc"}
    for got, resampled in (
        ((cell.auroc_low, cell.auroc_high), drawn[:, 0]),
        ((mean.low, mean.high), means[:, 0]),
        ((differences["A"].low, differences["A"].high), drawn[:, 0] - drawn[:, 2]),
        ((differences[None].low, differences[None].high), means[:, 0] - means[:, 1]),
    ):
        low, high = np.percentile(resampled, [2.5, 97.5])
        assert got == pytest.approx((low, high), abs=0.15 * (high - low))


def test_mean_includes_a_finding_of_one_patient() -> None:
    c = simulate_images(60, 3)
    c["labels"][:, 1] = 0
    c["labels"][4, 1] = 1
    whole = measure(c, [groups.Group("all", "all", np.ones(180, dtype=bool))]).groups[0]
    rare = whole.cells[1]
    assert (rare.auroc_low, rare.interval_reason) == (None, "fewer than two patients with or without the finding")
    assert rare.auroc == metrics.auroc(c["labels"][:, 1], c["scores"][:, 1])
    assert whole.own.auroc.low < whole.own.auroc.value - 0.2  # the rare finding's rank is hardly known


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
        assert (found.single.made == 0, found.single.small) == (small, 9 if small else 0)


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
    assert (none.difference, none.excludes_zero, none.reason) == (None, None, "no AUROC in F")
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
    chosen = find_group(measure(simulate_images(60, 3), macro=(True, False)), "sex", "F")
    assert chosen.own.auroc.findings == chosen.shared.auroc.findings == ("A",)
    assert chosen.own.auroc.value == chosen.cells[0].auroc


def test_differences_of_copies_are_hardly_uncertain() -> None:
    """Each patient has the same image in both groups, so every sample of patients has the difference 0."""
    c = simulate_images(60, 2, seed=3)
    for name in ("labels", "scores", "flags"):
        c[name][1::2] = c[name][::2]
    first = np.arange(120) % 2 == 0
    found = measure(c, [groups.Group("copy", "one", first), groups.Group("copy", "two", ~first)])
    assert len(found.differences) == 9
    for d in found.differences:
        assert (d.difference, d.excludes_zero) == (0.0, False)
        if d.finding is not None:
            cell = found.groups[0].cells[NAMES.index(d.finding)]
            width = getattr(cell, f"{d.quantity}_high") - getattr(cell, f"{d.quantity}_low")
            assert d.high - d.low < 0.5 * width


def test_a_difference_is_not_narrower_than_the_interval_of_a_few_patients() -> None:
    """The later images miss the only patient with A and both with B, which looks like no variance at all."""
    n, few = 120, 14
    labels = np.zeros((n + few, 2), dtype=np.int8)
    labels[:20], labels[n, 0], labels[n + 1 : n + 3, 1] = 1, 1, 1
    flags = np.zeros_like(labels)
    flags[:3] = 1
    later = np.arange(n + few) >= n
    scores = np.random.default_rng(0).random(labels.shape)
    images = LabelledScores.build(labels, scores, flags, np.arange(n + few), NAMES, np.ones(2, dtype=bool))
    found = subgroups.measure_groups([groups.Group("view", "AP", later), groups.Group("view", "PA", ~later)], images)
    small = next(group for group in found.groups if group.value == "AP")
    for quantity in ("sensitivity", "specificity"):
        mean = getattr(small.shared, quantity)
        difference = next(d for d in found.differences if d.finding is None and d.quantity == quantity)
        assert difference.high - difference.low >= mean.high - mean.low
    missed = next(d for d in found.differences if d.finding is None and d.quantity == "sensitivity")
    assert missed.low < 0 < missed.high
    assert (small.small, missed.small, missed.excludes_zero) == (True, True, None)
    assert all(d.excludes_zero is None for d in found.differences if d.small)


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
    # 27 comparisons: three attributes with two values, three quantities, two findings and their mean.
    single = [d for d in found.differences if not d.crossing]
    made = [d for d in single if not d.small]
    assert len(single) == 27
    assert (found.single.made, found.single.small) == (len(made), 27 - len(made))
    assert found.single.exclude_zero == sum(d.excludes_zero for d in made) >= 1
    assert found.single.expected_by_chance == pytest.approx(0.05 * len(made))
    assert found.crossings.made + found.crossings.small == len(found.differences) - 27


def test_results_are_json() -> None:
    plain = measure(simulate_images(50, 3)).to_json()
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


@pytest.mark.parametrize("quantity", ["auroc", "sensitivity", "specificity"])
def test_a_difference_without_an_interval_names_its_own_denominator(quantity: str) -> None:
    c = simulate_images(60, 3)
    c["labels"][c["sex"] == "F", 1] = 0
    c["labels"][np.flatnonzero(c["sex"] == "F")[0], 1] = 1
    found = measure(c, build(c, crossings=False))
    one = next(
        d for d in found.differences if (d.value, d.quantity, d.finding) in {("F", quantity, "B"), ("M", quantity, "B")}
    )
    expected = {
        "auroc": "fewer than two patients with or without the finding in a group",
        "sensitivity": "fewer than two patients with the finding in a group",
        "specificity": None,
    }
    assert one.reason == expected[quantity]


def test_a_few_patients_take_no_finding_from_the_means_of_other_groups() -> None:
    """The 4 children all have B, so B is undefined for them; all other ages keep it in their means."""
    c = simulate_images(60, 1)
    c["age"] = np.where(c["patients"] < 4, 10.0, np.where(c["patients"] < 32, 30.0, 50.0))
    c["labels"][c["patients"] < 4] = (1, 1)
    found = measure(c, build(c, crossings=False))
    children, adults = (find_group(found, "age_band", value) for value in ("0-17", "40-59"))
    assert adults.shared.auroc.findings == NAMES
    assert adults.shared.auroc.value == pytest.approx(np.mean([cell.auroc for cell in adults.cells]))
    assert (children.shared.auroc.value, children.small) == (None, True)
    assert "2 findings" in children.shared.auroc.reason
