"""Plan DICOM structured reports: read scores and image headers, and group the images by study. Needs no highdicom."""

from __future__ import annotations

import datetime
import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from ray_cxr.errors import ImageError, TableError
from ray_cxr.imaging import dicom_text
from ray_cxr.imaging.dicom import looks_like_dicom
from ray_cxr.imaging.pixels import decoder_errors
from ray_cxr.progress import Progress
from ray_cxr.reporting.scores import Scores, finite_or_none, read_scores
from ray_cxr.storage import dicomweb, run_folder
from ray_cxr.storage.archives import read_members
from ray_cxr.storage.paths import file_name, is_dicomweb, split_member
from ray_cxr.storage.stores import open_stream

#: Outcomes of a row of the scores.
EXPORTED, NOT_SCORED, NOT_DICOM, REPEATED, FAILED = "exported", "not_scored", "not_dicom", "repeated", "failed"
#: Outcomes of the heat map of a flagged finding, or FAILED.
CAPTURED, NO_MAP, NOT_DRAWN, EMPTY = "captured", "no_map", "not_drawn", "empty"

_MAX_HEADER = 64 * 1024 * 1024
_FETCH_BYTES = 64 * 1024
#: Files with these suffixes are not opened.
_NOT_DICOM_SUFFIXES = (".png", ".jpg", ".jpeg")
#: Threads, since reading a header from a store is mostly waiting for an answer.
_THREADS, _BATCH_ROWS = 8, 512
_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
#: Elements that are copied from an image's header into the document of its study, because they identify the patient and
#: the study (Patient, Patient Study and General Study modules, PS3.3, C.7.1.1, C.7.2.2, C.7.2.1).
_COPIED = (
    *("SpecificCharacterSet", "TimezoneOffsetFromUTC", "PatientName", "PatientID", "IssuerOfPatientID"),
    *("IssuerOfPatientIDQualifiersSequence", "TypeOfPatientID", "OtherPatientIDsSequence", "PatientBirthDate"),
    *("PatientBirthTime", "PatientSex", "PatientAge", "PatientIdentityRemoved", "DeidentificationMethod"),
    *("DeidentificationMethodCodeSequence", "LongitudinalTemporalInformationModified", "StudyDate", "StudyTime"),
    *("StudyID", "StudyDescription", "AccessionNumber", "IssuerOfAccessionNumberSequence", "ReferringPhysicianName"),
)
#: The format of PatientAge (PS3.5, 6.2, AS). A value in another format, which archives often have, is not copied.
_AGE = re.compile(r"[0-9]{3}[DWMY]")
UID_TEXT = re.compile(r"[0-9]+(\.[0-9]+)+")


@dataclass(frozen=True)
class ScoringModel:
    """The model that scored the images, and the run of `score`."""

    findings: tuple[str, ...]
    thresholds: tuple[float | None, ...]  # operating points on the raw probability, one per finding
    name: str
    digest: str  # of the bundle
    version: str  # of the ray-cxr that scored
    finished: datetime.datetime  # when scoring ended


@dataclass(frozen=True)
class ScoreFolder:
    """A finished score folder."""

    path: Path
    model: ScoringModel
    scores: Scores
    settings_digest: str  # SHA-256 of settings.json, hex
    digest: str  # SHA-256 of the score files, hex

    def values(self, row: int) -> dict[str, Any]:
        """Return the results of an image for JSON, with p, c and flags in the order of the findings.

        None stands for null, except that a null flag is -1.
        """
        scores, findings = self.scores, self.model.findings
        return {
            "p": [float(scores.p[name][row]) for name in findings],
            "c": [finite_or_none(scores.c[name][row]) if name in scores.c else None for name in findings],
            "flags": [int(scores.flags[name][row]) if name in scores.flags else -1 for name in findings],
            "abnormality": finite_or_none(scores.abnormality[row]),
            "priority": finite_or_none(scores.priority[row]),
            "quality_flag": scores.quality_flags[row],
        }


@dataclass(frozen=True)
class ImageHeader:
    """UIDs and identity from the header of an image, or of an earlier document, which needs the UIDs alone."""

    study: str
    series: str
    instance: str
    sop_class: str
    patient: tuple[str, ...] = ()  # for comparison with other images of the study
    copied: bytes = field(
        default=b"", repr=False
    )  # elements of `_COPIED` with unchanged text, in Explicit VR Little Endian


@dataclass(frozen=True)
class ReportContent:
    """The content of one document, with images in the order of the scores."""

    model: ScoringModel
    images: tuple[ImageHeader, ...]
    values: tuple[dict[str, Any], ...]  # `ScoreFolder.values` of each image
    missing: int  # number of other images of the study
    replaced: tuple[ImageHeader, ...] = ()  # earlier documents of the study


@dataclass
class ExportPlan:
    """What happens with each row of the scores."""

    outcomes: list[str]  # by row
    headers: dict[int, ImageHeader] = field(default_factory=dict)  # of images to export, by row
    reasons: dict[int, str] = field(default_factory=dict)  # why an image failed, by row

    def fail(self, row: int, reason: str) -> None:
        self.outcomes[row], self.reasons[row] = FAILED, reason
        self.headers.pop(row, None)

    def studies(self) -> list[list[int]]:
        """Return the rows of each study, in the order of the scores."""
        rows: dict[str, list[int]] = defaultdict(list)
        for row in sorted(self.headers):
            rows[self.headers[row].study].append(row)
        return list(rows.values())


def read_folder(path: Path) -> ScoreFolder:
    """Read a score folder; raise InputError if it is not finished, and TableError if a file is damaged."""
    run_folder.check_complete(path, "score")
    scores = read_scores(path)
    sink = hashlib.sha256()
    try:
        modified = datetime.datetime.fromtimestamp(int((path / "run.json").stat().st_mtime), datetime.UTC)
        text = scores.run.get("finished")  # absent in runs of older versions
        finished = modified if text is None else datetime.datetime.fromisoformat(text)
        points, findings = scores.operating_points, tuple(scores.model["findings"])
        model = ScoringModel(
            findings=findings,
            thresholds=tuple(points[name]["threshold"] if points[name] else None for name in findings),
            name=f"ray-cxr chest radiograph findings, {scores.model['architecture']['backbone']}"[:64],
            digest=str(scores.model["digest"]),
            version=str(scores.run.get("versions", {}).get("ray-cxr", "unknown")),
            finished=finished.astimezone(datetime.UTC),
        )
        settings_digest = run_folder.digest_settings(path)
        for part in sorted((path / "scores").glob("part-*.parquet")):
            sink.update(hashlib.sha256(part.read_bytes()).digest())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise TableError(f"{path}: model.json, run.json or settings.json is missing or damaged; score again") from None
    bad = [f"p_{name}" for name in findings if name not in scores.p or np.isnan(scores.p[name][scores.ok]).any()]
    if bad or not findings:
        raise TableError(f"{path}: no values in scored rows ({', '.join(bad)}); run score again with --fresh")
    return ScoreFolder(path, model, scores, settings_digest, sink.hexdigest())


def plan_export(scores: Scores) -> ExportPlan:
    """Read the header of every scored image that may be DICOM; return the outcome of every row."""
    plan = ExportPlan([NOT_DICOM if ok else NOT_SCORED for ok in scores.ok])
    candidates = [
        (row, path)
        for row, (path, outcome) in enumerate(zip(scores.paths, plan.outcomes, strict=True))
        if outcome == NOT_DICOM and path is not None and not file_name(path).lower().endswith(_NOT_DICOM_SUFFIXES)
    ]
    with Progress("read headers", len(candidates), unit="files") as progress:
        for row, header in _read_headers(candidates):
            # A study_id that is no UID is a pseudonym or the id of a table, which a header does not contain.
            study = scores.studies[row]
            if isinstance(header, ImageHeader) and study and UID_TEXT.fullmatch(study) and study != header.study:
                header = ImageError("corrupt", "the file is of another study than when it was scored")
            if isinstance(header, ImageError):
                plan.fail(row, f"{header.code}: {header.message}")
            elif header is not None:
                plan.outcomes[row], plan.headers[row] = EXPORTED, header
            progress.advance(1, f"{len(plan.reasons):,} failed")
    for rows in plan.studies():
        if len({plan.headers[row].patient for row in rows}) > 1:
            # One document for two patients would put the findings of one into the other's record.
            for row in rows:
                plan.fail(row, "corrupt: the images of the study are of different patients")
    # Compared within a study: in poorly anonymised files, images of several patients can have the same UID.
    seen: set[tuple[str, str]] = set()
    for row in sorted(plan.headers):
        name = (plan.headers[row].study, plan.headers[row].instance)
        if name in seen:
            plan.outcomes[row] = REPEATED
            del plan.headers[row]
        seen.add(name)
    return plan


def _read_headers(candidates: list[tuple[int, str]]) -> Iterator[tuple[int, ImageHeader | ImageError | None]]:
    """Yield row and header of each file; the header is an error if the file cannot be read, None if it is not DICOM."""
    members: dict[str, dict[str, list[int]]] = {}  # rows by member, by archive
    files: list[tuple[int, str]] = []
    for row, path in candidates:
        inside = split_member(path)
        if inside is None:
            files.append((row, path))
        else:
            members.setdefault(inside[0], {}).setdefault(inside[1], []).append(row)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="headers") as pool:
        for start in range(0, len(files), _BATCH_ROWS):
            rows, paths = zip(*files[start : start + _BATCH_ROWS], strict=True)
            yield from zip(rows, pool.map(_read_file, paths), strict=True)
    for archive, wanted in members.items():
        reason = ImageError("missing", "the archive has no such member")
        try:
            for name, data in read_members(archive, frozenset(wanted)):
                header = data if isinstance(data, ImageError) else _read_header(nullcontext(io.BytesIO(data).read))
                yield from ((row, header) for row in wanted.pop(name))
        except ImageError as error:
            reason = ImageError(error.code, f"the archive: {error.message}")
        yield from ((row, reason) for rows in wanted.values() for row in rows)


def _read_file(path: str) -> ImageHeader | ImageError | None:
    return _read_metadata(path) if is_dicomweb(path) else _read_header(open_stream(path))


def _read_metadata(path: str) -> ImageHeader | ImageError:
    """Fetch the header of an image in a PACS, without its pixels; return an error if there is none."""
    try:
        header = dicomweb.fetch_metadata(path)
        with decoder_errors("DICOM"):
            wanted = {f"{Tag(keyword):08X}" for keyword in (*_UIDS, *_COPIED)}
            ds = Dataset.from_json({tag: value for tag, value in header.items() if tag in wanted})
            # JSON is UTF-8, whatever the character set of the PACS's own file.
            ds.SpecificCharacterSet = "ISO_IR 192"
            ds.set_original_encoding(False, True, "utf8")
            return _parse_header(ds)
    except ImageError as error:
        return error


def _read_header(opened: AbstractContextManager[Callable[[int], bytes]]) -> ImageHeader | ImageError | None:
    """Read a file up to its pixels; return an error if it cannot be read, and None if it is not DICOM."""
    try:
        with opened as fetch, decoder_errors("DICOM"):
            file = _HeaderStream(fetch)
            head = file.read(256)
            if not looks_like_dicom(head):
                return None if head else ImageError("empty", "the file has 0 bytes")
            file.seek(0)
            ds = pydicom.dcmread(file, stop_before_pixels=True, force=head[128:132] != b"DICM")
            if "Rows" not in ds:
                raise ImageError("truncated", "the DICOM header describes no image")
            return _parse_header(ds)
    except ImageError as error:
        return error


class _HeaderStream(io.BytesIO):
    """The start of a stream as a seekable file, which fetches data when it is read."""

    def __init__(self, fetch: Callable[[int], bytes]) -> None:
        super().__init__()
        self._fetch = fetch

    def read(self, size: int | None = -1, /) -> bytes:
        self._fetch_until(_MAX_HEADER + 1 if size is None or size < 0 else self.tell() + size)
        return super().read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_END:
            self._fetch_until(_MAX_HEADER + 1)
        return super().seek(offset, whence)

    def _fetch_until(self, end: int) -> None:
        position, length = self.tell(), super().seek(0, io.SEEK_END)
        while length < end and (chunk := self._fetch(_FETCH_BYTES)):
            length += self.write(chunk)
            if length > _MAX_HEADER:
                raise ImageError("too_large", f"the DICOM header has more than {_MAX_HEADER} bytes")
        super().seek(position)


def _parse_header(ds: Dataset) -> ImageHeader:
    """Raise ImageError if a UID that a report needs is missing, or the character set is undefined."""
    uids = []
    for keyword in _UIDS:
        value = str(ds.get(keyword) or "")
        if not UID_TEXT.fullmatch(value) or len(value) > 64:
            raise ImageError("corrupt", f"the DICOM header has no valid {keyword}")
        uids.append(value)
    if not dicom_text.writes_ascii(ds):
        raise ImageError("corrupt", "the DICOM header declares a character set that DICOM does not define")
    # Before any text is accessed, since pydicom keeps the decoded text.
    copied = dicom_text.copy_elements(ds, _COPIED)
    patient = (dicom_text.read_identity(ds, "PatientID"), dicom_text.read_identity(ds, "IssuerOfPatientID"))
    if not patient[0]:
        patient = ("", dicom_text.read_identity(ds, "PatientName").strip("^ "))
    if "PatientAge" in copied and not _AGE.fullmatch(str(ds.PatientAge)):
        del copied.PatientAge
    buffer = io.BytesIO()
    copied.save_as(buffer, implicit_vr=False, little_endian=True)
    study, series, instance, sop_class = uids
    return ImageHeader(study, series, instance, sop_class, patient, copied=buffer.getvalue())


def collect_contents(folder: ScoreFolder, plan: ExportPlan) -> list[ReportContent]:
    """Return the content of each study's document, in the order of `plan.studies()`."""
    study_ids = folder.scores.studies
    # Rows that are in no document, by study_id.
    lost = Counter(study_ids[np.isin(plan.outcomes, (NOT_SCORED, FAILED, NOT_DICOM))])
    return [
        ReportContent(
            folder.model,
            tuple(plan.headers[row] for row in rows),
            tuple(folder.values(row) for row in rows),
            sum(lost[study] for study in {study_ids[row] for row in rows} - {None}),
        )
        for rows in plan.studies()
    ]
