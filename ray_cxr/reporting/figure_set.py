"""The set of figures of a report: which are drawn, and the numbers that go into each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from ray_cxr.evaluation import calibration
from ray_cxr.evaluation.reading_order import ReadingOrder
from ray_cxr.evaluation.subgroups import Difference, Subgroups
from ray_cxr.evaluation.underdiagnosis import Underdiagnosis
from ray_cxr.labels import FINDINGS
from ray_cxr.reporting import (
    curve_figures,
    decision_figures,
    forest_figures,
    image_figures,
    label_figures,
    night_figures,
)
from ray_cxr.reporting.cases import Band
from ray_cxr.reporting.evaluation_set import EvaluationSet
from ray_cxr.reporting.forest_figures import ForestColumn, ForestRow
from ray_cxr.reporting.html import format_group, format_percent
from ray_cxr.reporting.measures import EvaluationResult, MeanResult
from ray_cxr.reporting.plots import Estimate
from ray_cxr.reporting.result import ReportResult
from ray_cxr.reporting.scores import Scores

#: Names of all figures, in the order of the page.
NAMES = (
    "auroc", "roc", "precision_recall", "distributions", "reliability", "net_benefit", "selective", "subgroups",
    "subgroup_differences", "underdiagnosis", "reading_order", "compared", "consensus", "localisation", "drift",
    "nights", "examples", "heatmaps", "radiographs", "learning_curves", "prevalence", "cooccurrence", "priority",
)  # fmt: skip
#: Names of the subgroups' attributes on the page.
ATTRIBUTES = {"sex": "Sex", "age_band": "Age, years", "view": "View", "follow_up": "Follow-up"}
_DRAWN_CASES = {
    "examples": image_figures.draw_examples,
    "heatmaps": image_figures.draw_heatmaps,
    "radiographs": image_figures.draw_radiographs,
}


def draw_figures(table: Scores, result: ReportResult, cases: Mapping[str, list[Band]]) -> dict[str, Figure]:
    """Draw a report's figures by name, except those without data; `cases` are those of `examples.select_cases`."""
    figures: dict[str, Figure | None] = {}
    for name, draw in _DRAWN_CASES.items():
        figures[name] = draw(cases[name]) if cases.get(name) else None
    labelled = result.labelled
    if labelled:
        figures |= draw_evaluation(table, labelled.images, labelled.evaluation)
        curves = {f: curve for f, curve in labelled.decisions.net_benefit.items() if not isinstance(curve, str)}
        figures["net_benefit"] = decision_figures.plot_net_benefit(curves) if curves else None
        selections = {f: found for f, found in labelled.decisions.selection.items() if not isinstance(found, str)}
        figures["selective"] = decision_figures.plot_selection(selections) if selections else None
        if isinstance(labelled.subgroups, Subgroups):
            figures |= _draw_subgroups(labelled.subgroups, labelled.evaluation.macro)
        if isinstance(labelled.underdiagnosis, Underdiagnosis):
            figures["underdiagnosis"] = _draw_underdiagnosis(labelled.underdiagnosis)
        if isinstance(labelled.reading_order, ReadingOrder):
            figures["reading_order"] = curve_figures.plot_reading_order(labelled.reading_order)
    if result.compared:
        figures["compared"] = forest_figures.plot_differences(result.compared)
    if result.consensus:
        evaluation = result.consensus.evaluation
        has_auroc = any(found.auroc.value is not None for found in evaluation.findings.values())
        figures["consensus"] = _draw_aurocs(evaluation) if has_auroc else None
    if result.boxes and result.boxes.localisation.overall.n:
        figures["localisation"] = forest_figures.plot_localisation(result.boxes.localisation)
    if result.drift:
        figures["drift"] = forest_figures.plot_drift(result.drift.measured.flags)
    if result.nights:
        figures["nights"] = night_figures.plot_nights(result.nights.nights)
    priority = table.priority[np.isfinite(table.priority)]
    if labelled is None and len(priority):
        figures["priority"] = curve_figures.plot_priorities(priority)
    if table.model.get("curves"):
        figures["learning_curves"] = curve_figures.plot_learning_curves(table.model["curves"])
    return {name: figure for name, figure in figures.items() if figure is not None}


def draw_evaluation(table: Scores, evaluated: EvaluationSet, evaluation: EvaluationResult) -> dict[str, Figure]:
    """Draw the figures of an evaluation against labels, by name."""
    figures: dict[str, Figure] = {}
    panels = _build_panels(table, evaluated, evaluation)
    if panels:
        figures["auroc"] = _draw_aurocs(evaluation)
        figures["roc"] = curve_figures.plot_roc(panels)
        figures["precision_recall"] = curve_figures.plot_precision_recall(panels)
        figures["distributions"] = curve_figures.plot_distributions(panels)
    calibrated = build_reliability(table, evaluated, evaluation)
    if calibrated:
        figures["reliability"] = curve_figures.plot_reliability(calibrated)
    labelled = [
        (finding, found.prevalence, found.positives, found.metrics["flag_rate"].value)
        for finding, found in evaluation.findings.items()
        if found.prevalence is not None
    ]
    if labelled:
        figures["prevalence"] = label_figures.plot_prevalence(labelled)
    present = [finding for finding in FINDINGS if (evaluated.labels[finding] == 1).any()]
    if len(present) > 1:
        positive = np.column_stack([evaluated.labels[finding] == 1 for finding in present]).astype(np.int64)
        figures["cooccurrence"] = label_figures.plot_cooccurrence(positive.T @ positive, present, len(evaluated.rows))
    return figures


def _draw_aurocs(evaluation: EvaluationResult) -> Figure:
    aurocs = {finding: Estimate.of(found.auroc.shown) for finding, found in evaluation.findings.items()}
    known = {finding: auroc for finding, auroc in aurocs.items() if auroc is not None}
    return curve_figures.plot_aurocs(known, Estimate.of(evaluation.macro.auroc.shown))


def _build_panels(table: Scores, evaluated: EvaluationSet, evaluation: EvaluationResult) -> list[curve_figures.Panel]:
    panels = []
    for finding, found in evaluation.findings.items():
        auroc = Estimate.of(found.auroc.shown)
        if auroc is None:
            continue
        labels, p = evaluated.labels[finding], table.p[finding][evaluated.rows]
        usable = (labels >= 0) & ~np.isnan(p)
        precision = Estimate.of(found.metrics["average_precision"])
        sensitivity, specificity, ppv = (found.metrics[key].value for key in ("sensitivity", "specificity", "ppv"))
        rates = (sensitivity, specificity, ppv)
        y, s = labels[usable], p[usable]
        panels.append(curve_figures.Panel(finding, y, s, auroc, precision, rates, found.roc_band, found.threshold))
    return panels


def build_reliability(
    table: Scores, evaluated: EvaluationSet, evaluation: EvaluationResult
) -> list[curve_figures.Reliability]:
    """Compute the calibration curve of each finding, with bins of equal counts."""
    panels = []
    for finding, found in evaluation.findings.items():
        error = Estimate.of(found.metrics["expected_calibration_error_equal_mass"])
        if error is None:
            continue
        labels, c = evaluated.labels[finding], table.c[finding][evaluated.rows]
        known = (labels >= 0) & ~np.isnan(c)
        bins = calibration.reliability_curve(labels[known], c[known], patients=evaluated.patients[known])
        points = [(bin_.predicted, bin_.observed, bin_.observed_low, bin_.observed_high) for bin_ in bins if bin_.n]
        predicted, observed, low, high = np.array(points, dtype=np.float64).T
        panels.append(curve_figures.Reliability(finding, c[known], predicted, observed, low, high, error))
    return panels


def _draw_subgroups(found: Subgroups, macro: MeanResult) -> dict[str, Figure]:
    """Draw the means of each group, and their differences to the largest group of the attribute."""
    groups = [group for group in found.groups if not group.crossing]
    if not groups:
        return {}
    rows = []
    for group in groups:
        means = (Estimate.of(group.shared.auroc), Estimate.of(group.shared.sensitivity))
        rows.append(ForestRow(ATTRIBUTES[group.attribute], format_group(group.value), group.n, means, group.small))
    # The overall mean is comparable only if it averages the same findings as the groups' means.
    averaged = [set(group.shared.auroc.findings) for group in groups if group.shared.auroc.findings]
    overall = macro.auroc.value if all(findings == set(macro.findings) for findings in averaged) else None
    columns = [
        ForestColumn("macro AUROC", overall, "" if overall is None else f"all images {overall:.3f}"),
        ForestColumn("mean sensitivity"),
    ]
    figures = {"subgroups": forest_figures.plot_subgroups(rows, columns)}
    sizes = {group.value: group.n for group in groups}
    pairs: dict[tuple[str, str, str], dict[str, Difference]] = {}
    for difference in found.differences:
        if difference.finding is None and not difference.crossing:
            names = (difference.attribute, difference.value, difference.reference)
            pairs.setdefault(names, {})[difference.quantity] = difference
    rows = []
    for (attribute, value, reference), pair in pairs.items():
        changes = tuple(
            Estimate.of(pair.get(quantity), "difference") for quantity in ("auroc", "sensitivity", "specificity")
        )
        is_small = any(difference.small for difference in pair.values())
        label = f"{format_group(value)} minus {format_group(reference)}"
        rows.append(ForestRow(ATTRIBUTES[attribute], label, sizes[value], changes, is_small))
    if rows:
        names = ("macro AUROC", "mean sensitivity", "mean specificity")
        columns = [ForestColumn(f"difference in {name}", 0.0, "no difference", signed=True) for name in names]
        figures["subgroup_differences"] = forest_figures.plot_subgroups(rows, columns)
    return figures


def _draw_underdiagnosis(found: Underdiagnosis) -> Figure | None:
    """Draw underdiagnosis and overdiagnosis of images in each group, with those of all images."""
    keys = ("underdiagnosis", "overdiagnosis")
    rows = []
    for group in (group for group in found.groups if not group.crossing):
        rates = [group.rates[key] for key in keys]
        estimates = tuple(Estimate.of(rate) for rate in rates)
        small = any(rate.small for rate in rates)
        rows.append(ForestRow(ATTRIBUTES[group.attribute], format_group(group.value), rates[0].n, estimates, small))
    columns = []
    for key, name in zip(keys, ("underdiagnosis: finding, no flag", "overdiagnosis: no finding, flag"), strict=True):
        overall = Estimate.of(found.overall[key])
        label = "" if overall is None else f"all images {format_percent(overall.value)}"
        columns.append(ForestColumn(name, None if overall is None else overall.value, label, percent=1))
    drawn = any(any(row.estimates) for row in rows)
    return forest_figures.plot_subgroups(rows, columns, counted="images counted") if drawn else None
