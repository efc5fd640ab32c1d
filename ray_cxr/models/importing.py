"""`import-weights`: somebody else's Keras weights as a bundle, so that a CheXNet file can screen on day one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import tomli_w

from ray_cxr import labels
from ray_cxr.config import Aspect, InputSpec, Interpolation, TrainSettings, build
from ray_cxr.errors import ConfigError
from ray_cxr.models import classifier
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import SPLIT_SCHEMA, Bundle, write_bundle
from ray_cxr.versions import versions


def parse_findings(text: str) -> tuple[str, ...]:
    """`14`, `15`, or names in the order of the file's outputs, separated by commas.

    Raises:
        ConfigError: an unknown name, a name twice, or another number.
    """
    if text.strip().isdigit():
        return labels.resolve(int(text))
    return labels.ordered([name for name in text.split(",") if name.strip()])


def import_weights(
    path: str | Path,
    out: str | Path,
    *,
    backbone: str,
    findings: Sequence[str],
    size: int = 224,
    aspect: Aspect = "stretch",
    interpolation: Interpolation = "area",
) -> Bundle:
    """Make a bundle of a Keras `.h5`, `.weights.h5` or `.keras` file: a backbone, pooling, one dense output layer.

    The input is normalised as keras.applications' `preprocess_input` does for this backbone. Images and patients
    that trained the file are unknown, and so are calibration and operating points: those columns are null.

    Args:
        path: the file. Only numbers are read from it; a model description inside is never executed.
        findings: what its outputs are, in their order; a wrong order cannot be noticed, so it must be given.
        size: side of the input, pixels.

    Raises:
        ConfigError: the file does not fit.
        OutputError: `out` exists.
    """
    path = Path(path)
    names = labels.ordered(findings)
    spec = build(InputSpec, {"size": size, "aspect": aspect, "interpolation": interpolation}, where="import-weights")
    architecture = build(Architecture, {"backbone": backbone, "size": size, "findings": names}, where="import-weights")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file of weights")
    model = classifier.build(architecture)
    classifier.import_foreign(model, path)
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    settings = build(TrainSettings, {"backbone": backbone, "size": size, "findings": names})
    plain = {key: value for key, value in settings.model_dump(mode="json").items() if value is not None}
    nothing = dict.fromkeys(names)
    return write_bundle(
        out,
        save_weights=lambda target: model.save_weights(str(target)),
        architecture=architecture,
        input_spec=spec,
        calibration=nothing,
        operating_points=nothing,
        expected_flag_rates=nothing,
        provenance={
            "origin": f"imported from {path.name}; the images that trained it are unknown",
            "initial_weights": f"the file {path.name}, SHA-256 {digest}",
            "lineage": "unknown",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "split": {},
            "age_range": None,
            "settings": json.loads(settings.model_dump_json()),
            "versions": versions(),
        },
        config_toml=tomli_w.dumps({"train": plain}),
        curves=[],
        split=pa.table({name: pa.array([], pa.string()) for name in SPLIT_SCHEMA.names}, schema=SPLIT_SCHEMA),
    )
