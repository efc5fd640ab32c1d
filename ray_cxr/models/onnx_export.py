"""`export-onnx`: write a bundle's model as an ONNX file for other servers, such as Triton or ONNX Runtime.

The file takes gray images, uint8 [N,S,S,1], as `score` makes them; the normalisation is part of it. Its outputs are
`probabilities` [N,F], which are not calibrated, and `features` [N,C]. Its metadata has what a server needs beside it:
findings, input spec, calibration, operating points and the digest of the bundle, as JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ray_cxr import extras
from ray_cxr.errors import BundleError, ConfigError, OutputError, first_line
from ray_cxr.models import runtime
from ray_cxr.models.bundle import Bundle, load_bundle
from ray_cxr.storage import atomic, remote

OPSET = 18


def export_onnx(path: str | Path, out: str | Path) -> float:
    """Write the model of a bundle to the file `out`; return its largest drift from the golden images' probabilities.

    Raises:
        ConfigError: the extra `onnx` is missing, or the bundle holds only a graph.
        BundleError: ONNX Runtime gives other probabilities for the golden images.
        OutputError: `out` exists.
    """
    extras.require("tf2onnx", "export-onnx")
    bundle, out = load_bundle(path), remote.to_path(out)
    if out.exists():
        raise OutputError(f"{out}: exists already; choose another --out")
    if bundle.is_graph:
        raise ConfigError(
            f"{bundle.location}: holds only an OpenVINO graph, which cannot become ONNX; export the members of an "
            "ensemble, or use the ONNX file that was imported"
        )
    data = _convert(bundle, bundle.model())
    drift = _check(bundle, data)
    atomic.write_bytes(out, data)
    return drift


def _convert(bundle: Bundle, model: Any) -> bytes:
    import onnx
    import tf2onnx

    from ray_cxr.models.keras_setup import hide_user_settings, keras, tf

    both = keras.Model(model.input, {"probabilities": model.output, "features": model.get_layer("logits").input})
    size = bundle.input_spec.size
    image = tf.TensorSpec((None, size, size, 1), tf.uint8, name="image")
    traced = tf.function(lambda image: both(image, training=False), input_signature=[image], autograph=False)
    try:
        with hide_user_settings():
            converted, _ = tf2onnx.convert.from_function(traced, input_signature=[image], opset=OPSET)
        onnx.checker.check_model(converted)
    except Exception as error:  # of any kind: for an operation that ONNX lacks, for example
        raise BundleError(
            f"{bundle.location}: tf2onnx cannot convert {bundle.architecture.backbone} ({first_line(error)}); export a "
            "bundle with another backbone"
        ) from None
    about = {
        "findings": list(bundle.findings),
        "input_spec": bundle.input_spec.model_dump(mode="json"),
        "calibration": bundle.info["calibration"],
        "operating_points": bundle.info["operating_points"],
        "digest": bundle.digest,
    }
    for key, value in about.items():
        entry = converted.metadata_props.add()
        entry.key, entry.value = f"ray_cxr.{key}", json.dumps(value)
    return bytes(converted.SerializeToString())


def _check(bundle: Bundle, data: bytes) -> float:
    """Compare ONNX Runtime with the bundle's golden images; return the largest difference of a probability."""
    import onnxruntime

    if runtime.GOLDEN not in bundle.files:
        raise BundleError(f"{bundle.location}: has no golden images, as of an older ray-cxr; train or import it again")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = min(8, os.cpu_count() or 1)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    with runtime.open_arrays(bundle.path / runtime.GOLDEN) as arrays:
        images, expected = arrays["images"], arrays["fp32"]
    (found,) = session.run(["probabilities"], {"image": images[..., None]})
    drift = float(np.nan_to_num(np.abs(found - expected), nan=1.0).max())
    if drift > runtime.TOLERANCE["fp32"]:
        raise BundleError(
            f"{bundle.location}: ONNX Runtime's probabilities of the golden images are off by {drift:.3g}; no file was "
            "written"
        )
    return drift
