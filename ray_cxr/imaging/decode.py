"""Read radiographs from a path to pixels, the same way for `prepare`, `score` and `predict`.

    path -> read_bytes -> decode: uint8[H, W] -> resize: uint8[S, S]

Any fault of a file becomes one `ImageError` with a code. Exceptions, warnings and prints of decoders do not escape,
except for one message of GDCM (see `dicom`). Decoding changes no global state, so several threads can decode at once.

The first bytes of a file decide its kind, never its name. Decoders see only the parts of a PNG or JPEG that carry
pixels. Text, EXIF, colour profiles, previews and animation are removed first, and with them any decompression bombs.

Stored samples become gray (uint8) as follows:

- 8-bit gray: unchanged. 1 bit: 0 and 255. 2 and 4 bits: scaled to the full range.
- 16-bit gray: divided by 257 and rounded, so that 0..65535 fills 0..255. The image's own range is never used, because
  the same stored value must give the same gray in every file.
- RGB, and palettes through RGB: luma of ITU-R BT.601, rounded; exact where R = G = B.
- 16-bit RGB and 16-bit gray with alpha: Pillow keeps the upper byte of each sample; then as for 8 bits.
- Alpha is dropped, not composed with a background. NIH's RGBA files are opaque, and a radiograph has no background.
- JPEG: gray unchanged; YCbCr, RGB and CMYK through RGB.
- EXIF orientation is not applied: the stored pixels are the radiograph, and no X-ray system writes that tag.
- Several frames (APNG, MPO): the first one.
"""

from __future__ import annotations

import numpy as np

from ray_cxr.config import InputSpec
from ray_cxr.errors import ImageError
from ray_cxr.imaging import jpeg, png
from ray_cxr.imaging.pixels import MAX_PIXELS, decoder_errors
from ray_cxr.imaging.resize import resize
from ray_cxr.storage.files import read_bytes

#: All quality flags that `decode_with_flags` can return.
HEADER_FLAGS: frozenset[str] = frozenset(
    {"not_frontal_chest", "burned_in_annotation", "display_fallback", "reoriented"}
)


def load_image(path: str, spec: InputSpec | None = None, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read and decode one radiograph, a local path or a URI, and resize it if there is a spec.

    Returns:
        uint8[S, S] with a spec, otherwise uint8[H, W].

    Raises:
        ImageError: any code of `read_bytes` and `decode`.
    """
    image = decode(read_bytes(path), max_pixels=max_pixels)
    return image if spec is None else resize(image, spec)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the pixels of `decode_with_flags`."""
    return decode_with_flags(data, max_pixels=max_pixels)[0]


def decode_with_flags(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, tuple[str, ...]]:
    """Decode the contents of a PNG, JPEG or DICOM. The module's docstring has the rules; for DICOM, that of `dicom`.

    `max_pixels` limits height x width and is checked before pixels are decoded.

    Returns:
        uint8[H, W], C-contiguous, a new array; 0 is black, 255 white. And the `HEADER_FLAGS` of a DICOM.

    Raises:
        ImageError: `empty`, `not_an_image`, `truncated`, `corrupt`, `too_large`, `too_small`, `blank` (all pixels
            equal), and for a DICOM also `not_a_radiograph` and `unsupported_transfer_syntax`.
    """
    if not data:
        raise ImageError("empty", "the file has 0 bytes")
    data = bytes(data)
    flags: tuple[str, ...] = ()
    if data.startswith(png.PNG_MAGIC):
        with decoder_errors("PNG"):
            image = png.decode_png(data, max_pixels)
    elif data.startswith(jpeg.JPEG_MAGIC):
        with decoder_errors("JPEG"):
            image = jpeg.decode_jpeg(jpeg.parse_jpeg(data), max_pixels)
    else:
        # pydicom and GDCM are slow to import, and PNGs and JPEGs do not need them.
        from ray_cxr.imaging import dicom

        image, flags = dicom.read_image(data, max_pixels=max_pixels)
    if image.min() == image.max():
        raise ImageError("blank", f"all pixels have the value {int(image.min())}")
    return image, flags


def is_png_or_jpeg(data: bytes) -> bool:
    """Whether `decode` takes the data for a PNG or JPEG, by their first bytes."""
    return data.startswith((png.PNG_MAGIC, jpeg.JPEG_MAGIC))
