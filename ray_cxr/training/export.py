"""After training: fit calibration and operating points, and write the bundle and the learning curves."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tomli_w

from ray_cxr.data import identity
from ray_cxr.errors import OutputError, RayCxrError
from ray_cxr.evaluation import drift
from ray_cxr.evaluation.calibration import fit_rules
from ray_cxr.imaging.demographics import PatientCount
from ray_cxr.models import exports
from ray_cxr.models.bundle import SPLIT_SCHEMA, WEIGHTS, Bundle, load_bundle
from ray_cxr.models.bundle_writer import BundleContent, write_bundle
from ray_cxr.training import provenance
from ray_cxr.training.checkpoints import find_best_checkpoint, read_progress, read_result
from ray_cxr.training.planning import TrainPlan
from ray_cxr.training.worker import PROGRESS, RESULT, VALIDATION
from ray_cxr.versions import versions

#: In RUN: the figure of loss and AUROC by epoch; the same name with .svg.
CURVES = "learning_curves.png"


def export_bundle(
    plan: TrainPlan, to: Path, *, last: float = math.inf, more: Mapping[str, Any] | None = None
) -> Bundle:
    """Write a bundle of the best epoch up to `last` that a run has finished.

    `more` entries are added to its provenance.
    """
    best = find_best_checkpoint(plan.out, last)
    if best is None:
        raise RayCxrError(f"{plan.out}: no epoch has finished yet, so there is no bundle to export; continue training")
    with tempfile.TemporaryDirectory(prefix="ray_cxr-") as name, best.as_directory() as source:
        # Ray's folder may be a view of remote storage: copy it once.
        checkpoint = Path(shutil.copytree(source, name, dirs_exist_ok=True))
        # The latest checkpoint has the curves of all epochs, the best one only those up to its own epoch.
        curves = read_progress(read_result(plan.out).checkpoint)["curves"]
        curves = [point for point in curves if point["epoch"] <= last]
        content = _build_content(plan, checkpoint, curves, more or {})
        sample = exports.SampleImages(
            *(exports.sample_images(plan.data.load(split).images, plan.settings.seed) for split in ("train", "val"))
        )
        return write_bundle(to, content, checkpoint / WEIGHTS, images=sample)


def write_curves(out: Path, bundle: Bundle) -> None:
    """Draw a bundle's learning curves as `learning_curves.png` and `.svg`."""
    from ray_cxr.reporting import curve_figures, plots  # matplotlib takes half a second to import

    png, svg = plots.encode_figure(curve_figures.plot_learning_curves(bundle.model_json()["curves"]))
    try:
        (out / CURVES).write_bytes(png)
        (out / CURVES).with_suffix(".svg").write_bytes(svg)
    except OSError as error:
        raise OutputError(f"{out / CURVES}: cannot be written: {error.strerror or error}") from None


def _build_content(
    plan: TrainPlan, checkpoint: Path, curves: Sequence[Mapping[str, Any]], more: Mapping[str, Any]
) -> BundleContent:
    """Fit calibration and operating points on the validation of the best epoch, and collect the bundle's contents."""
    data, settings = plan.data, plan.settings
    progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
    result = json.loads((checkpoint / RESULT).read_text(encoding="utf-8"))
    with np.load(checkpoint / VALIDATION, allow_pickle=False) as arrays:
        probabilities, ids = arrays["probabilities"], arrays["image_ids"]
    table = data.rows().select(["image_id", "split", "error_code", *provenance.COLUMNS]).to_pandas()
    table = table[table["error_code"].isna()]
    val = table[table["split"] == "val"].reset_index(drop=True)
    if val["image_id"].tolist() != ids.tolist():
        raise RayCxrError(f"{plan.out}: the validation images changed during the run; train again in another --out")
    findings = plan.architecture.findings
    fitting: dict[str, Any] = {"method": settings.calibration, "min_positives": settings.min_positives}
    labels = val[list(findings)].to_numpy(dtype=np.float64, na_value=np.nan)
    rules = fit_rules(labels, probabilities, findings, rule=settings.operating_point, **fitting)
    used = table[table["split"].isin(["train", "val"])]
    split, start = _trace_lineage(used, settings.weights)
    ages = table.loc[table["split"] == "train", "age"].dropna()
    origin = {
        "origin": f"trained by ray-cxr train on {int((table['split'] == 'train').sum()):,} images",
        **start,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "prepared_digest": data.manifest_digest,
        "split": data.split_info(),
        "images": {
            name: {"images": len(group), **PatientCount.of(group["patient_id"]).to_json()}
            for name, group in used.groupby("split")
        },
        "age_range": [float(ages.min()), float(ages.max())] if len(ages) else None,
        "demographics": {str(name): provenance.describe_images(group) for name, group in used.groupby("split")},
        "best_epoch": progress["epochs_done"],
        "precision": progress["policy"],
        "chosen_by": "validation macro AUROC" if result["macro_auroc"] is not None else "validation loss",
        "validation": result,
        "evaluation": provenance.evaluate_validation(val, probabilities, findings, rules, **fitting),
        "score_quantiles": {name: drift.score_quantiles(probabilities[:, j]) for j, name in enumerate(findings)},
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        **more,
    }
    return BundleContent(
        architecture=plan.architecture,
        input_spec=data.input_spec,
        **vars(rules),
        provenance=origin,
        config_toml=tomli_w.dumps({"train": settings.model_dump(mode="json", exclude_none=True)}),
        curves=curves,
        split=split,
    )


def _trace_lineage(used: pd.DataFrame, weights: str) -> tuple[pa.Table, dict[str, str]]:
    """Return all known images that trained the model or its starting weights, and two entries of the provenance.

    `initial_weights` describes the starting weights; `lineage` is `known` if no other images can have trained them.
    """
    frame = used[["image_id", "patient_id", "split"]]
    known = {"none": "random", "imagenet": "ImageNet (keras.applications)"}  # ImageNet holds no radiographs of patients
    described = known.get(weights, f"the file {Path(weights).name}")
    lineage = "known" if weights in known else "unknown"
    if Path(weights).is_dir():
        start = load_bundle(weights)
        earlier = identity.read_split(start.path).to_pandas()
        frame = pd.concat([frame, earlier[~earlier["image_id"].isin(frame["image_id"])]], ignore_index=True)
        described, lineage = f"the bundle {start.digest}", start.info["provenance"].get("lineage", "unknown")
    split = pa.Table.from_pandas(frame, schema=SPLIT_SCHEMA, preserve_index=False)
    return split, {"initial_weights": described, "lineage": lineage}
