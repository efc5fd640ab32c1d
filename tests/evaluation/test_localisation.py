"""Heat maps against boxes: by hand, against pixels counted one by one, and against points drawn at random."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr.evaluation import localisation
from ray_cxr.evaluation.localisation import Localisation, measure

SIDE = 1024


def peak(row: int, column: int, side: int = 8, value: float = 1.0) -> np.ndarray:
    heat = np.zeros((side, side))
    heat[row, column] = value
    return heat


def one(heat: np.ndarray | None, boxes: list[tuple[float, ...]], **options: Any) -> localisation.FindingLocalisation:
    """One image, one finding."""
    maps = {} if heat is None else {("a", "Mass"): heat}
    options = {"n_resamples": 50, **options}
    return measure(maps, ["a"] * len(boxes), ["Mass"] * len(boxes), np.array(boxes), **options).overall


def drawn(n: int, seed: int, side: int = 7) -> tuple[dict[tuple[str, str], np.ndarray], list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = [f"{i}" for i in range(n)]
    corner = rng.uniform(0, 700, (n, 2))
    boxes = np.hstack([corner, rng.uniform(20, 1000 - corner)])
    return {(i, "Mass"): rng.random((side, side)) for i in ids}, ids, boxes


# Pointing game


def test_maximum_in_the_box_is_a_hit() -> None:
    # The cell in row 2, column 5 of 8 has its centre at x = 704, y = 320.
    assert one(peak(2, 5), [(700, 310, 10, 20)]).hits == 1
    assert one(peak(5, 2), [(700, 310, 10, 20)]).hits == 0


@pytest.mark.parametrize(("left", "tolerance", "hit"), [(719, 15, 1), (719.5, 15, 0), (704, 0, 1), (704.5, 0, 0)])
def test_tolerance_is_in_pixels_of_the_boxes(left: float, tolerance: float, hit: float) -> None:
    assert one(peak(2, 5), [(left, 300, 50, 50)], tolerance=tolerance).hits == hit


def test_any_box_of_the_finding_counts() -> None:
    found = one(peak(2, 5), [(0, 0, 50, 50), (690, 310, 50, 50)])
    assert (found.hits, found.boxes, found.cases) == (1, 2, 1)


def test_boxes_of_another_finding_or_image_do_not_count() -> None:
    maps = {("a", "Mass"): peak(2, 5), ("b", "Nodule"): peak(2, 5)}
    result = measure(
        maps,
        ["a", "a", "b", "b"],
        ["Mass", "Nodule", "Mass", "Nodule"],
        np.array([(0, 0, 50, 50), (690, 310, 50, 50), (690, 310, 50, 50), (690, 310, 50, 50)]),
        n_resamples=50,
    )
    assert (result.findings["Mass"].hits, result.findings["Mass"].missing) == (0, 1)
    assert (result.findings["Nodule"].hits, result.findings["Nodule"].missing) == (1, 1)


def test_a_shared_maximum_is_a_share_of_a_hit() -> None:
    heat = peak(2, 5) + peak(2, 6) + peak(7, 0) + peak(0, 0)
    assert one(heat, [(690, 310, 200, 50)]).hits == 0.5


def test_rows_run_down_and_columns_to_the_right() -> None:
    wide = np.zeros((2, 4))
    wide[1, 0] = 1.0  # centre at x = 128, y = 768
    assert one(wide, [(120, 760, 16, 16)], tolerance=0).hits == 1


# Overlap


def test_overlap_of_whole_cells_by_hand() -> None:
    # As many cells as the working grid has: nothing is interpolated, and a cell is 4 x 4 pixels.
    heat = np.zeros((256, 256))
    heat[10:20, 30:50] = 0.5
    heat[10:20, 30:40] = 1.0
    heat[20:30, 30:50] = 0.49
    # The region: x 120..200, y 40..80, which is 3,200 pixels; the box takes its right half and as much again.
    assert one(heat, [(160, 40, 80, 40)]).iou.value == pytest.approx(1600 / 4800, abs=1e-12)
    assert one(heat, [(120, 40, 80, 40)]).iou.value == pytest.approx(1, abs=1e-12)
    # Half a pixel more on each side, which cuts cells.
    assert one(heat, [(119.5, 39.5, 81, 41)]).iou.value == pytest.approx(3200 / (81 * 41), abs=1e-12)
    assert one(heat, [(120, 40, 80, 40)], map_share=0.75).iou.value == pytest.approx(0.5, abs=1e-12)
    # Two boxes that overlap: their union is x 120..200, y 40..80 again.
    assert one(heat, [(120, 40, 50, 40), (150, 40, 50, 40)]).iou.value == pytest.approx(1, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 10_000),
    boxes=st.lists(
        st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(1, 124), st.integers(1, 124)),
        min_size=1,
        max_size=3,
    ),
)
def test_overlap_equals_counted_pixels(shape: tuple[int, int], seed: int, boxes: list[tuple[int, ...]]) -> None:
    heat = np.random.default_rng(seed).random(shape).astype(np.float32)
    if heat.size == 1:
        return  # flat
    grid = cv2.resize(heat.astype(np.float64), (256, 256), interpolation=cv2.INTER_LINEAR)
    level = 0.5 * float(heat.max())
    if np.abs(grid - level).min() < 1e-6:
        return  # OpenCV's weights are float32
    region = np.kron(grid >= level, np.ones((4, 4), dtype=bool))
    boxed = np.zeros((SIDE, SIDE), dtype=bool)
    for x, y, w, h in boxes:
        boxed[y : y + h, x : x + w] = True
    found = one(heat, boxes)
    assert found.iou.value == pytest.approx((region & boxed).sum() / (region | boxed).sum(), abs=1e-9)
    assert found.box_share == pytest.approx(boxed.mean(), abs=1e-9)


def test_accuracy_counts_maps_that_reach_each_level() -> None:
    heat = np.zeros((256, 256))
    heat[:64] = 1.0  # the upper quarter: 0 <= y <= 256
    tall = [(0, 0, 1024, 256.0 / iou) for iou in (1.0, 0.6, 0.3, 0.25)]
    ids = list("abcd")
    found = measure({(i, "Mass"): heat for i in ids}, ids, ["Mass"] * 4, np.array(tall), n_resamples=50).overall
    assert [rate.value for rate in found.accuracy] == [1.0, 1.0, 0.5, 0.25]
    assert found.iou.value == pytest.approx((1.0 + 0.6 + 0.3 + 0.25) / 4)


def test_levels_may_be_others() -> None:
    result = measure(*_single(), n_resamples=50, iou_levels=(0.2,))
    assert len(result.overall.accuracy) == 1
    assert list(result.as_dict()["overall"]["accuracy"]) == ["0.2"]


def _single() -> tuple[dict[tuple[str, str], np.ndarray], list[str], list[str], np.ndarray]:
    maps, ids, boxes = drawn(5, seed=1)
    return maps, ids, ["Mass"] * 5, boxes


# What says nothing, and what is not there


@pytest.mark.parametrize("heat", [np.zeros((4, 4)), np.full((4, 4), 0.7), -np.eye(4)], ids=["zero", "even", "negative"])
def test_a_flat_map_is_a_counted_miss(heat: np.ndarray) -> None:
    found = one(heat, [(0, 0, 1024, 1024)])
    assert (found.n, found.flat, found.hits, found.hit_rate.value, found.iou.value) == (1, 1, 0, 0, 0)


def test_evidence_against_counts_as_none() -> None:
    heat = np.full((256, 256), -5.0)
    heat[:64] = 1.0
    assert one(heat, [(0, 0, 1024, 256)]).iou.value == 1


def test_missing_maps_are_counted_and_not_dropped() -> None:
    maps, ids, boxes = drawn(10, seed=0)
    for i in range(4):
        del maps[f"{i}", "Mass"]
    boxes[:] = (0, 0, 1024, 1024)
    result = measure(maps, ids, ["Mass"] * 10, boxes, n_resamples=50)
    found = result.overall
    assert (found.cases, found.n, found.missing, found.hits) == (10, 6, 4, 6)
    assert found.hit_rate.value == 1
    assert found.hit_rate_of_all == 0.6
    assert result.notes()[0].startswith("4 of 10 pairs of a boxed image and finding have no heat map")


def test_without_any_map_all_is_none_with_a_reason() -> None:
    found = one(None, [(0, 0, 10, 10)])
    assert (found.n, found.missing, found.hit_rate_of_all) == (0, 1, 0)
    assert (found.chance, found.box_share) == (None, None)
    for rate in (found.hit_rate, found.iou, *found.accuracy):
        assert (rate.value, rate.low, rate.high, rate.reason) == (None, None, None, "no heat map")


def test_without_boxes_there_is_nothing() -> None:
    result = measure({}, [], [], np.empty((0, 4)))
    assert result.findings == {}
    assert (result.overall.cases, result.overall.hit_rate_of_all, result.notes()) == (0, None, [])
    json.dumps(result.as_dict())


def test_no_notes_where_nothing_is_amiss() -> None:
    assert measure(*_single(), n_resamples=50).notes() == []


# Chance


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 3), tolerance=st.sampled_from([0.0, 15.0, 100.0]))
def test_chance_is_what_random_points_hit(seed: int, n: int, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 900, (n, 2))
    boxes = np.hstack([corner, rng.uniform(10, 1024 - corner)])
    points = rng.uniform(0, SIDE, (40_000, 2))
    low, high = boxes[:, :2] - tolerance, boxes[:, :2] + boxes[:, 2:] + tolerance
    hits = ((points[:, None] >= low) & (points[:, None] <= high)).all(axis=2).any(axis=1)
    found = one(peak(0, 0), [tuple(box) for box in boxes], tolerance=tolerance)
    assert found.chance == pytest.approx(hits.mean(), abs=0.015)


def test_random_maps_hit_at_the_rate_of_chance() -> None:
    maps, ids, boxes = drawn(500, seed=3, side=32)
    found = measure(maps, ids, ["Mass"] * 500, boxes, n_resamples=50).overall
    assert found.hit_rate.value is not None
    assert found.chance is not None
    # Four standard errors.
    assert abs(found.hit_rate.value - found.chance) < 4 * np.sqrt(found.chance * (1 - found.chance) / 500)


# Intervals


def test_interval_is_the_patient_bootstrap_of_the_rate() -> None:
    maps, ids, boxes = drawn(150, seed=5)
    once = measure(maps, ids, ["Mass"] * 150, boxes, n_resamples=1000).overall
    p = once.hit_rate.value
    assert p is not None
    assert once.hit_rate.low is not None
    assert once.hit_rate.high is not None
    # Images of their own patients: near the normal interval of a share.
    assert once.hit_rate.high - once.hit_rate.low == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 150), rel=0.15)
    assert once.patients == 150
    four = {(f"{i}-{k}", "Mass"): maps[f"{i}", "Mass"] for i in range(150) for k in range(4)}
    names = [name for name, _ in four]
    repeated = np.repeat(boxes, 4, axis=0)
    patients = [name.split("-")[0] for name in names]
    clustered = measure(four, names, ["Mass"] * 600, repeated, patients, n_resamples=1000).overall
    # Four copies of each patient's image say no more than one.
    assert (clustered.hit_rate.low, clustered.hit_rate.high) == (once.hit_rate.low, once.hit_rate.high)
    assert clustered.patients == 150
    alone = measure(four, names, ["Mass"] * 600, repeated, n_resamples=1000).overall.hit_rate
    assert alone.low is not None
    assert alone.high is not None
    assert alone.high - alone.low < 0.7 * (once.hit_rate.high - once.hit_rate.low)


def test_findings_of_an_image_are_of_one_patient_known_or_not() -> None:
    maps = {("a", "Mass"): peak(0, 0), ("a", "Nodule"): peak(0, 0), ("b", "Mass"): peak(0, 0)}
    box = np.array([(0, 0, 300, 300)] * 3)
    images, findings = ["a", "a", "b"], ["Mass", "Nodule", "Mass"]
    assert measure(maps, images, findings, box, n_resamples=50).overall.patients == 2
    assert measure(maps, images, findings, box, [None, None, None], n_resamples=50).overall.patients == 2
    assert measure(maps, images, findings, box, ["1", "1", "1"], n_resamples=50).overall.patients == 1
    # An image without a patient is not the patient who is called as the image is.
    assert measure(maps, images, findings, box, [None, None, "a"], n_resamples=50).overall.patients == 2


def test_all_hits_have_no_interval() -> None:
    maps, ids, boxes = drawn(30, seed=0)
    boxes[:] = (0, 0, 1024, 1024)
    rate = measure(maps, ids, ["Mass"] * 30, boxes, n_resamples=100).overall.hit_rate
    assert (rate.value, rate.low, rate.high) == (1.0, None, None)
    assert rate.reason == "no interval: every resample gives the same"


def test_the_same_seed_gives_the_same() -> None:
    assert measure(*_single(), n_resamples=60) == measure(*_single(), n_resamples=60)
    assert measure(*_single(), n_resamples=60).overall.iou != measure(*_single(), n_resamples=60, seed=1).overall.iou


# Form


def several() -> Localisation:
    maps, ids, boxes = drawn(60, seed=8)
    findings = [("Nodule", "Mass", "Atelectasis")[i % 3] for i in range(60)]
    heats = [maps[i, "Mass"] for i in ids]
    return measure(dict(zip(zip(ids, findings, strict=True), heats, strict=True)), ids, findings, boxes, n_resamples=80)


def test_overall_is_over_all_cases() -> None:
    result = several()
    assert list(result.findings) == ["Atelectasis", "Mass", "Nodule"]
    for name in ("n", "cases", "boxes", "hits"):
        assert getattr(result.overall, name) == sum(getattr(found, name) for found in result.findings.values())
    values = [found.iou.value for found in result.findings.values()]
    assert result.overall.iou.value == pytest.approx(np.mean([value for value in values if value is not None]))


def test_scale_of_the_coordinates_does_not_matter() -> None:
    maps, ids, findings, boxes = _single()
    whole = measure(maps, ids, findings, boxes, n_resamples=50).overall
    half = measure(maps, ids, findings, boxes / 2, image_side=512, tolerance=7.5, n_resamples=50).overall
    assert half.hits == whole.hits
    assert half.iou.value == pytest.approx(whole.iou.value)
    assert half.chance == pytest.approx(whole.chance)


@given(scale=st.floats(1e-6, 1e6))
@settings(max_examples=10, deadline=None)
def test_scale_of_the_map_does_not_matter(scale: float) -> None:
    box = [(100.0, 100.0, 300.0, 200.0)]
    heat = np.random.default_rng(0).random((7, 7))
    assert one(heat * scale, box).iou.value == pytest.approx(one(heat, box).iou.value, abs=1e-3)


def test_as_dict_is_json() -> None:
    result = several()
    read = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    entry = read["findings"]["Mass"]
    assert (read["tolerance"], read["map_share"], read["iou_levels"]) == (15.0, 0.5, [0.1, 0.25, 0.5, 0.75])
    assert entry["hit_rate"] == result.findings["Mass"].hit_rate.value
    assert entry["hit_rate_low"] == result.findings["Mass"].hit_rate.low
    assert entry["accuracy"]["0.1"]["accuracy"] == result.findings["Mass"].accuracy[0].value
    assert set(read["overall"]) == set(entry)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.seed = 1  # type: ignore[misc]


def test_each_map_is_asked_for_once() -> None:
    class Lazy(dict[tuple[str, str], np.ndarray]):
        asked: list[tuple[str, str]] = []  # noqa: RUF012

        def get(self, key: Any, default: Any = None) -> Any:
            self.asked.append(key)
            return peak(0, 0)

    maps = Lazy()
    measure(maps, ["a", "a", "b"], ["Mass"] * 3, np.array([(0, 0, 9, 9)] * 3), n_resamples=50)
    assert maps.asked == [("a", "Mass"), ("b", "Mass")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_ids": ["a", "b"]}, "do not fit"),
        ({"patients": ["1", "2"]}, "do not fit"),
        ({"xywh": [(0, 0, 0, 5)]}, "have an area"),
        ({"xywh": [(0, np.nan, 5, 5)]}, "finite"),
        ({"tolerance": -1}, "out of range"),
        ({"map_share": 1.0}, "out of range"),
        ({"image_side": 0}, "out of range"),
        ({"maps": {("a", "Mass"): np.zeros((2, 2, 3))}}, r"the map of Mass in a has the shape"),
        ({"maps": {("a", "Mass"): np.full((2, 2), np.nan)}}, "not finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {"maps": {("a", "Mass"): peak(0, 0)}, "image_ids": ["a"], "findings": ["Mass"]}
    given_["xywh"] = [(0, 0, 5, 5)]
    with pytest.raises(ValueError, match=message):
        measure(**{**given_, **change})
