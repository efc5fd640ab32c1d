"""Localisation on worked examples, against counted pixels, and against random points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_cxr.data.boxes import read_boxes
from ray_cxr.evaluation import heatmap_regions, localisation, published
from ray_cxr.evaluation.localisation import measure_localisation

SIDE = 1024


def draw_peak(row: int, column: int, side: int = 8) -> np.ndarray:
    heat = np.zeros((side, side))
    heat[row, column] = 1.0
    return heat


def measure(
    maps: dict, ids: list[str], findings: list[str], boxes: np.ndarray, n_resamples: int = 50, **options: Any
) -> localisation.Localisation:
    """Measure images of separate patients."""
    return measure_localisation(maps, ids, findings, boxes, [None] * len(ids), n_resamples=n_resamples, **options)


def measure_image(heat: np.ndarray | None, boxes: list[tuple[float, ...]]) -> localisation.FindingLocalisation:
    """Measure one image and one finding."""
    maps = {} if heat is None else {("a", "Mass"): heat}
    return measure(maps, ["a"] * len(boxes), ["Mass"] * len(boxes), np.array(boxes)).overall


def draw_cases(n: int, seed: int) -> tuple[dict[tuple[str, str], np.ndarray], list[str], list[str], Any]:
    """Draw maps, images, findings and boxes for n images of one finding."""
    rng = np.random.default_rng(seed)
    ids = [f"{i}" for i in range(n)]
    corner = rng.uniform(0, 700, (n, 2))
    boxes = np.hstack([corner, rng.uniform(20, 1000 - corner)])
    return {(i, "Mass"): rng.random((7, 7)) for i in ids}, ids, ["Mass"] * n, boxes


def test_maximum_within_tolerance_of_a_box_is_a_hit() -> None:
    # The cell in row 2, column 5 of 8 has its centre at x = 704, y = 320; the tolerance is 15.
    for box, hit in (
        ((700, 310, 10, 20), 1),
        ((310, 700, 20, 10), 0),  # rows and columns are not swapped
        ((719, 335, 50, 50), 1),
        ((719.5, 335, 50, 50), 0),
        ((719, 335.5, 50, 50), 0),
        ((639, 255, 50, 50), 1),
        ((638.5, 255, 50, 50), 0),
        ((639, 254.5, 50, 50), 0),
    ):
        assert measure_image(draw_peak(2, 5), [box]).hits == hit


def test_hits_of_several_boxes_maxima_and_findings() -> None:
    found = measure_image(draw_peak(2, 5), [(0, 0, 50, 50), (690, 310, 50, 50)])
    assert (found.hits, found.boxes, found.cases) == (1, 2, 1)
    # One of two maxima lies in the box.
    assert measure_image(draw_peak(2, 5) + draw_peak(7, 0), [(690, 310, 50, 50)]).hits == 0.5
    wide = np.zeros((2, 4))
    wide[1, 0] = 1.0  # centre at x = 128, y = 768
    assert measure_image(wide, [(120, 760, 16, 16)]).hits == 1
    # Boxes of another finding or image do not count.
    maps = {("a", "Mass"): draw_peak(2, 5), ("b", "Nodule"): draw_peak(2, 5)}
    boxes = np.array([(0, 0, 50, 50), *[(690, 310, 50, 50)] * 3])
    result = measure(maps, list("aabb"), ["Mass", "Nodule"] * 2, boxes)
    assert (result.findings["Mass"].hits, result.findings["Mass"].missing) == (0, 1)
    assert (result.findings["Nodule"].hits, result.findings["Nodule"].missing) == (1, 1)


def test_overlap_on_exact_regions() -> None:
    # The map has the size of the working grid, so it is not interpolated; a cell is 4 x 4 pixels.
    heat = np.full((256, 256), -5.0)
    heat[10:20, 30:50] = 0.5
    heat[10:20, 30:40] = 1.0
    heat[20:30, 30:50] = 0.49
    for boxes, iou in (
        # The region covers x 120..200, y 40..80 (3,200 pixels); the box covers its right half and as much outside.
        ([(160, 40, 80, 40)], 1600 / 4800),
        ([(120, 40, 80, 40)], 1.0),
        ([(119.5, 39.5, 81, 41)], 3200 / (81 * 41)),  # cuts cells
        ([(120, 40, 50, 40), (150, 40, 50, 40)], 1.0),  # the union of two boxes
        ([(120, -40, 80, 120)], 0.5),  # only the part within the image
    ):
        assert measure_image(heat, boxes).iou.value == pytest.approx(iou, abs=1e-12)


@settings(max_examples=20)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(2, 12)),
    seed=st.integers(0, 10_000),
    boxes=st.lists(st.tuples(*[st.integers(0, 900)] * 2, *[st.integers(1, 124)] * 2), min_size=1, max_size=3),
)
def test_overlap_equals_counted_pixels(shape: tuple[int, int], seed: int, boxes: list[tuple[int, ...]]) -> None:
    heat = np.random.default_rng(seed).random(shape).astype(np.float32)
    grid = cv2.resize(heat.astype(np.float64), (256, 256), interpolation=cv2.INTER_LINEAR)
    level = 0.5 * float(heat.max())
    if np.abs(grid - level).min() < 1e-6:
        return  # OpenCV's weights are float32
    region = np.kron(grid >= level, np.ones((4, 4), dtype=bool))
    boxed = np.zeros((SIDE, SIDE), dtype=bool)
    for x, y, w, h in boxes:
        boxed[y : y + h, x : x + w] = True
    found = measure_image(heat, boxes)
    assert found.iou.value == pytest.approx((region & boxed).sum() / (region | boxed).sum(), abs=1e-9)
    assert found.box_share == pytest.approx(boxed.mean(), abs=1e-9)


def test_shares_count_maps_that_reach_each_level() -> None:
    heat = np.zeros((256, 256))
    heat[:64] = 1.0  # the upper quarter: 0 <= y <= 256
    tall = np.array([(0, 0, 1024, 256.0 / iou) for iou in (1.0, 0.625, 0.3125, 0.25)])
    maps, ids = {(i, "Mass"): heat for i in "abcd"}, list("abcd")
    overall = measure(maps, ids, ["Mass"] * 4, tall).overall
    assert [rate.value for rate in overall.iou_at_least.values()] == [1.0, 1.0, 0.5, 0.25]
    assert overall.iou.value == pytest.approx((1.0 + 0.625 + 0.3125 + 0.25) / 4)


def test_flat_and_missing_maps_are_counted() -> None:
    for heat in (np.zeros((4, 4)), np.full((4, 4), 0.7), -np.eye(4)):
        found = measure_image(heat, [(0, 0, 1024, 1024)])
        assert (found.n, found.flat, found.hits, found.hit_rate.value, found.iou.value) == (1, 1, 0, 0, 0)
    maps, ids, findings, boxes = draw_cases(10, seed=0)
    boxes[:] = (0, 0, 1024, 1024)
    whole = measure(maps, ids, findings, boxes)
    assert whole.notes() == []
    # If all maps hit, all resamples agree: Wilson's lower limit for 10 of 10 patients is n / (n + 1.96^2).
    rate = whole.overall.hit_rate
    assert (rate.value, rate.high, rate.method, rate.reason) == (1.0, 1.0, "wilson", None)
    assert rate.low == pytest.approx(10 / (10 + 1.959964**2))
    for i in range(4):
        del maps[f"{i}", "Mass"]
    maps["9", "Mass"] = np.zeros((4, 4))
    result = measure(maps, ids, findings, boxes)
    found = result.overall
    assert (found.cases, found.n, found.missing, found.hits, found.flat) == (10, 6, 4, 5, 1)
    assert (found.hit_rate.value, found.hit_rate_of_all) == (pytest.approx(5 / 6), 0.5)
    assert ["4 of 10" in result.notes()[0], "1 of 6" in result.notes()[1]] == [True, True]
    found = measure_image(None, [(0, 0, 10, 10)])
    assert (found.n, found.missing, found.hit_rate_of_all, found.chance, found.box_share) == (0, 1, 0, None, None)
    for rate in (found.hit_rate, found.iou, found.tuned_iou, *found.iou_at_least.values()):
        assert (rate.value, rate.low, rate.high, bool(rate.reason)) == (None, None, None, True)
    empty = measure({}, [], [], np.empty((0, 4)))
    assert (empty.findings, empty.overall.cases, empty.overall.hit_rate_of_all, empty.notes()) == ({}, 0, None, [])
    json.dumps(empty.to_json())


def test_chance_equals_the_hit_rate_of_random_points() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, SIDE, (40_000, 2))
    for n in (1, 2, 3):
        corner = rng.uniform(0, 900, (n, 2))
        boxes = np.hstack([corner, rng.uniform(10, 1024 - corner)])
        low, high = boxes[:, :2] - 15, boxes[:, :2] + boxes[:, 2:] + 15
        hits = ((points[:, None] >= low) & (points[:, None] <= high)).all(axis=2).any(axis=1)
        found = measure_image(draw_peak(0, 0), [tuple(box) for box in boxes])
        assert found.chance == pytest.approx(hits.mean(), abs=0.01)  # four standard errors


def test_interval_counts_patients() -> None:
    maps, ids, findings, boxes = draw_cases(60, seed=5)
    once = measure(maps, ids, findings, boxes, n_resamples=300).overall
    p = once.hit_rate.value
    # With one image per patient: close to the normal interval of a share.
    width = once.hit_rate.high - once.hit_rate.low
    assert width == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 60), rel=0.2)
    # A second copy of each patient's image adds no information.
    twice = {(i + copy, "Mass"): maps[i, "Mass"] for i in ids for copy in ("a", "b")}
    names, patients, repeated = [name for name, _ in twice], np.repeat(ids, 2), np.repeat(boxes, 2, axis=0)
    clustered = measure_localisation(twice, names, findings * 2, repeated, patients, n_resamples=300).overall
    assert (clustered.hit_rate.low, clustered.hit_rate.high) == (once.hit_rate.low, once.hit_rate.high)
    assert (once.patients, clustered.patients, clustered.n) == (None, 60, 120)  # without patient ids, and with them
    alone = measure(twice, names, findings * 2, repeated, n_resamples=300).overall.hit_rate
    assert alone.high - alone.low < 0.85 * width
    # Images without a patient id are no patients, even if another patient's id equals the image id.
    maps = {("a", "Mass"): draw_peak(0, 0), ("a", "Nodule"): draw_peak(0, 0), ("b", "Mass"): draw_peak(0, 0)}
    box = np.array([(0, 0, 300, 300)] * 3)
    for patients, count in (([None] * 3, None), (["1"] * 3, 1), ([float("nan")] * 3, None), ([None, None, "a"], 1)):
        found = measure_localisation(maps, ["a", "a", "b"], ["Mass", "Nodule", "Mass"], box, patients)
        assert found.overall.patients == count


def test_results_per_finding_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, ids, _, boxes = draw_cases(60, seed=8)
    findings = [("Zebra", "Nodule", "Mass", "Atelectasis")[i % 4] for i in range(60)]
    maps = {(i, finding): maps[i, "Mass"] for i, finding in zip(ids, findings, strict=True)}
    result = measure(maps, ids, findings, boxes)
    assert list(result.findings) == ["Atelectasis", "Mass", "Nodule", "Zebra"]
    for name in ("n", "cases", "boxes", "hits"):
        assert getattr(result.overall, name) == sum(getattr(found, name) for found in result.findings.values())
    assert result.overall.iou.value == pytest.approx(np.mean([found.iou.value for found in result.findings.values()]))
    mass = result.findings["Mass"]
    assert mass.hit_rate.low <= mass.hit_rate.value <= mass.hit_rate.high
    assert measure(maps, ids, findings, boxes) == result
    assert measure(maps, ids, findings, boxes, seed=1).overall.iou != result.overall.iou
    read = json.loads(json.dumps(result.to_json(), allow_nan=False))
    entry = read["findings"]["Mass"]
    assert (read["tolerance"], read["map_share"], read["iou_levels"]) == (15.0, 0.5, [0.1, 0.25, 0.5, 0.75])
    assert (entry["hit_rate"], entry["hit_rate_low"]) == (mass.hit_rate.value, mass.hit_rate.low)
    assert entry["iou_at_least"]["0.1"]["share"] == mass.iou_at_least[0.1].value
    wang = entry["wang"]["iobb"]["0.25"]
    assert (wang["accuracy"], wang["false_boxes"]) == (
        mass.accuracy["iobb"][0.25].value,
        mass.false_boxes["iobb"][0.25].value,
    )
    assert read["wang"]["published_accuracy"]["iobb"]["Nodule"]["0.1"] == 0.1645
    assert set(read["overall"]) == set(entry)
    # Results do not depend on the scale of coordinates and maps.
    monkeypatch.setattr(localisation, "TOLERANCE", 7.5)
    half = measure({key: 64 * heat for key, heat in maps.items()}, ids, findings, boxes / 2, image_side=512).overall
    expected = (result.overall.hits, result.overall.iou.value, result.overall.chance)
    assert (half.hits, half.iou.value, half.chance) == pytest.approx(expected)


def draw_two_regions() -> np.ndarray:
    """Draw two regions on the working grid of 4 x 4 pixels: x 120..200, y 40..80, and x 600..680, y 400..480."""
    heat = np.zeros((256, 256))
    heat[10:20, 30:50] = 200
    heat[10:20, 30:40] = 255
    heat[100:120, 150:170] = 100
    return heat


def test_boxes_are_drawn_around_regions_at_both_thresholds() -> None:
    drawn = heatmap_regions.draw_boxes(draw_two_regions() / 255, SIDE)
    # Above 60 of 255 both regions, above 180 the first alone.
    first, second = [120, 40, 200, 80], [600, 400, 680, 480]
    assert sorted(drawn.tolist()) == sorted([first, second, first])
    # Diagonal neighbours are separate regions.
    assert len(heatmap_regions.draw_boxes(np.eye(3), SIDE)) == 6
    iobb, iou = heatmap_regions.compare_boxes(np.array([first, second]), np.array([[160, 40, 240, 120]]))
    # The intersection has 40 x 40 pixels, the drawn box 80 x 40, the other 80 x 80.
    assert iobb.ravel().tolist() == [0.5, 0.0]
    assert iou.ravel().tolist() == [1600 / (3200 + 6400 - 1600), 0.0]


def test_boxes_found_and_false_boxes() -> None:
    # IoBB of the first region's two boxes is 0.5 with the first box; the second box is missed.
    found = measure_image(draw_two_regions(), [(160, 40, 80, 80), (0, 900, 50, 50)])
    assert {t: rate.value for t, rate in found.accuracy["iobb"].items()} == {
        0.1: 0.5,
        0.25: 0.5,
        0.5: 0,
        0.75: 0,
        0.9: 0,
    }
    assert {t: rate.value for t, rate in found.false_boxes["iobb"].items()} == {
        0.1: 1,
        0.25: 1,
        0.5: 3,
        0.75: 3,
        0.9: 3,
    }
    assert [rate.value for rate in found.accuracy["iou"].values()] == [0.5, 0, 0, 0, 0, 0, 0]
    assert [rate.value for rate in found.false_boxes["iou"].values()] == [1, 3, 3, 3, 3, 3, 3]
    # A constant added to a map changes no box: it is scaled to 0..255.
    assert measure_image(draw_two_regions() + 50, [(160, 40, 80, 80), (0, 900, 50, 50)]).accuracy == found.accuracy
    # Accuracy counts boxes, false boxes count per case: a flat map finds none and draws none.
    maps = {("a", "Mass"): draw_two_regions(), ("b", "Mass"): np.zeros((7, 7))}
    both = measure(maps, ["a", "b", "b"], ["Mass"] * 3, np.array([(120, 40, 80, 40)] * 3)).overall
    assert (both.accuracy["iobb"][0.9].value, both.false_boxes["iobb"][0.9].value) == (pytest.approx(1 / 3), 0.5)


def test_negative_values_of_a_map_count_as_none() -> None:
    boxes = [(160, 40, 80, 80), (600, 400, 80, 80)]
    heat = draw_two_regions()
    found = measure_image(heat, boxes)
    assert found.tuned_iou.reason == "fewer than two patients"
    heat[200:] = -1000.0
    assert measure_image(heat, boxes) == found


def test_ceiling_is_the_best_hit_rate_of_any_map() -> None:
    # Centres of 7 cells lie at 73.1 + 146.3 k pixels. Boxes of 60 pixels: on a centre, 10 pixels beside, between.
    boxes = np.array([(60, 60, 60, 60), (83.2, 60, 60, 60), (116.3, 60, 60, 60)])
    for column, hits in ((0, 1), (3, 0)):
        maps = {(i, "Mass"): draw_peak(0, column, side=7) for i in "abc"}
        found = measure(maps, list("abc"), ["Mass"] * 3, boxes).overall
        assert (found.ceiling, found.ceiling_inside) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
        assert (found.hit_rate.value, found.hit_rate_inside.value) == (
            pytest.approx(hits * 2 / 3),
            pytest.approx(hits / 3),
        )
    rng = np.random.default_rng(3)
    maps, ids, findings, boxes = draw_cases(40, seed=3)
    # Maps drawn with knowledge of the boxes reach the ceiling, and no map exceeds it.
    best = {key: np.zeros((7, 7)) for key in maps}
    boxes[:, 2:] = rng.uniform(20, 150, (40, 2))
    for i, (left, top, width, height) in zip(ids, boxes, strict=True):
        centre = (np.arange(7) + 0.5) * SIDE / 7
        y, x = ((low - 15 <= centre) & (centre <= low + size + 15) for low, size in ((top, height), (left, width)))
        best[i, "Mass"][np.ix_(y, x)] = 1.0
    found = measure(best, ids, findings, boxes)
    assert 0 < found.overall.hits == sum(heat.any() for heat in best.values()) < 40
    assert found.overall.ceiling == found.overall.hit_rate.value
    assert found.map_shape == (7, 7)


def test_ceiling_of_the_real_boxes(shared: Path) -> None:
    table = read_boxes(str(shared / "nih" / "meta" / "BBox_List_2017.csv.gz"))
    maps = {key: np.zeros((7, 7)) for key in zip(table.image_ids, table.findings, strict=True)}
    found = measure(maps, table.image_ids, table.findings, table.xywh, n_resamples=1)
    nodule = found.findings["Nodule"]
    assert (nodule.n, nodule.ceiling, nodule.ceiling_inside) == (79, 33 / 79, 19 / 79)
    assert found.overall.ceiling == 876 / 984
    # Wang et al. print shares of these numbers of boxes, cut after four digits.
    for finding, result in found.findings.items():
        for accuracy in published.WANG_BOX_ACCURACY.values():
            for printed in accuracy[finding].values():
                assert any(0 <= count / result.boxes - printed < 1.01e-4 for count in range(result.boxes + 1))


def test_threshold_is_tuned_on_other_patients() -> None:
    # The box is where the map has at least 0.6; one patient's box is where it has at least 0.2.
    levels = np.repeat(np.linspace(0.05, 0.95, 10), 26)[:256]
    heat = np.vstack([levels] * 256)
    right, wide = (4.0 * int((levels < level - 1e-9).sum()) for level in (0.65, 0.25))
    ids = [f"{i}" for i in range(20)]
    boxes = np.array([(wide if i == "0" else right, 0, SIDE - (wide if i == "0" else right), SIDE) for i in ids])
    found = measure({(i, "Mass"): heat for i in ids}, ids, ["Mass"] * 20, boxes).overall
    result = measure({(i, "Mass"): heat for i in ids}, ids, ["Mass"] * 20, boxes).findings["Mass"]
    assert len(set(result.tuned_thresholds)) == 1
    assert len(result.tuned_thresholds) == 5
    # All others are measured at the level that fits them exactly; the odd one is not tuned on itself.
    assert found.tuned_iou.value == pytest.approx((19 + (SIDE - right) / (SIDE - wide)) / 20)
    # The threshold of two patients comes from the other one each.
    two = measure({(i, "Mass"): heat for i in "01"}, list("01"), ["Mass"] * 2, boxes[:2]).overall
    assert two.tuned_iou.value == pytest.approx((SIDE - right) / (SIDE - wide))
    alone = measure_image(heat, [(0, 0, 100, 100)]).tuned_iou
    assert (alone.value, alone.reason) == (None, "fewer than two patients")


def test_bad_input_is_refused() -> None:
    for change, part in (
        ({"image_ids": ["a", "b"]}, "do not fit"),
        ({"patients": ["1", "2"]}, "do not fit"),
        ({"xywh": [(0, 0, 0, 5)]}, "area"),
        ({"xywh": [(0, 0, 5, -1)]}, "area"),
        ({"xywh": [(0, np.nan, 5, 5)]}, "finite"),
        ({"maps": {("a", "Mass"): np.zeros((2, 2, 3))}}, "Mass in a"),
        ({"maps": {("a", "Mass"): np.zeros((0, 2))}}, "Mass in a"),
        ({"maps": {("a", "Mass"): np.full((2, 2), np.nan)}}, "not finite"),
    ):
        table: dict[str, Any] = {"image_ids": ["a"], "findings": ["Mass"], "xywh": [(0, 0, 5, 5)], "patients": ["1"]}
        with pytest.raises(ValueError, match=part):
            measure_localisation(**{"maps": {("a", "Mass"): draw_peak(0, 0)}, **table, **change})
