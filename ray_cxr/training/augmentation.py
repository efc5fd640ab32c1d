"""Augmentation of training images on the device: geometry, gray values, erasing and MixUp.

The random numbers are drawn on the host for the whole global batch, so that the number of workers does not change what
happens to an image. Each option has its own columns of random numbers, and so does not affect the other options.

Operations that change the meaning of a chest film are left out: vertical flips, inversion and solarisation, large
rotations. Gray values carry no fixed unit between detectors and their post-processing, so changes of gray values keep
the label; they are what `intensity` draws from, after RandAugment (Cubuk et al., NeurIPS 2020 workshops). Geometry has
separate options, because all of them together are one sampling of the image.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.special import betaincinv

from ray_cxr.config import TrainSettings
from ray_cxr.models.keras_setup import tf

#: Columns of the draws. Append new columns, so that the old columns keep their numbers.
FLIP, SHIFT_X, SHIFT_Y, CONTRAST, ROTATION, ZOOM, SHEAR = range(7)
CROP_AREA, CROP_RATIO, CROP_X, CROP_Y, ERASE_AREA, ERASE_RATIO, ERASE_X, ERASE_Y = range(7, 15)
NOISE, PARTNER, SHARE = range(15, 18)
#: The kinds of `intensity`, in the order in which they are applied, and their first columns of choice and of strength.
KINDS = ("brightness", "contrast", "gamma", "equalise", "posterise", "blur", "sharpen", "noise")
CHOICE, STRENGTH = 18, 26
#: Number of uniform random numbers per image.
DRAWS = 34

#: A 5 x 5 Gaussian of one pixel, as the outer product of the binomial coefficients.
_BLUR = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]).astype(np.float32) / 256
#: Pixels per side of the sample from which the histogram is equalised.
_SAMPLE = 64


def draw_random(seed: int, epoch: int, step: int, n_images: int) -> np.ndarray:
    """Return the random numbers of one step for all workers' images, float32 [n_images, DRAWS], uniform in [0, 1)."""
    # NumPy pads a seed with zeros: [seed, epoch, 0] would repeat the stream of [seed, epoch], which orders the images.
    rng = np.random.default_rng([seed, epoch, step + 1])
    # Drawn column by column, so that an additional column leaves the others unchanged.
    return np.ascontiguousarray(rng.random((DRAWS, n_images), dtype=np.float32).T)


def augment(images: Any, draws: Any, settings: TrainSettings) -> Any:
    """Return images uint8 [B,S,S,1], S static, changed according to draws float32 [B,DRAWS] in [0, 1).

    If u is the draw of an option, an image is

    1. shifted left, and with another draw up, by (2 u - 1) * `shift` * S pixels;
    2. mirrored left to right where u < 1/2, if `flip`;
    3. turned about its centre by (2 u - 1) * `rotation` degrees, counter-clockwise as displayed;
    4. magnified about its centre by 1 + (2 u - 1) * `zoom`;
    5. sheared: its rows move left by their distance below the centre times tan((2 u - 1) * `shear`);
    6. cropped to a rectangle of 1 - u * `crop` of its area, with sides in a ratio of 3/4 to 4/3, which then fills it;
    7. given a contrast of 1 + (2 u - 1) * `contrast` about its own mean;
    8. changed by `intensity` of the eight `KINDS`, see `_change_intensity`;
    9. erased in half of the cases: a rectangle of (2 u - 1) * `erase` of its area gets the image's mean

    and rounded and clipped to 0..255.

    An option at 0 or False does nothing; if all are off, the input tensor is returned. Steps 1 to 6 are one sampling:
    bilinear if one of steps 3 to 6 is on, else by whole pixels, so that pixels keep their values. Pixels from outside
    the image repeat the nearest edge pixel. Call it outside XLA, which has no kernel for ImageProjectiveTransformV3.
    """
    samples = settings.rotation or settings.zoom or settings.shear or settings.crop
    moves = settings.flip or settings.shift or samples
    if not (moves or settings.contrast or settings.intensity or settings.erase):
        return images
    x, draws = tf.cast(images, tf.float32), tf.convert_to_tensor(draws, tf.float32)
    if moves:
        x = _transform(x, draws, settings, interpolated=bool(samples))
    if settings.contrast:
        x = _change_contrast(x, _expand(1.0 + _scale_draws(draws, CONTRAST, settings.contrast)))
    if settings.intensity:
        x = _change_intensity(x, draws, settings)
    if settings.erase:
        x = _erase(x, draws, settings.erase)
    return _to_gray(x)


def mix_labels(
    labels: np.ndarray, weight: np.ndarray, draws: np.ndarray, real: np.ndarray, alpha: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose a partner for each image, and return mixed labels and weights float32 [B,F], and the partners int [B].

    MixUp (Zhang et al., ICLR 2018), with a separate share for each image, from Beta(alpha, alpha). It replaces the
    column SHARE of `draws` [B,DRAWS], which `mix_images` reads. The partners permute the images that are `real`, bool
    [B]. A finding has a mixed label only where both images are labelled; elsewhere its weight is 0.
    """
    n = int(real.sum())
    partners = np.resize(np.argsort(draws[:n, PARTNER], kind="stable"), len(real))
    draws[:, SHARE] = share = betaincinv(alpha, alpha, draws[:, SHARE].astype(np.float64)).astype(np.float32)
    mixed = share[:, None] * labels + (1 - share[:, None]) * labels[partners]
    return mixed, weight * weight[partners], partners


def mix_images(images: Any, draws: Any) -> Any:
    """Return uint8 [B,S,S,1]: the first half of images uint8 [2B,S,S,1], each mixed with its partner in the second."""
    own, partners = tf.split(tf.cast(images, tf.float32), 2)
    share = _expand(tf.split(draws, 2)[0][:, SHARE])
    return _to_gray(share * own + (1.0 - share) * partners)


def _to_gray(x: Any) -> Any:
    return tf.cast(tf.clip_by_value(tf.round(x), 0.0, 255.0), tf.uint8)


def _scale_draws(draws: Any, column: int, limit: float) -> Any:
    """Return float32 [B], uniform in -limit..limit."""
    return (draws[:, column] * 2.0 - 1.0) * limit


def _expand(values: Any) -> Any:
    """Return one value per image, [B], in the shape [B,1,1,1]."""
    return tf.reshape(values, [-1, 1, 1, 1])


def _change_contrast(x: Any, gain: Any) -> Any:
    mean = tf.reduce_mean(x, axis=[1, 2, 3], keepdims=True)
    return mean + (x - mean) * gain


def _change_intensity(x: Any, draws: Any, settings: TrainSettings) -> Any:
    """Apply `intensity` different kinds to each image, float32 [B,S,S,1], in the order of `KINDS`.

    At a strength of 1 the limits are: brightness 64 gray values to either side; contrast and gamma a factor of 2 to
    either side; equalised by half, as the full step would flatten the lungs; steps of 16 gray values; fully blurred by
    a pixel; sharpened by twice what blurring removes; noise with a standard deviation of 10 gray values.
    """
    keys, strength = draws[:, CHOICE : CHOICE + len(KINDS)], draws[:, STRENGTH : STRENGTH + len(KINDS)]
    chosen = tf.argsort(tf.argsort(keys, axis=1), axis=1) < settings.intensity
    limit = settings.intensity_strength * tf.cast(chosen, tf.float32)
    up = {kind: _expand(value) for kind, value in zip(KINDS, tf.unstack(strength * limit, axis=1), strict=True)}
    both = dict(zip(KINDS, map(_expand, tf.unstack((2.0 * strength - 1.0) * limit, axis=1)), strict=True))
    x = _change_contrast(x + 64.0 * both["brightness"], 2.0 ** both["contrast"])
    x = 255.0 * (tf.clip_by_value(x, 0.0, 255.0) / 255.0) ** (2.0 ** both["gamma"])
    x = x + 0.5 * up["equalise"] * (_equalise(x) - x)
    grays = 16.0 ** up["posterise"]
    x = tf.where(up["posterise"] > 0.0, tf.round(x / grays) * grays, x)
    padded = tf.pad(x, [[0, 0], [2, 2], [2, 2], [0, 0]], "SYMMETRIC")
    smooth = tf.nn.conv2d(padded, _BLUR[:, :, None, None], strides=1, padding="VALID")
    x = x + (up["blur"] - 2.0 * up["sharpen"]) * (smooth - x)
    seeds = tf.cast(draws[:, NOISE] * 2.0**24, tf.int32)  # a draw has 24 bits
    shape = x.shape[1:]
    noise = tf.map_fn(
        lambda seed: tf.random.stateless_normal(shape, [seed, 0], alg="philox"), seeds, fn_output_signature=tf.float32
    )
    return x + 10.0 * up["noise"] * noise


def _equalise(x: Any) -> Any:
    """Return x float32 [B,S,S,1] of 0..255 with its histogram equalised, estimated from a sample of the pixels."""
    every = max(1, int(x.shape[1]) // _SAMPLE)
    sample = tf.sort(tf.reshape(x[:, ::every, ::every], [tf.shape(x)[0], -1]), axis=1)
    grays = tf.tile(tf.range(256, dtype=tf.float32)[None], [tf.shape(x)[0], 1])
    below = tf.searchsorted(sample, grays, side="right")
    table = 255.0 * tf.cast(below, tf.float32) / tf.cast(tf.shape(sample)[1], tf.float32)
    return tf.gather(table, tf.cast(tf.round(x), tf.int32), batch_dims=1)


def _erase(x: Any, draws: Any, limit: float) -> Any:
    """Fill a rectangle of each image with the image's mean (Zhong et al., AAAI 2020)."""
    area = limit * tf.maximum(0.0, draws[:, ERASE_AREA] * 2.0 - 1.0)
    height, width = _draw_sides(area, draws, ERASE_RATIO, 3.0)
    axis = (tf.range(int(x.shape[1]), dtype=tf.float32) + 0.5) / int(x.shape[1])

    def cover(size: Any, column: int) -> Any:
        centre = size / 2.0 + draws[:, column] * (1.0 - size)
        return tf.abs(axis[None] - centre[:, None]) < size[:, None] / 2.0

    inside = cover(height, ERASE_Y)[:, :, None, None] & cover(width, ERASE_X)[:, None, :, None]
    return tf.where(inside, tf.reduce_mean(x, axis=[1, 2, 3], keepdims=True), x)


def _draw_sides(area: Any, draws: Any, column: int, ratio: float) -> tuple[Any, Any]:
    """Return height and width of rectangles of an area, as shares of the image, at a ratio of 1/ratio..ratio."""
    stretch = tf.exp(_scale_draws(draws, column, math.log(ratio) / 2.0))
    side = tf.sqrt(area)
    return tf.minimum(1.0, side / stretch), tf.minimum(1.0, side * stretch)


def _transform(x: Any, draws: Any, settings: TrainSettings, *, interpolated: bool) -> Any:
    """Apply steps 1 to 6 of `augment` to float32 [B,S,S,1]."""
    side = int(x.shape[1])
    centre = (side - 1) / 2.0  # between the two middle pixels where the side is even
    dx = _scale_draws(draws, SHIFT_X, settings.shift) * side
    dy = _scale_draws(draws, SHIFT_Y, settings.shift) * side
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
    if settings.shear:
        slope = tf.tan(_scale_draws(draws, SHEAR, settings.shear * math.pi / 180.0))
        a1, b1 = a1 + a0 * slope, b1 + b0 * slope
    if settings.crop:
        height, width = _draw_sides(1.0 - settings.crop * draws[:, CROP_AREA], draws, CROP_RATIO, 4.0 / 3.0)
        right, down = ((draws[:, u] - 0.5) * (1.0 - part) * side for u, part in ((CROP_X, width), (CROP_Y, height)))
        dx, dy = dx + a0 * right + a1 * down, dy + b0 * right + b1 * down
        a0, a1, b0, b1 = a0 * width, a1 * height, b0 * width, b1 * height
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
