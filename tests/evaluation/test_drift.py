"""Drift without labels: unchanged data are ok, changes are found, untestable comparisons are unknown."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ray_cxr.evaluation import drift

NAMES = ("A", "B")
MODEL = {
    "expected_flag_rates": {"A": 0.2, "B": 0.1},
    "operating_points": {"A": {"threshold": 0.5, "n": 4000}, "B": {"threshold": 0.5, "n": 4000}},
    "quality": {
        "expected_rates": {"inverted": 0.0, "lateral": 0.01, "not_frontal_chest": 0.01, "out_of_distribution": 0.01},
        "held_out_images": 1000,
    },
}


def draw_clustered(rng: np.random.Generator, share: float, patients: int, each: int) -> np.ndarray:
    """Draw bool [patients * each] with this expected share; for half of the patients all images agree."""
    common = rng.random(patients) < share
    own = rng.random((patients, each)) < share
    return np.where((rng.random(patients) < 0.5)[:, None], common[:, None], own).ravel()


def build_flags(n: int, *counts: int) -> np.ndarray:
    """Return flags [n,F]; the first `counts[j]` images have finding j."""
    return np.column_stack([np.arange(n) < count for count in counts])


def measure(flags: np.ndarray, codes: np.ndarray, model: dict = MODEL, **more: object) -> drift.Drift:
    n = len(codes)
    given = {"scores": np.full((n, 2), np.nan), "quality_flags": np.full(n, None, object), "ok": np.ones(n, bool)}
    expected = drift.Expected.from_model(model)
    return drift.measure_drift(expected, NAMES, flags.astype(np.int8), patients=codes, **given | more)


def test_clustered_images_are_no_drift() -> None:
    """At most 5% of unchanged sets may differ; without clustering three times as many would."""
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(150), 6)
    wrong = naive = covered = 0
    for _ in range(100):
        flags = np.column_stack([draw_clustered(rng, rate, 150, 6) for rate in (0.2, 0.1)])
        rates = {name: float(draw_clustered(rng, rate, 700, 6).mean()) for name, rate in (("A", 0.2), ("B", 0.1))}
        model = {"expected_flag_rates": rates, "operating_points": {name: {"n": 4200} for name in NAMES}}
        found = measure(flags, codes, model).flags
        wrong += any(row.verdict != "ok" for row in found)
        covered += found[0].low <= 0.2 <= found[0].high
        naive += any(row.verdict != "ok" for row in measure(flags, np.arange(900), model).flags)
    assert wrong <= 10
    assert naive >= 15
    assert 89 <= covered <= 99


def test_verdicts_of_rates() -> None:
    n = 2000
    shares = (("ok", (0.2,)), ("differs", (0.1, 0.3, 0.4)), ("large", (0.0, 0.09, 0.41)))
    for share, verdict in ((share, verdict) for verdict, group in shares for share in group):
        row, other = measure(build_flags(n, round(share * n), 200), np.arange(n)).flags
        assert (row.observed, row.count, row.n, row.n_patients) == (share, round(share * n), n, n)
        assert (row.expected, row.expected_images) == (0.2, 4000)
        assert row.ratio == pytest.approx(share / 0.2)
        assert (row.verdict, other.verdict) == (verdict, "ok")
    # Too few images or patients
    for n, patients, verdict in ((49, 49, "unknown"), (50, 50, "large"), (400, 19, "unknown"), (400, 20, "large")):
        row = measure(np.ones((n, 2)), np.arange(n) % patients).flags[0]
        assert row.verdict == verdict
        assert ("images" if n < 50 else "patients") in row.reason if verdict == "unknown" else row.reason is None
        assert (row.p is None) == (verdict == "unknown")


def test_p_and_interval_by_formula() -> None:
    n = 1000
    for images in (4000, None):
        model = {**MODEL, "operating_points": {"A": {"n": images}}, "expected_flag_rates": {"A": 0.2}}
        row = measure(build_flags(n, 230, 0), np.arange(n), model).flags[0]
        pooled = (230 + images * 0.2) / (n + images) if images else 0.2
        variance = pooled * (1 - pooled) * (1 / n + (1 / images if images else 0.0)) * row.design_effect
        gap = 0.03 - 0.5 * row.design_effect / n
        assert row.p == row.p_adjusted == pytest.approx(2 * stats.norm.sf(gap / math.sqrt(variance)), rel=1e-9)
    assert row.design_effect == pytest.approx(n / (n - 1))
    # A second copy of each image adds no information.
    twice = measure(np.repeat(build_flags(n, 230, 0), 2, axis=0), np.repeat(np.arange(n), 2), model).flags[0]
    assert (twice.p, twice.low, twice.high) == pytest.approx((row.p, row.low, row.high), rel=1e-6)


def test_missing_expectations_are_unknown() -> None:
    flags = np.column_stack([np.full(100, -1), np.zeros(100)])
    row, other = measure(flags, np.arange(100), {**MODEL, "expected_flag_rates": {"A": None, "B": 0.1}}).flags
    assert (row.verdict, row.observed, row.n) == ("unknown", None, 0)
    assert "operating point" in row.reason
    assert other.p_adjusted == other.p  # untested findings do not count for the adjustment
    # An expected share of 0 is not testable without its number of images.
    model = {**MODEL, "operating_points": {}, "expected_flag_rates": {"A": 0.0, "B": 0.0}}
    row, other = measure(build_flags(100, 9, 0), np.arange(100), model).flags
    assert (row.verdict, other.verdict, bool(row.reason)) == ("unknown", "ok", True)
    nothing = measure(np.zeros((100, 2)), np.arange(100), {})
    for row in (*nothing.flags, *nothing.scores, *nothing.quality):
        assert row.verdict == "unknown"
        assert row.reason
    json.dumps(nothing.to_json(), allow_nan=False)


def test_quality_flags_and_errors() -> None:
    n = 1000
    given = np.full(n, None, dtype=object)
    given[:300], given[300:308], given[310:320] = "inverted", "lateral", "age_outside_training"
    ok = np.arange(n) < 950
    flags = np.where(ok[:, None], build_flags(n, 200, 100), -1)
    found = measure(flags, np.arange(n), quality_flags=given, ok=ok)
    rows = {row.name: row for row in found.quality}
    assert (rows["inverted"].verdict, rows["inverted"].observed, rows["inverted"].ratio) == ("large", 300 / 950, None)
    assert rows["lateral"].verdict == "ok"
    assert (rows["age_outside_training"].verdict, rows["age_outside_training"].count) == ("unknown", 10)
    assert (found.errors.observed, found.errors.n, found.errors.verdict) == (0.05, 1000, "unknown")
    assert "large difference for inverted, " in found.summary
    row = measure(flags, np.arange(n), {**MODEL, "quality": {"lacking": "only 12 images"}}).quality[0]
    assert (row.verdict, row.reason) == ("unknown", "only 12 images")


def test_baseline_is_that_of_the_last_fit() -> None:
    kept = drift.score_quantiles(np.linspace(0, 1, 100))
    training = {**MODEL, "provenance": {"score_quantiles": {"A": None}}}
    site = {"images": 1200, "created": "2026-03-04T05:06:07+00:00", "score_quantiles": {"A": kept}}
    name = "1,200 images of the recalibration of 2026-03-04"
    for changes, scores, rates, images, baselines in (
        (None, None, MODEL["quality"]["expected_rates"], 1000, ["validation images of training"] * 3),
        ({"quality_rates": {"lateral": 0.5}}, kept, {"lateral": 0.5}, 1200, [name] * 3),
        ({}, None, MODEL["quality"]["expected_rates"], 1000, [name, *["validation images of training"] * 2]),
    ):
        extra = {} if changes is None else {"recalibrated": {**site, **changes}}
        model = {**training, "provenance": {**training["provenance"], **extra}}
        expected = drift.Expected.from_model(model)
        assert expected.score_quantiles["A"] == scores
        assert (expected.quality_rates, expected.quality_images) == (rates, images)
        plain = measure(np.zeros((100, 2)), np.arange(100), model).to_json()
        assert list(plain["baselines"].values()) == baselines
        assert plain["mixed_baselines"] == (len(set(baselines)) > 1)


def compare_scores(kept: np.ndarray, scores: np.ndarray, codes: np.ndarray) -> drift.ScoreDrift:
    model = {**MODEL, "provenance": {"score_quantiles": {"A": drift.score_quantiles(kept), "B": None}}}
    found = measure(np.zeros((len(codes), 2)), codes, model, scores=np.column_stack([scores, scores]))
    assert found.scores[1].verdict == "unknown"
    return found.scores[0]


def test_verdicts_of_scores() -> None:
    kept = drift.score_quantiles(np.array([*np.linspace(0, 1, 200), np.nan]))
    assert kept["edges"] == pytest.approx([k / 10 for k in range(1, 10)])
    assert (kept["n"], kept["shares"]) == (200, pytest.approx([0.1] * 10))
    assert drift.score_quantiles(np.linspace(0, 1, 49)) is None
    assert drift.score_quantiles(np.linspace(0, 1, 50))["n"] == 50
    rng = np.random.default_rng(2)
    codes = np.arange(2000)
    kept = rng.beta(2, 5, 3000).astype(np.float32)
    same = compare_scores(kept, rng.beta(2, 5, 2000).astype(np.float32), codes)
    assert (same.verdict, same.psi < 0.02) == ("ok", True)
    assert compare_scores(kept, rng.beta(2.6, 4.8, 2000), codes).verdict == "differs"
    scores = rng.beta(4, 3, 2000)
    far = compare_scores(kept, scores, codes)
    assert far.verdict == "large"
    edges = [0.0, *drift.score_quantiles(kept)["edges"], 1.0]
    shares = (np.histogram(scores, edges)[0] + 0.5) / 2005
    expected = (np.histogram(kept, edges)[0] + 0.5) / 3005
    assert (far.shares, far.expected) == (pytest.approx(shares), pytest.approx(expected))
    assert far.psi == pytest.approx(np.sum((shares - expected) * np.log(shares / expected)))
    constant = compare_scores(np.full(100, 0.5), np.full(200, 0.5), np.arange(200))
    assert (constant.psi, constant.verdict) == (0.0, "ok")
    assert compare_scores(np.full(100, 0.5), np.full(200, 0.4), np.arange(200)).verdict == "large"
    tied = np.repeat([0.1, 0.2, 0.9], [120, 60, 20])
    row, kept = compare_scores(tied, tied, np.arange(200)), drift.score_quantiles(tied)
    counts = 200 * np.array([share for share in kept["shares"] if share])
    assert (row.psi, row.expected) == (pytest.approx(0.0), pytest.approx((counts + 0.5) / (counts + 0.5).sum()))
    assert same.p == pytest.approx(stats.chi2.sf(same.psi / ((1 / 2000 + 1 / 3000) * 2000 / 1999), 9), rel=1e-3)


def test_a_large_index_by_chance_is_ok() -> None:
    """Sixty images make an index above 0.25 by chance alone where three at a time are of one patient."""
    rng = np.random.default_rng(3)
    kept, codes = rng.random(4000), np.repeat(np.arange(20), 3)
    found = [compare_scores(kept, rng.random(20)[codes] * 0.98 + rng.random(60) * 0.02, codes) for _ in range(60)]
    assert sum(row.psi > 0.25 for row in found) > 30
    assert sum(row.verdict == "ok" for row in found) > 54


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_stepwise_bonferroni(p: list[float]) -> None:
    steps = [min(1.0, (len(p) - i) * value) for i, value in enumerate(sorted(p))]
    expected = {value: max(steps[: i + 1]) for i, value in enumerate(sorted(p))}
    assert drift.holm(p) == pytest.approx([expected[value] for value in p])


def test_design_effect() -> None:
    values = np.random.default_rng(4).random(2000) < 0.3
    assert drift.design_effect(values, np.arange(2000)) == pytest.approx(2000 / 1999)
    copies = drift.design_effect(np.repeat(values, 4), np.repeat(np.arange(2000), 4))
    assert copies == pytest.approx(4 * 2000 / 1999)
    # Nothing varies, or one patient only: all images of a patient count as one.
    assert drift.design_effect(np.zeros(12), np.arange(12) // 4) == 4.0
    assert drift.design_effect(np.arange(4) % 2, np.zeros(4, int)) == 4.0
    assert drift.design_effect(np.tile([0, 1], 50), np.arange(100) // 2) == 1.0  # never below 1


def test_result_is_json_and_bad_input_is_refused() -> None:
    plain = json.loads(json.dumps(measure(np.zeros((100, 2)), np.arange(100)).to_json(), allow_nan=False))
    assert set(plain["flags"]) == set(NAMES)
    assert (plain["flags"]["A"]["verdict"], plain["clustered"]) == ("large", False)
    assert measure(np.zeros((100, 2)), np.arange(100) // 2).clustered
    for columns, ok in ((3, np.ones(100, bool)), (2, np.ones(99, bool))):
        with pytest.raises(ValueError, match="do not fit"):
            measure(np.zeros((100, columns)), np.arange(100), ok=ok)
