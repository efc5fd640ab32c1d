"""The rows that a search of a PACS becomes: what is a radiograph, what the listing says about it, and their order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from ray_cxr.data import dicomweb_listing
from ray_cxr.data.dicomweb_listing import list_radiographs
from ray_cxr.data.manifest import listing_notes
from ray_cxr.errors import InputError
from ray_cxr.storage import dicomweb

ADDRESS = "dicomweb+https://pacs.example/dicom-web?StudyDate=20260101-20260131&PatientID=SECRET"
CR, DX, SR = "1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1", "1.2.840.10008.5.1.4.1.1.88.11"
PR, CAPTURE, RAW = "1.2.840.10008.5.1.4.1.1.11.1", "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.1.1.1"
TAGS = {
    "SOPClassUID": "00080016", "SOPInstanceUID": "00080018", "StudyDate": "00080020", "Modality": "00080060",
    "SeriesDescription": "0008103E", "ViewCodeSequence": "00540220", "PatientID": "00100020",
    "PatientBirthDate": "00100030", "PatientSex": "00100040", "PatientAge": "00101010", "ViewPosition": "00185101",
    "StudyInstanceUID": "0020000D", "SeriesInstanceUID": "0020000E", "InstanceNumber": "00200013",
    "PatientOrientation": "00200020",
}  # fmt: skip


def answer(instance: str, study: str = "1.2", series: str = "1.2.1", **values: Any) -> dict[str, Any]:
    """Return an instance in the DICOM JSON model; a value of None leaves the element out."""
    known = {"SOPClassUID": DX, "Modality": "DX", "SOPInstanceUID": instance}
    known |= {"StudyInstanceUID": study, "SeriesInstanceUID": series, **values}
    lists = {name: value if isinstance(value, list) else [value] for name, value in known.items() if value is not None}
    return {TAGS[name]: {"vr": "UN", "Value": value} for name, value in lists.items()}


@pytest.fixture
def list_answers(monkeypatch: pytest.MonkeyPatch):
    def run(answers: Iterable[dict[str, Any]], **options: Any) -> Any:
        monkeypatch.setattr(dicomweb, "search", lambda address, gaps: iter(answers))
        return list_radiographs(ADDRESS, **options)

    return run


def test_columns_follow_the_rules_of_headers(list_answers: Any) -> None:
    table = list_answers(
        [
            answer("1.1", PatientID=" P-1 ", PatientAge="006M", PatientSex="F", ViewPosition="PA"),
            answer("1.2", PatientBirthDate="19700301", StudyDate="20260228", SeriesDescription="W Chest Lat."),
            answer("1.3", PatientAge="999Y", PatientSex="O", PatientOrientation=["A", "F"]),
            answer("1.4", ViewCodeSequence=[{"00080100": {"vr": "SH", "Value": ["399348003"]}}]),
        ]
    )
    assert table["image_id"].to_pylist() == ["1.1", "1.2", "1.3", "1.4"]
    assert table["patient_id"].to_pylist() == ["P-1", None, None, None]
    assert table["study_id"].to_pylist() == ["1.2"] * 4
    assert table["age"].to_pylist() == [0.5, 55.0, None, None]
    assert table["sex"].to_pylist() == ["F", None, None, None]
    assert table["view"].to_pylist() == ["PA", "LATERAL", "LATERAL", "AP"]
    assert table["path"][0].as_py() == "dicomweb+https://pacs.example/dicom-web/studies/1.2/series/1.2.1/instances/1.1"
    assert table["split"].null_count == table["Mass"].null_count == 4


@pytest.mark.parametrize(
    "values",
    [
        {"PatientAge": [], "PatientID": None},
        {"PatientAge": {"Alphabetic": "x"}, "PatientID": [{"Alphabetic": "x"}], "InstanceNumber": "nan"},
        {"PatientAge": [["040Y"]], "ViewPosition": [None], "InstanceNumber": "9" * 5000, "ViewCodeSequence": ["AP"]},
        {"PatientAge": 7.5e300, "PatientSex": 1, "ViewPosition": True, "InstanceNumber": [[]], "PatientID": ""},
    ],
)
def test_values_of_another_form_are_unknown(list_answers: Any, values: dict[str, Any]) -> None:
    row = list_answers([answer("1.1", **values)]).to_pylist()[0]
    assert [row[name] for name in ("patient_id", "age", "sex", "view")] == [None] * 4


@pytest.mark.parametrize(
    ("sop_class", "modality", "kind"),
    [
        (DX, "DX", None),
        (CR, "CR", None),
        (CR, None, None),
        (None, "DX", None),
        (None, None, None),
        (SR, "SR", "SR"),
        (PR, "PR", "PR"),
        (PR, "DX", "Grayscale Softcopy Presentation State Storage"),
        (None, "KO", "KO"),
        (CAPTURE, "OT", "Secondary Capture"),
        (CAPTURE + ".2", "CR", "Secondary Capture"),
        (None, "SC", "of unknown kind"),
        (RAW, "DX", "DX for processing"),
        (DX, "CT", "CT"),
        ("1.2.3.4", "Doe^Jane", "of unknown kind"),
    ],
)
def test_only_radiographs_become_rows(list_answers: Any, sop_class: str, modality: str, kind: str | None) -> None:
    table = list_answers([answer("1.1"), answer("1.2", SOPClassUID=sop_class, Modality=modality)])
    assert table["image_id"].to_pylist() == (["1.1"] if kind else ["1.1", "1.2"])
    assert any(f"1 {kind}" in note for note in listing_notes(table)) == (kind is not None)


def test_secondary_captures_are_listed_if_wanted(list_answers: Any) -> None:
    answers = [answer("1.1"), answer("1.2", SOPClassUID=CAPTURE, Modality="CR"), answer("1.3", SOPClassUID=SR)]
    assert list_answers(answers, captures=True)["image_id"].to_pylist() == ["1.1", "1.2"]


def test_rows_are_sorted_by_study_series_and_number(list_answers: Any) -> None:
    answers = [
        answer("5", study="2", InstanceNumber="1"),
        answer("4", study="1", series="9", InstanceNumber=None),
        answer("3", study="1", series="9", InstanceNumber="10"),
        answer("2", study="1", series="9", InstanceNumber=2),
        answer("1", study="1", series="8", InstanceNumber="7"),
    ]
    assert list_answers(answers)["image_id"].to_pylist() == ["1", "2", "3", "4", "5"]
    assert list_answers(answers[::-1]).equals(list_answers(answers))


def test_images_with_one_uid_have_different_ids(list_answers: Any) -> None:
    answers = [answer("1.1"), answer("1.1", series="1.2.2"), answer("1.1", study="1.3"), answer("1.4")]
    table = list_answers(answers)
    assert sorted(table["image_id"].to_pylist()) == ["1.2/1.2.1/1.1", "1.2/1.2.2/1.1", "1.3/1.2.1/1.1", "1.4"]
    assert any("3 images" in note for note in listing_notes(table))


def test_a_limit_ends_the_search(list_answers: Any) -> None:
    sent = []

    def send() -> Any:
        for number in range(100):
            sent.append(number)
            yield answer(f"1.{number}", **({"SOPClassUID": SR, "Modality": "SR"} if number % 2 else {}))

    assert len(list_answers(send(), limit=3)) == 3
    assert len(sent) == 5


def test_more_rows_than_a_batch_keep_their_order(list_answers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicomweb_listing, "_BATCH_ROWS", 3)
    table = list_answers(answer(f"1.{number}") for number in (7, 2, 5, 1, 6, 3, 4))
    assert table["image_id"].to_pylist() == [f"1.{number}" for number in range(1, 8)]


def test_pseudonyms_replace_ids(list_answers: Any) -> None:
    answers = [answer("1.1", PatientID="P-1"), answer("1.2")]
    table = list_answers(answers, replace_id=lambda text: f"hidden {len(text)}")
    assert table["patient_id"].to_pylist() == ["hidden 3", None]
    assert table["study_id"].to_pylist() == ["hidden 3", "hidden 3"]


def test_a_search_without_radiographs_is_an_error_that_counts_the_others(list_answers: Any) -> None:
    with pytest.raises(InputError, match=r"no radiographs \(left out: 2 SR\)") as caught:
        list_answers([answer(uid, SOPClassUID=SR, Modality="SR") for uid in ("1.1", "1.2")])
    assert "SECRET" not in str(caught.value)
    with pytest.raises(InputError, match="no radiographs;"):
        list_answers([])
