"""From a report's numbers to its pictures: which are drawn, and what goes into each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ray_cxr.evaluation import calibration, localisation, subgroups
from ray_cxr.labels import FINDINGS, NO_FINDING
from ray_cxr.reporting import figures, plots
from ray_cxr.reporting.examples import examples, heatmap_cases, radiographs
from ray_cxr.reporting.figures import Estimate
from ray_cxr.reporting.labelled import Evaluated
from ray_cxr.reporting.measures import Measured
from ray_cxr.reporting.scores import Scores

#: How the page names the attributes of subgroups.
ATTRIBUTES = {"sex": "Sex", "age_band": "Age, years", "view": "View", "follow_up": "Follow-up"}


def of_evaluation(table: Scores, evaluated: Evaluated, measured: Measured, seed: int) -> dict[str, Figure]:
    """The pictures of scores with labels, by name."""
    drawn: dict[str, Figure] = {}
    panels = _panels(table, evaluated, measured)
    if panels:
        drawn["auroc"] = plots.auroc_overview(panels, measured.macro)
        drawn["roc"] = plots.roc(panels)
        drawn["precision_recall"] = plots.precision_recall(panels)
        drawn["distributions"] = figures.distributions(panels)
    calibrated = _reliability(table, evaluated, measured)
    if calibrated:
        drawn["reliability"] = figures.reliability(calibrated)
    present = [
        (finding, entry["prevalence"], entry["positives"], entry["flag_rate"])
        for finding, entry in measured.findings.items()
        if entry["prevalence"] is not None
    ]
    if present:
        drawn["prevalence"] = plots.prevalence(present)
    judged = [f for f in FINDINGS if (evaluated.labels[f] == 1).any()]
    if len(judged) > 1:
        positive = np.column_stack([evaluated.labels[f] == 1 for f in judged]).astype(np.int64)
        drawn["cooccurrence"] = figures.cooccurrence(positive.T @ positive, judged, len(evaluated.rows))
    groups = examples(table, evaluated, seed)
    if any(tile.picture is not None for _, tiles in groups for tile in tiles):
        drawn["examples"] = plots.examples(groups)
    cases = heatmap_cases(table, evaluated)
    if any(tiles for _, tiles in cases):
        drawn["heatmaps"] = figures.heatmap_examples(cases)
    scans = radiographs(table, evaluated, seed)
    if any(one.picture is not None for one in scans):  # a page of grey squares tells nobody anything
        drawn["radiographs"] = figures.radiographs(scans)
    return drawn


def _panels(table: Scores, evaluated: Evaluated, measured: Measured) -> list[plots.Panel]:
    panels = []
    for finding, entry in measured.findings.items():
        if entry["auroc"] is None:
            continue
        labels, p = evaluated.labels[finding], table.p[finding][evaluated.rows]
        usable = (labels >= 0) & ~np.isnan(p)
        band = measured.bands.get(finding)
        panels.append(
            plots.Panel(
                finding=finding,
                y=labels[usable],
                s=p[usable],
                auroc=entry["auroc"],
                low=entry["auroc_low"],
                high=entry["auroc_high"],
                average_precision=entry["average_precision"],
                at=(entry["sensitivity"], entry["specificity"], entry["ppv"]),
                band=(band.false_positive_rate, band.low, band.high) if band else None,
                ap_low=entry["average_precision_low"],
                ap_high=entry["average_precision_high"],
                threshold=entry["threshold"],
            )
        )
    return panels


def _reliability(table: Scores, evaluated: Evaluated, measured: Measured) -> list[figures.Reliability]:
    panels = []
    for finding, entry in measured.findings.items():
        if entry["expected_calibration_error"] is None:
            continue
        labels, c = evaluated.labels[finding], table.c[finding][evaluated.rows]
        known = (labels >= 0) & ~np.isnan(c)
        bins = [
            one
            for one in calibration.reliability(
                labels[known], c[known], patients=evaluated.patients[known], equal_counts=True
            )
            if one.n
        ]
        predicted, observed, low, high = (
            np.array([getattr(one, name) for one in bins], dtype=np.float64)
            for name in ("predicted", "observed", "observed_low", "observed_high")
        )
        error = _estimate(entry, "expected_calibration_error")
        panels.append(figures.Reliability(finding, c[known], predicted, observed, low, high, error))
    return panels


def _estimate(entry: Mapping[str, Any], name: str) -> Estimate | None:
    if entry[name] is None:
        return None
    return Estimate(entry[name], entry[f"{name}_low"], entry[f"{name}_high"])


def of_subgroups(found: subgroups.Subgroups, macro: Mapping[str, Any]) -> dict[str, Figure]:
    """Macro AUROC and mean sensitivity of each group, and what sets it apart from the largest of its attribute."""
    groups = [one for one in found.groups if not one.crossing]
    if not groups:
        return {}
    rows = [
        figures.ForestRow(
            ATTRIBUTES.get(one.attribute, one.attribute),
            one.value,
            one.n,
            None,
            (_mean(one.shared.auroc), _mean(one.shared.sensitivity)),
            one.small,
        )
        for one in groups
    ]
    counted = {one.value: one.n for one in groups}
    # A mean over other findings than the groups' would be no line to hold them against.
    alike = all(set(one.shared.auroc.findings) == set(macro["findings"]) for one in groups if one.shared.auroc.findings)
    whole = macro["auroc"] if alike else None
    columns = [
        figures.ForestColumn("macro AUROC", whole, "" if whole is None else f"all images {whole:.3f}"),
        figures.ForestColumn("mean sensitivity"),
    ]
    drawn = {"subgroups": figures.subgroup_forest(rows, columns)}
    means = [one for one in found.differences if one.finding is None and not one.crossing]
    pairs: dict[tuple[str, str, str], dict[str, subgroups.Difference]] = {}
    for one in means:
        pairs.setdefault((one.attribute, one.value, one.reference), {})[one.quantity] = one
    if pairs:
        drawn["subgroup_differences"] = figures.subgroup_forest(
            [
                figures.ForestRow(
                    ATTRIBUTES.get(attribute, attribute),
                    f"{value} less {reference}",
                    counted[value],
                    None,
                    tuple(_gap(by.get(quantity)) for quantity in ("sensitivity", "auroc")),
                    any(one.small for one in by.values()),
                )
                for (attribute, value, reference), by in pairs.items()
            ],
            [
                figures.ForestColumn("difference in mean sensitivity", 0.0, "no difference", signed=True),
                figures.ForestColumn("difference in macro AUROC", 0.0, "no difference", signed=True),
            ],
        )
    return drawn


def _mean(one: subgroups.Mean) -> Estimate | None:
    return None if one.value is None else Estimate(one.value, one.low, one.high)


def _gap(one: subgroups.Difference | None) -> Estimate | None:
    return None if one is None or one.difference is None else Estimate(one.difference, one.low, one.high)


def of_consensus(measured: Measured) -> Figure | None:
    """AUROC of each finding that a consensus table judges; None where none is defined."""
    nothing = np.zeros(0)
    panels = [
        plots.Panel(name, nothing, nothing, one["auroc"], one["auroc_low"], one["auroc_high"], None)
        for name, one in measured.findings.items()
        if one["auroc"] is not None
    ]
    return plots.auroc_overview(panels, measured.macro) if panels else None


def of_comparison(entry: Mapping[str, Any], first: str, second: str) -> Figure:
    """Differences of two score tables, finding by finding."""
    rows = [
        figures.Difference("Macro mean", _difference(entry["macro"]), entry["macro"]["p"], macro=True),
        *(figures.Difference(name, _difference(one), one["p"]) for name, one in entry["findings"].items()),
    ]
    return figures.compared(rows, first, second)


def _difference(entry: Mapping[str, Any]) -> Estimate | None:
    if entry["difference"] is None:
        return None
    return Estimate(entry["difference"], entry["low"], entry["high"])


def of_boxes(found: localisation.Localisation) -> Figure:
    """Hit rates and overlaps per finding, and over all."""
    rows = []
    for name, one in (*found.findings.items(), ("All findings", found.overall)):
        levels = {
            level: Estimate(rate.value, rate.low, rate.high)
            for level, rate in zip(found.iou_levels, one.accuracy, strict=True)
            if rate.value is not None
        }
        hit = one.hit_rate
        rows.append(
            figures.Localisation(
                name,
                one.n,
                None if hit.value is None else Estimate(hit.value, hit.low, hit.high),
                one.chance,
                levels,
                {},
            )
        )
    return figures.localisation(rows)


def of_drift(entry: Mapping[str, Any]) -> Figure | None:
    """Flag rates against what validation led to expect; None where no finding is flagged at all."""
    rows = [
        figures.Drift(
            name,
            Estimate(one["observed"], one["low"], one["high"]),
            one["expected"],
            one["verdict"] in ("differs", "large"),
        )
        for name, one in entry["flags"].items()
        if one["observed"] is not None and name != NO_FINDING
    ]
    return figures.drift(rows) if rows else None
