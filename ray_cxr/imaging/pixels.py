"""What all decoders share: limits, errors, and the conversion of samples to gray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ray_cxr.errors import ImageError

#: Larger pictures are refused before they are decoded, pixels.
MAX_PIXELS = 100_000_000
#: A picture with a shorter side than this is an icon or a preview, not a radiograph; pixels.
MIN_SIDE = 32


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
    return to_gray(Image.fromarray(np.ascontiguousarray(rgb), "RGB"))


def to_gray(picture: Image.Image) -> np.ndarray:
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
