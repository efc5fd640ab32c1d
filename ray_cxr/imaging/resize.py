"""The only resize of radiographs: from the original size straight to the model's input."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from ray_cxr.config import InputSpec
from ray_cxr.errors import ConfigError

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
    With tiles, the result holds the image once per tile, each resized by its own spec.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ValueError(f"image must be a uint8 array, got {getattr(image, 'dtype', type(image).__name__)}")
    if image.ndim != 2 or 0 in image.shape:
        raise ValueError(f"image must have the shape [H, W], got {list(image.shape)}")
    if spec.tiles:
        canvas = np.zeros((spec.size, spec.size), dtype=np.uint8)
        for tile, (top, left) in zip(spec.tiles, place_tiles(spec), strict=True):
            canvas[top : top + tile.size, left : left + tile.size] = resize(image, tile)
        return canvas
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


def combine_specs(specs: Sequence[InputSpec]) -> InputSpec:
    """Return one spec for several models: the smallest square with a tile for each distinct spec.

    Raises:
        ConfigError: the square would be larger than an input may be.
    """
    tiles = tuple(dict.fromkeys(specs))
    if len(tiles) == 1:
        return tiles[0]
    side = max(tile.size for tile in tiles)
    while _fill_shelves(tiles, side)[1] > side:
        side += 1
    limit = 2048
    if side > limit:
        raise ConfigError(
            f"the inputs of the members, {', '.join(map(str, tiles))}, do not fit into {limit} x {limit} pixels; leave "
            "one out"
        )
    return InputSpec(size=side, tiles=tiles)


def place_tiles(spec: InputSpec) -> list[tuple[int, int]]:
    """Return the top and left pixel of each tile."""
    return _fill_shelves(spec.tiles, spec.size)[0]


def list_images(spec: InputSpec) -> list[tuple[int, int, int]]:
    """Return top, left and side of each copy of the image that an input holds; one without tiles."""
    if not spec.tiles:
        return [(0, 0, spec.size)]
    return [
        (top + inner_top, left + inner_left, side)
        for tile, (top, left) in zip(spec.tiles, place_tiles(spec), strict=True)
        for inner_top, inner_left, side in list_images(tile)
    ]


def _fill_shelves(tiles: Sequence[InputSpec], width: int) -> tuple[list[tuple[int, int]], int]:
    """Place squares from left to right, in rows as high as their highest; return their corners and the height."""
    corners, top, left, highest = [], 0, 0, 0
    for tile in tiles:
        if left + tile.size > width:
            top, left, highest = top + highest, 0, 0
        corners.append((top, left))
        left, highest = left + tile.size, max(highest, tile.size)
    return corners, top + highest


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
