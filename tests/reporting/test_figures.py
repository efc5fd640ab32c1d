"""The report's pictures from outside: records in, figures out that say what they should, in the frame."""

from __future__ import annotations

import ast
import io
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch
from matplotlib.text import Text
from PIL import Image

from ray_cxr.labels import FINDINGS, LABELS
from ray_cxr.reporting import figures, plots
from ray_cxr.reporting.figures import (
    Difference,
    Drift,
    Estimate,
    ForestColumn,
    ForestRow,
    HeatmapExample,
    Localisation,
    Radiograph,
    Reliability,
)

LONG = "Enlarged_Cardiomediastinum_with_a_tortuous_Aorta"
RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 255, (40, 32), dtype=np.uint8)


def panel(finding: str = "Mass", n: int = 200, **more: object) -> plots.Panel:
    y = (np.arange(n) % 5 == 0).astype(np.uint8)
    s = 1 / (1 + np.exp(-(y + np.random.default_rng(1).normal(size=n) - 2)))
    return replace(plots.Panel(finding, y, s, 0.76, 0.71, 0.8, 0.41, (0.7, 0.6, 0.3)), **more)  # type: ignore[arg-type]


def reliability_panel(finding: str = "Mass", scale: float = 1.0) -> Reliability:
    predicted = scale * np.array([0.1, 0.3, 0.6])
    observed = scale * np.array([0.12, 0.25, 0.7])
    p = scale * np.random.default_rng(2).random(300)
    return Reliability(finding, p, predicted, observed, observed * 0.8, observed * 1.2, Estimate(0.031, 0.02, 0.05))


def forest_rows() -> list[ForestRow]:
    return [
        ForestRow("Sex", "Female", 1200, 300, (Estimate(0.81, 0.79, 0.83), Estimate(-0.02, -0.05, 0.01))),
        ForestRow("Sex", "Male", 1400, 310, (Estimate(0.80, 0.78, 0.82), Estimate(0.02, -0.01, 0.05))),
        ForestRow("Age", "80 and over", 12, 3, (Estimate(0.95, 0.3, 1.0), None), small=True),
    ]


COLUMNS = (
    ForestColumn("macro AUROC", 0.805, "all images 0.805"),
    ForestColumn("sensitivity difference", 0.0, "no difference", signed=True),
)


def differences() -> list[Difference]:
    return [
        Difference("Mass", Estimate(0.012, -0.003, 0.027), 0.11),
        Difference("Hernia", None),
        Difference("Edema", Estimate(-0.02, -0.03, -0.01), 0.0004),
        Difference("macro mean", Estimate(0.004, 0.001, 0.007), 0.008, macro=True),
    ]


def drifts() -> list[Drift]:
    return [
        Drift("Mass", Estimate(0.06, 0.05, 0.07), 0.03, True),
        Drift("Edema", Estimate(0.05, 0.03, 0.07), 0.05, False),
        Drift("Hernia", Estimate(0.0, 0.0, 0.002), 0.004, False),
        Drift("Nodule", Estimate(0.02, 0.01, 0.03), None, False),
    ]


def localisations() -> list[Localisation]:
    levels = {0.1: Estimate(0.6, 0.5, 0.7), 0.5: Estimate(0.2, 0.1, 0.3)}
    return [
        Localisation("Mass", 85, Estimate(0.5, 0.4, 0.6), 0.07, levels, {0.1: 0.12}),
        Localisation("Nodule", 79, None, None, {}, {}),
    ]


def example(finding: str, picture: np.ndarray | None = PICTURE) -> plots.Example:
    code = None if picture is not None else "truncated"
    bars = (("Mass", 0.8, 0.5), ("Edema", 0.3, 0.4), ("Hernia", 0.1, None))
    return plots.Example(picture, code, finding, ("Mass", "Edema"), (), bars)


OVERLAY = np.repeat(PICTURE[..., None], 3, axis=2)
TILES = [
    HeatmapExample(example("Mass"), "Mass", OVERLAY, score=0.91),
    HeatmapExample(example("Pleural_Thickening", None), "Pleural_Thickening", None, "not among the highest findings"),
    HeatmapExample(example("Mass"), "Mass", OVERLAY),
    HeatmapExample(example("Mass"), "Mass", OVERLAY),
]
SCANS = [
    Radiograph(PICTURE, None, ("Mass", "Pleural_Thickening"), "PA, F, 58 years"),
    Radiograph(PICTURE, None, ()),
    Radiograph(None, "truncated", None),
]
GRID = np.linspace(0, 1, 11)
BAND = (GRID, np.clip(GRID - 0.1, 0, 1), np.clip(GRID + 0.2, 0, 1))

ALL: dict[str, Callable[[], Figure]] = {
    "roc": lambda: plots.roc([panel(finding, band=BAND) for finding in ("Mass", "Edema", LONG)]),
    "roc of one": lambda: plots.roc([panel(band=BAND)]),
    "precision_recall": lambda: plots.precision_recall([panel(ap_low=0.36, ap_high=0.47), panel(LONG)]),
    "reliability": lambda: figures.reliability([reliability_panel(f) for f in ("Mass", "Edema", LONG)]),
    "reliability of one": lambda: figures.reliability([reliability_panel(scale=0.01)]),
    "distributions": lambda: figures.distributions([panel(threshold=0.2), panel(LONG, n=20)]),
    "cooccurrence": lambda: figures.cooccurrence(np.array([[5, 1], [1, 2]]), ["Mass", LONG], 10),
    "subgroup_forest": lambda: figures.subgroup_forest(forest_rows(), COLUMNS),
    "compared": lambda: figures.compared(differences(), "a system with a name of some length", LONG),
    "drift": lambda: figures.drift(drifts()),
    "localisation": lambda: figures.localisation(localisations()),
    "heatmap_examples": lambda: figures.heatmap_examples([("Best", TILES), ("none", []), ("Worst", TILES[:1])]),
    "radiographs": lambda: figures.radiographs(SCANS),
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    return {name: draw() for name, draw in ALL.items()}


def written(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def said(figure: Figure) -> str:
    return "\n".join(written(figure))


def points(ax: Axes, marker: str) -> list[Line2D]:
    return [line for line in ax.lines if line.get_marker() == marker]


def charts(figure: Figure) -> list[Axes]:
    return [ax for ax in figure.axes if ax.get_xlabel()]


class TestAllFigures:
    @pytest.mark.parametrize("name", ALL)
    def test_png_and_svg_are_well_formed_and_nothing_leaves_the_frame(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plots, "DPI", 60)
        figure = ALL[name]()
        png, svg = plots.encode(figure)
        with Image.open(io.BytesIO(png)) as picture:
            assert picture.format == "PNG"
            np.testing.assert_allclose(picture.size, 60 * figure.get_size_inches(), atol=1)
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert b"date" not in svg.lower()
        box = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
        width, height = figure.get_size_inches()
        assert min(box.x0, box.y0) >= -0.01
        assert box.x1 <= width + 0.01
        assert box.y1 <= height + 0.01

    @pytest.mark.parametrize("name", ["roc of one", "reliability of one", "distributions", "compared", "localisation"])
    def test_key_stands_clear_of_the_rest(self, name: str, drawn: dict[str, Figure]) -> None:
        figure = drawn[name]
        renderer = FigureCanvasAgg(figure).get_renderer()
        (key,) = figure.legends
        for other in (*figure.axes, *(text for text in figure.texts if text.get_text())):
            assert not key.get_window_extent(renderer).overlaps(other.get_tightbbox(renderer)), other

    @pytest.mark.parametrize(
        "figure",
        [
            figures.reliability([]),
            figures.distributions([]),
            figures.cooccurrence(np.zeros((0, 0), dtype=int), [], 0),
            figures.subgroup_forest([], COLUMNS),
            figures.compared([], "a", "b"),
            figures.drift([]),
            figures.localisation([]),
            figures.heatmap_examples([("Best", [])]),
            figures.radiographs([]),
        ],
    )
    def test_nothing_to_draw_is_said(self, figure: Figure) -> None:
        assert said(figure).startswith("Nothing to show: ")
        assert not figure.axes

    @pytest.mark.parametrize("module", [plots, figures])
    def test_no_state_is_shared(self, module: object) -> None:
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))  # type: ignore[attr-defined]
        names = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not {name for name in names if "pyplot" in name or "rcParams" in name or "rc_context" in name}

    def test_greyed_text_can_be_read(self) -> None:
        """Contrast with white of at least 4.5 to 1, as WCAG 2 asks of text."""
        assert 1.05 / (figures._luminance([int(plots.GREY[i : i + 2], 16) / 255 for i in (1, 3, 5)]) + 0.05) >= 4.5


class TestCurves:
    def test_band_is_drawn_where_given(self) -> None:
        with_band, without = plots.roc([panel(band=BAND), panel()]).axes
        (band,) = with_band.findobj(PolyCollection)
        corners = band.get_paths()[0].vertices
        assert corners[:, 1].min() == 0.0
        assert corners[:, 1].max() == 1.0
        assert {(0.5, 0.4), (0.5, 0.7)} <= {(round(x, 6), round(y, 6)) for x, y in corners}
        assert not without.findobj(PolyCollection)

    def test_key_names_what_is_there(self) -> None:
        assert "95% interval of the curve" in said(plots.roc([panel(band=BAND)]))
        plain = said(plots.roc([panel(at=None)]))
        assert "95% interval of the curve" not in plain
        assert "operating point" not in plain

    def test_interval_of_average_precision_is_in_the_title_where_given(self) -> None:
        texts = written(plots.precision_recall([panel(ap_low=0.36, ap_high=0.47), panel()]))
        assert "average precision 0.410 (0.360–0.470)" in texts
        assert "average precision 0.410" in texts

    def test_long_curves_are_thinned(self) -> None:
        _, svg = plots.encode(plots.roc([panel(n=25_000)]))
        assert len(svg) < 80_000

    def test_empty_grid_is_a_figure(self) -> None:
        assert plots.roc([]).axes == []


class TestReliability:
    def test_points_and_intervals_are_the_given_ones(self) -> None:
        one = reliability_panel()
        ax = figures.reliability([one]).axes[0]
        (dots,) = points(ax, "o")
        np.testing.assert_array_equal(dots.get_xdata(), one.predicted)
        np.testing.assert_array_equal(dots.get_ydata(), one.observed)
        bars = [path.vertices for path in ax.collections[0].get_paths()]
        np.testing.assert_allclose([bar[0] for bar in bars], np.column_stack([one.predicted, one.low]))
        np.testing.assert_allclose([bar[1] for bar in bars], np.column_stack([one.predicted, one.high]))

    def test_one_panel_has_a_curve_and_a_histogram_of_all_predictions(self) -> None:
        one = reliability_panel()
        square, flat = figures.reliability([one]).axes
        assert square.get_xlim() == square.get_ylim() == flat.get_xlim()
        (steps,) = flat.findobj(StepPatch)
        values = steps.get_data().values
        assert values[values >= 1].sum() == len(one.p)

    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=10, unique=True))
    @settings(max_examples=40, deadline=None)
    def test_axes_hold_all_points(self, rows: list[tuple[float, float, float]]) -> None:
        predicted, observed, high = map(np.array, zip(*rows, strict=True))
        end = figures._end(Reliability("Mass", predicted, predicted, observed, observed, high, None))
        assert max(predicted.max(), observed.max()) <= end <= 1

    def test_rare_findings_fill_their_axes(self) -> None:
        figure = figures.reliability([reliability_panel(scale=0.01)])
        assert figure.axes[0].get_xlim()[1] <= 0.02
        assert "calibrated probability (root scale to 1%)" in written(figure)

    def test_interval_beyond_the_frame_ends_in_an_arrow_head(self) -> None:
        one = replace(reliability_panel(scale=0.01), high=np.array([0.9, 0.005, np.nan]))
        ax = figures.reliability([one]).axes[0]
        (head,) = points(ax, "^")
        assert list(head.get_xdata()) == [one.predicted[0]]
        assert list(head.get_ydata()) == [ax.get_ylim()[1]]

    def test_error_is_in_the_title(self) -> None:
        assert "ECE 0.031 (0.020–0.050)" in written(figures.reliability([reliability_panel()]))
        assert "ECE undefined" in written(figures.reliability([replace(reliability_panel(), error=None)]))


class TestDistributions:
    def test_positives_rise_and_negatives_hang(self) -> None:
        one = panel()
        (ax,) = figures.distributions([one]).axes
        up, down = (steps.get_data().values for steps in ax.findobj(StepPatch))
        assert (up.min(), up.max()) == (0, 1)
        assert down.min() == -1
        assert down.max() <= 0
        assert "40 positives, 160 negatives" in said(ax.figure)  # type: ignore[arg-type]

    def test_threshold_stands_on_the_logit_axis(self) -> None:
        (ax,) = figures.distributions([panel(threshold=0.2)]).axes
        (line,) = [line for line in ax.lines if line.get_xdata()[0] == line.get_xdata()[1]]
        assert line.get_xdata()[0] == pytest.approx(math.log(0.2 / 0.8))
        low, high = ax.get_xlim()
        for tick in ax.get_xticklabels():
            assert low <= tick.get_position()[0] <= high
            p = float(tick.get_text())
            assert tick.get_position()[0] == pytest.approx(math.log(p / (1 - p)), abs=1e-9)

    def test_scores_outside_zero_to_one_have_a_plain_axis(self) -> None:
        one = panel()
        figure = figures.distributions([replace(one, s=20 * one.s - 7, threshold=1.5)])
        assert "raw score" in written(figure)
        assert any(line.get_xdata()[0] == 1.5 for line in figure.axes[0].lines)

    @pytest.mark.parametrize("values", [[0.3, 0.3], [0.0, 1.0], [0.4999, 0.5], [1e-9, 2e-9]])
    def test_odd_scores_are_drawn(self, values: list[float]) -> None:
        one = panel(n=20)
        figure = figures.distributions([replace(one, s=np.array(values)[one.y])])
        assert len(plots.encode(figure)[0]) > 1000


class TestCooccurrence:
    COUNTS = np.array([[40, 10, 0], [10, 20, 0], [0, 0, 0]])

    def test_cells_tell_count_and_share_of_the_row(self) -> None:
        texts = written(figures.cooccurrence(self.COUNTS, ["Mass", "Edema", "Hernia"], 200))
        # The diagonal: of all images.
        for cell in ("40\n20%", "10\n25%", "10\n50%", "20\n10%", "0\n0%"):
            assert cell in texts

    def test_row_without_images_has_no_share(self) -> None:
        texts = written(figures.cooccurrence(self.COUNTS, ["Mass", "Edema", "Hernia"], 200))
        assert texts.count("0\n–") == 2

    def test_all_of_fifteen_cells_a_side_are_there(self) -> None:
        texts = written(figures.cooccurrence(np.arange(225).reshape(15, 15) + 1, LABELS, 1000))
        assert sum("\n" in text and "%" in text for text in texts) == 225

    def test_another_shape_is_refused(self) -> None:
        with pytest.raises(ValueError, match="for 2 findings"):
            figures.cooccurrence(self.COUNTS, ["Mass", "Edema"], 200)


class TestForest:
    def test_every_row_is_written_with_its_numbers(self, drawn: dict[str, Figure]) -> None:
        texts = [text.strip() for text in written(drawn["subgroup_forest"])]
        for text in ("Sex", "Female", "1,200", "300", "0.810 (0.790–0.830)", "−0.020 (−0.050 to +0.010)", "Age"):
            assert text in texts
        assert texts.count("Sex") == 1

    def test_points_stand_at_their_values(self, drawn: dict[str, Figure]) -> None:
        first, second = charts(drawn["subgroup_forest"])
        assert [float(line.get_xdata()[0]) for line in points(first, "o")] == [0.81, 0.80, 0.95][
            : len(points(first, "o"))
        ]
        assert [float(line.get_xdata()[0]) for line in points(second, "o")] == [-0.02, 0.02]

    def test_small_groups_are_grey_and_hollow_not_hidden(self) -> None:
        rows = forest_rows()
        rows[2] = replace(rows[2], estimates=(Estimate(0.82, 0.3, 1.0), None))
        figure = figures.subgroup_forest(rows, COLUMNS)
        *firm, small = points(charts(figure)[0], "o")
        assert small.get_xdata()[0] == 0.82
        assert small.get_markerfacecolor() == "white"
        assert to_hex(str(small.get_color())) == plots.GREY
        assert all(line.get_markerfacecolor() == plots.BLUE for line in firm)
        assert "small group: do not lean on it" in written(figure)
        (label,) = [text for text in figure.findobj(Text) if text.get_text().strip() == "80 and over"]
        assert label.get_color() == plots.GREY

    def test_small_groups_do_not_squeeze_the_others(self, drawn: dict[str, Figure]) -> None:
        ax = charts(drawn["subgroup_forest"])[0]
        low, high = ax.get_xlim()
        assert high - low < 0.15
        assert len(points(ax, "<")) == len(points(ax, ">")) == 1

    def test_undefined_is_a_word_without_a_point(self, drawn: dict[str, Figure]) -> None:
        assert written(drawn["subgroup_forest"]).count("undefined") == 1

    def test_reference_has_its_line_and_name(self, drawn: dict[str, Figure]) -> None:
        ax = charts(drawn["subgroup_forest"])[0]
        assert any(list(line.get_xdata()) == [0.805, 0.805] for line in ax.lines)
        assert "all images 0.805" in written(drawn["subgroup_forest"])

    def test_all_undefined_or_all_small_is_drawn(self) -> None:
        rows = [replace(row, estimates=(None, None)) for row in forest_rows()]
        assert said(figures.subgroup_forest(rows, COLUMNS)).count("undefined") == 6
        rows = [replace(row, small=True) for row in forest_rows()]
        assert len(plots.encode(figures.subgroup_forest(rows, COLUMNS))[0]) > 1000

    def test_one_estimate_per_column_is_asked_for(self) -> None:
        with pytest.raises(ValueError, match="one per column"):
            figures.subgroup_forest(forest_rows(), COLUMNS[:1])


class TestCompared:
    def test_macro_mean_stands_on_top(self, drawn: dict[str, Figure]) -> None:
        (ax,) = charts(drawn["compared"])
        (diamond,) = points(ax, "D")
        assert (float(diamond.get_xdata()[0]), float(diamond.get_ydata()[0])) == (0.004, 0)

    def test_mark_is_hollow_where_the_interval_holds_zero(self, drawn: dict[str, Figure]) -> None:
        (ax,) = charts(drawn["compared"])
        faces = {float(line.get_xdata()[0]): line.get_markerfacecolor() for line in points(ax, "o")}
        assert faces == {0.012: "white", -0.02: plots.BLUE}

    def test_zero_is_in_the_middle(self, drawn: dict[str, Figure]) -> None:
        low, high = charts(drawn["compared"])[0].get_xlim()
        assert low == -high

    def test_numbers_and_sides_are_written(self, drawn: dict[str, Figure]) -> None:
        text = said(drawn["compared"])
        assert "+0.012 (−0.003 to +0.027), p 0.11" in text
        assert "p < 0.001" in text
        assert "undefined" in text
        assert "right of 0: a system with a name" in text


class TestDrift:
    def test_shape_says_what_is_beyond_chance(self, drawn: dict[str, Figure]) -> None:
        (ax,) = charts(drawn["drift"])
        assert [float(line.get_xdata()[0]) for line in points(ax, "D")] == [2.0]
        (within,) = points(ax, "o")
        assert within.get_xdata()[0] == 1.0
        assert within.get_markerfacecolor() == "white"

    def test_axis_is_a_ratio_around_one(self, drawn: dict[str, Figure]) -> None:
        (ax,) = charts(drawn["drift"])
        low, high = ax.get_xlim()
        assert ax.get_xscale() == "log"
        assert low * high == pytest.approx(1)
        assert {"× 1/2", "× 1", "× 2"} <= {tick.get_text() for tick in ax.get_xticklabels()}

    def test_no_flags_are_an_arrow_head_and_words(self, drawn: dict[str, Figure]) -> None:
        (ax,) = charts(drawn["drift"])
        (head,) = points(ax, "<")
        assert head.get_ydata()[0] == 2
        assert {"none flagged", "0%", "0.4%"} <= set(written(drawn["drift"]))

    def test_unknown_expectation_has_no_ratio(self, drawn: dict[str, Figure]) -> None:
        assert {"not known", "no ratio"} <= set(written(drawn["drift"]))
        zero = figures.drift([Drift("Mass", Estimate(0.1, 0.05, 0.15), 0.0, True)])
        assert "no ratio" in written(zero)

    @given(st.floats(1e-4, 1e3), st.floats(1.0, 1e3))
    @settings(max_examples=25, deadline=None)
    def test_point_is_always_inside(self, ratio: float, reach: float) -> None:
        expected = 1e-4
        observed = Estimate(ratio * expected, ratio * expected / reach, ratio * expected * reach)
        (ax,) = charts(figures.drift([Drift("Mass", observed, expected, True)]))
        low, high = ax.get_xlim()
        assert low < points(ax, "D")[0].get_xdata()[0] < high


class TestLocalisation:
    def test_each_threshold_has_its_mark(self, drawn: dict[str, Figure]) -> None:
        hits, found = charts(drawn["localisation"])
        assert [float(line.get_xdata()[0]) for line in points(hits, "o")] == [0.5]
        assert [float(line.get_xdata()[0]) for line in points(found, "o")] == [0.6]
        assert [float(line.get_xdata()[0]) for line in points(found, "s")] == [0.2]
        assert {"T = 0.1", "T = 0.5", "chance", "85", "50% (40–60%)"} <= set(written(drawn["localisation"]))

    def test_chance_is_drawn_where_known(self, drawn: dict[str, Figure]) -> None:
        for ax, chance in zip(charts(drawn["localisation"]), (0.07, 0.12), strict=True):
            assert sum(list(line.get_xdata()) == [chance, chance] for line in ax.lines) == 1

    def test_without_thresholds_one_chart_is_left(self) -> None:
        assert len(charts(figures.localisation([Localisation("Mass", 3, Estimate(0.5), None, {}, {})]))) == 1


class TestPages:
    def test_tile_has_picture_heat_map_and_bars(self, drawn: dict[str, Figure]) -> None:
        figure = drawn["heatmap_examples"]
        assert len(figure.axes) == 3 * 5
        assert sum(bool(ax.images) for ax in figure.axes) == 2 * 4
        shapes = [image.get_array().shape for ax in figure.axes for image in ax.images]
        assert shapes.count((40, 32)) == shapes.count((40, 32, 3)) == 4

    def test_tile_tells_true_and_predicted(self, drawn: dict[str, Figure]) -> None:
        text = said(drawn["heatmap_examples"])
        assert "label: Mass, Edema\nflags: none" in text
        assert "heat map: Mass, p 0.91" in text

    def test_what_is_missing_says_why(self, drawn: dict[str, Figure]) -> None:
        text = said(drawn["heatmap_examples"]).replace("\n", " ")
        assert "cannot be shown: truncated" in text
        assert "no heat map: not among the highest findings" in text

    def test_groups_without_tiles_are_left_out(self, drawn: dict[str, Figure]) -> None:
        assert {"Best", "Worst"} <= set(written(drawn["heatmap_examples"]))
        assert "none" not in written(drawn["heatmap_examples"])

    def test_radiographs_have_their_labels(self, drawn: dict[str, Figure]) -> None:
        texts = written(drawn["radiographs"])
        assert "Mass, Pleural Thickening\nPA, F, 58 years" in texts
        assert "no finding" in texts
        assert "not labelled" in texts
        assert "cannot be shown:\ntruncated" in texts

    def test_many_findings_are_cut_to_two_lines(self) -> None:
        (caption,) = [
            t for t in written(figures.radiographs([Radiograph(PICTURE, None, FINDINGS)])) if "Atelectasis" in t
        ]
        assert caption.endswith(" …")
        assert caption.count("\n") == 1


@pytest.mark.parametrize(
    ("estimate", "how", "text"),
    [
        (Estimate(0.8123, 0.79, 0.8314), {}, "0.812 (0.790–0.831)"),
        (Estimate(0.8123), {}, "0.812"),
        (Estimate(0.0123, -0.003, 0.027), {"signed": True}, "+0.012 (−0.003 to +0.027)"),
        (Estimate(0.81, 0.79, 0.83), {"percent": True}, "81% (79–83%)"),
    ],
)
def test_estimates_are_written(estimate: Estimate, how: dict[str, bool], text: str) -> None:
    assert estimate.written(**how) == text
