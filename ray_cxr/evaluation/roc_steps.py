"""ROC curves of many bootstrap resamples at once, computed after one sort of the images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RocSteps:
    """The ROC curve of one finding in b resamples, one step per distinct score of a positive image, highest first.

    No positive lies between two steps, so the metrics below need no other points.
    """

    gains: np.ndarray  # int32 [b, G], weight of the positives in a step
    true: np.ndarray  # int32 [b, G], cumulative weight of the positives, including the step
    before: np.ndarray  # int32 [b, G], weight of the negatives with a higher score than the step
    upto: np.ndarray  # int32 [b, G], weight of the negatives with a higher or equal score
    negatives: np.ndarray  # int64 [b], weight of all negatives

    def aurocs(self) -> np.ndarray:
        """Compute AUROC, float64 [b], NaN where a class has no weight; in integers up to the division."""
        passed = np.einsum("bg,bg->b", self.gains, self.before, dtype=np.float64)
        tied = passed if self.upto is self.before else np.einsum("bg,bg->b", self.gains, self.upto, dtype=np.float64)
        total = 2.0 * self.true[:, -1] * self.negatives
        return divide_or_nan(total - passed - tied, total)

    def average_precisions(self) -> np.ndarray:
        """Compute average precision, float64 [b], NaN where a class has no weight."""
        precision = self.true / np.maximum(self.true + self.upto, 1)  # a step without weight adds nothing
        sums = np.einsum("bg,bg->b", self.gains, precision)
        return divide_or_nan(sums, np.where(self.negatives > 0, self.true[:, -1], 0))

    def sensitivities(self, grid: int) -> np.ndarray:
        """Compute sensitivity at the false positive rates i / (grid - 1), float64 [b, grid]; NaN where undefined."""
        result = np.full((len(self.negatives), grid), np.nan)
        for row, negatives in enumerate(self.negatives):
            positives = int(self.true[row, -1])
            if not positives or not negatives:
                continue
            scaled = np.arange(grid) * negatives  # in integers, so that rounding moves no rate below its step
            allowed = scaled / (grid - 1)
            full = self.upto[row].searchsorted((scaled // (grid - 1)).astype(np.int32), side="right")
            sums = np.concatenate([[0], self.true[row]])[full].astype(np.float64)
            part = np.flatnonzero(full < self.true.shape[1])  # interpolate linearly across the ties of the next step
            step = full[part]
            before, upto = self.before[row, step], self.upto[row, step]
            share = np.clip((allowed[part] - before) / np.maximum(upto - before, 1), 0.0, 1.0)
            sums[part] += share * self.gains[row, step]
            result[row] = sums / positives
        return result


@dataclass(frozen=True)
class Ranking:
    """One finding's images sorted by falling score. After this one sort, each resample costs one pass over them."""

    positive_codes: np.ndarray  # int64, patient codes of the positive images
    negative_codes: np.ndarray  # int64, patient codes of the negative images
    ends: np.ndarray  # int64 [G], index of the last positive of each distinct score
    before: np.ndarray  # int64 [G], number of negatives with a higher score
    upto: np.ndarray  # int64 [G], number of negatives with a higher or equal score

    def steps(self, drawn: np.ndarray) -> RocSteps:
        """Build the steps of b resamples; `drawn` counts each patient's draws, int32 [b, patients], rows contiguous."""
        true = _cumulative_weight(drawn, self.positive_codes)[:, self.ends + 1]
        false = _cumulative_weight(drawn, self.negative_codes)
        before = false[:, self.before]
        return RocSteps(
            gains=np.diff(true, axis=1, prepend=np.int32(0)),
            true=true,
            before=before,
            upto=before if np.array_equal(self.before, self.upto) else false[:, self.upto],
            negatives=false[:, -1].astype(np.int64),
        )


def divide_or_nan(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, float64, with NaN where the denominator is not positive."""
    result = np.full(np.shape(whole), np.nan)
    return np.divide(part, whole, out=result, where=whole > 0)


def _cumulative_weight(drawn: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return the weight of the first 0, 1, ..., len(codes) images, int32 [b, len(codes) + 1]."""
    weight = np.zeros((len(drawn), len(codes) + 1), dtype=np.int32)
    # mode="clip" saves a copy; every code is a valid column.
    np.cumsum(drawn.take(codes, axis=1, mode="clip"), axis=1, out=weight[:, 1:])
    return weight
