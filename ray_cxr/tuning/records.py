"""Read a study's trials: from Optuna, and from the trials' folders."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import pandas as pd
import pyarrow as pa
from optuna.trial import FrozenTrial, TrialState

from ray_cxr.config import TrainSettings
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.labels import LABELS
from ray_cxr.storage import atomic
from ray_cxr.training.checkpoints import find_best_checkpoint
from ray_cxr.training.worker import METRICS, VALIDATION
from ray_cxr.tuning.plan import StudyPlan, list_prepared_sizes

#: The name of each objective in a trial's reports.
REPORT_NAMES = {"auroc": "best_val_auroc", "images_per_second": "images_per_second", "calibration_error": "calibration"}
#: Prefix of the columns of searched settings.
PARAM = "param_"
_STATE_NAMES = {TrialState.PRUNED: "stopped", TrialState.FAIL: "failed", TrialState.RUNNING: "running"}

_EPOCH = pa.struct(
    [
        ("epoch", pa.int32()),
        *((name, pa.float64()) for name in ("loss", "val_loss", "val_auroc", "val_calibration_error")),
        *((name, pa.float64()) for name in ("learning_rate", "seconds", "val_seconds", "images_per_second")),
    ]
)
#: The columns, apart from those of searched settings, which follow `backbone`.
_KINDS: dict[str, pa.DataType] = {
    "number": pa.int32(),
    "state": pa.string(),
    "reason": pa.string(),
    "backbone": pa.string(),
    "epochs": pa.int32(),
    "best_epoch": pa.int32(),
    "val_auroc": pa.float64(),
    "calibration_error": pa.float64(),
    "images_per_second": pa.float64(),
    "seconds": pa.float64(),
    "started": pa.timestamp("us", tz="UTC"),
    "ended": pa.timestamp("us", tz="UTC"),
    "restarts": pa.int32(),
    "curve": pa.list_(_EPOCH),
}


def get_state(trial: FrozenTrial) -> str:
    """Return `finished`, `stopped`, `failed`, `running` or `waiting`."""
    if trial.state == TrialState.COMPLETE:
        return str(trial.user_attrs.get("state", "finished"))
    return _STATE_NAMES.get(trial.state, "waiting")


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """Return the epochs of a trial from its metrics.csv."""
    try:
        frame = pd.read_csv(folder / METRICS)
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return []
    rows = frame.to_dict("records")
    return [{str(key): None if pd.isna(value) else value for key, value in row.items()} for row in rows]


def build_trial_table(plan: StudyPlan, study: optuna.Study) -> pd.DataFrame:
    """Return one row per started trial.

    Columns: number, state (`finished`, `stopped`, `failed`, `running`), reason, backbone, `param_<field>` for each
    searched field, epochs, best_epoch, val_auroc, calibration_error, images_per_second, seconds (of training and
    validation), started, ended, restarts, and curve, a list of one dict per epoch.
    """
    trials = study.get_trials(deepcopy=False)
    rows = [_build_row(plan, trial) for trial in trials if get_state(trial) != "waiting"]
    frame = pd.DataFrame(rows, columns=None if rows else list(_KINDS))
    for name in [str(name) for name in frame.columns if str(name).startswith(PARAM)]:
        # Integers remain integers although other trials lack the setting.
        frame[name] = pd.Series([row[name] for row in rows], dtype=object)
    return frame


def _build_row(plan: StudyPlan, trial: FrozenTrial) -> dict[str, Any]:
    curve = read_curve(plan.folder(trial.number))
    values, attributes = plan.space.values(trial.params), trial.user_attrs
    scored = [point for point in curve if point["val_auroc"] is not None]
    best = max(scored, key=lambda point: point["val_auroc"], default=None)
    return {
        "number": trial.number,
        "state": get_state(trial),
        "reason": attributes.get("reason"),
        "backbone": values.get("backbone", plan.base.backbone),
        **{f"{PARAM}{field}": values.get(field) for field in plan.space.fields if field != "backbone"},
        "epochs": len(curve),
        "best_epoch": best["epoch"] if best else None,
        "val_auroc": best["val_auroc"] if best else None,
        "calibration_error": best.get("val_calibration_error") if best else None,
        "images_per_second": attributes.get("images_per_second"),
        "seconds": round(sum(point["seconds"] + point["val_seconds"] for point in curve), 3) if curve else None,
        "started": _to_utc(trial.datetime_start),
        "ended": _to_utc(trial.datetime_complete),
        "restarts": max(0, int(attributes.get("starts", 1)) - 1),
        "curve": curve,
    }


def _to_utc(time: datetime | None) -> pd.Timestamp | None:
    # Optuna stores local time without a zone.
    return None if time is None else pd.Timestamp(time.astimezone(UTC))


def to_arrow(rows: pd.DataFrame) -> pa.Table:
    """Convert the rows to the table of trials.parquet: lists as JSON text, curves as lists of structs."""
    columns: dict[str, pa.Array] = {}
    for name in rows.columns:
        values = [_to_plain(value) for value in rows[name]]
        if name == "curve":
            values = [[{field.name: point.get(field.name) for field in _EPOCH} for point in curve] for curve in values]
        elif name not in _KINDS:
            values = [json.dumps(list(value)) if isinstance(value, (list, tuple)) else value for value in values]
        columns[name] = pa.array(values, _KINDS.get(name) or _column_type(name.removeprefix(PARAM)))
    return pa.table(columns)


def _column_type(field: str) -> pa.DataType:
    """Return the type of a setting's column; it does not depend on the values."""
    annotation = TrainSettings.model_fields[field].annotation
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    known: dict[Any, pa.DataType] = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return next((known[part] for part in parts if part in known), pa.string())


def _to_plain(value: Any) -> Any:
    if value is None or isinstance(value, (list, tuple, dict)):
        return value
    if value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value


def find_best_trial(rows: pd.DataFrame) -> int | None:
    """Return the first trial with the highest validation AUROC, failed ones aside; None if no trial has one."""
    usable = rows[(rows["state"] != "failed") & rows["val_auroc"].notna()]
    return None if usable.empty else int(usable["number"].iloc[int(usable["val_auroc"].astype(float).argmax())])


def list_pareto_front(study: optuna.Study) -> list[int]:
    """Return the trials that no other trial beats in every objective; empty with one objective."""
    return sorted(trial.number for trial in study.best_trials) if len(study.directions) > 1 else []


def read_objectives(report: Mapping[str, Any], names: Sequence[str]) -> list[float] | None:
    """Return the values of a report in the order of the objectives; None if one is missing or not finite."""
    values = [report.get(REPORT_NAMES[name]) for name in names]
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return known if len(known) == len(names) else None


def copy_validation(folder: Path) -> None:
    """Copy the best epoch's validation probabilities from Ray Train's checkpoints, which may be removed later."""
    best = None if (folder / VALIDATION).exists() else find_best_checkpoint(folder)
    if best is None:
        return
    with best.as_directory() as checkpoint:
        source = (Path(checkpoint) / VALIDATION).read_bytes()
    atomic.write(folder / VALIDATION, lambda part: part.write_bytes(source))


class Validation(NamedTuple):
    """A trial's best epoch on the validation images."""

    image_ids: np.ndarray  # str [N]
    labels: np.ndarray  # int8 [N,F], -1 if not labelled
    probabilities: np.ndarray  # float32 [N,F]
    patients: np.ndarray  # ids [N]


def load_validation(plan: StudyPlan, number: int) -> Validation | None:
    """Return the validation results of a trial's best epoch; None if they were not kept or are of other images."""
    path = plan.folder(number) / VALIDATION
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        probabilities, ids = arrays["probabilities"], arrays["image_ids"]
    size = plan.base.size or list_prepared_sizes(plan.prepared)[0]
    rows = PreparedSet(plan.prepared, size).rows().select(["image_id", "patient_id", *LABELS])
    frame = rows.to_pandas().set_index("image_id")
    if not set(ids) <= set(frame.index):
        return None
    frame = frame.loc[ids]
    labels = frame[list(plan.base.finding_names())].astype("float64").fillna(-1).to_numpy().astype(np.int8)
    return Validation(ids, labels, probabilities, frame["patient_id"].to_numpy())
