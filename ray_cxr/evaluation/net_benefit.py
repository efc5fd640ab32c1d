"""Decision curves: the net benefit of acting on a finding's probability (Vickers & Elkin 2006).

At a threshold probability t, an image is flagged if its calibrated probability is at least t. This t accepts
(1 - t) / t false alarms for one hit, so of n images

    net benefit = hits / n - false alarms / n * t / (1 - t)

It counts net hits: 0.02 is worth as much as 2 hits without a false alarm among 100 images. Without a model, one can
flag no image (net benefit 0) or all of them. The gain of a model is its net benefit less that of the better of the two.
Both are equal if t is the prevalence, so thresholds cover its odds from 1 / `SPAN` to `SPAN` times.

With the flagged share f, net benefit is f (PPV - t) / (1 - t). The gain over flagging all is u (t - m) / (1 - t), with
u the share that is not flagged and m the share of positives in it. So a model is useful exactly if m < t < PPV. Where
few images are flagged, or few are not, resampled patients understate the uncertainty: no resample has a positive that
the sample lacks. So limits of the gain are the wider of the percentiles and of Clopper & Pearson's (1934) limits of m
and PPV for the effective number of images (Kish 1965). In tests/simulations/decisions.py, at most 3% of models get a
`benefit` at any threshold where they have none. In a similar simulation with 20 positives among 1,000 images,
percentiles alone gave one to 43% of models without skill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import betaincinv

from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.bootstrap import resample_counts
from ray_cxr.evaluation.intervals import MIN_RESAMPLES, patient_codes
from ray_cxr.evaluation.roc_steps import divide_or_nan

SPAN = 8.0
#: Thresholds of a curve, in equal steps of log-odds: 8 for each factor of two.
_POINTS = 49


@dataclass(frozen=True, eq=False)
class Band:
    """Values float64 [k] with pointwise 95% limits; NaN where a value or limit is undefined."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, value: np.ndarray, drawn: np.ndarray) -> Band:
        """Take the limits from resampled values [b, k]; there are none where all resamples agree."""
        low, high = np.full((2, value.size), np.nan)
        usable = ((~np.isnan(drawn)).sum(axis=0) >= MIN_RESAMPLES) & ~np.isnan(value)
        if usable.any():
            low[usable], high[usable] = np.nanpercentile(drawn[:, usable], [2.5, 97.5], axis=0)
        constant = usable & ~(high - low > 1e-12)
        low[constant] = high[constant] = np.nan
        return cls(value, low, high)

    def to_json(self, name: str) -> dict[str, list[float | None]]:
        parts = {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}
        return {key: [None if np.isnan(x) else float(x) for x in values] for key, values in parts.items()}


@dataclass(frozen=True, eq=False)
class DecisionCurve:
    """Net benefit of one finding's probability.

    Attributes:
        thresholds: float64 [k], ascending.
        model, treat_all: net benefit of the model, and of flagging every image [k].
        gain: net benefit of the model less that of the better rule without a model.
        benefit: ranges of thresholds whose lower limit of the gain is above 0.
    """

    n: int
    positives: int
    thresholds: np.ndarray
    model: Band
    treat_all: np.ndarray
    gain: Band
    benefit: tuple[tuple[float, float], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "positives": self.positives,
            "thresholds": self.thresholds.tolist(),
            "treat_all": self.treat_all.tolist(),
            **self.model.to_json("model"),
            **self.gain.to_json("gain"),
            "benefit": [list(limits) for limits in self.benefit],
        }


def measure_net_benefit(
    labels: np.ndarray, calibrated: np.ndarray, patients: np.ndarray, *, n_resamples: int, seed: int
) -> tuple[DecisionCurve | str, ...]:
    """Compute a decision curve per column, or the reason why there is none; all have the same resamples.

    Args:
        labels: [n, F], 1 or 0; negative if not labelled.
        calibrated: probabilities [n, F]; NaN if missing.
        patients: ids [n].
    """
    codes, n_patients = patient_codes(patients)
    count, width = labels.shape[1], 2 * (_POINTS + 1)
    grids: list[np.ndarray | str] = []
    cells, owners = [np.zeros(0, dtype=np.int64)], [codes[:0]]
    for f in range(count):
        known = (labels[:, f] >= 0) & ~np.isnan(calibrated[:, f])
        y, p = metrics.check_scores(labels[known, f], calibrated[known, f])
        metrics.check_probabilities(p)
        reason = metrics.undefined_reason(y)
        grids.append(_choose_thresholds(y) if reason is None else reason)
        if reason is None:
            # Negatives, then positives, by the number of thresholds that they reach.
            cells.append(f * width + y * (_POINTS + 1) + np.searchsorted(grids[-1], p, side="right"))
            owners.append(codes[known])
    cell, owner = np.concatenate(cells), np.concatenate(owners)
    drawn = resample_counts(cell, owner, (count * width, n_patients), n_resamples, seed)
    drawn = drawn.reshape(n_resamples, count, width)

    def build(f: int, thresholds: np.ndarray) -> DecisionCurve:
        rows = cell // width == f
        counts = np.bincount(owner[rows] * width + cell[rows] % width, minlength=n_patients * width)
        return _build_curve(counts.reshape(n_patients, width).astype(np.float64), drawn[:, f], thresholds)

    return tuple(grid if isinstance(grid, str) else build(f, grid) for f, grid in enumerate(grids))


def _choose_thresholds(y: np.ndarray) -> np.ndarray:
    odds = y.sum() / (~y).sum() * np.geomspace(1 / SPAN, SPAN, _POINTS)
    return np.asarray(odds / (1 + odds))


def _build_curve(counts: np.ndarray, drawn: np.ndarray, thresholds: np.ndarray) -> DecisionCurve:
    """Build a curve from counts of the sample [patients, 2 (k + 1)] and of resamples [b, 2 (k + 1)]."""
    total = counts.sum(axis=0)
    (value,), (treat_all,) = _compute_benefits(total[None], thresholds)
    values, all_values = _compute_benefits(drawn, thresholds)
    gain = Band.of(value - np.maximum(treat_all, 0.0), values - np.maximum(all_values, 0.0))
    low, high = _bound_gain(counts, thresholds)
    gain = Band(gain.value, np.fmin(gain.low, low), np.fmax(gain.high, high))
    above = np.append(gain.low > 0, False)
    edges = np.flatnonzero(np.diff(above, prepend=False)).reshape(-1, 2)
    benefit = tuple((float(thresholds[start]), float(thresholds[end - 1])) for start, end in edges)
    n, positives = int(total.sum()), int(total[_POINTS + 1 :].sum())
    return DecisionCurve(n, positives, thresholds, Band.of(value, values), treat_all, gain, benefit)


def _compute_benefits(counts: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return net benefits [b, k] of the model and of flagging every image."""
    negative, positive = (part[:, ::-1].cumsum(axis=1)[:, ::-1] for part in np.hsplit(counts, 2))
    total = np.maximum(negative[:, :1] + positive[:, :1], 1)
    odds = thresholds / (1 - thresholds)
    return (positive[:, 1:] - negative[:, 1:] * odds) / total, (positive[:, :1] - negative[:, :1] * odds) / total


def _bound_gain(counts: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return limits [k] of the gain from those of PPV and m; NaN where all images are flagged, or none."""
    below = counts.reshape(len(counts), 2, -1).cumsum(axis=2)
    missed, flagged = below[:, :, :-1], below[:, :, -1:] - below[:, :, :-1]
    scale = 1 / (counts.sum() * (1 - thresholds))
    low, high = _bound_share(flagged[:, 1], flagged.sum(axis=1))
    lowest, highest = _bound_share(missed[:, 1], missed.sum(axis=1))
    n_flagged, n_missed = flagged.sum(axis=(0, 1)) * scale, missed.sum(axis=(0, 1)) * scale
    return (
        np.minimum(n_flagged * (low - thresholds), n_missed * (thresholds - highest)),
        np.minimum(n_flagged * (high - thresholds), n_missed * (thresholds - lowest)),
    )


def _bound_share(hits: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute limits [k] of the share of hits, from counts [patients, k]; NaN without images."""
    n = images.sum(axis=0)
    share = divide_or_nan(hits.sum(axis=0), n)
    squares = ((hits - share * images) ** 2).sum(axis=0)
    independent = np.fmin(n, divide_or_nan(share * (1 - share) * n**2, squares))
    independent = np.where(squares > 0, independent, np.count_nonzero(images, axis=0))
    hit = share * independent
    low = np.where(share > 0, betaincinv(np.maximum(hit, 1e-9), independent - hit + 1, 0.025), share)
    high = np.where(share < 1, betaincinv(hit + 1, np.maximum(independent - hit, 1e-9), 0.975), share)
    return low, high
