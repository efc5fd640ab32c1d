"""Shapes of phantoms: seeded generators, curves, and the pen that rasters them.

Coordinates are fractions of the side, x to the right and y down. `side` is -1 on the left of the image (the patient's
right) and +1 on its right.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def make_generator(seed: int, patient: int = 0, visit: int = -1, stream: int = 0) -> np.random.Generator:
    """Return the generator of one purpose; visit -1 means the patient at any visit.

    The seed always has four words: numpy takes missing words as zeros, so [seed, patient] and [seed, patient, 0] would
    give the same numbers.
    """
    return np.random.default_rng([seed, patient, visit + 1, stream])


_T = np.arange(6)[:, None] / 6
_BASIS = [-_T + 2 * _T**2 - _T**3, 2 - 5 * _T**2 + 3 * _T**3, _T + 4 * _T**2 - 3 * _T**3, -(_T**2) + _T**3]
_SPLINE = np.concatenate(_BASIS, axis=1) / 2
_ANGLE = np.arange(24) * (np.pi / 12)
_CIRCLE = np.stack([np.cos(_ANGLE), np.sin(_ANGLE)], axis=1)


def fit_curve(points: Array, *, closed: bool) -> Array:
    """Return a Catmull-Rom spline through float[n, 2] points, with six steps per segment: float[m, 2]."""
    if closed:
        padded = np.concatenate([points[-1:], points, points[:2]])
    else:
        padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    windows = np.arange(len(padded) - 3)[:, None] + np.arange(4)
    inner = np.stack([padded[windows, axis] @ _SPLINE.T for axis in (0, 1)], axis=-1).reshape(-1, 2)
    return inner if closed else np.concatenate([inner, points[-1:]])


def scale(grid: Array, side: int) -> Array:
    """Resize a square array: down by averages of areas, up linearly."""
    method = cv2.INTER_AREA if side < len(grid) else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(grid, (side, side), interpolation=method))


class Pen:
    """Raster shapes in the pose of one exposure; `shift` in fractions of the side, `tilt` in radians. Canvases are
    uint8[size, size]. Masks are float32[size, size] from 0 to 1, anti-aliased.
    """

    def __init__(self, size: int, *, tilt: float, zoom: float, shift: tuple[float, float]) -> None:
        self.size = size
        cos, sin = np.cos(tilt) * zoom, np.sin(tilt) * zoom
        self._rotation = np.array([[cos, sin], [-sin, cos]])
        self._offset = np.array(shift) + 0.5

    def to_pixels(self, points: Array) -> Array:
        """Return float[..., 2] fractions as int32[..., 2] sixteenths of a pixel (OpenCV's shift=4)."""
        posed = (np.asarray(points) - 0.5) @ self._rotation + self._offset
        return np.asarray(posed * (self.size * 16) - 7.5, dtype=np.int32)

    def to_width(self, fraction: float) -> int:
        return max(1, round(fraction * self.size))

    def new_canvas(self) -> Array:
        return np.zeros((self.size, self.size), np.uint8)

    def mask(self, *shapes: Array, blur: float = 0.0) -> Array:
        canvas = self.new_canvas()
        for shape in shapes:
            cv2.fillPoly(canvas, [self.to_pixels(shape)], 255, cv2.LINE_AA, 4)
        return self.finish(canvas, blur)

    def stroke(self, canvas: Array, lines: Array, width: float, value: float) -> None:
        """Draw one line float[n, 2], or several lines float[k, n, 2]; `value` is 0 to 1."""
        pixels = self.to_pixels(lines if lines.ndim == 3 else lines[None])
        cv2.polylines(canvas, list(pixels), False, 255 * value, self.to_width(width), cv2.LINE_AA, 4)

    def fill(self, canvas: Array, shape: Array, value: float = 1.0) -> None:
        """Fill an outline float[n, 2] on a uint8 canvas."""
        cv2.fillPoly(canvas, [self.to_pixels(shape)], 255 * value, cv2.LINE_AA, 4)

    def finish(self, canvas: Array, blur: float = 0.0) -> Array:
        """Return a canvas as a mask, after a Gaussian blur of standard deviation `blur`."""
        if blur * self.size > 5:
            return self.soften(canvas.astype(np.float32) * np.float32(1 / 255), blur)
        if blur:
            canvas = cv2.GaussianBlur(canvas, (0, 0), blur * self.size)
        return canvas.astype(np.float32) * np.float32(1 / 255)

    def soften(self, mask: Array, blur: float) -> Array:
        """Apply a wide blur on a coarse grid, which takes 0.25 ms instead of 10 ms."""
        side = min(64, self.size)
        small = cv2.GaussianBlur(scale(mask, side), (0, 0), blur * side, borderType=cv2.BORDER_REPLICATE)
        return scale(small, self.size)


def to_points(side: int, distance: Any, y: Any) -> Array:
    """Return points at a distance from the midline on one side: float[..., 2]."""
    distance = np.asarray(distance, dtype=np.float64)
    points = np.empty((*np.shape(distance), 2))
    points[..., 0] = 0.5 + side * distance
    points[..., 1] = y
    return points


def mirror(distance: Array, y: Array) -> Array:
    """Return the same lines on both sides: float[k, n] twice becomes float[2k, n, 2]."""
    return np.concatenate([to_points(-1, distance, y), to_points(1, distance, y)])


def trace_ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> Array:
    cos, sin = np.cos(turn), np.sin(turn)
    return np.asarray((_CIRCLE * (rx, ry)) @ np.array([[cos, sin], [-sin, cos]]) + (x, y))
