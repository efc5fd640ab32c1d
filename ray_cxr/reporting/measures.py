"""The numbers of a report: per finding and over all, each with its interval or the reason why there is none."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from ray_cxr.evaluation import intervals, metrics
from ray_cxr.labels import LABELS, NO_FINDING
from ray_cxr.reporting.labelled import Evaluated
from ray_cxr.reporting.scores import Scores, n_patients, number

_log = logging.getLogger(__name__)

#: With fewer positive (or negative) patients than this the bootstrap's interval is too narrow to trust.
FEW_PATIENTS = 10


def measure(table: Scores, evaluated: Evaluated, result: dict[str, Any], n_resamples: int, seed: int) -> None:
    rows = evaluated.rows
    names = [f for f in LABELS if f in table.findings or (evaluated.labels[f] >= 0).any()]
    shared = [finding for finding in names if finding in table.findings]
    y = np.column_stack([evaluated.labels[f] for f in shared]) if shared else np.zeros((len(rows), 0))
    s = np.column_stack([table.p[f][rows] for f in shared]) if shared else np.zeros((len(rows), 0))
    _log.debug("bootstrap: %d resamples of %d images", n_resamples, len(rows))
    boot = intervals.bootstrap_auroc(
        y,
        s,
        evaluated.patients,
        n_resamples=n_resamples,
        seed=seed,
        macro=np.array([finding != NO_FINDING for finding in shared], dtype=bool),
    )
    flags = np.column_stack(
        [table.flags[f][rows] if f in table.flags else np.full(len(rows), -1) for f in shared]
        or [np.zeros((len(rows), 0))]
    )
    judged = (y >= 0) & (flags >= 0)
    positive, negative = judged & (y == 1), judged & (y == 0)
    rates = intervals.bootstrap_ratios(
        np.hstack([positive & (flags == 1), negative & (flags == 0)]),
        np.hstack([positive, negative]),
        evaluated.patients,
        n_resamples=n_resamples,
        seed=seed,
    )
    points = table.model.get("operating_points") or {}
    expected = table.model.get("expected_flag_rates") or {}
    for finding in names:
        labels = evaluated.labels[finding]
        entry = _empty_entry()
        result["findings"][finding] = entry
        if finding not in table.findings:
            entry["n"], entry["positives"] = int((labels >= 0).sum()), int((labels == 1).sum())
            entry["unscored"] = entry["n"]
            entry["reason"] = "labelled, but the scores have no column for it"
            continue
        column = shared.index(finding)
        p = table.p[finding][rows]
        usable = (labels >= 0) & ~np.isnan(p)
        entry["unscored"] = int(((labels >= 0) & np.isnan(p)).sum())
        _measure_one(entry, labels[usable], p[usable], evaluated.patients[usable])
        entry["auroc_low"], entry["auroc_high"] = boot.findings[column].low, boot.findings[column].high
        entry["auroc_undefined_resamples"] = boot.findings[column].undefined
        if entry["auroc"] is not None and boot.findings[column].low is None:
            entry["caution"] = f"no interval: {boot.findings[column].reason}"
        point = points.get(finding) or {}
        entry["threshold"], entry["rule"] = number(point.get("threshold")), point.get("rule")
        entry["expected_flag_rate"] = number(expected.get(finding))
        if judged[:, column].any():
            seen = judged[:, column]
            cells = metrics.confusion(labels[seen], flags[seen, column] == 1)
            low_high = {"sensitivity": rates[column], "specificity": rates[len(shared) + column]}
            for name, interval in low_high.items():
                entry[name] = getattr(cells, name)
                entry[f"{name}_low"], entry[f"{name}_high"] = interval.low, interval.high
            entry["ppv"], entry["npv"], entry["flag_rate"] = cells.ppv, cells.npv, cells.flag_rate
        if finding in table.c:
            c = table.c[finding][rows]
            known = (labels >= 0) & ~np.isnan(c)
            if known.any():
                entry["brier"] = metrics.brier(labels[known], c[known])
                entry["mean_calibrated"] = float(c[known].mean())
    defined = [f for f, e in result["findings"].items() if e["auroc"] is not None and f != NO_FINDING]
    result["macro"] = {
        "auroc": float(np.mean([result["findings"][f]["auroc"] for f in defined])) if defined else None,
        "auroc_low": boot.macro.low,
        "auroc_high": boot.macro.high,
        "undefined_resamples": boot.macro.undefined if defined else n_resamples,
        "findings": defined,
        "reason": None if defined else "no finding has a defined AUROC",
    }


def _empty_entry() -> dict[str, Any]:
    numbers = (
        "auroc auroc_low auroc_high auroc_undefined_resamples auroc_delong_low auroc_delong_high "
        "average_precision threshold rule sensitivity sensitivity_low sensitivity_high specificity "
        "specificity_low specificity_high ppv npv flag_rate expected_flag_rate brier mean_calibrated reason "
        "caution"
    )
    return {
        "n": 0,
        "positives": 0,
        "positive_patients": 0,
        "prevalence": None,
        "unscored": 0,
        **dict.fromkeys(numbers.split()),
    }


def _measure_one(entry: dict[str, Any], y: np.ndarray, p: np.ndarray, patients: np.ndarray) -> None:
    entry["n"], entry["positives"] = len(y), int(y.sum())
    entry["positive_patients"] = n_patients(patients[y == 1])
    entry["prevalence"] = float(y.mean()) if len(y) else None
    entry["reason"] = metrics.undefined_reason(y)
    if entry["reason"] is not None:
        return
    entry["auroc"] = metrics.auroc(y, p)
    entry["average_precision"] = metrics.average_precision(y, p)
    pair = intervals.delong(y, p)
    bounds = intervals.delong_interval(*pair) if pair else None
    if bounds:
        entry["auroc_delong_low"], entry["auroc_delong_high"] = bounds
    negative_patients = n_patients(patients[y == 0])
    few, kind = min((entry["positive_patients"], "positive"), (negative_patients, "negative"))
    if few < FEW_PATIENTS:
        who = f"only {few} {kind} patients" if few > 1 else f"only one {kind} patient"
        entry["caution"] = f"{who}: the interval is narrower than the truth"
    elif entry["auroc"] in (0.0, 1.0):
        entry["caution"] = "the classes separate fully here: the bootstrap cannot see beyond that"
