"""The plan of a search, checked before Ray starts: its data, settings and space, and Optuna's study.

STUDY/settings.json      settings that a later run must match
STUDY/begun.json         the settings of the first command, for --resume
STUDY/study.db           Optuna's storage, unless tune.storage names another
STUDY/trials/0003/       a trial, which is a RUN of `train` without a bundle; trial.toml holds its settings
STUDY/confirm/           confirming trainings (see confirm.py)
STUDY/trials.parquet     one row per trial
STUDY/best.toml          the best trial's settings, as `train` reads them
STUDY/bundle/            the best trial's bundle
STUDY/report.html        the report, next to its figures
STUDY/summary.json       the facts of the search, for programs; written last, and removed while a search runs
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna

from ray_cxr import extras
from ray_cxr.config import TrainSettings, TuneSettings, load
from ray_cxr.data.prepared import PreparedSet, complete_sizes
from ray_cxr.errors import ConfigError, OutputError, RayCxrError, TableError
from ray_cxr.evaluation import metrics
from ray_cxr.labels import NO_FINDING
from ray_cxr.storage import atomic, remote
from ray_cxr.storage.run_folder import check_run, create_run, read_json, read_settings
from ray_cxr.training.planning import list_free_settings, plan_training
from ray_cxr.tuning.parameters import Choices
from ray_cxr.tuning.space import KNOWN, Space, default_space
from ray_cxr.tuning.storage import StudyStorage, explain_database_error

#: Names in STUDY.
TRIALS, TABLE, SUMMARY, START_SETTINGS = "trials", "trials.parquet", "summary.json", "begun.json"
#: The objectives, and whether higher or lower is better.
DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "auroc": "maximize",
    "images_per_second": "maximize",
    "calibration_error": "minimize",
}
#: Arguments of `warnings.catch_warnings` that silence Optuna's warnings of experimental features.
_EXPERIMENTAL: Any = {"action": "ignore", "category": optuna.exceptions.ExperimentalWarning}
#: Seconds until a study that another command creates has an owner.
_CLAIM_WAIT_S = 2.0
#: Settings of the search that do not change its trials.
_FREE = {"trials", "concurrent", "ahead", "max_failures", "keep", "storage", "confirm"}


class StudyPlan:
    """A search that passed every check that is possible before Ray starts.

    Attributes:
        base: the training settings that all trials share.
        space: the search space.
        storage: where Optuna keeps the search.
        points: configurations to try first: the values by Optuna parameter, and the fields left out.
        run_settings: the content of settings.json; later runs in `out` must have the same.
        name: the name of Optuna's study, with a digest of `run_settings`.

    Raises:
        ConfigError, TableError, OutputError: an argument is wrong, or `out` holds another search.
    """

    def __init__(self, prepared: str | Path, out: str | Path, base: TrainSettings, settings: TuneSettings) -> None:
        self.prepared, self.out = remote.to_path(prepared), remote.to_path(out)
        if base.min_workers is not None:
            raise ConfigError(
                f"workers: {base.min_workers}-{base.workers}: trials need one number, or machines that come and go "
                "would decide which trial wins; set workers to it"
            )
        remote.check_bucket(self.out)
        sizes = list_prepared_sizes(self.prepared) if base.size is None else (base.size,)
        # With the table itself, --resume continues with the same space.
        settings = settings.replace(space=settings.space or default_space(base, sizes))
        self.settings, self.base, self.space = settings, base, Space.read(settings.space, base, sizes)
        data = PreparedSet(self.prepared, sizes[0])
        _check_validation_split(data, base)
        if settings.grace_epochs > base.epochs:
            raise ConfigError(
                f"tune.grace_epochs: {settings.grace_epochs} exceeds train.epochs={base.epochs}; lower it"
            )
        if len(sizes) > 1 and "size" not in self.space.fields:
            raise ConfigError(
                f"{prepared}: has sizes {', '.join(map(str, sizes))}; set train.size, or search them: "
                'size = "prepared" under [tune.space]'
            )
        if settings.confirm and len(self.space.backbones) < 2:
            raise ConfigError(
                f"tune.confirm: compares two backbones, and only {self.space.backbones[0]} is searched; set confirm=0, "
                "or search backbone"
            )
        if settings.sampler == "cmaes":
            _check_cmaes(settings, self.space)
        _check_schedules(settings, base, self.space)
        self.storage = StudyStorage(self.out, settings.storage)
        self.points = [self.space.point(values, f"tune.enqueue[{i}]") for i, values in enumerate(settings.enqueue)]
        if settings.known:
            known = [values for values in KNOWN if values["backbone"] in self.space.backbones]
            self.points += [self.space.point(values, "known", strict=False) for values in known]
        # Check each size with all weights that trials may start from, as `train` does.
        searched = [parameter for parameter in self.space.parameters if parameter.field == "weights"]
        starts = [choice for parameter in searched for choice in parameter.describe()["choices"]] or [base.weights]
        for size, weights in itertools.product(sizes, starts):
            trial = base.replace(size=size, backbone=self.space.backbones[0], weights=weights)
            plan_training(self.prepared, self.out / TRIALS / ".check", trial)
        # A run may have more epochs later; a search may not, because trials of several budgets cannot be compared.
        free = {*(list_free_settings(base) - {"epochs"}), "size", *self.space.fields}
        self.run_settings = {
            "kind": "tune",
            "format": 1,
            "prepared": data.manifest_digest,
            "sizes": list(sizes),
            "input_spec": data.input_spec.model_dump(mode="json", exclude={"size"}),
            "train": base.model_dump(mode="json", exclude=free),
            "tune": settings.model_dump(mode="json", exclude={*_FREE, "space"}),
            "space": {name: json.dumps(entry, sort_keys=True) for name, entry in self.space.describe().items()},
        }
        digest = hashlib.sha256(json.dumps(self.run_settings, sort_keys=True).encode()).hexdigest()
        self.name = f"ray-cxr-{digest[:16]}"
        check_run(self.out, {**self.run_settings, "id": str(read_settings(self.out).get("id", ""))})

    def create_sampler(self, trials: int) -> optuna.samplers.BaseSampler:
        """Return Optuna's sampler; its seed depends on the number of trials, so a resumed search draws new values."""
        seed = int(np.random.default_rng([self.settings.seed, trials]).integers(2**31))
        if self.settings.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if self.settings.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed)
        with warnings.catch_warnings(**_EXPERIMENTAL):  # `group`, for conditional parameters
            return optuna.samplers.TPESampler(
                seed=seed, multivariate=True, group=True, n_startup_trials=self.settings.startup_trials
            )

    def open_study(self) -> optuna.Study:
        """Return Optuna's study, created if needed, and bind its folder to these settings.

        Raises:
            OutputError: the storage holds another folder's search, or the folder has trials of another storage.
            RayCxrError: the storage cannot be opened.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.out.mkdir(parents=True, exist_ok=True)
        identity = read_settings(self.out).get("id") or uuid.uuid4().hex
        try:
            study, is_new = self._load_study()
            if not study.get_trials(deepcopy=False) and any((self.out / TRIALS).glob("[0-9]*")):
                raise OutputError(
                    f"{self.out}: has trials that {self.storage} does not know; continue with their storage "
                    f"(--set storage=...), or remove {self.out / TRIALS}"
                )
            owner = study.user_attrs.get("folder")
            if owner is None and not is_new:
                # Another command creates it just now, or was killed before it named its folder.
                time.sleep(_CLAIM_WAIT_S)
                owner = study.user_attrs.get("folder")
            if owner is None and not study.get_trials(deepcopy=False):
                # Write the folder before its id: any folder may claim a study without an owner.
                create_run(self.out, {**self.run_settings, "id": identity})
                study.set_user_attr("folder", identity)
                with warnings.catch_warnings(**_EXPERIMENTAL):
                    study.set_metric_names(list(self.settings.objectives))
                owner = identity
        except RayCxrError:
            raise
        except Exception as error:  # any error of a database driver
            raise RayCxrError(f"tune.storage: {self.storage}: {explain_database_error(error)}") from None
        if owner != identity:
            raise OutputError(
                f"tune.storage: {self.storage} holds the same search ({self.name}), started from another folder; "
                f"continue it there, or name another storage for {self.out}"
            )
        study.sampler = self.create_sampler(len(study.get_trials(deepcopy=False)))
        for point, _ in self.points:
            study.enqueue_trial(point, skip_if_exists=True)
        self.storage.save()
        return study

    def _load_study(self) -> tuple[optuna.Study, bool]:
        """Return Optuna's study, and whether this command has created it."""
        storage, pruner = self.storage.open(), optuna.pruners.NopPruner()
        directions = [DIRECTIONS[name] for name in self.settings.objectives]
        try:
            options: dict[str, Any] = {"study_name": self.name, "pruner": pruner, "directions": directions}
            return optuna.create_study(storage=storage, **options), True
        except optuna.exceptions.DuplicatedStudyError:
            return optuna.load_study(storage=storage, study_name=self.name, pruner=pruner), False

    def is_finished(self) -> bool:
        """Return whether all requested trials have ended and all output is written."""
        summary = read_json(self.out / SUMMARY)
        has_all_trials = summary.get("trials_over", 0) >= self.settings.trials
        has_all_trials = has_all_trials and summary.get("confirm_over", 0) >= self.settings.confirm
        return has_all_trials and summary.get("best_number") is not None and (self.out / "bundle").exists()

    def build_settings(self, trial: optuna.trial.FrozenTrial | optuna.Trial) -> TrainSettings:
        """Return a trial's complete settings."""
        return self.complete(self.space.values(trial.params))

    def complete(self, values: Mapping[str, Any]) -> TrainSettings:
        """Return complete settings with these values; paths are absolute: workers have other working directories."""
        settings = self.base.replace(**values)
        if settings.weights in ("imagenet", "none"):
            return settings
        return settings.replace(weights=str(Path(settings.weights).absolute()))

    def folder(self, number: int) -> Path:
        return self.out / TRIALS / f"{number:04d}"


def list_prepared_sizes(prepared: Path) -> tuple[int, ...]:
    """Return the complete sizes of a prepared folder; raise ConfigError if there is none."""
    return tuple(complete_sizes(prepared)) or (PreparedSet(prepared).size,)  # PreparedSet raises with the reason


def has_search(out: Path) -> bool:
    return (out / START_SETTINGS).exists()


def save_start_settings(out: Path, base: TrainSettings, settings: TuneSettings) -> None:
    """Save the settings for `--resume`, without the storage, which may contain a password."""
    plain = settings.model_dump(mode="json", exclude={"storage"})
    atomic.write_json(out / START_SETTINGS, {"train": base.model_dump(mode="json"), "tune": plain})


def load_start_settings(out: Path, overrides: Sequence[str]) -> tuple[TrainSettings, TuneSettings]:
    """Return the settings of the first command in `out`, after applying `--set key=value`.

    Raises:
        OutputError: the file is damaged.
        ConfigError: an override is wrong.
    """
    saved = read_json(out / START_SETTINGS)
    try:
        start = {"train": dict(saved["train"]), "tune": dict(saved["tune"])}
    except (KeyError, TypeError, ValueError):
        raise OutputError(f"{out / START_SETTINGS}: damaged; pass the settings again instead of --resume") from None
    if start["tune"].get("space") == {}:
        raise OutputError(f"{out / START_SETTINGS}: of an earlier version; pass the settings again instead of --resume")
    loaded = load(None, overrides, section="tune", start=start)
    return loaded.train, loaded.tune


def _check_validation_split(data: PreparedSet, base: TrainSettings) -> None:
    """Raise TableError if the validation split has no AUROC, so that trials could not be ranked."""
    val = data.usable("val")
    for name in base.finding_names():
        if name != NO_FINDING and metrics.undefined_reason(val[name].drop_null().to_numpy()) is None:
            return
    raise TableError(
        f"{data.path}: no finding has both positives and negatives among the {len(val):,} images of split 'val', so "
        "trials cannot be ranked by AUROC; prepare a larger split"
    )


def _check_schedules(settings: TuneSettings, base: TrainSettings, space: Space) -> None:
    """Raise ConfigError if early stopping would compare trials before the rate of their cosine has fallen."""
    parameters = [parameter for parameter in space.parameters if parameter.field == "schedule"]
    searched = any("cosine" in parameter.describe()["choices"] for parameter in parameters)
    shared = base.schedule == "cosine" and all(parameter.condition for parameter in parameters)
    if settings.scheduler != "none" and (searched or shared):
        remedy = "remove cosine from tune.space" if searched else "use train.schedule=constant or plateau"
        raise ConfigError(
            f"tune.scheduler: {settings.scheduler} would compare trials while the rate of a cosine is still high, so "
            f"good ones would be stopped; {remedy}, or use tune.scheduler=none"
        )


def _check_cmaes(settings: TuneSettings, space: Space) -> None:
    """Raise ConfigError for a search that CMA-ES cannot do."""
    choices = [parameter.name for parameter in space.parameters if isinstance(parameter, Choices)]
    reasons = {
        "supports only one objective": len(settings.objectives) > 1,
        # Optuna keeps the sampler's state there as a pickle, and executes what it reads back.
        "supports only the study's own file; leave tune.storage out": settings.storage is not None,
        f"supports only one backbone, and the space has {', '.join(space.backbones)}; set train.backbone and remove it "
        "from tune.space": len(space.backbones) > 1,
        "supports no conditions, and tune.space has `when`": any(parameter.condition for parameter in space.parameters),
        f"supports only numbers, and {', '.join(choices)} have choices": bool(choices),
        extras.install_hint("cmaes"): not extras.is_installed("cmaes"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ConfigError(f"tune.sampler: cmaes {reason}, or use tpe")
