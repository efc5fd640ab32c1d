"""The page of a hyper-parameter search: what was tried, what was found, and how far to believe it.

The page holds Optuna's own plots with the script that draws them, so it opens without a network. They are drawn
from a copy of the study in memory: a database is read once, and what trials carry besides numbers stays out.
"""

from __future__ import annotations

import logging
import math
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from ray_cxr import extras
from ray_cxr.errors import OutputError
from ray_cxr.reporting import html, plots
from ray_cxr.storage import atomic

if TYPE_CHECKING:
    import plotly.graph_objects as go

_log = logging.getLogger(__name__)

_PICTURES = ("history", "backbones", "curves")
_PARAM = "param_"
_STATES = ("finished", "stopped", "failed", "running")
#: Parameters that a plot can show before it is too wide to read, and those that stand in one row.
_MOST, _ROW = 8, 4
# With the plots' own colours, their markers and lines: a third way to tell backbones apart, after hue and lightness.
_LOOKS = (
    (plots.BLUE, "o", "-"),
    (plots.VERMILION, "s", "--"),
    (plots.GREEN, "^", "-."),
    (plots.ORANGE, "D", ":"),
    ("#CC79A7", "v", (0, (5, 1))),
    (plots.SKY, "P", (0, (3, 1, 1, 1))),
    (plots.INK, "h", (0, (1, 1))),
)
_TIMELINE = {
    "COMPLETE": ("finished", plots.BLUE),
    "PRUNED": ("stopped", plots.ORANGE),
    "FAIL": ("failed", plots.VERMILION),
    "RUNNING": ("running", plots.SKY),
    "WAITING": ("waiting", plots.MUTED),
}


@dataclass(frozen=True)
class Trial:
    """One row of the table of trials, None for what is not there.

    Attributes:
        number, state, reason, backbone, epochs, best_epoch, val_auroc, images_per_second, calibration_error,
            seconds, started, restarts: as `write_search_page` takes them.
        params: value by name of what was searched, the backbone left out; only those that the trial has.
        curve: (epoch, validation AUROC) of the epochs whose AUROC is defined, in order.
    """

    number: int
    state: str
    reason: str | None
    backbone: str
    epochs: int
    best_epoch: int | None
    val_auroc: float | None
    images_per_second: float | None
    calibration_error: float | None
    seconds: float | None
    started: pd.Timestamp | None
    restarts: int
    params: Mapping[str, Any]
    curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Drawing:
    """One of Optuna's plots, or why there is none.

    Attributes:
        figure: JSON for plotly.js, or None.
        reason: a sentence where there is no figure.
        height, width: pixels; narrower than `width` it scrolls.
    """

    figure: Markup | None
    reason: str | None
    height: int = 0
    width: int = 0


@dataclass(frozen=True)
class Chapter:
    """Optuna's plots of one kind, with what to read from them."""

    name: str
    title: str
    caption: str
    drawings: tuple[Drawing, ...]


def write_search_page(
    out: Path,
    study: optuna.Study,
    trials: pd.DataFrame,
    facts: Mapping[str, Any],
    comparison: Mapping[str, Any] | None,
) -> None:
    """Write the pictures (PNG and SVG) and, last, report.html into `out`; an older report in it is replaced.

    Args:
        out: the folder.
        study: the search as Optuna knows it.
        trials: one row per trial: number, state (finished, stopped, failed or running), reason, backbone, a
            param_<field> of each searched field, epochs, best_epoch, val_auroc, images_per_second,
            calibration_error, seconds, started and ended (UTC), restarts, and curve, a list of dicts with epoch
            and val_auroc.
        facts: title, prepared, study_name, storage (without its password; None: nothing was kept), objectives and
            directions, trials_wanted, sampler, scheduler, workers, concurrent, epochs_spent, epochs_full (what
            trials of full length would have cost), seconds, best_number or None, pareto (numbers), interrupted,
            versions.
        comparison: what `evaluation.backbones.comparison_record` gave, or None.

    Raises:
        OutputError: `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    rows = read_trials(trials)
    searched = [str(column)[len(_PARAM) :] for column in trials.columns if str(column).startswith(_PARAM)]
    params = [name for name in searched if any(name in row.params for row in rows)]
    several = len(facts["objectives"]) > 1
    pictures: dict[str, bytes] = {}
    figures = _figures(rows, facts, comparison)
    for name in _PICTURES:
        if name in figures:
            _log.debug("drawing %s", name)
            pictures[name], vector = plots.encode_figure(figures[name])
            (out / f"{name}.png").write_bytes(pictures[name])
            (out / f"{name}.svg").write_bytes(vector)
        else:
            for kind in ("png", "svg"):
                (out / f"{name}.{kind}").unlink(missing_ok=True)
    with _quiet():
        copy = _copy(study, facts["objectives"])
        chapters = _chapters(copy, facts["objectives"])
    view = {
        "facts": facts,
        "summary": _summary(rows, params, facts),
        "cautions": _cautions(rows, facts),
        "best": next((row for row in rows if row.number == facts["best_number"]), None),
        "rows": rows,
        "params": params,
        "front_rows": [row for row in rows if several and row.number in set(facts["pareto"])],
        "values": {trial.number: trial.values for trial in _finished(copy)},  # noqa: PD011
        "comparison": comparison,
        "chapters": chapters,
        "pictures": pictures,
        "commands": _commands(facts),
        "objectives": [label(name) for name in facts["objectives"]],
        # Without a figure the page does well without the five megabytes that draw them.
        "plotly": _plotly() if any(d.figure for c in chapters for d in c.drawings) else None,
    }
    atomic.write_text(out / "report.html", html.render(view, "search_page.html.j2"))
    _log.debug("report in %s", out)


def read_trials(trials: pd.DataFrame) -> list[Trial]:
    """The table's rows in order of their numbers, NaN and NaT as None."""
    return sorted((_trial(record) for record in trials.to_dict("records")), key=lambda row: row.number)


def _trial(record: Mapping[Any, Any]) -> Trial:
    get: dict[str, Any] = {str(name): None if _is_missing(value) else value for name, value in record.items()}

    def whole(name: str) -> int | None:
        value = get[name]
        return None if value is None else int(value)

    def number(name: str) -> float | None:
        value = get[name]
        return float(value) if value is not None and math.isfinite(value) else None

    params = {name[len(_PARAM) :]: value for name, value in get.items() if name.startswith(_PARAM)}
    points = [(int(point["epoch"]), point.get("val_auroc")) for point in get["curve"] or ()]
    return Trial(
        number=int(get["number"]),
        state=str(get["state"]),
        reason=None if get["reason"] is None else str(get["reason"]),
        backbone=str(get["backbone"]),
        epochs=whole("epochs") or 0,
        best_epoch=whole("best_epoch"),
        val_auroc=number("val_auroc"),
        images_per_second=number("images_per_second"),
        calibration_error=number("calibration_error"),
        seconds=number("seconds"),
        started=get["started"],
        restarts=whole("restarts") or 0,
        params={name: value for name, value in params.items() if value is not None and name != "backbone"},
        curve=tuple(sorted((epoch, float(v)) for epoch, v in points if v is not None and math.isfinite(v))),
    )


def _is_missing(value: Any) -> bool:
    return value is None or (not isinstance(value, (list, tuple, dict, np.ndarray)) and bool(pd.isna(value)))


# --- words


def _summary(rows: Sequence[Trial], params: Sequence[str], facts: Mapping[str, Any]) -> list[str]:
    """The search in a few sentences."""
    counts = {state: sum(row.state == state for row in rows) for state in _STATES}
    out = [
        f"{len(rows):,} of {facts['trials_wanted']:,} trials: {counts['finished']:,} finished, "
        f"{counts['stopped']:,} stopped early, {counts['failed']:,} failed, {counts['running']:,} still running."
    ]
    if rows:
        names = ", ".join(sorted({row.backbone for row in rows}))
        out.append(f"Searched: {', '.join([f'backbone ({names})', *params])}.")
    best = next((row for row in rows if row.number == facts["best_number"]), None)
    if best is not None and best.val_auroc is not None:
        at = f" at epoch {best.best_epoch}" if best.best_epoch is not None else ""
        out.append(f"Best: trial {best.number} ({best.backbone}), validation AUROC {best.val_auroc:.3f}{at}.")
    elif not facts["pareto"]:
        out.append("There is no best trial: none has finished with a validation AUROC.")
    if len(facts["objectives"]) > 1 and facts["pareto"]:
        *first, last = [label(name) for name in facts["objectives"]]
        count = len(facts["pareto"])
        out.append(
            f"{count:,} trial{'s are' if count > 1 else ' is'} on the Pareto front of {', '.join(first)} and {last}: "
            "no other is as good in all and better in one."
        )
    spent, full = facts["epochs_spent"], facts["epochs_full"]
    if counts["stopped"] and spent < full:
        saved = html.format_percent(1 - spent / full, 0)
        out.append(f"{spent:,} epochs were trained; all trials at full length would have cost {full:,}: {saved} saved.")
    return out


def _cautions(rows: Sequence[Trial], facts: Mapping[str, Any]) -> list[str]:
    """What a reader must know before quoting a number."""
    measured = sum(row.val_auroc is not None and row.state != "failed" for row in rows)
    out = []
    if measured > 1:
        out.append(
            f"The highest validation AUROC is optimistic: it is the best of {measured:,} trials, and the images that "
            "measure it also chose it. On other images expect less."
        )
    elif measured == 1:
        out.append("The AUROC is optimistic: the validation images that measure it also chose the epoch.")
    out.append(
        "The test split was not touched. For a number to quote, train the best settings, score the test split with "
        "that one model, once, and report on it."
    )
    if facts["interrupted"]:
        out.append("The search was interrupted: it is not the one that was asked for until it has been continued.")
    return out


def _commands(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what for, command) of what to do next."""
    out = []
    if facts["storage"]:
        remark = " (put the password back into the address)" if re.search(r"://[^/]*@", facts["storage"]) else ""
        out.append((f"Look at every trial in a browser{remark}:", f"optuna-dashboard {shlex.quote(facts['storage'])}"))
    if facts["best_number"] is not None:
        prepared = shlex.quote(str(facts["prepared"]))
        out.append(("Train the best settings:", f"ray-cxr train {prepared} --config best.toml --out RUN"))
    return out


def label(name: str) -> str:
    """An objective's name as a reader says it."""
    return plots.format_finding(name).replace("val auroc", "validation AUROC")


# --- pictures


def _figures(
    rows: Sequence[Trial], facts: Mapping[str, Any], comparison: Mapping[str, Any] | None
) -> dict[str, Figure]:
    names = sorted({row.backbone for row in rows})
    looks = {name: _LOOKS[place % len(_LOOKS)] for place, name in enumerate(names)}
    figures = {}
    if any(row.val_auroc is not None for row in rows):
        figures["history"] = history(rows, looks)
    shown = [row for row in rows if row.curve and row.state != "failed"]
    if shown:
        figures["backbones"] = backbones(shown, looks, comparison)
    if any(row.curve for row in rows):
        figures["curves"] = curves(rows, looks, facts["best_number"])
    return figures


_Looks = Mapping[str, tuple[str, str, Any]]


def history(rows: Sequence[Trial], looks: _Looks) -> Figure:
    """Validation AUROC of every trial by its number, and the best of the finished so far."""
    figure, ax = plots.create_axes(9.6, 3.7)
    failed = [row.number for row in rows if row.state == "failed"]
    ax.plot(failed, [0.02] * len(failed), "x", color=plots.MUTED, markersize=5, transform=ax.get_xaxis_transform())
    for name, look in looks.items():
        mine = [row for row in rows if row.backbone == name and row.state != "failed"]
        _points(ax, [(row.number, row.val_auroc, row.state) for row in mine if row.val_auroc is not None], look, 6)
    finished = [(row.number, row.val_auroc) for row in rows if row.state == "finished" and row.val_auroc is not None]
    if finished:
        places = [number for number, _ in finished]
        best = np.maximum.accumulate([value for _, value in finished])
        last = max(row.number for row in rows)
        ax.step([*places, last], [*best, best[-1]], where="post", color=plots.MUTED, linewidth=1.2, zorder=1)
    extra = [_sample("best finished so far", plots.MUTED, "", "-")] if finished else []
    _legend(ax, rows, looks, extra, lines=False)
    ax.set_xlabel("trial")
    ax.set_ylabel("validation AUROC (macro)")
    ax.set_xlim(-0.7, max(row.number for row in rows) + 0.7)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(axis="y", color=plots.FAINT, linewidth=0.7)
    return figure


def backbones(rows: Sequence[Trial], looks: _Looks, comparison: Mapping[str, Any] | None) -> Figure:
    """Every trial's highest AUROC by backbone: over all its epochs and, with a comparison, over equally many.

    Args:
        rows: trials that have a curve and did not fail.
        looks: colour, marker and line by backbone.
        comparison: as `write_search_page` takes it.
    """
    names = [name for name in sorted(looks) if any(row.backbone == name for row in rows)]
    panels = [("all epochs of each trial", [(row.number, max(value for _, value in row.curve)) for row in rows])]
    if comparison is not None:
        found = {n: v for one in comparison["backbones"] for n, v in zip(one["numbers"], one["values"], strict=True)}
        if found:
            title = f"first {comparison['grace']} epochs of each trial: equal length"
            panels.append((title, sorted(found.items())))
    figure = Figure(
        figsize=(5.2 * len(panels), 1.25 + 0.62 * len(names)), layout=plots.create_layout(), facecolor="white"
    )
    by_number = {row.number: row for row in rows}
    for ax, (title, points) in zip(np.ravel(figure.subplots(1, len(panels), sharey=True)), panels, strict=True):
        plots.style_axes(ax)
        for place, name in enumerate(reversed(names)):
            mine = [(n, value) for n, value in points if n in by_number and by_number[n].backbone == name]
            _strip(ax, place, mine, by_number, looks[name])
        ax.set_yticks(range(len(names)), list(reversed(names)))
        ax.set_ylim(-0.6, len(names) - 0.4)
        ax.set_title(title, fontsize=9, color=plots.INK, loc="left")
        ax.set_xlabel("highest validation AUROC")
        ax.grid(axis="x", color=plots.FAINT, linewidth=0.7)
        ax.set_axisbelow(True)
    return figure


def _strip(
    ax: Axes,
    place: int,
    points: Sequence[tuple[int, float]],
    rows: Mapping[int, Trial],
    look: tuple[str, str, Any],
) -> None:
    if len(points) > 2:
        lower, middle, upper = np.percentile([value for _, value in points], [25, 50, 75])
        ax.barh([place], [upper - lower], left=lower, height=0.56, color=plots.FAINT, zorder=1)
        ax.plot([middle] * 2, [place - 0.28, place + 0.28], color=plots.INK, linewidth=1.8, zorder=2)
    # Steps of the golden ratio: spread like noise, and the same on every run.
    offsets = [0.4 * ((n * 0.6180339887) % 1 - 0.5) for n, _ in points]
    spread = [(v, place + offset, rows[n].state) for (n, v), offset in zip(points, offsets, strict=True)]
    _points(ax, spread, look, 5)


def _points(ax: Axes, points: Sequence[tuple[float, float, str]], look: tuple[str, str, Any], size: int) -> None:
    """Points (x, y, state), hollow where the trial did not finish."""
    colour, marker, _ = look
    for full in (False, True):
        xy = [(x, y) for x, y, state in points if (state == "finished") == full]
        x, y = zip(*xy, strict=True) if xy else ((), ())
        face = colour if full else "white"
        ax.plot(x, y, marker, color=colour, markerfacecolor=face, markersize=size, zorder=3)


def curves(rows: Sequence[Trial], looks: _Looks, best: int | None) -> Figure:
    """Validation AUROC per epoch of every trial; a cross ends those that were stopped, a bar those that failed."""
    figure, ax = plots.create_axes(9.6, 4.2)
    for row in rows:
        if not row.curve:
            continue
        colour, marker, line = looks[row.backbone]
        epochs, values = zip(*row.curve, strict=True)
        chosen = row.number == best
        ax.plot(
            epochs, values, linestyle=line, color=colour, linewidth=2.6 if chosen else 1.1, alpha=1 if chosen else 0.6,
            zorder=4 if chosen else 2,
        )  # fmt: skip
        end = {"stopped": "x", "failed": "|", "running": ""}.get(row.state, marker)
        ax.plot(epochs[-1:], values[-1:], end, color=colour, markersize=6.5, zorder=5)
        if chosen:
            ax.annotate(
                f"trial {row.number}",
                (epochs[-1], values[-1]),
                (7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                fontweight="bold",
                color=colour,
            )
    states = {row.state for row in rows if row.curve}
    marks = [("stopped", "x", "stopped early"), ("failed", "|", "failed")]
    extra = [_sample(label, plots.MUTED, mark, "") for state, mark, label in marks if state in states]
    _legend(ax, rows, looks, extra, lines=True)
    ax.set_xlabel("epoch")
    ax.set_ylabel("validation AUROC (macro)")
    ax.margins(x=0.06)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.grid(color=plots.FAINT, linewidth=0.7)
    return figure


def _sample(label: str, colour: str, marker: str, line: Any, face: str | None = None) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle=line, label=label, markerfacecolor=face or colour)


def _legend(ax: Axes, rows: Sequence[Trial], looks: _Looks, extra: Sequence[Line2D], *, lines: bool) -> None:
    handles = [_sample(name, colour, marker, line if lines else "") for name, (colour, marker, line) in looks.items()]
    if not lines:
        states = {row.state for row in rows}
        if states & {"stopped", "running"}:
            handles.append(_sample("hollow: not finished", plots.MUTED, "o", "", "white"))
        if "failed" in states:
            handles.append(_sample("failed", plots.MUTED, "x", ""))
    ax.legend(
        handles=[*handles, *extra],
        loc="lower left",
        frameon=False,
        fontsize=8.5,
        ncols=5,
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.2,
    )


# --- Optuna's plots


@dataclass(frozen=True)
class _Objective:
    """One objective as Optuna's plots take it; with a single one they know it themselves.

    Attributes:
        name: for axes.
        target: its value of a trial, or None.
        loss: the same, turned round where more is better, or None: given a target, importances ask what makes it
            small, whatever the study's direction.
    """

    name: str
    target: Callable[[FrozenTrial], float] | None = None
    loss: Callable[[FrozenTrial], float] | None = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna's log and warnings held back: what they say of a plot, the page says in its place."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _copy(study: optuna.Study, names: Sequence[str]) -> optuna.Study:
    """The study in memory, without what users attached to trials: it would fill the plots' hover texts."""
    trials = study.get_trials(deepcopy=True)
    for trial in trials:
        trial.user_attrs = {}
    copy = optuna.create_study(directions=study.directions)
    copy.set_metric_names([label(name) for name in names])
    copy.add_trials(trials)
    return copy


def _objectives(study: optuna.Study, names: Sequence[str]) -> list[_Objective]:
    if len(names) == 1:
        return [_Objective(label(names[0]))]
    signs = [-1.0 if direction == optuna.study.StudyDirection.MAXIMIZE else 1.0 for direction in study.directions]
    return [
        _Objective(label(name), _value_of(place, 1.0), _value_of(place, sign))
        for place, (name, sign) in enumerate(zip(names, signs, strict=True))
    ]


def _value_of(place: int, sign: float) -> Callable[[FrozenTrial], float]:
    return lambda trial: sign * trial.values[place]  # noqa: PD011


def _chapters(study: optuna.Study, names: Sequence[str]) -> list[Chapter]:
    """Optuna's plots in the order of the page."""
    objectives = _objectives(study, names)
    chapters = [_front(study, objectives)] if len(objectives) > 1 else []
    importances, ranked = _importances(study, objectives)
    most = ranked[:_MOST]
    capped = f" Only the {len(most)} most important of {len(ranked)} settings are shown." if len(ranked) > _MOST else ""
    return [
        *chapters,
        _history(study, objectives),
        importances,
        _parallel(study, objectives, most, capped),
        _slices(study, objectives, most, capped),
        _intermediate(study, objectives),
        _timeline(study),
    ]


def _front(study: optuna.Study, objectives: Sequence[_Objective]) -> Chapter:
    reason = _too_few(study, 1)
    if len(objectives) > 3:
        reason = f"Optuna draws fronts of two or three objectives; here are {len(objectives)}."

    def draw() -> go.Figure:
        figure = optuna.visualization.plot_pareto_front(study)
        for trace in figure.data:
            # Optuna shades by number, which leaves the first trials of the front white on white.
            front = "Best Trial" in trace.hovertemplate
            trace.marker = {"color": plots.VERMILION if front else plots.SKY, "size": 10 if front else 6}
            trace.update(name="on the front" if front else "not on it", showlegend=True)
        # From Optuna's own place the axes' names are cut off.
        return figure.update_layout(scene_camera_eye={"x": 1.8, "y": 1.8, "z": 1.2}) if len(objectives) > 2 else figure

    caption = "Each point is a finished trial; its settings stand beside it when it is pointed at."
    return Chapter("front", "Pareto front", caption, (_drawing(draw, reason, height=460, width=320),))


def _history(study: optuna.Study, objectives: Sequence[_Objective]) -> Chapter:
    plot, few = optuna.visualization.plot_optimization_history, _too_few(study, 1)
    drawings = [
        _drawing(partial(plot, study, target=o.target, target_name=o.name), few, height=340, width=320)
        for o in objectives
    ]
    return Chapter(
        "optimization",
        "Optimization history",
        "The value of each finished trial; stopped trials have none.",
        _once(drawings),
    )


def _importances(study: optuna.Study, objectives: Sequence[_Objective]) -> tuple[Chapter, list[str]]:
    """The chapter, and all searched settings, most important first."""
    finished = _finished(study)
    names = sorted({name for trial in finished for name in trial.params})
    weights = dict.fromkeys(names, 0.0)
    # Optuna advises five trials above the quantile; its own tenth holds that many only of fifty.
    quantile = min(0.5, max(0.1, 5 / max(1, len(finished))))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
    drawings = []
    for o in objectives:
        reason = _too_few(study, 2) or _nothing_searched(names)
        if reason is None and all(len({trial.params.get(name) for trial in finished}) == 1 for name in names):
            reason = "Every finished trial has the same settings, so none can be seen to matter."
        if reason is None:
            found = optuna.importance.get_param_importances(study, evaluator=evaluator, target=o.loss)
            weights = {name: weight + found[name] for name, weight in weights.items()}
            if len(found) > 1 and max(found.values()) - min(found.values()) < 1e-9:
                reason = f"By {o.name}, the finished trials show no setting that matters more than another."
        draw = partial(optuna.visualization.plot_param_importances, study, evaluator, target=o.loss, target_name=o.name)
        title, height = o.name if len(objectives) > 1 else "", 110 + 30 * max(2, len(names))
        drawings.append(_drawing(_titled(draw, "importance", None), reason, height=height, width=320, title=title))
    caption = (
        f"What sets the best {math.ceil(quantile * len(finished)):,} of {len(finished):,} finished trials apart from "
        "all of them (PED-ANOVA); shares add to 1. Stopped trials do not count. A bar says how much a setting matters, "
        "not which value is good: see the plots below for that."
    )
    if len(finished) < 100:
        caption += " Of so few trials it is a hint at most, above all for settings that only some trials have."
    ranked = sorted(names, key=lambda name: (-weights[name], name))
    return Chapter("importances", "Which settings matter", caption, _once(drawings)), ranked


def _parallel(study: optuna.Study, objectives: Sequence[_Objective], names: list[str], capped: str) -> Chapter:
    draw = partial(optuna.visualization.plot_parallel_coordinate, study, names, target_name=objectives[0].name)
    reason = _too_few(study, 2) or _nothing_searched(names)
    drawing = _drawing(_bolder(draw), reason, height=440, width=220 + 100 * max(3, len(names)), right=90)
    colour = "by its rank: 0 is the Pareto front" if len(objectives) > 1 else "by its value"
    caption = f"A line is a finished trial, coloured {colour}. None: the trial does not have the setting.{capped}"
    return Chapter("parallel", "Parallel coordinates", caption, (drawing,))


def _slices(study: optuna.Study, objectives: Sequence[_Objective], names: list[str], capped: str) -> Chapter:
    plot, reason = optuna.visualization.plot_slice, _too_few(study, 2) or _nothing_searched(names)
    rows = [names[start : start + _ROW] for start in range(0, max(1, len(names)), _ROW)]
    drawings = [
        _drawing(
            _decades(partial(plot, study, row, target=o.target, target_name=o.name)),
            reason,
            height=330,
            width=150 + 200 * len(row),
        )
        for o in objectives
        for row in rows
    ]
    caption = f"A dot is a finished trial, darker for later ones.{capped}"
    return Chapter("slice", "Settings one by one", caption, _once(drawings))


def _intermediate(study: optuna.Study, objectives: Sequence[_Objective]) -> Chapter:
    reason = None
    if not any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        reason = (
            "Optuna takes no values while a trial trains when there are several objectives; the curves above show them."
            if len(objectives) > 1
            else "No trial has told Optuna a value while it trained."
        )

    draw = _titled(partial(optuna.visualization.plot_intermediate_values, study), "epoch", objectives[0].name)
    return Chapter(
        "intermediate",
        "Values while training",
        "A line is a trial; one that ends early was stopped.",
        (_drawing(draw, reason, height=380, width=320),),
    )


def _timeline(study: optuna.Study) -> Chapter:
    count = len(study.get_trials(deepcopy=False))

    def draw() -> go.Figure:
        figure = optuna.visualization.plot_timeline(study)
        for trace in figure.data:
            name, colour = _TIMELINE[trace.name]
            # The outline is as wide on any scale: a trial that failed within seconds shows among hours, too.
            trace.update(
                name=name,
                marker={"color": colour, "line": {"color": colour, "width": 2}},
                hovertemplate=f"%{{text}}<extra>{name}</extra>",
            )
        return figure

    reason = None if count else "No trial was started."
    drawing = _drawing(_titled(draw, None, "trial"), reason, height=min(900, 150 + 16 * count), width=320)
    caption = "When each trial ran, by the clock of the machine that led the search."
    return Chapter("timeline", "Timeline", caption, (drawing,))


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _too_few(study: optuna.Study, least: int) -> str | None:
    """A sentence where fewer trials than `least` have finished."""
    count = len(_finished(study))
    if count >= least:
        return None
    needs = "two finished trials" if least == 2 else "a finished trial"
    return f"This plot needs {needs}; there is {'one' if count == 1 else 'none'}."


def _nothing_searched(names: Sequence[str]) -> str | None:
    return None if names else "No finished trial has a setting that was searched."


def _once(drawings: Sequence[Drawing]) -> tuple[Drawing, ...]:
    """The drawings, each reason told once."""
    return tuple(one for place, one in enumerate(drawings) if one.figure or one not in drawings[:place])


def _titled(draw: Callable[[], go.Figure], x: str | None, y: str | None) -> Callable[[], go.Figure]:
    return lambda: draw().update_layout(xaxis_title=x, yaxis_title=y)


def _bolder(draw: Callable[[], go.Figure]) -> Callable[[], go.Figure]:
    return lambda: draw().update_traces(opacity=0.9, line_width=1.6, selector={"mode": "lines"})


def _decades(draw: Callable[[], go.Figure]) -> Callable[[], go.Figure]:
    """Ticks at powers of ten alone on logarithmic axes: in a narrow plot those between run into each other."""

    def drawn() -> go.Figure:
        figure = draw()
        figure.for_each_xaxis(lambda axis: axis.update(dtick=1, exponentformat="e"), selector={"type": "log"})
        return figure

    return drawn


def _drawing(
    draw: Callable[[], go.Figure], reason: str | None, *, height: int, width: int, title: str = "", right: int = 20
) -> Drawing:
    """A plot, unless `reason` says why there is none; whatever Optuna stumbles over becomes the reason."""
    if reason is None and not extras.is_installed("plotly"):
        reason = f"Interactive plots: {extras.install_hint('plotly')}"
    if reason is not None:
        return Drawing(None, reason)
    import plotly.io

    try:
        figure = draw()
    except Exception as error:  # a plot is no reason to lose the page of a search of days
        _log.debug("a plot failed", exc_info=True)
        return Drawing(None, f"Optuna could not draw this: {type(error).__name__}: {' '.join(str(error).split())}")
    if not figure.data:
        return Drawing(None, "Optuna found nothing to draw here.")
    figure.update_layout(
        template=_TEMPLATE,
        title={"text": title, "font": {"size": 13}} if title else None,
        height=height,
        width=None,  # the page's; Optuna's own can be wider than any screen
        margin={"l": 60, "r": right, "t": 40 if title else 28, "b": 50},
    )
    # As text in the page: nothing in it may end the element that holds it.
    text = plotly.io.to_json(figure, validate=False, engine="json")
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Drawing(Markup(text), None, height, width)


def _plotly() -> Markup:
    """The script that draws the plots."""
    import plotly.offline

    script = str(plotly.offline.get_plotlyjs())
    # It may stand in the page as it is only while no text in it could end its element.
    assert "</script" not in script.lower()
    return Markup(script)


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
_TEMPLATE = {
    "layout": {
        "font": {"family": "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif", "color": plots.INK},
        "colorway": [look[0] for look in _LOOKS],
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
}
