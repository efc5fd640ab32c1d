"""Optuna's interactive plots, as JSON for a page that also contains the script that draws them."""

from __future__ import annotations

import itertools
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import optuna
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from optuna.trial import FrozenTrial, TrialState

from ray_cxr import extras
from ray_cxr.errors import one_line
from ray_cxr.reporting import plots
from ray_cxr.reporting.search_figures import STYLES

if TYPE_CHECKING:
    import plotly.graph_objects as go

Draw = Callable[[], "go.Figure"]
_log = logging.getLogger(__name__)

#: Maximum number of settings in a readable plot, and number of settings per row.
_MAX_SETTINGS, _ROW = 8, 4
_TIMELINE = {
    "COMPLETE": ("finished", plots.BLUE),
    "PRUNED": ("stopped", plots.ORANGE),
    "FAIL": ("failed", plots.VERMILION),
    # The page is written when no trial runs any more.
    "RUNNING": ("waiting to continue", plots.SKY),
    "WAITING": ("waiting to start", plots.MUTED),
}
_AXIS = {
    "gridcolor": plots.FAINT,
    "linecolor": plots.MUTED,
    "tickcolor": plots.MUTED,
    "ticks": "outside",
    "showline": True,
    "zeroline": False,
    "automargin": True,
    "title": {"standoff": 12},
}
#: The page replaces this and the colours of `plots` by those of its light or dark theme.
_GROUND = "#ffffff"
#: Ends of a scale that is visible on light and dark grounds.
_SCALE = ((0.0, "#3f83d0"), (1.0, "#c96a00"))
_TEMPLATE = {
    "layout": {
        "font": {"family": "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif", "color": plots.INK},
        "colorway": [style.colour for style in STYLES],
        "paper_bgcolor": _GROUND,
        "plot_bgcolor": _GROUND,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
}


class OptunaPlot(NamedTuple):
    """A plot of Optuna as JSON for plotly.js, or the reason why it is missing.

    Height and width are in pixels; on a narrower page the plot scrolls.
    """

    figure: Markup | None
    reason: str | None
    height: int = 0
    width: int = 0


class Chapter(NamedTuple):
    """Optuna's plots of one kind, with a caption."""

    name: str
    title: str
    caption: str
    plots: tuple[OptunaPlot, ...]


class Objective(NamedTuple):
    """An objective as Optuna's plots need it; with a single objective they need no functions.

    `target` returns a trial's value. `loss` returns the value, negated if more is better: Optuna's importances with a
    function show which settings make its values small.
    """

    name: str
    target: Callable[[FrozenTrial], float] | None = None
    loss: Callable[[FrozenTrial], float] | None = None


def format_objective(name: str) -> str:
    """Return an objective's name for readers."""
    return name.replace("_", " ").replace("val auroc", "validation AUROC")


@contextmanager
def silence_optuna() -> Iterator[None]:
    """Suppress Optuna's log and warnings; the page states the same facts."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        optuna.logging.set_verbosity(before)


def copy_study(study: optuna.Study, names: Sequence[str]) -> optuna.Study:
    """Return a copy in memory without users' attributes, which would appear in hover texts."""
    trials = study.get_trials(deepcopy=True)
    for trial in trials:
        trial.user_attrs = {}
    copy = optuna.create_study(directions=study.directions)
    copy.set_metric_names([format_objective(name) for name in names])
    copy.add_trials(trials)
    return copy


def list_objectives(study: optuna.Study, names: Sequence[str]) -> list[Objective]:
    if len(names) == 1:
        return [Objective(format_objective(names[0]))]
    signs = [-1.0 if direction == optuna.study.StudyDirection.MAXIMIZE else 1.0 for direction in study.directions]
    return [
        Objective(format_objective(name), partial(_get_value, index), partial(_get_value, index, sign=sign))
        for index, (name, sign) in enumerate(zip(names, signs, strict=True))
    ]


def _get_value(index: int, trial: FrozenTrial, sign: float = 1.0) -> float:
    return sign * trial.values[index]


def list_finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def draw_chapters(study: optuna.Study, names: Sequence[str]) -> list[Chapter]:
    """Draw Optuna's plots of a `copy_study` in the order of the page; `names` are the objectives."""
    objectives = list_objectives(study, names)
    chapters = [_draw_front(study, objectives)] if len(objectives) > 1 else []
    importances, ranked = _draw_importances(study, objectives)
    top = ranked[:_MAX_SETTINGS]
    note = f" Only the {len(top)} most important of {len(ranked)} settings are shown." if len(ranked) > len(top) else ""
    return [
        *chapters,
        _draw_history(study, objectives),
        importances,
        _draw_parallel(study, objectives, top, note),
        _draw_slices(study, objectives, top, note),
        _draw_intermediate(study, objectives),
        _draw_timeline(study),
    ]


def _draw_front(study: optuna.Study, objectives: Sequence[Objective]) -> Chapter:
    reason = _explain_missing(study, 1)
    if len(objectives) > 3:
        reason = f"Optuna draws fronts of two or three objectives; here are {len(objectives)}."

    def draw() -> go.Figure:
        figure = optuna.visualization.plot_pareto_front(study)
        for trace in figure.data:
            # Optuna's shades by number make the first trials of the front white on white.
            front = "Best Trial" in trace.hovertemplate
            trace.marker = {"color": plots.VERMILION if front else plots.SKY, "size": 10 if front else 6}
            trace.update(name="on the front" if front else "not on it", showlegend=True)
        # Optuna's camera position cuts off the names of the axes.
        return figure.update_layout(scene_camera_eye={"x": 1.8, "y": 1.8, "z": 1.2}) if len(objectives) > 2 else figure

    caption = "Each point is a finished trial; point at it to see its settings."
    return _create_chapter("front", "Pareto front", caption, [_encode(draw, reason, height=460)])


def _draw_history(study: optuna.Study, objectives: Sequence[Objective]) -> Chapter:
    plot, reason = optuna.visualization.plot_optimization_history, _explain_missing(study, 1)

    def draw(objective: Objective) -> go.Figure:
        figure = plot(study, target=objective.target, target_name=objective.name)
        values = [value for trace in figure.data for value in trace.y]
        margin = max(0.08 * (max(values) - min(values)), 0.01 * abs(max(values, key=abs)), 1e-6)
        # plotly's own range for a single value v is v − 1 to v + 1.
        figure.update_yaxes(range=(min(values) - margin, max(values) + margin))
        return figure.update_xaxes(dtick=_choose_step(max(len(study.trials), 1)))

    caption = "The value of each finished trial; stopped and waiting trials have none."
    drawn = [_encode(partial(draw, objective), reason, height=340) for objective in objectives]
    return _create_chapter("optimization", "Optimization history", caption, drawn)


def _draw_importances(study: optuna.Study, objectives: Sequence[Objective]) -> tuple[Chapter, list[str]]:
    """Return the chapter, and all searched settings, the most important first."""
    finished = list_finished(study)
    names = sorted({name for trial in finished for name in trial.params})
    weights = dict.fromkeys(names, 0.0)
    # Optuna recommends five trials above the quantile; its default of a tenth has that many only with fifty trials.
    quantile = min(0.5, max(0.1, 5 / max(1, len(finished))))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
    missing = _explain_missing(study, 2, names)
    if missing is None and all(len({trial.params.get(name) for trial in finished}) == 1 for name in names):
        missing = "Every finished trial has the same settings, so their importance is unknown."
    drawn = []
    for objective in objectives:
        reason, loss = missing, objective.loss
        if reason is None:
            found = optuna.importance.get_param_importances(study, evaluator=evaluator, target=loss)
            weights = {name: weight + found[name] for name, weight in weights.items()}
            if len(found) > 1 and max(found.values()) - min(found.values()) < 1e-9:
                reason = f"By {objective.name}, the finished trials show no setting that matters more than another."
        draw = partial(optuna.visualization.plot_param_importances, study, evaluator)
        plot = partial(draw, target=loss, target_name=objective.name)
        title, height = objective.name if len(objectives) > 1 else "", 110 + 30 * max(2, len(names))
        drawn.append(_encode(_set_titles(plot, "importance", None), reason, height=height, title=title))
    caption = (
        f"How the best {math.ceil(quantile * len(finished)):,} of {len(finished):,} finished trials differ from all of "
        "them (PED-ANOVA); shares add to 1. Stopped trials do not count. A bar shows how much a setting matters, not "
        "which value is good: the plots below show that."
    )
    if len(finished) < 100:
        caption += " With few trials it is only a hint, above all for settings that only some trials have."
    ranked = sorted(names, key=lambda name: (-weights[name], name))
    return _create_chapter("importances", "Which settings matter", caption, drawn), ranked


def _draw_parallel(study: optuna.Study, objectives: Sequence[Objective], names: list[str], note: str) -> Chapter:
    def draw() -> go.Figure:
        figure = optuna.visualization.plot_parallel_coordinate(study, names, target_name=objectives[0].name)
        _recolour_lines(figure)
        return figure.update_traces(opacity=0.9, line_width=1.6, selector={"mode": "lines"})

    reason = _explain_missing(study, 2, names)
    width = 220 + 100 * max(3, len(names))
    drawn = _encode(draw, reason, height=440, width=width, right=130)
    colour = "its rank: 0 is the Pareto front" if len(objectives) > 1 else "its value"
    caption = f"A line is a finished trial; the colour shows {colour}. None: the trial does not have the setting.{note}"
    return _create_chapter("parallel", "Parallel coordinates", caption, [drawn])


def _recolour_lines(figure: go.Figure) -> None:
    """Give lines the colours of `_SCALE`: Optuna computes them from its own scale, which suits a light ground only."""
    bar = next(trace.marker for trace in figure.data if trace.marker and trace.marker.colorscale)
    places, shades = zip(*((place, -sum(_read_colour(colour))) for place, colour in bar.colorscale), strict=True)
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for _, colour in _SCALE]
    for trace in figure.data:
        if trace.mode == "lines":
            share = float(np.interp(-sum(_read_colour(trace.line.color)), shades, places))
            share = 1.0 - share if bar.reversescale else share
            mixed = (low + share * (high - low) for low, high in zip(*ends, strict=True))
            trace.line.color = f"rgb({', '.join(f'{part:.0f}' for part in mixed)})"


def _read_colour(text: str) -> list[float]:
    """Return red, green and blue of `rgb(8, 48, 107)`."""
    return [float(part) for part in re.findall(r"[\d.]+", text)]


def _draw_slices(study: optuna.Study, objectives: Sequence[Objective], names: list[str], note: str) -> Chapter:
    def draw(row: list[str], objective: Objective) -> go.Figure:
        figure = optuna.visualization.plot_slice(study, row, target=objective.target, target_name=objective.name)
        # Only powers of ten: in a narrow plot the ticks between them overlap.
        figure.for_each_xaxis(lambda axis: axis.update(dtick=1, exponentformat="e"), selector={"type": "log"})
        for trace in figure.data:
            if trace.x and all(type(x) is int for x in trace.x):
                step = _choose_step(max(trace.x) - min(trace.x))
                figure.update_layout({(trace.xaxis or "x").replace("x", "xaxis"): {"dtick": step}})
        return figure

    reason = _explain_missing(study, 2, names)
    rows = [names[start : start + _ROW] for start in range(0, max(1, len(names)), _ROW)]
    drawn = [
        _encode(partial(draw, row, objective), reason, height=330, width=150 + 200 * len(row))
        for objective, row in itertools.product(objectives, rows)
    ]
    caption = f"A dot is a finished trial, from blue for early to orange for late ones.{note}"
    return _create_chapter("slice", "Settings one by one", caption, drawn)


def _draw_intermediate(study: optuna.Study, objectives: Sequence[Objective]) -> Chapter:
    reason = None
    if not any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        reason = (
            "With several objectives Optuna accepts no values during training; the curves above show them."
            if len(objectives) > 1
            else "No trial has reported a value during training."
        )

    def draw() -> go.Figure:
        figure = optuna.visualization.plot_intermediate_values(study)
        return figure.update_xaxes(dtick=_choose_step(max(max(trace.x, default=1) for trace in figure.data)))

    plot = _set_titles(draw, "epoch", objectives[0].name)
    caption = "A line is a trial; one that ends early was stopped."
    return _create_chapter("intermediate", "Values during training", caption, [_encode(plot, reason, height=380)])


def _draw_timeline(study: optuna.Study) -> Chapter:
    count = len(study.get_trials(deepcopy=False))

    def draw() -> go.Figure:
        figure = optuna.visualization.plot_timeline(study)
        for trace in figure.data:
            name, colour = _TIMELINE[trace.name]
            # The outline has a fixed width, so that a trial of a few seconds remains visible among hours.
            marker = {"color": colour, "line": {"color": colour, "width": 2}}
            trace.update(name=name, marker=marker, hovertemplate=f"%{{text}}<extra>{name}</extra>")
        return figure.update_yaxes(dtick=_choose_step(count))

    reason = None if count else "No trial was started."
    drawn = _encode(_set_titles(draw, None, "trial"), reason, height=min(900, 150 + 16 * count))
    caption = "When each trial ran, by the clock of the driver's machine."
    return _create_chapter("timeline", "Timeline", caption, [drawn])


def _create_chapter(name: str, title: str, caption: str, drawn: Sequence[OptunaPlot]) -> Chapter:
    """Return a chapter that states each reason for a missing plot once."""
    unique = tuple(plot for index, plot in enumerate(drawn) if plot.figure or plot not in drawn[:index])
    return Chapter(name, title, caption, unique)


def _explain_missing(study: optuna.Study, needed: int, names: Sequence[str] = ("any",)) -> str | None:
    """Return a sentence if fewer trials than `needed` have finished, or if no setting (`names`) was searched."""
    count = len(list_finished(study))
    if count >= needed:
        return None if names else "No finished trial has a setting that was searched."
    trials = "two finished trials" if needed == 2 else "a finished trial"
    return f"This plot needs {trials}; there is {'one' if count == 1 else 'none'}."


def _choose_step(count: int) -> int:
    """Return the step of an axis of whole numbers, so that ticks are whole and at most a dozen."""
    return next(step * 10**power for power in range(9) for step in (1, 2, 5) if 12 * step * 10**power >= count)


def _set_titles(draw: Draw, x: str | None, y: str | None) -> Draw:
    return lambda: draw().update_layout(xaxis_title=x, yaxis_title=y)


def _encode(
    draw: Draw,
    reason: str | None,
    *,
    height: int,
    width: int = 320,
    title: str = "",
    right: int = 20,
) -> OptunaPlot:
    """Draw a plot unless there is a reason against it; an exception of Optuna becomes the reason."""
    if reason is None and not extras.is_installed("plotly"):
        reason = f"Interactive plots: {extras.install_hint('plotly')}"
    if reason is not None:
        return OptunaPlot(None, reason)
    import plotly.io

    try:
        figure = draw()
    except Exception as error:  # a failed plot must not cost the page of a search of days
        _log.debug("a plot failed", exc_info=True)
        return OptunaPlot(None, f"Optuna could not draw this: {type(error).__name__}: {one_line(error)}")
    if not figure.data:
        return OptunaPlot(None, "Optuna found nothing to draw here.")
    for trace in figure.data:
        for style in (getattr(trace, "marker", None), getattr(trace, "line", None)):
            if style is not None and getattr(style, "colorscale", None):
                style.update(colorscale=_SCALE, reversescale=False)
    figure.update_layout(
        template=_TEMPLATE,
        title={"text": title, "font": {"size": 13}} if title else None,
        height=height,
        width=None,  # the width of the page; Optuna's plots can be wider than any screen
        margin={"l": 60, "r": right, "t": 40 if title else 28, "b": 50},
    )
    # Escaped, so that no text can close the element that contains it.
    text = htmlsafe_json_dumps(figure, dumps=plotly.io.to_json, validate=False, engine="json")
    # Optuna shows a categorical value as in Python, in quotes.
    text = Markup(re.sub(r'"\\u0027((?:(?!\\u0027)[^"])*)\\u0027"', r'"\1"', str(text)))
    return OptunaPlot(text, None, height, width)


def load_plotly_script() -> Markup:
    """Return the script that draws the plots."""
    import plotly.offline

    script = str(plotly.offline.get_plotlyjs())
    # It is embedded unescaped, so it must not close its element.
    assert "</script" not in script.lower()
    return Markup(script)
