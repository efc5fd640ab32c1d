"""From a path to pixels: the one way in which `prepare`, `score` and `predict` read a radiograph.

    path -> read_bytes -> decode: uint8[H, W] -> resize: uint8[S, S]

Whatever is wrong with a file, it leaves here as one `ImageError` with a code; no decoder's own exception,
warning or print gets out (one exception, in GDCM: see `dicom`). Nothing here has global state that decoding
changes, so several threads can decode at once.

The kind of a file is told by its first bytes, never by its name. Only the parts of a PNG or JPEG that carry
pixels are shown to a decoder: text, EXIF, colour profiles, previews and animation are cut out before, which also
takes away every decompression bomb that can hide in them.

How stored samples become gray (uint8):

- 8-bit gray: as it is. 1 bit: 0 and 255. 2 and 4 bits: stretched over the full range.
- 16-bit gray: divided by 257 and rounded, so that 0..65535 fills 0..255. Never by the picture's own range:
  the same stored value must give the same gray in every file.
- RGB, and palettes by way of RGB: luma of ITU-R BT.601, rounded; where R = G = B it is exactly that value.
- 16-bit RGB and 16-bit gray with alpha: Pillow keeps the upper byte of each sample; then as for 8 bits.
- Alpha is dropped, not composed with a background. NIH's RGBA files are opaque, and a radiograph has no
  background.
- JPEG: gray as it is; YCbCr, RGB and CMYK by way of RGB.
- EXIF orientation is not applied: the stored pixels are the radiograph, and no X-ray system writes that tag.
- Several frames (APNG, MPO): the first one.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin

from ray_cxr.config import InputSpec
from ray_cxr.data.storage import read_bytes
from ray_cxr.errors import ImageError

#: Larger pictures are refused before they are decoded, pixels.
MAX_PIXELS = 100_000_000
#: A picture with a shorter side than this is an icon or a preview, not a radiograph; pixels.
MIN_SIDE = 32

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_JPEG_MAGIC = b"\xff\xd8\xff"
_INTERPOLATION: dict[str, int] = {
    "area": cv2.INTER_AREA,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
}


def load(path: str, spec: InputSpec | None = None, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read, decode and (with a spec) resize one radiograph.

    Args:
        path: a local path or a URI; PNG, JPEG or DICOM.
        spec: the model's input, or None for the picture in its own size.
        max_pixels: larger pictures are refused before they are decoded.

    Returns:
        uint8[S, S] with a spec, else uint8[H, W].

    Raises:
        ImageError: any code of `read_bytes` and `decode`.
    """
    image = decode(read_bytes(path), max_pixels=max_pixels)
    return image if spec is None else resize(image, spec)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a PNG, JPEG or DICOM to gray by the rules at the top of this module (DICOM: of `dicom`).

    Args:
        data: the contents of a file.
        max_pixels: limit of height x width, compared with the header before any pixel is decoded.

    Returns:
        uint8[H, W], C-contiguous and the caller's own; 0 is black, 255 white.

    Raises:
        ImageError: `empty`, `not_an_image`, `truncated`, `corrupt`, `too_large`, `too_small`, `blank` (one
            value everywhere), and for a DICOM also `not_a_radiograph` and `unsupported_transfer_syntax`.
    """
    if not data:
        raise ImageError("empty", "there are 0 bytes")
    data = bytes(data)
    if data.startswith(_PNG_MAGIC):
        with decoder_errors("PNG"):
            image = _decode_png(data, max_pixels)
    elif data.startswith(_JPEG_MAGIC):
        with decoder_errors("JPEG"):
            image = decode_jpeg(parse_jpeg(data), max_pixels)
    else:
        # pydicom and GDCM are slow to import, and an archive of PNGs never needs them.
        from ray_cxr.data import dicom

        if not dicom.looks_like_dicom(data):
            raise ImageError("not_an_image", "the contents are neither PNG, JPEG nor DICOM")
        image = dicom.decode_dicom(data, max_pixels=max_pixels)
    if image.min() == image.max():
        raise ImageError("blank", f"all pixels have the value {int(image.min())}")
    return image


def is_png_or_jpeg(data: bytes) -> bool:
    """Whether the first bytes are a PNG's or a JPEG's, which is how `decode` tells."""
    return data.startswith((_PNG_MAGIC, _JPEG_MAGIC))


def resize(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Bring a picture to the model's square input, straight from its own size.

    Args:
        image: uint8[H, W].
        spec: side S, interpolation and aspect. `stretch` scales both sides to S. `pad` keeps the proportions
            and centres the picture on black (an odd remainder goes below or to the right). `crop` takes the
            centred square first (an odd remainder is lost below or to the right).

    Returns:
        uint8[S, S], always a new array; equal to the input where that is S x S already.

    Raises:
        ValueError: another dtype, not two dimensions, or an empty side.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ValueError(f"image must be a uint8 array, got {getattr(image, 'dtype', type(image).__name__)}")
    if image.ndim != 2 or 0 in image.shape:
        raise ValueError(f"image must have the shape [H, W], got {list(image.shape)}")
    size = spec.size
    height, width = image.shape
    if (height, width) == (size, size):
        return image.copy(order="C")
    if spec.aspect == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return _scaled(image[top : top + side, left : left + side], size, size, spec)
    if spec.aspect == "pad":
        longest = max(height, width)
        rows = max(1, (2 * height * size + longest) // (2 * longest))  # round to nearest, in integers
        columns = max(1, (2 * width * size + longest) // (2 * longest))
        top, left = (size - rows) // 2, (size - columns) // 2
        canvas = np.zeros((size, size), dtype=np.uint8)
        canvas[top : top + rows, left : left + columns] = _scaled(image, rows, columns, spec)
        return canvas
    return _scaled(image, size, size, spec)


@contextlib.contextmanager
def decoder_errors(kind: str) -> Iterator[None]:
    """Turn whatever a decoder raises inside the block into an `ImageError`.

    `corrupt` names the exception's type alone, because decoders put file contents into their messages.
    """
    try:
        yield
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("too_large", f"the {kind} decoder ran out of memory") from None
    except Exception as error:
        raise ImageError("corrupt", f"the {kind} decoder failed ({type(error).__name__})") from None
    except BaseException as error:
        # A panic of a decoder written in Rust arrives as a BaseException of its own.
        if type(error).__name__ != "PanicException":
            raise
        raise ImageError("corrupt", f"the {kind} decoder failed (panic)") from None


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Refuse a picture by the size in its header.

    Raises:
        ImageError: `corrupt` (no pixels), `too_large` or `too_small`.
    """
    if height < 1 or width < 1:
        raise ImageError("corrupt", f"the header gives {height} x {width} pixels")
    if height * width > max_pixels:
        raise ImageError("too_large", f"{height} x {width} pixels; the limit is {max_pixels}")
    if min(height, width) < MIN_SIDE:
        raise ImageError("too_small", f"{height} x {width} pixels; the shorter side must have {MIN_SIDE}")


def luma(rgb: np.ndarray) -> np.ndarray:
    """uint8[H, W, 3] to uint8[H, W]: rounded ITU-R BT.601 luma, exact where R = G = B."""
    return _gray_array(Image.fromarray(np.ascontiguousarray(rgb), "RGB"))


class JpegStream(NamedTuple):
    """A complete JPEG or JPEG-LS stream; sizes in pixels, `precision` in bits per sample."""

    height: int
    width: int
    precision: int
    components: int
    #: The stream from SOI to EOI without comments and application segments (JFIF and Adobe stay: they tell
    #: the colour space).
    stream: bytes


def parse_jpeg(data: bytes, *, jpeg_ls: bool = False) -> JpegStream:
    """Walk the segments of a JPEG (ITU-T T.81, B.1) or a JPEG-LS (T.87, C.1) without decoding pixels.

    Bytes after EOI are ignored. Entropy-coded data are only searched for the next marker: what is wrong
    inside them is left to the decoder, and libjpeg conceals some of it.

    Raises:
        ImageError: `truncated` where the data end before EOI, `corrupt` where they are not made of segments.
    """
    # A byte FF inside entropy-coded data is followed by a stuffed zero byte (T.81) or zero bit (T.87).
    marker_after_scan = _LS_MARKER if jpeg_ls else _MARKER
    size: tuple[int, int, int, int] | None = None
    kept: list[bytes] = [data[:2]]
    scans = 0
    at = 2
    if data[:2] != b"\xff\xd8":
        raise ImageError("corrupt", "a JPEG stream that does not begin with SOI")
    while True:
        start = at
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] in (b"\xff", b""):
            at += 1  # fill bytes
        if at + 2 > len(data):
            raise ImageError("truncated", "the JPEG ends before its end marker")
        if data[at] != 0xFF:
            raise ImageError("corrupt", "bytes between the segments of the JPEG")
        marker = data[at + 1]
        at += 2
        if marker == 0xD9:
            if size is None or not scans:
                raise ImageError("corrupt", "the JPEG holds no picture")
            return JpegStream(*size, b"".join([*kept, b"\xff\xd9"]))
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # TEM, RSTn: stand alone
            continue
        if marker in (0x00, 0xD8):
            raise ImageError("corrupt", "a marker of the JPEG where none can be")
        if at + 2 > len(data):
            raise ImageError("truncated", "the JPEG ends inside a segment")
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2:
            raise ImageError("corrupt", "a segment of the JPEG has no length")
        if at + length > len(data):
            raise ImageError("truncated", "the JPEG ends inside a segment")
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            if size is not None or length < 8:
                raise ImageError("corrupt", "the frame header of the JPEG is damaged")
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 2)
            size = (height, width, precision, components)
        at += length
        if marker == 0xDA:
            if size is None:
                raise ImageError("corrupt", "the JPEG has a scan before its frame header")
            following = marker_after_scan.search(data, at)
            if following is None:
                raise ImageError("truncated", "the JPEG ends inside its pixel data")
            at = following.start()
            scans += 1
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or marker in (0xE0, 0xEE):
            kept.append(data[start:at])


_MARKER = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")
_LS_MARKER = re.compile(rb"\xff+[\x80-\xcf\xd8-\xfe]")


def decode_jpeg(jpeg: JpegStream, max_pixels: int) -> np.ndarray:
    """Decode an 8-bit JPEG to uint8[H, W].

    Raises:
        ImageError: `too_large`, `too_small`, `truncated`, `corrupt`.
    """
    check_size(jpeg.height, jpeg.width, max_pixels)
    if jpeg.precision != 8:
        raise ImageError("corrupt", f"a JPEG of {jpeg.precision} bits per sample; only 8 can be decoded")
    # The plug-in's class, not Image.open: that one warns of large pictures by a limit of its own.
    picture = JpegImagePlugin.JpegImageFile(io.BytesIO(jpeg.stream))
    try:
        picture.load()
    except OSError as error:
        if "truncated" in str(error):
            raise ImageError("truncated", "the pixel data of the JPEG end too early") from None
        raise
    return _gray_array(picture)


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


def _decode_png(data: bytes, max_pixels: int) -> np.ndarray:
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
    return _gray_array(picture)


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
    return _gray_array(Image.frombuffer(mode.upper(), (width, height), samples, "raw", mode.upper(), 0, 1))


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
    at = len(_PNG_MAGIC)
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


def _gray_array(picture: Image.Image) -> np.ndarray:
    """A loaded Pillow picture as uint8[H, W], by the rules at the top of this module."""
    if picture.mode == "1":
        return np.asarray(picture).astype(np.uint8) * np.uint8(255)
    if picture.mode.startswith("I;16"):
        wide = np.asarray(picture)
        # (x + 128) // 257 rounds x / 257, and needs 17 bits only above 65407, where the result is 255 anyway
        return ((np.minimum(wide, 65407) + 128) // 257).astype(np.uint8)
    if picture.mode in ("P", "CMYK", "YCbCr"):
        picture = picture.convert("RGB")
    if picture.mode not in ("L", "LA", "RGB", "RGBA"):
        raise ImageError("corrupt", "samples of a kind that radiographs do not have")
    return np.array(picture.convert("L"), dtype=np.uint8, order="C")


def _scaled(image: np.ndarray, rows: int, columns: int, spec: InputSpec) -> np.ndarray:
    if image.shape == (rows, columns):
        return image.copy(order="C")
    image = np.ascontiguousarray(image)
    return np.asarray(cv2.resize(image, (columns, rows), interpolation=_INTERPOLATION[spec.interpolation]))
