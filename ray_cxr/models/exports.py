"""What a bundle carries so that it can be run without Keras, and so that a wrong answer is noticed.

    openvino.xml, .bin            the network as OpenVINO's graph, with two outputs: probabilities and pooled features
    golden.npz                    synthetic radiographs and the probabilities that Keras gives for them in float32
    openvino-int8.xml, .bin       the same graph with 8-bit weights and activations (`quantize`)
    golden-int8.npz               and its probabilities for the golden images
    quality.npz                   how ordinary images look, for the quality flags; made of training images, holds none

No picture of a patient goes into a bundle: the golden images are drawn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_cxr.config import InputSpec
from ray_cxr.errors import BundleError
from ray_cxr.evaluation import quality
from ray_cxr.imaging import phantoms
from ray_cxr.imaging.resize import resize
from ray_cxr.models import runtime
from ray_cxr.models.architecture import Architecture

QUALITY = "quality.npz"
#: Files of a bundle that an older one may lack.
OPTIONAL_FILES = (
    runtime.GOLDEN_INT8,
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
_MAX_DRIFT_IMAGES = 256
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
    return np.stack([resize(image, spec) for image in drawn])


def export(
    folder: Path, model: Any, architecture: Architecture, spec: InputSpec, ordinary: Ordinary | None
) -> dict[str, Any]:
    """Write the graph and the golden images into a bundle that is being made, and measure how far precisions drift.

    Args:
        folder: the bundle to be.
        model: the Keras network in float32.
        ordinary: images to measure on beside the golden ones, where there are any.

    Returns:
        Entries of `bundle.json`:
        `runtimes`: per precision `largest_drift` against Keras (bf16 also against fp32 on validation images; null where
        this machine cannot run it, with a `reason` if its CPU has bf16), `tolerance`, and `accepted`: true, false or
        null. Absent where OpenVINO's graph does not give what Keras gives: then `runtimes_refused` says why, and the
        bundle runs in Keras alone.
        `quality`: of what the flags were fitted, and their `expected_rates`; or why they are `lacking`.

    Raises:
        BundleError: the network gives no probabilities.
    """
    import keras

    both = keras.Model(
        model.input, {"probabilities": model.output, "features": model.get_layer("logits").input}, name="network"
    )
    images = golden_images(spec)
    # Called and not `predict`: to trace a large network costs more than to run it once, layer by layer.
    expected = np.asarray(both(images[..., None], training=False)["probabilities"], dtype=np.float32)
    if not ((expected >= 0) & (expected <= 1)).all():
        raise BundleError(f"the network ({architecture.backbone}) gives no probabilities: are its weights damaged?")
    np.savez(folder / runtime.GOLDEN, images=images, fp32=expected)
    held_out = images[:0] if ordinary is None else ordinary.validation
    quickest: runtime.Runtime
    try:
        exact = _convert(both, architecture, folder)
        fp32 = entry("fp32", drift(exact.predict(images).probabilities, expected))
        refused = None if fp32["accepted"] else f"its answers are off by {fp32['largest_drift']:.3g}"
    except (BundleError, RuntimeError) as error:
        refused = f"OpenVINO cannot convert it: {_reason(error, folder)}"
    if refused is not None:
        for suffix in (".xml", ".bin"):
            (folder / runtime.graph_file("fp32")).with_suffix(suffix).unlink(missing_ok=True)
        quality_entry = _fit_quality(folder, runtime.KerasRuntime(model, _BATCH), ordinary)
        return {"runtimes_refused": refused, "quality": quality_entry}
    bf16: dict[str, Any] = {"largest_drift": None, "tolerance": runtime.TOLERANCE["bf16"], "accepted": None}
    quickest = exact
    if runtime.cpu_has_bf16():
        some = held_out[:: max(1, -(-len(held_out) // _MAX_DRIFT_IMAGES))]
        try:
            half = runtime.OpenVinoRuntime(folder / runtime.graph_file("bf16"), "bf16", _BATCH, runtime.threads_here())
            moved = drift(half.predict(images).probabilities, expected)
            moved = max(moved, drift(half.predict(some).probabilities, exact.predict(some).probabilities))
        except (BundleError, RuntimeError) as error:
            bf16["reason"] = f"the machine that made it cannot run it: {_reason(error, folder)}"
        else:
            bf16 = entry("bf16", moved)
            if bf16["accepted"]:
                quickest = half
    return {"runtimes": {"fp32": fp32, "bf16": bf16}, "quality": _fit_quality(folder, quickest, ordinary)}


def _reason(error: Exception, folder: Path) -> str:
    """One line of an error's text, without the temporary folder that a bundle is written in."""
    return runtime.reason(RuntimeError(str(error).replace(f"{folder}/", "")))


def drift(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of probabilities [N,F]; 1, the most there can be, where one is no number."""
    return float(np.nan_to_num(np.abs(found - expected), nan=1.0, posinf=1.0).max(initial=0.0))


def entry(precision: str, largest_drift: float) -> dict[str, Any]:
    """What `bundle.json` says of a precision that was measured."""
    tolerance = runtime.TOLERANCE[precision]
    return {"largest_drift": largest_drift, "tolerance": tolerance, "accepted": largest_drift <= tolerance}


def _fit_quality(folder: Path, network: runtime.Runtime, ordinary: Ordinary | None) -> dict[str, Any]:
    if ordinary is None or not len(ordinary.train):
        return {"lacking": "the bundle was made without images"}
    train, held_out = ordinary.train, ordinary.validation
    given = (train, network.predict(train).features, held_out, network.predict(held_out).features)
    try:
        model = quality.fit(*given)
    except ValueError as error:  # features that are no numbers: no reason to lose a trained network
        return {"lacking": str(error)}
    if model is None:
        return {"lacking": quality.lacking(*given) or "unknown"}
    np.savez(folder / QUALITY, **model.arrays())  # type: ignore[arg-type]
    return {
        "train_images": model.training,
        "held_out_images": model.held_out,
        "expected_rates": {name: float(rate) for name, rate in model.expected_rates.items()},
    }


def _convert(both: Any, architecture: Architecture, folder: Path) -> runtime.OpenVinoRuntime:
    """Write a network of two outputs as OpenVINO's graph, and open it in float32."""
    import tensorflow as tf

    ov = runtime.openvino()
    weights = [np.asarray(variable) for variable in both.trainable_variables]
    others = [np.asarray(variable) for variable in both.non_trainable_variables]

    def call(image: Any) -> Any:
        # Weights as constants. OpenVINO would look for each variable among all others: 20 s for DenseNet121, not 2.
        constants = ([tf.constant(array) for array in arrays] for arrays in (weights, others))
        return both.stateless_call(*constants, image, training=False)[0]

    images = tf.TensorSpec((None, architecture.size, architecture.size, 1), tf.uint8, name="image")
    traced = tf.function(call, autograph=False).get_concrete_function(images)
    converted = ov.convert_model(traced)
    for number, node in enumerate(converted.get_ordered_ops()):
        if re.fullmatch(r"[A-Za-z]+_\d+", node.get_friendly_name()):
            # Numbered by all that this process has converted so far; the same weights are to give the same file.
            node.set_friendly_name(f"{node.get_type_name()}_{number}")
    graph = folder / runtime.graph_file("fp32")
    # Weights stay in float32: in float16 the graph would not be the network that was validated.
    ov.save_model(converted, graph, compress_to_fp16=False)
    return runtime.OpenVinoRuntime(graph, "fp32", _BATCH, runtime.threads_here())
