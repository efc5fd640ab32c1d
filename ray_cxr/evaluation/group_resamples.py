"""AUROC, sensitivity and specificity of every finding in several groups, in the sample and in resamples of patients.

A patient can be in several groups of one attribute, for example in two age bands or two views. So each resample draws
patients once for all groups of an attribute, and each group takes its own images of these patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ray_cxr.evaluation import bootstrap, metrics
from ray_cxr.evaluation.groups import Group
from ray_cxr.evaluation.intervals import Patients
from ray_cxr.evaluation.roc_steps import divide_or_nan

#: Labels of several groups resampled together, to bound memory.
_CELLS = 8 << 20


@dataclass(frozen=True, eq=False)
class LabelledScores:
    """Labels and predictions of n images for F findings."""

    labels: np.ndarray  # int8 [n, F], 1 or 0; -1 if not labelled or not scored
    scores: np.ndarray  # [n, F], NaN if missing
    flags: np.ndarray  # int8 [n, F], 1 at or above the operating point, 0 below, -1 if there is none
    patients: Patients
    findings: tuple[str, ...]
    macro: np.ndarray  # bool [F], findings that means count

    @classmethod
    def build(
        cls,
        labels: np.ndarray,
        scores: np.ndarray,
        flags: np.ndarray,
        patients: np.ndarray,
        findings: Sequence[str],
        macro: np.ndarray,
    ) -> LabelledScores:
        """Check the arrays of n images, and remove labels without a score. Missing labels are NaN or negative."""
        if {labels.shape, scores.shape, flags.shape} != {(len(patients), len(findings))}:
            raise ValueError(
                f"labels {labels.shape}, scores {scores.shape}, flags {flags.shape}, {len(patients)} patients and "
                f"{len(findings)} findings do not fit"
            )
        known = (labels >= 0) & ~np.isnan(scores.astype(np.float64))
        labels = np.where(known, labels, -1).astype(np.int8)
        return cls(labels, scores, flags, Patients.of(patients), tuple(findings), macro)

    def sum_per_patient(self, values: np.ndarray) -> np.ndarray:
        """Sum bool [n, K] over each patient's images, float32 [patients, K]; exact for such small integers."""
        width = values.shape[1]
        rows, columns = np.nonzero(values)
        flat = np.bincount(self.patients.codes[rows] * width + columns, minlength=self.patients.units * width)
        return flat.reshape(self.patients.units, width).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Resamples:
    """One quantity in one group: in the sample [F] and in each resample [R, F]; NaN if undefined."""

    point: np.ndarray
    drawn: np.ndarray

    def mean(self, columns: np.ndarray) -> Resamples:
        """Average columns bool [F], as [1] and [R, 1]; NaN if one of them is NaN."""
        if not columns.any():
            return Resamples(np.full(1, np.nan), np.full((len(self.drawn), 1), np.nan))
        return Resamples(self.point[columns].mean(keepdims=True), self.drawn[:, columns].mean(axis=1, keepdims=True))


def resample_aurocs(part: Sequence[Group], images: LabelledScores, n_resamples: int, seed: int) -> list[Resamples]:
    """Compute AUROC of every finding in each group; all groups share their resamples."""
    n, width = images.labels.shape
    batch = max(1, _CELLS // max(1, n * width))
    results: list[Resamples] = []
    for start in range(0, len(part), batch):
        groups = part[start : start + batch]
        drawn = bootstrap.resampled_aurocs(
            np.hstack([np.where(group.mask[:, None], images.labels, -1) for group in groups]),
            np.tile(images.scores, (1, len(groups))),
            images.patients.codes,
            n_resamples,
            seed,
        ).values
        for k, group in enumerate(groups):
            aurocs = []
            for j in range(width):
                rows = group.mask & (images.labels[:, j] >= 0)
                aurocs.append(metrics.auroc(images.labels[rows, j], images.scores[rows, j]))
            point = np.array(aurocs, dtype=np.float64)  # None becomes NaN
            results.append(Resamples(point, drawn[:, k * width : (k + 1) * width]))
    return results


def resample_rates(
    part: Sequence[Group], images: LabelledScores, n_resamples: int, seed: int
) -> list[dict[str, Resamples]]:
    """Compute sensitivity and specificity of every finding in each group; all groups share their resamples."""
    width = len(images.findings)
    judged = (images.labels >= 0) & (images.flags >= 0)
    positive, flagged = images.labels == 1, images.flags == 1
    sums = []
    for group in part:
        own = judged & group.mask[:, None]
        cells = [own & positive & flagged, own & positive, own & ~positive & ~flagged, own & ~positive]
        sums.append(images.sum_per_patient(np.hstack(cells)))
    points = [_divide_counts(counts.sum(axis=0, dtype=np.float64)[None], width)[:, 0] for counts in sums]
    together = np.hstack(sums)
    drawn = np.empty((len(part), 2, n_resamples, width))
    for rows, draws in bootstrap.resample_patients(images.patients.units, len(images.labels), n_resamples, seed):
        products = np.hsplit(draws.astype(np.float32) @ together, len(part))
        for k, product in enumerate(products):
            drawn[k, :, rows] = _divide_counts(product, width)
    return [
        {"sensitivity": Resamples(point[0], values[0]), "specificity": Resamples(point[1], values[1])}
        for point, values in zip(points, drawn, strict=True)
    ]


def _divide_counts(counts: np.ndarray, width: int) -> np.ndarray:
    """Return sensitivity and specificity, float64 [2, R, F], from [R, 4F]: two numerator-denominator pairs."""
    pairs = counts.astype(np.float64).reshape(len(counts), 2, 2, width)
    return divide_or_nan(pairs[:, :, 0], pairs[:, :, 1]).swapaxes(0, 1)
