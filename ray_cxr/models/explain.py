"""Heat maps: which places of a picture speak for a finding, as the network sees it.

Grad-CAM (Selvaraju et al., ICCV 2017, equations 1 and 2) on the last feature map A, before the head pools it. For the
logit y of a finding, on cells (i, j) and channels c:

    gradcam     map = ReLU( sum_c a_c A_c ),  a_c = mean over the cells of dy / dA_c
    hirescam    map = ReLU( sum_c dy / dA_c * A_c ),  cell by cell (Draelos and Carin, arXiv 2011.08891)

The two are the same where the head is an average and one dense layer. A map is in units of the logit, and kept so: with
such a head its sum, before the ReLU, is the logit less the bias. A map of zeros says that no place speaks for the
finding; it is none that one could scale up.

The logit, not the probability: the sigmoid's slope would dim every map of a confident network. One forward pass of
the backbone serves all findings; what is derived is the head alone.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import cv2
import keras
import numpy as np

from ray_cxr.config import HeatMapMethod, InputSpec
from ray_cxr.errors import ConfigError
from ray_cxr.imaging.overlays import WHOLE, Area, content, project_cells
from ray_cxr.imaging.resize import resize

#: Names that `classifier.build` gives the head's first layer; its input is the feature map.
_POOLS = ("pool_avg", "pool")
#: The strongest place hides so much of the picture below it; with an exponent below 1 weak ones are seen on white, too.
_OPACITY, _EXPONENT = 0.6, 0.7
#: Of matplotlib: rises evenly in lightness and is readable without red and green. Left out are its ends, which nobody
#: sees on black lungs and white bones.
_COLOURS, _DARKEST, _LIGHTEST = "inferno", 64, 220


class Explanation(NamedTuple):
    """What a network says of n images, and why.

    Attributes:
        maps: float32 [n,K,h,w], 0 and above.
        probabilities: float32 [n,F], of the same forward pass.
    """

    maps: np.ndarray
    probabilities: np.ndarray


class GradCam:
    """Heat maps of a network of `classifier.build`, whatever its backbone and head.

    Args:
        model: uint8 [N,S,S,1] to probabilities [N,F].
        method: see the top of this module.

    Raises:
        ConfigError: Keras runs on another backend than TensorFlow, whose gradients these are.
    """

    def __init__(self, model: keras.Model, method: HeatMapMethod = "gradcam") -> None:
        if keras.config.backend() != "tensorflow":
            raise ConfigError(f"heat maps: need Keras on TensorFlow, and KERAS_BACKEND is {keras.config.backend()}")
        import tensorflow as tf

        pool = next(model.get_layer(name) for name in _POOLS if name in {layer.name for layer in model.layers})
        self._backbone = keras.Model(model.input, pool.input)
        self._head = keras.Model(pool.input, model.get_layer("logits").output)
        self._method = method
        self._run = tf.function(self._explain, reduce_retracing=True)

    def maps(self, images: np.ndarray, findings: np.ndarray) -> np.ndarray:
        """Heat maps of some findings of each image.

        Args:
            images: uint8 [n,S,S,1].
            findings: int [n,K], numbers of the network's outputs.

        Returns:
            float32 [n,K,h,w], 0 and above, in units of the logit.
        """
        return self.explain(images, findings).maps

    def explain(self, images: np.ndarray, findings: np.ndarray) -> Explanation:
        """`maps`, with the probabilities that come along."""
        found = self._run(np.asarray(images, np.uint8), np.asarray(findings, np.int32))
        return Explanation(*(np.asarray(one, dtype=np.float32) for one in found))

    def _explain(self, images: Any, findings: Any) -> tuple[Any, Any]:
        import tensorflow as tf

        features = self._backbone(images, training=False)
        # Persistent: one pass back through the head for each of the K findings. Pictures do not touch one another
        # there, so that the gradient of a sum over them is each picture's own.
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(features)
            logits = self._head(features, training=False)
            wanted = tf.unstack(tf.gather(logits, findings, batch_dims=1), axis=1)
        maps = [self._map(features, tape.gradient(logit, features)) for logit in wanted]
        return tf.stack(maps, axis=1), tf.sigmoid(logits)

    def _map(self, features: Any, gradient: Any) -> Any:
        import tensorflow as tf

        features, gradient = tf.cast(features, tf.float32), tf.cast(gradient, tf.float32)
        if self._method == "gradcam":
            gradient = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)
        return tf.nn.relu(tf.reduce_sum(gradient * features, axis=-1))


def overlay(picture: np.ndarray, cells: np.ndarray, area: Area = WHOLE, *, side: int = 512) -> np.ndarray:
    """A heat map over its picture, for looking at.

    The colours run from this map's 0 to its own highest cell, so that two pictures' colours do not compare; the weaker
    a place, the more of the picture is seen. A map of zeros leaves the picture gray.

    Args:
        picture: uint8 [H,W].
        cells: float32 [h,w], 0 and above.
        area: what of the picture the cells cover, see `heatmaps.area_of`.
        side: of the longer side of the result, pixels.

    Returns:
        uint8 RGB [H',W',3], in the picture's proportions.
    """
    gray = bounded(picture, side)
    peak = float(cells.max())
    if not peak > 0:
        return np.repeat(gray[..., None], 3, axis=2)
    strength = project_cells(cells / peak, area, (gray.shape[0], gray.shape[1]))
    # In 256 steps, as many as a colour has: colour and cover of each come from one table.
    step = np.rint(strength * 255).astype(np.uint8)
    colours, left = _table()
    blended = cv2.LUT(cv2.merge((step, step, step)), colours)
    under = cv2.multiply(gray, cv2.LUT(step, left), scale=1 / 255)
    return np.asarray(cv2.add(blended, cv2.merge((under, under, under))))


def bounded(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture with its longer side brought to `side` pixels: uint8 [H',W']."""
    if max(picture.shape) == side:
        return picture
    spec = InputSpec(size=side, aspect="pad")
    return unpadded(resize(picture, spec), spec, (picture.shape[0], picture.shape[1]))


def unpadded(padded: np.ndarray, spec: InputSpec, shape: tuple[int, int]) -> np.ndarray:
    """What `imaging.resize` made of a picture of this (H, W), without the margins of `pad`."""
    top, left, rows, columns = content(spec, *shape)
    return padded[top : top + rows, left : left + columns]


def encode(rgb: np.ndarray) -> bytes:
    """A uint8 RGB [H,W,3] as a PNG: pixels alone, no metadata."""
    # OpenCV's own settings: the most that zlib can do makes files a fifth smaller, in eight times the time.
    done, data = cv2.imencode(".png", rgb[..., ::-1])
    if not done:
        raise ValueError(f"no picture: {rgb.dtype} {rgb.shape}")
    return bytes(data)


@functools.cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    """For 256 strengths the colour to add, uint8 [1,256,3], and what stays of the picture, uint8 [1,256] of 255."""
    from matplotlib import colormaps  # the table alone; no canvas, no fonts

    cover = _OPACITY * np.linspace(0.0, 1.0, 256) ** _EXPONENT
    colours = colormaps[_COLOURS](np.linspace(_DARKEST, _LIGHTEST, 256).astype(int))[:, :3] * 255
    added = np.rint(colours * cover[:, None]).astype(np.uint8)
    return added.reshape(1, 256, 3), np.rint(255 * (1 - cover)).astype(np.uint8).reshape(1, 256)
