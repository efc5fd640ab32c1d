"""`probe`: a linear head on the features of a model that `score --features` wrote, as a bundle.

Per finding, a logistic regression with an L2 penalty on standardised features; its strength is chosen by log loss on
images of other patients. Images are selected in this order:

1. Images of split `test` are excluded, and all images of the same patients, so that they stay unseen until the report.
2. If there are images of split `train` and of split `val`, the head is fitted on `train`; `val` chooses the strength,
   calibration and operating points. Otherwise all images are used, in folds without a common patient: each image is
   judged by heads that were fitted without its patient, and the final head is fitted on all.
3. Images that judge must not have trained the bundle whose features they are.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from scipy.special import expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from ray_cxr import labels as names
from ray_cxr.config import ProbeSettings
from ray_cxr.data import features as features_files
from ray_cxr.data import identity, manifest
from ray_cxr.data.features import Features
from ray_cxr.errors import ConfigError, InputError, LeakError, OutputError, TableError
from ray_cxr.evaluation import drift, metrics
from ray_cxr.evaluation.calibration import fit_rules
from ray_cxr.evaluation.intervals import patient_codes
from ray_cxr.imaging.demographics import PatientCount
from ray_cxr.models import exports
from ray_cxr.models.bundle import QUALITY, SPLIT_SCHEMA, Bundle, load_bundle
from ray_cxr.models.bundle_writer import BundleContent, find_finished, write_bundle
from ray_cxr.progress import Progress, silence_stderr
from ray_cxr.storage import remote, run_folder
from ray_cxr.training import provenance
from ray_cxr.versions import versions

#: Inputs that must be the same when an existing `out` is reused, and their names in messages.
_INPUTS = {"from": "bundle", "scores": "score folder", "labels_digest": "labels", "settings": "settings"}
#: Iterations of the solver. A fit that needs more is used as it is: its loss on other patients decides.
_ITERATIONS = 200


@dataclass(frozen=True)
class _Images:
    """The images of a probe, [N], with features; `judged` and `fitted` are row numbers, None for folds."""

    table: pd.DataFrame  # `provenance.COLUMNS`, image_id and split
    vectors: np.ndarray  # float16 [N,C]
    fitted: np.ndarray | None
    judged: np.ndarray | None

    def folds(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return pairs of rows to fit and to judge, without a common patient."""
        if self.fitted is not None and self.judged is not None:
            return [(self.fitted, self.judged)]
        groups, n_groups = patient_codes(self.table["patient_id"].to_numpy(dtype=object))
        if n_groups < 2:
            raise InputError("all images are of one patient, so none can judge the head; label more patients")
        return list(GroupKFold(min(count, n_groups)).split(self.vectors, groups=groups))


@dataclass(frozen=True)
class _Head:
    """The fitted head: logits = features @ kernel + bias."""

    kernel: np.ndarray  # float64 [C,F]
    bias: np.ndarray  # float64 [F]


def fit_probe(
    scores: str | Path,
    labels: str | Path,
    out: str | Path,
    settings: ProbeSettings | None = None,
    *,
    bundle: str | Path | None = None,
    on_event: Callable[[str], None] = print,
) -> Bundle:
    """Fit a linear head on features, and write a bundle of the model with this head.

    Args:
        scores: a finished folder of `score --features`.
        labels: a manifest, joined by image_id.
        out: the new bundle. A bundle that was made from the same inputs and settings is returned unchanged.
        bundle: the bundle that wrote the scores; None: at the place that run.json names.

    Raises:
        LeakError: images that judge the head trained the bundle.
        InputError: no features, no labels, or no finding with enough positives and negatives.
    """
    settings, out, folder = settings or ProbeSettings(), remote.to_path(out), remote.to_path(scores)
    found = features_files.load_features(folder)
    base = _load_base(folder, found, bundle)
    for source in (base.path, folder):
        if remote.is_inside(out.resolve().parent, source):
            raise OutputError(f"{out}: lies inside {source}; choose another --out")
    labelled = manifest.read_manifest(labels)
    record = {
        "from": base.digest,
        "scores": run_folder.digest_settings(folder),
        "labels_digest": manifest.digest(labelled),
        "settings": settings.model_dump(mode="json"),
    }
    finished = find_finished(out, "probed", record, _INPUTS)
    if finished is not None:
        on_event(f"{out} is finished already")
        return finished
    images = _select_images(found, labelled, folder, base, str(labels), on_event)
    with run_folder.lock_bundle(out, "probe"):
        findings = _choose_findings(images, settings, on_event)
        y = images.table[list(findings)].to_numpy(dtype=np.float64, na_value=np.nan)
        head, strengths, p = _fit(images, y, findings, settings)
        content = _build_content(images, y, p, findings, base, settings, record | {"strengths": strengths}, labelled)
        return write_bundle(out, content, _attach_head(base, content, head), add=_copy_quality(base))


def _load_base(folder: Path, found: Features, bundle: str | Path | None) -> Bundle:
    """Return the bundle that computed the features."""
    place = bundle or run_folder.read_json(folder / "run.json").get("model", "")
    try:
        base = load_bundle(place)
    except InputError as error:
        if bundle is not None:
            raise
        raise ConfigError(
            f"{folder}: was scored with {place}, which cannot be opened ({error}); add --bundle"
        ) from None
    if base.digest != found.model_digest:
        raise ConfigError(
            f"{place}: has the digest {base.digest[:12]}, but {folder} was scored with {found.model_digest[:12]}; "
            "name that bundle with --bundle"
        )
    return base


def _select_images(
    found: Features, labelled: pa.Table, folder: Path, base: Bundle, where: str, on_event: Callable[[str], None]
) -> _Images:
    """Select the images, see the module's docstring, and tell what could not be checked."""
    columns = ["image_id", "split", *provenance.COLUMNS]
    frame = labelled.select(columns).to_pandas()
    row = identity.find_ids(frame["image_id"].tolist(), found.image_ids)
    if not (row >= 0).any():
        raise InputError(f"{where} and {folder} have no image in common; compare their image_id")
    patients = _read_patients(folder)
    known = [patients.get(found.image_ids[i]) if i >= 0 else None for i in row]
    written = frame["patient_id"].astype(object).where(frame["patient_id"].notna(), known)
    frame["patient_id"] = identity.unify_patients(frame["image_id"], written)
    tested = set(frame.loc[frame["split"] == "test", "patient_id"].dropna())
    used = (row >= 0) & (frame["split"] != "test").to_numpy() & ~frame["patient_id"].isin(tested).to_numpy()
    if not used.any():
        raise LeakError(f"{where}: all scored images are of split test, or of its patients; a probe needs others")
    frame, row = frame[used].reset_index(drop=True), row[used]
    parts = [np.flatnonzero(frame["split"] == name) for name in ("train", "val")]
    fitted, judged = parts if all(map(len, parts)) else (None, None)
    on_event(
        f"uses {len(frame):,} images; {int((~used).sum()):,} rows are of split test or its patients, or not scored"
    )
    for note in _check_lineage(frame if judged is None else frame.iloc[judged], base, where):
        on_event(note)
    if fitted is not None and judged is not None:
        shared = set(frame["patient_id"].iloc[fitted].dropna()) & set(frame["patient_id"].iloc[judged].dropna())
        if shared:
            raise LeakError(f"{where}: {len(shared):,} patients are in the splits train and val; make the split again")
    return _Images(frame, found.vectors[row], fitted, judged)


def _read_patients(folder: Path) -> dict[str, str | None]:
    """Return the patient of each scored image."""
    patients: dict[str, str | None] = {}
    for part in sorted((folder / "scores").glob("part-*.parquet")):
        table = pq.read_table(remote.read_file(part), columns=["image_id", "patient_id"])
        patients.update(zip(*(table[name].to_pylist() for name in ("image_id", "patient_id")), strict=True))
    return patients


def _check_lineage(judging: pd.DataFrame, base: Bundle, where: str) -> list[str]:
    """Refuse images that judge the head and trained the bundle: its features of them are too good.

    Returns notes on what could not be checked, and on validation images of the bundle.
    """
    split = identity.read_split(base.path, SPLIT_SCHEMA).to_pandas()
    trained = split[split["split"] != "val"]
    same = identity.find_ids(judging["image_id"].tolist(), trained["image_id"].tolist()) >= 0
    same |= judging["patient_id"].isin(set(trained["patient_id"].dropna())).to_numpy()
    if same.any():
        raise LeakError(
            f"{where}: {int(same.sum()):,} of {len(judging):,} images that would judge the head, or images of their "
            "patients, trained this bundle; give them the split train, or leave them out"
        )
    notes = []
    if base.info["provenance"].get("lineage") == "unknown" or split.empty:
        notes.append("WARNING: not all images that trained the model are known, so a leak cannot be excluded")
    if unknown := int(judging["patient_id"].isna().sum()):
        notes.append(f"WARNING: {unknown:,} images that judge the head have no patient id; each counts as a patient")
    seen = set(split.loc[split["split"] == "val", "image_id"])
    if validated := int(judging["image_id"].isin(seen).sum()):
        notes.append(
            f"{validated:,} images that judge the head are validation images of the model, which selected its epoch: "
            "the result may be slightly too good"
        )
    return notes


def _choose_findings(images: _Images, settings: ProbeSettings, on_event: Callable[[str], None]) -> tuple[str, ...]:
    """Return the labelled findings with enough positives and negatives, wherever a head is fitted or judged."""
    wanted = names.LABELS if settings.findings is None else names.parse_order(settings.findings)
    chosen: list[str] = []
    lacking: list[str] = []
    folds = images.folds(settings.folds)
    is_apart = images.judged is not None
    for name in wanted:
        column = images.table[name].to_numpy(dtype=float, na_value=np.nan)
        parts = folds[0] if is_apart else [np.arange(len(column))]
        counts = [int((column[part] == value).sum()) for part in parts for value in (0, 1)]
        # The positives of one patient are in one fold, so another fold can lack them.
        is_fitted = all((column[fitted] == value).any() for fitted, _ in folds for value in (0, 1))
        (chosen if is_fitted and min(counts) >= settings.min_positives else lacking).append(name)
    if lacking:
        on_event(
            f"left out, with fewer than {settings.min_positives} positives or negatives, or all of one patient: "
            f"{', '.join(lacking)}"
        )
    if not chosen:
        raise TableError(
            f"no finding has {settings.min_positives} positives and negatives to fit and to judge; label more images"
        )
    return tuple(chosen)


def _fit(
    images: _Images, y: np.ndarray, findings: Sequence[str], settings: ProbeSettings
) -> tuple[_Head, dict[str, float], np.ndarray]:
    """Fit the head.

    Returns:
        The head; the strength of the penalty per finding, as scikit-learn's C; and probabilities, float64 [N,F], of
        the images that judge, by heads that were fitted without their patients; NaN of the others.
    """
    rows = np.arange(len(y)) if images.fitted is None else images.fitted
    scale = _Scale.of(images.vectors[rows])
    folds = images.folds(settings.folds)
    sampled = _sample_patients(images, settings)
    kernel, bias = np.zeros((images.vectors.shape[1], len(findings))), np.zeros(len(findings))
    p = np.full(y.shape, np.nan)
    strengths = {}
    x = scale.apply(images.vectors)
    with Progress("probe", len(findings), unit="findings") as progress:
        for j, name in enumerate(findings):
            strengths[name] = chosen = _choose_strength(x, y[:, j], folds, sampled, settings.strengths)
            for fitted, judged in folds:
                model = _fit_one(x, y[:, j], fitted, chosen)
                p[judged, j] = expit(model.decision_function(x[judged]))
            if images.fitted is None:
                model = _fit_one(x, y[:, j], rows, chosen)
            kernel[:, j], bias[j] = scale.undo(model.coef_[0], float(model.intercept_[0]))
            progress.advance(1)
    return _Head(kernel, bias), strengths, p


@dataclass(frozen=True)
class _Scale:
    """Mean and standard deviation of each feature, float64 [C]."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> _Scale:
        mean, square, step = np.zeros(values.shape[1]), np.zeros(values.shape[1]), 8192
        for start in range(0, len(values), step):
            block = values[start : start + step].astype(np.float64)
            mean += block.sum(axis=0) / len(values)
            square += np.square(block).sum(axis=0) / len(values)
        deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
        # A constant feature tells nothing; its coefficient stays 0.
        return cls(mean, np.where(deviation > 1e-6, deviation, np.inf))

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Standardise, in float32 to halve the memory."""
        result = np.empty(values.shape, np.float32)
        for start in range(0, len(values), 8192):
            block = slice(start, start + 8192)
            result[block] = (values[block].astype(np.float32) - self.mean) / self.deviation
        return result

    def undo(self, coefficients: np.ndarray, intercept: float) -> tuple[np.ndarray, float]:
        """Return kernel and bias for features that are not standardised."""
        kernel = coefficients / self.deviation
        return kernel, intercept - float(self.mean @ kernel)


def _sample_patients(images: _Images, settings: ProbeSettings) -> np.ndarray:
    """Return whether an image is in the sample of patients that chooses the strength, bool [N]."""
    codes, _ = patient_codes(images.table["patient_id"].to_numpy(dtype=object))
    if len(codes) <= settings.selection_images:
        return np.ones(len(codes), bool)
    sizes = np.bincount(codes)
    order = np.random.default_rng(settings.seed).permutation(len(sizes))
    kept = order[np.cumsum(sizes[order]) <= settings.selection_images]
    return np.isin(codes, kept)


def _choose_strength(
    x: np.ndarray,
    y: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    sampled: np.ndarray,
    strengths: Sequence[float],
) -> float:
    """Return the strength with the smallest log loss on the images of the other patients."""
    if len(strengths) == 1:
        return strengths[0]
    losses = np.zeros(len(strengths))
    for fitted, judged in folds:
        judged = judged[sampled[judged] & ~np.isnan(y[judged])]
        fitted = fitted[sampled[fitted]]
        if not len(judged) or len(np.unique(y[fitted][~np.isnan(y[fitted])])) < 2:
            continue
        for k, strength in enumerate(strengths):
            z = _fit_one(x, y, fitted, strength).decision_function(x[judged])
            losses[k] += np.logaddexp(0.0, np.where(y[judged] == 1, -z, z)).sum()
    return strengths[int(np.argmin(losses))]


def _fit_one(x: np.ndarray, y: np.ndarray, rows: np.ndarray, strength: float) -> LogisticRegression:
    """Fit one finding on the rows that are labelled."""
    rows = rows[~np.isnan(y[rows])]
    if len(np.unique(y[rows])) < 2:
        raise TableError("a fold holds only positives or only negatives of a finding; raise min_positives")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=_ITERATIONS).fit(x[rows], y[rows].astype(np.int8))


def _attach_head(base: Bundle, content: BundleContent, head: _Head) -> Any:
    """Return the model, or for a bundle without layers the graph, with the new head."""
    if base.is_graph:
        return exports.Graph(_replace_outputs(base, head), "probe")
    with silence_stderr():  # TensorFlow's C++ code prints on import and when it looks for GPUs
        from ray_cxr.models import classifier
        from ray_cxr.models.keras_setup import tf

        tf.config.list_physical_devices()
    old, model = base.model(), classifier.build(content.architecture)
    for layer in model.layers:
        if layer.weights and layer.name != "logits":
            layer.set_weights(old.get_layer(layer.name).get_weights())
    model.get_layer("logits").set_weights([head.kernel.astype(np.float32), head.bias.astype(np.float32)])
    return model


def _replace_outputs(base: Bundle, head: _Head) -> Any:
    from ray_cxr.models import graphs, runtime

    ov = runtime.import_openvino()
    ops, graph = ov.opset13, ov.Core().read_model(base.path / runtime.graph_file("fp32"))
    inner = graph.output(runtime.OUTPUTS[1]).get_node().input_value(0)
    logits = ops.add(
        ops.matmul(inner, head.kernel.astype(np.float32), False, False), head.bias.astype(np.float32)[None]
    )
    return graphs.build_graph(graph.get_parameters()[0], ops.sigmoid(logits), inner)


def _copy_quality(base: Bundle) -> Callable[[Path, dict[str, Any]], None] | None:
    """Return a function that copies the bundle's quality flags, which depend on features and not on the head."""
    if base.quality is None:
        return None

    def add(folder: Path, info: dict[str, Any]) -> None:
        shutil.copyfile(base.path / QUALITY, folder / QUALITY)
        info["quality"] = base.info["quality"]

    return add


def _build_content(
    images: _Images,
    y: np.ndarray,
    p: np.ndarray,
    findings: Sequence[str],
    base: Bundle,
    settings: ProbeSettings,
    record: dict[str, Any],
    labelled: pa.Table,
) -> BundleContent:
    """Fit calibration and operating points, and collect the contents of the bundle."""
    judged = np.flatnonzero(~np.isnan(p).all(axis=1))
    table, truth, raw = images.table.iloc[judged].reset_index(drop=True), y[judged], p[judged].astype(np.float32)
    fitting: dict[str, Any] = {"method": settings.calibration, "min_positives": settings.min_positives}
    rules = fit_rules(truth, raw, findings, rule=settings.operating_point, **fitting)
    is_apart = images.fitted is not None
    fitted = images.table if images.fitted is None else images.table.iloc[images.fitted]
    ages = fitted["age"].dropna()
    parts = {"train": fitted, "val": table} if is_apart else {"train": fitted}
    source = base.info["provenance"]
    made = {
        "origin": f"a linear head by ray-cxr probe on the features of {len(fitted):,} images",
        "initial_weights": f"the bundle {base.digest}",
        "lineage": source.get("lineage", "unknown"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "split": manifest.split_info(labelled),
        "images": {
            name: {"images": len(group), **PatientCount.of(group["patient_id"]).to_json()}
            for name, group in parts.items()
        },
        "age_range": [float(ages.min()), float(ages.max())] if len(ages) else None,
        "demographics": {name: provenance.describe_images(group) for name, group in parts.items()},
        "validation": _measure(truth, raw, findings),
        "evaluation": provenance.evaluate_validation(table, raw, findings, rules, **fitting),
        "score_quantiles": {name: drift.score_quantiles(raw[:, j]) for j, name in enumerate(findings)},
        "probed": {**record, "images_judged_in_folds": not is_apart},
        "settings": {"findings": list(findings), "size": base.input_spec.size, **settings.model_dump(mode="json")},
        "versions": versions(),
    }
    return BundleContent(
        architecture=base.architecture.replace(findings=tuple(findings)),
        input_spec=base.input_spec,
        **vars(rules),
        provenance=made,
        config_toml=tomli_w.dumps({"probe": settings.model_dump(mode="json", exclude_none=True)}),
        curves=[],
        split=_extend_split(base, fitted, table if is_apart else None),
    )


def _measure(y: np.ndarray, p: np.ndarray, findings: Sequence[str]) -> dict[str, Any]:
    """Return the numbers of the images that judge, as `train` records them."""
    cells = {}
    for j, name in enumerate(findings):
        known = ~np.isnan(y[:, j])
        truth = y[known, j]
        cells[name] = {
            "n": int(known.sum()),
            "positives": int(truth.sum()),
            "auroc": metrics.auroc(truth, p[known, j]),
        }
    values = [cell["auroc"] for name, cell in cells.items() if name != names.NO_FINDING and cell["auroc"] is not None]
    return {"findings": cells, "macro_auroc": float(np.mean(values)) if values else None}


def _extend_split(base: Bundle, fitted: pd.DataFrame, judged: pd.DataFrame | None) -> pa.Table:
    """Return the images that trained the bundle or this head; one that trained either is a training image."""
    frames = [fitted[["image_id", "patient_id"]].assign(split="train")]
    if judged is not None:
        frames.append(judged[["image_id", "patient_id"]].assign(split="val"))
    new = pd.concat(frames, ignore_index=True)
    earlier = identity.read_split(base.path, SPLIT_SCHEMA).to_pandas()
    both = pd.concat([new, earlier], ignore_index=True)
    both = both.assign(order=both["split"] == "val").sort_values("order", kind="stable")
    both = both.drop_duplicates("image_id").drop(columns="order")
    return pa.Table.from_pandas(both, schema=SPLIT_SCHEMA, preserve_index=False)
