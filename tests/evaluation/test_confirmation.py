"""The sign-flip test against all sign changes, its interval, and verdicts from confirming pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backbone_comparison import build_paired, compare

from ray_cxr.evaluation import backbones
from ray_cxr.evaluation.confirmation import MAX_PAIRS, Confirmation, ConfirmedPair, sign_flip_test


@settings(max_examples=40)
@given(st.lists(st.integers(-3, 6), min_size=6, max_size=9))
def test_sign_flip_test_equals_enumeration(values: list[int]) -> None:
    got = sign_flip_test([value / 10 for value in values])
    totals = np.array(list(product((1, -1), repeat=len(values)))) @ np.array(values)
    assert got.p == pytest.approx(np.mean(np.abs(totals) >= abs(sum(values))))
    assert got.mean == pytest.approx(np.mean(values) / 10)
    assert (got.p < 0.05) == (got.low > 1e-9 or got.high < -1e-9)
    # The ends of the interval are the values of no difference at which the test stops rejecting.
    if len(set(values)) == 1:
        return
    inside = sign_flip_test([value / 10 - got.low - 1e-6 for value in values])
    outside = sign_flip_test([value / 10 - got.low + 1e-6 for value in values])
    assert inside.p >= 0.05 > outside.p


def test_sign_flip_test_of_known_values() -> None:
    """Darwin's 15 pairs of plants: 1,726 of 32,768 sign changes are as extreme (Fisher 1935, section 21)."""
    darwin = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    got = sign_flip_test(darwin)
    assert (got.p, got.mean) == (1726 / 32768, pytest.approx(314 / 15))
    six = sign_flip_test([0.01, 0.02, 0.03, 0.04, 0.05, 0.06])
    assert (six.p, six.low, six.high) == (2 / 64, 0.01, 0.06)
    few = sign_flip_test([0.1] * 5)
    assert (few.p, few.low, few.high, few.mean, bool(few.reason)) == (None, None, None, pytest.approx(0.1), True)
    assert sign_flip_test([]).mean is None
    with pytest.raises(ValueError, match="at most"):
        sign_flip_test([0.1] * (MAX_PAIRS + 1))


def confirm(*differences: float | None, names: tuple[str, str] = ("A", "B"), ended: bool = True) -> Confirmation:
    pairs = [
        ConfirmedPair(i, i, None if d is None else 0.7 + d, 0.7, ended or i > 0, "A: lost" if d is None else None)
        for i, d in enumerate(differences)
    ]
    return Confirmation.of(*names, pairs)


def test_verdict_of_confirming_pairs() -> None:
    lead = [0.010, 0.012, 0.014, 0.016, 0.018, 0.020]
    mixed = [0.010, -0.012, 0.014, -0.016, 0.018, -0.020]
    for confirmation, difference, answer, words in (
        (confirm(*lead), 0.02, "yes", "A is better than B"),
        (confirm(*[-d for d in lead]), -0.02, "yes", "B is better than A"),
        (confirm(*lead, names=("B", "A")), -0.02, "yes", "B is better than A"),
        (confirm(*lead, names=("B", "A")), 0.02, "disagree", "over seeds"),
        (confirm(*mixed), 0.02, "disagree", "Neither"),
        # A lead in all pairs that other patients could reverse: its interval over seeds and patients includes 0.
        (confirm(*[d - 0.009 for d in lead]), 0.02, "disagree", "with the noise between patients −0.005 to +0.017"),
        (confirm(*mixed), 0.0, "no", "not shown"),
        (confirm(*lead[:5], None), 0.02, "undecided", "5 complete pairs"),
        (confirm(*lead, ended=False), 0.02, "undecided", "5 of 6 pairs"),
    ):
        # The trials of the search, where A leads by far, do not count.
        got = backbones.judge_backbones(compare(0.05), build_paired(difference, 0.01), confirmation)
        assert got.answer == answer, got
        assert words in f"{got.headline} {got.details}"
    got = backbones.judge_backbones(compare(0.05), build_paired(-0.02, 0.01), confirm(*lead, names=("B", "A")))
    assert "−0.015 macro AUROC on average (95% interval −0.020 to −0.010, sign-flip p = 0.031; with" in got.details
    record = backbones.comparison_record(compare(), build_paired(0.02, 0.01), confirm(*lead, None))
    assert record["confirmation"]["pairs"][6]["reason"] == "A: lost"
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_only_trials_with_random_settings_are_permuted() -> None:
    curves = [
        backbones.TrialCurve(number, "AB"[number % 2], "finished", ((1, 0.7 + number / 100),), number < 8)
        for number in range(20)
    ]
    compared = backbones.compare_backbones(curves, grace=1)
    b, a = compared.backbones
    assert (len(a.values), a.independent) == (10, pytest.approx((0.70, 0.72, 0.74, 0.76)))
    assert compared.test == backbones.permutation_test(b.independent, a.independent)
    few = [replace(curve, is_random=curve.number < 2) for curve in curves]
    got = backbones.judge_backbones(backbones.compare_backbones(few, grace=1), build_paired(0.02, 0.01))
    assert got.answer == "undecided"
    assert "--confirm" in got.headline
