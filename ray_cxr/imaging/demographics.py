"""Age, sex and view as tables and DICOM tags spell them."""

from __future__ import annotations

import re

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([DWMY]?)")
_PER_YEAR = {"D": 365.25, "W": 365.25 / 7, "M": 12.0, "Y": 1.0, "": 1.0}
_SEXES = {"M": "M", "F": "F", "MALE": "M", "FEMALE": "F"}
_LATERAL = frozenset({"LL", "RL", "LAT", "LATERAL"})


def parse_age(text: str) -> float | None:
    """Return the age in years of `058Y`, `006M`, `002W`, `010D` (DICOM's Age String) or `58`; None if unreadable."""
    match = _AGE.fullmatch(text.strip().upper())
    return float(match[1]) / _PER_YEAR[match[2]] if match else None


def parse_sex(text: str) -> str | None:
    """Return `M`, `F`, or None for other text."""
    return _SEXES.get(text.strip().upper())


def parse_view(text: str) -> str | None:
    """Return `PA`, `AP`, `LATERAL` (also for LL, RL, LAT), other text in upper case, or None for a blank."""
    word = text.strip().upper()
    return "LATERAL" if word in _LATERAL else word or None
