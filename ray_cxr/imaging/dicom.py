"""Decode DICOM radiographs to gray, and read the header fields that a manifest needs.

Decoding follows the standard's grayscale pipeline (DICOM PS3.4, N.2; PS3.3, C.11 and C.7.6.3):

1. Stored values: the bits that Bits Stored, High Bit and Pixel Representation select (PS3.3, C.7.6.3.1).
2. Modality LUT, or Rescale Slope and Intercept (C.11.1).
3. VOI LUT, otherwise the first window that shows the image, as LINEAR, LINEAR_EXACT or SIGMOID (C.11.2.1). Windows
   without a centre or width, or with a forbidden width (below 1 for LINEAR, 0 or less for the others), are ignored. LUT
   items without a descriptor or data are ignored too. If the entries of a VOI LUT contradict the bits per entry in its
   descriptor, the largest entry gives the number of bits (see `_count_bits` in `dicom_display`).
4. Scaling to 0..255, rounded. Without VOI LUT and window: if Bits Stored is 8 or less, the scale is the range of all
   possible stored values after step 2, so that 8-bit unsigned values stay unchanged. Above 8 bits, the header does not
   define the visible range. The scale is then the image's own minimum and maximum after step 2, without padding.
5. MONOCHROME1 is inverted to 255 - x (C.7.6.3.1.2). Presentation LUT Shape repeats this and is not read.
6. Padding (Pixel Padding Value and its Range Limit, C.7.5.1.1.2) is black for any photometric interpretation.
7. Square pixels and the orientation of a frontal view (see `dicom_attributes`).

The flag `display_fallback` marks an image whose header would hide it: at least 999 of 1000 pixels with one gray after
the VOI LUT, the window or the modality LUT, only padding, a slope of 0, or a window of a forbidden width. The next step
is then applied as if the element were absent.

RGB and YBR (secondary captures) become gray by the luma of `pixels`; steps 2 and 3 do not exist for colour.

Nothing is logged, because pydicom and its plug-ins quote header fields in warnings, and these fields name patients.
There is one exception. For a damaged lossless JPEG, GDCM's libjpeg writes fixed lines such as `Corrupt JPEG data: bad
Huffman code` to standard error, and has no option to turn them off.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pydicom
import pydicom.config

from ray_cxr.errors import ImageError
from ray_cxr.imaging.demographics import parse_sex
from ray_cxr.imaging.dicom_attributes import check_attributes, find_flags, normalize_geometry
from ray_cxr.imaging.dicom_demographics import read_age, read_view
from ray_cxr.imaging.dicom_display import display_gray, scale_to_8_bits
from ray_cxr.imaging.dicom_elements import read_integer, read_text, set_defaults
from ray_cxr.imaging.dicom_frames import read_pixels, unsupported_syntax
from ray_cxr.imaging.dicom_text import read_identity
from ray_cxr.imaging.pixels import MAX_PIXELS, check_size, decoder_errors, luma

_PHOTOMETRIC_COLOUR = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"})
_PHOTOMETRIC_REFUSED = frozenset({"PALETTE COLOR", "HSV", "ARGB", "CMYK", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "XYB"})

_DEFLATED = "1.2.840.10008.1.2.1.99"
_DEFLATED_WITHOUT_PIXELS = frozenset({"1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})  # JPIP
_EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
#: Bytes to read until a header is complete: nearly all headers end within the first number.
_LEADING_BYTES = (64 * 1024, 1024 * 1024, 64 * 1024 * 1024)
#: Value representations with 4 bytes of length in explicit VR (PS3.5, 7.1.2).
_LONG_VRS = frozenset(b"OB OW OF OD OL OV SQ UC UN UR UT SV UV".split())

# Keep pydicom, its plug-ins and GDCM from logging header values.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
for _name in ("pydicom", "pylibjpeg", "openjpeg"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)
warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
with contextlib.suppress(ImportError):
    gdcm = importlib.import_module("gdcm")
    gdcm.Trace.DebugOff()
    gdcm.Trace.WarningOff()
    gdcm.Trace.ErrorOff()


def looks_like_dicom(data: bytes) -> bool:
    """Whether data start like a DICOM file: `DICM` at 128, or an element of group 0002 or 0008 of plausible length."""
    if data[128:132] == b"DICM":
        return True
    if len(data) < 132 or data[:2] not in (b"\x02\x00", b"\x08\x00", b"\x00\x08"):
        return False
    if data[4:6].isalpha():
        return data[4:6].isupper()
    return int.from_bytes(data[4:8], "little") < len(data)


def decode_dicom(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the pixels of `read_image`."""
    return read_image(data, max_pixels=max_pixels)[0]


def read_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, tuple[str, ...]]:
    """Decode a single-frame DICOM radiograph, with or without preamble, by the rules of the module's docstring.

    The error `not_a_radiograph` means another modality, an image for processing, no pixel data, several frames, or a
    palette.

    Returns:
        uint8[H, W], C-contiguous; 0 is black, 255 white. And the quality flags from the header.
    """
    with decoder_errors("DICOM"):
        ds, syntax = _read_dataset(data, max_pixels)
        check_attributes(ds)
        set_defaults(ds)
        if ds.NumberOfFrames > 1:
            raise ImageError("not_a_radiograph", "the DICOM file has several frames")
        rows, columns = read_integer(ds, "Rows"), read_integer(ds, "Columns")
        check_size(rows, columns, max_pixels)
        photometric, allocated, bits = _read_format(ds)
        pixels = read_pixels(ds, syntax, rows, columns, allocated, bits)
        flags = find_flags(ds)
        if photometric in _PHOTOMETRIC_COLOUR:
            image = luma(scale_to_8_bits(pixels, bits))
        else:
            image, is_replaced = display_gray(pixels, ds, bits, inverted=photometric == "MONOCHROME1")
            if is_replaced:
                flags.append("display_fallback")
        image, is_turned = normalize_geometry(image, ds)
        if is_turned:
            flags.append("reoriented")
        check_size(image.shape[0], image.shape[1], max_pixels)
        return image, tuple(flags)


def _read_format(ds: Any) -> tuple[str, int, int]:
    """Return Photometric Interpretation, Bits Allocated and Bits Stored (PS3.3, C.7.6.3), and set Samples per Pixel and
    Bits Stored if absent. A value that no radiograph has is an error that names it, also of Number of Frames.
    """
    photometric = read_text(ds, "PhotometricInterpretation").upper()
    if not photometric:
        raise ImageError("corrupt", "the DICOM file has no PhotometricInterpretation")
    if photometric in _PHOTOMETRIC_REFUSED:
        raise ImageError("not_a_radiograph", f"the photometric interpretation is {photometric}")
    if photometric not in _PHOTOMETRIC_COLOUR | {"MONOCHROME1", "MONOCHROME2"}:
        raise ImageError("corrupt", "PhotometricInterpretation of the DICOM file is not one that DICOM defines")
    samples = 3 if photometric in _PHOTOMETRIC_COLOUR else 1  # which the interpretation requires (C.7.6.3.1.2)
    allocated = read_integer(ds, "BitsAllocated")
    if allocated in (32, 64):
        raise ImageError("not_a_radiograph", f"samples of {allocated} bits; CR and DX have 8 or 16")
    ds.SamplesPerPixel = read_integer(ds, "SamplesPerPixel", samples)
    bits = ds.BitsStored = read_integer(ds, "BitsStored", allocated)
    for keyword, value, possible, name in (
        ("NumberOfFrames", ds.NumberOfFrames, (0, 1), "1"),  # pydicom reads 0 as 1
        ("SamplesPerPixel", ds.SamplesPerPixel, (samples,), f"{samples} for {photometric}"),
        ("BitsAllocated", allocated, (1, 8, 16), "1, 8 or 16"),
        ("BitsStored", bits, range(1, allocated + 1), f"1 to {allocated}"),
        ("PixelRepresentation", ds.PixelRepresentation, (0, 1), "0 or 1"),
        ("PlanarConfiguration", ds.PlanarConfiguration if samples == 3 else 0, (0, 1), "0 or 1"),
    ):
        if value not in possible:
            raise ImageError("corrupt", f"{keyword} of the DICOM file is {value}, not {name}")
    return photometric, allocated, bits


def read_tags(data: bytes) -> dict[str, Any]:
    """Return the header fields that a manifest or a score table uses, None where unknown; nothing is logged.

    Returns:
        `patient_id`, `study_id` (Study Instance UID) and `sop_instance_uid`: text; ids whose bytes differ (except
        blanks at the ends) stay different (see `dicom_text`). `age`: float years. `sex`: `M` or `F`. `view`: one of
        `views`. See `dicom_demographics` for the elements.
    """
    with decoder_errors("DICOM"):
        return _list_tags(_read_dataset(data, MAX_PIXELS, pixels=False)[0])


def read_leading_tags(start: bytes, fetch: Callable[[int], bytes]) -> dict[str, Any]:
    """Return `read_tags` of a file of which no more is read than its header needs.

    Args:
        start: the first bytes of the file, which `looks_like_dicom` accepts.
        fetch: returns up to n of the bytes that follow, `b""` at the end.
    """
    for size in _LEADING_BYTES:
        while len(start) < size and (chunk := fetch(size - len(start))):
            start += chunk
        try:
            with decoder_errors("DICOM"):
                return _list_tags(_read_dataset(start, MAX_PIXELS, pixels=False, is_part=len(start) == size)[0])
        except ImageError as error:
            if error.code != "truncated" or len(start) < size:
                raise
    raise ImageError("too_large", f"the DICOM header has more than {_LEADING_BYTES[-1]} bytes")


def _list_tags(ds: Any) -> dict[str, Any]:
    return {
        "patient_id": read_identity(ds, "PatientID") or None,
        "study_id": read_identity(ds, "StudyInstanceUID") or None,
        "sop_instance_uid": read_identity(ds, "SOPInstanceUID") or None,
        "age": read_age(ds),
        "sex": parse_sex(read_text(ds, "PatientSex")),
        "view": read_view(ds),
    }


class _Reader(io.BytesIO):
    """A file that records in `cut` whether a read returned less than requested: pydicom skips truncated elements."""

    cut = False

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        # An empty read of an element's 8 header bytes, or of 1 byte to peek, is the regular end.
        if size is not None and len(data) < size and (data or size not in (1, 8)):
            self.cut = True
        return data


def _read_dataset(data: bytes, max_pixels: int, *, pixels: bool = True, is_part: bool = False) -> tuple[Any, str]:
    """Return the data set and its transfer syntax; with `pixels`, it has Pixel Data.

    With `is_part`, more data may follow in the file: a header that reaches their end is `truncated`.
    """
    if not looks_like_dicom(data):
        raise ImageError("not_an_image", "the contents are neither PNG, JPEG nor DICOM")
    bare = data[128:132] != b"DICM"
    if bare and data[:2] == b"\x02\x00":  # only the preamble is missing
        data = bytes(128) + b"DICM" + data
    syntax = _read_meta(data)[0] if data[128:132] == b"DICM" else ""
    if syntax and (not pydicom.uid.UID(syntax).is_transfer_syntax or syntax in _DEFLATED_WITHOUT_PIXELS):
        raise unsupported_syntax(syntax)
    if syntax == _DEFLATED:
        data, syntax = _inflate(data, max_pixels), _EXPLICIT_LITTLE
    reader = _Reader(data)
    try:
        ds = pydicom.dcmread(reader, force=bare, stop_before_pixels=not pixels)
        has_pixels = "PixelData" in ds
    except (OSError, EOFError, struct.error):
        if bare and not is_part:
            raise ImageError("not_an_image", "the contents are not DICOM") from None
        if reader.cut or reader.tell() >= len(data):
            raise ImageError("truncated", "the DICOM file ends inside its header") from None
        raise
    if is_part and (reader.cut or reader.tell() >= len(data)):
        raise ImageError("truncated", "the DICOM header continues after these bytes")
    if bare and not ("Rows" in ds and "Columns" in ds and (has_pixels or not pixels)):
        raise ImageError("not_an_image", "the contents are not DICOM")
    if pixels and not has_pixels:
        if reader.cut:
            raise ImageError("truncated", "the DICOM file ends inside its pixel data")
        check_attributes(ds)  # another modality is the better reason
        raise ImageError("not_a_radiograph", "the DICOM file has no pixel data")
    if not syntax:
        implicit, little = ds.original_encoding
        syntax = "1.2.840.10008.1.2" if implicit else _EXPLICIT_LITTLE if little else "1.2.840.10008.1.2.2"
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = syntax
    return ds, syntax


def _read_meta(data: bytes) -> tuple[str, int]:
    """Return the transfer syntax (empty if absent) and the offset of the data set, from group 0002 (PS3.10, 7.1)."""
    uid = b""
    offset = 132
    while offset + 8 <= len(data):
        group, element, vr, length = struct.unpack_from("<HH2sH", data, offset)
        if group != 2:
            break
        start = offset + 8
        if vr in _LONG_VRS:
            start = offset + 12
            if start > len(data):
                break
            length = struct.unpack_from("<I", data, offset + 8)[0]
        offset = start + length
        if element == 0x0010:
            uid = data[start:offset]
    if offset > len(data):
        raise ImageError("truncated", "the DICOM file ends inside its header")
    return uid.rstrip(b"\0 ").lstrip(b" ").decode("latin-1"), offset


def _inflate(data: bytes, max_pixels: int) -> bytes:
    """Return a deflated file (PS3.5, A.5) in explicit little endian; a length limit stops decompression bombs."""
    start = _read_meta(data)[1]
    limit = 4 * max_pixels + 16 * 1024 * 1024  # 16-bit gray or 8-bit RGB of the largest image, and its header
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        body = stream.decompress(data[start:], limit)
    except zlib.error:
        raise ImageError("corrupt", "the deflated data set is damaged") from None
    if not stream.eof:
        if stream.unconsumed_tail or len(body) >= limit:
            raise ImageError("too_large", f"the deflated data set has more than {limit} bytes")
        raise ImageError("truncated", "the deflated data set is incomplete")
    uid = _EXPLICIT_LITTLE.encode() + b"\0"
    return bytes(128) + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(uid)) + uid + body
