"""A night of a PACS as DICOM files: real chest radiographs of ../shared, or phantoms without it.

    instances = make_night("20260105", 200)          # one image is damaged, one is a knee, two are laterals
    instances += make_documents("20260105")          # an SR and a Secondary Capture in the first study

The benchmark and the tests use the same files. Equal arguments give equal bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

sys.path.insert(0, str(Path(__file__).parent / "imaging"))
from test_dicom import jpeg_lossless

SHARED = Path(__file__).parents[2] / "shared"
#: Text that no log, error or address may contain.
SECRET = "Doe^Jane"
DX, SR, CAPTURE = uid.DigitalXRayImageStorageForPresentation, uid.BasicTextSRStorage, uid.SecondaryCaptureImageStorage
#: Images of a study, and studies of a patient in a night.
PER_STUDY, STUDIES = 2, 2
PATIENTS = 50
#: Numbers of the images that differ from the others.
BROKEN, KNEE, LATERALS = 7, 11, (5, 13)
#: Numbers of the images with the pixels of a real DICOM file: 1024 x 1024, JPEG baseline and uncompressed.
REAL = {
    20: "cr_chest_monochrome1_jpeg.dcm",
    21: "cr_chest_monochrome2_jpeg.dcm",
    22: "nih_00000001_000.dcm",
    23: "nih_00000002_000.dcm",
}
#: Transfer syntax by the last digit of the number; the others are Explicit VR Little Endian.
SYNTAXES = {
    1: uid.JPEG2000Lossless,
    3: uid.JPEGLosslessSV1,
    4: uid.JPEG2000,
    6: uid.RLELossless,
    7: uid.JPEG2000Lossless,
    9: uid.ImplicitVRLittleEndian,
}


@dataclass(frozen=True)
class Source:
    """The pixels of a radiograph, uint8[H, W], and its view."""

    pixels: np.ndarray
    view: str


@dataclass(frozen=True)
class Instance:
    """One DICOM file and the values of its header that a test checks.

    Attributes:
        kind: `frontal`, `lateral`, `knee`, `broken`, `SR` or `capture`.
    """

    kind: str
    uid: str
    study: str
    series: str
    patient: str
    age: int
    sex: str
    view: str
    data: bytes

    @property
    def path(self) -> str:
        """Path below the root of DICOMweb."""
        return f"studies/{self.study}/series/{self.series}/instances/{self.uid}"


def read_sources(first: int, count: int, size: int = 256) -> Iterator[Source]:
    """Yield `count` radiographs of NIH from the number `first` on, or phantoms of `size` pixels without ../shared.

    Args:
        size: side of the images: 256 (540 exist) or 1024 (208 exist); numbers above start again from the first.
    """
    folder = SHARED / "nih" / f"images{size}"
    if folder.is_dir():
        names = sorted(path.name for path in folder.glob("*.png"))
        with gzip.open(SHARED / "nih" / "meta" / "Data_Entry_2017_v2020.csv.gz", "rt", encoding="utf-8") as stream:
            rows = {row["Image Index"]: row for row in csv.DictReader(stream) if row["Image Index"] in set(names)}
        for name in (names[number % len(names)] for number in range(first, first + count)):
            with Image.open(folder / name) as image:
                pixels = np.asarray(image.convert("L"))
            yield Source(pixels, rows[name]["View Position"])
        return
    from ray_cxr.imaging.phantom_anatomy import sample_anatomy
    from ray_cxr.imaging.phantom_findings import draw_phantom

    for number in range(first, first + count):
        chest = sample_anatomy(0, number + 1, 0, size=size)
        yield Source(draw_phantom(chest, ()), chest.view)


def make_night(date: str, count: int, *, first: int = 0, size: int = 256, plain: bool = False) -> list[Instance]:
    """Return the radiographs of a date, YYYYMMDD, numbered from `first`.

    Two images make a study, and two studies belong to a patient. Other numbers give other images and UIDs; the
    50 patients of the first 200 numbers come again after them. Ages and sexes are invented per patient.

    Args:
        plain: all images are frontal, of 8 bits and intact, and none is lossless JPEG, which takes long to encode here.
    """
    special, night = not plain, []
    for number, source in enumerate(read_sources(first, count, size), first):
        study = number // PER_STUDY
        patient = study // STUDIES % PATIENTS
        kind = (special and {BROKEN: "broken", KNEE: "knee", **dict.fromkeys(LATERALS, "lateral")}.get(number)) or ""
        view = "LL" if kind == "lateral" else source.view
        header = _make_header(date, study, patient, number)
        header.ViewPosition, header.BodyPartExamined = view, "KNEE" if kind == "knee" else "CHEST"
        if special and (SHARED / "dicom" / REAL.get(number, "no file")).is_file():
            _copy_pixels(header, SHARED / "dicom" / REAL[number])
        else:
            syntax = SYNTAXES.get(number % 10)
            if plain and syntax == uid.JPEGLosslessSV1:
                syntax = None
            _set_pixels(header, source.pixels, syntax, inverted=special and number % 10 == 2)
        if kind == "broken":
            _damage(header)
        night.append(_as_instance(kind or "frontal", header))
    return night


def make_documents(date: str) -> list[Instance]:
    """Return an SR and a Secondary Capture of another maker in the study of the first image of a night."""
    report = _make_header(date, 0, 0, "report")
    report.Modality, report.SOPClassUID = "SR", SR
    report.ValueType, report.ContinuityOfContent = "CONTAINER", "SEPARATE"
    report.CompletionFlag, report.VerificationFlag, report.ContentSequence = "PARTIAL", "UNVERIFIED", []
    report.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    capture = _make_header(date, 0, 0, "capture")
    capture.Modality, capture.SOPClassUID, capture.ConversionType = "OT", CAPTURE, "WSD"
    _set_pixels(capture, next(read_sources(0, 1)).pixels, None, inverted=False)
    for document in (report, capture):
        document.file_meta.MediaStorageSOPClassUID = document.SOPClassUID
    return [_as_instance("SR", report), _as_instance("capture", capture)]


def _make_header(date: str, study: int, patient: int, number: int | str) -> Dataset:
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = DX
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = _make_uid("instance", date, number)
    header.StudyInstanceUID = _make_uid("study", date, study)
    header.SeriesInstanceUID = _make_uid("series", date, number)
    header.PatientID, header.PatientName, header.PatientBirthDate = f"P{patient:04d}", SECRET, ""
    header.PatientSex, header.PatientAge = "FM"[patient % 2], f"{20 + patient:03d}Y"
    header.StudyDate, header.StudyTime, header.AccessionNumber = date, "200000", f"A{date[4:]}{study:04d}"
    header.StudyID, header.SeriesNumber, header.InstanceNumber = str(study), 1, 1
    header.Modality, header.Manufacturer, header.ReferringPhysicianName = "DX", "", ""
    header.PresentationIntentType = "FOR PRESENTATION"
    return header


def _make_uid(*words: object) -> str:
    return uid.generate_uid(entropy_srcs=[str(word) for word in words])


def _set_pixels(header: Dataset, pixels: np.ndarray, syntax: str | None, *, inverted: bool) -> None:
    """Add pixels, uint8[H, W]; `inverted` stores them as MONOCHROME1 with 12 bits."""
    header.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    header.Rows, header.Columns = pixels.shape
    header.SamplesPerPixel, header.PixelRepresentation = 1, 0
    header.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    bits = 12 if inverted else 8
    header.BitsAllocated, header.BitsStored, header.HighBit = 16 if inverted else 8, bits, bits - 1
    stored = (4095 - pixels.astype("<u2") * 16) if inverted else pixels
    header.PixelData = np.ascontiguousarray(stored).tobytes()
    header["PixelData"].VR = "OW" if inverted else "OB"
    if syntax == uid.JPEGLosslessSV1:
        header.PixelData = encapsulate([jpeg_lossless(pixels, 8)])
        header["PixelData"].is_undefined_length = True
        header.file_meta.TransferSyntaxUID = syntax
    elif syntax == uid.ImplicitVRLittleEndian:
        header.file_meta.TransferSyntaxUID = syntax
    elif syntax:
        options: dict[str, Any] = {"j2k_cr": [10]} if syntax == uid.JPEG2000 else {}
        header.compress(syntax, generate_instance_uid=False, **options)


def _copy_pixels(header: Dataset, path: Path) -> None:
    real = pydicom.dcmread(path)
    for element in real:
        if element.tag.group in (0x0028, 0x7FE0):
            header.add(element)
    header.file_meta.TransferSyntaxUID = real.file_meta.TransferSyntaxUID


def _damage(header: Dataset) -> None:
    """Keep the start of the compressed image only; the file itself stays valid, so that a PACS stores it."""
    frame = next(pydicom.encaps.generate_frames(header.PixelData, number_of_frames=1))
    header.PixelData = encapsulate([frame[:200]])
    header["PixelData"].is_undefined_length = True


def _as_instance(kind: str, header: Dataset) -> Instance:
    out = io.BytesIO()
    header.save_as(out, enforce_file_format=True)
    identity = (header.SOPInstanceUID, header.StudyInstanceUID, header.SeriesInstanceUID, header.PatientID)
    age, view = int(header.PatientAge[:3]), header.get("ViewPosition", "")
    return Instance(kind, *map(str, identity), age, header.PatientSex, view, out.getvalue())
