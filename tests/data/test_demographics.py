"""Age, sex and view in the spellings of tables and of DICOM."""

from __future__ import annotations

import pytest

from ray_cxr.data import demographics


@pytest.mark.parametrize(
    ("text", "years"),
    [("058Y", 58.0), ("58", 58.0), (" 7y ", 7.0), ("006M", 0.5), ("052W", 52 * 7 / 365.25), ("014D", 14 / 365.25)],
)
def test_age(text: str, years: float) -> None:
    assert demographics.parse_age(text) == pytest.approx(years)


@pytest.mark.parametrize("text", ["", "Y", "about 50", "-5", "58X", "5 8"])
def test_age_that_cannot_be_read(text: str) -> None:
    assert demographics.parse_age(text) is None


def test_sex_and_view() -> None:
    assert [demographics.parse_sex(text) for text in ("M", "female", " f ", "O", "")] == ["M", "F", "F", None, None]
    views = [demographics.parse_view(text) for text in ("pa", "LL", "Lateral", "RAO", " ")]
    assert views == ["PA", "LATERAL", "LATERAL", "RAO", None]
