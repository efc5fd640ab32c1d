"""Compute heat maps, which show the regions of an image that support a finding according to the model.

Grad-CAM (Selvaraju et al., ICCV 2017, equations 1 and 2) on the last feature map A, before pooling. For the logit y of
a finding, on cells (i, j) and channels c:

    gradcam     map = ReLU( sum_c a_c A_c ),  a_c = mean over the cells of dy / dA_c
    hirescam    map = ReLU( sum_c dy / dA_c * A_c ),  cell by cell (Draelos and Carin, arXiv 2011.08891)

Both give the same map if the head is an average and one dense layer. Maps are in units of the logit and are not
scaled: with such a head, the sum over the cells before the ReLU is the logit minus the bias. A map of zeros means that
no single region raises the logit; the finding can still be flagged.

Maps are of the logit, because the slope of the sigmoid would dim the maps of a confident model. All findings share one
forward pass of the backbone; gradients are computed through the head only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ray_cxr.config import HeatMapMethod
from ray_cxr.models.keras_setup import keras, tf

#: Names that `classifier.build` gives the head's first layer; its input is the feature map.
_POOLS = ("pool_avg", "pool")


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
