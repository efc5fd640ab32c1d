"""What the calibrated probabilities are worth for decisions: calibration, net benefit and selective prediction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.evaluation.alerts import find_abnormal
from ray_cxr.evaluation.calibration_measures import CalibrationMeasures, measure_calibration
from ray_cxr.evaluation.net_benefit import DecisionCurve, measure_net_benefit
from ray_cxr.evaluation.selective import Selection, measure_selection
from ray_cxr.imaging.demographics import count_of
from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting import plots
from ray_cxr.reporting.evaluation_set import EvaluationSet
from ray_cxr.reporting.html import format_percent
from ray_cxr.reporting.measures import BootstrapSettings
from ray_cxr.reporting.scores import Scores

#: The entry of `Decisions.selection` for "any finding".
ABNORMALITY = "abnormality"
_RESAMPLES = 500
#: Sections of metrics.json, the fields of `Decisions`.
DECISIONS = ("calibration", "net_benefit", "selection")


@dataclass(frozen=True)
class Decisions:
    """Results by finding; a text is the reason why there is no result.

    `selection` also has `ABNORMALITY`, which does not include the findings `left_out`.
    """

    calibration: dict[str, CalibrationMeasures | str]
    net_benefit: dict[str, DecisionCurve | str]
    selection: dict[str, Selection | str]
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            name: {key: {"reason": found} if isinstance(found, str) else found.to_json() for key, found in part.items()}
            for name, part in ((name, getattr(self, name)) for name in DECISIONS)
        }

    def summarize(self) -> dict[str, list[str]]:
        """Return sentences on net benefit and on the least certain tenth; nothing without calibrated probabilities."""
        sentences = {}
        curves = {finding: curve for finding, curve in self.net_benefit.items() if isinstance(curve, DecisionCurve)}
        without = [finding for finding, curve in curves.items() if not curve.benefit]
        if curves:
            better = "flagging by calibrated probability is better than flagging all or no images"
            shown = len(curves) - len(without)
            sentences["net_benefit"] = [
                f"Net benefit: for {shown} of {count_of(len(curves), 'finding')}, {better}, at the thresholds below"
                + (f"; not shown for {_list_findings(without)}." if without else ".")
                if shown
                else f"Net benefit: for none of the findings is it shown that {better}."
            ]
        found = self.selection.get(ABNORMALITY)
        if isinstance(found, Selection) and found.errors_handed_over.value is not None:
            share = format_percent(found.errors_handed_over.value, 0)
            before, after = (format_percent(part["error_rate"]) for part in (found.all_images, found.kept))
            left_out = _list_findings(self.left_out)
            partly = f" (abnormality leaves out {left_out}: not calibrated)" if left_out else ""
            sentences["selective"] = [
                f"The tenth of the images whose abnormality is least certain holds {share} of the wrong decisions on "
                f"whether there is any finding{partly}; a random tenth holds 10%. Without it, the error rate is "
                f"{after} instead of {before}."
            ]
        return sentences


def measure_decisions(table: Scores, evaluated: EvaluationSet, bootstrap: BootstrapSettings) -> Decisions:
    """Measure the evaluated images; without any calibrated probability or label there is no result."""
    rows, labels = evaluated.rows, evaluated.labels
    names = [f for f in table.findings if f in table.c and ((labels[f] >= 0) & ~np.isnan(table.c[f][rows])).any()]
    if not names:
        return Decisions({}, {}, {})
    left_out = {
        finding: "not calibrated" if np.isnan(table.c.get(finding, np.full(1, np.nan))).all() else "no labelled image"
        for finding in table.findings
        if finding not in names and finding != NO_FINDING
    }
    y = np.column_stack([labels[f] for f in names])
    c = np.column_stack([table.c[f][rows] for f in names])
    options: dict[str, Any] = {"n_resamples": min(bootstrap.n_resamples, _RESAMPLES), "seed": bootstrap.seed}
    measures = measure_calibration(y, c, evaluated.patients, seed=bootstrap.seed)
    diseases = [f for f in names if f != NO_FINDING]
    chosen = [names.index(f) for f in diseases]
    curves = measure_net_benefit(y[:, chosen], c[:, chosen], evaluated.patients, **options)
    flags = np.column_stack([table.flags.get(f, np.full(len(table.ids), -1))[rows] for f in names])[:, chosen]
    y, c = y[:, chosen], c[:, chosen]
    cutoffs, unknown = np.full(len(diseases), np.nan), np.full(len(rows), np.nan)
    spreads = [table.spread[f][rows] if f in table.spread else unknown for f in diseases]
    if table.ranking.findings.is_calibrated:
        abnormal, cutoff = _decide_abnormal(table, rows)
        y, c, flags = (
            np.column_stack([new, part])
            for new, part in ((find_abnormal(labels), y), (table.abnormality[rows], c), (abnormal, flags))
        )
        diseases, cutoffs, spreads = [ABNORMALITY, *diseases], np.append(cutoff, cutoffs), [unknown, *spreads]
    spread = np.column_stack(spreads) if table.spread else None
    found = measure_selection(y, c, flags, evaluated.patients, cutoffs=cutoffs, spread=spread, **options)
    selections: dict[str, Selection | str] = dict(zip(diseases, found, strict=True))
    no_flag = "cannot be flagged, without an operating point"
    selections |= {f: no_flag for j, f in enumerate(diseases) if not (flags[:, j] >= 0).any()}
    calibration: dict[str, CalibrationMeasures | str] = {
        f: one for f, one in zip(names, measures, strict=True) if one is not None
    }
    net_benefit: dict[str, DecisionCurve | str] = dict(zip([f for f in names if f != NO_FINDING], curves, strict=True))
    parts: tuple[dict[str, Any], ...] = (calibration, net_benefit, selections)
    for part in parts:
        part.update(left_out)
    return Decisions(calibration, net_benefit, selections, table.ranking.findings.left_out)


def _decide_abnormal(table: Scores, rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Return which images count as abnormal, 1, 0 or -1 without a flag, and the abnormality from which they do.

    Abnormality is not a calibrated probability, so no number such as 0.5 separates images. The cutoff is chosen so that
    as many images are abnormal as have any flag; more if their abnormality is equal. It is NaN if no image has a flag.
    """
    no_flags = np.full((1, len(rows)), -1)
    flags = np.vstack([no_flags, *(found[rows] for f, found in table.flags.items() if f != NO_FINDING)])
    abnormality = table.abnormality[rows]
    judged = (flags >= 0).any(axis=0) & ~np.isnan(abnormality)
    wanted = int((flags[:, judged] == 1).any(axis=0).sum())
    cutoff = float(np.sort(abnormality[judged])[-wanted]) if wanted else np.nan
    return np.where(judged, abnormality >= cutoff, -1), cutoff


def _list_findings(findings: Iterable[str]) -> str:
    return ", ".join(map(plots.format_finding, findings))
