"""Test two backbones on pairs of new trainings: both backbones with the same settings and a new seed.

The trials of a search cannot show which backbone is better. The sampler chooses their settings from earlier results, so
they are not independent, and the best of them owes its rank to luck. New seeds remove that luck. Equal settings remove
the difference between settings. The settings come from both backbones alternately, so neither has an advantage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Fewer pairs cannot reach p < 0.05: with five, p is at least 2 / 2**5.
MIN_PAIRS = 6
#: The test evaluates 2**n subsets.
MAX_PAIRS = 20


@dataclass(frozen=True)
class SignFlipTest:
    """Mean of paired differences; `reason` is set if a value is None."""

    mean: float | None
    low: float | None  # 95% interval, the exact inverse of the test
    high: float | None
    p: float | None  # two-sided
    n: int
    reason: str | None = None


@dataclass(frozen=True)
class ConfirmedPair:
    """Validation macro AUROC of two trainings with equal settings and seed, one per backbone."""

    trial: int  # the trial whose settings both have
    seed: int
    a: float | None
    b: float | None
    ended: bool  # whether both trainings have ended, perhaps by failing
    reason: str | None = None  # why `a` or `b` is None


@dataclass(frozen=True)
class Confirmation:
    """Pairs of new trainings of the backbones `a` and `b`, with the test of their differences a - b."""

    a: str
    b: str
    pairs: tuple[ConfirmedPair, ...]
    test: SignFlipTest

    @classmethod
    def of(cls, a: str, b: str, pairs: Sequence[ConfirmedPair]) -> Confirmation:
        """Return the pairs with their test; pairs with a failed training do not count."""
        differences = [pair.a - pair.b for pair in pairs if pair.a is not None and pair.b is not None]
        return cls(a, b, tuple(pairs), sign_flip_test(differences))

    @property
    def ended(self) -> int:
        """Number of pairs whose trainings have ended."""
        return sum(pair.ended for pair in self.pairs)


def sign_flip_test(differences: Sequence[float]) -> SignFlipTest:
    """Test whether paired differences are symmetric about 0, by all sign changes (Fisher 1935), with an interval.

    The exact interval consists of means of subsets (Hartigan 1969): for values that are symmetric about a centre, each
    gap between neighbours among the 2**n - 1 means contains the centre with probability 1 / 2**n. It excludes 0 if and
    only if p < 0.05. With six pairs it runs from the smallest to the largest difference.

    Raises:
        ValueError: more than `MAX_PAIRS` differences.
    """
    n = len(differences)
    if n > MAX_PAIRS:
        raise ValueError(f"{n} differences; at most {MAX_PAIRS}")
    mean = float(np.mean(differences)) if n else None
    if n < MIN_PAIRS:
        return SignFlipTest(mean, None, None, None, n, f"{n} complete pairs; p < 0.05 needs {MIN_PAIRS}")
    sums, counts = np.zeros(1), np.zeros(1)
    for value in differences:
        sums, counts = np.concatenate([sums, sums + value]), np.concatenate([counts, counts + 1])
    means = np.sort(sums[1:] / counts[1:])
    rounding = 1e-12
    # Changing the signs of a subset raises the total if and only if the mean of the subset is below 0.
    tail = min((means <= rounding).sum(), (means >= -rounding).sum()) + 1
    # p = 2 * k / 2**n is below 0.05 for the first k means.
    k = int(np.ceil(0.025 * 2**n)) - 1
    return SignFlipTest(mean, float(means[k - 1]), float(means[-k]), min(1.0, 2 * int(tail) / 2**n), n)
