"""The set of figures of a report: which are drawn, and the numbers that go into each."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ray_cxr.evaluation import calibration, drift, localisation, subgroups
from ray_cxr.labels import FINDINGS, NO_FINDING
from ray_cxr.reporting import curve_figures, forest_figures, image_figures, label_figures
from ray_cxr.reporting.comparators import ScoreComparison
from ray_cxr.reporting.evaluation_set import EvaluationSet
from ray_cxr.reporting.examples import sample_examples, sample_radiographs, select_heatmap_examples
from ray_cxr.reporting.measures import EvaluationResult, MeanResult
from ray_cxr.reporting.plots import Estimate
from ray_cxr.reporting.scores import Scores

#: Names of the subgroups' attributes on the page.
ATTRIBUTES = {"sex": "Sex", "age_band": "Age, years", "view": "View", "follow_up": "Follow-up"}


def _to_estimate(one: Any, name: str = "value") -> Estimate | None:
    """Convert a result with an interval; None if there is none or it is undefined."""
    value = getattr(one, name, None)
    return None if value is None else Estimate(value, one.low, one.high)


def draw_evaluation(
    table: Scores, evaluated: EvaluationSet, evaluation: EvaluationResult, seed: int
) -> dict[str, Figure]:
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
        (finding, one.prevalence, one.positives, one.metrics["flag_rate"].value)
        for finding, one in evaluation.findings.items()
        if one.prevalence is not None
    ]
    if labelled:
        figures["prevalence"] = label_figures.plot_prevalence(labelled)
    present = [finding for finding in FINDINGS if (evaluated.labels[finding] == 1).any()]
    if len(present) > 1:
        positive = np.column_stack([evaluated.labels[finding] == 1 for finding in present]).astype(np.int64)
        figures["cooccurrence"] = label_figures.plot_cooccurrence(positive.T @ positive, present, len(evaluated.rows))
    groups = sample_examples(table, evaluated, seed)
    if any(tile.image is not None for _, tiles in groups for tile in tiles):
        figures["examples"] = image_figures.draw_examples(groups)
    bands = select_heatmap_examples(table, evaluated)
    if any(tiles for _, tiles in bands):
        figures["heatmaps"] = image_figures.draw_heatmaps(bands)
    radiographs = sample_radiographs(table, evaluated, seed)
    if any(one.image is not None for one in radiographs):
        figures["radiographs"] = image_figures.draw_radiographs(radiographs)
    return figures


def _draw_aurocs(evaluation: EvaluationResult) -> Figure:
    aurocs = {finding: _to_estimate(one.auroc) for finding, one in evaluation.findings.items()}
    known = {finding: one for finding, one in aurocs.items() if one is not None}
    return curve_figures.plot_aurocs(known, _to_estimate(evaluation.macro.auroc))


def _build_panels(table: Scores, evaluated: EvaluationSet, evaluation: EvaluationResult) -> list[curve_figures.Panel]:
    panels = []
    for finding, one in evaluation.findings.items():
        auroc = _to_estimate(one.auroc)
        if auroc is None:
            continue
        labels, p = evaluated.labels[finding], table.p[finding][evaluated.rows]
        usable = (labels >= 0) & ~np.isnan(p)
        band = one.roc_band
        sensitivity, specificity, ppv = (one.metrics[key].value for key in ("sensitivity", "specificity", "ppv"))
        panels.append(
            curve_figures.Panel(
                finding=finding,
                y=labels[usable],
                s=p[usable],
                auroc=auroc,
                average_precision=_to_estimate(one.metrics["average_precision"]),
                rates=(sensitivity, specificity, ppv),
                band=(band.false_positive_rate, band.low, band.high) if band else None,
                threshold=one.threshold,
            )
        )
    return panels


def build_reliability(
    table: Scores, evaluated: EvaluationSet, evaluation: EvaluationResult
) -> list[curve_figures.Reliability]:
    """Compute the calibration curve of each finding, with bins of equal counts."""
    panels = []
    for finding, one in evaluation.findings.items():
        error = _to_estimate(one.metrics["expected_calibration_error"])
        if error is None:
            continue
        labels, c = evaluated.labels[finding], table.c[finding][evaluated.rows]
        known = (labels >= 0) & ~np.isnan(c)
        bins = calibration.reliability_curve(labels[known], c[known], patients=evaluated.patients[known])
        predicted, observed, low, high = (
            np.array([getattr(one, name) for one in bins if one.n], dtype=np.float64)
            for name in ("predicted", "observed", "observed_low", "observed_high")
        )
        panels.append(curve_figures.Reliability(finding, c[known], predicted, observed, low, high, error))
    return panels


def draw_subgroups(found: subgroups.Subgroups, macro: MeanResult) -> dict[str, Figure]:
    """Draw macro AUROC and mean sensitivity of each group, and the differences to its attribute's largest group."""
    groups = [one for one in found.groups if not one.crossing]
    if not groups:
        return {}
    rows = [
        forest_figures.ForestRow(
            ATTRIBUTES.get(one.attribute, one.attribute),
            one.value,
            one.n,
            (_to_estimate(one.shared.auroc), _to_estimate(one.shared.sensitivity)),
            one.small,
        )
        for one in groups
    ]
    # The overall mean is comparable only if it averages the same findings as the groups' means.
    same = all(set(one.shared.auroc.findings) == set(macro.findings) for one in groups if one.shared.auroc.findings)
    overall = macro.auroc.value if same else None
    columns = [
        forest_figures.ForestColumn("macro AUROC", overall, "" if overall is None else f"all images {overall:.3f}"),
        forest_figures.ForestColumn("mean sensitivity"),
    ]
    figures = {"subgroups": forest_figures.plot_subgroups(rows, columns)}
    sizes = {one.value: one.n for one in groups}
    pairs: dict[tuple[str, str, str], dict[str, subgroups.Difference]] = {}
    for one in found.differences:
        if one.finding is None and not one.crossing:
            pairs.setdefault((one.attribute, one.value, one.reference), {})[one.quantity] = one
    if pairs:
        figures["subgroup_differences"] = forest_figures.plot_subgroups(
            [
                forest_figures.ForestRow(
                    ATTRIBUTES.get(attribute, attribute),
                    f"{value} − {reference}",
                    sizes[value],
                    tuple(_to_estimate(pair.get(quantity), "difference") for quantity in ("sensitivity", "auroc")),
                    any(one.small for one in pair.values()),
                )
                for (attribute, value, reference), pair in pairs.items()
            ],
            [
                forest_figures.ForestColumn("difference in mean sensitivity", 0.0, "no difference", signed=True),
                forest_figures.ForestColumn("difference in macro AUROC", 0.0, "no difference", signed=True),
            ],
        )
    return figures


def draw_consensus(evaluation: EvaluationResult) -> Figure | None:
    """Draw the AUROC of each finding against a consensus table; None if none is defined."""
    defined = any(one.auroc.value is not None for one in evaluation.findings.values())
    return _draw_aurocs(evaluation) if defined else None


def draw_comparison(compared: ScoreComparison, first: str, second: str) -> Figure:
    rows = [
        forest_figures.DifferenceRow(
            "Macro mean", _to_estimate(compared.macro, "difference"), compared.macro.p, macro=True
        ),
        *(
            forest_figures.DifferenceRow(name, _to_estimate(one, "difference"), one.p)
            for name, one in compared.findings.items()
        ),
    ]
    return forest_figures.plot_differences(rows, first, second)


def draw_localisation(found: localisation.Localisation) -> Figure:
    """Draw hit rate and overlap per finding and of all findings."""
    rows = []
    for name, one in (*found.findings.items(), ("All findings", found.overall)):
        levels = {
            level: _to_estimate(rate) for level, rate in zip(found.settings.iou_levels, one.accuracy, strict=True)
        }
        accuracy = {level: rate for level, rate in levels.items() if rate is not None}
        rows.append(forest_figures.LocalisationRow(name, one.n, _to_estimate(one.hit_rate), one.chance, accuracy))
    return forest_figures.plot_localisation(rows)


def draw_drift(measured: drift.Drift) -> Figure | None:
    """Draw observed against expected flag rates; None if no finding has flags."""
    rows = [
        forest_figures.DriftRow(
            one.name, Estimate(one.observed, one.low, one.high), one.expected, one.verdict in ("differs", "large")
        )
        for one in measured.flags
        if one.observed is not None and one.name != NO_FINDING
    ]
    return forest_figures.plot_drift(rows) if rows else None
