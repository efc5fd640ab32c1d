"""Underdiagnosis by group: which images count, rates by hand, and the group that is clearly above another."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ray_cxr.evaluation.alerts import find_abnormal
from ray_cxr.evaluation.group_estimates import LabelledScores
from ray_cxr.evaluation.groups import Group
from ray_cxr.evaluation.underdiagnosis import Underdiagnosis, measure_underdiagnosis

NAMES = ("Mass", "Nodule", "No_Finding")


def measure(labels: np.ndarray, flags: np.ndarray, patients: np.ndarray, groups: list[Group]) -> Underdiagnosis:
    """Measure two findings and the output No_Finding, whose flag and label do not count as a finding."""
    scores = np.zeros(labels.shape)
    images = LabelledScores.build(labels, scores, flags, patients, NAMES, np.array([True, True, False]))
    found = measure_underdiagnosis(groups, images, find_abnormal(dict(zip(NAMES, labels.T, strict=True))))
    assert isinstance(found, Underdiagnosis)
    return found


def split(mask: np.ndarray, attribute: str = "sex", *, crossing: bool = False) -> list[Group]:
    return [Group(attribute, "F", mask, crossing), Group(attribute, "M", ~mask, crossing)]


def test_rates_by_hand() -> None:
    rows = [
        # patient, woman, labels and flags of Mass, Nodule and No_Finding
        ("a", 1, (1, 0, 0), (0, 0, 0)),  # missed
        ("a", 1, (1, 0, 0), (1, 0, 0)),
        ("b", 1, (0, 1, 0), (1, 0, 0)),  # a flag of another finding: not passed as normal
        ("c", 1, (1, -1, 0), (0, 0, 1)),  # a null label next to a positive one; the flag of No_Finding is none
        ("d", 1, (0, 0, 1), (0, 0, 1)),
        ("d", 1, (0, 0, 1), (0, 1, 0)),  # false alarm
        ("e", 0, (0, -1, -1), (0, 0, 0)),  # neither with nor known to be without a finding
        ("e", 0, (-1, -1, 1), (1, 0, 0)),  # without any finding, by its label No_Finding
        ("f", 0, (0, 0, 0), (0, 0, 0)),  # has a finding that is not measured here
        ("g", 0, (0, 1, 0), (0, -1, 0)),  # no flag is known, so no count
        ("g", 0, (0, 1, 0), (1, -1, 0)),
        ("h", 0, (0, 1, 0), (0, 0, 0)),  # missed
    ]
    patients, women, labels, flags = (np.array(column) for column in zip(*rows, strict=True))
    found = measure(labels, flags, patients, split(women == 1))
    assert found.findings == ("Mass", "Nodule")
    rates = {
        name: {key: (rate.value, rate.n) for key, rate in part.items()}
        for name, part in (("all", found.overall), *((group.value, group.rates) for group in found.groups))
    }
    assert rates == {
        "all": {
            "underdiagnosis": (pytest.approx(3 / 6), 6),
            "underdiagnosis_patients": (pytest.approx(2 / 5), 5),
            "overdiagnosis": (pytest.approx(2 / 3), 3),
            "overdiagnosis_patients": (1.0, 2),
        },
        "F": {
            "underdiagnosis": (0.5, 4),
            "underdiagnosis_patients": (pytest.approx(1 / 3), 3),
            "overdiagnosis": (0.5, 2),
            "overdiagnosis_patients": (1.0, 1),
        },
        "M": {
            "underdiagnosis": (0.5, 2),
            "underdiagnosis_patients": (0.5, 2),
            "overdiagnosis": (1.0, 1),
            "overdiagnosis_patients": (1.0, 1),
        },
    }
    alone = found.groups[0].rates["overdiagnosis"]
    assert (alone.low, alone.high, alone.small, alone.reason) == (None, None, True, "only one patient")
    assert (found.single.made, found.single.small, found.highest) == (0, 1, None)


def simulate(missed_f: float, missed_m: float, n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, flags, patients and who is a woman; every patient has two images with Mass."""
    women = np.arange(n) % 5 < 2
    patients, rng = np.arange(n) // 10 * 5 + np.arange(n) % 5, np.random.default_rng(0)
    labels = np.tile(np.array([[1, 0, 0]], dtype=np.int8), (n, 1))
    missed = rng.random(n) < np.where(women, missed_f, missed_m)
    flags = np.zeros((n, 3), dtype=np.int8)
    flags[:, 0] = ~missed
    return labels, flags, patients, women


@pytest.mark.parametrize(("f", "m", "higher"), [(0.6, 0.2, "F"), (0.1, 0.5, "M"), (0.3, 0.3, None)])
def test_only_a_clear_difference_names_the_highest_group(f: float, m: float, higher: str | None) -> None:
    labels, flags, patients, women = simulate(f, m)
    crossed = split(women, "sex & view", crossing=True)
    found = measure(labels, flags, patients, [*split(women), Group("sex", "unknown", np.zeros(400, bool)), *crossed])
    assert (found.highest[0].value if found.highest else None) == higher
    first, reference, unknown, *pairs = found.groups
    assert (first.reference, reference.reference, dict(reference.differences)) == (False, True, {})
    difference = first.differences["underdiagnosis"]
    values = [group.rates["underdiagnosis"].value for group in (first, reference)]
    assert difference.difference == pytest.approx(values[0] - values[1])
    assert difference.low < difference.difference < difference.high
    assert first.beyond_chance is difference.excludes_zero is (higher is not None)
    # Pairs of attributes are measured, and make no claim.
    assert (pairs[0].beyond_chance, pairs[0].differences["underdiagnosis"].low) == (None, difference.low)
    assert (unknown.rates["underdiagnosis"].reason, dict(unknown.differences)) == ("no image with a finding", {})
    assert (found.single.made, found.crossings.made) == (1, 1)
    plain = found.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["groups"][0]["differences"]["underdiagnosis"]["excludes_zero"] == difference.excludes_zero


def test_a_claim_is_corrected_for_the_number_of_comparisons() -> None:
    labels, flags, patients, women = simulate(0.42, 0.3)
    alone = measure(labels, flags, patients, split(women)).groups[0]
    assert alone.differences["underdiagnosis"].excludes_zero
    many = [group for k in range(40) for group in split(women, f"attribute {k}")]
    among = measure(labels, flags, patients, many)
    assert among.single.exclude_zero == among.single.made == 40
    assert among.highest is None


@pytest.mark.parametrize(("patients", "named"), [(29, False), (30, True)])
def test_few_patients_name_no_group(patients: int, named: bool) -> None:
    women = np.arange(400) < patients
    labels, flags, _, _ = simulate(0.0, 0.0)
    flags[:, 0] = ~women
    found = measure(labels, flags, np.arange(400), split(women))
    assert (found.groups[0].beyond_chance, found.tested, found.highest is not None) == (named or None, named, named)
    assert found.groups[0].differences["underdiagnosis"].excludes_zero


def test_a_claim_does_not_rest_on_one_patient_with_most_images() -> None:
    for most, named in ((1, True), (100, False)):
        codes = np.repeat(np.arange(200), [most, *[1] * 199])
        women = codes < 40
        labels = np.tile(np.array([[1, 0, 0]], dtype=np.int8), (len(codes), 1))
        missed = np.where(women, codes % 10 < 8, codes % 10 < 3)
        flags = np.stack([~missed, 0 * codes, 0 * codes], axis=1).astype(np.int8)
        group = measure(labels, flags, codes, split(women)).groups[0]
        assert (group.differences["underdiagnosis"].excludes_zero, group.beyond_chance) == (True, named)


def test_without_operating_points_there_is_a_reason() -> None:
    labels = np.ones((4, 3), dtype=np.int8)
    images = LabelledScores.build(labels, np.zeros((4, 3)), -labels, np.arange(4), NAMES, np.ones(3, dtype=bool))
    assert measure_underdiagnosis([], images, np.ones(4)) == "no finding has an operating point"


def test_reasons_name_rates_in_words() -> None:
    """No woman has a finding, so there is no difference."""
    labels = np.zeros((6, 3), dtype=np.int8)
    labels[5, 0] = 1
    women = np.arange(6) < 3
    found = measure(labels, np.zeros_like(labels), np.array(list("abcdef")), split(women))
    reasons = {key: d.reason for group in found.groups for key, d in group.differences.items()}
    assert reasons["underdiagnosis_patients"] == "no underdiagnosis of patients in F"
