"""Intervals from percentiles and Wilson's formula; patients as numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ray_cxr.evaluation.intervals import Interval, Patients, patient_codes, percentile_interval, wilson_interval


def test_interval_needs_enough_values_that_differ() -> None:
    values = np.r_[np.arange(40.0), np.nan]
    assert percentile_interval(values) == Interval(pytest.approx(0.975), pytest.approx(38.025), 1)
    few = percentile_interval(values[1:])
    assert ((few.low, few.high), few.undefined, bool(few.reason)) == ((None, None), 1, True)
    same = percentile_interval(np.ones(50))
    assert ((same.low, same.high), bool(same.reason)) == ((None, None), True)
    assert percentile_interval(np.ones(50), allow_constant=True) == Interval(1.0, 1.0, 0)


def test_wilson_interval_equals_scipy() -> None:
    for count in (0, 7, 20):
        expected = stats.binomtest(count, 20).proportion_ci(method="wilson")
        assert wilson_interval(count / 20, 20) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_unknown_patients_count_separately() -> None:
    codes, k = patient_codes(np.array(["a", None, "a", float("nan"), None, "b"], dtype=object))
    assert (codes.tolist(), k) == ([0, 1, 0, 2, 3, 4], 5)


def test_unknown_patients_are_units_but_no_known_patients() -> None:
    patients = Patients.of(np.array(["a", None, "a", float("nan"), "b"], dtype=object))
    assert (patients.units, patients.number) == (4, 2)
    some = patients[np.array([False, True, False, True, False])]
    assert (some.units, some.number) == (2, None)
    assert (Patients.of(np.array([])).units, Patients.of(np.array([])).number) == (0, 0)
