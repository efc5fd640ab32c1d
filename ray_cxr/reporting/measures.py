"""The numbers of a report: per finding and over all, each with its interval or the reason why there is none."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.data.consensus import composite_flags, composite_scores
from ray_cxr.evaluation import intervals, metrics
from ray_cxr.evaluation.intervals import Interval, RocBand
from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting.scores import Scores, n_patients, number

_log = logging.getLogger(__name__)

#: With fewer positive (or negative) patients than this the bootstrap's interval is too narrow to trust.
FEW_PATIENTS = 10
#: What is measured at an operating point, and needs flags.
AT_POINT = ("sensitivity", "specificity", "ppv", "npv", "f1", "flag_rate")
#: What is measured of calibrated probabilities.
OF_CALIBRATED = ("brier", "expected_calibration_error")
#: Every quantity that has an interval, by its key in metrics.json.
WITH_INTERVAL = ("auroc", "average_precision", *AT_POINT, "ppv_at_prevalence", "npv_at_prevalence", *OF_CALIBRATED)


@dataclass(frozen=True)
class Columns:
    """What a model says of some images, one entry per image in every array [n].

    Attributes:
        p, c: per finding, raw and calibrated probability, float64 with NaN for null.
        flags: per finding, int8 with -1 for null.
        points, expected: per finding, its operating point and the flag rate that validation led to expect.
    """

    p: dict[str, np.ndarray]
    c: dict[str, np.ndarray]
    flags: dict[str, np.ndarray]
    points: Mapping[str, Any]
    expected: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """What `measure` found.

    Attributes:
        findings: an entry for metrics.json per finding.
        macro, weighted: the means' entries.
        bands: per finding the interval of its ROC curve, where there is one.
    """

    findings: dict[str, dict[str, Any]]
    macro: dict[str, Any]
    weighted: dict[str, Any]
    bands: dict[str, RocBand]


def columns(table: Scores, rows: np.ndarray) -> Columns:
    """The scores of these rows."""
    return Columns(
        p={f: values[rows] for f, values in table.p.items()},
        c={f: values[rows] for f, values in table.c.items()},
        flags={f: values[rows] for f, values in table.flags.items()},
        points=table.model.get("operating_points") or {},
        expected=table.model.get("expected_flag_rates") or {},
    )


def composed(given: Columns, composites: Mapping[str, tuple[str, ...]]) -> tuple[Columns, dict[str, str]]:
    """With a column for each composite finding: the highest score of its members, flagged where any member is.

    Calibrated scores are taken where all members have them, because raw ones of several findings have no common scale:
    the commonest finding would mostly be the highest. A composite of which the model lacks a member is left without
    a column.

    Returns:
        The columns, and for each composite that has one `calibrated` or `raw`.
    """
    p, flags, scales = dict(given.p), dict(given.flags), {}
    for name, members in composites.items():
        if all(member in given.p for member in members):
            usable = all(member in given.c for member in members)
            usable = usable and all(
                np.array_equal(np.isnan(given.c[member]), np.isnan(given.p[member])) for member in members
            )
            scales[name] = "calibrated" if usable else "raw"
            p[name] = composite_scores(name, members, given.c if usable else given.p)
        if all(member in given.flags for member in members):
            flags[name] = composite_flags(name, members, given.flags)
    return Columns(p, given.c, flags, given.points, given.expected), scales


def measure(
    scored: Columns,
    labels: Mapping[str, np.ndarray],
    patients: np.ndarray,
    *,
    prevalences: Mapping[str, float],
    n_resamples: int,
    seed: int,
) -> Measured:
    """All numbers of these images.

    Args:
        scored: the model's columns, [n] each.
        labels: per finding int8 [n] with -1 where not labelled, in the order of the report.
        patients: ids [n].
        prevalences: per finding, the prevalence to compute predictive values for, 0..1.
        n_resamples, seed: of the bootstrap, which all findings and quantities share.
    """
    names = [f for f in labels if f in scored.p or (labels[f] >= 0).any()]
    shared = [finding for finding in names if finding in scored.p]
    _log.debug("bootstrap: %d resamples of %d images", n_resamples, len(patients))
    boot = intervals.bootstrap_findings(
        _stacked([labels[f] for f in shared], len(patients)),
        _stacked([scored.p[f] for f in shared], len(patients)),
        patients,
        flags=_stacked([scored.flags.get(f, np.full(len(patients), -1)) for f in shared], len(patients)),
        calibrated=_stacked([scored.c.get(f, np.full(len(patients), np.nan)) for f in shared], len(patients)),
        assumed_prevalence=np.array([prevalences.get(f, np.nan) for f in shared], dtype=np.float64),
        macro=np.array([finding != NO_FINDING for finding in shared], dtype=bool),
        n_resamples=n_resamples,
        seed=seed,
    )
    entries: dict[str, dict[str, Any]] = {}
    bands = {}
    for finding in names:
        entries[finding] = _empty_entry()
        if finding not in shared:
            entries[finding].update(_unscored(labels[finding]))
            continue
        found = boot.findings[shared.index(finding)]
        _measure_one(entries[finding], scored, finding, labels[finding], patients, prevalences.get(finding))
        _with_intervals(entries[finding], found)
        band = boot.roc[shared.index(finding)]
        if band is not None:
            bands[finding] = band
    counted = [f for f, e in entries.items() if e["auroc"] is not None and f != NO_FINDING]
    return Measured(
        findings=entries,
        macro=_mean(entries, counted, boot.macro, n_resamples, np.ones(len(counted))),
        weighted={
            "weights": "positives",
            **_mean(entries, counted, boot.weighted, n_resamples, np.array([entries[f]["positives"] for f in counted])),
        },
        bands=bands,
    )


def _stacked(arrays: list[np.ndarray], n: int) -> np.ndarray:
    return np.column_stack(arrays) if arrays else np.zeros((n, 0))


def _mean(
    entries: Mapping[str, Mapping[str, Any]],
    counted: list[str],
    found: Mapping[str, Interval],
    n_resamples: int,
    weights: np.ndarray,
) -> dict[str, Any]:
    """A mean over findings of AUROC and of average precision; a finding without the one has not the other."""
    out: dict[str, Any] = {}
    for key in ("auroc", "average_precision"):
        values = [entries[f][key] for f in counted]
        out[key] = float(np.average(values, weights=weights)) if counted else None
        out[f"{key}_low"], out[f"{key}_high"] = found[key].low, found[key].high
    out["undefined_resamples"] = found["auroc"].undefined if counted else n_resamples
    out["findings"] = counted
    out["reason"] = None if counted else "no finding has a defined AUROC"
    return out


def _empty_entry() -> dict[str, Any]:
    numbers = (
        "auroc_undefined_resamples auroc_delong_low auroc_delong_high threshold rule expected_flag_rate "
        "assumed_prevalence mean_calibrated reason caution"
    )
    return {
        "n": 0,
        "positives": 0,
        "positive_patients": 0,
        "prevalence": None,
        "unscored": 0,
        **dict.fromkeys(key for name in WITH_INTERVAL for key in (name, f"{name}_low", f"{name}_high")),
        **dict.fromkeys(numbers.split()),
        "undefined": {},
    }


def _unscored(labels: np.ndarray) -> dict[str, Any]:
    """The entry of a finding that the labels have and the scores have not."""
    n, reason = int((labels >= 0).sum()), "labelled, but the scores have no column for it"
    return {
        "n": n,
        "positives": int((labels == 1).sum()),
        "unscored": n,
        "reason": reason,
        "undefined": dict.fromkeys(WITH_INTERVAL, reason),
    }


def _measure_one(
    entry: dict[str, Any],
    scored: Columns,
    finding: str,
    labels: np.ndarray,
    patients: np.ndarray,
    prevalence: float | None,
) -> None:
    p = scored.p[finding]
    usable = (labels >= 0) & ~np.isnan(p)
    entry["unscored"] = int(((labels >= 0) & np.isnan(p)).sum())
    _discrimination(entry, labels[usable], p[usable], patients[usable])
    _at_point(entry, scored, finding, labels, prevalence)
    _calibrated(entry, scored.c.get(finding), labels)


def _discrimination(entry: dict[str, Any], y: np.ndarray, p: np.ndarray, patients: np.ndarray) -> None:
    entry["n"], entry["positives"] = len(y), int(y.sum())
    entry["positive_patients"] = n_patients(patients[y == 1])
    entry["prevalence"] = float(y.mean()) if len(y) else None
    entry["reason"] = metrics.undefined_reason(y)
    if entry["reason"] is not None:
        entry["undefined"] |= dict.fromkeys(("auroc", "average_precision"), entry["reason"])
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


def _at_point(
    entry: dict[str, Any], scored: Columns, finding: str, labels: np.ndarray, prevalence: float | None
) -> None:
    point = scored.points.get(finding) or {}
    entry["threshold"], entry["rule"] = number(point.get("threshold")), point.get("rule")
    entry["expected_flag_rate"] = number(scored.expected.get(finding))
    entry["assumed_prevalence"] = prevalence
    undefined: dict[str, str] = entry["undefined"]
    if prevalence is None:
        undefined |= dict.fromkeys(("ppv_at_prevalence", "npv_at_prevalence"), "no prevalence was given")
    flags = scored.flags.get(finding)
    seen = (labels >= 0) & (flags >= 0) if flags is not None else np.zeros(len(labels), dtype=bool)
    if flags is None or not seen.any():
        lacking = "no labelled images" if flags is not None and (flags >= 0).any() else "no operating point"
        undefined |= dict.fromkeys((*AT_POINT, "ppv_at_prevalence", "npv_at_prevalence"), lacking)
        return
    cells = metrics.confusion(labels[seen], flags[seen] == 1)
    reasons = {
        "sensitivity": "no positive images",
        "specificity": "no negative images",
        "ppv": "no image is flagged",
        "npv": "every image is flagged",
        "f1": "no positive images, and none flagged",
        "flag_rate": "no labelled images",
    }
    for name in AT_POINT:
        entry[name] = getattr(cells, name)
        if entry[name] is None:
            undefined[name] = reasons[name]
    if prevalence is None:
        return
    if cells.sensitivity is None or cells.specificity is None:
        lacking = undefined.get("sensitivity") or undefined["specificity"]
        undefined |= dict.fromkeys(("ppv_at_prevalence", "npv_at_prevalence"), lacking)
        return
    values = metrics.predictive_values_at(cells.sensitivity, cells.specificity, prevalence)
    for name, value in zip(("ppv_at_prevalence", "npv_at_prevalence"), values, strict=True):
        entry[name] = value
        if value is None:
            undefined[name] = "nothing would be flagged" if name.startswith("ppv") else "everything would be flagged"


def _calibrated(entry: dict[str, Any], c: np.ndarray | None, labels: np.ndarray) -> None:
    known = (labels >= 0) & ~np.isnan(c) if c is not None else np.zeros(len(labels), dtype=bool)
    if c is None or not known.any():
        entry["undefined"] |= dict.fromkeys(OF_CALIBRATED, "no calibrated probabilities")
        return
    entry["brier"] = metrics.brier(labels[known], c[known])
    entry["expected_calibration_error"] = metrics.expected_calibration_error(labels[known], c[known])
    entry["mean_calibrated"] = float(c[known].mean())


def _with_intervals(entry: dict[str, Any], found: Mapping[str, Interval]) -> None:
    for name in WITH_INTERVAL:
        if entry[name] is None:
            continue
        interval = found[name]
        entry[f"{name}_low"], entry[f"{name}_high"] = interval.low, interval.high
        if interval.low is None:
            entry["undefined"][f"{name}_low"] = f"no interval: {interval.reason}"
    entry["auroc_undefined_resamples"] = found["auroc"].undefined
    if entry["auroc"] is not None and found["auroc"].low is None:
        entry["caution"] = f"no interval: {found['auroc'].reason}"
