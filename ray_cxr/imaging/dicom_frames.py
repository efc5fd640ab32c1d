"""Pixel data of DICOM files: native and compressed frames to stored values."""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import numpy as np
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import UID

from ray_cxr.errors import ImageError
from ray_cxr.imaging.dicom_elements import read_integer, read_text
from ray_cxr.imaging.jpeg import JpegStream, decode_jpeg, find_process, parse_jpeg

_EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
_JPEG_8_BIT, _JPEG_12_BIT = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
_RLE = "1.2.840.10008.1.2.5"
_JPEG_DCT = frozenset({_JPEG_8_BIT, _JPEG_12_BIT})
_JPEG_LOSSLESS = frozenset({"1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"})
_JPEG_LS = frozenset({"1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"})
_JPEG_2000 = frozenset(f"1.2.840.10008.1.2.4.{last}" for last in (90, 91, 201, 202, 203))
#: Syntaxes of each kind of stream; the first decodes streams of files that declare the syntax of another kind.
_KINDS: dict[str, tuple[str, frozenset[str]]] = {
    "JPEG": (_JPEG_8_BIT, _JPEG_DCT),
    "lossless JPEG": ("1.2.840.10008.1.2.4.70", _JPEG_LOSSLESS),
    "JPEG-LS": ("1.2.840.10008.1.2.4.81", _JPEG_LS),
    "JPEG 2000": ("1.2.840.10008.1.2.4.91", _JPEG_2000),
    "RLE": (_RLE, frozenset({_RLE})),
}
#: Tag of the items that hold the fragments of compressed pixel data (PS3.5, A.4).
_ITEM = b"\xfe\xff\x00\xe0"
_JP2_SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"  # ISO/IEC 15444-1, I.5.1


def read_pixels(ds: Any, syntax: str, rows: int, columns: int, allocated: int, bits: int) -> np.ndarray:
    """Decode the only frame of a data set; `allocated` and `bits` are Bits Allocated and Bits Stored.

    A compressed stream that is unmistakable is decoded even if the header declares another transfer syntax.

    Returns:
        uint8 or uint16: codes (the stored bits as unsigned integers) [H, W], or RGB samples [H, W, 3].
    """
    samples = ds.SamplesPerPixel
    actual, frame, kind = _find_frame(ds, syntax, (rows, columns, samples), allocated)
    try:
        array, is_native = _decode_frame(ds, actual, frame, (rows, columns, samples), allocated)
    except ImageError as error:
        if actual == syntax:
            raise
        name = UID(syntax).name
        raise ImageError(
            error.code, f"{error.message}; the transfer syntax {name} is wrong, the pixel data are {kind}"
        ) from None
    if array.shape != ((rows, columns) if samples == 1 else (rows, columns, 3)) or array.dtype.kind not in "ui":
        raise ImageError("corrupt", "the shape of the pixel data differs from the DICOM header")
    if array.dtype.itemsize > 2:
        raise ImageError("not_a_radiograph", f"samples of {8 * array.dtype.itemsize} bits; CR and DX have 8 or 16")
    codes: np.ndarray = array.view(np.uint8) if array.dtype.itemsize == 1 else array.view(np.uint16)
    if is_native and allocated > 1:
        high = read_integer(ds, "HighBit", bits - 1)
        unused = high + 1 - bits
        if not 0 <= unused <= allocated - bits:
            depths = f"BitsStored {bits} and BitsAllocated {allocated}"
            raise ImageError("corrupt", f"HighBit of the DICOM file is {high}, which contradicts {depths}")
        if unused:
            codes = np.right_shift(codes, unused)
    # The bits above those stored hold the sign, and overlays of old files.
    return np.bitwise_and(codes, (1 << min(bits, 8 * codes.itemsize)) - 1)


def _find_frame(ds: Any, syntax: str, shape: tuple[int, int, int], allocated: int) -> tuple[str, bytes, str]:
    """Return the transfer syntax of the pixel data, their only frame if it is compressed, and the kind of its stream.

    Pixel data that contradict the declared syntax are put into the form that their own syntax requires.
    """
    element = ds["PixelData"]
    data = element.value or b""
    native = _count_native_bytes(ds, shape, allocated)
    is_native = not UID(syntax).is_encapsulated
    if is_native and len(data) in (native, native + native % 2) and not element.is_undefined_length:
        return syntax, b"", ""
    is_encapsulated = data[:4] == _ITEM
    frame = get_frame(data, 0, number_of_frames=1) if is_encapsulated else data
    kind = _identify_stream(frame, shape[2] * allocated // 8)
    if kind:
        usual, syntaxes = _KINDS[kind]
        if not is_encapsulated:
            ds.PixelData = encapsulate([frame])
        return syntax if syntax in syntaxes else usual, frame, kind
    if is_encapsulated and not is_native:
        return syntax, frame, ""
    if is_encapsulated or not is_native:  # perhaps uncompressed, with a compressed syntax or in an item
        if len(frame) not in (native, native + native % 2):
            raise ImageError("corrupt", f"the pixel data do not have the transfer syntax {UID(syntax).name}")
        ds.PixelData = frame
    return syntax if is_native else _EXPLICIT_LITTLE, b"", "uncompressed"


def _identify_stream(frame: bytes, segments: int) -> str:
    """Return the kind of a compressed frame by its header, one of `_KINDS`, or an empty text if it has none of them."""
    if frame[:4] == b"\xff\x4f\xff\x51" or frame[:12] == _JP2_SIGNATURE:
        return "JPEG 2000"
    process = find_process(frame)
    if process is not None:
        return {0xC3: "lossless JPEG", 0xF7: "JPEG-LS"}.get(process, "JPEG")
    try:
        _check_rle(frame, segments)
    except ImageError:
        return ""
    return "RLE"


def _decode_frame(
    ds: Any, syntax: str, frame: bytes, shape: tuple[int, int, int], allocated: int
) -> tuple[np.ndarray, bool]:
    """Return the samples of a frame in native byte order, and whether they were uncompressed."""
    decoder = _get_decoder(syntax)
    options: dict[str, Any] = {"index": 0, "allow_excess_frames": False}
    jpeg = None if decoder.is_native else _check_frame(frame, syntax, shape, allocated)
    if jpeg is None:
        if decoder.is_native:
            needed = _count_native_bytes(ds, shape, allocated)
            if len(ds.PixelData or b"") < needed:
                raise ImageError(
                    "truncated", f"{len(ds.PixelData or b'')} bytes of pixel data; the header needs {needed}"
                )
            options["correct_unused_bits"] = False  # pydicom ignores High Bit; see `read_pixels`
        else:
            # For RLE, pydicom is 8 times slower than pylibjpeg-rle, which panics on damaged data and prints a
            # backtrace.
            options["decoding_plugin"] = "pylibjpeg" if syntax in _JPEG_2000 else "pydicom"
    elif syntax in _JPEG_LS:
        # Always GDCM, so that other installed decoders do not change which files are refused.
        options["decoding_plugin"] = "gdcm"
        if jpeg.precision in (6, 7):
            raise _unsupported_precision(jpeg, syntax)
    elif syntax in _JPEG_DCT and jpeg.precision == 8 and shape[2] == 1:
        # The same decoder as for JPEG files, so that both have the same pixels.
        return decode_jpeg(jpeg, shape[0] * shape[1]), False
    elif syntax in _JPEG_DCT and jpeg.precision == 12 and shape[2] == 1:
        # GDCM decodes them, but pydicom passes them on only with the syntax of lossless JPEG.
        decoder = _get_decoder(_KINDS["lossless JPEG"][0])
        options |= {"bits_allocated": 16, "bits_stored": 12, "pixel_representation": 0, "decoding_plugin": "gdcm"}
    elif syntax in _JPEG_DCT and jpeg.precision != 8:
        raise _unsupported_precision(jpeg, syntax)
    else:
        # GDCM aborts the process if 8 bits are allocated and fewer are stored (gdcmImageCodec.cxx,
        # CleanupUnusedBits). Its samples always fill bytes or words.
        container = 8 if jpeg.precision <= 8 else 16
        options |= {"bits_allocated": container, "bits_stored": container, "pixel_representation": 0}
    ds.file_meta.TransferSyntaxUID = decoder.UID  # pydicom compares them
    array, _ = decoder.as_array(ds, raw=False, **options)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")), decoder.is_native


def _get_decoder(syntax: str) -> Any:
    try:
        decoder = get_decoder(UID(syntax))
    except NotImplementedError:
        raise unsupported_syntax(syntax) from None
    if not decoder.is_available:
        raise unsupported_syntax(syntax)
    return decoder


def _count_native_bytes(ds: Any, shape: tuple[int, int, int], allocated: int) -> int:
    """Return the length of uncompressed pixel data without padding."""
    length = (math.prod(shape) * allocated + 7) // 8
    if read_text(ds, "PhotometricInterpretation").upper() == "YBR_FULL_422":
        return length // 3 * 2  # two of the three samples are stored (PS3.3, C.7.6.3.1.2)
    return length


def _check_frame(frame: bytes, syntax: str, shape: tuple[int, int, int], allocated: int) -> JpegStream | None:
    """Compare the size of a compressed frame with the header before a decoder allocates memory for it."""
    if not frame:
        raise ImageError("truncated", "the compressed pixel data are empty")
    jpeg = None
    if syntax in _JPEG_2000:
        size = _parse_jpeg_2000(frame)
    elif syntax == _RLE:
        _check_rle(frame, shape[2] * allocated // 8)
        return None
    else:
        jpeg = parse_jpeg(frame, jpeg_ls=syntax in _JPEG_LS)
        if not 2 <= jpeg.precision <= allocated:  # GDCM aborts the process on other values
            raise ImageError("corrupt", "the JPEG and the DICOM header differ in bits per sample")
        size = (jpeg.height, jpeg.width, jpeg.components)
    if size != shape:
        raise ImageError("corrupt", "the size of the compressed pixel data differs from the DICOM header")
    return jpeg


def _check_rle(frame: bytes, segments: int) -> None:
    """Refuse an RLE header (PS3.5, G.5) that contradicts its frame."""
    if len(frame) < 64:
        raise ImageError("truncated", "the RLE header is incomplete")
    count, *offsets = struct.unpack_from("<16I", frame)
    edges = [*offsets[:segments], len(frame)]
    if count != segments or edges[0] != 64 or edges != sorted(edges):
        raise ImageError("corrupt", "the RLE header contradicts the pixel data")


def _parse_jpeg_2000(frame: bytes) -> tuple[int, int, int]:
    """Return height, width and components of a JPEG 2000 codestream with all tiles and its end (ITU-T T.800, A)."""
    start = frame.find(b"\xff\x4f\xff\x51")
    if start < 0 or start > 4096:  # some files have a JP2 header before it, which DICOM forbids
        raise ImageError("corrupt", "the JPEG 2000 codestream has no header")
    if start + 42 > len(frame):
        raise ImageError("truncated", "the JPEG 2000 codestream ends inside its header")
    x1, y1, x0, y0, tile_w, tile_h, tile_x, tile_y, components = struct.unpack_from(">8IH", frame, start + 8)
    if not (tile_w and tile_h and x1 > x0 >= tile_x and y1 > y0 >= tile_y):
        raise ImageError("corrupt", "the header of the JPEG 2000 codestream is damaged")
    tiles = -(-(x1 - tile_x) // tile_w) * -(-(y1 - tile_y) // tile_h)
    present: set[int] = set()
    offset = start + 2
    while (marker := frame[offset : offset + 2]) != b"\xff\xd9" and offset + 12 <= len(frame):
        if marker == b"\xff\x90":
            tile, length = struct.unpack_from(">HI", frame, offset + 4)
            present.add(tile)
            if length == 0:  # the last tile-part, up to EOC
                offset = len(frame.rstrip(b"\0")) - 2
                break
            if length < 14:
                raise ImageError("corrupt", "a tile of the JPEG 2000 codestream has no length")
            offset += length
        elif marker[0] == 0xFF and not present:
            offset += 2 + max(2, int.from_bytes(frame[offset + 2 : offset + 4], "big"))
        else:
            raise ImageError("corrupt", "the JPEG 2000 codestream is damaged between its tiles")
    if len(present) != tiles or frame[offset : offset + 2] != b"\xff\xd9":
        raise ImageError("truncated", "the JPEG 2000 codestream ends before its end marker")
    return y1 - y0, x1 - x0, components


def unsupported_syntax(syntax: str) -> ImageError:
    name = syntax if re.fullmatch(r"[0-9.]{1,64}", syntax) else "malformed"
    return ImageError("unsupported_transfer_syntax", f"no decoder for the transfer syntax {name}")


def _unsupported_precision(jpeg: JpegStream, syntax: str) -> ImageError:
    return ImageError("unsupported_transfer_syntax", f"no decoder for {jpeg.precision} bits of {syntax}")
