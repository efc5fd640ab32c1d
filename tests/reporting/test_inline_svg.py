"""Figures in a page: HTML with texts, in the page's colours, panel by panel."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from ray_cxr.reporting import curve_figures, forest_figures, inline_svg, label_figures, plots
from ray_cxr.reporting.curve_figures import Panel
from ray_cxr.reporting.forest_figures import ForestColumn, ForestRow
from ray_cxr.reporting.plots import Estimate

Y = (np.arange(200) % 5 == 0).astype(np.uint8)
S = 1 / (1 + np.exp(-(Y + np.random.default_rng(1).normal(size=200) - 2)))
PANELS = [Panel(name, Y, S, Estimate(0.76, 0.71, 0.8), None, (0.7, 0.6, 0.3)) for name in ("Mass", "Edema", "A < B")]
ROWS = [
    ForestRow("Sex", "Female", 1200, (Estimate(0.81, 0.79, 0.83), Estimate(-0.02, -0.05, 0.01))),
    ForestRow("Age", "80 and over", 12, (Estimate(0.82, 0.3, 1.0), None), small=True),
]
COLUMNS = (ForestColumn("macro AUROC", 0.805, "all images 0.805"), ForestColumn("difference", 0.0, signed=True))
AUROCS = {"Mass": Estimate(0.8, 0.7, 0.9), "Edema": Estimate(0.7)}
COUNTS = np.array([[40, 10], [10, 20]])

#: Figures and the number of their panels in a page.
FIGURES: dict[str, tuple[Callable[[], Figure], int]] = {
    "roc": (lambda: curve_figures.plot_roc(PANELS), 3),
    "learning": (lambda: curve_figures.plot_learning_curves([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.4}]), 3),
    "forest": (lambda: forest_figures.plot_subgroups(ROWS, COLUMNS), 2),
    "auroc": (lambda: curve_figures.plot_aurocs(AUROCS, Estimate(0.75, 0.7, 0.8)), 0),
    "matrix": (lambda: label_figures.plot_cooccurrence(COUNTS, ["Mass", "Edema"], 200), 0),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_in_a_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", 40)
    draw, panels = FIGURES[name]
    figure = draw()
    html = inline_svg.write_figures(tmp_path, [name], {name: figure})[name].html
    root = ElementTree.fromstring(f"<div>{html}</div>")
    written = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
    texts = {text.text for text in written.iter() if text.tag.endswith("}text")}
    assert texts == {text.text for text in root.iter("text")}
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', str(html))) == set(ids)
    for colour in (plots.INK, plots.MUTED, plots.BLUE, "#ffffff"):
        assert colour.lower() not in str(html)
    assert sum(len(list(found)) for found in root.findall("div[@class='panels']")) == panels


def test_radiographs_stay_png(tmp_path: Path) -> None:
    figure, box = plots.create_sheet(1, 1)
    figure.add_axes(box(0, 0, 1, 1)).imshow(np.zeros((4, 4)))
    drawn = inline_svg.write_figures(tmp_path, ["scan"], {"scan": figure})["scan"]
    assert drawn.html is None
    assert drawn.png == (tmp_path / "scan.png").read_bytes()
