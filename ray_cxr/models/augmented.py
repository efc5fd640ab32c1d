"""Test-time augmentation: average a model over slightly shifted and scaled copies of each image.

Copies are never flipped, because the heart lies on the left. The first copy is the image itself; the others are fixed,
so that the same image always gets the same result.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

import cv2
import numpy as np
from scipy.special import expit, logit

from ray_cxr.config import InputSpec
from ray_cxr.imaging.resize import list_images
from ray_cxr.models.runtime import Outputs, Runtime

#: Largest shift, as a share of the side, and largest change of scale.
_SHIFT, _SCALE = 0.03, 0.05
#: Probabilities are clipped before the logit, as in `evaluation.calibration`.
_EPSILON = 1e-7


class AugmentedRuntime(Runtime):
    """A runtime whose result is the mean logit over `copies` of each image; `spread` is their standard deviation.

    The spread includes that of the inner runtime. Features are those of the image itself.
    """

    has_spread = True

    def __init__(self, inner: Runtime, copies: int, spec: InputSpec) -> None:
        self._inner = inner
        self.batch_shape = inner.batch_shape
        self._images = list_images(spec)
        self._copies = copies

    def _submit_batch(self, batch: np.ndarray, n: int) -> Future[Outputs]:
        result: Future[Outputs] = Future()
        parts = [self._inner.submit(self._copy(batch[:n, ..., 0], k)) for k in range(self._copies)]
        waiting, lock = len(parts), threading.Lock()

        def finish(_: Future[Outputs]) -> None:
            nonlocal waiting
            with lock:
                waiting -= 1
                is_last = waiting == 0
            if is_last:
                try:
                    result.set_result(_average([part.result() for part in parts]))
                except Exception as error:
                    result.set_exception(error)

        for part in parts:
            part.add_done_callback(finish)
        return result

    def _copy(self, batch: np.ndarray, k: int) -> np.ndarray:
        """Return copy number `k` of a batch uint8 [n,S,S]; number 0 is the batch itself."""
        if k == 0:
            return batch
        copied = batch.copy()
        for top, left, side in self._images:
            matrix, area = _build_transform(k, side), (slice(top, top + side), slice(left, left + side))
            for image, source in zip(copied, batch, strict=True):
                image[area] = _transform(source[area], matrix)
        return copied


def _build_transform(k: int, side: int) -> np.ndarray:
    """Return the affine matrix [2,3] of copy number `k` for images of `side` pixels."""
    # Fractions that fill the unit cube evenly for any number of copies (a Kronecker sequence).
    x, y, z = (2.0 * ((k * step) % 1.0) - 1.0 for step in (0.8191725, 0.6710436, 0.5497005))
    scale = 1.0 + _SCALE * z
    shift = side * _SHIFT * np.array([x, y]) + (side - 1) / 2 * (1.0 - scale)
    return np.array([[scale, 0.0, shift[0]], [0.0, scale, shift[1]]])


def _transform(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a transform to an image uint8 [S,S]; pixels beyond the border repeat it."""
    side = image.shape[0]
    options = {"flags": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_REPLICATE}
    return np.asarray(cv2.warpAffine(image, matrix, (side, side), **options))


def _average(outputs: list[Outputs]) -> Outputs:
    p = np.stack([part.probabilities for part in outputs]).astype(np.float64)
    mean = expit(logit(np.clip(p, _EPSILON, 1 - _EPSILON)).mean(axis=0))
    variance = p.var(axis=0)
    inner = [part.spread for part in outputs if part.spread is not None]
    if inner:
        variance = variance + np.square(np.stack(inner)).mean(axis=0)
    return Outputs(mean.astype(np.float32), outputs[0].features, np.sqrt(variance).astype(np.float32))
