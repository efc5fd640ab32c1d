"""`import-weights`: turn third-party Keras weights, such as a CheXNet file, into a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import tomli_w

from ray_cxr import labels
from ray_cxr.config import Aspect, InputSpec, Interpolation, TrainSettings, build
from ray_cxr.errors import ConfigError
from ray_cxr.models import classifier
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import SPLIT_SCHEMA, Bundle
from ray_cxr.models.bundle_writer import BundleContent, refuse_existing, write_bundle
from ray_cxr.storage import remote, run_folder
from ray_cxr.storage.files import hash_file
from ray_cxr.versions import versions


def parse_findings(text: str) -> tuple[str, ...]:
    """Parse `14`, `15`, or comma-separated names in the order of the file's outputs."""
    if text.strip().isdigit():
        return labels.resolve(int(text))
    return labels.parse_order([name for name in text.split(",") if name.strip()])


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
    """Make a bundle of a Keras `.h5`, `.weights.h5` or `.keras` file with a backbone, pooling and one dense layer.

    The input is normalised as keras.applications' `preprocess_input` does for this backbone. The bundle has neither
    calibration nor operating points, so the columns `c_` and `flag_` of its score tables are null. Only numbers are
    read from the file; its model description is never executed.

    Args:
        findings: the file's outputs in order. The file cannot reveal a wrong order.
        size: side of the input, pixels.
    """
    path = Path(path)
    names = labels.parse_order(findings)
    spec = build(InputSpec, {"size": size, "aspect": aspect, "interpolation": interpolation}, where="import-weights")
    architecture = build(Architecture, {"backbone": backbone, "size": size, "findings": names}, where="import-weights")
    if not path.is_file():
        raise ConfigError(f"{path}: no such weights file")
    out = remote.to_path(out)
    refuse_existing(out)
    with run_folder.lock_bundle(out, "import-weights"):
        model = classifier.build(architecture)
        classifier.load_third_party_weights(model, path)
        settings = build(TrainSettings, {"backbone": backbone, "size": size, "findings": names}).model_dump(mode="json")
        unknown = dict.fromkeys(names)
        content = BundleContent(
            architecture=architecture,
            input_spec=spec,
            calibration=unknown,
            operating_points=unknown,
            expected_flag_rates=unknown,
            provenance={
                "origin": f"imported from {path.name}; its training images are unknown",
                "initial_weights": f"the file {path.name}, SHA-256 {hash_file(path)}",
                "lineage": "unknown",
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "split": {},
                "age_range": None,
                "settings": settings,
                "versions": versions(),
            },
            config_toml=tomli_w.dumps({"train": {key: value for key, value in settings.items() if value is not None}}),
            curves=[],
            split=SPLIT_SCHEMA.empty_table(),
        )
        return write_bundle(out, content, model)
