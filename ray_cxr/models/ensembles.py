"""`ensemble`: one bundle that averages several, as a single graph, so that each image is decoded once.

Members of different inputs share a square input: each image is resized once for every distinct input.

For each finding, the ensemble's probability is the sigmoid of the mean of its members' calibrated logits, over the
members that have the finding. A third output, `spread`, is the standard deviation of the members' calibrated
probabilities: how much they disagree about an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tomli_w

from ray_cxr.config import InputSpec
from ray_cxr.data import identity
from ray_cxr.errors import ConfigError
from ray_cxr.evaluation.calibration import EPSILON
from ray_cxr.imaging.resize import combine_specs, place_tiles
from ray_cxr.labels import LABELS
from ray_cxr.models import exports, graphs, runtime
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import SPLIT_SCHEMA, Bundle, load_bundle
from ray_cxr.models.bundle_writer import BundleContent, find_finished, write_bundle
from ray_cxr.storage import remote, run_folder
from ray_cxr.versions import versions


def build_ensemble(members: Sequence[str | Path], out: str | Path) -> Bundle:
    """Write a bundle that averages the bundles `members`.

    It has neither calibration nor operating points: score labelled images with it and run `recalibrate`. Its training
    images are those of all members, so that leaks are found.

    Raises:
        ConfigError: fewer than two members, the same one twice, inputs that do not fit into one, a member without
            graph, or a finding that some members calibrate and others do not.
    """
    bundles = [load_bundle(member) for member in members]
    _check_members(bundles)
    spec = combine_specs([bundle.input_spec for bundle in bundles])
    findings = tuple(name for name in LABELS if any(name in bundle.findings for bundle in bundles))
    out, digests = remote.to_path(out), [bundle.digest for bundle in bundles]
    finished = find_finished(out, "ensemble", {"members": digests}, {"members": "list of bundles"})
    if finished is not None:
        return finished
    with run_folder.lock_bundle(out, "ensemble"):
        unknown = dict.fromkeys(findings)
        record = {
            "members": digests,
            "backbones": [bundle.architecture.backbone for bundle in bundles],
            "findings": {name: sum(name in bundle.findings for bundle in bundles) for name in findings},
        }
        settings: dict[str, Any] = {"size": spec.size, "findings": list(findings)}
        splits = [bundle.info["provenance"].get("split", {}) for bundle in bundles]
        ages = [bundle.rules.age_range for bundle in bundles]
        known_ages = [age for age in ages if age is not None]
        content = BundleContent(
            architecture=Architecture(backbone="graph", size=spec.size, findings=findings),
            input_spec=spec,
            calibration=unknown,
            operating_points=unknown,
            expected_flag_rates=unknown,
            provenance={
                "origin": f"an ensemble of {len(bundles)} bundles",
                "initial_weights": "those of the members",
                "lineage": "unknown" if any(_has_unknown_images(bundle) for bundle in bundles) else "known",
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "split": splits[0] if all(split == splits[0] for split in splits) else {},
                # Ages that every member has seen.
                "age_range": [max(low for low, _ in known_ages), min(high for _, high in known_ages)]
                if known_ages
                else None,
                "ensemble": {**record, "splits": splits},
                "settings": settings,
                "versions": versions(),
            },
            config_toml=tomli_w.dumps({"train": settings}),
            curves=[],
            split=_merge_splits(bundles),
        )
        return write_bundle(out, content, exports.Graph(_average(bundles, findings, spec), "ensemble"))


def _check_members(bundles: Sequence[Bundle]) -> None:
    if len(bundles) < 2:
        raise ConfigError("name at least two bundles")
    if len({bundle.digest for bundle in bundles}) < len(bundles):
        raise ConfigError("a bundle is named twice")
    for bundle in bundles:
        if "runtimes" not in bundle.info:
            raise ConfigError(f"{bundle.location} has no OpenVINO graph; train or import it again")
    for name in LABELS:
        fitted = [bundle.info["calibration"][name] is not None for bundle in bundles if name in bundle.findings]
        if len(set(fitted)) > 1:
            raise ConfigError(
                f"some members calibrate {name} and others do not; run `ray-cxr recalibrate` on the others"
            )


def _has_unknown_images(bundle: Bundle) -> bool:
    return bundle.info["provenance"].get("lineage") == "unknown"


def _merge_splits(bundles: Sequence[Bundle]) -> pa.Table:
    """Return the images of all members; one that trained any member counts as a training image."""
    rows: dict[tuple[Any, Any], str] = {}
    for bundle in bundles:
        for row in identity.read_split(bundle.path, SPLIT_SCHEMA).to_pylist():
            key = row["image_id"], row["patient_id"]
            if rows.get(key) != "train":
                rows[key] = row["split"]
    entries = [{"image_id": image, "patient_id": patient, "split": split} for (image, patient), split in rows.items()]
    return pa.Table.from_pylist(entries, SPLIT_SCHEMA)


def _average(bundles: Sequence[Bundle], findings: Sequence[str], spec: InputSpec) -> Any:
    """Return the graph of the ensemble."""
    ov = runtime.import_openvino()
    ops, core = ov.opset13, ov.Core()
    image = ops.parameter([-1, spec.size, spec.size, 1], ov.Type.u8, name="image")
    inputs = {spec: image}
    for tile, (top, left) in zip(spec.tiles, place_tiles(spec), strict=True):
        ends = np.array([top + tile.size, left + tile.size])
        inputs[tile] = ops.slice(image, np.array([top, left]), ends, np.array([1, 1]), np.array([1, 2]))
    logits, features = [], []
    for bundle in bundles:
        graph = core.read_model(bundle.path / runtime.graph_file("fp32"))
        for target in list(graph.get_parameters()[0].output(0).get_target_inputs()):
            target.replace_source_output(inputs[bundle.input_spec].output(0))
        probabilities, inner = (graph.output(name).get_node().input_value(0) for name in runtime.OUTPUTS)
        clipped = ops.clamp(probabilities, EPSILON, 1.0 - EPSILON)
        raw = ops.subtract(ops.log(clipped), ops.log(ops.subtract(np.float32(1.0), clipped)))
        slope, intercept = _read_calibration(bundle)
        logits.append(ops.add(ops.multiply(raw, slope), intercept))
        features.append(inner)
    means, spreads = [], []
    for name in findings:
        members = [
            ops.gather(values, np.array([bundle.findings.index(name)]), np.array(1))
            for bundle, values in zip(bundles, logits, strict=True)
            if name in bundle.findings
        ]
        values = ops.concat(members, 1)
        means.append(ops.reduce_mean(values, np.array([1]), keep_dims=True))
        p = ops.sigmoid(values)
        deviations = ops.subtract(p, ops.reduce_mean(p, np.array([1]), keep_dims=True))
        variance = ops.reduce_mean(ops.multiply(deviations, deviations), np.array([1]), keep_dims=True)
        spreads.append(ops.sqrt(variance))
    probabilities = ops.sigmoid(ops.concat(means, 1))
    return graphs.build_graph(image, probabilities, ops.concat(features, 1), ops.concat(spreads, 1))


def _read_calibration(bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """Return slope and intercept of each finding, float32 [1,F]; 1 and 0 without calibration."""
    fitted = [bundle.rules.calibrations[name] for name in bundle.findings]
    pairs = [(rule.slope, rule.intercept) if rule else (1.0, 0.0) for rule in fitted]
    slope, intercept = np.array(pairs, np.float32).T
    return slope[None], intercept[None]
