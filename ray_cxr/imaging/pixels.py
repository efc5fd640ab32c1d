"""Limits, errors and the conversion to gray that all decoders share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ray_cxr.errors import ImageError

#: Larger images are refused before they are decoded, pixels.
MAX_PIXELS = 100_000_000
#: Images with a shorter side are icons or previews, not radiographs; pixels.
MIN_SIDE = 32


@contextlib.contextmanager
def decoder_errors(kind: str) -> Iterator[None]:
    """Turn any exception inside the block into an `ImageError`, without its message, which can quote file contents."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("too_large", f"the {kind} decoder ran out of memory") from None
    except Exception as error:
        raise ImageError("corrupt", f"the {kind} decoder failed ({type(error).__name__})") from None
    except BaseException as error:
        # A panic of a decoder in Rust is a BaseException.
        if type(error).__name__ != "PanicException":
            raise
        raise ImageError("corrupt", f"the {kind} decoder failed (panic)") from None


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Refuse an image by the size in its header: `corrupt` (no pixels), `too_large` or `too_small`."""
    if height < 1 or width < 1:
        raise ImageError("corrupt", f"the header gives {height} x {width} pixels")
    if height * width > max_pixels:
        raise ImageError("too_large", f"{height} x {width} pixels; the limit is {max_pixels}")
    if min(height, width) < MIN_SIDE:
        raise ImageError("too_small", f"{height} x {width} pixels; the shorter side must have {MIN_SIDE}")


def luma(rgb: np.ndarray) -> np.ndarray:
    """Convert uint8[H, W, 3] to uint8[H, W]: rounded ITU-R BT.601 luma, exact where R = G = B."""
    return to_gray(Image.fromarray(np.ascontiguousarray(rgb), "RGB"))


def to_gray(image: Image.Image) -> np.ndarray:
    """Convert a loaded Pillow image to uint8[H, W] by the rules of `decode`."""
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8) * np.uint8(255)
    if image.mode.startswith("I;16"):
        # (x + 128) // 257 rounds x / 257, and needs 17 bits only above 65407, where the result is 255 anyway
        return ((np.minimum(np.asarray(image), 65407) + 128) // 257).astype(np.uint8)
    if image.mode in ("P", "CMYK", "YCbCr"):
        image = image.convert("RGB")
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise ImageError("corrupt", "a kind of samples that radiographs do not have")
    return np.array(image.convert("L"), dtype=np.uint8, order="C")
