"""The order of a report's images and studies against labels, from a score table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.evaluation.abnormality import AbnormalityResult, RankedCases, measure_abnormality
from ray_cxr.evaluation.alerts import Share, find_abnormal
from ray_cxr.evaluation.intervals import patient_codes
from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting.evaluation_set import EvaluationSet
from ray_cxr.reporting.html import format_percent
from ray_cxr.reporting.ranking import Ranking, group_studies
from ray_cxr.reporting.scores import Scores


@dataclass(frozen=True)
class RankingResult:
    """The order of images and studies, and the ranking that made it."""

    measured: AbnormalityResult
    ranking: Ranking

    def to_json(self) -> dict[str, Any]:
        ranked = self.ranking.findings
        return {
            "probabilities": "calibrated" if ranked.is_calibrated else "uncalibrated",
            "left_out": list(ranked.left_out),
            "weights": self.ranking.weights,
            **self.measured.to_json(),
        }

    def summarize(self) -> list[str]:
        """Return a sentence on the order of images; nothing without images of both kinds."""
        images, top, ranking = self.measured.images, self.measured.top_finding, self.ranking
        if images.priority_auroc.value is None:
            return []
        equal = ranking.weights is not None and set(ranking.weights.values()) == {1.0}
        parts = [f"AUROC {_format(images.abnormality_auroc)} by abnormality"]
        if not equal:
            parts.append(f"{_format(images.priority_auroc)} by priority")
        low, high = images.abnormality_auroc.low, images.abnormality_auroc.high
        order = "are not shown to rank above"
        if low is not None and high is not None and not low <= 0.5 <= high:
            order = "rank above" if low > 0.5 else "rank below"
        sentences = [f"Images with any finding {order} images without: {', '.join(parts)}."]
        if top.value is not None:
            guess = self.measured.most_common_finding
            limits = "" if top.low is None else f" ({format_percent(top.low, 0)}–{format_percent(top.high, 0)})"
            sentences[0] += (
                f" The top finding is present in {format_percent(top.value, 0)}{limits} of the images with a finding "
                f"(the most common, {str(guess).replace('_', ' ')}, in {format_percent(self.measured.most_common, 0)})."
            )
        return sentences


def measure_ranking(table: Scores, evaluated: EvaluationSet) -> RankingResult:
    """Measure how abnormality and priority rank the evaluated images, and their studies if study ids are known."""
    rows = evaluated.rows
    patients = patient_codes(evaluated.patients)[0]
    abnormal = find_abnormal(evaluated.labels)
    images = RankedCases(abnormal, table.abnormality[rows], table.priority[rows], patients)
    studies = None
    if any(study is not None for study in table.studies[rows]):
        codes, count = group_studies(table.patients[rows], table.studies[rows])
        abnormality, priority, _ = table.ranking.rank_groups(codes, count, rows, table.priority)
        # A study has a finding if one of its images has one, and lacks it if all lack it.
        highest, lowest = np.full(count, -1, dtype=np.int8), np.ones(count, dtype=np.int8)
        np.maximum.at(highest, codes, abnormal)
        np.minimum.at(lowest, codes, abnormal)
        status = np.where((highest == 0) & (lowest < 0), -1, highest)
        studies = RankedCases(status, abnormality, priority, patients[np.unique(codes, return_index=True)[1]])
    labels = {finding: y for finding, y in evaluated.labels.items() if finding != NO_FINDING}
    scores = {finding: p[rows] for finding, p in table.p.items()}
    found = measure_abnormality(images, studies, table.top_findings[rows], labels, scores)
    return RankingResult(found, table.ranking)


def _format(found: Share) -> str:
    return f"{found.value:.3f} (95% interval {found.low:.3f} to {found.high:.3f})"
