"""The study without its trials: refusals before Ray starts, the settings of a folder, and the record."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from studies import get_refusal, read_validated_epoch, store_checkpoints
from test_run_folder import ODD, ODD_NAME

from ray_cxr.config import TrainSettings, TuneSettings
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import ConfigError, InputError, OutputError, RayCxrError, TableError
from ray_cxr.labels import LABELS
from ray_cxr.ray_api import CHECKPOINT_LIST
from ray_cxr.storage import atomic
from ray_cxr.storage.remote import to_path
from ray_cxr.training import checkpoints
from ray_cxr.training.checkpoints import find_best_checkpoint, read_stored_epochs
from ray_cxr.training.monitor import read_metrics
from ray_cxr.tuning import plan as plans
from ray_cxr.tuning import records, results, searcher, storage
from ray_cxr.tuning import trial as trial_module
from ray_cxr.tuning.plan import StudyPlan

BASE = TrainSettings(backbone="TinyCNN", weights="none", size=64, epochs=4, batch_size=8)
SPACE: dict[str, Any] = {"dropout": {"low": 0.0, "high": 0.5}}
RATES: dict[str, Any] = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "dropout": {"low": 0, "high": 0.5}}
TWO: dict[str, Any] = {"backbone": ["ResNet50", "DenseNet121"], "learning_rate": {"low": 1e-4, "high": 1e-2}}
LOSSES: dict[str, Any] = {"loss": ["bce", "focal"]}
#: Every column type, and parameters that only some trials have.
FULL: dict[str, Any] = {
    "backbone": ["ResNet50", "TinyCNN"],
    "learning_rate": RATES["learning_rate"],
    "batch_size": [8, 16],
    "ema": ["none", 0.99],
    "flip": [True, False],
    "schedule": ["constant", "plateau"],
    "when": {
        "backbone=ResNet50": {"dense": [[], [256], [512, 256]]},
        "schedule=plateau": {"plateau_patience": {"low": 1, "high": 4}},
    },
}


def plan_of(prepared: Path, out: Path, base: TrainSettings = BASE, **settings: Any) -> StudyPlan:
    return StudyPlan(prepared, out, base, TuneSettings(**{"space": SPACE, "known": False, **settings}))


def ask(plan: StudyPlan, study: optuna.Study, count: int) -> list[optuna.Trial]:
    """Start the next `count` trials."""
    trials = [study.ask() for _ in range(count)]
    for trial in trials:
        plan.space.suggest(trial)
    return trials


def first_dropouts(plan: StudyPlan, count: int) -> list[float]:
    return [trial.params["dropout"] for trial in ask(plan, plan.open_study(), count)]


def epoch_row(epoch: int, auroc: float | None) -> dict[str, Any]:
    row = {"epoch": epoch, "loss": 1 / epoch, "val_loss": 0.7, "val_auroc": auroc, "learning_rate": 1e-3}
    return row | {"val_calibration_error": 0.25 / epoch, "seconds": 2.0, "val_seconds": 0.5, "images_per_second": 30.0}


def write_curve(plan: StudyPlan, number: int, *aurocs: float | None) -> None:
    """Write a trial's epochs as its run does."""
    folder = plan.folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [epoch_row(epoch, auroc) for epoch, auroc in enumerate(aurocs, 1)]
    pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)


def refuse(error: type[RayCxrError], *arguments: Any, **settings: Any) -> str:
    """Return the one line with which a plan is refused."""
    assert issubclass(error, InputError), "exits with 2"
    return get_refusal(error, plan_of, *arguments, **settings)


EARLY = ("asha", "halving", "median")
#: With SGD the schedule of [train] holds.
PARTLY: dict[str, Any] = {"optimizer": ["adam", "sgd"], "when": {"optimizer=adam": {"schedule": ["plateau"]}}}
CMAES: dict[str, Any] = {"space": RATES, "sampler": "cmaes"}


@pytest.mark.parametrize(
    ("settings", "base", "words"),
    [
        ({"grace_epochs": 5}, {}, ["tune.grace_epochs: ", "5", "train.epochs=4"]),
        ({"space": {"learning_rat": [0.1]}}, {}, ["tune.space.learning_rat: "]),
        (CMAES | {"space": TWO}, {}, ["tune.sampler: ", "ResNet50, DenseNet121"]),
        (CMAES | {"space": LOSSES}, {}, ["tune.sampler: ", "loss"]),
        (CMAES | {"space": {**LOSSES, "when": {"loss=focal": {"focal_gamma": [1, 2]}}}}, {}, ["tune.sampler", "when"]),
        (CMAES | {"objectives": ("auroc", "calibration_error")}, {}, ["tune.sampler: "]),
        (CMAES | {"storage": "sqlite:///x.db"}, {}, ["tune.sampler: ", "tune.storage"]),
        ({"space": {"batch_size": [16, 30]}}, {"workers": 4}, ["tune.space.batch_size.1: ", "30"]),
        ({}, {"workers": 3}, ["batch_size: ", "use 9"]),
        ({}, {"size": 32}, ["size 32", "64, 96"]),
        ({}, {"weights": "nowhere.h5"}, ["weights: nowhere.h5: "]),
        ({"space": {"weights": ["none", "lost.h5"]}}, {}, ["weights: lost.h5: "]),
        *(({"scheduler": name}, {"schedule": "cosine"}, [f"{name} ", "train.schedule"]) for name in EARLY),
        ({"space": {"schedule": ["constant", "cosine"]}}, {}, ["tune.scheduler: asha ", "tune.space"]),
        ({"space": PARTLY}, {"schedule": "cosine"}, ["tune.scheduler: asha ", "train.schedule"]),
        ({"enqueue": ({"dropout": 0.1}, {"dropout": 0.6})}, {}, ["tune.enqueue[1]: dropout: 0.6 ", "0.0 to 0.5"]),
        ({"storage": "my database"}, {}, ["tune.storage: ", "sqlite"]),
        ({"storage": "postgresql://u:secret@host:five/db"}, {}, ["tune.storage: "]),
        ({"storage": "postgresql://u:se@cret@host/db"}, {}, ["tune.storage: ", "%40"]),
        ({"storage": "postgresql+nothing://u:secret@host/db"}, {}, ["tune.storage: ", "postgresql+nothing"]),
        ({"storage": "oracle://u:secret@host/db"}, {}, ["tune.storage: oracle needs the package "]),
    ],
)
def test_wrong_settings_are_refused_and_nothing_is_written(settings, base, words, prepared, tmp_path: Path) -> None:
    message = refuse(ConfigError, prepared, tmp_path / "study", BASE.replace(**base), **settings)
    assert not [word for word in words if word not in message]
    assert "cret" not in message
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({"scheduler": "none"}, {"schedule": "cosine"}),
        ({"scheduler": "none", "space": {"schedule": ["constant", "cosine"]}}, {}),
        ({"space": {"schedule": ["constant", "plateau"]}}, {"schedule": "cosine"}),
        *(({"scheduler": name}, {"schedule": "plateau"}) for name in EARLY),
        ({"space": {}}, {}),
    ],
)
def test_early_stopping_compares_rates_that_do_not_depend_on_the_last_epoch(
    settings: dict[str, Any], base: dict[str, Any], prepared: Path, tmp_path: Path
) -> None:
    """No trial of an accepted search with early stopping has a cosine."""
    plan = plan_of(prepared, tmp_path / "study", BASE.replace(**base), **settings)
    drawn = {plan.build_settings(trial).schedule for trial in ask(plan, plan.open_study(), 12)}
    assert ("cosine" in drawn) == (plan.settings.scheduler == "none")


def test_wrong_folders_are_refused(prepared: Path, tmp_path: Path, command) -> None:
    out = tmp_path / "study"
    for missing in (tmp_path, tmp_path / "none"):
        assert str(missing) in refuse(ConfigError, missing, out)
    message = refuse(ConfigError, prepared, out, BASE.replace(size=None))
    assert "64, 96" in message
    assert "train.size" in message
    searched = plan_of(prepared, out, BASE.replace(size=None), space={**SPACE, "size": "prepared"})
    assert searched.run_settings["sizes"] == [64, 96]
    code, _, err = command("tune", prepared, "--out", out, "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert f"--resume: {out} " in err
    assert not out.exists()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert str(tmp_path / "file") in refuse(OutputError, prepared, tmp_path / "file")
    out.mkdir()
    for content in ('{"kind": "train", "format": 1}', "[]", "not JSON"):
        (out / "settings.json").write_text(content, encoding="utf-8")
        assert str(out) in refuse(OutputError, prepared, out)


@pytest.mark.parametrize("label", [0, 1, None])
def test_a_validation_split_without_an_auroc_is_refused(label: int | None) -> None:
    """No_Finding alone, which is no finding, does not help."""

    def refuse_undefined(base: TrainSettings) -> None:
        table = pa.table({name: pa.array(values, pa.int8()) for name, values in labels.items()})
        plans._check_validation_split(SimpleNamespace(path="prepared", usable={"val": table}.get), base)  # type: ignore[arg-type]

    labels = {name: [label] * 4 for name in LABELS} | {"No_Finding": [0, 1, 0, 1]}
    for findings in (14, 15):
        with pytest.raises(TableError, match=r"^prepared: .* 4 images of split 'val'"):
            refuse_undefined(BASE.replace(findings=findings))
    labels["Mass"] = [1, 0, label, label]
    refuse_undefined(BASE)
    with pytest.raises(TableError):
        refuse_undefined(BASE.replace(findings=("Edema", "Effusion")))


def test_the_name_of_a_search_depends_on_what_its_trials_are(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    name = plan_of(prepared, out).name
    assert plan_of(prepared, tmp_path / "b", space={"dropout": {"high": 0.5, "low": 0}}).name == name
    free = {"trials": 99, "concurrent": 2, "ahead": 5, "max_failures": 7, "keep": "all", "storage": "sqlite:///x.db"}
    assert plan_of(prepared, out, **free).name == name
    runs = {"workers": 2, "cpus_per_worker": 3, "max_failures": 9, "checkpoint_steps": 5}
    assert plan_of(prepared, out, BASE.replace(**runs)).name == name
    bases = [{"size": 96}, {"learning_rate": 0.5}, {"epochs": 5}, {"seed": 1}]
    searches: list[dict[str, Any]] = [{"space": {"dropout": {"low": 0.0, "high": 0.4}}}]
    searches += [{"space": {**SPACE, "zoom": [0.0, 0.1]}}, {"sampler": "random"}, {"startup_trials": 3}]
    searches += [{"scheduler": "median"}, {"grace_epochs": 2}, {"seed": 1}, {"reduction_factor": 2}]
    searches += [{"objectives": ("auroc", "calibration_error")}, {"enqueue": ({"dropout": 0.1},)}]
    others = [plan_of(prepared, out, BASE.replace(**values)) for values in bases]
    others += [plan_of(prepared, out, **values) for values in searches]
    assert len({name, *(other.name for other in others)}) == 15


def test_another_search_in_the_same_folder_is_refused(prepared: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "study"
    plan_of(prepared, out).open_study()
    assert "train.epochs 4 (now 9)" in refuse(OutputError, prepared, out, BASE.replace(epochs=9))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"space": {"dropout": {"low": 0.0, "high": 0.4}}}, "space.dropout "),
        ({"space": {**SPACE, **LOSSES}}, "space.loss None (now "),
        ({"seed": 3}, "tune.seed 0 (now 3)"),
    ]
    for settings, named in changes:
        message = refuse(OutputError, prepared, out, **settings)
        assert message.startswith(f"{out}: ")
        assert named in message
    plan_of(prepared, out, trials=50, keep="all")  # these may change
    monkeypatch.setattr(PreparedSet, "manifest_digest", "another")
    assert "prepared " in refuse(OutputError, prepared, out)


def test_a_storage_belongs_to_one_folder_and_a_folder_to_one_storage(prepared: Path, tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path / 'all.db'}"
    first = plan_of(prepared, tmp_path / "a", storage=address)
    ask(first, first.open_study(), 1)
    message = get_refusal(OutputError, plan_of(prepared, tmp_path / "b", storage=address).open_study)
    assert message.startswith(f"tune.storage: {address} ")
    assert first.name in message
    assert plan_of(prepared, tmp_path / "b", space={"dropout": [0.1, 0.2]}, storage=address).open_study().trials == []
    # `--resume` does not know the storage, because it may hold a password.
    write_curve(first, 0, 0.6)
    for _ in range(2):
        with pytest.raises(OutputError, match=r"a: .*storage"):
            plan_of(prepared, tmp_path / "a").open_study()
    assert len(plan_of(prepared, tmp_path / "a", storage=address).open_study().trials) == 1


def test_the_record_of_a_study_in_a_bucket_continues(bucket: Any, prepared: Path, tmp_path: Path) -> None:
    """Each command works on a copy, which another machine need not have."""
    out = to_path(bucket("records/study"))
    first = plan_of(prepared, out)
    ask(first, study := first.open_study(), 2)
    assert plan_of(prepared, out).open_study().trials == [], "not saved yet"
    first.storage.save()
    second = plan_of(prepared, out).open_study()
    assert [trial.params for trial in second.trials] == [trial.params for trial in study.trials]
    assert bucket.keys("records/study") == ["records/study/settings.json", "records/study/study.db"]
    assert str(first.storage) == f"{out}/study.db".replace(f"{bucket.options}/", "/") + bucket.options
    # A database instead, whose record is not in the bucket.
    bucket.put("records/study/trials/0000/metrics.csv", b"")
    with pytest.raises(OutputError, match=r"has trials that sqlite:///.* does not know"):
        plan_of(prepared, out, storage=f"sqlite:///{tmp_path}/another.db").open_study()


def test_a_missing_driver_names_its_extra(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    message = get_refusal(ConfigError, plan_of, prepared, tmp_path, storage="postgresql://u:secret@host/db")
    assert message == "tune.storage: postgresql needs psycopg. Install it with: pip install 'ray-cxr[postgres]'"


@pytest.mark.parametrize("odd", ODD)
def test_the_address_of_a_study_names_its_file(odd: str) -> None:
    address = storage._make_address(Path(f"/data/a{odd}b"))
    filled = optuna.storages.RDBStorage._fill_storage_url_template(address)
    assert make_url(filled).database == f"/data/a{odd}b/study.db"
    assert make_url(filled).query == {}


def test_a_study_lies_in_its_folder_of_any_name(prepared: Path, tmp_path: Path) -> None:
    plan = plan_of(prepared, tmp_path / ODD_NAME)
    ask(plan, plan.open_study(), 1)
    assert [path.name for path in tmp_path.iterdir()] == [ODD_NAME]
    assert {path.name for path in plan.out.iterdir()} == {"settings.json", "study.db"}
    assert str(plan.storage) == storage._make_address(plan.out)
    assert len(plan_of(prepared, plan.out).open_study().trials) == 1


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("locked", "database is locked; another program has locked it: end that program, then "),
        ("read-only", "attempt to write a readonly database; make the file and its folder writable, then "),
        ("damaged", "file is not a database; it is damaged: restore it from a backup, "),
        ("cut", "database disk image is malformed; it is damaged: restore it from a backup, "),
    ],
)
def test_a_database_that_cannot_be_written_is_named_within_seconds(
    state: str, words: str, prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "START_LOCK_S", 0.1)
    file = tmp_path / "studies.db"
    address = f"sqlite:///{file}"
    plan_of(prepared, tmp_path / "a", storage=address).open_study()
    if state == "read-only":  # root may write to any file
        address = f"sqlite:///file:{file}?mode=ro&uri=true"
    elif state != "locked":
        file.write_bytes(b"damaged" * 1000 if state == "damaged" else file.read_bytes()[:5000])
    before = file.read_bytes()
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
        if state == "locked":
            other.execute("BEGIN IMMEDIATE")
        message = get_refusal(RayCxrError, plan_of(prepared, tmp_path / "a", storage=address).open_study)
    assert message.startswith("tune.storage: sqlite:///")
    assert words in message
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://u:secret@host.invalid/db", "postgresql://u:***@host.invalid/db: "),
        ("sqlite:////nowhere/at/all.db", "sqlite:////nowhere/at/all.db: "),
        ("sqlite:////tmp/x.db?password=secret", "sqlite:////tmp/x.db: "),
        ("postgresql://u:se%40cret@host.invalid:1/db?sslpassword=secret", "postgresql://u:***@host.invalid:1/db: "),
    ],
)
def test_a_broken_storage_is_refused_without_its_password(address: str, shown: str, prepared, tmp_path: Path) -> None:
    plan = plan_of(prepared, tmp_path / "study", storage=address)
    message = get_refusal(RayCxrError, plan.open_study)
    assert message.startswith("tune.storage: ")
    assert shown in message
    plans.save_start_settings(plan.out, plan.base, plan.settings)
    assert "cret" not in message + str(plan.storage)
    files = [path for path in plan.out.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"begun.json"}  # no settings.json: the folder is still free
    assert not any(b"secret" in path.read_bytes() for path in files)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_resumed_study_draws_other_values(sampler: str, prepared: Path, tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        plan = plan_of(prepared, tmp_path / "study", sampler=sampler)
        trials = ask(plan, study := plan.open_study(), 3)
        runs.append([trial.params["dropout"] for trial in trials])
        study.tell(trials[0], 0.5)
    assert len({*runs[0], *runs[1]}) == 6
    # The same search in another folder draws the same values, and another seed draws others.
    assert first_dropouts(plan_of(prepared, tmp_path / "again", sampler=sampler), 3) == runs[0]
    assert not set(first_dropouts(plan_of(prepared, tmp_path / "other", sampler=sampler, seed=1), 3)) & set(runs[0])


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "space"), [("tpe", FULL), ("tpe", {}), ("random", FULL), ("cmaes", RATES)])
def test_samplers_print_nothing(sampler: str, space: dict[str, Any], prepared: Path, tmp_path: Path, capfd) -> None:
    """They model the space after two trials and see finished, stopped and failed ones."""
    plan = plan_of(prepared, tmp_path, space=space, sampler=sampler, startup_trials=2)
    study = plan.open_study()
    for i in range(6):
        (trial,) = ask(plan, study, 1)
        assert plan.build_settings(trial).epochs == 4
        if i % 3 == 2:
            trial.report(0.5, 1)
            study.tell(trial, state=TrialState.PRUNED if i == 2 else TrialState.FAIL)
        else:
            study.tell(trial, 0.9 - abs(np.log10(trial.params["learning_rate"]) + 3) / 10)
    assert capfd.readouterr() == ("", "")


def test_known_points_come_first_and_once(prepared: Path, tmp_path: Path) -> None:
    points = ({"backbone": "TinyCNN", "learning_rate": 1e-3, "batch_size": 8}, {"backbone": "ResNet50", "dense": [256]})
    settings = {"space": FULL, "enqueue": points, "known": True, "trials": 3}
    plan = plan_of(prepared, tmp_path, **settings)
    study = plan.open_study()
    first, second, third, fourth = ask(plan, study, 4)
    assert {name: first.params[name] for name in points[0]} == points[0]
    assert plan.build_settings(second).dense == (256,)
    assert (third.params["backbone"], third.params["learning_rate"]) == ("ResNet50", 1e-4)
    assert len(plan.points) == 3  # DenseNet121 is not searched
    assert "dense" in plan.points[2][1]  # [512] is no choice here, so the sampler chooses
    study.tell(first, 0.7)
    again = plan_of(prepared, tmp_path, **settings)
    (fifth,) = ask(again, again.open_study(), 1)
    assert not {fourth.params["learning_rate"], fifth.params["learning_rate"]} & {1e-3, 1e-4}


def test_a_kill_does_not_lose_enqueued_points(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = tuple({"dropout": value} for value in (0.1, 0.2, 0.3))
    enqueue = optuna.Study.enqueue_trial

    def interrupt(self: optuna.Study, *args: Any, **options: Any) -> None:
        if self.trials:
            raise KeyboardInterrupt
        enqueue(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "enqueue_trial", interrupt)
        with pytest.raises(KeyboardInterrupt):
            plan_of(prepared, tmp_path, enqueue=points).open_study()
    assert first_dropouts(plan_of(prepared, tmp_path, enqueue=points), 3) == [0.1, 0.2, 0.3]


def test_weights_are_absolute_paths(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have other working directories."""
    monkeypatch.chdir(tmp_path)
    Path("w.h5").touch()
    searched = {"space": {"weights": ["none", "w.h5"]}, "enqueue": ({"weights": "w.h5"},)}
    for out, base, settings in (("a", BASE.replace(weights="w.h5"), {}), ("b", BASE, searched)):
        plan = plan_of(prepared, Path(out), base, **settings)
        (trial,) = ask(plan, plan.open_study(), 1)
        assert plan.build_settings(trial).weights == str(tmp_path / "w.h5")


Recorded = tuple[StudyPlan, optuna.Study]


@pytest.fixture
def recorded(prepared: Path, tmp_path: Path) -> Recorded:
    """A finished trial, a stopped, a failed and a running one, and one that waits."""
    points: tuple[dict[str, Any], ...] = (
        {"backbone": "ResNet50", "batch_size": 16, "ema": 0.99, "flip": True, "dense": [512, 256]},
        {"backbone": "TinyCNN", "schedule": "plateau", "plateau_patience": 3},
        {"backbone": "ResNet50", "dense": []},
        *({"backbone": "TinyCNN"},) * 2,
    )
    rest = {"batch_size": 8, "ema": "none", "flip": False, "schedule": "constant"}
    points = tuple({**rest, "learning_rate": number / 1000, **point} for number, point in enumerate(points, 1))
    plan = plan_of(prepared, tmp_path / "study", space=FULL, enqueue=points)
    study = plan.open_study()
    finished, stopped, failed, running = ask(plan, study, 4)
    write_curve(plan, 0, 0.6, 0.8, 0.7)
    finished.set_user_attr("images_per_second", 12.5)
    finished.set_user_attr("starts", 3)
    study.tell(finished, 0.8)
    write_curve(plan, 1, None, 0.55)
    stopped.report(0.55, 2)
    study.tell(stopped, state=TrialState.PRUNED)
    write_curve(plan, 2, 0.95)
    failed.set_user_attr("reason", "the loss is nan")
    study.tell(failed, state=TrialState.FAIL)
    running.set_user_attr("starts", 1)
    return plan, study


KINDS = {
    **dict.fromkeys(("state", "reason", "backbone", "param_schedule", "param_dense"), pa.string()),
    **dict.fromkeys(("number", "epochs", "best_epoch", "restarts"), pa.int32()),
    **dict.fromkeys(("param_batch_size", "param_plateau_patience"), pa.int64()),
    **dict.fromkeys(("param_learning_rate", "param_ema", "seconds", "val_auroc"), pa.float64()),
    **dict.fromkeys(("calibration_error", "images_per_second"), pa.float64()),
    **dict.fromkeys(("started", "ended"), pa.timestamp("us", tz="UTC")),
    "param_flip": pa.bool_(),
}


def test_the_record_has_a_row_for_each_started_trial(recorded: Recorded, tmp_path: Path) -> None:
    rows = records.build_trial_table(*recorded)
    assert isinstance(rows.loc[1, "param_plateau_patience"], int)  # though others have none
    assert rows.loc[0, "param_dense"] == (512, 256)
    assert (abs(pd.Timestamp.now("UTC") - rows["started"]) < pd.Timedelta(minutes=30)).all()
    atomic.write_parquet(records.to_arrow(rows), tmp_path / "trials.parquet")
    table = pq.read_table(tmp_path / "trials.parquet")
    expected: dict[str, list[Any]] = {
        "number": [0, 1, 2, 3],
        "state": ["finished", "stopped", "failed", "running"],
        "reason": [None, None, "the loss is nan", None],
        "backbone": ["ResNet50", "TinyCNN", "ResNet50", "TinyCNN"],
        "param_learning_rate": [1e-3, 2e-3, 3e-3, 4e-3],
        "param_batch_size": [16, 8, 8, 8],
        "param_ema": [0.99, None, None, None],
        "param_flip": [True, False, False, False],
        "param_schedule": ["constant", "plateau", "constant", "constant"],
        "param_dense": ["[512, 256]", None, "[]", None],
        "param_plateau_patience": [None, 3, None, None],
        "epochs": [3, 2, 1, 0],
        "best_epoch": [2, 2, 1, None],
        "val_auroc": [0.8, 0.55, 0.95, None],
        "calibration_error": [0.125, 0.125, 0.25, None],
        "images_per_second": [12.5, None, None, None],
        "seconds": [7.5, 5.0, 2.5, None],
        "restarts": [2, 0, 0, 0],
        "curve": rows["curve"].tolist(),
    }
    found = table.to_pydict()
    assert {name: found[name] for name in expected} == expected
    assert found["curve"][1] == [epoch_row(1, None), epoch_row(2, 0.55)]
    assert [value is not None for value in found["ended"]] == [True, True, True, False]
    assert found["ended"][0] == rows["ended"].iloc[0]


def test_the_types_of_the_table_do_not_depend_on_its_trials(recorded: Recorded, prepared, tmp_path: Path) -> None:
    def kinds(rows: pd.DataFrame) -> dict[str, pa.DataType]:
        return {field.name: field.type for field in records.to_arrow(rows).schema}

    rows = records.build_trial_table(*recorded)
    expected = KINDS | {"curve": kinds(rows)["curve"]}
    assert {field.name for field in expected["curve"].value_type} == set(epoch_row(1, 0.5))
    for part in (rows, rows.iloc[3:], rows.iloc[:1]):
        assert kinds(part) == expected
    plan = plan_of(prepared, tmp_path / "empty", enqueue=({"dropout": 0.1},))
    empty = records.build_trial_table(plan, plan.open_study())
    assert len(empty) == 0
    assert records.find_best_trial(empty) is None
    assert kinds(empty) == {name: kind for name, kind in expected.items() if not name.startswith("param_")}


def test_the_best_trial_is_the_highest_that_did_not_fail(recorded: Recorded) -> None:
    for changes, best in (
        ({}, 0),  # the failed trial has 0.95
        ({1: 0.8}, 0),  # the first of two equal trials
        ({1: 0.81}, 1),  # a stopped trial
        ({3: 0.9}, 1),  # a running trial without a checkpoint
        ({3: 0.9}, 3),
        (dict.fromkeys((0, 1, 3), None), None),
    ):
        for number, auroc in changes.items():
            write_curve(recorded[0], number, auroc)
        if best == 3:
            store_checkpoints(recorded[0].folder(3), {1: 0.9})
        assert records.find_best_trial(records.build_trial_table(*recorded)) == best


def read_best_epoch(plan: StudyPlan, study: optuna.Study, number: int) -> tuple[int, int, float]:
    """Return the epochs and the best epoch of a trial's row, which the bundle would have too, and its AUROC."""
    row = records.build_trial_table(plan, study).set_index("number").loc[number]
    best = find_best_checkpoint(plan.folder(number), row["epochs"])
    with best.as_directory() as checkpoint:
        exported = read_validated_epoch(Path(checkpoint))
    assert exported == row["best_epoch"]
    return row["epochs"], exported, row["val_auroc"]


def test_the_epochs_of_an_interrupted_trial_are_those_of_its_checkpoints(recorded: Recorded) -> None:
    """Training is ahead of the latest checkpoint, and a later epoch may be the best."""
    plan, study = recorded
    folder = plan.folder(3)
    write_curve(plan, 3, 0.6, 0.7, 0.9)
    assert records.build_trial_table(plan, study)["epochs"].tolist()[3] == 0
    store_checkpoints(folder, {1: 0.6, 2: 0.7}, within=3)
    assert read_best_epoch(plan, study, 3) == (2, 2, 0.7)
    assert records.find_best_trial(records.build_trial_table(plan, study)) == 0
    # A continued trial reports the same epochs to the scheduler.
    assert [point["epoch"] for point in read_stored_epochs(folder)] == [1, 2]
    store_checkpoints(folder, {1: 0.6, 2: 0.7, 3: 0.9})
    assert read_best_epoch(plan, study, 3) == (3, 3, 0.9)
    # A checkpoint that is stored later does not change the bundle of a row.
    store_checkpoints(folder, {1: 0.6, 2: 0.7, 3: 0.9, 4: 0.95})
    assert find_best_checkpoint(folder, 3).path.endswith("checkpoint_2")


def test_the_epochs_of_a_stopped_trial_remain_without_its_checkpoints(recorded: Recorded, tmp_path: Path) -> None:
    """Another epoch was stored before the trial stopped, and one more was trained."""
    plan, study = recorded
    folder = plan.folder(1)
    write_curve(plan, 1, 0.5, 0.55, 0.6, 0.9)
    store_checkpoints(folder, {1: 0.5, 2: 0.55, 3: 0.6})
    store_checkpoints(plan.folder(0), {2: 0.8, 3: 0.7})
    assert read_best_epoch(plan, study, 1) == (3, 3, 0.6)
    before = records.build_trial_table(plan, study)
    results.drop_checkpoints(plan, study, before)
    assert [plan.folder(number).joinpath("ray").exists() for number in (0, 1)] == [True, False]
    pd.testing.assert_frame_equal(records.build_trial_table(plan, study), before)
    assert read_validated_epoch(folder) == 3


def test_a_running_trial_does_not_cost_the_best_one_its_checkpoints(recorded: Recorded) -> None:
    """It may fail."""
    plan, study = recorded
    write_curve(plan, 3, 0.9)
    for number, scores in ((0, {2: 0.8, 3: 0.7}), (3, {1: 0.9})):
        store_checkpoints(plan.folder(number), scores)
    rows = records.build_trial_table(plan, study)
    assert records.find_best_trial(rows) == 3
    results.drop_checkpoints(plan, study, rows)
    assert [plan.folder(number).joinpath("ray").exists() for number in (0, 3)] == [True, True]


def test_a_damaged_list_of_checkpoints_is_an_error(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(sleep=lambda seconds: None))
    store_checkpoints(recorded[0].folder(3), {1: 0.9})
    path = recorded[0].folder(3) / "ray" / CHECKPOINT_LIST
    path.write_text("{", encoding="utf-8")
    assert get_refusal(OutputError, records.build_trial_table, *recorded).startswith(f"{path}: damaged")


def test_a_list_that_is_being_rewritten_is_read_again(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recorded[0].folder(3)
    write_curve(recorded[0], 3, 0.9)
    store_checkpoints(folder, {1: 0.9})
    (folder / "ray" / CHECKPOINT_LIST).write_text("", encoding="utf-8")
    rewrite = SimpleNamespace(sleep=lambda seconds: store_checkpoints(folder, {1: 0.9}))
    monkeypatch.setattr(checkpoints, "time", rewrite)
    assert records.build_trial_table(*recorded)["epochs"].tolist()[3] == 1


def test_a_missing_curve_is_empty(prepared: Path, tmp_path: Path) -> None:
    plan = plan_of(prepared, tmp_path)
    assert read_metrics(plan.folder(0)) == []
    write_curve(plan, 0, 0.5, None)
    assert [row["val_auroc"] for row in read_metrics(plan.folder(0))] == [0.5, None]
    (plan.folder(0) / "metrics.csv").write_bytes(b"")
    assert read_metrics(plan.folder(0)) == []


def test_values_of_a_trial_in_the_order_of_its_objectives() -> None:
    names = ("auroc", "images_per_second", "calibration_error")
    report = {"best_val_auroc": 0.7, "val_auroc": 0.6, "images_per_second": 20, "calibration": 0.1}
    assert records.read_objectives(report, names) == [0.7, 20.0, 0.1]
    assert records.read_objectives(report, ("auroc",)) == [0.7]
    for missing in (None, float("nan"), float("inf")):
        assert records.read_objectives({**report, "calibration": missing}, names) is None


def test_validation_probabilities_have_their_labels_and_patients(prepared: Path, tmp_path: Path) -> None:
    plan = plan_of(prepared, tmp_path)
    assert records.load_validation(plan, 0) is None
    names = list(plan.base.finding_names())
    val = PreparedSet(prepared, 64).usable("val").to_pandas().iloc[::-1]
    ids = val["image_id"].to_numpy().astype(str)
    p = np.random.default_rng(0).random((len(ids), len(names)), np.float32)
    plan.folder(0).mkdir(parents=True)
    np.savez(plan.folder(0) / "validation.npz", probabilities=p, image_ids=ids)
    _, labels, probabilities, patients = records.load_validation(plan, 0)  # type: ignore[misc]
    assert labels.dtype == np.int8
    assert (labels == val[names].fillna(-1).to_numpy()).all()
    assert (probabilities == p).all()
    assert patients.tolist() == val["patient_id"].tolist()
    np.savez(plan.folder(0) / "validation.npz", probabilities=p, image_ids=np.array(["a"] * len(ids)))
    assert records.load_validation(plan, 0) is None


def test_resume_knows_the_settings_and_takes_overrides(prepared: Path, tmp_path: Path) -> None:
    plan = plan_of(prepared, tmp_path, trials=5, enqueue=({"dropout": 0.1},), storage="sqlite:///x.db", seed=4)
    assert not plans.has_search(tmp_path)
    plans.save_start_settings(tmp_path, plan.base, plan.settings)
    assert plans.has_search(tmp_path)
    assert plans.load_start_settings(tmp_path, []) == (plan.base, plan.settings.replace(storage=None))
    base, settings = plans.load_start_settings(tmp_path, ["trials=9", "tune.keep=all", "train.cpus_per_worker=1"])
    assert (settings.trials, settings.keep, settings.seed, base.cpus_per_worker) == (9, "all", 4, 1)
    assert StudyPlan(prepared, tmp_path, base, settings).name == plan.name
    with pytest.raises(ConfigError, match=r"'tune\.trails'.*'trials'"):
        plans.load_start_settings(tmp_path, ["trails=9"])
    for damaged in ("", "[]", '{"train": {}}', '{"train": 1, "tune": 2}'):
        (tmp_path / "begun.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(OutputError, match=r"begun\.json: .*--resume"):
            plans.load_start_settings(tmp_path, [])


def test_settings_of_train_are_not_searched_by_default(prepared: Path, tmp_path: Path) -> None:
    plan = plan_of(prepared, tmp_path, BASE.replace(workers=2, loss="focal"), space={}, known=True)
    assert plan.space.backbones == ("TinyCNN",)
    assert not {"backbone", "batch_size", "dense", "loss"} & set(plan.space.fields)
    assert {"learning_rate", "weight_decay", "focal_gamma"} < set(plan.space.fields)
    searched = plan_of(prepared, tmp_path, space={"backbone": ["TinyCNN", "ResNet50"]})
    assert searched.space.backbones == ("TinyCNN", "ResNet50")
    # The settings that --resume reads hold every field.
    plans.save_start_settings(tmp_path, plan.base, plan.settings)
    assert StudyPlan(prepared, tmp_path, *plans.load_start_settings(tmp_path, [])).name == plan.name


def test_a_search_is_finished_with_all_trials_and_a_bundle(prepared: Path, tmp_path: Path) -> None:
    plan = plan_of(prepared, tmp_path, trials=4)
    assert not plan.is_finished()
    (tmp_path / "bundle").mkdir()
    unfinished = ['{"trials_over": 3, "best_number": 1}', '{"trials_over": 4, "best_number": null}', "["]
    for summary in (*unfinished, '{"trials_over": 4}', '{"trials_over": 4, "best_number": 0}'):
        assert not plan.is_finished()
        (tmp_path / plans.SUMMARY).write_text(summary, encoding="utf-8")
    assert plan.is_finished()
    assert plan_of(prepared, tmp_path, trials=3).is_finished()
    assert not plan_of(prepared, tmp_path, trials=5).is_finished()
    (tmp_path / "bundle").rmdir()
    assert not plan.is_finished()


def test_a_database_that_fails_in_between_loses_no_trial(prepared: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(searcher, "time", SimpleNamespace(sleep=lambda seconds: None))
    plan = plan_of(prepared, tmp_path / "study", enqueue=({"dropout": 0.3},))
    study = plan.open_study()
    search = searcher.StudySearcher(plan, study, 1)
    create, store, errors = optuna.trial.Trial.__init__, study._storage.set_trial_state_values, iter([True, True])

    def lose_created(self: Any, *args: Any) -> None:
        if next(errors, False):
            monkeypatch.setattr(optuna.trial.Trial, "__init__", create)
            raise optuna.exceptions.StorageInternalError("the server closed the connection")

    monkeypatch.setattr(optuna.trial.Trial, "__init__", lose_created)
    assert search.suggest("a")["number"] == 0
    assert search.get_values("a")["dropout"] == 0.3

    def lose_answer(*args: Any, **options: Any) -> Any:
        done = store(*args, **options)
        monkeypatch.setattr(study._storage, "set_trial_state_values", store)
        raise optuna.exceptions.StorageInternalError(f"lost after {done}")

    monkeypatch.setattr(study._storage, "set_trial_state_values", lose_answer)
    search.on_trial_complete("a", {"epoch": 2, "val_auroc": 0.7, "best_val_auroc": 0.7, "ended": 1})
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE]


def test_the_driver_of_mysql_is_named() -> None:
    with pytest.raises(ConfigError, match="pymysql"):
        storage._check_address("mysql://u:secret@host/db")


def test_a_repeated_epoch_replaces_the_one_that_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(trial_module.TuneReportCallback, "__init__", lambda self: None)
    monkeypatch.setattr(trial_module.TuneReportCallback, "after_report", lambda self, run, found, _: sent.extend(found))
    points = [epoch_row(n, value) | {"selection": value} for n, value in ((1, 0.6), (2, 0.7), (3, 0.9))]
    forwarder = trial_module.ReportForwarder(points, None)
    forwarder.after_report(None, [points[2] | {"val_auroc": 0.65}], None)
    assert sent[0]["best_val_auroc"] == 0.7
