"""Build the DICOM structured report of a study: a Comprehensive SR of TID 1500, Measurement Report (DICOM PS3.16).

For each image a report has

- a measurement group (TID 1501) without a finding: abnormality, priority, quality flag, and the scores of all findings
  that are not flagged, under private concept names;
- a measurement group per flagged finding: its code, the calibrated probability if there is one, the raw probability,
  and the operating point.

Only flagged findings have a code under the concept name Finding, because generic readers show every such code as
present. The code Absent (CID 240) is never used: a finding below its operating point is not ruled out. No_Finding has
scores only, because its code would state that findings are absent. Every group names the chest as finding site, and
the algorithm (TID 4019); the parameters of the algorithm list the operating points.

The observer is a device. Its UID is derived from the model's digest, so a bundle with another training, quantisation or
calibration is another device. Every document states in VerificationFlag, in PreliminaryFlag and in words that it is
unverified.

UIDs are derived from the content and never from a clock or random numbers (see `derive_uid`): the same scores give the
same files, and a PACS that receives a file twice keeps one copy. A document that replaces others names them in
PredecessorDocumentsSequence. The texts in this module are part of the content; raise
`FORMAT` when a text changes.
"""

from __future__ import annotations

import datetime
import io
import json
import logging
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pydicom
from highdicom import sr
from highdicom.base import CodingSchemeIdentificationItem
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import UID

from ray_cxr.evaluation import quality
from ray_cxr.imaging import dicom_text
from ray_cxr.labels import NO_FINDING
from ray_cxr.reporting.sr_studies import ImageHeader, ReportContent, ScoringModel

# highdicom logs UIDs, and names of people if they look unusual to it.
logging.getLogger("highdicom").setLevel(logging.CRITICAL + 1)

#: Raised whenever the same scores would give another document.
FORMAT = 2
#: The private coding scheme, for concepts without a public code (PS3.16, 8.2: the designator starts with 99).
SCHEME = "99RAYCXR"
RESEARCH_ONLY = (
    "Research use only, not for diagnosis. Made by a computer program from single images and reviewed by nobody. "
    "Findings are those at or above an operating point. All others have scores only, and none of them has been ruled "
    "out. A probability is of this model on images like those it was calibrated on."
)
MANUFACTURER = "ray-cxr"
SERIES_DESCRIPTION = "ray-cxr findings, research use only"
#: A number that modalities do not reach when they count their series.
SERIES_NUMBER = 9901

_NAMESPACE = uuid.UUID("f2b4cf0c-5f0b-4f3c-9b8a-6f9f3a1f6a52")
#: Attributes of the patient and study modules that every document must have, empty if unknown (type 2).
_REQUIRED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)

#: Codes of the findings, with their sources. Codes of PS3.16 and RadLex are free to use. SNOMED CT codes are used only
#: if DICOM's dictionary has them; others need a licence in some countries. No code is a guess.
CODES: dict[str, Code] = {
    # RadLex 4.3; PS3.16 has only plate-like atelectasis.
    "Atelectasis": Code("RID28493", "RADLEX", "atelectasis"),
    # None in RadLex 4.3; PS3.16 gives SCT 287272002 two meanings, one an enlarged septal foramen of the heart.
    "Cardiomegaly": Code("CARDIOMEGALY", SCHEME, "Cardiomegaly"),
    # RadLex 4.3; none in PS3.16.
    "Consolidation": Code("RID43255", "RADLEX", "consolidation"),
    # PS3.16, CID 3700, Cath Diagnosis.
    "Edema": Code("19242006", "SCT", "Pulmonary edema"),
    # PS3.16, CID 8134, Anatomic Structure.
    "Effusion": Code("60046008", "SCT", "Pleural effusion"),
    # RadLex 4.3; PS3.16 has only mediastinal emphysema.
    "Emphysema": Code("RID4799", "RADLEX", "emphysema"),
    # PS3.16 has fibrosis of any organ (CID 6335 to 6338, of prostate MRI), so the finding site is the lung.
    "Fibrosis": Code("112674009", "SCT", "Fibrosis"),
    # None in PS3.16; none in RadLex that could be verified.
    "Hernia": Code("HERNIA", SCHEME, "Hernia"),
    # PS3.16, CID 6102, Chest Finding or Feature Modifier; also Mass, Nodule and Pneumothorax. CID 6101, Chest Finding
    # or Feature, has only classes such as abnormal opacity.
    "Infiltration": Code("112121", "DCM", "Infiltrate"),
    "Mass": Code("4147007", "SCT", "Mass"),
    "Nodule": Code("27925004", "SCT", "Nodule"),
    # None in PS3.16 or RadLex 4.3.
    "Pleural_Thickening": Code("PLEURALTHICK", SCHEME, "Pleural thickening"),
    # RadLex 4.3; none in PS3.16.
    "Pneumonia": Code("RID5350", "RADLEX", "pneumonia"),
    "Pneumothorax": Code("36118008", "SCT", "Pneumothorax"),
    # An output of the model, which is never written as a finding.
    NO_FINDING: Code("NO_FINDING", SCHEME, "None of the findings"),
}
#: PS3.16, CID 4031, Common Anatomic Region, and CID 4, Anatomic Region.
CHEST, LUNG = Code("816094009", "SCT", "Chest"), Code("39607008", "SCT", "Lung")

PROBABILITY = Code("122157", "DCM", "Probability")
UNCALIBRATED = Code("UNCALIBRATED", SCHEME, "Output of the model, not calibrated")
OPERATING_POINT = Code("OPERATING_POINT", SCHEME, "Operating point, on the output that is not calibrated")
CALIBRATION = Code("CALIBRATED", SCHEME, "Calibrated")
# FLAG, FLAGGED, NOT_FLAGGED, TOP_FINDING and PRIORITY were codes of format 1; PRIORITY had another definition.
ABNORMALITY = Code("ABNORMALITY", SCHEME, "Abnormality, 0 to 1, for ranking images")
PRIORITY = Code("READ_PRIORITY", SCHEME, "Reading priority, 0 to 1, for ranking images")
QUALITY = Code("QUALITY", SCHEME, "Why the image may be unlike those of the training")
_QUALITY_CODES = (
    Code("INVERTED", SCHEME, "Black and white are exchanged"),
    Code("LATERAL", SCHEME, "Lateral view"),
    Code("NOT_FRONTAL", SCHEME, "Not like a frontal chest radiograph"),
    Code("REORIENTED", SCHEME, "Turned or mirrored according to its Patient Orientation"),
    Code("DISPLAY_FALLBACK", SCHEME, "Shown without header values that hide it"),
    Code("OUT_OF_DISTRIB", SCHEME, "Features unlike those of the training"),
    Code("AGE_OUTSIDE", SCHEME, "Age outside that of the training"),
    Code("BURNED_IN", SCHEME, "Text may be burned into the pixels"),
)
#: A Code Value has at most 16 characters.
_SHORT_NAMES = {"Pleural_Thickening": "PLEURALTHICK"}
QUALITY_CODES = dict(zip(quality.FLAGS, _QUALITY_CODES, strict=True))
_COMMENT = Code("121106", "DCM", "Comment")
#: Not in CID 100, which can be extended: its only code for radiography is of an unspecified body region. It says
#: nothing about the number of views. Compared with lists of two vendors that use LOINC.
_PROCEDURE = Code("30745-4", "LN", "XR Chest Views")
_NO_UNITS = Code("1", "UCUM", "no units")


def build_document(content: ReportContent) -> tuple[str, bytes] | str:
    """Return a document's UID and bytes. If its header is unusable, return only the type of the error, as its message
    quotes the header.
    """
    try:
        with pydicom.config.disable_value_validation():  # keep values of a header, even if they are invalid
            document = _build(content)
            buffer = io.BytesIO()
            document.save_as(buffer, enforce_file_format=True)
        return str(document.SOPInstanceUID), buffer.getvalue()
    except Exception as error:
        return type(error).__name__


def derive_uid(content: ReportContent) -> str:
    """Derive a document's UID from everything but the time and the patient's and study's data."""
    model, images = content.model, content.images
    scoring = (model.digest, model.version, model.thresholds)
    instances = [image.instance for image in images]
    replaced = sorted(document.instance for document in content.replaced)
    return make_uid("report", FORMAT, images[0].study, *scoring, content.missing, instances, content.values, replaced)


def make_uid(*content: object) -> str:
    """Derive a UID from content: 2.25 and a name-based UUID (PS3.5, B.2; RFC 4122, version 5)."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, json.dumps(content)).int}"


def _build(content: ReportContent) -> Dataset:
    model, images, missing = content.model, content.images, content.missing
    study, uid = images[0].study, derive_uid(content)
    groups = [
        group
        for number, (image, values) in enumerate(zip(images, content.values, strict=True), 1)
        for group in _build_groups(model, image, values, uid, number)
    ]
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=make_uid("device", model.digest),
        name=f"ray-cxr {model.version}, model {model.digest[:16]}",
        manufacturer_name=MANUFACTURER,
        model_name=model.name,
        serial_number=model.digest,
    )
    observer = sr.ObserverContext(Code("121007", "DCM", "Device"), observer_identifying_attributes=device)
    context = sr.ObservationContext(observer_device_context=observer)
    report = sr.MeasurementReport(context, procedure_reported=_PROCEDURE, imaging_measurements=groups)
    root = report[0]
    items = root.ContentSequence
    # Before the measurements, so that every reader sees it first.
    comment = sr.TextContentItem(_COMMENT, RESEARCH_ONLY, relationship_type=sr.RelationshipTypeValues.CONTAINS)
    items.insert(len(items) - 1, comment)
    # The constructor gets an empty tree, because it walks the tree four times to check references and 3D coordinates,
    # which doubles the time. All references are in the evidence, and there are no 3D coordinates.
    root.ContentSequence = sr.ContentSequence(is_root=False)
    when = local_time(model.finished, images[0])
    scheme = CodingSchemeIdentificationItem(SCHEME, name="ray-cxr private codes", responsible_organization="ray-cxr")
    document = sr.ComprehensiveSR(
        evidence=[_describe_image(image) for image in images],
        content=root,
        series_instance_uid=make_uid("series", study, model.digest),
        series_number=SERIES_NUMBER,
        sop_instance_uid=uid,
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=model.name,
        software_versions=(f"ray-cxr {model.version}", f"model {model.digest[:16]}"),
        device_serial_number=model.digest,
        series_description=SERIES_DESCRIPTION,
        content_date=when.date(),
        content_time=when.time(),
        coding_schemes=[scheme],
        is_complete=not missing,
        is_final=False,
        is_verified=False,
        previous_versions=[_describe_image(document) for document in content.replaced] or None,
    )
    document.ContentSequence = items
    if missing:
        total = missing + len(images)
        document.CompletionFlagDescription = f"{missing} of {total} images are not in this document"
    document.InstanceCreationDate, document.InstanceCreationTime = document.ContentDate, document.ContentTime
    for tool in document.ContributingEquipmentSequence:  # highdicom writes the current time
        tool.ContributionDateTime = f"{when:%Y%m%d%H%M%S}"
    add_patient_and_study(document, images[0])
    return document


def add_patient_and_study(document: Dataset, image: ImageHeader) -> None:
    """Copy patient and study from an image's header into a document; required values that it lacks are empty."""
    for keyword in _REQUIRED:
        setattr(document, keyword, None)
    header = _read_copied(image)
    dicom_text.add_elements(document, dicom_text.copy_elements(header, header.keys()))


def _read_copied(image: ImageHeader) -> Dataset:
    return pydicom.dcmread(io.BytesIO(image.copied), force=True)


def _describe_image(image: ImageHeader) -> Dataset:
    """Return the reference to an image or document. It has no patient's name, which highdicom logs if it is unusual."""
    evidence = Dataset()
    evidence.StudyInstanceUID, evidence.SeriesInstanceUID = image.study, image.series
    evidence.SOPInstanceUID, evidence.SOPClassUID = image.instance, UID(image.sop_class)
    for keyword in _REQUIRED:
        setattr(evidence, keyword, "")
    return evidence


def local_time(when: datetime.datetime, image: ImageHeader) -> datetime.datetime:
    """Return a time without zone, as DICOM stores it, in the time zone of the image or else of this machine."""
    offset = str(_read_copied(image).get("TimezoneOffsetFromUTC") or "").strip()
    is_valid = re.fullmatch(r"[+-](0[0-9]|1[0-4])[0-5][0-9]", offset)
    zone = datetime.datetime.strptime(offset, "%z").tzinfo if is_valid else None
    return when.astimezone(zone).replace(tzinfo=None)


def _build_groups(
    model: ScoringModel, image: ImageHeader, values: dict[str, Any], uid: str, number: int
) -> Iterator[sr.MeasurementsAndQualitativeEvaluations]:
    """Yield the measurement groups of an image: one for the whole image, then one per flagged finding."""

    def group(
        name: str, finding: str | None, measurements: list[sr.Measurement], **more: Any
    ) -> sr.MeasurementsAndQualitativeEvaluations:
        return sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(uid=make_uid("group", uid, name), identifier=name),
            finding_type=None if finding is None else CODES[finding],
            finding_sites=[sr.FindingSite(LUNG if finding == "Fibrosis" else CHEST)],
            measurements=measurements,
            source_images=[sr.SourceImageForMeasurementGroup(UID(image.sop_class), image.instance)],
            **more,
        )

    flagged, scores = [], []
    for j, finding in enumerate(model.findings):
        p, c, threshold = values["p"][j], values["c"][j], model.thresholds[j]
        if values["flags"][j] != 1 or finding == NO_FINDING:
            scores += [_measure(code, value) for code, value in zip(_name_scores(finding), (c, p), strict=True)]
            continue
        measurements = [
            _measure(PROBABILITY, c, method=CALIBRATION),
            _measure(UNCALIBRATED, p),
            _measure(OPERATING_POINT, threshold),
        ]
        algorithm = _identify_algorithm(model)
        flagged.append(group(f"Image {number}, {finding}", finding, _drop_none(measurements), algorithm_id=algorithm))
    ranks = [_measure(code, values[key]) for code, key in ((ABNORMALITY, "abnormality"), (PRIORITY, "priority"))]
    flag = values["quality_flag"]
    yield group(
        f"Image {number}",
        None,
        _drop_none([*ranks, *scores]),
        qualitative_evaluations=[] if flag is None else [sr.QualitativeEvaluation(QUALITY, QUALITY_CODES[flag])],
        algorithm_id=_identify_algorithm(model, with_parameters=True),
    )
    yield from flagged


def _identify_algorithm(model: ScoringModel, *, with_parameters: bool = False) -> sr.AlgorithmIdentification:
    points = [
        f"{name}: flagged from {threshold!r} on the output that is not calibrated"
        for name, threshold in zip(model.findings, model.thresholds, strict=True)
        if threshold is not None
    ]
    return sr.AlgorithmIdentification(
        name=model.name,
        version=f"ray-cxr {model.version}, model {model.digest}",
        manufacturer=MANUFACTURER,
        parameters=points if with_parameters and points else None,
    )


def _name_scores(finding: str) -> tuple[Code, Code]:
    """Return concept names of the calibrated probability and of the raw output of a finding that is not reported."""
    short, name = _SHORT_NAMES.get(finding, finding).upper(), finding.replace("_", " ")
    return (
        Code(f"C_{short}", SCHEME, f"{name}, score only: calibrated probability"),
        Code(f"P_{short}", SCHEME, f"{name}, score only: output, not calibrated"),
    )


def _measure(name: Code, value: float | None, method: Code | None = None) -> sr.Measurement | None:
    return None if value is None else sr.Measurement(name=name, value=float(value), unit=_NO_UNITS, method=method)


def _drop_none(measurements: list[sr.Measurement | None]) -> list[sr.Measurement]:
    return [measurement for measurement in measurements if measurement is not None]
