"""Drift without labels: compare flags, scores and quality flags with the images that the bundle was last fitted on.

Without labels no metric can be computed. But if a model flags a tenth of its validation images and a third of a
hospital's images, the data differ: other patients, another machine, a broken export. Three comparisons are made: per
finding the share of flagged images and the distribution of raw scores (population stability index), and per quality
flag the share of images with it.

Each comparison has an interval, which alone decides the verdict: of observed - expected share, or of the index. It
covers the uncertainty of both samples. Images of one patient resemble each other, so numbers of images are divided by
the design effect (Kish 1965), estimated from these images; the index has one per direction (see `_find_scales`). The
same effects are applied to the validation images, because bundles keep no patients per score. The level of the
intervals and the p values are corrected for the number of findings (Bonferroni), so that an adjusted p is below `LEVEL`
exactly if the interval excludes 0.

    ok            the interval lies within the tolerated range (see `_find_tolerance` and `PSI_DIFFERS`)
    differs       it does not, and it excludes 0
    large         it lies outside of this range, and the share is more than twice or less than half the expected one, or
                  the index at least 0.25
    inconclusive  neither: the images are too few to decide
    unknown       not testable; the reason is given

A verdict states that the data differ, not how, and not that the model is wrong.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, TypeVar

import numpy as np
from scipy.special import betaincinv, chdtrc, chndtrinc, ndtr

from ray_cxr.evaluation import quality
from ray_cxr.evaluation.intervals import Patients, to_record, wilson_interval
from ray_cxr.imaging.demographics import count_of

OK, DIFFERS, LARGE, INCONCLUSIVE, UNKNOWN = "ok", "differs", "large", "inconclusive", "unknown"
#: The summary names at most this many findings.
_LISTED = 5
#: Verdicts as readers see them, in the order of the summary.
WORDS = {
    LARGE: "very different",
    DIFFERS: "different",
    INCONCLUSIVE: "inconclusive",
    OK: "as expected",
    UNKNOWN: "not tested",
}
#: Minimum numbers for a verdict.
MIN_IMAGES, MIN_PATIENTS = 50, 20
#: Level of adjusted p values, and of all intervals of one kind together.
LEVEL = 0.05
#: Tolerated difference, as a share of the expected share of images with the flag, or of those without if that is less.
TOLERANCE = 0.25
#: A difference is large if a share is more than this multiple of the expected share, or less than this fraction.
FOLD = 2.0
#: A difference of this many images per image is tolerated too, unless the share can be more than `FOLD` times as high.
MARGIN = 0.01
#: A difference of this many images per image is always tolerated.
LEAST_TOLERANCE = 0.001
#: Customary limits of the population stability index: negligible below the first, another population from the second.
PSI_DIFFERS, PSI_LARGE = 0.1, 0.25
#: Classes of scores: tenths of the baseline's images.
DECILES = 10
_SMOOTHING = 0.5
#: p values are searched between 1 and 1e-15.
_MAX_DEVIATE, _BISECTIONS = 8.0, 50


class ScoreQuantiles(TypedDict):
    """Distribution of n scores of the baseline, as stored in a bundle.

    edges: the nine inner deciles. shares: share of images in each of the ten classes score < edge 1, edge 1 <= score <
    edge 2, ..., edge 9 <= score; a tenth each, unless scores are equal.
    """

    edges: list[float]
    shares: list[float]
    n: int


@dataclass(frozen=True)
class Expected:
    """Expectations that a bundle stores, per finding or quality flag; mappings may lack a key or hold None."""

    flag_rates: Mapping[str, float | None]
    flag_images: Mapping[str, int | None]  # number of images behind each of `flag_rates`
    score_quantiles: Mapping[str, ScoreQuantiles | None]
    quality_rates: Mapping[str, float]
    quality_images: int | None  # number of images behind `quality_rates`
    quality_reason: str | None  # why `quality_rates` is missing
    baselines: Mapping[str, str]  # names the images behind the expectations of flags, scores and quality flags
    error_rate: float | None = None
    error_images: int | None = None  # number of images behind `error_rate`

    @classmethod
    def from_model(cls, model: Mapping[str, Any]) -> Expected:
        """Read `model.json` of a score folder, or `bundle.json`; missing entries stay empty.

        Bundles that older versions recalibrated keep only flag rates of the new site, so their baselines differ.
        """
        points = _as_dict(model.get("operating_points"))
        fitted, provenance = _as_dict(model.get("quality")), _as_dict(model.get("provenance"))
        rates, images = _as_dict(fitted.get("expected_rates")), fitted.get("held_out_images")
        flags = rest = "validation images of training"
        site = _as_dict(provenance.get("recalibrated"))
        if site:
            fitted_on = count_of(site.get("images", 0), "image")
            flags = f"{fitted_on} of the recalibration of {str(site.get('created'))[:10]}"
        if "quality_rates" in site:
            rest, provenance = flags, site
            rates, images = _as_dict(site["quality_rates"]), site.get("images")
        return cls(
            flag_rates=_as_dict(model.get("expected_flag_rates")),
            flag_images={name: _as_dict(point).get("n") for name, point in points.items()},
            score_quantiles=_as_dict(provenance.get("score_quantiles")),
            quality_rates=rates,
            quality_images=images,
            quality_reason=fitted.get("lacking") or (None if fitted else "the bundle was made without quality flags"),
            baselines={"flags": flags, "scores": rest, "quality": rest},
        )

    @classmethod
    def from_images(
        cls,
        findings: Sequence[str],
        flags: np.ndarray,
        scores: np.ndarray,
        quality_flags: np.ndarray,
        ok: np.ndarray,
        name: str,
    ) -> Expected:
        """Expect what other images of the same model had, such as those of earlier nights; `name` names them.

        The arrays are those of `measure_drift`. Unlike a bundle, images have an expected rate of every quality flag and
        of errors.
        """
        known = {finding: flags[:, j][flags[:, j] >= 0] for j, finding in enumerate(findings)}
        of_scored = np.asarray(quality_flags, dtype=object)[ok]
        return cls(
            flag_rates={finding: float(values.mean()) for finding, values in known.items() if len(values)},
            flag_images={finding: len(values) for finding, values in known.items()},
            score_quantiles={finding: score_quantiles(scores[:, j]) for j, finding in enumerate(findings)},
            quality_rates={flag: float((of_scored == flag).mean()) for flag in quality.FLAGS} if len(of_scored) else {},
            quality_images=len(of_scored),
            quality_reason="no image was scored",
            baselines=dict.fromkeys(("flags", "scores", "quality"), name),
            error_rate=float((~ok).mean()) if len(ok) else None,
            error_images=len(ok),
        )


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One comparison of a finding or quality flag."""

    name: str
    n: int
    n_patients: int | None  # None if no image has a patient id
    p: float | None = None
    p_adjusted: float | None = None  # Bonferroni's, over all comparisons of this kind
    interval_level: float | None = None  # of the interval that decides: 1 - LEVEL / number of comparisons of this kind
    verdict: str = UNKNOWN
    reason: str | None = None  # why the verdict is unknown

    def to_json(self) -> dict[str, Any]:
        record = to_record(self)
        del record["name"]
        return record


@dataclass(frozen=True, kw_only=True)
class RateDrift(_Row):
    """A share of images, observed and expected."""

    observed: float | None
    low: float | None  # Wilson's 95% interval, for the effective number of images n / design_effect
    high: float | None
    expected: float | None
    expected_images: int | None  # number of images behind the bundle's share
    count: int  # number of images behind `observed`
    design_effect: float | None  # variance of the share relative to independent images
    ratio: float | None  # observed / expected
    difference: float | None = None  # observed - expected
    difference_low: float | None = None  # the interval that decides, at `interval_level`
    difference_high: float | None = None
    tolerance: float | None = None  # the largest difference that is as expected

    def decide(self, tail: float) -> RateDrift:
        """Set the interval, whose tails have this probability, and the verdict."""
        if self.observed is None or self.expected is None or self.design_effect is None:
            return self
        low, high = _bound_difference(self, tail)
        tolerance = _find_tolerance(self, tail)
        row = replace(self, difference_low=low, difference_high=high, tolerance=tolerance)
        is_far = self.observed > FOLD * self.expected or self.observed < self.expected / FOLD
        is_large = is_far and (low > tolerance or high < -tolerance)
        return replace(row, verdict=_judge(max(-low, high) <= tolerance, low > 0.0 or high < 0.0, is_large))


@dataclass(frozen=True, kw_only=True)
class ScoreDrift(_Row):
    """Distribution of a finding's raw scores relative to the baseline."""

    psi: float | None = None  # population stability index: sum of (share - expected) * ln(share / expected)
    psi_low: float | None = None  # the interval that decides
    psi_high: float | None = None
    shares: tuple[float, ...] = ()  # of images per class of `score_quantiles`, lowest scores first
    expected: tuple[float, ...] = ()
    scale: float | None = None  # mean of the index by chance, per degree of freedom
    freedom: float = 0.0
    scale_found: float | None = None  # the same for the difference that was found; at least `scale`

    def decide(self, tail: float) -> ScoreDrift:
        """Set the interval and the verdict. Each limit has twice this probability, because an index is not negative.

        psi / scale has approximately a non-central chi-square distribution with non-centrality true index / scale. The
        upper limit uses `scale_found` with as many degrees of freedom as keep the mean by chance, and takes an index
        below this mean as this mean, because no index is too small.
        """
        if self.psi is None or self.scale is None or self.scale_found is None or self.p is None:
            return self
        low, high, excludes_zero = 0.0, 0.0, self.p < 2.0 * tail
        if self.freedom:
            chance = self.scale * self.freedom
            freedom = chance / self.scale_found
            high = self.scale_found * float(chndtrinc(max(self.psi, chance) / self.scale_found, freedom, 2.0 * tail))
            if excludes_zero:
                low = self.scale * float(chndtrinc(self.psi / self.scale, self.freedom, 1.0 - 2.0 * tail))
        row = replace(self, psi_low=low, psi_high=high)
        is_large = self.psi >= PSI_LARGE and low >= PSI_DIFFERS
        return replace(row, verdict=_judge(high < PSI_DIFFERS, excludes_zero, is_large))


_AnyDrift = TypeVar("_AnyDrift", RateDrift, ScoreDrift)


@dataclass(frozen=True)
class Drift:
    """All comparisons of one score table."""

    flags: tuple[RateDrift, ...]  # per finding the share of scored images that are flagged
    scores: tuple[ScoreDrift, ...]  # per finding the distribution of raw scores
    quality: tuple[RateDrift, ...]  # per quality flag the share of scored images with it as their most severe flag
    errors: RateDrift  # share of all images that could not be scored; a bundle expects nothing of it
    clustered: bool  # whether all patients are known; images without one count as patients, so p values are too small
    baselines: Mapping[str, str]  # see `Expected`

    @property
    def summary(self) -> str:
        """The verdicts in one or two sentences."""
        parts = []
        expectable = [row for row in self.quality if row.name in quality.JUDGED]  # nothing is ever expected of others
        for items, kind in ((self.flags, "flagged share"), (self.scores, "score"), (expectable, "quality flag")):
            rows: Sequence[_Row] = items
            judged = [row for row in rows if row.verdict != UNKNOWN]
            named = {verdict: [row.name for row in judged if row.verdict == verdict] for verdict in WORDS}
            untested = f"{len(judged)} of {len(rows)} tested, " if len(judged) < len(rows) else ""
            if not judged:
                parts.append(f"{kind}s: {WORDS[UNKNOWN]}")
            elif len(named[OK]) == len(judged):
                parts.append(f"{kind}s: {untested}all {'' if untested else f'{len(judged)} '}as expected")
            else:
                listed = [
                    f"{WORDS[verdict]} for {_list(names, len(judged))}" for verdict, names in named.items() if names
                ]
                parts.append(f"{kind}s: {untested}{', '.join(listed)}")
        if any(row.verdict == INCONCLUSIVE for row in (*self.flags, *self.scores, *self.quality)):
            parts.append("inconclusive: too few images to decide")
        return ". ".join(part[0].upper() + part[1:] for part in parts) + "."

    def to_json(self) -> dict[str, Any]:
        """Return the entry of metrics.json, by finding or flag."""
        kinds: dict[str, Sequence[_Row]] = {"flags": self.flags, "scores": self.scores, "quality": self.quality}
        return {
            **{kind: {row.name: row.to_json() for row in rows} for kind, rows in kinds.items()},
            "errors": self.errors.to_json(),
            "clustered": self.clustered,
            "baselines": dict(self.baselines),
            "mixed_baselines": len(set(self.baselines.values())) > 1,
            "words": self.summary,
            "level": LEVEL,
            "adjusted": "Bonferroni, over the verdicts of one kind",
            "tolerance": TOLERANCE,
            "margin": MARGIN,
            "fold": FOLD,
            "least_tolerance": LEAST_TOLERANCE,
            "psi_tolerance": PSI_DIFFERS,
            "min_images": MIN_IMAGES,
            "min_patients": MIN_PATIENTS,
        }


def measure_drift(
    expected: Expected,
    findings: Sequence[str],
    flags: np.ndarray,
    scores: np.ndarray,
    quality_flags: np.ndarray,
    ok: np.ndarray,
    patients: np.ndarray,
    *,
    questions: int = 1,
) -> Drift:
    """Compare a score table with the expectations of its bundle.

    Args:
        flags: int8 [n,F], 1 at or above the operating point, 0 below, -1 if there is none.
        scores: raw probabilities [n,F], NaN if missing.
        quality_flags: objects [n], most severe flag of each image or None.
        ok: bool [n], False if the image could not be scored.
        questions: number of kinds of comparison that are one question. Levels and p values are corrected for it too:
            with 4, the chance of any false difference among the flags, scores, quality flags and errors is `LEVEL`.
    """
    flags, scores, ok = np.asarray(flags), np.asarray(scores), np.asarray(ok, dtype=bool)
    shape = (len(ok), len(findings))
    if flags.shape != shape or scores.shape != shape or len(quality_flags) != len(ok) or len(patients) != len(ok):
        raise ValueError(f"flags {flags.shape}, scores {scores.shape} do not fit {len(ok)} images, {shape[1]} findings")
    people = Patients.of(patients)
    scored_flags = np.asarray(quality_flags, dtype=object)[ok]
    error_reason = "nothing is expected of it" if expected.error_rate is None else None
    errors = _compare_rate("errors", ~ok, people, expected.error_rate, expected.error_images, error_reason)
    adjust = functools.partial(_adjust, questions=questions)
    return Drift(
        flags=adjust([_compare_flags(expected, name, flags[:, j], people) for j, name in enumerate(findings)]),
        scores=adjust(
            [
                _compare_scores(name, expected.score_quantiles.get(name), scores[:, j], people)
                for j, name in enumerate(findings)
            ]
        ),
        quality=adjust([_compare_quality(expected, name, scored_flags, people[ok]) for name in quality.FLAGS]),
        errors=adjust([errors])[0],
        clustered=bool(people.has_id.all()),
        baselines=expected.baselines,
    )


def score_quantiles(scores: np.ndarray) -> ScoreQuantiles | None:
    """Summarise scores [n] of the baseline, NaN if missing; None with fewer than `MIN_IMAGES` scores."""
    known = np.asarray(scores, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) < MIN_IMAGES:
        return None
    edges = np.quantile(known, np.arange(1, DECILES) / DECILES)
    shares = np.bincount(np.searchsorted(edges, known, side="right"), minlength=DECILES) / len(known)
    return ScoreQuantiles(edges=edges.tolist(), shares=shares.tolist(), n=len(known))


def design_effect(values: np.ndarray, codes: np.ndarray) -> float:
    """Compute the variance of the share of values, bool [n], relative to independent images, at least 1.

    The variance is that of a ratio of sums over patients, linearised. If all images agree it cannot be estimated, and
    images of one patient are treated as fully dependent: sum of squared numbers of images over their sum.
    """
    n = len(values)
    _, rows, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    share = float(values.mean())
    if share in (0.0, 1.0) or len(sizes) < 2:
        return float((sizes.astype(np.float64) ** 2).sum() / n)
    residuals = np.bincount(rows, weights=values) - share * sizes
    variance = len(sizes) / (len(sizes) - 1) * float((residuals**2).sum()) / n**2
    return max(1.0, variance / (share * (1.0 - share) / n))


def _compare_flags(expected: Expected, name: str, flags: np.ndarray, patients: Patients) -> RateDrift:
    known = flags >= 0
    rate = expected.flag_rates.get(name)
    reason = "no operating point" if rate is None else None if known.any() else "no image was scored"
    return _compare_rate(name, flags[known] == 1, patients[known], rate, expected.flag_images.get(name), reason)


def _compare_quality(expected: Expected, name: str, flags: np.ndarray, patients: Patients) -> RateDrift:
    rate = expected.quality_rates.get(name)
    reason = None
    if rate is None:
        reason = (expected.quality_reason if name in quality.JUDGED else None) or "no rate is expected of it"
    return _compare_rate(name, flags == name, patients, rate, expected.quality_images, reason)


def _compare_rate(
    name: str, values: np.ndarray, patients: Patients, expected: float | None, images: int | None, reason: str | None
) -> RateDrift:
    """Compare the share of bool [n] with the expected share, unless there is a reason not to."""
    n, count = len(values), int(values.sum())
    observed = count / n if n else None
    effect = design_effect(values, patients.codes) if n else None
    low, high = wilson_interval(count / n, n / effect) if effect else (None, None)
    row = RateDrift(
        name=name,
        observed=observed,
        low=low,
        high=high,
        expected=None if expected is None else float(expected),
        expected_images=images,
        n=n,
        n_patients=patients.number,
        count=count,
        design_effect=effect,
        ratio=None if observed is None or not expected else observed / expected,
        difference=None if observed is None or expected is None else observed - expected,
        reason=reason or _explain_too_few(n, patients),
    )
    if row.reason is not None or observed is None or effect is None or expected is None:
        return row
    if not images and expected in (0.0, 1.0) and observed != expected:
        return replace(row, reason=f"{expected:.0%} is expected, but the bundle does not state of how many images")
    return replace(row, p=_find_p(row))


def _bound_difference(row: RateDrift, tail: float) -> tuple[float, float]:
    """Return the interval of observed - expected share; MOVER (Newcombe 1998; Zou and Donner 2008) of exact limits.

    The limits of each share are Clopper and Pearson's, for the effective number of images. The expected share is exact
    if its number of images is unknown.
    """
    assert row.observed is not None
    assert row.expected is not None
    assert row.design_effect is not None
    low, high = _bound_share(row.observed, row.n / row.design_effect, tail)
    before_low, before_high = _bound_expected(row, tail)
    down, up = (row.observed - low, before_high - row.expected), (high - row.observed, row.expected - before_low)
    difference = row.observed - row.expected
    return difference - math.hypot(*down), difference + math.hypot(*up)


def _bound_expected(row: RateDrift, tail: float) -> tuple[float, float]:
    assert row.expected is not None
    assert row.design_effect is not None
    if not row.expected_images:
        return row.expected, row.expected
    return _bound_share(row.expected, row.expected_images / row.design_effect, tail)


def _find_tolerance(row: RateDrift, tail: float) -> float:
    """Return the largest difference that is as expected.

    `MARGIN` is at most the lower limit of the expected share, because an estimate of a rare share can be much too high.
    """
    assert row.expected is not None
    low, high = _bound_expected(row, tail)
    rarer, rarer_low = min(row.expected, 1.0 - row.expected), min(low, 1.0 - high)
    return max(TOLERANCE * rarer, min(MARGIN, (FOLD - 1.0) * rarer_low), LEAST_TOLERANCE)


def _bound_share(share: float, n: float, tail: float) -> tuple[float, float]:
    """Return Clopper and Pearson's limits of a share of n > 0 images; n can be a fraction."""
    count = min(max(share * n, 0.0), n)
    low = float(betaincinv(count, n - count + 1.0, tail)) if count > 0.0 else 0.0
    high = float(betaincinv(count + 1.0, n - count, 1.0 - tail)) if count < n else 1.0
    return min(low, share), max(high, share)


def _find_p(row: RateDrift) -> float:
    """Return the p that belongs to the interval: twice the smallest tail with which it excludes 0."""

    def excludes(tail: float) -> bool:
        low, high = _bound_difference(row, tail)
        return low > 0.0 or high < 0.0

    if not excludes(0.5):
        return 1.0
    low, high = 0.0, _MAX_DEVIATE
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if excludes(float(ndtr(-middle))) else (low, middle)
    return float(2.0 * ndtr(-low))


def _compare_scores(name: str, kept: ScoreQuantiles | None, scores: np.ndarray, patients: Patients) -> ScoreDrift:
    known = ~np.isnan(scores)
    scores, patients = scores[known].astype(np.float64), patients[known]
    n = len(scores)
    reason = f"the baseline has fewer than {MIN_IMAGES} scores of it" if kept is None else _explain_too_few(n, patients)
    row = ScoreDrift(name=name, n=n, n_patients=patients.number, reason=reason)
    if reason is not None or kept is None:
        return row
    edges, shares, images = np.asarray(kept["edges"]), np.asarray(kept["shares"]), int(kept["n"])
    classes = np.searchsorted(edges, scores, side="right")
    counts = np.bincount(classes, minlength=len(shares))
    used = (counts > 0) | (shares > 0)  # equal scores can leave a class empty
    classes = (np.cumsum(used) - 1)[classes]
    # Half an image more in each class, so that empty classes have a logarithm.
    smooth = (numbers[used] + _SMOOTHING for numbers in (counts, shares * images))
    observed, before = (numbers / numbers.sum() for numbers in smooth)
    psi = float(np.sum((observed - before) * np.log(observed / before)))
    scale, freedom, scale_found = _find_scales(observed, before, classes, images, patients.codes)
    return replace(
        row,
        psi=psi,
        shares=tuple(observed.tolist()),
        expected=tuple(before.tolist()),
        scale=scale,
        freedom=freedom,
        scale_found=scale_found,
        p=float(chdtrc(freedom, psi / scale)) if freedom else 1.0,
    )


def _find_scales(
    observed: np.ndarray, before: np.ndarray, classes: np.ndarray, images: int, codes: np.ndarray
) -> tuple[float, float, float]:
    """Return scale and freedom of the index without a difference, and the scale for the difference found.

    Without a difference: Rao and Scott's second-order correction (1984), which matches mean and variance of the index
    with Satterthwaite's approximation. With a difference: the linearised variance of the index, relative to four times
    the index. It is more than the mean effect of the classes if patients differ in the direction of this difference.
    """
    n, chance = len(classes), 1.0 / len(classes) + 1.0 / images
    effects, directions = _find_effects(observed, classes, codes)
    between = effects[1:]  # the first is that of the sum of shares, which is 1
    if not len(between):
        return chance, 0.0, chance
    scale = chance * float((between**2).sum() / between.sum())
    freedom = float(between.sum() ** 2 / (between**2).sum())
    variance, psi = 0.0, 0.0
    for share, other, number in ((observed, before, n), (before, observed, images)):
        slope = np.log(share / other) + 1.0 - other / share
        along = directions.T @ (np.sqrt(share) * (slope - (share * slope).sum()))
        variance += float((effects * along**2).sum()) / number
        psi += float((share * np.log(share / other)).sum())
    return scale, freedom, max(scale, variance / (4.0 * psi) if psi > 0.0 else 0.0)


def _find_effects(shares: np.ndarray, classes: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the generalised design effects of shares [k], at least 1, and their directions [k,k] as columns.

    They are eigenvalues of the covariance of the shares relative to independent images (Rao and Scott 1981). The first
    belongs to the sum of the shares. Where a class has none or all of the images, see `design_effect`.
    """
    n, number = len(classes), len(shares)
    _, rows, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    counts = np.bincount(rows * number + classes, minlength=len(sizes) * number).reshape(-1, number)
    residuals = counts - sizes[:, None] * (counts.sum(axis=0) / n)
    covariance = residuals.T @ residuals * (len(sizes) / max(1, len(sizes) - 1) / n)
    if len(sizes) < 2:
        covariance[:] = 0.0
    relative = covariance / np.sqrt(np.outer(shares, shares))
    same = np.diag(relative) == 0.0
    relative[same, same] = float((sizes.astype(np.float64) ** 2).sum() / n)
    sums = np.eye(number) - np.sqrt(np.outer(shares, shares))
    effects, directions = np.linalg.eigh(sums @ relative @ sums)
    return np.maximum(effects, 1.0), directions


def _explain_too_few(n: int, patients: Patients) -> str | None:
    if n < MIN_IMAGES:
        return f"{count_of(n, 'image')}; {MIN_IMAGES} are needed"
    if patients.units < MIN_PATIENTS:
        return f"fewer than {MIN_PATIENTS} patients"
    return None


def _judge(is_within: bool, excludes_zero: bool, is_large: bool) -> str:
    """Return the verdict for an interval that lies within the tolerated range, or excludes 0."""
    if is_within:
        return OK
    return (LARGE if is_large else DIFFERS) if excludes_zero else INCONCLUSIVE


def _adjust(rows: list[_AnyDrift], *, questions: int) -> tuple[_AnyDrift, ...]:
    """Set p_adjusted, interval and verdict of the rows that have a p."""
    number = questions * sum(row.p is not None for row in rows)
    for i, row in enumerate(rows):
        if row.p is not None:
            adjusted, level = min(1.0, number * row.p), 1.0 - LEVEL / number
            rows[i] = replace(row, p_adjusted=adjusted, interval_level=level).decide(LEVEL / number / 2.0)
    return tuple(rows)


def _list(names: Sequence[str], total: int) -> str:
    if len(names) == total > 1:
        return f"all {total}"
    shown = ", ".join(name.replace("_", " ") for name in names)
    return f"{shown} ({len(names)} of {total})" if len(names) <= _LISTED else f"{len(names)} of {total}"


def _as_dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
