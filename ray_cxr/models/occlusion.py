"""Heat maps of any model, also of one without layers, from its answers to partly covered images.

Occlusion (Zeiler and Fergus, ECCV 2014): a square of the image is replaced by the image's mean, and the fall of the
finding's logit is the map's value there; rises count as zero. The squares have one size and do not overlap, so the map
has `CELLS` x `CELLS` cells. It takes `CELLS`^2 + 1 passes of the model per image, for all findings together.

Unlike those of Grad-CAM, the cells do not add up to the logit, and a sign that two squares share can be missed.
"""

from __future__ import annotations

import numpy as np
from scipy.special import logit

from ray_cxr.models.runtime import Runtime

#: Cells along each side, as of the last feature map of a backbone with an input of 224 pixels.
CELLS = 7
#: Probabilities are clipped before the logit, as in `evaluation.calibration`.
_EPSILON = 1e-7


class Occlusion:
    """Computes heat maps with a runtime; `explain` has the form of `GradCam.explain`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def explain(self, images: np.ndarray, findings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute heat maps of images uint8 [n,S,S,1], for K of the model's outputs per image, int [n,K].

        Returns maps float32 [n,K,CELLS,CELLS], 0 and above, in units of the logit; and probabilities float32 [n,F].
        """
        n, side = images.shape[:2]
        edges = np.linspace(0, side, CELLS + 1).round().astype(int)
        maps = np.empty((n, findings.shape[1], CELLS, CELLS), np.float32)
        probabilities = []
        for i, image in enumerate(images[..., 0]):
            covered = np.repeat(image[None], CELLS**2 + 1, axis=0)
            gray = np.uint8(round(float(image.mean())))
            for cell in range(CELLS**2):
                row, column = divmod(cell, CELLS)
                covered[cell + 1, edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = gray
            p = self._runtime.predict(covered).probabilities
            logits = logit(np.clip(p.astype(np.float64), _EPSILON, 1 - _EPSILON))
            falls = np.maximum(logits[0] - logits[1:], 0.0)[:, findings[i]]
            maps[i] = falls.T.reshape(-1, CELLS, CELLS)
            probabilities.append(p[0])
        return maps, np.stack(probabilities)
