"""Heat maps of flagged findings as DICOM Secondary Captures, which a PACS keeps in the study of their image.

    OUT/heatmaps/<SOP Instance UID>.dcm    a capture per flagged finding of an exported image: the overlay that
                                           `score --heatmaps` drew, between two captions
    OUT/heatmaps.parquet                   for each flagged finding, the outcome, and its capture

The captions are part of the pixels, since viewers do not show the header: RESEARCH ONLY above the image; finding,
probability and model below. They are large enough to be read when the capture is shown at 512 pixels. They never cover
the image.

The UID is derived from the model, the image, the finding, and the pixels with their captions, so that one UID is always
one image. Maps of another size or method have other UIDs, and so may maps that were drawn on two machines, which can
differ by rounding.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pydicom.config
from highdicom.sc import SCImage
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian

from ray_cxr.imaging import overlays
from ray_cxr.imaging.overlays import HeatMap
from ray_cxr.labels import NO_FINDING
from ray_cxr.progress import Progress
from ray_cxr.reporting.sr_document import MANUFACTURER, add_patient_and_study, local_time, make_uid
from ray_cxr.reporting.sr_studies import (
    CAPTURED,
    EMPTY,
    FAILED,
    NO_MAP,
    NOT_DRAWN,
    ExportPlan,
    ImageHeader,
    ScoreFolder,
    ScoringModel,
)
from ray_cxr.storage import atomic, remote

#: Raised whenever the same heat map would give another capture.
FORMAT = 2
SERIES_DESCRIPTION = "ray-cxr heat maps, RESEARCH ONLY"
#: Follows the series of documents.
SERIES_NUMBER = 9902
FOLDER, TABLE = "heatmaps", "heatmaps.parquet"
WARNING = "RESEARCH ONLY, not for diagnosis"

#: Pixels of the longer side at which the captions can be read.
_SIDE = 512
#: The warning is about twice as large as the other lines: OpenCV's scale of each, at `_SIDE` pixels.
_FONT, _WARNING_SCALE, _LINE_SCALE = cv2.FONT_HERSHEY_DUPLEX, 0.8, 0.55
_YELLOW, _WHITE = (255, 221, 51), (255, 255, 255)
#: (121322, DCM), CID 7202, Source Image Purposes of Reference.
_PURPOSE = Code("121322", "DCM", "Source image for image processing operation")


@dataclass(frozen=True)
class CaptureContent:
    """The content of one capture."""

    model: ScoringModel
    image: ImageHeader
    finding: str
    probability: float
    is_calibrated: bool
    method: str  # of the heat map
    number: int  # in the series

    def list_lines(self) -> list[str]:
        """Return the lines below the image; ASCII, because the font has no other characters."""
        kind = "calibrated probability" if self.is_calibrated else "output of the model, not calibrated"
        return [
            f"{self.finding.replace('_', ' ')}: {kind} {self.probability:.2f}",
            f"Heat map ({self.method}), not a boundary of the finding",
            f"Model {self.model.name}, {self.model.digest[:16]}",
            f"ray-cxr {self.model.version}, not reviewed",
        ]


def check(folder: ScoreFolder) -> str:
    """Return the SHA-256 of the files of maps; raise TableError if there is none."""
    if not overlays.has_heatmaps(folder.path):
        overlays.read_heatmaps(folder.path)
    sink = hashlib.sha256()
    for part in sorted((folder.path / overlays.HEATMAPS).glob("part-*.parquet")):
        sink.update(hashlib.sha256(part.read_bytes()).digest())
    return sink.hexdigest()


def write_captures(out: Path, folder: ScoreFolder, plan: ExportPlan) -> tuple[Counter[str], Counter[str]]:
    """Write the captures of all flagged findings of exported images; return the number of findings by outcome, and of
    failed ones by reason.

    Captures of an earlier run that are no longer made are removed.
    """
    (out / FOLDER).mkdir(exist_ok=True)
    ids = folder.scores.ids
    maps = overlays.read_heatmaps(folder.path, [ids[row] for row in plan.headers])
    flagged = list(_list_flagged(folder, plan))
    found = [maps.get((ids[row], finding)) for row, finding, _ in flagged]
    outcomes = [_check_map(heat_map) for heat_map in found]

    def build() -> Iterator[tuple[str, bytes] | str | None]:
        # In this thread, because pydicom's validation is switched off for the whole process.
        wanted = [heat_map if outcome == CAPTURED else None for heat_map, outcome in zip(found, outcomes, strict=True)]
        overlay_files = remote.map_concurrently(_read_overlay, wanted)
        for (row, _, number), heat_map, data in zip(flagged, wanted, overlay_files, strict=True):
            if heat_map is None:
                yield None
            else:
                yield _capture(folder, plan.headers[row], row, heat_map, number, data)

    def write(capture: tuple[str, bytes] | str | None) -> tuple[str, bytes] | str | None:
        if isinstance(capture, tuple):
            atomic.write_if_changed(out / FOLDER / f"{capture[0]}.dcm", capture[1])
        return capture

    rows = []
    with Progress("write captures", len(flagged), unit="captures") as progress:
        written = remote.map_concurrently(write, build())
        for (row, finding, _), outcome, capture in zip(flagged, outcomes, written, strict=True):
            record = {"image_id": ids[row], "finding": finding, "outcome": outcome, "reason": None, "capture": None}
            if isinstance(capture, tuple):
                record["capture"] = capture[0]
            elif capture is not None:
                record |= {"outcome": FAILED, "reason": capture}
            rows.append(record)
            progress.advance(1)
    names = {f"{record['capture']}.dcm" for record in rows}
    remote.remove_files(path for path in (out / FOLDER).glob("*.dcm") if path.name not in names)
    schema = pa.schema([(name, pa.string()) for name in ("image_id", "finding", "outcome", "reason", "capture")])
    atomic.write_parquet(pa.Table.from_pylist(rows, schema), out / TABLE)
    failed = (str(record["reason"]) for record in rows if record["outcome"] == FAILED)
    return Counter(str(record["outcome"]) for record in rows), Counter(failed)


def _list_flagged(folder: ScoreFolder, plan: ExportPlan) -> Iterator[tuple[int, str, int]]:
    """Yield row and finding of each flagged finding, and the number of its capture within the study."""
    findings = [name for name in folder.model.findings if name != NO_FINDING and name in folder.scores.flags]
    for rows in plan.studies():
        for position, row in enumerate(rows):
            for index, finding in enumerate(findings):
                if folder.scores.flags[finding][row] == 1:
                    yield row, finding, position * len(findings) + index + 1


def _check_map(heat_map: HeatMap | None) -> str:
    if heat_map is None:
        return NO_MAP
    if not heat_map.evidence:
        return EMPTY
    return NOT_DRAWN if heat_map.overlay is None else CAPTURED


def _read_overlay(heat_map: HeatMap | None) -> bytes | str:
    """Return the file of a map over its image, or why it cannot be read."""
    try:
        return heat_map.overlay.read_bytes() if heat_map is not None and heat_map.overlay is not None else b""
    except OSError as error:
        return f"the overlay cannot be read ({error.strerror or type(error).__name__}); run `score --heatmaps` again"


def _capture(
    folder: ScoreFolder, image: ImageHeader, row: int, heat_map: HeatMap, number: int, overlay: bytes | str
) -> tuple[str, bytes] | str:
    """Return UID and bytes of a capture, or why there is none; `overlay` is the result of `_read_overlay`."""
    scores, finding = folder.scores, heat_map.finding
    if abs(heat_map.p - scores.p[finding][row]) > 1e-6:
        return "the heat map is of other scores; run `score --heatmaps` again"
    c = scores.c[finding][row] if finding in scores.c else np.nan
    is_calibrated = bool(np.isfinite(c))
    method = (scores.run.get("heatmaps") or {}).get("method") or "method unknown"
    if isinstance(overlay, str):
        return overlay
    content = CaptureContent(
        model=folder.model,
        image=image,
        finding=finding,
        probability=float(c if is_calibrated else heat_map.p),
        is_calibrated=is_calibrated,
        method=str(method),
        number=number,
    )
    return build_capture(content, overlay)


def build_capture(content: CaptureContent, overlay: bytes) -> tuple[str, bytes] | str:
    """Return a capture's UID and bytes, or why there is none.

    Args:
        overlay: the JPEG or PNG file of the map over its image.
    """
    pixels = cv2.imdecode(np.frombuffer(overlay, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        return "the overlay is damaged; remove the file and run `score --heatmaps` again"
    try:
        with pydicom.config.disable_value_validation():  # keep values of a header, even if they are invalid
            document = _build(content, draw_captions(pixels[..., ::-1], content.list_lines()), pixels.nbytes, overlay)
            buffer = io.BytesIO()
            document.save_as(buffer, enforce_file_format=True)
        return str(document.SOPInstanceUID), buffer.getvalue()
    except Exception as error:  # its message may quote the header
        return f"no capture can be made with the header of the image ({type(error).__name__})"


def _build(content: CaptureContent, pixels: np.ndarray, size: int, overlay: bytes) -> Dataset:
    model, image, _finding = content.model, content.image, content.finding
    when = local_time(model.finished, image)
    lines = content.list_lines()
    capture = SCImage(
        pixel_array=pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        transfer_syntax_uid=ExplicitVRLittleEndian,
        study_instance_uid=image.study,
        series_instance_uid=make_uid("heat map series", image.study, model.digest),
        series_number=SERIES_NUMBER,
        series_description=SERIES_DESCRIPTION,
        sop_instance_uid=make_uid(
            *("heat map", FORMAT, image.study, image.instance, model.digest, content.finding, lines),
            *(pixels.shape, hashlib.sha256(pixels.tobytes()).hexdigest()),
        ),
        instance_number=content.number,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=model.name,
        software_versions=(f"ray-cxr {model.version}", f"model {model.digest[:16]}"),
        device_serial_number=model.digest,
        content_date=when.date(),
        content_time=when.time(),
    )
    capture.InstanceCreationDate, capture.InstanceCreationTime = capture.ContentDate, capture.ContentTime
    capture.DateOfSecondaryCapture, capture.TimeOfSecondaryCapture = capture.ContentDate, capture.ContentTime
    for tool in capture.ContributingEquipmentSequence:  # highdicom writes the current time
        tool.ContributionDateTime = f"{when:%Y%m%d%H%M%S}"
    # Empty, because the decoder may have turned the image.
    capture.PatientOrientation = []
    capture.ConversionType = "WSD"  # made on a workstation, not digitized
    capture.BurnedInAnnotation, capture.BodyPartExamined = "YES", "CHEST"
    if overlay.startswith(b"\xff\xd8"):  # a JPEG
        capture.LossyImageCompression, capture.LossyImageCompressionMethod = "01", "ISO_10918_1"
        capture.LossyImageCompressionRatio = f"{size / len(overlay):.1f}"
    capture.DerivationDescription = capture.ImageComments = "; ".join([WARNING, *lines])
    capture.SourceImageSequence = Sequence([_refer_to(image)])
    add_patient_and_study(capture, image)
    capture["PixelData"].VR = "OB"  # pydicom does not choose it for a data set with copied elements
    return capture


def _refer_to(image: ImageHeader) -> Dataset:
    source, purpose = Dataset(), Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = image.sop_class, image.instance
    purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning = _PURPOSE[:3]
    source.PurposeOfReferenceCodeSequence = Sequence([purpose])
    return source


def draw_captions(overlay: np.ndarray, lines: list[str]) -> np.ndarray:
    """Return the overlay between the warning and these lines, on black: uint8 RGB [H,W,3].

    Args:
        overlay: uint8 RGB [h,w,3]; enlarged by a whole number if its longer side has less than 512 pixels.
    """
    factor = -(-_SIDE // max(overlay.shape[:2]))
    overlay = overlay.repeat(factor, axis=0).repeat(factor, axis=1)
    side = max(overlay.shape[:2])
    unit, margin = side / _SIDE, side // 48
    above = _draw_text([WARNING], side, _WARNING_SCALE * unit, _YELLOW)
    below = _draw_text(lines, side, _LINE_SCALE * unit, _WHITE)
    left = (side - overlay.shape[1]) // 2
    padded = cv2.copyMakeBorder(overlay, margin, margin, left, side - overlay.shape[1] - left, cv2.BORDER_CONSTANT)
    return np.concatenate([above, padded, below])


def _draw_text(lines: list[str], width: int, scale: float, color: tuple[int, int, int]) -> np.ndarray:
    """Draw lines from the left on black, folded between words: uint8 RGB [H,width,3]."""
    margin, thickness = width // 64, max(1, round(width / _SIDE))

    def measure(text: str) -> int:
        return int(cv2.getTextSize(text, _FONT, scale, thickness)[0][0])

    folded: list[str] = []
    for line in lines:
        words = line.split(" ")
        folded.append(words[0])
        for word in words[1:]:
            if measure(f"{folded[-1]} {word}") <= width - 2 * margin:
                folded[-1] += f" {word}"
            else:
                folded.append(f"  {word}")
    height = round(36 * scale)
    strip = np.zeros((height * len(folded) + margin, width, 3), np.uint8)
    for index, text in enumerate(folded):
        cv2.putText(strip, text, (margin, round(height * (index + 0.8))), _FONT, scale, color, thickness, cv2.LINE_AA)
    return strip
