"""Age, sex and view in the spellings of tables and of DICOM."""

from __future__ import annotations

import pytest

from ray_cxr.imaging import demographics

AGES = {"058Y": 58.0, "58": 58.0, " 7y ": 7.0, "58.5": 58.5, "006M": 0.5, "026W": 26 * 7 / 365.25, "010d": 10 / 365.25}


def test_ages_are_in_years() -> None:
    assert {text: demographics.parse_age(text) for text in AGES} == pytest.approx(AGES, abs=1e-12)
    assert demographics.parse_age("000D") == 0.0
    for text in ("", "Y", "-3", "58YY", "58X", "5 8", "about 50", "nan"):
        assert demographics.parse_age(text) is None


def test_sex_and_view() -> None:
    assert [demographics.parse_sex(text) for text in ("M", "female", " f ", "O", "")] == ["M", "F", "F", None, None]
    views = [demographics.parse_view(text) for text in ("pa", "AP ", "LL", "Lateral", "RAO", " ")]
    assert views == ["PA", "AP", "LATERAL", "LATERAL", "RAO", None]
