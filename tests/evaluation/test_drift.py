"""Drift without labels: what is the same passes, what is different is noticed, what cannot be known is said."""

from __future__ import annotations

import json

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
        "train_images": 1000,
        "held_out_images": 1000,
    },
    "provenance": {},
}


def clustered(rng: np.random.Generator, share: float, patients: int, each: int, alike: float = 0.5) -> np.ndarray:
    """bool [patients * each] with this share in the long run; with the chance `alike` all of a patient are one."""
    common = rng.random(patients) < share
    own = rng.random((patients, each)) < share
    return np.where((rng.random(patients) < alike)[:, None], common[:, None], own).ravel()


def measured(flags: np.ndarray, codes: np.ndarray, model: dict = MODEL, **more: object) -> drift.Drift:
    n = len(codes)
    given: dict = {
        "scores": np.full((n, 2), np.nan),
        "quality_flags": np.full(n, None, dtype=object),
        "ok": np.ones(n, dtype=bool),
    }
    return drift.measure(drift.Expected.of(model), NAMES, flags.astype(np.int8), patients=codes, **{**given, **more})


def test_the_same_patients_again_are_rarely_called_different() -> None:
    """5% of clean sets, at most, may say otherwise; images of one patient count for less than as many of others."""
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(150), 6)
    wrong = naive = 0
    for _ in range(400):
        flags = np.column_stack([clustered(rng, rate, 150, 6) for rate in (0.2, 0.1)])
        model = {
            **MODEL,
            "expected_flag_rates": {
                name: float(clustered(rng, rate, 700, 6).mean()) for name, rate in (("A", 0.2), ("B", 0.1))
            },
            "operating_points": {name: {"n": 4200} for name in NAMES},
        }
        wrong += any(one.verdict != "ok" for one in measured(flags, codes, model).flags)
        naive += any(one.verdict != "ok" for one in measured(flags, np.arange(900), model).flags)
    assert wrong / 400 < 0.075
    assert naive / 400 > 0.15, "without the clusters chance would be taken for drift: the simulation shows nothing"


def test_the_interval_of_a_share_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    codes = np.repeat(np.arange(150), 4)
    hits = 0
    for _ in range(1000):
        flags = np.column_stack([clustered(rng, 0.2, 150, 4)] * 2)
        low, high = (getattr(measured(flags, codes).flags[0], end) for end in ("low", "high"))
        hits += low <= 0.2 <= high
    assert 0.93 <= hits / 1000 <= 0.97


@pytest.mark.parametrize(
    ("share", "verdict"),
    [(0.2, "ok"), (0.3, "differs"), (0.39, "differs"), (0.5, "large"), (0.05, "large"), (0.0, "large")],
)
def test_verdicts(share: float, verdict: str) -> None:
    n = 2000
    flags = np.zeros((n, 2))
    flags[: int(share * n), 0] = 1
    flags[: int(0.1 * n), 1] = 1
    one, other = measured(flags, np.arange(n)).flags
    assert (one.observed, one.count, one.n, one.n_patients) == (share, int(share * n), n, n)
    assert one.ratio == pytest.approx(share / 0.2)
    assert (one.verdict, other.verdict) == (verdict, "ok")
    assert one.low <= share <= one.high


def test_a_large_ratio_within_chance_is_ok() -> None:
    flags = np.zeros((60, 2))
    flags[:3, 1] = 1
    flags[:12, 0] = 1
    one = measured(flags, np.arange(60)).flags[1]
    assert one.ratio == pytest.approx(0.5)
    assert one.verdict == "ok"


def test_few_images_of_many_or_many_of_few_patients_say_nothing() -> None:
    few = measured(np.ones((49, 2)), np.arange(49)).flags[0]
    assert (few.verdict, few.reason) == ("unknown", "49 images; 50 are needed")
    same = measured(np.ones((400, 2)), np.repeat(np.arange(19), 400 // 19 + 1)[:400]).flags[0]
    assert (same.verdict, same.reason) == ("unknown", "19 patients; 20 are needed")
    assert few.p is None


def test_without_operating_point_nothing_is_said_and_nothing_is_divided_by() -> None:
    flags = np.column_stack([np.full(100, -1), np.zeros(100)])
    model = {**MODEL, "expected_flag_rates": {"A": None, "B": 0.1}}
    one, other = measured(flags, np.arange(100), model).flags
    assert (one.verdict, one.reason, one.observed, one.n) == ("unknown", "no operating point", None, 0)
    assert other.p_adjusted == other.p  # the one that was not tested does not count


def test_nothing_is_known_of_another_systems_table() -> None:
    found = measured(np.zeros((100, 2)), np.arange(100), {})
    assert {one.verdict for one in (*found.flags, *found.scores, *found.quality)} == {"unknown"}
    assert all(one.reason for one in (*found.flags, *found.scores, *found.quality))
    assert "nothing can be said" in found.words
    json.dumps(found.as_dict(), allow_nan=False)


def test_quality_flags_against_their_rates_and_the_share_of_errors() -> None:
    n = 1000
    flags = np.zeros((n, 2))
    flags[:200, 0], flags[:100, 1] = 1, 1
    given = np.full(n, None, dtype=object)
    given[:300] = "inverted"
    given[300:308] = "lateral"
    given[310:320] = "age_outside_training"
    ok = np.ones(n, dtype=bool)
    ok[950:] = False
    found = measured(np.where(ok[:, None], flags, -1), np.arange(n), quality_flags=given, ok=ok)
    rows = {one.name: one for one in found.quality}
    assert (rows["inverted"].verdict, rows["inverted"].observed) == ("large", 300 / 950)
    assert rows["inverted"].ratio is None  # nothing is a multiple of 0
    assert rows["lateral"].verdict == "ok"
    assert (rows["age_outside_training"].verdict, rows["age_outside_training"].count) == ("unknown", 10)
    assert (found.errors.observed, found.errors.n, found.errors.verdict) == (0.05, 1000, "unknown")
    assert "large: inverted" in found.words
    lacking = {**MODEL, "quality": {"lacking": "only 12 images"}}
    row = measured(flags, np.arange(n), lacking).quality[0]
    assert (row.verdict, row.reason) == ("unknown", "only 12 images")


def with_scores(kept: np.ndarray, scores: np.ndarray, codes: np.ndarray) -> drift.Stability:
    model = {**MODEL, "provenance": {"score_quantiles": {"A": drift.score_quantiles(kept), "B": None}}}
    found = measured(np.zeros((len(codes), 2)), codes, model, scores=np.column_stack([scores, scores]))
    assert found.scores[1].verdict == "unknown"
    return found.scores[0]


def test_scores_of_the_same_kind_are_stable_and_of_another_are_not() -> None:
    rng = np.random.default_rng(2)
    codes = np.arange(2000)
    kept = rng.beta(2, 5, 3000).astype(np.float32)
    same = with_scores(kept, rng.beta(2, 5, 2000).astype(np.float32), codes)
    assert same.verdict == "ok"
    assert same.psi < 0.02
    assert with_scores(kept, rng.beta(2.6, 4.8, 2000), codes).verdict == "differs"
    far = with_scores(kept, rng.beta(4, 3, 2000), codes)
    assert far.verdict == "large"
    assert sum(far.shares) == pytest.approx(1)
    assert far.psi == pytest.approx(
        sum((a - b) * np.log(a / b) for a, b in zip(far.shares, far.expected, strict=True)), abs=1e-12
    )


def test_an_index_of_chance_is_no_drift() -> None:
    """Sixty images make an index above 0.1 by chance alone, and more so where five are of one patient."""
    rng = np.random.default_rng(3)
    kept = rng.random(4000)
    verdicts, indices = [], []
    for _ in range(200):
        one = with_scores(
            kept, np.repeat(rng.random(20), 3) * 0.98 + rng.random(60) * 0.02, np.repeat(np.arange(20), 3)
        )
        verdicts.append(one.verdict)
        indices.append(one.psi)
    assert np.mean(np.array(indices) > 0.25) > 0.5
    assert verdicts.count("ok") / 200 > 0.9


def test_equal_scores_are_one_class() -> None:
    constant = with_scores(np.full(100, 0.5), np.full(200, 0.5), np.arange(200))
    assert (constant.psi, constant.verdict) == (0.0, "ok")
    moved = with_scores(np.full(100, 0.5), np.full(200, 0.4), np.arange(200))
    assert moved.verdict == "large"


def test_kept_quantiles_are_nine_numbers_and_shares_of_one() -> None:
    kept = drift.score_quantiles(np.array([*np.linspace(0, 1, 200), np.nan]))
    assert kept["n"] == 200
    assert kept["edges"] == pytest.approx([k / 10 for k in range(1, 10)])
    assert kept["shares"] == pytest.approx([0.1] * 10)
    assert drift.score_quantiles(np.linspace(0, 1, 49)) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_stepwise_bonferroni(p: list[float]) -> None:
    ordered = sorted(p)
    steps = [min(1.0, (len(p) - i) * value) for i, value in enumerate(ordered)]
    expected = {value: max(steps[: i + 1]) for i, value in enumerate(ordered)}
    assert drift.holm(p) == pytest.approx([expected[value] for value in p])


@settings(deadline=None)
@given(st.integers(1, 12), st.floats(0, 100))
def test_tail_of_chi_square_is_scipys(freedom: int, x: float) -> None:
    assert drift._chi_square_tail(x, freedom) == pytest.approx(stats.chi2.sf(x, freedom), rel=1e-9, abs=1e-15)


def test_design_effect_of_independent_images_and_of_copies() -> None:
    values = np.random.default_rng(4).random(3000) < 0.3
    assert drift.design_effect(values, np.arange(3000)) == pytest.approx(1.0, abs=0.01)
    assert drift.design_effect(np.repeat(values, 4), np.repeat(np.arange(3000), 4)) == pytest.approx(4.0, abs=0.01)
    assert drift.design_effect(np.zeros(12), np.repeat(np.arange(3), 4)) == 4.0


def test_as_dict_is_plain() -> None:
    plain = json.loads(json.dumps(measured(np.zeros((100, 2)), np.arange(100)).as_dict(), allow_nan=False))
    assert set(plain["flags"]) == set(NAMES)
    assert plain["flags"]["A"]["verdict"] == "large"
    assert plain["clustered"] is False


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        measured(np.zeros((100, 3)), np.arange(100))
