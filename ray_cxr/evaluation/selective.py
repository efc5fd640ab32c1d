"""Selective prediction: what is gained if the least certain images go to a second reader (El-Yaniv & Wiener 2010).

A flag is wrong if it differs from the label. It depends on whether the probability c is above a cutoff, so its
confidence is the distance of log-odds |logit(c) - logit(cutoff)|: odds that are twice or half those of the cutoff are
equally certain. If the cutoff is not known, it lies between the highest c that is not flagged and the lowest that is.
Coverage is the share
of images that the model keeps, the most certain ones (Geifman & El-Yaniv 2017); images of equal confidence are kept or
handed over in equal shares. At `COVERAGE`, a tenth is handed over.

Where the model averages several results, their spread is another sign of uncertainty: the share of the errors in the
tenth with the largest spread can be compared with that of the least confident tenth.

Two references show what confidence adds. Random images contain a tenth of the errors and change no rate. A perfect
confidence hands over only errors.

AUROC of the images kept differs from the rates: it keeps all images that are as certain as the last one kept, and its
interval is conditional on the images kept, because resamples do not choose them again. Intervals of all measures take
the cutoff as given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import expit, logit

from ray_cxr.evaluation import calibration, metrics
from ray_cxr.evaluation.bootstrap import bootstrap_ratios, resample_counts, resampled_aurocs
from ray_cxr.evaluation.intervals import Estimate, patient_codes
from ray_cxr.evaluation.net_benefit import Band
from ray_cxr.evaluation.roc_steps import divide_or_nan

COVERAGE = 0.9
#: Coverages of a curve.
GRID = np.linspace(0.5, 1.0, 21)
RATES = ("error_rate", "sensitivity", "specificity")
#: Why a rate of all images or of those kept is undefined.
_REASONS = {
    "error_rate": "no images",
    "sensitivity": "no positive images",
    "specificity": "no negative images",
    "auroc": "no positive or no negative images",
}
_BINS = 200
_AUROC_RESAMPLES = 200
_AT = int(np.searchsorted(GRID, COVERAGE - 1e-9))


@dataclass(frozen=True, eq=False)
class Selection:
    """What is gained by handing over the least certain images.

    Attributes:
        cutoff: the calibrated probability above which an image is flagged.
        curves: per rate of `RATES`, its values on the images kept at each coverage of `GRID`.
        all_images: per rate and for `auroc`, the value on all images; None if undefined.
        kept: the same on the images kept at `COVERAGE`.
        changes: kept minus all.
        errors_handed_over, missed_handed_over: share of the errors, and of the missed positives, among the images that
            are handed over at `COVERAGE`. A random choice gives 1 - `COVERAGE`.
        best_possible: `errors_handed_over` of a perfect confidence.
        errors_by_spread: share of the errors in the tenth with the largest spread; None if there is no spread.
    """

    n: int
    positives: int
    cutoff: float
    curves: dict[str, Band]
    all_images: dict[str, float | None]
    kept: dict[str, float | None]
    changes: dict[str, Estimate]
    errors_handed_over: Estimate
    missed_handed_over: Estimate
    best_possible: float | None
    errors_by_spread: Estimate | None = None

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"n": self.n, "positives": self.positives, "cutoff": self.cutoff}
        for name, change in self.changes.items():
            plain |= {f"{name}_all": self.all_images[name], f"{name}_kept": self.kept[name]}
            plain |= change.to_json(f"{name}_change")
        for name in ("errors_handed_over", "missed_handed_over"):
            plain |= getattr(self, name).to_json(name)
        if self.errors_by_spread is not None:
            plain |= self.errors_by_spread.to_json("errors_by_spread")
        plain |= {"best_possible": self.best_possible, "coverage": GRID.tolist()}
        for name, band in self.curves.items():
            plain |= band.to_json(f"{name}_by_coverage")
        return plain


def measure_selection(
    labels: np.ndarray,
    calibrated: np.ndarray,
    flags: np.ndarray,
    patients: np.ndarray,
    *,
    n_resamples: int,
    seed: int,
    cutoffs: np.ndarray | None = None,
    spread: np.ndarray | None = None,
) -> tuple[Selection | str, ...]:
    """Compute the curves of each column, or the reason why there are none; all have the same resamples.

    Args:
        labels: [n, F], 1 or 0; negative if not labelled.
        calibrated: probabilities [n, F]; NaN if missing.
        flags: [n, F], 1 or 0; negative if there is no operating point.
        patients: ids [n].
        cutoffs: the lowest probabilities that are flagged [F]; NaN if not known.
        spread: [n, F], standard deviation of the probabilities that were averaged; NaN if missing.
    """
    codes, n_patients = patient_codes(patients)
    results: list[Selection | str] = []
    known = (labels >= 0) & (flags >= 0) & ~np.isnan(calibrated)
    columns: list[tuple[int, float]] = []
    cells, owners = [np.zeros(0, dtype=np.int64)], [codes[:0]]
    kept_labels = np.where(known, labels, -1)
    for f, rows in enumerate(known.T):
        y, p, flagged = labels[rows, f] == 1, calibrated[rows, f], flags[rows, f] == 1
        cutoff = _find_cutoff(p, flagged, np.nan if cutoffs is None else cutoffs[f])
        results.append(cutoff if isinstance(cutoff, str) else "")
        if isinstance(cutoff, str):
            continue
        confidence = np.abs(_log_odds(p) - cutoff)
        kept_labels[np.flatnonzero(rows)[confidence < np.quantile(confidence, 1 - COVERAGE)], f] = -1
        # The most certain first; in each bin the cells of a confusion matrix: tn, fp, fn, tp.
        place = len(columns) * _BINS + metrics.rank_bins(-confidence, _BINS)
        cells.append(4 * place + 2 * y + flagged)
        owners.append(codes[rows])
        columns.append((f, cutoff))
    cell, size = np.concatenate(cells), 4 * _BINS * len(columns)
    drawn = resample_counts(cell, np.concatenate(owners), (size, n_patients), n_resamples, seed)
    # The sample comes first, then its resamples.
    counts = np.concatenate([np.bincount(cell, minlength=size)[None], drawn])
    counts = counts.reshape(len(counts), len(columns), _BINS, 4)
    chosen = [f for f, _ in columns]
    n = min(n_resamples, _AUROC_RESAMPLES)
    pair = [
        _draw_aurocs(part[:, chosen], calibrated[:, chosen], patients, n, seed)
        for part in (np.where(known, labels, -1), kept_labels)
    ]
    for i, (f, cutoff) in enumerate(columns):
        found = _build_selection(float(expit(cutoff)), _keep(counts[:, i]), [drawn[:, i] for drawn in pair])
        rows = known[:, f]
        if spread is not None and not np.isnan(spread[rows, f]).any():
            wrong = labels[rows, f] != flags[rows, f]
            by_spread = _hand_over(wrong, spread[rows, f], patients[rows], n_resamples, seed)
            found = replace(found, errors_by_spread=by_spread)
        results[f] = found
    return tuple(results)


def _hand_over(wrong: np.ndarray, spread: np.ndarray, patients: np.ndarray, n_resamples: int, seed: int) -> Estimate:
    """Return the share of the errors, bool [n], in the tenth of the images with the largest spread [n].

    Images of the spread at which the tenth ends belong to it in equal shares.
    """
    if not wrong.any():
        return Estimate(None, reason="no errors")
    wanted = (1 - COVERAGE) * len(spread)
    end = np.sort(spread)[-max(1, int(np.ceil(wanted - 1e-9)))]
    above, equal = spread > end, spread == end
    share = np.where(above, 1.0, np.where(equal, (wanted - above.sum()) / equal.sum(), 0.0)) * wrong
    whole = wrong.astype(np.float64)
    (found,) = bootstrap_ratios(share[:, None], whole[:, None], patients, n_resamples, seed)
    return Estimate(float(share.sum() / whole.sum()), found.low, found.high, found.reason)


def _log_odds(p: np.ndarray) -> np.ndarray:
    return np.asarray(logit(np.clip(p, calibration.EPSILON, 1 - calibration.EPSILON)))


def _find_cutoff(p: np.ndarray, flagged: np.ndarray, known: float) -> float | str:
    """Return the log-odds of the cutoff, or the reason why there is none.

    If it is not known, it is midway between the flagged and the unflagged probabilities.
    """
    if not p.size:
        return "no image has a label, a calibrated probability and a flag"
    if flagged.all() or not flagged.any():
        return "every image is flagged" if flagged.all() else "no image is flagged"
    if not np.isnan(known):
        return float(_log_odds(np.array(known)))
    below, above = float(p[~flagged].max()), float(p[flagged].min())
    if below > above:
        return "flags do not follow the calibrated probability"
    return float(_log_odds(np.array([below, above])).mean())


def _draw_aurocs(labels: np.ndarray, p: np.ndarray, patients: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """Return AUROC of the sample, then of resamples: float64 [1 + n_resamples, F], NaN if undefined."""
    values = [metrics.auroc(y[y >= 0], s[y >= 0]) for y, s in zip(labels.T, p.T, strict=True)]
    drawn = resampled_aurocs(labels, p, patients, n_resamples, seed).values
    return np.concatenate([np.array(values, dtype=np.float64).reshape(1, -1), drawn])


def _keep(counts: np.ndarray) -> np.ndarray:
    """Return counts [b, coverages, 4] of the images kept, from those of each bin [b, bins, 4], most certain first.

    A bin that is kept in part counts in proportion.
    """
    below = np.concatenate([np.zeros_like(counts[:, :1]), counts.cumsum(axis=1)], axis=1)
    wanted = GRID * below[:, -1].sum(axis=-1, keepdims=True)
    images = below.sum(axis=2)
    # The bin in which the wanted number of images is reached.
    last = np.minimum((images[:, None, 1:] < wanted[:, :, None] - 1e-9).sum(axis=2), counts.shape[1] - 1)[:, :, None]
    start, part = np.take_along_axis(below, last, axis=1), np.take_along_axis(counts, last, axis=1)
    share = divide_or_nan(wanted - start.sum(axis=2), part.sum(axis=2))
    return np.asarray(start + np.nan_to_num(share)[:, :, None] * part)


def _build_selection(cutoff: float, kept: np.ndarray, aurocs: list[np.ndarray]) -> Selection:
    """Build the result from counts kept [1 + b, coverages, 4] and AUROCs [1 + b] of all images and of those kept."""
    tn, fp, fn, tp = np.moveaxis(kept, 2, 0)
    wrong, images = fp + fn, kept.sum(axis=2)
    cells = metrics.Confusion(tp, fp, tn, fn)
    rates = {
        "error_rate": divide_or_nan(wrong, images),
        "sensitivity": cells.sensitivity,
        "specificity": cells.specificity,
    }
    pairs = {name: (values[:, -1], values[:, _AT]) for name, values in rates.items()} | {"auroc": tuple(aurocs)}
    n, errors = float(images[0, -1]), float(wrong[0, -1])
    return Selection(
        n=round(n),
        positives=round(float(tp[0, -1] + fn[0, -1])),
        cutoff=cutoff,
        curves={name: Band.of(values[0], values[1:]) for name, values in rates.items()},
        all_images={name: _number(before[0]) for name, (before, _) in pairs.items()},
        kept={name: _number(after[0]) for name, (_, after) in pairs.items()},
        changes={name: _estimate(after - before, _REASONS[name]) for name, (before, after) in pairs.items()},
        errors_handed_over=_estimate(1 - divide_or_nan(wrong[:, _AT], wrong[:, -1]), "no errors"),
        missed_handed_over=_estimate(1 - divide_or_nan(fn[:, _AT], fn[:, -1]), "no missed positives"),
        best_possible=min(1.0, (1 - COVERAGE) * n / errors) if errors else None,
    )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _estimate(values: np.ndarray, reason: str) -> Estimate:
    if np.isnan(values[0]):
        return Estimate(None, reason=reason)
    return Estimate.of(float(values[0]), values[1:])
