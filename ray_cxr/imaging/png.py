"""PNG: check the chunks, drop all but what pixels need, decode."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, PngImagePlugin

from ray_cxr.errors import ImageError
from ray_cxr.imaging.pixels import check_size, to_gray

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
#: Bit depths that PNG allows, by colour type (ISO/IEC 15948, table 11.1).
_PNG_DEPTHS: dict[int, tuple[int, ...]] = {
    0: (1, 2, 4, 8, 16),
    2: (8, 16),
    3: (1, 2, 4, 8),
    4: (8, 16),
    6: (8, 16),
}
#: Samples per pixel, by colour type.
_PNG_SAMPLES: dict[int, int] = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
#: First row, first column, row step and column step of the seven passes (ISO/IEC 15948, clause 8.2).
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_INFLATE_AT_ONCE = 64 * 1024  # bytes; they become 66 MB at the very most
#: Modes of kornia-rs, by colour type, for 8 bits per sample.
_QUICK_MODES: dict[int, str] = {0: "mono", 2: "rgb", 6: "rgba"}
#: Larger pictures go to Pillow, which raises MemoryError where memory runs out; Rust ends the process.
_QUICK_PIXELS = 32 * 1024 * 1024
#: Far more than 8 KB chunks of the largest picture; each costs a step of a Python loop.
_MAX_CHUNKS = 1_000_000


def decode_png(data: bytes, max_pixels: int) -> np.ndarray:
    chunks = _png_chunks(data)
    kind, start, end = next(chunks)
    if kind != b"IHDR" or end - start != 13:
        raise ImageError("corrupt", "the PNG does not begin with its header chunk")
    width, height, depth, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", data[start:end])
    if depth not in _PNG_DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise ImageError("corrupt", "the header of the PNG holds values that PNG does not have")
    check_size(height, width, max_pixels)
    view = memoryview(data)
    kept = [view[: end + 4]]  # signature and header
    palette = False
    pixels: list[memoryview] = []
    for kind, start, end in chunks:
        if kind in (b"PLTE", b"IDAT", b"IEND"):
            kept.append(view[start - 8 : end + 4])
            palette |= kind == b"PLTE"
            if kind == b"IDAT":
                pixels.append(view[start:end])
        elif kind[0] & 0x20 == 0:  # an upper-case first letter: a decoder must know this chunk (clause 5.4)
            raise ImageError("corrupt", "the PNG holds a critical chunk that PNG does not have")
    if not pixels:
        raise ImageError("corrupt", "the PNG holds no pixel data")
    if colour == 3 and not palette:
        raise ImageError("corrupt", "the PNG lacks its palette")
    shown = b"".join(kept)
    if depth == 8 and colour in _QUICK_MODES and not interlace and height * width <= _QUICK_PIXELS:
        image = _decode_png_quickly(shown, height, width, _QUICK_MODES[colour])
        if image is not None:
            return image
    picture = PngImagePlugin.PngImageFile(io.BytesIO(shown))
    picture.load()
    # Pillow takes a compressed stream that ends early, in good order, for a whole picture and leaves the rest
    # at zero. Where the last row holds anything else it was reached, and inflating twice is not needed.
    last_row = picture.crop((0, height - 1, width, height))
    if interlace or not np.asarray(last_row).any():
        _check_png_length(pixels, width, height, depth * _PNG_SAMPLES[colour], interlaced=bool(interlace))
    return to_gray(picture)


def _decode_png_quickly(data: bytes, height: int, width: int, mode: str) -> np.ndarray | None:
    """kornia-rs in place of Pillow for the commonest PNGs: same pixels, half the time; None where it cannot.

    Like Pillow it refuses missing rows and unknown filters and passes over bytes behind the last row. Unlike Pillow
    it does not compare the Adler-32 of the pixel stream; the CRCs of the chunks cover the same bytes. It holds the
    GIL while it decodes: threads gain nothing from one another, processes do.
    """
    decoder = _quick_decoder()
    if decoder is None:
        return None
    try:
        samples = decoder(data, (height, width), mode)
    except Exception:  # Pillow decodes the file next, and gives the image or the error code
        return None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return None
    if samples.shape[2] == 1:
        return samples.reshape(height, width)
    return to_gray(Image.frombuffer(mode.upper(), (width, height), samples, "raw", mode.upper(), 0, 1))


@functools.cache
def _quick_decoder() -> Callable[[bytes, tuple[int, int], str], np.ndarray] | None:
    """kornia-rs's PNG decoder, or None where that package is absent or does not load."""
    try:
        from kornia_rs import io as kornia_io

        return kornia_io.decode_image_png_u8
    except (ImportError, AttributeError):
        return None


def _check_png_length(pixels: list[memoryview], width: int, height: int, bits: int, *, interlaced: bool) -> None:
    """Inflate the pixel data without keeping them, and refuse them where rows are missing."""
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    expected = 0
    for top, left, down, right in passes:
        rows, columns = -(-(height - top) // down), -(-(width - left) // right)
        expected += rows * (1 + (columns * bits + 7) // 8) if columns > 0 else 0
    stream = zlib.decompressobj()
    found = 0
    for part in pixels:
        for at in range(0, len(part), _INFLATE_AT_ONCE):
            found += len(stream.decompress(part[at : at + _INFLATE_AT_ONCE]))
            if found >= expected:
                return
    raise ImageError("corrupt", "the pixel data of the PNG lack rows")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, and start and end of the contents, of each chunk up to IEND; every CRC is compared."""
    at = len(PNG_MAGIC)
    view = memoryview(data)
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            raise ImageError("truncated", "the PNG ends before its end chunk")
        length = int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        start, end = at + 8, at + 8 + length
        if length > 0x7FFFFFFF or not kind.isalpha():
            raise ImageError("corrupt", "a chunk of the PNG has no valid header")
        if end + 4 > len(data):
            raise ImageError("truncated", "the PNG ends inside a chunk")
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ImageError("corrupt", "a chunk of the PNG does not match its checksum")
        yield kind, start, end
        if kind == b"IEND":
            return
        at = end + 4
    raise ImageError("corrupt", "the PNG is cut into too many chunks")
