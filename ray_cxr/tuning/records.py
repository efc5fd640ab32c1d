"""Read a study's trials: from Optuna, and from the trials' folders."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import pandas as pd
import pyarrow as pa
from optuna.trial import FrozenTrial, TrialState

from ray_cxr.data.prepared import PreparedSet
from ray_cxr.labels import LABELS
from ray_cxr.storage import atomic, remote
from ray_cxr.training.checkpoints import find_best_checkpoint, has_checkpoint, read_stored_epochs
from ray_cxr.training.monitor import read_metrics
from ray_cxr.training.worker import METRICS, VALIDATION
from ray_cxr.tuning.plan import StudyPlan, list_prepared_sizes
from ray_cxr.tuning.space_table import accepts

#: The name of each objective in a trial's reports.
REPORT_NAMES = {"auroc": "best_val_auroc", "images_per_second": "images_per_second", "calibration_error": "calibration"}
#: The metric of schedulers: the best AUROC so far, as a bundle of the epochs so far would have it.
METRIC = REPORT_NAMES["auroc"]
#: Prefix of the columns of searched settings.
PARAM = "param_"
_STATE_NAMES = {TrialState.PRUNED: "stopped", TrialState.FAIL: "failed", TrialState.RUNNING: "running"}

_EPOCH = dict.fromkeys(("epoch", "loss", "val_loss", "val_auroc", "val_calibration_error"), pa.float64())
_EPOCH |= dict.fromkeys(("learning_rate", "seconds", "val_seconds", "images_per_second"), pa.float64())
#: The columns; those of searched settings follow `backbone`.
_KINDS: dict[str, pa.DataType] = {
    "number": pa.int32(),
    **dict.fromkeys(("state", "reason", "backbone"), pa.string()),
    **dict.fromkeys(("epochs", "best_epoch"), pa.int32()),
    **dict.fromkeys(("val_auroc", "calibration_error", "images_per_second", "seconds"), pa.float64()),
    **dict.fromkeys(("started", "ended"), pa.timestamp("us", tz="UTC")),
    "restarts": pa.int32(),
    "curve": pa.list_(pa.struct(_EPOCH | {"epoch": pa.int32()})),
}


def get_state(trial: FrozenTrial) -> str:
    """Return `finished`, `stopped`, `failed`, `running` or `waiting`."""
    if trial.state == TrialState.COMPLETE:
        return str(trial.user_attrs.get("state", "finished"))
    return _STATE_NAMES.get(trial.state, "waiting")


def build_trial_table(plan: StudyPlan, study: optuna.Study) -> pd.DataFrame:
    """Return one row per started trial.

    The columns are those of `_KINDS`, and `param_<field>` for each searched field. The state is `finished`, `stopped`,
    `failed` or `running`, `seconds` includes validation, and `curve` is a list of one dict per epoch.
    """
    trials = study.get_trials(deepcopy=False)
    rows = [_build_row(plan, trial) for trial in trials if get_state(trial) != "waiting"]
    frame = pd.DataFrame(rows, columns=None if rows else list(_KINDS))
    for name in frame.columns:
        if name.startswith(PARAM):
            # Integers remain integers although other trials lack the setting.
            frame[name] = pd.Series([row[name] for row in rows], dtype=object)
    return frame


def read_curve(plan: StudyPlan, trial: FrozenTrial) -> list[dict[str, Any]]:
    """Return the epochs of a trial that count: those that a checkpoint holds, or held until `drop_checkpoints`."""
    folder = plan.folder(trial.number)
    if get_state(trial) == "running" or has_checkpoint(folder):
        return read_stored_epochs(folder)
    return read_metrics(folder)


def drop_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of an ended trial, but keep what `read_curve` and `load_validation` return."""
    if has_checkpoint(folder):
        copy_validation(folder)
        lines = (folder / METRICS).read_bytes().splitlines(keepends=True)
        if later := lines[1 + len(read_stored_epochs(folder)) :]:
            atomic.write_bytes(folder / METRICS, b"".join(lines[: -len(later)]))
    remote.remove_folder(folder / "ray")


def _build_row(plan: StudyPlan, trial: FrozenTrial) -> dict[str, Any]:
    values, attributes = plan.space.values(trial.params), trial.user_attrs
    curve = read_curve(plan, trial)
    scored = [point for point in curve if point["val_auroc"] is not None]
    best = max(scored, key=lambda point: point["val_auroc"], default={})
    return {
        "number": trial.number,
        "state": get_state(trial),
        "reason": attributes.get("reason"),
        "backbone": values.get("backbone", plan.base.backbone),
        **{f"{PARAM}{field}": values.get(field) for field in plan.space.fields if field != "backbone"},
        "epochs": len(curve),
        "best_epoch": best.get("epoch"),
        "val_auroc": best.get("val_auroc"),
        "calibration_error": best.get("val_calibration_error"),
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
        values = rows[name].tolist()
        if name not in _KINDS:
            values = [json.dumps(value) if isinstance(value, (list, tuple)) else value for value in values]
        kind = _KINDS.get(name) or _column_type(name.removeprefix(PARAM))
        columns[name] = pa.array(values, kind, from_pandas=True)
    return pa.table(columns)


def _column_type(field: str) -> pa.DataType:
    """Return the type of a setting's column, which does not depend on the values."""
    known = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return next((known[kind] for kind in known if accepts(field, kind)), pa.string())


def find_best_trial(rows: pd.DataFrame) -> int | None:
    """Return the first trial with the highest validation AUROC that did not fail; None if no trial has an AUROC."""
    usable = rows[(rows["state"] != "failed") & rows["val_auroc"].notna()]
    return None if usable.empty else int(usable["number"].iloc[int(usable["val_auroc"].astype(float).argmax())])


def list_random_trials(plan: StudyPlan, study: optuna.Study) -> set[int]:
    """Return the trials whose settings were drawn at random, without knowledge of other trials.

    TPE draws at random until `startup_trials` trials have ended without failing. Enqueued trials have fixed settings.
    """
    if plan.settings.sampler == "cmaes":
        return set()
    trials = study.get_trials(deepcopy=False)
    ends = [trial.datetime_complete for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]

    def is_random(trial: FrozenTrial) -> bool:
        start = trial.datetime_start
        if start is None or "fixed_params" in trial.system_attrs:
            return False
        known = sum(end is not None and end <= start for end in ends)
        return plan.settings.sampler == "random" or known < plan.settings.startup_trials

    return {trial.number for trial in trials if is_random(trial)}


def list_pareto_front(study: optuna.Study) -> list[int]:
    """Return the trials that no other trial beats in every objective; empty with one objective."""
    return sorted(trial.number for trial in study.best_trials) if len(study.directions) > 1 else []


def read_objectives(report: Mapping[str, Any], names: Sequence[str]) -> list[float] | None:
    """Return the values of a report in the order of the objectives; None if a value is missing or not finite."""
    values = [report.get(REPORT_NAMES[name]) for name in names]
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return known if len(known) == len(names) else None


def copy_validation(folder: Path) -> None:
    """Copy the best epoch's validation probabilities from Ray Train's checkpoints, which may be removed later."""
    best = None if (folder / VALIDATION).exists() else find_best_checkpoint(folder)
    if best is not None:
        with best.as_directory() as checkpoint:
            atomic.write_bytes(folder / VALIDATION, (Path(checkpoint) / VALIDATION).read_bytes())


class Validation(NamedTuple):
    """The probabilities of a trial's best epoch on the validation images, with the labels."""

    image_ids: np.ndarray  # str [N]
    labels: np.ndarray  # int8 [N,F], -1 if not labelled
    probabilities: np.ndarray  # float32 [N,F]
    patients: np.ndarray  # ids [N]


def load_validation(plan: StudyPlan, number: int) -> Validation | None:
    """Return the validation results of a trial's best epoch; None if they were not kept, or the images are others."""
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
