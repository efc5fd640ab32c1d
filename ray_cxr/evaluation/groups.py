"""Groups of images by sex, age, view and follow-up, and by pairs of these attributes.

sex        F, M, unknown
age_band   0-17, 18-39, 40-59, 60-79, 80+ (completed years), unknown
view       PA, AP and any other view of `imaging.views`, unknown
follow_up  first image (number 0), later image (above 0), unknown
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np

from ray_cxr.imaging.demographics import MAX_AGE_YEARS, PatientCount, parse_sex
from ray_cxr.imaging.views import parse_view

UNKNOWN = "unknown"
#: Lower limits of the age bands in years, and their names.
AGE_LIMITS = (0, 18, 40, 60, 80)
AGE_BANDS = (*(f"{low}-{high - 1}" for low, high in pairwise(AGE_LIMITS)), f"{AGE_LIMITS[-1]}+")
FIRST, LATER = "first image", "later image"
#: Joins the attributes of a crossing, and their values.
AND = " & "


@dataclass(frozen=True, eq=False)
class Group:
    """Images that share an attribute's value, e.g. `sex` and `F`, or for a crossing `sex & view` and `F & PA`."""

    attribute: str
    value: str
    mask: np.ndarray
    crossing: bool = False

    @property
    def is_known(self) -> bool:
        """Whether the attribute is recorded for these images."""
        return self.value != UNKNOWN


def build_groups(
    sex: np.ndarray, age: np.ndarray, view: np.ndarray, follow_up: np.ndarray, *, crossings: bool = True
) -> list[Group]:
    """Return the groups of images that are not empty: attribute by attribute, `unknown` last, then the crossings.

    Args:
        sex, view: objects [n], in any spelling of `parse_sex` and `parse_view`; other values count as unknown.
        age: floats [n], years; NaN, None, negative values and values above `MAX_AGE_YEARS` count as unknown.
        follow_up: numbers [n], 0 for a patient's first image; NaN, None and negative values count as unknown.
        crossings: add the pairs of attributes, for images with both known. An attribute with a single known value is
            not crossed, because that would repeat existing groups.
    """
    number = _to_floats(follow_up)
    values = {
        "sex": _parse_texts(sex, parse_sex),
        "age_band": _assign_age_bands(_to_years(age)),
        "view": _parse_texts(view, parse_view),
        "follow_up": np.select([number == 0, number > 0], [FIRST, LATER], UNKNOWN).astype(object),
    }
    if len({len(column) for column in values.values()}) != 1:
        raise ValueError(f"columns are of {', '.join(str(len(column)) for column in values.values())} images")
    single = [
        [Group(attribute, value, column == value) for value in _sorted_values(attribute, column)]
        for attribute, column in values.items()
    ]
    groups = [group for part in single for group in part]
    if crossings:
        known = ([group for group in part if group.is_known] for part in single)
        for first, second in combinations([part for part in known if len(part) > 1], 2):
            groups += _cross(first, second)
    return groups


def describe_population(
    sex: np.ndarray, age: np.ndarray, view: np.ndarray, follow_up: np.ndarray, patients: np.ndarray
) -> dict[str, Any]:
    """Count images and patients, and images per group, as plain numbers for a model card.

    The entry `age` has median, q1 and q3 in years over images, None if no age is known.
    """
    years = _to_years(age)
    years = years[~np.isnan(years)]
    quartiles = np.quantile(years, [0.25, 0.5, 0.75]).tolist() if years.size else [None] * 3
    counts: dict[str, Any] = {"images": len(patients), **PatientCount.of(patients).to_json()}
    for group in build_groups(sex, age, view, follow_up, crossings=False):
        counts.setdefault(group.attribute, {})[group.value] = int(group.mask.sum())
    counts["age"] = dict(zip(("q1", "median", "q3"), quartiles, strict=True))
    return counts


def _cross(first: Sequence[Group], second: Sequence[Group]) -> Iterator[Group]:
    for a, b in product(first, second):
        mask = a.mask & b.mask
        if mask.any():
            yield Group(f"{a.attribute}{AND}{b.attribute}", f"{a.value}{AND}{b.value}", mask, crossing=True)


def _sorted_values(attribute: str, column: np.ndarray) -> list[str]:
    """Return the values present: age bands ascending, first before later, others sorted; `unknown` last."""
    present = set(column.tolist())
    known = {"age_band": AGE_BANDS, "follow_up": (FIRST, LATER)}.get(attribute, sorted(present - {UNKNOWN}))
    return [value for value in (*known, UNKNOWN) if value in present]


def _parse_texts(values: np.ndarray, parse: Callable[[str], str | None]) -> np.ndarray:
    """Return one spelling of each value: a Parquet manifest of other software can spell it in another way."""
    texts = [(parse(value) if isinstance(value, str) else None) or UNKNOWN for value in values]
    return np.array(texts, dtype=object)


def _to_floats(values: np.ndarray) -> np.ndarray:
    """Convert numbers, None, NaN and pandas' NA to float64 with NaN."""
    array = np.asarray(values)
    if array.dtype != object:
        return array.astype(np.float64)
    kinds = (int, float, np.integer, np.floating)
    return np.array([float(value) if isinstance(value, kinds) else np.nan for value in array], dtype=np.float64)


def _to_years(age: np.ndarray) -> np.ndarray:
    years = _to_floats(age)
    return np.where((years >= 0) & (years <= MAX_AGE_YEARS), years, np.nan)


def _assign_age_bands(age: np.ndarray) -> np.ndarray:
    names = np.array([UNKNOWN, *AGE_BANDS], dtype=object)
    bands = np.searchsorted(AGE_LIMITS, age, side="right")
    return np.asarray(names[np.where(np.isnan(age), 0, bands)])
