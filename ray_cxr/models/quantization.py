"""`quantize`: add an 8-bit graph to a copy of a bundle, after checking it on validation images.

NNCF quantises after training: ranges of activations come from training images, weights are scaled per channel. The
probabilities of the result are compared with those of float32 on validation images. If they or the AUROC move further
than the settings allow, no bundle is written.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ray_cxr import extras
from ray_cxr.config import QuantizeSettings
from ray_cxr.data import identity
from ray_cxr.data.prepared import PreparedSet, SplitData
from ray_cxr.errors import BundleError, ConfigError
from ray_cxr.evaluation import metrics
from ray_cxr.labels import LABELS, NO_FINDING
from ray_cxr.models import exports, runtime
from ray_cxr.models.bundle import SPLIT_SCHEMA, Bundle, load_bundle
from ray_cxr.models.bundle_writer import derive_bundle, find_finished
from ray_cxr.storage import remote
from ray_cxr.versions import versions

#: Minimum number of images for the ranges, and for the check.
MIN_IMAGES = 32
_BATCH = 16
_INPUTS = {"from": "bundle", "prepared_digest": "prepared set", "settings": "configuration"}


def quantize(
    bundle: str | Path,
    prepared: str | Path,
    out: str | Path,
    settings: QuantizeSettings,
    *,
    on_event: Callable[[str], None] = print,
) -> Bundle:
    """Write a copy of a bundle that can also run in int8; calibration and operating points stay those of float32.

    If `out` was made from the same bundle, prepared set and settings, it is returned unchanged. The prepared set must
    have the bundle's size and images in the splits train and val. `on_event` is called with lines about the
    measurements.
    """
    extras.require("nncf", "quantize")
    old = load_bundle(bundle)
    if "runtimes" not in old.info:
        reason = old.info.get("runtimes_refused", "an older ray-cxr wrote it; train or import it again")
        raise BundleError(f"{bundle}: has no OpenVINO graph to quantise ({reason})")
    data = PreparedSet(prepared, old.architecture.size)
    if data.input_spec != old.input_spec:
        raise ConfigError(f"{prepared}: prepared with {data.input_spec}, but the bundle takes {old.input_spec}")
    inputs = {"from": old.digest, "prepared_digest": data.manifest_digest, "settings": settings.model_dump(mode="json")}
    finished = find_finished(remote.to_path(out), "quantized", inputs, _INPUTS)
    if finished is not None:
        on_event(f"{out}: finished already, with the same bundle, images and settings")
        return finished
    train, validation = data.load("train"), data.load("val")
    usable = np.flatnonzero(~_find_trained(old, train, validation))
    if min(len(train), len(usable)) < MIN_IMAGES:
        raise ConfigError(
            f"{prepared}: has {len(train):,} images of split train and {len(usable):,} of split val whose patients are "
            f"not in training; int8 needs at least {MIN_IMAGES} of each"
        )
    rows = usable[exports.sample_rows(len(usable), settings.seed, settings.check_images)]
    labels = {name: validation.labels[rows, j] for j, name in enumerate(LABELS)}
    checked = validation.images[rows]
    ranges = exports.sample_images(train.images, settings.seed, settings.images)
    left_out = len(validation) - len(usable)
    note = f"; {left_out:,} others left out, because their patients are in training" if left_out else ""
    on_event(f"int8: ranges from {len(ranges):,} training images, check on {len(checked):,} validation images{note}")
    with tempfile.TemporaryDirectory() as folder:  # measured before anything is written at `out`
        graph = Path(folder) / runtime.graph_file("int8")
        fp32 = old.path / runtime.graph_file("fp32")
        runtime.import_openvino().save_model(_quantize_graph(fp32, ranges), graph, compress_to_fp16=False)
        threads = runtime.default_threads()
        exact = runtime.OpenVinoRuntime(fp32, "fp32", _BATCH, threads)
        quantized = runtime.OpenVinoRuntime(graph, "int8", _BATCH, threads)
        measured = _measure_drift(exact, quantized, checked, labels, old.findings)
        on_event(_describe(measured))
        _check_drift(measured, settings)

        def add(part: Path, info: dict[str, Any]) -> None:
            for file in (graph, graph.with_suffix(".bin")):
                shutil.copyfile(file, part / file.name)
            with runtime.open_arrays(part / runtime.GOLDEN) as arrays:
                np.savez(part / runtime.GOLDEN_INT8, int8=quantized.predict(arrays["images"]).probabilities)
            int8 = {
                "largest_drift": measured["largest_drift"],
                "p99_drift": measured["p99_drift"],
                "tolerance": settings.max_p99_drift,
                "accepted": True,
            }
            info["runtimes"] = {**info["runtimes"], "int8": int8}
            info["provenance"]["quantized"] = {
                **inputs,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "range_images": len(ranges),
                "check_images": len(checked),
                **measured,
                "versions": versions(),
            }

        return derive_bundle(old, out, add=add)


def _find_trained(bundle: Bundle, train: SplitData, validation: SplitData) -> np.ndarray:
    """Return bool [M]: validation images whose image or patient trained the bundle or is in `train`."""
    lineage = identity.read_split(bundle.path, SPLIT_SCHEMA).to_pydict()
    images, patients = set(train.image_ids), set(train.patient_ids)
    for image, patient, split in zip(lineage["image_id"], lineage["patient_id"], lineage["split"], strict=True):
        if split == "train":
            images.add(image)
            patients.add(patient)
    patients.discard(None)  # unknown patients match nothing
    pairs = zip(validation.image_ids, validation.patient_ids, strict=True)
    return np.array([image in images or patient in patients for image, patient in pairs], dtype=bool)


def _quantize_graph(graph: Path, images: np.ndarray) -> Any:
    """Return OpenVINO's model with 8-bit weights and activations, ranges from images [N,S,S]."""
    ov = runtime.import_openvino()  # before NNCF imports it, to keep telemetry off
    before = logging.getLoggerClass()
    # NNCF warns about its own imports, draws progress bars, and replaces the class of all later loggers.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import nncf

        logging.setLoggerClass(before)
        log = logging.getLogger("nncf")  # after the import, which adds methods to it
        log.handlers.clear()  # they hold this moment's stdout; without them, errors go to stderr
        log.setLevel(logging.ERROR)
        batches = nncf.Dataset([images[i : i + 1, ..., None] for i in range(len(images))])
        # MIXED: activations of swish go below 0 and are not symmetric. NNCF's default is the fast bias correction; the
        # other one runs the model once per layer, and the loss of accuracy is measured afterwards anyway.
        return nncf.quantize(
            ov.Core().read_model(graph), batches, preset=nncf.QuantizationPreset.MIXED, subset_size=len(images)
        )


def _measure_drift(
    exact: runtime.Runtime,
    quantized: runtime.Runtime,
    images: np.ndarray,
    labels: dict[str, np.ndarray],
    findings: tuple[str, ...],
) -> dict[str, Any]:
    """Measure how far int8 moves the probabilities and the AUROC of images [N,S,S] with labels [N] per finding."""
    before, after = exact.predict(images).probabilities, quantized.predict(images).probabilities
    after = np.nan_to_num(after, nan=-1.0)  # NaN counts as the largest drift and the lowest rank
    drift = np.abs(after - before)
    falls = {}
    for j, name in enumerate(findings):
        truth = labels.get(name)
        if truth is None or name == NO_FINDING:
            continue
        known = truth >= 0
        old, new = (metrics.auroc(truth[known], p[known, j]) for p in (before, after))
        if old is not None and new is not None:
            falls[name] = float(old - new)
    return {
        "largest_drift": float(drift.max()),
        "p99_drift": float(np.quantile(drift, 0.99)),
        "mean_drift": float(drift.mean()),
        "auroc_fall": falls,
        "macro_auroc_fall": float(np.mean(list(falls.values()))) if falls else None,
    }


def _describe(measured: dict[str, Any]) -> str:
    fall = measured["macro_auroc_fall"]
    auroc = "is undefined on these images" if fall is None else f"changes by {-fall:+.4f}"
    return (
        f"int8 against float32: probabilities move by {measured['mean_drift']:.4f} on average, by up to "
        f"{measured['p99_drift']:.4f} in 99 of 100, by up to {measured['largest_drift']:.4f} overall; "
        f"macro AUROC {auroc}"
    )


def _check_drift(measured: dict[str, Any], settings: QuantizeSettings) -> None:
    """Raises: ConfigError: int8 moves the probabilities or the AUROC further than the settings allow."""
    fall = measured["macro_auroc_fall"]
    if fall is None:
        raise ConfigError(
            "quantize: the AUROC of int8 cannot be checked, because no finding has positives and negatives among the "
            "checked validation images; no bundle was written. Prepare a set with labels"
        )
    problem = None
    if measured["p99_drift"] > settings.max_p99_drift:
        problem = (
            f"moves 1 in 100 probabilities by more than {measured['p99_drift']:.4f} (max_p99_drift is "
            f"{settings.max_p99_drift})"
        )
    elif fall > settings.max_auroc_fall:
        problem = f"lowers the macro AUROC by {fall:.4f} (max_auroc_fall is {settings.max_auroc_fall})"
    if problem:
        raise ConfigError(f"quantize: int8 {problem}; no bundle was written. Use more images, or keep bf16")
