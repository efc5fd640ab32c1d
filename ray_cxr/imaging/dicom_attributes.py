"""What header attributes outside of the gray scale say about an image: orientation, shape of pixels, and doubts.

`docs/scoring.md` has the table of these attributes. Values are compared as PS3.3 defines them; unknown ones count as
absent.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from pydicom.sequence import Sequence

from ray_cxr.errors import ImageError
from ray_cxr.imaging.dicom_elements import read_text, read_values, to_float
from ray_cxr.imaging.resize import square_pixels

#: Modalities of radiographs (PS3.3, C.7.3.1.1.1); converted archives have OT, SC or none, some systems DR or XR.
RADIOGRAPH_MODALITIES: frozenset[str] = frozenset({"CR", "DX", "RG", "DR", "XR", "OT", "SC", ""})

_CODES = """
    AR AU BDUS BI BMD CD CT CFM DF DG DM DOC DS ECG EPS ES EC FA FID FS GM HC HD IO IVOCT IVUS KER
    KO LEN LP LS MA MG MR MS NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS PLAN PR PT PX REG RESP RF
    RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SEG SM SMR SR SRF ST STAIN TG
    US VA VF XA XC
"""
#: Codes of PS3.3 C.7.3.1.1.1 that a message may quote; other text could be a patient's name.
DEFINED_MODALITIES = frozenset(_CODES.split())
#: SOP Class of Digital X-Ray Images for processing (PS3.4, B.5).
DX_FOR_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.1.1"

# Words of PS3.16, Annex L. Regions that contain the lungs, such as RIB and STERNUM, are in neither set.
_CHEST = frozenset({"CHEST", "THORAX", "LUNG"})
_OTHER_BODY_PARTS = """
    ABDOMEN ANKLE ARM BREAST CALCANEUS CALF CLAVICLE COCCYX CSPINE ELBOW EXTREMITY FEMUR FINGER FOOT FEET FOREARM HAND
    HEAD HIP HUMERUS JAW KNEE LEG LSPINE LSSPINE MANDIBLE MAXILLA NECK ORBIT PATELLA PELVIS RADIUS SACRUM SCAPULA
    SHOULDER SKULL SPINE SSPINE TEETH THIGH THUMB TIBIA TLSPINE TMJ TOE TSPINE ULNA WRIST ZYGOMA
"""
#: A ratio of a pixel's sides beyond this is an error in the header.
_LARGEST_ASPECT = 3.0


def check_attributes(ds: Any) -> None:
    """Refuse images of other modalities, and raw images, which are not for display (PS3.3, C.8.11.1.1.1)."""
    modality = read_text(ds, "Modality").upper()
    if modality not in RADIOGRAPH_MODALITIES:
        name = modality if modality in DEFINED_MODALITIES else "not one that DICOM defines"
        raise ImageError("not_a_radiograph", f"the modality is {name}")
    intent = read_text(ds, "PresentationIntentType").upper()
    if intent == "FOR PROCESSING" or (not intent and read_text(ds, "SOPClassUID") == DX_FOR_PROCESSING):
        raise ImageError(
            "not_a_radiograph", "Presentation Intent Type is FOR PROCESSING (raw data); export it FOR PRESENTATION"
        )


def find_flags(ds: Any) -> list[str]:
    """Return the quality flags for attributes that say what an image shows."""
    flags = []
    words = set(re.findall("[A-Z]+", _read_body_part(ds)))
    words |= {word.removesuffix("S") for word in words}  # also HANDS
    is_other = not words.isdisjoint(_OTHER_BODY_PARTS.split()) and words.isdisjoint(_CHEST)
    if is_other or read_text(ds, "QualityControlImage").upper() == "YES":
        flags.append("not_frontal_chest")
    if read_text(ds, "BurnedInAnnotation").upper() == "YES":
        flags.append("burned_in_annotation")
    return flags


def _read_body_part(ds: Any) -> str:
    """Return Body Part Examined, or the meaning of the code of Anatomic Region Sequence (PS3.3, C.8.11.2)."""
    part = read_text(ds, "BodyPartExamined")
    items = None if part else ds.get("AnatomicRegionSequence")
    if isinstance(items, Sequence) and len(items):
        part = read_text(items[0], "CodeMeaning")
    return part.upper()


def normalize_geometry(image: np.ndarray, ds: Any) -> tuple[np.ndarray, bool]:
    """Make pixels square and put a frontal image upright, with the patient's left on the right side: uint8[H, W].

    Also return whether the orientation was changed.
    """
    aspect = _read_aspect(ds)
    if abs(aspect - 1.0) > 0.01:
        image = square_pixels(image, aspect)
    # Direction of the rows and of the columns, e.g. L\\F (PS3.3, C.7.6.1.1.1); the first letter is the main direction.
    directions = [str(value or "").strip().upper()[:1] for value in read_values(ds, "PatientOrientation")]
    if len(directions) != 2 or set(directions) not in ({"L", "F"}, {"L", "H"}, {"R", "F"}, {"R", "H"}):
        return image, False  # unknown, or a lateral view
    upright = image.T if directions[0] in "HF" else image
    if "R" in directions:
        upright = upright[:, ::-1]
    if "H" in directions:
        upright = upright[::-1]
    return np.ascontiguousarray(upright), directions != ["L", "F"]


def _read_aspect(ds: Any) -> float:
    """Return the height of a pixel relative to its width (PS3.3, C.7.6.3.1.7); 1 if unknown or impossible."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        values = read_values(ds, keyword)
        if len(values) == 2 and None not in values:
            try:
                height, width = (to_float(value, keyword) for value in values)
            except ImageError:
                continue
            if width > 0 and 1 / _LARGEST_ASPECT <= height / width <= _LARGEST_ASPECT:
                return height / width
    return 1.0
