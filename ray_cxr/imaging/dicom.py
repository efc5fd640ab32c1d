"""DICOM radiographs to gray, and the few header fields that a manifest needs.

The order of operations is that of the standard's grayscale pipeline (DICOM PS3.4, N.2; PS3.3, C.11 and
C.7.6.3):

1. stored values: the bits that Bits Stored, High Bit and Pixel Representation name (PS3.3, C.7.6.3.1);
2. Modality LUT, or Rescale Slope and Intercept (C.11.1);
3. VOI LUT, else the first window, as LINEAR, LINEAR_EXACT or SIGMOID (C.11.2.1). A window whose width the
   standard forbids (below 1 for LINEAR, 0 or less for the others) is taken as none. A LUT item without a
   descriptor or without data is no LUT; a window without a centre or a width is no window. White of a VOI LUT is
   that of the bits its entries use, where its descriptor is wrong about them (see `_lut_bits`);
4. to 0..255, rounded. Without VOI LUT and window: up to 8 bits stored, the full range of the stored values,
   so that 8-bit unsigned values stay as they are; above 8 bits, the picture's own minimum and maximum after
   step 2, padding left out, since the header then does not say which part of the range is meant to be seen;
5. MONOCHROME1 is inverted to 255 - x (C.7.6.3.1.2). Presentation LUT Shape says the same once more and is not
   read;
6. padding (Pixel Padding Value and its Range Limit, C.7.5.1.1.2) is black, whatever the photometric
   interpretation.

RGB and YBR (secondary captures) become gray by the luma of `imaging`; steps 2 and 3 do not exist for colour.

Nothing here logs: header fields name patients, and pydicom and its plug-ins would quote them in warnings.
What is left is GDCM's libjpeg, which writes fixed lines such as `Corrupt JPEG data: bad Huffman code` to
standard error over a damaged lossless JPEG and cannot be told not to.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pydicom
import pydicom.config
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder

from ray_cxr.errors import ImageError
from ray_cxr.imaging.demographics import parse_age, parse_sex, parse_view
from ray_cxr.imaging.dicom_text import read_identity
from ray_cxr.imaging.jpeg import JpegStream, decode_jpeg, parse_jpeg
from ray_cxr.imaging.pixels import MAX_PIXELS, check_size, decoder_errors, luma

#: Modalities that can be a radiograph: OT, SC and none at all are how converted archives come.
RADIOGRAPH_MODALITIES: frozenset[str] = frozenset({"CR", "DX", "RG", "OT", "SC", ""})

# Codes of PS3.3 C.7.3.1.1.1 that may be named in a message; any other text could be anything, even a name.
_DEFINED_MODALITIES = """
    AR AU BDUS BI BMD CD CT CFM DF DG DM DOC DR DS ECG EPS ES EC FA FID FS GM HC HD IO IVOCT IVUS KER
    KO LEN LP LS MA MG MR MS NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS PLAN PR PT PX REG RESP RF
    RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SEG SM SMR SR SRF ST STAIN TG
    US VA VF XA XC
"""
_OTHER_MODALITIES = frozenset(_DEFINED_MODALITIES.split())
_PHOTOMETRIC_COLOUR = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"})
_PHOTOMETRIC_REFUSED = frozenset({"PALETTE COLOR", "HSV", "ARGB", "CMYK", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "XYB"})

_DEFLATED = "1.2.840.10008.1.2.1.99"
_DEFLATED_ELSEWHERE = frozenset({"1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})  # JPIP: no pixels inside
_EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
_JPEG_8_BIT = frozenset({"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"})
_JPEG_LOSSLESS = frozenset({"1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"})
_JPEG_LS = frozenset({"1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"})
_JPEG_2000 = frozenset(
    {
        "1.2.840.10008.1.2.4.90",
        "1.2.840.10008.1.2.4.91",
        "1.2.840.10008.1.2.4.201",
        "1.2.840.10008.1.2.4.202",
        "1.2.840.10008.1.2.4.203",
    }
)
#: Header numbers that pydicom or this module needs, and their values where they are absent or empty.
_DEFAULTS = {"NumberOfFrames": 1, "SamplesPerPixel": 1, "PixelRepresentation": 0, "PlanarConfiguration": 0}
_ROWS_AT_ONCE = 256  # numpy widens table indices to 64 bits, which a whole large picture has no room for


def _silence() -> None:
    """Keep pydicom, its plug-ins and GDCM from writing header values anywhere; done once, at import."""
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    for name in ("pydicom", "pylibjpeg", "openjpeg"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
    with contextlib.suppress(ImportError):
        gdcm = importlib.import_module("gdcm")
        gdcm.Trace.DebugOff()
        gdcm.Trace.WarningOff()
        gdcm.Trace.ErrorOff()


_silence()


def looks_like_dicom(data: bytes) -> bool:
    """Whether the first bytes are a DICOM file's: `DICM` at 128, or a bare data set's first element."""
    return data[128:132] == b"DICM" or _is_bare(data)


def decode_dicom(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a single-frame DICOM radiograph by the rules at the top of this module.

    Args:
        data: the contents of a DICOM file, with or without its preamble.
        max_pixels: limit of Rows x Columns, compared before any pixel is decoded.

    Returns:
        uint8[H, W], C-contiguous; 0 is black, 255 white.

    Raises:
        ImageError: `not_an_image`, `not_a_radiograph` (another modality, no pixel data, several frames, a
            palette), `unsupported_transfer_syntax`, `truncated`, `corrupt`, `too_large`, `too_small`.
    """
    with decoder_errors("DICOM"):
        ds, syntax = _read(data, max_pixels)
        _check_modality(ds)
        _set_defaults(ds)
        if ds.NumberOfFrames > 1:
            raise ImageError("not_a_radiograph", "the DICOM file holds several frames")
        rows, columns = _number(ds, "Rows"), _number(ds, "Columns")
        check_size(rows, columns, max_pixels)
        photometric = _text(ds, "PhotometricInterpretation").upper()
        samples = ds.SamplesPerPixel
        allocated = _number(ds, "BitsAllocated")
        bits = ds.BitsStored = _number(ds, "BitsStored", allocated)
        if photometric in _PHOTOMETRIC_REFUSED:
            raise ImageError("not_a_radiograph", f"the photometric interpretation is {photometric}")
        if allocated in (32, 64):
            raise ImageError("not_a_radiograph", f"samples of {allocated} bits; CR and DX have 8 or 16")
        gray = samples == 1 and photometric in ("MONOCHROME1", "MONOCHROME2")
        colour = samples == 3 and photometric in _PHOTOMETRIC_COLOUR
        if not (gray or colour) or allocated not in (1, 8, 16) or not 1 <= bits <= allocated:
            raise ImageError("corrupt", "the image pixel module of the DICOM file contradicts itself")
        pixels = _pixels(ds, syntax, rows, columns, samples, allocated, bits)
        if colour:
            return luma(_eight_bits(pixels, bits))
        return _displayed(pixels, ds, bits, inverted=photometric == "MONOCHROME1")


def read_tags(data: bytes) -> dict[str, Any]:
    """The header fields that a manifest takes; nothing is logged.

    Returns:
        `patient_id` and `study_id` (Study Instance UID): str | None, distinct for distinct bytes (see
        `dicom_text`). `age`: float years | None, from 058Y,
        006M, 002W, 010D or bare digits (years, as converted archives write them). `sex`: `M`, `F` or None.
        `view`: see `demographics.parse_view`; from View Position, else from Patient Position where that says
        PA or AP (some converted archives put it there).

    Raises:
        ImageError: `not_an_image`, `truncated`, `corrupt`, `too_large` or `unsupported_transfer_syntax`.
    """
    with decoder_errors("DICOM"):
        ds, _ = _read(data, MAX_PIXELS, pixels=False)
        view = _text(ds, "ViewPosition").upper()
        position = _text(ds, "PatientPosition").upper()
        if not view and position in ("PA", "AP"):
            view = position
        return {
            "patient_id": read_identity(ds, "PatientID") or None,
            "study_id": read_identity(ds, "StudyInstanceUID") or None,
            "age": parse_age(_text(ds, "PatientAge")),
            "sex": parse_sex(_text(ds, "PatientSex")),
            "view": parse_view(view),
        }


# ---------------------------------------------------------------- reading the data set


class _Reader(io.BytesIO):
    """Notes whether a read found less than it asked for: pydicom passes over elements that are cut short."""

    cut = False

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        # Nothing at all where an element's 8 header bytes (or 1 byte to peek at) are expected is an end.
        if size is not None and len(found) < size and (found or size not in (1, 8)):
            self.cut = True
        return found


def _read(data: bytes, max_pixels: int, *, pixels: bool = True) -> tuple[Any, str]:
    """The data set and its transfer syntax; with `pixels` also sure to hold Pixel Data."""
    if not looks_like_dicom(data):
        raise ImageError("not_an_image", "the contents are not DICOM")
    bare = data[128:132] != b"DICM"
    if bare and data[:2] == b"\x02\x00":  # the preamble alone is missing
        data = bytes(128) + b"DICM" + data
    syntax = _transfer_syntax(data) if data[128:132] == b"DICM" else ""
    if syntax and (not pydicom.uid.UID(syntax).is_transfer_syntax or syntax in _DEFLATED_ELSEWHERE):
        raise _unsupported(syntax)
    if syntax == _DEFLATED:
        data, syntax = _inflated(data, max_pixels), _EXPLICIT_LITTLE
    reader = _Reader(data)
    try:
        ds = pydicom.dcmread(reader, force=bare, stop_before_pixels=not pixels)
        present = "PixelData" in ds
    except (OSError, EOFError, struct.error):
        if bare:
            raise ImageError("not_an_image", "the contents are not DICOM") from None
        if reader.cut or reader.tell() >= len(data):
            raise ImageError("truncated", "the DICOM file ends inside its header") from None
        raise
    if bare and not ("Rows" in ds and "Columns" in ds and (present or not pixels)):
        raise ImageError("not_an_image", "the contents are not DICOM")
    if pixels and not present:
        if reader.cut:
            raise ImageError("truncated", "the DICOM file ends before its pixel data do")
        _check_modality(ds)  # the better reason, where it is one
        raise ImageError("not_a_radiograph", "the DICOM file holds no pixel data")
    if not syntax:
        implicit, little = ds.original_encoding
        syntax = "1.2.840.10008.1.2" if implicit else _EXPLICIT_LITTLE if little else "1.2.840.10008.1.2.2"
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = syntax
    return ds, syntax


def _is_bare(data: bytes) -> bool:
    """Whether the data begin with an element of group 0002 or 0008 that has a plausible length."""
    if len(data) < 132 or data[:2] not in (b"\x02\x00", b"\x08\x00", b"\x00\x08"):
        return False
    if data[4:6].isalpha():
        return data[4:6].isupper()
    return int.from_bytes(data[4:8], "little") < len(data)


def _meta_elements(data: bytes) -> tuple[dict[int, bytes], int]:
    """Elements of group 0002 by element number, and where the data set begins (PS3.10, 7.1)."""
    found: dict[int, bytes] = {}
    at = 132
    while at + 8 <= len(data):
        group, element, kind, length = struct.unpack_from("<HH2sH", data, at)
        if group != 2:
            break
        header = 8
        if kind in (
            b"OB",
            b"OW",
            b"OF",
            b"OD",
            b"OL",
            b"OV",
            b"SQ",
            b"UC",
            b"UN",
            b"UR",
            b"UT",
            b"SV",
            b"UV",
        ):
            if at + 12 > len(data):
                break
            length = struct.unpack_from("<I", data, at + 8)[0]
            header = 12
        found[element] = data[at + header : at + header + length]
        at += header + length
    if at > len(data):
        raise ImageError("truncated", "the DICOM file ends inside its header")
    return found, at


def _transfer_syntax(data: bytes) -> str:
    value = _meta_elements(data)[0].get(0x0010, b"")
    return value.rstrip(b"\0 ").lstrip(b" ").decode("latin-1")


def _unsupported(syntax: str) -> ImageError:
    name = syntax if re.fullmatch(r"[0-9.]{1,64}", syntax) else "malformed"
    return ImageError("unsupported_transfer_syntax", f"no decoder for the transfer syntax {name}")


def _inflated(data: bytes, max_pixels: int) -> bytes:
    """A deflated file (PS3.5, A.5) as one in explicit little endian; its length is limited against bombs."""
    _, start = _meta_elements(data)
    limit = 4 * max_pixels + 16 * 1024 * 1024  # 16-bit gray or 8-bit RGB of the largest picture, and its header
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        body = stream.decompress(data[start:], limit)
    except zlib.error:
        raise ImageError("corrupt", "the deflated data set is damaged") from None
    if not stream.eof:
        if stream.unconsumed_tail or len(body) >= limit:
            raise ImageError("too_large", f"the deflated data set has more than {limit} bytes")
        raise ImageError("truncated", "the deflated data set ends too early")
    uid = _EXPLICIT_LITTLE.encode() + b"\0"
    return bytes(128) + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(uid)) + uid + body


def _check_modality(ds: Any) -> None:
    modality = _text(ds, "Modality").upper()
    if modality not in RADIOGRAPH_MODALITIES:
        name = modality if modality in _OTHER_MODALITIES else "not one that DICOM defines"
        raise ImageError("not_a_radiograph", f"the modality is {name}")


def _text(ds: Any, keyword: str) -> str:
    """An element as text without blanks; the first value of several, empty where there is none."""
    value = ds.get(keyword)
    if isinstance(value, pydicom.multival.MultiValue):
        value = value[0] if len(value) else None
    return "" if value is None else str(value).replace("\0", "").strip()


def _set_defaults(ds: Any) -> None:
    """Write the default of each header number that is absent or empty, before pydicom raises over it."""
    for keyword, default in _DEFAULTS.items():
        setattr(ds, keyword, _number(ds, keyword, default))


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        value = value.strip("\0 ")
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def _values(ds: Any, keyword: str) -> list[Any]:
    """The values of an element, None for each that is empty; `[None]` where the element is absent."""
    value = ds.get(keyword)
    several = isinstance(value, (list, tuple, pydicom.multival.MultiValue))
    return [None if _is_empty(item) else item for item in (value if several else [value])]


def _first(ds: Any, keyword: str) -> Any:
    """The first value of an element that is not empty, or None."""
    return next((item for item in _values(ds, keyword) if item is not None), None)


def _number(ds: Any, keyword: str, default: int | None = None) -> int:
    """The first value of an element as an integer; `corrupt` where there is none and no default."""
    value = _first(ds, keyword)
    if value is not None:
        return int(value)
    if default is None:
        raise ImageError("corrupt", f"the DICOM file lacks {keyword}")
    return default


def _decimals(ds: Any, keyword: str) -> list[float | None]:
    return [None if item is None else float(item) for item in _values(ds, keyword)]


def _decimal(ds: Any, keyword: str, default: float) -> float:
    value = _first(ds, keyword)
    return default if value is None else float(value)


# ---------------------------------------------------------------- stored values


def _pixels(ds: Any, syntax: str, rows: int, columns: int, samples: int, allocated: int, bits: int) -> np.ndarray:
    """Codes (the stored bits as unsigned integers) [H, W], or RGB samples [H, W, 3]; uint8 or uint16."""
    try:
        decoder = get_decoder(pydicom.uid.UID(syntax))
    except NotImplementedError:
        raise _unsupported(syntax) from None
    if not decoder.is_available:
        raise _unsupported(syntax)
    options: dict[str, Any] = {"index": 0, "allow_excess_frames": False}
    if decoder.is_native:
        _check_native_length(ds, rows * columns * samples, allocated)
        options["correct_unused_bits"] = False  # pydicom does not know High Bit; see below
    else:
        frame = get_frame(ds.PixelData, 0, number_of_frames=1)
        jpeg = _check_frame(frame, syntax, rows, columns, samples, allocated)
        if syntax == "1.2.840.10008.1.2.4.51" and jpeg is not None and jpeg.precision != 8:
            raise ImageError("unsupported_transfer_syntax", f"no decoder for {jpeg.precision} bits of {syntax}")
        if jpeg is not None and syntax in _JPEG_8_BIT and samples == 1:
            # Through the same decoder as a JPEG file, so that both give the same pixels.
            return np.bitwise_and(decode_jpeg(jpeg, rows * columns), (1 << min(bits, 8)) - 1)
        if syntax in _JPEG_2000:
            options["decoding_plugin"] = "pylibjpeg"
        elif syntax in _JPEG_LS:
            # Not whatever else is installed: what GDCM refuses is refused, on every machine.
            options["decoding_plugin"] = "gdcm"
            assert jpeg is not None
            if jpeg.precision in (6, 7):
                raise ImageError("unsupported_transfer_syntax", f"no decoder for {jpeg.precision} bits of {syntax}")
        elif syntax == "1.2.840.10008.1.2.5":
            # Eight times slower than pylibjpeg-rle, which panics over damaged data and prints a backtrace.
            options["decoding_plugin"] = "pydicom"
        if jpeg is not None and syntax not in _JPEG_LS:
            # GDCM ends the whole process where fewer bits than those allocated are stored and 8 are allocated
            # (gdcmImageCodec.cxx, CleanupUnusedBits). Its samples fill bytes or words, also where the header differs.
            container = 8 if jpeg.precision <= 8 else 16
            options |= {"bits_allocated": container, "bits_stored": container, "pixel_representation": 0}
    array, _ = decoder.as_array(ds, raw=False, **options)
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if array.shape != ((rows, columns) if samples == 1 else (rows, columns, 3)) or array.dtype.kind not in "ui":
        raise ImageError("corrupt", "the pixel data do not have the shape that the DICOM header gives")
    if array.dtype.itemsize > 2:
        raise ImageError("not_a_radiograph", f"samples of {8 * array.dtype.itemsize} bits; CR and DX have 8 or 16")
    codes: np.ndarray = array.view(np.uint8) if array.dtype.itemsize == 1 else array.view(np.uint16)
    if decoder.is_native and allocated > 1:
        unused = _number(ds, "HighBit", bits - 1) + 1 - bits
        if not 0 <= unused <= allocated - bits:
            raise ImageError("corrupt", "the image pixel module of the DICOM file contradicts itself")
        if unused:
            codes = np.right_shift(codes, unused)
    # Overlays of old files and the sign lie in the bits above those stored.
    return np.bitwise_and(codes, (1 << min(bits, 8 * codes.itemsize)) - 1)


def _check_native_length(ds: Any, values: int, allocated: int) -> None:
    subsampled = _text(ds, "PhotometricInterpretation").upper() == "YBR_FULL_422"
    expected = (values * allocated + 7) // 8
    if subsampled:  # two of the three samples are stored (PS3.3, C.7.6.3.1.2)
        expected = expected // 3 * 2
    if len(ds.PixelData) < expected:
        raise ImageError("truncated", f"{len(ds.PixelData)} bytes of pixel data; the header needs {expected}")


def _check_frame(frame: bytes, syntax: str, rows: int, columns: int, samples: int, allocated: int) -> JpegStream | None:
    """Compare a compressed frame's own size with the header's before a decoder makes room for it."""
    if not frame:
        raise ImageError("truncated", "the compressed pixel data are empty")
    jpeg = None
    if syntax in _JPEG_8_BIT | _JPEG_LOSSLESS | _JPEG_LS:
        jpeg = parse_jpeg(frame, jpeg_ls=syntax in _JPEG_LS)
        if not 2 <= jpeg.precision <= allocated:  # GDCM ends the whole process on such a value
            raise ImageError("corrupt", "the JPEG and the DICOM header differ in bits per sample")
        size = (jpeg.height, jpeg.width, jpeg.components)
    elif syntax in _JPEG_2000:
        size = _parse_jpeg_2000(frame)
    else:
        _check_rle(frame, samples * allocated // 8)
        return None
    if size != (rows, columns, samples):
        raise ImageError("corrupt", "the compressed pixel data do not have the size that the DICOM header gives")
    return jpeg


def _check_rle(frame: bytes, segments: int) -> None:
    """Refuse an RLE header (PS3.5, G.5) that does not fit its frame."""
    if len(frame) < 64:
        raise ImageError("truncated", "the RLE header ends too early")
    count, *offsets = struct.unpack_from("<16I", frame)
    used = [*offsets[:segments], len(frame)]
    if count != segments or used[0] != 64 or used != sorted(used):
        raise ImageError("corrupt", "the RLE header does not fit the pixel data")


def _parse_jpeg_2000(frame: bytes) -> tuple[int, int, int]:
    """Height, width and components of a JPEG 2000 codestream that has all tiles and its end (ITU-T T.800, A)."""
    start = frame.find(b"\xff\x4f\xff\x51")
    if start < 0 or start > 4096:  # a JP2 header may stand before it, though DICOM forbids that
        raise ImageError("corrupt", "the JPEG 2000 codestream does not begin with its header")
    if start + 42 > len(frame):
        raise ImageError("truncated", "the JPEG 2000 codestream ends inside its header")
    x1, y1, x0, y0, tile_w, tile_h, tile_x, tile_y, components = struct.unpack_from(">8IH", frame, start + 8)
    if not (tile_w and tile_h and x1 > x0 >= tile_x and y1 > y0 >= tile_y):
        raise ImageError("corrupt", "the header of the JPEG 2000 codestream is damaged")
    tiles = -(-(x1 - tile_x) // tile_w) * -(-(y1 - tile_y) // tile_h)
    seen: set[int] = set()
    at = start + 2
    while True:
        marker = frame[at : at + 2]
        if marker == b"\xff\xd9" or at + 12 > len(frame):
            break
        if marker == b"\xff\x90":
            tile, length = struct.unpack_from(">HI", frame, at + 4)
            seen.add(tile)
            if length == 0:  # the last tile-part, up to EOC
                at = len(frame.rstrip(b"\0")) - 2
                break
            if length < 14:
                raise ImageError("corrupt", "a tile of the JPEG 2000 codestream has no length")
            at += length
        elif marker[0] == 0xFF and not seen:
            at += 2 + max(2, int.from_bytes(frame[at + 2 : at + 4], "big"))
        else:
            raise ImageError("corrupt", "the JPEG 2000 codestream is damaged between its tiles")
    if len(seen) != tiles or frame[at : at + 2] != b"\xff\xd9":
        raise ImageError("truncated", "the JPEG 2000 codestream ends before its end marker")
    return y1 - y0, x1 - x0, components


# ---------------------------------------------------------------- stored values to gray


def _eight_bits(samples: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned samples of `bits` bits scaled over 0..255; 8 bits stay as they are."""
    if bits == 8:
        return samples.astype(np.uint8)
    top = (1 << bits) - 1
    table = ((np.arange(top + 1) * 510 + top) // (2 * top)).astype(np.uint8)
    return _mapped(samples, table)


def _mapped(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    out = np.empty(codes.shape, dtype=table.dtype)
    for row in range(0, len(codes), _ROWS_AT_ONCE):
        out[row : row + _ROWS_AT_ONCE] = table[codes[row : row + _ROWS_AT_ONCE]]
    return out


def _displayed(codes: np.ndarray, ds: Any, bits: int, *, inverted: bool) -> np.ndarray:
    """Steps 2 to 6 of the module's docstring, worked out once per possible stored value."""
    signed = ds.PixelRepresentation == 1
    values = np.arange(1 << bits, dtype=np.int64)
    if signed:
        values[values >= 1 << (bits - 1)] -= 1 << bits
    padding = _padding(ds, values, bits, signed)
    modality = _modality_values(ds, values, signed)
    table = _voi(ds, modality, signed)
    if table is None:
        shown = modality
        if bits > 8:
            present = np.zeros(1 << bits, dtype=bool)
            for row in range(0, len(codes), _ROWS_AT_ONCE):
                present[codes[row : row + _ROWS_AT_ONCE]] = True
            shown = modality[present & ~padding]
        low, high = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 0.0)
        table = np.zeros(1 << bits) if high <= low else np.clip((modality - low) / (high - low), 0.0, 1.0)
    gray = np.floor(table * 255.0 + 0.5).astype(np.uint8)
    if inverted:
        gray = 255 - gray
    gray[padding] = 0
    return _mapped(codes, gray)


def _padding(ds: Any, values: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Which stored values are padding: bool, one per value."""
    if _first(ds, "PixelPaddingValue") is None:
        return np.zeros(len(values), dtype=bool)
    first = _number(ds, "PixelPaddingValue")
    ends = sorted(_as_stored(end, bits, signed) for end in (first, _number(ds, "PixelPaddingRangeLimit", first)))
    return (values >= ends[0]) & (values <= ends[1])


def _as_stored(value: int, bits: int, signed: bool) -> int:
    """Undo a header value's wrong VR: US and SS share their bits, and writers mix them up."""
    if signed and value >= 1 << 15:
        return value - (1 << 16)
    if not signed and value < 0:
        return value + (1 << 16)
    return value


def _modality_values(ds: Any, values: np.ndarray, signed: bool) -> np.ndarray:
    """Modality LUT or rescale (PS3.3, C.11.1): float64, one per stored value."""
    lut = _first_lut(ds, "ModalityLUTSequence", signed)
    if lut is not None:
        return lut.entries[np.clip(values - lut.first, 0, len(lut.entries) - 1)].astype(np.float64)
    slope = _decimal(ds, "RescaleSlope", 1.0)
    intercept = _decimal(ds, "RescaleIntercept", 0.0)
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise ImageError("corrupt", "the rescale values of the DICOM file are not finite")
    return values * slope + intercept


def _voi(ds: Any, modality: np.ndarray, signed: bool) -> np.ndarray | None:
    """VOI LUT or window (PS3.3, C.11.2): float64 in 0..1, one per stored value; None without either."""
    lut = _first_lut(ds, "VOILUTSequence", signed or bool(modality.min() < 0))
    if lut is not None:
        index = np.clip(np.floor(modality + 0.5) - lut.first, 0, len(lut.entries) - 1).astype(np.int64)
        return np.minimum(lut.entries[index] / ((1 << _lut_bits(lut)) - 1), 1.0)
    pairs = zip(_decimals(ds, "WindowCenter"), _decimals(ds, "WindowWidth"), strict=False)
    window = next(((centre, width) for centre, width in pairs if centre is not None and width is not None), None)
    if window is None:
        return None
    name = _text(ds, "VOILUTFunction").upper()
    centre, width = window
    usable = width > 0 if name in _WINDOWS else width >= 1
    if not (usable and math.isfinite(centre) and math.isfinite(width)):
        return None
    return _WINDOWS.get(name, window_linear)(modality, centre, width)


def window_linear(x: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3, C.11.2.1.2.1: black up to c - 0.5 - (w - 1) / 2, white above c - 0.5 + (w - 1) / 2.

    Args:
        x: float64[N], the values after the modality LUT.

    Returns:
        float64[N] in 0..1.
    """
    if width == 1:  # a threshold; the ramp between its two ends is empty
        return (x > centre - 0.5).astype(np.float64)
    return np.clip((x - (centre - 0.5)) / (width - 1) + 0.5, 0.0, 1.0)


def window_linear_exact(x: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3, C.11.2.1.3.2: black up to c - w / 2, white above c + w / 2; as 0..1."""
    return np.clip((x - centre) / width + 0.5, 0.0, 1.0)


def window_sigmoid(x: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3, C.11.2.1.3.1: 1 / (1 + exp(-4 (x - c) / w)); result 0..1."""
    exponent = np.clip(-4.0 * (x - centre) / width, -700.0, 700.0)  # beyond, exp overflows for the same result
    return 1.0 / (1.0 + np.exp(exponent))


_WINDOWS: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "LINEAR_EXACT": window_linear_exact,
    "SIGMOID": window_sigmoid,
}


class _Lut(NamedTuple):
    """A lookup table (PS3.3, C.11.1.1 and C.11.2.1.1)."""

    entries: np.ndarray  # int64[N], unsigned 16-bit values
    first: int  # the value that the first entry is for
    bits: int  # per entry, as declared


def _first_lut(ds: Any, keyword: str, signed: bool) -> _Lut | None:
    """The first LUT of a sequence that has a descriptor and data; some devices write items without."""
    sequence = ds.get(keyword)
    for item in sequence if isinstance(sequence, pydicom.sequence.Sequence) else ():
        descriptor = _lut_descriptor(item)  # before the data, which pydicom cannot convert without it
        if descriptor is not None and not _is_empty(item.get("LUTData")):
            return _lut(item.LUTData, descriptor, ds, signed)
    return None


def _lut_descriptor(item: Any) -> tuple[int, int, int] | None:
    """Number of entries, first value mapped and bits per entry, as stored; None where all are absent or empty."""
    try:
        values = _values(item, "LUTDescriptor")
        if all(value is None for value in values):
            return None
        count, first, bits = (int(value) for value in values[:3])
    except Exception:  # also pydicom's own, for a length that is no whole number of values
        raise ImageError("corrupt", "a LUTDescriptor of the DICOM file does not hold three numbers") from None
    if not 8 <= bits <= 16:
        raise ImageError("corrupt", f"a LUTDescriptor of the DICOM file gives {bits} bits per entry, not 8 to 16")
    return count, first, bits


def _lut(raw: Any, descriptor: tuple[int, int, int], ds: Any, signed: bool) -> _Lut:
    count = (descriptor[0] & 0xFFFF) or 65536  # 65536 does not fit into its field and is written as 0
    if isinstance(raw, (bytes, bytearray)):
        little = ds.original_encoding[1] is not False
        packed = len(raw) in (count, count + count % 2)  # 8-bit entries without the byte between them
        whole = raw if packed else raw[: len(raw) // 2 * 2]
        entries = np.frombuffer(whole, dtype=np.uint8 if packed else "<u2" if little else ">u2")
    else:
        entries = np.atleast_1d(np.asarray(raw, dtype=np.int64)) & 0xFFFF
    if len(entries) < count:
        raise ImageError("corrupt", "a LUT of the DICOM file is shorter than it says")
    return _Lut(entries[:count].astype(np.int64), _as_stored(descriptor[1], 16, signed), descriptor[2])


def _lut_bits(lut: _Lut) -> int:
    """Bits per entry whose largest value is white: those that the entries use, where the declared ones are wrong.

    Some vendors declare 16 bits for entries of 12 or 14, and other viewers show such images at full brightness. Entries
    of 15 bits are a dark table of 16. Where entries need more bits than declared, the declared ones would show most of
    the image as white; one step above white is a rounded white and is shown as that.
    """
    largest = int(lut.entries.max())
    used = max(8, largest.bit_length())
    if used < lut.bits:
        return used if used <= 14 else lut.bits
    return used if largest > 1 << lut.bits else lut.bits
