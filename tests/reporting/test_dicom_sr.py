"""Structured reports, from outside: scores and DICOM files in, documents out, read back by others than their writer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
from conftest import make_tiny_bundle
from highdicom import sr
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from ray_cxr.data.dicom import read_tags
from ray_cxr.labels import FINDINGS, LABELS
from ray_cxr.models import predictions
from ray_cxr.models.bundle import Bundle
from ray_cxr.reporting import dicom_sr

Command = Callable[..., tuple[int, str, str]]

NAME, PATIENT_ID, BIRTH, ACCESSION = "Zweistein", "PAT-4711", "19340506", "ACC-0815"
#: What nobody may find anywhere but in a document.
IDENTIFYING = (NAME, PATIENT_ID, BIRTH, ACCESSION)


def write_image(path: Path, number: int, study: int, **changes: Any) -> Path:
    """A CR image that ends where its pixels would begin; None takes an element away."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.3680043.9999.1.{number}"
    ds.StudyInstanceUID = f"1.2.826.0.1.3680043.9999.2.{study}"
    ds.SeriesInstanceUID = f"1.2.826.0.1.3680043.9999.3.{number}"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = NAME, PATIENT_ID, BIRTH, "F"
    ds.PatientAge, ds.AccessionNumber, ds.StudyID = "077Y", ACCESSION, "S1"
    ds.StudyDate, ds.StudyTime, ds.StudyDescription = "20260102", "131415", "Chest"
    ds.ReferringPhysicianName, ds.Modality, ds.Rows, ds.Columns = "Doctor^Jane", "CR", 64, 64
    for keyword, value in changes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    ds.save_as(path, enforce_file_format=True)
    # The pixels' element and its length alone: whoever reads them finds the file cut short.
    with open(path, "ab") as file:
        file.write(b"\xe0\x7f\x10\x00OW\0\0\x00\x20\x00\x00")
    return path


@dataclass
class Site:
    """A score folder over DICOM files that lie beside it."""

    home: Path
    bundle: Bundle
    paths: list[str] = field(default_factory=list)
    studies: list[str | None] = field(default_factory=list)
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=lambda: {"finished": "2026-03-04T05:06:07+00:00"})

    @property
    def scores(self) -> Path:
        return self.home / "scores"

    @property
    def out(self) -> Path:
        return self.home / "reports"

    def add(self, number: int, study: int, **changes: Any) -> Path:
        path = write_image(self.home / f"image{number}.dcm", number, study, **changes)
        self.add_path(path, f"1.2.826.0.1.3680043.9999.2.{study}")
        return path

    def add_path(self, path: Path | str, study: str | None) -> None:
        self.paths.append(str(path))
        self.studies.append(study)

    def write(self) -> Site:
        n = len(self.paths)
        rows = pa.table(
            {
                "image_id": pa.array([f"image {i}" for i in range(n)], pa.string()),
                "path": pa.array(self.paths, pa.string()),
                "patient_id": pa.nulls(n, pa.string()),
                "study_id": pa.array(self.studies, pa.string()),
                "age": pa.array([5.0] + [50.0] * (n - 1), pa.float64()),
            }
        )
        p = np.random.default_rng(3).random((n, len(self.bundle.findings))).astype(np.float32)
        self.table = predictions.assemble(rows, p, self.failures, self.bundle.rules)
        (self.scores / "scores").mkdir(parents=True, exist_ok=True)
        half = n // 2 + 1
        for i, part in enumerate((self.table.slice(0, half), self.table.slice(half))):
            pq.write_table(part, self.scores / "scores" / f"part-{i:05d}.parquet")
        (self.scores / "settings.json").write_text('{"kind": "score"}')
        (self.scores / "run.json").write_text(json.dumps({"versions": {"ray-cxr": "9.8.7"}, **self.run}))
        (self.scores / "model.json").write_text(json.dumps(self.bundle.model_json()))
        (self.scores / "_SUCCESS").touch()
        return self

    def arguments(self, out: Path | None = None) -> list[object]:
        return ["export-sr", self.scores, "--out", out or self.out]

    def outcomes(self) -> list[str]:
        found: list[str] = pq.read_table(self.out / "images.parquet")["outcome"].to_pylist()
        return found


@pytest.fixture(scope="module")
def four_findings(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Four outputs, with and without calibration and operating point: documents of 14 take their time."""
    bundle: Bundle = make_tiny_bundle(tmp_path_factory.mktemp("four") / "bundle", findings=FINDINGS[:4])
    return bundle


@pytest.fixture
def site(four_findings: Bundle, tmp_path: Path) -> Site:
    return Site(tmp_path, four_findings)


def documents(out: Path) -> list[Dataset]:
    return [pydicom.dcmread(path) for path in sorted(out.glob("*.dcm"))]


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.dcm")}


def items(node: Dataset) -> Iterator[Dataset]:
    """Every content item below one, whoever wrote it."""
    for item in node.get("ContentSequence", []):
        yield item
        yield from items(item)


def meaning(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeMeaning)


def groups(document: Dataset) -> dict[str, list[Dataset]]:
    """Content items of each measurement group by its tracking identifier."""
    found = [list(item.ContentSequence) for item in items(document) if meaning(item) == "Measurement Group"]
    return {next(i.TextValue for i in group if meaning(i) == "Tracking Identifier"): group for group in found}


def numbers(group: list[Dataset]) -> dict[str, float]:
    """Numeric values by the code of what they are."""
    return {
        item.ConceptNameCodeSequence[0].CodeValue: item.MeasuredValueSequence[0].FloatingPointValue
        for item in group
        if item.ValueType == "NUM"
    }


def coded(group: list[Dataset]) -> dict[str, str]:
    return {
        item.ConceptNameCodeSequence[0].CodeValue: item.ConceptCodeSequence[0].CodeValue
        for item in group
        if item.ValueType == "CODE"
    }


# ---------------------------------------------------------------- codes


def test_every_label_has_one_code_of_its_own() -> None:
    assert set(dicom_sr.CODES) == set(LABELS)
    assert len({(row.scheme, row.value) for row in dicom_sr.CODES.values()}) == len(LABELS)
    for name, row in dicom_sr.CODES.items():
        assert row.finding == name
        assert row.source
        assert 0 < len(row.value) <= 16, "Code Value is a short string"
        assert 0 < len(row.meaning) <= 64


@pytest.mark.parametrize("scheme", ["SCT", "DCM"])
def test_public_codes_stand_in_dicoms_dictionary_with_that_meaning_and_no_other(scheme: str) -> None:
    dictionary = getattr(codes, scheme)
    meanings: dict[str, set[str]] = {}
    for keyword in dictionary.dir():
        entry = getattr(dictionary, keyword)
        meanings.setdefault(entry.value, set()).add(entry.meaning.removesuffix(" (disorder)"))
    rows = [row.code for row in dicom_sr.CODES.values() if row.scheme == scheme]
    rows += [code for code in (dicom_sr.PROBABILITY,) if code.scheme_designator == scheme]
    assert rows
    for row in rows:
        assert meanings[row.value] == {row.meaning}


def test_all_other_codes_are_radlex_or_said_to_be_private() -> None:
    for row in dicom_sr.CODES.values():
        if row.scheme == "RADLEX":
            assert re.fullmatch(r"RID[0-9]+", row.value)
            assert row.source.startswith("RadLex")
        else:
            assert row.scheme in ("SCT", "DCM", dicom_sr.SCHEME)
    assert dicom_sr.SCHEME.startswith("99")
    for code in dicom_sr.QUALITY_CODES.values():
        assert code.scheme_designator == dicom_sr.SCHEME
        assert len(code.value) <= 16


def test_the_page_has_the_same_codes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "export-sr.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| (\w+) \| (\w+) (\w+) \| ([^|]+) \|", page, re.MULTILINE)
    assert told == [(name, row.scheme, row.value, row.meaning) for name, row in dicom_sr.CODES.items()]


# ---------------------------------------------------------------- what a document says


def test_one_document_per_study_says_what_the_scores_say(tiny_bundle: Bundle, tmp_path: Path, command: Command) -> None:
    site = Site(tmp_path, tiny_bundle)
    site.add(1, 1)
    site.add(2, 2)
    site.add(3, 1, ViewPosition="LL")
    site.write()
    code, out, _ = command(*site.arguments())
    assert code == 0
    assert "3 images exported" in out
    assert "reports: 2 in" in out
    found = {document.StudyInstanceUID: document for document in documents(site.out)}
    assert len(found) == 2
    document = found["1.2.826.0.1.3680043.9999.2.1"]
    named = groups(document)
    assert len(named) == 2 * (1 + len(FINDINGS))
    thresholds = site.bundle.rules.thresholds
    for image, row in ((1, 0), (2, 2)):
        scored = site.table.slice(row, 1).to_pylist()[0]
        whole = named[f"Image {image}"]
        assert numbers(whole)["PRIORITY"] == scored["priority"]
        assert coded(whole)["TOP_FINDING"] == dicom_sr.CODES[scored["top_finding"]].value
        assert coded(whole).get("QUALITY") == ("AGE_OUTSIDE" if row == 0 else None)
        for name in FINDINGS:
            group = named[f"Image {image}, {name}"]
            finding = next(item for item in group if meaning(item) == "Finding").ConceptCodeSequence[0]
            expected = dicom_sr.CODES[name]
            assert (finding.CodeValue, finding.CodingSchemeDesignator) == (expected.value, expected.scheme)
            values = numbers(group)
            assert values.pop("UNCALIBRATED") == scored[f"p_{name}"]
            assert values.pop(dicom_sr.PROBABILITY.value, None) == scored[f"c_{name}"]
            assert values.pop("OPERATING_POINT", None) == thresholds[name]
            assert not values
            flag = {None: None, True: "FLAGGED", False: "NOT_FLAGGED"}[scored[f"flag_{name}"]]
            assert coded(group).get("FLAG") == flag
            source = next(item for item in group if item.ValueType == "IMAGE").ReferencedSOPSequence[0]
            assert source.ReferencedSOPInstanceUID == f"1.2.826.0.1.3680043.9999.1.{row + 1}"
            assert source.ReferencedSOPClassUID == ComputedRadiographyImageStorage
    for item in items(document):
        if item.ValueType == "NUM":
            unit = item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0]
            assert (unit.CodeValue, unit.CodingSchemeDesignator) == ("1", "UCUM")
    (evidence,) = document.CurrentRequestedProcedureEvidenceSequence
    referred = {
        (series.SeriesInstanceUID, item.ReferencedSOPInstanceUID)
        for series in evidence.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert referred == {(f"1.2.826.0.1.3680043.9999.3.{i}", f"1.2.826.0.1.3680043.9999.1.{i}") for i in (1, 3)}


def test_a_document_tells_its_maker_and_that_nobody_has_verified_it(site: Site, command: Command) -> None:
    site.add(1, 1)
    site.write()
    assert command(*site.arguments())[0] == 0
    (document,) = documents(site.out)
    assert document.Modality == "SR"
    assert document.VerificationFlag == "UNVERIFIED"
    assert document.PreliminaryFlag == "PRELIMINARY"
    assert document.CompletionFlag == "COMPLETE"
    assert "VerifyingObserverSequence" not in document
    assert "research use only" in document.SeriesDescription
    comment = next(item for item in items(document) if meaning(item) == "Comment")
    assert comment.TextValue.startswith("Research use only, not for diagnosis.")
    digest = site.bundle.digest
    observer = {
        meaning(item): item.get("UID") or item.get("TextValue")
        for item in items(document)
        if meaning(item).startswith("Device Observer")
    }
    assert observer["Device Observer UID"] == dicom_sr.device_uid(digest)
    assert observer["Device Observer Serial Number"] == document.DeviceSerialNumber == digest
    assert "TinyCNN" in observer["Device Observer Model Name"]
    assert "ray-cxr 9.8.7" in document.SoftwareVersions
    assert document.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == dicom_sr.SCHEME


def test_highdicom_reads_it_as_a_measurement_report(site: Site, command: Command) -> None:
    site.add(1, 1)
    site.write()
    assert command(*site.arguments())[0] == 0
    (path,) = site.out.glob("*.dcm")
    document = sr.srread(path)
    assert isinstance(document, sr.ComprehensiveSR)
    assert isinstance(document.content, sr.MeasurementReport)
    found = document.content.get_image_measurement_groups(finding_type=dicom_sr.CODES[FINDINGS[1]].code)
    assert len(found) == 1
    assert document.get_evidence()[0][2] == "1.2.826.0.1.3680043.9999.1.1"


def test_patient_and_study_are_the_images_own(site: Site, command: Command) -> None:
    image = pydicom.dcmread(site.add(1, 1, SpecificCharacterSet="ISO_IR 100", PatientName="Zweistein^Jörg"))
    site.write()
    assert command(*site.arguments())[0] == 0
    (document,) = documents(site.out)
    for keyword in (
        *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "AccessionNumber", "StudyID"),
        *("StudyDate", "StudyTime", "StudyDescription", "StudyInstanceUID", "ReferringPhysicianName"),
    ):
        assert document[keyword].value == image[keyword].value, keyword
    assert str(document.PatientName) == "Zweistein^Jörg"
    assert document.SeriesInstanceUID != image.SeriesInstanceUID


def test_what_an_image_lacks_is_empty_and_what_is_odd_comes_as_it_is(site: Site, command: Command) -> None:
    missing = ("PatientName", "PatientBirthDate", "StudyDate", "StudyTime", "AccessionNumber", "StudyID")
    site.add(1, 1, **dict.fromkeys(missing), PatientAge="77")
    pydicom.config.settings.writing_validation_mode, before = 0, pydicom.config.settings.writing_validation_mode
    try:
        site.add(2, 2, PatientSex="UNKNOWN", StudyDate="2.1.2026", PatientID="X" * 80)
    finally:
        pydicom.config.settings.writing_validation_mode = before
    site.write()
    code, out, err = command(*site.arguments())
    assert code == 0, out + err
    first, second = sorted(documents(site.out), key=lambda document: str(document.StudyInstanceUID))
    assert all(keyword in first and not first[keyword].value for keyword in missing)
    assert "PatientAge" not in first
    assert (second.PatientSex, second.StudyDate, second.PatientID) == ("UNKNOWN", "2.1.2026", "X" * 80)
    assert pydicom.config.settings.writing_validation_mode == before


@pytest.mark.parametrize(("offset", "date", "time"), [("-0530", "20260303", "233607"), ("+1400", "20260304", "190607")])
def test_content_time_is_that_of_the_scoring_in_the_images_zone(
    site: Site, command: Command, offset: str, date: str, time: str
) -> None:
    site.add(1, 1, TimezoneOffsetFromUTC=offset)
    site.write()
    assert command(*site.arguments())[0] == 0
    (document,) = documents(site.out)
    assert (document.ContentDate, document.ContentTime) == (date, time)
    assert (document.InstanceCreationDate, document.InstanceCreationTime) == (date, time)


# ---------------------------------------------------------------- again, and under another model


def test_the_same_scores_give_the_same_files(site: Site, command: Command, tmp_path: Path) -> None:
    site.add(1, 1)
    site.add(2, 2)
    site.write()
    assert command(*site.arguments())[0] == 0
    first = files(site.out)
    assert all(pydicom.dcmread(site.out / name).SOPInstanceUID + ".dcm" == name for name in first)
    code, out, _ = command(*site.arguments())
    assert code == 0
    assert "0 written now" in out
    (site.out / "_SUCCESS").unlink()
    (site.out / sorted(first)[0]).unlink()
    assert "1 written now" in command(*site.arguments())[1]
    assert files(site.out) == first
    assert command(*site.arguments(tmp_path / "elsewhere"))[0] == 0
    assert files(tmp_path / "elsewhere") == first


def test_another_training_is_another_device_and_other_documents(site: Site, command: Command, tmp_path: Path) -> None:
    site.add(1, 1)
    site.write()
    assert command(*site.arguments())[0] == 0
    site.bundle = make_tiny_bundle(tmp_path / "other", seed=1, findings=site.bundle.findings)
    site.write()
    code, _, err = command(*site.arguments())
    assert code == 2
    assert "model_digest" in err
    assert command(*site.arguments(tmp_path / "elsewhere"))[0] == 0
    (one,), (two,) = documents(site.out), documents(tmp_path / "elsewhere")
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "DeviceSerialNumber"):
        assert one[keyword].value != two[keyword].value
    devices = {
        item.UID for ds in (one, two) for item in items(ds) if item.ConceptNameCodeSequence[0].CodeValue == "121012"
    }
    assert len(devices) == 2
    assert all(UID(uid).is_valid and uid.startswith("2.25.") for uid in devices)


def test_no_uid_stands_for_two_things(site: Site, command: Command) -> None:
    site.add(1, 1)
    site.add(2, 1)
    site.add(3, 2)
    site.write()
    assert command(*site.arguments())[0] == 0
    tracked = [item.UID for ds in documents(site.out) for item in items(ds) if meaning(item).startswith("Tracking U")]
    assert len(tracked) == len(set(tracked)) == 3 * (1 + len(site.bundle.findings))
    assert all(UID(uid).is_valid for uid in tracked)


def test_many_documents_are_made_by_several_processes_and_are_the_same(
    site: Site, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        site.add(i, i)
    site.write()
    assert command(*site.arguments())[0] == 0
    monkeypatch.setattr(dicom_sr, "_MANY", 2)
    monkeypatch.setattr(dicom_sr, "_PROCESSES", 2)
    assert command(*site.arguments(tmp_path / "elsewhere"))[0] == 0
    assert files(tmp_path / "elsewhere") == files(site.out)


# ---------------------------------------------------------------- what is left out, and what fails


def test_what_is_left_out_is_counted(site: Site, command: Command) -> None:
    first = site.add(1, 1)
    shutil.copy(first, site.home / "copy")
    site.add_path(site.home / "copy", site.studies[0])
    (site.home / "a.png").write_bytes(b"never looked at")
    site.add_path(site.home / "a.png", None)
    (site.home / "picture").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(300))
    site.add_path(site.home / "picture", None)
    site.add_path(site.home / "broken.dcm", None)
    site.failures[4] = ("corrupt", "the DICOM decoder failed")
    site.write()
    code, out, _ = command(*site.arguments())
    assert code == 0
    assert "1 left out, because they could not be scored" in out
    assert "2 left out, because they are not DICOM" in out
    assert "1 left out, because another row has the same image" in out
    assert site.outcomes() == ["exported", "repeated", "not_dicom", "not_dicom", "not_scored"]
    table = pq.read_table(site.out / "images.parquet").to_pylist()
    assert [row["report"] is not None for row in table] == [True, False, False, False, False]
    assert documents(site.out)[0].CompletionFlag == "COMPLETE"


def test_a_study_that_lacks_an_image_is_partial_until_it_has_it(site: Site, command: Command) -> None:
    site.add(1, 1)
    gone = site.add(2, 1)
    site.add(3, 2)
    site.write()
    gone.rename(site.home / "away")
    code, out, err = command(*site.arguments())
    assert code == 3
    assert "2 images exported" in out
    assert "1 of them without an image of their study" in out
    (line,) = [line for line in err.splitlines() if line.startswith("ray-cxr")]
    assert "1 of 3 images could not be exported (1 missing: no such file)" in line
    assert not (site.out / "_SUCCESS").exists()
    by_study = {document.StudyInstanceUID[-1]: document for document in documents(site.out)}
    assert by_study["1"].CompletionFlag == "PARTIAL"
    assert by_study["1"].CompletionFlagDescription == "1 of 2 images are not in this document"
    assert by_study["2"].CompletionFlag == "COMPLETE"

    (site.home / "away").rename(gone)
    assert command(*site.arguments())[0] == 0
    assert [document.CompletionFlag for document in documents(site.out)] == ["COMPLETE", "COMPLETE"]
    assert (site.out / "_SUCCESS").exists()


def test_an_image_that_could_not_be_scored_makes_its_study_partial(site: Site, command: Command) -> None:
    site.add(1, 1)
    site.add(2, 1)
    site.failures[1] = ("truncated", "too short")
    site.write()
    assert command(*site.arguments())[0] == 0
    assert documents(site.out)[0].CompletionFlag == "PARTIAL"


def changed_study(site: Site) -> None:
    write_image(site.home / "image2.dcm", 2, 9)


def no_study(site: Site) -> None:
    write_image(site.home / "image2.dcm", 2, 2, StudyInstanceUID=None)


def another_patient(site: Site) -> None:
    site.studies[1] = None  # as where study_id is a table's own
    write_image(site.home / "image2.dcm", 2, 3)
    write_image(site.home / "image3.dcm", 3, 3, PatientID="PAT-OTHER")


def empty(site: Site) -> None:
    (site.home / "image2.dcm").write_bytes(b"")


def cut_short(site: Site) -> None:
    whole = (site.home / "image2.dcm").read_bytes()
    (site.home / "image2.dcm").write_bytes(whole[: whole.index(b"Chest")])


def unknown_kind(site: Site) -> None:
    write_image(site.home / "image2.dcm", 2, 2, SOPClassUID="1.2.3.4.5")


@pytest.mark.parametrize(
    ("spoil", "reason", "failed"),
    [
        (changed_study, "corrupt: the file is of another study than when it was scored", 1),
        (no_study, "corrupt: the DICOM header gives no usable StudyInstanceUID", 1),
        (another_patient, "corrupt: the images of the study are of different patients", 2),
        (empty, "empty: the file holds 0 bytes", 1),
        (cut_short, "truncated: ", 1),
        (unknown_kind, "corrupt: no report can be made with its header", 1),
    ],
)
def test_an_image_that_fails_costs_its_study_and_no_other(
    site: Site, command: Command, spoil: Callable[[Site], None], reason: str, failed: int
) -> None:
    for i in (1, 2, 3, 4):
        site.add(i, i)
    spoil(site)
    site.studies[2] = None
    site.write()
    code, out, err = command(*site.arguments())
    assert code == 3
    assert "Traceback" not in err
    assert f"{failed:,} of 4 images could not be exported" in err
    assert reason in err
    assert f"reports: {4 - failed} in" in out
    assert site.outcomes().count("failed") == failed
    everything = out + err + (site.out / "export.json").read_text() + str(pq.read_table(site.out / "images.parquet"))
    assert not [word for word in IDENTIFYING if word in everything]
    assert len(documents(site.out)) == 4 - failed


def test_patients_are_named_in_the_documents_alone(
    site: Site, command: Command, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    site.add(1, 1)  # its name has no caret, which highdicom would warn of, name and all
    site.add(2, 2, PatientID=None)
    site.write()
    code, out, err = command(*site.arguments())
    assert code == 0
    said = [out, err, caplog.text, *(str(warning.message) for warning in recwarn)]
    for path in site.out.iterdir():
        said.append(path.name)
        if path.suffix != ".dcm":
            said.append(path.read_bytes().decode("latin-1"))
    assert not [word for word in IDENTIFYING for text in said if word in text]
    assert all(NAME.encode() in data for data in files(site.out).values())


def test_pseudonyms_in_the_scores_are_not_taken_for_another_study(site: Site, command: Command) -> None:
    site.add(1, 1)
    site.studies[0] = "0123456789abcdef0123456789abcdef"
    site.write()
    assert command(*site.arguments())[0] == 0
    assert documents(site.out)[0].StudyInstanceUID == "1.2.826.0.1.3680043.9999.2.1"


def test_images_inside_archives(site: Site, command: Command) -> None:
    with tarfile.open(site.home / "images.tar.gz", "w:gz") as archive:
        for i in (1, 2):
            archive.add(write_image(site.home / f"x{i}.dcm", i, i), f"inside/x{i}.dcm")
    for name in ("x2.dcm", "x1.dcm", "x3.dcm"):
        site.add_path(f"{site.home}/images.tar.gz::inside/{name}", None)
    site.write()
    code, _, err = command(*site.arguments())
    assert code == 3
    assert "1 of 3 images could not be exported (1 missing: the archive holds no such member)" in err
    assert site.outcomes() == ["exported", "exported", "failed"]


def not_finished(site: Site) -> None:
    (site.scores / "_SUCCESS").unlink()


def no_scores(site: Site) -> None:
    shutil.rmtree(site.scores)


def no_model(site: Site) -> None:
    (site.scores / "model.json").unlink()


def no_column(site: Site) -> None:
    part = site.scores / "scores" / "part-00000.parquet"
    pq.write_table(pq.read_table(part).drop_columns([f"p_{FINDINGS[0]}"]), part)


def damaged(site: Site) -> None:
    (site.scores / "scores" / "part-00000.parquet").write_bytes(b"PAR1")


def no_dicom(site: Site) -> None:
    site.paths = [str(site.home / "a.png")]
    site.write()


def others(site: Site) -> None:
    site.out.mkdir()
    (site.out / "settings.json").write_text('{"kind": "score"}')


def a_file(site: Site) -> None:
    site.out.write_text("")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (not_finished, "score did not finish; run it again to continue"),
        (no_scores, "is not a folder that `ray-cxr score` wrote"),
        (no_model, "model.json or run.json is missing or damaged"),
        (no_column, "has no column"),
        (damaged, "is missing or damaged"),
        (no_dicom, "none of its 1 rows is a DICOM image that was scored"),
        (others, "was begun with another"),
        (a_file, "is a file; name another --out"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    site: Site, command: Command, spoil: Callable[[Site], None], said: str
) -> None:
    site.add(1, 1)
    site.write()
    spoil(site)
    code, _, err = command(*site.arguments())
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("ray-cxr")]
    assert said in line
    assert not list(site.home.glob("reports/*.dcm"))


def test_help_does_not_wait_for_highdicom() -> None:
    program = (
        "import contextlib, sys\nfrom ray_cxr.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "assert 'highdicom' not in sys.modules and 'ray_cxr.reporting.dicom_sr' not in sys.modules"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "export-sr" in said


# ---------------------------------------------------------------- real images, and others' validators


@pytest.fixture
def real(shared: Path, tiny_bundle: Bundle, tmp_path: Path, command: Command) -> Site:
    """Reports of the real DICOM images, one of which is there twice."""
    site = Site(tmp_path, tiny_bundle)
    for path in sorted((shared / "dicom").glob("*.dcm")):
        site.add_path(path, read_tags(path.read_bytes())["study_id"])
    assert len(site.paths) == 4
    site.write()
    code, out, err = command(*site.arguments())
    assert code == 0, out + err
    return site


def test_real_images(real: Site) -> None:
    assert sorted(real.outcomes()) == ["exported", "exported", "exported", "repeated"]
    found = {document.StudyInstanceUID: document for document in documents(real.out)}
    assert set(found) == set(real.studies)
    for path in real.paths:
        image = pydicom.dcmread(path, stop_before_pixels=True)
        assert found[image.StudyInstanceUID].PatientID == image.PatientID


@pytest.fixture
def made(site: Site, command: Command) -> Site:
    """The report of a study of two images and one that failed."""
    for i in (1, 2, 3):
        site.add(i, 1, PatientName="Zweistein^Ilse")
    site.failures[2] = ("truncated", "too short")
    site.write()
    assert command(*site.arguments())[0] == 0
    return site


@pytest.mark.parametrize("program", ["dsrdump", "dciodvfy"])
@pytest.mark.parametrize("which", ["real", "made"])
def test_independent_validators_find_nothing_wrong(which: str, program: str, request: pytest.FixtureRequest) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (Debian: dcmtk and dicom3tools)")
    for path in request.getfixturevalue(which).out.glob("*.dcm"):
        done = subprocess.run([program, path], capture_output=True, text=True)
        lines = (done.stdout + done.stderr).splitlines()
        assert not [line for line in lines if line.startswith(("Error", "E:", "F:"))]
        assert [line for line in lines if "ComprehensiveSR" in line or "Comprehensive SR Document" in line]
        warnings = {
            re.sub(r"<.*?>", "<>", line)
            for line in lines
            if line.startswith(("Warning", "W:")) and "DICOMDIR" not in line
        }
        # The private scheme is not one it knows; and one real name has a single part.
        expected = ("Unrecognized defined term <>", "Value dubious for this VR - (0x0010,0x0010)")
        assert not [line for line in warnings if not any(words in line for words in expected)]
