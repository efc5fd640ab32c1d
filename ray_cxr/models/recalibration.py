"""`recalibrate`: the same network with calibration and operating points fitted on a site's own scores and labels.

Which of the labelled images are used, in this order; each that is not is counted:

1. Those of split `test` are left out, and with them all images of their patients: they must stay unseen until the
   report. Those of split `train` are left out too.
2. What is left has the split `val` or none. Images without a score and without a label are left out.
3. Images and patients that trained the bundle are refused: the network has seen them, so its scores on them are
   better than on new patients. Those that were the bundle's validation are used, and said.

What was used goes into the new bundle's split.parquet as `val`, so that no report takes it for a test.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
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

from ray_cxr.config import RecalibrateSettings
from ray_cxr.data import identity, manifest
from ray_cxr.errors import ConfigError, InputError, LeakError, OutputError, TableError
from ray_cxr.evaluation import calibration, intervals, metrics
from ray_cxr.evaluation.calibration import FittedRules
from ray_cxr.models.bundle import SPLIT_SCHEMA, WEIGHTS, Bundle, load_bundle, write_bundle, written
from ray_cxr.storage import remote
from ray_cxr.versions import versions

logger = logging.getLogger(__name__)

#: What a second run must have in common with the first to be the same, and the words for it.
_INPUTS = {
    "from": "bundle",
    "scores_digest": "scores",
    "labels_digest": "labels",
    "method": "calibration",
    "rule": "operating_point",
    "min_positives": "min_positives",
}
_LEFT_OUT = {
    "test": "of split test",
    "test_patients": "of patients of split test",
    "train": "of split train",
    "not_scored": "not in the scores",
    "errors": "that could not be scored",
    "unlabelled": "without a label for any finding of the bundle",
}


@dataclass(frozen=True)
class _Scores:
    """A score folder in memory, a row per image.

    Attributes:
        ids, patients: str (or None for a patient) [n].
        ok: bool [n]; False on error rows.
        p: float32 [n,F] raw probabilities, 0 on error rows.
    """

    ids: list[str]
    patients: list[str | None]
    ok: np.ndarray
    p: np.ndarray

    def digest(self) -> str:
        """SHA-256 over all of it, hex."""
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
    """Fit calibration and operating points of a bundle again, into a new bundle; the old one stays as it is.

    Args:
        bundle: the bundle that wrote the scores.
        scores: what `ray-cxr score` left, finished.
        labels: a manifest with the site's labels, joined by image_id.
        out: the new bundle. One that was made from the same inputs and settings is returned as it is.
        settings: method, rule and least number of positives; None takes the defaults.
        on_event: takes one line per event for people.

    Returns:
        The new bundle. Its `provenance["recalibrated"]` holds what was done (`from`, digests, counts, per finding
        the flag rate and Brier score before and now) and under `before` the rules of the old one.

    Raises:
        BundleError, TableError: the bundle, the scores or the labels are damaged or none.
        ConfigError: the scores are another model's.
        LeakError: images to fit on trained the bundle, or all that could be used are of split test or train.
        InputError: the scores are unfinished, nothing is in common, or no finding has enough positives.
        OutputError: `out` is something else, or cannot be written.
    """
    out, scores, settings = remote.path(out), remote.path(scores), settings or RecalibrateSettings()
    old = load_bundle(bundle)
    for inside in (remote.path(bundle), scores):
        # A bundle with one more file in it, or scores with one more table, would be damaged.
        if remote.is_inside(out.resolve().parent, inside):
            raise OutputError(f"{out}: lies inside {inside}; name another --out")
    table = _read_scores(scores, old)
    labelled = manifest.read_manifest(labels)
    method = settings.calibration or _only(old, "calibration", "method") or "platt"
    rule = settings.operating_point or _only(old, "operating_points", "rule") or "youden"
    made: dict[str, Any] = {
        "from": old.digest,
        "scores_digest": table.digest(),
        "labels_digest": manifest.digest(labelled),
        "method": method,
        "rule": rule,
        "min_positives": settings.min_positives,
    }
    finished = _finished(out, made)
    if finished is not None:
        on_event(f"recalibrate: {out} is finished already")
        return finished

    used, left_out = _choose(table, labelled, old, str(scores), str(labels), on_event)
    y = used[list(old.findings)].to_numpy(dtype=np.float64, na_value=np.nan)
    p = table.p[used["row"].to_numpy()]
    rules = calibration.fit_rules(y, p, old.findings, method=method, rule=rule, min_positives=settings.min_positives)
    if not any(rules.calibrations.values()) and not any(rules.operating_points.values()):
        reasons = "; ".join(f"{n} findings: {reason}" for reason, n in Counter(rules.reasons.values()).most_common())
        raise InputError(f"{labels}: nothing can be fitted on these {len(used):,} images ({reasons}); label more")
    before = {name: old.info[name] for name in ("calibration", "operating_points", "expected_flag_rates")}
    provenance = old.info["provenance"]
    if "recalibrated" in provenance:
        before["recalibrated"] = provenance["recalibrated"]
    made |= {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": len(used),
        "patients": intervals.patient_codes(used["patient_id"].to_numpy(dtype=object))[1],
        "left_out": left_out,
        "labels_split": manifest.split_info(labelled),
        "findings": {name: _measure(y[:, j], p[:, j], name, old, rules) for j, name in enumerate(old.findings)},
        "before": before,
        "versions": versions(),
    }
    try:
        return write_bundle(
            out,
            save_weights=lambda target: shutil.copyfile(old.path / WEIGHTS, target),
            architecture=old.architecture,
            input_spec=old.input_spec,
            calibration=rules.calibrations,
            operating_points=rules.operating_points,
            expected_flag_rates=rules.expected_flag_rates,
            provenance={**provenance, "recalibrated": made},
            config_toml=(old.path / "config.toml").read_text(encoding="utf-8"),
            curves=json.loads((old.path / "curves.json").read_text(encoding="utf-8")),
            split=_extended(_split(old), used),
            operating_alternatives=rules.alternatives,
            rule_notes=rules.reasons,
            like=old,
        )
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written: {error.strerror or error}; name another") from None


def _only(bundle: Bundle, table: str, key: str) -> str | None:
    """The one text that all findings of the bundle have under `key`; None where there is none or more than one."""
    texts = {entry[key] for entry in bundle.info[table].values() if entry and isinstance(entry.get(key), str)}
    return texts.pop() if len(texts) == 1 else None


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
    found = bundle.info["provenance"].get("recalibrated")
    if not isinstance(found, dict):
        raise OutputError(f"{out}: exists already and is a bundle that recalibrate did not make; name another --out")
    differing = [words for name, words in _INPUTS.items() if found.get(name) != made[name]]
    if differing:
        raise OutputError(f"{out}: was made from another {', another '.join(differing)}; name another --out")
    return bundle


def _read_scores(path: Path, bundle: Bundle) -> _Scores:
    """The rows of a finished run of `score` with this bundle.

    Raises:
        InputError: none there, or not finished.
        TableError: files that are no score table of this bundle's findings, an image twice, a bad value.
        ConfigError: rows that another model scored.
    """
    remedy = "name the folder that `ray-cxr score` wrote"
    if not path.exists():
        raise InputError(f"{path}: no such folder; {remedy}")
    if not path.is_dir():
        raise InputError(f"{path}: is a file; {remedy}")
    if not (path / "_SUCCESS").exists():
        if (path / "settings.json").exists() or (path / "scores").exists():
            raise InputError(f"{path}: score did not finish; run it again to continue")
        raise InputError(f"{path}: holds no scores; {remedy}")
    files = sorted((path / "scores").glob("part-*.parquet"))
    if not files:
        raise InputError(f"{path}: holds no scores/part-*.parquet; {remedy}")
    probabilities = [f"p_{name}" for name in bundle.findings]
    parts = [
        _read_part(name, file, bundle, str(path)) for name, file in zip(files, remote.contents(files), strict=True)
    ]
    whole = pa.concat_tables(parts)
    ids = whole["image_id"].to_pylist()
    if not ids:
        raise TableError(f"{path}: holds no rows; {remedy}")
    if None in ids:
        raise TableError(f"{path}: {ids.count(None):,} rows have no image_id; score again")
    if len(set(ids)) < len(ids):
        raise TableError(f"{path}: {len(ids) - len(set(ids)):,} rows repeat an image_id; score again")
    status = whole["status"].to_pylist()
    if not set(status) <= {"ok", "error"}:
        raise TableError(f"{path}: column status must hold ok or error; score again")
    ok = np.array([value == "ok" for value in status])
    p = np.column_stack([whole[name].to_numpy() for name in probabilities]).astype(np.float32)
    good = (p >= 0) & (p <= 1)  # NaN fails it too
    if not good[ok].all():
        raise TableError(
            f"{path}: {int((~good[ok]).any(axis=1).sum()):,} scored rows have a probability that is not a number in "
            "0..1; score again"
        )
    p[~ok] = 0.0
    return _Scores(ids, whole["patient_id"].to_pylist(), ok, p)


def _read_part(file: Path, content: pa.NativeFile, bundle: Bundle, source: str) -> pa.Table:
    texts = ["image_id", "patient_id", "status", "model_digest"]
    try:
        # Read as one file: the name of a folder must not become a column.
        with pq.ParquetFile(content) as part:
            names = part.schema_arrow.names
            p = [name for name in names if name.startswith("p_")]
            table = part.read(columns=[*texts, *p])
    except (OSError, pa.ArrowInvalid):
        raise TableError(f"{file}: not a readable Parquet file; score again") from None
    lacking = [name for name in texts if name not in names]
    if lacking:
        raise TableError(f"{file}: has no column {', '.join(lacking)}; name the folder that `ray-cxr score` wrote")
    # The model first: what else does not fit follows from it.
    status, digests = table["status"].to_pylist(), table["model_digest"].to_pylist()
    others = sum(
        digest != bundle.digest and (digest is not None or one == "ok")
        for digest, one in zip(digests, status, strict=True)
    )
    if others:
        raise ConfigError(
            f"{source}: {others:,} of {len(table):,} rows of {file.name} were not scored with {bundle.place} "
            f"(digest {bundle.digest[:12]}); score them with it: ray-cxr score --model {bundle.place}"
        )
    wanted = [f"p_{name}" for name in bundle.findings]
    odd = sorted({*p} ^ {*wanted})
    if odd:
        verb = "has" if odd[0] in p else "lacks"
        raise TableError(f"{file}: {verb} the column {odd[0]}, unlike the findings of {bundle.place}; score again")
    identity.check_table(table, str(file))
    schema = pa.schema([*((name, pa.string()) for name in texts), *((name, pa.float32()) for name in wanted)])
    try:
        return table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError):
        raise TableError(f"{file}: has columns that are not of a score table's kind; score again") from None


def _choose(
    table: _Scores, labelled: pa.Table, bundle: Bundle, scores: str, labels: str, on_event: Callable[[str], None]
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The images to fit on, as the module's docstring says, and how many were left out and why.

    Returns:
        A row per image: image_id, patient_id, split, `row` of the scores, and a column per finding with 0, 1 or null.
    """
    frame = labelled.select(["image_id", "patient_id", "split", *bundle.findings]).to_pandas()
    frame["row"] = pd.Index(table.ids).get_indexer(pd.Index(frame["image_id"]))
    n_common = int((frame["row"] >= 0).sum())
    if not n_common:
        raise InputError(
            f"{scores} and {labels} have no image in common; compare their image_id"
            + (f", such as {table.ids[0]!r} and {frame['image_id'].iloc[0]!r}" if len(frame) else "")
        )
    # Where the labels do not know the patient, the score table may.
    patients = np.array([*table.patients, None], dtype=object)[frame["row"].to_numpy()]
    frame["patient_id"] = frame["patient_id"].astype(object).where(frame["patient_id"].notna(), patients)
    left_out: dict[str, int] = {}

    def leave(why: str, chosen: pd.Series) -> None:
        nonlocal frame
        left_out[why] = int(chosen.sum())
        frame = frame[~chosen]

    tested = set(frame.loc[frame["split"] == "test", "patient_id"].dropna())
    leave("test", frame["split"] == "test")
    leave("test_patients", frame["patient_id"].isin(tested))
    leave("train", frame["split"] == "train")
    if not (frame["row"] >= 0).any():
        raise LeakError(
            f"{labels}: its {n_common:,} scored images are all of split test or train, or of patients of split test; "
            "test must stay unseen until the report: give the images to fit on the split val, or none"
        )
    leave("not_scored", frame["row"] < 0)
    leave("errors", ~pd.Series(table.ok[frame["row"].to_numpy()], index=frame.index))
    if frame.empty:
        raise InputError(f"{scores}: all {left_out['errors']:,} images to fit on are error rows; see their error_code")
    leave("unlabelled", frame[list(bundle.findings)].isna().all(axis=1))
    if frame.empty:
        raise TableError(f"{labels}: has no label for any finding of {bundle.place}: {', '.join(bundle.findings)}")
    notes = _guard(frame, bundle, labels)
    splits = frame["split"].value_counts()
    parts = [
        f"{n:,} {words}"
        for n, words in ((splits.get("val", 0), "of split val"), (frame["split"].isna().sum(), "of no split"))
        if n
    ]
    on_event(f"recalibrate: {len(frame):,} images are used: {', '.join(parts)}")
    left_out["not_labelled"] = len(set(table.ids) - set(labelled["image_id"].to_pylist()))
    words = [f"{left_out[why]:,} {text}" for why, text in _LEFT_OUT.items() if left_out[why]]
    if left_out["not_labelled"]:
        words.append(f"{left_out['not_labelled']:,} scored images that the labels do not name")
    if words:
        on_event(f"recalibrate: left out: {', '.join(words)}")
    for note in notes:
        on_event(f"recalibrate: {note}")
    return frame, left_out


def _split(bundle: Bundle) -> pd.DataFrame:
    return identity.read_split(bundle.path, SPLIT_SCHEMA).to_pandas()


def _guard(frame: pd.DataFrame, bundle: Bundle, labels: str) -> list[str]:
    """Refuse images that trained the bundle; in words, which chose it, and what cannot be known.

    Raises:
        LeakError: an image or a patient trained it.
    """
    split = _split(bundle)

    def seen(part: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
        return frame["image_id"].isin(set(part["image_id"])), frame["patient_id"].isin(set(part["patient_id"].dropna()))

    images, patients = seen(split[split["split"] != "val"])
    if (images | patients).any():
        # Two hospitals that number their patients from 1 share ids and no patients.
        others = "" if images.any() else "; if they are other people with the same ids, put a prefix before yours"
        raise LeakError(
            f"{labels}: among the {len(frame):,} images to fit on, {int(images.sum()):,} images and "
            f"{frame.loc[patients, 'patient_id'].nunique():,} patients trained this bundle: its scores on them are too "
            f"good to fit on; give all images of these patients the split train, or take them out{others}"
        )
    notes = []
    images, patients = seen(split[split["split"] == "val"])
    if (images | patients).any():
        notes.append(
            f"{int((images | patients).sum()):,} of the images, or others of their patients, were validation images of "
            "this bundle: they chose its epoch or thresholds, so its scores on them may be slightly too good"
        )
    unknown = int(frame["patient_id"].isna().sum())
    if split.empty or bundle.info["provenance"].get("lineage") == "unknown":
        notes.append(
            "WARNING: not all images that trained this bundle are known: that none of these did cannot be checked"
        )
    elif unknown:
        notes.append(
            f"WARNING: {unknown:,} images have no patient id: that no patient of theirs trained this bundle cannot be "
            "checked"
        )
    return notes


def _measure(y: np.ndarray, p: np.ndarray, name: str, old: Bundle, rules: FittedRules) -> dict[str, Any]:
    """One finding on the images that are labelled for it, by the old rules and by the new."""
    known = ~np.isnan(y)
    y, p = y[known], p[known]
    row: dict[str, Any] = {"n": int(y.size), "positives": int(y.sum())}
    sides = {
        "_before": (old.info["calibration"][name], old.info["operating_points"][name]),
        "": (rules.calibrations[name], rules.operating_points[name]),
    }
    for when, (scaling, point) in sides.items():
        flagged = point and y.size
        row[f"flag_rate{when}"] = float(calibration.flags(p, point["threshold"]).mean()) if flagged else None
        row[f"brier{when}"] = metrics.brier(y, calibration.apply(scaling, p)) if scaling else None
    return row


def _extended(split: pd.DataFrame, used: pd.DataFrame) -> pa.Table:
    """What trained and what chose the bundle, with the images that have now chosen its rules."""
    new = used.loc[~used["image_id"].isin(set(split["image_id"])), ["image_id", "patient_id"]].assign(split="val")
    return pa.Table.from_pandas(
        pd.concat([split.astype(object), new.astype(object)], ignore_index=True),
        schema=SPLIT_SCHEMA,
        preserve_index=False,
    )
