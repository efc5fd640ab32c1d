"""The report of a hyper-parameter search: its trials, the best settings, and how reliable the result is.

The page contains Optuna's plots and the script that draws them, so it needs no network. The plots show a copy of the
study in memory: a database is read once, and users' attributes of trials remain private.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pandas as pd

from ray_cxr.errors import OutputError
from ray_cxr.reporting import html, inline_svg, optuna_plots
from ray_cxr.reporting.optuna_plots import format_objective
from ray_cxr.reporting.search_figures import NAMES, TrialRow, draw_figures
from ray_cxr.storage import atomic

Facts = Mapping[str, Any]
_log = logging.getLogger(__name__)

_PARAM = "param_"
_STATES = ("finished", "stopped", "failed", "waiting")


def write_search_page(
    out: Path, study: optuna.Study, trials: pd.DataFrame, facts: Facts, comparison: Mapping[str, Any] | None
) -> None:
    """Write the figures (PNG and SVG) and, last, report.html into `out`; they replace those of an older report.

    Args:
        trials: the table of `tuning.records.build_trial_table`.
        facts: the facts of `tuning.results.collect_facts`.
        comparison: the record of `evaluation.backbones.comparison_record`; None with one backbone.

    Raises:
        OutputError: `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: is a file; name a folder")
    out.mkdir(parents=True, exist_ok=True)
    rows = read_trials(trials)
    searched = [name.removeprefix(_PARAM) for name in trials.columns if name.startswith(_PARAM)]
    params = [name for name in searched if any(name in row.params for row in rows)]
    best = next((row for row in rows if row.number == facts["best_number"]), None)
    figures = inline_svg.write_figures(out, NAMES, draw_figures(rows, facts["best_number"], comparison))
    with optuna_plots.silence_optuna():
        copy = optuna_plots.copy_study(study, facts["objectives"])
        chapters = optuna_plots.draw_chapters(copy, facts["objectives"])
    has_plot = any(plot.figure for chapter in chapters for plot in chapter.plots)
    view = {
        "facts": facts,
        "summary": _summarize(rows, params, best, facts),
        "cautions": _list_cautions(rows, facts),
        "best": best,
        "rows": rows,
        "params": params,
        "front_rows": [row for row in rows if row.number in facts["pareto"]],
        "values": {trial.number: trial.values for trial in optuna_plots.list_finished(copy)},  # noqa: PD011
        "comparison": comparison,
        "chapters": chapters,
        "figures": figures,
        "commands": _list_commands(out, rows, facts),
        "colours": {colour.lower(): name for colour, name in inline_svg.VARIABLES.items()},
        "objectives": [format_objective(name) for name in facts["objectives"]],
        # The script has five megabytes; only interactive plots need it.
        "plotly": optuna_plots.load_plotly_script() if has_plot else None,
    }
    atomic.write_text(out / "report.html", html.render(view, "search_page.html.j2"))
    _log.debug("report in %s", out)


def read_trials(trials: pd.DataFrame) -> list[TrialRow]:
    """Return the rows of the table in order of their numbers.

    The page is written when no trial runs any more: a trial that has neither ended nor failed waits for the next start.
    """
    names = [field.name for field in dataclasses.fields(TrialRow) if field.name not in ("params", "curve")]
    rows = []
    for record in trials.sort_values("number").to_dict("records"):
        known = {str(k): v for k, v in record.items() if isinstance(v, (list, tuple)) or pd.notna(v)}
        values: dict[str, Any] = {name: known.get(name) for name in names}
        if values["best_epoch"] is not None:
            values["best_epoch"] = int(values["best_epoch"])  # a column with missing values holds floats
        values["state"] = "waiting" if values["state"] == "running" else values["state"]
        params = {name.removeprefix(_PARAM): value for name, value in known.items() if name.startswith(_PARAM)}
        curve = [(point["epoch"], point["val_auroc"]) for point in record["curve"] if point["val_auroc"] is not None]
        rows.append(TrialRow(**values, params=params, curve=tuple(curve)))
    return rows


def _summarize(rows: Sequence[TrialRow], params: Sequence[str], best: TrialRow | None, facts: Facts) -> list[str]:
    """Describe the search in a few sentences."""
    counts = {state: sum(row.state == state for row in rows) for state in _STATES}
    sentences = [
        f"{len(rows):,} of {facts['trials_wanted']:,} trials: {counts['finished']:,} finished, "
        f"{counts['stopped']:,} stopped early, {counts['failed']:,} failed, {counts['waiting']:,} waiting to continue."
    ]
    if rows:
        names = ", ".join(sorted({row.backbone for row in rows}))
        sentences.append(f"Searched: {', '.join([f'backbone ({names})', *params])}.")
    if best is not None:
        auroc = f"validation AUROC {html.format_number(best.val_auroc)} at epoch {best.best_epoch}"
        sentences.append(f"Best: trial {best.number} ({best.backbone}), {auroc}.")
    elif not facts["pareto"]:
        sentences.append("There is no best trial: none has finished with a validation AUROC.")
    if len(facts["objectives"]) > 1 and facts["pareto"]:
        *first, last = [format_objective(name) for name in facts["objectives"]]
        count = len(facts["pareto"])
        sentences.append(
            f"{count:,} trial{'s are' if count > 1 else ' is'} on the Pareto front of {', '.join(first)} and {last}: "
            "no other is as good in all and better in one."
        )
    spent, full = facts["epochs_spent"], facts["epochs_full"]
    if counts["stopped"] and spent < full:
        saved = html.format_percent(1 - spent / full, 0)
        sentences.append(
            f"{spent:,} epochs were trained; all trials at full length would have cost {full:,}: {saved} saved."
        )
    return sentences


def _list_cautions(rows: Sequence[TrialRow], facts: Facts) -> list[str]:
    """Return what a reader must know before quoting a number."""
    measured = sum(row.val_auroc is not None and row.state != "failed" for row in rows)
    cautions = []
    if measured > 1:
        cautions.append(
            f"The highest validation AUROC is optimistic: it is the best of {measured:,} trials, and the same images "
            "measured and chose it. Expect less on other images."
        )
    elif measured == 1:
        cautions.append("The AUROC is optimistic: the same validation images measured it and chose the epoch.")
    cautions.append(
        "The search did not use the test split. For a number to quote, train the best settings, score the test split "
        "with that one model, once, and report on it."
    )
    if facts["interrupted"]:
        cautions.append("The search was interrupted: its result may change when it is continued.")
    return cautions


def _list_commands(out: Path, rows: Sequence[TrialRow], facts: Facts) -> list[tuple[str, str]]:
    """Return the next commands, each after its purpose, with paths that hold in any folder."""
    commands = []
    study, prepared = out.absolute(), str(facts["prepared"])
    prepared = prepared if "://" in prepared else os.path.abspath(prepared)
    if facts["interrupted"] or len(rows) < facts["trials_wanted"] or any(row.state == "waiting" for row in rows):
        command = shlex.join(["ray-cxr", "tune", prepared, "--out", str(study), "--resume"])
        commands.append(("Continue the search:", command))
    if facts["storage"]:
        remark = " (add the password to the address)" if re.search(r"://[^/]*@", facts["storage"]) else ""
        storage = facts["storage"] if "://" in facts["storage"] else os.path.abspath(facts["storage"])
        command = shlex.join(["optuna-dashboard", storage])
        commands.append((f"Look at every trial in a browser{remark}:", command))
    if facts["best_number"] is not None:
        words = ["train", prepared, "--config", str(study / "best.toml"), "--out", f"{study}-best"]
        commands.append(("Train the best settings:", shlex.join(["ray-cxr", *words])))
    return commands
