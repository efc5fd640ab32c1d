"""The study: Optuna's record of a search, and what is read from it and from the trials' folders.

STUDY/settings.json      what a later run must agree with to continue here
STUDY/study.db           Optuna's storage, unless another is named
STUDY/trials/0003/       a trial, which is a RUN of `train` without a bundle; trial.toml are its settings
STUDY/trials.parquet     one row per trial
STUDY/best.toml          the best trial's settings, as `train` takes them
STUDY/bundle/            and its bundle
STUDY/report.html        and what all this looks like
STUDY/summary.json       the search as a whole, for programs; written last
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import types
import typing
import uuid
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna
import pandas as pd
import pyarrow as pa

from ray_cxr.config import TrainSettings, TuneSettings, load
from ray_cxr.data.prepared import PreparedSet, complete_sizes
from ray_cxr.errors import ConfigError, OutputError, RayCxrError, TableError, first_line
from ray_cxr.evaluation import metrics
from ray_cxr.labels import LABELS, NO_FINDING
from ray_cxr.storage import atomic, remote
from ray_cxr.storage.run_folder import SETTINGS, check_run
from ray_cxr.training.checkpoints import SNAPSHOT, find_best_checkpoint
from ray_cxr.training.planning import list_free_settings, plan_training
from ray_cxr.training.worker import METRICS, VALIDATION
from ray_cxr.tuning.space import KNOWN, Space

TRIALS = "trials"
#: In STUDY: what a search came to, for programs; written after everything else, and gone while one is at work.
SUMMARY = "summary.json"
#: In STUDY: the settings as they were given.
BEGUN = "begun.json"
#: How an objective is called in a trial's reports, and which way is better.
REPORTED = {"auroc": "best_val_auroc", "images_per_second": "images_per_second", "calibration_error": "calibration"}
DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "auroc": "maximize",
    "images_per_second": "maximize",
    "calibration_error": "minimize",
}
#: Settings of the search that change nothing of what a trial is.
_FREE = {"trials", "concurrent", "ahead", "max_failures", "keep", "storage"}
#: Before the name of a setting that was searched, in the record.
PARAM = "param_"
_COMPLETE, _PRUNED = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
_FAIL, _RUNNING = optuna.trial.TrialState.FAIL, optuna.trial.TrialState.RUNNING
_WAITING = optuna.trial.TrialState.WAITING


class Plan:
    """A search that can begin or go on: its data, its space, what it must agree with.

    Attributes:
        prepared: the prepared folder.
        out: the study's folder.
        settings: of the search.
        base: what all trials share.
        space: what differs.
        wanted: what another run in this folder must agree with.
        name: of Optuna's study; carries the digest of `wanted`.
        points: known settings to try first, as Optuna's parameters, each with what was left out of it.
    """

    def __init__(self, prepared: str | Path, out: str | Path, base: TrainSettings, settings: TuneSettings) -> None:
        """Look at everything that can be refused before Ray starts.

        Raises:
            ConfigError, TableError, OutputError: see the messages.
        """
        self.prepared, self.out, self.settings = remote.path(prepared), Path(out), settings
        sizes = prepared_sizes(self.prepared) if base.size is None else (base.size,)
        self.base, self.space = base, Space.read(settings.space, base, sizes)
        first = PreparedSet(self.prepared, sizes[0])
        _refuse_undefined(first, base)
        if settings.grace_epochs > base.epochs:
            raise ConfigError(
                f"tune.grace_epochs: {settings.grace_epochs} is more than train.epochs={base.epochs}; lower it"
            )
        if settings.sampler == "cmaes":
            if len(settings.objectives) > 1:
                raise ConfigError("tune.sampler: cmaes takes one objective; use tpe")
            if settings.storage is not None:
                # Optuna keeps its state there as a pickle, and runs what it reads back.
                raise ConfigError("tune.sampler: cmaes is for the study's own file; leave tune.storage out, or use tpe")
        if len(sizes) > 1 and "size" not in self.space.fields:
            raise ConfigError(
                f"{prepared}: has sizes {', '.join(map(str, sizes))}; set train.size, or search them: "
                'size = "prepared" under [tune.space]'
            )
        self.sampler(0)  # refuses what it cannot search
        self.storage_words()  # refuses what is no storage
        self.points = _points(settings, self.space)
        # A run's own refusals, for each size and each start once.
        starts = [one.describe()["choices"] for one in self.space.parameters if one.field == "weights"]
        for size in sizes:
            for weights in itertools.chain.from_iterable(starts or [[base.weights]]):
                one = base.replace(size=size, backbone=self.space.backbones[0], weights=weights)
                plan_training(self.prepared, self.out / TRIALS / ".check", one)
        self.wanted = {
            "kind": "tune",
            "format": 1,
            "prepared": first.manifest_digest,
            "sizes": list(sizes),
            "input_spec": first.input_spec.model_dump(mode="json", exclude={"size"}),
            # Not `epochs`, which a run may have more of: trials of several budgets cannot be compared.
            "train": base.model_dump(
                mode="json", exclude={*(list_free_settings(base) - {"epochs"}), "size", *self.space.fields}
            ),
            "tune": settings.model_dump(mode="json", exclude={*_FREE, "space"}),
            "space": {name: json.dumps(entry, sort_keys=True) for name, entry in self.space.describe().items()},
        }
        digest = hashlib.sha256(json.dumps(self.wanted, sort_keys=True).encode()).hexdigest()
        self.name = f"ray-cxr-{digest[:16]}"
        check_run(
            self.out, {**self.wanted, "id": folder_id(self.out)} if (self.out / SETTINGS).exists() else self.wanted
        )

    def sampler(self, asked: int) -> optuna.samplers.BaseSampler:
        """Optuna's sampler; another seed for each number of trials that were asked for before.

        A sampler that goes on with its first seed would draw the first trials of the study again.

        Raises:
            ConfigError: it cannot search this space.
        """
        seed = int(np.random.default_rng([self.settings.seed, asked]).integers(2**31))
        with warnings.catch_warnings():
            # Of the grouped sampling of conditional parameters, which has been called experimental since Optuna 2.8.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self.settings.sampler == "random":
                return optuna.samplers.RandomSampler(seed=seed)
            if self.settings.sampler == "tpe":
                return optuna.samplers.TPESampler(
                    seed=seed, multivariate=True, group=True, n_startup_trials=self.settings.startup_trials
                )
            return _cmaes(self.space, seed)

    def storage_words(self) -> str:
        """Where Optuna's storage is, without a password.

        Raises:
            ConfigError: it is none.
        """
        url = self.settings.storage or f"sqlite:///{self.out / 'study.db'}"
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            parts = make_url(url)
        except (ArgumentError, ValueError):
            raise ConfigError(
                "tune.storage: not an Optuna storage; write a database URL such as sqlite:////data/studies.db or "
                "postgresql://user@host/name"
            ) from None
        if "@" in (parts.host or ""):
            # What stands before it would be shown as the host.
            raise ConfigError("tune.storage: has two @; write that of the password as %40")
        # A password may stand among the options, too.
        return parts.set(query={}).render_as_string(hide_password=True)

    def open(self) -> optuna.Study:
        """The study, made if there is none yet; its folder is then bound to these settings.

        Raises:
            OutputError: the storage holds this search already, begun by another folder; or the folder has trials that
                another storage knows of.
            RayCxrError: the storage cannot be opened.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.out.mkdir(parents=True, exist_ok=True)
        here = self.out / SETTINGS
        mine = folder_id(self.out) if here.exists() else uuid.uuid4().hex
        words = self.storage_words()
        url = self.settings.storage or f"sqlite:///{self.out.absolute() / 'study.db'}"
        wait = {"connect_args": {"timeout": 120}} if url.startswith("sqlite") else {}
        try:
            storage = optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True, **wait})
            study = optuna.create_study(
                storage=storage,
                study_name=self.name,
                load_if_exists=True,
                directions=list(map(DIRECTIONS.__getitem__, self.settings.objectives)),
                pruner=optuna.pruners.NopPruner(),
            )
            if not study.get_trials(deepcopy=False) and any((self.out / TRIALS).glob("[0-9]*")):
                raise OutputError(
                    f"{self.out}: has trials that {words} knows nothing of; continue with the storage that they were "
                    f"begun with (--set storage=...), or remove {self.out / TRIALS}"
                )
            owner = study.user_attrs.get("folder")
            if owner is None and not study.get_trials(deepcopy=False):
                # The folder first: a study that is nobody's yet anybody may have.
                if not here.exists():
                    atomic.write_json(here, {**self.wanted, "id": mine})
                study.set_user_attr("folder", mine)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    study.set_metric_names(list(self.settings.objectives))
                owner = mine
        except RayCxrError:
            raise
        except Exception as error:  # whatever a database driver raises
            raise RayCxrError(f"tune.storage: {words}: {first_line(error)}") from None
        if owner != mine:
            raise OutputError(
                f"tune.storage: {words} holds a search of the same data and space ({self.name}) that another folder "
                f"began; continue it there, or name another storage than for {self.out}"
            )
        study.sampler = self.sampler(len(study.get_trials(deepcopy=False)))
        for point, _ in self.points:
            # Each once, however often the search is continued.
            study.enqueue_trial(point, skip_if_exists=True)
        return study

    def done(self) -> bool:
        """Whether as many trials as are wanted came to their end, and all that is written of them was written."""
        try:
            summary = json.loads((self.out / SUMMARY).read_text(encoding="utf-8"))
            over, best = int(summary["trials_over"]), summary["best_number"]
            return over >= self.settings.trials and best is not None and (self.out / "bundle").exists()
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def settings_of(self, trial: optuna.trial.FrozenTrial | optuna.Trial) -> TrainSettings:
        """A trial's settings, whole; its workers have other working directories."""
        settings = self.space.settings(trial.params, self.base)
        if settings.weights in ("imagenet", "none"):
            return settings
        return settings.replace(weights=str(Path(settings.weights).absolute()))

    def folder(self, number: int) -> Path:
        """A trial's folder, a RUN."""
        return self.out / TRIALS / f"{number:04d}"


def folder_id(out: Path) -> str:
    """What tells this study's folder from another of the same search."""
    try:
        return str(json.loads((out / SETTINGS).read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(f"{out}: holds no search, or a damaged one; name another --out") from None


def prepared_sizes(prepared: Path) -> tuple[int, ...]:
    """The complete sizes of a prepared folder.

    Raises:
        ConfigError: it is none, or has none.
    """
    whole = tuple(complete_sizes(prepared))
    return whole or (PreparedSet(prepared).size,)  # which refuses, and says why


def _refuse_undefined(data: PreparedSet, base: TrainSettings) -> None:
    """Refuse a validation split that gives no AUROC: trials could not be told apart.

    Raises:
        TableError: no finding has both positives and negatives there.
    """
    val = data.usable("val")
    for name in base.finding_names():
        if name != NO_FINDING and metrics.undefined_reason(val[name].drop_null().to_numpy()) is None:
            return
    raise TableError(f"{data.path}: no finding has both positives and negatives among the {len(val):,} images of "
                     "split 'val', so no AUROC could choose between trials; prepare a larger one")  # fmt: skip


def _points(settings: TuneSettings, space: Space) -> list[tuple[dict[str, Any], list[str]]]:
    given = [space.point(values, f"tune.enqueue[{place}]") for place, values in enumerate(settings.enqueue)]
    if settings.known:
        given += [
            space.point(values, "known", strict=False) for values in KNOWN if values["backbone"] in space.backbones
        ]
    return given


def _cmaes(space: Space, seed: int) -> optuna.samplers.BaseSampler:
    if len(space.backbones) > 1:
        raise ConfigError(
            f"tune.sampler: cmaes searches one backbone, and the space has {', '.join(space.backbones)}; set "
            "train.backbone and leave it out of tune.space, or use tpe"
        )
    if space.conditional:
        raise ConfigError("tune.sampler: cmaes takes no conditional space, and tune.space has `when`; use tpe")
    if space.categorical:
        raise ConfigError(
            f"tune.sampler: cmaes takes numbers only, and {', '.join(space.categorical)} are choices; use tpe"
        )
    try:
        import cmaes  # noqa: F401
    except ImportError:
        raise ConfigError("tune.sampler: cmaes needs its package; pip install 'ray-cxr[cmaes]', or use tpe") from None
    return optuna.samplers.CmaEsSampler(seed=seed)


def ended(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial counts: done, stopped or failed, and not merely enqueued, begun or left."""
    return trial.state.is_finished()


def state_of(trial: optuna.trial.FrozenTrial) -> str:
    """`finished`, `stopped`, `failed`, `running` or `waiting`."""
    if trial.state == _COMPLETE:
        return str(trial.user_attrs.get("state", "finished"))
    return {_PRUNED: "stopped", _FAIL: "failed", _RUNNING: "running", _WAITING: "waiting"}[trial.state]


def curve_of(folder: Path) -> list[dict[str, Any]]:
    """The epochs of a trial, as its RUN has them."""
    try:
        frame = pd.read_csv(folder / METRICS)
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return []
    rows = frame.to_dict("records")
    return [{str(key): None if pd.isna(value) else value for key, value in row.items()} for row in rows]


def record(plan: Plan, study: optuna.Study) -> pd.DataFrame:
    """One row per trial that was begun.

    Columns: number, state (`finished`, `stopped`, `failed`, `running`), reason, backbone, `param_<field>` for each
    searched field, epochs, best_epoch, val_auroc, images_per_second, calibration_error, seconds, started, ended,
    restarts, and curve, a list of one dict per epoch. `seconds` are those of training and validation.
    """
    rows = []
    for trial in study.get_trials(deepcopy=False):
        state = state_of(trial)
        if state == "waiting":
            continue
        curve = curve_of(plan.folder(trial.number))
        values = plan.space.values(trial.params)
        scored = [point for point in curve if point["val_auroc"] is not None]
        best = max(scored, key=lambda point: point["val_auroc"], default=None)
        attributes = trial.user_attrs
        rows.append(
            {
                "number": trial.number,
                "state": state,
                "reason": attributes.get("reason"),
                "backbone": values.get("backbone", plan.base.backbone),
                **{f"{PARAM}{field}": values.get(field) for field in plan.space.fields if field != "backbone"},
                "epochs": len(curve),
                "best_epoch": best["epoch"] if best else None,
                "val_auroc": best["val_auroc"] if best else None,
                "calibration_error": best.get("val_calibration_error") if best else None,
                "images_per_second": attributes.get("images_per_second"),
                "seconds": round(sum(point["seconds"] + point["val_seconds"] for point in curve), 3) if curve else None,
                "started": _utc(trial.datetime_start),
                "ended": _utc(trial.datetime_complete),
                "restarts": max(0, int(attributes.get("starts", 1)) - 1),
                "curve": curve,
            }
        )
    frame = pd.DataFrame(rows, columns=None if rows else [*_FIRST, "curve"])
    for name in [str(name) for name in frame.columns if str(name).startswith(PARAM)]:
        # A whole number stays one, although other trials were not asked for it.
        frame[name] = pd.Series([row[name] for row in rows], dtype=object)
    return frame


_FIRST = ["number", "state", "reason", "backbone", "epochs", "best_epoch", "val_auroc", "calibration_error"]
_FIRST += ["images_per_second", "seconds", "started", "ended", "restarts"]


def _utc(when: datetime | None) -> pd.Timestamp | None:
    # Optuna writes local time without a zone.
    return None if when is None else pd.Timestamp(when.astimezone(UTC))


_EPOCH = pa.struct(
    [
        ("epoch", pa.int32()),
        *((name, pa.float64()) for name in ("loss", "val_loss", "val_auroc", "val_calibration_error")),
        *((name, pa.float64()) for name in ("learning_rate", "seconds", "val_seconds", "images_per_second")),
    ]
)


def table(rows: pd.DataFrame) -> pa.Table:
    """The record as it stands in trials.parquet: lists as JSON text, curves as lists of structs."""
    columns: dict[str, pa.Array] = {}
    kinds: dict[str, pa.DataType] = {
        "number": pa.int32(), "epochs": pa.int32(), "best_epoch": pa.int32(), "restarts": pa.int32(),
        "val_auroc": pa.float64(), "calibration_error": pa.float64(), "images_per_second": pa.float64(),
        "seconds": pa.float64(), "started": pa.timestamp("us", tz="UTC"), "ended": pa.timestamp("us", tz="UTC"),
        "state": pa.string(), "reason": pa.string(), "backbone": pa.string(), "curve": pa.list_(_EPOCH),
    }  # fmt: skip
    for name in rows.columns:
        values = [_plain(value) for value in rows[name]]
        if name == "curve":
            values = [[{field.name: point.get(field.name) for field in _EPOCH} for point in curve] for curve in values]
        elif name not in kinds:
            values = [json.dumps(list(value)) if isinstance(value, (list, tuple)) else value for value in values]
        columns[name] = pa.array(values, kinds.get(name) or _kind(name.removeprefix(PARAM)))
    return pa.table(columns)


def _kind(field: str) -> pa.DataType:
    """How a column holds the values of a setting, whichever of them there are."""
    annotation = TrainSettings.model_fields[field].annotation
    parts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    known: dict[Any, pa.DataType] = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return next((known[part] for part in parts if part in known), pa.string())


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (list, tuple, dict)):
        return value
    if value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value


def best_of(study: optuna.Study, rows: pd.DataFrame) -> int | None:
    """The number of the trial that the bundle is of: the highest validation AUROC; of equals the first."""
    usable = rows[(rows["state"] != "failed") & rows["val_auroc"].notna()]
    return None if usable.empty else int(usable["number"].iloc[int(usable["val_auroc"].astype(float).argmax())])


def pareto(study: optuna.Study) -> list[int]:
    """Numbers of the trials that no other beats in every objective; empty with one objective."""
    return sorted(trial.number for trial in study.best_trials) if len(study.directions) > 1 else []


def keep_validation(folder: Path) -> None:
    """Copy the best epoch's validation probabilities out of Ray Train's checkpoints, which may be removed."""
    snapshot = folder / "ray" / SNAPSHOT
    if (folder / VALIDATION).exists() or not snapshot.exists():
        return
    best = find_best_checkpoint(folder)
    if best is not None:
        with best.as_directory() as seen:
            source = (Path(seen) / VALIDATION).read_bytes()
        atomic.write(folder / VALIDATION, lambda part: _write_bytes(part, source))


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


class Validation(NamedTuple):
    """A trial's best epoch on the validation images.

    Attributes:
        image_ids: str [N].
        labels: int8 [N,F], -1 where not labelled.
        probabilities: float32 [N,F].
        patients: ids [N].
    """

    image_ids: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    patients: np.ndarray


def validation_of(plan: Plan, number: int) -> Validation | None:
    """What a trial's best epoch gave on validation; None where nothing of it was kept."""
    path = plan.folder(number) / VALIDATION
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        probabilities, ids = arrays["probabilities"], arrays["image_ids"]
    size = plan.base.size or prepared_sizes(plan.prepared)[0]
    rows = PreparedSet(plan.prepared, size).rows().select(["image_id", "patient_id", *LABELS])
    frame = rows.to_pandas().set_index("image_id")
    if not set(ids) <= set(frame.index):
        return None
    frame = frame.loc[ids]
    names = list(plan.base.finding_names())
    labels = frame[names].astype("float64").fillna(-1).to_numpy().astype(np.int8)
    return Validation(ids, labels, probabilities, frame["patient_id"].to_numpy())


def begun(out: Path) -> bool:
    """Whether a search was begun in this folder."""
    return (out / BEGUN).exists()


def write_begun(out: Path, base: TrainSettings, settings: TuneSettings) -> None:
    """Write down the settings as given, for `--resume`; a storage may hold a password and is not among them."""
    plain = settings.model_dump(mode="json", exclude={"storage"})
    atomic.write_json(out / BEGUN, {"train": base.model_dump(mode="json"), "tune": plain})


def resumed(out: Path, overrides: Sequence[str]) -> tuple[TrainSettings, TuneSettings]:
    """The settings that a study was begun with, `--set key=value` applied to them.

    Raises:
        OutputError: the file is damaged.
        ConfigError: an override is wrong.
    """
    try:
        found = json.loads((out / BEGUN).read_text(encoding="utf-8"))
        base, settings = dict(found["train"]), dict(found["tune"])
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(f"{out / BEGUN}: is damaged; give the settings again in place of --resume") from None
    loaded = load(None, overrides, section="tune", start={"train": base, "tune": settings})
    return loaded.train, loaded.tune


def objectives_of(point: Mapping[str, Any], names: Sequence[str]) -> list[float] | None:
    """A trial's values in the order of its objectives; None where one is not known."""
    values = [point.get(REPORTED[name]) for name in names]
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    return known if len(known) == len(names) else None
