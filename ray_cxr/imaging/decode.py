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

import numpy as np

from ray_cxr.config import InputSpec
from ray_cxr.errors import ImageError
from ray_cxr.imaging import jpeg, png
from ray_cxr.imaging.pixels import MAX_PIXELS, decoder_errors
from ray_cxr.imaging.resize import resize
from ray_cxr.storage.files import read_bytes


def load_image(path: str, spec: InputSpec | None = None, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
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
    if data.startswith(png.PNG_MAGIC):
        with decoder_errors("PNG"):
            image = png.decode_png(data, max_pixels)
    elif data.startswith(jpeg.JPEG_MAGIC):
        with decoder_errors("JPEG"):
            image = jpeg.decode_jpeg(jpeg.parse_jpeg(data), max_pixels)
    else:
        # pydicom and GDCM are slow to import, and an archive of PNGs never needs them.
        from ray_cxr.imaging import dicom

        if not dicom.looks_like_dicom(data):
            raise ImageError("not_an_image", "the contents are neither PNG, JPEG nor DICOM")
        image = dicom.decode_dicom(data, max_pixels=max_pixels)
    if image.min() == image.max():
        raise ImageError("blank", f"all pixels have the value {int(image.min())}")
    return image


def is_png_or_jpeg(data: bytes) -> bool:
    """Whether the first bytes are a PNG's or a JPEG's, which is how `decode` tells."""
    return data.startswith((png.PNG_MAGIC, jpeg.JPEG_MAGIC))
