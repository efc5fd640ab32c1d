"""Decode PNGs after checking their chunks and removing those that pixels do not need."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, PngImagePlugin

from ray_cxr.errors import ImageError
from ray_cxr.imaging.pixels import check_size, decoder_errors, to_gray

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
#: Allowed bit depths by colour type (ISO/IEC 15948, table 11.1).
_PNG_DEPTHS: dict[int, tuple[int, ...]] = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
#: Samples per pixel by colour type.
_PNG_SAMPLES: dict[int, int] = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
#: First row, first column, row step and column step of the seven passes (ISO/IEC 15948, clause 8.2).
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_INFLATE_BYTES = 64 * 1024  # which inflate to at most 66 MB
#: Modes of kornia-rs by colour type, for 8 bits per sample.
_KORNIA_MODES: dict[int, str] = {0: "mono", 2: "rgb", 6: "rgba"}
#: Larger images go to Pillow, which raises MemoryError when out of memory; Rust aborts the process.
_KORNIA_PIXELS = 32 * 1024 * 1024
#: Far more than the 8 KB chunks of the largest image; each costs a step of a Python loop.
_MAX_CHUNKS = 1_000_000


def decode_png(data: bytes, max_pixels: int) -> np.ndarray:
    """Decode a PNG to uint8[H, W]."""
    chunks = _png_chunks(data)
    kind, start, end = next(chunks)
    if kind != b"IHDR" or end - start != 13:
        raise ImageError("corrupt", "the first chunk of the PNG is not its header")
    width, height, depth, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", data[start:end])
    if depth not in _PNG_DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise ImageError("corrupt", "the header of the PNG has invalid values")
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
        elif kind[0] & 0x20 == 0:  # upper case: decoders must support this chunk (clause 5.4)
            raise ImageError("corrupt", "the PNG has an unknown critical chunk")
    if not pixels:
        raise ImageError("corrupt", "the PNG has no pixel data")
    if colour == 3 and not palette:
        raise ImageError("corrupt", "the PNG has no palette")
    reduced = b"".join(kept)
    if depth == 8 and colour in _KORNIA_MODES and not interlace and height * width <= _KORNIA_PIXELS:
        decoded = _decode_with_kornia(reduced, height, width, _KORNIA_MODES[colour])
        if decoded is not None:
            return decoded
    image = PngImagePlugin.PngImageFile(io.BytesIO(reduced))
    image.load()
    # Pillow accepts a compressed stream that ends early and leaves the remaining rows 0. If the last row has other
    # values, the stream is complete and need not be inflated again.
    if interlace or not np.asarray(image.crop((0, height - 1, width, height))).any():
        _check_png_length(pixels, width, height, depth * _PNG_SAMPLES[colour], interlaced=bool(interlace))
    return to_gray(image)


def _decode_with_kornia(data: bytes, height: int, width: int, mode: str) -> np.ndarray | None:
    """Decode with kornia-rs, which takes half of Pillow's time for the same pixels; None if kornia-rs fails.

    Like Pillow, kornia-rs refuses missing rows and unknown filters, and ignores bytes after the last row. Unlike
    Pillow, it does not check the Adler-32 of the pixel stream; the CRCs of the chunks cover the same bytes. It holds
    the GIL, so only processes decode in parallel.
    """
    decoder = _load_kornia()
    if decoder is None:
        return None
    try:
        with decoder_errors("PNG"):
            samples = decoder(data, (height, width), mode)
    except ImageError:  # Pillow then decodes the file or finds the error
        return None
    if samples.shape[2] == 1:
        return samples.reshape(height, width)
    return to_gray(Image.frombuffer(mode.upper(), (width, height), samples, "raw", mode.upper(), 0, 1))


@functools.cache
def _load_kornia() -> Callable[[bytes, tuple[int, int], str], np.ndarray] | None:
    """Return kornia-rs's PNG decoder, or None if the package is missing or does not load."""
    try:
        from kornia_rs import io as kornia_io

        return kornia_io.decode_image_png_u8
    except (ImportError, AttributeError):
        return None


def _check_png_length(pixels: list[memoryview], width: int, height: int, bits: int, *, interlaced: bool) -> None:
    """Inflate the pixel data without keeping them, to refuse missing rows."""
    expected = 0
    for top, left, down, right in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        rows, columns = -(-(height - top) // down), -(-(width - left) // right)
        expected += rows * (1 + (columns * bits + 7) // 8) if columns > 0 else 0
    stream = zlib.decompressobj()
    length = 0
    for part in pixels:
        for start in range(0, len(part), _INFLATE_BYTES):
            length += len(stream.decompress(part[start : start + _INFLATE_BYTES]))
            if length >= expected:
                return
    raise ImageError("corrupt", "the pixel data of the PNG are incomplete")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of the contents of each chunk up to IEND, after checking its CRC."""
    start = len(PNG_MAGIC) + 8
    view = memoryview(data)
    for _ in range(_MAX_CHUNKS):
        if start > len(data):
            raise ImageError("truncated", "the PNG ends before its end chunk")
        length = int.from_bytes(data[start - 8 : start - 4], "big")
        kind = data[start - 4 : start]
        end = start + length
        if length > 0x7FFFFFFF or not kind.isalpha():
            raise ImageError("corrupt", "a chunk of the PNG has an invalid header")
        if end + 4 > len(data):
            raise ImageError("truncated", "the PNG ends inside a chunk")
        if zlib.crc32(view[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ImageError("corrupt", "a chunk of the PNG does not match its checksum")
        yield kind, start, end
        if kind == b"IEND":
            return
        start = end + 12  # after the checksum, and the length and type of the next chunk
    raise ImageError("corrupt", "the PNG has too many chunks")
