"""Drift without labels: changes are found, ok is supported by its interval, untestable comparisons are unknown."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import optimize, stats

from ray_cxr.evaluation import drift

NAMES = ("A", "B")
DIFFERENT = ("differs", "large")
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
        wrong += any(row.verdict in DIFFERENT for row in found)
        covered += found[0].low <= 0.2 <= found[0].high
        naive += any(row.verdict in DIFFERENT for row in measure(flags, np.arange(900), model).flags)
    assert wrong <= 10
    assert naive >= 15
    assert 89 <= covered <= 99


def judge_same(
    rng: np.random.Generator, n: int, images: int, shares: tuple[float, ...], true: tuple[float, ...]
) -> list:
    """Return the verdicts of n images with the true shares, against a baseline with other shares."""
    names = [f"finding {j}" for j in range(len(shares))]
    expected = dict(zip(names, (rng.binomial(images, shares) / images).tolist(), strict=True))
    model = {"expected_flag_rates": expected, "operating_points": {name: {"n": images} for name in names}}
    flags = (rng.random((n, len(shares))) < true).astype(np.int8)
    nothing = np.full(n, None, object)
    found = drift.measure_drift(
        drift.Expected.from_model(model),
        names,
        flags,
        np.full(flags.shape, np.nan),
        nothing,
        nothing == nothing,
        nothing,
    ).flags
    for row in found:
        if row.p is not None:  # p and interval agree
            excludes_zero = row.difference_low > 0 or row.difference_high < 0
            assert (row.p_adjusted < drift.LEVEL) == excludes_zero
            assert (row.verdict in DIFFERENT) <= excludes_zero
            within = max(-row.difference_low, row.difference_high) <= row.tolerance
            assert (row.verdict == "ok") == within
    return [row.verdict for row in found]


def test_ok_needs_enough_images() -> None:
    rng = np.random.default_rng(5)
    shares = (0.01, 0.05, 0.1, 0.2, 0.3, 0.9)
    assert set(judge_same(rng, 20, 20_000, shares, shares)) == {"unknown"}
    few = [verdict for _ in range(10) for verdict in judge_same(rng, 100, 100, shares, shares)]
    assert "ok" not in few
    assert few.count("inconclusive") >= 57
    many = [verdict for _ in range(4) for verdict in judge_same(rng, 20_000, 20_000, shares, shares)]
    assert many.count("ok") >= 22


@pytest.mark.parametrize(("share", "true"), [(0.1, 0.125), (0.3, 0.375), (0.9, 0.875), (0.02, 0.03)])
def test_ok_is_rare_at_the_edge_of_the_tolerated_range(share: float, true: float) -> None:
    rng = np.random.default_rng(6)
    found = [judge_same(rng, 1500, 6000, (share,), (true,))[0] for _ in range(80)]
    assert found.count("ok") <= 9


@pytest.mark.parametrize(("patients", "each", "correlation"), [(1000, 1, 0.0), (500, 5, 0.7), (500, 5, 0.9)])
def test_ok_scores_are_rare_where_the_true_index_is_at_the_limit(patients: int, each: int, correlation: float) -> None:
    rng = np.random.default_rng(9)
    tilt = np.linspace(-1, 1, 10)

    def index(slope: float) -> float:
        return float(np.sum(slope * tilt * np.log1p(10 * slope * tilt)))

    def draw(patients: int) -> np.ndarray:
        common, own = rng.normal(size=(patients, 1)), rng.normal(size=(patients, each))
        return stats.norm.cdf(np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own).ravel()

    shifted = 0.1 + optimize.brentq(lambda slope: index(slope) - drift.PSI_DIFFERS, 0, 0.09) * tilt
    ends = np.concatenate([[0], np.cumsum(shifted)])
    codes = np.repeat(np.arange(patients), each)
    wrong = right = 0
    for _ in range(60):
        kept, scores = draw(patients + 500), draw(patients)
        wrong += compare_scores(kept, np.interp(scores, ends, np.linspace(0, 1, 11)), codes).verdict == "ok"
        right += compare_scores(kept, scores, codes).verdict == "ok"
    assert wrong <= 5
    assert right >= 57
    few = slice(0, 60)
    small = compare_scores(kept, scores[few], codes[few])
    assert small.verdict != "ok"
    assert each > 1 or (small.p_adjusted < drift.LEVEL) == (small.psi_low > 0)


def judge_share(observed: float, expected: float, n: int, images: int | None) -> drift.RateDrift:
    model = {"expected_flag_rates": {"A": expected}, "operating_points": {"A": {"n": images}}}
    return measure(build_flags(n, round(observed * n), 0), np.arange(n), model).flags[0]


def test_a_doubled_share_of_rare_flags_is_not_ok() -> None:
    for observed, n, verdict in (
        (0.002, 4000, "inconclusive"),
        (0.003, 4000, "inconclusive"),
        (0.003, 20_000, "large"),
        (0.001, 20_000, "ok"),
    ):
        assert judge_share(observed, 0.001, n, n).verdict == verdict
    # Nothing expected and nothing found
    assert [judge_share(0.0, 0.0, n, n).verdict for n in (1000, 20_000)] == ["inconclusive", "ok"]


def test_tolerance_does_not_depend_on_the_observed_share() -> None:
    for expected, tolerance in (
        (0.0005, 0.001),
        (0.005, 0.005),
        (0.03, 0.01),
        (0.2, 0.05),
        (0.9, 0.025),
        (0.996, 0.004),
    ):
        for observed in (0.01, expected, 0.5):
            assert judge_share(observed, expected, 2000, None).tolerance == pytest.approx(tolerance)
    # Ten of 2,000 images: the expected share can be far lower than 0.5%.
    low = stats.beta.ppf(0.025, 10, 1991)
    assert judge_share(0.01, 0.005, 2000, 2000).tolerance == pytest.approx(low, rel=0.01)


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


def find_reach(tail: float, n: float, images: float | None) -> tuple[float, float]:
    """Return how far the interval of 0.23 - 0.2 reaches down and up, from exact limits of both shares."""

    def limits(share: float, n: float) -> tuple[float, float]:
        count = share * n
        return stats.beta.ppf(tail, count, n - count + 1), stats.beta.ppf(1 - tail, count + 1, n - count)

    low, high = limits(0.23, n)
    less, more = limits(0.2, images) if images else (0.2, 0.2)
    return math.hypot(0.23 - low, more - 0.2), math.hypot(high - 0.23, 0.2 - less)


def test_p_and_interval_by_formula() -> None:
    n = 1000
    for images in (4000, None):
        model = {**MODEL, "operating_points": {"A": {"n": images}}, "expected_flag_rates": {"A": 0.2}}
        row = measure(build_flags(n, 230, 0), np.arange(n), model).flags[0]
        reach = find_reach(0.025, n / row.design_effect, images and images / row.design_effect)
        assert (0.03 - row.difference_low, row.difference_high - 0.03) == pytest.approx(reach, rel=1e-9)
        assert (row.interval_level, row.p_adjusted) == (0.95, row.p)
        # The interval that belongs to p ends at 0.
        down = find_reach(row.p / 2, n / row.design_effect, images and images / row.design_effect)[0]
        assert down == pytest.approx(0.03, rel=1e-6)
    assert row.design_effect == pytest.approx(n / (n - 1))
    # A second copy of each image adds no information.
    twice = measure(np.repeat(build_flags(n, 230, 0), 2, axis=0), np.repeat(np.arange(n), 2), model).flags[0]
    assert (twice.p, twice.low, twice.high) == pytest.approx((row.p, row.low, row.high), rel=1e-6)
    # Two findings: p doubles, and the interval widens.
    both = measure(build_flags(n, 230, 100), np.arange(n)).flags
    assert [one.p_adjusted for one in both] == [min(1.0, 2 * one.p) for one in both]
    assert {one.interval_level for one in both} == {0.975}


def test_missing_expectations_are_unknown() -> None:
    flags = np.column_stack([np.full(100, -1), np.zeros(100)])
    row, other = measure(flags, np.arange(100), {**MODEL, "expected_flag_rates": {"A": None, "B": 0.1}}).flags
    assert (row.verdict, row.observed, row.n) == ("unknown", None, 0)
    assert "operating point" in row.reason
    assert measure(np.full((100, 2), -1), np.arange(100)).flags[0].reason == "no image was scored"
    assert other.p_adjusted == other.p  # untested findings do not count for the adjustment
    # An expected share of 0 is not testable without its number of images.
    model = {**MODEL, "operating_points": {}, "expected_flag_rates": {"A": 0.0, "B": 0.0}}
    row, other = measure(build_flags(100, 9, 0), np.arange(100), model).flags
    assert (row.verdict, other.verdict, bool(row.reason)) == ("unknown", "inconclusive", True)
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
    assert rows["lateral"].verdict == "inconclusive"
    assert (rows["age_outside_training"].verdict, rows["age_outside_training"].count) == ("unknown", 10)
    assert (found.errors.observed, found.errors.n, found.errors.verdict) == (0.05, 1000, "unknown")
    assert "very different for inverted (1 of 4)" in found.summary
    one = measure(build_flags(n, 200, 100), np.arange(n), {**MODEL, "expected_flag_rates": {"A": 0.2}})
    assert "1 of 2 tested, all as expected" in one.summary
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


def test_a_large_index_by_chance_is_no_difference() -> None:
    """Sixty images make an index above 0.25 by chance alone where three at a time are of one patient."""
    rng = np.random.default_rng(3)
    kept, codes = rng.random(4000), np.repeat(np.arange(20), 3)
    found = [compare_scores(kept, rng.random(20)[codes] * 0.98 + rng.random(60) * 0.02, codes) for _ in range(60)]
    assert sum(row.psi > 0.25 for row in found) > 30
    assert sum(row.verdict == "inconclusive" for row in found) > 54


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
    # One image of each patient is as good as several; only unknown patients make intervals too narrow.
    assert (plain["flags"]["A"]["verdict"], plain["clustered"]) == ("large", True)
    assert measure(np.zeros((100, 2)), np.arange(100) // 2).clustered
    assert not measure(np.zeros((100, 2)), np.array([None, *range(99)], dtype=object)).clustered
    for columns, ok in ((3, np.ones(100, bool)), (2, np.ones(99, bool))):
        with pytest.raises(ValueError, match="do not fit"):
            measure(np.zeros((100, columns)), np.arange(100), ok=ok)


def test_other_images_are_a_baseline_and_four_kinds_are_one_question() -> None:
    """Three of 300 earlier images failed; of 300 later ones 30 fail, and the shares of flags stay the same."""
    n = 300
    flags, p = build_flags(n, 90, 30).astype(np.int8), np.column_stack([np.linspace(0.0, 1.0, n)] * 2)
    quality_flags = np.where(np.arange(n) < 6, "lateral", None)
    failed = [np.arange(n) % (n // count) == 7 for count in (3, 30)]
    earlier, later = ([flags.copy(), p.copy(), quality_flags.copy(), ~bad] for bad in failed)
    for columns, bad in zip((earlier, later), failed, strict=True):
        columns[0][bad], columns[1][bad] = -1, np.nan
    expected = drift.Expected.from_images(["Mass", "Nodule"], *earlier, name="earlier nights")
    patients = np.arange(n).astype(str).astype(object)
    alone, asked = (
        drift.measure_drift(expected, ["Mass", "Nodule"], *later, patients, questions=number) for number in (1, 4)
    )
    assert [row.expected for row in asked.flags] == pytest.approx([89 / 297, 29 / 297])
    assert (asked.errors.expected, asked.errors.observed, asked.errors.verdict) == (0.01, 0.1, drift.LARGE)
    assert {row.verdict for row in (*asked.flags, *asked.scores)} <= {drift.OK, drift.INCONCLUSIVE}
    assert next(row for row in asked.quality if row.name == "lateral").expected == pytest.approx(6 / 297)
    for one, four in zip((*alone.flags, alone.errors), (*asked.flags, asked.errors), strict=True):
        assert four.p == one.p
        assert four.p_adjusted == pytest.approx(min(1.0, 4 * (2 if one.name != "errors" else 1) * one.p))
        assert four.difference_high > one.difference_high
    assert alone.baselines["flags"] == "earlier nights"
