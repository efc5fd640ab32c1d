"""The paired bootstrap against a plain loop, and DeLong's test per finding."""

from __future__ import annotations

import numpy as np
import pytest

from ray_cxr.evaluation import metrics, paired
from ray_cxr.evaluation.delong import delong_paired, normal_p


def simulate_models(patients: int, seed: int, better: float = 0.0) -> tuple[np.ndarray, ...]:
    """Return labels [n,2], scores of two models with correlated errors (`better` improves the first), and patients."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(patients), 3)
    y = (rng.random((patients, 2)) < 0.4)[codes].astype(np.int8)
    shared = rng.normal(size=(patients, 2))[codes]
    a, b = (
        (1.0 + lift) * y + shared + 0.7 * rng.normal(size=(patients, 2))[codes] + 0.3 * rng.normal(size=y.shape)
        for lift in (better, 0.0)
    )
    return y, a, b, codes


def macro_auroc(y: np.ndarray, s: np.ndarray) -> float:
    """Average AUROC over columns; raise TypeError if a column lacks a class."""
    return sum(metrics.auroc(y[y[:, f] >= 0, f], s[y[:, f] >= 0, f]) for f in range(y.shape[1])) / y.shape[1]


@pytest.mark.parametrize("seed", range(3))
def test_paired_bootstrap_equals_a_plain_loop(seed: int) -> None:
    y, a, b, patients = simulate_models(12, seed, better=0.4)
    rng = np.random.default_rng(seed)
    y[rng.random(y.shape) < 0.3] = -1
    known = y.copy()
    known[4, 0] = known[9, 1] = -1  # a label counts only with both scores
    expected = []
    draws = np.random.default_rng(seed)
    for _ in range(100):
        rows = np.concatenate([np.flatnonzero(patients == patient) for patient in draws.integers(0, 12, 12)])
        if all(len(set(known[rows, f].tolist()) - {-1}) == 2 for f in (0, 1)):
            expected.append(macro_auroc(known[rows], a[rows]) - macro_auroc(known[rows], b[rows]))
    whole = macro_auroc(known, a), macro_auroc(known, b)
    a[4, 0] = b[9, 1] = np.nan
    none = np.zeros((len(y), 1), dtype=np.int8)  # a finding without positives does not count
    y, a, b = np.hstack([y, none]), np.hstack([a, none]), np.hstack([b, none])
    got = paired.paired_macro_auroc(y, a, b, patients, n_resamples=100, seed=seed)
    assert (got.a, got.b, got.difference) == pytest.approx((*whole, whole[0] - whole[1]), abs=1e-12)
    assert (got.low, got.high) == pytest.approx(tuple(np.percentile(expected, [2.5, 97.5])), abs=1e-12)
    tail = min(sum(d <= 0 for d in expected), sum(d >= 0 for d in expected))
    assert got.p == pytest.approx(min(1.0, 2 * (tail + 1) / (len(expected) + 1)), abs=1e-12)
    assert (got.columns, got.undefined, got.n_patients, got.reason) == ((0, 1), 100 - len(expected), 12, None)


def test_each_finding_equals_a_separate_comparison() -> None:
    y, a, b, patients = simulate_models(40, 3, better=0.5)
    y, a, b = (np.hstack([table, table[:, :1] * 0, table[:, 1:]]) for table in (y, a, b))
    a[4, 1] = b[9, 1] = np.nan
    options = {"n_resamples": 60, "seed": 2}
    got = paired.paired_findings(y, a, b, patients, macro=np.array([True, True, True, False]), **options)
    assert got.macro == paired.paired_macro_auroc(y[:, :2], a[:, :2], b[:, :2], patients, **options)
    for f in (0, 1, 3):
        part = slice(f, f + 1)
        alone = paired.paired_macro_auroc(y[:, part], a[:, part], b[:, part], patients, **options)
        finding = got.findings[f]
        names = ("a", "b", "difference", "low", "high", "p", "undefined", "reason")
        assert [getattr(finding, name) for name in names] == [getattr(alone, name) for name in names]
        kept = ~np.isnan(a[:, f]) & ~np.isnan(b[:, f])
        assert (finding.n, finding.positives) == (kept.sum(), y[kept, f].sum())
        first, second, variance = delong_paired(y[kept, f], a[kept, f], b[kept, f])
        assert finding.delong_p == pytest.approx(normal_p(first - second, variance), rel=1e-9)
    absent = got.findings[2]
    assert (absent.a, absent.b, absent.difference, absent.low, absent.p, absent.delong_p) == (None,) * 6
    assert (absent.undefined, absent.reason, absent.delong_reason) == (60, "no positive images", "no positive images")


def test_undefined_comparisons_have_a_reason() -> None:
    y, a, b, patients = simulate_models(40, 0)
    macro = np.ones(2, dtype=bool)
    same = paired.paired_findings(y, a, a, patients, macro=macro, n_resamples=50)
    for result in (same.macro, same.findings[0]):
        assert (result.difference, result.low, result.high, result.p, result.reason) == (0.0, 0.0, 0.0, 1.0, None)
    assert same.findings[0].delong_p is None
    assert "no variance" in same.findings[0].delong_reason
    for n, defined in ((39, False), (40, True)):
        few = paired.paired_findings(y, a, b, patients, macro=macro, n_resamples=n)
        for result in (few.macro, few.findings[0]):
            assert result.difference is not None
            assert [value is not None for value in (result.low, result.high, result.p)] == [defined] * 3
            assert (result.reason is None) == defined
    nothing = paired.paired_macro_auroc(np.zeros_like(y), a, b, patients, n_resamples=50)
    assert (nothing.a, nothing.b, nothing.difference, nothing.low, nothing.p, nothing.columns) == (*(None,) * 5, ())
    assert "positive and negative" in nothing.reason
    y[:, 0] = 0
    y[0, 0] = 1
    single = paired.paired_findings(y, a, b, patients, macro=macro, n_resamples=50).findings[0]
    assert (single.delong_p, "fewer than two" in single.delong_reason) == (None, True)
    for scores, people in ((a[:, :1], patients), (a, patients[1:])):
        with pytest.raises(ValueError, match="do not fit"):
            paired.paired_macro_auroc(y, scores, b, people)
