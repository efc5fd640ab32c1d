"""The only resize of radiographs: from the original size straight to the model's input."""

from __future__ import annotations

import cv2
import numpy as np

from ray_cxr.config import InputSpec

_INTERPOLATION: dict[str, int] = {
    "area": cv2.INTER_AREA,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
}


def resize(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    """Resize an image, uint8[H, W], to the model's square input: a new array uint8[S, S].

    `stretch` scales both sides to S. `pad` keeps the proportions and centres the image on black. `crop` takes the
    centred square first. An odd remainder is added or lost at the bottom or right. An image of S x S stays equal.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ValueError(f"image must be a uint8 array, got {getattr(image, 'dtype', type(image).__name__)}")
    if image.ndim != 2 or 0 in image.shape:
        raise ValueError(f"image must have the shape [H, W], got {list(image.shape)}")
    height, width = image.shape
    if spec.aspect == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
    top, left, rows, columns = locate_in_input(spec, height, width)
    if image.shape != (rows, columns):
        method = _INTERPOLATION[spec.interpolation]
        image = cv2.resize(np.ascontiguousarray(image), (columns, rows), interpolation=method)
    canvas = np.zeros((spec.size, spec.size), dtype=np.uint8)
    canvas[top : top + rows, left : left + columns] = image
    return canvas


def square_pixels(image: np.ndarray, aspect: float) -> np.ndarray:
    """Resample uint8[H, W] to square pixels by reducing one side; `aspect` is the height of a pixel over its width."""
    height, width = image.shape
    rows, columns = (height, round(width / aspect)) if aspect > 1.0 else (round(height * aspect), width)
    return np.asarray(cv2.resize(image, (max(1, columns), max(1, rows)), interpolation=cv2.INTER_AREA))


def locate_in_input(spec: InputSpec, height: int, width: int) -> tuple[int, int, int, int]:
    """Return where `resize` puts an image of this size, pixels: (top, left, rows, columns). This is the whole input,
    except for the margins of `pad`.
    """
    size = spec.size
    if spec.aspect != "pad":
        return 0, 0, size, size
    longest = max(height, width)
    rows = max(1, (2 * height * size + longest) // (2 * longest))  # round to nearest, in integers
    columns = max(1, (2 * width * size + longest) // (2 * longest))
    return (size - rows) // 2, (size - columns) // 2, rows, columns
