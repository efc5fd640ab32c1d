"""The alert budget and the reading order of a report's images, from a score table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ray_cxr.evaluation import alerts, calibration, usability
from ray_cxr.evaluation.alerts import Alerts, RuleAlerts
from ray_cxr.evaluation.reading_order import LIST_LENGTH, MINUTES_PER_STUDY, ReadingOrder, measure_reading_order
from ray_cxr.evaluation.usability import Warned
from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting.evaluation_set import EvaluationSet, Population
from ray_cxr.reporting.flagged import explain_no_flags
from ray_cxr.reporting.html import format_percent
from ray_cxr.reporting.measures import BootstrapSettings, EvaluationResult
from ray_cxr.reporting.scores import Scores, finite_or_none
from ray_cxr.reporting.worklist import sort_studies

#: Names of flags whose rule is not known, or differs between findings.
_UNKNOWN, _SEVERAL = "flags of the score table", "several rules"


def measure_alerts(
    table: Scores, population: Population, evaluated: EvaluationSet | None, bootstrap: BootstrapSettings
) -> Alerts:
    """Measure what the model's operating points and each alternative rule flag; `evaluated` has the labels, if any."""
    findings = [finding for finding in table.findings if finding != NO_FINDING]
    n = len(population.rows)
    flags = {rule: found for rule, found in _flag(table, findings, population.rows).items() if (found >= 0).any()}
    missing = np.full(n, -1, dtype=np.int8)
    labels = [missing if evaluated is None else evaluated.labels[finding] for finding in findings]
    abnormal = missing if evaluated is None else alerts.find_abnormal(evaluated.labels)
    shares = alerts.measure_rules(
        flags,
        np.column_stack([*labels, missing])[:, : len(findings)],
        abnormal,
        population.patients,
        n_resamples=bootstrap.n_resamples,
        seed=bootstrap.seed,
    )
    chosen = _name_rule(table.operating_points, findings)
    rules = (
        RuleAlerts(rule, rule == chosen, int((flags[rule] >= 0).any(axis=0).sum()), found)
        for rule, found in shares.items()
    )
    reason = None if flags else explain_no_flags(n)
    images = "all scored images" if evaluated is None else f"the evaluated images ({evaluated.description})"
    with_finding, without, unknown = (int((abnormal == status).sum()) for status in (1, 0, -1))
    return Alerts(images, with_finding, without, unknown, tuple(rules), reason)


def _flag(table: Scores, findings: list[str], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the flags of the chosen rule and of each alternative of the bundle, int8 [n, F] with -1 for none."""
    stored = table.model.get("operating_alternatives") or {}
    missing = np.full(len(table.ids), -1, dtype=np.int8)
    flags = {_name_rule(table.operating_points, findings): [table.flags.get(f, missing)[rows] for f in findings]}
    for rule in dict.fromkeys(rule for points in stored.values() for rule in points or {}):
        flags.setdefault(rule, [_apply(table.p[f][rows], (stored.get(f) or {}).get(rule)) for f in findings])
    return {rule: np.column_stack([*found, missing[rows]])[:, : len(findings)] for rule, found in flags.items()}


def _apply(p: np.ndarray, point: Mapping[str, Any] | None) -> np.ndarray:
    threshold = finite_or_none((point or {}).get("threshold"))
    if threshold is None:
        return np.full(len(p), -1, dtype=np.int8)
    return np.where(np.isnan(p), np.int8(-1), calibration.apply_threshold(p, threshold).astype(np.int8))


def _name_rule(points: Mapping[str, Any], findings: list[str]) -> str:
    rules = {point.get("rule") for f in findings if (point := points.get(f))}
    return _SEVERAL if len(rules) > 1 else str(next(iter(rules), None) or _UNKNOWN)


def measure_order(table: Scores, evaluated: EvaluationSet, bootstrap: BootstrapSettings) -> ReadingOrder | str:
    """Measure how much sooner evaluated studies with findings are read in the order of the worklist; or say why not."""
    codes, places = sort_studies(table.select(evaluated.rows))
    ranked = places < np.inf
    if not ranked.any():
        return "the scores have no priority"
    names = [f for f, y in evaluated.labels.items() if f != NO_FINDING and (y == 1).any()]
    labels = np.column_stack([alerts.find_abnormal(evaluated.labels), *(evaluated.labels[f] for f in names)])
    # A study has a finding if one of its images has it, and lacks it if all lack it.
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(places)))
    present, absent = (
        combine.reduceat(labels[order] == value, starts, axis=0)
        for combine, value in ((np.logical_or, 1), (np.logical_and, 0))
    )
    status = np.where(present, 1, np.where(absent, 0, -1)).astype(np.int8)[ranked]
    return measure_reading_order(
        -places[ranked],
        status[:, 0],
        status[:, 1:],
        names,
        evaluated.patients[order[starts]][ranked],
        n_resamples=bootstrap.n_resamples,
        seed=bootstrap.seed,
    )


def is_order_worse(found: ReadingOrder) -> bool:
    """Whether the worklist is clearly worse than first come, first served."""
    return found.minutes_sooner.high is not None and found.minutes_sooner.high < 0.0


def summarize_order(found: ReadingOrder, unit: str) -> list[str]:
    """Say whether the worklist brings abnormal images or studies forward; `unit` is `image` or `study`."""
    gain, units = found.minutes_sooner, {"image": "images", "study": "studies"}[unit]
    if gain.value is None:
        return []
    interval = "no interval" if gain.low is None or gain.high is None else ""
    when = f"{_minutes(gain.value)} min {'sooner' if gain.value >= 0 else 'later'}"
    if not interval and gain.low is not None and gain.high is not None:
        low, high = sorted((abs(gain.low), abs(gain.high)))
        interval = f"95% interval {_minutes(low)} to {_minutes(high)}"
        if gain.low < 0.0 < gain.high:
            interval = f"95% interval {_minutes(gain.low)} later to {_minutes(gain.high)} sooner"
    of_list = f"with {LIST_LENGTH} {units} of {MINUTES_PER_STUDY} minutes each"
    if is_order_worse(found):
        return [
            f"The worklist is worse than first come, first served: abnormal {units} are read {when} ({interval}), "
            f"{of_list}. Check for inverted scores, and do not read in this order."
        ]
    if not is_order_better(found):
        return [
            f"The worklist is not shown to differ from first come, first served: abnormal {units} are read {when} "
            f"({interval}), {of_list}. Do not rely on its order."
        ]
    return [
        f"The worklist brings abnormal {units} forward: they are read {when} ({interval}), {of_list}.",
        f"Normal {units} wait longer. If {units} are read as they arrive, the gain is smaller.",
    ]


def is_order_better(found: ReadingOrder) -> bool:
    """Return whether the worklist is shown to bring abnormal studies forward."""
    return found.minutes_sooner.low is not None and found.minutes_sooner.low > 0.0


def _minutes(value: float) -> str:
    return f"{abs(value):.0f}" if abs(value) >= 1.0 else f"{abs(value):.1f}"


def summarize_alerts(found: Alerts) -> list[str]:
    """Return a sentence on the flags of the chosen rule; nothing without flags."""
    if found.chosen is None or found.chosen.shares["images_flagged"].value is None:
        return []
    flagged, without, with_finding = (found.chosen.shares[key] for key in list(alerts.MEASURES)[:3])
    interval = "no interval"
    if flagged.low is not None:
        interval = f"95% interval {format_percent(flagged.low, 0)} to {format_percent(flagged.high, 0)}"
    parts = [
        f"{format_percent(share.value, 0)} of those {kind} a finding"
        for share, kind in ((without, "without"), (with_finding, "with"))
        if share.value is not None
    ]
    split = f": {', '.join(parts)}" if parts else ""
    share = f"{format_percent(flagged.value, 0)} of images ({interval}) have at least one flag"
    name = {_UNKNOWN: f"the {_UNKNOWN}", _SEVERAL: _SEVERAL}.get(found.chosen.rule, f"the rule {found.chosen.rule}")
    return [f"With {name}, {share}{split}."]


def list_warnings(
    table: Scores, population: Population, evaluation: EvaluationResult | None, found: Alerts
) -> list[Warned]:
    """List where the results cannot be used: of the model, of the flags of these images, and of the mean AUROC."""
    findings = [finding for finding in table.findings if finding in table.flags]
    flags = {finding: table.flags[finding][population.rows] for finding in findings}
    rule = _name_rule(table.operating_points, findings)
    warnings = usability.warn_of_flags(flags, None if rule in (_UNKNOWN, _SEVERAL) else rule)
    chance = usability.warn_of_chance(flags, *_list_aurocs(table, evaluation))
    warnings += chance
    shares = {one.rule: one.shares["images_flagged"].value for one in found.rules}
    model = {**table.model, "findings": table.findings}
    warnings += usability.warn_of_model(model, shares, helps=not chance) if table.is_own else []
    reason = evaluation.macro.headline_reason if evaluation else None
    return [*warnings, *([usability.warn_of_headline(reason)] if reason else [])]


def _list_aurocs(
    table: Scores, evaluation: EvaluationResult | None
) -> tuple[dict[str, tuple[float | None, float | None, float | None]], str]:
    """Return AUROC and interval per finding: of the report's images, or without labels of the model's validation.

    Findings with few patients are left out.
    """
    least = usability.HEADLINE_PATIENTS
    if evaluation is not None:
        enough = {name: found for name, found in evaluation.findings.items() if found.fewest_patients >= least}
        shown = {finding: found.auroc.shown for finding, found in enough.items()}
        return {finding: (auroc.value, auroc.low, auroc.high) for finding, auroc in shown.items()}, "these images"
    cells = ((table.model.get("provenance") or {}).get("evaluation") or {}).get("findings") or {}
    keys = ("auroc", "auroc_low", "auroc_high")
    patients = ("positive_patients", "negative_patients")
    known = {name: cell for name, cell in cells.items() if min(cell.get(key) or 0 for key in patients) >= least}
    found = {finding: tuple(cell.get(key) for key in keys) for finding, cell in known.items()}
    return {finding: (one[0], one[1], one[2]) for finding, one in found.items()}, "its validation images"


def note_missed_findings(found: Alerts) -> list[str]:
    """Return a note if the chosen rule must miss images with a finding, because it is meant to flag fewer."""
    if found.chosen is None:
        return []
    name, _, limit = found.chosen.rule.partition("=")
    known = found.n_with_finding + found.n_without_finding
    if name != "any_flag_rate" or found.n_with_finding <= float(limit) * known:
        return []
    present = format_percent(found.n_with_finding / known, 0)
    return [
        f"{present} of images have a finding, more than the rule {found.chosen.rule} is meant to flag. Images without "
        "a flag need to be read too; see the alert budget for other rules."
    ]
