"""Screening without labels: are these images what the operating points were set on?

Nothing can say how good flags are where nobody has labelled. But a model that flags a tenth of its validation images
and a third of a hospital's has met something else there: other patients, another machine, a broken export. Three
things are compared with what the bundle expects, per finding: the share of images flagged; the distribution of the
raw scores (the population stability index); and per quality flag the share of images that have it.

A difference may be chance, so each has a p value. Images of one patient resemble each other and count for less than
as many images of different patients: variances are multiplied by the design effect (Kish 1965), estimated from these
images and taken for the validation images too, whose patients are not kept per score. Many findings are many chances
to be misled: p values of one kind are adjusted together (Holm 1979).

    ok       no more than chance allows, or too little to matter
    differs  beyond chance
    large    beyond chance, and more than twice or less than half of what is expected (an index of 0.25 or more)
    unknown  cannot be said; the reason is given

A verdict says that something is different, not what, nor that the model is wrong there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from ray_cxr.evaluation import intervals, quality

OK, DIFFERS, LARGE, UNKNOWN = "ok", "differs", "large", "unknown"
#: With less nothing is said.
MIN_IMAGES, MIN_PATIENTS = 50, 20
#: Of adjusted p values.
LEVEL = 0.05
#: This many times what is expected, or less than one of so many parts of it, is large.
FOLD = 2.0
#: What is customary for the population stability index: below, nothing; from the second on, another population.
PSI_DIFFERS, PSI_LARGE = 0.1, 0.25
#: Classes of scores: tenths of the validation images.
DECILES = 10
_SMOOTHING = 0.5
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Expected:
    """What a bundle leads to expect; each mapping may lack a key, or hold None.

    Attributes:
        flag_rates: per finding the share of images flagged.
        flag_images: per finding on how many images that was counted.
        score_quantiles: per finding what `score_quantiles` gives.
        quality_rates: per quality flag the share of images that have it.
        quality_images: on how many images that was counted.
        quality_reason: why there are no quality_rates.
    """

    flag_rates: Mapping[str, float | None]
    flag_images: Mapping[str, int | None]
    score_quantiles: Mapping[str, Mapping[str, Any] | None]
    quality_rates: Mapping[str, float]
    quality_images: int | None
    quality_reason: str | None

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> Expected:
        """From `model.json` of a score folder, or `bundle.json`; what is not in it is left out."""
        points = _mapping(model.get("operating_points"))
        fitted = _mapping(model.get("quality"))
        return cls(
            flag_rates=_mapping(model.get("expected_flag_rates")),
            flag_images={name: _mapping(point).get("n") for name, point in points.items()},
            score_quantiles=_mapping(_mapping(model.get("provenance")).get("score_quantiles")),
            quality_rates=_mapping(fitted.get("expected_rates")),
            quality_images=fitted.get("held_out_images"),
            quality_reason=fitted.get("lacking") or (None if fitted else "the bundle was made without quality flags"),
        )


@dataclass(frozen=True)
class Rate:
    """A share of images, observed and expected.

    Attributes:
        name: the finding, or the quality flag.
        observed: with its 95% interval `low`, `high` (Wilson 1927, on as many images as these are worth).
        expected, expected_images: the bundle's; how many images it was counted on, or None.
        n, n_patients, count: images that could have it, whose they are, and those that have it.
        design_effect: n / design_effect images of different patients would say as much.
        ratio: observed / expected.
        p, p_adjusted: of a difference this large by chance, two-sided; after Holm over all rates of this kind.
        verdict: `ok`, `differs`, `large` or `unknown`.
        reason: why it is unknown.
    """

    name: str
    observed: float | None
    low: float | None
    high: float | None
    expected: float | None
    expected_images: int | None
    n: int
    n_patients: int
    count: int
    design_effect: float | None
    ratio: float | None
    p: float | None
    p_adjusted: float | None
    verdict: str
    reason: str | None


@dataclass(frozen=True)
class Stability:
    """How a finding's raw scores lie among those of validation.

    Attributes:
        psi: the population stability index, the sum over classes of (share - expected) * ln(share / expected); 0 is
            the same.
        shares, expected: of images, per class of `score_quantiles`, from the lowest scores up.
        n, n_patients: images with a score, and whose they are.
        p, p_adjusted: of an index this large by chance; after Holm over all findings.
        verdict: as in `Rate`; below 0.1 it is `ok` whatever p is.
        reason: why it is unknown.
    """

    name: str
    psi: float | None
    shares: tuple[float, ...]
    expected: tuple[float, ...]
    n: int
    n_patients: int
    p: float | None
    p_adjusted: float | None
    verdict: str
    reason: str | None


@dataclass(frozen=True)
class Drift:
    """What screening shows without labels.

    Attributes:
        flags: per finding the flagged share of the scored images.
        scores: per finding the distribution of raw scores.
        quality: per quality flag the share of the scored images that have it as their gravest.
        errors: the share of all images that could not be scored; nothing is expected of it, so its verdict is unknown.
        clustered: whether patients are known; where they are not every image counts as a patient of its own, and
            chance is taken for smaller than it is.
    """

    flags: tuple[Rate, ...]
    scores: tuple[Stability, ...]
    quality: tuple[Rate, ...]
    errors: Rate
    clustered: bool

    @property
    def words(self) -> str:
        """The verdicts in a sentence or two."""
        parts = []
        for items, kind in ((self.flags, "flagged share"), (self.scores, "score"), (self.quality, "quality flag")):
            found: Sequence[Rate | Stability] = items
            judged = [one for one in found if one.verdict != UNKNOWN]
            large, differs = (_names(judged, verdict) for verdict in (LARGE, DIFFERS))
            if not judged:
                parts.append(f"{kind}s: nothing can be said")
            elif not large and not differs:
                parts.append(f"{kind}s: all {len(judged)} as expected")
            else:
                words = [f"{verdict}: {names}" for verdict, names in ((LARGE, large), (DIFFERS, differs)) if names]
                parts.append(f"{kind}s: {', '.join(words)} (of {len(judged)})")
        return ". ".join(part[0].upper() + part[1:] for part in parts) + "."

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json: by finding or flag."""
        plain: dict[str, Any] = {
            kind: {one.name: _plain(one) for one in items}
            for kind, items in (("flags", self.flags), ("scores", self.scores), ("quality", self.quality))
        }
        plain["errors"] = _plain(self.errors)
        return plain | {
            "clustered": self.clustered,
            "words": self.words,
            "level": LEVEL,
            "adjusted": "Holm, over the verdicts of one kind",
            "min_images": MIN_IMAGES,
            "min_patients": MIN_PATIENTS,
        }


def measure(
    expected: Expected,
    findings: Sequence[str],
    flags: np.ndarray,
    scores: np.ndarray,
    quality_flags: np.ndarray,
    ok: np.ndarray,
    patients: np.ndarray,
) -> Drift:
    """Compare a score table with what its bundle expects.

    Args:
        expected: the bundle's.
        findings: F names.
        flags: int8 [n,F], 1 at or above the operating point, 0 below, -1 where there is none.
        scores: raw probabilities [n,F], NaN where there is none.
        quality_flags: objects [n], the gravest flag of an image or None.
        ok: bool [n], False where an image could not be scored.
        patients: ids [n]; see `intervals.patient_codes`.

    Raises:
        ValueError: shapes that do not fit.
    """
    flags, scores, ok = np.asarray(flags), np.asarray(scores), np.asarray(ok, dtype=bool)
    shape = (len(ok), len(findings))
    if flags.shape != shape or scores.shape != shape or len(quality_flags) != len(ok) or len(patients) != len(ok):
        raise ValueError(f"flags {flags.shape}, scores {scores.shape} do not fit {len(ok)} images, {shape[1]} findings")
    codes, n_patients = intervals.patient_codes(patients)
    quality_flags = np.asarray(quality_flags, dtype=object)
    return Drift(
        flags=_adjusted_rates([_flagged(expected, name, flags[:, j], codes) for j, name in enumerate(findings)]),
        scores=_adjusted_scores(
            [
                _stability(name, expected.score_quantiles.get(name), scores[:, j], codes)
                for j, name in enumerate(findings)
            ]
        ),
        quality=_adjusted_rates([_quality(expected, name, quality_flags[ok], codes[ok]) for name in quality.FLAGS]),
        errors=_rate("errors", ~ok, codes, None, None, "nothing is expected of it"),
        clustered=n_patients < len(ok),
    )


def score_quantiles(scores: np.ndarray) -> dict[str, Any] | None:
    """What to keep of validation scores, so that later scores can be compared with them.

    Args:
        scores: raw probabilities [n], NaN where there is none.

    Returns:
        `edges`: the nine inner deciles, as floats; `shares`: the ten shares of images in the classes score < edge 1,
        edge 1 <= score < edge 2, ..., edge 9 <= score, which equal scores can make other than a tenth; `n`. None with
        fewer than `MIN_IMAGES` scores.
    """
    known = np.asarray(scores, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) < MIN_IMAGES:
        return None
    edges = np.quantile(known, np.arange(1, DECILES) / DECILES)
    shares = np.bincount(np.searchsorted(edges, known, side="right"), minlength=DECILES) / len(known)
    return {"edges": edges.tolist(), "shares": shares.tolist(), "n": len(known)}


def design_effect(values: np.ndarray, codes: np.ndarray) -> float:
    """By how much images of one patient widen the variance of a share, at least 1.

    The variance of the ratio of sums over patients, linearised, over that of as many independent images. Where all
    images are alike nothing can be estimated, and they are taken for wholly dependent: sum of squares of the numbers
    of images over their sum.

    Args:
        values: bool [n].
        codes: patients, whole numbers [n] >= 0.
    """
    n = len(values)
    if not n:
        return 1.0
    _, place, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    share = float(values.mean())
    if share in (0.0, 1.0) or len(sizes) < 2:
        return float((sizes.astype(np.float64) ** 2).sum() / n)
    strays = np.bincount(place, weights=values) - share * sizes
    variance = len(sizes) / (len(sizes) - 1) * float((strays**2).sum()) / n**2
    return max(1.0, variance / (share * (1.0 - share) / n))


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for being several (Holm 1979): the chance of any such error stays below the level."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(order))
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = largest
    return [float(value) for value in adjusted]


def _flagged(expected: Expected, name: str, flags: np.ndarray, codes: np.ndarray) -> Rate:
    known = flags >= 0
    rate = expected.flag_rates.get(name)
    reason = "no operating point" if rate is None or not known.any() else None
    return _rate(name, flags[known] == 1, codes[known], rate, expected.flag_images.get(name), reason)


def _quality(expected: Expected, name: str, found: np.ndarray, codes: np.ndarray) -> Rate:
    rate = expected.quality_rates.get(name)
    reason = None
    if rate is None:
        reason = (expected.quality_reason if name in quality.JUDGED else None) or "the bundle keeps no rate of it"
    return _rate(name, found == name, codes, rate, expected.quality_images, reason)


def _rate(
    name: str, values: np.ndarray, codes: np.ndarray, expected: float | None, images: int | None, reason: str | None
) -> Rate:
    """A share of bool [n], compared with what is expected of it unless there is a reason not to."""
    n, n_patients, count = len(values), len(np.unique(codes)), int(values.sum())
    observed = count / n if n else None
    effect = design_effect(values, codes) if n else None
    low, high = _wilson(count / n, n / effect) if n and effect else (None, None)
    plain = Rate(
        name=name,
        observed=observed,
        low=low,
        high=high,
        expected=None if expected is None else float(expected),
        expected_images=images,
        n=n,
        n_patients=n_patients,
        count=count,
        design_effect=effect,
        ratio=None if observed is None or not expected else observed / expected,
        p=None,
        p_adjusted=None,
        verdict=UNKNOWN,
        reason=reason or _too_few(n, n_patients),
    )
    if plain.reason is not None or observed is None or effect is None or expected is None:
        return plain
    if not images and expected in (0.0, 1.0) and observed != expected:
        return replace(plain, reason=f"expects {expected:.0%}, and does not say of how many images")
    return replace(plain, p=_chance(observed, n, float(expected), images, effect))


def _chance(observed: float, n: int, expected: float, images: int | None, effect: float) -> float:
    """The p value of two shares, the second exact where it is not known of how many images it is.

    The variance is that of one share in both, the continuity correction half an image.
    """
    pooled = (n * observed + images * expected) / (n + images) if images else expected
    variance = effect * pooled * (1.0 - pooled) * (1.0 / n + (1.0 / images if images else 0.0))
    gap = abs(observed - expected) - 0.5 * effect / n
    if gap <= 0.0 or variance <= 0.0:
        return 1.0
    return math.erfc(gap / math.sqrt(2.0 * variance))


def _wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n images, n any positive number."""
    z = _NORMAL.inv_cdf(0.975)
    centre = (share + z * z / (2.0 * n)) / (1.0 + z * z / n)
    reach = z / (1.0 + z * z / n) * math.sqrt(share * (1.0 - share) / n + z * z / (4.0 * n * n))
    # At the ends the two are equal but for rounding.
    return min(share, max(0.0, centre - reach)), max(share, min(1.0, centre + reach))


def _stability(name: str, kept: Mapping[str, Any] | None, scores: np.ndarray, codes: np.ndarray) -> Stability:
    known = ~np.isnan(scores)
    scores, codes = scores[known].astype(np.float64), codes[known]
    n, n_patients = len(scores), len(np.unique(codes))
    plain = Stability(name, None, (), (), n, n_patients, None, None, UNKNOWN, None)
    reason = "the bundle keeps no scores of validation" if kept is None else _too_few(n, n_patients)
    if reason is not None or kept is None:
        return replace(plain, reason=reason)
    edges, shares, images = np.asarray(kept["edges"]), np.asarray(kept["shares"]), int(kept["n"])
    place = np.searchsorted(edges, scores, side="right")
    counts = np.bincount(place, minlength=len(shares))
    used = (counts > 0) | (shares > 0)  # equal scores leave classes that no score can be in
    place = (np.cumsum(used) - 1)[place]
    now, before = (_smoothed(one[used]) for one in (counts, shares * images))
    psi = float(np.sum((now - before) * np.log(now / before)))
    freedom = int(used.sum()) - 1
    p = 1.0
    if freedom:
        # Rao and Scott's first correction: the mean design effect of the classes.
        effect = float(np.mean([design_effect(place == k, codes) for k in range(freedom + 1)]))
        p = _chi_square_tail(psi / (effect * (1.0 / n + 1.0 / images)), freedom)
    return replace(plain, psi=psi, shares=tuple(now.tolist()), expected=tuple(before.tolist()), p=p)


def _smoothed(counts: np.ndarray) -> np.ndarray:
    """Shares with half an image more in every class, so that an empty one has a logarithm."""
    more = counts + _SMOOTHING
    return np.asarray(more / more.sum())


def _chi_square_tail(x: float, freedom: int) -> float:
    """P(chi-square > x) with a whole number of degrees of freedom, from that with two fewer (Abramowitz 26.4.4-5)."""
    half = x / 2.0
    if half <= 0.0:
        return 1.0
    tail = math.erfc(math.sqrt(half)) if freedom % 2 else math.exp(-half)
    for k in range(2 - freedom % 2, freedom, 2):
        tail += math.exp(k / 2.0 * math.log(half) - half - math.lgamma(k / 2.0 + 1.0))
    return min(1.0, tail)


def _too_few(n: int, n_patients: int) -> str | None:
    if n < MIN_IMAGES:
        return f"{n:,} images; {MIN_IMAGES} are needed"
    if n_patients < MIN_PATIENTS:
        return f"{n_patients:,} patients; {MIN_PATIENTS} are needed"
    return None


def _adjusted_rates(rates: Sequence[Rate]) -> tuple[Rate, ...]:
    tested = [one.p for one in rates if one.p is not None]
    adjusted = iter(holm(tested))
    return tuple(one if one.p is None else _judged_rate(one, next(adjusted)) for one in rates)


def _judged_rate(rate: Rate, p: float) -> Rate:
    verdict = OK
    if p < LEVEL and rate.observed is not None and rate.expected is not None:
        far = rate.observed > FOLD * rate.expected or rate.observed < rate.expected / FOLD
        verdict = LARGE if far else DIFFERS
    return replace(rate, p_adjusted=p, verdict=verdict)


def _adjusted_scores(found: Sequence[Stability]) -> tuple[Stability, ...]:
    tested = [one.p for one in found if one.p is not None]
    adjusted = iter(holm(tested))
    return tuple(one if one.p is None else _judged_score(one, next(adjusted)) for one in found)


def _judged_score(score: Stability, p: float) -> Stability:
    psi = score.psi or 0.0
    verdict = OK
    if p < LEVEL and psi >= PSI_DIFFERS:
        verdict = LARGE if psi >= PSI_LARGE else DIFFERS
    return replace(score, p_adjusted=p, verdict=verdict)


def _names(judged: Sequence[Rate | Stability], verdict: str) -> str:
    return ", ".join(one.name for one in judged if one.verdict == verdict)


def _plain(one: Rate | Stability) -> dict[str, Any]:
    plain = asdict(one)
    del plain["name"]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
