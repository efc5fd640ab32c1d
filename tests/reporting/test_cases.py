"""Radiographs in a report: which cases it shows, their texts, boxes and heat maps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.patches import Rectangle
from PIL import Image
from score_archive import FEW, Archive, Report, add_heatmaps, report, write_boxes

from ray_cxr.config import InputSpec
from ray_cxr.imaging.overlays import WHOLE, HeatMap, compute_area
from ray_cxr.imaging.resize import resize
from ray_cxr.imaging.sandbox import Decoder
from ray_cxr.labels import FINDINGS
from ray_cxr.reporting import cards, examples, image_figures
from ray_cxr.reporting.cases import Box, Case, CaseBuilder, HeatMapReader, Judgement, add_heatmap, format_p
from ray_cxr.reporting.evaluation_set import join_labels
from ray_cxr.reporting.scores import read_scores

BOX = (256, 128, 512, 256)  # of an image of 1024 pixels


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report with cards; 15 images have a heat map of Effusion, a box for it, and one for Hernia."""
    home = tmp_path_factory.mktemp("boxed")
    archive = Archive(home / "archive")
    scores, rows = archive.scores(), np.flatnonzero(archive.tested)[3:63:4]
    add_heatmaps(scores, archive, rows, hits=set(rows[::2].tolist()))
    boxes = (("Effusion", *BOX), ("Hernia", 0, 0, 102.4, 102.4))
    path = write_boxes(home / "boxes.csv", [[archive.ids[i], *box] for i in rows for box in boxes])
    return report(archive, home / "out", scores=scores, labels=archive.labels(), split="test", boxes=path, cases=True)


def read_cards(page: str, section: str) -> list[str]:
    found = page.partition(f'<h2 id="{section}"')[2].partition("<h2 ")[0]
    return re.findall(r"<article .*?</article>", found, re.DOTALL)


def test_a_card_names_image_finding_probability_and_what_labels_and_model_state(boxed: Report) -> None:
    archive = boxed.archive
    shown = read_cards(boxed.page, "examples")
    assert len(shown) >= 6
    for card in shown:
        row = archive.ids.index(re.search(r'class="id">([^<]+)<', card)[1])
        finding = re.search(r"<h4>([^<]+)</h4>", card)[1]
        p = archive.p[finding][row]
        assert f"<td>{p:.3f}</td><td>0.300</td>" in card or p < 0.001
        lines = re.findall(
            r'<th scope="row">(\w+)</th><td>(\w+)</td><td>([\d.< ]+)</td>.*?<td[^>]*>(\w+)</td></tr>', card
        )
        names = [line[0] for line in lines]
        positive, flagged = ({f for f in FEW if values[f][row]} for values in (archive.y, _flags(archive)))
        assert (names[0], set(names)) == (finding, {finding} | positive | flagged)
        assert names[1:] == [f for f in FINDINGS if f in names[1:]]
        assert {line[0] for line in lines if line[1] == "yes"} == positive
        assert {line[0] for line in lines if line[3] == "yes"} == flagged


def _flags(archive: Archive) -> dict[str, np.ndarray]:
    return {f: archive.p[f] >= archive.threshold for f in FEW}


def test_boxes_are_drawn_on_radiograph_and_heat_map_of_boxed_cases(boxed: Report) -> None:
    shown = read_cards(boxed.page, "localisation")
    assert shown
    for card in shown:
        places = re.findall(r'class="mark" style="left:([\d.]+)%;top:([\d.]+)%;width:([\d.]+)%;height:([\d.]+)%"', card)
        images = card.count("<img ")
        assert images == 2
        assert card.count('class="mark other"') == card.count("<span>Hernia</span>") == images
        assert [tuple(map(float, place)) for place in places] == [(25.0, 12.5, 50.0, 25.0)] * images
    assert "linear-gradient(90deg, rgb(" in boxed.page, "the colour key"
    ids = set(re.findall(r'<a class="image" id="([^"]+)"', boxed.page))
    assert ids <= set(re.findall(r'href="#([^"]+)"', boxed.page))


@pytest.mark.parametrize("aspect", ["stretch", "pad", "crop"])
@pytest.mark.parametrize("shape", [(600, 400), (300, 500)])
def test_box_and_heat_map_of_one_place_cover_the_same_pixels(aspect: str, shape: tuple[int, int]) -> None:
    """The map is the model's input of an image that is bright in the box, so its colours must lie in the box."""
    height, width = shape
    image = np.zeros(shape, np.uint8)
    top, left, bottom, right = (
        int(share * side) for share, side in zip((0.4, 0.35, 0.6, 0.6), (height, width) * 2, strict=True)
    )
    image[top:bottom, left:right] = 255
    box = Box("Mass", WHOLE._replace(top=top / height, left=left / width, bottom=bottom / height, right=right / width))
    spec = InputSpec(size=64, aspect=aspect)
    cells = resize(image, spec).astype(np.float32)
    heatmap = HeatMap("a", "Mass", 1, 0.5, cells, compute_area(spec, *shape), shape, None)
    case = add_heatmap(replace(CASE, image=np.zeros(shape, np.uint8), boxes=(box,)), heatmap)
    assert case.overlay is not None
    rows, columns = np.nonzero(case.overlay.sum(axis=2) > 120)
    (mark,) = cards.list_marks(case)
    found = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
    expected = [mark.left, mark.top, mark.left + mark.width, mark.top + mark.height]
    np.testing.assert_allclose(100 * np.array(found), expected, atol=2.5)

    figure = image_figures.draw_heatmaps([("Best", [case])])
    drawn = [patch for ax in figure.axes for patch in ax.patches if isinstance(patch, Rectangle)]
    assert len(drawn) == 2
    for patch in drawn:
        np.testing.assert_allclose(patch.get_xy(), (left - 0.5, top - 0.5), atol=1e-6)
        assert (patch.get_width(), patch.get_height()) == pytest.approx((right - left, bottom - top))


CASE = Case("a", "Mass", (Judgement("Mass", True, 0.8, 0.5, True),), True, None, "missing")


def test_overlays_of_earlier_versions_stand_in_for_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    cells, pixels = np.eye(4, dtype=np.float32), np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.Mass.png")
    heatmap = HeatMap("a", "Mass", 1, 0.5, cells, WHOLE, (8, 8), tmp_path / "a.Mass.png")
    np.testing.assert_array_equal(add_heatmap(CASE, heatmap).overlay, pixels)
    for changed in (replace(heatmap, overlay=tmp_path / "b.jpg"), replace(heatmap, overlay=None), None):
        case = add_heatmap(CASE, changed)
        assert (case.overlay, bool(case.no_overlay)) == (None, True)


@pytest.mark.slow
def test_heat_maps_are_of_cases_that_have_one(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "archive")
    scores, rows = archive.scores(), np.flatnonzero(archive.tested)
    add_heatmaps(scores, archive, rows[rows % 4 == 0], hits=set())
    table, images = read_scores(scores), join_labels(read_scores(scores), archive.labels(), "test")
    with Decoder([None]) as decoder:
        bands = examples.select_heatmaps(table, images, CaseBuilder(table, {}, decoder), HeatMapReader(table))
    cases = [case for _, found in bands for case in found]
    assert len(cases) >= 6
    assert all(case.overlay is not None and case.finding == "Effusion" for case in cases)
    part = Path(scores) / "heatmaps" / "part-00000.parquet"
    maps = pq.read_table(part)
    cells = pa.array([[0.0] * 16] * len(maps), maps.schema.field("map").type)
    pq.write_table(maps.set_column(maps.column_names.index("map"), "map", cells), part)
    with Decoder([None]) as decoder:
        bands = examples.select_heatmaps(table, images, CaseBuilder(table, {}, decoder), HeatMapReader(table))
    assert [found for _, found in bands] == [[], [], []]
    pq.write_table(maps.set_column(1, "finding", pa.array(["Pneumonia"] * len(maps))), part)
    written = report(archive, tmp_path / "out", scores=scores, labels=archive.labels(), split="test", cases=True)
    assert not read_cards(written.page, "heatmaps")
    assert '<h2 id="heatmaps">' in written.page


def test_a_probability_and_its_threshold_look_equal_only_if_they_are() -> None:
    for p, threshold in ((0.1304, 0.1301), (0.15826, 0.15832), (0.0004, 0.00041), (0.99961, 0.99987)):
        shown, limit = format_p(p, threshold), format_p(threshold, p)
        assert (float(shown) < float(limit)) == (p < threshold)
    assert format_p(0.25, 0.25) == format_p(0.25, 0.5) == format_p(0.25) == "0.250"
    assert (format_p(0.0002, 0.5), format_p(None, 0.5)) == ("< 0.001", "–")
