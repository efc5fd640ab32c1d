"""The report of a hyper-parameter search: which trials ran, what they found, and how reliable that is.

The page contains Optuna's plots and the script that draws them, so it needs no network. They are drawn from a copy of
the study in memory: a database is read once, and users' attributes of trials remain private.
"""

from __future__ import annotations

import logging
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd

from ray_cxr.errors import OutputError
from ray_cxr.reporting import html, optuna_plots, plots
from ray_cxr.reporting.optuna_plots import format_objective
from ray_cxr.reporting.scores import finite_or_none
from ray_cxr.reporting.search_figures import NAMES, TrialRow, draw_figures
from ray_cxr.storage import atomic

_log = logging.getLogger(__name__)

_PARAM = "param_"
_STATES = ("finished", "stopped", "failed", "running")


def write_search_page(
    out: Path, study: optuna.Study, trials: pd.DataFrame, facts: Mapping[str, Any], comparison: Mapping[str, Any] | None
) -> None:
    """Write the figures (PNG and SVG) and, last, report.html into `out`, in place of an older report.

    Args:
        trials: see `tuning.records.build_trial_table`.
        facts: see `tuning.results.collect_facts`.
        comparison: from `evaluation.backbones.comparison_record`, or None.

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
    figures = _write_figures(out, rows, facts, comparison)
    with optuna_plots.silence_optuna():
        copy = optuna_plots.copy_study(study, facts["objectives"])
        chapters = optuna_plots.draw_chapters(copy, facts["objectives"])
    view = {
        "facts": facts,
        "summary": _summarize(rows, params, facts),
        "cautions": _list_cautions(rows, facts),
        "best": next((row for row in rows if row.number == facts["best_number"]), None),
        "rows": rows,
        "params": params,
        "front_rows": [row for row in rows if several and row.number in set(facts["pareto"])],
        "values": {trial.number: trial.values for trial in optuna_plots.list_finished(copy)},  # noqa: PD011
        "comparison": comparison,
        "chapters": chapters,
        "figures": figures,
        "commands": _list_commands(facts),
        "objectives": [format_objective(name) for name in facts["objectives"]],
        # The script has five megabytes; only interactive plots need it.
        "plotly": optuna_plots.load_plotly_script() if any(o.figure for c in chapters for o in c.plots) else None,
    }
    atomic.write_text(out / "report.html", html.render(view, "search_page.html.j2"))
    _log.debug("report in %s", out)


def _write_figures(
    out: Path, rows: Sequence[TrialRow], facts: Mapping[str, Any], comparison: Mapping[str, Any] | None
) -> dict[str, bytes]:
    """Write the figures, remove those of an older report, and return the PNGs by name."""
    drawn = draw_figures(rows, facts["best_number"], comparison)
    encoded = {}
    for name in NAMES:
        if name in drawn:
            encoded[name], vector = plots.encode_figure(drawn[name])
            (out / f"{name}.png").write_bytes(encoded[name])
            (out / f"{name}.svg").write_bytes(vector)
        else:
            for kind in ("png", "svg"):
                (out / f"{name}.{kind}").unlink(missing_ok=True)
    return encoded


def read_trials(trials: pd.DataFrame) -> list[TrialRow]:
    """Return the table's rows in order of their numbers."""
    return sorted((_read_trial(record) for record in trials.to_dict("records")), key=lambda row: row.number)


def _read_trial(record: Mapping[Any, Any]) -> TrialRow:
    get: dict[str, Any] = {str(name): None if _is_missing(value) else value for name, value in record.items()}
    params = {name[len(_PARAM) :]: value for name, value in get.items() if name.startswith(_PARAM)}
    points = [(int(point["epoch"]), point.get("val_auroc")) for point in get["curve"] or ()]
    return TrialRow(
        number=int(get["number"]),
        state=str(get["state"]),
        reason=None if get["reason"] is None else str(get["reason"]),
        backbone=str(get["backbone"]),
        epochs=int(get["epochs"] or 0),
        best_epoch=None if get["best_epoch"] is None else int(get["best_epoch"]),
        val_auroc=finite_or_none(get["val_auroc"]),
        images_per_second=finite_or_none(get["images_per_second"]),
        calibration_error=finite_or_none(get["calibration_error"]),
        seconds=finite_or_none(get["seconds"]),
        started=get["started"],
        restarts=int(get["restarts"] or 0),
        params={name: value for name, value in params.items() if value is not None and name != "backbone"},
        curve=tuple(sorted((epoch, float(v)) for epoch, v in points if v is not None and math.isfinite(v))),
    )


def _is_missing(value: Any) -> bool:
    return value is None or (not isinstance(value, (list, tuple, dict, np.ndarray)) and bool(pd.isna(value)))


def _summarize(rows: Sequence[TrialRow], params: Sequence[str], facts: Mapping[str, Any]) -> list[str]:
    """Describe the search in a few sentences."""
    counts = {state: sum(row.state == state for row in rows) for state in _STATES}
    sentences = [
        f"{len(rows):,} of {facts['trials_wanted']:,} trials: {counts['finished']:,} finished, "
        f"{counts['stopped']:,} stopped early, {counts['failed']:,} failed, {counts['running']:,} still running."
    ]
    if rows:
        names = ", ".join(sorted({row.backbone for row in rows}))
        sentences.append(f"Searched: {', '.join([f'backbone ({names})', *params])}.")
    best = next((row for row in rows if row.number == facts["best_number"]), None)
    if best is not None and best.val_auroc is not None:
        at = f" at epoch {best.best_epoch}" if best.best_epoch is not None else ""
        sentences.append(f"Best: trial {best.number} ({best.backbone}), validation AUROC {best.val_auroc:.3f}{at}.")
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


def _list_cautions(rows: Sequence[TrialRow], facts: Mapping[str, Any]) -> list[str]:
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


def _list_commands(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the next commands, each after its purpose."""
    commands = []
    if facts["storage"]:
        remark = " (add the password to the address)" if re.search(r"://[^/]*@", facts["storage"]) else ""
        command = f"optuna-dashboard {shlex.quote(facts['storage'])}"
        commands.append((f"Look at every trial in a browser{remark}:", command))
    if facts["best_number"] is not None:
        prepared = shlex.quote(str(facts["prepared"]))
        commands.append(("Train the best settings:", f"ray-cxr train {prepared} --config best.toml --out RUN"))
    return commands
