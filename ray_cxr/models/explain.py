"""Compute heat maps, which show the regions of an image that support a finding according to the model.

Grad-CAM (Selvaraju et al., ICCV 2017, equations 1 and 2) on the last feature map A, before pooling. For the logit y of
a finding, on cells (i, j) and channels c:

    gradcam     map = ReLU( sum_c a_c A_c ),  a_c = mean over the cells of dy / dA_c
    hirescam    map = ReLU( sum_c dy / dA_c * A_c ),  cell by cell (Draelos and Carin, arXiv 2011.08891)

Both give the same map if the head is an average and one dense layer. Maps are in units of the logit and are not
scaled: with such a head, the sum over the cells before the ReLU is the logit minus the bias. A map of zeros means that
no region supports the finding.

Maps are of the logit, because the slope of the sigmoid would dim the maps of a confident model. All findings share one
forward pass of the backbone; gradients are computed through the head only.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import cv2
import numpy as np

from ray_cxr.config import HeatMapMethod, InputSpec
from ray_cxr.imaging.overlays import WHOLE, Area, project_cells
from ray_cxr.imaging.resize import locate_in_input, resize
from ray_cxr.models.keras_setup import keras, tf

#: Names that `classifier.build` gives the head's first layer; its input is the feature map.
_POOLS = ("pool_avg", "pool")
#: Opacity of the strongest cell, and the exponent for weaker cells: below 1, so that they remain visible on white.
_OPACITY, _EXPONENT = 0.6, 0.7
#: A matplotlib colour map whose lightness rises evenly, so that colour-blind readers can read it. Its darkest and its
#: lightest colours are omitted: they are invisible on black lungs and white bones.
_COLOURS, _DARKEST, _LIGHTEST = "inferno", 64, 220


class Explanation(NamedTuple):
    """Results of one forward pass for n images, float32."""

    maps: np.ndarray  # [n,K,h,w], 0 and above, in units of the logit
    probabilities: np.ndarray  # [n,F]


class GradCam:
    """Computes heat maps of any model that `classifier.build` built, by the methods of the module's docstring."""

    def __init__(self, model: keras.Model, method: HeatMapMethod = "gradcam") -> None:
        pool = next(model.get_layer(name) for name in _POOLS if name in {layer.name for layer in model.layers})
        self._backbone = keras.Model(model.input, pool.input)
        self._head = keras.Model(pool.input, model.get_layer("logits").output)
        self._method = method
        self._run = tf.function(self._explain, reduce_retracing=True)

    def explain(self, images: np.ndarray, findings: np.ndarray) -> Explanation:
        """Compute heat maps of images uint8 [n,S,S,1], for K of the model's outputs per image, int [n,K]."""
        arrays = self._run(np.asarray(images, np.uint8), np.asarray(findings, np.int32))
        return Explanation(*(np.asarray(array, dtype=np.float32) for array in arrays))

    def _explain(self, images: Any, findings: Any) -> tuple[Any, Any]:
        features = self._backbone(images, training=False)
        # Persistent: one backward pass through the head per finding. In the head an image does not affect others, so
        # the gradient of the sum over all images has the gradient of each image in its row.
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(features)
            logits = self._head(features, training=False)
            selected = tf.unstack(tf.gather(logits, findings, batch_dims=1), axis=1)
        maps = [self._map(features, tape.gradient(logit, features)) for logit in selected]
        return tf.stack(maps, axis=1), tf.sigmoid(logits)

    def _map(self, features: Any, gradient: Any) -> Any:
        features, gradient = tf.cast(features, tf.float32), tf.cast(gradient, tf.float32)
        if self._method == "gradcam":
            gradient = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)
        return tf.nn.relu(tf.reduce_sum(gradient * features, axis=-1))


def draw_overlay(image: np.ndarray, cells: np.ndarray, area: Area = WHOLE, *, side: int = 512) -> np.ndarray:
    """Draw a heat map over its image: uint8 RGB with the image's proportions and a longer side of `side` pixels.

    Colours run from 0 to the highest cell of this map, so the colours of two maps are not comparable. The weaker a
    region, the more of the image is visible; with a map of zeros the result is gray.

    Args:
        image: uint8 [H,W].
        cells: float32 [h,w], 0 and above.
        area: the part of the image that the cells cover, see `overlays.compute_area`.
    """
    gray = scale_to_side(image, side)
    peak = float(cells.max())
    if not peak > 0:
        return np.repeat(gray[..., None], 3, axis=2)
    strength = project_cells(cells / peak, area, (gray.shape[0], gray.shape[1]))
    # 256 steps, so that colour and opacity come from one table.
    step = np.rint(strength * 255).astype(np.uint8)
    colours, remaining = _color_table()
    blended = cv2.LUT(cv2.merge((step, step, step)), colours)
    under = cv2.multiply(gray, cv2.LUT(step, remaining), scale=1 / 255)
    return np.asarray(cv2.add(blended, cv2.merge((under, under, under))))


def scale_to_side(image: np.ndarray, side: int) -> np.ndarray:
    """Scale an image so that its longer side has `side` pixels: uint8 [H',W']."""
    if max(image.shape) == side:
        return image
    spec = InputSpec(size=side, aspect="pad")
    return crop_padding(resize(image, spec), spec, (image.shape[0], image.shape[1]))


def crop_padding(padded: np.ndarray, spec: InputSpec, shape: tuple[int, int]) -> np.ndarray:
    """Remove the margins that `resize` added to an image of shape (H, W)."""
    top, left, rows, columns = locate_in_input(spec, *shape)
    return padded[top : top + rows, left : left + columns]


def encode_png(rgb: np.ndarray) -> bytes:
    """Encode a uint8 RGB [H,W,3] as a PNG without metadata."""
    # OpenCV's default compression: with zlib's maximum, files are a fifth smaller and take eight times as long.
    done, data = cv2.imencode(".png", rgb[..., ::-1])
    if not done:
        raise ValueError(f"not an image: {rgb.dtype} {rgb.shape}")
    return bytes(data)


@functools.cache
def _color_table() -> tuple[np.ndarray, np.ndarray]:
    """Return, for 256 strengths, the colour to add, uint8 [1,256,3], and the image's share to keep, uint8 [1,256]."""
    from matplotlib import colormaps  # the table alone; no canvas, no fonts

    cover = _OPACITY * np.linspace(0.0, 1.0, 256) ** _EXPONENT
    colours = colormaps[_COLOURS](np.linspace(_DARKEST, _LIGHTEST, 256).astype(int))[:, :3] * 255
    added = np.rint(colours * cover[:, None]).astype(np.uint8)
    return added.reshape(1, 256, 3), np.rint(255 * (1 - cover)).astype(np.uint8).reshape(1, 256)
