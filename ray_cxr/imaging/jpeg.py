"""Decode JPEGs after removing all segments that pixels do not need."""

from __future__ import annotations

import io
import re
import struct
from typing import NamedTuple

import numpy as np
from PIL import JpegImagePlugin

from ray_cxr.errors import ImageError
from ray_cxr.imaging.pixels import check_size, to_gray

JPEG_MAGIC = b"\xff\xd8\xff"
#: The marker after a scan. A byte FF inside the scan is followed by a stuffed zero byte (T.81) or zero bit (T.87).
_MARKER = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")
_FRAME_MARKERS = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
_LS_MARKER = re.compile(rb"\xff+[\x80-\xcf\xd8-\xfe]")


class JpegStream(NamedTuple):
    """A complete JPEG or JPEG-LS stream; sizes in pixels, `precision` in bits per sample."""

    height: int
    width: int
    precision: int
    components: int
    #: From SOI to EOI without comments and application segments, except JFIF and Adobe, which define the colour space.
    stream: bytes


def parse_jpeg(data: bytes, *, jpeg_ls: bool = False) -> JpegStream:
    """Parse the segments of a JPEG (ITU-T T.81, B.1) or a JPEG-LS (T.87, C.1) without decoding pixels.

    Bytes after EOI are ignored. Entropy-coded data are only searched for the next marker. Their faults are left to the
    decoder; libjpeg conceals some of them.
    """
    size: tuple[int, int, int, int] | None = None
    segments: list[bytes] = [data[:2]]
    scans = 0
    offset = 2
    if data[:2] != b"\xff\xd8":
        raise ImageError("corrupt", "the JPEG stream has no start marker")
    while True:
        start = offset
        while data[offset : offset + 1] == b"\xff" and data[offset + 1 : offset + 2] in (b"\xff", b""):
            offset += 1  # fill bytes
        if offset + 2 > len(data):
            raise ImageError("truncated", "the JPEG ends before its end marker")
        if data[offset] != 0xFF:
            raise ImageError("corrupt", "the JPEG has bytes between its segments")
        marker = data[offset + 1]
        offset += 2
        if marker == 0xD9:
            if size is None or not scans:
                raise ImageError("corrupt", "the JPEG holds no image")
            return JpegStream(*size, b"".join([*segments, b"\xff\xd9"]))
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # TEM, RSTn: without contents
            continue
        if marker in (0x00, 0xD8):
            raise ImageError("corrupt", "the JPEG has a misplaced marker")
        length = int.from_bytes(data[offset : offset + 2], "big")
        if offset + max(2, length) > len(data):
            raise ImageError("truncated", "the JPEG ends inside a segment")
        if length < 2:
            raise ImageError("corrupt", "a segment of the JPEG has no length")
        if marker in _FRAME_MARKERS:
            if size is not None or length < 8:
                raise ImageError("corrupt", "the frame header of the JPEG is damaged")
            precision, height, width, components = struct.unpack_from(">BHHB", data, offset + 2)
            size = (height, width, precision, components)
        offset += length
        if marker == 0xDA:
            if size is None:
                raise ImageError("corrupt", "the JPEG has a scan before its frame header")
            following = (_LS_MARKER if jpeg_ls else _MARKER).search(data, offset)
            if following is None:
                raise ImageError("truncated", "the JPEG ends inside its pixel data")
            offset = following.start()
            scans += 1
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or marker in (0xE0, 0xEE):
            segments.append(data[start:offset])


def find_process(data: bytes) -> int | None:
    """Return the marker of the frame header, which names the process (T.81, table B.1; T.87: 0xF7); None if the data
    do not start with a JPEG's segments up to a frame header.
    """
    offset = 2
    if not data.startswith(JPEG_MAGIC):
        return None
    while data[offset : offset + 1] == b"\xff" and offset + 4 <= len(data):
        marker = data[offset + 1]
        if marker in _FRAME_MARKERS:
            return marker
        offset += 1 if marker == 0xFF else 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return None


def decode_jpeg(jpeg: JpegStream, max_pixels: int) -> np.ndarray:
    """Decode an 8-bit JPEG to uint8[H, W]."""
    check_size(jpeg.height, jpeg.width, max_pixels)
    if jpeg.precision != 8:
        raise ImageError("corrupt", f"the JPEG has {jpeg.precision} bits per sample; only 8 can be decoded")
    # Not Image.open, which has its own limit and warns about large images.
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(jpeg.stream))
    try:
        image.load()
    except OSError as error:
        if "truncated" in str(error):
            raise ImageError("truncated", "the pixel data of the JPEG are incomplete") from None
        raise
    return to_gray(image)
