"""The bootstrap against a plain loop over the rows of each resample."""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan, nan
from typing import Any

import numpy as np
import pytest

from ray_cxr.evaluation import bootstrap, intervals, metrics
from ray_cxr.evaluation.bootstrap import BootstrapFindings, DerivedOutputs


def simulate_images(patients: int, per_patient: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels and scores [n,2], correlated within patients, and patients."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(patients), per_patient)
    y = (rng.random((patients, 2)) < 0.4)[codes].astype(np.int8)
    s = y + rng.normal(size=(patients, 2))[codes] + 0.5 * rng.normal(size=(len(codes), 2))
    return y, s, codes


def bootstrap_findings(y: np.ndarray, s: np.ndarray, patients: np.ndarray, **options: Any) -> BootstrapFindings:
    """Compute intervals; derived outputs may be among the options, and are missing by default."""
    outputs = {"flags": np.full(y.shape, -1), "calibrated": np.full(y.shape, np.nan)}
    outputs["assumed_prevalence"] = np.full(y.shape[1], np.nan)
    derived = DerivedOutputs(**{name: options.pop(name, missing) for name, missing in outputs.items()})
    return bootstrap.bootstrap_findings(y, s, patients, derived, **{"macro": np.ones(y.shape[1], bool), **options})


def limits(interval: intervals.Interval) -> tuple[float | None, float | None]:
    return interval.low, interval.high


def percentiles(values: list[float]) -> object:
    return pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), abs=1e-12)


def draw_resamples(patients: np.ndarray, n_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the rows of each resample, a patient's once per draw."""
    rng = np.random.default_rng(seed)
    known = list(dict.fromkeys(patients.tolist()))
    rows = {patient: np.flatnonzero(patients == patient) for patient in known}
    for _ in range(n_resamples):
        yield np.concatenate([rows[known[i]] for i in rng.integers(0, len(known), len(known))])


def compute_metrics(y: np.ndarray, s: np.ndarray, flags: np.ndarray, p: np.ndarray, prevalence: float) -> dict:
    scored, judged, calibrated = (y >= 0) & ~np.isnan(s), (y >= 0) & (flags >= 0), (y >= 0) & ~np.isnan(p)
    cells = metrics.confusion(y[judged], flags[judged] == 1)
    expected = None if isnan(prevalence) else cells.expect_at(prevalence)
    ppv, npv = (expected.ppv, expected.npv) if expected else (None, None)
    return {
        "auroc": metrics.auroc(y[scored], s[scored]),
        "average_precision": metrics.average_precision(y[scored], s[scored]),
        **{name: getattr(cells, name) for name in ("sensitivity", "specificity", "ppv", "npv", "f1", "flag_rate")},
        "ppv_at_prevalence": ppv,
        "npv_at_prevalence": npv,
        "brier": metrics.brier(y[calibrated], p[calibrated]),
    }


def interpolate_sensitivity(curve: metrics.Curve, rate: float) -> float:
    """Interpolate the ROC curve linearly; at a vertical step return its upper end."""
    at = curve.x <= rate + 1e-12
    left, low = curve.x[at][-1], curve.y[at][-1]
    if at.all():
        return float(low)
    right, high = curve.x[~at][0], curve.y[~at][0]
    return float(low + (high - low) * (rate - left) / (right - left))


@pytest.mark.parametrize(
    ("seed", "rows", "positives", "prevalence"),
    [(0, 40, 0.4, 0.02), (1, 40, 0.1, 0), (2, 12, 0.5, 1), (3, 25, 0.9, 0.5), (4, 40, 0, 0.5), (5, 40, 0.4, nan)],
)
def test_intervals_equal_percentiles_over_resamples(seed: int, rows: int, positives: float, prevalence: float) -> None:
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, max(5, rows // 3), rows)
    y = np.where(rng.random(rows) < 0.1, -1, rng.random(rows) < positives)
    s = np.where(rng.random(rows) < 0.1, np.nan, rng.integers(0, 6, rows) + y)
    flags = np.where(rng.random(rows) < 0.1, -1, s > 2)
    # Multiples of 1/8 and their squares add up exactly in any order.
    p = rng.choice([np.nan, 0.0, 0.125, 0.375, 0.5, 0.875, 1.0], rows)
    if isnan(prevalence):  # a model without calibration and operating point
        flags[:], p[:] = -1, np.nan
    derived = {"flags": flags[:, None], "calibrated": p[:, None], "assumed_prevalence": np.array([prevalence])}
    got = bootstrap_findings(y[:, None], s[:, None], patients, **derived, n_resamples=50, seed=3)
    drawn = [[part[kept] for part in (y, s, flags, p)] for kept in draw_resamples(patients, 50, seed=3)]
    expected = [compute_metrics(*parts, prevalence) for parts in drawn]
    assert list(got.findings[0]) == [metric.key for metric in metrics.METRICS]
    # Resamples of a mean of absolute values lie above it: such a metric has no interval.
    errors = [got.findings[0].pop(metric.key) for metric in metrics.METRICS if metric.key not in expected[0]]
    assert [(limits(error), bool(error.reason)) for error in errors] == [((None, None), True)] * 2
    for name, interval in got.findings[0].items():
        values = [each[name] for each in expected if each[name] is not None]
        assert interval.undefined == 50 - len(values), name
        known = len(values) >= 40 and np.ptp(values) > 1e-12
        assert limits(interval) == (percentiles(values) if known else (None, None)), name
        assert (interval.reason is None) == known, name
    rates, curves = np.arange(101) / 100, []
    for label, score, *_ in drawn:
        scored = (label >= 0) & ~np.isnan(score)
        curve = metrics.roc_curve(label[scored], score[scored])
        if curve is not None:
            curves.append([interpolate_sensitivity(curve, rate) for rate in rates])
    band = got.roc[0]
    assert (band is None) == (len(curves) < 40)
    if band is not None:
        expected = (rates, *np.percentile(curves, [2.5, 97.5], axis=0))
        np.testing.assert_allclose((band.false_positive_rate, band.low, band.high), expected, atol=1e-12)


def test_means_cover_the_counted_findings() -> None:
    y, s, patients = simulate_images(30, 2, seed=2)
    y, s = np.hstack([y, 1 - y, np.zeros_like(y[:, :1])]), np.hstack([s, -(s**3), s[:, :1]])
    y[:7, 1] = -1
    chosen, counted = np.array([True, True, False, True, True]), [0, 1, 3]  # the last column has no positives
    got = bootstrap_findings(y, s, patients, macro=chosen, n_resamples=60, seed=4)
    weights = np.sum(y[:, counted] == 1, axis=0)
    plain, weighted = [], []
    for kept in draw_resamples(patients, 60, seed=4):
        known = [(f, kept[y[kept, f] >= 0]) for f in counted]
        values = [metrics.average_precision(y[rows, f], s[rows, f]) for f, rows in known]
        plain.append(np.mean(values))
        weighted.append(np.sum(values * weights) / weights.sum())
    assert limits(got.macro["average_precision"]) == percentiles(plain)
    assert limits(got.weighted["average_precision"]) == percentiles(weighted)
    # `resampled_aurocs` draws the same resamples.
    drawn = bootstrap.resampled_aurocs(y, s, patients, n_resamples=60, seed=4)
    assert drawn.defined.tolist() == [True] * 4 + [False]
    assert got.macro["auroc"] == intervals.percentile_interval(drawn.values[:, counted].mean(axis=1))
    for f in range(4):
        assert got.findings[f]["auroc"] == intervals.percentile_interval(drawn.values[:, f])
    assert (limits(got.findings[4]["auroc"]), got.findings[4]["auroc"].undefined) == ((None, None), 60)
    none = bootstrap_findings(y, s, patients, macro=np.zeros(5, bool), n_resamples=60)
    for mean in (none.macro["auroc"], none.weighted["auroc"]):
        assert (limits(mean), bool(mean.reason)) == ((None, None), True)
    # A mean omits resamples that lack a finding: a single positive patient is absent from about 1/e of them.
    y = np.zeros((50, 2), dtype=np.int8)
    y[0, 0] = y[::2, 1] = 1
    s = np.random.default_rng(0).random((50, 2))
    got = bootstrap_findings(y, s, np.arange(50), n_resamples=200)
    lost = sum(0 not in rows for rows in draw_resamples(np.arange(50), 200, seed=0))
    assert [finding["auroc"].undefined for finding in got.findings] == [lost, 0]
    assert {mean.undefined for mean in (*got.macro.values(), *got.weighted.values())} == {lost}


def test_results_depend_on_seed_but_not_on_chunks_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    y, s, patients = simulate_images(40, 3, seed=0)
    y[:, 1], s[:, 1] = y[:, 0], s[:, 0]

    def measured(seed: int = 0) -> tuple[object, ...]:
        flags = (s > 0).astype(np.int8)
        got = bootstrap_findings(y, s, patients, flags=flags, n_resamples=150, seed=seed)
        assert got.findings[0] == got.findings[1]  # findings share their resamples
        bands = [(band.low.tolist(), band.high.tolist()) for band in got.roc]
        auroc = bootstrap.resampled_aurocs(y, s, patients, n_resamples=150, seed=seed)
        return got.findings, got.macro, got.weighted, bands, auroc.values.tolist()

    whole = measured()
    assert measured() == whole != measured(seed=1)
    monkeypatch.setattr(bootstrap, "THREADS", 1)
    assert measured() == whole
    monkeypatch.setattr(bootstrap, "_CELLS", 500)
    assert measured() == whole


def test_bad_input_is_refused() -> None:
    table = {"labels": np.array([[0], [1], [0], [1]]), "scores": np.zeros((4, 1)), "patients": np.arange(4)}
    for given, part in (
        ({"flags": np.zeros((4, 2), np.int8)}, "flags"),
        ({"calibrated": np.zeros((3, 1))}, "calibrated"),
        ({"calibrated": np.full((4, 1), 1.5)}, "0..1"),
        ({"assumed_prevalence": np.array([1.5])}, "0..1"),
        ({"assumed_prevalence": np.array([0.5, 0.5])}, "assumed_prevalence"),
        ({"macro": np.array([True, True])}, "macro"),
        ({"scores": np.zeros((4, 2))}, "do not fit"),
        ({"patients": np.arange(3)}, "do not fit"),
    ):
        arrays = [given.pop(name, array) for name, array in table.items()]
        with pytest.raises(ValueError, match=part):
            bootstrap_findings(*arrays, **given)


def test_intervals_of_ratios() -> None:
    y, _, patients = simulate_images(30, 3, seed=4)
    flags = np.random.default_rng(0).random(y.shape) < 0.5
    got = bootstrap.bootstrap_ratios((y == 1) & flags, y == 1, patients, n_resamples=140, seed=1)
    for f in (0, 1):
        values = [flags[rows, f][y[rows, f] == 1].mean() for rows in draw_resamples(patients, 140, seed=1)]
        assert limits(got[f]) == percentiles(values)


def test_counts_of_cells_equal_those_of_drawn_rows() -> None:
    patients = np.array([5, 5, 7, 9, 9, 9])
    codes, cells = intervals.patient_codes(patients)[0], np.array([0, 2, 2, 1, 1, 0])
    expected = [np.bincount(cells[rows], minlength=4) for rows in draw_resamples(patients, 30, seed=1)]
    counts = bootstrap.resample_counts(cells, codes, (4, 3), n_resamples=30, seed=1)
    np.testing.assert_array_equal(counts, expected)
