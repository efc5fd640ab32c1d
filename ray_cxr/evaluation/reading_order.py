"""Reading-order gain: how much sooner abnormal studies are read in the order of a worklist.

The model of reading: all studies wait in one list, as after a night; one reader reads them one after another at a
constant rate. First come, first served reads abnormal studies on average in the middle of the list, because the order
of arrival does not depend on findings. Studies that arrive while others are read gain less, and normal studies wait
longer (Baltruschat et al. 2021 simulate arrivals).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_cxr.evaluation.alerts import Share
from ray_cxr.evaluation.bootstrap import resample_patients
from ray_cxr.evaluation.intervals import patient_codes, percentile_interval, to_record
from ray_cxr.evaluation.roc_steps import divide_or_nan

#: The share of the list already read, from 0 to 1.
GRID = np.arange(101) / 100.0
#: Shares of the list for which the share of abnormal studies is reported, in percent.
SHOWN = (10, 20, 30)
#: Assumed time per study, and length of the list, of `minutes_sooner`.
MINUTES_PER_STUDY, LIST_LENGTH = 2, 100
FIRST_COME = 0.5


@dataclass(frozen=True)
class ReadingOrder:
    """Positions in the list as a share of its length: 0 is first, 1 is last.

    Attributes:
        studies, abnormal: numbers of studies in the list, and of those with a finding.
        position, normal_position: mean position of studies with a finding, and of those without.
        best_position: mean position if all studies with a finding came first.
        minutes_sooner: by how much a study with a finding is read sooner than first come, first served.
        read: share of the abnormal studies read in the first 10, 20 and 30 percent of the list.
        findings: mean position of the studies with each finding.
        curve: share of abnormal studies against share of the list read, with pointwise 95% limits.
    """

    studies: int
    abnormal: int
    position: Share
    normal_position: Share
    best_position: float
    minutes_sooner: Share
    read: dict[str, Share]
    findings: dict[str, Share]
    curve: dict[str, list[float | None]]

    def to_json(self) -> dict[str, Any]:
        assumed = {"minutes_per_study": MINUTES_PER_STUDY, "list_length": LIST_LENGTH, "first_come": FIRST_COME}
        return {**to_record(self), **assumed}


def measure_reading_order(
    priority: np.ndarray,
    abnormal: np.ndarray,
    labels: np.ndarray,
    findings: Sequence[str],
    patients: np.ndarray,
    *,
    n_resamples: int,
    seed: int,
) -> ReadingOrder | str:
    """Measure where studies with findings stand if those with the highest priority are read first.

    Studies of equal priority are in random order: each has the mean of their positions. Intervals resample patients.

    Args:
        priority: float [m], one entry per study, without NaN; infinite values are first or last.
        abnormal: int8 [m], 1 with a finding, 0 without, -1 if unknown.
        labels: int8 [m, F], 1, 0 or -1 if not labelled, with the columns `findings`.
        patients: ids [m].

    Returns:
        The results, or the reason why there are none.
    """
    if not (abnormal == 1).any():
        return "no study is known to have a finding"
    order = np.argsort(-priority, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], priority[order][1:] != priority[order][:-1]]))
    groups = np.repeat(np.arange(len(starts)), np.diff([*starts, len(order)]))
    masks = np.column_stack([abnormal == 1, abnormal == 0, labels == 1])[order].astype(np.float64)
    codes, n_patients = patient_codes(patients)
    codes = codes[order]

    def compute(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean position of each column of `masks`, and the curve, from weights [b, m] of sorted studies."""
        total = weights.sum(axis=1, keepdims=True)
        sizes = np.add.reduceat(weights, starts, axis=1)
        ends = np.cumsum(sizes, axis=1) / total
        middles = ends - sizes / (2.0 * total)
        positions = divide_or_nan((weights * middles[:, groups]) @ masks, weights @ masks)
        found = np.cumsum(np.add.reduceat(weights * masks[:, 0], starts, axis=1), axis=1)
        rows = zip(ends, found, strict=True)
        read = np.array([np.interp(GRID, np.concatenate([[0.0], x]), np.concatenate([[0.0], y])) for x, y in rows])
        return positions, divide_or_nan(read, np.broadcast_to(read[:, -1:], read.shape))

    (values,), (curve,) = compute(np.ones((1, len(order))))
    positions, curves = np.empty((n_resamples, masks.shape[1])), np.empty((n_resamples, GRID.size))
    for rows, counts in resample_patients(n_patients, len(order), n_resamples, seed):
        positions[rows], curves[rows] = compute(counts[:, codes].astype(np.float64))
    numbers = masks.sum(axis=0).astype(int)
    shares = [_build_share(*column) for column in zip(values, positions.T, numbers, strict=True)]
    per_list = LIST_LENGTH * MINUTES_PER_STUDY
    limits = [percentile_interval(column, allow_constant=True) for column in curves.T]
    return ReadingOrder(
        studies=len(order),
        abnormal=int(numbers[0]),
        position=shares[0],
        normal_position=shares[1],
        best_position=float(numbers[0] / len(order) / 2.0),
        minutes_sooner=_build_share(
            (FIRST_COME - values[0]) * per_list, (FIRST_COME - positions[:, 0]) * per_list, numbers[0]
        ),
        read={str(k): _build_share(curve[k], curves[:, k], numbers[0]) for k in SHOWN},
        findings=dict(zip(findings, shares[2:], strict=True)),
        curve={
            "list_read": GRID.tolist(),
            "abnormal_read": curve.tolist(),
            "low": [limit.low for limit in limits],
            "high": [limit.high for limit in limits],
        },
    )


def _build_share(value: float, resampled: np.ndarray, n: int) -> Share:
    if n == 0:
        return Share(None, None, None, 0, "no study with this label")
    found = percentile_interval(resampled)
    return Share(float(value), found.low, found.high, int(n), found.reason and f"no interval: {found.reason}")
