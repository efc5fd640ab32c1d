"""Age and sex as tables and DICOM headers spell them, and counts of patients."""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection
from dataclasses import dataclass

#: Higher ages are typing errors, or codes for an unknown age: NIH's first table holds 411, headers hold `999Y`.
MAX_AGE_YEARS = 120.0
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([DWMY])(?:AY|EEK|ONTH|EAR|R)?S?)?")
_PER_YEAR = {"D": 365.25, "W": 365.25 / 7, "M": 12.0, "Y": 1.0, None: 1.0}
_SEXES = {"M": "M", "F": "F", "MALE": "M", "FEMALE": "F"}
#: Anonymisers write this date for an unknown one.
_NO_DATE = datetime.date(1900, 1, 1)


@dataclass(frozen=True)
class PatientCount:
    """Number of patients, or of studies, of some images: `number` without the images that have no id, whose number is
    `without_id`; None if no image has one.
    """

    number: int | None
    without_id: int = 0

    @classmethod
    def of(cls, patients: Collection[object]) -> PatientCount:
        """Count the patients of images by their ids; None and NaN are unknown."""
        known = [patient for patient in patients if patient is not None and patient == patient]
        return cls(len(set(known)) if known or not len(patients) else None, len(patients) - len(known))

    def to_json(self) -> dict[str, int | None]:
        """Return the entries of a bundle's provenance."""
        return {"patients": self.number, "images_without_patient": self.without_id}

    def describe(self, images: int) -> str:
        """Format the patients with their images: `540 images of 519 patients`, `120 images, patients unknown`."""
        return f"{count_of(images, 'image')}{', ' if self.number is None else ' of '}{self}"

    def __str__(self) -> str:
        return self.name("patient")

    def name(self, noun: str, rest: str = " ({})") -> str:
        """Format the number with a noun, such as `519 patients (3 images without a patient id)`.

        `rest` frames the images without an id.
        """
        if self.number is None:
            return f"{pluralize(noun)} unknown"
        without = rest.format(f"{count_of(self.without_id, 'image')} without a {noun} id") if self.without_id else ""
        return f"{count_of(self.number, noun)}{without}"


def count_of(number: int, noun: str) -> str:
    """Format a count with its noun: `1 patient`, `2,500 patients`, `3 studies`."""
    return f"{number:,} {noun if number == 1 else pluralize(noun)}"


def pluralize(noun: str) -> str:
    """Return the plural of a noun: `patients`, `studies`."""
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


def parse_age(text: str) -> float | None:
    """Return the age in years of `058Y`, `006M`, `002W`, `010D` (DICOM's Age String, PS3.5, 6.2), `58` or `58 years`;
    None if unreadable or above `MAX_AGE_YEARS`.
    """
    years = convert_age(text)
    return years if years is not None and years <= MAX_AGE_YEARS else None


def convert_age(text: str) -> float | None:
    """Return the age in years, also an impossible one; None if unreadable."""
    match = _AGE.fullmatch(text.strip().upper())
    return float(match[1]) / _PER_YEAR[match[2]] if match else None


def compute_age(birth: str, study: str) -> float | None:
    """Return the age in years between two dates (`YYYYMMDD`, `YYYY.MM.DD`), or None if unknown or impossible.

    As in an Age String, years are completed years, and below two years completed months: with the date of the study, an
    exact age would reveal the date of birth.
    """
    born, seen = _parse_date(birth), _parse_date(study)
    if born is None or seen is None or seen < born or born == _NO_DATE:
        return None
    months = 12 * (seen.year - born.year) + seen.month - born.month - (seen.day < born.day)
    years = float(months // 12) if months >= 24 else months / 12
    return years if years <= MAX_AGE_YEARS else None


def parse_sex(text: str) -> str | None:
    """Return `M`, `F`, or None for other text."""
    return _SEXES.get(text.strip().upper())


def _parse_date(text: str) -> datetime.date | None:
    match = re.fullmatch(r"(\d{4})[.-]?(\d{2})[.-]?(\d{2})", text.strip())
    try:
        return datetime.date(*map(int, match.groups())) if match else None
    except ValueError:
        return None
