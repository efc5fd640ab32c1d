"""`quantize`: 8-bit weights and activations beside a bundle's own, checked on validation images.

NNCF's post-training quantisation: ranges of activations from training images, weights per channel. The probabilities
of the result are compared with float32's on validation images; where they, or the AUROC, move further than the
settings allow, no bundle is written.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ray_cxr.config import QuantizeSettings
from ray_cxr.data import identity
from ray_cxr.data.prepared import PreparedSet, SplitData
from ray_cxr.errors import BundleError, ConfigError, OutputError
from ray_cxr.evaluation import metrics
from ray_cxr.labels import LABELS, NO_FINDING
from ray_cxr.models import exports, runtime
from ray_cxr.models.bundle import SPLIT_SCHEMA, WEIGHTS, Bundle, load_bundle, write_bundle, written
from ray_cxr.storage import remote
from ray_cxr.versions import versions

#: The least numbers of images to take ranges from, and to check on.
MIN_IMAGES = 32
_BATCH = 16


def quantize(
    bundle: str | Path,
    prepared: str | Path,
    out: str | Path,
    settings: QuantizeSettings,
    *,
    on_event: Callable[[str], None] = print,
) -> Bundle:
    """Write a copy of a bundle that can also be run in int8; its rules stay those of float32.

    Where `out` was made of the same bundle, set and settings, it is returned as it is.

    Args:
        bundle: with OpenVINO's graph, as `train` and `import-weights` write it.
        prepared: a set of the bundle's size, with images in the splits train and val.
        out: the new bundle.
        on_event: takes lines about what was measured.

    Raises:
        BundleError: the bundle has no graph.
        ConfigError: the set does not fit the bundle, holds too few images, or the drift is too large.
        OutputError: `out` is something else.
    """
    old = load_bundle(bundle)
    if "runtimes" not in old.info:
        reason = old.info.get("runtimes_refused", "an older ray-cxr made it: train or import it again")
        raise BundleError(f"{bundle}: has no OpenVINO graph to make int8 of ({reason})")
    data = PreparedSet(prepared, old.architecture.size)
    if data.input_spec != old.input_spec:
        raise ConfigError(f"{prepared}: was prepared with {data.input_spec}, the bundle takes {old.input_spec}")
    made = {
        "from": old.digest,
        "prepared_digest": data.manifest_digest,
        "settings": settings.model_dump(mode="json"),
    }
    finished = _finished(remote.path(out), made)
    if finished is not None:
        on_event(f"{out}: is done already, from the same bundle, images and settings")
        return finished
    train, validation = data.load("train"), data.load("val")
    usable = np.flatnonzero(~_trained_on(old, train, validation))
    if min(len(train), len(usable)) < MIN_IMAGES:
        raise ConfigError(
            f"{prepared}: has {len(train):,} images of split train, and {len(usable):,} of split val whose patients "
            f"trained nothing; int8 needs {MIN_IMAGES} to take ranges from and {MIN_IMAGES} to check it on"
        )
    rows = usable[_chosen(len(usable), settings.check_images, settings.seed)]
    labels = {name: validation.labels[rows, j] for j, name in enumerate(LABELS)}
    checked = validation.images[rows]
    ranges = exports.sample(train.images, settings.seed, settings.images)
    left_out = len(validation) - len(usable)
    why = f"; {left_out:,} others are of patients that trained the network" if left_out else ""
    on_event(f"int8: ranges from {len(ranges):,} training images, checked on {len(checked):,} of validation{why}")
    with tempfile.TemporaryDirectory() as folder:
        # Made and judged before anything is written at `out`.
        path = Path(folder) / runtime.graph_file("int8")
        runtime.openvino().save_model(
            _quantized(old.path / runtime.graph_file("fp32"), ranges), path, compress_to_fp16=False
        )
        threads = runtime.threads_here()
        exact = runtime.OpenVinoRuntime(old.path / runtime.graph_file("fp32"), "fp32", _BATCH, threads)
        fast = runtime.OpenVinoRuntime(path, "int8", _BATCH, threads)
        measured = _measure(exact, fast, checked, labels, old.findings)
        on_event(_words(measured))
        _refuse(measured, settings)

        def add(part: Path, info: dict[str, Any]) -> None:
            for file in (path, path.with_suffix(".bin")):
                shutil.copyfile(file, part / file.name)
            with runtime.arrays_of(part / runtime.GOLDEN) as arrays:
                np.savez(part / runtime.GOLDEN_INT8, int8=fast.predict(arrays["images"]).probabilities)
            info["runtimes"] = {
                **info["runtimes"],
                "int8": {
                    "largest_drift": measured["largest_drift"],
                    "p99_drift": measured["p99_drift"],
                    "tolerance": settings.max_p99_drift,
                    "accepted": True,
                },
            }
            info["provenance"]["quantized"] = {
                **made,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "range_images": len(ranges),
                "check_images": len(checked),
                **measured,
                "versions": versions(),
            }

        return write_bundle(
            out,
            save_weights=lambda target: shutil.copyfile(old.path / WEIGHTS, target),
            architecture=old.architecture,
            input_spec=old.input_spec,
            calibration=old.info["calibration"],
            operating_points=old.info["operating_points"],
            expected_flag_rates=old.info["expected_flag_rates"],
            operating_alternatives=old.info.get("operating_alternatives"),
            rule_notes=old.info.get("rule_notes"),
            provenance=old.info["provenance"],
            config_toml=(old.path / "config.toml").read_text(encoding="utf-8"),
            curves=json.loads((old.path / "curves.json").read_text(encoding="utf-8")),
            split=pq.read_table(old.path / "split.parquet", schema=SPLIT_SCHEMA),
            like=old,
            add=add,
        )


def _finished(out: Path, made: dict[str, Any]) -> Bundle | None:
    """The bundle that an earlier run made of the same inputs.

    Raises:
        OutputError: `out` is something else.
        BundleError: it is a damaged bundle.
    """
    if not written(out):
        return None
    if not (out / "bundle.json").exists():
        raise OutputError(f"{out}: exists already and is no bundle; name another --out")
    bundle = load_bundle(out)
    found = bundle.info["provenance"].get("quantized")
    if not isinstance(found, dict) or any(found.get(name) != value for name, value in made.items()):
        raise OutputError(f"{out}: exists already and was made of something else; name another --out")
    return bundle


def _trained_on(bundle: Bundle, train: SplitData, validation: SplitData) -> np.ndarray:
    """bool [M]: validation images that trained the bundle or are in `train`, or are of a patient who is."""
    lineage = identity.read_split(bundle.path, SPLIT_SCHEMA).to_pydict()
    images, patients = set(train.image_ids), set(train.patient_ids)
    for image, patient, split in zip(lineage["image_id"], lineage["patient_id"], lineage["split"], strict=True):
        if split == "train":
            images.add(image)
            patients.add(patient)
    patients.discard(None)  # nobody knows whose these are
    given = zip(validation.image_ids, validation.patient_ids, strict=True)
    return np.array([image in images or patient in patients for image, patient in given], dtype=bool)


def _chosen(count: int, at_most: int, seed: int) -> np.ndarray:
    if count <= at_most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, at_most, replace=False))


def _quantized(graph: Path, images: np.ndarray) -> Any:
    """OpenVINO's model with 8-bit weights and activations, ranges from images [N,S,S]."""
    ov = runtime.openvino()  # before NNCF brings it in: without telemetry
    before = logging.getLoggerClass()
    # NNCF warns of its own imports, draws progress bars, and makes its class that of all loggers to come.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import nncf

        logging.setLoggerClass(before)
        log = logging.getLogger("nncf")  # not before the import, which gives it methods of its own
        log.handlers.clear()  # they hold the stdout of this moment; errors go to stderr without them
        log.setLevel(logging.ERROR)
        batches = nncf.Dataset([images[i : i + 1, ..., None] for i in range(len(images))])
        # MIXED: activations of swish, which go below 0, are not symmetric. The quick bias correction is the default:
        # the other one runs the network once for every layer, and what is lost is measured afterwards.
        return nncf.quantize(
            ov.Core().read_model(graph), batches, preset=nncf.QuantizationPreset.MIXED, subset_size=len(images)
        )


def _measure(
    exact: runtime.Runtime,
    fast: runtime.Runtime,
    images: np.ndarray,
    labels: dict[str, np.ndarray],
    findings: tuple[str, ...],
) -> dict[str, Any]:
    """How far int8 moves the probabilities and the AUROC of images [N,S,S] with labels [N] per finding."""
    before, after = exact.predict(images).probabilities, fast.predict(images).probabilities
    after = np.nan_to_num(after, nan=-1.0)  # no number: as far off as can be, and below all others
    drift = np.abs(after - before)
    falls = {}
    for j, name in enumerate(findings):
        truth = labels.get(name)
        if truth is None or name == NO_FINDING:
            continue
        known = truth >= 0
        one, two = (metrics.auroc(truth[known], p[known, j]) for p in (before, after))
        if one is not None and two is not None:
            falls[name] = float(one - two)
    return {
        "largest_drift": float(drift.max()),
        "p99_drift": float(np.quantile(drift, 0.99)),
        "mean_drift": float(drift.mean()),
        "auroc_fall": falls,
        "macro_auroc_fall": float(np.mean(list(falls.values()))) if falls else None,
    }


def _words(measured: dict[str, Any]) -> str:
    fall = measured["macro_auroc_fall"]
    auroc = "is not defined on these images" if fall is None else f"changes by {-fall:+.4f}"
    return (
        f"int8 against float32: probabilities move by {measured['mean_drift']:.4f} on average, "
        f"{measured['p99_drift']:.4f} at most in 99 of 100, {measured['largest_drift']:.4f} at most; "
        f"macro AUROC {auroc}"
    )


def _refuse(measured: dict[str, Any], settings: QuantizeSettings) -> None:
    """Refuse int8 that moves further than the settings allow.

    Raises:
        ConfigError: it does.
    """
    fall = measured["macro_auroc_fall"]
    if fall is None:
        raise ConfigError(
            "no finding of the bundle has positives and negatives among the validation images that were checked, so "
            "int8's AUROC cannot be; no bundle was written: prepare a set with labels"
        )
    if measured["p99_drift"] > settings.max_p99_drift:
        raise ConfigError(
            f"int8 moves 1 in 100 probabilities by more than {measured['p99_drift']:.4f}, max_p99_drift allows "
            f"{settings.max_p99_drift}; no bundle was written: give it more images, or stay with bf16"
        )
    if fall > settings.max_auroc_fall:
        raise ConfigError(
            f"int8 lowers the macro AUROC by {fall:.4f}, max_auroc_fall allows {settings.max_auroc_fall}; "
            "no bundle was written: give it more images, or stay with bf16"
        )
