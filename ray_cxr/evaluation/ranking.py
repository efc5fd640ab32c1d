"""Abnormality and priority: one number per image from the probabilities of its findings.

For the probability c of each finding, calibrated, and weights w >= 0, both taken over all findings but No_Finding,

    abnormality = 1 - product of (1 - c)         priority = 1 - product of (1 - c)^w

Both lie in 0..1. With all weights 1, the default, they are equal. This is the "noisy or" (Pearl 1988). Abnormality is
the probability of any finding only if findings are independent. They are not, so it is a score for ranking, usually
above that probability. `top_finding` is the finding with the highest c; weights do not change it.

Near 1, different images round to the same priority. So worklists are ordered by the sum of -w log(1 - c), which
increases with priority.

Only findings on one scale can be combined. So a finding without calibration is left out if others have one. If no
finding has a calibration, the raw probabilities of all findings are used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ray_cxr.labels import NO_FINDING


@dataclass(frozen=True)
class RankedFindings:
    """The findings that abnormality, priority and top_finding use; those left out have no calibration."""

    names: tuple[str, ...]
    left_out: tuple[str, ...]
    is_calibrated: bool

    @classmethod
    def choose(cls, findings: Sequence[str], calibrated: Collection[str]) -> RankedFindings:
        diseases = tuple(name for name in findings if name != NO_FINDING)
        names = tuple(name for name in diseases if name in calibrated)
        if not names:
            return cls(diseases, (), is_calibrated=False)
        return cls(names, tuple(name for name in diseases if name not in calibrated), is_calibrated=True)

    @property
    def note(self) -> str | None:
        """What a reader must know of findings without calibration; None if all have one, or if none is ranked."""
        if not self.names:
            return None
        if not self.is_calibrated:
            return "No finding has calibrated probabilities, so images are ranked by uncalibrated probabilities."
        if self.left_out:
            named = ", ".join(name.replace("_", " ") for name in self.left_out)
            return f"Not part of abnormality, priority and top finding, because not calibrated: {named}."
        return None

    def list_weights(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Return the weight of each ranked finding, 1 if it is not in `weights`."""
        return {name: float(weights.get(name, 1.0)) for name in self.names}


def combine(probabilities: np.ndarray, weights: Sequence[float] | None = None) -> np.ndarray:
    """Compute 1 - product of (1 - c)^w over the columns of [n, F]: float64 [n].

    NaN is left out; a row without any number is NaN. Weights [F] default to 1.
    """
    return np.asarray(-np.expm1(-sum_logs(probabilities, weights)) + 0.0)  # no negative zero


def sum_logs(probabilities: np.ndarray, weights: Sequence[float] | None = None) -> np.ndarray:
    """Compute the sum of -w log(1 - c), which orders images like `combine`, but does not round near 1: float64 [n]."""
    c = np.asarray(probabilities, dtype=np.float64)
    w = np.ones(c.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    counted = w > 0
    with np.errstate(divide="ignore"):
        logs = np.log1p(-c[:, counted]) * w[counted]  # -inf at 1; precise for small probabilities
    return np.where(np.isnan(c).all(axis=1), np.nan, -np.nansum(logs, axis=1))
