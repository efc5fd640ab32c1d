"""Calibration and operating points against exact solutions, plain definitions and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit, logit

from ray_cxr.errors import ConfigError
from ray_cxr.evaluation import calibration, metrics
from ray_cxr.evaluation.calibration import Calibration, OperatingPoint, fit_calibration, fit_rules

LABELLED = st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, width=32)), min_size=2, max_size=40)
RULES = st.sampled_from(
    ["youden", "sensitivity=0.9", "specificity=0.9", "sensitivity=0.99", "specificity=0.5", "flag_rate=0.2", "npv=0.8"]
)


def fit(y: np.ndarray, p: np.ndarray, method: str = "platt", min_positives: int = 5) -> Calibration | None:
    return fit_calibration(y, p, method, min_positives)[0]


def find_operating_point(*arguments: object, **options: int) -> OperatingPoint | None:
    return calibration.find_operating_point(*arguments, **options)[0]


def test_scaling_equals_exact_solution() -> None:
    """At logit 1, 29 of 38 images are positive; at logit -1, 10 of 60. So Platt's targets are 40/41 and 1/61."""
    y = np.repeat([1, 0, 1, 0], [29, 9, 10, 50])
    p = expit(np.repeat([1.0, -1.0], [38, 60]))
    high, low = (29 * 40 / 41 + 9 / 61) / 38, (10 * 40 / 41 + 50 / 61) / 60  # mean targets at the two logits
    # Two parameters meet both means.
    got = fit(y, p)
    assert got.slope == pytest.approx((logit(high) - logit(low)) / 2, rel=1e-5)
    assert got.intercept == pytest.approx((logit(high) + logit(low)) / 2, rel=1e-5)
    assert got.method == "platt"
    # One parameter meets the mean after the points at -1 are mirrored to 1.
    got = fit(y, p, "temperature")
    assert got.slope == pytest.approx(logit((38 * high + 60 * (1 - low)) / 98), rel=1e-6)
    assert (got.intercept, got.method) == (0.0, "temperature")


@pytest.mark.parametrize("method", ["platt", "temperature"])
def test_scaling_refuses_unusable_data(method: str) -> None:
    assert fit(np.array([1, 0] * 10), np.full(20, 0.3), method) is None  # equal scores
    assert fit(np.repeat([0, 1], 10), np.linspace(0.9, 0.1, 20), method) is None  # reversed order
    for counts in ((5, 40), (40, 5)):
        y, p = np.repeat([1, 0], counts), np.linspace(1, 0, 45)
        assert fit(y, p, method, min_positives=5) is not None
        assert fit(y, p, method, min_positives=6) is None
    assert fit(np.ones(9, int), np.linspace(0.1, 0.9, 9), method, min_positives=0) is None
    # Separable and saturated scores have a finite slope.
    got = fit(np.repeat([0, 1], 20), np.repeat([0.0, 1.0], 20), method)
    assert calibration.apply_calibration(got, np.array([0.0, 1.0])) == pytest.approx([1 / 22, 21 / 22], abs=1e-4)


def test_apply_calibration() -> None:
    # logit(.8) = log 4, and 2 log 4 - log 4 = log 4.
    rule = Calibration(2.0, -np.log(4.0))
    for form in (rule, rule.as_dict()):
        got = calibration.apply_calibration(form, np.array([0.8, 0.5, np.nan]))
        assert got[:2] == pytest.approx([0.8, 0.2], abs=1e-6)
        assert np.isnan(got[2])
    for rule in (Calibration(1.5, -0.25), Calibration(0.5, 0.0, "temperature")):
        assert rule.as_dict() == {"method": rule.method, "slope": rule.slope, "intercept": rule.intercept}
        assert Calibration.from_dict(rule.as_dict()) == rule


def test_bad_calibration_is_refused() -> None:
    names = ("method", "slope", "intercept")
    for values in (
        ("isotonic", 1.0, 0.0),
        ("platt", -1.0, 0.0),
        ("platt", 0.0, 0.0),
        ("platt", float("nan"), 0.0),
        ("platt", 1.0, float("inf")),
        ("platt", 1.0),
        (None, 1.0, 0.0),
        ("temperature", 1.0, 0.5),
    ):
        with pytest.raises(ConfigError, match="calibration"):
            Calibration.from_dict(dict(zip(names, values, strict=False)))


def test_operating_points_on_ten_images() -> None:
    y = np.array([0, 0, 0, 1, 0, 1, 1, 1, 1, 1])
    p = np.array([0.125, 0.25, 0.375, 0.5, 0.5625, 0.625, 0.75, 0.8125, 0.875, 0.9375])
    # Above .5625: 5 of 6 positives and no negative (J = .833); above .375: all 6 and one negative (J = .75).
    rates = {"sensitivity": 5 / 6, "specificity": 1.0, "flag_rate": 0.5}
    assert find_operating_point(y, p) == {"threshold": 0.59375, "rule": "youden", **rates, "n": 10, "positives": 6}
    for rule in ("sensitivity=0.9", "specificity=0.75"):
        point = find_operating_point(y, p, rule)
        assert (point["threshold"], point["sensitivity"], point["specificity"]) == (0.4375, 1.0, 0.75)
    # Each class needs min_positives images.
    for labels in (np.array([0, 0, 1]), np.array([0, 1, 1])):
        assert find_operating_point(labels, p[:3], min_positives=1) is not None
        assert find_operating_point(labels, p[:3], min_positives=2) is None
    # A threshold between neighbouring float32.
    p = np.array([np.float32(0.3), np.nextafter(np.float32(0.3), np.float32(1))])
    point = find_operating_point(np.array([0, 1]), p)
    assert calibration.apply_threshold(p, point["threshold"]).tolist() == [False, True]
    # 9 of 10 reach a target of 0.9.
    point = find_operating_point(np.repeat([1, 0], 10), np.linspace(0.95, 0.05, 20), "sensitivity=0.9")
    assert point["sensitivity"] == 0.9


def test_flag_rate_and_npv_on_twelve_images() -> None:
    y = np.array([0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1])
    p = np.arange(1, 13) / 16
    for rule, threshold, sensitivity, specificity, flag_rate in (
        ("flag_rate=0.25", 9.5 / 16, 2 / 3, 8 / 9, 3 / 12),
        ("flag_rate=0.24", 10.5 / 16, 2 / 3, 1.0, 2 / 12),
        ("flag_rate=0.99", 1.5 / 16, 1.0, 1 / 9, 11 / 12),
        ("npv=0.9", 10.5 / 16, 2 / 3, 1.0, 2 / 12),  # 9 of the 10 below are negative
        ("npv=0.95", 8.5 / 16, 1.0, 8 / 9, 4 / 12),  # 8 of 8; with 3 flags 8 of 9
    ):
        point = find_operating_point(y, p, rule)
        rates = {"sensitivity": sensitivity, "specificity": specificity, "flag_rate": flag_rate}
        assert point == {"threshold": threshold, "rule": rule, **rates, "n": 12, "positives": 3}
    # Equal scores are flagged together: 2 or 4 of 8 images.
    tied = np.repeat([0.2, 0.4, 0.6, 0.8], 2)
    assert find_operating_point(np.array([0, 1] * 4), tied, "flag_rate=0.45")["flag_rate"] == 0.25
    for y, p, rule, part in (
        ([0] * 150 + [1], np.linspace(0.1, 0.9, 151), "npv=0.99", "without a flag, because only 1 of 151 images are"),
        ([1, 0, 0, 1], np.array([0.1, 0.2, 0.3, 0.4]), "npv=0.99", "only if every image is flagged"),
        ([1, 0, 0, 1], np.array([0.1, 0.2, 0.3, 0.4]), "flag_rate=0.2", "only if no image is flagged"),
    ):
        point, reason = calibration.find_operating_point(np.array(y), p, rule)
        assert point is None
        assert part in reason


#: Odds of six images for two findings. Youden's thresholds have the odds 11/4 and 4/11, so the largest multiple of
#: them in each image is 64/11, 16/11, 8/11, 11, 11/8 and 11/16.
JOINT_ODDS = np.array([[16, 1 / 8], [4, 1 / 4], [2, 1 / 8], [1 / 2, 4], [1 / 4, 1 / 2], [1 / 8, 1 / 4]])
JOINT_LABELS = np.array([[1, 0], [1, 0], [0, 0], [0, 1], [0, 1], [0, 0]], dtype=float)


def odds(point: OperatingPoint) -> float:
    return point["threshold"] / (1 - point["threshold"])


def test_one_factor_limits_the_images_with_any_flag() -> None:
    names, p = ["Mass", "Nodule"], (JOINT_ODDS / (1 + JOINT_ODDS)).astype(np.float32)

    def fit_points(rule: str, y: np.ndarray = JOINT_LABELS, **options: np.ndarray) -> list:
        return calibration.find_operating_points(y, p, names, rule, **options)

    assert [odds(point) for point, _ in fit_points("youden")] == pytest.approx([11 / 4, 4 / 11], rel=1e-6)
    # Three images: the factor lies midway between 11/8 and 16/11 on the log scale.
    for rule, factor in (("any_flag_rate=0.5", 2**0.5), (" any_flag_rate = 0.6", 2**0.5)):
        (mass, _), (nodule, _) = fit_points(rule)
        assert mass["rule"] == rule.replace(" ", "")
        assert [odds(mass), odds(nodule)] == pytest.approx([11 / 4 * factor, 4 / 11 * factor], rel=1e-6)
    # One image: 11 of Nodule, so no image for Mass (64/11). Without Mass, the factor lies between 11/8 and 11.
    (mass, reason), (nodule, _) = fit_points("any_flag_rate=0.3")
    assert odds(nodule) == pytest.approx(4 / 11 * (11 / 8 * 11) ** 0.5, rel=1e-6)
    assert (nodule["sensitivity"], nodule["specificity"], nodule["flag_rate"]) == (0.5, 1.0, 1 / 6)
    assert (mass, reason) == (
        None,
        "any_flag_rate=0.3 flags no validation image, because the scores of other findings are further above Youden's "
        "thresholds",
    )
    for point, reason in fit_points("any_flag_rate=0.1"):
        assert point is None
        assert reason.endswith("because 1 image has its highest score and at most 0 may have flags")
    # Unlabelled images count, too: only the threshold of Nodule has fewer images to be measured on.
    y = JOINT_LABELS.copy()
    y[5, 1] = np.nan
    (again, _), (partly, _) = fit_points("any_flag_rate=0.5", y)
    assert [odds(again), odds(partly)] == pytest.approx([11 / 4 * 2**0.5, 4 / 11 * 2**0.5], rel=1e-6)
    assert (partly["n"], partly["flag_rate"]) == (5, 1 / 5)
    # Slopes of 2 and 1: the multiples are (64/11)^2, (16/11)^2, ..., 11, 11/8; the third largest is (16/11)^2.
    (mass, _), (nodule, _) = fit_points("any_flag_rate=0.5", slopes=np.array([2.0, 1.0]))
    factor = (16**2 / 11**2 * 11 / 8) ** 0.5
    assert [odds(mass), odds(nodule)] == pytest.approx([11 / 4 * factor**0.5, 4 / 11 * factor], rel=1e-6)


def test_no_finding_and_unfitted_findings_do_not_count_as_flags() -> None:
    p = (np.column_stack([JOINT_ODDS, JOINT_ODDS[:, 0], JOINT_ODDS[:, 0]])).astype(np.float32)
    p /= 1 + p
    y = np.column_stack([JOINT_LABELS, JOINT_LABELS[:, 0], np.zeros(6)])
    names = ["Mass", "Nodule", "No_Finding", "Hernia"]
    mass, nodule, none, hernia = calibration.find_operating_points(y, p, names, "any_flag_rate=0.5")
    assert [odds(mass[0]), odds(nodule[0])] == pytest.approx([11 / 4 * 2**0.5, 4 / 11 * 2**0.5], rel=1e-6)
    assert none == calibration.find_operating_point(y[:, 2], p[:, 2], "youden")
    assert none[0]["rule"] == "youden"
    assert (hernia[0], hernia[1]) == (None, "0 positives, needs 1")
    with pytest.raises(ConfigError, match="all findings"):
        calibration.find_operating_point(y[:, 0], p[:, 0], "any_flag_rate=0.3")


@pytest.mark.parametrize("top", [0.999, 1.0])
@pytest.mark.parametrize("tied", [0.2, 0.35, 0.6])
def test_finding_with_many_equal_scores_leaves_the_limit_to_the_others(top: float, tied: float) -> None:
    rng, n = np.random.default_rng(1), 2000
    y = (rng.random((n, 3)) < 0.15).astype(int)
    p = (0.4 * y + 0.6 * rng.random((n, 3))).astype(np.float32)
    p[:, 1] = np.where(rng.random(n) < tied + 0.4 * y[:, 1], np.float32(top), 0.01 * rng.random(n))
    got = fit_rules(y, p, ["Effusion", "Mass", "Nodule"])
    points = {name: point for name, point in got.operating_points.items() if point}
    flags = np.column_stack(
        [p[:, j] >= points[name]["threshold"] for j, name in enumerate(got.calibration) if name in points]
    )
    assert flags.any(axis=1).mean() == pytest.approx(0.3, abs=0.001)
    assert flags.any(axis=0).all()
    if tied > 0.3:
        assert list(points) == ["Effusion", "Nodule"]
        count = int((p[:, 1] == np.float32(top)).sum())
        reason = f"flags no validation image, because {count:,} images share its highest score and at most 600 may"
        assert reason in got.rule_notes["Mass"]
        assert got.expected_flag_rates["Mass"] is None


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(4, 40), st.sampled_from([0.1, 0.3, 0.5, 0.99]), st.booleans())
def test_joint_rule_keeps_its_limit_exactly(seed: int, n: int, target: float, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random((n, 3)).astype(np.float32)
    if tied:
        p = np.round(p, 1)
    y = (rng.random((n, 3)) < 0.4).astype(int)
    names, slopes = ["Mass", "Nodule", "Edema"], rng.uniform(0.3, 3.0, 3)
    base = calibration.find_operating_points(y, p, names, "youden", 1, slopes)
    points = calibration.find_operating_points(y, p, names, f"any_flag_rate={target}", 1, slopes)
    kept = [j for j, (point, _) in enumerate(points) if point]
    flags = np.array([p[:, j] >= points[j][0]["threshold"] for j in kept]).reshape(len(kept), n)
    in_float32 = [p[:, j] >= np.float32(points[j][0]["threshold"]) for j in kept]
    assert np.array_equal(flags, np.array(in_float32).reshape(flags.shape))
    flagged = flags.any(axis=0)
    assert flagged.mean() <= target + 1e-9
    assert flags.any(axis=1).all()  # each operating point flags an image
    margins = {
        j: slopes[j] * (logit(np.clip(p[:, j].astype(float), 1e-7, 1 - 1e-7)) - logit(point["threshold"]))
        for j, (point, _) in enumerate(base)
        if point
    }
    # A cut low enough for a finding without an operating point would exceed the limit.
    for j in margins.keys() - set(kept):
        assert "flags no validation image" in points[j][1]
        assert (np.max([margins[k] for k in (j, *kept)], axis=0) >= margins[j].max()).mean() > target
    # One more image (and its ties) would exceed the limit.
    if kept and not flagged.all():
        highest = np.max([margins[j] for j in kept], axis=0)
        assert (highest >= highest[~flagged].max() - 1e-9).mean() > target
        assert highest[flagged].min(initial=np.inf) > highest[~flagged].max() - 1e-9


@given(LABELLED, RULES)
def test_operating_point_obeys_its_rule(rows: list[tuple[int, float]], rule: str) -> None:
    y, p = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], dtype=np.float32)
    point = find_operating_point(y, p, rule)
    if point is None:
        return
    assert 0.0 < point["threshold"] < 1.0
    flags = calibration.apply_threshold(p, point["threshold"])
    assert (flags == (p >= np.float32(point["threshold"]))).all()  # the same flags in float32
    cells = metrics.confusion(y, flags)
    rates = (cells.sensitivity, cells.specificity, cells.flag_rate)
    assert rates == (point["sensitivity"], point["specificity"], point["flag_rate"])
    lowest = p[flags].min()
    counted = {t: metrics.confusion(y, p >= t) for t in p}
    others = {t: (cells.sensitivity, cells.specificity) for t, cells in counted.items()}
    name, _, target = rule.partition("=")
    if name == "youden":
        best = max(map(sum, others.values()))
        assert point["sensitivity"] + point["specificity"] == pytest.approx(best, abs=1e-12)
        # Ties go to the more sensitive threshold.
        assert all(t >= lowest for t, both in others.items() if sum(both) > best - 1e-9)
        return
    if name in ("flag_rate", "npv"):
        other = {t: getattr(cells, name) for t, cells in counted.items()}
        if name == "flag_rate":  # the next lower threshold flags too many
            assert point["flag_rate"] <= float(target) + 1e-12
            assert all(rate > float(target) for t, rate in other.items() if t < lowest)
        else:  # every higher threshold leaves too many positives below it
            assert cells.npv >= float(target) - 1e-12
            assert all(npv < float(target) for t, npv in other.items() if t > lowest)
            assert y.mean() > 1 - float(target)
        return
    assert point[name] >= float(target) - 1e-12
    # Of the thresholds that reach the target, the one that costs least of the other rate.
    better = {t: both for t, both in others.items() if (t > lowest if name == "sensitivity" else t < lowest)}
    assert all(both[name == "specificity"] < float(target) for both in better.values())


def test_unknown_rules_and_values_outside_0_to_1_are_refused() -> None:
    y = np.array([0, 1])
    for rule in ("", "f1", "youden=1", "sensitivity", "sensitivity=0", "specificity=1", "npv=2"):
        with pytest.raises(ConfigError, match="operating point"):
            find_operating_point(y, np.array([0.1, 0.9]), rule)
    for wrong in (1.5, -0.5):
        p = np.array([0.5, wrong])
        for call in (
            lambda p: find_operating_point(y, p),
            lambda p: fit(y, p),
            lambda p: metrics.expected_calibration_error(y, p),
            lambda p: calibration.reliability_curve(y, p, y),
            lambda p: calibration.apply_calibration(Calibration(1.0, 0.0), p),
        ):
            with pytest.raises(ValueError, match=r"0\.\.1"):
                call(p)


def test_rules_per_finding() -> None:
    # Five findings on 60 images: ordinary, few positives, unlabelled, reversed, half labelled.
    names, images = ("Mass", "Hernia", "Edema", "Fibrosis", "Nodule"), np.arange(60)
    y = (images % 3 == 0).astype(int)
    labels = np.column_stack([y, images < 3, np.full(60, np.nan), 1 - y, np.where(images < 30, y, np.nan)])
    scores = expit(2 * y - 1 + np.random.default_rng(4).normal(size=60))
    p = np.repeat(scores[:, None], 5, axis=1).astype(np.float32)
    got = fit_rules(labels, p, names, rule="youden")
    point = find_operating_point(y, p[:, 0])
    assert got.calibration["Mass"] == fit(y, p[:, 0]).as_dict()
    assert got.operating_points["Mass"] == point
    assert got.expected_flag_rates["Mass"] == point["flag_rate"]
    single = ("sensitivity=0.9", "specificity=0.9", "flag_rate=0.1", "npv=0.99")
    others = {rule: find_operating_point(y, p[:, 0], rule) for rule in single}
    joint = got.operating_alternatives["Mass"].pop("any_flag_rate=0.3")
    assert got.operating_alternatives["Mass"] == others
    assert joint == fit_rules(labels, p, names).operating_points["Mass"]  # the default
    assert (np.column_stack([p[:, 0] >= joint["threshold"]]).any(axis=1)).mean() <= 0.3
    got.operating_alternatives["Mass"]["any_flag_rate=0.3"] = joint
    assert got.operating_points["Nodule"] == find_operating_point(y[:30], p[:30, 0])
    for name in ("Hernia", "Edema", "Fibrosis"):
        assert got.calibration[name] is got.operating_points[name] is got.expected_flag_rates[name] is None
        assert got.rule_notes[name]
    assert got.operating_alternatives["Hernia"] == dict.fromkeys(("any_flag_rate=0.3", *others))
    assert got.rule_notes["Mass"] is got.rule_notes["Nodule"] is None
    assert "3 positives, needs 5" in got.rule_notes["Hernia"]
    for part in (
        got.calibration,
        got.operating_points,
        got.expected_flag_rates,
        got.operating_alternatives,
        got.rule_notes,
    ):
        assert tuple(part) == names
    assert fit_rules(np.nan_to_num(labels, nan=-1).astype(np.int8), p, names, rule="youden") == got
    # Another method and rule.
    got = fit_rules(labels, p, names, method="temperature", rule="sensitivity=0.90", min_positives=3)
    assert got.calibration["Mass"]["method"] == "temperature"
    for name in ("Mass", "Hernia"):
        point = got.operating_points[name]
        assert (point["rule"], point["sensitivity"] >= 0.9) == ("sensitivity=0.90", True)
    # Other spellings of the chosen rule are not listed as alternatives.
    assert not {"sensitivity=0.9", "sensitivity=0.90"} & set(got.operating_alternatives["Mass"])
    assert len(fit_rules(labels, p, names, rule="specificity=0.5").operating_alternatives["Mass"]) == 6
    with pytest.raises(ConfigError, match="f1"):
        fit_rules(labels, p, names, rule="f1")
    for wrong, findings in (([[0], [1]], ["Mass", "Nodule"]), ([[0], [1], [1]], ["Mass"]), ([[0], [2]], ["Mass"])):
        with pytest.raises(ValueError, match="labels"):
            fit_rules(np.array(wrong), np.array([[0.1], [0.9]]), findings)


def test_missing_rules_have_a_reason() -> None:
    for y, p, rule, missing, part in (
        ([0, 1], [0.3, 0.3], "youden", ["calibration", "operating point"], "equal"),
        ([0, 1], [0.3, 0.2], "youden", ["calibration", "operating point"], "not higher with the finding"),
        ([0, 1], [0.3, 0.2], "sensitivity=0.99", ["calibration", "operating point"], "slope"),
        ([0, 1], [0.3, 0.3], "specificity=0.9", ["calibration", "operating point"], "specificity=0.9"),
        ([0] * 5 + [1] * 10, [1e-6] * 5 + [0.0] + [0.9] * 9, "sensitivity=0.99", ["operating point"], "saturated"),
        ([1, 1], [0.3, 0.2], "youden", [], "0 negatives, needs 1"),  # one reason for both
        ([0, 0], [0.3, 0.2], "sensitivity=0.99", [], "0 positives, needs 1"),
    ):
        got = fit_rules(np.array(y)[:, None], np.array(p)[:, None], ["Mass"], rule=rule, min_positives=1)
        reason = got.rule_notes["Mass"]
        assert part in reason
        assert [what for what in ("calibration", "operating point") if f"no {what}" in reason] == missing
        for what, value in (("calibration", got.calibration), ("operating point", got.operating_points)):
            assert (value["Mass"] is None) == (what in missing or not missing)


def compute_error(y: np.ndarray, p: np.ndarray, bins: int = 10) -> float:
    """Compute the expected calibration error bin by bin."""
    total = 0.0
    for k in range(bins):
        inside = [b - a for a, b in zip(y, p, strict=True) if min(int(b * bins), bins - 1) == k]
        total += abs(sum(inside)) / len(y)
    return float(total)


@settings(max_examples=60)
@given(rows=st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=1, max_size=40), bins=st.integers(1, 12))
def test_expected_error_equals_its_definition(rows: list[tuple[int, float]], bins: int) -> None:
    y, p = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    expected = pytest.approx(compute_error(y, p, bins), abs=1e-12)
    assert metrics.expected_calibration_error(y, p, bins) == expected
    curve = calibration.reliability_curve(y, p, np.arange(len(y)), bins)
    assert [each.low for each in curve[1:]] == [each.high for each in curve[:-1]]
    assert (curve[0].low, curve[-1].high, sum(each.n for each in curve)) == (0.0, 1.0, len(rows))
    for each in curve:
        if each.n == 0:
            assert (each.predicted, each.observed, each.observed_low, each.observed_high) == (None,) * 4
            continue
        wilson = stats.binomtest(round(each.observed * each.n), each.n).proportion_ci(method="wilson")
        assert (each.observed_low, each.observed_high) == pytest.approx((wilson.low, wilson.high), abs=1e-9)


def test_reliability_interval_counts_patients() -> None:
    y, p = np.array([0, 1, 1, 0, 1, 0, 0, 1]), np.array([0.1, 0.1, 0.15, 0.12, 0.9, 0.95, 0.92, 0.97])
    once = calibration.reliability_curve(y, p, np.arange(8), 2)
    thrice = calibration.reliability_curve(*(np.repeat(values, 3) for values in (y, p, np.arange(8))), 2)
    for plain, more in zip(once, thrice, strict=True):
        assert more.n == 3 * plain.n
        for name in ("predicted", "observed", "observed_low", "observed_high"):
            assert getattr(more, name) == pytest.approx(getattr(plain, name), abs=1e-12)
    # Patients never narrow the interval of independent images.
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 60), rng.random(60)
    grouped = calibration.reliability_curve(y, p, rng.integers(0, 20, 60))
    for plain, more in zip(calibration.reliability_curve(y, p, np.arange(60)), grouped, strict=True):
        assert more.observed_high - more.observed_low >= plain.observed_high - plain.observed_low - 1e-12
    with pytest.raises(ValueError, match="patients"):
        calibration.reliability_curve(y, p, np.arange(3))


def test_reliability_bins_of_equal_counts() -> None:
    rng = np.random.default_rng(3)
    p = rng.beta(1, 40, 200)
    y, patients = rng.random(200) < p, np.arange(200)
    bins = calibration.reliability_curve(y, p, patients)
    assert [each.n for each in bins] == [20] * 10
    assert (bins[0].low, bins[-1].high) == (0.0, 1.0)
    order = np.argsort(p)
    for k, each in enumerate(bins):
        rows = order[20 * k : 20 * (k + 1)]
        assert each.predicted == pytest.approx(p[rows].mean(), abs=1e-12)
        assert each.observed == y[rows].mean()
        assert each.low <= p[rows].min() <= p[rows].max() <= each.high
    # The number next to the curve is the distance of its points to the diagonal, also if the bins are uneven.
    for n in (200, 137):
        bins = calibration.reliability_curve(y[:n], p[:n], patients[:n])
        distances = [each.n * abs(each.predicted - each.observed) for each in bins]
        assert sum(distances) / n == pytest.approx(metrics.equal_mass_error(y[:n], p[:n]), abs=1e-12)
    # Equal probabilities fall into one bin; there are no empty ones.
    for value in (0.02, 0.0, 1.0):
        bins = calibration.reliability_curve(y, np.full(200, value), patients)
        assert [each.n for each in bins if each.n] == [200]
    assert calibration.reliability_curve(y[:0], p[:0], patients[:0])[0].n == 0


def simulate_overconfident(patients: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels (a tenth missing), probabilities that are too high, and patients with two images each."""
    rng = np.random.default_rng(0)
    ids = np.array([f"p{i // 2}" for i in rng.permutation(2 * patients)])
    x = rng.normal(-1.5, 1.5, size=(2 * patients, 2))
    labels = (rng.random(x.shape) < expit(x)).astype(np.int8)
    labels[rng.random(x.shape) < 0.1] = -1
    return labels, expit(0.5 * x + 1.5), ids


def compute_cross_fitted(labels: np.ndarray, p: np.ndarray, patients: np.ndarray, method: str, least: int) -> Any:
    """Calibrate each half on the other; every other patient, by first appearance, belongs to the first half.

    A finding counts only if both halves can be calibrated; None if no finding can.
    """
    seen = list(dict.fromkeys(patients.tolist()))
    half = np.array([seen.index(patient) % 2 for patient in patients])
    errors = []
    for j in range(labels.shape[1]):
        known, calibrated, fitted = labels[:, j] != -1, p[:, j].copy(), 0
        for part in (0, 1):
            rows, others = known & (half == part), known & (half != part)
            rule = fit(labels[others, j], p[others, j], method, least)
            if rule is not None:
                calibrated[rows], fitted = calibration.apply_calibration(rule, p[rows, j]), fitted + 1
        if fitted == 2:
            errors.append(compute_error(labels[known, j], calibrated[known]))
    return pytest.approx(sum(errors) / len(errors), abs=1e-9) if errors else None


@pytest.mark.parametrize(("method", "least"), [("platt", 5), ("temperature", 5), ("platt", 1000)])
def test_cross_fitted_error_equals_its_definition(method: str, least: int) -> None:
    labels, p, patients = simulate_overconfident()
    large = np.where(np.arange(120) < 30, "large", patients)
    for scores, people in ((p, patients), (1 - p, patients), (p, large)):  # reversed scores are not calibrated
        got = calibration.cross_fitted_error(labels, scores, people, method=method, min_positives=least)
        assert got == compute_cross_fitted(labels, scores, people, method, least)


def test_cross_fitted_error_without_labels_or_patients() -> None:
    labels, p, patients = simulate_overconfident()
    assert calibration.cross_fitted_error(np.full_like(labels, -1), p, patients) is None
    assert metrics.expected_calibration_error(np.array([], int), np.array([])) is None
    half = labels.copy()
    half[:, 1] = -1  # a finding without labels does not count
    alone = calibration.cross_fitted_error(labels[:, :1], p[:, :1], patients)
    assert calibration.cross_fitted_error(half, p, patients) == pytest.approx(alone)
    # With a single patient one half is empty: the error of scores that are not calibrated is no estimate of it.
    assert calibration.cross_fitted_error(labels[:, :1], p[:, :1], np.array(["a"] * len(p))) is None


@pytest.mark.parametrize("rule", ["any_flag_rate=0.5", "youden", "sensitivity=0.9", "flag_rate=0.1"])
def test_a_finding_whose_scores_are_lower_with_it_gets_no_flags(rule: str) -> None:
    """Nodule has higher scores without the finding; the limit of the joint rule is left to Mass."""
    y = np.tile([[1, 1], [0, 0]], (20, 1))
    p = np.random.default_rng(0).uniform(0.1, 0.5, (40, 2)).astype(np.float32)
    p[::2, 0] += 0.3
    p[1::2, 1] += 0.3
    found = calibration.fit_rules(y, p, ["Mass", "Nodule"], rule=rule)
    assert (found.operating_points["Nodule"], found.calibration["Nodule"]) == (None, None)
    assert all(point is None for point in found.operating_alternatives["Nodule"].values())
    assert found.rule_notes["Nodule"]
    alone = calibration.fit_rules(y[:, :1], p[:, :1], ["Mass"], rule=rule)
    assert found.operating_points["Mass"] == alone.operating_points["Mass"] is not None


def test_few_positives_are_the_only_reason_for_missing_rules() -> None:
    y, p = np.array([[1], [0], [0], [0], [0], [0]]), np.linspace(0.1, 0.6, 6, dtype=np.float32)[:, None]
    assert calibration.fit_rules(y, p, ["Mass"], min_positives=5).rule_notes["Mass"] == "1 positive, needs 5"
