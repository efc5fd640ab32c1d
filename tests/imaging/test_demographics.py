"""Age, sex and view in the spellings of tables and of DICOM."""

from __future__ import annotations

import pytest

from ray_cxr.imaging import demographics, views

AGES = {"058Y": 58.0, "58": 58.0, " 7y ": 7.0, "58.5": 58.5, "006M": 0.5, "026W": 26 * 7 / 365.25, "010d": 10 / 365.25}
WORDS = {"58 years": 58.0, "1 year": 1.0, "61 Yrs": 61.0, "18 months": 1.5, "2 weeks": 14 / 365.25, "1 day": 1 / 365.25}

#: Views by spelling: DICOM's terms, the values of MIMIC-CXR, PadChest and CheXpert, and words of devices.
VIEWS = {
    "PA": "pa|P.A.|PA |POSTEROANTERIOR|postero-anterior|Posterior/Anterior|Thorax p.a.|CHEST,PA|Tórax PA",
    "AP": "AP|a.p.|A/P|ANTEROPOSTERIOR|AP_horizontal|AP SUPINE|CHEST (PORTABLE AP)|frontal AP",
    "FRONTAL": "Frontal|FRONTAL",
    "LATERAL": "LL|RL|L|l |LAT.|LLAT|RLAT|Lateral|XTABLE LATERAL|left lateral|W Chest Lat.|CHEST,LAT|Thorax seitlich",
    "OBLIQUE": "LLO|RLO|LAO|RAO|LPO|PA OBLIQUE|LATERAL OBLIQUE",
    "DECUBITUS": "LLD|RLD|PA LLD|AP RLD|LEFT LATERAL DECUBITUS",
    "AXIAL": "AP AXIAL|LORDOTIC",
}
NO_VIEWS = ("", " ", "-", "SWIMMERS", "L5 S1", "COSTAL", "EXCLUDE", "unknown", "PA/LAT", "PA and lateral", "AP/PA")
NO_VIEWS += ("bilateral", "Palermo", "CHEST L", "LA")


def test_ages_are_in_years() -> None:
    for ages in (AGES, WORDS):
        assert {text: demographics.parse_age(text) for text in ages} == pytest.approx(ages, abs=1e-12)
    assert demographics.parse_age("000D") == 0.0
    for text in ("", "Y", "-3", "58YY", "58X", "5 8", "about 50", "nan"):
        assert demographics.parse_age(text) is demographics.convert_age(text) is None


def test_impossible_ages_are_unknown() -> None:
    limits = ("120Y", "1440M")
    assert [demographics.parse_age(text) for text in limits] == [120.0, 120.0]
    absurd = {"121Y": 121.0, "999Y": 999.0, "411": 411.0, "1441M": 1441 / 12, "9999W": 9999 * 7 / 365.25}
    assert [demographics.parse_age(text) for text in absurd] == [None] * 5
    assert {text: demographics.convert_age(text) for text in absurd} == pytest.approx(absurd)


def test_ages_between_dates_are_completed_years_or_months() -> None:
    for birth, study, age in (
        ("19600501", "20200430", 59.0),
        ("19600501", "20200501", 60.0),
        ("1960.05.01", "2020-05-02", 60.0),
        ("20180115", "20200114", 23 / 12),
        ("20180115", "20200115", 2.0),
        ("20200101", "20200131", 0.0),
        ("19001231", "20201231", 120.0),
        ("18991231", "20201231", None),
        ("19000101", "20190101", None),
        ("20200102", "20200101", None),
        ("19600231", "20200101", None),
        ("1960", "20200101", None),
        ("", "20200101", None),
        ("19600501", "", None),
    ):
        assert demographics.compute_age(birth, study) == age


def test_counts_of_patients() -> None:
    for patients, number, without_id, text in (
        (["007", "7", "7"], 2, 0, "2 patients"),
        (["7", None], 1, 1, "1 patient (1 image without a patient id)"),
        (["007", None, float("nan")], 1, 2, "1 patient (2 images without a patient id)"),
        ([None, None], None, 2, "patients unknown"),
        ([], 0, 0, "0 patients"),
    ):
        count = demographics.PatientCount.of(patients)
        assert (count.number, count.without_id, str(count)) == (number, without_id, text)
        assert count.to_json() == {"patients": number, "images_without_patient": without_id}


def test_sexes() -> None:
    assert [demographics.parse_sex(text) for text in ("M", "female", " f ", "O", "")] == ["M", "F", "F", None, None]


def test_views() -> None:
    for view, texts in VIEWS.items():
        assert {text: views.parse_view(text) for text in texts.split("|")} == dict.fromkeys(texts.split("|"), view)
    assert {text: views.parse_view(text) for text in NO_VIEWS} == dict.fromkeys(NO_VIEWS)


def test_view_codes() -> None:
    codes = ("272479007", "R-10214", "R-40888", "399348003", "R-10206", "399033003", "R-10236", "399198007", "R-10220")
    expected = ["PA", "PA", "PA", "AP", "AP", "FRONTAL", "LATERAL", "LATERAL", "OBLIQUE"]
    assert [views.parse_view_code(code) for code in codes] == expected
    assert [views.parse_view_code(code) for code in ("", "R-102C3", "399335002", "PA")] == [None] * 4


def test_several_sources_of_a_view() -> None:
    for sources, view in (
        ((None, "LATERAL", "PA"), "LATERAL"),
        (("FRONTAL", None, "AP"), "AP"),
        (("FRONTAL", "LATERAL"), "FRONTAL"),
        (("PA", "FRONTAL"), "PA"),
        ((None, None), None),
        ((), None),
    ):
        assert views.choose_view(sources) == view
