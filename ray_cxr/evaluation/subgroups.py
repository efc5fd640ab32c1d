"""Is the model as good for women as for men, for the young as for the old? Groups, numbers, differences.

Groups come of four attributes, and of each two of them crossed:

    sex        F, M, unknown
    age_band   0-17, 18-39, 40-59, 60-79, 80+ (years completed), unknown
    view       PA, AP and whatever else the table names, unknown
    follow_up  first image (number 0), later image (above 0), unknown

Images belong to groups, patients may be in several of one attribute (they grow older, and are seen from two sides). So
a resample draws patients once for all groups, takes all images of each, and each group takes its own of those: a
difference between two groups is subtracted within each resample.

Small cells, those of fewer than `FEW_PATIENTS` patients with or without the finding, are marked and never left out:
their intervals are narrower than the truth. Every difference is told with how many were looked at, because one in
twenty intervals misses 0 where there is no difference at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from ray_cxr.evaluation import intervals, metrics

UNKNOWN = "unknown"
#: Lower limits of the age bands, years, and their names.
AGE_LIMITS = (0, 18, 40, 60, 80)
AGE_BANDS = (*(f"{low}-{high - 1}" for low, high in pairwise(AGE_LIMITS)), f"{AGE_LIMITS[-1]}+")
FIRST, LATER = "first image", "later image"
#: Between the names of two attributes that are crossed, and between their values.
AND = " & "
#: With fewer positive (or negative) patients than this the bootstrap's interval is too narrow to trust.
FEW_PATIENTS = 10
#: The share of intervals that miss the truth by chance.
_MISSES = 0.05
#: Labels of several groups that are resampled at a time, which bounds memory.
_CELLS = 8 << 20
_RATES_AT_A_TIME = 64


@dataclass(frozen=True, eq=False)
class Group:
    """Images that have something in common.

    Attributes:
        attribute: `sex`, or `sex & view` of a crossing.
        value: `F`, or `F & PA`.
        mask: bool [n].
        crossing: of two attributes.
    """

    attribute: str
    value: str
    mask: np.ndarray
    crossing: bool = False

    @property
    def known(self) -> bool:
        """Whether it is a group of people, and not of what nobody wrote down."""
        return self.value != UNKNOWN


@dataclass(frozen=True)
class Cell:
    """One finding in one group.

    Attributes:
        n, positives: images with a label and a score, and those of them that are positive.
        n_patients, positive_patients, negative_patients: whose those are; a patient may be both.
        auroc: with its patient-bootstrap interval `auroc_low`, `auroc_high`.
        sensitivity, specificity: at the operating point, with theirs.
        reason: why there is no AUROC.
        rates_reason: why sensitivity or specificity is not there.
        interval_reason: why there is an AUROC and no interval.
        small: fewer than `FEW_PATIENTS` positive or negative patients.
    """

    finding: str
    n: int
    n_patients: int
    positives: int
    positive_patients: int
    negative_patients: int
    auroc: float | None
    auroc_low: float | None
    auroc_high: float | None
    sensitivity: float | None
    sensitivity_low: float | None
    sensitivity_high: float | None
    specificity: float | None
    specificity_low: float | None
    specificity_high: float | None
    reason: str | None
    rates_reason: str | None
    interval_reason: str | None
    small: bool


@dataclass(frozen=True)
class Mean:
    """The mean of a quantity over findings, each counting once.

    Attributes:
        value, low, high: None where no finding has it; the interval leaves resamples out in which one of them has not.
        findings: over which.
        small: how many of those are small cells.
        undefined: resamples left out.
        reason: why there is no value, or no interval.
    """

    value: float | None
    low: float | None
    high: float | None
    findings: tuple[str, ...]
    small: int
    undefined: int
    reason: str | None


@dataclass(frozen=True)
class Means:
    """Of AUROC (the macro AUROC), of sensitivity and of specificity."""

    auroc: Mean
    sensitivity: Mean
    specificity: Mean


@dataclass(frozen=True)
class Measured:
    """One group.

    Attributes:
        attribute, value, crossing: as in `Group`.
        n, n_patients: its images, labelled or not, and their patients.
        own: means over the findings that this group defines. Groups that define other findings do not compare.
        shared: means over the findings that every group of the attribute defines, but for `unknown`: these compare.
        cells: one per finding.
        reference: the others of its attribute are compared with it: it has the most images.
        small: fewer than `FEW_PATIENTS` patients, or nothing but small cells.
    """

    attribute: str
    value: str
    crossing: bool
    n: int
    n_patients: int
    own: Means
    shared: Means
    cells: tuple[Cell, ...]
    reference: bool
    small: bool


@dataclass(frozen=True)
class Difference:
    """A group's value less that of the reference group of its attribute.

    A difference of -0.1 in sensitivity is underdiagnosis: of 100 images with the finding ten more are missed, so the
    false negative rate differs by +0.1.

    Attributes:
        finding: None for the mean over `findings`, those that every group of the attribute defines (`Measured.shared`).
        quantity: `auroc` or `sensitivity`.
        low, high: 95% percentiles of the difference over resamples of patients.
        reason: why there is none, or no interval.
        small: one of both is a small cell (of a mean: one of the groups is small).
    """

    attribute: str
    value: str
    reference: str
    crossing: bool
    finding: str | None
    quantity: str
    difference: float | None
    low: float | None
    high: float | None
    findings: tuple[str, ...]
    reason: str | None
    small: bool

    @property
    def excludes_zero(self) -> bool | None:
        """Whether the interval does not hold 0; None where there is no interval."""
        return None if self.low is None or self.high is None else self.low > 0.0 or self.high < 0.0


@dataclass(frozen=True)
class Comparisons:
    """How often groups were compared, and how often chance alone makes that look like something.

    Attributes:
        made: differences that have an interval, without those that have a small cell.
        exclude_zero: how many of them exclude 0.
        expected_by_chance: how many would, were there no difference anywhere.
        small: differences with a small cell, whose intervals are too narrow to count.
    """

    made: int
    exclude_zero: int
    expected_by_chance: float
    small: int

    @property
    def words(self) -> str:
        """The same in a sentence."""
        return (
            f"{self.exclude_zero:,} of {self.made:,} differences have an interval that excludes 0; were there no "
            f"difference anywhere, about {self.expected_by_chance:.0f} would, because one 95% interval in twenty does "
            f"({self.small:,} more have too few patients to count)"
        )


@dataclass(frozen=True)
class Subgroups:
    """All of it.

    Attributes:
        groups: in the order given.
        differences: each group against the reference of its attribute; `unknown` is compared with nothing.
        single, crossings: how many comparisons, of attributes and of crossings.
        n_resamples: of all intervals but the AUROC's of crossings, which have `n_resamples_crossings`.
    """

    groups: tuple[Measured, ...]
    differences: tuple[Difference, ...]
    single: Comparisons
    crossings: Comparisons
    n_resamples: int
    n_resamples_crossings: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json: `groups` and `differences` are lists of plain objects, `findings` of a group by name."""
        return {
            "groups": [_group_dict(group) for group in self.groups],
            "differences": [
                {**asdict(one), "findings": list(one.findings), "excludes_zero": one.excludes_zero}
                for one in self.differences
            ],
            "comparisons": {
                name: {**asdict(count), "words": count.words}
                for name, count in (("single", self.single), ("crossings", self.crossings))
            },
            "n_resamples": self.n_resamples,
            "n_resamples_crossings": self.n_resamples_crossings,
            "seed": self.seed,
            "few_patients": FEW_PATIENTS,
        }


def groups(
    sex: np.ndarray, age: np.ndarray, view: np.ndarray, follow_up: np.ndarray, *, crossings: bool = True
) -> list[Group]:
    """The groups that images fall into; see the module's docstring. None is empty.

    Args:
        sex, view: objects [n], text; anything else, None among it, is unknown.
        age: floats [n], years; NaN, None and what is below 0 is unknown.
        follow_up: numbers [n], 0 for a patient's first image; NaN, None and what is below 0 is unknown.
        crossings: also each two attributes crossed, images of which both are known; an attribute with one known value
            is not crossed: it would give the same groups again.

    Returns:
        Each attribute's groups one after another, `unknown` last, then those of the crossings.

    Raises:
        ValueError: lengths differ.
    """
    values = {
        "sex": _words(sex),
        "age_band": _banded(_numbers(age)),
        "view": _words(view),
        "follow_up": _first_or_later(_numbers(follow_up)),
    }
    if len({len(column) for column in values.values()}) != 1:
        raise ValueError(f"columns are of {', '.join(str(len(column)) for column in values.values())} images")
    single = [
        [Group(attribute, value, column == value) for value in _order(attribute, column)]
        for attribute, column in values.items()
    ]
    found = [group for part in single for group in part]
    known = [part for part in ([group for group in part if group.known] for part in single) if len(part) > 1]
    if crossings:
        found += [group for one, other in combinations(known, 2) for group in _crossed(one, other)]
    return found


def describe(
    sex: np.ndarray, age: np.ndarray, view: np.ndarray, follow_up: np.ndarray, patients: np.ndarray
) -> dict[str, Any]:
    """Who is in a set of images, as plain numbers: what a model card says of training and validation.

    Args:
        sex, age, view, follow_up: as `groups`.
        patients: ids [n]; see `intervals.patient_codes`.

    Returns:
        images and patients; per attribute of `groups` its values with how many images have them; and under `age`
        median, q1 and q3 in years (None where no age is known) over images.
    """
    years = _numbers(age)
    years = years[years >= 0]  # NaN fails it too
    quartiles = np.quantile(years, [0.25, 0.5, 0.75]).tolist() if years.size else [None] * 3
    counts: dict[str, Any] = {"images": len(patients), "patients": intervals.patient_codes(patients)[1]}
    for group in groups(sex, age, view, follow_up, crossings=False):
        counts.setdefault(group.attribute, {})[group.value] = int(group.mask.sum())
    counts["age"] = dict(zip(("q1", "median", "q3"), quartiles, strict=True))
    return counts


def measure(
    groups: Sequence[Group],
    labels: np.ndarray,
    scores: np.ndarray,
    flags: np.ndarray,
    patients: np.ndarray,
    findings: Sequence[str],
    *,
    n_resamples: int = 500,
    n_resamples_crossings: int = 200,
    seed: int = 0,
    macro: np.ndarray | None = None,
) -> Subgroups:
    """Every finding in every group, and every group against the largest of its attribute.

    Args:
        groups: from `groups`, or of one's own; those of one attribute next to each other.
        labels: [n,F], 1, 0, and NaN or a negative number where there is no label.
        scores: [n,F], NaN where there is no score.
        flags: int8 [n,F], 1 at or above the operating point, 0 below, -1 where there is none.
        patients: ids [n]; see `intervals.patient_codes`.
        findings: F names.
        n_resamples: of patients; also those of sensitivity and specificity in crossings.
        n_resamples_crossings: of the AUROC in crossings, which takes most of the time.
        seed: of the resamples.
        macro: bool [F], the findings that means count; default all.

    Raises:
        ValueError: shapes that do not fit, a label that is neither 0 nor 1, a number of resamples below 1.
    """
    labels, scores, flags = np.asarray(labels), np.asarray(scores), np.asarray(flags)
    n, width = len(labels), len(findings)
    if labels.shape != (n, width) or scores.shape != labels.shape or flags.shape != labels.shape or len(patients) != n:
        raise ValueError(
            f"labels {labels.shape}, scores {scores.shape}, flags {flags.shape} and {len(patients)} patients do not fit"
        )
    if any(group.mask.shape != (n,) for group in groups):
        raise ValueError(f"a group's mask is not of {n} images")
    if min(n_resamples, n_resamples_crossings) < 1:
        raise ValueError("the number of resamples must be at least 1")
    known = (labels >= 0) & ~np.isnan(scores.astype(np.float64))
    counted = np.ones(width, dtype=bool) if macro is None else np.asarray(macro, dtype=bool)
    codes, n_patients = intervals.patient_codes(patients)
    images = _Images(
        np.where(known, labels, -1).astype(np.int8), scores, flags, codes, n_patients, tuple(findings), counted
    )
    done: list[Measured] = []
    differences: list[Difference] = []
    for part in _by_attribute(groups):
        resamples = n_resamples_crossings if part[0].crossing else n_resamples
        measured, compared = _attribute(part, images, n_resamples, resamples, seed)
        done += measured
        differences += compared
    return Subgroups(
        groups=tuple(done),
        differences=tuple(differences),
        single=_compared(one for one in differences if not one.crossing),
        crossings=_compared(one for one in differences if one.crossing),
        n_resamples=n_resamples,
        n_resamples_crossings=n_resamples_crossings,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _Images:
    """What all groups are cut from: labels int8 [n,F] with -1 where not labelled or not scored, and the rest."""

    labels: np.ndarray
    scores: np.ndarray
    flags: np.ndarray
    codes: np.ndarray
    n_patients: int
    findings: tuple[str, ...]
    counted: np.ndarray

    def per_patient(self, values: np.ndarray) -> np.ndarray:
        """Sums of bool [n,K] over each patient's images, float32 [patients,K]: small whole numbers, so exact."""
        width = values.shape[1]
        rows, columns = np.nonzero(values)
        flat = np.bincount(self.codes[rows] * width + columns, minlength=self.n_patients * width)
        return flat.reshape(self.n_patients, width).astype(np.float32)


@dataclass(frozen=True, eq=False)
class _Values:
    """One quantity in one group: as it is [F], and in each resample [R,F]; NaN where undefined."""

    point: np.ndarray
    drawn: np.ndarray

    def mean(self, columns: np.ndarray) -> _Values:
        """The mean over columns bool [F], as [1] and [R,1]; NaN where one of them is."""
        if not columns.any():
            return _Values(np.full(1, np.nan), np.full((len(self.drawn), 1), np.nan))
        return _Values(self.point[columns].mean(keepdims=True), self.drawn[:, columns].mean(axis=1, keepdims=True))


def _attribute(
    part: Sequence[Group], images: _Images, n_rates: int, n_aurocs: int, seed: int
) -> tuple[list[Measured], list[Difference]]:
    """The groups of one attribute, which share their resamples."""
    aurocs = _aurocs(part, images, n_aurocs, seed)
    rates = _rates(part, images, n_rates, seed)
    cells = [_cells(group, images, auroc, *rate) for group, auroc, rate in zip(part, aurocs, rates, strict=True)]
    values = [
        {"auroc": auroc, "sensitivity": rate[0], "specificity": rate[1]}
        for auroc, rate in zip(aurocs, rates, strict=True)
    ]
    compared = [i for i, group in enumerate(part) if group.known]
    everywhere = {
        name: np.logical_and.reduce([~np.isnan(values[i][name].point) for i in compared] or [~images.counted])
        for name in ("auroc", "sensitivity", "specificity")
    }
    largest = max(compared, key=lambda i: int(part[i].mask.sum()), default=None)
    measured = []
    for i, group in enumerate(part):
        n_patients = len(np.unique(images.codes[group.mask]))
        measured.append(
            Measured(
                attribute=group.attribute,
                value=group.value,
                crossing=group.crossing,
                n=int(group.mask.sum()),
                n_patients=n_patients,
                own=_means(values[i], cells[i], images),
                shared=_means(values[i], cells[i], images, everywhere),
                cells=tuple(cells[i]),
                reference=i == largest,
                small=n_patients < FEW_PATIENTS or all(cell.small for cell in cells[i]),
            )
        )
    differences: list[Difference] = []
    if largest is not None:
        for i in compared:
            if i != largest:
                differences += _differences(
                    measured[i], measured[largest], values[i], values[largest], images, everywhere
                )
    return measured, differences


def _aurocs(part: Sequence[Group], images: _Images, n_resamples: int, seed: int) -> list[_Values]:
    """AUROC of every finding in each group; all groups share their resamples."""
    n, width = images.labels.shape
    at_a_time = max(1, _CELLS // max(1, n * width))
    found: list[_Values] = []
    for start in range(0, len(part), at_a_time):
        some = part[start : start + at_a_time]
        # The same patients, number and seed give the same draws, whatever the columns.
        drawn = intervals.resampled_aurocs(
            np.hstack([np.where(group.mask[:, None], images.labels, -1) for group in some]),
            np.tile(images.scores, (1, len(some))),
            images.codes,
            n_resamples,
            seed,
        ).values
        for k, group in enumerate(some):
            point = np.full(width, np.nan)
            for j in range(width):
                rows = group.mask & (images.labels[:, j] >= 0)
                value = metrics.auroc(images.labels[rows, j], images.scores[rows, j])
                point[j] = np.nan if value is None else value
            found.append(_Values(point, drawn[:, k * width : (k + 1) * width]))
    return found


def _rates(part: Sequence[Group], images: _Images, n_resamples: int, seed: int) -> list[tuple[_Values, _Values]]:
    """Sensitivity and specificity of every finding in each group; all groups share their resamples."""
    width = len(images.findings)
    judged = (images.labels >= 0) & (images.flags >= 0)
    positive, flagged = images.labels == 1, images.flags == 1
    sums = []
    for group in part:
        here = judged & group.mask[:, None]
        found = [here & positive & flagged, here & positive, here & ~positive & ~flagged, here & ~positive]
        sums.append(images.per_patient(np.hstack(found)))
    together = np.hstack(sums)
    totals = [_ratios(one.sum(axis=0, dtype=np.float64)[None], width) for one in sums]
    drawn = [np.empty((2, n_resamples, width)) for _ in part]
    for rows, counts in _draws(images.n_patients, n_resamples, seed):
        products = counts @ together
        for k in range(len(part)):
            drawn[k][:, rows] = _ratios(products[:, 4 * width * k : 4 * width * (k + 1)], width)
    return [
        (_Values(point[0, 0], values[0]), _Values(point[1, 0], values[1]))
        for point, values in zip(totals, drawn, strict=True)
    ]


def _ratios(counts: np.ndarray, width: int) -> np.ndarray:
    """Sensitivity and specificity float64 [2,R,F] of counts [R,4F], as `_rates` puts them side by side."""
    hits, positives, rests, negatives = (counts[:, k * width : (k + 1) * width].astype(np.float64) for k in range(4))
    result = np.full((2, len(counts), width), np.nan)
    np.divide(hits, positives, out=result[0], where=positives > 0)
    np.divide(rests, negatives, out=result[1], where=negatives > 0)
    return result


def _draws(n_patients: int, n_resamples: int, seed: int) -> Iterator[tuple[slice, np.ndarray]]:
    """How often each patient was drawn, float32 [b,patients], for some of the resamples at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, n_resamples, _RATES_AT_A_TIME):
        size = min(_RATES_AT_A_TIME, n_resamples - start)
        counts = np.empty((size, n_patients), dtype=np.float32)
        for row in counts:
            row[:] = np.bincount(rng.integers(0, n_patients, n_patients), minlength=n_patients)
        yield slice(start, start + size), counts


def _cells(group: Group, images: _Images, auroc: _Values, sensitivity: _Values, specificity: _Values) -> list[Cell]:
    here = images.labels[group.mask]
    people = images.codes[group.mask]
    judged = images.flags[group.mask] >= 0
    cells = []
    for j, finding in enumerate(images.findings):
        known, positive = here[:, j] >= 0, here[:, j] == 1
        sick, well = (len(np.unique(people[rows])) for rows in (positive, known & ~positive))
        reason = metrics.undefined_reason(here[known, j])
        bounds = intervals.percentile_interval(auroc.drawn[:, j])
        se, sp = (intervals.percentile_interval(one.drawn[:, j]) for one in (sensitivity, specificity))
        cells.append(
            Cell(
                finding=finding,
                n=int(known.sum()),
                n_patients=len(np.unique(people[known])),
                positives=int(positive.sum()),
                positive_patients=sick,
                negative_patients=well,
                auroc=_number(auroc.point[j]),
                auroc_low=bounds.low,
                auroc_high=bounds.high,
                sensitivity=_number(sensitivity.point[j]),
                sensitivity_low=se.low,
                sensitivity_high=se.high,
                specificity=_number(specificity.point[j]),
                specificity_low=sp.low,
                specificity_high=sp.high,
                reason=reason,
                rates_reason=_rates_reason(known & judged[:, j], positive, images.flags[:, j]),
                interval_reason=bounds.reason if reason is None else None,
                small=min(sick, well) < FEW_PATIENTS,
            )
        )
    return cells


def _rates_reason(judged: np.ndarray, positive: np.ndarray, flags: np.ndarray) -> str | None:
    if not (flags >= 0).any():
        return "no operating point"
    return metrics.undefined_reason(positive[judged])


def _means(
    values: Mapping[str, _Values],
    cells: Sequence[Cell],
    images: _Images,
    among: Mapping[str, np.ndarray] | None = None,
) -> Means:
    """Means over the findings that a group defines, or over some of them."""
    found = {}
    for name, value in values.items():
        columns = images.counted & (~np.isnan(value.point) if among is None else among[name])
        mean = value.mean(columns)
        point = _number(mean.point[0])
        names = _named(images, columns)
        if point is None:
            reason = f"no finding has {name} defined in all groups"
            if among is None or names:
                reason = (
                    f"not every one of {len(names)} findings has {name} here" if names else f"no finding has {name}"
                )
            found[name] = Mean(None, None, None, (), 0, len(mean.drawn), reason)
            continue
        interval = intervals.percentile_interval(mean.drawn[:, 0])
        small = sum(cell.small for cell, one in zip(cells, columns, strict=True) if one)
        found[name] = Mean(point, interval.low, interval.high, names, small, interval.undefined, interval.reason)
    return Means(**found)


def _differences(
    one: Measured,
    reference: Measured,
    a: Mapping[str, _Values],
    b: Mapping[str, _Values],
    images: _Images,
    everywhere: Mapping[str, np.ndarray],
) -> Iterator[Difference]:
    """Of AUROC and of sensitivity, first of their means over what all groups define, then of each finding."""
    for quantity in ("auroc", "sensitivity"):
        columns = everywhere[quantity] & images.counted
        plain = Difference(
            attribute=one.attribute,
            value=one.value,
            reference=reference.value,
            crossing=one.crossing,
            finding=None,
            quantity=quantity,
            difference=None,
            low=None,
            high=None,
            findings=_named(images, columns),
            reason=None,
            small=one.small or reference.small,
        )
        yield _subtracted(plain, a[quantity].mean(columns), b[quantity].mean(columns), 0)
        for j, finding in enumerate(images.findings):
            cells = (one.cells[j], reference.cells[j])
            # Sensitivity has nothing to do with those without the finding.
            few = any(
                (cell.positive_patients < FEW_PATIENTS) if quantity == "sensitivity" else cell.small for cell in cells
            )
            plain = replace(plain, finding=finding, findings=(finding,), small=few)
            yield _subtracted(plain, a[quantity], b[quantity], j)


def _subtracted(plain: Difference, a: _Values, b: _Values, j: int) -> Difference:
    difference = _number(a.point[j] - b.point[j])
    if difference is None:
        who = [name for name, value in ((plain.value, a), (plain.reference, b)) if np.isnan(value.point[j])]
        return replace(plain, reason=f"no {plain.quantity} in {' nor in '.join(who)}")
    interval = intervals.percentile_interval(a.drawn[:, j] - b.drawn[:, j])
    return replace(plain, difference=difference, low=interval.low, high=interval.high, reason=interval.reason)


def _compared(differences: Iterable[Difference]) -> Comparisons:
    found = list(differences)
    judged = [one.excludes_zero for one in found if one.excludes_zero is not None and not one.small]
    return Comparisons(len(judged), sum(judged), _MISSES * len(judged), sum(one.small for one in found))


def _by_attribute(groups: Sequence[Group]) -> list[list[Group]]:
    parts: dict[str, list[Group]] = {}
    for group in groups:
        parts.setdefault(group.attribute, []).append(group)
    return list(parts.values())


def _crossed(one: Sequence[Group], other: Sequence[Group]) -> Iterator[Group]:
    for a in one:
        for b in other:
            mask = a.mask & b.mask
            if mask.any():
                yield Group(f"{a.attribute}{AND}{b.attribute}", f"{a.value}{AND}{b.value}", mask, crossing=True)


def _order(attribute: str, column: np.ndarray) -> list[str]:
    """The values that there are: bands by age, first before later, other words by alphabet; `unknown` last."""
    there = set(column.tolist())
    known = {"age_band": AGE_BANDS, "follow_up": (FIRST, LATER)}.get(attribute, sorted(there - {UNKNOWN}))
    return [value for value in (*known, UNKNOWN) if value in there]


def _words(values: np.ndarray) -> np.ndarray:
    # An own name `unknown` would be taken for a group of people otherwise, so blanks go the same way.
    found = [value.strip() if isinstance(value, str) and value.strip() else UNKNOWN for value in values]
    return np.array(found, dtype=object)


def _numbers(values: np.ndarray) -> np.ndarray:
    """Numbers and None, NaN or pandas' NA as float64 with NaN."""
    array = np.asarray(values)
    if array.dtype != object:
        return array.astype(np.float64)
    kinds = (int, float, np.integer, np.floating)
    return np.array([float(value) if isinstance(value, kinds) else np.nan for value in array], dtype=np.float64)


def _banded(age: np.ndarray) -> np.ndarray:
    names = np.array([UNKNOWN, *AGE_BANDS], dtype=object)
    place = np.searchsorted(AGE_LIMITS, age, side="right")
    return np.asarray(names[np.where(np.isnan(age), 0, place)])


def _first_or_later(follow_up: np.ndarray) -> np.ndarray:
    found = np.full(len(follow_up), UNKNOWN, dtype=object)
    found[follow_up == 0] = FIRST
    found[follow_up > 0] = LATER
    return found


def _named(images: _Images, columns: np.ndarray) -> tuple[str, ...]:
    return tuple(name for name, one in zip(images.findings, columns, strict=True) if one)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _group_dict(group: Measured) -> dict[str, Any]:
    plain = asdict(group)
    plain["findings"] = {cell.pop("finding"): cell for cell in plain.pop("cells")}
    for means in (plain["own"], plain["shared"]):
        for mean in means.values():
            mean["findings"] = list(mean["findings"])
    return plain
