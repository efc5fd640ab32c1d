"""What a bundle carries so that it can be run without Keras, and so that a wrong answer is noticed.

    openvino.xml, .bin            the network as OpenVINO's graph, with two outputs: probabilities and pooled features
    golden.npz                    synthetic radiographs and the probabilities that Keras gives for them in float32
    openvino-int8.xml, .bin       the same graph with 8-bit weights and activations (`quantize`)
    golden-int8.npz               and its probabilities for the golden images
    quality.npz                   how ordinary images look, for the quality flags; made of training images, holds none

No picture of a patient goes into a bundle: the golden images are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_cxr.config import InputSpec
from ray_cxr.data import imaging, phantoms
from ray_cxr.evaluation import quality
from ray_cxr.models import runtime
from ray_cxr.models.architecture import Architecture

QUALITY = "quality.npz"
#: Files of a bundle that an older one may lack.
OPTIONAL_FILES = (
    "golden-int8.npz",
    runtime.GOLDEN,
    "openvino-int8.bin",
    "openvino-int8.xml",
    "openvino.bin",
    "openvino.xml",
    QUALITY,
)
GOLDEN_IMAGES = 8
#: At most so many images are looked at when a bundle is made; more would cost minutes and tell nothing new.
MAX_ORDINARY = 1000
_BATCH = 16


@dataclass(frozen=True)
class Ordinary:
    """Images that a bundle's drift and quality flags are measured on.

    Attributes:
        train: uint8 [N,S,S], which trained it.
        validation: uint8 [M,S,S], which did not.
    """

    train: np.ndarray
    validation: np.ndarray


def sample(images: Any, seed: int, at_most: int = MAX_ORDINARY) -> np.ndarray:
    """Up to `at_most` of the images [N,S,S] (an array, or what reads them when indexed), chosen by a seed."""
    if len(images) <= at_most:
        return np.asarray(images[np.arange(len(images))])
    rows = np.sort(np.random.default_rng(seed).choice(len(images), at_most, replace=False))
    return np.asarray(images[rows])


def golden_images(spec: InputSpec) -> np.ndarray:
    """Synthetic radiographs uint8 [8,S,S], the same for ever."""
    drawn = (phantoms.draw(phantoms.anatomy(0, patient, 0, size=256)) for patient in range(1, GOLDEN_IMAGES + 1))
    return np.stack([imaging.resize(image, spec) for image in drawn])


def export(
    folder: Path, model: Any, architecture: Architecture, spec: InputSpec, ordinary: Ordinary | None
) -> dict[str, Any]:
    """Write the graph and the golden images into a bundle that is being made, and measure how far precisions drift.

    Args:
        folder: the bundle to be.
        model: the Keras network in float32.
        ordinary: images to measure on beside the golden ones, where there are any.

    Returns:
        The entries `runtimes` (per precision: `largest_drift` against Keras or fp32, `tolerance`, and `accepted`: true,
        false, or null where this machine cannot tell) and `quality` of `bundle.json`. `runtimes` is absent where
        OpenVINO's graph does not give what Keras gives: such a bundle runs in Keras alone.
    """
    images = golden_images(spec)
    expected = runtime.KerasRuntime(model, _BATCH).predict(images).probabilities
    np.savez(folder / runtime.GOLDEN, images=images, fp32=expected)
    graph = folder / runtime.graph_file("fp32")
    _convert(model, architecture, graph)
    exact = runtime.OpenVinoRuntime(graph, "fp32", _BATCH, threads=_threads())
    fp32 = _entry("fp32", _drift(exact.predict(images).probabilities, expected))
    if not fp32["accepted"]:
        for path in (graph, graph.with_suffix(".bin")):
            path.unlink()
        return {"runtimes_refused": f"OpenVINO's graph is off by {fp32['largest_drift']:.3g}", "quality": None}
    runtimes = {"fp32": fp32, "bf16": {"largest_drift": None, "tolerance": runtime.TOLERANCE["bf16"], "accepted": None}}
    quickest: runtime.Runtime = exact
    held_out = None if ordinary is None else ordinary.validation
    if runtime.cpu_has_bf16():
        half = runtime.OpenVinoRuntime(graph, "bf16", _BATCH, threads=_threads())
        drift = _drift(half.predict(images).probabilities, expected)
        if held_out is not None and len(held_out):
            some = held_out[:256]
            drift = max(drift, _drift(half.predict(some).probabilities, exact.predict(some).probabilities))
        runtimes["bf16"] = _entry("bf16", drift)
        if runtimes["bf16"]["accepted"]:
            quickest = half
    return {"runtimes": runtimes, "quality": _fit_quality(folder, quickest, ordinary)}


def _fit_quality(folder: Path, quickest: runtime.Runtime, ordinary: Ordinary | None) -> dict[str, Any] | None:
    if ordinary is None or not len(ordinary.train):
        return None
    held_out = ordinary.validation
    model = quality.fit(
        ordinary.train, quickest.predict(ordinary.train).features, held_out, quickest.predict(held_out).features
    )
    if model is None:
        return None
    np.savez(folder / QUALITY, **model.arrays())  # type: ignore[arg-type]
    return {
        "train_images": len(ordinary.train),
        "held_out_images": len(held_out),
        "expected_rates": {name: float(rate) for name, rate in model.expected_rates.items()},
    }


def _convert(model: Any, architecture: Architecture, graph: Path) -> None:
    import keras
    import tensorflow as tf

    ov = runtime.openvino()
    outputs = {"probabilities": model.output, "features": model.get_layer("logits").input}
    both = keras.Model(model.input, outputs)
    images = tf.TensorSpec((None, architecture.size, architecture.size, 1), tf.uint8, name="image")
    traced = tf.function(lambda image: both(image, training=False)).get_concrete_function(images)
    # Weights stay in float32: in float16 the graph would not be the network that was validated.
    ov.save_model(ov.convert_model(traced), graph, compress_to_fp16=False)


def _threads() -> int:
    import os

    return min(8, os.cpu_count() or 1)


def _drift(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max())


def _entry(precision: str, drift: float) -> dict[str, Any]:
    tolerance = runtime.TOLERANCE[precision]
    return {"largest_drift": drift, "tolerance": tolerance, "accepted": drift <= tolerance}
