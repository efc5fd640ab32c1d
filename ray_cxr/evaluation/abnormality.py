"""Evaluate the order of images and studies by abnormality and priority, and their top_finding, against labels.

Intervals are those of `clustered`, for images of one patient that are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.alerts import Share
from ray_cxr.evaluation.clustered import auroc_interval, clustered_share_interval
from ray_cxr.evaluation.intervals import to_record


@dataclass(frozen=True)
class RankingLevel:
    """Images, or studies, of known status: `n`, of which `abnormal` have a finding.

    Attributes:
        abnormality_auroc, priority_auroc: AUROC of both for "any finding"; `n` is the number of abnormal ones.
        mean_abnormality: compared with the share of abnormal ones, `share_abnormal`, it shows the calibration.
        calibration_error: mean distance of abnormality and observed share in ten bins of equal width.
    """

    n: int
    abnormal: int
    abnormality_auroc: Share
    priority_auroc: Share
    mean_abnormality: float | None
    share_abnormal: float | None
    calibration_error: float | None


@dataclass(frozen=True)
class FindingRanking:
    """How images with a finding are ranked among images without any finding: by priority, and by its own score."""

    priority_auroc: Share
    own_auroc: Share


@dataclass(frozen=True)
class AbnormalityResult:
    """The order of images and studies.

    Attributes:
        studies: None if no study id is known.
        top_finding: share of abnormal images that have their top_finding.
        most_common: share that have the most common finding, named `most_common_finding`: a guess without a model.
    """

    images: RankingLevel
    studies: RankingLevel | None
    top_finding: Share
    most_common: float | None
    most_common_finding: str | None
    findings: dict[str, FindingRanking]

    def to_json(self) -> dict[str, Any]:
        return dict(to_record(self))


@dataclass(frozen=True, eq=False)
class RankedCases:
    """Images or studies, one entry per array [n].

    Attributes:
        abnormal: int8, 1 with a finding, 0 without, -1 if unknown; see `alerts.find_abnormal`.
        abnormality, priority: float64, NaN if missing.
        patients: patients as integers.
    """

    abnormal: np.ndarray
    abnormality: np.ndarray
    priority: np.ndarray
    patients: np.ndarray


def measure_abnormality(
    images: RankedCases,
    studies: RankedCases | None,
    top: np.ndarray,
    labels: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
) -> AbnormalityResult:
    """Measure the order of images and of studies.

    Args:
        top: the top_finding of each image, objects [n], str or None.
        labels: per finding without No_Finding, int8 [n], 1, 0 or -1 if not labelled.
        scores: raw probabilities per finding, float64 [n], NaN if missing.
    """
    abnormal = images.abnormal == 1
    hit = np.full(len(top), -1, dtype=np.int8)
    for name, y in labels.items():
        hit = np.where(top == name, y, hit)
    known = abnormal & (hit >= 0)
    counts = {name: int((y[abnormal] == 1).sum()) for name, y in labels.items()}
    common = max(counts, key=lambda name: counts[name]) if abnormal.any() else None
    normal, findings = images.abnormal == 0, {}
    for name, y in labels.items():
        if name in scores and (y == 1).any():
            status = np.where(y == 1, 1, np.where(normal, 0, -1))
            rankings = (_measure_auroc(status, s, images.patients) for s in (images.priority, scores[name]))
            findings[name] = FindingRanking(*rankings)
    return AbnormalityResult(
        images=_measure_level(images),
        studies=None if studies is None else _measure_level(studies),
        top_finding=_measure_share(hit[known] == 1, images.patients[known]),
        most_common=None if common is None else counts[common] / int(abnormal.sum()),
        most_common_finding=common,
        findings=findings,
    )


def _measure_level(cases: RankedCases) -> RankingLevel:
    known = (cases.abnormal >= 0) & np.isfinite(cases.abnormality)
    y, p = cases.abnormal[known], cases.abnormality[known]
    return RankingLevel(
        n=len(y),
        abnormal=int(y.sum()),
        abnormality_auroc=_measure_auroc(cases.abnormal, cases.abnormality, cases.patients),
        priority_auroc=_measure_auroc(cases.abnormal, cases.priority, cases.patients),
        mean_abnormality=float(p.mean()) if len(p) else None,
        share_abnormal=float(y.mean()) if len(y) else None,
        calibration_error=metrics.expected_calibration_error(y, p),
    )


def _measure_auroc(status: np.ndarray, scores: np.ndarray, patients: np.ndarray) -> Share:
    """Measure the AUROC of cases of status 1 against those of status 0; the others are left out."""
    used = (status >= 0) & np.isfinite(scores)
    y, s = status[used], scores[used]
    interval = auroc_interval(y, s, patients[used])
    if interval is None:
        return Share(None, None, None, int(y.sum()), metrics.undefined_reason(y))
    return Share(metrics.auroc(y, s), *interval, int(y.sum()))


def _measure_share(successes: np.ndarray, patients: np.ndarray) -> Share:
    if not len(successes):
        return Share(None, None, None, 0, "no image with a finding has a top finding with a label")
    return Share(float(successes.mean()), *clustered_share_interval(successes, patients), len(successes))
