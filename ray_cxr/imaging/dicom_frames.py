"""Pixel data of DICOM files: native and compressed frames to stored values."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import UID

from ray_cxr.errors import ImageError
from ray_cxr.imaging.dicom_elements import read_integer, read_text
from ray_cxr.imaging.jpeg import JpegStream, decode_jpeg, parse_jpeg

_JPEG_8_BIT = frozenset({"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"})
_JPEG_LOSSLESS = frozenset({"1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"})
_JPEG_LS = frozenset({"1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"})
_JPEG_2000 = frozenset(f"1.2.840.10008.1.2.4.{last}" for last in (90, 91, 201, 202, 203))


def read_pixels(ds: Any, syntax: str, rows: int, columns: int, samples: int, allocated: int, bits: int) -> np.ndarray:
    """Decode the only frame of a data set; `allocated` and `bits` are Bits Allocated and Bits Stored.

    Returns:
        uint8 or uint16: codes (the stored bits as unsigned integers) [H, W], or RGB samples [H, W, 3].
    """
    try:
        decoder = get_decoder(UID(syntax))
    except NotImplementedError:
        decoder = None
    if decoder is None or not decoder.is_available:
        raise unsupported_syntax(syntax)
    options: dict[str, Any] = {"index": 0, "allow_excess_frames": False}
    if decoder.is_native:
        _check_native_length(ds, rows * columns * samples, allocated)
        options["correct_unused_bits"] = False  # pydicom ignores High Bit; see below
    else:
        frame = get_frame(ds.PixelData, 0, number_of_frames=1)
        jpeg = _check_frame(frame, syntax, rows, columns, samples, allocated)
        if jpeg is not None and (
            (syntax in _JPEG_LS and jpeg.precision in (6, 7))
            or (syntax == "1.2.840.10008.1.2.4.51" and jpeg.precision != 8)
        ):
            raise ImageError("unsupported_transfer_syntax", f"no decoder for {jpeg.precision} bits of {syntax}")
        if jpeg is not None and syntax in _JPEG_8_BIT and samples == 1:
            # The same decoder as for JPEG files, so that both have the same pixels.
            return np.bitwise_and(decode_jpeg(jpeg, rows * columns), (1 << min(bits, 8)) - 1)
        if syntax in _JPEG_2000:
            options["decoding_plugin"] = "pylibjpeg"
        elif syntax in _JPEG_LS:
            # Always GDCM, so that other installed decoders do not change which files are refused.
            options["decoding_plugin"] = "gdcm"
        elif syntax == "1.2.840.10008.1.2.5":
            # pydicom is 8 times slower than pylibjpeg-rle, which panics on damaged data and prints a backtrace.
            options["decoding_plugin"] = "pydicom"
        if jpeg is not None and syntax not in _JPEG_LS:
            # GDCM aborts the process if 8 bits are allocated and fewer are stored (gdcmImageCodec.cxx,
            # CleanupUnusedBits). Its samples always fill bytes or words.
            container = 8 if jpeg.precision <= 8 else 16
            options |= {"bits_allocated": container, "bits_stored": container, "pixel_representation": 0}
    array, _ = decoder.as_array(ds, raw=False, **options)
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if array.shape != ((rows, columns) if samples == 1 else (rows, columns, 3)) or array.dtype.kind not in "ui":
        raise ImageError("corrupt", "the shape of the pixel data differs from the DICOM header")
    if array.dtype.itemsize > 2:
        raise ImageError("not_a_radiograph", f"samples of {8 * array.dtype.itemsize} bits; CR and DX have 8 or 16")
    codes: np.ndarray = array.view(np.uint8) if array.dtype.itemsize == 1 else array.view(np.uint16)
    if decoder.is_native and allocated > 1:
        unused = read_integer(ds, "HighBit", bits - 1) + 1 - bits
        if not 0 <= unused <= allocated - bits:
            raise ImageError("corrupt", "contradictory bit depths in the DICOM header")
        if unused:
            codes = np.right_shift(codes, unused)
    # The bits above those stored hold the sign, and overlays of old files.
    return np.bitwise_and(codes, (1 << min(bits, 8 * codes.itemsize)) - 1)


def _check_native_length(ds: Any, values: int, allocated: int) -> None:
    expected = (values * allocated + 7) // 8
    if read_text(ds, "PhotometricInterpretation").upper() == "YBR_FULL_422":
        expected = expected // 3 * 2  # two of the three samples are stored (PS3.3, C.7.6.3.1.2)
    if len(ds.PixelData) < expected:
        raise ImageError("truncated", f"{len(ds.PixelData)} bytes of pixel data; the header needs {expected}")


def _check_frame(frame: bytes, syntax: str, rows: int, columns: int, samples: int, allocated: int) -> JpegStream | None:
    """Compare the size of a compressed frame with the header before a decoder allocates memory for it."""
    if not frame:
        raise ImageError("truncated", "the compressed pixel data are empty")
    jpeg = None
    if syntax in _JPEG_8_BIT | _JPEG_LOSSLESS | _JPEG_LS:
        jpeg = parse_jpeg(frame, jpeg_ls=syntax in _JPEG_LS)
        if not 2 <= jpeg.precision <= allocated:  # GDCM aborts the process on other values
            raise ImageError("corrupt", "the JPEG and the DICOM header differ in bits per sample")
        size = (jpeg.height, jpeg.width, jpeg.components)
    elif syntax in _JPEG_2000:
        size = _parse_jpeg_2000(frame)
    else:
        _check_rle(frame, samples * allocated // 8)
        return None
    if size != (rows, columns, samples):
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
