"""DeLong's variance against its definition and published numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ray_cxr.evaluation.delong import delong, delong_paired, normal_p

#: 113 patients after a brain haemorrhage by their WFNS grade, 1 to 5: good outcome, poor outcome (Turck et al. 2010).
WFNS = ((37, 20, 3, 8, 4), (2, 12, 1, 8, 18))
#: DeLong, DeLong & Clarke-Pearson (1988): 43 patients with ovarian cancer who have all three tests: albumin, total
#: protein and K-G score (lower is better). Patients without and with benefit (POPIND 0 and 1 in SAS's manual).
NO_BENEFIT = """3.0 5.8 10  2.8 4.8 6  0.9 4.0 5  2.5 5.7 8  3.6 6.7 4  4.2 7.6 4  4.0 6.6 6  3.0 4.7 8  3.3 6.8 6
    1.7 4.0 7  2.9 5.7 9  2.8 6.2 8"""
BENEFIT = """3.2 6.3 5  3.9 6.8 3  3.2 5.8 3  1.6 5.6 5  3.8 5.7 5  3.7 6.7 6  3.2 5.4 4  3.8 6.6 6  4.1 6.6 5
    3.6 5.7 5  4.3 7.0 4  2.3 4.4 6  3.5 5.8 6  3.8 6.8 7  4.5 7.4 5  3.7 7.4 5  3.1 6.6 6  4.1 8.2 6  4.3 7.0 5
    4.3 6.5 4  3.2 5.1 5  2.6 4.7 6  3.7 6.1 5  3.3 6.3 7  4.2 7.7 6  3.5 6.2 5  2.1 4.8 7  4.0 7.0 7  3.3 5.7 6
    3.7 6.9 5  3.6 6.6 5"""


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=40))
def test_delong_equals_its_definition(rows: list[tuple[int, int, int]]) -> None:
    y, a, b = (np.array(column) for column in zip(*rows, strict=True))
    assume(2 <= y.sum() <= len(y) - 2)
    v10, v01 = [], []
    for s in (a, b):
        x, z = s[y == 1][:, None], s[y == 0][None]
        wins = (x > z) + 0.5 * (x == z)
        v10.append(wins.mean(axis=1))
        v01.append(wins.mean(axis=0))
    areas = [part.mean() for part in v10]
    covariance = np.cov(v10) / len(v10[0]) + np.cov(v01) / len(v01[0])  # of the two areas
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert delong(y, a) == pytest.approx((areas[0], covariance[0, 0]), abs=1e-12)
    assert delong_paired(y, a, b) == pytest.approx((*areas, variance), abs=1e-12)


def test_delong_agrees_with_published_numbers() -> None:
    # The R package pROC (Robin et al. 2011): AUC in its documentation, variance in its tests.
    grades = np.concatenate([np.repeat(np.arange(1, 6), counts) for counts in WFNS])
    got = delong(np.repeat([0, 1], [72, 41]), grades)
    assert got == (pytest.approx(0.8236789, abs=5e-8), pytest.approx(0.00146991470882363, abs=1e-14))
    # Areas, their standard errors and the contrasts as printed in SAS/STAT's manual, PROC LOGISTIC.
    rows = np.array([*NO_BENEFIT.split(), *BENEFIT.split()], dtype=float).reshape(-1, 3)
    y = np.repeat([0, 1], [12, 31])
    tests = {"albumin": rows[:, 0], "protein": rows[:, 1], "K-G": 10 - rows[:, 2]}
    for name, area, error in (("albumin", 0.7366, 0.0927), ("protein", 0.6478, 0.1000), ("K-G", 0.7258, 0.1028)):
        auc, variance = delong(y, tests[name])
        assert (auc, math.sqrt(variance)) == pytest.approx((area, error), abs=5e-5)
    for name, difference, error, p in (("albumin", 0.0108, 0.0953, 0.9102), ("protein", -0.0780, 0.1046, 0.4561)):
        a, b, variance = delong_paired(y, tests[name], tests["K-G"])
        got = (a - b, math.sqrt(variance), normal_p(a - b, variance))
        assert got == pytest.approx((difference, error, p), abs=5e-5)
    assert normal_p(0.0, 0.0) is None
    for y in (np.array([1, 0, 0]), np.array([1, 1, 0])):  # each class needs two
        assert delong(y, np.arange(3)) is delong_paired(y, np.arange(3), np.zeros(3)) is None
