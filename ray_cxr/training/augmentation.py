"""Augmentation of training images on the device: flip, shift, rotation, zoom and contrast.

The random numbers are drawn on the host for the whole global batch, so that the number of workers does not change what
happens to an image. Each option has its own column of random numbers, and so does not affect the other options.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ray_cxr.config import TrainSettings
from ray_cxr.models.keras_setup import tf

#: Columns of the draws. Append new columns, so that the old columns keep their numbers.
FLIP, SHIFT_X, SHIFT_Y, CONTRAST, ROTATION, ZOOM = range(6)
#: Number of uniform random numbers per image.
DRAWS = 6


def draw_random(seed: int, epoch: int, step: int, batch_size: int) -> np.ndarray:
    """Return the random numbers of one step for the global batch, float32 [batch_size, DRAWS], uniform in [0, 1)."""
    # NumPy pads a seed with zeros: [seed, epoch, 0] would repeat the stream of [seed, epoch], which orders the images.
    rng = np.random.default_rng([seed, epoch, step + 1])
    # Drawn column by column, so that an additional column leaves the others unchanged.
    return np.ascontiguousarray(rng.random((DRAWS, batch_size), dtype=np.float32).T)


def augment(images: Any, draws: Any, settings: TrainSettings) -> Any:
    """Return images uint8 [B,S,S,1], S static, changed according to draws float32 [B,DRAWS] in [0, 1).

    If u is the draw of an option, an image is

    1. shifted left, and with another draw up, by (2 u - 1) * `shift` * S pixels;
    2. mirrored left to right where u < 1/2, if `flip`;
    3. turned about its centre by (2 u - 1) * `rotation` degrees, counter-clockwise as displayed;
    4. magnified about its centre by 1 + (2 u - 1) * `zoom`;
    5. given a contrast of 1 + (2 u - 1) * `contrast` about its own mean, rounded, and clipped to 0..255.

    An option at 0 or False does nothing; if all are off, the input tensor is returned. Steps 1 to 4 are one sampling:
    bilinear if `rotation` or `zoom` is on, else by whole pixels, so that pixels keep their values. Pixels from outside
    the image repeat the nearest edge pixel. Call it outside XLA, which has no kernel for ImageProjectiveTransformV3.
    """
    moves = settings.flip or settings.shift or settings.rotation or settings.zoom
    if not (moves or settings.contrast):
        return images
    x, draws = tf.cast(images, tf.float32), tf.convert_to_tensor(draws, tf.float32)
    if moves:
        x = _transform(x, draws, settings)
    if settings.contrast:
        gain = 1.0 + _scale_draws(draws, CONTRAST, settings.contrast)
        mean = tf.reduce_mean(x, axis=[1, 2, 3], keepdims=True)
        x = mean + (x - mean) * tf.reshape(gain, [-1, 1, 1, 1])
    return tf.cast(tf.clip_by_value(tf.round(x), 0.0, 255.0), tf.uint8)


def _scale_draws(draws: Any, column: int, limit: float) -> Any:
    """Return float32 [B], uniform in -limit..limit."""
    return (draws[:, column] * 2.0 - 1.0) * limit


def _transform(x: Any, draws: Any, settings: TrainSettings) -> Any:
    """Apply steps 1 to 4 of `augment` to float32 [B,S,S,1]."""
    side = int(x.shape[1])
    centre = (side - 1) / 2.0  # between the two middle pixels where the side is even
    dx = _scale_draws(draws, SHIFT_X, settings.shift) * side
    dy = _scale_draws(draws, SHIFT_Y, settings.shift) * side
    interpolated = settings.rotation > 0.0 or settings.zoom > 0.0
    if not interpolated:
        dx, dy = tf.round(dx), tf.round(dy)
    angle = _scale_draws(draws, ROTATION, settings.rotation * math.pi / 180.0)
    zoom = 1.0 + _scale_draws(draws, ZOOM, settings.zoom)
    mirror = tf.where(draws[:, FLIP] < 0.5, -1.0, 1.0) if settings.flip else tf.ones_like(dx)
    # The operation maps output to input pixels: input = d + centre + A (output - centre). A inverts the zoom, then the
    # rotation, then the mirror. As y points down, this A turns the image counter-clockwise.
    cos, sin = tf.cos(angle) / zoom, tf.sin(angle) / zoom
    a0, a1 = mirror * cos, -mirror * sin
    b0, b1 = sin, cos
    # Each row: output (x, y) reads input (a0 x + a1 y + a2, b0 x + b1 y + b2); the last two entries are perspective.
    a2, b2 = dx + centre - (a0 + a1) * centre, dy + centre - (b0 + b1) * centre
    perspective = [tf.zeros_like(dx)] * 2
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=x,
        transforms=tf.stack([a0, a1, a2, b0, b1, b2, *perspective], axis=1),
        output_shape=tf.constant([side, side], tf.int32),
        fill_value=0.0,
        interpolation="BILINEAR" if interpolated else "NEAREST",
        fill_mode="NEAREST",
    )
