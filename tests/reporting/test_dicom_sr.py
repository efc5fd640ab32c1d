"""Structured reports from outside: scores and DICOM files in, documents out, read back with other programs."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
from conftest import Bucket
from highdicom import sr
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.tag import Tag
from pydicom.uid import UID, ComputedRadiographyImageStorage
from sr_site import IDENTIFYING, NAME, PATIENT_ID, ROOT, Site, make_model, write_image

from ray_cxr.imaging.dicom import read_tags
from ray_cxr.labels import FINDINGS, LABELS
from ray_cxr.models.bundle import Bundle
from ray_cxr.reporting import dicom_sr, sr_document

Command = Callable[..., tuple[int, str, str]]

FINDING, FINDING_SITE = "121071", "363698007"  # the codes of "Finding" (DCM) and "Finding Site" (SCT)
CHEST = ("816094009", "SCT")
SHORT = {"Pleural_Thickening": "PLEURALTHICK"}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Two images of study 1, and two of study 2 of which one could not be scored; all findings and No_Finding."""
    site = Site(tmp_path_factory.mktemp("exported"), make_model(LABELS))
    site.add(1, 1, SpecificCharacterSet="ISO_IR 100", PatientName="Zweistein^Jörg", TimezoneOffsetFromUTC="-0530")
    site.add(2, 2, TimezoneOffsetFromUTC="+1400")
    site.add(3, 1, ViewPosition="LL")
    site.add(4, 2)
    site.failures[3] = ("truncated", "too short")
    site.write()
    done = dicom_sr.export_sr(site.scores, site.out)
    assert (done.reports, done.partial, done.written) == (2, 1, 2)
    assert done.outcomes == {"exported": 3, "not_scored": 1}
    return site


def read_files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.dcm")}


def error_line(err: str) -> str:
    (line,) = [line for line in err.splitlines() if line.startswith("ray-cxr")]
    assert "Traceback" not in err
    return line


def items(node: Dataset) -> Iterator[Dataset]:
    """Yield all content items below a node."""
    for item in node.get("ContentSequence", []):
        yield item
        yield from items(item)


def meaning(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeMeaning)


def read_groups(document: Dataset) -> dict[str, dict[str, Any]]:
    """Return the values of each measurement group, by its tracking identifier, and the code of what is measured."""
    groups = {}
    for group in items(document):
        if meaning(group) != "Measurement Group":
            continue
        values: dict[str, Any] = {}
        for item in group.ContentSequence:
            code = item.ConceptNameCodeSequence[0].CodeValue if item.ValueType != "IMAGE" else "image"
            if item.ValueType == "NUM":
                measured = item.MeasuredValueSequence[0]
                unit = measured.MeasurementUnitsCodeSequence[0]
                assert (unit.CodeValue, unit.CodingSchemeDesignator) == ("1", "UCUM")
                values[code] = measured.FloatingPointValue
            elif item.ValueType == "CODE":
                concept = item.ConceptCodeSequence[0]
                values[code] = (concept.CodeValue, concept.CodingSchemeDesignator)
            elif item.ValueType == "IMAGE":
                reference = item.ReferencedSOPSequence[0]
                values[code] = (reference.ReferencedSOPInstanceUID, reference.ReferencedSOPClassUID)
            elif meaning(item) == "Tracking Identifier":
                groups[item.TextValue] = values
    return groups


def test_codes_are_unique_and_well_formed() -> None:
    assert set(sr_document.CODES) == set(LABELS)
    assert len({(code.scheme_designator, code.value) for code in sr_document.CODES.values()}) == len(LABELS)
    assert sr_document.SCHEME.startswith("99")
    scores = [code for name in LABELS for code in sr_document._name_scores(name)]
    for code in [*sr_document.CODES.values(), *sr_document.QUALITY_CODES.values(), *scores]:
        assert code.scheme_designator in ("SCT", "DCM", "RADLEX", sr_document.SCHEME)
        assert 0 < len(code.value) <= 16, "Code Value is a short string"
        assert 0 < len(code.meaning) <= 64
        assert code.scheme_designator != "RADLEX" or re.fullmatch(r"RID[0-9]+", code.value)


@pytest.mark.parametrize("scheme", ["SCT", "DCM"])
def test_public_codes_have_the_meaning_of_dicoms_dictionary(scheme: str) -> None:
    dictionary, meanings = getattr(codes, scheme), defaultdict(set)
    for entry in (getattr(dictionary, keyword) for keyword in dictionary.dir()):
        meanings[entry.value].add(entry.meaning.removesuffix(" (disorder)"))
    used = [*sr_document.CODES.values(), sr_document.PROBABILITY, sr_document.CHEST, sr_document.LUNG]
    found = {code.value: code.meaning for code in used if code.scheme_designator == scheme}
    assert found
    assert [value for value, meant in found.items() if meant not in meanings[value]] == []


def test_documents_hold_the_scores(exported: Site) -> None:
    document = exported.documents()["1"]
    groups = read_groups(document)
    expected: dict[str, dict[str, Any]] = {}
    for image, row in ((1, 0), (2, 2)):
        scored = exported.table.slice(row, 1).to_pylist()[0]
        source = (f"{ROOT}.1.{row + 1}", ComputedRadiographyImageStorage)
        whole: dict[str, Any] = {"image": source, FINDING_SITE: CHEST}
        whole |= {"ABNORMALITY": scored["abnormality"], "READ_PRIORITY": scored["priority"]}
        if row == 0:
            whole["QUALITY"] = ("AGE_OUTSIDE", sr_document.SCHEME)
        for name in LABELS:
            code, short = sr_document.CODES[name], SHORT.get(name, name.upper())
            p, c = scored[f"p_{name}"], scored[f"c_{name}"]
            if scored[f"flag_{name}"] and name != "No_Finding":
                values = {
                    "image": source,
                    FINDING: (code.value, code.scheme_designator),
                    FINDING_SITE: ("39607008", "SCT") if name == "Fibrosis" else CHEST,
                    "UNCALIBRATED": p,
                    sr_document.PROBABILITY.value: c,
                    "OPERATING_POINT": exported.model[0].thresholds[name],
                }
                expected[f"Image {image}, {name}"] = {key: value for key, value in values.items() if value is not None}
            else:
                whole |= {f"P_{short}": p} | ({} if c is None else {f"C_{short}": c})
        expected[f"Image {image}"] = whole
    assert groups == expected
    (evidence,) = document.CurrentRequestedProcedureEvidenceSequence
    series = {item.SeriesInstanceUID: item.ReferencedSOPSequence for item in evidence.ReferencedSeriesSequence}
    referred = {uid: [image.ReferencedSOPInstanceUID for image in images] for uid, images in series.items()}
    assert referred == {f"{ROOT}.3.{i}": [f"{ROOT}.1.{i}"] for i in (1, 3)}


def test_only_flagged_findings_are_codes_of_findings(exported: Site) -> None:
    """A generic reader takes each code under Finding as present, so no other finding has one, and none is absent."""
    rows = exported.table.to_pylist()
    for study, numbers in (("1", (0, 2)), ("2", (1,))):
        document = exported.documents()[study]
        flagged = [sr_document.CODES[name].value for i in numbers for name in FINDINGS if rows[i][f"flag_{name}"]]
        coded = [item.ConceptCodeSequence[0].CodeValue for item in items(document) if item.ValueType == "CODE"]
        findings = [
            item.ConceptCodeSequence[0].CodeValue
            for item in items(document)
            if item.ValueType == "CODE" and item.ConceptNameCodeSequence[0].CodeValue == FINDING
        ]
        assert findings == flagged
        assert flagged
        others = {code.value for code in sr_document.CODES.values()} - set(flagged)
        assert not others & set(coded)
        absent = {codes.SCT.Absent.value, codes.DCM.Absent.value}
        assert not absent & set(coded)


def test_documents_name_their_algorithm_with_its_operating_points(exported: Site) -> None:
    document = sr.srread(exported.out / f"{exported.images()[0]['report']}.dcm")
    for finding, count in ((None, 2), (sr_document.CODES["Pneumothorax"], None)):
        groups = document.content.get_image_measurement_groups(finding_type=finding)
        groups = [group for group in groups if (group.finding_type is None) == (finding is None)]
        assert len(groups) == count or count is None
        for group in groups:
            found = defaultdict(list)
            for item in group[0].ContentSequence:
                if meaning(item).startswith("Algorithm"):
                    found[meaning(item)].append(item.TextValue)
            assert found["Algorithm Version"] == [f"ray-cxr 9.8.7, model {exported.model[0].digest}"]
            points = [name for name, point in exported.model[0].thresholds.items() if point is not None]
            shown = [text.split(":")[0] for text in found["Algorithm Parameters"]]
            assert shown == ([] if finding else points)


def test_documents_name_their_device_and_are_unverified(exported: Site) -> None:
    document = sr.srread(exported.out / f"{exported.images()[0]['report']}.dcm")
    assert isinstance(document, sr.ComprehensiveSR)
    assert isinstance(document.content, sr.MeasurementReport)
    for name in FINDINGS:
        flagged = [exported.table[f"flag_{name}"][row].as_py() is True for row in (0, 2)]
        found = document.content.get_image_measurement_groups(finding_type=sr_document.CODES[name])
        assert len(found) == sum(flagged)
    flags = (document.Modality, document.VerificationFlag, document.PreliminaryFlag, document.CompletionFlag)
    assert flags == ("SR", "UNVERIFIED", "PRELIMINARY", "COMPLETE")
    assert "VerifyingObserverSequence" not in document
    assert "research use only" in document.SeriesDescription
    found = {meaning(item): item.get("UID") or item.get("TextValue") for item in items(document)}
    assert found["Comment"].startswith("Research use only, not for diagnosis.")
    digest = exported.model[0].digest
    assert found["Device Observer UID"] == sr_document.make_uid("device", digest)
    assert found["Device Observer Serial Number"] == document.DeviceSerialNumber == digest
    assert "TinyCNN" in found["Device Observer Model Name"]
    assert "ray-cxr 9.8.7" in document.SoftwareVersions
    assert document.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == sr_document.SCHEME


def test_patient_study_and_time_zone_are_those_of_the_image(exported: Site) -> None:
    image, document = pydicom.dcmread(exported.paths[0]), exported.documents()["1"]
    patient = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "ReferringPhysicianName")
    study = ("StudyInstanceUID", "StudyID", "StudyDate", "StudyTime", "StudyDescription", "AccessionNumber")
    for keyword in (*patient, *study):
        assert document[keyword].value == image[keyword].value, keyword
    assert str(document.PatientName) == "Zweistein^Jörg"
    assert document.SeriesInstanceUID != image.SeriesInstanceUID
    for number, when in (("1", ("20260303", "233607")), ("2", ("20260304", "190607"))):
        document = exported.documents()[number]
        assert (document.ContentDate, document.ContentTime) == when
        assert (document.InstanceCreationDate, document.InstanceCreationTime) == when


def test_uids_are_valid_and_unique(exported: Site) -> None:
    documents = exported.documents().values()
    tracked = [item.UID for ds in documents for item in items(ds) if meaning(item).startswith("Tracking U")]
    flags = [exported.table[f"flag_{name}"].to_pylist() for name in FINDINGS]
    assert len(tracked) == len(set(tracked)) == 3 + sum(flag is True for column in flags for flag in column)
    assert all(UID(uid).is_valid for uid in tracked)
    assert {f"{ds.SOPInstanceUID}.dcm" for ds in documents} == set(read_files(exported.out))


def test_missing_values_are_empty_and_odd_values_are_kept(site: Site, command: Command) -> None:
    missing = ("PatientName", "PatientBirthDate", "StudyDate", "StudyTime", "AccessionNumber", "StudyID")
    site.add(1, 1, **dict.fromkeys(missing), PatientAge="77")
    site.studies[0] = "0123456789abcdef0123456789abcdef"  # a pseudonym is not another study
    mode = pydicom.config.settings.writing_validation_mode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pydicom.config.settings, "_writing_validation_mode", pydicom.config.IGNORE)
        site.add(2, 2, PatientSex="UNKNOWN", StudyDate="2.1.2026", PatientID="X" * 80)
    site.export(command)
    first, second = site.documents()["1"], site.documents()["2"]
    assert all(keyword in first and not first[keyword].value for keyword in missing)
    assert "PatientAge" not in first
    assert (second.PatientSex, second.StudyDate, second.PatientID) == ("UNKNOWN", "2.1.2026", "X" * 80)
    assert pydicom.config.settings.writing_validation_mode == mode


@pytest.mark.slow
def test_scores_of_a_real_bundle_are_exported(tiny_bundle: Bundle, tmp_path: Path, command: Command) -> None:
    site = Site(tmp_path, (tiny_bundle.rules, tiny_bundle.model_json()))
    site.add(1, 1)
    site.export(command)
    assert site.documents()["1"].DeviceSerialNumber == tiny_bundle.digest


def test_the_same_scores_give_the_same_files(site: Site, command: Command, tmp_path: Path) -> None:
    site.add(1, 1)
    site.add(2, 2)
    site.export(command)
    first = read_files(site.out)
    assert "0 written now" in site.run(command)[0]
    (site.out / "_SUCCESS").unlink()
    (site.out / sorted(first)[0]).unlink()
    assert "1 written now" in site.run(command)[0]
    assert read_files(site.out) == first
    site.run(command, out=tmp_path / "elsewhere")
    assert read_files(tmp_path / "elsewhere") == first


@pytest.mark.slow
def test_processes_write_the_same_documents(exported: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_sr, "_MIN_PARALLEL", 2)
    monkeypatch.setattr(dicom_sr, "_MAX_PROCESSES", 1)
    dicom_sr.export_sr(exported.scores, tmp_path / "elsewhere")
    assert read_files(tmp_path / "elsewhere") == read_files(exported.out)


def test_another_model_is_another_device_with_other_documents(site: Site, command: Command) -> None:
    site.add(1, 1)
    site.export(command)
    first = site.documents()["1"]
    site.model = make_model(FINDINGS[:2], digest="e2" * 32)
    assert "model_digest" in error_line(site.export(command, code=2)[1])
    shutil.rmtree(site.out)
    site.run(command)
    second = site.documents()["1"]
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "DeviceSerialNumber"):
        assert first[keyword].value != second[keyword].value
    devices = {item.UID for ds in (first, second) for item in items(ds) if meaning(item) == "Device Observer UID"}
    assert len(devices) == 2
    assert all(UID(uid).is_valid and uid.startswith("2.25.") for uid in devices)


def test_images_left_out_are_counted(site: Site, command: Command) -> None:
    shutil.copy(site.add(1, 1), site.home / "copy")
    site.add_path(site.home / "copy", site.studies[0])
    (site.home / "a.png").write_bytes(b"not opened")
    (site.home / "image").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(300))
    for name in ("a.png", "image", "broken.dcm"):
        site.add_path(site.home / name, None)
    site.failures[4] = ("corrupt", "the DICOM decoder failed")
    site.export(command)
    found = site.images()
    assert [row["outcome"] for row in found] == ["exported", "repeated", "not_dicom", "not_dicom", "not_scored"]
    assert [row["report"] is not None for row in found] == [True, False, False, False, False]
    assert site.documents()["1"].CompletionFlag == "COMPLETE"


def test_study_without_one_image_is_partial_until_it_is_found(site: Site, command: Command) -> None:
    site.add(1, 1)
    gone = site.add(2, 1)
    site.add(3, 2)
    site.write()
    gone.rename(site.home / "away")
    out, err = site.run(command, code=3)
    assert "2 images exported" in out
    assert "1 of 3 images could not be exported (1 missing: " in error_line(err)
    assert not (site.out / "_SUCCESS").exists()
    found = site.documents()
    assert (found["1"].CompletionFlag, found["2"].CompletionFlag) == ("PARTIAL", "COMPLETE")
    assert found["1"].CompletionFlagDescription == "1 of 2 images are not in this document"
    (site.home / "away").rename(gone)
    site.run(command)
    assert {document.CompletionFlag for document in site.documents().values()} == {"COMPLETE"}
    assert (site.out / "_SUCCESS").exists()
    # The complete document replaces the partial one, also after another run.
    complete = read_files(site.out)
    (site.out / "_SUCCESS").unlink()
    assert "0 written now" in site.run(command)[0]
    assert read_files(site.out) == complete
    assert predecessors(site.documents()["1"]) == [found["1"].SOPInstanceUID]
    assert predecessors(site.documents()["2"]) == []


def predecessors(document: Dataset) -> list[str]:
    """Return the UIDs of the documents that a document replaces, after a check of study and series."""
    found = []
    for study in document.get("PredecessorDocumentsSequence", []):
        assert study.StudyInstanceUID == document.StudyInstanceUID
        for series in study.ReferencedSeriesSequence:
            assert series.SeriesInstanceUID.startswith("2.25.")
            found += [item.ReferencedSOPInstanceUID for item in series.ReferencedSOPSequence]
            assert {item.ReferencedSOPClassUID for item in series.ReferencedSOPSequence} == {document.SOPClassUID}
    return found


def test_earlier_documents_of_other_studies_replace_nothing(site: Site, command: Command) -> None:
    site.add(1, 1)
    site.export(command)
    other = Site(site.home)
    other.scores, other.out = site.home / "other scores", site.home / "other"
    other.add(2, 2)
    other.write()
    assert "replaced: 0 of the reports" in other.run(command, "--replaces", site.out)[0]


def test_documents_of_another_model_name_those_that_they_replace(
    site: Site, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add(1, 1)
    site.add(2, 2)
    site.export(command)
    before, old = site.documents(), site.out
    site.model = make_model(FINDINGS[:2], digest="e2" * 32)
    site.add(3, 3)
    site.write()
    site.out = site.home / "new"
    assert "empty: has no document" in error_line(site.run(command, "--replaces", site.home / "empty", code=2)[1])
    assert "replaced: 2 of the reports" in site.run(command, "--replaces", old)[0]
    assert json.loads((site.out / "export.json").read_text(encoding="utf-8"))["replacing"] == 2
    after = site.documents()
    assert [predecessors(after[study]) for study in "123"] == [
        *([before[study].SOPInstanceUID] for study in "12"),
        [],
    ]
    monkeypatch.chdir(old.parent)
    again = site.run(command, "--replaces", old.name)[0]
    assert "0 written now" in again
    assert "replaced: 2 of the reports" in again
    assert "replaces" in error_line(site.run(command, code=2)[1])


@pytest.mark.slow
def test_export_from_and_to_a_bucket_is_that_of_a_disk(
    site: Site, bucket: Bucket, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images, scores, documents and the documents that others replace are in the bucket."""
    monkeypatch.setenv("RAY_CXR_CACHE", str(site.home / "cache"))
    for number in (1, 2, 3):
        path = site.add(number, 1 + number % 2)
        bucket.put(f"sr/images/{path.name}", path.read_bytes())
    site.paths = [bucket(f"sr/images/{Path(path).name}") for path in site.paths]
    site.write()
    site.draw_maps()
    assert "heat maps:" in site.run(command, "--heatmaps")[0]
    bucket.upload(site.scores, "sr/scores")
    given = ["export-sr", bucket("sr/scores"), "--out", bucket("sr/out"), "--heatmaps"]
    code, printed, _ = command(*given)
    assert code == 0
    assert "2 written now" in printed
    files = {path.relative_to(site.out).as_posix() for path in site.out.rglob("*") if path.is_file()}
    assert {key.removeprefix("sr/out/") for key in bucket.keys("sr/out/") if not key.endswith("/")} == files
    for name in files:
        assert bucket.get(f"sr/out/{name}") == (site.out / name).read_bytes(), name

    # A run whose end was lost writes only what is missing, and removes a capture that is none any more.
    lost = min(name for name in files if name.startswith("heatmaps/"))
    for name in ("_SUCCESS", lost):
        bucket.client.delete_object(Bucket="chests", Key=f"sr/out/{name}")
    bucket.put("sr/out/heatmaps/1.2.3.dcm", b"of an older run")
    assert "0 written now" in command(*given)[1]
    assert bucket.get(f"sr/out/{lost}") == (site.out / lost).read_bytes()
    assert "sr/out/heatmaps/1.2.3.dcm" not in bucket.keys("sr/out/")

    site.model = make_model(FINDINGS[:2], digest="e2" * 32)
    site.write()
    again = ["export-sr", site.scores, "--out", bucket("sr/new"), "--replaces"]
    assert "has no document" in error_line(command(*again, bucket("sr/none"))[2])
    code, printed, _ = command(*again, bucket("sr/out"))
    assert (code, "replaced: 2 of the reports" in printed) == (0, True)


def test_image_that_fails_costs_only_its_study(site: Site, command: Command) -> None:
    for i in range(1, 9):
        site.add(i, i)
    write_image(site.home / "image2.dcm", 2, 99)
    write_image(site.home / "image3.dcm", 3, 3, StudyInstanceUID=None)
    for i, patient in ((4, PATIENT_ID), (5, "PAT-OTHER")):
        write_image(site.home / f"image{i}.dcm", i, 4, PatientID=patient)
        site.studies[i - 1] = None  # as where study_id comes from a table
    (site.home / "image6.dcm").write_bytes(b"")
    whole = (site.home / "image7.dcm").read_bytes()
    (site.home / "image7.dcm").write_bytes(whole[: whole.index(b"Chest")])
    write_image(site.home / "image8.dcm", 8, 8, SOPClassUID="1.2.3.4.5")
    with tarfile.open(site.home / "images.tar.gz", "w:gz") as archive:
        archive.add(write_image(site.home / "x.dcm", 9, 9), "inside/x.dcm")
    for name in ("absent", "x"):
        site.add_path(f"{site.home}/images.tar.gz::inside/{name}.dcm", None)
    out, err = site.export(command, code=3)
    assert "8 of 10 images could not be exported" in error_line(err)
    reasons = [row["reason"] for row in site.images()]
    expected = ["another study", "StudyInstanceUID", *["different patients"] * 2, "empty: ", "truncated: ", "no report"]
    assert reasons[0] is reasons[-1] is None
    assert all(words in reason for words, reason in zip([*expected, "missing: "], reasons[1:-1], strict=True))
    assert sorted(site.documents()) == ["1", "9"]
    everything = out + err + (site.out / "export.json").read_text(encoding="utf-8") + str(reasons)
    assert not [word for word in IDENTIFYING if word in everything]


CHARSETS = (None, "ISO_IR 100", "ISO_IR 192", "ISO-IR 192", "GB18030", "no such term")


@pytest.mark.parametrize("charset", [*CHARSETS, ["", "ISO 2022 IR 87"], ["ISO_IR 192", "ISO 2022 IR 87"]])
def test_text_of_the_image_is_copied_byte_for_byte(site: Site, command: Command, charset: Any) -> None:
    stored = {
        "PatientID": (b"PAT-4711\xdc", b"PAT-4711\xc4"),
        "PatientName": (b"Zweistein^J\xf6rg=\xff\x1b$Z", b"Zweistein^J\xf6rg=\xff\x1b$Z"),
        "StudyDescription": (b"Th\xf3rax", b"Th\xfarax"),
    }
    for number in (1, 2):
        path = site.add(number, number, SpecificCharacterSet="ISO_IR 100")
        ds = pydicom.dcmread(path)
        ds.SpecificCharacterSet = charset
        if charset is None:
            del ds.SpecificCharacterSet
        ds.set_original_encoding(False, True, ds._character_set)
        for keyword, values in stored.items():
            tag = Tag(keyword)
            value = values[number - 1] + b" " * (len(values[number - 1]) % 2)
            ds[tag] = RawDataElement(tag, ds[tag].VR, len(value), value, 0, False, True)
        ds.save_as(path)
    site.export(command)
    assert [row["outcome"] for row in site.images()] == ["exported"] * 2
    for study, document in site.documents().items():
        for keyword, values in stored.items():
            assert document.get_item(keyword).value.rstrip(b" ") == values[int(study) - 1], keyword
        found = document.get("SpecificCharacterSet")
        assert found == charset
        assert document.Manufacturer == sr_document.MANUFACTURER
        assert document.SeriesDescription == sr_document.SERIES_DESCRIPTION
        assert any(getattr(item, "TextValue", None) == sr_document.RESEARCH_ONLY for item in document.ContentSequence)


def test_images_of_a_study_with_undecodable_ids_of_two_patients_fail(site: Site, command: Command) -> None:
    for number, raw in ((1, b"M\xdc-1"), (2, b"M\xc4-1")):
        path = site.add(number, 7, SpecificCharacterSet="ISO_IR 192", PatientID="MUXX-1")
        path.write_bytes(path.read_bytes().replace(b"MUXX-1", raw + b"  "))
    site.export(command, code=3)
    assert {row["reason"] for row in site.images()} == {"corrupt: the images of the study are of different patients"}


def test_character_set_that_is_none_fails(site: Site, command: Command) -> None:
    path = site.add(1, 1, SpecificCharacterSet="ISO_IR 100")
    path.write_bytes(path.read_bytes().replace(b"ISO_IR 100", b"utf-16    "))
    out, err = site.export(command, code=3)
    assert "declares a character set" in str(site.images()[0]["reason"]) + out + err


def test_patients_are_named_in_the_documents_only(
    site: Site, command: Command, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    site.add(1, 1)  # highdicom would warn of a name without a caret, and quote it
    site.add(2, 2, PatientID=None)
    out, err = site.export(command)
    texts = [out, err, caplog.text, *(str(warning.message) for warning in recwarn)]
    texts += [path.name for path in site.out.iterdir()]
    texts += [path.read_text("latin-1") for path in site.out.iterdir() if path.suffix != ".dcm"]
    assert not [word for word in IDENTIFYING for text in texts if word in text]
    assert all(NAME.encode() in data for data in read_files(site.out).values())


def change_row(site: Site, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the row of a score folder with one image."""
    (row,) = site.table.to_pylist()
    change(row)
    changed = pa.Table.from_pylist([row], site.table.select(list(row)).schema)
    pq.write_table(changed, site.scores / "scores" / "part-00000.parquet")


NO_IMAGE = "none of its 1 rows is a scored DICOM image"


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda site: (site.scores / "_SUCCESS").unlink(), "scores: score did not finish"),
        (lambda site: shutil.rmtree(site.scores), "scores: no such file or folder"),
        (lambda site: (site.scores / "model.json").unlink(), "model.json"),
        (lambda site: change_row(site, lambda row: row.pop(f"p_{FINDINGS[0]}")), f"p_{FINDINGS[0]}"),
        (lambda site: (site.scores / "scores" / "part-00000.parquet").write_bytes(b"PAR1"), "part-00000.parquet"),
        (lambda site: change_row(site, lambda row: row.update(path="a.png")), NO_IMAGE),
        (lambda site: shutil.copytree(site.scores, site.out), "reports"),
        (lambda site: site.out.write_text("", encoding="utf-8"), "reports: is a file"),
    ],
)
def test_unusable_folders_are_refused(site: Site, command: Command, spoil: Callable[..., object], names: str) -> None:
    site.add(1, 1)
    site.write()
    spoil(site)
    assert names in error_line(site.run(command, code=2)[1])
    assert not list(site.home.glob("reports/*.dcm"))


def test_real_images_are_exported(site: Site, shared: Path) -> None:
    for path in sorted((shared / "dicom").glob("*.dcm")):
        site.add_path(path, read_tags(path.read_bytes())["study_id"])
    assert len(site.paths) == 4
    site.write()
    dicom_sr.export_sr(site.scores, site.out).raise_for_failures()
    assert sorted(row["outcome"] for row in site.images()) == [*["exported"] * 3, "repeated"], "one exists twice"
    found = site.documents()
    assert set(found) == set(site.studies)
    for path in site.paths:
        image = pydicom.dcmread(path, stop_before_pixels=True)
        assert found[image.StudyInstanceUID].PatientID == image.PatientID
