"""Export a model into its bundle: a graph that runs without Keras, and images that reveal wrong probabilities.

    openvino.xml, .bin            the model as an OpenVINO graph with two outputs, probabilities and pooled features
    golden.npz                    synthetic radiographs and the probabilities that Keras gives for them in float32
    openvino-int8.xml, .bin       the same graph with 8-bit weights and activations (`quantize`)
    golden-int8.npz               probabilities that the 8-bit graph gives for the golden images
    quality.npz                   statistics of ordinary images for the quality flags

No patient's image enters a bundle: the golden images are synthetic, and the statistics contain no image.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_cxr.config import InputSpec
from ray_cxr.errors import BundleError, ConfigError
from ray_cxr.evaluation import quality
from ray_cxr.imaging.phantom_anatomy import sample_anatomy
from ray_cxr.imaging.phantom_findings import draw_phantom
from ray_cxr.imaging.resize import resize
from ray_cxr.models import runtime
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import QUALITY
from ray_cxr.models.graphs import check_graph

GOLDEN_IMAGES = 8
#: Maximum number of images for drift and quality flags; more would take minutes and change nothing.
MAX_SAMPLE = 1000
_MAX_DRIFT_IMAGES = 256
_BATCH = 16
#: The batch size of `score` on CPUs.
_SCORE_BATCH = 4
_ROUNDS, _ROUND_S = 5, 0.6


@dataclass(frozen=True)
class SampleImages:
    """Images uint8 [N,S,S] for measuring a bundle's drift and fitting its quality flags."""

    train: np.ndarray  # the model was trained on them
    validation: np.ndarray


def sample_images(images: Any, seed: int, at_most: int = MAX_SAMPLE) -> np.ndarray:
    """Draw up to `at_most` images from an array [N,S,S], or from a reader that is indexed like an array."""
    return np.asarray(images[sample_rows(len(images), seed, at_most)])


def sample_rows(count: int, seed: int, at_most: int) -> np.ndarray:
    """Draw up to `at_most` of `count` row numbers; return them in order."""
    if count <= at_most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, at_most, replace=False))


def golden_images(spec: InputSpec) -> np.ndarray:
    """Return synthetic radiographs uint8 [8,S,S], which are the same in every version."""
    drawn = (draw_phantom(sample_anatomy(0, patient, 0, size=256)) for patient in range(1, GOLDEN_IMAGES + 1))
    return np.stack([resize(image, spec) for image in drawn])


def export(
    folder: Path, model: Any, architecture: Architecture, spec: InputSpec, images: SampleImages | None
) -> dict[str, Any]:
    """Write the graph and the golden images into a new bundle, and measure the drift of each precision.

    Args:
        model: the Keras model in float32.
        images: images for the drift of bf16, in addition to the golden images, and for the quality flags.

    Returns:
        Entries of `bundle.json`:
        `runtimes`: an object for fp32 and for bf16. `largest_drift` is the largest difference from Keras on the golden
            images, for bf16 also from fp32 on validation images. `accepted` states whether it is within `tolerance`.
            Both are null for bf16 if this machine cannot run it; a `reason` follows if the CPU has bf16.
        `runtimes_refused`: instead of `runtimes`, the reason why OpenVINO cannot run the model; Keras runs it.
        `quality`: the number of images that the flags were fitted on and their `expected_rates`; or `lacking`, the
            reason why there are no flags.

    Raises:
        BundleError: the model's outputs are not probabilities.
    """
    from ray_cxr.models.keras_setup import keras

    # The graph contains the name of the model; another name would change its bytes.
    both = keras.Model(
        model.input, {"probabilities": model.output, "features": model.get_layer("logits").input}, name="network"
    )
    golden = golden_images(spec)
    # Called directly, since `predict` would trace the model, which takes longer than one pass layer by layer.
    expected = np.asarray(both(golden[..., None], training=False)["probabilities"], dtype=np.float32)
    if not ((expected >= 0) & (expected <= 1)).all():
        raise BundleError(f"{architecture.backbone}: the outputs are not probabilities; its weights are damaged")
    np.savez(folder / runtime.GOLDEN, images=golden, fp32=expected)
    try:
        exact = _convert(both, architecture, folder)
        fp32 = precision_entry("fp32", largest_drift(exact.predict(golden).probabilities, expected))
        refused = None if fp32["accepted"] else f"its answers are off by {fp32['largest_drift']:.3g}"
    except (BundleError, RuntimeError) as error:
        refused = f"OpenVINO cannot convert it: {_summarize(error, folder)}"
    if refused is not None:
        for suffix in (".xml", ".bin"):
            (folder / runtime.graph_file("fp32")).with_suffix(suffix).unlink(missing_ok=True)
        quality_entry = _fit_quality(folder, runtime.KerasRuntime(model, _BATCH), images)
        return {"runtimes_refused": refused, "quality": quality_entry}
    fastest, bf16 = _measure_bf16(folder, exact, golden, expected, images)
    return {"runtimes": {"fp32": fp32, "bf16": bf16}, "quality": _fit_quality(folder, fastest, images)}


@dataclass(frozen=True)
class Graph:
    """A model that exists only as an OpenVINO graph, see `graphs`; `origin` names its file in messages."""

    model: Any
    origin: str


def export_graph(folder: Path, graph: Graph, spec: InputSpec) -> dict[str, Any]:
    """Write a graph and the golden images into a new bundle; return the entries of `bundle.json` as `export` does.

    The golden images' probabilities are those of the graph itself in float32.

    Raises:
        ConfigError: its outputs are no probabilities, or depend on the batch.
    """
    file, golden = folder / runtime.graph_file("fp32"), golden_images(spec)
    runtime.import_openvino().save_model(graph.model, file, compress_to_fp16=False)
    try:
        expected = check_graph(file, golden, graph.origin)
        exact = runtime.OpenVinoRuntime(file, "fp32", _BATCH, runtime.default_threads())
    except (BundleError, RuntimeError) as error:
        cause = _summarize(error, folder).rpartition("cannot run it: ")[2]
        raise ConfigError(
            f"{graph.origin}: OpenVINO cannot run it; is its batch size fixed? Export it with a dynamic one ({cause})"
        ) from None
    np.savez(folder / runtime.GOLDEN, images=golden, fp32=expected)
    _, bf16 = _measure_bf16(folder, exact, golden, expected, None)
    fp32 = precision_entry("fp32", largest_drift(exact.predict(golden).probabilities, expected))
    return {"runtimes": {"fp32": fp32, "bf16": bf16}, "quality": {"lacking": "the bundle was made without images"}}


def _measure_bf16(
    folder: Path, exact: runtime.Runtime, golden: np.ndarray, expected: np.ndarray, images: SampleImages | None
) -> tuple[runtime.Runtime, dict[str, Any]]:
    """Return the fastest accepted runtime, and the entry of `bundle.json` for bf16."""
    bf16: dict[str, Any] = {"largest_drift": None, "tolerance": runtime.TOLERANCE["bf16"], "accepted": None}
    if not runtime.cpu_has_bf16():
        return exact, bf16
    held_out = golden[:0] if images is None else images.validation
    others = held_out[:: max(1, -(-len(held_out) // _MAX_DRIFT_IMAGES))]
    try:
        half = runtime.OpenVinoRuntime(folder / runtime.graph_file("bf16"), "bf16", _BATCH, runtime.default_threads())
        drift = largest_drift(half.predict(golden).probabilities, expected)
        drift = max(drift, largest_drift(half.predict(others).probabilities, exact.predict(others).probabilities))
    except (BundleError, RuntimeError) as error:
        return exact, {**bf16, "reason": f"the machine that made it cannot run it: {_summarize(error, folder)}"}
    entry = precision_entry("bf16", drift)
    return half if entry["accepted"] else exact, entry


def _summarize(error: Exception, folder: Path) -> str:
    """Return one line of an error, without the temporary folder of the bundle."""
    return runtime.summarize_error(RuntimeError(str(error).replace(f"{folder}/", "")))


def largest_drift(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference between probabilities [N,F]; NaN counts as 1, the largest possible difference."""
    return float(np.nan_to_num(np.abs(actual - expected), nan=1.0, posinf=1.0).max(initial=0.0))


def precision_entry(precision: str, drift: float) -> dict[str, Any]:
    """Return the entry of `bundle.json` for a measured precision."""
    tolerance = runtime.TOLERANCE[precision]
    return {"largest_drift": drift, "tolerance": tolerance, "accepted": drift <= tolerance}


def _fit_quality(folder: Path, model: runtime.Runtime, images: SampleImages | None) -> dict[str, Any]:
    if images is None or not len(images.train):
        return {"lacking": "the bundle was made without images"}
    train, held_out = images.train, images.validation
    data = (train, model.predict(train).features, held_out, model.predict(held_out).features)
    try:
        fitted, reason = quality.fit_quality_model(*data)
    except ValueError as error:  # features that are not numbers: no reason to lose a trained model
        return {"lacking": str(error)}
    if fitted is None:
        return {"lacking": reason}
    np.savez(folder / QUALITY, **fitted.arrays())  # type: ignore[arg-type]
    return {
        "train_images": fitted.training,
        "held_out_images": fitted.held_out,
        "expected_rates": {name: float(rate) for name, rate in fitted.expected_rates.items()},
    }


def _convert(both: Any, architecture: Architecture, folder: Path) -> runtime.OpenVinoRuntime:
    """Write a model with two outputs as an OpenVINO graph, and open it in float32."""
    from ray_cxr.models.keras_setup import hide_user_settings, tf

    ov = runtime.import_openvino()
    weights = [np.asarray(variable) for variable in both.trainable_variables]
    others = [np.asarray(variable) for variable in both.non_trainable_variables]

    def call(image: Any) -> Any:
        # Weights as constants: for each variable, OpenVINO searches all of them, 20 s for DenseNet121 instead of 2 s.
        constants = ([tf.constant(array) for array in arrays] for arrays in (weights, others))
        return both.stateless_call(*constants, image, training=False)[0]

    images = tf.TensorSpec((None, architecture.size, architecture.size, 1), tf.uint8, name="image")
    traced = tf.function(call, autograph=False).get_concrete_function(images)
    with hide_user_settings():  # OpenVINO loads `tf.keras`, which would be Keras 2 with TF_USE_LEGACY_KERAS
        converted = ov.convert_model(traced)
    for number, node in enumerate(converted.get_ordered_ops()):
        if re.fullmatch(r"[A-Za-z]+_\d+", node.get_friendly_name()):
            # OpenVINO numbers nodes across all conversions of a process; the same weights must give the same file.
            node.set_friendly_name(f"{node.get_type_name()}_{number}")
    graph = folder / runtime.graph_file("fp32")
    # In float16 the graph would not be the model that was validated.
    ov.save_model(converted, graph, compress_to_fp16=False)
    return runtime.OpenVinoRuntime(graph, "fp32", _BATCH, runtime.default_threads())


def measure_images_per_second(architecture: Architecture, spec: InputSpec, *, threads: int) -> float:
    """Measure how fast `score --precision auto` runs a model on CPU threads, without decoding: images/s.

    The model has random weights, since weights do not affect the time of a forward pass. The result is the median of
    five rounds of 0.6 s.
    """
    from ray_cxr.models import classifier
    from ray_cxr.models.keras_setup import keras

    keras.utils.set_random_seed(0)
    model = classifier.build(architecture)
    with tempfile.TemporaryDirectory(prefix="ray_cxr-") as name:
        exported = export(Path(name), model, architecture, spec, None)
        if "runtimes" in exported:
            precision = "bf16" if exported["runtimes"]["bf16"]["accepted"] else "fp32"
            graph = Path(name) / runtime.graph_file(precision)
            opened: runtime.Runtime = runtime.OpenVinoRuntime(graph, precision, _SCORE_BATCH, threads)
        else:
            opened = runtime.KerasRuntime(model, _SCORE_BATCH)
        images = np.repeat(golden_images(spec), threads, axis=0)
        opened.predict(images)  # the first pass allocates
        rates = []
        for _ in range(_ROUNDS):
            start, done = time.perf_counter(), 0
            while (seconds := time.perf_counter() - start) < _ROUND_S:
                opened.predict(images)
                done += len(images)
            rates.append(done / seconds)
    return statistics.median(rates)
