"""95% intervals: bootstrap percentiles and Wilson's formula; patients as whole numbers; results as JSON."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

#: With fewer usable resamples the 2.5th percentile is little more than the minimum.
MIN_RESAMPLES = 40
#: Why a quantity has no interval: a bootstrap cannot draw what the sample lacks, such as a missed positive.
NO_VARIATION = "all resamples agree"


@dataclass(frozen=True)
class Interval:
    """A 95% bootstrap interval; `reason` is set if the limits are None.

    `undefined` is the number of resamples left out because the quantity was undefined in them.
    """

    low: float | None
    high: float | None
    undefined: int
    reason: str | None = None


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval; `reason` explains what is missing."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    @classmethod
    def of(cls, value: float, drawn: np.ndarray) -> Estimate:
        """Take the interval from resampled values [b]."""
        found = percentile_interval(drawn)
        return cls(value, found.low, found.high, found.reason)

    def to_json(self, name: str) -> dict[str, Any]:
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high, f"{name}_reason": self.reason}


def percentile_interval(values: np.ndarray, *, allow_constant: bool = False) -> Interval:
    """Compute the percentile interval of resampled values [n], NaN where undefined.

    With `allow_constant` the interval has zero width if all values agree, as for the difference of a model to itself.
    By default there is none: resamples of a few images without errors agree too.
    """
    usable = values[~np.isnan(values)]
    undefined = len(values) - len(usable)
    if len(usable) < MIN_RESAMPLES:
        return Interval(None, None, undefined, f"{len(usable)} usable resamples; {MIN_RESAMPLES} are needed")
    low, high = np.percentile(usable, [2.5, 97.5])
    rounding = 1e-12 * max(1.0, float(np.abs(usable).max()))
    if np.ptp(usable) <= rounding and not allow_constant:
        return Interval(None, None, undefined, NO_VARIATION)
    return Interval(float(low), float(high), undefined)


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """Compute Wilson's (1927) 95% interval of a share. n > 0 can be a fraction: an effective number of images."""
    square = float(ndtri(0.975)) ** 2 / n
    centre = (share + square / 2.0) / (1.0 + square)
    reach = math.sqrt(square * (share * (1.0 - share) + square / 4.0)) / (1.0 + square)
    # At shares of 0 and 1 a limit equals the share, except for rounding.
    return min(share, max(0.0, centre - reach)), max(share, min(1.0, centre + reach))


def to_record(result: Any) -> dict[str, Any]:
    """Convert a dataclass and all dataclasses in it to what JSON reads back: dicts, with lists instead of tuples."""
    return asdict(result, dict_factory=lambda pairs: {k: list(v) if isinstance(v, tuple) else v for k, v in pairs})


@dataclass(frozen=True, eq=False)
class Patients:
    """Patients of n images, or of some of them."""

    codes: np.ndarray  # int64 [n], patients by number, with a separate number for each image without a patient id
    has_id: np.ndarray  # bool [n]

    @classmethod
    def of(cls, patients: np.ndarray) -> Patients:
        ids = np.asarray(patients, dtype=object)
        return cls(patient_codes(ids)[0], np.array([one is not None and one == one for one in ids], dtype=bool))

    def __getitem__(self, rows: np.ndarray) -> Patients:
        return Patients(self.codes[rows], self.has_id[rows])

    @functools.cached_property
    def units(self) -> int:
        """Number of independent units: patients, and images without a patient id."""
        return len(np.unique(self.codes))

    @property
    def number(self) -> int | None:
        """Number of known patients; None if no image has a patient id."""
        known = self.codes[self.has_id]
        return len(np.unique(known)) if len(known) or not len(self.codes) else None


def patient_codes(patients: np.ndarray) -> tuple[np.ndarray, int]:
    """Number patients [n] by first appearance: int64 [n] in 0..k-1, and k. Each None or NaN is a separate patient."""
    known: dict[object, int] = {}
    codes = np.empty(len(patients), dtype=np.int64)
    count = 0
    for row, patient in enumerate(np.asarray(patients, dtype=object)):
        missing = patient is None or patient != patient
        code = count if missing else known.setdefault(patient, count)
        codes[row] = code
        count += code == count
    return codes, count
