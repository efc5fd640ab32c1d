"""Figures show the numbers in the records they are drawn from."""

from __future__ import annotations

import io
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch
from matplotlib.text import Text
from PIL import Image

from ray_cxr.evaluation.bootstrap import RocBand
from ray_cxr.evaluation.net_benefit import measure_net_benefit
from ray_cxr.evaluation.selective import measure_selection
from ray_cxr.labels import FINDINGS
from ray_cxr.reporting import curve_figures, decision_figures, forest_figures, image_figures, label_figures, plots
from ray_cxr.reporting.cases import Case, Judgement
from ray_cxr.reporting.curve_figures import Panel, Reliability
from ray_cxr.reporting.forest_figures import ForestColumn, ForestRow
from ray_cxr.reporting.plots import Estimate

LONG = "Enlarged_Cardiomediastinum_with_a_tortuous_Aorta"
IMAGE = np.random.default_rng(0).integers(0, 255, (40, 32), dtype=np.uint8)
GRID = np.linspace(0, 1, 11)
BAND = RocBand(GRID, np.clip(GRID - 0.1, 0, 1), np.clip(GRID + 0.2, 0, 1))
PRECISION = Estimate(0.41, 0.36, 0.47)
COUNTS = np.array([[40, 10, 0], [10, 20, 0], [0, 0, 0]])


def panel(finding: str = "Mass", n: int = 200, **more: Any) -> Panel:
    y = (np.arange(n) % 5 == 0).astype(np.uint8)
    s = 1 / (1 + np.exp(-(y + np.random.default_rng(1).normal(size=n) - 2)))
    return replace(Panel(finding, y, s, Estimate(0.76, 0.71, 0.8), Estimate(0.41), (0.7, 0.6, 0.3)), **more)


def reliability_panel(finding: str = "Mass", scale: float = 1.0, **more: Any) -> Reliability:
    predicted, observed = scale * np.array([0.1, 0.3, 0.6]), scale * np.array([0.12, 0.25, 0.7])
    p, error = scale * np.random.default_rng(2).random(300), Estimate(0.031, 0.02, 0.05)
    return replace(Reliability(finding, p, predicted, observed, observed * 0.8, observed * 1.2, error), **more)


RELIABILITY = [reliability_panel(), reliability_panel(LONG, scale=0.01, high=np.array([0.9, 0.005, np.nan]))]
FOREST = [
    ForestRow("Sex", "Female", 1200, (Estimate(0.81, 0.79, 0.83), Estimate(-0.02, -0.05, 0.01))),
    ForestRow("Sex", "Male", 1400, (Estimate(0.80, 0.78, 0.82), Estimate(0.02, -0.01, 0.05))),
    ForestRow("Age", "80 and over", 12, (Estimate(0.82, 0.3, 1.0), None), small=True),
]
COLUMNS = (
    ForestColumn("macro AUROC", 0.805, "all images 0.805"),
    ForestColumn("sensitivity difference", 0.0, "no difference", signed=True),
)


def found(value: float | None, low: float | None = None, high: float | None = None, **more: Any) -> Any:
    """Return a result with an interval, under the names that comparisons, drift and localisation give it."""
    return SimpleNamespace(value=value, difference=value, observed=value, low=low, high=high, **more)


UNDEFINED = found(None, p=None)
MASS, EDEMA = found(0.012, -0.003, 0.027, p=0.11), found(-0.02, -0.03, -0.01, p=0.0004)
PAIRS = {"Mass": MASS, "Hernia": UNDEFINED, "Edema": EDEMA}
DIFFERENCES: Any = SimpleNamespace(macro=found(0.004, 0.001, 0.007, p=0.008), findings=PAIRS)
DRIFT: Any = [
    SimpleNamespace(name=name, observed=observed, expected=expected, verdict=verdict, tolerance=tolerance)
    for name, observed, expected, verdict, tolerance in (
        ("Mass", 0.06, 0.03, "large", 0.0075),
        ("Edema", 0.05, 0.05, "ok", 0.0125),
        ("Hernia", 0.0, 0.004, "inconclusive", 0.01),
        ("Nodule", 0.02, None, "unknown", None),
    )
]
for rate, low, high in zip(DRIFT, (0.02, -0.01, -0.03, None), (0.04, 0.012, 0.02, None), strict=True):
    difference = None if low is None else rate.observed - rate.expected
    vars(rate).update(difference=difference, difference_low=low, difference_high=high)
RATES = {0.1: found(0.6, 0.5, 0.7), 0.25: UNDEFINED, 0.5: found(0.2, 0.1, 0.3), 0.75: UNDEFINED}
ALL_CASES = SimpleNamespace(n=85, hit_rate=found(0.5, 0.4, 0.6), chance=0.07, ceiling=0.9, iou_at_least=RATES)
NODULE = SimpleNamespace(
    n=79, hit_rate=UNDEFINED, chance=None, ceiling=None, iou_at_least=dict.fromkeys(RATES, UNDEFINED)
)
LOCALISATION: Any = SimpleNamespace(findings={"Nodule": NODULE}, overall=ALL_CASES)
JUDGED = (
    Judgement("Mass", True, 0.91, 0.5, True),
    Judgement("Edema", False, 0.3, 0.2, True),
    Judgement("Hernia", True, 0.001, None, None),
)
CASE = Case("a.png", "Mass", JUDGED, True, IMAGE)
OVERLAY = np.repeat(IMAGE[..., None], 3, axis=2)
CASES = [
    replace(CASE, overlay=OVERLAY),
    replace(CASE, image=None, code="truncated", no_overlay="not among the highest"),
]
SCANS = [
    replace(CASE, finding=None, note="PA, F, 58 years"),
    replace(CASE, finding=None, judgements=()),
    replace(CASE, finding=None, judgements=tuple(Judgement(f, True, None, None, None) for f in FINDINGS)),
    replace(CASE, finding=None, image=None, code="truncated", is_labelled=False),
]

ALL: dict[str, Callable[[], Figure]] = {
    "roc": lambda: curve_figures.plot_roc([panel(band=BAND), panel("Edema", n=25_000), panel(LONG)]),
    "precision_recall": lambda: curve_figures.plot_precision_recall([panel(average_precision=PRECISION), panel(LONG)]),
    "reliability": lambda: curve_figures.plot_reliability(RELIABILITY),
    "distributions": lambda: curve_figures.plot_distributions([panel(threshold=0.2), panel(LONG, n=20)]),
    "cooccurrence": lambda: label_figures.plot_cooccurrence(COUNTS, ["Mass", "Edema", LONG], 200),
    "subgroup_forest": lambda: forest_figures.plot_subgroups(FOREST, COLUMNS),
    "compared": lambda: forest_figures.plot_differences(DIFFERENCES),
    "drift": lambda: forest_figures.plot_drift(DRIFT),
    "localisation": lambda: forest_figures.plot_localisation(LOCALISATION),
    "heatmap_examples": lambda: image_figures.draw_heatmaps([("Best", CASES), ("none", []), ("Worst", CASES[:1])]),
    "radiographs": lambda: image_figures.draw_radiographs([("", SCANS)]),
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    return {name: draw() for name, draw in ALL.items()}


def texts(figure: Figure) -> list[str]:
    return [text.get_text().strip() for text in figure.findobj(Text) if text.get_text()]


def all_text(figure: Figure) -> str:
    return "\n".join(texts(figure))


def points(ax: Axes, marker: str) -> list[Line2D]:
    return [line for line in ax.lines if line.get_marker() == marker]


def places(ax: Axes, marker: str) -> list[float]:
    return [float(line.get_xdata()[0]) for line in points(ax, marker)]


def charts(figure: Figure) -> list[Axes]:
    return [ax for ax in figure.axes if ax.get_xlabel()]


@pytest.mark.parametrize("name", ALL)
def test_png_and_svg_are_well_formed(name: str, drawn: dict[str, Figure], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", 40)
    png, svg = plots.encode_figure(drawn[name])
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        np.testing.assert_allclose(image.size, 40 * drawn[name].get_size_inches(), atol=1)
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert b"date" not in svg.lower()


def test_curves_show_bands_and_operating_points(drawn: dict[str, Figure]) -> None:
    with_band, without, _ = drawn["roc"].axes
    (band,) = with_band.findobj(PolyCollection)
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0.0, 1.0)
    assert {(0.5, 0.4), (0.5, 0.7)} <= {(round(x, 6), round(y, 6)) for x, y in corners}
    assert not without.findobj(PolyCollection)
    assert max(len(line.get_xdata()) for line in without.lines) < 2500, "long curves are thinned"
    assert {"95% interval of the curve", "operating point"} <= set(texts(drawn["roc"]))
    plain = all_text(curve_figures.plot_roc([panel(rates=(None, None, None))]))
    assert not [words for words in ("95% interval of the curve", "operating point") if words in plain]
    assert {"average precision 0.410 (0.360–0.470)", "average precision 0.410"} <= set(texts(drawn["precision_recall"]))


def test_reliability_shows_points_and_intervals(drawn: dict[str, Figure]) -> None:
    curve, ax = RELIABILITY[0], drawn["reliability"].axes[0]
    (dots,) = points(ax, "o")
    np.testing.assert_array_equal(dots.get_xdata(), curve.predicted)
    np.testing.assert_array_equal(dots.get_ydata(), curve.observed)
    bars = [path.vertices for path in ax.collections[0].get_paths()]
    np.testing.assert_allclose([bar[0] for bar in bars], np.column_stack([curve.predicted, curve.low]))
    np.testing.assert_allclose([bar[1] for bar in bars], np.column_stack([curve.predicted, curve.high]))
    (steps,) = drawn["reliability"].axes[1].findobj(StepPatch)
    values = steps.get_data().values
    assert values[values >= 1].sum() == len(curve.p)
    assert any("ECE" in text and "0.031 (0.020–0.050)" in text for text in texts(drawn["reliability"]))
    # A rare finding fills its axes.
    ax = drawn["reliability"].axes[2]
    assert ax.get_xlim()[1] == ax.get_ylim()[1] <= 0.02
    (head,) = points(ax, "^")  # its interval extends beyond the frame
    assert list(head.get_xdata()) == [RELIABILITY[1].predicted[0]]
    assert list(head.get_ydata()) == [ax.get_ylim()[1]]


def test_distributions_show_positives_above_negatives_and_the_threshold(drawn: dict[str, Figure]) -> None:
    ax = drawn["distributions"].axes[0]
    up, down = (steps.get_data().values for steps in ax.findobj(StepPatch))
    assert (up.min(), up.max(), down.min()) == (0, 1, -1)
    assert down.max() <= 0
    assert "40 positives, 160 negatives" in all_text(drawn["distributions"])
    (line,) = [line for line in ax.lines if line.get_xdata()[0] == line.get_xdata()[1]]
    assert line.get_xdata()[0] == pytest.approx(math.log(0.2 / 0.8))
    low, high = ax.get_xlim()
    ticks = {tick.get_position()[0]: float(tick.get_text()) for tick in ax.get_xticklabels()}
    assert list(ticks) == pytest.approx([math.log(p / (1 - p)) for p in ticks.values()], abs=1e-9)
    assert low <= min(ticks) <= max(ticks) <= high


def test_no_bar_of_the_scores_stands_on_both_sides_of_the_threshold(drawn: dict[str, Figure]) -> None:
    ax = drawn["distributions"].axes[0]
    (line,) = (line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1)
    steps = [patch.get_data().edges for patch in ax.patches if hasattr(patch, "get_data")]
    assert len(steps) == 2
    for edges in steps:
        assert np.abs(edges - line).min() < 1e-9


def test_distributions_take_scores_of_any_range() -> None:
    usual = panel(n=20)
    odd = [[0.3, 0.3], [0.0, 1.0], [0.4999, 0.5], [1e-9, 2e-9]]
    scores = [20 * usual.s - 7, *(np.array(values)[usual.y] for values in odd)]
    panels = [replace(usual, s=s, threshold=1.5 if s.max() > 1 else None) for s in scores]
    figure = curve_figures.plot_distributions(panels)
    assert "raw score" in texts(figure)
    assert any(line.get_xdata()[0] == 1.5 for line in figure.axes[0].lines)


def test_cooccurrence_shows_counts_and_shares_of_the_row(drawn: dict[str, Figure]) -> None:
    shown = texts(drawn["cooccurrence"])  # in the diagonal: share of all images
    assert {"40\n20%", "10\n25%", "10\n50%", "20\n10%", "0\n0%"} <= set(shown)
    assert shown.count("0\n–") == 2  # a row without images has no shares


def test_forest_shows_every_row_with_its_numbers(drawn: dict[str, Figure]) -> None:
    shown, (first, second) = texts(drawn["subgroup_forest"]), charts(drawn["subgroup_forest"])
    numbers = {"0.810 (0.790–0.830)", "−0.020 (−0.050 to +0.010)"}
    assert {"Sex", "Female", "1,200", "Age", *numbers} <= set(shown)
    assert (shown.count("Sex"), shown.count("undefined")) == (1, 1)
    assert places(first, "o") == [0.81, 0.80, 0.82]
    assert places(second, "o") == [-0.02, 0.02]
    assert any(list(line.get_xdata()) == [0.805, 0.805] for line in first.lines)
    assert "all images 0.805" in shown


def test_forest_marks_small_groups_and_keeps_the_scale_of_the_others(drawn: dict[str, Figure]) -> None:
    ax = charts(drawn["subgroup_forest"])[0]
    *firm, small = points(ax, "o")
    assert (small.get_markerfacecolor(), to_hex(str(small.get_color()))) == ("white", plots.GREY)
    assert all(line.get_markerfacecolor() == plots.BLUE for line in firm)
    low, high = ax.get_xlim()
    assert high - low < 0.15
    assert len(points(ax, "<")) == len(points(ax, ">")) == 1


def test_forest_of_undefined_or_small_groups_is_drawn() -> None:
    undefined = [replace(row, estimates=(None, None)) for row in FOREST]
    assert all_text(forest_figures.plot_subgroups(undefined, COLUMNS)).count("undefined") == 6
    small = forest_figures.plot_subgroups([replace(row, small=True) for row in FOREST], COLUMNS)
    assert len(places(charts(small)[0], "o")) == 3


def test_comparison_shows_differences_and_whether_they_exclude_zero(drawn: dict[str, Figure]) -> None:
    (ax,) = charts(drawn["compared"])
    (diamond,) = points(ax, "D")
    assert (float(diamond.get_xdata()[0]), float(diamond.get_ydata()[0])) == (0.004, 0)  # the macro mean, on top
    faces = {float(line.get_xdata()[0]): line.get_markerfacecolor() for line in points(ax, "o")}
    assert faces == {0.012: "white", -0.02: plots.BLUE}
    for text in ("+0.012 (−0.003 to +0.027), p 0.11", "p < 0.001", "p 0.008", "undefined", "right of 0: these scores"):
        assert text in all_text(drawn["compared"])


def test_drift_draws_the_interval_that_decides(drawn: dict[str, Figure]) -> None:
    (ax,) = charts(drawn["drift"])
    assert places(ax, "D") == [pytest.approx(3.0)]
    assert places(ax, "o") == [pytest.approx(0.0), pytest.approx(-0.4)]
    assert [point.get_markerfacecolor() == "white" for point in points(ax, "o")] == [False, True]
    bars = [list(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] < 3]
    assert [pytest.approx(ends) for ends in ([2, 4], [-1, 1.2], [-3, 2])] == [bar for bar in bars if bar != [0, 0]]
    widths = [patch.get_width() for patch in ax.patches]
    assert widths == pytest.approx([1.5, 2.5, 2.0, 0.0])
    assert {"0%", "0.4%", "unknown", "inconclusive", "very different", "as expected"} <= set(texts(drawn["drift"]))
    assert forest_figures.plot_drift([SimpleNamespace(name="Mass", observed=None)]) is None
    # A row of the table is in the figure too.
    (ax,) = charts(forest_figures.plot_drift([SimpleNamespace(**{**vars(DRIFT[1]), "name": "No_Finding"})]))
    assert len(points(ax, "o")) == 1


def test_localisation_has_a_mark_per_threshold_and_chance(drawn: dict[str, Figure]) -> None:
    hits, overlaps = charts(drawn["localisation"])
    assert (places(hits, "o"), places(overlaps, "o"), places(overlaps, "s")) == ([0.5], [0.6], [0.2])
    assert {"IoU ≥ 0.1", "IoU ≥ 0.5", "chance", "85", "50% (40–60%)"} <= set(texts(drawn["localisation"]))
    for limit in (0.07, 0.9):  # chance and ceiling
        assert sum(list(line.get_xdata()) == [limit, limit] for line in hits.lines) == 1
    without: Any = SimpleNamespace(findings={}, overall=NODULE)
    assert len(charts(forest_figures.plot_localisation(without))) == 1


def test_heat_maps_show_labels_flags_and_reasons(drawn: dict[str, Figure]) -> None:
    figure = drawn["heatmap_examples"]
    shapes = [image.get_array().shape for ax in figure.axes for image in ax.images]
    assert sorted(shapes) == [(1, 64, 3), (40, 32), (40, 32), (40, 32, 3), (40, 32, 3)]
    text = all_text(figure).replace("\n", " ")
    for words in ("Mass p 0.910, threshold 0.500", "Edema no 0.300 0.200 yes", "Hernia yes 0.001 – –", "a.png"):
        assert words in text
    for reason in ("no heat map: not among the highest", "cannot be shown: truncated"):
        assert reason in text
    assert {"Best", "Worst"} <= set(texts(figure))
    assert "none" not in texts(figure), "groups without cases are left out"


def test_radiographs_show_their_labels(drawn: dict[str, Figure]) -> None:
    shown = texts(drawn["radiographs"])
    assert {"a.png\nHernia, Mass\nPA, F, 58 years", "a.png\nno finding", "a.png\nnot labelled"} <= set(shown)
    assert any(text.startswith("a.png\nAtelectasis") for text in shown)


def test_net_benefit_shows_the_curve_and_where_it_is_useful() -> None:
    p = np.random.default_rng(0).beta(1, 6, 3000)
    y = (np.random.default_rng(1).random(3000) < p).astype(np.int8)
    (curve,) = measure_net_benefit(y[:, None], p[:, None], np.arange(3000), n_resamples=50, seed=0)
    figure = decision_figures.plot_net_benefit({"Mass": curve, LONG: replace(curve, benefit=())})
    ax = figure.axes[0]
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), 1000 * curve.model.value)
    low, high = (plots.format_share(limit) for limit in curve.benefit[0])
    assert {f"useful: {low} to {high}", "no benefit shown", "flag all images"} <= set(texts(figure))


def test_selection_shows_rates_over_coverage() -> None:
    p = np.random.default_rng(0).random(1000)
    y, flags = (np.random.default_rng(1).random(1000) < p).astype(np.int8), (p > 0.5).astype(np.int8)
    columns = (part[:, None] for part in (y, p, flags))
    (found,) = measure_selection(*columns, np.arange(1000), n_resamples=50, seed=0)
    figure = decision_figures.plot_selection({"abnormality": found})
    drawn = [line.get_ydata() for line in figure.axes[0].lines]
    for name, line in zip(("error_rate", "sensitivity", "specificity"), drawn, strict=False):
        np.testing.assert_allclose(line, found.curves[name].value)
    assert drawn[3][-1] == pytest.approx(found.all_images["error_rate"])
    share = plots.format_share(found.errors_handed_over.value)
    assert {"Abnormality", f"least certain 10%: {share} of errors"} <= set(texts(figure))
