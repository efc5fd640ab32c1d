"""`quantize`: 8-bit weights and activations beside a bundle's own, checked on validation images.

NNCF's post-training quantisation: ranges of activations from training images, weights per channel. The probabilities
of the result are compared with float32's on validation images; where they, or the AUROC, move further than the
settings allow, no bundle is written.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ray_cxr.config import QuantizeSettings
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import BundleError, ConfigError
from ray_cxr.evaluation import metrics
from ray_cxr.labels import LABELS, NO_FINDING
from ray_cxr.models import exports, runtime
from ray_cxr.models.bundle import SPLIT_SCHEMA, WEIGHTS, Bundle, load_bundle, write_bundle
from ray_cxr.versions import versions

_BATCH = 16
_THREADS = 2


def quantize(
    bundle: str | Path,
    prepared: str | Path,
    out: str | Path,
    settings: QuantizeSettings,
    *,
    on_event: Callable[[str], None] = print,
) -> Bundle:
    """Write a copy of a bundle that can also be run in int8; its rules stay those of float32.

    Args:
        bundle: with OpenVINO's graph, as `train` and `import-weights` write it.
        prepared: a set of the bundle's size, with images in the splits train and val.
        out: the new bundle.
        on_event: takes lines about what was measured.

    Raises:
        BundleError: the bundle has no graph.
        ConfigError: the set does not fit the bundle, holds too few images, or the drift is too large.
        OutputError: `out` exists.
    """
    old = load_bundle(bundle)
    if Path(out).exists():
        raise ConfigError(f"--out {out}: exists already, and a bundle is never changed; name another folder")
    if "runtimes" not in old.info:
        raise BundleError(f"{bundle}: has no OpenVINO graph (an older ray-cxr made it); train or import it again")
    data = PreparedSet(Path(prepared), old.architecture.size)
    if data.input_spec != old.input_spec:
        raise ConfigError(f"{prepared}: was prepared as {data.input_spec}, the bundle takes {old.input_spec}")
    train, validation = data.load("train"), data.load("val")
    if len(train.images) < 32 or not len(validation.images):
        raise ConfigError(
            f"{prepared}: has {len(train.images)} images of split train and {len(validation.images)} of val; "
            "int8 needs 32 to take ranges from, and some to check it on"
        )
    rows = _chosen(len(validation.images), settings.check_images, settings.seed)
    labels = {name: validation.labels[rows, j] for j, name in enumerate(LABELS)}
    checked = np.asarray(validation.images[rows])
    ranges = exports.sample(train.images, settings.seed, settings.images)
    on_event(f"int8: ranges from {len(ranges):,} training images, checked on {len(checked):,} validation images")
    graph = runtime.openvino().Core().read_model(old.path / runtime.graph_file("fp32"))
    smaller = _quantized(graph, ranges)
    measured: dict[str, Any] = {}

    def add(part: Path, info: dict[str, Any]) -> None:
        path = part / runtime.graph_file("int8")
        runtime.openvino().save_model(smaller, path, compress_to_fp16=False)
        exact = runtime.OpenVinoRuntime(part / runtime.graph_file("fp32"), "fp32", _BATCH, _THREADS)
        fast = runtime.OpenVinoRuntime(path, "int8", _BATCH, _THREADS)
        measured.update(_measure(exact, fast, checked, labels, old.findings))
        on_event(_words(measured))
        _refuse(measured, settings)
        with np.load(part / runtime.GOLDEN, allow_pickle=False) as arrays:
            np.savez(part / "golden-int8.npz", int8=fast.predict(arrays["images"]).probabilities)
        info["runtimes"] = {
            **info["runtimes"],
            "int8": {
                "largest_drift": measured["largest_drift"],
                "tolerance": runtime.TOLERANCE["int8"],
                "accepted": True,
            },
        }
        info["provenance"]["quantized"] = {
            "from": old.digest,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "prepared_digest": data.manifest_digest,
            "range_images": len(ranges),
            "check_images": len(checked),
            **measured,
            "settings": settings.model_dump(mode="json"),
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


def _chosen(count: int, at_most: int, seed: int) -> np.ndarray:
    if count <= at_most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, at_most, replace=False))


def _quantized(graph: Any, images: np.ndarray) -> Any:
    runtime.openvino()  # before NNCF brings it in: without telemetry
    logging.getLogger("nncf").setLevel(logging.ERROR)
    import nncf

    nncf.set_log_level(logging.ERROR)
    batches = nncf.Dataset([images[i : i + 1, ..., None] for i in range(len(images))])
    # Both branches of the last layer stay in the graph; bias correction is the quick one, which the check judges.
    return nncf.quantize(graph, batches, preset=nncf.QuantizationPreset.MIXED, subset_size=len(images))


def _measure(
    exact: runtime.Runtime,
    fast: runtime.Runtime,
    images: np.ndarray,
    labels: dict[str, np.ndarray],
    findings: tuple[str, ...],
) -> dict[str, Any]:
    """How far int8 moves the probabilities and the AUROC of images [N,S,S] with labels [N] per finding."""
    before, after = exact.predict(images).probabilities, fast.predict(images).probabilities
    drift = np.abs(after - before)
    falls = {}
    for j, name in enumerate(findings):
        truth = labels.get(name)
        if truth is None or name == NO_FINDING:
            continue
        known = truth >= 0
        one, two = (metrics.auroc(truth[known], p[known, j]) for p in (before, after))
        if one is not None and two is not None:
            falls[name] = one - two
    return {
        "largest_drift": float(drift.max()),
        "p99_drift": float(np.quantile(drift, 0.99)),
        "mean_drift": float(drift.mean()),
        "auroc_fall": falls,
        "macro_auroc_fall": float(np.mean(list(falls.values()))) if falls else None,
    }


def _words(measured: dict[str, Any]) -> str:
    fall = measured["macro_auroc_fall"]
    auroc = "not defined on these images" if fall is None else f"falls by {fall:.4f}"
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
    if measured["p99_drift"] > settings.max_p99_drift:
        raise ConfigError(
            f"int8 moves 1 in 100 probabilities by more than {measured['p99_drift']:.4f}, max_p99_drift allows "
            f"{settings.max_p99_drift}; no bundle was written: give it more images, or stay with bf16"
        )
    if fall is not None and fall > settings.max_auroc_fall:
        raise ConfigError(
            f"int8 lowers the macro AUROC by {fall:.4f}, max_auroc_fall allows {settings.max_auroc_fall}; "
            "no bundle was written: give it more images, or stay with bf16"
        )
