"""`recalibrate`: fit calibration and operating points of a bundle again, on a site's own scores and labels.

Labelled images are selected in this order; excluded images are counted:

1. Images of split `test` are excluded, and all images of the same patients, so that they stay unseen until the report.
   Images of split `train` are excluded too.
2. The others have the split `val` or none. Images without a score or without a label are excluded.
3. If a selected image or its patient is in the bundle's training images, the command fails: the model's scores on
   training images are too good to fit on. Validation images of the bundle are used, with a note.

split.parquet of the new bundle lists the selected images as `val`, so that `report` refuses to test on them. They are
also the baseline of drift: expected flag rates, score deciles and quality flags all come from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ray_cxr.config import DEFAULT_RULE, RecalibrateSettings
from ray_cxr.data import identity, manifest, review_facts
from ray_cxr.errors import ConfigError, InputError, LeakError, OutputError, TableError
from ray_cxr.evaluation import calibration, drift, metrics, quality
from ray_cxr.evaluation.calibration import FittedRules
from ray_cxr.imaging.demographics import PatientCount
from ray_cxr.labels import NO_FINDING, SPREAD_PREFIX
from ray_cxr.models.bundle import SPLIT_SCHEMA, Bundle, load_bundle
from ray_cxr.models.bundle_writer import derive_bundle, find_finished
from ray_cxr.storage import remote, run_folder
from ray_cxr.versions import versions

logger = logging.getLogger(__name__)

#: Inputs that must be the same when an existing `out` is reused, and their names in messages.
_INPUTS = {
    "from": "bundle",
    "scores_digest": "scores",
    "labels_digest": "labels",
    "method": "calibration",
    "rule": "operating_point",
    "min_positives": "min_positives",
}
_EXCLUDED = {
    "test": "of split test",
    "test_patients": "of patients of split test",
    "train": "of split train",
    "not_scored": "not in the scores",
    "errors": "that could not be scored",
    "unlabelled": "without a label for any finding of the bundle",
    "not_labelled": "scored images without a row in the labels",
}


@dataclass(frozen=True)
class _SiteScores:
    """The rows of a score folder, one per image."""

    ids: list[str]
    patients: list[str | None]
    ok: np.ndarray  # bool [n], False on error rows
    p: np.ndarray  # float32 [n,F], raw probabilities, 0 on error rows
    quality: np.ndarray  # objects [n], the most severe quality flag or None

    def digest(self) -> str:
        """Return the SHA-256 of the fields that the rules depend on, hex."""
        sink = hashlib.sha256(json.dumps([self.ids, self.patients]).encode())
        sink.update(self.ok.tobytes())
        sink.update(self.p.tobytes())
        return sink.hexdigest()


def recalibrate(
    bundle: str | Path,
    scores: str | Path,
    labels: str | Path,
    out: str | Path,
    settings: RecalibrateSettings | None = None,
    *,
    on_event: Callable[[str], None] = logger.info,
) -> Bundle:
    """Fit calibration and operating points of a bundle again and write them to a new bundle.

    Args:
        bundle: the bundle that wrote the scores.
        scores: a finished folder of `ray-cxr score`.
        labels: a manifest with the site's labels, joined by image_id.
        out: the new bundle. A bundle that was made from the same inputs and settings is returned unchanged.

    Returns:
        The new bundle. Its `provenance["recalibrated"]` records the digests of the inputs, the numbers of images, and
            the flag rate and Brier score of each finding before and after. `before` holds the rules of the old bundle.

    Raises:
        LeakError: the labelled images include training images of the bundle, or are all of split test or train.
    """
    out, scores, settings = remote.to_path(out), remote.to_path(scores), settings or RecalibrateSettings()
    old = load_bundle(bundle)
    for source in (remote.to_path(bundle), scores):
        # More files would make the bundle or the score folder invalid.
        if remote.is_inside(out.resolve().parent, source):
            raise OutputError(f"{out}: lies inside {source}; choose another --out")
    table = _read_scores(scores, old)
    labelled = manifest.read_manifest(labels)
    method = settings.calibration or _common_value(old, "calibration", "method") or "platt"
    rule = settings.operating_point or _common_value(old, "operating_points", "rule") or DEFAULT_RULE
    record: dict[str, Any] = {
        "from": old.digest,
        "scores_digest": table.digest(),
        "labels_digest": manifest.digest(labelled),
        "method": method,
        "rule": rule,
        "min_positives": settings.min_positives,
    }
    finished = find_finished(out, "recalibrated", record, _INPUTS)
    if finished is not None:
        on_event(f"recalibrate: {out} is finished already")
        return finished
    with run_folder.lock_bundle(out, "recalibrate"):
        used, excluded = _select_images(table, labelled, old, str(scores), str(labels), on_event)
        facts = review_facts.read_facts(labelled.schema.metadata)
        for line in facts.describe() if facts else ():
            on_event(f"recalibrate: {line}")
        y = used[list(old.findings)].to_numpy(dtype=np.float64, na_value=np.nan)
        p = table.p[used["row"].to_numpy()]
        rules = calibration.fit_rules(
            y, p, old.findings, method=method, rule=rule, min_positives=settings.min_positives
        )
        if not any(rules.calibration.values()) and not any(rules.operating_points.values()):
            counts = Counter(rules.rule_notes.values()).most_common()
            reasons = "; ".join(f"{n} findings: {reason}" for reason, n in counts)
            raise InputError(f"{labels}: nothing can be fitted on these {len(used):,} images ({reasons}); label more")
        provenance = old.info["provenance"]
        before = {name: old.info[name] for name in ("calibration", "operating_points", "expected_flag_rates")}
        if "recalibrated" in provenance:
            before["recalibrated"] = provenance["recalibrated"]
        record |= {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "images": len(used),
            **PatientCount.of(used["patient_id"]).to_json(),
            "left_out": excluded,
            "labels_split": manifest.split_info(labelled),
            **({"labels_of_readers": dataclasses.asdict(facts)} if facts else {}),
            "findings": {name: _measure(y[:, j], p[:, j], name, old, rules) for j, name in enumerate(old.findings)},
            "score_quantiles": {name: drift.score_quantiles(p[:, j]) for j, name in enumerate(old.findings)},
            "quality_rates": _measure_quality(table.quality[used["row"].to_numpy()], old),
            "before": before,
            "versions": versions(),
        }
        try:
            return derive_bundle(
                old,
                out,
                **vars(rules),
                provenance={**provenance, "recalibrated": record},
                split=_extend_split(old, used),
            )
        except OSError as error:
            raise OutputError(f"{out}: cannot be written: {error.strerror or error}; choose another --out") from None


def _common_value(bundle: Bundle, table: str, key: str) -> str | None:
    """Return the text under `key` of every finding's entry in a table of the bundle; None if the findings differ.

    `No_Finding` counts only if no other entry has one: its rule can be another than the bundle's.
    """
    entries = bundle.info[table]
    texts = {name: entry[key] for name, entry in entries.items() if entry and isinstance(entry.get(key), str)}
    common = {text for name, text in texts.items() if name != NO_FINDING} or set(texts.values())
    return common.pop() if len(common) == 1 else None


def _read_scores(path: Path, bundle: Bundle) -> _SiteScores:
    """Read the rows of a finished run of `score` with this bundle."""
    run_folder.check_complete(path, "score")
    files = sorted((path / "scores").glob("part-*.parquet"))
    if not files:
        raise InputError(f"{path}: has no scores/part-*.parquet; run score again with --fresh")
    contents = zip(files, remote.read_files(files), strict=True)
    table = pa.concat_tables([_read_part(file, content, bundle, path) for file, content in contents])
    ids, status = table["image_id"].to_pylist(), table["status"].to_pylist()
    if not ids:
        raise TableError(f"{path}: has no rows; pass the folder that `ray-cxr score` wrote")
    ok = np.array([value == "ok" for value in status])
    p = np.column_stack([table[f"p_{name}"].to_numpy() for name in bundle.findings]).astype(np.float32)
    impossible = ok & ~((p >= 0) & (p <= 1)).all(axis=1)  # NaN too
    for bad, problem in (
        (ids.count(None), "have no image_id"),
        (len(ids) - len(set(ids)), "repeat an image_id"),
        (sum(value not in ("ok", "error") for value in status), "have a status that is neither ok nor error"),
        (int(impossible.sum()), "have a probability that is not in 0..1"),
    ):
        if bad:
            raise TableError(f"{path}: {bad:,} rows {problem}; score again")
    p[~ok] = 0.0
    flags = np.array(table["quality_flag"].to_pylist(), dtype=object)
    return _SiteScores(ids, table["patient_id"].to_pylist(), ok, p, flags)


def _read_part(file: Path, content: pa.NativeFile, bundle: Bundle, folder: Path) -> pa.Table:
    """Read a file of scores after checking its columns and that this bundle scored its rows."""
    texts = ["image_id", "patient_id", "status", "model_digest", "quality_flag"]
    try:
        # As a single file, so that pyarrow does not turn a folder name into a column.
        with pq.ParquetFile(content) as part:
            names = part.schema_arrow.names
            p = [name for name in names if name.startswith("p_") and not name.startswith(SPREAD_PREFIX)]
            table = part.read(columns=[*texts, *p])
    except (OSError, pa.ArrowInvalid):
        raise TableError(f"{file}: not a readable Parquet file; score again") from None
    missing = [name for name in texts if name not in names]
    if missing:
        raise TableError(f"{file}: has no column {', '.join(missing)}; pass the folder that `ray-cxr score` wrote")
    # The model first, since another model is the cause of other differences.
    rows = zip(table["model_digest"].to_pylist(), table["status"].to_pylist(), strict=True)
    others = sum(digest != bundle.digest and (digest is not None or status == "ok") for digest, status in rows)
    if others:
        raise ConfigError(
            f"{folder}: {others:,} of {len(table):,} rows of {file.name} were not scored with {bundle.location} "
            f"(digest {bundle.digest[:12]}); run: ray-cxr score {bundle.location}"
        )
    wanted = [f"p_{name}" for name in bundle.findings]
    differing = sorted({*p} ^ {*wanted})
    if differing:
        verb = "has" if differing[0] in p else "lacks"
        raise TableError(f"{file}: {verb} the column {differing[0]}, unlike {bundle.location}; score again")
    identity.check_table(table, str(file))
    schema = pa.schema([*((name, pa.string()) for name in texts), *((name, pa.float32()) for name in wanted)])
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError):
        raise TableError(f"{file}: has columns of another type than a score table; score again") from None


def _select_images(
    table: _SiteScores, labelled: pa.Table, bundle: Bundle, scores: str, labels: str, on_event: Callable[[str], None]
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Select the images to fit on, see the module's docstring, and count the excluded images by reason.

    The frame has the columns image_id, patient_id, split, `row` (the row of the scores), and the labels 0, 1 or null of
    each finding.
    """
    frame = labelled.select(["image_id", "patient_id", "split", *bundle.findings]).to_pandas()
    frame["row"] = identity.find_ids(frame["image_id"].tolist(), table.ids)
    n_common = int((frame["row"] >= 0).sum())
    if not n_common:
        example = f", e.g. {table.ids[0]!r} and {frame['image_id'].iloc[0]!r}" if len(frame) else ""
        raise InputError(f"{scores} and {labels} have no image in common; compare their image_id{example}")
    # Where the labels have no patient id, the score table may have one.
    patients = np.array([*table.patients, None], dtype=object)[frame["row"].to_numpy()]
    patients = frame["patient_id"].astype(object).where(frame["patient_id"].notna(), patients)
    frame["patient_id"] = identity.unify_patients(frame["image_id"], patients)
    excluded: dict[str, int] = {}

    def exclude(reason: str, rows: pd.Series) -> None:
        nonlocal frame
        excluded[reason] = int(rows.sum())
        frame = frame[~rows]

    tested = set(frame.loc[frame["split"] == "test", "patient_id"].dropna())
    exclude("test", frame["split"] == "test")
    exclude("test_patients", frame["patient_id"].isin(tested))
    exclude("train", frame["split"] == "train")
    if not (frame["row"] >= 0).any():
        raise LeakError(
            f"{labels}: its {n_common:,} scored images are all of split test or train, or of patients of split test. "
            "Test images must stay unseen until the report: the images to fit on need the split val, or no split"
        )
    exclude("not_scored", frame["row"] < 0)
    exclude("errors", ~pd.Series(table.ok[frame["row"].to_numpy()], index=frame.index))
    if frame.empty:
        raise InputError(f"{scores}: all {excluded['errors']:,} images to fit on are error rows; see their error_code")
    exclude("unlabelled", frame[list(bundle.findings)].isna().all(axis=1))
    if frame.empty:
        raise TableError(f"{labels}: has no label for any finding of {bundle.location}: {', '.join(bundle.findings)}")
    notes = _check_lineage(frame, bundle, labels)
    counts = {"split val": (frame["split"] == "val").sum(), "no split": frame["split"].isna().sum()}
    parts = [f"{n:,} of {name}" for name, n in counts.items() if n]
    on_event(f"recalibrate: uses {len(frame):,} images: {', '.join(parts)}")
    excluded["not_labelled"] = len(table.ids) - n_common
    parts = [f"{excluded[reason]:,} {text}" for reason, text in _EXCLUDED.items() if excluded[reason]]
    if parts:
        on_event(f"recalibrate: excluded: {', '.join(parts)}")
    for note in notes:
        on_event(f"recalibrate: {note}")
    return frame, excluded


def _check_lineage(frame: pd.DataFrame, bundle: Bundle, labels: str) -> list[str]:
    """Refuse training images of the bundle; return notes on its validation images and on what could not be checked."""
    split = identity.read_split(bundle.path, SPLIT_SCHEMA).to_pandas()

    def match(part: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
        same = identity.find_ids(frame["image_id"].tolist(), part["image_id"].tolist()) >= 0
        return pd.Series(same, index=frame.index), frame["patient_id"].isin(set(part["patient_id"].dropna()))

    images, patients = match(split[split["split"] != "val"])
    if (images | patients).any():
        # Two hospitals that number their patients from 1 have the same ids for different patients.
        hint = "" if images.any() else "; if these are other people with the same ids, add a prefix to your ids"
        raise LeakError(
            f"{labels}: of the {len(frame):,} images to fit on, {int(images.sum()):,} images and "
            f"{frame.loc[patients, 'patient_id'].nunique():,} patients trained this bundle, so its scores on them are "
            f"too good to fit on; give all images of these patients the split train, or remove them{hint}"
        )
    notes = []
    images, patients = match(split[split["split"] == "val"])
    if (images | patients).any():
        notes.append(
            f"{int((images | patients).sum()):,} of the images are validation images of this bundle, or of their "
            "patients: they selected its epoch or thresholds, so its scores on them may be slightly too good"
        )
    unknown = int(frame["patient_id"].isna().sum())
    if split.empty or bundle.info["provenance"].get("lineage") == "unknown":
        notes.append(
            "WARNING: not all images that trained this bundle are known, so these images could not be checked against "
            "all of them"
        )
    elif unknown:
        notes.append(
            f"WARNING: {unknown:,} images have no patient id, so their patients could not be checked against training"
        )
    return notes


def _measure(y: np.ndarray, p: np.ndarray, name: str, old: Bundle, rules: FittedRules) -> dict[str, Any]:
    """Measure one finding by the old and the new rules, on the images that are labelled for the finding."""
    known = ~np.isnan(y)
    y, p = y[known], p[known]
    row: dict[str, Any] = {"n": int(y.size), "positives": int(y.sum())}
    for suffix, scaling, point in (
        ("_before", old.info["calibration"][name], old.info["operating_points"][name]),
        ("", rules.calibration[name], rules.operating_points[name]),
    ):
        flags = calibration.apply_threshold(p, point["threshold"]) if point else p[:0]
        row[f"flag_rate{suffix}"] = float(flags.mean()) if flags.size else None
        row[f"brier{suffix}"] = metrics.brier(y, calibration.apply_calibration(scaling, p)) if scaling else None
    return row


def _measure_quality(flags: np.ndarray, old: Bundle) -> dict[str, float]:
    """Return the share of images with each quality flag that the bundle can set."""
    judged = "expected_rates" in (old.info.get("quality") or {})
    return {name: float((flags == name).mean()) for name in quality.FLAGS if judged or name not in quality.JUDGED}


def _extend_split(old: Bundle, used: pd.DataFrame) -> pa.Table:
    """Return the bundle's split with the images that the rules were fitted on added as `val`."""
    split = identity.read_split(old.path, SPLIT_SCHEMA)
    new = used[~used["image_id"].isin(set(split["image_id"].to_pylist()))].assign(split="val")
    return pa.concat_tables([split, pa.Table.from_pandas(new, schema=SPLIT_SCHEMA, preserve_index=False)])
