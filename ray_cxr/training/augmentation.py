"""Random changes of the training images, on the device: flip, shift, rotation, zoom and contrast.

The random numbers are drawn outside, for the whole global batch, so that the same image gets the same change on any
number of workers. Every option has columns of its own in them: switching one on changes nothing of another.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from ray_cxr.config import TrainSettings

#: Columns of the draws. New ones go to the end: then the old ones keep their numbers.
FLIP, SHIFT_X, SHIFT_Y, CONTRAST, ROTATION, ZOOM = range(6)
#: How many uniform numbers each image takes.
DRAWS = 6


def draws(seed: int, epoch: int, step: int, batch_size: int) -> np.ndarray:
    """The random numbers of one step, float32 [batch_size, DRAWS], uniform in [0, 1).

    A pure function of its arguments. `batch_size` is the global batch's; each worker takes the rows of its images.
    """
    # NumPy fills a seed up with zeros: [seed, epoch, 0] would be the stream of [seed, epoch], which orders the images.
    rng = np.random.default_rng([seed, epoch, step + 1])
    # One column after the other, so that a further column leaves the others as they are.
    return np.ascontiguousarray(rng.random((DRAWS, batch_size), dtype=np.float32).T)


def augment(images: Any, draws: Any, settings: TrainSettings) -> Any:
    """Change uint8 [B,S,S,1] as `draws` say; uint8 of the same size.

    With u the draw of an option, an image is

    1. shifted left by (2 u - 1) * `shift` * S pixels, and up likewise;
    2. mirrored left to right where u < 1/2, if `flip`;
    3. turned about its centre by (2 u - 1) * `rotation` degrees, counter-clockwise as displayed;
    4. magnified about its centre by 1 + (2 u - 1) * `zoom`;
    5. given a contrast of 1 + (2 u - 1) * `contrast` about its own mean, rounded, and clipped to 0..255.

    An option at 0 or False does nothing; if all are, the very tensor that was given comes back. Steps 1 to 4 are one
    sampling. It is bilinear if `rotation` or `zoom` is on; else shifts are whole pixels, and pixels keep their values.
    What comes in from outside repeats the nearest pixel of the edge.

    It runs in a graph, not under XLA, which has no kernel for ImageProjectiveTransformV3 (with contrast alone it does);
    call it outside what is compiled with XLA.

    Args:
        images: uint8 [B,S,S,1], S static.
        draws: float32 [B,DRAWS] in [0, 1), the rows of these images of what the function `draws` gives.
        settings: `flip`, `shift`, `rotation`, `zoom` and `contrast` are used.
    """
    moves = settings.flip or settings.shift or settings.rotation or settings.zoom
    if not (moves or settings.contrast):
        return images
    x, draws = tf.cast(images, tf.float32), tf.convert_to_tensor(draws, tf.float32)
    if moves:
        x = _moved(x, draws, settings)
    if settings.contrast:
        gain = 1.0 + _either_side(draws, CONTRAST, settings.contrast)
        mean = tf.reduce_mean(x, axis=[1, 2, 3], keepdims=True)
        x = mean + (x - mean) * tf.reshape(gain, [-1, 1, 1, 1])
    return tf.cast(tf.clip_by_value(tf.round(x), 0.0, 255.0), tf.uint8)


def _either_side(draws: Any, column: int, most: float) -> Any:
    """float32 [B], uniform in -most..most."""
    return (draws[:, column] * 2.0 - 1.0) * most


def _moved(x: Any, draws: Any, settings: TrainSettings) -> Any:
    """Steps 1 to 4 of `augment`, of float32 [B,S,S,1]."""
    side = int(x.shape[1])
    centre = (side - 1) / 2.0  # between the two middle pixels where the side is even
    dx = _either_side(draws, SHIFT_X, settings.shift) * side
    dy = _either_side(draws, SHIFT_Y, settings.shift) * side
    interpolated = settings.rotation > 0.0 or settings.zoom > 0.0
    if not interpolated:
        dx, dy = tf.round(dx), tf.round(dy)
    angle = _either_side(draws, ROTATION, settings.rotation * math.pi / 180.0)
    zoom = 1.0 + _either_side(draws, ZOOM, settings.zoom)
    mirror = tf.where(draws[:, FLIP] < 0.5, -1.0, 1.0) if settings.flip else tf.ones_like(dx)
    # The operation asks where each output pixel comes from: input = d + centre + A (output - centre), where A undoes
    # the zoom, then the turn, then the mirror. y points down, so that this A turns the picture counter-clockwise.
    cos, sin = tf.cos(angle) / zoom, tf.sin(angle) / zoom
    a0, a1 = mirror * cos, -mirror * sin
    b0, b1 = sin, cos
    zero = tf.zeros_like(dx)
    # Its rows: output (x, y) takes input (a0 x + a1 y + a2, b0 x + b1 y + b2); the last two are for perspective.
    a2, b2 = dx + centre - (a0 + a1) * centre, dy + centre - (b0 + b1) * centre
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=x,
        transforms=tf.stack([a0, a1, a2, b0, b1, b2, zero, zero], axis=1),
        output_shape=tf.constant([side, side], tf.int32),
        fill_value=0.0,
        interpolation="BILINEAR" if interpolated else "NEAREST",
        fill_mode="NEAREST",
    )
