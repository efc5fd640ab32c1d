"""`export-sr`: what was found on DICOM radiographs as DICOM Structured Reports, which a PACS keeps beside the images.

One document per study, because radiologists read studies: a Comprehensive SR after TID 1500, Measurement Report (DICOM
PS3.16), that refers to every image of the study that was scored. In it, per image,

- a measurement group (TID 1501) with the image's priority, top finding and quality flag;
- a measurement group per finding: its code, the calibrated probability where there is one, the network's own, the
  operating point, and whether the image is flagged there.

The observer is a device. Its UID is derived from the model's digest: another training, quantisation or calibration is
another device. Nobody has verified a document, and each says so (VerificationFlag, PreliminaryFlag, and in words).

    OUT/<SOP Instance UID>.dcm     the documents
    OUT/images.parquet             per row of the scores: what became of it, and in which document it is
    OUT/export.json                counts
    OUT/settings.json              what another run must agree with to continue here
    OUT/_SUCCESS                   last, where no image failed

All UIDs come out of what a document says and never out of a clock or a die (see `_uid`): the same scores give the same
files under the same names, and a PACS that gets them twice keeps one. Documents hold the patient's name and ids, copied
from the image's header (`_COPIED`); nothing else here does, neither a file's name nor a message.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pydicom.config
from highdicom import sr
from highdicom.base import CodingSchemeIdentificationItem
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import UID

from ray_cxr.data import identity
from ray_cxr.errors import ErrorRateExceeded, ImageError, InputError, OutputError, RayCxrError, TableError
from ray_cxr.evaluation import quality
from ray_cxr.imaging import dicom_text
from ray_cxr.imaging.dicom import looks_like_dicom
from ray_cxr.imaging.pixels import decoder_errors
from ray_cxr.labels import LABELS
from ray_cxr.progress import Progress
from ray_cxr.storage import atomic
from ray_cxr.storage.archives import read_members
from ray_cxr.storage.paths import file_name, split_member
from ray_cxr.storage.run_folder import check_run, create_run
from ray_cxr.storage.stores import open_stream

# It logs UIDs, and people's names where they look odd to it.
logging.getLogger("highdicom").setLevel(logging.CRITICAL + 1)

KIND = "export-sr"
#: Raised whenever the same scores would give another document.
FORMAT = 1
#: The private coding scheme, for what no public one says (PS3.16, 8.2: a designator that begins with 99).
SCHEME = "99RAYCXR"
RESEARCH_ONLY = (
    "Research use only, not for diagnosis. Made by a computer program from single images and reviewed by nobody. "
    "A probability is of this model on images like those it was calibrated on; a finding below its operating point "
    "has not been ruled out."
)
MANUFACTURER = "ray-cxr"
SERIES_DESCRIPTION = "ray-cxr findings, research use only"
#: Away from the numbers that modalities give.
SERIES_NUMBER = 9901

#: What becomes of a row of the scores.
EXPORTED, NOT_SCORED, NOT_DICOM, REPEATED, FAILED = "exported", "not_scored", "not_dicom", "repeated", "failed"
WORDS = {
    EXPORTED: "images exported",
    NOT_SCORED: "left out, because they could not be scored",
    NOT_DICOM: "left out, because they are not DICOM",
    REPEATED: "left out, because another row has the same image (SOP Instance UID)",
}

_NAMESPACE = uuid.UUID("f2b4cf0c-5f0b-4f3c-9b8a-6f9f3a1f6a52")
_ROOM_FOR_HEADER = 64 * 1024 * 1024
_FETCH_BYTES = 64 * 1024
#: Files named so are taken for what they are named, and not opened.
_PICTURES = (".png", ".jpg", ".jpeg")
#: A header of a store is a request, and most of it is waiting.
_THREADS, _ROWS_AT_ONCE = 8, 512
#: From so many documents on, the seconds that other processes need to start are saved.
_MANY, _PROCESSES = 100, 32

#: What is copied from an image's header into its study's document: Patient, Patient Study and General Study modules
#: (PS3.3, C.7.1.1, C.7.2.2, C.7.2.1), as far as they tell whose images these are and which study.
_COPIED = (
    "SpecificCharacterSet",
    "TimezoneOffsetFromUTC",
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "IssuerOfPatientIDQualifiersSequence",
    "TypeOfPatientID",
    "OtherPatientIDsSequence",
    "PatientBirthDate",
    "PatientBirthTime",
    "PatientSex",
    "PatientAge",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "LongitudinalTemporalInformationModified",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "IssuerOfAccessionNumberSequence",
    "ReferringPhysicianName",
)
#: Attributes of these modules that must stand in every document, empty where the image has none (type 2).
_REQUIRED = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)
#: Of these modules the one element that archives write wrongly and a document can do without (PS3.5, 6.2, AS).
_AGE = re.compile(r"[0-9]{3}[DWMY]")
_UID_TEXT = re.compile(r"[0-9]+(\.[0-9]+)+")


# ---------------------------------------------------------------- codes


@dataclass(frozen=True)
class Coded:
    """A finding's code and where it was looked up.

    Attributes:
        source: `PS3.16` for codes of DICOM's own dictionary, which are free for use in DICOM; `RadLex 4.3`, free as
            well; or why there is none and the private scheme stands in.
    """

    finding: str
    value: str
    scheme: str
    meaning: str
    source: str

    @property
    def code(self) -> Code:
        return Code(self.value, self.scheme, self.meaning)


#: SNOMED CT only as far as DICOM's dictionary has it: beyond, it needs a licence in some countries. None is guessed.
CODES: dict[str, Coded] = {
    row.finding: row
    for row in (
        Coded("Atelectasis", "RID28493", "RADLEX", "atelectasis", "RadLex 4.3; PS3.16 has the plate-like one alone"),
        Coded(
            "Cardiomegaly",
            "CARDIOMEGALY",
            SCHEME,
            "Cardiomegaly",
            "none in RadLex 4.3; PS3.16 gives SCT 287272002 two meanings, one an enlarged septal foramen of the heart",
        ),
        Coded("Consolidation", "RID43255", "RADLEX", "consolidation", "RadLex 4.3; none in PS3.16"),
        Coded("Edema", "19242006", "SCT", "Pulmonary edema", "PS3.16, CID 3700"),
        Coded("Effusion", "60046008", "SCT", "Pleural effusion", "PS3.16, CID 8134"),
        Coded("Emphysema", "RID4799", "RADLEX", "emphysema", "RadLex 4.3; PS3.16 has the mediastinal one alone"),
        Coded("Fibrosis", "112674009", "SCT", "Fibrosis", "PS3.16, CID 6335"),
        Coded("Hernia", "HERNIA", SCHEME, "Hernia", "none in PS3.16; none in RadLex that could be verified"),
        Coded("Infiltration", "112121", "DCM", "Infiltrate", "PS3.16, CID 6102, Chest Finding or Feature"),
        Coded("Mass", "4147007", "SCT", "Mass", "PS3.16, CID 6102, Chest Finding or Feature"),
        Coded("Nodule", "27925004", "SCT", "Nodule", "PS3.16, CID 6102, Chest Finding or Feature"),
        Coded("Pleural_Thickening", "PLEURALTHICK", SCHEME, "Pleural thickening", "none in PS3.16 or RadLex 4.3"),
        Coded("Pneumonia", "RID5350", "RADLEX", "pneumonia", "RadLex 4.3; none in PS3.16"),
        Coded("Pneumothorax", "36118008", "SCT", "Pneumothorax", "PS3.16, CID 6102, Chest Finding or Feature"),
        Coded("No_Finding", "NO_FINDING", SCHEME, "None of the findings", "an output of the network, no observation"),
    )
}

PROBABILITY = Code("122157", "DCM", "Probability")
UNCALIBRATED = Code("UNCALIBRATED", SCHEME, "Output of the network, not calibrated")
OPERATING_POINT = Code("OPERATING_POINT", SCHEME, "Operating point, on the output that is not calibrated")
CALIBRATION = Code("CALIBRATED", SCHEME, "Calibrated")
FLAG = Code("FLAG", SCHEME, "Against the operating point")
FLAGGED = Code("FLAGGED", SCHEME, "Flagged: at or above the operating point")
NOT_FLAGGED = Code("NOT_FLAGGED", SCHEME, "Not flagged: below the operating point")
PRIORITY = Code("PRIORITY", SCHEME, "Reading priority, 0 to 1; from 0.5 on a finding is flagged")
TOP_FINDING = Code("TOP_FINDING", SCHEME, "Finding with the highest rank")
QUALITY = Code("QUALITY", SCHEME, "Why the image may be unlike those of the training")
#: The quality flags of a score table, gravest first.
QUALITY_CODES: dict[str, Code] = dict(
    zip(
        quality.FLAGS,
        (
            Code("INVERTED", SCHEME, "Black and white are exchanged"),
            Code("LATERAL", SCHEME, "Lateral view"),
            Code("NOT_FRONTAL", SCHEME, "Not like a frontal chest radiograph"),
            Code("OUT_OF_DISTRIB", SCHEME, "Features unlike those of the training"),
            Code("AGE_OUTSIDE", SCHEME, "Age outside that of the training"),
        ),
        strict=True,
    )
)
_COMMENT = Code("121106", "DCM", "Comment")
_PROCEDURE = Code("43468-8", "LN", "XR unspecified body region")
_NO_UNITS = Code("1", "UCUM", "no units")


# ---------------------------------------------------------------- what goes in and what comes out


@dataclass
class Export:
    """What an export found and did.

    Attributes:
        rows: rows of the scores.
        outcomes: rows by what became of them: `exported`, `not_scored` (error rows), `not_dicom`, `repeated` (an image
            that another row has already) or `failed`.
        reasons: the failed rows by reason.
        reports: documents that the folder holds of these scores.
        partial: how many of them lack an image of their study.
        written: documents that this run wrote.
        seconds: this run's wall time.
    """

    rows: int
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    reports: int = 0
    partial: int = 0
    written: int = 0
    seconds: float = 0.0

    def raise_for_failures(self) -> None:
        """Raise where an image failed.

        Raises:
            ErrorRateExceeded: one did; none is allowed to, since nobody would miss a report that is not there.
        """
        if self.outcomes[FAILED]:
            reasons = "; ".join(f"{count:,} {reason}" for reason, count in self.reasons.most_common())
            raise ErrorRateExceeded(
                f"{self.outcomes[FAILED]:,} of {self.outcomes[FAILED] + self.outcomes[EXPORTED]:,} images could not be "
                f"exported ({reasons}); all others are; images.parquet names them, and the same command tries again",
                self,
            )


@dataclass(frozen=True)
class _Model:
    """What scored.

    Attributes:
        findings: its outputs, in order.
        thresholds: per finding the operating point on the raw probability, or None.
        backbone: name of the network.
        digest: the bundle's.
        version: of the ray-cxr that scored.
        finished: when it had scored all.
    """

    findings: tuple[str, ...]
    thresholds: tuple[float | None, ...]
    backbone: str
    digest: str
    version: str
    finished: datetime.datetime

    @property
    def name(self) -> str:
        return f"ray-cxr chest radiograph findings, {self.backbone}"[:64]


@dataclass(frozen=True)
class _Scores:
    """A score folder in memory.

    Attributes:
        table: image_id, path, study_id, status, top_finding, priority and quality_flag.
        p, c: float32 [N,F], raw and calibrated, NaN where null.
        flags: int8 [N,F], -1 where null.
        identity: what an output folder must agree with.
        digest: SHA-256 over the files of scores, hex.
    """

    model: _Model
    table: pa.Table
    p: np.ndarray
    c: np.ndarray
    flags: np.ndarray
    identity: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class _Image:
    """What an image's header gives.

    Attributes:
        patient: whose it is, to compare with the other images of the study.
        copied: the elements of `_COPIED`, text byte for byte, as Explicit VR Little Endian.
    """

    study: str
    series: str
    instance: str
    sop_class: str
    patient: tuple[str, ...]
    copied: bytes = field(repr=False)


@dataclass(frozen=True)
class _Job:
    """What becomes one document.

    Attributes:
        images: of one study, in the order of the scores.
        said: per image what the scores say of it, for JSON.
        lacking: images of the study that are not among them.
    """

    model: _Model
    images: tuple[_Image, ...]
    said: tuple[dict[str, Any], ...]
    lacking: int


def export_sr(scores: str | Path, out: str | Path) -> Export:
    """Write a structured report for every study of which a DICOM image was scored.

    A run that was stopped, or in which images failed, is repeated by the same call; one that is finished is not.

    Args:
        scores: what `ray-cxr score` left, finished.
        out: the folder for the documents.

    Returns:
        What became of every row. Where some failed, `raise_for_failures` says so.

    Raises:
        InputError: the scores are unfinished or none, or no image in them is DICOM.
        TableError: the score table is damaged.
        OutputError: `out` belongs to other scores, or cannot be written.
    """
    started = time.monotonic()
    out = Path(out)
    found = _read_scores(Path(scores))
    check_run(out, found.identity)
    done = _finished(out, found)
    if done is not None:
        return done
    with _as_it_is():
        images, outcomes, reasons = _look(found)
    if not images and FAILED not in outcomes:
        raise InputError(
            f"{scores}: none of its {len(outcomes):,} rows is a DICOM image that was scored; structured reports refer "
            "to DICOM images: score a folder of DICOM files"
        )
    create_run(out, found.identity)
    try:
        (out / "_SUCCESS").unlink(missing_ok=True)
        export = _write(out, found, images, outcomes, reasons)
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written: {error.strerror or error}; name another") from None
    export.seconds = time.monotonic() - started
    return export


def _finished(out: Path, scores: _Scores) -> Export | None:
    """What an earlier run counted, where it finished with these very scores."""
    if not (out / "_SUCCESS").exists():
        return None
    try:
        record = json.loads((out / "export.json").read_text(encoding="utf-8"))
        if record["scores_digest"] != scores.digest:
            return None
        return Export(
            rows=record["rows"],
            outcomes=Counter(record["outcomes"]),
            reports=record["reports"],
            partial=record["partial"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_scores(path: Path) -> _Scores:
    """A finished score folder.

    Raises:
        InputError: it is none, or is not finished.
        TableError: a file of it is damaged or lacks a column.
    """
    if not (path / "settings.json").is_file():
        raise InputError(f"{path}: is not a folder that `ray-cxr score` wrote; name one")
    if not (path / "_SUCCESS").exists():
        raise InputError(f"{path}: score did not finish; run it again to continue")
    try:
        model = json.loads((path / "model.json").read_text(encoding="utf-8"))
        run = json.loads((path / "run.json").read_text(encoding="utf-8"))
        findings = tuple(model["findings"])
        points = model["operating_points"]
        scorer = _Model(
            findings=findings,
            thresholds=tuple(points[name]["threshold"] if points[name] else None for name in findings),
            backbone=str(model["architecture"]["backbone"]),
            digest=str(model["digest"]),
            version=str(run.get("versions", {}).get("ray-cxr", "unknown")),
            finished=_when(run.get("finished"), path / "run.json"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise TableError(f"{path}: model.json or run.json is missing or damaged; run score again") from None
    if not findings or set(findings) - set(LABELS):
        raise TableError(f"{path}: model.json names findings that are none; run score again with --fresh")
    parts = sorted((path / "scores").glob("part-*.parquet"))
    if not parts:
        raise TableError(f"{path}: holds no scores/part-*.parquet; run score again with --fresh")
    names = ["image_id", "path", "study_id", "status", "top_finding", "priority", "quality_flag"]
    values = [f"{kind}_{name}" for kind in ("p", "c", "flag") for name in findings]
    sink = hashlib.sha256()
    tables = []
    for part in parts:
        try:
            data = part.read_bytes()
            file = pq.ParquetFile(pa.BufferReader(data))
            absent = [name for name in (*names, *values) if name not in file.schema_arrow.names]
            if absent:
                raise TableError(f"{part}: has no column {absent[0]}; remove it and run score again")
            tables.append(file.read(columns=[*names, *values]).select([*names, *values]))
        except (OSError, pa.ArrowException):
            raise TableError(f"{part}: is missing or damaged; remove it and run score again") from None
        sink.update(hashlib.sha256(data).digest())
    table = identity.check_table(pa.concat_tables(tables).combine_chunks(), str(path))
    return _Scores(
        model=scorer,
        table=table.select(names),
        p=_columns(table, "p", findings, np.float32, np.nan),
        c=_columns(table, "c", findings, np.float32, np.nan),
        flags=_columns(table, "flag", findings, np.int8, -1),
        identity={
            "kind": KIND,
            "format": FORMAT,
            "model_digest": scorer.digest,
            "scores": hashlib.sha256((path / "settings.json").read_bytes()).hexdigest(),
        },
        digest=sink.hexdigest(),
    )


def _when(text: str | None, file: Path) -> datetime.datetime:
    """When the scoring ended, with its time zone: as `run.json` says, else when that was written."""
    if text is None:
        return datetime.datetime.fromtimestamp(int(file.stat().st_mtime), datetime.UTC)
    return datetime.datetime.fromisoformat(text).astimezone(datetime.UTC)


def _columns(table: pa.Table, kind: str, findings: Sequence[str], dtype: Any, null: float) -> np.ndarray:
    """Columns `<kind>_<Finding>` as an array [N,F]."""
    whole = np.full((len(table), len(findings)), null, dtype)
    for j, name in enumerate(findings):
        column = table[f"{kind}_{name}"]
        there = column.is_valid().to_numpy(zero_copy_only=False)
        whole[there, j] = column.drop_null().to_numpy(zero_copy_only=False)
    return whole


# ---------------------------------------------------------------- headers


def _look(scores: _Scores) -> tuple[dict[int, _Image], list[str], dict[int, str]]:
    """Read the header of every image that was scored and may be DICOM.

    Returns:
        Per row of a DICOM image what its header gives; what becomes of each row; and why some fail.
    """
    table = scores.table
    paths, studies = table["path"].to_pylist(), table["study_id"].to_pylist()
    outcomes = [NOT_DICOM if status == "ok" else NOT_SCORED for status in table["status"].to_pylist()]
    todo = [
        (row, path)
        for row, (path, outcome) in enumerate(zip(paths, outcomes, strict=True))
        if outcome == NOT_DICOM and path is not None and not file_name(path).lower().endswith(_PICTURES)
    ]
    images: dict[int, _Image] = {}
    reasons: dict[int, str] = {}
    with Progress("read headers", len(todo), unit="files") as progress:
        for row, found in _headers(todo):
            if isinstance(found, _Image) and _is_another(found, studies[row]):
                found = ImageError("corrupt", "the file is of another study than when it was scored")
            if isinstance(found, ImageError):
                outcomes[row], reasons[row] = FAILED, f"{found.code}: {found.message}"
            elif found is not None:
                outcomes[row], images[row] = EXPORTED, found
            progress.advance(1, f"{len(reasons):,} failed")
    for rows in _by_study(images).values():
        if len({images[row].patient for row in rows}) > 1:
            # One document would put what is seen on one patient's image into another's record.
            for row in rows:
                outcomes[row], reasons[row] = FAILED, "corrupt: the images of the study are of different patients"
                del images[row]
    # Within a study: files that were made anonymous badly can share UIDs over patients.
    seen: set[tuple[str, str]] = set()
    for row in sorted(images):
        name = (images[row].study, images[row].instance)
        if name in seen:
            outcomes[row] = REPEATED
            del images[row]
        seen.add(name)
    return images, outcomes, reasons


def _is_another(image: _Image, study: str | None) -> bool:
    """Whether a score row's study_id is a UID, and not this image's. (It can be a pseudonym, or a table's own id.)"""
    return study is not None and _UID_TEXT.fullmatch(study) is not None and study != image.study


def _by_study(images: dict[int, _Image]) -> dict[str, list[int]]:
    """Rows per Study Instance UID, in the order of the scores."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row in sorted(images):
        rows[images[row].study].append(row)
    return rows


def _headers(todo: list[tuple[int, str]]) -> Iterator[tuple[int, _Image | ImageError | None]]:
    """What each file's header gives: an error where it cannot be read, None where it is not DICOM."""
    members: dict[str, dict[str, list[int]]] = {}
    single: list[tuple[int, str]] = []
    for row, path in todo:
        inside = split_member(path)
        if inside is None:
            single.append((row, path))
        else:
            members.setdefault(inside[0], {}).setdefault(inside[1], []).append(row)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="headers") as pool:
        for at in range(0, len(single), _ROWS_AT_ONCE):
            some = single[at : at + _ROWS_AT_ONCE]
            yield from zip((row for row, _ in some), pool.map(_header_of, [path for _, path in some]), strict=True)
    for archive, wanted in members.items():
        reason = ImageError("missing", "the archive holds no such member")
        try:
            for name, content in read_members(archive, frozenset(wanted)):
                found = content if isinstance(content, ImageError) else _header(io.BytesIO(content).read)
                yield from ((row, found) for row in wanted.pop(name))
        except ImageError as error:
            reason = ImageError(error.code, f"the archive: {error.message}")
        yield from ((row, reason) for rows in wanted.values() for row in rows)


def _header_of(path: str) -> _Image | ImageError | None:
    try:
        with open_stream(path) as fetch:
            return _header(fetch)
    except ImageError as error:
        return error


def _header(fetch: Callable[[int], bytes]) -> _Image | ImageError | None:
    """The header of a file that is read as far as its pixels; None where it is not DICOM."""
    try:
        with decoder_errors("DICOM"):
            file = _Head(fetch)
            head = file.read(256)
            if not looks_like_dicom(head):
                return None if head else ImageError("empty", "the file holds 0 bytes")
            file.seek(0)
            ds = pydicom.dcmread(file, stop_before_pixels=True, force=head[128:132] != b"DICM")
            if "Rows" not in ds:
                raise ImageError("truncated", "the DICOM header holds no image")
            return _image(ds)
    except ImageError as error:
        return error


class _Head(io.RawIOBase):
    """The beginning of a stream as a file that can go back, fetched as far as it is asked for."""

    def __init__(self, fetch: Callable[[int], bytes]) -> None:
        self._fetch = fetch
        self._held = bytearray()
        self._at = 0

    def read(self, size: int | None = -1, /) -> bytes:
        end = _ROOM_FOR_HEADER + 1 if size is None or size < 0 else self._at + size
        while len(self._held) < end and (some := self._fetch(_FETCH_BYTES)):
            self._held += some
            if len(self._held) > _ROOM_FOR_HEADER:
                raise ImageError("too_large", f"the DICOM header has more than {_ROOM_FOR_HEADER} bytes")
        found = bytes(self._held[self._at : end])
        self._at += len(found)
        return found

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_END:
            self._at = len(self._held)
            self.read()
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._held)}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _image(ds: Dataset) -> _Image:
    """Raises: ImageError: a UID is missing that a report must give."""
    uids = {}
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"):
        value = str(ds.get(keyword) or "")
        if not _UID_TEXT.fullmatch(value) or len(value) > 64:
            raise ImageError("corrupt", f"the DICOM header gives no usable {keyword}")
        uids[keyword] = value
    if not dicom_text.writes_ascii(ds):
        raise ImageError("corrupt", "the DICOM header declares a character set that DICOM does not define")
    # Before anything else looks at the text, since pydicom keeps what it decoded.
    copied = dicom_text.copy_elements(ds, _COPIED)
    patient = (dicom_text.read_identity(ds, "PatientID"), dicom_text.read_identity(ds, "IssuerOfPatientID"))
    if not patient[0]:  # then the name must do
        patient = ("", dicom_text.read_identity(ds, "PatientName").strip("^ "))
    if "PatientAge" in copied and not _AGE.fullmatch(str(ds.PatientAge)):
        del copied.PatientAge
    buffer = io.BytesIO()
    copied.save_as(buffer, implicit_vr=False, little_endian=True)
    return _Image(
        study=uids["StudyInstanceUID"],
        series=uids["SeriesInstanceUID"],
        instance=uids["SOPInstanceUID"],
        sop_class=uids["SOPClassUID"],
        patient=patient,
        copied=buffer.getvalue(),
    )


@contextlib.contextmanager
def _as_it_is() -> Iterator[None]:
    """For a whole export, since pydicom keeps this for all threads: a hospital's values are copied as they are, also
    where the standard would not allow them, because the PACS has them so."""
    before = pydicom.config.settings.writing_validation_mode
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    try:
        yield
    finally:
        pydicom.config.settings.writing_validation_mode = before


# ---------------------------------------------------------------- documents


def _write(
    out: Path, scores: _Scores, images: dict[int, _Image], outcomes: list[str], reasons: dict[int, str]
) -> Export:
    """Write the documents and, last, what was done."""
    before = _earlier(out)
    reports: list[str | None] = [None] * len(outcomes)
    export = Export(rows=len(outcomes))
    rows_of = _rows_by_study_id(scores)
    studies = list(_by_study(images).values())
    jobs = [
        _Job(
            scores.model,
            tuple(images[row] for row in rows),
            tuple(_values(scores, row) for row in rows),
            _lacking(rows, rows_of, scores, outcomes),
        )
        for rows in studies
    ]
    with Progress("write reports", len(studies), unit="reports") as progress:
        for rows, job, made in zip(studies, jobs, _made(jobs), strict=True):
            for row in rows:
                if isinstance(made, str):
                    outcomes[row], reasons[row] = FAILED, f"corrupt: no report can be made with its header ({made})"
                else:
                    reports[row] = made[0]
            if not isinstance(made, str):
                export.written += _put(out / f"{made[0]}.dcm", made[1])
                export.reports += 1
                export.partial += job.lacking > 0
            progress.advance(1)
    export.outcomes.update(outcomes)
    export.reasons.update(reasons.values())
    # What an earlier run wrote of the same images, when others of their studies could not be read.
    now = {report for report in reports if report is not None}
    for old in {before[row] for row, report in enumerate(reports) if report is not None and row in before} - now:
        (out / f"{old}.dcm").unlink(missing_ok=True)
    table = pa.table(
        {
            "image_id": scores.table["image_id"],
            "outcome": pa.array(outcomes, pa.string()),
            "reason": pa.array([reasons.get(row) for row in range(len(outcomes))], pa.string()),
            "report": pa.array(reports, pa.string()),
        }
    )
    atomic.write_parquet(table, out / "images.parquet")
    atomic.write_json(
        out / "export.json",
        {
            "rows": export.rows,
            "outcomes": dict(sorted(export.outcomes.items())),
            "reasons": dict(sorted(export.reasons.items())),
            "reports": export.reports,
            "partial": export.partial,
            "scores_digest": scores.digest,
            "model_digest": scores.model.digest,
        },
    )
    if not export.outcomes[FAILED]:
        atomic.write_text(out / "_SUCCESS", "")
    return export


def _earlier(out: Path) -> dict[int, str]:
    """Per row the document that an earlier run in this folder put it into."""
    try:
        column = pq.read_table(out / "images.parquet", columns=["report"])["report"].to_pylist()
    except (OSError, KeyError, pa.ArrowException):
        return {}
    return {row: report for row, report in enumerate(column) if report and _UID_TEXT.fullmatch(report)}


def _rows_by_study_id(scores: _Scores) -> dict[str, list[int]]:
    """Rows per study_id of the scores, whatever kind of id that is."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, study in enumerate(scores.table["study_id"].to_pylist()):
        if study is not None:
            rows[study].append(row)
    return rows


def _lacking(rows: list[int], rows_of: dict[str, list[int]], scores: _Scores, outcomes: list[str]) -> int:
    """How many rows of the scores belong to these images' study and are in no document."""
    ids = {scores.table["study_id"][row].as_py() for row in rows} - {None}
    return sum(outcomes[row] in (NOT_SCORED, FAILED, NOT_DICOM) for study in ids for row in rows_of[study])


def _put(path: Path, data: bytes) -> bool:
    """Write a document unless it is there already."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return False
    atomic.write(path, lambda part: _write_bytes(part, data))
    return True


def _write_bytes(part: Path, data: bytes) -> None:
    part.write_bytes(data)


def _made(jobs: Sequence[_Job]) -> Iterator[tuple[str, bytes] | str]:
    """The name and bytes of every document in turn, made by all CPUs where there are many."""
    if len(jobs) < _MANY:
        yield from map(_make, jobs)
        return
    # Processes, since it is all Python; new ones, since threads of other libraries do not survive a fork.
    pool = ProcessPoolExecutor(
        min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _PROCESSES),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is for the command, which ends them
    )
    try:
        for at in range(0, len(jobs), _ROWS_AT_ONCE):
            yield from pool.map(_make, jobs[at : at + _ROWS_AT_ONCE], chunksize=8)
    except BrokenProcessPool:
        raise RayCxrError(
            "a process that makes reports died, which is most often want of memory; the same command continues"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _make(job: _Job) -> tuple[str, bytes] | str:
    """A document's UID and bytes; where its header cannot be used the kind of error: what it says quotes the header."""
    try:
        with _as_it_is():
            document = _document(job)
            buffer = io.BytesIO()
            document.save_as(buffer, enforce_file_format=True)
        return str(document.SOPInstanceUID), buffer.getvalue()
    except Exception as error:
        return type(error).__name__


def _uid(*said: object) -> str:
    """A UID that is the same for the same words: 2.25 and a name-based UUID (PS3.5, B.2; RFC 4122, version 5)."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, json.dumps(said)).int}"


def device_uid(model_digest: str) -> str:
    """The UID of a bundle as a device: another one for every training, and for whatever else changes the bundle."""
    return _uid("device", model_digest)


def _document(job: _Job) -> Dataset:
    """A study's report. Everything in it but the patient's and study's own data and the time goes into its UID."""
    model, images, lacking = job.model, job.images, job.lacking
    study = images[0].study
    instances = [image.instance for image in images]
    uid = _uid("report", FORMAT, study, model.digest, model.version, model.thresholds, lacking, instances, job.said)
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=_observer(model)),
        procedure_reported=_PROCEDURE,
        imaging_measurements=list(
            itertools.chain.from_iterable(
                _groups(model, image, values, uid, number)
                for number, (image, values) in enumerate(zip(images, job.said, strict=True), 1)
            )
        ),
    )
    root = content[0]
    items = root.ContentSequence
    # What every reader should see first: ahead of the measurements.
    items.insert(
        len(items) - 1,
        sr.TextContentItem(_COMMENT, RESEARCH_ONLY, relationship_type=sr.RelationshipTypeValues.CONTAINS),
    )
    # highdicom goes through the whole tree four times more for what is known here, which doubles the time: all that is
    # referred to is in the evidence, and nothing in the tree is 3D.
    root.ContentSequence = sr.ContentSequence(is_root=False)
    header = pydicom.dcmread(io.BytesIO(images[0].copied), force=True)
    copied = dicom_text.copy_elements(header, header.keys())
    when = _local(model.finished, header)
    document = sr.ComprehensiveSR(
        evidence=[_evidence(image) for image in images],
        content=root,
        series_instance_uid=_uid("series", study, model.digest),
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
        coding_schemes=[
            CodingSchemeIdentificationItem(SCHEME, name="ray-cxr private codes", responsible_organization="ray-cxr")
        ],
        is_complete=not lacking,
        is_final=False,
        is_verified=False,
    )
    document.ContentSequence = items
    if lacking:
        total = lacking + len(images)
        document.CompletionFlagDescription = f"{lacking} of {total} images are not in this document"
    document.InstanceCreationDate, document.InstanceCreationTime = document.ContentDate, document.ContentTime
    for tool in document.ContributingEquipmentSequence:  # highdicom itself, by the clock
        tool.ContributionDateTime = f"{when:%Y%m%d%H%M%S}"
    for keyword in _REQUIRED:
        setattr(document, keyword, None)
    dicom_text.add_elements(document, copied)
    return document


def _evidence(image: _Image) -> Dataset:
    """An image as a document refers to it. The patient's data come later: highdicom would print a name it finds odd."""
    evidence = Dataset()
    evidence.StudyInstanceUID, evidence.SeriesInstanceUID = image.study, image.series
    evidence.SOPInstanceUID, evidence.SOPClassUID = image.instance, UID(image.sop_class)
    for keyword in _REQUIRED:
        setattr(evidence, keyword, "")
    return evidence


def _local(when: datetime.datetime, header: Dataset) -> datetime.datetime:
    """A time without zone, as DICOM has it: in the zone that the image names, else in that of this machine."""
    offset = re.fullmatch(r"([+-])(\d\d)([0-5]\d)", str(header.get("TimezoneOffsetFromUTC") or "").strip())
    zone = None
    if offset and int(offset[2]) <= 14:
        minutes = int(offset[2]) * 60 + int(offset[3])
        zone = datetime.timezone(datetime.timedelta(minutes=-minutes if offset[1] == "-" else minutes))
    return when.astimezone(zone).replace(tzinfo=None)


def _observer(model: _Model) -> sr.ObserverContext:
    return sr.ObserverContext(
        observer_type=Code("121007", "DCM", "Device"),
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=device_uid(model.digest),
            name=f"ray-cxr {model.version}, model {model.digest[:16]}",
            manufacturer_name=MANUFACTURER,
            model_name=model.name,
            serial_number=model.digest,
        ),
    )


def _values(scores: _Scores, row: int) -> dict[str, Any]:
    """What the scores say of an image, for JSON."""
    table = scores.table
    return {
        "p": scores.p[row].tolist(),
        "c": [None if np.isnan(value) else value for value in scores.c[row].tolist()],
        "flags": scores.flags[row].tolist(),
        **{name: table[name][row].as_py() for name in ("top_finding", "priority", "quality_flag")},
    }


def _groups(
    model: _Model, image: _Image, values: dict[str, Any], uid: str, number: int
) -> Iterator[sr.MeasurementsAndQualitativeEvaluations]:
    """The measurement groups of an image: one for it as a whole, then one per finding."""
    evaluations = []
    if values["top_finding"] is not None:
        evaluations.append(sr.QualitativeEvaluation(TOP_FINDING, CODES[values["top_finding"]].code))
    if values["quality_flag"] is not None:
        evaluations.append(sr.QualitativeEvaluation(QUALITY, QUALITY_CODES[values["quality_flag"]]))
    priority = values["priority"]
    yield _group(
        image,
        uid,
        f"Image {number}",
        measurements=[] if priority is None else [_number(PRIORITY, priority)],
        evaluations=evaluations,
    )
    for j, finding in enumerate(model.findings):
        measurements = [_number(UNCALIBRATED, values["p"][j])]
        if values["c"][j] is not None:
            measurements.insert(0, _number(PROBABILITY, values["c"][j], method=CALIBRATION))
        threshold = model.thresholds[j]
        if threshold is not None:
            measurements.append(_number(OPERATING_POINT, float(threshold)))
        flag = values["flags"][j]
        yield _group(
            image,
            uid,
            f"Image {number}, {finding}",
            finding=CODES[finding].code,
            measurements=measurements,
            evaluations=[] if flag < 0 else [sr.QualitativeEvaluation(FLAG, FLAGGED if flag else NOT_FLAGGED)],
        )


def _group(
    image: _Image,
    uid: str,
    name: str,
    *,
    finding: Code | None = None,
    measurements: list[sr.Measurement],
    evaluations: list[sr.QualitativeEvaluation],
) -> sr.MeasurementsAndQualitativeEvaluations:
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=_uid("group", uid, name), identifier=name),
        finding_type=finding,
        measurements=measurements,
        qualitative_evaluations=evaluations,
        source_images=[sr.SourceImageForMeasurementGroup(UID(image.sop_class), image.instance)],
    )


def _number(name: Code, value: float, method: Code | None = None) -> sr.Measurement:
    return sr.Measurement(name=name, value=float(value), unit=_NO_UNITS, method=method)
