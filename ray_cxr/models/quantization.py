"""`quantize`: add an 8-bit graph to a copy of a bundle, after checking it on validation images.

NNCF quantises after training: it measures the ranges of activations on training images and scales weights per channel.
The int8 probabilities of validation images are compared with those of float32. No bundle is written if the
probabilities or the AUROC change by more than the settings allow.
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
from ray_cxr.storage import remote, run_folder
from ray_cxr.versions import versions

#: Minimum number of images for the ranges, and minimum number for the check.
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

    An existing `out` that was made from the same bundle, prepared set and settings is returned unchanged.

    Args:
        prepared: a prepared set of the bundle's image size, with images of the splits train and val.
        on_event: a function that is called with lines about the measurements.
    """
    extras.require("nncf", "quantize")
    old = load_bundle(bundle)
    if "runtimes" not in old.info:
        reason = old.info.get("runtimes_refused", "an older ray-cxr wrote it; train or import it again")
        raise BundleError(f"{bundle}: has no OpenVINO graph to quantise ({reason})")
    data = PreparedSet(prepared, old.architecture.size)
    if old.input_spec.tiles:
        raise ConfigError(
            f"{bundle}: averages models of different inputs, which no prepared set holds, so it cannot be quantized"
        )
    if data.input_spec != old.input_spec:
        raise ConfigError(f"{prepared}: prepared with {data.input_spec}, but the bundle takes {old.input_spec}")
    inputs = {"from": old.digest, "prepared_digest": data.manifest_digest, "settings": settings.model_dump(mode="json")}
    finished = find_finished(remote.to_path(out), "quantized", inputs, _INPUTS)
    if finished is not None:
        on_event(f"{out}: finished already, with the same bundle, images and settings")
        return finished
    # In a temporary folder, int8 is measured before anything is written at `out`.
    with run_folder.lock_bundle(remote.to_path(out), "quantize"), tempfile.TemporaryDirectory() as folder:
        train, validation = data.load("train"), data.load("val")
        usable = np.flatnonzero(~_find_trained(old, train, validation))
        if min(len(train), len(usable)) < MIN_IMAGES:
            raise ConfigError(
                f"{prepared}: has {len(train):,} images of split train and {len(usable):,} of split val whose patients "
                f"are not in training; int8 needs at least {MIN_IMAGES} of each"
            )
        rows = usable[exports.sample_rows(len(usable), settings.seed, settings.check_images)]
        checked, labels = validation.images[rows], validation.labels[rows]
        ranges = exports.sample_images(train.images, settings.seed, settings.images)
        left_out = len(validation) - len(usable)
        note = f"; {left_out:,} others left out, because their patients are in training" if left_out else ""
        on_event(
            f"int8: ranges from {len(ranges):,} training images, check on {len(checked):,} validation images{note}"
        )
        graph = Path(folder) / runtime.graph_file("int8")
        fp32 = old.path / runtime.graph_file("fp32")
        runtime.import_openvino().save_model(_quantize_graph(fp32, ranges), graph, compress_to_fp16=False)
        threads = runtime.default_threads()
        exact = runtime.OpenVinoRuntime(fp32, "fp32", _BATCH, threads)
        quantized = runtime.OpenVinoRuntime(graph, "int8", _BATCH, threads)
        measured = _measure_drift(exact, quantized, checked, labels, old.findings)
        fall = measured["macro_auroc_fall"]
        auroc = "is undefined on these images" if fall is None else f"changes by {-fall:+.4f}"
        on_event(
            f"int8 against float32: probabilities move by {measured['mean_drift']:.4f} on average, by up to "
            f"{measured['p99_drift']:.4f} in 99 of 100, by up to {measured['largest_drift']:.4f} overall; "
            f"macro AUROC {auroc}"
        )
        _check_drift(measured, settings)

        def add(part: Path, info: dict[str, Any]) -> None:
            for file in (graph, graph.with_suffix(".bin")):
                shutil.copyfile(file, part / file.name)
            with runtime.open_arrays(part / runtime.GOLDEN) as arrays:
                np.savez(part / runtime.GOLDEN_INT8, int8=quantized.predict(arrays["images"]).probabilities)
            int8 = {name: measured[name] for name in ("largest_drift", "p99_drift")}
            int8 |= {"tolerance": settings.max_p99_drift, "accepted": True}
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
    """Find the validation images whose id or patient is in `train` or in the bundle's training images: bool [M]."""
    images = set(train.image_ids)
    patients = set(identity.unify_patients(train.image_ids, train.patient_ids))
    for row in identity.read_split(bundle.path, SPLIT_SCHEMA).to_pylist():
        if row["split"] == "train":
            images.add(row["image_id"])
            patients.add(row["patient_id"])
    patients.discard(None)  # unknown patients match nothing
    same = identity.find_ids(validation.image_ids, sorted(images)) >= 0
    validated = identity.unify_patients(validation.image_ids, validation.patient_ids)
    return same | np.array([patient in patients for patient in validated], dtype=bool)


def _quantize_graph(graph: Path, images: np.ndarray) -> Any:
    """Return an OpenVINO model with 8-bit weights and activations, with the ranges measured on images [N,S,S]."""
    ov = runtime.import_openvino()  # before NNCF imports it, to keep telemetry off
    before = logging.getLoggerClass()
    # NNCF warns about its own imports, draws progress bars, and replaces the class of all later loggers.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import nncf

        logging.setLoggerClass(before)
        log = logging.getLogger("nncf")  # after the import, which adds methods to it
        log.handlers.clear()  # they write to the redirected stdout; without handlers, errors go to stderr
        log.setLevel(logging.ERROR)
        batches = nncf.Dataset([images[i : i + 1, ..., None] for i in range(len(images))])
        # MIXED: activations of swish go below 0 and are not symmetric. Bias correction is NNCF's default, the fast one:
        # the accurate one runs the model once per layer, and `_check_drift` limits the loss of accuracy anyway.
        return nncf.quantize(
            ov.Core().read_model(graph), batches, preset=nncf.QuantizationPreset.MIXED, subset_size=len(images)
        )


def _measure_drift(
    exact: runtime.Runtime,
    quantized: runtime.Runtime,
    images: np.ndarray,
    labels: np.ndarray,
    findings: tuple[str, ...],
) -> dict[str, Any]:
    """Measure the drift of int8 on images [N,S,S], and the fall of the AUROC, with labels int8 [N,15], -1 null."""
    before, after = exact.predict(images).probabilities, quantized.predict(images).probabilities
    after = np.nan_to_num(after, nan=-1.0)  # NaN counts as the largest drift and the lowest rank
    drift = np.abs(after - before)
    falls = {}
    for j, name in enumerate(findings):
        if name == NO_FINDING:
            continue
        truth = labels[:, LABELS.index(name)]
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


def _check_drift(measured: dict[str, Any], settings: QuantizeSettings) -> None:
    """Raise ConfigError if int8 changes the probabilities or the AUROC by more than the settings allow."""
    drift, fall = measured["p99_drift"], measured["macro_auroc_fall"]
    if fall is None:
        raise ConfigError(
            "quantize: the AUROC of int8 cannot be checked, because no finding has positives and negatives among the "
            "checked validation images; no bundle was written. Prepare a set with labels"
        )
    if drift > settings.max_p99_drift:
        problem = f"moves 1 in 100 probabilities by more than {drift:.4f} (max_p99_drift is {settings.max_p99_drift})"
    elif fall > settings.max_auroc_fall:
        problem = f"lowers the macro AUROC by {fall:.4f} (max_auroc_fall is {settings.max_auroc_fall})"
    else:
        return
    raise ConfigError(f"quantize: int8 {problem}; no bundle was written. Use more images, or keep bf16")
